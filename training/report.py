"""One self-contained HTML page per run: verdicts in words first, then the figures behind them."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import figures, figures_run
from .report_data import ReportData
from .stages import write_text
from .verdicts import headline, judge

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150


class ReportError(ValueError):
    """A run directory that holds nothing to report on."""


@dataclass(frozen=True)
class Plate:
    """A figure of the report: how it is drawn and what it shows."""

    name: str
    title: str
    caption: str
    draw: Callable[[ReportData], Figure | None]


PLATES = (
    Plate(
        "picture",
        "What the model does",
        "One bead state, one reconstruction of its atoms, and several: the spread is what the bead "
        "state leaves open. Beads amber, carbon grey, nitrogen blue, oxygen red, hydrogen light.",
        figures_run.picture,
    ),
    Plate(
        "free_energy",
        "Free energy over the torsions",
        "Minus the logarithm of the histogram, in kT, zero at the minimum; white was not visited. "
        "Differences, to the first map, are drawn where both have samples; their mean is zero. "
        "Where the reference data are biased, the first map is that of bead dynamics.",
        figures.free_energy_maps,
    ),
    Plate(
        "surface",
        "Free energy between the labels",
        "A Gaussian process over the labels of all turns, zero at the minimum, and its standard "
        "error. Dots: labels with a free energy; where there is none nearby, nothing is known.",
        figures.surface_maps,
    ),
    Plate(
        "internals",
        "Bonds, angles and torsions of the beads",
        "Grey: reference data. Red: bead dynamics with the trained force field.",
        figures.internal_histograms,
    ),
    Plate(
        "energies",
        "All-atom energies",
        "Potential energy of reconstructed atoms, as drawn and after reweighting. The reweighted "
        "curve should lie on the reference.",
        figures.energy_histogram,
    ),
    Plate(
        "effective_sample_size",
        "Effective sample size per state",
        "1 means that every reconstruction counts in full. Rare regions are shown by themselves, "
        "since an average hides them. Dashed lines are means.",
        figures.effective_sizes,
    ),
    Plate(
        "joint_residual",
        "Joint residual of flow and force field",
        "Energy that neither model explains, atom by atom: ln q − βF + βU up to a constant. It is "
        "zero everywhere if both models are exact. Grey: frames of the dynamics. Line: atoms that "
        "the models themselves made.",
        figures.residual_histogram,
    ),
    Plate(
        "label_variance",
        "Mean-force labels",
        "How noisy one label of the mean force is. Training the force field costs labels in "
        "proportion to this variance.",
        figures_run.label_variances,
    ),
    Plate(
        "history",
        "Turn by turn",
        "At the states that each turn labelled, before the models learnt from them: error of the "
        "force field's free energy and mean force, and effective sample size of the flow.",
        figures_run.history,
    ),
    Plate(
        "costs",
        "What it cost",
        "Stages in the order they ran, with the iteration in front. An energy call is one "
        "evaluation of the atomistic potential.",
        figures_run.costs,
    ),
)


@dataclass(frozen=True)
class Table:
    """A table of the report: an array of text in ReportData, and what it shows."""

    name: str
    title: str
    caption: str
    header: tuple[str, ...]


TABLES = (
    Table(
        "turn_table",
        "Turns of the loop",
        "Figures at the states that a turn labelled are those of the models before it. A fit that "
        "gains nothing on held-out data leaves its model as it was.",
        (
            *("turn", "states", "accepted", "ESS", "F off by (kT)", "force off by (eV/Å, eV/rad)"),
            *("flow gained (nats)", "force field gained", "energy calls so far", "minutes"),
        ),
    ),
    Table(
        "weight_table",
        "Weights on held-out frames",
        "Samples drawn at the bead states of held-out frames, and the frames themselves.",
        ("figure", "value", "what it says"),
    ),
    Table(
        "structure_table",
        "Structure of the reconstructions",
        "Every sample of the held-out check as drawn, unweighted, against the training frames. "
        "Outliers are more than 6 standard deviations of the reference off; atoms more than three "
        "bonds apart clash below 1.2 Å.",
        ("check", "terms", "of terms", "of samples", "worst"),
    ),
    Table(
        "coverage_table",
        "Torsions at given bead state",
        "Reweighted samples against the held-out frame that their bead state came from; torsions "
        "that the beads fix are left out, the worst come first. Divergence of the histograms in "
        "nats; share of frames in a 15° bin that no sample of the same bead state visits. In "
        "brackets what a perfect model would show with so few frames and samples.",
        ("torsion", "divergence (floor)", "not visited (floor)"),
    ),
)


SHOWN_HELD = 20


def flow_facts(records: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return what the records say of the flow's fits and of the coordinates that it holds."""
    facts = []
    for record in records:
        stage, _, part = record.get("stage", "").partition(": ")
        if stage != "flow":
            continue
        if (fit := record.get("fit")) is not None:
            facts.append((part or f"turn {record['iteration']}", str(fit)))
        if (held := record.get("held")) is not None:
            facts.append(("held rigid", _held(held)))
    return facts


def force_field_facts(records: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return what the records say of the fits of the force field."""
    facts = []
    for record in records:
        if record.get("stage") != "force field" or "loss_noise" not in record:
            continue
        turn = f"turn {record['iteration']}" if record["iteration"] else "first fit"
        facts.append((turn, fit_summary(record)))
        if (gain := record.get("relative_entropy_gain_nats")) is not None:
            error, rounds = (
                record[f"relative_entropy_{name}"] for name in ("gain_error", "rounds")
            )
            text = f"Fell by {gain:.3f} ± {error:.3f} nats per frame in {rounds} rounds."
            facts.append(("relative entropy", text))
    return facts


def fit_summary(fit: dict[str, float | None]) -> str:
    """Say in a sentence how a fit of the force field stands, its irreducible part beside the loss.

    Parameters
    ----------
    fit
        Metrics of `fit_force_field`, as metrics.jsonl has them: None where there is no number.
    """
    noise = (
        f"of which {fit['loss_noise']:.4g} is noise of the labels: no model can go below that. "
        f"Forces are off by {fit['force_error']:.4f} eV/Å (less than "
        f"{fit['force_resolution']:.4f} can't be seen)."
        if fit["loss_noise"] is not None
        else f"some of them plain forces. Their noise, unknown, is most of the "
        f"{fit['force_error']:.4f} eV/Å by which forces are off."
    )
    return (
        f"Loss {fit['loss']:.4g} on held-out labels, {noise} The prior explains "
        f"{fit['prior_explains']:.1%} of the mean square of the mean force, with the networks it "
        f"is {fit['model_explains']:.2%}."
    )


def _held(names: list[str]) -> str:
    """Name held coordinates, and say what they mean for weights."""
    if not names:
        return "Nothing: all bonds, angles and torsions that the coarse variables leave open move."
    more = f" and {len(names) - SHOWN_HELD} more" if len(names) > SHOWN_HELD else ""
    return (
        f"{', '.join(names[:SHOWN_HELD])}{more}. They never move in the data, so densities and "
        "weights hold on the surface where they are fixed, without the mass-metric factor by which "
        "rigid dynamics weighs that surface."
    )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read a metrics.jsonl; a last line that an interruption cut off is left out."""
    if not path.is_file():
        return []
    records = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ReportError(f"{path}, line {number} is not JSON: {error}") from None
    return records


def write_report(run_directory: str | Path) -> Path:
    """Write RUN/report.html and RUN/figures from RUN/report_data.npz and RUN/metrics.jsonl.

    Returns
    -------
    Path
        The HTML page: one file without references to others.

    Raises
    ------
    ReportError
        If the run has not written report_data.npz yet.
    """
    run_directory = Path(run_directory)
    source = run_directory / "report_data.npz"
    if not source.is_file():
        raise ReportError(
            f"{run_directory} holds no report_data.npz: give a run directory whose training has "
            "finished at least one iteration"
        )
    data = ReportData.load(source)
    config = run_directory / "config.toml"
    page = render(
        data,
        read_metrics(run_directory / "metrics.jsonl"),
        config=config.read_text(encoding="utf-8") if config.is_file() else "",
        figure_directory=run_directory / "figures",
    )
    target = run_directory / "report.html"
    write_text(target, page)
    return target


def render(
    data: ReportData,
    records: list[dict[str, Any]],
    *,
    config: str = "",
    figure_directory: Path | None = None,
) -> str:
    """Return the page as text; also writes the figures as PNG files where a folder is given."""
    from jinja2 import Environment, StrictUndefined

    plates = []
    for plate in PLATES:
        figure = plate.draw(data)
        if figure is None:
            continue
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI)
        if figure_directory is not None:
            figure_directory.mkdir(parents=True, exist_ok=True)
            (figure_directory / f"{plate.name}.png").write_bytes(buffer.getvalue())
        image = base64.b64encode(buffer.getvalue()).decode()
        plates.append({"plate": plate, "image": image, "width": round(figure.get_figwidth() * 100)})
    tables = [
        {"table": table, "rows": rows.tolist()}
        for table in TABLES
        if (rows := getattr(data, table.name)).size
    ]
    verdicts = judge(data)
    template = files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(template).render(
        data=data,
        headline=headline(verdicts),
        verdicts=verdicts,
        plates=plates,
        tables=tables,
        flow=flow_facts(records),
        force_field=force_field_facts(records),
        records=records,
        config=config,
        version=version("ccg"),
    )
