"""What a turn of the loop brought: new labels test the models before they teach them.

The labels of turn k are made with the models of turn k - 1, at states that its bead dynamics led
to: compared with that force field they are a test on new data, free of charge. After the refit,
each model is compared with the one before it on the same held-out frames and labels, and the better
one goes on: a turn can't make what is deployed worse.
"""

from __future__ import annotations

import numpy as np
from torch import nn

from ccg_ase.checkpoint import load_model
from ccg_ase.forcefield import ForceField
from ccg_mda.flow import Backmapper

from .fit_flow import frame_nll
from .fit_forcefield import evaluate_force_field
from .flow_stages import MOST_NATS, flow_frames
from .force_field_stages import force_field_labels
from .labels import Labels
from .progress import Stage
from .stages import Metrics
from .stopping import calls_spent, records_upto, seconds_spent
from .torsion_surface import TorsionSurface
from .turn_labels import surface_of_turns
from .workspace import Workspace


def check_turn(workspace: Workspace, stage: Stage, k: int) -> Metrics:
    """Test the models before turn k on its labels, and keep the better of before and after.

    Returns
    -------
    dict
        ``new_force_error`` (eV/Å; eV/rad) and ``new_F_error_kT`` of what was known of F before the
        turn, at the states labelled in it; ``flow_gain_nats`` per held-out frame;
        ``force_field_gain``, the share of its loss on held-out labels (less the noise of these)
        that is gone, None over torsions; and ``told``. A gain that isn't positive means that the
        model before is kept.
    """
    folder = workspace.iteration(k)
    labels = Labels.load(folder / "labels.npz")
    before, after = (
        load_model(path, device=workspace.device)
        for path in (workspace.iteration(k - 1) / "model.ccg", folder / "flow.ccg")
    )
    flows = [Backmapper.from_model(model) for model in (before, after)]
    _, held_out = flow_frames(workspace, flows[0], k, None)
    nll = [frame_nll(flow, held_out.positions) for flow in flows]
    gain = np.clip(nll[0] - nll[1], -MOST_NATS, MOST_NATS)
    flow_gain = float(np.average(gain, weights=held_out.weight))
    parts: dict[str, nn.Module] = {"backmapper": flows[flow_gain > 0]}
    told = [_of_flow(flow_gain, len(held_out))]
    found: Metrics = {"flow_gain_nats": flow_gain, "force_field_gain": None}
    stage.update(1, 2)
    if workspace.by_torsions:
        found |= _errors_of_surface(surface_of_turns(workspace, range(1, k)), labels)
    else:
        after = load_model(folder / "force_field.ccg", device=workspace.device)
        force_fields = [ForceField.from_model(model) for model in (before, after)]
        found |= _errors_of_force_field(force_fields[0], labels)
        _, judged = force_field_labels(workspace, k)
        old, new = (evaluate_force_field(model, judged) for model in force_fields)
        excess = old["loss"] - old["loss_noise"]
        # Noise that is overestimated may be more than the whole loss: then a share of that.
        gained = min(1.0, (old["loss"] - new["loss"]) / (excess if excess > 0 else old["loss"]))
        parts["force_field"] = force_fields[gained > 0]
        found["force_field_gain"] = gained
        told.append(_of_force_field(gained, len(judged)))
    workspace.save(folder / "model.ccg", parts)
    stage.update(2, 2)
    return found | {"told": "; ".join(told)}


def turn_row(records: list[Metrics], k: int) -> dict[str, str]:
    """Return the figures of a finished turn as text, by what they are; "–" where unknown."""
    of_turn = {record["stage"]: record for record in records if record["iteration"] == k}
    labels, check = of_turn["labels at new states"], of_turn["turn check"]
    after = (("bead dynamics", k + 1), ("final bead dynamics", k))
    exploded = any(
        record.get("withdrawn")
        for record in records
        if (record["stage"], record["iteration"]) in after
    )

    def text(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    return {
        "states": str(labels["states"]),
        "accepted": f"{labels['accepted'] / labels['states']:.0%}",
        "ESS": text(labels["ess_mean"], ".2f"),
        "F off by (kT)": text(check["new_F_error_kT"], ".2f"),
        "force off by (eV/Å, eV/rad)": text(check["new_force_error"], ".3f"),
        "flow gained (nats)": f"{check['flow_gain_nats']:.3f}",
        "force field gained": text(check["force_field_gain"], ".0%")
        + (", but exploded: withdrawn" if exploded else ""),
        "calls so far": f"{calls_spent(records_upto(records, k)):,}".replace(",", " "),
        "minutes": f"{seconds_spent(records, k) / 60:.1f}",
    }


def _errors_of_surface(surface: TorsionSurface | None, labels: Labels) -> Metrics:
    """Return the rms errors of a surface at labels that it hasn't seen, their noise taken off."""
    known = np.isfinite(labels.free_energy)
    if surface is None or known.sum() < 2:
        return {"new_force_error": None, "new_F_error_kT": None}
    labels = labels[known]
    F, force = surface(labels.beads)
    apart = F - labels.free_energy
    weight = 1 / (labels.free_energy_variance + (0.1 * surface.kT) ** 2)
    apart = apart - np.average(apart, weights=weight)
    square = np.average(apart**2 - labels.free_energy_variance, weights=weight)
    slope = np.mean((force - labels.force) ** 2 - labels.force_variance[:, None])
    return {
        "new_force_error": float(np.sqrt(max(slope, 0.0))),
        "new_F_error_kT": float(np.sqrt(max(square, 0.0))) / surface.kT,
    }


def _errors_of_force_field(force_field: ForceField, labels: Labels) -> Metrics:
    """Return the errors of a force field at labels that it hasn't learnt from; None: no labels."""
    figures: Metrics = {"new_force_error": None, "new_F_error_kT": None}
    if not len(labels):
        return figures
    found = evaluate_force_field(force_field, labels)
    figures["new_force_error"] = found["force_error"]
    if np.isfinite(labels.free_energy).sum() > 1:
        square = found["free_energy_rmse_kT"] ** 2 - found["free_energy_noise_kT"] ** 2
        figures["new_F_error_kT"] = float(np.sqrt(max(square, 0.0)))
    return figures


def _of_flow(gain: float, n_frames: int) -> str:
    """Say what the turn brought to the flow, or why nothing."""
    if gain > 0:
        return f"the flow gained {gain:.3f} nats per frame ({n_frames} held out)"
    return (
        f"the flow stays as it was: after the fit {n_frames} held-out frames had {-gain:.3f} nats "
        "less"
    )


def _of_force_field(gain: float, n_labels: int) -> str:
    """Say what the turn brought to the force field, or why nothing."""
    if gain > 0:
        return f"the force field lost {gain:.0%} of its loss on {n_labels} held-out labels"
    return f"the force field stays as it was: its loss on {n_labels} held-out labels didn't fall"
