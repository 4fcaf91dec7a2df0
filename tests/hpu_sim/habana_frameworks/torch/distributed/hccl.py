"""Registers the backend `hccl`, which takes card tensors only. Gloo does the work, on the same memory.

A group ends with a barrier without a time limit: in destroy_process_group(), or at the end of a process that has not
called it. os._exit() skips the barrier.
"""
import atexit
import time

import torch
import torch.distributed as dist
from habana_frameworks.torch import core as htcore
from torch._C._distributed_c10d import _create_work_from_future
from torch.futures import Future

groups = []  # that have not ended


class ProcessGroupHccl(dist.ProcessGroup):
    def __init__(self, store, rank, size, timeout):
        super().__init__(rank, size)
        self.gloo = dist.ProcessGroupGloo(store, rank, size, timeout)
        self.store = store
        groups.append(self)

    def allreduce(self, tensors, options):
        """As in the plugin's lazy mode, it is an op of the graph, and waiting for it cuts the graph."""
        for tensor in tensors:
            if tensor.device.type != "hpu":
                raise RuntimeError(f"No backend type associated with device type {tensor.device.type}: hccl takes hpu")
        torch.ops.hpu_sim.ran("hccl::allreduce", tensors, "")
        htcore.mark_step()
        self.gloo.allreduce([torch.ops.hpu_sim.on_cpu(tensor) for tensor in tensors], options).wait()
        done = Future()
        done.set_result(tensors)
        return _create_work_from_future(done)

    def wait_for_all_ranks(self):
        """The barrier of the plugin's destructor."""
        arrived = self.store.add("HOST_BARRIER", 1)
        while arrived < self.size():
            time.sleep(0.01)
            arrived = self.store.add("HOST_BARRIER", 0)

    def getBackendName(self):
        return "hccl"


dist.Backend.register_backend("hccl", ProcessGroupHccl, devices=["hpu"])
# Newer torch attaches a flight recorder, by the group's name, where a backend does not record itself.
# A group that is written in Python has no name. Gloo, which does the work here, records itself.
getattr(dist.distributed_c10d, "_FR_SELF_RECORDING_BACKENDS", set()).add("hccl")


def end_groups():
    while groups:
        groups.pop().wait_for_all_ranks()


def destroy_process_group(group=None, usual=dist.destroy_process_group):
    end_groups()
    usual(group)


dist.destroy_process_group = destroy_process_group
atexit.register(end_groups)  # exit hooks of a script are newer, so they run before it
