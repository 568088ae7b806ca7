import os
import pickle
import subprocess
import sys

import MDAnalysis as mda
import numpy as np
import pytest
import torch
from ase import units
from MDAnalysis.exceptions import NoDataError
from MDAnalysis.lib.mdamath import triclinic_vectors
from MDAnalysis.transformations import translate
from MDAnalysis.transformations.boxdimensions import set_dimensions
from molecules import N_FRAMES, PDB, GaussianBackmapper, dipeptide, slice_map
from systems import flow_of, system

from ccg_ase.checkpoint import save_model
from ccg_ase.units import thermal_energy
from ccg_mda.bead_sources import bead_universe
from ccg_mda.flow import Backmapper
from ccg_mda.potential import TorchPotential
from ccg_mda.readers import BeadReader
from ccg_mda.transformation import Backmap, backmap
from ccg_mda.universe import coarse_grain, universe_from
from ccg_mda.weights import log_weights


@pytest.fixture(scope="module")
def model():
    return GaussianBackmapper(slice_map())


@pytest.fixture(scope="module")
def u_cg(model):
    return coarse_grain(dipeptide(N_FRAMES), model.cg_map)


def harmonic(x):
    return 0.02 * (x[1:] - x[:-1]).square().sum()


@pytest.fixture
def potential():
    return TorchPotential(harmonic, 22)


def read(u, key=slice(None)):
    return np.array([ts.positions.copy() for ts in u.trajectory[key]])


def test_positions_and_log_prob(u_cg, model):
    u = backmap(u_cg, model, n_samples=2, seed=4)
    for ts in u.trajectory[::7]:
        beads = ts.data["beads"]
        np.testing.assert_array_equal(ts.positions[model.cg_map.bead_atoms], beads)
        cg_frame, sample = divmod(ts.frame, 2)
        rng = np.random.default_rng(np.random.SeedSequence([4, cg_frame, sample]))
        torch.set_num_threads(1)
        with torch.no_grad():
            positions, log_prob = model(
                torch.tensor(beads, dtype=torch.float64)[None]
            ).positions_and_log_prob_from(model.sample_noise(rng)[None])
        np.testing.assert_allclose(ts.positions, positions[0], atol=2e-6)
        assert ts.data["log_prob"] == pytest.approx(log_prob.item(), abs=1e-10)
        assert not ts.has_forces
        assert "log_weight" not in ts.data


def test_topology(u_cg, model):
    u = backmap(u_cg, model)
    reference = dipeptide()
    for key in ("names", "elements", "masses", "resnames", "resids", "segids"):
        np.testing.assert_array_equal(getattr(u.atoms, key), getattr(reference.atoms, key))
    np.testing.assert_array_equal(u.bonds.indices, reference.bonds.indices)


@pytest.mark.parametrize("prefetch", [1, 4, 16])
@pytest.mark.parametrize("n_samples", [1, 3])
def test_any_access_gives_the_same_bits(u_cg, model, prefetch, n_samples):
    options = {"prefetch": prefetch, "n_samples": n_samples, "seed": 1}
    frames = read(backmap(u_cg, model, **options))
    n = len(frames)
    mask = np.arange(n) % 4 == 1
    for key in (slice(None, None, -1), slice(2, None, 5), [9, 2, 2, 28], mask, slice(-2, None)):
        np.testing.assert_array_equal(read(backmap(u_cg, model, **options), key), frames[key])
    u = backmap(u_cg, model, **options)
    u.trajectory[11]
    for other in (u.copy(), pickle.loads(pickle.dumps(u)), u.copy().copy()):
        np.testing.assert_array_equal(other.atoms.positions, frames[11])
        np.testing.assert_array_equal(read(other, slice(5, 20, 2)), frames[5:20:2])
    np.testing.assert_array_equal(u.atoms.positions, frames[11])


def test_prefetch_changes_rounding_only(u_cg, model):
    np.testing.assert_allclose(
        read(backmap(u_cg, model, prefetch=1)), read(backmap(u_cg, model)), atol=1e-5
    )


def test_seeds_and_samples_differ(u_cg, model):
    frames = read(backmap(u_cg, model, n_samples=2))
    assert np.abs(frames[0] - frames[1]).max() > 0.1
    assert np.abs(frames - read(backmap(u_cg, model, n_samples=2, seed=1))).max() > 0.1
    np.testing.assert_allclose(frames[::2], read(backmap(u_cg, model)), atol=1e-5)


def test_model_calls_are_batched_and_bounded(u_cg):
    model = GaussianBackmapper(slice_map())
    u = backmap(u_cg, model, prefetch=10)
    for _ in range(2):
        read(u)
    assert model.n_rows == N_FRAMES  # three blocks, all kept for the second pass
    u = backmap(u_cg, model, prefetch=1)
    read(u)
    assert len(u.trajectory.transformations[0]._blocks) <= 4


def test_energy_forces_and_weight(u_cg, model, potential):
    u = backmap(u_cg, model, potential=potential)
    kT = thermal_energy(model.temperature_K)
    for ts in u.trajectory[3:6]:
        energy, forces = potential(ts.positions)
        assert ts.data["energy"] == pytest.approx(energy, rel=1e-5)
        np.testing.assert_allclose(u.atoms.forces, forces * units.mol / units.kJ, atol=1e-4)
        weight = -ts.data["energy"] / kT - ts.data["log_prob"]
        assert ts.data["log_weight"] == pytest.approx(weight, abs=1e-9)


def no_energy(x):
    return x.sum() * np.inf


def test_weights_at_another_temperature_of_the_model(u_cg, potential):
    frames = torch.tensor(dipeptide(N_FRAMES).trajectory.timeseries(order="fac"))
    flow = Backmapper.from_data(slice_map(), 300.0, frames, temperatures_K=(250.0, 450.0))
    hot = backmap(u_cg, flow, potential=potential, temperature_K=400.0, prefetch=1)
    for ts in hot.trajectory[::9]:
        placed = flow(torch.tensor(ts.data["beads"]).double()[None], temperature_K=400.0)
        noise = flow.sample_noise(np.random.default_rng([0, ts.frame, 0]))[None]
        with torch.no_grad():
            _, log_prob = placed.positions_and_log_prob_from(noise)
        assert ts.data["log_prob"] == pytest.approx(log_prob.item(), abs=1e-9)
        expected = -ts.data["energy"] / thermal_energy(400.0) - log_prob.item()
        assert ts.data["log_weight"] == pytest.approx(expected, abs=1e-8)
    with pytest.raises(ValueError, match="500 K was asked for"):
        backmap(u_cg, flow, temperature_K=500.0)


def test_clash_has_weight_zero(u_cg, model):
    ts = backmap(u_cg, model, potential=TorchPotential(no_energy, 22)).trajectory.ts
    assert ts.data["energy"] == np.inf
    assert ts.data["log_weight"] == -np.inf
    assert np.all(ts.forces == 0)


def test_beads_moved_by_an_earlier_transformation(u_cg, model):
    u = universe_from(model.cg_map.atoms)
    u.load_new(u_cg, format=BeadReader, cg_map=model.cg_map)
    u.trajectory.add_transformations(MoveBeads(), Backmap(model))
    for ts in u.trajectory[::6]:
        expected = u_cg.copy().trajectory[ts.frame].positions + np.float32(5)
        np.testing.assert_array_equal(ts.positions[model.cg_map.bead_atoms], expected)


class MoveBeads:
    def __call__(self, ts):
        ts.data["beads"] = ts.data["beads"] + np.float32(5)
        return ts


def test_potential_is_called_once_per_frame_read(u_cg, model, potential):
    u = backmap(u_cg, model, potential=potential)
    for k in (17, 17, 3):
        u.trajectory[k]
    assert potential.n_calls == 3  # frames 0 (at construction), 17 and 3


def test_weights_average_to_the_partition_function(model):
    """Atoms harmonic around their beads: Z(s) and its estimate agree for every s."""
    the_map, kT = model.cg_map, thermal_energy(300)
    u_cg = coarse_grain(dipeptide(2), the_map)
    stiffness = kT / 0.12**2

    def tethers(x):
        beads = x[the_map.bead_atoms][the_map.owner[model.placed]]
        return 0.5 * stiffness * (x[model.placed] - beads - offset).square().sum()

    still = GaussianBackmapper(the_map, sigma_A=0.118)
    with torch.no_grad():
        still.back.zero_()
    offset = 0.01
    u = backmap(u_cg, still, n_samples=400, potential=TorchPotential(tethers, 22))
    log_w = log_weights(u).reshape(2, 400)
    expected = still.n_dof / 2 * np.log(2 * np.pi * kT / stiffness)
    w = np.exp(log_w - expected)
    error = w.std(axis=1) / np.sqrt(400)
    assert np.all(error < 0.06)
    np.testing.assert_allclose(w.mean(axis=1), 1, atol=4 * error.max())


def test_log_weights_of_an_ensemble(u_cg, model, potential):
    u = backmap(u_cg, model, potential=potential)
    u.trajectory[5]
    plain = log_weights(u)
    assert u.trajectory.frame == 5
    free_energy = 0.01 * np.arange(N_FRAMES)
    shifted = log_weights(u, free_energy=lambda beads: free_energy, temperature_K=300)
    np.testing.assert_allclose(shifted - plain, free_energy / thermal_energy(300))
    with pytest.raises(NoDataError, match="potential"):
        log_weights(backmap(u_cg, model))


def test_h5md_keeps_weights(u_cg, model, potential, tmp_path):
    u = backmap(u_cg, model, potential=potential, n_samples=2)
    path = tmp_path / "atoms.h5md"
    u.atoms.write(str(path), frames=u.trajectory[::5])
    again = universe_from(model.cg_map.atoms, str(path))
    np.testing.assert_array_equal(log_weights(again), log_weights(u)[::5])
    for ts, expected in zip(again.trajectory, u.trajectory[::5], strict=True):
        for key in ("beads", "energy", "log_prob", "cg_frame", "sample"):
            np.testing.assert_array_equal(ts.data[key], expected.data[key])
        np.testing.assert_array_equal(ts.positions, expected.positions)
        np.testing.assert_allclose(ts.forces, expected.forces, rtol=1e-6)


@pytest.mark.parametrize("suffix", ["xtc", "dcd", "trr"])
@pytest.mark.filterwarnings("ignore:DCDReader currently makes independent timesteps")
@pytest.mark.filterwarnings("ignore:No dimensions set for current frame")
def test_trajectory_files(u_cg, model, suffix, tmp_path):
    u = backmap(u_cg, model)
    path = str(tmp_path / f"atoms.{suffix}")
    u.atoms.write(path, frames="all")
    again = universe_from(model.cg_map.atoms, path)
    np.testing.assert_allclose(read(again), read(u), atol=0.006 if suffix == "xtc" else 1e-5)
    if suffix != "dcd":  # which keeps no times but a fixed step
        times = [[ts.time for ts in universe.trajectory] for universe in (u, again)]
        np.testing.assert_allclose(*times, atol=1e-3)


def test_transformations_after_and_in_a_universe(u_cg, model):
    shift = np.array([1, 2, 3])
    moved = backmap(u_cg, model, transformations=[translate(shift)])
    np.testing.assert_allclose(read(moved), read(backmap(u_cg, model)) + shift, atol=1e-5)
    u = mda.Universe(
        PDB, u_cg, format=BeadReader, cg_map=model.cg_map, transformations=[Backmap(model)]
    )
    np.testing.assert_array_equal(read(u), read(backmap(u_cg, model)))
    u.transfer_to_memory()
    np.testing.assert_array_equal(read(u), read(backmap(u_cg, model)))


def test_one_transformation_serves_two_trajectories(model):
    placed = Backmap(model)
    for seed in (0, 1, 0):
        beads = coarse_grain(dipeptide(3, seed=seed), model.cg_map)
        u = universe_from(model.cg_map.atoms)
        u.load_new(beads, format=BeadReader, cg_map=model.cg_map)
        u.trajectory.add_transformations(placed)
        np.testing.assert_array_equal(read(u), read(backmap(beads, model)))


def test_threads_and_random_state_are_restored(u_cg, model):
    before = torch.get_num_threads(), torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    torch.set_num_threads(2)
    u = backmap(u_cg, model)
    read(u)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before[0])
    torch.testing.assert_close(torch.get_rng_state(), before[1])
    np.testing.assert_array_equal(np.random.get_state()[1], before[2])  # noqa: NPY002


def test_pickle_opens_no_files(u_cg, model):
    u = backmap(u_cg, model)
    from multiprocessing.reduction import ForkingPickler

    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    ForkingPickler.dumps(u)
    after = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert after == before
    assert not model.mix.is_shared()


def test_real_backmapper_from_a_file(u_cg, tmp_path):
    the_map = slice_map()
    frames = dipeptide(N_FRAMES).trajectory.timeseries(order="fac")
    backmapper = Backmapper.from_data(the_map, 300.0, torch.tensor(frames))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in backmapper.parameters():  # an untrained network ends in zeros
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.05 * noise)
    path = tmp_path / "model.ccg"
    save_model(path, cg_map=the_map, temperature_K=300.0, parts={"backmapper": backmapper})
    u = backmap(u_cg, path, n_samples=2)
    expected = read(u)
    assert np.isfinite(expected).all()
    np.testing.assert_array_equal(read(u, slice(None, None, -9)), expected[::-9])
    beads = u_cg.trajectory.timeseries(order="fac")
    np.testing.assert_array_equal(expected[::2][:, the_map.bead_atoms], beads)
    # The same atoms in another Python, which knows nothing but the files.
    np.save(tmp_path / "beads.npy", beads)
    subprocess.run([sys.executable, "-c", ANOTHER_PYTHON], cwd=tmp_path, check=True)
    np.testing.assert_array_equal(np.load(tmp_path / "atoms.npy"), expected[7])


ANOTHER_PYTHON = """
import numpy as np
from ccg_mda import backmap, bead_universe

beads = bead_universe(np.load("beads.npy"), "model.ccg", dt=2.0)
u = backmap(beads, "model.ccg", n_samples=2)
np.save("atoms.npy", u.trajectory[7].positions)
"""


def test_beads_in_another_order_are_found_by_name(u_cg, model):
    np.testing.assert_array_equal(
        read(backmap(u_cg.atoms[[3, 1, 4, 0, 2]], model)), read(backmap(u_cg, model))
    )


def test_errors(u_cg, model):
    with pytest.raises(ValueError, match=r"5 beads, the given AtomGroup has 4"):
        backmap(u_cg.atoms[:4], model)
    with pytest.raises(ValueError, match=r"holds at 300.* not at 310"):
        backmap(u_cg, model, temperature_K=310.0)
    with pytest.raises(ValueError, match="potential has 3 atoms, the model 22"):
        backmap(u_cg, model, potential=TorchPotential(harmonic, 3))
    with pytest.raises(ValueError, match="prefetch"):
        backmap(u_cg, model, prefetch=0)
    with pytest.raises(ValueError, match="non-negative"):
        backmap(u_cg, model, seed=-1)
    with pytest.raises(NoDataError, match="format=BeadReader"):
        dipeptide().trajectory.add_transformations(Backmap(model))


def test_broken_frames(model):
    source = dipeptide(3)
    source.trajectory.get_array()[2, 8] = np.nan
    u = backmap(coarse_grain(source, model.cg_map), model, prefetch=1)
    with pytest.raises(ValueError, match="frame 2 are NaN"):
        u.trajectory[2]
    flat = coarse_grain(dipeptide(1, dimensions=FLAT[None]), model.cg_map)
    with pytest.raises(ValueError, match="no periodic box"):
        backmap(flat, model)


FLAT = np.array([20.0, 20.0, 20.0, 60.0, 60.0, 170.0])
BOXES = np.array([[14.0, 15.0, 16.0, 90.0, 90.0, 90.0], [15.0, 15.0, 16.0, 80.0, 95.0, 75.0]])


@pytest.mark.parametrize("kind", ["two slices", "mass", "two dipeptides", "waters", "rigid waters"])
def test_in_a_box_molecules_come_out_whole_wherever_the_beads_lie(kind):
    flow = flow_of(kind)
    coarse = system(kind).coarse.numpy()[np.arange(6) % 3].astype(np.float32)
    dimensions = BOXES[np.arange(6) % 2]
    cells = np.stack([triclinic_vectors(box) for box in dimensions])
    rng = np.random.default_rng(0)
    turns = rng.integers(-2, 3, size=(6, coarse.shape[1], 3))
    wrapped = coarse + np.einsum("fbk,fkc->fbc", turns, cells).astype(np.float32)

    def read_all(beads, **options):
        u = backmap(
            bead_universe(beads, flow, dimensions=dimensions), flow, n_samples=2, seed=3, **options
        )
        values = [(ts.positions.copy(), ts.data["log_prob"]) for ts in u.trajectory]
        return u, *map(np.array, zip(*values, strict=True))

    u, positions, log_prob = read_all(wrapped)
    _, whole, expected = read_all(coarse)
    np.testing.assert_allclose(log_prob, expected, atol=1e-2)  # stiff, and float32 beads
    cells = np.repeat(cells, 2, axis=0)
    turns = np.einsum("fac,fck->fak", positions - whole, np.linalg.inv(cells))
    np.testing.assert_allclose(turns, np.round(turns), atol=1e-4)
    molecules = flow.cg_map.atoms.molecules
    first = np.unique(molecules, return_index=True)[1][molecules]
    np.testing.assert_array_equal(np.round(turns), np.round(turns[:, first]))
    _, one_by_one, same = read_all(wrapped, prefetch=1)
    np.testing.assert_allclose(one_by_one, positions, atol=2e-5)
    np.testing.assert_allclose(same, log_prob, atol=1e-4)
    u.trajectory[7]
    np.testing.assert_array_equal(u.atoms.positions, positions[7])
    np.testing.assert_allclose(u.dimensions, dimensions[3], rtol=1e-6)


def test_a_box_that_a_transformation_gives(u_cg):
    flow, frames = flow_of("two slices"), system("two slices").frames.numpy()
    beads = flow.cg_map.apply(frames[:5]).astype(np.float32)
    u = universe_from(flow.cg_map.atoms)
    u.load_new(bead_universe(beads, flow), format=BeadReader, cg_map=flow.cg_map)
    box = set_dimensions([30.0, 30.0, 30.0, 90.0, 90.0, 90.0])
    u.trajectory.add_transformations(box, Backmap(flow, prefetch=4))
    plain = read(backmap(bead_universe(beads, flow), flow, prefetch=4))
    np.testing.assert_allclose(read(u), plain, atol=1e-5)
    assert u.trajectory.ts.dimensions[0] == 30.0


def test_torsions_have_no_bead_trajectory(u_cg):
    flow = flow_of("torsions")
    for call in (lambda: Backmap(flow), lambda: backmap(u_cg, flow)):
        with pytest.raises(ValueError, match="torsions phi, psi, not beads"):
            call()


def test_model_that_breaks_down(u_cg):
    model = GaussianBackmapper(slice_map())
    with torch.no_grad():
        model.back.fill_(np.nan)
    with pytest.raises(ValueError, match="NaN or infinity at frame 0"):
        backmap(u_cg, model)
