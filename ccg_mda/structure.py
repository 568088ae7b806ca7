"""Is a reconstructed structure sound: bonds, angles, clashes, chirality, isomers, rings.

Reference frames say what is normal for each term of the topology; `check_structure` counts what
isn't. Every count stands beside the number of terms it was taken from.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ccg_ase.topology import Topology

from .contacts import Pairs, close_pairs, ring_piercings, small_rings
from .internals import (
    measured,
    proper_torsions,
    signed_volumes,
    site_classes,
    stereo_centres,
    term_name,
    wrapped,
)
from .structure_report import SEARCHED_A, Z_LIMIT, Defects, StructureReport

CLASH_A = 1.2
"""Distance below which two atoms more than three bonds apart clash."""
# What the reference holds rigid, or knows from few frames, gets at least this deviation: Å, rad.
_LEAST_BOND_SD, _LEAST_ANGLE_SD = 0.005, 0.01
_RIGID_SD = 1e-3  # Å; bonds that fluctuate by less count as equally rigid


@dataclass(frozen=True, eq=False)
class StructureReference:
    """What reference frames say about the structure of a molecule; made by `from_frames`.

    Attributes
    ----------
    topology
        Of the atoms.
    bond_mean, bond_sd
        Å, (n_bonds,), of ``topology.bonds``.
    angles, angle_mean, angle_sd
        Atoms i-j-k, (n_angles, 3); rad, (n_angles,).
    centres, centre_sign
        Stereocentres whose signed volume never changes sign: the centre and its four neighbours,
        (n_centres, 5); the sign, (n_centres,).
    held, held_mean
        Torsions of bonds that may have cis and trans isomers (peptide bonds, double bonds), one per
        bond, that stay within a half-circle: atoms, (n_held, 4); circular mean in rad, (n_held,).
    rotatable, fold
        All other torsions outside rings, one per bond, (n_rotatable, 4); turns of 2π/fold only swap
        like atoms, (n_rotatable,).
    rings
        From `small_rings`.
    """

    topology: Topology
    bond_mean: np.ndarray
    bond_sd: np.ndarray
    angles: np.ndarray
    angle_mean: np.ndarray
    angle_sd: np.ndarray
    centres: np.ndarray
    centre_sign: np.ndarray
    held: np.ndarray
    held_mean: np.ndarray
    rotatable: np.ndarray
    fold: np.ndarray
    rings: np.ndarray

    @cached_property
    def near(self) -> np.ndarray:
        """Pairs i, j up to three bonds apart as numbers i * n_atoms + j, ascending."""
        step = self.topology.adjacency
        pairs = (step + step @ step + step @ step @ step).tocoo()
        return np.sort(pairs.row.astype(int) * len(self.topology) + pairs.col)

    @classmethod
    def from_frames(
        cls, topology: Topology, positions: np.ndarray, box: np.ndarray | None = None
    ) -> StructureReference:
        """Take the statistics of frames.

        Parameters
        ----------
        topology
            Of the atoms, with their bonds.
        positions
            (n_frames, n_atoms, 3), Å; at least two frames, better hundreds.
        box
            Lengths in Å and angles in degrees, (6,) or (n_frames, 6); None without periodicity.

        Raises
        ------
        ValueError
            If shapes don't fit, a position isn't finite, there are no bonds or fewer than two
            frames.
        """
        x, box = _checked(topology, positions, box)
        if len(x) < 2:
            raise ValueError("the spread of bonds needs at least two reference frames, got one")
        if not len(topology.bonds):
            raise ValueError(
                "the topology has no bonds, so nothing is known of its structure: give bonds, or "
                "let MDAnalysis guess them (to_guess=('bonds',))"
            )
        bond, angles = measured(x, topology.bonds, box), topology.angles()
        angle = measured(x, angles, box)
        rings, kind = small_rings(topology), site_classes(topology)
        centres = stereo_centres(topology, kind)
        sign = np.sign(signed_volumes(x, centres, box))
        kept = np.abs(sign.sum(0)) == len(x)
        torsions, isomers, in_ring, fold = proper_torsions(topology, rings, kind)
        turn = measured(x, torsions, box)
        mean = np.angle(np.exp(1j * turn).mean(0))
        held = isomers & (np.abs(wrapped(turn - mean)) < np.pi / 2).all(0)
        free = ~held & ~in_ring
        return cls(
            topology=topology,
            bond_mean=bond.mean(0),
            bond_sd=bond.std(0, ddof=1),
            angles=angles,
            angle_mean=angle.mean(0),
            angle_sd=angle.std(0, ddof=1),
            centres=centres[kept],
            centre_sign=sign[0, kept],
            held=torsions[held],
            held_mean=mean[held],
            rotatable=torsions[free],
            fold=fold[free],
            rings=rings,
        )


def check_structure(
    reference: StructureReference,
    positions: np.ndarray,
    box: np.ndarray | None = None,
    *,
    clash_A: float = CLASH_A,
) -> StructureReport:
    """Check frames against a reference; time and memory are linear in atoms and frames.

    Parameters
    ----------
    reference
        From `StructureReference.from_frames`, of the same topology.
    positions
        (..., n_atoms, 3), Å; the leading axes are frames.
    box
        Lengths in Å and angles in degrees, (6,) or (n_frames, 6); None without periodicity.
    clash_A
        Distance below which atoms more than three bonds apart clash.

    Raises
    ------
    ValueError
        If shapes don't fit or a position isn't finite.
    """
    topology = reference.topology
    x, box = _checked(topology, positions, box)

    def defects(wrong: np.ndarray, terms: np.ndarray) -> Defects:
        often = wrong.sum(0)
        worst = term_name(topology, terms[often.argmax()]) if often.any() else ""
        return Defects(wrong.sum(1), len(terms), worst)

    bond = measured(x, topology.bonds, box)
    bond_z = (bond - reference.bond_mean) / np.maximum(reference.bond_sd, _LEAST_BOND_SD)
    angle_z = measured(x, reference.angles, box) - reference.angle_mean
    angle_z /= np.maximum(reference.angle_sd, _LEAST_ANGLE_SD)
    sign = np.sign(signed_volumes(x, reference.centres, box))
    turned = np.abs(wrapped(measured(x, reference.held, box) - reference.held_mean)) > np.pi / 2
    types, ratio = _spread_ratio(reference, bond)
    clashes, residues, distance = _clashes(reference, x, box, clash_A)
    pierced = ring_piercings(x, reference.rings, topology.bonds, box)
    through = ""
    if len(pierced.frame):
        pairs, counts = np.unique([pierced.ring, pierced.bond], axis=1, return_counts=True)
        ring, bond_row = pairs[:, counts.argmax()]
        ring_name = term_name(topology, np.unique(reference.rings[ring]))
        through = f"{term_name(topology, topology.bonds[bond_row])} through {ring_name}"
    return StructureReport(
        bonds=defects(np.abs(bond_z) > Z_LIMIT, topology.bonds),
        angles=defects(np.abs(angle_z) > Z_LIMIT, reference.angles),
        clashes=clashes,
        clash_residues=residues,
        chirality=defects(sign == -reference.centre_sign, reference.centres[:, :1]),
        cis_trans=defects(turned, reference.held),
        piercings=Defects(
            np.bincount(pierced.frame, minlength=len(x)), len(reference.rings), through
        ),
        smallest_distance_A=distance,
        bond_types=types,
        bond_sd_ratio=ratio,
    )


def _clashes(
    reference: StructureReference, x: np.ndarray, box: np.ndarray | None, clash_A: float
) -> tuple[Defects, Defects, np.ndarray]:
    """Clashing pairs, residues in clashes, and the smallest distance of each frame."""
    topology, n = reference.topology, len(reference.topology)
    close = close_pairs(x, max(SEARCHED_A, clash_A), box)
    key = close.first * n + close.second
    place = np.searchsorted(reference.near, key)
    far = np.append(reference.near, -1)[place] != key
    frame, first, second, distance = Pairs(*(column[far] for column in close))
    smallest = np.full(len(x), np.inf)
    np.minimum.at(smallest, frame, distance)
    hit = distance < clash_A
    frame, first, second = frame[hit], first[hit], second[hit]
    worst = ""
    if len(frame):
        pairs, counts = np.unique([first, second], axis=1, return_counts=True)
        worst = " and ".join(term_name(topology, [i]) for i in pairs[:, counts.argmax()])
    keys = zip(topology.segids, topology.molecules, topology.resids, strict=True)
    number: dict[tuple, int] = {}
    residue = np.array([number.setdefault(key, len(number)) for key in keys])
    touched = np.unique(
        np.concatenate([frame, frame]) * len(number) + residue[np.concatenate([first, second])]
    )
    residues = np.bincount(touched // len(number), minlength=len(x))
    pairs_of = np.bincount(frame, minlength=len(x))
    return Defects(pairs_of, n, worst), Defects(residues, len(number), ""), smallest


def _spread_ratio(
    reference: StructureReference, bond: np.ndarray
) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the types of bonds, and the standard deviation of each over the reference's."""
    names = reference.topology.names
    labels = ["-".join(sorted((names[i], names[j]))) for i, j in reference.topology.bonds]
    types, which = np.unique(labels, return_inverse=True)
    if len(bond) < 2:
        return tuple(types.tolist()), np.full(len(types), np.nan)
    size = np.bincount(which)
    ours, known = (
        np.sqrt(np.bincount(which, variance) / size)
        for variance in (bond.var(0, ddof=1), reference.bond_sd**2)
    )
    return tuple(types.tolist()), np.maximum(ours, _RIGID_SD) / np.maximum(known, _RIGID_SD)


def _checked(
    topology: Topology, positions: np.ndarray, box: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Positions as (n_frames, n_atoms, 3) in float64, and the box as an array."""
    x = np.asarray(positions, dtype=np.float64)
    if x.ndim < 2 or x.shape[-2:] != (len(topology), 3) or x.size == 0:
        raise ValueError(
            f"expected positions of shape (n_frames, {len(topology)}, 3), got {x.shape}"
        )
    x = x.reshape(-1, len(topology), 3)
    broken = ~np.isfinite(x).all((1, 2))
    if broken.any():
        raise ValueError(
            f"{broken.sum()} of {len(x)} frames hold positions that are NaN or infinite; the "
            f"first is frame {broken.argmax()}"
        )
    if box is not None:
        box = np.asarray(box, dtype=np.float32)
        if box.shape not in ((6,), (len(x), 6)):
            raise ValueError(f"expected a box of shape (6,) or ({len(x)}, 6), got {box.shape}")
    return x, box
