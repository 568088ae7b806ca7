"""The cycle: reference → flow and force field → bead dynamics → atoms → weights → labels → refit.

Every stage reads what earlier ones left in the run directory and leaves its own files there::

    reference.npz                     atomistic frames
    iteration_0/                      flow by likelihood and coordinates, labels, first force field
    iteration_k/dynamics/beads.dcd    bead ensemble of the force field of turn k - 1
    iteration_k/labels.npz            ln Z(s) and mean forces at new s, with errors and origin
    iteration_k/buffer.npz            weighted atomistic frames there, for the flow
    iteration_k/states.npz            all states that were tried, and what became of them
    iteration_k/model.ccg             the better flow and force field of before and after the refit
    final_k/                          fine-tuned models, and what is reported of them
    model.ccg, report_data.npz, report.html, metrics.jsonl, state.json

Where torsions are the coarse variables there is no bead force field, and none is needed: any state
can be labelled. A surface over torsions (`torsion_surface`) then says where, and stands in for it.

Resuming skips the stages whose record is in ``state.json`` and repeats the one that was cut off.
The loop ends as `stopping` decides; with larger budgets or more turns, resuming goes on with it.
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

from . import exploring, flow_stages, force_field_stages
from .config import Config
from .consistency import check_consistency
from .data_check import check
from .findings import refuse_faults
from .fine_tuning import fine_tune
from .new_labels import label_states
from .progress import Progress, Stage
from .reference import ReferenceData, read_npz, reference_data, trajectory_of
from .report import write_report
from .report_arrays import collect
from .stages import Metrics, Stages
from .stopping import Stop, calls_left, stop
from .turn_check import check_turn, turn_row
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
    run("flow: likelihood", flow_stages.fit_likelihood)
    run("flow: coordinates", flow_stages.fit_coordinates)
    by_torsions = workspace.by_torsions
    if not by_torsions:
        run("labels on frames", force_field_stages.label_frames, k=0)
        run("force field", force_field_stages.refit_force_field, k=0)
    run("flow: forces", flow_stages.fit_forces, k=0)
    k, n_steps = 0, workspace.config.dynamics.n_steps
    while (end := stop(workspace.config, stages.records, k)) is None:
        k += 1
        folder, left = workspace.iteration(k), calls_left(workspace.config, stages.records)
        if not by_torsions:
            run("bead dynamics", exploring.sample_beads, k, k=k, folder=folder, n_steps=n_steps)
        run("labels at new states", label_states, k, k=k, max_calls=left)
        run("flow", flow_stages.fit_forces, k, k=k)
        if not by_torsions:
            run("labels on frames", force_field_stages.label_frames, k, k=k)
            run("force field", force_field_stages.refit_force_field, k, k=k)
        run("turn check", check_turn, k, k=k)
        progress.row(f"turn {k}", turn_row(stages.records, k))
    run("end of the loop", _end_loop, k, end=end, progress=progress)
    if by_torsions:
        run("labels on frames", force_field_stages.label_frames, k, k=k)
    else:
        run("fine-tuning", fine_tune, k, k=k)
        run("final bead dynamics", exploring.sample_final_beads, k, k=k)
        run("final reconstruction", exploring.reconstruct_ensemble, k, k=k)
        run("consistency", check_consistency, k, k=k)
    run("held-out check", exploring.check_held_out, k, k=k)
    run("report", _write_report, k, k=k, records=stages.records)
    if by_torsions:
        progress.message(
            "torsions as coarse variables have no bead force field: F over them is mapped by "
            f"ccg free-energy {workspace.directory / 'model.ccg'}"
        )


def _get_reference(workspace: Workspace, stage: Stage) -> Metrics:
    if workspace.config.reference.source != "trajectory":
        data = reference_data(workspace.config, workspace.directory, stage.update)
        calls = int(read_npz(workspace.directory / "reference.npz").get("calls", 0))
        return {"frames": len(data), "calls": calls}
    data, calls = trajectory_of(workspace.config), 0
    refuse_faults(check(data, workspace.cg_map, workspace.temperature_K, workspace.potential))
    if data.forces is None or data.energy is None:
        stage.update(note="forces and energies from the potential")
        energy, forces = workspace.potential(data.positions)
        calls = len(data)
        data = replace(data, energy=energy, forces=forces)
    data.save(workspace.directory / "reference.npz", calls=calls)
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


def _end_loop(workspace: Workspace, stage: Stage, end: Stop, progress: Progress) -> Metrics:
    """Put the reason for the end of the loop on record."""
    del workspace, stage
    progress.message(f"the loop ends ({end.reason}): {end.sentence}")
    return {"reason": end.reason, "told": end.sentence}


def _write_report(workspace: Workspace, stage: Stage, records: list[Metrics], k: int) -> Metrics:
    """Write the final model, after turn k, with its figures, and the report."""
    del stage
    figures = {
        f"{record['stage']}: {name}": record[name]
        for record in records
        if record["iteration"] == k
        for name in record
        if name.startswith(("ess", "label_variance", "variance_ratio", "lnZ_gap", "nll"))
    }
    model = workspace.final_model(k)
    parts: dict[str, nn.Module] = {"backmapper": Backmapper.from_model(model)}
    if not workspace.by_torsions:
        parts["force_field"] = ForceField.from_model(model)
    workspace.save(workspace.directory / "model.ccg", parts, figures)
    collect(workspace, records, k).save(workspace.directory / "report_data.npz")
    write_report(workspace.directory)
    return {}
