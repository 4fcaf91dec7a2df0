"""What the tests share: running the scripts as people run them.

Importing torch takes 5 to 10 seconds. Scripts therefore run in forks of a process that has imported it (Python's
fork server). Each fork has its own folder, environment, arguments and output, and imports the project's files anew.
Tests on the simulated Gaudi card have a server of their own, because the card needs a library (LD_PRELOAD).
"""
import atexit
import multiprocessing
import os
import re
import runpy
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent

# Networks that train in seconds.
TINY = "--preset naive-64 --image-size 32 --nz 8 --ngf 4 --ndf 4 --batch-size 16 --precision fp32".split()

FORKS = multiprocessing.get_context("forkserver")
PRELOAD = ["torch._dynamo", "torch.utils.tensorboard", "torchvision.utils", "PIL.Image"]
SERVERS = {}  # {the library in LD_PRELOAD: its fork server}
STARTING = threading.Lock()


def start(process, library):
    """Start a process in the fork server that has loaded this library ("" for none)."""
    with STARTING:
        if library not in SERVERS:
            variables = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "LD_PRELOAD": library}
            SERVERS[library] = forkserver.ForkServer()
            SERVERS[library].set_forkserver_preload(PRELOAD)
            with mock.patch.dict(os.environ, variables):
                SERVERS[library].ensure_running()
        server = SERVERS[library]
        with mock.patch.object(forkserver, "connect_to_new_process", server.connect_to_new_process):
            process.start()


def command(script, *words):
    """['python', 'train.py', …] as a list of strings for subprocess or Fork."""
    return [sys.executable, str(ROOT / script), *map(str, words)]


def become(words, folder, env, stdout, stderr):
    """In a fork: be the script."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(stdout.fileno(), 1)
    os.dup2(stderr.fileno(), 2)
    stdout.close()
    stderr.close()
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    packages = [path for path in sys.path if path not in (str(ROOT), str(ROOT / "tests"))]
    sys.path[:] = [os.path.dirname(words[0]), *filter(None, env.get("PYTHONPATH", "").split(os.pathsep)), *packages]
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out


class Fork:
    """A script that runs in a fork: the part of subprocess.Popen that the tests use, with pipes for the output."""

    def __init__(self, argv, cwd=None, env=None, stderr=subprocess.PIPE):
        (out, out_end), (err, err_end) = (FORKS.Pipe(duplex=False) for _ in range(2))
        ends = out_end, (out_end if stderr == subprocess.STDOUT else err_end)
        env = dict(os.environ if env is None else env)
        self.process = FORKS.Process(target=become, args=(argv[1:], str(cwd or os.getcwd()), env, *ends))
        start(self.process, env.get("LD_PRELOAD", ""))
        self.pid = self.process.pid
        self.stdout, self.stderr = (open(os.dup(pipe.fileno()), errors="replace") for pipe in (out, err))
        for pipe in (out, err, out_end, err_end):
            pipe.close()

    def communicate(self, timeout=None):
        with ThreadPoolExecutor() as threads:
            texts = list(threads.map(lambda pipe: pipe.read(), (self.stdout, self.stderr)))
        self.wait(timeout)
        return texts

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise TimeoutError(f"{self.pid} runs longer than {timeout} s")
        return self.process.exitcode

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.process.exitcode

    def send_signal(self, signum):
        os.kill(self.pid, signum)


new_process = partial(subprocess.Popen, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(script, *words, status=0, cwd=None, env=None, timeout=300, popen=Fork):
    """Run a script to its end, check its exit status, and return its subprocess.CompletedProcess, with texts.

    A user's mistake (status 2) must end with a line `error: …`, or argparse's `train.py: error: …`. A traceback is
    never right.
    """
    process = popen(command(script, *words), cwd=cwd, env={**os.environ, **(env or {})})
    stdout, stderr = process.communicate(timeout)
    assert process.returncode == status and "Traceback" not in stderr, \
        f"{script} {' '.join(map(str, words))}: status {process.returncode}\n{stdout[-3000:]}\n{stderr[-3000:]}"
    if status == 2:
        assert "error: " in stderr.splitlines()[-1], stderr
    return subprocess.CompletedProcess(process, status, stdout, stderr)


class Training:
    """A script that is running: read its output, send it signals. It never outlives the test."""

    def __init__(self, argv):
        start = Fork if argv[1].endswith(".py") else partial(subprocess.Popen, stdout=subprocess.PIPE, text=True)
        self.process = start(argv, stderr=subprocess.STDOUT)
        self.text, self.watchdog = "", threading.Timer(240, self.kill)  # a hang is a failure
        self.watchdog.start()

    def until(self, pattern):
        for line in self.process.stdout:
            self.text += line
            if match := re.search(pattern, line):
                return match
        raise AssertionError(f"no line '{pattern}', status {self.process.wait()}:\n{self.text[-3000:]}")

    def end(self):
        self.text += self.process.stdout.read()
        return self.process.wait()

    def children(self):
        """Process numbers of torchrun's ranks, which have process groups of their own."""
        pid = self.process.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def kill(self):
        if self.process.poll() is None:
            for pid in (self.process.pid, *self.children()):
                os.kill(pid, signal.SIGKILL)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.watchdog.cancel()
        self.kill()
        self.process.wait()
        self.process.stdout.close()


def content(file):
    import torch  # here: a process that only starts scripts does not need it

    return torch.load(file, weights_only=True)


def same(a, b):
    """Bit for bit: nested dicts and lists of tensors and values."""
    import torch

    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b



STATS = "Loss_D", "Loss_G", "D(x)", "D(G(z1))", "D(G(z2))"


def scalars(out, names=STATS):
    """What TensorBoard shows of a run: {name: [(images, value), …]}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(out)).Reload()
    return {name: [(event.step, event.value) for event in board.Scalars(name)] for name in names}


def torchrun(script, *words, restarts=0):
    """The command line that runs a script in two processes."""
    launcher = f"-m torch.distributed.run --standalone --max-restarts {restarts} --nproc-per-node 2".split()
    path = script if os.path.isabs(script) else ROOT / script
    return [sys.executable, *launcher, *map(str, (path, *words))]
