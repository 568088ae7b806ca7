"""Energies of worker processes: those of one process, whatever happens to the workers."""

import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from ccg_mda.parallel_potential import ParallelPotential
from ccg_mda.potential import BatchedPotential

BAD = 1e3  # Å


class Springs(BatchedPotential):
    """Atoms bound to the origin; those far away end what evaluates them, in one way or another."""

    def _evaluate(self, positions):
        far = positions[0, 0] - BAD
        if far == 0:
            raise ValueError("an atom is too far away")
        if far == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return 0.5 * np.sin(positions).sum(), -np.cos(positions) * np.pi**0.5


@pytest.fixture(scope="module")
def parallel():
    with ParallelPotential(Springs(5), 2, start_after_s=0.0) as potential:
        yield potential


def frames(n):
    return np.random.default_rng(0).normal(size=(n, 5, 3))


def test_the_same_numbers_in_the_same_order(parallel):
    x, serial = frames(1000), Springs(5)
    x[700] = np.inf
    with pytest.raises(ValueError, match="the first is frame 700"):
        parallel(x)
    x[700] = 0.0
    before = parallel.n_calls
    for shape in ((1000,), (10, 100), (3,), (0,)):
        part = x[: int(np.prod(shape))].reshape(*shape, 5, 3)
        for found, expected in zip(parallel(part), serial(part), strict=True):
            np.testing.assert_array_equal(found, expected)
    assert parallel.n_calls - before == serial.n_calls == 2003
    copy = pickle.loads(pickle.dumps(parallel))
    assert copy._pool is None
    assert parallel._pool is not None


def test_errors_and_lost_workers(parallel):
    x = frames(100)
    x[60, 0, 0] = BAD
    with pytest.raises(ValueError, match="too far away"):
        parallel(x)
    x[60, 0, 0] = BAD + 1
    with pytest.raises(ChildProcessError, match=r"worker ended with code -9 .*fewer workers"):
        parallel(x)
    assert parallel._pool is None


def test_workers_start_when_they_pay(monkeypatch):
    monkeypatch.setattr(ParallelPotential, "_by_workers", lambda *_: pytest.fail("too early"))
    x, given = frames(600), []
    one = ParallelPotential(Springs(5), 1, start_after_s=0.0)
    patient, soon = (ParallelPotential(Springs(5), 2, start_after_s=s) for s in (1e9, 1e-9))
    for potential in (one, patient):
        potential(x)
    soon(x[:31])  # too few
    soon = ParallelPotential(Springs(5), 2, start_after_s=1e-9)

    def by_workers(self, frames):
        given.append(len(frames))
        return self.potential._evaluate_all(frames)

    monkeypatch.setattr(ParallelPotential, "_by_workers", by_workers)
    np.testing.assert_array_equal(soon(x)[0], one(x)[0])
    assert given == [600 - 256]
    soon(x)
    assert given == [600 - 256, 600]
    with pytest.raises(ValueError, match="at least one worker"):
        ParallelPotential(Springs(5), 0)


PROGRAM = """
from test_parallel_potential import Springs, frames
from ccg_mda.parallel_potential import ParallelPotential

if __name__ == "__main__":
    potential = ParallelPotential(Springs(5), 2, start_after_s=0.0)
    potential(frames(100))
    print(*[p.pid for p in potential._pool._processes], flush=True)
    while True:
        potential(frames(2000))
"""


@pytest.mark.parametrize("how", ["SIGINT", "SIGKILL"])
def test_no_worker_is_left(how, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    paths = [os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")]
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        workers = [int(pid) for pid in process.stdout.readline().split()]
        assert len(workers) == 2
        if how == "SIGINT":
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        else:
            process.kill()
        _, told = process.communicate(timeout=60)
        assert process.returncode == -getattr(signal, how)
        assert told.count("Traceback") == (how == "SIGINT")  # none of a worker
        deadline = time.monotonic() + 20
        while any(map(alive, workers)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(map(alive, workers))
    finally:
        process.kill()


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
