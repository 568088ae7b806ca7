"""Weighted samples of p(x|s) from annealing, and what they say about s, with errors."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np

from ccg_ase.units import thermal_energy
from ccg_mda.bounds import Estimate, n_samples, normalised_weights
from ccg_mda.weights import log_mean_exp

from .estimators import Thermodynamics, linearised_error, weighted_mean


@dataclass(frozen=True, eq=False)
class AnnealedSamples:
    """K samples at each of S states, T stages away from the flow that they came from.

    Where particles were drawn anew they have ancestors in common. Errors are then those of whole
    families, the descendants of one particle of the first stage (Lee, Whiteley, Biometrika 105,
    609 (2018)). Without resampling every sample is its own family, and all of `estimators` takes
    `log_weight` as it takes that of plain samples.

    Attributes
    ----------
    beads, positions, forces, energy, log_prob, labels
        As in `Samples`. A sample in a clash has infinite energy and weight zero.
    log_weight
        Ln of the weights, (S, K): averages with them are those over p(x|s), and their mean, the
        mean of the weights themselves, is an unbiased estimate of Z(s).
    family
        Particle of the first stage that a sample descends from, (S, K).
    n_resampled
        How often a state was resampled, (S,).
    stage_variance
        Variance of ln Ẑ up to the last resampling if particles had been independent, (S,).
    acceptance, effective_sample_size
        Of moves, and of weights before resampling, (T, S).
    n_calls
        Energy-and-force calls, without those of the warm-up.
    """

    beads: np.ndarray
    positions: np.ndarray
    forces: np.ndarray
    energy: np.ndarray
    log_prob: np.ndarray
    labels: np.ndarray
    log_weight: np.ndarray
    family: np.ndarray
    n_resampled: np.ndarray
    stage_variance: np.ndarray
    acceptance: np.ndarray
    effective_sample_size: np.ndarray
    n_calls: int

    @property
    def log_z(self) -> np.ndarray:
        """Ln of the unbiased estimate of Z(s), (S,): for weights and Metropolis on s."""
        return log_mean_exp(self.log_weight, axis=1)[0]

    @property
    def log_partition(self) -> Estimate:
        """Ln Z(s), (S,), with its bias of first order taken out, and error.

        Relative variance of Ẑ: 1 - (K/(K-1))^(R+1) (1 - Σ_e p_e²), with p_e the weights of the
        families and R the times of resampling (Lee and Whiteley 2018). That is an unbiased
        estimate, which may be too small, even negative: at least the variance of independent
        particles is taken.
        """
        K = n_samples(self.log_weight)
        value, variance = log_mean_exp(self.log_weight, axis=1)
        shares = self._by_family(normalised_weights(self.log_weight))
        growth = (K / (K - 1)) ** (self.n_resampled + 1)
        related = 1 - growth * (1 - (shares**2).sum(1))
        variance = np.maximum(related, self.stage_variance + variance)
        empty = np.isneginf(value)
        return Estimate(
            np.where(empty, value, value + variance / 2), np.where(empty, np.inf, np.sqrt(variance))
        )

    def average(self, values: np.ndarray) -> Estimate:
        """Average over p(x|s): of `labels` it is the mean force -∂F/∂s, of `energy` E[U|s].

        The error is at least that of independent particles, which is what is left to go by where
        all descend from a few.

        Parameters
        ----------
        values
            (S, K, ...), in any unit.
        """
        mean, influence = weighted_mean(self.log_weight, values)
        related = linearised_error(self._by_family(influence))
        return Estimate(mean, np.maximum(related, linearised_error(influence)))

    def thermodynamics(self, temperature_K: float) -> Thermodynamics:
        """Split F(s) into energy and entropy (E4).

        The errors of both are added up for that of the entropy, whatever their correlation.

        Parameters
        ----------
        temperature_K
            That of the weights.
        """
        kT, log_z = thermal_energy(temperature_K), self.log_partition
        F, U = Estimate(-kT * log_z.value, kT * log_z.error), self.average(self.energy)
        entropy = Estimate((U.value - F.value) / temperature_K, (U.error + F.error) / temperature_K)
        return Thermodynamics(F, U, entropy)

    def __getitem__(self, states: np.ndarray) -> AnnealedSamples:
        """Return the samples of some states; energy calls are still those of all."""
        by_stage = ("acceptance", "effective_sample_size")
        arrays = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "n_calls"}
        return replace(
            self, **{k: a[:, states] if k in by_stage else a[states] for k, a in arrays.items()}
        )

    def _by_family(self, influence: np.ndarray) -> np.ndarray:
        """Sum (S, K, ...) over families; those that died out have none."""
        total = np.zeros_like(influence)
        np.add.at(total, (np.arange(len(influence))[:, None], self.family), influence)
        return total
