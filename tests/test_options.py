"""Options of train.py have their effect (test_step has those of a step), and each mistake is one line."""
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import STATS, TINY, Fork, command, content, ending, make_pack, run, same, scalars
from PIL import Image

import model
import train

CPU = [*TINY, "--device", "cpu"]


@pytest.fixture
def call(monkeypatch, capfd, tmp_path):
    """call(frames, *words): main() of train.py on a pack of these frames. The result's fields have what it did."""
    def call(frames, *words):
        seen = SimpleNamespace(frames=[], z=[], images=[], dtypes=[], saves=[])
        out, pack = (tmp_path / f"{name}{len(list(tmp_path.iterdir()))}" for name in ("run", "pack"))

        def of_G(z, images):
            seen.z.append(z.clone())
            seen.dtypes.append(images.dtype)

        def of_replace(file, _):
            if Path(file).name == "checkpoint.pt":
                seen.saves.append(content(file))

        with monkeypatch.context() as patch:
            def spy(owner, name, note):
                usual = getattr(owner, name)
                patch.setattr(owner, name, lambda *args: (result := usual(*args), note(*args[1:], result))[0])

            spy(model.Generator, "forward", of_G)
            spy(model.Discriminator, "forward", lambda images, logits: seen.images.append(images.detach().clone()))
            spy(train.DCGAN, "step", lambda frames, stats: seen.frames.append(frames.clone()))
            spy(os, "replace", of_replace)
            train.main([*CPU, "--data", str(make_pack(pack, frames)), "--out", str(out), "--epochs", "1",
                        *map(str, words)])
        seen.out, seen.text = out, capfd.readouterr().out
        return seen
    return call


def noise(n):
    return np.random.default_rng(0).integers(0, 256, (n, 40, 54, 3), np.uint8)


def test_seed_decides_about_weights_order_and_latents(call):
    one, again, two = (call(noise(64), "--seed", seed) for seed in (1, 1, 2))
    for name in ("frames", "z", "images"):
        assert same(getattr(one, name), getattr(again, name))
    z_one, z_two = ([z for z in seen.z if len(z) == 16] for seen in (one, two))
    for a, b in ((one.frames, two.frames), (z_one, z_two), (one.saves[0]["G"], two.saves[0]["G"])):
        assert not same(a, b)
    torch.manual_seed(2)
    G = model.Generator(32, 8, 4).apply(model.init_weights)
    assert same(two.saves[0]["G"]["main.0.weight"], G.main[0].weight.data)


@pytest.mark.parametrize("precision, dtype", [
    ("bf16", torch.bfloat16), ("fp32", torch.float32), ("auto", torch.float32)])
def test_precision_is_that_of_the_forward_pass_and_auto_is_fp32_on_a_cpu(call, precision, dtype):
    seen = call(noise(16), "--precision", precision)
    assert [found for z, found in zip(seen.z, seen.dtypes) if len(z) == 16] == [dtype]
    assert seen.saves[-1]["G"]["main.0.weight"].dtype == torch.float32


def test_compile_compiles_both_networks(call, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda net, backend: compiled.append((type(net).__name__, backend)))
    call(noise(16), "--compile")
    assert sorted(compiled) == [("Discriminator", "inductor"), ("Generator", "inductor")]


# ---- length, saves and log lines ------------------------------------------------------------------------------------

def test_images_are_epochs_times_whole_batches(call):
    assert call(noise(50), "--epochs", 0).saves[-1]["images"] == 0
    seen = call(noise(50), "--batch-size", 12, "--epochs", 3)
    assert [len(frames) for frames in seen.frames] == 12 * [12]
    assert (seen.saves[-1]["images"], seen.saves[-1]["step"]) == (3 * 4 * 12, 12)
    for epoch in range(3):
        assert len({frame.numpy().tobytes() for part in seen.frames[4 * epoch:4 * epoch + 4] for frame in part}) == 48


@pytest.fixture
def clock(monkeypatch):
    """A clock of which a step takes 6 seconds, and a save takes clock.save seconds."""
    clock = SimpleNamespace(now=1000.0, save=0, step=train.DCGAN.step, replace=os.replace)
    monkeypatch.setattr(train, "time", SimpleNamespace(
        **{name: lambda: clock.now for name in ("time", "monotonic", "perf_counter")}, sleep=lambda seconds: None))

    def step(dcgan, frames):
        clock.now += 6
        return clock.step(dcgan, frames)

    def replace(source, target):
        clock.now += clock.save * (Path(target).name == "checkpoint.pt")
        clock.replace(source, target)

    monkeypatch.setattr(train.DCGAN, "step", step)
    monkeypatch.setattr(os, "replace", replace)
    return clock


def test_minutes_end_a_run_with_everything_saved(call, clock):
    seen = call(noise(64), "--epochs", 100, "--minutes", 2)
    assert seen.saves[-1]["step"] in (20, 21) and f"image {seen.saves[-1]['images']}" in seen.text
    assert (seen.out / "samples" / f"{seen.saves[-1]['images']:09d}.png").exists()


def test_save_minutes_are_the_time_between_saves(call, clock):
    seen = call(noise(64), "--epochs", 5, "--save-minutes", 0.4)
    assert [save["step"] for save in seen.saves] == [0, 4, 8, 12, 16, 20]
    assert sorted(path.stem for path in (seen.out / "samples").iterdir()) == [f"{64 * i:09d}" for i in range(6)]


def test_saves_take_less_than_3_percent_of_the_time(call, clock):
    clock.save = 3
    seen = call(noise(64), "--epochs", 15, "--save-minutes", 0.4)  # 360 seconds
    assert 4 <= len(seen.saves) <= 2 + 0.03 * 360 / 3


def test_log_lines_come_after_the_first_step_and_then_by_the_clock(call, clock):
    seen = call(noise(64), "--epochs", 5, "--log-seconds", 20, "--save-minutes", 60)
    assert re.findall(r"\]\[(\d+)/20\] Loss_D", seen.text) == ["1", "5", "9", "13", "17"]


def test_the_log_line_has_the_numbers_of_tensorboard(call, clock):
    seen = call(noise(64), "--epochs", 3, "--log-seconds", 0)
    number = r"(\d+\.\d\d)"
    lines = re.findall(rf"^\[(\d)/3\]\[(\d+)/12\] Loss_D {number} Loss_G {number} D\(x\) {number} "
                       rf"D\(G\(z\)\) {number}/{number} ([\d,.]+)/s$", seen.text, re.M)
    assert [line[:2] for line in lines] == [(str((i + 3) // 4), str(i)) for i in range(1, 13)]
    shown = scalars(seen.out, [*STATS, "images/s"])
    for column, name in enumerate(STATS, 2):
        assert [(16 * i, float(line[column])) for i, line in enumerate(lines, 1)] == [
            (images, pytest.approx(value, abs=0.0051)) for images, value in shown[name]]
    assert [value for _, value in shown["images/s"]] == pytest.approx(12 * [16 / 6])
    first = [float(number) for number in lines[0][2:7]]
    assert first == pytest.approx([2 * np.log(2), np.log(2), 0.5, 0.5, 0.5], abs=0.1), "D knows nothing yet"


# ---- presets, data and the names of runs ----------------------------------------------------------------------------

GOLDEN = {  # from the README's table, the paper's section 4 and the write-up, in the order of FIELDS
    "naive-64": (64, 4, 100, 64, 64, "normal", 128, 2e-4, 0.5, 0, 0, False, False),
    "radford-64": (64, 5, 100, 128, 128, "uniform", 128, 2e-4, 0.5, 0, 0, False, False),
    "clamp-64": (64, 4, 256, 256, 64, "normal", 256, 2e-4, 0.5, 0, 0, False, False),
    "safe-128": (128, 4, 128, 128, 32, "normal", 256, 2e-4, 0.5, 0.05, 0.05, False, False),
    "small-64": (64, 4, 100, 32, 32, "normal", 16, 2e-4, 0.5, 0, 0, True, True),
    "small-128": (128, 4, 100, 16, 16, "normal", 16, 2e-4, 0.5, 0, 0, True, True),
    "demo-64": (64, 4, 100, 24, 16, "normal", 16, 4e-4, 0.5, 0, 0, True, True),
}
FIELDS = ("image_size", "kernel_size", "nz", "ngf", "ndf", "latent", "batch_size", "lr", "beta1", "weight_decay",
          "instance_noise", "augment", "mirror")


@pytest.mark.parametrize("preset", GOLDEN)
def test_a_preset_sets_its_numbers_and_options_override_them(preset):
    args = train.look_up(train.parse_args(["--preset", preset]))
    assert tuple(getattr(args, name) for name in FIELDS) == GOLDEN[preset]
    args = train.look_up(train.parse_args(["--preset", preset, "--nz", "7", "--beta1", "0.1", "--no-augment"]))
    assert (args.nz, args.beta1, args.augment, args.ngf) == (7, 0.1, False, GOLDEN[preset][3])


@pytest.mark.parametrize("n, image_size, preset, batch_size, epochs", [
    (9_999, 32, "small-64", 16, 51),  # 624 steps an epoch: 500,000 images are 50.08 epochs
    (10_000, 32, "naive-64", 128, 51),
    (25_000, 32, "naive-64", 128, 25),  # 500,000 images are 20 passes
    (100, 128, "small-128", 16, 5209),
])
def test_the_preset_and_the_length_follow_from_the_frames(
        n, image_size, preset, batch_size, epochs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = "--nz 8 --ngf 1 --ndf 1 --device cpu --minutes 0.00001".split()
    train.main(["--data", str(make_pack(tmp_path / f"packs/a-{image_size}", n, 0, image_size)), *small])
    args = content(f"runs/a-{image_size}/checkpoint.pt")["args"]
    found = [args[name] for name in ("preset", "batch_size", "image_size", "epochs")]
    assert found == [preset, batch_size, image_size, epochs]


@pytest.fixture
def photos(tmp_path):
    """Two folders of photographs."""
    for name in ("photos", "flowers"):
        (tmp_path / name).mkdir()
        for i, frame in enumerate(np.random.default_rng(len(name)).integers(0, 256, (30, 6, 8, 3), np.uint8)):
            Image.fromarray(frame).resize((160, 120)).save(tmp_path / name / f"{i}.jpg")
    return tmp_path


def test_a_run_is_named_after_its_folder_of_photographs(photos):
    words = "--nz 8 --ngf 4 --ndf 4 --device cpu --epochs 1".split()
    for name, size in (("photos", 64), ("flowers", 32)):
        run("train.py", "--data", name, "--image-size", size, *words, cwd=photos)
        assert Path(content(photos / f"runs/{name}-{size}/checkpoint.pt")["args"]["data"]).name == f"{name}-{size}"
    assert {path.name for path in (photos / "runs").iterdir()} == {path.name for path in (photos / "packs").iterdir()}


def test_without_data_it_draws_streets_and_trains_on_them_for_four_and_a_half_minutes(demo):
    saved = content(demo / "runs/demo-64/checkpoint.pt")
    args = saved["args"]
    assert (args["preset"], args["minutes"], args["save_minutes"], args["batch_size"]) == ("demo-64", 4.5, 1, 16)
    assert Path(args["data"]).name == "demo-64" and saved["images"] > 16 and (demo / "packs/demo-64/pack.json").exists()
    assert train.look_up(train.parse_args(["--preset", "demo-64", "--data", "photos"])).minutes == 0


def test_a_run_without_data_is_named_after_the_demo_in_any_folder(pack, monkeypatch):
    monkeypatch.chdir(pack)
    assert train.default_out({}) == Path("runs/demo-64")


def test_two_starts_at_once_share_one_pack(photos):
    words = command("train.py", *CPU, "--data", "photos", "--epochs", 1)
    with ending(Fork([*words, "--out", "a"], photos)) as one, ending(Fork([*words, "--out", "b"], photos)) as two:
        for job in (one, two):
            assert job.communicate()[1].count("error") == 0 and job.returncode == 0
    assert content(photos / "a/checkpoint.pt")["pack"] == content(photos / "b/checkpoint.pt")["pack"]


# ---- another run's options and networks -----------------------------------------------------------------------------

def test_a_checkpoint_has_all_options_and_typed_ones_override_them_in_a_resumed_run(pack, tmp_path):
    words = "--lr 0.001 --seed 5 --weight-decay 0.25 --mirror --epochs 1 --out".split()
    train.main([*CPU, "--data", os.path.relpath(pack), *words, str(tmp_path / "run")])
    first = content(tmp_path / "run/checkpoint.pt")
    train.main(["--resume", "--out", str(tmp_path / "run"), "--lr", "0.002", "--beta1", "0.75", "--epochs", "2"])
    second = content(tmp_path / "run/checkpoint.pt")
    expected = dict(lr=0.001, seed=5, weight_decay=0.25, mirror=True, epochs=1, beta1=0.5, nz=8, device="cpu")
    assert {name: first["args"][name] for name in expected} == expected
    assert Path(first["args"]["data"]).is_absolute() and Path(first["args"]["data"]).samefile(pack)
    typed = dict(lr=0.002, beta1=0.75, epochs=2)
    changed = {name for name in first["args"] if first["args"][name] != second["args"][name]} - {"resume"}
    assert changed == set(typed) and all(second["args"][name] == typed[name] for name in typed)
    for name in ("opt_G", "opt_D"):
        group = second[name]["param_groups"][0]
        assert (group["lr"], group["betas"][0], group["weight_decay"]) == (0.002, 0.75, 0.25), "they take effect"


def test_init_starts_a_new_run_from_the_networks_of_another_one(trained, call):
    seen = call(noise(16), "--init", trained, "--data", make_pack(trained.with_name("pack"), noise(16)), "--lr", 0.003)
    old, (first, last) = content(trained / "checkpoint.pt"), seen.saves
    assert all(same(old[name], first[name]) for name in "GD") and first["images"] == 0 and last["images"] == 16
    assert same(old["G_ema"]["main.0.weight"], first["G_ema"]["main.0.weight"])
    moved = (last["G"]["main.0.weight"] - first["G"]["main.0.weight"]).abs()
    assert moved.median().item() == pytest.approx(0.003, rel=0.01), "the optimizers are new"


def test_init_takes_the_sizes_of_a_file_and_with_g_alone_d_is_new_and_a_line_says_so(trained, pack, tmp_path, capfd):
    weights = content(trained / "checkpoint.pt")["G_ema"]
    torch.save({f"module.{name}": value for name, value in weights.items()}, tmp_path / "netG.pth")
    for init, sizes in ((tmp_path / "netG.pth", (8, 4, 32)), (trained / "checkpoint.pt", (8, 4, 4))):
        out = tmp_path / init.stem
        train.main(["--init", str(init), "--data", str(pack), "--epochs", "1", "--device", "cpu", "--out", str(out)])
        saved = content(out / "checkpoint.pt")
        assert tuple(saved["sizes"][name] for name in ("nz", "ngf", "ndf")) == sizes and saved["images"] == 128
        lines = [line for line in capfd.readouterr().out.splitlines() if "discriminator" in line.lower()]
        assert len(lines) == (init.suffix == ".pth")


# ---- mistakes -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def places(pack, trained, tmp_path_factory):
    """A folder with a pack, a run of it, and other things."""
    folder = tmp_path_factory.mktemp("places")
    shutil.copytree(pack, folder / "pack")
    shutil.copytree(trained, folder / "runs/mine")
    make_pack(folder / "pack-64", 20, 0, 64)
    (folder / "other").mkdir()
    for name in ("other/notes.txt", "a file"):
        (folder / name).write_text("")
    (folder / "crlf.txt").write_bytes(b"linear\r\nconv2d\r\n")
    (folder / "dead link").symlink_to(folder / "nowhere")
    return folder


P = "--data pack " + " ".join(CPU) + " "
MISTAKES = {  # {words: what the line names}
    "--data nowhere": "nowhere", "--data 'a file'": "file", "--data other": "other", "--data runs/mine": "runs/mine",
    "--data ''": "--data empty", "--out ''": "--out empty", "--data 'red\x1b[31mname'": "red name",
    P + "--batch-size 500": "--batch-size 500 136", P + "--batch-size 1": "--batch-size", P + "--image-size 64": "32",
    P + "--minutes -1": "--minutes", P + "--save-minutes -1": "--save-minutes", P + "--lr nan": "--lr",
    P + "--preset naive": "--preset naive-64", P + "--sed 4": "--sed", P + "--graph": "--graph",
    P + "--device hpu": "habana_frameworks --device cpu", P + "--fp32-ops missing.txt": "missing.txt",
    "--device hpu --data pack --bf16-ops crlf.txt": "crlf.txt line ends", P + "--out runs/mine": "runs/mine --resume",
    P + "--out 'a file'": "file", P + "--out 'a file/run'": "file", P + "--out 'dead link/run'": "dead link",
    P + "--out pack": "pack --out", P + "--out other": "other notes.txt --out",
    "--data pack --init other": "other", "--data pack --init runs/mine --ngf 5": "runs/mine ngf 4",
    "--data pack-64 --init runs/mine": "pack-64 32", "--data pack --init crlf.txt": "crlf.txt",
}


def tree(folder):
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*") if path.is_symlink() or path.is_file()}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_one_line_with_status_2_and_writes_nothing(words, places, monkeypatch, capfd):
    monkeypatch.chdir(places)
    before = tree(places)
    with pytest.raises(SystemExit) as end:
        model.run_script(lambda: train.main(shlex.split(words)), "choose less")
    lines = [line for line in capfd.readouterr().err.splitlines() if not line.startswith(("usage:", "  "))]
    assert end.value.code == 2 and len(lines) == 1 and "error: " in lines[0], lines
    assert all(fact in lines[0] for fact in MISTAKES[words].split()) and lines[0].isprintable()
    assert tree(places) == before


# ---- the process ----------------------------------------------------------------------------------------------------

def test_op_lists_are_accepted_beside_a_card_with_one_line(pack, tmp_path, capfd):
    (tmp_path / "ops").write_text("linear\n")
    before = dict(os.environ)
    train.main([*CPU, "--data", str(pack), "--epochs", "1", "--hmp-bf16", str(tmp_path / "ops"), "--fp32-ops",
                str(tmp_path / "ops"), "--out", str(tmp_path / "run")])
    assert capfd.readouterr().out.count("autocast") == 1 and dict(os.environ) == before


def test_a_home_folder_is_a_tilde_and_escape_sequences_in_names_do_not_reach_the_terminal(pack, tmp_path):
    shutil.copytree(pack, tmp_path / "red\x1b[31m")
    words = *CPU, "--data=~/red\x1b[31m", "--epochs", 1, "--out=~/run\x1b[0m"
    done = run("train.py", *words, cwd=tmp_path, env={"HOME": str(tmp_path)})
    assert (tmp_path / "run\x1b[0m/checkpoint.pt").exists() and "\x1b" not in done.stdout + done.stderr
    assert not (tmp_path / "~").exists()


def test_a_main_that_is_called_from_a_notebook_leaves_the_process_as_it_was(pack, tmp_path):
    def state():
        handlers = {signum: signal.getsignal(signum) for signum in signal.valid_signals()}
        streams = sys.stdout, sys.stdout.errors, sys.excepthook, threading.excepthook
        return handlers, streams, dict(os.environ), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()

    before = state()
    dcgan = train.main([*CPU, "--data", str(pack), "--epochs", "1", "--out", str(tmp_path / "run")])
    assert state() == before and dcgan.G.nz == 8


@pytest.mark.parametrize("own, expected", [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7")])
@pytest.mark.parametrize("script", ["train.py", "sample.py", "interpolate.py"])
def test_waiting_threads_sleep_unless_the_user_has_set_it(script, own, expected, tmp_path):
    """The variable is read when torch is imported. This torch ends the process."""
    (tmp_path / "torch.py").write_text("import os\nprint(os.environ.get('GOMP_SPINCOUNT'), flush=True)\nos._exit(0)\n")
    env = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    env |= {"PYTHONPATH": str(tmp_path), **own}
    done = subprocess.run(command(script, "--help"), env=env, capture_output=True)
    assert done.stdout.decode().strip() == expected, done.stderr
