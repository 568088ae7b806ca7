"""Weighted particles in noise space at many states: reweighing, resampling, moves."""

from __future__ import annotations

import numpy as np
import torch

from ccg_mda.bounds import normalised_weights
from ccg_mda.weights import effective_sample_size, log_mean_exp

from .hmc import hmc_move
from .noise_space import NoiseSpace

_SMALLEST_INCREMENT = 1e-12


class Particles:
    """K particles at each of S states, on their way from r to r exp(l).

    Attributes
    ----------
    space, points
        Where they are.
    log_weight
        Ln of the weights, (S, K); the mean weight estimates ∫ r exp(λ l) dε without bias.
    family
        First particle that each descends from, (S, K).
    n_resampled
        How often a state was resampled, (S,).
    stage_variance
        Relative variance of the mean weight up to the last resampling, were particles independent,
        (S,).
    """

    def __init__(self, space: NoiseSpace, n_samples: int, rng: np.random.Generator) -> None:
        self.space, self._rng = space, rng
        self.points = space.draw(n_samples, rng)
        self.log_weight = np.zeros((len(space.beads), n_samples))
        self.family = torch.arange(n_samples).repeat(len(space.beads), 1)
        self.n_resampled = np.zeros(len(space.beads), dtype=int)
        self.stage_variance = np.zeros(len(space.beads))

    def reweigh(self, increment: float) -> None:
        """Carry λ on by an increment."""
        self.log_weight = self.log_weight + increment * self.points.log_weight.cpu().numpy()

    def resample(self, below: float) -> None:
        """Draw the particles of states with an effective sample size below a fraction anew.

        Multinomially: the one scheme for which the variance of `AnnealedSamples.log_partition` is
        known.
        """
        log_z, variance = log_mean_exp(self.log_weight, axis=1)
        low = (effective_sample_size(self.log_weight) < below) & np.isfinite(log_z)
        edges = np.cumsum(normalised_weights(self.log_weight), axis=1)
        edges = torch.from_numpy(edges / np.where(low, edges[:, -1], 1.0)[:, None])
        drawn = torch.from_numpy(self._rng.random(self.log_weight.shape))
        chosen = torch.searchsorted(edges, drawn, right=True)
        kept = torch.arange(drawn.shape[1]).expand_as(chosen)
        index = torch.where(torch.from_numpy(low)[:, None], chosen, kept)
        self.points, self.family = self.points.taken(index), self.family.gather(1, index)
        self.log_weight = np.where(low[:, None], log_z[:, None], self.log_weight)
        self.n_resampled += low
        self.stage_variance += np.where(low, variance, 0.0)

    def move(self, fraction: float, step_size: np.ndarray, n_leapfrog: int) -> np.ndarray:
        """Move all particles at λ; return the acceptance of each state, (S,)."""
        self.points, acceptance = hmc_move(
            self.space, self.points, fraction, step_size, n_leapfrog, self._rng
        )
        return acceptance

    def spread(self) -> np.ndarray:
        """Return the standard deviation of each noise variable, (S, n_dof), about its mean."""
        noise, circular = self.points.noise, self.space.backmapper.circular_noise
        weight = torch.from_numpy(normalised_weights(self.log_weight))[..., None].to(noise)
        sine, cosine = ((weight * wave(noise)).sum(1) for wave in (torch.sin, torch.cos))
        mean = torch.where(circular, torch.atan2(sine, cosine), (weight * noise).sum(1))
        deviation = self.space.moved(noise, -mean[:, None])
        return (weight * deviation.square()).sum(1).sqrt().cpu().numpy()

    def increment(self, conditional_ess: float, rest: float) -> float:
        """Return the largest step of λ, up to ``rest``, with that conditional ESS at every state.

        It is (Σ w v)² / (Σ w Σ w v²) of particles without a clash, w their weights and v their
        growth (Zhou, Johansen, Aston, J. Comput. Graph. Stat. 25, 701 (2016)).
        """
        exponent = self.points.log_weight.cpu().numpy()
        regular = np.isfinite(self.log_weight) & np.isfinite(exponent)
        weight = normalised_weights(np.where(regular, self.log_weight, -np.inf))
        exponent = np.where(regular, exponent, -np.inf)
        top = exponent.max(1, keepdims=True)
        exponent = exponent - np.where(np.isfinite(top), top, 0.0)

        def least(increment: float) -> float:
            growth = np.exp(increment * exponent)
            squares = (weight * growth**2).sum(1)
            some = squares > 0
            return ((weight * growth).sum(1)[some] ** 2 / squares[some]).min(initial=1.0)

        if least(rest) >= conditional_ess:
            return rest
        # Bisection of the logarithm: atoms that almost clash call for steps of any size.
        low, high = np.log(_SMALLEST_INCREMENT), np.log(rest)
        while high - low > 1e-3:
            middle = 0.5 * (low + high)
            low, high = (
                (middle, high) if least(np.exp(middle)) >= conditional_ess else (low, middle)
            )
        return float(np.exp(low))
