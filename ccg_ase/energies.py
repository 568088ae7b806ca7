"""Energies and forces of many bead frames, as arrays."""

from __future__ import annotations

import numpy as np
import torch

from ccg_ase.forcefield import ForceField


def bead_energies(
    force_field: ForceField,
    beads: np.ndarray,
    boxes: np.ndarray | None = None,
    *,
    batch_size: int = 2000,
) -> tuple[np.ndarray, np.ndarray]:
    """Return free energies and mean forces of a force field, at its temperature.

    Parameters
    ----------
    force_field
        The force field; it computes in its own dtype.
    beads
        In Å, (N, n_beads, 3).
    boxes
        Cell vectors as rows in Å, (N, 3, 3), for a periodic force field.
    batch_size
        Frames at once.

    Returns
    -------
    energies, forces
        F in eV, (N,), and -∂F/∂s in eV/Å, (N, n_beads, 3); float64.
    """
    parts = []
    for start in range(0, len(beads), batch_size):
        own = slice(start, start + batch_size)
        batch = torch.from_numpy(np.asarray(beads[own], dtype=np.float64)).to(force_field.device)
        box = None
        if boxes is not None:
            box = torch.from_numpy(np.asarray(boxes[own])).to(batch).to(force_field.dtype)
        else:
            batch = batch - batch.mean(-2, keepdim=True)  # far from the origin float32 is coarse
        parts.append(force_field.energy_and_forces(batch.to(force_field.dtype), box=box))
    energies, forces = (
        torch.cat(column).double().cpu().numpy() for column in zip(*parts, strict=True)
    )
    return energies, forces


def prior_energies(
    force_field: ForceField, beads: np.ndarray, *, batch_size: int = 2000
) -> np.ndarray:
    """Return what the prior of a force field says of beads in open space (N, n_beads, 3), in eV."""
    parts = []
    for start in range(0, len(beads), batch_size):
        batch = torch.from_numpy(np.asarray(beads[start : start + batch_size], dtype=np.float64))
        parts.append(force_field.prior(batch.to(force_field.device, force_field.dtype)))
    return torch.cat(parts).double().cpu().numpy()
