"""Learning curve of the bead force field: slice forces, aggregated forces, pulled-back labels.

    export CCG_DATA=... CCG_RUNS=...                          # see systems.py and simulate.py
    python learning_curve.py flow 300 1000 2667               # a flow from so many frames only
    python learning_curve.py fit slices 1000 10000 80000      # also: optimal, pulled, both
    python learning_curve.py judge BEST.ccg                   # F(φ, ψ) of all of them

Frames are evenly spaced in 8 ns of alanine dipeptide, the same for all kinds; `both` is pulled-back
forces together with the free energies of single frames, which are biased by what the flow lacks.
Frames held out may end a fit. F(φ, ψ) of every force field comes from the same bead frames, those
of long dynamics of one accurate force field, reweighted: what differs between force fields then
isn't sampling. Errors are given against the 80 ns, and against that accurate force field on the
same frames, where sampling cancels.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import backmapping
import numpy as np
import simulate
import systems
import torch
from bead_ensembles import Dynamics
from bead_force_field import fit

from ccg_ase.checkpoint import load_model, save_model
from ccg_ase.energies import bead_energies
from ccg_ase.forcefield import ForceField
from ccg_ase.units import thermal_energy
from ccg_mda.flow import Backmapper
from ccg_mda.weights import effective_sample_size
from ccg_training.evaluation import torsions
from ccg_training.fit_forcefield import FitSettings
from ccg_training.force_aggregation import ForceMap
from ccg_training.labels import Labels
from ccg_training.metrics import torsion_histogram
from ccg_training.reconstruction import pull_back_frames
from ccg_training.reference import ReferenceData

KT = thermal_energy(300.0)
BINS, DEPTH_KT = 24, 4.0
# Few frames: fewer steps of the flow, ended by the frames held out.
SCALED_DOWN = replace(
    backmapping.Recipe(),
    likelihood_steps=300,
    coordinate_steps=300,
    force_steps=120,
    n_labels=1000,
    early_stopping=True,
)
# Variances at which held-out losses are of order one; all labels of a fit have the same.
FORCE_VARIANCE = {"slices": 0.8, "optimal": 0.3, "pulled": 1.5e-3, "both": 1.5e-3}  # (eV/Å)²
LOG_WEIGHT_VARIANCE = 0.25


def frames(n_frames: int) -> tuple[systems.System, ReferenceData]:
    """Return the system and so many frames, evenly spaced in all walkers."""
    system = systems.load("alanine_slices")
    chosen = np.linspace(0, len(system.data) - 1, n_frames).astype(int)
    return system, system.data[chosen]


def model_file(kind: str, n_frames: int) -> Path:
    folder = simulate.folder(None, "CCG_RUNS") / "learning_curve"
    folder.mkdir(exist_ok=True)
    return folder / f"{kind}_{n_frames}.ccg"


def flow(args: argparse.Namespace) -> None:
    """Train a flow on few frames."""
    for n_frames in map(int, args.rest):
        system, data = frames(n_frames)
        start = time.process_time()
        trained, _ = backmapping.train(system, data, SCALED_DOWN, args.seed)
        parts = {"backmapper": trained}
        save_model(
            model_file("flow", n_frames), cg_map=system.cg_map, temperature_K=300.0, parts=parts
        )
        print(f"flow of {n_frames} frames: {time.process_time() - start:.0f} s")


def make_labels(kind: str, system: systems.System, data: ReferenceData) -> Labels:
    """Make labels of one kind from frames."""
    variance = np.full(len(data), FORCE_VARIANCE[kind])
    beads = system.cg_map.apply(data.positions)
    if kind == "slices":
        return Labels(beads, ForceMap.slices(system.cg_map).apply(data.forces), variance)
    if kind == "optimal":
        least_noise = ForceMap.optimal(system.cg_map, data.forces)
        return Labels(beads, least_noise.apply(data.forces), variance)
    backmapper = Backmapper.load(model_file("flow", len(data)))
    pulled = pull_back_frames(backmapper, data.positions, data.energy, data.forces)
    if kind == "pulled":
        return Labels(beads, pulled.labels[:, 0], variance)
    single = -KT * pulled.log_weight[:, 0]
    spread = np.full(len(data), LOG_WEIGHT_VARIANCE * KT**2)
    return Labels(beads, pulled.labels[:, 0], variance, single, spread)


def fit_kind(args: argparse.Namespace) -> None:
    """Fit a force field to one kind of labels; held-out ones end the fit."""
    kind, *sizes = args.rest
    for n_frames in map(int, sizes):
        system, data = frames(n_frames)
        made = make_labels(kind, system, data)
        settings = FitSettings(
            steps=args.steps, learning_rate=4e-3, evaluate_every=50, patience=6, seed=args.seed
        )
        share = min(0.1, 2400 / n_frames)
        force_field, found = fit(system.cg_map, made, made.beads, settings, share, channels=8)
        parts = {"force_field": force_field}
        save_model(
            model_file(kind, n_frames), cg_map=system.cg_map, temperature_K=300.0, parts=parts
        )
        print(json.dumps({
            "kind": kind, "frames": n_frames, "label_rms": float(np.sqrt((made.force**2).mean())),
            "loss_rmse": found["force_rmse"], "step": found["best_step"], "fit_s": found["fit_s"],
        }), flush=True)  # fmt: skip


def free_energy_map(
    angles: np.ndarray, log_weights: np.ndarray | None, chosen: np.ndarray
) -> np.ndarray:
    """F(φ, ψ) in kT in some of the bins, zero on average over them."""
    with np.errstate(divide="ignore"):
        values = -np.log(torsion_histogram(angles, log_weights, BINS)[chosen])
    return values - values[np.isfinite(values)].mean()


def judge(args: argparse.Namespace) -> None:
    """Errors of F(φ, ψ), by reweighting the dynamics of the best force field, with the floor."""
    system = systems.load("alanine_slices")
    best = ForceField.from_model(load_model(args.rest[0]))
    known = torsions(system.cg_map.apply(system.held_out.positions), system.cg_map)
    starts = system.cg_map.apply(system.data.positions)
    visited = Dynamics(every=50).run(best, starts, args.seed)
    visited = visited.reshape(-1, *visited.shape[2:]).astype(float)
    angles = torsions(visited, system.cg_map)
    energy, of_force = bead_energies(best, visited)
    p = torsion_histogram(known, bins=BINS)
    chosen = p > p.max() * np.exp(-DEPTH_KT)
    truth, of_best = (free_energy_map(x, None, chosen) for x in (known, angles))
    halves = [free_energy_map(x, None, chosen) for x in np.array_split(known, 2)]
    print(f"{len(visited)} frames; {chosen.sum()} bins within {DEPTH_KT} kT of the most populated")
    print(f"rms over them in kT; the halves of the 80 ns: {rms(halves[0] - halves[1]):.3f}")
    print(f"the best force field, from the 80 ns: {rms(of_best - truth):.3f}")
    for path in sorted(model_file("", 0).parent.glob("*_*.ccg")):
        kind, n_frames = path.stem.split("_")
        if kind not in FORCE_VARIANCE:
            continue
        own, force = bead_energies(ForceField.from_model(load_model(path)), visited)
        log_weights = (energy - own) / KT
        found = free_energy_map(angles, log_weights, chosen)
        print(f"{kind:8s} {int(n_frames):6d} frames: {rms(found - truth):.3f} kT from the 80 ns, "
              f"{rms(found - of_best):.3f} from the best; forces {rms(force - of_force):.4f} eV/Å "
              f"(ESS {float(effective_sample_size(log_weights)):.3f})")  # fmt: skip


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values**2)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["flow", "fit", "judge"])
    parser.add_argument("rest", nargs="+", help="flow: frames; fit: kind, frames; judge: the best")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    {"flow": flow, "fit": fit_kind, "judge": judge}[args.command](args)


if __name__ == "__main__":
    main()
