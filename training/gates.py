"""Gates: may a label be taken from the weights of a state's samples, and if not, what is cheapest.

The first K samples at a state say how many more a wanted error takes: errors of ln Z(s) and of the
mean force fall with 1/sqrt(K), and K effective samples cost K/ESS energy calls. Annealing costs
some 60 calls per effective sample, whatever the flow is like (`annealing`); so more plain samples
are the cheapest remedy up to a number of them, `Gates.max_samples`. Beyond, it is annealing or
dynamics restrained to s, whichever costs less: the latter gives no F, but all that the flow needs
to do better in the next turn. Where the flow has dropped a mode (`forward_check`) weights start in
the wrong place whatever is done with them, and dynamics is what is left.
"""

from __future__ import annotations

import numpy as np

from ccg_mda.weights import effective_sample_size, pareto_k

from .thresholds import Gates

ACCEPT, MORE, ANNEAL, RESTRAIN = "accept", "more", "anneal", "restrain"


def cautious_ess(log_weight: np.ndarray) -> np.ndarray:
    """Return the effective sample size, as a fraction, or what a normal law of l says if less.

    Of few samples of uneven weights Kish's figure is too large: what would make it small hasn't
    been drawn yet. The spread of l shows in the many samples that have little weight. With σ² the
    mean square of l above its median, log-normal weights have exp(-σ²); samples in a clash have
    none.

    Parameters
    ----------
    log_weight
        l, (S, K).
    """
    finite = np.isfinite(log_weight)
    values = np.where(finite, log_weight, np.nan)
    values[~finite.any(1)] = 0.0  # zero by Kish's figure
    above = values - np.nanmedian(values, axis=1, keepdims=True)
    square = np.nanmean(np.where(above >= 0, above, np.nan) ** 2, axis=1)
    by_law = finite.mean(1) * np.exp(-square)
    return np.minimum(effective_sample_size(log_weight, axis=1), by_law)


def inflation(log_weight: np.ndarray) -> np.ndarray:
    """Return what the variance of a label is multiplied by, (S,), at least one.

    The variance from a few weights is too small by what they haven't shown yet, about Kish's
    effective sample size over the cautious one: 68 % and 95 % intervals of states that the gate
    accepts then cover what they should (`tests/training/test_labelling.py`).

    Parameters
    ----------
    log_weight
        l, (S, K).
    """
    ess = cautious_ess(log_weight)
    with np.errstate(over="ignore"):
        ratio = effective_sample_size(log_weight, axis=1) / np.where(ess > 0, ess, 1.0)
    return np.where(ess > 0, ratio, 1.0)


def trusted(log_weight: np.ndarray, gates: Gates) -> np.ndarray:
    """Tell at which states the weights are good enough for an error bar to be right, (S,) bool.

    Parameters
    ----------
    log_weight
        l, (S, K).
    gates
        `min_effective` and `max_pareto_k` of it.
    """
    heavy = pareto_k(log_weight, axis=1) > gates.max_pareto_k
    effective = log_weight.shape[1] * cautious_ess(log_weight)
    return (effective >= gates.min_effective) & ~heavy


def needed_samples(log_weight: np.ndarray, variance: np.ndarray, gates: Gates) -> np.ndarray:
    """Estimate how many plain samples the wanted errors take, (S,); infinite without any weight.

    With e the effective sample size: (1/e - 1) / log_z_error², variance / (e force_error²), and
    min_effective / e.

    Parameters
    ----------
    log_weight
        l, (S, K).
    variance
        Of a single mean-force label, (S,): `estimators.label_variance`. NaN: not known.
    gates
        The wanted errors.
    """
    ess = cautious_ess(log_weight)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = 1 / ess
        per_call = np.maximum(inverse - 1, 0.0) / gates.log_z_error**2
        force = np.nan_to_num(variance) * np.where(ess > 0, inverse, 0.0) / gates.force_error**2
        return np.maximum.reduce([per_call, force, gates.min_effective * inverse])


def verdicts(
    log_weight: np.ndarray,
    variance: np.ndarray,
    gates: Gates,
    failed: np.ndarray | None = None,
) -> np.ndarray:
    """Decide what is done with states after K plain samples at each.

    Parameters
    ----------
    log_weight
        l, (S, K).
    variance
        Of a single mean-force label, (S,).
    gates
        Thresholds.
    failed
        States near which the flow has failed the forward check, (S,) bool; default: none.

    Returns
    -------
    ndarray
        (S,) str: "accept" a label that is precise enough, or that can't be made so by
        `max_samples` and has a right error bar; "more" for as many samples again; "anneal";
        "restrain" where the forward check failed or no sample has any weight.
    """
    n_samples = log_weight.shape[1]
    good, need = trusted(log_weight, gates), needed_samples(log_weight, variance, gates)
    # Weights with a heavy tail may look even: whatever the need, more samples tell.
    wants_more = (need <= gates.max_samples) & (~good | (need > n_samples))
    more = wants_more & (2 * n_samples <= gates.max_samples)
    hopeless = np.isinf(need) if failed is None else np.isinf(need) | failed
    beyond = ANNEAL if gates.max_stages else RESTRAIN
    return np.select([hopeless, more, good], [RESTRAIN, MORE, ACCEPT], beyond)
