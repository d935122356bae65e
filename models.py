"""The CIFAR-10 ResNets and WRNs of "Training BatchNorm and Only BatchNorm" (arXiv 2003.00152).

A name gives the architecture: `resnet<D>` has depth D = 6n + 2, and `wrn<D>-<K>` is the same,
K times as wide. Trainable parameters, as in the table of the paper's second version:

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
import torch.nn.functional as F
from torch import nn

# --- architecture


class Block(nn.Module):
    """Basic residual block (He et al., arXiv 1512.03385).

    conv3x3, BN, ReLU, conv3x3, BN, add the shortcut, ReLU:
    (B, c_in, H, W) -> (B, c_out, H / stride, W / stride).
    The shortcut is the identity, or where the size changes a 1x1 convolution and BN. Instead of BN,
    `norm` can name another normalization.
    """

    def __init__(self, c_in, c_out, stride, norm="batch"):
        super().__init__()
        self.conv1 = convolution(c_in, c_out, 3, stride, norm)
        self.bn1 = NORMS[norm](c_out)
        self.relu1 = nn.ReLU()
        self.conv2 = convolution(c_out, c_out, 3, 1, norm)
        self.bn2 = NORMS[norm](c_out)
        self.relu2 = nn.ReLU()
        self.shortcut = nn.Identity()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(
                convolution(c_in, c_out, 1, stride, norm),
                NORMS[norm](c_out),
            )

    def forward(self, x):
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out = out + self.shortcut(x)   # ReLU and addition are not in place: hooks may keep features
        return self.relu2(out)


class ResNet(nn.Module):
    """CIFAR ResNet of depth 6n + 2: (B, 3, 32, 32) normalized images -> (B, 10) logits.

    Its stages have 16, 32 and 64 times `width` channels. norm: a key of NORMS.
    """

    def __init__(self, depth, width=1, norm="batch"):
        super().__init__()
        n = (depth - 2) // 6
        c = 16 * width
        self.conv = convolution(3, c, 3, 1, norm)
        self.bn = NORMS[norm](c)
        self.relu = nn.ReLU()
        self.stage1 = stage(n, c, c, 1, norm)
        self.stage2 = stage(n, c, 2 * c, 2, norm)
        self.stage3 = stage(n, 2 * c, 4 * c, 2, norm)
        self.fc = nn.Linear(4 * c, 10)

    def forward(self, x):
        x = self.relu(self.bn(self.conv(x)))   # (B, 16w, 32, 32)
        x = self.stage1(x)   # (B, 16w, 32, 32)
        x = self.stage2(x)   # (B, 32w, 16, 16)
        x = self.stage3(x)   # (B, 64w, 8, 8)
        # avg_pool2d, because its gradient keeps the channels_last layout; mean() does not.
        x = F.avg_pool2d(x, 8)   # (B, 64w, 1, 1)
        return self.fc(x.flatten(1))


def stage(n, c_in, c_out, stride, norm):
    """n blocks, of which the first has this stride."""
    blocks = [Block(c_in, c_out, stride, norm)]
    for _ in range(n - 1):
        blocks.append(Block(c_out, c_out, 1, norm))
    return nn.Sequential(*blocks)


def convolution(c_in, c_out, kernel_size, stride, norm):
    """A convolution without a bias; with `norm` "weight", the one that normalizes its weights."""
    padding = kernel_size // 2
    if norm == "weight":
        return WeightNormConv2d(c_in, c_out, kernel_size, stride, padding)
    return nn.Conv2d(c_in, c_out, kernel_size, stride, padding, bias=False)


def parse_arch(arch):
    """The (depth, width) of a name such as `resnet866` or `wrn14-32`.

    Raises ValueError for any other name.
    """
    resnet = re.fullmatch(r"resnet([1-9][0-9]{0,3})", arch)
    wrn = re.fullmatch(r"wrn([1-9][0-9]{0,3})-([1-9][0-9]{0,2})", arch)
    if resnet:
        depth, width = int(resnet[1]), 1
    elif wrn:
        depth, width = int(wrn[1]), int(wrn[2])
    else:
        raise ValueError("networks are called resnet<depth> or wrn<depth>-<width>, "
                         "such as resnet866 or wrn14-32")
    if depth < 8 or depth % 6 != 2:
        nearest = max(8, depth - (depth - 2) % 6)   # the next one below, or 8
        raise ValueError(f"the depth must be 6n + 2, such as {nearest}")
    return depth, width


def build_model(arch, seed, norm="batch", bn_init="uniform", weight_init="kaiming_normal"):
    """The network of this name with the initial values of this seed, on the CPU in float32.

    seed: 0 .. 2^32 - 1; norm, bn_init, weight_init: keys of NORMS, BN_INITS, WEIGHT_INITS.
    """
    depth, width = parse_arch(arch)
    with torch.device("cpu"):   # whatever the default device and dtype of the caller
        model = ResNet(depth, width, norm).float()
    initialize(model, seed, bn_init, weight_init)
    return model


def gamma_and_beta(module):
    """The gamma and beta of a normalization, both (C,), or None for any other module.

    They are its `weight` and `bias`; with weight normalization, gamma is the gain of a convolution.
    """
    if isinstance(module, WeightNormConv2d):
        return module.gain, module.bias
    own = dict(module.named_parameters(recurse=False))
    weight = own.get("weight")
    bias = own.get("bias")
    if weight is not None and bias is not None and weight.dim() == 1:
        return weight, bias
    return None


def gammas_and_betas(model):
    """The (gamma, beta) of each normalization in the model's order."""
    pairs = [gamma_and_beta(module) for module in model.modules()]
    return [pair for pair in pairs if pair is not None]


# --- initial values


@torch.no_grad()
def initialize(model, seed, bn_init, weight_init):
    """Draw all initial values. The default distributions are those of OpenLTH, the authors' code:

    convolutions and the linear weight N(0, 2 / fan_in), gamma U(0, 1), beta 0. Two do not depend on
    the options: the linear bias is U(-b, b) with b = fan_in ** -0.5 (PyTorch's default), and the
    gain of a WeightNormConv2d is gamma |v|, where v is its `weight`.
    All draws come from NumPy's legacy RandomState, module by module. Its stream is frozen (NEP 19),
    so a seed gives the same values on every machine and in every version, up to rounding.
    """
    rng = np.random.RandomState(seed)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            weight = module.weight
            z = rng.standard_normal(tuple(weight.shape))
            fan_in = weight[0].numel()
            std = math.sqrt(2 / fan_in)
            weight.copy_(torch.from_numpy(WEIGHT_INITS[weight_init](z, std)))
        if isinstance(module, nn.Linear):
            draws = rng.uniform(-1, 1, len(module.bias))
            bias = draws / math.sqrt(module.in_features)
            module.bias.copy_(torch.from_numpy(bias))
        affine = gamma_and_beta(module)
        if affine is not None:
            gamma, beta = affine
            u = rng.uniform(0, 1, len(gamma))
            gamma_values, beta_values = BN_INITS[bn_init](u)
            gamma.copy_(torch.from_numpy(gamma_values))
            beta.copy_(torch.from_numpy(beta_values))
        if isinstance(module, WeightNormConv2d):
            module.gain.mul_(module.direction_norm())


# gamma and beta as functions of draws u from U(0, 1), both (C,), named as in OpenLTH.


def uniform(u):
    return u, np.zeros_like(u)


def fixed(u):
    return np.ones_like(u), np.zeros_like(u)


def oneone(u):
    return np.ones_like(u), np.ones_like(u)


def positivenegative(u):
    return 2 * u - 1, np.zeros_like(u)


BN_INITS = {
    "uniform": uniform,
    "fixed": fixed,
    "oneone": oneone,
    "positivenegative": positivenegative,
}

# Weights as functions of draws z from N(0, 1), in the weight's shape, and std = sqrt(2 / fan_in).


def kaiming_normal(z, std):
    return std * z


def kaiming_uniform(z, std):
    """U(-b, b), b = sqrt(3) std: erf maps N(0, 1) to U(-1, 1)."""
    uniform_draws = torch.erf(torch.from_numpy(z) / math.sqrt(2))
    return math.sqrt(3) * std * uniform_draws.numpy()


def orthogonal(z, std):
    """Orthonormal rows, or columns if there are more rows than columns, as nn.init.orthogonal_.

    They do not depend on std. Another machine's np.linalg.qr can round differently.
    """
    matrix = z.reshape(len(z), -1)
    wide = matrix.shape[0] < matrix.shape[1]
    if wide:
        matrix = matrix.T
    q, r = np.linalg.qr(matrix)
    q = q * np.sign(np.diag(r))   # makes the decomposition unique
    if wide:
        q = q.T
    return q.reshape(z.shape)


def binary(z, std):
    """The sign times std. (OpenLTH takes the measured std of the drawn weights.)"""
    return std * np.sign(z)


WEIGHT_INITS = {
    "kaiming_normal": kaiming_normal,
    "kaiming_uniform": kaiming_uniform,
    "orthogonal": orthogonal,
    "binary": binary,
}


# --- normalizations


class ContiguousGroupNorm(nn.GroupNorm):
    """nn.GroupNorm in the default layout, because the CPU kernel of torch 2.13 for channels_last is
    slow, and crashes where the input needs no gradient, as after a frozen first convolution."""

    def forward(self, x):
        return super().forward(x.contiguous())


def layer_norm(c):
    """Statistics over all features of an image (arXiv 1607.06450)."""
    return ContiguousGroupNorm(1, c)


def instance_norm(c):
    """Statistics of each feature of an image (arXiv 1607.08022)."""
    return ContiguousGroupNorm(c, c)


def group_norm(c):
    """Statistics over each of eight groups of features of an image (arXiv 1803.08494)."""
    return ContiguousGroupNorm(8, c)


class SwitchNorm2d(nn.BatchNorm2d):
    """Switchable normalization of (B, C, H, W) (arXiv 1806.10779).

    Means and variances are weighted sums of those of instance, layer and batch normalization. The
    weights are softmax(switch[:3]) for the means and softmax(switch[3:]) for the variances. Gamma,
    beta, and the running statistics are those of BatchNorm2d.
    """

    def __init__(self, c):
        super().__init__(c)
        self.switch = nn.Parameter(torch.ones(6))

    def forward(self, x):
        features = x.to(self.weight.dtype)
        mean_in = features.mean((2, 3), keepdim=True)               # (B, C, 1, 1)
        square_in = features.square().mean((2, 3), keepdim=True)    # (B, C, 1, 1), of the squares
        var_in = variance(mean_in, square_in)
        mean_ln = mean_in.mean(1, keepdim=True)                     # (B, 1, 1, 1)
        var_ln = variance(mean_ln, square_in.mean(1, keepdim=True))
        if self.training:
            mean_bn = mean_in.mean(0, keepdim=True)                 # (1, C, 1, 1)
            var_bn = variance(mean_bn, square_in.mean(0, keepdim=True))
            self.running_mean.lerp_(mean_bn.detach().flatten(), self.momentum)
            # The biased variance, unlike BatchNorm's.
            self.running_var.lerp_(var_bn.detach().flatten(), self.momentum)
        else:
            mean_bn = self.running_mean[:, None, None]
            var_bn = self.running_var[:, None, None]
        mean_weights = self.switch[:3].softmax(0)
        var_weights = self.switch[3:].softmax(0)
        mean = mean_weights[0] * mean_in + mean_weights[1] * mean_ln + mean_weights[2] * mean_bn
        var = var_weights[0] * var_in + var_weights[1] * var_ln + var_weights[2] * var_bn
        scale = self.weight[:, None, None] * (var + self.eps).rsqrt()
        shift = self.bias[:, None, None] - mean * scale
        return torch.addcmul(shift, features, scale).to(x.dtype)


def variance(mean, mean_square):
    """E[x^2] - E[x]^2, which round-off must not make negative."""
    return (mean_square - mean.square()).clamp(min=0)


class WeightNormConv2d(nn.Conv2d):
    """Convolution with weights gain v / |v| and a bias (Salimans and Kingma, arXiv 1602.07868).

    `weight` is v, (c_out, c_in, k, k); gain and bias are (c_out,).
    """

    def __init__(self, c_in, c_out, kernel_size, stride, padding):
        super().__init__(c_in, c_out, kernel_size, stride, padding)
        self.gain = nn.Parameter(torch.ones(c_out))

    def direction_norm(self):
        """|v| of each output channel, (c_out,)."""
        return torch.linalg.vector_norm(self.weight, dim=(1, 2, 3))

    def forward(self, x):
        scale = self.gain / self.direction_norm()
        weight = self.weight * scale[:, None, None, None]
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


# The layer that follows a convolution of c output channels. `initialize` draws its weight and bias,
# both (c,); its other parameters and its buffers keep the values that its constructor gives them.
NORMS = {
    "batch": nn.BatchNorm2d,
    "layer": layer_norm,
    "instance": instance_norm,
    "group": group_norm,
    "weight": nn.Identity,   # the convolution does it: WeightNormConv2d
    "switchable": SwitchNorm2d,
}
