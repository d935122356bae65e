"""Print the results of all runs, draw them, or look into the BatchNorm of a trained network.

    python analyze.py > results/README.md                       # tables, from the records (*.json) in results/
    python analyze.py --plot                                    # figures, into results/figures
    python analyze.py results/resnet14-bn-s0.pt --activations   # gamma, beta and ReLUs of one network
"""
import argparse
import os
import pathlib
import re

import numpy as np
import torch
from torch import nn

from models import count_parameters, empty_model, gammas_and_betas, parse_arch
from prune import THRESHOLDS, add_to_record, gammas, load_test_data, read_record
from train import UserError, add_data_arguments, check, evaluate, load_checkpoint, make_parser, one_line, run, say

INTRODUCTION = """# Results

Printed by `python analyze.py > results/README.md` from the records (`*.json`) beside it. Test accuracies on CIFAR-10 in
percent, after the last epoch, mean ± sample standard deviation over n seeds. "Paper": read off the main figure of the
[first version](https://arxiv.org/abs/2003.00152v1), ±0.3 ("~": ±0.6; a range: the line is hidden), mean of five runs.
"Reproduction": [tdtce/BatchNorm_params_training](https://github.com/tdtce/BatchNorm_params_training), single runs on
45,000 images, best epoch by validation. A feature is disabled if its ReLU fires at less than 1 % of all positions.
"""
DEEP = "resnet14 resnet32 resnet56 resnet110 resnet218 resnet434 resnet866".split()
WIDE = "wrn14-2 wrn14-4 wrn14-8 wrn14-16 wrn14-32".split()
PUBLISHED = {name: dict(zip(DEEP + WIDE, line.split())) for name, line in {
    "all, paper": "90.5 92.3 93.0 93.4 93.4 92.9 92.8 93.0 94.1 94.7 95.1 95.2",
    "bn+shortcut+output, paper": "63.4 66.7 71.1 74.7 ~78.3 ~80.5 ~82.0 72.6 79.5 83.4 85.6 87.0",
    "bn, paper": "48.1 57.6 62.9 69.7 75.8 ~79.7 82.0-83.9 53.4 59.6 64.4 68.2 ~73.5",
    "shortcut+output, paper": "49.0 45.8 42.5 19.1 17.3 12.8 13.2 ~57.5 66.0 73.1 77.5 79.8",
    "all, reproduction": "89.9 91.9 91.9 92.2 91.2 - - 91.8 93.3 94.3 - -",
    "bn, reproduction": "46.86/47.53 56.89 62.61 69.96 76.03 - - 53.08 58.02 64.86 - -"}.items()}

# --- records

def read_results(folder):
    """The runs with the paper's recipe, {(arch, mode): records}, and [name, reason] of the files left out.

    The mode is the value of --train with any variant, such as "bn, layer" for --norm layer.
    """
    groups, left_out, defaults = {}, [], vars(make_parser().parse_args([]))
    for file in sorted(folder.glob("*.json"), key=lambda file: (len(file.name.split("-")[0]), file.name)):
        try:
            record = read_record(file)
            changed = [o for o in record if o in defaults and record[o] != defaults[o]]
            check(not {"dataset", "epochs", "batch_size", "lr", "weight_decay"} & {*changed}, "not the paper's recipe")
            variants = [record[o] for o in changed if o in ("norm", "bn_init", "weight_init")]
            group = groups.setdefault((record["arch"], ", ".join([record["train"], *variants])), [])
            check(all(record["seed"] != r["seed"] for r in group), "another run of the same seed")
            group.append({**record, "checkpoint": file.with_suffix(".pt")})
        except (UserError, OSError, ValueError) as error:
            left_out.append([file.name, one_line(error).replace(str(file), "it")])
    return groups, left_out

def column(group, table, name):
    """The mean over records of a column of "prune", "activations" or "records": (rows,)."""
    return np.mean([[row[name] for row in record[table]] for record in group if table in record], 0)

def final(group):
    """The test accuracies after the last epoch."""
    return [record["test_accuracy"] for record in group]

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
    def cells(arch, *names):   # such as "bn" (ours) and "bn, paper"
        return [PUBLISHED[name].get(arch, "-") if name in PUBLISHED else spread(final(groups.get((arch, name), [])))
                for name in names]

    def ladder(arch, *names):
        counts = count_parameters(empty_model(arch))
        return [arch, f"{counts['all']:,}", f"{counts['bn']:,}", *cells(arch, *names)]

    header = ["", "parameters", "BatchNorm", "bn", "bn, paper"]
    names = ["bn", "bn, paper", "bn, reproduction", "all", "all, paper", "all, reproduction"]
    for title, archs in ("Depth", DEEP), ("Width", [DEEP[0], *WIDE]):
        yield title, [*header[:3], *names], [ladder(arch, *names) for arch in archs]
    yield "Depth against width, with about as many BatchNorm parameters", header + header, [
        ladder(deep, *names[:2]) + ladder(wide, *names[:2]) for deep, wide in zip(DEEP[1:], WIDE)]
    modes = dict.fromkeys([*(name.split(", p")[0] for name in [*PUBLISHED][:4]), *(mode for _, mode in groups)])
    archs = dict.fromkeys(arch for arch, _ in groups)
    yield "What trains", ["", *(arch + source for arch in archs for source in ("", ", paper"))], [
        [mode, *(cell for arch in archs for cell in cells(arch, mode, f"{mode}, paper"))] for mode in modes]

    disabled, pruning, runs = [], [], []
    for (arch, mode), group in groups.items():
        tables = [record["activations"] for record in group if "activations" in record]
        if tables:
            shares = [[row["disabled"] for row in rows] for rows in zip(*tables)]
            disabled.append([f"{arch} {mode}", *map(spread, shares)])
        if any("prune" in record for record in group):
            pairs = zip(column(group, "prune", "change"), column(group, "prune", "pruned"))
            pruning.append([f"{arch} {mode}", *(f"{change:+.2f} ({share:.1f})" for change, share in pairs)])
        for record in group:
            hours = sum(epoch["seconds"] for epoch in record["records"]) / 3600
            accuracy = f"{record['test_accuracy']:.2f}"
            row = [f"{arch} {mode}", str(record["seed"]), record["amp"], accuracy, f"{hours:.1f}"]
            for part in record["parts"]:   # several if it was resumed
                commit = part["commit"] or "unknown"
                runs.append([*row, str(part["first_epoch"]), part["hardware"], part["torch"], commit[:7] + commit[40:]])
                row = 5 * [""]
    yield "Disabled features (%), by their ReLU", ["", *RELUS], disabled
    yield ("Gammas below a threshold set to zero: change of accuracy in points (share of gammas, %)",
           ["", *(f"< {threshold:g}" for threshold in THRESHOLDS)], pruning)
    yield ("Runs: python train.py --arch ... --train ...",
           ["", "--seed", "--amp", "accuracy", "hours", "from epoch", "hardware", "torch", "commit"], runs)

# --- one network

RELUS = {"all": "", "inside a block": "relu1", "after the addition": "relu2"}   # how their names end

def histogram(values):
    """A line of text for each bin of 0.05; the middle one is centred at zero, so that a spike there shows."""
    counts, edges = np.histogram(values, np.arange(-41, 42, 2) / 40)
    lines = [f"{edge + 0.025:+.2f} {share:6.2f} % {round(share) * '#'}".rstrip()
             for edge, share in zip(edges, 100 * counts / len(values))]
    return [*lines, f"beyond{100 - 100 * counts.sum() / len(values):6.2f} %"]

def relu_table(model, images, labels, amp):
    """How often each kind of ReLU "fires" and how many are "disabled", in percent, as one dict per kind."""
    fired, relus = {}, {name: m for name, m in model.named_modules() if isinstance(m, nn.ReLU)}

    def count(module, inputs, output):   # (B, C, H, W) -> (C,), the share of all positions that are positive
        fired[module] = fired.get(module, 0) + (output > 0).double().mean((2, 3)).sum(0).cpu() / len(images)

    handles = [module.register_forward_hook(count) for module in relus.values()]
    evaluate(model, images, labels, amp)
    for handle in handles:
        handle.remove()
    shares = {kind: torch.cat([fired[module] for name, module in relus.items() if name.endswith(end)])
              for kind, end in RELUS.items()}
    return [{"relu": kind, "features": len(share), "fires": 100 * share.mean().item(),
             "disabled": 100 * (share < 0.01).double().mean().item()} for kind, share in shares.items()]

def print_network(checkpoint, args):
    """Print gamma and beta of one network and, with --activations, how often its ReLUs fire."""
    model, state = load_checkpoint(checkpoint)
    relus, options = [], state["options"]
    if args.activations:
        model.to(args.device, memory_format=torch.channels_last)
        relus = relu_table(model, *load_test_data(state, args), options["amp"])
        if args.dataset in (None, options["dataset"]):
            add_to_record(checkpoint, state, "activations", relus)
    names, gammas, betas = zip(*gammas_and_betas(model.cpu()))
    gammas, betas = ([v.detach().flatten().numpy() for v in vectors] for vectors in (gammas, betas))
    say(f"# {checkpoint}\n\n--arch {options['arch']} --train {options['train']} --seed {options['seed']}")
    stages = {}
    for name, gamma in zip(names, gammas):
        stage = name.split(".")[0].replace("bn", "stem")
        stages[stage] = np.append(stages.get(stage, []), gamma)
    stages["all"] = np.concatenate(gammas)
    rows = [[stage, f"{len(gamma):,}", *(f"{100 * np.mean(abs(gamma) < t):.2f}" for t in THRESHOLDS[1:])]
            for stage, gamma in stages.items()]
    print_table("Gammas with an absolute value below (%)", ["", "count", *map(str, THRESHOLDS[1:])], rows)
    say("\n".join(["\n## Distribution of gamma\n\n```", *histogram(stages["all"]), "```"]))
    say("\n".join(["\n## Distribution of beta\n\n```", *histogram(np.concatenate(betas)), "```"]))
    print_table("ReLUs on the test images (%)", ["", "features", "fires", "disabled"], [
        [r["relu"], str(r["features"]), f"{r['fires']:.2f}", f"{r['disabled']:.2f}"] for r in relus])

# --- figures

# Colours of Okabe and Ito that show on white and on black, and the text of the legend.
LOOKS = {"bn": ("#3A8FD0", "only BatchNorm"), "wide": ("#CC79A7", "only BatchNorm, wider"),
         "all": ("#D55E00", "everything"), "random": ("#009E73", "as many random weights")}
STYLE = {"svg.hashsalt": "0", "figure.facecolor": "none", "axes.facecolor": "none",
         "axes.spines.top": False, "axes.spines.right": False, "axes.xmargin": 0.14,
         **{f"{part}color": "#808080" for part in (
             "axes.edge", "axes.label", "xtick.", "ytick.", "text.")}}

def gamma_histogram(group):
    """(share of |gamma| per 0.05 in percent, edges of the bins), from checkpoints or else the prune tables."""
    files = [record["checkpoint"] for record in group if record["checkpoint"].exists()]
    if files:
        values = torch.cat([gammas(load_checkpoint(file)[0]).abs() for file in files])
        counts, edges = np.histogram(values, np.arange(32) / 20)
        return 100 * counts / len(values), edges
    edges = np.array([0, 0.05, 0.1, 0.2])
    return np.diff(column(group, "prune", "pruned")[[0, 4, 5, 6]]) * 0.05 / np.diff(edges), edges

def figures(groups):
    """The matplotlib figures by name. A line's gid tells what it shows."""
    import matplotlib.figure
    matplotlib.rcParams.update(STYLE)

    def new(x_label, y_label="test accuracy (%)", panels=1):
        figure = matplotlib.figure.Figure((7.5, 4), layout="constrained")
        axes = figure.subplots(1, panels, sharex=True, sharey=True, squeeze=False)[0]
        axes[0].set(xlabel=x_label, ylabel=y_label)
        return figure, axes

    def name(ax, text, x, y, color, left=False):   # beside a point
        ax.annotate(text, (x, y), (-6, 3) if left else (6, -8), textcoords="offset points",
                    ha="right" if left else "left", color=color)

    ladders, [ax] = new("BatchNorm parameters")
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:,.0f}")
    for look, mode, archs in ("bn", "bn", DEEP), ("wide", "bn", WIDE), ("random", "random", DEEP):
        color, label = LOOKS[look]
        count = {arch: count_parameters(empty_model(arch))["bn"] for arch in archs}
        ours = {count[arch]: final(groups[arch, mode]) for arch in archs if (arch, mode) in groups}
        if ours:
            deviation = [np.std(v, ddof=len(v) > 1) for v in ours.values()]
            ax.errorbar(ours.keys(), [*map(np.mean, ours.values())], deviation, fmt="o-",
                        capsize=3, color=color, label=label, gid=look)
        if mode == "bn":
            paper = [np.mean([*map(float, PUBLISHED["bn, paper"][arch].strip("~").split("-"))]) for arch in archs]
            ax.plot(count.values(), paper, "o:", mfc="none", color=color, label=f"{label}, paper", gid=f"{look}, paper")
            for arch, y in zip(archs, paper):
                name(ax, arch, count[arch], y, color, look == "bn")

    panels = [arch for arch in DEEP if (arch, "bn") in groups] or DEEP[:1]
    spikes, axes = new("|gamma|", "gammas in a bin of 0.05 (%)", len(panels))
    (pruning, [zeroed]), (curves, [ax]) = new("gammas set to zero (%)"), new("epoch")
    for (arch, mode), group in groups.items():
        if mode not in LOOKS or arch not in panels:
            continue
        line = {"color": LOOKS[mode][0], "label": LOOKS[mode][1], "gid": f"{arch} {mode}"}
        if any("prune" in record for record in group):
            x, y = column(group, "prune", "pruned"), column(group, "prune", "test_accuracy")
            zeroed.plot(x, y, "o-", **line)
            name(zeroed, arch, x[-1], y[-1], line["color"])
            if mode != "random":
                axes[panels.index(arch)].stairs(*gamma_histogram(group), **line)
                axes[panels.index(arch)].set(title=arch, xlabel="|gamma|")
        if mode == "bn" or arch == DEEP[0]:
            y = column(group, "records", "test_accuracy")
            ax.plot(range(1, 161), y, **line)
            name(ax, arch, 160, y[-1], line["color"])
    return {"accuracy": ladders, "gamma": spikes, "pruning": pruning, "epochs": curves}

def draw(groups, folder):
    """Write the figures as SVG files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures(groups).items():
        handles = {label: handle for ax in figure.axes for handle, label in zip(*ax.get_legend_handles_labels())}
        figure.legend(handles.values(), handles, loc="outside upper center", ncols=3, frameon=False)
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
        say(f"wrote {folder / name}.svg")

# --- command line

def main():
    results = pathlib.Path(__file__).parent / "results"
    parser = argparse.ArgumentParser(description="Print or draw the results of all runs, or look into checkpoints.")
    add = parser.add_argument
    add("checkpoints", nargs="*", type=os.path.expanduser, metavar="x.pt", help="written by train.py")
    add("--activations", action="store_true", help="also how often the ReLUs of the checkpoints fire")
    add("--results", type=os.path.expanduser, default=results, metavar="DIR", help="the folder of the records")
    add("--plot", type=os.path.expanduser, nargs="?", const=results / "figures", metavar="DIR", help="draw into DIR")
    add_data_arguments(parser, None)
    args = parser.parse_args()
    if bool(args.checkpoints) < bool(args.activations) or not os.path.isdir(args.results):
        parser.error("--activations needs checkpoints, and --results a folder")
    for checkpoint in args.checkpoints:
        print_network(checkpoint, args)
    if args.checkpoints:
        return
    groups, left_out = read_results(pathlib.Path(args.results))
    if args.plot:
        try:
            return draw(groups, pathlib.Path(args.plot))
        except ImportError:
            raise UserError("--plot needs matplotlib: pip install matplotlib") from None
    say(INTRODUCTION, end="")
    for table in *result_tables(groups), ("Left out", ["file", "reason"], left_out):
        print_table(*table)

if __name__ == "__main__":
    run(main)
