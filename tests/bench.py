"""Measure the project's speed and pictures, and print rows of Markdown. Nothing is kept.

    python tests/bench.py                            # minutes; on a machine that does nothing else
    python tests/bench.py --quick                    # a quarter of the work, about a minute
    python tests/bench.py --gpu                      # all about a GPU, in less than eight minutes
    python tests/bench.py --step 10 --price 13.11 --preset clamp-64 --device hpu --data packs/msls
    torchrun --nproc-per-node 8 tests/bench.py --step 10 --data packs/msls    # several devices
    python tests/bench.py --step 10 --trace trace.json.gz    # what takes the time in a step
    python tests/bench.py --pictures 15 --data MSLS  # scores after 15 minutes of each loop

Without an option, and with --pictures, each row compares this project (left) with what people do without it (right),
on this machine, one after the other. --step and --gpu take train.py's options, which override those of a row:
`bench.py --gpu --device cpu --frames 4000 --ngf 4 --ndf 4` tries all of it without a GPU.
"""
import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")  # as train.py
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import torch
from PIL import Image
from torch.profiler import profile, supported_activities
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms as T
from torchvision.datasets import ImageFolder

import prepare_data
import train
from model import Discriminator, Generator, InputError, init_weights, run_script

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
NORMALIZE = [T.ToTensor(), T.Normalize((0.5,) * 3, (0.5,) * 3)]
EXAMPLES = T.Compose([T.Resize(64), T.CenterCrop(64), *NORMALIZE])  # pytorch/examples
WRITE_UP = T.Compose([T.RandomAffine(0, (0.1, 0.1), (0.8, 1.2)), T.CenterCrop(480), T.Resize(64), *NORMALIZE])


def print_row(*cells):
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def print_header(*cells):
    print_row(*cells)
    print_row(*["---"] * len(cells))


def compare(what, ours, theirs, goal):
    print_row(what, f"{ours:,.0f} images/s", f"{theirs:,.0f} images/s", f"{ours / theirs:.2f}×", goal)


def script(name, *words, minutes=30):
    """Run a script of the project: (seconds, what it printed). Raises CalledProcessError or TimeoutExpired."""
    began = time.perf_counter()
    command = [sys.executable, ROOT / name, *map(str, words)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60 * minutes)
    return time.perf_counter() - began, done.stdout


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


class Failed(Exception):
    """Why a measurement has no figure, in one line."""


def isolated(what, seconds, words, limit=120):
    """What FIGURES[what](seconds, words) returns in a process of its own.

    A crash, an illegal memory access or a hang there leaves this process as it is, and is Failed here.
    """
    words = "--figures", what, "--step", seconds, *words
    try:
        return json.loads(script("tests/bench.py", *words, minutes=limit / 60)[1].splitlines()[-1])
    except subprocess.TimeoutExpired:
        raise Failed(f"no figure after {limit:.0f} s") from None
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines()
        raise Failed(lines[-1][:300] if lines else f"its process ended with status {error.returncode}") from None


# ---- the usual way ---------------------------------------------------------------------------------------------------
def make_photos(folder, n):
    """n JPEGs of 640×480 as <folder>/<city>/<n>.jpg: 64 drawn streets, and links to them."""
    cities = list(prepare_data.CITIES)[:6]
    for i in range(n):
        path = folder / cities[i % 6] / f"{i:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if i < 64:
            prepare_data.draw_street(0, cities[i % 6], i // 12, i % 12, image_size=384).save(path, quality=90)
        else:
            os.link(folder / cities[i % 64 % 6] / f"{i % 64:06d}.jpg", path)
    return folder


def loader_rate(photos, transform):
    """Images/s of an ImageFolder pass, or five seconds of one, with the better worker count."""
    rates = []
    for workers in {max(1, CORES // 2), CORES}:
        loader = iter(DataLoader(ImageFolder(photos, transform), 128, shuffle=True, num_workers=workers))
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
        fake = G(torch.randn(len(real), 100, device=device))
        on_fake = D(fake.detach())
        loss_fake = bce(on_fake, label.fill_(0))
        loss_fake.backward()
        opt_D.step()

        G.zero_grad()
        on_fake_after = D(fake)
        loss_G = bce(on_fake_after, label.fill_(1))
        loss_G.backward()
        opt_G.step()
        for number in (loss_real + loss_fake, loss_G, on_real.mean(), on_fake.mean(), on_fake_after.mean()):
            number.item()  # for the log line
        yield


def endless(photos, workers=2):
    """ImageFolder's batches as pytorch/examples loads them, epoch after epoch."""
    loader = DataLoader(ImageFolder(photos, EXAMPLES), 128, shuffle=True, num_workers=workers, drop_last=True)
    return itertools.chain.from_iterable(itertools.repeat(loader))


def plain_rate(batches, seconds, device):
    """Images/s of pytorch/examples' loop at batch size 128."""
    torch.backends.cudnn.benchmark = True  # as there
    torch.backends.cudnn.allow_tf32 = True  # torch's default, which set_up_device changes
    G = Generator().to(device).apply(init_weights)
    return 128 * rate(plain_training(batches, device, G), seconds)


# ---- train.py's step -------------------------------------------------------------------------------------------------
MODES = {"plain": [], "graph": ["--graph"], "compile": ["--compile"], "graph+compile": ["--graph", "--compile"]}


class Training:
    """A run as train.main puts it together from train.py's parts, without logs and saves."""

    def __init__(self, words):
        self.ranks = train.Ranks()
        self.args = args = train.look_up(train.parse_args(["--preset", "naive-64", *words]))
        self.device = train.set_up_device(args, self.ranks.local_rank)
        self.pack = train.find_data(args, self.ranks)
        frames = train.share(self.pack.train, args.batch_size, self.ranks)
        self.ranks.connect(self.device.backend)
        self.dcgan = train.DCGAN(args, self.device, self.ranks.world)
        stream = train.batches(frames, args.batch_size, (args.seed, self.ranks.rank), pin=self.device.pin)
        self.feed = train.upload(train.read_ahead(stream, 4), self.device)
        self.train_step = train.graphed(self.dcgan.step) if args.graph else self.dcgan.step
        self.steps = 0
        self.synchronize = getattr(torch, self.device.kind).synchronize

    def step(self):
        batch = next(self.feed)
        train.seed_step(self.device, self.args.seed, self.ranks.rank, self.steps)
        self.steps += 1
        self.train_step(batch)


def measure_step(seconds, words, trace=None):
    """Train with train.py's options: a dict of figures. trace: a file for a trace of ten more steps."""
    training = Training(words)
    args, device, world = training.args, training.device, training.ranks.world
    began = time.perf_counter()
    for _ in range(10):  # they compile, and record the graph
        training.step()
    training.synchronize()
    start = time.perf_counter() - began

    began, over = time.perf_counter(), False
    while not over:
        for _ in range(10 if world > 1 else 1):
            training.step()
        over, = training.ranks.largest(time.perf_counter() - began > seconds)  # all take equally many steps
    training.synchronize()
    took = time.perf_counter() - began
    images_s = (training.steps - 10) * args.batch_size * world / took
    figures = dict(preset=args.preset, device=f"{world} × {device_name(device.kind)}",
                   batch=f"{world} × {args.batch_size}", precision=device.precision, images_s=images_s,
                   tflops=images_s * gflop_per_image(args) / 1e3, start=start,
                   memory=f"{torch.cuda.max_memory_reserved() / 1e9:.1f} GB" if device.kind == "cuda" else "–",
                   mode="+".join(name for name in ("graph", "compile") if getattr(args, name)) or "plain")
    if trace:
        trace_steps(training, trace)
    training.train_step = None  # NCCL cannot end before the graph that uses it
    training.ranks.disconnect()
    return figures


def device_name(kind):
    module = getattr(torch, kind)
    return module.get_device_name() if hasattr(module, "get_device_name") else kind


def gflop_per_image(args):
    """Arithmetic of training on one image: 3 forward passes of G, and 8 of D.

    A backward pass costs two forward passes. G has one of each. D reads real images, fakes, and the fakes again. Its
    last backward pass costs one, because D's weights are frozen.
    """
    with torch.device("meta"), FlopCounterMode(display=False) as of_G:
        image = Generator(args.image_size, args.nz, args.ngf, 3, args.kernel_size)(torch.empty(1, args.nz))
    with torch.device("meta"), FlopCounterMode(display=False) as of_D:
        Discriminator(args.image_size, args.ndf, 3, args.kernel_size)(image)
    return (3 * of_G.get_total_flops() + 8 * of_D.get_total_flops()) / 1e9


def trace_steps(training, path):
    """Write a trace of ten steps."""
    training.synchronize()
    with profile(activities=supported_activities()) as profiler:
        for _ in range(10):
            training.step()
        training.synchronize()
    if training.ranks.rank == 0:
        profiler.export_chrome_trace(str(path))


def print_step(row, header=True, price=None, plain=None, matrix=None, goal=None):
    """A row in the write-up's form. With --gpu it is compared with the plain loop and the card's matrix rate."""
    images_hour = row["images_s"] * 3600
    cells = {
        "preset": row["preset"],
        "options": row["mode"],
        "device": row["device"],
        "batch": row["batch"],
        "precision": row["precision"],
        "images/s": f"{row['images_s']:,.0f}",
        "images/hour": f"{images_hour:,.0f}",
        "images per $": f"{images_hour / price:,.0f}" if price else "–",
        "of the plain loop": f"{row['images_s'] / plain:.2f}×" if plain else "–",
        "TFLOP/s": f"{row['tflops']:.3g}",
        "of the matrix rate (goal)": f"{row['tflops'] / matrix:.1%} ({goal or '–'})" if matrix else "–",
        "peak memory": row["memory"],
        "first ten steps": f"{row['start']:.1f} s",
    }
    if header:
        print_header(*cells)
    print_row(*cells.values())


# ---- a GPU -----------------------------------------------------------------------------------------------------------
# Preset, batch size, and the goal of each mode: a share of the card's matrix rate. It comes from a roofline, ±25%.
GPU_ROWS = [
    ("naive-64", 128, {"plain": None, "graph": "16%", "graph+compile": "21%"}),
    ("naive-64", 1024, {"plain": None, "graph": None, "graph+compile": "25%"}),
    ("clamp-64", 1024, {"plain": None, "graph": None, "graph+compile": "40%"}),
    ("clamp-64", 256, {"plain": None, "graph": None}),
    ("safe-128", 256, {"plain": None, "graph": None}),
]


def measure_card(seconds, words):
    """What --gpu compares with: (name, precision, TFLOP/s of large matrices, images/s of the plain loop)."""
    device = train.set_up_device(train.look_up(train.parse_args(["--preset", "naive-64", *words])))
    images = torch.rand(128, 3, 64, 64, device=device.kind) * 2 - 1
    plain = plain_rate(itertools.repeat((images,)), seconds, device.kind)
    n = 8192 if device.kind == "cuda" else 256
    a, b = torch.randn(2, n, n, device=device.kind, dtype=train.AUTOCAST[device.precision] or torch.float32)

    def products():
        while True:
            for _ in range(100):
                a @ b
            getattr(torch, device.kind).synchronize()
            yield

    matrix = rate(products(), seconds) * 100 * 2 * n ** 3 / 1e12
    return device_name(device.kind), device.precision, matrix, plain


def measure_gpu(folder, seconds, minutes, n_frames, trace, words):
    """Print all about a GPU. Each figure comes from a process with a time limit.

    `minutes` are for the rows of the table.
    """
    ends = time.monotonic() + 60 * minutes
    words = ["--device", "cuda", *words]
    try:
        name, precision, matrix, plain = isolated("card", seconds, words)
    except Failed as error:
        raise InputError(f"--gpu: {error}") from error
    print(f"{name}, torch {torch.__version__}, {CORES} CPU cores, {precision} matrix products {matrix:.3g} TFLOP/s, "
          f"pytorch/examples' loop with a batch on the device {plain:,.0f} images/s\n")

    packs = {size: make_pack(folder / str(size), n, size) for size, n in ((64, n_frames), (128, n_frames // 5))}
    header = True
    for preset, batch, goals in GPU_ROWS:
        options = ["--data", packs[train.PRESETS[preset]["image_size"]], "--preset", preset, "--batch-size", batch]
        for mode, goal in goals.items():
            limit = min(120, ends - time.monotonic())
            try:
                if limit < 0:
                    raise Failed("no time was left (--minutes)")
                row = isolated("step", seconds, [*options, *words, *MODES[mode]], limit)
                print_step(row, header, None, plain if batch == 128 else None, matrix, goal)
                header = False
            except Failed as error:
                print_row(preset, mode, "–", batch, error, *["–"] * 8)
    print("\nGoals are in brackets: 2.5× the plain loop for naive-64 with graph+compile. "
          "tests/README.md has the rule for defaults.\n")

    if trace:
        isolated("step", 0, ["--data", packs[64], *words, "--trace", trace])


FIGURES = {"card": measure_card, "step": measure_step}


# ---- data and pictures -----------------------------------------------------------------------------------------------
def make_pack(folder, n, image_size=64):
    """A pack of n training frames of noise, which the page cache holds afterwards."""
    folder.mkdir()
    H, W = prepare_data.frame_size(image_size)
    random = np.random.default_rng(0)
    counts = {"train": n, "holdout": max(1, min(2048, n // 4))}
    for split, count in counts.items():
        array = np.lib.format.open_memmap(folder / f"{split}.npy", "w+", np.uint8, (count, H, W, 3))
        for part in np.array_split(array, array.nbytes // 2 ** 27 + 1):
            part[:] = random.integers(0, 256, part.shape, np.uint8)
        array.flush()
    info = dict(format=prepare_data.FORMAT, image_size=image_size, H=H, W=W, arguments={},
                counts={split: {"noise": count} for split, count in counts.items()})
    (folder / "index.csv").write_text("split,row,city,sequence,key,source file\n")
    (folder / "pack.json").write_text(json.dumps(info))
    return folder


def reading_rates(pack, n=1024):
    """Images/s of batches in one pass over a pack: from memory, from the disk, and the disk's own rate."""
    frames = prepare_data.open_pack(pack).train
    steps = train.cut_stretches(frames, n)[1]

    def take_batches(file):
        stream = train.read_ahead(train.batches(frames, n, (0, 0)), 4)
        for _ in range(steps):
            next(stream)

    def read(file):
        while file.read(1 << 24):
            pass

    for work, cold in ((take_batches, False), (take_batches, True), (read, True)):
        with open(pack / "train.npy", "rb", buffering=0) as file:
            if cold:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            began = time.perf_counter()
            work(file)
            yield steps * n / (time.perf_counter() - began)


def compare_pictures(source, minutes, folder):
    """Print score and coverage of train.py and of pytorch/examples' loop, on the CPU.

    Both train on the same frames at the same time, each on half of the cores, so that a busy neighbour disturbs both.
    """
    script("prepare_data.py", source, folder / "pack")
    (folder / "photos" / "all").mkdir(parents=True)
    for i, frame in enumerate(prepare_data.open_pack(folder / "pack").train):
        Image.fromarray(frame).save(folder / "photos" / "all" / f"{i}.png")

    os.environ["OMP_NUM_THREADS"] = str(max(1, CORES // 2))
    torch.set_num_threads(max(1, CORES // 2))
    words = ["--data", folder / "pack", "--preset", "small-64", "--device", "cpu", "--out", folder / "run",
             "--epochs", 10 ** 6, "--minutes", minutes]
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(script, "train.py", *words, minutes=minutes + 30)
        G, ends = Generator().apply(init_weights), time.monotonic() + 60 * minutes
        for _ in plain_training(endless(folder / "photos", workers=0), "cpu", G):
            if time.monotonic() > ends:
                break
        running.result()
    torch.save(G.state_dict(), folder / "netG.pth")
    for what, file in (("here", "run/checkpoint.pt"), ("the usual way", "netG.pth")):
        print(f"{what}:", script("sample.py", "--score", folder / "pack", "--checkpoint", folder / file)[1])


# ---- the command line ------------------------------------------------------------------------------------------------
def compare_rates(folder, share):
    """The rows of a run without options. `share`: 1 with --quick, otherwise 4."""
    photos = make_photos(folder / "photos", 3000 * share)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    words = photos, folder / "pack", "--duplicates", 0, "--holdout", 0
    packing = 3000 * share / script("prepare_data.py", *words)[0]
    loading = loader_rate(photos, WRITE_UP)
    compare("prepare_data.py, 640×480 JPEGs, all cores; ImageFolder pass", packing, loading, "2.5×")
    stream = train.batches(prepare_data.open_pack(folder / "pack").train, 128, (0, 0))
    cutting = 128 * rate((train.cut_windows(batch, 64) for batch in stream), share)
    compare("batches from a pack in memory, and their windows; ImageFolder pass", cutting, loading, "20×")

    pack = make_pack(folder / "large", 40_000 * share)
    in_memory, reading, disk = reading_rates(pack)
    compare(f"batches of 1,024 from a pack on disk, page cache empty (full: {in_memory:,.0f}); the disk's rate",
            reading, disk, "0.8×")

    words = ["--data", str(folder / "pack"), "--device", device]
    row = isolated("step", 5 * share, words)
    plain = plain_rate(endless(photos), 10 * share, device)
    compare(f"train.py, naive-64, batch 128, {row['precision']}; pytorch/examples' loop",
            row["images_s"], plain, "2.2×" if device == "cpu" else "2.5×")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="a quarter of the work")
    add("--pictures", type=float, metavar="MINUTES", help="compare pictures after this training")
    add("--data", type=Path, help="--pictures: photographs or an MSLS tree; --step: a pack")
    add("--step", type=float, metavar="SECONDS", help="measure train.py's step, with its options")
    add("--price", type=float, help="dollars per hour, for --step")
    add("--trace", type=Path, metavar="FILE",
        help="with --step or --gpu: trace ten steps. Open FILE (.json or .json.gz) with ui.perfetto.dev")
    add("--gpu", action="store_true", help="measure an NVIDIA GPU: presets, --graph, --compile")
    add("--minutes", type=float, default=5.5, help="for --gpu: no new rows after them (default: 5.5)")
    add("--frames", type=int, default=100_000,
        help="for --gpu: frames of its pack (default: 100000; a fifth of them at 128 pixels)")
    add("--figures", choices=FIGURES, help=argparse.SUPPRESS)  # as JSON, for a process that waits for them
    args, words = parser.parse_known_args()
    if args.step is not None:
        words += ["--data", str(args.data)] if args.data else []
        more = [args.trace] if args.trace else []
        figures = FIGURES[args.figures or "step"](args.step, words, *more)
        if args.figures:
            print(json.dumps(figures))
        elif os.environ.get("RANK", "0") == "0":
            print_step(figures, price=args.price)
        return
    if words and not args.gpu:
        parser.error(f"unrecognized arguments: {' '.join(words)}")

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if args.gpu:
            seconds = 0.5 if args.quick else 3
            return measure_gpu(folder, seconds, args.minutes, args.frames, args.trace, words)
        print(f"{CORES} CPU cores, torch {torch.__version__}\n")
        if args.pictures:
            return compare_pictures(args.data, args.pictures, folder)
        print_header("what", "here", "the usual way", "ratio", "goal")
        compare_rates(folder, 1 if args.quick else 4)


if __name__ == "__main__":
    run_script(main)
