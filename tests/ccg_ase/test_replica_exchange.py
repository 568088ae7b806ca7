import numpy as np
import pytest
import torch
from wells import DoubleWell

from ccg_ase import BatchedLangevin, thermal_energy
from ccg_ase.replica_exchange import ReplicaExchange, geometric_ladder

LADDER = geometric_ladder(300.0, 1500.0, 5)
SETTINGS = {"timestep_fs": 10.0, "friction_per_ps": 2.0, "dtype": torch.float64}
N_LADDERS = 40


def start(n_replicas):
    """All in the left well."""
    beads = np.zeros((n_replicas, 1, 3))
    beads[:, 0, 0] = -1.0
    return beads


def expectations(well, temperatures_K):
    """Populations of x > 0 and mean energies at all temperatures, by quadrature."""
    x = torch.linspace(-3, 3, 20_001, dtype=torch.float64)[:, None]
    kT = torch.tensor([thermal_energy(T) for T in temperatures_K])
    energy = well.along(x)
    weight = torch.exp(-energy / kT)
    mean = (weight * energy).sum(0) / weight.sum(0) + kT  # y and z hold kT / 2 each
    return (weight * (x > 0)).sum(0) / weight.sum(0), mean


@pytest.mark.parametrize(
    "tilt",
    [lambda T: 0.03 + 0 * T, lambda T: 0.04 * (T / 300 - 2)],
    ids=["one energy", "an energy for each temperature"],
)
def test_every_rung_samples_its_own_ensemble(tilt):
    """Populations and energies at all temperatures, with walkers that cross as plain ones don't."""
    temperatures = np.tile(LADDER, N_LADDERS)
    sampler = BatchedLangevin(
        DoubleWell(temperatures, tilt),
        **SETTINGS,
        seed=5,
        temperatures_K=LADDER,
        exchange_every=20,
    )
    sampler.run(start(len(temperatures)), 3000, every=3000)
    frames = sampler.run(None, 6000, every=20)
    np.testing.assert_array_equal(frames.temperatures_K, temperatures)
    right, mean_energy = expectations(DoubleWell(LADDER, tilt), LADDER)
    for seen, expected in (
        (frames.beads[:, :, 0, 0] > 0, right),
        (frames.energies, mean_energy),
    ):
        by_ladder = seen.mean(0).reshape(N_LADDERS, len(LADDER))
        error = by_ladder.std(0, ddof=1) / np.sqrt(N_LADDERS)
        assert (np.abs(by_ladder.mean(0) - expected.numpy()) < 4 * error).all()
        assert (error < 0.08 * expected.numpy() + 0.002).all()
    # Velocities are thermal at each rung, exchanged or not.
    velocities = []
    for _ in range(20):
        sampler.run(None, 50, every=50)
        velocities.append(sampler.state_dict()["point"]["velocities"])
    squares = torch.stack(velocities).square().view(-1, N_LADDERS, len(LADDER), 3).mean((0, 1, 3))
    np.testing.assert_allclose(12.0 * squares, [thermal_energy(T) for T in LADDER], rtol=0.1)
    report = sampler.exchange_report()
    assert (report.attempts == [N_LADDERS * 250] * 4).all()
    assert ((report.acceptance > 0.1) & (report.acceptance < 0.95)).all()
    assert report.round_trips.shape == (len(temperatures),)
    assert report.round_trips.sum() > N_LADDERS
    # Walkers stay in their ladder, one on each rung.
    walkers = frames.walkers.reshape(-1, N_LADDERS, len(LADDER))
    own = np.arange(len(temperatures)).reshape(N_LADDERS, len(LADDER))
    np.testing.assert_array_equal(np.sort(walkers, axis=-1), np.broadcast_to(own, walkers.shape))


def test_plain_dynamics_does_not_cross():
    """Without exchange nobody crosses the barrier: the test above tests something."""
    well = DoubleWell([300.0] * N_LADDERS)
    frames = BatchedLangevin(well, **SETTINGS, seed=5).run(start(N_LADDERS), 4000, every=20)
    assert (frames.beads[:, :, 0, 0] > 0.5).mean() < 0.01


def test_a_ladder_alone_follows_the_same_path():
    """Two ladders side by side: the second one's path is that of it alone."""
    settings = {**SETTINGS, "temperatures_K": LADDER, "exchange_every": 10}
    both = BatchedLangevin(DoubleWell(np.tile(LADDER, 2)), **settings, seed=1)
    frames = both.run(start(10), 600, every=10)
    alone = BatchedLangevin(DoubleWell(LADDER), **settings, seed=both.seeds[5:])
    path = alone.run(start(5), 600, every=10)
    np.testing.assert_array_equal(path.beads, frames.beads[:, 5:])
    np.testing.assert_array_equal(path.walkers, frames.walkers[:, 5:] - 5)
    assert (path.walkers != np.arange(5)).any()


def test_frames_by_walker_are_continuous():
    """A walker's path has no leaps, a rung's path has."""
    sampler = BatchedLangevin(
        DoubleWell(np.tile(LADDER, 8)),
        **SETTINGS,
        seed=2,
        temperatures_K=LADDER,
        exchange_every=10,
    )
    frames = sampler.run(start(40), 2000)
    leap = 0.6  # Å, beyond six times a step's thermal move at 1500 K
    assert np.abs(np.diff(frames.by_walker(), axis=0)).max() < leap
    assert np.abs(np.diff(frames.beads, axis=0)).max() > leap


def test_round_trips_and_acceptance_by_hand():
    """Three rungs; every exchange is accepted, or none, by the random number given."""

    class Nothing:
        def at(self, beads, velocities):
            return point._replace(beads=beads, velocities=velocities)

    from collections import namedtuple
    from types import SimpleNamespace

    fields = {
        "beads": torch.arange(3.0, dtype=torch.float64)[:, None, None].repeat(1, 1, 3),
        "velocities": torch.ones(3, 1, 3, dtype=torch.float64),
        "forces": torch.zeros(3, 1, 3, dtype=torch.float64),
        "site_energies": torch.zeros(3, 1, dtype=torch.float64),
        "restraint_energies": torch.zeros(3, dtype=torch.float64),
        "energies": torch.zeros(3, dtype=torch.float64),
    }
    point = namedtuple("Point", fields)(**fields)
    live = SimpleNamespace(**fields)
    exchange = ReplicaExchange(torch.tensor([300.0, 400.0, 500.0], dtype=torch.float64), 3)
    accept, refuse = torch.full((3,), -1e-9), torch.full((3,), 0.0)
    walkers = []
    for number, uniforms in enumerate([accept] * 6 + [refuse] * 2):
        exchange.attempt(number, live, Nothing(), uniforms.double())
        walkers.append(exchange.walkers.tolist())
    # Even attempts swap rungs 0 and 1, odd ones 1 and 2.
    assert walkers[:6] == [[1, 0, 2], [1, 2, 0], [2, 1, 0], [2, 0, 1], [0, 2, 1], [0, 1, 2]]
    assert walkers[6] == walkers[7] == [0, 1, 2]
    assert live.beads[:, 0, 0].tolist() == [0, 1, 2]
    np.testing.assert_allclose(live.velocities, 1.0, rtol=1e-12)
    report = exchange.report()
    assert report.attempts.tolist() == [4, 4]
    assert report.acceptance.tolist() == [0.75, 0.75]
    # Walker 0: up by attempt 1, down by attempt 4; the others began above the lowest rung, or
    # haven't been at the highest since.
    assert report.round_trips.tolist() == [1, 0, 0]


def test_ladders_that_cannot_be():
    well = DoubleWell(LADDER)
    for options, reason in (
        ({"temperatures_K": LADDER[::-1]}, "ascend"),
        ({"temperatures_K": [300.0]}, "two or more"),
        ({"temperature_K": 300.0}, "two or more"),
        ({"temperatures_K": [310.0, 400.0]}, "no rung of the ladder"),
        ({"temperatures_K": [300.0, np.nan]}, "positive numbers"),
    ):
        with pytest.raises(ValueError, match=reason):
            BatchedLangevin(well, **SETTINGS, seed=0, exchange_every=5, **options)
    sampler = BatchedLangevin(well, **SETTINGS, seed=0, temperatures_K=LADDER, exchange_every=5)
    with pytest.raises(ValueError, match="7 replicas are no multiple of the 5 temperatures"):
        sampler.run(start(7), 1)
    with pytest.raises(ValueError, match="a ladder needs"):
        BatchedLangevin.ladder(400, 300, 4)
    np.testing.assert_allclose(BatchedLangevin.ladder(200, 800, 3), [200, 400, 800])


def test_force_field_at_the_temperature_of_each_rung(ala2_map, ala2_prior, ala2_beads):
    """Within the trained range at each rung's own temperature, outside at the nearest one."""
    from ccg_ase import ForceField

    model = ForceField(
        ala2_map, 300.0, ala2_prior, temperatures_K=(280.0, 340.0), channels=4, n_layers=1
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in model.members.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    ladder = [280.0, 300.0, 340.0, 400.0]
    sampler = BatchedLangevin(
        model,
        timestep_fs=1.0,
        friction_per_ps=5.0,
        seed=0,
        temperatures_K=ladder,
        exchange_every=1,
        dtype=torch.float64,
        compiled=False,
    )
    frames = sampler.run(ala2_beads[[0] * 4], 20)
    assert (frames.walkers != np.arange(4)).any()
    at = torch.tensor([280.0, 300.0, 340.0, 340.0], dtype=torch.float64)
    model = model.double()
    expected = model(torch.from_numpy(frames.beads), temperature_K=at.expand(20, 4)).detach()
    np.testing.assert_allclose(frames.energies, expected, atol=1e-9)
    other = model(torch.from_numpy(frames.beads), temperature_K=300.0).detach()
    assert (other - expected)[:, [0, 2, 3]].abs().max() > 1e-3
