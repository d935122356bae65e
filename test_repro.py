"""Tests of the reproduction: pytest -q (about two minutes on two cores, no network).

Where CIFAR10_DIR names a folder that holds cifar-10-batches-py, the tests that need real images run too.
"""
import contextlib
import io
import json
import math
import os
import pathlib
import pickle
import platform
import re
import resource
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import analyze
import models
import prune
import train

torch.set_num_threads(min(2, torch.get_num_threads()))


# The paper's table, to the unit: all, BatchNorm, shortcut convolutions, output layer.
COUNTS = {
    "resnet14": (175_258, 1_120, 2_560, 650),
    "resnet32": (466_906, 2_464, 2_560, 650),
    "resnet56": (855_770, 4_256, 2_560, 650),
    "resnet110": (1_730_714, 8_288, 2_560, 650),
    "resnet218": (3_480_602, 16_352, 2_560, 650),
    "resnet434": (6_980_378, 32_480, 2_560, 650),
    "resnet866": (13_979_930, 64_736, 2_560, 650),
    "wrn14-1": (175_258, 1_120, 2_560, 650),
    "wrn14-2": (696_618, 2_240, 10_240, 1_290),
    "wrn14-4": (2_777_674, 4_480, 40_960, 2_570),
    "wrn14-8": (11_093_130, 8_960, 163_840, 5_130),
    "wrn14-16": (44_337_418, 17_920, 655_360, 10_250),
    "wrn14-32": (177_279_498, 35_840, 2_621_440, 20_490),
}


@pytest.fixture(scope="module")
def synthetic():
    return train.synthetic_data(0)


@pytest.fixture
def small_data(synthetic, monkeypatch, tmp_path):
    """Let train.py and its readers see 200 training and 100 test images, in an empty folder."""
    (train_images, train_labels), (test_images, test_labels) = synthetic
    small = (train_images[:200], train_labels[:200]), (test_images[:100], test_labels[:100])
    monkeypatch.setattr(train, "load_data", lambda *args: small)
    monkeypatch.setattr(prune, "load_data", lambda *args: small)
    monkeypatch.chdir(tmp_path)
    return small


def command(script, *words):
    """Run a script's command line in this process. Returns the exit status."""
    argv, sys.argv = sys.argv, [f"{script.__name__}.py", *map(str, words)]
    try:
        train.run(script.main)
    except SystemExit as stop:
        return stop.code
    finally:
        sys.argv = argv
    return 0


SMALL = ["--arch", "resnet8", "--dataset", "synthetic", "--device", "cpu", "--batch-size", "64", "--epochs", "4"]


trained_once = {}   # name -> content of the files of one finished run


@pytest.fixture
def checkpoint(small_data, capsys):
    """A finished run's a.pt, a.json and a.jsonl in the current folder. Returns what a.pt holds."""
    if not trained_once:
        assert command(train, *SMALL, "--bn-only", "--out", "a.pt") == 0
        trained_once.update({path: path.read_bytes() for path in pathlib.Path().glob("a.*")})
    for path, content in trained_once.items():
        path.write_bytes(content)
    capsys.readouterr()
    return torch.load("a.pt", weights_only=True)


# ------------------------------------------------------------------------------------------------------- models

@pytest.mark.parametrize("arch", COUNTS)
def test_parameter_counts(arch):
    counts = models.parameter_counts(models.empty_model(arch))
    assert tuple(counts[part] for part in ("all", "bn", "shortcut", "output")) == COUNTS[arch]
    assert 2 * models.count_features(arch) == COUNTS[arch][1]


@pytest.mark.parametrize("arch, hint", [("resnet15", "14 and 20"), ("resnet2", "8"), ("wrn16-4", "14 and 20"),
                                        ("resnet014", "resnet866"), ("wrn14-0", "wrn14-32"), ("vgg16", "resnet866"),
                                        ("resnet6000000002", "smaller"), ("wrn14-100000", "smaller")])
def test_names_of_no_network(arch, hint):
    with pytest.raises(ValueError, match=hint):
        models.parse_arch(arch)


def test_initial_values_belong_to_the_seed():
    """Pinned once and for ever: the same on every machine and version, up to round-off."""
    model = models.build_model("resnet14", 0)
    # RandomState(0).standard_normal() is 1.764052..., the best known number of NumPy; fan-in of the stem is 27.
    assert model.conv.weight[0, 0, 0, 0].item() == pytest.approx(1.764052345967664 * math.sqrt(2 / 27), rel=1e-6)
    for arch, seed, pinned in [("resnet14", 0, PIN_14), ("resnet866", 0, PIN_866), ("wrn14-2", 7, PIN_WRN)]:
        assert models.same_fingerprint(models.fingerprint(models.build_model(arch, seed).parameters()), pinned)
    other = models.fingerprint(models.build_model("resnet14", 1).parameters())
    assert not models.same_fingerprint(other, PIN_14)


PIN_14 = [328.653146003, 10543.398608782, 167.217023304]
PIN_866 = [16394.72317993, 753849.633340992, 8139.451380297]
PIN_WRN = [526.049088884, 29478.862949638, 268.550731771]


def test_distribution_of_initial_values():
    model = models.build_model("wrn14-8", 0)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.weight.numel() > 10_000:
            fan_in = module.weight[0].numel()
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=0.03)
    gamma = prune.gammas(model)
    assert gamma.min() >= 0 and gamma.max() <= 1 and gamma.mean().item() == pytest.approx(0.5, abs=0.02)
    assert all(bn.bias.eq(0).all() for _, bn in models.batchnorms(model))
    assert model.fc.bias.abs().max() <= 512 ** -0.5 and model.fc.bias.abs().max() > 0


def functional_forward(model, x, training):
    """The network once more, from its tensors alone: He et al.'s basic blocks in torch.nn.functional."""
    p = dict(model.named_parameters()) | {name: buffer.clone() for name, buffer in model.named_buffers()}

    def bn(x, name):
        return F.batch_norm(x, p[f"{name}.running_mean"], p[f"{name}.running_var"], p[f"{name}.weight"],
                            p[f"{name}.bias"], training, 0.1, 1e-5)

    x = F.relu(bn(F.conv2d(x, p["conv.weight"], padding=1), "bn"))
    for stage in (1, 2, 3):
        for block in range(len(getattr(model, f"stage{stage}"))):
            name, stride = f"stage{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = F.relu(bn(F.conv2d(x, p[f"{name}.conv1.weight"], stride=stride, padding=1), f"{name}.bn1"))
            y = bn(F.conv2d(y, p[f"{name}.conv2.weight"], padding=1), f"{name}.bn2")
            if stride == 2:
                x = bn(F.conv2d(x, p[f"{name}.shortcut.0.weight"], stride=2), f"{name}.shortcut.1")
            x = F.relu(x + y)
    return F.linear(F.avg_pool2d(x, 8).flatten(1), p["fc.weight"], p["fc.bias"])


@pytest.mark.parametrize("arch", ["resnet14", "wrn8-2"])
@pytest.mark.parametrize("training", [True, False])
def test_forward_pass_against_functional(arch, training):
    model = models.build_model(arch, 3).double().train(training)
    for _, bn in models.batchnorms(model):   # values that show, in every tensor that the forward pass reads
        bn.bias.data.normal_()
        bn.running_mean.normal_()
        bn.running_var.uniform_(0.5, 2)
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    expected = functional_forward(model, x, training)
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


# --------------------------------------------------------------------------------------------------------- data

def test_augmentation_against_one_image_at_a_time():
    images = torch.randint(0, 256, (10, 32, 32, 3), dtype=torch.uint8)
    order, offset, flip = train.draw_augmentation(10, torch.Generator().manual_seed(0))
    assert sorted(order.tolist()) == list(range(10)) and flip.any() and not flip.all()
    batch = train.augment(F.pad(images, (0, 0, 4, 4, 4, 4)), order, offset, flip)
    for slot in range(10):
        padded = np.pad(images[order[slot]].numpy(), ((4, 4), (4, 4), (0, 0)))
        y, x = offset[slot].tolist()
        crop = padded[y:y + 32, x:x + 32]
        assert np.array_equal(batch[slot].numpy(), crop[:, ::-1] if flip[slot] else crop)


def test_augmentation_draws_every_offset_and_both_flips_evenly():
    _, offset, flip = train.draw_augmentation(50_000, torch.Generator().manual_seed(0))
    for axis in (0, 1):
        share = offset[:, axis].bincount(minlength=9) / 50_000
        assert len(share) == 9 and (share - 1 / 9).abs().max() < 0.01   # 7 standard deviations
    assert flip.double().mean().item() == pytest.approx(0.5, abs=0.02)


def test_normalization():
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    x = train.normalize(images, torch.float64)
    for channel, (mean, std) in enumerate(zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))):   # as in OpenLTH
        expected = (images[..., channel].double() / 255 - mean) / std
        torch.testing.assert_close(x[:, channel], expected, rtol=1e-12, atol=1e-12)


def test_synthetic_data(synthetic):
    (train_images, train_labels), (test_images, test_labels) = synthetic
    assert train_images.shape == (50_000, 32, 32, 3) and test_images.shape == (10_000, 32, 32, 3)
    assert train_images.dtype == torch.uint8 and train_labels.shape == (50_000,) and test_labels.shape == (10_000,)
    assert train_labels.bincount().tolist() == pytest.approx([5_000] * 10, rel=0.1)
    again = train.synthetic_data(0)
    assert torch.equal(again[0][0], train_images) and torch.equal(again[1][1], test_labels)
    assert not torch.equal(train.synthetic_data(1)[0][0], train_images)


def test_damaged_cifar10_is_refused(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(b"not the images")
    with pytest.raises(train.Problem, match="data_batch_1.*delete the folder"):
        train.load_data("cifar10", tmp_path, 0)


def test_half_an_archive_is_refused(tmp_path):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"half")
    with pytest.raises(train.Problem, match="cifar-10-python.tar.gz.*delete it"):
        train.load_data("cifar10", tmp_path, 0)


def test_no_network(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("<urlopen error [Errno -3] Temporary failure in name resolution>")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with pytest.raises(train.Problem, match="cifar-10-python.tar.gz into .*--dataset synthetic"):
        train.load_data("cifar10", tmp_path / "new", 0)


# ----------------------------------------------------------------------------------------------------- training

TRAINED = {   # of resnet14: from the paper's table
    "all": 175_258, "bn": 1_120, "not-bn": 175_258 - 1_120, "output": 650, "shortcut": 2_560,
    "bn+output": 1_120 + 650, "bn+shortcut": 1_120 + 2_560, "random": 1_120,
}


@pytest.mark.parametrize("mode", TRAINED)
def test_exactly_the_right_parameters_change(mode, synthetic):
    model = models.build_model("resnet14", 0)
    initial = {name: p.clone() for name, p in model.named_parameters()}
    trained = train.freeze(model, mode, 0)
    optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9, weight_decay=0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    model.train()
    images = train.normalize(synthetic[0][0][:32])
    for _ in range(3):   # so that momentum and weight decay have their say
        train.train_step(model, optimizer, scaler, images, synthetic[0][1][:32], "off")
    changed = {}
    for name, before in initial.items():
        owner, _, leaf = name.rpartition(".")
        changed[name] = getattr(model.get_submodule(owner), leaf).detach() != before
    assert sum(different.sum().item() for different in changed.values()) == TRAINED[mode]
    if mode == "random":   # two in every output channel of every convolution
        assert all((different.flatten(1).sum(1) == 2).all() if different.dim() == 4 else not different.any()
                   for different in changed.values())
    else:
        parts = {"all": {"conv", "shortcut", "bn", "output"}, "not-bn": {"conv", "shortcut", "output"}}
        for name, different in changed.items():
            part = ("output" if name.startswith("fc") else "bn" if different.dim() == 1 else
                    "shortcut" if "shortcut" in name else "conv")
            assert different.all() if part in parts.get(mode, mode.split("+")) else not different.any(), name


def test_steps_against_plain_sgd(synthetic):
    """Three steps of train_step in float64 are those of v = 0.9 v + g + decay w; w = w - lr v, written out."""
    model = models.build_model("resnet8", 0).double()
    reference = models.build_model("resnet8", 0).double()
    trained = train.freeze(model, "bn", 0)
    optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9, weight_decay=1e-4)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    gamma_beta = [p for _, bn in models.batchnorms(reference) for p in (bn.weight, bn.bias)]
    velocity = [torch.zeros_like(p) for p in gamma_beta]
    model.train()
    for step in range(3):
        images, labels = (part[step * 16:step * 16 + 16] for part in synthetic[0])
        images = train.normalize(images, torch.float64)
        loss, hits = train.train_step(model, optimizer, scaler, images, labels, "off")
        logits = functional_forward(reference, images, True)
        expected = -logits.log_softmax(1)[range(16), labels].mean()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
        assert hits == (logits.argmax(1) == labels).sum()
        for p, v, g in zip(gamma_beta, velocity, torch.autograd.grad(expected, gamma_beta)):
            v.mul_(0.9).add_(g + 1e-4 * p.detach())
            p.data -= 0.1 * v
    for p, q in zip(trained, gamma_beta, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_learning_rate_drops_after_epochs_80_and_120():
    rates = [train.learning_rate(0.1, epoch, 160) for epoch in range(160)]
    assert rates == [0.1] * 80 + [0.01] * 40 + [0.001] * 40
    assert [train.learning_rate(0.1, epoch, 1) for epoch in range(1)] == [0.1]


def test_defaults_are_the_paper_recipe():
    args, _ = train.parse_args(["--arch", "resnet866", "--bn-only", "--device", "cpu"])
    assert (args.arch, args.train, args.dataset, args.seed) == ("resnet866", "bn", "cifar10", 0)
    assert (args.epochs, args.batch_size, args.lr, args.weight_decay, args.amp) == (160, 128, 0.1, 1e-4, "off")
    assert args.out == pathlib.Path("runs/resnet866-bn-s0.pt")


def test_amp_auto(monkeypatch):
    def amp(device):
        return train.parse_args(["--device", device])[0].amp

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert (amp("cuda"), amp("cpu"), amp("mps")) == ("bf16", "off", "off")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert amp("cuda") == "fp16"


@pytest.mark.parametrize("amp, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16), ("off", torch.float32)])
def test_convolutions_run_in_the_precision_of_amp(amp, dtype, synthetic):
    model = models.build_model("resnet8", 0)
    seen = []
    model.stage2[0].conv1.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    train.evaluate(model, synthetic[1][0][:10], synthetic[1][1][:10], amp)
    assert seen == [dtype]


# -------------------------------------------------------------------------------------------------------- speed

def prepared(arch, mode, images, labels, plain=False, compiled=False):
    """A network in float64, and its step and epoch of the plain or the fast path, in batches of 16."""
    args = train.parse_args(["--arch", arch, "--train", mode, "--batch-size", "16", "--device", "cpu"])[0]
    model = models.build_model(arch, 0).double()
    train.freeze(model, mode, 0)
    if compiled:   # as on CUDA
        train.speed_up(model, torch.device("cuda"), "off")
    step, epoch, optimizer, _ = train.prepare(args, torch.device("cpu"), model, images, labels, plain)
    train.begin_epoch(epoch, optimizer, 0.1, torch.Generator().manual_seed(0))
    return model.train(), step, epoch


@pytest.mark.parametrize("mode", ["bn", "all", "random"])
def test_fast_and_plain_path_agree(mode, synthetic):
    """The losses of 20 steps in float64, the last of a smaller batch; and they are two paths."""
    losses, layouts = [], set()
    for plain in (False, True):
        model, step, epoch = prepared("resnet14", mode, *(part[:19 * 16 + 7] for part in synthetic[0]), plain)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_pre_hook(lambda _, inputs: layouts.add((plain, inputs[0].is_contiguous())))
        assert {module.inplace for module in model.modules() if isinstance(module, nn.ReLU)} == {not plain}
        assert {bn.num_batches_tracked is None for _, bn in models.batchnorms(model)} == {not plain}
        assert {parameter.is_contiguous(memory_format=torch.channels_last) for parameter in model.parameters()
                if parameter.shape[2:] == (3, 3)} == {not plain}
        for size in [16] * 19 + [7]:
            step(size)
        losses.append(epoch["losses"])
    assert layouts == {(False, False), (True, True)}   # channels_last is not contiguous
    torch.testing.assert_close(*losses, rtol=0, atol=1e-9)
    assert 1 < losses[0].min() and losses[0].std() > 0.01


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA GPU"))])
@pytest.mark.parametrize("mode", ["bn", "all", "random"])
def test_fast_and_plain_path_make_the_same_updates(mode, device, synthetic, monkeypatch):
    """On CUDA: three steps as they are, a capture, replays and a smaller batch.

    In float32, because channels_last has no float64 there. At a hundredth of the learning rate, or round-off would grow
    too much: the updates differ by 0.1 to 0.5 % on a CPU; without their last step, by 16 % or more.
    """
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    words = ["--arch", "resnet14", "--train", mode, "--batch-size", "16", "--lr", "0.001", "--amp", "off"]
    args, device = train.parse_args([*words, "--device", device])
    updates, losses = [], []
    for plain in (False, True):
        model = models.build_model("resnet14", 0)
        before = train.flatten(train.freeze(model, mode, 0)).clone()
        images, labels = (part[:8 * 16 + 7] for part in synthetic[0])
        step, epoch, optimizer, _ = train.prepare(args, device, model, images, labels, plain)
        train.begin_epoch(epoch, optimizer, args.lr, torch.Generator().manual_seed(0))
        model.train()
        for size in [16] * 8 + [7]:
            step(size)
        assert bool(optimizer.defaults["fused"]) == (not plain)
        updates.append(train.flatten(train.trained_parameters(model)).cpu() - before)
        losses.append(epoch["losses"].cpu())
    assert (updates[0] - updates[1]).norm() < 0.05 * updates[1].norm()
    torch.testing.assert_close(*losses, rtol=0, atol=1e-3)


@pytest.mark.parametrize("mode", ["bn", "all", "random"])
def test_only_frozen_weights_are_cast_and_no_result_changes(mode, synthetic):
    """A frozen weight that is bf16 gives, bit for bit, what autocast makes of it in every step."""
    fast, reference = models.build_model("resnet8", 0), models.build_model("resnet8", 0)
    for model in (fast, reference):
        train.freeze(model, mode, 0)
        model.to(memory_format=torch.channels_last)
    train.speed_up(fast, torch.device("cpu"), "bf16")
    for name, parameter in fast.named_parameters():
        frozen = mode != "all" and models.part_of(name) != "bn" and "parametrizations" not in name
        assert parameter.dtype == (torch.bfloat16 if frozen else torch.float32), name
    images = train.normalize(synthetic[0][0][:16])
    with train.autocast(images.device, "bf16"):
        assert torch.equal(fast(images), reference(images))


PAGE_FAULTS = """
import resource, sys, torch, train
from models import build_model
args, device = train.parse_args(["--arch", "resnet14", "--bn-only", "--device", "cpu", *sys.argv[1:]])
model = build_model(args.arch, args.seed)
train.freeze(model, args.train, args.seed)
images, labels = torch.zeros(2048, 32, 32, 3, dtype=torch.uint8), torch.zeros(2048, dtype=torch.int64)
step, *_ = train.prepare(args, device, model, images, labels, args.plain)
faults = []
for _ in range(16):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(128)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sorted(faults[6:])[5])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep it")
def test_freed_memory_is_kept():
    """A step of the fast path gets no page from the system that it had before; the plain path gets thousands."""
    plain, fast = (int(subprocess.check_output([sys.executable, "-c", PAGE_FAULTS, "--amp", "bf16", *path], text=True,
                                               cwd=pathlib.Path(__file__).parent)) for path in (["--plain"], []))
    assert fast < 100 and 1000 < plain


@pytest.mark.parametrize("mode", ["bn", "random"])
def test_compiled_blocks_agree_in_few_compilations(mode, synthetic, monkeypatch):
    """Compiling costs five versions of the block, however deep the network is, and changes nothing.

    A step of another size and an evaluation compile nothing: they run eagerly.
    """
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        assert not any(isinstance(value, torch.SymInt) for value in inputs)   # compiled for sizes as they are
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)   # without code generation

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: compile(*args, backend=backend, **kwargs))
    images, labels = (part[:48] for part in synthetic[0])
    for arch in ("resnet14", "resnet32"):
        torch._dynamo.reset()
        compilations.clear()
        model, step, epoch = prepared(arch, mode, images, labels, compiled=True)
        _, plain_step, plain_epoch = prepared(arch, mode, images, labels, True)
        for _ in range(2):
            step(16), plain_step(16)
        with train.eagerly(torch.device("cuda")):
            step(7)
            train.evaluate(model.float(), images, labels, "off")
        plain_step(7)
        assert len(compilations) == 5   # identity shortcuts in three stages, projections in two
        torch.testing.assert_close(epoch["losses"], plain_epoch["losses"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("mode, amp", [("bn", "bf16"), ("all", "fp16"), ("random", "off")])
def test_a_step_never_waits_for_the_device(mode, amp, synthetic):
    """What would make the host wait for a GPU, and what a CUDA graph can't hold: reading a number, a size from data."""
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function.name())
            if seen[-1] in ("aten::index.Tensor", "aten::index_put_"):   # a mask's number of True is not known
                assert not any(index.dtype == torch.bool for index in args[1] if index is not None)
            return function(*args, **(kwargs or {}))

    words = ["--arch", "resnet8", "--train", mode, "--batch-size", "16", "--device", "cpu", "--amp", amp]
    model = models.build_model("resnet8", 0)
    train.freeze(model, mode, 0)
    step = train.prepare(train.parse_args(words)[0], torch.device("cpu"), model, *synthetic[0], False)[0]
    seen = []
    with Watch():
        step(16)
    assert {"aten::convolution", "aten::_fused_sgd_", "aten::index.Tensor"} <= set(seen)
    assert not {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"} & set(seen)


def test_the_learning_rate_that_a_graph_reads():
    """It stays the same tensor when the rate drops, and a fused step takes it from there."""
    weight, lr = torch.ones(3, requires_grad=True), torch.tensor(0.1)
    optimizer = torch.optim.SGD([weight], lr, fused=True)
    epoch = {name: values for name, values in zip(train.CHANCE, train.draw_augmentation(8, torch.Generator()))}
    epoch |= {name: torch.ones(1) for name in ("losses", "done", "correct")}
    train.begin_epoch(epoch, optimizer, 0.01, torch.Generator().manual_seed(1))
    assert optimizer.param_groups[0]["lr"] is lr and lr == torch.tensor(0.01)
    assert epoch["losses"] == epoch["done"] == epoch["correct"] == 0
    assert torch.equal(epoch["order"], torch.randperm(8, generator=torch.Generator().manual_seed(1)))
    weight.grad = torch.full((3,), 2.0)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((3,), 0.98))


def test_a_first_step_that_overflows_in_fp16_changes_nothing(synthetic):
    model = models.build_model("resnet8", 0)
    trained = train.freeze(model, "bn", 0)
    before = train.flatten(trained).clone()
    args = train.parse_args(["--arch", "resnet8", "--bn-only", "--device", "cpu", "--amp", "fp16"])[0]
    step, _, optimizer, scaler = train.prepare(args, torch.device("cpu"), model, *synthetic[0], False)
    scaler.load_state_dict({**scaler.state_dict(), "scale": 1e38})
    model.train()
    step(8)
    assert torch.equal(train.flatten(trained), before) and scaler.get_scale() < 1e38
    assert all(not optimizer.state[parameter]["momentum_buffer"].any() for parameter in trained)


def storages(values):
    """Where the tensors among these values lie."""
    return {value.untyped_storage()._cdata for value in tree_leaves(values) if isinstance(value, torch.Tensor)}


class GraphOnCpu(TorchDispatchMode):
    """What a CUDA graph does, on a CPU: the operations that it sees can be repeated later, on the same tensors.

    Numbers in them stay what they were. To see them changes nothing: what `state`, a list of tensors, held comes back.
    """

    def __init__(self, state):
        super().__init__()
        self.state, self.operations = state, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, result))
        return result

    @contextlib.contextmanager
    def capture(self, graph, stream):
        before = [tensor.detach().clone() for tensor in self.state]
        with self:
            yield
        for tensor, value in zip(self.state, before):
            tensor.detach().copy_(value)

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, result in self.operations:
            new, there = function(*args, **kwargs), storages((args, kwargs))
            for target, source in zip(tree_leaves(result), tree_leaves(new)):
                if isinstance(target, torch.Tensor) and not storages(target) & there:   # neither a view nor in place
                    target.detach().copy_(source.detach())


@pytest.mark.parametrize("mode, amp", [
    ("bn", "off"), ("bn", "bf16"), ("bn", "fp16"), ("all", "bf16"), ("random", "off")])
def test_training_by_a_graph_is_the_same(mode, amp, synthetic, monkeypatch):
    """Bit for bit, over two epochs with another learning rate and other chance each, and a smaller last batch."""
    results, streams = [], []
    monkeypatch.setattr(torch.cuda, "Stream", lambda: "a stream")
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams[-1])
    words = ["--arch", "resnet8", "--train", mode, "--batch-size", "16", "--device", "cpu", "--amp", amp]
    args, device = train.parse_args(words)
    images, labels = (part[:5 * 16 + 7] for part in synthetic[0])
    for devices in ((), ("cpu",)):
        monkeypatch.setattr(train, "GRAPHS", devices)
        model = models.build_model("resnet8", 0)
        trained = train.freeze(model, mode, 0)
        step, epoch, optimizer, _ = train.prepare(args, device, model, images, labels, False)
        momentum = [optimizer.state[parameter]["momentum_buffer"] for parameter in trained]
        graph = GraphOnCpu([*trained, *model.buffers(), *momentum, *epoch.values()])
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
        monkeypatch.setattr(torch.cuda, "graph", graph.capture)
        generator = torch.Generator().manual_seed(0)
        losses = []
        for lr in (0.1, 0.01):
            train.begin_epoch(epoch, optimizer, lr, generator)
            model.train()
            for size in [16] * 5 + [7]:
                step(size)
            losses.append(epoch["losses"].clone())
        results.append(torch.cat([*losses, train.flatten(trained), train.flatten(momentum), epoch["correct"][None],
                                  *(train.flatten(train.running_statistics(model, name))
                                    for name in ("running_mean", "running_var"))]))
        assert bool(graph.operations) == bool(devices) and len(streams) == len(devices)
    assert torch.equal(*results)


def test_the_plain_path_is_no_graph(synthetic, monkeypatch):
    def refuse(*args):
        raise AssertionError("the plain path needs no stream and no graph")

    monkeypatch.setattr(train, "GRAPHS", ("cpu",))
    for module, name in ((torch.cuda, "Stream"), (torch.cuda, "set_stream"), (train, "replayed")):
        monkeypatch.setattr(module, name, refuse)
    prepared("resnet8", "bn", *synthetic[0], plain=True)


def test_evaluation_compiles_nothing(tmp_path, monkeypatch, synthetic):
    """It runs inside `eagerly`, and once an epoch."""
    inside, evaluations, evaluate = [], [], train.evaluate

    @contextlib.contextmanager
    def eagerly(device):
        inside.append(device)
        yield
        inside.pop()

    few = [(images[:32], labels[:32]) for images, labels in synthetic]
    monkeypatch.setattr(train, "load_data", lambda *args: few)
    monkeypatch.setattr(train, "eagerly", eagerly)
    monkeypatch.setattr(train, "evaluate", lambda *args: [evaluations.append(len(inside)), evaluate(*args)][1])
    words = ["--arch", "resnet8", "--bn-only", "--batch-size", "16", "--epochs", "2", "--device", "cpu"]
    assert command(train, *words, "--out", str(tmp_path / "a.pt")) == 0
    assert evaluations == [1, 1]


def test_a_step_is_captured_after_three_and_then_replayed(monkeypatch):
    """The order of what happens on CUDA, which this machine may not have: sizes 4 are whole batches, 3 is the last."""
    happened = []

    @contextlib.contextmanager
    def eagerly(device):
        happened.append("eagerly")
        yield

    class Graph:
        def replay(self):
            happened.append("replay")

    @contextlib.contextmanager
    def capture(graph, stream):
        happened.append("begin")
        yield
        happened.append("end")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(train, "eagerly", eagerly)
    step = train.replayed(happened.append, 4, torch.device("cpu"))
    for size in (4, 4, 3, 4, 4, 4, 3, 4):
        step(size)
    assert happened == [4, 4, "eagerly", 3, 4, "begin", 4, "end", "replay", "replay", "eagerly", 3, "replay"]


def test_a_fast_path_that_fails_points_to_the_plain_one():
    def fails(size):
        error = errors.pop()
        raise RuntimeError(error) if isinstance(error, str) else error

    def fails_in_capture(size):
        try:
            fails(size)
        finally:   # as the end of a capture does
            raise RuntimeError("operation failed due to a previous error")

    errors = ["CUDA out of memory. Tried to allocate 2 GiB", "Failed to find\na C compiler"]
    step = train.replayed(fails, 4, torch.device("cpu"))
    with pytest.raises(train.Problem, match="find a C compiler.*--plain"):
        step(4)
    with pytest.raises(RuntimeError, match="out of memory"):   # which train.run explains
        step(4)
    errors = [KeyboardInterrupt(), "CUDA out of memory. Tried to allocate 2 GiB",
              "operation not permitted when stream is capturing"]
    step = train.replayed(fails_in_capture, 4, torch.device("cpu"))
    with pytest.raises(train.Problem, match="not permitted when stream is capturing.*--plain"):
        step(4)
    with pytest.raises(RuntimeError, match="out of memory"):
        step(4)
    with pytest.raises(KeyboardInterrupt):
        step(4)


def test_the_path_that_is_asked_for_trains(tmp_path, monkeypatch, capsys, synthetic):
    def prepare(args, device, model, images, labels, plain):
        raise train.Problem(f"plain is {plain}")

    monkeypatch.setattr(train, "load_data", lambda *args: synthetic)
    monkeypatch.setattr(train, "prepare", prepare)
    words = ["--arch", "resnet8", "--device", "cpu", "--out", str(tmp_path / "a.pt")]
    for plain, path in ((True, ["--plain"]), (False, [])):
        assert command(train, *words, *path) == 1
        assert f"plain is {plain}" in capsys.readouterr().err


def test_work_of_a_step():
    """resnet14, counted by hand: 13 times the features; 2 c_in c_out k^2 operations a pixel for a convolution."""
    stem, stage1, stage2, stage3 = 16 * 1024, 4 * 16 * 1024, 5 * 32 * 256, 5 * 64 * 64   # features that an image has
    moved, operations = train.work_of_a_step("resnet14", 128, "bf16")
    assert moved == 13 * 2 * 128 * (stem + stage1 + stage2 + stage3)
    forward = 4 * 16 * 16 * 9 * 1024 + (16 * 32 * 9 + 3 * 32 * 32 * 9 + 16 * 32) * 256 \
        + (32 * 64 * 9 + 3 * 64 * 64 * 9 + 32 * 64) * 64 + 640   # the stem needs no input gradient, so it counts once
    assert operations == 2 * 128 * (2 * forward + 3 * 16 * 9 * 1024)


def test_benchmark(capsys, monkeypatch):
    """Its arithmetic, for steps of 0.3 s and 0.9 s on the plain path and a third of that on the fast one after a
    warm-up of slower ones, an evaluation of 2 s, a copy of 1 s and a matrix product of 1 s.
    """
    times = iter([9.0] * train.WARM_UP + [0.3, 0.9] + [9.0] * train.WARM_UP + [0.1, 0.3])
    paths, sizes, prepare = [], [], train.prepare

    def seconds(function, *arguments, device):
        if function is train.evaluate:
            return 2.0
        if function is torch.mm or function.__name__ == "copy_":
            return 1.0
        function(*arguments)
        return next(times)

    def train_step(model, optimizer, scaler, images, labels, amp):   # for so large a batch
        sizes.append(len(images))
        return torch.ones(()), 1

    monkeypatch.setattr(train, "prepare", lambda *args: [paths.append(args[-1]), prepare(*args)][1])
    monkeypatch.setattr(train, "seconds", seconds)
    monkeypatch.setattr(train, "train_step", train_step)
    words = ["--arch", "resnet8", "--bn-only", "--batch-size", "9000", "--benchmark", "2", "--plain"]
    assert command(train, *words, "--device", "cpu") == 0
    plain, fast, ratio, floor = capsys.readouterr().out.splitlines()[-4:]
    assert fast.startswith("fast    200.00 (120.00 to 280.00)   45,000 ") and fast.endswith(" 0:08:32")
    assert plain.startswith("plain   600.00 (360.00 to 840.00)   15,000 ") and plain.endswith(" 0:14:56")
    assert ratio == "fast is 3.00 times as fast as plain"   # whole runs are 160 times (6 steps + 2 s)
    assert paths == [True, False]
    assert sizes == 2 * ([9000] * (train.WARM_UP + 2) + [5000])   # the last batch of an epoch has memory of its own
    moved, operations = train.work_of_a_step("resnet8", 9000, "off")
    bandwidth, speed = 2 * 2 ** 28, 2 * 1024 ** 3   # 256 MiB are read and written
    assert f"take {1e3 * moved / bandwidth:.1f} ms" in floor and f"product) {1e3 * operations / speed:.1f} ms" in floor
    assert floor.endswith(f" takes {0.2 / (moved / bandwidth + operations / speed):.1f} times their sum")


# -------------------------------------------------------------------------------------------------- checkpoints

def timeless(records):
    return [{name: r[name] for name in r if name not in ("seconds", "images_per_second")} for r in records]


@pytest.mark.parametrize("mode, amp", [("bn", "off"), ("all", "off"), ("random", "off"), ("bn", "bf16"),
                                       ("bn", "fp16")])
def test_resume_is_bit_for_bit(mode, amp, small_data, monkeypatch, capsys):
    monkeypatch.setattr(sys.modules[__name__], "SMALL", [*SMALL, "--amp", amp])
    assert command(train, *SMALL, "--train", mode, "--out", "whole.pt") == 0
    steps, step = [], train.train_step

    def stops_in_epoch_3(*args):
        steps.append(1)
        if len(steps) == 11:   # four steps an epoch
            signal.raise_signal(signal.SIGTERM if mode == "bn" else signal.SIGINT)
        return step(*args)

    monkeypatch.setattr(train, "train_step", stops_in_epoch_3)
    assert command(train, *SMALL, "--train", mode, "--out", "parts.pt", "--resume") == 1
    out, err = capsys.readouterr()
    assert "starting from scratch" in out and err.count("\n") == 1 and "--resume" in err
    monkeypatch.setattr(train, "train_step", step)
    assert command(train, *SMALL, "--train", mode, "--out", "parts.pt", "--resume") == 0
    whole, parts = (train.load_checkpoint(pathlib.Path(name)) for name in ("whole.pt", "parts.pt"))
    for name in train.FIELDS:
        if isinstance(whole[name], torch.Tensor):
            assert torch.equal(whole[name], parts[name]), name
    assert whole["scaler"] == parts["scaler"] and bool(whole["scaler"]) == (amp == "fp16")
    assert timeless(whole["records"]) == timeless(parts["records"]) and len(whole["records"]) == 4
    log = [json.loads(line) for line in pathlib.Path("parts.jsonl").read_text().splitlines()]
    record = json.loads(pathlib.Path("parts.json").read_text())
    assert log == record["records"] == parts["records"]
    assert record["test_accuracy"] == log[-1]["test_accuracy"] and record["parameters"]["all"] == 78_042

    before = {path.name: path.read_bytes() for path in pathlib.Path().iterdir()}
    assert command(train, *SMALL, "--train", mode, "--out", "parts.pt", "--resume") == 0
    assert "finished" in capsys.readouterr().out
    assert before == {path.name: path.read_bytes() for path in pathlib.Path().iterdir()}


def test_accuracy_in_the_record_is_that_of_the_checkpoint(checkpoint, small_data):
    model = train.restore_model(checkpoint, "a.pt").eval()
    images, labels = small_data[1]
    with torch.no_grad():
        plain = functional_forward(model, train.normalize(images), False).argmax(1)
    assert checkpoint["records"][-1]["test_accuracy"] == pytest.approx(100 * (plain == labels).double().mean().item())


def test_bn_only_resnet866_checkpoint_is_small(tmp_path):
    model = models.build_model("resnet866", 0)
    trained = train.freeze(model, "bn", 0)
    record = dict.fromkeys(train.RECORD, 1 / 3)
    train.save_checkpoint(tmp_path / "x.pt", {
        "version": train.VERSION, "epoch": 160, "pruned_below": 0.0, "trained": train.flatten(trained),
        "momentum": torch.randn(64_736), "scaler": {}, "fingerprint": [0.1, 0.2, 0.3],
        "options": {"arch": "resnet866", "train": "bn", "dataset": "cifar10", "seed": 0, "epochs": 160,
                    "batch_size": 128, "lr": 0.1, "weight_decay": 1e-4, "amp": "bf16"},
        "running_mean": torch.randn(32_368), "running_var": torch.rand(32_368),
        "rng": torch.Generator().get_state(), "records": [{**record, "epoch": epoch + 1} for epoch in range(160)]})
    assert (tmp_path / "x.pt").stat().st_size < 1_000_000
    assert len(train.load_checkpoint(tmp_path / "x.pt")["trained"]) == 64_736


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    path.write_bytes(b"old")

    def full(*args):
        raise OSError(28, "No space left on device")

    class FullFile(io.FileIO):   # takes a byte, then has no more room
        def write(self, content):
            super().write(content[:1])
            full()

    for where, broken, how in ((train, "open", FullFile), (os, "fsync", full), (os, "replace", full)):
        with monkeypatch.context() as patch:
            patch.setattr(where, broken, how, raising=False)
            with pytest.raises(train.Problem, match="No space left on device.*still there"):
                train.write_atomically(path, b"new")
        assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    train.write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_full_disk_is_one_line_and_the_run_goes_on_later(checkpoint, capsys, monkeypatch):
    replace, checkpoints = os.replace, []

    def full(source, target):
        checkpoints.extend([target.read_bytes() if target.exists() else None] if target.suffix == ".pt" else [])
        if len(checkpoints) == 2:   # the one of epoch 2
            raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert command(train, *SMALL, "--bn-only", "--out", "b.pt") == 1
    err = capsys.readouterr().err
    assert "b.pt can't be written (No space left on device); what it held before is still there" in err
    assert err.count("\n") == 1 and pathlib.Path("b.pt").read_bytes() == checkpoints[1]
    assert train.load_checkpoint(pathlib.Path("b.pt"))["epoch"] == 1 and not list(pathlib.Path().glob("*.tmp"))
    assert command(train, *SMALL, "--bn-only", "--out", "b.pt", "--resume") == 0
    assert torch.equal(torch.load("b.pt")["trained"], checkpoint["trained"])


def test_leftovers_of_killed_runs_are_removed(small_data):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for name in (f"a.pt.{gone.pid}-00c0ffee.tmp", f"a.jsonl.{gone.pid}-00c0ffee.tmp",
                 f"a.json.{os.getpid()}-00c0ffee.tmp"):
        pathlib.Path(name).write_bytes(b"half")
    kept = {f"a.pt.{os.getppid()}-00c0ffee.tmp", f"b.pt.{gone.pid}-00c0ffee.tmp", "a.pt.mine.tmp"}   # not ours
    for name in kept:
        pathlib.Path(name).write_bytes(b"half")
    train.remove_leftovers(pathlib.Path("a.pt"))
    assert {path.name for path in pathlib.Path().iterdir()} == kept


def test_two_runs_of_one_seed_are_identical(checkpoint):
    assert command(train, *SMALL, "--bn-only", "--out", "b.pt") == 0
    again = torch.load("b.pt", weights_only=True)
    assert all(torch.equal(again[name], checkpoint[name]) for name in again if isinstance(again[name], torch.Tensor))
    assert timeless(again["records"]) == timeless(checkpoint["records"])
    records = [json.loads(pathlib.Path(name).read_text()) for name in ("a.json", "b.json")]
    for record in records:
        record["records"] = timeless(record["records"])
        del record["seconds"]
    assert records[0] == records[1]


# -------------------------------------------------------------------------------------------- prune and analyze

def network_with_known_gammas():
    """resnet8 whose 336 gammas are -0.5, 0.05, 0.005 and 0 in turn."""
    model = models.build_model("resnet8", 0)
    position = 0
    for _, bn in models.batchnorms(model):
        values = torch.tensor([-0.5, 0.05, 0.005, 0.0]).repeat(84)
        bn.weight.data = values[position:position + len(bn.weight)].clone()
        bn.bias.data = torch.where(bn.weight == -0.5, 3.0, -0.25)
        position += len(bn.weight)
    assert position == 336
    return model


def test_prune_table_of_known_gammas(synthetic):
    images, labels = (part[:200] for part in synthetic[1])
    model = network_with_known_gammas()
    betas = [bn.bias.clone() for _, bn in models.batchnorms(model)]

    def accuracy(threshold):
        plain = network_with_known_gammas().eval()
        for _, bn in models.batchnorms(plain):
            bn.weight.data = torch.tensor([0.0 if abs(g) < threshold else g for g in bn.weight.tolist()])
        with torch.no_grad():
            return 100 * (functional_forward(plain, train.normalize(images), False).argmax(1) == labels).double().mean()

    rows = prune.prune_table(model, images, labels, "off", [0.0, 0.01, 0.1, 0.5, 1.0])
    # 0.5 is not below 0.5; zeros count as below any threshold but 0.
    assert [row["pruned"] for row in rows] == [0, 50, 75, 75, 100]
    for row in rows:
        assert row["test_accuracy"] == pytest.approx(accuracy(row["threshold"]).item())
        assert row["change"] == pytest.approx((accuracy(row["threshold"]) - accuracy(0)).item())
    assert all(torch.equal(bn.bias, beta) for (_, bn), beta in zip(models.batchnorms(model), betas))


@pytest.mark.parametrize("mode", ["bn", "output"])   # gammas that the checkpoint holds, and that the seed holds
def test_saved_pruned_network_loads_everywhere(mode, small_data, capsys):
    assert command(train, *SMALL, "--train", mode, "--out", "a.pt") == 0
    assert command(prune, "a.pt", "--thresholds", 0.3, "--save", "pruned.pt") == 0
    capsys.readouterr()
    a, pruned = (train.restore_model(train.load_checkpoint(pathlib.Path(name)), name) for name in ("a.pt", "pruned.pt"))
    expected = prune.gammas(a)
    expected[expected.abs() < 0.3] = 0
    assert torch.equal(prune.gammas(pruned), expected) and (expected == 0).any()
    assert command(prune, "pruned.pt", "--thresholds", 0.3) == command(analyze, "pruned.pt", "--activations") == 0
    share = 100 * (expected == 0).double().mean().item()
    assert f"{share:.2f} %" in capsys.readouterr().out
    assert command(train, *SMALL, "--train", mode, "--out", "pruned.pt", "--resume") == 2


def test_prune_adds_its_table_to_the_record_once(checkpoint):
    plain = json.loads(pathlib.Path("a.json").read_text())
    assert command(prune, "a.pt", "--thresholds", 0.3) == 0
    assert json.loads(pathlib.Path("a.json").read_text()) == plain
    assert command(prune, "a.pt") == 0
    record = json.loads(pathlib.Path("a.json").read_text())
    assert [row["threshold"] for row in record.pop("prune")] == [0, 0.001, 0.01, 0.02, 0.05, 0.1, 0.2]
    assert record == plain


def test_analysis_of_known_gammas():
    parts = analyze.parameters_by_stage(network_with_known_gammas())
    assert {part: len(gamma) for part, (gamma, _) in parts.items()} == {
        "stem": 16, "stage1": 32, "stage2": 96, "stage3": 192, "all": 336}
    gamma, beta = parts["all"]
    assert [analyze.share_below(gamma, t) for t in (0.001, 0.01, 0.1, 0.5, 1)] == [25, 50, 75, 75, 100]
    assert np.array_equal(beta, np.where(gamma == -0.5, 3.0, -0.25))


def test_histogram():
    lines = analyze.histogram(np.array([0.0] * 6 + [1.0] * 3 + [-1.0]), bins=5, width=6)
    assert lines == ["  -0.8000  10.00 % #", "  -0.4000   0.00 %", "  +0.0000  60.00 % ######", "  +0.4000   0.00 %",
                     "  +0.8000  30.00 % ###"]


def test_firing_frequency(synthetic):
    """A stem whose ReLUs are known to fire always, never, and on a known half; blocks by counting their outputs."""
    images, labels = (part[:130] for part in synthetic[1])   # more than one batch
    model = models.build_model("resnet8", 0)
    for _, bn in models.batchnorms(model):
        bn.weight.data.zero_()
        bn.bias.data.fill_(-1)
    model.bn.bias.data[:4] = 1            # 4 of the stem's 16 features always fire, and pass every addition of stage 1
    model.stage1[0].bn2.bias.data.zero_()
    model.stage3[0].bn1.bias.data[:] = 1  # 64 of the 112 inside
    frequency, _ = analyze.firing_frequency(model, images, labels, "off")
    assert {kind: (len(f), f.sum()) for kind, f in frequency.items()} == {
        "inside a block": (112, 64), "after the addition": (112, 4), "all": (240, 72)}

    model = models.build_model("resnet8", 0).eval()   # and one with something in between
    frequency, _ = analyze.firing_frequency(model, images, labels, "off")
    with torch.no_grad():
        stem = F.batch_norm(F.conv2d(train.normalize(images), model.conv.weight, padding=1), model.bn.running_mean,
                            model.bn.running_var, model.bn.weight, model.bn.bias)
    assert np.allclose(frequency["all"][:16], (stem > 0).double().mean((0, 2, 3)).numpy(), atol=1e-4)


def fake_record(folder, name, **changes):
    record = {"arch": "resnet14", "train": "bn", "dataset": "cifar10", "seed": 0, "epochs": 160, "batch_size": 128,
              "lr": 0.1, "weight_decay": 1e-4, "amp": "off", "parameters": {}, "records": [], "seconds": 5400.0,
              "hardware": "Abacus", "torch": "2.11.0", "commit": "0123456789", **changes}
    (folder / name).write_text(json.dumps(record))


def test_accuracy_tables(tmp_path, capsys):
    for seed, accuracy in enumerate([47.0, 48.0, 49.5]):
        fake_record(tmp_path, f"s{seed}.json", seed=seed, test_accuracy=accuracy)
    fake_record(tmp_path, "wide.json", arch="wrn14-4", test_accuracy=50.0)
    fake_record(tmp_path, "short.json", epochs=2, test_accuracy=99.0)
    fake_record(tmp_path, "synthetic.json", dataset="synthetic", test_accuracy=99.0, prune=[
        {"threshold": 0.5, "pruned": 99.0, "test_accuracy": 99.0, "change": 0.0}])
    fake_record(tmp_path, "t0-again.json", test_accuracy=99.0)
    fake_record(tmp_path, "control.json", arch="resnet56", train="random", test_accuracy=33.0)
    fake_record(tmp_path, "base.json", arch="wrn14-1", train="all", test_accuracy=90.0)
    assert command(analyze, "--results", tmp_path) == 0
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    rows = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    std = np.std([47.0, 48.0, 49.5], ddof=1)   # 1.258
    assert ["resnet14", "1,120", f"48.17 ± {std:.2f} (n=3)", "48", "46.67", "90.00 (n=1)", "91"] in rows
    assert ["resnet866", "64,736", "-", "83", "77.83", "-", "93"] in rows
    assert ["resnet56", "4,256", "-", "wrn14-4", "4,480", "50.00 (n=1)"] in rows
    assert ["random", "-", "-", "-", "-", "-", "-", "33.00 (n=1)", "-"] in rows
    assert ["--arch wrn14-4 --train bn --seed 0 --amp off", "50.00", "1.5", "Abacus", "2.11.0", "0123456"] in rows
    assert "99.00" not in str(rows)
    left_out = [cell for row in rows for cell in row if ".json" in cell]
    assert [line.split()[0] for line in left_out] == ["short.json", "synthetic.json", "t0-again.json"]


@pytest.mark.parametrize("changes", [{"test_accuracy": "high"}, {"prune": [{"x": 1}]}, {"arch": "resnet15"},
                                     {"seed": None}, {"records": 3}, {"hardware": None},
                                     {"seconds": "long"}, {"commit": 1}, {"test_accuracy": 10 ** 400}])
def test_bad_records(changes, tmp_path, capsys):
    fake_record(tmp_path, "bad.json", **{"test_accuracy": 48.0, **changes})
    assert command(analyze, "--results", tmp_path) == 1
    err = capsys.readouterr().err
    assert "bad.json is not the record of a run" in err and err.count("\n") == 1


def test_a_foreign_file_in_the_place_of_the_record(checkpoint, capsys):
    for content in ('{"x": 1}', "[]", "not json"):
        pathlib.Path("a.json").write_text(content)
        assert command(prune, "a.pt") == 0
        assert "not added to the record: a.json" in capsys.readouterr().out
        assert pathlib.Path("a.json").read_text() == content


def test_specification_table():
    assert {row[0]: tuple(int(cell.replace(",", "")) for cell in row[3:]) for row in analyze.specification_rows()} \
        == {arch: COUNTS[arch] for arch in COUNTS if arch != "wrn14-1"}


# ------------------------------------------------------------------------------------------------------- errors

@pytest.mark.parametrize("words, status, says", [
    ("--arch resnet15", 2, "14 and 20"),
    ("--train everything", 2, "bn\\+shortcut"),
    ("--train all --bn-only", 2, "not allowed with"),
    ("--epochs 0", 2, "--epochs 0: must be 1 to 1000000"),
    ("--epochs 1000001", 2, "must be 1 to 1000000"),
    ("--epochs many", 2, "--epochs"),
    ("--batch-size 0", 2, "--batch-size 0: must be at least 1"),
    ("--batch-size 201 --out new.pt", 2, "--batch-size 201 is more than the 200"),
    ("--lr nan", 2, "--lr nan"),
    ("--lr 1e39", 2, "--lr 1e\\+39"),
    ("--batch-size 200 --epochs 1 --lr 1e30 --weight-decay 1e30 --out new.pt", 1, "not finite after step 1 of epoch 1"),
    ("--arch wrn14-64 --out new.pt", 1, "out of memory .wrn14-64 has 2.8 GB of weights, this machine 1.1 GB of memory"),
    ("--lr -1", 2, "--lr -1"),
    ("--weight-decay inf", 2, "--weight-decay inf"),
    ("--seed -1", 2, "--seed -1: must be 0 to 4294967295"),
    ("--out x.ckpt", 2, "ends in .pt"),
    ("--device cuda", 2, "--device cpu"),
    ("--out file/x.pt", 1, "--out file/x.pt can't be written .*: choose another folder"),
    ("--resume", 1, "not a checkpoint"),
    ("", 2, "runs/resnet14-all-s0.pt exists"),
    ("--lr 1e30 --out new.pt", 1, "at step [1-9] of epoch 1; no epoch was completed"),
])
def test_errors_of_train(words, status, says, small_data, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(os, "sysconf", lambda name: 2 ** 15)   # a machine of 2^15 pages of 2^15 bytes
    pathlib.Path("file").write_text("in the way")
    pathlib.Path("runs").mkdir()
    pathlib.Path("runs/resnet14-all-s0.pt").write_bytes(b"precious")
    assert command(train, *words.split()) == status
    err = capsys.readouterr().err
    assert err.startswith("train.py: error: ") and err.count("\n") == 1
    assert re.search(says, err), err
    assert pathlib.Path("runs/resnet14-all-s0.pt").read_bytes() == b"precious"
    assert not pathlib.Path("new.pt").exists()


def test_resume_with_other_options_is_refused(checkpoint, capsys):
    before = pathlib.Path("a.pt").read_bytes()
    for change, says in [(["--epochs", "8"], "--epochs 8 (checkpoint: 4)"), (["--lr", "0.2"], "--lr 0.2"),
                         (["--arch", "resnet14"], "--arch resnet14 (checkpoint: resnet8)"),
                         (["--seed", "1"], "--seed 1 (checkpoint: 0)")]:
        assert command(train, *SMALL, "--bn-only", "--out", "a.pt", "--resume", *change) == 2
        err = capsys.readouterr().err
        assert says in err and err.count("\n") == 1
    assert pathlib.Path("a.pt").read_bytes() == before


def test_divergence_keeps_the_last_good_checkpoint(small_data, capsys, monkeypatch):
    step, steps = train.train_step, []

    def diverges_in_epoch_2(*args):
        steps.append(1)
        loss, hits = step(*args)
        return (loss * math.nan if len(steps) == 6 else loss), hits

    monkeypatch.setattr(train, "train_step", diverges_in_epoch_2)
    assert command(train, *SMALL, "--bn-only", "--out", "a.pt") == 1
    assert "loss nan at step 2 of epoch 2; a.pt holds the network after epoch 1" in capsys.readouterr().err
    assert train.load_checkpoint(pathlib.Path("a.pt"))["epoch"] == 1


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ..."),
                                   MemoryError()])
def test_out_of_memory_is_one_line(error, small_data, capsys, monkeypatch):
    def fails(*args):
        raise error

    monkeypatch.setattr(train, "train_step", fails)
    assert command(train, *SMALL, "--out", "a.pt") == 1
    err = capsys.readouterr().err
    assert "out of memory" in err and "try " in err and err.count("\n") == 1


def test_other_errors_of_the_device_are_not_taken_for_memory(small_data, monkeypatch):
    def fails(*args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(train, "train_step", fails)
    with pytest.raises(RuntimeError, match="illegal"):
        command(train, *SMALL, "--out", "a.pt")


class Code:
    """A pickle that would create a file."""

    def __reduce__(self):
        return os.mkdir, ("code-ran",)


@pytest.mark.parametrize("damage, says", [
    (lambda c: None, "no such checkpoint"),
    (lambda c: b"", "damaged"),
    (lambda c: b"not a zip file", "not a checkpoint"),
    (lambda c: pathlib.Path("a.pt").read_bytes()[:9000], "damaged"),
    (lambda c: pathlib.Path("a.pt").read_bytes().replace(c["trained"].numpy().tobytes()[:8], b"8 others"), "damaged"),
    (lambda c: torch.zeros(3), "not a checkpoint of train.py"),
    (lambda c: {"state_dict": {}}, "not a checkpoint of train.py"),
    (lambda c: {**c, "extra": Code()}, "not a checkpoint"),
    (lambda c: c | {"version": 2}, "version 2, but this code reads version 1"),
    (lambda c: c | {"extra": 1}, "extra"),
    (lambda c: {name: c[name] for name in c if name != "rng"}, "rng"),
    (lambda c: c | {"epoch": 3}, "contradict"),
    (lambda c: c | {"options": c["options"] | {"arch": "resnet14"}}, "336 entries, but resnet14 has 560"),
    (lambda c: c | {"options": c["options"] | {"arch": "resnet15"}}, "14 and 20"),
    (lambda c: c | {"options": c["options"] | {"arch": "wrn14-100000"}}, "smaller"),
    (lambda c: c | {"options": c["options"] | {"train": "all"}}, "672 trained parameters"),
    (lambda c: c | {"options": c["options"] | {"seed": 1}}, "fingerprints differ"),
    (lambda c: c | {"trained": c["trained"] * math.nan}, "trained"),
    (lambda c: c | {"running_var": -c["running_var"]}, "running_var"),
    (lambda c: c | {"running_mean": torch.zeros(1).expand(336)}, "running_mean"),
    (lambda c: c | {"momentum": c["momentum"][1:]}, "momentum"),
    (lambda c: c | {"rng": c["rng"][:7]}, "damaged"),
])
@pytest.mark.parametrize("script", [prune, analyze, train])
def test_bad_checkpoints(damage, says, script, checkpoint, capsys):
    bad = damage(checkpoint)
    path = pathlib.Path("bad.pt")
    if isinstance(bad, bytes):
        path.write_bytes(bad)
    elif bad is not None:
        torch.save(bad, path)
    elif script is train:
        return   # no checkpoint yet is no error there
    before = path.read_bytes() if path.exists() else None
    words = [*SMALL, "--bn-only", "--resume", "--out"] if script is train else []
    assert command(script, *words, path) in (1, 2)
    err = capsys.readouterr().err
    assert err.startswith(f"{script.__name__}.py: error: ") and err.count("\n") == 1
    if script is not train:   # which may see a contradiction to its options first
        assert says in err, err
    assert not pathlib.Path("code-ran").exists() and before == (path.read_bytes() if path.exists() else None)


def rezip(content, member, change):
    """A checkpoint's bytes with one member of its zip file changed, and sizes and checksums right."""
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(result := io.BytesIO(), "w") as new:
        for name in old.namelist():
            new.writestr(name, change(old.read(name)) if name.endswith(member) else old.read(name))
    return result.getvalue()


def mutations(checkpoint, content):
    """Damaged, foreign and hostile variants of a checkpoint and of its bytes, the same in every run of the tests."""
    rng = np.random.RandomState(0)

    def flip(data):
        position, bit = rng.randint(len(data)), rng.randint(8)
        return data[:position] + bytes([data[position] ^ (1 << bit)]) + data[position + 1:]

    yield from (flip(content) for _ in range(100))
    yield from (content[:rng.randint(len(content))] for _ in range(50))
    yield from (rezip(content, "data.pkl", flip) for _ in range(150))      # sizes, types, names and opcodes
    yield from (rezip(content, "data.pkl", lambda pickle: pickle[:rng.randint(len(pickle))]) for _ in range(20))
    yield from (rezip(content, f"data/{i}", lambda data: data[:len(data) // 2]) for i in range(5))
    odd = [None, True, -1, 10 ** 400, 1e308, math.nan, "x", b"x", [], {}, [1, 2, 3], {"x": 1}, (1,), torch.tensor(1.0),
           torch.full((336,), math.nan), torch.full((672,), math.inf), torch.zeros(336, 1), torch.zeros(672).half(),
           torch.zeros(1).expand(10 ** 12), torch.zeros(0), torch.zeros(336, dtype=torch.complex64),
           torch.eye(4).to_sparse(), torch.empty(672, device="meta")]
    for name in checkpoint:
        yield {key: checkpoint[key] for key in checkpoint if key != name}
        yield from (checkpoint | {name: value} for value in odd)
    for table, key in [("options", name) for name in checkpoint["options"]] + [("records", 0), ("fingerprint", 0)]:
        for value in odd:
            changed = checkpoint[table].copy()
            changed[key] = value
            yield checkpoint | {table: changed}
    for key in train.RECORD:
        first = checkpoint["records"][0]
        yield from (checkpoint | {"records": [first | {key: value}, *checkpoint["records"][1:]]} for value in odd)
    for arch in ("resnet6000000002", "wrn14-100000", "wrn8-3000", "resnet600002", "resnet" + "9" * 5000, "resnet8\0",
                 "resnet8\nx", "resnet8\x1b[31m"):
        yield checkpoint | {"options": checkpoint["options"] | {"arch": arch}}
        features = torch.zeros(1).expand(10 ** 9)
        yield checkpoint | {"options": checkpoint["options"] | {"arch": arch}, "running_mean": features}
    yield from (checkpoint | {name: Code()} for name in ("version", "options", "trained"))
    yield pickle.dumps(Code())
    wide = "wrn8-1000"   # consistent, but for 390 GB of weights that it says to draw again
    features = models.count_features(wide)
    yield checkpoint | {"options": checkpoint["options"] | {"arch": wide}, "running_mean": torch.zeros(features),
                        "running_var": torch.ones(features), "trained": torch.zeros(2 * features),
                        "momentum": torch.zeros(2 * features)}
    yield checkpoint | {"extra": Bomb()}
    yield pickle.dumps(Bomb(), protocol=2) + content   # zip readers look at the end, torch.load at the beginning
    # [t, u, v, ..., {z: 0}] with u = (t, t), v = (u, u), ... 60 times: to hash z takes 2^60 steps. And the same with
    # every tuple kept twice.
    for keep in (b"q%c", b"q\xffq%c"):
        tuples = b"".join(b"h%ch%c\x86" % (i, i) + keep % (i + 1) for i in range(60))
        bomb = b"\x80\x02](" + b")q\x00" + tuples + b"}h\x3cK\x00s" + b"e."
        yield rezip(content, "data.pkl", lambda data: bomb)


class Bomb:
    """A pickle that takes 30 GB and runs no code."""

    def __reduce__(self):
        return bytearray, (30 * 10 ** 9,)


def test_strangers_files_are_loaded_as_valid_or_refused_in_one_line(checkpoint):
    content, path = pathlib.Path("a.pt").read_bytes(), pathlib.Path("bad.pt")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    valid = refused = 0
    for bad in mutations(checkpoint, content):
        if isinstance(bad, bytes):
            path.write_bytes(bad)
        else:
            torch.save(bad, path)
        signal.alarm(30)   # a hang would end the tests
        address_space = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (address_space + 2 ** 31, hard))
        try:
            train.restore_model(train.load_checkpoint(path), path)
            valid += 1
        except train.Problem as problem:
            assert "\n" not in str(problem) and str(path) in str(problem)
            refused += 1
        finally:
            signal.alarm(0)
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    print(f"{valid} files loaded as valid, {refused} refused")
    assert refused > 800
    assert not pathlib.Path("code-ran").exists()


@pytest.mark.parametrize("words, says", [
    ("a.pt --thresholds -1", "--thresholds"), ("a.pt --thresholds nan", "--thresholds"), ("", "ckpt.pt"),
    ("a.pt a.pt --thresholds 0.1 --save b.pt", "--save takes one"), ("a.pt --save b.pt", "--save takes one"),
    ("a.pt --thresholds 0.1 --save a.pt", "exists"),
])
def test_errors_of_prune(words, says, checkpoint, capsys):
    assert command(prune, *words.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("prune.py: error: ") and err.count("\n") == 1 and says in err


# ------------------------------------------------------------------------------------------------------ results

RESULTS = sorted((pathlib.Path(__file__).parent / "results").glob("*.json"))


def test_tables_of_the_readme_are_those_of_analyze(capsys):
    assert command(analyze, "--markdown") == 0
    printed = capsys.readouterr().out.split("\n\n")
    readme = (pathlib.Path(__file__).parent / "README.md").read_text().split("\n\n")
    titles = [title for title in readme if re.fullmatch(r"\*\*.*\*\*", title)]
    assert len(titles) == 4
    for title in titles:
        assert readme[readme.index(title) + 1] == printed[printed.index(title) + 1], f"{title}: analyze.py --markdown"


def test_figures_in_the_text_of_the_readme_are_those_of_the_records():
    folder = pathlib.Path(__file__).parent
    readme = (folder / "README.md").read_text()
    claims = dict(re.findall(r"^\| (\d)\. (.*)$", readme, re.M))
    text = " ".join(readme.split())
    records = {path.stem: json.loads(path.read_text()) for path in RESULTS}
    seeds = [record for name, record in records.items() if name.startswith("resnet14-bn-s")]
    n, accuracies = len(seeds), [record["test_accuracy"] for record in seeds]
    pruned, change = zip(*((row["pruned"], row["change"]) for record in seeds for row in record["prune"]
                           if row["threshold"] == 0.01))
    # Each checkpoint's shares of disabled features: of the ReLUs in blocks, of those after additions, of all.
    log = (folder / "results" / "activations.txt").read_text()
    disabled = {name: re.findall(r" ([\d.]+)$", part, re.M)[-3:]
                for name, part in re.findall(r"^\$ .*results/(.*)\.pt.*$([^$]*)", log, re.M)}
    assert set(disabled) == {name for name, record in records.items() if record["train"] == "bn"}
    of_14 = [float(shares[2]) for name, shares in disabled.items() if name.startswith("resnet14-")]

    def mean_and_std(values, digits):
        return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"

    def hours(name):
        seconds = np.median([r["seconds"] for r in records[name]["records"]])
        return f"{160 * seconds / 3600:.1f} h (160 times the median epoch, {seconds:.0f} s"

    [of_all] = [row["pruned"] for row in records["resnet14-all-s0"]["prune"] if row["threshold"] == 0.01]
    [of_32] = [row for row in records["resnet32-bn-s0"]["prune"] if row["threshold"] == 0.01]
    speed = np.median([r["images_per_second"] for r in records["resnet14-bn-s0"]["records"]])
    gap = f"{48 - np.mean(accuracies):.1f} points"
    for where, figure in (
            (claims["2"], f"resnet14: {mean_and_std(pruned, 1)} % are below 0.01"),
            (claims["2"], f"the accuracy by {np.mean(change):+.2f} ± {np.std(change, ddof=1):.2f} points (n={n})"),
            (claims["2"], f"resnet32: {of_32['pruned']:.2f} %, {of_32['change']:+.2f} points (n=1)"),
            (claims["2"], f"{mean_and_std(of_14, 1)} % of resnet14's features (n={n}) and "
                          f"{disabled['resnet32-bn-s0'][2]} % of resnet32's (n=1) are disabled"),
            (claims["4"], f"{mean_and_std(accuracies, 2)} % by BatchNorm (n={n})"),
            (claims["4"], f"{records['resnet14-random-s0']['test_accuracy']:.2f} % by two random weights per channel"),
            (claims["5"], f"resnet14: {mean_and_std(accuracies, 2)} % (n={n},"), (claims["5"], f" {gap} lower"),
            (claims["5"], f"all parameters: {records['resnet14-all-s0']['test_accuracy']:.2f} %, n=1"),
            (text, f"only {of_all:.2f} % of resnet14's gammas are below 0.01"), (text, f" by {gap}"),
            (text, f"resnet32 is {records['resnet32-bn-s0']['test_accuracy'] - 51.29:.1f} points below"),
            *((text, f"{shares[2]} % ({shares[0]} % inside the blocks, {shares[1]} % after the additions)")
              for shares in disabled.values()),
            (text, f"{hours('resnet14-bn-s0')}; {speed:,.0f} images/s"), (text, hours("resnet14-random-s0")),
            (text, hours("resnet14-all-s0")), (text, hours("resnet32-bn-s0"))):
        assert figure in where, figure


def test_speed_table_of_the_readme_is_that_of_the_logs():
    folder = pathlib.Path(__file__).parent
    readme = (folder / "README.md").read_text()
    expected, times = {}, {}   # the table has the run of the median ratio where a command ran more than once
    for processor in ("Intel", "AMD"):
        log = (folder / f"results/speed-cpu-{processor.lower()}.txt").read_text()
        runs = re.findall(rf"^(resnet\d+) --train (\w+) .* --amp (\w+), {processor}", log, re.M)
        fast = re.findall(r"^fast +([\d.]+) .*?\) +([\d,]+)", log, re.M)
        plain = re.findall(r"^plain +([\d.]+)", log, re.M)
        ratios = re.findall(r"^fast is ([\d.]+) times", log, re.M)
        for run, (ms, images), slow, ratio in zip(runs, fast, plain, ratios, strict=True):
            row = f"{float(slow):.1f} | {float(ms):.1f} | {images} | {ratio}"
            expected.setdefault((processor, *run), []).append((float(slow) / float(ms), row))
            times.setdefault((processor, *run), []).append((ratio, float(slow), float(ms)))
    rows = re.findall(r"^\| (Intel|AMD) \| (resnet\d+), ([\w-]+) \| (\w+) \| (.*) \|$", readme, re.M)
    names = {"BN-only": "bn", "fp32": "off"}
    assert {(processor, network, names.get(trained, trained), names.get(amp, amp)): row
            for processor, network, trained, amp, row in rows} == {
                key: sorted(of_command)[len(of_command) // 2][1] for key, of_command in expected.items()}
    assert len(rows) == 12
    (ratios, plain, fast), (_, _, fast_bf16), (_, _, fast_all), (_, _, fast_all_bf16) = (
        zip(*times["AMD", "resnet14", *run], strict=True)
        for run in (("bn", "off"), ("bn", "bf16"), ("all", "off"), ("all", "bf16")))
    intel = {run: times["Intel", "resnet14", *run][0]   # (ratio, plain ms, fast ms)
             for run in (("bn", "off"), ("bn", "bf16"), ("all", "off"), ("all", "bf16"))}
    for figure in (
            f"gave ratios of {', '.join(ratios[:-1])} and {ratios[-1]}. By the medians of the five,",
            f"in bf16 is {np.median(plain) / np.median(fast_bf16):.2f} times as fast as the plain one in fp32",
            f"{np.median(fast_all) / np.median(fast):.2f} times as fast as training everything",
            f"({np.median(fast_all_bf16) / np.median(fast_bf16):.2f} in bf16)",
            f"({intel['bn', 'off'][1] / intel['bn', 'bf16'][2]:.2f}, "
            f"{intel['all', 'off'][2] / intel['bn', 'off'][2]:.2f} and "
            f"{intel['all', 'bf16'][2] / intel['bn', 'bf16'][2]:.2f})"):
        assert figure in " ".join(readme.split()), figure
    floors = {}   # how many times its floor a step of resnet14 takes, in fp32 and in bf16
    for processor in ("intel", "amd"):
        log = (folder / f"results/speed-cpu-{processor}.txt").read_text()
        for amp, value in re.findall(r"^resnet14 --train bn .* --amp (\w+)[^$]*step takes ([\d.]+) times", log, re.M):
            floors.setdefault((processor, amp), []).append(float(value))
    of = {key: f"{np.median(values):.1f}" for key, values in floors.items()}
    assert sorted(map(len, floors.values())) == [1, 1, 5, 5]
    moved, operations = train.work_of_a_step("resnet866", 128, "bf16")
    for figure in (
            f"resnet14 takes {of['intel', 'off']} times its floor in fp32 and {of['intel', 'bf16']} times in bf16, on "
            f"the AMD (median of five) {of['amd', 'off']} times and {of['amd', 'bf16']}.",
            f"moves {moved / 1e9:.1f} GB, 13 times", f"computes {operations / 1e12:.2f} TFLOP:"):
        assert figure in " ".join(readme.split()), figure
    log = (folder / "results/ratios-cpu.txt").read_text().split("$ for")[1]
    columns = re.findall(r"([\d.]+) times as fast; .* ([\d.]+) times; .* ([\d.]+) in fp32, ([\d.]+) in bf16", log)
    fp32, bf16, to_all, to_all_bf16 = (
        f"{np.median(values):.2f} ({min(values):.2f} to {max(values):.2f})" for values in np.float64(columns).T)
    assert len(columns) == log.count("plain") == 10
    assert (f"fast against plain {fp32} in fp32, {bf16} between fast in bf16 and plain in fp32; BN-only against "
            f"everything {to_all}, and {to_all_bf16} in bf16.") in " ".join(readme.split())
    log = (folder / "results/parts-cpu.txt").read_text()
    fp32, bf16 = (dict(re.findall(rf"^{amp} +(?:fast path without: )?(\S.*\S) +([\d.]+) ms$", log, re.M))
                  for amp in ("off", "bf16"))
    assert (f"in fp32 a step takes {fp32['fast path']} ms, {fp32['channels_last']} without channels_last and "
            f"{fp32['in-place ReLU']} without ReLU in place; in bf16 {bf16['fast path']} ms, {bf16['channels_last']} "
            "without channels_last.") in " ".join(readme.split())
    rest = [float(part[name]) - float(part["fast path"]) for part in (fp32, bf16)
            for name in ("fused optimizer", "no num_batches_tracked", "weights cast once") if name in part]
    rest.append(float(bf16["in-place ReLU"]) - float(bf16["fast path"]))
    assert len(rest) == 6 and np.abs(rest).max() < 1.35   # "within the noise, about a millisecond"
    assert f"take {fp32['data handling alone']} ms." in " ".join(readme.split())
    times = {}   # of each of three processes
    for *run, ms in re.findall(r"^(\S+) (off|bf16) +(keep|return|compile) +([\d.]+) ms", log, re.M):
        times.setdefault(tuple(run), []).append(float(ms))
    of = {run: np.median(values) for run, values in times.items()}
    assert (f"{of['resnet14', 'off', 'keep']} ms with it, {of['resnet14', 'off', 'return']} without (medians of "
            f"three), {of['resnet14', 'bf16', 'keep']} and {of['resnet14', 'bf16', 'return']} in bf16."
            ) in " ".join(readme.split())
    slower = [of["resnet14", amp, "compile"] / of["resnet14", amp, "keep"] for amp in ("off", "bf16")]
    assert f"{slower[0]:.1f} times slower on the CPU ({slower[1]:.1f} in bf16)" in " ".join(readme.split())
    log = (folder / "results/memory-cpu.txt").read_text()
    saved = dict(re.findall(r"^resnet866 (\w+ +\d+) images: +([\d.]+) GB saved", log, re.M))
    assert (f"{saved['bf16  128']} GB for 128 images in bf16 ({saved['off   128']} in fp32), and {saved['bf16   80']} "
            "GB for the 80 images") in " ".join(readme.split())


SHORT_RUNS = {   # a row of the README's table: a run of the log
    **{f"nothing, seed {seed}": f"seed{seed}" for seed in range(5)},
    "fp32": "fp32", "no weight decay": "no-decay", "gamma = 1 at first": "gamma-one",
    "He-uniform weights, seed 0": "he-uniform", "He-uniform weights, seed 1": "he-uniform-seed1",
    "normalised by CIFAR-10's statistics": "cifar-statistics", "no augmentation": "no-augmentation",
    "learning rate 0.05": "lr-0.05", "learning rate 0.2": "lr-0.2",
    "learning rate divided after epochs 7 and 9": "later-drops", "the plain path (see Speed), seed 0": "plain-seed0",
    **{f"the plain path, seed {seed}": f"plain-seed{seed}" for seed in range(1, 5)}}


def test_table_of_short_runs_in_the_readme_is_that_of_the_log():
    folder = pathlib.Path(__file__).parent
    log = (folder / "results" / "short-resnet14.txt").read_text()
    runs = {}
    for part in log.split("\n# ")[1:]:
        [accuracies] = re.findall(r"^ 10/10 +[\d.]+ +([\d.]+) % +([\d.]+) %", part, re.M)
        runs[part.split("\n")[0]] = accuracies
    readme = (folder / "README.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \| ([\d.]+) \| ([\d.]+) \|$", readme, re.M)
    assert [(label, *runs[SHORT_RUNS[label]]) for label, *_ in rows] == rows
    assert len(rows) == len(runs) == len(SHORT_RUNS)
    train, test = (
        [float(runs[f"plain-seed{seed}"][column]) - float(runs[f"seed{seed}"][column]) for seed in range(5)]
        for column in (0, 1))
    t = np.mean(test) / (np.std(test, ddof=1) / 5 ** 0.5)
    assert (f"is {np.mean(test):.2f} ± {np.std(test, ddof=1):.2f} points of test accuracy and {np.mean(train):.2f} ± "
            f"{np.std(train, ddof=1):.2f} of train accuracy (n=5, the seeds of the short runs above; paired t = {t:.1f},"
            ) in " ".join(readme.split())


def test_figures_of_precision_in_the_readme_are_those_of_the_log():
    folder = pathlib.Path(__file__).parent
    readme, log = (folder / "README.md").read_text(), (folder / "results" / "precision-cpu.txt").read_text()
    runs = [(f"{arch}, {epochs}", amp.replace("off", "fp32"), *re.search(
                rf"^ +{epochs}/{epochs} +[\d.]+ +([\d.]+) % +([\d.]+) %", part, re.M).groups())
            for arch, epochs, amp, part in re.findall(
                r"^\$ python train.py --arch (\w+) --bn-only --epochs (\d) --amp (\w+)([^$]*)", log, re.M)]
    assert re.findall(r"^\| (resnet\d+, \d) \| (\w+) \| ([\d.]+) \| ([\d.]+) \|$", readme, re.M) == runs
    assert len(runs) == 4
    cosines = {network: [f"{float(cosine):.2f}" for cosine in (bf16, fp16, other)] for network, bf16, fp16, other
               in re.findall(r"^(\S+) +[\d.]+ +[\d.]+ +([\d.-]+) +([\d.-]+) +([\d.-]+)$", log, re.M)}
    exact = {network: f"{float(cosine):.2f}" for network, cosine
             in re.findall(r"^(resnet\d+) +([\d.]+) +[\d.-]+ +[\d.-]+$", log, re.M)}
    deepest = cosines["resnet866"]
    for figure in (
            f"has a cosine of {cosines['resnet14'][0]} with that in fp32 for resnet14,",
            f" {cosines['resnet32'][0]} for resnet32, {cosines['resnet110'][0]} for resnet110",
            f" and {deepest[0]} for resnet866",
            f"({cosines['resnet32'][1]}, {cosines['resnet110'][1]} and {deepest[1]} in fp16; {cosines['resnet32'][2]}, "
            f"{cosines['resnet110'][2]} and {deepest[2]} between it and that of 128 other images in fp32)",
            f"in float64 of {exact['resnet110']} for resnet110 and of {exact['resnet866']} for resnet866 (64 images)",
            f"five epochs the cosine of bf16 with fp32 is {cosines['runs/resnet110-fp32.pt'][0]} for resnet110"):
        assert figure in " ".join(readme.split()), figure


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_committed_records(path):
    record = prune.read_record(path)
    assert path.stem == f"{record['arch']}-{record['train']}-s{record['seed']}"
    counts = record["parameters"]
    assert tuple(counts[part] for part in ("all", "bn", "shortcut", "output")) == COUNTS[record["arch"]]
    assert [r["epoch"] for r in record["records"]] == list(range(1, record["epochs"] + 1))
    assert [r["lr"] for r in record["records"]] == [train.learning_rate(record["lr"], epoch, record["epochs"])
                                                    for epoch in range(record["epochs"])]
    assert record["test_accuracy"] == record["records"][-1]["test_accuracy"] == record["prune"][0]["test_accuracy"]
    assert counts["trained"] == train.count_trained(record["arch"], record["train"])
    for row in record["prune"]:
        assert row["change"] == pytest.approx(row["test_accuracy"] - record["test_accuracy"])
    if record["train"] == "bn" or path.with_suffix(".pt").exists():   # prune.py works on it right after a clone
        checkpoint = train.load_checkpoint(path.with_suffix(".pt"))
        assert checkpoint["records"] == record["records"] and len(checkpoint["trained"]) == counts["trained"]
        assert all(record[name] == value for name, value in checkpoint["options"].items())
        gamma = prune.gammas(train.restore_model(checkpoint, path)).abs()
        for row in record["prune"]:
            assert row["pruned"] == pytest.approx(100 * (gamma < row["threshold"]).double().mean().item())


# -------------------------------------------------------------------------------------------------- real images

real_images = pytest.mark.skipif("CIFAR10_DIR" not in os.environ, reason="CIFAR10_DIR does not name CIFAR-10")


@real_images
@pytest.mark.parametrize("path", [p for p in RESULTS if p.with_suffix(".pt").exists()], ids=lambda path: path.stem)
def test_committed_checkpoints_have_the_recorded_accuracy(path):
    checkpoint = train.load_checkpoint(path.with_suffix(".pt"))
    model = train.restore_model(checkpoint, path).to(memory_format=torch.channels_last)
    _, (images, labels) = train.load_data("cifar10", pathlib.Path(os.environ["CIFAR10_DIR"]), 0)
    recorded = prune.read_record(path)["prune"]
    assert (recorded[0]["threshold"], recorded[2]["threshold"]) == (0, 0.01)
    for row, tolerance in ((recorded[0], 0.1), (recorded[2], 0.1), (recorded[-1], 0.3)):
        train.zero_gammas(model, row["threshold"])
        accuracy = train.evaluate(model, images, labels, checkpoint["options"]["amp"])
        assert accuracy == pytest.approx(row["test_accuracy"], abs=tolerance)


@real_images
@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_damaged_real_images_are_refused(damage, tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for path in (pathlib.Path(os.environ["CIFAR10_DIR"]) / "cifar-10-batches-py").iterdir():
        (folder / path.name).symlink_to(path.resolve())
    batch = bytearray((folder / "data_batch_3").read_bytes())
    (folder / "data_batch_3").unlink()
    batch[15_000_000] ^= 1
    if damage == "flipped":
        (folder / "data_batch_3").write_bytes(batch)
    with pytest.raises(train.Problem, match="data_batch_3: missing or MD5 differs.*delete the folder"):
        train.load_data("cifar10", tmp_path, 0)


@real_images
def test_real_images_are_learned_from(tmp_path, monkeypatch, capsys):
    """Twenty steps of resnet14 BN-only lower the loss on real images; prune and analyze run on what comes out."""
    (train_images, train_labels), test_data = train.load_data("cifar10", pathlib.Path(os.environ["CIFAR10_DIR"]), 0)
    assert train_images.shape == (50_000, 32, 32, 3) and train_labels.bincount().tolist() == [5_000] * 10
    assert len(test_data[0]) == 10_000
    for script in (train, prune):
        monkeypatch.setattr(script, "load_data", lambda *args: ((train_images[:1280], train_labels[:1280]), test_data))
    out = tmp_path / "a.pt"
    assert command(train, "--bn-only", "--epochs", 2, "--device", "cpu", "--out", out) == 0
    records = train.load_checkpoint(out)["records"]
    assert records[1]["train_loss"] < records[0]["train_loss"]
    assert command(prune, out, "--thresholds", 0, 0.1, "--device", "cpu") == 0
    assert command(analyze, out, "--activations", "--device", "cpu") == 0
    text = capsys.readouterr().out
    assert f"{records[1]['test_accuracy']:.2f} %" in text and "(accuracy" in text


# -------------------------------------------------------------------------------- minutes long: pytest -q -k slow

slow = pytest.mark.skipif("'slow' not in config.option.keyword", reason="takes minutes: pytest -q -k slow")

CHILD = """
import os, sys, time, torch
import train

data = torch.load("data.pt")
train.load_data = lambda *args: data
pause = float(sys.argv.pop(1))

def slowed(call):
    def wrapped(*args):
        time.sleep(pause)
        call(*args)
        time.sleep(pause)
    return wrapped

os.fsync, os.replace = slowed(os.fsync), slowed(os.replace)
save = train.save_checkpoint

def save_and_weigh(*args):
    save(*args)
    with open("/proc/self/statm") as statm:
        print("resident", int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE"), flush=True)

train.save_checkpoint = save_and_weigh
train.run(train.main)
"""


def start_child(pause, epochs, out):
    """A training run in a process of its own on the images in data.pt, with every fsync and rename slowed down."""
    words = [*SMALL, "--bn-only", "--epochs", epochs, "--out", out, "--resume"]
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-u", "-c", CHILD, *map(str, [pause, *words])], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@slow
def test_slow_kills_lose_at_most_an_epoch(small_data):
    """24 SIGKILLs, half of them inside a write: what is left always loads, and resumes to the same end bit for bit."""
    torch.save(small_data, "data.pt")
    assert start_child(0, 20, "whole.pt").wait() == 0
    whole = torch.load("whole.pt", weights_only=True)
    rng = np.random.RandomState(0)
    kills, inside, runs, epoch = 0, 0, 0, 0
    out = pathlib.Path("a.pt")
    while kills < 24:
        child = start_child(0.02, 20, out)
        next(line for line in child.stdout if line.startswith("  epoch"))   # now it trains
        time.sleep(rng.uniform(0, 1.5))
        while kills % 2 and child.poll() is None and not list(pathlib.Path().glob("a.*.tmp")):
            time.sleep(0.001)   # until it writes
        child.kill()
        if child.wait() == -signal.SIGKILL:
            kills += 1
            inside += bool(list(pathlib.Path().glob("a.*.tmp")))
        done = train.load_checkpoint(out)["epoch"] if out.exists() else 0
        assert done >= epoch   # nothing that was complete is lost
        epoch = done
        if epoch == 20 or kills == 24:
            assert start_child(0, 20, out).wait() == 0
            final = torch.load(out, weights_only=True)
            for name in ("trained", "momentum", "running_mean", "running_var", "rng"):
                assert torch.equal(final[name], whole[name]), name
            assert timeless(final["records"]) == timeless(whole["records"])
            out.unlink()
            runs, epoch = runs + 1, 0
    print(f"{kills} kills survived, {inside} of them inside a write, in {runs} runs")
    assert inside >= 10 and not list(pathlib.Path().glob("a.*.tmp"))


@slow
def test_slow_two_runs_that_share_out_by_mistake(small_data):
    """Their writes overlap all the time; the checkpoint, the log and the record are whole, of one or the other."""
    torch.save(small_data, "data.pt")
    children = [start_child(0.005, 20, "a.pt") for _ in range(2)]
    for child in children:
        child.communicate()
        assert child.returncode == 0
    assert train.load_checkpoint(pathlib.Path("a.pt"))["epoch"] == 20 and not list(pathlib.Path().glob("*.tmp"))
    assert len(prune.read_record(pathlib.Path("a.json"))["records"]) == 20
    assert len([json.loads(line) for line in pathlib.Path("a.jsonl").read_text().splitlines()]) == 20


@slow
def test_slow_synthetic_classes_tell_the_story(synthetic, small_data, monkeypatch, capsys):
    """A quarter of the synthetic images: BN-only is well above chance (10 %), everything is far above BN-only."""
    (train_images, train_labels), (test_images, test_labels) = synthetic
    quarter = (train_images[:12_500], train_labels[:12_500]), (test_images[:2_000], test_labels[:2_000])
    monkeypatch.setattr(train, "load_data", lambda *args: quarter)
    accuracy = {}
    for mode in ("bn", "all"):
        assert command(train, "--arch", "resnet8", "--dataset", "synthetic", "--epochs", 2, "--train", mode) == 0
        accuracy[mode] = json.loads(pathlib.Path(f"runs/resnet8-{mode}-s0.json").read_text())["test_accuracy"]
    print(accuracy)
    assert 20 < accuracy["bn"] < accuracy["all"] - 20


@slow
def test_slow_memory_is_flat_over_30_epochs(synthetic, small_data):
    """Resident memory after epoch 30 is within 16 MB of that after epoch 5."""
    torch.save(tuple((images[:1000].clone(), labels[:1000].clone()) for images, labels in synthetic), "data.pt")
    out, _ = start_child(0, 30, "a.pt").communicate()
    resident = [int(line.split()[1]) for line in out.splitlines() if line.startswith("resident")]
    print(f"resident after epoch 5: {resident[4] / 1e6:.1f} MB, after epoch 30: {resident[-1] / 1e6:.1f} MB")
    assert len(resident) == 30 and resident[-1] - resident[4] < 16e6
