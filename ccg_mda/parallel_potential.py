"""ParallelPotential: the frames of a batch spread over worker processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import weakref
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np

from .potential import CheckedPotential

# Sending frames and results costs some 0.2 ms; a frame of the smallest molecule takes 0.05 ms.
_LEAST_FRAMES = 32
# Frames after which to look at the clock.
_PIECE = 256
# Portions of a batch for each worker: enough that none waits long for the slowest.
_PORTIONS = 4


def usable_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class ParallelPotential(CheckedPotential):
    """Another potential, evaluated in worker processes, bit for bit as that one alone would.

    Small batches stay in this process, and so do all until the time that they took would have
    started the workers: short tasks end sooner without them. Workers end with `close`, with the
    program or after an error; a later batch starts new ones. Picklable: every copy has workers of
    its own.

    Parameters
    ----------
    potential
        What to evaluate, frame by frame, such as `OpenMMPotential`; picklable.
    workers
        Processes; default: one for each core that this one may use. With one, no process is
        started.
    start_after_s
        Time in seconds spent on evaluations after which workers are started.

    Raises
    ------
    ValueError
        If there isn't at least one worker.
    """

    def __init__(
        self,
        potential: CheckedPotential,
        workers: int | None = None,
        *,
        start_after_s: float = 3.0,
    ) -> None:
        workers = usable_cores() if workers is None else workers
        if workers < 1:
            raise ValueError(f"there must be at least one worker, got {workers}")
        super().__init__(potential.n_atoms)
        self.potential, self.workers = potential, workers
        self.start_after_s, self._spent_s = start_after_s, 0.0
        self._pool: _Pool | None = None

    def close(self) -> None:
        """End the workers."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def __enter__(self) -> ParallelPotential:
        """Return the potential, to be closed afterwards."""
        return self

    def __exit__(self, *error: object) -> None:
        """End the workers."""
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pool": None}

    def _evaluate_all(self, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        parts, done = [], 0
        while not self._pays(len(frames) - done) and (done < len(frames) or not parts):
            started = time.perf_counter()
            parts.append(self.potential._evaluate_all(frames[done : done + _PIECE]))
            self._spent_s += time.perf_counter() - started
            done += _PIECE
        if done < len(frames):
            parts.append(self._by_workers(frames[done:]))
        energy, forces = (np.concatenate(column) for column in zip(*parts, strict=True))
        return energy, forces

    def _pays(self, n_frames: int) -> bool:
        """Whether workers are faster."""
        # A worker of somebody else's can't have children.
        alone = self.workers == 1 or multiprocessing.current_process().daemon
        started = self._pool is not None or self._spent_s >= self.start_after_s
        return started and not alone and n_frames >= _LEAST_FRAMES

    def _by_workers(self, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self._pool is None or self._pool.owner != os.getpid():  # not after a fork
            self._pool = _Pool(self.potential, self.workers)
        try:
            return self._pool(frames)
        except BaseException:
            # Answers to this batch may still be on their way.
            self.close()
            raise


class _Pool:
    """Worker processes, each at the other end of a pipe of its own."""

    def __init__(self, potential: CheckedPotential, workers: int) -> None:
        context = multiprocessing.get_context("spawn")  # fork would copy a threaded parent
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        self.owner = os.getpid()
        self._end = weakref.finalize(self, _end, self.owner, self._processes, self._pipes)
        # Ctrl-C reaches this process, which ends the workers; blocked, it never reaches them. The
        # tracker comes first: starting it unblocks.
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for _ in range(workers):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(potential, theirs), daemon=True)
                self._pipes.append(ours)
                self._processes.append(process)
                process.start()
                theirs.close()  # now the pipe breaks when the worker ends
        except BaseException:
            self.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def close(self) -> None:
        """End the processes, whatever they do."""
        self._end()

    def __call__(self, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return energies (B,) and forces (B, n_atoms, 3); who is free gets the next portion."""
        energy, forces = np.empty(len(frames)), np.empty_like(frames)
        size = max(_LEAST_FRAMES // 2, -(-len(frames) // (_PORTIONS * len(self._pipes))))
        portions = [slice(i, i + size) for i in range(0, len(frames), size)][::-1]
        busy: dict[Connection, slice] = {}
        for pipe in self._pipes:
            self._next(pipe, portions, busy, frames)
        while busy:
            for pipe in wait(list(busy)):
                own = busy.pop(pipe)
                energy[own], forces[own] = self._answer(pipe)
                self._next(pipe, portions, busy, frames)
        return energy, forces

    def _next(
        self,
        pipe: Connection,
        portions: list[slice],
        busy: dict[Connection, slice],
        frames: np.ndarray,
    ) -> None:
        if portions:
            busy[pipe] = portions.pop()
            try:
                pipe.send(frames[busy[pipe]])
            except OSError:
                raise self._lost(pipe) from None

    def _answer(self, pipe: Connection) -> tuple[np.ndarray, np.ndarray]:
        try:
            answer = pipe.recv()
        except (EOFError, OSError):
            raise self._lost(pipe) from None
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _lost(self, pipe: Connection) -> ChildProcessError:
        process = self._processes[self._pipes.index(pipe)]
        process.join(1.0)
        return ChildProcessError(
            f"an energy worker ended with code {process.exitcode} (killed, or out of memory?): run "
            "again, with fewer workers if memory is short"
        )


def _end(owner: int, processes: list[BaseProcess], pipes: list[Connection]) -> None:
    if os.getpid() != owner:
        return
    for pipe in pipes:
        pipe.close()
    for process in processes:
        if process.pid is not None:
            process.terminate()
            process.join()


def _serve(potential: CheckedPotential, pipe: Connection) -> None:
    """Answer portions of frames until the other end of the pipe is closed, or gone."""
    while True:
        try:
            frames = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            answer = potential._evaluate_all(frames)
        except Exception as error:
            answer = error
        pipe.send(answer)
