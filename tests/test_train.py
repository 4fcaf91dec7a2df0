"""Training is trusted for a week: after a kill, a full disk, a foreign file or a mistake it continues, or says why."""
import copy
import hashlib
import itertools
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
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import (
    ROOT,
    STATS,
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
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import model
import prepare_data
import train

CPU = [*TINY, "--device", "cpu"]
RUN = [*CPU, "--epochs", 4, "--log-seconds", 0, "--save-minutes", 0]  # 32 steps, each logged and saved
TRICKS = ["--augment", "--mirror", "--instance-noise", 0.1]


def three_stretches(frames, batch_size):
    """In place of train.cut_stretches, whose stretches hold 256 MB."""
    bounds = np.linspace(0, len(frames), 4).astype(int)
    return list(zip(bounds[:-1], bounds[1:])), sum(np.diff(bounds) // batch_size)


def run_in_three_stretches(*argv):
    """`python tests/test_train.py …` is train.py with the data of a large pack. Each rank prints its weights' hash."""
    train.cut_stretches = three_stretches
    networks = train.main(argv)
    weights = [*networks.G.parameters(), *networks.D.parameters(), *networks.G_ema.parameters()]
    state = b"".join(weight.detach().numpy().tobytes() for weight in weights)
    sys.stdout.write(f"weights {hashlib.sha256(state).hexdigest()}\n")  # one write: torchrun's ranks are unbuffered


def differences(out, other):
    """Names of what differs between two runs' last checkpoints. Scores depend on when a run saves."""
    a, b = (content(folder / "checkpoint.pt") for folder in (out, other))
    assert a.keys() == b.keys()
    return [name for name in a if name != "scores" and not same(a[name], b[name])]


@pytest.fixture(scope="module", params=["one stretch", "three stretches"])
def straight(request, pack, tmp_path_factory):
    """(the folder of a run that nothing interrupts, its output, the command without --out that gave it)."""
    argv = command("train.py", *RUN, "--data", pack)
    if request.param == "three stretches":
        argv = command(__file__, *RUN, *TRICKS, "--data", pack)
    out = tmp_path_factory.mktemp("runs") / "straight"
    stdout, stderr = new_process([*argv, "--out", str(out)]).communicate()  # unlike forks: another seed of hashes
    assert stderr == ""
    return out, stdout, argv


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """(the folder of a run with enough held-out frames for a score, its output, the command without --out)."""
    folder = tmp_path_factory.mktemp("scored")
    run("prepare_data.py", "--demo", 240, "--image-size", 32, "--holdout", 0.4, folder / "pack")
    words = [*CPU, *TRICKS, "--data", folder / "pack", "--epochs", 3, "--log-seconds", 0]
    done = run("train.py", *words, "--save-minutes", 0, "--out", folder / "run")
    return folder / "run", done.stdout, words


# ---- a run ----------------------------------------------------------------------------------------------------------

def test_a_step_equals_the_plain_loop_to_rounding():
    """Twenty steps beside the well-known loop: real and fake backward apart, nothing frozen, plain Adam."""
    args = train.parse_args([*CPU, "--data", "unused"])
    ours = train.DCGAN(args, train.set_up_device(args))
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
        return {"Loss_D": (loss_real + loss_fake).detach(), "Loss_G": loss_G.detach()}

    for i in range(20):
        frames = torch.randint(0, 256, (16, 40, 54, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        both = []
        for step in (ours.step, plain_step):
            torch.manual_seed(i)
            both.append(step(frames))
        for name, value in both[1].items():
            torch.testing.assert_close(both[0][name], value, rtol=1e-4, atol=1e-4)
    for net, plain in ((ours.G, plain_G), (ours.D, plain_D)):
        for a, b in zip(net.state_dict().values(), plain.state_dict().values()):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4)


def test_moments_of_another_memory_layout_continue_the_same():
    """Gaudi saves them contiguous, and fused AdamW reads them in the layout of the weights."""
    args = train.parse_args([*TINY, "--data", "unused", "--device", "cpu"])
    frames = torch.randint(0, 256, (16, 40, 54, 3), dtype=torch.uint8)
    first = train.DCGAN(args, train.set_up_device(args))
    first.step(frames)
    saved = copy.deepcopy(first.state_dict())
    contiguous = copy.deepcopy(saved)
    for moments in (*contiguous["opt_G"].values(), *contiguous["opt_D"].values()):
        moments.update({key: moments[key].contiguous() for key in ("exp_avg", "exp_avg_sq")})
    ends = []
    for state in (saved, contiguous):
        dcgan = train.DCGAN(args, train.set_up_device(args))
        dcgan.load_state_dict(state)
        for seed in (1, 2):
            torch.manual_seed(seed)
            dcgan.step(frames)
        ends.append(dcgan.state_dict()["D"]["main.2.weight"])
    assert torch.equal(*ends)


@pytest.mark.parametrize("scaler, count", [({}, 7), ({"scale": 1024.0}, 5)])
def test_a_resumed_optimizer_counts_the_steps_that_it_made(scaler, count):
    """Gaudi's optimizer leaves an old number with each weight. In fp16 steps are skipped, and the number is right."""
    args = train.parse_args([*TINY, "--data", "unused", "--device", "cpu"])
    networks = train.DCGAN(args, train.set_up_device(args))
    networks.step(torch.zeros(16, 40, 54, 3, dtype=torch.uint8))
    saved = networks.state_dict()
    for state in (*saved["opt_G"].values(), *saved["opt_D"].values()):
        state["step"] = torch.tensor(5.0)
    networks.load_state_dict({**saved, "scaler": scaler, "step": 7})
    for optimizer in (networks.opt_G, networks.opt_D):
        assert {int(state["step"]) for state in optimizer.state.values()} == {count}


def test_a_run_learns_and_logs_the_line_that_everybody_knows(pack, tmp_path):
    out, words = tmp_path / "run", ["--epochs", 12, "--log-seconds", 0, "--save-minutes", 60]
    text = run("train.py", *CPU, *words, "--data", pack, "--out", out).stdout
    lines = re.findall(r"^\[(\d+)/12\]\[(\d+)/(\d+)\] Loss_D [\d.]+ Loss_G [\d.]+ D\(x\) ([\d.]+) "
                       r"D\(G\(z\)\) ([\d.]+)/([\d.]+) [\d,]+/s$", text, re.M)
    steps = 12 * (len(prepare_data.open_pack(pack).train) // 16)
    assert [(int(step), int(of)) for _, step, of, *_ in lines] == [(i, steps) for i in range(1, steps + 1)]
    assert [int(epoch) for epoch, *_ in lines] == [math.ceil(12 * i / steps) for i in range(1, steps + 1)]
    first, last = ([float(x) for x in lines[i][3:]] for i in (0, -1))
    assert all(0.4 < x < 0.6 for x in first), "D knows nothing yet"
    assert last[0] > 0.65 and last[2] < 0.35, "D tells real from fake"
    grids = [np.asarray(Image.open(grid), np.float32)[2:34, 2:34] for grid in sorted((out / "samples").iterdir())]
    assert len(grids) == 2
    assert grids[-1].std() > 4 and abs(grids[-1] - grids[0]).mean() > 0.5, "the first picture is not grey, and changed"
    assert f"finished at image {16 * steps:,}; go on with: python train.py --resume --out {out} --epochs 24" in text
    assert all(len(line) <= 80 for line in text.splitlines() if "/s" in line), "no line breaks on a terminal"
    assert "no scores and no best.pt: there are 48 held-out frames and 136 others" in text and not (out / "scores.csv").exists()


def test_a_run_folder_holds_scores_and_pictures_and_tensorboard_shows_them(scored):
    out, text, _ = scored
    head, *rows = (out / "scores.csv").read_text().splitlines()
    table = [[float(value) for value in row.split(",")] for row in rows]
    columns = train.Reporter.COLUMNS
    assert tuple(head.split(",")) == columns and table == content(out / "checkpoint.pt")["scores"]
    said = re.findall(r"^score ([\d.]+) \(real images ([\d.]+)\), coverage ([\d.]+) \(([\d.]+)\), "
                      r"D\(held out\) ([\d.]+)$", text, re.M)
    assert len(said) == len(table) > 2
    for (images, score, coverage, real, real_coverage, held_out), words in zip(table, said):
        numbers = [float(word) for word in words]
        assert numbers == pytest.approx([score, real, coverage, real_coverage, held_out], abs=0.051)
        assert 0 < real < score and 0 <= coverage < real_coverage and 0 < held_out < 1
        assert (out / "samples" / f"{int(images):09d}.png").exists()
    logged = scalars(out, [*STATS, "images/s", "share of time waiting for data"])
    assert len(logged["images/s"]) == len(table) - 1 == len(re.findall(r"^saved at image", text, re.M))
    for name, values in scalars(out, ["score", "coverage", "D(held out)"]).items():
        assert values == [(row[0], pytest.approx(row[columns.index(name)], abs=1e-4)) for row in table]
    shown = EventAccumulator(str(out)).Reload().Images("samples")
    assert shown[-1].step == table[-1][0] and shown[-1].width == 8 * 34 + 2, "the samples, as pictures"
    scored_again = run("sample.py", "--score", out.parent / "pack", "--checkpoint", out / "checkpoint.pt", cwd=out)
    assert f"{table[-1][1]:.1f}" in scored_again.stdout, "the same number for the same images"


def test_the_best_checkpoint_and_a_few_generators_are_kept(pack, tmp_path):
    """The best has the smallest score among those with at least half the coverage of real images."""
    args = train.parse_args([*CPU, "--data", str(pack), "--out", str(tmp_path), "--epochs", "1"])
    networks = train.DCGAN(args, train.set_up_device(args))
    reporter = train.Reporter(args, prepare_data.open_pack(pack), networks, 10 ** 6, math.inf, [], None)
    reporter.start(0, 0)
    for step, score, coverage, best in ((1, 50, 0.3, None), (2, 90, 0.4, 2), (3, 95, 0.9, 2), (4, 80, 0.39, 2),
                                        (5, 70, 0.6, 5), (6, 60, 0.1, 5), (7, 65, 0.8, 7)):
        reporter.score = lambda G, latent, both=(score, coverage): both
        reporter.score.real = 20.0, 0.8
        reporter.save(step, 16 * step)
        file = tmp_path / "best.pt"
        assert (content(file)["images"] // 16 if file.exists() else None) == best
        shutil.copy(tmp_path / "generator-000000000.pt", tmp_path / "generator-000000000-mine.pt")  # is left alone
    kept = sorted(tmp_path.glob("generator-*[0-9].pt"))
    assert [content(file)["images"] for file in kept] == [0, 16, 32, 64], "each at least twice the one before"
    assert kept[-1].name == "generator-000000064.pt"
    assert content(tmp_path / "checkpoint.pt")["images"] == 112
    assert content(tmp_path / "best.pt").keys() == content(tmp_path / "checkpoint.pt").keys(), "a run can start from it"
    G, latent = model.load_generator(tmp_path)
    assert (G.image_size, G.nz, latent) == (32, 8, "normal")


def test_drawing_has_statistics_of_its_own_and_leaves_no_trace_in_the_training(scored, tmp_path):
    """Nor does D(held out)."""
    out, _, words = scored
    run("train.py", *words, "--save-minutes", 60, "--out", tmp_path / "run")
    saved = content(out / "checkpoint.pt")
    assert len(saved["scores"]) > 2 == len(content(tmp_path / "run" / "checkpoint.pt")["scores"])
    assert differences(out, tmp_path / "run") == [] and scalars(out) == scalars(tmp_path / "run")
    assert saved["G"]["main.1.num_batches_tracked"] == saved["step"]
    assert saved["D"]["main.3.num_batches_tracked"] == 3 * saved["step"], "real, fake, and fake after the update"

    G, average = model.Generator(32, 8, 4), saved["G_ema"]
    G.load_state_dict(average)
    features = G.main[0](model.latents(range(512), 8).view(-1, 8, 1, 1))
    torch.testing.assert_close(average["main.1.running_mean"], features.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(average["main.1.running_var"], features.var((0, 2, 3)), rtol=1e-3, atol=1e-4)


def test_minutes_end_a_run_with_everything_saved(pack, tmp_path):
    out, ops = tmp_path / "run", tmp_path / "ops"
    ops.write_text("linear\n")
    done = run("train.py", *CPU, "--epochs", 10 ** 6, "--minutes", 0.1, "--bf16-ops", ops, "--data", pack, "--out", out)
    images = content(out / "checkpoint.pt")["images"]
    assert f"stopped at image {images:,} after --minutes 0.1; go on with: python train.py" in done.stdout
    assert (out / "samples" / f"{images:09d}.png").exists() and (out / f"generator-{images:09d}.pt").exists()
    assert done.stdout.count("torch.autocast's own rules apply") == 1, "op lists are for Gaudi, and harmless elsewhere"


# ---- a resumed run equals an uninterrupted one ----------------------------------------------------------------------

def test_a_run_killed_again_and_again_equals_one_that_was_not(straight, tmp_path, request):
    """kill -9 at any moment: in a step, in a save, between its renames, at the start. One command line serves all."""
    reference, _, argv = straight
    out, chance, kills = tmp_path / "run", random.Random(0), 100 if request.config.getoption("--long") else 2
    argv, steps = [*argv, "--resume", "--out", str(out)], []
    for _ in range(kills):
        with Training(argv) as training:
            for _ in range(chance.randrange(3 if kills > 2 else 9)):
                if training.until("training frames|Loss_D|finished at")[0] == "finished at":
                    break
            time.sleep(chance.uniform(0, 0.1))
        steps += [content(file)["step"] for file in out.glob("checkpoint.pt")]
    with Training(argv) as training:
        assert training.end() == 0, training.text
    print(f"killed after the saves at steps {steps}")
    assert differences(reference, out) == [] and scalars(reference) == scalars(out)
    assert {p.name for p in (out / "samples").iterdir()} == {p.name for p in (reference / "samples").iterdir()}


@pytest.mark.parametrize("straight", ["three stretches"], indirect=True)
def test_a_run_stopped_by_sigterm_and_ctrl_c_equals_one_that_was_not(straight, tmp_path):
    """--resume remembers all arguments. The tricks (augmentation, flips, noise) are the same after it."""
    reference, _, argv = straight
    out = tmp_path / "run"
    argv = [*argv, "--save-minutes", "60", "--out", str(out)]
    for signum, times in ((signal.SIGTERM, 2), (signal.SIGINT, 1)):  # torchrun's ranks can get SIGTERM twice
        with Training(argv) as training:
            for _ in range(7):
                training.until("Loss_D")
            sent = time.monotonic()
            for _ in range(times):
                training.process.send_signal(signum)
                time.sleep(0.005)
            assert training.end() == 128 + signum, training.text
        assert "stopped and saved at image" in training.text
        assert time.monotonic() - sent < 10 and not re.search("Traceback|error:", training.text), training.text
        assert content(out / "checkpoint.pt")["step"] == int(re.findall(r"\[(\d+)/\d+\] Loss_D", training.text)[-1])
        argv = [*command(__file__), "--resume", "--out", str(out)]
    with Training(argv) as training:
        assert training.end() == 0, training.text
    assert differences(reference, out) == []
    logged = scalars(out)
    assert all(set(values) <= set(logged[name]) for name, values in scalars(reference).items())


# ---- there is always a good checkpoint ------------------------------------------------------------------------------

def test_a_kill_during_a_save_leaves_a_checkpoint_that_loads(tmp_path, request):
    """A fork of this process saves without end, so that a kill costs milliseconds."""
    newest, done = tmp_path / "checkpoint.pt", 0
    chance = random.Random(1)
    for _ in range(1000 if request.config.getoption("--long") else 100):
        read, write = os.pipe()
        child = os.fork()
        if not child:
            try:
                for images in itertools.count(done + 1):
                    content = {"images": images, "G": {"w": torch.full((20_000,), float(images))}}
                    train.save_file(newest, content)
                    os.write(write, b".")
            finally:
                os._exit(1)  # an error must not leave a second pytest
        os.close(write)
        assert os.read(read, 1), "it has saved once"
        time.sleep(chance.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        saves = 1 + len(os.read(read, 1 << 16))
        os.close(read)
        found = model.load_file(newest)
        assert found["images"] - done in (saves, saves + 1), "no finished save is lost"
        assert found["G"]["w"].eq(found["images"]).all() and len(found["G"]["w"]) == 20_000
        done = found["images"]


def test_a_damaged_checkpoint_is_an_error_and_best_pt_starts_a_new_run(trained, tmp_path):
    out = shutil.copytree(trained, tmp_path / "run")
    shutil.copy(out / "checkpoint.pt", out / "best.pt")
    with open(out / "checkpoint.pt", "r+b") as file:
        file.truncate(5000)
    refused = run("train.py", "--resume", "--out", out, status=2)
    assert refused.stderr.count("\n") == 1 and f"{out}/checkpoint.pt is damaged" in refused.stderr
    assert f"--init {out}/best.pt --out NEW" in refused.stderr
    words = "--data", json.loads((out / "args.json").read_text())["data"], *CPU, "--epochs", 1
    run("train.py", "--init", out / "best.pt", "--out", tmp_path / "new", *words)
    assert content(tmp_path / "new" / "checkpoint.pt")["images"] < content(out / "best.pt")["images"]


def test_a_finished_run_says_so_and_forgets_no_argument(trained, tmp_path):
    out = shutil.copytree(trained, tmp_path / "run")
    done = run("train.py", "--resume", "--out", out, cwd=tmp_path)
    images = content(trained / "checkpoint.pt")["images"]
    assert f"finished at image {images:,}" in done.stdout and "Loss_D" not in done.stdout
    assert (out / "checkpoint.pt").read_bytes() == (trained / "checkpoint.pt").read_bytes()
    then, now = (json.loads((folder / "args.json").read_text()) for folder in (trained, out))
    assert then["batch_size"] == 16 and then["lr"] == 2e-4 and then["preset"] == "naive-64"
    assert Path(then["data"]).is_absolute(), "it can be resumed in another folder"
    assert {name for name in now if now[name] != then[name]} == {"out", "resume"}


def test_a_full_disk_costs_a_warning_and_no_checkpoint(pack, tmp_path):
    """A limit on the size of files is the full disk. It can be set and lifted while the training continues."""
    def limit(size):
        resource.prlimit(training.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    out = tmp_path / "run"
    words = [*RUN, "--epochs", 100_000, "--data", pack, "--out", out]
    with Training(command("train.py", *words)) as training:
        training.until(r"\[30/")
        limit(100)
        training.until("warning: nothing saved in .*: File too large; training continues")
        training.until("Loss_D")
        kept = content(out / "checkpoint.pt")["images"]
        assert not list(out.glob("*.tmp"))
        limit(resource.RLIM_INFINITY)
        while content(out / "checkpoint.pt")["images"] == kept:
            training.until("Loss_D")
        training.text = ""
        for _ in range(30):
            training.until("Loss_D")
        assert "warning: " not in training.text, "it saves again"
        limit(100)
        training.until("warning: nothing saved")
        training.process.send_signal(signal.SIGTERM)
        assert training.end() == 1, "it ends without having saved"
        assert re.search("^error: nothing saved", training.text, re.M)
        assert "Traceback" not in training.text and "Exception" not in training.text, training.text
    assert content(out / "checkpoint.pt")["images"] > kept
    assert scalars(out)["Loss_D"]


def test_a_disk_that_is_full_at_the_start_is_an_error_at_once(pack, tmp_path):
    argv = command("train.py", *RUN, "--data", pack, "--out", tmp_path / "run")
    with Training(["bash", "-c", 'ulimit -f 4; exec "$@"', "bash", *argv]) as training:
        assert training.end() == 2 and "Loss_D" not in training.text
        assert re.search("^error: .*File too large$", training.text, re.M), training.text
        assert "Traceback" not in training.text, training.text


def test_numbers_that_go_bad_stop_the_run_and_are_not_saved(trained, tmp_path):
    """An optimizer about to make a weight infinite while the loss is still fine, and a network that has one."""
    for says, poison in (("a weight is not finite", lambda state: state["opt_G"][0]["exp_avg"].fill_(3e38)),
                         ("not finite: {'Loss_D': nan", lambda state: state["D"]["main.0.weight"].fill_(math.inf))):
        out = shutil.copytree(trained, tmp_path / says)
        state = content(out / "checkpoint.pt")
        poison(state)
        torch.save(state, out / "checkpoint.pt")
        words = ["--epochs", 4, "--save-minutes", 0, "--log-seconds", 0]
        done = run("train.py", "--resume", "--out", out, *words, status=1)
        stopped = re.fullmatch(rf"error: step (\d+): .*{says}.*--resume.*--lr\n", done.stderr)
        assert stopped, done.stderr
        kept = content(out / "checkpoint.pt")
        assert kept["step"] < int(stopped[1]) and all(weight.isfinite().all() for weight in kept["G"].values())


# ---- augmentation ---------------------------------------------------------------------------------------------------

def test_translate_shifts_by_whole_pixels_with_zeros_at_the_border():
    S, seen = 64, set()
    images = torch.rand(300, 3, S, S) + 0.5
    for image, shifted in zip(images, train.translate(images)):
        rows, columns = (shifted[0].amax(dim) > 0 for dim in (1, 0))
        top, left = (int(kept.int().argmax()) or int(kept.sum()) - S for kept in (rows, columns))
        expected = torch.zeros_like(image)
        expected[:, max(top, 0):S + top, max(left, 0):S + left] = image[:, max(-top, 0):S - top, max(-left, 0):S - left]
        assert torch.equal(shifted, expected), "all channels shift alike"
        seen.add((top, left))
    for axis in zip(*seen):
        assert min(axis) == -S // 8 and max(axis) == S // 8
    images.requires_grad_()
    shifted = train.translate(images)
    shifted.sum().backward()
    assert torch.equal(images.grad.sum((1, 2, 3)), (shifted > 0).sum((1, 2, 3)).float()), "gradients come through"


def test_augmentation_is_off_in_the_papers_presets_and_on_for_small_packs():
    on = {preset for preset in train.PRESETS if train.parse_args(["--preset", preset]).augment}
    assert on == {"demo-64", "small-64", "small-128"}
    assert not train.parse_args(["--preset", "demo-64", "--no-augment"]).augment
    assert train.parse_args(["--preset", "naive-64", "--augment"]).augment and train.parse_args([]).augment


# ---- many processes, and the data each of them sees -----------------------------------------------------------------

def test_a_rank_that_dies_costs_a_restart_and_the_ranks_end_alike(pack, tmp_path, request):
    long = request.config.getoption("--long")
    words = [*CPU, "--resume", "--epochs", 20, "--log-seconds", 0, "--save-minutes", 0, "--data", pack, "--out"]
    with Training(torchrun(__file__, *words, tmp_path / "run", restarts=3)) as training:
        for rank in (b"RANK=1", b"RANK=0", b"RANK=1") if long else (b"RANK=1",):
            training.until("training frames")
            for _ in range(20):
                training.until("Loss_D")
            for pid in training.children():
                if rank in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    os.kill(pid, signal.SIGKILL)
        images = int(training.until(r"run .* image ([\d,]+) of")[1].replace(",", ""))
        assert training.end() == 0, training.text
    assert images > 0, "it continues from a checkpoint"
    hashes = re.findall("weights ([0-9a-f]{64})", training.text)
    assert len(hashes) == 2 and len(set(hashes)) == 1, "both ranks end with the same weights"
    if long:
        with Training(torchrun(__file__, *words, tmp_path / "uninterrupted")) as training:
            assert training.end() == 0, training.text
        assert differences(tmp_path / "uninterrupted", tmp_path / "run") == []


def test_a_signal_to_torchrun_stops_every_rank_with_the_run_saved(pack, tmp_path):
    """Afterwards a single process continues the run."""
    out = tmp_path / "run"
    words = [*CPU, "--resume", "--epochs", 100_000, "--log-seconds", 0, "--data", pack, "--out", out]
    with Training(torchrun(__file__, *words)) as training:
        training.until(r"\[12/")
        training.process.send_signal(signal.SIGTERM)
        assert training.end() != 0
        step = int(re.findall(r"\[(\d+)/\d+\] Loss_D", training.text)[-1])
    saved = content(out / "checkpoint.pt")
    assert saved["step"] == step and saved["images"] == 2 * 16 * step
    done = run("train.py", "--resume", "--out", out, "--minutes", 0.02)
    assert f", image {saved['images']:,} of " in done.stdout
    assert content(out / "checkpoint.pt")["images"] > saved["images"]


def take(frames, n, seed=(0, 0), step=0):
    """The first n batches, as lists of bytes or numbers."""
    source = train.batches(frames, 16, seed, step)
    return [[row.numpy().tobytes() for row in batch] for batch in itertools.islice(source, n)]


@pytest.mark.parametrize("split", [train.cut_stretches, three_stretches])
def test_an_epoch_has_every_frame_at_most_once_and_is_the_same_from_any_step(split, monkeypatch):
    monkeypatch.setattr(train, "cut_stretches", split)
    frames = np.arange(150, dtype=np.uint8)
    steps = split(frames, 16)[1]
    assert steps == (9 if split is three_stretches else 150 // 16)
    all_batches = take(frames, 3 * steps)
    epochs = [sum(all_batches[i:i + steps], []) for i in range(0, 3 * steps, steps)]
    for epoch in epochs:
        assert len(epoch) == len(set(epoch)) == 16 * steps, "whole batches, and no frame twice"
    assert len({tuple(epoch) for epoch in epochs}) == 3, "each epoch has another order"
    assert all(set(epoch) != set(epochs[0]) for epoch in epochs[1:]), "other frames are left out"
    for step in (1, 2, steps - 1, steps, steps + 1, 2 * steps + 5):
        assert take(frames, 3 * steps - step, step=step) == all_batches[step:]
    assert take(frames, steps, seed=(1, 0)) != all_batches[:steps] != take(frames, steps, seed=(0, 1))


def test_reading_ahead_takes_two_threads_and_no_openmp_team():
    """An OpenMP team of the reader's own waits busily after each batch, and slows the training step by a third."""
    code = """
import os, time, numpy, torch, train
torch.set_num_threads(4)
torch.ones(1 << 20).add_(1)  # starts the OpenMP threads of the training step
before = len(os.listdir("/proc/self/task"))
stream = train.batches(numpy.zeros((640, 80, 106, 3), numpy.uint8), 64, (0, 0))
for _ in range(25):
    next(stream)
time.sleep(1)  # four more threads copy a stretch, and end
print(len(os.listdir("/proc/self/task")) - before, flush=True)
os._exit(0)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "2\n", done.stderr


def test_stretches_of_a_large_pack_hold_256_mb_and_eight_batches():
    frames = np.broadcast_to(np.uint8(0), (60_000, 80, 106, 3))  # 1.5 GB that take no memory
    for batch_size, n in ((128, 5), (2000, 3), (60_000, 1)):
        stretches, steps = train.cut_stretches(frames, batch_size)
        assert len(stretches) == n and steps == sum((stop - start) // batch_size for start, stop in stretches)
        assert [start for start, _ in stretches] == [0, *(stop for _, stop in stretches[:-1])]
        assert stretches[-1][1] == 60_000


def test_the_ranks_share_the_frames_of_a_pack(pack):
    args = train.parse_args([*CPU, "--data", str(pack)])
    everything = Counter(frame.tobytes() for frame in prepare_data.open_pack(pack).train)
    for world in (1, 2, 3):
        ranks = [SimpleNamespace(rank=rank, world=world) for rank in range(world)]
        parts = [train.share(train.find_data(args, rank).train, rank, 16) for rank in ranks]
        seen = Counter(frame.tobytes() for part in parts for frame in part)
        assert len({len(part) for part in parts}) == 1, "all ranks take equally many steps"
        assert not seen - everything and (everything - seen).total() < world, "no frame twice"


# ---- foreign files and mistakes -------------------------------------------------------------------------------------

class Bomb:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch '{self.mark}'",)


def refusal(capfd, *words):
    """The last line that train.py writes to stderr before it exits with status 2, called in this process."""
    with pytest.raises(SystemExit) as end:
        model.run_script(lambda: train.main([*map(str, words)]))
    line = capfd.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and "error: " in line, line
    return line


def test_a_foreign_file_in_place_of_a_checkpoint_is_refused_and_runs_no_code(trained, tmp_path, capfd):
    mark, good = tmp_path / "executed", content(trained / "checkpoint.pt")
    wide = {name: torch.cat([weight, weight]) if weight.dim() else weight for name, weight in good["G"].items()}
    files = {
        "a pickle that runs a program": lambda path: path.write_bytes(pickle.dumps(Bomb(mark))),
        "a torch file that runs a program": lambda path: torch.save({**good, "scaler": Bomb(mark)}, path),
        "an old torch file that runs a program": lambda path: torch.save(
            Bomb(mark), path, _use_new_zipfile_serialization=False),
        "other networks": lambda path: torch.save({**good, "G": wide}, path),
        "another program's": lambda path: torch.save({"netG": good["G"], "epoch": 3}, path),
        "a list": lambda path: torch.save([1, 2], path),
        "another dictionary": lambda path: torch.save({"a": 1}, path),
        "weights of another kind": lambda path: torch.save({**good, "G": {"main.0.weight": 5}, "opt_G": None}, path),
        "an empty file": lambda path: path.write_bytes(b""),
        "a folder": lambda path: path.mkdir(),
    }
    for name, write in files.items():
        out = tmp_path / name
        out.mkdir()
        shutil.copy(trained / "args.json", out)
        write(out / "checkpoint.pt")
        assert f"{out}/checkpoint.pt" in refusal(capfd, "--resume", "--out", out)
        assert not mark.exists(), name


def test_wrong_paths_and_combinations_are_one_line(pack, trained, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("")
    other_pack = shutil.copytree(pack, tmp_path / "pack")
    with open(other_pack / "index.csv", "a") as index:
        index.write("holdout,48,Bath,1,1,street.jpg\n")
    damaged = shutil.copytree(trained, tmp_path / "damaged")
    (damaged / "args.json").write_text("{")
    wrong = shutil.copytree(trained, tmp_path / "wrong")
    (wrong / "args.json").write_text("{}")
    options = json.loads((trained / "args.json").read_text())
    for name, saved in (("list", []), ("empty batch", options | {"batch_size": 0})):
        folder = shutil.copytree(trained, tmp_path / name)
        (folder / "args.json").write_text(json.dumps(saved))
    lost = shutil.copytree(trained, tmp_path / "lost")
    (lost / "checkpoint.pt").rename(lost / "keep.pt")
    (tmp_path / "dead link").symlink_to(tmp_path / "nowhere")
    tiny = [*CPU, "--data", pack]
    for words, says in (
            ([*tiny, "--batch-size", 500], "batch-size"),
            ([*tiny, "--batch-size", 1], "batch-size"),
            ([*tiny, "--image-size", 64], "is a pack for 32 pixels, not 64: add --image-size 32"),
            ([*tiny, "--data", "nowhere"], "nowhere"),
            ([*tiny, "--data", tmp_path / "a file"], "a file"),
            ([*tiny, "--data", trained], f"{trained} is a run: --data wants photographs or a pack"),
            ([*tiny, "--data", tmp_path / "other"], "no images"),
            ([*tiny, "--out", trained], "--resume"),
            ([*tiny, "--out", tmp_path / "a file"], "a file is not a folder. Name another one"),
            ([*tiny, "--out", tmp_path / "a file" / "run"], "a file is not a folder. Name another one"),
            ([*tiny, "--minutes", -1], "--minutes -1.0: choose from 0 to inf"),
            ([*tiny, "--lr", "nan"], "--lr nan: choose from 0 to 1000"),
            ([*tiny, "--beta1", 1], "--beta1 1.0: choose from 0 to 0.999"),
            ([*tiny, "--seed", 10 ** 20], "--seed"),
            ([*tiny, "--out", ""], "--out is empty"),
            ([*tiny, "--out", pack], "has other files: name a new folder"),
            ([*tiny, "--out", lost], "but no checkpoint.pt: put it back"),
            (["--resume", "--out", lost], "but no checkpoint.pt: put it back"),
            (["--resume", "--out", trained, "--epochs", 1], "has passed image 128. Use --epochs 3 or more"),
            (["--resume", "--out", wrong], "args.json cannot be read ('preset')"),
            (["--resume", "--out", tmp_path / "list"], "args.json cannot be read"),
            (["--resume", "--out", tmp_path / "empty batch"], "cannot be read (--batch-size 0: choose"),
            ([*tiny, "--out", "dead link/run"], "is not a folder"),
            (["--resume", "--out", trained, "--ngf", 8], f"{trained} has other networks than these options: use --ngf 4, or"),
            (["--resume", "--out", trained, "--data", other_pack], f"start a new run: --init {trained} --out NEW"),
            (["--resume", "--out", damaged], "args.json cannot be read"),
            ([*tiny, "--init", tmp_path / "other"], "holds none of best.pt, checkpoint.pt"),
            ([*tiny, "--init", trained, "--ngf", 5], "has --ngf 4. Leave it out"),
            (["--resume", "--out", trained, "--preset", "clamp-64"], "is a run of naive-64"),
            ([*tiny, "--graph"], "use --no-graph"),
            ([*tiny, "--precision", "fp16"], "fp16"),
            ([*tiny, "--fp32-ops", "missing.txt"], "missing.txt"),
            ([*tiny, "--sed", 4], "--sed")):
        assert says in refusal(capfd, *words), words
    names = {path.name for path in tmp_path.iterdir()}
    assert names <= {"a file", "other", "pack", "damaged", "runs", "wrong", "lost", "dead link", "list", "empty batch"}, "a refused run leaves no files"
    for name, value in (("WORLD_SIZE", 2), ("RANK", 0), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", 1)):
        monkeypatch.setenv(name, str(value))  # as torchrun does
    Image.new("RGB", (300, 200)).save(tmp_path / "other" / "street.jpg")
    for data in (["--data", tmp_path / "other"], []):
        assert "run prepare_data.py first" in refusal(capfd, *CPU, *data)


if __name__ == "__main__":
    model.run_script(lambda: run_in_three_stretches(*sys.argv[1:]))
