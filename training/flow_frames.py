"""Frames that a flow learns from, and the mini-batches drawn from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ccg_ase.devices import device_of
from ccg_ase.units import thermal_energy
from ccg_mda.flow import Backmapper


@dataclass(frozen=True, eq=False)
class FlowFrames:
    """Frames to learn from.

    Attributes
    ----------
    positions
        Shape (n, n_atoms, 3) in Å.
    weight
        Relative weight of each frame, shape (n,): how often it is drawn. One for all frames of a
        trajectory, or any function of s alone: q(x|s) doesn't depend on how often s occurs.
    forces, energy
        Atomistic forces (n, n_atoms, 3) in eV/Å and energies (n,) in eV.
    bead_force, free_energy
        The bead force field at each frame: -∂F/∂s, of the shape of the coarse variables, in eV per
        their unit (eV/Å for beads), and F (n,) in eV.
    temperature_K
        Temperature of each frame (n,), for a flow that is conditioned on it.
    box
        Cell vectors of each frame as rows, (n, 3, 3) in Å; its molecules must be whole.
    """

    positions: np.ndarray
    weight: np.ndarray
    forces: np.ndarray | None = None
    energy: np.ndarray | None = None
    bead_force: np.ndarray | None = None
    free_energy: np.ndarray | None = None
    temperature_K: np.ndarray | None = None
    box: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, chosen: Any) -> FlowFrames:
        """Return some of the frames, by anything that indexes an array."""
        return FlowFrames(*(None if a is None else a[chosen] for a in vars(self).values()))

    def joined(self, other: FlowFrames) -> FlowFrames:
        """Return the frames of both.

        Raises
        ------
        ValueError
            If one of them has an array that the other lacks.
        """
        names = [f.name for f in fields(self)]
        uneven = [n for n in names if (getattr(self, n) is None) != (getattr(other, n) is None)]
        if uneven:
            raise ValueError(f"only one of both sets of frames has {' and '.join(uneven)}: add it")
        pairs = [(getattr(self, name), getattr(other, name)) for name in names]
        return FlowFrames(*(None if a is None else np.concatenate([a, b]) for a, b in pairs))


def relabellings(flow: Backmapper, n: int, rng: np.random.Generator) -> np.ndarray:
    """Draw random cyclic relabellings of the identical atoms of each rotor, (n, n_atoms) indices.

    The flow's rotors cover every labelling of a methyl group; a trajectory of finite length visits
    them unevenly. A random relabelling of every frame makes the data cover all of them too. A group
    that doesn't turn in the data keeps its labels, in the flow as in the data.
    """
    order = np.tile(np.arange(flow.cg_map.n_atoms), (n, 1))
    placement, turns_freely = flow.placement, flow.coordinates.rotor.cpu().numpy()
    leading = set(placement.atoms[turns_freely & (placement.multiplicity > 1)].tolist())
    for group in placement.rotor_groups:
        if leading.isdisjoint(group):
            continue
        turns = np.arange(len(group)) + rng.integers(len(group), size=(n, 1))
        order[:, group] = np.take(group, turns, mode="wrap")
    return order


def thermal_energies(flow: Backmapper, frames: FlowFrames) -> np.ndarray | float:
    """Return kT in eV: of each frame (n,) where temperatures are given, else the flow's."""
    if frames.temperature_K is None:
        return thermal_energy(flow.temperature_K)
    return thermal_energy(1.0) * np.asarray(frames.temperature_K, dtype=float)


CONDITIONS = ("temperature_K", "box")


def conditions(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what a flow is conditioned on besides the coarse variables, as keywords."""
    return {name: batch[name] for name in CONDITIONS if name in batch}


def given_conditions(frames: FlowFrames) -> dict[str, np.ndarray]:
    """Return the same of all frames, where they carry it."""
    arrays = {name: getattr(frames, name) for name in CONDITIONS}
    return {name: array for name, array in arrays.items() if array is not None}


class Batches:
    """Random mini-batches in single precision and units of kT, relabelled afresh each time.

    Parameters
    ----------
    flow
        Whose rotors and temperature count.
    frames
        Where batches are drawn from.
    rng
        Of the draws.
    """

    def __init__(self, flow: Backmapper, frames: FlowFrames, rng: np.random.Generator) -> None:
        kt = thermal_energies(flow, frames)
        self._flow, self._rng = flow, rng
        centred = frames.positions - frames.positions.mean(1, keepdims=True)  # keeps float32 sharp
        self._by_atom = {"positions": centred}
        self._by_frame = {
            "weight": frames.weight / frames.weight.mean(),
            **given_conditions(frames),
        }
        if frames.forces is not None:
            self._by_atom["forces"] = (frames.forces.T / kt).T
        if frames.bead_force is not None:
            self._by_frame["bead_force"] = (frames.bead_force.T / kt).T
        if frames.energy is not None:
            known = frames.free_energy is not None
            excess = (frames.energy - frames.free_energy if known else frames.energy) / kt
            self._by_frame["excess_energy" if known else "energy"] = excess - excess.mean()
        cumulative = np.cumsum(frames.weight)
        self._cumulative = cumulative / cumulative[-1]  # ends at one: every draw lies below
        for arrays in (self._by_atom, self._by_frame):
            for name, array in arrays.items():
                arrays[name] = torch.from_numpy(np.asarray(array, np.float32, order="C"))

    def in_order(self, size: int) -> Iterator[dict[str, Tensor]]:
        """Yield all frames once, as they are, in batches of at most ``size``."""
        columns = self._by_atom | self._by_frame
        for start in range(0, len(columns["weight"]), size):
            yield self._there(
                {name: array[start : start + size] for name, array in columns.items()}
            )

    def draw(self, size: int) -> dict[str, Tensor]:
        """Return one batch of ``size`` frames of weight one, drawn by weight, with replacement."""
        place = np.searchsorted(self._cumulative, self._rng.random(size), side="right")
        chosen = torch.from_numpy(place)
        order = torch.from_numpy(relabellings(self._flow, size, self._rng))
        order = order[..., None].expand(-1, -1, 3)
        batch = {name: torch.gather(a[chosen], 1, order) for name, a in self._by_atom.items()}
        batch |= {name: a[chosen] for name, a in self._by_frame.items()}
        return self._there(batch | {"weight": torch.ones(size)})

    def _there(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: array.to(device_of(self._flow)) for name, array in batch.items()}
