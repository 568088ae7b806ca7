"""What a model of F saves: the control variate of estimates over many bead states.

Averages of ln Z over a bead ensemble cost K energy calls at every state, while βF_φ costs none. So
label few states, and let the model carry the estimate to all others:

    E[ln Z] = E_all[-βF_φ] + E_labelled[ln Ẑ + βF_φ].

The second average is over the log of the two-level weights W = Ẑ exp(βF_φ). Its variance is that of
the joint residual at K samples, far below that of ln Z; a coefficient b in front of βF_φ that
minimises it is one if F_φ is the regression of -ln Z on s, as the joint fit makes it (theory 5.4;
Owen, Monte Carlo theory, ch. 8.9).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ccg_mda.bounds import Estimate, log_partition
from ccg_mda.weights import effective_sample_size


@dataclass(frozen=True)
class ControlVariate:
    """A model of F as a control variate for ln Z.

    Attributes
    ----------
    plain, controlled
        Mean of ln Z over the ensemble from the labelled states alone, and with the model's F at
        all of its states.
    variance_plain, variance_controlled
        Over states: of ln Ẑ and of ln Ẑ + βF_φ, the log of the two-level weights.
    variance_noise
        The part of both that comes from K samples per state being few.
    coefficient
        b that minimises the variance of ln Ẑ + bβF_φ.
    ess
        Effective sample size of the two-level weights W, as a fraction of the states.
    """

    plain: Estimate
    controlled: Estimate
    variance_plain: float
    variance_controlled: float
    variance_noise: float
    coefficient: float
    ess: float


def control_variate(
    log_weight: np.ndarray, reduced: np.ndarray, reduced_everywhere: np.ndarray
) -> ControlVariate:
    """Measure what F_φ saves in estimates of ln Z.

    Parameters
    ----------
    log_weight
        l of the samples at the labelled states, (S, K); the states are drawn from the ensemble.
    reduced
        βF_φ at these, (S,).
    reduced_everywhere
        βF_φ at independent states of the same ensemble, (N,).

    Raises
    ------
    ValueError
        If fewer than two states are labelled, or one has no sample of finite weight.
    """
    log_z = log_partition(log_weight)
    if len(reduced) < 2 or not np.isfinite(log_z.value).all():
        raise ValueError(
            f"need two labelled states or more, each with a sample of finite energy; got "
            f"{np.isfinite(log_z.value).sum()}"
        )
    log_w = log_z.value + reduced
    plain, controlled, explained = (v.var(ddof=1) for v in (log_z.value, log_w, reduced))
    covariance = np.cov(log_z.value, reduced)[0, 1]
    n, m = len(reduced), len(reduced_everywhere)
    error = np.sqrt(controlled / n + reduced_everywhere.var(ddof=1) / m)
    return ControlVariate(
        Estimate(log_z.value.mean(), np.sqrt(plain / n)),
        Estimate(log_w.mean() - reduced_everywhere.mean(), error),
        float(plain),
        float(controlled),
        float(np.mean(log_z.error**2)),
        float(-covariance / explained),
        float(effective_sample_size(log_w)),
    )
