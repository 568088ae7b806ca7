"""Smooth bijections between noise and the internal coordinates of placed atoms.

All maps are C-infinity, exact on their whole domain and explicit in both directions: bond lengths
live on the half-line, angles on an interval, stiff dihedrals on a cut circle, linear groups in
plain Cartesian components, free directions on the sphere; rotors, on the full circle, are in
:mod:`.circular`. Parameters that are all zero give the identity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

TWO_PI = 2.0 * math.pi
_LOG_2PI = math.log(TWO_PI)

N_PARAMETERS = 15  # of an Affine block


def wrap(angle: Tensor) -> Tensor:
    """Return an angle in radians, shifted by multiples of 2π into [-π, π)."""
    return torch.remainder(angle + math.pi, TWO_PI) - math.pi


class Chart:
    """Standardised coordinates ``y`` of bond lengths, angles and stiff dihedrals.

    ``r = exp(m + s y)``, ``θ = 2 atan(exp(m + s y))`` and ``φ = m + 2 atan(s y / 2)``: each is
    close to linear over thermal fluctuations, and maps the real line onto the whole domain. Where
    ``cartesian`` is set the three coordinates are components in the local frame, ``m + s y``:
    linear groups have no dihedral. Degenerate points (r = 0, θ = 0 or π) read as the nearest
    regular ones, so that no value or gradient is NaN.

    Parameters
    ----------
    location, scale
        ``m`` and ``s``, shape (..., n, 3), columns r (ln Å), θ (ln tan θ/2) and φ (rad); all Å
        where Cartesian.
    cartesian
        Which slots are Cartesian, boolean, shape (n,); none by default.
    """

    def __init__(self, location: Tensor, scale: Tensor, cartesian: Tensor | None = None) -> None:
        self.location, self.scale, self.cartesian = location, scale, cartesian

    @staticmethod
    def flatten(r: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``ln r`` and ``ln tan θ/2``, the unbounded forms whose statistics set ``m, s``."""
        r, theta = _regular(r, theta)
        return torch.log(r), torch.log(torch.tan(0.5 * theta))

    def _polar(self, values: Tensor, neutral: float) -> Tensor:
        """Replace the values of Cartesian slots, so that the branch not taken stays finite."""
        return values if self.cartesian is None else values.masked_fill(self.cartesian, neutral)

    def _choose(self, polar: Tensor, plain: Tensor) -> Tensor:
        if self.cartesian is None:
            return polar
        return torch.where(self.cartesian[:, None], plain, polar)

    def coordinates(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``(r, θ, φ)``, or ``(x, y, z)`` where Cartesian, of ``y`` (..., n, 3)."""
        u = y * self.scale
        plain = self.location + u
        # e^80 Å is far outside any molecule, θ = π to rounding, and does not overflow in float32.
        r, tangent = (torch.exp(self._polar(plain[..., k], 0.0).clamp(max=80.0)) for k in (0, 1))
        phi = self.location[..., 2] + 2.0 * torch.atan(0.5 * self._polar(u[..., 2], 0.0))
        polar = torch.stack([r, 2.0 * torch.atan(tangent), phi], -1)
        first, second, third = self._choose(polar, plain).unbind(-1)
        return first, second, third

    def standardise(self, first: Tensor, second: Tensor, third: Tensor) -> Tensor:
        """Return ``y`` of shape (..., n, 3); inverse of :meth:`coordinates`."""
        log_r, log_tan = self.flatten(self._polar(first, 1.0), self._polar(second, 1.0))
        half = 2.0 * torch.tan(0.5 * wrap(self._polar(third, 0.0) - self.location[..., 2]))
        polar = torch.stack(
            [log_r - self.location[..., 0], log_tan - self.location[..., 1], half], -1
        )
        plain = torch.stack([first, second, third], -1) - self.location
        return self._choose(polar, plain) / self.scale

    def log_derivatives(self, first: Tensor, second: Tensor, third: Tensor) -> Tensor:
        """Return ``ln |d(coordinate)/dy|`` of each coordinate, shape (..., n, 3)."""
        r, theta = _regular(self._polar(first, 1.0), self._polar(second, 1.0))
        half = torch.tan(0.5 * wrap(self._polar(third, 0.0) - self.location[..., 2]))
        polar = torch.stack(
            [torch.log(r), torch.log(torch.sin(theta)), -torch.log1p(half * half)], -1
        )
        return self._choose(polar, torch.zeros_like(polar)) + torch.log(self.scale)

    def log_volume(self, first: Tensor, second: Tensor) -> Tensor:
        """Return ``ln |dx/d(coordinates)|``: ``2 ln r + ln sin θ``, 0 where Cartesian; (..., n)."""
        r, theta = _regular(self._polar(first, 1.0), self._polar(second, 0.5 * math.pi))
        return 2.0 * torch.log(r) + torch.log(torch.sin(theta))


def _regular(r: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``r`` and ``θ`` kept away from r = 0 and θ = 0, π by about rounding."""
    eps = 4.0 * torch.finfo(theta.dtype).eps
    return r.clamp(min=1e-12), theta.clamp(eps, math.pi - eps)


class Affine:
    """Triangular map ``y = μ + exp(l) (I + L) g(z)`` of three standard normal coordinates.

    ``g`` bends each coordinate by sinh–arcsinh (Jones and Pewsey, Biometrika 96, 761 (2009)),
    ``g(z) = [sinh(δ asinh z + ε) - sinh ε] / (δ cosh ε)``: ε sets the skew, δ the tails, and
    ``g(0) = 0``, ``g'(0) = 1`` leave centre and width to the affine part.

    Parameters
    ----------
    parameters
        Unbounded, shape (..., 15): shift μ (3), log-scale (3, bounded as ``l = 3 tanh(raw/3)``),
        coupling L (3: second on first, third on first, third on second), skew (3, ``ε = tanh
        raw``), tail (3, ``ln δ = tanh(raw) / 2``).
    """

    def __init__(self, parameters: Tensor) -> None:
        self.shift, log_scale, self.coupling, skew, tail = parameters.split(3, -1)
        self.log_scale = 3.0 * torch.tanh(log_scale / 3.0)
        self.skew = torch.tanh(skew)
        self.tail = torch.exp(0.5 * torch.tanh(tail))
        self._offset = torch.sinh(self.skew)
        self._slope = self.tail * torch.cosh(self.skew)

    def _log_prob(self, z: Tensor, bent: Tensor) -> Tensor:
        """Return the log-density of y; ``bent = sinh(δ asinh z + ε)``."""
        # ln g' = ln cosh(δ asinh z + ε) - ln cosh ε - ln cosh asinh z
        squares = torch.log1p(bent * bent) - torch.log1p(self._offset**2) - torch.log1p(z * z)
        return -0.5 * (z * z + _LOG_2PI + squares) - self.log_scale

    def coordinates(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``y`` and the log-density of each coordinate, shapes (..., 3)."""
        bent = torch.sinh(self.tail * torch.asinh(z) + self.skew)
        a, b, c = ((bent - self._offset) / self._slope).unbind(-1)
        k, m, n = self.coupling.unbind(-1)
        mixed = torch.stack([a, b + k * a, c + m * a + n * b], -1)
        return self.shift + torch.exp(self.log_scale) * mixed, self._log_prob(z, bent)

    def noise(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``z`` and the log-density of each coordinate; inverse of :meth:`coordinates`."""
        a, b, c = ((y - self.shift) * torch.exp(-self.log_scale)).unbind(-1)
        k, m, n = self.coupling.unbind(-1)
        b = b - k * a
        bent = torch.stack([a, b, c - m * a - n * b], -1) * self._slope + self._offset
        z = torch.sinh((torch.asinh(bent) - self.skew) / self.tail)
        return z, self._log_prob(z, bent)


def uniform_angle(z: Tensor) -> tuple[Tensor, Tensor]:
    """Return the polar angle ``θ`` of a uniform direction from standard normal ``z``.

    ``cos θ = 2 Φ(z) - 1``, so that ``tan² θ/2 = Φ(-z) / Φ(z)``, which is stable in both tails.

    Returns
    -------
    theta, log_p
        θ in (0, π), and its log-density ``ln (sin θ / 2)``; shape of ``z``.
    """
    # Beyond 12 (probability 1e-33) erfcx, in the derivative of log_ndtr, overflows in float32.
    z = z.clamp(-12.0, 12.0)
    upper, lower = torch.special.log_ndtr(-z), torch.special.log_ndtr(z)
    return 2.0 * torch.atan(torch.exp(0.5 * (upper - lower))), 0.5 * (upper + lower)


def uniform_angle_noise(theta: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``z`` of ``θ``, and ``ln (sin θ / 2)``; inverse of :func:`uniform_angle`."""
    eps = 4.0 * torch.finfo(theta.dtype).eps
    theta = theta.clamp(eps, math.pi - eps)
    obtuse = theta > 0.5 * math.pi
    half = torch.where(obtuse, math.pi - theta, theta)
    z = torch.special.ndtri(torch.sin(0.5 * half).square())  # of the smaller probability
    return torch.where(obtuse, z, -z), torch.log(0.5 * torch.sin(half))


@dataclass(frozen=True)
class Base:
    """Distribution of the noise of one frame: standard normal or uniform, and a wide component.

    The defensive mixture of theory.md E8: with probability ``weight`` the normal noise of a frame
    is drawn ``sigma`` times as wide, but for that of free directions, which stay uniform. Circular
    noise is uniform on [-π, π) in both components.

    Attributes
    ----------
    weight
        Weight a of the wide component, 0 <= a < 1; 0 by default.
    sigma
        Its standard deviation, at least 1.

    Raises
    ------
    ValueError
        If weight or sigma is out of range.
    """

    weight: float = 0.0
    sigma: float = 1.5

    def __post_init__(self) -> None:
        if not (0.0 <= self.weight < 1.0 and 1.0 <= self.sigma < math.inf):
            raise ValueError(
                f"the wide component needs 0 <= weight < 1 and sigma >= 1, got weight "
                f"{self.weight:g} and sigma {self.sigma:g}: weight 0.05 and sigma 1.5 are usual"
            )

    def log_ratio(self, noise: Tensor, widened: Tensor) -> Tensor:
        """Return the log-density of ``noise`` less that of the narrow component alone.

        Parameters
        ----------
        noise
            Shape (..., n_slots, 3).
        widened
            Which normal noise the wide component widens, boolean, shape (n_slots, 3).

        Returns
        -------
        Tensor
            Shape (...): one number for each frame.
        """
        if self.weight == 0.0:
            return noise.new_zeros(noise.shape[:-2])
        each = 0.5 * (1.0 - self.sigma**-2) * noise.square() - math.log(self.sigma)
        wide = (each * widened).sum((-1, -2)) + math.log(self.weight)
        return torch.logaddexp(wide, torch.full_like(wide, math.log1p(-self.weight)))

    def log_density(
        self, noise: Tensor, normal: Tensor, circular: Tensor, widened: Tensor
    ) -> Tensor:
        """Return the log-density, (...), of noise (..., n_slots, 3); masks as in `sample`."""
        narrow = -0.5 * (noise.square() * normal).sum((-1, -2))
        constant = _LOG_2PI * (0.5 * normal.sum() + circular.sum())
        return narrow - constant + self.log_ratio(noise, widened)

    def sample(
        self,
        rng: np.random.Generator,
        shape: tuple[int, ...],
        normal: np.ndarray,
        circular: np.ndarray,
        widened: np.ndarray,
    ) -> Tensor:
        """Draw noise (*shape, n_slots, 3), float64: the same for the same generator everywhere.

        ``normal``, ``circular`` and ``widened``, a part of normal, are boolean, (n_slots, 3); noise
        that is neither normal nor circular is zero.
        """
        noise = rng.standard_normal((*shape, *normal.shape))
        noise[..., circular] = rng.uniform(-np.pi, np.pi, (*shape, int(circular.sum())))
        noise[..., ~(normal | circular)] = 0.0
        if self.weight > 0.0:
            widen = np.where(rng.random(shape) < self.weight, self.sigma, 1.0)
            noise = np.where(widened, noise * widen[..., None, None], noise)
        return torch.from_numpy(noise)
