"""Draw pictures from a trained generator, score them, and examine what the networks have learned.

    python sample.py                                             # samples.png: seeds 0-63 of the newest run
    python sample.py --checkpoint runs/naive-64 --seeds 7,40-54 --scale 4 --out favourites.png
    python sample.py --n 50000 --separate --out fakes            # fakes/00000000.png, … one file per seed
    python sample.py --score packs/streets                       # score and coverage, against held-out images
    python sample.py --arithmetic "3,8,21 - 5,9,30 + 2,14,40"    # arithmetic.png: sums of mean latents
    python sample.py --nearest packs/streets                     # nearest.png: does G copy training images?
    python sample.py --features packs/streets                    # how well do D's features predict a frame's city?

--checkpoint takes a run's folder, a file in it, or a netG_*.pth of pytorch/examples (without D, so no --features).
Sections in this file are those of the DCGAN paper: Radford, Metz, Chintala 2015, https://arxiv.org/abs/1511.06434
"""
import argparse
import csv
import math
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")  # choose_device loads Gaudi's plugin

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from model import (DEVICES, Discriminator, InputError, Score, choose_device, features, init_weights,  # isort: skip
                   latents, load_discriminator, load_generator, render, run_script, seed_list, spread_windows)
from prepare_data import TEXT, open_pack, progress


def terms_of_sum(text):
    """An argparse type: '3,8,21 - 5,9 + 40' → [('+', [3, 8, 21]), ('-', [5, 9]), ('+', [40])]."""
    words = text.split()
    terms = [seed_list(word) for word in words[::2]]
    signs = ["+", *words[1::2]]
    if len(signs) != len(terms) or not set(signs) <= {"+", "-"} or not all(terms):
        raise argparse.ArgumentTypeError(f"{text} is not a sum of seeds: write it as '3,8 - 5,9 + 40'")
    return list(zip(signs, terms))


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", type=Path, help="a run's folder or a file in it (default: the newest run in runs/)")
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument("--seeds", type=seed_list, default="0-63", help="seeds of the pictures (default: %(default)s)")
    seeds.add_argument("--n", type=int, help="number of pictures: seeds 0 to N-1")
    add("--scale", type=int, default=1, help="enlarge the pictures by this factor (default: %(default)s)")
    add("--out", type=Path, help="file, or folder with --separate (default: samples, arithmetic or nearest .png)")
    add("--device", choices=DEVICES, default="auto", help="where to compute (default: %(default)s)")
    add = parser.add_argument_group("instead of one grid").add_mutually_exclusive_group().add_argument
    add("--separate", action="store_true", help="write one PNG per seed to the folder --out (default: samples)")
    add("--score", type=Path, metavar="PACK", help="compare generated images with the held-out images of this pack")
    add("--arithmetic", type=terms_of_sum, metavar="SUM", help="add and subtract means of seeds: '3,8 - 5,9 + 2'")
    add("--nearest", type=Path, metavar="PACK", help="draw each seed beside the most similar part of a training frame")
    add("--features", type=Path, metavar="PACK", help="print how well D's features predict the cities of this pack")
    args = parser.parse_args(argv)

    if args.n is not None:
        args.seeds = range(args.n)
    if len(args.seeds) == 0 or args.scale < 1:
        parser.error("--n and --scale must be at least 1, and a range in --seeds must ascend")
    if args.out and not args.separate and args.out.suffix.lower() not in (".png", ".jpg", ".webp"):
        parser.error(f"--out {args.out}: name a .png, .jpg or .webp file, or add --separate to write to a folder")
    return args


def open_matching_pack(folder, network):
    """The Pack in a folder. Raises InputError if there is none, its image size differs, or a split is empty."""
    pack = open_pack(folder)
    if pack.image_size != network.image_size:
        raise InputError(f"{folder} has images of {pack.image_size} pixels, and the checkpoint draws "
                         f"{network.image_size} pixels: name the pack that the network was trained on")
    if len(pack.train) == 0 or len(pack.holdout) == 0:
        raise InputError(f"{folder} needs both training and held-out frames (prepare_data.py --holdout)")
    return pack


def print_score(G, latent, args):
    score = Score(open_matching_pack(args.score, G))
    (distance, coverage), (real, real_coverage) = score(G, latent), score.real
    print(f"score {distance:.1f} (real images {real:.1f}), coverage {coverage:.2f} (real images {real_coverage:.2f})\n"
          f"{score.images:,} images of each kind. A smaller score is better. A larger coverage is better.")


# ---- pictures -------------------------------------------------------------------------------------------------------

def save_sheet(pictures, columns, path, content):
    from torchvision.utils import make_grid  # here, because this import takes as long as importing torch
    replaced = " (replaced)" if path.exists() else ""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(make_grid(pictures, columns).permute(1, 2, 0).numpy()).save(path)
    print(f"{path}: {content}{replaced}")


def save_grid(G, latent, args):
    pictures = render(G, latents(args.seeds, G.nz, latent), args.scale)
    columns = math.ceil(len(pictures) ** 0.5)
    save_sheet(pictures, columns, args.out or Path("samples.png"), f"{len(pictures)} pictures")


def save_separately(G, latent, args):
    """One PNG per seed. Threads encode one batch at a time: memory stays flat, and PIL releases the GIL."""
    out, replaced = args.out or Path("samples"), 0
    out.mkdir(parents=True, exist_ok=True)
    batches = [args.seeds[i:i + 64] for i in range(0, len(args.seeds), 64)]
    with ThreadPoolExecutor() as threads:
        for seeds in progress(batches, len(batches), "batches"):
            paths = [out / f"{seed:08d}.png" for seed in seeds]
            replaced += sum(path.exists() for path in paths)
            pictures = render(G, latents(seeds, G.nz, latent), args.scale).permute(0, 2, 3, 1).numpy()
            jobs = [threads.submit(Image.fromarray(picture).save, path) for picture, path in zip(pictures, paths)]
            for job in jobs:
                job.result()  # raises what went wrong in the thread
    print(f"{out}: {len(args.seeds)} pictures ({replaced} replaced)")


# ---- what the networks have learned ---------------------------------------------------------------------------------

def combine(terms, nz, latent):
    """The sum of the terms' mean latents, divided by √Σw², which makes it as long as one latent: float32 (1, nz)."""
    weights = Counter()
    for sign, seeds in terms:
        for seed in seeds:
            weights[seed] += (1 if sign == "+" else -1) / len(seeds)
    length = math.hypot(*weights.values())
    if length < 1e-9:
        raise InputError("the terms of --arithmetic cancel out: there is nothing to draw")
    z = torch.tensor([list(weights.values())]) @ latents(list(weights), nz, latent) / length
    return z if latent == "normal" else z.clamp(-1, 1)


def save_arithmetic(G, latent, args):
    """Section 6.3.2, figure 7: a column for each term, its seeds above their mean. Right of a gap is the sum of the
    means, amid eight pictures of the same latent with uniform noise of ±0.25."""
    columns = []
    for _, seeds in args.arithmetic:
        mean = combine([("+", seeds)], G.nz, latent)
        columns.append(torch.cat([latents(seeds, G.nz, latent), mean]))
    columns.append(torch.zeros(0, G.nz))  # the gap
    noise = torch.rand(3, 3, G.nz, generator=torch.Generator().manual_seed(0)) / 2 - 0.25
    noise[1, 1] = 0
    columns += list(combine(args.arithmetic, G.nz, latent) + noise)  # three columns of three latents

    rows, side = max(len(z) for z in columns), G.image_size * args.scale
    sheet = torch.zeros(rows, len(columns), 3, side, side, dtype=torch.uint8)
    for i, z in enumerate(columns):
        sheet[rows - len(z):, i] = render(G, z, args.scale)
    save_sheet(sheet.flatten(0, 1), len(columns), args.out or Path("arithmetic.png"),
               "each term's seeds above their mean, and the sum amid noise")


def nearest_windows(path, images):
    """The windows in the frames of a .npy file that are most similar to images (Q, 3, S, S) in [-1, 1].

    Returns distances (Q,), the RMS difference at 16×16 pixels in grey levels from 0 to 255, and windows (Q, 3, S, S).
    Windows are squares of side S, 9/8·S and 5/4·S, at every 16th of the side, as they are and mirrored.
    """
    N, H, W, _ = np.load(path, mmap_mode="r").shape
    Q, _, S, _ = images.shape
    k, n = S // 16, max(1, 2 ** 22 // (H * W + 64 * Q))  # n frames at a time, so that memory stays flat
    queries = F.avg_pool2d(images, k)
    best, nearest = torch.full((Q,), math.inf), torch.zeros(Q, 3, S, S)
    for start in range(0, N, n):
        block = np.load(path, mmap_mode="r")[start:start + n].copy()  # mapped anew, so that pages are released
        frames = torch.from_numpy(block).to(images.device).permute(0, 3, 1, 2) / 127.5 - 1
        views = [F.interpolate(frames, scale_factor=zoom, mode="bilinear") for zoom in (1, 8 / 9, 4 / 5)]
        for view in views + [view.flip(3) for view in views]:
            # The squared difference of a window w and a query q is |w|² - 2 w·q + |q|². |q|² does not change the order.
            small = F.avg_pool2d(view, k)
            squares = 256 * F.avg_pool2d(small.square().sum(1, keepdim=True), 16, stride=1)
            differences = (squares - 2 * F.conv2d(small, queries)).transpose(0, 1)  # (Q, n, rows, columns)
            least, places = (result.cpu() for result in differences.flatten(1).min(1))
            for q in (least < best).nonzero().flatten():
                frame, y, x = torch.unravel_index(places[q], differences.shape[1:])
                nearest[q] = view[frame, :, k * y:k * y + S, k * x:k * x + S]
            best = torch.minimum(best, least)
    distances = (F.avg_pool2d(nearest, k) - queries.cpu()).square().mean((1, 2, 3)).sqrt()
    return 127.5 * distances, nearest


def save_nearest(G, latent, args):
    """Section 4.1: each sample beside its nearest training window, and the median distance of such pairs."""
    pack, n = open_matching_pack(args.nearest, G), len(args.seeds)
    samples = render(G, latents(args.seeds, G.nz, latent)) / 127.5 - 1
    held_out = spread_windows(pack.holdout, n, pack.image_size)
    copies = spread_windows(pack.train, n, pack.image_size)
    images = torch.cat([samples, *held_out, *copies]).to(G.main[0].weight.device)
    distances, nearest = nearest_windows(pack.folder / "train.npy", images)

    pairs = F.interpolate(torch.cat([samples, nearest[:n]], 3), scale_factor=args.scale, mode="bicubic")
    pairs = ((pairs + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    save_sheet(pairs, math.ceil(n ** 0.5), args.out or Path("nearest.png"),
               f"{n} samples, each with its nearest training window on its right")
    sample, real, copy = (part.median().item() for part in distances.split(n))
    print(f"median distance from the nearest of {len(pack.train):,} training frames, RMS at 16×16 pixels:\n"
          f"samples {sample:.1f}, held-out images {real:.1f}, copies of training images {copy:.1f}\n"
          f"ratio {sample / (real or 1):.2f} of samples to held-out images (well below 1 if G copies training images)")


def read_cities(pack):
    """The city of each frame: a list for the training frames, and one for the held-out frames."""
    cities = {"train": [], "holdout": []}
    with open(pack.folder / "index.csv", **TEXT) as file:
        for line in csv.DictReader(file):
            cities[line["split"]].append(line["city"])
    return cities["train"], cities["holdout"]


def describe(D, frames):
    """D's features of a window of each frame: (frames, 16 · channels) on the CPU."""
    windows = spread_windows(frames, len(frames), D.image_size)
    return torch.cat([features(D, images.to(D.main[0].weight.device)).cpu() for images in windows])


def classify(X, y, X_held):
    """The classes (m,) of features X_held (m, d), by ridge regression from features X (n, d) to their classes y (n,).
    The penalty is the mean of |x|². A third or three times of it changed the accuracy by 2 points at most."""
    std, mean = torch.std_mean(X, 0)
    X, X_held = (X - mean) / (std + 1e-6), (X_held - mean) / (std + 1e-6)
    gram = X @ X.T  # the dual form, because d is larger than n in most packs
    penalty = gram.diagonal().mean() * torch.eye(len(X))
    A = torch.linalg.solve(gram + penalty, F.one_hot(y).float())  # (n, classes)
    return (X_held @ (X.T @ A)).argmax(1)


def print_accuracy(name, guess, y):
    correct = (guess == y).float()
    by_city = torch.stack([correct[y == city].mean() for city in y.unique()])
    print(f"{name:<20} {correct.mean():8.1%} {by_city.mean():13.1%}")


def print_features(D, args):
    """Section 5: how well a linear classifier predicts a frame's city from D's features, beside two baselines."""
    pack = open_matching_pack(args.features, D)
    step = math.ceil(len(pack.train) / 10_000)  # the matrix X Xᵀ of all of MSLS would take terabytes
    train, held = (labels[::step] for labels in read_cities(pack))
    cities = sorted(set(train))
    known = [i for i, city in enumerate(held) if city in cities]
    if len(cities) < 2 or not known:
        raise InputError("--features needs training frames of two cities and held-out frames of one of them: "
                         f"{args.features} has training frames of {', '.join(cities)}")
    y = torch.tensor([cities.index(city) for city in train])
    y_held = torch.tensor([cities.index(held[i]) for i in known])
    torch.manual_seed(0)
    untrained = Discriminator(D.image_size, D.main[0].out_channels, 3, D.main[0].kernel_size[0])
    untrained.apply(init_weights).to(D.main[0].weight.device).eval()

    print(f"{len(cities)} cities, {len(y):,} training frames, {len(y_held):,} held-out frames\n"
          f"{'features':<20} accuracy  mean by city")
    print_accuracy("the largest city", y.mode().values, y_held)
    for name, network in (("an untrained D", untrained), ("D", D)):
        X = describe(network, pack.train[::step])
        X_held = describe(network, pack.holdout[::step])[known]
        print_accuracy(name, classify(X, y, X_held), y_held)


@torch.no_grad()
def main():
    args = parse_args()
    device = choose_device(args.device)
    if device.type == "hpu" and (args.nearest or args.features):
        print("--nearest and --features run on the CPU: on Gaudi each of their slices would compile a graph")
        device = torch.device("cpu")
    if args.features:
        return print_features(load_discriminator(args.checkpoint).to(device), args)
    G, latent = load_generator(args.checkpoint)
    G.to(device, memory_format=torch.channels_last if device.type == "cpu" else torch.preserve_format)  # faster there
    actions = dict(separate=save_separately, score=print_score, arithmetic=save_arithmetic, nearest=save_nearest)
    for option, action in actions.items():
        if getattr(args, option):
            return action(G, latent, args)
    save_grid(G, latent, args)


if __name__ == "__main__":
    run_script(main)
