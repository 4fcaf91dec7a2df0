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
import os

if __name__ == "__main__":  # torch reads these when it is imported
    # Gaudi's plugin is loaded by choose_device, after its own variables are set.
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    # Waiting threads sleep. Threads that spin lose their time to any other program.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
from PIL import Image

from model import (
    DEVICES,
    file_path,
    join,
    latents,
    open_generator,
    render,
    run_script,
    save_image,
    say,
    seed_list,
)


# ---- a walk through latent space -----------------------------------------------------------------
def slerp(a, b, t):
    """The point at t in [0, 1] on the arc from a to b, (nz,) each.

    Parallel a and b are joined by a line.
    """
    cosine = torch.cosine_similarity(a, b, dim=0)
    angle = torch.acos(cosine.clamp(-1, 1))
    if angle.sin() < 1e-4:
        return torch.lerp(a, b, t)

    from_a = ((1 - t) * angle).sin() * a
    from_b = (t * angle).sin() * b
    return (from_a + from_b) / angle.sin()


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


# ---- the command line ----------------------------------------------------------------------------
def grid_size(text):
    """An argparse type: '3x1' → (3, 1), columns and rows."""
    columns, rows = text.split("x")
    return int(columns), int(rows)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", type=file_path,
        help="a run's folder or a file in it (default: the newest run in runs/)")
    add("--seeds", type=seed_list,
        help="seeds to visit, divided among the scenes in order (default: six per scene)")
    add("--frames", type=int,
        help="frames from one latent to the next (default: 25, or 4 in a .png)")
    add("--fps", type=int, default=25,
        help="frames per second; a .gif has 50, 33, 25, 20, … (default: %(default)s)")
    add("--grid", type=grid_size, default="1x1", metavar="COLUMNSxROWS",
        help="scenes side by side; in a .png each scene is one row (default: %(default)s)")
    add("--scale", type=int, choices=range(1, 17), metavar="1-16",
        help="enlarge the pictures by this factor (default: one scene to 256 pixels, and the "
             "pictures of a grid or a strip to 128)")
    add("--out", type=file_path, default="scene.gif",
        help=".gif or .webp, .png for a strip, or a folder for numbered pictures "
             "(default: %(default)s)")
    add("--device", choices=DEVICES, default="auto", help="where to compute (default: %(default)s)")
    args = parser.parse_args(argv)

    args.kind = args.out.suffix.lower()
    if args.frames is None:
        args.frames = 4 if args.kind == ".png" else 25
    columns, rows = args.grid
    if min(columns, rows, args.frames, args.fps) < 1:
        parser.error("--grid, --frames and --fps start at 1")
    if args.kind == ".gif" and args.fps > 50:
        parser.error(f"--fps {args.fps}: a GIF has at most 50. Name a .webp file or a folder")

    args.scenes = columns * rows
    args.seeds = args.seeds or range(6 * args.scenes)
    if len(args.seeds) % args.scenes:
        parser.error(f"{len(args.seeds)} seeds cannot be divided among {args.scenes} scenes")
    return args


def main(argv=None):
    args = parse_args(argv)
    G, latent = open_generator(args)
    scenes = latents(args.seeds, G.nz, latent).chunk(args.scenes)  # (K, nz) each
    walks = torch.cat([loop(z, args.frames, latent) for z in scenes])

    strip = args.kind == ".png"
    side = 256 if args.scenes == 1 and not strip else 128  # pixels
    scale = args.scale or max(1, side // G.image_size)
    pictures = render(G, walks, scale).unflatten(0, (args.scenes, -1))  # (scenes, frames, 3, H, W)
    frames = pictures.shape[1]

    if strip:
        images = [join(pictures.flatten(0, 1), frames)]
    else:
        padding = 2 if args.scenes > 1 else 0
        images = [join(moment, args.grid[0], padding) for moment in pictures.unbind(1)]
    save(images, args)
    say(f"{args.out}: {frames} frames, {images[0].width}×{images[0].height} pixels")


def save(images, args):
    """Write images as numbered files, as moving pictures, or a single one as it is."""
    if args.kind == ".gif":  # PIL's own choice of 256 colours would take 20 times as long
        images = [
            image.quantize(palette=image.quantize(method=Image.Quantize.FASTOCTREE))
            for image in images
        ]
    first, *others = images
    if args.kind == "":
        for i, image in enumerate(images):
            save_image(image, args.out / f"{i:08d}.png")
    elif others:
        save_image(first, args.out, save_all=True, append_images=others, loop=0,
                   duration=1000 // args.fps)
    else:
        save_image(first, args.out)


if __name__ == "__main__":
    run_script(main, memory_advice="choose fewer --frames, fewer seeds, or a smaller --scale")
