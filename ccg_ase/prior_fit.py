"""Fit a prior to the statistics of reference beads, by Boltzmann inversion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ccg_ase.graph import MAX_BOND_CLASS, BondClasses, cell_of, minimum_image, radius_edges
from ccg_ase.prior import SOFT, TERMS, Prior, cos_sin
from ccg_ase.species import Species, species_of
from ccg_ase.topology import Topology
from ccg_ase.units import thermal_energy

_LEAST_SPREAD = 0.01  # Å, or in cos θ: a rigid coordinate gets a stiff, finite spring
_VOLUME_STRENGTH = 300.0  # kT at full overlap
_CONTACT_PERCENTILE = 0.5
_MAX_CONTACT_A = 5.0  # pairs that never meet in the data say nothing about contact
_CONTACT_FRAMES = 5000
_DIHEDRAL_BINS = 72


def fit_prior(
    beads: np.ndarray,
    topology: Topology,
    temperature_K: float,
    *,
    boxes: np.ndarray | None = None,
    terms: Sequence[str] = ("bonds", "angles", "volumes"),
    dihedral_order: int = 3,
) -> Prior:
    """Invert the statistics of reference beads at their temperature.

    A harmonic term has k = kT/variance. Distances carry the volume element r², whose harmonic
    approximation is taken off, so that a lone bond reproduces mean and variance; cos θ has a flat
    volume element. A dihedral's series is fitted to -kT ln of its histogram. The contact distance
    of two types is a low percentile of the distance from a bead to the nearest one of the other
    type, 5 Å at most; one each for beads 2 bonds, 3 bonds and farther apart, since angles are too
    soft to keep ends apart against a network that never saw them meet. Statistics of molecules of
    one species are pooled.

    Parameters
    ----------
    beads
        Equilibrium bead positions in Å, shape (N, n_beads, 3).
    topology
        The beads' topology.
    temperature_K
        Temperature of the data in K.
    boxes
        Cell vectors of every frame in rows, in Å, shape (N, 3, 3); None for open space.
    terms
        Which of ``bonds``, ``angles``, ``dihedrals``, ``volumes`` to have. Without bonds, nothing
        holds a molecule together but the network.
    dihedral_order
        Highest multiplicity m of the dihedral series.

    Raises
    ------
    ValueError
        If shapes don't fit, a number isn't finite, a box has no volume, or a term is unknown.
    """
    beads = np.asarray(beads, dtype=float)
    if beads.ndim != 3 or beads.shape[1:] != (len(topology), 3) or len(beads) < 2:
        raise ValueError(f"beads must have shape (N >= 2, {len(topology)}, 3), got {beads.shape}")
    if boxes is not None:
        boxes = np.asarray(boxes, dtype=float)
        if boxes.shape != (len(beads), 3, 3):
            raise ValueError(f"boxes must have shape ({len(beads)}, 3, 3), got {boxes.shape}")
        for box in boxes:
            cell_of(box)  # refuses those without a volume
    if not np.isfinite(beads).all():
        raise ValueError("beads hold NaN or infinity")
    unknown = set(terms) - set(TERMS)
    if unknown or dihedral_order < 1:
        raise ValueError(
            f"terms must be among {', '.join(TERMS)} and dihedral_order at least 1, got "
            f"{', '.join(terms)} and {dihedral_order}"
        )
    kT = thermal_energy(temperature_K)
    molecules = []
    for species in species_of(topology):
        fits = {
            "bonds": lambda s: _bonds(_steps(beads, boxes, s, s.one.bonds), s.one.bonds, kT),
            "angles": lambda s: _angles(
                _steps(beads, boxes, s, s.one.angles()), s.one.angles(), kT
            ),
            "dihedrals": lambda s: _dihedrals(
                _steps(beads, boxes, s, s.one.dihedrals()), s.one.dihedrals(), kT, dihedral_order
            ),
        }
        rows = {kind: fit(species) if kind in terms else [] for kind, fit in fits.items()}
        molecules.append({**species.key, **rows})
    return Prior(
        {
            "temperature_K": float(temperature_K),
            "molecules": molecules,
            "volumes": _volumes(beads, boxes, topology, kT) if "volumes" in terms else [],
        },
        topology,
    )


def _steps(
    beads: np.ndarray, boxes: np.ndarray | None, species: Species, chains: np.ndarray
) -> np.ndarray:
    """Vectors along chains of sites, all copies as frames: (length - 1, samples, chains, 3)."""
    at = species.sites[:, chains]  # (copies, chains, length)
    vectors = np.diff(beads[:, at], axis=3)  # (N, copies, chains, length - 1, 3)
    if boxes is not None:
        vectors = minimum_image(vectors, boxes[:, None, None, None])
    return np.moveaxis(np.concatenate(vectors.swapaxes(0, 1)), 2, 0)


def _bonds(steps: np.ndarray, pairs: np.ndarray, kT: float) -> list[list[float]]:
    r = np.sqrt((steps[0] ** 2).sum(-1) + SOFT)
    mean, precision = r.mean(0), 1 / np.maximum(r.std(0), _LEAST_SPREAD) ** 2
    stiffness = np.maximum(precision - 2 / mean**2, 0.1 * precision)
    return _rows(pairs, mean - 2 / (mean * stiffness), kT * stiffness)


def _angles(steps: np.ndarray, triples: np.ndarray, kT: float) -> list[list[float]]:
    u, v = steps
    norms = ((u**2).sum(-1) + SOFT) * ((v**2).sum(-1) + SOFT)
    cosine = -(u * v).sum(-1) / np.sqrt(norms)
    return _rows(triples, cosine.mean(0), kT / np.maximum(cosine.std(0), _LEAST_SPREAD) ** 2)


def _dihedrals(steps: np.ndarray, chains: np.ndarray, kT: float, order: int) -> list[list[float]]:
    """Coefficients of -kT ln p(φ), by least squares on its histogram.

    Half a count is added to every bin: an empty one gets a finite, high energy.
    """
    cosine, sine = cos_sin(*steps)
    edges = np.linspace(-np.pi, np.pi, _DIHEDRAL_BINS + 1)
    counts = [np.histogram(phi, edges)[0] for phi in np.arctan2(sine, cosine).T]
    energy = -kT * np.log(np.reshape(counts, (-1, _DIHEDRAL_BINS)) + 0.5)
    angle = np.multiply.outer((edges[:-1] + edges[1:]) / 2, np.arange(1, order + 1))
    # The bins are equidistant, hence the series orthogonal: least squares is projection.
    series = np.stack([np.cos(angle), np.sin(angle)], -1)
    coefficients = (2 / _DIHEDRAL_BINS) * np.einsum("cb,bmk->cmk", energy, series)
    return _rows(chains, *coefficients.reshape(len(chains), 2 * order).T)


def _volumes(
    beads: np.ndarray, boxes: np.ndarray | None, topology: Topology, kT: float
) -> list[list[Any]]:
    names, kind = np.unique(topology.types, return_inverse=True)
    classes = BondClasses(topology)
    partners = _partners(topology, kind, len(names))
    apart, other, site = np.nonzero(partners)
    nearest = []
    every = max(1, len(beads) // _CONTACT_FRAMES)
    for f in range(0, len(beads), every):
        (source, target), _, lengths = radius_edges(
            beads[f], _MAX_CONTACT_A, None if boxes is None else boxes[f]
        )
        bonded = classes(source, target)
        bonded[bonded == MAX_BOND_CLASS] = 0
        of_frame = np.full(partners.shape, _MAX_CONTACT_A)
        np.minimum.at(of_frame, (bonded, kind[source], target), lengths)
        nearest.append(of_frame[apart, other, site])
    # One column per site and type of its partners, grouped by unordered pair of types.
    groups = np.stack([apart, *np.sort([other, kind[site]], axis=0)])
    keys, counts = np.unique(groups, axis=1, return_counts=True)
    columns, order = np.array(nearest), np.lexsort(groups[::-1])
    rows = []
    for (c, a, b), own in zip(keys.T, np.split(order, np.cumsum(counts))[:-1], strict=True):
        contact = float(np.percentile(columns[:, own], _CONTACT_PERCENTILE))
        rows.append([str(names[a]), str(names[b]), int(c), contact, _VOLUME_STRENGTH * kT])
    return rows


def _partners(topology: Topology, kind: np.ndarray, n_types: int) -> np.ndarray:
    """Beads of every type 2, 3, or (row 0) more bonds from every bead, shape (4, types, n)."""
    near = topology.near(np.arange(len(topology)), MAX_BOND_CLASS - 1)
    partners = np.zeros((MAX_BOND_CLASS, n_types, len(topology)), dtype=int)
    np.add.at(partners, (near.distance, kind[near.site], near.source), 1)
    partners[0] = np.bincount(kind, minlength=n_types)[:, None] - partners.sum(0)
    partners[1] = 0  # bonded: what holds them apart is their bond
    return partners


def _rows(sites: np.ndarray, *constants: np.ndarray) -> list[list[float]]:
    """Plain numbers: the sites of every term, then its constants."""
    values = np.stack(constants, -1).tolist() if constants else [[]] * len(sites)
    return [own + value for own, value in zip(sites.tolist(), values, strict=True)]
