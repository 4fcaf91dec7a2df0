"""Pictures: network sizes, other people's weights, seeds, loops without a seam, the score, the paper's experiments."""
import csv
import json
import re
import shutil
import sys
from pathlib import Path

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
    torch.save({"images": 64, "latent": "normal", "G": G.state_dict()}, file)
    return file


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """call(sample, *words) runs a script's main() in an empty folder, which takes less time than a process of its own.

    Returns what the script printed. With status 2 it is the last line, which says what is wrong.
    """
    def call(script, *words, status=0):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [script.__file__, "--device", "cpu", *map(str, words)])
        if status == 0:
            script.main()
            return capsys.readouterr().out
        with pytest.raises(SystemExit) as end:
            model.run_script(script.main)
        assert end.value.code == status
        return capsys.readouterr().err.strip().splitlines()[-1]
    return call


def draw(file, seeds):
    """The pictures of seeds as arrays (N, H, W, 3), without the scripts."""
    G, latent = model.load_generator(file)
    return model.render(G, model.latents(seeds, G.nz, latent)).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("preset, parameters_of_G, parameters_of_D", [
    ("naive-64", 3_576_704, 2_765_568), ("clamp-64", 52_448_768, 2_765_568), ("safe-128", 48_772_864, 2_796_928)])
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
    G, D = model.Generator(image_size, 8, 2, 3, kernel_size), model.Discriminator(image_size, 2, 3, kernel_size)
    images = G(torch.randn(2, 8))
    assert images.shape == (2, 3, image_size, image_size) and images.abs().max() <= 1
    assert D(images).shape == (2,)
    for size in (0, 16, 48, 512, -64):
        with pytest.raises(model.InputError):
            model.Generator(size)


def examples_generator(nz, ngf, nc):
    """The Generator of pytorch/examples/dcgan: Sequential(ConvTranspose2d, BatchNorm2d, ReLU, …, Tanh) named main."""
    layers = [nn.ConvTranspose2d(nz, ngf * 8, 4, 1, 0, bias=False), nn.BatchNorm2d(ngf * 8), nn.ReLU(True)]
    for width in (8, 4, 2):
        layers += [nn.ConvTranspose2d(ngf * width, ngf * width // 2, 4, 2, 1, bias=False),
                   nn.BatchNorm2d(ngf * width // 2), nn.ReLU(True)]
    layers += [nn.ConvTranspose2d(ngf, nc, 4, 2, 1, bias=False), nn.Tanh()]
    return nn.ModuleDict({"main": nn.Sequential(*layers)})


@pytest.mark.parametrize("nc", [3, 1])
def test_weights_of_pytorch_examples_draw_the_same_pictures_here(call, tmp_path, monkeypatch, nc):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    theirs = examples_generator(20, 6, nc)
    theirs["main"](torch.randn(16, 20, 1, 1))  # changes the batch-norm statistics
    torch.save(theirs.state_dict(), "netG_epoch_24.pth")
    G, latent = model.load_generator("netG_epoch_24.pth")
    z = model.latents(range(4), 20)
    with torch.no_grad():
        assert latent == "normal" and torch.allclose(theirs["main"].eval()(z.view(4, 20, 1, 1)), G(z), atol=1e-5)
    call(sample, "--checkpoint", "netG_epoch_24.pth", "--n", 4)
    assert Image.open("samples.png").size == (2 * 66 + 2, 2 * 66 + 2)


def test_a_seed_is_the_same_picture_whatever_the_other_seeds(trained, call):
    words = sample, "--checkpoint", trained, "--separate", "--seeds"
    call(*words, "0-99,7000000000", "--out", "all")
    assert "5 pictures (0 replaced)" in call(*words, "7000000000,42,3-5", "--out", "new/some")
    assert "2 pictures (1 replaced)" in call(*words, "42,43", "--out", "new/some")
    names = sorted(path.name for path in Path("new/some").iterdir())
    assert names == [f"0000000{i}.png" for i in (3, 4, 5)] + ["00000042.png", "00000043.png", "7000000000.png"]
    for name in names:
        assert Path("new/some", name).read_bytes() == Path("all", name).read_bytes()
    assert np.array_equal(draw(trained, [42])[0], Image.open("all/00000042.png"))
    assert np.array_equal(draw(trained, [42])[0], draw(trained, range(130))[42])


def test_sample_without_arguments_draws_64_pictures_of_the_newest_run(trained, call, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "tiny").symlink_to(trained, target_is_directory=True)
    assert f"generator: {Path('runs', 'tiny')}" in run("sample.py", cwd=tmp_path).stdout
    grid = Image.open(tmp_path / "samples.png")
    shown = Image.open(max((trained / "samples").glob("0*.png")))  # the last grid of training: the same seeds
    assert grid.size == shown.size == (8 * 34 + 2, 8 * 34 + 2)
    assert np.abs(np.asarray(grid, int) - np.asarray(shown, int)).max() <= 1
    assert "(replaced)" in call(sample, "--scale", 2, "--n", 3)
    assert Image.open(tmp_path / "samples.png").size == (2 * 66 + 2, 2 * 66 + 2)


def gap(a, b):
    return np.abs(np.asarray(a, float) - np.asarray(b, float)).mean()


@pytest.mark.parametrize("latent", ["normal", "uniform"])
def test_a_walk_returns_to_its_start_without_a_jump(latent):
    z = model.latents(range(5), 100, latent)
    walk = interpolate.loop(z, 10, latent)
    assert walk.shape == (50, 100) and torch.equal(walk[::10], z)
    steps = (walk - walk.roll(1, 0)).norm(dim=1)
    assert steps[0] <= 1.05 * steps[1:].max() and steps.min() > 0, "the last step leads back to the start"
    if latent == "normal":
        assert walk.norm(dim=1).min() > 0.97 * z.norm(dim=1).min(), "slerp keeps the length of latents"


@pytest.mark.parametrize("kind", ["gif", "webp"])
def test_a_scene_ends_where_it_begins_and_is_as_long_as_asked(lively, call, kind):
    words = interpolate, "--checkpoint", lively, "--seeds", "0-3", "--frames", 8, "--fps", 30
    call(*words, "--out", f"new/scene.{kind}")
    scene, frames, lengths = Image.open(f"new/scene.{kind}"), [], []
    for frame in ImageSequence.Iterator(scene):
        frames.append(frame.convert("RGB"))
        lengths.append(frame.info["duration"])
    assert len(frames) == 32 and frames[0].size == (32, 32) and scene.info["loop"] == 0
    assert sum(lengths) == pytest.approx(1000 * 32 / 30, abs=5) and set(lengths) == {30, 40}
    assert gap(frames[-1], frames[0]) <= max(gap(a, b) for a, b in zip(frames, frames[1:]))
    assert "(replaced)" in call(*words, "--out", f"new/scene.{kind}")


def test_a_grid_shows_scenes_side_by_side(lively, call):
    call(interpolate, "--checkpoint", lively, "--frames", 3, "--seeds", "0-5", "--grid", "3x1", "--out", "scenes.webp")
    scenes = Image.open("scenes.webp")
    assert scenes.format == "WEBP" and scenes.n_frames == 6 and scenes.size == (3 * 34 + 2, 34 + 2)


def test_a_png_is_a_strip_that_passes_each_seed(lively, tmp_path):
    words = "--checkpoint", lively, "--device", "cpu", "--frames", 3, "--seeds", "0-4", "--out", tmp_path / "walk.png"
    run("interpolate.py", *words)
    strip = Image.open(tmp_path / "walk.png")
    assert strip.format == "PNG" and strip.size == (15 * 34 + 2, 34 + 2)
    for i, seed in enumerate(draw(lively, range(5))):
        left = 2 + 34 * 3 * i
        assert np.array_equal(np.asarray(strip)[2:34, left:left + 32], seed)


def test_windows_cut_in_a_batch_equal_windows_cut_one_by_one():
    """The reference is bilinear interpolation at pixel centres, as two matrix products for each image."""
    N, H, W, S = 6, 40, 54, 32
    frames = torch.randint(0, 256, (N, H, W, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))

    def weights(start, side, size):  # (S, size): each row adds up to 1
        centres = start + (torch.arange(S).double() + 0.5) * side / S - 0.5
        assert -0.5 < centres.min() and centres.max() < size - 0.5, "the window is in the frame"
        return (1 - (centres[:, None] - torch.arange(size)).abs()).clamp(min=0)

    for mirror in (False, True):
        side, top, left, flip = torch.rand(4, N, generator=torch.Generator().manual_seed(1)).double()
        windows = model.cut_windows(frames, S, mirror, torch.Generator().manual_seed(1))
        for i in range(N):
            s = S + side[i] * (H - S)
            across = weights(left[i] * (W - s), s, W)
            if mirror and flip[i] < 0.5:
                across = across.flip(0)
            one = torch.einsum("yh,hwc,xw->cyx", weights(top[i] * (H - s), s, H), frames[i].double(), across)
            assert (windows[i] - (one / 127.5 - 1)).abs().max() < 1e-3
        assert not mirror or 0 < (flip < 0.5).sum() < N


def test_spread_windows_are_always_the_same_and_cover_all_frames():
    frames = np.repeat(np.arange(100, dtype=np.uint8), 40 * 54 * 3).reshape(100, 40, 54, 3)  # frame i is of colour i
    for n, colours in ((10, range(0, 100, 10)), (300, np.repeat(range(100), 3))):
        windows = torch.cat(list(model.spread_windows(frames, n, 32)))
        assert windows.shape == (n, 3, 32, 32)
        assert ((windows[:, 0, 5, 5] + 1) * 127.5).round().tolist() == list(colours)
        assert torch.equal(windows, torch.cat(list(model.spread_windows(frames, n, 32))))


def write_pack(folder, image_size, train, holdout):
    """A pack made by hand, from {city: uint8 (N, H, W, 3)} for each split. Three frames are a sequence."""
    folder.mkdir()
    lines, counts = ["split,row,city,sequence,key,source file"], {}
    H, W = prepare_data.frame_size(image_size)
    for split, cities in (("train", train), ("holdout", holdout)):
        np.save(folder / f"{split}.npy", np.concatenate([np.zeros((0, H, W, 3), np.uint8), *cities.values()]))
        named = [(city, i) for city, frames in cities.items() for i in range(len(frames))]
        lines += [f"{split},{row},{city},{split}{i // 3},key,file" for row, (city, i) in enumerate(named)]
        counts[split] = {city: len(frames) for city, frames in cities.items()}
    (folder / "index.csv").write_text("\n".join(lines) + "\n")
    info = dict(format=prepare_data.FORMAT, image_size=image_size, H=H, W=W, counts=counts, arguments={})
    (folder / "pack.json").write_text(json.dumps(info))
    return folder


def noise_frames(n, image_size, seed=0):
    H, W = prepare_data.frame_size(image_size)
    return np.random.default_rng(seed).integers(0, 256, (n, H, W, 3), np.uint8)


@pytest.fixture(scope="module")
def halves(pack, tmp_path_factory):
    """The drawn pack with every second frame of each city held out: enough frames of both kinds for a score."""
    opened, cities = prepare_data.open_pack(pack), {}
    with open(pack / "index.csv", newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            cities.setdefault(line["city"], []).append(getattr(opened, line["split"])[int(line["row"])])
    folder = tmp_path_factory.mktemp("packs") / "halves"
    return write_pack(folder, 32, *({city: frames[i::2] for city, frames in cities.items()} for i in (0, 1)))


@pytest.fixture(scope="module")
def score(halves):
    return model.Score(prepare_data.open_pack(halves))


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
    many, few = (judge(score, once[:n].repeat(len(real) // n + 1, 1, 1, 1)[:len(real)])[1] for n in (30, 3))
    assert few < 0.5 * many < 0.5 * score.real[1]


def test_the_score_is_printed_beside_that_of_real_images(halves, lively, call, tmp_path):
    text = call(sample, "--checkpoint", lively, "--score", halves)
    real_distance, real_coverage = map(float, re.findall(r"real images ([\d.]+)", text))
    distance, coverage = float(re.search(r"score ([\d.]+)", text)[1]), float(re.search(r"coverage ([\d.]+)", text)[1])
    assert distance > 2 * real_distance > 0 and 0 <= coverage < 0.5 < real_coverage <= 1
    assert re.search(r"1,\d{3} images of each kind. A smaller score is better. A larger coverage is better.", text)
    assert not list(tmp_path.iterdir()), "a score draws nothing"


def tiles(path, side):
    """The rows of a grid's pictures: uint8 array (rows, columns, side, side, 3)."""
    sheet = np.asarray(Image.open(path))
    return np.array([[sheet[y:y + side, x:x + side] for x in range(2, sheet.shape[1] - side, side + 2)]
                     for y in range(2, sheet.shape[0] - side, side + 2)])


@pytest.mark.parametrize("latent", ["normal", "uniform"])
def test_arithmetic_that_cancels_leaves_the_seed_itself(lively, call, tmp_path, latent):
    file = tmp_path / "generator.pt"
    torch.save({**torch.load(lively, weights_only=True), "latent": latent}, file)
    call(sample, "--checkpoint", file, "--arithmetic", "5 - 5 + 7")
    sheet, (five, seven) = tiles("arithmetic.png", 32), draw(file, [5, 7])
    assert sheet.shape[:2] == (3, 3 + 1 + 3), "three terms, a gap, and the sums"
    assert np.array_equal(sheet[1, 5], seven), "the sum is in the middle of the nine"
    for row in (1, 2):  # the seed, and below it the mean of this seed alone
        assert np.array_equal(sheet[row, 0], five) and np.array_equal(sheet[row, 2], seven)
    around = [gap(sheet[row, column], seven) for row in range(3) for column in (4, 5, 6)]
    assert around.pop(4) == 0 and 0 < min(around) and max(around) < gap(five, seven), "noise changes a picture a little"


def test_sums_have_the_length_of_latents_that_G_knows():
    terms = sample.terms_of_sum("3,8,21 - 5,9,30 + 2,14,40")
    assert terms == [("+", [3, 8, 21]), ("-", [5, 9, 30]), ("+", [2, 14, 40])]
    means = [model.latents(seeds, 100).mean(0) for _, seeds in terms]
    total, plain = sample.combine(terms, 100, "normal")[0], means[0] - means[1] + means[2]
    assert torch.allclose(total / total.norm(), plain / plain.norm(), atol=1e-5)
    for text in ("0-3", "0-7 + 100-107", "7 - 8 + 9", "1,2 + 1"):
        for latent in ("normal", "uniform"):
            z = sample.combine(sample.terms_of_sum(text), 10_000, latent)
            alone = model.latents([0], 10_000, latent)
            assert 0.9 < z.std() / alone.std() < 1.1 and (latent == "normal" or z.abs().max() <= 1)


def test_a_window_of_a_training_frame_finds_itself(tmp_path):
    frames = np.concatenate([noise_frames(8, 32, seed=i) // 2 + 64 for i in range(250)])  # more than one block
    assert len(frames) > 2 ** 22 / (40 * 54 + 64 * 3)
    image = torch.from_numpy(frames[[3, 1999, 700]]).permute(0, 3, 1, 2) / 127.5 - 1
    wanted = torch.cat([image[:1, :, 2:34, 6:38], image[1:2, :, 8:40, 10:42].flip(3),  # as it is, and mirrored
                        F.interpolate(image[2:], scale_factor=0.8, mode="bilinear")[:, :, :, 4:36]])
    np.save(tmp_path / "frames.npy", frames)
    distances, found = sample.nearest_windows(tmp_path / "frames.npy", wanted)
    assert distances.max() < 0.01 and (found - wanted).abs().max() < 0.01
    np.save(tmp_path / "others.npy", np.delete(frames, [3, 1999, 700], 0))
    distances, _ = sample.nearest_windows(tmp_path / "others.npy", wanted)
    assert distances.min() > 3, "without these frames no window is like them"


def test_copies_are_nearer_to_training_images_than_held_out_images_are(pack, lively, call):
    text = call(sample, "--checkpoint", lively, "--nearest", pack, "--n", 36)
    figures = re.findall(r"(?:samples|held-out images|training images|ratio) (\d[\d.]*)", text)
    samples, held, copies, ratio = map(float, figures)
    assert copies < 0.7 * held and held < samples and ratio == pytest.approx(samples / held, abs=0.02)
    sheet = np.asarray(Image.open("nearest.png"))
    assert sheet.shape == (6 * 34 + 2, 6 * 66 + 2, 3)
    drawn, found = np.split(sheet[2:34, 2:66], 2, axis=1)
    assert np.array_equal(drawn, draw(lively, [0])[0])
    image = torch.from_numpy(drawn.copy()).permute(2, 0, 1)[None] / 127.5 - 1
    _, nearest = sample.nearest_windows(pack / "train.npy", image)
    assert np.abs(found - ((nearest[0].permute(1, 2, 0) + 1) * 127.5).numpy()).max() <= 0.51


def test_features_are_those_of_all_layers_at_4_by_4():
    D, frames = model.Discriminator(32, 4).apply(model.init_weights).eval().requires_grad_(False), noise_frames(2, 32)
    x = torch.cat(list(model.spread_windows(frames, 2, 32)))
    first = F.leaky_relu(F.conv2d(x, D.main[0].weight, stride=2, padding=1), 0.2)
    found = sample.describe(D, frames)
    assert found.shape == (2, 16 * (4 + 8 + 16))
    assert torch.equal(found[:, 5], first[:, 0, 4:8, 4:8].amax((1, 2))), "first map, second row and column of 4×4"
    assert torch.equal(found[:, -16 * 16:], D.main[:-1](x).flatten(1)), "the last layer is 4×4 already"


def table(text):
    """{name: (accuracy, mean over cities)} that --features prints."""
    return {name: (float(a), float(b)) for name, a, b in re.findall(r"^(.+?) +([\d.]+)% +([\d.]+)%$", text, re.M)}


def test_features_of_D_tell_cities_apart_and_on_gaudi_the_cpu_computes_them(halves, trained, call, monkeypatch):
    monkeypatch.setattr(sample, "choose_device", lambda name: torch.device("hpu"))
    text = call(sample, "--checkpoint", trained, "--features", halves)
    assert "--nearest and --features run on the CPU" in text and "6 cities, " in text
    found = table(text)
    assert list(found) == ["the largest city", "an untrained D", "D"]
    largest, balanced = found["the largest city"]
    assert balanced == pytest.approx(100 / 6, abs=0.1) and min(found["D"]) > 2 * largest > 0


def test_cities_that_differ_by_noise_alone_are_told_apart_by_chance(trained, call, tmp_path):
    """No label leaks: with 3 to 1 frames held out, no guess is better than always the larger city."""
    cities = [{"big": noise_frames(45, 32, i), "small": noise_frames(15, 32, i + 1)} for i in (0, 2)]
    cities[1]["unseen"] = noise_frames(5, 32, 9)  # without training frames: not counted
    noise = write_pack(tmp_path / "noise", 32, *cities)
    found = table(call(sample, "--checkpoint", trained, "--features", noise))
    assert found["the largest city"] == (75, 50)
    for accuracy, balanced in found.values():
        assert accuracy < 90 and 25 < balanced < 75


def test_a_pack_or_sum_that_an_experiment_cannot_use_is_one_line(pack, trained, call, tmp_path):
    three, words = noise_frames(3, 32), ("--checkpoint", trained, "--out", "out.png")
    alone = write_pack(tmp_path / "alone", 32, {"Bath": three}, {"Bath": three})
    empty = write_pack(tmp_path / "empty", 32, {"Bath": three, "Ulm": three}, {})
    large = write_pack(tmp_path / "large", 64, *2 * [{"Bath": noise_frames(2, 64)}])
    for option in ("--features", "--nearest", "--score"):
        assert "both training and held-out" in call(sample, *words, option, empty, status=2)
        assert re.search("64 pixels.* 32", call(sample, *words, option, large, status=2))
        assert "nowhere" in call(sample, *words, option, "nowhere", status=2)
    assert "fewer than 50" in call(sample, *words, "--score", alone, status=2)
    assert "two cities" in call(sample, *words, "--features", alone, status=2)
    generator = max(trained.glob("generator-0*.pt"))
    assert "no DCGAN discriminator" in call(sample, "--features", pack, "--checkpoint", generator, status=2)
    for terms, says in (("5 - 5", "cancel out"), ("5 -", "not a sum"), ("5 * 6", "not a sum"), ("5 - x", "invalid")):
        assert says in call(sample, *words, "--arithmetic", terms, status=2)
    assert "not allowed with" in call(sample, *words, "--arithmetic", "5", "--score", pack, status=2)
    assert {path.name for path in tmp_path.iterdir()} == {"alone", "empty", "large"}


def test_a_value_that_makes_no_picture_is_refused_before_any_work(call):
    for words in ("--n 0", "--n -3", "--scale 0", "--seeds 5-3", "--seeds x", "--out samples", "--n 3 --seeds 0-2"):
        assert "sample.py: error: " in call(sample, *words.split(), status=2)
    for words in ("--frames 0", "--scale 0", "--fps 0", "--fps 51", "--grid 0x1", "--grid 3", "--seeds 5-3",
                  "--out scene.mp4", "--seeds 0-6 --grid 3x1"):
        assert "interpolate.py: error: " in call(interpolate, *words.split(), status=2)


def test_a_checkpoint_that_cannot_be_drawn_is_one_line(call, tmp_path):
    (tmp_path / "weights.pth").write_text("no weights")
    for script in (sample, interpolate):
        assert "train first" in call(script, status=2)
        for path, says in (("nowhere", "nowhere"), ("weights.pth", "damaged"), (".", "holds none of")):
            line = call(script, "--checkpoint", path, status=2)
            assert line.startswith("error: ") and says in line
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pth"]


def test_help_shows_the_commands_and_the_defaults(capsys):
    for script, default in ((sample, "0-63"), (interpolate, "scene.gif")):
        with pytest.raises(SystemExit):
            script.parse_args(["--help"])
        text = capsys.readouterr().out
        assert f"\n    python {Path(script.__file__).name}  " in text
        assert f"(default: {default})" in " ".join(text.split())


@pytest.mark.parametrize("error, status", [
    (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), 2), (MemoryError(), 2),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: not enough memory"), 2),
    (RuntimeError("CUDA error: an illegal memory access was encountered"), None)])
def test_too_little_memory_is_one_line_and_other_errors_keep_their_traceback(error, status, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit if status else type(error)) as end:
        model.run_script(main)
    assert status is None or end.value.code == status and "--batch-size" in capsys.readouterr().err


def test_a_run_that_was_killed_between_the_renames_of_a_save_can_be_drawn(trained, tmp_path):
    shutil.copy(trained / "checkpoint.pt", tmp_path / "checkpoint-previous.pt")
    assert model.load_generator(tmp_path)[0].image_size == model.load_discriminator(tmp_path).image_size == 32
