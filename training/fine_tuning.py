"""The stage after the loop: the final models, by the joint residual and by relative entropy."""

from __future__ import annotations

from functools import partial

from ccg_ase.energies import bead_energies
from ccg_ase.forcefield import ForceField
from ccg_mda.flow import Backmapper

from .fit_flow import FlowLoss
from .fit_joint import JointSettings, fit_joint
from .flow_stages import flow_frames, show_terms
from .force_field_stages import force_field_labels
from .langevin_sampler import LangevinSampler
from .progress import Stage
from .reference_beads import ReferenceBeads
from .relative_entropy import RelativeEntropySettings, minimise_relative_entropy
from .stages import Metrics
from .workspace import Workspace


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
    known = partial(bead_energies, force_field)
    train, held_out = flow_frames(workspace, flow, k, known)
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
        progress=show_terms(stage),
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
