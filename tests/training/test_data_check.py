"""The data check finds every fault that is put into data of known truth, and only that."""

import numpy as np
import pytest
from ase import units

from ccg_ase.mapping import CGMap
from ccg_ase.topology import Topology
from ccg_ase.torsion_map import TorsionMap
from ccg_ase.units import thermal_energy
from ccg_training.data_check import check
from ccg_training.findings import refuse_faults
from ccg_training.reference import ReferenceData, ReferenceDataError

T = 300.0
STIFF = 30.0  # eV/Å²
N = 5
REST = 1.05 * np.stack([np.arange(N), np.arange(N) % 2, np.zeros(N)], axis=1)


class Springs:
    """U = k/2 sum over all pairs |(x_i - x_j) - (rest_i - rest_j)|^2: Gaussian in closed form."""

    n_atoms, n_calls = N, 0

    def __call__(self, positions):
        shift = positions - REST
        shift = shift - shift.mean(axis=-2, keepdims=True)
        return 0.5 * STIFF * N * (shift**2).sum((-1, -2)), -STIFF * N * shift


def draw(frames=4000, temperature_K=T, seed=0):
    rng = np.random.default_rng(seed)
    shift = rng.normal(size=(frames, N, 3)) * np.sqrt(thermal_energy(temperature_K) / (STIFF * N))
    shift -= shift.mean(axis=1, keepdims=True)
    positions = REST + shift + rng.normal(size=(frames, 1, 3))
    energy, forces = Springs()(positions)
    return ReferenceData(positions, forces, energy)


@pytest.fixture(scope="module")
def data():
    return draw()


@pytest.fixture(scope="module")
def topology():
    bonds = [(i, i + 1) for i in range(N - 1)]
    return Topology(names=("C1", "C2", "C3", "C4", "C5"), masses=np.full(N, 12.0), bonds=bonds)


@pytest.fixture(scope="module")
def cg_map(topology):
    return CGMap.from_slices(topology, [0, 2, 4])


def faults(findings):
    return [finding for finding in findings if finding.level != "ok"]


def only_fault(findings):
    (fault,) = faults(findings)
    assert fault.cure
    return fault


def changed(data, **arrays):
    kept = {"positions": data.positions, "forces": data.forces, "energy": data.energy}
    return ReferenceData(**kept | arrays)


def test_right_data_have_no_fault(data, cg_map):
    findings = check(data, cg_map, T, Springs())
    assert faults(findings) == []
    titles = {"mapping", "forces fit the temperature", "potential", "sampling"}
    assert {finding.title for finding in findings} == titles


@pytest.mark.parametrize(
    ("unit", "factor"),
    [
        ("kJ/mol/Å", 96.485),
        ("kcal/mol/Å", 23.0605),
        ("kJ/mol/nm", 964.85),
        ("kcal/mol/nm", 230.6),
        ("eV/nm", 10.0),
        ("Hartree/bohr", 1 / 51.422),
        ("eV/Å, divided by 96.485 once too often", 1 / 96.485),
    ],
)
def test_a_wrong_force_unit_is_named(data, cg_map, unit, factor):
    fault = only_fault(check(changed(data, forces=data.forces * factor), cg_map, T))
    assert fault.title == "unit of the forces"
    assert f"in {unit} would" in fault.detail
    assert float(fault.cure.split()[4]) == pytest.approx(factor, rel=1e-3)


def test_gradients_instead_of_forces(data, cg_map):
    fault = only_fault(check(changed(data, forces=-data.forces), cg_map, T))
    assert "gradients" in fault.detail
    fault = only_fault(check(changed(data, forces=-9 * data.forces), cg_map, T))
    assert fault.title == "sign of the forces"


@pytest.mark.parametrize("true", [270.0, 320.0, 450.0])
def test_a_wrong_temperature_is_measured(cg_map, true):
    fault = only_fault(check(draw(temperature_K=true), cg_map, T))
    assert fault.title == "temperature"
    assert float(fault.detail.split("say ")[1].split()[0]) == pytest.approx(true, rel=0.02)


def test_forces_of_other_frames(data, cg_map):
    fault = only_fault(check(changed(data, forces=np.roll(data.forces, 7, axis=0)), cg_map, T))
    assert fault.level == "error"


def test_positions_in_nm(data, cg_map):
    found = faults(check(changed(data, positions=data.positions / 10), cg_map, T))
    assert found[0].title == "unit of the positions"
    assert "multiply the positions by 10" in found[0].cure


def test_another_potential(data, cg_map):
    class Other(Springs):
        def __call__(self, positions):
            energy, forces = super().__call__(positions)
            return energy, forces + 0.1 * np.sin(positions)

    assert "another force field" in only_fault(check(data, cg_map, T, Other())).detail


@pytest.mark.parametrize(
    ("factor", "title", "unit"),
    [
        (units.mol / units.kcal, "unit of the forces", "kcal/mol/Å"),
        (3.3, "unit of the forces", ""),
        (-1.0, "sign of the forces", ""),
    ],
)
def test_the_potential_names_a_wrong_unit_even_for_a_few_frames(data, cg_map, factor, title, unit):
    few = changed(data, forces=factor * data.forces)[:3]
    found = [fault for fault in faults(check(few, cg_map, T, Springs())) if fault.level == "error"]
    assert [fault.title for fault in found] == [title]
    assert unit in found[0].detail
    assert found[0].cure == f"divide the forces by {factor:.6g} to have eV/Å"


def test_one_fault_gives_one_error(data, cg_map):
    kcal = changed(data, forces=data.forces * units.mol / units.kcal)
    assert only_fault(check(kcal, cg_map, T, Springs())).title == "unit of the forces"
    nm = changed(data, positions=data.positions / 10)
    assert only_fault(check(nm, cg_map, T, Springs())).title == "unit of the positions"
    with pytest.raises(ReferenceDataError, match=r"divide the forces by 23\.06") as error:
        refuse_faults(check(kcal, cg_map, T, Springs()))
    assert "\n" not in str(error.value)
    refuse_faults(check(data, cg_map, T, Springs()))


def test_energies_in_another_unit_and_a_harmless_shift(data, cg_map):
    wrong = changed(data, energy=data.energy * 96.485)
    assert "energies" in only_fault(check(wrong, cg_map, T, Springs())).detail
    shifted = changed(data, energy=data.energy + 100.0)
    assert faults(check(shifted, cg_map, T, Springs())) == []


def test_a_potential_that_is_not_finite(data, cg_map):
    class Broken(Springs):
        def __call__(self, positions):
            energy, forces = super().__call__(positions)
            return energy + np.inf, forces * 0

    assert "isn't finite" in only_fault(check(data, cg_map, T, Broken())).detail


def test_missing_forces_are_a_warning(data, cg_map):
    fault = only_fault(check(changed(data, forces=None), cg_map, T))
    assert (fault.level, fault.title) == ("warning", "no forces")


def with_rigid_first_bond(data):
    positions = data.positions.copy()
    arm = positions[:, 1] - positions[:, 0]
    positions[:, 1] = positions[:, 0] + 1.5 * arm / np.linalg.norm(arm, axis=1, keepdims=True)
    return positions


def test_rigid_bonds_are_a_warning_and_equipartition_is_not_asked(data, cg_map):
    positions = with_rigid_first_bond(data)
    findings = check(changed(data, positions=positions), cg_map, T)
    fault = only_fault(findings)
    assert (fault.level, fault.title) == ("warning", "rigid bonds")
    assert "1 of 4 bonds and 0 angles" in fault.detail
    assert "C1-C2" in fault.detail
    assert "metric" in fault.detail
    assert "forces fit the temperature" not in {finding.title for finding in findings}
    refuse_faults(findings)


def test_rigid_angles(data, cg_map):
    positions = with_rigid_first_bond(data)
    x1, x2, x3 = (positions[:, k] for k in range(3))
    out = (x1 - x2) / np.linalg.norm(x1 - x2, axis=1, keepdims=True)
    side = x3 - x2 - out * ((x3 - x2) * out).sum(1, keepdims=True)
    side /= np.linalg.norm(side, axis=1, keepdims=True)
    positions[:, 2] = x2 + 1.5 * (np.cos(1.9) * out + np.sin(1.9) * side)
    fault = only_fault(check(ReferenceData(positions), cg_map, T, None)[:-2])
    assert "2 of 4 bonds and 1 angles" in fault.detail
    assert "C1-C2-C3" in fault.detail


def test_a_rigid_bond_between_beads(data, topology):
    rigid = changed(data, positions=with_rigid_first_bond(data))
    slices = CGMap.from_slices(topology, [0, 1, 4])
    titles = [fault.title for fault in faults(check(rigid, slices, T))]
    assert titles == ["rigid bonds", "rigid bonds between beads"]


def test_a_molecule_split_by_a_box(data, cg_map):
    positions = data.positions.copy()
    positions[2000:, 3:] += 20.0
    found = faults(check(changed(data, positions=positions), cg_map, T))
    assert found[0].title == "broken molecule"
    assert "C3-C4" in found[0].detail


def test_atoms_that_the_map_misses(topology):
    parts = Topology(names=topology.names, masses=topology.masses, bonds=[(0, 1), (1, 2), (3, 4)])
    fault = only_fault(check(draw(), CGMap.from_slices(parts, [0, 2]), T))
    assert fault.title == "atoms without a bead"
    assert "MOL:C4, MOL:C5" in fault.detail


def test_several_molecules(topology):
    parts = Topology(names=topology.names, masses=topology.masses, bonds=[(0, 1), (1, 2), (3, 4)])
    fault = only_fault(check(draw(), CGMap.from_slices(parts, [0, 2, 3]), T))
    assert fault.title == "number of molecules"


def test_too_few_beads(data, topology):
    fault = only_fault(check(data, CGMap.from_slices(topology, [0]), T))
    assert fault.title == "number of beads"


@pytest.mark.parametrize("weighting", ["mass", "geometry"])
def test_centres_are_fine(data, topology, weighting):
    heavier = Topology.from_dict({**topology.to_dict(), "masses": [12.0, 13.0, 12.0, 1.0, 12.0]})
    groups = CGMap.from_groups(heavier, [[0, 1], [2, 3]], weighting=weighting)
    findings = check(data, groups, T, Springs())
    assert faults(findings) == []
    assert f"centres of {weighting}" in findings[0].detail


def test_torsions_are_fine(data, topology):
    torsions = TorsionMap(topology, [[0, 1, 2, 3], [1, 2, 3, 4]], ("a", "b"))
    findings = check(data, torsions, T, Springs())
    assert faults(findings) == []
    assert "torsions: a, b" in findings[0].detail


def test_another_number_of_atoms(data, cg_map):
    fault = only_fault(check(ReferenceData(data.positions[:, :4]), cg_map, T))
    assert fault.title == "number of atoms"


def test_few_frames_and_slow_sampling(data, cg_map):
    assert only_fault(check(data[:500], cg_map, T)).title == "few frames"
    slow = data[np.repeat(np.arange(40), 100)]
    assert "slow sampling" in [fault.title for fault in faults(check(slow, cg_map, T))]
