"""Statistical weights of reconstructed atoms: quality, averages with error bars, resampling.

All functions take log weights and work relative to the largest, so that nothing overflows. A log
weight of -inf is a frame of weight zero; NaN or +inf is an error.
"""

from __future__ import annotations

from collections.abc import Callable

import MDAnalysis as mda
import numpy as np
from MDAnalysis.exceptions import NoDataError

from ccg_ase.units import thermal_energy

_TAIL_MIN = 5
_EQUAL = 1e-8  # relative; far above the rounding of energies of 1e5 kT


def log_weights(
    universe: mda.Universe,
    *,
    free_energy: Callable[[np.ndarray], np.ndarray] | None = None,
    temperature_K: float | None = None,
) -> np.ndarray:
    """Collect ``ts.data["log_weight"]`` over a trajectory; the current frame stays where it is.

    Without ``free_energy`` the weights are those of atoms x *given* their beads s,
    ln w = -U(x)/kT - ln q(x|s): compare only frames of the same s. If the beads were sampled from
    exp(-F(s)/kT), adding F(s)/kT gives the weights of the whole ensemble.

    Parameters
    ----------
    universe
        Made by `backmap` with a ``potential``, or re-read from the H5MD file of one.
    free_energy
        Maps beads in Å, shape (n_frames, n_beads, 3), to F in eV, shape (n_frames,).
    temperature_K
        Temperature of F; needed with ``free_energy``.

    Returns
    -------
    ndarray
        Shape (n_frames,).
    """
    if free_energy is not None and temperature_K is None:
        raise ValueError("free_energy needs the temperature_K that it belongs to")
    collected, beads = [], []
    for ts in universe.trajectory.copy():
        if "log_weight" not in ts.data:
            raise NoDataError(
                f"frame {ts.frame} carries no log_weight; call backmap(..., potential=...) to get "
                "weights, and keep them by writing H5MD"
            )
        collected.append(float(ts.data["log_weight"]))
        if free_energy is not None:
            beads.append(np.array(ts.data["beads"], dtype=float))
    log_w = np.array(collected)
    if free_energy is not None:
        log_w += np.asarray(free_energy(np.array(beads))) / thermal_energy(temperature_K)
    return log_w


def effective_sample_size(log_w: np.ndarray, axis: int = -1) -> np.ndarray:
    """Return Kish's effective sample size as a fraction, (Σw)² / (K Σw²), from 1/K to 1.

    Parameters
    ----------
    log_w
        Log weights.
    axis
        Axis of the K samples; it is reduced.

    Returns
    -------
    ndarray
        The fraction; 0 where all weights are zero.
    """
    w = np.exp(_relative(log_w, axis)[0])
    squares = np.sum(w**2, axis=axis)
    fraction = np.sum(w, axis=axis) ** 2 / (w.shape[axis] * np.where(squares > 0, squares, 1.0))
    return np.asarray(fraction)[()]


def log_mean_exp(log_w: np.ndarray, axis: int = -1) -> tuple[np.ndarray, np.ndarray]:
    """Return ln of the mean weight and the variance of that estimate.

    The mean weight estimates Z(s), so that -kT times this is a free energy. The variance is that
    of the delta method for K independent samples, Σ(w/w̄ - 1)² / (K (K-1)); the estimate is biased
    low by about half of it.

    Parameters
    ----------
    log_w
        Log weights.
    axis
        Axis of the K samples; it is reduced.

    Returns
    -------
    value, variance
        The variance is NaN for a single sample, or if all weights are zero.
    """
    relative, top = _relative(log_w, axis)
    w = np.exp(relative)
    k, total = w.shape[axis], np.sum(w, axis=axis)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = np.log(total / k) + np.squeeze(top, axis)
        spread = np.sum((w * k / np.expand_dims(total, axis) - 1) ** 2, axis=axis)
        variance = spread / np.float64(k * (k - 1))
    return np.asarray(value)[()], np.asarray(variance)[()]


def pareto_k(log_w: np.ndarray, axis: int = -1) -> np.ndarray:
    """Return the shape k of a generalised Pareto distribution fitted to the largest weights.

    k < 0.5: the variance of the weights is finite; k < 0.7: estimates are still usable; above, a
    few samples rule. Tail of min(K/5, 3√K) samples, estimator of Zhang and Stephens with the weak
    prior of PSIS.

    Parameters
    ----------
    log_w
        Log weights.
    axis
        Axis of the K samples; it is reduced.

    Returns
    -------
    ndarray
        k; NaN where K < 25 leaves no tail to fit, -inf where the largest weights are all equal (to
        1e-8), +inf where fewer than 5 of them stand above the rest.

    References
    ----------
    Zhang, Stephens, Technometrics 51, 316 (2009). Vehtari, Simpson, Gelman, Yao, Gabry,
    J. Mach. Learn. Res. 25, 72 (2024).
    """
    relative = _relative(log_w, axis)[0]
    return np.asarray(np.apply_along_axis(_tail_shape, axis, relative))[()]


def _tail_shape(log_w: np.ndarray) -> float:
    n_tail = int(min(0.2 * len(log_w), 3 * np.sqrt(len(log_w))))
    if n_tail < _TAIL_MIN:
        return np.nan
    w = np.exp(np.sort(log_w)[-n_tail - 1 :])
    exceedance = w[1:] - w[0]
    if exceedance[-1] <= _EQUAL * w[-1]:
        return -np.inf  # an exact q: the shape would be that of rounding errors
    exceedance = exceedance[exceedance > 4 * np.finfo(float).eps * w[-1]]
    n_tail = len(exceedance)
    if n_tail < _TAIL_MIN:
        return np.inf
    k = _fit_generalised_pareto(exceedance)
    return (k * n_tail + 0.5 * 10) / (n_tail + 10)


def _fit_generalised_pareto(x: np.ndarray) -> float:
    """Return the posterior-mean shape of Zhang and Stephens for ascending exceedances x > 0."""
    n = len(x)
    m = 30 + int(np.sqrt(n))
    quartile = x[int(n / 4 + 0.5) - 1]
    # θ = -k/σ on a grid of quantiles of its prior; the profile likelihood weighs the points.
    theta = 1 / x[-1] + (1 - np.sqrt(m / (np.arange(1, m + 1) - 0.5))) / (3 * quartile)
    k = np.log1p(-theta[:, None] * x).mean(axis=1)
    log_likelihood = n * (np.log(-theta / k) - k - 1)
    weight = np.exp(log_likelihood - log_likelihood.max())
    return float(np.log1p(-(weight @ theta / weight.sum()) * x).mean())


def resample(
    log_w: np.ndarray, n: int | None = None, rng: np.random.Generator | None = None
) -> np.ndarray:
    """Draw frames in proportion to their weights, by systematic resampling.

    For analyses that can't weight: ``RMSF(...).run(frames=resample(log_weights(u), n, rng))``.

    Parameters
    ----------
    log_w
        Log weights, shape (K,).
    n
        Number of draws; default K.
    rng
        Random generator; default a fresh one.

    Returns
    -------
    ndarray
        Ascending indices, shape (n,); a frame of normalised weight p comes ⌊np⌋ or ⌈np⌉ times.
    """
    w = np.exp(_relative(_flat(log_w), 0)[0])
    if w.sum() == 0:
        raise ValueError("can't resample: all weights are zero")
    n = len(w) if n is None else n
    rng = np.random.default_rng() if rng is None else rng
    edges = np.cumsum(w) / w.sum()
    drawn = np.searchsorted(edges, (rng.random() + np.arange(n)) / n, side="right")
    # Rounding may leave the last edge just below one.
    return np.minimum(drawn, np.flatnonzero(w)[-1])


def weighted_average(
    values: np.ndarray, log_w: np.ndarray, *, n_blocks: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the weighted mean μ = Σwf / Σw and its standard error.

    With N_b = Σ w (f - μ) over block b of B, the error² is B/(B-1) Σ_b N_b² / (Σw)²: the delta
    method of a ratio, exact to first order for any weights. It holds for independent blocks.

    Parameters
    ----------
    values
        Shape (K, ...), in any unit.
    log_w
        Log weights, shape (K,).
    n_blocks
        Number of equal runs of consecutive frames that count as independent. Default K: every
        frame is. Give fewer if frames are correlated in time or share beads (``n_samples`` > 1).

    Returns
    -------
    mean, error
        Shape (...).
    """
    values, log_w = np.asarray(values, dtype=float), _flat(log_w)
    k = len(log_w)
    n_blocks = k if n_blocks is None else n_blocks
    if values.shape[:1] != (k,):
        raise ValueError(f"{k} log weights given for values of shape {values.shape}")
    if not 2 <= n_blocks <= k:
        raise ValueError(f"n_blocks must lie between 2 and the {k} frames, got {n_blocks}")
    w = np.exp(_relative(log_w, 0)[0])
    if w.sum() == 0:
        raise ValueError("can't average: all weights are zero")
    w /= w.sum()
    mean = np.tensordot(w, values, axes=1)
    deviation = w.reshape(-1, *[1] * (values.ndim - 1)) * (values - mean)
    starts = np.arange(n_blocks) * k // n_blocks
    blocks = np.add.reduceat(deviation, starts, axis=0)
    error = np.sqrt(n_blocks / (n_blocks - 1) * np.sum(blocks**2, axis=0))
    return np.asarray(mean)[()], np.asarray(error)[()]


def _flat(log_w: np.ndarray) -> np.ndarray:
    log_w = np.asarray(log_w, dtype=float)
    if log_w.ndim != 1:
        raise ValueError(f"log weights must have shape (K,), got {log_w.shape}")
    return log_w


def _relative(log_w: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Return log weights minus their maximum, and that maximum (finite, axis kept)."""
    log_w = np.asarray(log_w, dtype=float)
    if log_w.ndim == 0 or log_w.shape[axis] == 0:
        raise ValueError(f"at least one log weight is needed, got shape {log_w.shape}")
    if np.isnan(log_w).any() or np.isposinf(log_w).any():
        raise ValueError("log weights must not be NaN or +inf")
    top = log_w.max(axis=axis, keepdims=True)
    top = np.where(np.isfinite(top), top, 0.0)
    return log_w - top, top
