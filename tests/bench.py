"""How fast, as ratios: each line measures both sides one after the other on this machine, and prints a row of Markdown.

    python tests/bench.py                            # some minutes; on a machine with nothing else to do
    python tests/bench.py --quick                    # a look, in about a minute: a quarter of the work
    python tests/bench.py --pictures 15 --data MSLS  # scores after 15 minutes of each loop on the same frames
    python tests/bench.py --step 10 --price 13.11 --preset clamp-64 --device hpu    # a row of the speed table
    torchrun --nproc-per-node 8 tests/bench.py --step 10 --data packs/msls          # the same of several devices

Left stands what people do without this project: pytorch/examples' loop, ImageFolder with the write-up's transforms, the
disk's own rate, PNG encoding alone. Everything is drawn or made up in a temporary folder.
"""
import argparse
import csv
import io
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import prepare_data
import train
import model
from model import Discriminator, Generator, Score, init_weights, load_generator

import torch
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms as T
from torchvision.datasets import ImageFolder

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
NORMALIZE = [T.ToTensor(), T.Normalize((0.5,) * 3, (0.5,) * 3)]
EXAMPLES = T.Compose([T.Resize(64), T.CenterCrop(64), *NORMALIZE])                        # pytorch/examples
WRITE_UP = T.Compose([T.RandomAffine(0, (0.1, 0.1), (0.8, 1.2)), T.CenterCrop(480), T.Resize(64), *NORMALIZE])  # crops, scales, shifts


def row(what, ours, theirs, goal):
    print(f"| {what} | {ours:,.0f} images/s | {theirs:,.0f} images/s | {ours / theirs:.2f}× | {goal} |", flush=True)


def script(name, *words):
    """Run a script of the project; returns what it printed."""
    return subprocess.run([sys.executable, ROOT / name, *map(str, words)], check=True, capture_output=True, text=True).stdout


def make_photos(folder, n):
    """n JPEGs of 640×480 as <folder>/<city>/<n>.jpg: 256 drawn streets, and links to them."""
    for i in range(n):
        city = list(prepare_data.CITIES)[i % 6]
        path = folder / city / f"{i:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if i < 256:
            prepare_data.draw_street("", 0, city, i // 12, i % 12, image_size=192).resize((640, 480)).save(path, quality=90)
        else:
            os.link(folder / list(prepare_data.CITIES)[i % 256 % 6] / f"{i % 256:06d}.jpg", path)
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
    """The usual DCGAN loop, a step at a time: fp32, real and fake backward apart, three .item() a step."""
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


def endless(photos):
    """ImageFolder's batches as pytorch/examples loads them, epoch after epoch."""
    loader = DataLoader(ImageFolder(photos, EXAMPLES), 128, shuffle=True, num_workers=2, drop_last=True)
    return itertools.chain.from_iterable(itertools.repeat(loader))


def plain_rate(batches, steps, device):
    """Images/s of the usual loop, after two steps to warm up."""
    training = plain_training(batches, device, Generator().to(device).apply(init_weights))
    next(training), next(training)
    began = time.perf_counter()
    for _ in range(steps):
        next(training)
    return steps * 128 / (time.perf_counter() - began)


def compare_pictures(source, minutes, folder, device):
    """A row with the scores of train.py and of the usual loop, trained on the same frames for as many minutes.

    On a CPU at once, each on half of its threads, so that a busy neighbour disturbs both alike.
    """
    script("prepare_data.py", source, folder / "pack")
    pack = prepare_data.open_pack(folder / "pack")
    for line in csv.DictReader(open(folder / "pack" / "index.csv", **prepare_data.TEXT)):
        if line["split"] == "train":
            link = folder / "photos" / line["city"] / Path(line["source file"]).name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(source.resolve() / line["source file"])
    os.environ["OMP_NUM_THREADS"] = str(max(1, CORES // 2))
    torch.set_num_threads(max(1, CORES // 2))
    with ThreadPoolExecutor() as pool:
        words = "--data", folder / "pack", "--preset", "demo-64", "--ngf", 32, "--ndf", 32, "--out", folder / "run"
        ours = pool.submit(script, "train.py", *words, "--mirror", "--instance-noise", 0.05, "--epochs", 10 ** 6,
                           "--minutes", minutes, "--save-minutes", minutes)
        if device == "cuda":
            ours.result()
        G, began, images = Generator().to(device).apply(init_weights), time.perf_counter(), 0
        for _ in plain_training(endless(folder / "photos"), device, G):
            images += 128
            if time.perf_counter() - began > 60 * minutes:
                break
        ours.result()
    newest, score = max((folder / "run").glob("generator-[0-9]*.pt"), key=os.path.getmtime), Score(pack)
    ours, theirs = score(*load_generator(newest)), score(G.eval())
    print(f"| score after {minutes:g} minutes on {len(pack.train)} real frames: train.py ({int(newest.stem[10:]):,} images); "
          f"pytorch/examples' loop ({images:,}); real images {score.floor:.1f} | {ours:.1f} | {theirs:.1f} "
          f"| {ours / theirs:.2f}× | 0.6× |")


def gflop_per_image(args):
    """Arithmetic of training on one image: 3 forwards of G (its backward counts two) and 8 of D, which reads real, fake
    and fake again, each with a backward that costs two, less one for the weights that are frozen the last time."""
    with torch.device("meta"), FlopCounterMode(display=False) as of_G:
        image = Generator(args.image_size, args.nz, args.ngf, 3, args.kernel_size)(torch.empty(1, args.nz))
    with torch.device("meta"), FlopCounterMode(display=False) as of_D:
        Discriminator(args.image_size, args.ndf, 3, args.kernel_size)(image)
    return (3 * of_G.get_total_flops() + 8 * of_D.get_total_flops()) / 1e9


def measure_step(seconds, price, trace, words):
    """Train with train.py's options `words` for so long, and keep nothing: a row in the write-up's form, with its header.

    One wait for the device at each end, after ten steps for compiling and capturing. A profiler's trace of five steps
    more, loader included, goes to the folder `trace`, if one is named.
    """
    args = train.parse_args(["--preset", "naive-64", *words])
    rank, local, world = (int(os.environ.get(name, default)) for name, default in
                          (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    device = train.set_up_device(args, local)
    agree = train.join_processes(device, world)
    pack = train.find_data(args, rank, local, world, agree)
    train_step = train.make_fast(train.DCGAN(args, device, world), args, rank, math.inf)
    stream, synchronize = train.batches(pack, args, device, rank, world, 0), getattr(torch, device.type).synchronize
    for step in range(10):
        train_step(next(stream)[0], step)
    synchronize()
    began, waited = time.perf_counter(), 0.0
    while world > 1 and step % 10 or not agree(int(time.perf_counter() - began > seconds)):  # all ranks alike
        frames, waiting = next(stream)
        train_step(frames, step := step + 1)
        waited += waiting
    synchronize()
    took = time.perf_counter() - began
    with torch.profiler.profile() if trace and rank == 0 else nullcontext() as profiler:
        for more in range(5):
            train_step(next(stream)[0], step + 1 + more)
        synchronize()
    if profiler:
        torch.profiler.tensorboard_trace_handler(trace)(profiler)
    images_s = (step - 9) * args.batch_size * world / took
    row = {"preset": args.preset, "device": f"{world} × {device.name}", "batch": f"{world} × {args.batch_size}",
           "precision": device.precision, "images/hour": f"{images_s * 3600:,.0f}",
           "images per $": f"{images_s * 3600 / price:,.0f}" if price else "–",
           "waiting for data": f"{waited / took:.1%}", "TFLOP/s": f"{images_s * gflop_per_image(args) / 1e3:.3g}"}
    if rank == 0:
        print("\n".join("| " + " | ".join(cells) + " |" for cells in (row, ["---"] * len(row), row.values())))
    del train_step  # NCCL's end waits for the graph that holds its messages
    if world > 1:
        train.dist.destroy_process_group()


def trained(pack, seconds, *words):
    """{column: value} of the row that --step prints."""
    *_, header, _, values = script("tests/bench.py", "--step", seconds, "--data", pack, *words).splitlines()
    return dict(zip(header.strip("| ").split(" | "), values.strip("| ").split(" | ")))


def images_s(table):
    return int(table["images/hour"].replace(",", "")) / 3600


def cutting_rate(pack, seconds, *words):
    """Images/s of what feeds the step: frames from the pack, windows cut."""
    args = train.parse_args(["--data", "", "--device", "cpu", "--batch-size", "128", *words])
    stream, images = train.batches(prepare_data.open_pack(pack), args, train.set_up_device(args, 0), 0, 1, 0), -256
    for frames, _ in stream:
        if images == 0:
            began = time.perf_counter()
        train.cut_windows(frames, 64)
        images += 128
        if images > 0 and time.perf_counter() - began > seconds:
            return images / (time.perf_counter() - began)


def make_pack(folder, n):
    """A pack of n frames of noise, quickly."""
    folder.mkdir()
    H, W = prepare_data.frame_size(64)
    noise = np.random.default_rng(0).integers(0, 256, (4096, H, W, 3), np.uint8)
    for split, count in (("train", n), ("holdout", 0)):
        array = np.lib.format.open_memmap(folder / f"{split}.npy", "w+", np.uint8, (count, H, W, 3)) if count else None
        for i in range(0, count, 4096):
            array[i:i + 4096] = noise[:count - i]
        if not count:
            np.save(folder / f"{split}.npy", np.empty((0, H, W, 3), np.uint8))
    for name in ("index.csv", "skipped.csv", "preview.png"):
        (folder / name).touch()
    info = dict(format=prepare_data.FORMAT, image_size=64, H=H, W=W, counts={"train": {"noise": n}, "holdout": {}},
                files={name: (folder / name).stat().st_size for name in prepare_data.FILES})
    (folder / "pack.json").write_text(json.dumps(info))
    return folder


def forget(path):
    """Drop a file from the page cache, as if memory were too small for it."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def disk_rate(path, seconds):
    """Bytes/s of 1 MB reads at random places, eight at a time."""
    fd, size = os.open(path, os.O_RDONLY), os.path.getsize(path)
    places, began, done = np.random.default_rng(1).permutation(size >> 20), time.perf_counter(), 0
    with ThreadPoolExecutor(8) as pool:
        for data in pool.map(lambda place: os.pread(fd, 1 << 20, int(place) << 20), places):
            done += len(data)
            if time.perf_counter() - began > seconds:
                break
        pool.shutdown(cancel_futures=True)
    os.close(fd)
    return done / (time.perf_counter() - began)


def encoding_rate(picture_files):
    """PNGs/s of PIL alone, in as many threads as there are cores, on the pictures that sample.py drew."""
    pictures = [Image.open(path).convert("RGB") for path in picture_files]
    with ThreadPoolExecutor(CORES) as pool:
        began = time.perf_counter()
        list(pool.map(lambda picture: picture.save(io.BytesIO(), "PNG"), pictures))
        return len(pictures) / (time.perf_counter() - began)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a quarter of the work")
    parser.add_argument("--pictures", type=float, metavar="MINUTES", help="compare pictures instead, after so many minutes each")
    parser.add_argument("--data", type=Path, help="real frames for --pictures: an MSLS tree")
    parser.add_argument("--step", type=model.number(float, 0.1), metavar="SECONDS", help="measure train.py's step alone; takes its options")
    parser.add_argument("--price", type=model.number(float, 0), help="dollars an hour, for --step")
    parser.add_argument("--trace", metavar="DIR", help="of --step, a torch.profiler trace for TensorBoard")
    args, words = parser.parse_known_args()
    if args.step:
        return measure_step(args.step, args.price, args.trace, [*words, *(["--data", str(args.data)] if args.data else [])])
    if words:
        parser.error(f"unrecognized arguments: {' '.join(words)}")
    share = 1 if args.quick else 4
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        print(f"{torch.cuda.get_device_name() if device == 'cuda' else f'{CORES} CPU cores'}, torch {torch.__version__}\n")
        print("| what | here | the usual way | ratio | goal |\n|---|---|---|---|---|")
        if args.pictures:
            return compare_pictures(args.data, args.pictures, folder, device)

        photos = make_photos(folder / "photos", 3000 * share)
        began = time.perf_counter()
        script("prepare_data.py", photos, folder / "pack", "--duplicates", 0, "--holdout", 0)
        packing, loading = len(list(photos.glob("*/*"))) / (time.perf_counter() - began), loader_rate(photos, WRITE_UP)
        row("prepare_data.py, 640×480 JPEGs, all cores; ImageFolder pass", packing, loading, "2.5×")
        cutting = cutting_rate(folder / "pack", share)
        row("batches from a pack in memory; ImageFolder pass", cutting, loading, "20×")

        pack = make_pack(folder / "large", 20_000 * share)
        forget(pack / "train.npy")
        streaming = cutting_rate(pack, share, "--stream")
        forget(pack / "train.npy")
        disk = disk_rate(pack / "train.npy", share) / np.prod(prepare_data.frame_size(64)) / 3
        row(f"batches from a pack on disk, page cache empty; the slower of the disk ({disk:,.0f}) and the same from memory",
            streaming, min(disk, cutting), "0.8×")

        steps = 5 * share if device == "cpu" else 100 * share
        table = trained(folder / "pack", 5 * share, "--preset", "naive-64")
        what, goal = f"train.py, naive-64, batch 128, {table['precision']}; pytorch/examples' loop", "2.2×" if device == "cpu" else "10×"
        row(what, images_s(table), plain_rate(endless(photos), steps, device), goal)
        if device == "cuda":  # its loader bounds that loop there: once more with a batch that is on the card
            resident = itertools.repeat((torch.rand(128, 3, 64, 64, device=device) * 2 - 1,))
            row(f"{what} on a resident batch", images_s(table), plain_rate(resident, steps, device), goal)

        torch.save(Generator().apply(init_weights).state_dict(), folder / "netG.pth")
        n = 1000 * share if device == "cpu" else 10_000 * share
        words = "--checkpoint", folder / "netG.pth", "--separate", "--out", folder / "fakes"
        began = time.perf_counter()
        script("sample.py", *words, "--n", 64)
        start_up = time.perf_counter() - began
        script("sample.py", *words, "--n", n)
        drawing = n / (time.perf_counter() - began - 2 * start_up)
        row("sample.py --separate; PNG encoding alone, all cores", drawing, encoding_rate(sorted((folder / "fakes").iterdir())), "0.8×")

        if device == "cuda":
            table = trained(folder / "pack", 10, "--preset", "clamp-64", "--batch-size", 1024, "--precision", "bf16")
            print(f"| clamp-64, batch 1024, bf16 | {table['TFLOP/s']} TFLOP/s | | | 40% of the card's measured matrix rate |")
            million = make_pack(folder / "million", 1_000_000)
            for words, goal in (((), "under 1%"), (("--stream",), "under 2%")):
                table = trained(million, 10, "--preset", "naive-64", *words)
                print(f"| waiting for data, 1 M frames {' '.join(words) or 'resident'} | {table['waiting for data']} | | | {goal} |")


if __name__ == "__main__":
    model.run(main)
