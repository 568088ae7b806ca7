"""Bonded and excluded-volume energies that keep beads bounded."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ccg_ase.bead_graph import BeadGraph, Edges
from ccg_ase.exact import ExactConstants
from ccg_ase.graph import MAX_BOND_CLASS, minimum_image
from ccg_ase.species import species_of
from ccg_ase.topology import Topology

SOFT = 1e-4  # Å², keeps directions smooth where two beads coincide
_SOFT_PLANE = 1e-2  # Å⁸, fades a dihedral out where its beads are in line
TERMS = ("bonds", "angles", "dihedrals", "volumes")
_SITES = {"bonds": 2, "angles": 3, "dihedrals": 4}


class Prior(ExactConstants):
    """Sum of simple terms in the bead positions: constants only, nothing to train.

    ====================  =====================================================================
    bond i-j              k/2 (r - r0)², confining at all distances
    angle i-j-k           k/2 (cos θ - c0)², smooth at 180°
    dihedral i-j-k-l      Σₘ aₘ cos mφ + bₘ sin mφ, faded out where three beads are in line
    volume i, j           A (1 - r/d)³ for r < d, of pairs that aren't bonded
    ====================  =====================================================================

    Molecules of one species share their bonded terms; volumes are those of pairs of types, one for
    beads 2 bonds apart, one for 3, and one for all farther, within and between molecules. In a
    periodic box, vectors along bonds are those of the nearest image.

    Parameters
    ----------
    config
        JSON-able constants as `ccg_ase.prior_fit.fit_prior` makes them: ``temperature_K``; for
        every species under ``molecules`` its ``types`` and ``links`` (bonds), and rows of ``bonds``
        (i, j, r0 in Å, k in eV/Å²), ``angles`` (i, j, k, c0, k in eV) and ``dihedrals`` (i, j, k,
        l, a₁, b₁, a₂, b₂, ... in eV) by the sites of one molecule; ``volumes`` (type, type, bonds
        apart, d in Å, A in eV) with 2, 3, or 0 for all farther.
    topology
        The n beads.

    Raises
    ------
    ValueError
        If the beads hold a molecule that the constants don't know.
    """

    def __init__(self, config: dict[str, Any], topology: Topology):
        super().__init__()
        self.config, self.n_beads = config, len(topology)
        self.temperature_K = float(config["temperature_K"])
        tables = self._tables(topology)
        bonds, angles, dihedrals = (tables[kind] for kind in _SITES)
        self.n_dihedrals = len(dihedrals)
        # Stretch and bend are squares of one shape: k/2 (r - r0)² and k/2 (cos θ - c0)².
        centre, k = np.concatenate([bonds[:, 2:], angles[:, 3:]]).T
        owners = [table[:, :sites] for table, sites in zip(tables.values(), (2, 3, 4), strict=True)]
        entry = np.concatenate([
            np.repeat(np.arange(len(own)) + first, own.shape[1])
            for own, first in zip(owners, np.cumsum([0, len(bonds), len(angles)]), strict=True)
        ])  # fmt: skip
        share = np.concatenate([np.full(own.size, 1 / own.shape[1]) for own in owners])
        indices = {
            "bond": bonds[:, :2].T,
            "bend": angles[:, :3].T,
            "twist": dihedrals[:, :4].T,
            "entry": entry,
            "owner": np.concatenate([own.ravel() for own in owners]),
        }
        for name, rows in indices.items():
            rows = torch.from_numpy(np.ascontiguousarray(rows, int))
            self.register_buffer(name, rows, persistent=False)
        types, kind = np.unique(topology.types, return_inverse=True)
        classes = MAX_BOND_CLASS + 1
        contact, strength = (np.full([classes, *[len(types)] * 2], x) for x in (1.0, 0.0))
        row_of = {name: row for row, name in enumerate(types.tolist())}
        for a, b, apart, d, energy in config["volumes"]:
            if a in row_of and b in row_of:
                pair = apart, [row_of[a], row_of[b]], [row_of[b], row_of[a]]
                contact[pair], strength[pair] = d, energy
        contact[MAX_BOND_CLASS], strength[MAX_BOND_CLASS] = contact[0], strength[0]
        self.reach_A = float((contact * (strength > 0)).max())
        """Greatest distance in Å at which a volume acts; 0 without volumes."""
        kind = torch.from_numpy(kind)
        self.register_buffer("kind", kind, persistent=False)
        constants = {
            "root_k": np.sqrt(k / 2),
            "centre": -centre * np.sqrt(k / 2),
            "fourier": dihedrals[:, 4:].T.reshape((dihedrals.shape[1] - 4) // 2, 2, len(dihedrals)),
            "share": share,
            "overlap": np.cbrt(strength),
            "slope": -np.cbrt(strength) / contact,
        }
        for name, value in constants.items():
            self.register_exact(name, torch.from_numpy(np.ascontiguousarray(value)))
        # For a prior by itself; a force field passes the edges of its network.
        self._graph = BeadGraph(topology, max(self.reach_A, 1.0), kind)

    def _tables(self, topology: Topology) -> dict[str, np.ndarray]:
        """Rows of every bonded term in the sites of the topology."""
        known = {_identity(row): row for row in self.config["molecules"]}
        parts: dict[str, list[np.ndarray]] = {kind: [] for kind in _SITES}
        for species in species_of(topology):
            constants = known.get(_identity(species.key))
            if constants is None:
                raise ValueError(
                    f"the prior knows no molecule of {len(species.one)} beads with the types "
                    f"{', '.join(species.one.types[:6])} and such bonds: fit it on data that hold "
                    "one"
                )
            for kind, sites in _SITES.items():
                rows = np.array(constants[kind], dtype=float)
                if len(rows):
                    copies, own = len(species.sites), rows[:, :sites].astype(int)
                    at = species.sites[:, own].reshape(-1, sites)
                    parts[kind].append(np.hstack([at, np.tile(rows[:, sites:], (copies, 1))]))
        widths = {"bonds": 4, "angles": 5, "dihedrals": 4}
        return {
            kind: np.concatenate(rows) if rows else np.zeros((0, widths[kind]))
            for kind, rows in parts.items()
        }

    def site_energies(self, beads: Tensor, edges: Edges, box: Tensor | None = None) -> Tensor:
        """Return energies in eV with every term shared evenly by its beads, shape (B, n).

        Parameters
        ----------
        beads
            Å, shape (B, n, 3).
        edges
            Pairs of beads that reach to `reach_A` or farther, see `BeadGraph.edges`.
        box
            Cell vectors of every frame in rows, in Å, shape (B, 3, 3); None for open space.
        """
        return self.bonded(beads, box) + self.volumes(beads, edges)

    def bonded(self, beads: Tensor, box: Tensor | None = None) -> Tensor:
        """Return each bead's share of bonds, angles and dihedrals in eV, shape (B, n)."""
        if not self.entry.numel():
            return beads.new_zeros(beads.shape[:2])

        def steps(chain: Tensor) -> Tensor:
            ends = beads.index_select(1, chain.flatten()).unflatten(1, chain.shape)
            vectors = ends.diff(dim=1)
            if box is not None:
                vectors = minimum_image(vectors, box[:, None, None])
            return vectors.unbind(1)

        (bond,) = steps(self.bond)
        r = ((bond * bond).sum(-1) + SOFT).sqrt()
        u, v = steps(self.bend)
        norms = ((u * u).sum(-1) + SOFT) * ((v * v).sum(-1) + SOFT)
        cosine = -(u * v).sum(-1) * norms.rsqrt()
        stretch = torch.addcmul(self.centre, torch.cat([r, cosine], -1), self.root_k)
        terms = [stretch * stretch]
        if self.n_dihedrals:
            cosine, sine = cos_sin(*steps(self.twist))
            multiple, energy = (cosine, sine), 0
            for a, b in self.fourier:
                c, s = multiple
                energy = energy + a * c + b * s
                multiple = c * cosine - s * sine, s * cosine + c * sine
            terms.append(energy)
        shares = torch.cat(terms, -1).index_select(1, self.entry) * self.share
        return shares.new_zeros(beads.shape[:2]).index_add(1, self.owner, shares)

    def volumes(self, beads: Tensor, edges: Edges) -> Tensor:
        """Return each bead's share of the excluded volume in eV, shape (B, n)."""
        batch, n, _ = beads.shape
        if not self.reach_A:
            return beads.new_zeros(batch, n)
        x = edges.layout(beads)
        vectors = edges.vectors(x)
        r = ((vectors * vectors).sum(0) + SOFT).sqrt()
        source, target = edges.index
        pair = edges.bonded, self.kind[source % n], self.kind[target % n]
        overlap = torch.addcmul(self.overlap[pair][:, None], r, self.slope[pair][:, None])
        energy = 0.5 * overlap.relu() ** 3
        sites = energy.new_zeros(x.shape[1:]).index_add(0, target, energy)
        return edges.by_frame(sites, batch)

    def forward(self, beads: Tensor, *, box: Tensor | None = None) -> Tensor:
        """Return the energy in eV, shape (...), of bead positions in Å, shape (..., n_beads, 3).

        `box`: cell vectors in rows, in Å, shape (3, 3) or (..., 3, 3); None for open space.
        """
        leading = beads.shape[:-2]
        flat = beads.reshape(-1, *beads.shape[-2:])
        if box is not None:
            box = box.expand(*leading, 3, 3).reshape(-1, 3, 3)
        energies = self.site_energies(flat, self._graph.edges(flat, box), box)
        return energies.sum(-1).view(leading)

    def table(self) -> list[dict[str, Any]]:
        """Return one readable row per term, for reports."""
        rows = []
        for molecule in self.config["molecules"]:
            rows += [
                ("bond", r[:2], f"r0 = {r[2]:.4f} Å, k = {r[3]:.4g} eV/Å²")
                for r in molecule["bonds"]
            ]
            rows += [
                ("angle", r[:3], f"cos θ0 = {r[3]:.4f}, k = {r[4]:.4g} eV")
                for r in molecule["angles"]
            ]
            rows += [
                ("dihedral", r[:4], "a, b = " + ", ".join(f"{x:.4g}" for x in r[4:]) + " eV")
                for r in molecule["dihedrals"]
            ]
        rows += [
            ("volume", (i, j), f"{n or 'over 3'} bonds apart, d = {d:.4f} Å, A = {A:.4g} eV")
            for i, j, n, d, A in self.config["volumes"]
        ]
        return [{"term": t, "beads": tuple(sites), "constants": c} for t, sites, c in rows]


def _identity(key: dict[str, Any]) -> tuple:
    return tuple(key["types"]), tuple(map(tuple, key["links"]))


def cos_sin(b1, b2, b3):
    """Cosine and sine of the dihedral along three bond vectors (..., 3), both zero if in line.

    IUPAC sign. Where a cross product vanishes the dihedral isn't defined; both functions fade to
    zero there, smoothly.
    """
    library = torch if isinstance(b1, Tensor) else np
    m, n = library.linalg.cross(b1, b2), library.linalg.cross(b2, b3)
    scale = (((m * m).sum(-1) * (n * n).sum(-1)) + _SOFT_PLANE) ** -0.5
    sine = (b1 * n).sum(-1) * ((b2 * b2).sum(-1) + SOFT) ** 0.5
    return (m * n).sum(-1) * scale, sine * scale
