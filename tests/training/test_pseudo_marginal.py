"""Metropolis on s with noisy Z(s): exact, where the same with fresh estimates is not."""

import numpy as np
import pytest
from linear_gaussian import GaussianBackmapper, LinearGaussian
from scipy.stats import chisquare

from ccg_mda.weights import log_mean_exp
from ccg_training.pseudo_marginal import pseudo_marginal_chains, random_walk, stored_chain
from ccg_training.reconstruction import reconstruct

Z = np.array([1.0, 0.5, 2.0])
NOISE = np.array([0.2, 1.5, 0.8])  # of ln Ẑ: another one at every state


def estimate(states, rng):
    """Log-normal estimates of mean Z; now and then zero, made up for by the others."""
    label = states[:, 0].astype(int)
    noise = NOISE[label]
    value = np.log(Z[label] / 0.8) + noise * rng.normal(size=len(label)) - noise**2 / 2
    return np.where(rng.random(len(label)) < 0.2, -np.inf, value)


def next_label(states, rng):
    """Up with probability 0.7, down with 0.3: not symmetric."""
    up = rng.random(len(states)) < 0.7
    ratio = np.log(np.where(up, 0.3 / 0.7, 0.7 / 0.3))
    return (states + np.where(up, 1, -1)[:, None]) % 3, ratio


def test_frequencies_are_exact_for_noisy_estimates():
    """Last states of independent chains; estimates drawn anew at each step would fail."""
    rng, n = np.random.default_rng(0), 20000
    calls = []

    def counted(states, rng):
        calls.append(len(states))
        value = estimate(states, rng)
        return value if len(calls) > 1 else np.log(Z[states[:, 0].astype(int)])

    first = rng.integers(3, size=(n, 1)).astype(float)
    chains = pseudo_marginal_chains(next_label, counted, first, 80, rng)
    counts = np.bincount(chains.states[-1, :, 0].astype(int), minlength=3)
    assert chisquare(counts, n * Z / Z.sum()).pvalue > 1e-3
    assert calls == [n] * 81
    kept = np.diff(chains.states[..., 0], axis=0) == 0
    assert (np.diff(chains.log_z, axis=0)[~kept] != 0).all()
    assert chains.acceptance.mean() == pytest.approx((~kept).mean(), abs=0.01)

    fresh = first.copy()
    for _ in range(80):
        proposed, ratio = next_label(fresh, rng)
        gain = estimate(proposed, rng) - np.nan_to_num(estimate(fresh, rng), neginf=-1e300)
        taken = -rng.standard_exponential(n) < gain + ratio
        fresh[taken] = proposed[taken]
    counts = np.bincount(fresh[:, 0].astype(int), minlength=3)
    assert chisquare(counts, n * Z / Z.sum()).pvalue < 1e-6


def test_stored_states_of_a_bead_run_become_a_chain_of_the_ensemble():
    rng, n = np.random.default_rng(1), 100000
    model = np.array([0.5, 0.2, 0.3])  # exp(-F/kT) of the run
    labels = rng.choice(3, size=n, p=model)
    chain = stored_chain(estimate(labels[:, None], rng), -np.log(model[labels]), rng)
    visited = labels[chain.index]
    blocks = np.array([(part[:, None] == np.arange(3)).mean(0) for part in np.split(visited, 50)])
    error = blocks.std(0, ddof=1) / np.sqrt(50)
    assert (np.abs(blocks.mean(0) - Z / Z.sum()) < 3.5 * error).all()
    assert error.max() < 0.02
    assert (chain.index[1:] >= chain.index[:-1]).all()
    moves = (np.diff(chain.index) > 0).mean()
    assert chain.acceptance == pytest.approx(moves, abs=2 / n)


def test_beads_of_a_molecule_with_a_rough_flow():
    """Two samples per estimate, of a flow whose quality depends on s: E[U|s] over exp(-F/kT)."""
    molecule = LinearGaussian(n_atoms=4, bead_atoms=(0, 2, 3))
    flow = GaussianBackmapper(molecule, shift=0.3, bend=0.6, stretch=0.3)
    first = molecule.sample_beads(400, np.random.default_rng(2))
    assert flow.ess(first).std() > 0.05
    truth = 0.5 * 3 * molecule.n_atoms * molecule.kT()

    def log_z(states, rng):
        samples = reconstruct(flow, molecule, states, 2, rng, batch_size=4096)
        return log_mean_exp(samples.log_weight, axis=1)[0]

    rng = np.random.default_rng(3)
    chains = pseudo_marginal_chains(random_walk(0.06), log_z, first, 300, rng)
    energy = molecule.mean_energy(chains.states)
    per_chain = energy.mean(0)
    error = per_chain.std(ddof=1) / np.sqrt(len(per_chain))
    assert error < 0.02 * truth
    assert abs(per_chain.mean() - truth) < 4 * error
    assert 0.2 < chains.acceptance.mean() < 0.8


def test_a_chain_needs_weight():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="zero at 1 of 2"):
        pseudo_marginal_chains(
            random_walk(0.1), lambda s, rng: np.array([0.0, -np.inf]), np.zeros((2, 1)), 3, rng
        )
    for log_z in ([-np.inf, -np.inf], [0.0]):
        with pytest.raises(ValueError, match="at least two states"):
            stored_chain(np.array(log_z), np.zeros(len(log_z)), rng)
