"""The networks, and all that the scripts share.

It needs torch and NumPy, and PIL for picture files.

To draw pictures in your own project, copy this file and write

    from model import latents, load_generator
    G, latent = load_generator("runs/photos-64")     # or netG_epoch_24.pth from pytorch/examples
    images = G(latents(range(16), G.nz, latent))     # (16, 3, 64, 64) in [-1, 1]

The architecture is DCGAN (section 3 of Radford, Metz, Chintala 2015,
https://arxiv.org/abs/1511.06434).

SPDX-License-Identifier: MIT
Copyright (c) 2026 the authors of this repository
"""
import io
import math
import os
import re
import signal
import sys
import threading
import time
import zipfile
from argparse import ArgumentTypeError
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from inspect import signature
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F


# ---- the networks --------------------------------------------------------------------------------
class Generator(nn.Module):
    """Images from latents: z (N, nz) or (N, nz, 1, 1) → (N, nc, image_size, image_size) in [-1, 1].

    kernel_size 4 gives the networks and state-dict keys of pytorch/examples, 5 gives the paper's.
    """

    def __init__(self, image_size=64, nz=100, ngf=64, nc=3, kernel_size=4):
        super().__init__()
        check_image_size(image_size)
        self.image_size = image_size
        self.nz = nz
        double = dict(
            kernel_size=kernel_size,
            stride=2,
            padding=(kernel_size - 1) // 2,
            output_padding=kernel_size % 2,
            bias=False,
        )
        width = ngf * image_size // 8  # feature maps at 4×4 pixels: 8·ngf for images of 64 pixels

        layers = [  # (nz) x 1 x 1 → (width) x 4 x 4
            nn.ConvTranspose2d(nz, width, 4, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        while width > ngf:
            layers += [  # for 64 pixels: → (4·ngf) x 8 x 8 → (2·ngf) x 16 x 16 → (ngf) x 32 x 32
                nn.ConvTranspose2d(width, width // 2, **double),
                nn.BatchNorm2d(width // 2),
                nn.ReLU(),
            ]
            width //= 2
        layers += [  # → (nc) x 64 x 64
            nn.ConvTranspose2d(ngf, nc, **double),
            nn.Tanh(),
        ]
        self.main = nn.Sequential(*layers)

    def forward(self, z):
        return self.main(z.flatten(1)[..., None, None])


class Discriminator(nn.Module):
    """Logits from images: x (N, nc, image_size, image_size) in [-1, 1] → (N,).

    D(x), the probability that x is real, is their sigmoid. The network is the generator's mirror
    image. Its first layer has no batch norm.
    """

    def __init__(self, image_size=64, ndf=64, nc=3, kernel_size=4):
        super().__init__()
        check_image_size(image_size)
        self.image_size = image_size
        halve = dict(
            kernel_size=kernel_size,
            stride=2,
            padding=(kernel_size - 1) // 2,
            bias=False,
        )
        width = ndf

        layers = [  # for 64 pixels: (nc) x 64 x 64 → (ndf) x 32 x 32
            nn.Conv2d(nc, width, **halve),
            nn.LeakyReLU(0.2),
        ]
        while width < ndf * image_size // 8:
            layers += [  # → (2·ndf) x 16 x 16 → (4·ndf) x 8 x 8 → (8·ndf) x 4 x 4
                nn.Conv2d(width, 2 * width, **halve),
                nn.BatchNorm2d(2 * width),
                nn.LeakyReLU(0.2),
            ]
            width *= 2
        layers += [  # → 1 x 1 x 1
            nn.Conv2d(width, 1, 4, bias=False),
        ]
        self.main = nn.Sequential(*layers)

    def forward(self, x):
        return self.main(x).flatten()


def check_image_size(image_size):
    if image_size not in IMAGE_SIZES:
        raise InputError(f"image size {image_size} is not supported: choose one of {IMAGE_SIZES}")


def init_weights(module):
    """For `net.apply`: weights N(0, 0.02), batch-norm gains N(1, 0.02), their biases 0.

    From the paper (section 4) and its authors' code.
    """
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


# ---- presets -------------------------------------------------------------------------------------
IMAGE_SIZES = (32, 64, 128, 256)

NAIVE = dict(
    image_size=64,
    kernel_size=4,
    nz=100,  # size of a latent
    ngf=64,  # feature maps of G's last hidden layer
    ndf=64,  # feature maps of D's first layer
    latent="normal",  # or "uniform" on [-1, 1]
    batch_size=128,  # of a process
    lr=2e-4,  # of Adam, for G and D
    beta1=0.5,
    weight_decay=0.0,
    instance_noise=0.0,  # standard deviation of Gaussian noise on D's input
    augment=False,  # shift D's input: train.translate
    mirror=False,  # flip half of the real images left to right
)
SMALL = dict(NAIVE, batch_size=16, augment=True, mirror=True)
PRESETS = {
    # the sizes of pytorch/examples
    "naive-64": NAIVE,
    # the paper's networks
    "radford-64": dict(NAIVE, kernel_size=5, ngf=128, ndf=128, latent="uniform"),
    # the strong G against a weak D of the write-up that README names
    "clamp-64": dict(NAIVE, nz=256, ngf=256, batch_size=256),
    # its 128 pixels
    "safe-128": dict(NAIVE, image_size=128, nz=128, ngf=128, ndf=32, batch_size=256,
                     weight_decay=0.05, instance_noise=0.05),
    # hundreds to some thousands of photographs
    "small-64": dict(SMALL, ngf=32, ndf=32),
    "small-128": dict(SMALL, image_size=128, ngf=16, ndf=16),
    # drawn streets in five minutes on a CPU
    "demo-64": dict(SMALL, ngf=24, ndf=16, lr=4e-4),
}
# The options that a checkpoint's weights fit, and that are saved with them. rebuild() passes them
# to the networks whose arguments have these names.
SIZES = ("image_size", "kernel_size", "nz", "ngf", "ndf", "latent")


class InputError(ValueError):
    """A mistake that the user can correct. The scripts print one line and exit with status 2."""


# ---- latents and pictures ------------------------------------------------------------------------
def latents(seeds, nz, latent="normal"):
    """float32 (len(seeds), nz) on the CPU: N(0, 1), or uniform on [-1, 1].

    A row depends on its own seed alone.
    """
    z = torch.empty(len(seeds), nz)
    for row, seed in zip(z, seeds):
        generator = torch.Generator().manual_seed(seed)
        if latent == "normal":
            row.normal_(generator=generator)
        else:
            row.uniform_(-1, 1, generator=generator)
    return z


def cut_windows(frames, image_size, mirror=False, generator=None):
    """A random window of each frame: uint8 (N, H, W, 3) → float32 (N, 3, S, S) in [-1, 1].

    A window is a square of side s, uniform from S to H, at a random position, resized to S×S
    (bilinear): cropping, down-scaling and translation in one batched operation on the frames'
    device. W ≥ H ≥ S. `mirror` flips half of the windows left to right.
    """
    N, H, W, _ = frames.shape
    size, top, left, flip = torch.rand(4, N, 1, device=frames.device, generator=generator)
    side = image_size + size * (H - image_size)  # (N, 1), in pixels of the frame

    # Sampling positions across the window (0 to 1), then across the frame (-1 to 1): (N, S) each.
    ticks = (torch.arange(image_size, device=frames.device) + 0.5) / image_size
    across = torch.where(flip < 0.5, 1 - ticks, ticks) if mirror else ticks
    y = (top * (H - side) + ticks * side) * (2 / H) - 1
    x = (left * (W - side) + across * side) * (2 / W) - 1
    grid = torch.stack([
        x[:, None, :].expand(-1, image_size, -1),
        y[:, :, None].expand(-1, -1, image_size),
    ], dim=3)

    images = frames.float().permute(0, 3, 1, 2)  # float first: Gaudi has no permute of uint8
    return F.grid_sample(images, grid, align_corners=False) / 127.5 - 1


def spread_windows(frames, n, image_size):
    """n windows, always the same, evenly spread over frames (N, H, W, 3), a NumPy array.

    Yields batches of (≤ 256, 3, S, S) in [-1, 1].
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.arange(n) * len(frames) // n
    for part in rows.split(256):
        yield cut_windows(torch.from_numpy(frames[part.numpy()]), image_size, generator=generator)


@torch.no_grad()
def render(G, z, scale=1, batch_size=64):
    """Pictures of latents z (N, nz): uint8 (N, 3, S·scale, S·scale) on the CPU.

    G is in eval mode, and its device computes them. All batches have one size (zeros fill the last
    one): a picture depends on its latent alone, and Gaudi compiles once. For one picture,
    batch_size=1 is faster. `scale` enlarges the pictures (bicubic).
    """
    if G.training:
        raise ValueError("render needs G.eval(): in training a picture depends on its batch")
    weight = next(G.parameters())
    pictures = []
    for part in z.flatten(1).split(batch_size):
        padding = part.new_zeros(batch_size - len(part), G.nz)
        images = G(torch.cat([part, padding]).to(weight)).float()  # to its device and its dtype
        if scale > 1:
            images = F.interpolate(images, scale_factor=scale, mode="bicubic")
        pictures.append(to_grey_levels(images)[:len(part)])
    return torch.cat(pictures).expand(-1, 3, -1, -1)  # a generator of grey pictures has one channel


def to_grey_levels(images):
    """Numbers in [-1, 1] → uint8 from 0 to 255 on the CPU."""
    grey_levels = ((images + 1) * 127.5).round().clamp(0, 255)
    return grey_levels.cpu().to(torch.uint8)  # on Gaudi, this conversion is not documented


# ---- the score -----------------------------------------------------------------------------------
class Score:
    """How close generated pictures are to held-out images: Score(…)(G, latent) → (score, coverage).

    score: sliced Wasserstein distance of patches × 1000, the geometric mean over the scales of a
    pyramid (Karras et al. 2018, https://arxiv.org/abs/1710.10196, section 5). Smaller is better.
    Patches are whitened: a pattern in which images hardly vary, such as a checkerboard, counts as
    much as their light and colours. So it sees grain and blur. It hardly sees repetition.
    coverage: share of held-out images that have a generated image nearer than their fifth held-out
    neighbour, in the features of an untrained network (Naeem et al. 2020,
    https://arxiv.org/abs/2002.09797). Larger is better. It falls where G repeats itself.

    `train` and `holdout` are uint8 arrays (N, H, W, 3) of frames, W ≥ H ≥ image_size. G is a module
    with weights in eval mode, with the attribute `nz`: latents (N, nz) → images
    (N, 3, image_size, image_size) in [-1, 1]. `real` holds both figures for training images. Raises
    InputError with fewer than 50 frames of either kind. The global random numbers stay as they are.
    """

    def __init__(self, train, holdout, image_size):
        # Small packs have several windows of a frame, each in another group.
        self.group_size = min(len(train), len(holdout), 2048)
        if self.group_size < 50:
            raise InputError("a score needs 50 training frames and 50 held-out "
                             f"frames: there are {len(train)} and {len(holdout)}")
        self.images = self.group_size * math.ceil(1000 / self.group_size)
        self.network = untrained_network(image_size)

        held_out = spread_windows(holdout, self.images, image_size)
        patches, self.features = self.describe(held_out)
        self.directions = [whitened_directions(scale) for scale in patches]
        self.projections = list(map(sorted_projections, self.directions, patches))
        distances = torch.cdist(self.features, self.features)
        self.radius = distances.kthvalue(6, dim=2).values  # the first neighbour is the image itself
        self.real = self.compare(*self.describe(spread_windows(train, self.images, image_size)))

    def __call__(self, G, latent="normal"):
        z = latents(range(self.images), G.nz, latent)
        pictures = (render(G, part) / 127.5 - 1 for part in z.split(256))
        return self.compare(*self.describe(pictures))

    def describe(self, batches):
        """Batches of images → (patches (M, 147) of each scale, features (k, group, d)).

        Image i is in group i modulo k: a frame is never its own neighbour.
        """
        generator = torch.Generator().manual_seed(0)
        described = []
        patches = []  # for each batch, a list with the patches of each scale
        for images in batches:
            images = to_grey_levels(images) / 127.5 - 1  # pictures are rounded, so windows are too
            described.append(features(self.network, images))
            patches.append([random_patches(level, generator) for level in pyramid(images)])

        groups = torch.cat(described).unflatten(0, (self.group_size, -1)).transpose(0, 1)
        return [torch.cat(parts) for parts in zip(*patches)], groups

    def compare(self, patches, groups):
        """(score, coverage) of what describe() returned."""
        projections = map(sorted_projections, self.directions, patches)
        gaps = [
            (a - b).abs().mean()
            for a, b in zip(self.projections, projections)
        ]
        score = 1000 * torch.stack(gaps).log().mean().exp()
        nearest = torch.cdist(self.features, groups).amin(dim=2)
        covered = (nearest <= self.radius).float()
        return score.item(), covered.mean().item()


def pyramid(images):
    """Laplacian pyramid of images (N, 3, S, S).

    Returns a list: the detail that each halving loses, and at last the image at 16 pixels.
    """
    levels = []
    while images.shape[-1] > 16:
        smaller = F.avg_pool2d(images, 2)
        levels.append(images - F.interpolate(smaller, scale_factor=2, mode="bilinear"))
        images = smaller
    return [*levels, images]


def random_patches(images, generator):
    """64 patches of 7×7 pixels of each image: (N, 3, S, S) → (64 N, 147)."""
    N, _, S, _ = images.shape
    top, left = torch.randint(S - 6, (2, N, 64), generator=generator)
    patches = images.unfold(2, 7, 1).unfold(3, 7, 1)  # (N, 3, S-6, S-6, 7, 7), a view
    return patches[torch.arange(N)[:, None], :, top, left].reshape(-1, 147)


def whitened_directions(patches):
    """128 random directions of the whitened space: along each, patches (M, 147) have variance 1.

    Principal components with less than a ten-thousandth of the largest variance are not raised
    further: they are rounding.
    """
    variances, components = torch.linalg.eigh(torch.cov(patches.T).double())
    # The second term is for images of one colour.
    variances = variances.clamp(min=1e-4 * variances[-1]) + 1e-12
    generator = torch.Generator().manual_seed(0)
    directions = F.normalize(torch.randn(128, 147, generator=generator)).double()
    return (directions @ components / variances.sqrt() @ components.T).float()


def sorted_projections(directions, patches):
    """Patches (M, 147) along each of the directions (128, 147): (128, M). Each row is sorted."""
    projected = directions @ patches.T

    # NumPy sorts in place. torch.sort also makes indices, and takes ten times as long.
    with ThreadPoolExecutor() as threads:
        for row in projected.numpy():
            threads.submit(row.sort)
    return projected


def untrained_network(image_size):
    """The layers of an untrained discriminator with 16 feature maps, for the coverage.

    Its batch norm changes nothing, as it has seen no images.
    It is apart from Discriminator: scores stay comparable when the trained networks change.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # on the CPU alone
        width = 16
        layers = [nn.Conv2d(3, width, 4, 2, 1, bias=False), nn.LeakyReLU(0.2)]
        while width < 2 * image_size:
            layers += [
                nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False),
                nn.BatchNorm2d(2 * width),
                nn.LeakyReLU(0.2),
            ]
            width *= 2
        layers += [nn.Conv2d(width, 1, 4, bias=False)]
        network = nn.Sequential(*layers).apply(init_weights)
    return network.eval().requires_grad_(False)


def features(layers, x):
    """What all convolutions but the first one read, max-pooled to 4×4 pixels (DCGAN, section 5).

    layers: what untrained_network returns. x: (N, 3, S, S) → (N, 16 · channels).
    """
    pooled = []
    for i, layer in enumerate(layers):
        if isinstance(layer, nn.Conv2d) and i > 0:
            pooled.append(F.max_pool2d(x, x.shape[-1] // 4).flatten(1))
        x = layer(x)
    return torch.cat(pooled, 1)


# ---- devices -------------------------------------------------------------------------------------
DEVICES = ("auto", "cuda", "hpu", "mps", "cpu")


def choose_device(name="auto", local_rank=None):
    """One of DEVICES → torch.device. Computes something on it, so that a broken device fails here.

    auto takes a GPU, then a Gaudi card, then the CPU. If one cannot be used, it prints a warning
    and takes the next. One of several processes, with its local_rank, does not: all need the same
    kind of device. Raises InputError with the library's own words.
    """
    kinds = [name]
    if name == "auto":
        installed = {"cuda": torch.cuda.is_available(), "hpu": find_spec("habana_frameworks")}
        kinds = [kind for kind in installed if installed[kind]] + ["cpu"]

    for kind in kinds:
        try:
            use_once(kind, local_rank or 0)
            return torch.device(kind)
        except Exception as error:  # each library raises kinds of its own
            problem = f"{kind} cannot be used: {one_line(error)}. On a CPU use --device cpu"
            if kind == "hpu":  # the plugin for stock torch has eager mode alone
                problem += ". Where lazy mode is refused, use --compile or PT_HPU_LAZY_MODE=0"
            if kind == name or local_rank is not None:
                raise InputError(problem) from error
            warn(problem)


def use_once(kind, local_rank):
    """Calculate on a GPU, or acquire a Gaudi card. Raises what the library raises.

    The plugin gives a process the card of its LOCAL_RANK.
    """
    if kind == "hpu":
        os.environ.setdefault("PT_HPU_LAZY_MODE", "1")
        import habana_frameworks.torch.core  # noqa: F401  makes torch know the device hpu

        if not torch.hpu.is_available() or not torch.hpu.get_device_name():  # acquires a card
            raise RuntimeError("torch.hpu finds no Gaudi card")
    elif kind == "cpu":
        limit_threads()
    else:
        if kind == "cuda":
            torch.cuda.set_device(local_rank)
        torch.ones(2, device=kind).sum().item()


def limit_threads():
    """Take no more threads than a container's CPU quota. torch starts one for each core."""
    with suppress(OSError, ValueError):  # there is no such file, or it says "max 100000"
        allowed, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        quota = math.ceil(int(allowed) / int(period))
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(min(quota, torch.get_num_threads()))


# ---- checkpoints ---------------------------------------------------------------------------------
def find_checkpoint(path=None):
    """A file's path itself. A run's folder gives best.pt, or else checkpoint.pt.

    None is the newest run in runs/. Raises InputError.
    """
    saved = sorted(Path("runs").glob("*/checkpoint.pt"), key=os.path.getmtime)
    if path is None and saved:
        path = saved[-1].parent
    if path is not None:
        path = Path(path).expanduser()
        for file in (path, path / "best.pt", path / "checkpoint.pt"):
            if file.is_file():
                return file
    runs = ", ".join(str(file.parent) for file in saved) or "none: train first (python train.py)"
    raise InputError(f"there is no checkpoint {path or ''}. The runs are {runs}")


def load_file(path):
    """The dictionary in a checkpoint, its tensors on the CPU. It never runs code from the file.

    Raises InputError.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch does not compare the checksums
        if damaged:
            raise ValueError(f"the checksum of {damaged} is wrong")
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # a cut or foreign file makes pickle, zip and torch raise many kinds
        raise InputError(f"{path} is damaged or not a checkpoint: {one_line(error)}") from error


def sizes_of(content, path):
    """What a file's networks were built with: {argument: value}. Raises InputError.

    A checkpoint of train.py says it. The weights of another project's generator show it.
    """
    if "sizes" in content:
        return content["sizes"]
    try:
        shapes = [weight.shape for weight in content.values() if weight.dim() == 4]
        ngf, nc, kernel_size, _ = shapes[-1]
        return dict(nz=shapes[0][0], ngf=ngf, nc=nc, kernel_size=kernel_size,
                    image_size=2 ** (len(shapes) + 1))
    except (AttributeError, LookupError) as error:
        keys = one_line(", ".join(map(str, content)))
        raise InputError(f"{path} is no checkpoint of train.py, and no state dict of a generator. "
                         f"Save the generator's state_dict() alone. It has: {keys}") from error


def rebuild(network, name, content, path):
    """The network "G", "G_ema" or "D" of a file's content, on the CPU, in eval mode, in float32.

    network: Generator or Discriminator. Raises InputError if there is no such network.
    """
    sizes = sizes_of(content, path)
    try:
        weights = content[name] if "sizes" in content else content
        weights = {key.removeprefix("module."): value for key, value in weights.items()}
        own = signature(network).parameters
        with torch.device("meta"):  # takes no time for weights that are replaced
            net = network(**{size: sizes[size] for size in sizes if size in own})
        net.to_empty(device="cpu").load_state_dict(weights)
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path} has no DCGAN {network.__name__} ({one_line(error)})") from error
    return net.eval().requires_grad_(False)


def load_generator(path=None):
    """(G on the CPU, "normal" or "uniform"), as find_checkpoint finds it. Raises InputError.

    A file can also be the state dict of another DCGAN (netG_*.pth of pytorch/examples).
    """
    path = find_checkpoint(path)
    content = load_file(path)
    G = rebuild(Generator, "G_ema", content, path)
    return G, sizes_of(content, path).get("latent", "normal")


def open_generator(args):
    """(G on args.device, its kind of latents) from args.checkpoint, for the scripts."""
    device = choose_device(args.device)
    path = find_checkpoint(args.checkpoint)
    say(f"generator: {path}")
    G, latent = load_generator(path)
    return G.to(device), latent


# ---- files ---------------------------------------------------------------------------------------
def write_file(path, data, sync=False):
    """Replace a file by `data` (bytes). A kill or a full disk leaves the old file.

    With `sync`, the file also survives a crash of the machine.
    """
    temporary = Path(f"{path}.tmp")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error


def save_image(image, path, **options):
    """Write a PIL image in the format of the path's suffix, with this format's options.

    Raises InputError if the format is unknown, or cannot hold so many pixels.
    """
    from PIL import Image

    data = io.BytesIO()
    try:
        image.save(data, Image.registered_extensions()[path.suffix.lower()], **options)
    except (KeyError, ValueError) as error:
        raise InputError(f"{path}: PIL cannot write such a file ({one_line(error)}): choose a "
                         ".png or .webp file, or fewer pictures") from error
    write_file(path, data.getbuffer())


def join(pictures, columns, padding=2):
    """A PIL image of pictures, uint8 (N, 3, H, W), in rows, with black lines around them."""
    from PIL import Image

    N, _, H, W = pictures.shape
    rows = math.ceil(N / columns)
    width = columns * (W + padding) + padding
    height = rows * (H + padding) + padding
    sheet = Image.new("RGB", (width, height))
    for i, picture in enumerate(pictures.permute(0, 2, 3, 1).numpy()):
        row, column = divmod(i, columns)
        place = padding + column * (W + padding), padding + row * (H + padding)
        sheet.paste(Image.fromarray(picture), place)
    return sheet


# ---- the command line ----------------------------------------------------------------------------
def file_path(text):
    """An argparse type: a Path. ~ is the home folder."""
    if not text:
        raise ArgumentTypeError("a path is empty")
    return Path(text).expanduser()


def seed_list(text):
    """An argparse type: "0-63,100" → [0, …, 63, 100]."""
    seeds = []
    for span in text.split(","):
        first, _, last = span.partition("-")
        these = range(int(first), int(last or first) + 1)
        if not 0 < len(these) <= 10_000_000:
            raise ArgumentTypeError(f"{span}: from 1 to 10,000,000 seeds, such as 7,40 or 0-63,100")
        seeds += these
    return seeds


def one_line(error):
    """The text of an exception on one line of at most 300 characters."""
    words = " ".join(str(error).split())
    return words[:300] or type(error).__name__


def say(text="", file=None):
    """Print. Output that cannot be written (a closed pipe, a full disk) does not end the work."""
    text = re.sub(r"[^\n -~\xa0-\U0010ffff]", "?", str(text))  # names can have escape sequences
    with suppress(OSError, ValueError):
        print(text, file=file or sys.stdout, flush=True)


def warn(text):
    say(f"warning: {text}", file=sys.stderr)


@contextmanager
def on_signals(handler):
    """Within it, signals that stop a program call handler(signum, frame).

    SIGUSR1 is what Slurm can send before its time limit. Ignored signals stay ignored: nohup asks
    for it. Outside the main thread Python allows no handlers.
    """
    previous = {}
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        signum = getattr(signal, name, None)  # Windows has few signals
        ignored = signum is None or signal.getsignal(signum) == signal.SIG_IGN
        if not ignored and threading.current_thread() is threading.main_thread():
            previous[signum] = signal.signal(signum, handler)
    try:
        yield
    finally:
        for signum, old in previous.items():
            signal.signal(signum, old)


def run_script(main, memory_advice="choose smaller networks or fewer pictures"):
    """Call a script's main(). A user's mistake, a full disk or too little memory gives one line.

    The exit status is 2 then. Other errors keep their traceback. A signal ends the script as
    sys.exit does, so that it can clean up.
    """
    for stream in (sys.stdout, sys.stderr):  # None if it is closed
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # for names that the stream cannot encode
    try:
        with on_signals(lambda signum, frame: sys.exit(128 + signum)):
            main()
    except (InputError, OSError, MemoryError, RuntimeError) as error:
        problem = find_problem(error, memory_advice)
        # With torchrun, rank 0 prints at once. The others, and one that lost its connection, wait
        # here, and torchrun ends them.
        rank = os.environ.get("LOCAL_RANK")
        if rank and (rank != "0" or problem is None):
            time.sleep(10)
        if problem is None:
            raise
        say(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    finally:
        try:
            print(end="", flush=True)
        except OSError:  # nobody reads it: Python must not end with a traceback
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def find_problem(error, memory_advice):
    """The line for an error that a user can correct, or None for a mistake in the code."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    words = ("can't allocate memory", "not enough memory", "Allocation failed")
    if known or any(text in str(error) for text in words):
        return f"out of memory: {memory_advice} ({one_line(error)})"
    return None
