"""Ratio of two partition functions from samples of both: Bennett's acceptance ratio."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit

from ccg_mda.weights import weighted_average


class PartitionRatio(NamedTuple):
    """An estimate of ln(Z_b/Z_a), and the standard errors that come from either set of samples."""

    value: float
    error_a: float
    error_b: float

    @property
    def error(self) -> float:
        """Standard error, the two sets being independent."""
        return math.hypot(self.error_a, self.error_b)


def log_partition_ratio(
    difference_a: np.ndarray, difference_b: np.ndarray, *, n_blocks: int = 20
) -> PartitionRatio:
    """Estimate ln(Z_b/Z_a), without bias to first order and with the least variance there is.

    With w = (E_b - E_a)/kT and M = ln(N_a/N_b), the solution x of
    N_a <1/(1 + exp(M + w + x))>_a = N_b <1/(1 + exp(-M - w - x))>_b (Bennett, J. Comput. Phys. 22,
    245 (1976), eqs. 12a and 12b; x = ln Z_b/Z_a). The error is linearised in both means, which
    come with block errors.

    Parameters
    ----------
    difference_a, difference_b
        w on samples of a, (N_a,), and on samples of b, (N_b,), in the order in which they are
        correlated.
    n_blocks
        Contiguous blocks that count as independent.

    Returns
    -------
    PartitionRatio
        Where the samples don't overlap, the errors are far too small.

    Raises
    ------
    ValueError
        If a difference isn't finite.
    """
    a, b = np.asarray(difference_a, float), np.asarray(difference_b, float)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("energy differences must be finite")
    m = np.log(len(a) / len(b))

    def surplus(x: float) -> float:
        return len(a) * expit(-m - a - x).mean() - len(b) * expit(m + b + x).mean()

    # All of w + x + M above or below zero decides the sign only where sums of logistics do, too.
    both = np.concatenate([a, b])
    margin = 1 + abs(m)
    low, high = -both.max() - margin, -both.min() + margin
    while surplus(low) < 0:
        low -= margin
    while surplus(high) > 0:
        high += margin
    x = float(brentq(surplus, low, high, xtol=1e-12))
    slope, errors = 0.0, []
    for w in (a, b):
        accepted = expit(-m - w - x)
        slope += len(w) * (accepted * (1 - accepted)).mean()
        error = weighted_average(accepted, np.zeros(len(w)), n_blocks=min(n_blocks, len(w)))[1]
        errors.append(len(w) * float(error))
    return PartitionRatio(x, *(error / float(slope) for error in errors))
