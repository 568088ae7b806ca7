"""Molecules of a map that are alike: one small problem for all of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ccg_ase.mapping import CGMap

Constraints = Sequence[Sequence[int]] | np.ndarray
"""Groups of two or more atoms that rigid bonds join, e.g. pairs (m, 2)."""


@dataclass(frozen=True, eq=False)
class LikeMolecules:
    """Copies of one molecule with a atoms and b beads.

    Parameters
    ----------
    atoms, beads
        Their indices in the map, (copies, a) and (copies, b), in corresponding order.
    weights
        The entries of M within one molecule, (b, a).
    group
        Rigid group of each atom, (a,), from 0.
    """

    atoms: np.ndarray
    beads: np.ndarray
    weights: np.ndarray
    group: np.ndarray


def like_molecules(cg_map: CGMap, group: np.ndarray) -> Iterator[LikeMolecules]:
    """Yield the molecules that have beads, like ones together.

    A molecule is what bonds, rigid groups and beads join. Two are alike if they have the same atom
    types, bonds, rigid groups and beads in the same order of atoms.

    Parameters
    ----------
    cg_map
        The map.
    group
        Rigid group of each atom, (n_atoms,), see `rigid_groups`.
    """
    bonds, n = cg_map.atoms.bonds, cg_map.n_atoms
    molecule = _molecules(cg_map, group)
    cuts = np.arange(1, molecule.max() + 1)

    def per_molecule(label: np.ndarray, column: np.ndarray) -> list[np.ndarray]:
        """Cut a column into one piece per molecule, the order inside kept."""
        order = np.argsort(label, kind="stable")
        return np.split(column[order], np.searchsorted(label[order], cuts))

    atoms = per_molecule(molecule, np.arange(n))
    rank = np.empty(n, int)
    rank[np.concatenate(atoms)] = np.concatenate([np.arange(len(piece)) for piece in atoms])
    kinds = per_molecule(molecule, np.unique(cg_map.atoms.types, return_inverse=True)[1])
    groups = per_molecule(molecule, group)
    bonds = per_molecule(molecule[bonds[:, 0]], rank[bonds])
    entries = per_molecule(molecule[cg_map.atom_index], np.arange(len(cg_map.weights)))
    alike: dict[tuple[bytes, ...], list[LikeMolecules]] = {}
    for mine, kind, rigid, joined, entry in zip(atoms, kinds, groups, bonds, entries, strict=True):
        if not entry.size:
            continue
        # In the order of their first atoms, whatever order the map lists the beads in.
        beads, first, row = np.unique(
            cg_map.bead_index[entry], return_index=True, return_inverse=True
        )
        column = rank[cg_map.atom_index[entry]]
        order = np.argsort(column[first], kind="stable")
        weights = np.zeros((len(beads), len(mine)))
        weights[np.argsort(order)[row], column] = cg_map.weights[entry]
        rigid = np.unique(rigid, return_inverse=True)[1]
        parts = (kind, rigid, joined, np.round(weights, 12))
        one = LikeMolecules(mine, beads[order], weights, rigid)
        alike.setdefault(tuple(part.tobytes() for part in parts), []).append(one)
    for copies in alike.values():
        yield LikeMolecules(
            np.stack([one.atoms for one in copies]),
            np.stack([one.beads for one in copies]),
            copies[0].weights,
            copies[0].group,
        )


def rigid_groups(cg_map: CGMap, constraints: Constraints) -> np.ndarray:
    """Return the rigid group of each atom, (n_atoms,); a free atom is a group of its own.

    Raises
    ------
    ValueError
        If a constraint names no atom of the map.
    """
    pairs = [pair for members in constraints for pair in itertools.pairwise(members)]
    edges = np.array(pairs, int).reshape(-1, 2)
    if edges.size and not 0 <= edges.min() <= edges.max() < cg_map.n_atoms:
        raise ValueError(f"constraints name atoms outside 0..{cg_map.n_atoms - 1}")
    return _components(edges, cg_map.n_atoms)


def _molecules(cg_map: CGMap, group: np.ndarray) -> np.ndarray:
    """Molecule of each atom, (n_atoms,)."""
    in_bead = np.flatnonzero(np.diff(cg_map.bead_index) == 0)
    by_group = np.argsort(group, kind="stable")
    in_group = np.flatnonzero(np.diff(group[by_group]) == 0)
    chains = ((cg_map.atom_index, in_bead), (by_group, in_group))
    joined = [np.stack([atom[k], atom[k + 1]], 1) for atom, k in chains]
    return _components(np.concatenate([cg_map.atoms.bonds, *joined]), cg_map.n_atoms)


def _components(edges: np.ndarray, n: int) -> np.ndarray:
    """Label the connected component of each of n sites, (n,)."""
    graph = coo_array((np.ones(len(edges)), tuple(edges.T)), shape=(n, n))
    return connected_components(graph, directed=False)[1].astype(int)
