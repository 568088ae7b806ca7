"""The stages that explore: bead dynamics through ASE, atoms through MDAnalysis, and checks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ccg_ase.energies import bead_energies
from ccg_ase.forcefield import ForceField
from ccg_mda.bead_sources import bead_universe
from ccg_mda.flow import Backmapper
from ccg_mda.transformation import backmap

from . import evaluation
from .labelling import LabelSettings, label
from .labels import Labels
from .progress import Stage
from .reconstruction import read_samples
from .reference import write_npz
from .restrained_labels import Restraint
from .samples import Samples
from .sampling import ase_bead_dynamics
from .stages import Metrics
from .states import choose_states, committee_spread
from .workspace import Workspace


def sample_beads(workspace: Workspace, stage: Stage, k: int, folder: Path, n_steps: int) -> Metrics:
    """Run bead dynamics on the force field of iteration k, from frames drawn at random."""
    train, _ = workspace.data
    settings = workspace.config.dynamics
    rng = np.random.default_rng(workspace.seed(k, 7))
    starts = rng.choice(len(train), settings.replicas, replace=len(train) < settings.replicas)
    frames = ase_bead_dynamics(
        ForceField.from_model(workspace.model(k)),
        workspace.cg_map.apply(train.positions[starts]),
        folder / "dynamics",
        n_steps=n_steps,
        save_every=settings.save_every,
        driver=settings.driver,
        timestep_fs=settings.timestep_fs,
        friction_per_ps=settings.friction_per_ps,
        seed=int(rng.integers(2**31)),
        progress=lambda done, total, values: stage.update(
            done, total, f"{values['temperature_K']:.0f} K"
        ),
    )
    longest = evaluation.longest_bond(frames, workspace.cg_map)
    return {"frames": frames.shape[0] * frames.shape[1], "longest_bond_A": longest}


def label_states(
    workspace: Workspace, stage: Stage, k: int, restraint: Restraint | None = None
) -> Metrics:
    """Choose states worth labelling among those visited, and label them (E2, E3, E4, E7)."""
    folder, before = workspace.iteration(k), workspace.model(k - 1)
    visited = evaluation.dcd_frames(folder / "dynamics" / "beads.dcd")
    force_field = ForceField.from_model(before)
    spread = committee_spread(force_field, visited)
    if spread is None and workspace.config.cycle.uncertain:
        stage.update(note="the force field has one member: diverse states instead of uncertain")
    known = [Labels.load(workspace.iteration(i) / "labels.npz").beads for i in range(1, k)]
    chosen = _chosen(workspace, k, visited, spread, np.concatenate([visited[:0], *known]))

    def guess(beads: np.ndarray) -> np.ndarray:
        return bead_energies(force_field, beads)[1]

    flow = Backmapper.from_model(before)
    return _label(workspace, stage, k, flow, visited[chosen], restraint, guess)


def label_torsions(
    workspace: Workspace, stage: Stage, restraint: Restraint | None = None
) -> Metrics:
    """Label torsion states chosen among the frames: F(s) and -∂F/∂s (E2, E3, E4, E7)."""
    visited = workspace.cg_map.apply(workspace.data[0].positions)
    chosen = _chosen(workspace, 0, visited, None, None)
    flow = Backmapper.from_model(workspace.model(0))
    return _label(workspace, stage, 0, flow, visited[chosen], restraint, None)


def _chosen(
    workspace: Workspace,
    k: int,
    visited: np.ndarray,
    spread: np.ndarray | None,
    labelled: np.ndarray | None,
) -> np.ndarray:
    settings = workspace.config.cycle
    return choose_states(
        visited,
        min(settings.n_states, len(visited)),
        None if workspace.by_torsions else workspace.cg_map.beads,
        diverse=settings.diverse,
        uncertain=settings.uncertain,
        spread=spread,
        labelled=labelled,
        seed=workspace.seed(k, 8),
    )


def _label(
    workspace: Workspace,
    stage: Stage,
    k: int,
    flow: Backmapper,
    states: np.ndarray,
    restraint: Restraint | None,
    guess: Callable[[np.ndarray], np.ndarray] | None,
) -> Metrics:
    """Label states; write labels, buffer, and a table of all states; return figures."""
    settings, folder = workspace.config.cycle, workspace.iteration(k)
    found = label(
        flow,
        workspace.potential,
        states,
        folder / "labelling",
        LabelSettings(
            n_samples=settings.n_samples,
            gates=settings.gates,
            n_checked=settings.n_checked,
            max_calls=settings.max_calls,
            seed=workspace.seed(k, 9),
        ),
        held_out=workspace.data[1],
        restraint=restraint,
        guess=guess,
        progress=stage.update,
    )
    found.labels.save(folder / "labels.npz")
    found.buffer.save(folder / "buffer.npz")
    write_npz(folder / "states.npz", found.table)
    stage.update(note=f"{stage.note} {found.told()}".strip())
    return found.figures()


def reconstruct_ensemble(workspace: Workspace, stage: Stage) -> Metrics:
    """Reconstruct the final bead ensemble, evenly thinned, with two-level weights (E6)."""
    settings, folder, model = workspace.config.cycle, workspace.final, workspace.last_model
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


def check_held_out(workspace: Workspace, stage: Stage) -> Metrics:
    """Measure the flow at the beads of held-out frames (E1, ESS, label variance)."""
    train, held_out = workspace.data
    arrays, figures = evaluation.held_out_check(
        Backmapper.from_model(workspace.last_model),
        workspace.potential,
        train,
        held_out,
        n_states=workspace.config.cycle.n_held_out,
        n_samples=200,
        seed=workspace.seed(0, 11),
        progress=stage.update,
    )
    write_npz(workspace.final / "held_out.npz", arrays)
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
