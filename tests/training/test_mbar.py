"""MBAR against the closed form of harmonic umbrellas on a harmonic ensemble."""

import numpy as np
import pytest

from ccg_training.mbar import solve_mbar

# exp(-a x²/2) under biases k (x - c)²/2, all reduced: Gaussians of precision a + k.
A, K, CENTRES = 1.7, 2.5, np.array([-2.0, -0.9, 0.0, 1.1, 2.2])
N_SAMPLES, N_BLOCKS = 400, 10


def exact_free_energy():
    """-ln of the normalising integrals, against the first."""
    f = 0.5 * A * K / (A + K) * CENTRES**2
    return f - f[0]


def solved(seed):
    rng = np.random.default_rng(seed)
    means = K * CENTRES / (A + K)
    x = means[:, None] + rng.normal(size=(len(CENTRES), N_SAMPLES)) / np.sqrt(A + K)
    window = np.repeat(np.arange(len(CENTRES)), N_SAMPLES)
    block = window * N_BLOCKS + np.tile(np.arange(N_SAMPLES) * N_BLOCKS // N_SAMPLES, len(CENTRES))
    bias = 0.5 * K * (x.ravel()[:, None] - CENTRES) ** 2
    return x.ravel(), solve_mbar(np.exp(-bias), window, block), bias, window


def bootstrap_error(result, seed=0):
    """Standard error of f by drawing the blocks of every window anew."""
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(N_BLOCKS, np.full(N_BLOCKS, 1 / N_BLOCKS), (500, len(CENTRES)))
    return ((drawn.reshape(500, -1) - 1) @ result.influence).std(0)


def test_harmonic_umbrellas():
    z, moments, spread = [], [], []
    for seed in range(40):
        x, result, _, _ = solved(seed)
        error = bootstrap_error(result)[1:]
        spread.append(result.inconsistency)
        z.append((result.free_energy - exact_free_energy())[1:] / error)
        weight = np.exp(result.log_weight)
        assert weight.sum() == pytest.approx(1)
        moments.append((weight * x**2).sum())
    z = np.array(z)
    assert abs(z.mean()) < 0.5  # four correlated figures of 40 repetitions
    assert 0.8 < z.std() < 1.3
    # Five ensembles have four degrees of freedom for each to agree with the others.
    assert 0.4 < np.mean(spread) < 1.2
    assert np.mean(moments) == pytest.approx(1 / A, abs=4 * np.std(moments) / np.sqrt(40))


def test_the_solution_solves_the_equations():
    _, result, bias, window = solved(3)
    f = result.free_energy
    count = np.bincount(window)
    log_c = -np.logaddexp.reduce(np.log(count) + f - bias, axis=1)
    own = -np.logaddexp.reduce(log_c[:, None] - bias, axis=0)
    np.testing.assert_allclose(own - own[0], f, atol=1e-8)
    np.testing.assert_allclose(result.log_weight, log_c - np.logaddexp.reduce(log_c), atol=1e-8)


def test_influence_is_the_derivative():
    """One sample in place of another, solved anew, moves f as the influence says."""
    _, result, bias, window = solved(5)
    each = solve_mbar(np.exp(-bias), window, np.arange(len(window)))  # every sample a block
    for n, m in ((0, 1), (900, 1100), (1990, 1700)):
        other = bias.copy()
        other[m] = bias[n]
        change = (
            solve_mbar(np.exp(-other), window, np.arange(len(window))).free_energy
            - result.free_energy
        )
        expected = each.influence[n] - each.influence[m]
        np.testing.assert_allclose(change, expected, atol=0.03 * np.abs(expected).max())


def test_influence_of_an_ensemble_is_the_derivative():
    """Samples of one ensemble given once more, solved anew, move f as its influence says."""
    _, result, bias, window = solved(5)
    often = np.tile(bias, (50, 1)), np.tile(window, 50)
    for k in (0, 2, 4):
        more = [
            np.concatenate([a, b[window == k]]) for a, b in zip(often, (bias, window), strict=True)
        ]
        change = solve_mbar(np.exp(-more[0]), more[1], more[1]).free_energy - result.free_energy
        expected = result.ensemble_influence[k] / 50
        np.testing.assert_allclose(change, expected, atol=0.03 * np.abs(expected).max())


def test_an_ensemble_out_of_equilibrium_contradicts_the_others():
    _, _, bias, window = solved(7)
    stuck = bias.copy()
    own = np.flatnonzero(window == 2)
    right = own[bias[own, 1] > bias[own, 3]]  # one side only, all blocks alike
    stuck[own] = bias[np.resize(right, len(own))]
    block = np.arange(len(window)) * 50 // len(window)
    agreeing, apart = (solve_mbar(np.exp(-b), window, block) for b in (bias, stuck))
    assert agreeing.inconsistency < 2
    assert apart.inconsistency > 4
    off = np.abs(apart.free_energy - exact_free_energy())[1:]
    seen = np.sqrt((apart.ensemble_influence**2).sum(0))[1:]
    assert (off > 3 * bootstrap_error(apart)[1:]).any()
    assert (off < 3 * seen).all()


def test_windows_far_apart_are_refused():
    x = np.repeat([0.0, 1000.0], 50)
    bias = 0.5 * (x[:, None] - np.array([0.0, 1000.0])) ** 2
    with pytest.raises(ValueError, match="overlap"):
        solve_mbar(np.exp(-bias), (x > 0).astype(int), (x > 0).astype(int))
    with pytest.raises(ValueError, match="no sample"):
        solve_mbar(np.exp(-bias), np.zeros(100, int), np.zeros(100, int))
