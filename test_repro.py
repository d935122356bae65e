"""Tests: pytest -q (a minute on two idle cores, no network), and the slow ones: pytest -q -k slow.

Set CIFAR10_DIR to the folder that holds cifar-10-batches-py to run the tests on real images, too.
"""
import errno
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import pickle
import re
import runpy
import shutil
import signal
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
# pytest evaluates the text, with its own `config`.
slow = pytest.mark.skipif("'slow' not in config.option.keyword", reason="slow: pytest -q -k slow")

# A network, data and batches that a CPU trains on in a second.
SMALL = ["--arch", "resnet8", "--dataset", "synthetic", "--device", "cpu", "--batch-size", "16",
         "--epochs", "3"]
TO_A = SMALL + ["--bn-only", "--out", "a.pt"]   # the command that wrote the fixture `checkpoint`
(TRAIN_IMAGES, TRAIN_LABELS), (TEST_IMAGES, TEST_LABELS) = train.synthetic_data(0)


# --- what the tests share


def batch(n=16, first=0, dtype=torch.float32):
    """Normalized training images (n, 3, 32, 32) and their labels (n,)."""
    images = TRAIN_IMAGES[first:first + n]
    labels = TRAIN_LABELS[first:first + n]
    return train.normalize(images).to(dtype), labels


def arguments(*words):
    """The arguments of train.py on the CPU with these words."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", "--device", "cpu", *map(str, words)])
        return train.parse_command_line()


def network(*words, dtype=torch.float32):
    """The network of these words in training mode, resnet8 unless they name another."""
    args = arguments("--arch", "resnet8", *words)
    return train.network_of(train.options_of(args)).to(dtype).train()


def network_and_step(*words, dtype=torch.float32):
    """(model, step, optimizer, scaler) of these words; step takes batches of 16 and of 7 images."""
    args = arguments("--arch", "resnet8", *words)
    precision = train.choose_precision(args.amp, args.device)
    model = network(*words, dtype=dtype).to(args.device)
    if not args.plain:
        train.lay_out(model, precision)
    optimizer = train.make_optimizer(model, args)
    scaler = torch.amp.GradScaler(args.device.type, enabled=precision == "fp16")
    step = train.make_step(model, optimizer, scaler, precision, 16, 7, args)
    return model, step, optimizer, scaler


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
    train_split = (TRAIN_IMAGES[:40], TRAIN_LABELS[:40])
    test_split = (TEST_IMAGES[:100], TEST_LABELS[:100])
    return train_split, test_split


def files_here():
    """{name: content} of the files in the current folder, which has no folders in it."""
    return {file.name: file.read_bytes() for file in pathlib.Path().iterdir()}


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


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """{name: content} of the files of a finished run, a.pt and a.json."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "load_data", tiny_data)
        patch.chdir(folder)
        assert run_script(train, *TO_A) == 0
        return files_here()


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
    counts = analyze.counts_of(arch)
    expected = {
        "all": total,
        "not-bn": total - bn,
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
    assert train.fingerprint(model.parameters()) == pytest.approx(sums, rel=1e-9)


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


def test_hooks_keep_features():
    """No module changes its input in place, so what a hook has kept stays as it was."""
    model = models.build_model("resnet8", 0)
    kept = []

    def keep(module, inputs, output):
        kept.append((output, output.detach().clone()))

    for module in model.modules():
        module.register_forward_hook(keep)
    model(random_images().float())
    for output, copy_of_output in kept:
        assert torch.equal(output, copy_of_output)


# --- normalizations


def network_with_betas(norm):
    """A network in float64, in training mode, in which beta isn't zero."""
    model = models.build_model("resnet8", 0, norm).double()
    for _, beta in models.gammas_and_betas(model):
        beta.data.normal_()
    return model


def scaled_and_shifted(x, norm):
    """gamma x + beta."""
    return norm.weight[:, None, None] * x + norm.bias[:, None, None]


def assert_equal_up_to_round_off(result, expected):
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm, groups", [
    ("layer", 1),
    ("instance", 16),
    ("group", 8),
])
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


def test_switchable_norm_evaluates_by_running_statistics():
    """They move a tenth of the way, from 0 and 1, to those of the batch."""
    model = network_with_betas("switchable")
    x = model.conv(random_images()).detach()
    expected = model.bn(x)
    mean = x.mean((0, 2, 3))
    var = x.var((0, 2, 3), correction=0)
    assert_equal_up_to_round_off(model.bn.running_mean, 0.1 * mean)
    assert_equal_up_to_round_off(model.bn.running_var, 0.9 + 0.1 * var)
    model.bn.running_mean.copy_(mean)
    model.bn.running_var.copy_(var)
    assert_equal_up_to_round_off(model.eval().bn(x), expected)


# --- initial values


def test_bn_inits():
    """gamma and beta are functions of draws from U(0, 1), as OpenLTH names them. The rest stays."""
    default = models.build_model("resnet8", 0)
    levels = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    torch.testing.assert_close(prune.gammas(default).quantile(levels), levels, rtol=0, atol=0.05)
    u = default.bn.weight
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


def test_normal_uniform_and_binary_weights():
    """N(0, std^2), and U(-b, b) with b = sqrt(3) std, by quantiles; the first's signs times std."""
    weights = {}
    for weight_init in ("kaiming_normal", "kaiming_uniform", "binary"):
        model = models.build_model("resnet8", 0, weight_init=weight_init)
        weights[weight_init] = model.stage3[0].conv2.weight.flatten()   # from 576 inputs
    std = (2 / 576) ** 0.5
    torch.testing.assert_close(weights["binary"], std * weights["kaiming_normal"].sign())
    below = torch.tensor([0.0228, 0.1587, 0.5, 0.8413, 0.9772])   # -2, -1, 0, 1, 2 deviations
    quantiles = weights["kaiming_normal"].quantile(below) / std
    torch.testing.assert_close(quantiles, torch.arange(-2.0, 3), rtol=0, atol=0.05)
    levels = torch.linspace(0, 1, 5)
    quantiles = weights["kaiming_uniform"].quantile(levels) / (3 ** 0.5 * std)
    torch.testing.assert_close(quantiles, 2 * levels - 1, rtol=0, atol=0.03)


def test_orthogonal_weights():
    """Orthonormal rows, or columns where there are more rows."""
    model = models.build_model("resnet8", 0, weight_init="orthogonal")
    wide = model.stage3[0].conv2.weight.flatten(1)         # (64, 576)
    tall = model.stage3[0].shortcut[0].weight.flatten(1)   # (64, 32)
    torch.testing.assert_close(wide @ wide.T, torch.eye(64), rtol=0, atol=1e-5)
    torch.testing.assert_close(tall.T @ tall, torch.eye(32), rtol=0, atol=1e-5)


def test_weight_norm_starts_with_the_gammas_of_batch_norm():
    """gain = gamma |v|, with gamma and v the initial gammas and weights with batch norm."""
    batch_norm = models.build_model("resnet8", 0)
    weight_norm = models.build_model("resnet8", 0, "weight")
    length = batch_norm.conv.weight.square().sum((1, 2, 3)).sqrt()
    assert torch.equal(weight_norm.conv.weight, batch_norm.conv.weight)
    torch.testing.assert_close(weight_norm.conv.gain, batch_norm.bn.weight * length)


# --- data


def test_augmentation_is_uniform():
    """Every image once, and every crop and flip equally often."""
    order, offset, flip = train.draw_augmentation(50_000, torch.Generator().manual_seed(0))
    assert torch.equal(order.sort().values, torch.arange(50_000))
    uniform = [
        (offset[:, 0], 9),
        (offset[:, 1], 9),
        (flip, 2),
    ]
    for draws, n in uniform:
        share = draws.long().bincount() / 50_000
        assert len(share) == n
        assert (share - 1 / n).abs().max() < 0.01   # 4 standard deviations or more


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """torchvision's CIFAR10 with two images in each batch and without a network.

    The folder "made" in the current one holds the batches and the archive.
    """
    dataset = train.import_cifar10()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("urllib.request.urlopen", raising(OSError("no route to host")))
    batches = tmp_path / "made/cifar-10-batches-py"
    batches.mkdir(parents=True)
    md5s = {}
    for name, _ in dataset.train_list + dataset.test_list + [("batches.meta", "")]:
        number = len(md5s)
        content = {
            "data": np.full((2, 3072), number, np.uint8),
            "labels": [number, 9],
            "label_names": list("abcdefghij"),
        }
        (batches / name).write_bytes(pickle.dumps(content))
        md5s[name] = hashlib.md5((batches / name).read_bytes()).hexdigest()
    for attribute in ("train_list", "test_list"):
        names = [name for name, _ in getattr(dataset, attribute)]
        monkeypatch.setattr(dataset, attribute, [[name, md5s[name]] for name in names])
    monkeypatch.setattr(dataset, "meta", {"filename": "batches.meta", "key": "label_names",
                                          "md5": md5s["batches.meta"]})
    archive = shutil.make_archive("made/cifar-10-python", "gztar", tmp_path / "made",
                                  "cifar-10-batches-py")
    md5 = hashlib.md5(pathlib.Path(archive).read_bytes()).hexdigest()
    monkeypatch.setattr(dataset, "tgz_md5", md5)
    return dataset


def put_archive_in_data():
    pathlib.Path("data").mkdir()
    shutil.copy("made/cifar-10-python.tar.gz", "data")


def assert_is_small_cifar10(data):
    (train_images, train_labels), (test_images, test_labels) = data
    assert train_images.shape == (10, 32, 32, 3)
    assert test_images.shape == (2, 32, 32, 3)
    assert train_labels[::2].tolist() == [0, 1, 2, 3, 4]
    assert train_labels[1::2].eq(9).all()
    assert test_labels.tolist() == [5, 9]


@pytest.mark.parametrize("data_dir", ["made", "made/cifar-10-batches-py", "any name"])
def test_data_dir_is_the_batches_folder_or_its_parent(data_dir, cifar10):
    """The folder of the batches can have any name, and can be a link: its files tell."""
    pathlib.Path("any name").symlink_to("made/cifar-10-batches-py")
    assert_is_small_cifar10(train.load_data("cifar10", data_dir, 0))


def test_archive_in_data_dir_is_unpacked_without_a_download(cifar10, capsys):
    """Its batches then lie beside it, and nothing else."""
    put_archive_in_data()
    assert_is_small_cifar10(train.load_data("cifar10", "data", 0))
    assert sorted(os.listdir("data")) == ["cifar-10-batches-py", "cifar-10-python.tar.gz"]
    assert "downloading" not in capsys.readouterr().out


def test_no_network_is_one_line(cifar10, capsys):
    """It says what to fetch and where to put it. No empty folder is left."""
    line = error_of(capsys, 1, train, "--device", "cpu", "--data-dir", "new/data")
    assert line == (
        "train.py: error: CIFAR-10 is not in new/data and can't be downloaded (no route to host): "
        "get https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz elsewhere and put it there, "
        "whole, as cifar-10-python.tar.gz")
    assert os.listdir() == ["made"]


@pytest.mark.parametrize("own, names", [
    ("cifar-10-batches-py/test_batch", "made/cifar-10-batches-py is not CIFAR-10 "),
    ("data_batch_2", "made is not CIFAR-10 "),
    ("cifar-10-python.tar.gz", "made/cifar-10-python.tar.gz is broken or not CIFAR-10's"),
])
def test_data_of_ones_own_is_refused_and_never_touched(own, names, cifar10, capsys):
    """Files that are not CIFAR-10's are named, whether whole or broken. The real ones are not
    fetched in their place."""
    if own == "cifar-10-python.tar.gz":
        shutil.rmtree("made/cifar-10-batches-py")
    path = pathlib.Path("made", own)
    path.write_bytes(b"own")
    line = error_of(capsys, 1, train, "--arch", "resnet8", "--device", "cpu", "--data-dir", "made")
    assert line.startswith(f"train.py: error: {names}")
    assert path.read_bytes() == b"own"


def test_batches_that_another_process_put_there_meanwhile_are_read(cifar10, monkeypatch):
    """A folder appears as a whole or not at all, so whoever comes second takes what is there."""
    def slow_extract(archive, temporary):
        for folder in (temporary, "data"):
            shutil.copytree("made/cifar-10-batches-py", f"{folder}/cifar-10-batches-py")

    put_archive_in_data()
    monkeypatch.setattr("torchvision.datasets.utils.extract_archive", slow_extract)
    assert_is_small_cifar10(train.load_data("cifar10", "data", 0))
    assert sorted(os.listdir("data")) == ["cifar-10-batches-py", "cifar-10-python.tar.gz"]


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


def three_steps(*words):
    """resnet8 before and after three steps (the first has no momentum) in float64."""
    words = [*words, "--weight-decay", 0.1]
    before = network(*words, dtype=torch.float64)
    model, step, _, _ = network_and_step(*words, dtype=torch.float64)
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


MODES = ["all", "not-bn", "conv", "bn", "gamma", "beta", "shortcut", "shortcut-bn", "output",
         "conv+output", "bn+shortcut+output", "gamma+beta", "bn+gamma"]


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
    model = network("--train", "random", "--arch", "resnet14")
    assert model.conv.chosen[:4].tolist() == [21, 25, 43, 49]
    assert model.stage3[1].conv2.chosen[-2:].tolist() == [36729, 36383]


@pytest.mark.parametrize("text, spelling", [
    ("all", "all"),
    ("random", "random"),
    ("output+bn", "bn+output"),
    ("beta+gamma", "gamma+beta"),
    ("gamma+bn+bn", "bn+gamma"),
    ("output+shortcut-bn+shortcut", "shortcut+shortcut-bn+output"),
])
def test_one_spelling_of_what_trains(text, spelling):
    """Groups are joined in one order and each once, so that a run has one name."""
    assert arguments("--train", text).train == spelling


@pytest.mark.parametrize("text", ["everything", "", "BN", "random+bn"])
def test_unknown_groups_are_refused(text, tiny, capsys):
    """The line lists the groups."""
    line = error_of(capsys, 2, train, *SMALL, f"--train={text}")
    assert line == (f"train.py: error: argument --train: {text}: not random, nor any of "
                    f"{', '.join(train.GROUPS)} joined by +")


class OthersBlock(nn.Module):
    """Parameters as other networks have them: biases, embeddings, those of no layer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.GroupNorm(2, 8)
        self.embedding = nn.Embedding(5, 8)
        self.token = nn.Parameter(torch.ones(1, 8))


def test_freeze_of_any_network():
    """all is every parameter, bn the normalization's alone, and not-bn the others."""
    model = OthersBlock()
    names = {name for name, _ in model.named_parameters()}
    assert len(names) == 6
    bn = {"norm.weight", "norm.bias"}
    expected = {"all": names, "bn": bn, "not-bn": names - bn}
    for group, names_of_group in expected.items():
        train.freeze(model, group)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained == names_of_group


def test_freeze_of_torchvisions_resnet18():
    """It has 9,600 gammas and betas in 20 BatchNorm layers; conv includes its downsampling."""
    train.import_cifar10()   # torchvision can be without its operators
    from torchvision.models import resnet18
    model = resnet18(num_classes=10)
    train.freeze(model, "bn")
    assert train.count_parameters(model)["trained"] == 9_600
    train.freeze(model, "conv+output")
    assert model.layer2[0].downsample[0].weight.requires_grad
    assert not model.layer2[0].downsample[1].weight.requires_grad


@pytest.mark.parametrize("kind", [
    {"bias": True},
    {"groups": 2},
    {"dilation": 2},
    {"padding_mode": "circular"},
])
def test_random_refuses_a_convolution_that_it_cannot_keep(kind):
    """A bias, groups, dilation or a padding other than zeros would be lost in TwoWeightsConv2d."""
    kind.setdefault("bias", False)
    model = nn.Sequential(nn.Conv2d(4, 4, 3, **kind))
    with pytest.raises(train.UserError, match="plain convolutions without a bias, unlike 0"):
        train.train_two_weights_per_channel(model, 0)


def test_random_does_not_go_with_weight_norm(tiny, capsys):
    """Its convolutions compute their weights."""
    line = error_of(capsys, 2, train, *SMALL, "--train", "random", "--norm", "weight")
    assert line.endswith("plain convolutions without a bias, unlike conv")


# --- training


def test_steps_are_those_of_sgd():
    """v = 0.9 v + g + decay w; w = w - lr v, written out in float64 for three steps."""
    model, step, _, _ = network_and_step("--bn-only", dtype=torch.float64)
    reference = network("--bn-only", dtype=torch.float64)
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


@pytest.fixture(scope="module")
def four_epochs(tmp_path_factory):
    """A run on 40 images in batches of 16: (network, epochs in its checkpoint, steps).

    The steps are, for each epoch, a list of what its three steps were given and returned.
    """
    steps = []
    original_step = train.train_step

    def watched_step(model, optimizer, scaler, precision, images, labels):
        loss, correct = original_step(model, optimizer, scaler, precision, images, labels)
        steps.append({
            "lr": optimizer.param_groups[0]["lr"],
            "images": images,
            "labels": labels,
            "loss": loss.item(),
            "correct": correct.item(),
        })
        return loss, correct

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "load_data", tiny_data)
        patch.setattr(train, "train_step", watched_step)
        patch.chdir(tmp_path_factory.mktemp("four"))
        assert run_script(train, *SMALL, "--epochs", 4, "--seed", 5, "--out", "a.pt") == 0
        model, checkpoint = train.load_checkpoint("a.pt")
    return model, checkpoint["epochs"], [steps[first:first + 3] for first in range(0, 12, 3)]


def test_every_epoch_has_each_image_once(four_epochs):
    """In a new order, with its label, its own crop and flip. The last batch is smaller."""
    steps_of_epochs = four_epochs[2]
    all_images, all_labels = tiny_data()[0]
    rng = torch.Generator().manual_seed(5)
    for steps in steps_of_epochs:
        images = torch.cat([step["images"] for step in steps])
        labels = torch.cat([step["labels"] for step in steps])
        order, offset, flip = train.draw_augmentation(40, rng)
        expected = [augmented(*draws) for draws in zip(all_images[order], offset, flip)]
        torch.testing.assert_close(images, torch.stack(expected), rtol=1e-5, atol=1e-5)
        assert torch.equal(labels, all_labels[order])
        assert [len(step["labels"]) for step in steps] == [16, 16, 8]


def test_an_epochs_rate_loss_and_accuracy_are_those_of_its_steps(four_epochs):
    """The mean loss over images, not over batches; the accuracy in percent."""
    _, epochs, steps_of_epochs = four_epochs
    assert [epoch["lr"] for epoch in epochs] == [0.1, 0.1, 0.01, 0.001]
    for epoch, steps in zip(epochs, steps_of_epochs):
        assert [step["lr"] for step in steps] == [epoch["lr"]] * 3
        losses = [step["loss"] for step in steps]
        correct = sum(step["correct"] for step in steps)
        assert epoch["train_loss"] == pytest.approx(np.average(losses, weights=[16, 16, 8]))
        assert epoch["train_accuracy"] == 100 * correct / 40


def test_the_test_accuracy_of_the_last_epoch_is_that_of_the_network(four_epochs):
    """On the test images, by the functional network."""
    model, epochs = four_epochs[:2]
    _, (images, labels) = tiny_data()
    accuracy = functional_accuracy(model, images, labels)
    assert epochs[-1]["test_accuracy"] == pytest.approx(accuracy)


def test_a_learning_rate_in_memory_stays_where_it_is():
    """A CUDA graph reads it from the address that it had at the capture."""
    rate = torch.tensor(0.1)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], rate)
    train.set_learning_rate(optimizer, 0.01)
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate == torch.tensor(0.01)


@pytest.mark.parametrize("device, plain", [("mps", True), ("cpu", False)])
def test_training_is_plain_on_apples_gpus(device, plain, monkeypatch):
    """channels_last gives wrong gradients there (pytorch#175189)."""
    monkeypatch.setattr(train, "choose_device", torch.device)
    assert arguments("--device", device).plain == plain


# --- names


@pytest.mark.parametrize("words, name", [
    ("--arch resnet866 --bn-only", "resnet866-bn-s0"),
    ("--train gamma+output --lr 0.03", "resnet14-gamma+output-lr0.03-s0"),
    ("--norm layer --bn-init oneone --weight-init binary --seed 3",
     "resnet14-all-layer-oneone-binary-s3"),
    ("--arch resnet8 --bn-only --dataset synthetic --epochs 2", "resnet8-bn-synthetic-epochs2-s0"),
    ("--bn-only --lr 1", "resnet14-bn-lr1.0-s0"),
    ("--bn-only --batch-size 64 --weight-decay 0", "resnet14-bn-batch_size64-weight_decay0.0-s0"),
    ("--arch resnet110 --bn-only --amp off", "resnet110-bn-off-s0"),
])
def test_name_and_command_tell_all_that_differs_from_the_recipe(words, name):
    """The command is the inverse of the name: it gives the same options."""
    args = arguments(*words.split())
    options = train.options_of(args)
    assert args.out == pathlib.Path("runs", f"{name}.pt")
    python, script, *command = train.command(options).split()
    assert (python, script) == ("python", "train.py")
    assert train.options_of(arguments(*command)) == options
    named = {word for word in words.split() if word.startswith("--")}
    assert {word for word in command if word.startswith("--")} == named | {"--arch"}


def test_a_tilde_is_the_home_folder(monkeypatch):
    """In --data-dir and --out: a shell does not replace it in --out=~/a.pt."""
    monkeypatch.setenv("HOME", "/home/someone")
    args = arguments("--data-dir=~/data", "--out=~/a.pt")
    assert args.data_dir == "/home/someone/data"
    assert args.out == pathlib.Path("/home/someone/a.pt")


def test_names_are_unambiguous():
    """No two options have a value in common, so a value in a name needs no option's name."""
    parser = train.make_parser()
    values = list(train.GROUPS) + ["random"]
    for action in parser._actions:
        values += action.choices or []
    assert len(values) == len(set(values))


# --- precision


@pytest.mark.parametrize("amp, device, has_bf16, precision", [
    ("auto", "cuda", True, "bf16"),
    ("auto", "cuda", False, "fp16"),
    ("auto", "cpu", True, "off"),
    ("bf16", "cpu", False, "bf16"),
    ("off", "cuda", True, "off"),
])
def test_precision_of_a_run(amp, device, has_bf16, precision, monkeypatch):
    """By default bf16 on GPUs that have it, not emulated; fp16 on older ones; fp32 elsewhere."""
    def is_bf16_supported(including_emulation=True):
        return has_bf16 or including_emulation
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    assert train.choose_precision(amp, torch.device(device)) == precision


@pytest.mark.parametrize("amp, dtype", [
    ("bf16", torch.bfloat16),
    ("fp16", torch.float16),
    ("off", torch.float32),
])
def test_precision_of_convolutions(amp, dtype):
    """--amp decides it, in a training step and in evaluation."""
    model, step, _, _ = network_and_step("--bn-only", "--amp", amp)
    seen = []

    def see(module, inputs, output):
        seen.append(output.dtype)

    model.conv.register_forward_hook(see)
    assert model.conv.weight.dtype == dtype   # cast once, because it is frozen
    step(*batch())
    train.evaluate(model, TEST_IMAGES[:10], TEST_LABELS[:10], amp)
    assert seen == [dtype, dtype]


@pytest.mark.parametrize("script", [train, prune, analyze])
def test_scripts_compute_fp32_in_full(script, checkpoint):
    """Each script turns TF32 off, also where something else has allowed it."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    words = TO_A + ["--resume"] if script is train else ["a.pt"]
    assert run_script(script, *words) == 0
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.conv.fp32_precision == "ieee"


# --- fast path


@pytest.fixture
def fresh_compiler():
    """Without the compilations of other tests, of which PyTorch keeps eight for each function."""
    torch._dynamo.reset()
    yield
    torch.compiler.set_stance("default")


def twenty_steps(device, dtype, *words):
    """Train on batches of 16 and now and then 7, the last of an epoch.

    Returns the losses, and {name: change of what trains or of a running statistic}.
    """
    words = ["--device", device, *words]
    before = train.changing_state(network(*words, dtype=dtype))
    model, step, _, _ = network_and_step(*words, dtype=dtype)
    sizes = [16] * 10 + [7] + [16] * 8 + [7]
    images, labels = batch(sum(sizes), dtype=dtype)
    losses = []
    for batch_images, batch_labels in zip(images.split(sizes), labels.split(sizes)):
        loss, _ = step(batch_images.to(device), batch_labels.to(device))
        losses.append(loss.cpu())
    after = train.changing_state(model)
    changes = {}
    for name in before:
        changes[name] = after[name].cpu() - before[name]
    return torch.stack(losses), changes


def concatenated(changes, names):
    return torch.cat([changes[name].flatten() for name in names])


@pytest.mark.parametrize("words", [[], ["--plain"]])
def test_plain_is_pytorchs_layout_and_optimizer(words):
    """Without --plain, 3x3 weights are in channels_last, and the optimizer is fused."""
    model, _, optimizer, _ = network_and_step("--bn-only", *words)
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
    """Losses, what trains and running statistics are those of --plain after twenty steps.

    On a CPU, fast means channels_last and the fused optimizer; on a GPU, the CUDA graphs, too.
    """
    words = ["--arch", arch, "--train", mode, "--lr", lr]
    plain_losses, plain_changes = twenty_steps(device, dtype, *words, "--plain")
    losses, changes = twenty_steps(device, dtype, *words)
    torch.testing.assert_close(losses, plain_losses, rtol=0, atol=tolerance / 50)
    for kind in [r".*running_mean", r".*running_var", r".*(weight|bias|values)"]:
        names = [name for name in changes if re.fullmatch(kind, name)]
        plain = concatenated(plain_changes, names)
        assert (concatenated(changes, names) - plain).norm() < tolerance * plain.norm(), kind


@pytest.mark.parametrize("arch, words", [
    ("resnet14", "--bn-only"),
    ("resnet20", "--train random"),
])
def test_five_compilations_whatever_the_depth(arch, words, fresh_compiler, monkeypatch):
    """Blocks with identity shortcuts in three stages, with projections in two; of static sizes."""
    compilations = []

    def count_and_compile(graph, inputs):
        compilations.append(graph)
        assert not any(isinstance(value, torch.SymInt) for value in inputs)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def no_capture(step, size, last_size):
        return step

    monkeypatch.setattr(train, "capture_all", no_capture)
    model, plain_step, _, _ = network_and_step("--arch", arch, *words.split())
    step = train.make_fast(plain_step, model, 16, 7)
    with torch.compiler.set_stance("default", force_backend=count_and_compile):
        losses = [step(*batch())[0] for _ in range(3)]
        assert len(compilations) == 5
        step(*batch(12))   # compiled anew, for sizes that are static, see count_and_compile
    assert losses[2] < losses[0]


def fast_step_after(error, monkeypatch):
    """Train three steps, then make a fast step whose captures raise an error.

    Returns it, and all that training changes, as bytes, before and after its making.
    """
    def failing_capture(step, size, last_size):
        step(*batch(size))
        raise error

    model, plain_step, optimizer, _ = network_and_step("--bn-only")
    for _ in range(3):
        plain_step(*batch())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
    before = as_bytes(train.training_state(model, optimizer, scaler))
    monkeypatch.setattr(train, "capture_all", failing_capture)
    args = arguments("--arch", "resnet8", "--bn-only")
    args.device = torch.device("cuda")
    with torch.compiler.set_stance("force_eager"):
        step = train.make_step(model, optimizer, scaler, "off", 16, 7, args)
    after = as_bytes(train.training_state(model, optimizer, scaler))
    return step, before, after


def test_what_fails_of_the_fast_path_is_left_out(fresh_compiler, monkeypatch, capsys):
    """The plain step is left, all state is as before, and a line tells each failure."""
    error = RuntimeError("no compiler\nand a long trace")
    step, before, after = fast_step_after(error, monkeypatch)
    assert after == before
    assert capsys.readouterr().out == (
        "CUDA graphs of compiled blocks fail here, trying without (no compiler)\n"
        "CUDA graphs fail here, trying without (no compiler)\n")
    _, other_step, _, _ = network_and_step("--bn-only")
    for _ in range(4):
        expected_loss, _ = other_step(*batch())
    loss, _ = step(*batch())   # not compiled, though the stance is the default again
    assert loss == expected_loss


def test_lack_of_memory_in_the_fast_path_is_not_hidden(fresh_compiler, monkeypatch):
    """Going on without graphs would take more memory."""
    with pytest.raises(torch.OutOfMemoryError):
        fast_step_after(torch.OutOfMemoryError(), monkeypatch)


@cuda
def test_a_run_on_a_gpu_has_the_losses_of_a_cpu(tiny, monkeypatch, capsys):
    """By CUDA graphs of both batch sizes, interrupted after an epoch and resumed, in fp32."""
    words = [*SMALL, "--bn-only", "--amp", "off"]
    assert run_script(train, *words, "--out", "cpu.pt") == 0
    words += ["--device", "cuda", "--out", "gpu.pt"]
    with monkeypatch.context() as patch:
        patch.setattr(train, "print_epoch", raising(KeyboardInterrupt()))
        assert run_script(train, *words) == 1
    assert run_script(train, *words, "--resume") == 0
    assert "fail here" not in capsys.readouterr().out
    for epoch, epoch_of_cpu in zip(epochs_of("gpu.pt"), epochs_of("cpu.pt"), strict=True):
        assert epoch["train_loss"] == pytest.approx(epoch_of_cpu["train_loss"], rel=0.02)


# --- launchers


def test_torchrun_of_several_processes_is_refused(tiny, monkeypatch, capsys):
    """They would train the same network several times. Nothing is written."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    line = error_of(capsys, 2, train, *SMALL)
    assert line.startswith("train.py: error: torchrun is not for this: ")
    assert list(pathlib.Path().iterdir()) == []


# --- checkpoints


# Runs of every kind, to be interrupted and resumed.
RUNS = ["--train all", "--train random", "--bn-only --plain", "--bn-only --amp bf16",
        "--bn-only --amp fp16", "--bn-only --norm switchable", "--bn-only --norm weight"]


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
    """What a checkpoint holds, except for starts and times, to compare bit for bit."""
    _, checkpoint = train.load_checkpoint(path)
    del checkpoint["starts"]
    for epoch in checkpoint["epochs"]:
        del epoch["seconds"]
    return as_bytes(checkpoint)


@pytest.mark.parametrize("run", RUNS)
def test_resume_is_bit_for_bit(run, tiny, monkeypatch):
    """An interrupted and resumed run ends as the same run without an interrupt."""
    words = SMALL + run.split()
    assert run_script(train, *words, "--out", "whole.pt") == 0
    call_before_step(monkeypatch, 5, raising(KeyboardInterrupt()))   # in epoch 2
    assert run_script(train, *words, "--out", "a.pt") == 1
    assert len(epochs_of("a.pt")) == 1
    assert run_script(train, *words, "--out", "a.pt", "--resume") == 0
    assert content_of("a.pt") == content_of("whole.pt")


def test_files_of_format_3_are_read_as_those_of_format_4(checkpoint):
    """Their options had the resolved precision, their checkpoints SGD's state and no counters."""
    expected = train.load_checkpoint("a.pt")[1]
    expected_record = train.read_record(pathlib.Path("a.json"))
    content = torch.load(checkpoint, weights_only=True)
    record = json.loads(pathlib.Path("a.json").read_text())
    for old in (content, record):
        old["sessions"] = old.pop("starts")
        old["options"]["amp"] = old.pop("precision")
    momentum = content.pop("momentum")
    states = {i: {"momentum_buffer": buffer} for i, buffer in enumerate(momentum)}
    content.update(format=3, optimizer={"state": states})
    for side in (content, expected):
        tensors = side["model"].items()
        side["model"] = {name: tensor for name, tensor in tensors if "num_batches" not in name}
    torch.save(content, checkpoint)
    pathlib.Path("a.json").write_text(json.dumps(record))
    assert as_bytes(train.load_checkpoint("a.pt")[1]) == as_bytes(expected)
    assert train.read_record(pathlib.Path("a.json")) == expected_record


def test_record_of_a_run(tiny, monkeypatch):
    """What it has of the checkpoint, the last accuracy, and each start with --plain and machine."""
    call_before_step(monkeypatch, 5, raising(KeyboardInterrupt()))   # in epoch 2
    assert run_script(train, *TO_A) == 1
    assert run_script(train, *TO_A, "--resume", "--plain") == 0
    _, checkpoint = train.load_checkpoint("a.pt")
    record = train.read_record(pathlib.Path("a.json"))
    for name in ("options", "precision", "starts", "epochs"):
        assert record[name] == checkpoint[name]
    assert record["parameters"]["trained"] == 672
    assert record["test_accuracy"] == record["epochs"][2]["test_accuracy"]
    first, second = record["starts"]
    assert (first["first_epoch"], first["plain"]) == (1, False)
    assert (second["first_epoch"], second["plain"]) == (2, True)
    assert first["torch"] == torch.__version__
    assert f", {torch.get_num_threads()} threads" in first["hardware"]


def test_interrupt_of_the_script_says_how_to_go_on(tiny, monkeypatch, capsys):
    """Ctrl-C ends a run with a line and status 1."""
    monkeypatch.setattr(models, "build_model", raising(KeyboardInterrupt()))
    monkeypatch.setattr(sys, "argv", ["train.py"] + SMALL)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(HERE / "train.py"), run_name="__main__")
    assert stop.value.code == 1
    assert capsys.readouterr().err == (
        "train.py: error: stopped; the same command with --resume continues after the last whole "
        "epoch\n")


def test_checkpoint_is_a_plain_dict_of_what_is_not_frozen(checkpoint, tiny):
    """torch.load and load_state_dict(strict=False) are enough to use a BatchNorm-only network."""
    model = models.build_model("resnet8", 0).eval()
    frozen = [name for name, p in model.named_parameters() if p.dim() > 1 or name == "fc.bias"]
    state = torch.load(checkpoint, weights_only=True)["model"]
    assert type(state) is dict
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert sorted(missing) == sorted(frozen)
    assert unexpected == []
    x = train.normalize(TEST_IMAGES[:16])
    loaded, _ = train.load_checkpoint(checkpoint)
    assert torch.equal(model(x), loaded(x))


# --- writing


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


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("number", [1, 2, 7])   # the claim, the first record, the last checkpoint
def test_full_disk(call, number, tiny, finished_run, monkeypatch, capsys):
    """A line says so. The run can be resumed, and ends as one without an interrupt."""
    with monkeypatch.context() as patch:
        fail_at_write(patch, call, number)
        line = error_of(capsys, 1, train, *TO_A)
    assert re.search(r"a\.(pt|json) can't be written \(No space left on device\)", line)
    assert set(files_here()) <= {"a.pt", "a.json"}
    assert run_script(train, *TO_A, "--resume") == 0
    pathlib.Path("whole.pt").write_bytes(finished_run["a.pt"])
    assert content_of("a.pt") == content_of("whole.pt")


def train_until_killed(folder, number):
    """In a process of its own: start the run of a.pt. SIGKILL comes in place of this write."""
    writes = itertools.count(1)
    replace = os.replace

    def killing_replace(*args):
        if next(writes) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*args)

    os.chdir(folder)
    os.replace = killing_replace
    train.load_data = tiny_data
    run_script(train, *TO_A)


@slow
@pytest.mark.parametrize("number", [1, 2, 3, 7])
def test_slow_kills(number, tiny, finished_run):
    """SIGKILL before any write is put in place: --resume ends as a run without an interrupt."""
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=train_until_killed, args=(os.getcwd(), number))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert run_script(train, *TO_A, "--resume") == 0
    pathlib.Path("whole.pt").write_bytes(finished_run["a.pt"])
    assert content_of("a.pt") == content_of("whole.pt")
    assert set(files_here()) == {"a.pt", "a.json", "whole.pt"}


# --- one name, one run


def test_resume_of_a_finished_run_changes_nothing(checkpoint, finished_run, capsys):
    """It is said with the command that made the run, and no data are read."""
    assert run_script(train, *TO_A, "--resume", "--data-dir", "no") == 0
    assert files_here() == finished_run
    line = capsys.readouterr().out
    assert re.fullmatch("a.pt is finished: .* % test accuracy, made by `python train.py --arch "
                        "resnet8 --bn-only --dataset synthetic --epochs 3 --batch-size 16`\n",
                        line)


def test_second_start_leaves_a_run_alone(tiny, monkeypatch, capsys):
    """The name is taken before the first epoch ends. A line has the command that continues."""
    words = SMALL + ["--out", "b c.pt"]
    lines = []

    def start_again():
        lines.append(error_of(capsys, 2, train, *words))

    call_before_step(monkeypatch, 1, start_again)
    assert run_script(train, *words) == 0
    [line] = lines
    assert line == ("train.py: error: b c.pt exists: continue it by `python train.py "
                    f"{' '.join(SMALL)} --out 'b c.pt' --resume`, or choose another --out")


def test_a_start_that_comes_second_by_a_moment_is_refused(tiny, monkeypatch, capsys):
    """Where the name was free when both looked. Nothing of the first run is changed."""
    load_data = train.load_data

    def slow_load_data(*args):
        pathlib.Path("a.pt").write_bytes(b"of the first run")
        return load_data(*args)

    monkeypatch.setattr(train, "load_data", slow_load_data)
    line = error_of(capsys, 1, train, *TO_A)
    assert line == "train.py: error: a.pt: File exists"
    assert files_here() == {"a.pt": b"of the first run"}


def test_record_without_its_checkpoint_is_kept(checkpoint, finished_run, capsys):
    """Neither a start nor --resume overwrites it."""
    checkpoint.unlink()
    for words in (TO_A, TO_A + ["--resume"]):
        assert "a.json exists without its checkpoint" in error_of(capsys, 2, train, *words)
    assert files_here() == {"a.json": finished_run["a.json"]}


def test_resume_takes_the_precision_of_the_run(tiny, monkeypatch):
    """Not that which --amp auto would give on the machine that continues it."""
    with monkeypatch.context() as patch:
        patch.setattr(train, "choose_precision", lambda amp, device: "bf16")
        assert run_script(train, *SMALL, "--bn-only", "--out", "whole.pt") == 0
        call_before_step(patch, 5, raising(KeyboardInterrupt()))   # in epoch 2
        assert run_script(train, *TO_A) == 1
    assert run_script(train, *TO_A, "--resume") == 0
    assert content_of("a.pt") == content_of("whole.pt")


# --- what a record says of the code


def git(folder, *words):
    """Run git in a folder. Returns what it prints."""
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.check_output(command + list(words), text=True).strip()


def test_commit_of_the_code(tmp_path, monkeypatch):
    """None outside of git; in git the hash, and whether files were changed since."""
    monkeypatch.setattr(train, "__file__", str(tmp_path / "train.py"))
    (tmp_path / "train.py").touch()
    assert train.commit() is None
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "train.py")
    git(tmp_path, "commit", "-q", "-m", "x")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert train.commit() == head
    (tmp_path / "train.py").write_text("changed")
    assert train.commit() == f"{head}-dirty"


# --- files from anyone


class Code:
    """A pickle that would create a folder."""

    def __reduce__(self):
        return os.mkdir, ("code-ran",)


def put_at(content, keys, value):
    """Put a value at content[keys[0]][keys[1]]..., or delete that entry if it is None."""
    for key in keys[:-1]:
        content = content[key]
    content[keys[-1]] = value
    if value is None:
        del content[keys[-1]]


@pytest.mark.parametrize("keys, value, says", [
    (["format"], 2, "this code reads formats 3 and 4"),
    (["x"], Code(), "Weights only load failed"),
    (["rng"], None, "it has no rng"),
    (["options", "x"], 1, "unknown options: x"),
    (["options", "arch"], "vgg16", "resnet<depth>"),
    (["options", "train"], "all", "its frozen weights are not those"),
    (["options", "seed"], 1, "its frozen weights are not those"),
    (["model", "bn.weight"], torch.ones(8), "Error.* size mismatch for bn.weight: .*"),
    (["model", "x"], torch.ones(8), "its tensors are not those of resnet8-bn-"),
])
def test_foreign_and_hostile_checkpoints_are_refused(keys, value, says, checkpoint, capsys):
    """By every script in a line, without running code in them or changing them."""
    content = torch.load(checkpoint, weights_only=True)
    put_at(content, keys, value)
    torch.save(content, checkpoint)
    before = files_here()
    with pytest.raises(train.UserError, match=f"^a.pt is not a checkpoint .*({says})"):
        train.load_checkpoint("a.pt")
    commands = [
        (prune, ["a.pt"]),
        (analyze, ["a.pt"]),
        (train, TO_A + ["--resume"]),
    ]
    for script, words in commands:
        assert "a.pt is not a checkpoint of train.py (" in error_of(capsys, 1, script, *words)
    assert files_here() == before


def test_other_files_are_no_checkpoints(checkpoint):
    """Other content of torch.save is refused, and so is a checkpoint cut off anywhere."""
    others = []
    for content in ([], {}, {"weight": torch.ones(3)}, torch.ones(3)):
        buffer = io.BytesIO()
        torch.save(content, buffer)
        others.append(buffer.getvalue())
    whole = checkpoint.read_bytes()
    for length in range(0, len(whole), len(whole) // 5):
        others.append(whole[:length])
    for content in others:
        checkpoint.write_bytes(content)
        with pytest.raises(train.UserError, match=r"^a.pt is not a checkpoint of train.py \(.+\)"):
            train.load_checkpoint(checkpoint)


@pytest.mark.parametrize("text", [
    "", "[]", "null", "\0", '{"name": "package"}',
    '{"options": {"train": "bn", "seed": 0}}',   # without arch
    '{"options": {"arch": "resnet14", "train": "bn", "seed": 0, "x": 1}}',
])
def test_other_files_are_no_records(text, tmp_path):
    """A folder of results may hold any JSON. A line says so."""
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(train.UserError, match="a.json is not a record of train.py"):
        train.read_record(path)


def test_files_older_than_an_option_have_its_default(checkpoint, monkeypatch):
    """Someone who adds an option to RECIPE can still read all files."""
    monkeypatch.setitem(train.RECIPE, "temperature", 1.0)
    _, content = train.load_checkpoint(checkpoint)
    assert content["options"]["temperature"] == 1.0
    assert train.read_record(pathlib.Path("a.json"))["options"]["temperature"] == 1.0
    assert train.name_of(content["options"]) == "resnet8-bn-synthetic-epochs3-batch_size16-s0"


# --- prune


def known_gammas(threshold=0.0):
    """resnet8 whose 336 gammas are -0.5, 0.0625, 0.005, 0 in turn, or 0 if below the threshold."""
    model = models.build_model("resnet8", 0).eval()
    values = torch.tensor([-0.5, 0.0625, 0.005, 0.0])
    values[values.abs() < threshold] = 0
    for gamma, beta in models.gammas_and_betas(model):
        repeats = len(gamma) // 4
        gamma.data = values.repeat(repeats)
        beta.data = torch.tensor([3, -0.25, -0.25, -0.25]).repeat(repeats)
    return model


def test_prune_table_of_known_gammas():
    """A gamma of 0.0625 is not below 0.0625. The first row is the unpruned network's."""
    images = TEST_IMAGES[:200]
    labels = known_gammas()(train.normalize(images)).argmax(1)
    labels[:50] = 0
    rows = prune.prune_table(known_gammas(), images, labels, [0.5, 0.0625, 0.7, 1.0])
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
    assert [row["threshold"] for row in table] == [0.0] + prune.THRESHOLDS
    lines = capsys.readouterr().out.splitlines()[-10:]
    assert lines[0] == "a.pt: epoch 3 of 3, evaluated in fp32"
    assert lines[-1] == "added to a.json"
    thresholds = ["unpruned"] + [f"{threshold:g}" for threshold in prune.THRESHOLDS]
    for row, threshold, line in zip(table, thresholds, lines[2:-1], strict=True):
        assert line.split() == [threshold, f"{row['pruned']:.2f}", "%",
                                f"{row['test_accuracy']:.2f}", "%", f"{row['change']:+.2f}"]


@pytest.mark.parametrize("keys, value", [
    (["prune"], []),
    (["epochs", 0, "train_loss"], 3.0),
    (["options", "epochs"], 4),   # of which three are done
])
def test_prune_leaves_a_record_alone(keys, value, checkpoint):
    """One that has a table, other epochs, or is not finished. The table is printed all the same."""
    path = pathlib.Path("a.json")
    record = json.loads(path.read_text())
    put_at(record, keys, value)
    kept = json.dumps(record)
    path.write_text(kept)
    assert run_script(prune, "a.pt") == 0
    assert path.read_text() == kept


# --- errors


@pytest.mark.parametrize("words, status, says", [
    ("--arch resnet15", 2, r"the depth must be 6n \+ 2, such as 14"),
    ("--arch resnet2", 2, "such as 8"),
    ("--arch vgg16", 2, "resnet866 or wrn14-32"),
    ("--train bn+output", 2, "not allowed with"),
    ("--train all", 2, "not allowed with"),
    ("--epochs 0", 2, "argument --epochs: not positive"),
    ("--batch-size 0", 2, "argument --batch-size: not positive"),
    ("--lr nan", 2, "argument --lr: not positive"),
    ("--weight-decay -1", 2, "argument --weight-decay: not a number from 0 on"),
    ("--seed -1", 2, r"argument --seed: not in 0 to 2\^32 - 1"),
    ("--out x.ckpt", 2, "argument --out: x.ckpt does not end in .pt"),
    ("--device cuda:99", 2, "argument --device: cuda:99: "),
    ("--device tpu", 2, "argument --device: tpu: "),
    ("--out a.pt/x.pt", 1, "a.pt: File exists|Not a directory"),
    ("--batch-size 9 --lr 1e30 --out b.pt", 1, "diverged: .* in epoch 1, .* --lr"),
    ("--resume --epochs 8", 2, "a.pt is a run with epochs 3, not 8"),
    ("--resume --amp bf16", 2, "amp auto, not bf16"),
])
def test_errors_of_train(words, status, says, checkpoint, finished_run, capsys):
    """One line that says what is wrong. A finished run stays as it is."""
    line = error_of(capsys, status, train, *TO_A, *words.split())
    assert re.search(says, line)
    for name, content in finished_run.items():
        assert pathlib.Path(name).read_bytes() == content


@pytest.mark.parametrize("words, status, says", [
    ("no.pt", 1, "error: no.pt: No such file or directory"),
    ("a.pt --thresholds -1", 2, "--thresholds: not positive"),
    ("a.pt --thresholds nan", 2, "--thresholds: not positive"),
])
def test_errors_of_prune(words, status, says, checkpoint, finished_run, capsys):
    """One line that says what is wrong, and every file stays as it is."""
    line = error_of(capsys, status, prune, *words.split())
    assert re.search(says, line)
    assert files_here() == finished_run


@pytest.mark.parametrize("last", [5, 6])   # of the six steps of epochs 1 and 2
def test_divergence_keeps_the_older_checkpoint(last, tiny, monkeypatch, capsys):
    """A parameter is infinite from a step on. If it is the epoch's last, no loss tells it."""
    numbers = itertools.count(1)
    step = train.train_step

    def spoiling_step(model, *args):
        result = step(model, *args)
        if next(numbers) == last:
            model.bn.bias.data.fill_(math.inf)
        return result

    monkeypatch.setattr(train, "train_step", spoiling_step)
    line = error_of(capsys, 1, train, *TO_A)
    assert "training diverged" in line
    assert "in epoch 2, which is not saved" in line
    assert len(epochs_of("a.pt")) == 1


@pytest.mark.parametrize("error, says", [
    (torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB."), "CUDA out of memory"),
    (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), "CUDA error"),
    (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "cuDNN"),
    (MemoryError(), "MemoryError"),
    (RuntimeError("[enforce fail] can't allocate memory: 9 bytes"), "enforce"),
    (RuntimeError("[enforce fail] not enough memory: 9 bytes"), "enforce"),
])
def test_out_of_memory_is_one_line(error, says, tiny, monkeypatch, capsys):
    """PyTorch says it in several ways, on GPUs and CPUs. All are recognized."""
    monkeypatch.setattr(train, "train_step", raising(error))
    line = error_of(capsys, 1, train, *SMALL)
    assert says in line
    assert line.endswith("; try a smaller batch or network")


@pytest.mark.parametrize("script, words", [(train, TO_A), (prune, ["a.pt"]), (analyze, [])])
def test_older_torch_is_refused(script, words, tiny, monkeypatch, capsys):
    """At the start, by every script. As text, 2.9 would come after 2.10."""
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.9.1+cu128"))
    assert "torch 2.9.1+cu128 is too old" in error_of(capsys, 2, script, *words)
    with pytest.raises(train.UserError, match="is too old"):
        train.load_checkpoint("a.pt")   # in somebody's own code


# --- output


def test_a_line_for_each_epoch(tiny, monkeypatch, capsys):
    """With the figures of the record under their names, and the next command at the end.

    Before, after twenty steps, a line says how long it takes: 40 steps at a second for 20.
    """
    clock = itertools.count()
    monkeypatch.setattr(train.time, "perf_counter", clock.__next__)
    assert run_script(train, *TO_A, "--batch-size", 1) == 0
    first, estimate, header, *lines, last = capsys.readouterr().out.splitlines()
    assert first == "resnet8 on cpu: 672 of 78,042 parameters train, epochs done: 0 of 3"
    assert estimate == "about 2 s an epoch, 0.1 minutes for 3 epochs"
    assert header.split()[:7] == ["epoch", "train", "loss", "train", "acc", "test", "acc"]
    for epoch, line in zip(epochs_of("a.pt"), lines, strict=True):
        assert line.split()[:7] == [
            f"{epoch['epoch']}/3", f"{epoch['train_loss']:.4f}",
            f"{epoch['train_accuracy']:.2f}", "%", f"{epoch['test_accuracy']:.2f}", "%",
            f"{epoch['lr']:g}"]
    assert last == "next: python prune.py a.pt"


def test_progress_within_an_epoch_on_a_terminal(tiny, monkeypatch, capsys):
    """Every ten steps, in a line that the next one overwrites."""
    def isatty():
        return True

    monkeypatch.setattr(sys.stdout, "isatty", isatty)
    assert run_script(train, *TO_A, "--batch-size", 2) == 0
    output = capsys.readouterr().out
    assert "\r  2/3  step    1 of 20\r  2/3  step   11 of 20\r" in output.replace("\n", "\r")


def test_closed_output_ends_quietly_after_a_saved_epoch(tiny):
    """As in `train.py | head -n 2`: each line is out at once, and nothing is said of the pipe."""
    words = TO_A + ["--batch-size", "500"]   # 20 steps an epoch
    environment = dict(os.environ)
    environment.pop("PYTHONUNBUFFERED", None)
    process = subprocess.Popen([sys.executable, HERE / "train.py"] + words, env=environment,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "672 of 78,042 parameters" in process.stdout.readline()
    assert process.stdout.readline().startswith("about ")
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 1
    assert len(epochs_of("a.pt")) == 1


# --- the page

def blocks_of_python():
    """The Python of README.md, a text for each block."""
    page = (HERE / "README.md").read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", blocks_of_python())
def test_python_of_the_page_runs(block):
    """Each block for itself, in the folder of the repository. load_data needs CIFAR10_DIR."""
    if "load_data" in block:
        if "CIFAR10_DIR" not in os.environ:
            pytest.skip("CIFAR10_DIR is not set")
        block = block.replace('"data"', repr(os.environ["CIFAR10_DIR"]))
    # torchvision can be without its operators, which is mended by import_cifar10.
    first = "import train; train.import_cifar10(); del train\n"
    if "def in_stage1_bn" in block:   # two blocks of stage 1 in resnet14, and their four BatchNorms
        first = "from train import *\n"   # because the block is for train.py itself
        block += ("GROUPS['stage1-bn'] = in_stage1_bn\n"
                  "model = network_of({**RECIPE, 'train': 'stage1-bn'})\n"
                  "assert len(trained_parameters(model)) == 8\n")
    block = first + block
    command = [sys.executable, "-c", block]
    output = subprocess.check_output(command, cwd=HERE, text=True)
    for expected in re.findall(r"# (tensor\(.*\))", block):
        assert expected in output


# --- results


def file_stem(path):
    return path.stem


@pytest.mark.parametrize("path", RESULTS, ids=file_stem)
def test_committed_runs(path):
    """Each is finished, bears its name, and counts what trains.

    prune.py works after a clone: BatchNorm-only runs have their checkpoint, with the gammas of the
    record's table.
    """
    record = train.read_record(path)
    options = record["options"]
    assert path.stem == train.name_of(options)
    counts = train.count_parameters(train.network_of(options))
    for name, count in record["parameters"].items():   # a group can be newer than the record
        assert counts[name] == count
    assert len(record["epochs"]) == options["epochs"]
    assert record["test_accuracy"] == record["epochs"][-1]["test_accuracy"]
    unpruned = record["prune"][0]["test_accuracy"]
    assert unpruned == pytest.approx(record["test_accuracy"], abs=0.4)   # in fp32
    file = path.with_suffix(".pt")
    if options["train"] != "bn" and not file.exists():
        return
    model, checkpoint = train.load_checkpoint(file)
    for name in ("options", "precision", "starts", "epochs"):
        assert checkpoint[name] == record[name]
    gamma = prune.gammas(model).abs()
    for row in record["prune"]:
        share = 100 * (gamma < row["threshold"]).double().mean().item()
        assert row["pruned"] == pytest.approx(share)


UNFINISHED = sorted((HERE / "results" / "unfinished").glob("*.pt"))


@pytest.mark.parametrize("path", UNFINISHED, ids=file_stem)
def test_unfinished_runs(path):
    """They can be continued under their own name: momentum and scaler fit, and come from a file."""
    model, checkpoint = train.load_checkpoint(path)
    options = checkpoint["options"]
    assert path.stem == train.name_of(options)
    assert len(checkpoint["epochs"]) < options["epochs"]
    optimizer = train.make_optimizer(model, arguments("--arch", options["arch"]))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    train.put_back(checkpoint, model, optimizer, scaler)
    assert all(state["momentum_buffer"].any() for state in optimizer.state.values())


def checkpoints_to_evaluate():
    """All committed checkpoints, two of them always and the others with -k slow."""
    paths = []
    for path in sorted((HERE / "results").glob("*.pt")):
        if path.stem in ("resnet14-bn-s0", "resnet14-bn-positivenegative-s0"):
            paths.append(pytest.param(path, id=path.stem))
        else:
            paths.append(pytest.param(path, id=f"slow-{path.stem}", marks=slow))
    return paths


@real_images
@pytest.mark.parametrize("path", checkpoints_to_evaluate())
def test_committed_checkpoints_have_the_recorded_accuracy(path):
    """With the gammas below 0.01 set to zero, to 0.4 points: rounding differs between CPUs."""
    _, (images, labels) = train.load_data("cifar10", os.environ["CIFAR10_DIR"], 0)
    model, _ = train.load_checkpoint(path)
    prune.zero_gammas(model, 0.01)
    accuracy = train.evaluate(model, images, labels, "off")
    table = train.read_record(path.with_suffix(".json"))["prune"]
    recorded = {row["threshold"]: row["test_accuracy"] for row in table}
    assert accuracy == pytest.approx(recorded[0.01], abs=0.4)


# --- analyze


def write_run(name, accuracy, words="--bn-only", **entries):
    """Write the record of a finished run of resnet14.

    accuracy: that of its last epoch; words: its command line; entries: what else the record holds.
    """
    args = arguments(*words.split())
    counts = train.count_parameters(train.network_of(train.options_of(args)))
    epochs = []
    for epoch in range(1, args.epochs + 1):
        epochs.append({"epoch": epoch, "test_accuracy": accuracy})
    record = {
        "options": train.options_of(args),
        "precision": "bf16",
        "parameters": counts,
        "test_accuracy": accuracy,
        "seconds": 7200.0,
        "starts": [start()],
        "epochs": epochs,
    }
    record.update(entries)
    pathlib.Path(name).write_text(json.dumps(record))


def start(commit=None, plain=False):
    return {"first_epoch": 1, "plain": plain, "commit": commit, "torch": "2.13.0",
            "hardware": "Abacus"}


def prune_rows(factor=-2):
    """A table "prune": each threshold t has 100 t % of the gammas and a change of `factor` t."""
    rows = []
    for threshold in [0.0] + prune.THRESHOLDS:
        rows.append({"threshold": threshold, "pruned": 100 * threshold, "test_accuracy": 40.0,
                     "change": factor * threshold})
    return rows


def tables_of(text):
    """{title: rows} of the tables in Markdown; a row is {column: cell}."""
    tables = {}
    for section in text.split("\n## ")[1:]:
        title, *lines = section.splitlines()
        lines = [line for line in lines if line.startswith("|")]
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


def test_a_row_for_each_network_and_what_was_trained_of_it(tiny, capsys):
    """The table of what trains has the paper's value where it has one.

    That of normalizations has BatchNorm alone, and other normalizations.
    """
    write_run("a.json", 40.0)
    write_run("b.json", 50.0, "--arch wrn14-2 --train bn+shortcut")
    write_run("c.json", 60.0, "--arch resnet14 --bn-only --norm layer")
    write_run("d.json", 70.0, "--arch wrn14-2 --bn-only --bn-init oneone")
    tables = printed_tables(capsys)
    assert [list(row.values()) for row in tables["What trains"]] == [
        ["resnet14", "bn", "1,120", "40.00 (n=1)", "48.1"],
        ["resnet14", "bn, layer", "1,120", "60.00 (n=1)", "-"],
        ["wrn14-2", "bn+shortcut", "12,480", "50.00 (n=1)", "-"],
        ["wrn14-2", "bn, oneone", "2,240", "70.00 (n=1)", "-"],
    ]
    assert [list(row.values()) for row in tables["Normalizations"]] == [
        ["resnet14", "batch", "bn", "40.00 (n=1)", "-", "-"],
        ["resnet14", "layer", "bn, layer", "60.00 (n=1)", "-", "-"],
    ]


def test_what_differs_from_the_recipe_is_a_row_of_its_own(tiny, capsys):
    """Such a run does not count in the mean of the default.

    Its label has all that differs, in RECIPE's order.
    """
    write_run("a.json", 40.0)
    write_run("b.json", 50.0, "--bn-only --lr 0.03 --weight-decay 0")
    write_run("c.json", 60.0, "--bn-only --lr 0.03 --weight-decay 0 --seed 1")
    write_run("d.json", 70.0, "--bn-only --epochs 10 --bn-init oneone")
    write_run("e.json", 80.0, "--arch resnet8 --bn-only --dataset synthetic --epochs 2")
    tables = printed_tables(capsys)
    assert row_of(tables["Depth"], "resnet14")["bn"] == "40.00 (n=1)"
    assert row_of(tables["Depth"], "resnet32")["bn"] == "-"
    rows = tables["What trains"]
    of_two_seeds = row_of(rows, "resnet14", "bn, lr0.03, weight_decay0.0")["here"]
    assert of_two_seeds == f"55.00 ± {50 ** 0.5:.2f} (n=2)"   # the sample standard deviation
    assert row_of(rows, "resnet14", "bn, oneone, epochs10")["here"] == "70.00 (n=1)"
    assert row_of(rows, "resnet8", "bn, synthetic, epochs2")["here"] == "80.00 (n=1)"


def test_pruning_shows_means_over_the_runs_that_were_pruned(tiny, capsys):
    """The change in points and the share of gammas."""
    write_run("a.json", 40.0, prune=prune_rows(factor=-2))
    write_run("b.json", 43.0, "--bn-only --seed 1", prune=prune_rows(factor=0))
    write_run("c.json", 43.0, "--bn-only --seed 2")
    tables = printed_tables(capsys)
    [pruning] = [rows for title, rows in tables.items() if "set to zero" in title]
    [row] = pruning
    assert row["n"] == "2"
    assert row["< 0.2"] == "-0.20 (20.0)"


def test_a_run_is_a_row_with_the_command_that_makes_it(tiny, capsys):
    """Each machine and each commit of its starts stands there once."""
    commit = "0123456789" * 4
    starts = [start(), start(commit), start(commit), start(f"{commit}-dirty")]
    write_run("a.json", 50.0, "--arch wrn14-2 --train bn+shortcut --seed 3 --epochs 2",
              starts=starts)
    write_run("b.json", 40.0, starts=[start(plain=True)])
    plain, row = printed_tables(capsys)["Runs"]
    assert plain["command"] == "`python train.py --arch resnet14 --bn-only --plain`"
    assert list(row.values()) == [
        "`python train.py --arch wrn14-2 --train bn+shortcut --seed 3 --epochs 2`", "50.00", "bf16",
        "2.00", "Abacus", "2.13.0", "not in git; 0123456; 0123456-dirty"]


def test_what_is_no_finished_run_is_left_out(tiny, capsys):
    """A line at the end says why, and no table counts it."""
    write_run("a.json", 40.0)
    write_run("b.json", 99.0, "--bn-only --seed 2", epochs=[{"epoch": 1, "test_accuracy": 99.0}])
    pathlib.Path("c.json").write_text('{"name": "package"}')
    pathlib.Path("d.json").write_text("{")
    assert run_script(analyze, "--results", ".") == 0
    output = capsys.readouterr().out
    lines = [line for line in output.splitlines() if line.startswith("Left out: ")]
    assert lines[0] == "Left out: b.json is not finished (1 of 160 epochs)"
    assert lines[1].startswith("Left out: c.json is not a record of train.py (")
    assert lines[2].startswith("Left out: d.json is not a record of train.py (")
    assert row_of(tables_of(output)["Depth"], "resnet14")["bn"] == "40.00 (n=1)"
    assert len(tables_of(output)["Runs"]) == 1


@pytest.mark.parametrize("folder", [".", "no"])
@pytest.mark.parametrize("words", [[], ["--plot"]])
def test_folder_without_a_finished_run_is_one_line(folder, words, tiny, capsys):
    """A folder that does not exist, too."""
    line = error_of(capsys, 1, analyze, "--results", folder, *words)
    assert line == f"analyze.py: error: no record of a finished run in {folder}"


def test_folder_of_unfinished_runs_alone_is_one_line(tiny, capsys):
    """It says why there is nothing to print."""
    write_run("a.json", 99.0, epochs=[{"epoch": 1, "test_accuracy": 99.0}])
    line = error_of(capsys, 1, analyze, "--results", ".")
    assert line.endswith("finished run in .; a.json is not finished (1 of 160 epochs)")


def test_firing_of_relus():
    """Against the blocks of resnet8 called one by one, on batches of different sizes."""
    images, labels = TEST_IMAGES[:200], TEST_LABELS[:200]
    model = known_gammas()
    with torch.no_grad():   # a feature that fires at half a percent of its positions is disabled
        feature = model.bn(model.conv(train.normalize(images)))[:, 0]
        model.bn.bias[0] -= feature.quantile(0.995)
    table = analyze.relu_table(model, images, labels)
    with torch.no_grad():
        x = model.bn(model.conv(train.normalize(images))).relu()
        at_start = [x]
        inside = []
        after = []
        for block in (model.stage1[0], model.stage2[0], model.stage3[0]):
            inside.append(block.bn1(block.conv1(x)))
            x = block(x)
            after.append(x)
    expected = {
        "all": at_start + inside + after,
        "inside a block": inside,
        "after the addition": after,
    }
    assert [row["relu"] for row in table] == list(expected)
    for row in table:
        shares = []
        for features in expected[row["relu"]]:
            shares.append((features > 0).double().mean((0, 2, 3)))
        shares = torch.cat(shares)
        assert row["features"] == len(shares)
        disabled = (shares < 0.01).double()
        assert row["fires"] == pytest.approx(100 * shares.mean().item(), abs=1e-3)
        assert row["disabled"] == pytest.approx(100 * disabled.mean().item())
        assert 0 < row["disabled"] < 100


def test_activations_are_added_to_the_record(checkpoint, capsys):
    """And printed: resnet8 has 16 features in the stem, 112 inside blocks, 112 after additions."""
    assert run_script(analyze, "a.pt") == 0
    rows = json.loads(pathlib.Path("a.json").read_text())["activations"]
    assert [row["features"] for row in rows] == [16 + 2 * 112, 112, 112]
    lines = capsys.readouterr().out.splitlines()[-4:]
    counts = [line.split("|")[2].strip() for line in lines[:3]]
    assert counts == ["240", "112", "112"]
    assert lines[3] == "added to a.json"


def test_results_readme_is_what_analyze_prints():
    """Byte by byte: python analyze.py > results/README.md, in UTF-8 whatever the terminal has."""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    output = subprocess.check_output([sys.executable, "analyze.py"], cwd=HERE, env=environment)
    assert output == (HERE / "results/README.md").read_bytes()


# --- figures


def points_of(figure, label):
    """The points (n, 2) with this label."""
    lines = [line for line in figure.axes[0].lines if line.get_label() == label]
    return np.concatenate([line.get_xydata() for line in lines])


def names_in(figure):
    """The networks that are named in a figure."""
    return {text.get_text().strip() for text in figure.axes[0].texts}


def test_figures_of_any_network(tiny):
    """Networks that the paper does not have are drawn, too, and without tables or checkpoints.

    The paper's resnet866 is drawn at the abstract's 82 %.
    """
    pytest.importorskip("matplotlib")
    write_run("a.json", 40.0, "--arch resnet20 --bn-only")
    write_run("b.json", 50.0, "--arch wrn26-3 --bn-only", prune=prune_rows())
    runs, _ = analyze.read_results(pathlib.Path())
    figures = analyze.draw(runs, analyze.read_published(), pathlib.Path("figures"))
    assert {"resnet20", "wrn26-3", "resnet866"} <= names_in(figures["accuracy"])
    resnet20 = 2 * (7 * 16 + 7 * 32 + 7 * 64)   # seven layers with BatchNorm in each stage
    assert np.allclose(points_of(figures["accuracy"], "BatchNorm, here"), [resnet20, 40])
    papers = points_of(figures["accuracy"], "BatchNorm, paper")
    assert np.allclose(papers[[0, -1]], [[1120, 48.1], [64_736, 82]])
    assert names_in(figures["epochs"]) == {"resnet20", "wrn26-3"}
    assert names_in(figures["pruning"]) == {"wrn26-3"}
    assert [panel.get_title() for panel in figures["gamma"].axes] == ["resnet20", "wrn26-3"]
    assert len(os.listdir("figures")) == 4


def test_a_missing_matplotlib_is_one_line(tiny, monkeypatch, capsys):
    """matplotlib is optional."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)   # makes the import fail
    write_run("a.json", 40.0)
    line = error_of(capsys, 2, analyze, "--results", ".", "--plot")
    assert line == "analyze.py: error: --plot needs matplotlib: pip install matplotlib"
