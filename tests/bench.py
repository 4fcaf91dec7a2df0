"""Measure the project's speed and pictures, and print rows of Markdown. Nothing is kept.

    python tests/bench.py                            # some minutes; on a machine with nothing else to do
    python tests/bench.py --quick                    # a quarter of the work, about a minute
    python tests/bench.py --pictures 15 --data MSLS  # scores after 15 minutes of each loop on the same frames
    python tests/bench.py --step 10 --price 13.11 --preset clamp-64 --device hpu    # a row of the speed table
    torchrun --nproc-per-node 8 tests/bench.py --step 10 --data packs/msls          # the same of several devices
    python tests/bench.py --gpu                      # all about a GPU, in ten minutes

Without an option, each row compares this project (left) with what people do without it (right): pytorch/examples' loop,
ImageFolder with the write-up's transforms, the disk's own rate, PNG encoding alone. Both run on this machine, one after
the other. --step and --gpu take train.py's options.
"""
import argparse
import csv
import io
import itertools
import json
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
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms as T
from torchvision.datasets import ImageFolder

import prepare_data
import train
from model import (
    Discriminator,
    Generator,
    InputError,
    Score,
    init_weights,
    load_file,
    load_generator,
    run_script,
)

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


def script(name, *words):
    """Run a script of the project. Returns what it printed."""
    command = [sys.executable, ROOT / name, *map(str, words)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


# ---- the usual way --------------------------------------------------------------------------------------------------

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
    """Images/s of an ImageFolder pass (or five seconds of one) with the better of two worker counts."""
    rates = []
    for workers in {max(1, CORES // 2), CORES}:
        loader = iter(DataLoader(ImageFolder(photos, transform), 128, shuffle=True, num_workers=workers))
        next(loader)  # the workers have started
        began, images = time.perf_counter(), 0
        for batch, _ in loader:
            images += len(batch)
            if time.perf_counter() - began > 5:
                break
        rates.append(images / (time.perf_counter() - began))
    return max(rates)


def plain_training(loader, device, G):
    """pytorch/examples' loop, a step at a time: fp32, separate backward passes for real and fake, .item() calls."""
    D = Discriminator().to(device).apply(init_weights)
    opt_G, opt_D = (torch.optim.Adam(net.parameters(), 2e-4, (0.5, 0.999)) for net in (G, D))
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
        (loss_real + loss_fake).item(), loss_G.item()  # for the log line
        yield


def endless(photos, workers=2):
    """ImageFolder's batches as pytorch/examples loads them, epoch after epoch."""
    loader = DataLoader(ImageFolder(photos, EXAMPLES), 128, shuffle=True, num_workers=workers, drop_last=True)
    return itertools.chain.from_iterable(itertools.repeat(loader))


def plain_rate(batches, seconds, device):
    """Images/s of pytorch/examples' loop, after two steps to warm up."""
    training = plain_training(batches, device, Generator().to(device).apply(init_weights))
    next(training), next(training)
    began = time.perf_counter()
    for steps in itertools.count(1):
        next(training)
        took = time.perf_counter() - began
        if took > seconds:
            return steps * 128 / took


# ---- train.py's step ------------------------------------------------------------------------------------------------

def gflop_per_image(args):
    """Arithmetic of training on one image: 3 forward passes of G (its backward costs two) and 8 of D.

    D reads real, fake, and fake again. Each backward costs two, and one the last time, when D's weights are frozen.
    """
    with torch.device("meta"), FlopCounterMode(display=False) as of_G:
        image = Generator(args.image_size, args.nz, args.ngf, 3, args.kernel_size)(torch.empty(1, args.nz))
    with torch.device("meta"), FlopCounterMode(display=False) as of_D:
        Discriminator(args.image_size, args.ndf, 3, args.kernel_size)(image)
    return (3 * of_G.get_total_flops() + 8 * of_D.get_total_flops()) / 1e9


def measure_step(seconds, price, words):
    """Train with train.py's options `words` for some seconds, after ten steps to compile and to record the graph.

    Prints a row in the write-up's form, with its header. On a GPU the host stays two steps ahead and no more: further
    ahead, it would wait for data while the GPU still has work, and the share of waiting would mean nothing.
    """
    args = train.parse_args(["--preset", "naive-64", *words])
    rank, local_rank, world = (int(os.environ.get(name, default)) for name, default in
                               (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    device = train.set_up_device(args, local_rank)
    frames, _ = train.find_data(args, rank, world)
    if world > 1:
        train.dist.init_process_group(device.backend)
        hosts = train.dist.new_group(backend="gloo")
    cuda, synchronize = device.kind == "cuda", getattr(torch, device.kind).synchronize
    dcgan = train.DCGAN(args, device, world)
    train_step = train.graphed(dcgan.step) if args.graph else dcgan.step
    stream = train.batches(frames, args.batch_size, (args.seed, rank), pin=cuda)
    running = deque()  # the end of each step, on a GPU

    def waiting_for_data(train_step):
        """Train a step. Returns the seconds that it waited for its batch."""
        if len(running) == 2:
            running.popleft().synchronize()
        began = time.perf_counter()
        batch = next(stream).to(device.kind, non_blocking=True)
        waited = time.perf_counter() - began
        train_step(batch)
        if cuda:
            running.append(torch.cuda.Event())
            running[-1].record()
        return waited

    for _ in range(10):
        waiting_for_data(train_step)
    synchronize()
    began, waits, done = time.perf_counter(), [], torch.tensor(0)
    while not done:  # all ranks take equally many steps
        waits += [waiting_for_data(train_step) for _ in range(10 if world > 1 else 1)]
        done.fill_(time.perf_counter() - began > seconds)
        if world > 1:
            train.dist.all_reduce(done, train.dist.ReduceOp.MAX, group=hosts)
    synchronize()
    took = time.perf_counter() - began

    images_s = len(waits) * args.batch_size * world / took
    cells = {"preset": args.preset, "device": f"{world} × {torch.cuda.get_device_name() if cuda else device.kind}",
             "batch": f"{world} × {args.batch_size}", "precision": device.precision,
             "images/hour": f"{images_s * 3600:,.0f}",
             "images per $": f"{images_s * 3600 / price:,.0f}" if price else "–",
             "waiting for data": f"{sum(waits) / took:.1%}",
             "TFLOP/s": f"{images_s * gflop_per_image(args) / 1e3:.3g}",
             "peak memory": f"{torch.cuda.max_memory_reserved() / 1e9:.1f} GB" if cuda else "–"}
    if rank == 0:
        print_header(*cells)
        print_row(*cells.values())
    del train_step  # NCCL cannot end before the graph that uses it
    if world > 1:
        train.dist.destroy_process_group()


def trained(seconds, *words):
    """{column: value} of the row that --step prints."""
    *_, header, _, values = script("tests/bench.py", "--step", seconds, *words).splitlines()
    return dict(zip(header.strip("| ").split(" | "), values.strip("| ").split(" | ")))


def number(cell):
    return float(cell.split()[0].replace(",", "").rstrip("%"))


# ---- a GPU ----------------------------------------------------------------------------------------------------------

GPU_MODES = [(), ("--graph",), ("--compile",), ("--graph", "--compile")]


def matrix_rate(device):
    """TFLOP/s of products of large bf16 matrices."""
    n, synchronize = 8192 if device == "cuda" else 128, getattr(torch, device).synchronize
    a, b = torch.randn(2, n, n, device=device, dtype=torch.bfloat16)
    for products in (20, 300):  # the first to warm up
        synchronize()
        began = time.perf_counter()
        for _ in range(products):
            a @ b
        synchronize()
    return products * 2 * n ** 3 / (time.perf_counter() - began) / 1e12


def measure_gpu(folder, seconds, words):
    """Print the table of a GPU. `words` are options of train.py that override a row's: so it runs on a CPU, too."""
    device = train.parse_args(["--device", "cuda", *words]).device
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--gpu: torch finds no NVIDIA GPU")
    matrix = matrix_rate(device)
    resident = itertools.repeat((torch.rand(128, 3, 64, 64, device=device) * 2 - 1,))
    plain = plain_rate(resident, seconds, device)
    del resident
    torch.cuda.empty_cache()
    name = torch.cuda.get_device_name() if device == "cuda" else device
    print(f"{name}, torch {torch.__version__}, bf16 matrix products {matrix:.3g} TFLOP/s; packs of 1 M frames (128 "
          "pixels: 100,000). Goal: waiting for data under 1%.\n")
    print_header("preset", "batch", "options", "images/s", "of matrix products", "waiting for data", "memory", "goal")
    print_row("pytorch/examples' loop", 128, "resident batch", f"{plain:,.0f}", "", "", "", "")
    packs = {64: make_pack(folder / "64", 1_000_000), 128: make_pack(folder / "128", 100_000, 128)}
    for preset, batch, goal in [("naive-64", 128, f"{10 * plain:,.0f} images/s"), ("naive-64", 1024, "25%"),
                                ("clamp-64", 256, ""), ("clamp-64", 1024, "40%"), ("safe-128", 256, "")]:
        pack = packs[train.PRESETS[preset]["image_size"]]
        for mode in GPU_MODES:
            options = ["--preset", preset, "--batch-size", batch, "--precision", "bf16", "--device", device, *mode]
            try:
                row = trained(seconds, "--data", pack, *options, *words)
                figures = (f"{number(row['images/hour']) / 3600:,.0f}", f"{number(row['TFLOP/s']) / matrix:.1%}",
                           row["waiting for data"], row["peak memory"])
            except subprocess.CalledProcessError as error:  # the next row is another process
                figures = error.stderr.strip().splitlines()[-1], "", "", ""
            print_row(preset, batch, " ".join(mode), *figures, goal)


# ---- data and pictures ----------------------------------------------------------------------------------------------

def make_pack(folder, n, image_size=64, noise=0):
    """A pack of n frames: the first `noise` of them are noise. The others are a hole in the file, and read as zeros."""
    folder.mkdir()
    H, W = prepare_data.frame_size(image_size)
    random = np.random.default_rng(0)
    for split, count in (("train", n), ("holdout", 1)):
        array = np.lib.format.open_memmap(folder / f"{split}.npy", "w+", np.uint8, (count, H, W, 3))
        for i in range(0, min(noise, count), 4096):
            array[i:i + 4096] = random.integers(0, 256, array[i:i + 4096].shape, np.uint8)
    counts = {"train": {"noise": n}, "holdout": {"noise": 1}}
    info = dict(format=prepare_data.FORMAT, image_size=image_size, H=H, W=W, counts=counts)
    (folder / "pack.json").write_text(json.dumps(info))
    return folder


def cutting_rate(pack, seconds):
    """Images/s of what feeds the step: batches from the pack, windows cut."""
    for step, batch in enumerate(train.batches(prepare_data.open_pack(pack).train, 128, (0,))):
        if step == 2:
            began = time.perf_counter()
        train.cut_windows(batch, 64)
        if step > 2 and time.perf_counter() - began > seconds:
            return (step - 1) * 128 / (time.perf_counter() - began)


def forget(path):
    """Drop a file from the page cache, as if memory were too small for it."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_rate(path, seconds):
    """Bytes/s of 1 MB reads at random places, eight at a time."""
    places = np.random.default_rng(1).permutation(os.path.getsize(path) >> 20)
    began, done = time.perf_counter(), 0
    with open(path, "rb") as file, ThreadPoolExecutor(8) as threads:
        for data in threads.map(lambda place: os.pread(file.fileno(), 1 << 20, int(place) << 20), places):
            done += len(data)
            if time.perf_counter() - began > seconds:
                break
        threads.shutdown(cancel_futures=True)
    return done / (time.perf_counter() - began)


def encoding_rate(files):
    """PNGs/s of PIL alone, in as many threads as there are cores, on pictures that sample.py drew."""
    pictures = [Image.open(path).convert("RGB") for path in files]
    with ThreadPoolExecutor(CORES) as threads:
        began = time.perf_counter()
        list(threads.map(lambda picture: picture.save(io.BytesIO(), "PNG"), pictures))
        return len(pictures) / (time.perf_counter() - began)


def compare_pictures(source, minutes, folder):
    """Rows with score and coverage of train.py and of pytorch/examples' loop, trained on the CPU on the same frames.

    Both train at the same time, each on half of the cores, so that a busy neighbour disturbs both alike.
    """
    script("prepare_data.py", source, folder / "pack")
    pack = prepare_data.open_pack(folder / "pack")
    with open(folder / "pack" / "index.csv", **prepare_data.TEXT) as file:
        train_rows = [line for line in csv.DictReader(file) if line["split"] == "train"]
    files = prepare_data.list_files([os.path.abspath(source)], skipped=[])
    for line in train_rows:
        photo = folder / "photos" / line["city"] / f"{line['row']}.jpg"
        photo.parent.mkdir(parents=True, exist_ok=True)
        photo.write_bytes(files[line["source file"]]())
    os.environ["OMP_NUM_THREADS"] = str(max(1, CORES // 2))
    torch.set_num_threads(max(1, CORES // 2))
    with ThreadPoolExecutor(1) as thread:
        words = "--data", folder / "pack", "--preset", "small-64", "--device", "cpu", "--out", folder / "run"
        running = thread.submit(script, "train.py", *words, "--epochs", 10 ** 6, "--minutes", minutes)
        G, began, images = Generator().apply(init_weights), time.perf_counter(), 0
        for _ in plain_training(endless(folder / "photos", workers=0), "cpu", G):
            images += 128
            if time.perf_counter() - began > 60 * minutes:
                break
        running.result()
    newest, score = folder / "run" / "checkpoint.pt", Score(pack)
    (ours, our_coverage), (theirs, their_coverage) = score(*load_generator(newest)), score(G.eval())
    real, real_coverage = score.real
    print_row(f"score after {minutes:g} minutes on {len(pack.train)} frames ({load_file(newest)['images']:,} images; "
              f"{images:,}); real images {real:.1f}", f"{ours:.1f}", f"{theirs:.1f}", f"{ours / theirs:.2f}×", "0.25×")
    print_row(f"coverage; real images {real_coverage:.2f}", f"{our_coverage:.2f}", f"{their_coverage:.2f}", "–", "–")


# ---- the command line -----------------------------------------------------------------------------------------------

def compare_rates(folder, share):
    """The rows of a run without options. `share`: 1 with --quick, otherwise 4."""
    photos, device = make_photos(folder / "photos", 3000 * share), "cuda" if torch.cuda.is_available() else "cpu"
    began = time.perf_counter()
    script("prepare_data.py", photos, folder / "pack", "--duplicates", 0, "--holdout", 0)
    packing, loading = 3000 * share / (time.perf_counter() - began), loader_rate(photos, WRITE_UP)
    compare("prepare_data.py, 640×480 JPEGs, all cores; ImageFolder pass", packing, loading, "2.5×")
    cutting = cutting_rate(folder / "pack", share)
    compare("batches from a pack in memory; ImageFolder pass", cutting, loading, "20×")

    pack = make_pack(folder / "large", 20_000 * share, noise=20_000 * share)
    forget(pack / "train.npy")
    reading = cutting_rate(pack, share)
    forget(pack / "train.npy")
    disk = disk_rate(pack / "train.npy", share) / np.prod(prepare_data.frame_size(64)) / 3
    compare(f"batches from a pack on disk, page cache empty; the slower of the disk ({disk:,.0f}) and the row above",
            reading, min(disk, cutting), "0.8×")

    row = trained(5 * share, "--data", folder / "pack", "--preset", "naive-64", "--device", device)
    plain = plain_rate(endless(photos), 10 * share, device)
    compare(f"train.py, naive-64, batch 128, {row['precision']}; pytorch/examples' loop",
            number(row["images/hour"]) / 3600, plain, "2.2×" if device == "cpu" else "10×")

    torch.save(Generator().apply(init_weights).state_dict(), folder / "netG.pth")
    n, words = 1000 * share, ("--checkpoint", folder / "netG.pth", "--separate", "--out", folder / "fakes")
    began = time.perf_counter()
    script("sample.py", *words, "--n", 64)
    start_up = time.perf_counter() - began
    script("sample.py", *words, "--n", n)
    drawing = n / (time.perf_counter() - began - 2 * start_up)
    compare("sample.py --separate; PNG encoding alone, all cores", drawing,
            encoding_rate(sorted((folder / "fakes").iterdir())), "0.8×")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="a quarter of the work")
    add("--pictures", type=float, metavar="MINUTES", help="compare pictures after so many minutes of training")
    add("--data", type=Path, help="for --pictures a folder of photos or an MSLS tree, for --step a pack")
    add("--step", type=float, metavar="SECONDS", help="measure train.py's step; takes the options of train.py")
    add("--price", type=float, help="dollars per hour, for --step")
    add("--gpu", action="store_true", help="measure presets, batch sizes, --graph and --compile on an NVIDIA GPU")
    args, words = parser.parse_known_args()
    if args.step:
        return measure_step(args.step, args.price, [*words, *(["--data", str(args.data)] if args.data else [])])
    if words and not args.gpu:
        parser.error(f"unrecognized arguments: {' '.join(words)}")
    if args.pictures and not args.data:
        parser.error("--pictures needs --data")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if args.gpu:
            return measure_gpu(folder, 0.5 if args.quick else 3, words)
        print(f"{CORES} CPU cores, torch {torch.__version__}\n")
        print_header("what", "here", "the usual way", "ratio", "goal")
        if args.pictures:
            return compare_pictures(args.data, args.pictures, folder)
        compare_rates(folder, 1 if args.quick else 4)


if __name__ == "__main__":
    run_script(main)
