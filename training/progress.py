"""Live progress of a long run: bars on a terminal, one line at a time everywhere else."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich import progress as bars
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table


class Stage:
    """One stage of a run: `update` sets, `advance` adds; `note` is shown beside the bar."""

    def __init__(self, owner: Progress, name: str, total: float | None) -> None:
        self._owner, self.name, self.total = owner, name, total
        self.done: float = 0
        self.note = ""
        self.started = time.monotonic()
        self.last_line = self.started
        self.task = owner._bars.add_task(name, total=total, note="") if owner._bars else None

    def update(
        self, done: float | None = None, total: float | None = None, note: str | None = None
    ) -> None:
        """Set the work done so far, the total and a short note (each optional)."""
        self.done = self.done if done is None else done
        self.total = self.total if total is None else total
        self.note = self.note if note is None else note
        self._owner._show(self)

    def advance(self, step: float = 1, note: str | None = None) -> None:
        """Add work done."""
        self.update(self.done + step, note=note)


class Progress:
    """Stages of a run, shown live.

    Parameters
    ----------
    console
        Where to write; default: standard error.
    live
        Draw moving bars; default: only on a terminal. Without them, a stage prints one line when
        it ends and a percentage at most every `every_s` seconds.
    quiet
        Print nothing.
    every_s
        Shortest time between two percentage lines, in seconds.
    """

    def __init__(
        self,
        console: Console | None = None,
        *,
        live: bool | None = None,
        quiet: bool = False,
        every_s: float = 10.0,
    ) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self.quiet, self.every_s = quiet, every_s
        live = self.console.is_terminal if live is None else live
        self._bars: bars.Progress | None = None
        self._rows: dict[str, dict[str, str]] = {}
        if live and not quiet:
            self._bars = bars.Progress(
                bars.TextColumn("[bold]{task.description}"),
                bars.BarColumn(),
                bars.TaskProgressColumn(),
                bars.TimeElapsedColumn(),
                bars.TimeRemainingColumn(compact=True),
                bars.TextColumn("[dim]{task.fields[note]}"),
                console=self.console,
            )
            self._live = Live(console=self.console, get_renderable=self._view)

    def __enter__(self) -> Progress:
        """Start drawing."""
        if self._bars:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop drawing; the terminal is left in order whatever happened."""
        if self._bars:
            self._live.stop()

    @contextmanager
    def stage(self, name: str, total: float | None = None) -> Iterator[Stage]:
        """Run one stage; its time and last note are printed when it ends."""
        stage = Stage(self, name, total)
        try:
            yield stage
        except BaseException:
            self._close(stage, "[red]stopped[/red]")
            raise
        self._close(stage, "[green]done[/green]")

    def row(self, name: str, values: dict[str, str]) -> None:
        """Add a row to the table above the bars, or change it; without bars, print it.

        Parameters
        ----------
        name
            Of the row, its first cell.
        values
            Column -> cell; all rows have the same columns.
        """
        if self._rows.get(name) == values:
            return
        self._rows[name] = values
        if not self._bars:
            cells = ", ".join(f"{column} {cell}" for column, cell in values.items())
            self.message(f"{name}: {cells}")

    def _view(self) -> RenderableType:
        """Lay out what is drawn live: the table, then the bars."""
        if not self._rows:
            return self._bars
        table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
        for column in ("", *next(iter(self._rows.values()))):
            table.add_column(column, justify="right" if column else "left")
        for name, values in self._rows.items():
            table.add_row(name, *values.values())
        return Group(table, self._bars)

    def message(self, text: str) -> None:
        """Print a line above the bars."""
        if not self.quiet:
            self.console.print(text)

    def _close(self, stage: Stage, word: str) -> None:
        if self._bars:
            self._bars.remove_task(stage.task)
        seconds = time.monotonic() - stage.started
        self.message(f"{word} {stage.name} ({seconds:.1f} s) {stage.note}".rstrip())

    def _show(self, stage: Stage) -> None:
        if self._bars:
            self._bars.update(stage.task, completed=stage.done, total=stage.total, note=stage.note)
        elif stage.total and time.monotonic() - stage.last_line >= self.every_s:
            stage.last_line = time.monotonic()
            self.message(f"  {stage.name} {stage.done / stage.total:.0%} {stage.note}".rstrip())
