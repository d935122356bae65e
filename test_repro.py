"""Tests: pytest -q (two minutes on two cores, no network), and with real SIGKILLs: pytest -q -k slow.

Set CIFAR10_DIR to the folder that holds cifar-10-batches-py to run the tests on real images, too.
"""
import itertools
import json
import math
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import analyze
import models
import prune
import train

HERE = pathlib.Path(__file__).parent
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
real_images = pytest.mark.skipif("CIFAR10_DIR" not in os.environ, reason="CIFAR10_DIR is not set")
slow = pytest.mark.skipif("'slow' not in config.option.keyword", reason="slow: pytest -q -k slow")
torch.set_num_threads(min(2, torch.get_num_threads()))   # for small networks
CPU = torch.device("cpu")
RESULTS = sorted((HERE / "results").glob("*.json"))

# The paper's table: all parameters and BatchNorm's.
COUNTS = {
    "resnet14": (175_258, 1_120), "resnet32": (466_906, 2_464), "resnet56": (855_770, 4_256),
    "resnet110": (1_730_714, 8_288), "resnet218": (3_480_602, 16_352), "resnet434": (6_980_378, 32_480),
    "resnet866": (13_979_930, 64_736), "wrn14-2": (696_618, 2_240), "wrn14-4": (2_777_674, 4_480),
    "wrn14-8": (11_093_130, 8_960), "wrn14-16": (44_337_418, 17_920), "wrn14-32": (177_279_498, 35_840)}

SYNTHETIC = train.synthetic_data(0)
SMALL = ["--arch", "resnet8", "--dataset", "synthetic", "--device", "cpu", "--batch-size", "16", "--epochs", "3"]

def batch(n=16, first=0, dtype=torch.float32):
    """Normalized training images (n, 3, 32, 32) and their labels (n,)."""
    images, labels = (part[first:first + n] for part in SYNTHETIC[0])
    return train.normalize(images, dtype), labels

@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Let the scripts see 40 training and 100 test images, in an empty folder. Returns the data."""
    data = [[part[:n] for part in split] for n, split in zip((40, 100), SYNTHETIC)]
    for script in train, prune:
        monkeypatch.setattr(script, "load_data", lambda *args: data)
    monkeypatch.chdir(tmp_path)
    return data

def command(script, *words):
    """Run the command line of a script in this process. Returns the exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, words)])
        try:
            return train.run(script.main) or 0
        except SystemExit as stop:
            return stop.code

def error_of(capsys, status, script, *words):
    """The line on stderr of a command that fails with this status. argparse prints its usage above."""
    assert command(script, *words) == status
    *usage, line = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{script.__name__}.py: error: ")
    assert not usage or status == 2 and usage[0].startswith("usage: ")
    return line

def options(*words):
    words = ["--arch", "resnet8", "--amp", "off", "--device", "cpu", *map(str, words)]
    return train.make_parser().parse_args(words)

def built(*words, dtype=torch.float32):
    return train.build(vars(options(*words))).to(dtype).train()

def prepared(*words, dtype=torch.float32):
    """(model, step, optimizer, scaler) for batches of 16 and 7."""
    model = built(*words, dtype=dtype).eval()   # as load_checkpoint returns it
    return model, *train.prepare(model, options(*words), {16, 7})

def trained_of(model):
    return train.to_vectors(train.state_tensors(model))["trained"]

def records_of(path):
    return train.load_checkpoint(path)[1]["records"]

def content_of(path):
    """What a checkpoint holds except for machines and times, for a comparison bit for bit."""
    _, state = train.load_checkpoint(path)
    records = [{**r, "seconds": 0, "images_per_second": 0} for r in state["records"]]
    vectors = {name: v.numpy().tobytes() for name, v in state.items() if isinstance(v, torch.Tensor)}
    return {**state, **vectors, "records": records, "parts": None}

finished = {}   # the files of one finished run, by path

@pytest.fixture
def checkpoint(tiny):
    """A finished run's a.pt, a.json and a.jsonl in the current folder."""
    if not finished:
        assert command(train, *SMALL, "--bn-only", "--out", "a.pt") == 0
        finished.update({path: path.read_bytes() for path in pathlib.Path().iterdir()})
    for path, content in finished.items():
        path.write_bytes(content)
    return pathlib.Path("a.pt")

# --- models

@pytest.mark.parametrize("arch", COUNTS)
def test_parameter_counts(arch):
    counts, (total, bn) = models.count_parameters(models.empty_model(arch)), COUNTS[arch]
    width = int(arch.partition("-")[2] or 1)
    shortcut, output = (16 * 32 + 32 * 64) * width ** 2, 640 * width + 10
    expected = {"all": total, "bn": bn, "shortcut": shortcut, "output": output}
    expected["conv"] = total - bn - shortcut - output
    assert {name: counts[name] for name in expected} == expected

@pytest.mark.parametrize("arch, seed, pin", [
    ("resnet14", 0, (10543.398608782, 167.217023304)), ("wrn14-2", 7, (29478.862949638, 268.550731771)),
    ("resnet866", 0, (753849.633340992, 8139.451380297))])
def test_pinned_initial_values(arch, seed, pin):
    """Sums of |w| and of w times its position, pinned with the first release."""
    model, other = models.build_model(arch, seed), models.build_model(arch, 1)
    assert models.fingerprint(model.parameters()) == pytest.approx(pin, rel=1e-9)
    assert models.fingerprint(other.parameters()) != pytest.approx(pin, rel=1e-6)

def functional_forward(model, x):
    """The network from its tensors alone: He et al.'s basic blocks in torch.nn.functional."""
    def bn(x, m):
        mean, var = m.running_mean.clone(), m.running_var.clone()
        return F.batch_norm(x, mean, var, m.weight, m.bias, m.training, 0.1, 1e-5)
    x = F.relu(bn(F.conv2d(x, model.conv.weight, padding=1), model.bn))
    for stage in model.stage1, model.stage2, model.stage3:
        for i, block in enumerate(stage):
            stride = 2 if i == 0 and stage is not model.stage1 else 1
            y = F.relu(bn(F.conv2d(x, block.conv1.weight, None, stride, 1), block.bn1))
            y = bn(F.conv2d(y, block.conv2.weight, padding=1), block.bn2)
            if stride == 2:
                x = bn(F.conv2d(x, block.shortcut[0].weight, stride=2), block.shortcut[1])
            x = F.relu(x + y)
    return F.linear(x.mean((2, 3)), model.fc.weight, model.fc.bias)

@torch.no_grad()
def functional_accuracy(model, images, labels):
    return 100 * (functional_forward(model, train.normalize(images)).argmax(1) == labels).double().mean().item()

@pytest.mark.parametrize("arch", ["resnet14", "wrn8-2"])
@pytest.mark.parametrize("training", [True, False])
def test_forward_pass_against_functional(arch, training):
    model = models.build_model(arch, 3).double().train(training)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):   # no tensor that it reads is 0 or 1
            module.bias.data.normal_()
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(model(x), functional_forward(model, x), rtol=1e-10, atol=1e-10)

@pytest.mark.parametrize("norm", models.NORMS)
def test_normalizations_against_their_formulas(norm):
    """GroupNorm: arXiv 1803.08494, switchable: 1806.10779, weight: 1602.07868. resnet14 has 15 layers."""
    model = built("--bn-only", "--arch", "resnet14", "--norm", norm, dtype=torch.float64)
    assert len(trained_of(model)) == 1_120 + 6 * 15 * (norm == "switchable")
    assert len(prune.gammas(model)) == 560 and all(p.isfinite().all() for p in model.parameters())
    _, gamma, beta = models.gammas_and_betas(model)[0]
    beta.data.normal_()
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    features, weights = model.conv(x), torch.eye(3, dtype=torch.float64)[[2, 2]]
    if norm == "switchable":
        model.bn.switch.data.normal_()
        weights = model.bn.switch.view(2, 3).softmax(1)
    if norm == "weight":
        v = model.conv.parametrizations.weight.original1
        expected = F.conv2d(x, gamma * v / v.square().sum((1, 2, 3), True).sqrt(), beta, padding=1)
    else:
        groups = {"layer": 1, "group": 8, "instance": 16}.get(norm)
        axes = [(2, 3), (1, 2, 3), (0, 2, 3)]   # of instance, layer, batch
        if groups:
            features, axes, weights = features.view(4, groups, -1), [2], torch.ones(2, 1)
        mean = sum(w * features.mean(a, keepdim=True) for w, a in zip(weights[0], axes))
        var = sum(w * features.var(a, correction=0, keepdim=True) for w, a in zip(weights[1], axes))
        out = ((features - mean) / (var + 1e-5).sqrt()).view(4, 16, 32, 32)
        expected = out * gamma.view(-1, 1, 1) + beta.view(-1, 1, 1)
    torch.testing.assert_close(model.bn(model.conv(x)), expected, rtol=1e-9, atol=1e-9)
    if norm in ("batch", "switchable"):   # the same if the running statistics are those of the batch
        model.bn.running_mean[:], model.bn.running_var[:] = features.mean(axes[2]), features.var(axes[2], correction=0)
        torch.testing.assert_close(model.eval().bn(features), expected, rtol=1e-9, atol=1e-9)

def test_other_initializations():
    """Functions of the same draws, as OpenLTH names them."""
    def first(**init):
        model = models.build_model("resnet14", 0, **init)
        return model.bn.weight, model.bn.bias, model.stage3[1].conv1.weight.flatten(1)
    u, zero, w = first()
    for init, gamma, beta in ("fixed", 0 * u + 1, 0), ("oneone", 0 * u + 1, 1), ("positivenegative", 2 * u - 1, 0):
        new_gamma, new_beta, new_w = first(bn_init=init)
        torch.testing.assert_close(new_gamma, gamma)
        assert new_beta.eq(beta).all() and torch.equal(new_w, w)
    std, weight = (2 / 576) ** 0.5, {init: first(weight_init=init)[2] for init in models.WEIGHT_INITS}
    torch.testing.assert_close(weight["binary"], std * w.sign())
    torch.testing.assert_close(weight["orthogonal"] @ weight["orthogonal"].T, torch.eye(64), rtol=0, atol=1e-5)
    uniform = weight["kaiming_uniform"].flatten() / (3 ** 0.5 * std)   # U(-1, 1)
    quantiles = torch.linspace(0, 1, 5)
    torch.testing.assert_close(uniform.quantile(quantiles), 2 * quantiles - 1, rtol=0, atol=0.03)

# --- data

def test_augmentation_is_uniform():
    order, offset, flip = train.draw_augmentation(50_000, torch.Generator().manual_seed(0))
    assert torch.equal(order.sort()[0], torch.arange(50_000))
    for draws, n in (offset[:, 0], 9), (offset[:, 1], 9), (flip, 2):
        share = draws.long().bincount() / 50_000
        assert len(share) == n and (share - 1 / n).abs().max() < 0.01   # 4 standard deviations or more

def raises(error):
    def function(*args, **kwargs):
        raise error
    return function

@pytest.mark.parametrize("name", ["data_batch_1", "../cifar-10-python.tar.gz"])
@pytest.mark.parametrize("data_dir", ["", "cifar-10-batches-py"])
def test_damaged_cifar10_offline_is_one_line(name, data_dir, tmp_path, monkeypatch, capsys):
    """--data-dir may name the folder itself instead of its parent."""
    monkeypatch.setattr("urllib.request.urlopen", raises(OSError("no route to host")))
    (folder := tmp_path / "cifar-10-batches-py").mkdir()
    (folder / name).write_bytes(b"half")
    words = "--data-dir", tmp_path / data_dir, "--out", tmp_path / "a.pt", "--device", "cpu"
    line = error_of(capsys, 1, train, *words)
    assert re.search(f"no intact CIFAR-10 in {tmp_path}, .*no route.*cifar-10-python.tar.gz there", line)

# --- what trains

MODES = [*train.NAMES, *("+".join(parts) for n in range(1, len(models.PARTS) + 1)
                         for parts in itertools.combinations(models.PARTS, n))]

@pytest.mark.parametrize("mode, norm", [
    *((mode, "batch") for mode in MODES), *(("bn", norm) for norm in models.NORMS)])
def test_exactly_the_right_parameters_change(mode, norm):
    words = "--train", mode, "--norm", norm, "--weight-decay", 0.1
    model, step, *_ = prepared(*words, dtype=torch.float64)
    initial, parts = models.build_model("resnet8", 0, norm).double(), train.NAMES.get(mode, mode.split("+"))
    for _ in range(3):   # the first step has no momentum
        step(*batch(dtype=torch.float64))
    for name, before in initial.named_parameters():
        module, _, leaf = name.rpartition(".")
        changed = getattr(model.get_submodule(module), leaf) != before
        if mode == "random":   # two in every output channel of every convolution
            assert (changed.flatten(1).sum(1) == 2).all() if changed.dim() == 4 else not changed.any()
        elif any(models.PARTS[part](initial.get_submodule(module), leaf, before) for part in parts):
            assert changed.double().mean() > 0.9, name   # with LayerNorm, a feature can be off at first
        else:
            assert not changed.any(), name

@pytest.mark.parametrize("text, spelling, count", [   # of resnet14, from the paper's table
    ("all", "all", 175_258), ("output+bn+conv+shortcut", "all", 175_258), ("bn", "bn", 1_120),
    ("not-bn", "not-bn", 174_138), ("output+conv+shortcut", "not-bn", 174_138), ("random", "random", 1_120),
    ("output+shortcut", "shortcut+output", 3_210), ("bn+conv", "conv+bn", 172_048)])
def test_canonical_spelling_and_trained_counts(text, spelling, count):
    assert options("--train", text).train == spelling
    assert len(trained_of(built("--train", text, "--arch", "resnet14"))) == count

# --- training

def test_steps_against_plain_sgd():
    """Three steps are those of v = 0.9 v + g + decay w; w = w - lr v, written out in float64."""
    model, step, *_ = prepared("--bn-only", dtype=torch.float64)
    reference = built("--bn-only", dtype=torch.float64)
    gamma_beta = [p for p in reference.parameters() if p.requires_grad]
    velocity = [torch.zeros_like(p) for p in gamma_beta]
    for i in range(3):
        images, labels = batch(16, 16 * i, torch.float64)
        logits = functional_forward(reference, images)
        expected = -logits.log_softmax(1)[range(16), labels].mean()
        loss, correct = step(images, labels)
        torch.testing.assert_close(loss, expected)
        assert correct == (logits.argmax(1) == labels).sum()
        for p, v, g in zip(gamma_beta, velocity, torch.autograd.grad(expected, gamma_beta)):
            v.mul_(0.9).add_(g + 1e-4 * p.detach())
            p.data -= 0.1 * v
    trained = [p for p in model.parameters() if p.requires_grad]
    torch.testing.assert_close(trained, gamma_beta, rtol=1e-9, atol=1e-12)

def test_learning_rate_drops_after_epochs_80_and_120():
    assert [train.learning_rate(0.1, epoch, 160) for epoch in range(160)] == [0.1] * 80 + [0.01] * 40 + [0.001] * 40

def augmented(image, offset, flip):
    """One image (32, 32, 3), padded by 4 black pixels, cropped, flipped, normalized by ImageNet's statistics."""
    (y, x), padded = offset.tolist(), np.pad(image, ((4, 4), (4, 4), (0, 0)))
    crop = padded[y:y + 32, x:x + 32]
    crop = (crop[:, ::-1] if flip else crop) / 255
    return torch.tensor((crop - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).permute(2, 0, 1).float()

def test_epochs_of_a_run(tiny, monkeypatch):
    """Every epoch: its learning rate, each image once, with its label, its crop and flip, and the mean loss."""
    steps, step = [], train.train_step
    def watch(model, optimizer, scaler, images, labels, amp):
        result = step(model, optimizer, scaler, images, labels, amp)
        steps.append((optimizer.param_groups[0]["lr"], images, labels, *result))
        return result
    monkeypatch.setattr(train, "train_step", watch)
    assert command(train, *SMALL, "--epochs", 4, "--seed", 5, "--out", "a.pt") == 0
    (all_images, all_labels), generator = tiny[0], torch.Generator().manual_seed(5)
    for epoch, record in enumerate(records_of("a.pt")):
        order, offset, flip = train.draw_augmentation(40, generator)
        rates, images, labels, losses, correct = zip(*steps[3 * epoch:3 * epoch + 3])
        expected = torch.stack([*map(augmented, all_images[order], offset, flip)])
        torch.testing.assert_close(torch.cat(images), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(torch.cat(labels), all_labels[order])
        assert [*map(len, labels)] == [16, 16, 8]
        assert [*rates, record["lr"]] == [[0.1, 0.1, 0.01, 0.001][epoch]] * 4
        assert record["train_loss"] == pytest.approx(np.average(losses, weights=[16, 16, 8]))
        assert record["train_accuracy"] == 100 * sum(correct).item() / 40
    assert epoch == 3

def parsed(monkeypatch, *words):
    """The options that main() hands to train()."""
    seen = []
    monkeypatch.setattr(train, "train", seen.append)
    assert command(train, *words) == 0
    return seen[0]

def test_defaults_are_the_papers(monkeypatch):
    args = parsed(monkeypatch, "--arch", "resnet866", "--bn-only", "--device", "cpu")
    recipe = {"arch": "resnet866", "train": "bn", "norm": "batch", "bn_init": "uniform",
              "weight_init": "kaiming_normal", "dataset": "cifar10", "seed": 0, "epochs": 160,
              "batch_size": 128, "lr": 0.1, "weight_decay": 1e-4, "amp": "off"}
    assert {name: getattr(args, name) for name in train.OPTIONS} == recipe
    assert args.out == pathlib.Path("runs/resnet866-bn-s0.pt") and args.data_dir == "data"
    args = parsed(monkeypatch, "--norm", "layer", "--bn-init", "oneone", "--weight-init", "binary", "--seed", 3)
    assert args.out == pathlib.Path("runs/resnet14-all-layer-oneone-binary-s3.pt")
    args = parsed(monkeypatch, "--data-dir=~/x", "--out=~/x.pt")   # a shell leaves such a ~ as it is
    assert (args.data_dir, args.out) == (os.path.expanduser("~/x"), pathlib.Path.home() / "x.pt")

@pytest.mark.parametrize("device, bf16, amp", [("cuda", True, "bf16"), ("cuda", False, "fp16"), ("cpu", True, "off")])
def test_amp_auto(device, bf16, amp, monkeypatch):
    monkeypatch.setattr(train, "parse_device", torch.device)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated: bf16 or emulated)
    assert parsed(monkeypatch, "--device", device).amp == amp

@pytest.mark.parametrize("amp, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16), ("off", torch.float32)])
def test_precision_of_convolutions(amp, dtype):
    (model, step, *_), seen = prepared("--bn-only", "--amp", amp), []
    model.conv.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    step(*batch())
    train.evaluate(model, *(part[:10] for part in SYNTHETIC[1]), amp)
    assert seen == [dtype, dtype] and not torch.backends.cudnn.allow_tf32

def test_first_step_that_overflows_in_fp16_changes_nothing():
    model, step, optimizer, scaler = prepared("--bn-only", "--amp", "fp16")
    scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0 ** 120})
    before = trained_of(model)
    step(*batch())
    momentum = [state["momentum_buffer"] for state in optimizer.state.values()]
    assert torch.equal(trained_of(model), before) and not any(map(torch.any, momentum))
    assert len(momentum) == 18 and scaler.get_scale() == 2.0 ** 119

# --- fast path

@pytest.mark.parametrize("mode", ["bn", "all", "random"])
@pytest.mark.parametrize("device, dtype, lr, tolerance", [
    ("cpu", torch.float64, 0.1, 1e-8), pytest.param("cuda", torch.float32, 0.001, 0.05, marks=cuda)])
def test_fast_equals_plain(mode, device, dtype, lr, tolerance):
    """Twenty steps. CUDA has no float64 in channels_last; a low rate keeps its round-off from growing."""
    results, sizes = [], [16] * 10 + [7] + [16] * 8 + [7]
    for path in ["--plain"], []:
        torch._dynamo.reset()   # it compiles a block eight times, then no more
        words = "--arch", "resnet14", "--train", mode, "--device", device, "--lr", lr, *path
        start = train.to_vectors(train.state_tensors(built(*words, dtype=dtype)))
        start["momentum"] = torch.zeros_like(start["trained"])
        model, step, optimizer, _ = prepared(*words, dtype=dtype)
        train.from_vectors(train.state_tensors(model, optimizer), start)   # on CUDA, prepare trains
        splits = (part.to(device).split(sizes) for part in batch(sum(sizes), dtype=dtype))
        losses = [step(images, labels)[0].cpu() for images, labels in zip(*splits)]
        end = train.to_vectors(train.state_tensors(model))
        results.append([torch.stack(losses), *(end[name] - start[name] for name in end)])
        layouts = {p.is_contiguous() for p in model.parameters() if p.shape[2:] == (3, 3)}
        assert layouts == {bool(path)} == {not optimizer.defaults["fused"]}
    (plain_losses, *plain_updates), (losses, *updates) = results
    torch.testing.assert_close(losses, plain_losses, rtol=0, atol=tolerance / 50)
    for update, plain in zip(updates, plain_updates):   # of what trains, and of the running statistics
        assert (update - plain).norm() < tolerance * plain.norm()

@pytest.mark.parametrize("run", ["--bn-only", "--train all", "--train random", "--bn-only --norm weight"])
def test_five_compilations_whatever_the_depth(run):
    """Identity shortcuts in three stages, projections in two."""
    def backend(graph, inputs):
        compilations.append(graph)
        assert not any(isinstance(value, torch.SymInt) for value in inputs)   # static sizes
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)
    for arch in "resnet14", "resnet32":
        torch._dynamo.reset()
        compilations = []
        model, step, *_ = prepared("--arch", arch, *run.split())
        for module in model.modules():
            if isinstance(module, models.Block):
                module.compile(dynamic=False, backend=backend)
        losses = [step(*batch())[0] for _ in range(3)]
        with torch.compiler.set_stance("force_eager"):
            step(*batch(7))
        assert len(compilations) == 5 and losses[2] < losses[0]

@pytest.mark.parametrize("mode, amp", [("bn", "bf16"), ("all", "fp16"), ("random", "off")])
def test_no_operation_of_a_step_waits_for_the_device(mode, amp):
    """A GPU would wait, and a CUDA graph can't hold it: reading a number, a size that depends on data."""
    seen = set()
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
            seen.add(function.name())
            if function.name() in ("aten::index.Tensor", "aten::index_put_"):
                assert not any(index is not None and index.dtype == torch.bool for index in args[1])
            return function(*args, **(kwargs or {}))
    _, step, *_ = prepared("--train", mode, "--amp", amp)
    order, offset, flip = train.draw_augmentation(16, torch.Generator())
    padded, labels = F.pad(SYNTHETIC[0][0][:16], (0, 0, 4, 4, 4, 4)), batch()[1]
    with Watch():
        step(train.normalize(train.augment(padded, order, offset, flip)), labels[order])
    assert {"aten::convolution", "aten::_fused_sgd_", "aten::index.Tensor", "aten::index_select"} <= seen
    assert not {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"} & seen

def test_benchmark_estimates_a_run(tiny, capsys):
    """CIFAR-10 has 3,125 batches of 16 in each of 160 epochs."""
    assert command(train, *SMALL, "--epochs", 160, "--benchmark", 2) == 0
    ms, hours = map(float, re.findall("^(.*) ms/step .* images/s, (.*) hours for 160", capsys.readouterr().out)[0])
    assert hours == pytest.approx(160 * 3125 * ms / 3_600_000, abs=0.01)

# --- checkpoints

RUNS = [*(f"--train {mode}" for mode in [*models.PARTS, "all", "random"]),
        *(f"--bn-only --norm {norm}" for norm in models.NORMS if norm != "batch"),
        "--bn-only --amp bf16", "--bn-only --amp fp16", "--bn-only --plain"]

@pytest.mark.parametrize("run", RUNS)
def test_resume_is_bit_for_bit(run, tiny, monkeypatch, capsys):
    words, steps, step = [*SMALL, *run.split()], itertools.count(1), train.train_step
    assert command(train, *words, "--out", "whole.pt") == 0
    def stops_in_epoch_2(*args):
        if next(steps) == 5:
            signal.raise_signal(signal.SIGINT if "bn" in run else signal.SIGTERM)
        return step(*args)
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", stops_in_epoch_2)
        assert error_of(capsys, 1, train, *words, "--out", "a.pt") == "train.py: error: stopped"
    assert command(train, *words, "--out", "a.pt", "--resume") == 0
    assert content_of("a.pt") == content_of("whole.pt")
    model, state = train.load_checkpoint("a.pt")
    record, log = prune.read_record(pathlib.Path("a.json")), pathlib.Path("a.jsonl").read_text()
    assert [*map(json.loads, log.splitlines())] == record["records"] == state["records"]
    part = {"plain": "plain" in run, **train.machine(CPU)}
    assert record["parts"] == state["parts"] == [{"first_epoch": 1, **part}, {"first_epoch": 2, **part}]
    assert record["parameters"]["trained"] == len(trained_of(built(*run.split())))
    save = "a.pt", "--thresholds", 0.3, "--save", "b.pt"
    if models.gammas_and_betas(model)[0][1].requires_grad:
        assert command(prune, *save) == 0 and (prune.gammas(model).abs() < 0.3).any()
        prune.zero_gammas(model, 0.3)
        pruned, saved = train.load_checkpoint("b.pt")
        assert torch.equal(prune.gammas(pruned), prune.gammas(model))
        assert saved["records"] == state["records"]
    else:
        assert "gammas are not part of this checkpoint" in error_of(capsys, 2, prune, *save)

@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_every_interrupted_write(call, tiny, monkeypatch, capsys):
    """Whichever write of three epochs fails, no file is partial, and --resume gives the same run."""
    words, original, calls = [*SMALL, "--bn-only", "--out"], getattr(os, call), []
    def fails(target, *args):
        calls.append(target)
        if len(calls) == k:
            if call == "fsync":   # half of the file is on the disk
                os.ftruncate(target, os.fstat(target).st_size // 2)
            raise OSError(28, "No space left on device")
        original(target, *args)
    for k, complete in [(0, 3), *enumerate([0, 0, 1, 1, 2, 2, 2], 1)]:
        calls.clear()
        out, record, log = (pathlib.Path(f"{k}.{suffix}") for suffix in ("pt", "json", "jsonl"))
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fails)
            assert command(train, *words, out) == (k > 0) and len(calls) == (k or 7)
        assert k == 0 or "can't be written (No space left on device)" in capsys.readouterr().err
        assert (len(records_of(out)) if out.exists() else 0) == complete
        assert not log.exists() or [*map(json.loads, log.read_text().splitlines())]
        assert not record.exists() or prune.read_record(record)
        assert command(train, *words, out, "--resume") == 0
        assert content_of(out) == content_of("0.pt")

def test_bn_only_resnet866_checkpoint_is_small(tiny):
    args = options("--arch", "resnet866", "--bn-only")
    args.out = out = pathlib.Path("a.pt")
    _, state = train.start(args)
    state["momentum"].normal_()
    record = dict.fromkeys(train.METRICS, 1 / 3)
    state["records"] = [{**record, "epoch": epoch + 1} for epoch in range(160)]
    train.save_checkpoint(out, state)
    _, loaded = train.load_checkpoint(out)
    assert out.stat().st_size < 1_000_000 and torch.equal(loaded["momentum"], state["momentum"])

def test_a_record_without_its_checkpoint_is_kept(checkpoint, capsys):
    checkpoint.unlink()
    assert "a.json exists" in error_of(capsys, 2, train, *SMALL, "--bn-only", "--out", "a.pt", "--resume")

def test_load_checkpoint_in_a_notebook(checkpoint, tiny):
    (model, state), (other, _) = map(train.load_checkpoint, (checkpoint, str(checkpoint)))
    x, accuracy = train.normalize(tiny[1][0]), functional_accuracy(model, *tiny[1])
    assert torch.equal(model(x), model(x)) and torch.equal(model(x), other(x))
    assert state["records"][2]["test_accuracy"] == pytest.approx(accuracy)

def test_commit_only_if_git_tracks_train_py(tmp_path, monkeypatch):
    git = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b"]
    monkeypatch.setattr(train, "__file__", str(tmp_path / "train.py"))
    (tmp_path / "train.py").touch()
    for words in ["init", "-q"], ["add", "train.py"]:
        for line in words, ["commit", "-q", "--allow-empty", "-m", "x"], ["rev-parse", "HEAD"]:
            head = subprocess.check_output([*git, *line], text=True).strip()
        assert train.machine(CPU)["commit"] == (head if words[0] == "add" else None)

class Code:
    """A pickle that would create a folder."""
    def __reduce__(self):
        return os.mkdir, ("code-ran",)

@pytest.mark.parametrize("damage, says", [
    (lambda v, s: v.pop("rng"), "rng"), (lambda v, s: v.update(rng=v["rng"][:7]), "RNG state"),
    (lambda v, s: v.update(trained=v["trained"] * math.nan), "trained is not 672 finite"),
    (lambda v, s: v.update(momentum=v["momentum"].double()), "momentum is not 672"),
    (lambda v, s: v.update(running_var=-v["running_var"]), "negative"), (lambda v, s: v.update(x=Code()), ""),
    (lambda v, s: s.update(version=1), "format 2"), (lambda v, s: s["records"].pop(0), "epochs are missing"),
    (lambda v, s: s["records"][0].update(lr=math.nan), "impossible"),
    (lambda v, s: s["options"].update(arch="wrn8-900"), "it is not of wrn8-900"),   # 300 GB
    (lambda v, s: s["options"].update(train="all"), "trained is not 78042"),
    (lambda v, s: s["options"].update(seed=1), "its seed draws other weights"),
    (lambda v, s: s["options"].update(epochs="3"), "wrong values"),
    (lambda v, s: s["options"].update(x=1), "unrecognized")])
def test_damaged_and_hostile_checkpoints(damage, says, checkpoint, capsys):
    vectors = torch.load(checkpoint, weights_only=True)
    state = json.loads(vectors.pop("json"))
    damage(vectors, state)
    torch.save({**vectors, "json": json.dumps(state)}, checkpoint)
    content = checkpoint.read_bytes()
    with pytest.raises(train.UserError, match=f"^a.pt is not a valid checkpoint .*{says}"):
        train.load_checkpoint("a.pt")
    for script, *words in (prune, "a.pt"), (train, *SMALL, "--bn-only", "--out", "a.pt", "--resume"):
        assert "a.pt is not a valid checkpoint" in error_of(capsys, 1, script, *words)
    assert checkpoint.read_bytes() == content and not pathlib.Path("code-ran").exists()

def test_cuts_and_flipped_bits_are_refused(checkpoint):
    """Anywhere in the file, and in the zip directory at its end."""
    content, rng = checkpoint.read_bytes(), np.random.RandomState(0)
    pathlib.Path("b.pt").write_bytes(content)
    for i in range(600):
        position = rng.randint(i % 2 * (len(content) - 3000), len(content))
        bit = bytes([content[position] ^ 1 << rng.randint(8)])
        damaged = content[:position] + (bit + content[position + 1:] if i % 3 else b"")
        checkpoint.write_bytes(damaged)
        try:
            train.load_checkpoint(checkpoint)   # a bit of the directory can be without meaning
            assert content_of(checkpoint) == content_of("b.pt")
        except train.UserError as error:
            assert re.match(r"a\.pt is not a valid checkpoint", str(error)) and str(error).isprintable()

# --- prune

def known_gammas(threshold=0.0):
    """resnet8 whose 336 gammas are -0.5, 0.0625, 0.005 and 0 in turn, or 0 if below the threshold."""
    model = models.build_model("resnet8", 0).eval()
    values = [g if abs(g) >= threshold else 0.0 for g in (-0.5, 0.0625, 0.005, 0.0)]
    for _, gamma, beta in models.gammas_and_betas(model):
        gamma.data = torch.tensor(values).repeat(len(gamma) // 4)
        beta.data = torch.tensor([3, -0.25, -0.25, -0.25]).repeat(len(gamma) // 4)
    return model

def test_prune_table_of_known_gammas():
    test_data, model, expected = [part[:200] for part in SYNTHETIC[1]], known_gammas(), []
    rows = prune.prune_table(model, *test_data, "off", [0.5, 0.0, 0.0625, 0.7, 1.0])
    unpruned = functional_accuracy(known_gammas(), *test_data)
    # 0.0625 is not below 0.0625, and 0 is below every threshold but 0.
    for threshold, share in (0.0, 0), (0.0625, 50), (0.5, 75), (0.7, 100), (1.0, 100):
        accuracy = functional_accuracy(known_gammas(threshold), *test_data)
        expected.append([threshold, share, accuracy, accuracy - unpruned])
    columns = "threshold", "pruned", "test_accuracy", "change"
    assert np.allclose([[row[name] for name in columns] for row in rows], expected)
    assert len({row["test_accuracy"] for row in rows}) > 1
    for name, tensor in known_gammas(1).state_dict().items():   # beta stays
        assert torch.equal(model.state_dict()[name], tensor), name

def test_prune_adds_its_table_to_the_record_once(checkpoint, capsys):
    path = pathlib.Path("a.json")
    plain = json.loads(path.read_text())
    assert command(prune, "a.pt", "--thresholds", 0.3) == 0
    assert json.loads(path.read_text()) == plain
    assert command(prune, "a.pt") == 0
    table = json.loads(path.read_text())["prune"]
    assert [row["threshold"] for row in table] == [0, 0.001, 0.01, 0.02, 0.05, 0.1, 0.2]
    printed = [line.split()[0:4:3] for line in capsys.readouterr().out.splitlines()[-7:]]
    assert printed == [[f"{row['threshold']:g}", f"{row['test_accuracy']:.2f}"] for row in table]
    old, other = [{**row, "change": 1.5} for row in table], [{**plain["records"][0], "train_loss": 3.0}]
    for kept in {**plain, "prune": old}, {**plain, "records": other + plain["records"][1:]}, []:
        path.write_text(json.dumps(kept))
        assert command(prune, "a.pt") == 0 and path.read_text() == json.dumps(kept)

# --- analyze

def write_run(name, accuracy, **changes):
    """Write the record of a run of the paper's recipe, with this accuracy in its last epoch."""
    args = vars(options("--arch", "resnet14", "--bn-only"))
    record = {**{option: args[option] for option in train.OPTIONS}, **changes}
    epochs = [{**dict.fromkeys(train.METRICS, 1.0), "epoch": i + 1, "seconds": 45.0} for i in range(160)]
    epochs[-1]["test_accuracy"] = accuracy
    part = {"first_epoch": 1, "commit": None, "torch": "2.13.0", "hardware": "Abacus"}
    record = {"parts": [part], "records": epochs, "test_accuracy": accuracy, **record}
    pathlib.Path(name).write_text(json.dumps(record))

def tables_of(text):
    """{title: {first cell: {column: cell}}} of Markdown."""
    tables = {}
    for section in text.split("\n## ")[1:]:
        title, _, *lines = section.strip().splitlines()
        assert len({*map(len, lines)}) == 1   # aligned
        cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
        tables[title] = {row[0]: dict(zip(cells[0], row)) for row in cells[2:]}
    return tables

def test_tables_of_known_records(tiny, capsys):
    relus = [{"relu": kind, "disabled": 25.0} for kind in analyze.RELUS]
    pruned = [{"threshold": t, "pruned": 100 * t, "test_accuracy": 40.0, "change": -2 * t} for t in prune.THRESHOLDS]
    write_run("a.json", 40.0, prune=pruned, activations=relus)
    write_run("b.json", 43.0, seed=1, prune=[{**row, "change": 0.0} for row in pruned])
    write_run("c.json", 50.0, arch="wrn14-2", train="bn+shortcut")
    write_run("d.json", 60.0, norm="layer", bn_init="oneone")
    for i, changes in enumerate([   # these are left out
            {"seed": 0}, {"lr": 0.2}, {"activations": relus[:1]}, {"prune": pruned[1:]},
            {"test_accuracy": 99.99}, {"records": []}, {"parts": [{}]}]):
        write_run(f"z{i}.json", 99.0, **{"seed": 2, **changes})
    pathlib.Path("z7.json").write_text('{"name": "package"}')
    assert command(analyze, "--results", ".") == 0
    tables = tables_of(capsys.readouterr().out)
    assert tables["Depth"]["resnet14"]["bn"] == f"41.50 ± {np.std([40, 43], ddof=1):.2f} (n=2)"
    assert [*tables["Width"]["wrn14-8"].values()] == [   # without the column "all"
        "wrn14-8", "11,093,130", "8,960", "-", "64.4", "64.86", "94.7", "94.3"]
    trains, runs = tables["What trains"], tables["Runs: python train.py --arch ... --train ..."]
    assert trains["bn+shortcut"]["wrn14-2"] == "50.00 (n=1)"
    assert trains["bn, layer, oneone"]["resnet14"] == "60.00 (n=1)"
    assert tables["Disabled features (%), by their ReLU"]["resnet14 bn"]["all"] == "25.00 (n=1)"
    [pruning] = [rows for title, rows in tables.items() if "set to zero" in title]
    assert pruning["resnet14 bn (n=2)"]["< 0.2"] == "-0.20 (20.0)"
    row = ["0", "off", "50.00", "2.00", "1", "Abacus", "2.13.0", "not in git"]
    assert [*runs["wrn14-2 bn+shortcut"].values()][1:] == row
    assert [row["reason"][:20] for row in tables["Left out"].values()] == [
        "another run of the s", "not the paper's reci", *6 * ["not the record of a "]]

def test_firing_of_relus():
    """Against the blocks of resnet8 called one by one, on batches of different sizes."""
    (images, labels), model = (part[:200] for part in SYNTHETIC[1]), known_gammas()
    table = {row["relu"]: row for row in analyze.relu_table(model, images, labels, "off")}
    with torch.no_grad():
        x = model.bn(model.conv(train.normalize(images))).relu()
        fires = {"stem": [x], "inside a block": [], "after the addition": []}
        for block in model.stage1[0], model.stage2[0], model.stage3[0]:
            fires["inside a block"].append(block.bn1(block.conv1(x)))
            fires["after the addition"].append(x := block(x))
    fires["all"] = sum(fires.values(), [])
    for kind in analyze.RELUS:
        share = torch.cat([(features > 0).double().mean((0, 2, 3)) for features in fires[kind]])
        expected = len(share), 100 * share.mean().item(), 100 * (share < 0.01).double().mean().item()
        row = [table[kind][name] for name in ("features", "fires", "disabled")]
        assert row == pytest.approx(expected, abs=1e-3) and 0 < row[2] < 100

def test_one_network(checkpoint, capsys):
    values = torch.tensor([-0.02, 0.0, 0.02, 0.03, 1.0, -1.0, 1.03, -7.0, 0.0, 0.0])
    analyze.print_histogram("x", values.split(4))
    lines = capsys.readouterr().out.splitlines()
    assert lines[24].split() == ["+0.00", "50.00", "%", 50 * "#"] and lines[45] == "beyond 20.00 %"
    assert command(analyze, "a.pt", "--activations") == 0
    rows = json.loads(pathlib.Path("a.json").read_text())["activations"]
    assert [row["features"] for row in rows] == [16 + 2 * 112, 112, 112]

def test_results_readme_is_what_analyze_prints(capsys):
    assert command(analyze) == 0
    assert capsys.readouterr().out.encode() == (HERE / "results/README.md").read_bytes()

def test_figures_show_the_records(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    figures = analyze.draw(analyze.read_results(HERE / "results")[0], tmp_path)
    lines = {(name, line.get_gid()): line.get_xydata() for name, figure in figures.items()
             for line in figure.axes[0].lines}
    runs = [json.loads(path.read_text()) for path in RESULTS if path.stem.startswith("resnet14-bn-s")]
    [bars] = [c for c in figures["accuracy"].axes[0].containers if c.get_label() == "only BatchNorm"]
    last = [run["test_accuracy"] for run in runs]
    ends = np.mean(last) + np.std(last, ddof=1) * np.array([-1, 1])
    assert np.allclose(bars.lines[2][0].get_segments()[0], np.stack([[1120, 1120], ends], 1))
    assert np.allclose(lines["accuracy", "bn, paper"][[0, 6]], [[1120, 48.1], [64_736, (82 + 83.9) / 2]])
    curve = np.mean([[r["test_accuracy"] for r in run["records"]] for run in runs], 0)
    assert np.allclose(lines["epochs", "resnet14 bn"], np.stack([np.arange(1, 161), curve], 1))
    pruned = lines["pruning", "resnet14 bn"][:, 0]
    assert np.allclose(pruned, np.mean([[row["pruned"] for row in run["prune"]] for run in runs], 0))
    bars = {patch.get_gid(): patch.get_data().values for patch in figures["gamma"].axes[0].patches}
    for gid in "resnet14 bn", "resnet14 all":   # the shares below 0.05, 0.1, 0.2
        assert np.allclose(np.cumsum(bars[gid])[[0, 1, 3]], lines["pruning", gid][4:, 0])
    monkeypatch.setattr(analyze, "find_spec", lambda name: None)
    assert "pip install matplotlib" in error_of(capsys, 2, analyze, "--plot", tmp_path)

# --- errors

@pytest.mark.parametrize("script, words, status, says", [(train, *row) for row in [
    ("--arch resnet15", 2, "argument --arch: resnet15: .* 6n . 2, such as 14"),
    ("--arch resnet2", 2, "such as 8"), ("--arch vgg16", 2, "resnet866 or wrn14-32"),
    ("--train bn+output", 2, "not allowed with"), ("--train all", 2, "not allowed with"),
    ("--epochs 0", 2, "argument --epochs: 0: not in 1 .. 1000000"), ("--epochs many", 2, "--epochs"),
    ("--lr nan", 2, "--lr: nan"), ("--seed -1", 2, "--seed: -1: not in 0 .. 4294967295"),
    ("--out x.ckpt", 2, "--out x.ckpt: .* ends in .pt"), ("--amp fp8", 2, "--amp"),
    ("--device cuda:99", 2, "argument --device: cuda:99: "), ("--device tpu", 2, "argument --device: tpu: "),
    ("--out a.pt/x.pt", 1, "File exists: 'a.pt'"), ("", 2, "a.pt exists: add --resume"),
    ("--batch-size 9 --lr 1e30 --out b.pt", 1, "diverged: .* in epoch 1, .* --lr"),
    ("--resume --epochs 8", 2, "a.pt is a run with epochs 3, not 8"), ("--resume --seed 1", 2, "seed 0, not 1"),
]] + [(prune, *row) for row in [
    ("", 2, "x.pt"), ("no.pt", 1, "no.pt"), ("a.pt --thresholds -1", 2, "--thresholds: -1"),
    ("a.pt --save b.pt", 2, "--save takes one"), ("a.pt a.pt --thresholds 0 --save b.pt", 2, "--save takes one"),
    ("a.pt --thresholds 0 --save a.pt", 2, "a new file"),
    ("a.pt --thresholds 0 --save no/b.pt", 1, "no/b.pt can't be written"),
]])
def test_errors(script, words, status, says, checkpoint, capsys):
    words = [*[*SMALL, "--bn-only", "--out", "a.pt"] * (script is train), *words.split()]
    assert re.search(says, error_of(capsys, status, script, *words))
    assert {path: path.read_bytes() for path in pathlib.Path().iterdir()} == finished

@pytest.mark.parametrize("text", ["everything", "bn+bn", "", "all+bn", "BN"])
def test_unknown_or_doubled_part(text, capsys):
    line = error_of(capsys, 2, train, "--train", text)
    assert f"{text}: not all, not-bn, random, or some of {', '.join(models.PARTS)} joined by +" in line

def test_divergence_keeps_the_older_checkpoint(tiny, capsys, monkeypatch):
    losses = iter([1.0] * 4 + [math.nan] + [1.0] * 4)   # the fifth step is in epoch 2
    monkeypatch.setattr(train, "train_step", lambda *args: (torch.tensor(next(losses)), torch.tensor(1)))
    line = error_of(capsys, 1, train, *SMALL, "--out", "a.pt")
    assert "training diverged" in line and "in epoch 2, which is not saved" in line
    assert len(records_of("a.pt")) == 1

@pytest.mark.parametrize("error, says", [
    (torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB."), "CUDA out of memory"),
    (MemoryError(), "MemoryError"), (RuntimeError("[enforce fail] can't allocate memory: 9 bytes"), "enforce"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), "CUBLAS")])
def test_out_of_memory_is_one_line(error, says, tiny, capsys, monkeypatch):
    monkeypatch.setattr(train, "start", raises(error))
    line = error_of(capsys, 1, train, *SMALL)
    assert says in line and line.endswith("; try a smaller batch or network")

# --- command line and output

def test_output_in_a_file_is_complete_by_the_line(tiny, monkeypatch):
    """Without PYTHONUNBUFFERED, and if its encoding lacks a character of the checkpoint's name."""
    seen, step, log = [], train.train_step, pathlib.Path("log.txt")
    def reads(*args):
        seen.append(log.read_text().splitlines()[-1].split()[0])
        return step(*args)
    monkeypatch.setattr(train, "train_step", reads)
    with log.open("w", encoding="ascii") as stdout, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        assert command(train, *SMALL, "--out", "é.pt") == 0
    assert seen[::3] == ["epoch", "1/3", "2/3"]
    assert "?.pt" in log.read_text() and len(records_of("é.pt")) == 3

def child(data, patch, *words, launcher=()):
    """Start train.py on these data in a process of its own, after the lines of `patch`."""
    torch.save(data, "data.pt")
    lines = ["import os, sys, torch, train", "data = torch.load('data.pt')",
             "train.load_data = lambda *args: data", *patch, "train.run(train.main)"]
    pathlib.Path("child.py").write_text("\n".join(lines))
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, *launcher, "child.py", *SMALL, *map(str, words)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(words, env=environment, text=True, **pipes)

def test_closed_output_does_not_end_training(tiny):
    """As in `train.py | head -n 1`."""
    wait = "train.evaluate = lambda *args, f=train.evaluate: (sys.stdin.readline(), f(*args))[1]"
    process = child(tiny, [wait], "--out", "a.pt")
    assert "78,042 of 78,042 parameters" in process.stdout.readline()
    process.stdout.close()
    process.stdin.close()   # only now its first epoch ends
    assert process.stderr.read() == "" and process.wait() == 0
    record, log = prune.read_record(pathlib.Path("a.json")), pathlib.Path("a.jsonl").read_text()
    assert len(records_of("a.pt")) == len(record["records"]) == log.count("\n") == 3

def test_printed_commands_run_in_another_folder(tiny, capsys):
    assert command(train, *SMALL, "--data-dir", "my data", "--out", "it's a.pt") == 0
    lines = re.findall("^next: (.*)$", capsys.readouterr().out, re.M)
    for_prune, for_analyze = map(shlex.split, lines)
    assert for_prune == [sys.executable, str(HERE / "prune.py"), "it's a.pt", "--data-dir", "my data"]
    assert for_analyze == [sys.executable, str(HERE / "analyze.py"), "it's a.pt"]
    output = subprocess.check_output([*for_prune, "--thresholds", "0"], text=True)
    assert "it's a.pt: resnet8, --train all, --norm batch, epoch 3 of 3" in output

def test_torchrun_trains_one_seed_per_process(tiny, monkeypatch, capsys):
    launcher = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"
    out, err = child(tiny, [], "--bn-only", "--seed", 3, launcher=launcher).communicate()
    assert out.count("672 of 78,042 parameters") == 1, err   # one process prints
    for seed in 3, 4:
        _, state = train.load_checkpoint(f"runs/resnet8-bn-s{seed}.pt")
        assert state["options"]["seed"] == seed and len(state["records"]) == 3
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "not for torchrun" in error_of(capsys, 2, train, *SMALL, "--out", "a.pt")

# --- results

@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_committed_records_and_checkpoints(path, monkeypatch):
    record = prune.read_record(path)
    n, counts, epochs = record["epochs"], record["parameters"], record["records"]
    words = [f"--{name.replace('_', '-')}={record[name]}" for name in train.OPTIONS]
    assert path.stem == parsed(monkeypatch, "--device=cpu", *words).out.stem
    assert counts.pop("trained") == len(trained_of(built(*words))) and "bn" in counts
    assert counts.items() <= models.count_parameters(models.empty_model(record["arch"], record["norm"])).items()
    rates = [record["lr"] / (1 if epoch < n / 2 else 10 if epoch < 3 * n / 4 else 100) for epoch in range(n)]
    assert [(r["epoch"], r["lr"]) for r in epochs] == [*enumerate(rates, 1)]
    assert record["prune"][0]["test_accuracy"] == pytest.approx(record["test_accuracy"], abs=0.2)   # GPU, then CPU
    if record["train"] == "bn" or path.with_suffix(".pt").exists():   # prune.py works after a clone
        model, state = train.load_checkpoint(path.with_suffix(".pt"))
        assert {**record, **state["options"]} == record and state["records"] == epochs
        gamma = prune.gammas(model).abs()
        shares = [100 * (gamma < t).double().mean().item() for t in prune.THRESHOLDS]
        assert [row["pruned"] for row in record["prune"]] == pytest.approx(shares)

@real_images
@pytest.mark.parametrize("path", sorted((HERE / "results").glob("resnet[13]?-*.pt")), ids=lambda path: path.stem)
def test_committed_checkpoints_have_the_recorded_accuracy(path):   # deeper ones would take minutes
    model, state = train.load_checkpoint(path)
    _, test_data = train.load_data("cifar10", os.environ["CIFAR10_DIR"], 0)
    recorded = prune.read_record(path.with_suffix(".json"))["prune"][2]
    prune.zero_gammas(model, recorded["threshold"])   # 0.01
    accuracy = train.evaluate(model, *test_data, state["options"]["amp"])
    assert accuracy == pytest.approx(recorded["test_accuracy"], abs=0.2)

# --- slow

@slow
@pytest.mark.parametrize("writes, complete", [(2, 1), (3, 1), (4, 2)])
def test_slow_kills_lose_at_most_an_epoch(writes, complete, tiny):
    """SIGKILL before the log of epoch 2, its checkpoint, or the log of epoch 3 is put in place."""
    kill = [f"replace, left = os.replace, {writes} * [1]",
            "os.replace = lambda *args: replace(*args) if left and left.pop() else os.kill(os.getpid(), 9)"]
    assert child(tiny, [], "--bn-only", "--out", "whole.pt").wait() == 0
    assert child(tiny, kill, "--bn-only", "--out", "a.pt").wait() == -signal.SIGKILL
    assert len(records_of("a.pt")) == complete
    assert child(tiny, [], "--bn-only", "--out", "a.pt", "--resume").wait() == 0
    assert content_of("a.pt") == content_of("whole.pt")
