"""The arrays of the report, from what a finished run left in its folders."""

from __future__ import annotations

from typing import Any

import numpy as np

from ccg_ase.forcefield import ForceField
from ccg_mda.weights import effective_sample_size

from .evaluation import dcd_frames, rare_states, torsions, two_levels
from .metrics import independent_samples, torsion_centres
from .reference import read_npz
from .report_data import ReportData
from .samples import Samples
from .stages import Metrics
from .states import internal_coordinates
from .stopping import calls_spent, records_upto
from .turn_check import turn_row
from .turn_labels import labels_of_turns, surface_of_turns
from .workspace import Workspace

_GRID = {1: 180, 2: 72}  # points per torsion of a surface, by their number


def collect(workspace: Workspace, records: list[Metrics], k: int) -> ReportData:
    """Collect the arrays behind the report of a run that ended with turn k, and its records."""
    train, held_out = workspace.data
    reference = workspace.cg_map.apply(np.concatenate([train.positions, held_out.positions]))
    check = read_npz(workspace.final(k) / "held_out.npz")
    ess, iteration, rare = [], [], []
    for turn in range(1, k + 1):
        table = read_npz(workspace.iteration(turn) / "states.npz")
        seen = np.isfinite(table["ess"])
        ess.append(table["ess"][seen])
        iteration.append(np.full(len(ess[-1]), turn))
        rare.append(rare_states(table["beads"][seen], reference, workspace.cg_map))
    models = _of_surface if workspace.by_torsions else _of_ensembles
    return ReportData(
        name=workspace.config.system.name,
        temperature_K=workspace.temperature_K,
        biased=train.biased,
        by_torsions=workspace.by_torsions,
        ess=np.concatenate([*ess, check["ess"]]),
        ess_iteration=np.concatenate([*iteration, np.full(len(check["ess"]), len(ess) + 1)]),
        ess_rare=np.concatenate([*rare, check["rare"]]),
        ess_labels=(*map(str, range(1, len(ess) + 1)), "held out"),
        label_variance_slice=check.get("slice_variance", np.zeros(0)),
        label_variance=check["label_variance"],
        weight_table=check["weight_table"],
        structure_table=check["structure_table"],
        coverage_table=check["coverage_table"],
        stage_names=tuple(r["stage"] for r in records),
        stage_iteration=np.array([r["iteration"] for r in records]),
        stage_seconds=np.array([r["seconds"] for r in records]),
        stage_calls=np.array([r["calls"] for r in records]),
        **_history(records, k),
        **models(workspace, reference, k),
    )


def _of_surface(workspace: Workspace, reference: np.ndarray, k: int) -> dict[str, Any]:
    """F over one or two torsions, between the labels of all turns."""
    del reference
    names = workspace.cg_map.names
    surface = surface_of_turns(workspace, range(1, k + 1))
    if len(names) not in _GRID or surface is None:
        return {}
    axis = torsion_centres(_GRID[len(names)])
    points = np.stack(np.meshgrid(*[axis] * len(names), indexing="ij"), axis=-1)
    F, error = surface.free_energy(points.reshape(-1, len(names)))
    labels = labels_of_turns(workspace, range(1, k + 1))
    return {
        "torsion_names": names,
        "surface": (F - F.min()).reshape(points.shape[:-1]) / surface.kT,
        "surface_error": error.reshape(points.shape[:-1]) / surface.kT,
        "surface_labels": labels.beads[np.isfinite(labels.free_energy)],
    }


def _of_ensembles(workspace: Workspace, reference: np.ndarray, k: int) -> dict[str, Any]:
    """Bead dynamics, atoms on it with their weights, and what they are compared with."""
    cg_map, final, settings = workspace.cg_map, workspace.final(k), workspace.config.dynamics
    train, held_out = workspace.data
    # What is compared with the model's populations: nothing, where those of the frames are biased.
    compared = reference[: 0 if train.biased else None]
    energies = np.concatenate([train.energy, held_out.energy])
    visited = dcd_frames(final / "dynamics" / "beads.dcd")
    samples = Samples.load(final / "samples.npz")
    levels = two_levels(samples, ForceField.from_model(workspace.final_model(k)))
    log_weights = levels.log_w
    kept = np.isfinite(log_weights)
    residual = read_npz(final / "consistency.npz")
    of_beads = {"reference": compared, "beads": visited}
    internals = {name: internal_coordinates(v, cg_map.beads) for name, v in of_beads.items()}
    names = cg_map.beads.names
    shown = int(np.argmax(effective_sample_size(samples.log_weight, axis=1)))
    chain = cg_map.beads.dihedrals()[:2]
    atom_torsions = np.repeat(torsions(samples.beads, cg_map), samples.energy.shape[1], axis=0)
    rungs = settings.rungs if settings.driver == "replica-exchange" else 1
    return {
        "torsion_names": tuple("-".join(names[i] for i in quadruple) for quadruple in chain),
        "torsions_reference": torsions(compared, cg_map),
        "torsions_beads": torsions(visited, cg_map),
        "torsions_atomistic": atom_torsions[kept],
        "log_weights": log_weights[kept],
        "atomistic_state": np.repeat(np.arange(len(samples.beads)), samples.energy.shape[1])[kept],
        "independent_reference": _independent(torsions(compared, cg_map), 1),
        "independent_beads": _independent(torsions(visited, cg_map), settings.replicas // rungs),
        "bond_names": _named(names, cg_map.beads.bonds),
        "bonds_reference": internals["reference"].bonds,
        "bonds_beads": internals["beads"].bonds,
        "angle_names": _named(names, cg_map.beads.angles()),
        "angles_reference": internals["reference"].angles,
        "angles_beads": internals["beads"].angles,
        "energy_reference": energies[: len(compared)],
        "energy_atomistic": samples.energy.ravel()[kept],
        "residual_forward": residual["forward"],
        "residual_reverse": residual["reverse"],
        "picture_beads": samples.beads[shown],
        "picture_bead_bonds": cg_map.beads.bonds,
        "picture_atoms": samples.positions[shown],
        "picture_atom_bonds": cg_map.atoms.bonds,
        "picture_elements": cg_map.atoms.elements,
    }


def _history(records: list[Metrics], k: int) -> dict[str, Any]:
    """Collect what the report tells of the turns of the loop, and why it ended."""
    by_name = {(record["stage"], record["iteration"]): record for record in records}
    turns = range(1, k + 1)

    def column(stage: str, figure: str) -> np.ndarray:
        return np.array([by_name[stage, i][figure] for i in turns], dtype=float)  # None: NaN

    end = by_name["end of the loop", k]
    return {
        "turn_table": np.array([[str(i), *turn_row(records, i).values()] for i in turns], str),
        "turn_calls": np.array([calls_spent(records_upto(records, i)) for i in turns]),
        "turn_accepted": column("labels at new states", "accepted")
        / column("labels at new states", "states"),
        "turn_ess": column("labels at new states", "ess_mean"),
        "turn_free_energy_error": column("turn check", "new_F_error_kT"),
        "turn_force_error": column("turn check", "new_force_error"),
        "end_of_loop": (end["reason"], end["told"]),
    }


def _named(names: tuple[str, ...], terms: np.ndarray) -> tuple[str, ...]:
    return tuple("-".join(names[i] for i in term) for term in terms)


def _independent(angles: np.ndarray, n_series: int) -> float:
    """Independent samples behind torsion series laid end to end: the least of all torsions."""
    if not angles.size:
        return 0.0
    per_series = [
        sum(independent_samples(part) for part in np.array_split(np.cos(column), n_series))
        for column in angles.T
    ]
    return float(min(per_series))
