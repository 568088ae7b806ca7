"""Processes that share a run: results of one, and a quick end when one of them is lost."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from shared_tasks import results

from ccg_training.distributed import ALONE, Ranks, spread, together

HERE = Path(__file__).parent


def torchrun(*arguments: object, processes: int = 2) -> subprocess.CompletedProcess:
    """Run a program in processes on this machine."""
    paths = [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*command, f"--nproc-per-node={processes}", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_processes_find_what_one_finds(tmp_path):
    done = torchrun(HERE / "shared_tasks.py", tmp_path / "out.npz")
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "out.npz") as file:
        found = dict(file)
    assert found.pop("portions").tolist() == list(range(20))
    with torch.random.fork_rng():
        expected = results()
    # Portions of the helper are counted there.
    assert 0 < found.pop("own calls") < expected.pop("own calls") == 120
    for name, value in expected.items():
        if name.startswith("samples") or name.endswith("calls"):
            np.testing.assert_array_equal(found[name], value, err_msg=name)
            continue
        # Sums of another order: of doubles, and of singles.
        off = 1e-10 if name == "flow gradients" else 1e-5
        np.testing.assert_allclose(
            found[name], value, rtol=off, atol=off * abs(value).max(), err_msg=name
        )


@pytest.mark.parametrize("how", ["killed", "failed"])
def test_a_lost_process_ends_the_run(how):
    started = time.monotonic()
    done = torchrun(HERE / "lost_process.py", how)
    assert done.returncode != 0
    assert time.monotonic() - started < 60
    if how == "killed":
        assert "SIGKILL" in done.stderr
    else:
        assert "process 1 of 2 stopped: no such state" in done.stderr


def test_one_process_is_alone():
    assert together(lambda ranks, x, y: (ranks, x + y), 1, y=2) == (ALONE, 3)
    seen = []
    squares = spread(lambda k: k * k, [3, 1, 2], progress=lambda *done: seen.append(done))
    assert squares == [9, 1, 4]
    assert seen == [(1, 3), (2, 3), (3, 3)]
    parts = [Ranks(rank, 3).share(7) for rank in range(3)]
    assert [list(range(7))[part] for part in parts] == [[0, 1], [2, 3], [4, 5, 6]]
    with pytest.raises(ValueError, match="3 processes can't share 2"):
        Ranks(0, 3).share(2)
