"""What the tests share: running the scripts as people run them, and looking at what came out.

Importing torch takes 5 to 10 seconds. Scripts therefore run in forks of a process that has imported it (Python's
fork server). Each fork has its own folder, environment, arguments and output, and imports the project's files anew.
Tests on the simulated Gaudi card have a server of their own, because the card needs a library (LD_PRELOAD).
"""
import atexit
import json
import multiprocessing
import os
import re
import resource
import runpy
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from multiprocessing import connection, forkserver
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent

# Networks that train in seconds.
TINY = "--preset naive-64 --image-size 32 --nz 8 --ngf 4 --ndf 4 --batch-size 16 --precision fp32".split()

FORKS = multiprocessing.get_context("forkserver")
PRELOAD = ["torch._dynamo", "torch.utils.tensorboard", "PIL.Image"]
SERVERS = {}  # {the library in LD_PRELOAD: its fork server}
STARTING = threading.Lock()


# ---- processes ------------------------------------------------------------------------------------------------------

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


def torchrun(script, *words, restarts=0):
    """The command line that runs a script in two processes."""
    launcher = f"-m torch.distributed.run --standalone --max-restarts {restarts} --nproc-per-node 2".split()
    return [sys.executable, *launcher, *command(script, *words)[1:]]


def become(words, folder, env, first, stdout, stderr):
    """In a fork: run the lines `first`, then be the script. If they import it, its main() runs as they changed it."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(stdout.fileno(), 1)
    os.dup2(stderr.fileno(), 2)
    stdout.close()
    stderr.close()
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup's ignore it
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    packages = [path for path in sys.path if path not in (str(ROOT), str(ROOT / "tests"))]
    sys.path[:] = [os.path.dirname(words[0]), *filter(None, env.get("PYTHONPATH", "").split(os.pathsep)), *packages]
    sys.argv = words
    try:
        exec(first, {"os": os, "sys": sys, "signal": signal, "resource": resource})
        if script := sys.modules.get(Path(words[0]).stem):
            script.run_script(script.main, "choose less")
        else:
            runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out


class Fork:
    """A script that runs in a fork: the part of subprocess.Popen that the tests use, with pipes for the output.

    first: lines of Python that run before it, such as limits, ignored signals, closed streams, or patches.
    """

    def __init__(self, argv, cwd=None, env=None, first="", stderr=subprocess.PIPE):
        (out, out_end), (err, err_end) = (FORKS.Pipe(duplex=False) for _ in range(2))
        ends = out_end, (out_end if stderr == subprocess.STDOUT else err_end)
        env = dict(os.environ if env is None else env)
        self.lock = threading.Lock()  # the exit status can be read once
        self.process = FORKS.Process(target=become, args=(argv[1:], str(cwd or os.getcwd()), env, first, *ends))
        start(self.process, env.get("LD_PRELOAD", ""))
        self.pid = self.process.pid
        self.stdout, self.stderr = (open(os.dup(pipe.fileno()), errors="replace") for pipe in (out, err))
        for pipe in (out, err, out_end, err_end):
            pipe.close()

    def communicate(self):
        with ThreadPoolExecutor() as threads:
            texts = list(threads.map(lambda pipe: pipe.read(), (self.stdout, self.stderr)))
        self.wait()
        return texts

    def wait(self, timeout=None):
        connection.wait([self.process.sentinel], timeout)
        return self.poll()

    def poll(self):
        with self.lock:
            return self.process.exitcode

    @property
    def returncode(self):
        return self.poll()

    def send_signal(self, signum):
        if self.poll() is None:
            os.kill(self.pid, signum)


new_process = partial(subprocess.Popen, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def descendants(pid):
    """Process numbers of the children of a process, and of theirs."""
    found = []
    with suppress(OSError):
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            found += map(int, children.read_text().split())
    return found + [grandchild for child in found for grandchild in descendants(child)]


def kill(process):
    """Kill a process that runs, and its children."""
    if process.poll() is None:
        for pid in (*descendants(process.pid), process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@contextmanager
def ending(process, seconds=240):
    """No process outlives this block, or the time limit: a hang is a failure."""
    watchdog = threading.Timer(seconds, kill, [process])
    watchdog.start()
    try:
        yield process
    finally:
        watchdog.cancel()
        kill(process)
        process.wait()


def run(script, *words, status=0, cwd=None, env=None, timeout=300, popen=Fork, traces=False, **options):
    """Run a script to its end, check its exit status, and return its subprocess.CompletedProcess, with texts.

    A user's mistake (status 2) must end with a line `error: …`, or argparse's `train.py: error: …`. A traceback is
    never right, but TensorBoard's thread may leave traces in its last moments. options: of Fork.
    """
    env = {**os.environ, **(env or {})}
    with ending(popen(command(script, *words), cwd=cwd, env=env, **options), timeout) as process:
        stdout, stderr = process.communicate()
    assert process.returncode == status and (traces or "Traceback" not in stderr), \
        f"{script} {' '.join(map(str, words))}: status {process.returncode}\n{stdout[-3000:]}\n{stderr[-3000:]}"
    if status == 2:
        assert "error: " in stderr.splitlines()[-1], stderr
    return subprocess.CompletedProcess(process, status, stdout, stderr)


def ranks(n, script, *words, cwd=None, env=None, first="", timeout=240):
    """Run a script in n forks, as torchrun would: if one fails, the others get SIGTERM. Returns CompletedProcesses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        job = {"WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1",
               "MASTER_PORT": str(free.getsockname()[1])}
    own = [{**os.environ, **job, "RANK": str(i), "LOCAL_RANK": str(i), **(env or {})} for i in range(n)]

    def end(process):
        stdout, stderr = process.communicate()
        for other in processes if process.returncode else ():
            other.send_signal(signal.SIGTERM)
        return subprocess.CompletedProcess(process, process.returncode, stdout, stderr)

    with ExitStack() as stack, ThreadPoolExecutor(n) as threads:
        argv = command(script, *words)
        processes = [stack.enter_context(ending(Fork(argv, cwd, variables, first), timeout)) for variables in own]
        return list(threads.map(end, processes))


class Training:
    """A script that is running: read its output, send it signals. It never outlives the test."""

    def __init__(self, argv, **options):
        start = Fork if argv[1].endswith(".py") else partial(subprocess.Popen, stdout=subprocess.PIPE, text=True)
        self.process, self.text = start(argv, stderr=subprocess.STDOUT, **options), ""
        self.ending = ending(self.process)

    def until(self, pattern):
        for line in self.process.stdout:
            self.text += line
            if match := re.search(pattern, line):
                return match
        raise AssertionError(f"no line '{pattern}', status {self.process.wait()}:\n{self.text[-3000:]}")

    def end(self):
        self.text += self.process.stdout.read()
        return self.process.wait()

    def __enter__(self):
        self.ending.__enter__()
        return self

    def __exit__(self, *_):
        self.ending.__exit__(*_)
        self.process.stdout.close()


# ---- runs and packs -------------------------------------------------------------------------------------------------

def dcgan(*words):
    """A DCGAN of tiny networks on the CPU, with these options."""
    import train

    args = train.look_up(train.parse_args([*TINY, "--device", "cpu", *map(str, words)]))
    return train.DCGAN(args, train.set_up_device(args))


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


def differences(out, other, file="checkpoint.pt"):
    """Names of what differs between two runs' last checkpoints. Scores depend on when a run saves."""
    a, b = ({**content(folder / file), "args": None, "scores": None} for folder in (out, other))
    return [name for name in {**a, **b} if not same(a.get(name), b.get(name))]


STATS = "Loss_D", "Loss_G", "D(x)", "D(G(z1))", "D(G(z2))"


def scalars(out, names=STATS):
    """What TensorBoard shows of a run: {name: [(images, value), …]}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(out)).Reload()
    return {name: [(event.step, event.value) for event in board.Scalars(name)] for name in names}


def make_pack(folder, train, holdout=0, image_size=32):
    """A pack made by hand. A split is {city: uint8 (N, H, W, 3)}, such an array, or a number of grey frames.

    Three frames are a sequence.
    """
    import numpy as np

    import prepare_data

    folder.mkdir(parents=True)
    H, W = prepare_data.frame_size(image_size)
    lines, counts = ["split,row,city,sequence,key,source file"], {}
    for split, cities in (("train", train), ("holdout", holdout)):
        if isinstance(cities, int):
            cities = np.full((cities, H, W, 3), 99, np.uint8)
        if not isinstance(cities, dict):
            cities = {"Bath": cities}
        np.save(folder / f"{split}.npy", np.concatenate([np.zeros((0, H, W, 3), np.uint8), *cities.values()]))
        named = [(city, i) for city, frames in cities.items() for i in range(len(frames))]
        lines += [f"{split},{row},{city},{split}{i // 3},key,{folder.name}" for row, (city, i) in enumerate(named)]
        counts[split] = {city: len(frames) for city, frames in cities.items()}
    (folder / "index.csv").write_text("\n".join(lines) + "\n")
    info = dict(format=prepare_data.FORMAT, image_size=image_size, H=H, W=W, counts=counts, arguments={})
    (folder / "pack.json").write_text(json.dumps(info))
    return folder
