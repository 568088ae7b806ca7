"""Train the backmapping flow on a benchmark system and measure it on frames held out.

    export CCG_DATA=... CCG_RUNS=...                       # see systems.py and simulate.py
    python backmapping.py alanine_slices --seeds 0 1 2      # train, measure, print; 3 seeds
    python backmapping.py alanine_slices --frames 20000
    python backmapping.py alanine_torsions
    python backmapping.py alanine_slices --rare 100000      # then 1e5 calls at states of all bins

Training uses stored frames only, with their forces where there are any. Seconds are of the process
(one core), so that a busy machine doesn't change them. Figures of the last release: README.md.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, field, replace

import numpy as np
import simulate
import systems
import torch
from measures import PHI_PSI, figures
from rare_states import improve

from ccg_ase.checkpoint import save_model
from ccg_ase.energies import bead_energies
from ccg_ase.forcefield import ForceField
from ccg_ase.torsion_map import TorsionMap
from ccg_mda.flow import Backmapper
from ccg_training.fit_flow import (
    LIKELIHOOD_ONLY,
    FlowFrames,
    FlowLoss,
    fit_flow,
    without_free_energy,
)
from ccg_training.fit_forcefield import FitSettings, fit_force_field
from ccg_training.labels import Labels
from ccg_training.reconstruction import in_own_frame, pull_back_frames
from ccg_training.reference import ReferenceData


@dataclass(frozen=True)
class Recipe:
    """How long each stage of training is, and the architecture."""

    likelihood_steps: int = 700
    coordinate_steps: int = 1000
    force_steps: int = 500
    force_rate: float = 1e-3
    batch_size: int = 256
    early_stopping: bool = False
    n_labels: int = 10_000
    architecture: dict = field(default_factory=lambda: {"width": 64, "n_layers": 3, "hops": 4})


RECIPES = {
    # Forces make it worse here: they decide for the shape of stiff bonds against where atoms lie.
    "alanine_com": Recipe(likelihood_steps=2500, force_steps=0),
    "ethane": Recipe(likelihood_steps=600, coordinate_steps=400, force_steps=200),
    "chignolin": Recipe(
        likelihood_steps=600,
        force_steps=0,
        batch_size=64,
        early_stopping=True,
        architecture={"width": 32, "n_layers": 2, "hops": 3},
    ),
    **dict.fromkeys(
        simulate.BOXES,
        Recipe(likelihood_steps=300, force_steps=0, batch_size=4, architecture={"width": 32}),
    ),
    "adenylate_kinase": Recipe(
        likelihood_steps=200,
        batch_size=2,
        early_stopping=True,
        architecture={"width": 16, "hops": 3, "bead_hops": 4, "channels": 2},
    ),
}


def load(name: str) -> systems.System:
    """Load a benchmark system; alanine dipeptide by its torsions φ and ψ is made here."""
    if name != "alanine_torsions":
        return systems.load(name)
    system = systems.load("alanine_slices")
    atoms = system.cg_map.atoms
    phi_psi = TorsionMap(atoms, PHI_PSI, ("phi", "psi"))
    return replace(system, name=name, cg_map=phi_psi)


def train(
    system: systems.System, data: ReferenceData, recipe: Recipe, seed: int
) -> tuple[Backmapper, ForceField | None]:
    """Fit by likelihood, by forces along coordinates, then by all terms with a bead force field."""
    m, kelvin = system.cg_map, system.temperature_K
    torch.manual_seed(seed)
    box = None if system.box is None else torch.diag(torch.as_tensor(system.box))
    positions = torch.from_numpy(data.positions)
    flow = Backmapper.from_data(m, kelvin, positions, box=box, **recipe.architecture)
    parts = data.split(0.1) if recipe.early_stopping else (data,)
    frames = [
        FlowFrames(
            part.positions,
            np.ones(len(part)),
            box=None if box is None else np.tile(box.numpy(), (len(part), 1, 1)),
        )
        for part in parts
    ]

    def fit(terms: FlowLoss, steps: int, batch_size: int, rate: float, clip: float = 1.0) -> None:
        done = fit_flow(
            flow,
            frames[0],
            terms=terms,
            steps=steps,
            batch_size=batch_size,
            learning_rate=rate,
            seed=seed + batch_size + steps,
            clip=clip,
            held_out=frames[1] if len(frames) > 1 else None,
            progress=show,
        )
        print(f"    {done}", flush=True)

    fit(LIKELIHOOD_ONLY, recipe.likelihood_steps, 2 * recipe.batch_size, 2e-3, clip=5.0)
    if data.forces is None or not recipe.force_steps:
        return flow, None
    for k, part in enumerate(parts):
        positions, forces = part.positions, part.forces
        if isinstance(m, TorsionMap):
            positions, forces = in_own_frame(flow, positions, forces)
        frames[k] = replace(frames[k], positions=positions, forces=forces)
    if recipe.coordinate_steps:
        along = FlowLoss.named("coordinate_force")
        fit(along, recipe.coordinate_steps, recipe.batch_size, 2e-3)
    terms, force_field = FlowLoss(), None
    if isinstance(m, TorsionMap):
        terms = without_free_energy(terms)
    else:
        force_field = fit_beads(flow, parts[0], recipe, seed)
        for k, part in enumerate(parts):
            free_energy, force = bead_energies(force_field, m.apply(part.positions))
            frames[k] = replace(
                frames[k], energy=part.energy, bead_force=force, free_energy=free_energy
            )
    fit(terms, recipe.force_steps, recipe.batch_size, recipe.force_rate)
    return flow, force_field


def fit_beads(flow: Backmapper, data: ReferenceData, recipe: Recipe, seed: int) -> ForceField:
    """Fit a bead force field to the mean-force labels of stored frames."""
    m, kelvin = flow.cg_map, flow.temperature_K
    beads = m.apply(data.positions)
    some = data[np.linspace(0, len(data) - 1, min(recipe.n_labels, len(data))).astype(int)]
    labelled = pull_back_frames(flow, some.positions, some.energy, some.forces)
    force = labelled.labels[:, 0]
    variance = np.full(len(some), np.median(np.var(force, axis=0)))
    force_field = ForceField.from_data(m, kelvin, beads, channels=8)
    labels = Labels(labelled.beads, force, variance)
    fit_force_field(force_field, *labels.split(seed=seed), FitSettings(steps=500, seed=seed))
    return force_field


def show(step: int, steps: int, values: dict[str, float]) -> None:
    if step % max(1, steps // 10) == 0:
        text = " ".join(f"{name} {value:.4g}" for name, value in values.items())
        print(f"    {time.process_time():.0f} s {step}/{steps} {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("system", help=" ".join([*systems.SYSTEMS, "alanine_torsions"]))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--frames", type=int, help="train on the first so many frames only")
    parser.add_argument("--rare", type=int, help="then so many calls, restrained")
    parser.add_argument("--states", type=int, default=100)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--set", nargs="*", default=[], help="recipe: force_steps=600 width=32")
    args = parser.parse_args()
    torch.set_num_threads(1)
    system = load(args.system)
    recipe = RECIPES.get(args.system, Recipe())
    for text in args.set:
        key, value = text.split("=")
        if hasattr(recipe, key):
            recipe = replace(recipe, **{key: type(getattr(recipe, key))(value)})
        else:
            recipe = replace(recipe, architecture={**recipe.architecture, key: int(value)})
    data = system.data if args.frames is None else system.data[: args.frames]
    folder = simulate.folder(None, "CCG_RUNS") / "models"
    folder.mkdir(exist_ok=True)
    rows = []
    for seed in args.seeds:
        start = time.process_time()
        flow, force_field = train(system, data, recipe, seed)
        found = {"train_s": time.process_time() - start}
        parts = {"backmapper": flow} | ({"force_field": force_field} if force_field else {})
        save_model(
            folder / f"{args.system}_{len(data)}_{seed}.ccg",
            cg_map=system.cg_map,
            temperature_K=system.temperature_K,
            parts=parts,
        )
        found |= figures(system, flow, args, seed)
        print(found, flush=True)
        if args.rare:
            start = time.process_time()
            improve(system, flow, data, args.rare, seed, show)
            found["improve_s"] = time.process_time() - start
            found |= {f"rare_{k}": v for k, v in figures(system, flow, args, seed).items()}
        rows.append(found)
        print(
            json.dumps({"system": args.system, "frames": len(data), "seed": seed, **found}),
            flush=True,
        )
    for name in rows[0]:
        values = np.array([row[name] for row in rows])
        print(f"{name:24s} {values.mean():10.4g} ± {values.std(ddof=min(1, len(values) - 1)):.2g}")


if __name__ == "__main__":
    main()
