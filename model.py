"""The networks, and all that the scripts share. Needs only torch: copy this file into your own project and

    from model import Generator, latents, load_generator
    G, latent = load_generator("runs/naive-64")      # or netG_epoch_24.pth, as pytorch/examples writes it
    images = G(latents(range(16), G.nz, latent))     # (16, 3, 64, 64) in [-1, 1]

The architecture is DCGAN's: Radford, Metz, Chintala 2015, https://arxiv.org/abs/1511.06434, section 3.
"""
import argparse
import os
import signal
import sys
import zipfile
from pathlib import Path

os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")  # Gaudi's plugin loads where we say so: choose_device

import torch
import torch.nn as nn
import torch.nn.functional as F

# A preset pins networks, latent distribution, batch, optimizer and instance noise; a flag on the command line wins over it.
# batch_size counts the images of one process, beta1 is Adam's, instance_noise the std of Gaussian noise on D's input.
NAIVE = dict(image_size=64, kernel_size=4, nz=100, ngf=64, ndf=64, latent="normal",
             batch_size=128, lr=2e-4, beta1=0.5, weight_decay=0.0, instance_noise=0.0)
PRESETS = {
    "radford-64": {**NAIVE, "kernel_size": 5, "ngf": 128, "ndf": 128, "latent": "uniform"},  # the paper to the letter
    "naive-64": NAIVE,                                                                       # pytorch/examples' sizes
    "clamp-64": {**NAIVE, "nz": 256, "ngf": 256, "batch_size": 256},                         # a strong G, a weak D
    "safe-128": {**NAIVE, "image_size": 128, "nz": 128, "ngf": 128, "ndf": 32, "batch_size": 256,
                 "weight_decay": 0.05, "instance_noise": 0.05},
}


class InputError(ValueError):
    """Something a user can put right: the scripts print it as one line, `error: …`, and exit with status 2."""


class Parser(argparse.ArgumentParser):
    """argparse, with its complaints as one InputError line instead of the whole usage."""

    def error(self, message):
        raise InputError(message)


def stop(signum, frame):
    raise KeyboardInterrupt(signum)


def run(main, *errors):
    """Call a script's main(); an InputError, or one of `errors`, becomes one line on stderr and exit status 2.

    SIGTERM and Ctrl-C unwind it, files half written are gone then, and it ends with that signal's own status.
    """
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, stop)
    try:
        main()
    except KeyboardInterrupt as stopped:
        signal.signal(stopped.args[0], signal.SIG_DFL)
        os.kill(os.getpid(), stopped.args[0])
    except (InputError, *errors) as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
    except OSError as error:  # no such folder, no permission, no room on the disk
        sys.exit(print(f"error: {error.filename or 'writing'}: {error.strerror or error}", file=sys.stderr) or 2)
    except (RuntimeError, MemoryError) as error:
        if "memory" not in f"{type(error)} {error}".lower():
            raise
        sys.exit(print("error: out of memory: choose smaller networks, a smaller batch or fewer pictures", file=sys.stderr) or 2)


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
        down = dict(kernel_size=kernel_size, stride=2, padding=(kernel_size - 1) // 2, bias=False)  # each halves the size
        cs = [ndf * w for w in reversed(widths(image_size))]
        layers = [nn.Conv2d(nc, cs[0], **down), nn.LeakyReLU(0.2)]                                  # (ndf) x 32 x 32
        for c_in, c_out in zip(cs, cs[1:]):
            layers += [nn.Conv2d(c_in, c_out, **down), nn.BatchNorm2d(c_out), nn.LeakyReLU(0.2)]    # … (ndf*8) x 4 x 4
        layers += [nn.Conv2d(cs[-1], 1, 4, bias=False)]                                             # 1 x 1 x 1
        self.main = nn.Sequential(*layers)

    def forward(self, x):
        return self.main(x).view(-1)


def init_weights(module):
    """For `net.apply`: weights N(0, 0.02), batch-norm gains N(1, 0.02) and biases 0 (paper, section 4, and its code)."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


# ---- seeds, latents and pictures ------------------------------------------------------------------------------------

def latents(seeds, nz, latent="normal"):
    """float32 (len(seeds), nz) on the CPU, N(0, 1) or uniform on [-1, 1]; seed n is the same row in any company."""
    z = torch.empty(len(seeds), nz)
    for row, seed in zip(z, seeds):
        generator = torch.Generator().manual_seed(seed)
        row.normal_(generator=generator) if latent == "normal" else row.uniform_(-1, 1, generator=generator)
    return z


def seed_list(text):
    """An argparse type: '0-63,100' → [0, …, 63, 100]."""
    seeds = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            first, last = int(first), int(last or first)
            if not first <= last < first + 10_000_000:
                raise ValueError
            seeds += range(first, last + 1)
    except ValueError:
        seeds = []
    if not seeds or max(seeds) >= 2 ** 63:
        raise argparse.ArgumentTypeError(f"{text} is no list of seeds: give it as 0-63,100 (a span holds 10 million)")
    return seeds


def number(kind, least, most=10 ** 12):
    """An argparse type: an int or float from `least` to `most`; nan is neither."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not a {'whole ' * (kind is int)}number from {least} to {most:.15g}")
        return value
    return parse


def cut_windows(frames, image_size, mirror=False):
    """A random window of each frame: uint8 (N, H, W, 3) → float32 (N, 3, S, S) in [-1, 1], on the frames' device.

    A square of side s, uniform from S to H, anywhere in the frame, resized to S×S (bilinear): the write-up's cropping,
    down-scaling and translation in one batched operation. `mirror` flips half of them.
    """
    N, H, W, _ = frames.shape
    side, top, left, flip = torch.rand(4, N, 1, device=frames.device)
    side = image_size + side * (H - image_size)
    ticks = (torch.arange(image_size, device=frames.device) + 0.5) / image_size  # pixel centres, 0 to 1 across the window
    y = (top * (H - side) + ticks * side) * (2 / H) - 1  # (N, S), -1 to 1 across the frame, as grid_sample wants it
    x = torch.where(flip < 0.5, 1 - ticks, ticks) if mirror else ticks
    x = (left * (W - side) + x * side) * (2 / W) - 1
    grid = torch.stack([x[:, None, :].expand(-1, image_size, -1), y[:, :, None].expand(-1, -1, image_size)], dim=3)
    images = F.grid_sample(frames.permute(0, 3, 1, 2).float(), grid, align_corners=False)
    return images / 127.5 - 1


@torch.no_grad()
def render(G, z, scale=1, batch_size=64):
    """Pictures of latents z (N, nz), made on G's device: uint8 (N, 3, S·scale, S·scale) on the CPU, enlarged by bicubics.

    In batches of one size, the last filled up, so that a latent gives the same picture in any company. G is in eval mode.
    """
    if (size := len(z) * 3 * (G.image_size * scale) ** 2) > 2 ** 32:
        raise InputError(f"{len(z):,} pictures at once would take {size / 2 ** 30:.1f} GB: ask for fewer or smaller ones")
    device, pictures = next(G.parameters()).device, []
    for part in z.split(batch_size):
        images = G(torch.cat([part, part.new_zeros(batch_size - len(part), G.nz)]).to(device))
        if scale > 1:
            images = F.interpolate(images, scale_factor=scale, mode="bicubic")
        pictures.append(((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()[:len(part)])
    return torch.cat(pictures).expand(-1, 3, -1, -1)  # grey pictures too


# ---- devices --------------------------------------------------------------------------------------------------------

GAUDI = ("habana-torch-plugin is not on the package index: it comes with Gaudi's own PyTorch, in its container or by its "
         "installer (docs.habana.ai, Installation Guide)")


def choose_device(name="auto"):
    """'auto', 'cuda', 'hpu' or 'cpu' → torch.device; auto is the best there is. Raises InputError saying what is missing.

    The one place where Gaudi's plugin is loaded: importing it makes the device `hpu` exist.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: " + ("no NVIDIA GPU or driver is found" if torch.version.cuda else
                                              f"this torch ({torch.__version__}) is built without CUDA"))
    if name == "hpu" or name == "auto" and not torch.cuda.is_available():
        try:
            import habana_frameworks.torch.core  # noqa: F401
            if torch.hpu.is_available():
                return torch.device("hpu")
            problem = "the plugin is there, but it finds no Gaudi card"
        except ModuleNotFoundError as error:
            problem = f"no module {error.name}; {GAUDI}"
        except Exception as error:  # the plugin's own words: no card, or a driver that does not fit it
            problem = f"the plugin does not load: {str(error).strip() or type(error).__name__}".splitlines()[0]
        if name == "hpu":
            raise InputError(f"--device hpu: {problem}")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


# ---- files ----------------------------------------------------------------------------------------------------------

FORMAT = 1  # of the dictionaries in checkpoint.pt and generator-*.pt; raised when their keys change


def load_file(path):
    """The dictionary in a checkpoint, with its tensors on the CPU. Raises InputError if it is damaged or another format.

    Never runs code from the file (weights_only), and checks the zip's CRCs, which torch.load does not.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                folders = any(member.external_attr & 16 for member in archive.infolist())  # torch reads nothing from these
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


def load_newest(run):
    """(path, dictionary) of a run folder's newest sound checkpoint: the last two are kept, and it says which is damaged."""
    problem = f"no checkpoint in {run}"
    for path in (Path(run, "checkpoint.pt"), Path(run, "checkpoint-previous.pt")):
        try:
            return path, load_file(path)
        except FileNotFoundError:
            continue
        except InputError as error:
            problem = str(error)
            print(f"warning: {problem}", file=sys.stderr)
    raise InputError(problem)


def load_generator(path=None):
    """(G in eval mode on the CPU, 'normal' or 'uniform') from a file or a run folder; None is the newest run in runs/.

    Takes checkpoint.pt, generator-*.pt, and a bare state dict as pytorch/examples' netG_*.pth, whose sizes are read off
    its shapes. Raises InputError when there is nothing to load or it is no generator.
    """
    if path is None:
        runs = [p for p in Path("runs").glob("*/") if any(p.glob("checkpoint*.pt"))]
        if not runs:
            raise InputError("no run in runs/: train first (python train.py), or name one with --checkpoint")
        path = max(runs, key=lambda run: max(p.stat().st_mtime for p in run.glob("checkpoint*.pt")))
    path = Path(path)
    if not path.exists():
        raise InputError(f"no such checkpoint: {path}")
    path, content = load_newest(path) if path.is_dir() else (path, load_file(path))
    state = content.get("G", content)
    try:
        shapes = [v.shape for k, v in state.items() if k.endswith(".weight") and v.dim() == 4]
        nz, nc, kernel_size = shapes[0][0], shapes[-1][1], shapes[-1][2]
        with torch.device("meta"):  # no memory until the weights are put in
            G = Generator(2 ** (len(shapes) + 1), nz, shapes[-1][0], nc, kernel_size)
        G.load_state_dict(state, assign=True)
    except (AttributeError, IndexError, TypeError, RuntimeError, InputError) as error:
        raise InputError(f"{path} holds no DCGAN generator ({str(error).splitlines()[0]})") from error
    return G.float().eval().requires_grad_(False), content.get("latent", "normal")
