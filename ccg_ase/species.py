"""Species: which molecules of a topology are alike, so that they share what is fitted to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ccg_ase.topology import Topology


@dataclass(frozen=True, eq=False)
class Species:
    """Molecules with the same types and bonds, site by site in ascending order.

    Parameters
    ----------
    one
        Topology of one such molecule, of m sites.
    sites
        Site indices of every copy, shape (copies, m).
    """

    one: Topology
    sites: np.ndarray

    @property
    def key(self) -> dict[str, Any]:
        """JSON-able identity: types and bonds."""
        return {"types": list(self.one.types), "links": self.one.bonds.tolist()}


def species_of(topology: Topology) -> list[Species]:
    """Return the species of a topology, by their first molecule; linear in its size."""
    molecule = topology.molecules
    order = np.argsort(molecule, kind="stable")
    size = np.bincount(molecule)
    start = size.cumsum() - size
    place = np.empty(len(topology), int)
    place[order] = np.arange(len(topology)) - np.repeat(start, size)
    kind = np.unique(topology.types, return_inverse=True)[1]
    of_bond = molecule[topology.bonds[:, 0]]
    by_molecule = np.argsort(of_bond, kind="stable")
    links = np.split(
        place[topology.bonds[by_molecule]], np.bincount(of_bond, minlength=len(size)).cumsum()[:-1]
    )
    sites = np.split(order, size.cumsum()[:-1])
    copies: dict[tuple[bytes, bytes], list[int]] = {}
    for m, (own, bonds) in enumerate(zip(sites, links, strict=True)):
        copies.setdefault((kind[own].tobytes(), bonds.tobytes()), []).append(m)
    found = []
    for members in copies.values():
        own, bonds = sites[members[0]], links[members[0]]
        one = Topology(
            names=[topology.names[i] for i in own],
            masses=topology.masses[own],
            types=[topology.types[i] for i in own],
            bonds=bonds,
        )
        found.append(Species(one, np.array([sites[m] for m in members])))
    return found
