"""model.py: networks, presets, latents, windows, pictures, the score, and files of weights.

The figures come from the papers, the write-up and the README, or from a second implementation in NumPy.
"""
import os
import pickle
import resource
import runpy
import sys
from types import SimpleNamespace

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


def is_uniform(numbers, low, high):
    """Whether sorted numbers lie on the line from low to high (Kolmogorov and Smirnov, 0.1%)."""
    line = low + (high - low) * (np.arange(len(numbers)) + 0.5) / len(numbers)
    return np.abs(np.sort(numbers) - line).max() < 1.95 / len(numbers) ** 0.5 * (high - low)


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
    for kernel_size in (4, 5):
        G = model.Generator(image_size, 8, 2, kernel_size=kernel_size)
        D = model.Discriminator(image_size, 2, kernel_size=kernel_size)
        images = G(torch.randn(2, 8))
        assert images.shape == (2, 3, image_size, image_size) and images.abs().max() <= 1
        assert D(images).shape == (2,) and (G.image_size, G.nz) == (image_size, 8)
        kernels = {w.shape[2:] for net in (G, D) for w in net.parameters() if w.dim() == 4}
        assert kernels == {(4, 4), (kernel_size, kernel_size)}, "4×4 are G's first layer and D's last one"
    for network in (model.Generator, model.Discriminator):
        with pytest.raises(model.InputError, match="48"):
            network(48)


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


def test_networks_have_the_keys_of_pytorch_examples_and_compute_the_same():
    torch.manual_seed(0)
    plain_G, plain_D = plain_networks(20, 6, 5)
    G, D = model.Generator(64, 20, 6), model.Discriminator(64, 5)
    assert "main.12.weight" in G.state_dict() and "main.11.weight" in D.state_dict(), "their files' last keys"
    G.load_state_dict(plain_G.state_dict())
    D.load_state_dict(plain_D.state_dict())
    z = torch.randn(4, 20)
    images = plain_G["main"](z[:, :, None, None])
    assert torch.allclose(G(z), images, atol=1e-6) and torch.allclose(G(z[:, :, None, None]), images, atol=1e-6)
    assert torch.allclose(D(images), plain_D["main"](images).flatten(), atol=1e-6)


def test_weights_start_as_in_the_paper():
    """N(0, 0.02), batch-norm gains N(1, 0.02), their biases 0 (section 4)."""
    torch.manual_seed(0)
    for name, w in nn.ModuleList(plain_networks(100, 32, 32)).apply(model.init_weights).named_parameters():
        mean = 1 if name.endswith("weight") and w.dim() == 1 else 0
        std = 0 if name.endswith("bias") else 0.02
        assert abs(w.mean() - mean) < 0.01 and abs(w.std() - std) < 0.3 * std + 1e-9, name


# ---- latents, windows, pictures -------------------------------------------------------------------------------------
def test_seed_7_is_the_same_latent_on_every_machine():
    """The reference: NumPy's MT19937, 24 bits a number, Box and Muller's transform. Typed: torch 2.14's numbers."""
    def numbers(n):
        return (random.randint(0, 2 ** 32, n, np.uint32) % 2 ** 24) / 2 ** 24

    def bell(u):
        radius, angle = np.sqrt(-2 * np.log(1 - u[:8])), 2 * np.pi * u[8:]
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])

    random = np.random.RandomState(7)
    uniform = 2 * numbers(100) - 1
    random = np.random.RandomState(7)
    normal = np.concatenate([*map(bell, numbers(100)[:96].reshape(6, 16)), np.zeros(4)])
    normal[84:] = bell(numbers(16))  # the last 16 are drawn once more, because 100 is not a multiple of 16
    for kind, expected, typed in (("normal", normal, [-0.8201345, 0.3956312, 0.8989085, -1.3884039]),
                                  ("uniform", uniform, [0.0698451, -0.6023936, 0.3184234, 0.3137805])):
        z = model.latents([3, 7, 7], 100, kind).numpy()
        assert z.shape == (3, 100) and z.dtype == np.float32 and (z[1] == z[2]).all() and (z[0] != z[1]).all()
        assert np.abs(z[1] - expected).max() < 1e-5 and np.abs(z[1, :4] - typed).max() < 1e-5
    assert torch.equal(model.latents([2, 7], 100)[1], model.latents([7], 100, "normal")[0])


def ramp(n, H=40, W=54):
    """Frames whose red grows by 4 a pixel to the right, green by 6 a pixel downwards, and whose blue is 200."""
    y, x = np.mgrid[:H, :W]
    return np.broadcast_to(np.stack([4 * x, 6 * y, 200 + 0 * x], 2).astype(np.uint8), (n, H, W, 3)).copy()


def places(windows, H=40, W=54):
    """(side in pixels, top and left as shares of what is free, mirrored) of windows of ramp()."""
    red, green, blue = ((windows + 1) * 127.5).double().unbind(1)
    assert (blue - 200).abs().max() < 1e-3, "blue is the third channel"
    S = windows.shape[-1]
    side = (red[:, 0, -1] - red[:, 0, 0]).abs() / 4 * S / (S - 1)
    assert (side - (green[:, -1, 0] - green[:, 0, 0]) / 6 * S / (S - 1)).abs().max() < 1e-3, "a window is a square"
    left = torch.minimum(red[:, 0, 0], red[:, 0, -1]) / 4 + 0.5 - side / S / 2
    top = green[:, 0, 0] / 6 + 0.5 - side / S / 2
    mirrored = red[:, 0, -1] < red[:, 0, 0]
    return side.numpy(), (top / (H - side)).numpy(), (left / (W - side)).numpy(), mirrored.numpy()


def test_windows_are_squares_of_all_sizes_at_all_places():
    frames = torch.from_numpy(ramp(3000))
    windows = model.cut_windows(frames, 32, generator=torch.Generator().manual_seed(0))
    assert windows.dtype == torch.float32 and windows.shape == (3000, 3, 32, 32)
    side, top, left, mirrored = places(windows)
    free = side < 39  # in larger ones, top cannot be measured
    assert is_uniform(side, 32, 40) and is_uniform(left, 0, 1) and is_uniform(top[free], 0, 1) and not mirrored.any()
    assert np.abs(np.corrcoef([side[free], top[free], left[free]]) - np.eye(3)).max() < 0.07, "independent"
    assert not torch.equal(windows[:9], model.cut_windows(frames[:9], 32))
    black_and_white = torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, 32, 32, 3)
    assert torch.allclose(model.cut_windows(black_and_white, 32)[:, :, 0, 0], torch.tensor([[-1.], [1.]]))


def test_mirror_flips_half_of_the_windows_left_to_right():
    windows = model.cut_windows(torch.from_numpy(ramp(3000)), 32, True, torch.Generator().manual_seed(0))
    side, _, left, mirrored = places(windows)
    assert abs(mirrored.mean() - 0.5) < 0.03 and is_uniform(left[mirrored], 0, 1) and is_uniform(side[mirrored], 32, 40)


def test_spread_windows_are_always_the_same_and_cover_all_frames():
    frames = np.arange(100, dtype=np.uint8)[:, None, None, None] * np.ones((1, 40, 54, 3), np.uint8)
    for n, wanted in ((10, range(0, 100, 10)), (300, np.repeat(range(100), 3))):
        batches = list(model.spread_windows(frames, n, 32))
        assert max(map(len, batches)) <= 256 and batches[0].shape[1:] == (3, 32, 32)
        assert ((torch.cat(batches)[:, 0, 5, 5] + 1) * 127.5).round().tolist() == list(wanted)
    one, again = (torch.cat(list(model.spread_windows(ramp(40), 40, 32))) for _ in range(2))
    assert torch.equal(one, again) and places(one)[0].std() > 1, "of several sizes"


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
    torch.manual_seed(0)
    G, z = model.Generator(32, 8, 4).apply(model.init_weights), model.latents(range(9), 8)
    for layer in G.main[1::3]:
        layer.momentum = None  # the statistics become those of the next batch
    G(torch.randn(64, 8))
    G.eval().main[-2].weight.data.mul_(40)  # strong colours
    alone = torch.cat([model.render(G, z[i:i + 1]) for i in range(9)])
    assert alone.float().std(0).mean() > 20, "the pictures differ"
    for pictures in (model.render(G, z), model.render(G, z, batch_size=4), model.render(G, z[:, :, None, None])):
        assert (pictures.int() - alone.int()).abs().max() <= 1
    assert (model.render(G.half(), z).int() - alone.int()).abs().float().mean() < 0.5
    assert model.render(model.Generator(32, 8, 4, nc=1).eval(), z).shape == (9, 3, 32, 32), "grey ones get 3 channels"


def test_pictures_are_joined_in_rows_with_black_lines():
    colours = torch.tensor([[200, 0, 0], [0, 200, 0], [0, 0, 200]], dtype=torch.uint8)[:, :, None, None]
    sheet = np.asarray(model.join(colours.expand(3, 3, 4, 6), columns=2))
    assert sheet.shape == (2 * 6 + 2, 2 * 8 + 2, 3) and (sheet > 0).any(2).sum() == 3 * 4 * 6, "no fourth picture"
    for (row, column), colour in zip(((0, 0), (0, 1), (1, 0)), colours[:, :, 0, 0].numpy()):
        assert (sheet[2 + 6 * row:6 + 6 * row, 2 + 8 * column:8 + 8 * column] == colour).all()
    assert model.join(colours.expand(3, 3, 4, 6), 3, padding=0).size == (18, 4)


# ---- the score ------------------------------------------------------------------------------------------------------
def photographs(n, seed):
    """Frames (n, 40, 54, 3) with areas of soft colours and a little grain. Some are dark, some are bright."""
    random = np.random.default_rng(seed)
    coarse = torch.from_numpy(random.normal(128, 25, (n, 3, 5, 6)) + random.normal(0, 50, (n, 3, 1, 1)))
    soft = F.interpolate(coarse, (40, 54), mode="bicubic").permute(0, 2, 3, 1).numpy()
    return (soft + random.normal(0, 6, soft.shape)).clip(0, 255).astype(np.uint8)


def windows_of(n, seed):
    return torch.cat(list(model.spread_windows(photographs(n, seed), 1000, 32)))


def summary(images, network):
    """(patches of each level, features) of images (N, 3, 32, 32), as Karras et al. (section 5) define them.

    Only the places of patches and the network are model.py's own random numbers.
    """
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


def whitened(directions, patches):
    """Directions (128, 147) among whitened patches, as directions among patches.

    Each principal component is divided by its standard deviation, or by a hundredth of the largest one.
    """
    variances, components = np.linalg.eigh(np.cov(patches.T))
    return directions @ components / np.sqrt(variances.clip(1e-4 * variances.max())) @ components.T


def judged(held_out, images, groups):
    """(distance, coverage) of summaries. Coverage is counted within groups: image i is in group i modulo groups."""
    directions = F.normalize(torch.randn(128, 147, generator=torch.Generator().manual_seed(0))).double().numpy()
    gaps, covered = [], []
    for real, other in zip(held_out[0], images[0]):
        own = whitened(directions, real)
        gaps.append(np.abs(np.sort(own @ real.T) - np.sort(own @ other.T)).mean())
    for k in range(groups):
        real, other = held_out[1][k::groups], images[1][k::groups]
        for one in real:
            fifth = np.sort(np.linalg.norm(real - one, axis=1))[5]  # the first is the image itself
            covered.append(np.linalg.norm(other - one, axis=1).min() <= fifth)
    return 1000 * np.exp(np.log(gaps).mean()), np.mean(covered)


@pytest.fixture(scope="module")
def score():
    before = torch.get_rng_state()
    score = model.Score(photographs(60, 1), photographs(50, 2), 32)
    assert torch.equal(before, torch.get_rng_state()), "the caller's random numbers stay as they are"
    return score


def test_the_score_is_that_of_the_papers_formulas(score):
    network, images = model.untrained_network(32), Painter()(model.latents(range(1000), 8, "uniform"))
    found = score(Painter().eval(), "uniform")
    expected = judged(summary(windows_of(50, 2), network), summary(images, network), 20)
    assert found == pytest.approx(expected, rel=2e-3)
    assert (*score.real, *found) == pytest.approx((18.14, 0.981, 306.99, 0.929), rel=5e-3), "typed"


class Copies(Painter):
    """A generator whose picture of seed i is image i modulo n."""
    def __init__(self, images, n):
        super().__init__()
        self.images, self.n, self.known = images, n, model.latents(range(len(images)), self.nz)

    def forward(self, z):
        return self.images[torch.cdist(z, self.known).argmin(1) % self.n]


def test_held_out_images_have_a_perfect_score_and_repetition_costs_coverage(score):
    distance, coverage = score(Copies(windows_of(50, 2), 1000).eval())
    assert distance < 0.05 * score.real[0] and coverage == 1
    assert score(Copies(windows_of(60, 1), 3).eval())[1] < 0.5 * score.real[1]
    for few in ((49, 50), (50, 49)):
        with pytest.raises(model.InputError, match="50.*49"):
            model.Score(*(photographs(n, 3) for n in few), 32)


# ---- files ----------------------------------------------------------------------------------------------------------
SIZES = dict(image_size=32, kernel_size=4, nz=8, ngf=4, ndf=5, latent="uniform")


def save_run(file, seed=0):
    """A checkpoint like train.py's. Returns its G_ema."""
    torch.manual_seed(seed)
    G, average, D = model.Generator(32, 8, 4), model.Generator(32, 8, 4), model.Discriminator(32, 5)
    average.to(memory_format=torch.channels_last)(torch.randn(16, 8))  # statistics
    nets = {"G": G, "G_ema": average, "D": D}
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({name: net.state_dict() for name, net in nets.items()} | {"sizes": SIZES, "images": 48}, file)
    return average.eval()


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
    G, latent = model.open_generator(SimpleNamespace(checkpoint=tmp_path / "run", device="cpu"))
    assert draws_as(G, best) and latent == "uniform"
    assert capsys.readouterr().out == f"generator: {tmp_path / 'run' / 'best.pt'}\n"


def test_without_a_name_the_newest_run_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(model.InputError, match="train.py"):
        model.load_generator()
    nets = {name: save_run(tmp_path / "runs" / name / "checkpoint.pt", i) for i, name in enumerate("abc")}
    for newest in "bac":
        for name in "abc":
            os.utime(tmp_path / "runs" / name / "checkpoint.pt", (2000, 2000 + (name == newest)))
        assert draws_as(model.load_generator()[0], nets[newest])
    with pytest.raises(model.InputError, match="runs/typo.*runs/"):  # those that exist are named
        model.load_generator("runs/typo")


@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_of_pytorch_examples_draw_the_same_pictures(prefix, tmp_path):
    plain = plain_networks(20, 6, 5)[0]
    plain["main"](torch.randn(16, 20, 1, 1))  # statistics
    torch.save({prefix + key: value for key, value in plain.state_dict().items()}, tmp_path / "netG_epoch_24.pth")
    G, latent = model.load_generator(tmp_path / "netG_epoch_24.pth")
    assert draws_as(G, plain.eval()["main"]) and latent == "normal" and (G.image_size, G.nz) == (64, 20)


@pytest.mark.parametrize("names", [("epoch", "model_state_dict"), ("netG", "netD"), ("generator",), ("fc.weight",)])
def test_other_dictionaries_are_one_line_with_their_keys_and_what_to_save(names, tmp_path):
    weights = torch.zeros(3, 4) if names == ("fc.weight",) else model.Generator(32, 8, 4).state_dict()
    torch.save({name: 5 if name == "epoch" else weights for name in names}, tmp_path / "their.pth")
    with pytest.raises(model.InputError, match=r"^.*their\.pth.*state_dict\(\).*$") as error:
        model.load_generator(tmp_path / "their.pth")
    assert all(name in str(error.value) for name in names) and "\n" not in str(error.value)


def test_a_flipped_bit_is_found(tmp_path):
    average = save_run(tmp_path / "good.pt")
    data, found = (tmp_path / "good.pt").read_bytes(), 0
    for place in np.linspace(100, len(data) - 100, 60).astype(int):
        (tmp_path / "bad.pt").write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1:])
        try:
            G, _ = model.load_generator(tmp_path / "bad.pt")
            assert all(map(torch.equal, G.state_dict().values(), average.state_dict().values())), place
        except model.InputError as error:
            assert "bad.pt" in str(error) and "\n" not in str(error)
            found += 1
    assert found > 40, "the other bits are between the parts of the file"


def test_no_code_runs_from_a_file(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    torch.save({"G_ema": Bomb(), "sizes": SIZES}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Bomb()))
    torch.save(model.Generator(32, 8, 4), tmp_path / "c.pt")  # a whole network, with its class
    (tmp_path / "d.pt").write_text("no weights")
    torch.save(torch.zeros(3), tmp_path / "e.pt")
    for name in "abcde":
        with pytest.raises(model.InputError, match=rf"{name}\.pt"):
            model.load_generator(tmp_path / f"{name}.pt")
    assert not (tmp_path / "exploded").exists()


def test_model_py_needs_neither_pil_nor_torchvision(tmp_path, monkeypatch):
    save_run(tmp_path / "checkpoint.pt")
    with monkeypatch.context() as patch:
        for name in ["PIL", "PIL.Image", "torchvision", "torchvision.utils"]:
            patch.setitem(sys.modules, name, None)  # importing it fails
        copied = runpy.run_path(str(ROOT / "model.py"))
        G, latent = copied["load_generator"](tmp_path)
        pictures = copied["render"](G, copied["latents"](range(4), G.nz, latent))
    for name in ("torchvision", "torchvision.utils"):
        monkeypatch.setitem(sys.modules, name, None)
    assert copied["join"](pictures, 2).size == (70, 70), "PIL alone draws sheets"


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    file, limits = tmp_path / "new" / "folder" / "file.bin", resource.getrlimit(resource.RLIMIT_FSIZE)
    model.write_file(file, b"old")
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # a full disk
    try:
        with pytest.raises(OSError, match="file.bin"):
            model.write_file(file, bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == b"old"

    synced = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(file.read_bytes()))
    model.write_file(file, b"new")
    assert file.read_bytes() == b"new" and not synced
    model.write_file(file, b"newer", sync=True)
    assert file.read_bytes() == b"newer" and synced == [b"new"], "it is on the disk before the old one goes"
    assert os.listdir(file.parent) == ["file.bin"]
