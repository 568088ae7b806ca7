"""RandomStreams: random numbers of replicas and ladders, the same in any company."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


class RandomStreams:
    """A stream of normals per replica and one of uniforms per ladder of replicas.

    All are drawn on the CPU and moved in blocks: a replica sees the same numbers alone or in
    company, on a CPU or a GPU, whatever the length of the blocks.

    Parameters
    ----------
    seeds
        Seed of each replica, R of them. A ladder's seed follows from those of its replicas.
    n_rungs
        Replicas per ladder, a divisor of R.
    device
        Where the numbers go.
    """

    def __init__(self, seeds: Sequence[int], n_rungs: int, device: torch.device):
        self.n_rungs, self.device = n_rungs, device
        self._replicas = [np.random.default_rng(seed) for seed in seeds]
        ladders = np.array(seeds, dtype=object).reshape(-1, n_rungs).tolist()
        # The spawn key keeps the stream of a ladder of one rung apart from its replica's.
        self._ladders = [
            np.random.default_rng(np.random.SeedSequence(ladder, spawn_key=(1,)))
            for ladder in ladders
        ]

    def normals(self, n_steps: int, n_beads: int) -> Tensor:
        """Draw standard normals, float64 of shape (n_steps, R, n_beads, 3), as if step by step."""
        drawn = np.empty((len(self._replicas), n_steps, n_beads, 3))
        for replica, numbers in zip(self._replicas, drawn, strict=True):
            replica.standard_normal(out=numbers)
        return torch.from_numpy(drawn).to(self.device).transpose(0, 1).contiguous()

    def log_uniforms(self, n_draws: int) -> Tensor:
        """Draw logarithms of uniforms, float64 of shape (n_draws, R), as if draw by draw."""
        drawn = np.stack([g.random((n_draws, self.n_rungs)) for g in self._ladders], axis=1)
        # 1 - u lies in (0, 1]: no logarithm of zero.
        return torch.from_numpy(np.log1p(-drawn).reshape(n_draws, len(self._replicas))).to(
            self.device
        )

    def state_dict(self) -> dict[str, list[dict[str, Any]]]:
        """Return the states of all generators, plain numbers."""
        return {
            "replicas": [generator.bit_generator.state for generator in self._replicas],
            "ladders": [generator.bit_generator.state for generator in self._ladders],
        }

    def load_state_dict(self, state: dict[str, list[dict[str, Any]]]) -> None:
        """Continue from `state_dict`."""
        for generators, key in ((self._replicas, "replicas"), (self._ladders, "ladders")):
            for generator, saved in zip(generators, state[key], strict=True):
                generator.bit_generator.state = saved
