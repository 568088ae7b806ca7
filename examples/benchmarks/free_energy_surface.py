"""F(φ, ψ) of alanine dipeptide against energy calls: reference, molecular dynamics, metadynamics.

    export CCG_RUNS=...                         # with what `simulate.py alanine` writes
    python free_energy_surface.py reference     # flattened in (φ, ψ)
    python free_energy_surface.py checks        # of the reference
    python free_energy_surface.py frames        # equilibrium frames from it
    python free_energy_surface.py md            # reads the stored dynamics
    python free_energy_surface.py metadynamics  # three seeds
    python free_energy_surface.py table --add "cycle=ours.npz,800000"
    python free_energy_surface.py plot errors.csv

ff96 with OBC1, 300 K, flexible molecules. Every step is an energy call, those before the first
frame included. surface.py says what an error is, and how bins count that were never visited. To be
added are files of `ccg free-energy` over φ and ψ, in 24 or 36 bins, after a comma with the calls
that were spent before it; or files with `calls` (m,) and `free_energy_kT` (m, n, n) or (seeds, m,
n, n), axes φ and ψ from -π. What is written lies in $CCG_RUNS/free_energy_surface, each file is
complete, and what was stopped continues.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from itertools import chain, groupby
from operator import attrgetter
from pathlib import Path

import baselines
import numpy as np
import reference_surface
import simulate
import surface
import torch
from matplotlib.figure import Figure
from surface import Reference

from ccg_training.reference import write_npz

CURVES = {
    "molecular dynamics": "md",
    "two of its walkers": "md_long",
    "metadynamics, bias": "metadynamics_bias",
    "metadynamics, reweighted": "metadynamics_reweighted",
}
ERRORS = "errors.csv"


def reference(folder: Path, args: argparse.Namespace) -> None:
    """Make the reference."""
    stages = folder / "reference"
    reference_surface.sample(stages, args.chunks, args.walkers, args.seed)
    found = reference_surface.analyse(stages)
    write_npz(folder / surface.REFERENCE, found)
    for key in ("calls", "frames", "walkers", "walkers_dropped", "crossings"):
        print(f"{key.replace('_', ' ')}: {found[key]}")
    for bins in reference_surface.GRIDS:
        truth = Reference.load(folder / surface.REFERENCE, bins)
        error = truth.error[truth.region]
        print(
            f"{bins} x {bins} bins, {truth.region.sum()} below {surface.REGION_KT:.0f} kT: error "
            f"{np.median(error):.3f} kT in the middle, {truth.noise:.3f} rms, {error.max():.3f} at "
            "most"
        )
    print(f"ΔF {found['difference_kT']:.3f} ± {found['difference_error_kT']:.3f} kT")


def frames(folder: Path, args: argparse.Namespace) -> None:
    """Make frames of the ensemble itself from those of the reference."""
    reference_surface.equilibrium(folder / "reference", args.seed).save(folder / "frames.npz")


def checks(folder: Path, args: argparse.Namespace) -> None:
    """Print how the reference compares with itself, stored dynamics, and shorter steps."""
    for line in reference_surface.checks(folder / "reference", args.runs / "alanine_held_out.npz"):
        print(line, flush=True)


def md(folder: Path, args: argparse.Namespace) -> None:
    """Read plain molecular dynamics: four walkers for 4 ns, and two of them for 40 ns."""
    files = [args.runs / "alanine.npz", args.runs / "alanine_held_out.npz"]
    four = baselines.stored_dynamics(files)
    four.save(folder / "md.npz")
    baselines.stored_dynamics(files[1:], four.calls[-1]).save(folder / "md_long.npz")


def metadynamics(folder: Path, args: argparse.Namespace) -> None:
    """Run well-tempered metadynamics."""
    files = (folder / "metadynamics_bias.npz", folder / "metadynamics_reweighted.npz")
    seeds = [args.seed + k for k in range(args.seeds)]
    baselines.run_metadynamics(folder / "metadynamics", files, args.calls, seeds, args.width)


@dataclass(frozen=True)
class Row:
    """One row of `errors.csv`: a method after so many energy calls; mean and spread over seeds.

    Attributes
    ----------
    rms_kT, unvisited
        Error of F(φ, ψ), and the share of the region without F.
    gap_kT, gap_off_kT
        F(φ > 0) - F(φ < 0), and its absolute error; NaN where a seed never saw φ > 0.
    """

    method: str
    calls: int
    rms_kT: float
    rms_sd: float
    unvisited: float
    gap_kT: float
    gap_sd: float
    gap_off_kT: float
    gap_off_sd: float

    @classmethod
    def read(cls, file: Path) -> list[Row]:
        """Read a table that `table` wrote."""
        with file.open(newline="") as stream:
            rows = list(csv.DictReader(stream))
        numbers = [f.name for f in fields(cls)][2:]
        return [
            cls(row["method"], int(row["calls"]), *(float(row[name]) for name in numbers))
            for row in rows
        ]


def judged(folder: Path, args: argparse.Namespace) -> Iterator[Row]:
    """Judge all curves that are there, and those to be added."""
    curves = {}
    for name, stem in CURVES.items():
        if (file := folder / f"{stem}.npz").is_file():
            curves[name] = surface.curves_of(file)[""]
    for given in args.add:
        name, _, rest = given.rpartition("=")
        file, _, before = rest.partition(",")
        for way, curve in surface.curves_of(file, int(float(before or 0))).items():
            curves[", ".join(filter(None, (name, way))) or Path(file).stem] = curve
    for name, curve in curves.items():
        truth = Reference.load(surface.reference_file(folder), curve.bins)
        # Sums over centres are compared with sums over centres: they are up to 0.07 kT off.
        true_gap = surface.difference(truth.at_centres) if curve.at_centres else truth.difference
        for calls, seeds in zip(curve.calls, curve.free_energy.swapaxes(0, 1), strict=True):
            errors = [surface.rms_error(F, truth, at_centres=curve.at_centres) for F in seeds]
            missing = np.mean([surface.unvisited(F, truth) for F in seeds])
            gap = np.array([surface.difference(F) for F in seeds])
            columns = (np.array(errors), gap, np.abs(gap - true_gap))
            (rms, rms_sd), *of_gap = map(surface.mean_and_spread, columns)
            yield Row(name, int(calls), rms, rms_sd, float(missing), *chain(*of_gap))


def table(folder: Path, args: argparse.Namespace) -> None:
    """Write errors against calls of all methods to errors.csv, and print them."""
    rows = list(judged(folder, args))
    with (folder / ERRORS).open("w", newline="") as stream:
        writer = csv.DictWriter(stream, [f.name for f in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    print("| | calls | rms error, kT | never visited | ΔF, kT | its error |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in rows:
        print(
            f"| {row.method} | {row.calls} | {surface.told(row.rms_kT, row.rms_sd)} | "
            f"{row.unvisited:.0%} | {surface.told(row.gap_kT, row.gap_sd)} | "
            f"{surface.told(row.gap_off_kT, row.gap_off_sd)} |"
        )
    for bins in reference_surface.GRIDS:
        truth = Reference.load(surface.reference_file(folder), bins)
        print(
            f"reference, {bins} x {bins} bins: noise {truth.noise:.3f} kT, "
            f"ΔF {truth.difference:.3f} ± {truth.difference_error:.3f} kT"
        )


def plot(folder: Path, args: argparse.Namespace) -> None:
    """Draw the errors of F and of ΔF against calls; seeds of one method have one colour."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    of_surface, of_difference = figure.subplots(1, 2)
    colours: dict[str, str] = {}
    for method, group in groupby(Row.read(args.errors), key=attrgetter("method")):
        rows, name = list(group), method.split(", seed")[0]
        style = {"color": colours[name]} if name in colours else {"label": name}
        calls = [row.calls for row in rows]
        for ax, key in ((of_surface, "rms"), (of_difference, "gap_off")):
            values, spread = (
                np.array([getattr(row, f"{key}_{part}") for row in rows]) for part in ("kT", "sd")
            )
            line, *_ = ax.errorbar(calls, values, np.nan_to_num(spread), fmt="o-", ms=3, **style)
            colours[name] = style["color"] = line.get_color()
    truth = Reference.load(surface.reference_file(folder), baselines.BINS)
    for ax, goal, noise, label in (
        (of_surface, 0.2, truth.noise, "rms error of F(φ, ψ) below 10 kT, kT"),
        (of_difference, 0.1, truth.difference_error, "error of ΔF between φ > 0 and φ < 0, kT"),
    ):
        ax.axhline(goal, color="0.5", linestyle=":", label="goal")
        ax.axhline(noise, color="0.7", label="noise of the reference")
        ax.set(xscale="log", yscale="log", xlabel="energy calls", ylabel=label)
    figure.legend(
        *of_surface.get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8
    )
    figure.savefig(args.figure, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", help="folder of the runs; default $CCG_RUNS")
    commands = parser.add_subparsers(required=True)

    def command(
        do: Callable[[Path, argparse.Namespace], None], **defaults: float | str
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(do.__name__, help=do.__doc__)
        added.set_defaults(do=do)
        for name, value in defaults.items():
            added.add_argument(f"--{name}", type=type(value), default=value)
        return added

    command(reference, chunks=9, walkers=1024, seed=20261123)
    command(frames, seed=5)
    command(checks)
    command(md)
    command(metadynamics, calls=1e7, seeds=3, seed=1, width=0.35)
    command(table).add_argument(
        "--add", action="append", default=[], metavar="NAME=FILE[,CALLS]", help="one more curve"
    )
    drawn = command(plot, figure="free_energy_error.png")
    drawn.add_argument("errors", type=Path, help="errors.csv, as `table` writes it")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.runs = simulate.folder(args.runs, "CCG_RUNS")
    args.do(args.runs / "free_energy_surface", args)


if __name__ == "__main__":
    main()
