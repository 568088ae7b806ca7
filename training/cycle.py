"""The cycle: reference → flow and force field → bead dynamics → atoms → weights → labels → refit.

Every stage reads what earlier ones left in the run directory and leaves its own files there::

    reference.npz                     atomistic frames
    iteration_0/                      flow by likelihood and coordinates, labels, first force field
    iteration_k/dynamics/beads.dcd    bead ensemble of the previous force field, through ASE
    iteration_k/labels.npz            ln Z(s) and mean forces at new s, with errors and origin
    iteration_k/buffer.npz            weighted atomistic frames there, for the flow
    iteration_k/states.npz            all states that were tried, and what became of them
    iteration_k/model.ccg             flow and force field after the refit
    final_k/                          the same once more with the last models: what is reported
    model.ccg, report_data.npz, report.html, metrics.jsonl, state.json

Where torsions are the coarse variables there is no bead force field to iterate with: the flow is
fitted to likelihood and forces, F(s) and mean forces are labelled in iteration_0, and that is all.

Resuming skips the stages whose record is in ``state.json`` and repeats the one that was cut off.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ccg_ase.forcefield import ForceField
from ccg_mda.flow import Backmapper

from . import evaluation, exploring, learning
from .config import Config
from .data_check import check
from .findings import refuse_faults
from .progress import Progress, Stage
from .reference import ReferenceData, reference_data, trajectory_of
from .report import write_report
from .stages import Metrics, Stages
from .workspace import Workspace


def run_cycle(config: Config, progress: Progress) -> None:
    """Run, or continue, the cycle that a configuration describes.

    Parameters
    ----------
    config
        The run; its directory exists.
    progress
        Where the stages are shown.

    Raises
    ------
    ReferenceDataError
        If the check of the mapping or of the data finds an error.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(config.run.threads)
    try:
        _run_stages(Workspace(config), progress)
    finally:
        torch.set_num_threads(threads)


def _run_stages(workspace: Workspace, progress: Progress) -> None:
    stages = Stages(workspace.directory, progress)

    def run(name: str, work: Callable[..., Metrics], iteration: int = 0, **arguments: Any) -> None:
        stages.run(name, partial(work, workspace, **arguments), iteration=iteration)

    run("reference data", _get_reference)
    run("data check", _check_data, progress=progress)
    run("flow: likelihood", learning.fit_likelihood)
    run("flow: coordinates", learning.fit_coordinates)
    if workspace.by_torsions:
        run("flow: forces", learning.fit_forces_by_torsions)
        run("free energies", exploring.label_torsions)
        run("labels on frames", learning.label_frames, k=0)
        run("model", _write_model, records=stages.records)
        folder = workspace.iteration(0)
        progress.message(
            "torsions as coarse variables have no bead force field, so the cycle ends with the "
            f"backmapper: F(s) is in {folder / 'states.npz'}, mean forces in "
            f"{folder / 'labels.npz'}; no report is drawn"
        )
        return
    run("labels on frames", learning.label_frames, k=0)
    run("force field", learning.refit_force_field, k=0)
    run("flow: forces", learning.fit_forces, k=0)
    dynamics, last = workspace.config.dynamics, workspace.config.cycle.iterations
    for k in range(1, last + 1):
        folder, steps = workspace.iteration(k), dynamics.n_steps
        run("bead dynamics", exploring.sample_beads, k, k=k - 1, folder=folder, n_steps=steps)
        run("reconstruction", exploring.label_states, k, k=k)
        run("flow", learning.fit_forces, k, k=k)
        run("labels on frames", learning.label_frames, k, k=k)
        run("force field", learning.refit_force_field, k, k=k)
    folder, steps = workspace.final, dynamics.n_final_steps
    run("final bead dynamics", exploring.sample_beads, last, k=last, folder=folder, n_steps=steps)
    run("final reconstruction", exploring.reconstruct_ensemble, last)
    run("held-out check", exploring.check_held_out, last)
    run("report", _write_report, last, records=stages.records)


def _get_reference(workspace: Workspace, stage: Stage) -> Metrics:
    settings = workspace.config.reference
    if settings.source == "generate":
        data = reference_data(workspace.config, workspace.directory, stage.update)
        stored_fs = settings.time_ns * 1e6 + settings.walkers * settings.equilibration_ps * 1e3
        return {"frames": len(data), "calls": round(stored_fs / settings.timestep_fs)}
    data, calls = trajectory_of(workspace.config), 0
    refuse_faults(check(data, workspace.cg_map, workspace.temperature_K, workspace.potential))
    if data.forces is None or data.energy is None:
        stage.update(note="forces and energies from the potential")
        energy, forces = workspace.potential(data.positions)
        calls = len(data)
        data = replace(data, energy=energy, forces=forces)
    data.save(workspace.directory / "reference.npz")
    return {"frames": len(data), "calls": calls}


def _check_data(workspace: Workspace, stage: Stage, progress: Progress) -> Metrics:
    del stage
    data = ReferenceData.load(workspace.directory / "reference.npz")
    findings = check(data, workspace.cg_map, workspace.temperature_K, workspace.potential)
    for finding in findings:
        if finding.level == "warning":
            progress.message(f"[yellow]warning[/] {finding.title}: {finding.detail}")
    refuse_faults(findings)
    return {"findings": {f.title: f"{f.level}: {f.detail}" for f in findings}}


def _write_model(workspace: Workspace, stage: Stage, records: list[Metrics]) -> Metrics:
    """Write the final model with its figures."""
    del stage
    last = 0 if workspace.by_torsions else workspace.config.cycle.iterations
    figures = {
        f"{record['stage']}: {name}": record[name]
        for record in records
        if record["iteration"] == last
        for name in record
        if name.startswith(("ess", "label_variance", "variance_ratio", "lnZ_gap", "nll"))
    }
    model = workspace.model(last)
    parts: dict[str, nn.Module] = {"backmapper": Backmapper.from_model(model)}
    if not workspace.by_torsions:
        parts["force_field"] = ForceField.from_model(model)
    workspace.save(workspace.directory / "model.ccg", parts, figures)
    return {}


def _write_report(workspace: Workspace, stage: Stage, records: list[Metrics]) -> Metrics:
    """Write the final model with its figures, and the report."""
    _write_model(workspace, stage, records)
    evaluation.report_data(workspace, records).save(workspace.directory / "report_data.npz")
    write_report(workspace.directory)
    return {}
