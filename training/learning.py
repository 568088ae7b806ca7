"""The stages that learn: flow and force field, from what the run directory holds."""

from __future__ import annotations

import copy

import numpy as np
import torch

from ccg_ase.checkpoint import load_model
from ccg_ase.energies import bead_energies
from ccg_ase.forcefield import ForceField
from ccg_ase.units import thermal_energy
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
from .fit_forcefield import FitSettings, fit_force_field
from .labels import FRAME, Labels
from .langevin_sampler import LangevinSampler
from .progress import Stage
from .reconstruction import in_own_frame, pull_back_frames
from .reference import MDANALYSIS_FORCE, ReferenceData, read_npz
from .reference_beads import ReferenceBeads
from .relative_entropy import RelativeEntropySettings, minimise_relative_entropy
from .stages import Metrics
from .workspace import Workspace

_LOST_NATS = 0.2  # of ln q of held-out frames, on average, that a fit to forces may cost
_MOST_NATS = 5.0  # that a single frame counts


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
        )
    batch = 2 * settings.batch_size
    frames = FlowFrames(train.positions, np.ones(len(train)))
    fit = fit_flow(
        flow,
        frames,
        terms=LIKELIHOOD_ONLY,
        steps=max(1, settings.likelihood_epochs * len(train) // batch),
        batch_size=batch,
        learning_rate=settings.learning_rate,
        seed=workspace.seed(0, 2),
        clip=5.0,
        held_out=FlowFrames(held_out.positions, np.ones(len(held_out))),
        patience=settings.patience,
        progress=_show_terms(stage),
    )
    workspace.save(workspace.iteration(0) / "likelihood.ccg", {"backmapper": flow})
    held = held_coordinates(flow.config, flow.cg_map)
    return {"nll": mean_nll(flow, held_out.positions), "held": held, "fit": str(fit)}


def fit_coordinates(workspace: Workspace, stage: Stage) -> Metrics:
    """Fit the flow to forces along internal coordinates: cheap, and without a force field."""
    folder, steps = workspace.iteration(0), workspace.config.flow.coordinate_steps
    flow = Backmapper.load(folder / "likelihood.ccg")
    terms = FlowLoss.named("coordinate_force")
    train, held_out = _with_forces(workspace, flow)
    metrics = _fit(workspace, stage, flow, train, held_out, terms, steps, 0, 12)
    workspace.save(folder / "flow.ccg", {"backmapper": flow})
    return metrics


def fit_forces_by_torsions(workspace: Workspace, stage: Stage) -> Metrics:
    """Fit the flow to forces where torsions are the coarse variables.

    There is no force field over torsions, hence no term that needs F(s).
    """
    folder, settings = workspace.iteration(0), workspace.config.flow
    flow = Backmapper.load(folder / "flow.ccg")
    terms = without_free_energy(FlowLoss.named(settings.loss))
    train, held_out = _with_forces(workspace, flow)
    metrics = _fit(workspace, stage, flow, train, held_out, terms, settings.force_steps, 0, 3)
    workspace.save(folder / "model.ccg", {"backmapper": flow})
    return metrics


def fit_forces(workspace: Workspace, stage: Stage, k: int) -> Metrics:
    """Fit the flow to forces: on frames, and after the first iteration on its own samples."""
    folder, settings = workspace.iteration(k), workspace.config.flow
    if k == 0:
        flow = Backmapper.load(folder / "flow.ccg")
        force_field = ForceField.from_model(load_model(folder / "force_field.ccg"))
    else:
        before = workspace.model(k - 1)
        flow, force_field = Backmapper.from_model(before), ForceField.from_model(before)
    train, held_out = (_with_bead_forces(data, force_field) for data in workspace.data)
    if k:
        own, state = _as_frames(Buffer.load(folder / "buffer.npz"), force_field)
        kept_back = state % 10 == 0
        train = train.joined(own[~kept_back])
        if kept_back.any():
            # Stored frames alone would stop the fit as soon as it learns anything new.
            thinned = held_out[:: max(1, len(held_out) // int(kept_back.sum()))]
            held_out = thinned.joined(own[kept_back])
    steps = settings.refit_steps if k else settings.force_steps
    terms = FlowLoss.named(settings.loss)
    metrics = _fit(workspace, stage, flow, train, held_out, terms, steps, k, 3)
    if k:
        workspace.save(folder / "flow.ccg", {"backmapper": flow})
    else:
        workspace.save(folder / "model.ccg", {"backmapper": flow, "force_field": force_field})
    return metrics


def _with_forces(workspace: Workspace, flow: Backmapper) -> list[FlowFrames]:
    """Return training and held-out frames with their forces, as the flow sees them."""
    frames = []
    for data in workspace.data:
        positions, forces = data.positions, data.forces
        if workspace.by_torsions:
            positions, forces = in_own_frame(flow, positions, forces)
        frames.append(FlowFrames(positions, np.ones(len(positions)), forces))
    return frames


def _with_bead_forces(data: ReferenceData, force_field: ForceField) -> FlowFrames:
    energy, force = bead_energies(force_field, force_field.cg_map.apply(data.positions))
    return FlowFrames(data.positions, np.ones(len(data)), data.forces, data.energy, force, energy)


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
    fit = fit_flow(
        flow,
        train,
        terms=terms,
        steps=steps,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate / (1 if terms.coordinate_force else 2),
        seed=workspace.seed(*seed),
        held_out=judged,
        patience=settings.patience,
        progress=_show_terms(stage),
    )
    after, told = frame_nll(flow, held_out), str(fit)
    lost = float(np.clip(after - nll, -_MOST_NATS, _MOST_NATS).mean())
    if lost > _LOST_NATS:
        flow.load_state_dict(weights)
        told += f"; undone, since held-out frames lost {lost:.2f} nats of ln q"
        after = nll
    return {"loss": fit.history[-1], "fit": told, "nll": float(after.mean())}


def label_frames(workspace: Workspace, stage: Stage, k: int) -> Metrics:
    """Label stored frames (E3b): no weights and no energy calls."""
    train, _ = workspace.data
    chosen = np.unique(
        np.linspace(0, len(train) - 1, workspace.config.cycle.n_frame_labels).astype(int)
    )
    last = "model.ccg" if workspace.by_torsions else "flow.ccg"
    flow = Backmapper.load(workspace.iteration(k) / last)
    force_variance, log_weight_variance = _scatter(workspace, k)
    kt = thermal_energy(workspace.temperature_K)
    parts = []
    for piece in np.array_split(chosen, max(1, len(chosen) // 2000)):
        frames = pull_back_frames(
            flow, train.positions[piece], train.energy[piece], train.forces[piece]
        )
        every = np.ones(len(piece))
        # At q = p the log-weight of a single frame is ln Z(s): a free energy, with its scatter.
        single = -kt * frames.log_weight[:, 0]
        parts.append(
            Labels(
                frames.beads,
                frames.labels[:, 0],
                force_variance * every,
                single,
                kt**2 * log_weight_variance * every,
                origin=FRAME,
            )
        )
        stage.update(sum(map(len, parts)), len(chosen))
    labels = Labels.concatenate(*parts)
    labels.save(workspace.iteration(k) / "frame_labels.npz")
    return {"labels": len(labels)}


def _scatter(workspace: Workspace, k: int) -> tuple[float, float]:
    """Variance at fixed s of a single label, (eV/Å)² or (eV/rad)², and of a log-weight."""
    if k or workspace.by_torsions:
        table = read_npz(workspace.iteration(k) / "states.npz")
        force, spread = (typical(table[n]) for n in ("label_variance", "log_weight_variance"))
        if np.isfinite([force, spread]).all():
            return force, spread
    # Not measured; typical before the last fit (flow_recipe.md, run L5): on the safe side.
    return 60.0 * MDANALYSIS_FORCE**2, 0.5


def refit_force_field(workspace: Workspace, stage: Stage, k: int) -> Metrics:
    """Fit the force field to all labels so far, by inverse variance."""
    train, _ = workspace.data
    settings, folder = workspace.config.force_field, workspace.iteration(k)
    if k == 0:
        beads = workspace.cg_map.apply(train.positions)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(workspace.seed(0, 4))
            force_field = ForceField.from_data(
                workspace.cg_map,
                workspace.temperature_K,
                beads,
                terms=settings.prior,
                dihedral_order=settings.dihedral_order,
                n_members=settings.members,
                channels=settings.channels,
                l_max=settings.l_max,
                n_layers=settings.n_layers,
                cutoff_A=settings.cutoff_A,
            )
    else:
        force_field = ForceField.from_model(workspace.model(k - 1))
    labels = Labels.load(folder / "frame_labels.npz")
    for i in range(1, k + 1):
        labels = Labels.concatenate(labels, Labels.load(workspace.iteration(i) / "labels.npz"))
    result = fit_force_field(
        force_field,
        *labels.split(seed=workspace.seed(k, 5)),
        FitSettings(
            steps=settings.steps if k == 0 else settings.refit_steps,
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate / (2 if k else 1),
            seed=workspace.seed(k, 6),
        ),
        progress=lambda step, steps, values: stage.update(
            step,
            steps,
            f"loss {values['loss']:.4g}, noise in it {values['loss_noise']:.4g}, "
            f"force error {values['force_error']:.4f} eV/Å",
        ),
    )
    if k == workspace.config.cycle.iterations and settings.relative_entropy_rounds:
        result |= _minimise_relative_entropy(workspace, stage, force_field)
    if k:
        parts = {"backmapper": Backmapper.load(folder / "flow.ccg"), "force_field": force_field}
        workspace.save(folder / "model.ccg", parts)
    else:
        workspace.save(folder / "force_field.ccg", {"force_field": force_field})
    return {"labels": len(labels)} | result


def _minimise_relative_entropy(
    workspace: Workspace, stage: Stage, force_field: ForceField
) -> Metrics:
    """Bring the bead ensemble to that of the frames, where held-out ones agree that it gains."""
    settings, dynamics = workspace.config.force_field, workspace.config.dynamics
    reference, held_out = (
        ReferenceBeads(workspace.cg_map.apply(data.positions)) for data in workspace.data
    )
    sample = LangevinSampler(
        n_steps=dynamics.n_steps,
        every=dynamics.save_every,
        equilibration=dynamics.n_steps // 4,
        timestep_fs=dynamics.timestep_fs,
        friction_per_ps=dynamics.friction_per_ps,
    )
    found = minimise_relative_entropy(
        force_field,
        reference,
        held_out,
        sample,
        RelativeEntropySettings(
            rounds=settings.relative_entropy_rounds,
            n_replicas=dynamics.replicas,
            seed=workspace.seed(workspace.config.cycle.iterations, 7),
        ),
        progress=lambda done, rounds, values: stage.update(
            done,
            rounds,
            f"relative entropy fell by {values['gain_nats']:.3f} ± {values['gain_error']:.3f} nats",
        ),
    )
    return {f"relative_entropy_{name}": value for name, value in found.items()}


def _as_frames(buffer: Buffer, force_field: ForceField) -> tuple[FlowFrames, np.ndarray]:
    """Turn the buffer into frames to fit the flow to; and their states.

    The bead force and free energy at a state are what its samples say, not the force field: these
    states were chosen where it may be wrong. Free energies get the force field's zero; where they
    aren't known, the force field's own is all there is.
    """
    modelled, _ = bead_energies(force_field, buffer.beads) if len(buffer) else (np.zeros(0), None)
    known = np.isfinite(buffer.free_energy)
    shift = typical(modelled[known] - buffer.free_energy[known]) if known.any() else 0.0
    frames = FlowFrames(
        buffer.positions,
        buffer.weight,
        buffer.forces,
        buffer.energy,
        buffer.bead_force,
        np.where(known, buffer.free_energy + shift, modelled),
    )
    return frames, buffer.state


def _show_terms(stage: Stage) -> ProgressCallback:
    def show(step: int, steps: int, values: dict[str, float]) -> None:
        stage.update(step, steps, " ".join(f"{k} {v:.3g}" for k, v in values.items()))

    return show
