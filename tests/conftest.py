import os

import pytest
from helpers import TINY, run

os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads cost such small networks more than they gain


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="the fault tests with hundreds of kills: a quarter of an hour")


@pytest.fixture(scope="session")
def pack(tmp_path_factory):
    """A pack of 184 drawn streets for images of 32×32."""
    folder = tmp_path_factory.mktemp("packs") / "demo-32"
    run("prepare_data.py", "--demo", 184, "--image-size", 32, folder)
    return folder


@pytest.fixture(scope="session")
def trained(pack, tmp_path_factory):
    """A finished run of tiny networks on the CPU."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    run("train.py", *TINY, "--device", "cpu", "--data", pack, "--out", out, "--epochs", 2, "--log-seconds", 0)
    return out
