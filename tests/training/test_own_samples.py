"""The losses on own samples: zero at the truth, right gradients, a trust region that holds."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from exact_flows import (
    CHAIN,
    KT,
    SMALLEST,
    ExactPotential,
    directions,
    flow_of,
    frames_of,
    moved,
    perturbed,
    slope,
    structures,
)

from ccg_training.fit_flow import FlowFrames, FlowLoss, OwnSamples, fit_flow, mean_nll
from ccg_training.own_samples import OwnStates, capped, own_sample_loss, tempered_weights

OFF = FlowLoss(likelihood=0.0, noise_force=0.0, label=0.0, energy=0.0)
TERMS = {
    name: replace(OFF, **{name: 1.0}) for name in ("log_variance", "reverse_kl", "weighted_kl")
}


@pytest.fixture(scope="module")
def chain():
    return flow_of(CHAIN)


@pytest.fixture(scope="module")
def beads(chain) -> np.ndarray:
    return chain.cg_map.apply(structures(CHAIN, 400, 6))


def drawn(flow, beads, n_states, n_samples, seed=0):
    noise = flow.sample_noise(np.random.default_rng(seed), (n_states, n_samples))
    return {"coarse": torch.from_numpy(beads[:n_states])}, noise


def direct(flow, target, coarse, noise):
    """Return x(noise), U/kT and ln q, each (S, K), through the public interface only."""
    distribution = flow(coarse)
    x, log_q = distribution.positions_and_log_prob_from(noise.transpose(0, 1))
    energy, _ = ExactPotential(target)(x.detach().flatten(0, 1).numpy())
    return x, torch.from_numpy(energy).view(x.shape[:2]).T / KT, log_q.T


# ------------------------------------------------------------------------- zero at the truth


@pytest.mark.parametrize("name", TERMS)
def test_term_and_gradient_vanish_for_the_exact_flow_sample_by_sample(chain, beads, name):
    own = OwnSamples(ExactPotential(chain))
    loss, values = own_sample_loss(chain, *drawn(chain, beads, 3, 4), own, TERMS[name])
    assert set(values) == {name}
    assert abs(values[name]) < 1e-12
    gradients = torch.autograd.grad(loss, list(chain.parameters()), allow_unused=True)
    assert max(g.abs().max() for g in gradients if g is not None) < 1e-7
    assert own.potential.n_calls == 12


def test_values_are_those_of_their_definitions(chain, beads):
    flow = perturbed(chain, 0.01, 1)
    batch, noise = drawn(flow, beads, 5, 64)
    own = OwnSamples(ExactPotential(chain), min_ess=0.9, cap_kT=1e4)
    everything = replace(OFF, log_variance=1.0, reverse_kl=1.0, weighted_kl=1.0)
    _, values = own_sample_loss(flow, batch, noise, own, everything)
    _, energy, log_q = direct(flow, chain, batch["coarse"], noise)
    log_w = (-energy - log_q).detach().numpy()
    n = flow.n_dof
    assert values["log_variance"] == pytest.approx(log_w.var(1, ddof=1).mean() / n, rel=1e-6)
    log_z = np.log(np.exp(log_w - log_w.max()).mean(1)) + log_w.max()
    assert values["reverse_kl"] == pytest.approx((log_z - log_w.mean(1)).mean() / n, rel=1e-6)
    weights, exponent = tempered_weights(torch.from_numpy(log_w), 0.9, 0.5)
    assert (exponent < 1).any()
    surplus = (weights - 1 / 64) * log_q
    assert values["weighted_kl"] == pytest.approx(-surplus.sum(1).mean().item() / n, rel=1e-6)


# ------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("name", TERMS)
def test_gradients_agree_with_finite_differences(chain, beads, name):
    """What each term holds fixed is held fixed here by hand."""
    flow = perturbed(chain, 0.01, 1)
    batch, noise = drawn(flow, beads, 4, 8)
    own = OwnSamples(ExactPotential(chain), cap_kT=1e4)
    loss, _ = own_sample_loss(flow, batch, noise, own, TERMS[name])
    x, energy, log_q = direct(flow, chain, batch["coarse"], noise)
    weights, _ = tempered_weights((-energy - log_q).detach(), own.min_ess, own.max_kl)

    @torch.no_grad()
    def value(changed) -> float:
        if name == "reverse_kl":  # the samples move, the density that judges them doesn't
            moving, energies, _ = direct(changed, chain, batch["coarse"], noise)
            return (energies + flow(batch["coarse"]).log_prob(moving).T).mean().item()
        log_prob = changed(batch["coarse"]).log_prob(x).T  # the other way round
        if name == "log_variance":
            return (-energy - log_prob).var(1).mean().item()
        return -((weights - 1 / 8) * log_prob).sum(1).mean().item()

    for direction in directions(flow, 3):
        h = 1e-4
        found = (value(moved(flow, direction, h)) - value(moved(flow, direction, -h))) / (2 * h)
        assert slope(loss, flow, direction) * flow.n_dof == pytest.approx(found, rel=1e-4, abs=1e-7)


@pytest.fixture(scope="module")
def slopes() -> dict[str, np.ndarray]:
    """Derivatives of each estimator, from 20 independent batches, away from the truth."""
    truth = flow_of(SMALLEST)
    flow = perturbed(truth, 0.015, 1)
    pairs = zip(flow.parameters(), truth.parameters(), strict=True)
    direction = [(a - b).detach() for a, b in pairs]
    beads = SMALLEST.cg_map.apply(structures(SMALLEST, 8, 7))
    own = OwnSamples(ExactPotential(truth), min_ess=0.01, max_kl=10.0, cap_kT=1e4)
    found = {name: [] for name in (*TERMS, "total")}
    for seed in range(20):
        batch, noise = drawn(flow, beads, 8, 64, seed)
        for name, terms in TERMS.items():
            loss, _ = own_sample_loss(flow, batch, noise, own, terms)
            found[name].append(slope(loss, flow, direction))
        x, log_q = flow(batch["coarse"]).positions_and_log_prob_from(noise.transpose(0, 1))
        s = batch["coarse"].expand(len(x), -1, -1, -1).flatten(0, 1)
        energy = -truth.to_noise_terms(x.flatten(0, 1), s)[2]  # up to F(s), which doesn't move
        reverse_kl = (energy + log_q.flatten()).mean() / flow.n_dof
        found["total"].append(slope(reverse_kl, flow, direction))
    return {name: np.array(values) for name, values in found.items()}


def z_score(difference: np.ndarray) -> float:
    return abs(difference.mean()) / (difference.std(ddof=1) / np.sqrt(len(difference)))


def test_the_path_gradient_is_the_total_one_with_less_noise(slopes):
    path, whole = slopes["reverse_kl"], slopes["total"]
    assert z_score(path) > 10  # there is something to compare
    assert z_score(path - whole) < 4
    assert path.std() < 0.5 * whole.std()


def test_the_log_variance_has_twice_the_gradient_of_the_reverse_kl(slopes):
    assert z_score(slopes["log_variance"]) > 5
    assert z_score(slopes["log_variance"] - 2 * slopes["reverse_kl"]) < 4


def test_the_weighted_kl_goes_the_same_way(slopes):
    """At a small error all divergences have the same second-order form."""
    ratio = slopes["weighted_kl"].mean() / slopes["reverse_kl"].mean()
    assert ratio == pytest.approx(1.0, abs=0.35)


# ------------------------------------------------------------------- trust region and cap


@pytest.mark.parametrize(("min_ess", "max_kl"), [(0.3, 10.0), (0.8, 10.0), (0.01, 0.1)])
def test_tempered_weights_stay_in_the_trust_region_and_reach_its_edge(min_ess, max_kl):
    spread = torch.tensor([0.0, 0.01, 1.0, 5.0, 200.0])[:, None]
    noise = torch.randn(5, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log_weight = spread * noise
    weights, exponent = tempered_weights(log_weight, min_ess, max_kl)

    def measured(w):
        return 1 / (64 * (w**2).sum(-1)), torch.xlogy(w, 64 * w).sum(-1)

    ess, kl = measured(weights)
    assert (ess >= min_ess - 1e-9).all()
    assert (kl <= max_kl + 1e-9).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(5, dtype=torch.float64))
    assert (exponent[:2] == 1).all()
    assert (exponent[3:] < 1).all()
    further = torch.softmax(1.01 * exponent[:, None] * log_weight, -1)
    ess, kl = measured(further)
    assert ((ess < min_ess) | (kl > max_kl))[exponent < 1].all()


def test_the_cap_is_smooth_and_takes_infinity():
    e = torch.linspace(0.0, 60.0, 601, dtype=torch.float64).requires_grad_()
    value, rate = capped(e, 30.0)
    torch.testing.assert_close(value[:301], e[:301])
    torch.testing.assert_close(value[-1].exp(), torch.exp(torch.tensor(30.0).double()) * 31.0)
    (gradient,) = torch.autograd.grad(value.sum(), e)
    torch.testing.assert_close(gradient[:300], rate[:300])
    torch.testing.assert_close(gradient[301:], rate[301:])
    top, rate = capped(torch.tensor([torch.inf, -5.0]), 30.0)
    assert 30 < top[0] < 52
    assert rate[0] < 1e-8
    assert top[1] == -5


class Clashing(ExactPotential):
    """Infinite energies for chosen samples, as of overlapping atoms."""

    def __init__(self, flow, broken) -> None:
        super().__init__(flow)
        self.broken = broken

    def __call__(self, positions):
        energy, forces = super().__call__(positions)
        energy[self.broken], forces[self.broken] = np.inf, 0.0
        return energy, forces


@pytest.mark.parametrize("name", TERMS)
def test_clashes_neither_break_nor_rule_a_batch(chain, beads, name):
    flow = perturbed(chain, 0.01, 1)
    batch, noise = drawn(flow, beads, 3, 8)

    def loss(potential, n_states=3):
        some = {"coarse": batch["coarse"][:n_states]}
        return own_sample_loss(flow, some, noise[:n_states], OwnSamples(potential), TERMS[name])[0]

    one = loss(Clashing(chain, [5]))
    gradients = torch.autograd.grad(one, list(flow.parameters()), allow_unused=True)
    assert all(torch.isfinite(g).all() for g in gradients if g is not None)
    assert abs(one.item()) < 100
    without = loss(Clashing(chain, slice(16, 24)))  # all of the third state: it doesn't count
    assert without.item() == pytest.approx(loss(ExactPotential(chain), 2).item(), rel=1e-9)
    assert loss(Clashing(chain, slice(None))).item() == 0


# ---------------------------------------------------------------------------------- states


def test_states_come_from_the_frames_or_from_the_caller(chain, beads):
    frames = frames_of(chain, beads[:20], 1)
    rng = np.random.default_rng(0)
    own = OwnSamples(ExactPotential(chain), n_states=50)
    states = OwnStates(chain, frames, own, rng).draw()
    assert set(states) == {"coarse"}
    assert states["coarse"].shape == (50, 4, 3)
    assert states["coarse"].dtype == torch.float32
    centred = beads[:20] - beads[:20].mean(1, keepdims=True)
    nearest = np.abs(states["coarse"].numpy()[:, None] - centred).max((-1, -2)).min(1)
    assert nearest.max() < 1e-5
    shaken = OwnStates(chain, frames, replace(own, jitter=0.1), rng).draw()["coarse"].numpy()
    nearest = np.abs(shaken[:, None] - centred).max((-1, -2)).min(1)
    assert nearest.min() > 0.02
    assert nearest.max() < 0.6
    hot = replace(frames, temperature_K=np.linspace(300, 400, 20))
    angles = replace(own, coarse=np.full((3, 2), 1.5))
    states = OwnStates(chain, hot, angles, rng).draw()
    assert (states["coarse"] == 1.5).all()
    assert 300 <= states["temperature_K"].min() < states["temperature_K"].max() <= 400


def test_bad_settings_are_refused(chain):
    with pytest.raises(ValueError, match="n_samples >= 2"):
        OwnSamples(ExactPotential(chain), n_samples=1)
    with pytest.raises(ValueError, match="0 < min_ess < 1"):
        OwnSamples(ExactPotential(chain), min_ess=1.5)


# ------------------------------------------------------------------------------------ fits


@pytest.mark.parametrize("name", TERMS)
def test_own_samples_find_the_truth_without_any_frame(name):
    """Only the states are given: what the flow learns comes from the potential."""
    target = flow_of(SMALLEST)
    start = perturbed(target, 0.05, 8)
    beads = SMALLEST.cg_map.apply(structures(SMALLEST, 1200, 6))
    held_out = frames_of(target, beads[200:], 3)
    truth = mean_nll(target, held_out.positions)
    before = mean_nll(start, held_out.positions) - truth
    flow = copy.deepcopy(start)
    bare = FlowFrames(held_out.positions[:2], np.ones(2))
    potential = ExactPotential(target)
    fit = fit_flow(
        flow,
        bare,
        terms=TERMS[name],
        own=OwnSamples(potential, coarse=beads[:200], n_states=8, n_samples=16),
        steps=30,
        batch_size=2,
        learning_rate=5e-3,
        seed=0,
    )
    after = mean_nll(flow, held_out.positions) - truth
    assert 0 < after < 0.5 * before
    assert fit.energy_calls == potential.n_calls == 30 * 128
    assert set(fit.history[-1]) == {"likelihood", "loss", "step", name}
    assert f"{30 * 128} energy calls" in str(fit)
