"""The flow's losses vanish where they should, and the fit finds a density that is known."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from exact_flows import (
    CHAIN,
    SMALLEST,
    TEMPERATURE_K,
    batch_of,
    directions,
    flow_of,
    frames_of,
    moved,
    perturbed,
    slope,
    standardised,
    structures,
)
from scipy.spatial.transform import Rotation

from ccg_ase import ForceField
from ccg_mda import Backmapper
from ccg_training.fit_flow import (
    LIKELIHOOD_ONLY,
    NAMED_LOSSES,
    FlowFrames,
    FlowLoss,
    fit_flow,
    flow_loss,
    mean_nll,
    relabellings,
)
from ccg_training.flow_frames import Batches

METHYLS = ((0, 2, 3), (11, 12, 13), (19, 20, 21))


@pytest.fixture(scope="module")
def chain() -> Backmapper:
    """Return a flow of a chain of eight atoms, four of them beads, taken as the truth."""
    return flow_of(CHAIN)


@pytest.fixture(scope="module")
def target(ala2_map, ala2_positions, ala2_beads) -> Backmapper:
    """Return a flow of alanine dipeptide with three rotors, taken as the truth."""
    rng = np.random.default_rng(5)
    x = ala2_positions + rng.normal(scale=0.03, size=(600, 22, 3))
    for hydrogens, (carbon, neighbour) in zip(METHYLS, ((1, 4), (10, 8), (18, 16)), strict=True):
        axis = x[:, carbon] - x[:, neighbour]
        axis *= rng.uniform(-np.pi, np.pi, (600, 1)) / np.linalg.norm(axis, axis=1, keepdims=True)
        turns = Rotation.from_rotvec(axis).as_matrix()
        arms = x[:, hydrogens] - x[:, [carbon]]
        x[:, hydrogens] = x[:, [carbon]] + np.einsum("nij,nhj->nhi", turns, arms)
    turning = standardised(ala2_map, x)(torch.from_numpy(ala2_beads)).rsample(rng=rng)
    return perturbed(standardised(ala2_map, turning.detach().numpy()), 0.03, 1)


@pytest.fixture(scope="module")
def frames(target, ala2_beads) -> FlowFrames:
    return frames_of(target, ala2_beads, 6)


# ------------------------------------------------------------------------------ the losses


def test_all_terms_but_the_likelihood_vanish_for_the_exact_flow(target, frames):
    flow = target
    batch = batch_of(frames[:12])
    loss, values = flow_loss(flow, batch, FlowLoss())
    assert set(values) == {"likelihood", "noise_force", "label", "energy"}
    assert values["noise_force"] < 1e-14
    assert values["label"] < 1e-14
    assert values["energy"] < 1e-20
    nll = -flow(flow.cg_map.apply(batch["positions"])).log_prob(batch["positions"]).mean()
    assert values["likelihood"] == pytest.approx(nll.item() / flow.n_dof, abs=1e-12)
    assert loss.item() == pytest.approx(values["likelihood"], abs=1e-12)
    # A minimum: of these terms for every batch, of the likelihood on the average only.
    loss, _ = flow_loss(flow, batch, FlowLoss(likelihood=0.0))
    gradients = torch.autograd.grad(loss, list(flow.parameters()), allow_unused=True)
    assert max(g.abs().max() for g in gradients if g is not None) < 1e-6


ALL_ON_FRAMES = FlowLoss(coordinate_force=2.0)


@pytest.mark.parametrize("size", [1e-3, 2e-3])
def test_they_are_quadratic_in_a_small_error_of_the_flow(target, frames, size):
    batch = batch_of(frames[:12])
    found = [
        flow_loss(perturbed(target, factor * size, 2), batch, ALL_ON_FRAMES)[1]
        for factor in (1.0, 2.0)
    ]
    for name in ("noise_force", "label", "energy", "coordinate_force"):
        assert found[1][name] > 1e-5
        assert found[1][name] / found[0][name] == pytest.approx(4.0, rel=0.25), name


def test_each_term_sees_the_error_that_it_is_there_for(target, frames):
    batch = batch_of(frames[:12])
    exact = flow_loss(target, batch, FlowLoss())[1]

    def terms_with(**changes):
        return flow_loss(target, batch | changes, FlowLoss())[1]

    bead_force = batch["bead_force"] + 0.1
    only_label = terms_with(bead_force=bead_force)
    assert only_label["label"] == pytest.approx(0.01, rel=1e-3)
    assert only_label["noise_force"] == exact["noise_force"]
    only_energy = terms_with(excess_energy=batch["excess_energy"] + torch.arange(12) % 2)
    assert only_energy["energy"] == pytest.approx(0.5 * 0.25 / target.n_dof, rel=1e-6)
    shifted = terms_with(excess_energy=batch["excess_energy"] + 1e3)
    assert shifted["energy"] < 1e-18  # F is known up to a constant only
    stretched = terms_with(forces=1.1 * batch["forces"])
    assert stretched["noise_force"] > 1e-4
    assert stretched["energy"] == exact["energy"]


@pytest.mark.parametrize(
    "name",
    ["likelihood", "noise_force", "label", "energy", "coordinate_force"],
)
def test_gradients_agree_with_finite_differences(chain, chain_frames, name):
    off = FlowLoss(likelihood=0.0, noise_force=0.0, label=0.0, energy=0.0)
    terms = replace(off, **{name: 1.0})
    batch = batch_of(chain_frames[:6])
    flow = perturbed(chain, 0.01, 2)
    loss, _ = flow_loss(flow, batch, terms)
    for direction in directions(flow, 3):
        h = 1e-4
        ahead, behind = (
            flow_loss(moved(flow, direction, step), batch, terms)[1][name] for step in (h, -h)
        )
        found = (ahead - behind) / (2 * h)
        assert slope(loss, flow, direction) == pytest.approx(found, rel=1e-4, abs=1e-7)


def test_frames_are_drawn_as_often_as_they_weigh(chain, chain_frames):
    weight = np.array([0.0, 3.0, 1.0, 0.0])
    some = replace(chain_frames[:4], weight=weight, energy=np.arange(4.0) * 0.1)
    batch = Batches(chain, some, np.random.default_rng(0)).draw(40_000)
    assert torch.equal(batch["weight"], torch.ones(40_000))
    column = "excess_energy" if "excess_energy" in batch else "energy"
    _, counts = torch.unique(batch[column], return_counts=True)
    assert counts.tolist() == pytest.approx([30_000, 10_000], rel=0.03)


def test_weights_are_those_of_an_average(target, frames):
    batch = batch_of(frames[:6])
    weight = torch.tensor([0.0, 3.0, 0.0, 1.0, 0.0, 2.0], dtype=torch.float64)
    weighted = flow_loss(target, batch | {"weight": weight}, LIKELIHOOD_ONLY)[1]["likelihood"]
    each = [
        flow_loss(target, batch_of(frames[k : k + 1]), LIKELIHOOD_ONLY)[1]["likelihood"]
        for k in range(6)
    ]
    assert weighted == pytest.approx(np.mean(weight.numpy() * each), abs=1e-12)


def test_mean_nll_is_minus_the_mean_log_density(target, frames):
    x = torch.from_numpy(frames.positions[:50])
    expected = -target(target.cg_map.apply(x)).log_prob(x).mean().item()
    assert mean_nll(target, frames.positions[:50], batch_size=7) == pytest.approx(expected)


# ------------------------------------------------------------------------------- relabelling


def test_relabelling_turns_methyl_groups_and_nothing_else(target, chain):
    drawn = relabellings(target, 500, np.random.default_rng(0))
    assert drawn.shape == (500, 22)
    assert len(np.unique(drawn, axis=0)) == 27
    moved = np.flatnonzero((drawn != np.arange(22)).any(0))
    assert sorted(moved) == sorted(sum(METHYLS, ()))
    for a, b, c in METHYLS:
        turned = [tuple(row) for row in drawn[:, (a, b, c)].tolist()]
        assert set(turned) == {(a, b, c), (b, c, a), (c, a, b)}
        assert 120 < turned.count((a, b, c)) < 215
    unmoved = relabellings(chain, 2, np.random.default_rng(0))
    np.testing.assert_array_equal(unmoved, [np.arange(8)] * 2)


def test_relabelled_frames_are_as_likely_and_swapped_ones_are_not(target, frames):
    x = torch.from_numpy(frames.positions[:5])
    distribution = target(target.cg_map.apply(x))
    log_prob = distribution.log_prob(x)
    drawn = torch.from_numpy(relabellings(target, 50, np.random.default_rng(0)))
    turned = torch.stack([distribution.log_prob(x[:, row]) for row in drawn])
    assert (turned - log_prob).abs().max() < 60
    swapped = torch.arange(22)
    swapped[[2, 3]] = swapped[[3, 2]]
    assert (distribution.log_prob(x[:, swapped]) - log_prob).max() < -200


# ----------------------------------------------------------------------------------- the fit


@pytest.fixture(scope="module")
def chain_frames(chain) -> FlowFrames:
    return frames_of(chain, chain.cg_map.apply(structures(CHAIN, 3000, 6)), 7)


QUICK = {"batch_size": 64, "learning_rate": 2e-3}


def test_likelihood_approaches_that_of_the_truth(chain, chain_frames):
    flow = standardised(chain.cg_map, chain_frames.positions)
    held_out = chain_frames.positions[2500:]
    truth = mean_nll(chain, held_out)
    before = mean_nll(flow, held_out) - truth
    seen = []
    fit = fit_flow(
        flow,
        FlowFrames(chain_frames.positions[:2500], np.ones(2500)),
        terms=LIKELIHOOD_ONLY,
        steps=200,
        seed=0,
        progress=lambda *call: seen.append(call),
        **QUICK,
    )
    after = mean_nll(flow, held_out) - truth
    assert 0 < after < 0.3 * before
    assert [record["step"] for record in fit.history] == list(range(10, 201, 10))
    assert fit.history[-1]["likelihood"] < fit.history[0]["likelihood"]
    assert str(fit) == "ran to the end at step 200, kept the weights of step 200"
    assert [call[:2] for call in seen] == [(k, 200) for k in range(1, 201)]
    assert all(p.dtype == torch.float64 for p in flow.parameters())


def test_forces_and_energies_make_up_for_frames(chain, chain_frames):
    """From a hundred frames, likelihood learns the frames; with forces it learns the density."""
    held_out = chain_frames.positions[100:]
    start = perturbed(chain, 0.05, 9)
    found = {}
    for terms in (LIKELIHOOD_ONLY, FlowLoss()):
        flow = copy.deepcopy(start)
        fit_flow(flow, chain_frames[:100], terms=terms, steps=40, seed=0, **QUICK)
        found[terms] = mean_nll(flow, held_out) - mean_nll(chain, held_out)
    before = mean_nll(start, held_out) - mean_nll(chain, held_out)
    assert 0 < found[FlowLoss()] < 0.3 * min(before, found[LIKELIHOOD_ONLY])


def parameters(flow: Backmapper) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in flow.parameters()])


def test_same_seed_same_bits_and_nothing_global(chain, chain_frames):
    random_state, dtype = torch.random.get_rng_state(), torch.get_default_dtype()
    found = []
    for seed in (0, 0, 1):
        flow = copy.deepcopy(chain)
        fit_flow(flow, chain_frames, terms=FlowLoss(), steps=3, seed=seed, **QUICK)
        found.append(parameters(flow))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert torch.equal(random_state, torch.random.get_rng_state())
    assert dtype == torch.get_default_dtype()
    assert not torch.are_deterministic_algorithms_enabled()


def test_same_bits_on_two_threads(target, frames):
    """They would otherwise add the gradients of an indexed tensor in whatever order they come."""
    threads = torch.get_num_threads()
    found = []
    torch.set_num_threads(2)
    try:
        for _ in range(2):
            flow = copy.deepcopy(target)
            settings = {"batch_size": 512, "learning_rate": 5e-3}
            fit_flow(flow, frames, terms=LIKELIHOOD_ONLY, steps=2, seed=0, **settings)
            found.append(parameters(flow))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


def test_held_out_frames_choose_the_step_and_end_the_fit(chain, chain_frames):
    """Forty frames are learned by heart; what is kept is the best moment before that."""
    flow = perturbed(chain, 0.05, 8)
    held_out = chain_frames[2000:]
    fit = fit_flow(
        flow,
        FlowFrames(chain_frames.positions[:40], np.ones(40)),
        terms=LIKELIHOOD_ONLY,
        steps=400,
        batch_size=40,
        learning_rate=1e-2,
        seed=0,
        averaging=0.8,
        held_out=held_out,
        patience=3,
    )
    seen = {record["step"]: record["nll"] for record in fit.history}
    assert fit.stopped_early
    assert fit.best_step == min(seen, key=seen.get) < fit.steps < 400
    assert fit.steps >= fit.best_step + 3 * 20
    assert f"stopped early at step {fit.steps}, kept the weights of" in str(fit)
    kept = mean_nll(flow, chain_frames.positions[2000:])
    assert kept == pytest.approx(seen[fit.best_step], abs=1e-3)
    assert kept < seen[fit.steps] - 0.01


def test_a_high_learning_rate_is_not_taken_for_overfitting(chain, chain_frames):
    """From the truth, all losses grow until the rate falls: the fit must go on till then."""
    fit = fit_flow(
        copy.deepcopy(chain),
        chain_frames[:2000],
        terms=FlowLoss.named("energy"),
        steps=60,
        batch_size=64,
        learning_rate=1e-2,
        seed=0,
        held_out=chain_frames[2000:],
        patience=3,
    )
    losses = [record["held_out"] for record in fit.history]
    assert fit.steps == 60
    assert not fit.stopped_early
    assert max(losses) > losses[0]
    assert fit.best_step == fit.history[int(np.argmin(losses))]["step"]
    assert fit.history[-1]["nll"] == pytest.approx(12 * fit.history[-1]["likelihood"], abs=2.0)


def test_a_force_field_learns_along_where_the_bead_force_is_unknown():
    """Joint force matching: both models meet at the truth, from frames with forces only."""
    truth = flow_of(SMALLEST)
    frames = frames_of(truth, truth.cg_map.apply(structures(SMALLEST, 2000, 6)), 7)
    beads = truth.cg_map.apply(frames.positions)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        force_field = ForceField.from_data(
            truth.cg_map, TEMPERATURE_K, beads, channels=4, n_layers=1
        )
    flow = perturbed(truth, 0.05, 8)

    def errors() -> tuple[float, float]:
        _, force = force_field.energy_and_forces(torch.from_numpy(beads).float())
        scatter = flow_loss(flow, batch_of(frames[:300]), FlowLoss())[1]["label"]
        return np.sqrt(np.mean((force.numpy() - frames.bead_force) ** 2)), scatter

    before = errors()
    fit = fit_flow(
        flow,
        replace(frames, bead_force=None, free_energy=None),
        terms=FlowLoss(),
        steps=80,
        batch_size=64,
        learning_rate=1e-2,
        seed=0,
        averaging=0.9,
        free_energy=force_field,
    )
    after = errors()
    assert after[0] < 0.5 * before[0]
    assert after[1] < 0.2 * before[1]
    names = {"likelihood", "energy", "noise_force", "label", "loss", "step"}
    assert set(fit.history[-1]) == names
    assert force_field.dtype == torch.float32
    assert all(p.requires_grad for p in flow.parameters())


def test_temperatures_and_boxes_of_frames_reach_the_flow(chain, chain_frames, monkeypatch):
    hot = replace(
        chain_frames[:50],
        temperature_K=np.linspace(300.0, 400.0, 50),
        box=np.linspace(20.0, 30.0, 50)[:, None, None] * np.eye(3),
    )
    batch = Batches(chain, hot, np.random.default_rng(0)).draw(8)
    plain = Batches(chain, chain_frames[:50], np.random.default_rng(0)).draw(8)
    ratio = (TEMPERATURE_K / batch["temperature_K"])[:, None, None]
    torch.testing.assert_close(batch["forces"], plain["forces"] * ratio)
    torch.testing.assert_close(batch["bead_force"], plain["bead_force"] * ratio)
    asked = []

    def recorded(method):
        def call(*args, **given):
            asked.append(given)
            return method(*args)

        return call

    flow = copy.deepcopy(chain).float()
    for name in ("to_noise_terms", "from_noise"):
        monkeypatch.setattr(flow, name, recorded(getattr(flow, name)))
    flow_loss(flow, batch, FlowLoss())
    mean_nll(flow, hot.positions, temperature_K=hot.temperature_K, box=hot.box)
    for name, frames in (("temperature_K", hot.temperature_K), ("box", hot.box)):
        assert torch.equal(asked[0][name], batch[name])
        assert torch.equal(asked[1][name], batch[name])
        np.testing.assert_allclose(asked[2][name], frames)
    with pytest.raises(ValueError, match="holds at one temperature"):
        fit_flow(
            chain, hot, terms=FlowLoss(), steps=1, seed=0, free_energy=torch.nn.Module(), **QUICK
        )


def test_losses_have_names(target, frames):
    assert FlowLoss.named("likelihood") == LIKELIHOOD_ONLY
    assert FlowLoss.named("forces+energy") == FlowLoss()
    for name, terms in NAMED_LOSSES.items():
        assert FlowLoss.named(name) is terms
        assert terms.likelihood == 1.0, name  # never energies or forces alone
        assert terms.needs_samples == any(n in name for n in ("variance", "_kl"))
    with pytest.raises(ValueError, match="no flow loss is named 'magic': choose likelihood, "):
        FlowLoss.named("magic")
    with pytest.raises(ValueError, match=r"needs samples of the flow: give own=OwnSamples"):
        fit_flow(target, frames, terms=FlowLoss.named("reverse_kl"), steps=1, seed=0, **QUICK)


def test_missing_parts_of_frames_are_named(target, frames):
    run = {"steps": 1, "seed": 0, **QUICK}
    bare = FlowFrames(frames.positions, frames.weight)
    with pytest.raises(ValueError, match="needs forces and bead_force and energy and free_energy"):
        fit_flow(target, bare, terms=FlowLoss(), **run)
    with pytest.raises(ValueError, match="needs forces of the frames: give them, or set"):
        fit_flow(target, replace(frames, forces=None), terms=FlowLoss(), **run)
    assert FlowLoss(noise_force=0, label=0).needs_forces is False


def test_broken_frames_stop_the_fit(target, frames):
    broken = FlowFrames(frames.positions * np.nan, frames.weight)
    flow = copy.deepcopy(target)
    before = parameters(flow)
    with pytest.raises(FloatingPointError, match=r"nan at step 1.*ccg check"):
        fit_flow(flow, broken, terms=LIKELIHOOD_ONLY, steps=2, seed=0, **QUICK)
    assert torch.equal(before, parameters(flow))


def test_frames_are_joined(frames):
    twice = frames.joined(frames)
    assert len(twice) == 2 * len(frames)
    np.testing.assert_array_equal(twice.bead_force[len(frames) :], frames.bead_force)
    bare = FlowFrames(frames.positions, frames.weight)
    assert bare.joined(bare).forces is None
    with pytest.raises(ValueError, match="only one of both sets of frames has forces and energy"):
        frames.joined(bare)
