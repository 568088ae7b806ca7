"""The Gaussian process over torsions against a surface that is known."""

from __future__ import annotations

import numpy as np
import pytest
from known_torsions import KT, labels, true_F, true_force

from ccg_training.labels import Labels
from ccg_training.torsion_surface import TorsionSurface


@pytest.fixture(scope="module")
def surface():
    return TorsionSurface(labels(80, 0), 300.0)


def test_values_slopes_and_error_bars_fit_the_truth(surface):
    s = np.random.default_rng(1).uniform(-np.pi, np.pi, (400, 2))
    F, deviation = surface.free_energy(s)
    off = (F - true_F(s)) / KT
    assert np.sqrt(np.mean(off**2)) < 0.08
    assert 0.85 < np.mean(np.abs(off) < 2 * deviation / KT) <= 1.0
    error = surface.mean_force(s) - true_force(s)
    assert np.sqrt(np.mean(error**2)) < 0.15 * KT
    step = 1e-5 * np.eye(2)
    slope = [surface.free_energy(s + d)[0] - surface.free_energy(s - d)[0] for d in step]
    np.testing.assert_allclose(-np.stack(slope, 1) / 2e-5, surface.mean_force(s), atol=1e-5)


def test_the_surface_is_periodic(surface):
    s = np.array([[np.pi - 1e-9, 0.3], [-np.pi + 1e-9, 0.3]])
    F, _ = surface.free_energy(s)
    np.testing.assert_allclose(F[0], F[1], atol=1e-6)


def test_slopes_alone_at_some_states_help():
    some = labels(24, 0)
    half = np.arange(24) % 2 == 0
    nan = np.where(half, np.nan, some.free_energy)
    variance = np.where(half, np.nan, some.free_energy_variance)
    partial = Labels(some.beads, some.force, some.force_variance, nan, variance)
    s = np.random.default_rng(1).uniform(-np.pi, np.pi, (400, 2))

    def rms(model):
        return np.std(model.free_energy(s)[0] - true_F(s)) / KT

    with_slopes, without = TorsionSurface(partial, 300.0), TorsionSurface(partial[~half], 300.0)
    assert rms(TorsionSurface(some, 300.0)) < rms(with_slopes) < 0.85 * rms(without)
    with pytest.raises(ValueError, match="no label has a free energy"):
        TorsionSurface(partial[half], 300.0)


def test_choices_fill_gaps_below_the_limit():
    far = labels(60, 2)
    near = far[np.abs(far.beads[:, 0]) > 1.0]  # nothing is known around phi = 0
    model = TorsionSurface(near, 300.0)
    candidates = np.random.default_rng(3).uniform(-np.pi, np.pi, (800, 2))
    chosen = candidates[model.most_uncertain(candidates, 12, highest_kT=100.0)]
    assert np.abs(chosen[:6, 0]).max() < 1.0
    apart = np.linalg.norm(np.exp(1j * chosen[:, None]) - np.exp(1j * chosen), axis=-1)
    assert apart[~np.eye(12, dtype=bool)].min() > 0.1
    low = candidates[model.most_uncertain(candidates, 12, highest_kT=3.0)]
    assert true_F(low).max() < true_F(candidates).min() + 5 * KT
