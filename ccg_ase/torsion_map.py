"""TorsionMap: torsions of a molecule as its coarse variables, in place of beads."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch

from ccg_ase.topology import Topology

Array = TypeVar("Array", np.ndarray, torch.Tensor)


def dihedral_angles(positions: Array, quadruples: np.ndarray) -> Array:
    """Return the dihedrals i-j-k-l, (..., m) in radians, with the IUPAC sign.

    Parameters
    ----------
    positions
        (..., n, 3) in Å.
    quadruples
        Indices i, j, k, l of sites, (m, 4).
    """
    x = torch.as_tensor(positions)
    a, b, c, d = (x[..., quadruples[:, k], :] for k in range(4))
    axis = torch.nn.functional.normalize(c - b, dim=-1)
    first, last = torch.linalg.cross(a - b, axis), torch.linalg.cross(d - c, axis)
    sine = (torch.linalg.cross(first, last) * axis).sum(-1)
    angles = torch.atan2(sine, (first * last).sum(-1))
    return angles if isinstance(positions, torch.Tensor) else angles.numpy()


@dataclass(frozen=True, eq=False)
class TorsionMap:
    """Coarse variables s that are torsion angles; all other internal coordinates are fine ones.

    The free energy F(s) is then that of the density of these angles, with rigid motions left out.

    Parameters
    ----------
    atoms
        One molecule.
    torsions
        Four bonded atoms i-j-k-l of each torsion, shape (n_torsions, 4).
    names
        Name of each torsion.

    Raises
    ------
    ValueError
        If atoms of a torsion are out of range or not bonded in a row, two torsions turn about one
        bond, or there is more than one molecule.
    """

    atoms: Topology
    torsions: np.ndarray
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        torsions = np.array(self.torsions, int)
        if torsions.ndim != 2 or torsions.shape[1] != 4 or not len(torsions):
            raise ValueError(f"torsions must have shape (n, 4) with n > 0, got {torsions.shape}")
        if torsions.min() < 0 or torsions.max() >= len(self.atoms):
            raise ValueError(f"torsions name atoms outside 0..{len(self.atoms) - 1}")
        if self.atoms.molecules.max(initial=0) > 0:
            raise ValueError("torsions as coarse variables need a single molecule, all bonded")
        adjacency = self.atoms.adjacency
        for i, j, k, m in torsions.tolist():
            if not (adjacency[i, j] and adjacency[j, k] and adjacency[k, m]) or i == m:
                names = "-".join(self.atoms.names[a] for a in (i, j, k, m))
                raise ValueError(f"the atoms of torsion {names} are not bonded in a row")
        axes = np.sort(torsions[:, 1:3], axis=1)
        if len(np.unique(axes, axis=0)) < len(axes):
            raise ValueError("two torsions turn about the same bond; keep one of them")
        names = self.names or tuple(
            "-".join(self.atoms.names[a] for a in row) for row in torsions.tolist()
        )
        if len(names) != len(torsions):
            raise ValueError(f"{len(names)} names given for {len(torsions)} torsions")
        object.__setattr__(self, "torsions", torsions)
        object.__setattr__(self, "names", tuple(names))

    @property
    def n_atoms(self) -> int:
        """Number of atoms."""
        return len(self.atoms)

    @property
    def n_beads(self) -> int:
        """Number of beads: none."""
        return 0

    @property
    def coarse_shape(self) -> tuple[int, ...]:
        """Shape of the coarse variables of one frame, (n_torsions,)."""
        return (len(self.torsions),)

    def apply(self, positions: Array) -> Array:
        """Return the torsions in radians, (..., n_torsions), of positions (..., n_atoms, 3)."""
        if tuple(positions.shape[-2:]) != (self.n_atoms, 3):
            raise ValueError(
                f"expected shape (..., {self.n_atoms}, 3) for the atoms of this map, "
                f"got {tuple(positions.shape)}"
            )
        return dihedral_angles(positions, self.torsions)

    def difference(self, a: Array, b: Array) -> Array:
        """Return ``a - b`` of two sets of torsions, in [-π, π)."""
        return (a - b + torch.pi) % (2 * torch.pi) - torch.pi

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dictionary that `from_dict` reads back exactly."""
        return {
            "atoms": self.atoms.to_dict(),
            "torsions": self.torsions.tolist(),
            "names": list(self.names),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TorsionMap:
        """Build from the dictionary made by `to_dict`."""
        return cls(Topology.from_dict(values["atoms"]), values["torsions"], tuple(values["names"]))

    @cached_property
    def _fingerprint(self) -> str:
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def fingerprint(self) -> str:
        """Return a short hash of the whole content, equal for equal maps on any machine."""
        return self._fingerprint

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TorsionMap):
            return NotImplemented
        return self._fingerprint == other._fingerprint
