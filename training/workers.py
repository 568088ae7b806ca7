"""Work in parallel processes, one thread each: reports come back, a fault in one stops all."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import traceback
from collections.abc import Callable
from typing import Any

from .reference import ReferenceDataError, Tick

Report = Callable[[int], None]
"""Called by a worker with the number of its pieces of work that are done."""
RUNNING, FINISHED = "running", "finished"


def run_workers(
    work: Callable[[int, Report], None], n_workers: int, total: int, tick: Tick | None = None
) -> None:
    """Call `work` once in each of some new processes; return when all have finished.

    Parameters
    ----------
    work
        Called with (index of the worker, report); picklable. It leaves its results in files.
    n_workers
        Processes.
    total
        Pieces of work of all workers together.
    tick
        Called with (pieces done, `total`).

    Raises
    ------
    ReferenceDataError
        If a worker raises or its process ends; the others are stopped.
    """
    context = multiprocessing.get_context("spawn")  # fork would copy a threaded parent
    reports = context.Queue()
    processes = [
        context.Process(target=_body, args=(work, worker, reports), daemon=True)
        for worker in range(n_workers)
    ]
    done = [0] * n_workers
    finished: set[int] = set()
    try:
        for process in processes:
            process.start()
        while len(finished) < n_workers:
            try:
                worker, count, finish = reports.get(timeout=1.0)
            except queue.Empty:
                _check_alive(processes, finished)
                continue
            if finish not in (RUNNING, FINISHED):
                raise ReferenceDataError(f"walker {worker} stopped: {finish}")
            done[worker] = count
            if finish == FINISHED:  # only now is the last file complete
                finished.add(worker)
            if tick:
                tick(sum(done), total)
    finally:
        for process in processes:
            if process.pid is not None:
                process.terminate()
                process.join()


def _check_alive(processes: list[Any], finished: set[int]) -> None:
    for worker, process in enumerate(processes):
        if process.exitcode not in (None, 0) and worker not in finished:
            raise ReferenceDataError(
                f"the process of walker {worker} ended with code {process.exitcode} (out of "
                "memory?): run again to continue from its last chunk"
            )


def _body(work: Callable[[int, Report], None], worker: int, reports: Any) -> None:
    """Run in a worker's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which stops us
    parent = os.getppid()
    done = 0

    def report(count: int) -> None:
        nonlocal done
        if os.getppid() != parent:  # the parent was killed: nobody waits for this work
            os._exit(1)
        done = count
        reports.put((worker, done, RUNNING))

    try:
        work(worker, report)
        reports.put((worker, done, FINISHED))
    except ReferenceDataError as error:
        reports.put((worker, done, str(error)))
    except Exception:
        reports.put((worker, done, traceback.format_exc()))
