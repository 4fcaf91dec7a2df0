"""The package that Gaudi's plugin installs, here for the simulated card (see ../hpu_sim.cpp)."""
import os


def _autoload():
    """Called inside `import torch`, as Gaudi's releases from 1.18 on have it: the op lists are read that early.

    TORCH_DEVICE_BACKEND_AUTOLOAD=0 is torch's own way to prevent it. HPU_SIM_AUTOLOAD=0 simulates older releases.
    """
    if "HPU_SIM_BUILD" in os.environ and os.environ.get("HPU_SIM_AUTOLOAD", "1") == "1":
        import habana_frameworks.torch  # noqa: F401
