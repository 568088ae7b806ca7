"""The whole cycle from one command, and what is left of it when it is killed on the way."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import (
    CONFIG,
    Interrupted,
    assert_same_result,
    full_disk,
    new_folder,
    records,
    train,
)

from ccg_ase import CGCalculator, ExplodedError, ForceField, load_model
from ccg_mda import Backmapper
from ccg_training import cycle, exploring
from ccg_training.cli import INTERRUPTED
from ccg_training.config import Config
from ccg_training.labels import Labels
from ccg_training.new_labels import label_states
from ccg_training.progress import Progress
from ccg_training.stages import Metrics
from ccg_training.turn_check import check_turn
from ccg_training.workspace import Workspace

ITERATED = [
    *("bead dynamics", "labels at new states", "flow", "labels on frames", "force field"),
    "turn check",
]
STAGES = [
    *((name, 0) for name in ("reference data", "data check", "flow: likelihood")),
    ("flow: coordinates", 0),
    *((name, 0) for name in ("labels on frames", "force field", "flow: forces")),
    *((name, k) for k in (1, 2) for name in ITERATED),
    *((name, 2) for name in ("end of the loop", "fine-tuning")),
    *((name, 2) for name in ("final bead dynamics", "final reconstruction")),
    *((name, 2) for name in ("consistency", "held-out check", "report")),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Return the directory of a run that nothing interrupted."""
    folder = new_folder(tmp_path_factory.mktemp("whole"))
    done = train(folder)
    assert done.exit_code == 0, done.output
    return folder / "run"


def test_one_command_leaves_model_report_and_figures(whole):
    assert [(r["stage"], r["iteration"]) for r in records(whole)] == STAGES
    assert "<html" in (whole / "report.html").read_text()
    with np.load(whole / "report_data.npz") as data:
        assert len(data["torsions_reference"]) == 500
        assert len(data["torsions_beads"]) == 2 * 20
    assert not list(whole.rglob("*.tmp"))
    assert not list(whole.rglob("*.partial"))
    atoms = CGCalculator.load(whole / "model.ccg").atoms()
    assert np.isfinite(atoms.get_potential_energy())
    assert np.isfinite(atoms.get_forces()).all()
    flow = Backmapper.load(whole / "model.ccg")
    beads = torch.from_numpy(atoms.positions)
    positions, log_prob = flow(beads).rsample_and_log_prob((3,), np.random.default_rng(0))
    torch.testing.assert_close(flow.cg_map.apply(positions), beads.expand(3, -1, -1))
    assert torch.isfinite(log_prob).all()
    assert "held-out check: ess_mean" in load_model(whole / "model.ccg").metrics


def test_energy_calls_add_up(whole):
    calls = {(r["stage"], r["iteration"]): r["calls"] for r in records(whole)}
    assert calls.pop(("reference data", 0)) == 21_000
    for k in (1, 2):  # the forward check, and labels as far as the budget goes
        assert 5 * 8 + 6 * 8 <= calls.pop(("labels at new states", k)) <= 200
    assert calls.pop(("final reconstruction", 2)) == 20 * 4
    assert calls.pop(("held-out check", 2)) % 200 == 0
    assert not any(calls.values())


def test_a_finished_run_is_finished(whole):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*.*")}
    assert train(whole.parent).exit_code == 2
    done = train(whole.parent, "--resume")
    assert done.exit_code == 0, done.output
    changed = {path for path, when in before.items() if path.stat().st_mtime_ns != when}
    assert changed == {whole / "config.toml"}


def train_again(whole: Path, folder: Path, mapping: str) -> Path:
    """Train with another mapping, one turn of the loop, on the frames of the whole run."""
    head, rest = CONFIG.split("[mapping.beads]")
    _, rest = rest.split("[flow]")
    reference = f'[reference]\nsource = "trajectory"\nfiles = ["{whole / "reference.npz"}"]\n'
    text = f"{head}{mapping}{reference}[flow]{rest}".replace("[cycle]", "[cycle]\niterations = 1")
    text = text.replace("relative_entropy_rounds = 1", "relative_entropy_rounds = 0")
    (folder / "cycle.toml").write_text(text)
    done = train(folder)
    assert done.exit_code == 0, done.output
    return folder / "run"


CENTRES = """[mapping.beads]
ACE = "resname ACE and not name O"
ALA = "resname ALA and name N H CA HA C O"
CB = "resname ALA and name CB HB*"
NME = "resname NME"
"""


def test_beads_at_centres_of_groups(whole, tmp_path):
    run = train_again(whole, tmp_path, f'[mapping]\nweighting = "mass"\n{CENTRES}')
    model = load_model(run / "model.ccg")
    assert model.cg_map.kind == "mass"
    assert (run / "report.html").is_file()
    assert "held-out check: ess_mean" in model.metrics
    assert not any("variance_ratio" in key for key in model.metrics)
    beads = torch.from_numpy(CGCalculator(ForceField.from_model(model)).atoms().positions)
    positions = Backmapper.from_model(model)(beads).rsample((5,), np.random.default_rng(0))
    apart = model.cg_map.apply(positions) - beads
    assert apart.abs().max() < 1e-10


def test_a_turn_that_makes_models_worse_leaves_them_as_they_were(whole, tmp_path):
    shutil.copytree(whole.parent, tmp_path, dirs_exist_ok=True)
    workspace = Workspace(Config.load(tmp_path / "cycle.toml"))
    folders = [workspace.iteration(k) for k in (0, 1)]
    models = {"flow": Backmapper, "force_field": ForceField}
    noise = torch.Generator().manual_seed(0)
    for name, kind in models.items():
        spoilt = kind.from_model(load_model(folders[0] / "model.ccg"))
        with torch.no_grad():
            for weights in spoilt.parameters():
                weights += 0.3 * torch.randn(weights.shape, generator=noise)
        part = {"flow": "backmapper"}.get(name, name)
        workspace.save(folders[1] / f"{name}.ccg", {part: spoilt})
    with Progress(quiet=True).stage("turn check") as stage:
        figures = check_turn(workspace, stage, 1)
    assert figures["flow_gain_nats"] < 0
    assert figures["force_field_gain"] < 0
    assert figures["told"].count("stays as it was") == 2
    before, after = (load_model(folder / "model.ccg") for folder in folders)
    for kind in models.values():
        ours, theirs = kind.from_model(after).state_dict(), kind.from_model(before).state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def spoil(workspace, path):
    """Make the force field of a model file explode, all its weights 1000 times as large."""
    model = load_model(path)
    flow, force_field = Backmapper.from_model(model), ForceField.from_model(model)
    with torch.no_grad():
        for weights in force_field.members.parameters():
            weights *= 1e3
    workspace.save(path, {"backmapper": flow, "force_field": force_field})
    return flow


def test_a_force_field_that_explodes_is_withdrawn(whole, tmp_path):
    shutil.copytree(whole.parent, tmp_path, dirs_exist_ok=True)
    workspace = Workspace(Config.load(tmp_path / "cycle.toml"))
    spoilt, folder = workspace.iteration(1) / "model.ccg", workspace.iteration(2)
    flow = spoil(workspace, spoilt)
    shutil.rmtree(folder / "dynamics")

    def run():
        with Progress(quiet=True).stage("bead dynamics") as stage:
            return exploring.sample_beads(workspace, stage, 2, folder, n_steps=100)

    with pytest.warns(UserWarning, match="exploded") as told:
        figures = run()
    assert "the force field is withdrawn, one of an earlier turn" in str(told[-1].message)
    assert figures["withdrawn"] == 1
    assert (folder / "dynamics" / "beads.dcd").is_file()
    assert run() == figures  # as after a kill before the record was written
    left, first = load_model(spoilt), load_model(workspace.iteration(0) / "model.ccg")
    for kind, theirs in (
        (ForceField, ForceField.from_model(first).state_dict()),
        (Backmapper, flow.state_dict()),
    ):
        ours = kind.from_model(left).state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    for k in (0, 1):
        spoil(workspace, workspace.iteration(k) / "model.ccg")
    shutil.rmtree(folder / "dynamics")
    with pytest.warns(UserWarning, match="less heat"), pytest.raises(ExplodedError):
        run()


def test_torsions_give_free_energies_and_say_that_there_is_no_force_field(whole, tmp_path):
    quads = [f'"index {i}"' for i in (4, 6, 8, 14, 16)]
    rows = {"phi": quads[:4], "psi": quads[1:]}
    lines = [f"{name} = [{', '.join(row)}]\n" for name, row in rows.items()]
    run = train_again(whole, tmp_path, "[mapping.torsions]\n" + "".join(lines))
    turn = ["labels at new states", "flow", "turn check"]
    end = ["end of the loop", "labels on frames", "held-out check", "report"]
    assert [r["stage"] for r in records(run)][-8:] == ["flow: forces", *turn, *end]
    model = load_model(run / "model.ccg")
    assert set(model.configs) == {"backmapper"}
    assert model.cg_map.names == ("phi", "psi")
    report = (run / "report.html").read_text()
    assert "Convergence of the loop" in report
    assert "Free energies from bead dynamics" not in report
    with np.load(run / "iteration_1" / "states.npz") as table:
        assert table["beads"].shape == (6, 2)
    assert Labels.load(run / "iteration_1" / "frame_labels.npz").force.shape == (100, 2)
    assert train(tmp_path, "--resume").exit_code == 0


def test_killed_and_interrupted_runs_end_in_the_same_result(whole, tmp_path, monkeypatch):
    """A full disk, SIGKILL in a fit and between two files, SIGINT between a file and its record.

    SIGKILL amid generation: test_reference.py; at random times: test_kills.py.
    """
    broken = Interrupted(new_folder(tmp_path))

    with full_disk(200_000):
        done = train(tmp_path)
    assert done.exit_code == 2, done.output
    assert "File too large" in done.output
    assert str(broken.run / "reference.npz") in done.output.replace("\n", "")
    assert broken.stages_done() == 0

    def inside_the_fit() -> bool:
        time.sleep(0.1 * (broken.stages_done() == 5))
        return broken.stages_done() == 5

    code, _ = broken.until(inside_the_fit, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert broken.stages_done() == 5
    assert not (broken.run / "iteration_0" / "model.ccg").exists()

    labels = broken.run / "iteration_1" / "labels.npz"
    code, _ = broken.until(labels.exists, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert broken.stages_done() in (7, 8)

    def then_interrupted(*arguments: Any, k: int, **options: Any) -> Metrics:
        found = label_states(*arguments, k=k, **options)
        if k == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(cycle, "label_states", then_interrupted)
        done = train(tmp_path, "--resume")
    assert done.exit_code == INTERRUPTED, done.output
    command = f"continue with: ccg train {tmp_path / 'cycle.toml'} --resume"
    assert command.replace(" ", "") in "".join(done.output.split())
    assert "Traceback" not in done.output
    assert broken.stages_done() == STAGES.index(("labels at new states", 2))

    done = train(tmp_path, "--resume")
    assert done.exit_code == 0, done.output
    assert_same_result(broken.run, whole)
