"""The tail of a set of weights: fit of a generalised Pareto distribution.

Zhang, Stephens, Technometrics 51, 316 (2009), with the weak prior of Vehtari, Simpson, Gelman, Yao,
Gabry, J. Mach. Learn. Res. 25, 72 (2024).
"""

from __future__ import annotations

import numpy as np

_TAIL_MIN = 5
_EQUAL = 1e-8  # relative; far above the rounding of energies of 1e5 kT


def tail_shape(log_w: np.ndarray) -> float:
    """Return the shape k of the largest of the weights, (K,) log weights of at most zero.

    NaN, -inf and +inf as `ccg_mda.pareto_k` says.
    """
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
    k = fit_generalised_pareto(exceedance)
    return (k * n_tail + 0.5 * 10) / (n_tail + 10)


def fit_generalised_pareto(x: np.ndarray) -> float:
    """Return the posterior mean of the shape, for ascending exceedances x > 0, shape (n,)."""
    n = len(x)
    m = 30 + int(np.sqrt(n))
    quartile = x[int(n / 4 + 0.5) - 1]
    # θ = -k/σ on a grid of quantiles of its prior; the profile likelihood weighs the points.
    theta = 1 / x[-1] + (1 - np.sqrt(m / (np.arange(1, m + 1) - 0.5))) / (3 * quartile)
    k = np.log1p(-theta[:, None] * x).mean(axis=1)
    log_likelihood = n * (np.log(-theta / k) - k - 1)
    weight = np.exp(log_likelihood - log_likelihood.max())
    return float(np.log1p(-(weight @ theta / weight.sum()) * x).mean())
