"""The real thing on an NVIDIA GPU. Without one the tests are skipped. They can be tried on the CPU:

    TEST_GPU_DEVICE=cpu python -m pytest tests/test_gpu.py

The first tests are the most important ones. A test of more than 120 s on a GPU fails. After
TEST_GPU_MINUTES (default: 9) the tests that are left are skipped.
"""
import faulthandler
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch
from helpers import ROOT, TINY, Training, command, make_pack, new_process, run, torchrun
from PIL import Image

import model
import prepare_data
import train

DEVICE = os.environ.get("TEST_GPU_DEVICE", "cuda")
GPUS = torch.cuda.device_count()
LIMIT = 120 if DEVICE == "cuda" else 600  # seconds of a test
MINUTES = float(os.environ.get("TEST_GPU_MINUTES", 9))
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

SMALL = f"--preset naive-64 --image-size 32 --nz 32 --ngf 16 --ndf 16 --batch-size 32 --device {DEVICE}".split()
GRAPH, COMPILE, BOTH = ["--graph"], ["--compile"], ["--graph", "--compile"]


def modes(*modes):
    return pytest.mark.parametrize("mode", modes, ids=" ".join)


def modes_and_precisions(*pairs):
    return pytest.mark.parametrize("mode, precision", pairs, ids=[" ".join([*mode, name]) for mode, name in pairs])


if DEVICE == "cuda":
    run = partial(run, popen=new_process)  # nobody has tried CUDA in a fork


@pytest.fixture(scope="session")
def pack(tmp_path_factory):
    """A pack of noise for images of 32×32: 172 frames to train on, and enough held out for a score."""
    frames = np.random.default_rng(0).integers(0, 256, (288, 40, 54, 3), np.uint8)
    return make_pack(tmp_path_factory.mktemp("packs") / "noise-32", frames[:172], frames[172:])


@pytest.fixture(scope="session")
def began():
    return time.monotonic()


@pytest.fixture(autouse=True)
def time_limit(began):
    """Python raises in a test that takes too long. A hang inside a library ends all tests."""
    if time.monotonic() - began > 60 * MINUTES:
        pytest.skip("no time is left (TEST_GPU_MINUTES)")

    def stop(signum, frame):
        raise TimeoutError(f"the test takes longer than {LIMIT} s")

    usual = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    faulthandler.dump_traceback_later(LIMIT + 30, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()
    signal.alarm(0)
    signal.signal(signal.SIGALRM, usual)


@pytest.fixture(autouse=True)
def same_state_for_each_test(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # training does not set it
    yield
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.set_stream(torch.cuda.default_stream())  # train.graphed has set another
        torch.cuda.empty_cache()


# ---- helpers -------------------------------------------------------------------------------------
def arguments(*words):
    """train.py's options. Without a GPU that can do as they say, the test is skipped."""
    if DEVICE == "cpu" and ("--graph" in words or "fp16" in words):
        pytest.skip("needs an NVIDIA GPU")
    if DEVICE == "cuda" and "bf16" in words and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs a GPU with bf16")
    return train.look_up(train.parse_args([*SMALL, *map(str, words)]))


def make_step(args):
    """(a DCGAN, its step)."""
    dcgan = train.DCGAN(args, train.set_up_device(args))
    return dcgan, train.graphed(dcgan.step) if args.graph else dcgan.step


def make_frames(args):
    height, width = prepare_data.frame_size(args.image_size)
    shape = args.batch_size, height, width, 3
    return torch.randint(0, 256, shape, dtype=torch.uint8, device=DEVICE)


def train_steps(pack, args, first, last, saved=None, seed=0):
    """(the DCGAN after steps `first` to `last` as train.main takes them, statistics (steps, 5))."""
    dcgan, step = make_step(args)
    if args.precision == "fp16":
        dcgan.scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0 ** 8)  # no step overflows
    if saved:
        dcgan.load_state_dict(saved)
    frames = prepare_data.open_pack(pack).train
    stream = train.batches(frames, args.batch_size, (seed, 0), first, pin=dcgan.device.pin)
    feed = train.upload(train.read_ahead(stream, 4), dcgan.device)
    stats = []
    for number in range(first, last):
        batch = next(feed)
        train.seed_step(dcgan.device, seed, 0, number)
        stats.append(torch.stack(list(step(batch).values())))
    return dcgan, torch.stack(stats).cpu()


# ---- smoke tests ---------------------------------------------------------------------------------
def test_a_step_on_the_gpu_equals_one_on_the_cpu(monkeypatch):
    cut = train.cut_windows

    def cut_on_the_cpu(frames, *sizes):
        return cut(frames.cpu(), *sizes).to(frames.device)

    monkeypatch.setattr(train, "cut_windows", cut_on_the_cpu)
    frames = torch.randint(0, 256, (16, 80, 106, 3), dtype=torch.uint8)
    z = model.latents(range(16), 100)
    stats = []
    for device in (DEVICE, "cpu"):
        # Adam amplifies rounding: with lr 2e-4 three steps can differ by more than 1e-3.
        words = ["--preset", "naive-64", "--precision", "fp32", "--device", device, "--lr", "2e-5"]
        args = train.look_up(train.parse_args(words))
        dcgan, step = make_step(args)
        with monkeypatch.context() as patch:  # the devices draw other latents from one seed
            patch.setattr(torch.Tensor, "normal_", lambda tensor: tensor.copy_(z))
            torch.manual_seed(0)
            steps = [torch.stack(list(step(frames.to(device)).values())) for _ in range(3)]
        stats.append(torch.stack(steps).cpu())
    torch.testing.assert_close(*stats, rtol=1e-3, atol=1e-3)


@modes([], BOTH)
def test_train_py_stops_on_sigterm_with_a_checkpoint_and_continues(mode, pack, tmp_path):
    arguments(*mode)
    words = *SMALL, *mode, "--data", pack, "--out", tmp_path / "run", "--log-seconds", 0
    python, *script = command("train.py", *words, "--epochs", 10 ** 6)
    with Training([python, "-u", *script]) as training:  # not a fork
        training.until(r"\[\d+/\d+\]\[20/")
        training.process.send_signal(signal.SIGTERM)
        assert training.end() == 143
    assert f"1 × {DEVICE}" in training.text
    images = model.load_file(tmp_path / "run" / "checkpoint.pt")["images"]
    assert images >= 20 * 32
    done = run("train.py", *words, "--resume", "--epochs", images // 160 + 2)
    assert f"{images:,}" in done.stdout and "score" in done.stdout and "finished" in done.stdout


@contextmanager
def no_waiting():
    """Where the host waits for the GPU, torch raises an error. A CPU has nothing to wait for."""
    if DEVICE == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if DEVICE == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@modes([], GRAPH)
def test_a_step_makes_no_hidden_wait_for_the_gpu(mode, precision):
    noisy = "--augment", "--mirror", "--instance-noise", 0.05
    args = arguments("--precision", precision, *noisy, *mode)
    dcgan, step = make_step(args)
    frames = make_frames(args)
    for _ in range(7):
        step(frames)
    with no_waiting():
        for number in range(3):
            train.seed_step(dcgan.device, 0, 0, number)
            stats = step(frames)
    assert all(value.isfinite() for value in stats.values())


@modes([], GRAPH)
@pytest.mark.parametrize("preset", model.PRESETS)
def test_each_preset_fits_into_the_memory(preset, mode, capsys):
    """Prints its peak, with the preset's batch size and precision auto."""
    arguments(*mode)
    small = ["--batch-size", "4", "--ngf", "4", "--ndf", "4"] if DEVICE == "cpu" else []
    args = train.look_up(train.parse_args(["--preset", preset, "--device", DEVICE, *small, *mode]))
    dcgan, step = make_step(args)
    frames = make_frames(args)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(7):
        stats = step(frames)
    assert all(value.isfinite() for value in stats.values())
    dcgan.sampler()
    peak = torch.cuda.max_memory_reserved() if DEVICE == "cuda" else 0
    with capsys.disabled():
        print(f"\n{preset} {' '.join(mode)}, {dcgan.device.precision}: {peak / 1e9:.2f} GB")


# ---- graphs and compiling: the numbers of a plain step -------------------------------------------
@modes_and_precisions((GRAPH, "fp32"), (GRAPH, "bf16"), (GRAPH, "fp16"), (COMPILE, "fp32"), (BOTH, "bf16"))
def test_50_steps_are_those_of_a_plainer_mode(mode, precision, pack):
    """--graph against no graph, --compile against eager, up to rounding, which grows in 50 steps.

    Other noise would differ more than another seed does, old frames by 0.25.
    """
    plainer = mode[1:]  # without --graph; without --compile
    words = ["--precision", precision]
    _, stats = train_steps(pack, arguments(*words, *mode), 0, 50)
    torch.compiler.reset()
    _, expected = train_steps(pack, arguments(*words, *plainer), 0, 50)
    _, other = train_steps(pack, arguments(*words), 0, 50, seed=1)

    first = (stats - expected)[:10].abs().mean()
    later, seeds = (stats - expected)[10:].abs().mean(), (other - expected)[10:].abs().mean()
    print(f"{mode} {precision}: mean difference {first:.2g} in ten steps, {later:.2g} later, other seed {seeds:.2g}")
    assert first < (1e-3 if precision == "fp32" else 3e-3)
    assert later < seeds / (10 if "--graph" in mode else 4)


@modes_and_precisions(([], "fp32"), ([], "fp16"), (GRAPH, "fp32"), (GRAPH, "bf16"), (GRAPH, "fp16"), (BOTH, "bf16"))
def test_a_resumed_run_continues_as_the_uninterrupted_one(mode, precision, pack):
    args = arguments("--precision", precision, *mode)
    _, whole = train_steps(pack, args, 0, 20)
    dcgan, before = train_steps(pack, args, 0, 10)
    _, after = train_steps(pack, args, 10, 20, dcgan.state_dict())
    noise = (before - whole[:10]).abs().mean()
    difference = (after - whole[10:]).abs().mean()
    print(f"{mode} {precision}: mean difference {noise:.2g} of two runs, {difference:.2g} after resuming")
    assert difference < 0.005, "one without Adam's moments differs by 0.06, a step off by 0.03"


# ---- processes, signals, memory ------------------------------------------------------------------
ONE_RANK = """
import sys
import torch
import torch.distributed as dist
import train
args = train.look_up(train.parse_args(sys.argv[1:]))
device = train.set_up_device(args)
dist.init_process_group(device.backend, store=dist.HashStore(), rank=0, world_size=1)
dcgan = train.DCGAN(args, device, world=2)  # it adds up the gradients of all processes: one
step = train.graphed(dcgan.step) if args.graph else dcgan.step
frames = torch.randint(0, 256, (args.batch_size, 40, 54, 3), dtype=torch.uint8)
for _ in range(10):
    stats = step(frames.to(device.kind))
print(device.backend, stats["Loss_D"].item())
del step
dist.destroy_process_group()
print("ended")
"""


@modes([], GRAPH)
def test_one_rank_adds_up_gradients_in_a_graph_and_ends(mode):
    arguments(*mode)
    argv = [sys.executable, "-c", ONE_RANK, *SMALL, *mode]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "ended"
    assert done.stdout.startswith("nccl" if DEVICE == "cuda" else "gloo")


def test_out_of_memory_is_one_line(pack, tmp_path):
    """On a GPU whose memory others use but for 1 GB; on a CPU with terabytes of weights."""
    width = 100_000
    if DEVICE == "cuda":
        width = 1024  # two networks, an average and the moments: 5 GB
        free, _ = torch.cuda.mem_get_info()
        used = torch.empty(free - (1 << 30), dtype=torch.uint8, device=DEVICE)
    words = *SMALL, "--ngf", width, "--ndf", width, "--data", pack, "--out", tmp_path / "run"
    line = run("train.py", *words, status=2).stderr.splitlines()[-1]
    assert "out of memory" in line and "--batch-size" in line
    if DEVICE == "cuda":
        del used


@pytest.mark.skipif(DEVICE == "cuda" and GPUS < 2, reason="needs two GPUs")
@modes([], GRAPH)
def test_two_processes_train_and_end(mode, pack, tmp_path):
    arguments(*mode)
    words = *SMALL, *mode, "--data", pack, "--out", tmp_path / "run", "--epochs", 20
    done = subprocess.run(torchrun("train.py", *words), capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"2 × {DEVICE}" in done.stdout and "finished" in done.stdout
    saved = model.load_file(tmp_path / "run" / "checkpoint.pt")
    assert saved["images"] == saved["step"] * 64 and saved["step"] >= 20


# ---- pictures ------------------------------------------------------------------------------------
def test_pictures_and_scores_are_those_of_the_cpu(pack, tmp_path):
    run("train.py", *TINY, "--device", "cpu", "--data", pack, "--out", tmp_path / "run", "--epochs", 1)
    pictures, scores = [], []
    for device in (DEVICE, "cpu"):
        words, grid = ("--checkpoint", tmp_path / "run", "--device", device), tmp_path / f"{device}.png"
        run("sample.py", *words, "--seeds", "0-15", "--out", grid)
        pictures.append(np.array(Image.open(grid)).astype(int))
        done = run("sample.py", *words, "--score", pack)
        scores.append([float(figure) for figure in re.findall(r"\d+\.\d+", done.stdout)])
    assert np.abs(pictures[0] - pictures[1]).max() <= 3, "TF32 rounds to ten bits"
    assert len(scores[0]) > 1 and scores[0] == pytest.approx(scores[1], rel=0.02, abs=0.02)
