"""Training is trusted for a week: after a kill, a signal, a full disk or a foreign file it continues, or says why."""
import builtins
import errno
import io
import json
import math
import os
import pickle
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
from helpers import (
    ROOT,
    STATS,
    TINY,
    Fork,
    command,
    content,
    differences,
    ending,
    make_pack,
    run,
    scalars,
)

sys.path.insert(0, str(ROOT))

import torch

import model
import train

CPU = [*TINY, "--device", "cpu"]
TRICKS = ["--augment", "--mirror", "--instance-noise", 0.1]
EACH = ["--log-seconds", 0, "--save-minutes", 0]  # each step is logged and saved
RUN = [*CPU, *TRICKS, *EACH, "--batch-size", 32, "--epochs", 2]  # 2 × 4 steps

AT = """
import shutil, time, train
usual, calls = train.DCGAN.step, []
def step(dcgan, frames):
    calls.append(0)
    for line in {lines}.get(len(calls), []):
        exec(line)
    return usual(dcgan, frames)
train.DCGAN.step = step
"""


def at(lines):
    """Lines of Python that a training runs before these steps of it: {1: ["line", …], …}."""
    return AT.format(lines=lines)


def stop(name, step):
    return at({step: stop_lines(name)})


def stop_lines(name):
    return [f"os.kill(os.getpid(), signal.{name})"]


@pytest.fixture(scope="module")
def straight(pack, tmp_path_factory):
    """(the folder of a run that nothing interrupts, the words without --out that gave it)."""
    words = [*RUN, "--data", pack]
    out = tmp_path_factory.mktemp("runs") / "straight"
    run("train.py", *words, "--out", out)
    return out, words


# ---- a resumed run equals an uninterrupted one ----------------------------------------------------------------------

def test_a_run_killed_again_and_again_equals_one_that_was_not(straight, tmp_path):
    reference, words = straight
    out = tmp_path / "run"
    words = [*words, "--resume", "--out", out]  # one command line serves the first start and all others
    for step in (3, 1, 3):
        run("train.py", *words, first=stop("SIGKILL", step), status=-9)
    run("train.py", *words)
    assert differences(reference, out) == [] and scalars(reference) == scalars(out)
    assert set(os.listdir(out / "samples")) == set(os.listdir(reference / "samples"))


def test_a_run_killed_before_its_second_save_equals_one_that_was_not(straight, tmp_path):
    reference, words = straight
    words = [*words, "--save-minutes", 60, "--out", tmp_path / "run"]
    run("train.py", *words, first=stop("SIGKILL", 3), status=-9)
    assert content(tmp_path / "run/checkpoint.pt")["step"] == 0
    run("train.py", "--resume", "--out", tmp_path / "run")
    assert differences(reference, tmp_path / "run") == []


def test_signals_stop_a_run_with_everything_saved_and_it_goes_on_as_if_nothing_had_been(straight, tmp_path):
    """SIGTERM, which launchers can send twice, Ctrl-C, a closed terminal, and what Slurm sends before its limit."""
    reference, words = straight
    out = tmp_path / "my run"
    words = [*words, "--save-minutes", 60, "--out", out]
    for i, name in enumerate(("SIGTERM", "SIGINT", "SIGHUP"), 1):  # test_ranks sends SIGUSR1
        lines = stop_lines(name) * (2 if name == "SIGTERM" else 1)
        done = run("train.py", *words, first=at({2: lines}), status=128 + getattr(signal, name))
        saved = content(out / "checkpoint.pt")
        assert saved["step"] == 2 * i and f"image {saved['images']}" in "".join(done.stdout.splitlines()[-2:])
        assert f"--resume --out '{out}'" in done.stdout, "it says how to go on"
        words = ["--resume", "--out", out]
    run("train.py", *words)
    logged = scalars(out)
    assert differences(reference, out) == []
    assert all(set(values) <= set(logged[name]) for name, values in scalars(reference).items())


def test_nohup_keeps_a_run_going_when_the_terminal_closes(pack, tmp_path):
    ignored = "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    run("train.py", *CPU, "--epochs", 1, "--data", pack, "--out", tmp_path / "run", first=ignored + stop("SIGHUP", 3))
    assert content(tmp_path / "run/checkpoint.pt")["step"] == 8


def test_a_finished_run_goes_on_with_more_epochs_as_one_that_had_them_from_the_start(pack, trained, tmp_path):
    out = tmp_path / "run"
    run("train.py", *CPU, "--data", os.path.relpath(pack), "--epochs", 1, "--out", out)
    before = (out / "checkpoint.pt").read_bytes()
    done = run("train.py", "--resume", "--out", out, cwd=tmp_path)
    assert "finished" in done.stdout and "Loss_D" not in done.stdout and (out / "checkpoint.pt").read_bytes() == before
    run("train.py", "--resume", "--out", out, "--epochs", 2, cwd=tmp_path)
    assert differences(trained, out) == []


def test_a_run_goes_on_with_other_batches_and_counts_its_images(trained, tmp_path, capfd):
    out = shutil.copytree(trained, tmp_path / "run")
    train.main(["--resume", "--out", str(out), "--batch-size", "24", "--epochs", "3", "--log-seconds", "0"])
    saved = content(out / "checkpoint.pt")
    assert (saved["images"] - 256) % 24 == 0 and 3 * 5 * 24 - 24 < saved["images"] <= 3 * 5 * 24
    assert all(int(epoch) <= 3 for epoch in re.findall(r"^\[(\d+)/3\]", capfd.readouterr().out, re.M))


# ---- scores and the best checkpoint ---------------------------------------------------------------------------------

def test_a_run_has_scores_and_pictures_and_tensorboard_shows_them(scored, score_pack):
    lines = (scored / "scores.csv").read_text().splitlines()[1:]
    rows = [[float(value) for value in line.split(",")] for line in lines]
    assert rows == content(scored / "checkpoint.pt")["scores"]
    assert [row[0] for row in rows] == [28 * i for i in range(5)]
    said = re.findall(r"^score ([\d.]+) \(real images ([\d.]+)\), coverage ([\d.]+) \(([\d.]+)\)$",
                      scored.with_name("output").read_text(), re.M)
    shown = scalars(scored, ["score", "coverage"])
    for i, (images, score, coverage, real, real_coverage) in enumerate(rows):
        assert [float(word) for word in said[i]] == pytest.approx([score, real, coverage, real_coverage], abs=0.051)
        assert 0 < real < score and 0 <= coverage <= real_coverage
        assert (scored / f"samples/{int(images):09d}.png").exists()
        assert shown["score"][i] == (images, pytest.approx(score, abs=1e-4))
        assert shown["coverage"][i] == (images, pytest.approx(coverage, abs=1e-4))


def test_scores_and_samples_leave_the_training_as_it_is(scored, tmp_path):
    words = "--data", content(scored / "checkpoint.pt")["args"]["data"], "--batch-size", 28, "--epochs", 1
    run("train.py", *CPU, *TRICKS, *words, "--save-minutes", 60, "--out", tmp_path / "run")
    assert len(content(tmp_path / "run/checkpoint.pt")["scores"]) == 2
    assert differences(scored, tmp_path / "run") == []


def test_best_pt_is_the_newest_state_within_10_percent_of_the_smallest_score_of_enough_coverage(score_pack, tmp_path, monkeypatch):
    """Enough is half the coverage of real images. A network that repeats one picture can have a small score."""
    best, step, file = [], train.DCGAN.step, tmp_path / "run/best.pt"

    def spy(dcgan, frames):
        best.append(content(file)["step"] if file.exists() else None)
        return step(dcgan, frames)

    scores = (50, 0.3), (90, 0.41), (100, 0.9), (80, 0.39), (70, 0.6), (60, 0.1), (76, 0.8), (78, 0.8)
    monkeypatch.setattr(Given, "table", scores)
    monkeypatch.setattr(train, "Score", Given)
    monkeypatch.setattr(train.DCGAN, "sampler", sampler)
    monkeypatch.setattr(train.DCGAN, "step", spy)
    words = "--data", str(score_pack), "--epochs", "1", "--save-minutes", "0", "--out", str(tmp_path / "run")
    train.main([*CPU, *words])
    assert best == [None, 1, 1, 1, 4, 4, 6]
    assert content(file)["step"] == 6 and content(file).keys() == content(tmp_path / "run/checkpoint.pt").keys()


# ---- kills at each operation on files -------------------------------------------------------------------------------

class Given:
    """In place of Score: given scores and coverages of the states after 0, 1, … steps, and of real images."""

    real = 20.0, 0.8
    table = [(52, 0.8), (50, 0.8), (60, 0.8)]  # the best is neither the first nor the last

    def __init__(self, *args):
        pass

    def __call__(self, G, latent):
        assert latent == "normal"
        return self.table[G.step]


def sampler(dcgan, usual=train.DCGAN.sampler):
    G = usual(dcgan)
    G.step = int(dcgan.steps)
    return G


class Watched:
    """A file whose writes are operations, too."""

    def __init__(self, file, operation):
        self.file, self.operation = file, operation

    def write(self, data):
        self.operation("write", lambda: (self.file.write(data[:len(data) // 2]), self.file.flush()))
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


def watch(out, nth, fail, log):
    """Before its nth operation on files in `out` (or within, if it is a write), kill this process, or fail once."""
    done = []

    def operation(name, half=lambda: None):
        done.append(name)
        log.write_text(json.dumps(done))
        if len(done) == nth:
            half()
            if fail:
                raise OSError(errno.ENOSPC, "No space left on device")
            os.kill(os.getpid(), signal.SIGKILL)

    def watched(name, usual):
        def call(path, *args, **options):
            reads = name == "open" and not set("wax") & set("".join(args[:1]) + options.get("mode", ""))
            if reads or not (name == "fsync" or str(path).startswith(str(out))):
                return usual(path, *args, **options)
            operation(f"{name} {Path(str(args[0] if name == 'replace' else path)).name}")
            result = usual(path, *args, **options)
            return Watched(result, operation) if name == "open" else result
        return call

    for name in ("replace", "unlink", "mkdir", "fsync"):
        setattr(os, name, watched(name, getattr(os, name)))
    builtins.open = io.open = watched("open", open)


def in_a_child(words, log, nth=0, fail=False):
    """main(words) in a fork of this process. Returns its exit status, 3 for a traceback."""
    pid = os.fork()
    if not pid:
        status = 3
        try:
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
            train.Score, train.DCGAN.sampler = Given, sampler
            train.render = lambda G, z: torch.zeros(4, 3, 32, 32, dtype=torch.uint8)  # at once
            watch(words[-1], nth, fail, log)
            model.run_script(lambda: train.main([*map(str, words)]), "choose less")
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def try_all_places(folder, pack, every):
    """Print what is wrong after a kill (or, if all places are tried, a failure) at a place and a resume, as JSON."""
    words = [*CPU, *EACH, "--data", pack, "--epochs", 1, "--batch-size", 56, "--resume", "--out"]
    reference, log, wrong = folder / "reference", folder / "log", {}
    assert in_a_child([*words, reference], log) == 0
    names, tags = json.loads(log.read_text()), [*STATS, "score"]
    shown = scalars(reference, tags)
    places = [i for i, name in enumerate(names, 1) if every or i % 7 == 1 or re.match("replace .*pt", name)]
    for place, fail in [(place, fail) for place in places for fail in (False, True)[:1 + every]]:
        out = folder / f"{place}{fail}"
        statuses = [in_a_child([*words, out], log, place, fail), in_a_child([*words, out], log)]
        problems = [f"statuses {statuses}"] if statuses[0] not in ((0, 1, 2) if fail else (-9,)) or statuses[1] else []
        problems += differences(reference, out) + [path.name for path in out.rglob("*.tmp")]
        if not fail:
            problems += differences(reference, out, "best.pt")
            problems += ["TensorBoard"] * (scalars(out, tags) != shown)
            problems += ["scores.csv"] * ((reference / "scores.csv").read_bytes() != (out / "scores.csv").read_bytes())
        if problems:
            wrong[f"{'failure' if fail else 'kill'} at {place} of {len(names)}, {names[place - 1]}"] = problems
        shutil.rmtree(out)
    print(json.dumps([len(names), len(places), wrong]))


def test_a_kill_at_any_operation_on_files_costs_nothing(score_pack, tmp_path, request):
    """Equal weights, scores and best.pt, one row for each image, and no temporary file. With --long at all places."""
    words = tmp_path, score_pack, *(["all"] if request.config.getoption("--long") else [])
    done = run("tests/test_resume.py", *words, timeout=3600)
    operations, places, wrong = json.loads(done.stdout)
    assert operations >= 40 and places >= 12 and wrong == {}


# ---- disks ----------------------------------------------------------------------------------------------------------

LIMIT = "resource.setrlimit(resource.RLIMIT_FSIZE, ({}, resource.RLIM_INFINITY))"


def test_a_full_disk_costs_a_warning_and_no_checkpoint(pack, trained, tmp_path):
    """A limit on the size of files is the full disk. It comes twice, and goes once."""
    out = tmp_path / "run"
    first = at({4: [LIMIT.format(100)], 8: [LIMIT.format(-1)], 13: [LIMIT.format(100)]})
    words = [*CPU, "--data", pack, "--epochs", 2, "--log-seconds", 0, "--save-minutes", 0, "--out", out]
    with ending(Fork(command("train.py", *words), first=first)) as process:
        stdout, stderr = process.communicate()
    saved = [int(image.replace(",", "")) for image in re.findall(r"saved at image ([\d,]+)", stdout)]
    assert process.returncode == 1 and saved == [16 * i for i in (1, 2, 3, 8, 9, 10, 11, 12)], (stdout, stderr)
    assert stderr.count("warning: ") == 5 + 4 and re.search(f"error: .*{out}.*$", stderr)
    assert content(out / "checkpoint.pt")["step"] == 12 and not list(out.glob("*.tmp"))
    run("train.py", "--resume", "--out", out, "--save-minutes", 60)
    assert differences(trained, out) == []


def test_a_disk_that_is_full_at_the_start_is_an_error_at_once(pack, tmp_path):
    words = [*CPU, "--data", pack, "--out", tmp_path / "run"]
    done = run("train.py", *words, first=LIMIT.format(4096), status=2)
    assert "Loss_D" not in done.stdout and str(tmp_path / "run") in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("first", [
    "r, w = os.pipe(); os.close(r); os.dup2(w, 1)",  # | head
    "os.close(1); sys.stdout = None",  # >&-
    "os.dup2(os.open('/dev/full', os.O_WRONLY), 1)",
])
def test_output_that_nobody_reads_costs_no_save(first, pack, tmp_path):
    done = run("train.py", *CPU, "--epochs", 1, "--data", pack, "--out", tmp_path / "run", first=first)
    assert content(tmp_path / "run/checkpoint.pt")["step"] == 8 and done.stderr == ""


@pytest.mark.parametrize("change", ["os.rename(OUT, OUT + ' renamed')", "shutil.rmtree(OUT + '/samples')"])
def test_a_run_whose_folder_is_renamed_while_it_trains_leaves_all_that_a_resume_needs(change, pack, trained, tmp_path):
    out = tmp_path / "run"
    words = [*CPU, "--data", pack, "--epochs", 2, "--save-minutes", 0, "--out", out]
    first = at({3: [change.replace("OUT", repr(str(out)))], 6: stop_lines("SIGTERM")})
    run("train.py", *words, first=first, status=143, traces=True)
    for folder in (out, Path(f"{out} renamed")) if "rename" in change else (out,):
        run("train.py", "--resume", "--out", folder, "--save-minutes", 60)
        assert differences(trained, folder) == []


def test_a_pack_that_is_away_for_a_moment_does_not_matter(pack, trained, tmp_path):
    data = shutil.copytree(pack, tmp_path / "pack")
    moves = [f"os.rename({str(a)!r}, {str(b)!r})" for a, b in ((data, tmp_path / "away"), (tmp_path / "away", data))]
    words = [*CPU, "--data", data, "--epochs", 2, "--save-minutes", 0, "--out", tmp_path / "run"]
    run("train.py", *words, first=at({3: moves[:1], 6: stop_lines("SIGTERM")}), status=143)
    (tmp_path / "away").rename(data)
    run("train.py", "--resume", "--out", tmp_path / "run", "--save-minutes", 60)
    assert differences(trained, tmp_path / "run") == []


# ---- numbers and files that have gone bad ---------------------------------------------------------------------------

@pytest.mark.parametrize("poison", [
    lambda saved: saved["opt_G"]["state"][0]["exp_avg"].fill_(3e38),  # a weight becomes infinite, the loss is fine
    lambda saved: saved["D"]["main.0.weight"].fill_(math.inf),
])
def test_infinite_numbers_stop_the_run_and_are_not_saved(poison, trained, tmp_path):
    out = shutil.copytree(trained, tmp_path / "run")
    saved = content(out / "checkpoint.pt")
    poison(saved)
    torch.save(saved, out / "checkpoint.pt")
    done = run("train.py", "--resume", "--out", out, "--epochs", 4, "--save-minutes", 0, "--log-seconds", 0, status=1)
    stopped = re.fullmatch(r"error: step (\d+): .*finite.*--lr.*\n", done.stderr)
    kept = content(out / "checkpoint.pt")
    assert kept["step"] < int(stopped[1]) and all(weight.isfinite().all() for weight in kept["G"].values())


def refusal(capfd, *words):
    """The line with which train.py refuses these words, called in this process."""
    with pytest.raises(SystemExit) as end:
        model.run_script(lambda: train.main([*map(str, words)]), "choose less")
    lines = capfd.readouterr().err.splitlines()
    assert end.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def test_a_flipped_bit_or_a_cut_file_is_found_and_the_line_names_best_pt(trained, tmp_path, capfd):
    out = shutil.copytree(trained, tmp_path / "run")
    shutil.copy(out / "checkpoint.pt", out / "best.pt")
    good = (out / "checkpoint.pt").read_bytes()
    variances = content(out / "best.pt")["G"]["main.1.running_var"].numpy().tobytes()
    places = [good.index(variances) + 5, good.index(b"exp_avg"), len(good) // 3]
    flipped = [good[:i] + bytes([good[i] ^ 16]) + good[i + 1:] for i in places]
    for damaged in (*flipped, good[:5000], b""):
        (out / "checkpoint.pt").write_bytes(damaged)
        line = refusal(capfd, "--resume", "--out", out)
        assert f"{out}/checkpoint.pt" in line and f"--init {out}/best.pt" in line
        assert f"{out}/checkpoint.pt" in refusal(capfd, "--data", out, "--init", out / "checkpoint.pt")


class Bomb:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch '{self.mark}'",)


def test_a_foreign_file_in_place_of_a_checkpoint_is_refused_and_runs_no_code(trained, tmp_path, capfd):
    mark, good, out = tmp_path / "executed", content(trained / "checkpoint.pt"), tmp_path / "run"
    out.mkdir()
    file = out / "checkpoint.pt"
    wide = {name: torch.cat([weight, weight]) if weight.dim() else weight for name, weight in good["G"].items()}
    for write in (
            lambda: file.write_bytes(pickle.dumps(Bomb(mark))),
            lambda: torch.save({**good, "scaler": Bomb(mark)}, file),
            lambda: torch.save(Bomb(mark), file, _use_new_zipfile_serialization=False),
            lambda: torch.save({**good, "G": wide}, file),
            lambda: torch.save({**good, "G": {"main.0.weight": 5}, "opt_G": None}, file),
            lambda: torch.save({**good, "sizes": None}, file),
            lambda: torch.save({name: good[name] for name in good if name != "args"}, file),  # of an older version
            lambda: torch.save({"netG": good["G"], "epoch": 3}, file),
            lambda: torch.save([1, 2], file)):
        write()
        assert str(out) in refusal(capfd, "--resume", "--out", out)
        assert not mark.exists()


def test_a_run_refuses_what_is_not_its_own_with_a_line(pack, trained, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, "runs/mine")
    before = (tmp_path / "runs/mine/checkpoint.pt").read_bytes()
    make_pack(tmp_path / "other", 60)
    make_pack(tmp_path / "large", 60, 0, 64)
    other_card = torch.load("runs/mine/checkpoint.pt", weights_only=True) | {"device": "hpu"}
    Path("runs/card").mkdir()
    torch.save(other_card, "runs/card/checkpoint.pt")
    for words, facts in (
            ("--resume --out runs/mine --data other", ["runs/mine", "--init runs/mine"]),
            ("--resume --out runs/mine --data large", ["32"]),
            ("--resume --out runs/mine --ngf 8", ["runs/mine", "ngf", "4"]),
            ("--resume --out runs/mine --preset clamp-64", ["runs/mine"]),
            ("--resume --out runs/card --device cpu", ["hpu", "cpu", "--init"]),
            ("--resume --out runs/typo", ["runs/typo", "runs/mine", "runs/card"]),
            ("--resume --out runs/mine/checkpoint.pt", ["runs/mine/checkpoint.pt", "runs/card"]),
            ("--resume", ["runs/demo-64", "runs/mine"])):
        line = refusal(capfd, *words.split())
        assert all(fact in line for fact in facts), (words, line)
    assert (tmp_path / "runs/mine/checkpoint.pt").read_bytes() == before and not Path("runs/typo").exists()


def test_a_run_whose_pack_has_moved_says_so_and_takes_it_from_data(pack, trained, tmp_path, capfd):
    data = shutil.copytree(pack, tmp_path / "pack")
    out = tmp_path / "run"
    train.main([*CPU, "--data", str(data), "--epochs", "1", "--out", str(out)])
    data.rename(tmp_path / "moved")
    line = refusal(capfd, "--resume", "--out", out)
    assert str(data) in line and "--data" in line
    train.main(["--resume", "--out", str(out), "--data", str(tmp_path / "moved"), "--epochs", "2"])
    assert differences(trained, out) == []


if __name__ == "__main__":
    try_all_places(Path(sys.argv[1]), sys.argv[2], every=len(sys.argv) > 3)
