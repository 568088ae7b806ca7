"""Restraints on beads: flat-bottomed harmonic wells of distances, angles, dihedrals, places.

Each is a module from positions (R, n, 3) to energies (R,), so that autograd gives its forces and
several add up. A centre may differ by replica: one batch then is a set of umbrella windows.
Positions are taken as they are, never wrapped into a box.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn


class HarmonicRestraint(nn.Module):
    """Base of all restraints: Σ ½ k max(|ξ(s) - ξ₀| - w, 0)² over m values ξ.

    Parameters
    ----------
    centre
        ξ₀ in Å, or in rad for angles: a number, or an array that broadcasts to (R, m): m values,
        or (R, 1) and (R, m) for another one in each replica.
    stiffness
        k in eV/Å², or eV/rad² for angles; same shapes.
    half_width
        w in the unit of ξ, same shapes: no force within it of the centre. 0 makes it harmonic.

    Raises
    ------
    ValueError
        If a number isn't finite, or `stiffness` or `half_width` is negative.
    """

    highest_bead = -1

    def __init__(
        self,
        centre: float | np.ndarray | Tensor,
        stiffness: float | np.ndarray | Tensor,
        half_width: float | np.ndarray | Tensor = 0.0,
    ):
        super().__init__()
        values = {"centre": centre, "stiffness": stiffness, "half_width": half_width}
        for name, value in values.items():
            value = torch.as_tensor(value, dtype=torch.float64).clone()
            if not value.isfinite().all():
                raise ValueError(f"{name} of a restraint must be finite, got {value.tolist()}")
            if name != "centre" and (value < 0).any():
                raise ValueError(f"{name} of a restraint can't be negative, got {value.tolist()}")
            self.register_buffer(name, value)

    def values(self, beads: Tensor) -> Tensor:
        """Return ξ, shape (R, m), of beads (R, n, 3) in Å."""
        raise NotImplementedError

    def deviations(self, beads: Tensor) -> Tensor:
        """Return ξ - ξ₀, shape (R, m)."""
        return self.values(beads) - self.centre

    def forward(self, beads: Tensor) -> Tensor:
        """Return energies in eV, shape (R,), of beads (R, n, 3) in Å."""
        if self.highest_bead >= beads.shape[-2]:
            raise ValueError(
                f"a {type(self).__name__} holds bead {self.highest_bead}, but there are "
                f"{beads.shape[-2]} beads, counted from 0"
            )
        outside = (self.deviations(beads).abs() - self.half_width).clamp(min=0)
        return (0.5 * self.stiffness * outside**2).sum(-1)

    def extra_repr(self) -> str:
        """List the parameters."""
        return ", ".join(f"{name}={value.tolist()}" for name, value in self.named_buffers())


class _SiteRestraint(HarmonicRestraint):
    """Base of restraints between fixed numbers of beads."""

    n_sites: int

    def __init__(
        self,
        sites: Sequence[Sequence[int]],
        centre: float | np.ndarray | Tensor,
        stiffness: float | np.ndarray | Tensor,
        half_width: float | np.ndarray | Tensor = 0.0,
    ):
        super().__init__(centre, stiffness, half_width)
        sites = np.atleast_2d(np.asarray(sites, dtype=int))
        if sites.ndim != 2 or sites.shape[1] != self.n_sites:
            raise ValueError(
                f"{type(self).__name__} takes {self.n_sites} beads per value, shape (m, "
                f"{self.n_sites}), got {sites.shape}"
            )
        self.highest_bead = _highest(sites)
        self.register_buffer("sites", torch.from_numpy(sites))

    def _vectors(self, beads: Tensor) -> Sequence[Tensor]:
        """Return vectors in Å along each row of sites, each (R, m, 3)."""
        return beads[:, self.sites].diff(dim=2).unbind(2)


class DistanceRestraint(_SiteRestraint):
    """Distances of m pairs of beads in Å.

    >>> DistanceRestraint([0, 9], centre=10.0, stiffness=0.1)
    DistanceRestraint(centre=10.0, stiffness=0.1, half_width=0.0, sites=[[0, 9]])

    Parameters
    ----------
    sites
        Beads, shape (m, 2) or (2,).
    centre, stiffness, half_width
        In Å and eV/Å², see `HarmonicRestraint`.
    """

    n_sites = 2

    def values(self, beads: Tensor) -> Tensor:
        """Return distances in Å, shape (R, m)."""
        (vector,) = self._vectors(beads)
        return torch.linalg.vector_norm(vector, dim=-1)


class AngleRestraint(_SiteRestraint):
    """Angles at the middle one of m triples of beads in rad; of no use at 0 and π.

    Parameters
    ----------
    sites
        Beads, shape (m, 3) or (3,).
    centre, stiffness, half_width
        In rad and eV/rad², see `HarmonicRestraint`.
    """

    n_sites = 3

    def values(self, beads: Tensor) -> Tensor:
        """Return angles in rad, shape (R, m)."""
        to_middle, from_middle = self._vectors(beads)
        normal = torch.linalg.cross(to_middle, from_middle)
        # atan2 keeps its digits near 0 and π, where the arc cosine loses them.
        return torch.atan2(
            torch.linalg.vector_norm(normal, dim=-1), -(to_middle * from_middle).sum(-1)
        )


class DihedralRestraint(_SiteRestraint):
    """Dihedrals of m quadruples of beads in rad, IUPAC sign; the difference is periodic.

    Parameters
    ----------
    sites
        Beads, shape (m, 4) or (4,).
    centre, stiffness, half_width
        In rad and eV/rad², see `HarmonicRestraint`.
    """

    n_sites = 4

    def values(self, beads: Tensor) -> Tensor:
        """Return dihedrals in rad in (-π, π], shape (R, m)."""
        first, middle, last = self._vectors(beads)
        before, after = torch.linalg.cross(first, middle), torch.linalg.cross(middle, last)
        length = torch.linalg.vector_norm(middle, dim=-1)
        return torch.atan2(length * (first * after).sum(-1), (before * after).sum(-1))

    def deviations(self, beads: Tensor) -> Tensor:
        """Return ξ - ξ₀ in [-π, π), shape (R, m)."""
        return (super().deviations(beads) + math.pi).remainder(2 * math.pi) - math.pi


class PositionRestraint(HarmonicRestraint):
    """Distances in Å of m beads from their places in a reference.

    Parameters
    ----------
    beads
        The restrained ones, shape (m,).
    reference
        Their places in Å, shape (m, 3), or (R, m, 3) for others in each replica.
    stiffness, half_width
        In eV/Å² and Å, see `HarmonicRestraint`.
    """

    def __init__(
        self,
        beads: Sequence[int],
        reference: np.ndarray | Tensor,
        stiffness: float | np.ndarray | Tensor,
        half_width: float | np.ndarray | Tensor = 0.0,
    ):
        super().__init__(0.0, stiffness, half_width)
        chosen = np.asarray(beads, dtype=int)
        self.highest_bead = _highest(chosen[None])
        reference = torch.as_tensor(reference, dtype=torch.float64).clone()
        if chosen.ndim != 1 or tuple(reference.shape[-2:]) != (len(chosen), 3):
            raise ValueError(
                f"reference must have shape (m, 3) for m = {len(chosen)} beads, "
                f"got {tuple(reference.shape)}"
            )
        self.register_buffer("beads", torch.from_numpy(chosen))
        self.register_buffer("reference", reference)

    def values(self, beads: Tensor) -> Tensor:
        """Return distances in Å from the reference, shape (R, m)."""
        return torch.linalg.vector_norm(beads[:, self.beads] - self.reference, dim=-1)


class GyrationRestraint(HarmonicRestraint):
    """Radius of gyration in Å, √(Σ m |s - s_com|² / Σ m), of chosen beads.

    Parameters
    ----------
    beads
        Which ones, at least two.
    masses
        Their masses in Da, same length; equal ones give the geometric radius.
    centre, stiffness, half_width
        In Å and eV/Å², see `HarmonicRestraint`.
    """

    def __init__(
        self,
        beads: Sequence[int],
        masses: Sequence[float] | np.ndarray,
        centre: float | np.ndarray | Tensor,
        stiffness: float | np.ndarray | Tensor,
        half_width: float | np.ndarray | Tensor = 0.0,
    ):
        super().__init__(centre, stiffness, half_width)
        chosen, masses = np.asarray(beads, dtype=int), np.asarray(masses, dtype=float)
        self.highest_bead = _highest(chosen[None])
        if len(chosen) < 2 or masses.shape != chosen.shape or not (masses > 0).all():
            raise ValueError(
                f"GyrationRestraint takes two beads or more, each with a positive mass; got "
                f"{len(chosen)} beads and masses {masses.tolist()}"
            )
        self.register_buffer("beads", torch.from_numpy(chosen))
        self.register_buffer("weights", torch.from_numpy(masses / masses.sum()))

    def values(self, beads: Tensor) -> Tensor:
        """Return radii of gyration in Å, shape (R, 1)."""
        chosen, weights = beads[:, self.beads], self.weights[:, None]
        arms = (chosen - (weights * chosen).sum(1, keepdim=True)) * weights.sqrt()
        return torch.linalg.vector_norm(arms, dim=(1, 2))[:, None]


def _highest(sites: np.ndarray) -> int:
    """Return the highest of bead indices (m, k); refuse negative ones and twice one in a row."""
    if (sites < 0).any() or any(len(set(row)) < len(row) for row in sites.tolist()):
        raise ValueError(f"a restraint needs different beads, counted from 0, got {sites.tolist()}")
    return int(sites.max(initial=-1))
