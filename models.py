"""The CIFAR-10 ResNets and WRNs of "Training BatchNorm and Only BatchNorm" (arXiv 2003.00152), with random weights.

A name gives the architecture: `resnet<D>` has depth D = 6n + 2, `wrn<D>-<K>` is the same, K times as wide. A name and
a seed give all initial values (see `initialize`). Trainable parameters, as in the paper's table:

    network      all  BatchNorm        network          all  BatchNorm
    resnet14     175,258  1,120        wrn14-2      696,618      2,240
    resnet32     466,906  2,464        wrn14-4    2,777,674      4,480
    resnet56     855,770  4,256        wrn14-8   11,093,130      8,960
    resnet110  1,730,714  8,288        wrn14-16  44,337,418     17,920
    resnet218  3,480,602 16,352        wrn14-32 177,279,498     35,840
    resnet434  6,980,378 32,480
    resnet866 13,979,930 64,736
"""
import math
import re

import numpy as np
import torch
from torch import nn

# --- architecture

class Block(nn.Module):
    """Basic residual block: conv3x3, BN, ReLU, conv3x3, BN, add the shortcut, ReLU (He et al., arXiv 1512.03385).

    (B, c_in, H, W) -> (B, c_out, H / stride, W / stride). The shortcut is the identity, or a 1x1 convolution + BN.
    """

    def __init__(self, c_in, c_out, stride, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.bn1 = norm(c_out)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = norm(c_out)
        self.relu2 = nn.ReLU(inplace=True)
        self.shortcut = nn.Identity()
        if stride == 2:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), norm(c_out))

    def forward(self, x):
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return self.relu2(out)

class ResNet(nn.Module):
    """CIFAR ResNet of depth 6n + 2 and the given width: (B, 3, 32, 32) normalized images -> (B, 10) logits."""

    def __init__(self, depth, width=1, norm=nn.BatchNorm2d):
        super().__init__()
        n, c = (depth - 2) // 6, 16 * width
        self.conv = nn.Conv2d(3, c, 3, padding=1, bias=False)
        self.bn = norm(c)
        self.relu = nn.ReLU(inplace=True)
        self.stage1 = nn.Sequential(*[Block(c, c, 1, norm) for _ in range(n)])
        self.stage2 = nn.Sequential(Block(c, 2 * c, 2, norm), *[Block(2 * c, 2 * c, 1, norm) for _ in range(n - 1)])
        self.stage3 = nn.Sequential(Block(2 * c, 4 * c, 2, norm), *[Block(4 * c, 4 * c, 1, norm) for _ in range(n - 1)])
        self.fc = nn.Linear(4 * c, 10)

    def forward(self, x):
        x = self.relu(self.bn(self.conv(x)))   # (B, 16w, 32, 32)
        x = self.stage1(x)   # (B, 16w, 32, 32)
        x = self.stage2(x)   # (B, 32w, 16, 16)
        x = self.stage3(x)   # (B, 64w, 8, 8)
        # avg_pool2d, because its gradient keeps the channels_last layout; mean() does not.
        x = nn.functional.avg_pool2d(x, 8)
        return self.fc(x.flatten(1))

def parse_arch(arch):
    """The (depth, width) of a name such as `resnet866` or `wrn14-32`. Raises ValueError for any other name."""
    match = re.fullmatch(r"resnet([1-9]\d{0,3})|wrn([1-9]\d{0,3})-([1-9]\d{0,2})", arch, re.ASCII)
    if not match:
        raise ValueError("networks are called resnet<depth> or wrn<depth>-<width>, such as resnet866 or wrn14-32")
    depth, width = int(match[1] or match[2]), int(match[3] or 1)
    if depth < 8 or depth % 6 != 2:
        raise ValueError(f"the depth must be 6n + 2, such as {max(8, depth - (depth - 2) % 6)}")
    return depth, width

# The parts that can be trained, as predicates (module, name of its parameter, parameter); a new row may overlap others.
# "bn" is the normalization, whichever it is; original0 is the g of weight normalization.
PARTS = {
    "conv": lambda module, name, p: p.shape[2:] == (3, 3),
    "bn": lambda module, name, p: name == "original0" or p.dim() == 1 and not isinstance(module, nn.Linear),
    "shortcut": lambda module, name, p: p.shape[2:] == (1, 1) and name != "original0",
    "output": lambda module, name, p: isinstance(module, nn.Linear),
}

def parameters_of(model, parts):
    """The parameters of a model that belong to any of these PARTS, in the model's order."""
    return [parameter for module in model.modules()
            for name, parameter in module.named_parameters(recurse=False)
            if any(PARTS[part](module, name, parameter) for part in parts)]

def count_parameters(model):
    """How many parameters a model has, in all and by part; "shortcut" without BatchNorm, as in the paper's table."""
    counts = {part: sum(p.numel() for p in parameters_of(model, [part])) for part in PARTS}
    return {"all": sum(p.numel() for p in model.parameters()), **counts}

def gammas_and_betas(model):
    """The (name, gamma, beta) of each normalization layer, in the model's order; (name, g, b) with --norm weight."""
    return [(name, module.parametrizations.weight.original0 if isinstance(module, nn.Conv2d) else module.weight,
             module.bias) for name, module in model.named_modules()
            if getattr(module, "bias", None) is not None and not isinstance(module, nn.Linear)]

# --- initial values

def empty_model(arch, norm="batch"):
    """The network of this name without storage (on the meta device), to count or to fill."""
    with torch.device("meta"):   # skips PyTorch's own initialization, whose values depend on its version
        model = ResNet(*parse_arch(arch), NORMS[norm])
        if norm == "weight":
            normalize_weights(model)
    return model

def build_model(arch, seed, norm="batch", bn_init="uniform", weight_init="kaiming_normal"):
    """The network of this name with the initial values of this seed (0 .. 2^32 - 1), on the CPU in float32."""
    model = empty_model(arch, norm).to_empty(device="cpu")
    initialize(model, seed, bn_init, weight_init)
    return model

@torch.no_grad()
def initialize(model, seed, bn_init, weight_init):
    """Draw all initial values as the paper's code does (OpenLTH: kaiming_normal weights, uniform BatchNorm).

    Convolutions and the linear weight: N(0, 2 / fan_in). Linear bias: U(-b, b), b = fan_in ** -0.5 (PyTorch's
    default). Gamma: U(0, 1), beta: 0. Everything comes from NumPy's legacy RandomState, module by module, because
    its stream is frozen (NEP 19): a name and a seed mean the same features on every machine and in every version.
    """
    for parameter in model.parameters():
        parameter.fill_(math.nan)   # one that is forgotten below must show
    rng = np.random.RandomState(seed)
    affine = {name: (gamma, beta) for name, gamma, beta in gammas_and_betas(model)}

    def fill(out, values):
        out.copy_(torch.as_tensor(values).view_as(out))

    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            weight = module.parametrizations.weight.original1 if name in affine else module.weight
            normal, std = rng.standard_normal(tuple(weight.shape)), math.sqrt(2 / weight[0].numel())
            fill(weight, WEIGHT_INITS[weight_init](normal, std))
        if isinstance(module, nn.Linear):
            fill(module.bias, rng.uniform(-1, 1, len(module.bias)) / math.sqrt(module.in_features))
        elif name in affine:
            gamma, beta = BN_INITS[bn_init](rng.uniform(0, 1, len(module.bias)))
            fill(affine[name][0], gamma)
            fill(affine[name][1], beta)
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.num_batches_tracked = None   # nothing reads it, and counting costs a kernel per layer
        if isinstance(module, SwitchNorm2d):
            module.switch.fill_(1)
        if isinstance(module, nn.Conv2d) and name in affine:   # weight normalization: g = gamma |v|
            affine[name][0].mul_(torch.linalg.vector_norm(weight, dim=(1, 2, 3), keepdim=True))

BN_INITS = {   # gamma and beta as functions of the draws u from U(0, 1), named as in OpenLTH
    "uniform": lambda u: (u, 0 * u),
    "fixed": lambda u: (0 * u + 1, 0 * u),
    "oneone": lambda u: (0 * u + 1, 0 * u + 1),
    "positivenegative": lambda u: (2 * u - 1, 0 * u),
}

def orthogonal(z, std):
    """Orthonormal rows, or columns if there are more rows, whatever std; as torch.nn.init.orthogonal_ makes them."""
    wide = len(z) < z[0].size
    q, r = np.linalg.qr(z.reshape(len(z), -1).T if wide else z.reshape(len(z), -1))
    q *= np.sign(np.diag(r))
    return np.ascontiguousarray(q.T if wide else q)

WEIGHT_INITS = {   # of draws z from N(0, 1) and std = sqrt(2 / fan_in)
    "kaiming_normal": lambda z, std: std * z,
    "kaiming_uniform": lambda z, std: 3 ** 0.5 * std * torch.erf(torch.from_numpy(z) / 2 ** 0.5),   # erf: U(-1, 1)
    "orthogonal": orthogonal,
    "binary": lambda z, std: std * np.sign(z),   # OpenLTH takes the measured std of the drawn weights
}

@torch.no_grad()
def fingerprint(tensors):
    """Two float64 sums that tell weights apart, up to round-off: of |w|, and of w times its position in 0 .. 1."""
    sums = torch.zeros(2, dtype=torch.float64)
    for tensor in tensors:
        w = tensor.detach().cpu().double().flatten()
        sums += torch.stack([w.abs().sum(), w @ torch.linspace(0, 1, len(w), dtype=torch.float64)])
    return sums.tolist()

# --- other normalizations than the paper's

class SwitchNorm2d(nn.BatchNorm2d):
    """Switchable normalization of (B, C, H, W): weighted statistics of instance, layer, batch (arXiv 1806.10779)."""

    def __init__(self, c):
        super().__init__(c)
        self.switch = nn.Parameter(torch.empty(6))   # softmax weights of the means, of the variances

    def forward(self, x):
        features = x.to(self.weight.dtype)
        mean, square = (f.mean((2, 3), keepdim=True) for f in (features, features.square()))   # (B, C, 1, 1)
        means = [mean, mean.mean(1, True), mean.mean(0, True)]
        squares = [square, square.mean(1, True), square.mean(0, True)]
        variances = [(square - mean.square()).clamp(min=0) for mean, square in zip(means, squares)]
        if self.training:
            self.running_mean.lerp_(means[2].detach().flatten(), 0.1)
            self.running_var.lerp_(variances[2].detach().flatten(), 0.1)
        else:
            means[2], variances[2] = self.running_mean[:, None, None], self.running_var[:, None, None]
        mean, var = (sum(weight * value for weight, value in zip(switch.softmax(0), values))
                     for switch, values in zip(self.switch.view(2, 3), (means, variances)))
        scale = self.weight[:, None, None] * (var + self.eps).rsqrt()
        return torch.addcmul(self.bias[:, None, None] - mean * scale, features, scale).to(x.dtype)

class GroupNorm(nn.GroupNorm):
    def forward(self, x):   # torch 2.13's CPU kernel for channels_last is slow, and crashes in the stem
        return super().forward(x.contiguous())

def normalize_weights(model):
    """Give each convolution a bias and weight normalization, w = g v / |v| (Salimans and Kingma, arXiv 1602.07868)."""
    for conv in [module for module in model.modules() if isinstance(module, nn.Conv2d)]:
        conv.bias = nn.Parameter(torch.empty(conv.out_channels))
        nn.utils.parametrizations.weight_norm(conv)

NORMS = {   # the layer for c features
    "batch": nn.BatchNorm2d,
    "layer": lambda c: GroupNorm(1, c),
    "instance": lambda c: GroupNorm(c, c),
    "group": lambda c: GroupNorm(8, c),
    "weight": lambda c: nn.Identity(),   # normalize_weights
    "switchable": SwitchNorm2d,
}
