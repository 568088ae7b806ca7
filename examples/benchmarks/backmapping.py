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
import openmm
import simulate
import systems
import torch
from scipy.spatial.transform import Rotation

from ccg_ase.checkpoint import save_model
from ccg_ase.forcefield import ForceField
from ccg_ase.prior import Prior
from ccg_ase.torsion_map import TorsionMap
from ccg_ase.units import thermal_energy
from ccg_mda.diagnostics import diagnose
from ccg_mda.flow import Backmapper
from ccg_mda.structure import StructureReference
from ccg_mda.weights import effective_sample_size, log_mean_exp
from ccg_training import evaluation
from ccg_training.estimators import label_variance, to_kJ_per_mol
from ccg_training.evaluation import bead_energies
from ccg_training.fit_flow import (
    LIKELIHOOD_ONLY,
    FlowFrames,
    FlowLoss,
    fit_flow,
    without_free_energy,
)
from ccg_training.fit_forcefield import FitSettings, fit_force_field
from ccg_training.labels import Labels
from ccg_training.reconstruction import in_own_frame, pull_back_frames, reconstruct
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


PHI_PSI = ((4, 6, 8, 14), (6, 8, 14, 16))  # atoms of alanine dipeptide
RECIPES = {
    # Forces make it worse here: they decide for the shape of stiff bonds against where atoms lie.
    "alanine_com": Recipe(likelihood_steps=2500, force_steps=0),
    "ethane": Recipe(likelihood_steps=600, coordinate_steps=400, force_steps=200),
    "chignolin": Recipe(
        likelihood_steps=1500,
        coordinate_steps=400,
        force_steps=20,
        batch_size=64,
        early_stopping=True,
        n_labels=2000,
        architecture={"width": 64, "n_layers": 3, "hops": 6},
    ),
    "adenylate_kinase": Recipe(
        likelihood_steps=600,
        batch_size=4,
        architecture={"width": 16, "hops": 3, "channels": 2},
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
    flow = Backmapper.from_data(m, kelvin, torch.from_numpy(data.positions), **recipe.architecture)
    parts = data.split(0.1) if recipe.early_stopping else (data,)
    frames = [FlowFrames(part.positions, np.ones(len(part))) for part in parts]

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
    prior = Prior.fit(beads, m.beads, kelvin)
    force_field = ForceField(m, kelvin, prior, channels=8, reference_beads=beads[0])
    labels = Labels(labelled.beads, force, variance)
    fit_force_field(force_field, *labels.split(seed=seed), FitSettings(steps=500, seed=seed))
    return force_field


def improve(
    system: systems.System, flow: Backmapper, data: ReferenceData, calls: int, seed: int
) -> None:
    """Fit the flow to short restrained dynamics in each (φ, ψ) bin that has hardly any frames."""
    rng = np.random.default_rng(seed)
    known = FlowFrames(data.positions, np.ones(len(data)), data.forces)
    found = restrained_frames(system, flow, data, calls, rng)
    few = known[rng.choice(len(known), min(len(known), 30_000), replace=False)]
    # The bead force field knows nothing of these states: no term that needs it.
    for loss, steps, rate in (("coordinate_force", 600, 1.5e-3), ("forces", 100, 5e-4)):
        fit_flow(
            flow,
            few.joined(found),
            terms=without_free_energy(FlowLoss.named(loss)),
            steps=steps,
            batch_size=256,
            learning_rate=rate,
            seed=seed + 1,
            progress=show,
        )


def restrained_frames(
    system: systems.System,
    flow: Backmapper,
    data: ReferenceData,
    calls: int,
    rng: np.random.Generator,
    n_start: int = 32,
    n_frames: int = 40,
) -> FlowFrames:
    """Run dynamics with (φ, ψ) held near one state of every thin bin; stored forces are unbiased.

    A bias in s leaves p(x|s) as it is, which is all that the flow learns.
    """
    states, angles = thin_states(system, data, rng)
    n_steps = calls // len(states) - n_start - n_frames
    run = n_steps * 2 // 3 // n_frames
    biased = system.potential.system
    force = openmm.CustomTorsionForce("0.5*k*min(d, 2*pi-d)^2; d=abs(theta-t0); pi=3.14159265")
    force.addGlobalParameter("k", 100.0)
    force.addPerTorsionParameter("t0")
    for row in PHI_PSI:
        force.addTorsion(*row, [0.0])
    biased.addForce(force)
    integrator = openmm.LangevinMiddleIntegrator(system.temperature_K, 5.0, 0.001)
    integrator.setRandomNumberSeed(int(rng.integers(2**31)))
    platform = openmm.Platform.getPlatformByName("Reference")
    context = openmm.Context(biased, integrator, platform)
    kept = []
    for beads, target in zip(states, angles, strict=True):
        with torch.no_grad():
            start = flow(torch.from_numpy(beads[None])).rsample((n_start,), rng)[:, 0].numpy()
        lowest = np.nanargmin(system.potential(start)[0])
        for k, row in enumerate(PHI_PSI):
            force.setTorsionParameters(k, *row, [float(target[k])])
        force.updateParametersInContext(context)
        context.setPositions(start[lowest] / 10.0)
        context.setVelocitiesToTemperature(system.temperature_K, int(rng.integers(2**31)))
        integrator.step(n_steps - n_frames * run)
        for _ in range(n_frames):
            integrator.step(run)
            state = context.getState(positions=True).getPositions(asNumpy=True)
            kept.append(state._value * 10.0)
    positions = np.array(kept)
    energy, forces = system.potential(positions)
    sound = np.abs(energy - np.median(energy)) < 3.0  # eV: a start that dynamics couldn't relax
    spent = len(states) * (n_start + n_steps + n_frames)
    print(f"    {len(states)} thin bins, {sound.sum()} frames, {spent} calls", flush=True)
    return FlowFrames(positions[sound], np.ones(sound.sum()), forces[sound])


def thin_states(
    system: systems.System, data: ReferenceData, rng: np.random.Generator, width: float = 20.0
) -> tuple[np.ndarray, np.ndarray]:
    """Turn stored beads to a random (φ, ψ) in every bin with fewer than ten frames."""
    phi_psi = TorsionMap(system.cg_map.atoms, PHI_PSI)
    place = np.floor(np.degrees(phi_psi.apply(data.positions)) / width).astype(int)
    half = round(180.0 / width)
    count = np.zeros((2 * half, 2 * half), dtype=int)
    np.add.at(count, tuple(place.T + half), 1)
    beads = system.cg_map.apply(data.positions)
    beads = beads[rng.integers(len(beads), size=100 * count.size)]
    for axis, moved in (((1, 2), 0), ((2, 3), 4)):
        a, b = (beads[:, k] for k in axis)
        turn = Rotation.from_rotvec(rng.uniform(-np.pi, np.pi, (len(beads), 1)) * unit(b - a))
        beads[:, moved] = a + turn.apply(beads[:, moved] - a)
    angles = evaluation.torsions(beads, system.cg_map)[:, :2]
    bin_of = np.floor(np.degrees(angles) / width).astype(int) + half
    thin = np.flatnonzero(count[tuple(bin_of.T)] < 10)
    _, first = np.unique(bin_of[thin], axis=0, return_index=True)
    return beads[thin[first]], angles[thin[first]]


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def show(step: int, steps: int, values: dict[str, float]) -> None:
    if step % max(1, steps // 10) == 0:
        text = " ".join(f"{name} {value:.4g}" for name, value in values.items())
        print(f"    {time.process_time():.0f} s {step}/{steps} {text}", flush=True)


def measure(
    system: systems.System, flow: Backmapper, states: np.ndarray, n_samples: int, seed: int
) -> dict[str, float]:
    """Effective sample size and label variance at the states of given frames."""
    coarse = system.cg_map.apply(system.held_out.positions[states])
    rng = np.random.default_rng(seed)
    ess, variance, slices = [], [], []
    for piece in np.array_split(coarse, max(1, len(coarse) // 5)):
        samples = reconstruct(flow, system.potential, piece, n_samples, rng)
        ess.append(effective_sample_size(samples.log_weight, axis=1))
        variance.append(label_variance(samples.log_weight, samples.labels))
        if getattr(system.cg_map, "kind", "") == "slice":
            slices.append(label_variance(samples.log_weight, samples.slice_labels))
    ess = np.concatenate(ess)
    found = {"ess": ess.mean(), "ess_median": np.median(ess), "ess_p5": np.percentile(ess, 5)}
    if slices:
        found["label_variance"] = to_kJ_per_mol(np.concatenate(variance).mean())
        found["variance_ratio"] = np.concatenate(slices).mean() / np.concatenate(variance).mean()
    return {name: float(value) for name, value in found.items()}


def bond_profile(
    system: systems.System, flow: Backmapper, n_samples: int, seed: int
) -> dict[str, float]:
    """Compare F(r) of two beads from ln Z(s) with the histogram of all frames, in kT."""
    frames = np.concatenate([system.data.positions, system.held_out.positions])
    r = np.linalg.norm(np.diff(system.cg_map.apply(frames), axis=1)[:, 0], axis=-1)
    count, edges = np.histogram(r, 8, range=np.percentile(r, [5.0, 95.0]))
    fine = edges[0] + (np.arange(32) + 0.5) * (edges[-1] - edges[0]) / 32  # four in each bin
    beads = np.zeros((len(fine), 2, 3))
    beads[:, 1] = fine[:, None] * unit(np.array([1.0, 2.0, 3.0]))
    samples = reconstruct(flow, system.potential, beads, n_samples, np.random.default_rng(seed))
    log_z, _ = log_mean_exp(samples.log_weight, axis=1)
    density = np.exp(log_z - log_z.max()) * fine**2
    found = -np.log(density.reshape(len(count), 4).mean(1)) + np.log(count)
    found -= np.average(found, weights=count)
    # Frames are 0.1 ps apart and nearly independent in r: the counting error is a lower bound.
    return {
        "profile_max_kT": float(np.abs(found).max()),
        "profile_rms_kT": float(np.sqrt(np.mean(found**2))),
        "profile_counting_error_kT": float((1.0 / np.sqrt(count)).max()),
        "profile_chi2": float((found**2 * count).sum() / (len(count) - 1)),
    }


def bins(system: systems.System, rng: np.random.Generator, width: float) -> np.ndarray:
    """Return one random held-out frame of each populated bin of (φ, ψ)."""
    phi_psi = TorsionMap(system.cg_map.atoms, PHI_PSI)
    angles = np.floor(np.degrees(phi_psi.apply(system.held_out.positions)) / width).astype(int)
    shuffled = rng.permutation(len(angles))
    _, first = np.unique(angles[shuffled], axis=0, return_index=True)
    return shuffled[first]


def inspect(
    system: systems.System, flow: Backmapper, n_states: int, n_samples: int
) -> dict[str, float]:
    """Check the structure of unweighted samples against held-out frames."""
    box = None if system.box is None else np.r_[system.box, 90.0, 90.0, 90.0]
    frames = system.held_out.positions
    reference = StructureReference.from_frames(system.cg_map.atoms, frames, box)
    found = diagnose(
        flow, frames, None, n_states, n_samples, reference=reference, box=box, batch_size=64
    )
    for row in (*found.structure.rows(), *found.coverage.rows()[:12]):
        print("    " + "  ".join(map(str, row)))
    figures = found.structure.summary() | found.coverage.summary()
    for bond in ("C-N", "CA-C", "C-O"):
        if bond in found.structure.bond_types:
            figures[f"sd_ratio_{bond}"] = found.structure.spread_of(bond)
    if system.potential is not None:
        coarse = system.cg_map.apply(frames[:: max(1, len(frames) // n_states)])
        x = flow(torch.from_numpy(coarse)).rsample(rng=np.random.default_rng(0)).detach()
        kt = thermal_energy(system.temperature_K)
        figures["median_energy_above_md_kT"] = (
            float(np.median(system.potential(x.numpy())[0]) - np.median(system.held_out.energy))
            / kt
        )
    return figures


def figures(
    system: systems.System, flow: Backmapper, args: argparse.Namespace, seed: int
) -> dict[str, float]:
    """Measure all that a system allows; the same states for the same seed."""
    rng = np.random.default_rng(seed)
    found = {}
    if system.potential is not None:
        chosen = rng.choice(len(system.held_out), args.states, replace=False)
        found |= measure(system, flow, chosen, args.samples, seed)
    if system.cg_map.coarse_shape == (2, 3):
        found |= bond_profile(system, flow, args.samples, seed)
    if not system.name.startswith("alanine"):
        return found | inspect(system, flow, min(args.states, len(system.held_out)), 10)
    each = bins(system, rng, 20.0)
    of_bins = measure(system, flow, each, args.samples // 2, seed)
    return found | {f"bins_{k}": v for k, v in of_bins.items()} | {"bins": len(each)}


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
            improve(system, flow, data, args.rare, seed)
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
