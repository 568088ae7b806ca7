"""The calculator of a periodic system: stress, drivers of the cell, and what it refuses."""

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
)
from ase.calculators.mixing import SumCalculator
from ase.constraints import FixAtoms
from ase.filters import FrechetCellFilter
from ase.md.langevinbaoab import LangevinBAOAB
from ase.md.nose_hoover_chain import IsotropicMTKNPT
from ase.md.velocitydistribution import thermalize_momenta
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS, FIRE
from bead_systems import SKEWED, system

from ccg_ase import CGCalculator

FS, BAR = units.fs, 1e-4 * units.GPa
MIXTURE = ((4, 3), (1, 5))


@pytest.fixture(scope="module")
def force_field():
    return system(*MIXTURE, cell=SKEWED, n_layers=1)[0]


@pytest.fixture
def calculator(force_field):
    return CGCalculator(force_field, dtype=torch.float64, compiled=False)


def counted(calculator):
    """Count the evaluations of a calculator."""
    evaluate, calls = calculator.calculate, []
    calculator.calculate = lambda *a, **k: (calls.append(1), evaluate(*a, **k))
    return calls


def test_atoms_are_ready_to_run(calculator, force_field):
    atoms = calculator.atoms()
    assert atoms.pbc.all()
    np.testing.assert_array_equal(atoms.cell.array, force_field.reference_box)
    np.testing.assert_array_equal(atoms.positions, force_field.reference_beads)
    exported = set(calculator.export_properties())
    assert "stress" not in exported  # nothing was evaluated yet
    atoms.get_forces()
    names = {"energy", "free_energy", "energies", "forces", "stress"}
    assert set(calculator.export_properties()) - {"natoms"} == names


def test_stress_is_in_the_order_of_voigt(calculator, force_field):
    atoms = calculator.atoms()
    voigt, full = atoms.get_stress(), atoms.get_stress(voigt=False)
    pairs = ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))
    np.testing.assert_array_equal(voigt, [full[i, j] for i, j in pairs])
    assert voigt.dtype == np.float64
    # Shear along y by x: only the term xy of six answers to first order.
    strain = np.zeros((3, 3))
    strain[0, 1] = 1e-5
    energies = []
    for sign in (1, -1):
        moved = atoms.copy()
        moved.set_cell(atoms.cell.array @ (np.eye(3) + sign * strain), scale_atoms=True)
        moved.calc = calculator
        energies.append(moved.get_potential_energy())
    slope = (energies[0] - energies[1]) / 2e-5 / atoms.get_volume()
    assert voigt[5] == pytest.approx(slope, abs=1e-8)
    assert abs(voigt[5]) > 1e-5


NPT = {
    "IsotropicMTKNPT": lambda a: IsotropicMTKNPT(
        a, 2 * FS, 300, 100 * BAR, tdamp=100 * FS, pdamp=1000 * FS
    ),
    "LangevinBAOAB": lambda a: LangevinBAOAB(
        a, 2 * FS, temperature_K=300, externalstress=-100 * BAR, T_tau=100 * FS,
        P_tau=1000 * FS, P_mass=5e4, rng=np.random.default_rng(0),
    ),
    "LangevinBAOAB, hydrostatic": lambda a: LangevinBAOAB(
        a, 2 * FS, temperature_K=300, externalstress=-100 * BAR, hydrostatic=True,
        T_tau=100 * FS, P_tau=1000 * FS, P_mass=5e4, rng=np.random.default_rng(0),
    ),
    "LangevinBAOAB, NVT": lambda a: LangevinBAOAB(
        a, 2 * FS, temperature_K=300, T_tau=100 * FS, rng=np.random.default_rng(0)
    ),
    "VelocityVerlet": lambda a: VelocityVerlet(a, 2 * FS),
}  # fmt: skip


@pytest.mark.parametrize("driver", NPT)
def test_one_evaluation_per_step(calculator, driver):
    calls = counted(calculator)
    atoms = calculator.atoms()
    # The cell in its standard form: some drivers of the cell want it upper triangular.
    atoms.set_cell(atoms.cell.standard_form("upper")[0], scale_atoms=True)
    thermalize_momenta(atoms, 300, rng=np.random.default_rng(0))
    volume = atoms.get_volume()
    dynamics = NPT[driver](atoms)
    dynamics.attach(lambda: (atoms.get_potential_energy(), atoms.get_stress()))
    dynamics.run(50)
    assert len(calls) == 51
    changes = driver not in ("LangevinBAOAB, NVT", "VelocityVerlet")
    assert (atoms.get_volume() != volume) == changes
    assert np.isfinite(atoms.positions).all()


@pytest.mark.parametrize("optimiser", [FIRE, BFGS])
def test_optimisers_of_positions_and_cell(calculator, optimiser):
    atoms = calculator.atoms()
    before = atoms.get_potential_energy()
    optimiser(atoms, logfile=None).run(fmax=0.05, steps=20)
    relaxed = atoms.get_potential_energy()
    assert relaxed < before - 0.01
    stress = np.abs(atoms.get_stress()).max()
    optimiser(FrechetCellFilter(atoms), logfile=None).run(fmax=0.01, steps=40)
    assert atoms.get_potential_energy() < relaxed
    assert np.abs(atoms.get_stress()).max() < stress


def test_energy_is_conserved(calculator):
    atoms = calculator.atoms()
    thermalize_momenta(atoms, 300, rng=np.random.default_rng(0))
    dynamics = VelocityVerlet(atoms, 0.5 * FS)
    energies = [atoms.get_total_energy() for _ in dynamics.irun(200)]
    slope = np.polyfit(np.arange(201), energies, 1)[0]
    assert abs(slope * 200) / len(atoms) < 1e-5


def test_cell_and_pbc_are_part_of_the_state(calculator):
    calls = counted(calculator)
    atoms = calculator.atoms()
    first = atoms.get_potential_energy()
    atoms.get_stress(), atoms.get_forces()
    assert len(calls) == 1
    atoms.set_cell(1.01 * atoms.cell)
    assert calculator.check_state(atoms) == ["cell"]
    assert atoms.get_potential_energy() != first
    assert len(calls) == 2
    atoms.pbc = False
    assert calculator.check_state(atoms) == ["pbc"]


def test_wrapping_changes_nothing(calculator):
    atoms = calculator.atoms()
    energy, forces, stress = atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()
    atoms.positions += np.random.default_rng(0).integers(-3, 4, (len(atoms), 3)) @ SKEWED
    assert atoms.get_potential_energy() == pytest.approx(energy, abs=1e-10)
    atoms.wrap()
    np.testing.assert_allclose(atoms.get_forces(), forces, rtol=0, atol=1e-9)
    np.testing.assert_allclose(atoms.get_stress(), stress, rtol=0, atol=1e-12)


def test_supercell(calculator, force_field):
    atoms = calculator.atoms()
    large = CGCalculator(force_field, dtype=torch.float64, compiled=False, supercell=(2, 1, 1))
    many = large.atoms()
    assert len(many) == 2 * len(atoms)
    np.testing.assert_allclose(many.cell.lengths(), atoms.cell.lengths() * [2, 1, 1])
    assert many.get_potential_energy() == pytest.approx(2 * atoms.get_potential_energy(), abs=1e-9)
    np.testing.assert_allclose(many.get_stress(), atoms.get_stress(), rtol=0, atol=1e-11)
    np.testing.assert_allclose(many.get_forces(), np.tile(atoms.get_forces(), (2, 1)), atol=1e-9)
    with pytest.raises(CalculatorSetupError, match="three positive integers"):
        CGCalculator(force_field, compiled=False, supercell=(2, 1))
    with pytest.raises(CalculatorSetupError, match="open space"):
        CGCalculator(system((4, 1))[0], compiled=False, supercell=(2, 1, 1))


def test_replicas_share_a_box(calculator, force_field):
    alone = calculator.atoms()
    both = CGCalculator(force_field, dtype=torch.float64, compiled=False, replicas=2).atoms()
    assert both.get_potential_energy() == pytest.approx(2 * alone.get_potential_energy())
    np.testing.assert_allclose(both.get_stress(), 2 * alone.get_stress(), rtol=1e-10)


def test_composes_and_pickles(calculator):
    atoms = calculator.atoms()
    results = atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()
    copy = pickle.loads(pickle.dumps(calculator)).atoms()
    assert copy.get_potential_energy() == results[0]
    np.testing.assert_array_equal(copy.get_forces(), results[1])
    np.testing.assert_array_equal(copy.get_stress(), results[2])
    atoms.calc = SumCalculator([calculator, copy.calc])
    np.testing.assert_allclose(atoms.get_stress(), 2 * results[2])


@pytest.mark.parametrize("suffix", ["traj", "extxyz"])
def test_files_keep_box_and_stress(calculator, tmp_path, suffix):
    atoms = calculator.atoms()
    energy, stress = atoms.get_potential_energy(), atoms.get_stress()
    atoms.write(tmp_path / f"box.{suffix}")
    back = ase.io.read(tmp_path / f"box.{suffix}")
    assert back.pbc.all()
    np.testing.assert_allclose(back.cell.array, SKEWED, atol=1e-8)
    assert back.get_potential_energy() == pytest.approx(energy, abs=1e-7)
    np.testing.assert_allclose(back.get_stress(), stress, rtol=0, atol=1e-8)
    np.testing.assert_allclose(back.get_masses(), atoms.get_masses(), rtol=1e-6)
    back.calc = calculator
    assert back.get_potential_energy() == pytest.approx(energy, abs=1e-5)
    np.testing.assert_allclose(back.get_stress(), stress, rtol=0, atol=1e-6)


def test_fixed_beads_stay_in_a_changing_cell(calculator):
    atoms = calculator.atoms()
    atoms.set_constraint(FixAtoms([0]))
    place = atoms.positions[0].copy()
    VelocityVerlet(atoms, FS).run(5)
    np.testing.assert_array_equal(atoms.positions[0], place)


def test_refuses(calculator, force_field):
    atoms = calculator.atoms()
    for pbc in (False, (True, True, False)):
        atoms.pbc = pbc
        with pytest.raises(CalculatorSetupError, match="three-dimensional cell and pbc=True"):
            atoms.get_forces()
    atoms.pbc = True
    atoms.set_cell([[13, 0, 0], [0, 14, 0], [0, 0, 0]])
    with pytest.raises(CalculatorSetupError, match="three-dimensional cell"):
        atoms.get_stress()
    atoms.set_cell(SKEWED)
    atoms.positions[3, 2] = np.inf
    with pytest.raises(CalculationFailed, match="bead 3"):
        atoms.get_forces()
    atoms = calculator.atoms()
    atoms.positions[1] = atoms.positions[13] + SKEWED[0] - SKEWED[2]
    with pytest.raises(CalculationFailed, match="beads 1 and 13"):
        atoms.get_forces()
    atoms = calculator.atoms()
    atoms.cell[1, 1] = np.nan
    with pytest.raises(CalculationFailed, match="cell"):
        atoms.get_forces()
    open_space = CGCalculator(system((4, 1))[0], compiled=False).atoms()
    with pytest.raises(PropertyNotImplementedError, match="open space"):
        open_space.get_stress()
    open_space.set_cell(SKEWED)  # a cell without pbc is a frame for pictures
    assert np.isfinite(open_space.get_potential_energy())
    open_space.pbc = (False, False, True)
    with pytest.raises(CalculatorSetupError, match="pbc=False"):
        open_space.get_potential_energy()
