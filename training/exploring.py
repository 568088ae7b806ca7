"""The stages that explore: bead dynamics through ASE, atoms through MDAnalysis, and checks."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ccg_ase.checkpoint import load_model
from ccg_ase.forcefield import ForceField
from ccg_ase.restart import force_field_digest
from ccg_ase.run_checks import ExplodedError
from ccg_mda.bead_sources import bead_universe
from ccg_mda.flow import Backmapper
from ccg_mda.transformation import backmap

from . import evaluation
from .exchange_sampling import exchange_bead_dynamics
from .progress import Stage
from .reconstruction import read_samples
from .reference import write_npz
from .samples import Samples
from .sampling import ase_bead_dynamics
from .stages import Metrics
from .states import choose_states
from .turn_labels import labels_of_turns
from .turning import turn_dihedrals
from .workspace import Workspace

_GENTLER = (1.0, 0.5, 0.2)  # shares of time step and heat, tried one after another


def sample_beads(workspace: Workspace, stage: Stage, k: int, folder: Path, n_steps: int) -> Metrics:
    """Run bead dynamics on the force field of turn k - 1, from all that is known so far.

    And short dynamics that turn every dihedral all round, for states behind barriers.
    """
    known = [workspace.cg_map.apply(workspace.data[0].positions)]
    if (labelled := labels_of_turns(workspace, range(1, k))) is not None:
        known.append(labelled.beads)
    states, settings = np.concatenate(known), workspace.config.dynamics

    def run(force_field: ForceField) -> Metrics:
        return _dynamics(workspace, stage, force_field, states, folder, n_steps, k)

    figures = _steady(workspace, k - 1, workspace.iteration(k - 1), folder, run)
    force_field = ForceField.from_model(workspace.model(k - 1))
    try:
        turn_dihedrals(
            force_field,
            states,
            folder / "dynamics" / "turned.dcd",
            n_replicas=settings.replicas,
            n_steps=n_steps,
            save_every=settings.save_every,
            timestep_fs=settings.timestep_fs,
            friction_per_ps=settings.friction_per_ps,
            seed=workspace.seed(k, 16),
        )
    except ExplodedError as error:  # far from all data the force field may be anything
        warnings.warn(f"no turned dihedrals in turn {k}: {error}", stacklevel=2)
        figures["turned"] = False
    return figures


def sample_final_beads(workspace: Workspace, stage: Stage, k: int) -> Metrics:
    """Run the bead dynamics that is reported, on the final force field."""
    known = workspace.cg_map.apply(workspace.data[0].positions)
    folder, n_steps = workspace.final(k), workspace.config.dynamics.n_final_steps

    def run(force_field: ForceField) -> Metrics:
        return _dynamics(workspace, stage, force_field, known, folder, n_steps, k + 1)

    return _steady(workspace, k, folder, folder, run)


def _steady(
    workspace: Workspace,
    turn: int,
    source: Path,
    folder: Path,
    run: Callable[[ForceField], Metrics],
) -> Metrics:
    """Run dynamics on the force field in `source`, or on the latest one up to `turn` that holds.

    A force field that explodes is withdrawn: one of an earlier turn takes its place in the model
    file before it runs, so that an interrupted run finds the frames of the one it goes on with.
    """
    path, exploded = source / "model.ccg", set()
    while True:
        model = load_model(path, device=workspace.device)
        force_field = ForceField.from_model(model)
        try:
            return run(force_field) | {"withdrawn": model.metrics.get("withdrawn", 0)}
        except ExplodedError as error:
            exploded.add(force_field_digest(force_field))
            earlier = (ForceField.from_model(workspace.model(k)) for k in range(turn, -1, -1))
            former = next((f for f in earlier if force_field_digest(f) not in exploded), None)
            if former is None:
                raise
            warnings.warn(
                f"the force field is withdrawn, one of an earlier turn goes on: {error}",
                stacklevel=2,
            )
        shutil.rmtree(folder / "dynamics")
        parts = {"backmapper": Backmapper.from_model(model), "force_field": former}
        workspace.save(path, parts, {"withdrawn": model.metrics.get("withdrawn", 0) + 1})


def _dynamics(
    workspace: Workspace,
    stage: Stage,
    force_field: ForceField,
    known: np.ndarray,
    folder: Path,
    n_steps: int,
    turn: int,
) -> Metrics:
    """Start replicas at states as diverse as those that are known, and run them.

    A force field that has seen too little may explode; it is tried again, with less and less heat.
    """
    settings, seed = workspace.config.dynamics, workspace.seed(turn, 7)
    starts = choose_states(
        known,
        min(settings.replicas, len(known)),
        workspace.cg_map.beads,
        diverse=0.5,
        seed=seed,
    )
    beads = known[np.random.default_rng(seed).permutation(np.resize(starts, settings.replicas))]
    for gentler in _GENTLER:
        try:
            frames, figures = _run(
                workspace, stage, force_field, beads, folder, n_steps, seed, gentler
            )
            break
        except ExplodedError as error:
            if gentler == _GENTLER[-1]:
                raise
            warnings.warn(
                f"bead dynamics is repeated with a shorter time step and less heat: {error}",
                stacklevel=2,
            )
    longest = evaluation.longest_bond(frames, workspace.cg_map)
    return figures | {
        "frames": frames.shape[0] * frames.shape[1],
        "longest_bond_A": longest,
        "exploded": _GENTLER.index(gentler),
    }


def _run(
    workspace: Workspace,
    stage: Stage,
    force_field: ForceField,
    beads: np.ndarray,
    folder: Path,
    n_steps: int,
    seed: int,
    gentler: float,
) -> tuple[np.ndarray, Metrics]:
    """Run the driver with so much of the time step, and of the heat above the model's temperature.

    Chunks of gentler runs lie in a folder of their own, what they lead to in the usual place.
    """
    settings = workspace.config.dynamics
    common = {
        "n_steps": n_steps,
        "save_every": settings.save_every,
        "timestep_fs": gentler * settings.timestep_fs,
        "friction_per_ps": settings.friction_per_ps,
        "seed": seed,
    }
    usual = folder / "dynamics"
    own, found = usual if gentler == 1 else usual / f"gentler_{gentler:g}", {}
    if settings.driver == "replica-exchange":
        T = force_field.temperature_K
        frames, acceptance = exchange_bead_dynamics(
            force_field,
            beads,
            own,
            hot_temperature_K=T + gentler * (settings.hot_temperature_K - T),
            n_rungs=settings.rungs,
            exchange_every=settings.exchange_every,
            progress=stage.update,
            **common,
        )
        found["exchange_acceptance"] = float(np.nanmin(acceptance))
    else:
        frames = ase_bead_dynamics(
            force_field,
            beads,
            own,
            driver=settings.driver,
            progress=lambda done, total, values: stage.update(
                done, total, f"{values['temperature_K']:.0f} K"
            ),
            **common,
        )
    if own != usual:
        for file in own.glob("*.dcd"):
            file.replace(usual / file.name)
    return frames, found


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
