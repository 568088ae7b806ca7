"""Measure a trained alanine dipeptide model against long molecular dynamics.

    python alanine_dipeptide.py reference ref.npz --time-ns 80        # 40 min on two cores
    python alanine_dipeptide.py flow RUN/model.ccg ref.npz            # fresh frames, not the run's
    python alanine_dipeptide.py ensemble RUN/model.ccg ref.npz        # (φ, ψ), F(φ), two-level ESS
    python alanine_dipeptide.py stability RUN/model.ccg ref.npz --driver Langevin --steps 1000000

The reference frames are independent of those that a run was trained on: another seed. Every number
is printed with the sample sizes and, for divergences, the finite-sample floor. Figures of the last
release are recorded in README.md beside this script.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from ccg_ase import ForceField, load_model
from ccg_ase.units import thermal_energy
from ccg_mda import Backmapper, backmap, bead_universe
from ccg_mda.potential import OpenMMPotential
from ccg_mda.weights import effective_sample_size
from ccg_training import evaluation, metrics
from ccg_training.generate import generate
from ccg_training.reconstruction import read_samples
from ccg_training.reference import ReferenceData
from ccg_training.sampling import ase_bead_dynamics

HERE = Path(__file__).parent.parent / "alanine_dipeptide"
PDB = HERE / "alanine_dipeptide.pdb"
KT = thermal_energy(300.0)


def potential() -> OpenMMPotential:
    return OpenMMPotential.from_pdb(PDB, ["amber96.xml", "amber96_obc.xml"])


def bead_run(args: argparse.Namespace, force_field: ForceField, starts: np.ndarray) -> np.ndarray:
    """Run replicas under an ASE driver; with --directory, an interrupted run continues."""
    frames = ase_bead_dynamics(
        force_field,
        starts,
        args.directory or tempfile.mkdtemp(),
        n_steps=args.steps,
        save_every=args.save_every,
        driver=args.driver,
        seed=args.seed,
        progress=lambda done, total, values: print(
            f"\r{done} of {total} steps, {values['temperature_K']:.0f} K", end="", flush=True
        ),
    )
    print()
    return frames


def reference(args: argparse.Namespace) -> None:
    from MDAnalysis import Universe

    data = generate(
        potential(),
        Universe(str(PDB)).atoms.positions,
        300.0,
        Path(args.file).with_suffix(".chunks"),
        time_ns=args.time_ns,
        save_every_fs=400.0,
        seed=20261122,
        tick=lambda done, total: print(f"\r{done} of {total} frames", end="", flush=True),
    )
    data.save(args.file)


def flow(args: argparse.Namespace) -> None:
    """Effective sample size and label variance at states of the long run."""
    model = Backmapper.load(args.model)
    data = ReferenceData.load(args.file)
    train, fresh = data.split(0.1)
    _, figures = evaluation.held_out_check(
        model,
        potential(),
        train,
        fresh,
        n_states=args.states,
        n_samples=200,
        seed=1,
        progress=lambda done, total: None,
    )
    for name, value in figures.items():
        print(f"{name:24s} {value:.4g}")


def ensemble(args: argparse.Namespace) -> None:
    """Bead dynamics against the long run: (φ, ψ), then F(φ) of the reweighted atoms."""
    loaded = load_model(args.model)
    force_field, cg_map = ForceField.from_model(loaded), loaded.cg_map
    backmapper = Backmapper.from_model(loaded)
    data = ReferenceData.load(args.file)
    known = cg_map.apply(data.positions)
    rng = np.random.default_rng(args.seed)
    starts = known[rng.choice(len(known), args.replicas, replace=False)]
    frames = bead_run(args, force_field, starts)
    frames = frames[len(frames) // 10 :]
    visited = frames.reshape(-1, cg_map.n_beads, 3)
    of_known = evaluation.torsions(known, cg_map)
    of_visited = evaluation.torsions(visited, cg_map)
    p, q = metrics.torsion_histogram(of_known), metrics.torsion_histogram(of_visited)
    print(f"reference: {len(known)} frames; bead dynamics: {len(visited)} frames, 64 x 64 bins")
    print(f"Jensen-Shannon divergence of (phi, psi): {metrics.jensen_shannon(p, q):.5f} nats")
    floor = metrics.jensen_shannon_floor(p, len(known), len(visited), rng=rng)
    print(f"finite-sample floor, frames independent: {floor:.5f} nats")

    chosen = np.linspace(0, len(visited) - 1, min(args.states, len(visited))).astype(int)
    beads = bead_universe(visited[chosen], cg_map)
    atoms = backmap(beads, backmapper, n_samples=args.samples, potential=potential(), prefetch=256)
    samples = read_samples(atoms, backmapper, args.samples)
    levels = evaluation.two_levels(samples, force_field)
    per_state = effective_sample_size(samples.log_weight, axis=1)
    print(f"two-level effective sample size: beads {levels.ess_beads:.3f}, atoms "
          f"{levels.ess_atoms:.3f}, product {levels.ess:.3f}; per state "
          f"{per_state.mean():.3f}")  # fmt: skip
    phi = evaluation.torsions(samples.beads, cg_map)[:, 0]
    edges = np.linspace(-np.pi, np.pi, 37)
    counts = np.histogram(of_known[:, 0], edges)[0]
    raw = np.histogram(of_visited[:, 0], edges)[0]
    weights = np.exp(levels.log_bead_weights - levels.log_bead_weights.max())
    weighted = np.histogram(phi, edges, weights=weights)[0]
    with np.errstate(divide="ignore"):
        f_reference = -np.log(counts / counts.sum())
        f_beads = -np.log(raw / raw.sum())
        f_weighted = -np.log(weighted / weighted.sum())
    low = f_reference - f_reference.min() < 6
    f_reference -= f_reference.min()
    # One constant for all bins: the mean difference over the populated region, by population.
    for name, f in (("bead dynamics", f_beads), ("reweighted", f_weighted)):
        both = low & np.isfinite(f)  # a bin never visited counts as an infinite error below
        f -= np.average(f[both] - f_reference[both], weights=counts[both])
        print(f"F(phi) below 6 kT, {name}: largest error {np.abs(f - f_reference)[low].max():.2f} "
              f"kT, rms {np.sqrt(((f - f_reference)[low] ** 2).mean()):.2f} kT")  # fmt: skip
    print("phi/deg  reference  beads  reweighted (kT)   frames")
    for k in np.flatnonzero(counts):
        print(f"{np.degrees(edges[k]) + 5:6.0f} {f_reference[k]:9.2f} {f_beads[k]:8.2f} "
              f"{f_weighted[k]:8.2f} {counts[k]:12d}")  # fmt: skip


def stability(args: argparse.Namespace) -> None:
    """Twenty replicas from twenty different frames: longest bond over the whole run."""
    loaded = load_model(args.model)
    force_field, cg_map = ForceField.from_model(loaded), loaded.cg_map
    known = cg_map.apply(ReferenceData.load(args.file).positions)
    starts = known[np.linspace(0, len(known) - 1, 20).astype(int)]
    frames = bead_run(args, force_field, starts)
    longest, in_reference = (evaluation.longest_bond(x, cg_map) for x in (frames, known))
    print(f"{args.driver}: {args.steps} steps x 20 replicas, finite: {np.isfinite(frames).all()}")
    print(f"longest bond {longest:.3f} A (reference frames: {in_reference:.3f} A)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    for work in (reference, flow, ensemble, stability):
        command = commands.add_parser(work.__name__)
        command.set_defaults(work=work)
        if work is reference:
            command.add_argument("file")
            command.add_argument("--time-ns", type=float, default=80.0)
            continue
        command.add_argument("model")
        command.add_argument("file")
        command.add_argument("--states", type=int, default=200 if work is flow else 20_000)
        command.add_argument("--samples", type=int, default=4)
        command.add_argument("--driver", default="LangevinBAOAB")
        command.add_argument("--replicas", type=int, default=24)
        command.add_argument("--steps", type=int, default=150_000)
        command.add_argument("--save-every", type=int, default=50)
        command.add_argument("--seed", type=int, default=1)
        command.add_argument("--directory")
    args = parser.parse_args()
    args.work(args)


if __name__ == "__main__":
    main()
