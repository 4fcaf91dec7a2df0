"""Draw a loop through the latent space of a trained generator, as moving pictures or as a strip.

    python interpolate.py                               # scene.gif: six latents of the newest run
    python interpolate.py --seeds 7,40,12,3 --frames 40 # from seed 7 to 40, 12, 3 and back to 7
    python interpolate.py --seeds 0-17 --grid 3x1 --out scenes.webp    # three scenes side by side
    python interpolate.py --seeds 0-4 --out walk.png    # a strip, as in figure 4 of the paper
    python interpolate.py --out scene                   # scene/00000000.png, … for a video:
    ffmpeg -framerate 25 -i scene/%08d.png -pix_fmt yuv420p scene.mp4

Normal latents are joined by slerp (White 2016, https://arxiv.org/abs/1609.04468), uniform ones by
straight lines. The paper is that of DCGAN, https://arxiv.org/abs/1511.06434

SPDX-License-Identifier: MIT
Copyright (c) 2026 the authors of this repository
"""
import argparse
import math
import os
import re
from pathlib import Path

if __name__ == "__main__":  # torch reads these when it is imported
    # Gaudi's plugin is loaded by choose_device, after its own variables are set.
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    # Threads that wait soon sleep. Threads that spin lose their time to any other program.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
from PIL import Image

from model import (
    DEVICES,
    choose_device,
    join,
    latents,
    load_generator,
    render,
    run_script,
    save_picture,
    save_pngs,
    say,
    seed_list,
)


# ---- a walk through latent space -----------------------------------------------------------------
def slerp(a, b, t):
    """The point at t in [0, 1] on the arc from a to b, (nz,) each.

    Parallel a and b are joined by a line.
    """
    cosine = a @ b / (a.norm() * b.norm())
    angle = torch.acos(cosine.clamp(-1, 1))
    if angle.sin() < 1e-4:
        return torch.lerp(a, b, t)

    from_a = torch.sin((1 - t) * angle) * a
    from_b = torch.sin(t * angle) * b
    return (from_a + from_b) / torch.sin(angle)


def loop(z, frames, latent):
    """From each latent of z (K, nz) to the next, and from the last to the first: (K · frames, nz).

    Each way has `frames` steps.
    """
    between = slerp if latent == "normal" else torch.lerp
    walk = []
    for a, b in zip(z, z.roll(-1, 0)):
        for i in range(frames):
            walk.append(between(a, b, i / frames))
    return torch.stack(walk)


# ---- files ---------------------------------------------------------------------------------------
def frame_lengths(frames, fps):
    """The time that each frame is shown, in ms. A GIF counts in units of 10 ms."""
    starts = [10 * round(100 * i / fps) for i in range(frames + 1)]
    return [end - start for start, end in zip(starts, starts[1:])]


def save(images, args):
    """Write images as args say. Returns words about the files that were there before."""
    if args.kind == "":
        return ", " + save_pngs([dict(enumerate(images))], args.out)
    if args.kind == ".png":
        return save_picture(images[0], args.out)

    if args.kind == ".gif":
        images = reduce_colours(images)
    first, *others = images
    durations = frame_lengths(len(images), args.fps)
    return save_picture(first, args.out, save_all=True, append_images=others, loop=0,
                        duration=durations)


def reduce_colours(images):
    """Images with the 256 colours that suit all of them best.

    One palette for each frame would take 20 times as long.
    """
    step = math.ceil(len(images) / 16)
    some = [image.reduce(2) for image in images[::step]]
    width, height = some[0].size
    together = Image.new("RGB", (width, height * len(some)))
    for i, image in enumerate(some):
        together.paste(image, (0, height * i))
    palette = together.quantize(256)
    return [image.quantize(palette=palette) for image in images]


# ---- the command line ----------------------------------------------------------------------------
ANIMATIONS = (".gif", ".webp")
VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi")


def grid_size(text):
    """An argparse type: '3x1' → (3, 1), columns and rows."""
    if not re.fullmatch(r"[1-9]\d?x[1-9]\d?", text):
        raise argparse.ArgumentTypeError(f"{text} is not a grid: write columns and rows as 3x1")
    columns, rows = text.split("x")
    return int(columns), int(rows)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", type=Path,
        help="a run's folder or a file in it (default: the newest run in runs/)")
    add("--seeds", type=seed_list,
        help="seeds to visit, divided among the scenes in order (default: six per scene)")
    add("--frames", type=int,
        help="frames from one latent to the next (default: 25, or 4 in a .png)")
    add("--fps", type=int, default=25, help="frames per second (default: %(default)s)")
    add("--grid", type=grid_size, default="1x1",
        help="columns and rows of scenes; in a .png each scene is one row (default: %(default)s)")
    add("--scale", type=int,
        help="enlarge the pictures by this factor (default: one scene to 256 pixels, and the "
             "pictures of a grid or a strip to 128)")
    add("--out", type=Path, default="scene.gif",
        help=".gif or .webp, .png for a strip, or a folder for numbered pictures "
             "(default: %(default)s)")
    add("--device", choices=DEVICES, default="auto", help="where to compute (default: %(default)s)")
    args = parser.parse_args(argv)

    args.kind = check_out(parser, args.out)
    columns, rows = args.grid
    scenes = columns * rows
    if args.seeds is None:
        args.seeds = range(6 * scenes)
    if len(args.seeds) % scenes:
        parser.error(f"{len(args.seeds)} seeds cannot be divided among {scenes} scenes: "
                     f"name a multiple of {scenes}")

    if args.frames is None:
        args.frames = 4 if args.kind == ".png" else 25
    if args.frames < 1:
        parser.error(f"--frames {args.frames}: it must be at least 1")
    if not 1 <= args.fps <= 50:
        parser.error(f"--fps {args.fps}: choose from 1 to 50, the limit of a GIF")
    if args.scale is not None and not 1 <= args.scale <= 16:
        parser.error(f"--scale {args.scale}: choose from 1 to 16")
    return args


def check_out(parser, out):
    """What to write: the suffix of a file, or "" for a folder. Ends the script if it is neither."""
    if not out.name:  # "" or "."
        parser.error(f"--out {out}: name a file or a folder")
    suffix = out.suffix.lower()
    if suffix in VIDEOS:
        folder = out.with_suffix("")
        parser.error(f"--out {out}: name a folder, as in --out {folder}, and make a video of its "
                     f"pictures: ffmpeg -framerate 25 -i {folder}/%08d.png -pix_fmt yuv420p {out}")
    if out.is_dir():
        return ""
    if suffix not in (*ANIMATIONS, ".png", ""):
        parser.error(f"--out {out}: name a .gif or .webp file, a .png file for a strip, "
                     "or a folder for numbered pictures")
    return suffix


def main(argv=None):
    args = parse_args(argv)
    device = choose_device(args.device)
    G, latent = load_generator(args.checkpoint)
    G.to(device)

    columns, rows = args.grid
    scenes = columns * rows
    z = latents(args.seeds, G.nz, latent).unflatten(0, (scenes, -1))  # (scenes, K, nz)
    walks = torch.cat([loop(scene, args.frames, latent) for scene in z])

    strip = args.kind == ".png"
    wanted = 256 if scenes == 1 and not strip else 128  # pixels
    scale = args.scale or max(1, wanted // G.image_size)
    pictures = render(G, walks, scale).unflatten(0, (scenes, -1))  # (scenes, frames, 3, H, W)
    frames = pictures.shape[1]

    if strip:
        images = [join(pictures.flatten(0, 1), columns=frames)]
    else:
        padding = 2 if scenes > 1 else 0
        images = [join(moment, columns, padding) for moment in pictures.unbind(1)]
    note = save(images, args)
    say(f"{args.out}: {frames} frames, {images[0].width}×{images[0].height} pixels{note}")


if __name__ == "__main__":
    run_script(main, memory_advice="choose fewer --frames, fewer seeds, or a smaller --scale")
