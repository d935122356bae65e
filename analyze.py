"""Print the paper's tables (arXiv 2003.00152), or look into the BatchNorm of trained networks.

    python analyze.py                                       # networks and accuracies, from the records in results/
    python analyze.py results/resnet14-bn-s0.pt             # gamma and beta of one network
    python analyze.py results/resnet14-bn-s0.pt --activations
    python analyze.py --markdown                            # to paste into a README
"""
import pathlib

import numpy as np
import torch
from torch import nn

from models import batchnorms, empty_model, parameter_counts, parse_arch
from prune import THRESHOLDS, add_data_arguments, load_test_data, read_record
from train import MODES, Parser, Problem, choose_device, evaluate, load_checkpoint, restore_model, run

DEEP = ["resnet14", "resnet32", "resnet56", "resnet110", "resnet218", "resnet434", "resnet866"]
WIDE = ["wrn14-2", "wrn14-4", "wrn14-8", "wrn14-16", "wrn14-32"]
PAIRS = list(zip(DEEP[1:6], WIDE))   # about as many BatchNorm parameters in both

# Test accuracy in percent as published. PAPER: ResNet-866 as reported of the paper in The Batch, ResNet-14 and -110 as
# reported in a secondary write-up. TF_GARDEN: single runs of the TensorFlow re-implementation in the model garden.
PAPER = {("resnet866", "all"): "93", ("resnet866", "bn"): "83", ("resnet14", "all"): "91", ("resnet14", "bn"): "48",
         ("resnet110", "all"): "93.3", ("resnet110", "bn"): "69.5"}
TF_GARDEN = {"resnet14": "46.67", "resnet32": "51.29", "resnet56": "55.21", "resnet110": "65.19", "resnet218": "70.09",
             "resnet434": "73.67", "resnet866": "77.83"}
# What a run must have in common with the paper's to enter a table. Precision and data order may differ.
PAPER_RECIPE = {"dataset": "cifar10", "epochs": 160, "batch_size": 128, "lr": 0.1, "weight_decay": 1e-4}


# ------------------------------------------------------------------------------------------------------- tables

def print_table(title, header, rows, markdown):
    """Print a table of strings: aligned columns, the first one to the left, or Markdown."""
    rows = [header, *rows]
    width = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = [[cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, width))]
             for row in rows]
    if markdown:
        rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(width)]
        escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
        lines = [f"| {' | '.join(line)} |" for line in (escaped[0], rule, *escaped[1:])]
        print(f"**{title}**\n", *lines, "", sep="\n")
    else:
        rule = ["-" * w for w in width]
        print(title, *("  ".join(line).rstrip() for line in (lines[0], rule, *lines[1:])), "", sep="\n")


def specification_rows():
    """The paper's table of networks: depth, width and how many parameters they have, counted on the networks built."""
    rows = []
    for arch in [*DEEP, *WIDE]:
        counts = parameter_counts(empty_model(arch))
        numbers = [*parse_arch(arch), counts["all"], counts["bn"], counts["shortcut"], counts["output"]]
        rows.append([arch, *(f"{number:,}" for number in numbers)])
    return rows


def read_records(folder):
    """The records in a folder that belong into the tables, as {(arch, mode, seed): record}.

    Only runs with the paper's recipe on CIFAR-10 belong there, and one for each seed. Returns also why others do not.
    """
    records, left_out = {}, []
    for path in sorted(folder.glob("*.json")):
        record = read_record(path)
        depth, width = parse_arch(record["arch"])
        key = (f"resnet{depth}" if width == 1 else record["arch"]), record["train"], record["seed"]
        if any(record[name] != value for name, value in PAPER_RECIPE.items()):
            left_out.append(f"{path.name} (not the paper's recipe on CIFAR-10)")
        elif key in records:
            left_out.append(f"{path.name} (a run of this seed is already there)")
        else:
            records[key] = record
    return records, left_out


def mean_and_std(values):
    """Mean +- sample standard deviation over n seeds, as text; "-" where nothing was measured."""
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.2f} (n=1)"
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f} (n={len(values)})"


def short(commit):
    """The first digits of a commit, and "-dirty" where a file differed from it; "-" for None."""
    return commit[:7] + commit[40:] if commit else "-"


def print_results(folder, markdown):
    """Print the table of networks and every table of accuracies that the paper's claims are about."""
    print_table("Networks and their trainable parameters",
                ["network", "depth", "width", "all", "BatchNorm", "shortcut conv", "output"],
                specification_rows(), markdown)
    records, left_out = read_records(folder)
    accuracies = {}   # (arch, mode) -> the last-epoch test accuracy of each seed
    for (arch, mode, _), record in records.items():
        accuracies.setdefault((arch, mode), []).append(record["test_accuracy"])

    def ours(arch, mode):
        return mean_and_std(accuracies.get((arch, mode)))

    def paper(arch, mode):
        return PAPER.get((arch, mode), "-")

    def bn_count(arch):
        return f"{parameter_counts(empty_model(arch))['bn']:,}"

    print_table("Depth: test accuracy (%) on CIFAR-10 after the last epoch",
                ["network", "BN parameters", "BN-only", "paper", "TF garden", "all", "paper"],
                [[arch, bn_count(arch), ours(arch, "bn"), paper(arch, "bn"), TF_GARDEN[arch],
                  ours(arch, "all"), paper(arch, "all")] for arch in DEEP], markdown)
    print_table("Width: test accuracy (%) on CIFAR-10 after the last epoch",
                ["network", "BN parameters", "BN-only", "all"],
                [[arch, bn_count(arch), ours(arch, "bn"), ours(arch, "all")] for arch in [DEEP[0], *WIDE]], markdown)
    print_table("Depth against width at about as many BN parameters: BN-only test accuracy (%)",
                ["deep", "BN parameters", "accuracy", "wide", "BN parameters", "accuracy"],
                [[deep, bn_count(deep), ours(deep, "bn"), wide, bn_count(wide), ours(wide, "bn")]
                 for deep, wide in PAIRS], markdown)
    in_no_table = {arch for arch, mode in accuracies if arch not in DEEP + WIDE or mode not in ("all", "bn")}
    columns = ["resnet14", "resnet110", "resnet866"]
    columns += sorted(in_no_table - set(columns))
    print_table("What trains: test accuracy (%) by --train",
                ["--train", *(f"{arch}{suffix}" for arch in columns for suffix in ("", " (paper)"))],
                [[mode, *(show(arch, mode) for arch in columns for show in (ours, paper))] for mode in MODES], markdown)
    rows = [[arch, str(seed), f"{row['threshold']:g}", f"{row['pruned']:.2f}", f"{row['test_accuracy']:.2f}",
             f"{row['change']:+.2f}"] for (arch, mode, seed), record in records.items() if mode == "bn"
            for row in record.get("prune", [])]
    print_table("Gammas set to zero after BN-only training",
                ["network", "seed", "|gamma| <", "zeroed (%)", "accuracy (%)", "change (points)"],
                rows or [["-"] * 6], markdown)
    print_table("Runs, each of them: python train.py and",
                ["options", "test accuracy (%)", "hours", "hardware", "torch", "code"],
                [[f"--arch {record['arch']} --train {record['train']} --seed {record['seed']} --amp {record['amp']}",
                  f"{record['test_accuracy']:.2f}", f"{record['seconds'] / 3600:.1f}", record["hardware"],
                  record["torch"], short(record["commit"])] for record in records.values()] or [["-"] * 6], markdown)
    if left_out:
        print("Left out:", *left_out, sep="\n  ")


# --------------------------------------------------------------------------------------------------- one network

def parameters_by_stage(model):
    """{"stem", "stage1", "stage2", "stage3", "all"} -> (gammas, betas), float64 NumPy vectors."""
    parts = {}
    for name, bn in batchnorms(model):
        parts.setdefault(name.split(".")[0] if name.startswith("stage") else "stem", []).append(bn)
    parts["all"] = [bn for layers in parts.values() for bn in layers]
    return {part: tuple(torch.cat([getattr(bn, kind).detach().cpu().double() for bn in layers]).numpy()
                        for kind in ("weight", "bias")) for part, layers in parts.items()}


def share_below(values, threshold):
    """Percentage of the values whose absolute value is below the threshold."""
    return 100 * np.mean(np.abs(values) < threshold)


def histogram(values, bins=21, width=50):
    """A text histogram, one line a bin; the middle bin is centred at zero, so that a spike there shows."""
    limit = max(np.abs(values).max(), 1e-12)
    counts, edges = np.histogram(values, bins, (-limit, limit))
    centers = (edges[:-1] + edges[1:]) / 2
    bars = ["#" * round(width * count / counts.max()) for count in counts]
    return [f"{round(center, 4) + 0.0:+9.4f} {100 * count / len(values):6.2f} % {bar}".rstrip()   # 0.0: no "-0.0000"
            for center, count, bar in zip(centers, counts, bars)]


def firing_frequency(model, images, labels, amp):
    """How often each feature's ReLU is positive, over all test images and positions, and the test accuracy.

    Returns ({"inside a block": ..., "after the addition": ..., "all": ...}, accuracy): frequencies in 0 .. 1, one for
    each feature. The stem's ReLU is neither inside nor after an addition; it counts in "all".
    """
    fired = {}   # name of the ReLU -> (channels,) how many positions were positive
    sizes = {}

    def count(name):
        def hook(module, inputs, output):   # output: (B, C, H, W)
            fired[name] = fired.get(name, 0) + (output > 0).sum((0, 2, 3))
            sizes[name] = sizes.get(name, 0) + output[:, 0].numel()
        return hook

    handles = [module.register_forward_hook(count(name)) for name, module in model.named_modules()
               if isinstance(module, nn.ReLU)]
    accuracy = evaluate(model, images, labels, amp)
    for handle in handles:
        handle.remove()
    frequency = {name: fired[name].cpu().double().numpy() / sizes[name] for name in fired}
    return {kind: np.concatenate([values for name, values in frequency.items() if name.endswith(ending)])
            for kind, ending in (("inside a block", "relu1"), ("after the addition", "relu2"), ("all", ""))}, accuracy


def print_network(path, args, device):
    """Print gamma and beta of one checkpoint and, with --activations, how often its ReLUs fire."""
    checkpoint = load_checkpoint(path)
    options = checkpoint["options"]
    model = restore_model(checkpoint, path)
    print(f"{path}: {options['arch']}, --train {options['train']}, seed {options['seed']}, epoch "
          f"{checkpoint['epoch']} of {options['epochs']}, {options['dataset']}\n")
    parts = parameters_by_stage(model)
    thresholds, levels = THRESHOLDS[1:], [0, 5, 25, 50, 75, 95, 100]
    for kind, name in enumerate(("gamma", "beta")):
        print_table(f"Share of {name}s (%) with |{name}| below", ["", "count", *(f"{t:g}" for t in thresholds)],
                    [[part, f"{len(pair[kind]):,}", *(f"{share_below(pair[kind], t):.2f}" for t in thresholds)]
                     for part, pair in parts.items()], args.markdown)
        print_table(f"Quantiles of {name}", ["", *(f"{level} %" for level in levels)],
                    [[part, *(f"{q:.4f}" for q in np.percentile(pair[kind], levels))]
                     for part, pair in parts.items()], args.markdown)
        fence = ["```"] if args.markdown else []
        print(f"Histogram of {name}, all layers", *fence, *histogram(parts["all"][kind]), *fence, "", sep="\n")
    if args.activations:
        model.to(device, memory_format=torch.channels_last)
        images, labels = load_test_data(checkpoint, args, device)
        frequencies, accuracy = firing_frequency(model, images, labels, options["amp"])
        print_table(f"ReLUs on the test set (accuracy {accuracy:.2f} %): disabled means firing on < 1 % of positions",
                    ["ReLU", "features", "fires on average (%)", "disabled (%)"],
                    [[kind, f"{len(f):,}", f"{100 * f.mean():.2f}", f"{100 * (f < 0.01).mean():.2f}"]
                     for kind, f in frequencies.items()], args.markdown)


def main():
    parser = Parser(description="Print the paper's tables from the records of finished runs, or, for checkpoints, "
                                "the distribution of gamma and beta.")
    parser.add_argument("checkpoints", nargs="*", type=pathlib.Path, metavar="ckpt.pt", help="written by train.py")
    parser.add_argument("--activations", action="store_true", help="also how often each ReLU fires on the test set")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    parser.add_argument("--results", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results",
                        metavar="DIR", help="the folder of records (default: results, beside this script)")
    add_data_arguments(parser)
    args = parser.parse_args()
    if args.activations and not args.checkpoints:
        parser.error("--activations needs a checkpoint")
    device = choose_device(args.device)
    for path in args.checkpoints:
        print_network(path, args, device)
    if not args.checkpoints:
        if not args.results.is_dir():
            raise Problem(f"--results {args.results}: no such folder", 2)
        print_results(args.results, args.markdown)


if __name__ == "__main__":
    run(main)
