import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from wells import Wells

from ccg_ase import (
    BatchedLangevin,
    CGMap,
    DistanceRestraint,
    ExplodedError,
    ForceField,
    Topology,
    fit_prior,
    thermal_energy,
)
from ccg_ase.bead_frames import BeadFrames
from ccg_ase.temperature import TemperatureRange

SETTINGS = {"timestep_fs": 2.0, "friction_per_ps": 5.0}
EAGER = {**SETTINGS, "dtype": torch.float64, "compiled": False}
KT = thermal_energy(300.0)
PER_FRAME = ("beads", "steps", "energies", "restraint_energies", "walkers")


class Kept:
    """A writer that keeps what it gets."""

    def __init__(self):
        self.pieces = []

    def write(self, frames):
        self.pieces.append(frames)

    @property
    def frames(self):
        return BeadFrames.join(self.pieces)


def assert_same(a, b):
    for key in PER_FRAME:
        np.testing.assert_array_equal(getattr(a, key), getattr(b, key))


def test_harmonic_moments():
    """BAOAB samples a harmonic well exactly, at a step near half its stability limit."""
    wells = Wells(400)
    reduced = 12 * 40 / 52
    period = 2 * np.pi * np.sqrt(reduced / wells.stiffness) / (1 / 10.180506)  # fs
    sampler = BatchedLangevin(wells, timestep_fs=0.15 * period, friction_per_ps=20, seed=4)
    sampler.run(np.zeros((400, 2, 3)), 200, every=200)
    frames = sampler.run(None, 2000, every=5)
    assert frames.beads.shape == (400, 400, 2, 3)
    difference = frames.beads[:, :, 0] - frames.beads[:, :, 1]
    per_replica = (difference**2).mean((0, 2))
    error = per_replica.std() / np.sqrt(len(per_replica))
    expected = KT / wells.stiffness
    assert abs(per_replica.mean() - expected) < 4 * error
    assert error < 0.01 * expected
    means = difference.mean(0)
    assert abs(means.mean()) < 4 * means.std() / np.sqrt(means.size)
    np.testing.assert_allclose(
        frames.energies, 0.5 * wells.stiffness * (difference**2).sum(-1), rtol=1e-4, atol=1e-9
    )


def test_velocities_are_thermal_at_every_temperature():
    """Maxwell's distribution at the start, each replica at its own temperature."""
    wells = Wells(30_000)
    wells.temperatures_K = TemperatureRange(200.0, 400.0)
    sampler = BatchedLangevin(wells, **SETTINGS, seed=0, temperatures_K=[200, 300, 400])
    sampler.run(np.zeros((30_000, 2, 3)), 0)
    squares = sampler.state_dict()["point"]["velocities"].square().view(-1, 3, 2, 3).mean((0, 3))
    expected = [[thermal_energy(T)] * 2 for T in (200, 300, 400)]
    np.testing.assert_allclose(squares * torch.tensor([12.0, 40.0]), expected, rtol=0.03)


def test_prior_bond_reproduces_its_data():
    """Sampling a fitted bond returns the mean and the variance that it was fitted on."""
    rng = np.random.default_rng(0)
    data = np.zeros((50_000, 2, 3))
    data[:, 1, 0] = rng.normal(1.5, 0.05, len(data))
    cg_map = CGMap.from_slices(Topology(names="AB", masses=[12, 14], bonds=[(0, 1)]), [0, 1])
    prior = fit_prior(data, cg_map.beads, 300.0)
    model = ForceField(cg_map, 300.0, prior, channels=1, n_layers=1, l_max=0)
    sampler = BatchedLangevin(model, timestep_fs=2, friction_per_ps=20, seed=1, compiled=False)
    sampler.run(data[:500], 100, every=100)
    beads = sampler.run(None, 300, every=5).beads
    r = np.linalg.norm(beads[:, :, 0] - beads[:, :, 1], axis=-1)
    assert r.mean() == pytest.approx(data[:, 1, 0].mean(), abs=0.001)
    assert r.std() == pytest.approx(data[:, 1, 0].std(), rel=0.02)


def test_one_replica_alone_follows_the_same_path(force_field, ala2_beads):
    together = BatchedLangevin(force_field, **EAGER, seed=9)
    frames = together.run(ala2_beads[:4], 20, every=10)
    assert len(set(together.seeds)) == 4
    alone = BatchedLangevin(force_field, **EAGER, seed=[together.seeds[2]])
    path = alone.run(ala2_beads[2:3], 20, every=10)
    np.testing.assert_allclose(path.beads, frames.beads[:, 2:3], atol=1e-9)
    # To the last bit where the evaluator does the same arithmetic at any batch size.
    together = BatchedLangevin(Wells(3), **EAGER, seed=9)
    frames = together.run(np.zeros((3, 2, 3)), 300, every=10)
    alone = BatchedLangevin(Wells(1), **EAGER, seed=together.seeds[1:2])
    path = alone.run(np.zeros((1, 2, 3)), 300, every=10)
    np.testing.assert_array_equal(path.beads, frames.beads[:, 1:2])


@pytest.mark.parametrize(("every", "unit"), [(10, 150), (150, 150), (2, 4)])
def test_restart_is_identical(force_field, ala2_beads, tmp_path, every, unit):
    """A run that was cut continues to the same bits, also beyond a block of noise."""
    # Three times 4 steps with a network, three times 150 with a spring.
    system = force_field if unit == 4 else Wells(4)
    start = ala2_beads[:4] if unit == 4 else np.ones((4, 2, 3))
    options = {
        **EAGER,
        "temperatures_K": [300, 330],
        "exchange_every": 3,
        "restraints": [DistanceRestraint([0, 1], 5.0, 0.1)],
    }
    whole = BatchedLangevin(system, **options, seed=2)
    frames = whole.run(start, 3 * unit, every=every)
    restart = tmp_path / "run.restart"
    first = BatchedLangevin(system, **options, seed=2)
    first.write([], start, unit, every=every, restart=restart)
    second = BatchedLangevin(system, **options, seed=0)
    second.load_restart(restart)
    kept = Kept()
    second.write([kept], None, 2 * unit, every=every)
    for key in PER_FRAME:
        expected = getattr(frames, key)[unit // every :]
        np.testing.assert_array_equal(getattr(kept.frames, key), expected)
    assert second.n_steps == whole.n_steps == 3 * unit
    for a, b in zip(second.exchange_report(), whole.exchange_report(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not list(tmp_path.glob(".*"))  # nothing half-written is left


def test_restart_after_a_crash(tmp_path):
    """The file is of a step whose frames were written; going on from it gives the same frames."""
    restart, kept = tmp_path / "run.restart", Kept()
    whole = BatchedLangevin(Wells(2), **EAGER, seed=2).run(np.ones((2, 2, 3)), 2000, every=100)

    def power_cut(frames):
        kept.write(frames)
        if len(kept.frames) == 15:
            raise KeyboardInterrupt

    writer = Kept()
    writer.write = power_cut
    sampler = BatchedLangevin(Wells(2), **EAGER, seed=2)
    with pytest.raises(KeyboardInterrupt):
        sampler.write(
            [writer], np.ones((2, 2, 3)), 2000, every=100, restart=restart, restart_every=300
        )
    again = BatchedLangevin(Wells(2), **EAGER, seed=0)
    again.load_restart(restart)
    assert again.n_steps == 1200
    rest = again.run(None, 2000 - again.n_steps, every=100)
    np.testing.assert_array_equal(rest.beads, whole.beads[12:])


def test_restart_of_another_run_is_refused(force_field, ala2_beads, tmp_path):
    restart = tmp_path / "run.restart"
    sampler = BatchedLangevin(force_field, **EAGER, seed=2)
    sampler.write([], ala2_beads[:2], 0, restart=restart)
    BatchedLangevin(force_field, **EAGER, seed=0).load_restart(restart)
    with pytest.raises(ValueError, match=r"another run \(timestep_fs: 2.0 there, 3.0 here\)"):
        BatchedLangevin(force_field, **{**EAGER, "timestep_fs": 3}, seed=0).load_restart(restart)
    with torch.no_grad():
        next(force_field.members.parameters()).add_(1e-3)
    with pytest.raises(ValueError, match=r"another run \(force field: "):
        BatchedLangevin(force_field, **EAGER, seed=0).load_restart(restart)
    restart.write_bytes(restart.read_bytes()[:1000])
    with pytest.raises(ValueError, match="isn't a restart file"):
        sampler.load_restart(restart)
    restart.write_text("run")
    with pytest.raises(ValueError, match="isn't a restart file"):
        sampler.load_restart(restart)
    with pytest.raises(FileNotFoundError, match="no restart file"):
        sampler.load_restart(tmp_path / "other")


@pytest.mark.parametrize("every", [1, 30, 300])
def test_streaming_gives_the_same_frames(every):
    """Blocks, whatever their number, hold what one run returns, and little of it at a time."""
    start = np.ones((3, 2, 3))
    whole = BatchedLangevin(Wells(3), **EAGER, seed=3).run(start, 900, every=every)
    assert whole.steps.tolist() == list(range(every, 901, every))
    kept = Kept()
    BatchedLangevin(Wells(3), **EAGER, seed=3).write([kept], start, 900, every=every)
    assert_same(kept.frames, whole)
    assert len(kept.pieces) > 5
    assert max(len(piece) for piece in kept.pieces) <= 128
    pieces = BatchedLangevin(Wells(3), **EAGER, seed=3)
    parts = [pieces.run(start, 300, every), pieces.run(None, 600, every)]
    assert_same(BeadFrames.join(parts), whole)


class Exploding(Wells):
    """Bead 1 of replica 1 is pushed where its bead 0 is beyond an edge."""

    def __init__(self, replicas, edge, push):
        super().__init__(replicas)
        self.edge, self.push = edge, push

    def forward(self, beads, box=None):
        assert beads.abs().max() < 50  # an exploded replica waits where it is
        result = super().forward(beads)
        far = beads[1, 0].norm() > self.edge
        result.forces[1, 1, 0] += torch.where(far, self.push, 0.0)
        return result


@pytest.mark.parametrize("push", [1e6, np.nan, np.inf])
def test_explosion_stops_the_run_with_the_last_good_frame(push):
    """Stops in the step in which a bead leaps, having written all frames until then."""
    start = np.zeros((3, 2, 3))
    calm = BatchedLangevin(Wells(3), **EAGER, seed=1).run(start, 1000)
    r = np.linalg.norm(calm.beads[:, 1, 0], axis=-1)
    edge = r[:300].max()
    over = int(np.argmax(r > edge))  # steps before the one that leaps
    assert 300 <= over < 990
    kept = Kept()
    sampler = BatchedLangevin(Exploding(3, edge, push), **EAGER, seed=1)
    with pytest.raises(
        ExplodedError, match=rf"replica 1 exploded in step {over + 1} \(300 K\)"
    ) as e:
        sampler.write([kept], start, 1000, every=20)
    error = e.value
    assert (error.replica, error.step, error.temperature_K) == (1, over + 1, 300.0)
    assert (error.bead, error.name) == (1, "B")
    assert not error.force_eV_A < 0.99 * 1e6
    assert not error.move_A <= 5
    np.testing.assert_array_equal(error.last_good, calm.beads[over - 1])
    steps = [*range(20, over + 1, 20)]
    assert kept.frames.steps.tolist() == steps + [over] * (steps[-1] != over)
    np.testing.assert_array_equal(kept.frames.beads, calm.beads[kept.frames.steps - 1])
    # The sampler stands at the last good step, too.
    assert sampler.n_steps == over
    np.testing.assert_array_equal(sampler.state_dict()["point"]["beads"], error.last_good)


def test_explosion_in_the_first_step():
    """The frame that is written is the start."""
    kept, start = Kept(), np.ones((2, 2, 3))
    sampler = BatchedLangevin(Exploding(2, 0.0, 2e4), **EAGER, seed=1)
    with pytest.raises(ExplodedError, match="replica 1 exploded in step 1 "):
        sampler.write([kept], start, 1000, every=20)
    assert kept.frames.steps.tolist() == [0]
    np.testing.assert_array_equal(kept.frames.beads[0], start)


class HostWaits(TorchDispatchMode):
    """Counts operations that make a GPU wait for the host, or the host for it."""

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        names = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "is_nonzero")
        self.n += func.overloadpacket.__name__ in names
        return func(*args, **(kwargs or {}))


def test_no_host_round_trip_within_a_block():
    """Ten or a hundred steps, with exchange, restraints and frames: as many round trips."""
    waits = []
    for n_steps in (10, 100):
        wells = Wells(4)
        sampler = BatchedLangevin(
            wells,
            **EAGER,
            seed=0,
            temperatures_K=[300, 400],
            exchange_every=2,
            restraints=[DistanceRestraint([0, 1], 1.0, 0.1)],
        )
        sampler.run(np.ones((4, 2, 3)), 0)
        with HostWaits() as mode:
            sampler.run(None, n_steps, every=5)
        assert wells.n_calls >= 1.5 * n_steps
        waits.append(mode.n)
    assert waits[0] == waits[1]


def test_output_and_inputs(force_field, ala2_beads):
    beads = torch.from_numpy(ala2_beads[:2].copy())
    options = {**SETTINGS, "compiled": False}
    frames = BatchedLangevin(force_field, **options, seed=0).run(beads, 4, every=2)
    assert frames.beads.shape == (2, 2, 5, 3)
    assert frames.beads.dtype == np.float32
    assert frames.energies.dtype == frames.restraint_energies.dtype == np.float64
    energies = force_field(torch.from_numpy(frames.beads).double())
    np.testing.assert_allclose(frames.energies, energies.detach(), atol=1e-4)
    assert not frames.restraint_energies.any()
    assert frames.walkers.tolist() == [[0, 1]] * 2
    np.testing.assert_array_equal(beads, ala2_beads[:2])
    same = BatchedLangevin(force_field, **options, seed=0).run(beads, 4, every=2)
    assert_same(frames, same)
    other = BatchedLangevin(force_field, **options, seed=1).run(beads, 4, every=2)
    assert not np.allclose(frames.beads, other.beads)
    assert len(BatchedLangevin(force_field, **options, seed=1).run(beads, 0)) == 0


def test_stays_bounded_from_a_strained_start(ala2_map, ala2_prior, ala2_beads):
    model = ForceField(ala2_map, 300.0, ala2_prior, channels=4)
    settings = {**SETTINGS, "friction_per_ps": 50.0}
    sampler = BatchedLangevin(model, **settings, seed=0, compiled=False)
    frames = sampler.run(1.3 * ala2_beads[:8], 300, every=50)
    bonds = np.linalg.norm(np.diff(frames.beads[1:], axis=2), axis=-1)
    assert ((bonds > 1.1) & (bonds < 1.9)).all()


def test_refuses(force_field, ala2_beads):
    with pytest.raises(ValueError, match="free energy at 300"):
        BatchedLangevin(force_field, **EAGER, seed=0, temperature_K=310)
    with pytest.raises(ValueError, match="free energy at 300"):
        BatchedLangevin(force_field, **EAGER, seed=0, temperatures_K=[300, 310])
    with pytest.raises(ValueError, match="not both"):
        BatchedLangevin(force_field, **EAGER, seed=0, temperature_K=300, temperatures_K=[300])
    with pytest.raises(ValueError, match="positive"):
        BatchedLangevin(force_field, timestep_fs=0, friction_per_ps=1, seed=0)
    sampler = BatchedLangevin(force_field, **EAGER, seed=0, temperature_K=300)
    for continued in (lambda: sampler.run(None, 1), sampler.state_dict, sampler.exchange_report):
        with pytest.raises(ValueError, match="no state yet"):
            continued()
    with pytest.raises(ValueError, match="multiple"):
        sampler.run(ala2_beads[:1], 3, every=2)
    with pytest.raises(ValueError, match="shape"):
        sampler.run(ala2_beads[0], 1)
    with pytest.raises(ValueError, match="2 replicas given, but there are 1 seeds"):
        BatchedLangevin(force_field, **EAGER, seed=[1]).run(ala2_beads[:2], 1)
    with pytest.raises(ValueError, match="2 replicas given to an evaluator of 3"):
        BatchedLangevin(Wells(3), **EAGER, seed=1).run(np.zeros((2, 2, 3)), 1)
    with pytest.raises(ValueError, match=r"box must have shape \(3, 3\) or \(1, 3, 3\)"):
        BatchedLangevin(Wells(1), **EAGER, seed=1, box=np.ones(3)).run(np.zeros((1, 2, 3)), 1)
    beads = ala2_beads[:3].copy()
    beads[1, 2, 0] = np.nan
    with pytest.raises(ValueError, match=r"bead 2 \(CA\) of replica 1 starts at \[nan"):
        sampler.run(beads, 4, every=2)
    beads[1, 2] = beads[1, 4]
    with pytest.raises(ValueError, match="beads 2 and 4 of frame 1 are at the same place"):
        BatchedLangevin(force_field, **EAGER, seed=0).run(beads, 4, every=2)


class InBox(Wells):
    """A spring by the nearest image in a cubic box."""

    def forward(self, beads, box=None):
        self.boxes = box
        length = box[0, 0]
        shift = torch.zeros_like(beads)
        shift[:, 1] = ((beads[:, 0] - beads[:, 1]) / length).round() * length
        return super().forward(beads + shift)


def test_periodic_box():
    """The box reaches the evaluator and the frames; positions are not wrapped."""
    box = 5.0 * np.eye(3)
    start = np.zeros((2, 2, 3))
    start[:, 1, 0] = 4.9  # 0.1 Å from the other's image
    wells = InBox(2)
    sampler = BatchedLangevin(wells, **EAGER, seed=0, box=box)
    frames = sampler.run(start, 200, every=10)
    np.testing.assert_array_equal(wells.boxes, box)
    np.testing.assert_array_equal(frames.box, box)
    start[:, 1, 0] = -0.1
    free = BatchedLangevin(Wells(2), **EAGER, seed=0).run(start, 200, every=10)
    free.beads[:, :, 1, 0] += 5.0
    np.testing.assert_allclose(frames.beads, free.beads, atol=1e-9)
