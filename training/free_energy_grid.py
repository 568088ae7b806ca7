"""Grids of bins over distances, angles and torsions, and basins made of such bins."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch

from ccg_ase.restraints import (
    AngleRestraint,
    DihedralRestraint,
    DistanceRestraint,
    HarmonicRestraint,
)

Kind = Literal["distance", "angle", "torsion"]
RESTRAINTS: dict[str, type[HarmonicRestraint]] = {
    "distance": DistanceRestraint,
    "angle": AngleRestraint,
    "torsion": DihedralRestraint,
}
MOST_POINTS = 20_000
_BOUND = re.compile(r"^\s*([^\s<>=]+)\s*(<=|>=|<|>)\s*([^\s<>=]+)\s*$")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


@dataclass(frozen=True)
class Variable:
    """A distance, angle or torsion over sites, beads or atoms.

    Attributes
    ----------
    name
        What it is called in tables, figures and basins.
    kind
        distance | angle | torsion.
    sites
        Two, three or four indices.
    of_beads
        Whether the sites are beads; else atoms.
    """

    name: str
    kind: Kind
    sites: tuple[int, ...]
    of_beads: bool = True

    @property
    def periodic(self) -> bool:
        """Whether it goes round a circle."""
        return self.kind == "torsion"

    @property
    def unit(self) -> str:
        """Unit in which people give it."""
        return "Å" if self.kind == "distance" else "°"

    @property
    def scale(self) -> float:
        """That unit in Å or rad."""
        return 1.0 if self.kind == "distance" else np.pi / 180

    @property
    def limits(self) -> tuple[float, float] | None:
        """Natural limits in rad; None for a distance."""
        return {"distance": None, "angle": (0.0, np.pi), "torsion": (-np.pi, np.pi)}[self.kind]

    def values(self, positions: np.ndarray) -> np.ndarray:
        """Return values in Å or rad, (...,), of positions (..., n, 3) of its sites' kind."""
        x = torch.as_tensor(np.asarray(positions, dtype=np.float64))
        flat = x.reshape(-1, *x.shape[-2:])
        return (
            RESTRAINTS[self.kind](self.sites, 0.0, 0.0).values(flat).numpy().reshape(x.shape[:-2])
        )

    def restraint(self, centre: np.ndarray, stiffness: float) -> HarmonicRestraint:
        """Return an umbrella potential with centres (R,), Å or rad, and one k, eV/Å² or eV/rad²."""
        return RESTRAINTS[self.kind](self.sites, np.asarray(centre)[:, None], stiffness)


@dataclass(frozen=True, eq=False)
class Grid:
    """Equal bins in one or two (or more) variables; points are bins, counted as ravelled.

    Attributes
    ----------
    variables
        d of them.
    edges
        Edges of the bins of each, Å or rad, ascending and equally spaced.

    Raises
    ------
    ValueError
        If edges don't ascend, there are more than 20 000 bins, or two variables share a name.
    """

    variables: tuple[Variable, ...]
    edges: tuple[np.ndarray, ...]

    def __post_init__(self) -> None:
        names = [variable.name for variable in self.variables]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"a grid needs variables of different names, got {names}")
        for name, edges in zip(names, self.edges, strict=True):
            if len(edges) < 3 or not (np.diff(edges) > 0).all():
                raise ValueError(f"the grid of {name} needs two bins at least and a range > 0")
        if self.n_points > MOST_POINTS:
            size = " x ".join(map(str, self.shape))
            raise ValueError(
                f"a grid of {size} bins is too large ({MOST_POINTS} at most): ask for fewer bins "
                "or fewer variables"
            )

    @classmethod
    def regular(
        cls,
        variables: Sequence[Variable],
        bins: Sequence[int],
        ranges: Sequence[tuple[float, float] | None],
    ) -> Grid:
        """Build from numbers of bins and ranges in Å or rad; None stands for natural limits.

        Raises
        ------
        ValueError
            If a distance has no range; see also the class.
        """
        edges = []
        for variable, n, given in zip(variables, bins, ranges, strict=True):
            limits = variable.limits if given is None else given
            if limits is None:
                raise ValueError(f"{variable.name} is a distance: give its range, LOW:HIGH in Å")
            edges.append(np.linspace(*limits, n + 1))
        return cls(tuple(variables), tuple(edges))

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of bins of each variable."""
        return tuple(len(edges) - 1 for edges in self.edges)

    @property
    def n_points(self) -> int:
        """Number of bins in all."""
        return int(np.prod(self.shape))

    @cached_property
    def widths(self) -> np.ndarray:
        """Width of a bin in each variable, (d,)."""
        return np.array([edges[1] - edges[0] for edges in self.edges])

    @cached_property
    def centres(self) -> np.ndarray:
        """Centres of all bins, (n_points, d)."""
        axes = [(edges[1:] + edges[:-1]) / 2 for edges in self.edges]
        return np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes))

    def index(self, values: np.ndarray) -> np.ndarray:
        """Return the bin of values (..., d), (...,); -1 outside of the grid."""
        place = np.zeros(values.shape[:-1], dtype=int)
        inside = np.ones(values.shape[:-1], dtype=bool)
        for k, (edges, n) in enumerate(zip(self.edges, self.shape, strict=True)):
            value = values[..., k]
            if self.variables[k].periodic:  # π and -π are one angle, rounding included
                value = edges[0] + (value - edges[0]) % (2 * np.pi)
            bin_of = np.floor((value - edges[0]) / self.widths[k]).astype(int)
            bin_of = np.where(np.isclose(value, edges[-1], rtol=0, atol=1e-12), n - 1, bin_of)
            inside &= (bin_of >= 0) & (bin_of < n)
            place = place * n + np.clip(bin_of, 0, n - 1)
        return np.where(inside, place, -1)

    def basin(self, text: str) -> np.ndarray:
        """Return which bins a region holds, (n_points,) bool.

        Parameters
        ----------
        text
            Bounds such as ``phi<0``, joined by ``and`` (or a comma), parts joined by ``or``, in
            degrees or Å: ``phi>=0 and psi<60 or phi<-120``. Intervals are half-open, as bins are,
            so that < and <= mean the same.

        Raises
        ------
        ValueError
            If it can't be read, names no variable of the grid, cuts through bins, or is empty.
        """
        region = np.zeros(self.n_points, dtype=bool)
        for part in re.split(r"\s+or\s+", text.strip()):
            mask = np.ones(self.n_points, dtype=bool)
            for bound in re.split(r"\s+and\s+|,", part):
                mask &= self._half_space(bound, text)
            region |= mask
        if not region.any():
            raise ValueError(f"basin {text!r} holds no bin of the grid")
        return region

    def _half_space(self, bound: str, text: str) -> np.ndarray:
        found = _BOUND.match(bound)
        names = [variable.name for variable in self.variables]
        if not found:
            raise ValueError(
                f"basin {text!r} can't be read at {bound.strip()!r}: write VARIABLE<NUMBER or "
                "VARIABLE>NUMBER, joined by 'and' and 'or', such as 'phi>0 and psi<60'"
            )
        name, sign, number = found.groups()
        if _NUMBER.fullmatch(name) and number in names:  # 0<phi
            name, number, sign = number, name, {"<": ">", ">": "<"}[sign[0]]
        if name not in names or not _NUMBER.fullmatch(number):
            raise ValueError(
                f"basin {text!r}: {bound.strip()!r} compares no variable of the grid "
                f"({', '.join(names)}) with a number"
            )
        k = names.index(name)
        variable, value = self.variables[k], float(number)
        edges = self.edges[k] / variable.scale
        nearest = edges[np.abs(edges - value).argmin()]
        if edges[0] < value < edges[-1] and abs(nearest - value) > 1e-6 * (edges[-1] - edges[0]):
            raise ValueError(
                f"basin {text!r} cuts bins of {name} at {value:g} {variable.unit}; the nearest "
                f"edge is {nearest:g}: move the bound, or choose other bins"
            )
        centre = self.centres[:, k] / variable.scale
        return centre < value if sign[0] == "<" else centre > value
