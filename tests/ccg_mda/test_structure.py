"""Structure checks against defects made by hand, each beside the clean structure."""

import numpy as np
import pytest

from ccg_ase import Topology
from ccg_mda.contacts import close_pairs, ring_piercings, small_rings
from ccg_mda.internals import (
    measured,
    proper_torsions,
    signed_volumes,
    site_classes,
    stereo_centres,
)
from ccg_mda.structure import StructureReference, check_structure

NOISE_A = 0.02
O_ACE, C_ACE, N_ALA, H_ALA, CA, CB, HB1 = 5, 4, 6, 7, 8, 10, 11


def molecule(bonds, elements=None, names=None):
    n = np.max(bonds) + 1
    elements = elements or ("C",) * n
    return Topology(names=names or elements, elements=elements, masses=np.ones(n), bonds=bonds)


def torsions_of(topology):
    return proper_torsions(topology, small_rings(topology), site_classes(topology))


def shaken(positions, n_frames=200, seed=0):
    noise = np.random.default_rng(seed).normal(scale=NOISE_A, size=(n_frames, *positions.shape))
    return positions + noise


def turned(positions, j, k, moved, angle):
    """Rotate atoms about the bond j-k (Rodrigues)."""
    axis = positions[k] - positions[j]
    axis = axis / np.linalg.norm(axis)
    arm = positions[moved] - positions[k]
    new = positions.copy()
    new[moved] = (
        positions[k]
        + arm * np.cos(angle)
        + np.cross(axis, arm) * np.sin(angle)
        + axis * (arm @ axis)[:, None] * (1 - np.cos(angle))
    )
    return new


@pytest.fixture(scope="module")
def reference(ala2_topology, ala2_positions):
    return StructureReference.from_frames(ala2_topology, shaken(ala2_positions))


def found(report):
    """Kinds of defects that the first frame has, with their number."""
    return {name: int(kind.per_frame[0]) for name, kind in report.defects.items() if kind.share}


# ------------------------------------------------------------ what is checked


def test_terms_of_alanine_dipeptide(reference, ala2_topology):
    assert reference.centres.tolist() == [[CA, N_ALA, 9, CB, 14]]  # no methyl carbon
    assert reference.centre_sign.tolist() == [1.0] or reference.centre_sign.tolist() == [-1.0]
    assert reference.held.tolist() == [[1, 4, 6, 8], [8, 14, 16, 18]]  # ω: CH3-C-N-CA, CA-C-N-C
    np.testing.assert_allclose(np.abs(reference.held_mean), np.pi, atol=0.1)
    names = ala2_topology.names
    axes = [tuple(names[i] for i in row[1:3]) for row in reference.rotatable]
    free = dict(zip(axes, reference.fold, strict=True))
    assert free == {("CH3", "C"): 3, ("N", "CA"): 1, ("CA", "CB"): 3, ("CA", "C"): 1, ("N", "C"): 3}
    assert len(reference.rings) == 0


def test_the_amino_acid_is_left_handed(ala2_positions):
    """CORN rule: seen from the hydrogen, CO, R and N run clockwise."""
    n, ha, cb, c = ala2_positions[[N_ALA, 9, CB, 14]]
    by_hand = np.linalg.det([n - c, ha - c, cb - c])
    volume = signed_volumes(ala2_positions[None], np.array([[CA, N_ALA, 9, CB, 14]]))
    np.testing.assert_allclose(volume, [[by_hand]])
    seen_from_h = np.cross(cb - c, n - c) @ (ha - ala2_positions[CA])
    assert seen_from_h < 0  # C, R, N turn clockwise for an eye at H


def test_centres_need_four_kinds_or_three_heavy_atoms():
    # Isobutane's CH (three heavy atoms and H), then CH2 of propane, CHFClBr, neopentane.
    isobutane = molecule([(0, 1), (0, 2), (0, 3), (0, 4)], ("C", "C", "C", "C", "H"))
    propane = molecule([(0, 1), (0, 2), (0, 3), (0, 4)], ("C", "C", "C", "H", "H"))
    halons = molecule([(0, 1), (0, 2), (0, 3), (0, 4)], ("C", "F", "Cl", "Br", "H"))
    neopentane = molecule([(0, 1), (0, 2), (0, 3), (0, 4)])
    found = [
        len(stereo_centres(each, site_classes(each)))
        for each in (isobutane, propane, halons, neopentane)
    ]
    assert found == [1, 0, 1, 0]


def test_branches_differ_by_what_follows():
    """3-methylhexane, C3: H, methyl, ethyl and propyl are told apart by their bonds."""
    chain = [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (2, 6), (2, 7)]
    chiral = molecule(chain, ("C",) * 7 + ("H",))
    assert stereo_centres(chiral, site_classes(chiral))[:, 0].tolist() == [2]


def test_classes_are_the_orbits_of_the_bond_graph(ala2_topology, rng):
    """Hydrogens of a methyl group are alike, all else differs; the order of atoms is nothing."""
    kind = site_classes(ala2_topology)
    methyls = [(0, 2, 3), (11, 12, 13), (19, 20, 21)]
    assert len(set(kind)) == 22 - 6
    assert all(len(set(kind[list(hydrogens)])) == 1 for hydrogens in methyls)
    order = rng.permutation(22)
    place = np.argsort(order)
    elements = tuple(ala2_topology.elements[i] for i in order)
    moved = site_classes(molecule(place[ala2_topology.bonds], elements))
    assert len(set(zip(kind[order], moved, strict=True))) == 16


def test_a_torsion_in_a_ring_or_at_a_double_bond():
    """Cyclohexene with a methyl group at its double bond."""
    bonds = [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (0, 5), (0, 6), (6, 7), (6, 8), (6, 9)]
    bonds += [(site, 10 + 2 * n + k) for n, site in enumerate((2, 3, 4, 5)) for k in (0, 1)]
    topology = molecule([*bonds, (1, 18)], ("C",) * 7 + ("H",) * 12)
    torsions, isomers, in_ring, fold = torsions_of(topology)
    of_bond = {tuple(t[1:3].tolist()): k for k, t in enumerate(torsions)}
    assert len(of_bond) == 7
    assert isomers.sum() == 1
    assert isomers[of_bond[0, 1]]
    assert not in_ring[of_bond[0, 6]]
    assert fold[of_bond[0, 6]] == 3
    assert in_ring.sum() == 6


def test_turning_a_phenol_group_gives_no_isomer():
    """Phenol: O-H flips, by symmetry into the same molecule; styrene's double bond has isomers."""
    ring = ring_bonds(0, 6)
    phenol = molecule([*ring, (0, 6), (6, 7), *((k, k + 7) for k in range(1, 6))])
    torsions, isomers, in_ring, fold = torsions_of(phenol)
    row = torsions[:, 1:3].tolist().index([0, 6])
    assert (isomers[row], in_ring[row], fold[row]) == (False, False, 2)
    assert isomers[in_ring].all()
    # 1-phenylpropene: ring-CH=CH-CH3.
    bonds = [*ring, (0, 6), (6, 7), (7, 8), (6, 9), (7, 10), (8, 11), (8, 12), (8, 13)]
    bonds += [(k, k + 13) for k in range(1, 6)]
    propene = molecule(bonds, ("C",) * 9 + ("H",) * 10)
    torsions, isomers, in_ring, fold = torsions_of(propene)
    assert torsions[isomers & ~in_ring].tolist() == [[0, 6, 7, 8]]
    assert fold[torsions[:, 1:3].tolist().index([0, 6])] == 2
    assert fold[torsions[:, 1:3].tolist().index([7, 8])] == 3


# --------------------------------------------------------------------- defects


def test_sound_frames_have_no_defects(reference, ala2_topology, ala2_positions):
    frames = shaken(ala2_positions, 500, seed=1)
    report = check_structure(reference, frames.reshape(5, 100, 22, 3))
    assert report.n_frames == 500
    assert report.sound.all()
    assert found(report) == {}
    i, j = np.nonzero(np.triu(ala2_topology.hops() > 3))
    distance = np.linalg.norm(frames[:, i] - frames[:, j], axis=-1).min(1)
    expected = np.where(distance <= 2.0, distance, np.inf)
    np.testing.assert_allclose(report.smallest_distance_A, expected)
    # 200 and 500 frames: a spread pooled over one bond has a relative error of about 6 %.
    assert np.abs(report.bond_sd_ratio - 1).max() < 0.25
    summary = report.summary()
    assert summary["sound_frames"] == 1
    assert all(isinstance(value, float) for value in summary.values())


def test_a_mirror_image_has_the_other_chirality(reference, ala2_positions):
    report = check_structure(reference, (ala2_positions * [-1, 1, 1])[None])
    assert found(report) == {"chirality flips": 1}
    assert report.chirality.share == 1
    assert report.chirality.worst == "CA (ALA 2)"
    assert report.summary()["chirality_flips"] == 1


def test_a_peptide_bond_turned_to_cis(reference, ala2_positions):
    cis = turned(ala2_positions, C_ACE, N_ALA, np.arange(7, 22), np.pi)
    report = check_structure(reference, cis[None])
    assert report.cis_trans.per_frame.tolist() == [1]
    assert report.cis_trans.worst == "CH3-C-N-CA (ACE 1)"
    assert {"bond length outliers", "angle outliers", "chirality flips"}.isdisjoint(found(report))
    # ψ turned by as much is no defect of that kind.
    free = turned(ala2_positions, CA, 14, np.arange(15, 22), np.pi)
    assert check_structure(reference, free[None]).cis_trans.share == 0


def test_a_stretched_bond(reference, ala2_positions):
    step = ala2_positions[O_ACE] - ala2_positions[C_ACE]
    length = np.linalg.norm(step)
    for factor, expected in ((3, {}), (9, {"bond length outliers": 1})):
        moved = ala2_positions.copy()
        # A bond of two atoms with isotropic noise σ fluctuates by √2 σ.
        moved[O_ACE] += factor * np.sqrt(2) * NOISE_A * step / length
        report = check_structure(reference, moved[None])
        assert found(report) == expected
    assert report.bonds.worst == "C-O (ACE 1)"
    assert np.isnan(report.bond_sd_ratio).all()


def test_a_bent_angle_and_a_rigid_bond(ala2_topology, ala2_positions):
    """A reference of two equal frames: everything is rigid, yet rounding is no outlier."""
    rigid = StructureReference.from_frames(ala2_topology, np.repeat(ala2_positions[None], 2, 0))
    assert check_structure(rigid, ala2_positions + 1e-4).sound.all()
    bent = turned(ala2_positions, C_ACE, N_ALA, np.array([H_ALA]), 0.0)
    axis = np.cross(ala2_positions[C_ACE] - ala2_positions[N_ALA], bent[H_ALA] - bent[N_ALA])
    axis /= np.linalg.norm(axis)
    arm = bent[H_ALA] - bent[N_ALA]
    bent[H_ALA] = bent[N_ALA] + arm * np.cos(0.1) + np.cross(axis, arm) * np.sin(0.1)
    report = check_structure(rigid, bent[None])
    assert found(report) == {"angle outliers": 2}  # at C and at CA
    assert check_structure(rigid, np.stack([ala2_positions] * 3)).bond_sd_ratio.tolist() == [
        1.0
    ] * len(report.bond_types)


def test_spread_of_bonds_against_the_reference(reference, ala2_topology, ala2_positions):
    """One bond gets 2.5 times its spread; others keep theirs."""
    frames = shaken(ala2_positions, 4000, seed=2)
    axis = ala2_positions[O_ACE] - ala2_positions[C_ACE]
    axis /= np.linalg.norm(axis)
    extra = np.random.default_rng(3).normal(scale=NOISE_A, size=(4000, 1))
    frames[:, O_ACE] += np.sqrt(2 * (2.5**2 - 1)) * extra * axis
    i, j = ala2_topology.bonds.T
    both = [(C_ACE, O_ACE), (14, 15)]  # the type C-O holds two bonds
    wide = check_structure(reference, frames)
    rows = [ala2_topology.bonds.tolist().index(list(pair)) for pair in both]
    ours = np.linalg.norm(frames[:, i] - frames[:, j], axis=-1).var(0, ddof=1)[rows]
    assert wide.spread_of("C-O") == pytest.approx(
        np.sqrt(ours.mean() / np.mean(reference.bond_sd[rows] ** 2)), rel=1e-4
    )
    assert wide.spread_of("C-O") == pytest.approx(np.sqrt((2.5**2 + 1) / 2), rel=0.1)
    assert wide.summary()["bond_sd_ratio_worst"] == wide.spread_of("C-O")


def test_a_clash(reference, ala2_positions):
    moved = np.stack([ala2_positions, ala2_positions])
    # The last hydrogen of NME goes next to a hydrogen of ACE, 0.7 Å away.
    moved[1, 21] = moved[1, 0] + [0.0, -0.7, 0.0]
    report = check_structure(reference, moved)
    assert report.clashes.per_frame.tolist() == [0, 1]
    assert report.clashes.worst == "H1 (ACE 1) and H3 (NME 3)"
    assert report.clash_residues.per_frame.tolist() == [0, 2]
    assert report.clash_residues.share == pytest.approx(2 / 3 / 2)
    assert report.smallest_distance_A[1] == pytest.approx(0.7)
    assert report.sound.tolist() == [True, False]
    assert check_structure(reference, moved, clash_A=0.6).clashes.share == 0


def test_a_clash_across_the_box():
    topology = molecule([(0, 1), (2, 3)])
    x = np.array([[0.3, 5, 5], [1.5, 5, 5], [9.6, 5, 5], [8.4, 5, 5]])
    frames = np.stack([x, x + 0.01])
    reference = StructureReference.from_frames(topology, frames)
    assert check_structure(reference, frames).sound.all()
    for box in (np.array([10, 10, 10, 90, 90, 90]), np.tile([10, 12, 14, 80, 90, 90], (2, 1))):
        report = check_structure(reference, frames, box)
        assert report.clashes.per_frame.tolist() == [1, 1]
        np.testing.assert_allclose(report.smallest_distance_A, 0.7, atol=1e-5)


def test_a_molecule_broken_by_the_box_is_whole_to_the_check(ala2_topology, ala2_positions):
    box = np.array([14.0, 15.0, 16.0, 90, 90, 90])
    frames = shaken(ala2_positions, 50)
    broken = frames % box[:3]
    assert np.abs(broken - frames).max() > 10
    reference = StructureReference.from_frames(ala2_topology, broken, box)
    report = check_structure(reference, broken, box)
    assert report.sound.all()
    mirrored = ((-ala2_positions) % box[:3])[None]
    assert found(check_structure(reference, mirrored, box)) == {"chirality flips": 1}


def test_close_pairs_are_those_of_all_distances(rng):
    x = rng.uniform(0, 8, (7, 40, 3))
    pairs = close_pairs(x, 1.5)
    distance = np.linalg.norm(x[:, :, None] - x[:, None], axis=-1)
    frame, i, j = np.nonzero(np.triu(distance < 1.5, 1))
    order = np.lexsort((pairs.second, pairs.first, pairs.frame))
    np.testing.assert_array_equal(pairs.frame[order], frame)
    np.testing.assert_array_equal(pairs.first[order], i)
    np.testing.assert_array_equal(pairs.second[order], j)
    np.testing.assert_allclose(pairs.distance[order], distance[frame, i, j])


# ----------------------------------------------------------------------- rings


def ring_bonds(start, n):
    return [(start + k, start + (k + 1) % n) for k in range(n)]


def hexagon(radius=1.4):
    angle = np.arange(6) * np.pi / 3
    return radius * np.stack([np.cos(angle), np.sin(angle), 0 * angle], axis=1)


@pytest.mark.parametrize(
    ("bonds", "sizes"),
    [
        ([(0, 1), (1, 2), (2, 3)], []),
        (ring_bonds(0, 3), [3]),
        ([*ring_bonds(0, 8), (0, 8), (8, 9)], [8]),
        (ring_bonds(0, 9), []),
        ([*ring_bonds(0, 6), (5, 6), (6, 7), (7, 8), (8, 9), (9, 0)], [6, 6]),  # naphthalene
        (
            [*ring_bonds(0, 6), (5, 6), (6, 7), (7, 8), (8, 0)],
            [5, 6],
        ),  # indole
        ([*ring_bonds(0, 5), (4, 5), *ring_bonds(5, 5)], [5, 5]),  # two rings on a chain
        ([*ring_bonds(0, 6), (0, 6), (6, 3)], [5, 5]),  # norbornane: smallest rings only
    ],
)
def test_small_rings(bonds, sizes):
    topology = molecule(bonds)
    rings = small_rings(topology)
    assert sorted(len(set(ring)) for ring in rings.tolist()) == sizes
    bonded = {frozenset(bond) for bond in topology.bonds.tolist()}
    for ring in rings:
        atoms = list(dict.fromkeys(ring.tolist()))
        assert all({a, b} in bonded for a, b in zip(atoms, atoms[1:] + atoms[:1], strict=True))


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ([[0, 0, -0.7], [0, 0, 0.8]], 1),  # straight through the centre
        ([[0.5, 0.3, -0.4], [-0.2, 0.6, 1.0]], 1),
        ([[0, 0, 0.3], [0, 0, 1.8]], 0),  # above
        ([[2.0, 0, -0.7], [2.0, 0.1, 0.7]], 0),  # beside
        ([[-0.7, 0, 0.2], [0.7, 0, 0.2]], 0),  # parallel
        ([[0, 1.3, -0.7], [0, 1.3, 0.7]], 0),  # outside an edge, inside the corners' circle
    ],
)
def test_a_bond_through_a_ring(ends, expected):
    topology = molecule([*ring_bonds(0, 6), (6, 7)])
    away = np.concatenate([hexagon(), [[5, 0, 0], [5, 0, 1.5]]])
    reference = StructureReference.from_frames(topology, np.stack([away, away]))
    assert check_structure(reference, away).piercings.share == 0
    x = away.copy()
    x[6:] = ends
    report = check_structure(reference, x)
    assert report.piercings.per_frame.tolist() == [expected]
    shift = np.array([4.9, 4.8, 9.7])  # broken by the box, in a triclinic one as well
    for box in ([10, 10, 10, 90, 90, 90], [10, 11, 12, 75, 80, 85]):
        cell = np.array(box, dtype=float)
        moved = x + shift
        moved[6:] -= [0, 0, cell[2]] if box[3] == 90 else [cell[0], 0, 0]
        assert check_structure(reference, moved, cell).piercings.per_frame.tolist() == [expected]
    if expected:
        assert report.piercings.worst.startswith("C-C (MOL 1) through C-C-C-C-C-C")


def test_two_interlocked_rings():
    topology = molecule([*ring_bonds(0, 6), *ring_bonds(6, 6)])
    apart = np.concatenate([hexagon(), hexagon() + np.array([9.0, 0, 0])])
    reference = StructureReference.from_frames(topology, np.stack([apart, apart]))
    assert check_structure(reference, apart).sound.all()
    upright = hexagon()[:, [0, 2, 1]] + [1.4 * 0.9, 0.1, 0]
    report = check_structure(reference, np.concatenate([hexagon(), upright]))
    assert report.piercings.per_frame.tolist() == [2]


def test_piercings_are_those_of_a_fan_of_triangles(rng):
    """Random bonds and a puckered ring, against parity of crossed triangles, one at a time."""
    n = 300
    ring = hexagon()
    ring[:, 2] += [0.15, -0.1, 0.1, -0.15, 0.1, -0.1]
    ends = rng.uniform(-1.8, 1.8, (n, 2, 3))
    frames = np.concatenate([np.repeat(ring[None], n, 0), ends], axis=1)
    rings = small_rings(molecule([*ring_bonds(0, 6), (6, 7)]))
    hit = ring_piercings(frames, rings, np.array([[6, 7]])).frame

    def crosses(p, q):
        count = 0
        for a, b in zip(ring, np.roll(ring, -1, axis=0), strict=True):
            matrix = np.stack([a - ring.mean(0), b - ring.mean(0), p - q], axis=1)
            u, v, t = np.linalg.solve(matrix, p - ring.mean(0))
            count += u > 0 and v > 0 and u + v < 1 and 0 < t < 1
        return count % 2 == 1

    expected = np.array([crosses(p, q) for p, q in ends])
    assert 20 < expected.sum() < 150
    got = np.isin(np.arange(n), hit)
    # The faces differ where the ring is puckered: ends between them, a few in a hundred.
    assert np.mean(got != expected) < 0.03


# ---------------------------------------------------------------------- errors


def test_dihedrals_have_the_sign_of_iupac():
    x = np.array([[[0.0, 1, 0], [0, 0, 0], [1, 0, 0], [1, np.cos(0.5), np.sin(0.5)]]])
    value = measured(x, np.array([[0, 1, 2, 3]]))
    np.testing.assert_allclose(np.abs(value), 0.5, atol=1e-6)
    assert value[0, 0] > 0  # clockwise, seen along the bond from the front


def test_errors_name_the_cause(reference, ala2_topology, ala2_positions):
    with pytest.raises(ValueError, match="at least two reference frames"):
        StructureReference.from_frames(ala2_topology, ala2_positions)
    loose = Topology(names=("A", "B"), masses=(1, 1))
    with pytest.raises(ValueError, match="no bonds"):
        StructureReference.from_frames(loose, np.zeros((3, 2, 3)))
    with pytest.raises(ValueError, match=r"expected positions of shape \(n_frames, 22, 3\)"):
        check_structure(reference, np.zeros((4, 21, 3)))
    with pytest.raises(ValueError, match="1 of 2 frames hold positions that are NaN"):
        check_structure(reference, np.stack([ala2_positions, ala2_positions * np.nan]))
    with pytest.raises(ValueError, match="expected a box"):
        check_structure(reference, ala2_positions, box=np.ones(3))


def test_the_table_names_what_is_wrong(reference, ala2_positions):
    frames = np.stack([ala2_positions, ala2_positions * [-1, 1, 1]])
    rows = {row[0]: row[1:] for row in check_structure(reference, frames).rows()}
    assert rows["chirality flips"] == ("1", "50.000%", "50.00%", "CA (ALA 2)")
    assert rows["bond length outliers"] == ("21", "0.000%", "0.00%", "")
    assert rows["any of these"][2] == "50.00%"
    assert "bonds through rings" not in rows  # there is no ring
