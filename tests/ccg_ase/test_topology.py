import json

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
