"""Move through a trained generator's latent space, round and round.

    python interpolate.py                                            # scene.gif: six latents of the newest run
    python interpolate.py --seeds 7,40,12,3 --frames 40 --scale 4    # from seed 7 to 40, 12, 3 and back to 7
    python interpolate.py --seeds 0-17 --grid 3x1 --out scenes.webp  # three scenes side by side, six seeds each
    python interpolate.py --seeds 0-4 --out walk.png                 # a strip, as in Radford's figure 4

Normal latents are joined by slerp (White 2016, https://arxiv.org/abs/1609.04468), uniform ones by straight lines.
"""
import argparse
import io
import re
from pathlib import Path

from model import (DEVICES, InputError, Parser, choose_device, latents, load_generator, number, render, run, seed_list,
                   write_file)  # before torch, which would load Gaudi's plugin by itself

import torch
from PIL import Image
from torchvision.utils import make_grid


def slerp(a, b, t):
    """The point at t in [0, 1] of the arc from a to b, (nz,) each; of the line where they (almost) point the same way."""
    angle = torch.acos((a @ b / (a.norm() * b.norm())).clamp(-1, 1))
    if angle.sin() < 1e-4:
        return torch.lerp(a, b, t)
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


def loop(z, frames, latent):
    """Through the latents z (K, nz) and back to the first, `frames` steps a leg: (K · frames, nz), no frame twice."""
    between = slerp if latent == "normal" else torch.lerp
    return torch.stack([between(a, b, i / frames) for a, b in zip(z, z.roll(-1, 0)) for i in range(frames)])


def grid_size(text):
    """An argparse type: '3x1' → (3, 1), columns and rows."""
    if not re.fullmatch(r"[1-9]\d?x[1-9]\d?", text):
        raise argparse.ArgumentTypeError(f"{text} is no grid: give columns and rows as 3x1")
    return tuple(map(int, text.split("x")))


def parse_args(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", type=Path, help="a run's folder or a file with a generator (default: the newest run in runs/)")
    add("--seeds", type=seed_list, help="latents to pass through, as 0-5,100, dealt out to the scenes (default: six a scene)")
    add("--frames", type=number(int, 1, 1000), help="from one latent to the next (default: 25, and 4 in a .png)")
    add("--fps", type=number(int, 1, 50), default=25, help="frames a second (default: 25)")
    add("--grid", type=grid_size, default=(1, 1), help="columns and rows of scenes (default: 1x1); in a .png each is a row")
    add("--scale", type=number(int, 1, 8), default=1, help="enlarge so many times (default: 1)")
    add("--out", type=Path, default=Path("scene.gif"), help="a .gif, .webp, or .png for a strip (default: scene.gif)")
    add("--device", choices=DEVICES, default="auto")
    args = parser.parse_args(argv)
    scenes = args.grid[0] * args.grid[1]
    args.seeds = args.seeds or range(6 * scenes)
    args.frames = args.frames or (4 if args.out.suffix == ".png" else 25)
    if args.out.suffix not in (".gif", ".webp", ".png"):
        raise InputError(f"--out {args.out}: the name ends in .gif, .webp, or .png for a strip")
    if len(args.seeds) % scenes:
        raise InputError(f"{len(args.seeds)} seeds can't be dealt out to {scenes} scenes: give a multiple of {scenes}")
    return args


def main():
    args = parse_args()
    device = choose_device(args.device)
    G, latent = load_generator(args.checkpoint)
    columns, rows = args.grid
    z = latents(args.seeds, G.nz, latent).view(columns * rows, -1, G.nz)  # (scenes, K, nz)
    z = torch.cat([loop(scene, args.frames, latent) for scene in z])
    pictures = render(G.to(device), z, args.scale).unflatten(0, (columns * rows, -1))  # (scenes, frames, 3, H, W)
    if args.out.suffix == ".png":
        frames = [make_grid(pictures.flatten(0, 1), pictures.shape[1])]
    else:
        frames = [make_grid(scenes, columns, padding=2 if columns * rows > 1 else 0) for scenes in pictures.unbind(1)]
    first, *others = (Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in frames)
    ticks = [round(100 * i / args.fps) for i in range(len(frames) + 1)]  # a GIF counts hundredths of a second
    durations = [10 * (b - a) for a, b in zip(ticks, ticks[1:])]
    moving = dict(save_all=True, append_images=others, loop=0, duration=durations) if others else {}
    first.save(data := io.BytesIO(), args.out.suffix[1:], **moving)
    replaced = " (replaced)" if args.out.exists() else ""
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_file(args.out, data.getbuffer())
    print(f"{args.out}: {len(frames)} frames of {first.width}×{first.height}{replaced}")


if __name__ == "__main__":
    run(main)
