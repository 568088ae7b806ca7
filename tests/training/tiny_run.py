"""A run of the whole cycle that is as small as the stages accept, and ways to interrupt it."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from typer.testing import CliRunner

from ccg_training.cli import app

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
rungs = 2
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
max_calls_per_turn = 200
restrained_ps = 0.04
restrained_every_fs = 4
steering_ps = 0.01
[run]
directory = "run"
threads = 1
"""
COMMAND = "from ccg_training.cli import main; main()"


def train(folder: Path, *options: str) -> Any:
    """Run, or with ``--resume`` continue, in this process."""
    return CliRunner().invoke(app, ["train", str(folder / "cycle.toml"), *options])


def new_folder(folder: Path) -> Path:
    """Return a folder with the configuration in it."""
    folder.mkdir(exist_ok=True)
    (folder / "cycle.toml").write_text(CONFIG)
    return folder


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """Let no file of this process grow beyond some bytes."""
    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))


def records(run: Path) -> list[dict]:
    """Return the stages of a run without what must differ between two runs: their seconds."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert found == json.loads((run / "state.json").read_text())
    return [{key: record[key] for key in record if key != "seconds"} for record in found]


def assert_same_result(ours: Path, theirs: Path) -> None:
    """Compare what two runs have written, but for the wall time."""
    assert records(ours) == records(theirs)
    for path in sorted(theirs.rglob("model.ccg")):
        name = path.relative_to(theirs)
        assert (ours / name).read_bytes() == path.read_bytes(), name
    with np.load(ours / "report_data.npz") as mine, np.load(theirs / "report_data.npz") as other:
        assert set(mine) == set(other)
        for name in set(mine) - {"stage_seconds", "turn_table"}:
            np.testing.assert_array_equal(mine[name], other[name], err_msg=name)
        np.testing.assert_array_equal(mine["turn_table"][:, :-1], other["turn_table"][:, :-1])


class Interrupted:
    """A run in a process of its own, stopped as soon as something has happened in its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder, folder / "run"

    def until(self, happened: Callable[[], bool], signal_number: int) -> tuple[int, str]:
        """Start or continue the run, signal it once, and return its exit code and messages."""
        process = self._started()
        try:
            deadline = time.monotonic() + 120
            while process.poll() is None and not happened() and time.monotonic() < deadline:
                time.sleep(0.002)
            process.send_signal(signal_number)
            return process.wait(timeout=60), process.stderr.read()
        finally:
            process.kill()
            process.stderr.close()

    def begin_again(self) -> None:
        """Remove all that the run has left."""
        shutil.rmtree(self.run)

    def _started(self) -> subprocess.Popen:
        arguments = ["train", str(self.folder / "cycle.toml"), "--resume"]
        return subprocess.Popen(
            [sys.executable, "-c", COMMAND, *arguments],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )

    def stages_done(self) -> int:
        """Return the number of stages that are on record."""
        state = self.run / "state.json"
        return len(json.loads(state.read_text())) if state.exists() else 0
