"""What the samples of a backmapper say about a bead state s: estimates and their errors.

S bead states, K samples each; every array of samples is (S, K, ...). A sample x of q(x|s) has the
log-weight l = -U(x)/kT - ln q(x|s), and Z(s) = ∫ exp(-U/kT) dx over the fibre of s, so that
F(s) = -kT ln Z(s) and E_q[exp l] = Z(s). With w̄ the weights normalised to one over the K samples,
every estimate below is a smooth function of means over samples, and its standard error is the
linearised one (delta method): sqrt(K/(K-1) Σ_k ψ_k²), with ψ_k the first-order change that sample
k makes. Weights are never clipped. A sample of non-finite energy has weight zero.

Sources: importance sampling with self-normalised weights (Owen, Monte Carlo theory, ch. 9); the
pseudo-marginal principle (Andrieu & Roberts 2009); numbering E1-E6 as in the project's theory.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from ase import units

from ccg_ase.units import thermal_energy
from ccg_mda.bounds import Estimate, log_partition, n_samples, normalised_weights

KJ_PER_MOL_PER_EV = units.mol / units.kJ


def linearised_error(influence: np.ndarray) -> np.ndarray:
    """Linearised standard error sqrt(K/(K-1) Σ_k ψ_k²) of influences (S, K, ...)."""
    K = n_samples(influence)
    return np.sqrt(K / (K - 1) * (influence**2).sum(1))


def weighted_mean(log_weight: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weighted mean over samples, (S, ...), and influences w̄ (v - mean), (S, K, ...).

    NaN where no sample has weight; an infinite energy of weight zero counts for nothing.
    """
    weight = normalised_weights(log_weight).reshape(*values.shape[:2], *[1] * (values.ndim - 2))
    values = np.where(weight > 0, values, 0.0)
    mean = np.where(weight.any(1), (weight * values).sum(1), np.nan)
    return mean, weight * (values - mean[:, None])


def free_energy(log_weight: np.ndarray, temperature_K: float) -> Estimate:
    """F(s) = -kT ln Z(s), (S,), eV; all states share one zero."""
    kT = thermal_energy(temperature_K)
    log_z = log_partition(log_weight)
    return Estimate(-kT * log_z.value, kT * log_z.error)


def mean_force(log_weight: np.ndarray, labels: np.ndarray) -> Estimate:
    """-∂F/∂s from labels with self-normalised weights (E3a); ψ_k = w̄_k (f_k - f).

    With the labels of `pull_back` the value is exactly kT ∂/∂s ln Ẑ_K at fixed noise. Its bias is
    of order (1 - ESS)/K times the spread of the labels. Where one sample has nearly all the weight
    the error is far too small: gate such states (`gates.trusted`) before use.

    Parameters
    ----------
    log_weight
        l, (S, K).
    labels
        (S, K, n_beads, 3), eV/Å, or (S, K, n_torsions), eV/rad: `Samples.labels`, or the
        `Samples.slice_labels` of a slice map.

    Returns
    -------
    Estimate
        Shape and unit of a label per state.
    """
    value, influence = weighted_mean(log_weight, labels)
    return Estimate(value, linearised_error(influence))


def label_variance(log_weight: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Variance of a single label at fixed s per component, (S,), (eV/Å)² or (eV/rad)².

    Σ_k w̄_k (f_k - f)² / (1 - Σ_k w̄_k²), averaged over components; it reads too low where the
    effective sample size is a few percent.
    """
    _, influence = weighted_mean(log_weight, labels)
    weight = normalised_weights(log_weight)
    with np.errstate(divide="ignore", invalid="ignore"):
        components = tuple(range(2, influence.ndim))
        squares = np.where(weight > 0, (influence**2).mean(components) / weight, 0.0)
        return squares.sum(1) / (weight.sum(1) - (weight**2).sum(1))


def typical(values: np.ndarray) -> float:
    """Median of the finite values; NaN if there is none."""
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if finite.size else np.nan


def to_kJ_per_mol(variance_eV2: np.ndarray) -> np.ndarray:
    """Convert a variance from (eV/Å)² to (kJ/mol/Å)²."""
    return np.asarray(variance_eV2) * KJ_PER_MOL_PER_EV**2


class Thermodynamics(NamedTuple):
    """F(s) and E[U|s] in eV and S(s) in eV/K, (S,) each."""

    free_energy: Estimate
    energy: Estimate
    entropy: Estimate


def thermodynamics(
    log_weight: np.ndarray, energy: np.ndarray, temperature_K: float
) -> Thermodynamics:
    """Split F(s) into energy and entropy (E4): S(s) = (E[U|s] - F(s))/T.

    The error of S takes the covariance of both terms along:
    ψ_k = [w̄_k (U_k - E[U|s]) + kT (w̄_k - 1/K)]/T.

    Parameters
    ----------
    log_weight, energy
        l and U in eV, (S, K).
    temperature_K
        Temperature of the weights; for another one, pass the weights of `at_temperature`.
    """
    F = free_energy(log_weight, temperature_K)
    U, influence = weighted_mean(log_weight, energy)
    kT = thermal_energy(temperature_K)
    of_log_z = normalised_weights(log_weight) - 1 / log_weight.shape[1]
    entropy = Estimate(
        (U - F.value) / temperature_K, linearised_error(influence + kT * of_log_z) / temperature_K
    )
    return Thermodynamics(F, Estimate(U, linearised_error(influence)), entropy)


def mapping_entropy(log_weight: np.ndarray, energy: np.ndarray, temperature_K: float) -> Estimate:
    """Entropy of p(x|s) (E5): -∫ p ln p dx = E[U|s]/kT + ln Z(s), (S,), nats, for x in Å.

    What the mapping leaves open at s; its error is that of the entropy of `thermodynamics`.

    Parameters
    ----------
    log_weight, energy, temperature_K
        As in `thermodynamics`.
    """
    entropy = thermodynamics(log_weight, energy, temperature_K).entropy
    k = thermal_energy(1.0)
    return Estimate(entropy.value / k, entropy.error / k)


def temperature_derivative(
    log_weight: np.ndarray, energy: np.ndarray, temperature_K: float
) -> Estimate:
    """∂F/∂T = -S(s) at fixed s (E4), (S,), eV/K.

    Parameters
    ----------
    log_weight, energy, temperature_K
        As in `thermodynamics`.
    """
    entropy = thermodynamics(log_weight, energy, temperature_K).entropy
    return Estimate(-entropy.value, entropy.error)


def at_temperature(
    log_weight: np.ndarray, energy: np.ndarray, temperature_K: float, new_temperature_K: float
) -> np.ndarray:
    """Log-weights of the same samples at another temperature, l' = -U/kT' - ln q, (S, K)."""
    shift = 1 / thermal_energy(temperature_K) - 1 / thermal_energy(new_temperature_K)
    return log_weight + np.where(np.isfinite(energy), energy * shift, 0.0)
