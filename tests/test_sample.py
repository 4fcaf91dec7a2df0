"""sample.py and interpolate.py: which picture is drawn, in which file, and what the experiments find."""
import os
import re
import resource
import shlex
import sys
from pathlib import Path

import browser
import numpy as np
import pytest
import torch
from helpers import make_pack
from painter import colours_in, latent_of, picture_of, save_painter, shows, tiles
from PIL import Image, ImageSequence

import interpolate
import model
import prepare_data
import sample

LARGE = 9007199254740993  # a seed that JavaScript's numbers cannot hold


@pytest.fixture(scope="module")
def painter(tmp_path_factory):
    return save_painter(tmp_path_factory.mktemp("painters") / "normal")


@pytest.fixture
def typed(monkeypatch, capsys, tmp_path, painter):
    """typed("sample.py --n 3"): run a script with the painter in an empty folder, and return what it printed.

    With status 2 it is the last line, which says what is wrong.
    """
    monkeypatch.chdir(tmp_path)

    def typed(command, status=0, checkpoint=painter):
        name, *words = shlex.split(command)
        script = {"sample.py": sample, "interpolate.py": interpolate}[name]
        words = ["--device", "cpu", "--checkpoint", str(checkpoint), *words]
        if status == 0:
            script.main(words)
            return capsys.readouterr().out
        with pytest.raises(SystemExit) as end:
            model.run_script(lambda: script.main(words))
        assert end.value.code == status
        return capsys.readouterr().err.strip().splitlines()[-1]
    return typed


def plain_frames(*colours, image_size=32):
    """One frame of each colour: a grey level, or (R, G, B)."""
    H, W = prepare_data.frame_size(image_size)
    return np.stack([np.broadcast_to(np.array(colour, np.uint8), (H, W, 3)) for colour in colours])


# ---- seeds, grids and files ----------------------------------------------------------------------
def test_without_options_the_seeds_0_to_63_of_the_newest_run_become_samples_png(typed, tmp_path, capsys):
    save_painter(tmp_path / "runs" / "paint")
    sample.main(["--device", "cpu"])
    text = capsys.readouterr().out
    assert f"generator: {Path('runs', 'paint')}" in text and "samples.png" in text
    grid = tiles("samples.png", 128)  # 32 pixels are enlarged to 128
    assert grid.shape[:2] == (8, 8)
    assert all(shows(grid[seed // 8, seed % 8], latent_of(seed)) for seed in range(64))


@pytest.mark.parametrize("latent", ["normal", "uniform"])
def test_each_seed_is_a_png_of_its_own_latent(typed, tmp_path, latent):
    run = save_painter(tmp_path / "run", latent)
    seeds = [*range(70), *range(500, 700), LARGE]
    typed(f"sample.py --separate --seeds 0-69,500-699,{LARGE} --out new/folder", checkpoint=run)
    assert sorted(os.listdir("new/folder")) == sorted(f"{seed:08d}.png" for seed in seeds)
    for seed in seeds:
        picture = Image.open(f"new/folder/{seed:08d}.png")
        assert picture.format == "PNG" and picture.mode == "RGB" and picture.size == (32, 32)
        assert np.abs(np.asarray(picture, float) - picture_of(latent_of(seed, latent))).max() <= 1


def test_a_seed_has_the_same_bytes_whatever_the_other_seeds_and_in_a_walk(typed):
    typed("sample.py --separate --n 66")
    typed("sample.py --separate --seeds 65,3-5,65 --out some")
    typed("interpolate.py --seeds 3,65 --frames 2 --scale 1 --out walk")
    for file, seed in (("some/00000003", 3), ("some/00000065", 65), ("walk/00000000", 3), ("walk/00000002", 65)):
        assert Path(f"{file}.png").read_bytes() == Path(f"samples/{seed:08d}.png").read_bytes()


@pytest.mark.parametrize("name, kind", [("a.png", "PNG"), ("a.jpg", "JPEG"), ("a.JPEG", "JPEG"), ("a.webp", "WEBP")])
def test_a_grid_has_the_named_seeds_in_their_order_in_the_format_of_its_suffix(typed, name, kind):
    typed(f"sample.py --seeds 40,7,41-43 --scale 2 --out new/{name}")
    grid = tiles(f"new/{name}", 64)
    assert Image.open(f"new/{name}").format == kind and grid.shape[:2] == (2, 3) and grid[1, 2].max() < 8
    for tile, seed in zip(grid.reshape(6, 64, 64, 3), (40, 7, 41, 42, 43)):
        assert shows(tile, latent_of(seed), within=4)


def test_a_home_folder_can_be_written_as_a_tilde(typed, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(save_painter(tmp_path / "run")))
    typed("sample.py --n 1 --out=~/a.png --checkpoint=~/checkpoint.pt")
    typed("interpolate.py --seeds 1 --frames 1 --out=~/a.gif")
    assert sorted(os.listdir("run")) == ["a.gif", "a.png", "checkpoint.pt"]


@pytest.mark.parametrize("command", [
    "sample.py --separate --n 9 --out folder", "interpolate.py --seeds 1,2 --frames 2 --out folder",
    "sample.py --n 9 --out folder/a.png", "sample.py --n 9 --out folder/a.html",
    "interpolate.py --seeds 1,2 --frames 2 --out folder/a.gif"])
def test_a_full_disk_is_one_line_with_a_name_and_breaks_no_file(typed, command):
    """Files get their names when they are complete. So a kill breaks none, either."""
    typed(command)
    before = {path: path.read_bytes() for path in Path("folder").iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40, hard))  # bytes
    try:
        assert "folder" in typed(command, status=2)
        assert {path: path.read_bytes() for path in Path("folder").iterdir()} == before
        for path in before:
            path.unlink()
        typed(command, status=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir("folder") == []


def test_what_cannot_be_drawn_or_written_is_one_line(typed):
    Path("file").write_text("words")
    for words, fact in (
        ("--n 0", "--n"), ("--n -3", "--n"), ("--n x", "--n"), ("--scale 0", "--scale"), ("--scale 99", "--scale"),
        ("--seeds 40-7", "40-7"), ("--seeds x", "--seeds"), ("--n 3 --seeds 0-2", "--seeds"), ("--out=", "--out"),
        ("--n 1 --out folder", "folder"), ("--n 1 --out a.xyz", ".xyz"), ("--n 1 --out file/a.png", "file"),
        ("--n 1 --separate --out file", "file"), ("--checkpoint nowhere", "nowhere"), ("--real nowhere", "nowhere"),
        ("--arithmetic '5 -'", "--arithmetic"), ("--arithmetic '5 * 6'", "--arithmetic"),
        ("--arithmetic 3,8-5", "--arithmetic"), ("--arithmetic ''", "--arithmetic"),
        ("--arithmetic '5,6 - 6,5'", "--arithmetic"), ("--separate --arithmetic 5", "--arithmetic"),
    ):
        line = typed(f"sample.py {words}", status=2)
        assert "error: " in line and fact in line
    for words, fact in (
        ("--frames 0", "--frames"), ("--scale 0", "--scale"), ("--fps 0", "--fps"), ("--fps 51", "--fps"),
        ("--grid 0x1", "--grid"), ("--grid 3", "--grid"), ("--seeds 0-6 --grid 3x1", "3"), ("--out a.mp4", ".mp4"),
        ("--out file/a.gif", "file"), ("--out a.xyz", ".xyz"), ("--out file", "file"),
    ):
        line = typed(f"interpolate.py --seeds 1 --frames 1 {words}", status=2)
        assert "error: " in line and fact in line
    assert os.listdir() == ["file"] and Path("file").read_text() == "words"


def test_real_writes_windows_of_frames_from_the_whole_training_set(typed, tmp_path):
    pack = make_pack(tmp_path / "pack", plain_frames(*range(1, 101)), plain_frames(250))
    typed(f"sample.py --real {pack} --n 300")
    assert sorted(os.listdir("real")) == [f"{i:08d}.png" for i in range(300)]
    for i in range(300):  # three windows of each frame
        picture = Image.open(f"real/{i:08d}.png")
        assert picture.size == (32, 32) and picture.getextrema() == ((i // 3 + 1,) * 2,) * 3
    typed(f"sample.py --real {pack} --n 10 --out new/ten")
    assert [Image.open(f"new/ten/{i:08d}.png").getpixel((9, 9))[0] for i in range(10)] == list(range(1, 101, 10))


# ---- the page ------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def page(painter, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "streets.html"
    sample.main(f"--checkpoint {painter} --device cpu --seeds 0-38,{LARGE} --out {path}".split())
    return path


@pytest.fixture(scope="module", params=["desktop", "phone"])
def screen(request):
    with browser.Browser(phone=request.param == "phone") as screen:
        yield screen


@pytest.fixture
def opened(screen, page):
    screen.open(page)
    return screen


def shown_seed(opened):
    """The seed under the large picture, which is also its description."""
    name, alt = opened.run("return [document.getElementById('name').textContent, picture.alt]")
    assert name == alt
    return int(name.removeprefix("Seed "))


def collected(opened):
    """The text to copy, or None where there is none."""
    return opened.run("const text = document.getElementById('text'); return text.offsetParent && text.value")


def test_a_page_is_one_file_that_needs_no_network_and_fits_its_screen(page, opened):
    text = page.read_text(encoding="utf-8")
    assert len(re.findall('src="data:image/webp;base64,', text)) == 40
    assert not re.search(r'(src|href)="(?!data:)|url\(|http|import', text)
    loaded = opened.run("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert all(name.startswith("data:") for name in loaded)

    width, content = opened.run("return [innerWidth, document.documentElement.scrollWidth]")
    left, right, shape = opened.run("const box = document.getElementById('picture').getBoundingClientRect();"
                                    "return [box.left, box.right, box.width / box.height]")
    assert content <= width and 0 <= left < right <= width and shape == pytest.approx(1, abs=0.01)
    assert opened.run("return document.querySelector('#all button').offsetWidth") >= 44, "it suits a finger"


def test_each_small_picture_is_that_of_its_seed_and_a_press_shows_it_large(opened):
    assert opened.run("return document.querySelectorAll('#all button').length") == 40
    for place, seed in ((1, 0), (9, 8), (40, LARGE)):
        button = f"#all button:nth-child({place})"
        opened.click(button)
        assert shown_seed(opened) == seed and shows(opened.look("#picture"), latent_of(seed), within=8)
        opened.click(button)
        assert shows(opened.look(button), latent_of(seed), within=8)


def test_the_arrow_keys_space_and_a_press_show_all_pictures_in_turn(opened):
    seeds = [shown_seed(opened)]
    for _ in range(39):
        opened.press("ArrowRight")
        seeds.append(shown_seed(opened))
    assert sorted(seeds) == [*range(39), LARGE] and seeds != sorted(seeds)
    assert shows(opened.look("#picture"), latent_of(seeds[39]), within=8)
    for press, place in (("ArrowLeft", 38), ("Space", 39), ("#next", 0), ("Space", 1)):  # once, although on a button
        opened.click(press) if press == "#next" else opened.press(press)
        assert shown_seed(opened) == seeds[place]


def test_presses_and_the_key_c_collect_seeds_in_their_order(opened):
    assert collected(opened) is None
    opened.click("#all button:nth-child(40)")
    opened.click("#all button:nth-child(8)")
    assert collected(opened) == f"--seeds {LARGE},7" and shown_seed(opened) == 7
    opened.press("c")
    assert collected(opened) == f"--seeds {LARGE}"
    opened.press("c", "ArrowRight")
    if shown_seed(opened) == LARGE:  # the order is random, and this one is collected
        opened.press("ArrowRight")
    opened.click("#collect")
    assert collected(opened) == f"--seeds {LARGE},7,{shown_seed(opened)}"
    assert opened.run("return document.querySelectorAll('#all [aria-pressed=true]').length") == 3
    opened.click("#clear")
    assert collected(opened) is None
    assert opened.run("return document.querySelectorAll('[aria-pressed=true]').length") == 0


def test_the_collected_seeds_are_copied_by_mouse_or_keyboard(opened):
    opened.devtools("Browser.grantPermissions", permissions=["clipboardReadWrite"])
    for place, wanted in ((8, "--seeds 7"), (9, "--seeds 7,8")):
        opened.click(f"#all button:nth-child({place})")
        if place == 8:
            opened.click("#copy")
        else:
            opened.run("document.getElementById('copy').focus()")
            opened.press("Space")
        assert opened.run("return navigator.clipboard.readText()") == wanted
    assert shown_seed(opened) == 8, "space pressed the button and did not show another picture"


def luminance(colour):
    """Of 'rgb(25, 24, 23)', by WCAG 2.2: https://www.w3.org/TR/WCAG22/#dfn-relative-luminance"""
    values = np.array(re.findall(r"\d+", colour)[:3], float) / 255
    return [0.2126, 0.7152, 0.0722] @ np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def test_a_page_is_dark_where_the_reader_prefers_it_and_can_always_be_read(opened):
    script = ("let [ink, paper] = arguments.map(name => getComputedStyle(document.querySelector(name)));"
              "return [ink.color, paper.backgroundColor]")
    for scheme in ("light", "dark"):
        opened.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        for name, background in (("h1", "body"), ("p", "body"), ("#name", "body"), ("#copy", "#copy")):
            ink, paper = map(luminance, opened.run(script.replace("arguments", "[...arguments]"), name, background))
            assert (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) >= 4.5
            assert background != "body" or (paper > 0.8 if scheme == "light" else paper < 0.02)


# ---- walks ---------------------------------------------------------------------------------------
def walk(seeds, frames, latent="normal"):
    """The latents of a loop through the seeds: equal angles on arcs (slerp), or equal steps on lines."""
    z = [latent_of(seed, latent) for seed in seeds]
    steps = []
    for a, b in zip(z, z[1:] + z[:1]):
        angle = np.arccos(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        for t in np.arange(frames) / frames:
            arc = (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)
            steps.append(arc if latent == "normal" else (1 - t) * a + t * b)
    return steps


@pytest.mark.parametrize("latent", ["normal", "uniform"])
def test_a_folder_gets_the_frames_of_a_loop_by_arcs_or_for_uniform_latents_by_lines(typed, tmp_path, latent):
    run = save_painter(tmp_path / "run", latent)
    typed("interpolate.py --seeds 7,40,12 --frames 4 --scale 1 --fps 60 --out new/scene", checkpoint=run)
    assert sorted(os.listdir("new/scene")) == [f"{i:08d}.png" for i in range(12)]
    for i, z in enumerate(walk([7, 40, 12], 4, latent)):
        picture = Image.open(f"new/scene/{i:08d}.png")
        assert picture.size == (32, 32) and shows(picture, z)


@pytest.mark.parametrize("command, kind, fps", [
    ("--fps 10 --out new/a.gif", "GIF", 10), ("--fps 100 --out a.webp", "WEBP", 100)])
def test_a_scene_is_a_loop_of_all_frames_at_the_speed_that_was_asked_for(typed, command, kind, fps):
    typed(f"interpolate.py --seeds 0-3 --frames 3 --scale 1 {command}")
    scene = Image.open(command.split()[-1])
    assert scene.format == kind and scene.n_frames == 12 and scene.info["loop"] == 0
    for frame, z in zip(ImageSequence.Iterator(scene), walk(range(4), 3)):
        assert frame.size == (32, 32) and shows(frame, z, within=8)
        assert frame.info["duration"] == 1000 / fps


def test_without_options_a_scene_passes_six_seeds_in_25_steps_of_40_ms_each(typed):
    typed("interpolate.py")
    scene = Image.open("scene.gif")
    assert scene.n_frames == 150 and scene.size == (256, 256) and scene.info["duration"] == 40
    for seed in range(6):
        scene.seek(25 * seed)
        assert shows(scene, latent_of(seed), within=8)


def test_a_grid_shows_several_scenes_each_with_seeds_of_its_own(typed):
    typed("interpolate.py --seeds 0-7 --grid 2x2 --frames 3 --scale 1 --out scenes.webp")
    scenes = Image.open("scenes.webp")
    assert scenes.n_frames == 6 and scenes.size == (70, 70)
    walks = [walk(seeds, 3) for seeds in ((0, 1), (2, 3), (4, 5), (6, 7))]
    for i, moment in enumerate(ImageSequence.Iterator(scenes)):
        for scene, (x, y) in zip(walks, [(2, 2), (36, 2), (2, 36), (36, 36)]):
            assert shows(moment.crop((x, y, x + 32, y + 32)), scene[i], within=8)
    typed("interpolate.py --grid 3x1 --frames 1")
    scenes = Image.open("scene.gif")
    assert scenes.size == (3 * 130 + 2, 132) and scenes.n_frames == 6, "six seeds for each scene"
    assert shows(scenes.crop((132, 2, 260, 130)), latent_of(6), within=8)


def test_a_png_is_a_strip_with_a_row_for_each_scene(typed):
    typed("interpolate.py --seeds 0-4 --out walk.png")
    strip = tiles("walk.png", 128)
    assert strip.shape[:2] == (1, 20) and all(shows(tile, z) for tile, z in zip(strip[0], walk(range(5), 4)))
    typed("interpolate.py --seeds 5-8 --grid 1x2 --frames 2 --scale 1 --out walk.png")
    strip = tiles("walk.png", 32)
    assert strip.shape[:2] == (2, 4) and shows(strip[1, 2], latent_of(8))
    a = torch.tensor([1., 0.])
    assert torch.equal(interpolate.slerp(a, a, 0.25), a), "the same seed twice: the angle is 0"


# ---- the experiments of the paper ----------------------------------------------------------------
def test_the_score_of_the_run_stands_beside_that_of_real_images(typed, tmp_path, monkeypatch):
    class Score:
        images, real = 1234, (30.9, 0.91)

        def __init__(self, train, holdout, image_size):
            assert (train.max(), holdout.max(), image_size) == (1, 2, 32)

        def __call__(self, G, latent):
            assert shows(model.render(G, torch.zeros(1, 8))[0].permute(1, 2, 0), np.zeros(8)) and latent == "normal"
            return 37.04, 0.766

    monkeypatch.setattr(sample, "Score", Score)
    text = typed(f"sample.py --score {make_pack(tmp_path / 'pack', plain_frames(1), plain_frames(2))}")
    assert re.search(r"score 37.0 \(.*30.9\), coverage 0.77 \(.*0.91\)", text) and "1,234" in text
    assert os.listdir() == ["pack"]


@pytest.mark.parametrize("latent", ["normal", "uniform"])
def test_arithmetic_adds_the_means_of_seeds_and_keeps_the_length_of_a_latent(typed, tmp_path, latent):
    text = typed("sample.py --arithmetic '3,8 - 5,9,30 + 7' --scale 1",
                 checkpoint=save_painter(tmp_path / "run", latent))
    assert re.findall(r"column (\d): ([+-]).*?\[([\d, ]+)\]", text) == [
        ("1", "+", "3, 8"), ("2", "-", "5, 9, 30"), ("3", "+", "7")]
    grid = tiles("arithmetic.png", 32)
    assert grid.shape[:2] == (4, 7), "three terms, a gap, and the sums"
    most = {"normal": np.inf, "uniform": 1}[latent]
    z = {seed: latent_of(seed, latent) for seed in (3, 8, 5, 9, 30, 7)}

    def mean(*seeds):  # as long as one latent
        return (sum(z[seed] for seed in seeds) / len(seeds) ** 0.5).clip(-most, most)

    means = [[None, z[3], z[8], mean(3, 8)], [z[5], z[9], z[30], mean(5, 9, 30)], [None, None, z[7], z[7]]]
    for x, column in enumerate([*means, [None] * 4]):
        for y, wanted in enumerate(column):
            assert grid[y, x].max() == 0 if wanted is None else shows(grid[y, x], wanted)

    total = (z[3] + z[8]) / 2 - (z[5] + z[9] + z[30]) / 3 + z[7]
    total = (total / (2 / 4 + 3 / 9 + 1) ** 0.5).clip(-most, most)
    assert grid[0, 4:].max() == 0 and shows(grid[2, 5], total)
    drawn = [colours_in(tile) for row in grid[1:, 4:] for tile in row]
    noise = 2 * np.arctanh(np.array(drawn) / 127.5 - 1) - total[:6]
    assert np.abs(noise).max() < 0.3 and noise[4] == pytest.approx(0, abs=0.05)
    assert np.delete(noise, 4, 0).std() == pytest.approx(0.5 / 12 ** 0.5, rel=0.3), "uniform from -0.25 to 0.25"
    typed("sample.py --arithmetic '5 - 5 + 7' --out seven.png")
    assert shows(tiles("seven.png", 128)[1, 5], latent_of(7)), "5 cancels out"


def test_nearest_finds_copies_of_any_size_and_mirrored_ones(typed, tmp_path):
    """Seeds 0 to 3 are in the training frames: as they are, mirrored, enlarged by 9/8 and by 5/4. Seed 4 is not."""
    frames = np.random.default_rng(0).integers(0, 256, (209, *prepare_data.frame_size(32), 3), np.uint8)
    frames[199, 8:40, 10:42] = picture_of(latent_of(0))
    frames[3, 0:32, 20:52] = picture_of(latent_of(1))[:, ::-1]
    frames[70, 0:36, 9:45] = picture_of(latent_of(2), 36)
    frames[77, 0:40, 10:50] = picture_of(latent_of(3), 40)
    text = typed(f"sample.py --nearest {make_pack(tmp_path / 'pack', frames[:200], frames[200:])} --n 5 --scale 1")

    pairs = tiles("nearest.png", 32, width=64).reshape(-1, 32, 64, 3)
    for seed in range(5):
        drawn, nearest = np.split(pairs[seed], 2, axis=1)
        assert shows(drawn, latent_of(seed)) and shows(nearest, latent_of(seed), within=2) == (seed < 4)
    samples, held_out = map(float, re.findall(r"(?:samples|held-out images) (\d+\.\d)", text))
    assert samples < 5 and 20 < held_out < 60, "grey levels"


@pytest.mark.parametrize("zoom", [1, 8 / 9, 4 / 5])
def test_a_window_of_each_size_finds_itself(zoom):
    frames = np.random.default_rng(0).integers(0, 256, (40, 40, 54, 3), np.uint8)
    view = torch.from_numpy(frames[35:36]).permute(0, 3, 1, 2) / 127.5 - 1
    window = torch.nn.functional.interpolate(view, scale_factor=zoom, mode="bilinear")[:, :, :32, 4:36]
    distance, found = sample.nearest_windows(frames, window)
    assert distance.item() < 0.1 and (found - window).abs().max() < 1e-5


def test_a_pack_that_an_experiment_cannot_use_is_one_line(typed, tmp_path):
    make_pack(tmp_path / "empty", train=3)
    make_pack(tmp_path / "large", train=3, holdout=3, image_size=64)
    make_pack(tmp_path / "small", train=3, holdout=3)
    for option in ("--nearest", "--score"):
        assert "--holdout" in typed(f"sample.py {option} empty", status=2)
        assert re.search("64.* 32", typed(f"sample.py {option} large", status=2))
        assert "nowhere" in typed(f"sample.py {option} nowhere", status=2)
    assert "50" in typed("sample.py --score small", status=2)


# ---- inside other programs -----------------------------------------------------------------------
def test_a_main_that_a_notebook_calls_leaves_its_process_as_it_was(typed, tmp_path):
    def state():
        random = torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()
        return random, dict(os.environ), sys.stdout, torch.is_grad_enabled(), torch.get_num_threads()

    make_pack(tmp_path / "pack", train=3, holdout=3)
    before = state()
    for words in ("--n 2", "--n 2 --out a.html", "--separate", "--real pack", "--arithmetic 5"):
        typed(f"sample.py {words}")
    typed("interpolate.py --seeds 1 --frames 2")
    assert state() == before
