"""Lennard-Jones and Coulomb energies between all pairs of atoms in torch, without a cutoff."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ccg_ase.exact import ExactConstants


class Distances(NamedTuple):
    """Distances r of all pairs i < j, in the order of `numpy.triu_indices`; shape (pairs, B).

    Parameters
    ----------
    square, plain, inverse
        r² in Å², r in Å, 1/r in 1/Å.
    """

    square: Tensor
    plain: Tensor
    inverse: Tensor


class AllPairs(torch.nn.Module):
    """The distances between n atoms.

    Parameters
    ----------
    n_atoms
        Number n of atoms.
    """

    def __init__(self, n_atoms: int):
        super().__init__()
        self.register_buffer("atoms", torch.triu_indices(n_atoms, n_atoms, 1))

    def forward(self, positions: Tensor) -> Distances:
        """Return the distances from positions in Å, shape (3, n_atoms, B)."""
        first, second = (positions.index_select(1, own) for own in self.atoms)
        square = (second - first).square().sum(0)
        inverse = square.rsqrt()
        return Distances(square, square * inverse, inverse)


class PairEnergies(ExactConstants):
    """Σ 4ε ((σ/r)¹² - (σ/r)⁶) + c/r over all pairs, each with numbers of its own.

    Exclusions and scaled neighbours are pairs with other numbers.

    Parameters
    ----------
    sigma, epsilon, coulomb
        σ in Å, ε in eV and c in eV·Å of the pairs i < j in the order of `numpy.triu_indices`,
        shape (pairs,).
    """

    def __init__(self, sigma: np.ndarray, epsilon: np.ndarray, coulomb: np.ndarray):
        super().__init__()
        self.register_exact("sigma_square", torch.from_numpy(sigma**2)[:, None])
        self.register_exact("four_epsilon", torch.from_numpy(4 * epsilon))
        self.register_exact("coulomb", torch.from_numpy(coulomb))

    def forward(self, distances: Distances) -> Tensor:
        """Return the energy in eV, shape (B,)."""
        ratio = self.sigma_square * distances.inverse.square()
        sixth = ratio * ratio * ratio
        return self.four_epsilon @ (sixth * (sixth - 1)) + self.coulomb @ distances.inverse
