"""What fits of flows share: a trained copy with averaged weights, and sums in a fixed order."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def fixed_order() -> Iterator[None]:
    """Add gradients in a fixed order, whatever the number of threads.

    Otherwise the gradient of an indexed tensor is summed by whichever thread comes first, and two
    runs of one seed part ways after a few steps. Filling every new tensor with NaN, part of torch's
    deterministic mode, guards against reading uninitialised memory only, and costs 5 %.
    """
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    # Some operations of GPUs have no fixed order: there, two runs may differ in the last digits.
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill


class Trained:
    """A copy of a module in single precision, its optimiser, and the average of its weights."""

    def __init__(self, module: nn.Module, learning_rate: float, steps: int) -> None:
        self._original = module
        self.module = copy.deepcopy(module).float().train()
        self.averaged = copy.deepcopy(self.module).requires_grad_(False).eval()
        self.parameters = list(self.module.parameters())
        self._mean = list(self.averaged.parameters())
        self._best: list[Tensor] | None = None
        self._optimizer = torch.optim.AdamW(
            self.parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-4, foreach=True
        )
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(
            self._optimizer,
            learning_rate,
            total_steps=max(steps, 2),
            pct_start=min(0.1, 100 / max(steps, 2)),
        )

    def step(self, clip: float, decay: float) -> None:
        """Step along the gradients, and average."""
        norm = nn.utils.clip_grad_norm_(self.parameters, clip)
        if not torch.isfinite(norm):
            self._optimizer.zero_grad()  # a step without gradients changes nothing
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._schedule.step()
        torch._foreach_lerp_(self._mean, [p.detach() for p in self.parameters], 1.0 - decay)

    def keep(self) -> None:
        """Remember the present average as the best."""
        self._best = [mean.clone() for mean in self._mean]

    @torch.no_grad()
    def restore(self) -> None:
        """Put the best average, or the last, into the module that this is a copy of."""
        best = self._mean if self._best is None else self._best
        for target, source in zip(self._original.parameters(), best, strict=True):
            target.copy_(source)
