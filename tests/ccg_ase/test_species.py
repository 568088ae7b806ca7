import numpy as np
import pytest

from ccg_ase import Topology
from ccg_ase.species import species_of


def topology_of(types, bonds=()):
    n = len(types)
    return Topology(names=[f"n{i}" for i in range(n)], types=types, masses=[1] * n, bonds=bonds)


def sites(topology):
    return [species.sites.tolist() for species in species_of(topology)]


def test_one_molecule_and_many():
    assert sites(topology_of("A")) == [[[0]]]
    assert sites(topology_of("ABC", [(0, 1), (1, 2)])) == [[[0, 1, 2]]]
    assert sites(topology_of("ABABAB", [(0, 1), (2, 3), (4, 5)])) == [[[0, 1], [2, 3], [4, 5]]]
    assert sites(topology_of("AAAA")) == [[[0], [1], [2], [3]]]


def test_types_order_and_bonds_tell_species_apart():
    # AB, BA, AB again, A alone, and a bead of another type.
    topology = topology_of("ABBAABAC", [(0, 1), (2, 3), (4, 5)])
    assert sites(topology) == [[[0, 1], [4, 5]], [[2, 3]], [[6]], [[7]]]
    # A chain of three against a ring of three and another chain, bonded in another order.
    topology = topology_of("A" * 9, [(0, 1), (1, 2), (3, 4), (4, 5), (3, 5), (6, 7), (6, 8)])
    assert sites(topology) == [[[0, 1, 2]], [[3, 4, 5]], [[6, 7, 8]]]


def test_interleaved_molecules():
    """Bonds of one molecule needn't be next to each other, nor its sites."""
    topology = topology_of("AABBCC", [(0, 2), (1, 3), (2, 4), (3, 5)])
    (species,) = species_of(topology)
    assert species.sites.tolist() == [[0, 2, 4], [1, 3, 5]]
    assert species.key == {"types": ["A", "B", "C"], "links": [[0, 1], [1, 2]]}
    assert species.one.names == ("n0", "n2", "n4")


@pytest.mark.parametrize("seed", range(5))
def test_every_site_once_and_of_the_same_kind(seed):
    """Random molecules in random order: copies have the types and bonds of the first."""
    rng = np.random.default_rng(seed)
    kinds = [("AAB", [(0, 1), (1, 2)]), ("AAB", [(0, 1)]), ("A", []), ("BA", [(0, 1)])]
    types, bonds = "", []
    for k in rng.integers(0, len(kinds), 30):
        bonds += [(i + len(types), j + len(types)) for i, j in kinds[k][1]]
        types += kinds[k][0]
    order = rng.permutation(len(types))  # site k moves to place order[k]
    shuffled = np.empty(len(types), dtype="<U1")
    shuffled[order] = list(types)
    topology = topology_of(shuffled.tolist(), order[np.array(bonds)])
    found = species_of(topology)
    every = np.concatenate([species.sites.ravel() for species in found])
    assert sorted(every) == list(range(len(types)))
    linked = {tuple(pair) for pair in topology.bonds.tolist()}
    seen = set()
    for species in found:
        for copy in species.sites:
            assert tuple(shuffled[copy]) == species.one.types
            own = {(int(copy[i]), int(copy[j])) for i, j in species.one.bonds}
            assert own <= linked
            seen |= own
    assert seen == linked
    assert len({str(species.key) for species in found}) == len(found)
    assert {len(np.unique(topology.molecules[copy])) for s in found for copy in s.sites} == {1}
