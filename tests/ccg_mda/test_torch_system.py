"""Energies of OpenMM Systems in torch against OpenMM's Reference platform, term by term."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from ccg_mda.openmm_system import EV_PER_KJ_MOL, NM_PER_A
from ccg_mda.potential import OpenMMPotential
from ccg_mda.torch_potential import TorchSystemPotential
from ccg_mda.torch_system import TorchSystem

openmm = pytest.importorskip("openmm")
from openmm import app  # noqa: E402

PDB = Path(__file__).parents[1] / "data" / "alanine_dipeptide.pdb"
IMPLICIT = ("amber96.xml", "amber96_obc.xml")
MAPPED = ("amber19/protein.ff19SB.xml",)


def system_of(files, **options):
    """Alanine dipeptide."""
    given = {"constraints": None, "rigidWater": False, "removeCMMotion": False, **options}
    return app.ForceField(*files).createSystem(app.PDBFile(str(PDB)).topology, **given)


def frames(n, noise, seed=0):
    rng = np.random.default_rng(seed)
    x = np.array(app.PDBFile(str(PDB)).positions.value_in_unit(openmm.unit.angstrom))
    return x + noise * rng.normal(size=(n, *x.shape))


def some_of_everything():
    """Eight particles: RB and periodic torsions of odd phases, two maps, implicit water, pairs."""
    rng = np.random.default_rng(2)
    system, n = openmm.System(), 8
    forces = {
        "RBTorsionForce": openmm.RBTorsionForce(),
        "PeriodicTorsionForce": openmm.PeriodicTorsionForce(),
        "CMAPTorsionForce": openmm.CMAPTorsionForce(),
        "NonbondedForce": openmm.NonbondedForce(),
        "GBSAOBCForce": openmm.GBSAOBCForce(),
    }
    rb, periodic, maps, pairs, water = forces.values()
    water.setSoluteDielectric(2.0)
    water.setSolventDielectric(40.0)
    water.setSurfaceAreaEnergy(5.0)
    for _ in range(n):
        system.addParticle(12.0)
        pairs.addParticle(rng.normal(), rng.uniform(0.1, 0.3), rng.uniform(0, 2))
        # Radii so unlike that spheres lie inside of one another.
        water.addParticle(rng.normal(), rng.uniform(0.1, 0.5), rng.uniform(0.5, 1.2))
    pairs.addException(3, 1, 0.7, 0.2, 1.5)
    pairs.addException(0, 1, 0.0, 1.0, 0.0)
    for k in range(5):
        atoms = rng.permutation(n)[:4].tolist()
        rb.addTorsion(*atoms, *rng.normal(size=6))
        for fold in (1, 3, 6):
            periodic.addTorsion(*atoms, fold, rng.uniform(-4, 4), rng.normal())
        maps.addTorsion(k % 2, *range(k % 3, k % 3 + 4), *range(k % 4 + 1, k % 4 + 5))
    for size in (7, 12):
        maps.addMap(size, rng.normal(size=size**2).tolist())
    for force in forces.values():
        system.addForce(force)
    return system


def reference(system, positions):
    """Energies (B,) and forces (B, n, 3) of every force of OpenMM, in eV and Å, by class."""
    for group, force in enumerate(system.getForces()):
        force.setForceGroup(group)
    platform = openmm.Platform.getPlatformByName("Reference")
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), platform)
    found = {type(force).__name__: ([], []) for force in system.getForces()}
    for frame in positions:
        context.setPositions(frame * NM_PER_A)
        for group, (energies, forces) in enumerate(found.values()):
            state = context.getState(energy=True, forces=True, groups={group})
            energies.append(state.getPotentialEnergy()._value * EV_PER_KJ_MOL)
            forces.append(state.getForces(asNumpy=True)._value * EV_PER_KJ_MOL * NM_PER_A)
    return {name: (np.array(e), np.array(f)) for name, (e, f) in found.items()}


CASES = {
    "implicit water": (lambda: system_of(IMPLICIT), frames(6, 0.02)),
    "implicit water, distorted": (lambda: system_of(IMPLICIT), frames(6, 0.4)),
    "correction map": (lambda: system_of(MAPPED), frames(6, 0.02)),
    "correction map, distorted": (lambda: system_of(MAPPED), frames(6, 0.4)),
    "every option": (some_of_everything, np.random.default_rng(8).normal(size=(40, 8, 3)) * 1.5),
}


@pytest.mark.parametrize("case", CASES)
def test_every_term_is_openmms(case):
    build, positions = CASES[case]
    expected = reference(build(), positions)
    x = torch.tensor(positions, requires_grad=True)
    terms = TorchSystem.from_system(build()).terms(x)
    assert terms.keys() == expected.keys()
    for name, (energy, forces) in expected.items():
        np.testing.assert_allclose(terms[name].detach(), energy, rtol=1e-9, err_msg=name)
        found = -torch.autograd.grad(terms[name].sum(), x, retain_graph=True)[0].numpy()
        off = np.abs(found - forces).max((1, 2)) / np.abs(forces).max((1, 2))
        assert off.max() < 1e-9, name


@pytest.mark.parametrize("build", [lambda: system_of(IMPLICIT), some_of_everything])
def test_second_derivatives_are_those_of_forces(build):
    system = build()
    n, h = system.getNumParticles(), 1e-5
    x = frames(1, 0.1)[0] if n == 22 else np.random.default_rng(1).normal(size=(n, 3)) * 2
    energy = TorchSystem.from_system(system)
    hessian = torch.autograd.functional.hessian(energy, torch.tensor(x)).reshape(3 * n, 3 * n)
    steps = h * np.eye(3 * n).reshape(3 * n, n, 3)
    potential = TorchSystemPotential(energy)
    slope = (potential(x - steps)[1] - potential(x + steps)[1]) / (2 * h)
    np.testing.assert_allclose(hessian, slope.reshape(3 * n, 3 * n), atol=1e-5, rtol=1e-6)


def test_potential_is_openmms_in_any_batch():
    system, positions = system_of(IMPLICIT), frames(14, 0.1).reshape(2, 7, 22, 3)
    energy, forces = OpenMMPotential(system)(positions)
    potential = TorchSystemPotential.from_system(system, frames_at_once=4)
    found = potential(positions)
    np.testing.assert_allclose(found[0], energy, rtol=1e-10)
    np.testing.assert_allclose(found[1], forces, atol=1e-9)
    assert potential.n_calls == 14
    single = potential(positions[0, 0])
    assert np.ndim(single[0]) == 0
    assert single[1].shape == (22, 3)
    assert potential(positions[:0])[0].shape == (0, 7)
    again = pickle.loads(pickle.dumps(potential))
    np.testing.assert_array_equal(again(positions)[1], found[1])
    assert not list(potential.system.parameters())
    text = TorchSystem.from_xml(openmm.XmlSerializer.serialize(system))
    np.testing.assert_array_equal(text(torch.tensor(positions[0])), energy_of(system, positions[0]))


def energy_of(system, positions):
    return TorchSystem.from_system(system)(torch.tensor(positions))


def test_single_precision_far_from_the_origin():
    system, positions = system_of(IMPLICIT), frames(20, 0.1)
    energy, forces = OpenMMPotential(system)(positions)
    single = TorchSystemPotential.from_system(system, dtype=torch.float32)
    found = single(positions + 5000.0)
    assert found[0].dtype == found[1].dtype == np.float64
    np.testing.assert_allclose(found[0], energy, atol=2e-5)
    np.testing.assert_allclose(found[1], forces, atol=1e-5 * np.abs(forces).max())


def test_compiled_code_is_made_of_good_frames_and_gets_whole_portions(monkeypatch):
    """With a stand-in for the compiler, which takes a minute."""
    examples, calls = [], []

    def stand_in(kernel, example, *, label):
        examples.append(example[0])

        def run(x):
            calls.append(x.shape)
            return kernel(x)

        return run

    monkeypatch.setattr("ccg_mda.torch_potential.compile_ahead", stand_in)
    system, positions = system_of(IMPLICIT), frames(10, 0.1)
    potential = TorchSystemPotential.from_system(system, compiled=True, frames_at_once=4)
    clash = np.repeat(positions[:1], 4, axis=0)
    clash[:, 1] = clash[:, 0]
    assert np.isinf(potential(clash)[0]).all()
    assert not examples
    clash[:3] = positions[:3]
    expected = TorchSystemPotential.from_system(system)(np.concatenate([clash, positions]))
    found = potential(np.concatenate([clash, positions]))
    for value, truth in zip(found, expected, strict=True):
        np.testing.assert_allclose(value, truth, rtol=1e-9, atol=1e-12)
    assert calls == [(4, 22, 3)] * 3
    (example,) = examples
    energy = TorchSystem.from_system(system)(example)
    better_half = np.sort(expected[0][:3])[:2]
    np.testing.assert_allclose(energy, np.tile(better_half, 2), rtol=1e-9)
    assert pickle.loads(pickle.dumps(potential)).n_calls == 18


@pytest.mark.slow
@pytest.mark.parametrize("files", [IMPLICIT, MAPPED])
def test_compiled_code_agrees(files, monkeypatch):
    monkeypatch.delenv("CCG_COMPILE")
    system, positions = system_of(files), frames(100, 0.2)
    compiled = TorchSystemPotential.from_system(system, compiled=True)
    compiled(positions)  # the first portion of all is eager
    for found, expected in zip(
        compiled(positions), OpenMMPotential(system)(positions), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-8)
    assert compiled._kernel is not compiled._eager


@pytest.mark.parametrize("files", [IMPLICIT, MAPPED])
def test_a_clash_spares_the_batch(files):
    potential, positions = TorchSystemPotential.from_system(system_of(files)), frames(3, 0.02)
    good = potential(positions)
    positions[1, 6] = positions[1, 8]  # a bond that both angles of the map go through
    energy, forces = potential(positions)
    assert energy[1] == np.inf
    assert np.all(forces[1] == 0)
    np.testing.assert_allclose(energy[[0, 2]], good[0][[0, 2]], rtol=1e-12)
    np.testing.assert_allclose(forces[[0, 2]], good[1][[0, 2]], rtol=1e-9, atol=1e-12)


def test_collinear_angles_have_no_force():
    angles, system = openmm.HarmonicAngleForce(), openmm.System()
    angles.addAngle(0, 1, 2, 2.0, 300.0)
    system.addForce(angles)
    for _ in range(3):
        system.addParticle(12.0)
    straight = np.array([[0.0, 0, 0], [1, 1, 0], [2, 2, 0]])
    for found, expected in zip(
        TorchSystemPotential.from_system(system)(straight),
        OpenMMPotential(system)(straight),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def with_force(force):
    system = openmm.System()
    system.addParticle(12.0)
    system.addForce(force)
    return system


def with_offsets():
    force = openmm.NonbondedForce()
    force.addParticle(0.0, 1.0, 0.0)
    force.addGlobalParameter("scale", 0.5)
    force.addParticleParameterOffset("scale", 0, 1.0, 0.0, 0.0)
    return with_force(force)


def with_cutoff(force):
    force.setNonbondedMethod(force.CutoffNonPeriodic)
    return with_force(force)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: system_of(IMPLICIT, constraints=app.HBonds), ValueError, "12 constraints"),
        (
            lambda: system_of(["amber14/protein.ff14SB.xml", "implicit/gbn2.xml"]),
            NotImplementedError,
            "CustomGBForce .*use OpenMMPotential",
        ),
        (
            lambda: with_cutoff(openmm.NonbondedForce()),
            NotImplementedError,
            "NonbondedForce has a cutoff; use OpenMMPotential",
        ),
        (
            lambda: with_cutoff(openmm.GBSAOBCForce()),
            NotImplementedError,
            "GBSAOBCForce has a cutoff; use OpenMMPotential",
        ),
        (with_offsets, NotImplementedError, "parameter offsets"),
        (
            lambda: with_force(openmm.MonteCarloBarostat(1, 300)),
            NotImplementedError,
            "MonteCarloBarostat",
        ),
    ],
)
def test_what_cannot_be_translated_is_named(build, error, message):
    with pytest.raises(error, match=message):
        TorchSystem.from_system(build())


def test_systems_without_terms():
    with pytest.raises(ValueError, match="no force that gives an energy"):
        TorchSystem.from_system(with_force(openmm.CMMotionRemover()))
    system = with_force(openmm.CMAPTorsionForce())
    for kind in ("HarmonicBond", "HarmonicAngle", "PeriodicTorsion", "RBTorsion"):
        system.addForce(getattr(openmm, f"{kind}Force")())
    system.addParticle(12.0)
    energy, forces = TorchSystemPotential.from_system(system)(np.ones((3, 2, 3)))
    np.testing.assert_array_equal(energy, 0)
    np.testing.assert_array_equal(forces, 0)


def test_motion_removers_change_no_energy_and_bad_portions_are_refused():
    plain, with_remover = (system_of(IMPLICIT, removeCMMotion=k) for k in (False, True))
    x = frames(1, 0.02)
    np.testing.assert_array_equal(energy_of(with_remover, x), energy_of(plain, x))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        TorchSystemPotential.from_system(plain, frames_at_once=0)
