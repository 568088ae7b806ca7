"""The plain map of forces: from the forces on atoms to those on beads, for every linear map.

For beads s = M x, moving the atoms by δx = Bᵀ δs moves the beads by δs if and only if B Mᵀ = 1.
Then B f is an unbiased value of the mean force of the beads (Ciccotti, Kapral and Vanden-Eijnden,
ChemPhysChem 6, 1809 (2005), theory 5.7).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.sparse import coo_array, csr_array

if TYPE_CHECKING:
    from ccg_ase.mapping import CGMap


def plain_force_matrix(cg_map: CGMap, group: np.ndarray) -> csr_array:
    """Return B in which each bead has the sum of the forces on its own atoms.

    A slice bead has the force on its atom, a centre of mass (or of geometry) of atoms that are in
    no other bead the sum of forces on them. In general, the groups that only this bead has move
    together.

    Parameters
    ----------
    cg_map
        The map of positions, M.
    group
        Which atoms move as one, by label from 0, shape (n_atoms,): each atom by itself, or the
        groups that rigid bonds join.

    Returns
    -------
    csr_array
        B, shape (n_beads, n_atoms), with B Mᵀ = 1.

    Raises
    ------
    ValueError
        If a bead has no group to itself.
    """
    members = coo_array((np.ones(len(group)), (np.arange(len(group)), group))).tocsr()
    shares = (cg_map.matrix @ members).tocoo()
    own = np.bincount(shares.col, minlength=members.shape[1])[shares.col] == 1
    bead, shared_by = shares.row[own], shares.col[own]
    weight = np.bincount(bead, shares.data[own], minlength=cg_map.n_beads)
    if not weight.all():
        without = int(np.argmin(weight))
        raise ValueError(
            f"bead {without} ({cg_map.beads.names[without]}) shares each of its atoms, or the "
            "rigid groups that they are in, with other beads, so that no plain force map exists; "
            "use ForceMap.optimal of ccg_training, or keep one bead per rigid group"
        )
    entries = coo_array((1 / weight[bead], (bead, shared_by)), shape=shares.shape)
    return (entries.tocsr() @ members.T).tocsr()
