"""Universes at both resolutions: CGMap from selections, topologies, bead Universes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import MDAnalysis as mda
import numpy as np
from ase.data import atomic_masses, atomic_numbers
from MDAnalysis.guesser.default_guesser import DefaultGuesser
from MDAnalysis.guesser.tables import vdwradii
from MDAnalysis.topology.base import change_squash

from ccg_ase.mapping import CGMap
from ccg_ase.topology import Topology
from ccg_ase.torsion_map import TorsionMap
from ccg_mda.readers import AtomReader

# A methyl of NME is also called C in some force fields; it isn't part of the backbone.
_SLICE_PRESETS = {
    "ca": "protein and name CA",
    "backbone": "protein and name N CA C and not (resname NME and name C)",
}
_GROUP_PRESETS = ("residue-com", "molecule-com")
PRESETS = (*_SLICE_PRESETS, "heavy", *_GROUP_PRESETS)


def cg_map(
    universe: mda.Universe | mda.AtomGroup,
    beads: str | Sequence[str] | Mapping[str, str],
    *,
    per: Literal["residue", "molecule"] | None = None,
    weighting: Literal["mass", "geometry"] = "mass",
) -> CGMap:
    """Make a CGMap from MDAnalysis selections.

    Parameters
    ----------
    universe
        The atoms to coarse-grain; the map counts the atoms of an AtomGroup from 0.
    beads
        ``{bead name: selection}`` or a list of selections: one bead each, in this order. A single
        selection: every atom of it is a bead. Or a preset: ``"ca"``; ``"backbone"`` (N, CA, C);
        ``"heavy"`` (all but hydrogens); ``"residue-com"``, ``"molecule-com"`` (centres of mass).
    per
        ``"residue"`` or ``"molecule"``: each of several selections is one bead in every residue
        (or molecule) that it has atoms in, and none in the others. Beads are ordered by residue,
        then as the selections are.
    weighting
        A bead of several atoms is at their centre of ``"mass"`` (default) or ``"geometry"``.

    Returns
    -------
    CGMap
        A bead has the residue name, residue number and segment of its first atom.

    Raises
    ------
    ValueError
        If a selection is empty; the selection is named.

    Example
    -------
    ::

        cg_map(u, {"NT": "resname ALA and name N", "CA": "name CA", "SC": "name CB HB*"})
        cg_map(u, {"BB": "backbone", "SC1": "name CB HB* CG HG*"}, per="residue")  # Martini-like
    """
    atoms = universe.atoms
    topology = topology_from(atoms)
    names = list(beads) if isinstance(beads, Mapping) else None
    if isinstance(beads, str):
        if per is not None:
            raise ValueError(
                f"per={per!r} needs {{bead name: selection}} or a list of selections, got {beads!r}"
            )
        groups = _groups(atoms, topology, beads)
    else:
        selections = list(beads.values() if isinstance(beads, Mapping) else beads)
        groups = [select_indices(atoms, selection) for selection in selections]
        for selection, group in zip(selections, groups, strict=True):
            if not group:
                raise ValueError(
                    f"the selection {selection!r} matches no atoms, hence no bead; names of atoms "
                    f"here are {_some_names(topology)}"
                )
        if per is not None:
            kinds, groups = _split(groups, _unit_of_atom(atoms, topology, per))
            names = None if names is None else [names[kind] for kind in kinds]
    if not groups:
        raise ValueError(
            f"{beads!r} selects no atoms, hence no beads; presets are {', '.join(PRESETS)}"
        )
    if all(len(group) == 1 for group in groups):
        return CGMap.from_slices(topology, [group[0] for group in groups], names)
    return CGMap.from_groups(topology, groups, names, weighting)


def torsion_map(
    universe: mda.Universe | mda.AtomGroup, torsions: Mapping[str, Sequence[str]]
) -> TorsionMap:
    """Make a TorsionMap, whose coarse variables are torsions, from MDAnalysis selections.

    Parameters
    ----------
    universe
        One molecule; the map counts the atoms of an AtomGroup from 0.
    torsions
        ``{name: four selections}``, each of one atom, bonded in this order.

    Raises
    ------
    ValueError
        If there aren't four selections, or one of them isn't a single atom.

    Example
    -------
    ::

        torsion_map(u, {"phi": ["resid 1 and name C", "resid 2 and name N", "resid 2 and name CA",
                                "resid 2 and name C"]})
    """
    atoms = universe.atoms
    topology = topology_from(atoms)
    rows = []
    for name, selections in torsions.items():
        if len(selections) != 4:
            raise ValueError(f"torsion {name!r} needs four selections, got {len(selections)}")
        groups = [select_indices(atoms, selection) for selection in selections]
        for selection, group in zip(selections, groups, strict=True):
            if len(group) != 1:
                raise ValueError(
                    f"torsion {name!r}: the selection {selection!r} matches {len(group)} atoms, "
                    f"not one; names of atoms here are {_some_names(topology)}"
                )
        rows.append([group[0] for group in groups])
    return TorsionMap(topology, np.array(rows, int).reshape(-1, 4), tuple(torsions))


def _some_names(topology: Topology) -> str:
    return " ".join(sorted(set(topology.names))[:30])


def _groups(atoms: mda.AtomGroup, topology: Topology, beads: str) -> list[list[int]]:
    """Return the atoms of every bead of a preset or of a single selection."""
    if beads == "heavy":
        return [[i] for i, element in enumerate(topology.elements) if element != "H"]
    if beads in _GROUP_PRESETS:
        unit = _unit_of_atom(atoms, topology, beads.removesuffix("-com"))
        return _split([list(range(len(atoms)))], unit)[1]
    selection = _SLICE_PRESETS.get(beads, beads)
    return [[i] for i in select_indices(atoms, selection)]


def _unit_of_atom(atoms: mda.AtomGroup, topology: Topology, per: str) -> np.ndarray:
    """Return which residue or molecule each atom is in, (n,), numbered as they appear."""
    if per not in ("residue", "molecule"):
        raise ValueError(f"per must be 'residue' or 'molecule', got {per!r}")
    labels = atoms.resindices if per == "residue" else topology.molecules
    _, first, unit = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[unit]


def _split(groups: list[list[int]], unit: np.ndarray) -> tuple[list[int], list[list[int]]]:
    """Cut groups of atoms by unit; return which group each piece is of, and the pieces."""
    pieces: dict[tuple[int, int], list[int]] = {}
    for kind, group in enumerate(groups):
        for i in group:
            pieces.setdefault((int(unit[i]), kind), []).append(i)
    keys = sorted(pieces)
    return [kind for _, kind in keys], [pieces[key] for key in keys]


def select_indices(atoms: mda.AtomGroup, selection: str) -> list[int]:
    """Return what a selection matches, as indices within ``atoms``, or say why it is none."""
    try:
        selected = atoms.select_atoms(selection)
    except mda.SelectionError as error:
        raise ValueError(
            f"{selection!r} is no selection of MDAnalysis ({error}); write e.g. 'resname ALA and "
            "name CA'"
        ) from error
    position = {ix: k for k, ix in enumerate(atoms.ix)}
    return [position[ix] for ix in selected.ix]


def topology_from(universe: mda.Universe | mda.AtomGroup) -> Topology:
    """Read the Topology of a Universe or AtomGroup.

    Elements and masses that are missing come from the atom names; missing bonds are guessed from
    distances in the current frame, across the borders of its box, with a warning. The Universe
    isn't changed. Types are ``"{resname}:{name}"``, since atoms of one type share network
    parameters.

    Parameters
    ----------
    universe
        The atoms; at least their names or elements must be known.
    """
    atoms = universe.atoms
    if not (hasattr(atoms, "names") or hasattr(atoms, "elements")):
        raise ValueError("the Universe knows neither names nor elements; add one of them")
    names = atoms.names if hasattr(atoms, "names") else atoms.elements
    elements = _elements(atoms, names)
    masses = np.array(getattr(atoms, "masses", np.zeros(len(atoms))), dtype=float)
    unknown = ~(masses > 0)
    masses[unknown] = [atomic_masses[atomic_numbers.get(e, 0)] for e in elements[unknown]]
    return Topology(
        names=tuple(names),
        masses=masses,
        elements=tuple(elements),
        resnames=tuple(atoms.resnames) if hasattr(atoms, "resnames") else None,
        resids=atoms.resids if hasattr(atoms, "resids") else None,
        segids=tuple(atoms.segids) if hasattr(atoms, "segids") else None,
        bonds=_bonds(atoms, elements),
        charges=getattr(atoms, "charges", None),
    )


def _elements(atoms: mda.AtomGroup, names: np.ndarray) -> np.ndarray:
    known = atoms.elements if hasattr(atoms, "elements") else [""] * len(atoms)
    guess = DefaultGuesser(atoms.universe).guess_atom_element
    symbols = [k or guess(n) for k, n in zip(known, names, strict=True)]
    return np.array([s.capitalize() if s else "X" for s in symbols], dtype=object)


def _bonds(atoms: mda.AtomGroup, elements: np.ndarray) -> np.ndarray:
    if hasattr(atoms, "bonds"):
        pairs = atoms.bonds.atomgroup_intersection(atoms, strict=True).indices
    elif len(atoms) == 1:
        return np.zeros((0, 2), dtype=int)
    else:
        warnings.warn(
            "the Universe has no bonds; guessing them from the distances in frame "
            f"{atoms.universe.trajectory.frame}. Load a topology with bonds, or call "
            "universe.atoms.guess_bonds() and check them",
            stacklevel=4,
        )
        pairs = np.array(_guessed_bonds(atoms, elements), dtype=int)
    pairs = pairs.reshape(-1, 2)
    order = np.argsort(atoms.ix)
    return order[np.searchsorted(atoms.ix, pairs, sorter=order)]


def _guessed_bonds(atoms: mda.AtomGroup, elements: np.ndarray) -> Sequence[tuple[int, int]]:
    """Guess bonds between the nearest images of atoms, by the radii of their elements."""
    known = {symbol.upper(): radius for symbol, radius in vdwradii.items()}
    types = atoms.types if hasattr(atoms, "types") else elements
    radii = {
        str(kind).upper(): known[element.upper()]
        for kind, element in zip(types, elements, strict=True)
        if element.upper() in known
    }
    guesser = DefaultGuesser(atoms.universe, box=atoms.dimensions, vdwradii=radii)
    try:
        return guesser.guess_bonds(atoms, atoms.positions)
    except ValueError as error:
        raise ValueError(
            f"the Universe has no bonds and they can't be guessed ({error}): load a topology with "
            "bonds or elements"
        ) from error


def universe_from(topology: Topology, trajectory: Any = None, **reader: Any) -> mda.Universe:
    """Make a Universe with all that a Topology knows, and optionally a trajectory.

    Parameters
    ----------
    topology
        Atoms or beads.
    trajectory
        Anything that `Universe.load_new` takes: file names, an array (n_frames, n, 3).
    **reader
        Further arguments of `Universe.load_new`.
    """
    columns = [np.array(topology.resids), np.array(topology.resnames), np.array(topology.segids)]
    resindex, (resids, resnames, segids) = change_squash(tuple(columns), tuple(columns))
    segindex, (segids,) = change_squash((segids,), (segids,))
    u = mda.Universe.empty(
        len(topology),
        n_residues=len(resids),
        n_segments=len(segids),
        atom_resindex=resindex,
        residue_segindex=segindex,
    )
    for key in ("names", "types", "elements", "masses"):
        u.add_TopologyAttr(key, np.array(getattr(topology, key)))
    for key, values in (("resids", resids), ("resnames", resnames), ("segids", segids)):
        u.add_TopologyAttr(key, values)
    if topology.charges is not None:
        u.add_TopologyAttr("charges", topology.charges)
    u.add_TopologyAttr("bonds", [tuple(pair) for pair in topology.bonds.tolist()])
    return u if trajectory is None else u.load_new(trajectory, **reader)


def coarse_grain(universe: mda.Universe | mda.AtomGroup, cg_map: CGMap) -> mda.Universe:
    """Show an atomistic trajectory as beads, frame by frame as they are read.

    Parameters
    ----------
    universe
        The atoms of the map; an AtomGroup if there are others (solvent) in the Universe.
    cg_map
        The map.

    Returns
    -------
    Universe
        A bead Universe with names, types, masses, bonds and residues; positions, velocities and
        forces (`CGMap.apply_forces`, in MDAnalysis' kJ/(mol Å)) where the atoms have them; box,
        time and ``ts.data``. Where there is a box, atoms of one bead that it cuts apart are put
        side by side first; `AtomReader` says how.
    """
    u = universe_from(require_beads(cg_map).beads)
    u.trajectory = AtomReader(universe, cg_map=cg_map)
    return u


def require_beads(cg_map: CGMap | TorsionMap) -> CGMap:
    """Return a map to beads as it is; refuse one to torsions, which no Universe can hold.

    Raises
    ------
    ValueError
        If the coarse variables are torsions.
    """
    if isinstance(cg_map, TorsionMap):
        raise ValueError(
            f"the coarse variables of this model are the torsions {', '.join(cg_map.names)}, not "
            "beads, so there is no bead trajectory: call the Backmapper with angles in radians"
        )
    return cg_map
