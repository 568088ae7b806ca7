"""Restrained dynamics: closed forms of p(x|s), forces, steering, kills, failures."""

import multiprocessing
import os
import time

import numpy as np
import openmm
import pytest

from ccg_ase.mapping import CGMap
from ccg_ase.topology import Topology
from ccg_ase.torsion_map import TorsionMap
from ccg_ase.units import thermal_energy
from ccg_mda.potential import OpenMMPotential, TorchPotential
from ccg_training.openmm_dynamics import NM, new_context, read_frame
from ccg_training.reference import ReferenceDataError
from ccg_training.restrained import restrained_frames
from ccg_training.restraint import FRACTION, RESTRAINT_GROUP, UNBIASED_GROUP, add_restraint
from tests.harmonic_system import harmonic_system
from tests.linear_gaussian import LinearGaussian

T = 300.0
GROUPS = ((0, 1), (2, 3, 4), (5, 6, 7))


@pytest.mark.parametrize("groups", [None, GROUPS], ids=["slices", "centres of mass"])
def test_frames_have_the_conditional_moments_of_the_closed_form(groups, tmp_path):
    molecule = LinearGaussian(seed=2)
    cg_map = molecule.cg_map
    if groups:
        cg_map = CGMap.from_groups(cg_map.atoms, groups)
    potential = OpenMMPotential(harmonic_system(molecule))
    rng = np.random.default_rng(0)
    starts = molecule.sample(32, rng)
    targets = cg_map.apply(starts[rng.permutation(32)])
    data, calls, failed = restrained_frames(
        potential, cg_map, targets, starts, T, tmp_path,
        n_steps=3000, save_every=50, steering_steps=100, equilibration_steps=500,
        friction_per_ps=20.0, seed=1,
    )  # fmt: skip
    assert not failed.any()
    assert calls == 32 * (100 + 500 + 3000 + 60)
    np.testing.assert_array_equal(data.walker, np.repeat(np.arange(32), 60))
    energy, forces = molecule(data.positions)
    np.testing.assert_allclose(data.energy, energy, atol=1e-9)
    np.testing.assert_allclose(data.forces, forces, atol=1e-9)

    # x given s is Gaussian for any linear map: mean x0 + G (s - s0), covariance C - G M C.
    beads = cg_map.apply(data.positions)
    assert np.sqrt(((beads - targets[data.walker]) ** 2).mean()) < 0.15
    M = np.kron(cg_map.matrix.toarray(), np.eye(3))
    C = thermal_energy(T) * np.linalg.inv(molecule.K)
    G = C @ M.T @ np.linalg.inv(M @ C @ M.T)
    delta_s = (beads - cg_map.apply(molecule.x0)).reshape(len(data), -1)
    residual = (data.positions - molecule.x0).reshape(len(data), -1) - delta_s @ G.T
    scale, modes = np.linalg.eigh(C - G @ M @ C)
    free = scale > 1e-10
    assert free.sum() == 24 - len(M)
    white = residual @ modes[:, free] / np.sqrt(scale[free])
    # The response of x to s, the mean and the width; errors from the scatter between states.
    by_state = white.reshape(32, 60, -1)
    arms = delta_s.reshape(32, 60, -1)
    slopes = np.einsum("sfi,sfj->sij", arms, by_state).reshape(32, -1) / 60
    for values, truth in ((by_state.mean(1), 0), ((by_state**2).mean(1), 1), (slopes, 0)):
        error = values.std(axis=0, ddof=1) / np.sqrt(32)
        z = (values.mean(axis=0) - truth) / error
        assert np.abs(z).max() < 4.5
        assert (z**2).mean() < 1.6


def restraint_of(cg_map, positions, stiffness, first, last, fraction):
    """Return energy and forces of the restraint alone, and of the rest, in eV and eV/Å."""
    system = openmm.System()
    for _ in range(cg_map.n_atoms):
        system.addParticle(12.0)
    system.addForce(openmm.HarmonicBondForce())
    system.getForce(0).addBond(0, 1, 0.1, 1000.0)
    system.getForce(0).setForceGroup(RESTRAINT_GROUP)  # a System may use any groups
    add_restraint(system, cg_map, stiffness, first, last)
    context = new_context(
        system,
        platform="Reference",
        temperature_K=T,
        friction_per_ps=1.0,
        timestep_fs=1.0,
        seed=1,
    )
    context.setPositions(positions / NM)
    context.setParameter(FRACTION, fraction)
    _, rest, _ = read_frame(context, {UNBIASED_GROUP})
    assert np.abs(rest[:2]).min() > 0 == np.abs(rest[2:]).max()
    return read_frame(context, {RESTRAINT_GROUP})[1:]


def chain(n=6):
    return Topology(
        names=tuple(f"C{i}" for i in range(n)),
        masses=np.arange(1.0, n + 1),
        elements=("C",) * n,
        bonds=[(i, i + 1) for i in range(n - 1)],
    )


def test_the_restraint_of_any_linear_map_has_its_gradient(rng):
    matrix = np.array([[0.5, 0.2, 0.3, 0, 0, 0], [0, 0, 0.4, 0, 0.6, 0], [0, 0, 0, 0, 0, 1.0]])
    cg_map = CGMap.from_matrix(chain(), matrix)
    positions, first, last = rng.normal(size=(6, 3)), *rng.normal(size=(2, 3, 3))
    forces, energy = restraint_of(cg_map, positions, 2.5, first, last, 0.25)
    away = matrix @ positions - (0.75 * first + 0.25 * last)
    assert energy == pytest.approx(1.25 * (away**2).sum(), rel=1e-10)
    np.testing.assert_allclose(forces, -2.5 * matrix.T @ away, atol=1e-9)


def test_the_restraint_of_torsions_goes_the_short_way_through_the_cut(rng):
    torsion_map = TorsionMap(chain(), [(0, 1, 2, 3), (2, 3, 4, 5)])
    positions = np.cumsum(rng.normal(size=(6, 3)), axis=0)
    here = torsion_map.apply(positions)
    # From 0.3 rad before an angle to 0.5 rad past it: the centre passes it, wherever the cut is.
    for shift in (0.0, 2 * np.pi, -2 * np.pi):
        first, last = here - 0.3 + shift, here + 0.5 - shift

        def energy_at(x, first=first, last=last):
            centre = first + 0.25 * torsion_map.difference(last, first)
            return (torsion_map.difference(torsion_map.apply(x), centre) ** 2).sum()

        forces, energy = restraint_of(torsion_map, positions, 2.0, first, last, 0.25)
        assert energy == pytest.approx(2 * 0.1**2, rel=1e-9)
        assert energy == pytest.approx(energy_at(positions), rel=1e-9)
        step = 1e-5 * np.eye(18).reshape(18, 6, 3)
        slope = [(energy_at(positions + d) - energy_at(positions - d)) / 2e-5 for d in step]
        np.testing.assert_allclose(forces.ravel(), -np.array(slope), atol=1e-7)


def butane():
    """Four united atoms whose torsion turns freely."""
    system = openmm.System()
    bonds, angles = openmm.HarmonicBondForce(), openmm.HarmonicAngleForce()
    for _ in range(4):
        system.addParticle(15.0)
    for i in range(3):
        bonds.addBond(i, i + 1, 0.153, 2e5)
    for i in range(2):
        angles.addAngle(i, i + 1, i + 2, 1.95, 500.0)
    system.addForce(bonds)
    system.addForce(angles)
    return system


def turned(degrees):
    """Atoms of `butane` with a torsion."""
    phi, side = np.deg2rad(degrees), 1.53 * np.array([-np.cos(1.95), np.sin(1.95)])
    ends = [[-side[0], side[1], 0], [1.53 + side[0], side[1] * np.cos(phi), side[1] * np.sin(phi)]]
    return np.array([ends[0], [0, 0, 0], [1.53, 0, 0], ends[1]])


ON_TORSIONS = dict(n_steps=1000, save_every=20, steering_steps=400, equilibration_steps=200)


def test_torsions_are_steered_through_the_cut(tmp_path):
    torsion_map = TorsionMap(chain(4), [(0, 1, 2, 3)])
    starts = np.stack([turned(170), turned(-100), turned(60)])
    targets = np.deg2rad([[-160.0], [150], [80]])
    data, _, failed = restrained_frames(
        OpenMMPotential(butane()), torsion_map, targets, starts, T, tmp_path, **ON_TORSIONS
    )
    assert not failed.any()
    away = torsion_map.difference(torsion_map.apply(data.positions), targets[data.walker])
    assert np.rad2deg(away.std()) == pytest.approx(5.0, rel=0.3)
    assert np.abs(np.rad2deg(away)).max() < 25


def test_failures_are_reported_and_cost_calls(tmp_path):
    cg_map = CGMap.from_slices(chain(4), (0, 1, 2, 3))
    broken = turned(60)
    broken[3] = broken[2]  # the length of a bond, and its gradient, is 0/0 here
    far = turned(60) * [3, 1, 1]  # bonds that the restraint can't hold
    starts = np.stack([turned(60), broken, turned(60), turned(60)])
    targets = np.stack([turned(60), turned(60), far, turned(70) + 40])
    short = dict(n_steps=40, save_every=20, steering_steps=15, equilibration_steps=5)
    potential = OpenMMPotential(butane())
    data, calls, failed = restrained_frames(
        potential, cg_map, targets, starts, T, tmp_path, **short
    )
    assert failed.tolist() == [False, True, True, False]
    np.testing.assert_array_equal(data.walker, [0, 0, 3, 3])
    assert 3 * (15 + 5 + 40 + 2) < calls <= 4 * (15 + 5 + 40 + 2)
    assert np.abs(cg_map.apply(data.positions)[2:] - targets[3]).max() < 0.6
    none = restrained_frames(
        potential, cg_map, targets[1:2], starts[1:2], T, tmp_path / "none", **short
    )
    assert none.data is None
    assert none.failed.all()


def test_a_state_that_became_its_mirror_image_has_failed(tmp_path):
    topology = Topology(
        names=tuple("CHFBI"),
        masses=[12.0, 1, 19, 80, 127],
        elements=("C", "H", "F", "Br", "I"),
        bonds=[(0, i) for i in range(1, 5)],
    )
    system, bonds = openmm.System(), openmm.HarmonicBondForce()
    for mass in topology.masses:
        system.addParticle(mass)
    for i in range(1, 5):
        bonds.addBond(0, i, 0.15, 1e5)
    system.addForce(bonds)
    start = (
        1.5 / np.sqrt(3) * np.array([[0, 0, 0], [1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    )
    exchanged = start[[0, 1, 2, 4, 3]]
    cg_map = CGMap.from_slices(topology, range(5))
    found = restrained_frames(
        OpenMMPotential(system), cg_map, np.stack([start, exchanged]), np.stack([start] * 2), T,
        tmp_path, n_steps=100, save_every=20, steering_steps=2000, equilibration_steps=500,
    )  # fmt: skip
    assert found.failed.tolist() == [False, True]


def test_errors(tmp_path):
    cg_map = CGMap.from_slices(chain(4), (0, 3))
    x = turned(60)[None]
    args = (cg_map, cg_map.apply(x), x, T, tmp_path)
    with pytest.raises(ReferenceDataError, match="TorchPotential holds none: give an OpenMMPot"):
        restrained_frames(TorchPotential(lambda x: x.sum(), 4), *args, **ON_TORSIONS)
    potential = OpenMMPotential(butane())
    with pytest.raises(ReferenceDataError, match=r"targets must have shape \(states, 2, 3\)"):
        restrained_frames(potential, cg_map, x, x, T, tmp_path, **ON_TORSIONS)
    with pytest.raises(ReferenceDataError, match="multiple of save_every = 30"):
        restrained_frames(potential, *args, **ON_TORSIONS | {"save_every": 30})
    with pytest.raises(ReferenceDataError, match="starts hold values that are NaN"):
        restrained_frames(potential, *args[:2], x * np.nan, T, tmp_path, **ON_TORSIONS)


def _run(directory, workers=1):
    torsion_map = TorsionMap(chain(4), [(0, 1, 2, 3)])
    angles = np.linspace(-180, 170, 40)
    starts = np.stack([turned(angle) for angle in angles])
    return restrained_frames(
        OpenMMPotential(butane()), torsion_map, np.deg2rad(angles + 10)[:, None], starts, T,
        directory, workers=workers, seed=5, **ON_TORSIONS | {"n_steps": 3000},
    )  # fmt: skip


def test_a_killed_run_continues_to_the_same_bits_with_any_number_of_workers(tmp_path):
    whole = _run(tmp_path / "whole")
    folder = tmp_path / "killed"
    process = multiprocessing.get_context("spawn").Process(target=_run, args=(folder, 2))
    process.start()
    deadline = time.monotonic() + 60
    while len(list(folder.glob("*.npz"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.join()
    for _ in range(200):  # workers notice that their parent is gone, and stop
        count = len(os.listdir(folder))
        time.sleep(0.3)
        if len(os.listdir(folder)) == count:
            break
    assert 3 <= len(list(folder.glob("*.npz"))) < 10
    again = _run(folder)
    np.testing.assert_array_equal(again.data.positions, whole.data.positions)
    np.testing.assert_array_equal(again.data.walker, whole.data.walker)
    assert again.n_calls == whole.n_calls
