"""The stages that fit the flow, from what the run directory holds."""

from __future__ import annotations

import copy
import time
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from ccg_ase.checkpoint import load_model
from ccg_ase.energies import bead_energies
from ccg_ase.forcefield import ForceField
from ccg_mda.flow import Backmapper

from .buffer import Buffer
from .describe import held_coordinates
from .estimators import typical
from .fit_flow import (
    LIKELIHOOD_ONLY,
    FlowFrames,
    FlowLoss,
    ProgressCallback,
    fit_flow,
    frame_nll,
    mean_nll,
    without_free_energy,
)
from .progress import Stage
from .reconstruction import in_own_frame
from .reference import ReferenceData
from .stages import Metrics
from .torsion_surface import FreeEnergy
from .turn_labels import surface_of_turns
from .workspace import Workspace

_LOST_NATS = 0.2  # of ln q of held-out frames, on average, that a fit to forces may cost
MOST_NATS = 5.0  # that a single frame counts
_SHARE_OF_TIME = 0.1  # of the budget in wall time that one fit may take
_TRIAL_STEPS = 4


def fit_likelihood(workspace: Workspace, stage: Stage) -> Metrics:
    """Fit a new flow to the frames by forward KL."""
    train, held_out = workspace.data
    settings = workspace.config.flow
    positions = torch.from_numpy(train.positions)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(workspace.seed(0, 1))
        flow = Backmapper.from_data(
            workspace.cg_map,
            workspace.temperature_K,
            positions,
            width=settings.width,
            n_layers=settings.n_layers,
            hops=settings.hops,
            bead_hops=settings.bead_hops,
            channels=settings.channels,
            around_A=settings.around_A,
            families=settings.families,
            defensive=settings.defensive,
        ).to(workspace.device)
    batch = 2 * settings.batch_size
    frames = FlowFrames(train.positions, np.ones(len(train)))
    steps = max(1, settings.likelihood_epochs * len(train) // batch)
    how = {"terms": LIKELIHOOD_ONLY, "batch_size": batch, "seed": workspace.seed(0, 2)}
    how["learning_rate"] = settings.learning_rate
    fit = fit_flow(
        flow,
        frames,
        steps=_in_time(workspace, stage, flow, frames, steps, how),
        **how,
        clip=5.0,
        held_out=FlowFrames(held_out.positions, np.ones(len(held_out))),
        patience=settings.patience,
        progress=show_terms(stage),
    )
    workspace.save(workspace.iteration(0) / "likelihood.ccg", {"backmapper": flow})
    held = held_coordinates(flow.config, flow.cg_map)
    return {"nll": mean_nll(flow, held_out.positions), "held": held, "fit": str(fit)}


def fit_coordinates(workspace: Workspace, stage: Stage) -> Metrics:
    """Fit the flow to forces along internal coordinates: cheap, and without a force field."""
    folder, steps = workspace.iteration(0), workspace.config.flow.coordinate_steps
    flow = Backmapper.load(folder / "likelihood.ccg", device=workspace.device)
    terms = FlowLoss.named("coordinate_force")
    train, held_out = flow_frames(workspace, flow, 0, None)
    metrics = _fit(workspace, stage, flow, train, held_out, terms, steps, 0, 12)
    workspace.save(folder / "flow.ccg", {"backmapper": flow})
    return metrics


def fit_forces(workspace: Workspace, stage: Stage, k: int) -> Metrics:
    """Fit the flow to forces: on frames, and after the first iteration on its own samples.

    Terms that need F(s) are left out as long as nothing is known of it: over torsions, before the
    first labels.
    """
    folder, settings = workspace.iteration(k), workspace.config.flow
    last = folder / "flow.ccg" if k == 0 else workspace.iteration(k - 1) / "model.ccg"
    flow = Backmapper.load(last, device=workspace.device)
    known = free_energy_now(workspace, k)
    train, held_out = flow_frames(workspace, flow, k, known)
    terms = FlowLoss.named(settings.loss)
    if known is None:
        terms = without_free_energy(terms)
    steps = settings.refit_steps if k else settings.force_steps
    metrics = _fit(workspace, stage, flow, train, held_out, terms, steps, k, 3)
    parts: dict[str, nn.Module] = {"backmapper": flow}
    if not k and not workspace.by_torsions:
        stored = load_model(folder / "force_field.ccg", device=workspace.device)
        parts["force_field"] = ForceField.from_model(stored)
    workspace.save(folder / ("flow.ccg" if k else "model.ccg"), parts)
    return metrics


def free_energy_now(workspace: Workspace, k: int) -> FreeEnergy | None:
    """Return what is known of F(s) once turn k has its labels; None over torsions without any.

    Beads: the force field before the turn, which has a common scale for all frames.
    """
    if workspace.by_torsions:
        return surface_of_turns(workspace, range(1, k + 1))
    file = ("force_field.ccg", 0) if k == 0 else ("model.ccg", k - 1)
    stored = load_model(workspace.iteration(file[1]) / file[0], device=workspace.device)
    return partial(bead_energies, ForceField.from_model(stored))


def flow_frames(
    workspace: Workspace, flow: Backmapper, k: int, known: FreeEnergy | None
) -> tuple[FlowFrames, FlowFrames]:
    """Return what the flow of turn k learns from and is judged by: stored frames, own samples.

    A tenth of the states of every turn is held out, the same ones in all later turns.

    Parameters
    ----------
    workspace, flow
        The run, and the flow that is to see the frames.
    k
        The turn.
    known
        F(s) and its slope for the frames, if anything is known of them.
    """
    train, held_out = (_frames_of(workspace, flow, data, known) for data in workspace.data)
    for i in range(1, k + 1):
        buffer = Buffer.load(workspace.iteration(i) / "buffer.npz")
        if not len(buffer):
            continue
        own = _as_frames(workspace, flow, buffer, known)
        kept_back = buffer.state % 10 == 0
        if kept_back.any() and len(held_out) > kept_back.sum():
            # Stored frames alone would stop the fit as soon as it learns anything new.
            held_out = held_out[:: len(held_out) // int(kept_back.sum())]
        train, held_out = train.joined(own[~kept_back]), held_out.joined(own[kept_back])
    return train, held_out


def _frames_of(
    workspace: Workspace, flow: Backmapper, data: ReferenceData, known: FreeEnergy | None
) -> FlowFrames:
    """Return stored frames as the flow sees them."""
    positions, forces, energy = data.positions, data.forces, data.energy
    free_energy = force = None
    if known is not None:
        free_energy, force = known(workspace.cg_map.apply(positions))
    if workspace.by_torsions:
        positions, forces = in_own_frame(flow, positions, forces)
    return FlowFrames(positions, np.ones(len(positions)), forces, energy, force, free_energy)


def _as_frames(
    workspace: Workspace, flow: Backmapper, buffer: Buffer, known: FreeEnergy | None
) -> FlowFrames:
    """Turn the buffer into frames to fit the flow to.

    The bead force and free energy at a state are what its samples say, not the model of F: these
    states were chosen where it may be wrong. Free energies get the model's zero; where they aren't
    known, the model's own is all there is.
    """
    positions, forces, free_energy, force = buffer.positions, buffer.forces, None, None
    if workspace.by_torsions:
        positions, forces = in_own_frame(flow, positions, forces)
    if known is not None:
        modelled, _ = known(buffer.beads)
        labelled = np.isfinite(buffer.free_energy)
        shift = typical(modelled[labelled] - buffer.free_energy[labelled]) if labelled.any() else 0
        free_energy = np.where(labelled, buffer.free_energy + shift, modelled)
        force = buffer.bead_force
    return FlowFrames(positions, buffer.weight, forces, buffer.energy, force, free_energy)


def _fit(
    workspace: Workspace,
    stage: Stage,
    flow: Backmapper,
    train: FlowFrames,
    judged: FlowFrames,
    terms: FlowLoss,
    steps: int,
    *seed: int,
) -> Metrics:
    """Fit by the terms of a loss, at full learning rate along coordinates, else at half of it.

    A fit that moves the flow away from the frames is undone: the mean of ln p - ln q over held-out
    frames is KL(p|q), but for a constant. Where the flow can't follow the forces everywhere, these
    may decide for the shape of stiff bonds against the place of atoms.
    """
    settings = workspace.config.flow
    if not steps:
        return {}
    held_out = workspace.data[1].positions
    nll, weights = frame_nll(flow, held_out), copy.deepcopy(flow.state_dict())
    how = {"terms": terms, "batch_size": settings.batch_size, "seed": workspace.seed(*seed)}
    how["learning_rate"] = settings.learning_rate / (1 if terms.coordinate_force else 2)
    fit = fit_flow(
        flow,
        train,
        steps=_in_time(workspace, stage, flow, train, steps, how),
        **how,
        held_out=judged,
        patience=settings.patience,
        progress=show_terms(stage),
    )
    after, told = frame_nll(flow, held_out), str(fit)
    lost = float(np.clip(after - nll, -MOST_NATS, MOST_NATS).mean())
    if lost > _LOST_NATS:
        flow.load_state_dict(weights)
        told += f"; undone, since held-out frames lost {lost:.2f} nats of ln q"
        after = nll
    return {"loss": fit.history[-1], "fit": told, "nll": float(after.mean())}


def _in_time(
    workspace: Workspace,
    stage: Stage,
    flow: Backmapper,
    frames: FlowFrames,
    steps: int,
    how: dict[str, Any],
) -> int:
    """Return the steps of a fit that a tenth of the budget in wall time allows.

    The learning rate of a fit follows from its number of steps, so it's found beforehand, from a
    few steps of a copy.
    """
    hours = workspace.config.stop.max_hours
    if hours is None:
        return steps
    copied, began = copy.deepcopy(flow), []
    for n in (1, 1 + _TRIAL_STEPS):  # the first step of a fit takes longer
        began.append(time.perf_counter())
        fit_flow(copied, frames, steps=n, **how)
    per_step = (time.perf_counter() - 2 * began[1] + began[0]) / _TRIAL_STEPS
    allowed = max(1, int(_SHARE_OF_TIME * 3600 * hours / max(per_step, 1e-6)))
    if allowed < steps:
        stage.update(note=f"{allowed} of {steps} steps: a tenth of max_hours")
    return min(steps, allowed)


def show_terms(stage: Stage) -> ProgressCallback:
    """Return a callback that shows the terms of a flow's loss."""

    def show(step: int, steps: int, values: dict[str, float]) -> None:
        stage.update(step, steps, " ".join(f"{k} {v:.3g}" for k, v in values.items()))

    return show
