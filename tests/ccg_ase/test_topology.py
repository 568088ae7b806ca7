import json

import networkx
import numpy as np
import pytest

from ccg_ase import Topology, thermal_energy
from ccg_ase.topology import UNREACHABLE


def butane(**changes):
    values = dict(names="ABCD", masses=[1.0, 2, 3, 4], bonds=[(1, 0), (1, 2), (3, 2), (2, 1)])
    return Topology(**{**values, **changes})


def test_defaults_and_sorted_bonds():
    topology = butane()
    assert len(topology) == 4
    assert topology.types == ("MOL:A", "MOL:B", "MOL:C", "MOL:D")
    assert topology.elements == ("X",) * 4
    assert topology.bonds.tolist() == [[0, 1], [1, 2], [2, 3]]


def test_chains():
    topology = butane()
    assert topology.neighbours() == [[1], [0, 2], [1, 3], [2]]
    assert topology.angles().tolist() == [[0, 1, 2], [1, 2, 3]]
    assert topology.dihedrals().tolist() == [[0, 1, 2, 3]]
    assert topology.hops()[0].tolist() == [0, 1, 2, 3]


def test_ring_of_three_has_no_dihedral():
    ring = Topology(names="ABC", masses=[1, 1, 1], bonds=[(0, 1), (1, 2), (0, 2)])
    assert len(ring.angles()) == 3
    assert len(ring.dihedrals()) == 0


def test_molecules_and_unreachable():
    topology = butane(bonds=[(0, 1), (2, 3)])
    assert topology.molecules.tolist() == [0, 0, 1, 1]
    assert topology.hops()[0, 2] == UNREACHABLE


def test_alanine_dipeptide_counts(ala2_topology):
    # 22 atoms in a tree: 21 bonds, and the textbook counts of its angles and proper dihedrals.
    assert len(ala2_topology.bonds) == 21
    assert len(ala2_topology.angles()) == 36
    assert len(ala2_topology.dihedrals()) == 41
    assert set(ala2_topology.molecules) == {0}


def relations_by_enumeration(topology, depth):
    """All sites near each site with their relation, from networkx' list of all shortest paths."""
    graph = networkx.Graph(topology.bonds.tolist())
    graph.add_nodes_from(range(len(topology)))
    found = []
    for source in range(len(topology)):
        reached = networkx.single_source_shortest_path_length(graph, source, depth)
        for site, distance in sorted(reached.items(), key=lambda entry: entry[::-1]):
            paths = networkx.all_shortest_paths(graph, source, site)
            names = min(tuple(topology.names[i] for i in path) for path in paths)
            found.append((source, site, distance, "-".join(names)))
    return found


def random_molecules(n=40):
    """Several molecules with rings and branches, names that repeat, and a lone site."""
    rng = np.random.default_rng(3)
    bonds = [(i, rng.integers(max(0, i - 4), i)) for i in range(1, n - 1) if i % 13]
    bonds += [(i, i + 3) for i in range(0, n - 5, 5)]
    names = rng.choice(["C", "CA", "N", "H1", "B"], size=n)
    return Topology(names=tuple(names), masses=[1] * n, bonds=bonds)


def ring(n):
    return Topology(
        names=("C", "N") * (n // 2),
        masses=[1] * n,
        bonds=[(i - 1, i) for i in range(1, n)] + [(0, n - 1)],
    )


@pytest.mark.parametrize("depth", [0, 1, 3, 12])
@pytest.mark.parametrize("which", ["ala2", "ring", "random", "atoms"])
def test_near_is_what_networkx_enumerates(which, depth, ala2_topology):
    topology = {
        "ala2": ala2_topology,
        "ring": ring(6),
        "random": random_molecules(),
        "atoms": Topology(names="AB", masses=[1, 1]),
    }[which]
    near = topology.near(range(len(topology)), depth)
    words = [near.relation_names[k] for k in near.relation]
    found = list(zip(near.source, near.site, near.distance, words, strict=True))
    assert found == relations_by_enumeration(topology, depth)
    np.testing.assert_array_equal(topology.hops()[near.source, near.site], near.distance)


def test_near_of_some_sources_in_any_order(ala2_topology):
    every = ala2_topology.near(range(22), 4)
    some = ala2_topology.near([14, 3, 14], 4)
    for row, source in enumerate([14, 3, 14]):
        a, b = slice(*some.start[row : row + 2]), slice(*every.start[source : source + 2])
        np.testing.assert_array_equal(some.site[a], every.site[b])
        assert [some.relation_names[k] for k in some.relation[a]] == [
            every.relation_names[k] for k in every.relation[b]
        ]
    nothing = ala2_topology.near([], 4)
    assert nothing.start.tolist() == [0]
    assert len(nothing.site) == 0


def test_relations_tell_the_next_residue_from_the_last(ala2_topology):
    near = ala2_topology.near([4, 14], 4)
    relation = {
        (source, site): near.relation_names[k]
        for source, site, k in zip(near.source, near.site, near.relation, strict=True)
    }
    assert relation[0, 8] == "C-N-CA"  # ACE C to ALA CA
    assert relation[1, 8] == "C-CA"
    assert relation[1, 18] == "C-N-C"


def test_relations_ignore_the_order_of_sites():
    topology = random_molecules()
    order = np.random.default_rng(0).permutation(len(topology))
    place = np.argsort(order)
    shuffled = Topology(
        names=tuple(topology.names[i] for i in order),
        masses=topology.masses,
        bonds=place[topology.bonds],
    )

    def table(near, site_of):
        words = [near.relation_names[k] for k in near.relation]
        pairs = zip(site_of[near.source], site_of[near.site], strict=True)
        return dict(zip(pairs, words, strict=True))

    n = len(topology)
    assert table(topology.near(range(n), 9), np.arange(n)) == table(
        shuffled.near(range(n), 9), order
    )


def test_near_refuses():
    for sources in ([4], [-1]):
        with pytest.raises(ValueError, match="outside"):
            butane().near(sources, 2)
    with pytest.raises(ValueError, match="at least 0"):
        butane().near([0], -1)


def test_repeated(ala2_topology):
    three = ala2_topology.repeated(3)
    assert len(three) == 66
    assert three.names == ala2_topology.names * 3
    assert three.types == ala2_topology.types * 3
    assert np.bincount(three.molecules).tolist() == [22] * 3
    np.testing.assert_array_equal(three.masses, np.tile(ala2_topology.masses, 3))
    np.testing.assert_array_equal(three.hops()[44:, 44:], ala2_topology.hops())
    # Residues of the copies have numbers of their own: 1 to 9.
    assert len({*zip(three.resids, three.resnames, strict=True)}) == 9
    assert np.unique(three.resids).tolist() == list(range(1, 10))
    assert ala2_topology.repeated(1) == ala2_topology
    assert butane(charges=[0, 0, 1, -1]).repeated(2).charges.tolist() == [0, 0, 1, -1] * 2
    assert butane(bonds=[]).repeated(2).bonds.shape == (0, 2)


def test_json_round_trip(ala2_topology):
    copy = Topology.from_dict(json.loads(json.dumps(ala2_topology.to_dict())))
    assert copy == ala2_topology
    assert butane() != butane(charges=[0, 0, 0, 1])
    assert butane(charges=[0, 0, 0, 1]) == Topology.from_dict(
        butane(charges=[0, 0, 0, 1]).to_dict()
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": "", "masses": []}, "at least one site"),
        ({"masses": [1, 2, 3]}, "masses must have shape"),
        ({"masses": [1, 2, 3, 0]}, "must be positive"),
        ({"masses": [1, 2, np.nan, 1]}, "NaN"),
        ({"elements": ["X"]}, "elements has 1 entries"),
        ({"bonds": [(0, 4)]}, "outside"),
        ({"bonds": [(-1, 2)]}, "outside"),
        ({"bonds": [(2, 2)]}, "bonded to itself"),
        ({"bonds": [(0, 1, 2)]}, "shape"),
    ],
)
def test_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        butane(**changes)


def test_thermal_energy():
    assert thermal_energy(300) == pytest.approx(0.0258520, rel=1e-5)  # CODATA: 25.852 meV
    for wrong in (0, -1, np.nan, np.inf):
        with pytest.raises(ValueError, match="positive and finite"):
            thermal_energy(wrong)
