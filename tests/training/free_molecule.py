"""A harmonic molecule, known in closed form, that is invariant under rotations."""

from __future__ import annotations

import numpy as np
import torch
from linear_gaussian import GaussianBackmapper, LinearGaussian
from scipy.spatial.transform import Rotation

# Å; every other atom is a bead.
SHAPE = np.array(
    [
        *([0.0, 0.0, 0.0], [1.2, 0.9, 0.0], [2.5, 0.0, 0.0], [3.5, 1.1, 0.5]),
        *([3.6, 2.3, -0.4], [3.2, 2.9, 1.0], [3.0, 2.6, 2.4], [4.2, 2.2, 3.1]),
    ]
)


class FreeMolecule(LinearGaussian):
    """A `LinearGaussian` without pins and rest vectors, hence invariant under rotations.

    Each atom fluctuates around a fixed affine combination W s of the beads, which is the only
    linear response that turns with them: K = L ⊗ 1, L_rb = -L_rr W. L_bb is such that F(s) is a
    network of soft springs between the beads, F = δᵀ(A ⊗ 1)δ/2. p(s) isn't normalisable; nothing
    here needs it.
    """

    def _network(self, bonds, bead_atoms):
        self.x0 = np.zeros((self.n_atoms, 3))
        b, r = np.array(bead_atoms), np.setdiff1d(np.arange(self.n_atoms), bead_atoms)
        affine = np.column_stack([SHAPE, np.ones(len(SHAPE))]).T
        combination = np.linalg.solve(affine[:, b], affine[:, r]).T
        stiff = 10.0 * np.eye(4) - 3.0 * (np.eye(4, k=1) + np.eye(4, k=-1))  # eV/Å²
        springs = 0.05 * (4 * np.eye(4) - 1)
        springs[:2, :2] += 0.1 * np.array([[1, -1], [-1, 1]])
        L = np.zeros((self.n_atoms, self.n_atoms))
        L[np.ix_(r, r)] = stiff
        L[np.ix_(r, b)] = -stiff @ combination
        L[np.ix_(b, r)] = L[np.ix_(r, b)].T
        L[np.ix_(b, b)] = springs + combination.T @ stiff @ combination
        return np.kron(L, np.eye(3))

    def states(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """Return bead states around the shape, turned at random, (n, 4, 3)."""
        beads = SHAPE[::2] + rng.normal(scale=0.1, size=(n, 4, 3))
        turns = Rotation.from_quat(rng.normal(size=(n, 4))).as_matrix()
        return np.einsum("nij,nbj->nbi", turns, beads)

    def atoms(self, beads: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return one exact sample of p(x|s) per state."""
        return GaussianBackmapper(self)(torch.from_numpy(beads)).rsample(rng=rng).numpy()
