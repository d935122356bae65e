"""Tests: pytest -q (two minutes on two cores, no network), and with SIGKILLs: pytest -q -k slow.

Set CIFAR10_DIR to the folder that holds cifar-10-batches-py to run the tests on real images, too.
"""
import concurrent.futures
import errno
import hashlib
import http.client
import io
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import platform
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import analyze
import models
import prune
import train

HERE = pathlib.Path(__file__).parent
RESULTS = sorted((HERE / "results").glob("*.json"))
CPU = torch.device("cpu")
torch.set_num_threads(min(2, torch.get_num_threads()))   # for small networks

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
real_images = pytest.mark.skipif("CIFAR10_DIR" not in os.environ, reason="CIFAR10_DIR is not set")
slow = pytest.mark.skipif("'slow' not in config.option.keyword", reason="slow: pytest -q -k slow")

# A network, data and batches that a CPU trains on in a second.
SMALL = ["--arch", "resnet8", "--dataset", "synthetic", "--device", "cpu", "--batch-size", "16",
         "--epochs", "3"]
(TRAIN_IMAGES, TRAIN_LABELS), (TEST_IMAGES, TEST_LABELS) = train.synthetic_data(0)

# --- what the tests share

def batch(n=16, first=0, dtype=torch.float32):
    """Normalized training images (n, 3, 32, 32) and their labels (n,)."""
    images = TRAIN_IMAGES[first:first + n]
    labels = TRAIN_LABELS[first:first + n]
    return train.normalize(images).to(dtype), labels

def command_line(*words):
    """The arguments of train.py with nothing but these words."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *map(str, words)])
        return train.parse_command_line()

def arguments(*words):
    """The arguments of train.py for a resnet8 in fp32 on the CPU, and whatever `words` say."""
    return command_line("--arch", "resnet8", "--amp", "off", "--device", "cpu", *words)

def options_of(args):
    """The options that a checkpoint of these arguments would hold."""
    return {name: getattr(args, name) for name in train.OPTIONS}

def built(*words, dtype=torch.float32):
    """The network of these words, in training mode."""
    return train.build(options_of(arguments(*words))).to(dtype).train()

def prepared(*words, dtype=torch.float32):
    """(model, step, optimizer, scaler) of these words; step takes images and labels."""
    args = arguments(*words)
    model = built(*words, dtype=dtype).eval()   # as load_checkpoint returns it
    optimizer, scaler = train.prepare(model, args)

    def step(images, labels):
        if args.plain:
            images = images.contiguous()
        return train.train_step(model, optimizer, scaler, args.amp, images, labels)
    return model, step, optimizer, scaler

def trained_vector(model):
    """All parameters that train, as one vector."""
    vectors = [p.detach().flatten() for p in train.trained_parameters(model)]
    return torch.cat(vectors)

def run_script(script, *words):
    """Run the command line of a script in this process. Returns the exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, words)])
        try:
            train.run_cli(script.main)
            return 0
        except SystemExit as stop:
            return stop.code

def error_of(capsys, status, script, *words):
    """The line on stderr of a command that fails with this status. argparse prints usage above."""
    assert run_script(script, *words) == status
    *usage, line = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{script.__name__}.py: error: ")
    if usage:
        assert status == 2 and usage[0].startswith("usage: ")
    return line

def raising(error):
    """A function that raises this error whatever it is given."""
    def function(*args, **kwargs):
        raise error
    return function

def tiny_data(*args):
    """40 training and 100 test images, whatever load_data is asked for."""
    return (TRAIN_IMAGES[:40], TRAIN_LABELS[:40]), (TEST_IMAGES[:100], TEST_LABELS[:100])

def contents_of(folder):
    """{name: content} of the files in a folder, which has no folders in it."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}

def files_here():
    return contents_of(pathlib.Path())

def epochs_of(path):
    """The epochs in a checkpoint."""
    _, checkpoint = train.load_checkpoint(path)
    return checkpoint["epochs"]

@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The scripts see 40 training and 100 test images, in an empty folder. Returns the data."""
    monkeypatch.setattr(train, "load_data", tiny_data)
    monkeypatch.setattr(prune, "load_data", tiny_data)
    monkeypatch.chdir(tmp_path)
    return tiny_data()

@pytest.fixture(autouse=True)
def interruptible():
    """Ctrl-C ends a script, also if the shell that started pytest in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)

@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """{name: content} of the files of a finished run, a.pt and a.json."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "load_data", tiny_data)
        patch.chdir(folder)
        assert run_script(train, *SMALL, "--bn-only", "--out", "a.pt") == 0
    return {file.name: file.read_bytes() for file in folder.iterdir()}

@pytest.fixture
def checkpoint(tiny, finished_run):
    """A finished run's a.pt and a.json in the current folder."""
    for name, content in finished_run.items():
        pathlib.Path(name).write_bytes(content)
    return pathlib.Path("a.pt")

def functional_forward(model, x):
    """The network from its tensors alone: He et al.'s basic blocks in torch.nn.functional."""
    def bn(x, norm):
        mean = norm.running_mean.clone()
        var = norm.running_var.clone()
        return F.batch_norm(x, mean, var, norm.weight, norm.bias, norm.training, 0.1, 1e-5)

    x = F.relu(bn(F.conv2d(x, model.conv.weight, padding=1), model.bn))
    for stage in (model.stage1, model.stage2, model.stage3):
        for i, block in enumerate(stage):
            stride = 2 if i == 0 and stage is not model.stage1 else 1
            y = F.conv2d(x, block.conv1.weight, stride=stride, padding=1)
            y = F.relu(bn(y, block.bn1))
            y = bn(F.conv2d(y, block.conv2.weight, padding=1), block.bn2)
            if stride == 2:
                x = bn(F.conv2d(x, block.shortcut[0].weight, stride=2), block.shortcut[1])
            x = F.relu(x + y)
    return F.linear(x.mean((2, 3)), model.fc.weight, model.fc.bias)

@torch.no_grad()
def functional_accuracy(model, images, labels):
    predictions = functional_forward(model, train.normalize(images)).argmax(1)
    return 100 * (predictions == labels).double().mean().item()

# --- models

# The paper's table: all parameters and BatchNorm's.
COUNTS = {
    "resnet14": (175_258, 1_120),
    "resnet32": (466_906, 2_464),
    "resnet56": (855_770, 4_256),
    "resnet110": (1_730_714, 8_288),
    "resnet218": (3_480_602, 16_352),
    "resnet434": (6_980_378, 32_480),
    "resnet866": (13_979_930, 64_736),
    "wrn14-2": (696_618, 2_240),
    "wrn14-4": (2_777_674, 4_480),
    "wrn14-8": (11_093_130, 8_960),
    "wrn14-16": (44_337_418, 17_920),
    "wrn14-32": (177_279_498, 35_840),
}

@pytest.mark.parametrize("arch", COUNTS)
def test_parameter_counts(arch):
    """Each network has the counts of the paper's table. Half of BatchNorm's are gammas."""
    total, bn = COUNTS[arch]
    width = 1
    if arch.startswith("wrn14-"):
        width = int(arch.removeprefix("wrn14-"))
    shortcut = (16 * 32 + 32 * 64) * width ** 2
    output = 64 * width * 10 + 10
    counts = train.count_parameters(models.empty_model(arch))
    expected = {
        "all": total,
        "conv": total - bn - shortcut - output,
        "bn": bn,
        "gamma": bn // 2,
        "beta": bn // 2,
        "shortcut": shortcut,
        "shortcut-bn": 2 * (32 + 64) * width,
        "output": output,
        "trained": total,
    }
    assert {name: counts[name] for name in expected} == expected

@pytest.mark.parametrize("arch, seed, sums", [
    ("resnet14", 0, [10543.398608782, 167.217023304]),
    ("wrn14-2", 7, [29478.862949638, 268.550731771]),
    ("resnet866", 0, [753849.633340992, 8139.451380297]),
])
def test_pinned_initial_values(arch, seed, sums):
    """A name and a seed give the initial values of the first release: |w|, and w by position."""
    model = models.build_model(arch, seed)
    assert models.fingerprint(model.parameters()) == pytest.approx(sums, rel=1e-9)

@pytest.mark.parametrize("arch", ["resnet14", "wrn8-2"])
@pytest.mark.parametrize("training", [True, False])
def test_forward_pass(arch, training):
    """The network computes what He et al. describe, written in torch.nn.functional."""
    model = models.build_model(arch, 3).double().train(training)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):   # so that nothing it reads is 0 or 1
            module.bias.data.normal_()
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    x = random_images()
    torch.testing.assert_close(model(x), functional_forward(model, x), rtol=1e-10, atol=1e-10)

def random_images():
    rng = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=rng)

# --- normalizations

@pytest.mark.parametrize("norm, trained", [
    ("batch", 1_120),
    ("layer", 1_120),
    ("instance", 1_120),
    ("group", 1_120),
    ("weight", 1_120),
    ("switchable", 1_120 + 15 * 6),
])
def test_parameters_of_normalizations(norm, trained):
    """resnet14's 15 layers have 560 gammas and 560 betas; if switchable, six scalars each, too."""
    model = built("--bn-only", "--arch", "resnet14", "--norm", norm)
    assert len(trained_vector(model)) == trained
    assert len(prune.gammas(model)) == 560

def network_with_betas(norm):
    """A network in float64, in training mode, in which beta isn't zero."""
    model = models.build_model("resnet8", 0, norm).double()
    for _, _, beta in models.gammas_and_betas(model):
        beta.data.normal_()
    return model

def scaled_and_shifted(x, norm):
    """gamma x + beta."""
    return norm.weight[:, None, None] * x + norm.bias[:, None, None]

def assert_equal_up_to_round_off(result, expected):
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)

def test_batch_norm_formula():
    """Statistics of each feature over images and positions (arXiv 1502.03167)."""
    model = network_with_betas("batch")
    x = model.conv(random_images())
    mean = x.mean((0, 2, 3), keepdim=True)
    var = x.var((0, 2, 3), correction=0, keepdim=True)
    normalized = (x - mean) / (var + 1e-5).sqrt()
    expected = scaled_and_shifted(normalized, model.bn)
    assert_equal_up_to_round_off(model.bn(x), expected)

@pytest.mark.parametrize("norm, groups", [("layer", 1), ("instance", 16), ("group", 8)])
def test_group_norm_formulas(norm, groups):
    """Statistics of each image over a group of its 16 features (arXiv 1803.08494)."""
    model = network_with_betas(norm)
    x = model.conv(random_images())
    grouped = x.view(4, groups, -1)
    mean = grouped.mean(2, keepdim=True)
    var = grouped.var(2, correction=0, keepdim=True)
    normalized = ((grouped - mean) / (var + 1e-5).sqrt()).view(4, 16, 32, 32)
    expected = scaled_and_shifted(normalized, model.bn)
    assert_equal_up_to_round_off(model.bn(x), expected)

def test_switchable_norm_formula():
    """Weighted sums of the statistics of instance, layer and batch norm (arXiv 1806.10779)."""
    model = network_with_betas("switchable")
    x = model.conv(random_images())
    model.bn.switch.data.normal_()
    for_mean = model.bn.switch[:3].softmax(0)
    for_var = model.bn.switch[3:].softmax(0)
    mean = 0
    var = 0
    axes_of_norms = [(2, 3), (1, 2, 3), (0, 2, 3)]   # instance, layer, batch
    for i, axes in enumerate(axes_of_norms):
        mean = mean + for_mean[i] * x.mean(axes, keepdim=True)
        var = var + for_var[i] * x.var(axes, correction=0, keepdim=True)
    normalized = (x - mean) / (var + 1e-5).sqrt()
    expected = scaled_and_shifted(normalized, model.bn)
    assert_equal_up_to_round_off(model.bn(x), expected)

def test_weight_norm_formula():
    """Convolution with gain v / |v| and a bias, which nothing follows (arXiv 1602.07868)."""
    model = network_with_betas("weight")
    v = model.conv.weight
    length = v.square().sum((1, 2, 3)).sqrt()
    scale = model.conv.gain / length
    weight = scale[:, None, None, None] * v
    x = random_images()
    expected = F.conv2d(x, weight, model.conv.bias, padding=1)
    assert_equal_up_to_round_off(model.bn(model.conv(x)), expected)

@pytest.mark.parametrize("norm", ["batch", "switchable"])
def test_evaluation_takes_the_running_statistics(norm):
    """If they are those of the batch, evaluation computes the same as training."""
    model = network_with_betas(norm)
    x = model.conv(random_images()).detach()
    expected = model.bn(x)
    model.bn.running_mean.copy_(x.mean((0, 2, 3)))
    model.bn.running_var.copy_(x.var((0, 2, 3), correction=0))
    assert_equal_up_to_round_off(model.eval().bn(x), expected)

def test_switchable_norm_moves_its_running_statistics():
    """By a tenth of the way, from 0 and 1, to those of the batch."""
    model = network_with_betas("switchable")
    x = model.conv(random_images()).detach()
    model.bn(x)
    mean = x.mean((0, 2, 3))
    var = x.var((0, 2, 3), correction=0)
    assert_equal_up_to_round_off(model.bn.running_mean, 0.1 * mean)
    assert_equal_up_to_round_off(model.bn.running_var, 0.9 + 0.1 * var)

class SizeNorm(nn.Module):
    """A normalization of one's own: divides each feature by a running mean of its magnitude."""

    def __init__(self, c):
        super().__init__()
        self.strength = nn.Parameter(torch.full((c,), 0.5))
        self.register_buffer("running_size", torch.full((c,), 2.0))

    def forward(self, x):
        if self.training:
            size = x.detach().abs().mean((0, 2, 3))
            self.running_size.lerp_(size, 0.1)
        return x * (self.strength / self.running_size)[:, None, None]

@pytest.fixture
def size_norm(monkeypatch):
    """SizeNorm has a row in NORMS."""
    monkeypatch.setitem(models.NORMS, "size", SizeNorm)

def test_a_norm_of_ones_own_keeps_its_constructors_values(size_norm):
    """Only its weight and bias are drawn, as the comment above NORMS says."""
    model = models.build_model("resnet8", 0, "size")
    for module in model.modules():
        if isinstance(module, SizeNorm):
            assert module.strength.eq(0.5).all()
            assert module.running_size.eq(2).all()

def test_a_norm_of_ones_own_trains_and_is_saved(size_norm, tiny):
    """With its buffer: the network from the checkpoint has the accuracy that the run recorded."""
    words = [*SMALL, "--norm", "size", "--bn-only", "--out", "a.pt"]
    assert run_script(train, *words) == 0
    model, checkpoint = train.load_checkpoint("a.pt")
    assert model.bn.strength.requires_grad
    assert model.bn.strength.ne(0.5).all()
    assert model.bn.running_size.ne(2).all()
    images, labels = tiny[1]
    accuracy = train.evaluate(model, images, labels, "off")
    assert accuracy == checkpoint["epochs"][-1]["test_accuracy"]

# --- initial values

def test_bn_inits():
    """gamma and beta are functions of the same draws, as OpenLTH names them. Other weights stay."""
    default = models.build_model("resnet8", 0)
    u = default.bn.weight   # from U(0, 1)
    zeros = torch.zeros(16)
    ones = torch.ones(16)
    expected = {
        "uniform": (u, zeros),
        "fixed": (ones, zeros),
        "oneone": (ones, ones),
        "positivenegative": (2 * u - 1, zeros),
    }
    for bn_init, (gamma, beta) in expected.items():
        model = models.build_model("resnet8", 0, bn_init=bn_init)
        torch.testing.assert_close(model.bn.weight, gamma)
        torch.testing.assert_close(model.bn.bias, beta)
        assert torch.equal(model.stage3[0].conv2.weight, default.stage3[0].conv2.weight)

def last_convolution(weight_init):
    """The initial weights of resnet8's last 3x3 convolution, (64, 576), and their std."""
    model = models.build_model("resnet8", 0, weight_init=weight_init)
    return model.stage3[0].conv2.weight.flatten(1), (2 / 576) ** 0.5

def test_binary_weights():
    """The signs of the default's weights times their std."""
    weight, std = last_convolution("binary")
    default, _ = last_convolution("kaiming_normal")
    torch.testing.assert_close(weight, std * default.sign())

def test_kaiming_uniform_weights():
    """U(-b, b), b = sqrt(3) std: by their quantiles."""
    weight, std = last_convolution("kaiming_uniform")
    quantiles = torch.linspace(0, 1, 5)
    in_units_of_b = weight.flatten() / (3 ** 0.5 * std)
    expected = 2 * quantiles - 1
    torch.testing.assert_close(in_units_of_b.quantile(quantiles), expected, rtol=0, atol=0.03)

def test_orthogonal_weights():
    """Orthonormal rows, or columns where there are more rows."""
    model = models.build_model("resnet8", 0, weight_init="orthogonal")
    wide = model.stage3[0].conv2.weight.flatten(1)         # (64, 576)
    tall = model.stage3[0].shortcut[0].weight.flatten(1)   # (64, 32)
    torch.testing.assert_close(wide @ wide.T, torch.eye(64), rtol=0, atol=1e-5)
    torch.testing.assert_close(tall.T @ tall, torch.eye(32), rtol=0, atol=1e-5)

def test_weight_norm_starts_with_the_gammas_of_batch_norm():
    """As factors of directions: gain = gamma |v|, with v the weights that batch norm would have."""
    batch_norm = models.build_model("resnet8", 0)
    weight_norm = models.build_model("resnet8", 0, "weight")
    length = batch_norm.conv.weight.square().sum((1, 2, 3)).sqrt()
    assert torch.equal(weight_norm.conv.weight, batch_norm.conv.weight)
    torch.testing.assert_close(weight_norm.conv.gain, batch_norm.bn.weight * length)

@pytest.mark.parametrize("option, name", [
    *[("norm", name) for name in models.NORMS],
    *[("bn_init", name) for name in models.BN_INITS],
    *[("weight_init", name) for name in models.WEIGHT_INITS],
])
def test_initial_values_come_from_the_seed_alone(option, name):
    """They are finite, and PyTorch's own generator has no part in them."""
    torch.manual_seed(1)
    model = models.build_model("resnet8", 0, **{option: name})
    torch.manual_seed(2)
    again = models.build_model("resnet8", 0, **{option: name})
    values = [*model.parameters(), *model.buffers()]
    same_values = [*again.parameters(), *again.buffers()]
    for tensor, same_tensor in zip(values, same_values, strict=True):
        assert tensor.isfinite().all()
        assert torch.equal(tensor, same_tensor)

# --- data

def test_augmentation_is_uniform():
    """Every image once, and every crop and flip equally often."""
    order, offset, flip = train.draw_augmentation(50_000, torch.Generator().manual_seed(0))
    assert torch.equal(order.sort().values, torch.arange(50_000))
    for draws, n in [(offset[:, 0], 9), (offset[:, 1], 9), (flip, 2)]:
        share = draws.long().bincount() / 50_000
        assert len(share) == n
        assert (share - 1 / n).abs().max() < 0.01   # 4 standard deviations or more

@pytest.fixture
def cifar10(monkeypatch):
    """torchvision's class CIFAR10, without a network."""
    dataset = train.import_cifar10()
    monkeypatch.setattr("urllib.request.urlopen", raising(OSError("no route to host")))
    return dataset

@pytest.mark.parametrize("damaged", [
    "x/cifar-10-batches-py/data_batch_1",
    "x/cifar-10-python.tar.gz",
])
@pytest.mark.parametrize("data_dir", ["x", "x/cifar-10-batches-py"])
def test_damaged_cifar10_offline_is_one_line(damaged, data_dir, cifar10, tmp_path, capsys):
    """It names the folder, the reason, where to fetch the data, and how to go on."""
    (tmp_path / "x/cifar-10-batches-py").mkdir(parents=True)
    (tmp_path / damaged).write_bytes(b"half")
    data_dir = tmp_path / data_dir
    words = ["--arch", "resnet8", "--device", "cpu", "--out", tmp_path / "a.pt"]
    line = error_of(capsys, 1, train, *words, "--data-dir", data_dir)
    reason = f"no intact CIFAR-10 in {data_dir}, and it can't be put there (no route to host)"
    assert line.startswith(f"train.py: error: {reason}: fetch {cifar10.url} ")
    assert line.endswith(" --data-dir")
    assert (tmp_path / damaged).read_bytes() == b"half"

def test_folder_that_cannot_be_written_is_one_line(cifar10, tmp_path, monkeypatch):
    """As a read-only folder without the batches."""
    monkeypatch.setattr(pathlib.Path, "mkdir", raising(PermissionError(13, "Permission denied")))
    with pytest.raises(train.UserError, match=r"no intact CIFAR-10 in .*Permission denied.*fetch"):
        train.load_data("cifar10", tmp_path, 0)

def test_host_that_answers_rubbish_is_one_line(cifar10, tmp_path, monkeypatch):
    """As the login page of a hotel's network."""
    monkeypatch.setattr("urllib.request.urlopen", raising(http.client.BadStatusLine("rubbish")))
    with pytest.raises(train.UserError, match="no intact CIFAR-10 in .*rubbish.*fetch"):
        train.load_data("cifar10", tmp_path, 0)

@pytest.mark.parametrize("batches, data_dir", [
    ("x/cifar-10-batches-py", "x"),
    ("any name", "any name"),
])
def test_data_dir_is_the_batches_folder_or_its_parent(batches, data_dir, tmp_path, monkeypatch):
    """The batches are found by content, and nothing is fetched."""
    folders = []
    monkeypatch.setattr(train, "read_batches", folders.append)
    (tmp_path / batches).mkdir(parents=True)
    (tmp_path / batches / "data_batch_1").touch()
    train.load_cifar10(tmp_path / data_dir)
    assert folders == [tmp_path / batches]

@real_images
def test_data_dir_may_be_a_link_to_the_batches(cifar10, tmp_path):
    """A link of any name. Nothing is fetched."""
    batches = pathlib.Path(os.environ["CIFAR10_DIR"]).absolute() / "cifar-10-batches-py"
    (tmp_path / "x").symlink_to(batches)
    train_split, test_split = train.load_data("cifar10", tmp_path / "x", 0)
    train_images, train_labels = train_split
    test_images, test_labels = test_split
    assert train_images.shape == (50_000, 32, 32, 3)
    assert test_images.shape == (10_000, 32, 32, 3)
    assert torch.equal(train_labels.bincount(), torch.full((10,), 5_000))
    assert torch.equal(test_labels.bincount(), torch.full((10,), 1_000))

def test_archive_is_unpacked_without_a_download(cifar10, tmp_path, monkeypatch, capsys):
    """If the intact archive lies in --data-dir."""
    (tmp_path / "made/cifar-10-batches-py").mkdir(parents=True)
    (tmp_path / "made/cifar-10-batches-py/data_batch_1").write_bytes(b"images")
    archive = shutil.make_archive(tmp_path / "cifar-10-python", "gztar", tmp_path / "made")
    md5 = hashlib.md5(pathlib.Path(archive).read_bytes()).hexdigest()
    monkeypatch.setattr(cifar10, "tgz_md5", md5)
    folder = tmp_path / "batches"
    train.fetch_batches(tmp_path, folder)
    assert contents_of(folder) == {"data_batch_1": b"images"}
    assert "downloading" not in capsys.readouterr().out

@pytest.fixture
def downloads(cifar10, monkeypatch):
    """Downloads put two small files where they are told, and add their timeout to this list."""
    timeouts = []

    def download(url, source, private, filename, md5):
        assert url == cifar10.url
        timeouts.append(socket.getdefaulttimeout())
        batches = pathlib.Path(private, "cifar-10-batches-py")
        batches.mkdir()
        (batches / "data_batch_1").write_bytes(b"images")
        (batches / "test_batch").write_bytes(b"others")

    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", download)
    return timeouts

def test_batches_are_moved_into_the_folder(downloads, tmp_path, capsys):
    """Nothing else is left in it, and a line said that the download began."""
    folder = tmp_path / "batches"
    train.fetch_batches(tmp_path, folder)
    assert contents_of(folder) == {"data_batch_1": b"images", "test_batch": b"others"}
    assert capsys.readouterr().out.startswith("downloading CIFAR-10 (170 MB) from https://")

def test_batches_that_another_process_put_there_are_no_obstacle(downloads, tmp_path):
    """Any number of processes may fetch them at once: a file is replaced by the same file."""
    folder = tmp_path / "batches"
    train.fetch_batches(tmp_path, folder)
    train.fetch_batches(tmp_path, folder)
    assert contents_of(folder) == {"data_batch_1": b"images", "test_batch": b"others"}

def test_a_download_never_touches_a_batch_before_it_is_whole(downloads, tmp_path, monkeypatch):
    """What another process reads in the folder stays, if a download breaks off."""
    folder = tmp_path / "batches"
    train.fetch_batches(tmp_path, folder)

    def breaks_off(url, source, private, filename, md5):
        pathlib.Path(private, "data_batch_1").write_bytes(b"ima")
        raise OSError("timed out")

    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", breaks_off)
    with pytest.raises(train.UserError, match="timed out"):
        train.fetch_batches(tmp_path, folder)
    assert contents_of(folder) == {"data_batch_1": b"images", "test_batch": b"others"}

def test_download_gives_up_after_a_silent_minute(downloads, tmp_path, monkeypatch):
    """By the timeout of sockets, which is put back afterwards, also if the download fails."""
    before = socket.getdefaulttimeout()
    train.fetch_batches(tmp_path, tmp_path)
    assert downloads == [60]
    assert socket.getdefaulttimeout() == before
    monkeypatch.setattr(os, "replace", raising(OSError("no space")))
    with pytest.raises(train.UserError):
        train.fetch_batches(tmp_path, tmp_path)
    assert downloads == [60, 60]
    assert socket.getdefaulttimeout() == before

# --- defaults of a notebook, and switches

@pytest.fixture
def defaults_put_back():
    """PyTorch's default dtype and device are those of a fresh process again after the test."""
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)

def default_to_float64():
    torch.set_default_dtype(torch.float64)

def default_to_meta():
    torch.set_default_device("meta")

set_defaults = pytest.mark.parametrize("set_default", [default_to_float64, default_to_meta])

def network_and_batch():
    """All tensors of networks, an augmented batch, and fingerprints, as a list."""
    switchable = models.build_model("resnet8", 0, "switchable", "oneone", "kaiming_uniform")
    weight_norm = models.build_model("resnet8", 0, "weight", "uniform", "orthogonal")
    random = train.build(options_of(arguments("--train", "random")))
    tensors = []
    for model in [switchable, weight_norm, random]:
        tensors += [*model.parameters(), *model.buffers()]
    order, offset, flip = train.draw_augmentation(40, torch.Generator("cpu").manual_seed(0))
    padded = F.pad(TRAIN_IMAGES[:40], (0, 0, 4, 4, 4, 4))
    augmented_images = train.augment(padded, order, offset, flip)
    train.row_constants.cache_clear()   # so that it computes them again
    tensors += [order, offset, flip, augmented_images, train.normalize(augmented_images)]
    return tensors, models.fingerprint(tensors)

@set_defaults
def test_notebooks_defaults_do_not_matter(set_default, defaults_put_back):
    """After torch.set_default_dtype or set_default_device, networks and batches are the same."""
    expected_tensors, expected_fingerprint = network_and_batch()
    set_default()
    tensors, fingerprint = network_and_batch()
    assert fingerprint == expected_fingerprint
    for tensor, expected in zip(tensors, expected_tensors, strict=True):
        assert tensor.device == CPU
        assert tensor.dtype == expected.dtype
        assert torch.equal(tensor, expected)

@set_defaults
def test_notebooks_defaults_do_not_matter_to_a_run(set_default, tiny, defaults_put_back):
    """It gives the same checkpoint."""
    words = [*SMALL, "--bn-only", "--epochs", 1, "--out"]
    assert run_script(train, *words, "a.pt") == 0
    set_default()
    assert run_script(train, *words, "b.pt") == 0
    model, checkpoint = train.load_checkpoint("a.pt")
    other, other_checkpoint = train.load_checkpoint("b.pt")
    assert checkpoint["epochs"][0]["train_loss"] == other_checkpoint["epochs"][0]["train_loss"]
    assert torch.equal(trained_vector(model), trained_vector(other))

@pytest.fixture
def tf32():
    """fp32 may be computed as TF32, as in a notebook that wants speed. Put back after the test."""
    matmul = torch.get_float32_matmul_precision()
    cudnn = torch.backends.cudnn.allow_tf32
    convolutions = torch.backends.cudnn.conv.fp32_precision
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    yield
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = cudnn
    torch.backends.cudnn.conv.fp32_precision = convolutions

def fp32_switches():
    """Reading them raises an exception where old and new ones disagree."""
    matmul = torch.get_float32_matmul_precision()
    return matmul, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.conv.fp32_precision

def test_importing_train_leaves_the_switches_alone(tf32):
    """As someone expects who uses load_checkpoint in a program of his own."""
    before = fp32_switches()
    runpy.run_path(train.__file__)
    assert fp32_switches() == before == ("high", True, "tf32")

def test_a_run_computes_fp32_in_full(tf32):
    """Not in TF32."""
    prepared()
    assert fp32_switches() == ("highest", False, "ieee")

# --- what trains

# The groups of resnet8's parameters by their names, which decide what the tests expect.
GROUP_NAMES = {
    "conv": r"(stage\d\.0\.)?conv\d?\.weight",
    "gamma": r"(stage\d\.0\.)?(bn\d?|shortcut\.1)\.weight",
    "beta": r"(stage\d\.0\.)?(bn\d?|shortcut\.1)\.bias",
    "bn": r"(stage\d\.0\.)?(bn\d?|shortcut\.1)\.(weight|bias)",
    "shortcut": r"stage\d\.0\.shortcut\.0\.weight",
    "shortcut-bn": r"stage\d\.0\.shortcut\.1\.(weight|bias)",
    "output": r"fc\.(weight|bias)",
}

def names_that_train(mode):
    """A regular expression of the names of resnet8's parameters that `--train mode` trains."""
    if mode == "all":
        mode = "conv+bn+shortcut+output"
    if mode == "not-bn":
        mode = "conv+shortcut+output"
    return "|".join(GROUP_NAMES[group] for group in mode.split("+"))

def combinations_of_groups():
    """All 15 of conv, bn, shortcut and output."""
    combinations = []
    for n in [1, 2, 3, 4]:
        for groups in itertools.combinations(["conv", "bn", "shortcut", "output"], n):
            combinations.append("+".join(groups))
    return combinations

def three_steps(*words):
    """resnet8 before and after three steps (the first has no momentum) in float64."""
    words = [*words, "--weight-decay", 0.1]
    before = built(*words, dtype=torch.float64)
    model, step, _, _ = prepared(*words, dtype=torch.float64)
    for _ in range(3):
        step(*batch(dtype=torch.float64))
    return before, model

def assert_exactly_these_change(names, before, model):
    """Those parameters whose whole names match the regular expression."""
    after = dict(model.named_parameters())
    for name, parameter in before.named_parameters():
        changed = after[name] != parameter
        if re.fullmatch(names, name):
            share = changed.double().mean()
            assert share > 0.9, name   # with LayerNorm, a feature can be off at first
        else:
            assert not changed.any(), name

MODES = ["all", "not-bn", *combinations_of_groups(), "gamma", "beta", "gamma+output", "beta+conv",
         "conv+gamma+shortcut", "shortcut-bn", "shortcut+shortcut-bn+output"]

@pytest.mark.parametrize("mode", MODES)
def test_exactly_the_right_parameters_change(mode):
    """Those of the groups that --train names; the others keep every bit."""
    before, model = three_steps("--train", mode)
    assert_exactly_these_change(names_that_train(mode), before, model)

@pytest.mark.parametrize("norm, mode, names", [
    ("layer", "bn", GROUP_NAMES["bn"]),
    ("instance", "bn", GROUP_NAMES["bn"]),
    ("group", "bn", GROUP_NAMES["bn"]),
    ("group", "gamma", GROUP_NAMES["gamma"]),
    ("switchable", "bn", r".*(bn\d?|shortcut\.1)\.(weight|bias|switch)"),
    ("switchable", "gamma", GROUP_NAMES["gamma"]),
    ("switchable", "beta", GROUP_NAMES["beta"]),
    ("weight", "bn", r".*(conv\d?|shortcut\.0)\.(gain|bias)"),
    ("weight", "gamma", r".*(conv\d?|shortcut\.0)\.gain"),
    ("weight", "beta", r".*(conv\d?|shortcut\.0)\.bias"),
    ("weight", "shortcut-bn", r".*shortcut\.0\.(gain|bias)"),
    ("weight", "not-bn", r".*(conv\d?|shortcut\.0)\.weight|fc\.(weight|bias)"),
])
def test_exactly_the_right_parameters_change_with_other_norms(norm, mode, names):
    """The group bn is the normalization's own parameters, whichever they are."""
    before, model = three_steps("--train", mode, "--norm", norm)
    assert_exactly_these_change(names, before, model)

def test_random_changes_two_weights_per_channel():
    """Two in every output channel of all nine convolutions, and nothing else."""
    _, model = three_steps("--train", "random")
    initial = models.build_model("resnet8", 0).double()
    convolutions = 0
    for name, module in initial.named_modules():
        if isinstance(module, nn.Conv2d):
            changed = model.get_submodule(name).whole_weight() != module.weight
            assert changed.flatten(1).sum(1).eq(2).all(), name
            convolutions += 1
    assert convolutions == 9
    after = dict(model.named_parameters())
    for name, parameter in initial.named_parameters():
        assert torch.equal(after[name], parameter), name

def test_pinned_places_of_the_random_weights():
    """A seed chooses the weights of the first release: a checkpoint holds their values alone."""
    model = built("--train", "random", "--arch", "resnet14")
    assert model.conv.chosen[:4].tolist() == [21, 25, 43, 49]
    assert model.stage3[1].conv2.chosen[-2:].tolist() == [36729, 36383]

def test_random_starts_as_the_same_network():
    """Which of its weights train doesn't change what it computes."""
    model = built("--train", "random", dtype=torch.float64)
    initial = models.build_model("resnet8", 0).double()
    x = random_images()
    torch.testing.assert_close(model(x), functional_forward(initial, x))

@pytest.mark.parametrize("text, spelling", [
    ("all", "all"),
    ("output+bn+conv+shortcut", "all"),
    ("not-bn", "not-bn"),
    ("output+conv+shortcut", "not-bn"),
    ("random", "random"),
    ("bn", "bn"),
    ("output+bn", "bn+output"),
    ("output+gamma", "gamma+output"),
    ("output+shortcut", "shortcut+output"),
    ("bn+conv", "conv+bn"),
    ("output+shortcut-bn+shortcut", "shortcut+shortcut-bn+output"),
])
def test_one_spelling_of_what_trains(text, spelling):
    """Presets by their names, groups in one order."""
    assert arguments("--train", text).train == spelling

@pytest.mark.parametrize("text", [
    "everything",
    "",
    "BN",
    "all+bn",
    "random+bn",
    "bn+bn",
    "gamma+gamma+beta",
])
def test_unknown_or_doubled_groups_are_refused(text, tiny, capsys):
    """By a line that lists the groups."""
    line = error_of(capsys, 2, train, *SMALL, "--train", text)
    assert line == (
        f"train.py: error: argument --train: {text}: not all, not-bn, random, "
        f"or some of {', '.join(train.GROUPS)} joined by +, each once")

@pytest.mark.parametrize("text", [
    "bn+gamma",
    "gamma+beta",
    "beta+output+gamma",
    "bn+shortcut-bn",
    "gamma+shortcut-bn",
    "shortcut-bn+beta",
])
def test_two_parts_of_bn_are_refused(text, tiny, capsys):
    """So that what trains has one name. With --norm switchable, bn is more than gamma and beta."""
    line = error_of(capsys, 2, train, *SMALL, "--train", text)
    assert line == (f"train.py: error: argument --train: {text}: "
                    f"only one of {', '.join(train.PARTS_OF_BN)}")

@pytest.mark.parametrize("mode, count", [
    ("all", 175_258),
    ("bn", 1_120),
    ("gamma", 560),
    ("beta", 560),
    ("not-bn", 174_138),
    ("random", 1_120),
    ("shortcut+output", 3_210),
    ("shortcut+shortcut-bn+output", 3_402),
    ("conv+bn", 172_048),
])
def test_trained_counts(mode, count):
    """Of resnet14, from the paper's table: what trains, and what the record says of it."""
    model = built("--train", mode, "--arch", "resnet14")
    assert len(trained_vector(model)) == count
    assert train.count_parameters(model)["trained"] == count

def test_convolutions_of_other_sizes_train_with_their_group():
    """Someone who changes the network has all of it trained by --train all."""
    model = models.ResNet(8)
    model.conv = nn.Conv2d(3, 16, 5, padding=2, bias=False)
    model.stage2[0].shortcut[0] = nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False)
    shapes = [parameter.shape for parameter in train.parameters_of(model, ["shortcut"])]
    assert shapes == [(32, 16, 3, 3), (64, 32, 1, 1)]
    in_all = train.parameters_of(model, train.PRESETS["all"])
    assert len(in_all) == len(list(model.parameters()))

def test_random_does_not_go_with_weight_norm(tiny, capsys):
    """Its convolutions compute their weights, so there are none to choose from."""
    line = error_of(capsys, 2, train, *SMALL, "--train", "random", "--norm", "weight")
    assert line == "train.py: error: --train random does not go with --norm weight"

# --- training

def test_steps_are_those_of_sgd():
    """v = 0.9 v + g + decay w; w = w - lr v, written out in float64 for three steps."""
    model, step, _, _ = prepared("--bn-only", dtype=torch.float64)
    reference = built("--bn-only", dtype=torch.float64)
    gammas_betas = train.trained_parameters(reference)
    velocities = [torch.zeros_like(w) for w in gammas_betas]
    for i in range(3):
        images, labels = batch(16, 16 * i, torch.float64)
        logits = functional_forward(reference, images)
        expected_loss = -logits.log_softmax(1)[range(16), labels].mean()
        gradients = torch.autograd.grad(expected_loss, gammas_betas)
        loss, correct = step(images, labels)
        torch.testing.assert_close(loss, expected_loss)
        assert correct == (logits.argmax(1) == labels).sum()
        for w, v, g in zip(gammas_betas, velocities, gradients):
            v.mul_(0.9).add_(g + 1e-4 * w.detach())
            w.data -= 0.1 * v
    parameters = train.trained_parameters(model)
    torch.testing.assert_close(parameters, gammas_betas, rtol=1e-9, atol=1e-12)

def test_learning_rate_drops_after_epochs_80_and_120():
    """The milestones of the paper's recipe, as OpenLTH has it."""
    rates = [train.learning_rate(0.1, epoch, 160) for epoch in range(160)]
    assert rates == [0.1] * 80 + [0.01] * 40 + [0.001] * 40

def augmented(image, offset, flip):
    """An image (32, 32, 3) padded by 4 black pixels, cropped, flipped, normalized; (3, 32, 32)."""
    y, x = offset.tolist()
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
    crop = padded[y:y + 32, x:x + 32]
    if flip:
        crop = crop[:, ::-1]
    imagenet_mean = [0.485, 0.456, 0.406]
    imagenet_std = [0.229, 0.224, 0.225]
    normalized = (crop / 255 - imagenet_mean) / imagenet_std
    return torch.tensor(normalized, dtype=torch.float32).permute(2, 0, 1)

def run_of_four_epochs(monkeypatch):
    """Train on 40 images in batches of 16.

    Returns the epochs in the checkpoint, and for each epoch a list of what its three steps were
    given and returned, a dict each.
    """
    steps = []
    original_step = train.train_step

    def watched_step(model, optimizer, scaler, amp, images, labels):
        loss, correct = original_step(model, optimizer, scaler, amp, images, labels)
        steps.append({
            "lr": optimizer.param_groups[0]["lr"],
            "images": images,
            "labels": labels,
            "loss": loss.item(),
            "correct": correct.item(),
        })
        return loss, correct

    monkeypatch.setattr(train, "train_step", watched_step)
    assert run_script(train, *SMALL, "--epochs", 4, "--seed", 5, "--out", "a.pt") == 0
    steps_of_epochs = [steps[first:first + 3] for first in range(0, 12, 3)]
    return epochs_of("a.pt"), steps_of_epochs

def test_every_epoch_has_each_image_once(tiny, monkeypatch):
    """In a new order, with its label, its own crop and flip. The last batch is smaller."""
    _, steps_of_epochs = run_of_four_epochs(monkeypatch)
    all_images, all_labels = tiny[0]
    rng = torch.Generator().manual_seed(5)
    for steps in steps_of_epochs:
        images = torch.cat([step["images"] for step in steps])
        labels = torch.cat([step["labels"] for step in steps])
        order, offset, flip = train.draw_augmentation(40, rng)
        expected = [augmented(*draws) for draws in zip(all_images[order], offset, flip)]
        torch.testing.assert_close(images, torch.stack(expected), rtol=1e-5, atol=1e-5)
        assert torch.equal(labels, all_labels[order])
        assert [len(step["labels"]) for step in steps] == [16, 16, 8]

def test_every_step_has_the_learning_rate_of_its_epoch(tiny, monkeypatch):
    """In the optimizer as in the record."""
    epochs, steps_of_epochs = run_of_four_epochs(monkeypatch)
    assert [epoch["lr"] for epoch in epochs] == [0.1, 0.1, 0.01, 0.001]
    for epoch, steps in zip(epochs, steps_of_epochs):
        assert [step["lr"] for step in steps] == [epoch["lr"]] * 3

def test_an_epochs_loss_and_accuracy_are_those_of_its_steps(tiny, monkeypatch):
    """The mean loss over images, not over batches; the accuracy in percent."""
    epochs, steps_of_epochs = run_of_four_epochs(monkeypatch)
    for epoch, steps in zip(epochs, steps_of_epochs):
        losses = [step["loss"] for step in steps]
        correct = sum(step["correct"] for step in steps)
        assert epoch["train_loss"] == pytest.approx(np.average(losses, weights=[16, 16, 8]))
        assert epoch["train_accuracy"] == 100 * correct / 40

def test_a_learning_rate_in_memory_stays_where_it_is():
    """A CUDA graph reads it from the address that it had at the capture."""
    rate = torch.tensor(0.1)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], rate)
    train.set_learning_rate(optimizer, 0.01)
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate == torch.tensor(0.01)

@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_the_loss_is_not_in_half_precision(amp):
    """Cross-entropy of logits in float32, as autocast has it."""
    _, step, _, _ = prepared("--bn-only", "--amp", amp)
    loss, _ = step(*batch())
    assert loss.dtype == torch.float32

@pytest.mark.parametrize("device, plain", [("mps", True), ("cpu", False)])
def test_training_is_plain_on_apples_gpus(device, plain, monkeypatch):
    """channels_last gives wrong gradients there (pytorch#175189)."""
    monkeypatch.setattr(train, "parse_device", torch.device)
    assert command_line("--device", device).plain == plain

def test_defaults_are_the_papers():
    """The recipe as OpenLTH has it; amp is ours."""
    args = command_line("--arch", "resnet866", "--bn-only", "--device", "cpu")
    assert options_of(args) == {
        "arch": "resnet866",
        "train": "bn",
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
    assert args.data_dir == "data"

@pytest.mark.parametrize("words, name", [
    ("--arch resnet866 --bn-only", "resnet866-bn-s0.pt"),
    ("--train gamma+output --lr 0.03", "resnet14-gamma+output-lr0.03-s0.pt"),
    ("--norm layer --bn-init oneone --weight-init binary --seed 3",
     "resnet14-all-layer-oneone-binary-s3.pt"),
])
def test_default_name_tells_what_differs_from_the_recipe(words, name):
    """Of what the tables of analyze.py show as runs of their own."""
    args = command_line("--device", "cpu", *words.split())
    assert args.out == pathlib.Path("runs", name)

def test_tilde_after_an_equals_sign_is_the_home_folder():
    """A shell leaves it as it is."""
    args = command_line("--device=cpu", "--data-dir=~/x", "--out=~/x.pt")
    assert args.data_dir == os.path.expanduser("~/x")
    assert args.out == pathlib.Path.home() / "x.pt"

# --- precision

@pytest.mark.parametrize("device, has_bf16, amp", [
    ("cuda", True, "bf16"),
    ("cuda", False, "fp16"),
    ("cpu", True, "off"),
])
def test_amp_auto(device, has_bf16, amp, monkeypatch):
    """bf16 on GPUs that have it, not emulated; fp16 on older ones; off elsewhere."""
    def is_bf16_supported(including_emulation=True):
        return has_bf16 or including_emulation
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    assert train.default_amp(torch.device(device)) == amp

def test_a_run_records_the_precision_that_auto_gave(tiny):
    """Here, on a CPU, off."""
    assert run_script(train, *SMALL, "--epochs", 1, "--amp", "auto", "--out", "a.pt") == 0
    _, checkpoint = train.load_checkpoint("a.pt")
    assert checkpoint["options"]["amp"] == "off"

@pytest.mark.parametrize("amp, dtype", [
    ("bf16", torch.bfloat16),
    ("fp16", torch.float16),
    ("off", torch.float32),
])
def test_precision_of_convolutions(amp, dtype):
    """--amp decides it, in a training step and in evaluation."""
    model, step, _, _ = prepared("--bn-only", "--amp", amp)
    seen = []

    def see(module, inputs, output):
        seen.append(output.dtype)

    model.conv.register_forward_hook(see)
    step(*batch())
    train.evaluate(model, TEST_IMAGES[:10], TEST_LABELS[:10], amp)
    assert seen == [dtype, dtype]

def cpu_with(monkeypatch, *instructions):
    """Let PyTorch see a CPU with these instructions."""
    capabilities = {"avx2": True, "avx512_bf16": False, "architecture": "x86_64"}
    capabilities.update(dict.fromkeys(instructions, True))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)

@pytest.mark.parametrize("amp, instructions", [
    ("bf16", "avx512_bf16"),
    ("bf16", "amx_bf16"),
    ("bf16", "bf16"),   # ARM's name
    ("fp16", "avx512_fp16"),
    ("fp16", "amx_fp16"),
])
def test_evaluation_keeps_a_precision_that_the_cpu_has(amp, instructions, monkeypatch, capsys):
    """By the names that PyTorch gives to a CPU's instructions."""
    cpu_with(monkeypatch, instructions)
    assert train.evaluation_amp(amp, CPU) == amp
    assert capsys.readouterr().out == ""

@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_evaluation_is_in_fp32_if_the_cpu_would_emulate(amp, monkeypatch, capsys):
    """Emulation is slow. A line says so."""
    cpu_with(monkeypatch)
    assert train.evaluation_amp(amp, CPU) == "off"
    line = capsys.readouterr().out
    assert line.startswith(f"evaluated in fp32, because this CPU has no {amp} instructions")

@pytest.mark.parametrize("amp, device", [("bf16", "cuda"), ("fp16", "cuda"), ("off", "cpu")])
def test_evaluation_keeps_the_precision_elsewhere(amp, device, monkeypatch, capsys):
    """On a GPU, whatever the CPU lacks, and in fp32."""
    cpu_with(monkeypatch)
    assert train.evaluation_amp(amp, torch.device(device)) == amp
    assert capsys.readouterr().out == ""

@pytest.mark.parametrize("amp, instructions, lines", [
    ("bf16", [], 1),
    ("bf16", ["avx512_bf16"], 0),
    ("fp16", ["avx512_bf16"], 1),
    ("off", [], 0),
])
def test_training_warns_of_emulation(amp, instructions, lines, tiny, monkeypatch, capsys):
    """In a line, because it is many times slower than fp32."""
    cpu_with(monkeypatch, *instructions)
    assert run_script(train, *SMALL, "--bn-only", "--amp", amp, "--epochs", 1) == 0
    warnings = re.findall(f"^this CPU has no {amp} instructions", capsys.readouterr().out, re.M)
    assert len(warnings) == lines

def test_first_step_that_overflows_in_fp16_changes_nothing():
    """But the scale, which it halves."""
    model, step, optimizer, scaler = prepared("--bn-only", "--amp", "fp16")
    scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0 ** 120})
    before = trained_vector(model)
    step(*batch())
    assert torch.equal(trained_vector(model), before)
    assert scaler.get_scale() == 2.0 ** 119
    momentum = [state["momentum_buffer"] for state in optimizer.state.values()]
    assert len(momentum) == 18   # gammas and betas of nine layers
    for buffer in momentum:
        assert not buffer.any()

# --- fast path

@pytest.fixture
def fresh_compiler():
    """PyTorch compiles a block eight times, then no more; and failures make it stop."""
    torch._dynamo.reset()
    yield
    torch.compiler.set_stance("default")

def twenty_steps(device, dtype, *words):
    """Train on batches of 16 and now and then 7, the last of an epoch.

    Returns the losses, and {name: change of what trains or of a running statistic}.
    """
    words = ["--device", device, *words]
    before = train.changing_state(built(*words, dtype=dtype))
    model, step, optimizer, scaler = prepared(*words, dtype=dtype)
    if device == "cuda" and "--plain" not in words:
        step = train.make_fast(step, model, optimizer, scaler, 16, 7)
    sizes = [16] * 10 + [7] + [16] * 8 + [7]
    images, labels = batch(sum(sizes), dtype=dtype)
    losses = []
    for batch_images, batch_labels in zip(images.split(sizes), labels.split(sizes)):
        loss, _ = step(batch_images.to(device), batch_labels.to(device))
        losses.append(loss.cpu())
    after = train.changing_state(model)
    changes = {name: (after[name] - before[name].to(device)).cpu() for name in before}
    return torch.stack(losses), changes

def joined(changes, names):
    return torch.cat([changes[name].flatten() for name in names])

@pytest.mark.parametrize("words", [[], ["--plain"]])
def test_plain_is_pytorchs_layout_and_optimizer(words):
    """Without --plain, 3x3 weights are in channels_last, and the optimizer is fused."""
    model, _, optimizer, _ = prepared("--bn-only", *words)
    plain = words == ["--plain"]
    for parameter in model.parameters():
        if parameter.shape[2:] == (3, 3):
            assert parameter.is_contiguous() == plain
    assert bool(optimizer.defaults["fused"]) != plain

@pytest.mark.parametrize("mode", ["bn", "all", "random"])
@pytest.mark.parametrize("device, arch, dtype, lr, tolerance", [
    ("cpu", "resnet8", torch.float64, 0.1, 1e-8),
    # CUDA has no float64 in channels_last; a low rate keeps its round-off from growing.
    pytest.param("cuda", "resnet14", torch.float32, 0.001, 0.05, marks=cuda),
])
def test_fast_equals_plain(mode, device, arch, dtype, lr, tolerance, fresh_compiler):
    """Losses, what trains and running statistics are those of --plain after twenty steps."""
    words = ["--arch", arch, "--train", mode, "--lr", lr]
    plain_losses, plain_changes = twenty_steps(device, dtype, *words, "--plain")
    losses, changes = twenty_steps(device, dtype, *words)
    torch.testing.assert_close(losses, plain_losses, rtol=0, atol=tolerance / 50)
    for kind in [r".*running_mean", r".*running_var", r".*(weight|bias|values)"]:
        names = [name for name in changes if re.fullmatch(kind, name)]
        plain = joined(plain_changes, names)
        assert (joined(changes, names) - plain).norm() < tolerance * plain.norm(), kind

@pytest.mark.parametrize("arch, words", [
    ("resnet14", "--bn-only"),
    ("resnet20", "--bn-only"),
    ("resnet20", "--train all"),
    ("resnet20", "--train random"),
    ("resnet20", "--bn-only --norm weight"),
])
def test_five_compilations_whatever_the_depth(arch, words, fresh_compiler):
    """Blocks with identity shortcuts in three stages, with projections in two; of static sizes."""
    compilations = []

    def count_and_compile(graph, inputs):
        compilations.append(graph)
        assert not any(isinstance(value, torch.SymInt) for value in inputs)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    model, step, _, _ = prepared("--arch", arch, *words.split())
    for module in model.modules():
        if isinstance(module, models.Block):
            module.compile(dynamic=False, backend=count_and_compile)
    losses = [step(*batch())[0] for _ in range(3)]
    with torch.compiler.set_stance("force_eager"):
        step(*batch(7))
    assert len(compilations) == 5
    assert losses[2] < losses[0]

class FakeCompiler:
    """What make_fast asked for: the modules it compiled, and the stances that it set."""

    def __init__(self):
        self.compiled = []
        self.stances = []

@pytest.fixture
def compiler(monkeypatch):
    """Compilation does nothing but to note what is asked for."""
    fake = FakeCompiler()

    def compile(module, dynamic):
        assert not dynamic
        fake.compiled.append(type(module))

    monkeypatch.setattr(nn.Module, "compile", compile)
    monkeypatch.setattr(torch.compiler, "set_stance", fake.stances.append)
    return fake

def capture_that_trains(step, size, last_size):
    """Instead of a capture: its warm-up, a step for each size."""
    step(*batch(size))
    step(*batch(last_size))
    return step

def everything_in_training(model, optimizer, scaler):
    """Copies of all parameters, buffers and momentum, and the state of the scaler."""
    tensors = [*model.parameters(), *model.buffers()]
    for state in optimizer.state.values():
        tensors.append(state["momentum_buffer"])
    return [tensor.detach().clone() for tensor in tensors], scaler.state_dict()

def run_of_three_steps():
    """What make_fast takes, in the middle of a run: (step, model, optimizer, scaler).

    The scaler doubles its scale at every second step.
    """
    model, _, optimizer, _ = prepared("--bn-only")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)

    def step(images, labels):
        return train.train_step(model, optimizer, scaler, "off", images, labels)

    for _ in range(3):
        step(*batch())
    return step, model, optimizer, scaler

@pytest.mark.parametrize("failures", [0, 1, 2])
def test_make_fast_leaves_everything_as_it_was(failures, compiler, monkeypatch):
    """Network, momentum and scale, whether the captures succeed or fail after their warm-up."""
    attempts = itertools.count(1)

    def capture_all(step, size, last_size):
        capture_that_trains(step, size, last_size)
        if next(attempts) <= failures:
            raise RuntimeError("no compiler")
        return step

    monkeypatch.setattr(train, "capture_all", capture_all)
    step, model, optimizer, scaler = run_of_three_steps()
    before, scaler_before = everything_in_training(model, optimizer, scaler)
    train.make_fast(step, model, optimizer, scaler, 16, 7)
    after, scaler_after = everything_in_training(model, optimizer, scaler)
    assert scaler_after == scaler_before
    for tensor, tensor_before in zip(after, before, strict=True):
        assert torch.equal(tensor, tensor_before)

def test_make_fast_compiles_blocks_and_captures_both_sizes(compiler, monkeypatch, capsys):
    """If nothing fails, nothing is printed, and the captured step is the one to take."""
    seen = []

    def capture_all(step, size, last_size):
        seen.append([size, last_size])
        return "captured step"

    monkeypatch.setattr(train, "capture_all", capture_all)
    run = run_of_three_steps()
    assert train.make_fast(*run, 16, 7) == "captured step"
    assert seen == [[16, 7]]
    assert compiler.compiled == [models.Block] * 3
    assert compiler.stances == []
    assert capsys.readouterr().out == ""

def test_without_a_compiler_the_blocks_are_captured_as_they_stand(compiler, monkeypatch, capsys):
    """A line gives the reason."""
    def capture_all(step, size, last_size):
        if compiler.stances != ["force_eager"]:
            raise RuntimeError("gcc not found\nand a long trace")
        return "captured step"

    monkeypatch.setattr(train, "capture_all", capture_all)
    run = run_of_three_steps()
    assert train.make_fast(*run, 16, 7) == "captured step"
    assert capsys.readouterr().out == (
        "compiled blocks fail here, continuing without them (gcc not found)\n")

def test_without_cuda_graphs_the_plain_step_is_left(compiler, monkeypatch, capsys):
    """A line for each failure."""
    monkeypatch.setattr(train, "capture_all", raising(RuntimeError("not supported")))
    run = run_of_three_steps()
    plain_step = run[0]
    assert train.make_fast(*run, 16, 7) is plain_step
    assert capsys.readouterr().out == (
        "compiled blocks fail here, continuing without them (not supported)\n"
        "CUDA graphs fail here, continuing without them (not supported)\n")

def test_make_fast_does_not_hide_that_memory_is_short(compiler, monkeypatch, capsys):
    """Going on without compilation would take more of it."""
    error = torch.OutOfMemoryError("CUDA out of memory.")
    monkeypatch.setattr(train, "capture_all", raising(error))
    run = run_of_three_steps()
    with pytest.raises(torch.OutOfMemoryError):
        train.make_fast(*run, 16, 7)
    assert capsys.readouterr().out == ""

@cuda
@pytest.mark.parametrize("mode, amp", [("bn", "bf16"), ("all", "fp16"), ("random", "off")])
def test_no_operation_of_a_step_waits_for_the_device(mode, amp):
    """Such as reading a number, or a size that depends on data. No CUDA graph could hold it."""
    _, step, _, _ = prepared("--train", mode, "--amp", amp, "--device", "cuda")
    padded = F.pad(TRAIN_IMAGES[:64], (0, 0, 4, 4, 4, 4)).cuda()
    all_labels = TRAIN_LABELS[:64].cuda()
    draws = train.draw_augmentation(64, torch.Generator().manual_seed(0))
    order, offset, flip = (tensor.cuda() for tensor in draws)

    def step_on(first):
        places = slice(first, first + 16)
        images = train.augment(padded, order[places], offset[places], flip[places])
        return step(train.normalize(images), all_labels[order[places]])

    step_on(0)   # which allocates, and makes the constants of normalize
    torch.cuda.set_sync_debug_mode("error")
    try:
        for first in [0, 16, 32, 48]:
            step_on(first)
    finally:
        torch.cuda.set_sync_debug_mode("default")

@cuda
def test_a_run_on_a_gpu_has_the_losses_of_a_cpu(tiny, monkeypatch, capsys):
    """By CUDA graphs of both batch sizes, interrupted after an epoch and resumed, in fp32."""
    words = [*SMALL, "--bn-only", "--amp", "off"]
    assert run_script(train, *words, "--out", "cpu.pt") == 0
    words += ["--device", "cuda", "--out", "gpu.pt"]
    with monkeypatch.context() as patch:
        patch.setattr(train, "log_epoch", raising(KeyboardInterrupt()))
        error_of(capsys, 1, train, *words)
    assert run_script(train, *words, "--resume") == 0
    for epoch, epoch_of_cpu in zip(epochs_of("gpu.pt"), epochs_of("cpu.pt"), strict=True):
        assert epoch["train_loss"] == pytest.approx(epoch_of_cpu["train_loss"], rel=0.02)

# --- benchmark and launchers

def test_benchmark_estimates_a_run(tiny, capsys):
    """CIFAR-10 has 3,125 batches of 16 in each of 160 epochs. Nothing is written."""
    assert run_script(train, *SMALL, "--epochs", 160, "--benchmark", 2) == 0
    output = capsys.readouterr().out
    words = re.match("(.*) ms/step .* images/s, (.*) hours for 160 epochs", output)
    milliseconds = float(words[1])
    hours = float(words[2])
    assert hours == pytest.approx(160 * 3125 * milliseconds / 3_600_000, abs=0.01)
    assert list(pathlib.Path().iterdir()) == []

def test_torchrun_of_several_processes_is_refused(tiny, monkeypatch, capsys):
    """They would train the same network several times. Nothing is written."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    line = error_of(capsys, 2, train, *SMALL)
    assert line.startswith("train.py: error: torchrun is not for this: ")
    assert list(pathlib.Path().iterdir()) == []

def test_torchrun_of_one_process_is_an_ordinary_run(tiny, monkeypatch):
    """As some clusters start every program."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert run_script(train, *SMALL, "--epochs", 1, "--out", "a.pt") == 0
    assert len(epochs_of("a.pt")) == 1

def test_left_over_variables_of_a_launcher_do_not_matter(tiny, monkeypatch):
    """RANK and WORLD_SIZE without torchrun's own: as a scheduler or a notebook leaves them."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert run_script(train, *SMALL, "--epochs", 1, "--seed", 3, "--out", "a.pt") == 0
    _, checkpoint = train.load_checkpoint("a.pt")
    assert checkpoint["options"]["seed"] == 3

# --- checkpoints

# Runs of every kind, to be interrupted and resumed.
RUNS = ["--train all", "--train random", "--bn-only --plain", "--bn-only --amp bf16",
        "--bn-only --amp fp16"]
RUNS += [f"--train {group}" for group in train.GROUPS]
RUNS += [f"--bn-only --norm {norm}" for norm in models.NORMS if norm != "batch"]

TO_A = SMALL + ["--bn-only", "--out", "a.pt"]   # the command that wrote the fixture `checkpoint`

def interrupt():
    signal.raise_signal(signal.SIGINT)

def call_before_step(monkeypatch, number, action):
    """Let train.py call action() before its step of this number, counted from 1: 3 are an epoch."""
    steps = itertools.count(1)
    step = train.train_step

    def watched_step(*args):
        if next(steps) == number:
            action()
        return step(*args)
    monkeypatch.setattr(train, "train_step", watched_step)

def as_bytes(value):
    """The same dicts and lists with bytes in place of tensors, for comparisons bit for bit."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: as_bytes(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_bytes(item) for item in value]
    return value

def content_of(path):
    """What a checkpoint holds, except for sessions and times, to compare bit for bit."""
    _, checkpoint = train.load_checkpoint(path)
    del checkpoint["sessions"]
    for epoch in checkpoint["epochs"]:
        del epoch["seconds"], epoch["images_per_second"]
    return as_bytes(checkpoint)

@pytest.mark.parametrize("run", RUNS)
def test_resume_is_bit_for_bit(run, tiny, monkeypatch):
    """An interrupted and resumed run ends as the same run without an interrupt."""
    words = SMALL + run.split()
    assert run_script(train, *words, "--out", "whole.pt") == 0
    call_before_step(monkeypatch, 5, interrupt)   # in epoch 2
    assert run_script(train, *words, "--out", "a.pt") == 1
    assert len(epochs_of("a.pt")) == 1
    assert run_script(train, *words, "--out", "a.pt", "--resume") == 0
    assert content_of("a.pt") == content_of("whole.pt")

def test_record_lists_sessions(tiny, monkeypatch):
    """One for each start: its id, first epoch, machine, and --plain, which may change."""
    call_before_step(monkeypatch, 5, interrupt)   # in epoch 2
    assert run_script(train, *TO_A) == 1
    call_before_step(monkeypatch, 4, interrupt)   # in epoch 3
    assert run_script(train, *TO_A, "--resume", "--plain") == 1
    assert run_script(train, *TO_A, "--resume") == 0
    _, checkpoint = train.load_checkpoint("a.pt")
    record = train.read_record(pathlib.Path("a.json"))
    assert record["sessions"] == checkpoint["sessions"]
    ids = {session.pop("id") for session in record["sessions"]}
    machine = train.machine(CPU)
    assert len(ids) == 3
    assert record["sessions"] == [
        dict(machine, first_epoch=1, plain=False),
        dict(machine, first_epoch=2, plain=True),
        dict(machine, first_epoch=3, plain=False),
    ]

def test_record_of_a_finished_run(checkpoint):
    """It holds the checkpoint's options and epochs, the last accuracy, and what trained."""
    _, content = train.load_checkpoint(checkpoint)
    record = train.read_record(pathlib.Path("a.json"))
    assert record["options"] == content["options"]
    assert record["epochs"] == content["epochs"]
    assert record["test_accuracy"] == content["epochs"][2]["test_accuracy"]
    seconds = sum(epoch["seconds"] for epoch in content["epochs"])
    assert record["seconds"] == pytest.approx(seconds, abs=0.051)
    assert record["parameters"] == train.count_parameters(built("--bn-only"))
    assert record["parameters"]["trained"] == 672

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_is_one_line(number, tiny, monkeypatch, capsys):
    """Ctrl-C and a scheduler's SIGTERM end a run with status 1."""
    def send():
        signal.raise_signal(number)

    call_before_step(monkeypatch, 5, send)
    assert error_of(capsys, 1, train, *TO_A) == "train.py: error: stopped"

def test_interrupt_of_the_script_says_how_to_go_on(tiny, monkeypatch, capsys):
    """Where train.py is not imported but started, as a user does."""
    def interrupted(*args):
        interrupt()

    monkeypatch.setattr(models, "build_model", interrupted)
    monkeypatch.setattr(sys, "argv", ["train.py"] + SMALL)
    with pytest.raises(SystemExit):
        runpy.run_path(str(HERE / "train.py"), run_name="__main__")
    line = "stopped; the same command with --resume continues after the last whole epoch"
    assert line in capsys.readouterr().err

def test_checkpoint_is_a_state_dict_without_what_is_frozen(checkpoint, tiny):
    """torch.load and load_state_dict(strict=False) are enough to use a BatchNorm-only network."""
    model = models.build_model("resnet8", 0).eval()
    frozen = [name for name, p in model.named_parameters() if p.dim() > 1 or name == "fc.bias"]
    state = torch.load(checkpoint, weights_only=True)["model"]
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert sorted(missing) == sorted(frozen)
    assert unexpected == []
    x = train.normalize(TEST_IMAGES[:16])
    loaded, _ = train.load_checkpoint(checkpoint)
    assert torch.equal(model(x), loaded(x))

@pytest.mark.parametrize("words", [[], ["--plain"]], ids=["default", "plain"])
def test_checkpoint_of_all_parameters_is_a_whole_state_dict(words, tiny):
    """No key is missing."""
    assert run_script(train, *SMALL, "--epochs", 1, "--out", "a.pt", *words) == 0
    model = models.build_model("resnet8", 1).eval()
    model.load_state_dict(torch.load("a.pt", weights_only=True)["model"])
    x = train.normalize(TEST_IMAGES[:16])
    loaded, _ = train.load_checkpoint("a.pt")
    assert torch.equal(model(x), loaded(x))

def test_bn_only_resnet866_checkpoint_is_small(tiny):
    """After 160 epochs, its momentum included, it takes less than 2.5 MB. The network takes 56."""
    args = arguments("--arch", "resnet866", "--bn-only", "--out", "a.pt")
    model, run, _ = train.begin_or_continue(args)
    optimizer, scaler = train.prepare(model, args)
    for parameter in train.trained_parameters(model):
        optimizer.state[parameter]["momentum_buffer"].normal_()
    figures = ["train_loss", "train_accuracy", "test_accuracy", "seconds", "images_per_second"]
    epoch = dict.fromkeys(figures, 1 / 3)
    run["epochs"] = [dict(epoch, epoch=number) for number in range(1, 161)]
    rng = torch.Generator()
    train.save(args.out, run, model, optimizer, scaler, rng)
    assert args.out.stat().st_size < 2_500_000
    written = torch.load(args.out, weights_only=True)
    assert as_bytes(written["optimizer"]) == as_bytes(optimizer.state_dict())

def test_load_checkpoint_gives_the_recorded_network(checkpoint, tiny):
    """Ready to evaluate, from a path or a string, with the accuracy of the last epoch."""
    model, content = train.load_checkpoint(checkpoint)
    other, _ = train.load_checkpoint(str(checkpoint))
    test_images, test_labels = tiny[1]
    x = train.normalize(test_images)
    assert torch.equal(model(x), model(x))   # running statistics stay
    assert torch.equal(model(x), other(x))
    accuracy = functional_accuracy(model, test_images, test_labels)
    assert content["epochs"][2]["test_accuracy"] == pytest.approx(accuracy)

def test_load_checkpoint_ignores_the_defaults_of_a_notebook(checkpoint, defaults_put_back):
    """Whatever the default dtype and device, it returns the same float32 network on the CPU."""
    x = train.normalize(TEST_IMAGES[:16])
    expected_model, _ = train.load_checkpoint(checkpoint)
    expected = expected_model(x)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    model, _ = train.load_checkpoint(checkpoint)
    for tensor in model.state_dict().values():
        assert tensor.dtype == torch.float32
        assert tensor.device == CPU
    assert torch.equal(model(x), expected)

# --- writing

def test_files_are_written_before_the_first_epoch_and_after_each(tiny, monkeypatch):
    """At any step the checkpoint can be loaded, and the record is refused as unfinished."""
    seen = []
    step = train.train_step

    def watched_step(*args):
        done = len(epochs_of("a.pt"))
        seen.append(done)
        with pytest.raises(ValueError, match=f"{done} of 3 epochs are done"):
            train.read_record(pathlib.Path("a.json"))
        return step(*args)

    monkeypatch.setattr(train, "train_step", watched_step)
    assert run_script(train, *TO_A) == 0
    assert seen == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert train.read_record(pathlib.Path("a.json"))["epochs"] == epochs_of("a.pt")
    assert set(files_here()) == {"a.pt", "a.json"}

def fail_at_write(monkeypatch, call, number):
    """Let os.fsync or os.replace fail at its call of this number, counted from 1."""
    calls = itertools.count(1)
    function = getattr(os, call)

    def failing_function(target, *args):
        if next(calls) == number:
            if call == "fsync":   # half of the file is on the disk
                os.ftruncate(target, os.fstat(target).st_size // 2)
            raise OSError(errno.ENOSPC, "No space left on device")
        return function(target, *args)
    monkeypatch.setattr(os, call, failing_function)

# How many epochs a checkpoint holds if this write fails. Writes 1 and 2, of record and checkpoint,
# are before the first epoch, 3 and 4 after it, and so on.
COMPLETE = {1: 0, 2: 0, 3: 0, 4: 0, 5: 1, 6: 1, 7: 2, 8: 2}

@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("write", [3, 4, 5, 6, 7, 8])   # 1 and 2: no file is left, see below
def test_every_interrupted_write(call, write, tiny, finished_run, monkeypatch, capsys):
    """Whichever fails, the epochs before it are kept and can be resumed.

    The resumed run is the same as one without an interrupt, and no temporary file lies about.
    """
    with monkeypatch.context() as patch:
        fail_at_write(patch, call, write)
        line = error_of(capsys, 1, train, *TO_A)
    assert re.search(r"a\.(pt|json) can't be written \(No space left on device\)", line)
    assert len(epochs_of("a.pt")) == COMPLETE[write]
    assert set(files_here()) == {"a.pt", "a.json"}
    json.loads(pathlib.Path("a.json").read_text())
    assert run_script(train, *TO_A, "--resume") == 0
    pathlib.Path("whole.pt").write_bytes(finished_run["a.pt"])
    assert content_of("a.pt") == content_of("whole.pt")

@pytest.mark.parametrize("write", [1, 2])
def test_interrupted_first_writes_of_a_resumed_run(write, tiny, finished_run, monkeypatch, capsys):
    """A resumed run that can't write can be resumed again."""
    call_before_step(monkeypatch, 5, interrupt)   # in epoch 2
    error_of(capsys, 1, train, *TO_A)
    with monkeypatch.context() as patch:
        fail_at_write(patch, "replace", write)
        assert "can't be written" in error_of(capsys, 1, train, *TO_A, "--resume")
    assert run_script(train, *TO_A, "--resume") == 0
    pathlib.Path("whole.pt").write_bytes(finished_run["a.pt"])
    assert content_of("a.pt") == content_of("whole.pt")

@pytest.mark.parametrize("write", [1, 2])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_disk_that_cannot_be_written_is_found_before_the_first_step(
        write, call, tiny, monkeypatch, capsys):
    """If the first record or the first checkpoint can't be written, no file is left."""
    monkeypatch.setattr(train, "train_step", raising(AssertionError("a step")))
    fail_at_write(monkeypatch, call, write)
    assert "can't be written (No space left on device)" in error_of(capsys, 1, train, *TO_A)
    assert files_here() == {}

def test_file_that_cannot_grow_is_found_before_the_first_step(tiny, monkeypatch, capsys):
    """As with a full disk or a quota, of which the first checkpoint takes more than there is."""
    monkeypatch.setattr(train, "train_step", raising(AssertionError("a step")))
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, hard))
    try:
        line = error_of(capsys, 1, train, *TO_A)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "a.pt can't be written (File too large)" in line
    assert files_here() == {}

@pytest.mark.parametrize("length", [251, 252, 253])
def test_long_name_is_found_before_the_first_step(length, tiny, monkeypatch, capsys):
    """A file's name has at most 255 bytes. With .json, .pt or both, these are longer."""
    monkeypatch.setattr(train, "train_step", raising(AssertionError("a step")))
    line = error_of(capsys, 1, train, *SMALL, "--out", "x" * length + ".pt")
    assert "can't be written (File name too long)" in line
    assert files_here() == {}

def test_permissions_follow_the_umask(tiny):
    """A group that may read what a user writes may read checkpoints."""
    before = os.umask(0o027)
    try:
        assert run_script(train, *SMALL, "--epochs", 1, "--out", "a.pt") == 0
    finally:
        os.umask(before)
    for name in ("a.pt", "a.json"):
        assert os.stat(name).st_mode & 0o777 == 0o640

def test_resume_of_a_finished_run_changes_nothing(checkpoint, finished_run):
    """So that a script may start it again and again."""
    assert run_script(train, *TO_A, "--resume") == 0
    assert files_here() == finished_run

def test_resume_of_a_finished_run_writes_its_missing_record(checkpoint, finished_run):
    """The same record as before."""
    pathlib.Path("a.json").unlink()
    assert run_script(train, *TO_A, "--resume") == 0
    assert files_here() == finished_run

def test_link_is_followed(tiny):
    """--out may be a symbolic link: both files are where it leads, for prune.py, too."""
    pathlib.Path("store").mkdir()
    pathlib.Path("a.pt").symlink_to("store/b.pt")
    assert run_script(train, *TO_A) == 0
    assert pathlib.Path("a.pt").is_symlink()
    assert sorted(os.listdir("store")) == ["b.json", "b.pt"]
    assert run_script(prune, "a.pt") == 0
    assert "prune" in train.read_record(pathlib.Path("store/b.json"))
    assert sorted(os.listdir()) == ["a.pt", "store"]

# --- one name, one run

def test_second_start_leaves_a_run_alone(tiny, monkeypatch, capsys):
    """Of two starts with one --out the second ends, even before the first has an epoch."""
    def start_again():
        before = files_here()
        assert "a.pt exists: continue it by --resume" in error_of(capsys, 2, train, *TO_A)
        assert files_here() == before

    call_before_step(monkeypatch, 1, start_again)
    assert run_script(train, *TO_A) == 0
    assert len(epochs_of("a.pt")) == 3

def test_one_of_many_claims_succeeds(tmp_path):
    """Eight at the same moment, as by `srun -n 8`."""
    def claims(path):
        try:
            train.claim(path, b"content")
            return True
        except train.UserError:
            return False

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for i in range(50):
            path = tmp_path / f"{i}.pt"
            assert sum(pool.map(claims, [path] * 8)) == 1

def test_interrupted_claim_leaves_no_file(tmp_path, monkeypatch):
    """A half-written checkpoint could neither be resumed nor begun again."""
    class Interrupted(io.FileIO):
        def write(self, content):
            super().write(content[:2])
            raise KeyboardInterrupt

    path = tmp_path / "a.pt"
    monkeypatch.setattr(train, "open", Interrupted, raising=False)
    with pytest.raises(KeyboardInterrupt):
        train.claim(path, b"content")
    assert list(tmp_path.iterdir()) == []

def test_record_without_its_checkpoint_is_kept(checkpoint, finished_run, capsys):
    """With --resume, too."""
    checkpoint.unlink()
    for words in (TO_A, TO_A + ["--resume"]):
        assert "a.json exists without its checkpoint" in error_of(capsys, 2, train, *words)
    assert files_here() == {"a.json": finished_run["a.json"]}

@pytest.mark.parametrize("function, error", [
    ("machine", KeyboardInterrupt()),
    ("prepare", torch.OutOfMemoryError("CUDA out of memory.")),
    ("write", KeyboardInterrupt()),
    ("load_data", train.UserError("no CIFAR-10")),
    ("train_step", KeyboardInterrupt()),
    ("evaluate", MemoryError()),
])
def test_run_that_ends_before_its_first_epoch_leaves_no_file(function, error, tiny, monkeypatch):
    """The same command can be given again."""
    monkeypatch.setattr(train, function, raising(error))
    assert run_script(train, *TO_A) == 1
    assert files_here() == {}

def test_run_that_another_process_continued_is_left_to_it(tiny, monkeypatch, capsys):
    """The first process ends at its next write. What the other wrote stays."""
    written = {}

    def continue_elsewhere():
        assert run_script(train, *TO_A, "--resume") == 0
        written.update(files_here())

    call_before_step(monkeypatch, 5, continue_elsewhere)   # in epoch 2
    assert "a.pt was continued by another process" in error_of(capsys, 1, train, *TO_A)
    assert files_here() == written

def test_run_that_another_process_continued_is_not_removed(tiny, monkeypatch):
    """Though the first process ends before its first epoch."""
    def continue_elsewhere():
        assert run_script(train, *TO_A, "--resume") == 0
        interrupt()

    call_before_step(monkeypatch, 1, continue_elsewhere)
    assert run_script(train, *TO_A) == 1
    assert len(epochs_of("a.pt")) == 3
    assert train.read_record(pathlib.Path("a.json"))

def test_resume_takes_the_precision_of_the_run(tiny, monkeypatch, capsys):
    """Unless --amp names another one, which is an error."""
    seen = []
    step = train.train_step

    def watched_step(model, optimizer, scaler, amp, images, labels):
        seen.append(amp)
        return step(model, optimizer, scaler, amp, images, labels)

    call_before_step(monkeypatch, 5, interrupt)   # in epoch 2
    error_of(capsys, 1, train, *TO_A, "--amp", "bf16")
    line = error_of(capsys, 2, train, *TO_A, "--resume", "--amp", "off")
    assert "a.pt is a run with amp bf16, not off" in line
    monkeypatch.setattr(train, "train_step", watched_step)
    assert run_script(train, *TO_A, "--resume") == 0
    assert seen == ["bf16"] * 6

# --- what a record says of code and machine

def git(folder, *words):
    """Run git in a folder. Returns what it prints."""
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.check_output(command + list(words), text=True).strip()

@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A new repository, which does not track the train.py in it."""
    monkeypatch.setattr(train, "__file__", str(tmp_path / "train.py"))
    (tmp_path / "train.py").touch()
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "x")
    return tmp_path

def test_commit_of_a_tracked_file(repository):
    """Its hash, and whether files were changed."""
    git(repository, "add", "train.py")
    git(repository, "commit", "-q", "-m", "x")
    head = git(repository, "rev-parse", "HEAD")
    assert train.machine(CPU)["commit"] == head
    (repository / "train.py").write_text("changed")
    assert train.machine(CPU)["commit"] == f"{head}-dirty"

def test_no_commit_of_an_untracked_file(repository):
    """As in a copy within another project."""
    assert train.machine(CPU)["commit"] is None

def test_no_commit_outside_of_git(tmp_path, monkeypatch):
    """As in an unpacked archive."""
    monkeypatch.setattr(train, "__file__", str(tmp_path / "train.py"))
    assert train.machine(CPU)["commit"] is None

def test_commit_is_unknown_if_git_refuses(monkeypatch):
    """As in a container that runs as another user."""
    def refusing_git(*args, **kwargs):
        text = "fatal: detected dubious ownership in repository at '/x'\n"
        return subprocess.CompletedProcess(args, 128, "", text)

    monkeypatch.setattr(subprocess, "run", refusing_git)
    assert train.machine(CPU)["commit"] == "unknown"

def test_commit_is_unknown_without_git(repository, monkeypatch):
    """Where git is not installed."""
    monkeypatch.setenv("PATH", str(repository))
    assert train.machine(CPU)["commit"] == "unknown"

@pytest.mark.parametrize("cpuinfo", ["", "processor\t: 0\nBogoMIPS\t: 243.75\n"])
def test_name_of_a_cpu_is_never_empty(cpuinfo, monkeypatch):
    """ARM's /proc/cpuinfo holds no model name, and platform.processor() can be empty."""
    def read_text(*args):
        return cpuinfo

    def no_processor():
        return ""

    monkeypatch.setattr(pathlib.Path, "read_text", read_text)
    monkeypatch.setattr(platform, "processor", no_processor)
    assert train.cpu_name() == platform.machine() != ""

# --- files from anyone

class Code:
    """A pickle that would create a folder."""

    def __reduce__(self):
        return os.mkdir, ("code-ran",)

def put(content, keys, value):
    """Put a value at content[keys[0]][keys[1]]..."""
    for key in keys[:-1]:
        content = content[key]
    content[keys[-1]] = value

# Options as no command line gives them, and what the refusal says.
BAD_OPTIONS = [
    (["options", "x"], 1, "unknown options {'x'}"),
    (["options", "epochs"], "3", "its epochs is '3'"),
    (["options", "epochs"], 3.0, "invalid literal for int"),
    (["options", "epochs"], 0, "not in 1"),
    (["options", "lr"], math.nan, "not in"),
    (["options", "norm"], "other", "not one of batch"),
    (["options", "train"], "output+bn", r"its train is 'output\+bn'"),
    (["options", "arch"], "vgg16", "resnet<depth>"),
    (["options", "amp"], "auto", "it lacks train or amp"),
]
DAMAGES = BAD_OPTIONS + [
    (["format"], 2, "this code reads format 3"),
    (["x"], Code(), "Weights only load failed"),
    (["rng"], torch.zeros(7, dtype=torch.uint8), "RNG state"),
    (["model", "bn.weight"], torch.full((16,), math.nan), "bn.weight is not finite"),
    (["model", "bn.weight"], torch.ones(8), "its tensors are not those of resnet8"),
    (["model", "x"], torch.ones(8), "its tensors are not those of resnet8"),
    (["optimizer", "state", 0, "momentum_buffer"], torch.ones(8), "its momentum is of another"),
    (["epochs", 0, "epoch"], 2, "epochs are missing"),
    (["epochs", 0, "test_accuracy"], None, "an epoch's test_accuracy is no number"),
    (["options", "epochs"], 2, "it has too many epochs"),
    (["options", "arch"], "wrn8-900", "not those of wrn8-900"),   # which takes 300 GB
    (["options", "train"], "all", "not those of resnet8, --train all"),
    (["options", "seed"], 1, "its seed draws other weights"),
]

@pytest.mark.parametrize("keys, value, says", DAMAGES)
def test_damaged_and_hostile_checkpoints_are_refused(keys, value, says, checkpoint, capsys):
    """By every script in a line, without running code in them or changing them."""
    content = torch.load(checkpoint, weights_only=True)
    put(content, keys, value)
    torch.save(content, checkpoint)
    before = files_here()
    with pytest.raises(train.UserError, match=f"^a.pt is not a valid checkpoint .*{says}"):
        train.load_checkpoint("a.pt")
    assert "a.pt is not a valid checkpoint" in error_of(capsys, 1, prune, "a.pt")
    assert "a.pt is not a valid checkpoint" in error_of(capsys, 1, train, *TO_A, "--resume")
    assert files_here() == before

CONTENT = ["format", "options", "sessions", "epochs", "fingerprint", "model", "optimizer", "scaler",
           "rng"]

@pytest.mark.parametrize("key", CONTENT)
def test_checkpoint_that_lacks_something_is_refused(key, checkpoint):
    """The line names it."""
    content = torch.load(checkpoint, weights_only=True)
    del content[key]
    torch.save(content, checkpoint)
    with pytest.raises(train.UserError, match=f"^a.pt is not a valid checkpoint .*{key}"):
        train.load_checkpoint("a.pt")

def test_option_that_a_checkpoint_lacks_has_its_default(checkpoint):
    """A later version may have more options."""
    content = torch.load(checkpoint, weights_only=True)
    del content["options"]["norm"], content["options"]["lr"]
    torch.save(content, checkpoint)
    _, loaded = train.load_checkpoint(checkpoint)
    assert loaded["options"]["norm"] == "batch"
    assert loaded["options"]["lr"] == 0.1

@pytest.mark.parametrize("keys, value, says", BAD_OPTIONS + [
    (["epochs"], [], "0 of 3 epochs are done"),
    (["epochs", 0, "train_loss"], "low", "an epoch's train_loss is no number"),
    (["sessions"], [{}], "a session of it is incomplete"),
    (["epochs", 0, "epoch"], 2, "epochs are missing"),
    (["test_accuracy"], 99.99, "its accuracy is not the last epoch's"),
])
def test_damaged_records_are_refused(keys, value, says, checkpoint):
    """In a line that says what is wrong."""
    path = pathlib.Path("a.json")
    record = json.loads(path.read_text())
    put(record, keys, value)
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=f"^not the record of a finished run .*{says}"):
        train.read_record(path)

@pytest.mark.parametrize("text", ["", "[]", "null", '{"name": "package"}', "\0"])
def test_other_files_are_no_records(text, tmp_path):
    """A folder of results may hold any JSON."""
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="^not the record of a finished run"):
        train.read_record(path)

def assert_refused(path):
    """load_checkpoint refuses the file in one printable line."""
    with pytest.raises(train.UserError, match="^a.pt is not a valid checkpoint") as refusal:
        train.load_checkpoint(path)
    assert str(refusal.value).isprintable()

def places(size):
    """400 places in a file of this size: anywhere, and in the zip directory at its end."""
    rng = np.random.RandomState(0)
    anywhere = rng.randint(0, size, 200)
    near_the_end = rng.randint(size - 5000, size, 200)
    return [*anywhere.tolist(), *near_the_end.tolist()]

def test_cut_checkpoints_are_refused(checkpoint):
    """Wherever a copy ended."""
    content = checkpoint.read_bytes()
    for place in places(len(content)):
        checkpoint.write_bytes(content[:place])
        assert_refused(checkpoint)

def test_flipped_bits_are_refused(checkpoint):
    """Or change nothing: a few bits of the zip directory are without meaning."""
    whole = content_of(checkpoint)
    content = checkpoint.read_bytes()
    for i, place in enumerate(places(len(content))):
        damaged = bytearray(content)
        damaged[place] ^= 1 << i % 8
        checkpoint.write_bytes(damaged)
        try:
            same = content_of(checkpoint) == whole
        except train.UserError:
            assert_refused(checkpoint)
        else:
            assert same

# --- prune

def known_gammas(threshold=0.0):
    """resnet8 whose 336 gammas are -0.5, 0.0625, 0.005, 0 in turn, or 0 if below the threshold."""
    model = models.build_model("resnet8", 0).eval()
    values = torch.tensor([-0.5, 0.0625, 0.005, 0.0])
    values[values.abs() < threshold] = 0
    for _, gamma, beta in models.gammas_and_betas(model):
        repeats = len(gamma) // 4
        gamma.data = values.repeat(repeats)
        beta.data = torch.tensor([3, -0.25, -0.25, -0.25]).repeat(repeats)
    return model

def test_prune_table_of_known_gammas():
    """A gamma of 0.0625 is not below 0.0625, and 0 is below every threshold but 0."""
    images = TEST_IMAGES[:200]
    labels = known_gammas()(train.normalize(images)).argmax(1)
    labels[:50] = 0
    thresholds = [0.5, 0.0, 0.0625, 0.7, 1.0]
    rows = prune.prune_table(known_gammas(), images, labels, "off", thresholds)
    unpruned = functional_accuracy(known_gammas(), images, labels)
    shares = {0.0: 0, 0.0625: 50, 0.5: 75, 0.7: 100, 1.0: 100}
    assert [row["threshold"] for row in rows] == list(shares)
    for row in rows:
        threshold = row["threshold"]
        accuracy = functional_accuracy(known_gammas(threshold), images, labels)
        assert row["pruned"] == pytest.approx(shares[threshold])
        assert row["test_accuracy"] == pytest.approx(accuracy)
        assert row["change"] == pytest.approx(accuracy - unpruned)
    assert rows[0]["test_accuracy"] != rows[4]["test_accuracy"]

def test_pruning_changes_gammas_alone():
    """Beta stays, and so does everything else."""
    model = known_gammas()
    prune.zero_gammas(model, 0.0625)
    assert as_bytes(model.state_dict()) == as_bytes(known_gammas(0.0625).state_dict())
    prune.zero_gammas(model, 1.0)
    assert as_bytes(model.state_dict()) == as_bytes(known_gammas(1.0).state_dict())

def test_prune_adds_its_table_to_the_record(checkpoint, capsys):
    """Of the default thresholds alone. The rest of the record stays, and the table is printed."""
    path = pathlib.Path("a.json")
    before = json.loads(path.read_text())
    assert run_script(prune, "a.pt", "--thresholds", 0.3) == 0
    assert json.loads(path.read_text()) == before
    assert run_script(prune, "a.pt") == 0
    record = json.loads(path.read_text())
    table = record.pop("prune")
    assert record == before
    assert [row["threshold"] for row in table] == [0, 0.001, 0.01, 0.02, 0.05, 0.1, 0.2]
    printed = capsys.readouterr().out.splitlines()[-8:-1]   # "added to a.json" follows
    for row, line in zip(table, printed, strict=True):
        assert line.split() == [f"{row['threshold']:g}", f"{row['pruned']:.2f}", "%",
                                f"{row['test_accuracy']:.2f}", "%", f"{row['change']:+.2f}"]

def test_prune_adds_its_table_once(checkpoint, capsys):
    """A table that the record has stays, and a line says so."""
    path = pathlib.Path("a.json")
    record = json.loads(path.read_text())
    record["prune"] = [{"threshold": 0.0, "change": 1.5}]
    kept = json.dumps(record)
    path.write_text(kept)
    assert run_script(prune, "a.pt") == 0
    assert path.read_text() == kept
    assert capsys.readouterr().out.endswith("a.json has this table already\n")

def test_prune_leaves_the_record_of_another_run(checkpoint, capsys):
    """The table is printed all the same."""
    path = pathlib.Path("a.json")
    record = json.loads(path.read_text())
    record["epochs"][0]["train_loss"] = 3.0
    for kept in (json.dumps(record), "[]"):
        path.write_text(kept)
        assert run_script(prune, "a.pt") == 0
        assert path.read_text() == kept
        lines = capsys.readouterr().out.splitlines()
        reason = "is not the record of a finished run|has other epochs"
        assert re.match(f"not added to the record: .*a.json ({reason})", lines[-1])
        assert len(lines) == 1 + 2 + 7

# --- errors

@pytest.mark.parametrize("words, status, says", [
    ("--arch resnet15", 2, r"argument --arch: resnet15: .* 6n \+ 2, such as 14"),
    ("--arch resnet2", 2, "such as 8"),
    ("--arch vgg16", 2, "resnet866 or wrn14-32"),
    ("--train bn+output", 2, "not allowed with"),
    ("--train all", 2, "not allowed with"),
    ("--epochs 0", 2, "argument --epochs: 0: not in 1 to 1000000"),
    ("--epochs many", 2, "--epochs"),
    ("--lr nan", 2, "--lr: nan"),
    ("--seed -1", 2, "--seed: -1: not in 0 to 4294967295"),
    ("--out x.ckpt", 2, "--out: x.ckpt: .* ends in .pt"),
    ("--amp fp8", 2, "--amp"),
    ("--device cuda:99", 2, "argument --device: cuda:99: "),
    ("--device tpu", 2, "argument --device: tpu: "),
    ("--out a.pt/x.pt", 1, "File exists: 'a.pt'"),
    ("", 2, "a.pt exists: continue it by --resume"),
    ("--batch-size 9 --lr 1e30 --out b.pt", 1, "diverged: .* in epoch 1, .* --lr"),
    ("--resume --epochs 8", 2, "a.pt is a run with epochs 3, not 8"),
    ("--resume --seed 1", 2, "seed 0, not 1"),
])
def test_errors_of_train(words, status, says, checkpoint, finished_run, capsys):
    """One line that says what is wrong. Beside a finished run, every file stays as it is."""
    line = error_of(capsys, status, train, *TO_A, *words.split())
    assert re.search(says, line)
    assert files_here() == finished_run

@pytest.mark.parametrize("words, status, says", [
    ("", 2, "x.pt"),
    ("no.pt", 1, r"error: \[Errno 2\] No such file or directory: 'no.pt'"),
    ("a.pt --thresholds -1", 2, "--thresholds: -1"),
    ("a.pt --thresholds nan", 2, "--thresholds: nan"),
])
def test_errors_of_prune(words, status, says, checkpoint, finished_run, capsys):
    """One line that says what is wrong, and every file stays as it is."""
    line = error_of(capsys, status, prune, *words.split())
    assert re.search(says, line)
    assert files_here() == finished_run

def test_divergence_keeps_the_older_checkpoint(tiny, monkeypatch, capsys):
    """An epoch with a loss that is not finite is not saved."""
    losses = iter([1.0, 1.0, 1.0, 1.0, math.nan, 1.0])   # the fifth step is in epoch 2

    def diverging_step(*args):
        return torch.tensor(next(losses)), torch.tensor(1)

    monkeypatch.setattr(train, "train_step", diverging_step)
    line = error_of(capsys, 1, train, *TO_A)
    assert "training diverged" in line
    assert "in epoch 2, which is not saved" in line
    assert len(epochs_of("a.pt")) == 1

def test_parameter_that_is_not_finite_is_divergence(tiny, monkeypatch, capsys):
    """Though the loss is finite, as after the last step of an epoch."""
    step = train.train_step

    def diverging_step(model, *args):
        result = step(model, *args)
        model.bn.bias.data[3] = math.inf
        return result

    monkeypatch.setattr(train, "train_step", diverging_step)
    words = TO_A + ["--batch-size", "40"]
    assert "in epoch 1, which is not saved" in error_of(capsys, 1, train, *words)

@pytest.mark.parametrize("error, says", [
    (torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB."), "CUDA out of memory"),
    (MemoryError(), "MemoryError"),
    (RuntimeError("[enforce fail] can't allocate memory: 9 bytes"), "enforce"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), "CUBLAS"),
])
def test_out_of_memory_is_one_line(error, says, tiny, monkeypatch, capsys):
    """In all of PyTorch's ways to say it."""
    monkeypatch.setattr(train, "begin_or_continue", raising(error))
    line = error_of(capsys, 1, train, *SMALL)
    assert says in line
    assert line.endswith("; try a smaller batch or network")

@pytest.mark.parametrize("version", ["2.5.1", "2.10.0+cu128", "1.13.1"])
def test_older_torch_is_refused(version, tiny, monkeypatch, capsys):
    """At the start, by every script."""
    monkeypatch.setattr(torch, "__version__", version)
    assert f"torch {version} is too old" in error_of(capsys, 2, train, *TO_A)
    assert f"torch {version} is too old" in error_of(capsys, 2, prune, "a.pt")

@pytest.mark.parametrize("version", ["2.11.0", "2.14.1+cu130", "3.0.0a0+git1234567"])
def test_newer_torch_is_accepted(version, monkeypatch):
    """Whatever follows the first two numbers."""
    monkeypatch.setattr(torch, "__version__", version)
    train.require_torch()

# --- command line and output

def test_a_line_for_each_epoch(tiny, capsys):
    """With the figures of the record under their names."""
    assert run_script(train, *TO_A) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:7] == ["epoch", "train", "loss", "train", "acc", "test", "acc"]
    for epoch, line in zip(epochs_of("a.pt"), lines[2:5], strict=True):
        assert line.split()[:7] == [
            f"{epoch['epoch']}/3", f"{epoch['train_loss']:.4f}",
            f"{epoch['train_accuracy']:.2f}", "%", f"{epoch['test_accuracy']:.2f}", "%",
            f"{epoch['lr']:g}"]

def test_output_in_a_file_is_complete_by_the_line(tiny, monkeypatch):
    """Without PYTHONUNBUFFERED."""
    first_words = []
    step = train.train_step
    output = pathlib.Path("log.txt")

    def watched_step(*args):
        last_line = output.read_text().splitlines()[-1]
        first_words.append(last_line.split()[0])
        return step(*args)

    monkeypatch.setattr(train, "train_step", watched_step)
    with output.open("w") as stdout, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        assert run_script(train, *TO_A) == 0
    assert first_words == ["epoch"] * 3 + ["1/3"] * 3 + ["2/3"] * 3

def test_console_that_lacks_a_character(tiny, monkeypatch):
    """It shows a question mark."""
    output = pathlib.Path("log.txt")
    with output.open("w", encoding="ascii") as stdout, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        assert run_script(train, *SMALL, "--epochs", 1, "--out", "é.pt") == 0
    assert "?.pt" in output.read_text()
    assert len(epochs_of("é.pt")) == 1

def test_closed_output_does_not_end_training(tiny, monkeypatch, capsys):
    """As in `train.py | head -n 1`, and nothing is said."""
    reader, writer = os.pipe()
    read = []

    def close():
        read.append(os.read(reader, 10_000).decode())
        os.close(reader)

    call_before_step(monkeypatch, 1, close)
    with open(writer, "w") as stdout, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        assert run_script(train, *TO_A) == 0
    assert "672 of 78,042 parameters" in read[0]
    assert capsys.readouterr().err == ""
    assert train.read_record(pathlib.Path("a.json"))["epochs"] == epochs_of("a.pt")

@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_output_does_not_end_training(tiny, monkeypatch, capsys):
    """As when a log fills a quota. It is said once."""
    with open("/dev/full", "w") as stdout, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        assert run_script(train, *TO_A) == 0
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("output is lost from here on: ")
    assert train.read_record(pathlib.Path("a.json"))["epochs"] == epochs_of("a.pt")

@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_loss_of_both_outputs_does_not_end_training(tiny, monkeypatch):
    """As when a terminal goes away."""
    with open("/dev/full", "w") as stdout, open("/dev/full", "w") as stderr:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stdout)
            patch.setattr(sys, "stderr", stderr)
            assert run_script(train, *TO_A) == 0
    assert len(epochs_of("a.pt")) == 3

def test_printed_commands_run_in_another_folder(tiny, capsys):
    """They are quoted for the shell, and name the scripts by their whole path."""
    words = ["--epochs", 1, "--data-dir", "my data", "--out", "it's a.pt"]
    assert run_script(train, *SMALL, *words) == 0
    lines = re.findall("^next: (.*)$", capsys.readouterr().out, re.M)
    for_prune, for_analyze = map(shlex.split, lines)
    assert for_analyze == [sys.executable, str(HERE / "analyze.py"), "it's a.pt"]
    assert for_prune == [sys.executable, str(HERE / "prune.py"), "it's a.pt",
                         "--data-dir", "my data"]
    output = subprocess.check_output(for_prune + ["--thresholds", "0"], text=True)
    assert "it's a.pt: resnet8, --train all, --norm batch, epoch 1 of 1" in output

# --- results

def stem(path):
    return path.stem

def command_of(options):
    """The words of train.py's command line that give these options."""
    words = []
    for name, value in options.items():
        words.append(f"--{name.replace('_', '-')}={value}")
    return words

@pytest.mark.parametrize("path", RESULTS, ids=stem)
def test_committed_records(path):
    """Each is complete, bears its default name, counts what trains, and has the paper's rates."""
    record = train.read_record(path)
    options = record["options"]
    words = command_of(options)
    assert path.stem == arguments(*words).out.stem
    counts = train.count_parameters(built(*words))
    for name, count in record["parameters"].items():   # a group can be newer than the record
        assert counts[name] == count
    n = options["epochs"]
    rates = []
    for epoch in range(n):
        factor = 1 if epoch < n / 2 else 10 if epoch < 3 * n / 4 else 100
        rates.append(options["lr"] / factor)
    assert [epoch["lr"] for epoch in record["epochs"]] == rates
    unpruned = record["prune"][0]["test_accuracy"]
    assert unpruned == pytest.approx(record["test_accuracy"], abs=0.2)   # a GPU's, then a CPU's

@pytest.mark.parametrize("path", RESULTS, ids=stem)
def test_committed_checkpoints(path):
    """prune.py works after a clone: every BatchNorm-only run has its checkpoint.

    It is of the run of the record, and has the gammas of its table.
    """
    record = train.read_record(path)
    file = path.with_suffix(".pt")
    if not file.exists():
        assert record["options"]["train"] != "bn"
        pytest.skip("a record alone")
    model, checkpoint = train.load_checkpoint(file)
    for name in ("options", "sessions", "epochs"):
        assert checkpoint[name] == record[name]
    gamma = prune.gammas(model).abs()
    for row in record["prune"]:
        share = 100 * (gamma < row["threshold"]).double().mean().item()
        assert row["pruned"] == pytest.approx(share)

def test_committed_checkpoint_of_all_parameters_is_a_whole_state_dict():
    """load_state_dict takes it as it is."""
    path = HERE / "results" / "resnet14-all-s0.pt"
    state = torch.load(path, weights_only=True)["model"]
    models.build_model("resnet14", 1).load_state_dict(state)

UNFINISHED = sorted((HERE / "results" / "unfinished").glob("*.pt"))

@pytest.mark.parametrize("path", UNFINISHED, ids=stem)
def test_unfinished_runs(path):
    """Their checkpoints load, and their records are refused as unfinished."""
    _, checkpoint = train.load_checkpoint(path)
    done = len(checkpoint["epochs"])
    with pytest.raises(ValueError, match=f"{done} of 160 epochs are done"):
        train.read_record(path.with_suffix(".json"))

SHALLOW = sorted((HERE / "results").glob("resnet[13]?-*.pt"))   # deeper ones would take minutes

@real_images
@pytest.mark.parametrize("path", SHALLOW, ids=stem)
def test_committed_checkpoints_have_the_recorded_accuracy(path):
    """With the gammas below 0.01 set to zero, to 0.3 points, because the precision may differ."""
    args = arguments("--data-dir", os.environ["CIFAR10_DIR"])
    model, content = train.load_checkpoint(path)
    images, labels, amp = prune.prepare_test(model, content, args)
    prune.zero_gammas(model, 0.01)
    accuracy = train.evaluate(model, images, labels, amp)
    table = train.read_record(path.with_suffix(".json"))["prune"]
    recorded = {row["threshold"]: row["test_accuracy"] for row in table}
    assert accuracy == pytest.approx(recorded[0.01], abs=0.3)

# --- slow

def train_until_killed(folder, write):
    """In a process of its own: start the run of a.pt. SIGKILL comes in place of this write."""
    writes = itertools.count(1)
    replace = os.replace

    def killing_replace(*args):
        if next(writes) == write:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*args)

    os.chdir(folder)
    os.replace = killing_replace
    train.load_data = tiny_data
    run_script(train, *TO_A)

@slow
@pytest.mark.parametrize("write", COMPLETE)
def test_slow_kills_lose_at_most_an_epoch(write, tiny, finished_run):
    """SIGKILL just before a record or a checkpoint is put in place."""
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=train_until_killed, args=(os.getcwd(), write))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(epochs_of("a.pt")) == COMPLETE[write]
    assert run_script(train, *TO_A, "--resume") == 0
    pathlib.Path("whole.pt").write_bytes(finished_run["a.pt"])
    assert content_of("a.pt") == content_of("whole.pt")

# --- analyze

def write_run(name, accuracy, words="--bn-only", **entries):
    """Write the record of a finished run of resnet14 by the paper's recipe.

    accuracy: that of its last epoch; words: its command line; entries: what else the record holds.
    """
    options = options_of(arguments("--arch", "resnet14", *words.split()))
    model = models.empty_model(options["arch"], options["norm"])
    train.freeze(model, options["train"], options["seed"])
    epochs = []
    for epoch in range(1, options["epochs"] + 1):
        entries_of_epoch = dict.fromkeys(train.EPOCH_ENTRIES, 10.0)
        entries_of_epoch["epoch"] = epoch
        epochs.append(entries_of_epoch)
    epochs[-1]["test_accuracy"] = accuracy
    record = {
        "options": options,
        "parameters": train.count_parameters(model),
        "test_accuracy": accuracy,
        "seconds": 7200.0,
        "sessions": [session(1)],
        "epochs": epochs,
    }
    record.update(entries)
    pathlib.Path(name).write_text(json.dumps(record))

def session(first_epoch, commit=None):
    return {"id": "0", "first_epoch": first_epoch, "plain": False, "commit": commit,
            "torch": "2.13.0", "hardware": "Abacus"}

def prune_rows(factor=-2):
    """A table "prune": each threshold t has 100 t % of the gammas and a change of `factor` t."""
    rows = []
    for threshold in prune.THRESHOLDS:
        rows.append({"threshold": threshold, "pruned": 100 * threshold, "test_accuracy": 40.0,
                     "change": factor * threshold})
    return rows

def relu_rows():
    """A table "activations": a quarter of the features is disabled."""
    return [{"relu": kind, "disabled": 25.0} for kind in analyze.RELUS]

def tables_of(text):
    """{title: rows} of the tables in Markdown; a row is {column: cell}."""
    tables = {}
    for section in text.split("\n## ")[1:]:
        title, _, *lines = section.strip().splitlines()
        assert len({len(line) for line in lines}) == 1, "not aligned"
        cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
        header, _, *rows = cells
        tables[title] = [dict(zip(header, row)) for row in rows]
    return tables

def printed_tables(capsys):
    """The tables that analyze.py prints of the records in the current folder."""
    assert run_script(analyze, "--results", ".") == 0
    return tables_of(capsys.readouterr().out)

def row_of(rows, *cells):
    """The one row that begins with these cells."""
    found = []
    for row in rows:
        if tuple(row.values())[:len(cells)] == cells:
            found.append(row)
    assert len(found) == 1
    return found[0]

def test_accuracy_is_mean_and_sample_deviation_over_seeds(tiny, capsys):
    """Runs that differ in the seed make one number; a network without a run has "-"."""
    write_run("a.json", 40.0)
    write_run("b.json", 43.0, "--bn-only --seed 1")
    depth = printed_tables(capsys)["Depth"]
    assert row_of(depth, "resnet14")["bn"] == f"41.50 ± {np.std([40, 43], ddof=1):.2f} (n=2)"
    assert row_of(depth, "resnet32")["bn"] == "-"

def test_published_values_stand_beside_ours(tiny, capsys):
    """A row has the network's parameters, then ours, paper and reproduction of bn and of all."""
    write_run("a.json", 60.0, "--arch wrn14-8 --bn-only")
    width = printed_tables(capsys)["Width"]
    assert list(row_of(width, "wrn14-8").values()) == [
        "wrn14-8", "11,093,130", "8,960", "60.00 (n=1)", "64.4", "64.86", "-", "94.7", "94.3"]

def test_what_trains_has_a_row_for_each_run_and_what_the_paper_adds(tiny, capsys):
    """The paper's rows stand at networks of which we trained more than bn and all."""
    write_run("a.json", 40.0)
    write_run("b.json", 50.0, "--arch wrn14-2 --train bn+shortcut")
    write_run("c.json", 60.0, "--arch wrn14-2 --bn-only --bn-init oneone")
    rows = [list(row.values()) for row in printed_tables(capsys)["What trains"]]
    assert rows == [
        ["resnet14", "bn", "1,120", "40.00 (n=1)", "48.1"],
        ["wrn14-2", "bn+shortcut", "12,480", "50.00 (n=1)", "-"],
        ["wrn14-2", "bn+shortcut+output", "13,770", "-", "72.6"],
        ["wrn14-2", "bn, oneone", "2,240", "60.00 (n=1)", "-"],
        ["wrn14-2", "shortcut+output", "11,530", "-", "~57.5"],
    ]

def test_networks_are_sorted_by_depth_then_width(tiny, capsys):
    """Not by name, by which resnet110 would come before resnet14 and wrn14-16 before wrn14-2."""
    networks = ["resnet14", "wrn14-2", "wrn14-16", "resnet20", "resnet110"]
    for arch in networks:
        write_run(f"{arch}.json", 40.0, f"--arch {arch} --bn-only")
    tables = printed_tables(capsys)
    assert [row["network"] for row in tables["What trains"]] == networks
    assert [row["network"] for row in tables["Runs"]] == networks

def test_another_learning_rate_is_a_variant_of_its_own(tiny, capsys):
    """It is no seed of the default's mean."""
    write_run("a.json", 40.0)
    write_run("b.json", 50.0, "--bn-only --lr 0.03")
    write_run("c.json", 60.0, "--bn-only --lr 0.03 --seed 1")
    tables = printed_tables(capsys)
    assert row_of(tables["Depth"], "resnet14")["bn"] == "40.00 (n=1)"
    assert row_of(tables["What trains"], "resnet14", "bn, lr 0.03")["here"] == "55.00 ± 7.07 (n=2)"

def test_variants_are_named_by_what_differs_from_the_recipe(tiny, capsys):
    """In this order: what trains, normalization, initial values, learning rate."""
    words = "--train gamma --norm layer --bn-init oneone --weight-init binary --lr 0.03"
    write_run("a.json", 60.0, words)
    [row] = printed_tables(capsys)["Runs"]
    assert row["what trains"] == "gamma, layer, oneone, binary, lr 0.03"

def test_other_normalizations_have_a_table_of_their_own(tiny, capsys):
    """Beside them stand the runs of BatchNorm alone of the same network, and only those."""
    write_run("a.json", 40.0, prune=prune_rows(), activations=relu_rows())
    write_run("b.json", 50.0, "--bn-only --norm layer --lr 0.03")
    write_run("c.json", 60.0, "--bn-only --norm layer --bn-init oneone", prune=prune_rows())
    write_run("d.json", 70.0, "--train all")
    write_run("e.json", 80.0, "--arch resnet20 --bn-only")
    tables = printed_tables(capsys)
    assert [list(row.values()) for row in tables["Other normalizations"]] == [
        ["resnet14", "batch", "0.1", "bn", "40.00 (n=1)", "1.00 (n=1)", "25.00 (n=1)"],
        ["resnet14", "layer", "0.03", "bn", "50.00 (n=1)", "-", "-"],
        ["resnet14", "layer", "0.1", "bn, oneone", "60.00 (n=1)", "1.00 (n=1)", "-"],
    ]
    assert [row["what trains"] for row in tables["What trains"]] == ["all", "bn", "bn"]

def test_tables_without_a_row_are_not_printed(tiny, capsys):
    """Such as that of other normalizations, if all runs have BatchNorm."""
    write_run("a.json", 40.0)
    assert list(printed_tables(capsys)) == ["Depth", "Width", "What trains", "Runs"]

def test_disabled_features_by_their_relu(tiny, capsys):
    """A mean over the runs that have the table, "-" for a kind of ReLU that none has."""
    write_run("a.json", 40.0, activations=relu_rows()[:2])
    write_run("b.json", 43.0, "--bn-only --seed 1")
    [row] = printed_tables(capsys)["Disabled features (%), by their ReLU"]
    assert list(row.values()) == ["resnet14", "bn", "25.00 (n=1)", "25.00 (n=1)", "-"]

def test_pruning_shows_means_over_the_runs_that_were_pruned(tiny, capsys):
    """The change in points and the share of gammas, or "-" for a threshold that no run has."""
    write_run("a.json", 40.0, prune=prune_rows(factor=-2)[2:])
    write_run("b.json", 43.0, "--bn-only --seed 1", prune=prune_rows(factor=0)[2:])
    write_run("c.json", 43.0, "--bn-only --seed 2")
    tables = printed_tables(capsys)
    [pruning] = [rows for title, rows in tables.items() if "set to zero" in title]
    [row] = pruning
    assert row["n"] == "2"
    assert row["< 0.2"] == "-0.20 (20.0)"
    assert row["< 0.001"] == "-"

def test_a_run_has_a_row_for_each_session(tiny, capsys):
    """The first has what is true of the whole run, each what is true of the session."""
    commit = "0123456789" * 4
    write_run("a.json", 50.0, "--arch wrn14-2 --train bn+shortcut",
              sessions=[session(1), session(5, commit), session(9, f"{commit}-dirty")])
    rows = [list(row.values()) for row in printed_tables(capsys)["Runs"]]
    about_run = ["wrn14-2", "bn+shortcut", "0", "off", "50.00", "2.00"]
    assert rows == [
        about_run + ["1", "Abacus", "2.13.0", "not in git"],
        [""] * 6 + ["5", "Abacus", "2.13.0", "0123456"],
        [""] * 6 + ["9", "Abacus", "2.13.0", "0123456-dirty"],
    ]

def test_sessions_that_trained_no_epoch_are_not_shown(tiny, capsys):
    """Those that were followed by another one at the same epoch, and those of a finished run."""
    sessions = [session(1), session(5, "unknown"), session(5), session(161)]
    write_run("a.json", 50.0, sessions=sessions)
    rows = printed_tables(capsys)["Runs"]
    assert [row["from epoch"] for row in rows] == ["1", "5"]
    assert [row["commit"] for row in rows] == ["not in git", "not in git"]

@pytest.mark.parametrize("words, entries, reason", [
    ("--bn-only", {}, "another run of the same seed (for another precision, use another folder)"),
    ("--bn-only --seed 2 --epochs 2", {}, "not the paper's recipe (epochs 2, not 160)"),
    ("--bn-only --seed 2 --batch-size 64", {}, "not the paper's recipe (batch_size 64, not 128)"),
    ("--bn-only --seed 2 --lr 0.03 --weight-decay 0", {},
     "not the paper's recipe (weight_decay 0.0, not 0.0001)"),
    ("--bn-only --seed 2 --dataset synthetic", {},
     "not the paper's recipe (dataset synthetic, not cifar10)"),
    ("--bn-only --seed 2", {"epochs": [dict.fromkeys(train.EPOCH_ENTRIES, 1)]},
     "not the record of a finished run (1 of 160 epochs are done)"),
    ("--bn-only --seed 2", {"test_accuracy": 99.99},
     "not the record of a finished run (its accuracy is not the last epoch's)"),
])
def test_what_is_no_finished_run_of_the_recipe_is_left_out(words, entries, reason, tiny, capsys):
    """The table "Left out" names the file and the reason, and no other table counts the run."""
    write_run("a.json", 40.0)
    write_run("b.json", 99.0, words, **entries)
    tables = printed_tables(capsys)
    assert tables["Left out"] == [{"file": "b.json", "reason": reason}]
    assert row_of(tables["Depth"], "resnet14")["bn"] == "40.00 (n=1)"
    assert len(tables["Runs"]) == 1

def test_json_of_something_else_is_left_out(tiny, capsys):
    """As that of a program's package, or a file that is not JSON."""
    write_run("a.json", 40.0)
    pathlib.Path("b.json").write_text('{"name": "package"}')
    pathlib.Path("c.json").write_text("{")
    left_out = printed_tables(capsys)["Left out"]
    assert [row["file"] for row in left_out] == ["b.json", "c.json"]
    for row in left_out:
        assert row["reason"].startswith("not the record of a finished run (")

@pytest.mark.parametrize("words", [[], ["--plot"]])
def test_folder_without_a_finished_run(words, tiny, capsys):
    """A line on stderr says so, and stdout names what was left out."""
    if words == ["--plot"]:
        pytest.importorskip("matplotlib")
    write_run("a.json", 40.0, "--bn-only --epochs 2")
    assert run_script(analyze, "--results", ".", *words) == 1
    printed = capsys.readouterr()
    assert printed.err == ("analyze.py: error: no record of a finished run of the recipe in .\n")
    [row] = tables_of(printed.out)["Left out"]
    assert row["file"] == "a.json"
    assert sorted(pathlib.Path().iterdir()) == [pathlib.Path("a.json")]

@pytest.mark.parametrize("words, says", [
    (["--activations"], "--activations needs checkpoints"),
    (["--results", "a.json"], "argument --results: a.json: not a folder"),
    (["--results", "no"], "argument --results: no: not a folder"),
    (["a.pt", "--plot"], "--plot draws the records in --results, not checkpoints"),
])
def test_wrong_usage_of_analyze(words, says, tiny, capsys):
    """It is a line on stderr and status 2."""
    write_run("a.json", 40.0)
    assert says in error_of(capsys, 2, analyze, *words)

def test_network_without_gammas_is_one_line(monkeypatch):
    """A normalization of one's own may have no weight."""
    monkeypatch.setitem(models.NORMS, "none", nn.Identity)
    with pytest.raises(train.UserError, match="this network has no gammas"):
        prune.gammas(models.build_model("resnet8", 0, "none"))

def test_firing_of_relus():
    """Against the blocks of resnet8 called one by one, on batches of different sizes."""
    images, labels = TEST_IMAGES[:200], TEST_LABELS[:200]
    model = known_gammas()
    with torch.no_grad():   # a feature that fires at half a percent of its positions is disabled
        feature = model.bn(model.conv(train.normalize(images)))[:, 0]
        model.bn.bias[0] -= feature.quantile(0.995)
    table = analyze.relu_table(model, images, labels, "off")
    with torch.no_grad():
        x = model.bn(model.conv(train.normalize(images))).relu()
        stem = [x]
        inside = []
        after = []
        for block in (model.stage1[0], model.stage2[0], model.stage3[0]):
            inside.append(block.bn1(block.conv1(x)))
            x = block(x)
            after.append(x)
    expected = {"all": stem + inside + after, "inside a block": inside, "after the addition": after}
    assert [row["relu"] for row in table] == list(expected)
    for row in table:
        shares = []
        for features in expected[row["relu"]]:
            shares.append((features > 0).double().mean((0, 2, 3)))
        shares = torch.cat(shares)
        assert row["features"] == len(shares)
        assert row["fires"] == pytest.approx(100 * shares.mean().item(), abs=1e-3)
        assert row["disabled"] == pytest.approx(100 * (shares < 0.01).double().mean().item())
        assert 0 < row["disabled"] < 100

def test_histogram_has_a_bin_around_zero(capsys):
    """Bins of 0.05 from -1.025 to 1.025, a # per percent; a last line counts what lies beyond."""
    around_zero = [-0.02, 0.0, 0.02, 0.0, 0.0]
    others = [0.03, 1.0, -1.0, 1.03, -7.0]
    analyze.print_histogram("x", np.array(around_zero + others))
    lines = capsys.readouterr().out.splitlines()
    assert lines[24].split() == ["+0.00", "50.00", "%", 50 * "#"]
    assert lines[45] == "beyond 20.00 %"

def test_distributions_of_a_checkpoint(checkpoint, capsys):
    """Those of all its gammas, and of all its betas."""
    model, _ = train.load_checkpoint("a.pt")
    pairs = list(models.gammas_and_betas(model))
    for title, place in [("Distribution of gamma", 1), ("Distribution of beta", 2)]:
        values = torch.cat([pair[place].detach() for pair in pairs])
        analyze.print_histogram(title, values.numpy())
    expected = capsys.readouterr().out
    assert run_script(analyze, "a.pt") == 0
    assert capsys.readouterr().out.endswith(expected)

def test_activations_are_added_to_the_record(checkpoint, capsys):
    """And printed: resnet8 has 16 features in the stem, 112 inside blocks, 112 after additions."""
    assert run_script(analyze, "a.pt", "--activations") == 0
    rows = json.loads(pathlib.Path("a.json").read_text())["activations"]
    assert [row["features"] for row in rows] == [16 + 2 * 112, 112, 112]
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split("|")[2].strip() for line in lines] == ["240", "112", "112"]

def test_a_checkpoint_needs_no_folder_of_results(checkpoint, monkeypatch, capsys):
    """The scripts look into a checkpoint without the published values."""
    monkeypatch.setattr(analyze, "RESULTS", pathlib.Path("no"))
    assert run_script(analyze, "a.pt") == 0
    assert "Distribution of beta" in capsys.readouterr().out

def test_results_readme_is_what_analyze_prints(capsys):
    """Byte by byte: python analyze.py > results/README.md."""
    assert run_script(analyze) == 0
    assert capsys.readouterr().out.encode() == (HERE / "results/README.md").read_bytes()

@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """{name: figure} of the committed runs."""
    pytest.importorskip("matplotlib")
    runs, _ = analyze.read_results(HERE / "results")
    return analyze.draw(runs, analyze.read_published(), tmp_path_factory.mktemp("figures"))

@pytest.fixture(scope="module")
def resnet14_records():
    """The committed records of resnet14 of which BatchNorm alone was trained."""
    paths = [path for path in RESULTS if path.match("resnet14-bn-s[0-9]*.json")]
    return [json.loads(path.read_text()) for path in paths]

def points_of(figure, gid):
    """The points (n, 2) of the line with this gid."""
    [line] = [line for line in figure.axes[0].lines if line.get_gid() == gid]
    return line.get_xydata()

def test_figure_of_accuracy_has_a_point_for_each_run(figures, resnet14_records):
    """The first are those of resnet14, by seed; its first mean is where the line begins."""
    accuracies = [record["test_accuracy"] for record in resnet14_records]
    n = len(accuracies)
    points = points_of(figures["accuracy"], "bn")
    assert np.allclose(points[:n, 0], 1120)
    assert np.allclose(points[:n, 1], accuracies)
    line = points_of(figures["accuracy"], "bn, means")
    assert np.allclose(line[0], [1120, np.mean(accuracies)])

def test_figure_of_accuracy_has_the_papers_values(figures):
    """The paper's range for resnet866 is drawn at its middle."""
    points = points_of(figures["accuracy"], "bn, paper")
    assert np.allclose(points[0], [1120, 48.1])
    assert np.allclose(points[6], [64_736, (82.0 + 83.9) / 2])

def test_figure_of_epochs_has_means_over_seeds(figures, resnet14_records):
    """A point for each of the 160 epochs."""
    curves = []
    for record in resnet14_records:
        curves.append([epoch["test_accuracy"] for epoch in record["epochs"]])
    points = points_of(figures["epochs"], "resnet14 bn")
    assert np.allclose(points[:, 0], np.arange(1, 161))
    assert np.allclose(points[:, 1], np.mean(curves, axis=0))

def test_figure_of_pruning_has_means_over_seeds(figures, resnet14_records):
    """A point for each threshold."""
    for column, name in enumerate(["pruned", "test_accuracy"]):
        values = []
        for record in resnet14_records:
            values.append([row[name] for row in record["prune"]])
        points = points_of(figures["pruning"], "resnet14 bn")
        assert np.allclose(points[:, column], np.mean(values, axis=0))

@pytest.mark.parametrize("gid", ["resnet14 bn", "resnet14 all"])
def test_figure_of_gamma_has_the_gammas_of_the_checkpoints(gid, figures):
    """Its bins add up to the recorded shares below 0.05, 0.1 and 0.2."""
    [bars] = [patch for patch in figures["gamma"].axes[0].patches if patch.get_gid() == gid]
    below = np.cumsum(bars.get_data().values)
    recorded = points_of(figures["pruning"], gid)[:, 0]
    assert prune.THRESHOLDS[4:] == [0.05, 0.1, 0.2]
    assert np.allclose([below[0], below[1], below[3]], recorded[4:])

def test_a_half_copied_checkpoint_does_not_end_the_drawing(tiny, capsys):
    """A line names it, and the figure of gamma shows the others."""
    pytest.importorskip("matplotlib")
    for seed in (0, 1):
        for suffix in (".json", ".pt"):
            file = HERE / f"results/resnet14-bn-s{seed}{suffix}"
            pathlib.Path(file.name).write_bytes(file.read_bytes())
    damaged = pathlib.Path("resnet14-bn-s1.pt")
    damaged.write_bytes(damaged.read_bytes()[:30_000])
    assert run_script(analyze, "--results", ".", "--plot") == 0
    lines = capsys.readouterr().out.splitlines()
    [line] = [line for line in lines if not line.startswith("wrote ")]
    assert line.startswith("not in the figure: resnet14-bn-s1.pt is not a valid checkpoint")
    drawn = sorted(file.name for file in pathlib.Path("figures").iterdir())
    assert drawn == ["accuracy.svg", "epochs.svg", "gamma.svg", "pruning.svg"]
    runs, _ = analyze.read_results(pathlib.Path())
    model, _ = train.load_checkpoint("resnet14-bn-s0.pt")
    assert analyze.stored_gammas(runs["resnet14", "bn"]) == prune.gammas(model).tolist()

def test_figures_of_any_run(tiny, capsys):
    """Also without checkpoints, tables of pruning, and networks of the paper."""
    pytest.importorskip("matplotlib")
    write_run("a.json", 40.0, "--arch resnet20 --bn-only --norm layer")
    assert run_script(analyze, "--results", ".", "--plot", "new/folder") == 0
    assert len(list(pathlib.Path("new/folder").iterdir())) == 4

def test_figures_do_not_depend_on_a_matplotlibrc(tiny, capsys):
    """One with usetex and a missing font changes no byte; after drawing, it is in force again."""
    matplotlib = pytest.importorskip("matplotlib")
    write_run("a.json", 40.0)
    assert run_script(analyze, "--results", ".", "--plot", "before") == 0
    with matplotlib.rc_context({"text.usetex": True, "font.family": "no such font"}):
        assert run_script(analyze, "--results", ".", "--plot", "after") == 0
        assert matplotlib.rcParams["text.usetex"]
    for file in pathlib.Path("before").iterdir():
        assert pathlib.Path("after", file.name).read_bytes() == file.read_bytes()

NEEDS_MATPLOTLIB = "--plot needs matplotlib 3.7 or newer: pip install -U matplotlib"

@pytest.mark.parametrize("version", ["3.6.3", "2.10.0"])
def test_an_old_matplotlib_is_one_line(version, tiny, monkeypatch, capsys):
    """Before 3.7, it can't place a legend outside of the axes."""
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.setattr(matplotlib, "__version__", version)
    assert NEEDS_MATPLOTLIB in error_of(capsys, 2, analyze, "--results", ".", "--plot")

def test_a_missing_matplotlib_is_one_line(tiny, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)   # makes the import fail
    assert NEEDS_MATPLOTLIB in error_of(capsys, 2, analyze, "--results", ".", "--plot")
