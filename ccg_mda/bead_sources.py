"""Bead Universes from what people have: files of any engine, arrays, Universes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import MDAnalysis as mda
import numpy as np
from MDAnalysis.coordinates.base import ProtoReader

from ccg_ase.mapping import CGMap
from ccg_ase.torsion_map import TorsionMap
from ccg_mda.ase_frames import read_ase
from ccg_mda.bead_names import BeadLabels, matching_order
from ccg_mda.engine_files import BoxedPDBReader, dump_reader
from ccg_mda.readers import AtomReader
from ccg_mda.universe import require_beads, universe_from

_ASE_SUFFIXES = {".traj", ".extxyz", ".json", ".db"}
_NAMING_SUFFIXES = {".gro", ".pdb", ".ent", ".pqr", ".mol2", ".xyz"}


def bead_universe(
    beads: str | PathLike[str] | np.ndarray | mda.Universe | mda.AtomGroup,
    model: Any,
    **reader: Any,
) -> mda.Universe:
    """Make a Universe of a model's beads, with what files don't hold: names, masses, bonds.

    Beads that have names of their own (GRO, PDB, a Universe with a PSF file, ...) are put in the
    order of the model, see `in_model_order`. Beads without are taken in their order, as are those
    of an XYZ file that knows none of the model's names, since it may hold chemical symbols.

    Parameters
    ----------
    beads
        A file: ASE's .traj, .extxyz, .json, .db, extended XYZ, a LAMMPS dump of any name, or what
        MDAnalysis reads (.xtc, .dcd, .trr, .gro, .pdb, .xyz, .h5md, .nc, ...). Or bead positions
        in Å as an array (n_frames, n_beads, 3), a Universe, or an AtomGroup.
    model
        A CGMap, a path of a model file, or anything with a ``cg_map``, e.g. a Backmapper.
    **reader
        Further arguments of the MDAnalysis reader, e.g. ``dt`` in ps, ``dimensions`` of an array,
        or ``format="LAMMPS", lengthunit="nm"`` of a DCD file. LAMMPS dumps are taken to be in Å;
        their ``dt`` is the time step of the simulation, since they number frames by steps.

    Returns
    -------
    Universe
        Names, types, masses, bonds and residues are those of the model; positions, box, times and,
        but for ASE's files, velocities and forces those of the source.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If number, names or residues of the beads differ, the file says that it belongs to another
        map or can't be read, or a box is periodic in some directions only.

    Example
    -------
    ::

        beads = bead_universe("dump.lammpstrj", "model.ccg", dt=0.01)
    """
    the_map = _map_of(model)
    if isinstance(beads, mda.Universe | mda.AtomGroup):
        if reader:
            raise TypeError(f"a {type(beads).__name__} has its reader already; drop {reader}")
        u = universe_from(the_map.beads)
        u.trajectory = _reordered(in_model_order(beads, the_map), the_map)
        return u
    if isinstance(beads, np.ndarray):
        if beads.shape[1:] != (the_map.n_beads, 3) or not len(beads):
            raise ValueError(
                f"expected beads of shape (n_frames, {the_map.n_beads}, 3), got {beads.shape}"
            )
        return universe_from(the_map.beads, beads, **reader)
    path = Path(beads)
    if not path.is_file():
        raise FileNotFoundError(f"no bead trajectory {str(beads)!r}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty; was the run that writes it cut off?")
    u = universe_from(the_map.beads)
    if _is_of_ase(path):
        u.trajectory = read_ase(str(path), the_map, **reader)
    elif path.suffix.lower() in _NAMING_SUFFIXES:
        u.trajectory = _named_reader(path, the_map, reader)
    else:
        dump = None if "format" in reader else dump_reader(path)
        if dump and "lengthunit" in reader:
            raise ValueError(
                "MDAnalysis takes LAMMPS dumps to be in Å, as LAMMPS' units real and metal are; "
                "pass other positions as an array in Å"
            )
        with _explained(path, the_map):
            u.load_new(str(path), **({"format": dump} | reader))
    return u


def in_model_order(beads: mda.Universe | mda.AtomGroup, cg_map: CGMap) -> mda.AtomGroup:
    """Return beads in the order of a map, by their names and residues.

    What agrees first decides: residue number and name (Martini repeats BB and SC1 in every
    residue), also if all residue numbers are shifted; the names alone; names within residues that
    come in the same order. Beads without names, or all called X, are taken as they are.

    Parameters
    ----------
    beads
        As many beads as the map has.
    cg_map
        The map.

    Raises
    ------
    ValueError
        If number, names or amino acids differ, or beads can't be told apart.
    """
    group = beads.atoms
    if len(group) != cg_map.n_beads:
        raise ValueError(
            f"the model has {cg_map.n_beads} beads, the given {type(beads).__name__} has "
            f"{len(group)}; select them with select_atoms, or use the matching model"
        )
    return group[matching_order(BeadLabels.of(group), cg_map.beads)]


def _map_of(model: Any) -> CGMap:
    if isinstance(model, str | PathLike):
        from ccg_ase.checkpoint import load_model

        model = load_model(model)
    return require_beads(model if isinstance(model, CGMap | TorsionMap) else model.cg_map)


def _reordered(beads: mda.AtomGroup, the_map: CGMap) -> AtomReader:
    """Return a reader of these beads only, in this order."""
    return AtomReader(beads, cg_map=CGMap.from_slices(the_map.beads, range(the_map.n_beads)))


def _named_reader(path: Path, the_map: CGMap, reader: dict[str, Any]) -> ProtoReader:
    """Read a file that names its beads, in the order of the map."""
    options = {"to_guess": (), **reader}
    if path.suffix.lower() in (".pdb", ".ent"):
        options |= {"format": BoxedPDBReader, "topology_format": "PDB"}
    with _explained(path, the_map):
        named = mda.Universe(str(path), **options)
        if len(named.atoms) != the_map.n_beads:
            raise ValueError(f"Number of atoms {len(named.atoms)}")
    if path.suffix.lower() == ".xyz" and not set(named.atoms.names) & set(the_map.beads.names):
        named.atoms.names = ""
    beads = in_model_order(named, the_map)
    if np.array_equal(beads.ix, named.atoms.ix):
        return named.trajectory
    reordered = _reordered(beads, the_map)
    named.trajectory.close()
    return reordered


@contextmanager
def _explained(path: Path, the_map: CGMap) -> Iterator[None]:
    """Say what couldn't be read, and why, in one sentence."""
    try:
        yield
    except (ValueError, TypeError, OSError, EOFError, IndexError) as error:
        reason = " ".join(str(error).split())  # MDAnalysis uses several lines
        raise ValueError(
            f"{path} can't be read as a trajectory of the model's {the_map.n_beads} beads "
            f"({reason}); use the model that it was made with"
        ) from error


def _is_of_ase(path: Path) -> bool:
    if path.suffix.lower() != ".xyz":
        return path.suffix.lower() in _ASE_SUFFIXES
    with path.open(errors="replace") as file:
        comment = [file.readline() for _ in range(2)][1]
    return "Properties=" in comment or "Lattice=" in comment
