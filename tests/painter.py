"""The painter, a generator whose pictures are known without the scripts, and its pictures in images, grids and files.

The first six numbers of a latent are the colours of the picture's left and right half.
"""
import numpy as np
import torch
import torch.nn as nn
from PIL import Image

import model


def make_painter():
    """Its layers enlarge 4×4 pixels without mixing them. Pairs of maps hold a colour's two signs."""
    G = model.Generator(image_size=32, nz=8, ngf=8)
    first, *middle, last = [layer.weight.data.zero_() for layer in G.main if isinstance(layer, nn.ConvTranspose2d)]
    for i in range(3):
        for z, half in ((i, slice(0, 2)), (3 + i, slice(2, 4))):
            first[z, 2 * i, :, half] = 1
            first[z, 2 * i + 1, :, half] = -1
        last[2 * i, i, 1:3, 1:3] = 0.5
        last[2 * i + 1, i, 1:3, 1:3] = -0.5
    for weight in middle:
        weight[range(6), range(6), 1:3, 1:3] = 1
    return G


def latent_of(seed, latent="normal"):
    draw, low, width = {"normal": (torch.randn, 0, 1), "uniform": (torch.rand, -1, 2)}[latent]
    return low + width * draw(8, generator=torch.Generator().manual_seed(seed)).double().numpy()


def colours_of(z):
    """The grey levels that the painter's picture of a latent has: left R, G, B, right R, G, B."""
    return 127.5 * (np.tanh(z[:6] / 2) + 1)


def colours_in(picture):
    """The six grey levels in a picture of any size: an image of PIL's, or an array (H, W, 3)."""
    pixels = np.asarray(picture.convert("RGB") if isinstance(picture, Image.Image) else picture, float)
    height, width, _ = pixels.shape
    halves = (pixels[height // 4:-height // 4, width * i // 8:width * (i + 2) // 8] for i in (1, 5))
    return np.concatenate([half.mean((0, 1)) for half in halves])


def shows(picture, z, within=1.):
    return np.abs(colours_in(picture) - colours_of(z)).max() <= within


def picture_of(z, side=32):
    return colours_of(z).round().astype(np.uint8).reshape(1, 2, 3).repeat(side // 2, 1).repeat(side, 0)


def tiles(path, side, width=None):
    """The pictures of a grid with black lines of two pixels: array (rows, columns, side, width, 3)."""
    sheet, width = np.asarray(Image.open(path).convert("RGB")), width or side
    assert (sheet.shape[0] - 2) % (side + 2) == (sheet.shape[1] - 2) % (width + 2) == 0
    rows = [sheet[y:y + side] for y in range(2, len(sheet) - 2, side + 2)]
    return np.array([[row[:, x:x + width] for x in range(2, sheet.shape[1] - 2, width + 2)] for row in rows])


def save_painter(folder, latent="normal"):
    """A run's folder with the painter, and a discriminator that sees green alone."""
    torch.manual_seed(0)
    D = model.Discriminator(32, 4).apply(model.init_weights)
    D.main[0].weight.data[:, [0, 2]] = 0
    weights = make_painter().state_dict()
    sizes = dict(image_size=32, kernel_size=4, nz=8, ngf=8, ndf=4, latent=latent)
    folder.mkdir(parents=True)
    torch.save({"G": weights, "G_ema": weights, "D": D.state_dict(), "sizes": sizes}, folder / "checkpoint.pt")
    return folder
