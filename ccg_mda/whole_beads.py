"""Molecules made whole: atoms of one bead that the box has cut apart come side by side again."""

from __future__ import annotations

import numpy as np
from MDAnalysis.lib.mdamath import triclinic_vectors
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components, depth_first_order, minimum_spanning_tree

from ccg_ase.mapping import CGMap

_LONGEST_BOND = 0.4  # box lengths; at 0.5 the nearest image is a toss-up
_WIDEST_BEAD = 0.5  # box lengths, of a bead of several molecules


def periodic_cell(dimensions: np.ndarray) -> np.ndarray:
    """Return the vectors of a box (6,), in Å and degrees, as rows, (3, 3) float64 in Å.

    Raises
    ------
    ValueError
        If it has no volume.
    """
    with np.errstate(invalid="ignore"):
        cell = triclinic_vectors(dimensions, dtype=np.float64)
    if np.linalg.det(cell) <= 0:
        raise ValueError(f"{dimensions} is no periodic box (Å, degrees)")
    return cell


class WholeBeads:
    """Choose the periodic images of atoms so that every bead is in one piece.

    Atoms are walked through along bonds, each put at its image nearest to the one before, so that
    a bead may be larger than half the box. Bonds within beads come first: a molecule that is
    bonded to its own image, as a sheet or a crystal is, does no harm unless a bead is. Molecules
    that share a bead, like the four waters of one Martini bead, are put next to the bead's first
    atom.

    Parameters
    ----------
    cg_map
        Says which atoms share a bead, and what is bonded.
    """

    def __init__(self, cg_map: CGMap):
        n, bead, atom = cg_map.n_atoms, cg_map.bead_index, cg_map.atom_index
        self._cg_map = cg_map
        self._starts = np.searchsorted(bead, np.arange(cg_map.n_beads))
        first = atom[self._starts][bead]
        bonds = cg_map.atoms.bonds
        inside, in_pieces = _bonds_inside(cg_map)
        # Beads in pieces rely on bonds outside them, which then have to make sense, too.
        self._checked = bonds if in_pieces else bonds[inside]
        molecules = cg_map.atoms.molecules
        strangers = molecules[atom] != molecules[first]
        self._mixed = np.bincount(bead, strangers) > 0
        root = np.full(n, n)  # one more node, from which the walk through each molecule starts
        edges = [bonds[inside], bonds[~inside], np.stack([first, atom], 1)[strangers]]
        edges.append(np.stack([root, np.arange(n)], 1))
        tree = minimum_spanning_tree(_graph(edges, n + 1))
        self._order, before = depth_first_order(tree, n, directed=False)
        self._before = np.where(before == n, np.arange(n + 1), before)[self._order[1:]]
        self._order = self._order[1:]
        self._ends = _ends(self._order, self._before)

    def __call__(self, positions: np.ndarray, dimensions: np.ndarray) -> np.ndarray:
        """Return positions at other images, each bead whole.

        Parameters
        ----------
        positions
            Atoms in Å, float64, shape (n_atoms, 3).
        dimensions
            Lengths and angles of the box in Å and degrees, shape (6,).

        Raises
        ------
        ValueError
            If the box has no volume, or is too small to tell which images belong together.
        """
        cell = periodic_cell(dimensions)
        scaled = positions @ np.linalg.inv(cell)
        steps = -np.round(scaled[self._order] - scaled[self._before])
        # Each step moves all atoms that the walk reaches through it: a sum along the walk, less
        # the steps into branches that it has left.
        images = np.empty_like(scaled)
        images[self._order] = (steps - self._ends @ steps).cumsum(axis=0)
        self._check(scaled + images)
        return positions + images @ cell

    def _check(self, scaled: np.ndarray) -> None:
        topology, beads = self._cg_map.atoms, self._cg_map.beads
        i, j = self._checked.T
        length = np.abs(scaled[i] - scaled[j]).max(axis=1)
        if (length > _LONGEST_BOND).any():
            worst = int(np.argmax(length))
            names = " and ".join(f"{a} ({topology.names[a]})" for a in self._checked[worst])
            raise ValueError(
                f"the bonded atoms {names} are {length[worst]:.2f} box lengths apart: the box is "
                "too small, not in Å, or a molecule is bonded to its own image; unwrap the "
                "trajectory and remove the box before coarse-graining"
            )
        inside = scaled[self._cg_map.atom_index]
        width = np.maximum.reduceat(inside, self._starts) - np.minimum.reduceat(
            inside, self._starts
        )
        wide = self._mixed & (width.max(axis=1) > _WIDEST_BEAD)
        if wide.any():
            bead = int(np.argmax(wide))
            raise ValueError(
                f"bead {bead} ({beads.names[bead]}) holds several molecules that lie "
                f"{width[bead].max():.2f} box lengths apart, too far to tell which images belong "
                "together; use a larger box, or remove it and make beads whole before"
            )


def _bonds_inside(cg_map: CGMap) -> tuple[np.ndarray, bool]:
    """Tell which bonds lie within a bead, (m,), and whether any bead is in pieces without more.

    In pieces is a bead whose atoms aren't connected by bonds within it.
    """
    held, bonds = cg_map.matrix.tocsc(), cg_map.atoms.bonds
    both = held[:, bonds[:, 0]].multiply(held[:, bonds[:, 1]]).tocoo()
    inside = np.zeros(len(bonds), bool)
    inside[both.col] = True
    # A node for each atom in each bead, sorted as the entries of the map are.
    n, m = cg_map.n_atoms, len(cg_map.weights)
    node = cg_map.bead_index * n + cg_map.atom_index
    ends = np.searchsorted(node, both.row[:, None] * n + bonds[both.col])
    graph = coo_array((np.ones(len(ends)), tuple(ends.T)), shape=(m, m))
    pieces = connected_components(graph, directed=False)[0]
    return inside, pieces > cg_map.n_beads


def _graph(edges: list[np.ndarray], n: int) -> csr_array:
    """Return the graph of n nodes whose edges weigh the more the later they are listed."""
    weight = np.repeat(np.arange(1, len(edges) + 1), [len(pairs) for pairs in edges])
    pairs = np.sort(np.concatenate(edges), axis=1)
    pairs, first = np.unique(pairs, axis=0, return_index=True)
    return coo_array((weight[first], tuple(pairs.T)), shape=(n, n)).tocsr()


def _ends(order: np.ndarray, before: np.ndarray) -> csr_array:
    """Return which branches end before each place of a depth-first walk, (n, n).

    Entry (k, j) is 1 if the branch that begins at place j ends right before place k.
    """
    n = len(order)
    place = np.empty(n, int)
    place[order] = np.arange(n)
    size = np.ones(n, int)
    for k in range(n - 1, -1, -1):
        parent = place[before[k]]
        if parent != k:
            size[parent] += size[k]
    end = np.arange(n) + size
    inner = end < n
    return coo_array((np.ones(inner.sum()), (end[inner], np.flatnonzero(inner))), (n, n)).tocsr()
