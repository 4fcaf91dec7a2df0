"""Draw pictures from a trained generator, and say how far they are from real ones.

    python sample.py                                         # samples.png: seeds 0-63 of the newest run
    python sample.py --checkpoint runs/naive-64 --seeds 7,40-54 --scale 4 --out favourites.png
    python sample.py --n 50000 --separate --out fakes        # fakes/00000000.png, … one file a seed
    python sample.py --score packs/streets                   # distance from the pack's held-out frames

A checkpoint is a run's folder, a file in it, or a netG_*.pth that pytorch/examples wrote.
"""
import argparse
import io
import math
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from model import (InputError, Parser, choose_device, cut_windows, latents, load_generator, number, render, run, seed_list,
                   write_file)  # before torch: it loads Gaudi's plugin

import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.utils import make_grid

import prepare_data

BATCH = 64  # pictures at a time: memory stays flat however many are asked for


def parse_args(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", type=Path, help="a run's folder or a file with a generator (default: the newest run in runs/)")
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument("--seeds", type=seed_list, help="which pictures, as 0-63,100 (default: 0-63)")
    seeds.add_argument("--n", type=number(int, 1, 10_000_000), help="so many: seeds 0 to N-1")
    add("--separate", action="store_true", help="one PNG a seed, named after it, in the folder --out")
    add("--scale", type=number(int, 1, 8), default=1, help="enlarge so many times (default: 1)")
    add("--out", type=Path, help="file of the grid, or folder with --separate (default: samples.png, samples)")
    add("--device", choices=("auto", "cuda", "hpu", "cpu"), default="auto")
    add("--score", type=Path, metavar="PACK", help="print the distance from this pack's held-out frames instead of drawing")
    args = parser.parse_args(argv)
    args.seeds = range(args.n) if args.n else args.seeds or range(64)
    args.out = args.out or Path("samples" if args.separate else "samples.png")
    return args


def png(picture):
    """uint8 (3, H, W) → the bytes of a PNG."""
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(data := io.BytesIO(), "PNG")
    return data.getvalue()


def save_grid(G, latent, args):
    grid = make_grid(render(G, latents(args.seeds, G.nz, latent), args.scale), math.ceil(len(args.seeds) ** 0.5))
    replaced = " (replaced)" if args.out.exists() else ""
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_file(args.out, png(grid))
    print(f"{args.out}: {len(args.seeds)} pictures{replaced}")


def save_separately(G, latent, args):
    """Threads encode (PIL lets go of the interpreter meanwhile) while the device makes the next batch."""
    args.out.mkdir(parents=True, exist_ok=True)
    there, replaced, under_way = {path.name for path in args.out.iterdir()}, 0, deque()

    def save(name, picture):
        write_file(args.out / name, png(picture), sync=False)
        return name in there

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            for i in range(0, len(args.seeds), BATCH):
                seeds = args.seeds[i:i + BATCH]
                pictures = render(G, latents(seeds, G.nz, latent), args.scale)
                under_way += [pool.submit(save, f"{seed:08d}.png", picture) for seed, picture in zip(seeds, pictures)]
                while len(under_way) > 4 * BATCH:
                    replaced += under_way.popleft().result()
            replaced += sum(task.result() for task in under_way)
        finally:
            pool.shutdown(cancel_futures=True)
    print(f"{args.out}: {len(args.seeds)} pictures" + (f" ({replaced} replaced)" if replaced else ""))


# ---- scores ---------------------------------------------------------------------------------------------------------

def descriptors(images, generator):
    """Patches at each scale of a Laplacian pyramid: float32 (N, 3, S, S) → [(64 N, 147), …], S down to 16 pixels."""
    levels = []
    while images.shape[-1] > 16:
        smaller = F.avg_pool2d(images, 2)
        levels.append(images - F.interpolate(smaller, scale_factor=2, mode="bilinear"))
        images = smaller
    for level in [*levels, images]:
        N, _, S, _ = level.shape
        patches = F.unfold(level, 7)  # (N, 3·7·7, places)
        places = torch.randint(patches.shape[2], (N, 1, 64), generator=generator).expand(-1, patches.shape[1], -1)
        yield patches.gather(2, places).transpose(1, 2).reshape(-1, 3, 49)


def distance(a, b):
    """Sliced Wasserstein distance ×1000 of two sets of N images (Karras et al. 2018, https://arxiv.org/abs/1710.10196,
    section 5): 7×7 patches of each scale, every channel normalised, along 512 random directions; the mean over scales."""
    generator, sums = torch.Generator().manual_seed(0), []
    for x, y in zip(descriptors(a, generator), descriptors(b, generator)):
        x, y = (((p - p.mean((0, 2), keepdim=True)) / p.std((0, 2), keepdim=True)).flatten(1) for p in (x, y))
        directions = F.normalize(torch.randn(x.shape[1], 512, generator=generator), dim=0)
        sums.append(((x @ directions).sort(0).values - (y @ directions).sort(0).values).abs().mean().item())
    return 1000 * sum(sums) / len(sums)


def print_score(G, latent, args):
    """The distance of fakes from the hold-out beside what real images of the training half of the pack reach."""
    pack = prepare_data.open_pack(args.score)
    if pack.image_size != G.image_size:
        raise InputError(f"{args.score} is for images of {pack.image_size} pixels, and the generator makes {G.image_size}")
    N = min(len(pack.train), len(pack.holdout), 2048)
    if N < 50:
        raise InputError(f"{args.score} has {len(pack.train)} frames and {len(pack.holdout)} held out: a score needs 50 of each")
    torch.manual_seed(0)
    train, held = (cut_windows(torch.from_numpy(frames[:N].copy()), pack.image_size)
                   for frames in (pack.train, pack.holdout))
    fake = render(G, latents(range(N), G.nz, latent)) / 127.5 - 1
    print(f"sliced Wasserstein distance from {N} held-out images (×1000, smaller is closer): "
          f"generated {distance(fake, held):.1f}, real ones of the training set {distance(train, held):.1f}")


def main():
    args = parse_args()
    device = choose_device(args.device)
    G, latent = load_generator(args.checkpoint)
    G = G.to(device)
    (print_score if args.score else save_separately if args.separate else save_grid)(G, latent, args)


if __name__ == "__main__":
    run(main, prepare_data.InputError)
