"""What stops a run: a start that can't be right, or an explosion."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ccg_ase.topology import Topology


def check_start(beads: Tensor, topology: Topology) -> None:
    """Refuse starting positions of another shape, or that aren't numbers.

    Parameters
    ----------
    beads
        In Å, shape (R, n, 3).
    topology
        Of the n beads.

    Raises
    ------
    ValueError
        With the bead and the replica.
    """
    if beads.ndim != 3 or tuple(beads.shape[1:]) != (len(topology), 3) or not len(beads):
        raise ValueError(f"beads must have shape (R, {len(topology)}, 3), got {tuple(beads.shape)}")
    bad = torch.isfinite(beads).all(-1).logical_not().nonzero()
    if len(bad):
        replica, bead = bad[0].tolist()
        raise ValueError(
            f"bead {bead} ({topology.names[bead]}) of replica {replica} starts at "
            f"{beads[replica, bead].tolist()}: positions must be finite numbers"
        )


class ExplodedError(FloatingPointError):
    """A replica left all that dynamics at its temperature can reach.

    Parameters
    ----------
    replica, step
        Which replica, and in which step, counted from 1.
    temperature_K
        Its temperature in K.
    move_A
        The largest move of a bead along an axis within the step in Å; NaN if it left the finite
        numbers.
    force_eV_A, bead, name
        The largest force on a bead after that step in eV/Å, and which bead it acts on.
    last_good
        Positions in Å of all replicas one step earlier, shape (R, n, 3).
    """

    def __init__(
        self,
        *,
        replica: int,
        step: int,
        temperature_K: float,
        move_A: float,
        force_eV_A: float,
        bead: int,
        name: str,
        last_good: np.ndarray,
    ):
        super().__init__(
            f"replica {replica} exploded in step {step} ({temperature_K:.6g} K): a bead moved "
            f"{move_A:.3g} Å within the step, and the largest force is {force_eV_A:.3g} eV/Å on "
            f"bead {bead} ({name}); shorten timestep_fs, relax the start, or train the force "
            "field where the replica was (`last_good` of this error)"
        )
        self.replica, self.step, self.temperature_K = replica, step, temperature_K
        self.move_A, self.force_eV_A, self.bead, self.name = move_A, force_eV_A, bead, name
        self.last_good = last_good
