"""Hamiltonian Monte Carlo in noise space, for many states and points at once.

Duane, Kennedy, Pendleton, Roweth, Phys. Lett. B 195, 216 (1987); Neal, Handbook of Markov Chain
Monte Carlo (2011), ch. 5. A step size of its own for each variable stands for its mass.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .noise_space import NoisePoints, NoiseSpace

_JITTER = 0.2  # Steps of one length can come back to where they began: of a harmonic mode, a period


def leapfrog(
    space: NoiseSpace,
    points: NoisePoints,
    momentum: Tensor,
    fraction: float,
    step: Tensor,
    n_steps: int,
) -> tuple[NoisePoints, Tensor]:
    """Integrate Hamilton's equations for -ln r - λ l + p²/2: reversible, and keeps the volume.

    One energy call per point and step.

    Parameters
    ----------
    space, points
        Where, and the points to start from.
    momentum
        p, (S, K, n_dof).
    fraction
        λ.
    step
        Step sizes, (S, K, n_dof).
    n_steps
        Number of steps.
    """
    for _ in range(n_steps):
        momentum = momentum + 0.5 * step * points.target_slope(fraction)
        points = space.at(space.moved(points.noise, step * momentum))
        momentum = momentum + 0.5 * step * points.target_slope(fraction)
    return points, momentum


def hmc_move(
    space: NoiseSpace,
    points: NoisePoints,
    fraction: float,
    step_size: np.ndarray,
    n_leapfrog: int,
    rng: np.random.Generator,
) -> tuple[NoisePoints, np.ndarray]:
    """Move every point by one step of Hamiltonian Monte Carlo, which leaves r exp(λ l) invariant.

    Moves into clashes are rejected. A point that lies in one leaves it as soon as it can.

    Parameters
    ----------
    space, points, fraction
        As in `leapfrog`.
    step_size
        Mean step sizes at each state, (S, n_dof); a move's are up to 20 % off, all by one factor.
    n_leapfrog
        Leapfrog steps, and energy calls per point.
    rng
        Source of momenta and decisions.

    Returns
    -------
    points, acceptance
        The new points, and the mean probability (S,) of acceptance of those not in a clash; zero
        where all were.
    """
    shape = points.log_base.shape

    def there(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(points.noise.device)

    jitter = there(rng.uniform(1 - _JITTER, 1 + _JITTER, (*shape, 1)))
    step = there(step_size)[:, None] * jitter
    momentum = there(rng.standard_normal(points.noise.shape))
    new, new_momentum = leapfrog(space, points, momentum, fraction, step, n_leapfrog)
    kinetic = 0.5 * (new_momentum.square() - momentum.square()).sum(-1)
    log_ratio = new.log_target(fraction) - points.log_target(fraction) - kinetic
    log_ratio = torch.where(log_ratio.isnan(), -torch.inf, log_ratio)
    accepted = there(-rng.standard_exponential(shape)) < log_ratio
    regular = torch.isfinite(points.log_weight)
    probability = (log_ratio.clamp(max=0.0).exp() * regular).sum(1) / regular.sum(1).clamp(min=1)
    return points.replaced(accepted, new), probability.cpu().numpy()
