"""Estimators against the closed forms of the linear-Gaussian molecule."""

import numpy as np
import pytest
import torch
from linear_gaussian import GaussianBackmapper, LinearGaussian

from ccg_mda.bounds import sandwich
from ccg_mda.two_level import TwoLevelWeights
from ccg_mda.weights import effective_sample_size, log_mean_exp, weighted_average
from ccg_training.estimators import (
    at_temperature,
    free_energy,
    label_variance,
    log_partition,
    mean_force,
    thermodynamics,
    to_kJ_per_mol,
    typical,
)
from ccg_training.reconstruction import pull_back, pull_back_frames, reconstruct

S, K = 300, 64
KT = 300.0 * 8.617333262e-5
DISTORTION = {"shift": 0.08, "scale": 1.04, "bend": 0.06, "stretch": 0.03}


def of_arrays(log_weight, free_energy_eV):
    """Two-level weights of (S, K) samples."""
    n_states, n_samples = log_weight.shape
    bead = np.repeat(np.arange(n_states), n_samples)
    return TwoLevelWeights.combine(log_weight.ravel(), bead, free_energy_eV / KT)


@pytest.fixture(scope="module")
def molecule():
    return LinearGaussian()


@pytest.fixture(scope="module")
def flow(molecule):
    return GaussianBackmapper(molecule, **DISTORTION)


@pytest.fixture(scope="module")
def beads(molecule):
    return molecule.sample_beads(S, np.random.default_rng(1))


@pytest.fixture(scope="module")
def samples(molecule, flow, beads):
    return reconstruct(flow, molecule, beads, K, np.random.default_rng(2), batch_size=4096)


def assert_calibrated(estimate, truth, *, bias=0.1):
    """z-scores of independent estimates have mean zero and variance one."""
    z = ((estimate.value - truth) / estimate.error).ravel()
    assert abs(z.mean()) < bias + 4 / np.sqrt(S)
    assert 0.85 < z.std() < 1.2
    assert np.mean(np.abs(z) < 3) > 0.985


# --------------------------------------------------------------- samples


def test_samples_carry_what_the_potential_said(molecule, samples, beads):
    assert samples.positions.shape == (S, K, molecule.n_atoms, 3)
    assert samples.n_calls == S * K
    energy, forces = molecule(samples.positions)
    np.testing.assert_allclose(samples.energy, energy, atol=1e-12)
    np.testing.assert_allclose(samples.forces, forces, atol=1e-12)
    restored = molecule.cg_map.apply(samples.positions)
    np.testing.assert_allclose(restored, np.broadcast_to(beads[:, None], restored.shape))
    np.testing.assert_array_equal(samples.slice_labels, molecule.cg_map.apply_forces(forces))


def test_batches_do_not_change_the_result(molecule, flow, beads):
    few = [
        reconstruct(flow, molecule, beads[:5], 7, np.random.default_rng(0), batch_size=size)
        for size in (3, 1000)
    ]
    np.testing.assert_allclose(few[0].labels, few[1].labels, atol=1e-12)
    np.testing.assert_allclose(few[0].log_weight, few[1].log_weight, atol=1e-12)


def test_label_is_the_gradient_of_log_z_at_fixed_noise(molecule, flow, beads):
    few, step = beads[:3], 1e-5
    noise = flow.sample_noise(np.random.default_rng(3), (8, len(few)))

    def log_z(states):
        return log_mean_exp(pull_back(flow, molecule, states, noise).log_weight, axis=1)[0]

    here = pull_back(flow, molecule, few, noise)
    label = mean_force(here.log_weight, here.labels).value
    numerical = np.empty_like(label)
    for index in np.ndindex(label.shape[1:]):
        shift = np.zeros(few.shape[1:])
        shift[index] = step
        numerical[(slice(None), *index)] = (log_z(few + shift) - log_z(few - shift)) / (2 * step)
    np.testing.assert_allclose(label, molecule.kT() * numerical, atol=1e-6)


def test_exact_flow_has_labels_without_scatter(molecule, beads):
    exact = reconstruct(
        GaussianBackmapper(molecule), molecule, beads[:9], 5, np.random.default_rng(4)
    )
    truth = np.broadcast_to(molecule.mean_force(beads[:9])[:, None], exact.labels.shape)
    np.testing.assert_allclose(exact.labels, truth, atol=1e-11)
    log_z = np.broadcast_to(molecule.log_partition(beads[:9])[:, None], (9, 5))
    np.testing.assert_allclose(exact.log_weight, log_z, atol=1e-10)


def test_shapes_that_do_not_fit_are_refused(molecule, flow, beads):
    with pytest.raises(ValueError, match="with one S"):
        pull_back(flow, molecule, beads[:3], torch.zeros(2, 4, flow.n_dof))


# ------------------------------------------------------------- fixed s


def test_log_partition_value_error_and_ess(molecule, flow, beads, samples):
    assert_calibrated(log_partition(samples.log_weight), molecule.log_partition(beads))
    ess = effective_sample_size(samples.log_weight)
    assert ess.mean() == pytest.approx(flow.ess(beads).mean(), abs=0.03)
    F = free_energy(samples.log_weight, 300.0)
    assert_calibrated(F, molecule.free_energy(beads))


def test_first_order_bias_of_log_z_is_corrected(molecule):
    poor = GaussianBackmapper(molecule, shift=0.2)
    state = np.repeat(molecule.sample_beads(1, np.random.default_rng(5)), 4000, axis=0)
    n_samples = 8
    drawn = reconstruct(poor, molecule, state, n_samples, np.random.default_rng(6), batch_size=8192)
    truth = molecule.log_partition(state)[0]
    raw = log_mean_exp(drawn.log_weight, axis=1)[0].mean() - truth
    predicted = -(1 / poor.ess(state)[0] - 1) / (2 * n_samples)
    noise = log_partition(drawn.log_weight).error.mean() / np.sqrt(len(state))
    assert raw == pytest.approx(predicted, rel=0.3)
    corrected = log_partition(drawn.log_weight).value.mean() - truth
    assert abs(corrected) < 0.2 * abs(predicted) + 3 * noise


@pytest.mark.parametrize("kind", ["labels", "slice_labels"])
def test_mean_force_from_weighted_samples(molecule, beads, samples, kind):
    estimate = mean_force(samples.log_weight, getattr(samples, kind))
    assert_calibrated(estimate, molecule.mean_force(beads))


def test_label_variances(molecule, beads, samples):
    sliced = label_variance(samples.log_weight, samples.slice_labels)
    assert sliced.mean() == pytest.approx(molecule.slice_force_variance().mean(), rel=0.03)
    pulled = label_variance(samples.log_weight, samples.labels)
    assert pulled.mean() < 0.2 * sliced.mean()
    assert to_kJ_per_mol(1.0) == pytest.approx(96.4853**2, rel=1e-5)


def test_energy_and_entropy(molecule, beads, samples):
    result = thermodynamics(samples.log_weight, samples.energy, 300.0)
    assert_calibrated(result.free_energy, molecule.free_energy(beads))
    assert_calibrated(result.energy, molecule.mean_energy(beads))
    assert_calibrated(result.entropy, molecule.entropy(beads))


@pytest.mark.parametrize("temperature_K", [285.0, 315.0])
def test_another_temperature(molecule, beads, samples, temperature_K):
    weights = at_temperature(samples.log_weight, samples.energy, 300.0, temperature_K)
    result = thermodynamics(weights, samples.energy, temperature_K)
    assert_calibrated(result.free_energy, molecule.free_energy(beads, temperature_K))
    assert_calibrated(result.energy, molecule.mean_energy(beads, temperature_K))


def test_samples_without_weight():
    rng = np.random.default_rng(0)
    log_weight = rng.normal(size=(2, 6))
    energy = rng.normal(size=(2, 6))
    log_weight[0, 0], energy[0, 0] = -np.inf, np.inf
    log_weight[1], energy[1] = -np.inf, np.inf
    log_z = log_partition(log_weight)
    assert np.isfinite(log_z.value[0])
    assert log_z.value[1] == -np.inf
    assert log_z.error[1] == np.inf
    result = thermodynamics(log_weight[:1], energy[:1], 300.0)
    assert np.isfinite(result.energy.value).all()
    assert np.isnan(mean_force(log_weight, rng.normal(size=(2, 6, 4, 3))).error[1]).all()
    assert np.isnan(label_variance(log_weight, np.ones((2, 6, 4, 3)))[1])
    weights = of_arrays(log_weight, np.zeros(2))
    assert np.isfinite(weights.average(energy.ravel(), n_blocks=2)).all()
    bounds = sandwich(log_weight, rng.normal(size=(2, 1)))
    assert (bounds.lower.value == -np.inf).all()
    warmer = at_temperature(log_weight, energy, 300.0, 320.0)
    np.testing.assert_array_equal(np.isneginf(warmer), np.isneginf(log_weight))


def test_a_typical_value_leaves_out_what_is_not_finite():
    assert typical(np.array([np.nan, 3.0, np.inf, 1.0, 2.0, -np.inf])) == 2.0
    assert np.isnan(typical(np.array([np.nan, np.inf])))


def test_one_sample_has_no_error():
    with pytest.raises(ValueError, match="K >= 2"):
        mean_force(np.zeros((3, 1)), np.zeros((3, 1, 2, 3)))
    with pytest.raises(ValueError, match="K >= 2"):
        log_partition(np.zeros((3, 1)))


# --------------------------------------------------------------- frames


def test_frames_give_unweighted_labels(molecule, flow):
    frames = molecule.sample(4000, np.random.default_rng(7))
    energy, forces = molecule(frames)
    labelled = pull_back_frames(flow, frames, energy, forces)
    assert labelled.n_calls == 0
    assert labelled.labels.shape == (4000, 1, 4, 3)
    np.testing.assert_allclose(labelled.positions[:, 0], frames, atol=1e-10)
    residual = labelled.labels[:, 0] - molecule.mean_force(labelled.beads)
    z = residual.mean(0) / (residual.std(0) / np.sqrt(4000))
    assert np.abs(z).max() < 4
    sliced = labelled.slice_labels[:, 0] - molecule.mean_force(labelled.beads)
    assert residual.var() < 0.3 * sliced.var()


def test_frames_the_flow_does_not_cover_are_refused(molecule, flow):
    class Folding(GaussianBackmapper):
        def forward(self, beads):
            distribution = super().forward(beads)
            exact = distribution.noise_from
            distribution.noise_from = lambda x: exact(x).clamp(-1, 1)
            return distribution

    frames = molecule.sample(50, np.random.default_rng(8))
    with pytest.raises(ValueError, match="doesn't cover"):
        pull_back_frames(Folding(molecule), frames, *molecule(frames))


def test_sandwich_is_the_two_divergences(molecule, flow):
    frames = molecule.sample(1500, np.random.default_rng(9))
    at_frames = pull_back_frames(flow, frames, *molecule(frames))
    states = at_frames.beads
    drawn = reconstruct(flow, molecule, states, 24, np.random.default_rng(10))
    bounds = sandwich(drawn.log_weight, at_frames.log_weight)
    truth = molecule.log_partition(states)
    assert_calibrated(bounds.lower, truth - flow.reverse_kl(states))
    assert np.isnan(bounds.upper.error).all()
    for estimate, exact in (
        (bounds.reverse_kl, flow.reverse_kl(states).mean()),
        (bounds.forward_kl, flow.forward_kl(states).mean()),
        (bounds.gap, (flow.reverse_kl(states) + flow.forward_kl(states)).mean()),
    ):
        assert abs(estimate.value - exact) < 4 * estimate.error
        assert estimate.error < 0.2 * exact
    with pytest.raises(ValueError, match="need frames"):
        sandwich(drawn.log_weight, at_frames.log_weight[:3])


# ------------------------------------------------------------ two levels


@pytest.fixture(scope="module")
def wrong_force_field(molecule):
    """Bead dynamics on a potential that is too soft, and tilted: s ~ N(s0 + a, kT/B)."""
    stiffness = 0.9 * molecule.schur
    offset = 0.03 * np.random.default_rng(11).normal(size=len(stiffness))
    s0 = molecule.x0.ravel()[molecule.bead_dof]

    def free_energy_model(beads):
        delta = beads.reshape(len(beads), -1) - s0 - offset
        return 0.5 * np.einsum("si,ij,sj->s", delta, stiffness, delta)

    def draw(n, rng):
        root = np.linalg.cholesky(stiffness)
        noise = rng.normal(size=(len(s0), n)) * np.sqrt(molecule.kT())
        return (s0 + offset + np.linalg.solve(root.T, noise).T).reshape(n, -1, 3)

    kT, n = molecule.kT(), len(s0)
    log_z = 0.5 * (n * np.log(2 * np.pi * kT) - np.linalg.slogdet(stiffness)[1])
    return free_energy_model, draw, log_z


@pytest.mark.parametrize("n_samples", [1, 4])
def test_two_level_reweighting_is_exact(molecule, flow, wrong_force_field, n_samples):
    free_energy_model, draw, log_z_cg = wrong_force_field
    truth = 0.5 * 3 * molecule.n_atoms * molecule.kT()  # equipartition: E[U]
    z_scores, plain = [], []
    for repeat in range(25):
        rng = np.random.default_rng((12, repeat))
        states = draw(800, rng)
        drawn = reconstruct(flow, molecule, states, n_samples, rng, batch_size=4096)
        weights = of_arrays(drawn.log_weight, free_energy_model(states))
        mean, error = weights.average(drawn.energy.ravel())
        z_scores.append((mean - truth) / error)
        plain.append(drawn.energy.mean() - truth)
        exact = molecule.log_partition_all() - log_z_cg
        assert abs(weights.log_ratio - exact) < 5 / np.sqrt(800 * weights.ess_beads)
    assert abs(np.mean(z_scores)) < 4 / 5
    assert 0.6 < np.std(z_scores) < 1.5
    assert np.abs(np.mean(plain)) > 3 * np.std(plain) / 5  # without weights it is off


def test_product_of_effective_sample_sizes_is_exact():
    rng = np.random.default_rng(13)
    log_weight, F = rng.normal(size=(50, 8)), rng.normal(size=50) * 0.02
    weights = of_arrays(log_weight, F)
    within = np.exp(log_weight) / np.exp(log_weight).sum(1, keepdims=True)
    square = np.exp(2 * weights.log_bead_weights)
    harmonic = square.sum() / (square * 8 * (within**2).sum(1)).sum()
    assert weights.ess_atoms == pytest.approx(harmonic, rel=1e-10)
    values = rng.normal(size=(50, 8, 3))
    mean, error = weights.average(values.reshape(400, 3), n_blocks=5)
    per_bead = (within[..., None] * values).sum(1)
    expected = weighted_average(per_bead, weights.log_bead_weights, n_blocks=5)
    np.testing.assert_allclose((mean, error), expected, rtol=1e-12)
