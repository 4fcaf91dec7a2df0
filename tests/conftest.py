import os

import pytest
from helpers import TINY, run

os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads cost such small networks more than they gain


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="the fault tests with hundreds of kills: a quarter of an hour")


@pytest.fixture(scope="session")
def pack(tmp_path_factory):
    """A pack of 184 drawn streets for images of 32×32, of which 136 are for training."""
    folder = tmp_path_factory.mktemp("packs") / "demo-32"
    run("prepare_data.py", "--demo", 184, "--image-size", 32, folder)
    return folder


@pytest.fixture(scope="session")
def score_pack(tmp_path_factory):
    """A pack of 240 drawn streets with enough held-out frames for a score."""
    folder = tmp_path_factory.mktemp("packs") / "scores-32"
    run("prepare_data.py", "--demo", 240, "--image-size", 32, "--holdout", 0.4, folder)
    return folder


@pytest.fixture(scope="session")
def trained(pack, tmp_path_factory):
    """A finished run of tiny networks on the CPU: 16 steps, 256 images."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    run("train.py", *TINY, "--device", "cpu", "--data", pack, "--out", out, "--epochs", 2, "--log-seconds", 0)
    return out


@pytest.fixture(scope="session")
def scored(score_pack, tmp_path_factory):
    """A finished run with scores of score_pack, saved after each step. Its output is in the file beside it."""
    out = tmp_path_factory.mktemp("runs") / "scored"
    words = "--device cpu --batch-size 28 --augment --mirror --instance-noise 0.1 --epochs 1".split()
    done = run("train.py", *TINY, *words, "--log-seconds", 0, "--save-minutes", 0, "--data", score_pack, "--out", out)
    out.with_name("output").write_text(done.stdout)
    return out


FAST = """
import itertools, prepare_data, time
prepare_data.DEMO_STREETS = 96
ticks, usual = itertools.count(0, 20), time.monotonic
def monotonic():
    '''Each look of train.py at the clock is 20 seconds later.'''
    return next(ticks) if sys._getframe(1).f_globals["__name__"] == "__main__" else usual()
time.monotonic = monotonic
"""


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """A folder in which `python train.py` has run, with 96 streets and a fast clock."""
    folder = tmp_path_factory.mktemp("demo")
    run("train.py", cwd=folder, first=FAST)
    return folder
