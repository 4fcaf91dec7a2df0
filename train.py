"""Train a DCGAN on street scenes (or any images).

    python train.py                                        # draws its own streets: five minutes on a laptop
    python train.py --data packs/streets --minutes 60      # a pack from prepare_data.py, or raw images, packed once
    python train.py --device hpu --data /mnt/gp3/msls --preset clamp-64
    torchrun --nproc-per-node 8 train.py --device hpu --data packs/msls
    python train.py --data packs/streets --resume          # go on where the run stopped

A run is a folder: checkpoint.pt, generator-<images>.pt, generator-best.pt, samples/<images>.png, scores.csv, args.json
and TensorBoard's events (tensorboard --logdir runs). The losses are Goodfellow's (2014, section 3, the non-saturating
form for G). To change the loss, see DCGAN.step; what it is fed, batches; what a device needs, on_cuda, on_hpu, on_cpu.
"""
import argparse
import copy
import functools
import io
import itertools
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two runs apart there
    fcntl = None

import numpy as np

from model import (DEVICES, FORMAT, PRESETS, Discriminator, Generator, InputError, Parser, Score, checkpoints,
                   choose_device, cut_windows, init_weights, latents, load_first, number, render, run,
                   write_file)  # before torch, which would load Gaudi's plugin by itself

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import _functorch as functorch
from torch.optim.swa_utils import update_bn
from torch.utils.tensorboard import SummaryWriter
from PIL import Image
from torchvision.utils import make_grid

import prepare_data

DEMO = dict(epochs=1000, minutes=4.5, save_minutes=1)  # without --data: streets to see in five minutes on two CPU cores
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STATS = ("Loss_D", "Loss_G", "D(x)", "D(G(z1))", "D(G(z2))")  # of a step, in this order; logged are the last one's
LAUNCH = f"{os.environ.get('TORCHELASTIC_RUN_ID')} {os.getppid()}"  # of torchrun; the same after its restarts
EMA = 0.995  # what a step keeps of the average of G that draws: its memory is some 200 steps


# ---- arguments ------------------------------------------------------------------------------------------------------

def parse_args(argv=None):
    """argparse.Namespace of what is in force: the command line over the resumed run's arguments over the preset's."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", help="a pack, an MSLS tree, a folder of its archives, or any images (default: drawn streets)")
    add("--preset", choices=PRESETS, help="what the second list holds (default: naive-64, and demo-64 without --data)")
    add("--out", help="the run's folder (default: runs/<preset>)")
    add("--resume", action="store_true", help="go on from the newest sound checkpoint in --out")
    add("--device", choices=DEVICES, default="auto", help="where to train (default: auto, the best there is)")
    add("--epochs", type=number(int, 1, 10 ** 6), default=25, help="times that every frame is seen (default: 25)")
    add("--minutes", type=number(float, 0.01), help="end after so many, saved and drawn, if the epochs have not ended")
    add("--seed", type=number(int, 0, 2 ** 32), default=0, help="of weights, order and noise (default: 0)")
    add("--mirror", action="store_true", help="flip half of the images left to right")
    add("--precision", choices=("auto", *DTYPES), default="auto", help="auto: bf16 where fast, fp16 on older GPUs")
    add("--bf16-ops", "--hmp-bf16", metavar="OPS", help="ops to run in bf16 (fp16): a file, names, or =+relu,-tanh")
    add("--fp32-ops", "--hmp-fp32", metavar="OPS", help="ops to run in fp32, likewise")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: where it pays)")
    add("--graph", action=argparse.BooleanOptionalAction, default=True, help="on cuda, each step as one CUDA graph")
    add("--stream", action="store_true", help="read the pack as it goes, though it would fit on the device")
    add("--save-minutes", type=number(float, 0), default=5, help="between checkpoints, grids and scores (default: 5)")
    add("--log-every", type=number(int, 1), default=50, help="steps between log lines; others copy nothing back (50)")
    add = parser.add_argument_group("the preset's, unless typed").add_argument
    add("--image-size", type=int, choices=(32, 64, 128, 256), help="pixels")
    add("--kernel-size", type=int, choices=(4, 5), help="4, or the paper's 5")
    add("--nz", type=number(int, 1, 65536), help="size of a latent")
    add("--ngf", type=number(int, 1, 4096), help="G's feature maps")
    add("--ndf", type=number(int, 1, 4096), help="D's feature maps")
    add("--latent", choices=("normal", "uniform"), help="its distribution")
    add("--batch-size", type=number(int, 2, 65536), help="images a step and process")
    add("--lr", type=number(float, 1e-9, 1), help="learning rate")
    add("--beta1", type=number(float, 0, 0.9999), help="Adam's")
    add("--weight-decay", type=number(float, 0, 1), help="AdamW's")
    add("--instance-noise", type=number(float, 0, 1), help="std of the noise on D's input")

    typed = parser.parse_args(argv)  # once to learn where defaults come from, and once more with them
    demo = not (typed.data or typed.preset)
    preset = typed.preset or ("demo-64" if demo else "naive-64")
    out = Path(typed.out or f"runs/{preset}")
    try:
        saved = dict(json.loads((out / "args.json").read_text()))
    except (OSError, ValueError, TypeError):
        saved = {}
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0 and saved.get("launch") == LAUNCH
    resume = typed.resume or restarted  # torchrun goes on with a run that it started, and with no other
    if resume:
        preset = saved.get("preset")
        if preset not in PRESETS:
            raise InputError(f"--resume: no run in {out}: name one with --out, or start one without --resume")
        if typed.preset not in (None, preset):
            raise InputError(f"--preset {typed.preset}: {out} is a run of {preset}, and its networks stay")
    parser.set_defaults(**{**PRESETS[preset], **(DEMO if demo else {}), **(saved if resume else {}),
                           "preset": preset, "out": str(out), "resume": resume})
    return parser.parse_args(argv)


# ---- data: uint8 frames, from the pack to the device ----------------------------------------------------------------

def row_batches(n, chunk, batch_size, seed, start, advise=lambda starts: None):
    """Without end: int64 (batch_size,) row numbers of n frames, every row once an epoch, from image `start` of the run.

    Chunks of so many rows, that stand together on the disk, come in random order; a pool of 256 of them (thousands of
    frames from hundreds of places) is shuffled frame by frame. A pool is announced to `advise`, by the first row of
    each chunk, one pool ahead. A batch may reach over the end of an epoch: it is never short, so shapes are static.
    """
    rows, skip = np.empty(0, np.int64), start % n
    for epoch in itertools.count(start // n):
        rng = np.random.default_rng((*seed, epoch))
        starts = chunk * rng.permutation(math.ceil(n / chunk))
        for pool_starts in np.split(starts, range(256, len(starts), 256)):
            advise(pool_starts)
            pool = (pool_starts[:, None] + np.arange(chunk)).ravel()
            pool = rng.permutation(pool[pool < n])
            rows = np.concatenate([rows, pool])
            dropped = min(skip, len(rows))  # seen before the run was resumed
            rows, skip = rows[dropped:], skip - dropped
            while len(rows) >= batch_size + len(pool):  # the newest pool waits: the disk is still reading it
                yield rows[:batch_size]
                rows = rows[batch_size:]


def batches(pack, args, device, rank, world, start):
    """Without end: (uint8 (batch_size, H, W, 3) on the device, seconds waited for it), from image `start` of the run.

    Each rank has its slice of the pack, all of one length: it samples all cities, as the pack's sequences are shuffled.
    It lives on the device if it takes no more than half of the memory there; else a thread reads ahead on the disk.
    """
    n = math.ceil(len(pack.train) / world)
    first = min(rank * n, len(pack.train) - n)  # the last slice overlaps its neighbour by less than a frame a rank
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable")  # nor do we write
        frames = torch.from_numpy(pack.train[first:first + n])
    chunk = max(1, 2 ** 20 // frames[0].nbytes)  # 1 MB: a disk reads such at its full rate
    order = functools.partial(row_batches, n, chunk, seed=(args.seed, rank), start=start // world)
    if frames.nbytes <= device.free_memory() / 2 and not args.stream:
        return resident(frames, args.batch_size, order, device)
    return streamed(frames, args.batch_size, order, device, pack.train, first, chunk)


def resident(frames, batch_size, order, device):
    frames = frames.to(device.type, copy=True)
    for rows in order(64 * batch_size):  # row numbers are copied to the device for 64 steps at once
        for part in torch.from_numpy(rows).to(device.type).split(batch_size):
            yield frames.index_select(0, part), 0.0


def streamed(frames, batch_size, order, device, array, first, chunk):
    """`frames` is a view of the memory-mapped `array` from row `first` on."""
    fd, frame_bytes = os.open(array.filename, os.O_RDONLY), frames[0].nbytes

    def advise(starts):  # the kernel reads these chunks into its cache while we go on
        for start in starts.tolist() if hasattr(os, "posix_fadvise") else ():
            place = array.offset + (first + start) * frame_bytes
            os.posix_fadvise(fd, place, chunk * frame_bytes, os.POSIX_FADV_WILLNEED)

    rows = order(batch_size, advise=advise)

    def read():
        batch = frames.index_select(0, torch.from_numpy(next(rows)))
        return batch.pin_memory() if device.type == "cuda" else batch

    with ThreadPoolExecutor(1) as reader:
        ahead = deque(reader.submit(read) for _ in range(8))
        while True:
            asked = time.perf_counter()
            with torch.profiler.record_function("waiting for data"):
                batch = ahead.popleft().result()
            ahead.append(reader.submit(read))
            yield batch.to(device.type, non_blocking=True), time.perf_counter() - asked


# ---- the networks in training, and one step -------------------------------------------------------------------------

class DCGAN:
    """G and D, their optimizers, and the running average of G that draws: what a step changes and a checkpoint holds.

    The first weights come from --seed, so that all ranks begin alike, and the gradients' mean keeps them so.
    """

    def __init__(self, args, device, world=1):
        self.args, self.device, self.world = args, device, world
        torch.manual_seed(args.seed)
        G = Generator(args.image_size, args.nz, args.ngf, 3, args.kernel_size).apply(init_weights)
        D = Discriminator(args.image_size, args.ndf, 3, args.kernel_size).apply(init_weights)
        self.G, self.D = (net.to(device.type, memory_format=device.layout) for net in (G, D))
        self.G_ema = copy.deepcopy(self.G).requires_grad_(False)
        # AdamW with weight decay 0 is Adam
        kwargs = dict(lr=args.lr, betas=(args.beta1, 0.999), eps=1e-8, weight_decay=args.weight_decay)
        self.opt_G, self.opt_D = (device.AdamW(net.parameters(), **kwargs) for net in (self.G, self.D))
        self.scaler = torch.amp.GradScaler(device.type, enabled=device.precision == "fp16")

    def step(self, frames):
        """uint8 frames (N, H, W, 3) → float32 (5,) on the device, as STATS names it: one update of D, then one of G.

        To update D five times a step, multiply --batch-size by five and split frames into parts. A gradient penalty
        needs second derivatives, which compiled networks do not have: --no-compile. Nothing here may call .item(): it
        would wait for the device, and can't be captured.
        """
        args, G, D = self.args, self.G, self.D
        real = cut_windows(frames, args.image_size, args.mirror)
        z = torch.empty(len(frames), args.nz, device=self.device.type)
        z = z.normal_() if args.latent == "normal" else z.uniform_(-1, 1)

        with self.autocast():
            fake = G(z)
            on_real, on_fake = self.logits(real), self.logits(fake.detach())  # apart: each has its own batch statistics
        loss_D = bce(on_real, 1.0) + bce(on_fake, 0.0)  # outside autocast: in fp32, whatever its ops
        self.update(self.opt_D, loss_D)

        D.requires_grad_(False)  # its gradients are not wanted now: a quarter of D's backward
        with self.autocast():
            on_fake_after = self.logits(fake)  # the same fakes, seen by the better D
        loss_G = bce(on_fake_after, 1.0)
        self.update(self.opt_G, loss_G)
        D.requires_grad_(True)

        with torch.no_grad():
            for average, weight in zip(self.G_ema.parameters(), G.parameters()):
                average.lerp_(weight, 1 - EMA)
        probabilities = [logits.detach().sigmoid().mean() for logits in (on_real, on_fake, on_fake_after)]
        return torch.stack([loss_D.detach(), loss_G.detach(), *probabilities])

    def autocast(self):
        """One a forward pass: it caches weights in bf16, which an optimizer's step makes stale."""
        dtype = DTYPES[self.device.precision]
        return nullcontext() if dtype == torch.float32 else torch.autocast(self.device.type, dtype)

    def logits(self, images):
        """D's, float32 (N,), of images with instance noise."""
        if std := self.args.instance_noise:
            images = images + std * torch.randn(images.shape, device=images.device)  # the same in any memory layout
        return self.D(images).float()

    def update(self, optimizer, loss):
        optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.device.mark_step()
        if self.world > 1:  # the mean over the ranks, in one message
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
            dist.all_reduce(together := torch.cat([g.flatten() for g in gradients]))
            for g, part in zip(gradients, together.split([g.numel() for g in gradients])):
                g.copy_(part.view(g.shape) / self.world)
        self.scaler.step(optimizer)
        self.scaler.update()
        self.device.mark_step()

    def drawing_G(self):
        """The average of G in eval mode, its batch statistics taken afresh over 1,024 latents.

        Those of the G in training are of a batch or so, and of other weights. It keeps them.
        """
        z = latents(range(1024), self.args.nz, self.args.latent).to(self.device.type)
        update_bn(z.split(64), self.G_ema)
        return self.G_ema.eval()

    def state(self):
        """What load() needs to go on bit for bit: tensors, on the CPU, and plain values."""
        nets = {name: cpu_state(getattr(self, name)) for name in ("G", "D", "G_ema")}
        optimizers = {name: adam_state(getattr(self, name)) for name in ("opt_G", "opt_D")}
        return {**nets, **optimizers, "scaler": self.scaler.state_dict()}

    def load(self, saved):
        self.G.load_state_dict(saved["G"])
        self.D.load_state_dict(saved["D"])
        self.G_ema.load_state_dict(saved.get("G_ema", saved["G"]))  # older checkpoints have no average
        load_adam_state(self.opt_G, saved["opt_G"])
        load_adam_state(self.opt_D, saved["opt_D"])
        if saved["scaler"]:  # it was fp16
            self.scaler.load_state_dict(saved["scaler"])


def bce(logits, target):
    """Binary cross-entropy of logits (N,) with one target, 1.0 for real or 0.0 for fake: the mean."""
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


def cpu_state(net):
    return {name: tensor.cpu() for name, tensor in net.state_dict().items()}


def adam_state(optimizer):
    """Step count and moments, in one form for torch's AdamW, which counts by parameter, and Gaudi's, by group."""
    group = optimizer.param_groups[0]
    states = [optimizer.state[p] for p in group["params"] if optimizer.state.get(p)]  # none before the first step
    step = max(int(counts.get("step", 0)) for counts in (group, *states[:1]))
    return {"step": step, **{key: [state[key].cpu() for state in states] for key in ("exp_avg", "exp_avg_sq")}}


def load_adam_state(optimizer, saved):
    if not saved["step"]:
        return
    group = optimizer.param_groups[0]
    for p, *moments in zip(group["params"], saved["exp_avg"], saved["exp_avg_sq"], strict=True):
        state = {key: torch.zeros_like(p).copy_(m) for key, m in zip(("exp_avg", "exp_avg_sq"), moments)}
        state["step"] = torch.tensor(float(saved["step"]), device=p.device if group.get("fused") else "cpu")
        optimizer.state[p] = state
    if group["params"][0].device.type == "hpu":
        group["step"] = saved["step"]


# ---- devices: what each needs, and what runs in which precision ------------------------------------------------------

def set_up_device(args, local):
    """A namespace: what on_cuda, on_hpu or on_cpu says for process `local` of this machine, and type, precision, lists.

    type is 'cuda', 'hpu' or 'cpu'; precision 'fp32', 'bf16' or 'fp16'; lists the ops in low precision and those in
    fp32, or None. For another device: a function like on_cpu and its entry below, and in model.py one like why_no_hpu
    with its entry in MISSING.
    """
    gaudi = args.device in ("auto", "hpu") and find_spec("habana_frameworks") is not None  # it may be
    lists = op_lists(args, gaudi)
    if lists and gaudi:
        give_to_plugin(lists)  # before it loads, which is when it reads them
    kind = choose_device(args.device).type
    device = {"cuda": on_cuda, "hpu": on_hpu, "cpu": on_cpu}[kind](local)
    precision = device.auto_precision if args.precision == "auto" else args.precision
    if kind == "hpu" and precision == "fp16":
        raise InputError("--precision fp16 is for GPUs without bf16, and hpu has it: leave the option out")
    if kind != "hpu" and (lists := op_lists(args)):
        precision = "bf16" if precision == "fp32" else precision  # lists ask for mixed precision, fast here or not
        patch_autocast(lists, kind, DTYPES[precision])
    device.type, device.precision, device.lists = kind, precision, lists
    return device


def on_cuda(local):
    if local >= torch.cuda.device_count():
        raise InputError(f"process {local + 1} of this machine, and {torch.cuda.device_count()} GPUs: start one a GPU")
    torch.cuda.set_device(local)
    torch.backends.cudnn.benchmark = True  # shapes never change
    torch.backends.cudnn.allow_tf32 = False  # fp32 is fp32; for speed there is bf16
    warnings.filterwarnings("ignore", message="This instance was constructed with capturable=True")  # without a graph
    capability = torch.cuda.get_device_capability()
    return SimpleNamespace(
        name=torch.cuda.get_device_name(),
        backend="nccl",
        auto_precision="bf16" if capability >= (8, 0) else "fp16",
        layout=torch.channels_last,  # as tensor cores want it
        AdamW=functools.partial(torch.optim.AdamW, fused=True, capturable=True),  # one kernel, that a graph may hold
        mark_step=lambda: None,
        graph=graphed,
        compiler="inductor" if capability >= (7, 0) and find_spec("triton") and c_compiler() else None,
        compiling_pays=True,
        seed=torch.cuda.manual_seed,
        free_memory=lambda: torch.cuda.mem_get_info()[0],  # bytes
        peak_memory=torch.cuda.max_memory_allocated)


def on_hpu(local):
    from habana_frameworks.torch.core import mark_step
    from habana_frameworks.torch.hpex.optimizers import FusedAdamW
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        import habana_frameworks.torch.distributed.hccl  # noqa: F401  makes the backend known
    lazy = os.environ.get("PT_HPU_LAZY_MODE") == "1"
    return SimpleNamespace(
        name=torch.hpu.get_device_name(),
        backend="hccl",
        auto_precision="bf16",
        layout=torch.contiguous_format,  # it has one of its own
        AdamW=FusedAdamW,
        mark_step=mark_step,  # in lazy mode the ops collected so far go to the card; eager mode ignores it
        graph=lambda step: step,
        compiler=None if lazy else "hpu_backend",
        compiling_pays=not lazy,
        seed=lambda seed: getattr(torch.hpu, "random", torch.hpu).manual_seed_all(seed),
        free_memory=lambda: torch.hpu.mem_get_info()[0] if hasattr(torch.hpu, "mem_get_info") else 16 * 2 ** 30,
        peak_memory=torch.hpu.max_memory_allocated)


def on_cpu(local):
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 2 ** 33
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # on this machine, which they share
    return SimpleNamespace(
        name=f"{torch.get_num_threads()} CPU threads",
        backend="gloo",
        auto_precision="bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32",
        layout=torch.channels_last,
        AdamW=functools.partial(torch.optim.AdamW, fused=True),
        mark_step=lambda: None,
        graph=lambda step: step,
        compiler="inductor" if c_compiler() else None,
        compiling_pays=False,  # it gains 3%
        seed=torch.default_generator.manual_seed,
        free_memory=lambda: memory / processes,
        peak_memory=None)


def c_compiler():
    return any(map(shutil.which, ("cc", "gcc", "clang", "cl")))


# Mixed precision, op by op. On hpu these lists replace the plugin's own; --bf16-ops and --fp32-ops change them.
# Convolutions, matrix products and activations are safe in bf16; batch norm's statistics want fp32's digits. The other
# fp32 ops are those that losses are made of: they matter to a loss inside autocast, and step() has its own outside.
BF16_OPS = "conv2d conv_transpose2d linear addmm mm bmm matmul relu leaky_relu tanh".split()
FP32_OPS = "batch_norm binary_cross_entropy_with_logits sigmoid softplus mean sum div exp log pow rsqrt".split()
NORMS = {"batch_norm", "layer_norm", "group_norm", "instance_norm"}  # the plugin lowers their input alone
KEPT = []  # what has to live as long as the lists are in force
GAUDI_LISTS = {"bf16_ops": "PT_HPU_AUTOCAST_LOWER_PRECISION_OPS_LIST", "fp32_ops": "PT_HPU_AUTOCAST_FP32_OPS_LIST"}


def op_lists(args, gaudi=False):
    """(ops in low precision, ops in fp32), or None where torch's own autocast decides: no list asked for, and no Gaudi.

    Lists that a launch script put into the plugin's variables count as asked for.
    """
    typed = [getattr(args, key) or (os.environ.get(env) if gaudi else None) for key, env in GAUDI_LISTS.items()]
    if args.precision == "fp32" and (args.bf16_ops or args.fp32_ops):
        raise InputError("--bf16-ops and --fp32-ops need mixed precision: leave out --precision fp32, or the lists")
    if args.precision == "fp32" or not (gaudi or any(typed)):
        return None
    low, high = op_list(typed[0], BF16_OPS, "--bf16-ops"), op_list(typed[1], FP32_OPS, "--fp32-ops")
    if both := sorted(set(low) & set(high)):
        raise InputError(f"{both[0]} is on both lists: take it off one, as with --fp32-ops=-{both[0]}")
    return low, high


def op_list(text, default, flag):
    """Op names from what was typed: a file with one a line, 'relu,tanh', or '+relu,-tanh' to change the default."""
    if text is None:
        return sorted(default)
    lines = Path(text).read_text(errors="replace").splitlines() if os.path.isfile(text) else [text]
    names = [name for line in lines for name in line.split("#")[0].replace(",", " ").split()]
    ops = set(default) if names and all(n[0] in "+-" for n in names) else set()
    for name in names:
        op = name.lstrip("+-")
        if not op.isidentifier() or not isinstance(getattr(torch.ops.aten, op, None), torch._ops.OpOverloadPacket):
            raise InputError(f"{flag} {text}: there is no such file, and torch has no op named '{op}'")
        if name.startswith("-") and op not in ops:
            raise InputError(f"{flag} {text}: {op} is not on the list")
        ops.discard(op) if name.startswith("-") else ops.add(op)
    if not ops:
        raise InputError(f"{flag} {text}: no op in it")
    return sorted(ops)


def give_to_plugin(lists):
    """Files with the lists, an op a line, where Gaudi's plugin looks for them as it loads."""
    KEPT.append(folder := tempfile.TemporaryDirectory(prefix="op-lists-"))
    for ops, env in zip(lists, GAUDI_LISTS.values()):
        path = Path(folder.name, env)
        path.write_text("\n".join(ops) + "\n")
        os.environ[env] = str(path)


def patch_autocast(lists, device_type, dtype):
    """On all but hpu: what autocast does for a listed op becomes cast_and_call. torch.compile traces through it.

    A listed op costs one level of Python, and the others nothing.
    """
    functorch.config.enable_autograd_cache = False  # it would take a network compiled under other lists for this one
    KEPT.append(library := torch.library.Library("aten", "IMPL", f"Autocast{device_type.upper()}"))
    for ops, target in zip(lists, (dtype, torch.float32)):
        for name in ops:
            packet = getattr(torch.ops.aten, name)
            for overload in packet.overloads():
                op = getattr(packet, overload)
                with warnings.catch_warnings():  # that it replaces torch's own rule for the op is the point
                    warnings.simplefilter("ignore")
                    library.impl(op, functools.partial(cast_and_call, op, device_type, target, name in NORMS))


def cast_and_call(op, device_type, target, input_alone, *xs, **kwargs):
    """op(*xs, **kwargs) with autocast off, and all floating-point tensors in xs, or the first alone, cast to target."""
    cast = [x.to(target) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in xs]
    with torch.autocast(device_type, enabled=False):
        return op(cast[0], *xs[1:], **kwargs) if input_alone else op(*cast, **kwargs)


# ---- speed ----------------------------------------------------------------------------------------------------------

def make_fast(model, args, rank, images_to_go):
    """train_step(frames, step) → statistics: model.step, compiled where that pays, and on CUDA as one graph.

    By estimate compiling takes a minute and saves a tenth: it pays from ten minutes on, some 2e7 images of naive-64.
    What a step draws on the device is seeded by its number, so that a resumed run needs no other state.
    """
    device = model.device
    wanted = args.compile
    if wanted is None:
        wanted = device.compiling_pays and images_to_go > 2e7 and (args.minutes or 10) >= 10
    if wanted and not device.compiler:
        needs = "--compile needs a C compiler, on cuda Triton and compute capability 7.0, on hpu PT_HPU_LAZY_MODE=0"
        if args.compile:
            raise InputError(needs)
        if rank == 0:
            print(f"not compiled: {needs}", flush=True)
    elif wanted:
        for net in (model.G, model.D):
            net.compile(backend=device.compiler)
    captured = args.graph and device.precision != "fp16"  # whose scaler looks at gradients
    run_step = device.graph(model.step) if captured else model.step

    def train_step(frames, step):
        device.seed(int(np.random.SeedSequence((args.seed, rank, step)).generate_state(1)[0]))
        return run_step(frames)

    return train_step


def graphed(step):
    """The step as one CUDA graph, cropping and noise included: a replay costs the host a launch instead of hundreds."""
    stream, graph, frames, stats, calls = torch.cuda.Stream(), torch.cuda.CUDAGraph(), None, None, 0

    def replay(batch):
        nonlocal frames, stats, calls
        calls += 1
        if calls <= 5:  # real steps all the same: cudnn chooses its kernels, the optimizers make their state
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                stats = step(batch)
            torch.cuda.current_stream().wait_stream(stream)
            return stats
        if frames is None:  # it records, and runs nothing; meanwhile other threads may pin memory or ask for events
            frames = batch.clone()
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                stats = step(frames)
        frames.copy_(batch)
        graph.replay()
        return stats.clone()

    return replay


# ---- the run's folder -----------------------------------------------------------------------------------------------

def claim(args):
    """Make the run's folder, or refuse an earlier run's, or one in training: ours while the returned file is open."""
    out = Path(args.out)
    ours = {".lock", "samples", "args.json.tmp"}  # what a run leaves that is killed at once
    there = out.exists() and (not out.is_dir() or {p.name for p in out.iterdir()} - ours)
    if there and not args.resume:
        raise InputError(f"{out} is there already: --resume goes on with it, --out names another folder")
    (out / "samples").mkdir(parents=True, exist_ok=True)
    lock = open(out / ".lock", "w")
    try:
        fcntl and fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{out} is being trained by another process: name another --out, or wait") from None
    newest, previous = checkpoints(out)
    if args.resume and newest.exists() and previous.exists() and load_first([newest, previous])[0] == previous:
        os.replace(newest, out / "damaged.pt")  # else the next save would put it in the sound one's place
    return lock


class Saver:
    """Writes files of tensors behind the training: a slow disk stalls nothing, and a kill leaves no damaged file."""

    def __init__(self, out):
        self.out, self.pool, self.failed = Path(out), ThreadPoolExecutor(1), None
        self.job = self.pool.submit(lambda: None)

    def save(self, files, needed=True):
        """{name: content}: snapshot now, write behind. What the disk refuses is a warning, and stays in `failed`.

        What is not needed is left out while the last save is still being written.
        """
        if not (needed or self.job.done()):
            print("warning: the disk is still writing the last checkpoint; this one is left out", file=sys.stderr)
            return
        snapshot = {}
        for name, content in files.items():
            torch.save(content, buffer := io.BytesIO(), pickle_protocol=2)  # Gaudi's default, 4, opens nowhere else
            snapshot[name] = buffer.getbuffer()
        self.job = self.pool.submit(self.write, snapshot)  # one after the other

    def write(self, snapshot):
        newest, previous = checkpoints(self.out)
        try:
            for name, data in snapshot.items():
                write_file(self.out / name, data, previous=previous if name == newest.name else None)
            if newest.name in snapshot:
                self.failed = None
        except OSError as error:
            self.failed = f"no checkpoint at {self.out}: {error.strerror or error}"
            print(f"warning: {self.failed}; training goes on", file=sys.stderr)


class Keeper:
    """What rank 0 shows and keeps of a run: log lines, TensorBoard's events, checkpoints, grids, scores.

    A full disk costs it warnings; training goes on.
    """

    def __init__(self, args, pack, model, step, images, total, ends):
        """The run is at `step` and `images` of `total`, and is over when time.monotonic() is `ends`."""
        self.args, self.pack, self.model, self.total, self.ends = args, pack, model, total, ends
        self.out, self.saver, device = Path(args.out), Saver(args.out), model.device
        print(f"{args.preset} in {device.precision} on {model.world} × {device.name}: {len(pack.train):,} frames of "
              f"{pack.folder}, run {args.out} from image {images:,} of {total:,}", flush=True)
        for which, ops in zip(("low precision", "fp32"), device.lists or ()):
            print(f"ops in {which}: {' '.join(ops)}")
        low, high = device.lists or (None, None)
        in_force = dict(device=device.name, world=model.world, precision=device.precision, bf16_ops=low, fp32_ops=high)
        arguments = {**vars(args), "launch": LAUNCH, "in_force": in_force}
        write_file(self.out / "args.json", (json.dumps(arguments, indent=1) + "\n").encode())

        self.writer, self.resting_until = None, 0.0
        self.purge_step = images + 1  # on --resume, TensorBoard's events past the checkpoint are void
        threading.excepthook = lambda thread: (  # a full disk ends the writer's thread, and our next call to it says so
            issubclass(thread.exc_type, OSError) or threading.__excepthook__(thread))
        plain = {name: value for name, value in arguments.items() if isinstance(value, (int, float, str))}
        self.show(lambda writer: writer.add_hparams(plain, {}, run_name="."))
        real = cut_windows(torch.from_numpy(pack.train[:64].copy()), args.image_size, args.mirror)
        self.show(lambda writer: writer.add_image("real", make_grid(real, normalize=True, value_range=(-1, 1)), images))

        table = self.out / "scores.csv"
        self.scores = table.read_text().splitlines() if table.exists() else ["images,score,floor"]
        self.best = min((float(row.split(",")[1]) for row in self.scores[1:]), default=math.inf)
        try:
            self.score = Score(pack)
        except InputError as why:
            self.score = None
            print(f"no score: {why}", flush=True)
        self.due = time.monotonic() + 60 * args.save_minutes
        if not images:
            print(f"untrained{self.keep(step, images, wait=True)}", flush=True)
            if self.saver.failed:  # better now than after a day
                raise InputError(self.saver.failed)

    def show(self, add):
        """Call add(SummaryWriter); a minute after a failure it tries again with a new one, which is a new file."""
        if time.monotonic() < self.resting_until:
            return
        try:
            if not self.writer:
                self.writer, self.purge_step = SummaryWriter(self.out, purge_step=self.purge_step), None
            add(self.writer)
            self.writer.flush()
        except Exception as error:  # the writer's thread passes on whatever stopped it
            print(f"warning: nothing shown at {self.out}: {error}; training goes on", file=sys.stderr)
            self.writer, self.resting_until = None, time.monotonic() + 60

    def log(self, step, images, values, rate, waiting, last):
        """The log line that everybody knows from DCGAN, its numbers for TensorBoard, and keep() where that is due."""
        args, images_a_step = self.args, self.args.batch_size * self.model.world
        left = max(0, self.total - images)
        seconds = max(0, min(left / rate, self.ends - time.monotonic()))
        epoch = min(args.epochs, math.ceil(images / len(self.pack.train)))
        loss_D, loss_G, on_real, on_fake, on_fake_after = values[:5]  # what else STATS names is in TensorBoard alone
        line = (f"[{epoch}/{args.epochs}][{step}/{step + math.ceil(left / images_a_step)}] "
                f"Loss_D {loss_D:.4f} Loss_G {loss_G:.4f} "
                f"D(x) {on_real:.4f} D(G(z)) {on_fake:.4f} / {on_fake_after:.4f}  "
                f"{rate:,.0f} images/s, {timedelta(seconds=round(seconds))} left")
        shown = {**dict(zip(STATS, values)), "images/s": rate, "share of time waiting for data": waiting}
        if peak_memory := self.model.device.peak_memory:
            shown["device memory (GB)"] = peak_memory() / 1e9
        self.show(lambda writer: [writer.add_scalar(name, value, images) for name, value in shown.items()])
        kept = self.keep(step, images, last) if last or time.monotonic() > self.due else ""
        print(line + kept, flush=True)

    def keep(self, step, images, wait=False):
        """Save a checkpoint, then draw seeds 0-63 and score them; returns the score in words, for the log line.

        Due again not before 40 times as long as it took: under 3% of the time, also where drawing is slow, as on a CPU.
        """
        check_weights(self.model, step)
        began, args, G = time.monotonic(), self.args, self.model.drawing_G()
        about = {"format": FORMAT, "images": images, "latent": args.latent}
        generator = {**about, "G": cpu_state(G)}
        checkpoint = {**about, "step": step, **self.model.state()}
        self.saver.save({f"generator-{images:09d}.pt": generator, "checkpoint.pt": checkpoint}, needed=wait)
        grid = make_grid(render(G, latents(range(64), args.nz, args.latent)))
        score = self.score(G, args.latent) if self.score else math.inf
        if self.score:
            self.scores.append(f"{images},{score:.2f},{self.score.floor:.2f}")
        if score < self.best:
            self.best = score
            self.saver.save({"generator-best.pt": generator})

        def add(writer):
            writer.add_image("samples", grid, images)
            Image.fromarray(grid.permute(1, 2, 0).numpy()).save(self.out / "samples" / f"{images:09d}.png")
            if self.score:
                writer.add_scalar("score/generated", score, images)
                writer.add_scalar("score/real images", self.score.floor, images)
                write_file(self.out / "scores.csv", "\n".join([*self.scores, ""]).encode())

        self.show(add)
        if wait:
            self.saver.job.result()
        now = time.monotonic()
        self.due = now + (args.save_minutes and max(60 * args.save_minutes, 40 * (now - began)))
        return f", score {score:.1f} (real images {self.score.floor:.1f})" if self.score else ""

    def end(self, images):
        self.show(lambda writer: writer.close())
        if self.saver.failed:
            sys.exit(f"error: {self.saver.failed}")
        print(f"{self.out} is at image {images:,} of {self.total:,}; see it with: "
              f"python sample.py --checkpoint {self.out}", flush=True)


def check_losses(values, step):
    """Exit where a loss of the steps up to this one is not finite."""
    for at, (loss_D, loss_G, *_) in enumerate(values, step - len(values) + 1):
        if not math.isfinite(loss_D + loss_G):
            stop_at(f"step {at}: Loss_D is {loss_D}, Loss_G {loss_G}")


def check_weights(model, step):
    """Exit where a weight about to be saved is not finite: the loss would be, one step later."""
    if not all(tensor.isfinite().all() for net in (model.G, model.D) for tensor in net.state_dict().values()):
        stop_at(f"step {step}: a weight is infinite or no number")


def stop_at(problem):
    sys.exit(f"error: {problem}. The last checkpoint is from before; --resume from it with a lower --lr or "
             "--precision fp32")


# ---- processes and the loop -----------------------------------------------------------------------------------------

def join_processes(device, world):
    """agree(n) → the largest n of torchrun's processes, one a device. It waits for all of them, through their hosts."""
    if world == 1:
        return lambda n=0: n
    # torchrun's store outlives a restart, and what the dead wrote into it would mislead the living. (Of several
    # machines the counts may differ.)
    store, rank, _ = next(dist.rendezvous("env://"))
    if os.environ.get("LOCAL_WORLD_SIZE") == str(world):
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(device.backend, store=store, rank=rank, world_size=world)
    hosts = dist.new_group(backend="gloo", timeout=timedelta(days=1))  # preparing a pack takes its time

    def agree(n=0):
        dist.all_reduce(n := torch.tensor(n), dist.ReduceOp.MAX, group=hosts)
        return int(n)

    return agree


def find_data(args, rank, local, world, agree):
    """The pack to train on, prepared if need be: by rank 0, and by a rank of each machine that has another disk."""
    for turn in (rank == 0, local == 0, True):
        path = prepare_data.find_pack(args.data, args.image_size) if turn else None
        agree()
    pack = prepare_data.open_pack(path)
    if pack.image_size != args.image_size:
        raise InputError(f"{path} is for images of {pack.image_size} pixels, not of {args.image_size}: "
                         f"choose --image-size {pack.image_size}, or prepare another pack")
    if args.batch_size * world > len(pack.train):
        raise InputError(f"--batch-size {args.batch_size} × {world} process(es) is more than the {len(pack.train)} "
                         f"images of {path}")
    return pack


def load_checkpoint(model, args):
    """Load the newest checkpoint of args.out; returns its step and images, 0 where there is none yet."""
    if not any(path.exists() for path in checkpoints(args.out)):
        return 0, 0
    path, saved = load_first(checkpoints(args.out))
    try:
        model.load(saved)
        return int(saved["step"]), int(saved["images"])
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path} does not fit this network: {str(error).splitlines()[-1].strip()}") from None


def main(argv=None):
    args = parse_args(argv)
    ends = time.monotonic() + 60 * (args.minutes or math.inf)
    rank, local, world = (int(os.environ.get(name, default)) for name, default in
                          (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))  # from torchrun
    device = set_up_device(args, local)
    agree = join_processes(device, world)
    pack = find_data(args, rank, local, world, agree)
    lock = claim(args) if rank == 0 else None  # noqa: F841  the folder is ours as long as this lives
    agree()

    model = DCGAN(args, device, world)
    step, images = load_checkpoint(model, args) if args.resume else (0, 0)  # done so far; images of all ranks
    if agree(images) != images:
        raise InputError(f"--resume: every rank reads {args.out}, and it is not the same on all machines")
    images_a_step = args.batch_size * world
    total = math.ceil(args.epochs * len(pack.train) / images_a_step) * images_a_step
    train_step = make_fast(model, args, rank, (total - images) / world)
    stream = batches(pack, args, device, rank, world, images)
    keeper = Keeper(args, pack, model, step, images, total, ends) if rank == 0 else None

    notice = []  # a spot machine's SIGTERM, or Ctrl-C: finish the step, save, go
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda signum, frame: notice.append(signum))
    history, since, waited, leave = [], time.perf_counter(), 0.0, 0
    while images < total and not leave:
        frames, seconds = next(stream)
        history.append(train_step(frames, step))
        step, images, waited = step + 1, images + images_a_step, waited + seconds
        if world == 1 or step % 10 == 0:  # a notice to one rank is a notice to all, and so is the time's end
            leave = agree(notice[0] if notice else int(time.monotonic() > ends))
        last = images >= total or leave
        if step % args.log_every == 0 or last:
            values = torch.stack(history).tolist()  # the one copy back from the device; it waits for the steps so far
            check_losses(values, step)
            took = time.perf_counter() - since
            if keeper:
                keeper.log(step, images, values[-1], len(history) * images_a_step / took, waited / took, last)
            history, since, waited = [], time.perf_counter(), 0.0

    if keeper:
        keeper.end(images)
    agree()  # until rank 0 has saved
    del train_step  # NCCL's end waits for the graph that holds its messages
    if world > 1:
        dist.destroy_process_group()
    if notice:  # the usual end by this signal, for whoever waits for our status
        raise KeyboardInterrupt(notice[0])
    return model


if __name__ == "__main__":
    run(main)
