"""Pictures: the networks' sizes, other people's weights, seeds that stay the same picture, and scenes without a seam."""
import math
import sys

import numpy as np
import pytest
from helpers import ROOT, run

sys.path.insert(0, str(ROOT))

import torch
import torch.nn as nn
from PIL import Image, ImageSequence

import interpolate
import model


@pytest.fixture(scope="module")
def lively(tmp_path_factory):
    """A generator whose pictures have strong colours, as after long training."""
    torch.manual_seed(0)
    G = model.Generator(32, 8, 4).apply(model.init_weights)
    for layer in G.main:
        layer.momentum = None  # batch norm's statistics become those of the next batch
    G(torch.randn(64, 8))
    G.main[-2].weight.data.mul_(10)
    file = tmp_path_factory.mktemp("generator") / "generator-000000064.pt"
    torch.save({"format": 1, "images": 64, "latent": "normal", "G": G.state_dict()}, file)
    return file


def count(net):
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("preset, parameters_of_G, parameters_of_D", [
    ("naive-64", 3_576_704, 2_765_568), ("clamp-64", 52_448_768, 2_765_568), ("safe-128", 48_772_864, 2_796_928)])
def test_the_presets_have_the_parameters_of_the_write_up(preset, parameters_of_G, parameters_of_D):
    p = model.PRESETS[preset]
    with torch.device("meta"):
        G = model.Generator(p["image_size"], p["nz"], p["ngf"], kernel_size=p["kernel_size"])
        D = model.Discriminator(p["image_size"], p["ndf"], kernel_size=p["kernel_size"])
    assert (count(G), count(D)) == (parameters_of_G, parameters_of_D)


@pytest.mark.parametrize("kernel_size", [4, 5])
@pytest.mark.parametrize("image_size", [32, 64, 128, 256])
def test_every_size_makes_and_judges_images_of_that_size(image_size, kernel_size):
    G, D = model.Generator(image_size, 8, 2, 3, kernel_size), model.Discriminator(image_size, 2, 3, kernel_size)
    images = G(torch.randn(2, 8))
    assert images.shape == (2, 3, image_size, image_size) and images.abs().max() <= 1
    assert D(images).shape == (2,)
    for size in (0, 16, 48, 512, -64):
        with pytest.raises(model.InputError):
            model.Generator(size)


def examples_generator(nz, ngf, nc):
    """The Generator of pytorch/examples/dcgan, written out as it is there."""
    return nn.ModuleDict({"main": nn.Sequential(
        nn.ConvTranspose2d(nz, ngf * 8, 4, 1, 0, bias=False), nn.BatchNorm2d(ngf * 8), nn.ReLU(True),
        nn.ConvTranspose2d(ngf * 8, ngf * 4, 4, 2, 1, bias=False), nn.BatchNorm2d(ngf * 4), nn.ReLU(True),
        nn.ConvTranspose2d(ngf * 4, ngf * 2, 4, 2, 1, bias=False), nn.BatchNorm2d(ngf * 2), nn.ReLU(True),
        nn.ConvTranspose2d(ngf * 2, ngf, 4, 2, 1, bias=False), nn.BatchNorm2d(ngf), nn.ReLU(True),
        nn.ConvTranspose2d(ngf, nc, 4, 2, 1, bias=False), nn.Tanh())})


@pytest.mark.parametrize("nc", [3, 1])
def test_weights_of_pytorch_examples_draw_the_same_pictures_here(tmp_path, nc):
    torch.manual_seed(0)
    theirs = examples_generator(20, 6, nc)
    theirs["main"](torch.randn(16, 20, 1, 1))  # so that the batch-norm statistics are someone's
    torch.save(theirs.state_dict(), tmp_path / "netG_epoch_24.pth")
    G, latent = model.load_generator(tmp_path / "netG_epoch_24.pth")
    z = model.latents(range(4), 20)
    with torch.no_grad():
        assert latent == "normal" and torch.equal(theirs["main"].eval()(z.view(4, 20, 1, 1)), G(z))
    if nc == 3:
        run("sample.py", "--checkpoint", "netG_epoch_24.pth", "--n", 4, "--device", "cpu", cwd=tmp_path)
        assert Image.open(tmp_path / "samples.png").size == (2 * 66 + 2, 2 * 66 + 2)


def test_a_seed_is_the_same_picture_in_any_company(trained, tmp_path):
    run("sample.py", "--checkpoint", trained, "--seeds", "0-99,7000000000", "--separate", "--out", tmp_path / "all", "--device", "cpu")
    done = run("sample.py", "--checkpoint", trained, "--seeds", "7000000000,42,3-5", "--separate", "--out", tmp_path / "some", "--device", "cpu")
    names = sorted(p.name for p in (tmp_path / "some").iterdir())
    assert names == ["00000003.png", "00000004.png", "00000005.png", "00000042.png", "7000000000.png"] and "5 pictures" in done.stdout
    for name in names:
        assert (tmp_path / "some" / name).read_bytes() == (tmp_path / "all" / name).read_bytes()
    G, latent = model.load_generator(trained)
    alone = model.render(G, model.latents([42], G.nz, latent))
    assert np.array_equal(alone[0].permute(1, 2, 0), Image.open(tmp_path / "all" / "00000042.png"))
    assert torch.equal(alone, model.render(G, model.latents(range(130), G.nz, latent))[42:43])


def test_a_grid_of_the_newest_run_needs_no_arguments(trained, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "tiny").symlink_to(trained, target_is_directory=True)
    run("sample.py", cwd=tmp_path)
    grid = Image.open(tmp_path / "samples.png")
    shown = Image.open(max((trained / "samples").glob("0*.png")))  # what training showed last: the same seeds
    assert grid.size == shown.size == (8 * 34 + 2, 8 * 34 + 2)
    assert np.abs(np.asarray(grid, int) - np.asarray(shown, int)).max() <= 1
    assert "(replaced)" in run("sample.py", "--scale", 2, "--n", 3, cwd=tmp_path).stdout
    assert Image.open(tmp_path / "samples.png").size == (2 * 66 + 2, 2 * 66 + 2)


def gap(a, b):
    return np.abs(np.asarray(a, float) - np.asarray(b, float)).mean()


@pytest.mark.parametrize("latent", ["normal", "uniform"])
def test_a_walk_goes_round_without_a_seam(latent):
    z = model.latents(range(5), 100, latent)
    walk = interpolate.loop(z, 10, latent)
    assert walk.shape == (50, 100) and torch.equal(walk[::10], z)
    steps = (walk - walk.roll(1, 0)).norm(dim=1)
    assert steps[0] <= 1.05 * steps[1:].max() and steps.min() > 0, "the last step, back to the start, is one like the others"
    if latent == "normal":
        assert walk.norm(dim=1).min() > 0.97 * z.norm(dim=1).min(), "slerp keeps the length that the generator knows"


def test_a_gif_ends_where_it_begins(lively, tmp_path):
    run("interpolate.py", "--checkpoint", lively, "--seeds", "0-3", "--frames", 8, "--device", "cpu", "--out", tmp_path / "scene.gif")
    gif = Image.open(tmp_path / "scene.gif")
    frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(gif)]
    assert len(frames) == 32 and frames[0].size == (32, 32) and gif.info["loop"] == 0
    neighbours = [gap(a, b) for a, b in zip(frames, frames[1:])]
    assert gap(frames[-1], frames[0]) <= max(neighbours)


def test_scenes_stand_side_by_side_and_the_name_says_the_type(lively, tmp_path):
    words = ["interpolate.py", "--checkpoint", lively, "--device", "cpu", "--frames", 3]
    run(*words, "--seeds", "0-5", "--grid", "3x1", "--out", tmp_path / "scenes.webp")
    webp = Image.open(tmp_path / "scenes.webp")
    assert webp.format == "WEBP" and webp.n_frames == 6 and webp.size == (3 * 34 + 2, 34 + 2)
    run(*words, "--seeds", "0-4", "--out", tmp_path / "walk.png")
    strip = Image.open(tmp_path / "walk.png")
    assert strip.format == "PNG" and strip.size == (15 * 34 + 2, 34 + 2)
    G, latent = model.load_generator(lively)
    corners = model.render(G, model.latents(range(5), G.nz, latent))
    for i, corner in enumerate(corners):
        assert np.array_equal(np.asarray(strip)[2:34, 2 + 34 * 3 * i:34 + 34 * 3 * i], corner.permute(1, 2, 0)), "its own seed"


def test_windows_cut_at_once_equal_windows_cut_one_by_one():
    """The batched crop against arithmetic a reader can check: bilinear at pixel centres, image by image."""
    N, H, W, S = 6, 40, 54, 32
    frames = torch.randint(0, 256, (N, H, W, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    for mirror in (False, True):
        torch.manual_seed(1)
        side, top, left, flip = torch.rand(4, N, 1).double().squeeze(2)
        torch.manual_seed(1)
        fast, flipped = model.cut_windows(frames, S, mirror), 0
        for i in range(N):
            s = S + side[i].item() * (H - S)
            ys = [top[i].item() * (H - s) + (j + 0.5) * s / S - 0.5 for j in range(S)]  # pixel y has its centre at y + 0.5
            xs = [left[i].item() * (W - s) + (j + 0.5) * s / S - 0.5 for j in range(S)]
            picture, slow = frames[i].double().numpy(), np.empty((S, S, 3))
            for j, y in enumerate(ys):
                for k, x in enumerate(xs):
                    y0, x0 = math.floor(y), math.floor(x)
                    total = np.zeros(3)
                    for yy, wy in ((y0, y0 + 1 - y), (y0 + 1, y - y0)):
                        for xx, wx in ((x0, x0 + 1 - x), (x0 + 1, x - x0)):
                            if 0 <= yy < H and 0 <= xx < W:
                                total += wy * wx * picture[yy, xx]
                    slow[j, k] = total
            if mirror and flip[i] < 0.5:
                slow, flipped = slow[:, ::-1], flipped + 1
            assert np.abs(fast[i].permute(1, 2, 0).numpy() - (slow / 127.5 - 1)).max() < 1e-3
            assert min(ys) > -0.5 and max(ys) < H - 0.5 and min(xs) > -0.5 and max(xs) < W - 0.5
        assert not mirror or 0 < flipped < N


def test_a_window_of_a_photograph_looks_like_one_resized_by_pillow():
    ramp = np.linspace(0, 255, 54)[None, :, None] * 0.5 + np.linspace(0, 255, 40)[:, None, None] * 0.5 + np.zeros(3)
    frames = torch.from_numpy(ramp.astype(np.uint8))[None].expand(4, -1, -1, -1)
    torch.manual_seed(5)
    side, top, left, _ = torch.rand(4, 4, 1).squeeze(2).tolist()
    torch.manual_seed(5)
    for i, window in enumerate(model.cut_windows(frames, 32)):
        s = 32 + side[i] * 8
        box = (left[i] * (54 - s), top[i] * (40 - s), left[i] * (54 - s) + s, top[i] * (40 - s) + s)
        want = Image.fromarray(frames[i].numpy()).resize((32, 32), Image.Resampling.BILINEAR, box=box)
        got = (window.permute(1, 2, 0) + 1) * 127.5
        assert np.abs(got.numpy() - np.asarray(want, float)).max() < 2.5


def test_the_cost_of_a_step_is_what_the_layers_say():
    """--benchmark's arithmetic against the multiplications of each layer, counted by hand for one."""
    import train
    args = train.parse_args("--image-size 32 --nz 8 --ngf 4 --ndf 4".split())
    G = 2 * 16 * (8 * 16 * 1 + 16 * 8 * 16 + 8 * 4 * 64 + 4 * 3 * 256)    # 4×4 kernels: in · out · places read
    D = 2 * 16 * (3 * 4 * 256 + 4 * 8 * 64 + 8 * 16 * 16 + 16 * 1 * 1)
    assert train.gflop_per_image(args) == pytest.approx((3 * G + 8 * D) / 1e9, rel=0.02)


def test_what_cannot_be_drawn_is_a_line(tmp_path):
    (tmp_path / "weights.pth").write_text("no weights")
    for path, says in (("nowhere", "no such checkpoint"), ("weights.pth", "is damaged or no checkpoint"), (".", "no checkpoint in")):
        with pytest.raises(model.InputError, match=says):
            model.load_generator(tmp_path / path)
    assert "train first" in run("sample.py", status=2, cwd=tmp_path).stderr
    for words in (["--out", "scene.mp4"], ["--seeds", "0-6", "--grid", "3x1"]):
        with pytest.raises(model.InputError):
            interpolate.parse_args(words)
    assert [p.name for p in tmp_path.iterdir()] == ["weights.pth"]
