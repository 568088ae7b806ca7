"""BeadFrames: a piece of trajectory of many replicas, as samplers return and writers take it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True, eq=False)
class BeadFrames:
    """S saved frames of R replicas of n beads.

    With replica exchange a replica is a rung: it has one temperature, and walkers pass through it.

    Parameters
    ----------
    beads
        Positions in Å, never wrapped into the box, shape (S, R, n, 3).
    steps
        Number of steps done when each frame was saved, shape (S,).
    energies
        Energies of the force field in eV, restraints not included, shape (S, R).
    restraint_energies
        Energies of all restraints in eV, shape (S, R).
    walkers
        Which walker each replica holds, shape (S, R).
    temperatures_K
        Temperature of each replica in K, shape (R,).
    timestep_fs
        Time step in fs.
    box
        Cell rows in Å, shape (3, 3) or (R, 3, 3), or None.
    """

    beads: np.ndarray
    steps: np.ndarray
    energies: np.ndarray
    restraint_energies: np.ndarray
    walkers: np.ndarray
    temperatures_K: np.ndarray
    timestep_fs: float
    box: np.ndarray | None

    def __len__(self) -> int:
        return len(self.steps)

    def by_walker(self) -> np.ndarray:
        """Return positions in Å, shape (S, R, n, 3), by walker rather than by temperature."""
        order = np.argsort(self.walkers, axis=1)
        return np.take_along_axis(self.beads, order[:, :, None, None], axis=1)

    def replica_box(self, replica: int) -> np.ndarray | None:
        """Return the cell rows of one replica in Å, shape (3, 3), or None."""
        return self.box if self.box is None or self.box.ndim == 2 else self.box[replica]

    @classmethod
    def join(cls, pieces: Sequence[BeadFrames]) -> BeadFrames:
        """Join consecutive pieces of one trajectory, at least one."""
        per_frame = ("beads", "steps", "energies", "restraint_energies", "walkers")
        joined = {key: np.concatenate([getattr(p, key) for p in pieces]) for key in per_frame}
        return replace(pieces[0], **joined)
