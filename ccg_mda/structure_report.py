"""What a check of structures found: defects by kind, as a table and as figures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Z_LIMIT = 6.0
"""Standard deviations from the reference's mean beyond which a bond or an angle is an outlier."""
SEARCHED_A = 2.0
"""How far the smallest distance between atoms is looked for, in Å."""


@dataclass(frozen=True, eq=False)
class Defects:
    """One kind of defect: how many each frame has, (n_frames,), out of how many terms.

    `worst` names the term that has it in most frames, "" if there is none.
    """

    per_frame: np.ndarray
    n_terms: int
    worst: str

    @property
    def share(self) -> float:
        """Defects per term and frame."""
        return float(self.per_frame.mean() / max(self.n_terms, 1))


@dataclass(frozen=True, eq=False)
class StructureReport:
    """What `check_structure` found.

    Attributes
    ----------
    bonds, angles
        Terms more than `Z_LIMIT` reference standard deviations from the reference's mean.
    clashes
        Pairs of atoms more than three bonds apart and closer than the threshold; out of atoms.
    clash_residues
        Residues in clashes, out of residues.
    chirality
        Stereocentres of the sign opposite to the reference's.
    cis_trans
        Held torsions more than 90° from the reference's mean.
    piercings
        Bonds that pass through rings; out of rings.
    smallest_distance_A
        Between atoms more than three bonds apart, (n_frames,); infinite if above 2 Å.
    bond_types, bond_sd_ratio
        Pairs of atom names; standard deviation of such bonds over the reference's, NaN for a single
        frame. Variances are pooled over the bonds of a type, each around its own mean.
    """

    bonds: Defects
    angles: Defects
    clashes: Defects
    clash_residues: Defects
    chirality: Defects
    cis_trans: Defects
    piercings: Defects
    smallest_distance_A: np.ndarray
    bond_types: tuple[str, ...]
    bond_sd_ratio: np.ndarray

    @property
    def n_frames(self) -> int:
        """Number of frames."""
        return len(self.smallest_distance_A)

    @property
    def defects(self) -> dict[str, Defects]:
        """All kinds of defects by what they are called in the table."""
        return {
            "bond length outliers": self.bonds,
            "angle outliers": self.angles,
            "clashes, per atom": self.clashes,
            "residues in clashes": self.clash_residues,
            "chirality flips": self.chirality,
            "cis/trans flips": self.cis_trans,
            "bonds through rings": self.piercings,
        }

    @property
    def sound(self) -> np.ndarray:
        """Frames without any defect, (n_frames,) bool."""
        return ~np.any([kind.per_frame > 0 for kind in self.defects.values()], axis=0)

    def spread_of(self, bond_type: str) -> float:
        """Return `bond_sd_ratio` of one of `bond_types`."""
        return float(self.bond_sd_ratio[self.bond_types.index(bond_type)])

    def _worst_spread(self) -> int:
        return int(np.argmax(np.abs(np.log(np.nan_to_num(self.bond_sd_ratio, nan=1.0)))))

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """Return a table: check, terms per frame, share of terms, share of frames, worst term."""
        rows = [
            (name, str(k.n_terms), f"{k.share:.3%}", f"{np.mean(k.per_frame > 0):.2%}", k.worst)
            for name, k in self.defects.items()
            if k.n_terms
        ]
        rows.append(("any of these", "", "", f"{np.mean(~self.sound):.2%}", ""))
        worst, closest = self._worst_spread(), self.smallest_distance_A.min()
        ratio = f"{self.bond_sd_ratio[worst]:.2f} times, {self.bond_types[worst]}"
        rows.append(("bond spread over reference", str(len(self.bond_types)), "", "", ratio))
        distance = f"{closest:.2f} Å" if np.isfinite(closest) else f"above {SEARCHED_A:g} Å"
        rows.append(("closest atoms", "", "", "", distance))
        return rows

    def summary(self) -> dict[str, float]:
        """Return shares of terms, piercings per frame, worst distance (up to 2 Å) and spread."""
        return {
            "bond_outliers": self.bonds.share,
            "angle_outliers": self.angles.share,
            "clashes_per_frame": float(self.clashes.per_frame.mean()),
            "clash_residues": self.clash_residues.share,
            "smallest_distance_A": float(min(self.smallest_distance_A.min(), SEARCHED_A)),
            "chirality_flips": self.chirality.share,
            "cis_trans_flips": self.cis_trans.share,
            "ring_piercings_per_frame": float(self.piercings.per_frame.mean()),
            "bond_sd_ratio_worst": float(self.bond_sd_ratio[self._worst_spread()]),
            "sound_frames": float(self.sound.mean()),
        }
