"""How far a density q(x|s) is from p(x|s), seen from its own samples and from frames of p.

S states, K samples or M frames each, and log-weights l = -U(x)/kT - ln q(x|s). Samples of q can't
tell that q misses a region; frames of p can. Numbering (E1, E2) as in the project's theory.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .weights import log_mean_exp


class Estimate(NamedTuple):
    """A value and its standard error, arrays of one shape."""

    value: np.ndarray
    error: np.ndarray


def normalised_weights(log_weight: np.ndarray) -> np.ndarray:
    """Weights w̄ that sum to one over the last axis; all zero where no sample has weight."""
    top = log_weight.max(-1, keepdims=True)
    weight = np.exp(log_weight - np.where(np.isfinite(top), top, 0.0))
    return weight / np.maximum(weight.sum(-1, keepdims=True), np.finfo(float).tiny)


def n_samples(array: np.ndarray) -> int:
    """Return K of an array (S, K, ...); an error bar needs K >= 2."""
    if array.ndim < 2 or array.shape[1] < 2:
        raise ValueError(f"an error bar needs arrays (S, K, ...) with K >= 2, got {array.shape}")
    return array.shape[1]


def log_partition(log_weight: np.ndarray) -> Estimate:
    """Estimate ln Z(s) (E2): ln of the mean weight, plus its first-order bias (1/ESS - 1)/2K.

    ψ_k = w̄_k - 1/K, that is a variance of (1/ESS - 1)/(K - 1), with ESS the effective sample size
    as a fraction. Z itself is estimated without bias by ``exp(log_mean_exp(log_weight)[0])``.

    Parameters
    ----------
    log_weight
        l, (S, K).

    Returns
    -------
    Estimate
        (S,) each; -inf and infinity where no sample has weight.
    """
    n_samples(log_weight)
    value, variance = log_mean_exp(log_weight, axis=1)
    empty = np.isneginf(value)
    return Estimate(
        np.where(empty, value, value + variance / 2), np.where(empty, np.inf, np.sqrt(variance))
    )


def forward_effective_sample_size(log_weight: np.ndarray, log_weight_frames: np.ndarray) -> float:
    """Estimate the effective sample size, as a fraction, from frames of p: 1/(E_p[w] E_p[1/w]).

    With w = p(x|s)/q(x|s), from ln Ẑ(s) of the samples; it is the harmonic mean of the effective
    sample sizes of the states. A region that q misses, unseen by its samples, has frames of large
    w. What is left of Ẑ(s) being too small there, E_p[1/w] takes out on average.

    Parameters
    ----------
    log_weight
        l of samples of q, (S, K).
    log_weight_frames
        l of frames at the same states, (S, M).

    Returns
    -------
    float
        0 where a state has no sample of any weight.
    """
    log_z = log_mean_exp(log_weight, axis=1)[0]
    if not np.isfinite(log_z).all():
        return 0.0
    log_ratio = (log_weight_frames - log_z[:, None]).ravel()
    return float(np.exp(-log_mean_exp(log_ratio)[0] - log_mean_exp(-log_ratio)[0]))


class Sandwich(NamedTuple):
    """Bounds of ln Z(s) and how far apart they are; all in nats."""

    lower: Estimate
    upper: Estimate
    gap: Estimate
    reverse_kl: Estimate
    forward_kl: Estimate


def sandwich(log_weight: np.ndarray, log_weight_frames: np.ndarray) -> Sandwich:
    """Bound ln Z(s) from both sides (E1): E_q[l] <= ln Z(s) <= E_p(x|s)[l].

    The gap is KL(q|p) + KL(p|q). Both parts are non-negative; a negative one, beyond its error,
    means that data and flow don't describe the same distribution.

    Parameters
    ----------
    log_weight
        l of samples of q, (S, K).
    log_weight_frames
        l of atomistic frames at the same states, (S, M); M = 1 for the frames that the states
        came from. With M = 1 the error of `upper` is unknown: NaN.

    Returns
    -------
    Sandwich
        `lower`, `upper`: (S,) each, error std/sqrt(K or M). `gap`, `reverse_kl` (ln Z - lower) and
        `forward_kl` (upper - ln Z): means over the states, error std/sqrt(S) over states taken as
        independent.
    """
    if log_weight_frames.ndim != 2 or len(log_weight_frames) != len(log_weight):
        raise ValueError(
            f"need frames of shape (S, M) at the S = {len(log_weight)} states of the samples, "
            f"got {log_weight_frames.shape}"
        )
    lower, upper = _plain_mean(log_weight), _plain_mean(log_weight_frames)
    log_z = log_partition(log_weight).value
    with np.errstate(invalid="ignore"):  # -inf bounds, where samples have no weight
        parts = (upper.value - lower.value, log_z - lower.value, upper.value - log_z)
    means = (_plain_mean(part) for part in parts)
    return Sandwich(lower, upper, *(Estimate(float(m.value), float(m.error)) for m in means))


def _plain_mean(values: np.ndarray) -> Estimate:
    """Mean over the last axis and its error std/sqrt(n), NaN for n = 1."""
    n = values.shape[-1]
    with np.errstate(invalid="ignore"):  # an infinite log-weight has a mean, but no spread
        error = values.std(-1, ddof=1) / np.sqrt(n) if n > 1 else np.full(values.shape[:-1], np.nan)
        return Estimate(values.mean(-1), error)
