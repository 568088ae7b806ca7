"""Beads in OpenMM: the same energies and forces as the calculator's, and the same ensemble."""

import builtins
import re

import numpy as np
import openmm
import pytest
import torch
from ase import units
from openmm import app
from openmm.unit import angstrom, kilojoule_per_mole

from ccg_ase import BatchedLangevin, CGCalculator, CGMap, ForceField, Topology
from ccg_ase import openmm_force as engine
from ccg_ase.evaluator import Evaluation
from ccg_ase.openmm_force import bead_force, bead_system, check_temperature

KJ_MOL = units.kJ / units.mol  # eV
REFERENCE = openmm.Platform.getPlatformByName("Reference")
FLOAT64 = {"dtype": torch.float64, "compiled": False}


def context(system, beads, integrator=None, box=None):
    integrator = integrator or openmm.VerletIntegrator(0.001)
    made = openmm.Context(system, integrator, REFERENCE)
    if box is not None:
        made.setPeriodicBoxVectors(*(np.asarray(box) / 10))
    made.setPositions(np.reshape(beads, (-1, 3)) * angstrom)
    return made


def energy_and_forces(made):
    state = made.getState(energy=True, forces=True)
    energy = state.getPotentialEnergy().value_in_unit(kilojoule_per_mole)
    return energy, state.getForces(asNumpy=True).value_in_unit(kilojoule_per_mole / angstrom)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_equal_to_the_calculator(force_field, ala2_beads, dtype, atol):
    system, _ = bead_system(force_field, replicas=3, dtype=dtype, compiled=False)
    energy, forces = energy_and_forces(context(system, ala2_beads[:3]))
    atoms = CGCalculator(force_field, replicas=3, dtype=torch.float64, compiled=False).atoms(
        ala2_beads[:3]
    )
    assert energy == pytest.approx(atoms.get_potential_energy() / KJ_MOL, abs=atol)
    np.testing.assert_allclose(forces, atoms.get_forces() / KJ_MOL, atol=atol)
    assert np.abs(forces).max() > 10


def test_forces_are_finite_differences_of_openmm_energies(force_field, ala2_beads):
    system, _ = bead_system(force_field, **FLOAT64)
    made, h = context(system, ala2_beads[1]), 1e-4
    _, forces = energy_and_forces(made)
    for bead, axis in np.ndindex(5, 3):
        sides = []
        for sign in (1, -1):
            moved = ala2_beads[1].copy()
            moved[bead, axis] += sign * h
            made.setPositions(moved * angstrom)
            sides.append(energy_and_forces(made)[0])
        assert forces[bead, axis] == pytest.approx((sides[1] - sides[0]) / (2 * h), abs=1e-4)


def test_langevin_samples_what_batched_langevin_samples(ala2_map, ala2_prior, ala2_beads):
    """Same mean and spread of bonds and of 1-3 distances, within four standard errors."""
    model = ForceField(ala2_map, 300.0, ala2_prior, channels=1, n_layers=1, l_max=0)
    start = ala2_beads[:64]

    def distances(frames):
        chain = [frames[:, :, k:] - frames[:, :, :-k] for k in (1, 2)]
        return np.concatenate([np.linalg.norm(step, axis=-1) for step in chain], -1)

    sampler = BatchedLangevin(model, timestep_fs=2, friction_per_ps=20, seed=1, compiled=False)
    sampler.run(start, 200)
    expected = distances(sampler.run(None, 600, every=5).beads)

    system, _ = bead_system(model, replicas=64, compiled=False)
    integrator = openmm.LangevinMiddleIntegrator(300, 20, 0.002)
    integrator.setRandomNumberSeed(1)
    made = context(system, start, integrator)
    check_temperature(made, model.temperature_K)
    made.setVelocitiesToTemperature(300, 1)
    integrator.step(200)
    frames = []
    for _ in range(120):
        integrator.step(5)
        positions = made.getState(positions=True).getPositions(asNumpy=True)
        frames.append(positions.value_in_unit(angstrom).reshape(64, 5, 3))
    found = distances(np.array(frames))

    centre = expected.mean((0, 1))
    for statistic in (lambda x: x.mean(0), lambda x: ((x - centre) ** 2).mean(0)):
        ours, theirs = statistic(found), statistic(expected)
        error = np.sqrt((ours.var(0) + theirs.var(0)) / 64)
        assert (np.abs(ours.mean(0) - theirs.mean(0)) < 4 * error).all()
        assert (error < 0.1 * theirs.mean(0)).all()


def test_serialized_force_is_the_same_force(force_field, ala2_beads):
    system, _ = bead_system(force_field, **FLOAT64)
    copy = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(system))
    first = energy_and_forces(context(system, ala2_beads[2]))
    second = energy_and_forces(context(copy, ala2_beads[2]))
    assert second[0] == first[0]
    np.testing.assert_array_equal(second[1], first[1])


def test_simulation_with_reporters_and_checkpoint(force_field, ala2_map, ala2_beads, tmp_path):
    system, topology = bead_system(force_field, replicas=2, compiled=False)
    assert [system.getParticleMass(k)._value for k in range(10)] == list(ala2_map.beads.masses) * 2
    assert [atom.name for atom in topology.atoms()][5:] == list(ala2_map.beads.names)
    assert [residue.name for residue in topology.residues()] == ["ACE", "ALA", "NME"] * 2
    bonds = [(first.index, second.index) for first, second in topology.bonds()]
    assert bonds == [(k, k + 1) for k in (0, 1, 2, 3, 5, 6, 7, 8)]

    integrator = openmm.LangevinMiddleIntegrator(300, 1, 0.002)
    simulation = app.Simulation(topology, system, integrator, REFERENCE)
    simulation.context.setPositions(ala2_beads[:2].reshape(-1, 3) * angstrom)
    for reporter in (
        app.DCDReporter(str(tmp_path / "beads.dcd"), 5),
        app.PDBReporter(str(tmp_path / "beads.pdb"), 5),
        app.StateDataReporter(str(tmp_path / "beads.csv"), 5, potentialEnergy=True),
    ):
        simulation.reporters.append(reporter)
    simulation.step(10)
    checkpoint = simulation.context.createCheckpoint()
    paths = []
    for _ in range(2):
        simulation.context.loadCheckpoint(checkpoint)
        integrator.step(5)
        paths.append(simulation.context.getState(positions=True).getPositions(asNumpy=True)._value)
    np.testing.assert_array_equal(*paths)
    assert (tmp_path / "beads.dcd").stat().st_size > 0
    assert re.search(r" CA +ALA A +2 ", (tmp_path / "beads.pdb").read_text())
    assert len((tmp_path / "beads.csv").read_text().splitlines()) == 3


# --- periodic boxes ---------------------------------------------------------------------------


class Repulsion:
    """Stands in for the Evaluator: Gaussian repulsion of nearest images, 0.3 eV at contact."""

    device = torch.device("cpu")

    def __init__(self, force_field, replicas=1):
        self.force_field, self.replicas = force_field, replicas
        self.cg_map = force_field.cg_map

    def __call__(self, beads, box):
        x = beads.requires_grad_()
        between = x[:, :, None] - x[:, None]
        for axis in (2, 1, 0):  # reduced triangular rows: nearest image row by row
            between = (
                between - (between[..., axis] / box[axis, axis]).round()[..., None] * box[axis]
            )
        pairs = 0.3 * torch.exp(-(between**2).sum(-1) / 4)
        sites = 0.5 * (pairs.sum(-1) - 0.3)
        (gradient,) = torch.autograd.grad(sites.sum(), x)
        return Evaluation(sites.detach(), -gradient, torch.zeros(len(beads), 3, 3))


@pytest.fixture
def liquid(monkeypatch):
    """A force field of 30 diatomic molecules in name, evaluated by `Repulsion`."""
    monkeypatch.setattr(engine, "Evaluator", Repulsion)
    topology = Topology(
        names=("A", "B") * 30,
        masses=[10.0, 20.0] * 30,
        resnames=("DI",) * 60,
        resids=np.repeat(np.arange(30), 2),
        bonds=[(2 * k, 2 * k + 1) for k in range(30)],
    )
    model = torch.nn.Module()
    model.cg_map, model.temperature_K = CGMap.from_slices(topology, range(60)), 300.0
    return model


BOX = np.array([[20.0, 0, 0], [3.0, 18.0, 0], [-2.0, 4.0, 22.0]])


def test_periodic_force_is_that_of_openmm(liquid, rng):
    """Against OpenMM's own pair force in a triclinic box, with beads several boxes away."""
    beads = rng.uniform(size=(60, 3)) @ BOX + rng.integers(-2, 3, (60, 3)) @ BOX
    system, topology = bead_system(liquid, box_A=BOX)
    assert system.usesPeriodicBoundaryConditions()
    np.testing.assert_allclose(topology.getPeriodicBoxVectors().value_in_unit(angstrom), BOX)
    other = openmm.System()
    other.setDefaultPeriodicBoxVectors(*(BOX / 10))
    pairs = openmm.CustomNonbondedForce(f"{0.3 / KJ_MOL}*exp(-r^2/0.04)")
    pairs.setNonbondedMethod(openmm.CustomNonbondedForce.CutoffPeriodic)
    pairs.setCutoffDistance(0.88)  # exp(-19) is left out: 3e-8 kJ/mol
    for _ in range(60):
        other.addParticle(1.0)
        pairs.addParticle()
    other.addForce(pairs)
    for box in (None, 1.05 * BOX):  # the box of the Context counts, not the System's
        found = energy_and_forces(context(system, beads, box=box))
        expected = energy_and_forces(context(other, beads, box=box))
        assert found[0] == pytest.approx(expected[0], abs=1e-4)
        np.testing.assert_allclose(found[1], expected[1], atol=1e-4)
        assert np.abs(found[1]).max() > 0.1


def test_molecules_stay_whole_when_wrapped(liquid, rng):
    """OpenMM knows what a molecule is, though the bead force tells it nothing of bonds."""
    centres = rng.uniform(size=(30, 1, 3)) @ BOX
    beads = (centres + rng.normal(size=(30, 2, 3))).reshape(60, 3)
    system, _ = bead_system(liquid, box_A=BOX)
    made = context(system, beads + 3 * BOX[0])
    wrapped = made.getState(positions=True, enforcePeriodicBox=True).getPositions(asNumpy=True)
    bonds = np.diff(wrapped.value_in_unit(angstrom).reshape(30, 2, 3), axis=1)
    np.testing.assert_allclose(bonds, np.diff(beads.reshape(30, 2, 3), axis=1), atol=1e-9)
    assert {tuple(molecule) for molecule in made.getMolecules()} == {
        (2 * k, 2 * k + 1) for k in range(30)
    }


# --- refusals ---------------------------------------------------------------------------------


def test_refuses_other_particles(force_field, ala2_beads):
    system = openmm.System()
    for _ in range(6):
        system.addParticle(12.0)
    force = bead_force(force_field, compiled=False)
    system.addForce(force)
    six = np.concatenate([[[50.0, 0, 0]], ala2_beads[0]])
    made = context(system, six)
    with pytest.raises(openmm.OpenMMException, match="of 1 x 5 beads, but acts on 6 particles"):
        made.getState(energy=True)
    chosen = bead_force(force_field, **FLOAT64)
    chosen.setParticles(range(1, 6))  # the cure that the message names
    system.removeForce(0)
    system.addForce(chosen)
    forces = energy_and_forces(context(system, six))[1]
    atoms = CGCalculator(force_field, dtype=torch.float64, compiled=False).atoms(ala2_beads[0])
    np.testing.assert_allclose(forces[1:], atoms.get_forces() / KJ_MOL, atol=1e-9)
    assert not forces[0].any()


def test_stops_where_the_energy_is_no_number(force_field):
    system, _ = bead_system(force_field, compiled=False)
    made = context(system, np.full((5, 3), np.nan))
    with pytest.raises(openmm.OpenMMException, match="NaN"):
        made.getState(forces=True)


@pytest.mark.parametrize(
    ("integrator", "force", "owner"),
    [
        (openmm.LangevinMiddleIntegrator(310, 1, 0.002), None, "LangevinMiddleIntegrator"),
        (openmm.NoseHooverIntegrator(310, 1, 0.002), None, "NoseHooverIntegrator"),
        (openmm.VerletIntegrator(0.002), openmm.AndersenThermostat(310, 1), "AndersenThermostat"),
    ],
)
def test_refuses_another_temperature(force_field, ala2_beads, integrator, force, owner):
    system, _ = bead_system(force_field, compiled=False)
    if force is not None:
        system.addForce(force)
    made = context(system, ala2_beads[0], integrator)
    check_temperature(made, 310.0)
    with pytest.raises(ValueError, match=f"free energy at 300.0 K, but the {owner} is at 310 K"):
        check_temperature(made, force_field.temperature_K)


def test_every_part_of_a_compound_integrator_is_checked(force_field, ala2_beads):
    system, _ = bead_system(force_field, compiled=False)
    both = openmm.CompoundIntegrator()
    both.addIntegrator(openmm.VerletIntegrator(0.002))
    both.addIntegrator(openmm.BrownianIntegrator(290, 1, 0.002))
    with pytest.raises(ValueError, match="BrownianIntegrator is at 290 K"):
        check_temperature(context(system, ala2_beads[0], both), 300.0)


def test_says_how_to_get_openmm(force_field, monkeypatch):
    monkeypatch.delattr(openmm, "PythonForce")
    with pytest.raises(ImportError, match=r"came with OpenMM 8\.5"):
        bead_force(force_field)
    real = builtins.__import__

    def without(name, *arguments, **keywords):
        if name == "openmm":
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'pip install "ccg\[openmm\]"'):
        bead_system(force_field)
