"""Which mode the plugin runs in: lazy (ops collect in a graph until a cut) or eager."""
import os

RELEASE = tuple(int(part) for part in os.environ.get("HPU_SIM_RELEASE", "1.21").split(".")[:2])


def is_lazy():
    """PT_HPU_LAZY_MODE is not 0. Unset, releases up to 1.20 are lazy and later ones are eager."""
    return os.environ.get("PT_HPU_LAZY_MODE", "1" if RELEASE <= (1, 20) else "0") != "0"
