"""Frames that no molecule can have are refused, all others pass."""

import numpy as np
import pytest
from molecules import GaussianBackmapper, dipeptide, slice_map
from systems import system

from ccg_ase.mapping import CGMap
from ccg_ase.topology import Topology
from ccg_mda.bead_checks import BeadCheck
from ccg_mda.transformation import backmap
from ccg_mda.universe import cg_map, universe_from

CELL = 20.0 * np.eye(3)


def beads_of(the_map):
    return the_map.apply(dipeptide().atoms.positions)


@pytest.mark.parametrize("preset", ["heavy", "residue-com", "backbone", "molecule-com"])
def test_molecules_pass_whole_and_wrapped_in_a_box(preset):
    the_map = cg_map(dipeptide(), preset)
    check, beads = BeadCheck(the_map), beads_of(the_map)
    check(beads, None)
    for shift in np.random.default_rng(0).normal(scale=20, size=(20, 3)):
        check((beads + shift) % 20.0, CELL)


def test_many_molecules_and_frames_pass():
    box = system("waters")
    check = BeadCheck(box.map)
    for beads in box.coarse.numpy():
        check(beads, None)


def test_limit_is_that_of_the_bonds_between():
    """A chain of ten carbons with beads at 0, 3, and the group 6 to 9."""
    bonds = [[k, k + 1] for k in range(9)]
    atoms = Topology(names=("C",) * 10, masses=[12.0] * 10, bonds=bonds)
    check = BeadCheck(CGMap.from_groups(atoms, [[0], [3], [6, 7, 8, 9]]))
    good = np.array([[0, 0, 0], [3 * 2.5, 0, 0], [3 * 2.5 + 6 * 2.5, 0, 0]]) - 1e-9
    check(good, None)
    for bead, pair in ((2, r"1 \(C\) and 2 \(C\)"), (0, r"0 \(C\) and 1 \(C\)")):
        far = good.copy()
        far[bead, 0] += 0.01 if bead else -0.01
        with pytest.raises(ValueError, match=rf"bonded beads {pair} are .* broken"):
            check(far, None)


def test_broken_molecules_small_boxes_and_nanometres_are_told():
    model = GaussianBackmapper(slice_map())
    beads = beads_of(model.cg_map)
    cases = [
        ((beads - beads[2]) % 20.0, None, "frame 0: bonded beads .* broken.*give the frames"),
        (beads, 2.0 * np.ones(3), r"the box, 2 Å at its narrowest, is too small"),
        (beads / 10, None, "probably in nm"),
    ]
    for positions, lengths, message in cases:
        u = universe_from(model.cg_map.beads, positions[None].astype(np.float32), dt=1.0)
        if lengths is not None:
            u.dimensions = [*lengths, 90, 90, 90]
        with pytest.raises(ValueError, match=message):
            backmap(u, model)
