"""Print the results of all runs, draw them, or look into the BatchNorm of a trained network.

    python analyze.py > results/README.md                       # tables, from the records (*.json) in results/
    python analyze.py --plot                                    # figures, into results/figures
    python analyze.py results/resnet14-bn-s0.pt --activations   # gamma, beta and ReLUs of one network
"""
import argparse
import csv
import os
import pathlib
import re
from importlib.util import find_spec

import numpy as np
import torch
from torch import nn

from models import count_parameters, empty_model, gammas_and_betas
from prune import THRESHOLDS, add_to_record, gammas, load_test_data, read_record
from train import UserError, add_data_arguments, check, evaluate, load_checkpoint, make_parser, one_line, run, say

INTRODUCTION = """# Results

Printed by `python analyze.py` from the records (`*.json`) of runs. Test accuracies on CIFAR-10 in percent, after the
last epoch, mean ± sample standard deviation over n seeds. "Paper": read off the main figure of the [first
version](https://arxiv.org/abs/2003.00152v1), ±0.3 ("~": ±0.6; a range: the line is hidden), mean of five runs.
"Reproduction": [tdtce/BatchNorm_params_training](https://github.com/tdtce/BatchNorm_params_training), single runs on
45,000 images, best epoch by validation. A feature is disabled if its ReLU fires at less than 1 % of all positions.
"""
RESULTS = pathlib.Path(__file__).parent / "results"
HEADER, *ROWS = csv.reader((RESULTS / "published.csv").read_text().splitlines())
PUBLISHED = {(row[0], mode): cell for row in ROWS for mode, cell in zip(HEADER[1:], row[1:])}
DEEP, WIDE = [[arch for arch, *_ in ROWS if arch.startswith(kind)] for kind in ("resnet", "wrn")]

# --- records

def read_results(folder):
    """Records with the paper's recipe by (arch, mode), such as "bn, layer"; [name, reason] of the files left out."""
    groups, left_out, default = {}, [], vars(make_parser().parse_args(["--device=cpu"]))
    for file in sorted(folder.glob("*.json"), key=lambda f: re.sub(r"\d+", lambda n: n[0].zfill(4), f.name)):
        try:
            record = read_record(file)
            recipe = "dataset", "epochs", "batch_size", "lr", "weight_decay"
            check(all(record[o] == default[o] for o in recipe), "not the paper's recipe")
            variants = [record[o] for o in ("norm", "bn_init", "weight_init") if record[o] != default[o]]
            group = groups.setdefault((record["arch"], ", ".join([record["train"], *variants])), [])
            check(all(record["seed"] != r["seed"] for r in group), "another run of the same seed")
            group.append({**record, "checkpoint": file.with_suffix(".pt")})
        except (UserError, OSError, ValueError) as error:
            left_out.append([file.name, one_line(error).removeprefix(f"{file} is ")])
    return groups, left_out

def column(group, table, name):
    """The mean over records of a column of their table "prune" or "records": (rows,), or [] if none has it."""
    columns = [[row[name] for row in record[table]] for record in group if table in record]
    return np.mean(columns, 0) if columns else columns

# --- tables

def print_table(title, header, rows):
    """Print cells of text as an aligned Markdown table, without rows and columns of nothing but "-"."""
    rows = [row for row in rows if {*row[1:]} - {"-"}]
    columns = [[*cells] for cells in zip(header, *rows) if {*cells[1:]} != {"-"}]
    for cells in columns:
        width, right = max(map(len, cells)), all(re.match(r"[-+~]?\d|-?$", cell) for cell in cells[1:])
        cells[:] = [cell.rjust(width) if right else cell.ljust(width) for cell in cells]
        cells.insert(1, "-" * (width - right) + ":" * right)
    if rows:
        say("\n".join([f"\n## {title}\n", *(f"| {' | '.join(row)} |" for row in zip(*columns))]))

def spread(values):
    """Mean and sample standard deviation over n seeds as text, "-" if nothing was measured."""
    deviation = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{deviation} (n={len(values)})" if len(values) else "-"

def result_tables(groups):
    """Yield the tables of what was measured and published: (title, header, rows), all of them text."""
    accuracy = {**PUBLISHED, **{key: spread([r["test_accuracy"] for r in group]) for key, group in groups.items()}}

    def network_row(arch, modes):
        counts = count_parameters(empty_model(arch))
        return [arch, f"{counts['all']:,}", f"{counts['bn']:,}", *(accuracy.get((arch, mode), "-") for mode in modes)]

    header = ["", "parameters", "BatchNorm"]
    modes = ["bn", "bn, paper", "bn, reproduction", "all", "all, paper", "all, reproduction"]
    for title, archs in ("Depth", DEEP), ("Width", [DEEP[0], *WIDE]):
        yield title, header + modes, [network_row(arch, modes) for arch in archs]
    pairs = [network_row(deep, modes[:2]) + network_row(wide, modes[:2]) for deep, wide in zip(DEEP[1:], WIDE)]
    yield "Depth against width, with about as many BatchNorm parameters", 2 * (header + modes[:2]), pairs

    columns = dict.fromkeys((arch, source) for arch, mode in groups if mode not in modes for source in ("", ", paper"))
    modes = dict.fromkeys(re.sub(", (paper|reproduction)", "", mode) for _, mode in [*PUBLISHED, *groups])
    yield "What trains", ["", *map("".join, columns)], [
        [mode, *(accuracy.get((arch, mode + source), "-") for arch, source in columns)] for mode in modes]

    disabled, pruning, runs = [], [], []
    for key, group in groups.items():
        name = " ".join(key)
        relus = [record["activations"] for record in group if "activations" in record]
        disabled.append([name, *(spread([rows[i]["disabled"] for rows in relus]) for i in range(3))])
        changes = zip(column(group, "prune", "change")[1:], column(group, "prune", "pruned")[1:])   # nothing is below 0
        pruning.append([f"{name} (n={sum('prune' in r for r in group)})", *(f"{d:+.2f} ({s:.1f})" for d, s in changes)])
        for record in group:
            hours = f"{sum(epoch['seconds'] for epoch in record['records']) / 3600:.2f}"
            row = [name, str(record["seed"]), record["amp"], f"{record['test_accuracy']:.2f}", hours]
            for part in record["parts"]:   # more if resumed
                commit = re.sub("(.{7}).{33}", r"\1", part["commit"] or "not in git")
                runs.append([*row, str(part["first_epoch"]), part["hardware"], part["torch"], commit])
                row = 5 * [""]
    yield "Disabled features (%), by their ReLU", ["", *RELUS], disabled
    yield ("Gammas below a threshold set to zero: change of accuracy in points (share of gammas, %)",
           ["", *(f"< {threshold:g}" for threshold in THRESHOLDS[1:])], pruning)
    yield ("Runs: python train.py --arch ... --train ...",
           ["", "--seed", "--amp", "accuracy", "hours", "from epoch", "hardware", "torch", "commit"], runs)

# --- one network

RELUS = {"all": "", "inside a block": "relu1", "after the addition": "relu2"}   # how their names end

def print_histogram(title, tensors):
    """A line for each bin of 0.05; the middle one is centred at zero, so that a spike there shows."""
    values = torch.cat([tensor.detach().flatten() for tensor in tensors]).numpy()
    counts, edges = np.histogram(values, np.arange(-41, 42, 2) / 40)
    say(f"\n## {title}\n\n```")
    for edge, share in zip(edges, 100 * counts / len(values)):
        say(f"{edge + 0.025:+.2f} {share:6.2f} % {round(share) * '#'}".rstrip())
    say(f"beyond{100 - 100 * counts.sum() / len(values):6.2f} %\n```")

def relu_table(model, images, labels, amp):
    """How often each kind of ReLU "fires" and how many are "disabled", in percent, as one dict per kind."""
    fires, table = {}, []

    def count(module, inputs, output):   # (B, C, H, W) -> (C,), the share of all positions that are positive
        if isinstance(module, nn.ReLU):
            fires[module] = fires.get(module, 0) + (output > 0).float().mean((2, 3)).sum(0).cpu().double()

    with nn.modules.module.register_module_forward_hook(count):
        evaluate(model, images, labels, amp)
    for kind, end in RELUS.items():
        kinds = [fires[m] for name, m in model.named_modules() if m in fires and name.endswith(end)]
        share = torch.cat(kinds) / len(images)
        table.append({"relu": kind, "features": len(share), "fires": 100 * share.mean().item(),
                      "disabled": 100 * (share < 0.01).double().mean().item()})
    return table

def print_network(checkpoint, args):
    """Print gamma and beta of one network and, with --activations, how often its ReLUs fire."""
    model, state = load_checkpoint(checkpoint)
    options, (_, gamma, beta) = state["options"], zip(*gammas_and_betas(model))
    say(f"# {checkpoint}\n\n" + " ".join(f"--{o} {options[o]}" for o in ("arch", "train", "norm", "seed")))
    print_histogram("Distribution of gamma", gamma)
    print_histogram("Distribution of beta", beta)
    if args.activations:
        model.to(args.device, memory_format=torch.channels_last)
        relus = relu_table(model, *load_test_data(state, args), options["amp"])
        if args.dataset in (None, options["dataset"]):
            add_to_record(checkpoint, state, "activations", relus)
        print_table("ReLUs on the test images (%)", ["", "features", "fires", "disabled"], [
            [r["relu"], str(r["features"]), f"{r['fires']:.2f}", f"{r['disabled']:.2f}"] for r in relus])

# --- figures

# Colours of Okabe and Ito that show on white and on black, and the text of the legend.
LOOKS = {"bn": ("#3A8FD0", "only BatchNorm"), "wide": ("#CC79A7", "only BatchNorm, wider"),
         "all": ("#D55E00", "everything"), "random": ("#009E73", "as many random weights")}
GREY = ["axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "text.color"]

def draw(groups, folder):
    """Write the figures as SVG files and return them by name. A line's gid tells what it shows."""
    from matplotlib import figure, rcParams
    rcParams.update({**dict.fromkeys(GREY, "gray"), "axes.xmargin": 0.16, "axes.ymargin": 0.1, "svg.hashsalt": "0"})
    figures = {}

    def new(name, x_label, y_label="test accuracy (%)", panels=1):
        figures[name] = figure.Figure((7.5, 4), layout="constrained")
        axes = figures[name].subplots(1, panels, sharex=True, sharey=True, squeeze=False)[0]
        axes[0].set(xlabel=x_label, ylabel=y_label)
        return axes

    [ax] = new("accuracy", "BatchNorm parameters")
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:,.0f}")
    for look, mode, archs in ("bn", "bn", DEEP), ("wide", "bn", WIDE), ("random", "random", DEEP):
        color, label = LOOKS[look]
        count = {arch: count_parameters(empty_model(arch))["bn"] for arch in archs}
        runs = [(count[arch], [r["test_accuracy"] for r in groups.get((arch, mode), [])]) for arch in archs]
        ours = [(n, np.mean(values), np.std(values, ddof=len(values) > 1)) for n, values in runs if values]
        ax.errorbar(*np.reshape(ours, (-1, 3)).T, fmt="o-", capsize=3, color=color, label=label, gid=look)
        if mode == "bn":
            paper = [np.mean([*map(float, re.findall(r"[\d.]+", PUBLISHED[arch, "bn, paper"]))]) for arch in archs]
            ax.plot(count.values(), paper, "o:", mfc="none", color=color, label=f"{label}, paper", gid=f"{look}, paper")
            offset, side = ((-6, 3), "right") if look == "bn" else ((6, -8), "left")
            for arch, *point in zip(archs, count.values(), paper):
                ax.annotate(arch, point, offset, textcoords="offset points", ha=side, color=color)

    panels = [arch for arch in DEEP if (arch, "bn") in groups] or DEEP[:1]
    spikes = new("gamma", "|gamma|", "gammas in a bin of 0.05 (%)", len(panels))
    [zeroed], [curves] = new("pruning", "gammas set to zero (%)"), new("epochs", "epoch")
    for (arch, mode), group in groups.items():
        if mode in LOOKS and arch in panels:
            line = {"color": LOOKS[mode][0], "label": LOOKS[mode][1], "gid": f"{arch} {mode}"}
            ends = (zeroed, "pruned", "prune", "o-", 0, "right"), (curves, "epoch", "records", "-", -1, "left")
            for ax, name, table, style, end, side in ends:
                x, y = column(group, table, name), column(group, table, "test_accuracy")
                ax.plot(x, y, style, **line)
                if len(x):
                    ax.annotate(f"  {arch}  ", (x[end], y[end]), ha=side, va="center", color=line["color"])
            files = [record["checkpoint"] for record in group if record["checkpoint"].exists()]
            if files and mode != "random":
                values = torch.cat([gammas(load_checkpoint(file)[0]).abs() for file in files])
                counts, edges = np.histogram(values, np.arange(32) / 20)
                spikes[panels.index(arch)].stairs(100 * counts / len(values), edges, fill=True, alpha=0.6, **line)
                spikes[panels.index(arch)].set(title=arch, xlabel="|gamma|")

    folder.mkdir(parents=True, exist_ok=True)
    for name, drawn in figures.items():
        handles = {label: handle for ax in drawn.axes for handle, label in zip(*ax.get_legend_handles_labels())}
        drawn.legend(handles.values(), handles, loc="outside upper center", ncols=3, frameon=False)
        drawn.savefig(folder / f"{name}.svg", transparent=True, metadata={"Date": None})
        say(f"wrote {folder / name}.svg")
    return figures

# --- command line

def main():
    parser = argparse.ArgumentParser(description="Print or draw the results of all runs, or look into checkpoints.")
    add = parser.add_argument
    add("checkpoints", nargs="*", type=os.path.expanduser, metavar="x.pt", help="written by train.py")
    add("--activations", action="store_true", help="also how often the ReLUs of the checkpoints fire")
    add("--results", type=os.path.expanduser, default=RESULTS, metavar="DIR", help="folder of the records")
    add("--plot", type=os.path.expanduser, nargs="?", const=True, metavar="DIR", help="draw, by default in --results")
    add_data_arguments(parser, None)
    args = parser.parse_args()
    if args.activations and not args.checkpoints or not os.path.isdir(args.results):
        parser.error("--activations needs checkpoints, and --results a folder")
    if args.plot and not find_spec("matplotlib"):
        parser.error("--plot needs matplotlib: pip install matplotlib")
    for checkpoint in args.checkpoints:
        print_network(checkpoint, args)
    if args.checkpoints:
        return
    groups, rest = read_results(pathlib.Path(args.results))
    if args.plot:
        return draw(groups, pathlib.Path(args.results, "figures") if args.plot is True else pathlib.Path(args.plot))
    say(INTRODUCTION, end="")
    for table in *result_tables(groups), ("Left out", ["file", "reason"], rest):
        print_table(*table)

if __name__ == "__main__":
    run(main)
