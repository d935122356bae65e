"""Set the small gammas of trained networks to zero and measure what it costs (claim 2 of arXiv 2003.00152).

    python prune.py results/resnet14-bn-s0.pt
    python prune.py runs/resnet110-bn-s0.pt --thresholds 0.05 --save runs/pruned.pt

Prints a table per checkpoint. That of the default thresholds is added to the record of the run, the .json beside it.
"""
import argparse
import json
import os
import pathlib

import torch

from models import gammas_and_betas
from train import (OPTIONS, UserError, add_data_arguments, argument, check, check_run, evaluate, load_checkpoint,
                   load_data, one_line, run, save_checkpoint, say, state_tensors, to_vectors, write_record)

THRESHOLDS = [0.0, 0.001, 0.01, 0.02, 0.05, 0.1, 0.2]

def gammas(model):
    """All gammas of a network as one vector on the CPU, in the order of its layers."""
    return torch.cat([gamma.detach().flatten() for _, gamma, _ in gammas_and_betas(model)]).cpu()

@torch.no_grad()
def zero_gammas(model, threshold):
    """Set every gamma with |gamma| < threshold to zero. Beta stays: such a feature becomes a constant."""
    for _, gamma, _ in gammas_and_betas(model):
        gamma.masked_fill_(gamma.abs() < threshold, 0)

def prune_table(model, images, labels, amp, thresholds):
    """What zeroing the gammas below each threshold does, as one dict per threshold, from the smallest up.

    Each holds "threshold", "pruned" (share of the gammas with |gamma| < threshold), "test_accuracy" with those set to
    zero, both in percent, and "change" in points against the unpruned network. Leaves the network pruned.
    """
    rows, original = [], gammas(model).abs()
    before = evaluate(model, images, labels, amp)
    for threshold in sorted(thresholds):
        share = 100 * (original < threshold).double().mean().item()
        zero_gammas(model, threshold)
        accuracy = evaluate(model, images, labels, amp)
        rows.append({"threshold": threshold, "pruned": share, "test_accuracy": accuracy, "change": accuracy - before})
    return rows

def read_record(path):
    """The record of a complete run as train.py wrote it, a dict. Raises UserError if the file is no such record."""
    content = path.read_bytes()
    try:
        record = json.loads(content)
        options = check_run({name: record[name] for name in OPTIONS if name in record}, record["records"])
        check(len(record["records"]) == options["epochs"], "epochs are missing")
        check(record["test_accuracy"] == record["records"][-1]["test_accuracy"], "its accuracy is not the last epoch's")
        check(all(part["first_epoch"] <= options["epochs"] and isinstance(part["commit"] or "", str)
                  and part["hardware"] + part["torch"] for part in record["parts"]), "its parts are incomplete")
        for table, n, names in [("prune", len(THRESHOLDS), ["pruned", "test_accuracy", "change"]),
                                ("activations", 3, ["disabled"])]:
            if table in record:
                check(len(record[table]) == n and all(-100 <= row[name] <= 100 for row in record[table]
                                                      for name in names), f"its table {table} is impossible")
        return {**record, **options}
    except Exception as error:   # whatever a file leads to
        raise UserError(f"{path} is not the record of a run ({one_line(error):.200})") from None

def add_to_record(checkpoint, state, name, table):
    """Add a table to the record beside a checkpoint, if that is the record of this run and has none of this name."""
    path = pathlib.Path(checkpoint).with_suffix(".json")
    if path.exists():
        try:
            record = read_record(path)
            check(record["records"] == state["records"], "of another run")
            if name not in record:
                write_record(path, {**record, name: table})
                say(f"added to {path}")
        except (UserError, ValueError) as error:   # the table is still printed
            say(f"not added to the record: {error}")

def load_test_data(state, args):
    """The test images (N, 32, 32, 3) and labels (N,) for a checkpoint, on the device."""
    _, test_data = load_data(args.dataset or state["options"]["dataset"], args.data_dir, state["options"]["seed"])
    return [tensor.to(args.device) for tensor in test_data]

def main():
    parser = argparse.ArgumentParser(description="Zero the gammas with |gamma| below each threshold and evaluate.")
    parser.add_argument("checkpoints", nargs="+", type=os.path.expanduser, metavar="x.pt", help="written by train.py")
    parser.add_argument("--thresholds", nargs="+", type=argument(float, 0, 1e30), default=THRESHOLDS, metavar="T",
                        help="default: %(default)s")
    parser.add_argument("--save", type=os.path.expanduser, metavar="pruned.pt", help="write the pruned network")
    add_data_arguments(parser, None)
    args = parser.parse_args()
    if args.save and (len(args.checkpoints) > 1 or len(args.thresholds) > 1 or os.path.exists(args.save)):
        parser.error("--save takes one checkpoint, one threshold, such as --thresholds 0.01, and a new file")
    for checkpoint in args.checkpoints:
        model, state = load_checkpoint(checkpoint)
        options = state["options"]
        if args.save and not gammas_and_betas(model)[0][1].requires_grad:
            raise UserError(f"--save: gammas are not part of this checkpoint (--train {options['train']})", 2)
        model.to(args.device, memory_format=torch.channels_last)
        rows = prune_table(model, *load_test_data(state, args), options["amp"], args.thresholds)
        if args.thresholds == THRESHOLDS and args.dataset in (None, options["dataset"]):
            add_to_record(checkpoint, state, "prune", rows)
        if args.save:
            save_checkpoint(pathlib.Path(args.save), {**state, **to_vectors(state_tensors(model))})
        say(f"{checkpoint}: {options['arch']}, --train {options['train']}, --norm {options['norm']}, epoch "
            f"{len(state['records'])} of {options['epochs']}\n  |gamma| <   gammas zeroed   test accuracy   change")
        for row in rows:
            say("{threshold:11g}{pruned:14.2f} %{test_accuracy:14.2f} %{change:+9.2f}".format(**row))

if __name__ == "__main__":
    run(main)
