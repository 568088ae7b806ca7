"""Smooth bijection between uniform noise and the torsion of a rotor, on the full circle."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .transforms import TWO_PI

N_HARMONICS = 3
N_ROTOR = 2 * N_HARMONICS + 4  # parameters of a CircularDensity, at most N_PARAMETERS


@lru_cache(maxsize=16)
def _circle_tables(
    n_grid: int, n_nodes: int, n_terms: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    """Return constants of :class:`CircularDensity`, the same for all of one precision and device.

    ``orders`` (K,); ``grid`` (n_grid,); ``waves`` (2 K, n_grid), cosines and sines on the grid;
    ``primitive`` (n_grid, n_grid), which takes a periodic function on the grid to the primitive of
    its oscillating part, by its Fourier series; Gauss–Legendre ``nodes``, ``weights`` on [0, 1].
    """
    orders, grid = np.arange(1, n_terms + 1), np.arange(n_grid) * (TWO_PI / n_grid)
    angles = orders[:, None] * grid
    k = np.arange(1, n_grid // 2)
    kernel = (2.0 / n_grid) * (np.sin(grid[:, None] * k) / k).sum(-1)
    index = np.arange(n_grid)
    nodes, weights = np.polynomial.legendre.leggauss(n_nodes)
    arrays = (
        orders,
        grid,
        np.concatenate([np.cos(angles), np.sin(angles)]),
        kernel[(index[:, None] - index) % n_grid],
        0.5 * (nodes + 1.0),
        0.5 * weights,
    )
    with torch.inference_mode(False):  # cached: must serve autograd later
        return tuple(torch.tensor(a, dtype=dtype, device=device) for a in arrays)


def _stretched(angle: Tensor, factor: Tensor) -> Tensor:
    """Return 2 atan(factor tan(angle/2)) on the branch of ``angle``, smooth on the whole line."""
    cosine, more = torch.cos(angle), factor - 1.0
    return angle + 2.0 * torch.atan(more * torch.sin(angle) / (2.0 + more * (1.0 - cosine)))


class CircularDensity:
    r"""Density of a torsion ``φ``, the exponential of a Fourier series, with its map to uniform.

    With ``a = M (φ - φ0)``, M the symmetry number, and ``tan b/2 = κ tan a/2``, the density has
    mean one over the circle, ``ρ(φ) = (λ + (1 - λ) exp(Σ_k p_k cos kb + q_k sin kb) / Z) db/da``,
    and ``u = G(b) / M + c`` with ``G' = ρ da/db`` is uniform on the circle. The floor λ bounds
    weights and keeps the inverse well conditioned. φ0 is the angle of a steering vector v: turning
    v turns the density and, at fixed ``u``, every sample along rigidly. The gauge ``c`` leaves the
    density alone and decides how samples move when the other parameters change (flow_recipe.md).
    κ, a Möbius map of the circle, makes peaks sharper than the series alone can: where beads and
    earlier atoms all but fix a torsion.

    G on a grid comes from the Fourier series of G', which has converged to rounding for all
    parameters, and between grid points from Gauss–Legendre quadrature of G'.

    Parameters
    ----------
    raw
        Unbounded parameters, shape (..., 2 K + 4): K cosine and K sine amplitudes (each pair
        bounded to a length of 8: peaks as narrow as 5.5° for K = 3), gauge c (rad), v - (1, 0), and
        ln κ (bounded to ±3: peaks twenty times as narrow).
    multiplicity
        Symmetry number M: a number, or a tensor that broadcasts with ``raw[..., 0]``.

    Raises
    ------
    ValueError
        If the number of parameters is not 6, 8 or 10.
    """

    n_grid, n_nodes, n_newton = 160, 5, 3
    bound, log_sharpest, floor = 8.0, 3.0, 1e-4

    def __init__(self, raw: Tensor, multiplicity: Tensor | float = 1.0) -> None:
        n_terms, odd = divmod(raw.shape[-1] - 4, 2)
        if odd or not 1 <= n_terms <= N_HARMONICS:
            raise ValueError(
                f"a circular density takes 2 K + 4 parameters with 1 <= K <= {N_HARMONICS}, got "
                f"{raw.shape[-1]}: slice the parameters to {N_ROTOR}"
            )
        tables = _circle_tables(self.n_grid, self.n_nodes, n_terms, raw.dtype, raw.device)
        self._orders, self._grid, waves, self._primitive, self._nodes, self._weights = tables
        amplitudes = raw[..., : 2 * n_terms].unflatten(-1, (2, n_terms))
        lengths = torch.sqrt(1.0 + amplitudes.square().sum(-2, keepdim=True) / self.bound**2)
        self._coefficients = (amplitudes / lengths).flatten(-2)
        self.gauge = raw[..., 2 * n_terms]
        self.direction = torch.atan2(raw[..., -2], 1.0 + raw[..., -3])
        self._kappa = torch.exp(self.log_sharpest * torch.tanh(raw[..., -1] / self.log_sharpest))
        self.multiplicity = multiplicity
        self._grid_values = torch.exp(self._coefficients @ waves)  # at most e^24: no overflow
        self._factor = (1.0 - self.floor) / self._grid_values.mean(-1)

    def _density(self, b: Tensor, extra: int = 0) -> Tensor:
        """Return G' at ``b``, whose last ``extra`` dimensions share their parameters."""
        waves = b[..., None] * self._orders
        waves = torch.cat([torch.cos(waves), torch.sin(waves)], -1)
        index = (..., *(None,) * extra)
        series = (waves * self._coefficients[(*index, slice(None))]).sum(-1)
        return self.floor + self._factor[index] * torch.exp(series)

    def _local(self, start: Tensor, step: Tensor) -> Tensor:
        """Return the integral of G' from ``start`` to ``start + step``, within one grid cell."""
        rho = self._density(start[..., None] + step[..., None] * self._nodes, extra=1)
        return step * (rho @ self._weights)

    def _at_grid(self, cell: Tensor) -> Tensor:
        """Return G at the start of grid cells."""
        wave = (self._primitive[cell] * self._grid_values).sum(-1)
        return self._grid[cell] + wave * self._factor

    def _centred(self, phi: Tensor) -> Tensor:
        """Return a on the lifted circle."""
        return (phi - self.direction) * self.multiplicity

    def log_density(self, phi: Tensor) -> Tensor:
        """Return ``ln ρ(φ)``, zero for the uniform density; shape of ``phi``."""
        a = self._centred(phi)
        cosine = torch.cos(a)
        spread = (1.0 + cosine) + self._kappa.square() * (1.0 - cosine)
        slope = 2.0 * self._kappa / spread  # db/da
        return torch.log(self._density(_stretched(a, self._kappa)) * slope)

    def uniform(self, phi: Tensor) -> Tensor:
        """Return ``u``, uniform on the lifted circle (not wrapped)."""
        b = _stretched(self._centred(phi), self._kappa)
        turns = torch.floor(b.detach() / TWO_PI) * TWO_PI
        b = b - turns
        cell = (b.detach() * (self.n_grid / TWO_PI)).long().clamp(0, self.n_grid - 1)
        start = self._grid[cell]
        g = self._at_grid(cell) + self._local(start, b - start) + turns
        return g / self.multiplicity + self.gauge

    def inverse(self, u: Tensor) -> Tensor:
        """Return ``φ`` of ``u``, differentiable twice in ``u`` and the parameters."""
        target = (u - self.gauge) * self.multiplicity
        with torch.no_grad():
            turns, cell, step = self._solve(target)
        start = self._grid[cell]
        target = target - turns - self._at_grid(cell)
        for _ in range(2):  # one Newton step is right to first derivatives, two to second ones
            error = target - self._local(start, step)
            step = step + error / self._density(start + step)
        a = _stretched(turns + start + step, 1.0 / self._kappa)
        return a / self.multiplicity + self.direction

    def _solve(self, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return whole turns (rad), grid cell and step into it where ``G = target``."""
        table = self._grid + (self._grid_values @ self._primitive.T) * self._factor[..., None]
        turns = torch.floor((target - table[..., 0]) / TWO_PI) * TWO_PI
        reduced = target - turns  # now table[0] <= reduced < table[0] + 2π
        table = table.expand(*reduced.shape, -1).contiguous()
        cell = torch.searchsorted(table, reduced[..., None], right=True).squeeze(-1) - 1
        cell = cell.clamp(0, self.n_grid - 1)
        start = self._grid[cell]
        missing = reduced - table.gather(-1, cell[..., None]).squeeze(-1)
        low, high = torch.zeros_like(missing), torch.full_like(missing, TWO_PI / self.n_grid)
        step = (high * missing / self._local(start, high)).clamp(low, high)
        for _ in range(self.n_newton):  # Newton, kept inside a shrinking bracket
            error = self._local(start, step) - missing
            low, high = torch.where(error < 0, step, low), torch.where(error < 0, high, step)
            step = step - error / self._density(start + step)
            step = torch.where((step < low) | (step > high), 0.5 * (low + high), step)
        return turns, cell, step
