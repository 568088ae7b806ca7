"""BeadWriter: frames of a batch of replicas into any format that MDAnalysis writes."""

from __future__ import annotations

from typing import Any

import numpy as np
from MDAnalysis.lib.mdamath import triclinic_box

from ccg_ase.bead_frames import BeadFrames
from ccg_ase.mapping import CGMap
from ccg_mda.bead_sources import bead_universe


class BeadWriter:
    """Hand one replica's frames to a writer of MDAnalysis.

    >>> with mda.Writer("run.dcd", n_atoms=sampler.cg_map.n_beads) as writer:
    ...     sampler.write([BeadWriter(writer, sampler.cg_map)], beads, 1_000_000, every=500)

    Parameters
    ----------
    writer
        Anything with MDAnalysis's ``write(atom_group)``; it stays open.
    cg_map
        The map whose beads are written, with their names, masses and bonds.
    replica
        Which replica.
    """

    def __init__(self, writer: Any, cg_map: CGMap, replica: int = 0):
        self._writer, self._replica = writer, replica
        self._universe = bead_universe(np.zeros((1, cg_map.n_beads, 3), np.float32), cg_map)

    def write(self, frames: BeadFrames) -> None:
        """Write frames, with time in ps, and the step and the walker in ``ts.data``."""
        box = frames.replica_box(self._replica)
        ts = self._universe.trajectory.ts
        for k, step in enumerate(frames.steps):
            ts.positions = frames.beads[k, self._replica]
            ts.dimensions = None if box is None else triclinic_box(*box)
            ts.frame = int(step)
            ts.time = step * frames.timestep_fs / 1000
            ts.data |= {"step": int(step), "walker": int(frames.walkers[k, self._replica])}
            self._writer.write(self._universe.atoms)
