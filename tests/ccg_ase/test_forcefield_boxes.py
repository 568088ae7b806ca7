"""Many molecules and periodic boxes: forces, stress, and what must not change them."""

import numpy as np
import pytest
import torch
from ase.calculators.fd import calculate_numerical_forces, calculate_numerical_stress
from bead_systems import CUBE, SKEWED, SMALL, map_of, rotation, system

from ccg_ase import CGCalculator, CGMap, ForceField, bead_graph

CHAINS, MIXTURE = ((3, 6),), ((4, 3), (1, 5))
SYSTEMS = {
    "molecule": (((4, 1),), None),
    "mixture, open": (MIXTURE, None),
    "large, open": (((4, 15), (1, 6)), None),
    "single beads, cube": (((1, 20),), CUBE),
    "chains, cube": (CHAINS, CUBE),
    "single beads, skewed": (((1, 20),), SKEWED),
    "mixture, skewed": (MIXTURE, SKEWED),
    "smaller than the cut-off": (((4, 1), (1, 1)), SMALL),
}


def close(a, b, atol=1e-10):
    torch.testing.assert_close(a, b, rtol=1e-11, atol=atol)


def as_box(cell):
    return None if cell is None else torch.from_numpy(cell)


@pytest.fixture(scope="module", params=SYSTEMS)
def case(request):
    """A force field, three frames, and their box."""
    molecules, cell = SYSTEMS[request.param]
    force_field, frames = system(*molecules, cell=cell)
    return force_field, frames[:3], as_box(cell)


@pytest.fixture(scope="module")
def liquid():
    force_field, frames = system(*MIXTURE, cell=SKEWED)
    return force_field, frames[:3], torch.from_numpy(SKEWED)


def test_prior_and_network_both_act(case):
    """Otherwise the tests below would show little."""
    force_field, frames, box = case
    boxes = None if box is None else box.expand(3, 3, 3)
    network = force_field(frames, box=box) - force_field.prior(frames, box=box)
    volumes = force_field.prior.volumes(frames, force_field.graph.edges(frames, boxes))
    assert network.std() > 0.01
    assert volumes.sum(1).max() > 1e-3 or force_field.cg_map.n_beads == 4


def test_forces_and_stress_are_those_of_finite_differences(case):
    force_field, frames, box = case
    atoms = CGCalculator(force_field, dtype=torch.float64, compiled=False).atoms(frames[0].numpy())
    assert atoms.pbc.all() == (box is not None)
    some = np.random.default_rng(0).permutation(len(atoms))[:3]
    numeric = calculate_numerical_forces(atoms, eps=1e-5, iatoms=some)
    np.testing.assert_allclose(atoms.get_forces()[some], numeric, rtol=0, atol=1e-6)
    assert np.abs(numeric).max() > 0.01
    np.testing.assert_allclose(atoms.get_forces().sum(0), 0, atol=1e-10)
    if box is not None:
        numeric = calculate_numerical_stress(atoms, eps=1e-6)
        np.testing.assert_allclose(atoms.get_stress(), numeric, rtol=0, atol=1e-9)
        assert np.abs(numeric[3:]).max() > 1e-5


def test_frames_of_a_batch_are_frames_alone(case):
    force_field, frames, box = case
    together = force_field(frames.view(3, 1, -1, 3), box=box)
    assert together.shape == (3, 1)
    alone = torch.stack([force_field(frame, box=box) for frame in frames])
    close(together[:, 0], alone)
    if box is not None:
        boxes = torch.stack([box, 1.05 * box, 1.1 * box])
        alone = [force_field(frame, box=own) for frame, own in zip(frames, boxes, strict=True)]
        close(force_field(frames, box=boxes), torch.stack(alone))


def test_translation_and_rotation(case):
    force_field, frames, box = case
    energy, forces = force_field.energy_and_forces(frames, box=box)
    turn = rotation()
    turned = None if box is None else box @ turn
    moved = (frames + torch.tensor([30.0, -7, 2])) @ turn
    found, also = force_field.energy_and_forces(moved, box=turned)
    close(found, energy, atol=1e-9)
    close(also, forces @ turn, atol=1e-8)


def test_lattice_translations_of_single_beads(liquid):
    """Molecules are torn apart; their bonds are still those of the nearest images."""
    force_field, frames, box = liquid
    cells = torch.from_numpy(np.random.default_rng(0).integers(-2, 3, frames.shape)).double()
    energy, forces = force_field.energy_and_forces(frames, box=box)
    found, also = force_field.energy_and_forces(frames + cells @ box, box=box)
    close(found, energy, atol=1e-9)
    close(also, forces, atol=1e-8)


@pytest.mark.parametrize("cell", [None, SKEWED], ids=["open", "box"])
def test_permutation_of_identical_molecules(cell):
    force_field, frames = system((3, 6), (1, 4), cell=cell)
    order = np.random.default_rng(0).permutation(6)
    sites = np.concatenate([(3 * order[:, None] + np.arange(3)).ravel(), [21, 18, 20, 19]])
    box = as_box(cell)
    energies = force_field.site_energies(frames[:3], box=box)
    close(force_field.site_energies(frames[:3, sites], box=box), energies[:, sites])


def test_all_pairs_and_radius_graph_agree(monkeypatch):
    force_field, frames = system(*MIXTURE, cutoff_A=5.0)
    energy, forces = force_field.energy_and_forces(frames[:3])
    monkeypatch.setattr(bead_graph, "ALL_PAIRS_AT_MOST", 0)
    found, also = force_field.energy_and_forces(frames[:3])
    close(found, energy)
    close(also, forces)


def test_a_wide_box_is_open_space():
    force_field, frames = system(*MIXTURE)
    close(force_field(frames[:3], box=300 * torch.eye(3).double()), force_field(frames[:3]))


@pytest.mark.parametrize("cell", [SKEWED, SMALL], ids=["wide", "small"])
def test_supercell(cell):
    """Images act as real beads do: energy times the number of copies, the same forces."""
    molecules = MIXTURE if cell is SKEWED else ((3, 1), (1, 1))
    force_field, _ = system(*molecules, cell=cell)
    box = torch.from_numpy(cell)
    large = force_field.supercell((2, 1, 3))
    close(large.reference_box, box * torch.tensor([2.0, 1, 3])[:, None])
    start = force_field.reference_beads
    close(large.reference_beads[: len(start)], start)
    energy, forces = force_field.energy_and_forces(start, box=box)
    found, also = large.energy_and_forces(large.reference_beads, box=large.reference_box)
    close(found, 6 * energy, atol=1e-9)
    close(also, forces.repeat(6, 1), atol=1e-8)
    assert large.members is force_field.members


def test_far_molecules_add_up():
    """A pair of distant molecules is the sum of two single ones, by the same parameters."""
    force_field, frames = system((4, 2), (1, 1))
    one = force_field.for_map(map_of((4, 1)))
    other = force_field.for_map(map_of((4, 1), (1, 1)))
    x = frames[:3].clone()
    x[:, :4] += 100.0
    close(force_field(x), one(x[:, :4]) + other(x[:, 4:]), atol=1e-9)


def test_for_map(liquid):
    force_field, frames, box = liquid
    more = force_field.for_map(map_of((1, 3), (4, 2), (1, 2)))
    # The same beads as two of the chains and all single beads, in another order.
    sites = [12, 13, 14, *range(8), 15, 16]
    fewer = force_field.for_map(map_of((4, 2), (1, 5)))
    close(more(frames[:, sites], box=box), fewer(frames[:, [*range(8), *range(12, 17)]], box=box))
    assert more.periodic
    density = [
        system.cg_map.beads.masses.sum() / torch.linalg.det(system.reference_box).item()
        for system in (force_field, more)
    ]
    assert density[0] == pytest.approx(density[1], rel=1e-12)
    same = force_field.for_map(force_field.cg_map)
    assert torch.equal(same(frames[0], box=box), force_field(frames[0], box=box))
    # Parameters are shared: training one trains the other.
    assert all(a is b for a, b in zip(same.parameters(), force_field.parameters(), strict=True))
    assert not same.reference_beads.any()


def test_float32_of_a_mapped_force_field(liquid):
    """The copy has its own constants: converting it leaves the original's as they are."""
    force_field, frames, box = liquid
    before = force_field(frames[0], box=box)
    CGCalculator(force_field.for_map(map_of((4, 1))), compiled=False)
    assert force_field.dtype == torch.float64
    assert torch.equal(force_field(frames[0], box=box), before)


def test_reaches_as_far_as_its_prior():
    """Excluded volumes may act beyond the cut-off of the network."""
    force_field, frames = system((4, 2), cell=CUBE, cutoff_A=2.0)
    assert force_field.prior.reach_A > 2.0
    box = torch.from_numpy(CUBE)
    silent = ForceField.from_config(force_field.cg_map, 300.0, force_field.config).double()
    close(silent(frames[:3], box=box), force_field.prior(frames[:3], box=box))


def test_refuses(liquid):
    force_field, frames, box = liquid
    with pytest.raises(ValueError, match="no molecule of 3 beads"):
        force_field.for_map(CGMap.from_slices(map_of((4, 1)).atoms, [0, 1, 2]))
    with pytest.raises(ValueError, match=r"types MOL:1a, MOL:4a.*not MOL:2a"):
        force_field.for_map(map_of((2, 1)))
    with pytest.raises(ValueError, match="open space"):
        system((4, 1))[0].supercell((2, 2, 2))
    for repeats in ((2, 2), (2, 0, 1)):
        with pytest.raises(ValueError, match="three positive integers"):
            force_field.supercell(repeats)
    with pytest.raises(ValueError, match="no volume"):
        force_field(frames, box=0 * box)
