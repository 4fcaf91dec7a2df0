"""Loads the simulated card, as importing the real plugin's core loads the real one."""
import atexit
import ctypes
import functools
import json
import os
from pathlib import Path

import torch
import torch.distributed
import torch.random

_plug = ctypes.CDLL(None).hpu_sim_on  # of libpreload.so
torch.ops.load_library(os.path.join(os.environ["HPU_SIM_BUILD"], "libhpu_sim.so"))
_sim = torch.ops.hpu_sim
_LAZY = os.environ.get("PT_HPU_LAZY_MODE", "0") != "0"  # eager by default, from release 1.21 on
_lines = (Path(__file__).parents[2] / "supported_ops.txt").read_text().splitlines()
_ops = [op for line in _lines if line[:1] not in "#!" for op in line.split()]
_lacks = [call.strip() for line in _lines if line[:1] == "!" for call in line[1:].split(",")]
_plug(ctypes.c_void_p(_sim.plug_in(_LAZY, _ops, _lacks)))

from habana_frameworks.torch import hpu  # noqa: E402

torch._register_device_module("hpu", hpu)


def mark_step():
    """Cuts the lazy graph."""
    _sim.mark(0)


def replace_functions_of_torch():
    """What the plugin replaces when it loads. What a script took from torch before that stays as it was."""
    manual_seed, fork_rng, save = torch.manual_seed, torch.random.fork_rng, torch.save
    init_process_group = torch.distributed.init_process_group

    @functools.wraps(manual_seed)
    def seed_everything(seed):
        if not _LAZY:
            _sim.synced("manual_seed")  # eager mode finishes the pending work first
        _sim.seed(int(seed))
        return manual_seed(seed)

    @functools.wraps(fork_rng)
    def fork_rng_of_hpu(*args, device_type=None, **options):
        return fork_rng(*args, device_type=device_type or "hpu", **options)

    def init_without_device_id(backend=None, init_method=None, timeout=None, world_size=-1, rank=-1, store=None,
                               group_name="", pg_options=None):
        init_process_group(backend, init_method, timeout, world_size, rank, store, group_name, pg_options)

    torch.manual_seed = seed_everything
    torch.random.fork_rng = fork_rng_of_hpu
    torch.distributed.init_process_group = init_without_device_id
    if _LAZY:  # torch.load(weights_only=True) reads protocol 4 nowhere else
        torch.save = functools.partial(save, pickle_protocol=4)


replace_functions_of_torch()
_lists = {name: value for name, value in os.environ.items() if name.endswith("_OPS_LIST")}
compile_steps = []  # for each trace of torch.compile, the number of FusedAdamW steps before it


def hpu_backend(graph, example_inputs, **_options):
    """What torch.compile(backend="hpu_backend") calls for each trace. The graph runs as it is, op by op."""
    compile_steps.extend(_sim.steps("optimizer"))
    return graph.forward


def report():
    """What the card was asked to do up to now. The README's table names the entries."""
    seen = {name: dict(_sim.counts(name)) for name in ("ops", "syncs", "fallbacks")}
    seen.update({f"{name}_steps": _sim.steps(name) for name in ("graph", "layout", "sync")})
    seen["optimizer_steps"], = _sim.steps("optimizer")
    return {**seen, "compile_steps": compile_steps, "lists": _lists, "mode": "lazy" if _LAZY else "eager"}


def _at_exit():
    """Writes the report of a process that used the card."""
    seen, rank = report(), os.environ.get("RANK")
    path = os.environ.get("HPU_SIM_REPORT")
    if path and (seen["ops"] or seen["syncs"]):
        Path(path if rank is None else f"{path}.{rank}").write_text(json.dumps(seen))


atexit.register(_at_exit)
