"""Readers that present one trajectory at another resolution: beads as atoms, atoms as beads.

A transformation can't change the number of sites of a trajectory, a reader can. Both readers own
an independent copy of their source, so that the user's current frame never moves, allow any order
of access, and can be copied and pickled.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from MDAnalysis import AtomGroup, Universe
from MDAnalysis.coordinates.base import ProtoReader, WriterBase
from MDAnalysis.coordinates.core import writer
from MDAnalysis.coordinates.timestep import Timestep

from ccg_ase.mapping import CGMap
from ccg_mda.whole_beads import WholeBeads


class MappedReader(ProtoReader):
    """Base of both readers: frames of a source trajectory, seen at another resolution.

    Subclasses say how many sites they expect and present, and fill the Timestep. It derives from
    ProtoReader because ReaderBase calls ``close()`` even after a failed constructor.

    Parameters
    ----------
    source
        Universe or AtomGroup; of an AtomGroup only its atoms are read, in its order.
    n_atoms
        Given by `Universe.load_new`; checked.
    cg_map
        The map between atoms and beads.
    n_samples
        Frames presented per source frame.
    format
        Given by `Universe.load_new`; ignored.
    """

    units = {  # noqa: RUF012 (MDAnalysis declares it so)
        "time": "ps",
        "length": "Angstrom",
        "velocity": "Angstrom/ps",
        "force": "kJ/(mol*Angstrom)",
    }

    def __init__(
        self,
        source: Universe | AtomGroup,
        n_atoms: int | None = None,
        *,
        cg_map: CGMap,
        n_samples: int = 1,
        format: Any = None,
    ) -> None:
        super().__init__()
        if not isinstance(source, Universe | AtomGroup):
            raise TypeError(
                f"{type(self).__name__} reads a Universe or AtomGroup, not a "
                f"{type(source).__name__}; pass the Universe rather than its trajectory"
            )
        if n_samples < 1:
            raise ValueError(f"n_samples must be at least 1, got {n_samples}")
        self.cg_map = cg_map
        self.n_samples = int(n_samples)
        n_source, self.n_atoms, what = self._sites()
        if len(source.atoms) != n_source:
            raise ValueError(
                f"the CGMap has {n_source} {what}, the given {type(source).__name__} has "
                f"{len(source.atoms)}; select them with select_atoms, or use the matching model"
            )
        if n_atoms not in (None, self.n_atoms):
            raise ValueError(f"topology has {n_atoms} sites, the CGMap presents {self.n_atoms}")
        trajectory = getattr(source.universe, "trajectory", ())
        if len(trajectory) == 0:
            raise ValueError("the given Universe has no frames; load a trajectory into it first")
        self._ix = source.atoms.ix.copy()
        self._source, self.filename = trajectory.copy(), trajectory.filename
        self.n_frames = len(self._source) * self.n_samples
        self.ts = Timestep(self.n_atoms)
        self._read_frame(0)

    def _sites(self) -> tuple[int, int, str]:
        """Return the number of sites of the source, of this reader, and the source's word."""
        raise NotImplementedError

    def _fill(self, ts: Timestep, source: Timestep) -> None:
        """Put positions and what else is known into ``ts``."""
        raise NotImplementedError

    def _read_frame(self, frame: int) -> Timestep:
        cg_frame, sample = divmod(frame, self.n_samples)
        source, ts = self._source[cg_frame], self.ts
        # A copied or unpickled Timestep has lost the way to its reader.
        ts._reader = weakref.ref(self)
        ts.frame = frame
        ts.data = {key: value for key, value in source.data.items() if key != "time_offset"}
        ts.data |= {"time": source.time, "cg_frame": cg_frame, "sample": sample}
        ts.dimensions = source.dimensions
        self._fill(ts, source)
        return ts

    def _read_next_timestep(self, ts: Timestep | None = None) -> Timestep:
        if self.ts.frame + 1 >= self.n_frames:
            raise EOFError
        return self._read_frame(self.ts.frame + 1)

    def _reopen(self) -> None:
        self.ts.frame = -1

    def _get_dt(self) -> float:
        return self._source.ts.dt

    def Writer(self, filename: str, n_atoms: int | None = None, **kwargs: Any) -> WriterBase:
        """Return a writer of the format that the name of the file tells; default all sites."""
        return writer(filename, n_atoms=self.n_atoms if n_atoms is None else n_atoms, **kwargs)

    def next_as_aux(self, auxname: str) -> Timestep:
        """Move to the next frame that has a step of the auxiliary within its cutoff.

        MDAnalysis counts frames by their times instead, which samples of one bead frame share.
        """
        auxiliary = self._check_for_aux(auxname)
        cutoff = np.inf if auxiliary.cutoff is None else auxiliary.cutoff
        ts = self.next()
        while not any(abs(delay) <= cutoff for delay in auxiliary.frame_data):
            ts = self.next()
        return ts

    @property
    def totaltime(self) -> float:
        """Time between first and last frame in ps; samples of one source frame share its time."""
        return self._source.totaltime

    def copy(self) -> MappedReader:
        """Return an independent reader at the same frame, with the same transformations."""
        new = copy.copy(self)
        new._source = self._source.copy()
        new.ts = self.ts.copy()
        new.ts._reader = weakref.ref(new)
        new._transformations = list(self._transformations)
        new._auxs = {}
        for name, auxiliary in self._auxs.items():
            new.add_auxiliary(name, auxiliary.copy())
        return new


class BeadFrame(NamedTuple):
    """Beads (n_beads, 3) in Å, their box (6,) in Å and degrees, if any, and which sample it is."""

    beads: np.ndarray
    dimensions: np.ndarray | None
    cg_frame: int
    sample: int


class BeadReader(MappedReader):
    """A bead trajectory of atomistic size, the host of `Backmap`.

    ``ts.data["beads"]`` holds the bead positions, float32 (n_beads, 3) in Å, ``"cg_frame"`` and
    ``"sample"`` say which bead frame and which of its ``n_samples`` reconstructions this is; the
    sample index runs fastest. Every atom sits at the bead that owns it until a transformation
    places it. Time, box and the other data are those of the bead frame.

    Parameters
    ----------
    source, n_atoms, cg_map, n_samples
        See `MappedReader`.
    atoms
        Indices of the atoms to present; default all of the map.

    Example
    -------
    ::

        u = mda.Universe("protein.pdb", u_cg, format=BeadReader, cg_map=model.cg_map,
                         transformations=[Backmap(model, seed=0)])
    """

    format = "CCG_BEADS"

    def __init__(
        self,
        source: Universe | AtomGroup,
        n_atoms: int | None = None,
        *,
        atoms: np.ndarray | None = None,
        **kwargs: Any,
    ) -> None:
        self._atoms = slice(None) if atoms is None else atoms
        super().__init__(source, n_atoms, **kwargs)

    def _sites(self) -> tuple[int, int, str]:
        self._bead_of_atom = np.maximum(self.cg_map.owner[self._atoms], 0)
        return self.cg_map.n_beads, len(self._bead_of_atom), "beads"

    def _fill(self, ts: Timestep, source: Timestep) -> None:
        beads = source.positions[self._ix]
        ts.data["beads"] = beads
        ts.positions = beads.take(self._bead_of_atom, axis=0)
        # Forces that a transformation wrote for the previous frame aren't those of this one.
        ts.has_forces = False

    def look_ahead(self, frames: Sequence[int]) -> list[BeadFrame]:
        """Return what coming frames hold. The current Timestep stays as it is."""
        keys = [divmod(frame, self.n_samples) for frame in frames]
        read: dict[int, tuple[np.ndarray, np.ndarray | None]] = {}
        for cg_frame, _ in keys:
            if cg_frame not in read:
                ts = self._source[cg_frame]
                box = None if ts.dimensions is None else ts.dimensions.copy()  # else a view of it
                read[cg_frame] = ts.positions[self._ix], box
        return [BeadFrame(*read[cg_frame], cg_frame, sample) for cg_frame, sample in keys]


class AtomReader(MappedReader):
    """An atomistic trajectory seen as beads: positions, velocities and forces.

    Where a frame has a box, atoms of one bead that it cuts apart are put side by side first
    (`WholeBeads`); otherwise molecules must be whole. Forces are those of `CGMap.apply_forces`; a
    map in which a bead has no atom to itself has none.
    """

    format = "CCG_ATOMS"

    def _sites(self) -> tuple[int, int, str]:
        return self.cg_map.n_atoms, self.cg_map.n_beads, "atoms"

    @cached_property
    def _whole(self) -> WholeBeads:
        return WholeBeads(self.cg_map)

    @cached_property
    def _maps_forces(self) -> bool:
        try:
            self.cg_map.force_matrix  # noqa: B018 (it raises where there is none)
        except ValueError:
            return False
        return True

    def _fill(self, ts: Timestep, source: Timestep) -> None:
        positions = source.positions[self._ix].astype(np.float64)
        if source.dimensions is not None and self.cg_map.kind != "slice":
            positions = self._whole(positions, source.dimensions)
        ts.positions = self.cg_map.apply(positions)
        ts.has_velocities = source.has_velocities
        if source.has_velocities:
            ts.velocities = self.cg_map.apply(source.velocities[self._ix].astype(np.float64))
        ts.has_forces = source.has_forces and self._maps_forces
        if ts.has_forces:
            ts.forces = self.cg_map.apply_forces(source.forces[self._ix].astype(np.float64))
