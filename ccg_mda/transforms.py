"""Smooth scalar bijections between the real line or the circle and the three internal coordinates.

All maps are C-infinity, exact on their whole domain and cheap in both directions: bond lengths live
on the half-line, angles on an interval, stiff dihedrals on a cut circle, and rotors on the full
circle, where the density is the exponential of a short Fourier series.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

TWO_PI = 2.0 * math.pi


def wrap(angle: Tensor) -> Tensor:
    """Return an angle in radians, shifted by multiples of 2π into [-π, π)."""
    return torch.remainder(angle + math.pi, TWO_PI) - math.pi


class Chart:
    """Standardised coordinates ``y`` of bond lengths, angles and stiff dihedrals.

    ``r = exp(m + s y)``, ``θ = 2 atan(exp(m + s y))`` and ``φ = m + 2 atan(s y / 2)``: each is
    close to linear over thermal fluctuations, and maps the real line onto the whole domain.

    Parameters
    ----------
    location, scale
        ``m`` and ``s``, shape (n, 3), columns r (ln Å), θ (ln tan θ/2) and φ (rad).
    """

    def __init__(self, location: Tensor, scale: Tensor) -> None:
        self.location, self.scale = location, scale

    @staticmethod
    def flatten(r: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``ln r`` and ``ln tan θ/2``, the unbounded forms whose statistics set ``m, s``."""
        return torch.log(r), torch.log(torch.tan(0.5 * theta))

    def coordinates(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``(r, θ, φ)`` of ``y`` with shape (..., n, 3)."""
        u = y * self.scale
        r = torch.exp(self.location[..., 0] + u[..., 0])
        theta = 2.0 * torch.atan(torch.exp(self.location[..., 1] + u[..., 1]))
        phi = self.location[..., 2] + 2.0 * torch.atan(0.5 * u[..., 2])
        return r, theta, phi

    def standardise(self, r: Tensor, theta: Tensor, phi: Tensor) -> Tensor:
        """Return ``y`` of shape (..., n, 3); inverse of :meth:`coordinates`."""
        log_r, log_tan = self.flatten(r, theta)
        half = 2.0 * torch.tan(0.5 * wrap(phi - self.location[..., 2]))
        u = torch.stack([log_r - self.location[..., 0], log_tan - self.location[..., 1], half], -1)
        return u / self.scale

    def log_derivatives(self, r: Tensor, theta: Tensor, phi: Tensor) -> Tensor:
        """Return ``ln |d(r, θ, φ)/dy|`` of each coordinate, shape (..., n, 3)."""
        # dφ/du = 1 / (1 + u²/4) = cos²((φ - m)/2)
        d_phi = 2.0 * torch.log(torch.cos(0.5 * wrap(phi - self.location[..., 2])))
        logs = torch.stack([torch.log(r), torch.log(torch.sin(theta)), d_phi], -1)
        return logs + torch.log(self.scale)


class CircularDensity:
    r"""Density of an angle ``a``, the exponential of a Fourier series, with its map to uniform.

    ``ρ(a) = exp(Σ_k p_k cos ka + q_k sin ka) / Z`` has mean one over the circle; the map
    ``u = G(a) + c`` with ``G' = ρ`` makes ``u`` uniform. ``G`` is the integrated Fourier series of
    ``ρ``, which converges geometrically. The gauge ``c`` leaves the density alone and decides how a
    sample moves at fixed ``u`` when the parameters change (flow_recipe.md).

    Parameters
    ----------
    raw
        Unbounded parameters, shape (..., 2 K + 1): K cosine, K sine amplitudes and the gauge.
    """

    n_grid = 128
    n_series = 60

    def __init__(self, raw: Tensor) -> None:
        n_terms = (raw.shape[-1] - 1) // 2
        orders = torch.arange(1, n_terms + 1, dtype=raw.dtype, device=raw.device)
        bound = (
            5.0 / orders**1.5
        )  # keeps the series above converged to rounding for all usual densities
        self._cos = bound * torch.tanh(raw[..., :n_terms] / bound)
        self._sin = bound * torch.tanh(raw[..., n_terms:-1] / bound)
        self.gauge = raw[..., -1]
        self._orders = orders
        grid = torch.arange(self.n_grid, dtype=raw.dtype, device=raw.device)
        self._grid = grid * (TWO_PI / self.n_grid)
        angles = self._grid[:, None] * orders
        log_rho = self._cos @ torch.cos(angles).T + self._sin @ torch.sin(angles).T
        self._log_z = torch.logsumexp(log_rho, -1) - math.log(self.n_grid)
        rho = torch.exp(log_rho - self._log_z[..., None])
        self._series = torch.arange(1, self.n_series + 1, dtype=raw.dtype, device=raw.device)
        waves = self._grid[:, None] * self._series
        factor = 2.0 / (self.n_grid * self._series)
        self._a = (rho @ torch.cos(waves)) * factor
        self._b = (rho @ torch.sin(waves)) * factor

    def log_density(self, a: Tensor) -> Tensor:
        """Return ``ln ρ(a)``, zero for the uniform density; shape of ``a``."""
        waves = a[..., None] * self._orders
        series = (self._cos * torch.cos(waves) + self._sin * torch.sin(waves)).sum(-1)
        return series - self._log_z

    def _primitive(self, a: Tensor) -> Tensor:
        waves = a[..., None] * self._series
        return a + (self._a * torch.sin(waves) - self._b * torch.cos(waves)).sum(-1)

    def uniform(self, a: Tensor) -> Tensor:
        """Return ``u = G(a) + c`` on the lifted circle (not wrapped)."""
        return self._primitive(a) + self.gauge

    def inverse(self, u: Tensor) -> Tensor:
        """Return ``a`` with ``G(a) + c = u``, differentiable twice in ``u`` and the parameters."""
        target = u - self.gauge
        with torch.no_grad():
            a = self._solve(target)
        for _ in range(2):  # one Newton step is right to first derivatives, two to second ones
            a = a + (target - self._primitive(a)) * torch.exp(-self.log_density(a))
        return a

    def _solve(self, target: Tensor) -> Tensor:
        waves = self._grid[:, None] * self._series
        table = self._grid + self._a @ torch.sin(waves).T - self._b @ torch.cos(waves).T
        turns = torch.floor((target - table[..., 0]) / TWO_PI)
        reduced = target - turns * TWO_PI  # now table[0] <= reduced < table[0] + 2π
        cell = ((table <= reduced[..., None]).sum(-1) - 1).clamp(0, self.n_grid - 1)
        width = TWO_PI / self.n_grid
        low = cell.to(target.dtype) * width
        high = low + width
        a = low + 0.5 * width
        for _ in range(12):  # Newton, kept inside a shrinking bracket
            error = self._primitive(a) - reduced
            low = torch.where(error < 0, a, low)
            high = torch.where(error < 0, high, a)
            a = a - error * torch.exp(-self.log_density(a))
            a = torch.where((a < low) | (a > high), 0.5 * (low + high), a)
        return a + turns * TWO_PI
