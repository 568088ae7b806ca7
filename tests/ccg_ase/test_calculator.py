import pickle

import ase.io
import numpy as np
import pytest
import torch
from ase import units
from ase.calculators.calculator import (
    CalculationFailed,
    CalculatorSetupError,
    PropertyNotImplementedError,
    all_changes,
)
from ase.calculators.fd import calculate_numerical_forces
from ase.calculators.mixing import SumCalculator
from ase.md.andersen import Andersen
from ase.md.bussi import Bussi
from ase.md.langevin import Langevin
from ase.md.langevinbaoab import LangevinBAOAB
from ase.md.nose_hoover_chain import NoseHooverChainNVT
from ase.md.velocitydistribution import thermalize_momenta
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS, FIRE

from ccg_ase import CGCalculator, CGMap, ForceField

FS = units.fs


@pytest.fixture
def calculator(force_field):
    return CGCalculator(force_field, dtype=torch.float64)


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
    calc = CGCalculator(model, dtype=torch.float64)
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
    atoms = CGCalculator(force_field).atoms()
    exact = CGCalculator(force_field, dtype=torch.float64).atoms()
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
    atoms = calculator.atoms()
    thermalize_momenta(atoms, 300, rng=np.random.default_rng(0))
    drift = []
    for timestep in (2.0, 1.0):
        copy = atoms.copy()
        copy.calc = calculator
        start, worst = copy.get_total_energy(), 0.0
        dynamics = VelocityVerlet(copy, timestep * FS)
        for _ in dynamics.irun(int(200 / timestep)):
            worst = max(worst, abs(copy.get_total_energy() - start))
        drift.append(worst)
    assert drift[0] < 0.02
    assert drift[0] / drift[1] > 3  # second order: four, less the rounding of the maximum


def test_replicas_are_independent_copies(force_field, ala2_beads):
    calc = CGCalculator(force_field, dtype=torch.float64, replicas=3)
    atoms = calc.atoms(ala2_beads[:3])
    single = CGCalculator(force_field, dtype=torch.float64)
    alone = [single.atoms(beads) for beads in ala2_beads[:3]]
    np.testing.assert_allclose(
        atoms.get_forces(), np.concatenate([a.get_forces() for a in alone]), atol=1e-11
    )
    total = sum(a.get_potential_energy() for a in alone)
    assert atoms.get_potential_energy() == pytest.approx(total, abs=1e-11)
    assert len(calc.atoms()) == 15
    np.testing.assert_array_equal(atoms.get_masses(), np.tile(calc.cg_map.beads.masses, 3))


def test_composes(calculator, force_field):
    other = CGCalculator(force_field, dtype=torch.float64)
    atoms = calculator.atoms()
    once, forces = atoms.get_potential_energy(), atoms.get_forces()
    atoms.calc = SumCalculator([calculator, other])
    assert atoms.get_potential_energy() == pytest.approx(2 * once)
    np.testing.assert_allclose(atoms.get_forces(), 2 * forces)


def test_pickles(calculator):
    atoms = calculator.atoms()
    copy = pickle.loads(pickle.dumps(calculator))
    assert copy.atoms().get_potential_energy() == atoms.get_potential_energy()
    assert copy.cg_map == calculator.cg_map


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
    assert record == CGCalculator(force_field, dtype=torch.float64).todict()
    with torch.no_grad():
        force_field.out.bias += 1
    changed = CGCalculator(force_field, dtype=torch.float64).todict()
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


def test_refuses(calculator, force_field, ala2_map, ala2_prior, ala2_topology):
    atoms = calculator.atoms()
    wrong = atoms[:3]
    wrong.calc = calculator
    with pytest.raises(CalculatorSetupError, match="5 beads in 1 replicas"):
        wrong.get_forces()
    atoms.pbc = True
    with pytest.raises(CalculatorSetupError, match="pbc=False"):
        atoms.get_forces()
    atoms.pbc = False
    atoms.info["cg_map"] = CGMap.from_slices(ala2_topology, [0, 1, 2, 3, 4]).fingerprint()
    with pytest.raises(CalculatorSetupError, match="another mapping"):
        atoms.get_forces()
    del atoms.info["cg_map"]
    assert np.isfinite(atoms.get_forces()).all()
    atoms.positions[2, 1] = np.nan
    with pytest.raises(CalculationFailed, match="bead 2"):
        atoms.get_forces()
    assert calculator.results == {}
    with pytest.raises(CalculatorSetupError, match="reference structure"):
        CGCalculator(ForceField(ala2_map, 300.0, ala2_prior)).atoms()
    with pytest.raises(CalculatorSetupError, match="1 x 5 beads"):
        calculator.atoms(np.zeros((4, 3)))
    with pytest.raises(CalculatorSetupError, match="replicas"):
        CGCalculator(force_field, replicas=0)
    with torch.no_grad():
        calculator.force_field.out.bias.fill_(np.inf)
    with pytest.raises(CalculationFailed, match="energy or a force"):
        calculator.atoms().get_potential_energy()


def test_temperature(calculator):
    calculator.check_temperature(300.0)
    for wrong in (310, 300.001, np.nan):
        with pytest.raises(CalculatorSetupError, match="free energy at 300"):
            calculator.check_temperature(wrong)
