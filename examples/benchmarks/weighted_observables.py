"""Alanine dipeptide from a bead run, with weights and without, beside molecular dynamics.

    export CCG_DATA=... CCG_RUNS=...       # see systems.py; the held-out run of simulate.py alanine
    python weighted_observables.py [MODEL] [--frames 8000] [--samples 2]

F(φ), the mean distance of the ends, the mean energy, hydrogen bonds: everything by the public
interface alone. A deviation is told in standard errors of the difference. Figures of the last
release: README.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import systems
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

MODEL = Path(__file__).parents[1] / "alanine_dipeptide" / "alanine_dipeptide.ccg"
REPLICAS, TEMPERATURES = 64, 4
BINS, BELOW_KT = 36, 6.0


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
    frames = dynamics.run(starts, 250 * (per_ladder + 50), every=250)
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
    parser.add_argument("model", nargs="?", type=Path, default=MODEL)
    parser.add_argument("--frames", type=int, default=8000)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    system, loaded = systems.load("alanine_slices"), load_model(args.model)
    force_field = ForceField.from_model(loaded)
    reference = system.held_out
    rng = np.random.default_rng(args.seed)
    known = loaded.cg_map.apply(system.data.positions)  # the reference is used for nothing
    beads = bead_run(force_field, known[rng.choice(len(known), REPLICAS)], args.frames, args.seed)
    u = backmap(
        bead_universe(beads, loaded.cg_map, dt=1.0),
        args.model,
        n_samples=args.samples,
        potential=system.potential,
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
    print("| φ, degrees | F of molecular dynamics, kT | beads, weighted | beads, unweighted |")
    print("| --- | --- | --- | --- |")
    profiles = []
    for atoms, weights in ((md, same), (u, log_w), (u, 0 * log_w)):
        phi = atoms.select_atoms("resname ALA")[:1].residues[0].phi_selection()
        found = reweight(Dihedral([phi]), weights, bins=BINS, **options).results
        profiles.append(free_energy_of(found.mean[0], found.error[0]))
    low = profiles[0][0] - profiles[0][0].min() < BELOW_KT
    for k in np.flatnonzero(low):
        row = (f"{value[k]:.2f} ± {error[k]:.2f}" for value, error in profiles)
        print(f"| {found.bins[k]:.0f} | {' | '.join(row)} |")
    (exact, exact_error), *others = profiles
    for name, (value, error) in zip(("weighted", "unweighted"), others, strict=True):
        apart = value[low] - exact[low]
        off = apart / np.hypot(error, exact_error)[low]
        print(f"{name}, {low.sum()} bins below {BELOW_KT:.0f} kT: rms "
              f"{np.sqrt(np.mean(apart**2)):.3f} kT; in standard errors mean square "
              f"{np.mean(off**2):.2f}, greatest {np.abs(off).max():.1f}")  # fmt: skip


if __name__ == "__main__":
    main()
