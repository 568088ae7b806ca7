"""Backmapper: the seven promises of an exact, smooth, equivariant conditional density."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from ccg_ase import CGMap, Topology, load_model, save_model
from ccg_mda import Backmapper

TEMPERATURE_K = 300.0


def randomised(flow: Backmapper, seed: int = 0, size: float = 0.02) -> Backmapper:
    """Give every parameter a random part: fresh ones would leave the conditioner unused."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in flow.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += size * noise.to(parameter)
    return flow


@pytest.fixture(scope="module")
def frames(ala2_map, ala2_positions, ala2_beads) -> torch.Tensor:
    """Return all-atom frames whose rotors rotate, made by a flow from one structure."""
    rng = np.random.default_rng(5)
    stretched = ala2_positions + rng.normal(scale=0.02, size=(200, 22, 3))
    seed = Backmapper.from_data(
        ala2_map, TEMPERATURE_K, torch.from_numpy(stretched), width=8, hops=3
    )
    rotor = (seed.multiplicity == 3).tolist()
    free = Backmapper(ala2_map, TEMPERATURE_K, rotor=rotor, width=8, hops=3)
    free.location.copy_(seed.location)
    free.scale.copy_(seed.scale)
    beads = torch.from_numpy(ala2_beads)
    return free(beads).rsample(rng=rng).detach()


@pytest.fixture(scope="module")
def flow(ala2_map, frames) -> Backmapper:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Backmapper.from_data(ala2_map, TEMPERATURE_K, frames, width=16, hops=3)
    assert sum(model.config["rotor"]) == 3
    return randomised(model).requires_grad_(False)


@pytest.fixture(scope="module")
def beads(ala2_beads) -> torch.Tensor:
    return torch.from_numpy(ala2_beads[:6])


@pytest.fixture(scope="module")
def noise(flow) -> torch.Tensor:
    return flow.sample_noise(np.random.default_rng(3), (4, 6))


def test_samples_map_onto_their_beads(flow, beads, noise):
    positions = flow(beads).positions_from(noise)
    assert positions.shape == (4, 6, 22, 3)
    torch.testing.assert_close(
        flow.cg_map.apply(positions), beads.expand(4, -1, -1, -1), rtol=0, atol=1e-10
    )


def test_noise_and_positions_are_inverse(flow, beads, noise, frames):
    distribution = flow(beads)
    positions, log_prob = distribution.positions_and_log_prob_from(noise)
    back, log_prob_back = distribution.noise_and_log_prob_from(positions)
    torch.testing.assert_close(back, noise, rtol=0, atol=1e-9)
    torch.testing.assert_close(log_prob_back, log_prob, rtol=0, atol=1e-9)
    stored = flow(flow.cg_map.apply(frames))
    torch.testing.assert_close(
        stored.positions_from(stored.noise_from(frames)), frames, rtol=0, atol=1e-10
    )


def test_log_prob_is_base_density_over_autograd_jacobian(flow, beads, noise):
    one = noise[0, 0]
    distribution = flow(beads[0])
    placed = flow.atom_of_slot

    def placed_atoms(one: torch.Tensor) -> torch.Tensor:
        return distribution.positions_from(one)[placed].flatten()

    jacobian = torch.autograd.functional.jacobian(placed_atoms, one)
    circular = flow.rotor_dof.flatten()
    base = -0.5 * (one[~circular] ** 2 + math.log(2 * math.pi))
    base = base.sum() - int(circular.sum()) * math.log(2 * math.pi)
    expected = base - torch.linalg.slogdet(jacobian).logabsdet
    log_prob = distribution.log_prob(distribution.positions_from(one))
    torch.testing.assert_close(log_prob, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("rotor", [False, True])
def test_density_integrates_to_one(rotor):
    """Quadrature of q(x|s) over the one atom that three beads leave free."""
    chain = Topology(
        names=("A", "B", "C", "X"),
        elements=("C", "C", "C", "O"),
        masses=[12.0, 12.0, 12.0, 16.0],
        resnames=("MOL",) * 4,
        resids=[1] * 4,
        segids=("A",) * 4,
        bonds=[(0, 1), (1, 2), (2, 3)],
    )
    cg_map = CGMap.from_slices(chain, [0, 1, 2])
    with torch.random.fork_rng():
        torch.manual_seed(1)
        flow = Backmapper(cg_map, TEMPERATURE_K, rotor=[rotor], width=8, hops=3)
    flow.scale[:] = torch.tensor([0.1, 0.2, 0.3])
    flow.location[:] = torch.tensor([0.3, 0.4, 1.0])
    randomised(flow, size=0.05).requires_grad_(False)
    beads = torch.tensor([[0.0, 0.0, 0.0], [1.5, 0.0, 0.0], [2.0, 1.4, 0.1]]).double()
    # Spherical coordinates around the bond, in ln r and ln tan θ/2, where sums converge fastest.
    axis = torch.nn.functional.normalize(beads[1] - beads[2], dim=0)
    across = torch.nn.functional.normalize(torch.linalg.cross(axis, beads[0] - beads[2]), dim=0)
    u = torch.linspace(-0.7, 1.3, 61, dtype=torch.float64)
    v = torch.linspace(-1.6, 2.4, 61, dtype=torch.float64)
    phi = torch.arange(96).double() * (2 * math.pi / 96)
    u_, v_, phi_ = torch.meshgrid(u, v, phi, indexing="ij")
    r, theta = u_.exp(), 2 * v_.exp().atan()
    plane = torch.cos(phi_)[..., None] * torch.linalg.cross(across, axis)
    plane = plane + torch.sin(phi_)[..., None] * across
    atom = beads[2] + r[..., None] * (
        torch.cos(theta)[..., None] * axis + torch.sin(theta)[..., None] * plane
    )
    shape = r.shape
    x = torch.cat([beads.expand(*shape, 3, 3), atom[..., None, :]], dim=-2).flatten(0, 2)
    density = torch.cat([flow(beads).log_prob(part) for part in x.split(50_000)]).exp()
    volume = r**3 * torch.sin(theta) ** 2  # r² sin θ dr dθ = r² sin θ (r du) (sin θ dv)
    cell = (u[1] - u[0]) * (v[1] - v[0]) * (2 * math.pi / 96)
    total = (density.view(shape) * volume).sum() * cell
    assert total.item() == pytest.approx(1.0, abs=1e-6)


def test_rotation_and_translation_carry_samples_along(flow, beads, noise):
    rotation = torch.from_numpy(Rotation.from_rotvec([0.4, -1.1, 2.0]).as_matrix())
    shift = torch.tensor([3.0, -7.0, 11.0]).double()
    positions, log_prob = flow(beads).positions_and_log_prob_from(noise)
    moved, moved_log_prob = flow(beads @ rotation.T + shift).positions_and_log_prob_from(noise)
    torch.testing.assert_close(moved, positions @ rotation.T + shift, rtol=0, atol=1e-9)
    torch.testing.assert_close(moved_log_prob, log_prob, rtol=0, atol=1e-8)


def test_mirror_images_differ(flow, beads, noise):
    mirror = torch.tensor([1.0, 1.0, -1.0]).double()
    positions = flow(beads).positions_from(noise[0])
    log_prob = flow(beads).log_prob(positions)
    mirrored = flow(beads * mirror).log_prob(positions * mirror)
    assert ((log_prob - mirrored).abs() > 10).all()


def test_positions_at_fixed_noise_are_smooth_in_the_beads(flow, beads, noise):
    weights = torch.randn(22, 3, generator=torch.Generator().manual_seed(1)).double()

    def probe(s: torch.Tensor) -> torch.Tensor:
        positions, log_prob = flow(s).positions_and_log_prob_from(noise[0, 0])
        return (weights * positions).sum() + log_prob

    s = beads[0].clone().requires_grad_()
    assert torch.autograd.gradcheck(probe, (s,), fast_mode=True, atol=1e-5)
    assert torch.autograd.gradgradcheck(probe, (s,), fast_mode=True, atol=1e-4)
    # Continuity of the second derivative along a line: halving the step halves its change.
    direction = torch.randn(5, 3, generator=torch.Generator().manual_seed(2)).double()

    def curvature(t: float) -> torch.Tensor:
        point = (beads[0] + t * direction).requires_grad_()
        (first,) = torch.autograd.grad(probe(point), point, create_graph=True)
        (second,) = torch.autograd.grad((first * direction).sum(), point)
        return (second * direction).sum()

    steps = [abs(curvature(h) - curvature(0.0)).item() for h in (1e-3, 1e-4, 1e-5)]
    assert steps[1] < 0.3 * steps[0]
    assert steps[2] < 0.3 * steps[1]


def test_model_file_round_trip(flow, beads, noise, tmp_path):
    path = tmp_path / "model.ccg"
    save_model(path, cg_map=flow.cg_map, temperature_K=TEMPERATURE_K, parts={"backmapper": flow})
    loaded = Backmapper.load(path)
    assert torch.equal(loaded(beads).positions_from(noise), flow(beads).positions_from(noise))
    save_model(path, cg_map=flow.cg_map, temperature_K=TEMPERATURE_K, parts={})
    with pytest.raises(ValueError, match="backmapper"):
        Backmapper.from_model(load_model(path))


def test_noise_has_the_stated_base_distribution(flow):
    noise = flow.sample_noise(np.random.default_rng(0), (20_000,)).view(-1, 17, 3)
    circular = flow.rotor_dof
    assert noise[:, ~circular].var().item() == pytest.approx(1.0, abs=0.01)
    assert noise[:, circular].var().item() == pytest.approx(math.pi**2 / 3, rel=0.02)
    assert noise[:, circular].abs().max() <= math.pi


def test_bad_input_is_refused_with_cause_and_cure(flow, beads, frames, ala2_map):
    with pytest.raises(ValueError, match="another mapping"):
        flow(beads[:, :4])
    with pytest.raises(ValueError, match="trained at 300 K"):
        flow(beads, temperature_K=310.0)
    with pytest.raises(ValueError, match="NaN"):
        flow(beads * math.nan)
    with pytest.raises(ValueError, match="other beads"):
        flow(beads).log_prob(frames[6:12])
    rigid = frames[:1].repeat(50, 1, 1)
    with pytest.raises(ValueError, match="without constraints"):
        Backmapper.from_data(ala2_map, TEMPERATURE_K, rigid)
