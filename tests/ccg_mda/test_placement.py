"""Placement: the order, its references, and the volume element of anchored coordinates."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ccg_ase import CGMap, Topology
from ccg_mda.placement import Placement, local_frames, measure, place


def test_references_come_before_the_atom_they_place(ala2_map):
    placement = Placement.from_map(ala2_map)
    own = np.arange(len(placement.atoms)) + ala2_map.n_beads
    assert (placement.references < own[:, None]).all()
    assert all(len(set(row)) == 3 for row in placement.references.tolist())
    assert sorted([*placement.atoms, *ala2_map.bead_atoms]) == list(range(22))
    np.testing.assert_array_equal(np.sort(placement.point_of_atom), np.arange(22))


def test_first_reference_is_bonded_and_centres_are_anchored_by_impropers(ala2_map):
    placement = Placement.from_map(ala2_map)
    rows = {row["atom"]: row for row in placement.table(ala2_map)}
    assert len(rows) == 17
    assert rows["ALA2:CB"] == {
        "atom": "ALA2:CB",
        "bond": "ALA2:CA",
        "angle": "ALA2:N",
        "dihedral": "ALA2:C",
        "kind": "improper",
    }
    bonds = {tuple(bond) for bond in ala2_map.atoms.bonds.tolist()}
    atom_of_point = np.argsort(placement.point_of_atom)
    for atom, (first, _, _) in zip(placement.atoms, placement.references, strict=True):
        assert tuple(sorted((int(atom), int(atom_of_point[first])))) in bonds


def test_methyl_groups_have_one_threefold_rotor_each(ala2_map):
    placement = Placement.from_map(ala2_map)
    assert placement.rotor_groups == ((0, 2, 3), (11, 12, 13), (19, 20, 21))
    assert placement.atoms[placement.multiplicity == 3].tolist() == [0, 11, 19]


def test_maps_that_cannot_be_placed_say_why(ala2_topology, ala2_map):
    with pytest.raises(NotImplementedError, match="single atoms"):
        Placement.from_map(CGMap.from_groups(ala2_topology, [range(6), range(6, 16)]))
    with pytest.raises(ValueError, match="at least three beads"):
        Placement.from_map(CGMap.from_slices(ala2_topology, [4, 6]))
    loose = Topology.from_dict(
        ala2_topology.to_dict() | {"bonds": ala2_topology.bonds[1:].tolist()}
    )
    with pytest.raises(ValueError, match=r"not connected.*H1"):
        Placement.from_map(CGMap.from_slices(loose, ala2_map.bead_atoms))


def test_coordinates_round_trip_with_the_stated_volume_element():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(1, 3, 3, generator=generator).double()
    origin, frame = local_frames(points, torch.tensor([[0, 1, 2]]))
    torch.testing.assert_close(torch.linalg.det(frame), torch.ones(1, 1).double())
    inner = torch.tensor([1.3, 1.9, -2.2]).double()

    def position(inner):
        return place(origin, frame, *(c.view(1, 1) for c in inner))[0, 0]

    r, theta, _ = inner
    measured = torch.cat(measure(origin, frame, position(inner)[None, None])).flatten()
    torch.testing.assert_close(measured, inner)
    jacobian = torch.autograd.functional.jacobian(position, inner)
    torch.testing.assert_close(torch.linalg.det(jacobian).abs(), r**2 * torch.sin(theta))
