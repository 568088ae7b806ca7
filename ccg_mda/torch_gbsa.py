"""Implicit water in torch: generalised Born energy with OBC2 radii, and a surface term."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ccg_ase.exact import ExactConstants

from .torch_nonbonded import Distances

_OFFSET_A = 0.09
_PROBE_A = 1.4
_OBC2 = (1.0, 0.8, 4.85)  # α, β, γ


class GeneralisedBorn(ExactConstants):
    """Energy of charges in a dielectric by pairwise descreening, and of the solvent's surface.

    Radii: Onufriev, Bashford, Case, Proteins 55, 383 (2004), model II; energy: Still et al.,
    J. Am. Chem. Soc. 112, 6127 (1990); surface: Schaefer, Bartels, Karplus, J. Mol. Biol. 284, 835
    (1998). Constants as in OpenMM's `GBSAOBCForce`.

    Parameters
    ----------
    charge
        In e, shape (n,).
    radius
        Å, shape (n,).
    scale
        Factors of the descreening radii, shape (n,).
    coulomb
        Coulomb's constant times 1/ε(solute) - 1/ε(solvent), in eV·Å/e².
    tension
        Energy per surface in eV/Å².
    """

    def __init__(
        self,
        charge: np.ndarray,
        radius: np.ndarray,
        scale: np.ndarray,
        *,
        coulomb: float,
        tension: float,
    ):
        super().__init__()
        atoms = torch.triu_indices(len(charge), len(charge), 1)
        self.register_buffer("atoms", atoms)
        # Every pair twice: first j screens i, then i screens j.
        self.register_buffer("screened", atoms.flatten())
        inner = radius - _OFFSET_A
        constants = {
            "pair_charge": coulomb * np.prod(charge[atoms.numpy()], 0),
            "self_charge": 0.5 * coulomb * charge**2,
            "radius": radius[:, None],
            "inner": inner[:, None],
            "own": inner[atoms.numpy()][..., None],
            "reach": (inner * scale)[atoms.flip(0).numpy()][..., None],
            "surface": 4 * np.pi * tension * (radius + _PROBE_A) ** 2 * radius**6,
        }
        for name, value in constants.items():
            self.register_exact(name, torch.from_numpy(value))

    def born_radii(self, distances: Distances) -> Tensor:
        """Return effective Born radii in Å, shape (n, B)."""
        integral = _Descreening.apply(distances.plain, self.reach, self.own)
        screening = integral.new_zeros(len(self.radius), integral.shape[-1])
        screening = screening.index_add(0, self.screened, integral.flatten(0, 1))
        psi = 0.5 * self.inner * screening
        alpha, beta, gamma = _OBC2
        bent = torch.tanh(psi * (alpha + psi * (gamma * psi - beta)))
        return (self.inner.reciprocal() - bent / self.radius).reciprocal()

    def forward(self, distances: Distances) -> Tensor:
        """Return the energy in eV, shape (B,)."""
        inverse = self.born_radii(distances).reciprocal()
        first, second = (inverse.index_select(0, own) for own in self.atoms)
        product = first * second
        ratio = distances.square * product
        pairs = (ratio + torch.exp(-0.25 * ratio)).rsqrt() * product.sqrt()
        return self.surface @ inverse**6 - self.pair_charge @ pairs - self.self_charge @ inverse


class _Descreening(torch.autograd.Function):
    """Twice the integral of 1/(4π r⁴) over the part of one atom's sphere outside another atom.

    Hawkins, Cramer, Truhlar, Chem. Phys. Lett. 246, 122 (1995), with Schaefer's and Froemmel's
    closed form. Its limits depend on the distance too, but the integral's derivative by a limit
    that moves is zero, which leaves a third of the work.

    Parameters
    ----------
    distance
        r in Å, shape (pairs, B).
    reach, own
        Radius of the sphere that screens, and inner radius of the screened atom, Å; both of shape
        (2, pairs, 1), for either direction.

    Returns
    -------
    Tensor
        1/Å, shape (2, pairs, B).
    """

    @staticmethod
    def forward(ctx: Any, distance: Tensor, reach: Tensor, own: Tensor) -> Tensor:
        value, slope = _integral(distance, reach, own)
        ctx.save_for_backward(distance, reach, own, slope)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        distance, reach, own, slope = ctx.saved_tensors
        if torch.is_grad_enabled():  # the saved one has no derivatives
            slope = _integral(distance, reach, own)[1]
        return (gradient * slope).sum(0), None, None


def _integral(distance: Tensor, reach: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Return the integral and its derivative by the distance."""
    inverse, square = distance.reciprocal(), 0.25 * reach.square()
    gap = distance - reach
    # No part of a sphere that lies inside the screened atom counts: both limits are `own` then.
    near = torch.maximum(gap.abs(), own)
    lower, upper = near.reciprocal(), torch.maximum(distance + reach, own).reciprocal()
    linear, logarithm = lower - upper, (near * upper).log()
    quadratic = linear * (lower + upper)
    value = torch.addcmul(linear, 0.5 * inverse, logarithm)
    value = torch.addcmul(value, torch.addcmul(-0.25 * distance, square, inverse), quadratic)
    # Where the screened atom lies inside the other's sphere.
    inside = torch.maximum(-gap, own).reciprocal()
    value = torch.add(value + 2 * own.reciprocal(), inside, alpha=-2)
    inverse_square = inverse.square()
    slope = -0.5 * inverse_square * logarithm
    return value, torch.addcmul(slope, -0.25 - square * inverse_square, quadratic)
