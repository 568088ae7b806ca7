"""What the calculator refuses, and how it says so."""

import numpy as np
import pytest
import torch
from ase import units
from ase.calculators.calculator import CalculationFailed, CalculatorSetupError
from ase.md.velocitydistribution import thermalize_momenta
from ase.md.verlet import VelocityVerlet
from bead_systems import eager, speaking

from ccg_ase import CGMap, ForceField

FS = units.fs


@pytest.fixture
def calculator(force_field):
    return eager(force_field)


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
        eager(ForceField(ala2_map, 300.0, ala2_prior)).atoms()
    with pytest.raises(CalculatorSetupError, match="1 x 5 beads"):
        calculator.atoms(np.zeros((4, 3)))
    with pytest.raises(CalculatorSetupError, match="replicas"):
        eager(force_field, replicas=0)
    with torch.no_grad():
        calculator.force_field.members[0].out.bias.fill_(np.inf)
    with pytest.raises(CalculationFailed, match="energy or a force"):
        calculator.atoms().get_potential_energy()


def test_other_temperatures(calculator, ala2_map, ala2_beads):
    calculator.check_temperature(300.0)
    for wrong in (310, 300.001, np.nan):
        with pytest.raises(CalculatorSetupError, match="free energy at 300"):
            calculator.check_temperature(wrong)
    with pytest.raises(CalculatorSetupError, match="free energy at 300"):
        eager(calculator.force_field, temperature_K=310.0)
    model = speaking(
        ForceField.from_data(
            ala2_map, 300.0, ala2_beads, temperatures_K=(290, 340), channels=4
        ).double(),
        torch.from_numpy(ala2_beads[:8]),
    )
    warm = eager(model, temperature_K=330.0)
    warm.check_temperature(330.0)
    assert (warm.temperature_K, warm.todict()["temperature_K"]) == (330.0, 330.0)
    expected = model(torch.from_numpy(ala2_beads[0]), temperature_K=330.0).item()
    assert warm.atoms(ala2_beads[0]).get_potential_energy() == pytest.approx(expected, abs=1e-10)
    assert eager(model).atoms(ala2_beads[0]).get_potential_energy() != pytest.approx(
        expected, abs=1e-4
    )
    with pytest.raises(CalculatorSetupError, match=r"330.0 K and wrong at 300"):
        warm.check_temperature(300.0)


def test_coincident_beads(calculator):
    """Refused where a run starts, and wherever a structure is set anew; steps aren't checked."""
    atoms = calculator.atoms()
    start = atoms.positions.copy()
    atoms.positions[1] = atoms.positions[3]
    with pytest.raises(CalculationFailed, match="beads 1 and 3 of frame 0 are at the same place"):
        atoms.get_forces()
    assert calculator.results == {}
    atoms.positions = start
    assert np.isfinite(atoms.get_forces()).all()
    checks, check = [], calculator._check_apart
    calculator._check_apart = lambda *a: (checks.append(1), check(*a))
    VelocityVerlet(atoms, FS).run(5)
    assert checks == []
    atoms.positions[1] = atoms.positions[4]
    with pytest.raises(CalculationFailed, match="beads 1 and 4"):
        atoms.get_potential_energy()


def test_an_exploding_run_stops(calculator):
    atoms = calculator.atoms()
    thermalize_momenta(atoms, 300, rng=np.random.default_rng(0))
    dynamics = VelocityVerlet(atoms, 500 * FS)
    with pytest.raises(CalculationFailed, match=r"NaN or infinite"):
        dynamics.run(2000)
    assert 1 < dynamics.nsteps < 2000
    assert calculator.results == {}
