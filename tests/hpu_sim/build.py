"""Compiles the simulated card for the torch of this interpreter.

Compiled once (about 30 s) into the temporary folder. The folder's name has torch's version and a
hash of the sources, so another torch or an edit builds anew.
"""
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = [HERE / "preload.cpp", HERE / "hpu_sim.cpp"]


def build():
    """Returns the environment (a dict) in which `habana_frameworks` is the simulated card."""
    import torch

    key = hashlib.sha256(b"".join(path.read_bytes() for path in [*SOURCES, Path(__file__)])).hexdigest()[:12]
    python = "".join(map(str, sys.version_info[:2]))
    out = Path(tempfile.gettempdir()) / f"hpu_sim-{os.getuid()}-{torch.__version__}-py{python}-{key}"
    if not out.exists():
        # Built beside it and renamed: whoever finds the folder finds it whole.
        work = Path(tempfile.mkdtemp(prefix="hpu_sim-", dir=out.parent))
        compile_to(work)
        with suppress(OSError):  # another process was first
            work.rename(out)
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    preload = os.pathsep.join(filter(None, [str(out / "libpreload.so"), os.environ.get("LD_PRELOAD")]))
    return {"PYTHONPATH": path, "LD_PRELOAD": preload, "HPU_SIM_BUILD": str(out)}


def compile_to(out):
    import torch
    from torch.torch_version import TorchVersion

    compilers = os.environ.get("CXX"), "c++", "g++", "clang++"
    compiler = next(filter(shutil.which, filter(None, compilers)), None)
    if compiler is None:
        raise RuntimeError("the simulated Gaudi card needs a C++ compiler")
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
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the simulated Gaudi card does not compile with {compiler} and torch "
                               f"{torch.__version__}:\n{done.stderr[:2000]}")
