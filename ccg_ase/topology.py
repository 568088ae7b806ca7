"""Topology: names, masses and bonds of n sites, which are atoms or beads."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components, shortest_path

_WORDS = ("names", "types", "elements", "resnames", "segids")
UNREACHABLE = 1_000_000
"""Bond distance given to two sites that no path of bonds connects."""


@dataclass(frozen=True, eq=False)
class Neighbourhood:
    """Sites within some number of bonds of each of m sources, see `Topology.near`.

    Entries ``start[k]`` to ``start[k + 1]`` belong to source k, by distance and then site index;
    the first of them is the source itself.

    Parameters
    ----------
    start
        Shape (m + 1,).
    site, distance
        Site index and number of bonds from the source, shape (total,).
    relation
        What the site is to the source: index into `relation_names`, shape (total,).
    relation_names
        Site names along the path from source to site, joined by "-", e.g. ``"C-N-CA"``; by length
        of path, then in lexicographic order of the names.
    """

    start: np.ndarray
    site: np.ndarray
    distance: np.ndarray
    relation: np.ndarray
    relation_names: tuple[str, ...]

    @property
    def source(self) -> np.ndarray:
        """Row k of the source that each entry belongs to, shape (total,)."""
        return np.repeat(np.arange(len(self.start) - 1), np.diff(self.start))


@dataclass(frozen=True, eq=False, kw_only=True)
class Topology:
    """Everything about n sites (atoms or beads) that isn't a position.

    Parameters
    ----------
    names
        Site names, e.g. ``("C", "N", "CA")``.
    masses
        Masses in Da, shape (n,), positive.
    types
        Site types; sites of one type share network parameters. Default ``"{resname}:{name}"``.
    elements
        Chemical symbols; default ``"X"``, which stands for a bead.
    resnames, resids, segids
        Residue name and number, and segment name, of each site. Defaults ``"MOL"``, 1, ``""``.
    bonds
        Bonded pairs of site indices, shape (m, 2). Stored with i < j, sorted and unique.
    charges
        Partial charges in elementary charges, shape (n,), or None if unknown.

    Raises
    ------
    ValueError
        If lengths differ, a mass isn't positive, or a bond names no site or joins one to itself.
    """

    names: tuple[str, ...]
    masses: np.ndarray
    types: tuple[str, ...] | None = None
    elements: tuple[str, ...] | None = None
    resnames: tuple[str, ...] | None = None
    resids: np.ndarray | None = None
    segids: tuple[str, ...] | None = None
    bonds: np.ndarray = ()
    charges: np.ndarray | None = None

    def __post_init__(self) -> None:
        n = len(self.names)
        if n == 0:
            raise ValueError("a Topology needs at least one site, got none")
        names = self._words("names", self.names)
        resnames = self._words("resnames", self.resnames or ("MOL",) * n)
        self._words("elements", self.elements or ("X",) * n)
        self._words("segids", self.segids or ("",) * n)
        self._words(
            "types", self.types or [f"{r}:{a}" for r, a in zip(resnames, names, strict=True)]
        )
        self._numbers("masses", self.masses, float)
        self._numbers("resids", np.ones(n) if self.resids is None else self.resids, int)
        if self.charges is not None:
            self._numbers("charges", self.charges, float)
        if not np.all(self.masses > 0):
            raise ValueError(
                f"masses must be positive (Da); site {np.argmin(self.masses)} has "
                f"{self.masses.min()}"
            )
        object.__setattr__(self, "bonds", self._checked_bonds())

    def _words(self, key: str, values: Any) -> tuple[str, ...]:
        words = tuple(str(value) for value in values)
        if len(words) != len(self.names):
            raise ValueError(f"{key} has {len(words)} entries for {len(self.names)} sites")
        object.__setattr__(self, key, words)
        return words

    def _numbers(self, key: str, values: Any, dtype: type) -> None:
        array = np.array(values, dtype=dtype)
        if array.shape != (len(self.names),):
            raise ValueError(f"{key} must have shape ({len(self.names)},), got {array.shape}")
        if not np.all(np.isfinite(array)):
            raise ValueError(f"{key} holds NaN or infinity at site {np.argmin(np.isfinite(array))}")
        object.__setattr__(self, key, array)

    def _checked_bonds(self) -> np.ndarray:
        bonds = np.array(self.bonds, dtype=int)
        if bonds.size == 0:
            return np.zeros((0, 2), dtype=int)
        if bonds.ndim != 2 or bonds.shape[1] != 2:
            raise ValueError(f"bonds must have shape (m, 2), got {bonds.shape}")
        if bonds.min() < 0 or bonds.max() >= len(self):
            raise ValueError(f"bonds name sites outside 0..{len(self) - 1}")
        if np.any(bonds[:, 0] == bonds[:, 1]):
            raise ValueError(f"site {bonds[bonds[:, 0] == bonds[:, 1]][0, 0]} is bonded to itself")
        return np.unique(np.sort(bonds, axis=1), axis=0)

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def adjacency(self) -> csr_array:
        """Symmetric bond matrix, sparse, shape (n, n)."""
        i, j = self.bonds.T
        rows, columns = np.concatenate([i, j]), np.concatenate([j, i])
        return coo_array((np.ones(len(rows)), (rows, columns)), shape=(len(self),) * 2).tocsr()

    @cached_property
    def molecules(self) -> np.ndarray:
        """Index of the molecule (connected component) of each site, shape (n,), from 0."""
        return connected_components(self.adjacency, directed=False)[1].astype(int)

    def neighbours(self) -> list[list[int]]:
        """Return the bonded neighbours of every site, in ascending order."""
        lists: list[list[int]] = [[] for _ in range(len(self))]
        for i, j in self.bonds.tolist():
            lists[i].append(j)
            lists[j].append(i)
        return [sorted(sites) for sites in lists]

    def near(self, sources: np.ndarray, depth: int) -> Neighbourhood:
        """Find the sites within `depth` bonds of each source, and what they are to it.

        The relation of a site to a source is read off the shortest path of bonds between them: the
        names of the sites along it. Of several shortest paths, the one counts whose names come
        first in lexicographic order, so that relations don't depend on the order of sites.

        Parameters
        ----------
        sources
            Site indices, shape (m,).
        depth
            Greatest number of bonds, at least 0.

        Returns
        -------
        Neighbourhood
            Time and memory grow with its size, not with m times n.

        Raises
        ------
        ValueError
            If a source is no site, or `depth` is negative.
        """
        n, sources = len(self), np.asarray(sources, dtype=int).reshape(-1)
        if len(sources) and (sources.min() < 0 or sources.max() >= n):
            raise ValueError(f"sources name sites outside 0..{n - 1}")
        if depth < 0:
            raise ValueError(f"depth must be at least 0 bonds, got {depth}")
        words, word = np.unique(np.array(self.names), return_inverse=True)
        # A pair of source row and site is one number, pair = row * n + site. Paths of one level are
        # known by their rank among the names of that level's paths.
        pair = np.arange(len(sources)) * n + sources
        used, rank = np.unique(word[sources], return_inverse=True)
        labels = words[used].tolist()
        relations, levels, before = list(labels), [(pair, rank)], pair[:0]
        for _ in range(depth):
            step, path = self._step(pair, rank)
            step, first = _first_by_rank(step, path, len(labels))
            new = ~(_member(step, pair) | _member(step, before))
            step, first = step[new], first[new]
            # Ranks of (path so far, next name) are those of the longer paths.
            used, longer = np.unique(first * len(words) + word[step % n], return_inverse=True)
            labels = [f"{labels[k // len(words)]}-{words[k % len(words)]}" for k in used.tolist()]
            levels.append((step, longer + len(relations)))
            relations += labels
            before, pair, rank = pair, step, longer
        pairs, relation = (np.concatenate(parts) for parts in zip(*levels, strict=True))
        distance = np.repeat(np.arange(depth + 1), [len(level) for level, _ in levels])
        row, site = np.divmod(pairs, n)
        order = np.argsort(row, kind="stable")
        start = np.concatenate([[0], np.bincount(row, minlength=len(sources)).cumsum()])
        return Neighbourhood(start, site[order], distance[order], relation[order], tuple(relations))

    def _step(self, pair: np.ndarray, rank: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Go one bond on, every way: pairs of source and site, and the rank of the path there."""
        indptr, site = self.adjacency.indptr, pair % len(self)
        ways = indptr[site + 1] - indptr[site]
        offset = np.arange(ways.sum()) - np.repeat(ways.cumsum() - ways, ways)
        there = self.adjacency.indices[np.repeat(indptr[site], ways) + offset]
        return np.repeat(pair - site, ways) + there, np.repeat(rank, ways)

    def hops(self) -> np.ndarray:
        """Return the number of bonds between all pairs, shape (n, n); else `UNREACHABLE`.

        Quadratic in memory: for small systems. `near` is the search for any size.
        """
        distance = shortest_path(self.adjacency, unweighted=True, directed=False)
        return np.where(np.isfinite(distance), distance, UNREACHABLE).astype(int)

    def angles(self) -> np.ndarray:
        """Return all bond angles i-j-k with i < k, shape (k, 3)."""
        found = [
            (i, j, k)
            for j, around in enumerate(self.neighbours())
            for i in around
            for k in around
            if i < k
        ]
        return np.array(found, dtype=int).reshape(-1, 3)

    def dihedrals(self) -> np.ndarray:
        """Return all proper dihedrals i-j-k-l around bonds with j < k, shape (k, 4)."""
        around = self.neighbours()
        found = [
            (i, j, k, m)
            for j, k in self.bonds.tolist()
            for i in around[j]
            for m in around[k]
            if i not in (k, m) and m != j
        ]
        return np.array(found, dtype=int).reshape(-1, 4)

    def repeated(self, count: int) -> Topology:
        """Return so many copies, one after another, with residue numbers that go on."""
        copy = np.repeat(np.arange(count), len(self))
        words = {key: getattr(self, key) * count for key in _WORDS}
        of_bond = np.repeat(np.arange(count), len(self.bonds))[:, None]
        return Topology(
            **words,
            masses=np.tile(self.masses, count),
            resids=np.tile(self.resids, count) + copy * (np.ptp(self.resids) + 1),
            bonds=np.tile(self.bonds, (count, 1)) + of_bond * len(self),
            charges=None if self.charges is None else np.tile(self.charges, count),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dictionary that `from_dict` reads back exactly."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Topology:
        """Build from the dictionary made by `to_dict`."""
        return cls(**values)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Topology):
            return NotImplemented
        return all(
            np.array_equal(getattr(self, field.name), getattr(other, field.name))
            for field in fields(self)
        )


def _first_by_rank(pair: np.ndarray, rank: np.ndarray, n_ranks: int) -> tuple[np.ndarray, ...]:
    """Return the distinct pairs, ascending, and the lowest rank of each."""
    pair, rank = np.divmod(np.sort(pair * max(n_ranks, 1) + rank), max(n_ranks, 1))
    first = np.diff(pair, prepend=-1) > 0
    return pair[first], rank[first]


def _member(values: np.ndarray, ascending: np.ndarray) -> np.ndarray:
    """Return which values occur in an ascending array."""
    place = np.searchsorted(ascending, values)
    return np.append(ascending, -1)[place] == values
