"""Loads the simulated card, as importing the real plugin's core loads the real one.

tests/hpu_sim/README.md lists the environment variables. The import works without a card and with busy cards.
The first use of the device acquires a card and prints the configuration on stderr, or fails.
"""
import atexit
import ctypes
import functools
import json
import logging
import os
from pathlib import Path

import torch
import torch.distributed

from habana_frameworks.torch.utils.internal import RELEASE, is_lazy

try:
    _plug = ctypes.CDLL(None).hpu_sim_on
    _library = os.path.join(os.environ["HPU_SIM_BUILD"], "libhpu_sim.so")
except (AttributeError, KeyError):
    raise ImportError("the simulated card needs LD_PRELOAD and HPU_SIM_BUILD from tests/hpu_sim/build.py") from None
torch.ops.load_library(_library)
_sim = torch.ops.hpu_sim
_LAZY = is_lazy()
_supported = (Path(__file__).parents[3] / "supported_ops.txt").read_text().splitlines()
_cache_fields = 3 if RELEASE <= (1, 19) else 4  # of PT_HPU_RECIPE_CACHE_CONFIG
_plug(ctypes.c_void_p(_sim.plug_in(_LAZY, _supported, _cache_fields)))

from habana_frameworks.torch import hpu  # noqa: E402

torch._register_device_module("hpu", hpu)

compile_steps = []  # for each graph that hpu_backend was given, the number of FusedAdamW steps before it


def mark_step(device_str="", sync=False):
    """Cuts the lazy graph. In eager mode the real one does nothing; it is counted in both."""
    _sim.mark("")


def _mark_step_if_lazy(by):
    if _LAZY:
        _sim.mark(by)


def _wrap_torch():
    """Replaces the functions of torch that the plugin replaces."""
    manual_seed, init_process_group = torch.manual_seed, torch.distributed.init_process_group

    @functools.wraps(manual_seed)
    def seed_everything(seed):
        if not _LAZY and _sim.acquired():
            _sim.synced("manual_seed")  # eager mode finishes the pending work first
        return manual_seed(seed)

    def init_without_device_id(backend=None, init_method=None, timeout=None, world_size=-1, rank=-1, store=None,
                               group_name="", pg_options=None):
        init_process_group(backend, init_method, timeout, world_size, rank, store, group_name, pg_options)

    torch.manual_seed = seed_everything
    if _LAZY:
        torch.distributed.init_process_group = init_without_device_id
        # The plugin saves with pickle protocol 4, which torch.load(weights_only=True) reads nowhere else.
        # The real one also brings tensors to the CPU, but not in eager mode: not here.
        torch.save = functools.partial(torch.save, pickle_protocol=4)


_wrap_torch()
if not _LAZY:
    for _name in ("add_step_closure", "mark_step", "iter_mark_step"):
        logging.getLogger("habana_frameworks.torch.utils.internal").warning(
            "Calling %s function does not have any effect. It's lazy mode only functionality. (warning logged once)",
            _name)


def hpu_backend(graph, example_inputs, **_options):
    """What torch.compile(backend="hpu_backend") calls for each trace: the graph runs as it is, op by op."""
    compile_steps.append(json.loads(_sim.report())["optimizer_steps"])
    _sim.compiled()
    return graph.forward


def report():
    """What the card was asked to do up to now; the README's table names the entries."""
    seen = json.loads(_sim.report())
    seen["syncs"] = sum(seen["syncs_by_op"].values())
    seen["mode"] = "lazy" if _LAZY else "eager"
    seen["compiles"], seen["compile_steps"] = len(compile_steps), compile_steps
    seen["max_memory"] = _sim.memory()[1]
    return seen


def _write_report(path):
    seen, rank = report(), os.environ.get("RANK")
    if not seen["ops"] and not seen["events"]:
        return  # loaded and not used, as by torchrun itself
    with open(path if rank is None else f"{path}.{rank}", "w") as f:
        json.dump(seen, f)


atexit.register(_sim.end_metrics)
if os.environ.get("HPU_SIM_REPORT"):
    atexit.register(_write_report, os.path.abspath(os.environ["HPU_SIM_REPORT"]))
