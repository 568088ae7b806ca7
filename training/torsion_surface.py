"""F over torsions between the labels: a Gaussian process on the torus, with its own uncertainty.

Where torsions are the coarse variables there is no bead force field; this stands in for it. The
kernel A Π_d exp[(cos Δ_d - 1)/l²] is periodic, and a constant of wide variance stands for the
unknown zero of F. Labels are values of F and its slopes (mean forces), each with its own error;
slopes are derivative observations (Rasmussen and Williams, Gaussian Processes for Machine Learning,
2006, section 9.4). A and l maximise the marginal likelihood (their eq. 2.30).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.linalg import cho_factor, cho_solve, solve_triangular

from ccg_ase.units import thermal_energy

from .labels import Labels

FreeEnergy = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""From states (N, ...) to F in eV, (N,), and the mean force -∂F/∂s in eV per their unit."""

_ZERO_kT = 100.0  # width of the prior of the constant
_LENGTHS = np.geomspace(0.25, 2.0, 13)  # tried for l, in rad
_JITTER = 1e-9
_MOST_LABELS = 1000  # a matrix of some thousand rows is factorised in seconds
_AT_ONCE = 2000


class TorsionSurface:
    """F(s) and its uncertainty, from labels at torsions.

    Parameters
    ----------
    labels
        At torsions (L, n_torsions); those with a free energy give values and slopes, the others
        slopes. At most 1000 are used: the former first, each kind evenly.
    temperature_K
        Of the labels.

    Raises
    ------
    ValueError
        If no label has a free energy.
    """

    def __init__(self, labels: Labels, temperature_K: float) -> None:
        if not np.isfinite(labels.free_energy).any():
            raise ValueError("no label has a free energy: a surface of F needs some")
        labels, self.kT = labels[_most_telling(labels)], thermal_energy(temperature_K)
        known = np.isfinite(labels.free_energy)
        self._at, self._slopes_at = labels.beads[known], labels.beads
        self._zero = float(labels.free_energy[known].mean())
        values = (labels.free_energy[known] - self._zero) / self.kT
        slopes = -labels.force.T.ravel() / self.kT
        variance = np.nan_to_num(labels.force_variance, nan=np.nanmean(labels.force_variance))
        noise = np.concatenate(
            [labels.free_energy_variance[known], np.tile(variance, labels.beads.shape[1])]
        )
        self._observed = np.concatenate([values, slopes])
        self._noise = noise / self.kT**2 + _JITTER
        self._fit()

    def _fit(self) -> None:
        """Find the length by trial, the amplitude in turn, and keep the factorised covariance."""
        tried = []
        for self.length in _LENGTHS:
            self.amplitude = 1.0
            for _ in range(4):  # scale the amplitude until the data are as likely as they can be
                likelihood, quadratic = self._factorise()
                self.amplitude *= quadratic / len(self._observed)
            tried.append((likelihood, self.length, self.amplitude))
        _, self.length, self.amplitude = max(tried)
        self._factorise()

    def _factorise(self) -> tuple[float, float]:
        """Return the log marginal likelihood, and the quadratic form yᵀ K⁻¹ y."""
        covariance = self._covariance(self._at, self._slopes_at, self._at, self._slopes_at)
        covariance[np.diag_indices_from(covariance)] += self._noise
        self._factor = cho_factor(covariance, lower=True, overwrite_a=True)
        self._solved = cho_solve(self._factor, self._observed)
        quadratic = float(self._observed @ self._solved)
        return -0.5 * quadratic - np.log(np.diag(self._factor[0])).sum(), quadratic

    def _covariance(
        self, values: np.ndarray, slopes: np.ndarray, of: np.ndarray, of_slopes: np.ndarray
    ) -> np.ndarray:
        """Covariance of values and slopes at some torsions with those at others.

        Slopes come one torsion after the other: (n + D m, n' + D m') for n values and m slopes.
        """
        n_torsions, scale = of.shape[1], self.length**-2

        def kernel(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            apart = a[:, None] - b[None]
            sine, cosine = np.sin(apart), np.cos(apart)
            return self.amplitude * np.exp(scale * (cosine - 1).sum(-1)), sine, cosine

        k, _, _ = kernel(values, of)
        rows = [[k + _ZERO_kT**2]]
        k, sine, _ = kernel(values, of_slopes)
        rows[0] += [scale * k * sine[..., j] for j in range(n_torsions)]
        k, sine, _ = kernel(slopes, of)
        k_slopes, both, cosine = kernel(slopes, of_slopes)
        for i in range(n_torsions):
            row = [-scale * k * sine[..., i]]
            for j in range(n_torsions):
                mixed = -(scale**2) * both[..., i] * both[..., j]
                row.append(k_slopes * (mixed + (scale * cosine[..., i] if i == j else 0.0)))
            rows.append(row)
        return np.block(rows)

    def __call__(self, torsions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return F in eV, (N,), and the mean force -∂F/∂s in eV/rad, (N, n_torsions)."""
        parts = np.array_split(torsions, max(1, len(torsions) // _AT_ONCE))
        values = np.concatenate([self.free_energy(part)[0] for part in parts])
        return values, np.concatenate([self.mean_force(part) for part in parts])

    def free_energy(self, torsions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return F and its standard deviation in eV, each (N,), at torsions (N, n_torsions).

        F is on the scale of the labels. The deviation is that of F up to the constant: of the
        difference from the labels' F, which is known where there are labels.
        """
        none = torsions[:0]
        cross = self._covariance(torsions, none, self._at, self._slopes_at)
        mean = cross @ self._solved
        explained = solve_triangular(self._factor[0], cross.T, lower=True)
        variance = self.amplitude + _ZERO_kT**2 - (explained**2).sum(0)
        return self.kT * mean + self._zero, self.kT * np.sqrt(np.maximum(variance, 0.0))

    def mean_force(self, torsions: np.ndarray) -> np.ndarray:
        """Return -∂F/∂s in eV/rad, (N, n_torsions), at torsions of that shape."""
        cross = self._covariance(torsions[:0], torsions, self._at, self._slopes_at)
        return -self.kT * (cross @ self._solved).reshape(torsions.shape[1], -1).T

    def most_uncertain(
        self, candidates: np.ndarray, n_states: int, highest_kT: float
    ) -> np.ndarray:
        """Choose where labels would tell most about F, one after another.

        Each choice is the candidate of the largest variance, given the labels and a label at all
        choices before it (pivoted Cholesky factorisation of the posterior covariance); candidates
        whose F may be more than `highest_kT` above the lowest one don't count.

        Parameters
        ----------
        candidates
            Torsions (N, n_torsions); some thousand.
        n_states
            How many to choose; fewer are returned if so few are left.
        highest_kT
            Of F less twice its uncertainty.

        Returns
        -------
        ndarray
            Indices of the candidates, in the order of choice.
        """
        F, deviation = self.free_energy(candidates)
        low = (F - 2 * deviation - F.min()) / self.kT <= highest_kT
        (index,) = np.nonzero(low)
        at, none = candidates[index], candidates[:0]
        cross = self._covariance(at, none, self._at, self._slopes_at)
        explained = solve_triangular(self._factor[0], cross.T, lower=True)
        left = self._covariance(at, none, at, none) - explained.T @ explained
        chosen: list[int] = []
        variance = np.diag(left).copy()
        for _ in range(min(n_states, len(index))):
            best = int(np.argmax(variance))
            column = left[:, best] / np.sqrt(max(variance[best], 1e-300))
            left -= np.outer(column, column)
            variance = np.diag(left).copy()
            variance[[*chosen, best]] = -np.inf
            chosen.append(best)
        return index[chosen]


def _most_telling(labels: Labels) -> np.ndarray:
    """Choose labels of F and, as far as there is room, of slopes alone; ascending indices."""
    known = np.isfinite(labels.free_energy)
    chosen, room = [], _MOST_LABELS
    for kind in (np.flatnonzero(known), np.flatnonzero(~known)):
        some = np.linspace(0, len(kind) - 1, min(len(kind), room)).astype(int)
        chosen.append(kind[some])
        room -= len(some)
    return np.sort(np.concatenate(chosen))
