"""Bead dynamics sample what they should, resume exactly, and the states chosen are worth it."""

import MDAnalysis as mda
import numpy as np
import pytest
import torch
from ase.calculators.calculator import CalculatorSetupError
from MDAnalysis.lib import distances

from ccg_ase.calculator import CGCalculator
from ccg_ase.energies import bead_energies
from ccg_ase.forcefield import ForceField
from ccg_ase.mapping import CGMap
from ccg_ase.topology import Topology
from ccg_ase.torsion_map import dihedral_angles
from ccg_ase.units import thermal_energy
from ccg_training.sampling import ase_bead_dynamics
from ccg_training.states import (
    beyond,
    choose_states,
    committee_spread,
    internal_coordinates,
)

KT = thermal_energy(300.0)


def chain(n):
    bonds = [(i, i + 1) for i in range(n - 1)]
    return Topology(names=tuple("ABCDEFGH"[:n]), masses=np.full(n, 40.0), bonds=bonds)


@pytest.fixture(scope="module")
def beads():
    """A zigzag of four beads, shaken."""
    zigzag = np.array([[0.0, 0, 0], [3.0, 2.2, 0], [6.0, 0, 0], [9.0, 2.2, 0.0]])
    return zigzag + np.random.default_rng(0).normal(size=(200, 4, 3)) * 0.1


@pytest.fixture(scope="module")
def force_field(beads):
    """A fresh force field: its network is silent, so that it is its prior, known exactly."""
    cg_map = CGMap.from_slices(chain(4), range(4))
    with torch.random.fork_rng():
        return ForceField.from_data(cg_map, 300.0, beads, channels=2, l_max=0, n_layers=1)


# -------------------------------------------------------------- dynamics


def moments(log_density, grid):
    p = np.exp(log_density - log_density.max())
    mean = (grid * p).sum() / p.sum()
    return mean, ((grid - mean) ** 2 * p).sum() / p.sum()


@pytest.mark.parametrize("driver", ["LangevinBAOAB", "Langevin"])
def test_samples_the_ensemble_of_the_force_field(force_field, beads, driver, tmp_path):
    frames = ase_bead_dynamics(
        force_field,
        beads[:150],
        tmp_path,
        n_steps=400,
        save_every=20,
        driver=driver,
        timestep_fs=5.0,
        friction_per_ps=20.0,
    )
    assert frames.shape == (20, 150, 4, 3)
    assert frames.dtype == np.float32
    found = internal_coordinates(frames[8:], force_field.cg_map.beads)
    config = force_field.prior.config["molecules"][0]
    r = np.linspace(1, 8, 4001)
    c = np.linspace(-1, 1, 4001)
    exact = [
        *(
            moments(2 * np.log(r) - k * (r - r0) ** 2 / (2 * KT), r)
            for _, _, r0, k in config["bonds"]
        ),
        *(moments(-k * (c - c0) ** 2 / (2 * KT), c) for *_, c0, k in config["angles"]),
    ]
    measured = np.concatenate([found.bonds, np.cos(found.angles)], axis=-1)
    per_replica = measured.mean(0)
    mean, error = per_replica.mean(0), per_replica.std(0, ddof=1) / np.sqrt(150)
    for k, (exact_mean, exact_variance) in enumerate(exact):
        assert abs(mean[k] - exact_mean) < 4.5 * error[k]
        assert measured[..., k].var() == pytest.approx(exact_variance, rel=0.15)


def test_interrupted_and_resumed_equals_uninterrupted(force_field, beads, tmp_path, monkeypatch):
    options = {"n_steps": 70, "save_every": 5, "saves_per_chunk": 4, "seed": 3}
    calls = []
    whole = ase_bead_dynamics(
        force_field, beads[:3], tmp_path / "a", **options, progress=lambda *c: calls.append(c)
    )
    assert [(done, total) for done, total, _ in calls] == [(20, 70), (40, 70), (60, 70), (70, 70)]
    assert set(calls[0][2]) == {"temperature_K", "energy_eV"}

    evaluate, budget = CGCalculator.calculate, iter(range(50))

    def stops(self, *args, **kwargs):
        if next(budget, None) is None:
            raise KeyboardInterrupt
        return evaluate(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(CGCalculator, "calculate", stops)
        with pytest.raises(KeyboardInterrupt):
            ase_bead_dynamics(force_field, beads[:3], tmp_path / "b", **options)
        assert len(list((tmp_path / "b").glob("chunk_*.npz"))) == 2
    resumed = ase_bead_dynamics(force_field, beads[:3], tmp_path / "b", **options)
    np.testing.assert_array_equal(resumed, whole)

    monkeypatch.setattr(CGCalculator, "calculate", lambda *a, **k: pytest.fail("ran again"))
    np.testing.assert_array_equal(
        ase_bead_dynamics(force_field, beads[:3], tmp_path / "a", **options), whole
    )


def test_another_run_in_the_same_directory_is_refused(force_field, beads, tmp_path):
    options = {"n_steps": 2, "save_every": 1}
    first = ase_bead_dynamics(force_field, beads[:2], tmp_path / "a", seed=0, **options)
    other = ase_bead_dynamics(force_field, beads[:2], tmp_path / "b", seed=1, **options)
    assert not np.array_equal(first, other)
    with pytest.raises(ValueError, match="seed: 0 -> 1"):
        ase_bead_dynamics(force_field, beads[:2], tmp_path / "a", seed=1, **options)
    with pytest.raises(ValueError, match="beads"):
        ase_bead_dynamics(force_field, beads[1:3], tmp_path / "a", seed=0, **options)


@pytest.mark.filterwarnings("ignore:DCDReader currently:DeprecationWarning")  # MDAnalysis' own
def test_mdanalysis_reads_the_trajectory(force_field, beads, tmp_path):
    frames = ase_bead_dynamics(
        force_field, beads[:2], tmp_path, n_steps=12, save_every=4, timestep_fs=2.5
    )
    u = mda.Universe.empty(4, trajectory=False)
    u.load_new(str(tmp_path / "beads.dcd"))
    read = np.array([ts.positions for ts in u.trajectory]).reshape(2, 3, 4, 3)
    np.testing.assert_array_equal(read, np.moveaxis(frames, 1, 0))
    assert u.trajectory.dt == pytest.approx(0.01, rel=1e-5)
    assert np.abs(frames.mean(2)).max() < 1e-5


def test_arguments_that_do_not_fit_are_refused(force_field, beads, tmp_path):
    good = {"n_steps": 4, "save_every": 2}
    for changed, message in (
        ({"save_every": 3}, "must divide"),
        ({"n_steps": 0}, "must divide"),
        ({"driver": "Verlet"}, "LangevinBAOAB"),
    ):
        with pytest.raises(ValueError, match=message):
            ase_bead_dynamics(force_field, beads[:2], tmp_path / "x", **(good | changed))
    with pytest.raises(ValueError, match="replicas, 4, 3"):
        ase_bead_dynamics(force_field, beads[0], tmp_path / "x", **good)
    with pytest.raises(CalculatorSetupError, match="310"):
        ase_bead_dynamics(force_field, beads[:2], tmp_path / "x", temperature_K=310.0, **good)
    assert not (tmp_path / "x").exists()


# ---------------------------------------------------------------- states


def test_internal_coordinates_agree_with_mdanalysis():
    topology = chain(6)
    x = np.random.default_rng(1).normal(size=(5, 7, 6, 3)) * 2
    found = internal_coordinates(x, topology)
    for value, terms, reference in (
        (found.bonds, topology.bonds, distances.calc_bonds),
        (found.angles, topology.angles(), distances.calc_angles),
        (found.dihedrals, topology.dihedrals(), distances.calc_dihedrals),
    ):
        assert value.shape == (5, 7, len(terms))
        sites = [x[..., column, :].reshape(-1, 3) for column in terms.T]
        expected = reference(*(np.ascontiguousarray(site, np.float32) for site in sites))
        np.testing.assert_allclose(value.ravel(), expected, atol=2e-5)
    mirrored = internal_coordinates(x * [1, 1, -1], topology)
    np.testing.assert_allclose(mirrored.dihedrals, -found.dihedrals)


def two_basins(n, rare, rng):
    """Four-bead chains near dihedrals -60° (common) and +60° (a share `rare`); and the angle."""
    sign = np.where(rng.random(n) < rare, 1.0, -1.0)
    phi = sign * np.pi / 3 + 0.2 * rng.normal(size=n)
    x = np.zeros((n, 4, 3))
    x[:, 0], x[:, 2], x[:, 3, 0] = [0, 3.0, 0], [4.0, 0, 0], 4.0
    x[:, 3, 1], x[:, 3, 2] = 3 * np.cos(phi), 3 * np.sin(phi)
    return x + 0.02 * rng.normal(size=x.shape), phi


def test_rare_basin_gets_its_share():
    rng = np.random.default_rng(2)
    topology = chain(4)
    x, _ = two_basins(5000, 0.01, rng)
    rare = dihedral_angles(x, topology.dihedrals())[:, 0] > 0
    if not 0.003 < rare.mean() < 0.03:
        rare = ~rare
    visited = choose_states(x, 200, topology, diverse=0.0)
    assert rare[visited].mean() < 0.04
    mixed = choose_states(x, 200, topology)
    assert 0.08 < rare[mixed].mean() < 0.5
    assert len(np.unique(mixed)) == 200
    np.testing.assert_array_equal(mixed, np.sort(mixed))
    np.testing.assert_array_equal(mixed, choose_states(x, 200, topology))
    assert not np.array_equal(mixed, choose_states(x, 200, topology, seed=1))
    # What has labels already isn't asked for again.
    informed = choose_states(x, 60, topology, labelled=x[rare])
    assert rare[informed].sum() < 0.5 * rare[choose_states(x, 60, topology)].sum()


def test_uncertain_states_follow_spread_times_density():
    """Shares of three groups, by how often they were visited times how uncertain they are."""
    rng = np.random.default_rng(5)
    topology, n = chain(4), 6000
    x, _ = two_basins(n, 0.2, rng)
    group = np.digitize(rng.random(n), [0.6, 0.9])
    spread = np.array([1.0, 2.0, 6.0])[group]
    shares = np.array([0.6, 0.6, 0.6]) / 1.8
    found = np.zeros(3)
    for seed in range(20):
        chosen = choose_states(
            x, 60, topology, uncertain=1.0, diverse=0.0, spread=spread, seed=seed
        )
        assert len(np.unique(chosen)) == 60
        found += np.bincount(group[chosen], minlength=3)
    assert np.abs(found / found.sum() - shares).max() < 4 * np.sqrt(shares[0] * 0.67 / 1200)
    # One member tells nothing: farthest points instead, as many.
    same = {"uncertain": 0.5, "diverse": 0.25, "seed": 3}
    np.testing.assert_array_equal(
        choose_states(x, 40, topology, **same), choose_states(x, 40, topology, diverse=0.75, seed=3)
    )
    certain = np.where(np.arange(n) < 10, 1.0, 0.0)
    chosen = choose_states(x, 20, topology, uncertain=0.5, diverse=0.0, spread=certain)
    assert (chosen < 10).sum() >= 10
    for wrong in ({"uncertain": 0.6, "diverse": 0.6}, {"uncertain": 0.5, "spread": -spread}):
        with pytest.raises(ValueError, match=r"at most 1 together|aren't negative"):
            choose_states(x, 20, topology, **wrong)


def test_spread_of_a_committee(ala2_map, ala2_beads):
    """Against the calculator, one state at a time; none from a single member."""
    members = []
    for seed in (1, 2, 3):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            members.append(ForceField.from_data(ala2_map, 300.0, ala2_beads, channels=4))
            torch.nn.init.normal_(members[-1].members[0].out.weight, std=0.3)
    assert committee_spread(members[0], ala2_beads) is None
    committee = ForceField.committee(members)
    states = ala2_beads[:12]
    energies = np.array([bead_energies(member, states)[0] for member in members])
    energy = (energies - energies.mean(1, keepdims=True)).std(0)
    calculator = CGCalculator(committee, compiled=False)
    atoms, force = calculator.atoms(), []
    for beads in states:
        atoms.positions = beads
        force.append(np.sqrt((calculator.spread(atoms)["forces"] ** 2).mean()))
    expected = (energy / energy.mean() + force / np.mean(force)) / 2
    np.testing.assert_allclose(committee_spread(committee, states), expected, rtol=1e-3)


def test_farthest_points_spread_evenly():
    """On a ring visited densely on one side, the gaps between diverse states are alike."""
    rng = np.random.default_rng(3)
    topology = chain(4)
    x, _ = two_basins(3000, 0.0, rng)
    phi = np.concatenate([rng.normal(0, 0.3, 2700), rng.uniform(-np.pi, np.pi, 300)])
    x[:, 3] = np.stack([np.full(3000, 4.0), 3 * np.cos(phi), 3 * np.sin(phi)], 1)
    chosen = choose_states(x, 24, topology, diverse=1.0)
    gaps = np.diff(np.sort(dihedral_angles(x[chosen], topology.dihedrals())[:, 0]))
    assert gaps.max() < 4 * 2 * np.pi / 24
    assert gaps.min() > 0.2 * 2 * np.pi / 24


def test_states_beyond_all_that_is_known():
    """On a ring, of which one side is known: by the angle, whatever else is shaken."""
    rng = np.random.default_rng(6)
    topology = chain(4)
    x, _ = two_basins(5000, 0.0, rng)
    known, usual = rng.uniform(-1, 1, (2, 2000))
    phi = np.concatenate([known, usual, rng.uniform(-np.pi, np.pi, 1000)])
    x[:, 3] = np.stack([np.full(5000, 4.0), 3 * np.cos(phi), 3 * np.sin(phi)], 1)
    known, usual, asked = x[:2000], x[2000:4000], x[4000:]
    far = np.abs(dihedral_angles(asked, topology.dihedrals())[:, 0])
    found = beyond(asked, usual, known, topology)
    assert found[far > 1.25].all()
    assert found[far < 0.9].mean() < 0.02
    assert beyond(usual, usual, known, topology).mean() == pytest.approx(0.01, abs=0.001)
    assert not beyond(x[:3, :1], x[:5, :1], x[:5, :1], chain(1)).any()  # one bead has no shape


def test_edge_cases_of_the_choice():
    x = np.random.default_rng(4).normal(size=(12, 3, 3))
    np.testing.assert_array_equal(choose_states(x, 12, chain(3)), np.arange(12))
    same = np.repeat(x[:1], 12, axis=0)
    assert len(np.unique(choose_states(same, 6, chain(3)))) == 6
    with pytest.raises(ValueError, match="n_states"):
        choose_states(x, 13, chain(3))
    with pytest.raises(ValueError, match="diverse"):
        choose_states(x, 3, chain(3), diverse=1.5)
