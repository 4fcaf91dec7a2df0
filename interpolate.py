"""Draw a loop through the latent space of a trained generator, as an animation or as a strip of pictures.

    python interpolate.py                                            # scene.gif: six latents of the newest run
    python interpolate.py --seeds 7,40,12,3 --frames 40 --scale 4    # from seed 7 to 40, 12, 3 and back to 7
    python interpolate.py --seeds 0-17 --grid 3x1 --out scenes.webp  # three scenes side by side, six seeds each
    python interpolate.py --seeds 0-4 --out walk.png                 # a strip, as in figure 4 of the DCGAN paper

Normal latents are joined by slerp (White 2016, https://arxiv.org/abs/1609.04468), uniform ones by straight lines.
"""
import argparse
import os
import re
from pathlib import Path

os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")  # choose_device loads Gaudi's plugin

import torch
from PIL import Image
from torchvision.utils import make_grid

from model import DEVICES, choose_device, latents, load_generator, render, run_script, seed_list


def slerp(a, b, t):
    """The point at t in [0, 1] on the arc from a to b, (nz,) each. Parallel a and b are joined by a line."""
    angle = torch.acos((a @ b / (a.norm() * b.norm())).clamp(-1, 1))
    if angle.sin() < 1e-4:
        return torch.lerp(a, b, t)
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


def loop(z, frames, latent):
    """From each latent of z (K, nz) to the next and back to the first, in steps of 1/frames: (K · frames, nz)."""
    between = slerp if latent == "normal" else torch.lerp
    return torch.stack([between(a, b, i / frames) for a, b in zip(z, z.roll(-1, 0)) for i in range(frames)])


def grid_size(text):
    """An argparse type: '3x1' → (3, 1), columns and rows."""
    if not re.fullmatch(r"[1-9]\d?x[1-9]\d?", text):
        raise argparse.ArgumentTypeError(f"{text} is not a grid: write columns and rows as 3x1")
    return tuple(int(number) for number in text.split("x"))


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", type=Path, help="a run's folder or a file in it (default: the newest run in runs/)")
    add("--seeds", type=seed_list, help="seeds to visit, divided among the scenes in order (default: six per scene)")
    add("--frames", type=int, help="frames from one latent to the next (default: 25, or 4 in a .png)")
    add("--fps", type=int, default=25, help="frames per second (default: %(default)s)")
    add("--grid", type=grid_size, default="1x1", help="columns and rows of scenes; .png: one per row (default: 1x1)")
    add("--scale", type=int, default=1, help="enlarge the pictures by this factor (default: %(default)s)")
    add("--out", type=Path, default="scene.gif", help=".gif, .webp, or .png for a strip (default: %(default)s)")
    add("--device", choices=DEVICES, default="auto", help="where to compute (default: %(default)s)")
    args = parser.parse_args(argv)

    scenes, kind = args.grid[0] * args.grid[1], args.out.suffix.lower()
    if args.seeds is None:
        args.seeds = range(6 * scenes)
    if args.frames is None:
        args.frames = 4 if kind == ".png" else 25
    if kind not in (".gif", ".webp", ".png"):
        parser.error(f"--out {args.out}: name a .gif or .webp file, or a .png file for a strip")
    if min(args.frames, args.scale, args.fps) < 1 or args.fps > 50:
        parser.error("--frames, --scale and --fps must be at least 1, and --fps at most 50, the limit of a GIF")
    if len(args.seeds) == 0 or len(args.seeds) % scenes:
        parser.error(f"{len(args.seeds)} seeds cannot be divided among {scenes} scenes: name a multiple of {scenes}")
    return args


def main():
    args = parse_args()
    device = choose_device(args.device)
    G, latent = load_generator(args.checkpoint)
    columns, scenes, strip = args.grid[0], args.grid[0] * args.grid[1], args.out.suffix.lower() == ".png"
    z = latents(args.seeds, G.nz, latent).unflatten(0, (scenes, -1))  # (scenes, K, nz)
    z = torch.cat([loop(scene, args.frames, latent) for scene in z])
    pictures = render(G.to(device), z, args.scale).unflatten(0, (scenes, -1))  # (scenes, frames, 3, H, W)
    if strip:
        sheets = [make_grid(pictures.flatten(0, 1), pictures.shape[1])]
    else:
        sheets = [make_grid(frame, columns, padding=2 if scenes > 1 else 0) for frame in pictures.unbind(1)]
    first, *others = [Image.fromarray(sheet.permute(1, 2, 0).numpy()) for sheet in sheets]
    starts = [round(100 * i / args.fps) for i in range(len(sheets) + 1)]  # a GIF counts in units of 10 ms
    durations = [10 * (end - start) for start, end in zip(starts, starts[1:])]
    replaced = " (replaced)" if args.out.exists() else ""
    args.out.parent.mkdir(parents=True, exist_ok=True)
    first.save(args.out, save_all=not strip, append_images=others, loop=0, duration=durations)
    print(f"{args.out}: {pictures.shape[1]} frames, {first.width}×{first.height} pixels{replaced}")


if __name__ == "__main__":
    run_script(main)
