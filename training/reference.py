"""Reference data: atomistic frames with forces and energies, generated or read from files.

Units inside are Å, eV, eV/Å and ps. OpenMM (nm, kJ/mol) and MDAnalysis (Å, kJ/mol/Å) are converted
here and nowhere else in the training package.
"""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from ase import units

from ccg_ase.files import replaced

if TYPE_CHECKING:
    from MDAnalysis import Universe

    from .config import Config

MDANALYSIS_FORCE = units.kJ / units.mol  # kJ/mol/Å -> eV/Å
Tick = Callable[[int, int], None]
COLUMNS = ("positions", "forces", "energy", "walker", "time_ps")
"""Attributes of `ReferenceData` with an entry for every frame."""
_MANY_WALKERS = 20


class ReferenceDataError(ValueError):
    """Reference data that can't be read, don't fit together or can't be generated."""


@dataclass(frozen=True, eq=False)
class ReferenceData:
    """Frames of one molecule.

    Attributes
    ----------
    positions
        (N, n, 3) float64, in Å.
    forces
        (N, n, 3) in eV/Å, or None.
    energy
        (N,) in eV, or None.
    walker
        (N,) int: the trajectory that a frame belongs to. Frames of a walker are in order of time.
    time_ps
        (N,) time within the walker, in ps.
    biased
        Whether a bias along the coarse variables made the frames (umbrella sampling, metadynamics,
        restraints). p(x|s) is right all the same; populations, and what follows from them, aren't.
    """

    positions: np.ndarray
    forces: np.ndarray | None = None
    energy: np.ndarray | None = None
    walker: np.ndarray | None = None
    time_ps: np.ndarray | None = None
    biased: bool = False

    def __post_init__(self) -> None:
        count = len(self.positions)
        walker = np.zeros(count, int) if self.walker is None else self.walker
        time_ps = np.arange(float(count)) if self.time_ps is None else self.time_ps
        object.__setattr__(self, "walker", np.asarray(walker, int))
        object.__setattr__(self, "time_ps", np.asarray(time_ps, float))
        shape = np.shape(self.positions)
        if len(shape) != 3 or shape[2] != 3 or count == 0:
            raise ReferenceDataError(f"expected positions (frames, atoms, 3); got {shape}")
        for name in ("positions", "forces", "energy"):
            array = getattr(self, name)
            if array is None:
                continue
            array = np.asarray(array, float)
            object.__setattr__(self, name, array)
            expected = shape[:1] if name == "energy" else shape
            if array.shape != expected:
                raise ReferenceDataError(f"expected {name} {expected}; got {array.shape}")
            wrong = ~np.isfinite(array.reshape(count, -1)).all(axis=1)
            if wrong.any():
                raise ReferenceDataError(
                    f"{name} of frame {wrong.argmax()} are not finite ({wrong.sum()} such frames): "
                    "drop these frames, or rerun the simulation with a shorter time step"
                )
        if len(self.walker) != count or len(self.time_ps) != count:
            raise ReferenceDataError(f"walker and time_ps need {count} entries, one per frame")

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: slice | np.ndarray) -> ReferenceData:
        """Return the frames of a slice, a mask or an index array."""
        arrays = {name: getattr(self, name) for name in COLUMNS}
        return replace(self, **{k: v if v is None else v[index] for k, v in arrays.items()})

    @property
    def n_atoms(self) -> int:
        """Atoms per frame."""
        return self.positions.shape[1]

    def blocks(self) -> np.ndarray:
        """Return the number of the block that each frame is in, (N,): frames of a block are alike.

        Neighbouring frames are correlated, so single frames held out would be known from their
        neighbours: 100 contiguous blocks of every walker. Of 20 walkers or more, each is a block:
        what such data ask is whether a model holds at walkers (coarse states) that it doesn't know.
        """
        walkers, block = np.unique(self.walker, return_inverse=True)
        if len(walkers) < _MANY_WALKERS:
            for k, walker in enumerate(walkers):
                (index,) = np.nonzero(self.walker == walker)
                block[index] = 100 * k + np.arange(len(index)) * 100 // len(index)
        return block

    def split(self, holdout_fraction: float = 0.1) -> tuple[ReferenceData, ReferenceData]:
        """Split into training and held-out frames, by `blocks` at even distances.

        Returns
        -------
        train, held_out
        """
        block = self.blocks()
        step = np.floor((block + 1) * holdout_fraction + 0.5)
        held = step > np.floor(block * holdout_fraction + 0.5)
        if held.all() or not held.any():
            raise ReferenceDataError(
                f"{len(self)} frames are too few to hold out {holdout_fraction:.0%} of them"
            )
        return self[~held], self[held]

    def save(self, path: str | Path, *, calls: int = 0) -> None:
        """Write an NPZ file, atomically; `calls` are the energy calls that the frames cost."""
        arrays = {f.name: getattr(self, f.name) for f in fields(self)} | {"calls": calls}
        write_npz(path, {k: np.asarray(v) for k, v in arrays.items() if v is not None})

    @classmethod
    def load(cls, path: str | Path) -> ReferenceData:
        """Read an NPZ file with `positions` (Å) and, as far as known, the other attributes."""
        arrays = read_npz(path)
        if "positions" not in arrays:
            raise ReferenceDataError(
                f"{path} holds no array 'positions' (frames, atoms, 3) in Å; it holds: "
                + ", ".join(sorted(arrays))
            )
        columns = {name: arrays.get(name) for name in COLUMNS}
        return cls(**columns, biased=bool(arrays.get("biased", False)))


def write_npz(path: str | Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an NPZ file so that it is either complete or not there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as file:
        np.savez(file, **arrays)


def read_npz(path: str | Path) -> dict[str, np.ndarray]:
    """Read all arrays of an NPZ file; pickled objects are refused."""
    try:
        # Opened here: np.load leaves a file that it can't read open.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except FileNotFoundError:
        raise ReferenceDataError(f"no such file: {path}") from None
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, TypeError) as error:
        raise ReferenceDataError(
            f"{path} can't be read as an NPZ file of arrays ({error}): is it truncated?"
        ) from error


def read_structure(path: str | Path) -> Universe:
    """Open a topology file with MDAnalysis; one error for whatever is wrong with it."""
    from MDAnalysis import Universe

    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        return Universe(str(path))
    except Exception as error:  # its parsers raise whatever they stumble over
        reason = " ".join(str(error).split())
        raise ReferenceDataError(
            f"{path} can't be read as a structure ({reason}): is it a PDB file with atoms?"
        ) from error


def read_trajectory(
    topology: str | Path,
    files: Sequence[str | Path],
    *,
    forces_file: str | Path | None = None,
    stride: int = 1,
) -> ReferenceData:
    """Read frames through MDAnalysis, or from NPZ files; every file is one walker.

    Parameters
    ----------
    topology
        Any topology that MDAnalysis reads; sets the number of atoms.
    files
        Trajectories. A partial last frame is an error, except in XTC and DCD files, from which
        MDAnalysis drops it (the frames before it are whole). Forces are taken where the format
        holds them (TRR, H5MD). NPZ files hold `positions` (Å) and may hold `forces` (eV/Å),
        `energy` (eV) and `time_ps`.
    forces_file
        NPZ with `forces` (eV/Å), and optionally `energy` (eV) and `positions` (Å, compared), for
        all frames of all files, in order, before `stride`.
    stride
        Use every stride-th frame.

    Raises
    ------
    ReferenceDataError
        Another number of atoms than the topology, a truncated file, frames that are not finite,
        or forces in some files only.
    """
    n_atoms = len(read_structure(topology).atoms)
    parts = []
    for walker, file in enumerate(map(Path, files)):
        if file.suffix == ".npz":
            part = ReferenceData.load(file)
        else:
            part = _read_with_mdanalysis(topology, file, n_atoms)
        if part.n_atoms != n_atoms:
            raise ReferenceDataError(
                f"{file} has {part.n_atoms} atoms, the topology {topology} has {n_atoms}: "
                "use the topology of this trajectory"
            )
        parts.append(replace(part, walker=np.full(len(part), walker)))
    data = _concatenate(parts, [str(file) for file in files])
    if forces_file is not None:
        data = _with_forces(data, Path(forces_file))
    keep = [np.nonzero(data.walker == walker)[0][::stride] for walker in np.unique(data.walker)]
    return data[np.concatenate(keep)]


def _read_with_mdanalysis(topology: str | Path, file: Path, n_atoms: int) -> ReferenceData:
    from MDAnalysis import Universe

    try:
        trajectory = Universe(str(topology), str(file)).trajectory
    except (ValueError, OSError, EOFError, TypeError) as error:
        reason = " ".join(str(error).split())  # MDAnalysis uses several lines
        raise ReferenceDataError(
            f"{file} can't be opened with {topology} ({n_atoms} atoms): {reason}; use the topology "
            "of this trajectory"
        ) from error
    positions, forces, times = [], [], []
    try:
        for ts in trajectory:
            positions.append(ts.positions.astype(float))
            times.append(ts.time)
            if ts.has_forces:
                forces.append(ts.forces.astype(float) * MDANALYSIS_FORCE)
    except (OSError, EOFError, ValueError, IndexError) as error:
        cause: Exception | None = error
    else:
        cause = None
    if cause is not None or len(positions) < trajectory.n_frames:
        raise ReferenceDataError(
            f"{file} is truncated: frame {len(positions)} of {trajectory.n_frames} can't be read; "
            "cut the file before that frame, or copy it again"
        ) from cause
    if len(forces) not in (0, len(positions)):
        raise ReferenceDataError(
            f"{file} holds forces for {len(forces)} of {len(positions)} frames: write forces as "
            "often as positions (GROMACS: nstfout = nstxout)"
        )
    return ReferenceData(np.array(positions), np.array(forces) if forces else None, time_ps=times)


def _concatenate(parts: list[ReferenceData], names: list[str]) -> ReferenceData:
    arrays = {}
    for column in COLUMNS:
        values = [getattr(part, column) for part in parts]
        without = [name for name, value in zip(names, values, strict=True) if value is None]
        if without and len(without) < len(parts):
            raise ReferenceDataError(
                f"{', '.join(without)} hold no {column}, the other files do: "
                "give all files with, or all without"
            )
        arrays[column] = None if without else np.concatenate(values)
    return ReferenceData(**arrays, biased=any(part.biased for part in parts))


def _with_forces(data: ReferenceData, file: Path) -> ReferenceData:
    arrays = read_npz(file)
    if "forces" not in arrays:
        raise ReferenceDataError(f"{file} holds no array 'forces' (frames, atoms, 3) in eV/Å")
    if len(arrays["forces"]) != len(data):
        raise ReferenceDataError(
            f"{file} holds forces for {len(arrays['forces'])} frames, the trajectory has "
            f"{len(data)}: give forces for every frame, before the stride"
        )
    if "positions" in arrays:
        apart = np.abs(arrays["positions"] - data.positions).max(axis=(1, 2))
        if apart.max() > 0.02:  # XTC rounds to 0.01 Å
            raise ReferenceDataError(
                f"positions in {file} differ from the trajectory, first in frame "
                f"{(apart > 0.02).argmax()}: the forces belong to other frames"
            )
    return replace(data, forces=arrays["forces"], energy=arrays.get("energy"))


def trajectory_of(config: Config) -> ReferenceData:
    """Read the files of the [reference] section.

    Raises
    ------
    ReferenceDataError
        By `read_trajectory`, or if a file of ours is biased and the section doesn't say so.
    """
    settings = config.reference
    data = read_trajectory(
        config.system.topology,
        settings.files,
        forces_file=settings.forces_file,
        stride=settings.stride,
    )
    if data.biased and not settings.biased:
        raise ReferenceDataError(
            "the frames were made with a bias along the coarse variables, as their file says: set "
            "biased = true in [reference], so that nothing is concluded from populations"
        )
    return replace(data, biased=settings.biased)


def reference_data(config: Config, directory: Path, tick: Tick | None = None) -> ReferenceData:
    """Return the reference data of a run: from `directory`/reference.npz, else read or make them.

    Chunks are kept in `directory`/reference until the run has them all, so an interrupted run goes
    on where it stopped. `tick` is called with how much is done, and how much there is to do.
    """
    stored = directory / "reference.npz"
    if stored.is_file():
        return ReferenceData.load(stored)
    calls = 0
    if config.reference.source == "trajectory":
        data = trajectory_of(config)
    elif config.reference.source == "structure":
        from .starting import data_from_config

        data, calls = data_from_config(config, directory / "reference", tick)
    else:
        from .generate import generate_from_config

        data, calls = generate_from_config(config, directory / "reference", tick)
    data.save(stored, calls=calls)
    shutil.rmtree(directory / "reference", ignore_errors=True)  # the chunks are in the file now
    return data
