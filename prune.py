"""Set the small gammas of trained networks to zero and measure what it costs (arXiv 2003.00152).

    python prune.py results/resnet14-bn-s0.pt
    python prune.py runs/resnet110-bn-s0.pt --thresholds 0.05

Prints a table for each checkpoint. Its first row is the network as it is. The table of the default
thresholds is added to the record beside the checkpoint, the .json, if that has none.
"""
import argparse
import os

import torch

from models import gammas_and_betas
from train import (
    add_device_arguments,
    choose_device,
    evaluate,
    load_checkpoint,
    load_data,
    read_record,
    record_path,
    run_cli,
    set_full_fp32,
    write_record,
)

THRESHOLDS = [0.001, 0.01, 0.02, 0.05, 0.1, 0.2]


def gammas(model):
    """All gammas of a network as one vector on the CPU, in the order of its layers."""
    return torch.cat([gamma.detach() for gamma, _ in gammas_and_betas(model)]).cpu()


@torch.no_grad()
def zero_gammas(model, threshold):
    """Set every gamma with |gamma| < threshold to zero. Beta stays: such a feature is constant."""
    for gamma, _ in gammas_and_betas(model):
        gamma[gamma.abs() < threshold] = 0


def prune_table(model, images, labels, thresholds):
    """Zero the gammas below each threshold, from the smallest up, and evaluate in fp32.

    Returns a dict for each threshold: "threshold"; "pruned", the share of gammas with |gamma| <
    threshold, and "test_accuracy", both in percent; "change" of the accuracy, in points. The first
    is that of the unpruned network, with threshold 0. Leaves the network pruned.
    """
    original = gammas(model).abs()
    rows = []
    for threshold in [0.0] + sorted(thresholds):
        zero_gammas(model, threshold)
        accuracy = evaluate(model, images, labels, "off")
        rows.append({
            "threshold": threshold,
            "pruned": 100 * (original < threshold).double().mean().item(),
            "test_accuracy": accuracy,
        })
    for row in rows:
        row["change"] = row["test_accuracy"] - rows[0]["test_accuracy"]
    return rows


def load_test_data(checkpoint, data_dir, device):
    """The test images and labels of the dataset that a network was trained on, on a device."""
    options = checkpoint["options"]
    _, (images, labels) = load_data(options["dataset"], data_dir, options["seed"])
    return images.to(device), labels.to(device)


def add_to_record(checkpoint_path, checkpoint, name, table):
    """Add a table to the record beside a checkpoint, unless the record has it already.

    Nothing happens if there is no record, if it has other epochs than the checkpoint, or if the run
    is not finished: train.py may be writing the record.
    """
    path = record_path(checkpoint_path)
    if not path.exists():
        return
    record = read_record(path)
    is_finished = len(record["epochs"]) == record["options"]["epochs"]
    if is_finished and record["epochs"] == checkpoint["epochs"] and name not in record:
        record[name] = table
        write_record(path, record)
        print(f"added to {path}", flush=True)


def print_rows(path, checkpoint, rows):
    done = len(checkpoint["epochs"])
    print(f"{path}: epoch {done} of {checkpoint['options']['epochs']}, evaluated in fp32")
    print("  |gamma| <   gammas zeroed   test accuracy   change")
    for row in rows:
        threshold = f"{row['threshold']:g}" if row["threshold"] > 0 else "unpruned"
        print(f"{threshold:>11}{row['pruned']:14.2f} %{row['test_accuracy']:14.2f} %"
              f"{row['change']:+9.2f}", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description="Evaluate, and again with the gammas below each threshold set to zero.")
    parser.add_argument("checkpoints", nargs="+", type=os.path.expanduser, metavar="x.pt",
                        help="written by train.py")
    parser.add_argument("--thresholds", nargs="+", type=float, default=THRESHOLDS, metavar="T",
                        help="default: %(default)s")
    add_device_arguments(parser)
    args = parser.parse_args()
    if not all(threshold > 0 for threshold in args.thresholds):
        parser.error("argument --thresholds: not positive")
    device = choose_device(args.device)
    set_full_fp32()
    for path in args.checkpoints:
        model, checkpoint = load_checkpoint(path)
        images, labels = load_test_data(checkpoint, args.data_dir, device)
        rows = prune_table(model.to(device), images, labels, args.thresholds)
        print_rows(path, checkpoint, rows)
        if args.thresholds == THRESHOLDS:
            add_to_record(path, checkpoint, "prune", rows)


if __name__ == "__main__":
    run_cli(main)
