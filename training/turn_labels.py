"""The labels that turns of the loop have left, and what they say of F over torsions."""

from __future__ import annotations

import numpy as np

from .labels import Labels
from .torsion_surface import TorsionSurface
from .workspace import Workspace


def labels_of_turns(workspace: Workspace, turns: range) -> Labels | None:
    """Return the labels of some turns; None if there are no turns."""
    parts = [Labels.load(workspace.iteration(i) / "labels.npz") for i in turns]
    return Labels.concatenate(*parts) if parts else None


def surface_of_turns(workspace: Workspace, turns: range) -> TorsionSurface | None:
    """Return F over torsions from the labels of some turns; None if no label has a free energy."""
    labels = labels_of_turns(workspace, turns)
    if labels is None or not np.isfinite(labels.free_energy).any():
        return None
    return TorsionSurface(labels, workspace.temperature_K)
