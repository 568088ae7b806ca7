"""Where modules are, and where a computation may go.

Data go to the device of the module that they are given to; results come back as NumPy arrays.
"""

from __future__ import annotations

from itertools import chain

import torch
from torch import nn


def device_of(module: nn.Module) -> torch.device:
    """Return the device of a module's first tensor; the CPU if it holds none."""
    return next(chain(module.parameters(), module.buffers()), torch.empty(0)).device


def available(name: str) -> torch.device:
    """Return the device of a name, and make sure that it is there.

    Parameters
    ----------
    name
        ``cpu``, ``cuda``, ``cuda:1`` or another that torch knows; ``auto`` is a GPU if there is
        one, else the CPU.

    Raises
    ------
    ValueError
        If there is no such device.
    """
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if n_gpus else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"no device is called {name!r}: give cpu, cuda, cuda:1 or auto") from None
    if device.type == "cuda" and (device.index or 0) >= n_gpus:
        built = "" if torch.version.cuda else ", and this torch was built without CUDA"
        raise ValueError(
            f"there is no device {name!r}: torch {torch.__version__} finds {n_gpus} GPUs{built}; "
            "give cpu or auto, or install torch for your GPU"
        )
    return device
