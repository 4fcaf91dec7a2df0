"""What the tests share: running the scripts as people run them.

Importing torch takes 5 to 10 seconds. Scripts therefore run in forks of a process that has imported it (Python's
fork server). Each fork has its own folder, environment, arguments and output, and imports the project's files anew.
"""
import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TINY = "--image-size 32 --nz 8 --ngf 4 --ndf 4 --batch-size 16 --precision fp32".split()  # networks of seconds

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch._dynamo", "torch.utils.tensorboard", "torchvision.utils", "PIL.Image"])


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
        words = argv[1:], str(cwd or os.getcwd()), dict(os.environ if env is None else env), *ends
        self.process = FORKS.Process(target=become, args=words)
        self.process.start()
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
