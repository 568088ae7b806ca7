"""All-atom samples at given coarse states, with energies, forces, densities and labels."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, fields, replace

import numpy as np

from ccg_ase.checkpoint import map_from_dict, map_to_dict
from ccg_ase.mapping import CGMap
from ccg_ase.torsion_map import TorsionMap
from ccg_ase.units import thermal_energy

from .reference import read_npz, write_npz


@dataclass(frozen=True)
class Samples:
    """K all-atom samples at each of S coarse states, with what their energy calls gave.

    Attributes
    ----------
    beads
        Coarse states: beads (S, n_beads, 3) in Å, or torsions (S, n_torsions) in rad.
    positions, forces
        Atoms, (S, K, n_atoms, 3), Å, and their forces, eV/Å.
    energy, log_prob
        U, (S, K), eV, and ln q(x|s), (S, K).
    labels
        Mean-force labels f = kT ∂l/∂s at fixed noise, (S, K, n_beads, 3), eV/Å, or
        (S, K, n_torsions), eV/rad. Their average over p(x|s) is -∂F/∂s; at q = p every single one
        equals it.
    cg_map, temperature_K
        Of the backmapper that made them.
    n_calls
        Energy-and-force calls spent.
    """

    beads: np.ndarray
    positions: np.ndarray
    forces: np.ndarray
    energy: np.ndarray
    log_prob: np.ndarray
    labels: np.ndarray
    cg_map: CGMap | TorsionMap
    temperature_K: float
    n_calls: int

    @property
    def log_weight(self) -> np.ndarray:
        """Log-weights l = -U/kT - ln q, (S, K)."""
        return -self.energy / thermal_energy(self.temperature_K) - self.log_prob

    @property
    def slice_labels(self) -> np.ndarray:
        """Forces on the bead atoms, (S, K, n_beads, 3), eV/Å: the classic label of a slice map."""
        return self.cg_map.apply_forces(self.forces)

    @classmethod
    def concatenate(cls, *parts: Samples) -> Samples:
        """Join the states of parts that one backmapper made."""
        every = [part._arrays() for part in parts]
        arrays = {name: np.concatenate([one[name] for one in every]) for name in every[0]}
        return replace(parts[0], **arrays, n_calls=sum(part.n_calls for part in parts))

    def __getitem__(self, states: np.ndarray | slice) -> Samples:
        """Return the samples of some states; their share of `n_calls` with them."""
        arrays = {name: array[states] for name, array in self._arrays().items()}
        return replace(self, **arrays, n_calls=arrays["energy"].size)

    def with_more(self, others: Samples) -> Samples:
        """Return the samples at the same states together with others there."""
        mine, theirs = self._arrays(), others._arrays()
        arrays = {
            name: np.concatenate([mine[name], theirs[name]], axis=1)
            for name in mine
            if name != "beads"
        }
        return replace(self, **arrays, n_calls=self.n_calls + others.n_calls)

    def _arrays(self) -> dict[str, np.ndarray]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, np.ndarray)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an NPZ file, atomically."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["cg_map"] = np.asarray(json.dumps(map_to_dict(self.cg_map)))
        write_npz(path, {name: np.asarray(value) for name, value in values.items()})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Samples:
        """Read what `save` wrote."""
        values = {name: a.item() if a.ndim == 0 else a for name, a in read_npz(path).items()}
        values["cg_map"] = map_from_dict(json.loads(values["cg_map"]))
        return cls(**values)
