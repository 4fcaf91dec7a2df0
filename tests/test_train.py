"""Training is trusted for a week: whatever is killed, cut, full, foreign or mistyped, the run goes on or says why not."""
import copy
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, TINY, command, run

sys.path.insert(0, str(ROOT))

import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import model
import prepare_data
import train

LOSSES = ("Loss_D", "Loss_G", "D(x)", "D(G(z1))", "D(G(z2))")
RUN = [*TINY, "--device", "cpu", "--epochs", 16, "--log-every", 4, "--save-minutes", 0]  # some 140 steps


class Training:
    """A script under way: read what it says, send it signals. Whatever a test leaves behind is killed."""

    def __init__(self, *words, argv=None, **kwargs):
        self.process = subprocess.Popen(argv or command("train.py", *words), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                        text=True, errors="replace", start_new_session=True, **kwargs)
        self.text, self.watchdog = "", threading.Timer(240, self.kill)  # a hang is a failure, no hang of the tests
        self.watchdog.start()

    def until(self, pattern):
        """Read on to a line that matches; returns the match."""
        for line in self.process.stdout:
            self.text += line
            if match := re.search(pattern, line):
                return match
        raise AssertionError(f"'{pattern}' never came, status {self.process.wait()}:\n{self.text[-3000:]}")

    def end(self):
        """Wait for the end; returns the status."""
        self.text += self.process.stdout.read()
        return self.process.wait()

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL) if self.process.poll() is None else None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.watchdog.cancel()
        self.kill()
        self.process.wait()
        self.process.stdout.close()


def content(file):
    return torch.load(file, weights_only=True)


def same(a, b):
    """Bit for bit: nested dicts and lists of tensors and values."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def scalars(out):
    """What TensorBoard shows of a run: {name: [(images, value), …]}."""
    board = EventAccumulator(str(out)).Reload()
    return {name: [(event.step, event.value) for event in board.Scalars(name)] for name in LOSSES}


def assert_same_run(out, other):
    """The same weights, optimizer state and logged losses, and nothing that a kill left half written."""
    a, b = (content(folder / "checkpoint.pt") for folder in (out, other))
    assert [key for key in a if not same(a[key], b[key])] == []
    assert scalars(out) == scalars(other)
    assert {p.name for p in (out / "samples").iterdir()} >= {p.name for p in (other / "samples").iterdir()}


@pytest.fixture(scope="module")
def straight(pack, tmp_path_factory):
    """A run that nothing interrupts."""
    out = tmp_path_factory.mktemp("runs") / "straight run"
    done = run("train.py", *RUN, "--data", pack, "--out", out)
    return out, done.stdout


# ---- a run ----------------------------------------------------------------------------------------------------------

def test_a_step_is_that_of_the_plain_loop_to_rounding():
    """Twenty steps beside DCGAN as everybody writes it: real and fake backward apart, nothing frozen, torch's plain Adam."""
    args = train.parse_args([*TINY, "--data", "", "--device", "cpu"])
    ours = train.DCGAN(args, train.set_up_device(args, 0))
    plain_G, plain_D = copy.deepcopy(ours.G), copy.deepcopy(ours.D)
    adam_G, adam_D = (torch.optim.Adam(net.parameters(), 2e-4, (0.5, 0.999)) for net in (plain_G, plain_D))
    bce = torch.nn.BCEWithLogitsLoss()

    def plain_step(frames):
        real, z = model.cut_windows(frames, 32), torch.randn(16, 8)
        plain_D.zero_grad()
        loss_real = bce(plain_D(real), torch.ones(16))
        loss_real.backward()
        fake = plain_G(z)
        loss_fake = bce(plain_D(fake.detach()), torch.zeros(16))
        loss_fake.backward()
        adam_D.step()
        plain_G.zero_grad()
        loss_G = bce(plain_D(fake), torch.ones(16))
        loss_G.backward()
        adam_G.step()
        return torch.stack([loss_real + loss_fake, loss_G]).detach()

    for i in range(20):
        frames = torch.randint(0, 256, (16, 40, 54, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        losses = []
        for one in (ours.step, plain_step):
            torch.manual_seed(i)
            losses.append(one(frames)[:2])
        torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)
    for net, plain in ((ours.G, plain_G), (ours.D, plain_D)):
        for a, b in zip(net.state_dict().values(), plain.state_dict().values()):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4)


def test_a_run_learns_and_says_how_it_goes(straight, pack):
    out, text = straight
    lines = re.findall(r"^\[(\d+)/16\]\[(\d+)/(\d+)\] Loss_D [\d.]+ Loss_G [\d.]+ D\(x\) ([\d.]+) D\(G\(z\)\) ([\d.]+) / ([\d.]+)  "
                       r"[\d,]+ images/s, \d+:\d\d:\d\d left$", text, re.M)
    steps = math.ceil(16 * len(prepare_data.open_pack(pack).train) / 16)
    assert [(int(step), int(of)) for _, step, of, *_ in lines] == [(i, steps) for i in [*range(4, steps, 4), steps]]
    assert [int(epoch) for epoch, *_ in lines] == sorted(int(epoch) for epoch, *_ in lines) and lines[-1][0] == "16"
    first, last = ([float(x) for x in lines[i][3:]] for i in (0, -1))
    assert all(0.4 < x < 0.6 for x in first), "D knows nothing yet"
    assert last[0] > 0.65 and last[2] < 0.35, "D tells real from fake"
    grids = sorted(p for p in (out / "samples").iterdir() if p.stem.isdigit())
    before, after = (np.asarray(Image.open(grid), np.float32)[2:34, 2:34] for grid in (grids[0], grids[-1]))  # the first picture
    assert after.std() > 4 and abs(after - before).mean() > 2, "the grid is not grey, and not what it was"
    assert str(out) in text.splitlines()[-1]


def test_tensorboard_shows_what_the_readme_says(straight):
    out, _ = straight
    board = EventAccumulator(str(out), {"images": 0}).Reload()
    assert {*LOSSES, "images/s", "share of time waiting for data"} <= set(board.Tags()["scalars"])
    assert len(board.Images("real")) == 1 and len(board.Images("samples")) > 3
    assert "hparams" in board.summary_metadata or any("hparams" in tag for tag in board.summary_metadata)
    assert all(event.step % 16 == 0 for event in board.Scalars("Loss_D"))


def test_a_run_folder_has_what_the_readme_says(straight):
    out, _ = straight
    args = json.loads((out / "args.json").read_text())
    assert args["batch_size"] == 16 and args["lr"] == 2e-4 and args["in_force"]["precision"] == "fp32"
    saved, images = content(out / "checkpoint.pt"), sorted(int(p.stem.split("-")[1]) for p in out.glob("generator-*.pt"))
    assert images[0] == 0 and images[-1] == saved["images"] and all(n % 64 == 0 for n in images[:-1])
    generator = content(out / f"generator-{images[-1]:09d}.pt")
    assert same(generator["G"], saved["G_ema"]) and "D" not in generator
    assert content(out / "checkpoint-previous.pt")["images"] == images[-2], "the last two are kept"
    G, latent = model.load_generator(out)
    assert (G.image_size, G.nz, latent) == (32, 8, "normal")


def test_minutes_end_a_run_as_a_notice_does(pack, tmp_path):
    out = tmp_path / "run"
    done = run("train.py", *RUN, "--epochs", 10 ** 6, "--minutes", 0.1, "--save-minutes", 5, "--data", pack, "--out", out)
    images = content(out / "checkpoint.pt")["images"]
    assert 0 < images and re.search(rf"is at image {images:,} of [\d,]+;", done.stdout)
    assert content(out / f"generator-{images:09d}.pt")["images"] == images and (out / "samples" / f"{images:09d}.png").exists()


def test_the_score_is_in_the_log_the_table_and_tensorboard_and_the_best_generator_is_kept(tmp_path):
    pack, out = tmp_path / "pack", tmp_path / "run"
    run("prepare_data.py", "--demo", 240, "--image-size", 32, "--holdout", 0.4, pack)
    done = run("train.py", *TINY, "--device", "cpu", "--data", pack, "--out", out, "--epochs", 3, "--log-every", 10, "--save-minutes", 0)
    said = re.findall(r"score ([\d.]+) \(real images ([\d.]+)\)$", done.stdout, re.M)
    head, *rows = (out / "scores.csv").read_text().splitlines()
    table = [tuple(map(float, row.split(","))) for row in rows]
    assert head == "images,score,floor" and len(table) == len(said) > 2
    for (images, score, floor), (words, real) in zip(table, said):
        assert abs(score - float(words)) < 0.1 and abs(floor - float(real)) < 0.1 and 0 < floor < score
    board = EventAccumulator(str(out)).Reload()
    assert [(event.step, round(event.value, 2)) for event in board.Scalars("score/generated")] == [(i, s) for i, s, _ in table]
    assert {round(event.value, 2) for event in board.Scalars("score/real images")} == {table[0][2]}
    best = min(table, key=lambda row: row[1])
    assert content(out / "generator-best.pt")["images"] == best[0]
    scored = run("sample.py", "--score", pack, "--checkpoint", out, cwd=tmp_path)
    assert f"{best[1]:.1f}" in scored.stdout and f"{best[2]:.1f}" in scored.stdout, "the same number on the same images"
    assert f"drawing from {out}/generator-best.pt" in scored.stdout


def test_a_hold_out_too_small_for_a_score_is_said_once(straight):
    out, text = straight
    assert text.count("no score: ") == 1 and not (out / "scores.csv").exists() and not (out / "generator-best.pt").exists()


def test_a_saved_generator_has_statistics_over_many_latents_and_training_keeps_its_own(straight):
    saved = content(straight[0] / "checkpoint.pt")
    G = model.Generator(32, 8, 4)
    G.load_state_dict(saved["G_ema"])
    first = G.main[0](model.latents(range(1024), 8).view(-1, 8, 1, 1))
    torch.testing.assert_close(saved["G_ema"]["main.1.running_mean"], first.mean((0, 2, 3)), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(saved["G"]["main.1.running_mean"], saved["G_ema"]["main.1.running_mean"], rtol=1e-3, atol=1e-4)
    assert saved["G"]["main.1.num_batches_tracked"] == saved["step"], "drawing went on beside it"


def test_a_checkpoint_from_before_there_was_an_average_goes_on(trained, tmp_path):
    out = shutil.copytree(trained, tmp_path / "run")
    (out / "checkpoint-previous.pt").unlink()
    state, args = content(out / "checkpoint.pt"), json.loads((out / "args.json").read_text())
    del state["G_ema"], args["launch"]
    torch.save(state, out / "checkpoint.pt")
    (out / "args.json").write_text(json.dumps({**args, "save_every": 500_000, "sample_every": 100_000}))
    run("train.py", "--resume", "--out", out, "--epochs", 4)
    assert content(out / "checkpoint.pt")["step"] > state["step"]


def test_a_finished_run_resumes_to_say_that_it_is_complete(trained, tmp_path):
    out = shutil.copytree(trained, tmp_path / "run")
    before = (out / "checkpoint.pt").read_bytes()
    done = run("train.py", "--resume", "--out", out)
    images = content(out / "checkpoint.pt")["images"]
    assert f"image {images:,} of {images:,}" in done.stdout and "Loss_D" not in done.stdout
    assert (out / "checkpoint.pt").read_bytes() == before
    then, now = (json.loads((folder / "args.json").read_text()) for folder in (trained, out))
    assert {key for key in now if now[key] != then[key]} <= {"out", "resume", "in_force", "launch"}, "no argument is forgotten"


def test_a_benchmark_prints_a_row_and_leaves_no_run(pack, tmp_path):
    done = run("tests/bench.py", "--step", 0.3, "--price", 3.06, "--trace", tmp_path / "trace", "--stream", *TINY, "--device", "cpu", "--data", pack,
               cwd=tmp_path)
    head, rule, row = done.stdout.splitlines()[-3:]
    assert head.startswith("| preset |") and set(rule) <= set("| -") and row.startswith("| naive-64 |")
    assert head.count("|") == rule.count("|") == row.count("|")
    assert [path.name for path in tmp_path.iterdir()] == ["trace"]
    trace, = (tmp_path / "trace").glob("*.pt.trace.json")
    assert "waiting for data" in trace.read_text(), "the loader is in the trace"


# ---- a resumed run is the run ---------------------------------------------------------------------------------------

def test_a_run_killed_again_and_again_equals_one_that_never_was(straight, pack, tmp_path, request):
    """kill -9 wherever it happens to be: in a step, a save, a rename, while it starts."""
    reference, _ = straight
    out, chance, kills, steps = tmp_path / "run", random.Random(0), 0, []
    most = 100 if request.config.getoption("--long") else 3
    words = [*RUN, "--data", pack, "--out", out]
    while kills < most:
        with Training(*words) as training:
            if out.exists() and chance.random() < 0.1:
                time.sleep(chance.uniform(1, 6))  # while it starts
            else:
                for _ in range(chance.randrange(3) if most > 3 else chance.randrange(2, 12)):
                    if training.until("from image|Loss_D|is at image")[0] == "is at image":
                        break
                time.sleep(chance.uniform(0, 0.03))
            training.kill()
            kills += 1
            if training.end() == 0:
                break
        if (out / "args.json").exists():  # else it was killed before there was a run
            words = ["--resume", "--out", out]
        steps.append(model.load_first(model.checkpoints(out))[1]["step"] if any(out.glob("checkpoint*")) else 0)
    run("train.py", *words)
    print(f"{kills} kills, at step {steps}")
    assert_same_run(reference, out)


def test_streaming_from_the_disk_gives_the_same_run_killed_or_not(straight, pack, tmp_path):
    reference, _ = straight
    out = tmp_path / "run"
    with Training(*RUN, "--stream", "--data", pack, "--out", out) as training:
        training.until(r"\[72/")
        training.kill()
    run("train.py", "--resume", "--out", out)
    assert_same_run(reference, out)


def test_a_notice_is_enough(straight, pack, tmp_path):
    """SIGTERM, then Ctrl-C, then damage to the newest checkpoint: each time --resume goes on, to the same end."""
    reference, _ = straight
    out = tmp_path / "run"
    words = [*RUN, "--save-minutes", 60, "--data", pack, "--out", out]
    for signum in (signal.SIGTERM, signal.SIGINT):
        with Training(*words) as training:
            training.until(r"^\[\d+/16\]")
            training.process.send_signal(signum)
            sent = time.monotonic()
            assert training.end() == -signum and "Traceback" not in training.text, training.text
            assert time.monotonic() - sent < 5
        step = int(re.findall(r"\[(\d+)/\d+\] Loss_D", training.text)[-1])
        assert content(out / "checkpoint.pt")["step"] == step, "it saved where it stopped"
        assert content(out / f"generator-{16 * step:09d}.pt")["images"] == 16 * step
        words = ["--resume", "--out", out]
    at = content(out / "checkpoint-previous.pt")["images"]
    damage(out / "checkpoint.pt")
    done = run("train.py", *words)
    assert f"{out}/checkpoint.pt is damaged" in done.stderr and f"from image {at:,}" in done.stdout
    assert same(content(reference / "checkpoint.pt"), content(out / "checkpoint.pt"))
    logged = scalars(out)  # at the notices too
    assert all(set(values) <= set(logged[name]) for name, values in scalars(reference).items())


# ---- there is always a good checkpoint ------------------------------------------------------------------------------

def damage(path, rng=random.Random(0)):
    """Flip a bit of a tensor."""
    data = bytearray(path.read_bytes())
    place = len(data) // 2
    data[place] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def saved(images):
    """A checkpoint's files, with something in them to recognise them by."""
    content = {"format": 1, "images": images, "step": images, "latent": "normal", "G": {"w": torch.full((20_000,), float(images))}}
    return {f"generator-{images:09d}.pt": content, "checkpoint.pt": content}


def test_a_kill_during_a_save_leaves_a_sound_checkpoint(tmp_path, request):
    """And the last two are kept. The one who saves is a fork of this process, so that a kill costs milliseconds."""
    kills, chance, newest = (1000 if request.config.getoption("--long") else 100), random.Random(1), 0
    for _ in range(kills):
        read, write = os.pipe()
        if not (child := os.fork()):
            saver = train.Saver(tmp_path)
            for images in range(newest + 1, newest + 10_000):
                saver.save(saved(images))
                saver.job.result()
                os.write(write, b".")
            os._exit(0)
        os.read(read, 1)  # it has saved once
        time.sleep(chance.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(write)
        done = newest + 1 + len(os.read(read, 1 << 16))
        os.close(read)
        path, found = model.load_first(model.checkpoints(tmp_path))
        assert found["images"] in (done, done + 1), "no save that was done is lost"
        assert found["G"]["w"].eq(found["images"]).all() and len(found["G"]["w"]) == 20_000
        if found["images"] > 1 and path.name == "checkpoint.pt":
            assert model.load_file(tmp_path / "checkpoint-previous.pt")["images"] == found["images"] - 1
        newest = found["images"]
        for file in tmp_path.glob("generator-*"):
            file.unlink()


def test_a_cut_or_changed_checkpoint_is_noticed_wherever_it_is_hit(trained, tmp_path, request, capsys):
    """The one before is used, and it says so. A flip that changes nothing that is read may pass."""
    good, chance = (trained / "checkpoint.pt").read_bytes(), random.Random(2)
    want, before = content(trained / "checkpoint.pt"), content(trained / "checkpoint-previous.pt")
    shutil.copy(trained / "checkpoint-previous.pt", tmp_path)
    noticed, files = 0, (5000 if request.config.getoption("--long") else 300)
    for i in range(files):
        data = bytearray(good)
        if i % 3 == 0:
            del data[chance.randrange(len(data)):]
        else:
            for _ in range(chance.choice((1, 1, 8))):
                data[chance.randrange(len(data)) if i % 3 == 1 else -chance.randrange(1, 6000)] ^= 1 << chance.randrange(8)
        (tmp_path / "checkpoint.pt").write_bytes(data)
        path, found = model.load_first(model.checkpoints(tmp_path))
        warned = f"warning: {tmp_path}/checkpoint.pt" in capsys.readouterr().err
        assert warned == (path.name == "checkpoint-previous.pt")
        assert same(found, before if warned else want), "damage that passes for a checkpoint"
        noticed += warned
    assert noticed > 0.6 * files


def test_the_good_checkpoint_survives_the_saves_after_a_damaged_one(trained, tmp_path):
    """A damaged checkpoint.pt must not take the place of the sound one before it."""
    out = shutil.copytree(trained, tmp_path / "run")
    damage(out / "checkpoint.pt")
    run("train.py", "--resume", "--out", out, "--epochs", 2)
    images = [content(file)["images"] for file in (trained / "checkpoint-previous.pt", trained / "checkpoint.pt")]
    assert [model.load_file(out / name)["images"] for name in ("checkpoint-previous.pt", "checkpoint.pt")] == images


def test_a_slow_disk_stalls_nothing(tmp_path, monkeypatch, capsys):
    written, write_file = threading.Event(), train.write_file
    monkeypatch.setattr(train, "write_file", lambda *args, **kwargs: (written.wait(60), write_file(*args, **kwargs)))
    saver, files = train.Saver(tmp_path), saved(16)
    saver.save(files)  # comes back while the disk has not taken a byte
    assert not list(tmp_path.glob("*.pt"))
    files["checkpoint.pt"]["G"]["w"].fill_(-1)  # training goes on in the same tensors
    saver.save(saved(32), needed=False)  # nor does the next one wait: it is left out
    assert "still writing the last checkpoint" in capsys.readouterr().err
    written.set()
    saver.job.result()
    assert content(tmp_path / "checkpoint.pt")["G"]["w"].eq(16).all(), "it is the state as of the save"
    saver.save(saved(48))
    saver.job.result()
    assert content(tmp_path / "checkpoint.pt")["images"] == 48 and content(tmp_path / "checkpoint-previous.pt")["images"] == 16


def test_a_full_disk_costs_a_warning_and_no_checkpoint(pack, tmp_path):
    """A limit on the size of files stands for the disk: it can be set, lifted and set again while training goes on."""
    def limit(size):
        resource.prlimit(training.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    out = tmp_path / "run"
    with Training(*RUN, "--epochs", 100_000, "--log-every", 10, "--data", pack, "--out", out) as training:
        training.until(r"\[30/")
        limit(4096)
        training.until("warning: no checkpoint at .*: File too large; training goes on")
        training.until("Loss_D")
        kept = [model.load_file(out / name)["images"] for name in ("checkpoint.pt", "checkpoint-previous.pt")]
        assert kept[0] > kept[1] and not list(out.glob("*.tmp"))
        limit(resource.RLIM_INFINITY)
        while model.load_first(model.checkpoints(out))[1]["images"] == kept[0]:
            training.until("Loss_D")
        limit(4096)
        training.until("warning: no checkpoint")
        training.process.send_signal(signal.SIGTERM)
        assert training.end() not in (0, -signal.SIGTERM), "it ends without having saved"
        assert re.search("^error: no checkpoint", training.text, re.M) and "Traceback" not in training.text, training.text
    assert model.load_first(model.checkpoints(out))[1]["images"] > kept[0]
    assert EventAccumulator(str(out)).Reload().Scalars("Loss_D")


def test_numbers_that_go_bad_stop_the_run_at_its_last_good_checkpoint(trained, tmp_path):
    """An optimizer about to make a weight infinite while the loss still looks well, and a network that has one."""
    for says, poison in (("a weight is", lambda state: state["opt_G"]["exp_avg"][0].fill_(3e38)),
                         ("Loss_D is", lambda state: state["D"]["main.0.weight"].fill_(math.inf))):
        out = shutil.copytree(trained, tmp_path / says)
        poison(state := content(out / "checkpoint.pt"))
        torch.save(state, out / "checkpoint.pt")
        done = run("train.py", "--resume", "--out", out, "--epochs", 4, "--save-minutes", 0, status=1)
        assert re.search(rf"^error: step (19|20): {says} ", done.stderr, re.M), done.stderr
        kept = content(out / "checkpoint.pt")
        assert kept["step"] < 20 and all(t.isfinite().all() for t in kept["G"].values()), "nothing bad is saved"


# ---- many processes -------------------------------------------------------------------------------------------------

DRIVER = """
import hashlib, os, sys
sys.path.insert(0, sys.argv[1])
import train
def main():
    model = train.main(sys.argv[3:])
    weights = [p.detach().numpy().tobytes() for net in (model.G, model.D, model.G_ema) for p in net.parameters()]
    state = hashlib.sha256(b"".join(weights)).hexdigest()
    open(sys.argv[2] + "/rank-" + os.environ["RANK"], "w").write(state)
train.run(main)
"""


def ranks(folder, *words, processes=2):
    """torchrun, and in it train.py's main, whose ranks write down what weights they end with."""
    (folder / "driver.py").write_text(DRIVER)
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "3", "--nproc-per-node", str(processes),
            str(folder / "driver.py"), str(ROOT), str(folder), *map(str, words)]


def pid_of_rank(launcher, rank):
    for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            return int(pid)


def test_a_rank_that_dies_costs_a_restart_and_the_ranks_end_alike(pack, tmp_path, request):
    """Then the run goes on with a single process; nothing hangs."""
    long = request.config.getoption("--long")
    out, deaths = tmp_path / "run", (1, 0, 1) if long else (1,)
    words = [*TINY, "--device", "cpu", "--epochs", 30, "--log-every", 1, "--save-minutes", 0, "--data", pack, "--out", out]
    with Training(argv=ranks(tmp_path, *words)) as training:
        for rank in deaths:
            training.until("from image")
            for _ in range(20):
                training.until("Loss_D")
            os.kill(pid_of_rank(training.process.pid, rank), signal.SIGKILL)
        resumed = int(training.until(r"from image ([\d,]+) of")[1].replace(",", ""))
        assert training.end() == 0, training.text
    assert resumed > 0, "it goes on from a checkpoint"
    states = {(tmp_path / f"rank-{rank}").read_text() for rank in (0, 1)}
    assert len(states) == 1, "the weights are the same everywhere"
    if long:
        other = tmp_path / "uninterrupted"
        other.mkdir()
        with Training(argv=ranks(other, *words[:-1], other / "run")) as training:
            assert training.end() == 0, training.text
        assert_same_run(other / "run", out)
    images = content(out / "checkpoint.pt")["images"]
    done = run("train.py", "--resume", "--out", out, "--epochs", 32)
    assert f"from image {images:,}" in done.stdout
    assert content(out / "checkpoint.pt")["images"] > images


def test_a_notice_to_torchrun_reaches_every_rank(pack, tmp_path, request):
    if not request.config.getoption("--long"):
        pytest.skip("--long")
    out = tmp_path / "run"
    with Training(argv=ranks(tmp_path, *TINY, "--device", "cpu", "--epochs", 100_000, "--log-every", 1, "--data", pack, "--out", out)) as training:
        training.until(r"\[20/")
        training.process.send_signal(signal.SIGTERM)
        assert training.end() != 0
        step = int(re.findall(r"\[(\d+)/\d+\] Loss_D", training.text)[-1])
    assert content(out / "checkpoint.pt")["step"] == step


@pytest.mark.parametrize("stream", [False, True])
def test_every_rank_gets_its_frames_once_an_epoch(pack, stream):
    """Over all ranks each frame is seen once an epoch, in another order each time; so it goes on from any image."""
    pack = prepare_data.open_pack(pack)
    args = train.parse_args([*TINY, "--data", str(pack.folder), "--device", "cpu", *["--stream"] * stream])
    everything, cpu = Counter(frame.tobytes() for frame in pack.train), train.set_up_device(args, 0)

    def frames(rank, world, start, n):
        source, got = train.batches(pack, args, cpu, rank, world, start), []
        while len(got) < n:
            got += [frame.numpy().tobytes() for frame in next(source)[0]]
        return got[:n]

    N = len(pack.train)
    for world in (1, 2):
        epoch = -(-N // world)
        got = [frames(rank, world, 0, 3 * epoch) for rank in range(world)]
        for i in range(3):
            seen = Counter(frame for each in got for frame in each[i * epoch:(i + 1) * epoch])
            assert set(seen) == set(everything) and sum((seen - everything).values()) < world
        assert got[0][:epoch] != got[0][epoch:2 * epoch]
        assert frames(world - 1, world, 5 * 16 * world, 100) == got[world - 1][5 * 16:5 * 16 + 100], "in the middle of an epoch"
    if stream:
        args.stream = False
        assert frames(0, 1, 0, 3 * N) == frames(0, 1, 0, 3 * N), "from memory and from the disk"


@pytest.mark.parametrize("n, chunk", [(1, 10_000), (142, 164), (5000, 2), (700, 1)])
def test_the_order_of_frames_is_the_same_from_any_start(n, chunk):
    def rows(start, count):
        source, got = train.row_batches(n, chunk, 16, (7, 0), start), []
        while len(got) < count:
            batch = next(source)
            assert len(batch) == 16
            got += batch.tolist()
        return got[:count]

    straight = rows(0, 3 * n)
    for i in range(3):
        assert sorted(straight[i * n:(i + 1) * n]) == list(range(n))
    assert n < 100 or straight[:n] != straight[n:2 * n] != sorted(straight[n:2 * n])
    for start in {0, n // 3, n - 1, n, n + n // 2, 2 * n - 1}:
        assert rows(start, 3 * n - start) == straight[start:]


# ---- nobody's code runs, and nothing foreign is taken for a checkpoint ----------------------------------------------

class Bomb:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch '{self.mark}'",)


def foreign_files(trained, mark):
    """{what it is: how to write it to a path}"""
    good = content(trained / "checkpoint.pt")

    def archive(path):
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("archive/data.pkl", pickle.dumps(Bomb(mark)))
            file.writestr("archive/version", "3")

    def wide(path):
        torch.save({**good, "G": {k: v.repeat(2, *[1] * (v.dim() - 1)) if v.dim() else v for k, v in good["G"].items()}}, path)

    return {
        "a pickle that runs a program": lambda path: path.write_bytes(pickle.dumps(Bomb(mark))),
        "a torch file that runs a program": lambda path: torch.save({**good, "scaler": Bomb(mark)}, path),
        "an old torch file that runs a program": lambda path: torch.save(Bomb(mark), path, _use_new_zipfile_serialization=False),
        "a zip that runs a program": archive,
        "another shape": wide,
        "another format version": lambda path: torch.save({**good, "format": 99}, path),
        "a format that is no number": lambda path: torch.save({**good, "format": torch.zeros(3)}, path),
        "a list": lambda path: torch.save([1, 2], path),
        "nothing of ours": lambda path: torch.save({"a": 1}, path),
        "weights of another kind": lambda path: torch.save({**good, "G": {"main.0.weight": 5}, "G_ema": {}, "D": [], "opt_G": None}, path),
        "half of it": lambda path: path.write_bytes((trained / "checkpoint.pt").read_bytes()[:5000]),
        "a text file": lambda path: path.write_text("these are no weights\n"),
        "an empty file": lambda path: path.write_bytes(b""),
        "zeros": lambda path: path.write_bytes(bytes(10_000)),
        "a folder": lambda path: path.mkdir(),
        "a zip of pictures": lambda path: zipfile.ZipFile(path, "w").writestr("a.png", b"abc"),
    }


def test_a_foreign_file_in_place_of_a_checkpoint_is_refused_and_runs_nothing(trained, tmp_path, capsys):
    mark, told = tmp_path / "executed", {}
    for name, write in foreign_files(trained, mark).items():
        out = tmp_path / name
        out.mkdir()
        shutil.copy(trained / "args.json", out)
        write(out / "checkpoint.pt")
        args = train.parse_args(["--resume", "--out", str(out)])
        networks = train.DCGAN(args, train.set_up_device(args, 0))
        with pytest.raises((model.InputError, OSError)) as refused:
            train.load_checkpoint(networks, args)
        told[name] = str(refused.value)
        assert str(out) in told[name] and "\n" not in told[name] and len(told[name]) < 400, told[name]
        if name not in ("another shape",):  # a generator of another shape is fine for sample.py
            with pytest.raises((model.InputError, OSError)):
                model.load_generator(out / "checkpoint.pt")
        assert not mark.exists(), name
    run("train.py", "--resume", "--out", tmp_path / "a torch file that runs a program", status=2)
    run("sample.py", "--checkpoint", tmp_path / "a pickle that runs a program" / "checkpoint.pt", status=2, cwd=tmp_path)
    assert not mark.exists() and not (tmp_path / "samples.png").exists()


def test_a_run_whose_arguments_were_edited_by_hand_is_refused_in_a_line(trained, tmp_path):
    good = json.loads((trained / "args.json").read_text())
    (tmp_path / "checkpoint.pt").write_bytes((trained / "checkpoint.pt").read_bytes())
    for text in ("", "{", "[]", "null", "7", "{}", json.dumps({**good, "lr": "fast"}), json.dumps({**good, "preset": "mine"}), "\xff\xfe"):
        (tmp_path / "args.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(model.InputError) as refused:
            train.parse_args(["--resume", "--out", str(tmp_path)])
        assert "\n" not in str(refused.value)


# ---- what is mistyped -----------------------------------------------------------------------------------------------

NUMBERS = {  # the options, and those of the values below that make sense for them
    "--epochs": (), "--seed": ("0",), "--minutes": ("1.5",), "--save-minutes": ("0", "1.5"), "--log-every": (), "--nz": (),
    "--ngf": (), "--ndf": (), "--batch-size": (), "--lr": (), "--beta1": ("0",), "--weight-decay": ("0",),
    "--instance-noise": ("0",), "--image-size": (), "--kernel-size": ()}


@pytest.mark.parametrize("script, options", [("train", NUMBERS), ("sample", {"--n": (), "--scale": (), "--seeds": ("0",)}),
                                             ("interpolate", {"--frames": (), "--fps": (), "--scale": (), "--seeds": ("0",), "--grid": ()})])
def test_a_number_that_makes_no_sense_is_a_line_before_any_work(script, options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parse = __import__(script).parse_args
    for option, sensible in options.items():
        for value in ("0", "-1", "1" + "0" * 30, "9" * 400, "1e400", "nan", "inf", "-inf", "x", "", "1.5", "0x10", "٣²"):
            if value in sensible:
                continue
            with pytest.raises(model.InputError) as refused:
                parse([f"{option}={value}"])
                raise AssertionError(f"{option}={value} is taken")
            assert option in str(refused.value) and "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_together_is_a_line_before_any_work(pack, trained, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("")
    there = set(tmp_path.iterdir())
    tiny = [*TINY, "--device", "cpu", "--data", str(pack)]
    for words, says in (
            ([*tiny, "--batch-size", 500], "more than the"),
            ([*tiny, "--image-size", 48], "image-size"),
            ([*tiny, "--image-size", 64], "is for images of 32"),
            (["--device", "cpu", "--data", pack], "is for images of 32"),
            ([*tiny, "--data", "nowhere"], "nowhere"),
            ([*tiny, "--data", tmp_path / "a file"], "a file"),
            ([*tiny, "--data", tmp_path / "other"], "other"),
            ([*tiny, "--out", trained], "--resume"),
            ([*tiny, "--out", tmp_path / "other"], "is there already"),
            ([*tiny, "--out", tmp_path / "a file"], "a file"),
            ([*tiny, "--out", tmp_path / "a file" / "run"], "a file"),
            ([*tiny, "--out", "/proc/run"], "/proc/run"),
            (["--resume", "--out", "none"], "no run in none"),
            (["--resume", "--out", tmp_path / "a file"], "a file"),
            (["--resume", "--out", trained, "--ngf", 8], "does not fit"),
            (["--resume", "--out", trained, "--preset", "clamp-64"], "is a run of naive-64"),
            (["--preset", "huge"], "huge"),
            (["--device", "gpu"], "gpu"),
            (["--sed", 4], "--sed")):
        try:
            train.main([*map(str, words)])
            raise AssertionError(f"{words} is taken")
        except model.InputError as error:
            assert says in str(error) and "\n" not in str(error), error
        except OSError as error:  # run() makes a line of it
            assert says in str(error)
        left = {path for path in set(tmp_path.iterdir()) - there if path.is_file() or any(path.iterdir())}
        assert not left, f"{words} left {left}"
    refused = run("train.py", *tiny, "--nz", 65536, "--ngf", 4096, "--out", "huge", status=2)
    assert "memory" in refused.stderr and refused.stderr.count("\n") == 1


def test_two_runs_do_not_mix(pack, tmp_path):
    out = tmp_path / "run"
    with Training(*RUN, "--epochs", 100_000, "--log-every", 1, "--data", pack, "--out", out) as training:
        training.until(r"\[2/")
        training.process.send_signal(signal.SIGSTOP)
        time.sleep(0.5)  # until its threads stand still
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        refused = run("train.py", "--resume", "--out", out, status=2)
        assert "being trained" in refused.stderr
        assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        training.process.send_signal(signal.SIGCONT)
        training.until("Loss_D")
