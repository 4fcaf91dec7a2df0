"""Registers the backend `hccl`, which takes card tensors only. Gloo does the work, on the same memory.

A group ends with a barrier without a time limit: in destroy_process_group(), or at the end of a process that has not
called it. A rank that ends alone waits there for the others, which wait for the rank. os._exit() skips the barrier.
"""
import atexit
import os
import signal
import time

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _create_work_from_future
from torch.futures import Future

from habana_frameworks.torch import core as htcore


def _on_cpu(tensors):
    """The same memory as CPU tensors, in lists of lists as the collectives have them."""
    if isinstance(tensors, (list, tuple)):
        return [_on_cpu(t) for t in tensors]
    if tensors.device.type != "hpu":
        raise RuntimeError(f"No backend type associated with device type {tensors.device.type}: hccl takes hpu tensors")
    return torch.ops.hpu_sim.on_cpu(tensors)


def _flat(tensors):
    """The tensors of nested lists, in order."""
    if isinstance(tensors, torch.Tensor):
        return [tensors]
    return [t for part in tensors for t in _flat(part)] if isinstance(tensors, (list, tuple)) else []


def _collective(name, has_result=True):
    """A method of the process group that runs gloo's and waits; the first argument is what comes out.

    As in the plugin's lazy mode, the collective is an op of the graph, and waiting for it cuts the graph.
    """
    def method(self, *args, **kw):
        torch.ops.hpu_sim.ran(f"hccl::{name}", _flat(args), "")
        htcore._mark_step_if_lazy("hccl")
        args = list(args)
        out = args[0] if has_result else []
        for i, a in enumerate(args):
            if isinstance(a, torch.Tensor) or isinstance(a, (list, tuple)) and a:
                args[i] = _on_cpu(a)
        getattr(self.gloo, name)(*args, **kw).wait()
        done = Future()
        done.set_result(out)
        return _create_work_from_future(done)
    return method


groups = []  # that have not ended


class ProcessGroupHccl(dist.ProcessGroup):
    def __init__(self, store, rank, size, timeout):
        super().__init__(rank, size)
        self.gloo = dist.ProcessGroupGloo(store, rank, size, timeout)
        self.store = store
        groups.append(self)

    def wait_for_all_ranks(self):
        """The barrier of the plugin's destructor. It has no time limit.

        The real one waits in C++, where Python's signal handlers do not run. Here they are off.
        """
        handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
        handlers = {signum: handler for signum, handler in handlers.items() if callable(handler)}
        for signum in handlers:
            signal.signal(signum, lambda *_: None)
        arrived = self.store.add("HOST_BARRIER", 1)
        while arrived < self.size():
            time.sleep(0.01)
            arrived = self.store.add("HOST_BARRIER", 0)
        for signum, handler in handlers.items():
            signal.signal(signum, handler)

    _device_types = property(lambda self: [torch.device("hpu")])  # where torch puts pickled objects to send them

    for _n in ("allreduce allreduce_coalesced broadcast reduce allgather _allgather_base gather reduce_scatter "
               "_reduce_scatter_base scatter alltoall alltoall_base send recv "
               "all_gather_single reduce_scatter_single all_to_all_single").split():
        if hasattr(dist.ProcessGroupGloo, _n):  # the last three are newer torch's
            locals()[_n] = _collective(_n)
    barrier = _collective("barrier", has_result=False)

    def getBackendName(self):
        return "hccl"

    def __repr__(self):
        return f"ProcessGroupHccl({self.rank()} of {self.size()})"


if not hasattr(dist.Backend, "HCCL"):
    dist.Backend.register_backend("hccl", ProcessGroupHccl, devices=["hpu"])
    # Newer torch (2.15) attaches a flight recorder, by the group's name, where a backend does not record itself.
    # A group that is written in Python has no name. Gloo, which does the work here, records itself.
    getattr(dist.distributed_c10d, "_FR_SELF_RECORDING_BACKENDS", set()).add("hccl")


def end_groups(group=None):
    """End `group`, or all groups."""
    for one in [one for one in groups if group in (None, dist.group.WORLD, one)]:
        groups.remove(one)
        one.wait_for_all_ranks()


def _wrap_destroy(destroy):
    def destroy_process_group(group=None):
        end_groups(group)
        destroy(group)
    return destroy_process_group


dist.destroy_process_group = _wrap_destroy(dist.destroy_process_group)
atexit.register(end_groups)  # exit hooks of a script are newer, so they run before it


def initialize_distributed_hpu(world_size=None, rank=None, local_rank=None):
    """(world_size, rank, local_rank) as torchrun says, or as given."""
    given = {"WORLD_SIZE": world_size, "RANK": rank, "LOCAL_RANK": local_rank}
    if all(v is not None for v in given.values()):
        os.environ.update({k: str(v) for k, v in given.items()})
    env = os.environ.get
    return int(env("WORLD_SIZE", 1)), int(env("RANK", -1)), int(env("LOCAL_RANK", -1))
