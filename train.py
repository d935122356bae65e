"""Train a CIFAR-10 ResNet, or only its BatchNorm, with the recipe of arXiv 2003.00152.

    python train.py --arch resnet866 --bn-only --amp off     # the paper's headline, in fp32
    python train.py --arch resnet8 --bn-only --dataset synthetic --epochs 2     # a demo

Every epoch writes the checkpoint (--out x.pt), from which --resume continues, and the record of the
run (x.json), to which prune.py and analyze.py add their tables. The method is the first part of
this file, up to "precision and fast path"; then come files and the command line.
"""
import argparse
import copy
import functools
import io
import json
import math
import os
import pathlib
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from models import (
    BN_INITS,
    NORMS,
    WEIGHT_INITS,
    Block,
    WeightNormConv2d,
    build_model,
    gamma_and_beta,
    parse_arch,
)

# The options that make a run what it is. The defaults are those of OpenLTH, the authors' code,
# which we take for the paper's; that of amp is our choice. The name of a run's files has arch,
# train, seed, and every other option that differs from its default. The name of its row in a
# table has the same, without seed and amp.
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
    "lr": 0.1,              # divided by 10 after 1/2 and 3/4 of the epochs
    "weight_decay": 1e-4,   # on all that trains, gamma and beta, too
    "amp": "auto",          # see choose_precision
}
MOMENTUM = 0.9


# --- data

# ImageNet's channel statistics, as in OpenLTH.
MEAN = np.array([0.485, 0.456, 0.406])
STD = np.array([0.229, 0.224, 0.225])


def load_data(dataset, data_dir, seed):
    """[(train images, train labels), (test images, test labels)] of "cifar10" or "synthetic".

    Images are uint8 (N, 32, 32, 3), labels int64 (N,), on the CPU. The seed is that of the
    synthetic images. Raises UserError if CIFAR-10 is not in data_dir and can't be put there.
    """
    if dataset == "synthetic":
        return synthetic_data(seed)
    return load_cifar10(pathlib.Path(data_dir))


def draw_augmentation(n, rng):
    """The random draws of an epoch, on the CPU so that a seed gives the same batches on any device.

    Returns the order (n,) of the images, and for each place in it a crop offset (n, 2) in 0 .. 8
    and a flip (n,).
    """
    order = torch.randperm(n, generator=rng)
    offset = torch.randint(0, 9, (n, 2), generator=rng)
    flip = torch.randint(0, 2, (n,), generator=rng).bool()
    return order, offset, flip


def augment(padded, index, offset, flip):
    """Crop and flip each image in its own way. Returns uint8 (B, 32, 32, 3).

    padded: (N, 40, 40, 3), images with a border of 4 black pixels; index, flip: (B,);
    offset: (B, 2), y and x.
    """
    pixel = torch.arange(32, device=padded.device)
    rows = offset[:, :1] + pixel                                              # (B, 32)
    columns = offset[:, 1:] + torch.where(flip[:, None], 31 - pixel, pixel)   # (B, 32)
    return padded[index[:, None, None], rows[:, :, None], columns[:, None, :]]


def normalize(images):
    """(x / 255 - MEAN) / STD: uint8 (B, 32, 32, 3) -> float32 (B, 3, 32, 32), channels_last."""
    scale, shift = normalization_constants(images.device)
    return torch.addcmul(shift, images.float(), scale).permute(0, 3, 1, 2)


@functools.cache   # because copying to a GPU in every step would make the host wait
def normalization_constants(device):
    """The scales and shifts of `normalize`, (2, 3)."""
    channels = np.stack([1 / (255 * STD), -MEAN / STD])
    return torch.tensor(channels, dtype=torch.float32, device=device)


def batches(padded, labels, size, rng):
    """The batches of an epoch, in a new order: normalized images (B, 3, 32, 32), labels (B,).

    padded: see `augment`; labels: (N,), on the same device; size: of all batches but the last,
    which is smaller, as in OpenLTH.
    """
    draws = draw_augmentation(len(padded), rng)
    order, offset, flip = (tensor.to(padded.device) for tensor in draws)
    for begin in range(0, len(padded), size):
        batch = slice(begin, begin + size)
        images = augment(padded, order[batch], offset[batch], flip[batch])
        yield normalize(images), labels[order[batch]]


# --- what trains

# The groups of parameters, as functions of a module and the name that one of its own parameters
# has in the network, such as "stage2.0.shortcut.1.weight".


def is_conv_weight(module, name):
    return isinstance(module, nn.Conv2d) and name.endswith("weight")


def in_all(module, name):
    """Every parameter."""
    return True


def in_conv(module, name):
    """Weights of the convolutions, but for those of the shortcuts."""
    return is_conv_weight(module, name) and "shortcut" not in name.split(".")


def in_bn(module, name):
    """The normalization's own parameters, whichever it is; with batch, its gamma and beta."""
    if isinstance(module, WeightNormConv2d):
        return name.endswith(("gain", "bias"))
    return gamma_and_beta(module) is not None


def in_not_bn(module, name):
    """Every parameter that is not in bn."""
    return not in_bn(module, name)


def in_gamma(module, name):
    """The scale of a normalization."""
    return in_bn(module, name) and name.endswith(("weight", "gain"))


def in_beta(module, name):
    """The shift of a normalization."""
    return in_bn(module, name) and name.endswith("bias")


def in_shortcut(module, name):
    """Weights of the shortcuts' convolutions, without their BatchNorm, as in the paper's table."""
    return is_conv_weight(module, name) and "shortcut" in name.split(".")


def in_shortcut_bn(module, name):
    """The normalization of the shortcuts alone, which is also in the group bn."""
    return in_bn(module, name) and "shortcut" in name.split(".")


def in_output(module, name):
    """Weights and biases of linear layers. The networks of models.py have one, the last."""
    return isinstance(module, nn.Linear)


GROUPS = {
    "all": in_all,
    "not-bn": in_not_bn,
    "conv": in_conv,
    "bn": in_bn,
    "gamma": in_gamma,
    "beta": in_beta,
    "shortcut": in_shortcut,
    "shortcut-bn": in_shortcut_bn,
    "output": in_output,
}


def parameters_of(model, groups):
    """The parameters of a model that belong to any of these groups, in the model's order.

    The `values` of a TwoWeightsConv2d belong to no group: they are entries of its `weight`, which
    belongs to one.
    """
    parameters = []
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False):
            if isinstance(module, TwoWeightsConv2d) and name.endswith("values"):
                continue
            if any(GROUPS[group](module, name) for group in groups):
                parameters.append(parameter)
    return parameters


def freeze(model, train):
    """Let only the parameters of some groups require gradients: `train` is names joined by +.

    Works on any network. In one without modules called "shortcut", conv is every nn.Conv2d.
    What stays live in a frozen BatchNorm: in training mode it normalizes by the statistics of the
    batch and moves its running statistics, in evaluation mode it normalizes by these.
    """
    model.requires_grad_(False)
    for parameter in parameters_of(model, train.split("+")):
        parameter.requires_grad_(True)


def network_of(options):
    """The network of a run's options, on the CPU, with its initial values, ready to be trained.

    Only what trains requires gradients.
    """
    model = build_model(options["arch"], options["seed"], options["norm"], options["bn_init"],
                        options["weight_init"])
    if options["train"] == "random":
        train_two_weights_per_channel(model, options["seed"])
    else:
        freeze(model, options["train"])
    return model


def trained_parameters(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def frozen_parameters(model):
    return [parameter for parameter in model.parameters() if not parameter.requires_grad]


def count_parameters(model):
    """How many parameters a network has in each group, and how many train ("trained")."""
    counts = {}
    for group in GROUPS:
        counts[group] = sum(p.numel() for p in parameters_of(model, [group]))
    counts["trained"] = sum(p.numel() for p in trained_parameters(model))
    return counts


# --- training


AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}


def autocast(device, precision):
    """The context in which a network computes in a precision, a key of AMP_DTYPES."""
    return torch.autocast(device.type, AMP_DTYPES[precision], enabled=precision != "off")


def train_step(model, optimizer, scaler, precision, images, labels):
    """One step of SGD on normalized images (B, 3, 32, 32) and their labels (B,).

    precision: a key of AMP_DTYPES. Returns (mean loss, number of correct predictions), tensors
    without dimensions.
    """
    with autocast(images.device, precision):
        logits = model(images)
    if precision != "off":
        logits = logits.float()   # the loss is computed in fp32
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
def evaluate(model, images, labels, precision):
    """Accuracy in percent on uint8 images (N, 32, 32, 3). Leaves the model in evaluation mode.

    precision: a key of AMP_DTYPES.
    """
    model.eval()
    # 125 images fit the caches of a CPU. 500 take less memory than a training step of 128.
    size = 500 if images.is_cuda else 125
    correct = 0
    for batch, batch_labels in zip(images.split(size), labels.split(size)):
        with autocast(images.device, precision):
            logits = model(normalize(batch))
        correct += (logits.argmax(1) == batch_labels).sum()
    return 100 * correct.item() / len(images)


def train_epochs(model, optimizer, scaler, rng, run, data, args):
    """The epochs that a run lacks: train, evaluate, save, print.

    rng: the generator of the order and augmentation of the images; run: see RUN_ENTRIES;
    data: see `load_data`. Raises UserError if the training diverges.
    """
    train_split, test_split = data
    train_images, train_labels = (tensor.to(args.device) for tensor in train_split)
    test_images, test_labels = (tensor.to(args.device) for tensor in test_split)
    padded = F.pad(train_images, (0, 0, 4, 4, 4, 4))   # (N, 40, 40, 3)
    n = len(padded)
    size = min(args.batch_size, n)
    steps = math.ceil(n / size)
    last_size = n - (steps - 1) * size
    step = make_step(model, optimizer, scaler, run["precision"], size, last_size, args)

    first_epoch = len(run["epochs"])
    for epoch in range(first_epoch, args.epochs):
        start_time = time.perf_counter()
        lr = learning_rate(args.lr, epoch, args.epochs)
        set_learning_rate(optimizer, lr)
        model.train()
        losses = []   # tensors, because reading a number makes the host wait for the device
        total_correct = 0
        for images, labels in batches(padded, train_labels, size, rng):
            loss, correct = step(images, labels)
            losses.append(loss * len(labels))
            total_correct += correct
            if epoch == first_epoch and len(losses) == min(20, steps):
                loss.item()   # waits for the device
                seconds_a_step = (time.perf_counter() - start_time) / len(losses)
                print_estimate(seconds_a_step * steps, args.epochs - epoch, args.device)
            print_progress(epoch, args.epochs, len(losses), steps)
        train_loss = sum(torch.stack(losses).tolist()) / n
        # What the last step does to the parameters is in no loss of this epoch.
        is_finite = all(p.isfinite().all() for p in trained_parameters(model))
        if not math.isfinite(train_loss) or not is_finite:
            raise UserError(f"training diverged: a value is not finite in epoch {epoch + 1}, "
                            "which is not saved; try a lower --lr, or --amp off")

        with torch.compiler.set_stance("force_eager"):   # other batch sizes are not worth compiling
            test_accuracy = evaluate(model, test_images, test_labels, run["precision"])
        run["epochs"].append({
            "epoch": epoch + 1,
            "train_loss": train_loss,
            "train_accuracy": 100 * total_correct.item() / n,
            "test_accuracy": test_accuracy,
            "lr": lr,
            "seconds": round(time.perf_counter() - start_time, 3),   # with evaluation
        })
        save(args.out, run, model, optimizer, scaler, rng)   # before printing, which can fail
        if epoch == first_epoch:
            print("  epoch  train loss  train acc   test acc      lr  seconds")
        print_epoch(run["epochs"][-1], args.epochs)


# --- the control: two random weights per output channel


def train_two_weights_per_channel(model, seed):
    """Let two random weights per output channel of each convolution train, and nothing else.

    Replaces the convolutions by TwoWeightsConv2d. Raises UserError for one that it can't replace,
    such as a convolution with a bias.
    """
    model.requires_grad_(False)
    rng = np.random.RandomState([seed, 2])   # a stream of its own
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Conv2d):
            is_plain = (type(module) is nn.Conv2d and module.bias is None and module.groups == 1
                        and module.dilation == (1, 1) and module.padding_mode == "zeros")
            if not is_plain:
                raise UserError(f"--train random needs plain convolutions without a bias, unlike "
                                f"{name}", 2)
            model.set_submodule(name, TwoWeightsConv2d(module, rng))


class TwoWeightsConv2d(nn.Conv2d):
    """A convolution of which two random weights per output channel train: as many as BatchNorm has.

    They are the parameter `values` (2 c_out,). The optimizer sees nothing else, so that momentum
    and weight decay move nothing else.
    """

    def __init__(self, conv, rng):
        # On the meta device, without memory, because conv's weight replaces its own.
        super().__init__(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride,
                         conv.padding, bias=False, device="meta")
        self.weight = conv.weight
        c_out = conv.out_channels
        fan_in = conv.weight[0].numel()
        first = rng.randint(0, fan_in, c_out)
        second = rng.randint(0, fan_in - 1, c_out)
        second = np.where(second < first, second, second + 1)   # uniform over the other fan_in - 1
        begin = fan_in * np.arange(c_out)   # of a channel in the flattened weight
        places = np.stack([begin + first, begin + second], axis=1).flatten()   # (2 c_out,)
        chosen = torch.from_numpy(places).to(conv.weight.device, torch.int64)
        self.register_buffer("chosen", chosen, persistent=False)
        self.values = nn.Parameter(conv.weight.detach().flatten()[chosen])

    def whole_weight(self):
        """The weight with its trained values in place, (c_out, c_in, k, k)."""
        values = self.values.to(self.weight.dtype)
        return self.weight.flatten().scatter(0, self.chosen, values).view_as(self.weight)

    def forward(self, x):
        return F.conv2d(x, self.whole_weight(), None, self.stride, self.padding)


# --- precision and fast path


def set_full_fp32():
    """Let fp32 mean fp32 on NVIDIA's GPUs, not TF32."""
    torch.set_float32_matmul_precision("highest")
    # PyTorch has an old and a new switch for convolutions, and raises an error if they disagree.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.conv.fp32_precision = "ieee"


def choose_precision(amp, device):
    """The precision of an --amp value; "auto" is bf16 on GPUs that have it, fp16 on older ones,
    and fp32 ("off") elsewhere."""
    if amp != "auto":
        return amp
    if device.type != "cuda":
        return "off"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16"
    return "fp16"


@torch.no_grad()
def lay_out(model, precision):
    """Give a network the layout and precision of weights with which its steps are fastest."""
    model.to(memory_format=torch.channels_last)   # that of convolution kernels
    if precision == "off":
        return
    for module in model.modules():
        if isinstance(module, WeightNormConv2d):
            continue   # it computes with its weights in fp32
        if isinstance(module, (nn.Conv2d, nn.Linear)) and not module.weight.requires_grad:
            # Once, because autocast would do it in every step.
            module.weight.data = module.weight.data.to(AMP_DTYPES[precision])


def make_optimizer(model, args):
    """SGD over what trains, with its momentum buffers. It is fused, unless --plain is given."""
    lr = args.lr
    if args.device.type == "cuda" and not args.plain:
        # A CUDA graph reads the learning rate from memory.
        lr = torch.tensor(lr, dtype=torch.float32, device=args.device)
    trained = trained_parameters(model)
    fused = None if args.plain else True
    optimizer = torch.optim.SGD(trained, lr, momentum=MOMENTUM, weight_decay=args.weight_decay,
                                fused=fused)
    # SGD would make these in its first step, but a checkpoint and a CUDA graph need them before it.
    for p in trained:
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def set_learning_rate(optimizer, lr):
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):   # from which a CUDA graph reads it
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def make_step(model, optimizer, scaler, precision, size, last_size, args):
    """Make a function step(images, labels), which does what train_step does.

    On CUDA without --plain, it is the fast step of make_fast. size, last_size: the numbers of
    images in a batch and in the last batch. Leaves network, momentum and scaler as they were.
    """
    def step(images, labels):
        if args.plain:
            images = images.contiguous()   # from channels_last to PyTorch's default layout
        return train_step(model, optimizer, scaler, precision, images, labels)

    if args.plain or args.device.type != "cuda":
        return step
    before = copy.deepcopy(training_state(model, optimizer, scaler))
    fast_step = make_fast(step, model, size, last_size)
    put_back(before, model, optimizer, scaler)
    return fast_step


def make_fast(step, model, size, last_size):
    """The same step as CUDA graphs of compiled blocks.

    If that fails, a line says so, and CUDA graphs without compilation are tried, then neither.
    """
    for module in model.modules():
        if isinstance(module, Block):
            # At most five compilations, because blocks of the same sizes share one.
            module.compile(dynamic=False)
    eager_step = torch.compiler.set_stance("force_eager")(step)   # the same, but never compiled
    for part, attempt in [("CUDA graphs of compiled blocks", step),
                          ("CUDA graphs", eager_step)]:
        try:
            return capture_all(attempt, size, last_size)
        except Exception as error:   # whatever compilers and drivers raise
            if is_out_of_memory(error):
                raise
            print(f"{part} fail here, trying without ({one_line(error)})", flush=True)
    return eager_step


def capture_all(step, size, last_size):
    """The step as one CUDA graph for each batch size, in one pool of memory."""
    steps = {size: step}
    if last_size != size:
        # One batch of an epoch is not worth compiling for.
        steps[last_size] = torch.compiler.set_stance("force_eager")(step)
    stream = torch.cuda.Stream()
    pool = torch.cuda.graph_pool_handle()
    static = {n: blank_batch(n) for n in steps}
    # All warm-ups come before all captures, because a capture begins by freeing the memory that
    # they have used, and keeps its own.
    for n, step_of_size in steps.items():
        warm_up(step_of_size, static[n], stream)
    replays = {}
    for n, step_of_size in steps.items():
        replays[n] = capture(step_of_size, static[n], stream, pool)

    def replay_for_size(images, labels):
        return replays[len(images)](images, labels)
    return replay_for_size


def blank_batch(size):
    """Images (size, 3, 32, 32) and labels (size,) on the current GPU, all zero."""
    images = torch.zeros(size, 3, 32, 32, dtype=torch.float32, device="cuda")
    labels = torch.zeros(size, dtype=torch.int64, device="cuda")
    return images.to(memory_format=torch.channels_last), labels


def warm_up(step, batch, stream):
    """Three steps, which compile, and allocate what can't be allocated during a capture."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(*batch)
    torch.cuda.current_stream().wait_stream(stream)


def capture(step, batch, stream, pool):
    """The step as a CUDA graph that reads from this batch: one launch replaces thousands."""
    static_images, static_labels = batch
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool, stream):
        static_loss, static_correct = step(static_images, static_labels)

    def replay(images, labels):
        static_images.copy_(images)
        static_labels.copy_(labels)
        graph.replay()
        return static_loss.clone(), static_correct.clone()   # the next replay overwrites them
    return replay


def training_state(model, optimizer, scaler):
    """All that a step changes, as a dict: "model" (tensors by name), "momentum", "scaler".

    The tensors are those in use, not copies.
    """
    momentum = [optimizer.state[p]["momentum_buffer"] for p in trained_parameters(model)]
    return {"model": changing_state(model), "momentum": momentum, "scaler": scaler.state_dict()}


@torch.no_grad()
def put_back(state, model, optimizer, scaler):
    """Copy a training_state into the tensors in use, because a CUDA graph holds their addresses.

    state: can be a checkpoint, too, which has the same entries.
    """
    model.load_state_dict(state["model"], strict=False)   # without what is frozen
    momentum = training_state(model, optimizer, scaler)["momentum"]
    for buffer, value in zip(momentum, state["momentum"], strict=True):
        buffer.copy_(value)
    scaler.load_state_dict(state["scaler"])


def changing_state(model):
    """{name: tensor} of what trains and of the buffers. The seed draws the frozen weights again."""
    state = dict(model.state_dict())
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            del state[name]
    return state


# --- checkpoints and records


FORMAT = 4

# A run is a dict of its options, its precision (a key of AMP_DTYPES), the fingerprint of its frozen
# weights, and two lists that grow: its starts (see describe_start) and its epochs.
RUN_ENTRIES = ("options", "precision", "fingerprint", "starts", "epochs")


def save(path, run, model, optimizer, scaler, rng):
    """Write the record, then the checkpoint, from which --resume continues.

    The record is first, because a finished run is not trained again: if a process were killed
    between checkpoint and record, the record would lack the last epoch for good.
    """
    write_record(record_path(path), make_record(run, model))
    write(path, checkpoint_bytes(run, model, optimizer, scaler, rng))


def checkpoint_bytes(run, model, optimizer, scaler, rng):
    """A checkpoint as the bytes of its file: a dict of a run and the state of its training."""
    state = training_state(model, optimizer, scaler)
    buffer = io.BytesIO()
    torch.save({
        "format": FORMAT,
        **run,
        "model": {name: tensor.cpu() for name, tensor in state["model"].items()},
        "momentum": [tensor.cpu() for tensor in state["momentum"]],
        "scaler": state["scaler"],
        "rng": rng.get_state(),
    }, buffer)
    return buffer.getvalue()


def make_record(run, model):
    """The record of a run: a dict of options, counts of parameters, starts and epochs.

    The headline is the test accuracy of the last epoch, never the best.
    """
    epochs = run["epochs"]
    return {
        "options": run["options"],
        "precision": run["precision"],
        "parameters": count_parameters(model),
        "test_accuracy": epochs[-1]["test_accuracy"],
        "seconds": round(sum(epoch["seconds"] for epoch in epochs), 1),
        "starts": run["starts"],
        "epochs": epochs,
    }


def record_path(checkpoint_path):
    """Where the record of a checkpoint is: x.json beside x.pt."""
    return pathlib.Path(checkpoint_path).with_suffix(".json")


def write_record(path, record):
    write(path, json.dumps(record, indent=1).encode())


def write(path, content):
    """Write bytes so that `path` holds the old content or the new, even after a power cut."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path} can't be written ({error.strerror})") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_record(path):
    """The record of a run, see make_record. Raises UserError if the file is none.

    The tables that prune.py and analyze.py have added are taken as they are.
    """
    try:
        record = json.loads(path.read_bytes())
        update_format(record)
        for name in ("options", "precision", "parameters", "test_accuracy", "seconds", "starts",
                     "epochs"):
            require(name in record, f"it has no {name}")
        record["options"] = complete_options(record["options"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a record of train.py ({one_line(error)})") from None
    return record


def load_checkpoint(path):
    """Read a checkpoint from anyone without running code in it.

    Returns the network, in evaluation mode on the CPU, and the content of the file, a dict, see
    `checkpoint_bytes`. The file holds what trained and the running statistics; all else is drawn
    again from the seed, so that a network whose frozen weights come from elsewhere, such as a
    pretrained one, can't be read. Raises UserError if the file is no valid checkpoint, an OSError
    if it can't be opened.
    """
    refuse_old_torch()   # because an old one can run code that is in a file
    open(path, "rb").close()   # raises an OSError if that is impossible
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        update_format(checkpoint)
        require(checkpoint.get("format") == FORMAT, "this code reads formats 3 and 4")
        for name in RUN_ENTRIES + ("model", "momentum", "scaler", "rng"):
            require(name in checkpoint, f"it has no {name}")
        checkpoint["options"] = complete_options(checkpoint["options"])
        model = network_of(checkpoint["options"])
        drawn = fingerprint(frozen_parameters(model))
        tolerance = 1e-9 * drawn[0]   # machines can round differently, see `orthogonal`
        require(np.allclose(drawn, checkpoint["fingerprint"], rtol=0, atol=tolerance),
                "its frozen weights are not those of its options and seed")
        missing, unexpected = model.load_state_dict(checkpoint["model"], strict=False)
        frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
        require(set(missing) == set(frozen) and not unexpected,
                f"its tensors are not those of {name_of(checkpoint['options'])}")
    except Exception as error:   # whatever a damaged file makes the readers raise
        if is_out_of_memory(error):
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        reason = text.split(". ")[0]   # PyTorch's goes on with advice
        raise UserError(f"{path} is not a checkpoint of train.py ({reason})") from error
    return model.eval(), checkpoint


@torch.no_grad()
def fingerprint(tensors):
    """Two sums that tell drawn weights apart: of |w|, and of w times its position in 0 .. 1."""
    magnitude, moment = 0.0, 0.0
    for tensor in tensors:
        w = tensor.cpu().double().flatten()
        position = torch.linspace(0, 1, len(w), dtype=torch.float64)
        magnitude += w.abs().sum().item()
        moment += torch.dot(w, position).item()
    return [magnitude, moment]


def update_format(content):
    """Give a checkpoint or a record of format 3 the entries of format 4, in place."""
    if "sessions" not in content:
        return
    content["starts"] = content.pop("sessions")
    content["precision"] = content["options"]["amp"]
    content["options"]["amp"] = "auto"   # format 3 had the resolved one alone
    if "optimizer" in content:   # a checkpoint
        content["format"] = FORMAT
        # A plain dict, without the version that a state_dict has in its _metadata: then BatchNorm
        # adds its counters, which format 3 lacks.
        content["model"] = dict(content["model"])
        states = content.pop("optimizer")["state"].values()
        content["momentum"] = [state["momentum_buffer"] for state in states]


def complete_options(options):
    """The options of a file. Those that are newer than the file have RECIPE's values.

    Raises ValueError if an option is unknown, or if one is missing that every file has.
    """
    unknown = sorted(set(options) - set(RECIPE))
    missing = sorted({"arch", "train", "seed"} - set(options))
    require(not unknown, f"unknown options: {', '.join(unknown)}")
    require(not missing, f"missing options: {', '.join(missing)}")
    parse_arch(options["arch"])   # raises ValueError
    return {**RECIPE, **options}


def require(condition, text):
    """Raise ValueError with this text unless the condition holds."""
    if not condition:
        raise ValueError(text)


# --- begin or continue a run


def options_of(args):
    """The options that make a run what it is, {name: value}, from the arguments of train.py."""
    return {name: getattr(args, name) for name in RECIPE}


def variant(options):
    """What trains, and what else differs from RECIPE, such as ["bn", "layer", "lr0.3"].

    Numbers follow the name of their option. Without arch, seed and amp.
    """
    words = [options["train"]]
    for name, default in RECIPE.items():
        value = options[name]
        if name in ("arch", "train", "seed", "amp") or value == default:
            continue
        words.append(value if isinstance(value, str) else f"{name}{value}")
    return words


def name_of(options):
    """The name of a run's files, such as resnet14-bn-s0: arch, what else differs, and the seed."""
    words = [options["arch"]] + variant(options)
    if options["amp"] != RECIPE["amp"]:
        words.append(options["amp"])
    words.append(f"s{options['seed']}")
    return "-".join(words)


def command(options):
    """The command line that makes a run of these options: what differs from RECIPE."""
    words = ["python", "train.py", "--arch", options["arch"]]
    for name, default in RECIPE.items():
        value = options[name]
        if name == "arch" or value == default:
            continue
        if name == "train" and value == "bn":
            words.append("--bn-only")
        else:
            words += ["--" + name.replace("_", "-"), str(value)]
    return shlex.join(words)


def begin_run(args):
    """A run that has not begun, see RUN_ENTRIES, and its network.

    Raises UserError if its name is taken.
    """
    record = record_path(args.out)
    if args.out.exists():
        same_command = shlex.join(["python"] + sys.argv)
        raise UserError(f"{args.out} exists: continue it by `{same_command} --resume`, "
                        "or choose another --out", 2)
    if record.exists():
        raise UserError(f"{record} exists without its checkpoint: choose another --out, "
                        "or delete it", 2)
    options = options_of(args)
    model = network_of(options)
    run = {
        "options": options,
        "precision": choose_precision(args.amp, args.device),
        "fingerprint": fingerprint(frozen_parameters(model)),
        "starts": [],
        "epochs": [],
    }
    return run, model


def continue_run(args):
    """The run of a checkpoint, its network, and the checkpoint.

    Raises UserError if the command line asks for another run.
    """
    model, checkpoint = load_checkpoint(args.out)
    for name, asked in options_of(args).items():
        value = checkpoint["options"][name]
        if asked != value:
            raise UserError(f"{args.out} is a run with {name} {value}, not {asked}", 2)
    run = {name: checkpoint[name] for name in RUN_ENTRIES}
    return run, model, checkpoint


def claim(path, content):
    """Create the checkpoint of a new run, so that --resume finds it from here on.

    Raises FileExistsError if another process was faster.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    open(path, "xb").close()
    write(path, content)


def describe_start(first_epoch, args):
    """What a run records of a start: its first epoch, the code, PyTorch and the machine."""
    hardware = f"{cpu_name()}, {torch.get_num_threads()} threads"
    if args.device.type == "cuda":
        hardware = torch.cuda.get_device_name(args.device)
    return {
        "first_epoch": first_epoch,
        "plain": args.plain,
        "commit": commit(),
        "torch": str(torch.__version__),
        "hardware": hardware,
    }


def cpu_name():
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model_name = re.search("model name\t: (.*)", cpuinfo.read_text())
        if model_name:   # ARM's has none
            return model_name[1]
    return platform.machine()


def commit():
    """The commit of this code, with "-dirty" if it has changed since, or None outside of git."""
    words = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        git = subprocess.run(words, cwd=pathlib.Path(__file__).parent, capture_output=True,
                             text=True, check=False)
    except OSError:   # git is not installed
        return None
    return git.stdout.strip() or None


# --- what a run prints


def print_estimate(seconds, epochs, device):
    """How long the epochs of a start will take, from the seconds of one, without evaluation."""
    minutes = seconds * epochs / 60
    duration = f"{minutes:.1f} minutes" if minutes < 60 else f"{minutes / 60:.1f} hours"
    memory = ""
    if device.type == "cuda":
        memory = f", {torch.cuda.max_memory_reserved() / 1e9:.1f} GB of GPU memory"
    print(f"about {seconds:.0f} s an epoch, {duration} for {epochs} epochs{memory}", flush=True)


def print_progress(epoch, epochs, done, steps):
    """On a terminal, print how far an epoch is, in a line that the next one overwrites."""
    if sys.stdout.isatty() and done % 10 == 1:
        print(f"{epoch + 1:3}/{epochs}  step {done:4} of {steps}", end="\r", flush=True)


def print_epoch(epoch, epochs):
    print(f"{epoch['epoch']:3}/{epochs:<3} {epoch['train_loss']:11.4f} "
          f"{epoch['train_accuracy']:8.2f} % {epoch['test_accuracy']:8.2f} % {epoch['lr']:7.4g} "
          f"{epoch['seconds']:8.1f}", flush=True)


# --- CIFAR-10's files, and the synthetic set


def load_cifar10(data_dir):
    """CIFAR-10 as load_data has it.

    data_dir: the folder of the batches, or the one in which cifar-10-batches-py is or is put.
    """
    cifar10 = import_cifar10()
    folder = data_dir
    if not any(folder.glob("data_batch_*")):
        folder = data_dir / cifar10.base_folder
    if not folder.exists():
        fetch_batches(data_dir, folder)

    class Batches(cifar10):
        base_folder = ""   # the batches lie in the folder itself, whatever its name

    try:
        splits = [Batches(folder, train=True), Batches(folder, train=False)]
    except RuntimeError:   # an MD5 does not match
        raise UserError(f"{folder} is not CIFAR-10 (its files differ or are missing), and stays as "
                        "it is: move it away, or give another --data-dir") from None
    return [(torch.from_numpy(split.data), torch.tensor(split.targets)) for split in splits]


def fetch_batches(data_dir, folder):
    """Unpack CIFAR-10's archive, which is downloaded unless it is in data_dir, into a new folder.

    Raises UserError if the archive in data_dir is another one, or if there can be no download.
    """
    cifar10 = import_cifar10()
    from torchvision.datasets.utils import check_integrity, download_url
    archive = data_dir / cifar10.filename
    if archive.exists():
        if not check_integrity(archive, cifar10.tgz_md5):
            raise UserError(f"{archive} is broken or not CIFAR-10's: replace it, or move it away")
        unpack(archive, folder)
        return
    print(f"downloading CIFAR-10 (170 MB) from {cifar10.url}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        try:
            download_url(cifar10.url, temporary, cifar10.filename, cifar10.tgz_md5)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"CIFAR-10 is not in {data_dir} and can't be downloaded ({one_line(error)}): get "
                f"{cifar10.url} elsewhere and put it there, whole, as {cifar10.filename}"
            ) from error
        unpack(pathlib.Path(temporary, cifar10.filename), folder)


def unpack(archive, folder):
    """Unpack the folder that an archive holds to this path.

    It appears as a whole, so that any number of processes may do this at once.
    """
    from torchvision.datasets.utils import extract_archive
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        extract_archive(archive, temporary)
        try:
            os.rename(pathlib.Path(temporary, folder.name), folder)
        except OSError:
            if not folder.exists():   # if it does, another process was faster
                raise


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
        labels = rng.randint(0, 10, n, dtype=np.int64)
        shift = rng.randint(-4, 5, (2, n, 1))
        rows, columns = (shift + np.arange(32)) % 32                   # both (n, 32)
        images = patterns[labels[:, None, None], rows[:, :, None], columns[:, None, :]]
        images += rng.randint(0, 64, images.shape, dtype=np.uint8)
        images = images.clip(0, 255).astype(np.uint8)
        return torch.from_numpy(images), torch.from_numpy(labels)

    return [draw(10_000), draw(2_000)]


# --- command line


def parse_train(text):
    """The one spelling of a --train value: "random", or groups in the order of GROUPS, joined by +.

    Raises ValueError for any other value.
    """
    if text == "random":
        return text
    names = text.split("+")
    require(set(names) <= set(GROUPS), f"argument --train: {text}: not random, nor any of "
                                       f"{', '.join(GROUPS)} joined by +")
    return "+".join(group for group in GROUPS if group in names)


def choose_device(text):
    """The torch device of a --device value. A GPU with a number (cuda:1) becomes the current one.

    Raises UserError if this machine does not have it.
    """
    if text == "auto":
        text = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(text)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"argument --device: {text}: {one_line(error)}", 2) from None
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def add_device_arguments(parser):
    """Give a parser the options that say where the data are and where to compute."""
    parser.add_argument("--data-dir", type=os.path.expanduser, default="data", metavar="DIR",
                        help="where CIFAR-10 is, or is downloaded to (default: %(default)s)")
    parser.add_argument("--device", default="auto",
                        help="auto, cuda, cuda:1, mps or cpu (default: auto: a GPU, or the CPU)")


def make_parser():
    """The command line of train.py, with RECIPE's defaults."""
    parser = argparse.ArgumentParser(
        description="Train a CIFAR-10 ResNet, or only its BatchNorm (arXiv 2003.00152).")

    def add(name, help, **kind):
        parser.add_argument("--" + name.replace("_", "-"), default=RECIPE[name],
                            help=f"{help} (default: %(default)s)", **kind)

    add("arch", "resnet<depth> or wrn<depth>-<width>, depth = 6n + 2", metavar="NAME")
    # Without default=, because argparse accepts `--train all --bn-only` if "all" is the default.
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--train", metavar="GROUPS",
                       help=f"what trains: random, or any of {', '.join(GROUPS)} joined by + "
                            "(default: all)")
    group.add_argument("--bn-only", dest="train", action="store_const", const="bn",
                       help="short for --train bn")
    add("norm", "the normalization, whose parameters are the group bn", choices=NORMS)
    add("bn_init", "gamma, beta: uniform U(0,1), 0; fixed 1, 0; oneone 1, 1; "
                   "positivenegative U(-1,1), 0", choices=BN_INITS)
    add("weight_init", "all other weights", choices=WEIGHT_INITS)
    add("dataset", "synthetic needs no download", choices=["cifar10", "synthetic"])
    add("seed", "of initial values, data order, augmentation", type=int, metavar="N")
    add("epochs", "the learning rate drops at 1/2 and 3/4 of them", type=int, metavar="N")
    add("batch_size", "images per step", type=int, metavar="N")
    add("lr", "initial learning rate of SGD with momentum 0.9", type=float, metavar="X")
    add("weight_decay", "L2 penalty on whatever trains", type=float, metavar="X")
    add("amp", "precision: off is fp32, auto is bf16 on CUDA (fp16 on older GPUs), off elsewhere",
        choices=["auto", *AMP_DTYPES])
    parser.add_argument("--plain", action="store_true",
                        help="train without channels_last, fused optimizer, compilation, "
                             "CUDA graphs")
    parser.add_argument("--out", type=os.path.expanduser, metavar="x.pt",
                        help="checkpoint; by default runs/NAME.pt, where NAME has arch, what "
                             "trains, all that differs from the defaults, and the seed")
    parser.add_argument("--resume", action="store_true",
                        help="continue from the checkpoint, if it exists")
    add_device_arguments(parser)
    return parser


def parse_command_line():
    """The arguments of train.py, with --train, --device, --plain and --out as they take effect."""
    parser = make_parser()
    args = parser.parse_args()
    try:
        parse_arch(args.arch)
        args.train = parse_train(RECIPE["train"] if args.train is None else args.train)
        require(0 <= args.seed < 2 ** 32, "argument --seed: not in 0 to 2^32 - 1")
        require(args.weight_decay >= 0, "argument --weight-decay: not a number from 0 on")
        for name in ("epochs", "batch_size", "lr"):
            require(getattr(args, name) > 0, f"argument --{name.replace('_', '-')}: not positive")
        args.out = pathlib.Path(args.out or f"runs/{name_of(options_of(args))}.pt")
        require(args.out.suffix == ".pt", f"argument --out: {args.out} does not end in .pt")
    except ValueError as error:   # not by argparse's type=, which would hide its text
        parser.error(str(error))
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("torchrun is not for this: a process trains one network, see README.md", 2)
    args.device = choose_device(args.device)
    if args.device.type == "mps":
        # channels_last gives wrong gradients there (pytorch#175189).
        args.plain = True
    return args


# --- errors


class UserError(Exception):
    """An error that the user can mend: one line of text, and the exit status (2: wrong usage)."""

    def __init__(self, text, status=1):
        super().__init__(text)
        self.status = status


def run_cli(main, on_interrupt="stopped"):
    """Call main(), with errors that users meet as one line on stderr and an exit status."""
    try:
        refuse_old_torch()
        main()
        sys.stdout.flush()   # so that a closed pipe is met here
    except UserError as error:
        stop(str(error), error.status)
    except KeyboardInterrupt:
        stop(on_interrupt)
    except BrokenPipeError:   # as in `train.py | head`
        # So that Python does not fail again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        stop(f"{error.filename}: {error.strerror}" if error.filename else one_line(error))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise   # a fault of the program: with a traceback
        stop(f"{one_line(error)}; try a smaller batch or network")


def stop(text, status=1):
    """End with one line on stderr."""
    print(f"{os.path.basename(sys.argv[0])}: error: {text}", file=sys.stderr)
    sys.exit(status)


def one_line(error):
    """The first line of an exception's message, or its name if it has none."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0]


def is_out_of_memory(error):
    """Whether an exception says that memory did not suffice."""
    # What PyTorch says of GPUs ("CUDA error: out of memory"), of their libraries
    # ("CUBLAS_STATUS_ALLOC_FAILED"), and of CPUs: on Linux and macOS, on Windows.
    texts = ["out of memory", "ALLOC_FAILED", "can't allocate memory", "not enough memory"]
    return (isinstance(error, (torch.OutOfMemoryError, MemoryError))
            or any(text in str(error) for text in texts))


def refuse_old_torch():
    if torch.__version__ < "2.10":   # compared as versions, not as text
        raise UserError(f"torch {torch.__version__} is too old: pip install -r requirements.txt", 2)


# --- main


def main():
    args = parse_command_line()
    set_full_fp32()
    if args.resume and args.out.exists() and args.out.stat().st_size == 0:
        args.out.unlink()   # a start was interrupted between the two steps of `claim`
    checkpoint = None
    if args.resume and args.out.exists():
        run, model, checkpoint = continue_run(args)
    else:
        run, model = begin_run(args)
    done = len(run["epochs"])
    if done == args.epochs:
        print(f"{args.out} is finished: {run['epochs'][-1]['test_accuracy']:.2f} % test accuracy, "
              f"made by `{command(run['options'])}`")
        return
    counts = count_parameters(model)
    print(f"{args.arch} on {args.device}: {counts['trained']:,} of {counts['all']:,} parameters "
          f"train, epochs done: {done} of {args.epochs}", flush=True)

    data = load_data(args.dataset, args.data_dir, args.seed)
    model.train().to(args.device)
    if not args.plain:
        lay_out(model, run["precision"])
    optimizer = make_optimizer(model, args)
    scaler = torch.amp.GradScaler(args.device.type, enabled=run["precision"] == "fp16")
    rng = torch.Generator().manual_seed(args.seed)
    run["starts"].append(describe_start(done + 1, args))
    if checkpoint is None:
        claim(args.out, checkpoint_bytes(run, model, optimizer, scaler, rng))
    else:
        put_back(checkpoint, model, optimizer, scaler)
        rng.set_state(checkpoint["rng"])
    train_epochs(model, optimizer, scaler, rng, run, data, args)
    print(f"next: python prune.py {shlex.quote(str(args.out))}")


if __name__ == "__main__":
    run_cli(main, "stopped; the same command with --resume continues after the last whole epoch")
