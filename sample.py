"""Draw pictures from a trained generator, score them, and examine what it has learned.

    python sample.py                                  # samples.png: seeds 0-63 of the newest run
    python sample.py --n 400 --out streets.html       # a page to look through, offline
    python sample.py --seeds 7,40-54 --scale 4 --out favourites.png
    python sample.py --n 50000 --separate --out fakes # fakes/00000000.png, … one file per seed
    python sample.py --real packs/streets --n 50000   # real/00000000.png, … photographs, for FID
    python sample.py --score packs/streets            # score and coverage, against held-out images
    python sample.py --arithmetic "3,8,21 - 5,9,30 + 2,14,40"
    python sample.py --nearest packs/streets          # does G copy training images?

--checkpoint takes a run's folder, a file in it, or a netG_*.pth of pytorch/examples.
Sections in this file are those of the DCGAN paper: Radford, Metz, Chintala 2015,
https://arxiv.org/abs/1511.06434

SPDX-License-Identifier: MIT
Copyright (c) 2026 the authors of this repository
"""
import argparse
import base64
import io
import math
import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if __name__ == "__main__":  # torch reads these when it is imported
    # Gaudi's plugin is loaded by choose_device, after its own variables are set.
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    # Waiting threads sleep. Threads that spin lose their time to any other program.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
import torch.nn.functional as F
from PIL import Image

from model import (
    DEVICES,
    InputError,
    Score,
    file_path,
    join,
    latents,
    open_generator,
    render,
    run_script,
    save_image,
    say,
    seed_list,
    spread_windows,
    to_grey_levels,
    write_file,
)
from prepare_data import open_pack, progress


# ---- one file with all pictures ------------------------------------------------------------------
def save_grid(G, z, args):
    save_sheet(render(G, z), args, "samples.png")


def save_sheet(pictures, args, name, columns=None):
    """Write pictures, uint8 (N, 3, H, W), as one image to args.out, or to a file of this name.

    By default they are enlarged to 128 pixels, and the image is about square.
    """
    scale = args.scale or max(1, 128 // pictures.shape[2])
    pictures = F.interpolate(pictures, scale_factor=scale, mode="bicubic")
    if columns is None:
        columns = math.ceil(len(pictures) ** 0.5)
    sheet = join(pictures, columns)
    path = args.out or Path(name)
    save_image(sheet, path, quality=95)  # PNG ignores the quality
    say(f"{path}: {sheet.width}×{sheet.height} pixels")


# ---- one file per picture ------------------------------------------------------------------------
def save_separately(G, z, args):
    pictures = (render(G, part, args.scale or 1) for part in z.split(256))
    save_pngs(pictures, args.seeds, args.out or Path("samples"))


def save_real(args):
    pack = open_pack(args.real)
    windows = spread_windows(pack.train, len(args.seeds), pack.image_size)
    save_pngs(map(to_grey_levels, windows), args.seeds, args.out or Path("real"))


def save_pngs(batches, numbers, folder):
    """Write folder/<number>.png for each picture. Batches are uint8 (256, 3, H, W), or less."""
    paths = (folder / f"{number:08d}.png" for number in numbers)
    n = math.ceil(len(numbers) / 256)
    with ThreadPoolExecutor() as threads:  # PIL releases the GIL
        for pictures in progress(batches, n, "batches"):
            for _ in threads.map(save_image, to_images(pictures), paths):
                pass  # raises what went wrong in a thread
    say(f"{folder}: {len(numbers):,} pictures")


def to_images(pictures):
    """uint8 (N, 3, H, W) → PIL images."""
    return map(Image.fromarray, pictures.permute(0, 2, 3, 1).numpy())


# ---- a page --------------------------------------------------------------------------------------
def save_page(G, z, args):
    """One HTML file that works offline. Each picture is a WebP image in its button."""
    pictures = render(G, z, args.scale or 1)
    buttons = []
    for seed, image in zip(args.seeds, to_images(pictures)):
        file = io.BytesIO()
        image.save(file, "WEBP", quality=80)
        data = base64.b64encode(file.getvalue()).decode()
        source = f"data:image/webp;base64,{data}"
        buttons.append(f'<button><img alt="Seed {seed}" src="{source}"></button>')

    page = PAGE.replace("@BUTTONS@", "\n".join(buttons))
    write_file(args.out, page.encode())
    say(f"{args.out}: {len(buttons):,} pictures. Open it in a browser")


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
          --line: #ddd8cf; --accent: #a34a21; }
  @media (prefers-color-scheme: dark) {
    :root { --paper: #191817; --ink: #ebe6dd; --soft: #a39c91; --line: #3a3733; --accent: #e8a27a; }
  }
  * { box-sizing: border-box; }
  html { scroll-padding-bottom: 5rem; }  /* the height of the footer */
  body { margin: 0; background: var(--paper); color: var(--ink);
         font: 1rem/1.5 system-ui, sans-serif; }
  main { max-width: 76rem; margin: 0 auto; padding: 1.5rem 1rem 6rem; }
  h1 { margin: 0 0 .25rem; font: 1.7rem/1.2 Georgia, serif; }
  p { margin: 0 0 1rem; color: var(--soft); }
  button, input { font: inherit; color: inherit; background: none; cursor: pointer;
                  border: 1px solid var(--line); border-radius: .5rem; padding: .4rem .9rem;
                  -webkit-tap-highlight-color: transparent; }
  :focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
  [aria-pressed=true], #copy { background: var(--accent); color: var(--paper); }
  img { display: block; width: 100%; aspect-ratio: 1; border-radius: inherit; }
  #next { width: 100%; padding: 0; border: 0; border-radius: .75rem; }
  .caption { display: flex; justify-content: space-between; align-items: center;
             margin: .75rem 0 2rem; }
  #all { display: grid; gap: .4rem;
         grid-template-columns: repeat(auto-fill, minmax(4.25rem, 1fr)); }
  #all button { padding: 0; border: 0; border-radius: .35rem; }
  #all [aria-pressed=true] { box-shadow: 0 0 0 2px var(--paper), 0 0 0 5px var(--accent); }
  footer { position: fixed; inset: auto 0 0; display: flex; gap: .5rem; justify-content: center;
           padding: .75rem 1rem; background: var(--paper); border-top: 1px solid var(--line); }
  footer input { flex: 0 1 34rem; min-width: 0; font-family: ui-monospace, monospace; }
  [hidden] { display: none; }
  @media (min-width: 56rem) {
    main { display: grid; grid-template-columns: 27rem 1fr; gap: 2.5rem; }
    .stage { position: sticky; top: 1.5rem; align-self: start; }
  }
</style>

<main>
  <section class="stage">
    <h1>Street scenes that do not exist</h1>
    <p>A neural network drew them. Press the picture or the arrow keys for another one.</p>
    <button id="next" title="Another scene"><img id="picture"></button>
    <div class="caption">
      <span id="name" role="status"></span>
      <button id="collect" title="Key: C"></button>
    </div>
  </section>
  <section>
    <p>All scenes. Press those that you like, to collect their seeds.</p>
    <div id="all">
@BUTTONS@
    </div>
  </section>
</main>
<footer hidden>
  <input id="text" readonly aria-label="Collected seeds">
  <button id="copy">Copy</button>
  <button id="clear">Clear</button>
</footer>

<script>
  const element = id => document.getElementById(id);
  const order = [...element("all").children];  // of showing the scenes: random, and each comes once
  const collected = new Set();  // buttons

  for (const [i, button] of order.entries()) {
    button.title = button.firstChild.alt;
    button.onclick = () => { toggle(button); show(order.indexOf(button)); };
    const j = Math.floor(Math.random() * (i + 1));
    [order[i], order[j]] = [order[j], order[i]];
  }

  let place = 0;  // in this order
  function show(newPlace) {
    place = (newPlace + order.length) % order.length;
    const small = order[place].firstChild;
    element("picture").src = small.src;
    element("picture").alt = element("name").textContent = small.alt;
    update();
  }

  function toggle(button) {
    if (!collected.delete(button)) collected.add(button);
    update();
  }

  function update() {
    for (const button of order) button.setAttribute("aria-pressed", collected.has(button));
    const shown = collected.has(order[place]);
    element("collect").setAttribute("aria-pressed", shown);
    element("collect").textContent = shown ? "Collected" : "Collect";
    element("text").value = "--seeds " + [...collected].map(button => button.title.slice(5));
    document.querySelector("footer").hidden = collected.size === 0;
  }

  element("next").onclick = () => show(place + 1);
  element("collect").onclick = () => toggle(order[place]);
  element("clear").onclick = () => { collected.clear(); update(); };
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
  show(0);
</script>
"""


# ---- the score -----------------------------------------------------------------------------------
def open_matching_pack(folder, network):
    """The Pack in a folder. Raises InputError if it does not suit the network."""
    pack = open_pack(folder)
    if pack.image_size != network.image_size:
        raise InputError(f"{folder} has images of {pack.image_size} pixels, and the checkpoint's "
                         f"have {network.image_size}: name the pack that it was trained on")
    if len(pack.holdout) == 0:
        raise InputError(f"{folder} has no held-out frames (prepare_data.py --holdout)")
    return pack


def print_score(G, latent, args):
    pack = open_matching_pack(args.score, G)
    measure = Score(pack.train, pack.holdout, pack.image_size)
    score, coverage = measure(G, latent)
    say(f"score {score:.1f} (real images {measure.real[0]:.1f}), "
        f"coverage {coverage:.2f} (real images {measure.real[1]:.2f})\n"
        f"{measure.images:,} images of each kind. "
        "A smaller score is better. A larger coverage is better.")


# ---- arithmetic with latents (section 6.3.2) -----------------------------------------------------
def add_up(terms, nz, latent):
    """The sum of the terms' mean latents: float32 (nz,).

    It is divided by √Σw² (w: the weights of the seeds), which makes it as long as one latent.
    """
    weights = Counter()
    for sign, seeds in terms:
        for seed in seeds:
            weights[seed] += int(sign + "1") / len(seeds)
    length = math.hypot(*weights.values())
    if length < 1e-9:
        raise InputError("the terms of --arithmetic cancel out: there is nothing to draw")

    w = torch.tensor(list(weights.values()))
    z = w @ latents(weights, nz, latent) / length
    return z if latent == "normal" else z.clamp(-1, 1)


def save_arithmetic(G, latent, args):
    """Figure 7 of the paper: a column for each term, with its seeds above their mean.

    Right of a gap is the sum of the means, amid eight pictures of the same latent with uniform
    noise of ±0.25.
    """
    terms = args.arithmetic
    rows = 1 + max(2, *(len(seeds) for _, seeds in terms))
    z = torch.full((rows, len(terms) + 4, G.nz), math.nan)  # nothing is drawn where it stays NaN
    for i, (sign, seeds) in enumerate(terms):
        z[-1 - len(seeds):-1, i] = latents(seeds, G.nz, latent)
        z[-1, i] = add_up([("+", seeds)], G.nz, latent)
        say(f"column {i + 1}: {sign} the mean (the lowest picture) of seeds {seeds}")
    say("on the right: their sum, amid eight sums with a little noise")

    noise = latents(range(9), G.nz, "uniform").view(3, 3, -1) / 4
    noise[1, 1] = 0
    z[-3:, -3:] = add_up(terms, G.nz, latent) + noise

    columns = z.shape[1]
    z = z.flatten(0, 1)
    pictures = render(G, z)
    pictures[z[:, 0].isnan()] = 0
    save_sheet(pictures, args, "arithmetic.png", columns)


# ---- the nearest training images (section 4.1) ---------------------------------------------------
def save_nearest(G, z, args):
    """Each sample beside its nearest training window. Prints the median distances."""
    pack = open_matching_pack(args.nearest, G)
    samples = render(G, z) / 127.5 - 1
    held_out = spread_windows(pack.holdout, len(samples), pack.image_size)
    images = torch.cat([samples, *held_out])
    device = next(G.parameters()).device
    if device.type != "hpu":  # on Gaudi each slice would compile a graph
        images = images.to(device)
    distances, nearest = nearest_windows(pack.train, images)

    pairs = torch.cat([samples, nearest[:len(samples)].cpu()], dim=3)
    save_sheet(to_grey_levels(pairs), args, "nearest.png")

    sample, real = distances.view(2, -1).median(dim=1).values
    say("median distance from the nearest training window, RMS at 16×16 pixels: "
        f"samples {sample:.1f}, held-out images {real:.1f} "
        "(samples are much nearer if G copies training images)")


def nearest_windows(frames, images):
    """The windows in frames, uint8 (N, H, W, 3), that are most similar to images (Q, 3, S, S).

    Windows are squares of side S, 9/8·S and 5/4·S, at every 16th of the side, as they are and
    mirrored. Images and windows are in [-1, 1]. Returns distances (Q,), the RMS difference at 16×16
    pixels in grey levels from 0 to 255, and windows (Q, 3, S, S).
    """
    S = images.shape[-1]
    k = S // 16
    queries = F.avg_pool2d(images, k).flatten(1)  # (Q, 3 · 16 · 16)
    best = torch.full_like(queries[:, 0], math.inf)
    nearest = torch.zeros_like(images)

    starts = range(0, len(frames), 32)  # few frames at a time, so that memory stays flat
    for start in progress(starts, len(starts), "blocks"):
        block = torch.tensor(frames[start:start + 32], device=images.device)
        for view in views(block):
            small = cut_all(F.avg_pool2d(view, k), 16, 1)
            distances, places = torch.cdist(queries, small.reshape(-1, 768)).min(dim=1)
            closer = distances < best
            best[closer] = distances[closer]
            place = torch.unravel_index(places[closer], small.shape[:3])
            nearest[closer] = cut_all(view, S, k)[place]
    return 127.5 * best / 768 ** 0.5, nearest


def views(frames):
    """Yield frames, uint8 (N, H, W, 3), at three sizes, as they are and mirrored: (N, 3, h, w)."""
    frames = frames.permute(0, 3, 1, 2) / 127.5 - 1
    for zoom in (1, 8 / 9, 4 / 5):
        view = F.interpolate(frames, scale_factor=zoom, mode="bilinear")
        yield view
        yield view.flip(3)


def cut_all(images, side, step):
    """All windows of images (N, 3, H, W): (N, rows, columns, 3, side, side), without a copy."""
    windows = images.unfold(2, side, step).unfold(3, side, step)
    return windows.permute(0, 2, 3, 1, 4, 5)


# ---- the command line ----------------------------------------------------------------------------
def first_seeds(text):
    """An argparse type: "3" → [0, 1, 2]."""
    return seed_list(f"0-{int(text) - 1}")


def terms_of_sum(text):
    """An argparse type: "3,8,21 - 5,9 + 40" → [("+", [3, 8, 21]), ("-", [5, 9]), ("+", [40])]."""
    if not re.fullmatch(r"[\d,-]+( [+-] [\d,-]+)*", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a sum of seeds: write '3,8 - 5,9 + 40', with spaces around + and -")
    words = ["+", *text.split()]
    return list(zip(words[::2], map(seed_list, words[1::2])))


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", type=file_path,
        help="a run's folder or a file in it (default: the newest run in runs/)")
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument("--seeds", type=seed_list, help="seeds of the pictures (default: 0-63)")
    seeds.add_argument("--n", type=first_seeds, dest="seeds",
        help="number of pictures: seeds 0 to N-1")
    add("--scale", type=int, choices=range(1, 17), metavar="1-16",
        help="enlarge the pictures by this factor (default: to 128 pixels in a grid, or else 1)")
    add("--out", type=file_path,
        help="a .png, .jpg or .webp file for a grid, a .html file for a page, or a folder with "
             "--separate and --real (default: samples, arithmetic or nearest .png, or real)")
    add("--device", choices=DEVICES, default="auto", help="where to compute (default: %(default)s)")

    group = parser.add_argument_group("instead of one grid or page")
    add = group.add_mutually_exclusive_group().add_argument
    add("--separate", action="store_true",
        help="write one PNG per seed to the folder --out (default: samples)")
    add("--real", type=file_path, metavar="PACK",
        help="write as many windows as there are seeds, as training sees them and from the whole "
             "training set of this pack, to the folder --out (default: real)")
    add("--score", type=file_path, metavar="PACK",
        help="compare generated images with the held-out images of this pack")
    add("--arithmetic", type=terms_of_sum, metavar="SUM",
        help="add and subtract the means of seeds: '3,8 - 5,9 + 2'")
    add("--nearest", type=file_path, metavar="PACK",
        help="draw each seed beside the most similar part of a training frame")
    args = parser.parse_args(argv)

    args.seeds = list(dict.fromkeys(args.seeds or range(64)))  # each once
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.real:
        save_real(args)
    else:
        G, latent = open_generator(args)
        z = latents(args.seeds, G.nz, latent)
        if args.separate:
            save_separately(G, z, args)
        elif args.score:
            print_score(G, latent, args)
        elif args.arithmetic:
            save_arithmetic(G, latent, args)
        elif args.nearest:
            save_nearest(G, z, args)
        elif args.out and args.out.suffix.lower() == ".html":
            save_page(G, z, args)
        else:
            save_grid(G, z, args)


if __name__ == "__main__":
    run_script(main, memory_advice="choose fewer pictures, or a smaller --scale")
