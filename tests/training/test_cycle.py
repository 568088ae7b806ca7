"""The whole cycle from one command, and what is left of it when it is killed on the way."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ccg_ase import CGCalculator, ForceField, load_model
from ccg_mda import Backmapper
from ccg_training.cli import INTERRUPTED, app
from ccg_training.labels import Labels

EXAMPLE = Path(__file__).parents[2] / "examples" / "alanine_dipeptide"
# As little of everything as the stages accept: what comes out is no use, but it is complete.
CONFIG = f"""
[system]
topology = "{EXAMPLE / "alanine_dipeptide.pdb"}"
[mapping.beads]
C1 = "resname ACE and name C"
N2 = "resname ALA and name N"
CA2 = "resname ALA and name CA"
C2 = "resname ALA and name C"
N3 = "resname NME and name N"
[reference]
time_ns = 0.02
save_every_fs = 40.0
equilibration_ps = 1
walkers = 1
[flow]
width = 8
hops = 2
likelihood_epochs = 4
coordinate_steps = 4
force_steps = 6
refit_steps = 4
batch_size = 32
[force_field]
channels = 4
n_layers = 1
steps = 20
refit_steps = 10
batch_size = 64
members = 2
relative_entropy_rounds = 1
[dynamics]
replicas = 4
n_steps = 100
n_final_steps = 200
save_every = 10
[cycle]
n_states = 6
n_samples = 8
n_frame_labels = 100
n_report = 20
n_report_samples = 4
n_held_out = 5
n_checked = 5
max_calls = 200
[run]
directory = "run"
threads = 1
"""
# A process that a shell starts in the background ignores SIGINT unless told otherwise.
COMMAND = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from ccg_training.cli import main; main()"
)
ITERATED = ["bead dynamics", "reconstruction", "flow", "labels on frames", "force field"]
STAGES = [
    *((name, 0) for name in ("reference data", "data check", "flow: likelihood")),
    ("flow: coordinates", 0),
    *((name, 0) for name in ("labels on frames", "force field", "flow: forces")),
    *((name, k) for k in (1, 2) for name in ITERATED),
    *((name, 2) for name in ("final bead dynamics", "final reconstruction")),
    *((name, 2) for name in ("held-out check", "report")),
]


def train(folder: Path, *options: str):
    return CliRunner().invoke(app, ["train", str(folder / "cycle.toml"), *options])


def new_folder(folder: Path) -> Path:
    (folder / "cycle.toml").write_text(CONFIG)
    return folder


def records(run: Path) -> list[dict]:
    """Return the stages of a run without what must differ between two runs: their seconds."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert found == json.loads((run / "state.json").read_text())
    return [{key: record[key] for key in record if key != "seconds"} for record in found]


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
        assert len(data["torsions_beads"]) == 4 * 20
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
        assert 5 * 8 + 6 * 8 <= calls.pop(("reconstruction", k)) <= 200
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


@pytest.mark.parametrize("weighting", ["mass", "geometry"])
def test_beads_at_centres_of_groups(whole, tmp_path, weighting):
    run = train_again(whole, tmp_path, f'[mapping]\nweighting = "{weighting}"\n{CENTRES}')
    model = load_model(run / "model.ccg")
    assert model.cg_map.kind == weighting
    assert (run / "report.html").is_file()
    assert "held-out check: ess_mean" in model.metrics
    assert not any("variance_ratio" in key for key in model.metrics)
    beads = torch.from_numpy(CGCalculator(ForceField.from_model(model)).atoms().positions)
    positions = Backmapper.from_model(model)(beads).rsample((5,), np.random.default_rng(0))
    apart = model.cg_map.apply(positions) - beads
    assert apart.abs().max() < 1e-10


def test_torsions_give_free_energies_and_say_that_there_is_no_force_field(whole, tmp_path):
    quads = [f'"index {i}"' for i in (4, 6, 8, 14, 16)]
    rows = {"phi": quads[:4], "psi": quads[1:]}
    lines = [f"{name} = [{', '.join(row)}]\n" for name, row in rows.items()]
    run = train_again(whole, tmp_path, "[mapping.torsions]\n" + "".join(lines))
    assert [r["stage"] for r in records(run)][-4:] == [
        "flow: forces",
        "free energies",
        "labels on frames",
        "model",
    ]
    model = load_model(run / "model.ccg")
    assert set(model.configs) == {"backmapper"}
    assert model.cg_map.names == ("phi", "psi")
    assert not (run / "report.html").exists()
    with np.load(run / "iteration_0" / "states.npz") as table:
        assert table["beads"].shape == (6, 2)
        assert np.isfinite(table["free_energy"]).all()
    assert Labels.load(run / "iteration_0" / "frame_labels.npz").force.shape == (100, 2)
    assert train(tmp_path, "--resume").exit_code == 0


class Interrupted:
    """A run in a process of its own, stopped as soon as something has happened in its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder, folder / "run"

    def until(self, happened, signal_number: int) -> tuple[int, str]:
        """Start or continue the run, signal it once, and return its exit code and messages."""
        arguments = ["train", str(self.folder / "cycle.toml"), "--resume"]
        process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, *arguments],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        try:
            deadline = time.monotonic() + 120
            while process.poll() is None and not happened() and time.monotonic() < deadline:
                time.sleep(0.002)
            process.send_signal(signal_number)
            return process.wait(timeout=60), process.stderr.read()
        finally:
            process.kill()
            process.stderr.close()

    def stages_done(self) -> int:
        """Return the number of stages that are on record."""
        state = self.run / "state.json"
        return len(json.loads(state.read_text())) if state.exists() else 0


def test_killed_and_interrupted_runs_end_in_the_same_result(whole, tmp_path):
    """SIGKILL amid generation, in a fit and between two files; SIGINT; then to the end."""
    broken = Interrupted(new_folder(tmp_path))

    code, _ = broken.until(
        lambda: len(list((broken.run / "reference").glob("*.npz"))) > 3, signal.SIGKILL
    )
    assert code == -signal.SIGKILL
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

    code, messages = broken.until(lambda: broken.stages_done() == 12, signal.SIGINT)
    assert code == INTERRUPTED, messages
    assert f"continue with: ccg train {tmp_path / 'cycle.toml'} --resume" in messages
    assert "Traceback" not in messages
    assert broken.stages_done() < len(STAGES)

    done = train(tmp_path, "--resume")
    assert done.exit_code == 0, done.output
    assert records(broken.run) == records(whole)
    for name in ("iteration_1/model.ccg", "iteration_2/model.ccg", "model.ccg"):
        assert (broken.run / name).read_bytes() == (whole / name).read_bytes(), name
    with (
        np.load(broken.run / "report_data.npz") as ours,
        np.load(whole / "report_data.npz") as theirs,
    ):
        assert set(ours) == set(theirs)
        for name in set(ours) - {"stage_seconds"}:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
