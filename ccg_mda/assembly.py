"""How the atoms of a bead meet its position: fragments, their centres and their shifts.

Of the atoms of a bead, those of its fragment T are shifted as one body such that ``Σ w x = s``. The
weighted centre of T must lie at ``c = (s - Σ_rest w x) / W``, ``W = Σ_T w``; T is built around its
root at c, then shifted by ``c - Σ_T w x / W``. The map from the shift to s has the Jacobian W³.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from ccg_ase.mapping import CGMap
from ccg_ase.torsion_map import TorsionMap

from .placement import Placement


class Assembly(nn.Module):
    """The linear algebra of ``M x = s`` for a placement, and the points that it goes through.

    Parameters
    ----------
    cg_map, placement
        Where s are torsions there is nothing to meet: points are the atoms, the first at zero.

    Attributes
    ----------
    n_beads
        Number of beads, 0 where s are torsions.
    log_volume
        ``Σ 3 ln W`` over beads.
    opening, closing
        Generation before which the root of each fragment is put at its centre, and after which the
        fragment is shifted; -1 where there is nothing to do. Shape (n_beads,).
    """

    def __init__(self, cg_map: CGMap | TorsionMap, placement: Placement) -> None:
        super().__init__()
        n_beads, lone = cg_map.n_beads, np.zeros(0, dtype=bool)
        bead, atom, weights = *(np.zeros(0, dtype=int),) * 2, np.zeros(0)
        if isinstance(cg_map, CGMap):
            bead, atom, weights = cg_map.bead_index, cg_map.atom_index, cg_map.weights
            lone = cg_map.single
        self.n_beads, self.n_atoms = n_beads, cg_map.n_atoms
        fragment, roots = placement.fragment, placement.roots[:n_beads]
        self._fragments = bool((fragment >= 0).any())
        inside = (fragment[atom] == bead) | (roots[bead] == atom)
        share = np.bincount(bead[inside], weights[inside], minlength=n_beads)
        scaled = weights / share[bead]
        self.log_volume = float(3.0 * np.log(share).sum())
        self.opening = np.where(lone, -1, placement.start[:n_beads])
        self.closing = np.full(n_beads, -1)
        moves_with = fragment[placement.atoms]
        moving = moves_with >= 0
        np.maximum.at(self.closing, moves_with[moving], placement.generation[moving])
        index = {
            "lone": np.flatnonzero(lone),
            "roots": roots,
            "point_of_root": n_beads + roots + self.n_atoms * (fragment[roots] >= 0),
            "shifted": np.flatnonzero(fragment >= 0),
            "shifted_by": fragment[fragment >= 0],
            "share": share,
            "rest_bead": bead[~inside],
            "rest_atom": atom[~inside],
            "rest_weight": scaled[~inside],
            "branch_bead": bead[inside],
            "branch_atom": atom[inside],
            "branch_weight": scaled[inside],
        }
        for name, value in index.items():
            self.register_buffer(name, torch.as_tensor(value), persistent=False)

    def points(self, coarse: Tensor, positions: Tensor) -> Tensor:
        """Return all points of a placement, (batch, n_points, 3), of atoms at their places."""
        if not self.n_beads:
            return positions
        parts = [coarse, positions]
        if self._fragments:
            shift = positions[:, self.roots] - self._centres(coarse, positions)
            moved = positions[:, self.shifted] - shift[:, self.shifted_by]
            parts.append(positions.index_copy(1, self.shifted, moved))
        return torch.cat(parts, 1)

    def first_points(self, coarse: Tensor) -> Tensor:
        """Return all points, zero but for beads and the atoms that are beads."""
        n = self.n_atoms * (1 + self._fragments)
        zeros = coarse.new_zeros(len(coarse), n, 3)
        if not self.n_beads:
            return zeros
        points = torch.cat([coarse, zeros], 1)
        return points.index_copy(1, self.point_of_root[self.lone], coarse[:, self.lone])

    def open(self, points: Tensor, beads: Tensor, opening: Tensor) -> Tensor:
        """Put the roots of fragments where their centres must lie."""
        centres = self._centres(beads, self.atoms(points))[:, opening]
        return points.index_copy(1, self.point_of_root[opening], centres)

    def close(self, points: Tensor, beads: Tensor, closing: Tensor) -> Tensor:
        """Shift fragments such that their beads are where they must be."""
        built = points[:, self.n_beads + self.n_atoms :]
        shifts = self._centres(beads, self.atoms(points)) - self._sum(built, "branch")
        moved = torch.isin(self.shifted_by, closing)
        atoms, by = self.shifted[moved], self.shifted_by[moved]
        return points.index_copy(1, self.n_beads + atoms, built[:, atoms] + shifts[:, by])

    def atoms(self, points: Tensor) -> Tensor:
        """Return the atoms among the points, (batch, n_atoms, 3)."""
        return points[:, self.n_beads : self.n_beads + self.n_atoms]

    def _sum(self, atoms: Tensor, which: str) -> Tensor:
        names = (f"{which}_{name}" for name in ("bead", "atom", "weight"))
        bead, atom, weight = (getattr(self, name) for name in names)
        sums = atoms.new_zeros(len(atoms), self.n_beads, 3)
        return sums.index_add(1, bead, atoms[:, atom] * weight[:, None])

    def _centres(self, beads: Tensor, atoms: Tensor) -> Tensor:
        """Return c of every bead, (batch, n_beads, 3); right where all other atoms are placed."""
        centres = beads / self.share[:, None]
        return centres - self._sum(atoms, "rest") if len(self.rest_bead) else centres


class Whole(nn.Module):
    """Makes the molecules of a periodic box whole: bonded beads next to one another."""

    def __init__(self, cg_map: CGMap) -> None:
        super().__init__()
        neighbours, seen = cg_map.beads.neighbours(), np.zeros(cg_map.n_beads, dtype=bool)
        firsts = np.unique(cg_map.beads.molecules, return_index=True)[1]
        seen[firsts] = True
        level, self.levels = firsts.tolist(), []
        while level:
            pairs = []
            for parent in level:
                for child in neighbours[parent]:
                    if not seen[child]:
                        seen[child] = True
                        pairs.append((child, parent))
            if pairs:
                self.levels.append(torch.tensor(pairs).T)
            level = [child for child, _ in pairs]

    def forward(self, beads: Tensor, box: Tensor) -> Tensor:
        """Move beads (..., n_beads, 3) by cell vectors (rows of ``box`` (..., 3, 3)) in Å."""
        for child, parent in self.levels:
            near = beads[..., parent, :]
            apart = minimum_image(beads[..., child, :] - near, box)
            beads = beads.index_copy(-2, child, near + apart)
        return beads


def minimum_image(vectors: Tensor, box: Tensor) -> Tensor:
    """Return vectors (..., n, 3) less the nearest lattice vector of cells (..., 3, 3)."""
    turns = torch.round(vectors.detach() @ torch.linalg.inv(box))
    return vectors - turns @ box
