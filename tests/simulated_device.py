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
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

DEVICE = torch.device("meta")
_CPU = torch.device("cpu")
_aten = torch.ops.aten
# Operations that may read from one device and write to the other, and indices from the CPU.
_ACROSS = (_aten._to_copy.default, _aten.copy_.default)
_INDEXING = (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default)


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

    # With these two, a module that is converted gets new tensors; setting `data` would leave the
    # old numbers in `held`.
    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict, *_: Any) -> OnDevice:
        return cls(inner["held"])

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Simulation(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _run(func, args, kwargs):
    """Do an operation on the CPU; its results are where the operands, or the request, are."""
    there: list[OnDevice] = []
    here: list[torch.Tensor] = []

    def held(value: Any) -> Any:
        if isinstance(value, OnDevice):
            there.append(value)
            return value.held
        # A number without dimensions may come from the CPU.
        if isinstance(value, torch.Tensor) and value.ndim:
            here.append(value)
        if isinstance(value, list | tuple):
            return type(value)(map(held, value))
        return value

    inner = held(tuple(args))
    options = {name: held(value) for name, value in kwargs.items()}
    reads_indices = func in _INDEXING and isinstance(args[0], OnDevice)
    if there and here and func not in _ACROSS and not reads_indices:
        raise RuntimeError(
            f"{func}: operands on the device {[tuple(a.shape) for a in there]} and on the CPU "
            f"{[tuple(a.shape) for a in here]}"
        )
    on_device = bool(there)
    if func is _aten.copy_.default:
        on_device = isinstance(args[0], OnDevice)
    if options.get("device") is not None:
        on_device = torch.device(options["device"]).type == DEVICE.type
        options["device"] = _CPU
    result = func(*inner, **options)
    if not on_device:
        return result
    known = {id(a.held): a for a in there}  # an operation in place returns its operand

    def placed(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return known.get(id(value)) if id(value) in known else OnDevice(value)
        if isinstance(value, list | tuple):
            return type(value)(map(placed, value))
        return value

    if torch.Tag.inplace_view in func.tags:  # the shape of the operand changes as well
        return return_and_correct_aliasing(func, args, kwargs, placed(result))
    return placed(result)


@contextmanager
def simulated() -> Iterator[torch.device]:
    """Let tensors be made on the device."""
    with _Simulation():
        yield DEVICE
