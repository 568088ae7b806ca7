"""The joint residual, its split and the control variate, against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from free_molecule import FreeMolecule
from linear_gaussian import GaussianBackmapper

from ccg_training.consistency import Residual, consistency
from ccg_training.control_variate import control_variate
from ccg_training.reconstruction import Samples, pull_back_frames, reconstruct

MOLECULE = FreeMolecule()
KT = MOLECULE.kT()
SPRINGS = torch.from_numpy(MOLECULE.schur)


class KnownForceField:
    """F of the molecule, and a ripple along the distance of the first two beads, in kT."""

    dtype, device = torch.float64, torch.device("cpu")

    def __init__(self, ripple=0.0):
        self.ripple = ripple

    def wrong_by(self, beads):
        return self.ripple * torch.sin(4.0 * (beads[:, 1] - beads[:, 0]).norm(dim=-1))

    def energy_and_forces(self, beads, box=None):
        beads = beads.clone().requires_grad_()
        flat = beads.flatten(1)
        energy = 0.5 * ((flat @ SPRINGS) * flat).sum(1) + KT * self.wrong_by(beads)
        return energy.detach(), -torch.autograd.grad(energy.sum(), beads)[0]


def frames(flow, n: int, seed: int) -> Samples:
    rng = np.random.default_rng(seed)
    x = MOLECULE.atoms(MOLECULE.states(n, rng), rng)
    return pull_back_frames(flow, x, *MOLECULE(x))


def both_sides(flow, force_field, n=400, K=8):
    rng = np.random.default_rng(1)
    samples = reconstruct(flow, MOLECULE, MOLECULE.states(n, rng), K, rng)
    return frames(flow, 5 * n, 2), samples


def measured(flow, force_field, **sizes):
    pair = both_sides(flow, force_field, **sizes)
    return *pair, consistency(*(Residual.of(part, force_field) for part in pair))


def test_it_is_constant_where_both_models_are_exact():
    *_, found = measured(GaussianBackmapper(MOLECULE), KnownForceField(), n=40)
    assert np.abs(found.forward).max() < 1e-9
    assert np.abs(found.reverse).max() < 1e-9
    for side in ("forward", "reverse"):
        assert found.figures[f"{side}_slope"] < 1e-8
        assert found.figures[f"{side}_beyond_1"] == found.figures[f"{side}_lost"] == 0
    assert found.figures["reverse_spread_flow"] < 1e-9


def close(found, name, truth, errors=4.0):
    """Within so many of its own errors, which are at most a tenth of it."""
    value, error = found.figures[name], found.figures[f"{name}_error"]
    assert abs(value - truth) < errors * error, (name, value, error, truth)
    assert error < 0.1 * truth, (name, error, truth)


def test_the_split_tells_an_error_of_the_flow_from_one_of_the_force_field():
    flow = GaussianBackmapper(MOLECULE, shift=0.2, scale=1.1)
    ripple = KnownForceField(0.7)
    _, samples, found = measured(flow, ripple)
    beads, d = torch.from_numpy(samples.beads), MOLECULE.n_rest_dof
    # Per whitened dimension y = t + cε, ln q - ln p = -ε²/2 + y²/2 + const.
    c2, t2 = 1.1**2, d * 0.2**2
    of_flow = np.sqrt(d * (c2 - 1) ** 2 / 2 + t2 * c2)
    close(found, "reverse_spread_flow", of_flow)
    of_force_field = ripple.wrong_by(beads).std().item()
    close(found, "reverse_spread_force_field", of_force_field)
    # The distortion doesn't depend on s: every label is the mean force, whatever the noise.
    assert found.figures["reverse_slope_flow"] < 1e-7
    moved = beads.requires_grad_()
    (slope,) = torch.autograd.grad(ripple.wrong_by(moved).sum(), moved)
    close(found, "reverse_slope_force_field", slope.square().mean().sqrt().item())
    # Frames: y is a standard normal there, and ln q - ln p = y²/2 - (y - t)²/2c² + const.
    of_flow = np.sqrt(d * (1 - 1 / c2) ** 2 / 2 + t2 / c2**2)
    close(found, "forward_width", np.hypot(of_flow, of_force_field), errors=5.0)
    # E_p R - E_q R = -KL(p|q) - KL(q|p): the gap of the bounds of ln Z.
    gap = found.forward.mean() - found.reverse.mean()
    expected = flow.forward_kl(samples.beads)[0] + flow.reverse_kl(samples.beads)[0]
    assert -gap == pytest.approx(expected, abs=0.1)


def test_a_flow_that_bends_along_s_scatters_the_slope():
    flow = GaussianBackmapper(MOLECULE, shift=0.3, bend=0.05)
    _, samples, found = measured(flow, KnownForceField())
    delta = torch.from_numpy(samples.beads).flatten(1)
    phase = delta @ flow.directions.T
    t, bent = (
        flow.shift + 0.05 * torch.sin(phase),
        0.05 * torch.cos(phase)[..., None] * flow.directions,
    )
    # ∂R/∂s = Σ_j y_j ∂t_j/∂s with y = t + ε.
    close(found, "reverse_slope_flow", bent.square().sum(1).mean().sqrt().item())
    mean = (t[..., None] * bent).sum(1)
    close(found, "reverse_slope_force_field", mean.square().mean().sqrt().item())


def test_samples_of_infinite_energy_are_counted_and_nothing_else():
    residual = Residual.of(
        both_sides(GaussianBackmapper(MOLECULE), None, n=60)[1], KnownForceField()
    )
    clean = consistency(residual, residual).figures
    residual.value[::3, 2] = np.inf
    found = consistency(residual, residual).figures
    assert found["reverse_lost"] == pytest.approx(1 / 24)
    assert found["reverse_beyond_4"] == pytest.approx(1 / 24)
    assert found["reverse_rms"] < 1e-9
    assert found["reverse_slope"] == pytest.approx(clean["reverse_slope"], abs=1e-8)


def test_a_model_of_F_takes_the_variance_out_of_ln_Z():
    rng = np.random.default_rng(4)
    labelled, everywhere = MOLECULE.states(50, rng), MOLECULE.states(5000, rng)
    truth = MOLECULE.log_partition(everywhere).mean()
    flow = GaussianBackmapper(MOLECULE, shift=0.2)
    log_weight = reconstruct(flow, MOLECULE, labelled, 16, rng).log_weight
    exact = [MOLECULE.free_energy(beads) / KT for beads in (labelled, everywhere)]
    found = control_variate(log_weight, *exact)
    of_z = MOLECULE.log_partition(labelled).var(ddof=1)
    assert found.variance_plain == pytest.approx(of_z, rel=0.2)
    # What is left is the noise of 16 samples: E_q w² - 1 = exp(|t|²) - 1, over K.
    noise = np.expm1(MOLECULE.n_rest_dof * 0.2**2) / 16
    assert found.variance_noise == pytest.approx(noise, rel=0.3)
    assert found.variance_controlled == pytest.approx(noise, rel=0.5)
    assert found.ess == pytest.approx(1 / (1 + noise), abs=0.03)
    assert found.coefficient == pytest.approx(1.0, abs=0.05)
    assert found.controlled.error < 0.25 * found.plain.error
    # The log of an average is low by half its variance.
    for estimate in (found.plain, found.controlled):
        assert abs(estimate.value + noise / 2 - truth) < 3.5 * estimate.error
    half = control_variate(log_weight, exact[0] / 2, exact[1] / 2)
    assert half.coefficient == pytest.approx(2 * found.coefficient)
    with pytest.raises(ValueError, match="two labelled states"):
        control_variate(log_weight[:1], exact[0][:1], exact[1])
