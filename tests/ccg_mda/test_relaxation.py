"""Minimisation at fixed beads against linear algebra."""

import numpy as np
import pytest
import torch
from molecules import GaussianBackmapper, dipeptide, slice_map

from ccg_ase.mapping import CGMap
from ccg_mda.potential import TorchPotential
from ccg_mda.relaxation import relax
from ccg_mda.transformation import Backmap, backmap
from ccg_mda.universe import cg_map, coarse_grain

N_ATOMS = 22


@pytest.fixture(scope="module")
def hessian():
    root = np.random.default_rng(3).normal(size=(3 * N_ATOMS, 3 * N_ATOMS)) / 10
    return root @ root.T + 0.3 * np.eye(3 * N_ATOMS)


def quadratic(hessian):
    matrix = torch.from_numpy(hessian)
    return TorchPotential(lambda x: 0.5 * x.flatten() @ matrix @ x.flatten(), N_ATOMS)


def overlapping():
    """Beads that share atoms."""
    matrix = np.zeros((2, N_ATOMS))
    matrix[0, :6], matrix[1, 4:12] = 1 / 6, 1 / 8
    return CGMap.from_matrix(slice_map().atoms, matrix)


@pytest.mark.parametrize("kind", ["slice", "mass", "shared"])
def test_minimum_at_fixed_beads_is_that_of_linear_algebra(kind, hessian):
    the_map = {
        "slice": slice_map,
        "mass": lambda: cg_map(dipeptide(), "residue-com"),
        "shared": overlapping,
    }[kind]()
    positions = np.random.default_rng(1).normal(size=(N_ATOMS, 3))
    found, energy, forces = relax(
        quadratic(hessian), the_map, positions, 2000, force_tolerance_eV_A=1e-7
    )
    np.testing.assert_allclose(the_map.apply(found), the_map.apply(positions), atol=1e-13)
    # Lagrange: H x = Mᵀ λ, M x = s.
    m = np.kron(the_map.matrix.toarray(), np.eye(3))
    system = np.block([[hessian, -m.T], [m, np.zeros((len(m), len(m)))]])
    right = np.concatenate([np.zeros(3 * N_ATOMS), m @ positions.ravel()])
    exact = np.linalg.solve(system, right)[: 3 * N_ATOMS]
    np.testing.assert_allclose(found.ravel(), exact, atol=2e-6)
    assert energy == pytest.approx(0.5 * exact @ hessian @ exact, abs=1e-9)
    np.testing.assert_allclose(forces.ravel(), -hessian @ found.ravel(), atol=1e-12)


def test_steps_are_at_most_so_many_and_a_clash_stays(hessian):
    potential, positions = quadratic(hessian), np.random.default_rng(1).normal(size=(N_ATOMS, 3))
    start = float(potential(positions)[0])
    potential.n_calls = 0
    _, energy, _ = relax(potential, slice_map(), positions, 5)
    assert potential.n_calls <= 7
    assert energy < start
    clash = TorchPotential(lambda x: (x.sum() * 0).log().neg(), N_ATOMS)
    found, energy, forces = relax(clash, slice_map(), positions, 5)
    np.testing.assert_array_equal(found, positions)
    assert energy == np.inf
    assert not forces.any()


def test_a_relaxed_universe_has_lower_energies_at_the_same_beads_and_no_weights(hessian):
    model, potential = GaussianBackmapper(slice_map()), quadratic(hessian)
    u_cg = coarse_grain(dipeptide(6), model.cg_map)
    plain = backmap(u_cg, model, potential=potential)
    relaxed = backmap(u_cg, model, potential=potential, relax=10)
    for before, after in zip(plain.trajectory, relaxed.trajectory, strict=True):
        assert after.data["energy"] < before.data["energy"]
        assert not {"log_prob", "log_weight"} & set(after.data)
        np.testing.assert_array_equal(
            after.positions[model.cg_map.bead_atoms], after.data["beads"].astype(np.float32)
        )
    calls = potential.n_calls
    relaxed.trajectory[5]
    assert potential.n_calls == calls  # kept


@pytest.mark.parametrize(("relax_steps", "message"), [(3, "needs a potential"), (-1, "got -1")])
def test_relax_needs_a_potential_and_a_number(relax_steps, message):
    with pytest.raises(ValueError, match=message):
        Backmap(GaussianBackmapper(slice_map()), relax=relax_steps)
