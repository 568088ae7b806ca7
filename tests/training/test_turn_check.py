"""What a turn brought: errors of a surface at labels that it has not seen, and the sentences."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from known_torsions import KT, labels, true_F, true_force

from ccg_training.turn_check import _errors_of_surface, _of_flow, _of_force_field


class Surface:
    """The truth, on another scale, and a ripple of known size."""

    kT = KT

    def __init__(self, ripple_kT=0.0):
        self.ripple = ripple_kT

    def __call__(self, s):
        F = true_F(s) + 17.0 + self.ripple * KT * np.sin(5 * s[:, 0])
        force = true_force(s)
        force[:, 0] -= 5 * self.ripple * KT * np.cos(5 * s[:, 0])
        return F, force


@pytest.mark.parametrize(("value_error_kT", "slope_error_kT"), [(1e-3, 1e-3), (0.5, 2.0)])
def test_errors_are_those_of_the_surface_without_the_noise_of_the_labels(
    value_error_kT, slope_error_kT
):
    noisy = labels(40_000, 5, value_error_kT, slope_error_kT)
    right = _errors_of_surface(Surface(), noisy)
    assert right["new_F_error_kT"] < 0.08
    assert right["new_force_error"] < 0.25 * KT
    wrong = _errors_of_surface(Surface(ripple_kT=0.4), noisy)
    # Mean squares of the ripple and of its slope along one torsion of two.
    assert wrong["new_F_error_kT"] == pytest.approx(0.4 / np.sqrt(2), rel=0.05)
    assert wrong["new_force_error"] == pytest.approx(5 * 0.4 * KT / 2, rel=0.05)


def test_labels_without_F_or_of_a_large_error_do_not_count():
    some = labels(4000, 6)
    poor = np.arange(4000) % 2 == 0
    F = some.free_energy + 60 * KT * poor * np.random.default_rng(7).normal(size=4000)
    variance = np.where(poor, (60 * KT) ** 2, some.free_energy_variance)
    found = _errors_of_surface(
        Surface(0.4), replace(some, free_energy=F, free_energy_variance=variance)
    )
    assert found["new_F_error_kT"] == pytest.approx(0.4 / np.sqrt(2), rel=0.05)
    nan = np.where(poor, np.nan, some.free_energy)
    without = replace(some, free_energy=nan, free_energy_variance=nan * 0 + 1e-6)
    assert _errors_of_surface(Surface(0.4), without)["new_F_error_kT"] == pytest.approx(
        0.4 / np.sqrt(2), rel=0.05
    )
    nothing = {"new_force_error": None, "new_F_error_kT": None}
    assert _errors_of_surface(None, some) == nothing
    assert _errors_of_surface(Surface(), some[:1]) == nothing
    assert _errors_of_surface(Surface(), without[np.flatnonzero(poor)]) == nothing


def test_sentences_say_what_was_gained_or_that_the_model_stays():
    assert _of_flow(0.1234, 50) == "the flow gained 0.123 nats per frame (50 held out)"
    lost = _of_flow(-0.5, 50)
    assert lost.startswith("the flow stays as it was")
    assert "50 held-out frames had 0.500 nats less" in lost
    assert _of_flow(0.0, 7).startswith("the flow stays as it was")
    assert _of_force_field(0.31, 20) == (
        "the force field lost 31% of its loss on 20 held-out labels"
    )
    for gain in (0.0, -0.2):
        assert _of_force_field(gain, 20).startswith("the force field stays as it was")
