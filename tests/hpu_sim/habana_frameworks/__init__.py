"""The package that Gaudi's plugin installs, here for the simulated card (see ../hpu_sim.cpp)."""
import os


def _autoload():
    """`import torch` calls this, as with the plugin: it reads its mode and its lists of ops that early.

    TORCH_DEVICE_BACKEND_AUTOLOAD=0 is torch's own way to prevent it.
    """
    if "HPU_SIM_BUILD" in os.environ:
        import habana_frameworks.torch.core  # noqa: F401
