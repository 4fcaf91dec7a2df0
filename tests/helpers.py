"""What the tests share: running the scripts as people run them."""
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TINY = "--image-size 32 --nz 8 --ngf 4 --ndf 4 --batch-size 16 --precision fp32".split()  # networks of seconds


def command(script, *words):
    """['python', 'train.py', …] as a list of strings for subprocess."""
    return [sys.executable, str(ROOT / script), *map(str, words)]


def run(script, *words, status=0, cwd=None, env=None, timeout=300):
    """Run a script to its end, check its exit status, and return the CompletedProcess (stdout and stderr are text).

    A user's mistake (status 2) must end with a line `error: …`, or argparse's `train.py: error: …`. A traceback is
    never right.
    """
    done = subprocess.run(command(script, *words), cwd=cwd, env={**os.environ, **(env or {})}, timeout=timeout,
                          capture_output=True, text=True, errors="replace")
    assert done.returncode == status and "Traceback" not in done.stderr, \
        f"{script} {' '.join(map(str, words))}: status {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    if status == 2:
        assert "error: " in done.stderr.splitlines()[-1], done.stderr
    return done
