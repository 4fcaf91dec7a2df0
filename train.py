"""Train a DCGAN (Radford, Metz, Chintala 2015, https://arxiv.org/abs/1511.06434) on street scenes.

    python train.py                                      # draws its own streets: five minutes on two CPU cores
    python train.py --data packs/msls --preset clamp-64 --minutes 480
    python train.py --device hpu --data /mnt/gp3/msls    # raw images are prepared first, once
    torchrun --nproc-per-node 8 train.py --device hpu --data packs/msls --resume      # continue the run, or start it

A run is a folder: checkpoint.pt and the one before it, generator-best.pt, a few generator-<images>.pt,
samples/<images>.png, scores.csv, args.json and TensorBoard's events (tensorboard --logdir runs).
Change the loss in DCGAN.step, devices in set_up_device (and model.py), data in prepare_data.prepare and list_files.
"""
import argparse
import copy
import io
import json
import math
import os
import signal
import sys
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from itertools import count
from pathlib import Path

os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")  # choose_device loads Gaudi's plugin, after its settings

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid, save_image

from model import (DEVICES, PRESETS, Discriminator, Generator, InputError, Score, choose_device,  # isort: skip
                   cut_windows, init_weights, latents, load_file, one_line, render, run_script, spread_windows)
from prepare_data import find_pack, open_pack

DEMO = dict(preset="demo-64", epochs=1000, minutes=4.5, save_minutes=1)  # without --data and --preset
STATS = ("Loss_D", "Loss_G", "D(x)", "D(G(z1))", "D(G(z2))")  # of a step; 1 and 2: before and after D's update
SCORES = ("images", "score", "coverage", "score of real images", "coverage of real images", "D(held out)")
DTYPES = {"fp32": torch.bfloat16, "bf16": torch.bfloat16, "fp16": torch.float16}  # for autocast, which is off in fp32


# ---- arguments ------------------------------------------------------------------------------------------------------
def parse_args(argv=None):
    """The command line overrides the resumed run's args.json, which overrides the preset. A mistake exits with 2."""
    parser = argparse.ArgumentParser(usage="train.py [options]", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", help="a pack, an MSLS tree, or any folder of images (default: drawn streets)")
    add("--preset", choices=PRESETS, help="sets the second group (default: naive-64; demo-64 without --data)")
    add("--out", help="the run's folder (default: runs/<preset>)")
    add("--resume", action="store_true", help="continue from the checkpoint in --out, if there is one")
    add("--device", choices=DEVICES, default="auto", help="auto (default) takes a GPU, a Gaudi card, or the CPU")
    add("--epochs", type=int, default=25, help="passes over the training frames (default: 25)")
    add("--minutes", type=float, help="save and stop this many minutes after the start (0, the default: no limit)")
    add("--seed", type=int, default=0, help="seed of the weights, the order of frames and the noise (default: 0)")
    add("--precision", choices=("auto", *DTYPES), default="auto", help="auto (default): bf16 if the device has it")
    add("--bf16-ops", "--hmp-bf16", metavar="FILE", help="on hpu: the ops to run in bf16, one name per line")
    add("--fp32-ops", "--hmp-fp32", metavar="FILE", help="on hpu: the ops to run in fp32, one name per line")
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile (on hpu: in eager mode)")
    add("--graph", action=argparse.BooleanOptionalAction, default=False, help="on cuda: replay a step as a CUDA graph")
    add("--save-minutes", type=float, default=5, help="time between saves; each waits for a log line (default: 5)")
    add("--log-every", type=int, default=50, help="steps from one log line to the next (default: 50)")
    add = parser.add_argument_group("set by the preset").add_argument
    add("--image-size", type=int, choices=(32, 64, 128, 256), help="size of the images in pixels")
    add("--kernel-size", type=int, choices=(4, 5), help="4 as in pytorch/examples, 5 as in the paper")
    add("--nz", type=int, help="size of a latent")
    add("--ngf", type=int, help="feature maps of G's last hidden layer")
    add("--ndf", type=int, help="feature maps of D's first layer")
    add("--latent", choices=("normal", "uniform"), help="distribution of the latents")
    add("--batch-size", type=int, help="images per step and process")
    add("--lr", type=float, help="learning rate of G and D")
    add("--beta1", type=float, help="Adam's beta1")
    add("--weight-decay", type=float, help="AdamW's weight decay")
    add("--instance-noise", type=float, help="standard deviation of the noise on D's input")
    add("--augment", action=argparse.BooleanOptionalAction, help="shift D's input by up to an eighth of its size")
    add("--mirror", action=argparse.BooleanOptionalAction, help="flip half of the real images left to right")
    typed = parser.parse_args(argv)  # once to learn the preset and the run, and once more with their defaults
    defaults = DEMO if not (typed.data or typed.preset) else {"preset": typed.preset or "naive-64"}
    out = Path(typed.out or f"runs/{defaults['preset']}")
    if typed.resume and (out / "args.json").exists():
        defaults = json.loads((out / "args.json").read_text())
        if typed.preset not in (None, defaults["preset"]):
            parser.error(f"--preset {typed.preset}: {out} is a run of {defaults['preset']}. Name another --out")
    parser.set_defaults(**{**PRESETS[defaults["preset"]], **defaults, "out": str(out)})
    args = parser.parse_args(argv)
    least = dict(epochs=1, batch_size=2, nz=1, ngf=1, ndf=1, log_every=1, seed=0, lr=0, beta1=0, weight_decay=0)
    for name, value in least.items():
        if not getattr(args, name) >= value:  # not a number fails too
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: choose {value} or more")
    return args


# ---- data -----------------------------------------------------------------------------------------------------------
def find_data(args, rank, world):
    """(this rank's training frames, the pack). Raw images are prepared first. All ranks get equally many frames."""
    if world > 1 and not Path(args.data or "", "pack.json").exists():
        raise InputError("several processes need a pack: run prepare_data.py first, and name its output with --data")
    pack = open_pack(find_pack(args.data, args.image_size))
    if pack.image_size != args.image_size:
        raise InputError(f"{pack.folder} is a pack for --image-size {pack.image_size}: choose a preset of that size")
    n = len(pack.train) // world
    if args.batch_size > n:
        raise InputError(f"--batch-size {args.batch_size} is more than the {n} training frames of a process")
    return pack.train[rank * n:rank * n + n], pack


def cut_stretches(frames, batch_size):
    """(stretches [(start, stop), …] of about 256 MB and at least eight batches, steps per epoch)."""
    n = max(1, min(frames.nbytes >> 28, len(frames) // (8 * batch_size)))
    bounds = np.linspace(0, len(frames), n + 1).astype(int)
    stretches = list(zip(bounds[:-1], bounds[1:]))
    return stretches, sum((stop - start) // batch_size for start, stop in stretches)


def batches(frames, batch_size, seeds, step=0, pin=False):
    """Yield uint8 (batch_size, H, W, 3) on the CPU, without end, as a run sees them from its step `step` on.

    Stretches of the memory-mapped frames are read in random order, and the frames of each are shuffled. A pack has its
    sequences in random order, so a stretch samples hundreds of streets. All batches are whole, because Gaudi compiles
    for each shape: an epoch leaves out the rest of a stretch. Two threads read and gather ahead.
    """
    stretches, steps_per_epoch = cut_stretches(frames, batch_size)

    def read():
        skip = step % steps_per_epoch  # batches of this epoch that the run has seen
        for epoch in count(step // steps_per_epoch):
            rng = np.random.default_rng((*seeds, epoch))  # seeds: (--seed, rank)
            for start, stop in rng.permutation(stretches):
                rows = rng.permutation(stop - start)  # for a seen stretch too: later permutations depend on it
                rows = rows[:len(rows) // batch_size * batch_size].reshape(-1, batch_size)
                unseen, skip = rows[skip:], max(0, skip - len(rows))
                if len(unseen):
                    yield np.array(frames[start:stop]), unseen

    def gather():
        for stretch, rows in read_ahead(read(), 1):
            for row in rows:
                batch = torch.from_numpy(stretch.take(row, axis=0))  # releases the GIL, and starts no OpenMP threads
                yield batch.pin_memory() if pin else batch
    return read_ahead(gather(), 4)


def read_ahead(items, n):
    """Yield from an endless iterator, while a thread computes the next n items."""
    with ThreadPoolExecutor(1) as thread:
        ahead = deque(thread.submit(next, items) for _ in range(n))
        while True:
            item = ahead.popleft().result()
            ahead.append(thread.submit(next, items))
            yield item


# ---- the networks and a training step -------------------------------------------------------------------------------
class DCGAN:
    """G, D, their optimizers, and G_ema, the exponential moving average (EMA) of G's weights, which draws samples."""

    def __init__(self, args, device, world=1):
        self.args, self.device, self.world = args, device, world
        torch.manual_seed(args.seed)  # all ranks have the same weights, and the mean gradient keeps them the same
        G = Generator(args.image_size, args.nz, args.ngf, 3, args.kernel_size).apply(init_weights)
        D = Discriminator(args.image_size, args.ndf, 3, args.kernel_size).apply(init_weights)
        self.G, self.D = (net.to(device.kind, memory_format=device.layout) for net in (G, D))
        self.G_ema = copy.deepcopy(self.G).requires_grad_(False)
        self.steps = torch.zeros((), device=device.kind)  # on the device: a number would be a new graph on Gaudi
        adam = dict(lr=args.lr, betas=(args.beta1, 0.999), eps=1e-8, weight_decay=args.weight_decay, **device.adam)
        self.opt_G, self.opt_D = (device.AdamW(net.parameters(), **adam) for net in (self.G, self.D))
        self.scaler = torch.amp.GradScaler(device.kind, enabled=device.precision == "fp16")
        if args.compile:
            self.G.compile(backend=device.compiler)
            self.D.compile(backend=device.compiler)

    def step(self, frames):
        """One update of D, then one of G: uint8 frames (N, H, W, 3) → float32 (5,) on the device, as STATS names it.

        The losses are Goodfellow's (2014, https://arxiv.org/abs/1406.2661, section 3), with the non-saturating one
        for G. Do not call .item() here: it waits for the device, and a CUDA graph cannot record it.
        """
        args, G, D = self.args, self.G, self.D
        real = cut_windows(frames, args.image_size, args.mirror)
        z = torch.empty(len(frames), args.nz, device=self.device.kind)
        z = z.normal_() if args.latent == "normal" else z.uniform_(-1, 1)

        with self.autocast():
            fake = G(z)
            on_real = self.logits(real)
            on_fake = self.logits(fake.detach())  # apart from the real images: each has its own batch statistics
        loss_D = F.softplus(-on_real).mean() + F.softplus(on_fake).mean()  # -log D(x) - log(1 - D(G(z)))
        self.update(self.opt_D, loss_D)

        D.requires_grad_(False)  # G's update needs no gradients of D's weights: this saves a sixth of D's backward
        with self.autocast():
            on_fake_after = self.logits(fake)  # the same fakes, after D's update
        loss_G = F.softplus(-on_fake_after).mean()  # -log D(G(z))
        probabilities = [logits.detach().sigmoid().mean() for logits in (on_real, on_fake, on_fake_after)]
        stats = torch.stack([loss_D.detach(), loss_G.detach(), *probabilities])
        with torch.no_grad():  # the EMA's half-life is a tenth of the run so far, and at most 20,000 images
            self.steps += 1
            rate = (7 / self.steps).clamp(1 - 0.5 ** (len(frames) * self.world / 20_000), 1)
            for average, weight in zip(self.G_ema.parameters(), G.parameters()):
                average.lerp_(weight, rate)
        self.update(self.opt_G, loss_G)  # last: on Gaudi it ends the graph, which stats and the EMA are part of
        D.requires_grad_(True)
        return stats

    def autocast(self):
        """A new context for each forward pass: it caches weights in bf16, which an optimizer's step makes stale."""
        precision = self.device.precision
        return torch.autocast(self.device.kind, DTYPES[precision], enabled=precision != "fp32")

    def logits(self, images):
        """D's float32 logits (N,) of images, with the shifts and the noise that D always sees."""
        if self.args.augment:
            images = translate(images)
        if self.args.instance_noise:
            images = images + self.args.instance_noise * torch.randn(images.shape, device=images.device)
        return self.D(images).float()  # the loss is in fp32

    def update(self, optimizer, loss):
        optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        if self.world > 1:  # the mean over the ranks, in one message
            grads = [p.grad for p in optimizer.param_groups[0]["params"]]
            flat = torch.cat([grad.flatten() for grad in grads]) / self.world
            dist.all_reduce(flat)
            for grad, part in zip(grads, flat.split([grad.numel() for grad in grads])):
                grad.copy_(part.view_as(grad))
        self.scaler.step(optimizer)
        self.scaler.update()

    @torch.no_grad()
    def sampler(self):
        """G_ema in eval mode, with the batch-norm statistics of 512 latents. This does not change the training."""
        for norm in [layer for layer in self.G_ema.main if isinstance(layer, torch.nn.BatchNorm2d)]:
            norm.reset_running_stats()
            norm.momentum = 1.0  # takes the statistics of the next batch as they are
        self.G_ema.train()(latents(range(512), self.args.nz, self.args.latent).to(self.device.kind))
        return self.G_ema.eval()

    @torch.no_grad()
    def d_held_out(self, frames):
        """Mean D(x) of about 256 windows of held-out frames. As in training, each batch has its own statistics."""
        n = math.ceil(256 / self.args.batch_size) * self.args.batch_size
        windows = torch.cat(list(spread_windows(frames, n, self.args.image_size)))
        D, self.D = self.D, copy.deepcopy(self.D)  # the running statistics of the copy change, and not those of D
        torch.manual_seed(0)
        with self.autocast():
            logits = [self.logits(part.to(self.device.kind)) for part in windows.split(self.args.batch_size)]
        self.D = D
        return torch.cat(logits).sigmoid().mean().item()

    def state_dict(self):
        """All that load_state_dict needs but the number of steps: tensors on the CPU, and plain values."""
        nets = {name: getattr(self, name).state_dict() for name in ("G", "D", "G_ema", "scaler")}
        return to_cpu({**nets, "opt_G": self.opt_G.state_dict()["state"], "opt_D": self.opt_D.state_dict()["state"]})

    def load_state_dict(self, saved):
        """Continue bit for bit from what state_dict gave and the number of steps, with the command line's options."""
        for name in ("G", "D", "G_ema"):
            getattr(self, name).load_state_dict(saved[name])
        # Gaudi's AdamW counts steps in the group, torch's in each parameter. Steps that fp16 skips are not counted.
        steps, scaler = float(saved["step"]), saved["scaler"]  # scaler is {} unless it was trained in fp16
        for name, optimizer in (("opt_G", self.opt_G), ("opt_D", self.opt_D)):
            groups = optimizer.state_dict()["param_groups"]
            groups[0]["step"] = saved["step"]
            state = {i: {**s, "step": s["step"] if scaler else torch.tensor(steps)} for i, s in saved[name].items()}
            for weight, moments in zip(optimizer.param_groups[0]["params"], state.values()):
                for key in ("exp_avg", "exp_avg_sq"):  # fused kernels need the layout of the weights
                    moments[key] = torch.empty_like(weight, device="cpu").copy_(moments[key])
            optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.steps.copy_(torch.tensor(steps))
        if scaler:
            self.scaler.load_state_dict(scaler)


def translate(images):
    """Images (N, C, S, S), each shifted by up to S/8 pixels, with zeros at the border: DiffAugment (Zhao et al. 2020,
    https://arxiv.org/abs/2006.10738). Products with 0/1 matrices need no gather, which Gaudi lacks for some types."""
    S = images.shape[-1]
    pixels = torch.arange(S, device=images.device)
    shifts = (torch.rand(2, len(images), 1, 1, 1, device=images.device) * (S // 4 + 1)).floor() - S // 8
    rows, columns = (pixels[:, None] == pixels + shifts).to(images.dtype)  # (N, 1, S, S) each
    return rows @ images @ columns.mT


def to_cpu(value):
    if isinstance(value, dict):
        return {key: to_cpu(v) for key, v in value.items()}
    return value.cpu() if isinstance(value, torch.Tensor) else value


# ---- devices --------------------------------------------------------------------------------------------------------
def set_up_device(args, local_rank=0):
    """What each kind of device needs, for DCGAN.device: first what suits CPUs, then what CUDA and Gaudi change."""
    if args.compile:
        os.environ["PT_HPU_LAZY_MODE"] = "0"  # Gaudi's eager mode; otherwise choose_device sets lazy mode
    for file, list_name in ((args.bf16_ops, "LOWER_PRECISION"), (args.fp32_ops, "FP32")):
        if file:  # Gaudi's plugin reads it when it loads, one name per line, in place of its own list
            names = Path(file).read_text(errors="replace").splitlines()
            if unknown := [name for name in names if not hasattr(torch.ops.aten, name)]:
                print(f"warning: {file}: torch does not know {unknown}", file=sys.stderr)
            os.environ[f"PT_HPU_AUTOCAST_{list_name}_OPS_LIST"] = os.path.abspath(file)
    cpu_has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()  # a private name, which can go
    device = argparse.Namespace(
        kind=choose_device(args.device).type, precision="bf16" if cpu_has_bf16 else "fp32", backend="gloo", pin=False,
        compiler="inductor", layout=torch.channels_last, AdamW=torch.optim.AdamW, adam=dict(fused=True))
    if device.kind == "cuda":
        torch.cuda.set_device(local_rank)
        torch.backends.cudnn.benchmark = True    # shapes never change
        torch.backends.cudnn.allow_tf32 = False  # fp32 stays exact; bf16 is for speed
        device.backend, device.pin = "nccl", True
        device.precision = "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"
        device.adam = dict(fused=True, capturable=args.graph)
    elif device.kind == "hpu":
        import habana_frameworks.torch.distributed.hccl  # noqa: F401  makes the backend known
        from habana_frameworks.torch.hpex.optimizers import FusedAdamW

        device.backend, device.compiler, device.precision = "hccl", "hpu_backend", "bf16"
        device.layout = torch.contiguous_format     # Gaudi chooses its own
        device.AdamW, device.adam = FusedAdamW, {}  # in lazy mode its step cuts the graph before and after itself
    device.precision = device.precision if args.precision == "auto" else args.precision
    if device.kind != "cuda" and (args.graph or device.precision == "fp16"):
        raise InputError("--graph and --precision fp16 are for NVIDIA GPUs: use --no-graph --precision auto")
    if device.kind != "hpu" and (args.bf16_ops or args.fp32_ops):
        print("--bf16-ops and --fp32-ops are for hpu: here torch.autocast's own rules apply")
    return device


def graphed(step):
    """The step as one CUDA graph, replayed by one launch (PyTorch's CUDA semantics, "whole-network capture")."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    inputs, outputs, calls = None, None, count()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_stream(stream)  # the default stream cannot be recorded
    def replay(frames):
        nonlocal inputs, outputs
        if next(calls) < 5:  # warm-up, with real steps
            return step(frames)
        if inputs is None:
            inputs = frames.clone()
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):  # a thread pins memory
                outputs = step(inputs)
        inputs.copy_(frames)
        graph.replay()
        return outputs.clone()
    return replay


# ---- the run's folder -----------------------------------------------------------------------------------------------
def save_file(path, content, previous=None):
    """torch.save; a kill or a full disk leaves the old file. With `previous` the old file gets that name."""
    buffer, temporary = io.BytesIO(), Path(f"{path}.tmp")
    torch.save(content, buffer, pickle_protocol=2)  # Gaudi's default, 4, fails elsewhere with weights_only
    try:
        with open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class Reporter:
    """What rank 0 prints and writes: log lines, TensorBoard's events, checkpoints, samples and scores."""

    def __init__(self, args, pack, model, total, ends, scores):
        self.args, self.pack, self.model, self.total, self.ends = args, pack, model, total, ends
        self.out, self.scores = Path(args.out), scores  # rows of scores.csv; total: images, ends: time.monotonic()
        self.board = self.score = self.failed = self.due = None  # due: when to save next, as of time.monotonic()

    def start(self, step, images):
        """Open the run's folder. A new run is saved at once, to find a full disk now and not after a day."""
        args, model, pack = self.args, self.model, self.pack
        print(f"{args.preset} in {model.device.precision} on {model.world} × {model.device.kind}: {len(pack.train):,} "
              f"training frames of {pack.folder}, run {args.out}, image {images:,} of {self.total:,}", flush=True)
        if min(len(pack.train), len(pack.holdout)) >= 50:
            self.score = Score(pack)
        (self.out / "samples").mkdir(parents=True, exist_ok=True)
        (self.out / "args.json.tmp").write_text(json.dumps(vars(args), indent=1) + "\n")
        os.replace(self.out / "args.json.tmp", self.out / "args.json")
        threading.excepthook = lambda thread: None  # a full disk ends TensorBoard's thread; show() continues without it
        self.board = SummaryWriter(self.out, purge_step=images + 1)  # drops events after the checkpoint
        if not images:
            self.write(step, images, draw=True)  # at a full disk the run ends here
        self.due = time.monotonic() + 60 * args.save_minutes

    def show(self, values, images):
        with suppress(OSError):  # after a full disk TensorBoard gets nothing more until the run is resumed
            for name, value in values.items():
                self.board.add_scalar(name, value, images)
            self.board.flush()  # before a checkpoint: a run that continues from it does not log these steps again

    def log(self, step, images, stats, rate, waiting):
        """Print pytorch/examples' log line, and show it in TensorBoard. rate: images/s, waiting: share of the time."""
        if not all(map(math.isfinite, stats)):
            sys.exit(f"error: step {step}: not finite: {dict(zip(STATS, stats))}. Use --resume with a lower --lr")
        self.show({**dict(zip(STATS, stats)), "images/s": rate, "share of time waiting for data": waiting}, images)
        loss_D, loss_G, d_x, d_gz1, d_gz2 = stats
        left, epochs = max(0, self.total - images), self.args.epochs
        steps = step + math.ceil(left / (self.args.batch_size * self.model.world))
        seconds = max(0, min(left / rate, self.ends - time.monotonic()))
        print(f"[{math.ceil(epochs * images / self.total)}/{epochs}][{step}/{steps}] "
              f"Loss_D {loss_D:.4f} Loss_G {loss_G:.4f} D(x) {d_x:.4f} D(G(z)) {d_gz1:.4f} / {d_gz2:.4f}  "
              f"{rate:,.0f} images/s, {timedelta(seconds=round(seconds))} left", flush=True)

    def save(self, step, images, draw=True):
        """Save a checkpoint; with `draw`, also samples and a score. A full disk gives a warning."""
        began = time.monotonic()
        try:
            self.write(step, images, draw)
            self.failed = None
        except OSError as error:
            self.failed = f"nothing saved in {self.out}: {error.strerror or error}"
            print(f"warning: {self.failed}; training continues", file=sys.stderr)
        now, pause = time.monotonic(), 60 * self.args.save_minutes
        self.due = now + (pause and max(pause, 40 * (now - began)))  # saving takes less than 3% of the time

    def write(self, step, images, draw):
        G, state = self.model.sampler(), self.model.state_dict()  # in this order: state has the sampler's statistics
        if not all(weight.isfinite().all() for net in ("G", "D") for weight in state[net].values()):
            sys.exit(f"error: step {step}: a weight is not finite. Use --resume with a lower --lr")
        generator = {"G": state["G_ema"], "images": images, "latent": self.args.latent}
        if draw:
            grid = make_grid(render(G, latents(range(64), self.args.nz, self.args.latent)))
            save_image(grid / 255, self.out / "samples" / f"{images:09d}.png")
        if draw and self.score:
            self.add_score(G, generator)
        saved = [int(path.stem[10:]) for path in self.out.glob("generator-*.pt") if path.stem[10:].isdigit()]
        if images >= 2 * max(saved, default=0):  # at about 1, 2, 4, 8, … times the first, to see the progress
            save_file(self.out / f"generator-{images:09d}.pt", generator)
        checkpoint = {**state, "step": step, "images": images, "latent": self.args.latent, "scores": self.scores}
        save_file(self.out / "checkpoint.pt", checkpoint, self.out / "checkpoint-previous.pt")

    def add_score(self, G, generator):
        """Score G. The best has the smallest score among those with at least half the coverage of real images."""
        figures = *self.score(G, self.args.latent), *self.score.real, self.model.d_held_out(self.pack.holdout)
        score, coverage, real_score, real_coverage, held_out = (round(figure, 4) for figure in figures)
        print(f"image {generator['images']:,}: score {score:.1f} (real images {real_score:.1f}), "
              f"coverage {coverage:.2f} (real images {real_coverage:.2f}), D(held out) {held_out:.4f}", flush=True)
        self.show({"score": score, "coverage": coverage, "D(held out)": held_out}, generator["images"])
        best = min((old for _, old, covered, *_ in self.scores if covered >= real_coverage / 2), default=math.inf)
        if coverage >= real_coverage / 2 and score < best:
            save_file(self.out / "generator-best.pt", generator)
        self.scores.append([generator["images"], score, coverage, real_score, real_coverage, held_out])
        (self.out / "scores.csv").write_text("".join(f"{','.join(map(str, row))}\n" for row in [SCORES, *self.scores]))


# ---- the loop -------------------------------------------------------------------------------------------------------
def main(argv=None):
    args = parse_args(argv)
    ends = time.monotonic() + 60 * (args.minutes or math.inf)
    from_torchrun = (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    rank, local_rank, world = (int(os.environ.get(name, default)) for name, default in from_torchrun)
    device = set_up_device(args, local_rank)
    newest, previous = Path(args.out, "checkpoint.pt"), Path(args.out, "checkpoint-previous.pt")
    checkpoint = newest if newest.exists() else previous  # a kill can come between the two renames of a save
    if checkpoint.exists() and not args.resume:
        raise InputError(f"{args.out} holds a run: continue it with --resume, or name another folder with --out")
    frames, pack = find_data(args, rank, world)
    if world > 1:
        store, *_ = next(dist.rendezvous("env://"))
        if os.environ.get("LOCAL_WORLD_SIZE") == str(world):  # torchrun's store keeps what restarted ranks wrote
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(device.backend, store=store, rank=rank, world_size=world)
        hosts = dist.new_group(backend="gloo")  # waits for ranks, and not for their devices

    def largest(n):  # of all ranks: waits for them
        tensor = torch.tensor(n)
        if world > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=hosts)
        return int(tensor)
    model, step, images, scores = DCGAN(args, device, world), 0, 0, []
    if checkpoint.exists():
        try:
            saved = load_file(checkpoint)
            model.load_state_dict(saved)
            step, images, scores = saved["step"], saved["images"], saved["scores"]
        except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{checkpoint} is damaged, or of other networks or an older train.py ({one_line(error)}). "
                             f"Only if it is damaged, continue from the one before: mv {previous} {newest}") from error
    if largest(images) != images:
        raise InputError(f"{args.out} is at image {images:,} here, and further on another machine: share one folder")
    images_per_step = args.batch_size * world  # a resumed run can have another: its data go on by images, not steps
    total = args.epochs * cut_stretches(frames, args.batch_size)[1] * images_per_step
    stream = batches(frames, args.batch_size, (args.seed, rank), images // images_per_step, device.pin)
    train_step = graphed(model.step) if args.graph else model.step
    reporter = Reporter(args, pack, model, total, ends, scores) if rank == 0 else None
    if reporter:
        reporter.start(step, images)

    stop = []  # Ctrl-C, or SIGTERM, which some launchers send twice: finish the step, save, exit
    def on_signal(signum, frame):
        stop.append(signum)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # after that, a Ctrl-C ends the process at once

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    logged, since, waited, leave = step, time.perf_counter(), 0.0, 0
    while images < total and not leave:
        began = time.perf_counter()
        batch = next(stream).to(device.kind, non_blocking=True)
        waited += time.perf_counter() - began
        # A seed for each step and rank: a resumed run draws the same numbers, and the noise of the ranks differs.
        torch.manual_seed(int(np.random.SeedSequence((args.seed, rank, step)).generate_state(1)[0]))
        stats = train_step(batch)
        step, images = step + 1, images + images_per_step
        if world == 1 or step % 10 == 0:  # leave is the number of a signal to any rank, or 1 at the end of --minutes
            leave = largest(stop[0] if stop else int(time.monotonic() > ends))
        last = leave or images >= total
        if last or step % args.log_every == 0:
            stats = stats.tolist()  # waits for the device
            took = time.perf_counter() - since
            if reporter:
                reporter.log(step, images, stats, (step - logged) * images_per_step / took, waited / took)
                if last or time.monotonic() > reporter.due:
                    reporter.save(step, images, draw=leave < 2)
            logged, since, waited = step, time.perf_counter(), 0.0
    largest(0)  # wait until rank 0 has saved
    del train_step  # NCCL cannot end before the graph that uses it
    if world > 1:
        dist.destroy_process_group()
    if reporter:
        print(f"{args.out} is at image {images:,} of {total:,}. To see it: python sample.py --checkpoint {args.out}")
        if reporter.failed:
            sys.exit(f"error: {reporter.failed}")
    if leave > 1:
        sys.exit(128 + leave)
    return model


if __name__ == "__main__":
    run_script(main)
