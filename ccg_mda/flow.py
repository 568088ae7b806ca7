"""Backmapper: the exact-density flow q(x|s) from beads, or torsions, to atoms.

Here it is built, from a map, frames or a model file, and called; :mod:`.bijection` is what it does.
"""

from __future__ import annotations

import copy
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ccg_ase.checkpoint import ModelFile, load_model
from ccg_ase.mapping import CGMap
from ccg_ase.torsion_map import TorsionMap

from .assembly import Assembly, Whole
from .bijection import Bijection
from .coordinates import Coordinates
from .distribution import BackmapDistribution
from .placement import Placement, atom_label
from .placement_order import build_placement
from .statistics import coordinate_statistics
from .surroundings import sight_A
from .transforms import Base

_STATISTICS_FRAMES = 5000


class Backmapper(Bijection):
    """Conditional distribution of atoms given coarse variables s, of exactly known density.

    Parameters
    ----------
    cg_map
        The coarse variables: beads of any linear map, or torsions.
    temperature_K
        The temperature of the data, T0.
    rotor
        Which φ go round the circle, one flag per slot of the placement.
    rigid
        Which coordinates r, θ, φ of each slot are held, (n_slots, 3); none by default.
    placement
        How the atoms are placed; by default what :func:`build_placement` gives.
    defensive
        Weight of a component with noise 1.5 times as wide, mixed into the density (theory.md E8).
    temperatures_K
        Lowest and highest temperature that the model was trained for; T0 alone by default.
    width, n_layers, hops, bead_hops, channels, cutoff_A, around_A, families
        See :class:`Conditioner`.

    Notes
    -----
    A new backmapper has unit statistics; :meth:`from_data` makes one that fits a trajectory. The
    noise has one number per degree of freedom: three per placed atom (r, θ, φ), less those that are
    rigid. It is standard normal, but uniform on [-π, π) for the φ of a rotor.
    """

    def __init__(
        self,
        cg_map: CGMap | TorsionMap,
        temperature_K: float,
        *,
        rotor: list[bool] | np.ndarray,
        rigid: list[list[bool]] | np.ndarray | None = None,
        placement: Placement | None = None,
        defensive: float = 0.0,
        temperatures_K: tuple[float, float] | None = None,
        hops: int = 3,
        **architecture: Any,
    ) -> None:
        placement = placement or build_placement(cg_map, hops=hops)
        none = np.zeros((len(placement.atoms), 3), dtype=bool)
        super().__init__(
            cg_map,
            placement,
            np.asarray(rotor, dtype=bool),
            none if rigid is None else np.asarray(rigid, dtype=bool),
            temperature_K=float(temperature_K),
            base=Base(defensive),
            hops=hops,
            **architecture,
        )
        low, high = temperatures_K or (self.temperature_K, self.temperature_K)
        self.temperatures_K = (float(low), float(high))
        self.whole = Whole(cg_map) if isinstance(cg_map, CGMap) else None
        self.double()

    @property
    def config(self) -> dict[str, Any]:
        """JSON-able arguments that rebuild this module, beside the map and temperature."""
        return {
            "rotor": self._rotor.tolist(),
            "rigid": self._rigid.tolist(),
            "placement": self.placement.to_dict(),
            "defensive": self.base.weight,
            "temperatures_K": list(self.temperatures_K),
            **self.conditioner.config,
        }

    @classmethod
    def from_config(
        cls, cg_map: CGMap | TorsionMap, temperature_K: float, config: dict
    ) -> Backmapper:
        """Build an untrained backmapper from :attr:`config`."""
        placement = Placement.from_dict(config["placement"])
        return cls(cg_map, temperature_K, **{**config, "placement": placement})

    @classmethod
    def from_model(cls, model: ModelFile) -> Backmapper:
        """Build the backmapper of a loaded model file."""
        return model.restore("backmapper", cls).eval()

    @classmethod
    def load(cls, path: str | PathLike[str], *, device: str | torch.device = "cpu") -> Backmapper:
        """Load the backmapper of a ``.ccg`` model file."""
        return cls.from_model(load_model(path, device=device))

    def with_conditioner(self, dtype: torch.dtype) -> Backmapper:
        """Return a copy whose network works in ``dtype``, such as the faster float32.

        Atoms, volumes and ``M x = s`` stay as exact as they are; ln q is that of the density with
        the rounded parameters, within 1e-5 per degree of freedom of that in float64.
        """
        backmapper = copy.deepcopy(self)
        backmapper.conditioner.to(dtype)
        return backmapper

    @classmethod
    def from_data(
        cls,
        cg_map: CGMap | TorsionMap,
        temperature_K: float,
        positions: Tensor,
        *,
        box: Tensor | None = None,
        hops: int = 3,
        around_A: float | None = None,
        families: bool | None = None,
        **options: Any,
    ) -> Backmapper:
        """Build a backmapper whose coordinates are standardised by frames (n, n_atoms, 3) in Å.

        Dihedrals that spread over more than half a radian, or are ever 2 rad from their mean,
        become rotors on the full circle; bonds and angles that don't move are held. Molecules must
        be whole; ``box`` holds the cell vectors as rows, (3, 3) or (n, 3, 3), of periodic frames.
        ``around_A`` is by default that of :func:`sight_A`; ``families`` is by default true
        where that isn't zero.
        """
        around_A = sight_A(cg_map, around_A)
        frames = positions.double()
        few = frames[:: max(1, len(frames) // 200)].numpy()
        placement = build_placement(cg_map, hops=hops, positions=few, branches_last=around_A > 0.0)
        points = Assembly(cg_map, placement).points(cg_map.apply(frames), frames)
        none = np.zeros((len(placement.atoms), 3), dtype=bool)
        measured = Coordinates(cg_map, placement, none[:, 0], none).measure(points).unbind(-1)
        statistics = coordinate_statistics(cg_map, placement, measured)
        backmapper = cls(
            cg_map,
            temperature_K,
            rotor=statistics.rotor,
            rigid=statistics.rigid,
            placement=placement,
            hops=hops,
            around_A=around_A,
            families=around_A > 0.0 if families is None else families,
            **options,
        )
        for name in ("location", "scale", "held"):
            getattr(backmapper.coordinates, name).copy_(getattr(statistics, name))
        some = slice(None, None, max(1, len(points) // _STATISTICS_FRAMES))
        box = None if box is None else box.double().expand(len(points), 3, 3)[some]
        backmapper.conditioner.set_statistics(points[some], box)
        return backmapper

    def forward(
        self, coarse: Tensor, *, temperature_K: float | None = None, box: Tensor | None = None
    ) -> BackmapDistribution:
        """Return q(x|s).

        Parameters
        ----------
        coarse
            Beads (*B, n_beads, 3) in Å, or torsions (*B, n_torsions) in rad.
        temperature_K
            The model's own by default.
        box
            Cell vectors as rows, (3, 3) or (*B, 3, 3) in Å: molecules are made whole, neighbours
            are found across the borders.

        Raises
        ------
        ValueError
            If the shape of s or the temperature isn't the model's, or s isn't finite.
        """
        inner = self.cg_map.coarse_shape
        if tuple(coarse.shape[coarse.ndim - len(inner) :]) != inner:
            raise ValueError(
                f"expected coarse variables of shape (..., {', '.join(map(str, inner))}), got "
                f"{tuple(coarse.shape)}: they belong to another mapping than this model"
            )
        if not torch.isfinite(coarse).all():
            raise ValueError("the coarse variables contain NaN or infinity")
        batch = coarse.shape[: coarse.ndim - len(inner)]
        temperature = None
        if temperature_K is not None:
            self._check_temperature(temperature_K)
            if temperature_K != self.temperature_K:
                temperature = coarse.new_full(batch, temperature_K)
        if box is not None:
            if self.whole is None:
                raise ValueError("torsions as coarse variables have no box")
            box = box.to(coarse).expand(*batch, 3, 3)
            coarse = self.whole(coarse, box)
        return BackmapDistribution(self, coarse, temperature, box)

    def _check_temperature(self, temperature_K: float) -> None:
        low, high = self.temperatures_K
        if not low - 1e-6 <= temperature_K <= high + 1e-6:
            held = f"at {low:g} K" if low == high else f"from {low:g} to {high:g} K"
            raise ValueError(
                f"this backmapper was trained {held} and holds there only; {temperature_K:g} K was "
                "asked for"
            )

    def check_rigid(self, positions: Tensor) -> None:
        """Raise ValueError unless rigid coordinates of (batch, n_atoms, 3) are as they are held."""
        if self._rigid.any():
            points = self.assembly.points(self.cg_map.apply(positions), positions)
            rigid = torch.as_tensor(self._rigid, device=points.device)
            slot = self.coordinates.first_unheld(points, rigid)
            if slot is not None:
                label = atom_label(self.cg_map.atoms, self.placement.atoms[slot])
                raise ValueError(
                    f"the bond, angle or dihedral of {label} differs "
                    "from the value that this model holds it at: it was trained on frames with "
                    "constraints; give frames with the same ones"
                )
