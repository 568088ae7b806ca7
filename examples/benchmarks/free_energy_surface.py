"""F(φ, ψ) of alanine dipeptide against energy calls: reference, molecular dynamics, metadynamics.

    export CCG_RUNS=...                         # with what `simulate.py alanine` writes
    python free_energy_surface.py reference     # flattened in (φ, ψ)
    python free_energy_surface.py checks        # of the reference
    python free_energy_surface.py md            # reads the stored dynamics
    python free_energy_surface.py metadynamics  # three seeds
    python free_energy_surface.py table --add "cycle=ours.npz,800000"
    python free_energy_surface.py plot --add ...

ff96 with OBC1, 300 K, flexible molecules. Every step is an energy call, those before the first
frame included. surface.py says what an error is, and how bins count that were never visited. To be
added are files of `ccg free-energy` over φ and ψ, in 24 or 36 bins, after a comma with the calls
that were spent before it; or files with `calls` (m,) and `free_energy_kT` (m, n, n) or (seeds, m,
n, n), axes φ and ψ from -π. What is written lies in $CCG_RUNS/free_energy_surface, each file is
complete, and what was stopped continues.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import baselines
import numpy as np
import reference_surface
import simulate
import surface
import torch
from matplotlib.figure import Figure
from surface import Curve, Reference

from ccg_training.reference import write_npz

CURVES = {
    "molecular dynamics": "md",
    "two of its walkers": "md_long",
    "metadynamics, bias": "metadynamics_bias",
    "metadynamics, reweighted": "metadynamics_reweighted",
}
REFERENCE = "reference.npz"


def reference(folder: Path, args: argparse.Namespace) -> None:
    """Make the reference."""
    stages = folder / "reference"
    reference_surface.sample(stages, args.chunks, args.walkers, args.seed)
    found = reference_surface.analyse(stages)
    write_npz(folder / REFERENCE, found)
    for key in ("calls", "frames", "walkers", "walkers_dropped", "crossings"):
        print(f"{key.replace('_', ' ')}: {found[key]}")
    for bins in reference_surface.GRIDS:
        truth = Reference.load(folder / REFERENCE, bins)
        error = truth.error[truth.region]
        print(
            f"{bins} x {bins} bins, {truth.region.sum()} below {surface.REGION_KT:.0f} kT: error "
            f"{np.median(error):.3f} kT in the middle, {truth.noise:.3f} rms, {error.max():.3f} at "
            "most"
        )
    print(f"ΔF {found['difference_kT']:.3f} ± {found['difference_error_kT']:.3f} kT")


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
class Judged:
    """A curve against the reference.

    Attributes
    ----------
    rms_error, gap, gap_error
        Of F(φ, ψ), and F(φ > 0) - F(φ < 0) (infinite where φ > 0 wasn't visited) with its absolute
        error, (seeds, m).
    unvisited
        Share of the region, mean over seeds, (m,).
    """

    name: str
    truth: Reference
    calls: np.ndarray
    rms_error: np.ndarray
    gap: np.ndarray
    gap_error: np.ndarray
    unvisited: np.ndarray


def judged(folder: Path, args: argparse.Namespace) -> Iterator[Judged]:
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
        truth = Reference.load(folder / REFERENCE, curve.bins)

        def each(figure: Callable[[np.ndarray], float], curve: Curve = curve) -> np.ndarray:
            return np.array([[figure(f) for f in seed] for seed in curve.free_energy])

        rms = partial(surface.rms_error, reference=truth, at_centres=curve.at_centres)
        missing = each(partial(surface.unvisited, reference=truth)).mean(0)
        gap = each(surface.difference)
        # Sums over centres are compared with sums over centres: they are up to 0.07 kT off.
        true_gap = surface.difference(truth.at_centres) if curve.at_centres else truth.difference
        yield Judged(name, truth, curve.calls, each(rms), gap, np.abs(gap - true_gap), missing)


def table(folder: Path, args: argparse.Namespace) -> None:
    """Print errors against calls of all methods."""
    print("| | calls | rms error, kT | never visited | ΔF, kT | its error |")
    print("| --- | --- | --- | --- | --- | --- |")
    for curve in judged(folder, args):
        for k, calls in enumerate(curve.calls):
            columns = (curve.rms_error[:, k], curve.gap[:, k], curve.gap_error[:, k])
            rms, gap, off = map(surface.mean_and_spread, columns)
            print(f"| {curve.name} | {calls} | {rms} | {curve.unvisited[k]:.0%} | {gap} | {off} |")
    for bins in reference_surface.GRIDS:
        truth = Reference.load(folder / REFERENCE, bins)
        print(
            f"reference, {bins} x {bins} bins: noise {truth.noise:.3f} kT, "
            f"ΔF {truth.difference:.3f} ± {truth.difference_error:.3f} kT"
        )


def plot(folder: Path, args: argparse.Namespace) -> None:
    """Draw the errors of F and of ΔF against calls: the mean over seeds, and their range."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    of_surface, of_difference = figure.subplots(1, 2)
    for curve in judged(folder, args):
        for ax, values in ((of_surface, curve.rms_error), (of_difference, curve.gap_error)):
            shown = np.where(np.isfinite(values).all(0), values, np.nan)
            (line,) = ax.plot(curve.calls, shown.mean(0), "o-", markersize=3, label=curve.name)
            low, high = shown.min(0), shown.max(0)
            ax.fill_between(curve.calls, low, high, alpha=0.2, color=line.get_color())
    truth = Reference.load(folder / REFERENCE, baselines.BINS)
    for ax, goal, noise, label in (
        (of_surface, 0.2, truth.noise, "rms error of F(φ, ψ) below 10 kT, kT"),
        (of_difference, 0.1, truth.difference_error, "error of ΔF between φ > 0 and φ < 0, kT"),
    ):
        ax.axhline(goal, color="0.5", linestyle=":", label="goal")
        ax.axhline(noise, color="0.7", label="noise of the reference")
        ax.set(xscale="log", yscale="log", xlabel="energy calls", ylabel=label)
    of_surface.legend(fontsize=7)
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
    command(checks)
    command(md)
    command(metadynamics, calls=1e7, seeds=3, seed=1, width=0.35)
    for shown in (command(table), command(plot, figure="free_energy_surface.png")):
        shown.add_argument("--add", action="append", default=[], metavar="NAME=FILE[,CALLS]")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.runs = simulate.folder(args.runs, "CCG_RUNS")
    args.do(args.runs / "free_energy_surface", args)


if __name__ == "__main__":
    main()
