"""The networks, and all that the scripts share. It needs torch, and NumPy for the score: copy it to your project and

    from model import latents, load_generator
    G, latent = load_generator("runs/naive-64")      # or netG_epoch_24.pth from pytorch/examples
    images = G(latents(range(16), G.nz, latent))     # (16, 3, 64, 64) in [-1, 1]

The architecture is DCGAN: Radford, Metz, Chintala 2015, https://arxiv.org/abs/1511.06434, section 3.
"""
import math
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

# A preset sets networks, latents, batch size per process, optimizer and augmentation. Flags override it. instance_noise
# is the std of Gaussian noise on D's input, augment shifts that input (train.translate), mirror flips real images.
NAIVE = dict(image_size=64, kernel_size=4, nz=100, ngf=64, ndf=64, latent="normal", batch_size=128,
             lr=2e-4, beta1=0.5, weight_decay=0.0, instance_noise=0.0, augment=False, mirror=False)
PRESETS = {
    "naive-64": NAIVE,                                                   # the sizes of pytorch/examples
    "radford-64": dict(NAIVE, kernel_size=5, ngf=128, ndf=128, latent="uniform"),   # as in the paper
    "clamp-64": dict(NAIVE, nz=256, ngf=256, batch_size=256),            # a strong G against a weak D
    "safe-128": dict(NAIVE, image_size=128, nz=128, ngf=128, ndf=32, batch_size=256, weight_decay=0.05,
                     instance_noise=0.05),
    "small-64": dict(NAIVE, ngf=32, ndf=32, batch_size=16, augment=True, mirror=True),    # hundreds of photographs
    "demo-64": dict(NAIVE, ngf=16, ndf=16, batch_size=16, lr=4e-4, augment=True),         # five minutes on a CPU
}


class InputError(ValueError):
    """A mistake that the user can correct. The scripts print it as one line and exit with status 2."""


# ---- the networks ---------------------------------------------------------------------------------------------------
def widths(image_size):
    """Channel multipliers from the 4×4 layer to the last hidden one: 64 → [8, 4, 2, 1], one for each doubling."""
    if image_size not in (32, 64, 128, 256):
        raise InputError(f"image size {image_size} is not supported: choose 32, 64, 128 or 256")
    return [2 ** i for i in reversed(range(image_size.bit_length() - 3))]


class Generator(nn.Module):
    """Images from latents: z (N, nz) or (N, nz, 1, 1) → (N, nc, image_size, image_size) in [-1, 1].

    kernel_size 4 gives the networks and state-dict keys of pytorch/examples; kernel_size 5 gives the paper's.
    """

    def __init__(self, image_size=64, nz=100, ngf=64, nc=3, kernel_size=4):
        super().__init__()
        self.image_size, self.nz = image_size, nz
        up = dict(kernel_size=kernel_size, stride=2, padding=(kernel_size - 1) // 2, output_padding=kernel_size % 2,
                  bias=False)  # doubles the size
        cs = [ngf * w for w in widths(image_size)]
        layers = [nn.ConvTranspose2d(nz, cs[0], 4, bias=False), nn.BatchNorm2d(cs[0]), nn.ReLU()]  # (ngf*8) x 4 x 4
        for c_in, c_out in zip(cs, cs[1:]):
            layers += [nn.ConvTranspose2d(c_in, c_out, **up), nn.BatchNorm2d(c_out), nn.ReLU()]    # … (ngf) x 32 x 32
        layers += [nn.ConvTranspose2d(cs[-1], nc, **up), nn.Tanh()]                                # (nc) x 64 x 64
        self.main = nn.Sequential(*layers)

    def forward(self, z):
        return self.main(z.view(len(z), -1, 1, 1))


class Discriminator(nn.Module):
    """Logits from images: x (N, nc, image_size, image_size) in [-1, 1] → (N,). D(x) is their sigmoid."""

    def __init__(self, image_size=64, ndf=64, nc=3, kernel_size=4):
        super().__init__()
        self.image_size = image_size
        down = dict(kernel_size=kernel_size, stride=2, padding=(kernel_size - 1) // 2, bias=False)  # halves the size
        cs = [ndf * w for w in reversed(widths(image_size))]
        layers = [nn.Conv2d(nc, cs[0], **down), nn.LeakyReLU(0.2)]                                 # (ndf) x 32 x 32
        for c_in, c_out in zip(cs, cs[1:]):
            layers += [nn.Conv2d(c_in, c_out, **down), nn.BatchNorm2d(c_out), nn.LeakyReLU(0.2)]   # … (ndf*8) x 4 x 4
        layers += [nn.Conv2d(cs[-1], 1, 4, bias=False)]                                            # 1 x 1 x 1
        self.main = nn.Sequential(*layers)

    def forward(self, x):
        return self.main(x).view(-1)


def init_weights(module):
    """For `net.apply`: weights N(0, 0.02), batch-norm gains N(1, 0.02), biases 0 (paper, section 4, and its code)."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


# ---- latents and pictures -------------------------------------------------------------------------------------------
def latents(seeds, nz, latent="normal"):
    """float32 (len(seeds), nz) on the CPU: N(0, 1) or uniform on [-1, 1]. A row depends on its own seed alone."""
    z = torch.empty(len(seeds), nz)
    for row, seed in zip(z, seeds):
        generator = torch.Generator().manual_seed(seed)
        if latent == "normal":
            row.normal_(generator=generator)
        else:
            row.uniform_(-1, 1, generator=generator)
    return z


def cut_windows(frames, image_size, mirror=False, generator=None):
    """A random window of each frame: uint8 (N, H, W, 3) → float32 (N, 3, S, S) in [-1, 1], on the frames' device.

    A window is a square of side s, uniform from S to H, at a random position, resized to S×S (bilinear). This is the
    write-up's cropping, down-scaling and translation in one batched operation. `mirror` flips half of the windows.
    """
    N, H, W, _ = frames.shape
    size, top, left, flip = torch.rand(4, N, 1, device=frames.device, generator=generator)  # (N, 1) each, 0 to 1
    side = image_size + size * (H - image_size)  # (N, 1) in pixels of the frame
    ticks = (torch.arange(image_size, device=frames.device) + 0.5) / image_size  # pixel centres, 0 to 1 in the window
    y = (top * (H - side) + ticks * side) * (2 / H) - 1  # (N, S), -1 to 1 across the frame, as grid_sample wants it
    x = torch.where(flip < 0.5, 1 - ticks, ticks) if mirror else ticks
    x = (left * (W - side) + x * side) * (2 / W) - 1
    grid = torch.stack([x[:, None, :].expand(-1, image_size, -1), y[:, :, None].expand(-1, -1, image_size)], dim=3)
    # If a profile shows grid_sample to be slow on Gaudi, two batched matrix products give the same windows to 4e-5:
    # hat(y, H) @ frames @ hat(x, W).mT, with y and x in pixels and hat(at, n) = (1 - |at - arange(n)|).clamp(min=0).
    images = F.grid_sample(frames.permute(0, 3, 1, 2).float(), grid, align_corners=False)
    return images / 127.5 - 1


def spread_windows(frames, n, image_size):
    """n windows, always the same, evenly spread over frames (N, H, W, 3): batches of (≤ 256, 3, S, S) in [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    for part in (torch.arange(n) * len(frames) // n).split(256):
        yield cut_windows(torch.from_numpy(frames[part.numpy()]), image_size, generator=generator)


@torch.no_grad()
def render(G, z, scale=1, batch_size=64):
    """Pictures of latents z (N, nz), computed on G's device: uint8 (N, 3, S·scale, S·scale) on the CPU, bicubic.

    All batches have one size (zeros fill the last one): a picture depends on its latent alone, and Gaudi compiles once.
    """
    device, pictures = next(G.parameters()).device, []
    for part in z.split(batch_size):
        padded = torch.cat([part, part.new_zeros(batch_size - len(part), G.nz)])
        images = G(padded.to(device))
        if scale > 1:
            images = F.interpolate(images, scale_factor=scale, mode="bicubic")
        images = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        pictures.append(images.cpu()[:len(part)])
    return torch.cat(pictures).expand(-1, 3, -1, -1)  # a generator of grey pictures has one channel


# ---- the score ------------------------------------------------------------------------------------------------------
def pyramid(images):
    """Laplacian pyramid of (N, 3, S, S): the detail lost in each halving, and the rest at 16 pixels."""
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
    """Patches (M, 3, 49), normalised per channel, along 128 random directions: (128, M), each row sorted."""
    mean, square = patches.mean((0, 2)), patches.square().mean((0, 2))
    directions = F.normalize(torch.randn(128, 147, generator=generator)).unflatten(1, (3, 49))
    directions /= (square - mean.square()).sqrt()[:, None]  # normalising these is faster than normalising the patches
    projected = directions.flatten(1) @ patches.flatten(1).T - directions.sum(2) @ mean[:, None]
    with ThreadPoolExecutor() as threads:  # sorts in place; torch.sort also makes indices, and takes ten times as long
        for row in projected.numpy():
            threads.submit(row.sort)
    return projected


def features(D, x):
    """D's activations of each layer, max-pooled to 4×4 (paper, section 5): images (N, 3, S, S) → (N, 16 · channels)."""
    pooled = []
    for layer in D.main[:-1]:
        x = layer(x)
        if isinstance(layer, nn.LeakyReLU):
            pooled.append(F.max_pool2d(x, x.shape[-1] // 4).flatten(1))
    return torch.cat(pooled, 1)


class Score:
    """How close a generator's pictures are to a pack's held-out images: score(G, latent) → (distance, coverage).

    distance: sliced Wasserstein distance of patches × 1000, averaged over the scales of a pyramid; smaller is better
    (Karras et al. 2018, https://arxiv.org/abs/1710.10196, section 5). It sees blur and grain, but not repetition.
    coverage: share of held-out images that have a generated image nearer than their fifth held-out neighbour, in the
    features of an untrained D (Naeem et al. 2020, https://arxiv.org/abs/2002.09797). It falls where G repeats itself.
    `real` holds both figures for training images. Raises InputError with fewer than 50 frames of either kind.
    """

    def __init__(self, pack):
        self.image_size = pack.image_size
        self.frames = min(len(pack.train), len(pack.holdout), 2048)  # how many, of each split
        if self.frames < 50:
            raise InputError(f"{pack.folder} has fewer than 50 training frames or fewer than 50 held-out frames")
        self.images = self.frames * math.ceil(1000 / self.frames)  # several windows per frame in small packs
        torch.manual_seed(0)
        self.D = Discriminator(self.image_size, ndf=16).apply(init_weights).eval().requires_grad_(False)
        self.held_out = self.describe(spread_windows(pack.holdout, self.images, self.image_size))
        self.radius = torch.cdist(self.held_out[1], self.held_out[1]).kthvalue(6, dim=2).values  # the first is itself
        self.real = self.compare(self.describe(spread_windows(pack.train, self.images, self.image_size)))

    def describe(self, batches):
        """Images → sorted projections per scale, and features (k, frames, d): group i has each frame's i-th window."""
        generator, described, levels = torch.Generator().manual_seed(0), [], []
        for images in batches:
            described.append(features(self.D, images))
            levels.append([random_patches(level, generator) for level in pyramid(images)])
        projections = [sorted_projections(torch.cat(parts), generator) for parts in zip(*levels)]
        return projections, torch.cat(described).unflatten(0, (self.frames, -1)).transpose(0, 1)

    def compare(self, description):
        (real, real_features), (fake, fake_features) = self.held_out, description
        distance = 1000 * sum((a - b).abs().mean().item() for a, b in zip(real, fake)) / len(real)
        nearest = torch.cdist(real_features, fake_features).amin(dim=2)
        return distance, (nearest <= self.radius).float().mean().item()

    def __call__(self, G, latent="normal"):
        z = latents(range(self.images), G.nz, latent)
        return self.compare(self.describe(render(G, part) / 127.5 - 1 for part in z.split(256)))


# ---- devices --------------------------------------------------------------------------------------------------------
DEVICES = ("auto", "cuda", "hpu", "cpu")


def choose_device(name="auto"):
    """One of DEVICES → torch.device. auto takes a GPU, then a free Gaudi card, then the CPU. Raises InputError.

    On Gaudi this acquires a card, because is_available() counts busy cards too. PT_HPU_LAZY_MODE is 1 by default.
    """
    problem = {"cuda": "torch finds no NVIDIA GPU, or is built without CUDA",
               "hpu": "the plugin habana_frameworks is not installed (docs.habana.ai, Installation Guide)"}
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return torch.device("cuda")
    if name in ("auto", "hpu") and find_spec("habana_frameworks"):
        os.environ.setdefault("PT_HPU_LAZY_MODE", "1")
        try:
            import habana_frameworks.torch.core  # noqa: F401  makes torch know the device hpu
            torch.hpu.get_device_name()
            return torch.device("hpu")
        except Exception as error:  # no card, all cards busy, or a driver that does not fit
            problem["hpu"] = f"no Gaudi card can be used: {one_line(error)}"
            if name == "auto":
                print(f"warning: {problem['hpu']}; using the CPU", file=sys.stderr)
    if name in ("auto", "cpu"):
        return torch.device("cpu")
    raise InputError(f"--device {name}: {problem[name]}. On a CPU use --device cpu")


def one_line(error):
    return " ".join(str(error).split())[:300] or type(error).__name__


# ---- files ----------------------------------------------------------------------------------------------------------
def load_file(path):
    """The dictionary in a checkpoint, its tensors on the CPU. Never runs code from the file. Raises InputError."""
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except Exception as error:  # a cut or foreign file makes pickle, zip and torch raise many kinds
        raise InputError(f"{path} is damaged or not a checkpoint ({type(error).__name__})") from error


def find_file(path, *names):
    """`path` if it is a file, or the first of `names` in the folder `path`. None means the newest run in runs/."""
    if path is None:
        saved = sorted(Path("runs").glob("*/checkpoint.pt"), key=os.path.getmtime)
        if not saved:
            raise InputError("there is no run in runs/: train first (python train.py), or name a run with --checkpoint")
        path = saved[-1].parent
    found = [Path(path, name) for name in names if Path(path, name).exists()]
    if Path(path).is_dir() and not found:
        raise InputError(f"{path} holds none of {', '.join(names)}: name a run's folder, or a file")
    return found[0] if found else Path(path)


def rebuild(network, state, path):
    """A Generator or Discriminator in eval mode, in float32, whose sizes come from the shapes of the weights."""
    try:
        shapes = [weight.shape for weight in state.values() if weight.dim() == 4]
        sizes = (shapes[0][0], *shapes[-1][:3]) if network is Generator else shapes[0][:3]  # nz, ngf or ndf, nc, kernel
        with torch.device("meta"):  # takes no memory until the weights are in
            net = network(2 ** (len(shapes) + 1), *sizes)
        net.load_state_dict(state, assign=True)
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path} holds no DCGAN {network.__name__.lower()} ({one_line(error)})") from error
    return net.float().eval().requires_grad_(False)


def load_generator(path=None):
    """(G on the CPU, 'normal' or 'uniform') from a run's folder (its best generator, else its newest) or from a file.

    Takes a bare state dict too (netG_*.pth of pytorch/examples). None is the newest run in runs/. Raises InputError.
    """
    path = find_file(path, "generator-best.pt", "checkpoint.pt", "checkpoint-previous.pt")
    content = load_file(path)
    print(f"generator: {path}")
    return rebuild(Generator, content.get("G_ema", content.get("G", content)), path), content.get("latent", "normal")


def load_discriminator(path=None):
    """D on the CPU, from a run's folder or from its checkpoint.pt, the one file that has a D. Raises InputError."""
    path = find_file(path, "checkpoint.pt", "checkpoint-previous.pt")
    return rebuild(Discriminator, load_file(path).get("D", {}), path)


# ---- the command line -----------------------------------------------------------------------------------------------
def seed_list(text):
    """An argparse type: '0-63,100' → [0, …, 63, 100]. argparse reports the ValueError."""
    seeds = []
    for span in text.split(","):
        first, _, last = span.partition("-")
        if not 0 <= int(first) <= int(last or first) < 2 ** 63:
            raise ValueError(span)
        seeds += range(int(first), int(last or first) + 1)
    return seeds


def say(*values, end="\n"):
    """print to stdout at once. Output that is lost (a closed pipe, a narrow encoding) never ends the work."""
    try:
        print(*values, end=end, flush=True)
    except (OSError, ValueError):
        pass


def run_script(main):
    """Call a script's main(). A user's mistake, a full disk or too little memory gives one line and exit status 2."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    if hasattr(sys.stderr, "reconfigure"):
        sys.stderr.reconfigure(errors="backslashreplace")
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda signum, frame: sys.exit(128 + signum))  # unwinds
    try:
        return main()
    except (InputError, OSError) as error:
        problem = error
    except (RuntimeError, MemoryError) as error:  # torch raises another RuntimeError on each device
        if isinstance(error.__context__, SystemExit):  # a signal that interrupts a lock makes the lock raise this
            raise error.__context__ from None
        if not any(words in repr(error).lower() for words in ("out of memory", "alloc", "memoryerror")):
            raise
        problem = "out of memory: choose a smaller --batch-size, smaller networks or fewer pictures"
    print(f"error: {problem}", file=sys.stderr)
    sys.exit(2)
