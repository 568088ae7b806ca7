from itertools import pairwise

import numpy as np
import pytest
import torch
from bead_systems import SKEWED, map_of, rotation, system

from ccg_ase import CGMap, ForceField, Topology, fit_prior, load_model, save_model


def test_fresh_equals_its_prior(ala2_map, ala2_prior, ala2_beads):
    model = ForceField(ala2_map, 300.0, ala2_prior).double()
    x = torch.from_numpy(ala2_beads)
    torch.testing.assert_close(model(x), model.prior(x), rtol=0, atol=1e-12)


def test_invariant_but_not_to_mirroring(force_field, ala2_beads):
    x = torch.from_numpy(ala2_beads[:20])
    energy = force_field(x)
    moved = force_field(x @ rotation() + torch.tensor([5.0, -3, 9], dtype=torch.float64))
    torch.testing.assert_close(moved, energy, rtol=0, atol=1e-10)
    mirrored = force_field(x * torch.tensor([1.0, 1, -1], dtype=torch.float64))
    assert (mirrored - energy).abs().median() > 1e-5
    # A planar structure is its own mirror image.
    flat = x * torch.tensor([1.0, 1, 0], dtype=torch.float64)
    turned = flat @ torch.diag(torch.tensor([1.0, -1, 1], dtype=torch.float64))
    torch.testing.assert_close(force_field(turned), force_field(flat), rtol=0, atol=1e-10)


def test_forces_are_the_gradient(force_field, ala2_beads):
    x = torch.from_numpy(ala2_beads[:3])
    energy, forces = force_field.energy_and_forces(x)
    assert not energy.requires_grad
    assert not forces.requires_grad
    assert not x.requires_grad
    step = 1e-4
    for bead, axis in ((0, 0), (2, 1), (4, 2)):
        shift = torch.zeros_like(x)
        shift[:, bead, axis] = step
        numeric = (force_field(x - shift) - force_field(x + shift)) / (2 * step)
        torch.testing.assert_close(forces[:, bead, axis], numeric, rtol=0, atol=1e-6)
    torch.testing.assert_close(forces.sum(1), torch.zeros(3, 3).double(), rtol=0, atol=1e-11)
    torque = torch.linalg.cross(x, forces).sum(1)
    torch.testing.assert_close(torque, torch.zeros_like(torque), rtol=0, atol=1e-10)


def test_trains_on_forces(force_field, ala2_beads):
    """Every parameter receives a finite gradient through energies and forces together."""
    x = torch.from_numpy(ala2_beads[:4])
    energy, forces = force_field.energy_and_forces(x, create_graph=True)
    ((forces**2).sum() + energy.sum()).backward()
    for name, parameter in force_field.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_learns_the_sign_of_a_torsion(ala2_map, ala2_beads):
    """A target that only chirality can tell: the signed volume of beads 0, 1, 2, 3."""
    torch.manual_seed(0)
    model = ForceField.from_data(ala2_map, 300.0, ala2_beads, channels=8).double()
    x = torch.from_numpy(ala2_beads[:64])
    edges = x[:, 1:4] - x[:, :3]
    target = 0.02 * torch.linalg.det(edges)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    with torch.no_grad():
        prior = model.prior(x)
    for _ in range(120):
        optimiser.zero_grad()
        loss = ((model(x) - prior - target) ** 2).mean() / target.var()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.1


def test_batches_and_precision(force_field, ala2_beads):
    x = torch.from_numpy(ala2_beads[:6])
    energy = force_field(x)
    torch.testing.assert_close(force_field(x.view(2, 3, 5, 3)), energy.view(2, 3))
    torch.testing.assert_close(force_field(x[0]), energy[0], rtol=0, atol=1e-12)
    assert force_field.site_energies(x[0]).shape == (5,)
    assert force_field(x.float()).dtype == torch.float32
    single = force_field.float()
    assert single(x).dtype == torch.float64  # in the dtype of the beads
    torch.testing.assert_close(single(x), energy, rtol=1e-4, atol=1e-5)


KINDS = {
    "plain": {},
    "range of temperatures": {"temperatures_K": (280, 350)},
    "committee": {"n_members": 3},
    "committee over a range": {"n_members": 2, "temperatures_K": (280, 350)},
}


@pytest.mark.parametrize("cell", [None, SKEWED], ids=["open", "box"])
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_through_a_file(kind, cell, tmp_path):
    force_field, frames = system((4, 2), (1, 3), cell=cell, n_layers=1, **KINDS[kind])
    box = None if cell is None else torch.from_numpy(cell)
    T = 320.0 if "range" in kind else None
    fewer = force_field.for_map(map_of((1, 3)))  # keeps parameters for types that aren't there
    for made, x in ((force_field, frames[:3]), (fewer, frames[:3, 8:])):
        path = tmp_path / "model.ccg"
        save_model(path, cg_map=made.cg_map, temperature_K=300.0, parts={"force_field": made})
        copy = ForceField.from_model(load_model(path))
        found = copy(x, box=box, temperature_K=T)
        assert torch.equal(found, made(x, box=box, temperature_K=T))
        assert copy.config == made.config
        assert torch.equal(copy.reference_beads, made.reference_beads)
        assert torch.equal(copy.reference_box, made.reference_box)
        assert copy.periodic == (cell is not None)


def test_sees_typical_distances(force_field, ala2_beads):
    index, bonded = force_field.graph.index, force_field.graph.bonded
    bond = (index == torch.tensor([[0], [1]])).all(0).nonzero().item()
    key = (1, force_field.graph.types[0], force_field.graph.types[1])
    shift, slope = force_field.members[0].encoder.radial.typical[key]
    r = np.linalg.norm(ala2_beads[:, 0] - ala2_beads[:, 1], axis=-1)
    assert bonded[bond] == 1
    assert -shift / slope == pytest.approx(r.mean(), rel=1e-4)
    assert 0.25 / slope == pytest.approx(r.std(), rel=1e-2)


@pytest.fixture(scope="module")
def thermal():
    """Return a force field over 280 to 350 K, for beads in open space, and frames."""
    force_field, frames = system((4, 2), temperatures_K=(280, 350))
    return force_field, frames[:4]


def test_energy_depends_on_temperature(thermal):
    force_field, x = thermal
    energies = [force_field(x, temperature_K=T) for T in (280.0, 300.0, 315.0, 350.0)]
    assert torch.equal(force_field(x), energies[1])
    assert min((a - b).abs().max() for a, b in pairwise(energies)) > 1e-4
    # A fresh one doesn't: what depends on temperature is learned.
    fresh, _ = system((4, 2), temperatures_K=(280, 350))
    with torch.no_grad():
        fresh.members[0].thermal.zero_()
    assert torch.equal(fresh(x, temperature_K=280.0), fresh(x, temperature_K=350.0))


def test_a_temperature_per_frame_is_frame_by_frame(thermal):
    force_field, x = thermal
    T = torch.tensor([283.7, 300.0, 310.15, 349.9], dtype=torch.float64)
    together, forces = force_field.energy_and_forces(x, temperature_K=T)
    for k in range(4):
        energy, alone = force_field.energy_and_forces(x[k], temperature_K=T[k].item())
        torch.testing.assert_close(together[k], energy, rtol=0, atol=1e-12)
        torch.testing.assert_close(forces[k], alone, rtol=0, atol=1e-10)
    box = torch.from_numpy(2.0 * SKEWED)
    united = force_field(x, box=box, temperature_K=T)
    alone = [force_field(x[k], box=box, temperature_K=T[k]) for k in range(4)]
    torch.testing.assert_close(united, torch.stack(alone), rtol=0, atol=1e-12)


def test_gradient_in_temperature(thermal):
    force_field, x = thermal
    T = torch.full((4,), 310.0, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(force_field(x, temperature_K=T).sum(), T)
    numeric = force_field(x, temperature_K=310.01) - force_field(x, temperature_K=309.99)
    torch.testing.assert_close(slope, numeric / 0.02, rtol=1e-5, atol=1e-9)
    assert slope.abs().min() > 1e-7
    loss = force_field(x, temperature_K=T).sum()
    loss.backward()
    assert force_field.members[0].thermal.grad.abs().min() > 0
    force_field.zero_grad()


def test_refuses_other_temperatures(thermal, force_field, ala2_beads, ala2_map):
    """Also those that float32 rounds to others."""
    ranged, frames = thermal
    for T in (280, 350, 310.15, torch.tensor([280.0, 350.0]), np.array([299.7, 280.0])):
        ranged.temperatures_K.check(T)
    for T in (279.99, 350.01, np.nan, torch.tensor([300.0, 351.0])):
        with pytest.raises(ValueError, match=r"free energy at 280.0 to 350.0 K and wrong at"):
            ranged.temperatures_K.check(T)
    with pytest.raises(ValueError, match="wrong at 400 K"):
        ranged(frames, temperature_K=400.0)
    x = torch.from_numpy(ala2_beads[:2])
    assert torch.equal(force_field(x, temperature_K=300), force_field(x))
    for T in (299.999, 300.001, np.nan):
        with pytest.raises(ValueError, match=r"free energy at 300.0 K and wrong.*train another"):
            force_field(x, temperature_K=T)
    body = ForceField.from_data(ala2_map, 310.15, ala2_beads)
    body(x, temperature_K=310.15)
    with pytest.raises(ValueError, match="within temperatures_K, 310 to 320 K"):
        ForceField.from_data(ala2_map, 300.0, ala2_beads, temperatures_K=(310, 320))


def test_committee():
    """The energy is the mean over members, which share the prior."""
    force_field, frames = system((4, 2), (1, 2), n_members=3)
    x = frames[:4]
    each = force_field.member_energies(x)
    assert each.shape == (3, 4, 10)
    singles = []
    for k in range(3):
        single = ForceField.from_config(
            force_field.cg_map, 300.0, {**force_field.config, "n_members": 1}
        ).double()
        state = {
            key.replace(f"members.{k}.", "members.0."): value
            for key, value in force_field.state_dict().items()
            if "members." not in key or f"members.{k}." in key
        }
        single.load_state_dict(state)
        singles.append(single)
    alone = torch.stack([single(x) for single in singles])
    torch.testing.assert_close(each.sum(-1), alone, rtol=0, atol=1e-12)
    torch.testing.assert_close(force_field(x), alone.mean(0), rtol=0, atol=1e-12)
    assert alone.std(0).min() > 1e-3
    joined = ForceField.committee(singles)
    assert torch.equal(joined(x), force_field(x))
    assert joined.config == force_field.config
    # The joined one has its own networks, and a committee of committees is one of all members.
    with torch.no_grad():
        singles[0].members[0].out.bias += 1
    assert torch.equal(joined(x), force_field(x))
    assert ForceField.committee([joined, joined.float()]).n_members == 6


def test_a_committee_shares_all_but_weights():
    one, _ = system((4, 2))
    with pytest.raises(ValueError, match="at least one"):
        ForceField.committee([])
    for other in (
        system((4, 2), seed=1)[0],  # of another prior
        system((4, 2), channels=5)[0],
        system((4, 2), temperatures_K=(280, 350))[0],
        one.for_map(map_of((4, 1))),
    ):
        with pytest.raises(ValueError, match="must share"):
            ForceField.committee([one, other])
    with pytest.raises(ValueError, match="n_members"):
        system((4, 2), n_members=0)


@pytest.mark.parametrize("n", [1, 2])
def test_few_beads(n):
    topology = Topology(names="AB"[:n], masses=[1] * n, bonds=[(0, 1)][: n - 1])
    cg_map = CGMap.from_slices(topology, range(n))
    beads = np.random.default_rng(0).normal(size=(10, n, 3)) * 0.1 + np.arange(n)[:, None]
    model = ForceField(cg_map, 300.0, fit_prior(beads, cg_map.beads, 300.0)).double()
    energy, forces = model.energy_and_forces(torch.from_numpy(beads))
    assert energy.isfinite().all()
    assert forces.shape == (10, n, 3)
    assert forces.isfinite().all()


def test_nothing_global_changes(ala2_map, ala2_prior, ala2_beads):
    state = torch.get_rng_state()
    model = ForceField(ala2_map, 300.0, ala2_prior)
    assert not torch.equal(torch.get_rng_state(), state)  # initialisation draws, as any module
    state = torch.get_rng_state()
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    model.energy_and_forces(torch.from_numpy(ala2_beads[:2]))
    assert torch.equal(torch.get_rng_state(), state)
    assert (torch.get_num_threads(), torch.get_default_dtype()) == (threads, dtype)


def test_refuses(ala2_map, ala2_prior, ala2_topology):
    with pytest.raises(ValueError, match="fitted at 300"):
        ForceField(ala2_map, 310.0, ala2_prior)
    with pytest.raises(ValueError, match="5 beads"):
        ForceField(CGMap.from_slices(ala2_topology, [4, 6]), 300.0, ala2_prior)
    with pytest.raises(ValueError, match="reference_beads"):
        ForceField(ala2_map, 300.0, ala2_prior, reference_beads=np.zeros((4, 3)))
    model = ForceField(ala2_map, 300.0, ala2_prior)
    with pytest.raises(ValueError, match="expected beads"):
        model(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="reference_box"):
        ForceField(ala2_map, 300.0, ala2_prior, reference_box=np.ones(3))
