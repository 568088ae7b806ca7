"""MBAR: one free-energy landscape from samples of many biased ensembles.

Shirts, Chodera, J. Chem. Phys. 129, 124105 (2008). With N_k samples of ensemble k and u_k(n) the
reduced bias of sample n there, the dimensionless free energies solve
f_k = -ln Σ_n c_n exp(-u_k(n)) with c_n = 1 / Σ_l N_l exp(f_l - u_l(n)): the weight of sample n in
the ensemble without a bias. The f are the minimum of a convex function; its Newton steps end in few
iterations, the plain iteration keeps far starts safe.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

_TOLERANCE = 1e-9
_MOST_ITERATIONS = 10_000
_APART = "the umbrella windows don't overlap: use more of them, or a smaller range"


class Mbar(NamedTuple):
    """Solution for K ensembles and N samples.

    Attributes
    ----------
    free_energy
        f_k, (K,), in kT; the first is zero.
    log_weight
        ln c_n, (N,), normalised to one: weights in the unbiased ensemble.
    influence
        First-order change of f per block that counts once more, N_k held, (n_blocks, K).
    share
        Probability that a sample is of each ensemble, (N, K): minus the derivative of ln c by f.
    """

    free_energy: np.ndarray
    log_weight: np.ndarray
    influence: np.ndarray
    share: np.ndarray


def solve_mbar(bias: np.ndarray, ensemble: np.ndarray, block: np.ndarray) -> Mbar:
    """Combine samples of biased ensembles.

    Parameters
    ----------
    bias
        Reduced bias energies u_k(n) of every sample in every ensemble, (N, K).
    ensemble
        Which ensemble a sample was drawn from, (N,).
    block
        Independent block that it belongs to, (N,), from 0 without gaps.

    Raises
    ------
    ValueError
        If an ensemble has no sample, or the ensembles don't overlap.
    """
    n_ensembles = bias.shape[1]
    count = np.bincount(ensemble, minlength=n_ensembles).astype(float)
    if (count == 0).any():
        raise ValueError(f"ensemble {int(count.argmin())} has no sample")
    f = np.zeros(n_ensembles)
    boltzmann, floor = _boltzmann(bias)
    for _ in range(_MOST_ITERATIONS):
        share, denominator = _shares(boltzmann, count, f)
        taken = share.sum(0)  # expected samples per ensemble: N_k at the solution
        if np.abs(taken / count - 1).max() < _TOLERANCE:
            break
        newton = f - np.linalg.lstsq(_hessian(share), taken - count, rcond=1e-12)[0]
        plain = f - np.log(np.maximum(taken, np.finfo(float).tiny) / count)
        f = _closer(boltzmann, count, newton - newton[0], plain - plain[0])
    else:
        raise ValueError(_APART)
    root = np.sqrt(count)
    if n_ensembles > 1 and np.linalg.eigvalsh(_hessian(share) / np.outer(root, root))[1] < 1e-6:
        raise ValueError(_APART)
    order = np.argsort(block, kind="stable")
    first = np.searchsorted(block[order], np.arange(block.max() + 1))
    excess = np.add.reduceat(share[order], first)
    np.add.at(excess, (block, ensemble), -1.0)
    influence = -np.linalg.lstsq(_hessian(share), excess.T, rcond=1e-10)[0].T
    log_weight = floor - np.log(denominator)
    log_weight -= log_weight.max()
    log_weight -= np.log(np.exp(log_weight).sum())
    return Mbar(f, log_weight, influence - influence[:, :1], share)


def _boltzmann(bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return exp(-u) scaled to a largest value of one per sample, and the smallest u."""
    floor = bias.min(1)
    return np.exp(floor[:, None] - bias), floor


def _shares(
    boltzmann: np.ndarray, count: np.ndarray, f: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the probability that a sample is of each ensemble, (N, K), and the norms, (N,)."""
    share = boltzmann * (count * np.exp(f - f.max()))
    denominator = share.sum(1)
    return share / denominator[:, None], denominator * np.exp(f.max())


def _hessian(share: np.ndarray) -> np.ndarray:
    """Second derivatives of the convex function, (K, K)."""
    return np.diag(share.sum(0)) - share.T @ share


def _closer(boltzmann: np.ndarray, count: np.ndarray, *candidates: np.ndarray) -> np.ndarray:
    """Return which candidate has the smaller gradient, as pymbar's adaptive solver does."""

    def gradient(f: np.ndarray) -> float:
        if not np.isfinite(f).all() or np.ptp(f) > 600:  # exp would overflow
            return np.inf
        return float(((_shares(boltzmann, count, f)[0].sum(0) - count) ** 2).sum())

    return min(candidates, key=gradient)
