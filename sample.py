"""Draw pictures from a trained generator, score them, and examine what the networks have learned.

    python sample.py                                  # samples.png: seeds 0-63 of the newest run
    python sample.py --n 400 --out streets.html       # a page to look through, without a network
    python sample.py --seeds 7,40-54 --scale 4 --out favourites.png
    python sample.py --n 50000 --separate --out fakes # fakes/00000000.png, … one file per seed
    python sample.py --real packs/streets --n 50000   # real/00000000.png, … photographs, for FID
    python sample.py --score packs/streets            # score and coverage, against held-out images
    python sample.py --arithmetic "3,8,21 - 5,9,30 + 2,14,40"
    python sample.py --nearest packs/streets          # does G copy training images?
    python sample.py --features packs/streets         # can D's features tell cities apart?

--checkpoint takes a run's folder, a file in it, or a netG_*.pth of pytorch/examples.
Sections in this file are those of the DCGAN paper: Radford, Metz, Chintala 2015,
https://arxiv.org/abs/1511.06434

SPDX-License-Identifier: MIT
Copyright (c) 2026 the authors of this repository
"""
import argparse
import base64
import csv
import io
import math
import os
from collections import Counter
from pathlib import Path

if __name__ == "__main__":  # torch reads these when it is imported
    # Gaudi's plugin is loaded by choose_device, after its own variables are set.
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    # Threads that wait soon sleep. Threads that spin lose their time to any other program.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from model import (
    DEVICES,
    Discriminator,
    InputError,
    Score,
    choose_device,
    cut_windows,
    features,
    init_weights,
    join,
    latents,
    load_discriminator,
    load_generator,
    render,
    run_script,
    save_output,
    save_picture,
    save_pngs,
    say,
    seed_list,
    spread_windows,
    to_grey_levels,
)
from prepare_data import TEXT, count, open_pack, progress

MAX_SHEET = 89_000_000  # pixels: above it, PIL and many viewers refuse to open an image
MAX_WEBP = 16_383       # pixels on a side: the format's limit


# ---- one file with all pictures ------------------------------------------------------------------
def save_grid(G, latent, args):
    n = len(args.seeds)
    scale = args.scale or default_scale(G)
    check_sheet(n, G.image_size * scale, "add --separate for one file per picture, or lower --n")

    pictures = render(G, latents(args.seeds, G.nz, latent), scale)
    sheet = join(pictures, columns=math.ceil(n ** 0.5))
    save_sheet(sheet, args.out or Path("samples.png"), count(n, "picture"))


def check_sheet(n, side, advice):
    """Raise InputError if n pictures of side × side pixels make too large an image."""
    pixels = n * side ** 2
    if pixels > MAX_SHEET:
        raise InputError(f"{n:,} pictures make an image of {pixels / 1e6:,.0f} megapixels, which "
                         f"is too large: {advice}")


def default_scale(G):
    """The factor that enlarges pictures to 128 pixels."""
    return max(1, 128 // G.image_size)


def save_sheet(sheet, path, content):
    replaced = save_picture(sheet, path, quality=95)  # PNG ignores the quality
    say(f"{path}: {content} ({sheet.width}×{sheet.height} pixels{replaced})")


def seeds_text(seeds, most=6):
    """'7,40,12' for a few seeds, '0,1,2,3,4,5,…' for many."""
    words = [str(seed) for seed in seeds[:most]]
    if len(seeds) > most:
        words.append("…")
    return ",".join(words)


# ---- one file per picture ------------------------------------------------------------------------
def save_separately(G, latent, args):
    def draw(seeds):
        return render(G, latents(seeds, G.nz, latent), args.scale or 1)

    save_by_seed(draw, args.seeds, args.out or Path("samples"))


def save_real(args):
    pack = open_pack(args.real)
    if len(pack.train) == 0:
        raise InputError(f"{args.real} has no training frames")

    def draw(seeds):
        return to_grey_levels(random_windows(pack.train, seeds, pack.image_size))

    save_by_seed(draw, args.seeds, args.out or Path("real"))


def random_windows(frames, seeds, image_size):
    """For each seed a random window of a random frame: float32 (len(seeds), 3, S, S) in [-1, 1]."""
    windows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        row = torch.randint(len(frames), (), generator=generator).item()
        frame = torch.from_numpy(frames[row].copy())
        windows.append(cut_windows(frame[None], image_size, generator=generator))
    return torch.cat(windows)


def save_by_seed(draw, seeds, folder):
    """Write folder/<seed>.png for each seed. draw(seeds) returns uint8 (n, 3, H, W)."""
    seeds = list(dict.fromkeys(seeds))  # each once
    batches = [seeds[i:i + 64] for i in range(0, len(seeds), 64)]

    def images(batch):
        pictures = draw(batch).permute(0, 2, 3, 1).numpy()
        return dict(zip(batch, map(Image.fromarray, pictures)))

    with progress(batches, len(batches), "batches") as steps:
        note = save_pngs(map(images, steps), folder)
    say(f"{folder}: {count(len(seeds), 'picture')} ({note})")


# ---- a page --------------------------------------------------------------------------------------
def save_page(G, latent, args):
    """One HTML file that needs no network. The pictures are one WebP image in it."""
    n = len(args.seeds)
    scale = args.scale or 1
    side = G.image_size * scale
    columns = math.ceil(n ** 0.5)
    most = MAX_WEBP // side
    if columns > most:
        raise InputError(f"{n:,} pictures of {side} pixels do not fit into the image of a page: "
                         f"choose at most {most ** 2:,} (--n {most ** 2})")

    pictures = render(G, latents(args.seeds, G.nz, latent), scale)
    image = io.BytesIO()
    join(pictures, columns, padding=0).save(image, "WEBP", quality=80)
    values = {
        "@N@": f"{n:,}",
        "@SIDE@": str(side),
        "@COLUMNS@": str(columns),
        "@ROWS@": str(math.ceil(n / columns)),
        "@SEEDS@": ",".join(map(str, args.seeds)),
        "@IMAGE@": base64.b64encode(image.getvalue()).decode(),
    }
    page = PAGE
    for name, value in values.items():
        page = page.replace(name, value)

    replaced = save_output(args.out, page.encode())
    size = f"{len(page) / 1000:,.0f} KB"
    say(f"{args.out}: {count(n, 'picture')} ({size}{replaced}). Open it in a browser")


# A large picture with its seed, all pictures, and a list of the seeds that were pressed.
PAGE = """\
<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Street scenes that do not exist</title>
<link rel="icon" href="data:,">
<style>
  :root { color-scheme: light dark; --paper: #f7f5f1; --ink: #2a2826; --soft: #6d6860;
          --line: #ddd8cf; --accent: #a34a21; --on-accent: #fff; }
  @media (prefers-color-scheme: dark) {
    :root { --paper: #191817; --ink: #ebe6dd; --soft: #a39c91;
            --line: #3a3733; --accent: #e8a27a; --on-accent: #191817; }
  }
  * { box-sizing: border-box; }
  html { scroll-padding-bottom: 5rem; }  /* the height of the footer */
  body { margin: 0; background: var(--paper); color: var(--ink);
         font: 1rem/1.5 system-ui, sans-serif; }
  main { max-width: 76rem; margin: 0 auto; padding: 1.5rem 1rem 6rem; }
  h1 { margin: 0 0 .25rem; font: 1.7rem/1.2 Georgia, serif; }
  p { margin: 0 0 1rem; color: var(--soft); }
  button, input { font: inherit; color: inherit; background: none;
                  border: 1px solid var(--line); border-radius: .5rem; padding: .4rem .9rem; }
  button { cursor: pointer; -webkit-tap-highlight-color: transparent; }
  :focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
  [aria-pressed=true], #copy { background: var(--accent); color: var(--on-accent);
                               border-color: var(--accent); }
  #next { display: block; width: 100%; padding: 0; border: 0; border-radius: .75rem;
          overflow: hidden; }
  #next img { display: block; width: 100%; aspect-ratio: 1; }
  figure { margin: 0 0 2rem; }
  figcaption { display: flex; justify-content: space-between; align-items: center;
               margin-top: .75rem; }
  #all { display: grid; gap: .4rem;
         grid-template-columns: repeat(auto-fill, minmax(4.25rem, 1fr)); }
  #all button { aspect-ratio: 1; padding: 0; border: 0; border-radius: .35rem; }
  #all [aria-pressed=true] { box-shadow: 0 0 0 2px var(--paper), 0 0 0 5px var(--accent); }
  footer { position: fixed; inset: auto 0 0; display: flex; gap: .5rem; justify-content: center;
           padding: .75rem 1rem; background: var(--paper); border-top: 1px solid var(--line); }
  footer input { flex: 0 1 34rem; min-width: 0; font-family: ui-monospace, monospace; }
  [hidden] { display: none !important; }
  @media (min-width: 56rem) {
    main { display: grid; grid-template-columns: 27rem 1fr; gap: 2.5rem; }
    .stage { position: sticky; top: 1.5rem; align-self: start; }
  }
</style>

<main>
  <section class="stage">
    <h1>Street scenes that do not exist</h1>
    <p>A neural network drew them. Press the picture or the arrow keys for another one.</p>
    <figure>
      <button id="next" title="Another scene"><img id="picture" alt=""></button>
      <figcaption>
        <span id="name" role="status"></span>
        <button id="collect" title="Key: C">Collect</button>
      </figcaption>
    </figure>
  </section>
  <section>
    <p>All @N@ scenes. Press those that you like, to collect their seeds.</p>
    <div id="all"></div>
  </section>
</main>
<footer hidden>
  <input id="text" readonly aria-label="Collected seeds">
  <button id="copy">Copy</button>
  <button id="clear">Clear</button>
</footer>
<noscript>This page needs JavaScript.</noscript>
<img id="sheet" hidden alt="" src="data:image/webp;base64,@IMAGE@">

<script>
  const SIDE = @SIDE@, COLUMNS = @COLUMNS@, ROWS = @ROWS@;  // of the sheet, which has all pictures
  const SEEDS = "@SEEDS@".split(",");
  const element = id => document.getElementById(id);
  const footer = document.querySelector("footer");
  const collected = new Set();  // numbers of pictures, from 0

  const order = [...SEEDS.keys()];  // of showing the scenes: random, and each comes once
  for (let i = order.length - 1; i > 0; i--) {
    const j = Math.floor(Math.random() * (i + 1));
    [order[i], order[j]] = [order[j], order[i]];
  }
  let place = 0;  // in this order

  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = Math.max(SIDE, 512);
  const pen = canvas.getContext("2d");
  pen.imageSmoothingQuality = "high";

  function show(newPlace) {
    place = (newPlace + order.length) % order.length;
    const i = order[place], x = i % COLUMNS * SIDE, y = Math.floor(i / COLUMNS) * SIDE;
    pen.drawImage(element("sheet"), x, y, SIDE, SIDE, 0, 0, canvas.width, canvas.height);
    element("picture").src = canvas.toDataURL();
    element("picture").alt = "A street scene that does not exist, seed " + SEEDS[i];
    element("name").textContent = "Seed " + SEEDS[i];
    update(i);
  }

  function toggle(i) {
    if (!collected.delete(i)) collected.add(i);
    update(i);
  }

  function update(i) {
    const shown = collected.has(order[place]);
    element("collect").textContent = shown ? "Collected" : "Collect";
    element("collect").setAttribute("aria-pressed", shown);
    element("all").children[i].setAttribute("aria-pressed", collected.has(i));
    element("text").value = "--seeds " + [...collected].map(i => SEEDS[i]).join(",");
    footer.hidden = collected.size === 0;
  }

  // A small picture is a part of the sheet, a little larger than its button. So its neighbours do
  // not show at its edges. A position of 100% aligns the end of the sheet with the button's.
  const ZOOM = 1.02;
  const percent = (i, n) => 100 * (i * ZOOM + (ZOOM - 1) / 2) / (n * ZOOM - 1);

  SEEDS.forEach((seed, i) => {
    const button = document.createElement("button");
    const x = percent(i % COLUMNS, COLUMNS), y = percent(Math.floor(i / COLUMNS), ROWS);
    button.style.backgroundPosition = `${x}% ${y}%`;
    button.setAttribute("aria-pressed", false);
    button.ariaLabel = button.title = "Seed " + seed;
    button.onclick = () => { toggle(i); show(order.indexOf(i)); };
    element("all").append(button);
  });

  element("next").onclick = () => show(place + 1);
  element("collect").onclick = () => toggle(order[place]);
  element("clear").onclick = () => [...collected].forEach(toggle);
  element("copy").onclick = () => { element("text").select(); document.execCommand("copy"); };
  document.onkeydown = event => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "INPUT") return;
    const onButton = event.target.tagName === "BUTTON";  // there, space and Enter press it
    if (event.key === "ArrowLeft") show(place - 1);
    else if (event.key === "ArrowRight" || event.key === " " && !onButton) show(place + 1);
    else if (event.key === "c") toggle(order[place]);
    else return;
    event.preventDefault();
  };

  element("sheet").decode().then(() => {
    const style = document.createElement("style");
    style.textContent = `#all button {
      background-image: url("${element("sheet").src}");
      background-size: ${100 * ZOOM * COLUMNS}% ${100 * ZOOM * ROWS}%;
    }`;
    document.head.append(style);
    show(0);
  });
</script>
"""


# ---- what the networks have learned --------------------------------------------------------------
def open_matching_pack(folder, network):
    """The Pack in a folder. Raises InputError if it does not suit the network, or is empty."""
    pack = open_pack(folder)
    if pack.image_size != network.image_size:
        raise InputError(f"{folder} has images of {pack.image_size} pixels, and the checkpoint's "
                         f"have {network.image_size}: name the pack that it was trained on")
    if len(pack.train) == 0 or len(pack.holdout) == 0:
        raise InputError(f"{folder} needs both training and held-out frames "
                         "(prepare_data.py --holdout)")
    return pack


def print_score(G, latent, args):
    pack = open_matching_pack(args.score, G)
    score = Score(pack.train, pack.holdout, pack.image_size)
    distance, coverage = score(G, latent)
    real_distance, real_coverage = score.real
    say(f"score {distance:.1f} (real images {real_distance:.1f}), "
        f"coverage {coverage:.2f} (real images {real_coverage:.2f})\n"
        f"{score.images:,} images of each kind. "
        "A smaller score is better. A larger coverage is better.")


def combine(terms, nz, latent):
    """The sum of the terms' mean latents: float32 (1, nz).

    It is divided by √Σw² (w: the weights of the seeds), which makes it as long as one latent.
    """
    weights = Counter()
    for sign, seeds in terms:
        for seed in seeds:
            weights[seed] += (1 if sign == "+" else -1) / len(seeds)
    length = math.hypot(*weights.values())
    if length < 1e-9:
        raise InputError("the terms of --arithmetic cancel out: there is nothing to draw")

    w = torch.tensor([list(weights.values())])
    z = w @ latents(list(weights), nz, latent) / length
    return z if latent == "normal" else z.clamp(-1, 1)


def save_arithmetic(G, latent, args):
    """Section 6.3.2, figure 7: a column for each term, with its seeds above their mean.

    Right of a gap is the sum of the means, amid eight pictures of the same latent with uniform
    noise of ±0.25.
    """
    columns = []
    headings = []
    for sign, seeds in args.arithmetic:
        mean = combine([("+", seeds)], G.nz, latent)
        columns.append(torch.cat([latents(seeds, G.nz, latent), mean]))
        headings.append(f"{sign} {seeds_text(seeds)}")
    headings[0] = headings[0].removeprefix("+ ")

    gap = torch.zeros(0, G.nz)
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(3, 3, G.nz, generator=generator) / 2 - 0.25
    noise[1, 1] = 0
    columns += [gap, *(combine(args.arithmetic, G.nz, latent) + noise)]
    headings += ["", "", "= sum (middle), with noise", ""]

    scale = args.scale or default_scale(G)
    side = G.image_size * scale
    rows = max(len(z) for z in columns)
    check_sheet(rows * len(columns), side, "name fewer seeds, or a smaller --scale")
    pictures = torch.zeros(rows, len(columns), 3, side, side, dtype=torch.uint8)
    for i, z in enumerate(columns):
        if len(z):
            pictures[rows - len(z):, i] = render(G, z, scale)
    sheet = join(pictures.flatten(0, 1), len(columns))
    save_sheet(add_headings(sheet, headings), args.out or Path("arithmetic.png"),
               "each term's seeds above their mean, and the sum with noise around it")


def add_headings(sheet, headings):
    """The sheet with a heading above each of its columns."""
    width = sheet.width / len(headings)
    size = max(10, round(width / 9))  # of the letters, in pixels
    font = ImageFont.load_default(size)
    labelled = Image.new("RGB", (sheet.width, sheet.height + 2 * size))
    labelled.paste(sheet, (0, 2 * size))
    draw = ImageDraw.Draw(labelled)
    for i, heading in enumerate(headings):
        draw.text(((i + 0.5) * width, size), heading, font=font, anchor="mm")
    return labelled


def nearest_windows(path, images):
    """The windows in the frames of a .npy file that are most similar to images (Q, 3, S, S).

    Images and windows are in [-1, 1]. Windows are squares of side S, 9/8·S and 5/4·S, at every 16th
    of the side, as they are and mirrored. Returns distances (Q,), the RMS difference at 16×16
    pixels in grey levels from 0 to 255, and windows (Q, 3, S, S).
    """
    N, H, W, _ = np.load(path, mmap_mode="r").shape
    Q, _, S, _ = images.shape
    k = S // 16
    queries = F.avg_pool2d(images, k)  # (Q, 3, 16, 16)
    best = torch.full((Q,), math.inf)
    nearest = torch.zeros(Q, 3, S, S)

    n = max(1, 2 ** 22 // (H * W + 64 * Q))  # frames at a time, so that memory stays flat
    starts = range(0, N, n)
    for start in progress(starts, len(starts), "blocks"):
        block = np.load(path, mmap_mode="r")[start:start + n].copy()  # mapped anew to free pages
        frames = torch.from_numpy(block).to(images.device)
        frames = frames.permute(0, 3, 1, 2) / 127.5 - 1

        for view in views(frames):
            differences = window_differences(F.avg_pool2d(view, k), queries)
            least, places = differences.flatten(1).min(1)
            least = least.cpu()
            for q in (least < best).nonzero().flatten():
                frame, y, x = torch.unravel_index(places[q].cpu(), differences.shape[1:])
                right_and_below = view[frame, :, k * y:, k * x:]
                nearest[q] = right_and_below[:, :S, :S]
            best = torch.minimum(best, least)

    differences = F.avg_pool2d(nearest, k) - queries.cpu()
    distances = differences.square().mean((1, 2, 3)).sqrt()
    return 127.5 * distances, nearest


def views(frames):
    """Frames (N, 3, H, W) at three sizes, each as it is and mirrored."""
    for zoom in (1, 8 / 9, 4 / 5):
        view = F.interpolate(frames, scale_factor=zoom, mode="bilinear")
        yield view
        yield view.flip(3)


def window_differences(small, queries):
    """Squared differences of each window of 16×16 pixels in small (n, 3, h, w) to each query.

    queries: (Q, 3, 16, 16). Returns (Q, n, h - 15, w - 15), less |q|², which is constant for a
    query q: the difference to a window w is |w|² - 2 w·q + |q|².
    """
    squares = 256 * F.avg_pool2d(small.square().sum(1, keepdim=True), 16, stride=1)
    products = F.conv2d(small, queries)
    return (squares - 2 * products).transpose(0, 1)


def save_nearest(G, latent, args):
    """Section 4.1: each sample beside its nearest training window. Prints the median distance."""
    pack = open_matching_pack(args.nearest, G)
    n = len(args.seeds)
    scale = args.scale or default_scale(G)
    check_sheet(2 * n, G.image_size * scale, "lower --n, or --scale")
    samples = render(G, latents(args.seeds, G.nz, latent)) / 127.5 - 1
    held_out = spread_windows(pack.holdout, n, pack.image_size)
    copies = spread_windows(pack.train, n, pack.image_size)
    images = torch.cat([samples, *held_out, *copies]).to(device_of(G))
    distances, nearest = nearest_windows(pack.folder / "train.npy", images)

    pairs = torch.cat([samples, nearest[:n]], dim=3)
    pairs = F.interpolate(pairs, scale_factor=scale, mode="bicubic")
    sheet = join(to_grey_levels(pairs), columns=math.ceil(n ** 0.5))
    save_sheet(sheet, args.out or Path("nearest.png"),
               f"{n} samples, each with its nearest training window on its right")

    sample, real, copy = (part.median().item() for part in distances.split(n))
    say(f"median distance from the nearest of {len(pack.train):,} training frames, "
        "RMS at 16×16 pixels:\n"
        f"samples {sample:.1f}, held-out images {real:.1f}, copies of training images {copy:.1f}\n"
        f"ratio {sample / (real or 1):.2f} of samples to held-out images "
        "(well below 1 if G copies training images)")


def device_of(network):
    return next(network.parameters()).device


def read_cities(pack):
    """The city of each frame: a list for the training frames, and one for the held-out frames."""
    cities = {"train": [], "holdout": []}
    index = pack.folder / "index.csv"
    if not index.exists():
        raise InputError(f"--features needs the cities of the frames: there is no {index}")
    with open(index, **TEXT) as file:
        for line in csv.DictReader(file):
            cities[line["split"]].append(line["city"])
    return cities["train"], cities["holdout"]


def window_features(D, frames):
    """D's features of a window of each frame: (frames, 16 · channels) on the CPU."""
    described = []
    for images in spread_windows(frames, len(frames), D.image_size):
        described.append(features(D.main, images.to(device_of(D))).cpu())
    return torch.cat(described)


def classify(X, y, X_held):
    """The classes (m,) of features X_held (m, d), by ridge regression.

    X (n, d) are features with known classes y (n,). The penalty is the mean of |x|². A third or
    three times of it changed the accuracy by 2 points at most.
    """
    std, mean = torch.std_mean(X, 0)
    X = (X - mean) / (std + 1e-6)
    X_held = (X_held - mean) / (std + 1e-6)

    gram = X @ X.T  # the dual form, because d is larger than n in most packs
    penalty = gram.diagonal().mean() * torch.eye(len(X))
    A = torch.linalg.solve(gram + penalty, F.one_hot(y).float())  # (n, classes)
    return (X_held @ (X.T @ A)).argmax(1)


def untrained_copy(D):
    """A discriminator of D's size with new weights, always the same."""
    first = D.main[0]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # on the CPU alone
        untrained = Discriminator(D.image_size, first.out_channels, 3, first.kernel_size[0])
        untrained.apply(init_weights)
    return untrained.eval().to(device_of(D))


def print_features(D, args):
    """Section 5: how well a linear classifier predicts a frame's city from D's features.

    Two baselines stand beside it: always the largest city, and the features of an untrained D.
    """
    pack = open_matching_pack(args.features, D)
    step = math.ceil(len(pack.train) / 10_000)  # for all of MSLS, X Xᵀ would take terabytes
    train, held = (labels[::step] for labels in read_cities(pack))
    cities = sorted(set(train))
    known = [i for i, city in enumerate(held) if city in cities]
    if len(cities) < 2 or not known:
        raise InputError("--features needs training frames of two cities and held-out frames of "
                         f"one of them: {args.features} has training frames of "
                         f"{', '.join(cities)}")
    y = torch.tensor([cities.index(city) for city in train])
    y_held = torch.tensor([cities.index(held[i]) for i in known])

    say(f"{len(cities)} cities, {len(y):,} training frames, {len(y_held):,} held-out frames")
    say(f"{'features':<20} accuracy  mean by city")
    print_accuracy("the largest city", y.mode().values, y_held)
    for name, network in (("an untrained D", untrained_copy(D)), ("D", D)):
        X = window_features(network, pack.train[::step])
        X_held = window_features(network, pack.holdout[::step])[known]
        print_accuracy(name, classify(X, y, X_held), y_held)


def print_accuracy(name, guess, y):
    correct = (guess == y).float()
    by_city = torch.stack([correct[y == city].mean() for city in y.unique()])
    say(f"{name:<20} {correct.mean():8.1%} {by_city.mean():13.1%}")


# ---- the command line ----------------------------------------------------------------------------
def terms_of_sum(text):
    """An argparse type: '3,8,21 - 5,9 + 40' → [('+', [3, 8, 21]), ('-', [5, 9]), ('+', [40])]."""
    advice = "Write a sum as '3,8 - 5,9 + 40', with spaces around + and -"
    words = text.split()
    signs = ["+", *words[1::2]]
    try:
        terms = [seed_list(word) for word in words[::2]]
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}. {advice}") from None

    if len(signs) != len(terms) or not set(signs) <= {"+", "-"}:
        raise argparse.ArgumentTypeError(f"{text!r} is not a sum of seeds. {advice}")
    return list(zip(signs, terms))


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", type=Path,
        help="a run's folder or a file in it (default: the newest run in runs/)")
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument("--seeds", type=seed_list, help="seeds of the pictures (default: 0-63)")
    seeds.add_argument("--n", type=int, help="number of pictures: seeds 0 to N-1")
    add("--scale", type=int,
        help="enlarge the pictures by this factor (default: to 128 pixels in a grid, or else 1)")
    add("--out", type=Path,
        help="a .png, .jpg or .webp file for a grid, a .html file for a page, or a folder with "
             "--separate and --real (default: samples, arithmetic or nearest .png, or real)")
    add("--device", choices=DEVICES, default="auto", help="where to compute (default: %(default)s)")

    group = parser.add_argument_group("instead of one grid or page")
    add = group.add_mutually_exclusive_group().add_argument
    add("--separate", action="store_true",
        help="write one PNG per seed to the folder --out (default: samples)")
    add("--real", type=Path, metavar="PACK",
        help="write random windows of this pack's training frames, as training sees them, to the "
             "folder --out (default: real); a seed is always the same window")
    add("--score", type=Path, metavar="PACK",
        help="compare generated images with the held-out images of this pack")
    add("--arithmetic", type=terms_of_sum, metavar="SUM",
        help="add and subtract the means of seeds: '3,8 - 5,9 + 2'")
    add("--nearest", type=Path, metavar="PACK",
        help="draw each seed beside the most similar part of a training frame")
    add("--features", type=Path, metavar="PACK",
        help="print how well D's features predict the cities of this pack")
    args = parser.parse_args(argv)

    pictures = args.seeds is not None or args.n or args.scale or args.out
    if pictures and (args.score or args.features):
        parser.error("--score and --features draw nothing: leave out --seeds, --n, --scale, --out")
    if args.seeds is None:
        args.seeds = range(64)
    if args.n is not None:
        if not 1 <= args.n <= 10_000_000:
            parser.error(f"--n {args.n}: choose from 1 to 10,000,000")
        args.seeds = range(args.n)
    if args.scale is not None and not 1 <= args.scale <= 16:
        parser.error(f"--scale {args.scale}: choose from 1 to 16")
    if args.scale and args.real:
        parser.error("--scale: --real writes the pixels that training sees")
    check_out(parser, args)
    return args


def check_out(parser, args):
    """End the script if args.out is not a file or folder of the right kind."""
    if args.out is None:
        return
    if not args.out.name:  # "" or "."
        parser.error(f"--out {args.out}: name a file or a folder")
    suffix = args.out.suffix.lower()
    images = (".png", ".jpg", ".jpeg", ".webp")

    if args.separate or args.real:
        if args.out.is_file() or suffix in (*images, ".html"):
            parser.error(f"--out {args.out}: it is a file, and --separate and --real write to a "
                         "folder")
    elif args.out.is_dir():
        parser.error(f"--out {args.out} is a folder: name a file")
    elif args.arithmetic or args.nearest:
        if suffix not in images:
            parser.error(f"--out {args.out}: name a .png, .jpg or .webp file")
    elif suffix not in (*images, ".html"):
        parser.error(f"--out {args.out}: name a .png, .jpg or .webp file, a .html file for a page, "
                     "or add --separate to write to a folder")


@torch.no_grad()
def main(argv=None):
    args = parse_args(argv)
    if args.real:
        save_real(args)
        return

    device = choose_device(args.device)
    if device.type == "hpu" and (args.nearest or args.features):
        say("--nearest and --features run on the CPU: "
            "on Gaudi each of their slices would compile a graph")
        device = torch.device("cpu")
    if args.features:
        D = load_discriminator(args.checkpoint)
        print_features(D.to(device), args)
        return

    G, latent = load_generator(args.checkpoint)
    G.to(device)
    if device.type == "cpu":
        G.to(memory_format=torch.channels_last)  # faster there
    if args.separate:
        save_separately(G, latent, args)
    elif args.score:
        print_score(G, latent, args)
    elif args.arithmetic:
        save_arithmetic(G, latent, args)
    elif args.nearest:
        save_nearest(G, latent, args)
    elif args.out and args.out.suffix.lower() == ".html":
        save_page(G, latent, args)
    else:
        save_grid(G, latent, args)


if __name__ == "__main__":
    run_script(main, memory_advice="choose fewer pictures, or a smaller --scale")
