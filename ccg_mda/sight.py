"""What each placed atom's density may depend on: the blocks of a placement and their sources.

A *block* is what one query of the conditioner answers: the coordinates of one atom, or the φ alone
of an atom that rotates freely, ahead of its r and θ. A block sees beads within ``bead_hops`` bonds,
atoms of earlier generations within ``hops`` bonds, or the given torsions.

Weights are shared by *kind*: blocks of one residue and atom name with references of the same names
are of one kind, and a source is known by the names along the path of bonds that leads to it. Hence
identical residues share all weights, whatever their place in the chain. A *family* is the same
without the residue's name: with few frames of a large molecule, kinds of one family share all but
their constants.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import replace

import numpy as np

from ccg_ase.mapping import CGMap
from ccg_ase.topology import Topology
from ccg_ase.torsion_map import TorsionMap

from .placement import Placement


def enumerate_keys(keys: Sequence[Hashable]) -> np.ndarray:
    """Return a number for each key, by sorted order: equal keys share one."""
    table = {key: n for n, key in enumerate(sorted(set(keys), key=repr))}
    return np.array([table[key] for key in keys], dtype=int)


def distinct(topology: Topology) -> Topology:
    """Return a topology whose atoms of one residue all have names, hence types, of their own.

    Where a residue has several atoms of one name, they are numbered in order: without that, they
    would share what can't be shared, such as the dihedrals of two hydrogens of a methyl group.
    """
    residue = np.unique(
        [topology.molecules, topology.resids, enumerate_keys(topology.segids)],
        axis=1,
        return_inverse=True,
    )[1].reshape(-1)
    seen: Counter[tuple[int, str]] = Counter()
    number = []
    for key in zip(residue.tolist(), topology.names, strict=True):
        number.append(seen[key])
        seen[key] += 1
    ends = [f"#{k}" if k else "" for k in number]
    names = tuple(n + end for n, end in zip(topology.names, ends, strict=True))
    types = tuple(t + end for t, end in zip(topology.types, ends, strict=True))
    return replace(topology, names=names, types=types)


def slot_kinds(
    cg_map: CGMap | TorsionMap, placement: Placement, by_family: bool = False
) -> np.ndarray:
    """Return the kind of each slot, (n_slots,): its atom's type and the names of its references.

    Its family is the same by the atom's name.
    """
    n_beads, n = cg_map.n_beads, cg_map.n_atoms
    atoms = distinct(cg_map.atoms)

    def name(point: int) -> str:
        if 0 <= point < n_beads:
            return f"bead {cg_map.beads.names[point]}"
        return "" if point < 0 else atoms.names[(point - n_beads) % n]

    own = atoms.names if by_family else atoms.types
    keys = [
        (own[atom], *map(name, row), bool(placement.linear[k]))
        for k, (atom, row) in enumerate(
            zip(placement.atoms.tolist(), placement.references.tolist(), strict=True)
        )
    ]
    return enumerate_keys(keys)


class Blocks:
    """The queries of a placement: which slot and coordinates each block holds, and what it sees.

    Attributes
    ----------
    slot, circular
        Placement slot of each block, and whether it is a rotor's dihedral; shape (n_blocks,).
    generation
        Sampling pass of each block: a rotor's dihedral before the rest of its atom.
    kind, family
        Which blocks share constants, and which share all other weights: families, or kinds again;
        shape (n_blocks,).
    axes
        Components of the local frame that are more than a choice of axes: all three, or the first
        where p3 is an axis of the laboratory, or none; shape (n_blocks, 3).
    bead_source, bead_edge
        Bead and kind of edge of each source, padded with -1, shape (n_blocks, width).
    atom_source, atom_slot, atom_edge
        The same for atoms: point, slot (n_slots for the root of a fragment) and kind of edge.
    torsion_source, torsion_edge
        The same for given torsions.
    """

    def __init__(
        self,
        cg_map: CGMap | TorsionMap,
        placement: Placement,
        rotor: np.ndarray,
        hops: int,
        bead_hops: int,
        families: bool = False,
    ) -> None:
        twice = 1 + rotor.astype(int)
        self.slot = np.repeat(np.arange(len(rotor)), twice)
        first = np.r_[True, np.diff(self.slot) > 0] if len(self.slot) else np.zeros(0, bool)
        self.circular = first & rotor[self.slot]
        self.generation = 2 * placement.generation[self.slot] + ~self.circular
        missing = placement.references[self.slot] < 0
        self.axes = ~np.stack([missing[:, 1], missing[:, 2], missing[:, 2]], axis=1)
        self._find(cg_map, placement, hops, bead_hops, families)

    def _find(
        self,
        cg_map: CGMap | TorsionMap,
        placement: Placement,
        hops: int,
        bead_hops: int,
        families: bool,
    ) -> None:
        n, n_beads = cg_map.n_atoms, cg_map.n_beads
        near = distinct(cg_map.atoms).near(placement.atoms, max(hops, bead_hops if n_beads else 0))
        row, site = near.source, near.site
        slot_of_atom = np.full(n, len(placement.atoms))
        slot_of_atom[placement.atoms] = np.arange(len(placement.atoms))
        generation = np.append(placement.generation, -1)[slot_of_atom]
        own = placement.generation[row]
        fragment = placement.fragment
        home = fragment[placement.atoms][row]
        inside = (home >= 0) & (fragment[site] == home)
        is_root = slot_of_atom[site] == len(placement.atoms)
        known = np.where(inside & ~is_root, generation[site], placement.ready[site])
        known = np.where(inside & is_root, -1, known)
        bead_of_root = np.full(n, -1)
        bead_of_root[placement.roots[:n_beads]] = np.arange(n_beads)
        # The root of a bead that is a single atom is seen as the bead.
        lone = np.zeros(n, dtype=bool)
        if n_beads:
            lone[placement.roots] = cg_map.single
        earlier = (known < own) & (near.distance <= hops) & (near.distance > 0) & ~lone[site]
        to_bead = (bead_of_root[site] >= 0) & (near.distance <= bead_hops)

        # Blocks that see what the chain holds before or behind them are kinds of their own.
        owner = cg_map.owner if n_beads else np.zeros(n, dtype=int)
        side = np.sign(owner[site] - owner[placement.atoms[row]])
        sees = np.zeros((len(placement.atoms), 2), dtype=bool)
        np.logical_or.at(sees[:, 0], row[earlier], side[earlier] < 0)
        np.logical_or.at(sees[:, 1], row[earlier], side[earlier] > 0)

        def alike(of_slot: np.ndarray) -> np.ndarray:
            keys = np.column_stack([of_slot[self.slot], sees[self.slot], self.circular])
            return np.unique(keys, axis=0, return_inverse=True)[1].reshape(-1)

        self.kind = self.family = alike(slot_kinds(cg_map, placement))
        if families:
            self.family = alike(slot_kinds(cg_map, placement, by_family=True))

        points = n_beads + site + n * inside
        self.bead_source, self.bead_edge = self._gather(
            row, bead_of_root[site], near.relation, to_bead
        )
        self.atom_source, self.atom_edge = self._gather(row, points, near.relation, earlier)
        self.atom_slot, _ = self._gather(row, slot_of_atom[site], near.relation, earlier)
        n_torsions = 0 if n_beads else len(cg_map.torsions)
        every = np.tile(np.arange(n_torsions), len(placement.atoms))
        rows = np.repeat(np.arange(len(placement.atoms)), n_torsions)
        given = np.ones(len(every), dtype=bool)
        self.torsion_source, self.torsion_edge = self._gather(rows, every, every, given)

    def _gather(
        self, row: np.ndarray, source: np.ndarray, relation: np.ndarray, chosen: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Pad the chosen sources of every slot, repeat them by block, and number kinds of edges."""
        row, source, relation = row[chosen], source[chosen], relation[chosen]
        counts = np.bincount(row, minlength=self.slot.max(initial=-1) + 1)
        column = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        padded, relations = (
            np.full((len(counts), max(1, counts.max(initial=0))), -1) for _ in "ab"
        )
        padded[row, column], relations[row, column] = source, relation
        padded, relations = padded[self.slot], relations[self.slot]
        edge = np.full(padded.shape, -1)
        used = padded >= 0
        pairs = np.stack(
            [np.broadcast_to(self.family[:, None], padded.shape)[used], relations[used]]
        )
        edge[used] = np.unique(pairs, axis=1, return_inverse=True)[1].reshape(-1)
        return padded, edge
