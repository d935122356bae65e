"""Train a CIFAR-10 ResNet, or only its BatchNorm, with the recipe of arXiv 2003.00152.

    python train.py --arch resnet866 --bn-only      # the paper's headline experiment; add --resume to continue it
    python train.py --arch resnet8 --bn-only --dataset synthetic --epochs 2     # no download, no GPU, a minute

Every epoch writes the checkpoint (--out x.pt) and the log (x.jsonl); the last one also writes the record (x.json).
"""
import argparse
import datetime
import functools
import io
import json
import math
import os
import pathlib
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import zipfile

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from models import (BN_INITS, NORMS, PARTS, WEIGHT_INITS, Block, build_model, count_parameters, empty_model,
                    fingerprint, parameters_of, parse_arch)

class UserError(Exception):
    """An error the user can fix: UserError(one line of text, exit status), status 2 for wrong usage, by default 1."""

# --- data

# ImageNet's statistics, as in OpenLTH, the authors' code.
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])

def load_data(dataset, data_dir, seed):
    """((train images, train labels), (test images, test labels)) on the CPU: uint8 (N, 32, 32, 3) and int64 (N,)."""
    if dataset == "synthetic":
        return synthetic_data(seed)
    try:
        from torchvision.datasets import CIFAR10
    except RuntimeError:   # a CUDA build beside a CPU build of torch lacks its operators; none is needed here
        for operator in "nms", "qnms":
            torch.library.define(f"torchvision::{operator}", "() -> ()")
        from torchvision.datasets import CIFAR10
    data_dir = pathlib.Path(data_dir).absolute()
    if data_dir.name == CIFAR10.base_folder:   # the folder itself instead of its parent
        data_dir = data_dir.parent
    try:
        splits = [CIFAR10(data_dir, train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise UserError(f"no intact CIFAR-10 in {data_dir}, and it can't be downloaded ({one_line(error)}): "
                        f"put {CIFAR10.url} there, or try --dataset synthetic") from error
    return [(torch.from_numpy(split.data), torch.tensor(split.targets)) for split in splits]

def synthetic_data(seed):
    """Ten smooth random patterns in the shape of CIFAR-10, shifted with wrap-around and noisy: to try the code."""
    rng = np.random.RandomState([seed, 1])
    patterns = F.interpolate(torch.from_numpy(rng.standard_normal((10, 3, 4, 4))), size=32, mode="bicubic")
    patterns = 12 * patterns.permute(0, 2, 3, 1).float().numpy() + 64   # (10, 32, 32, 3)

    def draw(n):
        labels, (dy, dx) = rng.randint(0, 10, n), rng.randint(-8, 9, (2, n, 1)) + np.arange(32)
        images = patterns[labels[:, None, None], dy[:, :, None] % 32, dx[:, None, :] % 32]
        images += rng.randint(0, 128, images.shape, dtype=np.uint8)
        return torch.from_numpy(images.clip(0, 255).astype(np.uint8)), torch.from_numpy(labels).long()
    return draw(50_000), draw(10_000)

def draw_augmentation(n, rng):
    """The random draws of an epoch, on the CPU so that a seed gives the same batches on any device.

    Returns the order (n,) of the images, a crop offset (n, 2) in 0 .. 8 and a flip (n,) for each place in it.
    """
    order = torch.randperm(n, generator=rng)
    offset = torch.randint(0, 9, (n, 2), generator=rng)
    flip = torch.randint(0, 2, (n,), generator=rng).bool()
    return order, offset, flip

def augment(padded, index, offset, flip):
    """Crop and flip each image in its own way, the whole batch in one gather of pixels. Returns (B, 32, 32, 3).

    padded: (N, 40, 40, 3), images with a border of 4 black pixels; index, flip: (B,); offset: (B, 2), y and x.
    """
    pixel = torch.arange(32, device=padded.device)
    rows = offset[:, :1] + pixel                                               # (B, 32)
    cols = offset[:, 1:] + torch.where(flip[:, None], 31 - pixel, pixel)       # (B, 32)
    pixels = ((index[:, None] * 40 + rows) * 40)[:, :, None] + cols[:, None]   # (B, 32, 32), counted over all images
    return padded.view(-1, 3).index_select(0, pixels.flatten()).view(*pixels.shape, 3)

def normalize(images, dtype=torch.float32):
    """(B, 32, 32, 3) uint8 -> (B, 3, 32, 32) of `dtype`, (x / 255 - MEAN) / STD, in channels_last order."""
    factor, summand = row_constants(dtype, images.device)
    rows = images.flatten(2).to(dtype)   # (B, 32, 96): vectors of 3 channels would be slow
    return torch.addcmul(summand, rows, factor).view(images.shape).permute(0, 3, 1, 2)

@functools.cache   # because copying to a GPU in every step would make the host wait
def row_constants(dtype, device):
    """The factors and summands of `normalize` for a row of 32 pixels: (2, 96)."""
    return torch.tensor(np.tile([1 / (255 * STD), -MEAN / STD], 32), dtype=dtype, device=device)

# --- what trains

# Shorthands of --train, else parts joined by "+". "random": two weights per output channel, see TwoWeightsPerChannel.
NAMES = {"all": ["conv", "bn", "shortcut", "output"], "not-bn": ["conv", "shortcut", "output"], "random": []}

def parse_train(text):
    """The one spelling of a --train value: a name, or PARTS in their order. Raises ValueError for any other."""
    parts = NAMES.get(text, text.split("+"))
    check(set(parts) <= set(PARTS) and len(set(parts)) == len(parts),
          f"not {', '.join(NAMES)}, or some of {', '.join(PARTS)} joined by +")
    ordered = [part for part in PARTS if part in parts]
    return next((name for name in NAMES if NAMES[name] == ordered), "+".join(ordered))

class TwoWeightsPerChannel(nn.Module):
    """Parametrization of a convolution: two random weights per output channel train, as many as BatchNorm has."""
    def __init__(self, weight, rng):
        super().__init__()
        c_out, fan_in = weight.shape[0], weight[0].numel()
        first = rng.randint(0, fan_in, c_out)
        second = rng.randint(0, fan_in - 1, c_out)
        second += second >= first                       # uniform over the other fan_in - 1
        chosen = np.stack([first, second], 1) + fan_in * np.arange(c_out)[:, None]
        self.register_buffer("chosen", torch.from_numpy(chosen.flatten()).long())   # positions in the flattened weight
        # (2 c_out,). The optimizer sees nothing else, so that momentum and weight decay move nothing else.
        self.values = nn.Parameter(weight.detach().flatten()[self.chosen])

    def forward(self, weight):
        return weight.flatten().scatter(0, self.chosen, self.values.to(weight.dtype)).view_as(weight)

def freeze(model, train, seed):
    """Let only the parameters that --train names require gradients."""
    model.requires_grad_(False)
    for parameter in parameters_of(model, NAMES.get(train, train.split("+"))):
        parameter.requires_grad_(True)
    if train == "random":
        rng = np.random.RandomState([seed, 2])   # a stream of its own
        for conv in [module for module in model.modules() if isinstance(module, nn.Conv2d)]:
            nn.utils.parametrize.register_parametrization(conv, "weight", TwoWeightsPerChannel(conv.weight, rng))

def build(options):
    """The network of a run's options, on the CPU: initial values drawn, and all frozen but what --train names."""
    model = build_model(*(options[name] for name in ("arch", "seed", "norm", "bn_init", "weight_init")))
    freeze(model, options["train"], options["seed"])
    return model

# --- training

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}
torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False   # "off" means fp32

def train_step(model, optimizer, scaler, images, labels, amp):
    """One step of SGD on normalized images (B, 3, 32, 32). Returns (mean loss, correct predictions) as tensors."""
    with torch.autocast(images.device.type, AMP_DTYPES[amp], enabled=amp != "off"):
        logits = model(images)
    loss = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)   # float64 stays
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return loss.detach(), (logits.argmax(1) == labels).sum()

def learning_rate(lr, epoch, epochs):
    """The learning rate of an epoch counted from 0: divided by 10 after one half and three quarters of the epochs."""
    return lr / 10 ** ((epoch >= epochs / 2) + (epoch >= epochs * 3 / 4))

def train(args):
    """Train to the last epoch, from the beginning or from the last complete epoch of a checkpoint (--resume)."""
    model, state = start(args)
    records, device = state["records"], args.device   # one record per complete epoch
    if len(records) == args.epochs:
        return say(f"{args.out} is finished: {records[-1]['test_accuracy']:.2f} % test accuracy")
    data = load_data(args.dataset, args.data_dir, args.seed)
    (train_images, train_labels), test_data = [[t.to(device) for t in split] for split in data]
    padded = F.pad(train_images, (0, 0, 4, 4, 4, 4))   # (N, 40, 40, 3)
    n, size = len(padded), args.batch_size

    step, optimizer, scaler = prepare(model, args, {size, n % size or size})   # the last batch is smaller, see OpenLTH
    tensors = state_tensors(model, optimizer)
    from_vectors(tensors, state)   # the run so far: parameters, momentum, running statistics
    scaler.load_state_dict(state["scaler"])
    rng = torch.Generator().set_state(state["rng"])

    say("  epoch  train loss  train acc   test acc      lr  seconds  images/s  time left")
    for epoch in range(len(records), args.epochs):
        began = time.perf_counter()
        lr = learning_rate(args.lr, epoch, args.epochs)
        for group in optimizer.param_groups:   # a CUDA graph reads the rate from a tensor
            group["lr"] = group["lr"].fill_(lr) if isinstance(group["lr"], torch.Tensor) else lr
        order, offset, flip = (draws.to(device) for draws in draw_augmentation(n, rng))
        losses, correct = [], 0
        model.train()
        for first in range(0, n, size):
            i = slice(first, first + size)
            images = augment(padded, order[i], offset[i], flip[i])
            labels = train_labels[order[i]]
            loss, hits = step(normalize(images), labels)
            losses.append(loss * len(labels))
            correct += hits
            if sys.stdout.isatty() and len(losses) % 10 == 1:   # rarely, because it waits for the device
                say(f"{epoch + 1:3}/{args.epochs}  image {first:6,} of {n:,}, loss {loss.item():.3f}", end="\r")
        train_loss = sum(torch.stack(losses).tolist()) / n
        train_seconds = time.perf_counter() - began

        with torch.compiler.set_stance("force_eager"):   # another batch size is not worth a compilation
            accuracy = evaluate(model, *test_data, args.amp)
        vectors = to_vectors(tensors)
        if not math.isfinite(train_loss) or not all(vector.isfinite().all() for vector in vectors.values()):
            raise UserError(f"training diverged: the loss or a parameter is not finite in epoch {epoch + 1}, "
                            "which is not saved; try a lower --lr, or --amp off")
        records.append({"epoch": epoch + 1, "train_loss": train_loss, "train_accuracy": 100 * correct.item() / n,
                        "test_accuracy": accuracy, "lr": lr, "seconds": round(time.perf_counter() - began, 3),
                        "images_per_second": round(n / train_seconds, 1)})
        # Before printing: a lost terminal loses no epoch.
        save(args.out, {**state, **vectors, "rng": rng.get_state(), "scaler": scaler.state_dict()})
        left = (args.epochs - epoch - 1) * np.mean([record["seconds"] for record in records[-10:]])
        say("{epoch:3}/{epochs:<3} {train_loss:11.4f} {train_accuracy:8.2f} % {test_accuracy:8.2f} % {lr:7.4g} "
            "{seconds:8.1f} {images_per_second:9,.0f} {left!s:>10}".format(
                **records[-1], epochs=args.epochs, left=datetime.timedelta(seconds=round(left))))

def start(args):
    """The network and the state of the run (see load_checkpoint): the checkpoint's, or those before the first epoch."""
    options = {o: getattr(args, o) for o in OPTIONS}
    if args.resume and args.out.exists():
        model, state = load_checkpoint(args.out)
        for name, value in state["options"].items():
            if value != options[name]:
                raise UserError(f"{args.out} is a run with {name} {value}, not {options[name]}", 2)
    else:
        for path in (args.out.with_suffix(suffix) for suffix in (".pt", ".jsonl", ".json")):
            if path.exists() and (not args.resume or path.suffix == ".json"):
                raise UserError(f"{path} exists: add --resume to continue, choose another --out, or delete it", 2)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out.parent).close()   # fails now, not after an epoch
        model = build(options)
        state = {**to_vectors(state_tensors(model)), "options": options, "records": [], "parts": [],
                 "rng": torch.Generator().manual_seed(args.seed).get_state(),
                 "scaler": torch.amp.GradScaler(args.device.type, enabled=args.amp == "fp16").state_dict(),
                 "fingerprint": fingerprint(p for p in model.parameters() if not p.requires_grad)}
        state["momentum"] = torch.zeros_like(state["trained"])
    state["parts"].append({"first_epoch": len(state["records"]) + 1, "plain": args.plain, **machine(args.device)})
    trained, total = len(state["trained"]), count_parameters(empty_model(args.arch, args.norm))["all"]
    say(f"{args.arch} on {args.device}: {trained:,} of {total:,} parameters train, epochs done: "
        f"{len(state['records'])} of {args.epochs}")
    return model, state

@torch.no_grad()
def evaluate(model, images, labels, amp):
    """Accuracy in percent on uint8 images (N, 32, 32, 3), with running statistics. Leaves the model in eval mode."""
    model.eval()
    size = max(125, 16_000 // model.conv.out_channels) if images.is_cuda else 125   # memory as for a step; CPU caches
    correct = 0
    for batch, batch_labels in zip(images.split(size), labels.split(size)):
        with torch.autocast(images.device.type, AMP_DTYPES[amp], enabled=amp != "off"):
            logits = model(normalize(batch))
        correct += (logits.argmax(1) == batch_labels).sum()
    return 100 * correct.item() / len(images)

# --- fast path

def prepare(model, args, sizes):
    """Move a network to the device and return (step, optimizer, scaler), fast unless --plain.

    step(images, labels) is train_step for normalized images (B, 3, 32, 32), B in `sizes`. On CUDA, preparing it trains
    on blank images: load the state of the run afterwards.
    """
    device, fast = args.device, not args.plain and args.device.type != "mps"   # wrong in channels_last: pytorch#175189
    model.train().to(device)   # a CUDA graph keeps the mode of its capture, and a loaded model is in evaluation mode
    if fast:
        model.to(memory_format=torch.channels_last)   # the layout that convolution kernels are written for
        for conv in [module for module in model.modules() if isinstance(module, nn.Conv2d)]:
            conv.__class__ = model.conv.__class__   # parametrized ones have a class each: a compilation per block
        for p in model.parameters():
            if p.dim() > 1 and not p.requires_grad and args.amp != "off" and args.norm != "weight":
                p.data = p.data.to(AMP_DTYPES[args.amp])   # autocast would do it in every step
    trained = [p for p in model.parameters() if p.requires_grad]
    graph = fast and device.type == "cuda"
    lr = torch.tensor(args.lr).to(device) if graph else args.lr
    optimizer = torch.optim.SGD(trained, lr, 0.9, weight_decay=args.weight_decay, fused=fast or None)
    for p in trained:   # SGD starts from zero; here even if the first step overflows in fp16
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")

    def step(images, labels):
        return train_step(model, optimizer, scaler, images if fast else images.contiguous(), labels, args.amp)

    if graph:
        torch.cuda.set_device(device)
        for module in model.modules():
            if isinstance(module, Block):
                module.compile(dynamic=False)   # five kinds of blocks, whatever the depth
        for stance, what in ("default", "compiled blocks"), ("force_eager", "CUDA graphs"):
            try:
                return capture(step, sizes, stance, device), optimizer, scaler
            except Exception as error:   # whatever compilers and drivers raise
                if is_out_of_memory(error):
                    raise
                say(f"{what} fail here, continuing without them ({one_line(error)})")
        torch.compiler.set_stance("force_eager")
    return step, optimizer, scaler

def capture(step, sizes, stance, device):
    """The step as a CUDA graph per batch size, in one pool of memory: one launch replaces thousands."""
    stream, pool, graphs = torch.cuda.Stream(), torch.cuda.graph_pool_handle(), {}
    for warm_up in True, False:   # of all sizes first, because a capture can't use the memory of a warm-up
        for size in sorted(sizes, reverse=True):
            images = torch.zeros(size, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
            labels = torch.zeros(size, device=device).long()
            with torch.compiler.set_stance(stance if size == max(sizes) else "force_eager"):
                if warm_up:   # compiles, and allocates what a capture can't
                    stream.wait_stream(torch.cuda.current_stream())
                    with torch.cuda.stream(stream):
                        for _ in range(3):
                            step(images, labels)
                else:
                    with torch.cuda.graph(graph := torch.cuda.CUDAGraph(), pool, stream):
                        graphs[size] = graph, images, labels, *step(images, labels)

    def replay(images, labels):
        graph, static_images, static_labels, loss, correct = graphs[len(images)]
        static_images.copy_(images)
        static_labels.copy_(labels)
        graph.replay()
        return loss.clone(), correct.clone()   # the next replay overwrites them

    return replay

# --- checkpoints

VERSION = 2
# The options that make a run what it is: they are in its checkpoint and its record, and --resume can't change them.
OPTIONS = ["arch", "train", "norm", "bn_init", "weight_init", "dataset", "seed", "epochs", "batch_size", "lr",
           "weight_decay", "amp"]
METRICS = {"epoch", "train_loss", "train_accuracy", "test_accuracy", "lr", "seconds", "images_per_second"}

def state_tensors(model, optimizer=None):
    """Lists of the tensors that training changes, by the name of their vector in a checkpoint."""
    tensors = {"trained": [p for p in model.parameters() if p.requires_grad]}
    if optimizer:
        tensors["momentum"] = [optimizer.state[p]["momentum_buffer"] for p in tensors["trained"]]
    for name in "running_mean", "running_var":
        tensors[name] = [getattr(m, name) for m in model.modules() if hasattr(m, name)]
    return tensors

def to_vectors(tensors):
    """Each list of tensors as one vector, on the CPU."""
    return {name: torch.cat([torch.zeros(0), *(t.detach().flatten().cpu() for t in listed)])
            for name, listed in tensors.items()}

@torch.no_grad()
def from_vectors(tensors, vectors):
    """Copy the vectors that to_vectors made back into the tensors, in place."""
    for name, listed in tensors.items():
        sizes = [tensor.numel() for tensor in listed]
        for tensor, part in zip(listed, vectors[name].split(sizes)):
            tensor.copy_(part.view_as(tensor))

def write(path, content):
    """Write bytes such that `path` holds the old content or the new, never a part, even after a power cut."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path} can't be written ({error.strerror})") from error

def write_record(path, record):
    """Write the record of a run as JSON, with a line for each epoch."""
    write(path, (json.dumps(record).replace("}, {", "},\n {") + "\n").encode())

def save(out, state):
    """Write the log, after the last epoch the record, and only then the checkpoint, from which --resume continues."""
    records, options = state["records"], state["options"]
    write(out.with_suffix(".jsonl"), "".join(json.dumps(record) + "\n" for record in records).encode())
    if len(records) == options["epochs"]:
        counts = {**count_parameters(empty_model(options["arch"], options["norm"])), "trained": len(state["trained"])}
        write_record(out.with_suffix(".json"), {   # the accuracy is that of the last epoch, never the best
            **options, "parameters": counts, "parts": state["parts"], "test_accuracy": records[-1]["test_accuracy"],
            "seconds": round(sum(record["seconds"] for record in records), 1), "records": records})
    save_checkpoint(out, state)

def save_checkpoint(path, state):
    """Write a state: vectors, not a tensor per layer (867 names would outweigh their numbers), and the rest as JSON."""
    vectors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    rest = {name: value for name, value in state.items() if name not in vectors}
    torch.save({**vectors, "json": json.dumps({"version": VERSION, **rest})}, content := io.BytesIO())
    write(path, content.getvalue())

def load_checkpoint(path):
    """Read a checkpoint from anyone without running code in it. Returns (model in evaluation mode, state of the run).

    The state: the vectors of state_tensors, and rng; options; records, one per epoch; parts, one per start; scaler;
    fingerprint of the frozen weights. Raises UserError if the file is invalid.
    """
    try:
        with zipfile.ZipFile(path) as archive:   # torch.load does not look at the checksums
            check(archive.testzip() is None, "its checksums do not match")
        vectors = torch.load(path, map_location="cpu", weights_only=True)
        state = json.loads(vectors.pop("json"))
        check(state.pop("version") == VERSION, f"this code reads format {VERSION}: use the release that wrote it")
        options = state["options"] = check_run(state["options"], state["records"])
        # Before memory is taken for a network: a short file can name a large one (but for norms without statistics).
        means = state_tensors(empty_model(options["arch"], options["norm"]))["running_mean"]
        check(len(vectors["running_mean"]) == sum(map(len, means)), f"it is not of {options['arch']}")
        model = build(options)
        tensors = state_tensors(model)
        for name, listed in {**tensors, "momentum": tensors["trained"]}.items():
            vector, length = vectors[name], sum(tensor.numel() for tensor in listed)
            check(vector.dtype == torch.float32 and vector.shape == (length,) and vector.isfinite().all(),
                  f"{name} is not {length} finite numbers")
        check((vectors["running_var"] >= 0).all() and type(state["parts"]) is list, "negative variance or no parts")
        drawn = fingerprint(p for p in model.parameters() if not p.requires_grad)
        check(np.allclose(drawn, state["fingerprint"], 0, 1e-9 * drawn[0]), "its seed draws other weights now")
        torch.Generator().set_state(vectors["rng"])
        torch.amp.GradScaler("cpu", enabled=options["amp"] == "fp16").load_state_dict(state["scaler"])
        from_vectors(tensors, vectors)
    except (FileNotFoundError, PermissionError, IsADirectoryError, MemoryError):
        raise
    except Exception as error:   # whatever a damaged file makes the readers raise
        raise UserError(f"{path} is not a valid checkpoint of train.py ({one_line(error).split('. ')[0]})") from None
    return model.eval(), {**state, **vectors}

def check(holds, what):
    """Raise ValueError unless the condition holds."""
    if not holds:
        raise ValueError(what)

def check_run(options, records):
    """A file's options, parsed as a command line for its bounds and defaults; raises if train.py can't write such."""
    parser = make_parser()
    parser.error = lambda message: check(False, message)
    args = parser.parse_args(["--device=cpu", *(f"--{o.replace('_', '-')}={v}" for o, v in options.items())])
    parsed = {o: getattr(args, o) for o in OPTIONS}
    check(parsed == {**parsed, **options} and parsed["amp"] != "auto", "options with wrong values")
    epochs = [record["epoch"] for record in records]
    check(epochs == [*range(1, len(epochs) + 1)] and 1 <= len(epochs) <= parsed["epochs"], "epochs are missing")
    check(all(0 <= r[f] <= (100 if "accuracy" in f else 1e9) for r in records for f in METRICS), "impossible figures")
    return parsed

# --- benchmark

def benchmark(args):
    """Time args.benchmark steps on noise, after five to warm up, and estimate how long a run will take."""
    size, seconds = args.batch_size, []
    step, *_ = prepare(build(vars(args)), args, {size})
    images = torch.randint(0, 256, (size, 32, 32, 3), dtype=torch.uint8, device=args.device)
    for _ in range(5 + args.benchmark):
        began = time.perf_counter()
        loss, _ = step(normalize(images), images[:, 0, 0, 0].long() % 10)
        loss.item()   # waits for the device
        seconds.append(time.perf_counter() - began)
    low, step_time, high = np.percentile(seconds[5:], [10, 50, 90])
    hours = args.epochs * math.ceil(50_000 / size) * step_time / 3600
    say(f"{1e3 * step_time:.2f} ms/step (10 % to 90 %: {1e3 * low:.2f} to {1e3 * high:.2f}), "
        f"{size / step_time:,.0f} images/s, {hours:.2f} hours for {args.epochs} epochs"
        + (f", {torch.cuda.max_memory_reserved() / 1e9:.2f} GB of GPU memory" if args.device.type == "cuda" else ""))

# --- output

def say(text, end="\n", file=None):
    """Print and flush. If the output is closed or full, go on without it: a training is worth more than its log."""
    try:
        print(text, end=end, flush=True, file=file)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), (file or sys.stdout).fileno())
        if file is None and not isinstance(error, BrokenPipeError):
            say(f"output is lost from here on: {error}", file=sys.stderr)

def one_line(error):
    """The first line of a message in printable characters: it may quote an untrusted file."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0][:1000]
    return "".join(c if c.isprintable() else "?" for c in line)

def machine(device):
    """What a run records of the code and the machine; the commit is None if git does not track this file."""
    command = "git ls-files --error-unmatch train.py && git describe --always --dirty --abbrev=40 --exclude=*"
    git = subprocess.run(command, shell=True, cwd=pathlib.Path(__file__).parent, capture_output=True, errors="replace")
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    cpu = re.search("model name\t: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    cpu = f"{cpu[1] if cpu else platform.processor()}, {torch.get_num_threads()} threads"
    return {"commit": git.stdout.split()[-1] if git.returncode == 0 else None, "torch": torch.__version__,
            "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu}

# --- command line

def argument(kind, low=None, high=None):
    """An argparse type: `kind` of the text, in low .. high, with an error that tells what is wrong."""
    def parse(text):
        try:
            value = kind(text)
            check(low is None or low <= value <= high, f"not in {low} .. {high}")
            return value
        except Exception as error:   # of the devices that PyTorch knows, some raise anything
            raise argparse.ArgumentTypeError(f"{text}: {one_line(error)}") from None
    return parse

def parse_device(text):
    """The torch device of a --device value; under torchrun, `cuda` is another GPU for each process."""
    kind = text if text != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if kind == "cuda" else kind)
    torch.zeros(1, device=device).item()   # raises an exception if this machine does not have it
    return device

def add_data_arguments(parser, dataset):
    """Give a parser the options that say on which data and device a network runs."""
    parser.add_argument("--dataset", choices=["cifar10", "synthetic"], default=dataset, help="synthetic: no download")
    parser.add_argument("--data-dir", type=os.path.expanduser, default="data", metavar="DIR", help="for CIFAR-10")
    parser.add_argument("--device", type=argument(parse_device), default="auto", help="auto, cuda, cuda:1, mps, or cpu")

def make_parser():
    """The command line of train.py. Its defaults are the paper's recipe."""
    parser = argparse.ArgumentParser(description="Train a CIFAR-10 ResNet, or only its BatchNorm (arXiv 2003.00152).",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--arch", type=argument(lambda name: parse_arch(name) and name), default="resnet14",
        help="resnet<depth> or wrn<depth>-<width>, depth = 6n + 2")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--train", type=argument(parse_train), metavar="PARTS",
                       default="+".join(NAMES["all"]),   # "all" would let --train all --bn-only pass
                       help=f"what trains: {', '.join(NAMES)}, or some of {', '.join(PARTS)} joined by +")
    group.add_argument("--bn-only", dest="train", action="store_const", const="bn", help="short for --train bn")
    add("--norm", choices=NORMS, default="batch", help="normalization; its own parameters are the part bn")
    add("--bn-init", choices=BN_INITS, default="uniform", help="gamma, beta: U(0,1), 0; 1, 0; 1, 1; or U(-1,1), 0")
    add("--weight-init", choices=WEIGHT_INITS, default="kaiming_normal", help="of all other weights")
    add("--epochs", type=argument(int, 1, 10 ** 6), default=160, help="the learning rate drops at 1/2 and 3/4 of them")
    add("--batch-size", type=argument(int, 1, 50_000), default=128, help="images per step")
    add("--lr", type=argument(float, 1e-30, 1e30), default=0.1, help="initial learning rate of SGD, momentum 0.9")
    add("--weight-decay", type=argument(float, 0, 1e30), default=1e-4, help="L2 penalty on whatever trains")
    add("--seed", type=argument(int, 0, 2 ** 32 - 1), default=0, help="of initial values, data order, augmentation")
    add("--amp", choices=["auto", *AMP_DTYPES], default="auto", help="auto: bf16 on CUDA if it has it, off elsewhere")
    add("--plain", action="store_true", help="no channels_last, fused optimizer, compilation, CUDA graphs")
    add("--benchmark", type=argument(int, 1, 10 ** 6), nargs="?", const=50, metavar="N", help="time N (50) steps")
    add("--out", type=os.path.expanduser, metavar="x.pt", help="checkpoint; by default runs/<arch>-<train>-s<seed>.pt")
    add("--resume", action="store_true", help="continue from the checkpoint, if it exists")
    add_data_arguments(parser, "cifar10")
    return parser

def is_out_of_memory(error):
    """Whether an exception says that memory did not suffice, in one of PyTorch's ways to say it."""
    return isinstance(error, MemoryError) or re.search("out of memory|alloc.* memory|ALLOC_FAILED", str(error))

def run(main, stopped="stopped"):
    """Call main(), with errors that users meet as one line on stderr and an exit status."""
    for name in "stdout", "stderr":   # may be closed, or unable to show a character
        setattr(sys, name, getattr(sys, name) or open(os.devnull, "w"))
        getattr(getattr(sys, name), "reconfigure", dict)(errors="replace")   # a notebook's streams have none
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return main()
    except UserError as error:
        text, status = (*error.args, 1)[:2]
    except KeyboardInterrupt:
        text, status = stopped, 1
    except (OSError, MemoryError, RuntimeError) as error:
        text, status = one_line(error), 1
        if is_out_of_memory(error):
            text += "; try a smaller batch or network"
        elif isinstance(error, RuntimeError):
            raise
    print(f"{os.path.basename(sys.argv[0])}: error: {one_line(text)}", file=sys.stderr)
    sys.exit(status)

def main():
    parser = make_parser()
    args = parser.parse_args()
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))   # set by torchrun
    if args.out and (ranks > 1 or not args.out.endswith(".pt")):
        parser.error(f"--out {args.out}: one checkpoint, so not for torchrun, and its name ends in .pt")
    args.seed += rank
    words = [args.arch, args.train, args.norm, args.bn_init, args.weight_init, f"s{args.seed}"]
    name = "-".join(word for word in words if word not in ("batch", "uniform", "kaiming_normal"))
    args.out = pathlib.Path(args.out or f"runs/{name}.pt")
    if args.amp == "auto":
        args.amp = "off" if args.device.type != "cuda" else "bf16" if torch.cuda.is_bf16_supported(False) else "fp16"
    if args.benchmark:
        return benchmark(args)
    if rank > 0:   # one process prints
        sys.stdout = open(os.devnull, "w")
    if ranks > 1:   # and one on each machine downloads, while the others wait
        torch.distributed.init_process_group("gloo")
        if os.environ["LOCAL_RANK"] == "0":
            load_data(args.dataset, args.data_dir, args.seed)
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    train(args)
    join = subprocess.list2cmdline if os.name == "nt" else shlex.join   # quotes only what needs it
    data_dir = ["--data-dir", args.data_dir] if args.data_dir != "data" else []
    for script, *words in ("prune.py", args.out, *data_dir), ("analyze.py", args.out):
        say("next: " + join(map(str, [sys.executable, pathlib.Path(__file__).with_name(script), *words])))

if __name__ == "__main__":
    run(main, "stopped; the same command with --resume continues after the last complete epoch")
