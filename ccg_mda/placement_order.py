"""How a placement follows from the bond graph and the map.

Atoms are placed bead by bead. Within a molecule, beads follow one another along the bead graph, so
that each sees what earlier ones decided; in a molecule of many beads, they are coloured such that
bonded beads differ, and all beads of one colour are placed side by side: the number of generations
then doesn't grow with the chain. Within a bead, heavy atoms come before hydrogens, each after an
atom that it is bonded to, by atom index otherwise.

Where torsions see through space, branches come after all that links beads that are atoms: a side
chain can make room for a peptide group, which its two Cα hold, but not the other way round. Beads
then grow their branches turn by turn, so that each sees those before.

All choices go by bonds, elements and the order of atoms within a residue, so that identical
residues are placed alike.
"""

from __future__ import annotations

import numpy as np

from ccg_ase.mapping import CGMap
from ccg_ase.topology import Neighbourhood
from ccg_ase.torsion_map import TorsionMap

from .bead_order import bead_order
from .lines import Lines
from .placement import Placement, atom_label

MAX_SEQUENCE = 32
"""Molecules of up to this many beads are placed bead after bead, larger ones colour by colour."""

_NEAR = 4  # bonds within which a reference atom is preferred over a bead centre


def build_placement(
    cg_map: CGMap | TorsionMap,
    *,
    hops: int = 3,
    positions: np.ndarray | None = None,
    max_sequence: int = MAX_SEQUENCE,
    branches_last: bool = False,
) -> Placement:
    """Derive the placement of a map.

    Parameters
    ----------
    cg_map
        Beads of any kind, of any number of molecules, or torsions of one molecule.
    hops
        Bonds over which an atom sees earlier ones; fixes the generations.
    positions
        Frames (n, n_atoms, 3) in Å, molecules whole: references that are nearly collinear in more
        than a few of them are avoided. Without frames, linear groups are known by their bonds
        only, which takes all hydrogens to be there.
    max_sequence
        Number of beads up to which a molecule is placed bead after bead.
    branches_last
        Whether what hangs on the chain of beads that are atoms comes after all of the chain.

    Raises
    ------
    ValueError
        If a molecule has no bead, a bead has no atom of its own, or a torsion can't be a
        coordinate.
    """
    builder = _Builder(cg_map, hops, positions)
    if isinstance(cg_map, TorsionMap):
        builder.place_by_torsions(cg_map)
    else:
        builder.place_by_beads(cg_map, max_sequence, branches_last)
    return builder.placement()


class _Builder:
    """Places one atom after another, and keeps what each choice depends on."""

    def __init__(self, cg_map: CGMap | TorsionMap, hops: int, positions: np.ndarray | None) -> None:
        atoms = cg_map.atoms
        self.cg_map, self.atoms, self.hops = cg_map, atoms, hops
        self.n_beads = cg_map.n_beads
        self.neighbours = atoms.neighbours()
        self.heavy = [element != "H" for element in atoms.elements]
        self.near = _rows(atoms.near(np.arange(len(atoms)), max(hops, _NEAR)))
        self.bead_neighbours = cg_map.beads.neighbours() if self.n_beads else []
        self.lines = Lines(cg_map, positions)
        n = len(atoms)
        self.rank: dict[int, int] = {}  # order in which atoms became known
        self.gen = np.full(n, -1)  # generation of the slot of each atom
        self.ready = np.full(n, -1)  # generation after which the atom is at its final place
        self.fragment = np.full(n, -1)
        self.roots = np.full(max(self.n_beads, 1), -1)
        self.start = np.zeros(max(self.n_beads, 1), dtype=int)
        self.slots: list[tuple[int, tuple[int, int, int], int]] = []
        self.torsion_of: dict[int, int] = {}
        self.owner = cg_map.owner if self.n_beads else np.zeros(n, dtype=int)
        self.colour = np.arange(max(self.n_beads, 1))
        self.floor = 0  # least generation of the slots to come

    # ------------------------------------------------------------------ beads

    def place_by_beads(self, cg_map: CGMap, max_sequence: int, branches_last: bool) -> None:
        owner = cg_map.owner
        if (owner < 0).any():
            lost = np.flatnonzero(owner < 0)
            names = [atom_label(self.atoms, i) for i in lost[:5]]
            raise ValueError(
                f"{len(lost)} atom(s) are not connected to any bead through bonds, e.g. {names}: "
                "add the missing bonds to the topology or beads to the mapping"
            )
        self.rows: list[dict[int, float]] = [{} for _ in range(self.n_beads)]
        entries = zip(cg_map.bead_index, cg_map.atom_index, cg_map.weights, strict=True)
        for bead, atom, weight in entries:
            self.rows[bead][int(atom)] = float(weight)
        members: list[list[int]] = [[] for _ in range(self.n_beads)]
        for atom, bead in enumerate(owner.tolist()):
            members[bead].append(atom)
        single = cg_map.single
        for bead, row in enumerate(self.rows):
            if not any(owner[atom] == bead for atom in row):
                raise ValueError(
                    f"bead {cg_map.beads.names[bead]} shares all of its atoms with earlier beads: "
                    "give it an atom of its own, or leave it out"
                )
            if single[bead]:
                self._set_root(bead, next(iter(row)))
        order, self.colour, turn = bead_order(cg_map, max_sequence)
        links = self._links(single) if branches_last else set(range(len(self.atoms)))
        for bead in order:
            if single[bead]:
                self._grow([atom for atom in members[bead] if atom in links])
            else:
                self._place_bead(bead, members[bead])
        if branches_last:
            last = -1
            for bead in (bead for bead in order if single[bead]):
                if turn[bead] != last:
                    self.floor, last = 1 + self.gen.max(), turn[bead]
                self._grow(members[bead])

    def _links(self, single: np.ndarray) -> set[int]:
        """Return the atoms between beads that are atoms, and those that end on such atoms."""
        parent = {int(root): int(root) for root in self.roots[np.flatnonzero(single)]}
        queue = list(parent)
        for atom in queue:
            for other in self.neighbours[atom]:
                if other not in parent and self.owner[other] == self.owner[atom]:
                    parent[other] = atom
                    queue.append(other)
        links: set[int] = set()
        for atom in queue:
            if any(self.owner[b] != self.owner[atom] for b in self.neighbours[atom]):
                while atom not in links:
                    links.add(atom)
                    atom = parent[atom]
        return links | {
            b for a in links for b in self.neighbours[a] if len(self.neighbours[b]) == 1
        }

    def _set_root(self, bead: int, atom: int) -> None:
        self.roots[bead] = atom
        self.rank[atom] = len(self.rank)

    def _place_bead(self, bead: int, members: list[int]) -> None:
        """Place the atoms of a bead of several atoms: first those outside its fragment."""
        parent = self._spanning_tree(members)
        order, row = list(parent), self.rows[bead]
        branch = {atom: row.get(atom, 0.0) for atom in order}
        for atom in reversed(order):
            if parent[atom] in branch:
                branch[parent[atom]] += branch[atom]
        entered = any(p is not None and p not in branch for p in parent.values())
        root = order[0]
        if entered:
            # The more weight is shifted, the less a displacement of the other atoms shifts it.
            root = max(order, key=lambda atom: (branch[atom], order.index(atom)))
        inside = {root}
        for atom in order:
            if parent[atom] in inside:
                inside.add(atom)
        for atom in order:
            if atom not in inside:
                self._add(atom, parent[atom])
        others = [atom for atom in row if atom not in inside]
        self._set_root(bead, root)
        self.start[bead] = 1 + max((self.ready[atom] for atom in others), default=-1)
        self.ready[root] = self.start[bead] - 1
        if len(inside) == 1:
            return
        self.fragment[list(inside)] = bead
        for atom in order:
            if atom in inside and atom != root:
                self._add(atom, parent[atom])
        self.ready[list(inside)] = max(self.gen[atom] for atom in inside)

    def _spanning_tree(self, members: list[int]) -> dict[int, int | None]:
        """Return members in the order of placement, each with the atom that it hangs on."""
        left, parent = set(members), {}
        while left:
            known = self.rank.keys() | parent.keys()
            reachable = [a for a in left if any(b in known for b in self.neighbours[a])]
            if reachable:
                atom = min(reachable, key=lambda a: (not self.heavy[a], a))
                near = [b for b in self.neighbours[atom] if b in known]
                parent[atom] = min(near, key=lambda b: (b not in parent, b))
            elif not parent:  # nothing to hang on: begin in the middle
                atom = max(left, key=lambda a: (self._heavy_degree(a), -a))
                parent[atom] = None
            else:  # a bead of several unbonded parts
                atom = min(left, key=lambda a: (not self.heavy[a], a))
                parent[atom] = next(iter(parent))
            left.remove(atom)
        return parent

    def _heavy_degree(self, atom: int) -> tuple[bool, int]:
        return self.heavy[atom], sum(self.heavy[b] for b in self.neighbours[atom])

    def _grow(self, members: list[int]) -> None:
        """Place atoms that hang on known ones."""
        for atom, parent in self._spanning_tree([a for a in members if a not in self.rank]).items():
            self._add(atom, parent)

    # --------------------------------------------------------------- torsions

    def place_by_torsions(self, torsion_map: TorsionMap) -> None:
        """Place a whole molecule such that each given torsion is the φ of one atom."""
        waiting = {n: tuple(row) for n, row in enumerate(torsion_map.torsions.tolist())}
        ends = {atom for row in waiting.values() for atom in (row[0], row[3])}
        first = waiting[0]  # its atoms come first: they fix the frame, and are never on a line
        self._set_root(0, waiting[0][0])

        def completed(atom: int) -> list[tuple[int, tuple[int, ...]]]:
            found = []
            for n, row in waiting.items():
                row = row if row[3] == atom else row[::-1]
                if row[3] == atom and all(a in self.rank for a in row[:3]):
                    found.append((n, row))
            return found

        left = set(range(len(self.atoms))) - self.rank.keys()
        while left:
            reachable = [a for a in left if any(b in self.rank for b in self.neighbours[a])]
            atom = min(
                reachable,
                key=lambda a: (
                    a not in first,
                    not completed(a),
                    a not in ends,
                    not self.heavy[a],
                    a,
                ),
            )
            done = completed(atom)
            if len(done) > 1:
                raise ValueError(
                    f"the torsions {[torsion_map.names[n] for n, _ in done]} both fix atom "
                    f"{atom_label(self.atoms, atom)}: drop one of them"
                )
            if done:
                n, (p3, p2, p1, _) = done[0]
                self.torsion_of[atom] = n
                self._add(atom, p1, (p2, p3))
                del waiting[n]
            else:
                known = [b for b in self.neighbours[atom] if b in self.rank]
                self._add(atom, min(known, key=self.rank.get))
            left.remove(atom)
        if waiting:
            names = [torsion_map.names[n] for n in waiting]
            raise ValueError(f"the torsions {names} can't be coordinates: they close a ring")

    # ------------------------------------------------------------- references

    def _add(self, atom: int, p1: int | None, pair: tuple[int, int] | None = None) -> None:
        """Give an atom its references and its generation."""
        p2, p3 = (
            self._references(p1, atom) if pair is None else (self._point(p, atom) for p in pair)
        )
        points = (self._point(p1, atom), p2, p3)
        seen = {j for j, d in self.near[atom] if d <= self.hops and self._known(j, atom)}
        n = len(self.atoms)
        seen |= {(p - self.n_beads) % n for p in points if p >= self.n_beads}
        own = self.fragment[atom]
        generation = self.floor if own < 0 else self.start[own]
        for j in seen:
            inside = own >= 0 and self.fragment[j] == own
            known = self.gen[j] if inside and j != self.roots[own] else self.ready[j]
            generation = max(generation, 1 + known)
        self.gen[atom] = self.ready[atom] = generation
        self.slots.append((atom, points, p1))
        self.rank[atom] = len(self.rank)

    def _known(self, j: int, atom: int) -> bool:
        """Whether an atom is there for another one: beads of one colour are placed side by side."""
        if j not in self.rank:
            return False
        bead, own = self.owner[[j, atom]]
        apart = bead == own or self.colour[bead] != self.colour[own]
        is_bead = self.roots[bead] == j and self.fragment[j] < 0 and self.start[bead] == 0
        return bool(apart or is_bead)

    def _point(self, atom: int, seen_from: int) -> int:
        """Return the point that an atom is for another one: before its shift in a fragment."""
        inside = self.fragment[atom] >= 0 and self.fragment[atom] == self.fragment[seen_from]
        return self.n_beads + atom + (len(self.atoms) if inside else 0)

    def _references(self, p1: int, atom: int) -> tuple[int, int]:
        """Choose p2 and p3: bonded and stiff first, beads before atoms, then bead centres.

        An atom from which one or two bonds lead on to a known one, as in a ring or in a chain
        between two beads, takes that as p2: then it meets that end by r and θ alone, given the
        distance of p1 and p2. As p3, what hangs on p1 comes before what hangs on p2: it turns with
        the atom.
        """
        distance = {j: d for j, d in self.near[p1] if j not in (p1, atom) and self._known(j, atom)}
        is_root = set(self.roots.tolist()) if self.n_beads else set()

        def rank(j: int, d: int) -> tuple[int, bool, int]:
            return d, j not in is_root, self.rank[j]

        beyond = {j: d for j, d in self.near[atom] if d <= 2 and distance.get(j) == d + 1}
        nearest = sorted(distance, key=lambda j: (beyond.get(j, _NEAR), *rank(j, distance[j])))
        centres = self._bead_centres(p1)
        origin = self._point(p1, atom)
        seconds = [(self._point(j, atom), j) for j in nearest] + [(b, None) for b in centres]
        seconds = [(p, j) for p, j in seconds if not self._coincide(origin, p)]
        if not seconds:
            return -1, -1
        p2, second = seconds[0]
        from_second = dict(self.near[second]) if second is not None else {}
        far = 2 * _NEAR

        def rank_third(j: int) -> tuple:
            d1, d2 = distance[j], from_second.get(j, far)
            return not d1 < min(d2, 3), min(d1, d2), *rank(j, d1)

        thirds = [j for j in sorted(distance, key=rank_third) if j != second]
        if second is not None:  # neighbours of p2 may be out of sight of p1
            others = [j for j in from_second if j not in (p1, atom) and self._known(j, atom)]
            thirds += [j for j in others if j not in distance]
        points = [self._point(j, atom) for j in thirds] + [b for b in centres if b != p2]
        for p3 in points:
            if not self._collinear(origin, p2, p3):
                return p2, p3
        return p2, -1

    def _bead_centres(self, atom: int) -> list[int]:
        """Bead centres of the molecule from near to far along the bead graph, the own one first."""
        if not self.n_beads:
            return []
        first = int(self.cg_map.owner[atom])
        order, depth = [first], {first: 0}
        for bead in order:
            if len(order) > 8 or depth[bead] > 3:
                break
            for other in self.bead_neighbours[bead]:
                if other not in depth:
                    depth[other] = depth[bead] + 1
                    order.append(other)
        return order

    def _coincide(self, a: int, b: int) -> bool:
        """Whether two points are one: a bead and its only atom, or the root of a whole bead."""
        if b >= self.n_beads:
            return False
        atom = (a - self.n_beads) % len(self.atoms)
        if self.roots[b] != atom:
            return False
        return all(j == atom or self.fragment[j] == b for j in self.rows[b])

    def _collinear(self, p1: int, p2: int, p3: int) -> bool:
        if self._coincide(p1, p3) or self._coincide(p2, p3) or self._coincide(p3, p2):
            return True
        return self.lines.aligned(p1, p2, p3)

    # ----------------------------------------------------------------- result

    def placement(self) -> Placement:
        atoms = np.array([atom for atom, _, _ in self.slots], dtype=int)
        references = np.array([p for _, p, _ in self.slots], dtype=int).reshape(-1, 3)
        groups = self._rotor_groups()
        grouped = {atom: group for group in groups for atom in group}
        n = len(self.atoms)
        proper, multiplicity, linear = [], [], []
        for atom, (_, p2, p3), p1 in self.slots:
            bonded = {self.n_beads + b for b in self.neighbours[p1]}
            bonded |= {b + n for b in bonded}
            proper.append(p3 >= 0 and p3 not in bonded)
            leading = atom == min(grouped.get(atom, (-1,)), key=lambda a: self.rank.get(a, n))
            multiplicity.append(3 if proper[-1] and leading else 1)
            through = (p2 - self.n_beads) % n if p2 >= self.n_beads else -1
            unbonded = atom not in self.neighbours[p1]
            linear.append(unbonded or (self.lines.linear(p1) and through in self.neighbours[p1]))
        return Placement(
            atoms=atoms,
            references=references,
            generation=self.gen[atoms],
            proper=np.array(proper, dtype=bool),
            multiplicity=np.array(multiplicity, dtype=int),
            linear=np.array(linear, dtype=bool),
            torsion=np.array([self.torsion_of.get(int(a), -1) for a in atoms], dtype=int),
            roots=self.roots,
            fragment=self.fragment,
            start=self.start,
            rotor_groups=groups,
        )

    def _rotor_groups(self) -> tuple[tuple[int, ...], ...]:
        """Return triples of identical terminal atoms on one parent (methyl-like groups)."""
        fixed = set(self.roots.tolist())
        groups = []
        for bonded in self.neighbours:
            ends = [j for j in bonded if len(self.neighbours[j]) == 1 and j not in fixed]
            elements = {self.atoms.elements[j] for j in ends}
            if len(bonded) == 4 and len(ends) == 3 and len(elements) == 1:
                groups.append(tuple(sorted(ends)))
        return tuple(groups)


def _rows(near: Neighbourhood) -> list[list[tuple[int, int]]]:
    """Return (site, distance) pairs of every source, without the source itself."""
    pairs = list(zip(near.site.tolist(), near.distance.tolist(), strict=True))
    return [pairs[a + 1 : b] for a, b in zip(near.start[:-1], near.start[1:], strict=True)]
