"""Bonded and excluded-volume energies that keep beads bounded, fitted by Boltzmann inversion."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ccg_ase.exact import ExactConstants
from ccg_ase.graph import MAX_BOND_CLASS
from ccg_ase.topology import Topology
from ccg_ase.units import thermal_energy

_SOFT = 1e-4  # Å², keeps the direction of a bond smooth when two bonded beads coincide
_SOFT_PLANE = 1e-2  # Å⁸, fades a dihedral out where its beads are in line
_LEAST_SPREAD = 0.01  # Å, or in cos θ: a rigid coordinate gets a stiff, finite spring
_VOLUME_STRENGTH = 300.0  # kT at full overlap
_CONTACT_PERCENTILE = 0.5
_MAX_CONTACT_A = 5.0  # pairs that never meet in the data say nothing about contact
_DIHEDRAL_BINS = 72


class Prior(ExactConstants):
    """Sum of simple terms in the bead positions: constants only, nothing to train.

    ====================  =====================================================================
    bond i-j              k/2 (r - r0)², confining at all distances
    angle i-j-k           k/2 (cos θ - c0)², smooth at 180°
    dihedral i-j-k-l      Σₘ aₘ cos mφ + bₘ sin mφ, faded out where three beads are in line
    volume i, j           A (1 - r/d)³ for r < d, of pairs more than 3 bonds apart
    ====================  =====================================================================

    Parameters
    ----------
    config
        JSON-able constants as made by `fit`: ``n_beads``, ``temperature_K``, and rows of ``bonds``
        (i, j, r0 in Å, k in eV/Å²), ``angles`` (i, j, k, c0, k in eV), ``dihedrals``
        (i, j, k, l, a₁, b₁, a₂, b₂, ... in eV), ``volumes`` (i, j, d in Å, A in eV), and ``pairs``
        (i, j, mean and standard deviation of the distance in Å), which carry no energy.
    """

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.config = config
        self.n_beads, self.temperature_K = int(config["n_beads"]), float(config["temperature_K"])
        bonds, angles = _table(config["bonds"], 4), _table(config["angles"], 5)
        volumes, dihedrals = _table(config["volumes"], 4), _table(config["dihedrals"], 4)
        self.n_dihedrals = len(dihedrals)
        pairs = np.concatenate([bonds[:, :2], volumes[:, :2]])
        bend, bend_sign = _steps(bonds, angles[:, :3])
        twist, twist_sign = _steps(bonds, dihedrals[:, :4])
        # Every pair is given a spring and a volume, one of them of no strength: no slicing.
        no_spring, no_volume = np.zeros((len(volumes), 2)), np.tile([1.0, 0.0], (len(bonds), 1))
        centre, k = np.concatenate([bonds[:, 2:], no_spring, angles[:, 3:]]).T
        contact, strength = np.concatenate([no_volume, volumes[:, 2:]]).T
        ends = [bonds[:, :2], volumes[:, :2]]
        members = [*ends, angles[:, :3], *ends, dihedrals[:, :4]]
        indices = {"first": pairs[:, 0], "second": pairs[:, 1], "twist": twist}
        for name, rows in {**indices, "before": bend[0], "after": bend[1]}.items():
            self.register_buffer(name, torch.from_numpy(rows.astype(int)), persistent=False)
        constants = {
            "bend_sign": -bend_sign.prod(0),
            "twist_sign": twist_sign[..., None],
            "root_k": np.sqrt(k / 2),
            "centre": -centre * np.sqrt(k / 2),
            "overlap": np.cbrt(strength),
            "slope": -np.cbrt(strength) / contact,
            "fourier": dihedrals[:, 4:].T.reshape((dihedrals.shape[1] - 4) // 2, 2, len(dihedrals)),
            "share": np.concatenate([_shares(sites, self.n_beads) for sites in members]),
        }
        for name, value in constants.items():
            self.register_exact(name, torch.from_numpy(np.ascontiguousarray(value)))

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Prior:
        """Build from the `config` of another prior."""
        return cls(config)

    @classmethod
    def fit(
        cls,
        beads: np.ndarray,
        topology: Topology,
        temperature_K: float,
        *,
        dihedral_order: int = 0,
    ) -> Prior:
        """Invert the statistics of reference beads at their temperature.

        A harmonic term has k = kT/variance. Distances carry the volume element r², whose harmonic
        approximation is taken off, so that a lone bond reproduces mean and variance; cos θ has a
        flat volume element. A dihedral's series is fitted to -kT ln of its histogram. The contact
        distance d is a low percentile of the distances of a pair of types.

        Parameters
        ----------
        beads
            Equilibrium bead positions in Å, shape (N, n_beads, 3).
        topology
            The beads' topology: one molecule.
        temperature_K
            Temperature of the data in K.
        dihedral_order
            Highest multiplicity m of the dihedral series; 0 for no dihedral terms.
        """
        beads = np.asarray(beads, dtype=float)
        if beads.ndim != 3 or beads.shape[1:] != (len(topology), 3) or len(beads) < 2:
            raise ValueError(
                f"beads must have shape (N >= 2, {len(topology)}, 3), got {beads.shape}"
            )
        if not np.isfinite(beads).all():
            raise ValueError("beads hold NaN or infinity")
        kT = thermal_energy(temperature_K)
        hops = topology.hops()
        i, j = np.triu_indices(len(topology), 1)

        def lengths(pairs: np.ndarray) -> np.ndarray:
            difference = beads[:, pairs[:, 0]] - beads[:, pairs[:, 1]]
            return np.sqrt((difference**2).sum(-1) + _SOFT)

        near = np.stack([i, j], -1)[hops[i, j] <= MAX_BOND_CLASS]
        r = lengths(near)
        r_mean, r_std = r.mean(0), r.std(0)
        bonds = []
        for pair, mean, std in zip(near.tolist(), r_mean, r_std, strict=True):
            if hops[tuple(pair)] == 1:
                precision = 1 / max(std, _LEAST_SPREAD) ** 2
                stiffness = max(precision - 2 / mean**2, 0.1 * precision)
                bonds.append([*pair, mean - 2 / (mean * stiffness), kT * stiffness])

        angles = []
        for a, b, c in topology.angles().tolist():
            u, v = beads[:, a] - beads[:, b], beads[:, c] - beads[:, b]
            cosine = (u * v).sum(-1) / np.sqrt(((u**2).sum(-1) + _SOFT) * ((v**2).sum(-1) + _SOFT))
            angles.append([a, b, c, cosine.mean(), kT / max(cosine.std(), _LEAST_SPREAD) ** 2])

        dihedrals = [
            [
                *chain,
                *_fourier_fit(
                    *_cos_sin(*np.diff(beads[:, chain], axis=1).swapaxes(0, 1)), kT, dihedral_order
                ),
            ]
            for chain in (topology.dihedrals().tolist() if dihedral_order else [])
        ]

        far = np.stack([i, j], -1)[hops[i, j] > 3]
        types = np.array(topology.types)
        keys = np.array(["\0".join(sorted(types[pair])) for pair in far])
        volumes = []
        for key in np.unique(keys):
            alike = far[keys == key]
            contact = min(np.percentile(lengths(alike), _CONTACT_PERCENTILE), _MAX_CONTACT_A)
            volumes += [[*pair, contact, _VOLUME_STRENGTH * kT] for pair in alike.tolist()]

        def plain(rows) -> list[list[float]]:
            return [[x if isinstance(x, int) else float(x) for x in row] for row in rows]

        return cls(
            {
                "n_beads": len(topology),
                "temperature_K": float(temperature_K),
                "bonds": plain(bonds),
                "angles": plain(angles),
                "dihedrals": plain(dihedrals),
                "volumes": plain(volumes),
                "pairs": plain(
                    [*p, m, s] for p, m, s in zip(near.tolist(), r_mean, r_std, strict=True)
                ),
            }
        )

    def terms(self, beads: Tensor) -> Tensor:
        """Return the energy of every term in eV, shape (..., n_terms)."""
        vectors = beads.index_select(-2, self.second) - beads.index_select(-2, self.first)
        squares = (vectors * vectors).sum(-1, keepdim=True) + _SOFT
        inverse_r = squares.rsqrt()
        r = (squares * inverse_r).squeeze(-1)
        units = vectors * inverse_r
        cosines = units.index_select(-2, self.before) * units.index_select(-2, self.after)
        cosines = cosines.sum(-1) * self.bend_sign
        stretch = torch.addcmul(self.centre, torch.cat([r, cosines], -1), self.root_k)
        overlap = torch.addcmul(self.overlap, r, self.slope).relu()
        parts = [stretch * stretch, overlap**3]
        if self.n_dihedrals:
            steps = (
                vectors.index_select(-2, rows) * sign
                for rows, sign in zip(self.twist, self.twist_sign, strict=True)
            )
            cosine, sine = _cos_sin(*steps)
            multiple, energy = (cosine, sine), 0
            for a, b in self.fourier:
                c, s = multiple
                energy = energy + a * c + b * s
                multiple = c * cosine - s * sine, s * cosine + c * sine
            parts.append(energy)
        return torch.cat(parts, -1)

    def site_energies(self, beads: Tensor) -> Tensor:
        """Return energies in eV with every term shared evenly by its beads, (..., n_beads)."""
        return self.terms(beads) @ self.share

    def forward(self, beads: Tensor) -> Tensor:
        """Return the energy in eV, shape (...), of bead positions in Å, shape (..., n_beads, 3)."""
        return self.terms(beads).sum(-1)

    def table(self) -> list[dict[str, Any]]:
        """Return one readable row per term, for reports."""
        rows = [
            ("bond", r[:2], f"r0 = {r[2]:.4f} Å, k = {r[3]:.4g} eV/Å²")
            for r in self.config["bonds"]
        ]
        rows += [
            ("angle", r[:3], f"cos θ0 = {r[3]:.4f}, k = {r[4]:.4g} eV")
            for r in self.config["angles"]
        ]
        rows += [
            ("dihedral", r[:4], "a, b = " + ", ".join(f"{x:.4g}" for x in r[4:]) + " eV")
            for r in self.config["dihedrals"]
        ]
        rows += [
            ("volume", r[:2], f"d = {r[2]:.4f} Å, A = {r[3]:.4g} eV")
            for r in self.config["volumes"]
        ]
        return [{"term": t, "beads": tuple(sites), "constants": c} for t, sites, c in rows]


def _table(rows: list[list[float]], width: int) -> np.ndarray:
    """Rows as an array that keeps its width when empty."""
    return np.array(rows, dtype=float).reshape(len(rows), -1 if rows else width)


def _steps(bonds: np.ndarray, chains: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bond index and direction (±1) of every step along chains, both (chain length - 1, m)."""
    row_of = {pair: row for row, pair in enumerate(map(tuple, bonds[:, :2].astype(int).tolist()))}
    first, second = chains[:, :-1].T.astype(int), chains[:, 1:].T.astype(int)
    low, high = np.minimum(first, second), np.maximum(first, second)
    rows = [
        [row_of[pair] for pair in zip(*ends, strict=True)]
        for ends in zip(low.tolist(), high.tolist(), strict=True)
    ]
    return np.array(rows, int), np.where(first < second, 1.0, -1.0)


def _shares(sites: np.ndarray, n_beads: int) -> np.ndarray:
    """Even shares of terms among their sites, shape (n_terms, n_beads)."""
    share = np.zeros((len(sites), n_beads))
    np.put_along_axis(share, sites.astype(int), 1 / sites.shape[1], axis=1)
    return share


def _cos_sin(b1, b2, b3):
    """Cosine and sine of the dihedral along three bond vectors (..., 3), both zero if in line.

    IUPAC sign. Where a cross product vanishes the dihedral isn't defined; both functions fade to
    zero there, smoothly.
    """
    library = torch if isinstance(b1, Tensor) else np
    m, n = library.linalg.cross(b1, b2), library.linalg.cross(b2, b3)
    scale = (((m * m).sum(-1) * (n * n).sum(-1)) + _SOFT_PLANE) ** -0.5
    sine = (b1 * n).sum(-1) * ((b2 * b2).sum(-1) + _SOFT) ** 0.5
    return (m * n).sum(-1) * scale, sine * scale


def _fourier_fit(cosine: np.ndarray, sine: np.ndarray, kT: float, order: int) -> np.ndarray:
    """Coefficients a₁, b₁, a₂, b₂, ... in eV of -kT ln p(φ), by least squares on its histogram.

    Half a count is added to every bin: an empty one gets a finite, high energy.
    """
    counts, edges = np.histogram(np.arctan2(sine, cosine), _DIHEDRAL_BINS, (-np.pi, np.pi))
    energy = -kT * np.log(counts + 0.5)
    angle = np.multiply.outer((edges[:-1] + edges[1:]) / 2, np.arange(1, order + 1))
    # The bins are equidistant, hence the series orthogonal: least squares is projection.
    series = np.stack([np.cos(angle), np.sin(angle)], -1)
    return (2 / _DIHEDRAL_BINS) * np.einsum("b,bmk->mk", energy, series).ravel()
