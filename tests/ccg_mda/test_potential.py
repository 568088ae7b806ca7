import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones

from ccg_mda.potential import ASEPotential, OpenMMPotential, TorchPotential, torch_energy

openmm = pytest.importorskip("openmm")
PDB = Path(__file__).parents[1] / "data" / "alanine_dipeptide.pdb"
FILES = ["amber96.xml", "amber96_obc.xml"]
KJ_MOL = units.kJ / units.mol
R0, STIFFNESS = 0.12, 4000.0  # nm, kJ/(mol nm²)


def chain(constrained=False):
    """Three particles in a row of harmonic bonds."""
    system = openmm.System()
    bonds = openmm.HarmonicBondForce()
    for _ in range(3):
        system.addParticle(12.0)
    for i in range(2):
        bonds.addBond(i, i + 1, R0, STIFFNESS)
    system.addForce(bonds)
    if constrained:
        system.addConstraint(0, 1, R0)
    return system


def chain_energy(x):
    """The same in torch: Å in, eV out."""
    k = STIFFNESS * KJ_MOL / 100
    return sum(0.5 * k * ((x[i + 1] - x[i]).norm() - 10 * R0) ** 2 for i in range(2))


@pytest.fixture
def positions():
    rng = np.random.default_rng(3)
    return np.array([[0, 0, 0], [1.2, 0, 0], [2, 1, 0]]) + 0.1 * rng.normal(size=(4, 2, 3, 3))


@pytest.fixture(scope="module")
def dipeptide():
    return OpenMMPotential.from_pdb(PDB, FILES)


@pytest.fixture(scope="module")
def dipeptide_positions():
    rng = np.random.default_rng(5)
    lines = [line for line in PDB.read_text().splitlines() if line.startswith("ATOM")]
    x = np.array([[float(line[a : a + 8]) for a in (30, 38, 46)] for line in lines])
    return x + 0.02 * rng.normal(size=(3, 22, 3))


def test_openmm_closed_form(positions):
    potential = OpenMMPotential(chain())
    energy, forces = potential(positions)
    assert energy.shape == (4, 2)
    assert forces.shape == positions.shape
    bond = np.diff(positions, axis=-2)
    r = np.linalg.norm(bond, axis=-1)
    k = STIFFNESS * KJ_MOL / 100
    np.testing.assert_allclose(energy, 0.5 * k * ((r - 10 * R0) ** 2).sum(-1), rtol=1e-12)
    pull = -(k * (r - 10 * R0) / r)[..., None] * bond
    np.testing.assert_allclose(forces[..., 0, :], -pull[..., 0, :], rtol=1e-11)
    np.testing.assert_allclose(forces[..., 1, :], pull[..., 0, :] - pull[..., 1, :], rtol=1e-11)
    assert potential.n_calls == 8


def test_single_frame_and_input_dtype(positions):
    potential = OpenMMPotential(chain())
    energy, forces = potential(positions[0, 0].astype(np.float32))
    assert np.ndim(energy) == 0
    assert forces.shape == (3, 3)
    assert forces.dtype == energy.dtype == np.float64
    assert potential(positions[:0])[0].shape == (0, 2)


def test_torch_potential_agrees(positions):
    expected = OpenMMPotential(chain())(positions)
    for value, reference in zip(TorchPotential(chain_energy, 3)(positions), expected, strict=True):
        np.testing.assert_allclose(value, reference, rtol=1e-11, atol=1e-12)


def test_ase_potential_agrees(positions):
    atoms = Atoms("Ar3", positions=positions[0, 0])
    options = {"sigma": 0.8, "epsilon": 0.3, "rc": 50.0}
    potential = ASEPotential(LennardJones(**options), atoms)
    energy, forces = potential(positions)
    atoms.calc = LennardJones(**options)
    atoms.positions = positions[2, 1]
    assert energy[2, 1] == atoms.get_potential_energy()
    np.testing.assert_array_equal(forces[2, 1], atoms.get_forces())
    assert potential.n_calls == 8
    with pytest.raises(NotImplementedError, match="pbc"):
        ASEPotential(EMT(), Atoms("Ar", pbc=True, cell=np.eye(3)))


def test_dipeptide_forces_are_gradients(dipeptide, dipeptide_positions):
    x, h = dipeptide_positions[0], 1e-4
    _, forces = dipeptide(x)
    steps = h * np.eye(66).reshape(66, 22, 3)
    slope = (dipeptide(x - steps)[0] - dipeptide(x + steps)[0]) / (2 * h)
    np.testing.assert_allclose(forces.ravel(), slope, atol=2e-5)


def test_dipeptide_matches_plain_openmm(dipeptide, dipeptide_positions):
    from openmm import app, unit

    pdb = app.PDBFile(str(PDB))
    system = app.ForceField(*FILES).createSystem(pdb.topology)
    context = openmm.Context(system, openmm.VerletIntegrator(0.001))
    context.setPositions(dipeptide_positions[1] * unit.angstrom)
    state = context.getState(energy=True, forces=True)
    energy, forces = dipeptide(dipeptide_positions[1])
    reference = state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)
    assert energy == pytest.approx(reference * KJ_MOL, abs=1e-4)
    reference = state.getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.angstrom)
    np.testing.assert_allclose(forces, reference * KJ_MOL, atol=1e-3)
    assert dipeptide.platform == "Reference"
    assert not any(isinstance(f, openmm.CMMotionRemover) for f in dipeptide.system.getForces())
    assert dipeptide.system.getNumConstraints() == 0


def test_pickle_and_xml_give_the_same_bits(dipeptide, dipeptide_positions, tmp_path):
    expected = dipeptide(dipeptide_positions)
    path = tmp_path / "system.xml"
    path.write_text(openmm.XmlSerializer.serialize(dipeptide.system))
    for other in (pickle.loads(pickle.dumps(dipeptide)), OpenMMPotential.from_xml(path)):
        for value, reference in zip(other(dipeptide_positions), expected, strict=True):
            np.testing.assert_array_equal(value, reference)


def test_larger_systems_use_the_cpu_platform():
    system = openmm.System()
    bonds = openmm.HarmonicBondForce()
    for i in range(80):
        system.addParticle(12.0)
        if i:
            bonds.addBond(i - 1, i, R0, STIFFNESS)
    system.addForce(bonds)
    x = np.random.default_rng(1).normal(size=(2, 80, 3))
    fast, exact = OpenMMPotential(system), OpenMMPotential(system, platform="Reference")
    assert fast.platform == "CPU"
    for value, reference in zip(fast(x), exact(x), strict=True):
        np.testing.assert_allclose(value, reference, rtol=1e-4, atol=1e-4)


def test_clash_spares_the_batch(dipeptide, dipeptide_positions):
    x = dipeptide_positions.copy()
    x[1, 1] = x[1, 0]
    energy, forces = dipeptide(x)
    assert energy[1] == np.inf
    assert np.all(forces[1] == 0)
    good = dipeptide(dipeptide_positions)
    np.testing.assert_array_equal(energy[[0, 2]], good[0][[0, 2]])
    np.testing.assert_array_equal(forces[[0, 2]], good[1][[0, 2]])


def test_torch_energy_differentiates(positions):
    x = torch.tensor(positions, requires_grad=True)
    energy = torch_energy(OpenMMPotential(chain()), x)
    assert energy.shape == (4, 2)
    scale = torch.arange(1.0, 9.0, dtype=torch.float64).reshape(4, 2)
    (gradient,) = torch.autograd.grad((scale * energy).sum(), x)
    y = torch.tensor(positions, requires_grad=True)
    reference = torch.stack([chain_energy(frame) for frame in y.reshape(-1, 3, 3)])
    (expected,) = torch.autograd.grad((scale.reshape(-1) * reference).sum(), y)
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(energy.detach().reshape(-1), reference.detach())


def test_input_errors(positions):
    potential = OpenMMPotential(chain())
    with pytest.raises(ValueError, match=r"\(\.\.\., 3, 3\), got \(4, 2, 2, 3\)"):
        potential(positions[..., :2, :])
    positions[1, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match=r"1 of 8 frames.*first is frame 2"):
        potential(positions)
    assert potential.n_calls == 0


def test_system_errors():
    with pytest.raises(ValueError, match="constraints=None"):
        OpenMMPotential(chain(constrained=True))
    periodic = chain()
    periodic.getForce(0).setUsesPeriodicBoundaryConditions(True)
    with pytest.raises(NotImplementedError, match="NoCutoff"):
        OpenMMPotential(periodic)
    ghost = chain()
    ghost.addParticle(0.0)
    ghost.setVirtualSite(3, openmm.TwoParticleAverageSite(0, 1, 0.5, 0.5))
    with pytest.raises(ValueError, match="virtual sites"):
        OpenMMPotential(ghost)


def test_file_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pdb"):
        OpenMMPotential.from_pdb(tmp_path / "nowhere.pdb", FILES)
    with pytest.raises(ValueError, match=r"'amber96_obd\.xml'.*comes with OpenMM"):
        OpenMMPotential.from_pdb(PDB, ["amber96.xml", "amber96_obd.xml"])
    bald = tmp_path / "bald.pdb"
    lines = [line for line in PDB.read_text().splitlines() if " HB" not in line]
    bald.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"bald\.pdb.*ALA.*missing atoms"):
        OpenMMPotential.from_pdb(bald, FILES)
    with pytest.raises(ValueError, match=r"bald\.pdb.*isn't an OpenMM XML"):
        OpenMMPotential.from_xml(bald)


def test_speed_of_small_molecules(dipeptide, dipeptide_positions):
    """Batching must not cost more than the energy: far above what unit objects allow."""
    from time import perf_counter

    batch = np.broadcast_to(dipeptide_positions[0], (500, 22, 3))
    dipeptide(batch)
    start = perf_counter()
    dipeptide(batch)
    assert 500 / (perf_counter() - start) > 1000  # 17 000 on an idle core; shared machines differ
