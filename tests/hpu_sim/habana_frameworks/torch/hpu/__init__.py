"""torch.hpu, as far as a training script meets it."""
import os
import warnings

import torch

from habana_frameworks.torch.hpu import random  # noqa: F401
from habana_frameworks.torch.hpu.random import (  # noqa: F401
    get_rng_state,
    initial_seed,
    manual_seed,
    manual_seed_all,
    seed,
    set_rng_state,
)

LIMIT = int(os.environ.get("HPU_SIM_MEMORY", 32 << 30))  # bytes: a first-generation card has 32 GiB


def is_available():
    return device_count() > 0


def device_count():
    """Cards in the machine, busy or not. A process sees the one it acquired as hpu:0, whatever its rank."""
    return int(os.environ.get("HPU_SIM_CARDS", "1"))


def current_device():
    return 0


def set_device(device):
    index = device if isinstance(device, int) else torch.device(device).index or 0
    if not 0 <= index < device_count():
        raise RuntimeError(f"invalid device {device}: this machine has {device_count()} card(s)")


class device:  # with torch.hpu.device(...)
    def __init__(self, device):
        set_device(device)

    def __enter__(self):
        pass

    def __exit__(self, *_):
        pass


def get_device_name(device=None):
    """Acquires a card. A machine without a card is no error here: a warning, and an empty name."""
    if not is_available():
        warnings.warn("Device not available", stacklevel=2)
        return ""
    torch.ops.hpu_sim.acquire()
    return "GAUDI (simulated)"


def synchronize(device=None):
    torch.ops.hpu_sim.synced("synchronize")


def _memory():
    """(bytes in use, the most at once)."""
    torch.ops.hpu_sim.acquire()
    return torch.ops.hpu_sim.memory()


def memory_allocated(device=None):
    return _memory()[0]


def max_memory_allocated(device=None):
    return _memory()[1]


def mem_get_info(device=None):
    """(free bytes, bytes in all)."""
    return LIMIT - _memory()[0], LIMIT


def reset_peak_memory_stats(device=None):
    torch.ops.hpu_sim.reset_peak()


def memory_stats(device=None):
    now, peak = _memory()
    return {"InUse": now, "MaxInUse": peak, "Limit": LIMIT}


def is_initialized():
    return torch.ops.hpu_sim.acquired()


def init():
    pass


def _lazy_init():
    pass


def _is_in_bad_fork():
    return False


def is_bf16_supported():
    return True


def get_amp_supported_dtype():
    return [torch.bfloat16, torch.float16]
