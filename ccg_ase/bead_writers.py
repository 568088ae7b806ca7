"""AseBeadWriter: frames of a batch of replicas into ASE's trajectory files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import Trajectory
from ase.io.extxyz import write_extxyz

from ccg_ase.bead_frames import BeadFrames
from ccg_ase.mapping import CGMap


class FrameWriter(Protocol):
    """Anything that takes frames as a run makes them."""

    def write(self, frames: BeadFrames) -> None:
        """Take the next frames."""


def to_atoms(frames: BeadFrames, cg_map: CGMap, replicas: Sequence[int]) -> Iterator[Atoms]:
    """Yield ASE Atoms, frame by frame and replica by replica, with energies and origin.

    The energy is the force field's; ``info`` holds what else is known: step, time_fs, replica,
    walker, temperature_K, restraint_energy.

    Parameters
    ----------
    frames
        The frames.
    cg_map
        The map whose beads they are.
    replicas
        Which ones.
    """
    for k, step in enumerate(frames.steps):
        for replica in replicas:
            atoms = cg_map.to_ase(frames.beads[k, replica])
            box = frames.replica_box(replica)
            if box is not None:
                atoms.set_cell(box)
                atoms.pbc = True
            atoms.info |= {
                "step": int(step),
                "time_fs": float(step * frames.timestep_fs),
                "replica": int(replica),
                "walker": int(frames.walkers[k, replica]),
                "temperature_K": float(frames.temperatures_K[replica]),
                "restraint_energy": float(frames.restraint_energies[k, replica]),
            }
            energy = float(frames.energies[k, replica])
            atoms.calc = SinglePointCalculator(atoms, energy=energy, free_energy=energy)
            yield atoms


class AseBeadWriter:
    """Write replicas to one of ASE's files, or to anything with ``write(atoms)``.

    >>> with AseBeadWriter("run.extxyz", sampler.cg_map) as writer:
    ...     sampler.write([writer], beads, 1_000_000, every=500)

    Parameters
    ----------
    target
        A path that ends in .extxyz, .xyz (written as extended XYZ) or .traj, or an open
        `ase.io.Trajectory` or the like, which stays open.
    cg_map
        The map whose beads are written.
    replicas
        Which replicas go into this file, one after another within each frame.
    append
        Continue a file rather than replace it.

    Raises
    ------
    ValueError
        If the path has another ending.
    """

    def __init__(
        self,
        target: str | os.PathLike[str] | Any,
        cg_map: CGMap,
        replicas: Sequence[int] = (0,),
        *,
        append: bool = False,
    ):
        self._cg_map, self._replicas = cg_map, tuple(int(k) for k in np.atleast_1d(replicas))
        self._target, self._owned = target, isinstance(target, str | os.PathLike)
        if self._owned:
            kinds = {".extxyz": _ExtendedXYZ, ".xyz": _ExtendedXYZ, ".traj": Trajectory}
            suffix = Path(target).suffix
            if suffix not in kinds:
                raise ValueError(
                    f"no writer for {os.fspath(target)!r}: name it .extxyz, .xyz or .traj, or pass "
                    "an open ASE writer; for other formats see ccg_mda.bead_writer"
                )
            self._target = kinds[suffix](target, "a" if append else "w")

    def write(self, frames: BeadFrames) -> None:
        """Append frames."""
        for atoms in to_atoms(frames, self._cg_map, self._replicas):
            self._target.write(atoms)

    def close(self) -> None:
        """Close the file, if this writer opened it."""
        if self._owned:
            self._target.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _ExtendedXYZ:
    """An open extended XYZ file; `ase.io.write` would open and close it for every frame."""

    def __init__(self, path: str | os.PathLike[str], mode: str):
        self._file = open(path, mode, encoding="utf-8")  # noqa: SIM115 (closed by `close`)

    def write(self, atoms: Atoms) -> None:
        write_extxyz(self._file, [atoms])
        self._file.flush()  # a restart file written next must not be ahead of it

    def close(self) -> None:
        self._file.close()
