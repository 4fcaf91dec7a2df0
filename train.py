"""Train a DCGAN on street scenes (or any images).

    python train.py                                        # draws its own streets: five minutes on a laptop
    python train.py --data packs/streets --minutes 60      # a pack from prepare_data.py, or raw images, packed once
    python train.py --device hpu --data /mnt/gp3/msls --preset clamp-64
    torchrun --nproc-per-node 8 train.py --device hpu --data packs/msls
    python train.py --data packs/streets --resume          # go on where the run stopped
    python train.py --benchmark --price 13.11              # trains nothing, saves nothing: a row for the speed table

A run is a folder: checkpoint.pt, generator-<images>.pt, generator-best.pt, samples/<images>.png, scores.csv, args.json
and TensorBoard's events (tensorboard --logdir runs). The losses are Goodfellow's (2014, section 3, the non-saturating
form for G). To change the loss or the step, see DCGAN; what it is fed, batches; a device, set_up_device and make_fast.
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

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two runs apart there
    fcntl = None

import numpy as np

from model import (FORMAT, PRESETS, Discriminator, Generator, InputError, Parser, Score, checkpoints, choose_device,
                   cut_windows, init_weights, latents, load_first, number, render, run,
                   write_file)  # before torch, which would load Gaudi's plugin by itself

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.optim.swa_utils import update_bn
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.tensorboard import SummaryWriter
from PIL import Image
from torchvision.utils import make_grid

import prepare_data

STATS = ("Loss_D", "Loss_G", "D(x)", "D(G(z1))", "D(G(z2))")  # what a step returns
EMA = 0.995  # of the average of G that draws, a step: it forgets in some 200 steps


# ---- arguments ------------------------------------------------------------------------------------------------------

DEMO = dict(epochs=1000, minutes=4.5, save_minutes=1)  # without --data: streets to see in five minutes on two CPU cores


def launch():
    """What tells one start of torchrun from another, and is the same after its restarts."""
    return f"{os.environ.get('TORCHELASTIC_RUN_ID')} {os.getppid()}"


def parse_args(argv=None):
    """argparse.Namespace of what is in force: the command line over the resumed run's arguments over the preset's."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    share, many, dollars = number(float, 0, 1), number(int, 1), number(float, 0)
    add = parser.add_argument
    add("--data", help="a pack, an MSLS tree, a folder of its archives, or any images (default: drawn streets)")
    add("--preset", choices=PRESETS, help="what the second list holds (default: naive-64, and demo-64 without --data)")
    add("--out", help="the run's folder (default: runs/<preset>)")
    add("--resume", action="store_true", help="go on from the newest sound checkpoint in --out")
    add("--device", choices=("auto", "cuda", "hpu", "cpu"), default="auto", help="where to train (default: auto)")
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
    add("--log-every", type=many, default=50, help="steps between log lines; others copy nothing back (default: 50)")
    add("--profile", action="store_true", help="write a torch.profiler trace of some steps for TensorBoard")
    add("--benchmark", nargs="?", const=10, type=number(float, 0.1), metavar="SECONDS", help="measure, keep nothing")
    add("--price", type=dollars, help="dollars an hour, for --benchmark")
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
    add("--weight-decay", type=share, help="AdamW's")
    add("--instance-noise", type=share, help="std of the noise on D's input")

    typed = parser.parse_args(argv)  # once to learn where defaults come from, and once more with them
    demo = not (typed.data or typed.preset or typed.benchmark)
    preset = typed.preset or ("demo-64" if demo else "naive-64")
    out = Path(typed.out or f"runs/{preset}")
    try:
        saved = dict(json.loads((out / "args.json").read_text()), profile=False)
    except (OSError, ValueError, TypeError):
        saved = {}
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0 and saved.get("launch") == launch()
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


# ---- precision and device -------------------------------------------------------------------------------------------

# Mixed precision, op by op. On hpu these lists replace the plugin's own; --bf16-ops and --fp32-ops change them.
# Convolutions and what is element-wise are cheap and safe in bf16; statistics and the loss want fp32's digits.
BF16_OPS = "conv2d conv_transpose2d linear addmm mm bmm matmul relu leaky_relu tanh".split()
FP32_OPS = "batch_norm binary_cross_entropy_with_logits sigmoid softplus mean sum div exp log pow rsqrt".split()
NORMS = {"batch_norm", "layer_norm", "group_norm", "instance_norm"}  # the plugin lowers their input alone
GAUDI_LISTS = {"bf16_ops": "PT_HPU_AUTOCAST_LOWER_PRECISION_OPS_LIST", "fp32_ops": "PT_HPU_AUTOCAST_FP32_OPS_LIST"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KEPT = []  # what has to live as long as the op lists are in force


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


def op_lists(args, gaudi=False):
    """(ops in low precision, ops in fp32), or None where torch's own autocast decides: no list asked for, and no Gaudi.

    Lists that a launch script put into the plugin's variables count as asked for.
    """
    typed = {key: getattr(args, key) or (os.environ.get(env) if gaudi else None) for key, env in GAUDI_LISTS.items()}
    if args.precision == "fp32":
        if args.bf16_ops or args.fp32_ops:
            raise InputError("--bf16-ops and --fp32-ops need mixed precision: leave out --precision fp32, or the lists")
        return None
    if not gaudi and not any(typed.values()):
        return None
    low = op_list(typed["bf16_ops"], BF16_OPS, "--bf16-ops")
    high = op_list(typed["fp32_ops"], FP32_OPS, "--fp32-ops")
    if both := sorted(set(low) & set(high)):
        raise InputError(f"{both[0]} is on both lists: take it off one, as with --fp32-ops=-{both[0]}")
    return low, high


def apply_op_lists(lists, device, dtype=None):
    """Make autocast obey the lists: on hpu by files for the plugin, which reads them as it loads, elsewhere at once.

    There an op's autocast kernel becomes: cast its floating-point arguments, then call it with autocast off. That is
    one level of Python for a listed op, and nothing for the others; torch.compile traces through it.
    """
    if device == "hpu":
        KEPT.append(folder := tempfile.TemporaryDirectory(prefix="op-lists-"))
        for ops, env in zip(lists, GAUDI_LISTS.values()):
            path = Path(folder.name, env)
            path.write_text("\n".join(ops) + "\n")
            os.environ[env] = str(path)
        return
    KEPT.append(library := torch.library.Library("aten", "IMPL", f"Autocast{device.upper()}"))
    for ops, target in zip(lists, (dtype, torch.float32)):
        for name in ops:
            packet = getattr(torch.ops.aten, name)
            for overload in (getattr(packet, o) for o in packet.overloads()):
                def kernel(*xs, op=overload, first=name in NORMS, target=target, **kw):
                    def cast(x):
                        return x.to(target) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
                    with torch.autocast(device, enabled=False):
                        return op(cast(xs[0]), *xs[1:], **kw) if first else op(*map(cast, xs), **kw)
                with warnings.catch_warnings():  # that it replaces torch's own rule for the op is the point
                    warnings.simplefilter("ignore")
                    library.impl(overload, kernel)


def set_up_device(args, local):
    """(torch.device, 'fp32' | 'bf16' | 'fp16', op lists or None) of the process numbered `local` on this machine."""
    gaudi = args.device == "hpu" or (args.device == "auto" and not torch.cuda.is_available()
                                     and find_spec("habana_frameworks") is not None)
    lists = op_lists(args, gaudi)
    if lists and gaudi:
        apply_op_lists(lists, "hpu")  # before the plugin, which reads them as it loads
    device, precision = choose_device(args.device), args.precision
    if device.type == "hpu":
        if precision == "fp16":
            raise InputError("--precision fp16 is for GPUs without bf16, and hpu has it: leave the option out")
        return device, "bf16" if precision == "auto" else precision, lists
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise InputError(f"process {local + 1} of this machine, and {torch.cuda.device_count()} GPUs: start one a GPU")
        torch.cuda.set_device(local)
        torch.backends.cudnn.benchmark = True  # shapes never change
        torch.backends.cudnn.allow_tf32 = False  # fp32 is fp32; for speed there is bf16
        fast = "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"
    else:
        fast = "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"
    precision = fast if precision == "auto" else precision
    if lists := op_lists(args):
        precision = "bf16" if precision == "fp32" else precision  # lists ask for mixed precision, fast here or not
        apply_op_lists(lists, device.type, DTYPES[precision])
    return device, precision, lists


# ---- data: uint8 frames, from the pack to the device ----------------------------------------------------------------

def row_batches(n, frame_bytes, batch, seed, start, advise=lambda rows: None):
    """Without end: int64 (batch,) row numbers of n frames, every row once an epoch, from image `start` of the run on.

    Chunks of rows that stand together on the disk (1 MB, read at its full rate) come in random order; a pool of them
    (256 MB: thousands of frames from hundreds of places) is shuffled frame by frame. A pool is announced to `advise`
    one pool ahead. A batch may reach over the end of an epoch: it is never short, so shapes are static.
    """
    chunk = max(1, 2 ** 20 // frame_bytes)
    rows, skip = np.empty(0, np.int64), start % n
    for epoch in itertools.count(start // n):
        rng = np.random.default_rng((*seed, epoch))
        chunks = rng.permutation(-(-n // chunk))
        for pool in np.split(chunks, range(256, len(chunks), 256)):
            pool = (pool[:, None] * chunk + np.arange(chunk)).ravel()
            pool = rng.permutation(pool[pool < n])
            advise(pool)
            rows, skip = np.concatenate([rows, pool])[skip:], max(0, skip - len(rows) - len(pool))
            while len(rows) >= batch + len(pool):  # the newest pool waits: the disk is still reading it
                yield rows[:batch]
                rows = rows[batch:]


def batches(pack, args, device, rank, world, start):
    """Without end: (uint8 (batch, H, W, 3) on the device, seconds waited for it). Each rank has its slice of the pack.

    The slices are of one length. A slice lives on the device if it takes no more than half of the memory there; else it
    stays on the disk, where a thread reads ahead. The pack's sequences are shuffled: a slice samples all cities.
    """
    n = -(-len(pack.train) // world)
    first = min(rank * n, len(pack.train) - n)  # the last slice overlaps its neighbour by less than a frame a rank
    frames = pack.train[first:first + n]
    free = {"cuda": lambda: torch.cuda.mem_get_info()[0],
            "cpu": lambda: os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 2 ** 33,
            "hpu": lambda: getattr(torch.hpu, "mem_get_info", lambda: [16 * 2 ** 30])()[0]}[device.type]()
    rows = functools.partial(row_batches, n, frames[0].nbytes, seed=(args.seed, rank), start=start // world)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable")  # nor do we write
        frames = torch.from_numpy(frames)
    if frames.nbytes * (world if device.type == "cpu" else 1) <= free / 2 and not args.stream:
        frames = frames.to(device, copy=True)
        for many in rows(64 * args.batch_size):  # without end; row numbers go up for 64 steps at once
            for picked in torch.from_numpy(many).to(device).split(args.batch_size):
                yield frames.index_select(0, picked), 0.0

    fd, size, header = os.open(pack.train.filename, os.O_RDONLY), frames[0].nbytes, pack.train.offset

    def advise(pool):  # the kernel reads these runs of rows into its cache while we go on
        for span in np.split(np.sort(pool), np.flatnonzero(np.diff(np.sort(pool)) > 1) + 1):
            os.posix_fadvise(fd, header + (first + int(span[0])) * size, len(span) * size, os.POSIX_FADV_WILLNEED)

    order = rows(args.batch_size, advise=advise if hasattr(os, "posix_fadvise") else lambda pool: None)

    def read():
        batch = frames.index_select(0, torch.from_numpy(next(order)))
        return batch.pin_memory() if device.type == "cuda" else batch

    with ThreadPoolExecutor(1) as reader:
        ahead = deque(reader.submit(read) for _ in range(8))
        while True:
            asked = time.perf_counter()
            with torch.profiler.record_function("waiting for data"):
                batch = ahead.popleft().result()
            ahead.append(reader.submit(read))
            yield batch.to(device, non_blocking=True), time.perf_counter() - asked


# ---- the networks in training, and one step -------------------------------------------------------------------------

class DCGAN:
    """G and D, their optimizers, and the running average of G that draws: what a step changes and a checkpoint holds.

    The first weights come from --seed, so that all ranks begin alike, and the gradients' mean keeps them so.
    """

    def __init__(self, args, device, dtype, world=1):
        self.args, self.device, self.dtype, self.world = args, device, dtype, world
        self.graph = args.graph and device.type == "cuda" and dtype != torch.float16  # fp16's scaler looks at gradients
        layout = torch.contiguous_format if device.type == "hpu" else torch.channels_last  # 1.1×; Gaudi has its own
        torch.manual_seed(args.seed)
        G = Generator(args.image_size, args.nz, args.ngf, 3, args.kernel_size).apply(init_weights)
        D = Discriminator(args.image_size, args.ndf, 3, args.kernel_size).apply(init_weights)
        self.G, self.D = (net.to(device, memory_format=layout) for net in (G, D))
        self.G_ema = copy.deepcopy(self.G).requires_grad_(False)
        # AdamW with weight decay 0 is Adam; one fused kernel; on hpu the plugin's, with torch's epsilon.
        kwargs = dict(lr=args.lr, betas=(args.beta1, 0.999), eps=1e-8, weight_decay=args.weight_decay)
        if device.type == "hpu":
            from habana_frameworks.torch.core import mark_step
            from habana_frameworks.torch.hpex.optimizers import FusedAdamW as Adam
            self.cut_graph = mark_step  # in lazy mode the ops collected so far go to the card; eager mode ignores it
        else:
            Adam = functools.partial(torch.optim.AdamW, fused=True, capturable=self.graph)
            self.cut_graph = lambda: None
        self.opt_G, self.opt_D = (Adam(net.parameters(), **kwargs) for net in (self.G, self.D))
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def step(self, frames):
        """uint8 frames (N, H, W, 3) → float32 (5,) on the device, as STATS names it: one update of D, then one of G."""
        args, G, D, bce = self.args, self.G, self.D, F.binary_cross_entropy_with_logits
        real = cut_windows(frames, args.image_size, args.mirror)
        z = torch.empty(len(frames), args.nz, device=self.device)
        z = z.normal_() if args.latent == "normal" else z.uniform_(-1, 1)
        with self.autocast():
            fake = G(z)
            on_real, on_fake = self.look(real), self.look(fake.detach())  # apart: each has its own batch statistics
            loss_D = bce(on_real, torch.ones_like(on_real)) + bce(on_fake, torch.zeros_like(on_fake))
        self.update(self.opt_D, loss_D)

        D.requires_grad_(False)  # its gradients are not wanted now: a quarter of D's backward
        with self.autocast():
            on_fake_after = self.look(fake)  # the same fakes, seen by the better D
            loss_G = bce(on_fake_after, torch.ones_like(on_fake_after))
        self.update(self.opt_G, loss_G)
        D.requires_grad_(True)

        self.scaler.update()
        with torch.no_grad():
            for average, weight in zip(self.G_ema.parameters(), G.parameters()):
                average.lerp_(weight, 1 - EMA)
        probabilities = [logits.detach().sigmoid().mean() for logits in (on_real, on_fake, on_fake_after)]
        return torch.stack([loss_D.detach(), loss_G.detach(), *probabilities])

    def autocast(self):
        """One a forward pass: it caches weights in bf16, which an optimizer's step makes stale."""
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)

    def look(self, images):
        """D's logits, float32 (N,), of images with instance noise."""
        if std := self.args.instance_noise:
            images = images + std * torch.randn(images.shape, device=self.device)  # the same in any memory layout
        return self.D(images).float()

    def update(self, optimizer, loss):
        optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.cut_graph()
        if self.world > 1:  # the mean over the ranks, in one message
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
            dist.all_reduce(together := torch.cat([g.flatten() for g in gradients]))
            for g, part in zip(gradients, together.split([g.numel() for g in gradients])):
                g.copy_(part.view(g.shape) / self.world)
        self.scaler.step(optimizer)
        self.cut_graph()

    def settle(self):
        """The average of G in eval mode, its batch statistics taken afresh over 1,024 latents: those of training are of a
        batch or so, and of other weights. Training's own are left alone."""
        update_bn(latents(range(1024), self.args.nz, self.args.latent).to(self.device).split(64), self.G_ema)
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


def cpu_state(net):
    return {name: tensor.cpu() for name, tensor in net.state_dict().items()}


def adam_state(optimizer):
    """Step count and moments, in one form for torch's AdamW, which counts by parameter, and Gaudi's, by group."""
    group, states = optimizer.param_groups[0], [optimizer.state.get(p, {}) for p in optimizer.param_groups[0]["params"]]
    count = max(int(counts.get("step", 0)) for counts in (group, states[0]))
    return {"step": count, **{key: [s[key].cpu() for s in states if s] for key in ("exp_avg", "exp_avg_sq")}}


def load_adam_state(optimizer, saved):
    if not saved["step"]:
        return
    group = optimizer.param_groups[0]
    for p, *moments in zip(group["params"], saved["exp_avg"], saved["exp_avg_sq"], strict=True):
        state = {key: torch.zeros_like(p).copy_(m) for key, m in zip(("exp_avg", "exp_avg_sq"), moments)}
        state["step"] = torch.tensor(float(saved["step"]), device=p.device if group.get("fused") else "cpu")
        optimizer.state[p] = state
    if p.device.type == "hpu":
        group["step"] = saved["step"]


# ---- speed ----------------------------------------------------------------------------------------------------------

def make_fast(model, args, device, rank, gflop):
    """train_step(frames, number) → statistics: model.step, compiled where that pays, and on CUDA as one graph.

    Compiling takes a minute and saves a tenth: it pays from ten minutes on, here of `gflop` to come at 100 TFLOP/s.
    What a step draws on the device is seeded by its number, so that a resumed run needs no other state.
    """
    lazy = device.type == "hpu" and os.environ.get("PT_HPU_LAZY_MODE") == "1"
    able = not lazy and (device.type == "hpu" or any(map(shutil.which, ("cc", "gcc", "clang", "cl"))))
    if device.type == "cuda":
        able = able and find_spec("triton") and torch.cuda.get_device_capability() >= (7, 0)
    pays = device.type != "cpu" and not lazy and gflop > 6e7  # on a CPU it gains 3%
    wanted = pays if args.compile is None else args.compile
    if wanted and not able:
        needs = "--compile needs a C compiler, on cuda Triton and compute capability 7.0, on hpu PT_HPU_LAZY_MODE=0"
        if args.compile:
            raise InputError(needs)
        if rank == 0:
            print(f"not compiled: {needs}", flush=True)
    elif wanted:
        for net in (model.G, model.D):
            net.compile(backend="hpu_backend" if device.type == "hpu" else "inductor")
    step = graphed(model.step) if model.graph else model.step
    seed_device = {"cpu": torch.default_generator.manual_seed, "cuda": torch.cuda.manual_seed,
                   "hpu": lambda seed: getattr(torch.hpu, "random", torch.hpu).manual_seed_all(seed)}[device.type]

    def train_step(frames, number):
        seed_device(int(np.random.SeedSequence((args.seed, rank, number)).generate_state(1)[0]))
        return step(frames)

    return train_step


def graphed(step):
    """The step as one CUDA graph, cropping and noise included: a replay costs the host a launch instead of hundreds."""
    stream, graph, frames, stats, calls = torch.cuda.Stream(), torch.cuda.CUDAGraph(), None, None, 0
    warnings.filterwarnings("ignore", message="This instance was constructed with capturable=True")  # of the first steps

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


def gflop_per_image(args):
    """Arithmetic of training on one image: 3 forwards of G (its backward counts two) and 8 of D, which reads real, fake
    and fake again, each with a backward that costs two, less one for the weights that are frozen the last time."""
    with torch.device("meta"), FlopCounterMode(display=False) as of_G:
        image = Generator(args.image_size, args.nz, args.ngf, 3, args.kernel_size)(torch.empty(1, args.nz))
    with torch.device("meta"), FlopCounterMode(display=False) as of_D:
        Discriminator(args.image_size, args.ndf, 3, args.kernel_size)(image)
    return (3 * of_G.get_total_flops() + 8 * of_D.get_total_flops()) / 1e9


def benchmark(train_step, stream, args, device, device_name, precision, world, share):
    """A row in the write-up's form, as Markdown with its header: args.benchmark seconds or more, with one wait for the
    device at each end, after ten steps for compiling and capturing."""
    synchronize = getattr(torch, device.type).synchronize
    for step in range(10):
        train_step(next(stream)[0], step)
    synchronize()
    began, waited = time.perf_counter(), 0.0
    while world > 1 and step % 10 or not share(int(time.perf_counter() - began > args.benchmark)):  # all ranks alike
        frames, seconds = next(stream)
        train_step(frames, step := step + 1)
        waited += seconds
    synchronize()
    took = time.perf_counter() - began
    images_s = (step - 9) * args.batch_size * world / took
    row = {"preset": args.preset, "device": f"{world} × {device_name}", "batch": f"{world} × {args.batch_size}",
           "precision": precision, "images/hour": f"{images_s * 3600:,.0f}",
           "images per $": f"{images_s * 3600 / args.price:,.0f}" if args.price else "–",
           "waiting for data": f"{waited / took:.1%}", "TFLOP/s": f"{images_s * gflop_per_image(args) / 1e3:.3g}"}
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (row, ["---"] * len(row), row.values()))


# ---- the run's folder -----------------------------------------------------------------------------------------------

class Saver:
    """Writes files of tensors behind the training: a slow disk stalls nothing, and a kill leaves no damaged file."""

    def __init__(self, out):
        self.out, self.pool, self.jobs, self.failed = Path(out), ThreadPoolExecutor(1), [], None

    def busy(self):
        return not all(job.done() for job in self.jobs)

    def save(self, files):
        """{name: content}: snapshot now, write behind. What the disk refuses is a warning, and stays in `failed`."""
        snapshot = {}
        for name, content in files.items():
            torch.save(content, buffer := io.BytesIO(), pickle_protocol=2)  # Gaudi's default, 4, opens nowhere else
            snapshot[name] = buffer.getbuffer()
        self.jobs = [job for job in self.jobs if not job.done()] + [self.pool.submit(self.write, snapshot)]

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

    def join(self):
        for job in self.jobs:
            job.result()


class Run:
    """What rank 0 keeps and shows: checkpoints, grids, scores, TensorBoard's events. A full disk costs it warnings."""

    def __init__(self, args, pack):
        """Make the folder, or refuse it: an earlier run's, or one in training. It is ours as long as we live."""
        self.args, self.pack, self.out = args, pack, Path(args.out)
        ours = {".lock", "samples", "args.json.tmp"}  # what a run leaves that is killed at once
        there = self.out.exists() and (not self.out.is_dir() or {p.name for p in self.out.iterdir()} - ours)
        if there and not args.resume:
            raise InputError(f"{self.out} is there already: --resume goes on with it, --out names another folder")
        (self.out / "samples").mkdir(parents=True, exist_ok=True)
        self.lock = open(self.out / ".lock", "w")
        try:
            fcntl and fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{self.out} is being trained by another process: name another --out, or wait") from None
        newest, previous = checkpoints(self.out)
        if args.resume and newest.exists() and previous.exists() and load_first([newest, previous])[0] == previous:
            os.replace(newest, self.out / "damaged.pt")  # else the next save would put it in the sound one's place

    def start(self, model, step, images, **in_force):
        self.model, self.saver = model, Saver(self.out)
        self.writer, self.resting_until = None, 0.0
        self.purge_step = images + 1  # on --resume, TensorBoard's events past the checkpoint are void
        threading.excepthook = lambda args: (  # a full disk ends the writer's thread, and our next call to it says so
            issubclass(args.exc_type, OSError) or threading.__excepthook__(args))
        arguments = {**vars(self.args), "launch": launch(), "in_force": in_force}
        write_file(self.out / "args.json", (json.dumps(arguments, indent=1) + "\n").encode())
        plain = {name: value for name, value in arguments.items() if isinstance(value, (int, float, str))}
        self.show(lambda writer: writer.add_hparams(plain, {}, run_name="."))
        table = self.out / "scores.csv"
        self.scores = table.read_text().splitlines() if table.exists() else ["images,score,floor"]
        self.best = min((float(row.split(",")[1]) for row in self.scores[1:]), default=math.inf)
        try:
            self.score = Score(self.pack)
        except InputError as why:
            self.score = None
            print(f"no score: {why}", flush=True)
        real = cut_windows(torch.from_numpy(self.pack.train[:64].copy()), self.args.image_size, self.args.mirror)
        self.show(lambda writer: writer.add_image("real", make_grid(real, normalize=True, value_range=(-1, 1)), images))
        self.due = time.monotonic() + 60 * self.args.save_minutes
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

    def log(self, values, images):
        self.show(lambda writer: [writer.add_scalar(name, value, images) for name, value in values.items()])

    def keep(self, step, images, wait=False):
        """Save a checkpoint, then draw seeds 0-63 and score them; returns the score in words, for the log line.

        Due again not before 40 times as long as it took: under 3% of the time, also where drawing is slow, as on a CPU.
        """
        began, args, G = time.monotonic(), self.args, self.model.settle()
        generator = {"format": FORMAT, "images": images, "latent": args.latent, "G": cpu_state(G)}
        if wait or not self.saver.busy():
            checkpoint = {**generator, **self.model.state(), "step": step}  # its G is the one in training
            self.saver.save({f"generator-{images:09d}.pt": generator, "checkpoint.pt": checkpoint})
        else:
            print("warning: the disk is still writing the last checkpoint; this one is left out", file=sys.stderr)
        grid, words = make_grid(render(G, latents(range(64), args.nz, args.latent))), ""
        if self.score:
            score, floor = self.score(G, args.latent), self.score.floor
            words = f", score {score:.1f} (real images {floor:.1f})"
            self.scores.append(f"{images},{score:.2f},{floor:.2f}")
            if score < self.best:
                self.best = score
                self.saver.save({"generator-best.pt": generator})

        def add(writer):
            writer.add_image("samples", grid, images)
            Image.fromarray(grid.permute(1, 2, 0).numpy()).save(self.out / "samples" / f"{images:09d}.png")
            if self.score:
                writer.add_scalar("score/generated", score, images)
                writer.add_scalar("score/real images", floor, images)
                write_file(self.out / "scores.csv", "\n".join([*self.scores, ""]).encode())

        self.show(add)
        if wait:
            self.saver.join()
        now = time.monotonic()
        self.due = now + (args.save_minutes and max(60 * args.save_minutes, 40 * (now - began)))
        return words


# ---- processes and the loop -----------------------------------------------------------------------------------------

def join_processes(device, world):
    """(barrier, share) of torchrun's processes, one a device, through their hosts; share(n) is the largest n of all."""
    if world == 1:
        return lambda: None, lambda n: n
    if device.type == "hpu":
        import habana_frameworks.torch.distributed.hccl  # noqa: F401  makes the backend known
    # torchrun's store outlives a restart, and what the dead wrote into it would mislead the living. (Of several
    # machines the counts may differ.)
    store, rank, _ = next(dist.rendezvous("env://"))
    if os.environ.get("LOCAL_WORLD_SIZE") == str(world):
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = {"cuda": "nccl", "hpu": "hccl", "cpu": "gloo"}[device.type]
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    hosts = dist.new_group(backend="gloo", timeout=timedelta(days=1))  # preparing a pack takes its time

    def share(n):
        dist.all_reduce(n := torch.tensor(n), dist.ReduceOp.MAX, group=hosts)
        return int(n)

    return lambda: dist.barrier(hosts), share


def find_data(args, rank, local, world, barrier):
    """The pack to train on, prepared if need be: by rank 0, and by a rank of each machine that has another disk."""
    for turn in (rank == 0, local == 0, True):
        path = prepare_data.find_pack(args.data, args.image_size) if turn else None
        barrier()
    pack = prepare_data.open_pack(path)
    if pack.image_size != args.image_size:
        raise InputError(f"{path} is for images of {pack.image_size} pixels, not of {args.image_size}: "
                         f"choose --image-size {pack.image_size}, or prepare another pack")
    if args.batch_size * world > len(pack.train):
        raise InputError(f"--batch-size {args.batch_size} × {world} process(es) is more than the {len(pack.train)} "
                         f"images of {path}")
    return pack


def resume(model, args):
    """Load the newest checkpoint of args.out; returns its step and images, 0 where there is none yet."""
    if not any(path.exists() for path in checkpoints(args.out)):
        return 0, 0
    path, saved = load_first(checkpoints(args.out))
    try:
        model.load(saved)
        return int(saved["step"]), int(saved["images"])
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path} does not fit this network: {str(error).splitlines()[-1].strip()}") from None


def check_numbers(values, step, model=None):
    """Exit where a loss of the steps up to this one, or a weight of the model about to be saved, is not finite."""
    bad = [f"step {at}: Loss_D is {loss_D}, Loss_G {loss_G}"
           for at, (loss_D, loss_G, *_) in enumerate(values, step - len(values) + 1)
           if not math.isfinite(loss_D + loss_G)]
    if model and not all(t.isfinite().all() for net in (model.G, model.D) for t in net.state_dict().values()):
        bad.append(f"step {step}: a weight is infinite or no number")  # the loss would be, one step later
    if bad:
        sys.exit(f"error: {bad[0]}. The last checkpoint is from before; --resume from it with a lower --lr or "
                 "--precision fp32")


def main(argv=None):
    began = time.monotonic()
    args = parse_args(argv)
    rank, local, world = (int(os.environ.get(name, default)) for name, default in
                          (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))  # from torchrun
    say = functools.partial(print, flush=True) if rank == 0 else lambda *_: None
    device, precision, lists = set_up_device(args, local)
    barrier, share = join_processes(device, world)
    pack = find_data(args, rank, local, world, barrier)
    keeper = Run(args, pack) if rank == 0 and not args.benchmark else None
    barrier()

    model = DCGAN(args, device, DTYPES[precision], world)
    step, images = resume(model, args) if args.resume else (0, 0)  # done so far; images of all ranks
    if share(images) != images:
        raise InputError(f"--resume: every rank reads {args.out}, and it is not the same on all machines")
    batch = args.batch_size * world
    total = -(-args.epochs * len(pack.train) // batch) * batch  # whole steps
    ahead = math.inf if args.benchmark else (total - images) / world
    train_step = make_fast(model, args, device, rank, ahead * gflop_per_image(args))
    stream = batches(pack, args, device, rank, world, images)
    card = getattr(torch, device.type)  # torch.cuda, torch.hpu, torch.cpu
    device_name = f"{torch.get_num_threads()} CPU threads" if device.type == "cpu" else card.get_device_name()
    say(f"{args.preset} in {precision} on {world} × {device_name}: {len(pack.train):,} frames of {pack.folder}"
        + ("" if args.benchmark else f", run {args.out} from image {images:,} of {total:,}"))
    for which, ops in zip(("low precision", "fp32"), lists or ()):
        say(f"ops in {which}: {' '.join(ops)}")
    if args.benchmark:
        say(benchmark(train_step, stream, args, device, device_name, precision, world, share))
        total = images  # and no training
    if keeper:
        keeper.start(model, step, images, device=device_name, world=world, precision=precision,
                     bf16_ops=lists and lists[0], fp32_ops=lists and lists[1])

    leave, notice = 0, []  # a spot machine's SIGTERM, or Ctrl-C: finish the step, save, go
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda signum, frame: notice.append(signum))
    profiler = nullcontext()
    if args.profile and keeper:  # past the compiling and the capture
        profiler = torch.profiler.profile(schedule=torch.profiler.schedule(wait=10, warmup=2, active=5, repeat=1),
                                          on_trace_ready=torch.profiler.tensorboard_trace_handler(args.out))
    history, since, waited = [], time.perf_counter(), 0.0
    with profiler:
        while images < total and not leave:
            frames, seconds = next(stream)
            history.append(train_step(frames, step))
            step, images, waited = step + 1, images + batch, waited + seconds
            if args.profile and keeper:
                profiler.step()
            if world == 1 or step % 10 == 0:  # a notice to one rank is a notice to all, and so is the time's end
                late = args.minutes and time.monotonic() - began > 60 * args.minutes
                leave = share(max(notice, default=int(bool(late))))
            last = images >= total or leave
            if step % args.log_every and not last:
                continue

            values = torch.stack(history).tolist()  # the one copy back from the device; it waits for the steps so far
            took = time.perf_counter() - since
            keeping = keeper and (last or time.monotonic() > keeper.due)
            check_numbers(values, step, model if keeping else None)
            rate, left = len(history) * batch / took, max(0, total - images)
            seconds = max(0, min(left / rate, 60 * (args.minutes or math.inf) - (time.monotonic() - began)))
            epoch, steps = min(args.epochs, -(-images // len(pack.train))), step - (-left // batch)
            line = ("[{}/{}][{}/{}] Loss_D {:.4f} Loss_G {:.4f} D(x) {:.4f} D(G(z)) {:.4f} / {:.4f}  "
                    "{:,.0f} images/s, {} left").format(epoch, args.epochs, step, steps, *values[-1], rate,
                                                        timedelta(seconds=round(seconds)))
            if keeper:
                shown = {**dict(zip(STATS, values[-1])), "images/s": rate,
                         "share of time waiting for data": waited / took}
                if device.type != "cpu":
                    shown["device memory (GB)"] = card.max_memory_allocated() / 1e9
                keeper.log(shown, images)
            say(line + (keeper.keep(step, images, wait=last) if keeping else ""))
            history, since, waited = [], time.perf_counter(), 0.0

    if keeper:
        keeper.show(lambda writer: writer.close())
        if keeper.saver.failed:
            sys.exit(f"error: {keeper.saver.failed}")
        say(f"{args.out} is at image {images:,} of {total:,}; see it with: python sample.py --checkpoint {args.out}")
    barrier()  # until rank 0 has saved
    del train_step  # NCCL's end waits for the graph that holds its messages
    if world > 1:
        dist.destroy_process_group()
    if notice:  # the usual end by this signal, for whoever waits for our status
        raise KeyboardInterrupt(notice[0])
    return model


if __name__ == "__main__":
    run(main)
