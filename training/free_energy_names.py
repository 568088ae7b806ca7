"""Variables as people write them: names of torsions, or kinds with beads or atoms as sites."""

from __future__ import annotations

import numpy as np

from ccg_ase.mapping import CGMap
from ccg_ase.topology import Topology
from ccg_ase.torsion_map import TorsionMap
from ccg_mda.placement import atom_label

from .config_text import nearest
from .free_energy_grid import RESTRAINTS, Grid, Variable

_SITES = {"distance": 2, "angle": 3, "torsion": 4}


def variables_of(
    texts: list[str], the_map: CGMap | TorsionMap, torsions: dict[str, tuple[int, ...]]
) -> list[Variable]:
    """Read variables for a model.

    Parameters
    ----------
    texts
        ``NAME`` of a torsion, or ``[NAME=]KIND:SITE-SITE...`` with KIND distance, angle or torsion.
        A site is a bead by name, by number from 0, or by residue and name (``ALA2:CA``); where
        there is no such bead, an atom by residue and name.
    the_map
        Of the model.
    torsions
        Atoms of torsions that have a name.

    Returns
    -------
    list of Variable
        Over beads where all sites are beads, or atoms that are beads of their own; else over atoms.

    Raises
    ------
    ValueError
        If a text can't be read, or names what isn't there.
    """
    found = [_variable(text, the_map, torsions) for text in texts]
    if isinstance(the_map, TorsionMap):
        return [_of_torsion_map(variable, the_map) for variable in found]
    return [on_beads(variable, the_map) for variable in found]


def _variable(
    text: str, the_map: CGMap | TorsionMap, torsions: dict[str, tuple[int, ...]]
) -> Variable:
    name, _, definition = text.rpartition("=")
    name, definition = name.strip(), definition.strip()
    if ":" not in definition:
        if definition not in torsions:
            known = f"; known names: {', '.join(torsions)}" if torsions else ""
            raise ValueError(
                f"--on {text!r} names no torsion of the model or of [mapping.torsions]{known}"
                f"{nearest(definition, list(torsions))}; give its sites, such as "
                "--on 'phi=torsion:C1-N2-CA2-C2' or 'distance:0-4'"
            )
        return Variable(name or definition, "torsion", torsions[definition], of_beads=False)
    kind, _, sites = definition.partition(":")
    if kind not in RESTRAINTS:
        raise ValueError(
            f"--on {text!r}: {kind!r} is no kind of variable; give {', '.join(RESTRAINTS)}"
            + nearest(kind, list(RESTRAINTS))
        )
    words = [word.strip() for word in sites.split("-")]
    if len(words) != _SITES[kind] or len(set(words)) < len(words):
        raise ValueError(
            f"--on {text!r}: a {kind} is over {_SITES[kind]} different sites, joined by '-'"
        )
    atoms = the_map.atoms
    beads = None if isinstance(the_map, TorsionMap) else the_map.beads
    as_beads = [None] if beads is None else [_site(word, beads, text) for word in words]
    if None not in as_beads:
        return Variable(name or definition, kind, tuple(as_beads))
    numbers = [_site(word, atoms, text, labels_only=True) for word in words]
    if None in numbers:
        word = words[(as_beads if any(n is not None for n in as_beads) else numbers).index(None)]
        labels = [atom_label(atoms, k) for k in range(len(atoms))]
        known = labels if beads is None else [*beads.names, *labels]
        range_of = "" if beads is None else f" (beads count from 0 to {len(beads) - 1})"
        raise ValueError(f"--on {text!r}: no site {word!r}{range_of}{nearest(word, known)}")
    return Variable(name or definition, kind, tuple(numbers), of_beads=False)


def _site(word: str, topology: Topology, text: str, *, labels_only: bool = False) -> int | None:
    """Return the number of a site, or None if there is none of that name."""
    if not labels_only:
        if word.isdigit():
            return int(word) if int(word) < len(topology) else None
        same = [k for k, name in enumerate(topology.names) if name == word]
        if len(same) > 1:
            raise ValueError(
                f"--on {text!r}: {len(same)} beads are called {word}; write the residue too, such "
                f"as {atom_label(topology, same[0])}, or its number from 0"
            )
        if same:
            return same[0]
    labels = [atom_label(topology, k) for k in range(len(topology))]
    return labels.index(word) if word in labels else None


def on_beads(variable: Variable, cg_map: CGMap) -> Variable:
    """Return a variable over atoms as one over beads, if all its atoms are beads of their own."""
    if variable.of_beads or cg_map.kind != "slice":
        return variable
    bead_of = {int(atom): bead for bead, atom in enumerate(cg_map.bead_atoms)}
    if not all(atom in bead_of for atom in variable.sites):
        return variable
    sites = tuple(bead_of[atom] for atom in variable.sites)
    return Variable(variable.name, variable.kind, sites)


def on_atoms(variable: Variable, the_map: CGMap | TorsionMap) -> Variable:
    """Return a variable over beads as one over atoms, if each bead is an atom."""
    if not variable.of_beads or the_map.kind != "slice":
        return variable
    sites = tuple(int(the_map.bead_atoms[bead]) for bead in variable.sites)
    return Variable(variable.name, variable.kind, sites, of_beads=False)


def _of_torsion_map(variable: Variable, torsion_map: TorsionMap) -> Variable:
    """Check that a variable is one of the torsions of a model."""
    rows = [tuple(row) for row in torsion_map.torsions.tolist()]
    if variable.sites in rows or variable.sites[::-1] in rows:
        return variable
    raise ValueError(
        f"{variable.name} is none of the torsions of this model ({', '.join(torsion_map.names)}): "
        "its flow knows F over these only; use a bead model for others"
    )


def torsion_grid(grid: Grid, torsion_map: TorsionMap) -> tuple[Grid, list[int]]:
    """Return the grid over all torsions of a map, and which of its variables the given ones are.

    Parameters
    ----------
    grid
        Over some torsions of the map.
    torsion_map
        Its torsions.
        Those that `grid` hasn't get as many bins as its first variable.
    """
    own = {frozenset((row, row[::-1])): k for k, row in enumerate(map(tuple, _rows(torsion_map)))}
    place = [own[frozenset((v.sites, v.sites[::-1]))] for v in grid.variables]
    variables, edges = [], []
    for k, row in enumerate(_rows(torsion_map)):
        if k in place:
            variables.append(grid.variables[place.index(k)])
            edges.append(grid.edges[place.index(k)])
        else:
            variables.append(Variable(torsion_map.names[k], "torsion", tuple(row), of_beads=False))
            edges.append(np.linspace(-np.pi, np.pi, grid.shape[0] + 1))
    return Grid(tuple(variables), tuple(edges)), place


def _rows(torsion_map: TorsionMap) -> list[list[int]]:
    return torsion_map.torsions.tolist()
