"""The stage that labels new states: which ones, and how where plain weights can't be trusted."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from ccg_ase.energies import bead_energies, prior_energies
from ccg_ase.forcefield import ForceField
from ccg_ase.units import thermal_energy
from ccg_mda.flow import Backmapper

from . import evaluation
from .buffer import Buffer
from .labelling import LabelSettings, label
from .plain_forces import plain_forces
from .progress import Stage
from .reference import write_npz
from .restrained import RestrainedFrames, restrained_frames
from .restrained_labels import Restraint
from .stages import Metrics
from .states import beyond, choose_states, committee_spread
from .system import openmm_potential_of
from .torsion_surface import FreeEnergy, TorsionSurface
from .turn_labels import labels_of_turns, surface_of_turns
from .workspace import Workspace

_STATES_PER_PROCESS = 16  # restrained states for which a process of their own pays
_CANDIDATES = 4000  # torsions among which those worth a label are sought


def label_states(workspace: Workspace, stage: Stage, k: int, max_calls: int | None) -> Metrics:
    """Choose states worth labelling in turn k, and label them (E2, E3, E4, E7).

    Writes labels, the buffer of frames, and a table of all states that were tried.

    Parameters
    ----------
    workspace, stage, k
        The run, where progress is shown, the turn.
    max_calls
        Energy calls that are left to it; None: no limit.
    """
    settings, folder = workspace.config.cycle, workspace.iteration(k)
    before = workspace.model(k - 1)
    flow = Backmapper.from_model(before)
    known: FreeEnergy | None  # what was known of F(s): nothing over torsions without a label of F
    if workspace.by_torsions:
        known = surface_of_turns(workspace, range(1, k))
        states = _torsion_states(workspace, k, known)
    else:
        force_field = ForceField.from_model(before)
        known = partial(bead_energies, force_field)
        states = _states(workspace, stage, k, force_field)
    limits = [limit for limit in (max_calls, settings.max_calls_per_turn) if limit is not None]
    found = label(
        flow,
        workspace.potential,
        states,
        folder / "labelling",
        LabelSettings(
            n_samples=settings.n_samples,
            gates=settings.gates,
            n_checked=settings.n_checked,
            max_calls=min(limits, default=None),
            seed=workspace.seed(k, 9),
        ),
        held_out=workspace.data[1],
        restraint=_restraint(workspace, k, flow),
        guess=None if known is None else lambda s: known(s)[1],
        progress=stage.update,
    )
    found.labels.save(folder / "labels.npz")
    found.buffer.save(folder / "buffer.npz")
    write_npz(folder / "states.npz", found.table)
    stage.update(note=f"{stage.note} {found.told()}".strip())
    return found.figures()


def _states(workspace: Workspace, stage: Stage, k: int, force_field: ForceField) -> np.ndarray:
    """Choose among the bead states that dynamics led to, with hotter rungs and turned dihedrals.

    Of these, such as lie too high above the ensemble are left out, but for a few that are far from
    all that the force field was taught: a basin that it takes for a hill would never be found
    otherwise.
    """
    settings, folder = workspace.config.cycle, workspace.iteration(k) / "dynamics"
    ensemble, *others = (
        evaluation.dcd_frames(path)
        for path in (folder / name for name in ("beads.dcd", "hot.dcd", "turned.dcd"))
        if path.exists()
    )
    frames, topology = np.concatenate([ensemble, *others]), workspace.cg_map.beads
    limit = settings.highest_kT * thermal_energy(workspace.temperature_K)
    low, allowed = (
        energy <= np.median(energy[: len(ensemble)]) + limit
        for energy in (bead_energies(force_field, frames)[0], prior_energies(force_field, frames))
    )
    low[: len(ensemble)] = True
    visited, labelled = frames[low], labels_of_turns(workspace, range(1, k))
    spread = committee_spread(force_field, visited)
    if spread is None and settings.uncertain:
        stage.update(note="the force field has one member: diverse states instead of uncertain")
    known = [workspace.cg_map.apply(workspace.data[0].positions)]
    if labelled is not None:
        known.append(labelled.beads)
    unknown = frames[~low & allowed]
    unknown = unknown[beyond(unknown, ensemble, np.concatenate(known), topology)]
    n_states = min(settings.n_states, len(visited))
    n_unknown = min(round(settings.unknown * n_states), len(unknown), n_states - 1)
    chosen = choose_states(
        visited,
        n_states - n_unknown,
        topology,
        diverse=settings.diverse,
        uncertain=settings.uncertain,
        spread=spread,
        labelled=None if labelled is None else labelled.beads,
        seed=workspace.seed(k, 8),
    )
    if not n_unknown:
        return visited[chosen]
    stage.update(note=f"{stage.note} {n_unknown} states far from all known ones".strip())
    known.append(visited[chosen])
    far = choose_states(unknown, n_unknown, topology, diverse=1.0, labelled=np.concatenate(known))
    return np.concatenate([visited[chosen], unknown[far]])


def _torsion_states(workspace: Workspace, k: int, known: TorsionSurface | None) -> np.ndarray:
    """Choose torsions: anywhere, since no dynamics has to lead there.

    Without a surface yet, some of the frames. Later, as few of the frames as [cycle] wants by
    population, and for the rest those where a label tells most about F.
    """
    settings, seed = workspace.config.cycle, workspace.seed(k, 8)
    visited = workspace.cg_map.apply(workspace.data[0].positions)
    n_states = min(settings.n_states, len(visited))
    elsewhere = settings.diverse + settings.uncertain
    n_new = round(elsewhere * n_states) if known is not None else 0
    chosen = (
        choose_states(
            visited,
            n_states - n_new,
            None,
            diverse=0.0 if n_new else elsewhere,
            seed=seed,
        )
        if n_new < n_states
        else []
    )
    if not n_new:
        return visited[chosen]
    rng = np.random.default_rng(seed)
    candidates = rng.uniform(-np.pi, np.pi, (_CANDIDATES, visited.shape[1]))
    new = known.most_uncertain(candidates, n_new, settings.highest_kT)
    return np.concatenate([visited[chosen], candidates[new]])


def _restraint(workspace: Workspace, k: int, flow: Backmapper) -> Restraint | None:
    """Return restrained dynamics from all frames before turn k; None where none are wanted."""
    settings, reference = workspace.config.cycle, workspace.config.reference
    if not settings.restrained_ps:
        return None
    potential = openmm_potential_of(workspace.config)
    steps, every, steering = (
        round(time_fs / reference.timestep_fs)
        for time_fs in (
            1e3 * settings.restrained_ps,
            settings.restrained_every_fs,
            1e3 * settings.steering_ps,
        )
    )

    def run(targets: np.ndarray, starts: np.ndarray, folder: Path, seed: int) -> RestrainedFrames:
        return restrained_frames(
            potential,
            workspace.cg_map,
            targets,
            starts,
            workspace.temperature_K,
            folder,
            n_steps=steps - steps % every,
            save_every=every,
            steering_steps=steering,
            equilibration_steps=steering,
            timestep_fs=reference.timestep_fs,
            workers=min(reference.walkers, max(1, len(targets) // _STATES_PER_PROCESS)),
            seed=seed,
        )

    calls = 2 * steering + steps + steps // every
    frames = [workspace.data[0].positions]
    frames += [Buffer.load(workspace.iteration(i) / "buffer.npz").positions for i in range(1, k)]
    force_map = plain_forces(flow, workspace.data[0].forces)
    return Restraint(run, calls, np.concatenate(frames), force_map)
