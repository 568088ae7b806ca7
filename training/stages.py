"""Stages of a run: each done once, recorded with its figures, and skipped when the run resumes."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ccg_ase.files import replaced

from .progress import Progress, Stage

Metrics = dict[str, Any]


class Stages:
    """The record of a run directory, ``state.json``, and its readable twin ``metrics.jsonl``.

    A stage writes its files, then its record; both atomically. A run that is killed in between
    repeats that stage alone, from the same inputs and seed, hence with the same result.

    Parameters
    ----------
    directory
        The run directory; an existing record is continued.
    progress
        Where stages are shown.
    """

    def __init__(self, directory: Path, progress: Progress) -> None:
        self.directory, self._progress = directory, progress
        self._file = directory / "state.json"
        self.records: list[Metrics] = []
        if self._file.exists():
            try:
                self.records = json.loads(self._file.read_text(encoding="utf-8"))
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{self._file} can't be read ({error}): begin again with --fresh"
                ) from None

    def run(
        self,
        name: str,
        work: Callable[[Stage], Metrics],
        *,
        iteration: int = 0,
        total: float | None = None,
    ) -> Metrics:
        """Do a stage unless its record is there; return its metrics.

        Parameters
        ----------
        name, iteration
            What identifies the stage.
        work
            Does it; the returned metrics must be JSON-able. ``calls`` counts energy calls.
        total
            Length of the progress bar.
        """
        for record in self.records:
            if (record["stage"], record["iteration"]) == (name, iteration):
                return record
        started = time.monotonic()
        shown = f"{name} {iteration}" if iteration else name
        with self._progress.stage(shown, total) as stage:
            metrics = work(stage)
        record = _strict({"stage": name, "iteration": iteration, "calls": 0} | metrics)
        record["seconds"] = round(time.monotonic() - started, 2)
        self.records.append(record)
        lines = "".join(json.dumps(line) + "\n" for line in self.records)
        write_text(self.directory / "metrics.jsonl", lines)
        write_text(self._file, json.dumps(self.records, indent=1))  # last: now the stage is done
        return record


def _strict(value: Any) -> Any:
    """Return a value with null for what isn't a finite number: JSON has no other word for it."""
    if isinstance(value, dict):
        return {key: _strict(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text(path: Path, text: str) -> None:
    """Write a text file so that it is either complete or not there."""
    with replaced(path) as file:
        file.write(text.encode())
