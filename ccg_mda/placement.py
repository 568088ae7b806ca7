r"""Anchored internal coordinates: where each atom is placed, from which references, in which order.

Every atom that is not a bead is placed by a bond length r, an angle θ and a dihedral φ against
three points that are beads or atoms placed earlier::

    p3            x = p1 + r (cos θ e1 + sin θ (cos φ e2 + sin φ e3))
      \
       p2 - p1    e1 = unit(p2 - p1),  e3 = unit(e1 × (p3 - p1)),  e2 = e3 × e1
              \
               x

The volume element is ``dx = r² sin θ dr dθ dφ``. Where p1 already has two placed neighbours, both
are references, so that φ is a stiff improper dihedral whose sign carries the chirality.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ccg_ase.mapping import CGMap


@dataclass(frozen=True)
class Placement:
    """The order in which atoms are placed, and their references, fixed by topology and map.

    Points are numbered beads first (0 ... n_beads - 1), then placed atoms in placement order.

    Attributes
    ----------
    atoms
        Atom index of every placed atom, in order, shape (n_placed,).
    references
        Points p1, p2, p3 of every placed atom, shape (n_placed, 3).
    proper
        True where φ is a proper torsion about p1-p2: a candidate for free rotation.
    multiplicity
        Symmetry number of that rotation (3 for a methyl group), else 1; shape (n_placed,).
    point_of_atom
        Point number of every atom of the molecule, shape (n_atoms,).
    rotor_groups
        Atom indices of identical atoms that a rotation permutes, each in its rotational order.
    """

    atoms: np.ndarray
    references: np.ndarray
    proper: np.ndarray
    multiplicity: np.ndarray
    point_of_atom: np.ndarray
    rotor_groups: tuple[tuple[int, ...], ...]

    @classmethod
    def from_map(cls, cg_map: CGMap) -> Placement:
        """Derive the placement of a slice map.

        Raises
        ------
        NotImplementedError
            If a bead is not an atom.
        ValueError
            If atoms cannot be reached through bonds, or fewer than three points fix the frame.
        """
        if cg_map.kind != "slice":
            raise NotImplementedError(
                f"backmapping from a '{cg_map.kind}' map is not built yet: "
                "choose beads that are single atoms (a slice map)"
            )
        if cg_map.n_beads < 3:
            raise ValueError(
                f"the map has {cg_map.n_beads} bead(s); placing atoms needs at least three beads "
                "to fix a frame: add beads to the mapping"
            )
        neighbours = cg_map.atoms.neighbours()
        order = _placement_order(cg_map, neighbours)
        point = {int(atom): k for k, atom in enumerate(cg_map.bead_atoms)}
        hops = cg_map.atoms.hops()
        groups = _rotor_groups(cg_map, neighbours)
        references, proper, multiplicity = [], [], []
        for atom in order:
            p1, p2, p3 = _references(atom, point, neighbours, hops, cg_map)
            references.append([point[p] for p in (p1, p2, p3)])
            proper.append(p3 not in neighbours[p1])
            leading = proper[-1] and any(atom in g for g in groups)
            multiplicity.append(3 if leading else 1)
            point[atom] = len(point)
        return cls(
            atoms=np.array(order, dtype=int),
            references=np.array(references, dtype=int).reshape(-1, 3),
            proper=np.array(proper, dtype=bool),
            multiplicity=np.array(multiplicity, dtype=int),
            point_of_atom=np.array([point[i] for i in range(cg_map.n_atoms)]),
            rotor_groups=groups,
        )

    def table(self, cg_map: CGMap) -> list[dict[str, str]]:
        """Return one printable row per placed atom: its name and its three reference names."""
        atom_of_point = np.argsort(self.point_of_atom)
        topology = cg_map.atoms

        def label(atom: int) -> str:
            return f"{topology.resnames[atom]}{topology.resids[atom]}:{topology.names[atom]}"

        rows = []
        for k, atom in enumerate(self.atoms):
            p1, p2, p3 = (label(atom_of_point[p]) for p in self.references[k])
            kind = "torsion" if self.proper[k] else "improper"
            rows.append(
                {"atom": label(atom), "bond": p1, "angle": p2, "dihedral": p3, "kind": kind}
            )
        return rows


def _placement_order(cg_map: CGMap, neighbours: list[list[int]]) -> list[int]:
    """Order heavy atoms before hydrogens, each after an atom that it is bonded to."""
    heavy = [element != "H" for element in cg_map.atoms.elements]
    placed = set(cg_map.bead_atoms.tolist())
    order: list[int] = []
    while len(placed) < cg_map.n_atoms:
        reachable = [
            i for i in range(cg_map.n_atoms) if i not in placed and placed & set(neighbours[i])
        ]
        if not reachable:
            missing = sorted(set(range(cg_map.n_atoms)) - placed)
            names = [cg_map.atoms.names[i] for i in missing[:5]]
            raise ValueError(
                f"{len(missing)} atom(s) are not connected to any bead through bonds, e.g. "
                f"{names}: add the missing bonds to the topology or beads to the mapping"
            )
        chosen = min(reachable, key=lambda i: (not heavy[i], i))
        placed.add(chosen)
        order.append(chosen)
    return order


def _references(
    atom: int, point: dict[int, int], neighbours: list[list[int]], hops: np.ndarray, cg_map: CGMap
) -> tuple[int, int, int]:
    """Choose p1, p2, p3: bonded and stiff first, beads before atoms, then the nearest by bonds."""
    is_bead = set(cg_map.bead_atoms.tolist())

    def rank(near: int):
        return lambda j: (hops[near, j], j not in is_bead, point[j])

    p1 = min((j for j in neighbours[atom] if j in point), key=rank(atom))
    p2 = min((j for j in point if j != p1), key=rank(p1))
    # After p2, another neighbour of p1 (improper), else a neighbour of p2 (proper torsion).
    p3 = min(
        (j for j in point if j not in (p1, p2)),
        key=lambda j: (min(hops[p1, j], hops[p2, j]), hops[p1, j], j not in is_bead, point[j]),
    )
    return p1, p2, p3


def _rotor_groups(cg_map: CGMap, neighbours: list[list[int]]) -> tuple[tuple[int, ...], ...]:
    """Return triples of identical terminal atoms on one parent (methyl-like groups)."""
    beads = set(cg_map.bead_atoms.tolist())
    groups = []
    for bonded in neighbours:
        ends = [j for j in bonded if len(neighbours[j]) == 1 and j not in beads]
        elements = {cg_map.atoms.elements[j] for j in ends}
        if len(bonded) == 4 and len(ends) == 3 and len(elements) == 1:
            groups.append(tuple(sorted(ends)))
    return tuple(groups)


def local_frames(points: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """Return origins (..., n, 3) and right-handed frames (..., n, 3, 3) with rows e1, e2, e3."""
    p1, p2, p3 = (points[..., references[:, k], :] for k in range(3))
    e1 = torch.nn.functional.normalize(p2 - p1, dim=-1)
    e3 = torch.nn.functional.normalize(torch.linalg.cross(e1, p3 - p1), dim=-1)
    e2 = torch.linalg.cross(e3, e1)
    return p1, torch.stack([e1, e2, e3], dim=-2)


def place(origin: Tensor, frame: Tensor, r: Tensor, theta: Tensor, phi: Tensor) -> Tensor:
    """Return the position (..., n, 3) with internal coordinates ``r, θ, φ`` of shape (..., n)."""
    sine = torch.sin(theta)
    local = torch.stack([torch.cos(theta), sine * torch.cos(phi), sine * torch.sin(phi)], -1)
    return origin + r[..., None] * torch.einsum("...k,...kc->...c", local, frame)


def measure(origin: Tensor, frame: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``r, θ, φ`` of a position; inverse of :func:`place`."""
    local = torch.einsum("...kc,...c->...k", frame, position - origin)
    x, y, z = local.unbind(-1)
    across = torch.sqrt(y * y + z * z)
    return torch.linalg.norm(local, dim=-1), torch.atan2(across, x), torch.atan2(z, y)
