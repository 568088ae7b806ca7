"""Bead trajectories in ASE's files, as a reader of MDAnalysis."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from typing import Any

import numpy as np
from ase import Atoms
from ase.io import iread
from ase.io.formats import UnknownFileTypeError
from MDAnalysis.coordinates.memory import MemoryReader
from MDAnalysis.coordinates.timestep import Timestep

from ccg_ase.mapping import CGMap
from ccg_mda.bead_names import BeadLabels, matching_order


class AseFrames(MemoryReader):
    """Frames of an ASE file, held in memory, each with the time that the file gives it.

    Parameters
    ----------
    coordinate_array
        Positions in Å, shape (n_frames, n, 3).
    times
        Times in ps, shape (n_frames,), or None: then they follow from ``dt``.
    **options
        See `MemoryReader`.
    """

    def __init__(
        self, coordinate_array: np.ndarray, *, times: np.ndarray | None = None, **options: Any
    ) -> None:
        self._times = times
        super().__init__(coordinate_array, **options)
        self._kwargs["times"] = times  # what copy() hands to a new reader

    def _read_next_timestep(self, ts: Timestep | None = None) -> Timestep:
        ts = super()._read_next_timestep(ts)
        if self._times is not None:
            ts.time = float(self._times[ts.frame])
        return ts


def read_ase(path: str, cg_map: CGMap, **options: Any) -> AseFrames:
    """Read the beads of a map from a file of ASE, frame after frame.

    Beads that carry names (``cg_map.to_ase`` gives them) are put in the order of the map. A cell
    that is periodic in all directions becomes the box; beads are turned with it, as MDAnalysis has
    the first vector of a box along x, and the second one in the xy-plane. Times come from
    ``info["time_fs"]``, which our writers set.

    Parameters
    ----------
    path
        Anything that `ase.io.read` takes.
    cg_map
        The map.
    **options
        Options of `MemoryReader` that replace what the file says: ``dt`` in ps, ``dimensions``.

    Raises
    ------
    ValueError
        If the file holds no frames, beads of another map, or a cell that no box can be.
    """
    positions, boxes, times, order = [], [], [], None
    for k, frame in enumerate(_frames(path)):
        written_for = frame.info.get("cg_map", cg_map.fingerprint())
        if len(frame) != cg_map.n_beads or written_for != cg_map.fingerprint():
            raise ValueError(
                f"frame {k} of {path!r} holds {len(frame)} beads of the map {written_for}, the "
                f"model has {cg_map.n_beads} of the map {cg_map.fingerprint()}; use the model "
                "that the trajectory was made with"
            )
        if order is None:
            order = matching_order(_labels(frame), cg_map.beads)
        try:
            turned, box = _upright(frame)
        except ValueError as error:
            raise ValueError(f"frame {k} of {path!r} {error}") from None
        positions.append(turned[order].astype(np.float32))
        boxes.append(box)
        times.append(frame.info.get("time_fs", np.nan))
    if not positions:
        raise ValueError(f"{path!r} holds no frames")
    found: dict[str, Any] = {"dimensions": np.array(boxes), "filename": path}
    if "dt" not in options and np.isfinite(times).all():
        found["times"] = np.array(times) / 1000
        found["dt"] = float(np.diff(found["times"][:2]).sum()) or 1.0
    return AseFrames(np.array(positions), **(found | options))


def _frames(path: str) -> Iterator[Atoms]:
    try:
        yield from iread(path, index=":", do_not_split_by_at_sign=True)
    except (OSError, ValueError, LookupError, UnknownFileTypeError, sqlite3.Error) as error:
        raise ValueError(f"{path!r} can't be read: {' '.join(str(error).split())}") from error


def _labels(frame: Atoms) -> BeadLabels:
    columns = (frame.arrays.get(key) for key in ("atomtypes", "residuenames"))
    names, resnames = (None if c is None else tuple(str(word) for word in c) for c in columns)
    return BeadLabels(names, frame.arrays.get("residuenumbers"), resnames)


def _upright(frame: Atoms) -> tuple[np.ndarray, np.ndarray]:
    """Return positions (n, 3) and box (6,) in MDAnalysis' frame; zeros stand for no box."""
    if not frame.pbc.any():
        return frame.positions, np.zeros(6)
    if not frame.pbc.all():
        raise ValueError(
            "is periodic in some directions only, which no box of MDAnalysis can say; set pbc in "
            "all directions, with a cell wide enough, or in none"
        )
    if frame.cell.handedness != 1:
        raise ValueError("has a cell that is flat or left-handed; swap two of its vectors")
    _, rotation = frame.cell.standard_form()
    return frame.positions @ rotation.T, frame.cell.cellpar()
