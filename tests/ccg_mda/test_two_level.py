import numpy as np
import pytest
from ensembles import HOT, WrongEnsemble

from ccg_mda.averages import WeightedAverage
from ccg_mda.two_level import two_level_weights
from ccg_mda.universe import universe_from
from ccg_mda.weights import effective_sample_size, log_mean_exp, log_weights

T = 300.0
FEW = "ignore:don't trust averages with these weights"


def test_weights_are_those_of_the_ensemble():
    wrong = WrongEnsemble(400, 3, shift=0.2, scale=1.1)
    wrong.universe.trajectory[7]
    weights = two_level_weights(wrong.universe, wrong.free_energy, T)
    assert wrong.universe.trajectory.frame == 7
    expected = log_weights(wrong.universe, free_energy=wrong.free_energy, temperature_K=T)
    np.testing.assert_allclose(weights.log_w, expected, rtol=1e-12)
    given_beads = log_weights(wrong.universe).reshape(400, 3)
    np.testing.assert_allclose(weights.log_z, log_mean_exp(given_beads)[0], rtol=1e-12)
    np.testing.assert_allclose(
        weights.log_bead_weights, log_mean_exp(expected.reshape(400, 3))[0], rtol=1e-12
    )
    np.testing.assert_array_equal(weights.bead, np.repeat(np.arange(400), 3))
    assert weights.ess_beads == pytest.approx(effective_sample_size(weights.log_bead_weights))
    assert weights.ess == pytest.approx(effective_sample_size(expected))
    assert weights.pareto_k < 0.7


def test_closed_forms():
    # With q = p, W is exact; two Gaussians whose variances differ by a factor c in d dimensions
    # have the effective sample size (sqrt(2 c - 1) / c)^d.
    exact = WrongEnsemble(3000, 1)
    weights = two_level_weights(exact.universe, exact.free_energy, T)
    beads = np.array([ts.data["beads"] for ts in exact.universe.trajectory], dtype=float)
    np.testing.assert_allclose(weights.log_z, exact.molecule.log_partition(beads), atol=1e-8)
    assert weights.ess_beads == pytest.approx((np.sqrt(2 * HOT - 1) / HOT) ** 6, rel=0.02)
    assert weights.ess_atoms == pytest.approx(1)
    # The mean of W is the ratio of the partition functions of atoms and beads.
    ratio = exact.molecule.log_partition_all() - exact.log_partition_beads()
    _, variance = log_mean_exp(weights.log_bead_weights)
    assert abs(weights.log_ratio - ratio) < 4 * np.sqrt(variance)
    assert np.sqrt(variance) < 0.01


@pytest.mark.filterwarnings(FEW)
def test_effective_samples_of_the_atoms_in_closed_form():
    wrong = WrongEnsemble(4, 500, shift=0.25, scale=1.2)
    weights = two_level_weights(wrong.universe, wrong.free_energy, T)
    beads = np.array([ts.data["beads"] for ts in wrong.universe.trajectory[::500]], dtype=float)
    assert weights.ess_atoms == pytest.approx(wrong.model.ess(beads).mean(), rel=0.05)


@pytest.mark.filterwarnings(FEW)
def test_any_number_of_samples(tmp_path):
    wrong = WrongEnsemble(40, 3, shift=0.2, scale=1.1)
    kept = np.flatnonzero(np.random.default_rng(2).random(120) < 0.6)
    path = str(tmp_path / "atoms.h5md")
    wrong.universe.atoms.write(path, frames=wrong.universe.trajectory[kept])
    again = universe_from(wrong.model.cg_map.atoms, path)
    weights = two_level_weights(again, wrong.free_energy, T)
    beads, count = np.unique(kept // 3, return_counts=True)
    assert set(count) == {1, 2, 3}
    np.testing.assert_array_equal(beads[weights.bead], kept // 3)
    # E6, written out: the sum over bead frames of W_i times the mean over its own samples.
    given_beads, value = (
        log_weights(again),
        np.array([ts.data["energy"] for ts in again.trajectory]),
    )
    total = norm = 0.0
    for k, bead in enumerate(beads):
        w, v = np.exp(given_beads[kept // 3 == bead] + 10), value[kept // 3 == bead]
        W = np.mean(w) * np.exp(weights.log_bead_weights - weights.log_z)[k]
        total, norm = total + W * np.sum(w * v) / np.sum(w), norm + W
    run = WeightedAverage(energy, again, log_w=weights.log_w).run()
    assert run.results.mean == pytest.approx(total / norm, rel=1e-10)
    mean, _ = weights.average(value)
    assert mean == pytest.approx(total / norm, rel=1e-10)


def energy(atoms):
    return atoms.universe.trajectory.ts.data["energy"]


@pytest.mark.filterwarnings(FEW)
def test_weights_of_the_beads_may_be_given():
    wrong = WrongEnsemble(60, 2, shift=0.2)
    beads = np.array([ts.data["beads"] for ts in wrong.universe.trajectory[::2]], dtype=float)
    given = wrong.free_energy(beads) / wrong.molecule.kT()
    found = two_level_weights(wrong.universe, bead_log_w=given)
    expected = two_level_weights(wrong.universe, wrong.free_energy, T)
    np.testing.assert_allclose(found.log_w, expected.log_w, rtol=1e-12)
    np.testing.assert_allclose(found.log_bead_weights, expected.log_bead_weights, rtol=1e-12)


def test_warning_and_errors():
    wrong = WrongEnsemble(60, 2)
    u = wrong.universe
    log_z = wrong.molecule.log_partition([ts.data["beads"] for ts in u.trajectory[::2]])
    log_w = np.r_[np.zeros(20), np.full(40, -np.inf)] - log_z
    with pytest.warns(UserWarning, match=r"20\.0 effective bead frames of 60 are fewer than 50"):
        two_level_weights(u, bead_log_w=log_w)
    with pytest.raises(ValueError, match="either free_energy"):
        two_level_weights(u)
    with pytest.raises(ValueError, match="either free_energy"):
        two_level_weights(u, wrong.free_energy, T, bead_log_w=np.zeros(60))
    with pytest.raises(ValueError, match="needs the temperature_K"):
        two_level_weights(u, wrong.free_energy)
    with pytest.raises(ValueError, match="7 log weights given for 60 bead frames"):
        two_level_weights(u, bead_log_w=np.zeros(7))
