"""The stages that fit the force field: labels on stored frames, and the fit to all labels."""

from __future__ import annotations

import numpy as np
import torch

from ccg_ase.forcefield import ForceField
from ccg_ase.units import thermal_energy
from ccg_mda.flow import Backmapper

from .estimators import typical
from .fit_forcefield import FitSettings, fit_force_field
from .labels import FRAME, Labels
from .plain_forces import plain_forces, quieter
from .progress import Stage
from .reconstruction import pull_back_frames
from .reference import MDANALYSIS_FORCE, read_npz
from .stages import Metrics
from .workspace import Workspace


def label_frames(workspace: Workspace, stage: Stage, k: int) -> Metrics:
    """Label stored frames (E3b): no weights and no energy calls.

    By plain forces, where labels pulled back through the flow have more noise.
    """
    train, _ = workspace.data
    chosen = np.unique(
        np.linspace(0, len(train) - 1, workspace.config.cycle.n_frame_labels).astype(int)
    )
    last = "model.ccg" if workspace.by_torsions else "flow.ccg"
    flow = Backmapper.load(workspace.iteration(k) / last, device=workspace.device)
    force_variance, log_weight_variance = _scatter(workspace, k)
    blocks = train.blocks()
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
                run=blocks[piece],
                origin=FRAME,
            )
        )
        stage.update(sum(map(len, parts)), len(chosen))
    labels, figures = Labels.concatenate(*parts), {"plain_forces": False}
    force_map = plain_forces(flow, train.forces)
    if force_map is not None:
        plain = force_map.apply(train.forces[chosen])
        if not quieter(labels.force, plain):
            figures["plain_forces"] = True
            labels = Labels.from_forces(labels.beads, plain, run=labels.run)
            stage.update(note="plain forces: labels pulled back through the flow have more noise")
    labels.save(workspace.iteration(k) / "frame_labels.npz")
    return {"labels": len(labels)} | figures


def _scatter(workspace: Workspace, k: int) -> tuple[float, float]:
    """Variance at fixed s of a single label, (eV/Å)² or (eV/rad)², and of a log-weight."""
    if k:
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
            f"force error {values['force_error']:.4f} eV/Å"
            if np.isfinite(values["loss_noise"])
            else f"loss {values['loss']:.4g}, plain forces in it",
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
