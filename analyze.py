"""Print the results of all runs, draw them, or count the disabled features of a trained network.

    python analyze.py > results/README.md          # tables, from the records (*.json) in results/
    python analyze.py --plot                       # figures, into results/figures/
    python analyze.py results/resnet14-bn-s0.pt    # how often the ReLUs of a network fire
"""
import argparse
import csv
import functools
import os
import pathlib
import sys

import numpy as np
import torch
from torch import nn

from models import ResNet, parse_arch
from prune import THRESHOLDS, add_to_record, gammas, load_test_data
from train import (
    UserError,
    add_device_arguments,
    choose_device,
    command,
    count_parameters,
    evaluate,
    load_checkpoint,
    read_record,
    run_cli,
    set_full_fp32,
    variant,
)

INTRODUCTION = """# Results

Printed by `python analyze.py` from the records (`*.json`) of runs: test accuracies on CIFAR-10 in
percent, after the last epoch, mean ± sample standard deviation over n runs. "What trains" is the
value of `--train`, followed by all that differs from the recipe. "Paper": read off the main figure
of the [first version](https://arxiv.org/abs/2003.00152v1), ±0.3 ("~": ±0.6; a range: the line is
hidden). "Reproduction":
[tdtce/BatchNorm_params_training](https://github.com/tdtce/BatchNorm_params_training), which says
that the paper's figures are means of five runs; its own are single runs on 45,000 images, best
epoch by validation. A feature is disabled if its ReLU fires at less than 1% of all positions.
Gammas and features are measured in fp32 (in `results`, of resnet14-not-bn-s0 in bf16), accuracies
of runs in their own precision: to run a command in bf16 on a CPU, add `--amp bf16`.
"""
RESULTS = pathlib.Path(__file__).parent / "results"

# The kinds of ReLUs, and the end of their names in the network: "" for all, the stem's among them.
RELUS = {"all": "", "inside a block": "relu1", "after the addition": "relu2"}


# --- runs and published values


def read_results(folder):
    """The finished runs in a folder, and a line about each other record.

    Runs are lists of records that differ in seed or precision alone, {(arch, label): [record]}. A
    label is what trains and what else differs from the recipe, such as "bn, layer". A record also
    gets its "file". Its tables become dicts: "prune" by threshold, "activations" by kind of ReLU.
    """
    runs = {}
    left_out = []
    for file in sorted(folder.glob("*.json")):
        try:
            record = read_record(file)
        except (UserError, OSError) as error:
            left_out.append(str(error))
            continue
        options = record["options"]
        done = len(record["epochs"])
        if done < options["epochs"]:
            left_out.append(f"{file} is not finished ({done} of {options['epochs']} epochs)")
            continue
        record["prune"] = {row["threshold"]: row for row in record.get("prune", [])}
        record["activations"] = {row["relu"]: row for row in record.get("activations", [])}
        record["file"] = file
        key = options["arch"], ", ".join(variant(options))
        runs.setdefault(key, []).append(record)
    for records in runs.values():
        records.sort(key=lambda record: record["options"]["seed"])
    return {key: runs[key] for key in sorted(runs, key=network_order)}, left_out


def network_order(key):
    """What an (arch, label) is sorted by: depth, width, label."""
    arch, label = key
    return parse_arch(arch), label


def read_published():
    """What others report, as text: {(arch, what trains): {"paper": ..., "reproduction": ...}}."""
    with open(RESULTS / "published.csv", newline="", encoding="utf-8") as file:
        return {(row["network"], row["train"]): row for row in csv.DictReader(file)}


NOT_PUBLISHED = {"paper": "-", "reproduction": "-"}


def networks_of(runs, published, label):
    """The networks for which there is a result with this label, by depth and width."""
    archs = {arch for arch, other in [*runs, *published] if other == label}
    return sorted(archs, key=parse_arch)


def is_wide(arch):
    _, width = parse_arch(arch)
    return width > 1


def counts_of(arch):
    """How many parameters a network has, see count_parameters."""
    depth, width = parse_arch(arch)
    with torch.device("meta"):   # shapes alone
        return count_parameters(ResNet(depth, width))


def accuracies(records):
    return [record["test_accuracy"] for record in records]


def measured(records, table, row, name):
    """A value in a row of a table, "prune" or "activations", of each record that has the row."""
    return [record[table][row][name] for record in records if row in record[table]]


# --- tables


def print_table(title, alignment, header, rows):
    """Print cells of text as an aligned Markdown table, or nothing if there is no row.

    alignment: a letter for each column, l for left and r for right.
    """
    if not rows:
        return
    widths = [max(3, *map(len, column)) for column in zip(header, *rows)]
    rule = []
    for letter, width in zip(alignment, widths, strict=True):
        rule.append("-" * (width - 1) + (":" if letter == "r" else "-"))
    print(f"\n## {title}\n")
    for row in [header, rule] + rows:
        cells = []
        for letter, cell, width in zip(alignment, row, widths):
            cells.append(cell.rjust(width) if letter == "r" else cell.ljust(width))
        print(f"| {' | '.join(cells)} |")


def mean_and_std(values):
    """Mean and sample standard deviation over n runs as text, "-" if nothing was measured."""
    n = len(values)
    if n == 0:
        return "-"
    if n == 1:
        return f"{values[0]:.2f} (n=1)"
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f} (n={n})"


def print_tables(runs, published):
    print(INTRODUCTION, end="")
    archs = networks_of(runs, published, "bn")
    deep = [arch for arch in archs if not is_wide(arch)]
    wide = [arch for arch in archs if is_wide(arch)]
    print_networks("Depth", deep, runs, published)
    print_networks("Width", ["resnet14"] + wide, runs, published)
    print_what_trains(runs, published)
    print_normalizations(runs)
    print_disabled(runs)
    print_pruning(runs)
    print_runs(runs)


def print_networks(title, archs, runs, published):
    """A row for each network: only BatchNorm trained, then everything; ours, then published."""
    header = ["network", "parameters", "BatchNorm parameters"]
    for train in ("bn", "all"):
        header += [train, f"{train}, paper", f"{train}, reproduction"]
    rows = []
    for arch in archs:
        counts = counts_of(arch)
        row = [arch, f"{counts['all']:,}", f"{counts['bn']:,}"]
        for train in ("bn", "all"):
            theirs = published.get((arch, train), NOT_PUBLISHED)
            ours = mean_and_std(accuracies(runs.get((arch, train), [])))
            row += [ours, theirs["paper"], theirs["reproduction"]]
        rows.append(row)
    print_table(title, "lrrrrrrrr", header, rows)


def print_what_trains(runs, published):
    """A row for each network, what was trained of it, and what else differs from the recipe."""
    rows = []
    for (arch, label), records in runs.items():
        trained = records[0]["parameters"]["trained"]
        theirs = published.get((arch, label), NOT_PUBLISHED)
        rows.append([arch, label, f"{trained:,}", mean_and_std(accuracies(records)),
                     theirs["paper"]])
    header = ["network", "what trains", "parameters trained", "here", "paper"]
    print_table("What trains", "llrrr", header, rows)


def print_normalizations(runs):
    """What becomes of gammas and features, by BatchNorm alone and by other normalizations."""
    rows = []
    for (arch, label), records in runs.items():
        norm = records[0]["options"]["norm"]
        if label == "bn" or norm != "batch":
            small = measured(records, "prune", 0.01, "pruned")
            disabled = measured(records, "activations", "all", "disabled")
            rows.append([arch, norm, label, mean_and_std(accuracies(records)),
                         mean_and_std(small), mean_and_std(disabled)])
    header = ["network", "norm", "what trains", "accuracy", "gammas below 0.01 (%)",
              "disabled features (%)"]
    print_table("Normalizations", "lllrrr", header, rows)


def print_disabled(runs):
    rows = []
    for (arch, label), records in runs.items():
        shares = [measured(records, "activations", kind, "disabled") for kind in RELUS]
        if any(shares):
            rows.append([arch, label] + [mean_and_std(share) for share in shares])
    header = ["network", "what trains"] + list(RELUS)
    print_table("Disabled features (%), by their ReLU", "llrrr", header, rows)


def print_pruning(runs):
    """Means over the n records that have a table "prune"."""
    rows = []
    for (arch, label), records in runs.items():
        n = len(measured(records, "prune", 0.0, "change"))
        if n > 0:
            row = [arch, label, str(n)]
            for threshold in THRESHOLDS:
                change = np.mean(measured(records, "prune", threshold, "change"))
                share = np.mean(measured(records, "prune", threshold, "pruned"))
                row.append(f"{change:+.2f} ({share:.1f})")
            rows.append(row)
    title = ("Gammas below a threshold set to zero: "
             "change of accuracy in points (share of gammas, %)")
    header = ["network", "what trains", "n"] + [f"< {threshold:g}" for threshold in THRESHOLDS]
    print_table(title, "llr" + "r" * len(THRESHOLDS), header, rows)


def print_runs(runs):
    """A row for each run, with the command that makes it."""
    rows = []
    for records in runs.values():
        for record in records:
            starts = record["starts"]
            commits = [short_commit(start["commit"]) for start in starts]
            words = command(record["options"])
            if all(start["plain"] for start in starts):
                words += " --plain"
            rows.append([
                f"`{words}`",
                f"{record['test_accuracy']:.2f}",
                "fp32" if record["precision"] == "off" else record["precision"],
                f"{record['seconds'] / 3600:.2f}",
                joined([start["hardware"] for start in starts]),
                joined([start["torch"] for start in starts]),
                joined(commits),
            ])
    header = ["command", "accuracy", "precision", "hours", "hardware", "torch", "commits"]
    print_table("Runs", "lrlrlll", header, rows)


def joined(texts):
    """Texts in a cell, each once, in their order."""
    return "; ".join(dict.fromkeys(texts))


def short_commit(commit):
    """Seven of the forty digits of a commit, and "-dirty" if that follows."""
    if commit is None:
        return "not in git"
    return commit[:7] + commit[40:]


# --- one network


def print_activations(path, data_dir, device):
    """Measure how often the ReLUs of a network fire, print it, and add it to the run's record."""
    model, checkpoint = load_checkpoint(path)
    images, labels = load_test_data(checkpoint, data_dir, device)
    table = relu_table(model.to(device), images, labels)
    print(f"# {path}\n\nmade by `{command(checkpoint['options'])}`")
    rows = []
    for row in table:
        rows.append([row["relu"], str(row["features"]), f"{row['fires']:.2f}",
                     f"{row['disabled']:.2f}"])
    header = ["ReLU", "features", "fires", "disabled"]
    print_table("ReLUs on the test images (%), evaluated in fp32", "lrrr", header, rows)
    add_to_record(path, checkpoint, "activations", table)


def relu_table(model, images, labels):
    """How often the features of each kind of ReLU fire, over all test images and positions.

    A dict per kind: "relu", its name; "features", their number; "fires", the share of positions at
    which a feature is positive, on average; "disabled", the share of features that are positive at
    less than 1 % of their positions. Both shares are in percent, in fp32.
    """
    fires = {}   # by name of the ReLU: (C,), the share of positive positions, added up over images

    def count(name, module, inputs, output):
        """output: (B, C, H, W)"""
        share_of_image = (output > 0).float().mean((2, 3))   # (B, C)
        fires[name] += share_of_image.sum(0).cpu().double()

    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ReLU):
            fires[name] = 0
            hooks.append(module.register_forward_hook(functools.partial(count, name)))
    evaluate(model, images, labels, "off")
    for hook in hooks:
        hook.remove()

    table = []
    for kind, end in RELUS.items():
        of_kind = [share for name, share in fires.items() if name.endswith(end)]
        shares = torch.cat(of_kind) / len(images)
        table.append({
            "relu": kind,
            "features": len(shares),
            "fires": 100 * shares.mean().item(),
            "disabled": 100 * (shares < 0.01).double().mean().item(),
        })
    return table


# --- figures

# {label: (color, words of the legend)}. The colors show on white and on black; all but the blue are
# from the palette of Okabe and Ito.
LOOKS = {
    "bn": ("#3A8FD0", "BatchNorm"),
    "all": ("#D55E00", "everything"),
    "random": ("#009E73", "other weights"),
}
WIDE = ("#CC79A7", "BatchNorm, wider")
SETTINGS = {
    "axes.edgecolor": "gray",
    "axes.labelcolor": "gray",
    "figure.labelsize": "medium",
    "xtick.color": "gray",
    "ytick.color": "gray",
    "text.color": "gray",
    "axes.xmargin": 0.17,
    "axes.ymargin": 0.1,
    "svg.hashsalt": "0",   # the same file each time
}


def draw(runs, published, folder):
    """Write the four figures as SVG files and return them by name."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install matplotlib", 2) from None
    matplotlib.rcParams.update(SETTINGS)
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "accuracy": draw_accuracy(runs, published),
        "gamma": draw_gamma(runs),
        "pruning": draw_pruning(runs),
        "epochs": draw_epochs(runs),
    }
    for name, figure in figures.items():
        add_legend(figure)
        file = folder / f"{name}.svg"
        figure.savefig(file, transparent=True, metadata={"Date": None})
        print(f"wrote {file}")
    others = sorted({label for _, label in runs} - set(LOOKS))
    if others:
        print(f"only in the tables: {'; '.join(others)}")
    return figures


def new_figure(x_label, y_label, panels=1):
    """A figure, and its panels side by side in a list of axes."""
    from matplotlib.figure import Figure
    figure = Figure((6.4, 3.6), layout="constrained")
    axes = figure.subplots(1, panels, sharex=True, sharey=True, squeeze=False)[0]
    figure.supxlabel(x_label)
    axes[0].set_ylabel(y_label)
    return figure, axes


def add_legend(figure):
    """One legend for all panels, above them."""
    handles = {}   # by label: panels and networks have the same ones
    for ax in figure.axes:
        for handle, label in zip(*ax.get_legend_handles_labels()):
            handles[label] = handle
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=3,
                  frameon=False)


def look_of(arch, label):
    """The color of runs in the figures, and what the legend says of it."""
    return WIDE if label == "bn" and is_wide(arch) else LOOKS[label]


def annotate(ax, arch, point, color, side):
    """The name of a network at a point: above it, or below if it is a wide one."""
    va = "top" if is_wide(arch) else "bottom"
    ax.annotate(f"  {arch}  ", point, ha=side, va=va, color=color)


def draw_accuracy(runs, published):
    """Accuracy against the number of trained parameters: each run, and the paper's values hollow.

    "~79.7" is drawn as 79.7, and "82.0-83.9" as 82.0, which the paper's abstract has.
    """
    figure, [ax] = new_figure("trained parameters", "test accuracy (%)")
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:,.0f}")
    for label in ("bn", "random"):
        for arch in networks_of(runs, published, label):
            color, legend = look_of(arch, label)
            count = counts_of(arch)["bn"]
            heights = accuracies(runs.get((arch, label), []))
            ax.plot([count] * len(heights), heights, "o", color=color, label=f"{legend}, here")
            if (arch, label) in published:
                text = published[arch, label]["paper"]
                height = float(text.removeprefix("~").split("-")[0])
                ax.plot(count, height, "o", mfc="none", color=color, label=f"{legend}, paper")
                heights.append(height)
            annotate(ax, arch, (count, max(heights)), color, "left" if is_wide(arch) else "right")
    return figure


def draw_gamma(runs):
    """The distribution of |gamma| up to 1.55, a panel for each network."""
    archs = networks_of(runs, {}, "bn")
    archs += [arch for arch in networks_of(runs, {}, "all") if arch not in archs]
    figure, axes = new_figure("|gamma|", "gammas in a bin of 0.05 (%)", max(1, len(archs)))
    edges = np.arange(32) / 20
    for arch, ax in zip(archs, axes):
        ax.set_title(arch)
        for label in ("all", "bn"):
            values = stored_gammas(runs.get((arch, label), []))
            if values:
                counts, _ = np.histogram(np.abs(values), edges)
                color, legend = look_of(arch, label)
                ax.stairs(100 * counts / len(values), edges, fill=True, alpha=0.6, color=color,
                          label=legend)
    return figure


def stored_gammas(records):
    """The gammas in those checkpoints of these runs that exist, as one list."""
    values = []
    for record in records:
        checkpoint = record["file"].with_suffix(".pt")
        if checkpoint.exists():   # large ones may be left out of a copy of the results
            model, _ = load_checkpoint(checkpoint)
            values += gammas(model).tolist()
    return values


def draw_pruning(runs):
    """Accuracy against the share of gammas set to zero, a point for each threshold."""
    figure, [ax] = new_figure("gammas set to zero (%)", "test accuracy (%)")
    for (arch, label), records in runs.items():
        if label in LOOKS and measured(records, "prune", 0.0, "pruned"):
            color, legend = look_of(arch, label)
            shares = []
            means = []
            for threshold in [0.0] + THRESHOLDS:
                shares.append(np.mean(measured(records, "prune", threshold, "pruned")))
                means.append(np.mean(measured(records, "prune", threshold, "test_accuracy")))
            ax.plot(shares, means, "o-", color=color, label=legend)
            annotate(ax, arch, (shares[0], means[0]), color, "right")
    return figure


def draw_epochs(runs):
    """Accuracy after each epoch, means over runs."""
    figure, [ax] = new_figure("epoch", "test accuracy (%)")
    for (arch, label), records in runs.items():
        if label in LOOKS:
            color, legend = look_of(arch, label)
            curves = []
            for record in records:
                curves.append([epoch["test_accuracy"] for epoch in record["epochs"]])
            means = np.mean(curves, axis=0)
            ax.plot(range(1, len(means) + 1), means, color=color, label=legend)
            annotate(ax, arch, (len(means), means[-1]), color, "left")
    return figure


# --- command line


def parse_command_line():
    parser = argparse.ArgumentParser(
        description="Print or draw the results of all runs, or say how often ReLUs fire.")
    parser.add_argument("checkpoints", nargs="*", type=os.path.expanduser, metavar="x.pt",
                        help="written by train.py: measure how often their ReLUs fire")
    parser.add_argument("--results", type=os.path.expanduser, default=RESULTS, metavar="DIR",
                        help="folder of the records")
    parser.add_argument("--plot", action="store_true",
                        help="draw, into the folder figures in --results")
    add_device_arguments(parser)
    args = parser.parse_args()
    args.results = pathlib.Path(args.results)
    if args.plot and args.checkpoints:
        parser.error("--plot draws the records in --results, not checkpoints")
    return args


def main():
    args = parse_command_line()
    set_full_fp32()
    # For the sign ±, and to show each network in a log as soon as it is measured.
    sys.stdout.reconfigure(encoding="utf-8", line_buffering=True)
    if args.checkpoints:
        device = choose_device(args.device)   # only here, because it starts the GPU
        for path in args.checkpoints:
            print_activations(path, args.data_dir, device)
        return
    runs, left_out = read_results(args.results)
    if not runs:
        reasons = "".join(f"; {line}" for line in left_out)
        raise UserError(f"no record of a finished run in {args.results}{reasons}")
    if args.plot:
        draw(runs, read_published(), args.results / "figures")
    else:
        print_tables(runs, read_published())
    for line in left_out:
        print(f"\nLeft out: {line}")


if __name__ == "__main__":
    run_cli(main)
