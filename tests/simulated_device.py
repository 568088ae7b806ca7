"""A device that isn't there: numbers of the CPU behind the rules of a GPU.

Tensors on it are of device type "meta", which on its own holds no numbers; here they do. As on a
GPU, an operation that mixes them with tensors of the CPU is an error, and they don't become NumPy
arrays without `Tensor.cpu`. Results are those of the CPU, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")


class OnDevice(torch.Tensor):
    """A tensor of the simulated device."""

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnDevice:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.held!r})"

    def item(self) -> float:
        return self.held.item()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Simulation(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


_SAME = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


def _run(func, args, kwargs):
    """Do an operation on the CPU; its results are where the operands, or the request, are."""
    tensors = [a for a in tree_flatten((args, kwargs))[0] if isinstance(a, torch.Tensor)]
    there = [a for a in tensors if isinstance(a, OnDevice)]
    asked = kwargs.get("device")
    # A number without dimensions may come from the CPU.
    here = [a for a in tensors if not isinstance(a, OnDevice) and a.ndim > 0]
    if there and here and func not in _SAME:
        raise RuntimeError(
            f"{func}: operands on the device {[tuple(a.shape) for a in there]} and on the CPU "
            f"{[tuple(a.shape) for a in here]}"
        )
    device = there or (asked is not None and torch.device(asked).type == DEVICE.type)
    if asked is not None and torch.device(asked).type == "cpu":
        device = False
    if func is torch.ops.aten.copy_.default:
        device = isinstance(args[0], OnDevice)
    if asked is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    inner = tree_map(lambda a: a.held if isinstance(a, OnDevice) else a, (args, kwargs))
    result = func(*inner[0], **inner[1])
    if not device:
        return result
    # An operation in place returns its operand.
    known = {id(a.held): a for a in there}
    return tree_map(
        lambda a: known.get(id(a), OnDevice(a)) if isinstance(a, torch.Tensor) else a, result
    )


@contextmanager
def simulated() -> Iterator[torch.device]:
    """Let tensors be made on the device."""
    with _Simulation():
        yield DEVICE
