import MDAnalysis as mda
import numpy as np
import pytest
from MDAnalysis.exceptions import NoDataError
from MDAnalysis.transformations.base import TransformationBase
from scipy import stats

from ccg_mda.pareto import fit_generalised_pareto
from ccg_mda.weights import (
    effective_sample_size,
    log_mean_exp,
    log_weights,
    pareto_k,
    resample,
    weighted_average,
)


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def gaussian_pair(rng, shape, shift):
    """Samples of N(0, 1) and the log weights that turn them into N(shift, 1)."""
    x = rng.normal(size=shape)
    return x, shift * x - shift**2 / 2


def test_ess_closed_form(rng):
    assert effective_sample_size(np.full(10, 1e4)) == 1
    assert effective_sample_size(np.array([0.0, -np.inf, -np.inf, -np.inf])) == 0.25
    assert effective_sample_size(np.full(3, -np.inf)) == 0
    np.testing.assert_allclose(effective_sample_size(np.log([1.0, 2, 3])), 36 / (3 * 14))
    # Log-normal weights: E[w]² / E[w²] = exp(-shift²).
    _, log_w = gaussian_pair(rng, 200_000, 0.8)
    np.testing.assert_allclose(effective_sample_size(log_w), np.exp(-0.64), rtol=0.02)


def test_axes_agree(rng):
    log_w = rng.normal(size=(3, 40, 2))
    for function in (effective_sample_size, pareto_k, lambda w, axis: log_mean_exp(w, axis)[0]):
        by_axis = function(log_w, axis=1)
        assert by_axis.shape == (3, 2)
        np.testing.assert_allclose(by_axis[1, 1], function(log_w[1, :, 1], axis=0))


def test_log_mean_exp_value_and_variance(rng):
    value, variance = log_mean_exp(np.log([1.0, 2, 3, 6]) + 5000)
    np.testing.assert_allclose(value, np.log(3) + 5000)
    np.testing.assert_allclose(variance, np.var([1, 2, 3, 6], ddof=1) / 9 / 4)
    # The predicted variance is that of repeated experiments.
    values, variances = log_mean_exp(gaussian_pair(rng, (4000, 500), 0.5)[1])
    np.testing.assert_allclose(variances.mean(), values.var(), rtol=0.1)
    np.testing.assert_allclose(values.mean(), -variances.mean() / 2, atol=1e-3)


def test_log_mean_exp_edges():
    value, variance = log_mean_exp(np.array([2.5]))
    assert value == 2.5
    assert np.isnan(variance)
    assert log_mean_exp(np.full(3, -np.inf))[0] == -np.inf


@pytest.mark.parametrize("shape", [-0.3, 0.0, 0.4, 0.7, 1.2])
def test_fit_recovers_pareto_shape(rng, shape):
    sample = np.sort(stats.genpareto.rvs(shape, scale=2.5, size=20_000, random_state=rng))
    assert fit_generalised_pareto(sample) == pytest.approx(shape, abs=0.04)


@pytest.mark.parametrize("shape", [0.2, 0.5, 0.9])
def test_pareto_k_of_weights(rng, shape):
    w = stats.genpareto.rvs(shape, size=(20, 4000), random_state=rng)
    assert pareto_k(np.log(w) + 900).mean() == pytest.approx(shape, abs=0.06)


def test_pareto_k_of_an_exact_density_is_not_that_of_rounding_errors(rng):
    energy = rng.normal(1e5, 10.0, (200, 32))  # in kT
    log_q = -energy * (1.0 + rng.uniform(-1e-15, 1e-15, energy.shape))
    log_w = -energy - log_q
    assert (np.ptp(log_w, axis=1) > 0).all()
    assert (pareto_k(log_w, axis=1) == -np.inf).all()
    heavy = 1e-6 * np.exp(rng.standard_exponential((200, 2000)) * 0.9)  # small, but above rounding
    assert pareto_k(heavy, axis=1).mean() == pytest.approx(0.9, abs=0.06)


def test_pareto_k_edges():
    assert np.isnan(pareto_k(np.zeros(20)))
    assert pareto_k(np.full(100, 3.0)) == -np.inf
    assert pareto_k(np.r_[np.full(999, -2000.0), 0.0]) == np.inf
    assert pareto_k(np.r_[np.full(500, -np.inf), np.linspace(-600, 0, 500)]) > 1


def test_resample_counts(rng):
    p = np.array([0.5, 0.0, 0.2, 0.3])
    with np.errstate(divide="ignore"):
        log_w = np.log(p) - 700
    counts = np.mean(
        [np.bincount(resample(log_w, 7, rng), minlength=4) for _ in range(4000)], axis=0
    )
    np.testing.assert_allclose(counts, 7 * p, atol=0.05)
    drawn = np.bincount(resample(log_w, 1000, rng), minlength=4)
    assert np.all(np.abs(drawn - 1000 * p) <= 1)
    assert len(resample(log_w, rng=rng)) == 4
    with pytest.raises(ValueError, match="all weights are zero"):
        resample(np.full(3, -np.inf))


def test_weighted_average_matches_repeated_experiments(rng):
    x, log_w = gaussian_pair(rng, (3000, 400), 0.6)
    mean, error = np.transpose([weighted_average(*row) for row in zip(x, log_w, strict=True)])
    assert mean.mean() == pytest.approx(0.6, abs=0.005)
    assert np.sqrt((error**2).mean()) == pytest.approx(mean.std(), rel=0.08)


def test_weighted_average_unweighted_is_textbook(rng):
    values = rng.normal(size=(50, 2, 3))
    mean, error = weighted_average(values, np.zeros(50))
    np.testing.assert_allclose(mean, values.mean(axis=0))
    np.testing.assert_allclose(error, values.std(axis=0, ddof=1) / np.sqrt(50))


def test_weighted_average_blocks_see_correlation(rng):
    # Ten copies of each value: only 100 of 1000 frames are independent.
    values = np.repeat(rng.normal(size=100), 10)
    _, error = weighted_average(values, np.zeros(1000), n_blocks=100)
    assert error == pytest.approx(values[::10].std(ddof=1) / 10)


def test_values_of_weight_zero_do_not_matter():
    values, log_w = np.array([1.0, 3.0, np.inf, np.nan]), np.array([0.0, 0.0, -np.inf, -np.inf])
    mean, error = weighted_average(values, log_w)
    assert mean == 2
    assert error == pytest.approx(np.sqrt(4 / 3 * 2 / 4))


class Weights(TransformationBase):
    """Gives the frames weights 0, 1, 2, ..."""

    def _transform(self, ts):
        with np.errstate(divide="ignore"):
            ts.data["log_weight"] = np.log(float(ts.frame))
        return ts


def test_universe_stands_for_its_weights(tmp_path):
    u = mda.Universe.empty(1, trajectory=True)
    u.load_new(np.zeros((6, 1, 3), dtype=np.float32))
    u.atoms.write(tmp_path / "frames.trr", frames="all")
    u.load_new(str(tmp_path / "frames.trr"))
    u.trajectory.add_transformations(Weights())
    u.trajectory[3]
    with np.errstate(divide="ignore"):
        np.testing.assert_array_equal(log_weights(u), np.log(np.arange(6.0)))
    drawn = resample(u, 15, np.random.default_rng(0))
    np.testing.assert_array_equal(drawn, np.repeat(np.arange(6), np.arange(6)))
    assert u.trajectory.frame == 3


@pytest.mark.parametrize(
    ("log_w", "message"),
    [([0.0, np.nan], "NaN"), ([0.0, np.inf], "NaN or"), ([], "at least one")],
)
def test_bad_log_weights(log_w, message):
    with pytest.raises(ValueError, match=message):
        effective_sample_size(np.array(log_w))


def test_bad_average():
    with pytest.raises(ValueError, match="3 log weights"):
        weighted_average(np.zeros(4), np.zeros(3))
    with pytest.raises(ValueError, match="between 2 and"):
        weighted_average(np.zeros(3), np.zeros(3), n_blocks=1)
    with pytest.raises(ValueError, match=r"shape \(K,\)"):
        weighted_average(np.zeros(3), np.zeros((3, 1)))


def test_log_weights_need_a_source_of_weights():
    u = mda.Universe.empty(1, trajectory=True)
    with pytest.raises(NoDataError, match="potential"):
        log_weights(u)
    with pytest.raises(ValueError, match="temperature_K"):
        log_weights(u, free_energy=np.sum)
