import pickle

import ase.io
import numpy as np
import pytest
import torch
from ase import units
from ase.calculators.calculator import (
    CalculatorSetupError,
    PropertyNotImplementedError,
    all_changes,
)
from ase.calculators.fd import calculate_numerical_forces
from ase.calculators.mixing import SumCalculator
from ase.constraints import FixAtoms, FixCom
from ase.md.andersen import Andersen
from ase.md.bussi import Bussi
from ase.md.langevin import Langevin
from ase.md.langevinbaoab import LangevinBAOAB
from ase.md.nose_hoover_chain import NoseHooverChainNVT
from ase.md.velocitydistribution import thermalize_momenta
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS, FIRE
from bead_systems import eager, speaking

from ccg_ase import CGCalculator, ForceField

FS = units.fs


@pytest.fixture
def calculator(force_field):
    return eager(force_field)


def counted(calculator):
    """Count the evaluations of a calculator."""
    evaluate, calls = calculator.calculate, []
    calculator.calculate = lambda *a, **k: (calls.append(1), evaluate(*a, **k))
    return calls


DRIVERS = {
    "Langevin": lambda a: Langevin(
        a, 2 * FS, temperature_K=300, friction=0.01 / FS, fixcm=False, rng=np.random.default_rng(0)
    ),
    "LangevinBAOAB": lambda a: LangevinBAOAB(
        a, 2 * FS, temperature_K=300, T_tau=100 * FS, rng=np.random.default_rng(0)
    ),
    "Bussi": lambda a: Bussi(a, 2 * FS, 300, 100 * FS, rng=np.random.default_rng(0)),
    "VelocityVerlet": lambda a: VelocityVerlet(a, 2 * FS),
    "Andersen": lambda a: Andersen(
        a, 2 * FS, temperature_K=300, andersen_prob=0.01, rng=np.random.default_rng(0)
    ),
    "NoseHooverChainNVT": lambda a: NoseHooverChainNVT(a, 2 * FS, 300, 100 * FS),
}


@pytest.mark.parametrize("driver", DRIVERS)
def test_one_evaluation_per_step_under_every_driver(calculator, driver):
    calls = counted(calculator)
    atoms = calculator.atoms()
    thermalize_momenta(atoms, 300, rng=np.random.default_rng(0))
    dynamics = DRIVERS[driver](atoms)
    dynamics.attach(lambda: (atoms.get_potential_energy(), atoms.get_forces()))
    dynamics.run(50)
    assert len(calls) == 51
    if driver == "NoseHooverChainNVT":
        dynamics.get_conserved_energy()
    assert np.isfinite(atoms.positions).all()


@pytest.mark.parametrize("optimiser", [FIRE, BFGS])
def test_optimisers_find_a_minimum(calculator, ala2_prior, optimiser, ala2_map):
    model = ForceField(ala2_map, 300.0, ala2_prior)
    calc = eager(model)
    calls = counted(calc)
    atoms = calc.atoms(calculator.atoms().positions)
    search = optimiser(atoms, logfile=None)
    assert search.run(fmax=1e-4, steps=500)
    assert len(calls) <= search.nsteps + 1
    # The prior's minimum is zero: all of its terms can be met at once.
    assert atoms.get_potential_energy() == pytest.approx(0, abs=1e-6)


def test_results(calculator):
    atoms = calculator.atoms()
    energy = atoms.get_potential_energy()
    assert type(energy) is float
    assert atoms.get_potential_energy(force_consistent=True) == energy
    assert atoms.get_potential_energies().sum() == pytest.approx(energy, abs=1e-12)
    assert atoms.get_forces().dtype == np.float64
    np.testing.assert_allclose(atoms.get_forces().sum(0), 0, atol=1e-10)
    numeric = calculate_numerical_forces(atoms, eps=1e-4)
    np.testing.assert_allclose(atoms.get_forces(), numeric, atol=1e-6)
    with pytest.raises(PropertyNotImplementedError):
        atoms.get_stress()
    exported = set(calculator.export_properties()) - {"natoms"}
    assert exported == {"energy", "free_energy", "energies", "forces"}


def test_default_precision_is_float32_inside_float64_outside(force_field):
    atoms, exact = eager(force_field, None).atoms(), eager(force_field).atoms()
    atoms.positions += 1000.0  # far from the origin, where float32 has four decimals left
    assert atoms.calc.force_field.dtype == torch.float32
    assert force_field.dtype == torch.float64  # the caller's module isn't converted
    assert atoms.get_forces().dtype == np.float64
    assert atoms.get_potential_energy() == pytest.approx(exact.get_potential_energy(), abs=1e-5)
    np.testing.assert_allclose(atoms.get_forces(), exact.get_forces(), atol=1e-3)


def test_cache_is_exact(calculator):
    calls = counted(calculator)
    atoms = calculator.atoms()
    atoms.get_forces(), atoms.get_potential_energy(), atoms.get_forces()
    assert len(calls) == 1
    atoms.positions[0, 0] += 1e-15 * abs(atoms.positions[0, 0]) + np.spacing(atoms.positions[0, 0])
    assert calculator.check_state(atoms) == ["positions"]
    atoms.get_forces()
    assert len(calls) == 2
    atoms.numbers[0] = 6
    assert calculator.check_state(atoms) == ["numbers"]
    atoms.numbers[0] = 0
    atoms.cell[:] = np.eye(3)
    assert calculator.check_state(atoms) == ["cell"]
    assert calculator.check_state(atoms[:3]) == list(all_changes)
    calculator.reset()
    assert calculator.check_state(atoms) == list(all_changes)
    atoms.get_forces()[:] = 0  # a copy: the cache stays whole
    assert np.abs(atoms.get_forces()).max() > 0


def test_direct_call_and_inputs_untouched(calculator):
    atoms = calculator.atoms()
    before = atoms.positions.copy()
    calculator.calculate(atoms, system_changes=["positions"])
    assert calculator.check_state(atoms) == []
    np.testing.assert_array_equal(atoms.positions, before)
    assert calculator.get_property("energy") == atoms.get_potential_energy()
    calculator.reset()
    with pytest.raises(CalculatorSetupError, match="nothing was evaluated"):
        calculator.get_property("energy")


def test_energy_is_conserved(calculator):
    """No drift, and fluctuations of second order in the time step."""
    atoms = calculator.atoms()
    thermalize_momenta(atoms, 300, rng=np.random.default_rng(0))
    worst = []
    for timestep in (1.0, 0.5):
        copy = atoms.copy()
        copy.calc = calculator
        dynamics = VelocityVerlet(copy, timestep * FS)
        energies = [copy.get_total_energy() for _ in dynamics.irun(int(100 / timestep))]
        worst.append(np.ptp(energies))
    slope = np.polyfit(np.arange(len(energies)), energies, 1)[0]
    assert abs(slope * len(energies)) / len(atoms) < 1e-5
    assert worst[0] / worst[1] == pytest.approx(4, rel=0.2)


def test_replicas_are_independent_copies(force_field, ala2_beads):
    calc = eager(force_field, replicas=3)
    atoms = calc.atoms(ala2_beads[:3])
    single = eager(force_field)
    alone = [single.atoms(beads) for beads in ala2_beads[:3]]
    np.testing.assert_allclose(
        atoms.get_forces(), np.concatenate([a.get_forces() for a in alone]), atol=1e-11
    )
    total = sum(a.get_potential_energy() for a in alone)
    assert atoms.get_potential_energy() == pytest.approx(total, abs=1e-11)
    assert len(calc.atoms()) == 15
    np.testing.assert_array_equal(atoms.get_masses(), np.tile(calc.cg_map.beads.masses, 3))


def test_composes(calculator, force_field):
    other = eager(force_field)
    atoms = calculator.atoms()
    once, forces = atoms.get_potential_energy(), atoms.get_forces()
    atoms.calc = SumCalculator([calculator, other])
    assert atoms.get_potential_energy() == pytest.approx(2 * once)
    np.testing.assert_allclose(atoms.get_forces(), 2 * forces)


def test_pickles(calculator):
    atoms = calculator.atoms()
    energy, forces = atoms.get_potential_energy(), atoms.get_forces()
    copy = pickle.loads(pickle.dumps(calculator))
    assert copy.cg_map == calculator.cg_map
    again = copy.atoms()
    assert again.get_potential_energy() == energy
    np.testing.assert_array_equal(again.get_forces(), forces)
    both = pickle.loads(pickle.dumps(atoms))  # Atoms with the calculator and its results
    assert both.calc.check_state(both) == []
    both.positions += 0.01
    assert both.get_potential_energy() == pytest.approx(energy, abs=1e-11)


@pytest.mark.parametrize("suffix", ["traj", "extxyz"])
def test_files_keep_what_the_model_needs(calculator, tmp_path, suffix):
    atoms = calculator.atoms()
    energy, forces = atoms.get_potential_energy(), atoms.get_forces()
    path = tmp_path / f"beads.{suffix}"
    atoms.write(path)
    back = ase.io.read(path)
    assert back.get_potential_energy() == pytest.approx(energy, abs=1e-7)
    np.testing.assert_allclose(back.get_forces(), forces, atol=1e-7)
    np.testing.assert_allclose(back.get_masses(), atoms.get_masses(), rtol=1e-6)
    if suffix == "traj":
        assert back.calc.parameters == calculator.todict()
    back.calc = calculator
    assert back.get_potential_energy() == pytest.approx(energy, abs=1e-5)


def test_todict_names_the_model(calculator, force_field):
    record = calculator.todict()
    assert record["temperature_K"] == 300.0
    assert record == eager(force_field).todict()
    with torch.no_grad():
        force_field.members[0].out.bias += 1
    changed = eager(force_field).todict()
    assert changed["sha256"] != record["sha256"]


def test_nothing_global_changes(calculator):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        state, dtype = torch.get_rng_state(), torch.get_default_dtype()
        calculator.atoms().get_forces()
        assert torch.get_num_threads() == 2
        assert torch.get_default_dtype() == dtype
        assert torch.equal(torch.get_rng_state(), state)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("constraint", [FixAtoms([0, 4]), FixCom()])
def test_constraints(calculator, constraint):
    atoms = calculator.atoms()
    atoms.set_constraint(constraint)
    thermalize_momenta(atoms, 300, rng=np.random.default_rng(0))
    atoms.set_momenta(atoms.get_momenta())  # what the constraint leaves of them
    start, centre = atoms.positions.copy(), atoms.get_center_of_mass()
    VelocityVerlet(atoms, FS).run(20)
    if isinstance(constraint, FixAtoms):
        np.testing.assert_array_equal(atoms.positions[[0, 4]], start[[0, 4]])
        assert not atoms.get_forces()[[0, 4]].any()
    else:
        np.testing.assert_allclose(atoms.get_center_of_mass(), centre, atol=1e-10)
    # Its own forces aren't touched: constraints work on copies.
    assert np.abs(atoms.get_forces(apply_constraint=False)[[0, 4]]).max() > 0
    assert np.abs(atoms.positions - start).max() > 1e-3


def test_committee(ala2_map, ala2_beads):
    """A sequence of force fields is their mean; the spread is the deviation over them."""
    x = torch.from_numpy(ala2_beads)
    members = []
    for seed in range(3):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            one = ForceField.from_data(ala2_map, 300.0, ala2_beads, channels=4)
            members.append(speaking(one.double(), x[:8]))
    calc, alone = eager(members), [eager(member) for member in members]
    energies = [single.atoms().get_potential_energy() for single in alone]
    forces = [single.atoms().get_forces() for single in alone]
    atoms = calc.atoms()
    assert atoms.get_potential_energy() == pytest.approx(np.mean(energies), abs=1e-11)
    np.testing.assert_allclose(atoms.get_forces(), np.mean(forces, 0), rtol=0, atol=1e-10)
    spread = calc.spread(atoms)
    assert set(spread) == {"energy", "forces"}
    assert type(spread["energy"]) is float
    assert spread["energy"] == pytest.approx(np.std(energies), abs=1e-11)
    np.testing.assert_allclose(spread["forces"], np.std(forces, 0), rtol=0, atol=1e-10)
    # Of two replicas, the deviations of one member add up.
    two = eager(members, replicas=2)
    frames = ala2_beads[:2]
    both = [sum(single.atoms(beads).get_potential_energy() for beads in frames) for single in alone]
    assert two.spread(two.atoms(frames))["energy"] == pytest.approx(np.std(both), abs=1e-11)
    with pytest.raises(CalculatorSetupError, match="one member"):
        alone[0].spread(atoms)
    with pytest.raises(CalculatorSetupError, match="at least one"):
        CGCalculator([])
