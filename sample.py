"""Draw pictures from a trained generator, say how far they are from real ones, and look into what it has learned.

    python sample.py                                             # samples.png: seeds 0-63 of the newest run
    python sample.py --checkpoint runs/naive-64 --seeds 7,40-54 --scale 4 --out favourites.png
    python sample.py --n 50000 --separate --out fakes            # fakes/00000000.png, … one file a seed
    python sample.py --score packs/streets                       # distance from the pack's held-out frames
    python sample.py --arithmetic "3,8,21 - 5,9,30 + 2,14,40"    # arithmetic.png: sums of mean latents
    python sample.py --nearest packs/streets                     # nearest.png: does G draw training images?
    python sample.py --features packs/streets                    # does D know one city from another?

A checkpoint is a run's folder, a file in it, or a netG_*.pth that pytorch/examples wrote (without D: no --features).
Sections are those of the paper: Radford, Metz, Chintala 2015, https://arxiv.org/abs/1511.06434
"""
import argparse
import csv
import io
import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

from model import (DEVICES, Discriminator, InputError, Parser, Score, choose_device, cut_windows, init_weights, latents,
                   load_discriminator, load_generator, number, render, run, seed_list,
                   write_file)  # before torch, which would load Gaudi's plugin by itself

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.utils import make_grid

import prepare_data


def expression(text):
    """An argparse type: '3,8,21 - 5,9 + 40' → [('+', [3, 8, 21]), ('-', [5, 9]), ('+', [40])]."""
    signs, terms = ["+", *text.split()[1::2]], [seed_list(seeds) for seeds in text.split()[::2]]
    if len(signs) != len(terms) or not set(signs) <= {"+", "-"} or max(map(len, terms)) > 16:
        raise argparse.ArgumentTypeError(f"{text} is no sum: give it as '3,8 - 5,9 + 40', up to 16 seeds a term")
    return list(zip(signs, terms))


def parse_args(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", type=Path, help="a run's folder or a file in it (default: the newest run in runs/)")
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument("--seeds", type=seed_list, help="which pictures, as 0-63,100 (default: 0-63)")
    seeds.add_argument("--n", type=number(int, 1, 10_000_000), help="so many: seeds 0 to N-1")
    add("--scale", type=number(int, 1, 8), default=1, help="enlarge so many times (default: 1)")
    add("--out", type=Path, help="file of the picture, or folder with --separate (default: named after its content)")
    add("--device", choices=DEVICES, default="auto")
    add = parser.add_argument_group("instead of one grid of the seeds").add_mutually_exclusive_group().add_argument
    add("--separate", action="store_true", help="one PNG a seed, named after it, in the folder --out")
    add("--score", type=Path, metavar="PACK", help="print the distance from this pack's held-out frames")
    add("--arithmetic", type=expression, metavar="SUM", help="means of seeds, added and subtracted: '3,8 - 5,9 + 2'")
    add("--nearest", type=Path, metavar="PACK", help="each seed beside the most similar window of training frames")
    add("--features", type=Path, metavar="PACK", help="print how well D's features tell this pack's cities apart")
    args = parser.parse_args(argv)
    args.seeds = range(args.n) if args.n else args.seeds or range(64)
    return args


def open_matching_pack(folder, network):
    """The Pack in a folder. Raises InputError if there is none, its images have another size, or a half is empty."""
    pack = prepare_data.open_pack(folder)
    if pack.image_size != network.image_size:
        raise InputError(f"{folder} is for images of {pack.image_size} pixels, and the checkpoint for "
                         f"{network.image_size}: name the pack that it was trained on")
    if not (len(pack.train) and len(pack.holdout)):
        raise InputError(f"{folder} has no frames to compare with, or none held out: prepare both (--holdout)")
    return pack


def windows(frames, n, image_size):
    """A random window of n frames at most, evenly spread, always the same: batches of (256, 3, S, S) in [-1, 1]."""
    frames, generator = frames[::math.ceil(len(frames) / n)], torch.Generator().manual_seed(0)
    for i in range(0, len(frames), 256):
        yield cut_windows(torch.from_numpy(frames[i:i + 256].copy()), image_size, generator=generator)


def print_score(G, latent, args):
    score = Score(open_matching_pack(args.score, G))
    print(f"sliced Wasserstein distance from {score.N} held-out images (×1000, smaller is closer): "
          f"generated {score(G, latent):.1f}, real ones of the training set {score.floor:.1f}")


# ---- pictures ------------------------------------------------------------------------------------------------------

def png(picture):
    """uint8 (3, H, W) → the bytes of a PNG."""
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(data := io.BytesIO(), "PNG")
    return data.getvalue()


def save(pictures, columns, path, content):
    replaced = " (replaced)" if path.exists() else ""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, png(make_grid(pictures, columns)))
    print(f"{path}: {content}{replaced}")


def save_grid(G, latent, args):
    pictures = render(G, latents(args.seeds, G.nz, latent), args.scale)
    save(pictures, math.ceil(len(pictures) ** 0.5), args.out or Path("samples.png"), f"{len(pictures)} pictures")


def save_separately(G, latent, args):
    """Threads encode a batch (PIL lets go of the interpreter meanwhile) while the device makes the next."""
    out, under_way = args.out or Path("samples"), []
    out.mkdir(parents=True, exist_ok=True)
    replaced = sum((out / f"{seed:08d}.png").exists() for seed in args.seeds)
    with ThreadPoolExecutor() as pool:
        for i in range(0, len(args.seeds), 64):  # memory stays flat however many there are
            seeds = args.seeds[i:i + 64]
            pictures = render(G, latents(seeds, G.nz, latent), args.scale)
            list(under_way)  # waits for the batch before, and raises what went wrong in it
            under_way = pool.map(lambda seed, picture: write_file(out / f"{seed:08d}.png", png(picture), sync=False),
                                 seeds, pictures)
        list(under_way)
    print(f"{out}: {len(args.seeds)} pictures" + (f" ({replaced} replaced)" if replaced else ""))


# ---- what it has learned -------------------------------------------------------------------------------------------

def combine(terms, nz, latent):
    """The sum of the terms' mean latents, made as long as the latents that G knows: float32 (1, nz).

    Σ w·z of independent latents has √Σw² times the length of one: a mean of three 1/√3, nearer to the middle than any
    that G was trained on. Divided by it, normal latents make a normal latent, uniform ones one to cut off at ±1.
    """
    weights = Counter()
    for sign, seeds in terms:
        for seed in seeds:
            weights[seed] += float(sign + "1") / len(seeds)
    length = math.hypot(*weights.values())
    if length < 1e-9:
        raise InputError("the terms of --arithmetic cancel out: nothing is left to draw")
    z = torch.tensor([list(weights.values())]) @ latents(list(weights), nz, latent) / length
    return z if latent == "normal" else z.clamp(-1, 1)


def save_arithmetic(G, latent, args):
    """Section 6.3.2, figure 7: each term's seeds over their mean; then the sum, amid eight with noise of ±0.25."""
    noise = torch.rand(9, G.nz, generator=torch.Generator().manual_seed(0)) / 2 - 0.25
    noise[4] = 0  # the middle of 3×3
    signs, terms = zip(*args.arithmetic)
    z = [torch.cat([latents(seeds, G.nz, latent), combine([("+", seeds)], G.nz, latent)]) for seeds in terms]
    z.append(combine(args.arithmetic, G.nz, latent) + noise)
    *columns, sums = render(G, torch.cat(z), args.scale).split([len(part) for part in z])
    side = sums.shape[-1]
    sheet = torch.zeros(max(3, *map(len, columns)), 2 * len(terms) + 3, 3, side, side, dtype=torch.uint8)
    for i, column in enumerate(columns):
        sheet[-len(column):, 2 * i] = column
        tile, sign = sheet[-1, 2 * i + 1], [*signs, "="][i + 1]
        for y in (7, 9) if sign == "=" else (8,):
            tile[:, y * side // 16 - side // 32:y * side // 16 + side // 32, side // 4:-side // 4] = 255
        if sign == "+":
            tile.copy_(tile.maximum(tile.mT))
    sheet[-3:, -3:] = sums.unflatten(0, (3, 3))
    save(sheet.flatten(0, 1), sheet.shape[1], args.out or Path("arithmetic.png"),
         "each term's seeds over their mean, and the sum amid noise")


def nearest_windows(path, images):
    """The window in the frames of a .npy file that is most like each image: (distances (Q,), windows (Q, 3, S, S)).

    Images and windows are in [-1, 1]. The distance: root mean square difference of 16×16 averages, in grey levels of
    255. The windows: squares of side S, 9/8 S and 5/4 S = H, at every 16th of it, as they are and mirrored.
    """
    (N, H, W, _), (Q, _, S, _) = np.load(path, mmap_mode="r").shape, images.shape
    k, n = S // 16, max(1, 2 ** 22 // (H * W + 64 * Q))  # n frames at a time: memory stays flat
    queries, best, nearest = F.avg_pool2d(images, k), torch.full((Q,), math.inf), torch.zeros_like(images)
    for i in range(0, N, n):
        block = torch.from_numpy(np.load(path, mmap_mode="r")[i:i + n].copy())  # mapped anew: what was read is let go
        block = block.to(images.device).permute(0, 3, 1, 2) / 127.5 - 1
        for block, zoom in product((block, block.flip(3)), (1, 8 / 9, 4 / 5)):
            zoomed = F.interpolate(block, scale_factor=zoom, mode="bilinear")
            small = F.avg_pool2d(zoomed, k)
            squares = 256 * F.avg_pool2d(small.square().sum(1, keepdim=True), 16, stride=1)
            squares = squares - 2 * F.conv2d(small, queries)  # |w|² - 2 w·q of each window w: (n, Q, down, across)
            least, places = (t.cpu() for t in squares.transpose(0, 1).flatten(1).min(1))
            for q in (least < best).nonzero().flatten():
                frame, y, x = torch.unravel_index(places[q], (len(block), *squares.shape[2:]))
                nearest[q] = zoomed[frame, :, k * y:k * y + S, k * x:k * x + S]
            best = best.minimum(least)
    return (F.avg_pool2d(nearest, k) - queries).square().mean((1, 2, 3)).sqrt().cpu() * 127.5, nearest.cpu()


def save_nearest(G, latent, args):
    """Section 4.1: each sample beside its nearest training window, and how near they are.

    A G that remembers draws what is nearer to the training set than held-out windows are; random training windows
    show how near a copy would be.
    """
    pack, n = open_matching_pack(args.nearest, G), len(args.seeds)
    fakes = render(G, latents(args.seeds, G.nz, latent)) / 127.5 - 1
    held, train = (torch.cat(list(windows(frames, n, pack.image_size))) for frames in (pack.holdout, pack.train))
    images = torch.cat([fakes, held, train]).to(G.main[0].weight.device)
    distances, nearest = nearest_windows(pack.folder / "train.npy", images)
    pairs = F.interpolate(torch.cat([fakes, nearest[:n]], 3), scale_factor=args.scale, mode="bicubic")
    pairs = ((pairs + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    save(pairs, math.ceil(n ** 0.5), args.out or Path("nearest.png"),
         f"{n} samples, right of each its nearest training window")
    sample, other, copy = (part.median().item() for part in distances.split([n, len(held), len(train)]))
    print(f"median distance from the nearest of {len(pack.train):,} training frames' windows, RMS of 16×16 averages: "
          f"samples {sample:.1f}, held-out windows {other:.1f}, ratio {sample / (other or 1):.2f}; a copy {copy:.1f}")


def features(D, x):
    """D's convolutional features of all layers, each max-pooled to 4×4: images (N, 3, S, S) → (N, 16 · channels)."""
    pooled = []
    for layer in D.main[:-1]:
        x = layer(x)
        if isinstance(layer, torch.nn.LeakyReLU):
            pooled.append(F.max_pool2d(x, x.shape[-1] // 4).flatten(1))
    return torch.cat(pooled, 1)


def ridge(gram, Y, strength):
    """A linear classifier with L2 regularisation, least squares on one-hot targets Y (n, C), in the dual form: of the
    training features X (n, d) it takes gram = X Xᵀ. It returns A (n, C), and features x have the C scores x Xᵀ A."""
    return Y.cholesky_solve(torch.linalg.cholesky(gram + strength * gram.diagonal().mean() * torch.eye(len(gram))))


def print_features(D, args):
    """Section 5: how well a linear classifier on D's features of a frame tells its city, beside three yardsticks."""
    pack, index, device = open_matching_pack(args.features, D), {"train": [], "holdout": []}, D.main[0].weight.device
    with open(pack.folder / "index.csv", **prepare_data.TEXT) as file:
        for line in csv.DictReader(file):
            index[line["split"]].append((line["city"], line["sequence"]))
    train, held = (labels[::math.ceil(len(labels) / 10_000)] for labels in index.values())  # X Xᵀ of MSLS: 6 TB
    cities, counts = sorted({city for city, _ in train + held}), Counter(city for city, _ in train)
    few = [f"{counts[city]} of {city}" for city in cities if counts[city] < 2]
    if len(cities) < 2 or few:
        raise InputError("telling cities apart takes two or more of them, and two training frames of each: "
                         f"{args.features} has {', '.join(few) or cities[0] + ' alone'} (prepare_data.py --cities)")
    y, y_held = (torch.tensor([cities.index(city) for city, _ in part]) for part in (train, held))
    third = {sequence: i % 3 for i, sequence in enumerate(dict.fromkeys(train))}
    third, Y = torch.tensor([third[sequence] for sequence in train]), F.one_hot(y).float()
    torch.manual_seed(0)
    untrained = Discriminator(D.image_size, D.main[0].out_channels, 3, D.main[0].kernel_size[0])
    untrained.apply(init_weights).to(device).eval()
    print(f"{len(cities)} cities, {len(y):,} frames to learn from, {len(y_held):,} held out: accuracy, mean by city")

    def report(name, guess):
        right = (guess == y_held).float()
        balanced = torch.stack([right[y_held == city].mean() for city in y_held.unique()]).mean()
        print(f"{name:<20} {right.mean():8.1%} {balanced:8.1%}")

    report("the largest city", y.mode().values)
    for name, describe in {"pixels at 16×16": lambda x: F.avg_pool2d(x, pack.image_size // 16).flatten(1),
                           "an untrained D": lambda x: features(untrained, x), "D": lambda x: features(D, x)}.items():
        X, X_held = (torch.cat([describe(x.to(device)).cpu() for x in windows(frames, 10_000, pack.image_size)])
                     for frames in (pack.train, pack.holdout))
        std, mean = torch.std_mean(X, 0)
        X, X_held = ((each - mean) / (std + 1e-6) for each in (X, X_held))
        gram, right = X @ X.T, Counter()
        for i, strength in product(range(3), (0.01, 0.1, 1, 10, 100)):  # each third of the sequences by the others
            fit, tune = third != i, third == i
            scores = gram[tune][:, fit] @ ridge(gram[fit][:, fit], Y[fit], strength)
            right[strength] += (scores.argmax(1) == y[tune]).sum().item()
        report(name, (X_held @ (X.T @ ridge(gram, Y, max(right, key=right.get)))).argmax(1))


@torch.no_grad()
def main():
    args = parse_args()
    device = choose_device(args.device)
    if args.features:  # D alone
        return print_features(load_discriminator(args.checkpoint).to(device), args)
    G, latent = load_generator(args.checkpoint)
    make = (print_score if args.score else save_arithmetic if args.arithmetic else save_nearest if args.nearest
            else save_separately if args.separate else save_grid)
    make(G.to(device), latent, args)


if __name__ == "__main__":
    run(main)
