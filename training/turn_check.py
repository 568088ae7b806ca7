"""What a turn of the loop brought: new labels test the models before they teach them.

The labels of turn k are made with the models of turn k - 1, at states that its bead dynamics led
to: compared with that force field they are a test on new data, free of charge. After the refit,
each model is compared with the one before it on the same held-out frames and labels, and the better
one goes on: a turn can't make what is deployed worse.
"""

from __future__ import annotations

import numpy as np

from ccg_ase.checkpoint import load_model
from ccg_ase.forcefield import ForceField
from ccg_mda.flow import Backmapper

from .fit_flow import frame_nll
from .fit_forcefield import evaluate_force_field
from .labels import Labels
from .learning import MOST_NATS, flow_frames, force_field_labels
from .progress import Stage
from .stages import Metrics
from .stopping import calls_spent, seconds_spent
from .workspace import Workspace


def check_turn(workspace: Workspace, stage: Stage, k: int) -> Metrics:
    """Test the models before turn k on its labels, and keep the better of before and after.

    Returns
    -------
    dict
        ``new_force_error`` (eV/Å) and ``new_F_error_kT`` of the force field before the turn, at
        the states labelled in it; ``flow_gain_nats`` per held-out frame; ``force_field_gain``, the
        share of its loss on held-out labels (less the noise of these) that is gone;
        ``flow_from``, ``force_field_from``: the turn whose model is kept; and ``told``.
    """
    folder = workspace.iteration(k)
    before, flow_after, ff_after = (
        load_model(path, device=workspace.device)
        for path in (
            workspace.iteration(k - 1) / "model.ccg",
            folder / "flow.ccg",
            folder / "force_field.ccg",
        )
    )
    force_fields = [ForceField.from_model(model) for model in (before, ff_after)]
    flows = [Backmapper.from_model(model) for model in (before, flow_after)]
    test = _new_states(force_fields[0], Labels.load(folder / "labels.npz"))
    stage.update(1, 3)

    _, judged = force_field_labels(workspace, k)
    old, new = (evaluate_force_field(model, judged) for model in force_fields)
    excess = [max(figures["loss"] - figures["loss_noise"], 0.0) for figures in (old, new)]
    force_field_gain = 1.0 - excess[1] / excess[0] if excess[0] > 0 else 0.0
    stage.update(2, 3)

    _, held_out = flow_frames(workspace, k, force_fields[0])
    nll = [frame_nll(flow, held_out.positions) for flow in flows]
    gain = np.clip(nll[0] - nll[1], -MOST_NATS, MOST_NATS)
    flow_gain = float(np.average(gain, weights=held_out.weight))

    kept_flow = flows[1] if flow_gain > 0 else flows[0]
    kept_force_field = force_fields[1] if force_field_gain > 0 else force_fields[0]
    workspace.save(folder / "model.ccg", {"backmapper": kept_flow, "force_field": kept_force_field})
    stage.update(3, 3)
    return test | {
        "flow_gain_nats": flow_gain,
        "force_field_gain": force_field_gain,
        "flow_kept": kept_flow is flows[1],
        "force_field_kept": kept_force_field is force_fields[1],
        "told": _told(flow_gain, force_field_gain, len(held_out), len(judged)),
    }


def turn_row(records: list[Metrics], k: int) -> dict[str, str]:
    """Return the figures of a finished turn as text, by what they are; "–" where unknown."""
    of_turn = {record["stage"]: record for record in records if record["iteration"] == k}
    labels, check = of_turn["labels at new states"], of_turn["turn check"]

    def text(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    return {
        "states": str(labels["states"]),
        "accepted": f"{labels['accepted'] / labels['states']:.0%}",
        "ESS": text(labels["ess_mean"], ".2f"),
        "F off by (kT)": text(check["new_F_error_kT"], ".2f"),
        "force off by (eV/Å)": text(check["new_force_error"], ".3f"),
        "flow gained (nats)": f"{check['flow_gain_nats']:.3f}",
        "force field gained": f"{check['force_field_gain']:.0%}",
        "calls so far": f"{calls_spent(upto(records, k)):,}".replace(",", " "),
        "minutes": f"{seconds_spent(records, k) / 60:.1f}",
    }


def upto(records: list[Metrics], k: int) -> list[Metrics]:
    """Return the records of the first stages and of the first k turns, without what follows."""
    last = max(
        i for i, r in enumerate(records) if (r["stage"], r["iteration"]) == ("turn check", k)
    )
    return records[: last + 1]


def _new_states(force_field: ForceField, labels: Labels) -> dict[str, float | None]:
    """Return the errors of a force field at states that it hasn't learnt from; None: no labels."""
    figures: dict[str, float | None] = {"new_force_error": None, "new_F_error_kT": None}
    if not len(labels):
        return figures
    found = evaluate_force_field(force_field, labels)
    figures["new_force_error"] = found["force_error"]
    if np.isfinite(labels.free_energy).sum() > 1:
        square = found["free_energy_rmse_kT"] ** 2 - found["free_energy_noise_kT"] ** 2
        figures["new_F_error_kT"] = float(np.sqrt(max(square, 0.0)))
    return figures


def _told(flow_gain: float, force_field_gain: float, n_frames: int, n_labels: int) -> str:
    """Say what the turn brought, or why nothing."""
    parts = []
    if flow_gain > 0:
        parts.append(f"the flow gained {flow_gain:.3f} nats per frame ({n_frames} held out)")
    else:
        parts.append(
            f"the flow stays as it was: after the fit {n_frames} held-out frames had "
            f"{-flow_gain:.3f} nats less"
        )
    if force_field_gain > 0:
        parts.append(
            f"the force field lost {force_field_gain:.0%} of its loss on {n_labels} held-out labels"
        )
    else:
        parts.append(
            f"the force field stays as it was: its loss on {n_labels} held-out labels didn't fall"
        )
    return "; ".join(parts)
