"""Both models, trained, against a harmonic molecule that is known in closed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from free_molecule import FreeMolecule
from linear_gaussian import GaussianBackmapper
from scipy.spatial.transform import Rotation

from ccg_ase import ForceField
from ccg_ase.units import thermal_energy
from ccg_mda import Backmapper
from ccg_mda.weights import effective_sample_size
from ccg_training.estimators import log_partition, mean_force, thermodynamics
from ccg_training.fit_flow import LIKELIHOOD_ONLY, FlowFrames, FlowLoss, fit_flow, mean_nll
from ccg_training.fit_forcefield import FitSettings, fit_force_field
from ccg_training.labels import Labels
from ccg_training.reconstruction import Samples, reconstruct

TEMPERATURE_K = 300.0
KT = thermal_energy(TEMPERATURE_K)


@pytest.fixture(scope="module")
def molecule() -> FreeMolecule:
    return FreeMolecule()


@pytest.fixture(scope="module")
def flow(molecule) -> Backmapper:
    """Return a backmapper that has learned the molecule from 6000 frames and their forces."""
    rng = np.random.default_rng(0)
    beads = molecule.states(6000, rng)
    x = molecule.atoms(beads, rng)
    energy, forces = molecule(x)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        flow = Backmapper.from_data(
            molecule.cg_map, TEMPERATURE_K, torch.from_numpy(x), width=16, hops=4
        )
    every = np.ones(len(x))
    frames = FlowFrames(
        x, every, forces, energy, molecule.mean_force(beads), molecule.free_energy(beads)
    )
    settings = {"seed": 0, "learning_rate": 4e-3}
    fit_flow(flow, frames, terms=LIKELIHOOD_ONLY, steps=400, batch_size=256, **settings)
    fit_flow(flow, frames, terms=FlowLoss(), steps=120, batch_size=64, **settings)
    return flow


@pytest.fixture(scope="module")
def samples(molecule, flow) -> Samples:
    rng = np.random.default_rng(1)
    return reconstruct(flow, molecule, molecule.states(240, rng), 256, rng)


def test_the_molecule_is_invariant_and_its_answers_are_consistent(molecule):
    rng = np.random.default_rng(2)
    beads = molecule.states(3, rng)
    turn = Rotation.from_rotvec([1.0, 2.0, -0.5]).as_matrix()
    moved = beads @ turn.T + [1.0, -2.0, 3.0]
    np.testing.assert_allclose(molecule.free_energy(moved), molecule.free_energy(beads))
    np.testing.assert_allclose(
        molecule.mean_force(moved), molecule.mean_force(beads) @ turn.T, atol=1e-9
    )
    exact = GaussianBackmapper(molecule)
    drawn = reconstruct(exact, molecule, beads, 4, rng)
    expected = np.broadcast_to(molecule.log_partition(beads)[:, None], (3, 4))
    np.testing.assert_allclose(drawn.log_weight, expected, atol=1e-8)


def test_the_flow_has_learned_the_density(molecule, flow, samples):
    rng = np.random.default_rng(3)
    beads = molecule.states(500, rng)
    x = molecule.atoms(beads, rng)
    exact = GaussianBackmapper(molecule)(torch.from_numpy(beads)).log_prob(torch.from_numpy(x))
    assert 0 < mean_nll(flow, x) + exact.mean().item() < 0.25  # nats, of twelve coordinates
    assert effective_sample_size(samples.log_weight, axis=1).mean() > 0.7


def z_of(estimate, truth) -> np.ndarray:
    return (estimate.value - truth) / estimate.error


@pytest.mark.parametrize("quantity", ["log_partition", "mean_force", "entropy"])
def test_estimates_hold_within_their_own_errors(molecule, samples, quantity):
    if quantity == "log_partition":
        z = z_of(log_partition(samples.log_weight), molecule.log_partition(samples.beads))
    elif quantity == "mean_force":
        estimate = mean_force(samples.log_weight, samples.labels)
        z = z_of(estimate, molecule.mean_force(samples.beads))
        assert estimate.error.mean() < 0.02 * molecule.mean_force(samples.beads).std()
    else:
        parts = thermodynamics(samples.log_weight, samples.energy, TEMPERATURE_K)
        z = z_of(parts.entropy, molecule.entropy(samples.beads))
    assert np.abs(z).max() < 4.5
    assert abs(z.mean()) < 4 / np.sqrt(len(samples.beads))
    assert np.mean(z**2) == pytest.approx(1.0, abs=4 * np.sqrt(2 / len(samples.beads)))


def test_the_force_field_learns_the_free_energy_from_the_flow(molecule, flow):
    rng = np.random.default_rng(4)
    beads = molecule.states(400, rng)
    labels = Labels.from_samples(reconstruct(flow, molecule, beads, 128, rng))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        force_field = ForceField.from_data(
            molecule.cg_map, TEMPERATURE_K, beads, channels=4, n_layers=1
        )
    settings = FitSettings(steps=500, batch_size=64, learning_rate=1e-2, evaluate_every=50)
    result = fit_force_field(force_field, *labels.split(), settings)
    beads = molecule.states(400, rng)
    energy, force = force_field.energy_and_forces(torch.from_numpy(beads).float())
    truth = molecule.free_energy(beads)
    error = (energy.double().numpy() + result["shift_eV"] - truth) / KT
    assert np.std(truth) / KT > 3
    assert np.sqrt(np.mean(error**2)) < 0.3
    rest = np.sqrt(np.mean((force.numpy() - molecule.mean_force(beads)) ** 2))
    assert rest < 0.1 * molecule.mean_force(beads).std()
