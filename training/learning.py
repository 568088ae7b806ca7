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

from .describe import held_coordinates
from .estimators import free_energy, label_variance, mean_force, normalised_weights, typical
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
from .fit_joint import JointSettings, fit_joint
from .labels import Labels
from .langevin_sampler import LangevinSampler
from .progress import Stage
from .reconstruction import in_own_frame, pull_back_frames
from .reference import MDANALYSIS_FORCE, ReferenceData
from .reference_beads import ReferenceBeads
from .relative_entropy import RelativeEntropySettings, minimise_relative_entropy
from .samples import Samples
from .stages import Metrics
from .workspace import Workspace

_LOST_NATS = 0.2  # of ln q of held-out frames, on average, that a fit to forces may cost
MOST_NATS = 5.0  # that a single frame counts


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
    flow = Backmapper.load(folder / "likelihood.ccg", device=workspace.device)
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
    flow = Backmapper.load(folder / "flow.ccg", device=workspace.device)
    terms = without_free_energy(FlowLoss.named(settings.loss))
    train, held_out = _with_forces(workspace, flow)
    metrics = _fit(workspace, stage, flow, train, held_out, terms, settings.force_steps, 0, 3)
    workspace.save(folder / "model.ccg", {"backmapper": flow})
    return metrics


def fit_forces(workspace: Workspace, stage: Stage, k: int) -> Metrics:
    """Fit the flow to forces: on frames, and after the first iteration on its own samples."""
    folder, settings = workspace.iteration(k), workspace.config.flow
    if k == 0:
        flow = Backmapper.load(folder / "flow.ccg", device=workspace.device)
        stored = load_model(folder / "force_field.ccg", device=workspace.device)
        force_field = ForceField.from_model(stored)
    else:
        before = workspace.model(k - 1)
        flow, force_field = Backmapper.from_model(before), ForceField.from_model(before)
    train, held_out = flow_frames(workspace, k, force_field)
    steps = settings.refit_steps if k else settings.force_steps
    terms = FlowLoss.named(settings.loss)
    metrics = _fit(workspace, stage, flow, train, held_out, terms, steps, k, 3)
    if k:
        workspace.save(folder / "flow.ccg", {"backmapper": flow})
    else:
        workspace.save(folder / "model.ccg", {"backmapper": flow, "force_field": force_field})
    return metrics


def flow_frames(
    workspace: Workspace, k: int, force_field: ForceField
) -> tuple[FlowFrames, FlowFrames]:
    """Return what the flow of turn k learns from and is judged by: stored frames, own samples.

    A tenth of the states of every turn is held out, the same ones in all later turns.
    """
    train, held_out = (_with_bead_forces(data, force_field) for data in workspace.data)
    for i in range(1, k + 1):
        samples = Samples.load(workspace.iteration(i) / "samples.npz")
        own, state = _as_frames(samples, force_field)
        kept_back = state % 10 == 0
        train = train.joined(own[~kept_back])
        if i == 1:  # stored frames alone would stop the fit as soon as it learns anything new
            held_out = held_out[:: max(1, len(held_out) // max(1, k * kept_back.sum()))]
        held_out = held_out.joined(own[kept_back])
    return train, held_out


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
    lost = float(np.clip(after - nll, -MOST_NATS, MOST_NATS).mean())
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
    flow = Backmapper.load(workspace.iteration(k) / last, device=workspace.device)
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
            )
        )
        stage.update(sum(map(len, parts)), len(chosen))
    labels = Labels.concatenate(*parts)
    labels.save(workspace.iteration(k) / "frame_labels.npz")
    return {"labels": len(labels)}


def _scatter(workspace: Workspace, k: int) -> tuple[float, float]:
    """Variance at fixed s of a single label, (eV/Å)² or (eV/rad)², and of a log-weight."""
    if k or workspace.by_torsions:
        samples = Samples.load(workspace.iteration(k) / "samples.npz")
        force = typical(label_variance(samples.log_weight, samples.labels))
        with np.errstate(invalid="ignore"):  # a clash has the log-weight -inf
            spread = typical(samples.log_weight.var(axis=1))
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
            ).to(workspace.device)
    else:
        force_field = ForceField.from_model(workspace.model(k - 1))
    labels, held_out = force_field_labels(workspace, k)
    result = fit_force_field(
        force_field,
        labels,
        held_out,
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
    workspace.save(folder / "force_field.ccg", {"force_field": force_field})
    return {"labels": len(labels)} | result


def force_field_labels(workspace: Workspace, k: int) -> tuple[Labels, Labels]:
    """Return all labels up to turn k: those to learn from, and those to judge by.

    A tenth of the labels of every turn is held out, the same ones in all later turns.
    """
    files = [workspace.iteration(k) / "frame_labels.npz"]
    files += [workspace.iteration(i) / "labels.npz" for i in range(1, k + 1)]
    parts = [Labels.load(file) for file in files]
    split = [part.split(seed=workspace.seed(i, 5)) for i, part in enumerate(parts) if len(part) > 1]
    train, held_out = (Labels.concatenate(*side) for side in zip(*split, strict=True))
    return train, held_out


def fine_tune(workspace: Workspace, stage: Stage, k: int) -> Metrics:
    """Make the final models from those of the last turn k: by the joint residual, relative entropy.

    Either is left out where the configuration gives it no steps.
    """
    model, metrics = workspace.model(k), {}
    flow, force_field = Backmapper.from_model(model), ForceField.from_model(model)
    if workspace.config.cycle.joint_steps:
        metrics |= _fit_joint(workspace, stage, flow, force_field, k)
    if workspace.config.force_field.relative_entropy_rounds:
        metrics |= _minimise_relative_entropy(workspace, stage, force_field, k)
    parts = {"backmapper": flow, "force_field": force_field}
    workspace.save(workspace.final(k) / "model.ccg", parts)
    return metrics


def _fit_joint(
    workspace: Workspace, stage: Stage, flow: Backmapper, force_field: ForceField, k: int
) -> Metrics:
    """Fit both models to their joint residual."""
    settings = workspace.config.flow
    train, held_out = flow_frames(workspace, k, force_field)
    labels, held_out_labels = force_field_labels(workspace, k)
    result = fit_joint(
        flow,
        force_field,
        train,
        labels,
        held_out,
        held_out_labels,
        FlowLoss(),
        JointSettings(
            steps=workspace.config.cycle.joint_steps,
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate / 10,
            patience=2 * settings.patience,
            seed=workspace.seed(k, 14),
        ),
        progress=_show_terms(stage),
    )
    kept = result.before if result.worse else result.after
    changes = {
        f"{name}_{what}": getattr(result, what)[name]
        for name in kept
        for what in ("before", "after", "change", "error")
    }
    return {"fit": str(result), "nll": kept["nll"]} | changes


def _minimise_relative_entropy(
    workspace: Workspace, stage: Stage, force_field: ForceField, k: int
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
            seed=workspace.seed(k, 13),
        ),
        progress=lambda done, rounds, values: stage.update(
            done,
            rounds,
            f"relative entropy fell by {values['gain_nats']:.3f} ± {values['gain_error']:.3f} nats",
        ),
    )
    return {f"relative_entropy_{name}": value for name, value in found.items()}


def _as_frames(samples: Samples, force_field: ForceField) -> tuple[FlowFrames, np.ndarray]:
    """Turn samples of the flow into frames whose weights sum to K at every state; and their states.

    The bead force and free energy at a state are what its samples say, not the force field: these
    states were chosen where it may be wrong. Free energies get the force field's zero.
    """
    n_states, n_samples = samples.energy.shape
    force = mean_force(samples.log_weight, samples.labels).value
    energy = free_energy(samples.log_weight, samples.temperature_K).value
    modelled, _ = bead_energies(force_field, samples.beads)
    energy = energy + typical(modelled - energy)
    state = np.repeat(np.arange(n_states), n_samples).reshape(n_states, n_samples)
    weight = normalised_weights(samples.log_weight) * n_samples
    use = np.isfinite(samples.energy) & (weight > 1e-3)
    state = state[use]
    frames = FlowFrames(
        samples.positions[use],
        weight[use],
        samples.forces[use],
        samples.energy[use],
        force[state],
        energy[state],
    )
    return frames, state


def _show_terms(stage: Stage) -> ProgressCallback:
    def show(step: int, steps: int, values: dict[str, float]) -> None:
        stage.update(step, steps, " ".join(f"{k} {v:.3g}" for k, v in values.items()))

    return show
