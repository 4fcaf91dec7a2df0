"""Training as people run it: defaults that fit the data, stopping, terminals and pipes, batch systems, second jobs."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import (
    ROOT,
    TINY,
    Training,
    command,
    content,
    new_process,
    run,
    same,
    scalars,
    torchrun,
)

sys.path.insert(0, str(ROOT))

import torch

import model
import prepare_data
import train

CPU = [*TINY, "--device", "cpu"]
ENDLESS = [*CPU, "--epochs", 100_000, "--log-seconds", 0]


def make_pack(folder, n, image_size=32, held_out=0):
    """A pack of n grey training frames."""
    folder.mkdir()
    H, W = prepare_data.frame_size(image_size)
    for split, count in (("train", n), ("holdout", held_out)):
        np.save(folder / f"{split}.npy", np.full((count, H, W, 3), 99, np.uint8))
    (folder / "index.csv").write_text(f"split,row,city,sequence,key,source file\n{folder.name}\n")
    counts = {"train": {"Bath": n}, "holdout": {"Bath": held_out}}
    info = dict(format=prepare_data.FORMAT, image_size=image_size, H=H, W=W, counts=counts, arguments={})
    (folder / "pack.json").write_text(json.dumps(info))
    return folder


# ---- defaults follow the data ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("n, image_size, preset", [
    (9_999, 32, "small-64"),
    (10_000, 32, "naive-64"),
    (100, 128, "small-128"),
])
def test_the_preset_and_the_length_follow_from_the_frames(n, image_size, preset, tmp_path):
    pack = make_pack(tmp_path / "pack", n, image_size=image_size)
    small = "--nz 8 --ngf 1 --ndf 1 --device cpu --precision fp32 --minutes 0.001".split()
    done = run("train.py", "--data", pack, *small, cwd=tmp_path)
    saved = json.loads((tmp_path / "runs" / preset / "args.json").read_text())
    assert saved["batch_size"] == model.PRESETS[preset]["batch_size"] and saved["image_size"] == image_size
    images = n // saved["batch_size"] * saved["batch_size"]
    assert saved["epochs"] == -(-500_000 // images), "about 500,000 images"
    steps = images // saved["batch_size"] * saved["epochs"]
    assert f"{preset} in fp32 on 1 × cpu, batch size {saved['batch_size']}" in done.stdout
    assert f"image 0 of {images * saved['epochs']:,}: {steps:,} steps to go" in done.stdout


def test_a_large_pack_has_25_epochs_and_a_short_run_says_that_it_is_short(pack, tmp_path):
    done = run("train.py", *CPU, "--data", pack, "--epochs", 2, "--out", tmp_path / "run")
    assert "only 16 steps in all: use a larger --epochs" in done.stdout
    words = "--data", make_pack(tmp_path / "pack", 40_000), "--device", "cpu", "--minutes", 0.001, *TINY
    run("train.py", *words, "--out", tmp_path / "large")
    assert json.loads((tmp_path / "large" / "args.json").read_text())["epochs"] == 25


def test_help_shows_what_each_preset_sets(capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for preset, values in model.PRESETS.items():
        words = ", ".join(f"{name.replace('_', '-')} {value}" for name, value in values.items())
        assert f"{preset}: {words}" in text


def test_the_log_follows_the_clock_and_changes_nothing(pack, tmp_path):
    """Also on two processes."""
    words = [*CPU, "--data", pack, "--epochs", 4, "--augment", "--out"]
    for name, seconds, minutes in (("often", 0, 0), ("never", 1000, 60)):
        text = run("train.py", *words, tmp_path / name, "--log-seconds", seconds, "--save-minutes", minutes).stdout
        lines = re.findall(r"\]\[(\d+)/32\] Loss_D", text)
        assert lines == ([str(i) for i in range(1, 33)] if name == "often" else ["1", "32"]), "the first and the last"
        two = torchrun("train.py", *words, tmp_path / f"two-{name}", "--log-seconds", seconds)
        assert new_process(two).wait(240) == 0
    for a, b in (("often", "never"), ("two-often", "two-never")):
        a, b = (content(tmp_path / name / "checkpoint.pt") for name in (a, b))
        assert all(same(a[name], b[name]) for name in ("G", "D", "G_ema", "opt_G", "step", "images"))


# ---- another run's networks -----------------------------------------------------------------------------------------

def test_a_new_run_starts_from_the_networks_of_another_run_on_other_frames(trained, tmp_path):
    pack, out = make_pack(tmp_path / "pack", 64), tmp_path / "new"
    words = "--device", "cpu", "--precision", "fp32", "--data", pack, "--epochs", 1, "--out", out
    run("train.py", "--init", trained, *words)
    old, first, new = content(trained / "checkpoint.pt"), content(out / "generator-000000000.pt"), content(
        out / "checkpoint.pt")
    weights = [name for name in old["G_ema"] if name.endswith("weight")]
    assert all(torch.equal(old["G_ema"][name], first["G_ema"][name]) for name in weights), "it begins with the average"
    assert new["sizes"] == old["sizes"] and new["images"] == 64 and new["step"] == 4
    args = json.loads((out / "args.json").read_text())
    assert args["preset"] == "small-64" and args["batch_size"] == 16, "the data choose the rest"
    run("train.py", "--resume", "--out", out, "--epochs", 2)
    assert content(out / "checkpoint.pt")["images"] == 128


def test_a_file_with_g_alone_gives_a_new_d_and_one_line_says_so(trained, pack, tmp_path):
    generator = max(trained.glob("generator-0*.pt"))
    weights = {f"module.{name}": value for name, value in content(generator)["G_ema"].items()}
    torch.save({"netG": weights}, tmp_path / "netG.pth")  # as another program saves it
    for file in (generator, tmp_path / "netG.pth"):
        out = tmp_path / file.stem
        words = "--data", pack, "--epochs", 1, "--ndf", 4, "--device", "cpu"
        done = run("train.py", "--init", file, *words, "--out", out)
        assert f"{file} has no discriminator: D starts anew" in done.stdout
        first = content(out / "generator-000000000.pt")
        assert torch.equal(first["G_ema"]["main.0.weight"], content(generator)["G_ema"]["main.0.weight"])


# ---- a changed project ----------------------------------------------------------------------------------------------

CHANGES = {  # [(file, text, its replacement), …]
    "a generator with one more layer": [
        ("model.py", "        layers += [  # → (nc) x 64 x 64", """
        layers += [nn.Conv2d(ngf, ngf, 3, padding=1), nn.BatchNorm2d(ngf), nn.ReLU()]
        layers += [  # → (nc) x 64 x 64"""),
    ],
    "a discriminator with SiLU": [
        ("model.py", """                nn.BatchNorm2d(2 * width),
                nn.LeakyReLU(0.2),
            ]
            width *= 2
        layers += [  # → 1 x 1 x 1""", """                nn.BatchNorm2d(2 * width),
                nn.SiLU(),
            ]
            width *= 2
        layers += [  # → 1 x 1 x 1"""),
    ],
    "a discriminator with spectral norm": [
        ("model.py", "nn.Conv2d(width, 2 * width, **halve),",
         "torch.nn.utils.parametrizations.spectral_norm(nn.Conv2d(width, 2 * width, **halve)),"),
    ],
    "a hinge loss": [
        ("train.py", "    return F.softplus(-on_real).mean() + F.softplus(on_fake).mean()",
         "    return F.relu(1 - on_real).mean() + F.relu(1 + on_fake).mean()"),
    ],
    "one more number in the log": [
        ("train.py", """                "Loss_G": loss_G.detach(),
""", """                "Loss_G": loss_G.detach(),
                "logits": on_real.mean(),
"""),
    ],
    "a new size of G": [
        ("model.py", "nz=100, ngf=64, nc=3, kernel_size=4):", "nz=100, ngf=64, nc=3, kernel_size=4, more=0):"),
        ("model.py", "        layers += [  # → (nc) x 64 x 64", """
        layers += more * [nn.Conv2d(ngf, ngf, 3, padding=1), nn.BatchNorm2d(ngf), nn.ReLU()]
        layers += [  # → (nc) x 64 x 64"""),
        ("model.py", "    mirror=False,", "    more=1,\n    mirror=False,"),
        ("model.py", 'SIZES = ("image_size",', 'SIZES = ("more", "image_size",'),
        ("train.py", "kernel_size=args.kernel_size)\n        G.apply", "kernel_size=args.kernel_size, more=args.more)\n        G.apply"),
        ("train.py", '    add("--nz",', '    add("--more", type=int)\n    add("--nz",'),
    ],
    "a new option": [  # which older runs do not have
        ("model.py", "    mirror=False,", "    beta2=0.999,\n    mirror=False,"),
        ("train.py", "beta1=(0, 0.999),", "beta1=(0, 0.999), beta2=(0, 1),"),
        ("train.py", "betas=(args.beta1, 0.999),", "betas=(args.beta1, args.beta2),"),
        ("train.py", '    add("--nz",', '    add("--beta2", type=float)\n    add("--nz",'),
    ],
}


@pytest.fixture(scope="module")
def many_held_out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packs") / "pack"
    run("prepare_data.py", "--demo", 240, "--image-size", 32, "--holdout", 0.4, folder)
    return folder


@pytest.fixture(scope="module")
def real_coverage(many_held_out):
    pack = prepare_data.open_pack(many_held_out)
    return round(model.Score(pack.train, pack.holdout, 32).real[1], 4)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_a_line_or_two_trains_resumes_and_is_drawn(change, many_held_out, real_coverage, tmp_path):
    """Real images keep their coverage: the yardstick does not move with the networks."""
    project = tmp_path / "project"
    project.mkdir()
    for script in ROOT.glob("*.py"):
        shutil.copy(script, project)
    for name, before, after in CHANGES[change]:
        text = (project / name).read_text(encoding="utf-8")
        assert text.count(before) == 1
        (project / name).write_text(text.replace(before, after), encoding="utf-8")

    words = *CPU, "--data", many_held_out, "--out", tmp_path / "run", "--log-seconds", 0
    first = "train.py" if change == "a new option" else project / "train.py"
    run(first, *words, "--epochs", 1)
    run(project / "train.py", "--resume", "--epochs", 2, "--out", tmp_path / "run")
    run(project / "sample.py", "--checkpoint", tmp_path / "run", "--n", 4, "--out", tmp_path / "a.png")
    saved = content(tmp_path / "run" / "checkpoint.pt")
    assert saved["step"] == 14 and saved["scores"][-1][4] == real_coverage
    if "one more number" in change:
        assert len(scalars(tmp_path / "run", ["logits"])["logits"]) == 14
    original = shutil.copytree(tmp_path / "run", tmp_path / "original")
    if "layer" in change:
        refused = run("train.py", "--resume", "--epochs", 3, "--out", original, status=2)
        assert "does not fit these networks" in refused.stderr and refused.stderr.count("\n") == 1


def test_weights_under_spectral_norm_are_initialised_like_the_others():
    layer = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Conv2d(64, 64, 4))
    model.init_weights(layer)
    assert layer.parametrizations.weight.original.std().item() == pytest.approx(0.02, rel=0.05)


def test_the_average_of_a_g_with_spectral_norm_has_its_norms():
    """The vectors that estimate them are buffers. An average of the weights alone leaves them at their start."""
    dcgan = train.DCGAN(train.parse_args([*map(str, CPU), "--data", "unused"]), train.Device("cpu"))
    for G in (dcgan.G, dcgan.G_ema):
        torch.nn.utils.parametrizations.spectral_norm(G.main[3])
    torch.nn.init.normal_(dcgan.G.main[3].parametrizations.weight.original)
    dcgan.G_ema.load_state_dict(dcgan.G.state_dict())
    for _ in range(100):
        dcgan.G(torch.zeros(2, 8))  # in training mode each call improves the vectors of G alone
    norms = [torch.linalg.matrix_norm(G.main[3].weight.flatten(1), 2).item() for G in (dcgan.G.eval(), dcgan.sampler())]
    assert norms[1] == pytest.approx(norms[0], rel=0.01)


# ---- a call from a notebook -----------------------------------------------------------------------------------------

def state_of_this_process():
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    random_numbers = torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()
    return handlers, threading.excepthook, sys.stdout, sys.stdout.errors, dict(os.environ), random_numbers


def test_a_main_that_is_called_leaves_no_trace(pack, tmp_path):
    before = state_of_this_process()
    dcgan = train.main([*map(str, CPU), "--data", str(pack), "--epochs", "1", "--out", str(tmp_path / "run")])
    assert state_of_this_process() == before
    assert dcgan.G.nz == 8, "it returns the networks"
    dcgan.load_state_dict(dcgan.state_dict())


def test_options_for_gaudi_leave_the_environment_of_other_devices_alone(tmp_path):
    (tmp_path / "ops").write_text("conv2d\n")
    before = dict(os.environ)
    words = ["--preset", "demo-64", "--device", "cpu", "--compile", "--bf16-ops", str(tmp_path / "ops")]
    train.set_up_device(train.parse_args(words))
    assert dict(os.environ) == before


def test_a_main_that_is_called_in_a_thread_trains(pack, tmp_path):
    words = [*map(str, CPU), "--data", str(pack), "--epochs", "1", "--out", str(tmp_path / "run")]
    thread = threading.Thread(target=train.main, args=(words,))
    thread.start()
    thread.join(120)
    assert (tmp_path / "run" / "checkpoint.pt").exists()


def test_a_score_leaves_the_callers_random_numbers_alone(many_held_out):
    pack = prepare_data.open_pack(many_held_out)
    before = torch.get_rng_state()
    model.Score(pack.train, pack.holdout, 32)
    assert torch.equal(before, torch.get_rng_state())


def test_a_score_refuses_what_it_would_judge_wrongly():
    frames = np.zeros((50, 40, 54, 3), np.uint8)
    for wrong in (frames / 255, frames[:, :, :36], frames[:, :30], frames[:49]):
        with pytest.raises(model.InputError, match="a score needs"):
            model.Score(frames, wrong, 32)
    with pytest.raises(model.InputError, match="image size 48"):
        model.Score(frames, frames, 48)
    G = model.Generator(64, 8, 1).eval()
    with pytest.raises(model.InputError, match="G draws 64 pixels"):
        model.Score(frames, frames, 32)(G)
    with pytest.raises(ValueError, match=r"G\.eval"):
        model.render(G.train(), torch.zeros(1, 8))


# ---- devices --------------------------------------------------------------------------------------------------------

def test_a_device_that_nobody_has_tried_gets_safe_defaults(monkeypatch):
    monkeypatch.setattr(train, "choose_device", lambda name, rank: torch.device("mps"))
    assert train.set_up_device(train.parse_args(["--preset", "naive-64", "--device", "mps"])) == train.Device("mps")


@pytest.mark.parametrize("words, precision", [([], "fp32"), (["--precision", "bf16"], "bf16")])
def test_a_cpu_computes_in_fp32_unless_it_is_told(words, precision):
    """Also one with bf16: beside another program oneDNN's bf16 is many times slower (tests/README.md)."""
    args = train.parse_args(["--preset", "demo-64", "--device", "cpu", *words])
    assert train.set_up_device(args).precision == precision


@pytest.mark.parametrize("files, threads", [
    ({"cpu.max": "max 100000"}, 4), ({"cpu.max": "150000 100000"}, 2), ({"cpu.max": "50000 100000"}, 1), ({}, 4),
    ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 4),
    ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3)])
def test_a_containers_quota_sets_the_number_of_threads(files, threads, tmp_path, monkeypatch):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        model.limit_threads(tmp_path)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("words, preset", [([], "demo-64"), (["--preset", "demo-64"], "demo-64"),
                                           (["--preset", "small-64"], "small-64")])
def test_drawn_streets_have_the_length_that_help_says(words, preset):
    args = train.parse_args(words)
    assert (args.preset, args.minutes, args.epochs, args.save_minutes) == (preset, 4.5, 1000, 1)
    assert train.parse_args([*words, "--data", "photos"]).minutes == 0


@pytest.mark.parametrize("load, free", [("idle", 4), ("nice", 4), ("user", 3), ("others", 4)])
def test_cores_that_other_programs_use_are_counted(load, free, monkeypatch):
    """Core 1 of four is busy, or does nice work, or only cores are busy that this process may not use."""
    def stat(tick):
        lines = ["cpu 1 1 1 1 1 1 1 0 0 0", "intr 1 2 3"]
        for core in range(8):
            busy = core > 3 if load == "others" else core == 1
            kind = {"others": "user"}.get(load, load) if busy else "idle"
            numbers = [tick if name == kind else 0 for name in ("user", "nice", "system", "idle", "iowait", "irq")]
            lines.append(f"cpu{core} {' '.join(map(str, numbers))} 0 0 0 0")
        return "\n".join(lines)

    texts = iter([stat(100), stat(130)])
    monkeypatch.setattr(model.Path, "read_text", lambda path: next(texts))
    monkeypatch.setattr(model.os, "sched_getaffinity", lambda process: {0, 1, 2, 3})
    assert model.free_cores(seconds=0) == free


@pytest.mark.parametrize("threads, free, advice", [(4, 3, "=3"), (2, 0, "=1"), (4, 4, ""), (1, 0, "")])
def test_a_run_beside_other_programs_starts_with_advice(threads, free, advice, monkeypatch, capsys):
    """It does not change the number of threads itself: runs with the same options end with the same weights."""
    monkeypatch.setattr(train, "free_cores", lambda: free)
    reporter = SimpleNamespace(args=SimpleNamespace(threads=threads))
    train.Reporter.advise_on_threads(reporter)
    line = capsys.readouterr().out
    assert f"OMP_NUM_THREADS{advice} " in line if advice else line == ""


def test_a_resumed_run_has_the_number_of_threads_that_it_began_with(trained, tmp_path, monkeypatch):
    """Rounding depends on it. OMP_NUM_THREADS, which a user sets, overrides it."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    out = shutil.copytree(trained, tmp_path / "run")
    options = json.loads((out / "args.json").read_text())
    (out / "args.json").write_text(json.dumps(options | {"threads": 3, "device": "cpu"}))
    words = "--resume", "--out", str(out)
    try:
        for own, expected in ((4, 3), (2, 2)):  # no more than the machine, or its quota, has now
            torch.set_num_threads(own)
            train.set_up_device(train.parse_args(words))
            assert torch.get_num_threads() == expected
        torch.set_num_threads(2)
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        args = train.parse_args(words)
        train.set_up_device(args)
        assert torch.get_num_threads() == args.threads == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("own, expected", [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "")])
@pytest.mark.parametrize("script", ["train.py", "sample.py", "interpolate.py"])
def test_waiting_threads_sleep_unless_the_user_has_set_it(script, own, expected):
    """The variable is read when torch is imported."""
    code = f"""
import os, runpy, sys
for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
    os.environ.pop(name, None)
os.environ.update({own})
sys.argv = [{script!r}, "--help"]
try:
    runpy.run_path({str(ROOT / script)!r}, run_name="__main__")
except SystemExit:
    print("set to:", os.environ.get("GOMP_SPINCOUNT", ""))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == f"set to: {expected}", done.stderr


# ---- stopping and going on ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP", "SIGUSR1"])
def test_a_signal_saves_and_says_how_to_go_on(name, pack, tmp_path):
    """Ctrl-C, a closed terminal, and what Slurm sends before its time limit."""
    out, signum = tmp_path / "my run", getattr(signal, name)
    with Training(command("train.py", *ENDLESS, "--data", pack, "--out", out)) as training:
        training.until(r"\]\[12/")
        training.process.send_signal(signum)
        assert training.end() == 128 + signum
    images = content(out / "checkpoint.pt")["images"]
    assert images >= 12 * 16
    assert f"stopped and saved at image {images:,}; go on with: python train.py --resume --out '{out}'" in training.text
    assert f"see it with: python sample.py --checkpoint '{out}'" in training.text


def test_nohup_keeps_a_run_going_when_the_terminal_closes(pack, tmp_path):
    with Training(["nohup", *command("train.py", *ENDLESS, "--data", pack, "--out", tmp_path / "run")]) as training:
        training.until(r"\]\[5/")
        training.process.send_signal(signal.SIGHUP)
        for _ in range(20):
            training.until("Loss_D")


def test_resume_says_that_there_is_no_run_and_starts_one(pack, tmp_path):
    words = *CPU, "--data", pack, "--epochs", 1, "--resume"
    done = run("train.py", *words, "--out", "runs/typo", cwd=tmp_path)
    assert "no run in runs/typo: starting one" in done.stdout
    assert "starting one" not in run("train.py", *words, "--out", "runs/typo", cwd=tmp_path).stdout


def test_a_run_goes_on_with_larger_batches_and_counts_its_images(trained, tmp_path):
    out = shutil.copytree(trained, tmp_path / "run")
    text = run("train.py", "--resume", "--out", out, "--batch-size", 24, "--epochs", 3, "--log-seconds", 0).stdout
    total = int(re.search(r"image 256 of ([\d,]+)", text)[1].replace(",", ""))
    images = content(out / "checkpoint.pt")["images"]
    assert total - 24 < images <= total
    for epoch, epochs in re.findall(r"^\[(\d+)/(\d+)\]", text, re.M):
        assert int(epoch) <= int(epochs) == 3


# ---- terminals, pipes and disks -------------------------------------------------------------------------------------

def shell(line, **kwargs):
    return subprocess.run(["bash", "-c", line], text=True, capture_output=True, timeout=240, **kwargs)


def words_for_shell(*words):
    return subprocess.list2cmdline(command("train.py", *words))


def test_output_that_nobody_reads_costs_no_save(pack, tmp_path):
    """`| head` closes the pipe, `>&-` closes the output, and a log file can be on a full disk."""
    words = words_for_shell(*CPU, "--data", pack, "--epochs", 4, "--log-seconds", 0, "--out")
    full = f"(ulimit -f 1; {words} {tmp_path}/c > {tmp_path}/log)" if not os.path.exists("/dev/full") else \
        f"{words} {tmp_path}/c > /dev/full"
    for name, line in (("a", f"{words} {tmp_path}/a | head -3"), ("b", f"{words} {tmp_path}/b >&-"), ("c", full)):
        done = shell(f"set -o pipefail; {line}")
        assert (done.returncode, done.stderr) == (0, ""), name
        assert content(tmp_path / name / "checkpoint.pt")["images"] == 4 * 8 * 16, name


def test_ctrl_c_with_a_pipe_that_has_ended_saves(pack, tmp_path):
    """`python train.py | tee log` and Ctrl-C: tee ends first."""
    with Training(command("train.py", *ENDLESS, "--data", pack, "--out", tmp_path / "run")) as training:
        training.until(r"\]\[9/")
        training.process.stdout.close()
        time.sleep(0.5)
        training.process.send_signal(signal.SIGINT)
        assert training.process.wait(60) == 130
    assert content(tmp_path / "run" / "checkpoint.pt")["step"] > 9


def test_names_that_the_output_cannot_encode_are_printed_as_escapes(pack, tmp_path):
    data = shutil.copytree(pack, os.fsdecode(os.fsencode(tmp_path) + b"/Stra\xdfe \xe4"))
    env = {"PYTHONIOENCODING": "cp437"}
    done = run("train.py", *CPU, "--data", data, "--epochs", 1, "--out", tmp_path / "Улица", cwd=tmp_path, env=env,
               popen=new_process)
    assert "training frames of" in done.stdout and (tmp_path / "Улица" / "checkpoint.pt").exists()


def test_a_removed_folder_of_samples_is_made_again(pack, tmp_path):
    out = tmp_path / "run"
    with Training(command("train.py", *ENDLESS, "--save-minutes", 0, "--data", pack, "--out", out)) as training:
        training.until(r"\]\[5/")
        shutil.rmtree(out / "samples")
        training.until("saved at image")
        training.until("saved at image")
        training.process.send_signal(signal.SIGTERM)
        assert training.end() == 143 and "warning" not in training.text
    assert list((out / "samples").iterdir())


def test_a_full_disk_costs_no_picture_that_was_there(trained, tmp_path):
    """A limit on the size of files is the full disk."""
    for script, name in (("sample.py", "a.png"), ("sample.py", "a.html"), ("interpolate.py", "a.gif")):
        words = command(script, "--checkpoint", trained, "--out", tmp_path / name)
        assert subprocess.run(words, capture_output=True).returncode == 0
        before = (tmp_path / name).read_bytes()
        done = shell(f"ulimit -f 2; {subprocess.list2cmdline(words)}")
        assert (done.returncode, done.stderr.count("\n")) == (2, 1) and name in done.stderr, done.stderr
        assert (tmp_path / name).read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "a.html", "a.gif"}


def test_numbered_pictures_do_not_go_among_photographs(trained, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "beach.jpg").write_text("")
    for words in (["sample.py", "--separate", "--n", 2], ["interpolate.py", "--frames", 2]):
        refused = run(*words, "--checkpoint", trained, "--out", tmp_path / "photos", status=2)
        assert "photos has other files, such as beach.jpg" in refused.stderr
    assert len(list((tmp_path / "photos").iterdir())) == 1


def test_a_home_folder_can_be_written_with_a_tilde(pack, tmp_path):
    run("train.py", *CPU, "--data", pack, "--epochs", 1, "--out=~/run", cwd=tmp_path, env={"HOME": str(tmp_path)})
    assert (tmp_path / "run" / "checkpoint.pt").exists() and not (tmp_path / "~").exists()


def test_a_resumed_run_without_out_keeps_its_own_options(pack, tmp_path):
    """Where the data choose the preset, the run's folder is known late."""
    words = "--nz 8 --ngf 4 --ndf 4 --device cpu --precision fp32 --epochs 1".split()
    run("train.py", "--data", pack, *words, cwd=tmp_path)
    done = run("train.py", "--data", pack, "--resume", "--epochs", 2, cwd=tmp_path)
    assert "small-64 in fp32 on 1 × cpu" in done.stdout


def test_a_failing_write_names_the_file(tmp_path, monkeypatch):
    def fail(number):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Invalid argument: .*checkpoint.pt"):
        train.save_file(tmp_path / "checkpoint.pt", {})
    assert not list(tmp_path.iterdir())


def test_an_empty_args_json_is_one_line(trained, tmp_path):
    out = shutil.copytree(trained, tmp_path / "run")
    (out / "args.json").write_text("")
    refused = run("train.py", "--resume", "--out", out, status=2)
    assert "args.json cannot be read" in refused.stderr and "type all of the run's options once more" in refused.stderr


# ---- several jobs and processes -------------------------------------------------------------------------------------

def test_a_second_job_on_the_same_folder_ends_one_of_them_with_a_line(pack, tmp_path):
    words = [*ENDLESS, "--save-minutes", 0, "--data", pack, "--resume", "--out", tmp_path / "run"]
    with Training(command("train.py", *words)) as first:
        first.until(r"\]\[9/")
        with Training(command("train.py", *words)) as second:
            second.until("Loss_D")
            endings = {}
            deadline = time.monotonic() + 120
            while not endings and time.monotonic() < deadline:
                endings = {job: job.process.poll() for job in (first, second) if job.process.poll() is not None}
                time.sleep(0.1)
            ended = next(iter(endings))
            assert endings[ended] == 2
            ended.end()
            assert re.search("^error: another process has written to .*run", ended.text, re.M), ended.text
            assert content(tmp_path / "run" / "checkpoint.pt")["images"] > 0


def test_world_size_without_rank_is_one_line(tmp_path):
    done = run("train.py", env={"WORLD_SIZE": "2"}, cwd=tmp_path, status=2)
    assert "WORLD_SIZE is set and RANK is not" in done.stderr


DRIVER = """
import os, sys
sys.path.insert(0, {root!r})
import train
if os.environ["RANK"] == "1":
    {fault}
train.run_script(train.main)
"""


def run_with_a_faulty_rank(fault, words, tmp_path):
    """(seconds, output) of torchrun with two processes, of which rank 1 has a fault."""
    (tmp_path / "driver.py").write_text(DRIVER.format(root=str(ROOT), fault=fault))
    began = time.monotonic()
    process = subprocess.Popen(torchrun(tmp_path / "driver.py", *words), stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    text = process.communicate(timeout=240)[0]
    assert process.returncode != 0
    return time.monotonic() - began, text


def test_machines_with_different_packs_end_with_one_line(pack, tmp_path):
    other = shutil.copytree(pack, tmp_path / "other")
    (other / "index.csv").write_text("split,row\n")
    fault = f"sys.argv[sys.argv.index('--data') + 1] = {str(other)!r}"
    _, text = run_with_a_faulty_rank(fault, [*CPU, "--data", pack, "--out", tmp_path / "run"], tmp_path)
    assert text.count("the processes do not have the same pack: ") == 1
    assert not (tmp_path / "run").exists()


def test_a_rank_that_fails_ends_the_job_with_its_line(pack, tmp_path):
    fault = """
    def step(*args, seen=[], usual=train.DCGAN.step):
        seen.append(0)
        if len(seen) == 5:
            raise train.InputError("the disk of this machine has gone")
        return usual(*args)
    train.DCGAN.step = step""".strip()
    words = [*ENDLESS, "--data", pack, "--out", tmp_path / "run"]
    took, text = run_with_a_faulty_rank(fault, words, tmp_path)
    assert text.count("error: the disk of this machine has gone") == 1
    assert f'File "{ROOT}' not in text, "the other rank says nothing; torchrun prints a traceback of its own"
    assert took < 120


def test_a_mistake_of_all_ranks_is_printed_once(pack, tmp_path):
    process = subprocess.Popen(torchrun("train.py", *CPU, "--data", pack, "--batch-size", 500), cwd=tmp_path,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    text = process.communicate(timeout=240)[0]
    assert text.count("error: --batch-size 500 is more than") == 1
