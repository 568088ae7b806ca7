"""Readers of files whose boxes MDAnalysis gets wrong: LAMMPS dumps and PDB files of models."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
from MDAnalysis.coordinates.LAMMPS import DumpReader
from MDAnalysis.coordinates.PDB import PDBReader
from MDAnalysis.coordinates.timestep import Timestep

_EDGES = set("pfsm")  # LAMMPS' letters: periodic, fixed, shrink-wrapped, so with a minimum
_CRYST1 = ((6, 15), (15, 24), (24, 33), (33, 40), (40, 47), (47, 54))  # columns of a, b, c, α, β, γ


def dump_reader(path: Path) -> type[DumpReader] | None:
    """Return the reader of a LAMMPS dump, known by its first line, or None for other files.

    Raises
    ------
    ValueError
        If beads have no ids, the box is periodic in some directions only, or MDAnalysis doesn't
        know the header.
    """
    with path.open("rb") as file:
        lines = [file.readline(1000) for _ in range(9)]
    if not lines[0].startswith(b"ITEM:"):
        return None
    box, columns = (lines[k].decode().split() for k in (4, 8))
    if box[:2] != ["ITEM:", "BOX"] or columns[:2] != ["ITEM:", "ATOMS"]:
        raise ValueError(
            f"{path} begins with {lines[0].decode().strip()!r} and isn't a dump that MDAnalysis "
            "reads; write it in the style atom or custom, without dump_modify units or time"
        )
    if "id" not in columns:
        raise ValueError(
            f"{path} doesn't say which bead is which, since LAMMPS changes their order as it runs; "
            "write a dump with ids"
        )
    flags = {word for word in box if len(word) == 2 and set(word) <= _EDGES}
    if flags == {"pp"} or not flags:
        return DumpReader
    if "pp" in flags:
        raise ValueError(
            f"the box of {path} is periodic in some directions only ({' '.join(sorted(flags))}), "
            "which no box of MDAnalysis can say; pass positions and dimensions as arrays"
        )
    return OpenDumpReader


class OpenDumpReader(DumpReader):
    """A LAMMPS dump of a system without periodic boundaries: its bounds aren't a box."""

    def _read_next_timestep(self) -> Timestep:
        ts = super()._read_next_timestep()
        ts.dimensions = None
        return ts


class BoxedPDBReader(PDBReader):
    """PDB models in the box that was given last; MDAnalysis drops one given once, before them."""

    @cached_property
    def _boxes(self) -> np.ndarray:
        """Boxes of all models, (n_frames, 6); zeros stand for none, or the placeholder of 1 Å."""
        box, boxes, fresh = np.zeros(6), [], True
        with open(self.filename, "rb") as file:
            for line in file:
                if line.startswith(b"CRYST1"):
                    box = np.array([float(line[a:b]) for a, b in _CRYST1])
                    box *= not (box[:3] == 1).all()
                elif line.startswith(b"MODEL"):
                    fresh = True
                elif fresh and line.startswith((b"ATOM", b"HETATM")):
                    boxes.append(box)
                    fresh = False
        return np.array(boxes)

    def _read_frame(self, frame: int) -> Timestep:
        ts = super()._read_frame(frame)
        ts.dimensions = self._boxes[frame]
        return ts
