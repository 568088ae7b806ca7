"""MBAR: one free-energy landscape from samples of many biased ensembles.

Shirts, Chodera, J. Chem. Phys. 129, 124105 (2008). With N_k samples of ensemble k and u_k(n) the
reduced bias of sample n there, the dimensionless free energies solve
f_k = -ln Σ_n c_n exp(-u_k(n)) with c_n = 1 / Σ_l N_l exp(f_l - u_l(n)): the weight of sample n in
the ensemble without a bias. The f are the minimum of a convex function; its Newton steps end in few
iterations, the plain iteration keeps far starts safe. Few ensembles count for a sample, so that
matrices over samples and ensembles are sparse.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_array, csr_array, diags_array

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
    ensemble_influence
        First-order change of f per ensemble that counts once more, N_k with it, (K, K): samples
        of an ensemble against what all the others say of it (clusters of Liang, Zeger, Biometrika
        73, 13 (1986)).
    inconsistency
        Mean square of these over what the blocks of each ensemble let expect: about one or less if
        the ensembles agree, more if they are not in equilibrium or slower than a block.
    """

    free_energy: np.ndarray
    log_weight: np.ndarray
    influence: np.ndarray
    share: csr_array
    ensemble_influence: np.ndarray
    inconsistency: float


def solve_mbar(factor: np.ndarray | csr_array, ensemble: np.ndarray, block: np.ndarray) -> Mbar:
    """Combine samples of biased ensembles.

    Parameters
    ----------
    factor
        exp(-u_k(n)) of every sample in every ensemble, (N, K); zeros may be left out.
    ensemble
        Which ensemble a sample was drawn from, (N,).
    block
        Independent block that it belongs to, (N,), from 0 without gaps.

    Raises
    ------
    ValueError
        If an ensemble has no sample, or the ensembles don't overlap.
    """
    factor = csr_array(factor)
    n_ensembles = factor.shape[1]
    count = np.bincount(ensemble, minlength=n_ensembles).astype(float)
    if (count == 0).any():
        raise ValueError(f"ensemble {int(count.argmin())} has no sample")
    f = np.zeros(n_ensembles)
    for _ in range(_MOST_ITERATIONS):
        share, denominator = _shares(factor, count, f)
        taken = share.sum(0)  # expected samples per ensemble: N_k at the solution
        if np.abs(taken / count - 1).max() < _TOLERANCE:
            break
        newton = f - np.linalg.lstsq(_hessian(share), taken - count, rcond=1e-12)[0]
        plain = f - np.log(np.maximum(taken, np.finfo(float).tiny) / count)
        f = _closer(factor, count, newton - newton[0], plain - plain[0])
    else:
        raise ValueError(_APART)
    root, hessian = np.sqrt(count), _hessian(share)
    if n_ensembles > 1 and np.linalg.eigvalsh(hessian / np.outer(root, root))[1] < 1e-6:
        raise ValueError(_APART)
    samples = np.arange(len(block))
    owner = np.zeros(block.max() + 1, dtype=int)
    owner[block] = ensemble
    excess = (coo_array((np.ones(len(block)), (block, samples))) @ share).toarray()
    np.add.at(excess, (block, ensemble), -1.0)
    totals = np.zeros((n_ensembles, n_ensembles))
    np.add.at(totals, owner, excess)
    against = totals + hessian  # N_k counts, too: what is left is zero on average
    both = np.linalg.lstsq(hessian, -np.concatenate([excess, against]).T, rcond=1e-10)[0].T
    influence, of_ensemble = np.split(both - both[:, :1], [len(excess)])
    n_blocks = np.bincount(owner, minlength=n_ensembles)[owner]
    within = excess - totals[owner] / n_blocks[:, None]
    expected = -(within * influence).sum(1) @ (n_blocks / np.maximum(n_blocks - 1, 1))
    inconsistency = -(against * of_ensemble).sum() / expected if expected > 0 else 0.0
    log_weight = -np.log(denominator)
    log_weight -= log_weight.max()
    log_weight -= np.log(np.exp(log_weight).sum())
    return Mbar(f, log_weight, influence, share, of_ensemble, float(inconsistency))


def _shares(factor: csr_array, count: np.ndarray, f: np.ndarray) -> tuple[csr_array, np.ndarray]:
    """Return the probability that a sample is of each ensemble, (N, K), and the norms, (N,)."""
    scale = count * np.exp(f - f.max())
    denominator = factor @ scale
    share = diags_array(1 / denominator) @ factor @ diags_array(scale)
    return share, denominator * np.exp(f.max())


def _hessian(share: csr_array) -> np.ndarray:
    """Second derivatives of the convex function, (K, K)."""
    return np.diag(share.sum(0)) - (share.T @ share).toarray()


def _closer(factor: csr_array, count: np.ndarray, *candidates: np.ndarray) -> np.ndarray:
    """Return which candidate has the smaller gradient, as pymbar's adaptive solver does."""

    def gradient(f: np.ndarray) -> float:
        if not np.isfinite(f).all() or np.ptp(f) > 600:  # exp would overflow
            return np.inf
        scale = count * np.exp(f - f.max())
        taken = scale * (factor.T @ (1 / (factor @ scale)))
        return float(((taken - count) ** 2).sum())

    return min(candidates, key=gradient)
