"""Chignolin in ten Cα beads: does bead dynamics survive distorted starts?

    export CCG_DATA=... CCG_RUNS=...            # see systems.py; frames: simulate.py chignolin
    python chignolin_beads.py fit BEADS.ccg     # prior with dihedrals, force matching on slices
    python chignolin_beads.py run BEADS.ccg --steps 1000000

Twenty starts, each bead moved by 1 Å of Gaussian noise per axis. An explosion ends the run with its
reason; what is printed is how far bonds stretch and how compact the chains are. Figures of the last
release: README.md.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import systems
import torch

from ccg_ase import BatchedLangevin, ForceField, load_model, save_model
from ccg_training.fit_forcefield import FitSettings, fit_force_field
from ccg_training.labels import Labels

STARTS, DISTORTION_A = 20, 1.0


def longest_bonds(beads: np.ndarray) -> np.ndarray:
    """Return the longest distance of bonded neighbours of frames (..., n, 3), in Å."""
    return np.linalg.norm(np.diff(beads, axis=-2), axis=-1).max(-1)


def fit(args: argparse.Namespace, system: systems.System) -> None:
    """Fit to the forces on the Cα atoms; held-out walkers judge."""
    labels = [
        Labels.from_forces(
            system.cg_map.apply(data.positions[::every]),
            system.cg_map.apply_forces(data.forces[::every]),
        )
        for data, every in ((system.data, 1), (system.held_out, 4))
    ]
    torch.manual_seed(args.seed)
    force_field = ForceField.from_data(
        system.cg_map,
        system.temperature_K,
        labels[0].beads,
        terms=("bonds", "angles", "dihedrals", "volumes"),
        channels=8,
        cutoff_A=12.0,
    )
    settings = FitSettings(steps=600, batch_size=128, learning_rate=3e-3, seed=args.seed)
    print(fit_force_field(force_field, *labels, settings))
    parts = {"force_field": force_field}
    save_model(args.model, cg_map=system.cg_map, temperature_K=system.temperature_K, parts=parts)


def run(args: argparse.Namespace, system: systems.System) -> None:
    """Run all starts as replicas of one batch."""
    force_field = ForceField.from_model(load_model(args.model))
    known = system.cg_map.apply(system.data.positions)
    print(f"reference: longest bond {longest_bonds(known).max():.2f} Å")
    rng = np.random.default_rng(args.seed)
    starts = known[:: len(known) // STARTS][:STARTS]
    dynamics = BatchedLangevin(
        force_field, timestep_fs=args.timestep, friction_per_ps=1.0, seed=args.seed
    )
    start, longest, said = time.perf_counter(), 0.0, 0
    distorted = starts + rng.normal(scale=DISTORTION_A, size=starts.shape)
    for frames in dynamics.iterate(distorted, args.steps, 1000):
        settled = frames.beads[frames.steps > 0]
        longest = max(longest, longest_bonds(settled).max(initial=0.0))
        if len(settled) and dynamics.n_steps // 50_000 > said:
            said = dynamics.n_steps // 50_000
            radius = np.sqrt(settled[-1].var(axis=1).sum(-1))
            per_step = (time.perf_counter() - start) / dynamics.n_steps * 1e3
            print(
                f"{dynamics.n_steps} steps: longest bond {longest:.2f} Å, radius of gyration "
                f"{radius.min():.1f} to {radius.max():.1f} Å, {per_step:.1f} ms per step",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    for work in (fit, run):
        command = commands.add_parser(work.__name__)
        command.set_defaults(work=work)
        command.add_argument("model")
        command.add_argument("--seed", type=int, default=0)
    command.add_argument("--steps", type=int, default=1_000_000)
    command.add_argument("--timestep", type=float, default=4.0)
    args = parser.parse_args()
    args.work(args, systems.load("chignolin"))


if __name__ == "__main__":
    main()
