"""Linear force maps: atomistic forces to bead forces, plain or of least noise.

For beads s = M x, moving the atoms by δx = Bᵀ δs moves the beads by δs if and only if B Mᵀ = 1.
B is constant, hence the field has no divergence, and for every such B (Ciccotti, Kapral and
Vanden-Eijnden, ChemPhysChem 6, 1809 (2005); theory 5.7)

    -∂F/∂s = E[B f | s],    E|B f|² = E|∂F/∂s|² + noise of B.

No condition on the row sums of B follows: M's rows sum to one, so that adding a constant to a row
of B breaks B Mᵀ = 1. The map of least mean square is that of least noise (Krämer, Durumeric,
Charron, Chen, Clementi, Noé, J. Phys. Chem. Lett. 14, 3970 (2023)).

Rigid bonds: the field must keep them at every structure, so that B is equal over each group of
atoms that constraints join. Such a field moves a group as a whole: the constraint forces cancel,
and so does the derivative of the mass-metric factor, which depends on the group's shape only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array, csr_array

from ccg_ase.force_map import plain_force_matrix
from ccg_ase.mapping import CGMap
from ccg_mda.weights import weighted_average

from .like_molecules import Constraints, LikeMolecules, like_molecules, rigid_groups

_TOLERANCE = 1e-8  # of B Mᵀ = 1
_LEAST_RATIO = 5  # force components per free coefficient: held-out noise within 1/4 of the least
_CHUNK = 2**21  # force components that are float64 at a time


@dataclass(frozen=True, eq=False)
class ForceMap:
    """A linear map of forces B that is consistent with the map of positions M: B Mᵀ = 1.

    Parameters
    ----------
    cg_map
        M, (n_beads, n_atoms).
    matrix
        B, sparse, (n_beads, n_atoms).

    Raises
    ------
    ValueError
        If the shapes differ or B Mᵀ isn't the unit matrix.
    """

    cg_map: CGMap
    matrix: csr_array

    def __post_init__(self) -> None:
        M = self.cg_map.matrix
        if self.matrix.shape != M.shape:
            raise ValueError(f"the force map must have shape {M.shape}, got {self.matrix.shape}")
        product = (self.matrix @ M.T).tocoo()
        on = product.row == product.col
        diagonal = np.bincount(product.row[on], product.data[on], minlength=len(self.cg_map.beads))
        worst = max(np.abs(diagonal - 1).max(), np.abs(product.data[~on]).max(initial=0.0))
        if not worst < _TOLERANCE:
            raise ValueError(
                f"B Mᵀ differs from the unit matrix by {worst:.2g}: these forces aren't those of "
                "the beads; build the map by ForceMap.slices or ForceMap.optimal"
            )

    @classmethod
    def slices(cls, cg_map: CGMap, constraints: Constraints = ()) -> ForceMap:
        """Return the plain map: each bead has the sum of the forces on its own atoms.

        A slice bead has the force on its atom, a centre of mass (or of geometry) of atoms that are
        in no other bead the sum of forces on them. In general, the atoms that only this bead has
        move together; with constraints, so do the rigid groups that only this bead has.

        Parameters
        ----------
        cg_map
            The map of positions.
        constraints
            Groups of two or more atoms that rigid bonds join, e.g. pairs (m, 2).

        Raises
        ------
        ValueError
            If a bead has no atom, or no rigid group of atoms, to itself.
        """
        return cls(cg_map, plain_force_matrix(cg_map, rigid_groups(cg_map, constraints)))

    @classmethod
    def optimal(
        cls,
        cg_map: CGMap,
        forces: np.ndarray,
        constraints: Constraints = (),
        *,
        l2: float = 1e-6,
    ) -> ForceMap:
        """Return the map of least mean square force, a quadratic program with equalities only.

        A bead takes from the atoms of its own molecule (what bonds, constraints and beads join).
        Molecules with the same types, bonds, beads and constraints in the same order of atoms
        share one small problem, their statistics pooled.

        Parameters
        ----------
        cg_map
            The map of positions.
        forces
            Forces on the atoms, (N, n_atoms, 3), eV/Å, of equilibrium frames; a bias along the
            beads does no harm. Judge the map on other frames (`compare`).
        constraints
            As for `slices`.
        l2
            Ridge, positive: as if every atom felt white noise of this share of the mean square
            force. It settles what the forces leave open and does nothing else while small.

        Raises
        ------
        ValueError
            If forces aren't finite or too few for the molecule's size, or no map exists since a
            rigid group holds several beads, or one bead is a mixture of others.
        """
        if not l2 > 0:
            raise ValueError(f"l2 must be positive, got {l2}")
        forces = _checked(cg_map, forces)
        if forces.ndim != 3:
            raise ValueError(f"forces must be frames (N, n_atoms, 3), got {forces.shape}")
        rows, columns, values = [], [], []
        for block in like_molecules(cg_map, rigid_groups(cg_map, constraints)):
            entries = _least_noise(cg_map, block, forces, l2)
            for atoms, beads in zip(block.atoms, block.beads, strict=True):
                rows.append(np.repeat(beads, len(atoms)))
                columns.append(np.tile(atoms, len(beads)))
                values.append(entries.ravel())
        index = np.concatenate(rows), np.concatenate(columns)
        matrix = coo_array((np.concatenate(values), index), shape=cg_map.matrix.shape)
        return cls(cg_map, matrix.tocsr())

    def apply(self, forces: np.ndarray) -> np.ndarray:
        """Map forces on atoms, (..., n_atoms, 3) in eV/Å, to forces on beads, (..., n_beads, 3).

        float64. Each is an unbiased, noisy value of the mean force at the beads of its frame.
        """
        forces = _checked(self.cg_map, forces)
        flat = forces.reshape(-1, *forces.shape[-2:])
        mapped = np.empty((len(flat), self.cg_map.n_beads, 3))
        for piece in _chunks(flat):
            columns = np.moveaxis(flat[piece].astype(float), 1, 0)
            beads = self.matrix @ columns.reshape(len(columns), -1)
            mapped[piece] = np.moveaxis(beads.reshape(len(beads), -1, 3), 1, 0)
        return mapped.reshape(*forces.shape[:-2], *mapped.shape[1:])

    def compare(
        self, other: ForceMap, forces: np.ndarray, *, n_blocks: int = 20
    ) -> dict[str, float]:
        """Compare the noise of two maps on frames that neither was fitted to.

        Both have the same mean force, so the difference of their mean squares is that of their
        noise. The noise itself can't be had from forces alone: it is below the mean square, and
        below the loss of any model on held-out frames.

        Parameters
        ----------
        other
            Another map of the same beads, e.g. the plain one.
        forces
            Held-out forces on atoms, (N >= 2, n_atoms, 3), eV/Å, in time order.
        n_blocks
            Contiguous blocks of frames that count as independent.

        Returns
        -------
        dict
            `mean_square` of this map and `other_mean_square`, per component, (eV/Å)²;
            `noise_removed`, their difference, with its standard error `noise_removed_error`.
        """
        mine, theirs = (
            (force_map.apply(forces) ** 2).mean((-1, -2)) for force_map in (self, other)
        )
        removed, error = weighted_average(
            theirs - mine, np.zeros(len(mine)), n_blocks=min(n_blocks, len(mine))
        )
        return {
            "mean_square": float(mine.mean()),
            "other_mean_square": float(theirs.mean()),
            "noise_removed": float(removed),
            "noise_removed_error": float(error),
        }


def _least_noise(cg_map: CGMap, block: LikeMolecules, forces: np.ndarray, l2: float) -> np.ndarray:
    """Return the rows of B of one of like molecules, (b, a), pooled over frames and copies.

    With P the atoms of each rigid group (0 or 1), B = C Pᵀ, and C solves min tr C H Cᵀ,
    H = Pᵀ (Q + l2) P, with C (M P)ᵀ = 1: [H, (MP)ᵀ; MP, 0] [Cᵀ; Λ] = [0; 1]. Q is E[f_i · f_j] in
    units of its mean diagonal.
    """
    P = np.eye(block.group.max() + 1)[block.group]
    A = block.weights @ P
    _refuse_dependent(cg_map, block, A)
    (n_beads, n_groups), copies = A.shape, len(block.atoms)
    needed = -(-_LEAST_RATIO * (n_groups - n_beads) // (3 * copies))
    if len(forces) < max(needed, 1):
        raise ValueError(
            f"{len(forces)} frames are too few to fit {n_groups - n_beads} coefficients per bead; "
            f"give at least {max(needed, 1)} frames, or use ForceMap.slices"
        )
    Q = np.zeros((len(P), len(P)))
    for piece in _chunks(forces):
        # Frames, copies and components alike are samples of one molecule's forces.
        values = np.moveaxis(forces[piece][:, block.atoms], 2, 0).reshape(len(P), -1)
        values = values.astype(float)
        Q += values @ values.T
    Q /= (Q.trace() / len(P)) or 1.0
    H = P.T @ (Q + l2 * np.eye(len(P))) @ P
    kkt = np.block([[H, A.T], [A, np.zeros((n_beads, n_beads))]])
    right = np.concatenate([np.zeros((n_groups, n_beads)), np.eye(n_beads)])
    return np.linalg.solve(kkt, right)[:n_groups].T @ P.T


def _refuse_dependent(cg_map: CGMap, block: LikeMolecules, A: np.ndarray) -> None:
    """Refuse beads whose positions, rigid groups moving as a whole, depend on each other."""
    left, size, _ = np.linalg.svd(A)
    if len(size) == len(A) and size[-1] > _TOLERANCE * size[0]:
        return
    involved = block.beads[0][np.abs(left[:, -1]) > 1e-6]
    names = ", ".join(f"{i} ({cg_map.beads.names[i]})" for i in sorted(involved))
    raise ValueError(
        f"no force map exists for the beads {names}, which can't move independently: a rigid "
        "group of atoms holds several of them, or one is a mixture of the others; keep one bead "
        "per rigid group, or simulate without these constraints"
    )


def _chunks(forces: np.ndarray) -> Iterator[slice]:
    """Cut frames (N, n, 3) into runs of limited size."""
    size = max(1, _CHUNK // (3 * forces.shape[1]))
    for start in range(0, len(forces), size):
        yield slice(start, start + size)


def _checked(cg_map: CGMap, forces: np.ndarray) -> np.ndarray:
    """Return forces on the atoms of a map as an array, or say what is wrong with them."""
    forces = np.asarray(forces)
    if forces.shape[-2:] != (cg_map.n_atoms, 3):
        raise ValueError(
            f"forces must have shape (..., {cg_map.n_atoms}, 3) for the atoms of this map, got "
            f"{forces.shape}"
        )
    finite = np.isfinite(forces)
    if not finite.all():
        frame = np.unravel_index(np.argmin(finite), forces.shape)[:-2]
        raise ValueError(f"forces of frame {', '.join(map(str, frame))} hold NaN or infinity")
    return forces
