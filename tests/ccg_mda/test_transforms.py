"""The scalar bijections: inverses, derivatives against autograd, normalisation by quadrature."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ccg_mda.transforms import Chart, CircularDensity


@pytest.fixture
def chart() -> Chart:
    location = torch.tensor([[0.1, 0.4, 2.5], [0.5, -0.3, -3.0]], dtype=torch.float64)
    scale = torch.tensor([[0.03, 0.1, 0.2], [0.3, 0.8, 1.5]], dtype=torch.float64)
    return Chart(location, scale)


def test_chart_round_trip_and_derivative(chart):
    y = 2.0 * torch.randn(50, 2, 3, generator=torch.Generator().manual_seed(0)).double()
    y.requires_grad_()
    coordinates = chart.coordinates(y)
    r, theta, _ = coordinates
    assert (r > 0).all()
    assert ((theta > 0) & (theta < np.pi)).all()
    torch.testing.assert_close(chart.standardise(*coordinates), y, rtol=0, atol=1e-11)
    exact = [torch.autograd.grad(c.sum(), y, retain_graph=True)[0] for c in coordinates]
    exact = torch.stack([g[..., k] for k, g in enumerate(exact)], -1)
    torch.testing.assert_close(chart.log_derivatives(*coordinates), exact.log(), rtol=0, atol=1e-11)


@pytest.mark.parametrize("spread", [0.0, 0.5, 1.5])
def test_circular_density_is_normalised_and_inverts(spread):
    generator = torch.Generator().manual_seed(1)
    raw = spread * torch.randn(20, 7, generator=generator).double()
    density = CircularDensity(raw)
    grid = torch.arange(400).double()[:, None] * (2 * np.pi / 400)
    mean = density.log_density(grid.expand(-1, 20)).exp().mean(0)
    torch.testing.assert_close(mean, torch.ones_like(mean), rtol=0, atol=1e-12)
    angle = 20 * torch.randn(20, generator=generator).double()
    angle.requires_grad_()
    u = density.uniform(angle)
    (slope,) = torch.autograd.grad(u.sum(), angle)
    torch.testing.assert_close(slope.log(), density.log_density(angle), rtol=0, atol=1e-10)
    torch.testing.assert_close(density.inverse(u.detach()), angle, rtol=0, atol=1e-11)


def test_inverse_of_circular_density_is_differentiable_twice():
    generator = torch.Generator().manual_seed(2)
    raw = torch.randn(3, 7, generator=generator).double().requires_grad_()
    u = (3 * torch.randn(3, generator=generator)).double().requires_grad_()

    def inverse(raw, u):
        return CircularDensity(raw).inverse(u)

    assert torch.autograd.gradcheck(inverse, (raw, u))
    assert torch.autograd.gradgradcheck(inverse, (raw, u))
