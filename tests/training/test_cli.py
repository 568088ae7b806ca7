"""The command line, and what it stands on: run directories, progress, files of atoms."""

import io
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from MDAnalysis import Universe
from rich.console import Console
from typer.testing import CliRunner

from ccg_ase.checkpoint import save_model
from ccg_ase.forcefield import ForceField
from ccg_mda.flow import Backmapper
from ccg_training.cli import app
from ccg_training.config import Config
from ccg_training.progress import Progress
from ccg_training.run_directory import RunDirectoryError, prepare_run
from ccg_training.system import mapping_of, potential_of, universe_of

EXAMPLE = Path(__file__).parents[2] / "examples" / "alanine_dipeptide"


def ccg(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def config_file(tmp_path):
    text = (EXAMPLE / "cycle.toml").read_text()
    path = tmp_path / "cycle.toml"
    path.write_text(text.replace("alanine_dipeptide.pdb", str(EXAMPLE / "alanine_dipeptide.pdb")))
    return path


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    config = Config.load(EXAMPLE / "cycle.toml")
    cg_map = mapping_of(config)
    rng = np.random.default_rng(0)
    start = universe_of(config).atoms.positions.astype(float)
    atoms = start + rng.normal(size=(400, *start.shape)) * 0.03
    beads = cg_map.apply(atoms)
    force_field = ForceField.from_data(cg_map, 300.0, beads)
    backmapper = Backmapper.from_data(cg_map, 300.0, torch.tensor(atoms), width=8, hops=2)
    path = tmp_path_factory.mktemp("model") / "model.ccg"
    save_model(
        path,
        cg_map=cg_map,
        temperature_K=300.0,
        parts={"force_field": force_field, "backmapper": backmapper},
        metrics={"ess": 0.91234},
    )
    return path


def test_version_and_help():
    assert ccg("--version").output.startswith("ccg ")
    text = ccg("--help").output
    for command in ("init", "check", "train", "report", "info", "backmap"):
        assert command in text
        assert ccg(command, "--help").exit_code == 0


def test_help_loads_nothing_heavy():
    code = (
        "import sys, ccg_training.cli; "
        "print([m for m in ('torch', 'MDAnalysis', 'openmm', 'matplotlib', 'scipy', 'pydantic') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_example_is_what_it_says():
    config = Config.load(EXAMPLE / "cycle.toml")
    cg_map = mapping_of(config)
    assert cg_map.beads.names == ("C1", "N2", "CA2", "C2", "N3")
    assert cg_map.kind == "slice"
    assert (cg_map.owner >= 0).all()
    universe = universe_of(config)
    n, c, cb, ca = (
        universe.select_atoms(f"resname ALA and name {name}").positions[0]
        for name in ("N", "C", "CB", "CA")
    )
    assert np.dot(np.cross(n - ca, c - ca), cb - ca) > 0  # L-alanine
    energy, _ = potential_of(config)(universe.atoms.positions.astype(float))
    assert -3 < energy < 0


def test_init_writes_a_file_that_check_accepts(tmp_path):
    target = tmp_path / "new.toml"
    done = ccg("init", EXAMPLE / "alanine_dipeptide.pdb", "--output", target)
    assert done.exit_code == 0, done.output
    assert "5 beads" in done.output
    config = Config.load(target)
    assert config.run.directory == tmp_path / "runs" / "alanine_dipeptide"
    assert "# " in target.read_text()
    assert ccg("check", target).exit_code == 0
    again = ccg("init", EXAMPLE / "alanine_dipeptide.pdb", "--output", target)
    assert again.exit_code == 2
    assert "exists" in again.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("init", "no.pdb"), "no such file: no.pdb"),
        (("check", "no.toml"), "no such file"),
        (("train", "no.toml"), "ccg init"),
        (("report", "."), "report_data.npz"),
        (("info", "no.ccg"), "no.ccg"),
        (("backmap", "no.ccg", "no.xyz", "no.xtc"), "no.ccg"),
    ],
)
def test_errors_are_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = ccg(*arguments)
    assert done.exit_code == 2
    assert message in done.output
    assert len(done.output.strip().splitlines()) == 1
    assert "Traceback" not in done.output


def test_check_reports_a_wrong_unit_with_exit_code_one(config_file, tmp_path):
    config = Config.load(config_file)
    positions = universe_of(config).atoms.positions.astype(float)
    positions = positions + np.random.default_rng(0).normal(size=(50, 22, 3)) * 0.02
    _, forces = potential_of(config)(positions)
    np.savez(tmp_path / "data.npz", positions=positions, forces=forces * 96.485)
    text = config_file.read_text().replace("time_ns = 8.0\nwalkers = 2", 'files = ["data.npz"]')
    config_file.write_text(text.replace('"generate"', '"trajectory"'))
    done = ccg("check", config_file)
    assert done.exit_code == 1
    assert "all stored forces are 96.485 times those of the potential" in done.output
    assert "→ divide the forces by 96.485" in done.output


# --- train ------------------------------------------------------------------------------------


@pytest.fixture
def cycle(monkeypatch):
    """A cycle that calls what the test gives it, in place of hours of training."""
    module = types.ModuleType("ccg_training.cycle")
    module.run_cycle = lambda config, progress: None
    monkeypatch.setitem(sys.modules, "ccg_training.cycle", module)
    return module


def test_train_begins_resumes_and_begins_again(config_file, cycle, tmp_path):
    run = tmp_path / "runs" / "alanine_dipeptide"

    def work(config, progress):
        with progress.stage("work", total=2) as stage:
            stage.advance()
        (run / "state.json").write_text("{}")

    cycle.run_cycle = work
    assert ccg("train", config_file).exit_code == 0
    assert Config.load(run / "config.toml") == Config.load(config_file)
    done = ccg("train", config_file)
    assert done.exit_code == 2
    assert "--resume" in done.output
    assert ccg("train", config_file, "--resume").exit_code == 0
    assert ccg("train", run / "config.toml", "--resume").exit_code == 0
    assert ccg("train", config_file, "--fresh").exit_code == 0
    assert (tmp_path / "runs" / "alanine_dipeptide.1" / "state.json").exists()
    assert "give one" in ccg("train", config_file, "--resume", "--fresh").output


def test_resume_refuses_another_configuration(config_file):
    directory = prepare_run(Config.load(config_file))
    (directory / "reference.npz").write_bytes(b"")
    text = config_file.read_text()
    config_file.write_text(text + "[cycle]\niterations = 9\n[run]\nthreads = 1\n")
    prepare_run(Config.load(config_file), resume=True)
    config_file.write_text(text.replace("300.0", "310.0"))
    with pytest.raises(RunDirectoryError, match=r"system.temperature_K: 300.0 -> 310.0"):
        prepare_run(Config.load(config_file), resume=True)


def test_an_interruption_says_how_to_continue(config_file, cycle):
    def interrupted(config, progress):
        os.kill(os.getpid(), signal.SIGINT)

    cycle.run_cycle = interrupted
    done = ccg("train", config_file)
    assert done.exit_code == 130
    assert f"ccg train {config_file} --resume" in " ".join(done.output.split())


def test_a_bug_keeps_its_traceback(config_file, cycle):
    def bug(config, progress):
        np.zeros(3) + np.zeros(4)

    cycle.run_cycle = bug
    done = ccg("train", config_file)
    assert done.exit_code == 1
    assert isinstance(done.exception, ValueError)


# --- info and backmap -------------------------------------------------------------------------


def test_info_shows_map_prior_placement_and_metrics(model_file):
    text = ccg("info", model_file, "--placement").output
    for words in ("300 K", "22 atoms, 5 beads", "ALA2:CA", "r0 = ", "improper", "0.9123"):
        assert words in text
    assert "improper" not in ccg("info", model_file).output


def test_info_tells_rotors_and_what_is_held(config_file, tmp_path):
    cg_map = mapping_of(Config.load(config_file))
    start = universe_of(Config.load(config_file)).atoms.positions.astype(float)
    x = start + np.random.default_rng(0).normal(size=(400, 22, 3)) * 0.03
    arm = x[:, 9] - x[:, 8]  # HA and CA
    x[:, 9] = x[:, 8] + 1.09 * arm / np.linalg.norm(arm, axis=1, keepdims=True)
    flow = Backmapper.from_data(cg_map, 300.0, torch.tensor(x), width=8, hops=2)
    path = tmp_path / "held.ccg"
    save_model(path, cg_map=cg_map, temperature_K=300.0, parts={"backmapper": flow})
    text = ccg("info", path, "--placement").output
    assert "held rigid: bond ALA2:CA-ALA2:HA\n" in text
    (row,) = [line for line in text.splitlines() if line.lstrip().startswith("ALA2:HA ")]
    assert row.split()[-1] == "bond"
    flow = Backmapper.from_config(cg_map, 300.0, {**flow.config, "rotor": [True] * 17})
    save_model(path, cg_map=cg_map, temperature_K=300.0, parts={"backmapper": flow})
    assert ccg("info", path, "--placement").output.count(" yes") == 17


def test_info_shows_the_placement_before_training(config_file):
    text = ccg("info", config_file, "--placement").output
    for words in ("300 K", "22 atoms, 5 beads", "ALA2:HB1", "generation"):
        assert words in text
    assert "generation" not in ccg("info", config_file).output
    head, rest = config_file.read_text().split("[mapping.beads]")
    groups = '[mapping.beads]\nACE = "resname ACE"\nALA = "resname ALA"\nNME = "resname NME"\n'
    config_file.write_text(head + groups + rest[rest.index("\n[") :])
    text = ccg("info", config_file, "--placement").output
    assert "22 atoms, 3 beads" in text
    assert "moves with" in text
    assert "bead NME" in text
    checked = ccg("check", config_file).output
    assert "22 atoms, 3 beads (centres of mass)" in checked
    assert "19 atoms in" in checked


@pytest.mark.parametrize("suffix", ["xtc", "pdb"])
def test_backmap_writes_atoms_densities_and_weights(model_file, config_file, tmp_path, suffix):
    config = Config.load(config_file)
    cg_map, universe = mapping_of(config), universe_of(config)
    beads = cg_map.apply(universe.atoms.positions)
    frame = "5\n\n" + "".join(f"C {x:.6f} {y:.6f} {z:.6f}\n" for x, y, z in beads)
    (tmp_path / "beads.xyz").write_text(frame * 3)
    out = tmp_path / f"atoms.{suffix}"
    arguments = ("backmap", model_file, tmp_path / "beads.xyz", out, "--n-samples", 2)
    done = ccg(*arguments, "--energies", config_file)
    assert done.exit_code == 0, done.output
    atoms = Universe(str(tmp_path / "atoms.pdb"), str(out))
    assert len(atoms.trajectory) == 6
    for _ in atoms.trajectory:
        np.testing.assert_allclose(cg_map.apply(atoms.atoms.positions), beads, atol=0.006)
    table = np.load(tmp_path / "atoms.npz")
    np.testing.assert_array_equal(table["cg_frame"], [0, 0, 1, 1, 2, 2])
    kT = 8.617333e-5 * 300
    np.testing.assert_allclose(
        table["log_weight"], -table["energy"] / kT - table["log_prob"], rtol=1e-5
    )
    assert "effective sample size" in done.output
    again = ccg(*arguments)
    assert again.exit_code == 2
    assert "--force" in again.output
    assert ccg(*arguments, "--force", "--seed", 1).exit_code == 0


# --- progress ---------------------------------------------------------------------------------


def lines_of(live, **options):
    console = Console(force_terminal=live, width=100, record=True, file=io.StringIO())
    with Progress(console, live=live, **options) as progress:
        with progress.stage("fit", total=4) as stage:
            for step in range(4):
                stage.advance(note=f"loss {step}")
        with pytest.raises(RuntimeError), progress.stage("broken"):
            raise RuntimeError
    return console.export_text()


def test_progress_prints_one_line_per_stage_and_percentages():
    text = lines_of(False)
    assert "%" not in text
    assert "done fit" in text
    assert "loss 3" in text
    assert "stopped broken" in text
    assert "  fit 50% loss 1" in lines_of(False, every_s=0)


def test_progress_draws_bars_and_can_be_quiet():
    assert "done fit" in lines_of(True)
    assert lines_of(False, quiet=True) == ""


def test_rows_of_turns_are_drawn_above_the_bars_and_printed_without_them():
    def drawn(live):
        console = Console(force_terminal=live, width=100, record=True, file=io.StringIO())
        with Progress(console, live=live) as progress:
            for ess in ("0.50", "0.50", "0.75"):
                progress.row("turn 1", {"states": "500", "ESS": ess})
            with progress.stage("fit", total=4) as stage:
                stage.update(2)
        return console.export_text()

    assert drawn(False).splitlines()[:2] == [
        "turn 1: states 500, ESS 0.50",
        "turn 1: states 500, ESS 0.75",
    ]
    live = drawn(True)
    assert "states   ESS" in live
    assert "turn 1     500  0.75" in live
