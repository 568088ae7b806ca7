"""The density of a rotor's torsion; the contract of the family is in test_transforms.py."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ccg_mda.circular import N_ROTOR, CircularDensity
from ccg_mda.transforms import N_PARAMETERS, TWO_PI, wrap


def parameters_over_the_range(n: int) -> Tensor:
    """Return rotor parameters from nearly uniform densities to saturated ones."""
    raw = torch.randn(n, N_ROTOR, generator=torch.Generator().manual_seed(2)).double()
    raw[:, :6] *= torch.logspace(-1, 3, n).double()[:, None]
    raw[0, :6] = torch.tensor([1e6, 1e6, 1e6, 0.0, 0.0, 0.0])
    raw[0, -1], raw[1, -1], raw[-1, -1] = 0.0, 50.0, -50.0
    return raw


def test_circular_density_is_exact_over_the_whole_range_of_parameters():
    density = CircularDensity(parameters_over_the_range(200))
    grid = (torch.arange(16384).double() * (TWO_PI / 16384))[:, None].expand(-1, 200)
    mean = density.log_density(grid).exp().mean(0)
    torch.testing.assert_close(mean, torch.ones_like(mean), rtol=0, atol=1e-12)
    generator = torch.Generator().manual_seed(3)
    phi = (40 * torch.rand(50, 200, generator=generator).double() - 20).requires_grad_()
    u = density.uniform(phi)
    (slope,) = torch.autograd.grad(u.sum(), phi)
    torch.testing.assert_close(slope, density.log_density(phi).exp(), rtol=1e-8, atol=1e-12)
    step = 0.5 * torch.rand(50, 200, generator=generator).double()
    nodes, weights = np.polynomial.legendre.leggauss(400)
    integral = sum(
        w / 2 * density.log_density(phi.detach() + step * (x + 1) / 2).exp() * step
        for x, w in zip(nodes, weights, strict=True)
    )
    moved = density.uniform(phi.detach() + step) - u.detach()
    torch.testing.assert_close(moved, integral, rtol=0, atol=1e-10)
    torch.testing.assert_close(density.inverse(u.detach()), phi, rtol=0, atol=1e-8)


def test_steering_turns_density_and_samples_rigidly_and_smoothly_through_its_cut():
    raw = torch.tensor([1.0, -0.5, 0.8, 0.3, 0.2, 0.4, 0.1, 0.0, 0.0, 0.3], dtype=torch.float64)
    u = torch.linspace(-3, 3, 9).double()
    still = CircularDensity(raw, 3)

    def turned(angle):
        v = 2.0 * torch.tensor([math.cos(angle), math.sin(angle)])
        return CircularDensity(
            torch.cat([raw[:-3], v - torch.tensor([1.0, 0.0]), raw[-1:]]).double(), 3
        )

    torch.testing.assert_close(turned(0.7).inverse(u), still.inverse(u) + 0.7, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        turned(0.7).log_density(u + 0.7), still.log_density(u), rtol=0, atol=1e-5
    )
    jump = turned(math.pi + 1e-4).inverse(u) - turned(math.pi - 1e-4).inverse(u)
    torch.testing.assert_close(wrap(jump), torch.full_like(u, 2e-4), rtol=0, atol=1e-5)


def test_wrong_number_of_rotor_parameters_is_refused():
    with pytest.raises(ValueError, match="slice the parameters to 10"):
        CircularDensity(torch.zeros(N_PARAMETERS))
