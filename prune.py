"""Set the small gammas of trained networks to zero and measure what it costs (arXiv 2003.00152).

    python prune.py results/resnet14-bn-s0.pt
    python prune.py runs/resnet110-bn-s0.pt --thresholds 0.05

Prints a table per checkpoint. That of the default thresholds is added to the record of a finished
run, the .json beside it.
"""
import argparse
import os

import torch

from models import gammas_and_betas
from train import (UserError, add_device_arguments, argument, evaluate, evaluation_amp,
                   load_checkpoint, load_data, log, number, read_record, record_path, run_cli,
                   set_full_fp32, write_record)

THRESHOLDS = [0.0, 0.001, 0.01, 0.02, 0.05, 0.1, 0.2]

def gammas(model):
    """All gammas of a network as one vector on the CPU, in the order of its layers."""
    vectors = [gamma.detach() for _, gamma, _ in gammas_and_betas(model)]
    if not vectors:
        raise UserError("this network has no gammas")
    return torch.cat(vectors).cpu()

@torch.no_grad()
def zero_gammas(model, threshold):
    """Set every gamma with |gamma| < threshold to zero. Beta stays: such a feature is constant."""
    for _, gamma, _ in gammas_and_betas(model):
        gamma[gamma.abs() < threshold] = 0

def prune_table(model, images, labels, amp, thresholds):
    """What zeroing the gammas below each threshold does: a dict for each, from the smallest up.

    Each holds "threshold", "pruned" (share of the gammas with |gamma| < threshold), "test_accuracy"
    with those set to zero, both in percent, and "change" in points against the unpruned network.
    Leaves the network pruned.
    """
    original = gammas(model).abs()
    unpruned_accuracy = evaluate(model, images, labels, amp)
    rows = []
    for threshold in sorted(thresholds):
        zero_gammas(model, threshold)
        accuracy = evaluate(model, images, labels, amp)
        rows.append({
            "threshold": threshold,
            "pruned": 100 * (original < threshold).double().mean().item(),
            "test_accuracy": accuracy,
            "change": accuracy - unpruned_accuracy,
        })
    return rows

def prepare_test(model, checkpoint, args):
    """Move a network to args.device, and load the test data.

    Returns the images, their labels, and the precision to evaluate in, that of the training.
    """
    options = checkpoint["options"]
    amp = evaluation_amp(options["amp"], args.device)
    set_full_fp32()
    model.to(args.device, memory_format=torch.channels_last)
    _, (images, labels) = load_data(options["dataset"], args.data_dir, options["seed"])
    return images.to(args.device), labels.to(args.device), amp

def add_to_record(path, checkpoint, name, table):
    """Add a table to the record beside a checkpoint, unless the record has it already.

    What stands against it, such as the record of another run, is printed and raises nothing.
    """
    record_file = record_path(path)
    if not record_file.exists():
        return
    try:
        record = read_record(record_file)
        if record["epochs"] != checkpoint["epochs"]:
            log(f"not added to the record: {record_file} has other epochs than the checkpoint")
        elif name in record:
            log(f"{record_file} has this table already")
        else:
            record[name] = table
            write_record(path, record)
            log(f"added to {record_file}")
    except ValueError as error:
        log(f"not added to the record: {record_file} is {error}")
    except (UserError, OSError) as error:
        log(f"not added to the record: {error}")

def print_rows(path, checkpoint, rows):
    options = checkpoint["options"]
    done = len(checkpoint["epochs"])
    log(f"{path}: {options['arch']}, --train {options['train']}, --norm {options['norm']}, "
        f"epoch {done} of {options['epochs']}")
    log("  |gamma| <   gammas zeroed   test accuracy   change")
    for row in rows:
        log(f"{row['threshold']:11g}{row['pruned']:14.2f} %{row['test_accuracy']:14.2f} %"
            f"{row['change']:+9.2f}")

def main():
    parser = argparse.ArgumentParser(
        description="Zero the gammas with |gamma| below each threshold and evaluate.")
    parser.add_argument("checkpoints", nargs="+", type=os.path.expanduser, metavar="x.pt",
                        help="written by train.py")
    parser.add_argument("--thresholds", nargs="+", type=argument(number(float, 0, 1e30)),
                        default=THRESHOLDS, metavar="T", help="default: %(default)s")
    add_device_arguments(parser)
    args = parser.parse_args()
    for path in args.checkpoints:
        model, checkpoint = load_checkpoint(path)
        images, labels, amp = prepare_test(model, checkpoint, args)
        rows = prune_table(model, images, labels, amp, args.thresholds)
        print_rows(path, checkpoint, rows)
        if args.thresholds == THRESHOLDS:
            add_to_record(path, checkpoint, "prune", rows)

if __name__ == "__main__":
    run_cli(main)
