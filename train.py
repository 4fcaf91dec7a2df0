"""Train a DCGAN on street scenes (or any images).

    python train.py                                        # draws its own streets: five minutes on a laptop
    python train.py --data packs/streets                   # a pack from prepare_data.py, or raw images, packed once
    python train.py --device hpu --data /mnt/gp3/msls --preset clamp-64
    torchrun --nproc-per-node 8 train.py --device hpu --data packs/msls
    python train.py --data packs/streets --resume          # go on where the run stopped
    python train.py --benchmark --price 13.11              # trains nothing, saves nothing: a row for the speed table

A run is a folder: checkpoint.pt, generator-<images>.pt, samples/<images>.png, TensorBoard events (tensorboard --logdir
runs) and args.json. The losses are Goodfellow's (2014, section 3, the non-saturating form for G), the networks Radford's.
"""
import argparse
import functools
import io
import itertools
import json
import math
import os
import queue
import signal
import sys
import tempfile
import threading
import time
import warnings
from contextlib import nullcontext
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two runs apart there
    fcntl = None

import numpy as np

from model import (FORMAT, NAIVE, PRESETS, Discriminator, Generator, InputError, Parser, choose_device, cut_windows,
                   init_weights, latents, load_newest, number, run, write_file)  # before torch: it loads Gaudi's plugin

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid, save_image

import prepare_data

# Mixed precision, op by op. On hpu these lists replace the plugin's own; --bf16-ops and --fp32-ops change or replace them.
# Convolutions and what is element-wise are cheap and safe in bf16; statistics and the loss want fp32's digits.
BF16_OPS = "conv2d conv_transpose2d linear addmm mm bmm matmul relu leaky_relu tanh".split()
FP32_OPS = "batch_norm binary_cross_entropy_with_logits sigmoid softplus mean sum div exp log pow rsqrt".split()
NORMS = {"batch_norm", "layer_norm", "group_norm", "instance_norm"}  # the plugin lowers their input alone

GAUDI_LISTS = {"bf16_ops": "PT_HPU_AUTOCAST_LOWER_PRECISION_OPS_LIST", "fp32_ops": "PT_HPU_AUTOCAST_FP32_OPS_LIST"}

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEMO = {"epochs": 12, "batch_size": 16, "sample_every": 4000}  # without --data: streets to see in five minutes on two CPU cores
STATS = ("Loss_D", "Loss_G", "D(x)", "D(G(z1))", "D(G(z2))")


# ---- arguments ------------------------------------------------------------------------------------------------------

def launch():
    """What tells one start of torchrun from another, and is the same after its restarts."""
    return f"{os.environ.get('TORCHELASTIC_RUN_ID')} {os.getppid()}"


def read_back(parser, saved, defaults, path):
    """Arguments from args.json, checked as if they were typed: someone may have edited it."""
    untouched = {key: defaults[key] for key, value in saved.items() if key in defaults and value == defaults[key]}
    words = []
    for key in saved.keys() - untouched.keys():
        flag, value = key.replace("_", "-"), saved[key]
        words += [f"--{flag}" if value is True else f"--no-{flag}" if value is False else f"--{flag}={value}"]
    try:
        return {**untouched, **vars(parser.parse_args(words))}
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def parse_args(argv=None):
    """argparse.Namespace of everything in force: the command line over the resumed run's over the preset's over defaults."""
    share, many = number(float, 0, 1), number(int, 1)
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    argument_default=argparse.SUPPRESS)  # so that what was not typed can come from elsewhere
    add, defaults = parser.add_argument, {}

    def option(flag, default, help, *aliases, **kwargs):
        action = add(flag, *aliases, help=f"{help} (default: {default})" if default is not None else help, **kwargs)
        defaults[action.dest] = default

    option("--data", None, "a pack, an MSLS tree, a folder of its archives, or any images (default: drawn streets)")
    option("--preset", "naive-64", "networks, latents, batch, optimizer, noise", choices=PRESETS)
    option("--out", None, "the run's folder (default: runs/<preset>)")
    option("--resume", False, "go on from the newest sound checkpoint in --out", action="store_true")
    option("--device", "auto", "where to train", choices=("auto", "cuda", "hpu", "cpu"))
    option("--epochs", 25, "times that every frame is seen", type=number(int, 1, 10 ** 6))
    option("--seed", 0, "of weights, order and noise", type=number(int, 0, 2 ** 32))
    option("--mirror", False, "flip half of the images left to right", action="store_true")
    option("--precision", "auto", "auto: bf16 where the device is fast at it", choices=("auto", "fp32", "bf16", "fp16"))
    option("--bf16-ops", None, "ops to run in bf16 (fp16): a file, names, or changes as +relu,-tanh", "--hmp-bf16",
           metavar="OPS")
    option("--fp32-ops", None, "ops to run in fp32, likewise", "--hmp-fp32", metavar="OPS")
    option("--compile", None, "torch.compile (default: where it pays)", action=argparse.BooleanOptionalAction)
    option("--stream", False, "read the pack as it goes, though it would fit on the device", action="store_true")
    option("--save-every", 500_000, "images between checkpoints", type=many)
    option("--sample-every", 100_000, "images between sample grids", type=many)
    option("--log-every", 50, "steps between log lines; steps between copy nothing back", type=many)
    option("--profile", False, "write a torch.profiler trace of some steps for TensorBoard", action="store_true")
    option("--benchmark", None, "measure so many steps, train and save nothing", nargs="?", const=100, type=many,
           metavar="STEPS")
    option("--price", None, "dollars an hour, for --benchmark", type=number(float, 0))
    option("--peak-tflops", None, "the device's matrix rate, for --benchmark", type=number(float, 0))
    for flag, help, kwargs in (
            ("--image-size", "32, 64, 128 or 256", dict(type=int, choices=(32, 64, 128, 256))),
            ("--kernel-size", "4, or the paper's 5", dict(type=int, choices=(4, 5))),
            ("--nz", "size of a latent", dict(type=number(int, 1, 65536))),
            ("--ngf", "G's feature maps", dict(type=number(int, 1, 4096))),
            ("--ndf", "D's feature maps", dict(type=number(int, 1, 4096))),
            ("--latent", "its distribution", dict(choices=("normal", "uniform"))),
            ("--batch-size", "images a step and process", dict(type=number(int, 2, 65536))),
            ("--lr", "learning rate", dict(type=number(float, 1e-9, 1))),
            ("--beta1", "Adam's", dict(type=number(float, 0, 0.9999))),
            ("--weight-decay", "AdamW's", dict(type=share)),
            ("--instance-noise", "std of the noise on D's input", dict(type=share))):
        add(flag, help=f"{help} (default: the preset's)", **kwargs)

    argv = list(sys.argv[1:] if argv is None else argv)
    for i, word in reversed(list(enumerate(argv[:-1]))):  # argparse would take the -tanh of `--bf16-ops -tanh` for a flag
        if word in ("--bf16-ops", "--fp32-ops", "--hmp-bf16", "--hmp-fp32"):
            argv[i:i + 2] = [f"{word}={argv[i + 1]}"]
    given = vars(parser.parse_args(argv))
    out = Path(given.get("out") or f"runs/{given.get('preset', defaults['preset'])}")
    resume, saved = given.get("resume", False), {}
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0 and (out / "args.json").exists()
    if resume or restarted:
        try:
            content = json.loads((out / "args.json").read_text())
            saved = {key: content[key] for key in {*defaults, *NAIVE} - {"out", "resume", "profile", "benchmark"}}
            restarted = restarted and content["in_force"]["launch"] == launch()
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(f"--resume: no run in {out}: name one with --out, or start one without --resume") from None
        resume = resume or restarted  # torchrun goes on with a run that it started, and with no other
        saved = read_back(parser, saved, defaults, out / "args.json") if resume else {}
        if given.get("preset", saved.get("preset")) != saved.get("preset"):
            raise InputError(f"--preset {given['preset']}: {out} is a run of {saved['preset']}, and its networks stay")
    preset = PRESETS[given.get("preset") or saved.get("preset", defaults["preset"])]
    demo = {} if {"data", "preset", "benchmark"} & {*given} else DEMO
    return argparse.Namespace(**{**defaults, **preset, **demo, **saved, **given, "out": str(out), "resume": bool(resume)})


# ---- precision ------------------------------------------------------------------------------------------------------

def op_list(text, default, flag):
    """Op names from what was typed: a file with one a line, 'relu,tanh', or '+relu,-tanh' to change the default."""
    if text is None:
        return sorted(default)
    words = [text]
    if "," not in text and not text.startswith(("+", "-")) and ("/" in text or "." in text or os.path.isfile(text)):
        try:
            words = Path(text).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{flag} {text}: {getattr(error, 'strerror', None) or 'not a text file'}") from None
    names = [w for line in words for w in line.split("#")[0].replace(",", " ").split()]
    ops = set(default) if names and all(n[0] in "+-" for n in names) else set()
    for name in names:
        op = name.lstrip("+-")
        if not op.isidentifier() or not isinstance(getattr(torch.ops.aten, op, None), torch._ops.OpOverloadPacket):
            raise InputError(f"{flag} {text}: torch has no op named '{op}'")
        if name.startswith("-") and name[1:] not in ops:
            raise InputError(f"{flag} {text}: {name[1:]} is not on the list")
        ops.discard(name[1:]) if name.startswith("-") else ops.add(name.lstrip("+"))
    if not ops:
        raise InputError(f"{flag} {text}: no op in it")
    return sorted(ops)


def op_lists(args, gaudi=False):
    """(ops in low precision, ops in fp32), or None where torch's own autocast decides: no list asked for, and no Gaudi.

    For hpu they go to the plugin the way it wants them: files of exactly these names, in variables it reads as it loads.
    Lists that a launch script put into those variables count as asked for.
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
        raise InputError(f"{both[0]} is on both lists: take it off one, as with --fp32-ops -{both[0]}")
    return low, high


KEPT = []  # what has to live as long as the op lists are in force


def apply_op_lists(lists, device, dtype=None):
    """Make autocast obey the lists: on hpu by files for the plugin, which reads them as it loads, on cuda and cpu at once.

    There an op's autocast kernel becomes: cast its floating-point arguments, then call it with autocast off. That is one
    level of Python for a listed op, and nothing for the others; torch.compile traces through it.
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


def best_precision(device):
    """What --precision auto means: bf16 where the device computes in it, fp16 on older GPUs, else fp32."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"
    return "bf16" if device.type == "hpu" or torch.cpu._is_avx512_bf16_supported() else "fp32"


def set_up_device(args, local):
    """(torch.device, 'fp32' | 'bf16' | 'fp16', op lists or None). On hpu the lists come first, then the plugin."""
    plugin = args.device == "auto" and not torch.cuda.is_available() and find_spec("habana_frameworks")
    gaudi = args.device == "hpu" or bool(plugin)
    lists = op_lists(args, gaudi)
    if lists and gaudi:
        apply_op_lists(lists, "hpu")
    device = choose_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(local)
        torch.backends.cudnn.benchmark = True  # shapes never change
    precision = args.precision if args.precision != "auto" else best_precision(device)
    if device.type == "hpu":
        if precision == "fp16":
            raise InputError("--precision fp16 is for GPUs without bf16, and hpu has it: leave the option out")
        return device, precision, lists
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
    """Without end: uint8 (batch, H, W, 3) on the device. Each rank has its slice of the pack, all of the same length.

    The slice lives on the device if it takes no more than half of what is free there; else it stays on the disk, where
    a thread reads ahead. prepare_data has shuffled the sequences, so that a slice is a fair sample of all cities.
    """
    n = -(-len(pack.train) // world)
    first = min(rank * n, len(pack.train) - n)  # the last slice overlaps its neighbour by less than a frame a rank
    frames = pack.train[first:first + n]
    free = {"cuda": lambda: torch.cuda.mem_get_info()[0],
            "cpu": lambda: os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
            "hpu": lambda: getattr(torch.hpu, "mem_get_info", lambda: [16 * 2 ** 30])()[0]}[device.type]()
    rows = functools.partial(row_batches, n, frames[0].nbytes, args.batch_size, (args.seed, rank), start // world)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable")  # nor do we write
        frames = torch.from_numpy(frames)
    if frames.nbytes * (world if device.type == "cpu" else 1) <= free / 2 and not args.stream:
        frames = frames.to(device, copy=True)
        for picked in rows():
            yield frames.index_select(0, torch.from_numpy(picked).to(device, non_blocking=True))

    fd, size, header = os.open(pack.train.filename, os.O_RDONLY), frames[0].nbytes, pack.train.offset

    def advise(pool):  # the kernel reads these runs of rows into its cache while we go on
        for run in np.split(np.sort(pool), np.flatnonzero(np.diff(np.sort(pool)) > 1) + 1):
            os.posix_fadvise(fd, header + (first + int(run[0])) * size, len(run) * size, os.POSIX_FADV_WILLNEED)

    def read():
        try:
            for picked in rows(advise if hasattr(os, "posix_fadvise") else lambda pool: None):
                batch = frames.index_select(0, torch.from_numpy(picked))
                ready.put(batch.pin_memory() if device.type == "cuda" else batch)
        except BaseException as error:  # raised where the training can see it
            ready.put(error)

    ready = queue.Queue(8)
    threading.Thread(target=read, daemon=True).start()
    while True:
        batch = ready.get()
        if isinstance(batch, BaseException):
            raise batch
        yield batch.to(device, non_blocking=True)


# ---- one training step ----------------------------------------------------------------------------------------------

def make_optimizer(net, args, device):
    """AdamW (weight decay 0 makes it Adam), as one fused kernel; on hpu the plugin's, with torch's epsilon."""
    kwargs = dict(lr=args.lr, betas=(args.beta1, 0.999), eps=1e-8, weight_decay=args.weight_decay)
    if device.type == "hpu":
        from habana_frameworks.torch.hpex.optimizers import FusedAdamW
        return FusedAdamW(net.parameters(), **kwargs)
    return torch.optim.AdamW(net.parameters(), fused=True, capturable=device.type == "cuda", **kwargs)


def make_step(G, D, opt_G, opt_D, scaler, args, device, dtype):
    """step(uint8 frames (N, H, W, 3)) → float32 (5,) on the device, as STATS names it: one update of D, then one of G."""
    bce = F.binary_cross_entropy_with_logits
    if device.type == "hpu":  # in lazy mode the ops collected so far go to the card here; eager mode ignores it
        from habana_frameworks.torch.core import mark_step as cut_graph
    else:
        def cut_graph(): pass

    def autocast():  # one a forward pass: it caches weights in bf16, which an optimizer's step makes stale
        return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)

    def look(D, images):
        if args.instance_noise:
            images = images + args.instance_noise * torch.randn(images.shape, device=device)  # the same in any memory layout
        return D(images).float()

    def update(loss, optimizer):
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        cut_graph()
        scaler.step(optimizer)
        cut_graph()

    def step(frames):
        real = cut_windows(frames, args.image_size, args.mirror)
        z = torch.empty(len(frames), args.nz, device=device)
        z = z.normal_() if args.latent == "normal" else z.uniform_(-1, 1)
        with autocast():
            fake = G(z)
            on_real, on_fake = look(D, real), look(D, fake.detach())  # apart: each has its own batch statistics
            loss_D = bce(on_real, torch.ones_like(on_real)) + bce(on_fake, torch.zeros_like(on_fake))
        update(loss_D, opt_D)

        judge = getattr(D, "module", D).requires_grad_(False)  # its gradients are not wanted now: a quarter of D's backward
        with autocast():
            on_fake_after = look(judge, fake)  # the same fakes, seen by the better D
            loss_G = bce(on_fake_after, torch.ones_like(on_fake_after))
        update(loss_G, opt_G)
        judge.requires_grad_(True)
        scaler.update()
        probabilities = [logits.detach().sigmoid().mean() for logits in (on_real, on_fake, on_fake_after)]
        return torch.stack([loss_D.detach(), loss_G.detach(), *probabilities])

    return step


def graphed(step):
    """The step as one CUDA graph, cropping and noise included: replayed, it costs the host a launch instead of hundreds."""
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
        if frames is None:
            frames = batch.clone()
            with torch.cuda.graph(graph, stream=stream):  # records, runs nothing
                stats = step(frames)
        frames.copy_(batch)
        graph.replay()
        return stats.clone()

    return replay


def set_up_step(nets, optimizers, scaler, args, device, dtype, world, steps):
    """The step, compiled where that pays for `steps` of them, replicated over the ranks, as one graph on CUDA."""
    lazy = device.type == "hpu" and os.environ.get("PT_HPU_LAZY_MODE") == "1"
    if args.compile and lazy:
        raise InputError("--compile does not go with PT_HPU_LAZY_MODE=1, which collects graphs of its own")
    pays = device.type != "cpu" and not lazy and (args.benchmark or steps > 2000)  # CPU: 3%, after 20 s
    if pays if args.compile is None else args.compile:
        for net in nets:
            net.compile(backend="hpu_backend" if device.type == "hpu" else "inductor")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer torch has another name for broadcast_buffers, 2.6 has this
        replicas = [DistributedDataParallel(net, broadcast_buffers=False) if world > 1 else net for net in nets]
    step = make_step(*replicas, *optimizers, scaler, args, device, dtype)
    graph = device.type == "cuda" and world == 1 and dtype != torch.float16 and args.compile is not False
    return graphed(step) if graph else step


# ---- checkpoints ----------------------------------------------------------------------------------------------------

def adam_state(optimizer):
    """Step count and moments, the same for torch's AdamW, which counts by parameter, and Gaudi's, which counts by group."""
    group, states = optimizer.param_groups[0], [optimizer.state.get(p, {}) for p in optimizer.param_groups[0]["params"]]
    count = max(int(counts.get("step", 0)) for counts in (group, states[0]))
    return {"step": count, **{key: [s[key].cpu() for s in states if s] for key in ("exp_avg", "exp_avg_sq")}}


def load_adam_state(optimizer, saved):
    if saved["step"]:
        group = optimizer.param_groups[0]
        for p, *moments in zip(group["params"], saved["exp_avg"], saved["exp_avg_sq"], strict=True):
            state = {key: torch.zeros_like(p).copy_(m) for key, m in zip(("exp_avg", "exp_avg_sq"), moments)}
            state["step"] = torch.tensor(float(saved["step"]), device=p.device if p.is_cuda else "cpu")
            optimizer.state[p] = state
        if p.device.type == "hpu":
            group["step"] = saved["step"]


def checkpoint(nets, optimizers, scaler, args, step, images):
    """What checkpoint.pt holds: tensors, on the CPU, and plain values."""
    return {"format": FORMAT, "images": images, "step": step, "latent": args.latent, "scaler": scaler.state_dict(),
            **{name: {k: v.cpu() for k, v in net.state_dict().items()} for name, net in zip("GD", nets)},
            **{name: adam_state(optimizer) for name, optimizer in zip(("opt_G", "opt_D"), optimizers)}}


def restore(nets, optimizers, scaler, args):
    """Load the newest checkpoint of args.out; returns its step and images: 0 if it was killed before its first save."""
    if not any(Path(args.out).glob("checkpoint*.pt")):
        return 0, 0
    path, saved = load_newest(args.out)
    try:
        for name, net in zip("GD", nets):
            net.load_state_dict(saved[name])
        for name, optimizer in zip(("opt_G", "opt_D"), optimizers):
            load_adam_state(optimizer, saved[name])
        if saved["scaler"]:  # it was fp16
            scaler.load_state_dict(saved["scaler"])
        return int(saved["step"]), int(saved["images"])
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path} does not fit this network: {str(error).splitlines()[-1].strip()}") from None


class Saver:
    """Writes checkpoints in a thread, so that a slow disk stalls nothing, and so that a kill leaves no damaged one."""

    def __init__(self, out):
        self.out, self.thread, self.failed = Path(out), None, None

    def save(self, content, wait=False):
        """Snapshot now, write behind: checkpoint.pt, keeping the one before, and generator-<images>.pt.

        What the disk refuses is a warning. With `wait` it is all there, or refused, on return.
        """
        if self.thread and self.thread.is_alive() and not wait:
            print("warning: the disk is still writing the last checkpoint; this one is left out", file=sys.stderr)
            return
        self.join()
        images = content["images"]
        files = {f"generator-{images:09d}.pt": {k: content[k] for k in ("format", "images", "latent", "G")},
                 "checkpoint.pt": content}
        snapshot = {}
        for name, data in files.items():
            torch.save(data, buffer := io.BytesIO(), pickle_protocol=2)  # Gaudi's default, 4, opens nowhere else
            snapshot[name] = buffer.getbuffer()
        self.thread = threading.Thread(target=self.write, args=(snapshot,))
        self.thread.start()
        if wait:
            self.join()

    def write(self, snapshot):
        try:
            for name, data in snapshot.items():
                previous = self.out / "checkpoint-previous.pt" if name == "checkpoint.pt" else None
                write_file(self.out / name, data, previous=previous)
            self.failed = None
        except OSError as error:
            self.failed = f"no checkpoint at {self.out}: {error.strerror or error}"
            print(f"warning: {self.failed}; training goes on", file=sys.stderr)

    def join(self):
        if self.thread:
            self.thread.join()


# ---- the run --------------------------------------------------------------------------------------------------------

def claim(args):
    """Make the run's folder, or refuse it: an earlier run's, or one in training. Returns the lock, to be kept."""
    out = Path(args.out)
    ours = {".lock", "samples", "args.json.tmp"}  # what a run leaves that is killed at once
    if not args.resume and out.exists() and (not out.is_dir() or {p.name for p in out.iterdir()} - ours):
        raise InputError(f"{out} is there already: --resume goes on with it, --out names another folder")
    (out / "samples").mkdir(parents=True, exist_ok=True)
    lock = open(out / ".lock", "w")
    try:
        fcntl and fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{out} is being trained by another process: wait for it, or name another --out") from None
    if args.resume and any(out.glob("checkpoint*.pt")):
        sound, newest = load_newest(out)[0], out / "checkpoint.pt"
        if sound != newest and newest.exists():  # else the next save would put it in the sound one's place
            os.replace(newest, out / "damaged.pt")
    return lock


class Board:
    """What people look at: TensorBoard's events, pictures and args.json. A full disk costs a warning, not the run."""

    def __init__(self, out, images):
        self.out, self.writer, self.first = Path(out), None, images + 1  # on --resume, events past the checkpoint are void
        self.resting_until = 0.0
        threading.excepthook = lambda args: (  # a full disk ends the writer's thread, and our next call to it says so
            issubclass(args.exc_type, OSError) or threading.__excepthook__(args))

    def write(self, add):
        """Call add(SummaryWriter); a minute after a failure it tries again with a new one, which is a new file."""
        if time.monotonic() < self.resting_until:
            return
        try:
            if not self.writer:
                self.writer, self.first = SummaryWriter(self.out, purge_step=self.first), None
            add(self.writer)
            self.writer.flush()
        except Exception as error:  # the writer's thread passes on whatever stopped it
            print(f"warning: nothing logged at {self.out}: {error}; training goes on", file=sys.stderr)
            self.writer, self.resting_until = None, time.monotonic() + 60

    def start(self, args, **in_force):
        write_file(self.out / "args.json", (json.dumps({**vars(args), "in_force": in_force}, indent=1) + "\n").encode())
        plain = {name: value for name, value in vars(args).items() if isinstance(value, (int, float, str))}
        self.write(lambda writer: writer.add_hparams(plain, {}, run_name="."))

    def scalars(self, values, images):
        self.write(lambda writer: [writer.add_scalar(name, value, images) for name, value in values.items()])

    def picture(self, name, batch, images):
        """A grid of float (N, 3, S, S) in [-1, 1], for TensorBoard and as samples/<images>.png or samples/<name>.png."""
        def add(writer):
            grid = make_grid(batch.cpu(), normalize=True, value_range=(-1, 1))
            writer.add_image(name, grid, images)
            save_image(grid, self.out / "samples" / (f"{images:09d}.png" if name == "samples" else f"{name}.png"))
        self.write(add)


def average_buffers(nets, world):
    """Batch norm's running statistics become the mean over the ranks, which saw different images."""
    for buffer in (b for net in nets for b in net.buffers() if b.is_floating_point()):
        dist.all_reduce(buffer)
        buffer /= world


def seed_noise(seed, rank, step, device):
    """Seed what the step draws on the device, for every step from its number: a resumed run needs no other state."""
    seed = int(np.random.SeedSequence((seed, rank, step)).generate_state(1)[0])
    torch.manual_seed(seed)
    if device.type == "hpu":
        getattr(torch.hpu, "random", torch.hpu).manual_seed_all(seed)


def gflop_per_image(args):
    """Arithmetic of training on one image: 3 forwards of G (its backward counts two) and 8 of D, which reads real, fake
    and fake again, each with a backward that costs two, less one for the weights that are frozen the last time."""
    with torch.device("meta"), FlopCounterMode(display=False) as of_G:
        image = Generator(args.image_size, args.nz, args.ngf, 3, args.kernel_size)(torch.empty(1, args.nz))
    with torch.device("meta"), FlopCounterMode(display=False) as of_D:
        Discriminator(args.image_size, args.ndf, 3, args.kernel_size)(image)
    return (3 * of_G.get_total_flops() + 8 * of_D.get_total_flops()) / 1e9


# Dense TFLOP/s in bf16 (V100, T4: fp16) from NVIDIA's data sheets, to say what share of them training reaches.
PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "V100": 125, "L4": 121, "T4": 65}


def benchmark_table(args, device_name, world, precision, images_s, waiting):
    """One row in the write-up's form, as Markdown with its header."""
    tflops = images_s * gflop_per_image(args) / 1e3
    peak = args.peak_tflops or next((rate for name, rate in PEAK_TFLOPS.items() if name in device_name), None)
    row = {"preset": args.preset, "device": f"{world} × {device_name}", "batch": f"{world} × {args.batch_size}",
           "precision": precision, "images/hour": f"{images_s * 3600:,.0f}",
           "images per $": f"{images_s * 3600 / args.price:,.0f}" if args.price else "–",
           "waiting for data": f"{waiting:.1%}", "TFLOP/s": f"{tflops:.3g}",
           "of the peak": f"{tflops / peak / world:.1%}" if peak else "–"}
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (row, ["---"] * len(row), row.values()))


def join_processes(device, world):
    """(barrier, share) of torchrun's processes, one a device; share(n) is the largest n of all. Neither needs the devices."""
    if world == 1:
        return lambda: None, lambda n: n
    if device.type == "hpu":
        import habana_frameworks.torch.distributed.hccl  # noqa: F401  makes the backend known
    # torchrun's store outlives a restart, and what the dead wrote into it would mislead the living. (On several machines
    # the counts may differ.)
    store, rank, _ = next(dist.rendezvous("env://"))
    if os.environ.get("LOCAL_WORLD_SIZE") == str(world):
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group({"cuda": "nccl", "hpu": "hccl", "cpu": "gloo"}[device.type], store=store, rank=rank, world_size=world)
    hosts = dist.new_group(backend="gloo", timeout=timedelta(days=1))  # preparing a pack takes its time

    def share(n):
        dist.all_reduce(n := torch.tensor(n), dist.ReduceOp.MAX, group=hosts)
        return int(n)

    return lambda: dist.barrier(hosts), share


def find_data(args, rank, local, world, barrier):
    """The pack to train on, prepared if need be: by rank 0, and by one rank of each machine that does not share its disk."""
    for turn in (rank == 0, local == 0, True):
        path = prepare_data.find_pack(args.data, args.image_size) if turn else None
        barrier()
    pack = prepare_data.open_pack(path)
    if pack.image_size != args.image_size:
        raise InputError(f"{path} is for images of {pack.image_size} pixels, and this would train at {args.image_size}: "
                         f"choose --image-size {pack.image_size}, or prepare another pack")
    if args.batch_size * world > len(pack.train):
        raise InputError(f"--batch-size {args.batch_size} × {world} process(es) is more than the {len(pack.train)} images "
                         f"of {path}")
    return pack


def main(argv=None):
    args = parse_args(argv)
    rank, local = (int(os.environ.get(key, 0)) for key in ("RANK", "LOCAL_RANK"))  # from torchrun
    world, chief = int(os.environ.get("WORLD_SIZE", 1)), rank == 0  # the chief is who writes and speaks
    say = functools.partial(print, flush=True) if chief else lambda *_: None
    device, precision, lists = set_up_device(args, local)
    barrier, share = join_processes(device, world)
    pack = find_data(args, rank, local, world, barrier)
    lock = claim(args) if chief and not args.benchmark else None  # held as long as we live
    barrier()

    # Networks and optimizers, from the seed or from the checkpoint.
    torch.manual_seed(args.seed)
    G = Generator(args.image_size, args.nz, args.ngf, 3, args.kernel_size).apply(init_weights)
    D = Discriminator(args.image_size, args.ndf, 3, args.kernel_size).apply(init_weights)
    layout = torch.contiguous_format if device.type == "hpu" else torch.channels_last  # 1.1×; Gaudi lays tensors out itself
    nets = G, D = [net.to(device, memory_format=layout) for net in (G, D)]
    optimizers = [make_optimizer(net, args, device) for net in nets]
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    step, images = restore(nets, optimizers, scaler, args) if args.resume else (0, 0)  # done so far; images of all ranks
    batch = args.batch_size * world
    total = -(-args.epochs * len(pack.train) // batch) * batch  # whole steps
    if args.benchmark:
        total, args.log_every = images + (10 + args.benchmark) * batch, 10  # the first ten are for warming up

    train_step = set_up_step(nets, optimizers, scaler, args, device, DTYPES[precision], world, (total - images) // batch)

    card = getattr(torch, device.type)  # torch.cuda, torch.hpu, torch.cpu
    device_name = f"{torch.get_num_threads()} CPU threads" if device.type == "cpu" else card.get_device_name()
    say(f"{args.preset} in {precision} on {world} × {device_name}: {len(pack.train):,} frames of {pack.folder}"
        + (f", run {args.out} from image {images:,} of {total:,}" if lock else ""))
    for which, ops in zip(("low precision", "fp32"), lists or ()):
        say(f"ops in {which}: {' '.join(ops)}")

    # What rank 0 keeps and shows.
    board, saver = (Board(args.out, images), Saver(args.out)) if lock else (None, None)
    fixed_z = latents(range(64), args.nz, args.latent).to(device)  # seeds 0-63, as sample.py shows them

    def save(wait):
        saver.save(checkpoint(nets, optimizers, scaler, args, step, images), wait)

    def give_up(at, problem):
        if saver:
            saver.join()
        sys.exit(f"error: step {at}: {problem}. The last checkpoint is from before; --resume from it with a lower --lr "
                 "or --precision fp32")

    def draw():
        with torch.no_grad():
            fake = G.eval().forward(fixed_z)  # forward is the plain one, not the compiled
        G.train()
        board.picture("samples", fake, images)

    if board:
        board.start(args, launch=launch(), device=device_name, world=world, precision=precision,
                    bf16_ops=lists and lists[0], fp32_ops=lists and lists[1])
        if not images:
            save(wait=True)
            if saver.failed:  # better now than after a day
                raise InputError(saver.failed)
            draw()

    # The loop.
    notice = []  # a spot machine's SIGTERM, or Ctrl-C: finish the step, save, go
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda signum, frame: notice.append(signum))
    profiler = nullcontext()
    if args.profile and board:
        profiler = torch.profiler.profile(schedule=torch.profiler.schedule(wait=5, warmup=2, active=5, repeat=1),
                                          on_trace_ready=torch.profiler.tensorboard_trace_handler(args.out),
                                          record_shapes=True)
    stream, history, first = batches(pack, args, device, rank, world, images), [], step
    began = since = time.perf_counter()
    waited = waited_since = 0.0
    with profiler:
        while images < total:
            asked = time.perf_counter()
            with torch.profiler.record_function("waiting for data"):
                frames = next(stream)
            waited += time.perf_counter() - asked
            seed_noise(args.seed, rank, step, device)
            history.append(train_step(frames))
            step, images = step + 1, images + batch
            if args.profile and board:
                profiler.step()

            leave = share(max(notice, default=0))  # a notice to one rank is a notice to all
            last = images >= total or bool(leave)
            sampling, saving = (not args.benchmark and (last or images // every > (images - batch) // every)
                                for every in (args.sample_every, args.save_every))
            if not (last or sampling or saving or step % args.log_every == 0):
                continue
            values = torch.stack(history).tolist()  # the one copy back from the device; it waits for the steps so far
            now = time.perf_counter()
            rate, left = len(history) * batch / (now - since), max(0, total - images)
            for at, (loss_D, loss_G, *_) in enumerate(values, step - len(values) + 1):
                if not math.isfinite(loss_D + loss_G):
                    give_up(at, f"Loss_D is {loss_D}, Loss_G {loss_G}")
            if saving and not all(t.isfinite().all() for net in nets for t in net.state_dict().values()):
                give_up(step, "a weight is infinite or no number")  # its loss would be, one step later
            epoch, steps = min(args.epochs, -(-images // len(pack.train))), step - (-left // batch)
            say("[{}/{}][{}/{}] Loss_D {:.4f} Loss_G {:.4f} D(x) {:.4f} D(G(z)) {:.4f} / {:.4f}".format(
                epoch, args.epochs, step, steps, *values[-1]),
                f" {rate:,.0f} images/s, {timedelta(seconds=round(left / rate))} left")
            if board:
                shown = {**dict(zip(STATS, values[-1])), "images/s": rate,
                         "share of time waiting for data": (waited - waited_since) / (now - since)}
                if device.type != "cpu":
                    shown["device memory (GB)"] = card.max_memory_allocated() / 1e9
                board.scalars(shown, images)
                if step - len(history) == first:
                    board.picture("real", cut_windows(frames, args.image_size, args.mirror)[:64], images)
            if world > 1 and (sampling or saving):
                average_buffers(nets, world)
            if board and sampling:
                draw()
            if board and saving:
                save(wait=last)
            if args.benchmark and step - first == 10:
                began, waited = time.perf_counter(), 0.0
            history.clear()
            since, waited_since = time.perf_counter(), waited
            if last:
                break

    if args.benchmark:
        took = time.perf_counter() - began
        say(benchmark_table(args, device_name, world, precision, args.benchmark * batch / took, waited / took))
    if board:
        saver.join()
        board.write(lambda writer: writer.close())
        if saver.failed:
            sys.exit(f"error: {saver.failed}")
        say(f"{args.out} is at image {images:,} of {total:,}; see it with: python sample.py --checkpoint {args.out}")
    barrier()  # until rank 0 has saved
    if world > 1:
        dist.destroy_process_group()
    if notice:  # the usual end by this signal, for whoever waits for our status
        raise KeyboardInterrupt(notice[0])
    return G, D


if __name__ == "__main__":
    run(main, prepare_data.InputError)
