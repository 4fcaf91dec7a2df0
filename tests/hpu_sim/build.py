"""Compiles the simulated card for the torch of this interpreter and says how to run a script on it.

    env = build()                                   # raises Unavailable, with the reason, where it can't
    env = {**os.environ, **env, "HPU_SIM_REPORT": "card.json"}
    subprocess.run([sys.executable, "train.py", "--device", "hpu"], env=env)
    unsupported(json.load(open("card.json")))       # calls that Gaudi has no kernel for, from the report's fallbacks

    python tests/hpu_sim/build.py                   # prints the environment, one NAME=value a line

Compiled once (about 30 s) into the temporary folder; the name holds torch's version and a
hash of the sources, so another torch or an edit builds anew and nothing lands in the checkout.
"""
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = [HERE / "preload.cpp", HERE / "hpu_sim.cpp"]


class Unavailable(RuntimeError):
    """The simulated card can't be built here; the message says why."""


def build():
    """Returns the environment variables (a dict) under which `habana_frameworks` is the simulated card."""
    if not sys.platform.startswith("linux"):
        raise Unavailable("the simulated card needs Linux (LD_PRELOAD)")
    names = [os.environ.get("CXX", "c++"), "g++", "clang++"]
    compiler = next(filter(None, map(shutil.which, names)), None)
    if compiler is None:
        raise Unavailable("no C++ compiler (c++, g++ or clang++) to build the simulated card with")
    import torch

    files = [*SOURCES, HERE / "metrics.h", Path(__file__)]
    key = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]
    python = "".join(map(str, sys.version_info[:2]))
    out = Path(tempfile.gettempdir()) / f"hpu_sim-{os.getuid()}-{torch.__version__}-py{python}-{key}"
    if not out.exists():
        # Built beside it and renamed: whoever finds the folder finds it whole, and two at once both work.
        work = Path(tempfile.mkdtemp(prefix="hpu_sim-", dir=out.parent))
        try:
            _compile(compiler, work)
            work.rename(out)
        except OSError:
            if not out.exists():  # else another process was first
                raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    preload = os.pathsep.join(filter(None, [str(out / "libpreload.so"), os.environ.get("LD_PRELOAD")]))
    return {"PYTHONPATH": path, "LD_PRELOAD": preload, "HPU_SIM_BUILD": str(out)}


def unsupported(report):
    """Op and dtype of the calls that fell back to the CPU, from a report (the JSON that HPU_SIM_REPORT gives)."""
    return sorted(report["fallbacks"])


def without_plugin_lines(stderr):
    """The lines of stderr that are not the plugin's own: its banner, and the three warnings of eager mode."""
    kept, in_banner = [], False
    for line in stderr.splitlines():
        if "HABANA PT BRIDGE CONFIGURATION" in line:
            in_banner = True
        elif in_banner:
            in_banner = line.strip("-") != ""  # the last line of the banner is a rule
        elif "does not have any effect. It's lazy mode only" not in line:
            kept.append(line)
    return kept


def _compile(compiler, out):
    import torch
    from torch.torch_version import TorchVersion

    root = Path(torch.__file__).parent
    standard = "c++20" if TorchVersion(torch.__version__) >= (2, 9) else "c++17"
    include = [f"-isystem{root / 'include'}", f"-isystem{root / 'include/torch/csrc/api/include'}"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    shared = [compiler, "-shared", "-fPIC", "-O1", "-w"]
    libs = [f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu"]
    for command in (
        [*shared, "-std=c++17", str(SOURCES[0]), "-o", str(out / "libpreload.so"), "-ldl"],
        [*shared, f"-std={standard}", abi, *include, str(SOURCES[1]), *libs, "-o", str(out / "libhpu_sim.so")],
    ):
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode != 0:
            errors = [line for line in run.stderr.splitlines() if "error" in line][:5]
            raise Unavailable("the simulated card does not compile with torch "
                              f"{torch.__version__}:\n" + "\n".join(errors or run.stderr.splitlines()[-5:]))


if __name__ == "__main__":
    try:
        for name, value in build().items():
            print(f"{name}={value}")
    except Unavailable as e:
        sys.exit(f"error: {e}")
