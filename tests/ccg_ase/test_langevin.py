import numpy as np
import pytest
import torch

from ccg_ase import BatchedLangevin, CGMap, ForceField, Prior, Topology, thermal_energy

SETTINGS = {"timestep_fs": 2.0, "friction_per_ps": 5.0}
KT = thermal_energy(300.0)


class Wells(torch.nn.Module):
    """Independent harmonic wells with everything that a sampler asks of a force field."""

    temperature_K = 300.0
    dtype = torch.float64
    stiffness = 1.3

    def __init__(self, n=2):
        super().__init__()
        topology = Topology(names="A" * n, masses=[12.0, 40.0][:n], bonds=[(0, 1)][: n - 1])
        self.cg_map = CGMap.from_slices(topology, range(n))
        self.register_buffer("reference_beads", torch.zeros(n, 3, dtype=torch.float64))

    def energy_and_forces(self, beads):
        # Invariant under translation, as any force field: a spring between the two beads.
        difference = beads[:, 0] - beads[:, 1]
        pull = -self.stiffness * difference
        return 0.5 * self.stiffness * (difference**2).sum(-1), torch.stack([pull, -pull], 1)


def test_harmonic_moments():
    """BAOAB samples a harmonic well exactly, at a step near half its stability limit."""
    wells = Wells()
    reduced = 12 * 40 / 52
    period = 2 * np.pi * np.sqrt(reduced / wells.stiffness) / (1 / 10.180506)  # fs
    sampler = BatchedLangevin(wells, timestep_fs=0.15 * period, friction_per_ps=20, seed=4)
    beads = np.zeros((400, 2, 3))
    sampler.run(beads, 200)
    frames = sampler.run(None, 2000, every=5)
    assert frames.shape == (400, 400, 2, 3)
    difference = frames[:, :, 0] - frames[:, :, 1]
    per_replica = (difference**2).mean((0, 2))
    error = per_replica.std() / np.sqrt(len(per_replica))
    expected = KT / wells.stiffness
    assert abs(per_replica.mean() - expected) < 4 * error
    assert error < 0.01 * expected
    means = difference.mean(0)
    assert abs(means.mean()) < 4 * means.std() / np.sqrt(means.size)


def test_velocities_are_thermal():
    sampler = BatchedLangevin(Wells(), **SETTINGS, seed=0)
    sampler.run(np.zeros((20_000, 2, 3)), 0)
    kinetic = sampler.state_dict()["velocities"].square().mean((0, 2)) * torch.tensor([12.0, 40.0])
    np.testing.assert_allclose(kinetic, KT, rtol=0.02)


def test_prior_bond_reproduces_its_data():
    """Sampling a fitted bond returns the mean and the variance that it was fitted on."""
    rng = np.random.default_rng(0)
    data = np.zeros((50_000, 2, 3))
    data[:, 1, 0] = rng.normal(1.5, 0.05, len(data))
    cg_map = CGMap.from_slices(Topology(names="AB", masses=[12, 14], bonds=[(0, 1)]), [0, 1])
    prior = Prior.fit(data, cg_map.beads, 300.0)
    model = ForceField(cg_map, 300.0, prior, channels=1, n_layers=1, l_max=0).double()
    sampler = BatchedLangevin(model, timestep_fs=2, friction_per_ps=20, seed=1)
    sampler.run(data[:500], 100)
    frames = sampler.run(None, 600, every=5)
    r = np.linalg.norm(frames[:, :, 0] - frames[:, :, 1], axis=-1)
    assert r.mean() == pytest.approx(data[:, 1, 0].mean(), abs=0.001)
    assert r.std() == pytest.approx(data[:, 1, 0].std(), rel=0.02)


def test_one_replica_alone_follows_the_same_path(force_field, ala2_beads):
    together = BatchedLangevin(force_field, **SETTINGS, seed=9)
    frames = together.run(ala2_beads[:4], 20, every=10)
    assert len(set(together.seeds)) == 4
    alone = BatchedLangevin(force_field, **SETTINGS, seed=[together.seeds[2]])
    np.testing.assert_allclose(alone.run(ala2_beads[2:3], 20, every=10), frames[:, 2:3], atol=1e-9)


def test_restart_is_identical(force_field, ala2_beads, tmp_path):
    whole = BatchedLangevin(force_field, **SETTINGS, seed=2)
    frames = whole.run(ala2_beads[:2], 300, every=10)  # longer than a block of noise
    first = BatchedLangevin(force_field, **SETTINGS, seed=2)
    first.run(ala2_beads[:2], 130, every=10)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    second = BatchedLangevin(force_field, **SETTINGS, seed=0)
    second.load_state_dict(state)
    np.testing.assert_array_equal(second.run(None, 170, every=10), frames[13:])
    assert second.n_steps == whole.n_steps == 300


def test_output_and_inputs(force_field, ala2_beads):
    beads = torch.from_numpy(ala2_beads[:2].copy())
    sampler = BatchedLangevin(force_field.float(), **SETTINGS, seed=0)
    frames = sampler.run(beads, 4, every=2)
    assert frames.shape == (2, 2, 5, 3)
    assert frames.dtype == np.float32
    np.testing.assert_array_equal(beads, ala2_beads[:2])
    same = BatchedLangevin(force_field, **SETTINGS, seed=0).run(beads, 4, every=2)
    np.testing.assert_array_equal(frames, same)
    other = BatchedLangevin(force_field, **SETTINGS, seed=1).run(beads, 4, every=2)
    assert not np.allclose(frames, other)


def test_stays_bounded_from_a_strained_start(ala2_map, ala2_prior, ala2_beads):
    model = ForceField(ala2_map, 300.0, ala2_prior, channels=4)
    frames = BatchedLangevin(model, **SETTINGS, seed=0).run(1.3 * ala2_beads[:8], 1000, every=100)
    bonds = np.linalg.norm(np.diff(frames[1:], axis=2), axis=-1)
    assert ((bonds > 1.1) & (bonds < 1.9)).all()


def test_refuses(force_field, ala2_beads):
    with pytest.raises(ValueError, match="free energy at 300"):
        BatchedLangevin(force_field, **SETTINGS, seed=0, temperature_K=310)
    with pytest.raises(ValueError, match="positive"):
        BatchedLangevin(force_field, timestep_fs=0, friction_per_ps=1, seed=0)
    sampler = BatchedLangevin(force_field, **SETTINGS, seed=0, temperature_K=300)
    with pytest.raises(ValueError, match="nothing to continue"):
        sampler.run(None, 1)
    with pytest.raises(ValueError, match="no state"):
        sampler.state_dict()
    with pytest.raises(ValueError, match="multiple"):
        sampler.run(ala2_beads[:1], 3, every=2)
    with pytest.raises(ValueError, match="shape"):
        sampler.run(ala2_beads[0], 1)
    with pytest.raises(ValueError, match="2 replicas given, but there are 1 seeds"):
        BatchedLangevin(force_field, **SETTINGS, seed=[1]).run(ala2_beads[:2], 1)
    beads = ala2_beads[:3].copy()
    beads[1, 2, 0] = np.nan
    with pytest.raises(FloatingPointError, match="replica 1 left the finite numbers by step 2"):
        sampler.run(beads, 4, every=2)
