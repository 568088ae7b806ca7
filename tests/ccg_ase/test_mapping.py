import json
import pickle

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array

from ccg_ase import CGMap, Topology

GROUPS = (range(6), range(6, 16), range(16, 22))


@pytest.fixture(params=["slice", "mass", "geometry", "general"])
def any_map(request, ala2_topology):
    if request.param == "slice":
        return CGMap.from_slices(ala2_topology, [4, 6, 8, 14, 16])
    if request.param == "general":
        matrix = np.zeros((2, 22))
        matrix[0, [0, 1, 2]] = 0.5, 0.25, 0.25
        matrix[1, [2, 3]] = 0.9, 0.1
        return CGMap.from_matrix(ala2_topology, matrix)
    return CGMap.from_groups(ala2_topology, GROUPS, weighting=request.param)


def test_kind_and_matrix(any_map, request):
    assert any_map.kind == request.node.callspec.params["any_map"]
    np.testing.assert_allclose(any_map.matrix.sum(axis=1), 1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_apply_is_the_matrix_product(any_map, rng, dtype):
    positions = rng.normal(size=(2, 3, 22, 3)).astype(dtype)
    expected = np.einsum("ba,...ax->...bx", any_map.matrix.toarray(), positions)
    beads = any_map.apply(positions)
    assert beads.dtype == dtype
    np.testing.assert_allclose(beads, expected, atol=10 * np.finfo(dtype).eps)
    tensor = any_map.apply(torch.tensor(positions, requires_grad=True))
    assert tensor.requires_grad
    assert tensor.dtype == torch.tensor(positions).dtype
    np.testing.assert_allclose(tensor.detach(), expected, atol=10 * np.finfo(dtype).eps)


def test_centre_of_mass_matches_ase(ala2_topology, ala2_positions):
    from ase import Atoms

    cg_map = CGMap.from_groups(ala2_topology, GROUPS)
    atoms = Atoms(ala2_topology.elements, ala2_positions)
    for group, bead in zip(GROUPS, cg_map.apply(ala2_positions), strict=True):
        np.testing.assert_allclose(bead, atoms[list(group)].get_center_of_mass(), atol=1e-12)


def test_beads_of_slices(ala2_map, ala2_topology):
    beads = ala2_map.beads
    assert beads.names == ("C", "N", "CA", "C", "N")
    assert beads.types == ("ACE:C", "ALA:N", "ALA:CA", "ALA:C", "NME:N")
    assert beads.bonds.tolist() == [[0, 1], [1, 2], [2, 3], [3, 4]]
    np.testing.assert_array_equal(beads.masses, ala2_topology.masses[[4, 6, 8, 14, 16]])
    # Methyl groups and carbonyl oxygens go with the nearest backbone atom.
    assert ala2_map.owner.tolist() == [0] * 6 + [1, 1] + [2] * 6 + [3, 3] + [4] * 6


def test_owner_ties_and_strangers():
    chain = Topology(names="ABCDE", masses=[1] * 5, bonds=[(0, 1), (1, 2), (3, 4)])
    cg_map = CGMap.from_slices(chain, [2, 0], names=["late", "early"])
    assert cg_map.owner.tolist() == [1, 0, 0, -1, -1]
    assert cg_map.beads.names == ("late", "early")
    assert cg_map.beads.bonds.tolist() == [[0, 1]]


def test_masses(ala2_topology):
    groups = CGMap.from_groups(ala2_topology, GROUPS)
    np.testing.assert_allclose(groups.beads.masses.sum(), ala2_topology.masses.sum())
    # Atom 0 is shared two to one: its mass is, too.
    shared = np.zeros((2, 22))
    shared[0, 0], shared[1, [0, 1]] = 1.0, 0.5
    masses = CGMap.from_matrix(ala2_topology, shared).beads.masses
    m0, m1 = ala2_topology.masses[:2]
    np.testing.assert_allclose(masses, [m0 * 2 / 3, m0 / 3 + m1])


def test_round_trip_and_fingerprint(any_map):
    copy = CGMap.from_dict(json.loads(json.dumps(any_map.to_dict())))
    assert copy == any_map
    assert copy.fingerprint() == any_map.fingerprint()
    assert pickle.loads(pickle.dumps(any_map)) == any_map
    assert CGMap.from_matrix(any_map.atoms, csr_array(any_map.matrix)) == any_map


def test_repeated(any_map, rng):
    """Each copy of the atoms is mapped as the one system is."""
    three = any_map.repeated(3)
    positions = rng.normal(size=(2, 66, 3))
    expected = any_map.apply(positions.reshape(2, 3, 22, 3)).reshape(2, -1, 3)
    np.testing.assert_array_equal(three.apply(positions), expected)
    assert (three.n_atoms, three.n_beads) == (66, 3 * any_map.n_beads)
    assert three.kind == any_map.kind
    assert three.beads == any_map.beads.repeated(3)
    assert any_map.repeated(1) == any_map


def test_fingerprint_is_stable(ala2_topology):
    """Files name maps by fingerprint: it must not change between versions."""
    tiny = CGMap.from_slices(Topology(names="AB", masses=[1, 2], bonds=[(0, 1)]), [0, 1])
    assert tiny.fingerprint() == "75fc85881d15be45"
    assert tiny != CGMap.from_slices(tiny.atoms, [1, 0])


def test_force_map_is_consistent(any_map):
    product = any_map.force_matrix @ any_map.matrix.T
    np.testing.assert_allclose(product.toarray(), np.eye(any_map.n_beads), atol=1e-15)


def test_apply_forces_undoes_the_chain_rule(any_map, rng):
    """A potential of the beads only: B f is minus its gradient in the beads, by differences."""
    n = any_map.n_beads
    root = rng.normal(size=(n, 3, n, 3))
    K = np.einsum("iajb,kcjb->iakc", root, root)
    centre, x, h = rng.normal(size=(n, 3)), rng.normal(size=(2, 22, 3)), 1e-3

    def energy(s):
        return np.einsum("...ia,iakc,...kc->...", s - centre, K, s - centre) / 2

    steps = h * np.eye(66).reshape(66, 1, 22, 3)
    up, down = (energy(any_map.apply(x + sign * steps)) for sign in (1, -1))
    forces = (-(up - down) / (2 * h)).T.reshape(2, 22, 3)
    steps = h * np.eye(3 * n).reshape(-1, 1, n, 3)
    up, down = (energy(any_map.apply(x) + sign * steps) for sign in (1, -1))
    expected = (-(up - down) / (2 * h)).T.reshape(2, n, 3)
    np.testing.assert_allclose(any_map.apply_forces(forces), expected, rtol=1e-6, atol=1e-6)
    tensor = any_map.apply_forces(torch.tensor(forces, dtype=torch.float32))
    assert tensor.dtype == torch.float32
    np.testing.assert_allclose(tensor, expected, rtol=1e-4, atol=1e-3)


def test_forces_that_are_ambiguous(ala2_topology, any_map):
    matrix = np.zeros((2, 22))
    matrix[0, 4], matrix[1, [4, 6]] = 1, 0.5
    matrix[0, [4, 6]] = 0.25, 0.75
    with pytest.raises(ValueError, match=r"bead 0 \(C\) shares each of its atoms"):
        CGMap.from_matrix(ala2_topology, matrix).apply_forces(np.zeros((22, 3)))
    with pytest.raises(ValueError, match="for the atoms of this map"):
        any_map.apply_forces(np.zeros((21, 3)))
    if any_map.kind != "slice":
        with pytest.raises(ValueError, match="slice maps only"):
            _ = any_map.bead_atoms


def test_to_ase(ala2_map, ala2_positions):
    atoms = ala2_map.to_ase(ala2_map.apply(ala2_positions))
    assert atoms.get_chemical_symbols() == ["X"] * 5
    np.testing.assert_array_equal(atoms.get_masses(), ala2_map.beads.masses)
    assert not atoms.pbc.any()
    assert atoms.info["cg_map"] == ala2_map.fingerprint()
    assert atoms.arrays["atomtypes"].tolist() == list(ala2_map.beads.names)


def test_refuses(ala2_topology, ala2_map):
    make = {
        "out of range": lambda: CGMap.from_slices(ala2_topology, [3, 22]),
        "index -1 is out of range": lambda: CGMap.from_slices(ala2_topology, [-1]),
        "as two slice": lambda: CGMap.from_slices(ala2_topology, [3, 3]),
        "holds no atoms": lambda: CGMap.from_groups(ala2_topology, [[1], []]),
        "listed twice": lambda: CGMap.from_groups(ala2_topology, [[1, 1]]),
        "weighting must be": lambda: CGMap.from_groups(ala2_topology, [[1]], weighting="charge"),
        "must be 1": lambda: CGMap.from_matrix(ala2_topology, 0.5 * np.eye(22)),
        "finite and positive": lambda: CGMap.from_matrix(ala2_topology, -np.eye(22)),
        "22 columns": lambda: CGMap.from_matrix(ala2_topology, np.eye(3)),
        "at least one bead": lambda: CGMap.from_slices(ala2_topology, []),
        "bead names": lambda: CGMap.from_slices(ala2_topology, [1], names="AB"),
        "expected shape": lambda: ala2_map.apply(np.zeros((5, 3))),
    }
    for message, call in make.items():
        with pytest.raises(ValueError, match=message):
            call()
    nan = np.eye(22)
    nan[0, 0] = np.nan
    with pytest.raises(ValueError, match="finite and positive"):
        CGMap.from_matrix(ala2_topology, nan)
