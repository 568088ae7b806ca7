import json

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from ccg_ase import Prior, Topology, thermal_energy

KT = thermal_energy(300)
CHAIN = Topology(names="ABCD", masses=[1] * 4, bonds=[(0, 1), (1, 2), (2, 3)])


def prior_of(n=4, **rows):
    empty = {key: [] for key in ("bonds", "angles", "dihedrals", "volumes", "pairs")}
    return Prior({"n_beads": n, "temperature_K": 300.0, **empty, **rows})


def chain(*, bend=2.0, twist=0.7, bond=1.5) -> torch.Tensor:
    """Four beads with given bond length, angle and dihedral."""
    y, z = np.sin(bend) * np.cos(twist), np.sin(bend) * np.sin(twist)
    points = [
        [bond * np.cos(bend), bond * np.sin(bend), 0],
        [0, 0, 0],
        [bond, 0, 0],
        [bond - bond * np.cos(bend), bond * y, bond * z],
    ]
    return torch.tensor(points, dtype=torch.float64)


def test_energies_by_hand():
    x = chain()
    bonds = [[0, 1, 1.4, 30.0], [1, 2, 1.6, 20.0], [2, 3, 1.5, 10.0]]
    energy = 15 * 0.1**2 + 10 * 0.1**2
    assert prior_of(bonds=bonds)(x).item() == pytest.approx(energy, rel=1e-3)
    angles = [[0, 1, 2, 0.1, 4.0], [1, 2, 3, -0.2, 6.0]]
    energy += 2 * (np.cos(2.0) - 0.1) ** 2 + 3 * (np.cos(2.0) + 0.2) ** 2
    assert prior_of(bonds=bonds, angles=angles)(x).item() == pytest.approx(energy, rel=1e-3)
    dihedrals = [[0, 1, 2, 3, 0.3, -0.5, 0.7, 0.2, -0.1, 0.4]]
    energy += 0.3 * np.cos(0.7) - 0.5 * np.sin(0.7) + 0.7 * np.cos(1.4) + 0.2 * np.sin(1.4)
    energy += -0.1 * np.cos(2.1) + 0.4 * np.sin(2.1)
    everything = prior_of(bonds=bonds, angles=angles, dihedrals=dihedrals)
    assert everything(x).item() == pytest.approx(energy, rel=2e-3)


def test_dihedral_sign_is_that_of_ase():
    from ase import Atoms

    for twist in (0.7, -2.0):
        x = chain(twist=twist)
        prior = prior_of(
            bonds=[[i, i + 1, 1.5, 0.0] for i in range(3)], dihedrals=[[0, 1, 2, 3, 0.0, 1.0]]
        )
        degrees = Atoms("X4", x.numpy()).get_dihedral(0, 1, 2, 3)
        assert prior(x).item() == pytest.approx(np.sin(np.radians(degrees)), abs=2e-3)


def test_excluded_volume():
    x = torch.tensor([[0.0, 0, 0], [2, 0, 0]], dtype=torch.float64)
    prior = prior_of(n=2, volumes=[[0, 1, 4.0, 8.0]])
    assert prior(x).item() == pytest.approx(1.0, rel=1e-4)
    assert prior(2 * x).item() == pytest.approx(0.0, abs=1e-12)
    assert prior(0 * x).item() == pytest.approx(8.0, rel=1e-2)
    forces = -torch.autograd.functional.jacobian(prior, x)
    assert forces[1, 0] > 0  # apart


@pytest.mark.parametrize(("mean", "spread"), [(1.5, 0.03), (3.8, 0.15), (3.8, 0.6)])
def test_a_lone_bond_reproduces_mean_and_variance(mean, spread):
    """Quadrature of r² exp(-U/kT) against the moments that the prior was fitted on."""
    rng = np.random.default_rng(0)
    r = rng.normal(mean, spread, 200_000)
    beads = np.zeros((len(r), 2, 3))
    beads[:, 1, 0] = r
    prior = Prior.fit(beads, Topology(names="AB", masses=[1, 1], bonds=[(0, 1)]), 300)
    grid = np.linspace(0.3, mean + 12 * spread, 20_000)
    pair = torch.zeros(len(grid), 2, 3, dtype=torch.float64)
    pair[:, 1, 0] = torch.from_numpy(grid)
    density = grid**2 * np.exp(-prior(pair).numpy() / KT)
    density /= density.sum()
    found = (density * grid).sum()
    assert found == pytest.approx(r.mean(), abs=0.02 * spread)
    assert np.sqrt((density * (grid - found) ** 2).sum()) == pytest.approx(r.std(), rel=0.02)


def test_an_angle_reproduces_the_moments_of_its_cosine():
    rng = np.random.default_rng(0)
    cosine = rng.normal(-0.4, 0.08, 100_000)
    beads = np.zeros((len(cosine), 3, 3))
    beads[:, 0, 0] = 1.5
    beads[:, 2] = 1.5 * np.stack([cosine, np.sqrt(1 - cosine**2), 0 * cosine], -1)
    topology = Topology(names="ABC", masses=[1] * 3, bonds=[(0, 1), (1, 2)])
    _, _, _, centre, k = Prior.fit(beads, topology, 300).config["angles"][0]
    # p(cos θ) is flat without a potential, hence Gaussian with one.
    assert centre == pytest.approx(cosine.mean(), abs=1e-3)
    assert KT / k == pytest.approx(cosine.var(), rel=1e-3)


def test_dihedral_series_inverts_its_histogram():
    rng = np.random.default_rng(0)
    grid = np.linspace(-np.pi, np.pi, 2001)
    energy = KT * (1.2 * np.cos(grid) - 0.6 * np.sin(2 * grid) + 0.4 * np.cos(3 * grid))
    p = np.exp(-energy / KT)
    twist = rng.choice(grid, size=200_000, p=p / p.sum())
    beads = chain(twist=0).numpy()[None].repeat(len(twist), 0)
    radius = beads[:, 3, 1].copy()
    beads[:, 3, 1], beads[:, 3, 2] = radius * np.cos(twist), radius * np.sin(twist)
    prior = Prior.fit(beads, CHAIN, 300, dihedral_order=3)
    found = np.array(prior.config["dihedrals"][0][4:]) / KT
    np.testing.assert_allclose(found, [1.2, 0, 0, -0.6, 0.4, 0], atol=0.03)
    # The parts other than the dihedral don't depend on the twist.
    turned = torch.stack([chain(twist=t) for t in (0.5, 2.5)])
    difference = np.diff(prior(turned).numpy())[0]
    assert difference == pytest.approx(
        np.diff(np.interp([0.5, 2.5], grid, energy))[0], abs=0.1 * KT
    )


def test_fit_of_alanine_dipeptide(ala2_prior, ala2_beads):
    config = ala2_prior.config
    assert [len(config[key]) for key in ("bonds", "angles", "volumes", "pairs")] == [4, 3, 1, 10]
    ends = np.linalg.norm(ala2_beads[:, 0] - ala2_beads[:, 4], axis=-1)
    assert (ends < config["volumes"][0][2]).mean() == pytest.approx(0.005, abs=0.003)
    rows = ala2_prior.table()
    assert [row["term"] for row in rows] == ["bond"] * 4 + ["angle"] * 3 + ["volume"]
    # In the data, every quadratic degree of freedom holds about kT/2.
    energies = ala2_prior(torch.from_numpy(ala2_beads)).numpy()
    assert energies.mean() == pytest.approx(7 / 2 * KT, rel=0.15)


def test_shares_and_round_trip(ala2_beads, ala2_map):
    prior = Prior.fit(ala2_beads, ala2_map.beads, 300, dihedral_order=2)
    x = torch.from_numpy(ala2_beads[:5])
    torch.testing.assert_close(prior.site_energies(x).sum(-1), prior(x), rtol=0, atol=1e-13)
    copy = Prior.from_config(json.loads(json.dumps(prior.config)))
    assert torch.equal(copy(x), prior(x))
    assert prior(x.view(5, 1, 5, 3)).shape == (5, 1)
    assert len(prior.table()) == 10


@pytest.mark.parametrize("order", [0, 3])
def test_derivatives(ala2_beads, ala2_map, order):
    prior = Prior.fit(ala2_beads, ala2_map.beads, 300, dihedral_order=order)
    x = torch.from_numpy(ala2_beads[:2]).requires_grad_()
    assert gradcheck(lambda x: prior(x), x, atol=1e-4)
    assert gradgradcheck(lambda x: prior(x), x, atol=1e-3)


@pytest.mark.parametrize("start", ["coincident", "line", "far", "random"])
def test_any_start_is_pulled_back(start, ala2_beads, ala2_map):
    """Gradient descent from an absurd start ends at energies of a few kT."""
    prior = Prior.fit(ala2_beads, ala2_map.beads, 300, dihedral_order=2)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(5, 3, dtype=torch.float64, generator=generator)
    line = torch.arange(5.0, dtype=torch.float64)[:, None] * torch.tensor([1.5, 0, 0])
    x = {
        "coincident": 1e-3 * noise,
        "line": line + 1e-6 * noise,
        "far": 40 * noise,
        "random": 2 * noise,
    }[start].requires_grad_()
    energy = prior(x)
    for _ in range(1200):
        (gradient,) = torch.autograd.grad(energy, x)
        assert gradient.isfinite().all()
        step = 0.01 * gradient
        x = (x - step * (0.2 / step.norm().clamp(min=0.2))).detach().requires_grad_()
        energy = prior(x)
    best = min(prior(torch.from_numpy(ala2_beads)).min().item(), 0.0)
    assert energy.item() < best + 15 * KT


def test_bonds_confine_at_all_distances(ala2_prior, ala2_beads):
    x = torch.from_numpy(ala2_beads[0])
    energies = [ala2_prior(x * scale).item() for scale in (1, 2, 5, 20, 100)]
    assert np.all(np.diff(energies) > 1)


def test_refuses(ala2_map, ala2_beads):
    with pytest.raises(ValueError, match="shape"):
        Prior.fit(ala2_beads[0], ala2_map.beads, 300)
    with pytest.raises(ValueError, match="shape"):
        Prior.fit(ala2_beads[:, :4], ala2_map.beads, 300)
    with pytest.raises(ValueError, match="NaN"):
        Prior.fit(np.full((3, 5, 3), np.nan), ala2_map.beads, 300)


def test_one_bead_and_rigid_bonds():
    single = Prior.fit(np.zeros((3, 1, 3)), Topology(names="A", masses=[1]), 300)
    assert single(torch.zeros(2, 1, 3, dtype=torch.float64)).tolist() == [0, 0]
    rigid = np.tile([[0.0, 0, 0], [1.5, 0, 0]], (4, 1, 1))
    prior = Prior.fit(rigid, Topology(names="AB", masses=[1, 1], bonds=[(0, 1)]), 300)
    assert np.isfinite(prior.config["bonds"][0][3])
