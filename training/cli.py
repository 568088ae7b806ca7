"""The command line: ``ccg init``, ``check``, ``train``, ``report``, ``info``, ``backmap`` ...

Imports that take time stay inside the commands, so that ``ccg --help`` answers at once.
"""

from __future__ import annotations

import linecache
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
except ModuleNotFoundError as error:
    raise SystemExit(f"ccg needs {error.name}: pip install 'ccg[train]'") from None

app = typer.Typer(
    help="Cycle Coarse Graining: train bead force fields and exact-density backmapping.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
MARKS = {"ok": "[green]ok     [/]", "warning": "[yellow]warning[/]", "error": "[red]error  [/]"}
TABLE_WIDTH = 120
INTERRUPTED = 130  # shells' code for a program that SIGINT ended

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="TOML file of the run.")]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1 ... or auto; goes before that of the TOML file."),
]
ModelPath = Annotated[Path, typer.Argument(metavar="MODEL", help="Model file (*.ccg).")]


def main() -> None:
    """Run the command line."""
    app()


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"ccg {version('ccg')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of the program itself; typer calls this before a command."""


@contextmanager
def _plain_errors(interrupted: str = "") -> Iterator[None]:
    """Print warnings, and errors that ccg raises on purpose, in one line; the latter exit with 2.

    Other exceptions are bugs, and keep their traceback.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)

    def show(message: Warning | str, *_: object) -> None:
        console.print(f"[yellow]warning:[/] {escape(str(message))}")

    try:
        with warnings.catch_warnings(), _interrupts_seen() as seen:
            warnings.showwarning = show
            try:
                yield
            except Exception:
                if seen:
                    raise KeyboardInterrupt from None
                raise
    except KeyboardInterrupt:
        console.print(f"[yellow]interrupted[/] {interrupted}".rstrip())
        raise typer.Exit(INTERRUPTED) from None
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("ccg_"):
            raise
        console.print(f"[red]error:[/] {error.name} is not installed: pip install 'ccg\\[train]'")
        raise typer.Exit(2) from None
    except (ValueError, NotImplementedError, OSError) as error:
        if not _on_purpose(error):
            raise
        for line in str(error).splitlines():
            console.print(f"[red]error:[/] {escape(line)}")
        raise typer.Exit(2) from None


@contextmanager
def _interrupts_seen() -> Iterator[list[int]]:
    """Remember SIGINT: a library on the way may turn the KeyboardInterrupt into its own error."""
    seen: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        signal.default_int_handler(number, frame)

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # ignored, or somebody else's to handle
        yield seen
        return
    signal.signal(signal.SIGINT, remember)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


def _on_purpose(error: Exception) -> bool:
    """Tell whether a `raise` statement of ours made the error, or the file system did."""
    if isinstance(error, OSError):
        return True
    step = error.__traceback__
    while step is not None and step.tb_next is not None:
        step = step.tb_next
    if step is None:
        return False
    frame = step.tb_frame
    ours = frame.f_globals.get("__name__", "").startswith(("ccg_ase", "ccg_mda", "ccg_training"))
    line = linecache.getline(frame.f_code.co_filename, step.tb_lineno)
    return ours and line.lstrip().startswith("raise")


def _print(*things: object) -> None:
    console = Console(highlight=False)
    if isinstance(things[0], Table):  # rather a line that the terminal wraps than a cell cut off
        wanted = console.measure(things[0], options=console.options.update(width=TABLE_WIDTH))
        console.width = max(console.width, wanted.maximum)
    console.print(*things, soft_wrap=True)


@app.command()
def init(
    topology: Annotated[Path, typer.Argument(help="PDB file with all atoms and hydrogens.")],
    forcefield: Annotated[
        list[str] | None,
        typer.Option(help="OpenMM force-field XML name or file; repeat for several."),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")] = Path(
        "cycle.toml"
    ),
) -> None:
    """Write a commented TOML file for a molecule, after trying its mapping and force field."""
    with _plain_errors():
        if output.exists():
            raise FileExistsError(f"{output} exists; give another name with --output")
        from .system import first_config, mapping_of, potential_of

        config = first_config(topology, forcefield, output.resolve().parent)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cg_map = mapping_of(config)
            potential_of(config)
        output.write_text(config.to_toml(root=output.resolve().parent), encoding="utf-8")
        _print(f"{cg_map.n_atoms} atoms, {cg_map.n_beads} beads: {' '.join(cg_map.beads.names)}")
        _print(f"wrote {output}. Edit it, then: [bold]ccg check {output}[/], ccg train {output}")


@app.command()
def check(config: ConfigFile) -> None:
    """Check the configuration and, where there are any, the reference data."""
    with _plain_errors():
        from .config import Config
        from .system import check_system

        loaded = Config.load(config)
        findings = check_system(loaded)
        for finding in findings:
            _print(f"{MARKS[finding.level]} [bold]{finding.title}[/]: {escape(finding.detail)}")
            if finding.cure:
                _print(f"        → {escape(finding.cure)}")
        if any(finding.level == "error" for finding in findings):
            raise typer.Exit(1)


@app.command()
def train(
    config: ConfigFile,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Move a run that is there aside, and begin again.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    device: Device = None,
) -> None:
    """Run the cycle: reference data, flow, force field, and their iterations."""
    with _plain_errors(f"– continue with: ccg train {config} --resume"):
        from ccg_ase.devices import available

        from .config import Config
        from .distributed import join, leave
        from .run_directory import prepare_run

        loaded = Config.load(config).on_device(device)
        if not join(available(loaded.run.device), loaded.run.threads):
            return
        directory = prepare_run(loaded, resume=resume, fresh=fresh)
        from .cycle import run_cycle
        from .progress import Progress

        with Progress(quiet=quiet) as progress:
            run_cycle(loaded, progress)
        leave()
        if not quiet:
            _print(f"model: {directory / 'model.ccg'}")
            if (directory / "report.html").is_file():
                _print(f"report: {directory / 'report.html'}")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")],
) -> None:
    """Write the HTML report of a run."""
    with _plain_errors():
        from .report import write_report

        _print(f"wrote {write_report(run)}")


@app.command()
def info(
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="Model file (*.ccg), or TOML file before training."),
    ],
    placement: Annotated[
        bool, typer.Option("--placement", help="Show how every atom is placed.")
    ] = False,
) -> None:
    """Show what a model file holds: mapping, temperature, prior, provenance, metrics."""
    with _plain_errors():
        from .describe import describe

        lines, tables = describe(model, placement=placement)
        for line in lines:
            _print(escape(line))
        for title, rows in tables:
            _print(_table(title, rows))


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    """Lay out rows; a column that is empty in all of them is left out."""
    table = Table(title=title, title_justify="left", box=None, header_style="dim")
    columns = [name for name in (rows[0] if rows else ()) if any(row[name] != "" for row in rows)]
    for name in columns:
        table.add_column(name)
    for row in rows:
        table.add_row(*(escape(_cell(row[name])) for name in columns))
    return table


def _cell(value: object) -> str:
    if isinstance(value, list | tuple):
        return "-".join(str(item) for item in value)
    return f"{value:.5g}" if isinstance(value, float) else str(value)


@app.command()
def backmap(
    model: ModelPath,
    beads: Annotated[Path, typer.Argument(metavar="BEADS", help="Bead trajectory.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Atomistic file: XTC, TRR, PDB ...")],
    n_samples: Annotated[int, typer.Option(min=1, help="Reconstructions per bead frame.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Same seed: same atoms.")] = 0,
    energies: Annotated[
        Path | None,
        typer.Option(
            metavar="CONFIG", help="TOML file whose \\[potential] gives energies, weights."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite OUT.")] = False,
    device: Device = "cpu",
) -> None:
    """Put atoms on a bead trajectory; densities and weights go to OUT with the ending .npz."""
    with _plain_errors():
        from .backmap_file import backmap_file

        _print(
            backmap_file(
                model,
                beads,
                out,
                n_samples=n_samples,
                seed=seed,
                config=energies,
                force=force,
                device=device,
            )
        )


@app.command("free-energy")
def free_energy(
    model: ModelPath,
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="TOML file with \\[system] and \\[potential].")
    ],
    on: Annotated[
        list[str] | None,
        typer.Option(
            help="Variable: a torsion's name, or \\[NAME=]KIND:SITES with KIND distance, angle or "
            "torsion and beads by name or number, 'phi=torsion:C1-N2-CA2-C2'; repeat for two."
        ),
    ] = None,
    bins: Annotated[str, typer.Option(help="Bins per variable: 36, or 36,24.")] = "36",
    ranges: Annotated[
        list[str] | None,
        typer.Option("--range", help="NAME=LOW:HIGH in Å or degrees; distances need one."),
    ] = None,
    check_with: Annotated[
        Path | None,
        typer.Option(
            "--check", metavar="MODEL", help="Model of the other way: beads, or torsions."
        ),
    ] = None,
    temperature: Annotated[
        list[float] | None, typer.Option(help="Reweight to this temperature in K, too; repeat.")
    ] = None,
    basin: Annotated[
        list[str] | None,
        typer.Option(help="Region such as 'phi<0 and psi>60'; ΔF is against the first; repeat."),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="NPZ file; the figure lies beside it.")
    ] = Path("free_energy.npz"),
    figure: Annotated[str, typer.Option(help="Format of the figure: png, svg or pdf.")] = "png",
    samples: Annotated[int, typer.Option(min=8, help="Reconstructions per bin.")] = 64,
    most: Annotated[
        int, typer.Option(min=8, help="The most for a bin whose weights are uneven.")
    ] = 512,
    max_kt: Annotated[
        float, typer.Option("--max-kT", min=0.0, help="Bins clearly above get no more calls.")
    ] = 12.0,
    max_calls: Annotated[
        int | None, typer.Option(min=1, help="Most energy calls, lowest bins first.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Bead model: steps per umbrella window.")] = 10_000,
    windows: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Bead model: windows per variable; default: 24 for one or two variables.",
        ),
    ] = None,
    centres: Annotated[
        bool, typer.Option("--centres", help="Torsion model: F at the centres, not of the bins.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Same seed: same result.")] = 0,
    device: Device = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite OUT.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Free energy over torsions, distances or angles, with error bars; ΔF between basins.

    A torsion model gives it directly, a bead model through reweighted umbrella windows.
    """
    with _plain_errors("– the same command continues"):
        from .free_energy_command import Request, free_energy_file
        from .free_energy_sampling import Sampling
        from .progress import Progress

        request = Request(
            model=model,
            config=config,
            out=out,
            on=on or [],
            bins=bins,
            ranges=ranges or [],
            second=check_with,
            temperatures_K=temperature or [],
            basins=basin or [],
            centres=centres,
            sampling=Sampling(
                n_samples=samples,
                n_most=max(samples, most),
                max_kT=max_kt,
                max_calls=max_calls,
                seed=seed,
            ),
            window_steps=steps,
            windows=windows,
            figure=figure,
            device=device,
            force=force,
        )
        with Progress(quiet=quiet) as progress:
            lines, tables = free_energy_file(request, progress)
        for title, rows in tables:
            _print(_table(title, rows))
        for line in lines:
            _print(escape(line))
