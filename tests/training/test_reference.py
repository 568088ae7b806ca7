"""Reference data: reading with units and errors, and generation that survives interruption."""

import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import openmm
import pytest
from ase import units
from MDAnalysis import Universe, Writer

from ccg_mda.potential import OpenMMPotential
from ccg_training import generate as generation
from ccg_training.config import Config
from ccg_training.reference import (
    ReferenceData,
    ReferenceDataError,
    read_npz,
    read_trajectory,
    reference_data,
)

EXAMPLE = Path(__file__).parents[2] / "examples" / "alanine_dipeptide"
KJ = units.kJ / units.mol


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    return ReferenceData(
        rng.normal(size=(400, 4, 3)),
        rng.normal(size=(400, 4, 3)),
        rng.normal(size=400),
        np.repeat([0, 1], 200),
        np.tile(np.arange(200.0), 2),
    )


@pytest.fixture
def molecule(tmp_path):
    """A four-atom PDB file and a Universe of 40 frames with forces."""
    rng = np.random.default_rng(1)
    universe = Universe.empty(4, trajectory=True, forces=True)
    positions = rng.normal(size=(40, 4, 3)).astype("f4")
    forces = rng.normal(size=(40, 4, 3)).astype("f4")
    universe.load_new(positions, forces=forces, dt=0.5)
    pdb = tmp_path / "molecule.pdb"
    names = ("C1", "C2", "C3", "C4")
    pdb.write_text(
        "".join(
            f"ATOM  {i + 1:5d}  {name:<3} MOL A   1    {i:8.3f}{0:8.3f}{0:8.3f}  1.00  0.00"
            "           C  \n"
            for i, name in enumerate(names)
        )
        + "END\n"
    )
    return pdb, universe


def write(universe, path):
    with Writer(str(path), universe.atoms.n_atoms) as out:
        for _ in universe.trajectory:
            out.write(universe.atoms)
    return path


def test_npz_round_trip(data, tmp_path):
    data.save(tmp_path / "a.npz")
    again = ReferenceData.load(tmp_path / "a.npz")
    for name in ("positions", "forces", "energy", "walker", "time_ps"):
        np.testing.assert_array_equal(getattr(again, name), getattr(data, name))
    bare = ReferenceData(data.positions)
    bare.save(tmp_path / "b.npz")
    assert ReferenceData.load(tmp_path / "b.npz").forces is None
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


def test_split_holds_out_every_tenth_block_of_every_walker(data):
    train, held = data.split(0.1)
    assert len(held) == 40
    assert len(train) == 360
    for walker in (0, 1):
        times = held.time_ps[held.walker == walker].astype(int)
        blocks = times // 2  # 200 frames in 100 blocks
        np.testing.assert_array_equal(np.unique(blocks), np.arange(4, 100, 10))
    assert set(map(bytes, train.positions)).isdisjoint(map(bytes, held.positions))


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.33, 0.45])
def test_split_holds_out_the_fraction_asked_for(data, fraction):
    assert len(data.split(fraction)[1]) == pytest.approx(400 * fraction, abs=4)


def test_wrong_shapes_and_frames_that_are_not_finite(data):
    with pytest.raises(ReferenceDataError, match="expected positions"):
        ReferenceData(np.zeros((3, 4)))
    with pytest.raises(ReferenceDataError, match=r"expected forces \(400, 4, 3\); got \(400, 3, 3"):
        ReferenceData(data.positions, data.forces[:, :3])
    bad = data.positions.copy()
    bad[17, 2, 1] = np.nan
    with pytest.raises(ReferenceDataError, match="frame 17 are not finite"):
        ReferenceData(bad)


def test_forces_of_a_trr_file_are_converted_once(molecule, tmp_path):
    pdb, universe = molecule
    data = read_trajectory(pdb, [write(universe, tmp_path / "t.trr")], stride=2)
    expected = np.array([ts.forces * KJ for ts in universe.trajectory])[::2]
    np.testing.assert_allclose(data.forces, expected, rtol=1e-5)
    np.testing.assert_allclose(data.time_ps, np.arange(0, 20, 1.0))
    assert data.positions.dtype == np.float64


def test_files_become_walkers_and_forces_may_come_beside(molecule, tmp_path, data):
    pdb, universe = molecule
    files = [write(universe, tmp_path / name) for name in ("a.xtc", "b.xtc")]
    positions = np.array([ts.positions for ts in universe.trajectory] * 2, float)
    forces = np.arange(positions.size, dtype=float).reshape(positions.shape)
    np.savez(tmp_path / "f.npz", forces=forces, positions=positions)
    read = read_trajectory(pdb, files, forces_file=tmp_path / "f.npz", stride=4)
    np.testing.assert_array_equal(read.walker, [0] * 10 + [1] * 10)
    np.testing.assert_array_equal(read.forces, forces[::4])
    np.savez(tmp_path / "f.npz", forces=forces, positions=positions + 1)
    with pytest.raises(ReferenceDataError, match="belong to other frames"):
        read_trajectory(pdb, files, forces_file=tmp_path / "f.npz")
    np.savez(tmp_path / "f.npz", forces=forces[:7])
    with pytest.raises(ReferenceDataError, match="forces for 7 frames"):
        read_trajectory(pdb, files, forces_file=tmp_path / "f.npz")
    data.save(tmp_path / "d.npz")
    with pytest.raises(ReferenceDataError, match="hold no forces"):
        read_trajectory(pdb, [tmp_path / "d.npz", files[0]])


def test_another_topology_is_an_error(molecule, tmp_path):
    pdb, _ = molecule
    other = Universe.empty(5, trajectory=True)
    np.savez(tmp_path / "n.npz", positions=np.zeros((20, 5, 3)))
    for file in (write(other, tmp_path / "t.xtc"), tmp_path / "n.npz"):
        with pytest.raises(ReferenceDataError, match="4"):
            read_trajectory(pdb, [file])


def test_a_truncated_file_is_an_error(molecule, tmp_path):
    pdb, universe = molecule
    path = write(universe, tmp_path / "t.trr")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ReferenceDataError, match="truncated"):
        read_trajectory(pdb, [path])


@pytest.mark.filterwarnings("ignore:No dimensions set", "ignore:DCDReader currently")
@pytest.mark.parametrize("suffix", ["xtc", "dcd"])
def test_readers_that_drop_a_partial_last_frame_give_the_whole_ones(molecule, tmp_path, suffix):
    pdb, universe = molecule
    path = write(universe, tmp_path / f"t.{suffix}")
    path.write_bytes(path.read_bytes()[:-20])
    data = read_trajectory(pdb, [path])
    source = np.array([ts.positions for ts in universe.trajectory])
    np.testing.assert_allclose(data.positions, source[:39], atol=0.0051)


def test_truncated_and_foreign_npz_files(data, tmp_path):
    path = tmp_path / "a.npz"
    data.save(path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ReferenceDataError, match="truncated"):
        ReferenceData.load(path)
    np.savez(path, coords=np.zeros(3))
    with pytest.raises(ReferenceDataError, match="it holds: coords"):
        ReferenceData.load(path)


# --- generation -------------------------------------------------------------------------------


def harmonic():
    """Two atoms of 12 Da on a spring of 1000 kJ/mol/nm^2 around 0.2 nm."""
    system = openmm.System()
    for _ in range(2):
        system.addParticle(12.0)
    bond = openmm.HarmonicBondForce()
    bond.addBond(0, 1, 0.2, 1000.0)
    system.addForce(bond)
    return OpenMMPotential(system)


START = np.array([[0.0, 0, 0], [2.5, 0, 0]])
SHORT = dict(time_ns=0.012, save_every_fs=20.0, timestep_fs=2.0, equilibration_ps=1.0, seed=3)


def test_generated_frames_follow_the_boltzmann_distribution(tmp_path):
    seen = []
    options = SHORT | dict(time_ns=2.0, save_every_fs=200.0, timestep_fs=2.0)
    data = generation.generate(
        harmonic(), START, 300.0, tmp_path, tick=lambda *x: seen.append(x), **options
    )
    assert len(data) == 10000
    assert seen[-1] == (10000, 10000)
    k = 1000.0 * KJ / 100  # eV/Å²
    apart = data.positions[:, 1] - data.positions[:, 0]
    r = np.linalg.norm(apart, axis=1)
    np.testing.assert_allclose(data.energy, 0.5 * k * (r - 2.0) ** 2, atol=1e-8)
    np.testing.assert_allclose(
        data.forces[:, 0], (k * (r - 2.0) / r)[:, None] * apart, atol=1e-8, rtol=1e-6
    )
    kT = units.kB * 300
    grid = np.linspace(0.5, 4, 4000)
    weight = grid**2 * np.exp(-0.5 * k * (grid - 2) ** 2 / kT)
    assert r.mean() == pytest.approx((grid * weight).sum() / weight.sum(), abs=0.02)
    np.testing.assert_allclose(data.time_ps[:3], [0.2, 0.4, 0.6])


def test_two_runs_agree_and_walkers_and_seeds_differ(tmp_path):
    runs = [
        generation.generate(harmonic(), START, 300.0, tmp_path / name, **SHORT | seed)
        for name, seed in (("a", {}), ("b", {}), ("c", {"seed": 4}))
    ]
    np.testing.assert_array_equal(runs[0].positions, runs[1].positions)
    assert np.abs(runs[0].positions - runs[2].positions).min() > 0
    first, second = np.split(runs[0].positions, 2)
    assert np.abs(first - second).min() > 0


def test_a_chunk_of_another_plan_is_not_reused(tmp_path):
    generation.generate(harmonic(), START, 300.0, tmp_path, **SHORT)
    other = generation.generate(harmonic(), START, 350.0, tmp_path, **SHORT)
    fresh = generation.generate(harmonic(), START, 350.0, tmp_path / "fresh", **SHORT)
    np.testing.assert_array_equal(other.positions, fresh.positions)


def _generate(directory):
    options = SHORT | dict(time_ns=0.24)
    return generation.generate(harmonic(), START, 300.0, directory, **options)


def test_a_killed_run_continues_to_the_same_bits(tmp_path):
    whole = _generate(tmp_path / "whole")
    process = multiprocessing.get_context("spawn").Process(
        target=_generate, args=(tmp_path / "killed",)
    )
    process.start()
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "killed").glob("*.npz"))) < 8 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.join()
    for _ in range(200):  # walkers notice that their parent is gone, and stop
        count = len(os.listdir(tmp_path / "killed"))
        time.sleep(0.3)
        if len(os.listdir(tmp_path / "killed")) == count:
            break
    assert 8 <= len(list((tmp_path / "killed").glob("*.npz"))) < 26
    np.testing.assert_array_equal(_generate(tmp_path / "killed").positions, whole.positions)


def test_errors_of_generation(tmp_path):
    with pytest.raises(ReferenceDataError, match="not a multiple"):
        generation.generate(harmonic(), START, 300.0, tmp_path, **SHORT | {"save_every_fs": 21.0})
    with pytest.raises(ReferenceDataError, match="at least 12"):
        generation.generate(harmonic(), START, 300.0, tmp_path, **SHORT | {"time_ns": 1e-5})
    options = SHORT | dict(timestep_fs=2000.0, save_every_fs=2e5, time_ns=50.0)
    with pytest.raises(ReferenceDataError, match="lower timestep_fs"):
        generation.generate(harmonic(), START, 300.0, tmp_path, **options)


def test_chunks_are_written_whole(tmp_path):
    generation.generate(harmonic(), START, 300.0, tmp_path, **SHORT)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 26
    assert all("positions" in read_npz(file) for file in files)


def test_reference_data_of_a_configuration_are_made_once(tmp_path):
    text = (EXAMPLE / "cycle.toml").read_text()
    text = text.replace("alanine_dipeptide.pdb", str(EXAMPLE / "alanine_dipeptide.pdb"))
    text = text.replace("time_ns = 8.0", "time_ns = 0.0024\nequilibration_ps = 0.5")
    (tmp_path / "cycle.toml").write_text(text)
    config = Config.load(tmp_path / "cycle.toml")
    seen = []
    data = reference_data(config, tmp_path, lambda done, total: seen.append((done, total)))
    assert data.positions.shape == (24, 22, 3)
    assert seen[-1] == (24, 24)
    potential = OpenMMPotential.from_pdb(config.system.topology, config.potential.forcefield)
    energy, forces = potential(data.positions)
    np.testing.assert_allclose(data.energy, energy, atol=1e-6)
    np.testing.assert_allclose(data.forces, forces, atol=1e-5)
    assert not (tmp_path / "reference").exists()
    again = reference_data(config, tmp_path, lambda *_: pytest.fail("generated again"))
    np.testing.assert_array_equal(again.positions, data.positions)


def test_a_trajectory_in_a_configuration_is_read(tmp_path, molecule):
    _, universe = molecule
    write(universe, tmp_path / "t.trr")
    (tmp_path / "cycle.toml").write_text(
        '[system]\ntopology = "molecule.pdb"\n[mapping]\npreset = "heavy"\n'
        '[reference]\nsource = "trajectory"\nfiles = ["t.trr"]\nstride = 5\n'
    )
    data = reference_data(Config.load(tmp_path / "cycle.toml"), tmp_path / "run")
    assert (len(data), data.n_atoms) == (8, 4)
    assert data.forces is not None
