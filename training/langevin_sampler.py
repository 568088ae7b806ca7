"""Bead ensembles by batched Langevin dynamics, as a function of the force field."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ccg_ase.forcefield import ForceField
from ccg_ase.langevin import BatchedLangevin

Sampler = Callable[[ForceField, np.ndarray, int], np.ndarray]
"""(force field, starts (R, n, 3) in Å, seed) -> equilibrium frames (S, R, n, 3) in Å."""


@dataclass(frozen=True)
class LangevinSampler:
    """A `Sampler`: all replicas in one `BatchedLangevin`, some steps of each thrown away.

    Parameters
    ----------
    n_steps, every
        Steps per replica, and steps between frames that count.
    equilibration
        Steps before those. Replicas start from frames that were reweighted to the new model, but
        the first ones from the reference: give the latter's differences time to relax.
    timestep_fs, friction_per_ps
        Of the dynamics.
    box
        Cell vectors in rows, Å, (3, 3); None for open space.
    compiled
        See `Evaluator`; one build serves all rounds, since weights aren't part of it.
    """

    n_steps: int
    every: int
    equilibration: int
    timestep_fs: float = 4.0
    friction_per_ps: float = 1.0
    box: np.ndarray | None = None
    compiled: bool = True

    def __call__(self, force_field: ForceField, starts: np.ndarray, seed: int) -> np.ndarray:
        """Return frames, (n_steps / every, R, n, 3), Å."""
        dynamics = BatchedLangevin(
            force_field,
            timestep_fs=self.timestep_fs,
            friction_per_ps=self.friction_per_ps,
            seed=seed,
            box=self.box,
            device=force_field.device,
            compiled=self.compiled,
        )
        dynamics.run(starts, self.equilibration, max(1, self.equilibration))
        return dynamics.run(None, self.n_steps, self.every).beads
