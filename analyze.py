"""Print the results of all runs, draw them, or look into the BatchNorm of a trained network.

    python analyze.py > results/README.md     # tables, from the records (*.json) in results/
    python analyze.py --plot                  # figures, into results/figures/
    python analyze.py results/resnet14-bn-s0.pt --activations     # gamma, beta, ReLUs of a network
"""
import argparse
import csv
import functools
import os
import pathlib

import numpy as np
import torch
from torch import nn

from models import empty_model, gammas_and_betas, parse_arch
from prune import THRESHOLDS, add_to_record, gammas, prepare_test
from train import (RECIPE, VARIANT_OPTIONS, UserError, add_device_arguments, count_parameters,
                   differences, evaluate, freeze, load_checkpoint, log, one_line, read_record,
                   run_cli)

INTRODUCTION = """# Results

Printed by `python analyze.py` from the records (`*.json`) of runs: test accuracies on CIFAR-10 in
percent, after the last epoch, mean ± sample standard deviation over n seeds. "What trains" is the
value of `--train`, followed by what else differs from the recipe: normalization, initial values,
learning rate. "Paper": read off the main figure of the [first
version](https://arxiv.org/abs/2003.00152v1), ±0.3 ("~": ±0.6; a range: the line is hidden).
"Reproduction":
[tdtce/BatchNorm_params_training](https://github.com/tdtce/BatchNorm_params_training), which says
that the paper's figures are means of five runs; its own are single runs on 45,000 images, best
epoch by validation. A feature is disabled if its ReLU fires at less than 1 % of all positions. A
commit "not in git" is that of a copy of the code outside of git.
"""
RESULTS = pathlib.Path(__file__).parent / "results"

# The networks of the paper's figure.
DEEP = ["resnet14", "resnet32", "resnet56", "resnet110", "resnet218", "resnet434", "resnet866"]
WIDE = ["wrn14-2", "wrn14-4", "wrn14-8", "wrn14-16", "wrn14-32"]

# The kinds of ReLUs, and how their names in the network end: all of them with "".
RELUS = {"all": "", "inside a block": "relu1", "after the addition": "relu2"}

# --- runs and published values

def read_results(folder):
    """The finished runs of the paper's recipe in a folder, and the files that are left out.

    Returns the records in lists, one for each network and variant, {(arch, variant): [record]}, and
    [file name, reason] of the other files. A record also gets its "file".
    """
    records, left_out = read_records(folder)
    runs = {}
    for record in sorted(records, key=record_order):
        options = record["options"]
        alike = runs.setdefault((options["arch"], variant_of(options)), [])
        if options["seed"] in [other["options"]["seed"] for other in alike]:
            reason = "another run of the same seed (for another precision, use another folder)"
            left_out.append([record["file"].name, reason])
        else:
            alike.append(record)
    return runs, sorted(left_out)

def read_records(folder):
    """The records of the paper's recipe in a folder, and [file name, reason] of other files."""
    records = []
    left_out = []
    for file in sorted(folder.glob("*.json")):
        try:
            record = read_record(file)
            check_recipe(record["options"])
            record["file"] = file
            records.append(record)
        except (ValueError, OSError) as error:
            left_out.append([file.name, one_line(error)])
    return records, left_out

def check_recipe(options):
    """Raise ValueError if an option differs that no row of the tables would show."""
    may_differ = ["arch", "train", "seed", "amp", *VARIANT_OPTIONS]
    for name in RECIPE:
        if name not in may_differ and options[name] != RECIPE[name]:
            raise ValueError(f"not the paper's recipe ({name} {options[name]}, not {RECIPE[name]})")

def variant_of(options):
    """What trains, and how else a run differs from the recipe, such as "bn, layer, lr 0.03"."""
    words = [options["train"]]
    for name, value in differences(options).items():
        words.append(f"lr {value}" if name == "lr" else value)
    return ", ".join(words)

def record_order(record):
    """What records are sorted by."""
    options = record["options"]
    return row_order((options["arch"], variant_of(options))), options["seed"]

def row_order(key):
    """What the rows of a table are sorted by: depth, width, and what trains."""
    arch, variant = key
    return parse_arch(arch), variant

def read_published():
    """What others report, as text: {(arch, what trains): {"paper": ..., "reproduction": ...}}."""
    with open(RESULTS / "published.csv", newline="", encoding="utf-8") as file:
        return {(row["network"], row["train"]): row for row in csv.DictReader(file)}

NOT_PUBLISHED = {"paper": "-", "reproduction": "-"}

def options_of(records):
    """The options of the first of these runs; the others differ in seed and perhaps in amp."""
    return records[0]["options"]

def accuracies(records):
    return [record["test_accuracy"] for record in records]

def rows_below(records, threshold):
    """The row of this threshold in the table "prune" of each record that has one."""
    rows = []
    for record in records:
        by_threshold = {row["threshold"]: row for row in record.get("prune", [])}
        if threshold in by_threshold:
            rows.append(by_threshold[threshold])
    return rows

def disabled_shares(records, kind):
    """The disabled features of this kind of ReLU, in percent, of each record that has them."""
    shares = []
    for record in records:
        by_kind = {row["relu"]: row for row in record.get("activations", [])}
        if kind in by_kind:
            shares.append(by_kind[kind]["disabled"])
    return shares

# --- tables

def print_table(title, alignment, header, rows):
    """Print cells of text as an aligned Markdown table, or nothing if there is no row.

    alignment: a letter for each column, l for left and r for right.
    """
    if not rows:
        return
    widths = []
    rule = []
    for letter, *cells in zip(alignment, header, *rows, strict=True):
        width = max(3, *[len(cell) for cell in cells])
        widths.append(width)
        rule.append("-" * (width - 1) + (":" if letter == "r" else "-"))
    log(f"\n## {title}\n")
    for row in [header, rule] + rows:
        padded = []
        for letter, cell, width in zip(alignment, row, widths):
            padded.append(cell.rjust(width) if letter == "r" else cell.ljust(width))
        log(f"| {' | '.join(padded)} |")

def mean_and_std(values):
    """Mean and sample standard deviation over n seeds as text, "-" if nothing was measured."""
    n = len(values)
    if n == 0:
        return "-"
    if n == 1:
        return f"{values[0]:.2f} (n=1)"
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f} (n={n})"

def print_networks(title, archs, runs, published):
    """A row for each network: only BatchNorm trained, then everything; ours, then published."""
    header = ["network", "parameters", "BatchNorm"]
    for variant in ("bn", "all"):
        header += [variant, f"{variant}, paper", f"{variant}, reproduction"]
    rows = []
    for arch in archs:
        counts = counts_of(arch)
        row = [arch, f"{counts['all']:,}", f"{counts['bn']:,}"]
        for variant in ("bn", "all"):
            theirs = published.get((arch, variant), NOT_PUBLISHED)
            ours = mean_and_std(accuracies(runs.get((arch, variant), [])))
            row += [ours, theirs["paper"], theirs["reproduction"]]
        rows.append(row)
    print_table(title, "lrrrrrrrr", header, rows)

@functools.cache   # because resnet866 has thousands of modules
def counts_of(arch):
    return count_parameters(empty_model(arch))

def print_what_trains(runs, published):
    """A row for each network and what was trained of it, with the normalization of the recipe."""
    rows = []
    for arch, variant in keys_of_what_trains(runs, published):
        records = runs.get((arch, variant), [])
        theirs = published.get((arch, variant), NOT_PUBLISHED)
        if records:
            counts = records[0]["parameters"]
        else:
            model = empty_model(arch)
            freeze(model, variant, seed=0)
            counts = count_parameters(model)
        ours = mean_and_std(accuracies(records))
        rows.append([arch, variant, f"{counts['trained']:,}", ours, theirs["paper"]])
    header = ["network", "what trains", "parameters trained", "here", "paper"]
    print_table("What trains", "llrrr", header, rows)

def keys_of_what_trains(runs, published):
    """The (arch, variant) of our runs with --norm batch, and of rows that only the paper has.

    Those are added for networks of which we trained something else than "bn" and "all".
    """
    keys = [key for key in runs if options_of(runs[key])["norm"] == "batch"]
    archs = {arch for arch, variant in keys if variant not in ("bn", "all")}
    for arch, variant in published:
        if arch in archs and variant not in ("bn", "all") and (arch, variant) not in keys:
            keys.append((arch, variant))
    return sorted(keys, key=row_order)

def print_normalizations(runs):
    """Runs with other normalizations, and those of the same networks that train BatchNorm alone."""
    archs = set()
    for (arch, _), records in runs.items():
        if options_of(records)["norm"] != "batch":
            archs.add(arch)
    rows = []
    for (arch, _), records in runs.items():
        options = options_of(records)
        words = [options["train"]]
        for name in ("bn_init", "weight_init"):   # norm and lr have columns of their own
            if options[name] != RECIPE[name]:
                words.append(options[name])
        trains = ", ".join(words)
        if arch in archs and (options["norm"] != "batch" or trains == "bn"):
            small = [row["pruned"] for row in rows_below(records, 0.01)]
            rows.append([arch, options["norm"], str(options["lr"]), trains,
                         mean_and_std(accuracies(records)), mean_and_std(small),
                         mean_and_std(disabled_shares(records, "all"))])
    header = ["network", "norm", "learning rate", "what trains", "accuracy",
              "gammas below 0.01 (%)", "disabled features (%)"]
    print_table("Other normalizations", "llrlrrr", header, rows)

def print_disabled(runs):
    rows = []
    for (arch, variant), records in runs.items():
        cells = [mean_and_std(disabled_shares(records, kind)) for kind in RELUS]
        if any(cell != "-" for cell in cells):
            rows.append([arch, variant, *cells])
    header = ["network", "what trains"] + list(RELUS)
    print_table("Disabled features (%), by their ReLU", "llrrr", header, rows)

def print_pruning(runs):
    """Means over the n records that have a table "prune"."""
    thresholds = [threshold for threshold in THRESHOLDS if threshold > 0]   # nothing is below 0
    rows = []
    for (arch, variant), records in runs.items():
        n = sum("prune" in record for record in records)
        if n > 0:
            cells = [pruning_cell(rows_below(records, threshold)) for threshold in thresholds]
            rows.append([arch, variant, str(n), *cells])
    title = ("Gammas below a threshold set to zero: "
             "change of accuracy in points (share of gammas, %)")
    header = ["network", "what trains", "n", *(f"< {threshold:g}" for threshold in thresholds)]
    print_table(title, "llr" + "r" * len(thresholds), header, rows)

def pruning_cell(rows):
    if not rows:
        return "-"
    change = np.mean([row["change"] for row in rows])
    share = np.mean([row["pruned"] for row in rows])
    return f"{change:+.2f} ({share:.1f})"

def print_runs(runs):
    """A row for each session that trained an epoch; a run that was resumed has several."""
    rows = []
    for (arch, variant), records in runs.items():
        for record in records:
            options = record["options"]
            about_run = [arch, variant, str(options["seed"]), options["amp"],
                         f"{record['test_accuracy']:.2f}", f"{record['seconds'] / 3600:.2f}"]
            blank = [""] * len(about_run)
            for session in sessions_with_epochs(record):
                rows.append([*about_run, str(session["first_epoch"]), session["hardware"],
                             session["torch"], short_commit(session["commit"])])
                about_run = blank   # after its first row
    header = ["network", "what trains", "--seed", "--amp", "accuracy", "hours",
              "from epoch", "hardware", "torch", "commit"]
    print_table("Runs", "llrlrrrlll", header, rows)

def sessions_with_epochs(record):
    """The sessions of a run but those that ended before their first epoch did."""
    sessions = record["sessions"]
    next_epochs = [session["first_epoch"] for session in sessions[1:]]
    next_epochs.append(len(record["epochs"]) + 1)
    return [session for session, next_epoch in zip(sessions, next_epochs)
            if session["first_epoch"] < next_epoch]

def short_commit(commit):
    """Seven of the forty digits of a commit, and "-dirty" if that follows."""
    if commit is None:
        return "not in git"
    if commit == "unknown":
        return commit
    return commit[:7] + commit[40:]

def print_left_out(left_out):
    print_table("Left out", "ll", ["file", "reason"], left_out)

# --- one network

def print_network(path, args):
    """Print gamma and beta of a checkpoint and, with --activations, how often its ReLUs fire."""
    model, checkpoint = load_checkpoint(path)
    options = checkpoint["options"]
    log(f"# {path}\n")
    log(" ".join(f"--{name} {options[name]}" for name in ("arch", "train", "norm", "seed")))
    betas = [beta.detach() for _, _, beta in gammas_and_betas(model)]
    print_histogram("Distribution of gamma", gammas(model).numpy())
    print_histogram("Distribution of beta", torch.cat(betas).numpy())
    if args.activations:
        print_activations(path, model, checkpoint, args)

def print_histogram(title, values):
    """A line for each bin of 0.05; the middle one is centred at 0, so that a spike there shows."""
    edges = np.arange(-41, 42, 2) / 40
    counts, _ = np.histogram(values, edges)
    log(f"\n## {title}\n\n```")
    for edge, count in zip(edges, counts):
        share = 100 * count / len(values)
        center = edge + 0.025
        log(f"{center:+.2f} {share:6.2f} % {'#' * round(share)}".rstrip())
    beyond = 100 - 100 * counts.sum() / len(values)
    log(f"beyond{beyond:6.2f} %\n```")

def print_activations(path, model, checkpoint, args):
    """Measure how often the ReLUs fire, print it, and add it to the record of the run."""
    images, labels, amp = prepare_test(model, checkpoint, args)
    table = relu_table(model, images, labels, amp)
    add_to_record(path, checkpoint, "activations", table)
    rows = []
    for row in table:
        percentages = [f"{row['fires']:.2f}", f"{row['disabled']:.2f}"]
        rows.append([row["relu"], str(row["features"]), *percentages])
    header = ["ReLU", "features", "fires", "disabled"]
    print_table("ReLUs on the test images (%)", "lrrr", header, rows)

def relu_table(model, images, labels, amp):
    """How often the features of each kind of ReLU fire, over all test images and positions.

    A dict per kind: "relu", its name; "features", their number; "fires", the share of positions at
    which a feature is positive, on average; "disabled", the share of features that are positive at
    less than 1 % of their positions. Both shares are in percent.
    """
    fires = {}   # by ReLU: (C,), the share of positive positions, added up over images

    def count(module, inputs, output):
        """output: (B, C, H, W)"""
        share_of_image = (output > 0).float().mean((2, 3))   # (B, C)
        fires[module] += share_of_image.sum(0).cpu().double()

    hooks = []
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            fires[module] = 0
            hooks.append(module.register_forward_hook(count))
    evaluate(model, images, labels, amp)
    for hook in hooks:
        hook.remove()

    table = []
    for kind, end in RELUS.items():
        of_kind = []
        for name, module in model.named_modules():
            if module in fires and name.endswith(end):
                of_kind.append(fires[module])
        shares = torch.cat(of_kind) / len(images)
        table.append({
            "relu": kind,
            "features": len(shares),
            "fires": 100 * shares.mean().item(),
            "disabled": 100 * (shares < 0.01).double().mean().item(),
        })
    return table

# --- figures

# Colours of Okabe and Ito that show on white and on black, and the text of the legend.
LOOKS = {
    "bn": ("#3A8FD0", "only BatchNorm"),
    "wide": ("#CC79A7", "only BatchNorm, wider"),
    "all": ("#D55E00", "everything"),
    "random": ("#009E73", "two weights per channel"),
}
SETTINGS = {
    "axes.edgecolor": "gray",
    "axes.labelcolor": "gray",
    "xtick.color": "gray",
    "ytick.color": "gray",
    "text.color": "gray",
    "axes.xmargin": 0.16,
    "axes.ymargin": 0.1,
    "svg.hashsalt": "0",   # the same file each time
}

def require_matplotlib():
    """Raise UserError unless there is a matplotlib that can place a legend outside of the axes."""
    try:
        import matplotlib
        version = matplotlib.__version__
    except ImportError:
        version = "0.0"
    major, minor = version.split(".")[:2]
    if (int(major), int(minor)) < (3, 7):
        raise UserError("--plot needs matplotlib 3.7 or newer: pip install -U matplotlib", 2)

def draw(runs, published, folder):
    """Write the figures as SVG files and return them by name. A line's gid tells what it shows."""
    import matplotlib
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()   # whatever the user's matplotlibrc says
        matplotlib.rcParams.update(SETTINGS)
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
            log(f"wrote {file}")
    return figures

def new_figure(x_label, y_label, panels=1):
    """A figure, and its panels side by side in a list of axes."""
    from matplotlib.figure import Figure
    figure = Figure((7.5, 4), layout="constrained")
    axes = figure.subplots(1, panels, sharex=True, sharey=True, squeeze=False)[0]
    for ax in axes:
        ax.set_xlabel(x_label)
    axes[0].set_ylabel(y_label)
    return figure, axes

def add_legend(figure):
    """One legend for all panels, above them."""
    handles = {}   # by label: panels have the same ones
    for ax in figure.axes:
        for handle, label in zip(*ax.get_legend_handles_labels()):
            handles[label] = handle
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=3,
                  frameon=False)

def draw_accuracy(runs, published):
    """Accuracy against the number of BatchNorm parameters: ours solid, the paper's dotted."""
    figure, [ax] = new_figure("BatchNorm parameters", "test accuracy (%)")
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:,.0f}")
    draw_our_accuracy(ax, runs, DEEP, variant="bn", look="bn")
    draw_paper_accuracy(ax, published, DEEP, look="bn", offset=(-6, 3), side="right")
    draw_our_accuracy(ax, runs, WIDE, variant="bn", look="wide")
    draw_paper_accuracy(ax, published, WIDE, look="wide", offset=(6, -8), side="left")
    draw_our_accuracy(ax, runs, DEEP, variant="random", look="random")
    return figure

def draw_our_accuracy(ax, runs, archs, variant, look):
    """A point for each run of these networks, and a line through the means."""
    color, label = LOOKS[look]
    point_counts, points = [], []
    line_counts, means = [], []
    for arch in archs:
        values = accuracies(runs.get((arch, variant), []))
        if values:
            count = counts_of(arch)["bn"]
            point_counts += [count] * len(values)
            points += values
            line_counts.append(count)
            means.append(np.mean(values))
    if points:
        ax.plot(point_counts, points, "o", color=color, label=label, gid=look)
        ax.plot(line_counts, means, "-", color=color, gid=f"{look}, means")

def draw_paper_accuracy(ax, published, archs, look, offset, side):
    """The paper's accuracies of these networks, BatchNorm alone trained, with their names."""
    counts = [counts_of(arch)["bn"] for arch in archs]
    values = [published_number(published[arch, "bn"]["paper"]) for arch in archs]
    color, label = LOOKS[look]
    ax.plot(counts, values, "o:", mfc="none", color=color, label=f"{label}, paper",
            gid=f"{look}, paper")
    for arch, count, value in zip(archs, counts, values):
        ax.annotate(arch, (count, value), offset, textcoords="offset points", ha=side, color=color)

def published_number(text):
    """The number in "48.1" or in "~79.7", the middle of "82.0-83.9"."""
    ends = [float(end) for end in text.removeprefix("~").split("-")]
    return sum(ends) / len(ends)

def drawn_archs(runs):
    """The networks of all figures but the first: those of which BatchNorm alone was trained.

    If there is none, resnet14, because a figure needs a panel.
    """
    return [arch for arch in DEEP if (arch, "bn") in runs] or ["resnet14"]

def drawn_runs(runs):
    """The (arch, what trains, records) of the figures of pruning and epochs."""
    drawn = []
    for arch in drawn_archs(runs):
        for variant in ("all", "bn", "random"):
            if (arch, variant) in runs:
                drawn.append((arch, variant, runs[arch, variant]))
    return drawn

def draw_gamma(runs):
    """The distribution of |gamma| up to 1.55, a panel for each network."""
    archs = drawn_archs(runs)
    figure, axes = new_figure("|gamma|", "gammas in a bin of 0.05 (%)", len(archs))
    edges = np.arange(32) / 20
    for arch, ax in zip(archs, axes):
        ax.set_title(arch)
        for variant in ("all", "bn"):
            values = stored_gammas(runs.get((arch, variant), []))
            if values:
                counts, _ = np.histogram(np.abs(values), edges)
                color, label = LOOKS[variant]
                ax.stairs(100 * counts / len(values), edges, fill=True, alpha=0.6, color=color,
                          label=label, gid=f"{arch} {variant}")
    return figure

def stored_gammas(records):
    """The gammas in those checkpoints of these runs that exist and can be read, as one list."""
    values = []
    for record in records:
        try:
            model, _ = load_checkpoint(record["file"].with_suffix(".pt"))
            values += gammas(model).tolist()
        except FileNotFoundError:   # large checkpoints may be left out of a copy of the results
            continue
        except (UserError, OSError) as error:
            log(f"not in the figure: {one_line(error)}")
    return values

def draw_pruning(runs):
    """Accuracy against the share of gammas set to zero, a point for each threshold."""
    figure, [ax] = new_figure("gammas set to zero (%)", "test accuracy (%)")
    for arch, variant, records in drawn_runs(runs):
        shares = []
        means = []
        for threshold in THRESHOLDS:
            rows = rows_below(records, threshold)
            if rows:
                shares.append(np.mean([row["pruned"] for row in rows]))
                means.append(np.mean([row["test_accuracy"] for row in rows]))
        if shares:
            draw_curve(ax, arch, variant, shares, means, "o-", end=0, side="right")
    return figure

def draw_epochs(runs):
    """Accuracy after each epoch."""
    figure, [ax] = new_figure("epoch", "test accuracy (%)")
    for arch, variant, records in drawn_runs(runs):
        curves = []
        for record in records:
            curves.append([epoch["test_accuracy"] for epoch in record["epochs"]])
        means = np.mean(curves, axis=0)
        epochs = range(1, len(means) + 1)
        draw_curve(ax, arch, variant, epochs, means, "-", end=-1, side="left")
    return figure

def draw_curve(ax, arch, variant, x, y, style, end, side):
    """A line in the look of what trains, with the network's name at its first or last point."""
    color, label = LOOKS[variant]
    ax.plot(x, y, style, color=color, label=label, gid=f"{arch} {variant}")
    ax.annotate(f"  {arch}  ", (x[end], y[end]), ha=side, va="center", color=color)

# --- command line

def parse_command_line():
    parser = argparse.ArgumentParser(
        description="Print or draw the results of all runs, or look into checkpoints.")
    parser.add_argument("checkpoints", nargs="*", type=os.path.expanduser, metavar="x.pt",
                        help="written by train.py")
    parser.add_argument("--activations", action="store_true",
                        help="also how often the ReLUs of the checkpoints fire")
    parser.add_argument("--results", type=os.path.expanduser, default=RESULTS, metavar="DIR",
                        help="folder of the records")
    parser.add_argument("--plot", type=os.path.expanduser, nargs="?", const="", metavar="DIR",
                        help="draw, by default into the folder figures in --results")
    add_device_arguments(parser)
    args = parser.parse_args()
    args.results = pathlib.Path(args.results)
    if args.activations and not args.checkpoints:
        parser.error("--activations needs checkpoints")
    if args.plot is not None and args.checkpoints:
        parser.error("--plot draws the records in --results, not checkpoints")
    if not args.checkpoints and not args.results.is_dir():
        parser.error(f"argument --results: {args.results}: not a folder")
    return args

def main():
    args = parse_command_line()
    for path in args.checkpoints:
        print_network(path, args)
    if not args.checkpoints:
        print_or_draw_results(args)

def print_or_draw_results(args):
    if args.plot is not None:
        require_matplotlib()
    runs, left_out = read_results(args.results)
    if not runs:
        print_left_out(left_out)
        raise UserError(f"no record of a finished run of the recipe in {args.results}")
    published = read_published()
    if args.plot is not None:
        draw(runs, published, pathlib.Path(args.plot or args.results / "figures"))
        return
    log(INTRODUCTION, end="")
    print_networks("Depth", DEEP, runs, published)
    print_networks("Width", ["resnet14", *WIDE], runs, published)
    print_what_trains(runs, published)
    print_normalizations(runs)
    print_disabled(runs)
    print_pruning(runs)
    print_runs(runs)
    print_left_out(left_out)

if __name__ == "__main__":
    run_cli(main)
