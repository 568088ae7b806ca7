import json

import numpy as np
import pytest
import torch
from ase import Atoms
from bead_systems import SKEWED, rotation, system
from torch.autograd import gradcheck, gradgradcheck

from ccg_ase import Prior, Topology, fit_prior, thermal_energy
from ccg_ase.prior import TERMS
from ccg_ase.species import species_of

KT = thermal_energy(300)
BOX = torch.from_numpy(SKEWED)


def prior_of(n=4, **rows):
    """Terms of a chain of n beads of the types A, B, C, D; `volumes` by type."""
    links = [(i, i + 1) for i in range(n - 1)] if rows.get("bonds") else []
    topology = Topology(names="ABCD"[:n], types="ABCD"[:n], masses=[1] * n, bonds=links)
    none = {"bonds": [], "angles": [], "dihedrals": []}
    molecules = [{**species.key, **none} for species in species_of(topology)]
    volumes = rows.pop("volumes", [])
    if links:
        molecules[0] |= rows
    return Prior({"temperature_K": 300.0, "molecules": molecules, "volumes": volumes}, topology)


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


BONDS = [[0, 1, 1.4, 30.0], [1, 2, 1.6, 20.0], [2, 3, 1.5, 10.0]]
ANGLES = [[0, 1, 2, 0.1, 4.0], [1, 2, 3, -0.2, 6.0]]
DIHEDRALS = [[0, 1, 2, 3, 0.3, -0.5, 0.7, 0.2, -0.1, 0.4]]


def test_energies_by_hand():
    x = chain()
    energy = 15 * 0.1**2 + 10 * 0.1**2
    assert prior_of(bonds=BONDS)(x).item() == pytest.approx(energy, rel=1e-3)
    energy += 2 * (np.cos(2.0) - 0.1) ** 2 + 3 * (np.cos(2.0) + 0.2) ** 2
    assert prior_of(bonds=BONDS, angles=ANGLES)(x).item() == pytest.approx(energy, rel=1e-3)
    energy += 0.3 * np.cos(0.7) - 0.5 * np.sin(0.7) + 0.7 * np.cos(1.4) + 0.2 * np.sin(1.4)
    energy += -0.1 * np.cos(2.1) + 0.4 * np.sin(2.1)
    everything = prior_of(bonds=BONDS, angles=ANGLES, dihedrals=DIHEDRALS)
    assert everything(x).item() == pytest.approx(energy, rel=2e-3)


def test_dihedral_sign_is_that_of_ase():
    for twist in (0.7, -2.0):
        x = chain(twist=twist)
        prior = prior_of(
            bonds=[[i, i + 1, 1.5, 0.0] for i in range(3)], dihedrals=[[0, 1, 2, 3, 0.0, 1.0]]
        )
        degrees = Atoms("X4", x.numpy()).get_dihedral(0, 1, 2, 3)
        assert prior(x).item() == pytest.approx(np.sin(np.radians(degrees)), abs=2e-3)


def test_excluded_volume():
    x = torch.tensor([[0.0, 0, 0], [2, 0, 0]], dtype=torch.float64)
    prior = prior_of(n=2, volumes=[["A", "B", 0, 4.0, 8.0]])
    assert prior(x).item() == pytest.approx(1.0, rel=1e-4)
    assert prior(2 * x).item() == pytest.approx(0.0, abs=1e-12)
    assert prior(0 * x).item() == pytest.approx(8.0, rel=1e-2)
    forces = -torch.autograd.functional.jacobian(prior, x)
    assert forces[1, 0] > 0  # apart
    # In a box of 5 Å, images of the other bead are 2 and 3 Å away, those of the bead itself 5 Å.
    box = torch.diag(torch.tensor([5.0, 30, 30], dtype=torch.float64))
    assert prior(x, box=box).item() == pytest.approx(1.0 + 8 * 0.25**3, rel=1e-4)
    assert prior_of(n=2, volumes=[["A", "A", 0, 6.0, 8.0]])(x, box=box).item() == pytest.approx(
        8 * (1 / 6) ** 3, rel=1e-3
    )


@pytest.mark.parametrize("apart", [2, 3, 0])
@pytest.mark.parametrize("types", ["AB", "AA"])
def test_volumes_are_of_pairs_so_many_bonds_apart(types, apart):
    """A chain of six in a heap, 0.5 Å from bead to bead; no bonded pair repels."""
    n = 6
    topology = Topology(
        names="ABCDEF", types=[types[i % 2] for i in range(n)], masses=[1] * n,
        bonds=[(i, i + 1) for i in range(n - 1)],
    )  # fmt: skip
    (species,) = species_of(topology)
    config = {
        "temperature_K": 300.0,
        "molecules": [{**species.key, "bonds": [], "angles": [], "dihedrals": []}],
        "volumes": [["A", types[1], apart, 4.0, 8.0]],
    }
    x = torch.zeros(n, 3, dtype=torch.float64)
    x[:, 0] = 0.5 * torch.arange(n)
    bonds = np.arange(n)
    meant = (bonds == apart if apart else bonds > 3) & ((bonds % 2 == 1) | (types == "AA"))
    expected = ((n - bonds) * 8.0 * (1 - 0.5 * bonds / 4) ** 3)[meant].sum()
    assert Prior(config, topology)(x).item() == pytest.approx(expected, rel=1e-3)


def test_bonds_broken_across_the_box_are_those_of_nearest_images():
    prior = prior_of(bonds=BONDS, angles=ANGLES, dihedrals=DIHEDRALS)
    x = chain()
    cells = torch.tensor([[0.0, 0, 0], [1, -2, 0], [-1, 0, 3], [0, 1, 1]], dtype=torch.float64)
    assert prior(x, box=BOX).item() == pytest.approx(prior(x).item(), abs=1e-12)
    assert prior(x + cells @ BOX, box=BOX).item() == pytest.approx(prior(x).item(), abs=1e-11)


def test_molecules_of_one_species_have_the_same_terms():
    """Sites may be interleaved: what counts is their order within the molecule."""
    prior = prior_of(bonds=BONDS, angles=ANGLES, dihedrals=DIHEDRALS)
    bonds = [(0, 2), (2, 4), (4, 6), (1, 3), (3, 5), (5, 7)]
    both = Topology(names="ABCDEFGH", types="AABBCCDD", masses=[1] * 8, bonds=bonds)
    x, y = chain(), chain(bend=1.8, twist=-1.0) + 40.0
    two = Prior(prior.config, both)
    assert two(torch.stack([x, y], 1).reshape(8, 3)).item() == pytest.approx(
        (prior(x) + prior(y)).item(), abs=1e-11
    )
    links = [(0, 1), (1, 2), (2, 3)]
    with pytest.raises(ValueError, match="no molecule of 4 beads with the types A, A, B, B"):
        Prior(prior.config, Topology(names="AABB", types="AABB", masses=[1] * 4, bonds=links))


@pytest.mark.parametrize("cell", [None, SKEWED], ids=["open", "box"])
def test_shares_and_round_trip(cell):
    force_field, frames = system((4, 3), (1, 5), cell=cell)
    prior, x = force_field.prior, frames[:5]
    box = None if cell is None else BOX.expand(5, 3, 3)
    shares = prior.site_energies(x, force_field.graph.edges(x, box), box)
    energies = prior(x, box=box)
    torch.testing.assert_close(shares.sum(-1), energies, rtol=0, atol=1e-12)
    again = Prior(json.loads(json.dumps(prior.config)), force_field.cg_map.beads)
    assert torch.equal(again(x, box=box), energies)
    assert prior(x[:, None], box=None if box is None else box[:, None]).shape == (5, 1)


@pytest.mark.parametrize("cell", [None, SKEWED], ids=["open", "box"])
def test_derivatives(cell):
    force_field, frames = system((4, 1), (1, 1), cell=cell)
    x = frames[:2].clone().requires_grad_()
    # The box is given apart from the positions: both are differentiated.
    box = () if cell is None else (BOX.expand(2, 3, 3).clone().requires_grad_(),)

    def energy(x, box=None):
        return force_field.prior(x, box=box)

    assert gradcheck(energy, (x, *box), atol=1e-4)
    assert gradgradcheck(energy, (x, *box), atol=1e-3)


def test_invariance():
    force_field, frames = system((4, 3), (1, 5), cell=SKEWED)
    turn, energies = rotation(), force_field.prior(frames[:3], box=BOX)
    moved = force_field.prior((frames[:3] + 9.0) @ turn, box=BOX @ turn)
    torch.testing.assert_close(moved, energies, rtol=0, atol=1e-10)


def test_any_start_is_pulled_back(ala2_beads, ala2_map):
    """Gradient descent from absurd starts ends at energies of a few kT."""
    prior = fit_prior(ala2_beads, ala2_map.beads, 300, terms=TERMS, dihedral_order=2)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(5, 3, dtype=torch.float64, generator=generator)
    line = torch.arange(5.0, dtype=torch.float64)[:, None] * torch.tensor([1.5, 0, 0])
    starts = [1e-3 * noise, line + 1e-6 * noise, 40 * noise, 2 * noise]
    x = torch.stack(starts).requires_grad_()
    for _ in range(800):
        (gradient,) = torch.autograd.grad(prior(x).sum(), x)
        assert gradient.isfinite().all()
        step = 0.01 * gradient
        longest = step.flatten(1).norm(dim=1).clamp(min=0.3)[:, None, None]
        x = (x - step * (0.3 / longest)).detach().requires_grad_()
    best = min(prior(torch.from_numpy(ala2_beads)).min().item(), 0.0)
    assert prior(x).max().item() < best + 15 * KT


def test_bonds_confine_at_all_distances(ala2_prior, ala2_beads):
    x = torch.from_numpy(ala2_beads[0])
    energies = [ala2_prior(x * scale).item() for scale in (1, 2, 5, 20, 100)]
    assert np.all(np.diff(energies) > 1)


def test_table():
    """One row per term, with its beads, or its pair of types, and its constants."""
    prior = prior_of(
        bonds=BONDS, angles=ANGLES, dihedrals=DIHEDRALS, volumes=[["A", "D", 3, 3.25, 7.5]]
    )
    rows = prior.table()
    kinds = ["bond"] * 3 + ["angle"] * 2 + ["dihedral", "volume"]
    assert [row["term"] for row in rows] == kinds
    assert rows[1]["beads"] == (1, 2)
    assert rows[1]["constants"] == "r0 = 1.6000 Å, k = 20 eV/Å²"
    assert rows[-1]["beads"] == ("A", "D")
    assert rows[-1]["constants"] == "3 bonds apart, d = 3.2500 Å, A = 7.5 eV"
    assert rows[5]["beads"] == (0, 1, 2, 3)
