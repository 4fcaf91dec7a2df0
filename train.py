"""Train a DCGAN (Radford, Metz, Chintala 2015, https://arxiv.org/abs/1511.06434) on street scenes.

    python train.py                                      # draws its own streets: five minutes
    python train.py --data photos                        # a folder of photographs, a pack or MSLS
    python train.py --data packs/msls --preset clamp-64 --minutes 480
    python train.py --device hpu --data /mnt/gp3/msls    # on a Gaudi card
    python train.py --resume --out runs/small-64         # continue a run
    torchrun --nproc-per-node 8 train.py --data packs/msls --resume    # on eight devices

A run is a folder: checkpoint.pt, best.pt (the checkpoint with the best score), some
generator-<images>.pt, samples/<images>.png, scores.csv, args.json and TensorBoard's events
(tensorboard --logdir runs).

SPDX-License-Identifier: MIT
Copyright (c) 2026 the authors of this repository
"""
import argparse
import atexit
import copy
import io
import json
import math
import os
import shlex
import signal
import sys
import textwrap
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count, cycle
from pathlib import Path

if __name__ == "__main__":  # these are read when torch is imported
    # Gaudi's plugin is loaded by choose_device, after its own variables are set.
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    # Threads that wait soon sleep. Threads that spin lose their time to any other program.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid, save_image

from model import (  # isort: skip
    D_NAMES, DEVICES, G_NAMES, IMAGE_SIZES, NAIVE, PRESETS, SCORED, SIZES, Discriminator, Generator,
    InputError, Score, choose_device, cut_windows, find_checkpoint, free_cores, handling,
    init_weights, latents, load_file, one_line, read_sizes, rebuild, render, run_script, say,
    spread_windows, warn, write_file)
from prepare_data import find_pack, open_pack


# ---- the networks and a training step ------------------------------------------------------------
def d_loss(on_real, on_fake):
    """-log D(x) - log(1 - D(G(z))), from logits: softplus(-a) = -log(sigmoid(a))."""
    return F.softplus(-on_real).mean() + F.softplus(on_fake).mean()


def g_loss(on_fake):
    """-log D(G(z)), the non-saturating loss (Goodfellow et al. 2014, section 3)."""
    return F.softplus(-on_fake).mean()


class DCGAN:
    """G, D, their optimizers, and G_ema, the exponential moving average (EMA) of G's weights.

    G_ema draws the samples. `args` has the options of the command line, `device` is a Device, and
    `world` is the number of processes that train together. In a program of your own:

        args = parse_args(["--preset", "small-64"])
        dcgan = DCGAN(args, set_up_device(args))
        stats = dcgan.step(frames)  # frames: see step

    It seeds torch's random numbers with --seed.
    """

    def __init__(self, args, device, world=1):
        self.args = args
        self.device = device
        self.world = world

        torch.manual_seed(args.seed)  # all processes get the same weights
        G = Generator(args.image_size, args.nz, args.ngf, kernel_size=args.kernel_size)
        G.apply(init_weights)
        D = Discriminator(args.image_size, args.ndf, kernel_size=args.kernel_size)
        D.apply(init_weights)
        self.G = G.to(device.kind, memory_format=device.layout)
        self.D = D.to(device.kind, memory_format=device.layout)
        self.G_ema = copy.deepcopy(self.G).requires_grad_(False)
        self.steps = torch.zeros((), device=device.kind)  # a number would be a new graph on Gaudi

        adam = dict(
            lr=args.lr,
            betas=(args.beta1, 0.999),
            eps=1e-8,
            weight_decay=args.weight_decay,
            **device.adam,
        )
        self.opt_G = device.AdamW(self.G.parameters(), **adam)
        self.opt_D = device.AdamW(self.D.parameters(), **adam)
        self.scaler = torch.amp.GradScaler(device.kind, enabled=device.precision == "fp16")
        if args.compile:
            self.G.compile(backend=device.compiler)
            self.D.compile(backend=device.compiler)

    def step(self, frames):
        """One update of D, then one of G, on the same fakes.

        frames: uint8 (N, H, W, 3) on the device, W ≥ H ≥ image_size, N > 1. Returns {name: float32
        scalar on the device}.

        This is algorithm 1 of Goodfellow et al. 2014 with k = 1 and the non-saturating loss. One
        and the same D(G(z)) is known before D's update (z1) and after it (z2), as pytorch/examples
        names them. test_a_step_equals_the_plain_loop_to_rounding in tests/test_train.py shows this
        step in its well-known form.
        """
        G, D = self.G, self.D
        real = cut_windows(frames, self.args.image_size, self.args.mirror)
        z = self.draw_latents(len(frames))

        # D learns: D(x) rises for real images, and D(G(z)) falls.
        with self.autocast():
            fake = G(z)
            # Real images get the fakes' dtype and layout, so that torch.compile traces D once.
            real = real.to(fake.dtype, memory_format=self.device.layout)
            # Real and fake images go through D apart: each kind has its own batch statistics.
            on_real = self.logits(D, real)
            on_fake = self.logits(D, fake.detach())  # D's update leaves G alone
        loss_D = d_loss(on_real, on_fake)
        self.update(self.opt_D, loss_D)

        # G learns: D(G(z)) rises. D's weights need no gradients, which saves a sixth of the time.
        D.requires_grad_(False)
        with self.autocast():
            on_fake_after = self.logits(D, fake)
        loss_G = g_loss(on_fake_after)
        with torch.no_grad():
            # Add a number here, and TensorBoard shows it. Reporter.log prints these. Do not call
            # .item(): it waits for the device, and a CUDA graph cannot record it.
            stats = {
                "Loss_D": loss_D.detach(),
                "Loss_G": loss_G.detach(),
                "D(x)": on_real.sigmoid().mean(),
                "D(G(z1))": on_fake.sigmoid().mean(),
                "D(G(z2))": on_fake_after.sigmoid().mean(),
            }
        # On Gaudi, G's update ends the graph, so it must be last. G_ema is one step behind.
        self.update_average(len(frames) * self.world)
        self.update(self.opt_G, loss_G)
        D.requires_grad_(True)
        return stats

    def draw_latents(self, n):
        z = torch.empty(n, self.args.nz, device=self.device.kind)
        return z.normal_() if self.args.latent == "normal" else z.uniform_(-1, 1)

    def autocast(self):
        """Mixed precision. A context caches bf16 copies of the weights.

        An update makes them out of date, so each forward pass gets a new context.
        """
        dtype = AUTOCAST[self.device.precision]
        return torch.autocast(self.device.kind, dtype, enabled=dtype is not None)

    def logits(self, D, images):
        """D's float32 logits (N,) of images, with the shifts and the noise that D always sees."""
        if self.args.augment:
            images = translate(images)
        if self.args.instance_noise:
            noise = torch.randn(images.shape, device=images.device)
            images = images + self.args.instance_noise * noise
        return D(images).float()  # the losses are in fp32

    def update(self, optimizer, loss):
        """One step of an optimizer, with the mean gradient of all processes."""
        optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss / self.world).backward()
        if self.world > 1:
            add_up([p.grad for p in optimizer.param_groups[0]["params"]])
        # The gradients are complete: measure or clip them here. In fp16 they are scaled up.
        self.scaler.step(optimizer)
        self.scaler.update()

    @torch.no_grad()
    def update_average(self, n):
        """Move G_ema towards G's weights. n: images of this step in all processes.

        In step t it moves by 7/t of the way. All weights up to step s together then count (s/t)^7,
        which is 1/2 at s = 0.91 t: half is forgotten in a tenth of the run. In the first 7 steps
        the average is a copy. In long runs half is forgotten in 20,000 images.
        """
        self.steps += 1
        slowest = 1 - 0.5 ** (n / 20_000)
        rate = (7 / self.steps).clamp(slowest, 1)
        for average, weight in zip(self.G_ema.parameters(), self.G.parameters()):
            average.lerp_(weight, rate)

    @torch.no_grad()
    def sampler(self):
        """G_ema in eval mode, with the batch-norm statistics of 512 latents.

        The training is the same with and without a call.
        """
        for average, own in zip(self.G_ema.buffers(), self.G.buffers()):
            average.copy_(own)  # a layer with spectral norm keeps vectors in its buffers
        for layer in self.G_ema.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.reset_running_stats()
                layer.momentum = 1.0  # takes the statistics of the next batch as they are
        z = latents(range(512), self.args.nz, self.args.latent)
        self.G_ema.train()(z.to(self.device.kind))
        return self.G_ema.eval()

    @torch.no_grad()
    def d_held_out(self, frames):
        """Mean D(x) of about 256 windows of held-out frames, an array (N, H, W, 3).

        As in training, each batch has its own statistics. The training is the same with and
        without a call, because seed_step seeds each step.
        """
        batch_size = self.args.batch_size
        n = math.ceil(256 / batch_size) * batch_size
        windows = torch.cat(list(spread_windows(frames, n, self.args.image_size)))
        D = copy.deepcopy(self.D)  # the running statistics of the copy change
        with torch.random.fork_rng(devices=[]), self.autocast():
            torch.manual_seed(0)
            parts = windows.split(batch_size)
            logits = [self.logits(D, part.to(self.device.kind)) for part in parts]
        return torch.cat(logits).sigmoid().mean().item()

    def state_dict(self):
        """All that load_state_dict needs: tensors on the CPU, and plain values."""
        nets = {name: getattr(self, name).state_dict() for name in ("G", "D", "G_ema", "scaler")}
        return to_cpu({
            **nets,
            "opt_G": self.opt_G.state_dict()["state"],
            "opt_D": self.opt_D.state_dict()["state"],
            "step": int(self.steps),
        })

    def load_state_dict(self, saved):
        """Continue bit for bit from what state_dict gave, with the command line's options.

        There is no random state in it: seed_step seeds each step.
        """
        for name in ("G", "D", "G_ema"):
            getattr(self, name).load_state_dict(saved[name])
        self.load_optimizer(self.opt_G, saved["opt_G"], saved)
        self.load_optimizer(self.opt_D, saved["opt_D"], saved)
        self.steps.copy_(torch.tensor(float(saved["step"])))
        if saved["scaler"]:  # empty unless it was trained in fp16
            self.scaler.load_state_dict(saved["scaler"])

    def load_optimizer(self, optimizer, state, saved):
        """Give an optimizer the moments of a checkpoint, which any kind of device can have saved.

        The learning rate is the command line's. torch counts steps with each parameter, Gaudi in
        the group: both get the run's count. In fp16 the saved counts stay, because the scaler skips
        steps.
        """
        group = optimizer.state_dict()["param_groups"][0]
        group["step"] = saved["step"]
        loaded = {}
        for i, weight in enumerate(optimizer.param_groups[0]["params"]):
            moments = dict(state[i])
            for key in ("exp_avg", "exp_avg_sq"):  # fused kernels need the layout of the weights
                moments[key] = torch.empty_like(weight, device="cpu").copy_(moments[key])
            if not saved["scaler"]:
                moments["step"] = torch.tensor(float(saved["step"]))
            loaded[i] = moments
        optimizer.load_state_dict({"state": loaded, "param_groups": [group]})


def translate(images):
    """Images (N, C, S, S), each shifted by up to S/8 pixels, with zeros at the border.

    This is DiffAugment's translation (Zhao et al. 2020, https://arxiv.org/abs/2006.10738). Products
    with 0/1 matrices move row i - shift to row i. They need no gather, which Gaudi lacks for some
    types.
    """
    S = images.shape[-1]
    pixels = torch.arange(S, device=images.device)
    shifts = torch.empty(2, len(images), 1, 1, 1, device=images.device)
    shifts = shifts.uniform_(-(S // 8), S // 8 + 1).floor()
    rows, columns = (pixels[:, None] == pixels + shifts).to(images.dtype)  # (N, 1, S, S) each
    return rows @ images @ columns.mT


def add_up(gradients):
    """Replace each gradient by its sum over the processes, in one message."""
    views = [in_memory_order(gradient) for gradient in gradients]
    message = torch.cat(views)
    dist.all_reduce(message)
    for view, part in zip(views, message.split([len(view) for view in views])):
        view.copy_(part)


def in_memory_order(tensor):
    """A view (n,) of all numbers of a tensor. flatten() would copy one that is channels_last."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    return tensor.as_strided((tensor.numel(),), (1,))


def to_cpu(value):
    if isinstance(value, dict):
        return {key: to_cpu(v) for key, v in value.items()}
    return value.cpu() if isinstance(value, torch.Tensor) else value


# ---- data ----------------------------------------------------------------------------------------
def find_data(args, ranks):
    """The Pack to train on. Raw images are prepared first. Raises InputError."""
    if ranks.world > 1 and not Path(args.data or "", "pack.json").exists():
        raise InputError("several processes need a pack: run prepare_data.py first, "
                         "and name its output with --data")
    pack = open_pack(find_pack(args.data, args.image_size or 64))
    if args.image_size not in (None, pack.image_size):
        raise InputError(f"{pack.folder} is a pack for {pack.image_size} pixels, not "
                         f"{args.image_size}: add --image-size {pack.image_size}, "
                         "or name another pack")
    return pack


def options_for(pack):
    """The options that fit a pack, for a command line without a preset: {option: value}."""
    if len(pack.train) >= 10_000:
        preset = "naive-64"
    elif pack.image_size > 64:
        preset = "small-128"
    else:
        preset = "small-64"
    return dict(preset=preset, image_size=pack.image_size)


def share(frames, ranks, batch_size):
    """This process's part of the training frames. All parts are equally long. Raises InputError."""
    n = len(frames) // ranks.world
    if batch_size > n:
        raise InputError(f"--batch-size {batch_size} is more than the {n} training frames "
                         "of a process: use a smaller one, or more images")
    return frames[ranks.rank * n:(ranks.rank + 1) * n]


def cut_stretches(frames, batch_size):
    """(stretches [(start, stop), …] of the frames, steps per epoch).

    A stretch has 256 to 512 MB, or eight batches if these are larger. A smaller pack is one
    stretch.
    """
    n = max(1, min(frames.nbytes // (256 * 2 ** 20), len(frames) // (8 * batch_size)))
    bounds = np.linspace(0, len(frames), n + 1).astype(int).tolist()
    stretches = list(zip(bounds[:-1], bounds[1:]))
    return stretches, sum((stop - start) // batch_size for start, stop in stretches)


READ_AHEAD = 4  # batches that are gathered before they are needed
KEPT = 3  # batches that stay valid: the one in use, and two that CUDA may still be copying


def batches(frames, batch_size, seeds, seen=0, pin=False):
    """Yield uint8 (batch_size, H, W, 3) on the CPU, without end, but the first `seen` batches.

    Stretches of the memory-mapped frames are read in random order, and the frames of each are
    shuffled. A pack has its sequences in random order, so a stretch samples hundreds of streets.
    seeds: (--seed, rank). All batches are whole, because Gaudi compiles for each shape: an epoch
    leaves out the rest of a stretch. Two threads read and gather ahead. The memory of a batch is
    used again when the third batch after it is taken.
    """
    stretches = read_ahead(read_stretches(frames, batch_size, seeds, seen), 1)
    return read_ahead(gather(stretches, (batch_size, *frames.shape[1:]), pin), READ_AHEAD)


def read_stretches(frames, batch_size, seeds, seen):
    """Yield (frames of a stretch, rows (batches, batch_size) of them), epoch after epoch.

    Two buffers take turns: one is read while batches are gathered from the other.
    """
    stretches, steps_per_epoch = cut_stretches(frames, batch_size)
    longest = max(stop - start for start, stop in stretches)
    buffers = cycle(np.empty((longest, *frames.shape[1:]), np.uint8) for _ in range(2))
    skip = seen % steps_per_epoch  # batches of this epoch that the run has seen

    for epoch in count(seen // steps_per_epoch):
        rng = np.random.default_rng((*seeds, epoch))
        for start, stop in rng.permutation(stretches):
            rows = rng.permutation(stop - start)  # of seen stretches too: later ones depend on it
            whole = len(rows) // batch_size
            rows = rows[:whole * batch_size].reshape(whole, batch_size)
            unseen = rows[skip:]
            skip = max(0, skip - whole)
            if len(unseen):
                buffer = next(buffers)[:stop - start]
                copy_in_parts(frames[start:stop], buffer)
                yield buffer, unseen


def copy_in_parts(source, target):
    """Copy an array with four threads: a disk is faster when several parts are read at a time."""
    with ThreadPoolExecutor(4) as threads:
        parts = zip(np.array_split(target, 4), np.array_split(source, 4))
        list(threads.map(lambda part: np.copyto(*part), parts))


def gather(stretches, shape, pin):
    """Yield batches of `shape` from stretches and their rows."""
    buffers = cycle(torch.empty(shape, dtype=torch.uint8, pin_memory=pin)
                    for _ in range(READ_AHEAD + KEPT))
    for stretch, rows in stretches:
        for row in rows:
            batch = next(buffers)
            # take() releases the GIL, and starts no OpenMP threads. "clip" writes without a copy.
            stretch.take(row, axis=0, out=batch.numpy(), mode="clip")
            yield batch


def read_ahead(items, n):
    """Yield from an endless iterator, while a thread computes the next n items."""
    with ThreadPoolExecutor(1) as thread:
        ahead = deque(thread.submit(next, items) for _ in range(n))
        while True:
            item = ahead.popleft().result()
            ahead.append(thread.submit(next, items))
            yield item


class Feed:
    """An iterator over batches on the device. `waited` counts the seconds of waiting for them.

    On CUDA the upload runs beside the step, and the host stays two steps ahead of the GPU and no
    more: further ahead, it would wait for data while the GPU still has work.
    """

    def __init__(self, batches, device):
        self.batches = batches
        self.kind = device.kind
        self.waited = 0.0
        self.upload = torch.cuda.Stream() if device.kind == "cuda" else None
        self.running = deque()  # the ends of the steps that the GPU may not have finished

    def __iter__(self):
        return self

    def __next__(self):
        if self.upload:
            self.running.append(torch.cuda.current_stream().record_event())
            if len(self.running) > 2:
                self.running.popleft().synchronize()

        began = time.perf_counter()
        batch = next(self.batches)
        self.waited += time.perf_counter() - began

        if not self.upload:
            return batch.to(self.kind)
        with torch.cuda.stream(self.upload):
            uploaded = batch.to(self.kind, non_blocking=True)
        compute = torch.cuda.current_stream()
        compute.wait_stream(self.upload)
        uploaded.record_stream(compute)  # its memory is free after the step, not after the upload
        return uploaded


# ---- devices -------------------------------------------------------------------------------------
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Device:
    """What a kind of device needs. The defaults are safe for one that nobody has tried."""

    kind: str  # as torch.device takes it
    precision: str = "fp32"  # of the forward passes: fp32, bf16 or fp16
    layout: torch.memory_format = torch.contiguous_format  # of weights and images
    AdamW: type = torch.optim.AdamW
    adam: dict = field(default_factory=dict)  # its options besides those of the command line
    pin: bool = False  # gather batches in page-locked memory
    backend: str = "gloo"  # of torch.distributed
    compiler: str = "inductor"  # of torch.compile
    manual_seed: Callable = torch.manual_seed  # of the random numbers on the device
    peak_memory: Callable = None  # () → bytes


def set_up_device(args, local_rank=0):
    """The Device that --device names. Raises InputError if it cannot be used as the options say."""
    set_gaudi_variables(args)
    device = Device(choose_device(args.device, local_rank).type)
    if device.kind == "cpu":
        # fp32, even if it has bf16. Beside another program, bf16 takes five times as long, because
        # oneDNN's threads spin in its gradients (tests/README.md).
        device.layout = torch.channels_last
        device.adam = dict(fused=True)
        if args.threads and "OMP_NUM_THREADS" not in os.environ:
            # The resumed run's, because rounding depends on it. This machine can have fewer.
            torch.set_num_threads(min(args.threads, torch.get_num_threads()))
        args.threads = torch.get_num_threads()
    elif device.kind == "cuda":
        has_bf16 = torch.cuda.get_device_capability() >= (8, 0)
        if args.precision == "bf16" and not has_bf16:
            raise InputError("--precision bf16: this GPU has no bf16 (it needs compute capability "
                             "8): use --precision auto")
        device.precision = "bf16" if has_bf16 else "fp16"
        device.layout = torch.channels_last
        device.adam = dict(fused=True, capturable=args.graph)
        device.pin = True
        device.backend = "nccl"
        device.manual_seed = torch.cuda.manual_seed  # torch's own takes 30 times as long
        device.peak_memory = torch.cuda.max_memory_reserved
        torch.backends.cudnn.benchmark = True  # shapes never change
        torch.backends.cudnn.allow_tf32 = False  # fp32 stays exact; bf16 is for speed
    elif device.kind == "hpu":
        import habana_frameworks.torch.distributed.hccl  # noqa: F401  makes the backend known
        from habana_frameworks.torch.hpex.optimizers import FusedAdamW

        device.precision = "bf16"
        device.AdamW = FusedAdamW  # in lazy mode its step cuts the graph before and after itself
        device.backend = "hccl"
        device.compiler = "hpu_backend"
        device.peak_memory = torch.hpu.max_memory_allocated

    if args.precision != "auto":
        device.precision = args.precision
    if device.kind != "cuda" and (args.graph or device.precision == "fp16"):
        raise InputError("--graph and --precision fp16 are for NVIDIA GPUs: "
                         "use --no-graph --precision auto")
    return device


def name_ignored_options(args, device):
    """Say which options have no effect."""
    ignored = [flag(name) for name in OLD_FLAGS if hasattr(args, name)]
    if ignored:
        say(f"without effect: {', '.join(ignored)} (bf16 is the default on hpu)")
    if device.kind != "hpu" and (args.bf16_ops or args.fp32_ops):
        say("--bf16-ops and --fp32-ops are for hpu: here torch.autocast's own rules apply")


def set_gaudi_variables(args):
    """Gaudi's plugin reads its mode and its lists of ops from the environment when it loads."""
    variables = {}
    if args.compile:
        variables["PT_HPU_LAZY_MODE"] = "0"  # eager mode; otherwise choose_device sets lazy mode
    for file, name in ((args.bf16_ops, "LOWER_PRECISION"), (args.fp32_ops, "FP32")):
        if file:
            check_ops(file)
            variables[f"PT_HPU_AUTOCAST_{name}_OPS_LIST"] = file
    if args.device in ("auto", "hpu"):
        os.environ.update(variables)


def check_ops(file):
    """A list of ops has one name per line. The plugin ignores a name that it does not know."""
    try:
        text = Path(file).read_bytes().decode(errors="replace")
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from error
    if "\r" in text:
        raise InputError(f"{file} has Windows line ends, with which Gaudi's plugin finds no op: "
                         f"convert it with sed -i 's/\\r$//' {shlex.quote(file)}")
    unknown = [name for name in text.splitlines() if not hasattr(torch.ops.aten, name)]
    if unknown:
        warn(f"{file}: torch does not know {unknown}")


def graphed(step):
    """DCGAN.step as one CUDA graph, which one launch replays.

    See "Whole-network capture" in PyTorch's CUDA semantics. The returned tensors are overwritten by
    the next call.
    """
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_stream(stream)  # the default stream cannot be recorded
    calls = count()
    inputs, outputs = None, None

    def replay(frames):
        nonlocal inputs, outputs
        if next(calls) < 5:  # warm-up, with real steps
            return step(frames)
        if inputs is None:
            inputs = frames.clone()
            # thread_local: meanwhile another thread pins memory
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                outputs = step(inputs)
        inputs.copy_(frames)
        graph.replay()
        return outputs

    return replay


# ---- processes and signals -----------------------------------------------------------------------
class Ranks:
    """The processes that train together: torchrun's, or this one. Rank 0 prints and writes."""

    def __init__(self):
        needed = ("RANK", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in needed if name not in os.environ]
        if os.environ.get("WORLD_SIZE", "1") != "1" and missing:
            raise InputError(f"WORLD_SIZE is set and {missing[0]} is not: start several processes "
                             "with torchrun, or unset WORLD_SIZE")
        self.rank = int(os.environ.get("RANK", 0))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.hosts = None  # a gloo group for numbers on the CPU: it does not wait for the devices

    def connect(self, backend):
        if self.world == 1:
            return
        store, *_ = next(dist.rendezvous("env://"))
        if os.environ.get("LOCAL_WORLD_SIZE") == str(self.world):
            # torchrun's store keeps what the ranks wrote before a restart.
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world)
        self.hosts = dist.new_group(backend="gloo")
        atexit.register(leave_the_others)

    def largest(self, *numbers):
        """The largest of each number over all processes, as a list of ints. Waits for them."""
        numbers = torch.tensor(numbers).int()
        if self.world > 1:
            dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self.hosts)
        return numbers.tolist()

    def check_same(self, facts):
        """Raise InputError unless the facts {name: value} are the same in all processes."""
        if self.world == 1:
            return
        everywhere = [None] * self.world
        dist.all_gather_object(everywhere, facts, group=self.hosts)
        for name in facts:
            others = {str(other[name]) for other in everywhere}
            if len(others) > 1:
                raise InputError(f"the processes do not have the same {name}: {', '.join(others)}")

    def disconnect(self):
        if self.world > 1:
            dist.destroy_process_group()


def leave_the_others():
    """At the end of a process that failed: do not wait for the others, so that torchrun ends them.

    Gaudi's plugin would wait for them without a time limit.
    """
    if dist.is_initialized():
        os._exit(2)


@contextmanager
def catch_signals():
    """Within it, a signal to stop is only noted: yields the list of the signals' numbers.

    SIGUSR1 is what Slurm can send before its time limit. Some launchers send SIGTERM twice.
    """
    received = []

    def note(signum, frame):
        received.append(signum)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # from now on, Ctrl-C ends the process at once

    with handling(note, "SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"):
        yield received


def seed_step(device, seed, rank, step):
    """A seed for each step and rank: a resumed run draws the same, and other ranks draw others."""
    sequence = np.random.SeedSequence((seed, rank, step))
    device.manual_seed(int(sequence.generate_state(1)[0]))


# ---- the run's folder ----------------------------------------------------------------------------
def save_file(path, content):
    """torch.save, through write_file."""
    buffer = io.BytesIO()
    torch.save(content, buffer, pickle_protocol=2)  # with Gaudi's default, 4, weights_only fails
    write_file(path, buffer.getbuffer())


def checkpoint_path(args):
    """The path of the checkpoint in --out, which need not exist. Raises InputError."""
    out = Path(args.out or "runs")  # the pack can still choose a folder in runs
    for folder in (out, *out.absolute().parents):
        if os.path.lexists(folder) and not folder.is_dir():  # a file, or a link to a missing disk
            raise InputError(f"--out {out}: {folder} is not a folder. Name another one")
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        if not args.resume:
            raise InputError(f"{out} holds a run: continue it with --resume. For a new run, or "
                             "for other images, name another folder with --out")
        return checkpoint

    names = os.listdir(out) if args.out and out.is_dir() else []
    # A start that was killed leaves 000000000.png alone, and can start again.
    samples = [path.stem for path in (out / "samples").glob("*.png")]
    if os.path.lexists(checkpoint) or any(stem.strip("0") for stem in samples):
        raise InputError(f"{out} has the files of a run, but no checkpoint.pt: put it back, "
                         "or name another folder with --out")
    if any(name.lower().endswith((".npy", ".jpg", ".jpeg", ".png")) for name in names):
        raise InputError(f"{out} has other files: name a new folder with --out")
    return checkpoint


def restore(dcgan, path, pack):
    """Continue from a checkpoint: (step, images, scores). Raises InputError if it does not fit."""
    try:
        saved = load_file(path)
    except InputError as error:
        others = [path.with_name("best.pt"), *sorted(path.parent.glob("generator-*.pt"))[::-1]]
        other = next((file for file in others if file.exists()), None)
        hint = f". Start a new run from {other}: --init {other} --out NEW" if other else ""
        raise InputError(f"{error}{hint}") from error
    if not {"sizes", "pack", "step", "images", "scores"} <= saved.keys():
        raise InputError(f"{path} is not a checkpoint of this train.py: name another --out, "
                         f"or start a new run from it: --init {path} --out NEW")
    run = path.parent
    sizes = {name: getattr(dcgan.args, name) for name in SIZES}
    has = sizes | saved["sizes"]  # an older run does not know a new option
    differing = [f"{flag(name)} {has[name]}" for name in SIZES if has[name] != sizes[name]]
    if differing:
        raise InputError(f"{run} has other networks than these options: use {' '.join(differing)}, "
                         "or name another --out")
    if saved["pack"] != pack.identity:
        raise InputError(f"{run} was trained on other frames than {pack.folder} has. To continue "
                         f"with these, start a new run: --init {run} --out NEW")
    try:
        dcgan.load_state_dict(saved)
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path} does not fit these networks ({one_line(error)}): "
                         "name another --out") from error
    return saved["step"], saved["images"], saved["scores"]


def start_from(dcgan, path):
    """Give a DCGAN the networks of another run, or of a file with G alone. Raises InputError."""
    content = load_file(path)
    G = rebuild(Generator, content, ("G", *G_NAMES), path)
    average = rebuild(Generator, content, G_NAMES, path)
    dcgan.G.load_state_dict(G.state_dict())
    dcgan.G_ema.load_state_dict(average.state_dict())
    try:
        D = rebuild(Discriminator, content, D_NAMES, path)
    except InputError:
        say(f"{path} has no discriminator: D starts anew")
    else:
        dcgan.D.load_state_dict(D.state_dict())


def check_finite(state, step):
    """End the script if the weights in a state dict are not finite: they must not be saved."""
    for net in ("G", "D"):
        if not all(weight.isfinite().all() for weight in state[net].values()):
            sys.exit(f"error: step {step}: a weight is not finite. Use --resume with a lower --lr")


def fingerprint(path):
    """What changes when another process writes a file: None if there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


@contextmanager
def silent_writer():
    """TensorBoard's thread ends at a full disk. Within this, it does so without a traceback."""
    usual = threading.excepthook

    def hook(problem):
        if not isinstance(problem.exc_value, OSError):
            usual(problem)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = usual


class Reporter:
    """What rank 0 prints and writes: log lines, TensorBoard's events, checkpoints, samples, scores.

    total: images that the run trains on. ends: when --minutes are over, as of time.monotonic().
    scores: the rows of scores.csv. unchanged: the fingerprint of the checkpoint when it was read.
    """

    COLUMNS = ("images", "score", "coverage", "score of real images", "coverage of real images",
               "D(held out)")

    def __init__(self, args, pack, dcgan, total, ends, scores, unchanged):
        self.args = args
        self.pack = pack
        self.dcgan = dcgan
        self.total = total
        self.ends = ends
        self.scores = scores
        self.unchanged = unchanged
        self.out = Path(args.out)
        self.board = None  # TensorBoard's
        self.score = None  # a Score, if the pack is large enough
        self.saved = None  # the image of the last save
        self.failed = None  # why the last save failed
        self.first = None  # (images, time) at the start
        self.logs = 0
        self.last_log = None  # (step, seconds of waiting for data, time)
        self.next_log = 0.0  # when the next line is due, as of time.monotonic()
        self.next_save = math.inf

    def start(self, step, images):
        """Open the run's folder. A new run is saved at once, to find a full disk now."""
        args, pack = self.args, self.pack
        if args.resume and not self.unchanged:
            say(f"no run in {self.out}: starting one")
        if self.unchanged and not (self.out / "args.json").exists():
            say(f"{self.out / 'args.json'} was missing: options that were not typed are defaults")
        steps = math.ceil(max(0, self.total - images) / self.images_per_step())
        device = self.dcgan.device
        threads = f", threads {args.threads}" if device.kind == "cpu" else ""
        say(f"{args.preset} in {device.precision} on {self.dcgan.world} × {device.kind}, "
            f"batch size {args.batch_size}{threads}\n"
            f"{len(pack.train):,} training frames of {pack.folder}\n"
            f"run {self.out}, image {images:,} of {self.total:,}: {steps:,} steps to go")
        if device.kind == "cpu":
            self.advise_on_threads()
        if step + steps < 1000:
            say(f"only {step + steps} steps in all: use a larger --epochs, "
                "because a GAN learns little in so few")
        if min(len(pack.train), len(pack.holdout)) >= SCORED:
            self.score = Score(pack.train, pack.holdout, pack.image_size)
        else:
            say(f"no scores and no best.pt: there are {len(pack.holdout)} held-out frames and "
                f"{len(pack.train)} others, and a score needs {SCORED} of each")

        write_file(self.out / "args.json", json.dumps(vars(args), indent=1).encode() + b"\n")
        self.board = SummaryWriter(self.out, purge_step=images + 1)  # hides steps that a kill undid
        self.last_log = step, 0.0, time.perf_counter()
        self.first = images, time.perf_counter()
        if not images:
            self.write(step, images, draw=True)  # at a full disk the run ends here
        self.next_save = time.monotonic() + 60 * args.save_minutes

    def advise_on_threads(self):
        """Say it if other programs use cores now: one thread that waits slows all of them down.

        The number of threads is not changed here, because the rounding depends on it.
        """
        threads = self.args.threads
        fewer = max(1, free_cores()) if threads > 1 else 1
        if fewer < threads:
            say("other programs use this machine's cores: training can be faster with "
                f"OMP_NUM_THREADS={fewer} before the command")

    def images_per_step(self):
        return self.args.batch_size * self.dcgan.world

    def after_step(self, step, images, stats, waited):
        """Log and save when it is time to. waited: seconds of waiting for data so far."""
        now = time.monotonic()
        if now >= self.next_log:
            self.log(step, images, stats, waited)
            self.next_log = now + self.args.log_seconds
        if now >= self.next_save:
            self.save(step, images)

    def log(self, step, images, stats, waited):
        """Print pytorch/examples' log line, and show all numbers in TensorBoard."""
        stats = {name: value.item() for name, value in stats.items()}  # waits for the device
        if not all(map(math.isfinite, stats.values())):
            sys.exit(f"error: step {step}: not finite: {stats}. Use --resume with a lower --lr")

        old_step, old_waited, then = self.last_log
        now = time.perf_counter()
        self.last_log = step, waited, now
        rate = (step - old_step) * self.images_per_step() / (now - then)
        numbers = {**stats, "images/s": rate}
        numbers["share of time waiting for data"] = (waited - old_waited) / (now - then)
        if self.dcgan.device.peak_memory:
            numbers["memory in GB"] = self.dcgan.device.peak_memory() / 1e9
        self.show(numbers, images)

        steps = step + math.ceil((self.total - images) / self.images_per_step())
        epoch = math.ceil(self.args.epochs * images / self.total)
        say(f"[{epoch}/{self.args.epochs}][{step}/{steps}] "
            f"Loss_D {stats['Loss_D']:.2f} Loss_G {stats['Loss_G']:.2f} D(x) {stats['D(x)']:.2f} "
            f"D(G(z)) {stats['D(G(z1))']:.2f}/{stats['D(G(z2))']:.2f} {rate:,.0f}/s")
        self.logs += 1
        if self.logs == 2 and images < self.total:  # the first rate is of one step, which is slow
            say(f"{rate:,.0f} images/s: about {self.time_left(images)} left")

    def time_left(self, images):
        """At the mean rate since the start, as a timedelta."""
        old_images, then = self.first
        seconds_per_image = (time.perf_counter() - then) / max(1, images - old_images)
        seconds = min((self.total - images) * seconds_per_image, self.ends - time.monotonic())
        return timedelta(seconds=round(max(0, seconds)))

    def show(self, numbers, images):
        """Numbers and pictures in TensorBoard. After a full disk it gets none until a resume."""
        with suppress(OSError):
            for name, value in numbers.items():
                if isinstance(value, torch.Tensor):
                    self.board.add_image(name, value, images)
                else:
                    self.board.add_scalar(name, value, images)
            self.board.flush()  # before a checkpoint: a resumed run does not log these again

    def save(self, step, images, draw=True):
        """Save a checkpoint; with `draw`, also samples and a score. A full disk gives a warning."""
        began = time.monotonic()
        try:
            self.write(step, images, draw)
        except OSError as error:
            self.failed = f"nothing saved in {self.out}: {error.strerror or error}"
            warn(f"{self.failed}; training continues")
        else:
            self.failed = None
            self.saved = images
            say(f"saved at image {images:,}, {self.time_left(images)} left")
        now = time.monotonic()
        pause = 60 * self.args.save_minutes
        if pause:
            pause = max(pause, 40 * (now - began))  # saving takes less than 3% of the time
        self.next_save = now + pause

    def write(self, step, images, draw):
        """Write the run's files. Raises OSError."""
        path = self.out / "checkpoint.pt"
        if fingerprint(path) not in (self.unchanged, None):
            raise InputError(f"another process has written to {self.out}: it is not safe to go on. "
                             "Give each run an --out of its own")
        G = self.dcgan.sampler()
        state = self.dcgan.state_dict()  # after sampler(), with its statistics
        check_finite(state, step)

        best = False
        if draw:
            self.draw(G, images)
            best = self.score is not None and self.add_score(G, images)

        # checkpoint.pt is the last, because it says that the image was reached.
        generator = {
            "G_ema": state["G_ema"],
            "images": images,
            "sizes": {name: getattr(self.args, name) for name in SIZES},
        }
        checkpoint = {**state, **generator, "pack": self.pack.identity, "scores": self.scores}
        if best:
            save_file(self.out / "best.pt", checkpoint)
        if self.has_doubled(images):
            save_file(self.out / f"generator-{images:09d}.pt", generator)
        save_file(path, checkpoint)
        self.unchanged = fingerprint(path)

    def draw(self, G, images):
        """The same 64 latents each time, as a PNG and in TensorBoard."""
        z = latents(range(64), self.args.nz, self.args.latent)
        grid = make_grid(render(G, z))
        buffer = io.BytesIO()
        save_image(grid / 255, buffer, format="png")
        write_file(self.out / "samples" / f"{images:09d}.png", buffer.getbuffer())
        self.show({"samples": grid}, images)

    def has_doubled(self, images):
        """Whether to keep this generator: the untrained one, then when the images have doubled."""
        names = [path.stem.removeprefix("generator-") for path in self.out.glob("generator-*.pt")]
        kept = [int(name) for name in names if name.isdigit()]
        return images >= 2 * max(kept, default=0)

    def add_score(self, G, images):
        """Score G. Returns whether it is the best: the smallest score with enough coverage.

        Enough is half the coverage of real images.
        """
        score, coverage = self.score(G, self.args.latent)
        real_score, real_coverage = self.score.real
        held_out = self.dcgan.d_held_out(self.pack.holdout)
        say(f"score {score:.1f} (real images {real_score:.1f}), coverage {coverage:.2f} "
            f"({real_coverage:.2f}), D(held out) {held_out:.2f}")
        self.show({"score": score, "coverage": coverage, "D(held out)": held_out}, images)

        enough = real_coverage / 2
        older = [old for _, old, covered, *_ in self.scores if covered >= enough]
        row = (score, coverage, real_score, real_coverage, held_out)
        self.scores.append([images, *(round(number, 4) for number in row)])
        lines = [",".join(map(str, line)) + "\n" for line in (self.COLUMNS, *self.scores)]
        write_file(self.out / "scores.csv", "".join(lines).encode())
        return coverage >= enough and round(score, 4) < min(older, default=math.inf)

    def end(self, step, images, stats, waited, signum, late):
        """Log, save, and say why the run ended and how it goes on."""
        if stats and step != self.last_log[0]:
            self.log(step, images, stats, waited)
        if stats and images != self.saved:
            self.save(step, images, draw=not signum)  # a signal leaves little time
        with suppress(OSError):
            self.board.close()
        again = f"python train.py --resume --out {shlex.quote(str(self.out))}"
        if self.dcgan.world > 1:
            again = "the same command, with --resume"
        if signum:
            say(f"stopped and saved at image {images:,}; go on with: {again}")
        elif late:
            say(f"stopped at image {images:,} after --minutes {self.args.minutes:g}; "
                f"go on with: {again}")
        else:
            more = 2 * self.args.epochs
            say(f"finished at image {images:,}; go on with: {again} --epochs {more}")
        say(f"see it with: python sample.py --checkpoint {shlex.quote(str(self.out))}")
        if self.failed:
            sys.exit(f"error: {self.failed}")


# ---- arguments -----------------------------------------------------------------------------------
DEFAULTS = dict(
    data=None, preset=None, init=None, out=None, resume=False, device="auto", epochs=None,
    minutes=0, seed=0, precision="auto", bf16_ops=None, fp32_ops=None, compile=False, graph=False,
    save_minutes=5, log_seconds=10, threads=None)
DEMO = dict(preset="demo-64", epochs=1000, minutes=4.5, save_minutes=1)  # without --data
LIMITS = dict(  # least and greatest values
    epochs=(1, 10 ** 9), minutes=(0, math.inf), batch_size=(2, 10 ** 6), nz=(1, 10 ** 6),
    ngf=(1, 10 ** 5), ndf=(1, 10 ** 5), seed=(0, 2 ** 63 - 1), lr=(0, 1000), beta1=(0, 0.999),
    weight_decay=(0, 1000), instance_noise=(0, 1000), save_minutes=(0, math.inf),
    log_seconds=(0, math.inf))
OLD_FLAGS = ("hmp", "hmp_opt_level", "hmp_verbose")  # of launch scripts for Gaudi's first releases


def make_parser():
    """A parser that returns what was typed, and nothing else."""
    parser = argparse.ArgumentParser(
        usage="train.py [options]", description=__doc__, argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter, epilog=preset_table())
    add = parser.add_argument
    add("--data", help="a pack, an MSLS tree, or any folder of images (default: drawn streets)")
    add("--preset", choices=PRESETS, help="sets the second group of options; see the table below "
        "(default: small-64, small-128 for larger images, naive-64 from 10,000 training frames on, "
        "demo-64 for drawn streets)")
    add("--init", metavar="RUN", help="start a new run from the networks of a run or a file")
    add("--out", help="the run's folder (default: runs/<preset>)")
    add("--resume", action="store_true", help="continue the run in --out, or start it")
    add("--device", choices=DEVICES, help="auto (default): a GPU, a Gaudi card, or the CPU")
    add("--epochs", type=int, help="passes over the training frames (default: 25, and as many "
        "as make 500,000 images)")
    add("--minutes", type=float, help="save and stop after this time (default: no limit; "
        "4.5 for drawn streets)")
    add("--seed", type=int, help="seed of weights, order and noise (default: 0)")
    add("--precision", choices=("auto", *AUTOCAST),
        help="auto (default): bf16 on hpu and cuda (fp16 on an older GPU), fp32 elsewhere")
    add("--bf16-ops", "--hmp-bf16", metavar="FILE", help="on hpu: ops to run in bf16, one per line")
    add("--fp32-ops", "--hmp-fp32", metavar="FILE", help="on hpu: ops to run in fp32, one per line")
    add("--compile", action=argparse.BooleanOptionalAction,
        help="use torch.compile; on hpu this is eager mode (default: off)")
    add("--graph", action=argparse.BooleanOptionalAction,
        help="on cuda: replay a step as a CUDA graph (default: off)")
    add("--save-minutes", type=float, help="time between saves (default: 5; 1 for drawn streets)")
    add("--log-seconds", type=float, help="time between log lines (default: 10)")
    add("--hmp", action="store_true", help=argparse.SUPPRESS)
    add("--hmp-opt-level", help=argparse.SUPPRESS)
    add("--hmp-verbose", action="store_true", help=argparse.SUPPRESS)

    add = parser.add_argument_group("set by the preset").add_argument
    add("--image-size", type=int, choices=IMAGE_SIZES, help="pixels (default: the pack's)")
    add("--kernel-size", type=int, choices=(4, 5), help="4: pytorch/examples, 5: the paper")
    add("--nz", type=int, help="size of a latent")
    add("--ngf", type=int, help="feature maps of G's last hidden layer")
    add("--ndf", type=int, help="feature maps of D's first layer")
    add("--latent", choices=("normal", "uniform"), help="distribution of the latents")
    add("--batch-size", type=int, help="images per step and process")
    add("--lr", type=float, help="learning rate of G and D")
    add("--beta1", type=float, help="Adam's beta1")
    add("--weight-decay", type=float, help="AdamW's weight decay")
    add("--instance-noise", type=float, help="standard deviation of the noise on D's input")
    add("--augment", action=argparse.BooleanOptionalAction,
        help="shift D's input by up to an eighth of its size")
    add("--mirror", action=argparse.BooleanOptionalAction,
        help="flip half of the real images left to right")
    return parser


def preset_table():
    """The values of each preset, for --help."""
    lines = ["presets:"]
    for preset, values in PRESETS.items():
        words = ", ".join(f"{name.replace('_', '-')} {value}" for name, value in values.items())
        lines += textwrap.wrap(
            f"{preset}: {words}", 78, subsequent_indent="    ", break_on_hyphens=False)
    return "\n".join(lines)


def parse_args(argv=None, data_options=None):
    """The options of a run. Raises InputError.

    What was typed overrides the resumed run's args.json, or the sizes of --init in a new run. These
    override data_options (what options_for the pack gives), or DEMO without --data, and they
    override the preset. With --data, but neither a preset nor data_options, the preset and what it
    sets are None.
    """
    typed = vars(make_parser().parse_args(argv))
    check_limits(typed)
    for name in ("data", "init", "out", "bf16_ops", "fp32_ops"):
        if name in typed:
            if not typed[name]:
                raise InputError(f"{flag(name)} is empty: name a file or a folder")
            typed[name] = os.path.expanduser(typed[name])
            if name not in ("data", "out"):  # a run can be resumed in another folder
                typed[name] = os.path.abspath(typed[name])

    follows = data_options or {}
    if "data" not in typed:
        follows = DEMO
    preset = typed.get("preset", follows.get("preset"))
    out = typed.get("out", preset and f"runs/{preset}")

    saved = {}
    if typed.get("resume") and out:
        saved = read_args(out)
    if saved:
        if typed.get("preset", saved["preset"]) != saved["preset"]:
            raise InputError(f"--preset {preset}: {out} is a run of {saved['preset']}. "
                             "Name another --out")
    elif "init" in typed:
        saved = sizes_of_init(typed)

    options = dict.fromkeys(NAIVE) | DEFAULTS | PRESETS.get(preset, {}) | follows | saved | typed
    return argparse.Namespace(**options | dict(out=out))


def check_limits(options):
    """Raise InputError for a number outside its limits."""
    for name, (least, most) in LIMITS.items():
        if name in options and not least <= options[name] <= most:  # not a number fails too
            raise InputError(f"{flag(name)} {options[name]}: choose from {least} to {most}")


def flag(name):
    """The option's name as it is typed."""
    return "--" + name.replace("_", "-")


def read_args(out):
    """The options in a run's args.json, or {} if there is none. Raises InputError."""
    path = Path(out, "args.json")
    try:
        options = json.loads(path.read_bytes())
        if options["preset"] not in PRESETS:
            raise ValueError("an option is wrong")
        check_limits(options)
        return options
    except FileNotFoundError:
        return {}
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({one_line(error)}): "
                         "delete it, and type all of the run's options once more") from error


def sizes_of_init(typed):
    """The sizes of the networks that --init names. Raises InputError if others were typed."""
    path = find_checkpoint(typed["init"], "best.pt", "checkpoint.pt")
    sizes = read_sizes(path)
    for name, size in sizes.items():
        if typed.get(name, size) != size:
            raise InputError(f"{flag(name)} {typed[name]}: {path} has {flag(name)} {size}. "
                             "Leave it out")
    return sizes


# ---- the program ---------------------------------------------------------------------------------
def set_up(argv, ranks):
    """(options, Device, Pack, path of the checkpoint) of a command line. Raises InputError."""
    args = parse_args(argv)
    checkpoint_path(args)  # an existing run is noticed before a long preparation of raw images
    device = set_up_device(args, ranks.local_rank)
    pack = find_data(args, ranks)
    if args.preset is None:  # the pack chooses one, and it decides about --out and --resume
        args = parse_args(argv, options_for(pack))
        device = set_up_device(args, ranks.local_rank)
    name_ignored_options(args, device)
    args.data = str(pack.folder.absolute())  # a run can be resumed in another folder
    return args, device, pack, checkpoint_path(args)


@torch.random.fork_rng(devices=[])  # the caller's random numbers on the CPU stay as they are
def main(argv=None):
    """Train a run, and return its DCGAN. Exits with 128 + the number of a signal that stopped it.

    argv: the command line's words. Raises InputError, and OSError for a full disk.
    """
    # Prepare: options, device, data, and the length of the run in images.
    began = time.monotonic()
    ranks = Ranks()
    args, device, pack, checkpoint = set_up(argv, ranks)
    frames = share(pack.train, ranks, args.batch_size)
    images_per_step = args.batch_size * ranks.world
    images_per_epoch = cut_stretches(frames, args.batch_size)[1] * images_per_step
    if args.epochs is None:
        args.epochs = max(25, math.ceil(500_000 / images_per_epoch))
    total = args.epochs * images_per_epoch
    ends = began + 60 * (args.minutes or math.inf)

    # Connect the processes, and restore the run.
    ranks.connect(device.backend)
    dcgan = DCGAN(args, device, ranks.world)
    before = fingerprint(checkpoint)  # None in a new run
    step, images, scores = 0, 0, []
    if before:
        step, images, scores = restore(dcgan, checkpoint, pack)
    elif args.init:
        start_from(dcgan, find_checkpoint(args.init, "best.pt", "checkpoint.pt"))
    # A run with batches of another size can end a little beyond the total. That is no mistake.
    if images - total >= images_per_epoch:
        raise InputError(f"--epochs {args.epochs}: {args.out} has passed image {total:,}. "
                         f"Use --epochs {images // images_per_epoch + 1} or more")
    ranks.check_same({"pack": pack.identity, "length in images": total, "progress": images})

    # Train.
    seeds = args.seed, ranks.rank
    seen = images // images_per_step  # in batches of today's size; `step` counts all updates
    stream = batches(frames, args.batch_size, seeds, seen, device.pin)
    feed = Feed(stream, device)
    train_step = graphed(dcgan.step) if args.graph else dcgan.step
    reporter = None
    if ranks.rank == 0:
        reporter = Reporter(args, pack, dcgan, total, ends, scores, before)
    with silent_writer(), catch_signals() as received:
        if reporter:
            reporter.start(step, images)
        stats, signum, late = None, 0, False
        while total - images >= images_per_step and not signum and not late:
            batch = next(feed)
            seed_step(device, args.seed, ranks.rank, step)
            stats = train_step(batch)
            step += 1
            images += images_per_step
            if reporter:
                reporter.after_step(step, images, stats, feed.waited)
            if ranks.world == 1 or step % 10 == 0:  # several stop together, and asking takes time
                signum = max(received, default=0)
                late = time.monotonic() > ends
                signum, late = ranks.largest(signum, late)

        # End.
        if reporter:
            reporter.end(step, images, stats, feed.waited, signum, late)
        ranks.largest(0)  # wait until rank 0 has saved
    del train_step  # NCCL cannot end before the graph that uses it
    ranks.disconnect()
    if signum:
        sys.exit(128 + signum)
    return dcgan


if __name__ == "__main__":
    run_script(main, "choose a smaller --batch-size, or a smaller --ngf and --ndf")
