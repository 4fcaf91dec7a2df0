"""torch.hpu, as far as the scripts meet it."""
import os
import warnings

import torch


def is_available():
    """Also with busy cards."""
    return os.environ.get("HPU_SIM_CARDS") != "0"


def _lazy_init():
    """torch calls it."""


def get_device_name(device=None):
    """Acquires a card. A machine without a card is no error here: a warning, and an empty name."""
    if not is_available():
        warnings.warn("Device not available", stacklevel=2)
        return ""
    torch.ops.hpu_sim.acquire()
    return "GAUDI (simulated)"


def synchronize(device=None):
    torch.ops.hpu_sim.acquire()
    torch.ops.hpu_sim.synced("synchronize")
