"""Relative entropy of a pair of beads, whose every ensemble is a one-dimensional integral."""

import copy

import numpy as np
import pytest
import torch

from ccg_ase.forcefield import ForceField
from ccg_ase.mapping import CGMap
from ccg_ase.topology import Topology
from ccg_ase.units import thermal_energy
from ccg_training.bennett import log_partition_ratio
from ccg_training.langevin_sampler import LangevinSampler
from ccg_training.reference_beads import ReferenceBeads
from ccg_training.relative_entropy import (
    RelativeEntropySettings,
    minimise_relative_entropy,
    surrogate_loss,
)

KT = thermal_energy(300.0)
PAIR = Topology(names=("A", "B"), masses=[40.0, 40.0], bonds=[(0, 1)])
GRID = np.linspace(2.0, 6.0, 8001)
TRUTH = (25.0, 4.0)  # k in kT/Å², r0 in Å
QUICK = RelativeEntropySettings(steps=60, learning_rate=0.02, n_replicas=32)


class Spring(torch.nn.Module):
    """E = kT k/2 (r - r0)², in the parameters ln k and r0: a force field for tests."""

    temperature_K = 300.0

    def __init__(self, k, r0):
        super().__init__()
        self.cg_map = CGMap.from_slices(PAIR, (0, 1))
        self.log_k = torch.nn.Parameter(torch.tensor(np.log(k)))
        self.r0 = torch.nn.Parameter(torch.tensor(r0, dtype=torch.float64))

    def forward(self, beads, *, box=None):
        step = beads[..., 1, :] - beads[..., 0, :]
        if box is not None:
            step = step - (step @ torch.linalg.inv(box)).round() @ box
        return KT * self.log_k.exp() / 2 * (step.norm(dim=-1) - self.r0) ** 2

    @property
    def constants(self):
        return float(self.log_k.detach().exp()), float(self.r0.detach())


def density(k, r0):
    """p(r) on the grid and ln Z, both exact."""
    weight = GRID**2 * np.exp(-k / 2 * (GRID - r0) ** 2)
    z = np.trapezoid(weight, GRID)
    return weight / z, np.log(z)


def relative_entropy(k, r0, truth=TRUTH):
    """S_rel but for the entropy of the reference: <E>/kT + ln Z."""
    p, _ = density(*truth)
    return np.trapezoid(p * k / 2 * (GRID - r0) ** 2, GRID) + density(k, r0)[1]


def distances(k, r0, uniform):
    p, _ = density(k, r0)
    total = np.concatenate([[0], np.cumsum((p[1:] + p[:-1]) / 2 * np.diff(GRID))])
    return np.interp(uniform, total / total[-1], GRID)


def frames(k, r0, shape, seed=0):
    """Independent frames of the exact ensemble, anywhere and in any direction."""
    rng = np.random.default_rng(seed)
    r = distances(k, r0, rng.random(shape))
    u = rng.normal(size=(*r.shape, 3))
    u *= (r / np.linalg.norm(u, axis=-1))[..., None]
    where = rng.normal(scale=30.0, size=u.shape)
    return np.stack([where, where + u], -2)


class ExactSampler:
    """Draws from the exact ensemble of a `Spring`; notes what it was asked for."""

    def __init__(self, n_frames=60):
        self.n_frames, self.asked = n_frames, []

    def __call__(self, force_field, starts, seed):
        self.asked.append(force_field.constants)
        return frames(*force_field.constants, (self.n_frames, len(starts)), seed)


def reference(n, seed, truth=TRUTH):
    return ReferenceBeads(frames(*truth, n, seed))


# ------------------------------------------------------------- the gradient


def test_gradient_is_that_of_the_exact_relative_entropy():
    """By quantiles instead of random numbers: frames of θ₀ give the gradient at θ."""
    before, at, h = Spring(18.0, 3.9), Spring(22.0, 4.05), 1e-4
    uniform = (np.arange(20000) + 0.5) / 20000

    def pairs(r):
        return torch.from_numpy(np.stack([np.zeros((len(r), 3)), np.outer(r, [0, 0.6, 0.8])], 1))

    ours, theirs = pairs(distances(*TRUTH, uniform)), pairs(distances(18.0, 3.9, uniform))
    start = before(theirs).detach() / KT
    loss, ess = surrogate_loss(at(ours) / KT, at(theirs) / KT, start)
    loss.backward()
    k, r0 = at.constants
    by_log_k = relative_entropy(k * np.exp(h), r0) - relative_entropy(k * np.exp(-h), r0)
    by_r0 = relative_entropy(k, r0 + h) - relative_entropy(k, r0 - h)
    assert abs(by_log_k) / (2 * h) > 0.03
    assert at.log_k.grad.item() == pytest.approx(by_log_k / (2 * h), abs=2e-4)
    assert at.r0.grad.item() == pytest.approx(by_r0 / (2 * h), rel=1e-3)
    # 1/ESS = <w²>/<w>² with w = p/p₀, a quadrature as well.
    p, p0 = density(k, r0)[0], density(18.0, 3.9)[0]
    assert ess == pytest.approx(1 / np.trapezoid(p**2 / p0, GRID), rel=1e-3)
    assert surrogate_loss(start, start, start)[1] == pytest.approx(1)


# ------------------------------------------------- ratios of partition functions


def test_bennett_against_quadrature():
    a, b = (25.0, 4.0), (16.0, 4.2)
    exact = density(*b)[1] - density(*a)[1]

    def difference(r):
        return b[0] / 2 * (r - b[1]) ** 2 - a[0] / 2 * (r - a[1]) ** 2

    rng = np.random.default_rng(3)
    z, errors = [], []
    for _ in range(200):
        found = log_partition_ratio(
            difference(distances(*a, rng.random(300))),
            difference(distances(*b, rng.random(900))),
            n_blocks=100,
        )
        z.append((found.value - exact) / found.error)
        errors.append(found.error)
    assert abs(np.mean(z)) < 4 / np.sqrt(200)
    assert np.std(z) == pytest.approx(1, abs=0.2)
    # The least variance there is (Bennett's eq. 10b), by quadrature.
    pa, pb = 300 * density(*a)[0], 900 * density(*b)[0]
    with np.errstate(invalid="ignore"):
        overlap = np.trapezoid(np.nan_to_num(pa * pb / (pa + pb)), GRID)
    assert np.mean(errors) == pytest.approx(np.sqrt(1 / overlap - 1 / 300 - 1 / 900), rel=0.03)
    shifted = log_partition_ratio(np.full(5, 1e4), np.full(5, 1e4))
    assert shifted.value == pytest.approx(-1e4)
    with pytest.raises(ValueError, match="finite"):
        log_partition_ratio([np.nan, 1.0], [0.0, 1.0])


# ------------------------------------------------------------------ the stage


@pytest.mark.parametrize("box", [None, 12.0 * np.eye(3)])
def test_finds_the_reference_and_knows_the_gain(box):
    spring, sampler, seen = Spring(12.0, 4.35), ExactSampler(), []
    before = relative_entropy(*spring.constants)
    result = minimise_relative_entropy(
        spring,
        reference(6000, 11),
        reference(6000, 12),
        sampler,
        QUICK,
        box=box,
        progress=lambda *call: seen.append(call),
    )
    k, r0 = spring.constants
    # Maximum likelihood of 6000 frames: σ(ln k) = √(2/N), σ(r0) = 1/√(k N); and as much again.
    assert np.log(k / TRUTH[0]) == pytest.approx(0, abs=5 * np.sqrt(2 / 6000))
    assert r0 == pytest.approx(TRUTH[1], abs=5 / np.sqrt(25 * 6000))
    gain = before - relative_entropy(k, r0)
    assert gain == pytest.approx(before - relative_entropy(*TRUTH), rel=5e-3)
    assert result["gain_nats"] == pytest.approx(gain, abs=3 * result["gain_error"])
    assert result["gain_error"] < 0.1
    assert result["resolution_nats"] < 0.05
    assert 0 < result["accepted"] < result["rounds"] == len(seen)
    assert len(sampler.asked) <= 1 + result["rounds"]
    assert seen[-1] == (result["rounds"], QUICK.rounds, result)
    # Every accepted round is one: its exact relative entropy is lower than any before.
    falling = [relative_entropy(*c) for c in sampler.asked]
    assert falling[1] < falling[0]


def test_simulates_anew_when_the_frames_no_longer_stand_for_the_model():
    def run(**changes):
        spring, sampler = Spring(12.0, 4.35), ExactSampler()
        settings = RelativeEntropySettings(rounds=1, n_replicas=32, ema=0.0, **changes)
        result = minimise_relative_entropy(
            spring, reference(3000, 13), reference(3000, 14), sampler, settings
        )
        assert result["accepted"] == 1
        p, p0 = density(*sampler.asked[1])[0], density(*sampler.asked[0])[0]
        return result, 1 / np.trapezoid(p**2 / p0, GRID)

    slow, ess = run(steps=10, learning_rate=1e-3)
    assert slow["steps"] == 10
    assert slow["ess"] > 0.95 < ess
    for least in (0.8, 0.5):
        fast, ess = run(steps=1000, learning_rate=0.01, min_ess=least)
        assert fast["steps"] < 100
        assert fast["ess"] < least
        assert ess == pytest.approx(least, abs=0.1)  # the exact one, where it stopped


def test_keeps_its_weights_when_there_is_nothing_to_gain():
    spring = Spring(*TRUTH)
    start = copy.deepcopy(spring.state_dict())
    result = minimise_relative_entropy(
        spring, reference(600, 15), reference(4000, 16), ExactSampler(), QUICK
    )
    assert all(torch.equal(start[key], value) for key, value in spring.state_dict().items())
    assert result["gain_nats"] == result["gain_error"] == result["accepted"] == 0
    assert result["rounds"] == QUICK.patience
    assert result["steps"] > 0


def test_held_out_frames_decide():
    """Reference frames of another ensemble than those to judge by: nothing is accepted."""
    spring = Spring(*TRUTH)
    result = minimise_relative_entropy(
        spring, reference(2000, 17, (25.0, 4.3)), reference(2000, 18), ExactSampler(), QUICK
    )
    assert result["accepted"] == 0
    assert result["change_nats"] > result["resolution_nats"]
    np.testing.assert_allclose(spring.constants, TRUTH)


def test_weighted_reference():
    """Frames of a wider ensemble with log-weights do what frames of the truth do."""
    wide = (12.0, 4.1)

    def weighted(n, seed):
        beads = frames(*wide, n, seed)
        r = np.linalg.norm(beads[:, 1] - beads[:, 0], axis=-1)
        log_weight = wide[0] / 2 * (r - wide[1]) ** 2 - TRUTH[0] / 2 * (r - TRUTH[1]) ** 2
        return ReferenceBeads(beads, log_weight + 500.0)

    spring = Spring(*wide)
    before = relative_entropy(*wide)
    result = minimise_relative_entropy(
        spring, weighted(9000, 19), weighted(9000, 20), ExactSampler(), QUICK
    )
    assert np.log(spring.constants[0] / TRUTH[0]) == pytest.approx(0, abs=0.12)
    assert spring.constants[1] == pytest.approx(TRUTH[1], abs=0.02)
    gain = before - relative_entropy(*spring.constants)
    assert result["gain_nats"] == pytest.approx(gain, abs=3 * result["gain_error"])


def test_an_explosion_or_a_leap_is_undone():
    def explodes(force_field, starts, seed, exact=ExactSampler()):  # noqa: B008
        if exact.asked:
            raise FloatingPointError("replica 3 exploded")
        return exact(force_field, starts, seed)

    sampler = ExactSampler()
    for sample, changes in ((explodes, {}), (sampler, {"learning_rate": 50.0, "ema": 0.0})):
        spring = Spring(12.0, 4.35)
        settings = RelativeEntropySettings(steps=5, n_replicas=8, **changes)
        result = minimise_relative_entropy(
            spring, reference(300, 21), reference(300, 22), sample, settings
        )
        assert result["rounds"] == 3
        assert result["accepted"] == result["gain_nats"] == 0
        np.testing.assert_allclose(spring.constants, (12.0, 4.35))
    assert len(sampler.asked) == 1  # a model without overlap isn't even simulated
    with pytest.raises(FloatingPointError, match="exploded"):
        minimise_relative_entropy(spring, reference(9, 1), reference(9, 2), explodes, QUICK)


def test_same_seed_same_result_and_nothing_global():
    before = torch.random.get_rng_state()
    found = []
    for seed in (0, 0, 1):
        spring = Spring(12.0, 4.35)
        settings = RelativeEntropySettings(rounds=2, steps=20, n_replicas=8, seed=seed)
        parts = reference(500, 23).split(0.4)
        assert [len(part) for part in parts] == [300, 200]
        found.append(minimise_relative_entropy(spring, *parts, ExactSampler(), settings))
    assert found[0] == found[1] != found[2]
    assert torch.equal(before, torch.random.get_rng_state())


def test_committee_with_a_wrong_prior_under_langevin_dynamics():
    """The networks mend the prior of a spring that was fitted to other data."""
    other = (16.0, 4.15)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        force_field = ForceField.from_data(
            CGMap.from_slices(PAIR, (0, 1)),
            300.0,
            frames(*other, 2000, 24),
            channels=4,
            n_layers=1,
            n_members=2,
            cutoff_A=8.0,
        )
    start = [parameter.detach().clone() for parameter in force_field.parameters()]
    result = minimise_relative_entropy(
        force_field,
        reference(4000, 25),
        reference(4000, 26),
        LangevinSampler(
            n_steps=160,
            every=20,
            equilibration=40,
            timestep_fs=20.0,
            friction_per_ps=5.0,
            compiled=False,
        ),
        RelativeEntropySettings(rounds=4, steps=40, learning_rate=5e-3, n_replicas=256),
    )
    pairs = torch.zeros(len(GRID), 2, 3)
    pairs[:, 1, 2] = torch.from_numpy(GRID)
    truth = density(*TRUTH)[0]

    def divergence():
        with torch.no_grad():
            energy = force_field(pairs).double().numpy() / KT
        p = GRID**2 * np.exp(-(energy - energy.min()))
        return np.trapezoid(truth * np.log(truth / (p / np.trapezoid(p, GRID))), GRID)

    after = divergence()
    new = [parameter.detach().clone() for parameter in force_field.parameters()]
    with torch.no_grad():
        for parameter, value in zip(force_field.parameters(), start, strict=True):
            parameter.copy_(value)
    before = divergence()
    assert before > 0.2
    assert after < 0.02
    assert result["gain_nats"] == pytest.approx(before - after, abs=3 * result["gain_error"])
    assert all((a != b).any() for a, b in zip(start[-4:], new[-4:], strict=True))


def test_bad_input_is_refused():
    good, spring = reference(20, 27), Spring(*TRUTH)
    run = minimise_relative_entropy
    with pytest.raises(ValueError, match="frames of 2 beads, got frames of 3"):
        run(spring, good, ReferenceBeads(np.zeros((4, 3, 3))), ExactSampler())
    with pytest.raises(ValueError, match="n_replicas"):
        run(spring, good, good, ExactSampler(), RelativeEntropySettings(n_replicas=1))
    with pytest.raises(ValueError, match=r"sampler must return \(S, 64, 2, 3\)"):
        run(spring, good, good, lambda force_field, starts, seed: starts)
    beads = good.beads
    for arguments, message in (
        ((beads[0],), "N >= 2"),
        ((beads[:1],), "N >= 2"),
        ((beads * np.nan,), "NaN"),
        ((beads, np.zeros(3)), r"\(20,\)"),
        ((beads, np.full(20, -np.inf)), "infinity"),
        ((beads, np.full(20, np.nan)), "infinity"),
    ):
        with pytest.raises(ValueError, match=message):
            ReferenceBeads(*arguments)
