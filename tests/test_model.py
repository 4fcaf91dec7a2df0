"""model.py: networks, presets, latents, windows, pictures, the score, and files of weights.

Figures come from the papers, the write-up and the README, or from a second implementation in NumPy.
"""
import errno
import os
import pickle
import runpy
import sys

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import ROOT

import model

OPTIONS = ("image_size", "kernel_size", "nz", "ngf", "ndf", "latent", "batch_size", "lr", "beta1", "weight_decay",
           "instance_noise", "augment", "mirror")
# The last two columns are the parameters of G and D. The write-up has those of naive-64, clamp-64 and safe-128.
# Numbers of radford-64 are the paper's (section 4), of naive-64 pytorch/examples'; the last three are the README's.
PRESETS = {
    "naive-64": (64, 4, 100, 64, 64, "normal", 128, 2e-4, 0.5, 0, 0, False, False, 3_576_704, 2_765_568),
    "radford-64": (64, 5, 100, 128, 128, "uniform", 128, 2e-4, 0.5, 0, 0, False, False, 18_855_040, 17_232_768),
    "clamp-64": (64, 4, 256, 256, 64, "normal", 256, 2e-4, 0.5, 0, 0, False, False, 52_448_768, 2_765_568),
    "safe-128": (128, 4, 128, 128, 32, "normal", 256, 2e-4, 0.5, 0.05, 0.05, False, False, 48_772_864, 2_796_928),
    "small-64": (64, 4, 100, 32, 32, "normal", 16, 2e-4, 0.5, 0, 0, True, True, 1_100_224, 694_656),
    "small-128": (128, 4, 100, 16, 16, "normal", 16, 2e-4, 0.5, 0, 0, True, True, 1_107_680, 702_144),
    "demo-64": (64, 4, 100, 24, 16, "normal", 16, 4e-4, 0.5, 0, 0, True, True, 696_144, 175_296),
}


# ---- networks and presets -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_has_the_numbers_and_the_parameters_of_its_source(preset):
    *numbers, of_G, of_D = PRESETS[preset]
    p = model.PRESETS[preset]
    assert p == dict(zip(OPTIONS, numbers)) and set(model.PRESETS) == set(PRESETS)
    with torch.device("meta"):
        G = model.Generator(p["image_size"], p["nz"], p["ngf"], kernel_size=p["kernel_size"])
        D = model.Discriminator(p["image_size"], p["ndf"], kernel_size=p["kernel_size"])
    assert [sum(weight.numel() for weight in net.parameters()) for net in (G, D)] == [of_G, of_D]


@pytest.mark.parametrize("image_size", [32, 64, 128, 256])
def test_every_image_size_is_drawn_and_judged(image_size):
    G, D = model.Generator(image_size, 8, 2, kernel_size=5), model.Discriminator(image_size, 2, kernel_size=5)
    images = G(torch.randn(2, 8))
    assert images.shape == (2, 3, image_size, image_size) and images.abs().max() <= 1
    assert D(images).shape == (2,) and (G.image_size, G.nz) == (image_size, 8)


def plain_networks(nz, ngf, ndf):
    """pytorch/examples' dcgan, whose networks have one Sequential each, named main."""
    G = [nn.ConvTranspose2d(nz, 8 * ngf, 4, 1, 0, bias=False), nn.BatchNorm2d(8 * ngf), nn.ReLU(True)]
    D = [nn.Conv2d(3, ndf, 4, 2, 1, bias=False), nn.LeakyReLU(0.2)]
    for i in (4, 2, 1):
        G += [nn.ConvTranspose2d(2 * i * ngf, i * ngf, 4, 2, 1, bias=False), nn.BatchNorm2d(i * ngf), nn.ReLU(True)]
    for i in (2, 4, 8):
        D += [nn.Conv2d(i * ndf // 2, i * ndf, 4, 2, 1, bias=False), nn.BatchNorm2d(i * ndf), nn.LeakyReLU(0.2)]
    G += [nn.ConvTranspose2d(ngf, 3, 4, 2, 1, bias=False), nn.Tanh()]
    D += [nn.Conv2d(8 * ndf, 1, 4, 1, 0, bias=False)]
    return [nn.ModuleDict({"main": nn.Sequential(*layers)}) for layers in (G, D)]


@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_of_pytorch_examples_fit_and_compute_the_same(prefix, tmp_path):
    torch.manual_seed(0)
    plain_G, plain_D = plain_networks(20, 6, 5)
    images = plain_G["main"](torch.randn(16, 20, 1, 1))  # makes statistics
    torch.save({prefix + key: value for key, value in plain_G.state_dict().items()}, tmp_path / "netG_epoch_24.pth")
    G, latent = model.load_generator(tmp_path / "netG_epoch_24.pth")
    assert draws_as(G, plain_G.eval()["main"]) and latent == "normal" and (G.image_size, G.nz) == (64, 20)
    D = model.Discriminator(64, 5)
    D.load_state_dict(plain_D.state_dict())
    assert torch.allclose(D(images), plain_D["main"](images).flatten(), atol=1e-6)


# ---- latents, windows, pictures -------------------------------------------------------------------------------------
def test_seed_7_is_the_same_latent_on_every_machine():
    """Uniform: NumPy's MT19937, 24 bits a number. Normal: torch 2.14's numbers, typed."""
    bits = np.random.RandomState(7).randint(0, 2 ** 32, 100, np.uint32) % 2 ** 24
    typed = [-0.8201345, 0.3956312, 0.8989085, -1.3884039]
    for kind, expected in (("normal", typed), ("uniform", 2 * bits / 2 ** 24 - 1)):
        z = model.latents([3, 7, 7], 100, kind).numpy()
        assert z.shape == (3, 100) and z.dtype == np.float32 and (z[1] == z[2]).all() and (z[0] != z[1]).all()
        assert np.abs(z[1, :len(expected)] - expected).max() < 1e-5


def ramp(n):
    """Frames (n, 40, 54, 3): red grows by 4 a pixel to the right, green by 6 a pixel downwards, and blue is 200."""
    y, x = np.mgrid[:40, :54]
    return np.stack([np.stack([4 * x, 6 * y, 200 + 0 * x], 2).astype(np.uint8)] * n)


def places(windows):
    """[side in pixels, top and left as shares of what is free] of windows of ramp()."""
    red, green, blue = ((windows + 1) * 127.5).double().numpy().transpose(1, 0, 2, 3)
    assert np.abs(blue - 200).max() < 1e-3, "blue is the third channel"
    width, height = (red[:, 0, -1] - red[:, 0, 0]) / 4, (green[:, -1, 0] - green[:, 0, 0]) / 6
    assert np.abs(width - height).max() < 1e-3, "a window is a square"
    side = width * 32 / 31
    top, left = (corner + 0.5 - side / 64 for corner in (green[:, 0, 0] / 6, red[:, 0, 0] / 4))
    return np.array([side, top / (40 - side), left / (54 - side)])


def test_windows_are_squares_of_all_sizes_at_all_places():
    windows = model.cut_windows(torch.from_numpy(ramp(3000)), 32, generator=torch.Generator().manual_seed(0))
    assert windows.dtype == torch.float32 and windows.shape == (3000, 3, 32, 32)
    found = places(windows)
    found = found[:, found[0] < 39]  # in larger ones, top cannot be measured
    tenths = np.arange(11)[:, None] / 10
    assert np.allclose(np.quantile(found, tenths[:, 0], axis=1), [32, 0, 0] + tenths * [7, 1, 1], rtol=0.005, atol=0.04)
    assert np.abs(np.corrcoef(found) - np.eye(3)).max() < 0.07, "independent"


def test_spread_windows_cover_all_frames_evenly():
    frames = np.arange(100, dtype=np.uint8)[:, None, None, None] * np.ones((1, 40, 54, 3), np.uint8)
    for n, wanted in ((10, range(0, 100, 10)), (300, np.repeat(range(100), 3))):
        batches = list(model.spread_windows(frames, n, 32))
        assert max(map(len, batches)) <= 256 and batches[0].shape[1:] == (3, 32, 32)
        assert ((torch.cat(batches)[:, 0, 5, 5] + 1) * 127.5).round().tolist() == list(wanted)


class Painter(nn.Module):
    """A generator of 4×4 squares in quiet colours, which are sums of the latent's numbers."""
    def __init__(self):
        super().__init__()
        self.nz, random = 8, torch.Generator().manual_seed(1)
        colours = torch.randn(8, 3, 1, 1, generator=random) / 3 + torch.randn(8, 3, 4, 4, generator=random) / 9
        self.colours = nn.Parameter(colours, requires_grad=False)

    def forward(self, z):
        return F.interpolate(torch.einsum("nz,zchw->nchw", z.flatten(1), self.colours).tanh(), 32)


def test_a_picture_is_its_image_rounded_to_grey_levels():
    G, z = Painter().eval(), model.latents(range(70), 8)
    pictures = model.render(G, z)
    assert pictures.dtype == torch.uint8 and pictures.shape == (70, 3, 32, 32)
    expected = np.rint((G(z).double().numpy() + 1) * 127.5)
    assert (pictures.numpy() != expected).mean() < 1e-3, "float32 can round a half to the other side"
    assert model.to_grey_levels(torch.tensor([-1.5, -1, -0.5, 0.5, 1, 1.5])).tolist() == [0, 0, 64, 191, 255, 255]
    twice = model.render(G, z[:2], scale=2)
    assert twice.shape == (2, 3, 64, 64) and twice.dtype == torch.uint8
    assert (twice != pictures[:2].repeat_interleave(2, 2).repeat_interleave(2, 3)).any(), "edges are smooth"
    assert (twice[:, :, 7::16, 7::16] == pictures[:2, :, 3::8, 3::8]).all(), "the squares' middles keep their colours"
    with pytest.raises(ValueError, match="eval"):
        model.render(G.train(), z)


def test_a_picture_depends_on_its_latent_alone():
    G, z = Painter().eval(), model.latents(range(9), 8)
    alone = torch.cat([model.render(G, z[i:i + 1]) for i in range(9)])
    assert alone.float().std(0).mean() > 20, "the pictures differ"
    for pictures in (model.render(G, z), model.render(G, z, batch_size=4), model.render(G, z[:, :, None, None])):
        assert (pictures.int() - alone.int()).abs().max() <= 1
    assert (model.render(G.half(), z).int() - alone.int()).abs().float().mean() < 0.5
    assert model.render(model.Generator(32, 8, 4, nc=1).eval(), z).shape == (9, 3, 32, 32), "grey ones get 3 channels"


# ---- the score ------------------------------------------------------------------------------------------------------
def photographs(n, seed):
    """Frames (n, 40, 54, 3) with areas of soft colours and a little grain. Some are dark, some are bright."""
    random = np.random.default_rng(seed)
    coarse = torch.from_numpy(random.normal(128, 25, (n, 3, 5, 6)) + random.normal(0, 50, (n, 3, 1, 1)))
    soft = F.interpolate(coarse, (40, 54), mode="bicubic").permute(0, 2, 3, 1).numpy()
    return (soft + random.normal(0, 6, soft.shape)).clip(0, 255).astype(np.uint8)


def summary(images, network):
    """(patches of each level, features) of images (N, 3, 32, 32), as Karras et al. (section 5) define them, at model.py's places."""
    generator, images = torch.Generator().manual_seed(0), np.rint((images.double().numpy() + 1) * 127.5) / 127.5 - 1
    at = ((np.arange(32) + 0.5) / 2 - 0.5).clip(0, 15)
    enlarge = (1 - np.abs(at[:, None] - np.arange(16))).clip(0)  # (32, 16): bilinear
    small = images.reshape(-1, 3, 16, 2, 16, 2).mean((3, 5))
    levels, patches = (images - enlarge @ small @ enlarge.T, small), ([], [])
    for start in range(0, len(images), 256):
        for level, found in zip(levels, patches):
            views = np.lib.stride_tricks.sliding_window_view(level[start:start + 256], (7, 7), (2, 3))
            top, left = torch.randint(views.shape[2], (2, len(views), 64), generator=generator).numpy()
            found.append(views[np.arange(len(views))[:, None], :, top, left].reshape(-1, 147))

    features, x = [], torch.from_numpy(images).float()
    for layer in network:
        if isinstance(layer, nn.Conv2d) and x.shape[1] > 3:  # the largest of each of 4×4 cells
            cells = x.numpy().reshape(len(x), x.shape[1], 4, x.shape[2] // 4, 4, x.shape[3] // 4)
            features.append(cells.max((3, 5)).reshape(len(x), -1))
        x = layer(x)
    return list(map(np.concatenate, patches)), np.concatenate(features, 1).astype(float)


def judged(held_out, images, groups):
    """(distance, coverage) of summaries. Coverage is counted within groups: image i is in group i modulo groups."""
    directions = F.normalize(torch.randn(128, 147, generator=torch.Generator().manual_seed(0))).double().numpy()
    gaps, covered = [], []
    for real, other in zip(held_out[0], images[0]):
        # Each principal component of patches has variance 1, or is raised a hundredfold at most.
        variances, components = np.linalg.eigh(np.cov(real.T))
        own = directions @ components / np.sqrt(variances.clip(1e-4 * variances.max())) @ components.T
        gaps.append(np.abs(np.sort(own @ real.T) - np.sort(own @ other.T)).mean())
    for k in range(groups):
        real, other = held_out[1][k::groups], images[1][k::groups]
        for one in real:
            fifth = np.sort(np.linalg.norm(real - one, axis=1))[5]  # the first is the image itself
            covered.append(np.linalg.norm(other - one, axis=1).min() <= fifth)
    return 1000 * np.exp(np.log(gaps).mean()), np.mean(covered)


def test_the_score_is_that_of_the_papers_formulas():
    before = torch.get_rng_state()
    score = model.Score(photographs(60, 1), photographs(50, 2), 32)
    assert torch.equal(before, torch.get_rng_state()), "the caller's random numbers stay as they are"
    network, images = model.untrained_network(32), Painter()(model.latents(range(1000), 8, "uniform"))
    held_out, train = (torch.cat(list(model.spread_windows(photographs(*n), 1000, 32))) for n in ((50, 2), (60, 1)))
    for found, judged_images in ((score(Painter().eval(), "uniform"), images), (score.real, train)):
        expected = judged(summary(held_out, network), summary(judged_images, network), 20)
        assert found == pytest.approx(expected, rel=2e-3)
    assert score.real == pytest.approx((18.14, 0.981), rel=5e-3), "typed"
    for few in ((49, 50), (50, 49)):
        with pytest.raises(model.InputError, match="50.*49"):
            model.Score(*(photographs(n, 3) for n in few), 32)


# ---- files ----------------------------------------------------------------------------------------------------------
SIZES = dict(image_size=32, kernel_size=4, nz=8, ngf=4, ndf=5, latent="uniform")


def save_run(file, seed=0):
    """A checkpoint like train.py's. Returns its G_ema."""
    torch.manual_seed(seed)
    nets = {"G": model.Generator(32, 8, 4), "G_ema": model.Generator(32, 8, 4), "D": model.Discriminator(32, 5)}
    nets["G_ema"].to(memory_format=torch.channels_last)(torch.randn(16, 8))  # makes statistics
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({name: net.state_dict() for name, net in nets.items()} | {"sizes": SIZES, "images": 48}, file)
    return nets["G_ema"].eval()


def draws_as(G, other):
    z = model.latents(range(4), G.nz)[:, :, None, None]
    with torch.no_grad():
        return torch.allclose(G(z), other(z), atol=1e-6)


def test_a_run_gives_its_best_generator_and_else_its_last(tmp_path, capsys):
    last = save_run(tmp_path / "run" / "checkpoint.pt", 1)
    G, latent = model.load_generator(tmp_path / "run")
    assert draws_as(G, last) and latent == "uniform" and not G.training
    assert all(w.is_contiguous() and w.dtype == torch.float32 for w in G.parameters()), "safetensors wants that"
    best = save_run(tmp_path / "run" / "best.pt", 2)
    assert draws_as(model.load_generator(str(tmp_path / "run"))[0], best)
    assert draws_as(model.load_generator(tmp_path / "run" / "checkpoint.pt")[0], last)
    assert capsys.readouterr() == ("", ""), "nothing is printed in other people's programs"


def test_without_a_name_the_newest_run_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(model.InputError, match="train.py"):
        model.load_generator()
    nets = [save_run(tmp_path / "runs" / name / "checkpoint.pt", i) for i, name in enumerate("abc")]
    for i, name in enumerate("bac"):
        os.utime(tmp_path / "runs" / name / "checkpoint.pt", (2000, 2000 + (i == 1)))
    assert draws_as(model.load_generator()[0], nets[0])
    with pytest.raises(model.InputError, match="runs/typo.*runs/"):  # those that exist are named
        model.load_generator("runs/typo")


@pytest.mark.parametrize("names", [("epoch", "model_state_dict"), ("netG", "netD"), ("generator",), ("fc.weight",)])
def test_other_dictionaries_are_one_line_with_their_keys_and_what_to_save(names, tmp_path):
    weights = torch.zeros(3, 4) if names == ("fc.weight",) else model.Generator(32, 8, 4).state_dict()
    torch.save({name: 5 if name == "epoch" else weights for name in names}, tmp_path / "their.pth")
    with pytest.raises(model.InputError, match=r"^.*their\.pth.*state_dict\(\).*$") as error:
        model.load_generator(tmp_path / "their.pth")
    assert all(name in str(error.value) for name in names) and "\n" not in str(error.value)


def test_a_damaged_or_foreign_file_is_one_line_and_runs_no_code(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    weights = save_run(tmp_path / "flipped.pt").main[0].weight.detach().permute(0, 2, 3, 1).numpy().tobytes()
    data = bytearray((tmp_path / "flipped.pt").read_bytes())
    data[data.index(weights) + 50] ^= 4
    (tmp_path / "flipped.pt").write_bytes(data)
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Bomb()))
    torch.save({"G_ema": Bomb(), "sizes": SIZES}, tmp_path / "bomb.pt")
    for file in tmp_path.glob("*.pt"):
        with pytest.raises(model.InputError, match=rf"^.*{file.name}.*$"):
            model.load_generator(file)
    assert not (tmp_path / "exploded").exists()


def test_model_py_needs_neither_pil_nor_torchvision(tmp_path, monkeypatch):
    save_run(tmp_path / "checkpoint.pt")
    monkeypatch.setitem(sys.modules, "torchvision", None)  # importing it fails
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "PIL", None)
        copied = runpy.run_path(str(ROOT / "model.py"))
        G, latent = copied["load_generator"](tmp_path)
        pictures = copied["render"](G, copied["latents"](range(4), G.nz, latent))
    assert copied["join"](pictures, 2).size == (70, 70), "PIL alone draws sheets"


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    file, on_disk = tmp_path / "new" / "folder" / "file.bin", []
    model.write_file(file, b"old")
    monkeypatch.setattr(os, "fsync", lambda number: on_disk.append(file.read_bytes()))
    model.write_file(file, b"new", sync=True)
    assert file.read_bytes() == b"new" and on_disk == [b"old"], "it is on the disk before the old one goes"
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="file.bin"):
        model.write_file(file, b"newest", sync=True)
    assert file.read_bytes() == b"new" and os.listdir(file.parent) == ["file.bin"]
