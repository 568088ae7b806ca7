"""Constants of a module that survive changes of precision."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class ExactConstants(nn.Module):
    """A module whose constants are kept in float64 and rounded anew at every conversion.

    A plain buffer that goes from float32 back to float64 keeps its float32 rounding, which breaks
    exact symmetries at 1e-8. The constants follow from the constructor's arguments, so that they
    aren't part of the state dictionary.
    """

    def __init__(self) -> None:
        super().__init__()
        self._exact: dict[str, Tensor] = {}

    def register_exact(self, name: str, value: Tensor) -> None:
        """Make a float64 tensor available as ``self.<name>``; conversions round it."""
        self._exact[name] = value
        self.register_buffer(name, value, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExactConstants:
        super()._apply(fn, recurse)
        for name, value in self._exact.items():
            setattr(self, name, value.to(getattr(self, name), copy=True))
        return self
