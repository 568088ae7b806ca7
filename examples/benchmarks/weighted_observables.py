"""Alanine dipeptide from a bead run, with weights and without, beside molecular dynamics.

    python weighted_observables.py REFERENCE [MODEL] [--frames 8000] [--samples 2]

REFERENCE holds frames of the ensemble with energies: $CCG_RUNS/alanine_held_out.npz of simulate.py,
or $CCG_RUNS/free_energy_surface/frames.npz of free_energy_surface.py. It's used for nothing else.

F(φ), F(ψ), F(χ), means and distributions of the distance of the ends and of the energy: everything
by the public interface alone. The bead run starts from one structure; its first 100 ps are left
out. A deviation is told in standard errors of the difference. Figures of the last release:
README.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import simulate
from MDAnalysis.analysis.dihedrals import Dihedral
from MDAnalysis.lib.distances import calc_bonds

from ccg_ase import BatchedLangevin, ForceField, load_model
from ccg_mda import (
    WeightedAverage,
    backmap,
    bead_universe,
    reweight,
    two_level_weights,
    universe_from,
)
from ccg_training.reference import ReferenceData, read_structure

MODEL = Path(__file__).parents[1] / "alanine_dipeptide" / "alanine_dipeptide.ccg"
REPLICAS, TEMPERATURES = 64, 4
BINS, BELOW_KT = 36, 6.0
DIHEDRALS = {
    "φ": "(name C and resname ACE) or (resname ALA and name N CA C)",
    "ψ": "(resname ALA and name N CA C) or (name N and resname NME)",
    "χ": "resname ALA and name N CA CB HB1",
}


def end_to_end(atoms) -> float:
    """Distance of the two methyl carbons, in Å."""
    return calc_bonds(atoms[1].position, atoms[18].position)


def energy(atoms) -> float:
    """Potential energy in eV."""
    return atoms.universe.trajectory.ts.data["energy"]


def bead_run(force_field: ForceField, starts: np.ndarray, n_frames: int, seed: int) -> np.ndarray:
    """Return frames at the lowest of four temperatures, 1 ps apart, one slot after the other."""
    coldest, ladders = force_field.temperature_K, len(starts) // TEMPERATURES
    dynamics = BatchedLangevin(
        force_field,
        timestep_fs=4,
        friction_per_ps=1,
        seed=seed,
        temperatures_K=BatchedLangevin.ladder(coldest, 2 * coldest, TEMPERATURES),
        exchange_every=50,
    )
    per_ladder = -(-n_frames // ladders)
    frames = dynamics.run(starts, 250 * (per_ladder + 100), every=250)
    print(dynamics.exchange_report())
    return np.concatenate(frames.beads[-per_ladder:, ::TEMPERATURES].swapaxes(0, 1))


def free_energy_of(density: np.ndarray, error: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return -ln of the density of φ and its error, in kT."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return -np.log(density), error / density


def show(name: str, unit: str, md, weighted, plain) -> None:
    off = [(x[0] - md[0]) / np.hypot(x[1], md[1]) for x in (weighted, plain)]
    print(f"| {name}, {unit} | {md[0]:.4f} ± {md[1]:.4f} | {weighted[0]:.4f} ± {weighted[1]:.4f} "
          f"({off[0]:+.1f}) | {plain[0]:.4f} ± {plain[1]:.4f} ({off[1]:+.1f}) |")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reference", type=ReferenceData.load)
    parser.add_argument("model", nargs="?", type=Path, default=MODEL)
    parser.add_argument("--frames", type=int, default=8000)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    loaded, reference = load_model(args.model), args.reference
    force_field = ForceField.from_model(loaded)
    start = loaded.cg_map.apply(
        read_structure(simulate.ALANINE).atoms.positions[None].astype(float)
    )
    beads = bead_run(force_field, np.repeat(start, REPLICAS, axis=0), args.frames, args.seed)
    u = backmap(
        bead_universe(beads, loaded.cg_map, dt=1.0),
        args.model,
        n_samples=args.samples,
        potential=simulate.alanine_potential(),
        prefetch=64,
    )
    levels = two_level_weights(u, free_energy=force_field)
    log_w = levels.log_w
    print(f"effective sample size: beads {levels.ess_beads:.3f}, atoms {levels.ess_atoms:.3f}, "
          f"product {levels.ess:.3f}")  # fmt: skip
    md = universe_from(loaded.cg_map.atoms, reference.positions.astype(np.float32), dt=1.0)
    stored = dict(enumerate(reference.energy))
    same = np.zeros(len(md.trajectory))

    def stored_energy(atoms) -> float:
        return stored[atoms.universe.trajectory.frame]

    options = {"n_blocks": 40}
    print("| | molecular dynamics | beads, weighted | beads, unweighted |")
    print("| --- | --- | --- | --- |")
    for name, unit, of_md, of_beads in (
        ("end to end", "Å", end_to_end, end_to_end),
        ("energy", "eV", stored_energy, energy),
    ):
        runs = (
            WeightedAverage(of_md, md, log_w=same, **options),
            WeightedAverage(of_beads, u, log_w=log_w, **options),
            WeightedAverage(of_beads, u, log_w=0 * log_w, **options),
        )
        show(name, unit, *((x.results.mean, x.results.error) for x in (run.run() for run in runs)))
    print()
    print("| distribution | compared | rms, kT | mean square, greatest deviation (errors) "
          "| the same, unweighted |")  # fmt: skip
    print("| --- | --- | --- | --- | --- |")
    runs = ((md, same), (u, log_w), (u, 0 * log_w))
    for name, selection in DIHEDRALS.items():
        profiles = []
        for atoms, weights in runs:
            four = in_a_row(atoms.select_atoms(selection))
            found = reweight(Dihedral([four]), weights, bins=BINS, **options).results
            profiles.append(free_energy_of(found.mean[0], found.error[0]))
        compare(name, profiles)
    ends = np.linalg.norm(reference.positions[:, 1] - reference.positions[:, 18], axis=1)
    for name, of_md, of_beads, known in (
        ("end to end", end_to_end, end_to_end, ends),
        ("energy", stored_energy, energy, reference.energy),
    ):
        edges = np.quantile(known, np.linspace(0, 1, 21))
        edges[0], edges[-1] = -np.inf, np.inf
        profiles = []
        for (atoms, weights), function in zip(runs, (of_md, of_beads, of_beads), strict=True):

            def share(group, function=function, edges=edges) -> np.ndarray:
                value = function(group)
                return ((edges[:-1] <= value) & (value < edges[1:])).astype(float)

            found = WeightedAverage(share, atoms, log_w=weights, **options).run().results
            profiles.append(free_energy_of(found.mean, found.error))
        compare(f"{name}, twentieths of md", profiles)


def in_a_row(four) -> object:
    """Return the four atoms of a dihedral in the order of its bonds."""
    ends = [atom for atom in four if len(set(four) & set(atom.bonded_atoms)) == 1]
    row = [min(ends, key=lambda atom: atom.index)]
    while len(row) < 4:
        (following,) = set(four) & set(row[-1].bonded_atoms) - set(row)
        row.append(following)
    return sum(row[1:], four.universe.atoms[[row[0].index]])


def compare(name: str, profiles: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Print how far weighted and unweighted profiles are from that of molecular dynamics."""
    (exact, exact_error), *others = profiles
    low = exact - exact.min() < BELOW_KT
    low &= np.all([np.isfinite(value) for value, _ in others], axis=0)
    cells = []
    for value, error in others:
        apart = value[low] - exact[low]
        off = apart / np.hypot(error, exact_error)[low]
        cells += [np.sqrt(np.mean(apart**2)), np.mean(off**2), np.abs(off).max()]
    print(f"| {name} | {low.sum()} bins | {cells[0]:.3f} | {cells[1]:.2f}, {cells[2]:.1f} "
          f"| {cells[3]:.3f} kT; {cells[4]:.2f}, {cells[5]:.1f} |")  # fmt: skip


if __name__ == "__main__":
    main()
