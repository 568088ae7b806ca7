"""The buffer: frames of p(x|s) at labelled states, weighted where they need to be."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields

import numpy as np

from ccg_mda.weights import effective_sample_size, resample

from .reference import read_npz, write_npz


@dataclass(frozen=True, eq=False)
class Buffer:
    """Frames that energy calls have paid for, at any number of states, for the flow to learn from.

    Attributes
    ----------
    beads
        s of every frame, (n, n_beads, 3) in Å or (n, n_torsions) in rad.
    positions, forces
        Atoms, (n, n_atoms, 3), Å, and their forces, eV/Å.
    energy
        U, (n,), eV.
    weight
        Weights (n,); at each state they sum to the effective number of its samples, so that a
        state counts by what is known of it.
    state
        Labelled state that a frame belongs to, (n,) int.
    bead_force, free_energy
        Estimates of -∂F/∂s and F(s) at s of the frame, of the shape of `beads` in eV/Å or eV/rad,
        and (n,) in eV; NaN where F is unknown.
    """

    beads: np.ndarray
    positions: np.ndarray
    forces: np.ndarray
    energy: np.ndarray
    weight: np.ndarray
    state: np.ndarray
    bead_force: np.ndarray
    free_energy: np.ndarray

    def __len__(self) -> int:
        return len(self.weight)

    @classmethod
    def concatenate(cls, *parts: Buffer) -> Buffer:
        """Join the frames of several parts."""
        columns = (np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls))
        return cls(*columns)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Buffer:
        """Read what `save` wrote."""
        return cls(**read_npz(path))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an NPZ file, atomically."""
        write_npz(path, vars(self))


def thinned(
    log_weight: np.ndarray, n: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Choose samples of one state for the buffer, and their weights.

    All that have a share, up to n of them; more are drawn down to n in proportion to their weights
    (systematic resampling), which changes no average but by its noise.

    Parameters
    ----------
    log_weight
        l of all samples, (K,).
    n
        How many to keep at most.
    rng
        Source of the draw.

    Returns
    -------
    chosen, weight
        Indices and weights (m,), m <= n; the weights sum to min(n, K x ESS).
    """
    effective = min(n, len(log_weight) * effective_sample_size(log_weight))
    if len(log_weight) > n:
        chosen, count = np.unique(resample(log_weight, n, rng), return_counts=True)
        return chosen, count * effective / n
    share = np.exp(log_weight - log_weight.max())
    share /= share.sum()
    chosen = np.flatnonzero(share * len(log_weight) > 1e-3)
    return chosen, share[chosen] * effective
