"""The networks, and all that the scripts share.

It needs torch, NumPy for the score, and PIL and torchvision for picture files.

To draw pictures in your own project, copy this file and write

    from model import latents, load_generator
    G, latent = load_generator("runs/small-64")      # or netG_epoch_24.pth from pytorch/examples
    images = G(latents(range(16), G.nz, latent))     # (16, 3, 64, 64) in [-1, 1]

The architecture is DCGAN (section 3 of Radford, Metz, Chintala 2015,
https://arxiv.org/abs/1511.06434).

SPDX-License-Identifier: MIT
Copyright (c) 2026 the authors of this repository
"""
import errno
import io
import math
import os
import re
import signal
import sys
import threading
import time
from argparse import ArgumentTypeError
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from inspect import signature
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parametrize


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

    From the paper (section 4) and its authors' code. Other kinds of layers keep torch's own
    weights. A layer with spectral norm computes its weight from another one, `original`, which is
    the one that is trained and initialised.
    """
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        weight = module.weight
        if parametrize.is_parametrized(module, "weight"):
            weight = module.parametrizations.weight.original
        nn.init.normal_(weight, 0.0, 0.02)
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
PRESETS = {
    # the sizes of pytorch/examples
    "naive-64": NAIVE,
    # the paper's networks
    "radford-64": dict(NAIVE, kernel_size=5, ngf=128, ndf=128, latent="uniform"),
    # the write-up's strong G against a weak D
    "clamp-64": dict(NAIVE, nz=256, ngf=256, batch_size=256),
    # the write-up's 128 pixels
    "safe-128": dict(NAIVE, image_size=128, nz=128, ngf=128, ndf=32, batch_size=256,
                     weight_decay=0.05, instance_noise=0.05),
    # hundreds to some thousands of photographs
    "small-64": dict(NAIVE, ngf=32, ndf=32, batch_size=16, augment=True, mirror=True),
    "small-128": dict(NAIVE, image_size=128, ngf=16, ndf=16, batch_size=16, augment=True,
                      mirror=True),
    # drawn streets in five minutes on a CPU
    "demo-64": dict(NAIVE, ngf=24, ndf=16, batch_size=16, lr=4e-4, augment=True, mirror=True),
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
    one): a picture depends on its latent alone, and Gaudi compiles once. `scale` enlarges the
    pictures (bicubic).
    """
    if G.training:
        raise ValueError("render needs G.eval(): in training a picture depends on its batch")
    device = next(G.parameters()).device
    pictures = []
    for part in z.split(batch_size):
        padding = part.new_zeros(batch_size - len(part), G.nz)
        images = G(torch.cat([part, padding]).to(device))
        if scale > 1:
            images = F.interpolate(images, scale_factor=scale, mode="bicubic")
        pictures.append(to_grey_levels(images)[:len(part)])
    return torch.cat(pictures).expand(-1, 3, -1, -1)  # a generator of grey pictures has one channel


def to_grey_levels(images):
    """Numbers in [-1, 1] → uint8 from 0 to 255 on the CPU."""
    grey_levels = ((images + 1) * 127.5).round().clamp(0, 255)
    return grey_levels.cpu().to(torch.uint8)  # on Gaudi, this conversion is not documented


# ---- the score -----------------------------------------------------------------------------------
SCORED = 50  # frames of each kind that a score needs at least


class Score:
    """How close generated pictures are to held-out images: score(G, latent) → (distance, coverage).

    distance: sliced Wasserstein distance of patches × 1000, averaged over the scales of a pyramid
    (Karras et al. 2018, https://arxiv.org/abs/1710.10196, section 5). Smaller is better. It sees
    blur and grain, but not repetition.
    coverage: share of held-out images that have a generated image nearer than their fifth held-out
    neighbour, in the features of an untrained network (Naeem et al. 2020,
    https://arxiv.org/abs/2002.09797). Larger is better. It falls where G repeats itself.

    `train` and `holdout` are uint8 arrays (N, H, W, 3) of frames, W ≥ H ≥ image_size. G is a module
    with weights in eval mode, with the attribute `nz`: latents (N, nz) → images
    (N, 3, image_size, image_size) in [-1, 1]. `real` holds both figures for training images. Raises
    InputError for other arrays, and with fewer than 50 frames of either kind. The global random
    numbers stay as they are.
    """

    def __init__(self, train, holdout, image_size):
        check_image_size(image_size)
        for frames in (train, holdout):
            _, H, W, _ = frames.shape
            if frames.dtype != "uint8" or not image_size <= H <= W:
                raise InputError("a score needs NumPy arrays of uint8 frames (N, H, W, 3) with W ≥ "
                                 f"H ≥ {image_size}: these are {frames.dtype} {frames.shape}")

        # Images are compared in groups of one size. Small packs have several windows of a frame.
        self.group_size = min(len(train), len(holdout), 2048)
        if self.group_size < SCORED:
            raise InputError(f"a score needs {SCORED} training frames and {SCORED} held-out "
                             f"frames: there are {len(train)} and {len(holdout)}")
        groups = math.ceil(1000 / self.group_size)
        self.images = self.group_size * groups
        self.image_size = image_size
        self.network = untrained_network(image_size)

        held_out = spread_windows(holdout, self.images, image_size)
        self.projections, self.features = self.describe(held_out)
        distances = torch.cdist(self.features, self.features)
        self.radius = distances.kthvalue(6, dim=2).values  # the first neighbour is the image itself
        self.real = self.compare(self.describe(spread_windows(train, self.images, image_size)))

    def __call__(self, G, latent="normal"):
        z = latents(range(self.images), G.nz, latent)
        pictures = (render(G, part) / 127.5 - 1 for part in z.split(256))
        return self.compare(self.describe(pictures))

    def describe(self, batches):
        """Batches of images → (sorted projections of each scale, features (k, group, d)).

        Image i is in group i modulo k. So each of the k groups is spread over all frames.
        """
        generator = torch.Generator().manual_seed(0)
        described = []
        patches = []  # for each batch, a list with the patches of each scale
        for images in batches:
            if images.shape[-1] != self.image_size:
                raise InputError(f"G draws {images.shape[-1]} pixels, and this score is for "
                                 f"{self.image_size}")
            described.append(features(self.network, images))
            patches.append([random_patches(level, generator) for level in pyramid(images)])

        projections = [sorted_projections(torch.cat(parts), generator) for parts in zip(*patches)]
        described = torch.cat(described).unflatten(0, (self.group_size, -1))
        return projections, described.transpose(0, 1)

    def compare(self, description):
        """(distance, coverage) of what describe() returned."""
        projections, described = description
        gaps = [(a - b).abs().mean().item() for a, b in zip(self.projections, projections)]
        nearest = torch.cdist(self.features, described).amin(dim=2)
        covered = (nearest <= self.radius).float()
        return 1000 * sum(gaps) / len(gaps), covered.mean().item()


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
    """64 patches of 7×7 pixels of each image: (N, 3, S, S) → (64 N, 3, 49)."""
    N, _, S, _ = images.shape
    top, left = torch.randint(S - 6, (2, N, 64), generator=generator)
    patches = images.unfold(2, 7, 1).unfold(3, 7, 1)  # (N, 3, S-6, S-6, 7, 7), a view
    return patches[torch.arange(N)[:, None], :, top, left].reshape(-1, 3, 49)


def sorted_projections(patches, generator):
    """Patches (M, 3, 49), normalised per channel, along 128 random directions: (128, M).

    Each row is sorted.
    """
    mean = patches.mean((0, 2))
    variance = patches.square().mean((0, 2)) - mean.square()
    std = variance.clamp(min=1e-12).sqrt()  # not 0, if all pictures have one colour
    directions = F.normalize(torch.randn(128, 147, generator=generator)).unflatten(1, (3, 49))
    directions /= std[:, None]  # normalising these is faster than normalising the patches
    shift = directions.sum(2) @ mean[:, None]
    projected = directions.flatten(1) @ patches.flatten(1).T - shift

    # NumPy sorts in place. torch.sort also makes indices, and takes ten times as long.
    with ThreadPoolExecutor() as threads:
        for row in projected.numpy():
            threads.submit(row.sort)
    return projected


def untrained_network(image_size):
    """The layers of an untrained discriminator with 16 feature maps, for the coverage.

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

        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)
            elif isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.weight, 1.0, 0.02)
    return nn.Sequential(*layers).eval().requires_grad_(False)


def features(layers, x):
    """What all convolutions but the first one read, max-pooled to 4×4 pixels (DCGAN, section 5).

    layers: the `main` of a discriminator in eval mode. x: (N, 3, S, S) → (N, 16 · channels).
    """
    pooled = []
    for i, layer in enumerate(layers):
        if isinstance(layer, nn.Conv2d) and i > 0:
            pooled.append(F.max_pool2d(x, x.shape[-1] // 4).flatten(1))
        x = layer(x)
    return torch.cat(pooled, 1)


# ---- devices -------------------------------------------------------------------------------------
# A further kind of device is added here, to is_installed and choose_device if `auto` takes it, to
# use_once if a machine can have several, and to set_up_device in train.py.
DEVICES = ("auto", "cuda", "hpu", "mps", "cpu")


def choose_device(name="auto", local_rank=0):
    """One of DEVICES → torch.device. Computes something on it, so that a broken device fails here.

    auto takes a GPU, then a Gaudi card, then the CPU. If one cannot be used, it prints a warning
    and takes the next. local_rank is the number of the GPU. Raises InputError with the library's
    own words.
    """
    if name not in DEVICES:
        raise InputError(f"--device {name}: choose one of {', '.join(DEVICES)}")
    if name == "auto":
        candidates = [kind for kind in ("cuda", "hpu") if is_installed(kind)] + ["cpu"]
    else:
        candidates = [name]

    for kind in candidates:
        try:
            use_once(kind, local_rank)
            return torch.device(kind)
        except Exception as error:  # each library raises kinds of its own
            if name == kind:
                raise InputError(f"--device {name}: {one_line(error)}. "
                                 "On a CPU use --device cpu") from error
            warn(f"{kind} cannot be used: {one_line(error)}. Trying the next device, or the CPU")


def is_installed(kind):
    """Whether `auto` tries this kind of device. A busy or unsuitable one is installed too."""
    if kind == "cuda":
        return torch.cuda.is_available()  # warns if the driver is too old
    return kind == "hpu" and find_spec("habana_frameworks") is not None


def use_once(kind, local_rank):
    """Calculate on a GPU, or acquire a Gaudi card. Raises what the library raises."""
    if kind == "hpu":
        os.environ.setdefault("PT_HPU_LAZY_MODE", "1")
        try:
            import habana_frameworks.torch.core  # noqa: F401  makes torch know the device hpu
        except ModuleNotFoundError:
            raise ImportError("the plugin habana_frameworks is not installed "
                              "(docs.habana.ai, Installation Guide)") from None
        if not torch.hpu.is_available():  # it counts busy cards too
            raise RuntimeError("torch.hpu finds no Gaudi card")
        torch.hpu.get_device_name()  # acquires one
    elif kind == "cpu":
        limit_threads()
    else:
        if kind == "cuda":
            torch.cuda.set_device(local_rank)
        torch.ones(2, device=kind).sum().item()


def limit_threads(cgroup="/sys/fs/cgroup"):
    """Take no more threads than a container's CPU quota. torch starts one for each core.

    OMP_NUM_THREADS overrides it.
    """
    quota = math.inf
    with suppress(OSError, ValueError):  # cgroup v2: "200000 100000" or "max 100000"
        allowed, period = Path(cgroup, "cpu.max").read_text().split()
        quota = int(allowed) / int(period)
    with suppress(OSError, ValueError):  # cgroup v1: -1 without a limit
        allowed = int(Path(cgroup, "cpu/cpu.cfs_quota_us").read_text())
        if allowed > 0:
            quota = allowed / int(Path(cgroup, "cpu/cpu.cfs_period_us").read_text())
    if quota < torch.get_num_threads() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, math.ceil(quota)))


def free_cores(seconds=0.3):
    """How many of the cores that this process may use are free, measured for a moment.

    Only Linux tells it. Elsewhere the number is infinite.
    """
    try:
        cores = os.sched_getaffinity(0)
        busy, total = core_ticks(cores)
        time.sleep(seconds)
        later_busy, later_total = core_ticks(cores)
    except (AttributeError, OSError):
        return math.inf
    share = (later_busy - busy) / max(1, later_total - total)
    return len(cores) - round(share * len(cores))


def core_ticks(cores):
    """(busy, all) ticks of these cores since the start of Linux. Nice work counts as idle."""
    busy = total = 0
    for line in Path("/proc/stat").read_text().splitlines():
        name, *ticks = line.split()
        if name[:3] == "cpu" and name[3:].isdigit() and int(name[3:]) in cores:
            user, nice, system, *others = map(int, ticks[:8])
            busy += user + system
            total += user + nice + system + sum(others)
    return busy, total


# ---- checkpoints ---------------------------------------------------------------------------------
def newest_run():
    """The folder in runs/ whose checkpoint was saved last. Raises InputError if there is none."""
    saved = sorted(Path("runs").glob("*/checkpoint.pt"), key=os.path.getmtime)
    if not saved:
        raise InputError("there is no run in runs/: train first (python train.py), "
                         "or name a run with --checkpoint")
    return saved[-1].parent


def find_checkpoint(path, *names):
    """`path` itself if it is a file, or the first of `names` that the folder `path` holds."""
    path = Path(path)
    if path.is_file():
        return path
    if not path.exists():
        runs = ", ".join(sorted(str(file.parent) for file in Path("runs").glob("*/checkpoint.pt")))
        raise InputError(f"there is no {path}" + (f"; the runs are {runs}" if runs else ""))
    for name in names:
        if (path / name).exists():
            return path / name
    raise InputError(f"{path} holds none of {', '.join(names)}: name a run's folder, or a file")


def load_file(path):
    """The dictionary in a checkpoint, its tensors on the CPU. It never runs code from the file.

    Raises InputError.
    """
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except Exception as error:  # a cut or foreign file makes pickle, zip and torch raise many kinds
        hint = ""
        if "Unsupported global" in str(error):  # a pickled module, or any other object
            hint = ". If it holds a whole network, save its state_dict() instead"
        kind = type(error).__name__
        raise InputError(f"{path} is damaged or not a checkpoint ({kind}){hint}") from error


# Names of other projects for a network's state dict in a larger dictionary.
G_NAMES = ("G_ema", "G", "netG", "generator", "state_dict")
D_NAMES = ("D", "netD", "discriminator", "state_dict")


def find_weights(content, names):
    """The state dict in a file's content: the content itself, or what the first of `names` holds.

    Prefixes of keys that DataParallel and torch.compile add are removed.
    """
    weights = content
    for name in names:
        if isinstance(content.get(name), dict):
            weights = content[name]
            break
    prefixes = re.compile(r"^(module\.|_orig_mod\.)+")
    return {prefixes.sub("", str(key)): value for key, value in weights.items()}


def guess_sizes(network, weights):
    """The arguments of a Generator or Discriminator, from the weights of another project's file."""
    shapes = [weight.shape for weight in weights.values() if weight.dim() == 4]
    if network is Generator:
        nz = shapes[0][0]
        ngf, nc, kernel_size, _ = shapes[-1]
        sizes = dict(nz=nz, ngf=ngf)
    else:
        ndf, nc, kernel_size, _ = shapes[0]
        sizes = dict(ndf=ndf)
    if nc not in (1, 3):
        raise ValueError(f"its images have {nc} channels: 1 or 3 are possible")
    return dict(sizes, image_size=2 ** (len(shapes) + 1), nc=nc, kernel_size=kernel_size)


def read_sizes(path):
    """The options in SIZES that fit the networks in a file, if it tells them. Raises InputError."""
    content = load_file(path)
    if "sizes" in content:
        return content["sizes"]
    try:
        sizes = guess_sizes(Generator, find_weights(content, G_NAMES))
    except (AttributeError, LookupError, ValueError) as error:
        raise InputError(f"{path} holds no DCGAN generator ({one_line(error)})") from error
    with suppress(AttributeError, LookupError, ValueError):  # it may have no discriminator
        sizes.update(guess_sizes(Discriminator, find_weights(content, D_NAMES)))
    return {name: sizes[name] for name in SIZES if name in sizes}


def rebuild(network, content, names, path):
    """The Generator or Discriminator in a file's content, on the CPU, in eval mode, in float32.

    A checkpoint of train.py holds its sizes. Raises InputError if there is no such network.
    """
    try:
        weights = find_weights(content, names)
        if "sizes" in content:
            own = signature(network).parameters
            sizes = {name: size for name, size in content["sizes"].items() if name in own}
        else:
            sizes = guess_sizes(network, weights)
        with torch.device("meta"):  # takes no memory until the weights are in
            net = network(**sizes)
        net.load_state_dict(weights, assign=True)
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        kind = network.__name__.lower()
        raise InputError(f"{path} holds no DCGAN {kind} ({one_line(error)})") from error
    return net.float().eval().requires_grad_(False)


def load_generator(path=None):
    """(G on the CPU, "normal" or "uniform") from a run's folder, or from a file.

    A folder gives its best generator, or else its newest. A file can be a state dict of other
    projects (netG_*.pth of pytorch/examples). None is the newest run in runs/. Raises InputError.
    """
    path = find_checkpoint(path or newest_run(), "best.pt", "checkpoint.pt")
    content = load_file(path)
    say(f"generator: {path}")
    latent = content.get("sizes", {}).get("latent", "normal")
    return rebuild(Generator, content, G_NAMES, path), latent


def load_discriminator(path=None):
    """D on the CPU, from a run's folder or a file, like load_generator. Raises InputError."""
    path = find_checkpoint(path or newest_run(), "best.pt", "checkpoint.pt")
    return rebuild(Discriminator, load_file(path), D_NAMES, path)


# ---- files ---------------------------------------------------------------------------------------
def make_folder(folder):
    """Make a folder and those above it, unless they exist. Raises InputError."""
    for path in (folder, *folder.parents):
        if path.is_file():
            raise InputError(f"{path} is a file, not a folder: choose another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be made: {error.strerror}") from error


def write_file(path, data):
    """Replace a file by `data` (bytes). A kill or a full disk leaves the old file."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def join(pictures, columns, padding=2):
    """A PIL image of pictures, uint8 (N, 3, H, W), in rows, with black lines between them."""
    from PIL import Image  # here, because the rest of this file runs without it
    from torchvision.utils import make_grid

    sheet = make_grid(pictures, columns, padding)
    return Image.fromarray(sheet.permute(1, 2, 0).numpy())


def save_picture(image, path, **options):
    """Write a PIL image in the format of the path's suffix, with this format's options.

    Returns the words of save_output. Raises InputError if the format cannot hold the image.
    """
    from PIL import Image

    data = io.BytesIO()
    kind = Image.registered_extensions()[path.suffix.lower()]
    try:
        image.save(data, kind, **options)
    except (OSError, ValueError) as error:  # too many pixels
        raise InputError(f"{path}: {one_line(error)}") from error
    return save_output(path, data.getbuffer())


def save_output(path, data):
    """write_file, in a folder that is made. Returns ", replaced" if there was a file, or ""."""
    replaced = ", replaced" if path.exists() else ""
    make_folder(path.parent)
    write_file(path, data)
    return replaced


def save_pngs(batches, folder):
    """Write folder/00000007.png and so on, from dictionaries {7: PIL image, …}.

    Memory stays flat: threads encode one batch at a time, and PIL releases the GIL. Returns words
    about the PNGs in the folder. Raises InputError if it has pictures of another kind.
    """
    make_folder(folder)
    for path in folder.iterdir():
        picture = path.suffix.lower() in (".jpg", ".jpeg", ".png", ".npy")
        if picture and not re.fullmatch(r"\d{8,}\.png", path.name):
            raise InputError(f"{folder} has other files, such as {path.name}: "
                             "name a new folder with --out")
    before = {path.name for path in folder.glob("*.png")}
    written = set()

    with ThreadPoolExecutor() as threads:
        for batch in batches:
            jobs = []
            for number, image in batch.items():
                path = folder / f"{number:08d}.png"
                written.add(path.name)
                jobs.append(threads.submit(image.save, path))
            for job in jobs:
                job.result()  # raises what went wrong in the thread

    replaced = len(before & written)
    others = len(before - written)
    kept = f"; other PNGs from before: {others:,}" if others else ""
    return f"{replaced:,} replaced{kept}"


# ---- the command line ----------------------------------------------------------------------------
def seed_list(text):
    """An argparse type: "0-63,100" → [0, …, 63, 100]."""
    seeds = []
    for span in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", span)
        if not match:
            raise ArgumentTypeError(f"{text!r} is not a list of seeds: write 7,40 or 0-63,100")
        first = int(match[1])
        last = int(match[2] or first)
        if last < first:
            raise ArgumentTypeError(f"{span} descends: write {last}-{first}")
        if last >= 2 ** 63:
            raise ArgumentTypeError(f"{span} is too large: seeds are below 2^63")
        if last - first >= 10_000_000:
            raise ArgumentTypeError(f"{span} has more than 10,000,000 seeds")
        seeds += range(first, last + 1)
    return seeds


def one_line(error):
    """The text of an exception on one line of at most 300 characters."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= 300 else words[:299] + "…"


def say(*values, end="\n", file=None):
    """Print. Output that cannot be written (a closed pipe, a full disk) does not end the work."""
    with suppress(OSError, ValueError):
        print(*values, end=end, file=file or sys.stdout, flush=True)


def warn(text):
    say(f"warning: {text}", file=sys.stderr)


@contextmanager
def handling(handler, *names):
    """Within it, the signals with these names call handler(signum, frame).

    An ignored SIGHUP stays ignored: nohup asks for it. Outside the main thread nothing is set,
    because Python does not allow it.
    """
    previous = {}
    if threading.current_thread() is threading.main_thread():
        for name in names:
            signum = getattr(signal, name, None)  # Windows has few signals
            ignored = signum is not None and signal.getsignal(signum) == signal.SIG_IGN
            if signum is not None and not (ignored and name == "SIGHUP"):
                previous[signum] = signal.signal(signum, handler)
    try:
        yield
    finally:
        for signum, old in previous.items():
            if signal.getsignal(signum) != signal.SIG_IGN:  # unwind() ignores them to the end
                signal.signal(signum, old)


STOPS = ("SIGTERM", "SIGINT", "SIGHUP")  # signals that end a script


def unwind(signum, frame):
    """A signal handler: end the script as if it had called sys.exit, so that it can clean up.

    A second signal, such as Ctrl-C pressed twice, must not interrupt that: it is ignored.
    """
    for name in STOPS:
        if hasattr(signal, name):  # Windows has few signals
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    sys.exit(128 + signum)


DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
MEMORY_ERRORS = ("can't allocate memory", "not enough memory", "Allocation failed")


def find_problem(error, memory_advice):
    """The line for an error that a user can correct, or None for a mistake in the code."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    if out_of_memory or any(words in str(error) for words in MEMORY_ERRORS):
        return f"out of memory: {memory_advice} ({one_line(error)})"
    return None


def run_script(main, memory_advice="choose smaller networks or fewer pictures"):
    """Call a script's main(). A user's mistake, a full disk or too little memory gives one line.

    The exit status is 2 then. Other errors keep their traceback.
    """
    for stream in (sys.stdout, sys.stderr):  # None if it is closed
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # for names that the stream cannot encode
    try:
        with handling(unwind, *STOPS):
            report_problems(main, memory_advice)
    finally:
        close_output()


def report_problems(main, memory_advice):
    try:
        main()
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        if isinstance(error.__context__, SystemExit):  # a signal that interrupts a lock
            raise error.__context__ from None
        problem = find_problem(error, memory_advice)

        # Of torchrun's processes, the first prints a mistake that all make, and one that lost its
        # connection prints nothing: torchrun ends the others while they wait here.
        local_rank = os.environ.get("LOCAL_RANK")
        if local_rank and (local_rank != "0" or problem is None):
            time.sleep(10)
        if problem is None:
            raise
        say(f"error: {problem}", file=sys.stderr)
        sys.exit(2)


def close_output():
    """Write what is left. Where nobody reads it, Python must not end with a traceback."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
