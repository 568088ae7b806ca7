"""Graft: reconstructed atoms on a given structure."""

from __future__ import annotations

import numpy as np
from MDAnalysis.analysis.align import rotation_matrix
from MDAnalysis.coordinates.timestep import Timestep
from MDAnalysis.transformations.base import TransformationBase

from ccg_ase.mapping import CGMap

_NEEDED = 3  # beads that fix a rotation


class Graft(TransformationBase):
    """Take part of the atoms from a given structure, laid rigidly on the beads of every frame.

    It belongs after `Backmap`, whose atoms it keeps elsewhere. The rotation and shift are those of
    least squares between the beads of the taken part, in the structure and in the frame.
    ``ts.data["rest_rmsd"]`` is what is left of it, in Å: where it exceeds a few tenths, bonds
    between both parts are bent. ``log_prob`` is removed, since it isn't that of these atoms.

    Parameters
    ----------
    cg_map
        The map.
    structure
        Atom positions in Å, (n_atoms, 3), molecules whole.
    taken
        Indices of the atoms to take from it.

    Raises
    ------
    ValueError
        If the shape is wrong, positions are NaN, or fewer than three beads lie in the taken part.
    """

    def __init__(self, cg_map: CGMap, structure: np.ndarray, taken: np.ndarray) -> None:
        super().__init__(max_threads=1, parallelizable=True)
        structure = np.array(structure, dtype=np.float64)
        if structure.shape != (cg_map.n_atoms, 3):
            raise ValueError(
                f"the given structure has shape {structure.shape}, the model {cg_map.n_atoms} "
                "atoms; give all atoms, in the order of the model"
            )
        if not np.isfinite(structure).all():
            raise ValueError("the given structure holds positions that are NaN or infinite")
        partly = np.setdiff1d(np.arange(cg_map.n_atoms), taken)
        whole = np.setdiff1d(
            np.arange(cg_map.n_beads), cg_map.bead_index[np.isin(cg_map.atom_index, partly)]
        )
        if len(whole) < _NEEDED:
            raise ValueError(
                f"{len(whole)} beads lie in the given part of the structure; to lay it on a frame "
                f"{_NEEDED} are needed, so reconstruct fewer atoms"
            )
        self._cg_map, self._taken, self._whole = cg_map, np.asarray(taken), whole
        beads = cg_map.apply(structure)[whole]
        self._centre = beads.mean(axis=0)
        self._beads, self._atoms = beads - self._centre, structure[taken] - self._centre

    def __call__(self, ts: Timestep) -> Timestep:
        """Change ``ts``; threadpoolctl, which the base class uses, would cost 1.6 ms."""
        return self._transform(ts)

    def _transform(self, ts: Timestep) -> Timestep:
        beads = self._cg_map.apply(ts.positions.astype(np.float64))[self._whole]
        centre = beads.mean(axis=0)
        rotation, rmsd = rotation_matrix(self._beads, beads - centre)
        ts.positions[self._taken] = self._atoms @ rotation.T + centre
        ts.data["rest_rmsd"] = float(rmsd)
        ts.data.pop("log_prob", None)
        return ts
