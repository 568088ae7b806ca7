"""Statistical weights of reconstructed atoms: quality, averages with error bars, resampling.

All functions take log weights and work relative to the largest, so that nothing overflows. A log
weight of -inf is a frame of weight zero; NaN or +inf is an error.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import MDAnalysis as mda
import numpy as np
from MDAnalysis.coordinates.timestep import Timestep
from MDAnalysis.exceptions import NoDataError

from ccg_ase.units import thermal_energy
from ccg_mda.pareto import tail_shape

if TYPE_CHECKING:
    from ccg_ase.forcefield import ForceField

PARETO_LIMIT = 0.7
"""Above this tail shape a few samples rule (Vehtari et al. 2024)."""
LEAST_EFFECTIVE = 50
"""Fewer effective samples than this make an average and its error bar a matter of luck."""


FreeEnergy: TypeAlias = "ForceField | Callable[[np.ndarray], np.ndarray]"


def log_weights(
    universe: mda.Universe,
    *,
    free_energy: FreeEnergy | None = None,
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
        What the beads were sampled from: the `ForceField`, or a function that maps beads in Å,
        shape (n_bead_frames, n_beads, 3), to F in eV, shape (n_bead_frames,).
    temperature_K
        Temperature of F; needed with a function.

    Returns
    -------
    ndarray
        Shape (n_frames,).
    """
    given_beads, bead, reduced = read_weights(universe, free_energy, temperature_K)
    return given_beads if reduced is None else given_beads + reduced[bead]


def read_weights(
    universe: mda.Universe, free_energy: FreeEnergy | None, temperature_K: float | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Return weights given beads (n_frames,), their bead frames, and F/kT (n_bead_frames,)."""
    kT = None if free_energy is None else thermal_energy(_temperature(free_energy, temperature_K))
    given_beads, numbers, beads, cells = [], [], {}, {}
    for ts in universe.trajectory.copy():
        given_beads.append(frame_log_weight(ts))
        numbers.append(bead_frame(ts))
        if free_energy is not None and numbers[-1] not in beads:
            beads[numbers[-1]] = np.array(ts.data["beads"], dtype=float)
            cells[numbers[-1]] = ts.triclinic_dimensions
    distinct, bead = np.unique(numbers, return_inverse=True)
    reduced = None
    if free_energy is not None:
        frames, boxes = ([of[number] for number in distinct] for of in (beads, cells))
        reduced = _energies(free_energy, np.array(frames), boxes) / kT
    return np.array(given_beads), bead, reduced


def _temperature(free_energy: FreeEnergy, temperature_K: float | None) -> float:
    own = getattr(free_energy, "temperature_K", temperature_K)
    if own is None:
        raise ValueError("free_energy needs the temperature_K that it belongs to")
    if temperature_K is not None and abs(temperature_K - own) > 1e-6:
        raise ValueError(f"the force field is for {own} K, asked for {temperature_K} K")
    return own


def _energies(
    free_energy: FreeEnergy, beads: np.ndarray, boxes: list[np.ndarray | None]
) -> np.ndarray:
    """Return F of bead frames in eV."""
    if not hasattr(free_energy, "energy_and_forces"):
        return np.asarray(free_energy(beads))
    from ccg_ase.energies import bead_energies

    if not free_energy.periodic:
        return bead_energies(free_energy, beads)[0]
    if any(box is None for box in boxes):
        raise ValueError("the force field is of a periodic box; some of the frames have none")
    return bead_energies(free_energy, beads, np.array(boxes, dtype=float))[0]


def frame_log_weight(ts: Timestep) -> float:
    """Return ``ts.data["log_weight"]``."""
    try:
        return float(ts.data["log_weight"])
    except KeyError:
        raise NoDataError(
            f"frame {ts.frame} carries no log_weight; call backmap(..., potential=...) without "
            "relax to get weights, and keep them by writing H5MD"
        ) from None


def bead_frame(ts: Timestep) -> int:
    """Return ``ts.data["cg_frame"]``; a frame that doesn't carry it is a bead frame of its own."""
    return int(ts.data.get("cg_frame", ts.frame))


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
    w = np.exp(below_top(log_w, axis)[0])
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
    below, top = below_top(log_w, axis)
    w = np.exp(below)
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
    below = below_top(log_w, axis)[0]
    return np.asarray(np.apply_along_axis(tail_shape, axis, below))[()]


def warn_if_few(log_w: np.ndarray, what: str) -> None:
    """Warn, with the number, if too few of the weights count or a few of them rule.

    That is below `LEAST_EFFECTIVE` effective samples (Kish), or with a `pareto_k` above
    `PARETO_LIMIT`.

    Parameters
    ----------
    log_w
        Log weights, shape (K,).
    what
        Plural name of what they weigh.
    """
    effective = effective_sample_size(log_w) * len(log_w)
    k = pareto_k(log_w)
    if effective < LEAST_EFFECTIVE:
        reason = (
            f"{effective:.1f} effective {what} of {len(log_w)} are fewer than {LEAST_EFFECTIVE}"
        )
    elif k > PARETO_LIMIT:
        reason = f"Pareto k {k:.2f} is above {PARETO_LIMIT}, so that a few {what} rule"
    else:
        return
    warnings.warn(
        f"don't trust averages with these weights: {reason}; run longer, or train a model whose "
        "weights are more even",
        stacklevel=3,
    )


def resample(
    log_w: np.ndarray | mda.Universe,
    n: int | None = None,
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """Draw frames in proportion to their weights, by systematic resampling.

    For analyses that can't weight: ``PCA(u).run(frames=resample(log_w, n, rng))``.

    Parameters
    ----------
    log_w
        Log weights, shape (K,), or a Universe, which stands for ``log_weights(universe)``: weights
        given the beads. For frames of the whole ensemble pass ``log_weights(u, free_energy=...)``.
    n
        Number of draws; default K.
    rng
        Random generator; default a fresh one.

    Returns
    -------
    ndarray
        Ascending indices, shape (n,); a frame of normalised weight p comes ⌊np⌋ or ⌈np⌉ times.
    """
    if isinstance(log_w, mda.Universe):
        log_w = log_weights(log_w)
    w = np.exp(below_top(flat_log_weights(log_w), 0)[0])
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

    `WeightedAverage` does the same while it reads a trajectory. Values of frames of weight zero
    don't matter, whatever they are.

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
    values, log_w = np.asarray(values, dtype=float), flat_log_weights(log_w)
    k = len(log_w)
    n_blocks = k if n_blocks is None else n_blocks
    if values.shape[:1] != (k,):
        raise ValueError(f"{k} log weights given for values of shape {values.shape}")
    if not 2 <= n_blocks <= k:
        raise ValueError(f"n_blocks must lie between 2 and the {k} frames, got {n_blocks}")
    w = np.exp(below_top(log_w, 0)[0])
    if w.sum() == 0:
        raise ValueError("can't average: all weights are zero")
    w = (w / w.sum()).reshape(-1, *[1] * (values.ndim - 1))
    values = np.where(w > 0, values, 0.0)
    mean = np.sum(w * values, axis=0)
    blocks = np.add.reduceat(w * (values - mean), block_starts(k, n_blocks), axis=0)
    error = np.sqrt(n_blocks / (n_blocks - 1) * np.sum(blocks**2, axis=0))
    return np.asarray(mean)[()], np.asarray(error)[()]


def block_starts(n: int, n_blocks: int) -> np.ndarray:
    """Return where each of ``n_blocks`` runs of n things begins; they differ by one at most."""
    return np.arange(n_blocks) * n // n_blocks


def flat_log_weights(log_w: np.ndarray) -> np.ndarray:
    """Return log weights as float array of one axis, checked."""
    log_w = np.asarray(log_w, dtype=float)
    if log_w.ndim != 1:
        raise ValueError(f"log weights must have shape (K,), got {log_w.shape}")
    return log_w


def below_top(log_w: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Return log weights minus their maximum, and that maximum (finite, axis kept)."""
    log_w = np.asarray(log_w, dtype=float)
    if log_w.ndim == 0 or log_w.shape[axis] == 0:
        raise ValueError(f"at least one log weight is needed, got shape {log_w.shape}")
    if np.isnan(log_w).any() or np.isposinf(log_w).any():
        raise ValueError("log weights must not be NaN or +inf")
    top = log_w.max(axis=axis, keepdims=True)
    top = np.where(np.isfinite(top), top, 0.0)
    return log_w - top, top
