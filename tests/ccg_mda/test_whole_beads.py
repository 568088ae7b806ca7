"""Beads that the box cuts, against the structure before it was cut."""

import numpy as np
import pytest
from MDAnalysis.lib.mdamath import triclinic_vectors

from ccg_ase.mapping import CGMap
from ccg_ase.topology import Topology
from ccg_mda.whole_beads import WholeBeads

BOX = np.array([9.0, 9.5, 10.0, 80.0, 70.0, 95.0])


def scattered(positions, box, rng):
    """Move every atom by some lattice vector."""
    return positions + rng.integers(-3, 4, positions.shape) @ triclinic_vectors(box, dtype=float)


def apart(cg_map, moved, positions, box):
    """How the beads moved, in lattice vectors, (n_beads, 3)."""
    cell = triclinic_vectors(box, dtype=float)
    return (cg_map.apply(moved) - cg_map.apply(positions)) @ np.linalg.inv(cell)


GROUPS = {
    "residues": [range(6), range(6, 16), range(16, 22)],
    "in pieces": [(0, 5, 9, 21), (2, 14, 15)],
    "one bead": [range(22)],
}


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("side", [1.0, 0.7])
def test_any_images_give_the_same_beads(groups, side, ala2_topology, ala2_positions, rng):
    """Also in a box of which the molecule needs more than half, and if bonds leave the bead."""
    cg_map = CGMap.from_groups(ala2_topology, GROUPS[groups])
    box = BOX * [side, side, side, 1, 1, 1]
    assert np.ptp(ala2_positions, axis=0).max() > 0.5 * box[0]
    whole = WholeBeads(cg_map)
    for _ in range(10):
        moved = whole(scattered(ala2_positions, box, rng), box)
        shift = apart(cg_map, moved, ala2_positions, box)
        # Bonds connect all beads: they move together, by a lattice vector.
        np.testing.assert_allclose(shift, np.tile(np.round(shift[0]), (len(shift), 1)), atol=1e-9)
    np.testing.assert_array_equal(whole(ala2_positions, box), ala2_positions)


def test_many_molecules(ala2_topology, ala2_positions, rng):
    cg_map = CGMap.from_groups(ala2_topology, GROUPS["residues"]).repeated(7)
    positions = np.concatenate([ala2_positions + rng.normal(size=3, scale=9) for _ in range(7)])
    shift = apart(cg_map, WholeBeads(cg_map)(scattered(positions, BOX, rng), BOX), positions, BOX)
    np.testing.assert_allclose(shift, np.round(shift), atol=1e-9)
    assert np.ptp(shift, axis=0).max() > 1


def waters(n):
    atoms = Topology(
        names=("O", "H", "H") * n,
        masses=[16.0, 1.0, 1.0] * n,
        bonds=[(3 * k, 3 * k + i) for k in range(n) for i in (1, 2)],
    )
    return CGMap.from_groups(atoms, [range(12)] * 1 + [range(12, 3 * n)])


def test_beads_of_several_molecules(rng):
    """Two beads of four waters; each molecule joins the first one of its bead."""
    cg_map, box = waters(8), np.array([14.0, 14, 14, 90, 90, 90])
    oxygen = rng.uniform(0, 4, (8, 1, 3)) + np.repeat([[0.0], [9.0]], 4, axis=0)[:, None]
    positions = (oxygen + rng.normal(scale=0.5, size=(8, 3, 3))).reshape(24, 3)
    whole = WholeBeads(cg_map)
    shift = apart(cg_map, whole(scattered(positions, box, rng), box), positions, box)
    np.testing.assert_allclose(shift, np.round(shift), atol=1e-9)
    positions[:3] += [6.5, 0, 0]
    with pytest.raises(ValueError, match=r"bead 0 \(O\) holds several molecules.*larger box"):
        whole(positions, box)


def test_a_chain_that_is_bonded_to_its_own_image():
    """Beads within it are whole; a bead of all of it, or with bonds outside, can't be."""
    n, spacing = 12, 1.5
    bonds = [(k, (k + 1) % n) for k in range(n)]
    atoms = Topology(names=("C",) * n, masses=[12.0] * n, bonds=bonds)
    positions = np.zeros((n, 3))
    positions[:, 0] = spacing * np.arange(n) + 0.1
    box = np.array([n * spacing, 15.0, 15.0, 90, 90, 90])
    groups = [np.arange(k - 3, k) % n for k in (1, 4, 7, 10)]
    cg_map = CGMap.from_groups(atoms, groups)
    beads = cg_map.apply(WholeBeads(cg_map)(positions, box))
    np.testing.assert_allclose(beads[:, 0] % box[0], [16.6, 3.1, 7.6, 12.1])
    for cut in ([range(n)], [(0, 2), (4, 5)]):
        with pytest.raises(ValueError, match="bonded to its own image"):
            WholeBeads(CGMap.from_groups(atoms, cut))(positions, box)


@pytest.mark.parametrize("box", [[3.0, 30, 30, 90, 90, 90], [0.0, 30, 30, 90, 90, 90]])
def test_boxes_that_are_too_small(box, ala2_topology, ala2_positions):
    whole = WholeBeads(CGMap.from_groups(ala2_topology, GROUPS["residues"]))
    with pytest.raises(ValueError, match=r"box is too small, not in Å|no periodic box"):
        whole(ala2_positions, np.array(box))
