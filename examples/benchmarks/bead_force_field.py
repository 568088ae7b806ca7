"""Accuracy of the bead force field: alanine dipeptide in five beads.

    export CCG_DATA=... CCG_RUNS=...                           # see systems.py and simulate.py
    python backmapping.py alanine_slices --frames 20000        # the flow, on the first 2 ns
    python bead_force_field.py labels FLOW.ccg                 # its labels, on 5 ns
    python bead_force_field.py flow FLOW.npz --seeds 0 1 2     # fit, bead dynamics, (φ, ψ)
    python bead_force_field.py sizes FLOW.npz                  # accuracy against speed
    python bead_force_field.py water --rounds 10               # explicit water, forces only

Every divergence is printed with the floor that two draws of the reference have. Seconds are of the
process (one core). Figures of the last release: README.md.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import simulate
import systems
import torch
from bead_ensembles import Dynamics, measure
from explicit_water import KCAL_PER_MOL, load_water, noise_by_neighbours

from ccg_ase.checkpoint import save_model
from ccg_ase.energies import bead_energies
from ccg_ase.evaluator import Evaluator
from ccg_ase.forcefield import ForceField
from ccg_ase.mapping import CGMap
from ccg_ase.units import thermal_energy
from ccg_mda.flow import Backmapper
from ccg_training.estimators import label_variance
from ccg_training.fit_forcefield import FitSettings, fit_force_field
from ccg_training.labels import Labels
from ccg_training.langevin_sampler import LangevinSampler
from ccg_training.reconstruction import pull_back_frames, reconstruct
from ccg_training.reference_beads import ReferenceBeads
from ccg_training.relative_entropy import RelativeEntropySettings, minimise_relative_entropy

KT = thermal_energy(300.0)
SIZES = (  # what differs from the defaults
    {},
    {"n_radial": 4},
    {"channels": 8},
    {"n_layers": 1},
    {"l_max": 0},
    {"channels": 32},
    {"n_radial": 16},
    {"l_max": 2},
    {"channels": 4},
)


def pulled_back(
    system: systems.System, flow: Backmapper, time_ps: float, n_labels: int, seed: int
) -> Labels:
    """Label frames of the first `time_ps` of all walkers together: force and free energy each.

    Their variances are those of 60 states, 50 samples each.
    """
    walkers = len(np.unique(system.data.walker))
    data = system.data[system.data.time_ps <= time_ps / walkers + 1e-6]
    rng = np.random.default_rng(seed)
    states = system.cg_map.apply(data.positions[rng.choice(len(data), 60, replace=False)])
    samples = reconstruct(flow, system.potential, states, 50, rng)
    variance = label_variance(samples.log_weight, samples.labels).mean()
    log_variance = samples.log_weight.var(axis=1).mean()
    parts = []
    chosen = np.linspace(0, len(data) - 1, n_labels).astype(int)
    for piece in np.array_split(chosen, max(1, n_labels // 1000)):
        frames = pull_back_frames(
            flow, data.positions[piece], data.energy[piece], data.forces[piece]
        )
        every = np.ones(len(piece))
        parts.append(
            Labels(
                frames.beads,
                frames.labels[:, 0],
                variance * every,
                -KT * frames.log_weight[:, 0],
                KT**2 * log_variance * every,
            )
        )
    return Labels.concatenate(*parts)


def fit(
    cg_map: CGMap,
    labels: Labels,
    beads: np.ndarray,
    settings: FitSettings,
    share: float = 0.1,
    **options: Any,
) -> tuple[ForceField, dict[str, float]]:
    """Fit a force field whose prior is that of `beads`; a share of the labels judges."""
    torch.manual_seed(settings.seed)
    force_field = ForceField.from_data(cg_map, 300.0, beads, **options)
    start = time.process_time()
    found = fit_force_field(force_field, *labels.split(share, seed=settings.seed), settings)
    return force_field, found | {"fit_s": time.process_time() - start}


def microseconds(force_field: ForceField, beads: np.ndarray, *, compiled: bool) -> float:
    """CPU time of an evaluation in µs per frame, many frames in one batch, float32."""
    evaluate = Evaluator(force_field, len(beads), compiled=compiled)
    x = torch.from_numpy(beads)
    evaluate(x)
    times = []
    for _ in range(5):
        start = time.process_time()
        for _ in range(5):
            evaluate(x)
        times.append((time.process_time() - start) / 5)
    return 1e6 * min(times) / len(beads)


def show(found: dict) -> None:
    print(
        json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in found.items()}),
        flush=True,
    )


# ----------------------------------------------------------------------------------- commands


def labels(args: argparse.Namespace) -> None:
    """Pull labels back and store them."""
    system, start = systems.load("alanine_slices"), time.process_time()
    made = pulled_back(system, Backmapper.load(args.file), args.time_ps, args.labels, 0)
    made.save(Path(args.file).with_suffix(".npz"))
    show({
        "labels": len(made),
        "force_noise_eV_A": float(np.sqrt(made.force_variance[0])),
        "free_energy_noise_kT": float(np.sqrt(made.free_energy_variance[0]) / KT),
        "label_s": time.process_time() - start,
    })  # fmt: skip


def flow(args: argparse.Namespace) -> None:
    """Bead dynamics of force fields fitted to labels, against the 80 ns."""
    system, known = systems.load("alanine_slices"), Labels.load(args.file)
    reference = system.cg_map.apply(system.held_out.positions)
    for seed in args.seeds:
        settings = FitSettings(steps=args.steps, learning_rate=args.rate, seed=seed)
        force_field, found = fit(
            system.cg_map, known, known.beads, settings, channels=args.channels
        )
        name = Path(args.file).with_name(f"beads_{args.channels}_{args.steps}_{seed}.ccg")
        parts = {"force_field": force_field}
        save_model(name, cg_map=system.cg_map, temperature_K=300.0, parts=parts)
        show({"seed": seed, "channels": args.channels, **found})
        dynamics = Dynamics(steps=args.dynamics_steps, timestep_fs=args.timestep_fs)
        start = time.process_time()
        found = measure(force_field, reference, known.beads, dynamics, size=args.frames, seed=seed)
        show({"seed": seed, **found, "dynamics_s": time.process_time() - start})


def sizes(args: argparse.Namespace) -> None:
    """Errors on held-out labels, and time per frame, against the size of the network."""
    cg_map, known = systems.load("alanine_slices").cg_map, Labels.load(args.file)
    beads = known.beads[:: len(known) // 256][:256]
    for size in SIZES:
        for seed in args.seeds:
            settings = FitSettings(steps=args.steps, learning_rate=args.rate, seed=seed)
            force_field, found = fit(cg_map, known, known.beads, settings, **size)
            excess = found["free_energy_rmse_kT"] ** 2 - found["free_energy_noise_kT"] ** 2
            row = {
                "size": size,
                "seed": seed,
                "parameters": sum(p.numel() for p in force_field.members.parameters()),
                "force_error_eV_A": found["force_error"],
                "free_energy_error_kT": float(np.sqrt(max(excess, 0.0))),
                "fit_s": found["fit_s"],
                "eager_us": microseconds(force_field, beads, compiled=False),
            }
            if args.compiled:
                row["compiled_us"] = microseconds(force_field, beads, compiled=True)
            show(row)


def water(args: argparse.Namespace) -> None:
    """Force matching on plain forces in explicit water, and its bead dynamics.

    The loss of a model can't go below the noise. That is bounded from above by the loss on frames
    held out, and estimated from pairs of like frames, by the prior's residuals (the prior has seen
    no force) and by the model's.
    """
    cg_map, beads, forces = load_water(simulate.folder(None, "CCG_DATA"))
    every = (forces**2).mean((-1, -2))
    known = Labels(beads, forces, np.full(len(beads), 0.9 * every.mean()))
    for seed in args.seeds:
        settings = FitSettings(
            steps=args.steps, learning_rate=args.rate, seed=seed, evaluate_every=50, patience=6
        )
        options = {"channels": args.channels, "terms": args.prior}
        force_field, found = fit(cg_map, known, beads, settings, 0.2, **options)
        _, held_out = known.split(0.2, seed=seed)
        untrained = ForceField(cg_map, 300.0, force_field.prior, channels=1)
        of_prior, of_model = (
            part.force - bead_energies(model, part.beads)[1]
            for model, part in ((untrained, known), (force_field, held_out))
        )
        rng = np.random.default_rng(seed)
        rows = {
            "no model": (held_out.force**2).mean(),
            "prior": (of_prior**2).mean(),
            "prior and network, held out": (of_model**2).mean(),
        }
        for name, value in rows.items():
            print(f"{name}: {value / KCAL_PER_MOL**2:.2f} (kcal/mol/Å)²")
        for name, part, left in (("prior", known, of_prior), ("model", held_out, of_model)):
            noise, error = noise_by_neighbours(part.beads, left, rng)
            print(f"noise by neighbours, residuals of the {name}: {noise / KCAL_PER_MOL**2:.2f} ± "
                  f"{error / KCAL_PER_MOL**2:.2f} (kcal/mol/Å)²")  # fmt: skip
        show({"seed": seed, "best_step": found["best_step"], "fit_s": found["fit_s"]})
        dynamics = Dynamics(steps=args.dynamics_steps, timestep_fs=args.timestep_fs)
        show(measure(force_field, beads, beads, dynamics, size=len(beads) // 2, seed=seed))
        if args.rounds:
            start = time.process_time()
            gain = minimise_relative_entropy(
                force_field,
                *ReferenceBeads(beads).split(0.3),
                LangevinSampler(3000, 25, 1000, args.timestep_fs),
                RelativeEntropySettings(rounds=args.rounds, seed=seed),
                progress=lambda done, rounds, values: show({"round": done, **values}),
            )
            show({**gain, "relative_entropy_s": time.process_time() - start})
            show(measure(force_field, beads, beads, dynamics, size=len(beads) // 2, seed=seed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["labels", "flow", "sizes", "water"])
    parser.add_argument("file", nargs="?", help="labels: the flow; flow, sizes: the labels")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--time-ps", type=float, default=5000.0)
    parser.add_argument("--labels", type=int, default=25_000)
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--dynamics-steps", type=int, default=20_000)
    parser.add_argument("--timestep-fs", type=float, default=4.0)
    parser.add_argument("--frames", type=int, default=50_000)
    parser.add_argument("--prior", nargs="+", default=["bonds", "angles", "volumes"])
    parser.add_argument("--rounds", type=int, default=0, help="water: of relative entropy, then")
    parser.add_argument("--compiled", action="store_true", help="time compiled code, too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    {"labels": labels, "flow": flow, "sizes": sizes, "water": water}[args.command](args)


if __name__ == "__main__":
    main()
