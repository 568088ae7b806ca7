"""The smooth bijections: one contract over the family, then what is special to each member."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from ccg_mda.circular import N_ROTOR, CircularDensity
from ccg_mda.transforms import (
    N_PARAMETERS,
    TWO_PI,
    Affine,
    Base,
    Chart,
    uniform_angle,
    uniform_angle_noise,
)

LOG_2PI = math.log(TWO_PI)


def normal(z: Tensor) -> Tensor:
    return -0.5 * (z * z + LOG_2PI)


@dataclass(frozen=True)
class Member:
    """One scalar bijection: noise to coordinate and back, each with the coordinate's density."""

    forward: Callable[[Tensor, Tensor], Tensor]  # (parameters, z) -> x
    backward: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # (parameters, x) -> z, ln p(x)
    parameters: tuple[float, ...]
    domain: tuple[float, float]  # holds all but 1e-9 of the probability
    reach: float = 6.0  # largest |z|
    circular: bool = False


def chart_member(column: int, scale: float, domain, *, cartesian: bool = False) -> Member:
    def chart(parameters):
        location = torch.zeros(1, 3).to(parameters).index_fill(-1, torch.tensor(column), 1.0)
        return Chart(
            location * parameters[0],
            torch.ones(1, 3).to(parameters) * parameters[1],
            torch.tensor([cartesian]),
        )

    def spread(value):  # a slot whose other coordinates are regular
        values = [torch.full_like(value, 1.0)[..., None] for _ in range(3)]
        values[column] = value[..., None]
        return values

    def forward(parameters, z):
        return chart(parameters).coordinates(torch.stack([z] * 3, -1)[..., None, :])[column][..., 0]

    def backward(parameters, x):
        z = chart(parameters).standardise(*spread(x))[..., 0, column]
        slope = chart(parameters).log_derivatives(*spread(x))[..., 0, column]
        return z, normal(z) - slope

    return Member(forward, backward, (0.3, scale), domain)


def affine_member(skew: float, tail: float, domain, reach: float = 6.0) -> Member:
    def affine(parameters):
        zero = parameters.new_zeros(1)
        parts = [parameters[:1], zero, zero, parameters[1:2], zero, zero, zero, zero, zero]
        parts += [parameters[2:3], zero, zero, parameters[3:4], zero, zero]
        return Affine(torch.cat(parts))

    def column(z):
        return torch.stack([z, torch.zeros_like(z), torch.zeros_like(z)], -1)

    def forward(parameters, z):
        return affine(parameters).coordinates(column(z))[0][..., 0]

    def backward(parameters, x):
        z, log_p = affine(parameters).noise(column(x))
        return z[..., 0], log_p[..., 0]

    return Member(forward, backward, (0.2, -0.1, skew, tail), domain, reach)


def circular_member(raw: tuple[float, ...], multiplicity: int = 1) -> Member:
    def forward(parameters, u):
        return CircularDensity(parameters, multiplicity).inverse(u)

    def backward(parameters, phi):
        density = CircularDensity(parameters, multiplicity)
        return density.uniform(phi), density.log_density(phi) - LOG_2PI

    return Member(forward, backward, raw, (0.0, TWO_PI), 20.0, True)


FAMILY = {
    "length": chart_member(0, 0.05, (0.9, 2.0)),
    "loose length": chart_member(0, 0.6, (1e-9, 80.0)),
    "angle": chart_member(1, 0.1, (0.5, 2.9)),
    "wide angle": chart_member(1, 1.5, (0.0, math.pi)),
    "dihedral": chart_member(2, 0.2, (0.3 - math.pi, 0.3 + math.pi)),
    "loose dihedral": chart_member(2, 1.5, (0.3 - math.pi, 0.3 + math.pi)),
    "cartesian": chart_member(1, 0.4, (-3.0, 3.6), cartesian=True),
    "affine": affine_member(0.0, 0.0, (-7.0, 7.0)),
    "skewed": affine_member(0.3, -0.2, (-30.0, 30.0)),
    "most skewed": affine_member(-20.0, 20.0, (-400.0, 400.0)),
    "heavy": affine_member(20.0, -20.0, (-30.0, 60.0)),
    "uniform circle": circular_member((0.0,) * N_ROTOR),
    "rotor": circular_member((0.3, -0.8, 1.2, 0.4, 0.1, -0.7, 0.5, 0.2, -0.4, 0.0)),
    "methyl": circular_member((1.5, -0.8, 0.3, 0.4, 0.1, -0.2, 0.5, -1.2, -0.4, 0.3), 3),
    "one harmonic": circular_member((2.0, -1.0, 0.3, 0.1, 0.2, -0.5)),
    "narrow": circular_member((500.0, 300.0, 400.0, 0.0, 0.0, 0.0, -9.0, -3.0, 1.0, 0.0)),
    "nearly fixed": circular_member((4.0, 3.0, 2.0, 0.5, 0.0, 0.0, 0.2, -0.3, 0.4, 1.5)),
    "narrow rotamers": circular_member((0.3, 0.2, -14.0, 0.3, 0.1, 0.0, 0.0, 0.1, 0.3, 0.0)),
    "free angle": Member(
        lambda _, z: uniform_angle(z)[0],
        lambda _, x: uniform_angle_noise(x),
        (),
        (0.0, math.pi),
    ),
}


@pytest.fixture(params=FAMILY)
def member(request) -> Member:
    return FAMILY[request.param]


def tensors(member: Member, n: int, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    noise = torch.linspace(-member.reach, member.reach, n, dtype=torch.float64)
    return torch.tensor(member.parameters, dtype=dtype), noise.to(dtype)


def test_round_trips_are_exact_and_monotone_also_in_the_tails(member):
    parameters, z = tensors(member, 401)
    x = member.forward(parameters, z)
    slope = x.diff().sign()
    assert (slope == slope[0]).all()
    assert slope[0] != 0
    torch.testing.assert_close(member.backward(parameters, x)[0], z, rtol=1e-8, atol=1e-8)
    low, high = member.domain
    inside = torch.linspace(low, high, 203, dtype=torch.float64)[1:-1]
    z, _ = member.backward(parameters, inside)
    inside, z = inside[z.abs() < member.reach], z[z.abs() < member.reach]
    torch.testing.assert_close(member.forward(parameters, z), inside, rtol=1e-8, atol=1e-8)


def test_density_is_the_base_density_over_the_slope_by_autograd_and_by_differences(member):
    parameters, z = tensors(member, 301)
    z = (0.8 * z + 0.0123).requires_grad_()
    x = member.forward(parameters, z)
    (slope,) = torch.autograd.grad(x.sum(), z)
    base = torch.full_like(z, -LOG_2PI) if member.circular else normal(z)
    _, log_p = member.backward(parameters, x.detach())
    torch.testing.assert_close(log_p, base - slope.abs().log(), rtol=0, atol=1e-7)
    h = 1e-6
    with torch.no_grad():
        different = (member.forward(parameters, z + h) - member.forward(parameters, z - h)) / (
            2 * h
        )
    torch.testing.assert_close(different, slope, rtol=2e-4, atol=1e-7)


def test_density_integrates_to_one_over_the_coordinate(member):
    parameters, _ = tensors(member, 3)
    low, high = member.domain
    nodes, weights = np.polynomial.legendre.leggauss(12)
    edges = np.linspace(low, high, 2001)
    x = (edges[:-1, None] + np.diff(edges)[:, None] * (nodes + 1) / 2).ravel()
    _, log_p = member.backward(parameters, torch.from_numpy(x))
    weights = (np.diff(edges)[:, None] * weights / 2).ravel()
    assert abs(log_p.exp().numpy() @ weights - 1.0) < 1e-6


def test_first_and_second_derivatives_are_right(member):
    parameters, z = tensors(member, 5)
    z = (0.2 * z + 0.1).requires_grad_()
    if member.parameters and max(map(abs, member.parameters)) < 10.0:
        inputs = (parameters.requires_grad_(), z)
    else:  # derivatives in saturated parameters vanish to rounding
        inputs = (parameters, z)

    def both(parameters, z):
        x = member.forward(parameters, z)
        return x, member.backward(parameters, x)[1]

    assert torch.autograd.gradcheck(both, inputs, eps=1e-6, atol=1e-5, rtol=1e-3)
    assert torch.autograd.gradgradcheck(both, inputs, eps=1e-6, atol=1e-4, rtol=1e-3)


def test_second_derivative_is_continuous(member):
    """Halving the spacing halves the largest jump of f'': there is no kink at any seam."""
    parameters, _ = tensors(member, 3)
    ends = torch.tensor([-3.0, 3.1], dtype=torch.float64)
    low, high = (2.0 * ends if member.circular else member.forward(parameters, ends)).tolist()

    def largest_jump(n):
        x = torch.linspace(low, high, n, dtype=torch.float64).requires_grad_()
        z, _ = member.backward(parameters, x)
        (first,) = torch.autograd.grad(z.sum(), x, create_graph=True)
        if not first.requires_grad:  # a linear map
            return 0.0, 0.0
        (second,) = torch.autograd.grad(first.sum(), x)
        return float(second.diff().abs().max()), float(second.abs().max())

    (coarse, size), (fine, _) = largest_jump(2001), largest_jump(4001)
    assert fine < 0.6 * coarse + 1e-9 * (1.0 + size)


def test_extreme_noise_is_finite_in_single_precision(member):
    parameters, z = tensors(member, 101, torch.float32)
    parameters, z = parameters.requires_grad_(), (1.7 * z).requires_grad_()
    x = member.forward(parameters, z)
    back, log_p = member.backward(parameters, x)
    inputs = (parameters, z) if member.parameters else (z,)
    first = torch.autograd.grad((x + back + log_p).sum(), inputs, create_graph=True)
    second = torch.autograd.grad(sum(g.sum() for g in first), inputs, allow_unused=True)
    for value in (x, back, log_p, *first, *(g for g in second if g is not None)):
        assert torch.isfinite(value).all()


# Chart


def test_chart_volume_is_the_jacobian_of_the_position():
    u = torch.tensor([1.3, 0.7, -2.0], dtype=torch.float64)

    def position(u):
        r, theta, phi = u
        sine = torch.sin(theta)
        parts = [torch.cos(theta), sine * torch.cos(phi), sine * torch.sin(phi)]
        return r * torch.stack(parts)

    exact = torch.linalg.slogdet(torch.autograd.functional.jacobian(position, u)).logabsdet
    flags = torch.tensor([False, True])
    chart = Chart(torch.zeros(2, 3).double(), torch.ones(2, 3).double(), flags)
    volume = chart.log_volume(u[0].expand(2), u[1].expand(2))
    torch.testing.assert_close(volume, torch.stack([exact, 0 * exact]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("angle", [0.0, math.pi, -0.3])
def test_degenerate_coordinates_give_no_nan_in_either_branch(dtype, angle):
    chart = Chart(
        torch.zeros(2, 3, dtype=dtype), torch.ones(2, 3, dtype=dtype), torch.tensor([False, True])
    )
    u = torch.tensor([[0.0, angle, math.pi], [0.0, angle, -5.0]], dtype=dtype, requires_grad=True)
    y = chart.standardise(*u.unbind(-1))
    terms = [y, chart.log_derivatives(*u.unbind(-1)), chart.log_volume(u[:, 0], u[:, 1])]
    total = sum(t.sum() for t in terms)
    (first,) = torch.autograd.grad(total, u, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), u)
    for value in (*terms, first, second):
        assert torch.isfinite(value).all()
    torch.testing.assert_close(y[1], u[1])
    far = torch.full((2, 3), 500.0, dtype=dtype, requires_grad=True)
    (slope,) = torch.autograd.grad(chart.coordinates(far)[1].sum(), far)
    assert torch.isfinite(slope).all()


# Affine


def test_affine_is_the_identity_at_zero_and_counts_its_parameters():
    assert N_ROTOR <= N_PARAMETERS
    z = torch.randn(7, 3, generator=torch.Generator().manual_seed(0)).double()
    y, log_p = Affine(torch.zeros(N_PARAMETERS).double()).coordinates(z)
    torch.testing.assert_close(y, z, rtol=0, atol=1e-14)
    torch.testing.assert_close(log_p, normal(z), rtol=0, atol=1e-14)


def test_affine_log_density_is_the_triangular_jacobian():
    generator = torch.Generator().manual_seed(1)
    parameters = torch.randn(N_PARAMETERS, generator=generator).double()
    z = torch.randn(3, generator=generator).double()
    affine = Affine(parameters)
    y, log_p = affine.coordinates(z)
    jacobian = torch.autograd.functional.jacobian(lambda z: affine.coordinates(z)[0], z)
    torch.testing.assert_close(log_p.sum(), normal(z).sum() - jacobian.det().abs().log())
    torch.testing.assert_close(affine.noise(y)[0], z)
    torch.testing.assert_close(affine.noise(y)[1], log_p)


# Base


MASKS = (
    np.array([[1, 1, 1], [1, 1, 0], [0, 0, 0]], bool),
    np.array([[0, 0, 0], [0, 0, 1], [0] * 3], bool),
)


def test_base_log_ratio_is_that_of_the_mixture_and_survives_many_dimensions():
    normal_noise, circular = MASKS
    base = Base(0.1, 1.5)
    noise = base.sample(np.random.default_rng(0), (6,), normal_noise, circular, normal_noise)
    z = noise.numpy()[:, normal_noise]
    narrow = scipy.stats.norm.logpdf(z).sum(-1)
    wide = scipy.stats.norm.logpdf(z, scale=1.5).sum(-1)
    exact = np.log(0.9 * np.exp(narrow) + 0.1 * np.exp(wide)) - narrow
    ratio = base.log_ratio(noise, torch.from_numpy(normal_noise))
    np.testing.assert_allclose(ratio.numpy(), exact, atol=1e-12)
    many = torch.stack([torch.zeros(5000, 3), 3.0 * torch.ones(5000, 3)]).requires_grad_()
    ratio = base.log_ratio(many, torch.ones(5000, 3, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(ratio.sum(), many)
    assert torch.isfinite(ratio).all()
    assert torch.isfinite(gradient).all()
    assert (Base().log_ratio(many, torch.ones(5000, 3, dtype=torch.bool)) == 0).all()


def test_base_keeps_the_random_stream_and_mixes_whole_frames():
    normal_noise, circular = MASKS
    noise = (
        Base().sample(np.random.default_rng(5), (4,), normal_noise, circular, normal_noise).numpy()
    )
    rng = np.random.default_rng(5)
    exact = rng.standard_normal((4, 3, 3))
    exact[:, 1, 2] = rng.uniform(-np.pi, np.pi, (4, 1))[:, 0]
    exact[:, 2] = 0.0
    np.testing.assert_array_equal(noise, exact)
    wide = (
        Base(0.3, 2.0)
        .sample(np.random.default_rng(5), (20000,), normal_noise, circular, normal_noise)
        .numpy()
    )
    plain = (
        Base()
        .sample(np.random.default_rng(5), (20000,), normal_noise, circular, normal_noise)
        .numpy()
    )
    factor = wide[:, normal_noise] / plain[:, normal_noise]
    assert (np.ptp(factor, axis=1) < 1e-12).all()
    assert abs((factor[:, 0] > 1.5).mean() - 0.3) < 0.015
    np.testing.assert_array_equal(wide[:, 1, 2], plain[:, 1, 2])


@pytest.mark.parametrize(("weight", "sigma"), [(1.0, 1.5), (-0.1, 1.5), (0.1, 0.5)])
def test_impossible_wide_components_are_refused(weight, sigma):
    with pytest.raises(ValueError, match="0 <= weight < 1"):
        Base(weight, sigma)


# Expressive power: fits that minimise the exact divergence on a grid.


def fitted_divergence(log_q, n_parameters: int, log_p: Tensor, width: float) -> float:
    raw = torch.zeros(n_parameters, dtype=torch.float64, requires_grad=True)
    p = log_p.exp()
    optimiser = torch.optim.LBFGS([raw], max_iter=400, line_search_fn="strong_wolfe")

    def loss():
        optimiser.zero_grad()
        divergence = (p * (log_p - log_q(raw))).sum() * width
        divergence.backward()
        return divergence

    optimiser.step(loss)
    return float(loss().detach())


def test_three_narrow_rotamers_are_representable():
    phi = torch.arange(720).double() * (TWO_PI / 720) - math.pi
    peaks = [(0.6, -65.0), (0.3, 180.0), (0.1, 62.0)]
    kappa = 1.0 / math.radians(8.0) ** 2
    p = sum(w * torch.exp(kappa * (torch.cos(phi - math.radians(c)) - 1.0)) for w, c in peaks)
    log_p = torch.log(p / (p.mean() * TWO_PI))
    divergence = fitted_divergence(
        lambda raw: CircularDensity(raw).log_density(phi) - LOG_2PI, N_ROTOR, log_p, TWO_PI / 720
    )
    assert divergence < 0.02


def test_a_peak_of_one_degree_is_representable():
    # Peaks of a Fourier series alone would be five times as wide: 1.2 nats.
    phi = torch.arange(7200).double() * (TWO_PI / 7200) - math.pi
    log_p = (torch.cos(phi - 0.4) - 1.0) / math.radians(1.0) ** 2
    log_p = log_p - torch.logsumexp(log_p, 0) - math.log(TWO_PI / 7200)
    divergence = fitted_divergence(
        lambda raw: CircularDensity(raw).log_density(phi) - LOG_2PI, N_ROTOR, log_p, TWO_PI / 7200
    )
    assert divergence < 0.01


@pytest.mark.parametrize("shape", ["morse", "gamma"])
def test_sinh_arcsinh_bends_to_skewed_bond_lengths(shape):
    if shape == "morse":  # a C-H bond at 300 K: 4.5 eV deep, 1.9 per Å
        r = torch.linspace(-0.25, 0.45, 4000).double()
        log_p = -4.5 / 0.025852 * (1.0 - torch.exp(-1.9 * r)).square()
    else:  # skew 0.5
        r = torch.linspace(1e-3, 60.0, 4000).double()
        log_p = 15.0 * torch.log(r) - r
    width = float(r[1] - r[0])
    log_p = log_p - torch.logsumexp(log_p, 0) - math.log(width)
    p = log_p.exp() * width
    sd = torch.sqrt((p * (r - (p * r).sum()).square()).sum())
    y = torch.stack([(r - (p * r).sum()) / sd] + [torch.zeros(4000).double()] * 2, -1)
    log_p, width = log_p + sd.log(), width / float(sd)

    def log_q(raw):  # shift, log-scale, skew and tail of the first coordinate
        index = torch.tensor([0, 3, 9, 12])[: len(raw)]
        full = torch.zeros(N_PARAMETERS, dtype=torch.float64).index_put((index,), raw)
        return Affine(full).noise(y)[1][:, 0]

    plain, bent = (fitted_divergence(log_q, n, log_p, width) for n in (2, 4))
    assert plain > 1e-4
    assert bent < plain / 5.0
