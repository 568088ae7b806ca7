"""Bead frames that no molecule can have: broken by a box, in a wrong unit, in too small a box."""

from __future__ import annotations

import numpy as np
from scipy.sparse.csgraph import dijkstra

from ccg_ase.mapping import CGMap

_LONGEST_A = 2.5  # more than chemical bonds between atoms of proteins, lipids or solvents
_CLOSEST_A = 0.5  # mean of bonded beads; less is nm
_LEAST_BOX_A = 3.0  # per chemical bond between bonded beads: twice their distance at most
_OF_BOX = 0.45  # box lengths between bonded beads; at 0.5 the nearest image is a toss-up


class BeadCheck:
    """Refuse frames in which bonded beads are farther apart, or closer, than they can be.

    Between the atoms of two bonded beads lie so many chemical bonds, which the topology tells, and
    within a bead of n atoms at most n - 1; a bond is shorter than 2.5 Å.

    Parameters
    ----------
    cg_map
        The map.
    """

    def __init__(self, cg_map: CGMap) -> None:
        self._names, atoms = cg_map.beads.names, cg_map.atoms
        ends = np.sort(cg_map.owner[atoms.bonds], axis=1)
        crossing = (ends[:, 0] >= 0) & (ends[:, 0] != ends[:, 1])
        to_bead = dijkstra(
            atoms.adjacency,
            directed=False,
            indices=np.unique(cg_map.atom_index),
            unweighted=True,
            min_only=True,
        )
        pairs, which = np.unique(ends[crossing], axis=0, return_inverse=True)
        between = np.full(len(pairs), np.inf)
        np.minimum.at(between, which, to_bead[atoms.bonds[crossing]].sum(axis=1) + 1)
        inside = np.bincount(cg_map.bead_index) - 1
        self._pairs = pairs.reshape(-1, 2)
        self._least_box = _LEAST_BOX_A * between.max(initial=0.0)
        self._limit = _LONGEST_A * (between + inside[self._pairs].sum(axis=1))

    def __call__(self, beads: np.ndarray, cell: np.ndarray | None) -> None:
        """Check one frame.

        Parameters
        ----------
        beads
            In Å, (n_beads, 3).
        cell
            Cell vectors as rows in Å, (3, 3), or None.

        Raises
        ------
        ValueError
            If a pair is too far apart, or all together too close, or the box is too small for them.
        """
        if not len(self._pairs):
            return
        apart = beads[self._pairs[:, 0]].astype(np.float64) - beads[self._pairs[:, 1]]
        if cell is not None:
            inverse = np.linalg.inv(cell)
            height = (1 / np.linalg.norm(inverse, axis=0)).min()
            scaled = apart @ inverse
            scaled -= np.round(scaled)
            apart = scaled @ cell
            share = np.abs(scaled).max(axis=1)
            if height < self._least_box or share.max() > _OF_BOX:
                raise ValueError(
                    f"the box, {height:.3g} Å at its narrowest, is too small to tell which images "
                    f"of bonded beads, {self._pair(share.argmax())}, belong together, or not in Å"
                )
        distance = np.linalg.norm(apart, axis=1)
        if (distance > self._limit).any():
            worst = int(np.argmax(distance / self._limit))
            cure = "give the frames their box" if cell is None else "check map, order and units"
            raise ValueError(
                f"bonded beads {self._pair(worst)} are {distance[worst]:.1f} Å apart, at most "
                f"{self._limit[worst]:.1f} Å are possible: the molecule is broken, or these are "
                f"other beads; {cure}, or make molecules whole with unwrap"
            )
        if distance.mean() < _CLOSEST_A:
            raise ValueError(
                f"bonded beads are {distance.mean():.2g} Å apart on average: positions are "
                "probably in nm; pass them in Å"
            )

    def _pair(self, k: int) -> str:
        return " and ".join(f"{bead} ({self._names[bead]})" for bead in self._pairs[k])
