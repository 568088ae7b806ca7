"""Which points lie on a line, in frames or by the kind of their bonds.

Nearly collinear references leave the dihedral against them undefined.
"""

from __future__ import annotations

import numpy as np

from ccg_ase.mapping import CGMap
from ccg_ase.torsion_map import TorsionMap

_LEAST_SINE, _RARELY = 0.1, 0.02  # of the angle between references, in all but a few frames
_LINEAR_COSINE = -0.966  # 165 degrees


class Lines:
    """Answers for the points of a placement; points of one kind all get the answer of the first.

    Parameters
    ----------
    cg_map
        Beads or torsions. Points are bead centres, atoms, and atoms once more (`Placement`).
    positions
        Frames (n, n_atoms, 3) in Å; without them, only bonds tell.
    """

    def __init__(self, cg_map: CGMap | TorsionMap, positions: np.ndarray | None) -> None:
        self._cg_map, self._atoms = cg_map, cg_map.atoms
        self._n_beads = cg_map.n_beads
        self._neighbours = cg_map.atoms.neighbours()
        self._known: dict[tuple, bool] = {}
        self._frames = None
        if positions is not None:
            beads = cg_map.apply(positions) if self._n_beads else positions[:, :0]
            self._frames = np.concatenate([beads, positions], axis=1)

    def aligned(self, p1: int, p2: int, p3: int) -> bool:
        """Whether p2 and p3 lie nearly on one line with p1, seen from p1."""
        n = len(self._atoms)
        if min(p1, p2, p3) >= self._n_beads:
            a, b, c = ((p - self._n_beads) % n for p in (p1, p2, p3))
            for i, j, k in ((b, a, c), (a, b, c)):
                if self.linear(j) and i in self._neighbours[j] and k in self._neighbours[j]:
                    return True
        if self._frames is None:
            return False
        kind = tuple(self._kind(p) for p in (p1, p2, p3))
        if kind not in self._known:
            sine = self._angle(*(p if p < self._n_beads + n else p - n for p in (p1, p2, p3)))[0]
            self._known[kind] = bool(np.quantile(sine, _RARELY) < _LEAST_SINE)
        return self._known[kind]

    def linear(self, atom: int) -> bool:
        """Whether the two bonds of an atom lie on a line, in the frames or by their kind."""
        around = self._neighbours[atom]
        if len(around) != 2:
            return False
        kind = (self._atoms.types[atom],)
        if kind not in self._known:
            if self._frames is None:
                self._known[kind] = self._linear_by_bonds(atom)
            else:
                ends = [self._n_beads + b for b in around]
                cosine = self._angle(self._n_beads + atom, *ends)[1]
                self._known[kind] = bool(np.median(cosine) < _LINEAR_COSINE)
        return self._known[kind]

    def _linear_by_bonds(self, atom: int) -> bool:
        """Whether an atom of two bonds is an sp carbon, or the middle of an azide."""
        if self._atoms.elements[atom] == "C":
            return True
        ends = self._neighbours[atom]
        return self._atoms.elements[atom] == "N" and all(
            len(self._neighbours[b]) == 1
            or (self._atoms.elements[b] == "C" and len(self._neighbours[b]) == 2)
            for b in ends
        )

    def _kind(self, point: int) -> tuple[str, str]:
        if point < self._n_beads:
            return "bead", self._cg_map.beads.types[point]
        return "atom", self._atoms.types[(point - self._n_beads) % len(self._atoms)]

    def _angle(self, at: int, *ends: int) -> tuple[np.ndarray, np.ndarray]:
        """Return sine and cosine of the angle at a point in every frame."""
        u, v = (self._frames[:, end] - self._frames[:, at] for end in ends)
        lengths = np.linalg.norm(u, axis=-1) * np.linalg.norm(v, axis=-1)
        lengths = np.maximum(lengths, 1e-9)
        sine = np.linalg.norm(np.cross(u, v), axis=-1) / lengths
        return sine, (u * v).sum(-1) / lengths
