"""Correction maps on two torsions (CMAP) in torch, interpolated as OpenMM does."""

from __future__ import annotations

import numpy as np
import torch
from scipy.interpolate import CubicSpline
from torch import Tensor

from .torch_bonded import AtomGroups, dihedral

# Cubic of t in [0, 1] from its values and slopes at 0 and at 1: rows are powers of t.
_HERMITE = np.array([[1, 0, 0, 0], [0, 0, 1, 0], [-3, 3, -2, -1], [2, -2, 1, 1]], float)


class CorrectionMaps(AtomGroups):
    """Σ of maps E(φ, ψ), bicubic between the points of a periodic grid.

    Slopes at the points are those of periodic cubic splines along φ and along ψ; the mixed
    derivative is that of a spline along φ through the slopes along ψ (MacKerell, Feig, Brooks,
    J. Comput. Chem. 25, 1400, 2004).

    Parameters
    ----------
    atoms
        Indices, shape (terms, 8): four of φ, then four of ψ.
    kind
        Which map a term takes, shape (terms,).
    maps
        In eV, shape (size, size) each, rows along φ; the points are at multiples of 2π/size from 0.
    """

    def __init__(self, atoms: np.ndarray, kind: np.ndarray, maps: list[np.ndarray]):
        super().__init__(np.concatenate([atoms[:, :4], atoms[:, 4:]]))
        tables = [np.zeros((0, 4, 4)), *(bicubic(values) for values in maps)]
        sizes = np.array([len(values) for values in maps], int)
        starts = np.cumsum(sizes**2) - sizes**2
        self.register_exact("patches", torch.from_numpy(np.concatenate(tables)))
        self.register_buffer("size", torch.from_numpy(sizes[kind])[:, None])
        self.register_buffer("start", torch.from_numpy(starts[kind])[:, None])

    def forward(self, positions: Tensor) -> Tensor:
        """Return the energy in eV, shape (B,)."""
        cosine, sine = dihedral(*self.bonds(positions))
        turns = torch.atan2(sine, cosine) / (2 * torch.pi)
        turns = turns.unflatten(0, (2, len(self.size)))
        place = (turns - turns.detach().floor()) * self.size
        # A turn of -1e-17 is rounded to a whole one; what isn't a number must find a cell too.
        cell = place.detach().long().clamp(min=0).minimum(self.size - 1)
        row, column = cell.unbind(0)
        t, u = (place - cell).unbind(0)
        patch = self.patches[self.start + row * self.size + column]  # (terms, B, 4, 4)
        t, u = (torch.stack((torch.ones_like(x), x, x * x, x * x * x), -1) for x in (t, u))
        return (patch * t.unsqueeze(-1) * u.unsqueeze(-2)).sum((0, 2, 3))


def bicubic(values: np.ndarray) -> np.ndarray:
    """Return coefficients c of the patches, Σ c[k, l] tᵏ uˡ with t, u in [0, 1] across a patch.

    Parameters
    ----------
    values
        At the points of a periodic grid, shape (size, size).

    Returns
    -------
    numpy.ndarray
        Shape (size², 4, 4): patches row by row, each starting at the point of its number.
    """
    along = _slopes(values)
    across = _slopes(values.T).T
    mixed = _slopes(across)
    data = np.empty((*values.shape, 4, 4))
    for a in (0, 1):
        for b in (0, 1):
            for p, q, f in ((0, 0, values), (2, 0, along), (0, 2, across), (2, 2, mixed)):
                data[..., p + a, q + b] = np.roll(f, (-a, -b), (0, 1))
    return (_HERMITE @ data @ _HERMITE.T).reshape(-1, 4, 4)


def _slopes(values: np.ndarray) -> np.ndarray:
    """Differentiate along the first dimension by a periodic cubic spline, per step of the grid."""
    size = len(values)
    closed = np.concatenate([values, values[:1]])
    return CubicSpline(np.arange(size + 1), closed, bc_type="periodic")(np.arange(size), 1)
