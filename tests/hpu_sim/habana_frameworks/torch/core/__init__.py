"""Loads the simulated card, as importing the real plugin's core loads the real one.

HPU_SIM_CARDS   cards in the machine (1); with 0 importing this raises, as it does where there is no card
HPU_SIM_REPORT  a file that says at exit what the card was asked to do (.RANK is added under torchrun; none if nothing)
"""
import atexit
import ctypes
import functools
import json
import multiprocessing
import os

import torch

_cards, _mine = int(os.environ.get("HPU_SIM_CARDS", "1")), int(os.environ.get("LOCAL_RANK", "0"))
if _mine >= _cards:  # each process acquires one card for itself
    raise RuntimeError(f"synStatus=26 [Generic failure] Device acquire failed: {_cards} card(s), none left for local rank {_mine}")
try:
    _plug = ctypes.CDLL(None).hpu_sim_on
    _library = os.path.join(os.environ["HPU_SIM_BUILD"], "libhpu_sim.so")
except (AttributeError, KeyError):
    raise ImportError("the simulated card needs the LD_PRELOAD and HPU_SIM_BUILD that tests/hpu_sim/build.py gives") from None
torch.ops.load_library(_library)
_sim = torch.ops.hpu_sim
_plug(ctypes.c_void_p(_sim.plug_in()))

from habana_frameworks.torch import hpu  # noqa: E402

torch._register_device_module("hpu", hpu)

compiles = 0  # graphs that hpu_backend was given


def is_lazy():
    return os.environ.get("PT_HPU_LAZY_MODE", "0") == "1"


def mark_step(device_str="", sync=False):
    """Cuts the lazy graph. In eager mode the real one does nothing; it is counted in both."""
    _sim.mark("")


def _mark_step_if_lazy(by):
    if is_lazy():
        _sim.mark(by)


if is_lazy():  # the plugin saves with pickle protocol 4 then, which torch.load(weights_only=True) reads nowhere else; it also
    torch.save = functools.partial(torch.save, pickle_protocol=4)  # brings tensors to the CPU, but not in eager mode: not here


def hpu_backend(graph, example_inputs, **_options):
    """What torch.compile(backend="hpu_backend") calls: the graph runs as it is, op by op."""
    global compiles
    compiles += 1
    return graph.forward


def report():
    """What the card was asked to do up to now; the README's table names the entries."""
    seen = json.loads(_sim.report())
    seen["syncs"] = sum(seen["syncs_by_op"].values())
    seen["mode"] = "lazy" if is_lazy() else "eager"
    seen["compiles"] = compiles
    seen["max_memory"] = hpu.max_memory_allocated()
    return seen


def _write_report(path):
    seen, rank = report(), os.environ.get("RANK")
    if not seen["ops"] and not seen["events"]:
        return  # loaded and not used, as by torchrun itself
    with open(path if rank is None else f"{path}.{rank}", "w") as f:
        json.dump(seen, f)


if os.environ.get("HPU_SIM_REPORT") and multiprocessing.parent_process() is None:  # a loader's worker reports nothing
    atexit.register(_write_report, os.path.abspath(os.environ["HPU_SIM_REPORT"]))
