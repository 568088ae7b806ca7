"""Metropolis on bead states s whose probability, Z(s), is known by unbiased estimates only.

The estimate of the current state is kept until the chain leaves it, never drawn anew: then the
chain samples exp(-F(s)/kT) ∝ Z(s) itself, however rough the estimates are (Beaumont, Genetics 164,
1139 (2003); Andrieu, Roberts, Ann. Statist. 37, 697 (2009)). Rough ones cost acceptance: a state
whose Ẑ is too large is left late. An estimate must be unbiased: exp of `log_mean_exp` of plain
weights or `AnnealedSamples.log_z`, not the corrected ln Z. Numbering (E6) as in the project's
theory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Propose = Callable[[np.ndarray, np.random.Generator], tuple[np.ndarray, np.ndarray]]
Estimator = Callable[[np.ndarray, np.random.Generator], np.ndarray]


class Chains(NamedTuple):
    """C chains of n steps.

    Attributes
    ----------
    states
        States after each step, (n, C, ...).
    log_z
        The estimates they were kept with, (n, C).
    acceptance
        Share of proposals taken, (C,).
    """

    states: np.ndarray
    log_z: np.ndarray
    acceptance: np.ndarray


def pseudo_marginal_chains(
    propose: Propose,
    estimate: Estimator,
    start: np.ndarray,
    n_steps: int,
    rng: np.random.Generator,
) -> Chains:
    """Run chains on s, all at once: one batch of estimates per step.

    Parameters
    ----------
    propose
        Function of states (C, ...) and a generator: new states, and
        ln [p(new -> old)/p(old -> new)], (C,). A state with ratio -inf can't be gone to.
    estimate
        Function of states (C, ...) and a generator: ln Ẑ, (C,), of unbiased and independent Ẑ;
        -inf for zero.
    start
        First states, (C, ...).
    n_steps
        Steps of each chain; C (n + 1) estimates.
    rng
        Source of randomness.

    Raises
    ------
    ValueError
        If Ẑ of a first state is zero.
    """
    states, log_z = np.array(start, dtype=float), np.array(estimate(start, rng), dtype=float)
    if not np.isfinite(log_z).all():
        raise ValueError(
            f"the estimate of Z is zero at {np.isneginf(log_z).sum()} of {len(log_z)} first "
            "states, where no chain can be: start elsewhere, or estimate with more samples"
        )
    chain, estimates = np.empty((n_steps, *states.shape)), np.empty((n_steps, len(states)))
    n_accepted = np.zeros(len(states))
    for step in range(n_steps):
        proposed, log_ratio = propose(states, rng)
        new_log_z = estimate(proposed, rng)
        accepted = -rng.standard_exponential(len(states)) < new_log_z - log_z + log_ratio
        states[accepted], log_z[accepted] = proposed[accepted], new_log_z[accepted]
        chain[step], estimates[step] = states, log_z
        n_accepted += accepted
    return Chains(chain, estimates, n_accepted / n_steps)


def random_walk(scale: float) -> Propose:
    """Return proposals that add normal noise of a standard deviation, in Å or rad, to s."""

    def propose(states: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return states + scale * rng.standard_normal(states.shape), np.zeros(len(states))

    return propose


class StoredChain(NamedTuple):
    """Where a chain over stored states is after each step, (n,), and its acceptance."""

    index: np.ndarray
    acceptance: float


def stored_chain(
    log_z: np.ndarray, reduced_free_energy: np.ndarray, rng: np.random.Generator
) -> StoredChain:
    """Turn stored states of a bead run into a chain that samples Z(s): an independence sampler.

    State i, a draw of exp(-F(s)/kT) with the F of the run, is proposed at step i and taken with
    probability min(1, W_i/W), W = Ẑ exp(F/kT). States must be independent draws: thin the run to
    its correlation time. The first one with weight begins the chain, and holds for steps before.

    Parameters
    ----------
    log_z
        ln Ẑ of every state, (n,), of unbiased Ẑ.
    reduced_free_energy
        F/kT of every state, (n,).
    rng
        Source of decisions.

    Returns
    -------
    StoredChain
        States, or samples of them, are to be taken at `index`.

    Raises
    ------
    ValueError
        If no state has weight, or there are fewer than two.
    """
    log_w = np.asarray(log_z, float) + np.asarray(reduced_free_energy, float)
    alive = np.flatnonzero(np.isfinite(log_w))
    if log_w.ndim != 1 or len(log_w) < 2 or not len(alive):
        raise ValueError(
            f"a chain needs at least two states, one of them with weight; got {log_w.shape} with "
            f"{len(alive)} of weight: reconstruct more samples at each"
        )
    index, here = np.empty(len(log_w), dtype=int), int(alive[0])
    log_u = -rng.standard_exponential(len(log_w))
    n_accepted = 0
    for i in range(len(log_w)):
        if i > alive[0] and log_u[i] < log_w[i] - log_w[here]:
            here, n_accepted = i, n_accepted + 1
        index[i] = here
    return StoredChain(index, n_accepted / (len(log_w) - 1))
