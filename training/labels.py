"""Labels: what is known about the free energy F(s) at some coarse states, with errors."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields

import numpy as np

from ccg_mda.bounds import Estimate

from .estimators import free_energy, mean_force
from .reference import write_npz
from .samples import Samples

PLAIN, ANNEALED, RESTRAINED, FRAME, FORCE = "plain", "annealed", "restrained", "frame", "force"


@dataclass(frozen=True, eq=False)
class Labels:
    """Mean forces at L coarse states, and free energies where they are known.

    Parameters
    ----------
    beads
        Coarse states: beads (L, n_beads, 3) in Å, or torsions (L, n_torsions) in rad.
    force
        Estimates of -∂F/∂s, of the same shape, eV/Å or eV/rad.
    force_variance
        Variance of one component of `force`, (L,), (eV/Å)² or (eV/rad)². NaN: unknown, as it is of
        forces that were merely mapped (`from_forces`).
    free_energy, free_energy_variance
        Estimates of F(s) on one common scale, (L,) eV, and variances, eV². NaN (both): unknown.
    temperature_K
        Of every label, (L,), K. NaN: that of the model, as if it had no other.
    boxes
        Cell vectors in rows, (L, 3, 3), Å. NaN: open space.
    run
        Number of the run of dynamics, or the part of one, whose frame a label is from, (L,):
        `split` keeps those of one run together, since they are alike. NaN: a label by itself.
    origin
        What each label comes from, (L,) str: `PLAIN` or `ANNEALED` weighted samples, frames of
        `RESTRAINED` dynamics, a `FRAME` of the reference, a mapped `FORCE`; "" where that isn't
        known.

    Raises
    ------
    ValueError
        If shapes differ, a value isn't finite or a variance is negative.
    """

    beads: np.ndarray
    force: np.ndarray
    force_variance: np.ndarray
    free_energy: np.ndarray | None = None
    free_energy_variance: np.ndarray | None = None
    temperature_K: np.ndarray | None = None
    boxes: np.ndarray | None = None
    run: np.ndarray | None = None
    origin: np.ndarray | None = None

    def __post_init__(self) -> None:
        n = len(self.beads)
        origin = np.full(n, "") if self.origin is None else np.asarray(self.origin, dtype=str)
        object.__setattr__(self, "origin", np.broadcast_to(origin, (n,)))
        for field in fields(self)[:-1]:
            value, shape = getattr(self, field.name), (n, 3, 3) if field.name == "boxes" else (n,)
            value = np.full(shape, np.nan) if value is None else np.asarray(value, dtype=np.float64)
            object.__setattr__(self, field.name, value)
        if self.beads.ndim not in (2, 3) or self.beads.shape != self.force.shape:
            raise ValueError(
                "beads and force must both be (L, n_beads, 3), or (L, n_torsions); got "
                f"{self.beads.shape} and {self.force.shape}"
            )
        per_state = (
            self.force_variance,
            self.free_energy,
            self.free_energy_variance,
            self.temperature_K,
            self.run,
        )
        if any(value.shape != (n,) for value in per_state):
            raise ValueError(f"variances, free energies, temperatures, runs must have shape ({n},)")
        boxless = np.isnan(self.boxes)
        if self.boxes.shape != (n, 3, 3) or (boxless.any() and not boxless.all()):
            raise ValueError(f"boxes must have shape ({n}, 3, 3), all of them or none")
        if not all(np.isfinite(a).all() for a in (self.beads, self.force)):
            raise ValueError("beads and force must be finite; drop failed labels")
        if np.isinf(self.force_variance).any():
            raise ValueError("force_variance must be finite, or NaN where it is unknown")
        if np.any(np.isfinite(self.free_energy) != np.isfinite(self.free_energy_variance)):
            raise ValueError("a free energy needs its variance; both are NaN where there is none")
        if np.any(self.force_variance < 0) or np.any(self.free_energy_variance < 0):
            raise ValueError("variances must not be negative")

    @classmethod
    def from_samples(cls, samples: Samples) -> Labels:
        """Average the samples at each state (E2, E3a).

        The error bars of poor weights are too small: `labelling.label` takes only states that
        `gates.trusted` lets through.

        Parameters
        ----------
        samples
            From `reconstruct`, K >= 2.
        """
        force = mean_force(samples.log_weight, samples.labels)
        energy = free_energy(samples.log_weight, samples.temperature_K)
        return cls.from_estimates(samples.beads, force, energy, PLAIN)

    @classmethod
    def from_estimates(
        cls, beads: np.ndarray, force: Estimate, energy: Estimate, origin: str
    ) -> Labels:
        """Take estimates of the mean force, and of F on one common scale, with their errors."""
        components = tuple(range(1, force.error.ndim))
        variance = (force.error**2).mean(components)
        return cls(beads, force.value, variance, energy.value, energy.error**2, origin=origin)

    @classmethod
    def from_frames(cls, frames: Samples, variance: float | np.ndarray) -> Labels:
        """Take the label of each atomistic frame (E3b), of known variance per component.

        Parameters
        ----------
        frames
            From `pull_back_frames`, K = 1.
        variance
            Of a single label, () or (S,), (eV/Å)²; `label_variance` of samples gives it.
        """
        return cls(
            frames.beads,
            frames.labels[:, 0],
            np.broadcast_to(variance, (len(frames.beads),)),
            origin=FRAME,
        )

    @classmethod
    def from_forces(
        cls,
        beads: np.ndarray,
        forces: np.ndarray,
        *,
        boxes: np.ndarray | None = None,
        temperature_K: np.ndarray | None = None,
        run: np.ndarray | None = None,
    ) -> Labels:
        """Take the mapped force on the beads of every frame: its mean at a state is -∂F/∂s.

        The baseline where there is no flow. The noise of such a label is unknown, and large.

        Parameters
        ----------
        beads, forces
            (L, n_beads, 3), Å and eV/Å; `ForceMap.apply` maps atomistic forces.
        boxes, temperature_K, run
            As for the class.
        """
        known = {"boxes": boxes, "temperature_K": temperature_K, "run": run}
        return cls(beads, forces, np.full(len(beads), np.nan), **known, origin=FORCE)

    @classmethod
    def concatenate(cls, *parts: Labels) -> Labels:
        """Join labels from several sources (frames, samples, earlier iterations)."""
        columns = (np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(cls))
        return cls(*columns)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Labels:
        """Read the npz file that `save` wrote."""
        with np.load(path) as file:
            return cls(**file)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an npz file, atomically."""
        write_npz(path, vars(self))

    def __len__(self) -> int:
        return len(self.beads)

    def __getitem__(self, index: np.ndarray | slice) -> Labels:
        """Return the labels of some states."""
        return Labels(*(getattr(self, field.name)[index] for field in fields(self)))

    def split(self, fraction: float = 0.1, seed: int = 0) -> tuple[Labels, Labels]:
        """Hold out a random share, by whole runs: training labels, held-out labels."""
        alone = np.isnan(self.run)
        single = np.nanmax(self.run, initial=0) + 1 + np.arange(len(self))
        group = np.unique(np.where(alone, single, self.run), return_inverse=True)[1]
        order = np.random.default_rng(seed).permutation(group.max() + 1)
        n_held_out = max(1, round(fraction * len(order)))
        held_out = np.isin(group, order[:n_held_out])
        return self[~held_out], self[held_out]
