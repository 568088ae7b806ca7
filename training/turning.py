"""Bead states that dynamics wouldn't reach in time: dihedrals of the beads, turned all round.

Replicas of the bead system are held at dihedrals drawn from the whole circle, while a dihedral next
to the one that is held goes once round: together they see the plane of every such pair. It costs no
energy calls, and shows what the force field makes of basins behind barriers, where nobody has been:
the labels there tell whether it is right.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from ccg_ase.forcefield import ForceField
from ccg_ase.langevin import BatchedLangevin
from ccg_ase.restraints import DihedralRestraint
from ccg_ase.torsion_map import dihedral_angles
from ccg_mda.internals import wrapped

from .sampling import write_dcd

_STIFFNESS = 1.0  # eV/rad²: some 10° of spread at room temperature


def turn_dihedrals(
    force_field: ForceField,
    known: np.ndarray,
    path: str | os.PathLike[str],
    *,
    n_replicas: int,
    n_steps: int,
    save_every: int,
    timestep_fs: float = 4.0,
    friction_per_ps: float = 1.0,
    seed: int = 0,
) -> None:
    """Run replicas, each with one dihedral held and one next to it turned, and write their frames.

    Replica r holds dihedral r modulo their number, in random order, at an angle drawn evenly: the
    circle is cut into as many arcs as there are replicas of that dihedral. It starts from the known
    state whose dihedral is nearest. While frames are stored, a dihedral around a neighbouring bond
    is led once round from where it was, through values that it would avoid by itself.

    Parameters
    ----------
    force_field
        The bead potential.
    known
        States to start from, (N, n_beads, 3), Å.
    path
        DCD file to write, atomically; of beads without a dihedral, nothing is written.
    n_replicas, n_steps, save_every
        Replicas, steps of each, and steps between frames, which divide the steps; the first half
        isn't stored.
    timestep_fs, friction_per_ps, seed
        Of the dynamics.
    """
    dihedrals = force_field.cg_map.beads.dihedrals()
    if not len(dihedrals) or Path(path).exists():
        return
    rng = np.random.default_rng(seed)
    held = rng.permutation(len(dihedrals))[np.arange(n_replicas) % len(dihedrals)]
    turn = np.arange(n_replicas) // len(dihedrals)  # number of the replica among those of its own
    arcs = np.bincount(held, minlength=len(dihedrals))[held]
    centre = 2 * np.pi * (turn + rng.random(n_replicas)) / arcs - np.pi
    apart = dihedral_angles(known, dihedrals)[:, held] - centre
    nearest = np.abs(wrapped(apart)).argmin(0)
    starts, replica = known[nearest], np.arange(n_replicas)
    turned = _next_to(dihedrals, held, rng)
    # One restraint over all dihedrals, of which each replica feels its own.
    centres, stiffness = dihedral_angles(starts, dihedrals), np.zeros((n_replicas, len(dihedrals)))
    stiffness[replica, turned] = stiffness[replica, held] = _STIFFNESS
    centres[replica, held] = centre
    restraint = DihedralRestraint(dihedrals, centres, stiffness)
    dynamics = BatchedLangevin(
        force_field,
        timestep_fs=timestep_fs,
        friction_per_ps=friction_per_ps,
        seed=seed,
        restraints=[restraint],
        device=force_field.device,
    )
    half = n_steps // 2 // save_every * save_every
    dynamics.run(starts, half, max(1, half))
    n_frames = (n_steps - half) // save_every
    step = np.where(turned == held, 0.0, rng.choice([-1, 1], n_replicas) * 2 * np.pi / n_frames)
    frames = []
    for _ in range(n_frames):
        restraint.centre[replica, turned] += torch.from_numpy(step).to(restraint.centre)
        frames.append(dynamics.run(None, save_every, save_every).beads)
    write_dcd(path, np.concatenate(frames), timestep_fs * save_every)


def _next_to(dihedrals: np.ndarray, held: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw for every dihedral that is held one around a bond next to its own, or itself."""
    bonds = dihedrals[:, 1:3]
    next_to = (bonds[held][:, None, :, None] == bonds[None, :, None, :]).sum((-1, -2)) == 1
    draw = np.where(next_to, rng.random(next_to.shape), -1.0)
    return np.where(next_to.any(1), draw.argmax(1), held)
