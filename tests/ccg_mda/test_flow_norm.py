"""Backmapper: its density integrates to one over the fibre, by quadrature in small cases.

The measure is that of ``∫ δ(Mx - s) dx``; every case below derives it by hand, in coordinates of
its own. Densities that don't depend on an orientation are integrated over one of it, times 4π for
a direction, 8π² for a rotation and 2π for a turn about an axis.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from systems import TEMPERATURE_K, randomised

from ccg_ase import CGMap, Topology
from ccg_ase.torsion_map import TorsionMap
from ccg_mda import Backmapper

TWO_PI = 2 * math.pi
CHAIN = np.array([[0.0, 0.0, 0.0], [1.1, 0.0, 0.0], [1.5, 1.2, 0.0], [2.6, 1.3, 0.8]])


def chain(n: int) -> Topology:
    return Topology(
        names="ABCD"[:n],
        elements=["O", "S", "O", "N"][:n],
        masses=[16.0, 32.0, 17.0, 14.0][:n],
        bonds=[(k, k + 1) for k in range(n - 1)],
    )


def flow_for(the_map: CGMap | TorsionMap, defensive: float = 0.0) -> Backmapper:
    """Return a random flow from frames that move by 0.1 Å: wide enough for coarse grids."""
    jitter = np.random.default_rng(0).normal(size=(200, the_map.n_atoms, 3))
    frames = torch.from_numpy(CHAIN[: the_map.n_atoms] + 0.08 * jitter)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        flow = Backmapper.from_data(
            the_map, TEMPERATURE_K, frames, width=8, channels=2, defensive=defensive
        )
    return randomised(flow, size=0.03)


def grid(*ranges: tuple[float, float, int]) -> tuple[list[torch.Tensor], float]:
    """Return flat coordinates of a product grid, and the volume of its cells."""
    axes = [torch.linspace(low, high, n, dtype=torch.float64) for low, high, n in ranges]
    cell = math.prod((axis[1] - axis[0]).item() for axis in axes)
    return [values.flatten() for values in torch.meshgrid(*axes, indexing="ij")], cell


def polar(r: torch.Tensor, theta: torch.Tensor, phi: torch.Tensor | float = 0.0) -> torch.Tensor:
    """Return vectors from the z axis, (..., 3)."""
    phi = torch.as_tensor(phi, dtype=r.dtype)
    across = torch.sin(theta) * torch.stack(
        [torch.cos(phi).expand_as(r), torch.sin(phi).expand_as(r)]
    )
    return (r * torch.stack([*across, torch.cos(theta)])).movedim(0, -1)


def density(flow: Backmapper, s: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return torch.cat([flow(s).log_prob(part) for part in positions.split(20_000)]).exp()


def test_one_slice_of_a_diatomic():
    """``dμ = 4π r² dr``: the other atom, in spherical coordinates."""
    flow = flow_for(CGMap.from_slices(chain(2), [0]))
    (r,), cell = grid((0.5, 2.0, 200))
    positions = torch.stack([torch.zeros(200, 3), polar(r, torch.full_like(r, 0.7))], -2).double()
    total = (density(flow, torch.zeros(1, 3).double(), positions) * 4 * math.pi * r**2).sum() * cell
    assert total.item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(("weighting", "defensive"), [("mass", 0.0), ("geometry", 0.1)])
def test_centre_of_a_triatomic(weighting, defensive):
    """With a = x₁ - x₀, b = x₂ - x₀: s = x₀ + w₁ a + w₂ b, hence dx = ds da db, dμ = da db.

    Of the six angles of a and b all but the one between them are a rotation, 8π².
    """
    the_map = CGMap.from_groups(chain(3), [range(3)], weighting=weighting)
    flow = flow_for(the_map, defensive)
    wide = 0.3 if defensive else 0.0
    (r, u, v), cell = grid(
        (0.65 - wide, 1.8 + wide, 44), (0.8 - wide, 1.9 + wide, 44), (1.2 - wide, 2.7 + wide, 44)
    )
    # From the middle atom B: both bonds, and the angle that they make.
    a, c = polar(r, torch.zeros_like(r)), polar(u, v)
    middle = torch.zeros_like(a)
    positions = torch.stack([a, middle, c], -2)
    s = the_map.apply(positions)
    positions = positions - s
    volume = 8 * math.pi**2 * (r * u) ** 2 * torch.sin(v)
    total = (density(flow, torch.zeros(1, 3).double(), positions) * volume).sum() * cell
    assert total.item() == pytest.approx(1.0, abs=2e-5)


@pytest.mark.parametrize("slices", [(0, 1), (0, 2)])
def test_two_slices_of_a_triatomic(slices):
    """``dμ = 2π r² sin θ dr dθ`` around the one atom that the beads leave, about their axis."""
    the_map = CGMap.from_slices(chain(3), slices)
    flow = flow_for(the_map)
    beads = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 1.2 if slices == (0, 1) else 1.8]]).double()
    (r, theta), cell = grid((0.4, 3.5, 200), (0.0, math.pi, 200))
    positions = torch.zeros(len(r), 3, 3).double()
    positions[:, list(slices)] = beads
    positions[:, ({0, 1, 2} - set(slices)).pop()] = polar(r, theta, 0.4)
    volume = TWO_PI * r**2 * torch.sin(theta)
    total = (density(flow, beads, positions) * volume).sum() * cell
    assert total.item() == pytest.approx(1.0, abs=1e-4)


def test_two_beads_that_share_an_atom():
    """With d = x₁ - x₀: x₀ = s₀ - d/2, x₁ = s₀ + d/2, x₂ = (s₁ - 0.3 x₁) / 0.7.

    ``∫ δ(s₀ - (x₀ + x₁)/2) δ(s₁ - 0.3 x₁ - 0.7 x₂) dx = ∫ dd / 0.7³``.
    """
    matrix = [[0.5, 0.5, 0.0], [0.0, 0.3, 0.7]]
    the_map = CGMap.from_matrix(chain(3), matrix)
    flow = flow_for(the_map)
    s = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 1.28]]).double()
    (r, theta), cell = grid((0.3, 2.5, 160), (0.0, math.pi, 160))
    d = polar(r, theta, 1.0)
    last = (s[1] - 0.15 * d) / 0.7
    positions = torch.stack([-0.5 * d, 0.5 * d, last], -2)
    volume = TWO_PI * r**2 * torch.sin(theta) / 0.7**3
    total = (density(flow, s, positions) * volume).sum() * cell
    assert total.item() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize(("rotor", "defensive"), [(True, 0.0), (False, 0.1)])
def test_three_slices_and_one_atom(rotor, defensive):
    """``dμ = r² sin θ dr dθ dφ`` around the last bead, where the density is far from uniform."""
    the_map = CGMap.from_slices(chain(4), [0, 1, 2])
    with torch.random.fork_rng():
        torch.manual_seed(1)
        flow = Backmapper(
            the_map, TEMPERATURE_K, rotor=[rotor], width=8, channels=2, defensive=defensive
        )
    flow.coordinates.scale[:] = torch.tensor([0.1, 0.2, 0.3])
    flow.coordinates.location[:] = torch.tensor([0.3, 0.4, 1.0])
    randomised(flow, size=0.05)
    beads = torch.from_numpy(CHAIN[:3])
    axis, third = beads[1] - beads[2], beads[0] - beads[2]
    e1 = torch.nn.functional.normalize(axis, dim=0)
    e3 = torch.nn.functional.normalize(torch.linalg.cross(e1, third), dim=0)
    frame = torch.stack([e3, torch.linalg.cross(e1, e3), e1])
    # In ln r and ln tan θ/2, where sums converge fastest, and φ on a periodic grid.
    n_phi = 72
    (u, v, phi), cell = grid(
        (-0.9, 1.5, 45), (-2.0, 2.8, 45), (0.0, TWO_PI * (1 - 1 / n_phi), n_phi)
    )
    r, theta = u.exp(), 2 * v.exp().atan()
    atom = beads[2] + polar(r, theta, phi) @ frame
    positions = torch.cat([beads.expand(len(atom), 3, 3), atom[:, None]], 1)
    total = (density(flow, beads, positions) * r**3 * torch.sin(theta) ** 2).sum() * cell
    assert total.item() == pytest.approx(1.0, abs=1e-5)


def test_one_torsion_of_a_chain():
    """``dμ = r₁² r₂² r₃² sin θ₁ sin θ₂ dr dθ``: bonds and angles at the given torsion.

    The volume of all atoms is that of translations, rotations (8π²), the torsion, and this.
    """
    the_map = TorsionMap(chain(4), [[0, 1, 2, 3]])
    flow = flow_for(the_map)
    tau, n = 0.9, 10
    x = torch.from_numpy(CHAIN)
    bonds = (x[1:] - x[:-1]).norm(dim=-1)
    ranges = [(b - 0.55, b + 0.55, n) for b in bonds.tolist()] + [
        (1.1, 2.9, n + 2),
        (1.1, 2.9, n + 2),
    ]
    (r1, r2, r3, t1, t2), cell = grid(*ranges)
    zero = torch.zeros_like(r1)
    b = torch.stack([zero, zero, zero], -1)
    c = torch.stack([zero, zero, r2], -1)
    a = polar(r1, t1)
    d = c + polar(r3, t2, tau) * torch.tensor([1.0, 1.0, -1.0]).double()
    positions = torch.stack([a, b, c, d], -2)
    given = the_map.apply(positions[:1])[0]
    assert abs(abs(given.item()) - tau) < 1e-12
    volume = (r1 * r2 * r3) ** 2 * torch.sin(t1) * torch.sin(t2)
    total = (density(flow, given, positions) * volume).sum() * cell
    assert total.item() == pytest.approx(1.0, abs=5e-3)
