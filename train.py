"""Train a CIFAR-10 ResNet, or nothing but its BatchNorm, with the recipe of arXiv 2003.00152.

    python train.py --arch resnet866 --bn-only              # the paper's headline experiment
    python train.py --arch resnet14 --bn-only --resume      # go on with a run that was stopped
    python train.py --arch resnet8 --bn-only --dataset synthetic --epochs 2     # no download, no GPU, a minute

After every epoch it writes, for --out runs/x.pt: the checkpoint runs/x.pt and the log runs/x.jsonl (one JSON record
per epoch); at the end also the record of the whole run, runs/x.json, from which analyze.py makes its tables.
"""
import argparse
import contextlib
import ctypes
import functools
import gc
import io
import json
import math
import os
import pathlib
import pickletools
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
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from models import (Block, batchnorms, build_model, count_features, empty_model, fingerprint, parameter_counts,
                    parse_arch, part_of, same_fingerprint)


class Problem(Exception):
    """Something that the user can mend: the one line that the user sees, and the exit status (2 for wrong usage)."""

    def __init__(self, text, status=1):   # the text may quote a stranger's file: no line breaks, no terminal codes
        super().__init__("".join(c if c.isprintable() else "?" for c in text)[:1000])
        self.status = status


# --------------------------------------------------------------------------------------------------------- data

# Normalisation of OpenLTH, the authors' code: the channel statistics of ImageNet.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# The same for a row of 32 pixels as (x / 255 - mean) / std = factor * x + summand.
FACTOR, SUMMAND = 32 * tuple(1 / (255 * std) for std in STD), 32 * tuple(-mean / std for mean, std in zip(MEAN, STD))


def load_data(dataset, data_dir, seed):
    """The data set as ((train images, train labels), (test images, test labels)), on the CPU.

    Images are uint8 of shape (N, 32, 32, 3), labels int64 of shape (N,); 50,000 train, 10,000 test. `seed` decides
    what the synthetic images look like. Raises Problem where CIFAR-10 is damaged or can't be had.
    """
    return synthetic_data(seed) if dataset == "synthetic" else cifar10_data(data_dir)


def cifar10_data(data_dir):
    """CIFAR-10 from `data_dir`, downloaded by torchvision if there is none. Damaged files are never trained on."""
    import_torchvision()
    from torchvision.datasets import CIFAR10 as cifar10
    from torchvision.datasets.utils import check_integrity
    folder, archive = data_dir / cifar10.base_folder, data_dir / cifar10.filename
    if folder.exists():
        files = [*cifar10.train_list, *cifar10.test_list, [cifar10.meta["filename"], cifar10.meta["md5"]]]
        damaged = [name for name, md5 in files if not check_integrity(str(folder / name), md5)]
        if damaged:
            raise Problem(f"{folder} is incomplete or damaged ({', '.join(damaged)}: missing or MD5 differs): "
                          "delete the folder, then run again to download CIFAR-10 anew")
    elif archive.exists() and not check_integrity(str(archive), cifar10.tgz_md5):
        raise Problem(f"{archive} is only half there or damaged (MD5 differs): delete it, then run again")
    elif not archive.exists():
        print(f"no CIFAR-10 in {data_dir} yet: downloading it, 170 MB (no network? --dataset synthetic needs none)",
              flush=True)
    try:
        train, test = (cifar10(data_dir, train=part, download=not folder.exists()) for part in (True, False))
    except (OSError, RuntimeError) as error:
        raise Problem(f"no CIFAR-10 in {data_dir} and no download ({error}): put {cifar10.url} into {data_dir}, "
                      "or try --dataset synthetic") from error
    return tuple((torch.from_numpy(part.data), torch.tensor(part.targets)) for part in (train, test))


def import_torchvision():
    """Import torchvision, also one that was built for CUDA beside a torch that was not, as pip may install them.

    Its compiled operators can't load there, and the import fails on the first that is missing. Reading CIFAR-10 needs
    none of them, so each is declared, without a body, until the import succeeds.
    """
    try:
        import torchvision   # noqa: F401
    except RuntimeError as error:
        missing = re.search(r"operator (torchvision::\w+) does not exist", str(error))
        if not missing:
            raise Problem(f"torchvision does not work with torch {torch.__version__} ({error}): install a pair that "
                          "belongs together, as in requirements.txt") from error
        torch.library.define(missing[1], "() -> ()")
        import_torchvision()
    except ImportError as error:
        raise Problem(f"torchvision can't be imported ({error}): pip install -r requirements.txt, or use --dataset "
                      "synthetic") from error


def synthetic_data(seed):
    """Ten classes in the shape of CIFAR-10, deterministic in the seed, for machines without CIFAR-10.

    A class is a pair of smooth random colour patterns. An image shows one of its class's two, shifted by up to eight
    pixels, under a pattern that any class may show and under pixel noise.
    """
    rng = np.random.RandomState([seed, 1])   # not the stream of the initial values

    def patterns(count):   # (count, 32, 32, 3): random 4x4 colours, enlarged smoothly
        small = torch.from_numpy(rng.standard_normal((count, 3, 4, 4)))
        return F.interpolate(small, size=32, mode="bicubic").permute(0, 2, 3, 1).float().numpy()

    class_patterns, distractors = patterns(20), patterns(100)

    def images_of(labels):
        n, pixel = len(labels), np.arange(32)

        def shown(pattern, which):   # each pattern shifted, with wrap-around
            dy, dx = rng.randint(-8, 9, (2, n, 1))
            return pattern[which[:, None, None], ((pixel + dy) % 32)[:, :, None], ((pixel + dx) % 32)[:, None, :]]

        images = shown(class_patterns, 2 * labels + rng.randint(0, 2, n)) * 50
        images += shown(distractors, rng.randint(0, 100, n)) * 25
        images += rng.randint(0, 128, images.shape, dtype=np.uint8)
        return torch.from_numpy((images + 64).clip(0, 255).astype(np.uint8))

    def split(size):   # a thousand images at a time, to stay in a processor's cache
        labels = rng.randint(0, 10, size)
        return torch.cat([images_of(part) for part in labels.reshape(-1, 1000)]), torch.from_numpy(labels)

    return split(50_000), split(10_000)


CHANCE = ("order", "offset", "flip")   # what is random in an epoch


def draw_augmentation(n, generator):
    """One epoch's CHANCE: the order of the n images, a crop offset in 0 .. 8 (y, x) and a flip for each batch slot.

    Drawn on the CPU whatever the device, so that the same seed gives the same batches everywhere.
    """
    order = torch.randperm(n, generator=generator)
    offset = torch.randint(0, 9, (n, 2), generator=generator)
    flip = torch.randint(0, 2, (n,), generator=generator).bool()
    return order, offset, flip


def augment(padded, index, offset, flip):
    """Crop 32x32 and flip each image in its own way, the whole batch in one gather of pixels.

    padded: (N, 40, 40, 3), the images with a border of 4 black pixels; index, flip: (B,); offset: (B, 2), y and x.
    Returns (B, 32, 32, 3).
    """
    pixel = torch.arange(32, device=padded.device)
    rows = offset[:, :1] + pixel                                                # (B, 32)
    cols = offset[:, 1:] + torch.where(flip[:, None], 31 - pixel, pixel)        # (B, 32)
    pixels = ((index[:, None] * 40 + rows) * 40)[:, :, None] + cols[:, None]    # (B, 32, 32), counted over all images
    return padded.view(-1, 3).index_select(0, pixels.flatten()).view(*pixels.shape, 3)


def normalize(images, dtype=torch.float32):
    """(B, 32, 32, 3) uint8 -> (B, 3, 32, 32) of `dtype`, normalised by MEAN and STD, in channels_last order."""
    factor, summand = (on_device(values, dtype, images.device) for values in (FACTOR, SUMMAND))
    rows = images.flatten(2).to(dtype)              # (B, 32, 96): by the row, vectors are full whatever the channels
    return torch.addcmul(summand, rows, factor).view(images.shape).permute(0, 3, 1, 2)


@functools.cache
def on_device(values, dtype, device):
    """A constant tensor, copied to its device once rather than in every step."""
    return torch.tensor(values, dtype=dtype, device=device)


# -------------------------------------------------------------------------------------------------- what trains

MODES = {   # --train: which parts of the network (see part_of) are trained
    "all": {"conv", "shortcut", "bn", "output"},
    "bn": {"bn"},
    "not-bn": {"conv", "shortcut", "output"},
    "output": {"output"},
    "shortcut": {"shortcut"},
    "bn+output": {"bn", "output"},
    "bn+shortcut": {"bn", "shortcut"},
    "random": set(),   # two weights per output channel of every convolution, see TwoWeightsPerChannel
}


class TwoWeightsPerChannel(nn.Module):
    """Parametrization of a convolution: two randomly chosen weights of each output channel train, the rest is frozen.

    As many scalars as BatchNorm has (gamma and beta), and a weight that is not chosen can't be moved by momentum or
    weight decay, because the optimizer never sees it.
    """

    def __init__(self, weight, rng):
        super().__init__()
        c_out, fan_in = weight.shape[0], weight[0].numel()
        first = rng.randint(0, fan_in, c_out)
        second = rng.randint(0, fan_in - 1, c_out)
        second += second >= first                       # uniform over the other fan_in - 1
        chosen = torch.from_numpy(np.stack([first, second], 1) + fan_in * np.arange(c_out)[:, None]).flatten()
        self.register_buffer("chosen", chosen)          # (2 c_out,) positions in the flattened weight
        self.values = nn.Parameter(weight.detach().flatten()[chosen])

    def forward(self, weight):
        return weight.flatten().scatter(0, self.chosen, self.values.to(weight.dtype)).view_as(weight)


def freeze(model, mode, seed):
    """Let only the parameters of this --train mode require gradients. Returns those that train, in order."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in MODES[mode])
    if mode == "random":
        rng = np.random.RandomState([seed, 2])          # its own stream: the features stay those of the seed
        convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
        for conv in convs:
            parametrize.register_parametrization(conv, "weight", TwoWeightsPerChannel(conv.weight, rng))
            conv.__class__ = type(convs[0])   # one for all, not one each, for which every block would be compiled anew
    return trained_parameters(model)


def count_trained(arch, mode):
    """How many scalars this --train mode trains in the network of this name."""
    if mode == "random":
        return 2 * count_features(arch)
    return sum(p.numel() for name, p in empty_model(arch).named_parameters() if part_of(name) in MODES[mode])


def trained_parameters(model):
    """The parameters that require gradients, in the model's order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def frozen_parameters(model):
    """The parameters that keep their initial value, in the model's order."""
    return [parameter for parameter in model.parameters() if not parameter.requires_grad]


# -------------------------------------------------------------------------------------------------- checkpoints

# The whole state of a run. A network's frozen weights are not in it: they come back from (arch, seed), and the
# fingerprint proves it. Vectors, not one tensor per layer: resnet866 has 867 BatchNorm layers and would otherwise
# spend more bytes on names than on numbers.
VERSION = 1
FIELDS = {
    "version": int,
    "options": dict,                # see RECIPE
    "epoch": int,                   # epochs done
    "trained": torch.Tensor,        # all trained parameters, flattened and concatenated
    "momentum": torch.Tensor,       # the optimizer's momentum buffers, likewise
    "running_mean": torch.Tensor,   # of all BatchNorm layers, concatenated
    "running_var": torch.Tensor,
    "pruned_below": float,          # gammas with |gamma| below this are zero (prune.py --save)
    "fingerprint": list,            # of the frozen parameters
    "rng": torch.Tensor,            # state of the generator of data order and augmentation
    "scaler": dict,                 # state of the gradient scaler, empty but for fp16
    "records": list,                # one dict per epoch done
}
# What makes a run what it is. --resume refuses to go on with other values; the record of a run states them.
RECIPE = {"arch": str, "train": str, "dataset": str, "seed": int, "epochs": int, "batch_size": int, "lr": float,
          "weight_decay": float, "amp": str}


def flatten(tensors):
    """One vector of all the numbers in a list of tensors."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors]) if tensors else torch.zeros(0)


@torch.no_grad()
def unflatten(vector, tensors):
    """Copy a vector back into the tensors that `flatten` made it from."""
    for tensor, part in zip(tensors, vector.split([tensor.numel() for tensor in tensors])):
        tensor.copy_(part.view_as(tensor))


def write_atomically(path, content):
    """Write bytes to a temporary file beside `path`, flush it to the disk, then rename it to `path`.

    Whatever happens in between, a power cut included, `path` holds the old content or the new, never a part. Raises
    Problem if the file can't be written.
    """
    # A name of its own, should two runs share `path`; the process number is for remove_leftovers.
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        kept = "; what it held before is still there" if path.exists() else ""
        raise Problem(f"{path} can't be written ({error.strerror}){kept}") from error
    finally:
        with contextlib.suppress(OSError):   # usually it is gone
            temporary.unlink()
    with contextlib.suppress(OSError):   # the new name lasts once the folder is on the disk, too; not all can do that
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove_leftovers(out):
    """Remove the temporary files of killed runs that had this --out; those of runs that are alive stay."""
    for temporary in out.parent.glob("*.tmp"):
        match = re.fullmatch(r"(.*)\.(\d+)-[0-9a-f]{8}\.tmp", temporary.name)
        if match and match[1] in (out.name, f"{out.stem}.jsonl", f"{out.stem}.json") and not is_running(int(match[2])):
            temporary.unlink(missing_ok=True)


def is_running(pid):
    """Whether another process has this number; where that can't be asked (off POSIX), say no."""
    try:
        if os.name == "posix" and pid != os.getpid():
            os.kill(pid, 0)   # signal 0: only looks
            return True
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        pass
    return False


def save_checkpoint(path, checkpoint):
    """Write a checkpoint, a dict of FIELDS, atomically."""
    content = io.BytesIO()
    torch.save(checkpoint, content)
    write_atomically(path, content.getbuffer())


def load_checkpoint(path):
    """Read and check a checkpoint (a Path) from anyone: no code in it runs. Returns a dict of FIELDS.

    Raises Problem for a file that is missing, truncated, foreign, of another version or inconsistent.
    """
    if not path.is_file():
        what = "is no file" if path.exists() else "no such checkpoint; train.py writes one after its first epoch"
        raise Problem(f"{path}: {what}")
    try:
        # torch.load trusts the sizes that a file states and skips its checksums, and reads a file that does not begin
        # like a zip file as a bare pickle, whatever follows. So look at all that first.
        with open(path, "rb") as file, zipfile.ZipFile(path) as archive:
            if file.read(4) != b"PK\x03\x04":
                raise ValueError("no zip file")
            stated = sum(entry.file_size for entry in archive.infolist())
            if stated > path.stat().st_size or archive.testzip() is not None:
                raise ValueError("sizes or checksums do not match")
            [entry] = [entry for entry in archive.infolist() if entry.orig_filename.lower().endswith(".pkl")]
            check_pickle(archive.read(entry))
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        check_checkpoint(checkpoint, stated)
    except Problem as problem:
        raise Problem(f"{path}: {problem}") from None
    except (OSError, MemoryError):
        raise
    except Exception as error:   # whatever a damaged file makes the readers raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        raise Problem(f"{path} is not a checkpoint of train.py, or is damaged ({reason})") from None
    return checkpoint


def check_pickle(content):
    """Raise ValueError unless this pickle is made of what checkpoints are made of: plain values and CPU tensors.

    weights_only=True runs no code, but it would still build a bytearray of any size, or hash for ever a tuple that
    holds one tuple twice, that holds one tuple twice, ...
    """
    allowed = {"torch._utils _rebuild_tensor_v2", "torch FloatStorage", "torch ByteStorage", "collections OrderedDict"}
    previous, readable = "", set()   # where the pickle keeps what it may use twice: strings and globals
    for opcode, argument, _ in pickletools.genops(content):
        if "GLOBAL" in opcode.name and argument not in allowed:
            raise ValueError(f"it holds {argument or 'an object'}")
        if opcode.name in ("BINPUT", "LONG_BINPUT"):
            (readable.add if previous in ("BINUNICODE", "GLOBAL") else readable.discard)(argument)
        elif opcode.name in ("BINGET", "LONG_BINGET") and argument not in readable or \
                opcode.name in ("PUT", "GET", "DUP", "MEMOIZE"):
            raise ValueError("it holds one object in two places")
        previous = opcode.name


def check_checkpoint(checkpoint, size):
    """Raise Problem, or any other exception, unless this object read from `size` bytes is a consistent checkpoint."""
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("version"), int):
        raise Problem("a PyTorch file, but not a checkpoint of train.py")
    if checkpoint["version"] != VERSION:
        raise Problem(f"format version {checkpoint['version']}, but this code reads version {VERSION}: "
                      "use the release that wrote it")
    for table, fields, what in ((checkpoint, FIELDS, "field"), (checkpoint["options"], RECIPE, "option")):
        for name in {*fields, *table}:
            if name not in fields or name not in table or type(table[name]) is not fields[name]:
                raise Problem(f"damaged checkpoint: {what} {name!r} is missing, unknown or of a wrong type")
    options, epoch, records = checkpoint["options"], checkpoint["epoch"], checkpoint["records"]
    try:
        parse_arch(options["arch"])
        check_recipe(options)
    except ValueError as error:
        raise Problem(f"damaged checkpoint: {error}") from None
    if not 1 <= epoch == len(records) <= options["epochs"]:
        raise Problem("damaged checkpoint: epoch, records and options contradict each other")
    if not 0 <= checkpoint["pruned_below"] < math.inf:
        raise Problem("damaged checkpoint: pruned_below is no threshold")
    for number, record in enumerate(records, 1):
        if set(record) != set(RECORD) or record["epoch"] != number or not all(map(is_number, record.values())):
            raise Problem(f"damaged checkpoint: the record of epoch {number} is not one")
    # The lengths come before any network is built, so that a forged name can't ask for more memory than the file has.
    features = count_features(options["arch"])
    for name in ("running_mean", "running_var", "trained", "momentum"):
        vector = checkpoint[name]
        if vector.dtype != torch.float32 or vector.dim() != 1 or not vector.is_contiguous() \
                or vector.untyped_storage().nbytes() > size or not vector.isfinite().all():
            raise Problem(f"damaged checkpoint: {name} is not a vector of finite float32 numbers")
        if name.startswith("running") and len(vector) != features:
            raise Problem(f"{name} has {len(vector)} entries, but {options['arch']} has {features} features: "
                          "the checkpoint of another network, or damaged")
    expected = count_trained(options["arch"], options["train"])
    if len(checkpoint["trained"]) != expected:
        raise Problem(f"{len(checkpoint['trained'])} trained parameters, but {options['arch']} with --train "
                      f"{options['train']} has {expected}: the checkpoint of another network, or damaged")
    if len(checkpoint["momentum"]) != expected or (checkpoint["running_var"] < 0).any():
        raise Problem("damaged checkpoint: momentum or running_var is wrong")
    if len(checkpoint["fingerprint"]) != 3 or not all(map(is_number, checkpoint["fingerprint"])):
        raise Problem("damaged checkpoint: the fingerprint of the frozen weights is not three numbers")
    torch.Generator().set_state(checkpoint["rng"])   # raises if it is no state
    scaler = torch.amp.GradScaler("cpu", enabled=options["amp"] == "fp16").state_dict()
    if set(checkpoint["scaler"]) != set(scaler) or not all(map(is_number, checkpoint["scaler"].values())):
        raise Problem("damaged checkpoint: the state of the gradient scaler is not one")


def is_number(value):
    """Whether this is a finite float, or an int that fits into one, and nothing that merely converts to it."""
    return type(value) in (int, float) and abs(value) < 1e300


def restore_model(checkpoint, path):
    """The network of a checkpoint that load_checkpoint read from `path`, on the CPU.

    Regenerates the frozen weights from the seed; raises Problem if they are not those the checkpoint was made with.
    """
    options = checkpoint["options"]
    try:
        model = build_model(options["arch"], options["seed"])
    except MemoryError as error:
        raise Problem(f"{path}: {error}") from None
    trained = freeze(model, options["train"], options["seed"])
    if not same_fingerprint(checkpoint["fingerprint"], fingerprint(frozen_parameters(model))):
        raise Problem(f"{path}: the frozen weights made from seed {options['seed']} are not those that this checkpoint "
                      "was trained with (their fingerprints differ): the seed was changed, or this code was")
    unflatten(checkpoint["trained"], trained)
    for name in ("running_mean", "running_var"):
        unflatten(checkpoint[name], running_statistics(model, name))
    zero_gammas(model, checkpoint["pruned_below"])
    return model


def running_statistics(model, name):
    """The "running_mean" or the "running_var" of every BatchNorm layer, as a list of tensors."""
    return [getattr(bn, name) for _, bn in batchnorms(model)]


@torch.no_grad()
def zero_gammas(model, threshold):
    """Set every gamma with |gamma| < threshold to zero. Beta stays: such a feature becomes a constant."""
    for _, bn in batchnorms(model):
        bn.weight.masked_fill_(bn.weight.abs() < threshold, 0)


# --------------------------------------------------------------------------------------------- step, evaluation

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}


def autocast(device, amp):
    """The autocast context of an --amp value on this device."""
    return torch.autocast(device.type, AMP_DTYPES[amp], enabled=amp != "off")


def train_step(model, optimizer, scaler, images, labels, amp):
    """One step of SGD on normalised images (B, 3, 32, 32). Returns (mean loss, correct predictions) as tensors."""
    with autocast(images.device, amp):
        logits = model(images)
    loss = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return loss.detach(), (logits.argmax(1) == labels).sum()


@torch.no_grad()
def evaluate(model, images, labels, amp):
    """Accuracy in percent on uint8 images (N, 32, 32, 3), with running statistics, leaving the model in eval mode."""
    model.eval()
    # A GPU is fastest with large batches, but in a wide network they would take more memory than training does (a layer
    # of wrn14-32 has 1 GB of features then); a processor is fastest while a layer's features fit its cache.
    batch = 1000 if images.is_cuda and model.conv.out_channels < 128 else 125
    correct = torch.zeros((), dtype=torch.int64, device=images.device)
    for start in range(0, len(images), batch):
        with autocast(images.device, amp):
            logits = model(normalize(images[start:start + batch]))
        correct += (logits.argmax(1) == labels[start:start + batch]).sum()
    return 100 * correct.item() / len(images)


# -------------------------------------------------------------------------------------------------------- speed

def speed_up(model, device, amp):
    """Make a network on this device train faster, in place, with the same results up to round-off."""
    model.to(memory_format=torch.channels_last)         # the layout that the kernels of convolutions are written for
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = True                       # nothing needs the features before a ReLU again
        elif isinstance(module, nn.BatchNorm2d):
            module.num_batches_tracked = None           # one kernel a layer for a number that nothing reads
        elif isinstance(module, (nn.Conv2d, nn.Linear)) and amp != "off":
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:         # autocast would cast it anew in every step
                    parameter.data = parameter.data.to(AMP_DTYPES[amp])
        elif isinstance(module, Block) and device.type == "cuda":
            module.compile(dynamic=False)               # five versions for any depth; CPUs get 1.8 times slower


def keep_freed_memory():
    """Let this process keep the memory that it frees, from now on, where the C library is glibc.

    By default it returns what is large, and the system clears it again, page by page: thousands of page faults in a
    step. Without them, on two cores, a step of resnet14 takes 3 % less time (8 % in bf16), one of wrn14-8 9 % less, and
    24 % more memory (results/parts-cpu.txt).
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):   # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, -1)     # M_TRIM_THRESHOLD: never shrink the heap
        mallopt(-4, 0)      # M_MMAP_MAX: allocate everything there, nothing in mappings of its own


def eagerly(device):
    """A context in which blocks run as they stand, not compiled: a shape for a few steps is not worth a compilation."""
    return torch.compiler.set_stance("force_eager") if device.type == "cuda" else contextlib.nullcontext()


def replayed(step, size, device):
    """The function step(size) as a CUDA graph: one launch for the whole step, where the host would launch thousands.

    The first three calls run as they are, because what they compile and allocate can't be captured. Then the step is
    captured, which runs nothing, and replayed ever after. Calls with another size always run as they are. Raises
    Problem if this machine can't compile or capture.
    """
    calls, graph = 0, None

    def call(actual):
        nonlocal calls, graph
        if actual != size:
            with eagerly(device):
                return step(actual)
        try:
            if calls == 3:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                    step(size)
            calls += 1
            graph.replay() if graph else step(size)
        except (RuntimeError, AssertionError) as error:     # compiled code asserts the layouts that it was made for
            if isinstance(error.__context__, (RuntimeError, KeyboardInterrupt)):
                error = error.__context__                   # to end a capture that failed raises an error of its own
            if is_out_of_memory(error) or isinstance(error, KeyboardInterrupt):
                raise error
            raise Problem(f"the fast path fails here ({' '.join(str(error).split()):.300}): try --plain") from error

    return call


GRAPHS = ("cuda",)   # the types of devices on which a step is replayed as a graph


def prepare(args, device, model, images, labels, plain):
    """Bring a network and its training set, images (N, 32, 32, 3) and labels (N,), to the device, ready to train.

    Returns (step, epoch, optimizer, scaler). step(size) is one step of SGD on the next `size` images of `epoch`, a dict
    of tensors that lie in the same place for the whole run, as a CUDA graph needs it:
        order, offset, flip: the epoch's chance, see draw_augmentation     losses: of each step so far
        done: (1,), the number of steps so far                             correct: predictions so far
    """
    graph = device.type in GRAPHS and not plain
    if graph:
        torch.cuda.set_stream(torch.cuda.Stream())      # the default stream can't be captured
    padded = F.pad(images, (0, 0, 4, 4, 4, 4)).to(device)               # (N, 40, 40, 3) uint8 with a black border
    labels = labels.to(device)
    model.to(device)
    if not plain:
        speed_up(model, device, args.amp)
        if device.type == "cpu":
            keep_freed_memory()
    trained = trained_parameters(model)
    lr = torch.tensor(args.lr, device=device) if graph else args.lr     # what a graph is to see anew must be a tensor
    optimizer = torch.optim.SGD(trained, lr, momentum=0.9, weight_decay=args.weight_decay,
                                fused=True if not plain and device.type != "mps" else None)   # MPS: no fp16 scaling
    for parameter in trained:   # zero is where SGD starts, 0.9 * 0 + gradient, also if the first step overflows in fp16
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    epoch = {name: values.to(device) for name, values in zip(CHANCE, draw_augmentation(len(images), torch.Generator()))}
    epoch["losses"] = torch.zeros(math.ceil(len(images) / args.batch_size), dtype=trained[0].dtype, device=device)
    epoch["done"] = torch.zeros(1, dtype=torch.int64, device=device)
    epoch["correct"] = torch.zeros((), dtype=torch.int64, device=device)

    def step(size):   # no operation in here waits for the device, the position in the epoch is read there, too
        slots = epoch["done"] * args.batch_size + torch.arange(size, device=device)
        index = epoch["order"][slots]
        batch = normalize(augment(padded, index, epoch["offset"][slots], epoch["flip"][slots]), trained[0].dtype)
        if plain:
            batch = batch.contiguous()
        loss, hits = train_step(model, optimizer, scaler, batch, labels[index], args.amp)
        epoch["losses"].index_copy_(0, epoch["done"], loss[None])
        epoch["correct"] += hits
        epoch["done"] += 1

    return (replayed(step, args.batch_size, device) if graph else step), epoch, optimizer, scaler


def begin_epoch(epoch, optimizer, lr, generator):
    """Draw an epoch's chance, set its learning rate and start its sums from zero."""
    for name, values in zip(CHANCE, draw_augmentation(len(epoch["order"]), generator)):
        epoch[name].copy_(values)
    for name in ("losses", "done", "correct"):
        epoch[name].zero_()
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


# ----------------------------------------------------------------------------------------------------- training

RECORD = ("epoch", "train_loss", "train_accuracy", "test_accuracy", "lr", "seconds", "images_per_second")


def learning_rate(lr, epoch, epochs):
    """The learning rate of an epoch counted from 0: divided by 10 at one half and at three quarters of the epochs."""
    return lr / 10 ** ((epoch >= epochs / 2) + (epoch >= epochs * 3 / 4))


def check_recipe(options):
    """Raise ValueError with the reason if an option of a run (see RECIPE) is out of its range."""
    for name, choices in (("train", MODES), ("dataset", DATASETS), ("amp", AMP_DTYPES)):
        if options[name] not in choices:
            raise ValueError(f"{flag(name)} {options[name]!r:.60}: choose one of {', '.join(choices)}")
    for name, holds, what in (
            ("seed", 0 <= options["seed"] < 2 ** 32, "0 to 4294967295"),
            ("epochs", 1 <= options["epochs"] <= 1e6, "1 to 1000000"),
            ("batch_size", options["batch_size"] >= 1, "at least 1"),
            ("lr", 0 < options["lr"] <= 1e30, "above 0 and at most 1e30"),          # as far as float32 goes
            ("weight_decay", 0 <= options["weight_decay"] <= 1e30, "0 to 1e30")):
        if not holds:
            raise ValueError(f"{flag(name)} {options[name]}: must be {what}")


def flag(name):
    """The command-line flag of an option."""
    return "--" + name.replace("_", "-")


def load_for_resume(path, options):
    """The checkpoint to go on from, or None if there is none yet. Raises Problem if it is of another run."""
    if not path.exists():
        print(f"{path} does not exist yet: starting from scratch")
        return None
    checkpoint = load_checkpoint(path)
    differences = [f"{flag(name)} {value} (checkpoint: {checkpoint['options'][name]})"
                   for name, value in options.items() if value != checkpoint["options"][name]]
    if checkpoint["pruned_below"] > 0:
        raise Problem(f"{path} is a pruned network, which can't be trained on: choose another --out", 2)
    if differences:
        why = ", whose learning-rate schedule would be another" if "--epochs" in "".join(differences) else ""
        raise Problem(f"--resume goes on with the run in {path}, so these options contradict it: "
                      f"{', '.join(differences)}{why}; use the checkpoint's, or another --out", 2)
    return checkpoint


def train(args, device):
    """Run or resume the training that the parsed command line describes, to its last epoch.

    Raises Problem for what the user can mend: a checkpoint of another run, no data, a loss that is not finite.
    """
    options = {name: getattr(args, name) for name in RECIPE}
    checkpoint = load_for_resume(args.out, options) if args.resume else None
    records = checkpoint["records"] if checkpoint else []
    if len(records) == args.epochs:
        print(f"{args.out} is finished: epoch {args.epochs}, test accuracy {records[-1]['test_accuracy']:.2f} %")
        return
    for path in (args.out, args.out.with_suffix(".jsonl"), args.out.with_suffix(".json")):
        if path.exists() and not args.resume:
            raise Problem(f"{path} exists: add --resume to go on with that run, choose another --out, or delete it", 2)
    try:   # now, because a folder that can't be written should not cost an epoch
        args.out.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out.parent).close()
    except OSError as error:
        raise Problem(f"--out {args.out} can't be written ({error.strerror}): choose another folder") from error
    remove_leftovers(args.out)

    train_data, test_data = load_data(args.dataset, args.data_dir, args.seed)
    n = len(train_data[0])
    if args.batch_size > n:
        raise Problem(f"--batch-size {args.batch_size} is more than the {n} training images", 2)

    model = restore_model(checkpoint, args.out) if checkpoint else build_model(args.arch, args.seed)
    if not checkpoint:
        freeze(model, args.train, args.seed)
    frozen_fingerprint = fingerprint(frozen_parameters(model))
    counts = parameter_counts(empty_model(args.arch))
    count = count_trained(args.arch, args.train)
    # As they are now, whatever is edited while it runs; after a resume, those of the last part.
    facts = {**options, "plain": args.plain, "parameters": {**counts, "trained": count}, "commit": commit(),
             "hardware": hardware(device), "torch": torch.__version__}
    print(f"{args.arch}: {count:,} of {counts['all']:,} parameters train ({100 * count / counts['all']:.2f} %)")

    step, epoch_state, optimizer, scaler = prepare(args, device, model, *train_data, args.plain)
    test_images, test_labels = (tensor.to(device) for tensor in test_data)
    trained = trained_parameters(model)
    momentum = [optimizer.state[parameter]["momentum_buffer"] for parameter in trained]
    generator = torch.Generator().manual_seed(args.seed)
    if checkpoint:
        unflatten(checkpoint["momentum"].to(device), momentum)
        scaler.load_state_dict(checkpoint["scaler"])
        generator.set_state(checkpoint["rng"])
        print(f"going on after epoch {len(records)} of {args.out}")

    # The last batch of an epoch is a smaller one, as in OpenLTH.
    sizes = [min(args.batch_size, n - start) for start in range(0, n, args.batch_size)]
    print("  epoch  train loss  train acc   test acc      lr  seconds  images/s  time left")
    for epoch in range(len(records), args.epochs):
        began = time.perf_counter()
        lr = learning_rate(args.lr, epoch, args.epochs)
        begin_epoch(epoch_state, optimizer, lr, generator)
        model.train()
        for size in sizes:
            step(size)
            show_progress(epoch + 1, args.epochs, epoch_state["done"], len(sizes), n, began)
        losses = epoch_state["losses"].cpu()   # read only once an epoch: nothing else waits for the device
        train_seconds = time.perf_counter() - began

        vectors = {
            "trained": flatten(trained).cpu(), "momentum": flatten(momentum).cpu(),
            "running_mean": flatten(running_statistics(model, "running_mean")).cpu(),
            "running_var": flatten(running_statistics(model, "running_var")).cpu(),
        }
        finite = losses.isfinite()
        finite[-1] &= all(vector.isfinite().all() for vector in vectors.values())
        if not finite.all():
            first = finite.logical_not().nonzero()[0].item()
            what = "parameters not finite after" if losses[first].isfinite() else f"loss {losses[first]:g} at"
            kept = f"{args.out} holds the network after epoch {epoch}" if epoch else "no epoch was completed"
            raise Problem(f"training diverged: {what} step {first + 1} of epoch {epoch + 1}; {kept}; "
                          f"try a lower --lr{'' if args.amp == 'off' else ', or --amp off'}")

        with eagerly(device):
            test_accuracy = evaluate(model, test_images, test_labels, args.amp)
        records.append({
            "epoch": epoch + 1,
            "train_loss": (losses.double() * torch.tensor(sizes)).sum().item() / n,
            "train_accuracy": 100 * epoch_state["correct"].item() / n,
            "test_accuracy": test_accuracy,
            "lr": lr,
            "seconds": round(time.perf_counter() - began, 3),
            "images_per_second": round(n / train_seconds, 1),
        })
        show_record(records, args.epochs)
        save_log(args.out, records)
        if epoch + 1 == args.epochs:
            seconds = round(sum(record["seconds"] for record in records), 1)
            write_record(args.out, {**facts, "test_accuracy": records[-1]["test_accuracy"],   # never the best epoch's
                                    "seconds": seconds, "records": records})
        save_checkpoint(args.out, {   # last: until it is there, --resume repeats the epoch
            "version": VERSION, "options": options, "epoch": epoch + 1, "pruned_below": 0.0, **vectors,
            "fingerprint": frozen_fingerprint, "rng": generator.get_state(), "scaler": scaler.state_dict(),
            "records": records,
        })

    print(f"test accuracy after the last epoch: {records[-1]['test_accuracy']:.2f} %\nNext:")
    data_dir = [] if args.data_dir == DATA_DIR else ["--data-dir", str(args.data_dir)]
    print(" ", shlex.join(["python", "prune.py", str(args.out), *data_dir]))
    print(" ", shlex.join(["python", "analyze.py", str(args.out)]))


# ---------------------------------------------------------------------------------------------------- benchmark

WARM_UP = 5   # steps; a CUDA graph is captured before the fourth


def benchmark(args, device):
    """Time args.benchmark steps on random images and print what they say of a whole run; with --plain of both paths.

    The plain path comes first, as if it were alone: on a CPU, what the fast one sets makes the whole process keep freed
    memory. The memory of a process (on a CPU) is the most of what came so far.
    """
    images, labels = torch.randint(0, 256, (50_000, 32, 32, 3), dtype=torch.uint8), torch.randint(0, 10, (50_000,))
    steps = math.ceil(len(images) / args.batch_size)
    if steps < 2:
        raise Problem(f"--benchmark needs a --batch-size below {len(images)}", 2)
    test_images, test_labels = images[:10_000].to(device), labels[:10_000].to(device)
    print(f"{args.arch} --train {args.train} --batch-size {args.batch_size} --amp {args.amp}, {hardware(device)}, "
          f"torch {torch.__version__}\n{args.benchmark} steps after a warm-up of {WARM_UP}, with all compilation and "
          f"capture; a whole run is {args.epochs} epochs of {steps} steps and one evaluation\n\n"
          "path   ms/step (10 % to 90 %)     images/s  peak memory   warm-up  evaluation  whole run")
    for plain in (True, False) if args.plain else (False,):
        if device.type == "cuda":
            gc.collect()   # compiled blocks lie in reference cycles
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        model = build_model(args.arch, args.seed)
        freeze(model, args.train, args.seed)
        step, epoch, optimizer, _ = prepare(args, device, model, images, labels, plain)
        begin_epoch(epoch, optimizer, args.lr, torch.Generator().manual_seed(args.seed))
        model.train()
        began = time.perf_counter()
        times = []
        for number in range(WARM_UP + args.benchmark):
            if number == WARM_UP:
                warm_up = time.perf_counter() - began
            epoch["done"].remainder_(steps - 1)         # stays off the epoch's smaller last batch
            times.append(seconds(step, args.batch_size, device=device))
        step(len(images) % args.batch_size or args.batch_size)   # an epoch's last batch needs memory of its own
        low, median, high = np.percentile(times[WARM_UP:], [10, 50, 90])
        with eagerly(device):
            evaluate(model, test_images[:1000], test_labels[:1000], args.amp)
            evaluation = seconds(evaluate, model, test_images, test_labels, args.amp, device=device)
        whole = round(args.epochs * (steps * median + evaluation))
        print(f"{'plain' if plain else 'fast':5} {1e3 * median:8.2f} ({1e3 * low:.2f} to {1e3 * high:.2f})".ljust(33),
              f"{args.batch_size / median:8,.0f} {peak_memory(device) / 1e9:9.2f} GB {warm_up:7.1f} s "
              f"{evaluation:9.2f} s {whole // 3600:4}:{whole // 60 % 60:02}:{whole % 60:02}", flush=True)
        del model, step, epoch, optimizer
        if plain:
            reference = median
    if args.plain:
        print(f"fast is {reference / median:.2f} times as fast as plain")
    if args.train == "bn":
        print_floor(args, device, median)


def seconds(function, *arguments, device):
    """How long a call takes, until the device is done with it."""
    began = time.perf_counter()
    function(*arguments)
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - began


def peak_memory(device):
    """The most bytes of memory so far: that PyTorch held on a CUDA device, or that the process held elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved()
    try:
        import resource
    except ImportError:   # Windows
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def work_of_a_step(arch, batch_size, amp):
    """(bytes moved, floating-point operations) of one BN-only step with few kernels, none of which finds data in cache.

    Bytes: 13 times the features that convolutions write. Forward 5.5: the convolution reads and writes, the batch
    statistics read, then one kernel normalises, adds and clips, which reads and writes, and reads a shortcut in every
    other layer. Backward 7.5: the sums for gamma and beta read gradients and features, the gradient of the features
    reads both and writes, the convolution reads and writes, and every other layer adds a shortcut's gradient.
    Operations: those of the convolutions and of their input gradients, for BN-only needs no weight gradients.
    """
    model = empty_model(arch)
    freeze(model, "bn", 0)
    features = []
    for _, bn in batchnorms(model):
        bn.register_forward_hook(lambda module, inputs, output: features.append(output.numel()))
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(batch_size, 3, 32, 32, device="meta")).sum().backward()
    return 13 * sum(features) * AMP_DTYPES[amp].itemsize, counter.get_total_flops()


def print_floor(args, device, step):
    """Print how long work_of_a_step takes at the speeds of a copy and of a matrix product, measured here."""
    dtype = AMP_DTYPES[args.amp]
    if device.type == "cuda" and torch.backends.cudnn.allow_tf32:
        torch.set_float32_matmul_precision("high")   # as convolutions have it by default
    source = torch.ones(2 ** (30 if device.type == "cuda" else 28) // dtype.itemsize, dtype=dtype, device=device)
    target = torch.empty_like(source)
    side = 8192 if device.type == "cuda" else 1024   # fp16 is slow on CPUs
    matrix = torch.ones(side, side, dtype=dtype, device=device)
    copy = min(seconds(target.copy_, source, device=device) for _ in range(10))
    product = min(seconds(torch.mm, matrix, matrix, device=device) for _ in range(10))
    bandwidth, speed = 2 * source.nbytes / copy, 2 * side ** 3 / product
    moved, operations = work_of_a_step(args.arch, args.batch_size, args.amp)
    print(f"floor: {moved / 1e9:.2f} GB at {bandwidth / 1e9:,.0f} GB/s (measured, a copy) take "
          f"{1e3 * moved / bandwidth:.1f} ms, {operations / 1e9:,.0f} GFLOP at {speed / 1e9:,.0f} GFLOP/s (measured, a "
          f"matrix product) {1e3 * operations / speed:.1f} ms; the step takes "
          f"{step / (moved / bandwidth + operations / speed):.1f} times their sum")


# ------------------------------------------------------------------------------------------------------- output

def show_progress(epoch, epochs, done, steps, n, began):
    """On a terminal, rewrite the last line to say how far the epoch is, at most four times a second.

    `done` is the number of steps done, on the device: a GPU is behind the host, and only here the host waits for it.
    """
    if sys.stdout.isatty() and time.perf_counter() - show_progress.shown > 0.25:
        step, now = done.item(), time.perf_counter()
        show_progress.shown = now
        print(f"\r{epoch:3}/{epochs}  step {step}/{steps}  {step * n / steps / (now - began):,.0f} images/s\x1b[K",
              end="", flush=True)   # \x1b[K: clear the rest of the line


show_progress.shown = -math.inf


def show_record(records, epochs):
    """Print the line of the epoch just done."""
    r = records[-1]
    left = round((epochs - r["epoch"]) * sum(record["seconds"] for record in records[-10:]) / len(records[-10:]))
    if sys.stdout.isatty():
        print("\r", end="")
    print(f"{r['epoch']:3}/{epochs:<3} {r['train_loss']:11.4f} {r['train_accuracy']:8.2f} % "
          f"{r['test_accuracy']:8.2f} % {r['lr']:7.4g} {r['seconds']:8.1f} {r['images_per_second']:9,.0f}  "
          f"{left // 3600:3}:{left // 60 % 60:02}:{left % 60:02}", flush=True)


def save_log(out, records):
    """Write the records of all epochs so far beside the checkpoint, one JSON object a line."""
    lines = "".join(json.dumps(record) + "\n" for record in records)
    write_atomically(out.with_suffix(".jsonl"), lines.encode())


def write_record(out, record):
    """Write the record of the run with this checkpoint: JSON with a line for each epoch, which people can read."""
    entries = []
    for name, value in record.items():
        if isinstance(value, list):
            text = "[\n  " + ",\n  ".join(json.dumps(item) for item in value) + "\n ]"
        else:
            text = json.dumps(value)
        entries.append(f" {json.dumps(name)}: {text}")
    write_atomically(out.with_suffix(".json"), ("{\n" + ",\n".join(entries) + "\n}\n").encode())


def commit():
    """The git commit of this code, with "-dirty" if a file differs from it, or None outside a repository."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, cwd=pathlib.Path(__file__).parent, capture_output=True, text=True,
                              check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def hardware(device):
    """The GPU's name, or the processor's and how many threads PyTorch uses on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if (cpuinfo := pathlib.Path("/proc/cpuinfo")).exists():
        name = next((line.split(":")[1].strip() for line in cpuinfo.open() if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} threads" + (" and MPS" if device.type == "mps" else "")


# ------------------------------------------------------------------------------------------------- command line

DATASETS = ("cifar10", "synthetic")
DATA_DIR = pathlib.Path("data")


class Parser(argparse.ArgumentParser):
    """An argument parser that answers wrong usage in one line, with exit status 2."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}; see --help\n")


def parse_args(argv=None):
    """The command line of train.py as (args, device); --amp auto and --out are replaced by what they stand for."""
    parser = Parser(description="Train a CIFAR-10 ResNet, or only its BatchNorm (arXiv 2003.00152). "
                                "The defaults are the paper's recipe.")
    parser.add_argument("--arch", default="resnet14",
                        help="resnet<depth> or wrn<depth>-<width>, depth = 6n + 2 (%(default)s)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--train", choices=MODES, default="all",
                      help="which parameters train, the rest stays random (%(default)s)")
    what.add_argument("--bn-only", dest="train", action="store_const", const="bn", default=argparse.SUPPRESS,
                      help="short for --train bn")
    parser.add_argument("--dataset", choices=DATASETS, default="cifar10",
                        help="synthetic needs no download (%(default)s)")
    parser.add_argument("--data-dir", type=pathlib.Path, default=DATA_DIR,
                        help="where CIFAR-10 is or will be put (%(default)s)")
    parser.add_argument("--epochs", type=int, default=160,
                        help="the learning rate drops at 1/2 and at 3/4 of them (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=128, help="images per step (%(default)s)")
    parser.add_argument("--lr", type=float, default=0.1,
                        help="initial learning rate of SGD with momentum 0.9 (%(default)s)")
    parser.add_argument("--weight-decay", type=float, default=1e-4, help="L2 penalty on whatever trains (%(default)s)")
    parser.add_argument("--seed", type=int, default=0,
                        help="decides initial values, data order and augmentation (%(default)s)")
    parser.add_argument("--amp", choices=("auto", *AMP_DTYPES), default="auto",
                        help="mixed precision; auto (the default): bf16 on CUDA (fp16 if it has none), off elsewhere")
    parser.add_argument("--plain", action="store_true",
                        help="the reference path: contiguous, eager, nothing that makes it faster")
    parser.add_argument("--benchmark", type=int, nargs="?", const=50, metavar="N",
                        help="train nothing, but time N steps (%(const)s) and say how long a run takes; with --plain, "
                             "compare both paths")
    add_device_argument(parser)
    parser.add_argument("--out", type=pathlib.Path, help="the checkpoint, .pt (runs/<arch>-<train>-s<seed>.pt)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint, if there is one")
    args = parser.parse_args(argv)

    device = choose_device(args.device)
    if args.amp == "auto":
        cuda = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else "fp16"
        args.amp = cuda if device.type == "cuda" else "off"
    args.out = args.out or pathlib.Path(f"runs/{args.arch}-{args.train}-s{args.seed}.pt")
    try:
        parse_arch(args.arch)
        check_recipe(vars(args))
    except ValueError as error:
        parser.error(str(error))
    if args.benchmark is not None and args.benchmark < 1:
        parser.error(f"--benchmark {args.benchmark}: must be at least 1")
    if args.out.suffix != ".pt":
        parser.error(f"--out {args.out}: the name of a checkpoint ends in .pt")
    return args, device


def add_device_argument(parser):
    """Give a parser the --device option."""
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto",
                        help="auto (the default) is cuda, else mps, else cpu, whichever there is")


def choose_device(name):
    """The torch device of a --device value; raises Problem if this machine does not have it."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(name for name in there if there[name]) if name == "auto" else name
    if not there[name]:
        raise Problem(f"--device {name}: PyTorch {torch.__version__} finds no such device here; use --device cpu", 2)
    return torch.device(name)


def is_out_of_memory(error):
    """Whether an exception says that memory did not suffice, in one of PyTorch's ways to say it on any device."""
    ways = ("out of memory", "allocate memory", "not enough memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(way in str(error) for way in ways)


def run(main, relief="--device cpu"):
    """Call main(), and turn what goes wrong outside the code's power into one line on stderr and an exit status.

    `relief` is what to try where memory does not suffice.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)   # a polite kill is a Ctrl-C
    try:
        return main()
    except Problem as problem:
        text, status = str(problem), problem.status
    except KeyboardInterrupt:
        text, status = "stopped", 1
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        text, status = f"out of memory ({Problem(str(error))!s:.160}): try {relief}", 1
    except OSError as error:
        text, status = str(error), 1
    if sys.stdout.isatty():
        print()   # ends the line of show_progress
    print(f"{pathlib.Path(sys.argv[0]).name}: error: {text}", file=sys.stderr)
    sys.exit(status)


def main():
    args, device = parse_args()
    if args.benchmark:
        return benchmark(args, device)
    try:
        train(args, device)
    except KeyboardInterrupt:
        again = shlex.join(["python", *sys.argv, *([] if args.resume else ["--resume"])])
        raise Problem(f"stopped; go on from the last complete epoch with: {again}") from None


if __name__ == "__main__":
    run(main, "a smaller --batch-size, or --plain")
