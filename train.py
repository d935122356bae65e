"""Train a CIFAR-10 ResNet, or only its BatchNorm, with the recipe of arXiv 2003.00152.

    python train.py --arch resnet866 --bn-only --amp off     # the paper's headline, in fp32
    python train.py --arch resnet8 --bn-only --dataset synthetic --epochs 2     # a demo

Every epoch writes the checkpoint (--out x.pt), from which --resume continues, and the record of the
run (x.json), which prune.py and analyze.py read.
"""
import argparse
import datetime
import functools
import http.client
import io
import json
import math
import os
import pathlib
import platform
import re
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from models import (BN_INITS, NORMS, WEIGHT_INITS, Block, WeightNormConv2d, build_model,
                    empty_model, fingerprint, parse_arch)

class UserError(Exception):
    """An error that the user can mend: one line of text, and the exit status (2: wrong usage)."""

    def __init__(self, text, status=1):
        super().__init__(text)
        self.status = status

def require(condition, text):
    """Raise ValueError with this text unless the condition holds."""
    if not condition:
        raise ValueError(text)

# --- data

# ImageNet's channel statistics, as in OpenLTH, the authors' code.
MEAN = np.array([0.485, 0.456, 0.406])
STD = np.array([0.229, 0.224, 0.225])

def load_data(dataset, data_dir, seed):
    """[(train images, train labels), (test images, test labels)] of "cifar10" or "synthetic".

    Images are uint8 (N, 32, 32, 3), labels int64 (N,), on the CPU. The seed is that of the
    synthetic images. Raises UserError if CIFAR-10 is not in data_dir and can't be put there.
    """
    if dataset == "synthetic":
        return synthetic_data(seed)
    splits = load_cifar10(pathlib.Path(data_dir).absolute())
    return [(torch.from_numpy(split.data), to_labels(split.targets)) for split in splits]

def to_labels(values):
    return torch.tensor(values, dtype=torch.int64, device="cpu")

def draw_augmentation(n, rng):
    """The random draws of an epoch, on the CPU so that a seed gives the same batches on any device.

    Returns the order (n,) of the images, and for each place in it a crop offset (n, 2) in 0 .. 8
    and a flip (n,).
    """
    order = torch.randperm(n, generator=rng, device="cpu")
    offset = torch.randint(0, 9, (n, 2), generator=rng, device="cpu")
    flip = torch.randint(0, 2, (n,), generator=rng, device="cpu").bool()
    return order, offset, flip

def augment(padded, index, offset, flip):
    """Crop and flip each image in its own way. Returns uint8 (B, 32, 32, 3).

    padded: (N, 40, 40, 3), images with a border of 4 black pixels; index, flip: (B,);
    offset: (B, 2), y and x. The whole batch is one gather of pixels, because an index for
    each dimension takes four times as long on a CPU.
    """
    pixel = torch.arange(32, device=padded.device)
    from_left = torch.where(flip[:, None], 31 - pixel, pixel)          # (B, 32)
    columns = offset[:, 1:] + from_left                                # (B, 32)
    rows = index[:, None] * 40 + offset[:, :1] + pixel                 # (B, 32), in all N * 40
    pixels = rows[:, :, None] * 40 + columns[:, None, :]               # (B, 32, 32), in all pixels
    gathered = padded.view(-1, 3).index_select(0, pixels.flatten())    # (B * 32 * 32, 3)
    return gathered.view(len(index), 32, 32, 3)

def normalize(images):
    """(x / 255 - MEAN) / STD: uint8 (B, 32, 32, 3) -> float32 (B, 3, 32, 32), channels_last."""
    scale, shift = row_constants(images.device)
    rows = images.flatten(2).float()   # (B, 32, 96), because vectors of 3 channels would be slow
    normalized = torch.addcmul(shift, rows, scale).view(images.shape)
    return normalized.permute(0, 3, 1, 2)

@functools.cache   # because copying to a GPU in every step would make the host wait
def row_constants(device):
    """The scales and shifts of `normalize` for a row of 32 pixels: (2, 96)."""
    channels = np.stack([1 / (255 * STD), -MEAN / STD])   # (2, 3)
    return torch.tensor(np.tile(channels, 32), dtype=torch.float32, device=device)

# --- what trains

# The groups of parameters, as functions of a module and the name that one of its own parameters
# has in the network, such as "stage2.0.shortcut.1.weight".

def in_conv(module, name):
    """Weights of the convolutions, but for those of the shortcuts."""
    is_conv = isinstance(module, nn.Conv2d) and ".shortcut." not in name
    return is_conv and name.endswith(".weight")

def in_bn(module, name):
    """The normalization's own parameters, whichever it is; with batch, its gamma and beta."""
    if isinstance(module, WeightNormConv2d):
        return name.endswith((".gain", ".bias"))
    return not isinstance(module, (nn.Conv2d, nn.Linear))

def in_gamma(module, name):
    """The scale of a normalization."""
    return in_bn(module, name) and name.endswith((".weight", ".gain"))

def in_beta(module, name):
    """The shift of a normalization."""
    return in_bn(module, name) and name.endswith(".bias")

def in_shortcut(module, name):
    """Weights of the shortcuts' convolutions, without BatchNorm, as the paper's table counts."""
    is_shortcut = isinstance(module, nn.Conv2d) and ".shortcut." in name
    return is_shortcut and name.endswith(".weight")

def in_shortcut_bn(module, name):
    """The normalization of the shortcuts alone, which is also in the group bn."""
    return in_bn(module, name) and ".shortcut." in name

def in_output(module, name):
    """Weight and bias of the linear layer."""
    return isinstance(module, nn.Linear)

GROUPS = {
    "conv": in_conv,
    "bn": in_bn,
    "gamma": in_gamma,
    "beta": in_beta,
    "shortcut": in_shortcut,
    "shortcut-bn": in_shortcut_bn,
    "output": in_output,
}
PARTS_OF_BN = ["bn", "gamma", "beta", "shortcut-bn"]   # these overlap: --train takes one of them
PRESETS = {
    "all": ["conv", "bn", "shortcut", "output"],
    "not-bn": ["conv", "shortcut", "output"],
}

def parameters_of(model, groups):
    """The parameters of a model that belong to any of these groups, in the model's order."""
    parameters = []
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False):
            if any(GROUPS[group](module, name) for group in groups):
                parameters.append(parameter)
    return parameters

def freeze(model, what, seed):
    """Let only those parameters require gradients that `what`, a --train value, names.

    "random" replaces the convolutions by ones of which two weights per channel train; the seed
    chooses them.
    """
    model.requires_grad_(False)
    if what == "random":
        train_two_weights_per_channel(model, seed)
        return
    if what in PRESETS:
        groups = PRESETS[what]
    else:
        groups = what.split("+")
    for parameter in parameters_of(model, groups):
        parameter.requires_grad_(True)

def build(options):
    """The network of a run's options, on the CPU: initial values drawn, frozen but what trains."""
    model = build_model(options["arch"], options["seed"], options["norm"], options["bn_init"],
                        options["weight_init"])
    freeze(model, options["train"], options["seed"])
    return model

def trained_parameters(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]

def frozen_parameters(model):
    return [parameter for parameter in model.parameters() if not parameter.requires_grad]

def count_parameters(model):
    """How many parameters a network has: "all", in each group, and "trained" (that train).

    "all" leaves out the values of TwoWeightsConv2d, which stand for weights that are counted.
    """
    counts = {"all": sum(p.numel() for p in parameters_of(model, PRESETS["all"]))}
    for group in GROUPS:
        counts[group] = sum(p.numel() for p in parameters_of(model, [group]))
    counts["trained"] = sum(p.numel() for p in trained_parameters(model))
    return counts

# --- training

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}

def train_step(model, optimizer, scaler, amp, images, labels):
    """One step of SGD on normalized images (B, 3, 32, 32) and their labels (B,).

    Returns (mean loss, number of correct predictions), tensors without dimensions.
    """
    with torch.autocast(images.device.type, AMP_DTYPES[amp], enabled=amp != "off"):
        logits = model(images)
    if amp != "off":
        logits = logits.float()   # the loss is not for half precision
    loss = F.cross_entropy(logits, labels)
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return loss.detach(), (logits.argmax(1) == labels).sum()

def learning_rate(lr, epoch, epochs):
    """The rate of an epoch counted from 0: divided by 10 after 1/2 and 3/4 of the epochs."""
    if epoch >= epochs * 3 / 4:
        return lr / 100
    if epoch >= epochs / 2:
        return lr / 10
    return lr

@torch.no_grad()
def evaluate(model, images, labels, amp):
    """Accuracy in percent on uint8 images (N, 32, 32, 3), by running statistics.

    Leaves the model in evaluation mode.
    """
    model.eval()
    size = 125   # fits the caches of a CPU
    if images.is_cuda:
        size = max(125, 16_000 // model.conv.out_channels)   # takes as much memory as a step
    correct = 0
    for batch, batch_labels in zip(images.split(size), labels.split(size)):
        with torch.autocast(images.device.type, AMP_DTYPES[amp], enabled=amp != "off"):
            logits = model(normalize(batch))
        correct += (logits.argmax(1) == batch_labels).sum()
    return 100 * correct.item() / len(images)

def train(args):
    """Train to the last epoch, from the beginning or from the last epoch of a checkpoint."""
    model, run, checkpoint = begin_or_continue(args)
    if len(run["epochs"]) == args.epochs:
        report_finished(args.out, run)
        return
    run["sessions"].append(new_session(run, args))
    optimizer, scaler = prepare(model, args)
    rng = torch.Generator("cpu").manual_seed(args.seed)
    if checkpoint is None:
        claim(args.out, checkpoint_bytes(run, model, optimizer, scaler, rng))
    else:
        load_momentum(optimizer, checkpoint)
        scaler.load_state_dict(checkpoint["scaler"])
        rng.set_state(checkpoint["rng"])
    try:
        # Marks the run as this process's, and finds out whether its files can be written.
        save(args.out, run, model, optimizer, scaler, rng)
        train_epochs(model, optimizer, scaler, rng, run, args)
    except BaseException:   # KeyboardInterrupt is no Exception
        give_back_if_empty(args.out, run)
        raise

def train_epochs(model, optimizer, scaler, rng, run, args):
    """The epochs that the run lacks: train, evaluate, save, print."""
    train_split, test_split = load_data(args.dataset, args.data_dir, args.seed)
    train_images, train_labels = (tensor.to(args.device) for tensor in train_split)
    test_images, test_labels = (tensor.to(args.device) for tensor in test_split)
    padded = F.pad(train_images, (0, 0, 4, 4, 4, 4))   # (N, 40, 40, 3)
    n = len(padded)

    step = functools.partial(train_step, model, optimizer, scaler, args.amp)
    if args.device.type == "cuda" and not args.plain:
        size = min(args.batch_size, n)
        last_size = (n - 1) % size + 1   # the last batch is smaller, see OpenLTH
        step = make_fast(step, model, optimizer, scaler, size, last_size)

    log("  epoch  train loss  train acc   test acc      lr  seconds  images/s  time left")
    for epoch in range(len(run["epochs"]), args.epochs):
        start_time = time.perf_counter()
        lr = learning_rate(args.lr, epoch, args.epochs)
        set_learning_rate(optimizer, lr)
        model.train()
        draws = draw_augmentation(n, rng)
        order, offset, flip = (tensor.to(args.device) for tensor in draws)
        losses = []   # tensors, because reading a number makes the host wait for the device
        total_correct = 0
        for begin in range(0, n, args.batch_size):
            batch = slice(begin, begin + args.batch_size)
            images = normalize(augment(padded, order[batch], offset[batch], flip[batch]))
            labels = train_labels[order[batch]]
            if args.plain:
                images = images.contiguous()   # from channels_last to PyTorch's default layout
            loss, correct = step(images, labels)
            losses.append(loss * len(labels))
            total_correct += correct
            if sys.stdout.isatty() and len(losses) % 10 == 1:
                log(f"{epoch + 1:3}/{args.epochs}  image {begin:6,} of {n:,}", end="\r")
        batch_losses = torch.stack(losses).tolist()
        train_loss = sum(batch_losses) / n
        train_seconds = time.perf_counter() - start_time
        if not math.isfinite(train_loss) or not is_finite(model):
            raise UserError(f"training diverged: the loss or a parameter is not finite in epoch "
                            f"{epoch + 1}, which is not saved; try a lower --lr, or --amp off")

        with torch.compiler.set_stance("force_eager"):   # other batch sizes are not worth compiling
            test_accuracy = evaluate(model, test_images, test_labels, args.amp)
        run["epochs"].append({
            "epoch": epoch + 1,
            "train_loss": train_loss,
            "train_accuracy": 100 * total_correct.item() / n,
            "test_accuracy": test_accuracy,
            "lr": lr,
            "seconds": round(time.perf_counter() - start_time, 3),
            "images_per_second": round(n / train_seconds, 1),
        })
        require_own(args.out, run)
        save(args.out, run, model, optimizer, scaler, rng)   # before printing, which can fail
        log_epoch(run["epochs"], args.epochs)

def log_epoch(done, epochs):
    """Print the last of the epochs that are done, and how long the others will take."""
    seconds = np.mean([epoch["seconds"] for epoch in done[-10:]])
    time_left = datetime.timedelta(seconds=round((epochs - len(done)) * seconds))
    last = done[-1]
    log(f"{last['epoch']:3}/{epochs:<3} {last['train_loss']:11.4f} "
        f"{last['train_accuracy']:8.2f} % {last['test_accuracy']:8.2f} % {last['lr']:7.4g} "
        f"{last['seconds']:8.1f} {last['images_per_second']:9,.0f} {time_left!s:>10}")

def prepare(model, args):
    """Move the network to its device, in training mode, and return (optimizer, scaler).

    Without --plain, the network is laid out for speed and the optimizer is a fused one.
    """
    set_full_fp32()
    model.train().to(args.device)
    if not args.plain:
        lay_out(model, args.amp)
    lr = args.lr
    if args.device.type == "cuda" and not args.plain:
        # A CUDA graph reads the learning rate from memory.
        lr = torch.tensor(lr, dtype=torch.float32, device=args.device)
    trained = trained_parameters(model)
    fused = None if args.plain else True
    optimizer = torch.optim.SGD(trained, lr, momentum=0.9, weight_decay=args.weight_decay,
                                fused=fused)
    # SGD would make these in its first step, but a checkpoint and a CUDA graph need them before it.
    for p in trained:
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    scaler = torch.amp.GradScaler(args.device.type, enabled=args.amp == "fp16")
    return optimizer, scaler

def set_learning_rate(optimizer, lr):
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):   # from which a CUDA graph reads it
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr

# --- the control: two random weights per output channel

def train_two_weights_per_channel(model, seed):
    """Replace each convolution by one of which two weights per output channel train."""
    rng = np.random.RandomState([seed, 2])   # a stream of its own
    for name, module in list(model.named_modules()):
        if isinstance(module, WeightNormConv2d):
            raise UserError("--train random does not go with --norm weight", 2)
        if isinstance(module, nn.Conv2d):
            model.set_submodule(name, TwoWeightsConv2d(module, rng))

class TwoWeightsConv2d(nn.Conv2d):
    """A convolution of which two random weights per output channel train: as many as BatchNorm has.

    They are the parameter `values` (2 c_out,). The optimizer sees nothing else, so that momentum
    and weight decay move nothing else.
    """

    def __init__(self, conv, rng):
        # On the meta device, because its own weight is replaced at once.
        super().__init__(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride,
                         conv.padding, bias=False, device="meta")
        self.weight = conv.weight
        c_out = conv.out_channels
        fan_in = conv.weight[0].numel()
        first = rng.randint(0, fan_in, c_out)
        second = rng.randint(0, fan_in - 1, c_out)
        second = np.where(second < first, second, second + 1)   # uniform over the other fan_in - 1
        places = np.stack([first, second], axis=1) + fan_in * np.arange(c_out)[:, None]
        chosen = torch.from_numpy(places.flatten()).to(conv.weight.device, torch.int64)
        self.register_buffer("chosen", chosen, persistent=False)   # places in the flattened weight
        self.values = nn.Parameter(conv.weight.detach().flatten()[chosen])

    def whole_weight(self):
        """The weight with its trained values in place, (c_out, c_in, k, k)."""
        values = self.values.to(self.weight.dtype)
        return self.weight.flatten().scatter(0, self.chosen, values).view_as(self.weight)

    def forward(self, x):
        return F.conv2d(x, self.whole_weight(), None, self.stride, self.padding)

# --- precision

def set_full_fp32():
    """Let fp32 mean fp32 on NVIDIA's GPUs, not TF32."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False   # the older switch of the next line: both must agree
    torch.backends.cudnn.conv.fp32_precision = "ieee"

def default_amp(device):
    """bf16 on GPUs that have it, fp16 on older ones, off elsewhere."""
    if device.type != "cuda":
        return "off"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16"
    return "fp16"

def cpu_computes_in(amp):
    """Whether this CPU has instructions for "bf16" or "fp16", without which they are slow."""
    names = {
        "bf16": ["avx512_bf16", "amx_bf16", "bf16"],   # the last one is ARM's
        "fp16": ["avx512_fp16", "amx_fp16"],
    }
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in names[amp])

def evaluation_amp(amp, device):
    """The precision in which to evaluate a network trained with `amp`: fp32 if the CPU lacks it.

    The accuracies of 16 networks in bf16 and fp32 differed by at most 0.3 points.
    """
    if amp != "off" and device.type == "cpu" and not cpu_computes_in(amp):
        log(f"evaluated in fp32, because this CPU has no {amp} instructions: up to 0.3 points off")
        return "off"
    return amp

# --- fast path

@torch.no_grad()
def lay_out(model, amp):
    """Give a network the layout and precision of weights with which its steps are fastest."""
    model.to(memory_format=torch.channels_last)   # that of convolution kernels
    if amp == "off":
        return
    for module in model.modules():
        # Autocast would do it in every step. Weight normalization needs its weights in fp32.
        if isinstance(module, (nn.Conv2d, nn.Linear)) and not isinstance(module, WeightNormConv2d):
            if not module.weight.requires_grad:
                module.weight.data = module.weight.data.to(AMP_DTYPES[amp])

def make_fast(step, model, optimizer, scaler, size, last_size):
    """The same step for batches of these sizes, as CUDA graphs of compiled blocks.

    Leaves all values as they were. What fails is reported and left out: first compilation, then
    graphs, too.
    """
    for module in model.modules():
        if isinstance(module, Block):
            module.compile(dynamic=False)   # at most five kinds, whatever the depth
    before = take_snapshot(model, optimizer, scaler)
    fast_step = try_to_capture(step, size, last_size, "compiled blocks")
    if fast_step is None:
        torch.compiler.set_stance("force_eager")   # the blocks as they stand
        fast_step = try_to_capture(step, size, last_size, "CUDA graphs")
    restore_snapshot(before, model, optimizer, scaler)
    return fast_step or step

def try_to_capture(step, size, last_size, part):
    """The step as CUDA graphs. If there can be none, print that `part` fails, and return None."""
    try:
        return capture_all(step, size, last_size)
    except Exception as error:   # whatever compilers and drivers raise
        if is_out_of_memory(error):
            raise
        log(f"{part} fail here, continuing without them ({one_line(error)})")
        return None

def capture_all(step, size, last_size):
    """The step as one CUDA graph for each batch size, in one pool of memory."""
    stream = torch.cuda.Stream()
    pool = torch.cuda.graph_pool_handle()
    # Both warm-ups come before both captures, because a capture can't use the memory of a warm-up.
    warm_up(step, size, stream)
    if last_size != size:
        with torch.compiler.set_stance("force_eager"):   # one batch is not worth compiling for
            warm_up(step, last_size, stream)
    replays = {size: capture(step, size, stream, pool)}
    if last_size != size:
        with torch.compiler.set_stance("force_eager"):
            replays[last_size] = capture(step, last_size, stream, pool)

    def replay_for_size(images, labels):
        return replays[len(images)](images, labels)
    return replay_for_size

def blank_batch(size):
    """Images (size, 3, 32, 32) and labels (size,) on the current GPU, all zero."""
    images = torch.zeros(size, 3, 32, 32, dtype=torch.float32, device="cuda")
    labels = torch.zeros(size, dtype=torch.int64, device="cuda")
    return images.to(memory_format=torch.channels_last), labels

def warm_up(step, size, stream):
    """Three steps, which compile, and allocate what can't be allocated during a capture."""
    images, labels = blank_batch(size)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(images, labels)
    torch.cuda.current_stream().wait_stream(stream)

def capture(step, size, stream, pool):
    """The step for batches of `size` images as a CUDA graph: one launch replaces thousands."""
    static_images, static_labels = blank_batch(size)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool, stream):
        static_loss, static_correct = step(static_images, static_labels)

    def replay(images, labels):
        static_images.copy_(images)
        static_labels.copy_(labels)
        graph.replay()
        return static_loss.clone(), static_correct.clone()   # the next replay overwrites them
    return replay

def tensors_in_training(model, optimizer):
    """All that a step changes in place: trained parameters, running statistics, momentum."""
    momentum = [optimizer.state[p]["momentum_buffer"] for p in trained_parameters(model)]
    return [*trained_parameters(model), *model.buffers(), *momentum]

def take_snapshot(model, optimizer, scaler):
    tensors = [tensor.detach().clone() for tensor in tensors_in_training(model, optimizer)]
    return tensors, scaler.state_dict()

@torch.no_grad()
def restore_snapshot(snapshot, model, optimizer, scaler):
    """In place, because a CUDA graph holds the addresses."""
    tensors, scaler_state = snapshot
    for tensor, before in zip(tensors_in_training(model, optimizer), tensors):
        tensor.copy_(before)
    scaler.load_state_dict(scaler_state)

# --- checkpoints and records

FORMAT = 3
EPOCH_ENTRIES = ["epoch", "train_loss", "train_accuracy", "test_accuracy", "lr", "seconds",
                 "images_per_second"]
SESSION_ENTRIES = ["id", "first_epoch", "plain", "commit", "torch", "hardware"]

def changing_state(model):
    """The part of the network's state_dict that its seed doesn't give."""
    state = model.state_dict()   # kept, because it also tells load_state_dict the modules' versions
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            del state[name]
    return state

def is_finite(model):
    return all(tensor.isfinite().all() for tensor in changing_state(model).values())

def on_cpu(value):
    """Nested dicts and lists with all tensors moved to the CPU."""
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {name: on_cpu(part) for name, part in value.items()}
    if isinstance(value, list):
        return [on_cpu(part) for part in value]
    return value

def save(path, run, model, optimizer, scaler, rng):
    """Write the record, then the checkpoint, from which --resume continues.

    In this order, because a checkpoint of the last epoch is not trained again: if the process were
    killed in between, the record would lack that epoch for good.
    """
    write_record(path, make_record(run))
    write(path, checkpoint_bytes(run, model, optimizer, scaler, rng))

def checkpoint_bytes(run, model, optimizer, scaler, rng):
    """What a checkpoint holds, as the bytes of the file."""
    state = changing_state(model)
    for name, tensor in state.items():   # in place, so that it stays a state_dict
        state[name] = tensor.cpu()
    buffer = io.BytesIO()
    torch.save({
        "format": FORMAT,
        "options": run["options"],
        "sessions": run["sessions"],
        "epochs": run["epochs"],
        "fingerprint": run["fingerprint"],
        "model": state,
        "optimizer": on_cpu(optimizer.state_dict()),
        "scaler": scaler.state_dict(),
        "rng": rng.get_state(),
    }, buffer)
    return buffer.getvalue()

def make_record(run):
    """The record of a run: a dict of options, counts of parameters, sessions and epochs.

    A run has a session for each start, on whatever machine. The headline is the test accuracy of
    the last epoch, never the best.
    """
    epochs = run["epochs"]
    return {
        "options": run["options"],
        "parameters": run["parameters"],
        "test_accuracy": epochs[-1]["test_accuracy"] if epochs else None,
        "seconds": round(sum(epoch["seconds"] for epoch in epochs), 1),
        "sessions": run["sessions"],
        "epochs": epochs,
    }

def record_path(checkpoint_path):
    """Where the record of a checkpoint is: x.json beside x.pt, or beside that to which it links."""
    return pathlib.Path(checkpoint_path).resolve().with_suffix(".json")

def write_record(checkpoint_path, record):
    """Write the record of a checkpoint as JSON, with a line for each entry and each epoch."""
    entries = []
    for name, value in record.items():
        text = json.dumps(value)
        if name == "epochs":
            text = "[\n " + ",\n ".join(json.dumps(epoch) for epoch in value) + "\n]"
        entries.append(f"{json.dumps(name)}: {text}")
    content = "{" + ",\n".join(entries) + "}\n"
    write(record_path(checkpoint_path), content.encode())

def read_record(path):
    """The record of a finished run, see make_record.

    Raises ValueError if the file is none, an OSError if it can't be opened. The tables that
    prune.py and analyze.py have added are taken as they are.
    """
    try:
        record = json.loads(path.read_bytes())
        for name in ("parameters", "seconds", "sessions"):
            require(name in record, f"it has no {name}")
        for session in record["sessions"]:
            require(set(SESSION_ENTRIES) <= set(session), "a session of it is incomplete")
        record["options"] = check_options(record["options"])
        check_epochs(record["epochs"], record["options"])
        done, epochs = len(record["epochs"]), record["options"]["epochs"]
        require(done == epochs, f"{done} of {epochs} epochs are done")
        require(record["test_accuracy"] == record["epochs"][-1]["test_accuracy"],
                "its accuracy is not the last epoch's")
    except OSError:
        raise
    except Exception as error:   # whatever a file leads to
        raise ValueError(f"not the record of a finished run ({one_line(error)})") from None
    return record

def write(path, content):
    """Write bytes so that `path` holds the old content or the new, even after a power cut."""
    temporary = path.with_name(f"{path.stem[:50]}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path} can't be written ({error.strerror})") from error
    finally:
        temporary.unlink(missing_ok=True)

def load_checkpoint(path):
    """Read a checkpoint from anyone without running code in it.

    Returns the network, in evaluation mode on the CPU, and the content of the file, a dict, see
    `checkpoint_bytes`. Raises UserError if the file is invalid, an OSError if it can't be opened.
    """
    open(path, "rb").close()   # raises an OSError if that is impossible
    try:
        with zipfile.ZipFile(path) as archive:   # torch.load does not look at the checksums
            require(archive.testzip() is None, "its checksums do not match")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        require(checkpoint.get("format") == FORMAT,
                f"this code reads format {FORMAT}: use the release that wrote it")
        options = check_options(checkpoint["options"])
        checkpoint["options"] = options
        check_epochs(checkpoint["epochs"], options)
        check_tensors(checkpoint)
        require(isinstance(checkpoint["sessions"], list), "its sessions are no list")
        model = build(options)
        drawn = fingerprint(frozen_parameters(model))
        tolerance = 1e-9 * drawn[0]   # machines round differently, see `orthogonal`
        require(np.allclose(drawn, checkpoint["fingerprint"], rtol=0, atol=tolerance),
                "its seed draws other weights now")
        model.load_state_dict(checkpoint["model"], strict=False)   # the seed gave the others
    except Exception as error:   # whatever a damaged file makes the readers raise
        if is_out_of_memory(error):
            raise
        reason = one_line(error).split(". ")[0]   # PyTorch's goes on with advice
        raise UserError(f"{path} is not a valid checkpoint of train.py ({reason})") from None
    return model.eval(), checkpoint

def check_tensors(checkpoint):
    """Compare the tensors of a checkpoint with the network that it names.

    Before memory is taken for that network, because a short file can name a large one. Raises
    ValueError, or whatever PyTorch raises.
    """
    options = checkpoint["options"]
    model = empty_model(options["arch"], options["norm"])
    freeze(model, options["train"], options["seed"])
    expected = {name: t.shape for name, t in changing_state(model).items()}
    stored = {name: tensor.shape for name, tensor in checkpoint["model"].items()}
    require(stored == expected, f"its tensors are not those of {options['arch']}, "
                                f"--train {options['train']}")
    for name, tensor in checkpoint["model"].items():
        require(tensor.isfinite().all(), f"{name} is not finite")
    states = checkpoint["optimizer"]["state"].values()
    momentum = [state["momentum_buffer"].shape for state in states]
    trained = [parameter.shape for parameter in trained_parameters(model)]
    require(momentum == trained, "its momentum is of another network")
    torch.Generator("cpu").set_state(checkpoint["rng"])
    scaler = torch.amp.GradScaler("cpu", enabled=options["amp"] == "fp16")
    scaler.load_state_dict(checkpoint["scaler"])

@torch.no_grad()
def load_momentum(optimizer, checkpoint):
    """Put back the momentum, in place, because its layout is that of this start."""
    stored = checkpoint["optimizer"]["state"].values()
    for state, stored_state in zip(optimizer.state.values(), stored):
        state["momentum_buffer"].copy_(stored_state["momentum_buffer"])

def check_options(stored):
    """A file's options, checked as the command line is. One that it lacks has its default.

    Raises ValueError if one is invalid or unknown, or if "train" or "amp" is missing: every
    checkpoint holds these, and a guess would give the run another name.
    """
    require(set(stored) <= set(OPTIONS), f"unknown options {set(stored) - set(OPTIONS)}")
    require("train" in stored and stored.get("amp", "auto") != "auto", "it lacks train or amp")
    options = {}
    for name, parse in OPTIONS.items():
        value = stored.get(name, RECIPE[name])
        # What train.py stores is what it reads from the same text, so "3" or 3.0 is not 3.
        require(repr(parse(str(value))) == repr(value), f"its {name} is {value!r}")
        options[name] = value
    return options

def check_epochs(epochs, options):
    for epoch in epochs:
        for name in EPOCH_ENTRIES:
            require(isinstance(epoch[name], (int, float)), f"an epoch's {name} is no number")
    numbers = [epoch["epoch"] for epoch in epochs]
    require(numbers == list(range(1, len(epochs) + 1)), "epochs are missing")
    require(len(epochs) <= options["epochs"], "it has too many epochs")

# --- begin or continue

def begin_or_continue(args):
    """Begin a run, or continue that of args.out. Returns (model, run, checkpoint or None).

    run: a dict of "options", "parameters" (counts), "fingerprint" (of the frozen weights),
    "sessions" and "epochs", which grow. Makes the folder of args.out, and sets args.amp if it is
    "auto".
    """
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.resume and args.out.exists():
        model, run, checkpoint = continue_run(args)
    else:
        model, run = begin_run(args)
        checkpoint = None
    run["parameters"] = count_parameters(model)
    trained, total = run["parameters"]["trained"], run["parameters"]["all"]
    log(f"{args.arch} on {args.device}: {trained:,} of {total:,} parameters train, "
        f"epochs done: {len(run['epochs'])} of {args.epochs}")
    if args.amp != "off" and args.device.type == "cpu" and not cpu_computes_in(args.amp):
        log(f"this CPU has no {args.amp} instructions: --amp off would be many times faster")
    return model, run, checkpoint

def begin_run(args):
    if args.amp == "auto":
        args.amp = default_amp(args.device)
    options = {name: getattr(args, name) for name in OPTIONS}
    model = build(options)
    drawn = fingerprint(frozen_parameters(model))
    run = {"options": options, "fingerprint": drawn, "sessions": [], "epochs": []}
    return model, run

def continue_run(args):
    model, checkpoint = load_checkpoint(args.out)
    if args.amp == "auto":
        args.amp = checkpoint["options"]["amp"]
    compare_options(args, checkpoint["options"])
    names = ["options", "fingerprint", "sessions", "epochs"]
    run = {name: checkpoint[name] for name in names}
    return model, run, checkpoint

def compare_options(args, stored):
    """Raise UserError if the command line asks for another run than the stored one."""
    for name, value in stored.items():
        asked = getattr(args, name)
        if asked != value:
            raise UserError(f"{args.out} is a run with {name} {value}, not {asked}", 2)

def new_session(run, args):
    """What the record tells about this start of a run."""
    return {
        "id": secrets.token_hex(8),
        "first_epoch": len(run["epochs"]) + 1,
        "plain": args.plain,
        **machine(args.device),
    }

def report_finished(path, run):
    """Say that there is nothing left to train; write the record if it is missing."""
    log(f"{path} is finished: {run['epochs'][-1]['test_accuracy']:.2f} % test accuracy")
    if not record_path(path).exists():
        write_record(path, make_record(run))

# --- one name, one run

# A process claims the name of a new run by creating the checkpoint. It marks the record with the id
# of its session. Before it writes again, it looks whether another process has marked it since,
# by --resume, and leaves the run to that one.

def claim(path, content):
    """Create the checkpoint of a new run. Raises UserError if the name is taken.

    content: the state before the first epoch, from which --resume continues if this process is
    killed before it has written anything else.
    """
    advice = "choose another --out, or delete it"
    record = record_path(path)
    if os.path.exists(record) and not path.exists():   # Path.exists() fails on a name too long
        raise UserError(f"{record} exists without its checkpoint: {advice}", 2)
    try:
        create(path, content)
    except FileExistsError:
        raise UserError(f"{path} exists: continue it by --resume, {advice}", 2) from None
    except OSError as error:
        raise UserError(f"{path} can't be written ({error.strerror})") from error

def create(path, content):
    """Write a new file, whole or not at all. Raises FileExistsError, or another OSError."""
    file = open(path, "xb")
    try:
        with file:
            file.write(content)
    except BaseException:   # a full disk, an interrupt
        path.unlink()
        raise

def last_writer(path):
    """The id of the last session in the record of a checkpoint, None if there is none."""
    try:
        return json.loads(record_path(path).read_bytes())["sessions"][-1]["id"]
    except Exception:   # a file of this name that is no record belongs to nobody
        return None

def require_own(path, run):
    """Raise UserError if another process has gone on: two would overwrite each other."""
    if last_writer(path) not in (None, run["sessions"][-1]["id"]):
        raise UserError(f"{path} was continued by another process, to which this one leaves it")

def give_back_if_empty(path, run):
    """Remove the files of a run without an epoch, unless another process has gone on with it."""
    writer = last_writer(path)
    own = run["sessions"][-1]["id"]
    if run["epochs"] or writer not in (None, own):
        return
    path.unlink(missing_ok=True)
    if writer == own:
        record_path(path).unlink(missing_ok=True)

# --- files of data

def load_cifar10(data_dir):
    """torchvision's CIFAR10 (train, test).

    data_dir: the folder of the batches, or the one in which cifar-10-batches-py is or is put.
    Raises UserError if they are not there and can't be downloaded.
    """
    if (data_dir / "data_batch_1").exists():
        folder = data_dir
    else:
        folder = data_dir / "cifar-10-batches-py"
    try:
        return read_batches(folder)
    except RuntimeError:   # a file is missing or damaged
        fetch_batches(data_dir, folder)
        return read_batches(folder)

def read_batches(folder):
    class CIFAR10Folder(import_cifar10()):
        base_folder = ""   # the batches lie in the folder itself, whatever its name
    return CIFAR10Folder(folder, train=True), CIFAR10Folder(folder, train=False)

def fetch_batches(data_dir, folder):
    """Download CIFAR-10, unless its archive is in data_dir, and put the batches into the folder.

    Everything is made in a private folder first and moved file by file, so that any number of
    processes may do it at once.
    """
    dataset = import_cifar10()
    from torchvision.datasets.utils import check_integrity, download_and_extract_archive
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(60)   # a host that never answers would take forever
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as private:
            source = private
            if check_integrity(data_dir / dataset.filename, dataset.tgz_md5):
                source = data_dir
            else:
                log(f"downloading CIFAR-10 (170 MB) from {dataset.url}")
            download_and_extract_archive(dataset.url, source, private, dataset.filename,
                                         dataset.tgz_md5)
            for file in pathlib.Path(private, dataset.base_folder).iterdir():
                os.replace(file, folder / file.name)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise UserError(
            f"no intact CIFAR-10 in {data_dir}, and it can't be put there ({one_line(error)}): "
            f"fetch {dataset.url} by other means, unpack it (tar -xzf), and give its folder as "
            "--data-dir") from error
    finally:
        socket.setdefaulttimeout(timeout)

def import_cifar10():
    try:
        from torchvision.datasets import CIFAR10
    except RuntimeError:
        # A CUDA build beside a CPU build of torch lacks its operators; none is needed here.
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", "() -> ()")
        from torchvision.datasets import CIFAR10
    return CIFAR10

def synthetic_data(seed):
    """To try the code: ten smooth random patterns, shifted with wrap-around and noisy.

    10,000 training and 2,000 test images in the format of load_data.
    """
    rng = np.random.RandomState([seed, 1])
    coarse = torch.from_numpy(rng.standard_normal((10, 3, 4, 4)))
    smooth = F.interpolate(coarse, size=32, mode="bicubic")            # (10, 3, 32, 32)
    patterns = 96 + 40 * smooth.permute(0, 2, 3, 1).float().numpy()    # (10, 32, 32, 3)

    def draw(n):
        labels = rng.randint(0, 10, n)
        shift = rng.randint(-4, 5, (2, n, 1))
        rows, columns = (shift + np.arange(32)) % 32                   # both (n, 32)
        images = patterns[labels[:, None, None], rows[:, :, None], columns[:, None, :]]
        images += rng.randint(0, 64, images.shape, dtype=np.uint8)
        return torch.from_numpy(images.clip(0, 255).astype(np.uint8)), to_labels(labels)

    return [draw(10_000), draw(2_000)]

# --- benchmark

def benchmark(args):
    """Time args.benchmark steps on noise, after five more, and estimate how long a run takes.

    Without augmentation and evaluation, which take a few percent.
    """
    if args.amp == "auto":
        args.amp = default_amp(args.device)
    size = args.batch_size
    model = build({name: getattr(args, name) for name in OPTIONS})
    optimizer, scaler = prepare(model, args)
    step = functools.partial(train_step, model, optimizer, scaler, args.amp)
    if args.device.type == "cuda" and not args.plain:
        step = make_fast(step, model, optimizer, scaler, size, size)
    images = torch.randint(0, 256, (size, 32, 32, 3), dtype=torch.uint8, device=args.device)
    labels = torch.randint(0, 10, (size,), dtype=torch.int64, device=args.device)
    seconds = []
    for _ in range(5 + args.benchmark):
        start_time = time.perf_counter()
        batch = normalize(images)
        if args.plain:
            batch = batch.contiguous()
        loss, _ = step(batch, labels)
        loss.item()   # waits for the device
        seconds.append(time.perf_counter() - start_time)
    low, median, high = np.percentile(seconds[5:], [10, 50, 90])
    hours = args.epochs * math.ceil(50_000 / size) * median / 3600
    text = (f"{1e3 * median:.2f} ms/step (10 % to 90 %: {1e3 * low:.2f} to {1e3 * high:.2f}), "
            f"{size / median:,.0f} images/s, {hours:.2f} hours for {args.epochs} epochs "
            "of CIFAR-10")
    if args.device.type == "cuda":
        text += f", {torch.cuda.max_memory_reserved() / 1e9:.2f} GB of GPU memory"
    log(text)

# --- output

def log(text, end="\n"):
    """Print and flush. If the output is closed or full, go on: a training is worth more than it."""
    try:
        print(text, end=end, flush=True)
    except OSError as error:
        discard(sys.stdout)
        if not isinstance(error, BrokenPipeError):   # not as in `train.py | head`
            log_error(f"output is lost from here on: {error}")

def log_error(text):
    """Print to stderr, if that can be written."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        discard(sys.stderr)

def discard(stream):
    """Send to nowhere whatever else is printed to a stream that can't be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

def one_line(error):
    """The first line of a message in printable characters: it may quote an untrusted file."""
    text = str(error).strip() or type(error).__name__
    line = text.splitlines()[0][:1000]
    return "".join(c if c.isprintable() else "?" for c in line)

# --- where a run was made

def machine(device):
    """What a run records of the code and the machine."""
    hardware = f"{cpu_name()}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    return {"commit": commit(), "torch": str(torch.__version__), "hardware": hardware}

def cpu_name():
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model_name = re.search("model name\t: (.*)", cpuinfo.read_text())
        if model_name:   # ARM's has none
            return model_name[1]
    return platform.processor() or platform.machine()

def commit():
    """The commit of this file, None if git does not track it, or "unknown" if git does not tell."""
    here = pathlib.Path(__file__).parent
    english = {**os.environ, "LC_ALL": "C"}

    def git(*words):
        return subprocess.run(["git", *words], cwd=here, env=english, capture_output=True,
                              text=True, errors="replace")

    try:
        tracked = git("ls-files", "--error-unmatch", "train.py")
    except OSError:   # git is not installed
        return "unknown"
    if tracked.returncode == 0:
        # The hash alone, without a tag, and "-dirty" if a tracked file has changed.
        described = git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
        return described.stdout.strip() or "unknown"
    if tracked.returncode == 1 or "not a git repository" in tracked.stderr:
        return None
    return "unknown"   # such as for files of another owner

# --- command line

def number(kind, low, high):
    """A function that reads an int or a float in low .. high from a text."""
    def parse(text):
        value = kind(text)
        require(low <= value <= high, f"not in {low} to {high}")
        return value
    return parse

def one_of(names):
    """A function that reads one of these names."""
    def parse(text):
        require(text in names, f"not one of {', '.join(names)}")
        return text
    return parse

def parse_train(text):
    """The one spelling of a --train value: "random", a preset, or groups in order, joined by +.

    Raises ValueError for any other value.
    """
    if text == "random" or text in PRESETS:
        return text
    names = text.split("+")
    known = set(names) <= set(GROUPS)
    once = len(set(names)) == len(names)
    require(known and once, f"not {', '.join(PRESETS)}, random, or some of {', '.join(GROUPS)} "
                            f"joined by +, each once")
    require(len(set(names) & set(PARTS_OF_BN)) <= 1, f"only one of {', '.join(PARTS_OF_BN)}")
    ordered = [group for group in GROUPS if group in names]
    for preset, groups in PRESETS.items():
        if ordered == groups:
            return preset
    return "+".join(ordered)

def parse_arch_name(text):
    parse_arch(text)
    return text

# The options that make a run what it is, as in the paper's recipe. Checkpoint and record hold them,
# and --resume can't change them.
RECIPE = {
    "arch": "resnet14",
    "train": "all",
    "norm": "batch",
    "bn_init": "uniform",
    "weight_init": "kaiming_normal",
    "dataset": "cifar10",
    "seed": 0,
    "epochs": 160,
    "batch_size": 128,
    "lr": 0.1,
    "weight_decay": 1e-4,
    "amp": "auto",
}

# Those that make a run a variant of its own, with a file name and a row in the tables.
VARIANT_OPTIONS = ["norm", "bn_init", "weight_init", "lr"]

# The functions that read the options from text.
OPTIONS = {
    "arch": parse_arch_name,
    "train": parse_train,
    "norm": one_of(NORMS),
    "bn_init": one_of(BN_INITS),
    "weight_init": one_of(WEIGHT_INITS),
    "dataset": one_of(["cifar10", "synthetic"]),
    "seed": number(int, 0, 2 ** 32 - 1),
    "epochs": number(int, 1, 1_000_000),
    "batch_size": number(int, 1, 50_000),
    "lr": number(float, 1e-30, 1e30),
    "weight_decay": number(float, 0, 1e30),
    "amp": one_of(["auto", *AMP_DTYPES]),
}

def argument(parse):
    """The same function as an argparse type, with an error that tells what is wrong."""
    def parse_argument(text):
        try:
            return parse(text)
        except Exception as error:   # PyTorch's devices raise errors of many types
            raise argparse.ArgumentTypeError(f"{text}: {one_line(error)}") from None
    return parse_argument

def parse_device(text):
    """The torch device of a --device value."""
    if text == "auto":
        text = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(text)
    if text == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    torch.zeros(1, device=device).item()   # raises an exception if this machine does not have it
    return device

def add_device_arguments(parser):
    """Give a parser the options that say where the data are and where to compute."""
    parser.add_argument("--data-dir", type=os.path.expanduser, default="data", metavar="DIR",
                        help="where CIFAR-10 is, or is downloaded to")
    parser.add_argument("--device", type=argument(parse_device), default="auto",
                        help="auto, cuda, cuda:1, mps, or cpu")

def make_parser():
    """The command line of train.py. Its defaults are the paper's recipe."""
    parser = argparse.ArgumentParser(
        description="Train a CIFAR-10 ResNet, or only its BatchNorm (arXiv 2003.00152).")

    def add(name, metavar, help):
        parser.add_argument("--" + name.replace("_", "-"), type=argument(OPTIONS[name]),
                            default=RECIPE[name], metavar=metavar,
                            help=f"{help} (default: {RECIPE[name]})")

    add("arch", "NAME", "resnet<depth> or wrn<depth>-<width>, depth = 6n + 2")
    # Without defaults here, because argparse does not notice both if the first has its default.
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--train", type=argument(parse_train), metavar="GROUPS",
                       help=f"what trains: {', '.join(PRESETS)}, random, or some of "
                            f"{', '.join(GROUPS)} joined by + (default: all)")
    group.add_argument("--bn-only", dest="train", action="store_const", const="bn",
                       help="short for --train bn")
    add("norm", "NAME", f"{', '.join(NORMS)}; its parameters are the group bn")
    add("bn_init", "NAME", "gamma, beta: uniform (U(0,1), 0), fixed (1, 0), "
        "oneone (1, 1), or positivenegative (U(-1,1), 0)")
    add("weight_init", "NAME", f"all other weights: {', '.join(WEIGHT_INITS)}")
    add("dataset", "NAME", "cifar10, or synthetic (no download)")
    add("seed", "N", "of initial values, data order, augmentation")
    add("epochs", "N", "the learning rate drops at 1/2 and 3/4 of them")
    add("batch_size", "N", "images per step")
    add("lr", "X", "initial learning rate of SGD with momentum 0.9")
    add("weight_decay", "X", "L2 penalty on whatever trains")
    add("amp", "NAME", "bf16, fp16, off, or auto: bf16 on CUDA (fp16 if the GPU is older), "
        "off elsewhere")
    parser.add_argument("--plain", action="store_true",
                        help="train without channels_last, fused optimizer, compilation, "
                             "CUDA graphs")
    parser.add_argument("--benchmark", type=argument(number(int, 1, 1_000_000)), nargs="?",
                        const=50, metavar="N", help="time N (50) steps instead of training")
    parser.add_argument("--out", type=os.path.expanduser, metavar="x.pt",
                        help="checkpoint; by default runs/<arch>-<train>-s<seed>.pt")
    parser.add_argument("--resume", action="store_true",
                        help="continue from the checkpoint, if it exists")
    add_device_arguments(parser)
    return parser

def parse_command_line():
    """The arguments of train.py, with --train, --out and --plain as they take effect."""
    parser = make_parser()
    args = parser.parse_args()
    if args.train is None:
        args.train = RECIPE["train"]
    if args.device.type == "mps":
        # channels_last gives wrong gradients there (pytorch#175189); evaluation needs none.
        args.plain = True
    if args.out is None:
        args.out = default_out(args)
    if not args.out.endswith(".pt"):
        parser.error(f"argument --out: {args.out}: a checkpoint's name ends in .pt")
    args.out = pathlib.Path(args.out)
    if os.path.islink(args.out):   # is_symlink() raises an exception if the name is too long
        args.out = args.out.resolve()   # a link stays a link
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("torchrun is not for this: a process trains one network, see README.md", 2)
    return args

def default_out(args):
    """runs/<arch>-<train>-s<seed>.pt; before the seed stand norm, initial values and learning rate
    if they are not the recipe's."""
    words = [args.arch, args.train]
    for name, value in differences(vars(args)).items():
        words.append(f"lr{value}" if name == "lr" else value)
    words.append(f"s{args.seed}")
    return f"runs/{'-'.join(words)}.pt"

def differences(options):
    """Those of VARIANT_OPTIONS that are not the recipe's."""
    differing = {}
    for name in VARIANT_OPTIONS:
        if options[name] != RECIPE[name]:
            differing[name] = options[name]
    return differing

# --- errors

def is_out_of_memory(error):
    """Whether an exception says that memory did not suffice."""
    words = [
        "out of memory",           # CUDA
        "can't allocate memory",   # the CPU, on Linux and macOS
        "not enough memory",       # the CPU, on Windows
        "ALLOC_FAILED",            # cuBLAS and cuDNN
    ]
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)

def run_cli(main, on_interrupt="stopped"):
    """Call main(), with errors that users meet as one line on stderr and an exit status."""
    make_output_safe()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        require_torch()
        main()
    except UserError as error:
        stop(str(error), error.status)
    except KeyboardInterrupt:
        stop(on_interrupt)
    except OSError as error:
        stop(one_line(error))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise   # a fault of the program: with a traceback
        stop(f"{one_line(error)}; try a smaller batch or network")

def stop(text, status=1):
    """End with one line on stderr."""
    log_error(f"{os.path.basename(sys.argv[0])}: error: {one_line(text)}")
    sys.exit(status)

def require_torch():
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < (2, 11):
        raise UserError(f"torch {torch.__version__} is too old: pip install -r requirements.txt", 2)

def make_output_safe():
    """stdout and stderr may be closed, or unable to show a character; a notebook's are its own."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")

# --- main

def main():
    args = parse_command_line()
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)
    if args.benchmark:
        benchmark(args)
        return
    train(args)
    print_next_commands(args)

def print_next_commands(args):
    """How to go on with the checkpoint, quoted for the shell of the system."""
    join = subprocess.list2cmdline if os.name == "nt" else shlex.join
    data_dir = [] if args.data_dir == "data" else ["--data-dir", args.data_dir]
    here = pathlib.Path(__file__).parent
    log("next: " + join([sys.executable, str(here / "prune.py"), str(args.out), *data_dir]))
    log("next: " + join([sys.executable, str(here / "analyze.py"), str(args.out)]))

if __name__ == "__main__":
    run_cli(main, "stopped; the same command with --resume continues after the last whole epoch")
