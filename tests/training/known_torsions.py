"""F(φ, ψ) of two torsions that is known, and labels of it with errors."""

from __future__ import annotations

import numpy as np

from ccg_ase.units import thermal_energy
from ccg_training.labels import Labels

KT = thermal_energy(300.0)


def true_F(s: np.ndarray) -> np.ndarray:
    phi, psi = s.T
    return KT * (3 * np.cos(phi) + 2 * np.sin(2 * psi) + 1.5 * np.cos(phi + psi)) - 40.0


def true_force(s: np.ndarray) -> np.ndarray:
    phi, psi = s.T
    both = 1.5 * np.sin(phi + psi)
    return KT * np.stack([3 * np.sin(phi) + both, -4 * np.cos(2 * psi) + both], axis=1)


def labels(n: int, seed: int, value_error_kT: float = 0.05, slope_error_kT: float = 0.3) -> Labels:
    rng = np.random.default_rng(seed)
    s = rng.uniform(-np.pi, np.pi, (n, 2))
    F = true_F(s) + value_error_kT * KT * rng.normal(size=n)
    force = true_force(s) + slope_error_kT * KT * rng.normal(size=(n, 2))
    ones = np.ones(n)
    return Labels(s, force, (slope_error_kT * KT) ** 2 * ones, F, (value_error_kT * KT) ** 2 * ones)
