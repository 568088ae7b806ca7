"""The temperatures that a force field holds at."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_TOLERANCE_K = 1e-6


class TemperatureRange(NamedTuple):
    """Lowest and highest temperature in K; equal where the energy is of one temperature."""

    low: float
    high: float

    def holds(self, temperature_K: float | np.ndarray | Tensor) -> Tensor:
        """Tell which temperatures in K lie within the range."""
        given = torch.as_tensor(temperature_K, dtype=torch.float64)
        return (given > self.low - _TOLERANCE_K) & (given < self.high + _TOLERANCE_K)

    def check(self, temperature_K: float | np.ndarray | Tensor) -> None:
        """Refuse temperatures in K outside of the range.

        Raises
        ------
        ValueError
            With the first of them.
        """
        wrong = ~self.holds(temperature_K)
        if wrong.any():
            given = torch.as_tensor(temperature_K, dtype=torch.float64)
            raise ValueError(
                f"the energy is a free energy at {self} and wrong at {given[wrong][0]:g} K; run at "
                f"{self} or train another model"
            )

    def reduced(self, temperature_K: float | Tensor) -> Tensor | None:
        """Map temperatures in K to -1 to 1 over the range; None if there is nothing to map.

        Raises
        ------
        ValueError
            See `check`.
        """
        self.check(temperature_K)
        if self.low == self.high:
            return None
        given = torch.as_tensor(temperature_K, dtype=torch.float64)
        return (2 * given - self.low - self.high) / (self.high - self.low)

    def __str__(self) -> str:
        return f"{self.low} K" if self.low == self.high else f"{self.low} to {self.high} K"
