"""Set the small gammas of trained networks to zero and measure what it costs (claim 2 of arXiv 2003.00152).

    python prune.py results/resnet14-bn-s0.pt
    python prune.py runs/resnet110-bn-s0.pt --thresholds 0.05 --save runs/pruned.pt

Prints a table per checkpoint. Where the record of the run (the .json beside the checkpoint) has no such table yet, the
default one is added to it, for analyze.py.
"""
import argparse
import contextlib
import json
import math
import pathlib

import torch

from models import batchnorms, parse_arch
from train import (DATA_DIR, DATASETS, RECIPE, Parser, Problem, add_device_argument, choose_device, evaluate, flatten,
                   is_number, load_checkpoint, load_data, restore_model, run, save_checkpoint, trained_parameters,
                   write_record, zero_gammas)

THRESHOLDS = [0.0, 0.001, 0.01, 0.02, 0.05, 0.1, 0.2]


def gammas(model):
    """All gammas of a network as one vector, in the order of its layers."""
    return flatten([bn.weight for _, bn in batchnorms(model)])


def prune_table(model, images, labels, amp, thresholds):
    """What zeroing the gammas below each threshold does, as one dict per threshold, from the smallest up.

    Each holds "threshold", "pruned" (share of the gammas with |gamma| < threshold), "test_accuracy" with those set to
    zero, both in percent, and "change" in points against the network as it came. Leaves the network pruned by the
    largest threshold. Beta stays in place.
    """
    rows, pruned = [], 0.0
    original = gammas(model).abs().cpu()
    accuracy = unpruned = evaluate(model, images, labels, amp)
    for threshold in sorted(thresholds):
        share = 100 * (original < threshold).double().mean().item()
        if share > pruned:
            zero_gammas(model, threshold)
            accuracy, pruned = evaluate(model, images, labels, amp), share
        rows.append({"threshold": threshold, "pruned": share, "test_accuracy": accuracy, "change": accuracy - unpruned})
    return rows


def print_table(rows):
    """Print the rows of prune_table."""
    print("  |gamma| <   gammas zeroed   test accuracy   change (points)")
    for row in rows:
        print(f"{row['threshold']:11g}{row['pruned']:14.2f} %{row['test_accuracy']:14.2f} %{row['change']:+18.2f}")


def add_to_record(path, checkpoint, rows):
    """Add a prune table to the record beside this checkpoint, if that is the record of this run and has none yet."""
    record_path = path.with_suffix(".json")
    if not record_path.exists():
        return
    try:
        record = read_record(record_path)
        same_run = all(record.get(name) == value for name, value in checkpoint["options"].items())
        if "prune" not in record and same_run and record["records"] == checkpoint["records"]:
            write_record(path, {**record, "prune": rows})
            print(f"added to {record_path}")
    except (Problem, OSError) as problem:   # the table is printed; this was only for the record
        print(f"not added to the record: {problem}")


def read_record(path):
    """The record of a run as train.py wrote it, a dict. Raises Problem if the file is no such record."""
    try:
        record = json.loads(path.read_text())
        parse_arch(record["arch"])
        columns = {"threshold", "pruned", "test_accuracy", "change"}
        if not (all(type(record[name]) is RECIPE[name] for name in RECIPE) and is_number(record["test_accuracy"])
                and all(set(row) == columns and all(map(is_number, row.values())) for row in record.get("prune", []))
                and isinstance(record["records"], list) and is_number(record["seconds"])
                and all(type(record[name]) is str for name in ("hardware", "torch"))
                and type(record["commit"]) in (str, type(None))):
            raise ValueError("an entry is of a wrong type")
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise Problem(f"{path} is not the record of a run ({error})") from None
    return record


def add_data_arguments(parser):
    """Give a parser the options that say on which data and device a checkpoint is evaluated."""
    parser.add_argument("--dataset", choices=DATASETS, help="default: as the checkpoint was trained")
    parser.add_argument("--data-dir", type=pathlib.Path, default=DATA_DIR, help="where CIFAR-10 is or will be put")
    add_device_argument(parser)


def load_test_data(checkpoint, args, device):
    """The test images (N, 32, 32, 3) and labels (N,) for a checkpoint, on the device."""
    options = checkpoint["options"]
    _, test_data = load_data(args.dataset or options["dataset"], args.data_dir, options["seed"])
    return (tensor.to(device) for tensor in test_data)


def threshold(text):
    """A finite number that is not negative, for argparse."""
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a finite number, 0 or more (checkpoints come before this)")


def main():
    parser = Parser(description="Zero the gammas with |gamma| below each threshold and evaluate the network.")
    parser.add_argument("checkpoints", nargs="+", type=pathlib.Path, metavar="ckpt.pt", help="written by train.py")
    parser.add_argument("--thresholds", nargs="+", type=threshold, default=THRESHOLDS, metavar="T",
                        help="finite, 0 or more (default: %(default)s)")
    parser.add_argument("--save", type=pathlib.Path, metavar="pruned.pt",
                        help="write the pruned network: for one checkpoint and one threshold")
    add_data_arguments(parser)
    args = parser.parse_args()
    if args.save and (len(args.checkpoints) > 1 or len(args.thresholds) > 1):
        parser.error("--save takes one checkpoint and one threshold, such as --thresholds 0.01")
    if args.save and args.save.exists():
        parser.error(f"--save {args.save}: the file exists; choose another name")
    device = choose_device(args.device)

    for path in args.checkpoints:
        checkpoint = load_checkpoint(path)
        options = checkpoint["options"]
        model = restore_model(checkpoint, path).to(device, memory_format=torch.channels_last)
        images, labels = load_test_data(checkpoint, args, device)
        print(f"{path}: {options['arch']}, --train {options['train']}, epoch {checkpoint['epoch']} of "
              f"{options['epochs']}, {args.dataset or options['dataset']}, {len(gammas(model)):,} gammas")
        rows = prune_table(model, images, labels, options["amp"], args.thresholds)
        print_table(rows)
        if args.thresholds == THRESHOLDS and args.dataset in (None, options["dataset"]):
            add_to_record(path, checkpoint, rows)
        if args.save:
            pruned_below = max(checkpoint["pruned_below"], *args.thresholds)
            trained = flatten(trained_parameters(model)).cpu()
            args.save.parent.mkdir(parents=True, exist_ok=True)
            save_checkpoint(args.save, {**checkpoint, "pruned_below": pruned_below, "trained": trained})
            print(f"saved {args.save}")


if __name__ == "__main__":
    run(main)
