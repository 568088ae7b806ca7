"""A liquid with one bead per molecule: fit to forces, bead dynamics, radial distribution function.

    export CCG_DATA=... CCG_RUNS=...           # see systems.py; frames: simulate.py methanol
    python liquid.py fit methanol LIQUID.ccg   # force matching on forces of the centres of mass
    python liquid.py refine methanol LIQUID.ccg   # then relative entropy, in place
    python liquid.py run methanol LIQUID.ccg --steps 1000000

The largest difference of g(r) is printed as a share of its peak, beside the standard error of the
reference. Figures of the last release: README.md.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import systems
import torch

from ccg_ase import BatchedLangevin, ForceField, load_model, save_model
from ccg_training.fit_forcefield import FitSettings, fit_force_field
from ccg_training.force_aggregation import ForceMap
from ccg_training.labels import Labels
from ccg_training.langevin_sampler import LangevinSampler
from ccg_training.reference_beads import ReferenceBeads
from ccg_training.relative_entropy import RelativeEntropySettings, minimise_relative_entropy

WIDTH_A = 0.1
BLOCKS = 5


def radial_distribution(frames: np.ndarray, box: np.ndarray, reach_A: float = 9.0) -> np.ndarray:
    """Return g(r) of frames (N, n, 3) in an orthorhombic box (3,), in bins of 0.1 Å."""
    edges = np.arange(0, reach_A + WIDTH_A / 2, WIDTH_A)
    i, j = np.triu_indices(frames.shape[1], 1)
    counts = np.zeros(len(edges) - 1)
    for frame in frames:
        apart = frame[i] - frame[j]
        apart -= np.round(apart / box) * box
        counts += np.histogram(np.linalg.norm(apart, axis=-1), edges)[0]
    shells = 4 / 3 * np.pi * np.diff(edges**3)
    return counts / (len(frames) * len(i) / np.prod(box) * shells)


def all_beads(system: systems.System) -> np.ndarray:
    """Return the beads of all frames in time order, (N, n, 3), in Å."""
    return system.cg_map.apply(np.concatenate([system.data.positions, system.held_out.positions]))


def fit(args: argparse.Namespace, system: systems.System) -> None:
    """Fit to the forces on the centres of mass; a tenth of the frames is held out, the last."""
    beads = all_beads(system)
    forces = ForceMap.slices(system.cg_map).apply(
        np.concatenate([system.data.forces, system.held_out.forces])
    )
    boxes = np.tile(np.diag(system.box), (len(beads), 1, 1))
    torch.manual_seed(args.seed)
    force_field = ForceField.from_data(
        system.cg_map,
        system.temperature_K,
        beads,
        boxes=boxes,
        channels=args.channels,
        n_layers=args.layers,
        n_radial=args.radial,
        cutoff_A=args.cutoff,
    )
    labels = Labels.from_forces(beads, forces, boxes=boxes)
    cut, start = len(beads) * 9 // 10, time.process_time()
    figures = fit_force_field(
        force_field,
        labels[:cut],
        labels[cut:],
        FitSettings(steps=args.steps, batch_size=4, learning_rate=5e-3, seed=args.seed),
        progress=lambda step, steps, v: print(f"{step} of {steps}: {v['loss']:.5f}", flush=True),
    )
    print(f"{len(beads)} frames, {time.process_time() - start:.0f} CPU s: {figures}")
    parts = {"force_field": force_field}
    save_model(args.model, cg_map=system.cg_map, temperature_K=system.temperature_K, parts=parts)


def refine(args: argparse.Namespace, system: systems.System) -> None:
    """Minimise the relative entropy; the last fifth of the frames only judges.

    What is left after some rounds moves g(r) by a few hundredths, which is less than S_rel of so
    few molecules can tell: any gain counts, and a rejection halves the steps.
    """
    force_field = ForceField.from_model(load_model(args.model))
    beads = all_beads(system)
    box = np.diag(system.box)
    start = time.process_time()
    figures = minimise_relative_entropy(
        force_field,
        *ReferenceBeads(beads).split(0.2),
        LangevinSampler(2000, 50, 1000, timestep_fs=5.0, box=box),
        RelativeEntropySettings(
            rounds=args.rounds,
            steps=60,
            batch_size=32,
            n_replicas=8,
            learning_rate=1e-4,
            significance=0.0,
            seed=args.seed,
        ),
        box=box,
        progress=lambda done, rounds, v: print(
            f"round {done} of {rounds}, {time.process_time() - start:.0f} CPU s: {v}", flush=True
        ),
    )
    print(figures)
    parts = {"force_field": force_field}
    save_model(args.model, cg_map=system.cg_map, temperature_K=system.temperature_K, parts=parts)


def run(args: argparse.Namespace, system: systems.System) -> None:
    """Run bead dynamics at constant volume and compare g(r) with that of the atoms."""
    force_field = ForceField.from_model(load_model(args.model))
    box = np.asarray(system.box)
    beads = all_beads(system)
    blocks = [radial_distribution(part, box) for part in np.array_split(beads, BLOCKS)]
    reference = np.mean(blocks, axis=0)
    error = np.std(blocks, axis=0, ddof=1).max() / np.sqrt(BLOCKS)
    print(f"reference: peak {reference.max():.3f}, standard error at most {error:.3f}")
    dynamics = BatchedLangevin(
        force_field,
        timestep_fs=args.timestep,
        friction_per_ps=1.0,
        seed=args.seed,
        box=np.diag(box),
    )
    start, total, n, said = time.perf_counter(), 0.0, 0, 0
    for frames in dynamics.iterate(beads[:1], args.steps, 100):
        for frame in frames.beads[frames.steps > 5000]:
            total, n = total + radial_distribution(frame, box), n + 1
        if n and dynamics.n_steps // 20_000 > said:
            said = dynamics.n_steps // 20_000
            off = np.abs(total / n - reference) / reference.max()
            per_step = (time.perf_counter() - start) / dynamics.n_steps * 1e3
            at_A = (off.argmax() + 0.5) * WIDTH_A
            print(
                f"{dynamics.n_steps} steps: g(r) off by {off.max():.3f} of its peak at most, at "
                f"{at_A:.2f} Å, {per_step:.1f} ms per step",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    for work in (fit, refine, run):
        command = commands.add_parser(work.__name__)
        command.set_defaults(work=work)
        command.add_argument("name", choices=["methanol", "water"])
        command.add_argument("model")
        command.add_argument("--seed", type=int, default=0)
        if work is fit:
            command.add_argument("--steps", type=int, default=2500)
            command.add_argument("--channels", type=int, default=8)
            command.add_argument("--layers", type=int, default=1)
            command.add_argument("--radial", type=int, default=8)
            command.add_argument("--cutoff", type=float, default=8.0)
        elif work is refine:
            command.add_argument("--rounds", type=int, default=15)
        else:
            command.add_argument("--steps", type=int, default=1_000_000)
            command.add_argument("--timestep", type=float, default=5.0)
    args = parser.parse_args()
    args.work(args, systems.load(args.name))


if __name__ == "__main__":
    main()
