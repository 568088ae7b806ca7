"""The flow's losses vanish where they should, and the fit finds a density that is known."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from linear_gaussian import LinearGaussian

from ccg_ase.units import thermal_energy
from ccg_mda import Backmapper
from ccg_training.fit_flow import (
    LIKELIHOOD_ONLY,
    FlowFrames,
    FlowLoss,
    fit_flow,
    flow_loss,
    mean_nll,
    relabellings,
)

TEMPERATURE_K = 300.0
KT = thermal_energy(TEMPERATURE_K)
METHYLS = ((0, 2, 3), (11, 12, 13), (19, 20, 21))


def perturbed(flow: Backmapper, size: float, seed: int) -> Backmapper:
    """Return a copy whose parameters all have a random part."""
    flow = copy.deepcopy(flow)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += size * torch.randn(
                parameter.shape, generator=generator, dtype=torch.float64
            )
    return flow


def standardised(cg_map, positions: np.ndarray) -> Backmapper:
    """Return a flow that has the statistics of frames, but hasn't learned anything."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Backmapper.from_data(
            cg_map, TEMPERATURE_K, torch.from_numpy(positions), width=8, hops=3
        )


@pytest.fixture(scope="module")
def target(ala2_map, ala2_positions, ala2_beads) -> Backmapper:
    """Return a flow of alanine dipeptide with three rotors, taken as the truth."""
    rng = np.random.default_rng(5)
    stiff = standardised(ala2_map, ala2_positions + rng.normal(scale=0.03, size=(200, 22, 3)))
    rotor = (stiff.multiplicity == 3).tolist()
    free = Backmapper(ala2_map, TEMPERATURE_K, rotor=rotor, width=8, hops=3)
    free.location.copy_(stiff.location)
    free.scale.copy_(stiff.scale)
    turning = free(torch.from_numpy(ala2_beads)).rsample(rng=rng).detach().numpy()
    return perturbed(standardised(ala2_map, turning), 0.03, 1)


def free_energy(beads: torch.Tensor) -> torch.Tensor:
    """Any smooth invariant function of the beads, in eV."""
    return torch.sin(torch.cdist(beads, beads)).sum((-1, -2)) * 0.05


def frames_of(target: Backmapper, beads: torch.Tensor, seed: int) -> FlowFrames:
    """Draw frames of U = F(s) - kT ln q(x|s), for which `target` is exact, with their forces."""
    x = target(beads).rsample(rng=np.random.default_rng(seed)).detach().requires_grad_()
    s = target.cg_map.apply(x)
    energy = free_energy(s) - KT * target.to_noise(target.points_from(s, x))[1]
    (gradient,) = torch.autograd.grad(energy.sum(), x)
    s = s.detach().requires_grad_()
    (bead_gradient,) = torch.autograd.grad(free_energy(s).sum(), s)
    arrays = (x, torch.ones(len(x)), -gradient, energy, -bead_gradient, free_energy(s))
    return FlowFrames(*(array.detach().numpy() for array in arrays))


@pytest.fixture(scope="module")
def frames(target, ala2_beads) -> FlowFrames:
    return frames_of(target, torch.from_numpy(ala2_beads), 6)


def batch_of(frames: FlowFrames, chosen: slice) -> dict[str, torch.Tensor]:
    """Return frames as `flow_loss` takes them, in double precision."""
    excess = (frames.energy - frames.free_energy) / KT
    arrays = {
        "positions": frames.positions,
        "weight": frames.weight,
        "forces": frames.forces / KT,
        "bead_force": frames.bead_force / KT,
        "excess_energy": excess - excess.mean(),
    }
    return {name: torch.from_numpy(array[chosen]) for name, array in arrays.items()}


# ------------------------------------------------------------------------------ the losses


def test_all_terms_but_the_likelihood_vanish_for_the_exact_flow(target, frames):
    flow = target
    batch = batch_of(frames, slice(12))
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


@pytest.mark.parametrize("size", [1e-3, 2e-3])
def test_they_are_quadratic_in_a_small_error_of_the_flow(target, frames, size):
    batch = batch_of(frames, slice(12))
    found = [
        flow_loss(perturbed(target, factor * size, 2), batch, FlowLoss())[1]
        for factor in (1.0, 2.0)
    ]
    for name in ("noise_force", "label", "energy"):
        assert found[1][name] > 1e-5
        assert found[1][name] / found[0][name] == pytest.approx(4.0, rel=0.25), name


def test_each_term_sees_the_error_that_it_is_there_for(target, frames):
    batch = batch_of(frames, slice(12))
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


def test_weights_are_those_of_an_average(target, frames):
    batch = batch_of(frames, slice(6))
    weight = torch.tensor([0.0, 3.0, 0.0, 1.0, 0.0, 2.0], dtype=torch.float64)
    weighted = flow_loss(target, batch | {"weight": weight}, LIKELIHOOD_ONLY)[1]["likelihood"]
    each = [
        flow_loss(target, batch_of(frames, slice(k, k + 1)), LIKELIHOOD_ONLY)[1]["likelihood"]
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
    assert (turned - log_prob).abs().max() < 30
    swapped = torch.arange(22)
    swapped[[2, 3]] = swapped[[3, 2]]
    assert (distribution.log_prob(x[:, swapped]) - log_prob).max() < -200


# ----------------------------------------------------------------------------------- the fit


@pytest.fixture(scope="module")
def chain() -> Backmapper:
    """Return a flow of a chain of eight atoms, four of them beads, taken as the truth."""
    molecule = LinearGaussian()
    rotor = [False, False, True, False]
    with torch.random.fork_rng():
        torch.manual_seed(4)
        flow = Backmapper(molecule.cg_map, TEMPERATURE_K, rotor=rotor, width=8, hops=3)
    flow.location.copy_(torch.tensor([0.4, 0.2, 0.5]).expand(4, 3))
    flow.scale.copy_(torch.tensor([0.05, 0.1, 0.2]).expand(4, 3))
    return perturbed(flow, 0.05, 5)


@pytest.fixture(scope="module")
def chain_frames(chain) -> FlowFrames:
    beads = LinearGaussian().sample_beads(3000, np.random.default_rng(6))
    return frames_of(chain, torch.from_numpy(beads), 7)


def some(frames: FlowFrames, chosen: slice) -> FlowFrames:
    return FlowFrames(*(array[chosen] for array in vars(frames).values()))


QUICK = {"batch_size": 64, "learning_rate": 2e-3}


def test_likelihood_approaches_that_of_the_truth(chain, chain_frames):
    flow = standardised(chain.cg_map, chain_frames.positions)
    held_out = chain_frames.positions[2500:]
    truth = mean_nll(chain, held_out)
    before = mean_nll(flow, held_out) - truth
    seen = []
    history = fit_flow(
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
    assert len(history) == 20
    assert history[-1]["likelihood"] < history[0]["likelihood"]
    assert [call[:2] for call in seen] == [(k, 200) for k in range(1, 201)]
    assert all(p.dtype == torch.float64 for p in flow.parameters())


def test_forces_and_energies_make_up_for_frames(chain, chain_frames):
    """From a hundred frames, likelihood learns the frames; with forces it learns the density."""
    held_out = chain_frames.positions[100:]
    start = perturbed(chain, 0.05, 8)
    found = {}
    for terms in (LIKELIHOOD_ONLY, FlowLoss()):
        flow = copy.deepcopy(start)
        fit_flow(flow, some(chain_frames, slice(100)), terms=terms, steps=60, seed=0, **QUICK)
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
