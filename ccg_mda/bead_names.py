"""Which bead is which: names and residues of a file matched to those of a map."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from MDAnalysis.lib.util import inverse_aa_codes

from ccg_ase.topology import Topology

_PLACEHOLDERS = {"", "X"}  # what ASE and ccg write for a bead that they know no name of
_CUT_AT = (4, 5)  # the columns that PDB and GRO files have for a name


@dataclass(frozen=True, eq=False)
class BeadLabels:
    """What is known of n beads but their positions.

    Parameters
    ----------
    names
        Shape (n,), or None if unknown.
    resids, resnames, segids
        Shape (n,), or None if unknown.
    """

    names: tuple[str, ...] | None
    resids: np.ndarray | None = None
    resnames: tuple[str, ...] | None = None
    segids: tuple[str, ...] | None = None

    @classmethod
    def of(cls, beads: Any) -> BeadLabels:
        """Read the labels of an AtomGroup or a Topology."""
        names, resnames, segids = (
            None if column is None else tuple(str(word) for word in column)
            for column in (getattr(beads, key, None) for key in ("names", "resnames", "segids"))
        )
        resids = getattr(beads, "resids", None)
        return cls(names, None if resids is None else np.asarray(resids), resnames, segids)


def matching_order(given: BeadLabels, beads: Topology) -> np.ndarray:
    """Return which given bead is which bead of a map, never by a guess.

    What agrees first decides: segment, residue number and name; residue number and name; its rank
    and name, as when a file counts residues from 1; the names alone; the names within residues
    that come in the same order. Beads in the map's order are left in it. Beads without names, or
    all called X, are taken in their order.

    Parameters
    ----------
    given
        Labels of as many beads as the map has.
    beads
        The map's beads.

    Returns
    -------
    np.ndarray
        Indices, shape (n,): given bead ``order[k]`` is bead k of the map.

    Raises
    ------
    ValueError
        If a name isn't the map's, if beads of one name can't be told apart, or if a residue is
        another amino acid than the map's.
    """
    in_order = np.arange(len(beads))
    if given.names is None or set(given.names) <= _PLACEHOLDERS:
        return in_order
    wanted, width = BeadLabels.of(beads), max(map(len, given.names))
    if width in _CUT_AT:
        wanted = BeadLabels(
            tuple(name[:width] for name in beads.names), beads.resids, beads.resnames, beads.segids
        )
    for mine, theirs in zip(_keys(given), _keys(wanted), strict=True):
        if mine == theirs:
            order = in_order
        elif Counter(mine) != Counter(theirs):
            continue
        elif len(set(mine)) == len(mine):
            place = {key: k for k, key in enumerate(mine)}
            order = np.array([place[key] for key in theirs])
        elif isinstance(mine[0], tuple):
            break  # the residues are there, in another order: the names alone would lead astray
        else:
            continue
        _check_residues(given, beads, order)
        return order
    raise ValueError(_mismatch(given, wanted))


def _keys(labels: BeadLabels) -> Iterator[list[Any]]:
    """Yield ways to tell beads apart, one key per bead; the last ones need names alone."""
    names, n = labels.names, len(labels.names)
    resids = np.zeros(n, int) if labels.resids is None else labels.resids
    segids = labels.segids or ("",) * n
    rank = np.unique(resids, return_inverse=True)[1]
    residues = list(zip(segids, resids.tolist(), labels.resnames or ("",) * n, strict=True))
    changes = [a != b for a, b in zip(residues, [residues[0], *residues], strict=False)]
    for residue in (zip(segids, resids.tolist(), strict=True), resids.tolist(), rank.tolist()):
        yield list(zip(residue, names, strict=True))
    yield list(names)
    yield list(zip(np.cumsum(changes).tolist(), names, strict=True))


def _check_residues(given: BeadLabels, beads: Topology, order: np.ndarray) -> None:
    """Refuse another sequence of amino acids; one of several protonation states is the same."""
    if given.resnames is None:
        return
    for wanted, k in enumerate(order.tolist()):
        mine, theirs = (
            inverse_aa_codes.get(resname.upper())
            for resname in (given.resnames[k], beads.resnames[wanted])
        )
        if mine and theirs and mine != theirs:
            raise ValueError(
                f"bead {k} ({given.names[k]}) is in residue {given.resnames[k]}, that of the model "
                f"in {beads.resnames[wanted]}; use the model of this sequence"
            )


def _mismatch(given: BeadLabels, wanted: BeadLabels) -> str:
    """Say which bead differs first, why, and what helps."""
    differ = [k for k, (a, b) in enumerate(zip(given.names, wanted.names, strict=True)) if a != b]
    extra = Counter(given.names) - Counter(wanted.names)
    if extra:
        k, name = differ[0], next(iter(extra))
        where = "" if given.resids is None else f" of residue {given.resids[k]}"
        return (
            f"bead {k} is {given.names[k]!r}{where}, the model has {wanted.names[k]!r} there, and "
            f"has fewer beads called {name!r}; use the model that the beads were made with, or "
            f"give them its names: {' '.join(wanted.names[:20])}"
        )
    name = Counter(given.names).most_common(1)[0][0]
    return (
        "the names of the beads are the model's in another order, but beads of one name "
        f"({name!r}) can't be told apart: give them the residue numbers of the model, or pass an "
        "AtomGroup of them in its order"
    )
