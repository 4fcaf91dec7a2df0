import multiprocessing.forkserver
import os
import signal

import pytest
from helpers import TINY, run
from hpu_sim.build import Unavailable, build

os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads cost such small networks more than they gain


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="the fault tests with hundreds of kills: a quarter of an hour")


@pytest.fixture(scope="session", autouse=True)
def fork_server():
    """Start it with the library that the simulated Gaudi card needs, if the card can be built."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
        try:
            patch.setenv("LD_PRELOAD", build()["LD_PRELOAD"])
        except Unavailable:
            pass
        multiprocessing.forkserver.ensure_running()


@pytest.fixture(autouse=True)
def signal_handlers():
    """Restore them: run_script sets its own."""
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
    yield
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


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
    run("train.py", *TINY, "--device", "cpu", "--data", pack, "--out", out, "--epochs", 2, "--log-every", 2)
    return out
