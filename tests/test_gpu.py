"""The real thing on an NVIDIA GPU. Without one the tests are skipped, but most of them can be tried on the CPU:

    TEST_GPU_DEVICE=cpu python -m pytest tests/test_gpu.py
"""
import os
import re
import signal
import subprocess
import sys
from itertools import islice

import numpy as np
import pytest
from helpers import ROOT, command, run

sys.path.insert(0, str(ROOT))

import torch
from PIL import Image

import model
import prepare_data
import train

DEVICE = os.environ.get("TEST_GPU_DEVICE", "cuda")
GPUS = torch.cuda.device_count()
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
SMALL = "--preset naive-64 --image-size 32 --nz 32 --ngf 16 --ndf 16 --batch-size 32 --device".split() + [DEVICE]
MODES = [["--graph"], ["--compile"], ["--graph", "--compile"]]


@pytest.fixture(scope="session")
def pack(tmp_path_factory):
    """A pack of 288 drawn streets for images of 32×32, with enough held out for a score."""
    folder = tmp_path_factory.mktemp("packs") / "streets"
    run("prepare_data.py", "--demo", 288, "--image-size", 32, "--holdout", 0.4, folder)
    return folder


@pytest.fixture(autouse=True)
def same_state_for_each_test(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # training does not set it
    yield
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.set_stream(torch.cuda.default_stream())  # train.graphed has set another
        torch.cuda.empty_cache()


def arguments(*words):
    """train.py's arguments. --graph and fp16 are for a GPU: on the CPU the test is skipped."""
    if DEVICE == "cpu" and ("--graph" in words or "fp16" in words):
        pytest.skip("needs an NVIDIA GPU")
    return train.parse_args([*SMALL, *words])


def train_steps(pack, args, first, last, saved=None, seed=0):
    """(the DCGAN after steps `first` to `last` as train.main takes them, their statistics (steps, 5) on the CPU)."""
    dcgan = train.DCGAN(args, train.set_up_device(args))
    if saved:
        dcgan.load_state_dict(saved)
    step, stats = train.graphed(dcgan.step) if args.graph else dcgan.step, []
    frames = train.batches(prepare_data.open_pack(pack).train, args.batch_size, (seed,), first, pin=DEVICE == "cuda")
    for number, batch in enumerate(islice(frames, last - first), first):
        torch.manual_seed(1000 * seed + number)
        stats.append(step(batch.to(DEVICE, non_blocking=True)))
    return dcgan, torch.stack(stats).cpu()


def test_a_step_on_the_gpu_equals_one_on_the_cpu(monkeypatch):
    cut = train.cut_windows
    monkeypatch.setattr(train, "cut_windows", lambda frames, *sizes: cut(frames.cpu(), *sizes).to(frames.device))
    frames, z, stats = torch.randint(0, 256, (16, 80, 106, 3), dtype=torch.uint8), model.latents(range(16), 100), []
    for device in (DEVICE, "cpu"):
        args = train.parse_args(["--preset", "naive-64", "--precision", "fp32", "--device", device])
        dcgan = train.DCGAN(args, train.set_up_device(args))
        with monkeypatch.context() as patch:  # the devices draw other latents from one seed
            patch.setattr(torch.Tensor, "normal_", lambda tensor: tensor.copy_(z))
            torch.manual_seed(0)
            stats.append(torch.stack([dcgan.step(frames.to(device)).cpu() for _ in range(3)]))
    torch.testing.assert_close(*stats, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("mode", MODES, ids=" ".join)
def test_50_steps_of_a_graph_equal_those_without_and_compiled_ones_equal_eager_ones(mode, precision, pack):
    """Up to rounding, which grows in 50 steps. Other noise would differ more than another seed, old frames by 0.25."""
    slow, words = mode[1:], ["--precision", precision]  # without --graph; without --compile
    _, stats = train_steps(pack, arguments(*words, *mode), 0, 50)
    torch.compiler.reset()
    _, expected = train_steps(pack, arguments(*words, *slow), 0, 50)
    _, other = train_steps(pack, arguments(*words), 0, 50, seed=1)
    pairs = (stats[:10], expected[:10]), (stats[10:], expected[10:]), (other[10:], expected[10:])
    first, late, seeds = ((a - b).abs().mean().item() for a, b in pairs)
    print(f"{mode} {precision}: mean difference {first:.2g} in ten steps, {late:.2g} later, other seed {seeds:.2g}")
    assert first < (1e-3 if precision == "fp32" else 3e-3)
    assert late < seeds / (10 if "--graph" in mode else 4)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("mode", [[], *MODES], ids=" ".join)
def test_a_resumed_run_continues_as_the_uninterrupted_one(mode, precision, pack):
    args = arguments("--precision", precision, *mode)
    _, whole = train_steps(pack, args, 0, 20)
    dcgan, before = train_steps(pack, args, 0, 10)
    _, after = train_steps(pack, args, 10, 20, {**dcgan.state_dict(), "step": 10})
    noise, difference = (before - whole[:10]).abs().mean(), (after - whole[10:]).abs().mean()
    print(f"{mode} {precision}: mean difference {noise:.2g} of two runs, {difference:.2g} after resuming")
    assert difference < 0.005, "one without Adam's moments differs by 0.06, one that is a step off by 0.03"


@pytest.mark.parametrize("mode", [[], *MODES], ids=" ".join)
def test_sigterm_ends_a_run_with_a_checkpoint_which_resumes(mode, pack, tmp_path):
    arguments(*mode)
    words = *SMALL, *mode, "--data", pack, "--out", tmp_path / "run", "--log-every", 5, "--resume"
    process = subprocess.Popen(command("train.py", *words, "--epochs", 10 ** 6), stdout=subprocess.PIPE, text=True)
    try:
        while not re.match(r"\[\d+/\d+]\[20/", line := process.stdout.readline()):
            assert line, f"the run has ended with status {process.wait()}"
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)
    finally:
        process.kill()
    images = model.load_file(tmp_path / "run" / "checkpoint.pt")["images"]
    assert process.returncode == 143 and images >= 20 * 32
    done = run("train.py", *words, "--epochs", images // 64 + 2)
    assert f"image {images:,} of" in done.stdout and "is at image" in done.stdout


def test_pictures_and_scores_are_those_of_the_cpu(trained, pack, tmp_path):
    pictures, scores = [], []
    for device in (DEVICE, "cpu"):
        words = "--checkpoint", trained, "--device", device
        run("sample.py", *words, "--seeds", "0-15", "--out", tmp_path / f"{device}.png")
        run("interpolate.py", *words, "--frames", 4, "--out", tmp_path / f"{device}-scene.png")
        pictures += [np.array(Image.open(tmp_path / f"{device}{name}.png")).astype(int) for name in ("", "-scene")]
        done = run("sample.py", *words, "--score", pack)
        scores.append([float(figure) for figure in re.findall(r"\d+\.\d+", done.stdout)])
    differences = [np.abs(a - b).max() for a, b in zip(pictures[:2], pictures[2:])]
    assert max(differences) <= 3, "TF32 rounds to ten bits"
    assert len(scores[0]) > 1 and scores[0] == pytest.approx(scores[1], rel=0.02, abs=0.02)


@pytest.mark.skipif(DEVICE == "cuda" and GPUS < 2, reason="needs two GPUs")
@pytest.mark.parametrize("mode", [[], ["--graph"]], ids=" ".join)
def test_two_processes_train_and_end(mode, pack, tmp_path):
    arguments(*mode)
    words = *SMALL, *mode, "--data", pack, "--out", tmp_path / "run", "--epochs", 20, "--log-every", 5
    python, *script = command("train.py", *words)
    argv = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *script]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"on 2 × {DEVICE}" in done.stdout and "is at image" in done.stdout
    saved = model.load_file(tmp_path / "run" / "checkpoint.pt")
    assert saved["images"] == saved["step"] * 64 and saved["step"] >= 20


@pytest.mark.parametrize("mode", [[], ["--graph"]], ids=" ".join)
@pytest.mark.parametrize("preset", model.PRESETS)
def test_each_preset_fits_into_the_memory(preset, mode, capsys):
    """Prints its peak, with the preset's batch size and precision auto."""
    arguments(*mode)
    small = ["--batch-size", "4", "--ngf", "4", "--ndf", "4"] if DEVICE == "cpu" else []
    args = train.parse_args(["--preset", preset, "--device", DEVICE, *small, *mode])
    dcgan = train.DCGAN(args, train.set_up_device(args))
    step = train.graphed(dcgan.step) if args.graph else dcgan.step
    height, width = prepare_data.frame_size(args.image_size)
    frames = torch.zeros(args.batch_size, height, width, 3, dtype=torch.uint8, device=DEVICE)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(7):
        assert step(frames).isfinite().all()
    dcgan.sampler()
    peak = torch.cuda.max_memory_reserved() / 1e9 if DEVICE == "cuda" else 0
    with capsys.disabled():
        print(f"\n{preset} {' '.join(mode)}, batch {args.batch_size}, {dcgan.device.precision}: {peak:.2f} GB")
