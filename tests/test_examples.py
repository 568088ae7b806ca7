"""What a newcomer meets first: the example's scripts and model, and a README that can't rot."""

import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import MDAnalysis as mda
import numpy as np
import pytest
from ase.io import read
from typer.testing import CliRunner

from ccg_ase import load_model, thermal_energy
from ccg_training.cli import app
from ccg_training.config import Config
from ccg_training.system import mapping_of

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "alanine_dipeptide"
MODEL = EXAMPLE / "alanine_dipeptide.ccg"
# Of each script the files that it writes, and what it prints.
GALLERY = {
    "ramachandran": (["ramachandran.png"], r"with weights: 0\.\d+ ± 0\.\d+ Å"),
    "hydrogen_bonds": ([], r"N\(NME3\)-H \.\.\. O\(ACE1\): 0\.\d+ ± "),
    "files": (["atoms.xtc", "heavy.xtc"], r"256 weights.* off by (0|\de-1\d|\de-0[6-9]) at"),
    "ensemble": (["ensemble.png"], "wrote"),
}
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """Code blocks of the README."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def section(title: str) -> str:
    """Text under a heading of second order."""
    return re.split(r"^## ", README.split(f"\n## {title}\n")[1], flags=re.MULTILINE)[0]


# One after the other in one process, since importing torch takes longer than what they do.
AS_SCRIPTS = """
import contextlib, io, json, pathlib, runpy, sys

printed = {}
for path in sys.argv[1:]:
    sys.argv, sys.path[0] = [path], str(pathlib.Path(path).parent)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        runpy.run_path(path, run_name="__main__")
    printed[pathlib.Path(path).stem] = out.getvalue()
print(json.dumps(printed))
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """Run the scripts as a user does, then the gallery; their folder and what each printed."""
    assert MODEL.is_file(), "the example ships without its model"
    folder = tmp_path_factory.mktemp("example")
    # Frames four times as dense, and half as many: all scripts pass over all of them.
    text = (EXAMPLE / "ase_langevin.py").read_text(encoding="utf-8")
    for whole, less in (("run(2000)", "run(325)"), ("interval=100", "interval=25")):
        assert whole in text
        text = text.replace(whole, less)
    (folder / "ase_langevin.py").write_text(text, encoding="utf-8")
    (folder / MODEL.name).symlink_to(MODEL)
    paths = [folder / "ase_langevin.py", EXAMPLE / "mdanalysis_backmap.py"]
    paths += [ROOT / "examples" / "gallery" / f"{name}.py" for name in GALLERY]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", AS_SCRIPTS, *paths],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return folder, json.loads(done.stdout)


# --- the example ------------------------------------------------------------------------------


def test_the_shipped_model_is_of_the_configuration():
    config, model = Config.load(EXAMPLE / "cycle.toml"), load_model(MODEL)
    assert model.cg_map.fingerprint() == mapping_of(config).fingerprint()
    assert model.temperature_K == config.system.temperature_K
    assert set(model.configs) == {"force_field", "backmapper"}
    assert MODEL.stat().st_size < 5e6


def test_every_key_of_the_configuration_loads():
    config = Config.load(EXAMPLE / "cycle.toml")
    given = tomllib.loads((EXAMPLE / "cycle.toml").read_text(encoding="utf-8"))
    assert given["mapping"]["beads"] == config.mapping.beads
    for name, keys in given.items():
        assert set(keys) <= getattr(config, name).model_fields_set


def test_the_ase_script_moves_the_beads(scripts):
    folder, printed = scripts
    frames = read(folder / "beads.extxyz", index=":")
    beads = np.array([frame.positions for frame in frames])
    assert beads.shape == (16 * 8, 5, 3)
    bonds = np.linalg.norm(np.diff(beads, axis=1), axis=-1)
    assert bonds.min() > 1.0
    assert bonds.max() < 2.0
    lines = printed["ase_langevin"].splitlines()
    assert lines[0] == "16 copies x 8 frames in beads.extxyz"
    shares = [float(share) for share in re.findall(r": (\d+)%", printed["ase_langevin"])]
    assert sum(shares) == pytest.approx(100, abs=1)


def test_the_mdanalysis_script_weighs_the_atoms(scripts):
    folder, printed = scripts
    ess = re.search(r"effective sample size (\S+) of 512", printed["mdanalysis_backmap"])
    assert 0.1 < float(ess[1]) <= 1
    assert printed["mdanalysis_backmap"].count(" ± ") == 3
    atoms = mda.Universe(EXAMPLE / "alanine_dipeptide.pdb", folder / "atoms.h5md")
    beads = np.array([frame.positions for frame in read(folder / "beads.extxyz", index=":")])
    cg_map = load_model(MODEL).cg_map
    assert len(atoms.trajectory) == 512
    for ts in atoms.trajectory[::40]:
        expected = -ts.data["energy"] / thermal_energy(300) - ts.data["log_prob"]
        assert ts.data["log_weight"] == pytest.approx(expected)
        on_beads = cg_map.apply(atoms.atoms.positions)
        np.testing.assert_allclose(on_beads, beads[ts.frame // 4], atol=1e-4)


@pytest.mark.parametrize("name", GALLERY)
def test_the_gallery_runs_on_these_beads(scripts, name):
    folder, printed = scripts
    files, message = GALLERY[name]
    assert re.search(message, printed[name])
    assert all((folder / file).stat().st_size > 1000 for file in files)


# --- the README -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("title", "script"),
    [
        ("Use a model with ASE", "ase_langevin.py"),
        ("Use it with MDAnalysis", "mdanalysis_backmap.py"),
    ],
)
def test_python_blocks_are_lines_of_the_scripts(title, script):
    (code,) = (block for block in blocks("python") if block in section(title))
    compile(code, "README.md", "exec")
    left = iter((EXAMPLE / script).read_text(encoding="utf-8").splitlines())
    for line in filter(None, code.splitlines()):
        if not line.startswith(("folder =", "model =")):  # the scripts find them by their own place
            assert line in left, line  # moves the iterator on, so the order counts
    for path in re.findall(r'"(examples/[^"]*)"', code):
        assert (ROOT / path).exists()


def test_set_up_is_two_commands_and_ci_runs_the_test_command():
    set_up, main_job, test = (b.strip() for b in blocks("bash") if b in section("Set up"))
    assert len(set_up.splitlines()) == 2
    assert "-c constraints.txt" in set_up
    assert Config.load(ROOT / main_job.removeprefix("ccg train ")).reference.source == "generate"
    assert test in (ROOT / ".ci" / "run").read_text().splitlines()


def test_toml_blocks_load(tmp_path):
    for name in ("run1.trr", "run2.h5md"):
        (tmp_path / name).touch()
    topology = str(EXAMPLE / "alanine_dipeptide.pdb")
    mapping, torsions, reference = map(tomllib.loads, blocks("toml"))
    config = Config.build({"system": {"topology": topology}} | mapping | reference, tmp_path)
    assert mapping_of(config).n_beads == 3
    assert len(config.reference.files) == 2
    by_torsions = Config.build({"system": {"topology": topology}} | torsions, tmp_path)
    assert mapping_of(by_torsions).names == ("phi",)


def test_keys_and_presets_that_it_names_exist():
    named = re.findall(r"`\[(\w+)\]`((?:,? `\w+`)+)", README)
    assert len(named) >= 5
    for name, keys in named:
        for key in re.findall(r"\w+", keys):
            assert key in Config.model_fields[name].annotation.model_fields, f"[{name}] {key}"
    files = re.search(r"`forcefield = (\[.*?\])`", README)[1]
    sections = {
        "system": {"topology": EXAMPLE / "alanine_dipeptide.pdb"},
        "potential": tomllib.loads(f"forcefield = {files}"),
    }
    for preset in ("ca", "backbone", "heavy"):
        assert f'"{preset}"' in README
        Config.build(sections | {"mapping": {"preset": preset}}, ROOT)


def test_commands_for_ones_own_molecule(scripts, tmp_path, monkeypatch):
    (commands,) = (block for block in blocks("bash") if block in section("Your own molecule"))
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "molecule"
    run.mkdir(parents=True)
    (run / "model.ccg").write_bytes(MODEL.read_bytes())
    (tmp_path / "molecule.pdb").write_bytes((EXAMPLE / "alanine_dipeptide.pdb").read_bytes())
    (tmp_path / "beads.extxyz").write_bytes((scripts[0] / "beads.extxyz").read_bytes())
    done = set()
    for line in commands.splitlines():
        ccg, command, *arguments = shlex.split(line, comments=True)
        assert ccg == "ccg"
        if command in ("train", "report", "free-energy"):  # minutes, and tested elsewhere
            arguments = ["--help"]
        result = CliRunner().invoke(app, [command, *arguments])
        assert result.exit_code == 0, result.output
        done.add(command)
    assert done == {c.name or c.callback.__name__ for c in app.registered_commands}
    assert (tmp_path / "atoms.xtc").is_file()


def test_links_lead_somewhere_and_the_picture_is_drawn():
    links = re.findall(r"\]\((?!https:)([^)]+)\)", README)
    assert len(links) >= 4
    assert all((ROOT / link).is_file() for link in links)
    assert ElementTree.parse(ROOT / "examples" / "cycle.svg").getroot().tag.endswith("svg")


def test_no_figure_is_left_open():
    assert not re.findall(r"\bTODO_\w+", README)
