r"""Anchored internal coordinates: where each atom is placed, from which references, in which order.

Every atom but one per bead is placed by a bond length r, an angle θ and a dihedral φ against three
points that are beads or atoms placed earlier::

    p3            x = p1 + r (cos θ e1 + sin θ (cos φ e2 + sin φ e3))
      \
       p2 - p1    e1 = unit(p2 - p1),  e3 = unit(e1 × (p3 - p1)),  e2 = e3 × e1
              \
               x

The volume element is ``dx = r² sin θ dr dθ dφ``. Where p1 already has two placed neighbours, both
are references, so that φ is a stiff improper dihedral whose sign carries the chirality. An atom
beyond a linear group (a nitrile's N) is placed by Cartesian components in the same frame instead.

**Beads that are not atoms.** One *fragment* of every bead's atoms is built around its root at the
point where the centre of the fragment must lie, given the bead and its other atoms, and is then
shifted so that ``M x = s`` holds. It is the heaviest branch of the molecule within the bead: all
atoms, unless the bead consists of unbonded parts. Relative to the root that is a shear, so the
volume of the fibre {x : M x = s} is the product of the volumes of the atoms placed, times W⁻³, W
the weight of the fragment in the bead. A bead that is an atom is the fragment of that atom alone.

**Too few points.** Where a molecule has one or two points so far, the missing references are axes
of the laboratory, and the angles measured from them are uniform: the orientation of the molecule.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ccg_ase.mapping import CGMap
from ccg_ase.topology import Topology
from ccg_ase.torsion_map import TorsionMap


@dataclass(frozen=True)
class Placement:
    """The order in which atoms are placed, and their references, fixed by topology and map.

    *Points* are what references name: bead centres (0 ... n_beads - 1), then the atoms by index,
    then the atoms by index once more, as they lie before the fragment they belong to is shifted.

    Attributes
    ----------
    atoms
        Atom of every slot, in the order of placement, shape (n_slots,).
    references
        Points p1, p2, p3 of every slot, -1 for an axis of the laboratory, shape (n_slots, 3).
    generation
        Sampling pass of each slot; it may depend on earlier generations only. Shape (n_slots,).
    proper
        True where φ is a proper torsion about p1-p2.
    multiplicity
        Symmetry number of that rotation (3 for a methyl group), else 1; shape (n_slots,).
    linear
        True where the atom is placed by Cartesian components, shape (n_slots,).
    torsion
        Coarse torsion that φ is, else -1; shape (n_slots,).
    roots
        Atom at the root of each fragment: one per bead, or the first atom if s are torsions.
    fragment
        Fragment that each atom is shifted with, -1 for none; shape (n_atoms,).
    start
        Generation before which the root of each fragment is known.
    rotor_groups
        Atoms of identical kind that a rotation permutes, each in its rotational order.
    """

    atoms: np.ndarray
    references: np.ndarray
    generation: np.ndarray
    proper: np.ndarray
    multiplicity: np.ndarray
    linear: np.ndarray
    torsion: np.ndarray
    roots: np.ndarray
    fragment: np.ndarray
    start: np.ndarray
    rotor_groups: tuple[tuple[int, ...], ...]

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dictionary that `from_dict` reads back exactly."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Placement:
        """Build from the dictionary made by `to_dict`."""
        groups = tuple(tuple(group) for group in values["rotor_groups"])
        arrays = {k: np.asarray(v) for k, v in values.items() if k != "rotor_groups"}
        arrays["references"] = arrays["references"].reshape(-1, 3).astype(int)
        return cls(**arrays, rotor_groups=groups)

    @property
    def ready(self) -> np.ndarray:
        """Generation after which each atom is at its final place, shape (n_atoms,).

        It is one less than the first generation that may depend on the atom.
        """
        ready = np.full(len(self.fragment), -1)
        ready[self.atoms] = self.generation
        closing = self.start - 1
        inside = self.fragment >= 0
        np.maximum.at(closing, self.fragment[inside], ready[inside])
        ready[self.roots] = self.start - 1
        ready[inside] = closing[self.fragment[inside]]
        return ready

    def table(self, cg_map: CGMap | TorsionMap) -> list[dict[str, str]]:
        """Return one printable row per placed atom: its name and its three reference names."""
        topology, n_beads = cg_map.atoms, cg_map.n_beads

        def label(point: int) -> str:
            if point < 0:
                return "lab axis"
            if point < n_beads:
                return f"bead {cg_map.beads.names[point]}"
            return atom_label(topology, (point - n_beads) % len(topology))

        rows = []
        for k, atom in enumerate(self.atoms):
            p1, p2, p3 = (label(point) for point in self.references[k])
            kind = "torsion" if self.proper[k] else "improper"
            if self.torsion[k] >= 0:
                kind = f"given: {cg_map.names[self.torsion[k]]}"
            row = {"atom": atom_label(topology, atom), "bond": p1, "angle": p2, "dihedral": p3}
            row["kind"] = "cartesian" if self.linear[k] else kind
            row["generation"] = str(self.generation[k])
            fragment = self.fragment[atom]
            row["moves with"] = "" if fragment < 0 else f"bead {cg_map.beads.names[fragment]}"
            rows.append(row)
        return rows


def atom_label(topology: Topology, atom: int) -> str:
    """Return e.g. ``ALA2:CA``."""
    return f"{topology.resnames[atom]}{topology.resids[atom]}:{topology.names[atom]}"


def local_frames(points: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """Return origins (..., n, 3) and right-handed frames (..., n, 3, 3) with rows e1, e2, e3.

    Parameters
    ----------
    points
        Shape (..., n_points, 3).
    references
        Points p1, p2, p3 of n frames, shape (n, 3); -1 for an axis of the laboratory.
    """
    missing = (references < 0)[..., None]
    p1, p2, p3 = (points[..., references[:, k].clamp_min(0), :] for k in range(3))
    first, third = p2 - p1, p3 - p1
    if missing.any():
        lab_x = torch.tensor([1.0, 0.0, 0.0], dtype=points.dtype, device=points.device)
        first = torch.where(missing[:, 1], lab_x, first)
        third = torch.where(missing[:, 2], _perpendicular(first), third)
    e1 = torch.nn.functional.normalize(first, dim=-1)
    e3 = torch.nn.functional.normalize(torch.linalg.cross(e1, third), dim=-1)
    return p1, torch.stack([e1, torch.linalg.cross(e3, e1), e3], dim=-2)


def _perpendicular(axis: Tensor) -> Tensor:
    """Return a vector far from parallel to ``axis``: the laboratory axis of its least component."""
    least = axis.detach().abs().argmin(-1)
    return torch.nn.functional.one_hot(least, 3).to(axis)


def place(
    origin: Tensor, frame: Tensor, r: Tensor, theta: Tensor, phi: Tensor, linear: Tensor
) -> Tensor:
    """Return positions (..., n, 3) of coordinates ``r, θ, φ`` (..., n); Cartesian if ``linear``."""
    sine = torch.sin(theta)
    local = torch.stack(
        [r * torch.cos(theta), r * sine * torch.cos(phi), r * sine * torch.sin(phi)], -1
    )
    if linear.any():
        local = torch.where(linear[:, None], torch.stack([r, theta, phi], -1), local)
    return origin + torch.einsum("...k,...kc->...c", local, frame)


def measure(
    origin: Tensor, frame: Tensor, position: Tensor, linear: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``r, θ, φ`` of a position, or its components; inverse of :func:`place`."""
    local = torch.einsum("...kc,...c->...k", frame, position - origin)
    # A linear atom lies on the pole of the sphere: keep it out of the square root's gradient.
    x, y, z = torch.where(linear[:, None], 1.0, local).unbind(-1)
    across = torch.sqrt(y * y + z * z)
    r = torch.sqrt(x * x + y * y + z * z)
    polar = torch.stack([r, torch.atan2(across, x), torch.atan2(z, y)], -1)
    r, theta, phi = torch.where(linear[:, None], local, polar).unbind(-1)
    return r, theta, phi
