"""What a torsion sees through space: earlier atoms around it, however far along the bonds.

Bonds alone don't tell a side chain where the others are. Before an atom is turned about its bond,
the atoms placed earlier within some Å are summed up as a density in the atom's local frame,

    A_klm = Σ_j R_k(r_j, element of j) Y_lm(r_j),

the one-particle basis of the atomic cluster expansion (Drautz, Phys. Rev. B 99, 014104, 2019). The
first axis of the frame is the bond, so that the components m of A meet the harmonics of the
torsion. R vanishes with two continuous derivatives at the cut-off.
"""

from __future__ import annotations

import numpy as np
import torch
from e3nn import o3
from torch import Tensor, nn

from ccg_ase.graph import batch_neighbours
from ccg_ase.mapping import CGMap
from ccg_ase.topology import Topology
from ccg_ase.torsion_map import TorsionMap

from .placement import Placement
from .sight import Blocks, enumerate_keys

_SIGHT_A = 6.0
_LARGE = 60  # atoms of a molecule
_N_CHANNELS = 8
_L_MAX = 2
_N_RADIAL = 8
_NEAREST_A = 1.0
_SOFT_A = 1e-3
_LEAST_SCALE = 0.01  # of what symmetry makes vanish, up to rounding
_EDGES_PER_STEP = 4096  # a few megabytes: larger products leave the cache


def sight_A(cg_map: CGMap | TorsionMap, given: float | None) -> float:
    """Return how far torsions see, in Å: as given, or 6 if a molecule has more than 60 atoms, or 0.

    In small molecules, bonds tell everything.
    """
    if given is not None:
        return given
    return _SIGHT_A if np.bincount(cg_map.atoms.molecules).max() > _LARGE else 0.0


def implied(atoms: Topology) -> np.ndarray:
    """Return which atoms are hydrogens on carbon, (n,): their places follow from the carbon's."""
    on_carbon = [
        element == "H" and any(atoms.elements[j] == "C" for j in bonded)
        for element, bonded in zip(atoms.elements, atoms.neighbours(), strict=True)
    ]
    return np.array(on_carbon, dtype=bool)


class Surroundings(nn.Module):
    """Maps the atoms around proper torsions and rotors to what is added for their blocks.

    Parameters
    ----------
    cg_map, placement, blocks
        What is placed, and the queries.
    n_out
        Size of what is added.
    cutoff_A
        Distance from the atom that the torsion's bond ends at, in Å.

    Attributes
    ----------
    looks
        Which blocks see anything through space, shape (n_blocks,).
    """

    def __init__(
        self,
        cg_map: CGMap | TorsionMap,
        placement: Placement,
        blocks: Blocks,
        n_out: int,
        cutoff_A: float,
    ) -> None:
        super().__init__()
        self.cutoff_A, self.first_atom = float(cutoff_A), cg_map.n_beads
        turned = np.zeros(len(placement.atoms), dtype=bool)
        turned[blocks.slot[blocks.circular]] = True
        looks = (placement.proper | turned) & (placement.multiplicity == 1)
        looks = looks[blocks.slot] & (blocks.circular == turned[blocks.slot])
        family = np.full(len(looks), -1)
        family[looks] = np.unique(blocks.family[looks], return_inverse=True)[1]
        index = {
            "looks": looks,
            "family": family,
            "generation": placement.generation[blocks.slot],
            "ready": placement.ready,
            "seen": np.flatnonzero(~implied(cg_map.atoms)),
            "classes": enumerate_keys(cg_map.atoms.elements),
        }
        for name, value in index.items():
            self.register_buffer(name, torch.as_tensor(value), persistent=False)
        knots = torch.linspace(_NEAREST_A, self.cutoff_A, _N_RADIAL + 1)[:-1]
        self.register_buffer("knots", knots, persistent=False)
        n_lm, n_classes = (_L_MAX + 1) ** 2, int(self.classes.max()) + 1
        self.radial = nn.Parameter(torch.randn(_N_RADIAL, _N_CHANNELS))
        self.embedding = nn.Parameter(torch.randn(n_classes, _N_CHANNELS))
        n_families = int(family.max(initial=-1)) + 1
        self.weight = nn.Parameter(torch.zeros(n_families, n_lm * _N_CHANNELS, n_out))
        self.register_buffer("scale", torch.ones(n_lm, _N_CHANNELS))

    @torch.no_grad()
    def _edges(
        self, blocks: Tensor, origin: Tensor, points: Tensor, box: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return place in `blocks`, frame, atom and its shift of all atoms that a block sees."""
        generation = self.generation[blocks]
        known = self.seen[self.ready[self.seen] < generation.max()]
        arrays = (origin.transpose(0, 1), points[:, self.first_atom + known], box)
        arrays = (None if a is None else a.cpu().numpy() for a in arrays)
        found = batch_neighbours(*arrays, self.cutoff_A)
        frame, row, entry, shift = (torch.as_tensor(a).to(points.device) for a in found)
        atom = known[entry]
        if (generation != generation[0]).any():
            earlier = self.ready[atom] < generation[row]
            frame, row, atom, shift = (a[earlier] for a in (frame, row, atom, shift))
        return row, frame, atom, shift.to(points)

    def features(
        self, blocks: Tensor, origin: Tensor, frame: Tensor, points: Tensor, box: Tensor | None
    ) -> Tensor:
        """Return A of some blocks, (block, batch, (l, m), channel); arguments as in `forward`."""
        row, b, atom, shift = self._edges(blocks, origin, points, box)
        place, dtype = row * len(points) + b, self.weight.dtype
        site = b * points.shape[1] + self.first_atom + atom
        vectors = points.flatten(0, 1).index_select(0, site)
        vectors = vectors + shift - origin.flatten(0, 1).index_select(0, place)
        axes = frame.to(dtype).flatten(0, 1).index_select(0, place)
        local = torch.bmm(axes, vectors.to(dtype)[..., None])[..., 0]
        square = local.square().sum(-1, keepdim=True)
        distance = torch.sqrt(square + _SOFT_A**2)
        width = self.knots[1] - self.knots[0]
        waves = torch.exp(-0.5 * ((distance - self.knots) / width).square())
        fade = (1.0 - square / self.cutoff_A**2).clamp_min(0.0) ** 3
        radial = (waves @ self.radial) * self.embedding[self.classes[atom]] * fade
        angular = o3.spherical_harmonics([*range(_L_MAX + 1)], local / distance, normalize=False)
        total = radial.new_zeros(len(blocks) * len(points), *self.scale.shape)
        parts = (a.split(_EDGES_PER_STEP) for a in (place, angular, radial))
        for some, y, r in zip(*parts, strict=True):
            total.index_add_(0, some, y[:, :, None] * r[:, None])
        return total.unflatten(0, (len(blocks), len(points)))

    @torch.no_grad()
    def set_statistics(
        self, origin: Tensor, frame: Tensor, points: Tensor, box: Tensor | None
    ) -> None:
        """Scale A to order one by all blocks of some frames; arguments as in `forward`."""
        looks = torch.nonzero(self.looks)[:, 0]
        if not len(looks):
            return
        found = self.features(looks, origin[looks], frame[looks], points, box)
        self.scale.copy_(found.square().mean((0, 1)).sqrt().clamp_min(_LEAST_SCALE))

    def forward(
        self, blocks: Tensor, origin: Tensor, frame: Tensor, points: Tensor, box: Tensor | None
    ) -> Tensor:
        """Return what some blocks see, (block, batch, n_out).

        Parameters
        ----------
        blocks
            Which blocks; each one `looks`.
        origin, frame
            Their local frames, (block, batch, 3) and (block, batch, 3, 3).
        points, box
            All points, (batch, n_points, 3), and cell vectors (batch, 3, 3) or None.
        """
        found = self.features(blocks, origin, frame, points, box) / self.scale
        return torch.bmm(found.flatten(2), self.weight[self.family[blocks]])
