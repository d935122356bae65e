"""The CIFAR-10 ResNets and WRNs of "Training BatchNorm and Only BatchNorm" (arXiv 2003.00152), with random weights.

A name says everything about a network: `resnet<D>` has D = 6n + 2 layers, `wrn<D>-<K>` is the same, K times as wide.
A name and a seed say everything about its initial values: see `initialize`.

    model = build_model("resnet866", seed=0)
    parameter_counts(model)   # {"all": 13979930, "bn": 64736, "shortcut": 2560, "output": 650}
"""
import math
import os
import re

import numpy as np
import torch
from torch import nn


# ------------------------------------------------------------------------------------------------- architecture

class Block(nn.Module):
    """Basic residual block: conv3x3, BN, ReLU, conv3x3, BN, add the shortcut, ReLU (He et al., arXiv 1512.03385).

    The shortcut is the identity, or a 1x1 convolution + BN where the block halves the resolution.
    (B, c_in, H, W) -> (B, c_out, H / stride, W / stride).
    """

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.relu2 = nn.ReLU()
        self.shortcut = nn.Identity()
        if stride == 2:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x):
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return self.relu2(out)


class ResNet(nn.Module):
    """CIFAR ResNet of the given depth = 6n + 2 and width: (B, 3, 32, 32) normalised images -> (B, 10) logits."""

    def __init__(self, depth, width=1):
        super().__init__()
        n, c = (depth - 2) // 6, 16 * width
        self.conv = nn.Conv2d(3, c, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(c)
        self.relu = nn.ReLU()
        self.stage1 = nn.Sequential(*[Block(c, c, 1) for _ in range(n)])
        self.stage2 = nn.Sequential(Block(c, 2 * c, 2), *[Block(2 * c, 2 * c, 1) for _ in range(n - 1)])
        self.stage3 = nn.Sequential(Block(2 * c, 4 * c, 2), *[Block(4 * c, 4 * c, 1) for _ in range(n - 1)])
        self.fc = nn.Linear(4 * c, 10)

    def forward(self, x):
        x = self.relu(self.bn(self.conv(x)))   # (B, 16w, 32, 32)
        x = self.stage1(x)                     # (B, 16w, 32, 32)
        x = self.stage2(x)                     # (B, 32w, 16, 16)
        x = self.stage3(x)                     # (B, 64w, 8, 8)
        return self.fc(nn.functional.avg_pool2d(x, x.shape[2:]).flatten(1))


def parse_arch(arch):
    """The (depth, width) of a name such as `resnet866` or `wrn14-32`; ValueError says what is wrong with any other."""
    match = re.fullmatch(r"resnet([1-9]\d{0,9})|wrn([1-9]\d{0,9})-([1-9]\d{0,9})", arch, re.ASCII)
    if not match:
        raise ValueError(f"no network is called {arch!r:.60}: use resnet<depth> or wrn<depth>-<width>, "
                         "such as resnet866 or wrn14-32")
    depth, width = int(match[1] or match[2]), int(match[3] or 1)
    n = (depth - 2) // 6
    if depth < 8 or depth % 6 != 2:
        near = " and ".join(str(6 * m + 2) for m in (n, n + 1) if m >= 1)
        raise ValueError(f"{arch!r} has no valid depth: depths are 6n + 2 (n >= 1); nearest to {depth}: {near}")
    # A block holds 18 c^2 weights for c channels, the three stages together n * 18 * (16^2 + 32^2 + 64^2) width^2.
    if n * 96_768 * width ** 2 > 1e11:
        raise ValueError(f"{arch!r} would have more than 10^11 weights (400 GB): choose a smaller depth or width")
    return depth, width


def count_features(arch):
    """How many features BatchNorm scales and shifts in the network of this name; half its BatchNorm parameters."""
    depth, width = parse_arch(arch)
    return (2 * (depth - 2) // 6 + 1) * (16 + 32 + 64) * width


def parameter_counts(model):
    """How many parameters a ResNet has: {"all", "bn", "shortcut", "output"}, the columns of the paper's table.

    "bn" includes the BatchNorm of the shortcuts, "shortcut" counts their convolutions only.
    """
    counts = {"all": 0, "bn": 0, "shortcut": 0, "output": 0}
    for name, parameter in model.named_parameters():
        counts["all"] += parameter.numel()
        if (part := part_of(name)) != "conv":
            counts[part] += parameter.numel()
    return counts


def part_of(name):
    """Which part of the network a parameter belongs to, by its name: "bn", "shortcut", "output" or "conv"."""
    if name.startswith("fc."):
        return "output"
    if "bn" in name or "shortcut.1" in name:
        return "bn"
    return "shortcut" if "shortcut.0" in name else "conv"


def batchnorms(model):
    """The BatchNorm layers in the order of the forward pass's definition, as a list of (name, module)."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]


# ----------------------------------------------------------------------------------------------- initial values

def build_model(arch, seed):
    """The network of this name with the random values of this seed (0 .. 2^32 - 1), on the CPU in float32.

    Raises ValueError for a name that is no network, MemoryError for one that this machine can't hold.
    """
    model = empty_model(arch)
    size = 4 * parameter_counts(model)["all"]
    if hasattr(os, "sysconf") and size > (memory := os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")):
        raise MemoryError(f"{arch} has {size / 1e9:.1f} GB of weights, this machine {memory / 1e9:.1f} GB of memory")
    model.to_empty(device="cpu")
    initialize(model, seed)
    return model


def empty_model(arch):
    """The network of this name without storage (on the meta device), to count or to fill."""
    with torch.device("meta"):   # skips PyTorch's own initialisation, whose values depend on its version
        return ResNet(*parse_arch(arch))


@torch.no_grad()
def initialize(model, seed):
    """Draw all initial values as the paper's code does (OpenLTH: kaiming_normal weights, uniform BatchNorm).

    Convolutions and the linear weight: N(0, 2 / fan_in). Linear bias: U(-b, b), b = fan_in ** -0.5 (PyTorch's
    default). Gamma: U(0, 1), beta: 0. Everything comes from NumPy's legacy RandomState, module by module, because
    its stream is frozen (NEP 19): a name and a seed mean the same features on every machine, for ever.
    """
    rng = np.random.RandomState(seed)

    def fill(tensor, values):
        tensor.copy_(torch.from_numpy(values))

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            fan_in = module.weight[0].numel()
            fill(module.weight, rng.standard_normal(tuple(module.weight.shape)) * math.sqrt(2 / fan_in))
            if module.bias is not None:
                fill(module.bias, rng.uniform(-1, 1, tuple(module.bias.shape)) / math.sqrt(fan_in))
        elif isinstance(module, nn.BatchNorm2d):
            fill(module.weight, rng.uniform(0, 1, module.num_features))
            module.bias.zero_()
            module.running_mean.zero_()
            module.running_var.fill_(1)
            module.num_batches_tracked.zero_()


@torch.no_grad()
def fingerprint(tensors):
    """Three float64 sums that tell one list of weights from another: of w, of |w|, and of w times its position.

    To be compared with `same_fingerprint`. A hash would do, but for the last bit of log() in another libm.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    for tensor in tensors:
        w = tensor.detach().cpu().double().flatten()
        sums += torch.stack([w.sum(), w.abs().sum(), w @ torch.linspace(0, 1, len(w), dtype=torch.float64)])
    return sums.tolist()


def same_fingerprint(a, b):
    """Whether two fingerprints are of the same weights up to round-off: they differ by less than 1e-9 of sum |w|."""
    return max(abs(x - y) for x, y in zip(a, b)) <= 1e-9 * max(a[1], b[1])
