"""Divergences against closed forms, floors against theory.md 0.4."""

import numpy as np
import pytest

from ccg_training.metrics import (
    free_energy,
    free_energy_difference,
    independent_samples,
    jensen_shannon,
    jensen_shannon_floor,
    torsion_histogram,
)


def test_jensen_shannon_of_known_distributions():
    same = np.array([0.2, 0.3, 0.5])
    assert jensen_shannon(same, same) == 0
    assert jensen_shannon(np.array([1.0, 0]), np.array([0, 1.0])) == pytest.approx(np.log(2))
    p, q = np.array([0.5, 0.5]), np.array([1.0, 0.0])
    expected = 0.75 * np.log(4 / 3)  # H(3/4, 1/4) - (H(p) + H(q)) / 2 = 3/4 ln 4/3
    assert jensen_shannon(p, q) == pytest.approx(expected)
    assert jensen_shannon(q, p) == pytest.approx(expected)


def test_floor_of_many_filled_bins_is_the_chi_squared_one():
    """For N samples in each of two draws over B bins, JS ~ (B - 1)/8 (1/N + 1/N)."""
    rng = np.random.default_rng(0)
    p = np.full((64, 64), 64.0**-2)
    n = 400_000
    floor = jensen_shannon_floor(p, n, n, rng=rng)
    assert floor == pytest.approx(4095 / 8 * 2 / n, rel=0.03)


@pytest.mark.parametrize(("n", "published"), [(1e4, 0.034), (5e4, 0.0088), (2e5, 0.0026)])
def test_floor_has_the_order_of_the_one_measured_on_alanine_dipeptide(n, published):
    """Three basins of the published widths and weights give theory.md 0.4 within a factor of 2."""
    centres = np.radians([[-80, 150], [-150, 155], [-75, -20], [55, 40]])
    widths = np.radians([[20, 22], [20, 20], [20, 22], [12, 15]])
    grid = (np.arange(64) + 0.5) / 64 * 2 * np.pi - np.pi
    phi, psi = np.meshgrid(grid, grid, indexing="ij")
    p = np.zeros((64, 64))
    for weight, (a, b), (u, v) in zip([0.4, 0.3, 0.28, 0.02], centres, widths, strict=True):
        gap = [np.angle(np.exp(1j * (phi - a))) / u, np.angle(np.exp(1j * (psi - b))) / v]
        p += weight * np.exp(-0.5 * (gap[0] ** 2 + gap[1] ** 2)) / (u * v)
    floor = jensen_shannon_floor(p / p.sum(), n, n, rng=np.random.default_rng(1))
    assert published / 2 < floor < published * 2


def test_two_real_draws_lie_at_the_floor():
    rng = np.random.default_rng(3)
    draw = [torsion_histogram(rng.vonmises(1, 3, (n, 2))) for n in (20_000, 20_000, 1_000_000)]
    floor = jensen_shannon_floor(draw[2], 20_000, 20_000, rng=rng)
    assert jensen_shannon(draw[0], draw[1]) == pytest.approx(floor, rel=0.1)


def test_histogram_wraps_and_weights():
    angles = np.array([[-np.pi], [np.pi], [3 * np.pi], [0.01]])
    histogram = torsion_histogram(angles, bins=4)
    np.testing.assert_allclose(histogram, [0.75, 0, 0.25, 0])
    weighted = torsion_histogram(angles, np.array([500.0, 500, 500, 500 + np.log(3)]), bins=4)
    np.testing.assert_allclose(weighted, [0.5, 0, 0.5, 0])
    assert torsion_histogram(np.zeros((5, 2))).shape == (64, 64)


def test_free_energy_and_fill():
    p = np.array([0.5, 0.5 * np.exp(-2), 0.0])
    np.testing.assert_allclose(free_energy(p), [0, 2, np.nan])
    np.testing.assert_allclose(free_energy(p, 0.5e-3), [0, 2, np.log(1e3)])


def test_free_energy_difference_is_the_applied_tilt():
    reference = np.array([0.1, 0.2, 0.3, 0.4, 0.0])
    tilt = np.array([0.3, -0.2, 0.1, 0.5, 0.0])
    p = reference * np.exp(-tilt)
    difference = free_energy_difference(p / p.sum(), reference)
    expected = tilt[:4] - np.average(tilt[:4], weights=reference[:4])
    np.testing.assert_allclose(difference, [*expected, np.nan])


@pytest.mark.parametrize("memory", [0.0, 0.5, 0.95])
def test_independent_samples_of_an_autoregressive_series(memory):
    """x_t = a x_{t-1} + noise has the statistical inefficiency (1 + a) / (1 - a)."""
    rng = np.random.default_rng(2)
    noise = rng.normal(size=100_000)
    series = np.zeros_like(noise)
    for t in range(1, len(noise)):
        series[t] = memory * series[t - 1] + noise[t]
    expected = len(noise) * (1 - memory) / (1 + memory)
    assert independent_samples(series) == pytest.approx(expected, rel=0.1)
    assert independent_samples(np.ones(50)) == 1


def test_maps_without_a_common_bin_have_no_difference():
    assert np.isnan(free_energy_difference(np.array([1.0, 0.0]), np.array([0.0, 1.0]))).all()
