"""`ccg free-energy`: what it writes, how it names things, and what it says to bad input."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ccg_ase import CGMap, ForceField, Topology, save_model
from ccg_ase.units import thermal_energy
from ccg_mda import Backmapper
from ccg_mda.universe import torsion_map
from ccg_training.cli import app
from ccg_training.config import Config
from ccg_training.free_energy_grid import Grid, Variable
from ccg_training.free_energy_names import variables_of
from ccg_training.reference import read_npz
from ccg_training.system import mapping_of, universe_of

EXAMPLE = Path(__file__).parents[2] / "examples" / "alanine_dipeptide"
DYNAMICS_KT = np.array([0.0, 0.997, 0.851, 0.935])
PHI, PSI = "torsion:C1-N2-CA2-C2", "torsion:N2-CA2-C2-N3"
TORSIONS = {
    "phi": ["name C and resname ACE", "resid 2 and name N", "name CA", "resid 2 and name C"],
    "psi": ["resid 2 and name N", "name CA", "resid 2 and name C", "resid 3 and name N"],
}


def ccg(*arguments):
    return CliRunner().invoke(app, ["free-energy", *map(str, arguments)])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A bead model, a torsion model, and configurations with beads and with torsions."""
    folder = tmp_path_factory.mktemp("models")
    text = (EXAMPLE / "cycle.toml").read_text()
    beads = folder / "beads.toml"
    beads.write_text(text.replace("alanine_dipeptide.pdb", str(EXAMPLE / "alanine_dipeptide.pdb")))
    head, tail = beads.read_text().split("[mapping.beads]")
    lines = [f"{name} = {rows!r}" for name, rows in TORSIONS.items()]
    torsions = folder / "torsions.toml"
    torsions.write_text(
        "\n".join([head, "[mapping.torsions]", *lines, tail[tail.index("[flow]") :]])
    )
    config = Config.load(beads)
    universe = universe_of(config)
    rng = np.random.default_rng(0)
    start = universe.atoms.positions.astype(float)
    atoms = torch.from_numpy(start + rng.normal(size=(300, *start.shape)) * 0.03)
    models = []
    for name, the_map in (
        ("beads", mapping_of(config)),
        ("torsions", torsion_map(universe, TORSIONS)),
    ):
        parts = {"backmapper": Backmapper.from_data(the_map, 300.0, atoms, width=4, hops=2)}
        if name == "beads":
            parts["force_field"] = ForceField.from_data(
                the_map, 300.0, the_map.apply(atoms.numpy()), channels=4
            )
        models.append(folder / f"{name}.ccg")
        save_model(models[-1], cg_map=the_map, temperature_K=300.0, parts=parts)
    return {"beads": models[0], "torsions": models[1], "of beads": beads, "of torsions": torsions}


def test_the_shipped_model_agrees_with_dynamics(files, tmp_path):
    """F(φ) of four bins against 80 ns of MD (ff96/OBC1, 300 K; errors of 0.02 kT)."""
    out = tmp_path / "f.npz"
    arguments = ["--on", f"phi={PHI}", "--range", "phi=-160:-40", "--bins", 4, "--windows", 5]
    arguments += ["--steps", 800, "--samples", 32, "--figure", "svg", "--out", out]
    arguments += ["--temperature", 310, "--basin", "phi<-100", "--basin", "phi>-100"]
    done = ccg(EXAMPLE / "alanine_dipeptide.ccg", files["of torsions"], *arguments)
    assert done.exit_code == 0, done.output
    arrays = read_npz(out)
    assert arrays["variables"].tolist() == ["phi"]
    np.testing.assert_allclose(arrays["edges_0"], [-160, -130, -100, -70, -40])
    kT = thermal_energy(300.0)
    F, error = arrays["bead_ensemble_free_energy"] / kT, arrays["bead_ensemble_error"] / kT
    assert (error < 0.5).all()
    gap = F - DYNAMICS_KT
    weight = 1 / (error**2 + 0.02**2)
    gap -= (weight * gap).sum() / weight.sum()
    assert (weight * gap**2).sum() < 18  # χ² of three degrees of freedom
    assert np.ptp(F) > 0.5
    assert arrays["bead_ensemble_310_K_temperature_K"] == 310
    for name in ("ΔF bead ensemble", "phi>-100", "energy calls", "known"):
        assert name in done.output
    assert out.with_suffix(".svg").stat().st_size > 1000
    assert not out.with_suffix(".parts").exists()
    again = ccg(EXAMPLE / "alanine_dipeptide.ccg", files["of torsions"], *arguments)
    assert again.exit_code == 2
    assert "--force" in again.output


BAD = {
    "a name that isn't there": (["--on", "chi"], "did you mean|known"),
    "a kind that isn't there": (["--on", "dihedral:0-1-2-3"], "no kind of variable"),
    "too few sites": (["--on", "torsion:C1-N2-CA2"], "over 4 different sites"),
    "a bead that isn't there": (["--on", "torsion:C1-N2-CA-C2"], "no site 'CA'.*CA2"),
    "a number that isn't there": (["--on", "distance:0-5"], "from 0 to 4"),
    "a distance without range": (["--on", "d=distance:0-4"], "give its range"),
    "a range upside down": (["--on", "d=distance:0-4", "--range", "d=5:4"], "must ascend"),
    "a range of nothing": (["--on", f"phi={PHI}", "--range", "psi=0:9"], "none of the variables"),
    "half a range": (["--on", f"phi={PHI}", "--range", "phi=5"], "LOW:HIGH"),
    "too many bins": (["--on", f"a={PHI}", "--on", f"b={PSI}", "--bins", "200"], "too large"),
    "bins that are no number": (["--on", f"a={PHI}", "--bins", "36x24"], "whole number"),
    "too few bins": (["--on", f"a={PHI}", "--bins", "1"], "two bins"),
    "an atom that is no bead": (
        ["--on", "torsion:ALA2:N-ALA2:CA-ALA2:CB-ALA2:HB1"],
        "no function of the beads",
    ),
    "a basin that can't be read": (["--on", f"phi={PHI}", "--basin", "phi=0"], "can't be read"),
    "a basin of no variable": (["--on", f"phi={PHI}", "--basin", "psi<0"], "no variable"),
    "a basin through a bin": (["--on", f"phi={PHI}", "--basin", "phi<5"], "nearest edge is"),
    "an empty basin": (["--on", f"phi={PHI}", "--basin", "phi<0 and phi>0"], "no bin"),
    "a figure of another kind": (["--on", f"phi={PHI}", "--figure", "jpg"], "png, svg, pdf"),
    "no variable": ([], "say what F is wanted of"),
    "centres of beads": (["--on", f"phi={PHI}", "--centres"], "leave out --centres"),
    "the same way twice": (["--on", f"phi={PHI}", "--check", "beads"], "same way"),
    "one window": (["--on", f"phi={PHI}", "--steps", "5"], "100 steps"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_error(files, tmp_path, case):
    arguments, message = BAD[case]
    arguments = [files["beads"] if word == "beads" else word for word in arguments]
    out = tmp_path / "f.npz"
    done = ccg(files["beads"], files["of beads"], *arguments, "--out", out)
    assert done.exit_code == 2, done.output
    text = " ".join(done.output.split())
    assert text.count("error:") == 1
    assert re.search(message, text), text
    assert not out.exists()


def test_models_and_configurations_must_fit(files, tmp_path):
    out = tmp_path / "f.npz"
    warm = tmp_path / "warm.toml"
    text = files["of beads"].read_text()
    warm.write_text(text.replace("temperature_K = 300.0", "temperature_K = 320.0"))
    done = ccg(files["beads"], warm, "--on", f"phi={PHI}", "--out", out)
    assert done.exit_code == 2
    assert "the model is for 300 K" in done.output
    done = ccg(
        files["torsions"],
        files["of torsions"],
        "--on",
        "d=distance:ACE1:C-NME3:N",
        "--range",
        "d=3:6",
        "--out",
        out,
    )
    assert done.exit_code == 2
    assert "none of the torsions" in done.output


def test_names_find_beads_and_atoms(files):
    config = Config.load(files["of beads"])
    cg_map = mapping_of(config)
    texts = ["phi", f"x={PHI}", "distance:0-4", "e=distance:C1-N3", "angle:1-2-3"]
    found = variables_of(texts, cg_map, {"phi": (4, 6, 8, 14)})
    assert [variable.name for variable in found] == ["phi", "x", "distance:0-4", "e", "angle:1-2-3"]
    assert [variable.sites for variable in found] == [
        (0, 1, 2, 3), (0, 1, 2, 3), (0, 4), (0, 4), (1, 2, 3),
    ]  # fmt: skip
    assert all(variable.of_beads for variable in found)
    x = universe_of(config).atoms.positions.astype(float)
    beads = cg_map.apply(x)
    assert found[2].values(beads) == pytest.approx(np.linalg.norm(beads[0] - beads[4]))
    assert found[0].values(beads) == pytest.approx(
        torsion_map(universe_of(config), TORSIONS).apply(x)[0]
    )
    atoms = Topology(names=("A", "B"), resnames=("GLY",) * 2, resids=(1, 2), masses=[12.0, 12.0])
    twins = CGMap.from_slices(atoms, [0, 1], names=("CA", "CA"))
    with pytest.raises(ValueError, match="2 beads are called CA"):
        variables_of(["distance:CA-1"], twins, {})


def test_basins_are_unions_of_half_open_intervals():
    phi = Variable("phi", "torsion", (0, 1, 2, 3))
    d = Variable("d", "distance", (0, 1))
    grid = Grid.regular([phi, d], [12, 4], [None, (2.0, 6.0)])
    angle, length = grid.centres[:, 0], grid.centres[:, 1]
    for text, expected in {
        "phi<0": angle < 0,
        "0 <= phi, phi<60": (angle > 0) & (angle < np.pi / 3),
        "phi>120 or phi<-120 and d>3": (angle > 2.09) | ((angle < -2.09) & (length > 3)),
    }.items():
        np.testing.assert_array_equal(grid.basin(text), expected)
    values = np.array([[-np.pi, 2.0], [np.pi, 2.5], [0.0, 6.0], [0.1, 6.1], [0.1, 5.9]])
    assert grid.index(values).tolist() == [0, 0, 27, -1, 27]
