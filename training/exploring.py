"""The stages that explore: bead dynamics through ASE, atoms through MDAnalysis, and checks."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ccg_ase.forcefield import ForceField
from ccg_mda.bead_sources import bead_universe
from ccg_mda.flow import Backmapper
from ccg_mda.transformation import backmap
from ccg_mda.weights import effective_sample_size

from . import evaluation
from .estimators import label_variance, thermodynamics, to_kJ_per_mol, typical
from .exchange_sampling import exchange_bead_dynamics
from .labels import Labels, accept
from .progress import Stage
from .reconstruction import read_samples, reconstruct
from .reference import write_npz
from .samples import Samples
from .sampling import ase_bead_dynamics
from .stages import Metrics
from .states import choose_states
from .workspace import Workspace


def sample_beads(workspace: Workspace, stage: Stage, k: int, folder: Path, n_steps: int) -> Metrics:
    """Run bead dynamics on the force field of turn k - 1, from all that is known so far."""
    known = [workspace.cg_map.apply(workspace.data[0].positions)]
    known += [Labels.load(workspace.iteration(i) / "labels.npz").beads for i in range(1, k)]
    force_field = ForceField.from_model(workspace.model(k - 1))
    return _dynamics(workspace, stage, force_field, np.concatenate(known), folder, n_steps, k)


def sample_final_beads(workspace: Workspace, stage: Stage, k: int) -> Metrics:
    """Run the bead dynamics that is reported, on the final force field."""
    known = workspace.cg_map.apply(workspace.data[0].positions)
    force_field = ForceField.from_model(workspace.final_model(k))
    n_steps = workspace.config.dynamics.n_final_steps
    return _dynamics(workspace, stage, force_field, known, workspace.final(k), n_steps, k + 1)


def _dynamics(
    workspace: Workspace,
    stage: Stage,
    force_field: ForceField,
    known: np.ndarray,
    folder: Path,
    n_steps: int,
    turn: int,
) -> Metrics:
    """Start replicas at states as diverse as those that are known, and run them."""
    settings, seed = workspace.config.dynamics, workspace.seed(turn, 7)
    starts = choose_states(
        known,
        min(settings.replicas, len(known)),
        workspace.cg_map.beads,
        diverse=0.5,
        seed=seed,
    )
    beads = known[np.random.default_rng(seed).permutation(np.resize(starts, settings.replicas))]
    figures: Metrics = {}
    if settings.driver == "replica-exchange":
        frames, acceptance = exchange_bead_dynamics(
            force_field,
            beads,
            folder / "dynamics",
            n_steps=n_steps,
            save_every=settings.save_every,
            hot_temperature_K=settings.hot_temperature_K,
            n_rungs=settings.rungs,
            exchange_every=settings.exchange_every,
            timestep_fs=settings.timestep_fs,
            friction_per_ps=settings.friction_per_ps,
            seed=seed,
            progress=stage.update,
        )
        figures["exchange_acceptance"] = float(np.nanmin(acceptance))
    else:
        frames = ase_bead_dynamics(
            force_field,
            beads,
            folder / "dynamics",
            n_steps=n_steps,
            save_every=settings.save_every,
            driver=settings.driver,
            timestep_fs=settings.timestep_fs,
            friction_per_ps=settings.friction_per_ps,
            seed=seed,
            progress=lambda done, total, values: stage.update(
                done, total, f"{values['temperature_K']:.0f} K"
            ),
        )
    longest = evaluation.longest_bond(frames, workspace.cg_map)
    return figures | {"frames": frames.shape[0] * frames.shape[1], "longest_bond_A": longest}


def label_states(workspace: Workspace, stage: Stage, k: int, max_calls: int | None) -> Metrics:
    """Choose states worth labelling among those visited, and label them (E2, E3a, E4)."""
    settings, folder = workspace.config.cycle, workspace.iteration(k)
    visited = evaluation.dcd_frames(folder / "dynamics" / "beads.dcd")
    affordable = len(visited) if max_calls is None else max_calls // settings.n_samples
    chosen = choose_states(
        visited,
        min(settings.n_states, len(visited), affordable),
        workspace.cg_map.beads,
        diverse=settings.diverse,
        seed=workspace.seed(k, 8),
    )
    flow = Backmapper.from_model(workspace.model(k - 1))
    samples = _atoms_of(
        workspace, stage, flow, visited[chosen], settings.n_samples, workspace.seed(k, 9)
    )
    return _write_labels(workspace, folder, samples)


def label_torsions(workspace: Workspace, stage: Stage) -> Metrics:
    """Label torsion states chosen among the frames: F(s) and -∂F/∂s (E2, E3a, E4)."""
    settings, folder = workspace.config.cycle, workspace.iteration(0)
    visited = workspace.cg_map.apply(workspace.data[0].positions)
    n_states = min(settings.n_states, len(visited))
    chosen = choose_states(
        visited, n_states, None, diverse=settings.diverse, seed=workspace.seed(0, 8)
    )
    flow = Backmapper.from_model(workspace.model(0))
    rng = np.random.default_rng(workspace.seed(0, 9))
    parts = []
    for piece in np.array_split(chosen, max(1, n_states // 10)):
        states = visited[piece]
        parts.append(reconstruct(flow, workspace.potential, states, settings.n_samples, rng))
        stage.update(sum(len(part.beads) for part in parts), n_states)
    return _write_labels(workspace, folder, Samples.concatenate(*parts))


def _write_labels(workspace: Workspace, folder: Path, samples: Samples) -> Metrics:
    """Write samples, the labels that they give, and energies and entropies; return figures."""
    settings = workspace.config.cycle
    good = accept(samples.log_weight, min_ess=settings.min_ess, max_pareto_k=settings.max_pareto_k)
    Labels.from_samples(samples, good).save(folder / "labels.npz")
    split = thermodynamics(samples.log_weight, samples.energy, workspace.temperature_K)
    parts = {"free_energy_eV": split.free_energy, "energy_eV": split.energy}
    parts["entropy_eV_per_K"] = split.entropy
    write_npz(
        folder / "thermodynamics.npz",
        {"torsions" if workspace.by_torsions else "beads": samples.beads, "accepted": good}
        | {name: part.value for name, part in parts.items()}
        | {f"{name}_error": part.error for name, part in parts.items()},
    )
    samples.save(folder / "samples.npz")
    ess = effective_sample_size(samples.log_weight, axis=1)
    variance = to_kJ_per_mol(typical(label_variance(samples.log_weight, samples.labels)))
    return {
        "calls": samples.n_calls,
        "states": len(samples.beads),
        "accepted": int(good.sum()),
        "ess_mean": float(ess.mean()),
        "ess_p5": float(np.percentile(ess, 5)),
        "label_variance_kJ2": float(variance),
    }


def reconstruct_ensemble(workspace: Workspace, stage: Stage, k: int) -> Metrics:
    """Reconstruct the final bead ensemble, evenly thinned, with two-level weights (E6)."""
    settings, folder, model = workspace.config.cycle, workspace.final(k), workspace.final_model(k)
    visited = evaluation.dcd_frames(folder / "dynamics" / "beads.dcd")
    chosen = np.linspace(0, len(visited) - 1, min(settings.n_report, len(visited))).astype(int)
    flow = Backmapper.from_model(model)
    seed = workspace.seed(0, 10)
    samples = _atoms_of(workspace, stage, flow, visited[chosen], settings.n_report_samples, seed)
    samples.save(folder / "samples.npz")
    levels = evaluation.two_levels(samples, ForceField.from_model(model))
    return {
        "calls": samples.n_calls,
        "states": len(chosen),
        "ess_states": levels.ess_beads,
        "ess_samples": levels.ess_atoms,
        "ess_two_level": levels.ess,
    }


def check_held_out(workspace: Workspace, stage: Stage, k: int) -> Metrics:
    """Measure the flow at the beads of held-out frames (E1, ESS, label variance)."""
    train, held_out = workspace.data
    arrays, figures = evaluation.held_out_check(
        Backmapper.from_model(workspace.final_model(k)),
        workspace.potential,
        train,
        held_out,
        n_states=workspace.config.cycle.n_held_out,
        n_samples=workspace.config.cycle.n_held_out_samples,
        seed=workspace.seed(0, 11),
        progress=stage.update,
    )
    write_npz(workspace.final(k) / "held_out.npz", arrays)
    return figures


def _atoms_of(
    workspace: Workspace,
    stage: Stage,
    flow: Backmapper,
    beads: np.ndarray,
    n_samples: int,
    seed: int,
) -> Samples:
    """Reconstruct bead states through the MDAnalysis Universe, and label them."""
    atoms = backmap(
        bead_universe(beads, workspace.cg_map),
        flow,
        n_samples=n_samples,
        seed=seed,
        potential=workspace.potential,
        prefetch=256,
    )
    return read_samples(atoms, flow, n_samples, progress=stage.update)
