"""Pictures: networks, other people's weights, seeds, pages, loops, the score, the experiments."""
import base64
import csv
import io
import json
import os
import re
import runpy
import signal
import sys
from pathlib import Path

import browser
import numpy as np
import pytest
from helpers import ROOT, run

sys.path.insert(0, str(ROOT))

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageSequence

import interpolate
import model
import prepare_data
import sample

SIZES = dict(image_size=32, kernel_size=4, nz=8, ngf=4, ndf=4, latent="normal")


@pytest.fixture(scope="module")
def lively(tmp_path_factory):
    """A run whose pictures have large areas of strong colours, as after long training."""
    torch.manual_seed(0)
    G = model.Generator(32, 8, 4).apply(model.init_weights)
    D = model.Discriminator(32, 4).apply(model.init_weights)
    for layer in G.main[1:]:
        if isinstance(layer, nn.ConvTranspose2d):  # equal weights: no fine grain
            layer.weight.data[:] = layer.weight.data.mean((2, 3), keepdim=True)
        layer.momentum = None  # batch norm's statistics become those of the next batch
    G(torch.randn(64, 8))
    G.main[-2].weight.data.mul_(20)

    run = tmp_path_factory.mktemp("runs") / "lively"
    run.mkdir()
    content = {"G": G.state_dict(), "G_ema": G.state_dict(), "D": D.state_dict(), "sizes": SIZES}
    torch.save(content, run / "best.pt")
    return run


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """call(sample, *words): run a script's main() in an empty folder, without a new process.

    Returns what the script printed. With status 2 it is the last line, which says what is wrong.
    """
    monkeypatch.chdir(tmp_path)

    def call(script, *words, status=0):
        monkeypatch.setattr(sys, "argv", [script.__file__])
        words = ["--device", "cpu", *map(str, words)]
        if status == 0:
            script.main(words)
            return capsys.readouterr().out

        with pytest.raises(SystemExit) as end:
            model.run_script(lambda: script.main(words))
        assert end.value.code == status
        return capsys.readouterr().err.strip().splitlines()[-1]
    return call


def draw(file, seeds):
    """The pictures of seeds as arrays (N, H, W, 3), without the scripts."""
    G, latent = model.load_generator(file)
    return model.render(G, model.latents(seeds, G.nz, latent)).permute(0, 2, 3, 1).numpy()


def gap(a, b):
    return np.abs(np.asarray(a, float) - np.asarray(b, float)).mean()


def nearest_scene(picture, scenes):
    """Which of the scenes a picture shows, at any size. Its middle is compared at 12×12 pixels."""
    def summary(pixels):
        side = len(pixels)
        middle = pixels[side // 8:-side // 8, side // 8:-side // 8]
        return Image.fromarray(middle).resize((12, 12), Image.Resampling.BOX)

    shown = summary(np.asarray(picture))
    return int(np.argmin([gap(shown, summary(scene)) for scene in scenes]))


# ---- the networks --------------------------------------------------------------------------------
@pytest.mark.parametrize("preset, parameters_of_G, parameters_of_D", [
    ("naive-64", 3_576_704, 2_765_568),
    ("clamp-64", 52_448_768, 2_765_568),
    ("safe-128", 48_772_864, 2_796_928),
])
def test_the_presets_have_the_parameters_of_the_write_up(preset, parameters_of_G, parameters_of_D):
    p = model.PRESETS[preset]
    with torch.device("meta"):
        G = model.Generator(p["image_size"], p["nz"], p["ngf"], kernel_size=p["kernel_size"])
        D = model.Discriminator(p["image_size"], p["ndf"], kernel_size=p["kernel_size"])
    counts = [sum(p.numel() for p in net.parameters()) for net in (G, D)]
    assert counts == [parameters_of_G, parameters_of_D]


@pytest.mark.parametrize("kernel_size", [4, 5])
@pytest.mark.parametrize("image_size", [32, 64, 128, 256])
def test_every_size_makes_and_judges_images_of_that_size(image_size, kernel_size):
    G = model.Generator(image_size, 8, 2, 3, kernel_size)
    D = model.Discriminator(image_size, 2, 3, kernel_size)
    images = G(torch.randn(2, 8))
    assert images.shape == (2, 3, image_size, image_size) and images.abs().max() <= 1
    assert D(images).shape == (2,)
    for size in (0, 16, 48, 512, -64):
        with pytest.raises(model.InputError):
            model.Generator(size)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_a_generator_can_be_traced_and_exported_for_any_number_of_latents(lively):
    G, _ = model.load_generator(lively)
    z = model.latents(range(5), 8)
    traced = torch.jit.trace(G, z[:2])
    free = {"z": {0: torch.export.Dim("n", min=1, max=1024)}}
    exported = torch.export.export(G, (z[:2],), dynamic_shapes=free).module()
    for latents in (z, z[:3], z[:, :, None, None]):
        assert torch.allclose(traced(latents), G(latents), atol=1e-6)
    for n in (1, 3, 5):
        assert torch.allclose(exported(z[:n]), G(z[:n]), atol=1e-6)


# ---- files of other people -----------------------------------------------------------------------
def examples_generator(nz, ngf, nc):
    """The Generator of pytorch/examples/dcgan, a Sequential named main."""
    layers = [
        nn.ConvTranspose2d(nz, ngf * 8, 4, 1, 0, bias=False),
        nn.BatchNorm2d(ngf * 8),
        nn.ReLU(True),
    ]
    for width in (8, 4, 2):
        layers += [
            nn.ConvTranspose2d(ngf * width, ngf * width // 2, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ngf * width // 2),
            nn.ReLU(True),
        ]
    layers += [nn.ConvTranspose2d(ngf, nc, 4, 2, 1, bias=False), nn.Tanh()]
    return nn.ModuleDict({"main": nn.Sequential(*layers)})


@pytest.fixture
def theirs():
    """pytorch/examples' generator with batch-norm statistics of its own."""
    torch.manual_seed(0)
    G = examples_generator(20, 6, 3)
    G["main"](torch.randn(16, 20, 1, 1))
    return G.eval()


@pytest.mark.parametrize("nc", [3, 1])
def test_weights_of_pytorch_examples_draw_the_same_pictures_here(call, tmp_path, monkeypatch, nc):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    theirs = examples_generator(20, 6, nc)
    theirs["main"](torch.randn(16, 20, 1, 1))
    torch.save(theirs.state_dict(), "netG_epoch_24.pth")

    G, latent = model.load_generator("netG_epoch_24.pth")
    z = model.latents(range(4), 20)
    with torch.no_grad():
        assert torch.allclose(theirs["main"].eval()(z.view(4, 20, 1, 1)), G(z), atol=1e-5)
    assert latent == "normal"
    call(sample, "--checkpoint", "netG_epoch_24.pth", "--n", 4, "--scale", 1)
    assert Image.open("samples.png").size == (2 * 66 + 2, 2 * 66 + 2)


@pytest.mark.parametrize("nest", [None, "netG", "generator", "state_dict", "G", "G_ema"])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", ""])
def test_weights_with_prefixes_and_in_larger_files_open(call, theirs, prefix, nest):
    weights = {prefix + key: value for key, value in theirs.state_dict().items()}
    torch.save({nest: weights, "epoch": 24} if nest else weights, "file.pth")
    call(sample, "--checkpoint", "file.pth", "--seeds", 7, "--scale", 1)

    with torch.no_grad():
        z = model.latents([7], 20)
        image = theirs["main"](z.view(1, 20, 1, 1))[0].permute(1, 2, 0)
    assert gap(Image.open("samples.png"), (image + 1) * 127.5) < 1


def test_a_file_without_a_usable_generator_is_one_line_that_says_why(call, theirs, tmp_path):
    torch.save(theirs, "module.pth")
    torch.save(examples_generator(20, 6, 4).state_dict(), "four.pth")
    torch.save(torch.randn(3), "tensor.pth")
    torch.save({"epoch": 3}, "empty.pth")
    torch.save({"fc.weight": torch.randn(3, 4)}, "other.pth")
    Path("words.pth").write_text("no weights")
    for file, says in (
        ("module.pth", "save its state_dict"),
        ("four.pth", "4 channels"),
        ("tensor.pth", "not a checkpoint"),
        ("empty.pth", "no DCGAN generator"),
        ("other.pth", "no DCGAN generator"),
        ("words.pth", "damaged"),
    ):
        for script in (sample, interpolate):
            line = call(script, "--checkpoint", file, status=2)
            assert line.startswith("error: ") and file in line and says in line


def test_a_checkpoint_that_does_not_exist_is_one_line_with_those_that_do(call, lively, tmp_path):
    for script in (sample, interpolate):
        assert "train first" in call(script, status=2)
        assert "there is no nowhere" in call(script, "--checkpoint", "nowhere", status=2)
        assert "holds none of" in call(script, "--checkpoint", ".", status=2)
    for name in ("a", "b"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "checkpoint.pt").write_bytes((lively / "best.pt").read_bytes())
    line = call(sample, "--checkpoint", "runs/typo", status=2)
    assert str(Path("runs", "typo")) in line and str(Path("runs", "a")) in line
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


# ---- seeds ---------------------------------------------------------------------------------------
def test_a_seed_is_the_same_picture_whatever_the_other_seeds(lively, call):
    words = sample, "--checkpoint", lively, "--separate", "--seeds"
    call(*words, "0-99,7000000000", "--out", "all")
    call(*words, "7000000000,42,3-5,42", "--out", "new/some")
    names = sorted(path.name for path in Path("new/some").iterdir())
    assert names == ["00000003.png", "00000004.png", "00000005.png", "00000042.png",
                     "7000000000.png"]
    for name in names:
        assert Path("new/some", name).read_bytes() == Path("all", name).read_bytes()
    assert np.array_equal(draw(lively, [42])[0], Image.open("all/00000042.png"))
    assert np.array_equal(draw(lively, [42])[0], draw(lively, range(130))[42])


def test_pictures_that_were_there_before_are_counted(lively, call):
    words = sample, "--checkpoint", lively, "--separate", "--out", "fakes"
    assert "fakes: 20 pictures (0 replaced)" in call(*words, "--n", 20)
    assert "5 pictures (5 replaced; other PNGs from before: 15" in call(*words, "--n", 5)
    assert "2 pictures (1 replaced; other PNGs from before: 19" in call(*words, "--seeds", "7,40")


def test_a_list_of_seeds_that_cannot_be_read_is_one_line_that_says_how_to_write_it(call):
    for script in (sample, interpolate):
        for seeds, says in (
            ("40-7", "write 7-40"),
            ("1;2", "write 7,40 or 0-63,100"),
            ("", "is not a list of seeds"),
            ("1,,2", "is not a list of seeds"),
            ("99999999999999999999", "below 2^63"),
            ("0-99999999999", "10,000,000"),
        ):
            assert says in call(script, "--seeds", seeds, status=2)


# ---- one file ------------------------------------------------------------------------------------
def tiles(path, side, top=0):
    """The pictures of a grid: uint8 array (rows, columns, side, side, 3)."""
    sheet = np.asarray(Image.open(path))[top:]
    height, width, _ = sheet.shape
    rows = []
    for y in range(2, height - side, side + 2):
        rows.append([sheet[y:y + side, x:x + side] for x in range(2, width - side, side + 2)])
    return np.array(rows)


def test_sample_without_arguments_draws_64_pictures_of_the_newest_run(trained, call, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "tiny").symlink_to(trained, target_is_directory=True)
    done = run("sample.py", "--scale", 1, cwd=tmp_path)
    assert f"generator: {Path('runs', 'tiny')}" in done.stdout
    grid = Image.open(tmp_path / "samples.png")
    shown = Image.open(max((trained / "samples").glob("0*.png")))  # the same seeds, in training
    assert grid.size == shown.size == (8 * 34 + 2, 8 * 34 + 2)
    assert np.abs(np.asarray(grid, int) - np.asarray(shown, int)).max() <= 1
    assert "replaced" in call(sample, "--n", 3)


def test_a_grid_is_enlarged_to_a_size_that_can_be_seen(lively, call):
    assert "samples.png: 3 pictures (262×262 pixels)" in call(
        sample, "--checkpoint", lively, "--n", 3)
    grid = tiles("samples.png", 128)
    scenes = draw(lively, range(30))
    assert [nearest_scene(picture, scenes) for picture in grid[0]] == [0, 1]
    assert nearest_scene(grid[1, 0], scenes) == 2
    call(sample, "--checkpoint", lively, "--n", 3, "--scale", 2)
    assert Image.open("samples.png").size == (2 * 66 + 2, 2 * 66 + 2)
    for name in ("a.jpg", "a.webp", "a.JPEG"):
        call(sample, "--checkpoint", lively, "--n", 1, "--out", name)
        assert Image.open(name).size == (128, 128)


def test_more_pictures_than_a_grid_or_a_page_can_hold_are_refused_before_drawing(lively, call):
    words = sample, "--checkpoint", lively, "--n"
    assert "add --separate" in call(*words, 50_000, status=2)
    line = call(*words, 70_000, "--out", "page.html", "--scale", 2, status=2)
    assert "at most 65,025" in line
    arithmetic = sample, "--checkpoint", lively, "--arithmetic"
    assert "too large: name fewer seeds" in call(*arithmetic, "0-3000 - 5", status=2)
    assert not list(Path().iterdir())


def test_out_that_cannot_be_written_is_one_line(lively, call, tmp_path):
    Path("README.md").write_text("words")
    Path("folder.png").mkdir()
    Path("folder.html").mkdir()
    Path("samples").write_text("a file in the way of the default folder")
    for words, says in (
        ("--out samples2", "add --separate"),
        ("--out x.gif", "a .png, .jpg or .webp file"),
        ("--out .", "name a file or a folder"),
        ("--out . --separate", "name a file or a folder"),
        ("--out folder.png", "is a folder"),
        ("--out folder.html", "is a folder"),
        ("--out README.md/x.png", "README.md is a file"),
        ("--out README.md/deep/x.html", "README.md is a file"),
        ("--out README.md/x --separate", "README.md is a file"),
        ("--out README.md --separate", "README.md: it is a file"),
        ("--out new.png --separate", "write to a folder"),
        ("--separate", "samples is a file"),
        ("--arithmetic 5 --out x.html", "a .png, .jpg or .webp file"),
    ):
        line = call(sample, "--checkpoint", lively, "--n", 2, *words.split(), status=2)
        assert "error: " in line and says in line
    for words, says in (
        ("--out .", "name a file or a folder"),
        ("--out x.jpg", "or a folder for numbered pictures"),
        ("--out README.md/x.gif", "README.md is a file"),
        ("--out README.md/x", "README.md is a file"),
        ("--out samples", "samples is a file"),
        ("--grid 33x1 --seeds 0-32 --scale 16 --out x.webp", "x.webp: "),
    ):
        line = call(interpolate, "--checkpoint", lively, "--frames", 1, *words.split(), status=2)
        assert "error: " in line and says in line
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md", "folder.png", "folder.html", "samples"}


# ---- windows and packs ---------------------------------------------------------------------------
def test_windows_cut_in_a_batch_equal_windows_cut_one_by_one():
    """The reference is bilinear interpolation at pixel centres, as two matrix products."""
    N, H, W, S = 6, 40, 54, 32
    generator = torch.Generator().manual_seed(3)
    frames = torch.randint(0, 256, (N, H, W, 3), dtype=torch.uint8, generator=generator)

    def weights(start, side, size):  # (S, size): each row adds up to 1
        centres = start + (torch.arange(S).double() + 0.5) * side / S - 0.5
        assert -0.5 < centres.min() and centres.max() < size - 0.5, "the window is in the frame"
        return (1 - (centres[:, None] - torch.arange(size)).abs()).clamp(min=0)

    for mirror in (False, True):
        random = torch.rand(4, N, generator=torch.Generator().manual_seed(1)).double()
        side, top, left, flip = random
        windows = model.cut_windows(frames, S, mirror, torch.Generator().manual_seed(1))
        for i in range(N):
            s = S + side[i] * (H - S)
            down = weights(top[i] * (H - s), s, H)
            across = weights(left[i] * (W - s), s, W)
            if mirror and flip[i] < 0.5:
                across = across.flip(0)
            one = torch.einsum("yh,hwc,xw->cyx", down, frames[i].double(), across)
            assert (windows[i] - (one / 127.5 - 1)).abs().max() < 1e-3
        assert not mirror or 0 < (flip < 0.5).sum() < N


def test_spread_windows_are_always_the_same_and_cover_all_frames():
    colours = np.arange(100, dtype=np.uint8)
    frames = np.repeat(colours, 40 * 54 * 3).reshape(100, 40, 54, 3)  # frame i is of colour i
    for n, wanted in ((10, range(0, 100, 10)), (300, np.repeat(range(100), 3))):
        windows = torch.cat(list(model.spread_windows(frames, n, 32)))
        assert windows.shape == (n, 3, 32, 32)
        assert ((windows[:, 0, 5, 5] + 1) * 127.5).round().tolist() == list(wanted)
        assert torch.equal(windows, torch.cat(list(model.spread_windows(frames, n, 32))))


def write_pack(folder, image_size, train, holdout):
    """A pack made by hand, from {city: uint8 (N, H, W, 3)} for each split.

    Three frames are a sequence.
    """
    folder.mkdir()
    lines = ["split,row,city,sequence,key,source file"]
    counts = {}
    H, W = prepare_data.frame_size(image_size)
    for split, cities in (("train", train), ("holdout", holdout)):
        frames = np.concatenate([np.zeros((0, H, W, 3), np.uint8), *cities.values()])
        np.save(folder / f"{split}.npy", frames)
        named = [(city, i) for city, frames in cities.items() for i in range(len(frames))]
        for row, (city, i) in enumerate(named):
            lines.append(f"{split},{row},{city},{split}{i // 3},key,file")
        counts[split] = {city: len(frames) for city, frames in cities.items()}
    (folder / "index.csv").write_text("\n".join(lines) + "\n")
    info = dict(format=prepare_data.FORMAT, image_size=image_size, H=H, W=W, counts=counts,
                arguments={})
    (folder / "pack.json").write_text(json.dumps(info))
    return folder


def noise_frames(n, image_size, seed=0):
    H, W = prepare_data.frame_size(image_size)
    return np.random.default_rng(seed).integers(0, 256, (n, H, W, 3), np.uint8)


@pytest.fixture(scope="module")
def halves(pack, tmp_path_factory):
    """The drawn pack with every second frame of each city held out: enough for a score."""
    opened = prepare_data.open_pack(pack)
    cities = {}
    with open(pack / "index.csv", newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            frame = getattr(opened, line["split"])[int(line["row"])]
            cities.setdefault(line["city"], []).append(frame)
    folder = tmp_path_factory.mktemp("packs") / "halves"
    train = {city: frames[0::2] for city, frames in cities.items()}
    holdout = {city: frames[1::2] for city, frames in cities.items()}
    return write_pack(folder, 32, train, holdout)


# ---- windows of photographs ----------------------------------------------------------------------
def test_real_windows_are_training_frames_and_a_seed_is_always_the_same_one(call, tmp_path):
    colours = np.arange(1, 201, dtype=np.uint8)
    frames = np.repeat(colours, 40 * 54 * 3).reshape(200, 40, 54, 3)  # frame i is of one colour
    pack = write_pack(tmp_path / "pack", 32, {"Bath": frames}, {"Bath": noise_frames(5, 32)})
    assert "real: 100 pictures (0 replaced)" in call(sample, "--real", pack, "--n", 100)
    assert "2 pictures" in call(sample, "--real", pack, "--seeds", "77,1000", "--out", "some")

    shown = []
    for path in sorted(Path("real").iterdir()):
        picture = np.asarray(Image.open(path))
        assert picture.shape == (32, 32, 3) and picture.min() == picture.max() > 0
        shown.append(picture.min())
    assert len(set(shown)) > 60, "windows of all frames"
    assert Path("some/00000077.png").read_bytes() == Path("real/00000077.png").read_bytes()


def test_real_windows_are_cut_at_random_places_and_sizes(call, tmp_path):
    H, W = prepare_data.frame_size(32)
    ramp = np.broadcast_to(np.arange(W, dtype=np.uint8)[None, None, :, None] * 4, (1, H, W, 3))
    pack = write_pack(tmp_path / "pack", 32, {"Bath": ramp}, {"Bath": ramp})
    call(sample, "--real", pack, "--n", 60)
    rows = [np.asarray(Image.open(path), float)[16, :, 0] / 4 for path in Path("real").iterdir()]
    sides = [(row[-1] - row[0]) * 32 / 31 for row in rows]
    assert 31.5 < min(sides) < 33.5 and 38.5 < max(sides) < 40.5
    assert min(row[0] for row in rows) < 3 and max(row[-1] for row in rows) > W - 4


# ---- a page --------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def page(lively, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "streets.html"
    words = "--checkpoint", lively, "--device", "cpu", "--seeds", "0-38,9007199254740993"
    sample.main([*map(str, words), "--out", str(path)])
    return path


@pytest.fixture(scope="module", params=["desktop", "phone"])
def screen(request, page):
    if not (browser.CHROMIUM and browser.CHROMEDRIVER):
        pytest.skip("needs chromium and chromedriver")
    with browser.Browser(phone=request.param == "phone") as screen:
        yield screen


@pytest.fixture
def opened(screen, page):
    screen.open(page)
    screen.run("return document.getElementById('sheet').decode()")
    return screen


def shown_seed(browser):
    name = browser.run("return document.getElementById('name').textContent")
    alt = browser.run("return document.getElementById('picture').alt")
    seed = name.removeprefix("Seed ")
    assert alt == f"A street scene that does not exist, seed {seed}"
    return seed


def collected(browser):
    """The text to copy, or None where there is none."""
    return browser.run("return footer.hidden ? null : document.getElementById('text').value")


def test_a_page_is_one_file_without_addresses(page, call, lively):
    text = page.read_text(encoding="utf-8")
    addresses = re.findall(r"""(?:src|href)=["']?([^"'>]*)""", text)
    assert len(addresses) == 2 and all(address.startswith("data:") for address in addresses)
    assert "http" not in re.sub('base64,[^"]*', "", text)
    assert "<title>Street scenes that do not exist</title>" in text and 'lang="en"' in text
    sheet = Image.open(io.BytesIO(base64.b64decode(re.search('base64,([^"]*)', text)[1])))
    assert sheet.format == "WEBP" and sheet.size == (7 * 32, 6 * 32)


def test_a_page_says_how_large_it_is_and_that_it_was_replaced(lively, call):
    words = sample, "--checkpoint", lively, "--n", 1, "--out", "new/page.html"
    assert re.search(r"page.html: 1 picture \(\d+ KB\)", call(*words))
    assert "replaced" in call(*words)


def test_a_key_or_a_click_shows_another_scene_and_all_come_in_turn(opened):
    seeds = [shown_seed(opened)]
    for _ in range(39):
        opened.press("ArrowRight")
        seeds.append(shown_seed(opened))
    assert sorted(seeds, key=int) == [*map(str, range(39)), "9007199254740993"]
    opened.press("ArrowLeft")
    assert shown_seed(opened) == seeds[38]
    opened.press("Space")
    assert shown_seed(opened) == seeds[39]
    opened.click("#next")
    assert shown_seed(opened) == seeds[0]
    opened.press("Space")  # on the button that was clicked: it counts once
    assert shown_seed(opened) == seeds[1]


def test_two_clicks_collect_two_seeds_as_text(opened):
    assert collected(opened) is None
    opened.click("#all button:nth-child(8)")
    opened.click("#all button:nth-child(40)")
    assert collected(opened) == "--seeds 7,9007199254740993"
    assert shown_seed(opened) == "9007199254740993"
    opened.click("#all button:nth-child(8)")
    assert collected(opened) == "--seeds 9007199254740993"
    opened.click("#clear")
    assert collected(opened) is None
    assert opened.run("return document.querySelectorAll('[aria-pressed=true]').length") == 0


def test_the_keyboard_alone_collects_and_copies(opened):
    opened.press("ArrowRight", "c")
    first = shown_seed(opened)
    opened.press("ArrowRight", "c")
    assert collected(opened) == f"--seeds {first},{shown_seed(opened)}"
    opened.press("c")
    assert collected(opened) == f"--seeds {first}"
    opened.run("document.getElementById('copy').focus()")
    opened.press("Space")
    assert opened.run("return getSelection().toString() || text.value.slice(text.selectionStart, "
                      "text.selectionEnd)") == f"--seeds {first}"
    assert shown_seed(opened) != first, "space pressed the button and did not show another scene"


def test_the_pictures_of_a_page_are_those_of_the_seeds(opened, lively):
    scenes = draw(lively, range(39))
    for seed in (0, 8, 38):
        small = f"#all button:nth-child({seed + 1})"
        opened.click(small)
        assert nearest_scene(opened.look("#picture"), scenes) == seed
        opened.click(small)
        opened.run("document.activeElement.blur()")
        assert nearest_scene(opened.look(small), scenes) == seed


def test_a_page_fits_the_screen_and_loads_nothing(opened):
    width, content = opened.run("return [innerWidth, document.documentElement.scrollWidth]")
    assert content <= width
    assert opened.run("return document.querySelector('#all button').offsetWidth") >= 44
    assert opened.run("return performance.getEntriesByType('resource')"
                      ".filter(entry => !entry.name.startsWith('data:')).length") == 0


# ---- walks ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("latent", ["normal", "uniform"])
def test_a_walk_returns_to_its_start_without_a_jump(latent):
    z = model.latents(range(5), 100, latent)
    walk = interpolate.loop(z, 10, latent)
    assert walk.shape == (50, 100) and torch.equal(walk[::10], z)
    steps = (walk - walk.roll(1, 0)).norm(dim=1)
    assert steps[0] <= 1.05 * steps[1:].max() and steps.min() > 0, "the last leads to the start"
    if latent == "normal":
        assert walk.norm(dim=1).min() > 0.97 * z.norm(dim=1).min(), "slerp keeps the length"


@pytest.mark.parametrize("kind", ["gif", "webp"])
def test_a_scene_ends_where_it_begins_and_is_as_long_as_asked(lively, call, kind):
    words = interpolate, "--checkpoint", lively, "--seeds", "0-3", "--frames", 8, "--fps", 30
    call(*words, "--scale", 1, "--out", f"new/scene.{kind}")
    scene = Image.open(f"new/scene.{kind}")
    frames = []
    lengths = []
    for frame in ImageSequence.Iterator(scene):
        frames.append(frame.convert("RGB"))
        lengths.append(frame.info["duration"])
    assert len(frames) == 32 and frames[0].size == (32, 32) and scene.info["loop"] == 0
    assert sum(lengths) == pytest.approx(1000 * 32 / 30, abs=5) and set(lengths) == {30, 40}
    assert gap(frames[-1], frames[0]) <= max(gap(a, b) for a, b in zip(frames, frames[1:]))
    assert "replaced" in call(*words, "--out", f"new/scene.{kind}")


def test_scenes_are_enlarged_to_a_size_that_can_be_seen(lively, call):
    words = interpolate, "--checkpoint", lively, "--frames", 1
    assert "scene.gif: 6 frames, 256×256 pixels" in call(*words)
    assert Image.open("scene.gif").size == (256, 256)
    call(*words, "--grid", "2x1", "--out", "two.gif")
    assert Image.open("two.gif").size == (2 * 130 + 2, 132)
    call(*words, "--out", "walk.png")
    assert Image.open("walk.png").size == (6 * 130 + 2, 132)


def test_a_grid_shows_scenes_side_by_side(lively, call):
    call(interpolate, "--checkpoint", lively, "--frames", 3, "--seeds", "0-5", "--grid", "3x1",
         "--scale", 1, "--out", "scenes.webp")
    scenes = Image.open("scenes.webp")
    assert scenes.format == "WEBP" and scenes.n_frames == 6
    assert scenes.size == (3 * 34 + 2, 34 + 2)


def test_a_png_is_a_strip_that_passes_each_seed(lively, call):
    call(interpolate, "--checkpoint", lively, "--frames", 3, "--seeds", "0-4", "--scale", 1,
         "--out", "walk.png")
    strip = Image.open("walk.png")
    assert strip.format == "PNG" and strip.size == (15 * 34 + 2, 34 + 2)
    for i, seed in enumerate(draw(lively, range(5))):
        left = 2 + 34 * 3 * i
        assert np.array_equal(np.asarray(strip)[2:34, left:left + 32], seed)


def test_a_folder_gets_numbered_frames_for_a_video(lively, call):
    words = (interpolate, "--checkpoint", lively, "--seeds", "0-3", "--scale", 1,
             "--out", "new/scene")
    assert "12 frames, 32×32 pixels, 0 replaced" in call(*words, "--frames", 3)
    names = sorted(path.name for path in Path("new/scene").iterdir())
    assert names == [f"{i:08d}.png" for i in range(12)]
    for i, seed in enumerate(draw(lively, range(4))):
        assert np.array_equal(seed, Image.open(f"new/scene/{3 * i:08d}.png"))
    line = call(*words, "--frames", 1)
    assert "4 frames" in line and "4 replaced; other PNGs from before: 8" in line


def test_a_video_is_refused_with_the_commands_that_make_it(call):
    for name in ("x.mp4", "films/x.webm"):
        line = call(interpolate, "--out", name, status=2)
        folder = name.partition(".")[0]
        assert f"--out {folder}," in line
        assert f"ffmpeg -framerate 25 -i {folder}/%08d.png" in line


# ---- the score -----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def score(halves):
    pack = prepare_data.open_pack(halves)
    return model.Score(pack.train, pack.holdout, pack.image_size)


def judge(score, images):
    """(distance, coverage) of a set of images."""
    with torch.no_grad():
        return score.compare(score.describe(images.split(256)))


def real_images(score, frames):
    return torch.cat(list(model.spread_windows(frames, score.images, 32)))


def test_held_out_images_score_0_and_training_images_are_the_yardstick(halves, score):
    pack = prepare_data.open_pack(halves)
    assert judge(score, real_images(score, pack.holdout)) == (0, 1)
    assert judge(score, real_images(score, pack.train)) == pytest.approx(score.real, rel=1e-3)
    assert score.real[0] > 0 and score.real[1] > 0.5


def test_blurred_and_noisy_images_score_worse_than_real_ones(halves, score):
    real = real_images(score, prepare_data.open_pack(halves).train)
    blurred = F.interpolate(F.avg_pool2d(real, 2), 32, mode="bilinear")
    noisy = real + 0.1 * torch.randn(real.shape, generator=torch.Generator().manual_seed(0))
    assert score.real[0] < min(judge(score, blurred)[0], judge(score, noisy)[0])


def test_coverage_falls_when_the_pictures_repeat(halves, score):
    real = real_images(score, prepare_data.open_pack(halves).train)
    once = real[torch.linspace(0, len(real) - 1, 30).long()]

    def coverage(n):
        repeated = once[:n].repeat(len(real) // n + 1, 1, 1, 1)
        return judge(score, repeated[:len(real)])[1]

    assert coverage(3) < 0.5 * coverage(30) < 0.5 * score.real[1]


def test_pictures_of_one_colour_have_a_score(score):
    """Where nothing varies, normalising must not divide by zero."""
    distance, coverage = judge(score, torch.full((score.images, 3, 32, 32), 0.5))
    assert 0 < distance < float("inf") and coverage < 0.1


def test_the_score_is_printed_beside_that_of_real_images(halves, lively, call, tmp_path):
    text = call(sample, "--checkpoint", lively, "--score", halves)
    real_distance, real_coverage = map(float, re.findall(r"real images ([\d.]+)", text))
    distance = float(re.search(r"score ([\d.]+)", text)[1])
    coverage = float(re.search(r"coverage ([\d.]+)", text)[1])
    assert distance > 2 * real_distance > 0 and 0 <= coverage < 0.5 < real_coverage <= 1
    assert re.search(r"1,\d{3} images of each kind. "
                     "A smaller score is better. A larger coverage is better.", text)
    assert not list(tmp_path.iterdir()), "a score draws nothing"


# ---- the experiments of the paper ----------------------------------------------------------------
@pytest.mark.parametrize("latent", ["normal", "uniform"])
def test_arithmetic_that_cancels_leaves_the_seed_itself(lively, call, tmp_path, latent):
    content = torch.load(lively / "best.pt", weights_only=True)
    content["sizes"] = dict(SIZES, latent=latent)
    file = tmp_path / "checkpoint.pt"
    torch.save(content, file)
    call(sample, "--checkpoint", file, "--scale", 1, "--arithmetic", "5 - 5 + 7")

    heading = Image.open("arithmetic.png").height - (3 * 34 + 2)
    sheet = tiles("arithmetic.png", 32, top=heading)
    five, seven = draw(file, [5, 7])
    assert sheet.shape[:2] == (3, 3 + 1 + 3), "three terms, a gap, and the sums"
    assert np.array_equal(sheet[1, 5], seven), "the sum is in the middle of the nine"
    for row in (1, 2):  # the seed, and below it the mean of this seed alone
        assert np.array_equal(sheet[row, 0], five) and np.array_equal(sheet[row, 2], seven)
    around = [gap(sheet[row, column], seven) for row in range(3) for column in (4, 5, 6)]
    assert around.pop(4) == 0
    assert 0 < min(around) and max(around) < gap(five, seven), "noise changes a picture a little"


def test_columns_of_arithmetic_have_headings(lively, call):
    def headings(text):
        call(sample, "--checkpoint", lively, "--arithmetic", text)
        sheet = np.asarray(Image.open("arithmetic.png"))
        letters = sheet[:sheet.shape[0] % 130 - 2]
        assert letters.shape[0] > 16
        return [letters[:, i:i + 130] for i in range(0, letters.shape[1] - 2, 130)]

    first = headings("3,8 - 5,9 + 2,14")
    other = headings("3,8 - 5,7 + 2,14")
    terms, gap, sums = first[:3], first[3], first[5]
    assert min(heading.max() for heading in (*terms, sums)) > 200 > gap.max() == 0
    same = [np.array_equal(a, b) for a, b in zip(first, other)]
    assert same == [True, False, True, True, True, True, True]


def test_sums_have_the_length_of_latents_that_G_knows():
    terms = sample.terms_of_sum("3,8,21 - 5,9,30 + 2,14,40")
    assert terms == [("+", [3, 8, 21]), ("-", [5, 9, 30]), ("+", [2, 14, 40])]
    means = [model.latents(seeds, 100).mean(0) for _, seeds in terms]
    total = sample.combine(terms, 100, "normal")[0]
    plain = means[0] - means[1] + means[2]
    assert torch.allclose(total / total.norm(), plain / plain.norm(), atol=1e-5)
    for text in ("0-3", "0-7 + 100-107", "7 - 8 + 9", "1,2 + 1"):
        for latent in ("normal", "uniform"):
            z = sample.combine(sample.terms_of_sum(text), 10_000, latent)
            alone = model.latents([0], 10_000, latent)
            assert 0.9 < z.std() / alone.std() < 1.1
            assert latent == "normal" or z.abs().max() <= 1


def test_a_window_of_a_training_frame_finds_itself(tmp_path):
    blocks = [noise_frames(8, 32, seed=i) // 2 + 64 for i in range(250)]
    frames = np.concatenate(blocks)
    assert len(frames) > 2 ** 22 / (40 * 54 + 64 * 3), "more than are read at a time"
    image = torch.from_numpy(frames[[3, 1999, 700]]).permute(0, 3, 1, 2) / 127.5 - 1
    smaller = F.interpolate(image[2:], scale_factor=0.8, mode="bilinear")
    wanted = torch.cat([
        image[:1, :, 2:34, 6:38],  # as it is
        image[1:2, :, 8:40, 10:42].flip(3),  # mirrored
        smaller[:, :, :, 4:36],
    ])
    np.save(tmp_path / "frames.npy", frames)
    distances, found = sample.nearest_windows(tmp_path / "frames.npy", wanted)
    assert distances.max() < 0.01 and (found - wanted).abs().max() < 0.01

    np.save(tmp_path / "others.npy", np.delete(frames, [3, 1999, 700], 0))
    distances, _ = sample.nearest_windows(tmp_path / "others.npy", wanted)
    assert distances.min() > 3, "without these frames no window is like them"


def test_copies_are_nearer_to_training_images_than_held_out_images_are(pack, lively, call):
    text = call(sample, "--checkpoint", lively, "--nearest", pack, "--n", 36, "--scale", 1)
    figures = re.findall(r"(?:samples|held-out images|training images|ratio) (\d[\d.]*)", text)
    samples, held, copies, ratio = map(float, figures)
    assert copies < 0.7 * held and held < samples
    assert ratio == pytest.approx(samples / held, abs=0.02)

    sheet = np.asarray(Image.open("nearest.png"))
    assert sheet.shape == (6 * 34 + 2, 6 * 66 + 2, 3)
    drawn, found = np.split(sheet[2:34, 2:66], 2, axis=1)
    assert np.array_equal(drawn, draw(lively, [0])[0])
    image = torch.from_numpy(drawn.copy()).permute(2, 0, 1)[None] / 127.5 - 1
    _, nearest = sample.nearest_windows(pack / "train.npy", image)
    expected = ((nearest[0].permute(1, 2, 0) + 1) * 127.5).numpy()
    assert np.abs(found - expected).max() <= 0.51


def test_features_are_those_of_all_layers_at_4_by_4():
    D = model.Discriminator(32, 4).apply(model.init_weights).eval().requires_grad_(False)
    frames = noise_frames(2, 32)
    x = torch.cat(list(model.spread_windows(frames, 2, 32)))
    first = F.leaky_relu(F.conv2d(x, D.main[0].weight, stride=2, padding=1), 0.2)
    found = sample.window_features(D, frames)
    assert found.shape == (2, 16 * (4 + 8 + 16))
    corner = first[:, 0, 4:8, 4:8].amax((1, 2))
    assert torch.equal(found[:, 5], corner), "first map, second row and column of 4×4"
    assert torch.equal(found[:, -16 * 16:], D.main[:-1](x).flatten(1)), "this layer is 4×4 already"


def table(text):
    """{name: (accuracy, mean over cities)} that --features prints."""
    rows = re.findall(r"^(.+?) +([\d.]+)% +([\d.]+)%$", text, re.M)
    return {name: (float(accuracy), float(balanced)) for name, accuracy, balanced in rows}


def test_features_tell_cities_apart_and_on_gaudi_the_cpu_computes_them(
        halves, lively, call, monkeypatch):
    monkeypatch.setattr(sample, "choose_device", lambda name: torch.device("hpu"))
    text = call(sample, "--checkpoint", lively, "--features", halves)
    assert "--nearest and --features run on the CPU" in text and "6 cities, " in text
    found = table(text)
    assert list(found) == ["the largest city", "an untrained D", "D"]
    largest, balanced = found["the largest city"]
    assert balanced == pytest.approx(100 / 6, abs=0.1) and min(found["D"]) > 2 * largest > 0


def test_cities_that_differ_by_noise_alone_are_told_apart_by_chance(lively, call, tmp_path):
    """No label leaks: with 3 to 1 frames, no guess is better than always the larger city."""
    cities = [{"big": noise_frames(45, 32, i), "small": noise_frames(15, 32, i + 1)}
              for i in (0, 2)]
    cities[1]["unseen"] = noise_frames(5, 32, 9)  # without training frames: not counted
    noise = write_pack(tmp_path / "noise", 32, *cities)
    found = table(call(sample, "--checkpoint", lively, "--features", noise))
    assert found["the largest city"] == (75, 50)
    for accuracy, balanced in found.values():
        assert accuracy < 90 and 25 < balanced < 75


def test_a_pack_or_sum_that_an_experiment_cannot_use_is_one_line(pack, lively, call, tmp_path):
    three = noise_frames(3, 32)
    two_large = {"Bath": noise_frames(2, 64)}
    words = "--checkpoint", lively
    alone = write_pack(tmp_path / "alone", 32, {"Bath": three}, {"Bath": three})
    empty = write_pack(tmp_path / "empty", 32, {"Bath": three, "Ulm": three}, {})
    large = write_pack(tmp_path / "large", 64, two_large, two_large)
    for option in ("--features", "--nearest", "--score"):
        assert "both training and held-out" in call(sample, *words, option, empty, status=2)
        assert re.search("64 pixels.* 32", call(sample, *words, option, large, status=2))
        assert "nowhere" in call(sample, *words, option, "nowhere", status=2)
    assert "a score needs 50" in call(sample, *words, "--score", alone, status=2)
    assert "two cities" in call(sample, *words, "--features", alone, status=2)
    (alone / "index.csv").unlink()
    assert "index.csv" in call(sample, *words, "--features", alone, status=2)
    assert "nowhere" in call(sample, "--real", "nowhere", status=2)
    assert "--scale" in call(sample, "--real", pack, "--scale", 2, status=2)

    content = torch.load(lively / "best.pt", weights_only=True)
    torch.save({"G_ema": content["G_ema"], "sizes": SIZES}, tmp_path / "generator-000000064.pt")
    line = call(sample, "--features", pack, "--checkpoint", "generator-000000064.pt", status=2)
    assert "no DCGAN discriminator" in line
    (tmp_path / "generator-000000064.pt").unlink()

    for terms, says in (
        ("5 - 5", "cancel out"),
        ("5 -", "not a sum"),
        ("5 * 6", "not a sum"),
        ("5 - x", "not a list of seeds"),
        ("3,8-5", "with spaces around + and -"),
        ("", "not a sum"),
    ):
        assert says in call(sample, *words, "--arithmetic", terms, status=2)
    assert "not allowed with" in call(sample, *words, "--arithmetic", 5, "--score", pack, status=2)
    assert {path.name for path in tmp_path.iterdir()} == {"alone", "empty", "large"}


# ---- the command line ----------------------------------------------------------------------------
def test_a_value_that_makes_no_picture_is_refused_before_any_work(call):
    for words in ("--n 0", "--n -3", "--n 99999999999", "--scale 0", "--scale 99", "--seeds x",
                  "--n 3 --seeds 0-2", "--score pack --seeds 3", "--features pack --out a.png"):
        assert "sample.py: error: " in call(sample, *words.split(), status=2)
    for words in ("--frames 0", "--scale 0", "--fps 0", "--fps 51", "--grid 0x1", "--grid 3",
                  "--seeds 5-3", "--seeds 0-6 --grid 3x1"):
        assert "interpolate.py: error: " in call(interpolate, *words.split(), status=2)


def test_help_shows_the_commands_and_the_defaults(capsys):
    for script, default in ((sample, "0-63"), (interpolate, "scene.gif")):
        with pytest.raises(SystemExit):
            script.parse_args(["--help"])
        text = capsys.readouterr().out
        assert f"\n    python {Path(script.__file__).name}  " in text
        assert f"(default: {default})" in " ".join(text.split())


def state_of_the_process():
    return [
        torch.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),
        {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)},
        (sys.stdout, sys.stderr, sys.excepthook),
        (sys.stdout.errors, sys.stderr.errors),
        dict(os.environ),
        (torch.is_grad_enabled(), torch.get_num_threads(), torch.get_default_dtype()),
    ]


def test_a_main_called_from_a_notebook_leaves_the_process_as_it_was(halves, lively, call):
    call(sample, "--checkpoint", lively, "--n", 1)  # the first call may import more modules
    before = state_of_the_process()
    for words in ("--n 3", "--n 3 --out page.html", "--n 3 --separate", f"--score {halves}",
                  "--arithmetic 5", f"--features {halves}"):
        call(sample, "--checkpoint", lively, *words.split())
    call(sample, "--real", halves, "--n", 3)
    call(interpolate, "--checkpoint", lively, "--frames", 1)
    assert state_of_the_process() == before


@pytest.mark.parametrize("script", [sample, interpolate])
def test_importing_a_script_changes_nothing(script, monkeypatch):
    monkeypatch.delenv("TORCH_DEVICE_BACKEND_AUTOLOAD", raising=False)
    before = state_of_the_process()
    runpy.run_path(script.__file__, run_name="a_module")
    assert state_of_the_process() == before


def run_with_output(stream, script, checkpoint):
    """Run a script's main as a script, with this standard output."""
    words = ["--device", "cpu", "--checkpoint", str(checkpoint)]
    if script is interpolate:
        words += ["--frames", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        model.run_script(lambda: script.main(words))


@pytest.mark.parametrize("script, name", [(sample, "samples.png"), (interpolate, "scene.gif")])
@pytest.mark.parametrize("encoding", ["ascii", "cp1251", "cp437"])
def test_output_in_a_narrow_encoding_does_not_end_a_script(
        lively, script, name, encoding, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    run_with_output(stream, script, lively)
    assert name.encode() in stream.buffer.getvalue() and Path(name).exists()


@pytest.mark.parametrize("script, name", [(sample, "samples.png"), (interpolate, "scene.gif")])
def test_output_that_nobody_reads_does_not_end_a_script(
        lively, script, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream:
        run_with_output(stream, script, lively)
    assert Path(name).exists()
    Path(name).unlink()
    run_with_output(None, script, lively)  # as after `>&-`
    assert Path(name).exists()


@pytest.mark.parametrize("error, status", [
    (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), None),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), 2),
    (MemoryError(), 2),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: not enough memory"), 2),
    (RuntimeError("CUDA error: an illegal memory access was encountered"), None),
])
def test_too_little_memory_is_one_line_and_other_errors_keep_their_traceback(
        error, status, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit if status else type(error)) as end:
        model.run_script(main, memory_advice="choose fewer pictures")
    if status:
        assert end.value.code == status
        assert "error: out of memory: choose fewer pictures" in capsys.readouterr().err
