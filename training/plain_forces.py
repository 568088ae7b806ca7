"""Aggregated forces of stored frames, for where labels pulled back through the flow scatter more.

Both are unbiased: at fixed s they average to the mean force -∂F/∂s. What their mean squares differ
by is noise, so the smaller one tells which is the better label. A flow that fits is better by
orders of magnitude; one of a large molecule after a short fit has labels with heavy tails.
"""

from __future__ import annotations

import numpy as np

from ccg_ase.torsion_map import TorsionMap
from ccg_mda.flow import Backmapper

from .force_aggregation import ForceMap


def plain_forces(backmapper: Backmapper, forces: np.ndarray) -> ForceMap | None:
    """Return the force map of least noise, or None where there is none.

    That is over torsions, and where the flow holds coordinates rigid: forces along them aren't
    known then.

    Parameters
    ----------
    backmapper
        The flow that the labels would be pulled back through.
    forces
        Forces on the atoms of frames, (N, n_atoms, 3) in eV/Å.
    """
    if isinstance(backmapper.cg_map, TorsionMap) or np.any(backmapper.config["rigid"]):
        return None
    try:
        return ForceMap.optimal(backmapper.cg_map, forces)
    except ValueError:  # too few frames, or beads that don't move independently
        return None


def quieter(pulled: np.ndarray, plain: np.ndarray) -> bool:
    """Tell whether labels pulled back have no more noise than plain ones, (L, n_beads, 3) each."""
    return bool((pulled**2).mean() <= (plain**2).mean())
