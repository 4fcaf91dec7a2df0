"""Train a DCGAN (Radford, Metz, Chintala 2015, https://arxiv.org/abs/1511.06434) on street scenes.

    python train.py                                      # draws its own streets: five minutes
    python train.py --data photos                        # a folder of photographs, a pack or MSLS
    python train.py --data packs/msls --preset clamp-64 --minutes 480
    python train.py --device hpu --data /mnt/gp3/msls    # on a Gaudi card
    python train.py --resume --out runs/photos-64        # continue a run
    torchrun --nproc-per-node 8 train.py --data packs/msls --resume    # on eight devices

A run is a folder: checkpoint.pt (all that --resume needs, the options too), best.pt (the newest
checkpoint with a score near the best), samples/<images>.png, scores.csv and TensorBoard's events
(tensorboard --logdir runs).

SPDX-License-Identifier: MIT
Copyright (c) 2026 the authors of this repository
"""
import argparse
import atexit
import copy
import io
import math
import os
import shlex
import sys
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count
from pathlib import Path

if __name__ == "__main__":  # these are read when torch is imported
    # Gaudi's plugin is loaded by choose_device, after its own variables are set.
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    # Waiting threads sleep. Threads that spin lose their time to any other program.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.tensorboard import SummaryWriter

from model import (  # isort: skip
    DEVICES, IMAGE_SIZES, NAIVE, PRESETS, SIZES, Discriminator, Generator, InputError,
    Score, choose_device, cut_windows, file_path, find_checkpoint, init_weights, join, latents,
    load_file, on_signals, one_line, rebuild, render, run_script, save_image, say, sizes_of,
    warn, write_file)
from prepare_data import data_name, find_pack, open_pack


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

        args = look_up(parse_args(["--preset", "small-64"]))
        dcgan = DCGAN(args, set_up_device(args))
        stats = dcgan.step(frames)  # frames: see step

    It seeds torch's random numbers with --seed.
    """

    def __init__(self, args, device, world=1):
        self.args = args
        self.device = device
        self.world = world

        torch.manual_seed(args.seed)  # all processes get the same weights
        self.G = Generator(args.image_size, args.nz, args.ngf, kernel_size=args.kernel_size)
        self.G.apply(init_weights)
        self.D = Discriminator(args.image_size, args.ndf, kernel_size=args.kernel_size)
        self.D.apply(init_weights)
        self.G_ema = copy.deepcopy(self.G).requires_grad_(False)
        for net in (self.G, self.D, self.G_ema):
            net.to(device.kind, memory_format=device.layout)
        self.steps = torch.zeros((), device=device.kind)  # a number would be a new graph on Gaudi

        self.adam = dict(
            lr=args.lr,
            betas=(args.beta1, 0.999),
            eps=1e-8,  # Gaudi's own default is 1e-6
            weight_decay=args.weight_decay,
            **device.adam,
        )
        self.opt_G = device.AdamW(self.G.parameters(), **self.adam)
        self.opt_D = device.AdamW(self.D.parameters(), **self.adam)
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
        names them. test_a_step_equals_the_plain_loop_to_rounding in tests/test_step.py shows this
        step in its well-known form.
        """
        G, D = self.G, self.D
        real = cut_windows(frames, self.args.image_size, self.args.mirror)
        z = self.draw_latents(len(frames))

        # D learns: D(x) rises for real images, and D(G(z)) falls.
        with self.autocast():
            fake = G(z)
            # Real images get the fakes' dtype and layout: torch.compile traces D once for both.
            real = real.to(fake.dtype, memory_format=self.device.layout)
            # Real and fake images go through D apart: each kind has its own batch statistics.
            on_real = self.logits(real)
            on_fake = self.logits(fake.detach())  # D's update leaves G alone
        loss_D = d_loss(on_real, on_fake)
        self.update(self.opt_D, loss_D)

        # G learns: D(G(z)) rises. D's weights need no gradients, which saves a sixth of the time.
        D.requires_grad_(False)
        with self.autocast():
            on_fake_after = self.logits(fake)
        loss_G = g_loss(on_fake_after)
        with torch.no_grad():
            # Add a number here, and TensorBoard shows it. Run.log prints these five. Do not call
            # .item(): it waits for the device, and a CUDA graph cannot record it.
            stats = {
                "Loss_D": loss_D.detach(),
                "Loss_G": loss_G.detach(),
                "D(x)": on_real.sigmoid().mean(),
                "D(G(z1))": on_fake.sigmoid().mean(),
                "D(G(z2))": on_fake_after.sigmoid().mean(),
            }
        # On Gaudi the optimizer ends the lazy graph, so it comes last. So G_ema is one step behind.
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

    def logits(self, images):
        """D's float32 logits (N,) of images, with --augment's shifts and --instance-noise."""
        if self.args.augment:
            images = translate(images)
        if self.args.instance_noise:
            noise = torch.randn(images.shape, device=images.device)
            images = images + self.args.instance_noise * noise
        return self.D(images).float()  # the losses are in fp32

    def update(self, optimizer, loss):
        """One step of an optimizer, with the mean gradient of all processes."""
        optimizer.zero_grad(set_to_none=True)
        if self.world > 1:
            loss = loss / self.world
        self.scaler.scale(loss).backward()
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
        """G_ema in eval mode, with batch-norm statistics of its own weights, from 512 latents.

        The training is the same with and without a call.
        """
        for layer in self.G_ema.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.reset_running_stats()
                layer.momentum = 1.0  # takes the statistics of the next batch as they are
        z = latents(range(512), self.args.nz, self.args.latent)
        self.G_ema.train()(z.to(self.device.kind))
        return self.G_ema.eval()

    def state_dict(self):
        """All that load_state_dict needs: tensors on the CPU, and plain values."""
        names = ("G", "D", "G_ema", "opt_G", "opt_D", "scaler")
        state = {name: getattr(self, name).state_dict() for name in names}
        return to_cpu(state) | {"step": int(self.steps)}

    def load_state_dict(self, saved):
        """Continue bit for bit from what state_dict gave, with the command line's options.

        There is no random state in it: seed_step seeds each step.
        """
        for name in ("G", "D", "G_ema", "opt_G", "opt_D"):
            getattr(self, name).load_state_dict(saved[name])
        for optimizer in (self.opt_G, self.opt_D):
            optimizer.param_groups[0].update(self.adam)  # a new --lr, for example
        self.steps.fill_(saved["step"])
        if saved["scaler"]:  # empty unless it was trained in fp16
            self.scaler.load_state_dict(saved["scaler"])


# ---- the program ---------------------------------------------------------------------------------
@torch.random.fork_rng(devices=[])  # the caller's random numbers on the CPU stay as they are
def main(argv=None):
    """Train a run, and return its DCGAN. A signal that stops it exits with 128 + its number."""
    began = time.monotonic()
    # Options: what was typed, then find_run adds --out, look_up what was saved and the preset,
    # find_data what follows from the data, and Run the epochs.
    typed = parse_args(argv)
    saved = find_run(typed)  # the content of its checkpoint, {} in a new run
    args = look_up(typed, saved)
    ranks = Ranks()
    device = set_up_device(args, ranks.local_rank)
    pack = find_data(args, ranks)
    frames = share(pack.train, args.batch_size, ranks)

    ranks.connect(device.backend)
    dcgan = DCGAN(args, device, ranks.world)
    run = Run(dcgan, pack, frames, ranks, began)
    run.restore(saved)

    seen = run.images // run.images_per_step  # in batches of today's size
    stream = batches(frames, args.batch_size, (args.seed, ranks.rank), seen, device.pin)
    feed = upload(read_ahead(stream, 4), device)
    train_step = graphed(dcgan.step) if args.graph else dcgan.step
    with on_signals(run.note_signal):
        run.start()
        while run.goes_on():
            batch = next(feed)
            seed_step(device, args.seed, ranks.rank, run.step)
            stats = train_step(batch)
            run.after_step(stats)
        run.end()
        del train_step  # NCCL cannot end before the graph that uses it
        ranks.disconnect()
    if run.signum:
        sys.exit(128 + run.signum)
    return dcgan


# ---- options -------------------------------------------------------------------------------------
DEFAULTS = dict(
    data=None, preset=None, init=None, resume=False, device="auto", epochs=None, minutes=0, seed=0,
    precision="auto", bf16_ops=None, fp32_ops=None, compile=False, graph=False, save_minutes=5,
    log_seconds=10)
DEMO = dict(preset="demo-64", epochs=1000, minutes=4.5, save_minutes=1)  # without --data


def parse_args(argv=None):
    """What was typed, and nothing else: {option: value}. Raises InputError."""
    parser = argparse.ArgumentParser(
        usage="train.py [options]", description=__doc__, argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=file_path,
        help="a pack, an MSLS tree, or any folder of images (default: drawn streets)")
    add("--preset", choices=PRESETS,
        help="sets the second group of options: model.py has the values (default: small-64, "
        "small-128 for larger images, naive-64 from 10,000 training frames on, demo-64 for drawn "
        "streets)")
    add("--init", type=file_path, metavar="RUN",
        help="start a new run from the networks of a run or a file")
    add("--out", type=file_path,
        help="the run's folder (default: runs/<name of the data>-<image size>)")
    add("--resume", action="store_true", help="continue the run in --out; with --data, or start it")
    add("--device", choices=DEVICES, help="auto (default): a GPU, a Gaudi card, or the CPU")
    add("--epochs", type=int, help="passes over the training frames (default: at least 25, and at "
        "least 500,000 images)")
    add("--minutes", type=float, help="save and stop after this time (default: no limit; "
        "4.5 for drawn streets)")
    add("--seed", type=int, help="seed of weights, order and noise (default: 0)")
    add("--precision", choices=("auto", *AUTOCAST),
        help="auto (default): bf16 on hpu and cuda (fp16 on an older GPU), fp32 elsewhere")
    add("--bf16-ops", "--hmp-bf16", type=ops_file, metavar="FILE",
        help="on hpu: ops to run in bf16, one per line")
    add("--fp32-ops", "--hmp-fp32", type=ops_file, metavar="FILE",
        help="on hpu: ops to run in fp32, one per line")
    add("--compile", action=argparse.BooleanOptionalAction,
        help="use torch.compile; on hpu this is eager mode (default: off)")
    add("--graph", action=argparse.BooleanOptionalAction,
        help="on cuda: replay a step as a CUDA graph (default: off)")
    add("--save-minutes", type=float, help="time between saves (default: 5; 1 for drawn streets)")
    add("--log-seconds", type=float, help="time between log lines (default: 10)")

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

    typed = vars(parser.parse_args(argv))
    for name, value in typed.items():
        if isinstance(value, (int, float)) and not value >= 0:  # NaN fails too
            raise InputError(f"{flag(name)} {value}: choose 0 or more")
    return typed


def ops_file(text):
    """An argparse type: an absolute Path, because a run can be resumed in another folder."""
    return file_path(text).absolute()


def flag(name):
    """The option's name as it is typed."""
    return "--" + name.replace("_", "-")


def find_run(typed):
    """The content of the checkpoint in --out, or {} for a new run. Raises InputError.

    Adds to what was typed: the default of --out, and the sizes of the networks of --init.
    """
    if "init" in typed:
        path = find_checkpoint(typed["init"])
        for name, size in sizes_of(load_file(path), path).items():
            if name in SIZES and typed.setdefault(name, size) != size:
                raise InputError(f"{flag(name)} {typed[name]}: {path} has {size}. Leave it out")

    out = typed.setdefault("out", default_out(typed))
    if (out / "checkpoint.pt").exists():
        if "resume" not in typed:
            raise InputError(f"{out} holds a run: continue it with --resume. For a new run, or "
                             "for other images, name another folder with --out")
        return load_run(out)
    if "resume" in typed and "data" not in typed:
        find_checkpoint(out / "checkpoint.pt")  # raises an error that names the runs
    for path in out.glob("*"):
        # A start that was killed leaves these. It can be repeated.
        if not path.name.startswith(("events.", "samples", "scores.csv", "checkpoint.pt.tmp")):
            raise InputError(f"--out {out} has other files, such as {path.name}: name a new folder")
    return {}


def default_out(typed):
    """runs/<name of the data, without its size>-<image size>."""
    data = typed.get("data")
    size = typed.get("image_size", PRESETS.get(typed.get("preset"), NAIVE)["image_size"])
    if data and Path(data, "pack.json").exists():
        size = open_pack(data).image_size
    return Path("runs", f"{data_name(data).removesuffix(f'-{size}')}-{size}")


def load_run(out):
    """The content of a run's checkpoint. Raises InputError."""
    try:
        saved = load_file(out / "checkpoint.pt")
        saved["args"]["preset"]  # other programs and older versions do not save it
        return saved
    except (InputError, LookupError) as error:
        raise InputError(f"{out} cannot be continued: its checkpoint is damaged, or of another "
                         f"version ({one_line(error)}). Start a new run from it, or from its best "
                         f"one: --init {out / 'best.pt'} --out NEW") from error


def look_up(typed, saved=None):
    """All options, a Namespace: what was typed, or else the resumed run's, the preset's, a default.

    Without a preset, the options in NAIVE can be None until find_data fills them in. Raises
    InputError.
    """
    given = (saved or {}).get("args", {}) | typed
    if saved and given["preset"] != saved["args"]["preset"]:
        raise InputError(f"--preset {given['preset']}: {given['out']} is a run of "
                         f"{saved['args']['preset']}. Name another --out")
    defaults = dict.fromkeys(NAIVE) | DEFAULTS
    if "data" not in given:
        defaults |= DEMO
    preset = given.get("preset", defaults["preset"])
    return argparse.Namespace(**defaults | PRESETS.get(preset, {}) | given)


def find_data(args, ranks):
    """The Pack to train on. Raw images are prepared first. Raises InputError.

    Fills in the options that were not given: the preset that suits the pack, and what it sets.
    """
    is_pack = args.data and Path(args.data, "pack.json").exists()
    if ranks.world > 1 and not is_pack:
        raise InputError("several processes need a pack: run prepare_data.py first, "
                         "and name its output with --data")
    pack = open_pack(find_pack(args.data, args.image_size or 64))
    if args.image_size not in (None, pack.image_size):
        raise InputError(f"{pack.folder} has frames for {pack.image_size} pixels, and this run "
                         f"makes {args.image_size}: name a pack for {args.image_size}")

    args.data = pack.folder.absolute()  # a run can be resumed in another folder
    args.image_size = pack.image_size
    if args.preset is None:
        args.preset = "small-64" if pack.image_size <= 64 else "small-128"
        if len(pack.train) >= 10_000:
            args.preset = "naive-64"
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return pack


# ---- processes -----------------------------------------------------------------------------------
class Ranks:
    """The processes that train together: torchrun's, or this one. Rank 0 prints and writes."""

    def __init__(self):
        self.rank = int(os.environ.get("RANK", 0))
        # Some clusters set WORLD_SIZE alone.
        self.world = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1
        self.local_rank = int(os.environ["LOCAL_RANK"]) if self.world > 1 else None
        self.launcher = os.getppid()
        self.gloo = None  # a group for numbers on the CPU, which does not wait for the devices

    def connect(self, backend):
        if self.world == 1:
            return
        store, *_ = next(dist.rendezvous("env://"))
        if os.environ.get("LOCAL_WORLD_SIZE") == str(self.world):
            # torchrun's store keeps what the ranks wrote before a restart.
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world)
        self.gloo = dist.new_group(backend="gloo")
        atexit.register(leave_the_others)

    def largest(self, *numbers):
        """The largest of each number over all processes, as a list of ints. Waits for them."""
        numbers = torch.tensor(numbers).long()
        if self.world > 1:
            if os.getppid() != self.launcher:
                sys.exit("error: torchrun was killed")
            dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self.gloo)
        return numbers.tolist()

    def check_same(self, *facts):
        """Raise InputError unless these numbers are the same in all processes."""
        facts = [*facts, *(-fact for fact in facts)]  # the largest and the smallest
        if self.largest(*facts) != facts:
            raise InputError("the processes have different packs, lengths or checkpoints: all need "
                             "the same --data, options and run folder")

    def disconnect(self):
        self.largest(0)  # wait until rank 0 has saved
        if self.world > 1:
            dist.destroy_process_group()


def leave_the_others():
    """At the end of a process that failed: do not wait for the others, so that torchrun ends them.

    Gaudi's plugin would wait for them without a time limit.
    """
    if dist.is_initialized():
        os._exit(2)


def add_up(gradients):
    """Replace each gradient by its sum over the processes, in one message."""
    message = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(message)
    parts = message.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts):
        gradient.copy_(part.view_as(gradient))  # keeps its layout


# ---- devices -------------------------------------------------------------------------------------
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Device:
    """What a kind of device needs. The defaults are for kinds that nobody has tried, as mps."""

    kind: str  # as torch.device takes it
    precision: str = "fp32"  # of the forward passes: fp32, bf16 or fp16
    layout: torch.memory_format = torch.contiguous_format  # of weights and images
    AdamW: type = torch.optim.AdamW
    adam: dict = field(default_factory=dict)  # its options besides those of the command line
    pin: bool = False  # gather batches in page-locked memory
    backend: str = "gloo"  # of torch.distributed
    compiler: str = "inductor"  # of torch.compile
    manual_seed: Callable = torch.manual_seed  # of the random numbers on the device


def set_up_device(args, local_rank=None):
    """The Device that --device names. Raises InputError if it cannot be used as the options say.

    local_rank: of one of several processes, which all use the same kind of device.
    """
    set_gaudi_variables(args)
    device = Device(choose_device(args.device, local_rank).type)
    if device.kind == "cpu":
        # fp32, even if it has bf16. Beside another program, bf16 takes five times as long, because
        # oneDNN's threads spin in its gradients (tests/README.md).
        device.layout = torch.channels_last
        device.adam = dict(fused=True)
    elif device.kind == "cuda":
        has_bf16 = torch.cuda.get_device_capability() >= (8, 0)
        device.precision = "bf16" if has_bf16 else "fp16"
        device.layout = torch.channels_last
        device.adam = dict(fused=True, capturable=args.graph)
        device.pin = True
        device.backend = "nccl"
        device.manual_seed = torch.cuda.manual_seed  # torch's own takes 30 times as long
        torch.backends.cudnn.benchmark = True  # shapes never change
        torch.backends.cudnn.allow_tf32 = False  # fp32 stays exact; bf16 is for speed
    elif device.kind == "hpu":
        import habana_frameworks.torch.distributed.hccl  # noqa: F401  makes the backend known
        from habana_frameworks.torch.hpex.optimizers import FusedAdamW

        device.precision = "bf16"
        device.AdamW = FusedAdamW  # in lazy mode its step cuts the graph before and after itself
        device.backend = "hccl"
        device.compiler = "hpu_backend"
        device.manual_seed = torch.manual_seed  # the plugin's: it has replaced torch's

    if args.precision != "auto":
        device.precision = args.precision
    if args.graph and device.kind != "cuda":
        raise InputError("--graph is for NVIDIA GPUs: use --no-graph")
    if device.kind != "hpu" and (args.bf16_ops or args.fp32_ops):
        say("--bf16-ops and --fp32-ops are for hpu: here torch.autocast's own rules apply")
    return device


def set_gaudi_variables(args):
    """Gaudi's plugin reads its mode and its lists of ops from the environment when it loads."""
    variables = {}
    if args.compile:
        variables["PT_HPU_LAZY_MODE"] = "0"  # eager mode; otherwise choose_device sets lazy mode
    for file, name in ((args.bf16_ops, "LOWER_PRECISION"), (args.fp32_ops, "FP32")):
        if file:
            if b"\r" in Path(file).read_bytes():  # then the plugin finds no op, and does not say so
                raise InputError(f"{file} has Windows line ends: convert it with "
                                 f"sed -i 's/\\r$//' {shlex.quote(str(file))}")
            variables[f"PT_HPU_AUTOCAST_{name}_OPS_LIST"] = str(file)
    if args.device in ("auto", "hpu"):
        os.environ.update(variables)


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
                outputs = step(inputs)  # it is recorded here, and computed below
        inputs.copy_(frames)
        graph.replay()
        return outputs

    return replay


def seed_step(device, seed, rank, step):
    """A seed for each step and rank: a resumed run draws the same, and other ranks draw others."""
    sequence = np.random.SeedSequence((seed, rank, step))
    device.manual_seed(int(sequence.generate_state(1)[0]))


def to_cpu(value):
    """A card's tensors cannot be opened where its plugin is missing."""
    if isinstance(value, dict):
        return {key: to_cpu(v) for key, v in value.items()}
    return value.cpu() if isinstance(value, torch.Tensor) else value


def translate(images):
    """Images (N, C, S, S), each shifted by up to S/8 pixels, with zeros at the border.

    This is DiffAugment's translation (Zhao et al. 2020, https://arxiv.org/abs/2006.10738). Products
    with 0/1 matrices move row i - shift to row i. They need no gather, which Gaudi lacks for some
    types. Gaudi's product of matrices also wants a matrix for each channel.
    """
    N, C, S, _ = images.shape
    pixels = torch.arange(S, device=images.device)
    shifts = torch.empty(2, N, 1, 1, 1, device=images.device)
    shifts = shifts.uniform_(-(S // 8), S // 8 + 1).floor()
    moves = (pixels[:, None] == pixels + shifts).to(images.dtype)  # (2, N, 1, S, S)
    rows, columns = moves.expand(-1, -1, C, -1, -1)
    return rows @ images @ columns.mT


# ---- data ----------------------------------------------------------------------------------------
def share(frames, batch_size, ranks):
    """This process's part of the training frames. All parts are equally long. Raises InputError."""
    n = len(frames) // ranks.world
    if not 2 <= batch_size <= n:
        raise InputError(f"--batch-size {batch_size}: choose from 2 to {n}, the number of training "
                         "frames of a process, or use more images")
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


def batches(frames, batch_size, seeds, seen=0, pin=False):
    """Yield uint8 (batch_size, H, W, 3) on the CPU, without end, but the first `seen` batches.

    Stretches of the memory-mapped frames are read in random order, and the frames of each are
    shuffled. A pack has its sequences in random order, so a stretch samples hundreds of streets.
    seeds: (--seed, rank). All batches are whole, because Gaudi compiles for each shape: an epoch
    leaves out the rest of a stretch.
    """
    stretches, steps_per_epoch = cut_stretches(frames, batch_size)
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
                stretch = np.array(frames[start:stop])  # from the disk
            for row in unseen:
                shape = (batch_size, *frames.shape[1:])
                batch = torch.empty(shape, dtype=torch.uint8, pin_memory=pin)
                # take() releases the GIL, and starts no OpenMP threads. "clip" makes no copy.
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


def upload(batches, device):
    """Yield batches on the device.

    On CUDA the upload runs beside the step. The host stays at most two steps ahead of the GPU,
    because each step ahead keeps its batch in the GPU's memory.
    """
    side = torch.cuda.Stream() if device.kind == "cuda" else None
    running = deque()  # the ends of the steps that the GPU may not have finished
    for batch in batches:
        if side is None:
            yield batch.to(device.kind)
            continue

        with torch.cuda.stream(side):
            uploaded = batch.to(device.kind, non_blocking=True)
        compute = torch.cuda.current_stream()
        compute.wait_stream(side)
        uploaded.record_stream(compute)  # its memory is free after the step, not after the upload
        yield uploaded

        running.append(compute.record_event())
        if len(running) > 2:
            running.popleft().synchronize()


# ---- the run -------------------------------------------------------------------------------------
class Run:
    """The progress of a run, and its folder, in which rank 0 writes.

    frames: this process's part of the pack's training frames. began: time.monotonic() at the start
    of the program. Fills in the epochs if they were not given.
    """

    COLUMNS = ("images", "whitened score", "coverage", "score of real images",
               "coverage of real images")

    def __init__(self, dcgan, pack, frames, ranks, began):
        args = dcgan.args
        self.args = args
        self.dcgan = dcgan
        self.pack = pack
        self.ranks = ranks
        self.out = Path(args.out)
        self.identity = pack.identity
        self.images_per_step = args.batch_size * ranks.world
        self.images_per_epoch = cut_stretches(frames, args.batch_size)[1] * self.images_per_step
        if args.epochs is None:
            args.epochs = max(25, math.ceil(500_000 / self.images_per_epoch))
        self.total = args.epochs * self.images_per_epoch
        self.ends = began + 60 * (args.minutes or math.inf)

        self.step = 0
        self.images = 0
        self.received = 0  # the number of a signal to this process
        self.signum = 0  # the number of a signal that stops all processes
        self.late = False  # whether --minutes are over
        self.scores = []  # the rows of scores.csv
        self.score = None  # a Score, if the pack is large enough
        self.board = None  # TensorBoard's
        self.saved = None  # images at the last save
        self.failed = None  # why the last save failed
        self.next_log = 0.0  # when the next line is due, as of time.monotonic()

    def restore(self, saved):
        """Continue from a checkpoint's content. {}: start with the networks of --init, if any.

        Raises InputError if the checkpoint does not fit.
        """
        args = self.args
        if args.init and not saved:
            start_from(self.dcgan, find_checkpoint(args.init))
        try:
            if saved:
                self.check_fit(saved)
                self.dcgan.load_state_dict(saved)
                self.step = saved["step"]
                self.images = self.saved = saved["images"]
                self.scores = saved["scores"]
        except (AttributeError, LookupError, TypeError, RuntimeError) as error:
            raise InputError(f"{self.out} has a checkpoint that cannot be continued "
                             f"({one_line(error)})") from error
        self.ranks.check_same(int(self.identity[:15] or "0", 16), self.total, self.images)

    def check_fit(self, saved):
        """Raise InputError if a checkpoint has other frames, another device or other networks."""
        now = {"pack": self.identity, "device": self.dcgan.device.kind}
        now |= {name: getattr(self.args, name) for name in SIZES}
        before = saved["sizes"] | {"pack": saved["pack"], "device": saved["device"]}
        for name in now:
            if now[name] != before[name]:
                raise InputError(f"{self.out} was trained with {name} {before[name]}, not "
                                 f"{now[name]}. Use the same, or start a new run: "
                                 f"--init {self.out} --out NEW")

    def note_signal(self, signum, frame):
        self.received = signum

    def goes_on(self):
        """Whether to train another step. Several processes stop together, and asking takes time."""
        if self.ranks.world == 1 or self.step % 10 == 0:
            late = time.monotonic() > self.ends
            self.signum, self.late = self.ranks.largest(self.received, late)
        unfinished = self.images + self.images_per_step <= self.total
        return unfinished and not self.signum and not self.late

    def start(self):
        """Open the run's folder. A new run is saved at once, to find a full disk now."""
        if self.ranks.rank > 0:
            return
        args, pack, device = self.args, self.pack, self.dcgan.device
        resumed = self.saved is not None
        say(f"{args.preset} in {device.precision} on {self.ranks.world} × {device.kind}, "
            f"batch size {args.batch_size}\n"
            f"{len(pack.train):,} training frames of {pack.folder}\n"
            f"run {self.out}, {'continued at ' if resumed else ''}image {self.images:,} "
            f"of {self.total:,}")
        for temporary in self.out.rglob("*.tmp"):  # of a save that was killed
            temporary.unlink()
        try:
            self.score = Score(pack.train, pack.holdout, pack.image_size)
        except InputError as error:  # too few frames
            say(f"no scores and no best.pt: {error}")

        # purge_step hides what a killed run showed after its last save.
        self.board = SummaryWriter(self.out, purge_step=self.images + 1 if resumed else 0)
        self.board.add_text("options", str(vars(args)), self.images)
        if resumed:
            self.keep_best()  # a kill can have come between checkpoint.pt and best.pt
        else:
            self.write(draw=True)  # at a full disk the run ends here
            self.saved = self.images
        self.last_log = self.step, time.perf_counter()
        self.next_save = time.monotonic() + 60 * args.save_minutes

    def after_step(self, stats):
        """Count a step. Log and save when it is time to. stats: what DCGAN.step returned."""
        self.step += 1
        self.images += self.images_per_step
        if self.ranks.rank > 0:
            return
        now = time.monotonic()
        if now >= self.next_log:
            self.log(stats)
            self.next_log = now + self.args.log_seconds
        if now >= self.next_save:
            self.save()

    def log(self, stats):
        """Print pytorch/examples' log line, and show all numbers in TensorBoard."""
        stats = {name: value.item() for name, value in stats.items()}  # waits for the device
        step, then = self.last_log
        now = time.perf_counter()
        self.last_log = self.step, now
        self.rate = (self.step - step) * self.images_per_step / (now - then)
        self.show({**stats, "images/s": self.rate})

        steps = self.step + math.ceil((self.total - self.images) / self.images_per_step)
        say(f"[{self.epochs_so_far()}/{self.args.epochs}][{self.step}/{steps}] "
            f"Loss_D {stats['Loss_D']:.2f} Loss_G {stats['Loss_G']:.2f} D(x) {stats['D(x)']:.2f} "
            f"D(G(z)) {stats['D(G(z1))']:.2f}/{stats['D(G(z2))']:.2f} {self.rate:,.0f}/s")

    def epochs_so_far(self):
        return math.ceil(self.images / self.images_per_epoch)

    def show(self, numbers):
        """Numbers in TensorBoard. After a full disk it gets none until a resume."""
        with suppress(OSError):
            for name, value in numbers.items():
                self.board.add_scalar(name, value, self.images)
            self.board.flush()  # before a checkpoint: a resumed run does not log these again

    def save(self, draw=True):
        """Save a checkpoint; with `draw`, also samples and a score. A full disk gives a warning."""
        began = time.monotonic()
        try:
            self.write(draw)
        except OSError as error:
            self.failed = f"nothing saved in {self.out}: {error.strerror or error}"
            warn(f"{self.failed}; training continues")
        else:
            self.failed = None
            self.saved = self.images
            left = (self.total - self.images) / self.rate
            left = min(left, max(0, self.ends - time.monotonic()))
            say(f"saved at image {self.images:,}, {timedelta(seconds=round(left))} left")
        pause = 60 * self.args.save_minutes
        if pause:
            pause = max(pause, 40 * (time.monotonic() - began))  # saving takes less than 3%
        self.next_save = time.monotonic() + pause

    def write(self, draw):
        """Write the run's files. Raises OSError."""
        G = self.dcgan.sampler()
        state = self.dcgan.state_dict()  # after sampler(), with its statistics
        for name in ("G", "D"):
            if not all(weight.isfinite().all() for weight in state[name].values()):
                sys.exit(f"error: step {self.step}: a weight is not finite. The last checkpoint is "
                         "whole: use --resume with a lower --lr")
        if draw:
            self.draw(G)
            if self.score:
                self.add_score(G)

        args = {name: str(value) if isinstance(value, Path) else value
                for name, value in vars(self.args).items()}
        checkpoint = {
            **state,
            "images": self.images,
            "scores": self.scores,
            "sizes": {name: args[name] for name in SIZES},
            "args": args,
            "pack": self.identity,
            "device": self.dcgan.device.kind,
        }
        data = io.BytesIO()
        torch.save(checkpoint, data, pickle_protocol=2)  # weights_only refuses 4, Gaudi's default
        write_file(self.out / "checkpoint.pt", data.getbuffer(), sync=True)
        self.keep_best()

    def keep_best(self):
        """Copy the checkpoint to best.pt if its score is within 10% of the best, and covers enough.

        Enough is half the coverage of real images. Scores of a run vary by some percent, and later
        pictures are mostly better (tests/README.md).
        """
        enough = {images: score for images, score, coverage, _, real_coverage in self.scores
                  if coverage >= real_coverage / 2}
        if enough.get(self.images, math.inf) <= 1.1 * min(enough.values(), default=0):
            data = (self.out / "checkpoint.pt").read_bytes()
            write_file(self.out / "best.pt", data, sync=True)

    def draw(self, G):
        """The same 64 latents each time, as a PNG and in TensorBoard."""
        z = latents(range(64), self.args.nz, self.args.latent)
        sheet = join(render(G, z), columns=8)
        save_image(sheet, self.out / "samples" / f"{self.images:09d}.png")
        with suppress(OSError):
            self.board.add_image("samples", np.asarray(sheet), self.images, dataformats="HWC")

    def add_score(self, G):
        """Score G, and add a row to scores.csv."""
        score, coverage = self.score(G, self.args.latent)
        real_score, real_coverage = self.score.real
        say(f"score {score:.1f} (real images {real_score:.1f}), coverage {coverage:.2f} "
            f"({real_coverage:.2f})")
        self.show({"score": score, "coverage": coverage})

        row = (score, coverage, real_score, real_coverage)
        self.scores = [old for old in self.scores if old[0] != self.images]  # of a failed save
        self.scores.append([self.images, *(round(number, 4) for number in row)])
        lines = [",".join(map(str, line)) + "\n" for line in (self.COLUMNS, *self.scores)]
        write_file(self.out / "scores.csv", "".join(lines).encode())

    def end(self):
        """Save, and say why the run ended and how it goes on."""
        if self.ranks.rank > 0:
            return
        if self.images != self.saved:
            self.save(draw=not self.signum)  # a signal leaves little time
        with suppress(OSError):
            self.board.close()
        if self.failed:
            sys.exit(f"error: {self.failed}")

        again = f"python train.py --resume --out {shlex.quote(str(self.out))}"
        if self.ranks.world > 1:
            again = "the same command, with --resume"
        if self.signum or self.late:
            say(f"stopped and saved at image {self.images:,}. Go on with: {again}")
        else:
            more = 2 * self.epochs_so_far()
            say(f"finished at image {self.images:,}. Go on with: {again} --epochs {more}")
        say(f"see it with: python sample.py --checkpoint {shlex.quote(str(self.out))}")


def start_from(dcgan, path):
    """Give a DCGAN the networks of another run, or of a file with G alone. Raises InputError."""
    content = load_file(path)
    dcgan.G.load_state_dict(rebuild(Generator, "G", content, path).state_dict())
    dcgan.G_ema.load_state_dict(rebuild(Generator, "G_ema", content, path).state_dict())
    if "D" in content:
        dcgan.D.load_state_dict(rebuild(Discriminator, "D", content, path).state_dict())
    else:
        say(f"{path} has no discriminator: D starts anew")


if __name__ == "__main__":
    run_script(main, "choose a smaller --batch-size, or a smaller --ngf and --ndf")
