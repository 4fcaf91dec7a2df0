"""Pictures: the networks' sizes, other people's weights, seeds that stay the same picture, scenes without a seam, the
score, and the paper's experiments."""
import csv
import json
import math
import re
import sys

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


def write_pack(folder, image_size, train, holdout):
    """A pack made by hand, of {city: uint8 (N, H, W, 3)} for each split; three frames are a sequence."""
    folder.mkdir()
    lines, counts = ["split,row,city,sequence,key,source file"], {}
    H, W = prepare_data.frame_size(image_size)
    for split, cities in (("train", train), ("holdout", holdout)):
        np.save(folder / f"{split}.npy", np.concatenate([np.zeros((0, H, W, 3), np.uint8), *cities.values()]))
        named = [(city, i) for city, frames in cities.items() for i in range(len(frames))]
        lines += [f"{split},{row},{city},{split}{i // 3},k,f" for row, (city, i) in enumerate(named)]
        counts[split] = {city: len(frames) for city, frames in cities.items()}
    (folder / "index.csv").write_text("\n".join(lines) + "\n")
    (folder / "skipped.csv").write_text("source file,reason\n")
    Image.new("RGB", (1, 1)).save(folder / "preview.png")
    info = dict(format=1, image_size=image_size, H=H, W=W, counts=counts, arguments={},
                files={path.name: path.stat().st_size for path in folder.iterdir()})
    (folder / "pack.json").write_text(json.dumps(info))
    return folder


def noise_frames(n, image_size, seed=0):
    H, W = prepare_data.frame_size(image_size)
    return np.random.default_rng(seed).integers(0, 256, (n, H, W, 3), np.uint8)


@pytest.fixture(scope="module")
def halves(pack, tmp_path_factory):
    """The frames of the drawn pack, every second one of each city held out: enough of both for a score."""
    opened, cities = prepare_data.open_pack(pack), {}
    with open(pack / "index.csv", newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            cities.setdefault(line["city"], []).append(getattr(opened, line["split"])[int(line["row"])])
    folder = tmp_path_factory.mktemp("packs") / "halves"
    return write_pack(folder, 32, *({city: frames[i::2] for city, frames in cities.items()} for i in (0, 1)))


def test_a_score_is_0_for_the_same_images_and_grows_as_they_blur(halves):
    score = model.Score(prepare_data.open_pack(halves))
    train = np.load(halves / "train.npy")
    frames = torch.from_numpy(train[np.arange(score.N) * len(train) // score.N])  # evenly spread
    real = model.cut_windows(frames, 32, generator=torch.Generator().manual_seed(0))
    blurred = [F.interpolate(F.avg_pool2d(real, k), 32, mode="bilinear") for k in (1, 2, 4)]
    sharp, soft, softer = (score.distance(model.projections([images])) for images in blurred)
    assert score.distance(score.real) == 0 and sharp == pytest.approx(score.floor)
    assert 0 < sharp < soft < softer, "the more detail is missing the further"


def test_the_score_is_printed_beside_its_floor(halves, lively, tmp_path):
    done = run("sample.py", "--checkpoint", lively, "--device", "cpu", "--score", halves, cwd=tmp_path)
    generated, real = map(float, re.findall(r"(?:generated|training set) ([\d.]+)", done.stdout))
    assert generated > 2 * real > 0 and f"{len(np.load(halves / 'holdout.npy'))} held-out images" in done.stdout
    assert not list(tmp_path.iterdir()), "a score draws nothing"


def tiles(path, side):
    """The rows of a grid's pictures: uint8 array (rows, columns, side, side, 3)."""
    sheet = np.asarray(Image.open(path))
    return np.array([[sheet[y:y + side, x:x + side] for x in range(2, sheet.shape[1] - side, side + 2)]
                     for y in range(2, sheet.shape[0] - side, side + 2)])


@pytest.mark.parametrize("latent", ["normal", "uniform"])
def test_arithmetic_that_cancels_leaves_the_seed_itself(lively, tmp_path, latent):
    torch.save({**torch.load(lively, weights_only=True), "latent": latent}, tmp_path / "generator.pt")
    run("sample.py", "--checkpoint", "generator.pt", "--device", "cpu", "--arithmetic", "5 - 5 + 7", cwd=tmp_path)
    sheet = tiles(tmp_path / "arithmetic.png", 32)
    assert sheet.shape[:2] == (3, 2 * 3 + 3)
    G, _ = model.load_generator(lively)
    five, seven = model.render(G, model.latents([5, 7], G.nz, latent)).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(sheet[1, -2], seven), "the sum stands in the middle of the nine"
    assert all(np.array_equal(sheet[row, 0], five) and np.array_equal(sheet[row, 4], seven) for row in (1, 2)), \
        "a seed over the mean of it alone"
    around = [gap(sheet[row, column], seven) for row in range(3) for column in (-3, -2, -1)]
    assert around.pop(4) == 0 and 0 < min(around) and max(around) < gap(five, seven), "noise makes neighbours"


def test_sums_have_the_length_of_latents_that_G_knows():
    terms = sample.expression("3,8,21 - 5,9,30 + 2,14,40")
    assert terms == [("+", [3, 8, 21]), ("-", [5, 9, 30]), ("+", [2, 14, 40])]
    means = [model.latents(seeds, 100).mean(0) for _, seeds in terms]
    total, plain = sample.combine(terms, 100, "normal")[0], means[0] - means[1] + means[2]
    assert torch.allclose(total / total.norm(), plain / plain.norm(), atol=1e-5)
    for text in ("0-3", "0-7 + 100-107", "7 - 8 + 9", "1,2 + 1"):
        for latent in ("normal", "uniform"):
            z = sample.combine(sample.expression(text), 10_000, latent)
            alone = model.latents([0], 10_000, latent)
            assert 0.9 < z.std() / alone.std() < 1.1 and (latent == "normal" or z.abs().max() <= 1)


def test_a_window_of_a_training_frame_finds_itself(tmp_path):
    frames = np.concatenate([noise_frames(8, 32, seed=i) // 2 + 64 for i in range(250)])  # more than one block of them
    assert len(frames) > 2 ** 22 / (40 * 54 + 64 * 3)
    image = torch.from_numpy(frames[[3, 1999, 700]]).permute(0, 3, 1, 2) / 127.5 - 1
    wanted = torch.cat([image[:1, :, 2:34, 6:38], image[1:2, :, 8:40, 10:42].flip(3),  # 32×32 as it is, and mirrored
                        F.interpolate(image[2:], scale_factor=0.8, mode="bilinear")[:, :, :, 4:36]])
    np.save(tmp_path / "frames.npy", frames)
    distances, found = sample.nearest_windows(tmp_path / "frames.npy", wanted)
    assert distances.max() < 0.01 and (found - wanted).abs().max() < 0.01
    np.save(tmp_path / "others.npy", np.delete(frames, [3, 1999, 700], 0))
    distances, _ = sample.nearest_windows(tmp_path / "others.npy", wanted)
    assert distances.min() > 3, "without them there is none like it"


def test_copies_are_nearer_than_held_out_windows(pack, lively, tmp_path):
    done = run("sample.py", "--checkpoint", lively, "--device", "cpu", "--nearest", pack, "--n", 36, cwd=tmp_path)
    samples, held, ratio, copies = map(float, re.findall(r"(?:samples|windows|ratio|copy) ([\d.]+)", done.stdout))
    assert copies < 0.7 * held and held < samples and ratio == pytest.approx(samples / held, abs=0.02)
    assert Image.open(tmp_path / "nearest.png").size == (6 * 66 + 2, 6 * 34 + 2)
    drawn, found = np.split(np.asarray(Image.open(tmp_path / "nearest.png"))[2:34, 2:66], 2, axis=1)
    G, latent = model.load_generator(lively)
    assert np.array_equal(drawn, model.render(G, model.latents([0], G.nz, latent))[0].permute(1, 2, 0))
    image = torch.from_numpy(drawn.copy()).permute(2, 0, 1)[None] / 127.5 - 1
    _, nearest = sample.nearest_windows(pack / "train.npy", image)
    assert np.abs(found - ((nearest[0].permute(1, 2, 0) + 1) * 127.5).numpy()).max() <= 0.51, "its own, beside it"


def test_features_are_those_of_all_layers_at_4_by_4():
    D = model.Discriminator(32, 4).apply(model.init_weights).eval()
    x = torch.randn(2, 3, 32, 32)
    first = F.leaky_relu(F.conv2d(x, D.main[0].weight, stride=2, padding=1), 0.2)
    found = sample.features(D, x)
    assert found.shape == (2, 16 * (4 + 8 + 16))
    assert torch.equal(found[:, 5], first[:, 0, 4:8, 4:8].amax((1, 2))), "the first map, second row and column of 4×4"
    last = D.main[:-1](x)
    assert last.shape[2:] == (4, 4) and torch.equal(found[:, -16 * 16:], last.flatten(1))


def test_the_dual_form_is_ridge_regression():
    torch.manual_seed(0)
    X, Y = torch.randn(30, 8), torch.randn(30, 2)
    strength = 0.3 * X.square().sum() / 30
    plain = torch.linalg.solve(X.T @ X + strength * torch.eye(8), X.T @ Y)
    assert torch.allclose(X.T @ sample.ridge(X @ X.T, Y, 0.3), plain, atol=1e-4)


def table(text):
    """{name: (accuracy, mean over cities)} that --features prints."""
    return {name: (float(a), float(b)) for name, a, b in re.findall(r"^(.+?) +([\d.]+)% +([\d.]+)%$", text, re.M)}


def test_features_of_D_tell_cities_apart(halves, trained):
    done = run("sample.py", "--checkpoint", trained, "--device", "cpu", "--features", halves)
    found = table(done.stdout)
    assert list(found) == ["the largest city", "pixels at 16×16", "an untrained D", "D"] and "6 cities, " in done.stdout
    largest, balanced = found["the largest city"]
    assert balanced == pytest.approx(100 / 6, abs=0.1) and min(found["D"]) > 2 * largest > 0


def test_cities_that_differ_by_noise_alone_are_told_apart_by_chance(trained, tmp_path):
    """No label leaks: of 3 to 1 held out, a guess is as good as always the larger city."""
    cities = [{"big": noise_frames(45, 32, i), "small": noise_frames(15, 32, i + 1)} for i in (0, 2)]
    words = "--checkpoint", trained, "--device", "cpu", "--features", write_pack(tmp_path / "noise", 32, *cities)
    found = table(run("sample.py", *words).stdout)
    assert found["the largest city"] == (75, 50)
    assert all(accuracy < 90 and 25 < balanced < 75 for accuracy, balanced in found.values())


def test_what_an_experiment_cannot_work_with_is_a_line(pack, trained, tmp_path, monkeypatch):
    two, three = noise_frames(2, 32), noise_frames(3, 32)
    packs = {"alone": write_pack(tmp_path / "alone", 32, {"Bath": three}, {"Bath": two}),
             "single": write_pack(tmp_path / "single", 32, {"Bath": three, "Ulm": two[:1]}, {"Bath": two}),
             "none": write_pack(tmp_path / "none", 32, {"Bath": three, "Ulm": three}, {}),
             "large": write_pack(tmp_path / "large", 64, *2 * [{"Bath": noise_frames(2, 64)}])}
    generator = max(trained.glob("generator-0*.pt"))
    left = sorted(tmp_path.iterdir())
    for says, *words in [("needs 50 of each", "--score", packs["alone"]), ("Bath alone", "--features", packs["alone"]),
                         ("1 of Ulm", "--features", packs["single"]),
                         *(("no frames to compare", word, packs["none"]) for word in ("--features", "--nearest", "--score")),
                         *(("64 pixels.* 32", word, packs["large"]) for word in ("--features", "--nearest", "--score")),
                         ("has no discriminator", "--features", pack, "--checkpoint", generator),
                         ("no such folder", "--nearest", tmp_path / "nowhere"),
                         ("cancel out", "--arithmetic", "5 - 5"), ("is no sum", "--arithmetic", "5 -"),
                         ("is no sum", "--arithmetic", "0-16 + 3"), ("is no sum", "--arithmetic", "5 * 6"),
                         ("no list of seeds", "--arithmetic", "5 - x"),
                         ("not allowed with", "--arithmetic", "5", "--score", pack)]:
        words = [*words, "--device", "cpu", "--out", tmp_path / "out.png"]
        words += [] if "--checkpoint" in words else ["--checkpoint", trained]
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, words)])
        with pytest.raises(model.InputError, match=says) as caught:
            sample.main()
        assert "\n" not in str(caught.value) and sorted(tmp_path.iterdir()) == left
    run("sample.py", *words[:-2], "--checkpoint", "nowhere", status=2, cwd=tmp_path)


def test_the_cost_of_a_step_is_what_the_layers_say():
    """The benchmark's arithmetic against the multiplications of each layer, counted by hand for one."""
    import bench
    import train
    args = train.parse_args("--image-size 32 --nz 8 --ngf 4 --ndf 4".split())
    G = 2 * 16 * (8 * 16 * 1 + 16 * 8 * 16 + 8 * 4 * 64 + 4 * 3 * 256)    # 4×4 kernels: in · out · places read
    D = 2 * 16 * (3 * 4 * 256 + 4 * 8 * 64 + 8 * 16 * 16 + 16 * 1 * 1)
    assert bench.gflop_per_image(args) == pytest.approx((3 * G + 8 * D) / 1e9, rel=0.02)


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
