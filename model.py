"""The networks, and all that the scripts share. Needs torch alone: copy this file into your own project and

    from model import latents, load_generator
    G, latent = load_generator("runs/naive-64")      # or netG_epoch_24.pth, as pytorch/examples writes it
    images = G(latents(range(16), G.nz, latent))     # (16, 3, 64, 64) in [-1, 1]

In this order: presets, the networks, latents and pictures, the score, devices, files, the command line.
The architecture is DCGAN's: Radford, Metz, Chintala 2015, https://arxiv.org/abs/1511.06434, section 3.
"""
import argparse
import os
import re
import signal
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")  # Gaudi's plugin loads where we say so: choose_device

import torch
import torch.nn as nn
import torch.nn.functional as F

# A preset pins networks, latent distribution, batch, optimizer and instance noise; a flag on the command line wins.
# batch_size counts the images of one process, beta1 is Adam's, instance_noise the std of Gaussian noise on D's input.
NAIVE = dict(image_size=64, kernel_size=4, nz=100, ngf=64, ndf=64, latent="normal",
             batch_size=128, lr=2e-4, beta1=0.5, weight_decay=0.0, instance_noise=0.0)
PRESETS = {
    "radford-64": {**NAIVE, "kernel_size": 5, "ngf": 128, "ndf": 128, "latent": "uniform"},  # the paper to the letter
    "demo-64": {**NAIVE, "ngf": 24, "ndf": 24, "batch_size": 16},                            # for five minutes on a CPU
    "naive-64": NAIVE,                                                                       # pytorch/examples' sizes
    "clamp-64": {**NAIVE, "nz": 256, "ngf": 256, "batch_size": 256},                         # a strong G, a weak D
    "safe-128": {**NAIVE, "image_size": 128, "nz": 128, "ngf": 128, "ndf": 32, "batch_size": 256,
                 "weight_decay": 0.05, "instance_noise": 0.05},
}


class InputError(ValueError):
    """Something a user can put right: the scripts print it as one line, `error: …`, and exit with status 2."""


# ---- the networks ---------------------------------------------------------------------------------------------------

def widths(image_size):
    """Channel multipliers from the 4×4 end to the last hidden layer: 64 → [8, 4, 2, 1], one a doubling of the size."""
    if image_size not in (32, 64, 128, 256):
        raise InputError(f"image size {image_size}: it is 32, 64, 128 or 256")
    return [2 ** i for i in reversed(range(image_size.bit_length() - 3))]


class Generator(nn.Module):
    """Images from latents: z (N, nz) or (N, nz, 1, 1) → (N, nc, image_size, image_size) in [-1, 1].

    kernel_size 4 is the PyTorch world's DCGAN, with pytorch/examples' state-dict keys; 5 is the paper's own.
    """

    def __init__(self, image_size=64, nz=100, ngf=64, nc=3, kernel_size=4):
        super().__init__()
        self.image_size, self.nz = image_size, nz
        up = dict(kernel_size=kernel_size, stride=2, padding=(kernel_size - 1) // 2, output_padding=kernel_size % 2,
                  bias=False)  # each doubles the size
        cs = [ngf * w for w in widths(image_size)]
        layers = [nn.ConvTranspose2d(nz, cs[0], 4, bias=False), nn.BatchNorm2d(cs[0]), nn.ReLU()]  # (ngf*8) x 4 x 4
        for c_in, c_out in zip(cs, cs[1:]):
            layers += [nn.ConvTranspose2d(c_in, c_out, **up), nn.BatchNorm2d(c_out), nn.ReLU()]    # … (ngf) x 32 x 32
        layers += [nn.ConvTranspose2d(cs[-1], nc, **up), nn.Tanh()]                                # (nc) x 64 x 64
        self.main = nn.Sequential(*layers)

    def forward(self, z):
        return self.main(z.view(len(z), -1, 1, 1))


class Discriminator(nn.Module):
    """Logits from images: x (N, nc, image_size, image_size) in [-1, 1] → (N,); D(x) is their sigmoid."""

    def __init__(self, image_size=64, ndf=64, nc=3, kernel_size=4):
        super().__init__()
        self.image_size = image_size
        down = dict(kernel_size=kernel_size, stride=2, padding=(kernel_size - 1) // 2, bias=False)  # halves the size
        cs = [ndf * w for w in reversed(widths(image_size))]
        layers = [nn.Conv2d(nc, cs[0], **down), nn.LeakyReLU(0.2)]                                  # (ndf) x 32 x 32
        for c_in, c_out in zip(cs, cs[1:]):
            layers += [nn.Conv2d(c_in, c_out, **down), nn.BatchNorm2d(c_out), nn.LeakyReLU(0.2)]    # … (ndf*8) x 4 x 4
        layers += [nn.Conv2d(cs[-1], 1, 4, bias=False)]                                             # 1 x 1 x 1
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
    """float32 (len(seeds), nz) on the CPU, N(0, 1) or uniform on [-1, 1]; seed n is the same row in any company."""
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

    A square of side s, uniform from S to H, anywhere in the frame, resized to S×S (bilinear): the write-up's cropping,
    down-scaling and translation in one batched operation. `mirror` flips half of them.
    """
    N, H, W, _ = frames.shape
    side, top, left, flip = torch.rand(4, N, 1, device=frames.device, generator=generator)
    side = image_size + side * (H - image_size)
    ticks = (torch.arange(image_size, device=frames.device) + 0.5) / image_size  # pixel centres, 0 to 1 in the window
    y = (top * (H - side) + ticks * side) * (2 / H) - 1  # (N, S), -1 to 1 across the frame, as grid_sample wants it
    x = torch.where(flip < 0.5, 1 - ticks, ticks) if mirror else ticks
    x = (left * (W - side) + x * side) * (2 / W) - 1
    grid = torch.stack([x[:, None, :].expand(-1, image_size, -1), y[:, :, None].expand(-1, -1, image_size)], dim=3)
    images = F.grid_sample(frames.permute(0, 3, 1, 2).float(), grid, align_corners=False)
    return images / 127.5 - 1


@torch.no_grad()
def render(G, z, scale=1, batch_size=64):
    """Pictures of latents z (N, nz), made on G's device: uint8 (N, 3, S·scale, S·scale) on the CPU, bicubic.

    In batches of one size, the last filled up: a latent gives the same picture in any company. G is in eval mode.
    """
    if (size := len(z) * 3 * (G.image_size * scale) ** 2) > 2 ** 32:
        raise InputError(f"{len(z):,} pictures at once are {size / 2 ** 30:.1f} GB: ask for fewer or smaller ones")
    device, pictures = next(G.parameters()).device, []
    for part in z.split(batch_size):
        images = G(torch.cat([part, part.new_zeros(batch_size - len(part), G.nz)]).to(device))
        if scale > 1:
            images = F.interpolate(images, scale_factor=scale, mode="bicubic")
        pictures.append(((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()[:len(part)])
    return torch.cat(pictures).expand(-1, 3, -1, -1)  # grey pictures too


# ---- the score ------------------------------------------------------------------------------------------------------

def projections(batches):
    """Sorted projections of a set's patches, as sliced Wasserstein distance compares them: (128, 64 N) for each scale.

    `batches` of images, (n, 3, S, S) in [-1, 1], N in all. Of each scale of a Laplacian pyramid, S down to 16 pixels:
    64 patches of 7×7 an image, every channel normalised over the set, along 128 random directions, always the same.
    """
    generator, levels = torch.Generator().manual_seed(0), {}
    for images in batches:
        while (S := images.shape[-1]) >= 16:
            smaller = F.avg_pool2d(images, 2)
            detail = images - F.interpolate(smaller, scale_factor=2, mode="bilinear") if S > 16 else images
            top, left = torch.randint(S - 6, (2, len(images), 64), generator=generator)
            patches = detail.unfold(2, 7, 1).unfold(3, 7, 1)  # (n, 3, S-6, S-6, 7, 7), a view
            patches = patches[torch.arange(len(images))[:, None], :, top, left]
            levels.setdefault(S, []).append(patches.reshape(-1, 3, 49))
            images = smaller
    sorted_projections = []
    for patches in map(torch.cat, levels.values()):  # (64 N, 3, 49)
        patches = (patches - patches.mean((0, 2), keepdim=True)) / patches.std((0, 2), keepdim=True)
        directions = F.normalize(torch.randn(128, 147, generator=generator))
        projected = directions @ patches.flatten(1).T
        with ThreadPoolExecutor() as pool:  # in place; torch's own sort would make indices too, at ten times the time
            list(pool.map(lambda row: row.sort(), projected.numpy()))
        sorted_projections.append(projected)
    return sorted_projections


class Score:
    """How far a generator's pictures are from a pack's held-out frames: score(G, latent) → float, smaller is closer.

    Sliced Wasserstein distance ×1000, the mean over scales (Karras et al. 2018, https://arxiv.org/abs/1710.10196,
    section 5). `floor` is what as many training frames get. Raises InputError where there are fewer than 50 of either.
    """

    def __init__(self, pack):
        self.N, self.image_size = min(len(pack.train), len(pack.holdout), 2048), pack.image_size
        if self.N < 50:
            raise InputError(f"{len(pack.train)} frames and {len(pack.holdout)} held out: a score needs 50 of each")
        self.real = self.project(pack.holdout)
        self.floor = self.distance(self.project(pack.train))

    def project(self, frames):
        generator = torch.Generator().manual_seed(0)
        parts = (torch.from_numpy(frames[part]) for part in (torch.arange(self.N) * len(frames) // self.N).split(256))
        return projections(cut_windows(part, self.image_size, generator=generator) for part in parts)

    def distance(self, fake):
        return 1000 * sum((a - b).abs().mean().item() for a, b in zip(self.real, fake)) / len(fake)

    def __call__(self, G, latent="normal"):
        z = latents(range(self.N), G.nz, latent)
        return self.distance(projections(render(G, part) / 127.5 - 1 for part in z.split(256)))


# ---- devices --------------------------------------------------------------------------------------------------------

GAUDI = ("habana-torch-plugin is not on the package index: it comes with Gaudi's own PyTorch, in its container or by "
         "its installer (docs.habana.ai, Installation Guide)")


def why_no_cuda():
    """What is missing for an NVIDIA GPU, or None. Raises InputError where torch has no kernels for the one there is."""
    if not torch.cuda.is_available():
        return ("no NVIDIA GPU or driver is found" if torch.version.cuda else
                f"this torch ({torch.__version__}) is built without CUDA")
    card, built = torch.cuda.get_device_capability(), torch.cuda.get_arch_list()  # (7, 0), ['sm_75', 'compute_120']
    for kind, major, minor in re.findall(r"(sm|compute)_(\d+)(\d)", " ".join(built)):
        if (kind == "compute" or int(major) == card[0]) and (int(major), int(minor)) <= card:
            return None
    if not torch.version.hip:
        raise InputError(f"--device cuda: torch {torch.__version__} has kernels for {' '.join(built)}, and "
                         f"{torch.cuda.get_device_name()} is sm_{card[0]}{card[1]}: install an older one ('torch<2.8')")


def why_no_hpu():
    """What is missing for a Gaudi card, or None. The one place where its plugin is loaded, which makes `hpu` exist."""
    try:
        import habana_frameworks.torch.core  # noqa: F401
        return None if torch.hpu.is_available() else "the plugin is there, but it finds no Gaudi card"
    except ModuleNotFoundError as error:
        return f"no module {error.name}; {GAUDI}"
    except Exception as error:  # the plugin's own words: no card, or a driver that does not fit it
        return f"the plugin does not load: {str(error).strip() or type(error).__name__}".splitlines()[0]


MISSING = {"cuda": why_no_cuda, "hpu": why_no_hpu, "cpu": lambda: None}  # best first
DEVICES = ("auto", *MISSING)


def choose_device(name="auto"):
    """One of DEVICES → torch.device; auto is the best there is. Raises InputError, which says what is missing."""
    for kind in MISSING if name == "auto" else [name]:
        problem = MISSING[kind]()
        if problem is None:
            return torch.device(kind)
    raise InputError(f"--device {name}: {problem}")


# ---- files ----------------------------------------------------------------------------------------------------------

FORMAT = 1  # of the dictionaries in checkpoint.pt and generator-*.pt; raised when their keys change their meaning


def load_file(path):
    """The dictionary in a checkpoint, its tensors on the CPU. Raises InputError if it is damaged or another format.

    Never runs code from the file (weights_only), and checks the zip's CRCs, which torch.load does not.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                folders = any(entry.external_attr & 16 for entry in archive.infolist())  # torch would read zeros there
                if archive.testzip() or folders:
                    raise InputError(f"{path} is damaged: a checksum in it is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (InputError, FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Exception as error:  # whatever a cut, changed or foreign file makes the readers raise
        raise InputError(f"{path} is damaged or no checkpoint ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no checkpoint but a {type(content).__name__}")
    if (version := str(content.get("format", FORMAT))) != str(FORMAT):
        raise InputError(f"{path} has format {version[:20]}, and this code reads {FORMAT}")
    return content


def load_first(paths):
    """(path, load_file's dictionary) of the first file that is there and sound; of a damaged one it warns."""
    problem = f"no checkpoint in {paths[0].parent}"
    for path in filter(Path.exists, paths):
        try:
            return path, load_file(path)
        except InputError as error:
            problem = str(error)
            print(f"warning: {problem}", file=sys.stderr)
    raise InputError(problem)


def write_file(path, data, sync=True, previous=None):
    """Write bytes so that after a kill or on a full disk there is the whole file or the one before, never a half.

    The file that it replaces gets the name `previous`, if one is given.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def find_run(path=None):
    """The Path that is named, or the run in runs/ that saved last. Raises InputError where there is none."""
    saved = sorted(Path("runs").glob("*/checkpoint*.pt"), key=os.path.getmtime)
    if not path and not saved:
        raise InputError("no run in runs/: train first (python train.py), or name one with --checkpoint")
    path = Path(path or saved[-1].parent)
    if not path.exists():
        raise InputError(f"no such checkpoint: {path}")
    return path


def checkpoints(run):
    """The two that a run keeps, newest first."""
    return [Path(run, "checkpoint.pt"), Path(run, "checkpoint-previous.pt")]


def rebuild(network, state, path):
    """A Generator or Discriminator with the weights in `state`, whose shapes give its sizes: eval mode, float32."""
    try:
        shapes = [v.shape for k, v in state.items() if k.endswith(".weight") and v.dim() == 4]
        sizes = shapes[0][:3]  # ndf, nc, kernel_size
        if network is Generator:
            sizes = shapes[0][0], *shapes[-1][:3]  # nz; ngf, nc, kernel_size
        with torch.device("meta"):  # no memory until the weights are put in
            net = network(2 ** (len(shapes) + 1), *sizes)
        net.load_state_dict(state, assign=True)
    except (AttributeError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path} holds no DCGAN {network.__name__.lower()} ({str(error).splitlines()[0]})") from error
    return net.float().eval().requires_grad_(False)


def load_generator(path=None):
    """(G in eval mode on the CPU, 'normal' or 'uniform') from a file or a run's folder; None is the newest in runs/.

    Of a run it is the one with the best score, or else the newest, and it says which. Takes generator-*.pt,
    checkpoint.pt, and a bare state dict as pytorch/examples' netG_*.pth. Raises InputError where there is none.
    """
    path = find_run(path)
    if path.is_dir():
        newest = sorted(path.glob("generator-[0-9]*.pt"), key=os.path.getmtime, reverse=True)
        path, content = load_first([path / "generator-best.pt", *newest, *checkpoints(path)])
        print(f"drawing from {path}")
    else:
        content = load_file(path)
    state = content.get("G_ema", content.get("G", content))
    return rebuild(Generator, state, path), content.get("latent", "normal")


def load_discriminator(path=None):
    """D in eval mode on the CPU, from a run's folder or its checkpoint.pt, which alone have one. Raises InputError."""
    path = find_run(path)
    path, content = load_first(checkpoints(path)) if path.is_dir() else (path, load_file(path))
    if "D" not in content:
        raise InputError(f"{path} has no discriminator: name a run's folder, or the checkpoint.pt in it")
    return rebuild(Discriminator, content["D"], path)


# ---- the command line -----------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """argparse, with its complaints as one InputError line instead of the whole usage."""

    def error(self, message):
        raise InputError(message)


def number(kind, least, most=10 ** 12):
    """An argparse type: an int or float from `least` to `most`."""
    def parse(text):
        value = kind(text)
        if not least <= value <= most:  # nan is neither
            raise argparse.ArgumentTypeError(f"{text} is not from {least} to {most:.15g}")
        return value

    parse.__name__ = {int: "whole number", float: "number"}[kind]  # argparse's word for what it is not
    return parse


def seed_list(text):
    """An argparse type: '0-63,100' → [0, …, 63, 100]."""
    spans = []
    if re.fullmatch(r"\d{1,18}(-\d{1,18})?(,\d{1,18}(-\d{1,18})?)*", text, re.ASCII):
        spans = [range(int(first), int(last or first) + 1) for first, last in re.findall(r"(\d+)-?(\d*)", text)]
    if not spans or not all(0 < len(span) <= 10 ** 7 for span in spans):
        raise argparse.ArgumentTypeError(f"{text} is no list of seeds: give it as 0-63,100 (a span holds 10 million)")
    return [seed for span in spans for seed in span]


def run(main):
    """Call a script's main(): what a user can put right becomes one line on stderr and exit status 2.

    SIGTERM and Ctrl-C unwind it, so that nothing half written stays, and it ends with that signal's own status.
    """
    def stop(signum, frame):
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)  # once is enough: now it cleans up
        raise KeyboardInterrupt(signum)

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, stop)
    try:
        return main()
    except KeyboardInterrupt as stopped:
        signal.signal(stopped.args[0], signal.SIG_DFL)
        os.kill(os.getpid(), stopped.args[0])
    except InputError as error:
        problem = error
    except OSError as error:  # no such folder, no permission, no room on the disk
        problem = f"{error.filename or 'writing'}: {error.strerror or error}"
    except (RuntimeError, MemoryError) as error:
        if "memory" not in f"{type(error)} {error}".lower():
            raise
        problem = "out of memory: choose smaller networks, a smaller batch or fewer pictures"
    print(f"error: {problem}", file=sys.stderr)
    sys.exit(2)
