"""Figures of merit with their finite-sample floors, in nats and kT.

A divergence between two sampled histograms is positive even if both come from one distribution.
Every divergence here comes with that floor; nothing can be claimed below it.
"""

from __future__ import annotations

import numpy as np

from ccg_mda.coverage import jensen_shannon

BINS = 64


def torsion_centres(bins: int) -> np.ndarray:
    """Return the centres of the bins of `torsion_histogram` along an axis, (bins,) in rad."""
    return (np.arange(bins) + 0.5) * (2 * np.pi / bins) - np.pi


def torsion_histogram(
    torsions: np.ndarray, log_weights: np.ndarray | None = None, bins: int = BINS
) -> np.ndarray:
    """Return the normalised histogram over one or two torsions.

    Parameters
    ----------
    torsions
        (N, d) in rad, d = 1 or 2; any branch.
    log_weights
        (N,) unnormalised natural logs of weights; default: equal weights.
    bins
        Bins per axis over the full circle.

    Returns
    -------
    ndarray
        (bins,) * d, sum 1.
    """
    torsions = np.asarray(torsions, float)
    index = np.floor((torsions + np.pi) / (2 * np.pi) * bins).astype(int) % bins
    shape = (bins,) * torsions.shape[1]
    flat = np.ravel_multi_index(tuple(index.T), shape)
    weights = None
    if log_weights is not None:
        weights = np.exp(log_weights - np.max(log_weights))
    counts = np.bincount(flat, weights, minlength=bins ** len(shape)).reshape(shape)
    return counts / counts.sum()


def jensen_shannon_floor(
    p: np.ndarray, size: float, other_size: float, *, rng: np.random.Generator, draws: int = 20
) -> float:
    """Mean divergence between two independent draws of p with the given sizes.

    Parameters
    ----------
    p
        Histogram of sum 1, best the one with more samples behind it.
    size, other_size
        Independent samples behind the two histograms: for weighted or correlated samples the
        effective number.
    rng
        Random generator.
    draws
        Pairs of multinomial draws that are averaged.

    Notes
    -----
    An empirical p is narrower than the truth, so that the floor is slightly low.
    """
    flat = p.ravel() / p.sum()
    values = [
        jensen_shannon(
            rng.multinomial(max(1, round(size)), flat) / max(1, round(size)),
            rng.multinomial(max(1, round(other_size)), flat) / max(1, round(other_size)),
        )
        for _ in range(draws)
    ]
    return float(np.mean(values))


def free_energy(p: np.ndarray, fill: float | None = None) -> np.ndarray:
    """Free energy -ln p in kT, zero at its minimum.

    Empty bins are NaN, or get the probability `fill` where it is given (published map errors
    depend strongly on that number: always print it).
    """
    p = np.asarray(p, float)
    with np.errstate(divide="ignore"):
        energy = -np.log(p if fill is None else np.where(p > 0, p, fill))
    energy = np.where(np.isfinite(energy), energy, np.nan)
    return energy - np.nanmin(energy)


def free_energy_difference(p: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Map of F - F_reference in kT over the bins that both visit, NaN elsewhere.

    The constant is fixed by the mean over the reference's probability, so one badly sampled bin
    at the minimum doesn't shift the whole map.
    """
    both = (p > 0) & (reference > 0)
    difference = np.full(p.shape, np.nan)
    if not both.any():
        return difference
    difference[both] = np.log(reference[both]) - np.log(p[both])
    return difference - np.average(difference[both], weights=reference[both])


def independent_samples(series: np.ndarray) -> float:
    """Return the number of independent values in a correlated series.

    From the integrated autocorrelation time, summed to the first window of five such times
    (Sokal's rule).
    """
    count = len(series)
    centred = series - series.mean()
    if not centred.any():
        return 1.0
    spectrum = np.abs(np.fft.rfft(centred, 2 * count)) ** 2
    correlation = np.fft.irfft(spectrum)[:count]
    inefficiency = 2 * np.cumsum(correlation / correlation[0]) - 1
    window = np.arange(count) >= 5 * inefficiency / 2
    cut = int(window.argmax()) if window.any() else count - 1
    return count / max(1.0, float(inefficiency[cut]))
