"""Thresholds of the gates, apart from what uses them: a configuration is read without numerics."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gates:
    """Thresholds; the defaults are measured on alanine dipeptide (`examples/benchmarks`).

    Attributes
    ----------
    min_effective
        Effective samples, K times the `gates.cautious_ess`, that an error bar needs to be right.
    max_pareto_k
        Largest tail shape of the weights; with K < 25 it is unknown and not asked for.
    log_z_error
        Wanted standard error of ln Z(s), in nats.
    force_error
        Wanted standard error of a component of the mean force, eV/Å (torsions: eV/rad).
    max_samples
        Most plain samples at one state. `max_samples` / `min_effective` is the cost in calls of an
        effective sample at which annealing becomes cheaper.
    max_stages
        Longest annealing path; 0: no annealing.
    radius
        Held-out frames that count as near a state, in the space of `states.state_features`: one
        dihedral turned by 0.5 rad is 0.5 away.
    max_missed
        Share of frames near a state that may have a weight as large as all samples together.
    min_forward_ess
        Least forward effective sample size, as a fraction.
    max_surplus
        How much larger than expected, in nats, the log-weights of frames may be on average, beyond
        three standard errors.

    Raises
    ------
    ValueError
        If a threshold is out of its range.
    """

    min_effective: float = 16.0
    max_pareto_k: float = 0.7
    log_z_error: float = 0.25
    force_error: float = 0.05
    max_samples: int = 1024
    max_stages: int = 20
    radius: float = 0.5
    max_missed: float = 0.05
    min_forward_ess: float = 0.02
    max_surplus: float = 0.5

    def __post_init__(self) -> None:
        for name in ("min_effective", "log_z_error", "force_error", "max_samples", "radius"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("max_missed", "min_forward_ess"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
