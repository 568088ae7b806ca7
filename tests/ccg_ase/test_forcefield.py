import numpy as np
import pytest
import torch

from ccg_ase import CGMap, ForceField, Prior, Topology


def rotation(seed=5):
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    return torch.from_numpy(q * np.sign(np.linalg.det(q)))


def test_fresh_equals_its_prior(ala2_map, ala2_prior, ala2_beads):
    model = ForceField(ala2_map, 300.0, ala2_prior).double()
    x = torch.from_numpy(ala2_beads)
    torch.testing.assert_close(model(x), model.prior(x), rtol=0, atol=1e-12)


def test_invariant_but_not_to_mirroring(force_field, ala2_beads):
    x = torch.from_numpy(ala2_beads[:20])
    energy = force_field(x)
    moved = force_field(x @ rotation().T + torch.tensor([5.0, -3, 9], dtype=torch.float64))
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


def test_learns_the_sign_of_a_torsion(ala2_map, ala2_prior, ala2_beads):
    """A target that only chirality can tell: the signed volume of beads 0, 1, 2, 3."""
    torch.manual_seed(0)
    model = ForceField(ala2_map, 300.0, ala2_prior, channels=8).double()
    x = torch.from_numpy(ala2_beads[:128])
    edges = x[:, 1:4] - x[:, :3]
    target = 0.02 * torch.linalg.det(edges)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    with torch.no_grad():
        prior = model.prior(x)
    for _ in range(150):
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


def test_config_round_trip(force_field, ala2_beads):
    x = torch.from_numpy(ala2_beads[:3])
    copy = ForceField.from_config(force_field.cg_map, 300.0, force_field.config).double()
    copy.load_state_dict(force_field.state_dict())
    assert torch.equal(copy(x), force_field(x))
    assert torch.equal(copy.reference_beads, force_field.reference_beads)


def test_sees_the_distances_of_its_prior(force_field, ala2_beads):
    bond = (force_field.edges == torch.tensor([[0], [1]])).all(0).nonzero().item()
    key = (1, force_field.types[0], force_field.types[1])
    shift, slope = force_field.encoder.radial.typical[key]
    r = np.linalg.norm(ala2_beads[:, 0] - ala2_beads[:, 1], axis=-1)
    assert force_field.bonded[bond] == 1
    assert -shift / slope == pytest.approx(r.mean(), rel=1e-4)
    assert 0.25 / slope == pytest.approx(r.std(), rel=1e-2)


@pytest.mark.parametrize("n", [1, 2])
def test_few_beads(n):
    topology = Topology(names="AB"[:n], masses=[1] * n, bonds=[(0, 1)][: n - 1])
    cg_map = CGMap.from_slices(topology, range(n))
    beads = np.random.default_rng(0).normal(size=(10, n, 3)) * 0.1 + np.arange(n)[:, None]
    model = ForceField(cg_map, 300.0, Prior.fit(beads, cg_map.beads, 300.0)).double()
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
    two = Topology(names="AB", masses=[1, 1])
    prior = Prior.fit(np.random.default_rng(0).normal(size=(5, 2, 3)), two, 300.0)
    with pytest.raises(NotImplementedError, match="2 molecules"):
        ForceField(CGMap.from_slices(two, [0, 1]), 300.0, prior)
