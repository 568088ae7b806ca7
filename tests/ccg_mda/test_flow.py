"""Backmapper: the seven promises of an exact, smooth, equivariant density, for every map."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from systems import DIPEPTIDE, OTHERS, flow_of, system

from ccg_mda import Backmapper

EVERY = DIPEPTIDE + OTHERS
RIGID = ("rigid waters", "rigid benzene")
TORSIONS = ("torsions", "nitrile torsion")
BEADS = tuple(kind for kind in EVERY if kind not in TORSIONS)
ORIENTED = ("slices", "heavy", "mass", "geometry", "residues", "loose atoms", "mixed",
            "shared atoms", "benzene by three", "two dipeptides")  # fmt: skip
TUMBLING = ("molecule", "one slice", "waters", "rigid waters", "rigid benzene", "CO2", "butyne",
            "acetonitrile", "methanols")  # fmt: skip
CHIRAL = (*DIPEPTIDE, "two dipeptides")
ALIKE = {"two dipeptides": 22, "waters": 3, "rigid waters": 3, "methanols": 6}
TWO_PI = 2 * math.pi
ROTATION = torch.from_numpy(Rotation.from_rotvec([0.4, -1.1, 2.0]).as_matrix())


def noise_of(kind: str, *shape: int, seed: int = 3) -> torch.Tensor:
    return flow_of(kind).sample_noise(np.random.default_rng(seed), shape)


def log_base(flow: Backmapper, noise: torch.Tensor) -> torch.Tensor:
    """Return the log-density of noise (n_dof,), as it is documented."""
    circular = flow.rotor_dof[flow.active]
    normal, a = noise[~circular], flow.base.weight
    narrow, wide = (
        -0.5 * (normal / sigma).square().sum() - len(normal) * math.log(sigma * math.sqrt(TWO_PI))
        for sigma in (1.0, 1.5)
    )
    return ((1 - a) * narrow.exp() + a * wide.exp()).log() - int(circular.sum()) * math.log(TWO_PI)


def columns_of_noise(flow: Backmapper, s: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Return dx/dz, (3 n_atoms, n_dof), at one s: every row is the gradient of a copy's row."""
    n = 3 * flow.cg_map.n_atoms
    copies = noise.expand(n, -1).clone().requires_grad_()
    positions = flow(s.expand(n, *s.shape)).positions_from(copies)
    return torch.autograd.grad(positions.flatten(1).diagonal().sum(), copies)[0]


def columns_of_held(flow: Backmapper, s: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Return dx/dh of rigid coordinates h, (3 n_atoms, n_held), by central differences."""
    values = flow.coordinates.held
    rigid = torch.tensor(flow.config["rigid"]) & ~flow.active
    columns = []
    for slot, k in torch.nonzero(rigid).tolist():
        kept, ends = values[slot, k].clone(), []
        for step in (1e-5, -1e-5):
            values[slot, k] = kept + step
            ends.append(flow(s).positions_from(noise).flatten())
        values[slot, k] = kept
        columns.append((ends[0] - ends[1]) / 2e-5)
    return torch.stack(columns, 1)


@pytest.mark.parametrize("kind", EVERY)
def test_samples_map_onto_s_and_have_their_noise(kind):
    flow, s = flow_of(kind), system(kind).coarse
    noise = noise_of(kind, 2, 3)
    positions, log_prob = flow(s).positions_and_log_prob_from(noise)
    assert positions.shape == (2, 3, flow.cg_map.n_atoms, 3)
    error = flow.cg_map.difference(flow.cg_map.apply(positions), s.expand(2, *s.shape))
    assert error.abs().max() < 1e-10
    back, log_prob_back = flow(s).noise_and_log_prob_from(positions)
    torch.testing.assert_close(back, noise, rtol=0, atol=1e-9)
    torch.testing.assert_close(log_prob_back, log_prob, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", BEADS)
def test_frames_are_the_positions_of_their_noise(kind):
    flow, frames = flow_of(kind), system(kind).frames[:3]
    distribution = flow(system(kind).coarse)
    positions = distribution.positions_from(distribution.noise_from(frames))
    torch.testing.assert_close(positions, frames, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", TORSIONS)
def test_torsion_samples_are_frames_up_to_a_rigid_motion(kind):
    flow, frames = flow_of(kind), system(kind).frames[:3]
    distribution = flow(system(kind).coarse)
    positions = distribution.positions_from(distribution.noise_from(frames))
    torch.testing.assert_close(
        torch.cdist(positions, positions), torch.cdist(frames, frames), rtol=0, atol=1e-9
    )
    moved = distribution.log_prob(frames @ ROTATION.T + 3.0)
    torch.testing.assert_close(moved, distribution.log_prob(frames), rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("kind", "defensive"), [*((kind, 0.0) for kind in EVERY), ("mass", 0.1), ("torsions", 0.1)]
)
def test_density_is_base_density_over_the_determinant_on_the_fibre(kind, defensive):
    r"""Compare ln q with autograd: ``q = p(z) / |det [dx/dz, C⁺, dx/dh, G]|``.

    The measure μ on the fibre is that of ``F(s) = -kT ln ∫ δ(Mx - s) exp(-U/kT) dx``, hence
    ``ds dμ = dx``. Let (z, s) -> x be the parametrisation. Then ``dx = |det [dx/dz, dx/ds]| dz ds``
    and ``q dμ = p dz`` give ``q = p / |det [dx/dz, dx/ds]|``. From M x(z, s) = s follow
    ``M dx/ds = 1`` and ``M dx/dz = 0``: dx/ds differs from any right inverse of M, such as the
    pseudoinverse, only by columns of dx/dz, which leave the determinant alone. The weights of M
    need no attention. For torsions, C is their Jacobian, and the columns G are the six rigid
    motions, unit translations and rotations ``ω × x``: dx = dt dω ds dμ, left out of q. Rigid
    coordinates h have columns of their own, dx = ds dh dμ: they are numbers.
    """
    flow, s, noise = flow_of(kind, defensive), system(kind).coarse[1], noise_of(kind, seed=4)
    x, log_prob = flow(s).positions_and_log_prob_from(noise)

    def coarse(flat: torch.Tensor) -> torch.Tensor:
        return flow.cg_map.apply(flat.view(-1, 3)).flatten()

    constraints = torch.autograd.functional.jacobian(coarse, x.flatten())
    columns = [columns_of_noise(flow, s, noise), torch.linalg.pinv(constraints)]
    if kind in RIGID:
        columns.append(columns_of_held(flow, s, noise))
    if kind in TORSIONS:
        for axis in torch.eye(3).double():
            columns += [axis.repeat(len(x))[:, None]]
            columns += [torch.linalg.cross(axis.expand_as(x), x).reshape(-1, 1)]
    matrix = torch.cat(columns, 1)
    assert matrix.shape[0] == matrix.shape[1]
    expected = log_base(flow, noise) - torch.linalg.slogdet(matrix).logabsdet
    torch.testing.assert_close(log_prob, expected, rtol=0, atol=1e-8)


def test_rigid_water_has_the_density_of_its_rotations():
    """Bonds and angle are numbers: q is that of the rotation over r₁² r₂² sin θ."""
    flow, s = flow_of("rigid waters"), system("rigid waters").coarse
    assert flow.n_dof == 12
    x, log_prob = flow(s).positions_and_log_prob_from(noise_of("rigid waters", 5, 3))
    x = x.unflatten(-2, (4, 3))
    bonds = x[..., 1:, :] - x[..., :1, :]
    r = bonds.norm(dim=-1)
    torch.testing.assert_close(r, torch.full_like(r, 0.9690), rtol=0, atol=1e-3)
    sine = torch.linalg.cross(*bonds.unbind(-2)).norm(dim=-1) / r.prod(-1)
    rotations = math.log(8 * math.pi**2) + 2 * r.log().sum(-1) + sine.log()
    torch.testing.assert_close(log_prob, -rotations.sum(-1), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", BEADS)
def test_translation_carries_samples_along(kind):
    flow, s, shift = flow_of(kind), system(kind).coarse, torch.tensor([3.0, -7.0, 11.0]).double()
    x, log_prob = flow(s).positions_and_log_prob_from(noise_of(kind, 3))
    moved, moved_log_prob = flow(s + shift).positions_and_log_prob_from(noise_of(kind, 3))
    torch.testing.assert_close(moved, x + shift, rtol=0, atol=1e-9)
    torch.testing.assert_close(moved_log_prob, log_prob, rtol=0, atol=1e-8)


@pytest.mark.parametrize("kind", BEADS)
@pytest.mark.parametrize("defensive", [0.0, 0.1])
def test_rotation_of_beads_and_atoms_leaves_the_density(kind, defensive):
    flow, s = flow_of(kind, defensive), system(kind).coarse
    x, log_prob = flow(s).positions_and_log_prob_from(noise_of(kind, 3))
    turned = flow(s @ ROTATION.T).log_prob(x @ ROTATION.T)
    torch.testing.assert_close(turned, log_prob, rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", ORIENTED)
def test_rotation_carries_samples_along(kind):
    flow, s, noise = flow_of(kind), system(kind).coarse, noise_of(kind, 3)
    positions = flow(s).positions_from(noise)
    turned = flow(s @ ROTATION.T).positions_from(noise)
    torch.testing.assert_close(turned, positions @ ROTATION.T, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", TUMBLING)
def test_free_orientations_are_isotropic(kind):
    flow, n = flow_of(kind), 3000
    x = flow(system(kind).coarse[0]).rsample((n,), np.random.default_rng(8))
    i, j = flow.cg_map.atoms.bonds[0]
    k = next(a for a in (*range(j), *range(j + 1, x.shape[1])) if a != i)
    across = torch.linalg.cross(x[:, j] - x[:, i], x[:, k] - x[:, i])
    for vector in (x[:, j] - x[:, i], across):
        unit = torch.nn.functional.normalize(vector, dim=-1)
        torch.testing.assert_close(unit.mean(0), torch.zeros(3).double(), rtol=0, atol=4.5 / n**0.5)
        second = unit.T @ unit / n
        torch.testing.assert_close(second, torch.eye(3).double() / 3, rtol=0, atol=4.5 / n**0.5)


def test_orientation_about_two_beads_is_uniform():
    flow, n = flow_of("two slices"), 3000
    s = system("two slices").coarse[0]
    x = flow(s).rsample((n,), np.random.default_rng(8))
    arm = torch.linalg.cross((s[1] - s[0]).expand(n, 3), x[:, 6] - s[0])
    unit = torch.nn.functional.normalize(arm, dim=-1)
    axis = torch.nn.functional.normalize(s[1] - s[0], dim=0)
    plane = 0.5 * (torch.eye(3).double() - axis[:, None] * axis)
    assert unit.mean(0).norm() < 4 / n**0.5
    torch.testing.assert_close(unit.T @ unit / n, plane, rtol=0, atol=4 / n**0.5)


@pytest.mark.parametrize("kind", CHIRAL)
def test_mirror_images_differ(kind):
    flow, frames = flow_of(kind), system(kind).frames[:3]
    mirrored = frames * torch.tensor([1.0, 1.0, -1.0]).double()
    there, here = (flow(flow.cg_map.apply(x)).log_prob(x) for x in (mirrored, frames))
    assert ((there - here).abs() > 10).all()


@pytest.mark.parametrize("kind", ALIKE)
def test_permuting_identical_molecules_permutes_the_result(kind):
    flow, s, size = flow_of(kind), system(kind).coarse, ALIKE[kind]
    atoms = np.roll(np.arange(flow.cg_map.n_atoms).reshape(-1, size), 1, axis=0).ravel()
    beads = flow.cg_map.owner[atoms[flow.cg_map.atom_index[np.unique(
        flow.cg_map.bead_index, return_index=True)[1]]]]  # fmt: skip
    slot = np.empty(len(atoms), int)
    slot[flow.placement.atoms] = np.arange(len(flow.placement.atoms))
    noise = noise_of(kind, 3)
    by_slot = flow.by_slot(noise)
    permuted = by_slot[:, slot[atoms[flow.placement.atoms]]][:, flow.active]
    x, log_prob = flow(s).positions_and_log_prob_from(noise)
    y, log_prob_y = flow(s[:, beads]).positions_and_log_prob_from(permuted)
    torch.testing.assert_close(y, x[:, atoms], rtol=0, atol=1e-12)
    torch.testing.assert_close(log_prob_y, log_prob, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", EVERY)
def test_positions_at_fixed_noise_are_smooth_in_s(kind):
    """Value, slope and curvature along a line in (s, z) agree with differences of one another."""
    flow, s, noise = flow_of(kind), system(kind).coarse[0], noise_of(kind)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(flow.cg_map.n_atoms, 3, generator=generator).double()
    along_s, along_z = (torch.randn(v.shape, generator=generator).double() for v in (s, noise))
    h = 2e-4
    t = (h * torch.arange(-2, 3).double()).requires_grad_()
    steps = t.view(-1, *(1,) * s.ndim)
    positions, log_prob = flow(s + steps * along_s).positions_and_log_prob_from(
        noise + 0.3 * t[:, None] * along_z
    )
    value = (weights * positions).sum((-1, -2)) + log_prob
    (slope,) = torch.autograd.grad(value.sum(), t, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), t)
    five_points = torch.tensor([1.0, -8.0, 0.0, 8.0, -1.0]).double() / (12 * h)
    size = 1 + curvature.abs().max().item()
    assert five_points @ value.detach() == pytest.approx(slope[2].item(), abs=1e-5 * size)
    assert five_points @ slope.detach() == pytest.approx(curvature[2].item(), abs=1e-5 * size)
    # Continuous curvature: over half the distance, about half the change.
    far, near = (curvature[k] - curvature[2] for k in (4, 3))
    assert abs(far - 2 * near) < 0.2 * abs(far) + 1e-3 * size


@pytest.mark.parametrize("kind", ["benzene by three", "torsions"])
def test_second_derivatives_are_those_of_the_first(kind):
    flow, s, noise = flow_of(kind), system(kind).coarse[0], noise_of(kind)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(flow.cg_map.n_atoms, 3, generator=generator).double()

    def probe(s: torch.Tensor) -> torch.Tensor:
        positions, log_prob = flow(s).positions_and_log_prob_from(noise)
        return (weights * positions).sum() + log_prob

    s = s.clone().requires_grad_()
    assert torch.autograd.gradgradcheck(probe, (s,), fast_mode=True, atol=1e-4, rtol=1e-3)
