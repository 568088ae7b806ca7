"""Samples of p(x|s), and ln Z(s), where plain weights of a flow fail: annealing in noise space.

Particles drawn from the density r of the noise are led to r exp(l), the image of p(x|s), along
r exp(λ l), λ from 0 to 1: their weights grow with λ, and moves that leave the density at λ
invariant follow. That is annealed importance sampling (Neal, Stat. Comput. 11, 125 (2001)) and,
with resampling, sequential Monte Carlo (Del Moral, Doucet, Jasra, J. R. Stat. Soc. B 68, 411
(2006)). For a path fixed beforehand the mean weight is an unbiased estimate of Z(s); so a warm-up
(`tune_path`) fixes it on particles of its own. Weights are never clipped. Numbering (E7) as in the
project's theory.

Neither finds what the path doesn't lead to: of two regions of noise that moves can't cross between,
the weights tell too little, and their errors don't know. Where the flow isn't off by far (effective
sample size above some 0.02), ln Z costs fewer energy calls by plain weights of more samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import nn

from ccg_mda.weights import effective_sample_size

from .annealed_samples import AnnealedSamples
from .noise_space import NoiseSpace
from .particles import Particles
from .reconstruction import Replay, pull_back

_ACCEPTANCE = 0.8
_MEMORY = (
    10  # Particles' worth that the spread seen before counts for: few are left if weights are odd
)


class PathTooLongError(ValueError):
    """The flow is too far from p(x|s) at some state for the stages that a path may have."""


@dataclass(frozen=True, eq=False)
class AnnealingPath:
    """What is fixed before an annealing run.

    Attributes
    ----------
    fractions
        λ after each stage, rising to 1, (T,).
    step_sizes
        Step sizes of the moves of each stage and state, along each noise variable, (T, S, n_dof).
    n_leapfrog, n_moves
        Leapfrog steps a move, and moves a stage.
    n_calls
        Energy calls that finding them took.

    Raises
    ------
    ValueError
        If the fractions don't rise to 1, or shapes don't fit.
    """

    fractions: np.ndarray
    step_sizes: np.ndarray
    n_leapfrog: int = 5
    n_moves: int = 1
    n_calls: int = 0

    def __post_init__(self) -> None:
        rises = (np.diff(self.fractions, prepend=0.0) > 0).all()
        if not (rises and len(self.fractions) and self.fractions[-1] == 1.0):
            raise ValueError(f"the fractions of a path must rise to 1, got {self.fractions}")
        if np.ndim(self.step_sizes) != 3 or len(self.step_sizes) != len(self.fractions):
            raise ValueError(
                f"need step sizes ({len(self.fractions)}, S, n_dof), for each stage and state, got "
                f"{np.shape(self.step_sizes)}"
            )


def tune_path(
    backmapper: nn.Module,
    potential: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    beads: np.ndarray,
    n_samples: int,
    rng: np.random.Generator,
    *,
    conditional_ess: float = 0.9,
    n_leapfrog: int = 5,
    n_moves: int = 1,
    n_warm_up: int = 3,
    max_stages: int = 200,
    batch_size: int = 1024,
) -> AnnealingPath:
    """Find a path on particles of its own, the same stages for all states.

    Each stage goes as far as the conditional effective sample size of the particles without a
    clash (Zhou, Johansen, Aston, J. Comput. Graph. Stat. 25, 701 (2016)) stays above a limit at
    every state. Step sizes are in proportion to the spread of the particles along each variable,
    and led to 80 % of acceptance (Robbins and Monro).

    Parameters
    ----------
    backmapper, potential, beads, batch_size
        As in `NoiseSpace`.
    n_samples
        Particles of each state, K.
    rng
        Source of randomness.
    conditional_ess
        Its limit, as a fraction.
    n_leapfrog, n_moves
        Of the path.
    n_warm_up
        Moves in each stage of the warm-up.
    max_stages
        Longest path.

    Raises
    ------
    PathTooLongError
        If the path would need more stages.
    """
    space = NoiseSpace(backmapper, potential, beads, batch_size=batch_size)
    particles = Particles(space, n_samples, rng)
    length = np.full((len(space.beads), 1), 0.5 / backmapper.n_dof**0.25)
    spread, memory = particles.spread(), _MEMORY / (n_samples + _MEMORY)
    fractions, steps = [0.0], []
    while fractions[-1] < 1.0:
        if len(steps) == max_stages:
            raise PathTooLongError(
                f"after {max_stages} stages the path is at {fractions[-1]:.2g} of its way: the "
                "flow is too far from the atomistic ensemble at these states; train it further, "
                "or sample them by restrained dynamics"
            )
        rest = 1.0 - fractions[-1]
        increment = particles.increment(conditional_ess, rest)
        fractions.append(1.0 if increment == rest else fractions[-1] + increment)
        particles.reweigh(fractions[-1] - fractions[-2])
        particles.resample(0.5)
        for move in range(n_warm_up):
            mixed = memory * spread**2 + (1 - memory) * particles.spread() ** 2
            spread = np.sqrt(mixed)
            acceptance = particles.move(fractions[-1], length * spread, n_leapfrog)
            length = length * np.exp((acceptance[:, None] - _ACCEPTANCE) / np.sqrt(move + 1))
        steps.append(length * spread)
    return AnnealingPath(
        np.array(fractions[1:]), np.array(steps), n_leapfrog, n_moves, space.n_calls
    )


def anneal(
    backmapper: nn.Module,
    potential: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    beads: np.ndarray,
    n_samples: int,
    path: AnnealingPath,
    rng: np.random.Generator,
    *,
    resample_below: float = 0.5,
    batch_size: int = 1024,
) -> AnnealedSamples:
    """Draw weighted samples of p(x|s) at every state, and label them.

    It takes 1 + T n_moves n_leapfrog energy calls per sample.

    Parameters
    ----------
    backmapper, potential, beads, batch_size
        As in `NoiseSpace`.
    n_samples
        K, samples per state.
    path
        From `tune_path`, or made by hand.
    rng
        Source of randomness; another one than that of `tune_path`, or later numbers of it.
    resample_below
        Particles of a state are drawn anew, in proportion to their weights, when these have an
        effective sample size below this fraction. 0 for never: annealed importance sampling.

    Raises
    ------
    ValueError
        If the path was made for another number of states, or another flow.
    """
    space = NoiseSpace(backmapper, potential, beads, batch_size=batch_size)
    shape = (len(space.beads), backmapper.n_dof)
    if path.step_sizes.shape[1:] != shape:
        raise ValueError(
            f"the path was made for {path.step_sizes.shape[1:]} states and noise variables, got "
            f"{shape}: tune one for these states"
        )
    particles = Particles(space, n_samples, rng)
    acceptance, ess = np.zeros((2, *path.step_sizes.shape[:2]))
    increments = np.diff(path.fractions, prepend=0.0)
    for stage, (fraction, increment) in enumerate(zip(path.fractions, increments, strict=True)):
        particles.reweigh(increment)
        ess[stage] = effective_sample_size(particles.log_weight)
        particles.resample(resample_below)
        for _ in range(path.n_moves):
            moved = particles.move(fraction, path.step_sizes[stage], path.n_leapfrog)
            acceptance[stage] += moved / path.n_moves
    return _labelled(particles, acceptance, ess)


def _labelled(particles: Particles, acceptance: np.ndarray, ess: np.ndarray) -> AnnealedSamples:
    """Pull the labels back from energies and forces that are known."""
    space, points = particles.space, particles.points
    energy, forces = points.energy.cpu().numpy(), points.forces.cpu().numpy()
    samples = pull_back(
        space.backmapper,
        Replay(energy.ravel(), forces.reshape(-1, *forces.shape[2:])),
        space.beads.cpu().numpy(),
        points.noise.transpose(0, 1),
        batch_size=space.batch_size,
    )
    return AnnealedSamples(
        beads=samples.beads,
        positions=samples.positions,
        forces=forces,
        energy=energy,
        log_prob=samples.log_prob,
        labels=samples.labels,
        log_weight=particles.log_weight,
        family=particles.family.numpy(),
        n_resampled=particles.n_resampled,
        stage_variance=particles.stage_variance,
        acceptance=acceptance,
        effective_sample_size=ess,
        n_calls=space.n_calls,
    )
