"""Compiles the simulated card for the torch of this interpreter, and says how to run a script on it.

`python tests/hpu_sim/build.py` prints the environment, one NAME=value a line. Compiled once (about 30 s) into the temporary folder. The folder's name has torch's version and a
hash of the sources, so another torch or an edit builds anew.
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


def build():
    """Returns the environment variables (a dict) under which `habana_frameworks` is the simulated card.

    Raises RuntimeError, with the compiler's words, if it cannot be compiled.
    """
    import torch

    key = hashlib.sha256(b"".join(path.read_bytes() for path in [*SOURCES, Path(__file__)])).hexdigest()[:12]
    python = "".join(map(str, sys.version_info[:2]))
    out = Path(tempfile.gettempdir()) / f"hpu_sim-{os.getuid()}-{torch.__version__}-py{python}-{key}"
    if not out.exists():
        # Built beside it and renamed: whoever finds the folder finds it whole, and two at once both work.
        work = Path(tempfile.mkdtemp(prefix="hpu_sim-", dir=out.parent))
        try:
            compile_to(work)
            work.rename(out)
        except OSError:
            if not out.exists():  # else another process was first
                raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    preload = os.pathsep.join(filter(None, [str(out / "libpreload.so"), os.environ.get("LD_PRELOAD")]))
    return {"PYTHONPATH": path, "LD_PRELOAD": preload, "HPU_SIM_BUILD": str(out)}


def compile_to(out):
    import torch
    from torch.torch_version import TorchVersion

    compilers = [os.environ["CXX"]] if "CXX" in os.environ else ["c++", "g++", "clang++"]
    compiler = next(filter(None, map(shutil.which, compilers)), None)
    if compiler is None:
        raise RuntimeError(f"the simulated Gaudi card needs a C++ compiler: there is none of {', '.join(compilers)}")
    root = Path(torch.__file__).parent
    standard = "c++20" if TorchVersion(torch.__version__) >= (2, 9) else "c++17"
    include = [f"-isystem{root / 'include'}", f"-isystem{root / 'include/torch/csrc/api/include'}"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    shared = [compiler, "-shared", "-fPIC", "-O1", "-w"]
    libs = [f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu"]
    for command in (
        [*shared, "-std=c++17", SOURCES[0], "-o", out / "libpreload.so", "-ldl"],
        [*shared, f"-std={standard}", abi, *include, SOURCES[1], *libs, "-o", out / "libhpu_sim.so"],
    ):
        run = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if run.returncode or not Path(command[command.index("-o") + 1]).exists():
            errors = [line for line in run.stderr.splitlines() if "error" in line][:5]
            raise RuntimeError(f"the simulated Gaudi card does not compile with {compiler} and torch "
                               f"{torch.__version__}:\n" + "\n".join(errors or run.stderr.splitlines()[-5:]))


if __name__ == "__main__":
    for name, value in build().items():
        print(f"{name}={value}")
