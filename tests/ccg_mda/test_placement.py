"""Placement: references and frames, coordinates with their volume, and the printed table."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from systems import system

from ccg_mda.placement import Placement, local_frames, measure, place
from ccg_mda.placement_order import build_placement

PLAIN = torch.tensor([False])


def test_first_reference_is_bonded_and_centres_are_anchored_by_impropers(ala2_map):
    placement = build_placement(ala2_map)
    rows = {row["atom"]: row for row in placement.table(ala2_map)}
    assert len(rows) == 17
    assert rows["ALA2:CB"] | {"generation": ""} == {
        "atom": "ALA2:CB",
        "bond": "ALA2:CA",
        "angle": "ALA2:N",
        "dihedral": "ALA2:C",
        "kind": "improper",
        "generation": "",
        "moves with": "",
    }
    assert rows["ALA2:HB1"]["kind"] == "torsion"


def test_table_names_given_torsions_fragments_and_cartesian_atoms():
    torsions = system("torsions").map
    kinds = [row["kind"] for row in build_placement(torsions).table(torsions)]
    assert [kind for kind in kinds if kind.startswith("given")] == ["given: phi", "given: psi"]
    masses = system("mass").map
    moving = {row["moves with"] for row in build_placement(masses).table(masses)}
    assert moving == {"bead A", "bead B", "bead S", "bead M"}
    carbon_dioxide = system("CO2").map
    rows = build_placement(carbon_dioxide).table(carbon_dioxide)
    assert [row["kind"] for row in rows] == ["improper", "cartesian"]
    assert rows[0]["angle"] == rows[0]["dihedral"] == "lab axis"


def test_methyl_groups_have_one_threefold_rotor_each(ala2_map):
    placement = build_placement(ala2_map)
    assert placement.rotor_groups == ((0, 2, 3), (11, 12, 13), (19, 20, 21))
    assert placement.atoms[placement.multiplicity == 3].tolist() == [0, 11, 19]


@pytest.mark.parametrize("kind", ["slices", "mass", "torsions", "ions"])
def test_dictionary_round_trip(kind):
    placement = build_placement(system(kind).map)
    copy = Placement.from_dict(json.loads(json.dumps(placement.to_dict())))
    assert copy.to_dict() == placement.to_dict()
    assert copy.table(system(kind).map) == placement.table(system(kind).map)
    assert copy.references.shape == placement.references.shape
    assert copy.proper.dtype == bool


def test_coordinates_round_trip_with_the_stated_volume_element():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(1, 3, 3, generator=generator).double()
    origin, frame = local_frames(points, torch.tensor([[0, 1, 2]]))
    torch.testing.assert_close(torch.linalg.det(frame), torch.ones(1, 1).double())
    inner = torch.tensor([1.3, 1.9, -2.2]).double()

    def position(inner):
        return place(origin, frame, *(c.view(1, 1) for c in inner), PLAIN)[0, 0]

    r, theta, _ = inner
    measured = torch.cat(measure(origin, frame, position(inner)[None, None], PLAIN)).flatten()
    torch.testing.assert_close(measured, inner)
    jacobian = torch.autograd.functional.jacobian(position, inner)
    torch.testing.assert_close(torch.linalg.det(jacobian).abs(), r**2 * torch.sin(theta))


def test_dihedral_is_measured_in_the_right_handed_frame():
    """φ = 0 is towards p3, φ = 90° along e3 = e1 × (p3 - p1)."""
    points = torch.tensor([[[0.0, 0, 0], [2, 0, 0], [0.5, 3, 0]]]).double()
    origin, frame = local_frames(points, torch.tensor([[0, 1, 2]]))
    torch.testing.assert_close(frame[0, 0], torch.eye(3).double())
    half = torch.full((1, 1), np.pi / 2).double()
    cis = place(origin, frame, torch.ones(1, 1).double(), half, torch.zeros(1, 1).double(), PLAIN)
    torch.testing.assert_close(cis[0, 0], torch.tensor([0.0, 1.0, 0.0]).double())
    up = place(origin, frame, torch.ones(1, 1).double(), half, half, PLAIN)
    torch.testing.assert_close(up[0, 0], torch.tensor([0.0, 0.0, 1.0]).double())


@pytest.mark.parametrize("references", [[0, 1, -1], [0, -1, -1]])
def test_axes_of_the_laboratory_complete_any_frame(references):
    directions = torch.randn(40, 3, generator=torch.Generator().manual_seed(1)).double()
    directions[:3] = torch.eye(3)
    points = torch.stack([torch.zeros(40, 3).double(), directions], 1)
    _, frame = local_frames(points, torch.tensor([references]))
    unit = (frame @ frame.mT)[:, 0]
    torch.testing.assert_close(unit, torch.eye(3).double().expand(40, 3, 3))
    torch.testing.assert_close(torch.linalg.det(frame[:, 0]), torch.ones(40).double())


def test_atoms_on_the_axis_have_finite_components_and_gradients():
    points = torch.tensor([[[0.0, 0, 0], [1.2, 0, 0], [0.3, 1, 0]]]).double()
    atom = torch.tensor([[[-1.1, 0.0, 0.0]]]).double().requires_grad_()
    origin, frame = local_frames(points, torch.tensor([[0, 1, 2]]))
    linear = torch.tensor([True])
    parts = measure(origin, frame, atom, linear)
    torch.testing.assert_close(torch.cat(parts).flatten(), torch.tensor([-1.1, 0.0, 0.0]).double())
    torch.testing.assert_close(place(origin, frame, *parts, linear), atom)
    (gradient,) = torch.autograd.grad(sum(part.sum() for part in parts), atom)
    torch.testing.assert_close(gradient, torch.ones_like(gradient))
