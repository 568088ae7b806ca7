"""CGMap: which atoms make which bead, s = M x."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from ase import Atoms
from scipy.sparse import coo_array, csr_array

from ccg_ase.force_map import plain_force_matrix
from ccg_ase.topology import Topology

Array = TypeVar("Array", np.ndarray, torch.Tensor)
_ROW_SUM_TOLERANCE = 1e-8


@dataclass(frozen=True, eq=False)
class CGMap:
    """A linear map from atoms to beads, s = M x, non-negative with rows that sum to one.

    Slices (a bead is an atom), centres of mass or geometry, shared atoms and atoms of no bead are
    all such maps. Build one with `from_slices`, `from_groups` or `from_matrix`; the constructor
    takes the entries of M (coordinate format) as they are.

    Parameters
    ----------
    atoms, beads
        The two topologies, n_atoms and n_beads sites.
    bead_index, atom_index
        Row and column of each non-zero entry of M, shape (nnz,).
    weights
        The entries of M, shape (nnz,), positive.

    Raises
    ------
    ValueError
        If a bead is empty, an index is out of range or given twice, or a weight is NaN, negative
        or zero, or the weights of a bead don't sum to one.
    """

    atoms: Topology
    beads: Topology
    bead_index: np.ndarray
    atom_index: np.ndarray
    weights: np.ndarray

    def __post_init__(self) -> None:
        bead, atom = np.array(self.bead_index, int), np.array(self.atom_index, int)
        weights = np.array(self.weights, float)
        if not bead.shape == atom.shape == weights.shape or bead.ndim != 1:
            raise ValueError("bead_index, atom_index and weights must be one-dimensional and alike")
        _check_range("atom", atom, self.n_atoms)
        _check_range("bead", bead, self.n_beads)
        _check_weights(weights)
        empty = np.setdiff1d(np.arange(self.n_beads), bead)
        if empty.size:
            raise ValueError(f"bead {empty[0]} ({self.beads.names[empty[0]]}) holds no atoms")
        order = np.lexsort((atom, bead))
        bead, atom, weights = bead[order], atom[order], weights[order]
        twice = (np.diff(bead) == 0) & (np.diff(atom) == 0)
        if twice.any():
            where = int(np.argmax(twice))
            raise ValueError(f"atom {atom[where]} is listed twice in bead {bead[where]}")
        sums = np.bincount(bead, weights)
        worst = int(np.argmax(np.abs(sums - 1)))
        if abs(sums[worst] - 1) > _ROW_SUM_TOLERANCE:
            raise ValueError(f"weights of bead {worst} sum to {sums[worst]:.10g}, must be 1")
        for key, value in (("bead_index", bead), ("atom_index", atom), ("weights", weights)):
            object.__setattr__(self, key, value)

    # ---------------------------------------------------------------- builders

    @classmethod
    def from_slices(
        cls, atoms: Topology, indices: Sequence[int], names: Sequence[str] | None = None
    ) -> CGMap:
        """Make every listed atom a bead, in this order."""
        indices = np.array(indices, int)
        _check_range("atom", indices, len(atoms))
        unique, counts = np.unique(indices, return_counts=True)
        if np.any(counts > 1):
            twice = unique[counts > 1][0]
            raise ValueError(
                f"atom {twice} ({atoms.names[twice]}) is listed as two slice beads; an atom can be "
                "one bead only"
            )
        return cls._build(atoms, np.arange(len(indices)), indices, np.ones(len(indices)), names)

    @classmethod
    def from_groups(
        cls,
        atoms: Topology,
        groups: Sequence[Sequence[int]],
        names: Sequence[str] | None = None,
        weighting: Literal["mass", "geometry"] = "mass",
    ) -> CGMap:
        """Put a bead at the centre of mass, or of geometry, of every group of atoms."""
        if weighting not in ("mass", "geometry"):
            raise ValueError(f"weighting must be 'mass' or 'geometry', got {weighting!r}")
        for bead, group in enumerate(groups):
            if len(group) == 0:
                raise ValueError(f"bead {bead} holds no atoms")
        bead_index = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
        atom_index = np.array([atom for group in groups for atom in group], int)
        _check_range("atom", atom_index, len(atoms))
        weights = atoms.masses[atom_index] if weighting == "mass" else np.ones(len(atom_index))
        weights = weights / np.bincount(bead_index, weights)[bead_index]
        return cls._build(atoms, bead_index, atom_index, weights, names)

    @classmethod
    def from_matrix(cls, atoms: Topology, matrix: Any, names: Sequence[str] | None = None) -> CGMap:
        """Use a dense or sparse (n_beads, n_atoms) matrix M as the map."""
        entries = coo_array(matrix)
        if entries.ndim != 2 or entries.shape[1] != len(atoms):
            raise ValueError(f"matrix must have {len(atoms)} columns, got shape {entries.shape}")
        used = entries.data != 0
        bead_index, atom_index, weights = entries.row[used], entries.col[used], entries.data[used]
        empty = np.setdiff1d(np.arange(entries.shape[0]), bead_index)
        if empty.size:
            raise ValueError(f"bead {empty[0]} holds no atoms")
        return cls._build(atoms, bead_index, atom_index, weights, names)

    @classmethod
    def _build(cls, atoms, bead_index, atom_index, weights, names) -> CGMap:
        """Derive the bead topology, then the map.

        An atom's mass is shared among its beads in proportion to its weights: a slice bead has
        the mass of its atom, a group the sum of its masses.
        """
        _check_range("atom", atom_index, len(atoms))
        _check_weights(weights)
        if len(bead_index) == 0:
            raise ValueError("a CGMap needs at least one bead, got none")
        n_beads = int(np.max(bead_index)) + 1
        if names is not None and len(names) != n_beads:
            raise ValueError(f"{len(names)} bead names given for {n_beads} beads")
        per_atom = np.bincount(atom_index, weights, minlength=len(atoms))
        shares = atoms.masses[atom_index] * weights / per_atom[atom_index]
        first = atom_index[np.unique(bead_index, return_index=True)[1]]
        beads = Topology(
            names=tuple(names if names is not None else (atoms.names[i] for i in first)),
            masses=np.bincount(bead_index, shares),
            resnames=tuple(atoms.resnames[i] for i in first),
            resids=atoms.resids[first],
            segids=tuple(atoms.segids[i] for i in first),
        )
        bare = cls(atoms, beads, bead_index, atom_index, weights)
        ends = bare.owner[atoms.bonds]
        crossing = (ends[:, 0] != ends[:, 1]) & (ends >= 0).all(axis=1)
        return replace(bare, beads=replace(beads, bonds=ends[crossing]))

    # -------------------------------------------------------------- properties

    @property
    def n_atoms(self) -> int:
        """Number of atoms."""
        return len(self.atoms)

    @property
    def n_beads(self) -> int:
        """Number of beads."""
        return len(self.beads)

    @property
    def coarse_shape(self) -> tuple[int, ...]:
        """Shape of the coarse variables of one frame, (n_beads, 3)."""
        return (self.n_beads, 3)

    @cached_property
    def matrix(self) -> csr_array:
        """M as a sparse matrix, shape (n_beads, n_atoms)."""
        entries = (self.weights, (self.bead_index, self.atom_index))
        return coo_array(entries, shape=(self.n_beads, self.n_atoms)).tocsr()

    @cached_property
    def force_matrix(self) -> csr_array:
        """B of `apply_forces` as a sparse matrix, shape (n_beads, n_atoms); B Mᵀ = 1.

        Raises
        ------
        ValueError
            If a bead has no atom to itself.
        """
        return plain_force_matrix(self, np.arange(self.n_atoms))

    @cached_property
    def kind(self) -> Literal["slice", "mass", "geometry", "general"]:
        """What the weights are: single atoms, centres of mass, of geometry, or anything else."""
        if len(np.unique(self.atom_index)) < len(self.atom_index):
            return "general"
        if len(self.weights) == self.n_beads:
            return "slice"
        masses = self.atoms.masses[self.atom_index]
        for kind, raw in (("mass", masses), ("geometry", np.ones_like(masses))):
            if np.allclose(self.weights, raw / np.bincount(self.bead_index, raw)[self.bead_index]):
                return kind
        return "general"

    @property
    def single(self) -> np.ndarray:
        """Which beads are one atom, boolean, shape (n_beads,)."""
        return np.bincount(self.bead_index, minlength=self.n_beads) == 1

    @property
    def bead_atoms(self) -> np.ndarray:
        """The atom that each bead of a slice map is, shape (n_beads,)."""
        if self.kind != "slice":
            raise ValueError(f"bead_atoms exists for slice maps only; this map is '{self.kind}'")
        return self.atom_index

    @cached_property
    def owner(self) -> np.ndarray:
        """Bead that owns each atom, shape (n_atoms,): nearest along bonds, -1 if none is reached.

        Ties go to the lowest bead index. An atom at distance d+1 has its nearest beads among those
        of its neighbours at distance d, so that one sweep per shell is exact.
        """
        unowned = self.n_beads
        owner = np.full(self.n_atoms, unowned)
        np.minimum.at(owner, self.atom_index, self.bead_index)
        while True:
            shell = np.full_like(owner, unowned)
            for i, j in (self.atoms.bonds.T, self.atoms.bonds.T[::-1]):
                np.minimum.at(shell, i, owner[j])
            fresh = (owner == unowned) & (shell < unowned)
            if not fresh.any():
                return np.where(owner == unowned, -1, owner)
            owner[fresh] = shell[fresh]

    # ------------------------------------------------------------------- use

    def apply(self, positions: Array) -> Array:
        """Map atoms to beads.

        Parameters
        ----------
        positions
            Atom positions in Å, shape (..., n_atoms, 3), NumPy array or torch tensor.

        Returns
        -------
        Array
            Bead positions in Å, shape (..., n_beads, 3), same kind and dtype.
        """
        return self._sums(positions, self.bead_index, self.atom_index, self.weights)

    def difference(self, a: Array, b: Array) -> Array:
        """Return ``a - b`` of two sets of beads; angles of a `TorsionMap` differ by less than π."""
        return a - b

    def apply_forces(self, forces: Array) -> Array:
        """Map forces on atoms to forces on beads, the sums over the atoms that only a bead has.

        A slice bead has the force on its atom. Each result is an unbiased, noisy value of the mean
        force -∂F/∂s if no bonds are rigid, and exact if the potential depends on the beads only.

        Parameters
        ----------
        forces
            Forces on atoms in eV/Å, or any unit, shape (..., n_atoms, 3), array or tensor.

        Returns
        -------
        Array
            Forces on beads, shape (..., n_beads, 3), same unit, kind and dtype.

        Raises
        ------
        ValueError
            If a bead has no atom to itself: its force depends on a choice that this call can't
            make.
        """
        entries = self.force_matrix.tocoo()
        return self._sums(forces, entries.row, entries.col, entries.data)

    def _sums(
        self, values: Array, bead: np.ndarray, atom: np.ndarray, weights: np.ndarray
    ) -> Array:
        """Add up weighted atoms (..., n_atoms, 3) for each bead; entries are sorted by bead."""
        if tuple(values.shape[-2:]) != (self.n_atoms, 3):
            raise ValueError(
                f"expected shape (..., {self.n_atoms}, 3) for the atoms of this map, "
                f"got {tuple(values.shape)}"
            )
        if self.kind == "slice":
            return values[..., self.bead_atoms, :]
        gathered = values[..., atom, :]
        if isinstance(values, torch.Tensor):
            weights = torch.tensor(weights, dtype=values.dtype, device=values.device)
            rows = torch.tensor(bead, device=values.device)
            beads = gathered.new_zeros(*values.shape[:-2], self.n_beads, 3)
            return beads.index_add(-2, rows, gathered * weights[:, None])
        starts = np.searchsorted(bead, np.arange(self.n_beads))
        beads = np.add.reduceat(gathered * weights[:, None], starts, axis=-2)
        return beads.astype(values.dtype)

    def to_ase(self, positions: np.ndarray) -> Atoms:
        """Return the beads as ASE Atoms, with masses, names and this map's fingerprint.

        ASE and most file formats lose bead names and types, hence the fingerprint in ``info``: it
        lets a calculator refuse beads of another map.

        Parameters
        ----------
        positions
            Bead positions in Å, shape (n_beads, 3).
        """
        positions = np.asarray(positions, dtype=float)
        if positions.shape != (self.n_beads, 3):
            raise ValueError(f"expected shape ({self.n_beads}, 3), got {positions.shape}")
        atoms = Atoms(
            numbers=np.zeros(self.n_beads, int),
            positions=positions,
            masses=self.beads.masses,
            pbc=False,
            info={"cg_map": self.fingerprint()},
        )
        # The array names that ASE's own PDB and GRO writers look for.
        atoms.new_array("atomtypes", np.array(self.beads.names))
        atoms.new_array("residuenames", np.array(self.beads.resnames))
        atoms.new_array("residuenumbers", self.beads.resids)
        return atoms

    def repeated(self, count: int) -> CGMap:
        """Return the map of so many copies of the whole system, one after another."""
        copy = np.repeat(np.arange(count), len(self.weights))
        return CGMap(
            self.atoms.repeated(count),
            self.beads.repeated(count),
            np.tile(self.bead_index, count) + copy * self.n_beads,
            np.tile(self.atom_index, count) + copy * self.n_atoms,
            np.tile(self.weights, count),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dictionary that `from_dict` reads back exactly."""
        return {
            "atoms": self.atoms.to_dict(),
            "beads": self.beads.to_dict(),
            "bead_index": self.bead_index.tolist(),
            "atom_index": self.atom_index.tolist(),
            "weights": self.weights.tolist(),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CGMap:
        """Build from the dictionary made by `to_dict`."""
        topologies = {key: Topology.from_dict(values[key]) for key in ("atoms", "beads")}
        return cls(**{**values, **topologies})

    def fingerprint(self) -> str:
        """Return a short hash of the whole content, equal for equal maps on any machine."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CGMap):
            return NotImplemented
        return self._fingerprint == other._fingerprint


def _check_range(what: str, index: np.ndarray, n: int) -> None:
    """Refuse indices outside 0..n-1; negative ones would silently count from the end."""
    outside = index[(index < 0) | (index >= n)]
    if outside.size:
        raise ValueError(f"{what} index {outside[0]} is out of range 0..{n - 1}")


def _check_weights(weights: np.ndarray) -> None:
    """Refuse NaN, negative and explicit zero weights."""
    if not np.all(np.isfinite(weights)) or np.any(weights <= 0):
        raise ValueError("mapping weights must be finite and positive")
