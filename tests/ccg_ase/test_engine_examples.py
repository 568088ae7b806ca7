"""The scripts of examples/engines run from any folder, with the shipped model."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import MDAnalysis as mda
import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "engines"


def run(name, folder, *options):
    done = subprocess.run(
        [sys.executable, *options, FOLDER / f"{name}.py"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def bonds_of(positions):
    return np.linalg.norm(np.diff(positions.reshape(-1, 5, 3), axis=1), axis=-1)


@pytest.mark.filterwarnings("ignore:DCDReader currently makes:DeprecationWarning")
def test_openmm_script(tmp_path):
    printed = run("openmm_beads", tmp_path, "-W", "error")
    assert len(printed.splitlines()) == 6  # a header and a line every 100 steps
    with pytest.warns(UserWarning, match="Unknown element EP"):  # OpenMM's name for a bead's
        universe = mda.Universe(tmp_path / "beads.pdb", tmp_path / "beads.dcd", to_guess=())
    assert list(universe.atoms.resnames[:5]) == ["ACE", "ALA", "ALA", "ALA", "NME"]
    frames = universe.trajectory.timeseries(order="fac")
    assert frames.shape == (10, 40, 3)
    assert bonds_of(frames).min() > 1.1
    assert bonds_of(frames).max() < 1.8


def test_torch_sim_script(tmp_path):
    if importlib.util.find_spec("torch_sim") is None:
        pytest.skip('needs pip install "ccg[torchsim]"')
    printed = run("torch_sim_beads", tmp_path)  # torch-sim itself warns
    lengths = [float(r) for r in re.findall(r"(\S+) ± ", printed)]
    np.testing.assert_allclose(lengths, [1.335, 1.470, 1.550, 1.343], atol=0.03)


def test_socket_script(tmp_path):
    printed = run("ipi_socket", tmp_path, "-W", "error")
    assert "took 100 steps" in printed
    assert 100 < float(re.search(r"temperature (\d+) K of 300 K", printed)[1]) < 600


def test_inputs_of_ipi_differ_by_lammps_alone():
    alone, both = (
        ElementTree.parse(FOLDER / f"ipi_beads{x}.xml").getroot() for x in ("", "_lammps")
    )
    names = [[force.get("name") for force in root.findall("ffsocket")] for root in (alone, both)]
    assert names == [["ccg"], ["ccg", "lammps"]]
    address = both.findall("ffsocket")[1].find("address").text.strip()
    assert f"ipi {address} " in (FOLDER / "lammps_bond.in").read_text()
    for path in ("system/motion", "system/ensemble", "system/initialize"):
        first, second = (ElementTree.tostring(root.find(path)) for root in (alone, both))
        assert first == second
