"""Bad input ends in one clear error with its cure, before anything long starts.

What a single file can get wrong is tested beside the code that reads it (test_config,
test_reference, test_data_check, ccg_ase/test_checkpoint, ccg_ase/test_calculator); here the same
faults go through the command line as a user makes them.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from ase.calculators.calculator import CalculatorSetupError
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

from ccg_ase import CGCalculator, ForceField, save_model
from ccg_ase.checkpoint import ModelFileError
from ccg_mda import Backmapper, backmap, bead_universe
from ccg_training.cli import app
from ccg_training.config import Config
from ccg_training.sampling import ase_bead_dynamics
from ccg_training.system import mapping_of, potential_of, universe_of

PDB = Path(__file__).parents[2] / "examples" / "alanine_dipeptide" / "alanine_dipeptide.pdb"
BEADS = """[mapping.beads]
C1 = "resname ACE and name C"
N2 = "resname ALA and name N"
CA2 = "resname ALA and name CA"
C2 = "resname ALA and name C"
N3 = "resname NME and name N"
"""
REFERENCE = '[reference]\nsource = "generate"\n'
TEXT = f'[system]\ntopology = "{PDB.name}"\n{BEADS}{REFERENCE}[run]\ndirectory = "run"\n'
KCAL = 23.0605  # kcal/mol in eV, inverted


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Return an empty working directory with the PDB file of alanine dipeptide."""
    (tmp_path / PDB.name).write_text(PDB.read_text())
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def frames(tmp_path_factory) -> tuple[np.ndarray, np.ndarray]:
    """Return fifty frames around the structure of the PDB file, and their forces in eV/Å."""
    path = tmp_path_factory.mktemp("frames") / "cycle.toml"
    path.write_text(TEXT.replace(PDB.name, str(PDB)))
    config = Config.load(path)
    start = universe_of(config).atoms.positions.astype(float)
    x = start + np.random.default_rng(0).normal(scale=0.02, size=(50, 22, 3))
    return x, potential_of(config)(x)[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory, frames) -> Path:
    """Return an untrained model file of five beads at 300 K."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "cycle.toml").write_text(TEXT.replace(PDB.name, str(PDB)))
    cg_map = mapping_of(Config.load(folder / "cycle.toml"))
    beads = cg_map.apply(frames[0])
    parts = {
        "force_field": ForceField.from_data(cg_map, 300.0, beads),
        "backmapper": Backmapper.from_data(cg_map, 300.0, torch.from_numpy(frames[0]), width=8),
    }
    save_model(folder / "model.ccg", cg_map=cg_map, temperature_K=300.0, parts=parts)
    return folder / "model.ccg"


def ccg(*arguments) -> tuple[int, list[str]]:
    """Run the command line; return its exit code and what it printed."""
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output.strip().splitlines()


def refused(text: str, *words: str) -> None:
    """Assert that `ccg check` and `ccg train` name the fault in one line and leave nothing."""
    Path("cycle.toml").write_text(text)
    for command in ("train", "check"):
        code, lines = ccg(command, "cycle.toml")
        # What `check` finds in the data is its answer, with exit code 1; the rest is an error.
        assert code == (2 if command == "train" else code) != 0
        found = [n for n, line in enumerate(lines) if line.startswith("error")]
        assert len(found) == 1, lines
        said = " ".join(lines[found[0] : found[0] + 2] if command == "check" else [lines[found[0]]])
        for word in words:
            assert word in said
        assert not list(Path().rglob("*.npz")) or "data.npz" in text
        assert not Path("run/reference.npz").exists()


def from_files(**arrays) -> str:
    """Write arrays as reference data; return the configuration that reads them."""
    np.savez("data.npz", **arrays)
    return TEXT.replace(REFERENCE, '[reference]\nsource = "trajectory"\nfiles = ["data.npz"]\n')


# ------------------------------------------------------------------------------ the TOML file


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (PDB.name, "gone.pdb", ("line 2", "no such file", "gone.pdb", "relative to the TOML")),
        (REFERENCE, REFERENCE + "walkrs = 3\n", ("unknown key 'walkrs'", "mean 'walkers'")),
        (BEADS, BEADS + '[potential]\nforcefield = ["amber69.xml"]\n', ("mean 'amber96.xml'",)),
        (BEADS, BEADS + '[potential]\nforcefield = ["tip3p.xml"]\n', ("ACE", "Add the missing")),
        ('"run"\n', '"run"\n[dynamics]\nn_steps = 105\n', ("multiple of save_every = 50",)),
        ('name CA"', 'name CX"', ("'resname ALA and name CX' matches no atoms", "CA CB CH3")),
        ('name CA"', 'nam CA"', ("'nam'", "write e.g.")),
        (BEADS, '[mapping]\npreset = "ca"\n', ("no internal coordinate", "add beads")),
        (BEADS, '[mapping]\npreset = "molecule-com"\n', ("no internal coordinate", "add beads")),
        (
            BEADS,
            '[mapping.torsions]\nphi = ["name N", "name CA"]\n',
            ("line 3", "torsions", "at least 4"),
        ),
        (
            BEADS,
            '[mapping.torsions]\nx = ["name CB", "name CA", "name N", "name H1"]\n',
            ("torsion 'x'", "'name N' matches 2 atoms"),
        ),
        (
            BEADS,
            '[mapping.beads]\nA = "name CA"\nB = "name CB"\nC = "name CA"\n',
            ("(CA) is listed as two", "one bead only"),
        ),
    ],
)
def test_a_fault_in_the_configuration(folder, old, new, words):
    assert TEXT.count(old) == 1
    refused(TEXT.replace(old, new), *words)


def test_a_structure_that_is_none(folder):
    (folder / PDB.name).write_text("no atoms at all\n")
    refused(TEXT, "can't be read as a structure", "PDB file")
    code, lines = ccg("init", PDB.name)
    assert (code, len(lines)) == (2, 1)


def test_disconnected_atoms(folder):
    """The bond between the first residue and the second is missing; its methyl has no bead."""
    text = PDB.read_text().replace("CONECT    2    1    3    4    5", "CONECT    2    1    3    4")
    text = text.replace("CONECT    5    2    6    7", "CONECT    5    6    7")
    (folder / PDB.name).write_text(text)
    refused(TEXT, "4 atoms to no bead: ACE:H1", "add missing bonds")


# ------------------------------------------------------------------------- the reference data


def test_a_trajectory_that_is_missing(folder):
    text = from_files(positions=np.zeros((1, 22, 3)))
    (folder / "data.npz").unlink()
    refused(text, "no such file", "data.npz")


def test_a_trajectory_of_another_topology(folder, frames):
    refused(from_files(positions=frames[0][:, :20]), "20 atoms", "has 22", "use the topology")


def test_a_trajectory_of_another_topology_in_a_format_of_mdanalysis(folder):
    atoms = "".join("C 0.0 0.0 1.0\n" for _ in range(20))
    (folder / "data.npz.xyz").write_text(f"20\n\n{atoms}")
    text = from_files(positions=np.zeros((1, 1, 3))).replace('"data.npz"', '"data.npz.xyz"')
    refused(text, "data.npz.xyz can't be opened", "22", "20", "use the topology")


@pytest.mark.parametrize("where", ["positions", "forces"])
def test_frames_with_nan(folder, frames, where):
    arrays = {"positions": frames[0].copy(), "forces": frames[1].copy()}
    arrays[where][7, 3, 1] = np.nan
    refused(from_files(**arrays), f"{where} of frame 7 are not finite", "drop these frames")


@pytest.mark.parametrize("with_energy", [False, True])
def test_forces_in_another_unit(folder, frames, with_energy):
    x, forces = frames
    energy = {"energy": np.zeros(len(x))} if with_energy else {}
    refused(
        from_files(positions=x, forces=KCAL * forces, **energy),
        "unit of the forces",
        "forces in kcal/mol/Å",
        "divide the forces by 23.06",
    )


def test_data_of_another_temperature(folder, frames):
    """Stiff directions of a molecule at 300 K say so, when it is taken for one at 400 K."""
    x = frames[0][0]
    config = Config.build({"system": {"topology": PDB}, "mapping": {"preset": "backbone"}}, folder)
    potential = potential_of(config)
    rng = np.random.default_rng(1)
    # A short Metropolis walk at 300 K from the minimum is enough for bonds and angles.
    data, kT = [], 8.617333e-5 * 300.0
    energy, _ = potential(x)
    for step in range(12_000):
        trial = x + rng.normal(scale=0.007, size=x.shape)
        new, _ = potential(trial)
        if np.log(rng.random()) < (energy - new) / kT:
            x, energy = trial, new
        if step > 4000 and step % 20 == 0:
            data.append(x)
    positions = np.array(data)
    text = from_files(positions=positions, forces=potential(positions)[1])
    refused(
        text.replace(BEADS, f"temperature_K = 400.0\n{BEADS}"), "temperature", "set temperature_K ="
    )


# ----------------------------------------------------------------------------- the model file


def bead_file(n: int) -> str:
    path = Path(f"beads{n}.xyz")
    path.write_text(f"{n}\n\n" + "".join(f"C {1.5 * i} {0.7 * (i % 2)} 0.0\n" for i in range(n)))
    return str(path)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("missing", ("no model file",)),
        ("truncated", ("isn't a readable model file", "truncated")),
        ("future", ("format version 99", "upgrade ccg")),
        ("foreign", ("not a ccg model",)),
    ],
)
def test_a_model_file_that_cannot_be_used(folder, model, fault, words):
    path = folder / "bad.ccg"
    if fault == "truncated":
        path.write_bytes(model.read_bytes()[:-1000])
    elif fault == "future":
        with safe_open(model, framework="pt") as file:
            header = json.loads(file.metadata()["ccg"]) | {"version": 99}
        save_file({}, path, metadata={"ccg": json.dumps(header)})
    elif fault == "foreign":
        save_file({"x": torch.zeros(1)}, path)
    for arguments in (("info", path), ("backmap", path, bead_file(5), "out.xtc")):
        code, lines = ccg(*arguments)
        assert (code, len(lines)) == (2, 1)
        assert all(word in lines[0] for word in words)
    for load in (CGCalculator.load, Backmapper.load):
        with pytest.raises((ModelFileError, FileNotFoundError), match=words[0]):
            load(path)
    assert not list(folder.glob("out.*"))


@pytest.mark.parametrize(
    ("beads", "out", "words"),
    [
        (4, "out.xtc", ("the model's 5 beads", "Number of atoms 4", "use the model")),
        (0, "out.xtc", ("no bead trajectory",)),
        (5, "out.foo", ("can't write out.foo", "try the ending .xtc")),
    ],
)
def test_backmapping_of_what_does_not_fit(folder, model, beads, out, words):
    code, lines = ccg("backmap", model, bead_file(beads) if beads else "gone.xyz", out)
    assert (code, len(lines)) == (2, 1)
    assert all(word in lines[0] for word in words)
    assert not list(folder.glob("out.*"))


def test_wrong_number_of_beads_in_python(folder, model):
    atoms = CGCalculator.load(model).atoms()
    calculator = atoms.calc
    fewer = atoms[:4]
    fewer.calc = calculator
    with pytest.raises(CalculatorSetupError, match=r"5 beads.*the Atoms have 4"):
        fewer.get_potential_energy()
    with pytest.raises(ValueError, match="another mapping"):
        Backmapper.load(model)(torch.zeros(4, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"\(n_frames, 5, 3\)"):
        bead_universe(np.zeros((2, 4, 3)), model)


def test_another_temperature(folder, model):
    (folder / "warm.toml").write_text(TEXT.replace(BEADS, f"temperature_K = 310.0\n{BEADS}"))
    code, lines = ccg("backmap", model, bead_file(5), "out.xtc", "--energies", "warm.toml")
    assert (code, len(lines)) == (2, 1)
    assert "for 300.0 K, asked for 310.0 K; train a model" in lines[0]
    assert not list(folder.glob("out.*"))
    calculator = CGCalculator.load(model)
    with pytest.raises(CalculatorSetupError, match=r"free energy at 300.*wrong at 310"):
        calculator.check_temperature(310.0)
    beads = calculator.atoms().positions
    with pytest.raises(CalculatorSetupError, match="wrong at 310"):
        ase_bead_dynamics(
            calculator.force_field, beads[None], "md", n_steps=1, save_every=1, temperature_K=310.0
        )
    flow = Backmapper.load(model)
    with pytest.raises(ValueError, match="trained at 300 K"):
        flow(torch.from_numpy(beads), temperature_K=310.0)
    with pytest.raises(ValueError, match="310 K was asked for"):
        backmap(bead_universe(beads[None], model), flow, temperature_K=310.0)
