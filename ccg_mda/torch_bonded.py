"""Bonds, angles and torsions of a molecular force field in torch, for batches of frames.

Positions come as (3, n_atoms, B), frames last: every gathered atom is then one contiguous row.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from numpy.polynomial import chebyshev
from torch import Tensor

from ccg_ase.exact import ExactConstants

_COLLINEAR = 1e-24  # Å⁴, keeps the force of an angle finite, namely zero, at 0° and 180°


class AtomGroups(ExactConstants):
    """Terms on tuples of atoms.

    Parameters
    ----------
    atoms
        Indices, shape (terms, atoms of a term).
    """

    def __init__(self, atoms: np.ndarray):
        super().__init__()
        self.register_buffer("atoms", torch.from_numpy(np.ascontiguousarray(atoms.T)))

    def bonds(self, positions: Tensor) -> tuple[Tensor, ...]:
        """Return the vectors from each atom of a term to the next, (3, terms, B) each."""
        ends = [positions.index_select(1, own) for own in self.atoms]
        return tuple(end - start for start, end in pairwise(ends))


class HarmonicBonds(AtomGroups):
    """Σ k/2 (r - r0)².

    Parameters
    ----------
    atoms
        Indices, shape (terms, 2).
    length, stiffness
        r0 in Å and k in eV/Å², shape (terms,).
    """

    def __init__(self, atoms: np.ndarray, length: np.ndarray, stiffness: np.ndarray):
        super().__init__(atoms)
        self.register_exact("length", torch.from_numpy(length)[:, None])
        self.register_exact("stiffness", torch.from_numpy(stiffness))

    def forward(self, positions: Tensor) -> Tensor:
        """Return the energy in eV, shape (B,)."""
        (bond,) = self.bonds(positions)
        stretch = bond.square().sum(0).sqrt() - self.length
        return 0.5 * self.stiffness @ stretch.square()


class HarmonicAngles(AtomGroups):
    """Σ k/2 (θ - θ0)².

    Parameters
    ----------
    atoms
        Indices, shape (terms, 3).
    angle, stiffness
        θ0 in radians and k in eV/rad², shape (terms,).
    """

    def __init__(self, atoms: np.ndarray, angle: np.ndarray, stiffness: np.ndarray):
        super().__init__(atoms)
        self.register_exact("angle", torch.from_numpy(angle)[:, None])
        self.register_exact("stiffness", torch.from_numpy(stiffness))

    def forward(self, positions: Tensor) -> Tensor:
        """Return the energy in eV, shape (B,)."""
        first, second = self.bonds(positions)
        # By both sine and cosine: the arc cosine loses half of its digits near 0° and 180°.
        sine = cross(first, second).square().sum(0).clamp(min=_COLLINEAR).sqrt()
        bend = torch.atan2(sine, -(first * second).sum(0)) - self.angle
        return 0.5 * self.stiffness @ bend.square()


class FourierTorsions(AtomGroups):
    """Σ of aₙ cos nφ + bₙ sin nφ, n = 0, 1, ..., N.

    Evaluated as P(cos φ) + sin φ Q(cos φ), with no angle in between, hence smooth everywhere but
    where three atoms are in line.

    Parameters
    ----------
    atoms
        Indices, shape (terms, 4).
    cosine, sine
        aₙ and bₙ in eV, shape (terms, N + 1); b₀ means nothing.
    """

    def __init__(self, atoms: np.ndarray, cosine: np.ndarray, sine: np.ndarray):
        super().__init__(atoms)
        top = cosine.shape[1]
        powers = np.zeros((top, 2, len(atoms)))
        # cos nφ = Tₙ(cos φ), sin nφ = sin φ Tₙ'(cos φ) / n
        for n, basis in enumerate(np.eye(top)):
            even, odd = basis[: n + 1], chebyshev.chebder(basis[: n + 1]) / max(n, 1)
            for k, (series, height) in enumerate(((even, cosine), (odd, sine))):
                poly = chebyshev.cheb2poly(series)
                powers[: len(poly), k] += np.multiply.outer(poly, height[:, n])
        self.register_exact("powers", torch.from_numpy(powers)[..., None])

    def forward(self, positions: Tensor) -> Tensor:
        """Return the energy in eV, shape (B,)."""
        cosine, sine = dihedral(*self.bonds(positions))
        *rest, value = self.powers
        for power in reversed(rest):
            value = power + value * cosine
        even, odd = value.expand(2, *cosine.shape).unbind(0)
        return (even + sine * odd).sum(0)


def cross(a: Tensor, b: Tensor) -> Tensor:
    """Return a × b over the first dimension."""
    return torch.linalg.cross(a, b, dim=0)


def dihedral(first: Tensor, second: Tensor, third: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of the dihedral angle of three bonds, IUPAC's sign.

    Parameters
    ----------
    first, second, third
        Bond vectors, shape (3, ...).

    Returns
    -------
    cosine, sine
        Shape (...); NaN where three atoms are in line.
    """
    left, right = cross(first, second), cross(second, third)
    scale = (left.square().sum(0) * right.square().sum(0)).rsqrt()
    axis = second.square().sum(0).sqrt()
    return (left * right).sum(0) * scale, (first * right).sum(0) * axis * scale
