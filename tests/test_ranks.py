"""Several processes train one run: the same weights, other data, and one line for a mistake."""
import shutil
import signal

import pytest
import torch
from helpers import (
    ROOT,  # isort: skip
    TINY,
    Training,
    content,
    dcgan,
    differences,
    ranks,
    run,
    same,
    torchrun,
)

import model
import train

CPU = [*TINY, "--device", "cpu"]
RUN = [*CPU, "--epochs", 3, "--log-seconds", 0, "--save-minutes", 0]  # 3 × 4 steps of 2 × 16 images

SPY = """
import torch, train
usual, add_up, draw, frames, z, sums = train.DCGAN.step, train.add_up, train.DCGAN.draw_latents, [], [], []

def step(dcgan, batch):
    frames.append(batch.clone())
    stats = usual(dcgan, batch)
    nets = {name: [p.detach().clone() for p in getattr(dcgan, name).parameters()] for name in ("G", "D", "G_ema")}
    nets["moments"] = [dcgan.opt_D.state[p]["exp_avg"].clone() for p in dcgan.D.parameters()]
    steps.append(nets)
    torch.save({"frames": frames, "z": z, "steps": steps, "sums": sums}, f"rank{os.environ['RANK']}.pt")
    return stats

def spy_add_up(gradients):
    before = [gradient.clone() for gradient in gradients]
    add_up(gradients)
    sums.append((before, [gradient.clone() for gradient in gradients]))

def spy_draw(dcgan, n):
    z.append(draw(dcgan, n))
    return z[-1]

steps = []
train.DCGAN.step, train.add_up, train.DCGAN.draw_latents = step, spy_add_up, spy_draw
"""


@pytest.fixture(scope="module")
def two(pack, tmp_path_factory):
    """A folder with a run of two ranks, `run`, and what each rank saw."""
    folder = tmp_path_factory.mktemp("two")
    for done in ranks(2, "train.py", *RUN, "--data", pack, "--out", folder / "run", cwd=folder, first=SPY):
        assert (done.returncode, done.stderr) == (0, "")
    return folder


@pytest.fixture(scope="module")
def seen(two):
    return [content(two / f"rank{i}.pt") for i in range(2)]


def test_both_ranks_have_the_same_weights_after_each_step(seen):
    a, b = (rank["steps"] for rank in seen)
    assert len(a) == 12 and same(a, b)


def test_gradients_are_the_sum_over_the_ranks_of_gradients_divided_by_their_number(seen):
    for (before, after), (other, after_other) in zip(seen[0]["sums"], seen[1]["sums"]):
        assert same([a + b for a, b in zip(before, other)], after) and same(after, after_other)
        assert not same(before, other)

    moments = []
    for rank in range(2):  # each rank's first step, alone: Adam's first moments are (1 - beta1) of the gradient
        alone = dcgan()
        train.seed_step(alone.device, 0, rank, 0)
        alone.step(seen[rank]["frames"][0])
        moments.append([alone.opt_D.state[p]["exp_avg"] for p in alone.D.parameters()])
    for one, other, both in zip(*moments, seen[0]["steps"][0]["moments"]):
        torch.testing.assert_close((one + other) / 2, both)


def test_no_frame_is_seen_twice_in_an_epoch_and_each_rank_draws_its_own_latents(seen, two):
    for epoch in (slice(0, 4), slice(4, 8), slice(8, 12)):
        frames = [frame.numpy().tobytes() for rank in seen for batch in rank["frames"][epoch] for frame in batch]
        assert len(frames) == len(set(frames)) == 2 * 4 * 16
    assert len({z.numpy().tobytes() for rank in seen for z in rank["z"]}) == 2 * 12
    saved = content(two / "run/checkpoint.pt")
    assert (saved["images"], saved["step"]) == (2 * 12 * 16, 12), "images of both ranks are counted"


def test_one_process_continues_a_run_of_two(two, tmp_path):
    out = shutil.copytree(two / "run", tmp_path / "run")
    done = run("train.py", "--resume", "--out", out, "--epochs", 4, "--log-seconds", 0)
    assert content(out / "checkpoint.pt")["images"] == 4 * 8 * 16 and "[4/4]" in done.stdout


DRIVER = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
import train
usual, note, calls, noted = train.DCGAN.step, train.Run.note_signal, [], []

def step(dcgan, frames):
    calls.append(0)
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1" and len(calls) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "1" and os.environ["RANK"] == "0" and len(calls) == 2:
        os.kill(os.getppid(), signal.SIGTERM)
        while not noted:
            time.sleep(0.1)
    return usual(dcgan, frames)

def note_signal(run, *signal):
    noted.append(signal)
    note(run, *signal)

train.DCGAN.step, train.Run.note_signal = step, note_signal
train.run_script(train.main, "choose less")
"""


def test_a_killed_rank_costs_a_restart_sigterm_to_torchrun_saves_and_the_end_is_the_same(pack, two, tmp_path):
    (tmp_path / "driver.py").write_text(DRIVER.format(root=str(ROOT)))
    words = [*RUN, "--resume", "--data", pack, "--out", tmp_path / "run"]
    with Training(torchrun(tmp_path / "driver.py", *words, restarts=1)) as training:
        assert training.end() != 0 and "continued at image" in training.text, training.text
    assert content(tmp_path / "run/checkpoint.pt")["step"] == 10, "the ranks ask each other every ten steps"
    assert [done.returncode for done in ranks(2, "train.py", *words)] == [0, 0]
    assert differences(two / "run", tmp_path / "run") == []


def test_a_signal_to_one_rank_stops_both_at_the_same_step_with_the_run_saved(pack, tmp_path):
    first = SPY + """
def late(dcgan, batch):
    if os.environ["RANK"] == "1" and len(frames) == 3:
        os.kill(os.getpid(), signal.SIGUSR1)
    return step(dcgan, batch)
train.DCGAN.step = late
"""
    words = [*CPU, "--epochs", 1000, "--data", pack, "--out", tmp_path / "run"]
    done = ranks(2, "train.py", *words, cwd=tmp_path, first=first)
    assert 128 + signal.SIGUSR1 in [rank.returncode for rank in done], "the first that ends; the other gets SIGTERM"
    assert [rank.stderr for rank in done] == ["", ""]
    steps = [len(content(tmp_path / f"rank{i}.pt")["steps"]) for i in range(2)]
    assert steps == 2 * [content(tmp_path / "run/checkpoint.pt")["step"]]


ORPHAN = """
import time
if child := os.fork():
    while not os.path.exists("rank0.pt"):
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGKILL)
def late(*_):
    open("late", "w")
    os._exit(3)
signal.signal(signal.SIGALRM, late)
signal.alarm(100)
"""

QUICK = "import time; sleep = time.sleep; time.sleep = lambda seconds: sleep(seconds / 20)\n"


def test_a_rank_whose_launcher_has_gone_ends(pack, tmp_path):
    words = [*CPU, "--epochs", 10 ** 6, "--data", pack, "--out", tmp_path / "run"]
    for done in ranks(2, "train.py", *words, cwd=tmp_path, first=ORPHAN + SPY):
        assert done.returncode == -9
    assert not (tmp_path / "late").exists()


def test_a_rank_that_fails_ends_the_job_with_its_line(pack, tmp_path):
    first = QUICK + """
import train
def step(dcgan, frames, calls=[], usual=train.DCGAN.step):
    calls.append(0)
    if os.environ["RANK"] == "1" and len(calls) == 5:
        raise train.InputError("the disk of this machine has gone")
    return usual(dcgan, frames)
train.DCGAN.step = step
"""
    words = [*CPU, "--epochs", 10 ** 6, "--data", pack, "--out", tmp_path / "run"]
    done = ranks(2, "train.py", *words, first=first)
    assert [rank.stderr for rank in done] == ["", "error: the disk of this machine has gone\n"]
    assert done[1].returncode == 2 and done[0].returncode != 0


@pytest.mark.parametrize("rank", "01")
def test_packs_that_differ_end_the_job_with_one_line(rank, pack, tmp_path):
    other = shutil.copytree(pack, tmp_path / "other")
    with open(other / "index.csv", "a") as index:
        index.write("holdout,48,Bath,1,1,street.jpg\n")
    first = QUICK + f"if os.environ['RANK'] == '{rank}': sys.argv[sys.argv.index('--data') + 1] = {str(other)!r}"
    done = ranks(2, "train.py", *CPU, "--data", pack, "--out", tmp_path / "run", first=first)
    text = "".join(rank.stderr for rank in done)
    assert text.count("error: ") == text.count("\n") == 1 and "pack" in text
    assert not (tmp_path / "run").exists()


def test_a_mistake_of_all_ranks_is_printed_once(pack, tmp_path):
    done = ranks(2, "train.py", *CPU, "--data", pack, "--batch-size", 500, cwd=tmp_path, first=QUICK)
    text = "".join(rank.stderr for rank in done)
    assert text.count("error: ") == text.count("\n") == 1 and "--batch-size 500" in text and "68" in text


def test_photographs_must_be_prepared_before_several_processes_start(tmp_path, monkeypatch, capfd):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    (tmp_path / "photos").mkdir()
    with pytest.raises(SystemExit) as end:
        model.run_script(lambda: train.main([*CPU, "--data", str(tmp_path / "photos")]), "choose less")
    lines = capfd.readouterr().err.splitlines()
    assert end.value.code == 2 and len(lines) == 1 and "prepare_data.py" in lines[0], lines
