"""Measure the project's speed and pictures, and print rows of Markdown. Nothing is kept.

    python tests/bench.py                            # minutes; on a machine that does nothing else
    python tests/bench.py --quick                    # a quarter of the work, about a minute
    python tests/bench.py --gpu                      # all about a GPU, in less than eight minutes
    python tests/bench.py --step 10 --price 13.11 --preset clamp-64 --device hpu --data packs/msls
    torchrun --nproc-per-node 8 tests/bench.py --step 10 --data packs/msls    # several devices
    python tests/bench.py --step 10 --trace trace.json.gz    # what takes the time in a step
    python tests/bench.py --pictures 15 --data MSLS  # scores after 15 minutes of each loop

Without an option, and with --pictures, each row compares this project (left) with what people do
without it (right): pytorch/examples' loop, ImageFolder with the write-up's transforms, the disk's
own rate, PNG encoding alone. Both run on this machine, one after the other.
--step and --gpu take train.py's options: they override those of a row, so that
`bench.py --gpu --device cpu --frames 4000 --ngf 4 --ndf 4` tries all of it without a GPU.
"""
import argparse
import csv
import gc
import io
import itertools
import json
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from PIL import Image
from torch.autograd import DeviceType
from torch.profiler import profile, supported_activities
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms as T
from torchvision.datasets import ImageFolder

import prepare_data
import train

from model import (  # isort: skip
    Discriminator, Generator, InputError, Score, init_weights, load_file, load_generator,
    one_line, run_script)

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
NORMALIZE = [T.ToTensor(), T.Normalize((0.5,) * 3, (0.5,) * 3)]
EXAMPLES = T.Compose([T.Resize(64), T.CenterCrop(64), *NORMALIZE])  # pytorch/examples
WRITE_UP = T.Compose([
    T.RandomAffine(0, (0.1, 0.1), (0.8, 1.2)), T.CenterCrop(480), T.Resize(64), *NORMALIZE])


def print_row(*cells):
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def print_header(*cells):
    print_row(*cells)
    print_row(*["---"] * len(cells))


def compare(what, ours, theirs, goal):
    rates = f"{ours:,.0f} images/s", f"{theirs:,.0f} images/s"
    print_row(what, *rates, f"{ours / theirs:.2f}×", goal)


def script(name, *words):
    """Run a script of the project. Returns what it printed."""
    command = [sys.executable, ROOT / name, *map(str, words)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def rate(iterator, seconds, warm_up=2):
    """Items/s of an iterator, during some seconds."""
    for _ in range(warm_up):
        next(iterator)
    began = time.perf_counter()
    for n in itertools.count(1):
        next(iterator)
        took = time.perf_counter() - began
        if took > seconds:
            return n / took


# ---- processes with a time limit -----------------------------------------------------------------
class Failed(Exception):
    """Why a measurement has no figure, in one line."""


def isolated(limit, function, *args):
    """Iterate over function(*args), a generator, in a process of its own.

    A crash, an illegal memory access or a hang there leaves this process as it is. Raises Failed
    after an error, and after `limit` seconds without an item.
    """
    processes = multiprocessing.get_context("spawn")
    ours, theirs = processes.Pipe()
    process = processes.Process(target=send_all, args=(theirs, function, *args), daemon=True)
    process.start()
    theirs.close()
    try:
        while True:
            if not ours.poll(max(0, limit)):
                raise Failed(f"no figure after {limit:.0f} s")
            kind, item = ours.recv()
            if kind == "error":
                raise Failed(item)
            if kind == "end":
                return
            yield item
    except EOFError:
        process.join()
        raise Failed(f"its process ended with exit status {process.exitcode}") from None
    finally:
        process.kill()
        process.join()


def send_all(connection, function, *args):
    try:
        for item in function(*args):
            connection.send(("item", item))
        connection.send(("end", None))
    except BaseException as error:  # argparse's SystemExit too
        connection.send(("error", reason(error)))


def reason(error):
    """The line of an exception that says what is wrong. Torch adds lines with general hints."""
    if isinstance(error, InputError):
        return one_line(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    if text.endswith(":") and len(lines) > 1:  # "backend='inductor' raised:"
        text += " " + lines[1]
    return f"{type(error).__name__}: {text}"[:300]


# ---- the usual way -------------------------------------------------------------------------------
def make_photos(folder, n):
    """n JPEGs of 640×480 as <folder>/<city>/<n>.jpg: 64 drawn streets, and links to them."""
    cities = list(prepare_data.CITIES)[:6]
    for i in range(n):
        city = cities[i % 6]
        path = folder / city / f"{i:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if i < 64:
            street = prepare_data.draw_street(0, city, i // 12, i % 12, image_size=384)
            street.save(path, quality=90)
        else:
            os.link(folder / cities[i % 64 % 6] / f"{i % 64:06d}.jpg", path)
    return folder


def loader_rate(photos, transform):
    """Images/s of an ImageFolder pass, or five seconds of one, with the better worker count."""
    rates = []
    for workers in {max(1, CORES // 2), CORES}:
        images = ImageFolder(photos, transform)
        loader = iter(DataLoader(images, 128, shuffle=True, num_workers=workers))
        next(loader)  # the workers have started
        began = time.perf_counter()
        n = 0
        for batch, _ in loader:
            n += len(batch)
            if time.perf_counter() - began > 5:
                break
        rates.append(n / (time.perf_counter() - began))
    return max(rates)


def plain_training(loader, device, G):
    """pytorch/examples' loop, a step at a time.

    It is in fp32, with separate backward passes for real and fake images, and .item() calls.
    """
    D = Discriminator().to(device).apply(init_weights)
    opt_G = torch.optim.Adam(G.parameters(), 2e-4, (0.5, 0.999))
    opt_D = torch.optim.Adam(D.parameters(), 2e-4, (0.5, 0.999))
    bce = torch.nn.BCEWithLogitsLoss()
    for real, *_ in loader:
        real = real.to(device)
        label = torch.ones(len(real), device=device)

        D.zero_grad()
        on_real = D(real)
        loss_real = bce(on_real, label)
        loss_real.backward()
        on_real.mean().item()
        fake = G(torch.randn(len(real), 100, device=device))
        on_fake = D(fake.detach())
        loss_fake = bce(on_fake, label.fill_(0))
        loss_fake.backward()
        on_fake.mean().item()
        opt_D.step()

        G.zero_grad()
        on_fake = D(fake)
        loss_G = bce(on_fake, label.fill_(1))
        loss_G.backward()
        on_fake.mean().item()
        opt_G.step()

        (loss_real + loss_fake).item()  # for the log line
        loss_G.item()
        yield


def endless(photos, workers=2):
    """ImageFolder's batches as pytorch/examples loads them, epoch after epoch."""
    images = ImageFolder(photos, EXAMPLES)
    loader = DataLoader(images, 128, shuffle=True, num_workers=workers, drop_last=True)
    return itertools.chain.from_iterable(itertools.repeat(loader))


def plain_rate(batches, seconds, device):
    """Images/s of pytorch/examples' loop at batch size 128."""
    torch.backends.cudnn.benchmark = True  # as there
    G = Generator().to(device).apply(init_weights)
    return 128 * rate(plain_training(batches, device, G), seconds)


# ---- train.py's step -----------------------------------------------------------------------------
MODES = {
    "plain": [],
    "graph": ["--graph"],
    "compile": ["--compile"],
    "graph+compile": ["--graph", "--compile"],
}


class Training:
    """A run as train.main puts it together from train.py's parts, without logs and saves."""

    def __init__(self, words):
        self.ranks = train.Ranks()
        self.args = train.parse_args(["--preset", "naive-64", *words])
        self.device = train.set_up_device(self.args, self.ranks.local_rank)
        pack = train.find_data(self.args, self.ranks)
        frames = train.share(pack.train, self.ranks, self.args.batch_size)
        self.ranks.connect(self.device.backend)
        self.dcgan = train.DCGAN(self.args, self.device, self.ranks.world)
        seeds = self.args.seed, self.ranks.rank
        stream = train.batches(frames, self.args.batch_size, seeds, pin=self.device.pin)
        self.feed = train.Feed(stream, self.device)
        self.train_step = train.graphed(self.dcgan.step) if self.args.graph else self.dcgan.step
        self.steps = 0
        self.synchronize = getattr(torch, self.device.kind).synchronize

    def step(self):
        batch = next(self.feed)
        train.seed_step(self.device, self.args.seed, self.ranks.rank, self.steps)
        self.steps += 1
        return self.train_step(batch)

    def start(self):
        """Take ten steps, which compile and record the graph. Returns the seconds."""
        began = time.perf_counter()
        for _ in range(10):
            self.step()
        self.synchronize()
        return time.perf_counter() - began

    def measure(self, seconds):
        """Train for some seconds: (images/s of all processes, share of time waiting for data)."""
        began = time.perf_counter()
        first = self.steps
        waited = self.feed.waited
        over = False
        while not over:
            for _ in range(10 if self.ranks.world > 1 else 1):
                self.step()
            # All ranks take equally many steps.
            over, = self.ranks.largest(time.perf_counter() - began > seconds)
        self.synchronize()
        took = time.perf_counter() - began
        images = (self.steps - first) * self.args.batch_size * self.ranks.world
        return images / took, (self.feed.waited - waited) / took

    def end(self):
        self.train_step = None  # NCCL cannot end before the graph that uses it
        self.ranks.disconnect()


def measure_modes(modes, seconds, words, trace=None):
    """Train with train.py's options `words` in each of the MODES: yields a dict of figures of each.

    trace: a file for a trace of ten more steps. Ranks other than 0 yield nothing.
    """
    for mode in modes:
        training = Training([*words, *MODES[mode]])
        start = training.start()
        images_s, waiting = training.measure(seconds)
        options = [name for name in ("graph", "compile") if getattr(training.args, name)]
        peak = training.device.peak_memory
        figures = dict(
            preset=training.args.preset,
            mode="+".join(options) or "plain",
            world=training.ranks.world,
            device=device_name(training.device.kind),
            batch=training.args.batch_size,
            precision=training.device.precision,
            images_s=images_s,
            waiting=waiting,
            tflops=images_s * gflop_per_image(training.args) / 1e3,
            memory=peak() if peak else None,
            start=start,
        )
        if trace:
            figures["profile"] = trace_steps(training, trace)
        if training.ranks.rank == 0:
            yield figures
        training.end()
        del training
        free_device()


def free_device():
    """Leave nothing of a training to the next one in this process."""
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_initialized():
        torch.cuda.set_stream(torch.cuda.default_stream())  # graphed() has set another
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def device_name(kind):
    module = getattr(torch, kind)
    return module.get_device_name() if hasattr(module, "get_device_name") else kind


def gflop_per_image(args):
    """Arithmetic of training on one image: 3 forward passes of G, and 8 of D.

    A backward pass costs two forward passes. G has one of each. D reads real images, fakes, and the
    fakes again. Its last backward pass costs one, because D's weights are frozen.
    """
    with torch.device("meta"), FlopCounterMode(display=False) as of_G:
        G = Generator(args.image_size, args.nz, args.ngf, 3, args.kernel_size)
        image = G(torch.empty(1, args.nz))
    with torch.device("meta"), FlopCounterMode(display=False) as of_D:
        Discriminator(args.image_size, args.ndf, 3, args.kernel_size)(image)
    return (3 * of_G.get_total_flops() + 8 * of_D.get_total_flops()) / 1e9


def trace_steps(training, path, steps=10):
    """Write a trace of some steps. Returns (seconds, [(kernel, calls, seconds), …]).

    The longest kernels are first. On a CPU, torch's operators stand for kernels.
    """
    training.synchronize()
    with profile(activities=supported_activities()) as profiler:
        began = time.perf_counter()
        for _ in range(steps):
            training.step()
        training.synchronize()
        took = time.perf_counter() - began
    if training.ranks.rank == 0:
        profiler.export_chrome_trace(str(path))

    averages = profiler.key_averages()
    kernels = [(event.key, event.count, event.self_device_time_total / 1e6)
               for event in averages if event.device_type != DeviceType.CPU]
    if not kernels:
        kernels = [(event.key, event.count, event.self_cpu_time_total / 1e6) for event in averages]
    return took, sorted(kernels, key=lambda kernel: -kernel[2])


def print_profile(took, kernels):
    busy = sum(seconds for *_, seconds in kernels)
    print(f"\nTen steps took {took * 1e3:.1f} ms. {len(kernels)} kernels filled "
          f"{busy / took:.0%} of this time. The longest:\n")
    print_header("kernel", "calls a step", "ms a step", "of all kernels")
    for name, calls, seconds in kernels[:15]:
        name = name.replace("|", "/")
        share = seconds / busy if busy else 0
        print_row(name[:80], f"{calls / 10:g}", f"{seconds * 100:.3f}", f"{share:.1%}")


def print_steps(rows, price):
    """Rows in the write-up's form, with their header."""
    for i, row in enumerate(rows):
        images_hour = row["images_s"] * 3600
        cells = {
            "preset": row["preset"],
            "options": row["mode"],
            "device": f"{row['world']} × {row['device']}",
            "batch": f"{row['world']} × {row['batch']}",
            "precision": row["precision"],
            "images/s": f"{row['images_s']:,.0f}",
            "images/hour": f"{images_hour:,.0f}",
            "images per $": f"{images_hour / price:,.0f}" if price else "–",
            "waiting for data": f"{row['waiting']:.1%}",
            "TFLOP/s": f"{row['tflops']:.3g}",
            "peak memory": gigabytes(row["memory"]),
            "first ten steps": f"{row['start']:.1f} s",
        }
        if i == 0:
            print_header(*cells)
        print_row(*cells.values())
        if "profile" in row:
            print_profile(*row["profile"])


def gigabytes(n):
    return f"{n / 1e9:.1f} GB" if n else "–"


# ---- a GPU ---------------------------------------------------------------------------------------
# Preset, batch size, and the goal of each mode: a share of the card's matrix rate that a roofline
# gives (arithmetic, and the bytes that each layer reads and writes), ±25%.
GPU_ROWS = [
    ("naive-64", 128, {"plain": None, "graph": 0.16, "graph+compile": 0.21}),
    ("naive-64", 1024, {"plain": None, "graph": None, "graph+compile": 0.25}),
    ("clamp-64", 1024, {"plain": None, "graph": None, "graph+compile": 0.40}),
    ("clamp-64", 256, {"plain": None, "graph": None}),
    ("safe-128", 256, {"plain": None, "graph": None}),
]
LIMIT = 120  # seconds for one figure
RUN = 500_000  # images of train.py's default run: --epochs


def measure_card(seconds, words):
    """Yield what --gpu compares with: (name, precision, TFLOP/s, images/s of the plain loop)."""
    args = train.parse_args(["--preset", "naive-64", *words])
    device = train.set_up_device(args)
    dtype = torch.float32 if device.precision == "fp32" else train.AUTOCAST[device.precision]
    matrix = matrix_rate(device.kind, dtype)
    images = torch.rand(128, 3, 64, 64, device=device.kind) * 2 - 1
    plain = plain_rate(itertools.repeat((images,)), seconds, device.kind)
    yield device_name(device.kind), device.precision, matrix, plain


def matrix_rate(kind, dtype):
    """TFLOP/s of products of large matrices."""
    n = 8192 if kind == "cuda" else 256
    synchronize = getattr(torch, kind).synchronize
    a, b = torch.randn(2, n, n, device=kind, dtype=dtype)
    for products in (20, 200):  # the first to warm up
        synchronize()
        began = time.perf_counter()
        for _ in range(products):
            a @ b
        synchronize()
        took = time.perf_counter() - began
    return products * 2 * n ** 3 / took / 1e12


def measure_parts(seconds, words):
    """Yield (what, figure) of what surrounds a step: feeding, seeds, saving and scoring."""
    ranks = train.Ranks()
    args = train.parse_args(["--preset", "naive-64", *words])
    device = train.set_up_device(args)
    synchronize = getattr(torch, device.kind).synchronize
    pack = train.find_data(args, ranks)
    batch_size = min(1024, len(pack.train) // 8)
    shape = (batch_size, *pack.train.shape[1:])

    def images_s(batches_s):
        gb = batches_s * np.prod(shape) / 1e9
        return f"{batches_s * batch_size:,.0f} images/s, {gb:.2g} GB/s"

    if device.pin:
        began = time.perf_counter()
        torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
        yield "allocating page-locked memory", f"{0.268 / (time.perf_counter() - began):.2g} GB/s"

    stretches = train.read_stretches(pack.train, batch_size, (0, 0), 0)
    begun = [next(stretches) for _ in range(4)]  # the file is in the page cache from now on
    began = time.perf_counter()
    n = 0
    while time.perf_counter() - began < seconds:
        n += len(next(stretches)[0])
    reading = n / batch_size / (time.perf_counter() - began)
    yield "reading stretches from the page cache", images_s(reading)

    gathered = train.gather(itertools.repeat(begun[0]), shape, device.pin)
    yield f"gathering batches of {batch_size}, one core", images_s(rate(gathered, seconds, 10))
    stream = train.batches(pack.train, batch_size, (0, 0), pin=device.pin)
    yield "both, in two threads", images_s(rate(stream, seconds, 10))

    if device.kind != "cpu":
        batch = next(gathered)

        def uploads():
            while True:
                yield batch.to(device.kind, non_blocking=True)
                synchronize()

        yield "uploading batches", images_s(rate(uploads(), seconds))
    feed = train.Feed(stream, device)
    yield "batches on the device, without a step", images_s(rate(feed, seconds, 10))

    seeds = (train.seed_step(device, 0, 0, step) for step in itertools.count())
    yield "seeding a step", f"{1e6 / rate(seeds, seconds / 4):.0f} µs"

    began = time.perf_counter()
    dcgan = train.DCGAN(args, device)
    dcgan.step(next(feed)[:args.batch_size])
    synchronize()
    yield "networks and the first step", f"{time.perf_counter() - began:.2f} s"
    began = time.perf_counter()
    G = dcgan.sampler()
    with tempfile.TemporaryDirectory() as folder:
        train.save_file(Path(folder, "checkpoint.pt"), dcgan.state_dict())
    yield "a sampler and a saved checkpoint", f"{time.perf_counter() - began:.2f} s"

    began = time.perf_counter()
    score = Score(pack.train, pack.holdout, pack.image_size)
    yield f"preparing a score of {score.images:,} images", f"{time.perf_counter() - began:.1f} s"
    began = time.perf_counter()
    score(G, args.latent)
    yield "a score", f"{time.perf_counter() - began:.1f} s"


def measure_gpu(folder, seconds, minutes, n_frames, trace, words):
    """Print all about a GPU. Each figure comes from a process with a time limit.

    `minutes` are for the rows of the table. The parts and the profile after it take one or two.
    """
    began = time.monotonic()
    words = ["--device", "cuda", *words]
    try:
        name, precision, matrix, plain = next(isolated(LIMIT, measure_card, seconds, words))
    except Failed as error:
        raise InputError(f"--gpu: {error}") from error
    print(f"{name}, torch {torch.__version__}, {precision} matrix products {matrix:.3g} TFLOP/s, "
          f"{CORES} CPU cores\n")

    print_header("preset", "batch", "options", "images/s", "of the plain loop",
                 "of the matrix rate (goal)", "waiting for data", "memory", "first ten steps")
    print_row("pytorch/examples' loop", 128, "a batch on the device", f"{plain:,.0f}", "1.00×",
              *["–"] * 4)
    packs = {}
    measured = {}  # {(preset, batch): {mode: figures}}
    for preset, batch, goals in GPU_ROWS:
        size = train.PRESETS[preset]["image_size"]
        if size not in packs:
            frames = n_frames if size == 64 else n_frames // 5
            packs[size] = make_pack(folder / str(size), frames, size)
        options = ["--data", str(packs[size]), "--preset", preset, "--batch-size", str(batch)]
        rows = measured[preset, batch] = {}
        ends = began + 60 * minutes
        for mode, figures in each_mode(list(goals), ends, seconds, [*options, *words]):
            if isinstance(figures, Failed):
                print_row(preset, batch, mode, figures, *["–"] * 5)
                continue
            rows[mode] = figures
            goal = f" ({goals[mode]:.0%})" if goals[mode] else ""
            of_plain = "–"
            if (preset, batch) == ("naive-64", 128):
                of_plain = f"{figures['images_s'] / plain:.2f}×"
                of_plain += " (2.5×)" if mode == "graph+compile" else ""
            print_row(preset, figures["batch"], mode, f"{figures['images_s']:,.0f}", of_plain,
                      f"{figures['tflops'] / matrix:.1%}{goal}", f"{figures['waiting']:.1%}",
                      gigabytes(figures["memory"]), f"{figures['start']:.1f} s")
    print("\nGoals are in brackets. The goal for waiting is below 2%.")
    decide(measured)

    options = ["--data", str(packs[64]), *words]
    print()
    print_header("part", "figure")
    try:
        for row in isolated(LIMIT, measure_parts, seconds / 3, options):
            print_row(*row)
    except Failed as error:
        print_row("the next part", error)

    trace = trace or folder / "trace.json.gz"
    mode = "graph" if "graph" in measured["naive-64", 128] else "plain"
    try:
        figures = next(isolated(LIMIT, measure_modes, [mode], 0, options, trace))
        print(f"\nnaive-64, batch 128, {mode}:", end="")
        print_profile(*figures["profile"])
    except Failed as error:
        print(f"\nno profile: {error}")


def each_mode(modes, ends, seconds, words):
    """Yield (mode, its figures or Failed). After a failure, a new process goes on."""
    while modes:
        limit = min(LIMIT, ends - time.monotonic())
        if limit < 0:
            yield modes.pop(0), Failed("no time was left (--minutes)")
            continue
        try:
            for figures in isolated(limit, measure_modes, modes, seconds, words):
                yield modes.pop(0), figures
        except Failed as error:
            yield modes.pop(0), error


def decide(measured):
    """Apply the rule of tests/README.md for --graph, and for --compile on top of it."""
    for option, new, old in (("--graph", "graph", "plain"),
                             ("--compile", "graph+compile", "graph")):
        pairs = [(rows[new], rows[old]) for rows in measured.values() if {new, old} <= rows.keys()]
        if not pairs or measured["naive-64", 128].keys().isdisjoint({new}):
            print(f"{option}: no decision, because figures are missing.")
            continue
        gains = [a["images_s"] / b["images_s"] for a, b in pairs]
        times = [row["start"] + RUN / row["images_s"] for row in pairs[0]]
        good = min(gains) >= 0.98 and times[0] < times[1]
        print(f"{option}: {min(gains):.2f} to {max(gains):.2f} times as fast as without it. "
              f"{RUN:,} images take {times[0]:.0f} s instead of {times[1]:.0f} s. By the rule in "
              f"tests/README.md it {'becomes' if good else 'does not become'} a default"
              f"{', if its tests pass' if good else ''}.")


# ---- data and pictures ---------------------------------------------------------------------------
def make_pack(folder, n, image_size=64):
    """A pack of n training frames of noise, which the page cache holds afterwards."""
    folder.mkdir()
    H, W = prepare_data.frame_size(image_size)
    random = np.random.default_rng(0)
    counts = {"train": n, "holdout": max(1, min(2048, n // 4))}
    for split, count in counts.items():
        shape = (count, H, W, 3)
        array = np.lib.format.open_memmap(folder / f"{split}.npy", "w+", np.uint8, shape)
        for part in np.array_split(array, math.ceil(array.nbytes / 2 ** 27)):
            part[:] = random.integers(0, 256, part.shape, np.uint8)
        array.flush()
    info = dict(
        format=prepare_data.FORMAT,
        image_size=image_size,
        H=H,
        W=W,
        counts={split: {"noise": count} for split, count in counts.items()},
    )
    (folder / "pack.json").write_text(json.dumps(info))
    return folder


def cutting_rate(pack, seconds):
    """Images/s of what feeds a step on the CPU: batches from the pack, and windows of them."""
    batches = train.batches(prepare_data.open_pack(pack).train, 128, (0, 0))
    return 128 * rate((train.cut_windows(batch, 64) for batch in batches), seconds)


def reading_rate(pack, batch_size=1024):
    """Images/s of batches, in one pass over the pack."""
    frames = prepare_data.open_pack(pack).train
    steps = train.cut_stretches(frames, batch_size)[1]
    began = time.perf_counter()
    for _ in itertools.islice(train.batches(frames, batch_size, (0, 0)), steps):
        pass
    return steps * batch_size / (time.perf_counter() - began)


def gathering_rates(seconds, batch_size=1024):
    """Images/s of one core that gathers batches: train.gather's, and into new memory.

    Both keep as many batches as train.py does: a single one would stay in the processor's cache.
    """
    H, W = prepare_data.frame_size(64)
    random = np.random.default_rng(0)
    stretch = random.integers(0, 256, (10_240, H, W, 3), np.uint8)
    rows = random.permutation(len(stretch)).reshape(-1, batch_size)
    batches = train.gather(itertools.repeat((stretch, rows)), (batch_size, H, W, 3), pin=False)
    ours = batch_size * rate(batches, seconds, 10)
    kept = deque(maxlen=train.READ_AHEAD + train.KEPT)
    plain = (kept.append(torch.from_numpy(stretch[row])) for row in itertools.cycle(rows))
    return ours, batch_size * rate(plain, seconds, 10)


def forget(path):
    """Drop a file from the page cache, as if memory were too small for it."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_rate(path, seconds):
    """Bytes/s of 1 MB reads at random places, eight at a time."""
    places = np.random.default_rng(1).permutation(os.path.getsize(path) >> 20)
    began = time.perf_counter()
    done = 0
    with open(path, "rb") as file, ThreadPoolExecutor(8) as threads:
        def read(place):
            return os.pread(file.fileno(), 1 << 20, int(place) << 20)

        for data in threads.map(read, places):
            done += len(data)
            if time.perf_counter() - began > seconds:
                break
        threads.shutdown(cancel_futures=True)
    return done / (time.perf_counter() - began)


def encoding_rate(files):
    """PNGs/s of PIL alone, with a thread for each core, on pictures that sample.py drew."""
    pictures = [Image.open(path).convert("RGB") for path in files]
    with ThreadPoolExecutor(CORES) as threads:
        began = time.perf_counter()
        list(threads.map(lambda picture: picture.save(io.BytesIO(), "PNG"), pictures))
        return len(pictures) / (time.perf_counter() - began)


def compare_pictures(source, minutes, folder):
    """Rows with score and coverage of train.py and of pytorch/examples' loop, on the CPU.

    Both train on the same frames at the same time, each on half of the cores, so that a busy
    neighbour disturbs both alike.
    """
    script("prepare_data.py", source, folder / "pack")
    pack = prepare_data.open_pack(folder / "pack")
    link_photos(source, folder / "pack" / "index.csv", folder / "photos")

    os.environ["OMP_NUM_THREADS"] = str(max(1, CORES // 2))
    torch.set_num_threads(max(1, CORES // 2))
    words = ["--data", folder / "pack", "--preset", "small-64", "--device", "cpu",
             "--out", folder / "run", "--epochs", 10 ** 6, "--minutes", minutes]
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(script, "train.py", *words)
        G = Generator().apply(init_weights)
        began = time.perf_counter()
        images = 0
        for _ in plain_training(endless(folder / "photos", workers=0), "cpu", G):
            images += 128
            if time.perf_counter() - began > 60 * minutes:
                break
        running.result()

    newest = folder / "run" / "checkpoint.pt"
    trained_on = load_file(newest)["images"]
    score = Score(pack.train, pack.holdout, pack.image_size)
    ours, our_coverage = score(*load_generator(newest))
    theirs, their_coverage = score(G.eval())
    real, real_coverage = score.real
    print_row(f"score after {minutes:g} minutes on {len(pack.train)} frames "
              f"({trained_on:,} images; {images:,}); real images {real:.1f}",
              f"{ours:.1f}", f"{theirs:.1f}", f"{ours / theirs:.2f}×", "0.25×")
    print_row(f"coverage; real images {real_coverage:.2f}",
              f"{our_coverage:.2f}", f"{their_coverage:.2f}", "–", "–")


def link_photos(source, index, folder):
    """Write the source files of a pack's training frames as <folder>/<city>/<row>.jpg."""
    files = prepare_data.list_files([os.path.abspath(source)], skipped=[])
    with open(index, **prepare_data.TEXT) as file:
        for line in csv.DictReader(file):
            if line["split"] == "train":
                photo = folder / line["city"] / f"{line['row']}.jpg"
                photo.parent.mkdir(parents=True, exist_ok=True)
                photo.write_bytes(files[line["source file"]]())


# ---- the command line ----------------------------------------------------------------------------
def compare_rates(folder, share):
    """The rows of a run without options. `share`: 1 with --quick, otherwise 4."""
    photos = make_photos(folder / "photos", 3000 * share)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    began = time.perf_counter()
    script("prepare_data.py", photos, folder / "pack", "--duplicates", 0, "--holdout", 0)
    packing = 3000 * share / (time.perf_counter() - began)
    loading = loader_rate(photos, WRITE_UP)
    compare("prepare_data.py, 640×480 JPEGs, all cores; ImageFolder pass", packing, loading, "2.5×")
    cutting = cutting_rate(folder / "pack", share)
    compare("batches from a pack in memory; ImageFolder pass", cutting, loading, "20×")

    compare("gathering batches of 1,024 on one core; stretch[row] (goal: 200,000 images/s)",
            *gathering_rates(share), "–")
    pack = make_pack(folder / "large", 40_000 * share)
    frame = np.prod(prepare_data.frame_size(64)) * 3  # bytes
    in_memory = reading_rate(pack)
    forget(pack / "train.npy")
    reading = reading_rate(pack)
    forget(pack / "train.npy")
    disk = disk_rate(pack / "train.npy", share) / frame
    compare(f"batches of 1,024 from a pack on disk, page cache empty (full: {in_memory:,.0f}); "
            "the disk's rate", reading, disk, "0.8×")

    words = ["--data", str(folder / "pack"), "--device", device]
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as train.py, in the process of the next line
    row = next(isolated(600, measure_modes, ["plain"], 5 * share, words))
    plain = plain_rate(endless(photos), 10 * share, device)
    compare(f"train.py, naive-64, batch 128, {row['precision']}; pytorch/examples' loop",
            row["images_s"], plain, "2.2×" if device == "cpu" else "2.5×")
    compare_drawing(folder, 1000 * share)


def compare_drawing(folder, n):
    torch.save(Generator().apply(init_weights).state_dict(), folder / "netG.pth")
    words = "--checkpoint", folder / "netG.pth", "--separate", "--out", folder / "fakes"
    began = time.perf_counter()
    script("sample.py", *words, "--n", 64)
    start_up = time.perf_counter() - began
    script("sample.py", *words, "--n", n)
    drawing = n / (time.perf_counter() - began - 2 * start_up)
    encoding = encoding_rate(sorted((folder / "fakes").iterdir()))
    compare("sample.py --separate; PNG encoding alone, all cores", drawing, encoding, "0.8×")


def mode_list(text):
    """An argparse type: "plain,graph" → ["plain", "graph"]."""
    modes = text.split(",")
    if not set(modes) <= MODES.keys():
        raise argparse.ArgumentTypeError(f"{text!r}: choose from {', '.join(MODES)}")
    return modes


def make_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="a quarter of the work")
    add("--pictures", type=float, metavar="MINUTES", help="compare pictures after this training")
    add("--data", type=Path, help="--pictures: photographs or an MSLS tree; --step: a pack")
    add("--step", type=float, metavar="SECONDS", help="measure train.py's step, with its options")
    add("--modes", type=mode_list, default=["plain"], metavar="A,B",
        help=f"for --step, one row for each in one process: {', '.join(MODES)} (default: plain)")
    add("--price", type=float, help="dollars per hour, for --step")
    add("--trace", type=Path, metavar="FILE", help="with --step or --gpu: trace ten steps. Open "
        "FILE (.json or .json.gz) with ui.perfetto.dev")
    add("--gpu", action="store_true", help="measure an NVIDIA GPU: presets, --graph, --compile")
    add("--minutes", type=float, default=5.5,
        help="for --gpu: no new rows after them (default: 5.5)")
    add("--frames", type=int, default=100_000, help="for --gpu: frames of its pack "
        "(default: 100000; a fifth of them at 128 pixels)")
    return parser


def main():
    parser = make_parser()
    args, words = parser.parse_known_args()
    if args.step is not None:
        if args.data:
            words += ["--data", str(args.data)]
        if len(args.modes) > 1 and "RANK" in os.environ:
            parser.error("several --modes are for one process")
        rows = measure_modes(args.modes, args.step, words, args.trace)
        return print_steps(rows, args.price)
    if words and not args.gpu:
        parser.error(f"unrecognized arguments: {' '.join(words)}")
    if args.pictures and not args.data:
        parser.error("--pictures needs --data")

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if args.gpu:
            seconds = 0.5 if args.quick else 3
            return measure_gpu(folder, seconds, args.minutes, args.frames, args.trace, words)
        print(f"{CORES} CPU cores, torch {torch.__version__}\n")
        print_header("what", "here", "the usual way", "ratio", "goal")
        if args.pictures:
            return compare_pictures(args.data, args.pictures, folder)
        compare_rates(folder, 1 if args.quick else 4)


if __name__ == "__main__":
    run_script(main)
