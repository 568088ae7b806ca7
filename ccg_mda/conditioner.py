"""The causal conditioner: what each placed atom's density may know, and how it uses it.

Each *block* of coordinates (one atom's r, θ, φ, or a rotor's φ alone) is a query. It sees the beads
within ``bead_hops`` bonds, through the e3nn encoder and by its position in the query's own local
frame, and every atom of an earlier generation within ``hops`` bonds. Vectors are rotated into that
frame, so everything that reaches the network is invariant under rotations and translations, and
changes under reflections: chirality is visible. Weights belong to *types* (query type, source type,
bond distance), not to indices, so chemically identical residues share them.

Since no query sees its own or a later generation, one parallel pass gives the parameters of all
densities, and sampling takes one pass per generation.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import torch
from e3nn import o3
from torch import Tensor, nn

from ccg_ase.encoder import Encoder
from ccg_ase.graph import all_pairs, bond_classes
from ccg_ase.mapping import CGMap

from .placement import Placement, local_frames

N_HARMONICS = 3  # of a rotor's density, and of its angle where it conditions later atoms
N_PARAMETERS = 9  # of an affine block: 3 shifts, 3 log-scales, 3 couplings; a rotor needs 7


def _enumerate(keys: Sequence[Hashable]) -> np.ndarray:
    """Return a number for each key, by sorted order: equal keys share one."""
    table = {key: n for n, key in enumerate(sorted(set(keys), key=repr))}
    return np.array([table[key] for key in keys], dtype=int)


class Blocks:
    """The queries of a placement: which slot and coordinates each block holds, and what it sees.

    Attributes
    ----------
    slot, circular
        Placement slot of each block, and whether it is a rotor's dihedral; shape (n_blocks,).
    generation
        Generation of each slot: later than every earlier-placed slot within ``hops`` bonds.
    bead_sources, atom_sources
        Source points of each block padded with -1, shape (n_blocks, ...). Atom sources are slots.
    """

    def __init__(
        self, cg_map: CGMap, placement: Placement, rotor: np.ndarray, hops: int, bead_hops: int
    ) -> None:
        distance = cg_map.atoms.hops()
        atoms = placement.atoms
        near = distance[np.ix_(atoms, atoms)] <= hops
        self.generation = np.zeros(len(atoms), dtype=int)
        for k in range(len(atoms)):
            earlier = np.flatnonzero(near[k, :k])
            # References must be placed, however small `hops` is.
            placed = placement.references[k] - cg_map.n_beads
            earlier = np.union1d(earlier, placed[placed >= 0])
            if earlier.size:
                self.generation[k] = self.generation[earlier].max() + 1
        slots, circular = [], []
        for k in range(len(atoms)):
            slots += [k, k] if rotor[k] else [k]
            circular += [True, False] if rotor[k] else [False]
        self.slot, self.circular = np.array(slots), np.array(circular)
        bead_lists, atom_lists, bead_keys, atom_keys = [], [], [], []
        types, bead_types = cg_map.atoms.types, cg_map.beads.types
        self.type_keys = [
            (types[atoms[k]], bool(c)) for k, c in zip(self.slot, self.circular, strict=True)
        ]
        for k, key in zip(self.slot, self.type_keys, strict=True):
            from_beads = distance[atoms[k], cg_map.bead_atoms]
            beads = np.flatnonzero(from_beads <= bead_hops)
            seen = np.flatnonzero(near[k] & (self.generation < self.generation[k]))
            bead_lists.append(beads)
            atom_lists.append(seen)
            bead_keys.append([(key, bead_types[b], int(from_beads[b])) for b in beads])
            atom_keys.append(
                [(key, types[atoms[j]], int(distance[atoms[k], atoms[j]])) for j in seen]
            )
        self.type = _enumerate(self.type_keys)
        self.bead_sources, self.bead_edge_type = _pad(bead_lists, bead_keys)
        self.atom_sources, self.atom_edge_type = _pad(atom_lists, atom_keys)

    def passes(self) -> list[np.ndarray]:
        """Return the blocks of each sampling pass: a rotor's dihedral before the rest."""
        rank = 2 * self.generation[self.slot] + ~self.circular
        return [np.flatnonzero(rank == value) for value in np.unique(rank)]


def _pad(lists: list[np.ndarray], keys: list[list[Hashable]]) -> tuple[np.ndarray, np.ndarray]:
    width = max(1, max((len(row) for row in lists), default=0))
    flat = _enumerate([key for row in keys for key in row])
    sources, types = (np.full((len(lists), width), -1) for _ in range(2))
    start = 0
    for n, row in enumerate(lists):
        sources[n, : len(row)] = row
        types[n, : len(row)] = flat[start : start + len(row)]
        start += len(row)
    return sources, types


class _TypedLinear(nn.Module):
    """Sum of linear maps of the sources of each block, with one weight matrix per edge type."""

    def __init__(self, sources: np.ndarray, edge_type: np.ndarray, n_in: int, n_out: int) -> None:
        super().__init__()
        self.register_buffer("source", torch.tensor(np.maximum(sources, 0)), persistent=False)
        self.register_buffer("edge", torch.tensor(np.maximum(edge_type, 0)), persistent=False)
        self.register_buffer("present", torch.tensor(sources >= 0), persistent=False)
        n_edges = max(1, int(edge_type.max()) + 1)
        fan_in = n_in * max(1, sources.shape[1])
        self.weight = nn.Parameter(torch.randn(n_edges, n_in, n_out) / fan_in**0.5)
        self.register_buffer("location", torch.zeros(n_edges, 3))
        self.register_buffer("scale", torch.ones(n_edges, 3))

    def scaled(self, vectors: Tensor, blocks: Tensor) -> Tensor:
        """Standardise vectors in the local frame by the statistics of their edge type."""
        edge = self.edge[blocks]
        return (vectors - self.location[edge]) / self.scale[edge]

    def forward(self, features: Tensor, blocks: Tensor) -> Tensor:
        """Map (batch, block, source, n_in) to (batch, block, n_out)."""
        weight = self.weight[self.edge[blocks]] * self.present[blocks][..., None, None]
        flat = features.flatten(2).transpose(0, 1)
        return torch.bmm(flat, weight.flatten(1, 2)).transpose(0, 1)

    @torch.no_grad()
    def set_statistics(self, vectors: Tensor) -> None:
        """Set mean and spread of local vectors (frames, block, source, 3) by edge type."""
        for edge in range(self.weight.shape[0]):
            values = vectors[:, (self.edge == edge) & self.present].reshape(-1, 3)
            if len(values):
                self.location[edge] = values.mean(0)
                self.scale[edge] = values.std(0).clamp_min(0.01)


class Conditioner(nn.Module):
    """Turn beads and earlier atoms into the parameters of every block's density.

    Parameters
    ----------
    cg_map, placement, rotor
        What is placed, and which slots rotate freely (boolean, one per slot).
    width, n_layers
        Hidden width and depth of the per-type networks.
    hops, bead_hops
        How many bonds away a query sees atoms, and beads. The former also sets how many sampling
        passes there are.
    channels, cutoff_A
        Size and range of the e3nn bead encoder.
    """

    def __init__(
        self,
        cg_map: CGMap,
        placement: Placement,
        rotor: np.ndarray,
        *,
        width: int = 64,
        n_layers: int = 2,
        hops: int = 4,
        bead_hops: int = 10,
        channels: int = 4,
        cutoff_A: float = 12.0,
    ) -> None:
        super().__init__()
        self.config = {
            "width": width,
            "n_layers": n_layers,
            "hops": hops,
            "bead_hops": bead_hops,
            "channels": channels,
            "cutoff_A": cutoff_A,
        }
        self.blocks = blocks = Blocks(cg_map, placement, rotor, hops, bead_hops)
        bead_types = sorted(set(cg_map.beads.types))
        self.encoder = Encoder(len(bead_types), channels=channels, n_layers=1, cutoff_A=cutoff_A)
        self._slices = list(
            zip(self.encoder.irreps_out, self.encoder.irreps_out.slices(), strict=True)
        )
        edges = all_pairs(cg_map.n_beads)
        index = {
            "slot": blocks.slot,
            "block_type": blocks.type,
            "references": placement.references,
            "bead_type": [bead_types.index(t) for t in cg_map.beads.types],
        }
        for name, value in index.items():
            self.register_buffer(name, torch.as_tensor(value), persistent=False)
        self.register_buffer("edges", edges, persistent=False)
        self.register_buffer("bonded", bond_classes(cg_map.beads, edges), persistent=False)
        self.n_beads = cg_map.n_beads
        n_types = int(blocks.type.max()) + 1
        n_out = width + N_PARAMETERS  # hidden units, and a linear path straight to the output
        n_bead_features = 3 + 5 + self.encoder.irreps_out.dim
        self.from_beads = _TypedLinear(
            blocks.bead_sources, blocks.bead_edge_type, n_bead_features, n_out
        )
        self.from_atoms = _TypedLinear(
            blocks.atom_sources, blocks.atom_edge_type, 6 + 2 * N_HARMONICS, n_out
        )
        self.from_self = nn.Parameter(torch.randn(n_types, 2 * N_HARMONICS, n_out) * 0.1)
        self.bias = nn.Parameter(torch.zeros(n_types, n_out))
        self.hidden = nn.Parameter(torch.randn(n_layers - 1, n_types, width, width) / width**0.5)
        self.hidden_bias = nn.Parameter(torch.zeros(n_layers - 1, n_types, width))
        self.out = nn.Parameter(torch.zeros(n_types, width, N_PARAMETERS))
        with torch.no_grad():
            for layer in (self.from_beads.weight, self.from_atoms.weight, self.from_self):
                layer[..., width:] = 0.0  # every density starts as the standardised normal
        self.width = width

    def encode(self, beads: Tensor) -> Tensor:
        """Return equivariant features of the beads, (batch, n_beads, irreps_out.dim)."""
        return self.encoder(beads, self.bead_type, self.edges, self.bonded)

    def _bead_features(self, origin, frame, beads, encoded, blocks) -> Tensor:
        source = self.from_beads.source[blocks]
        local = torch.einsum("bqkc,bqsc->bqsk", frame, beads[:, source] - origin[:, :, None])
        # Solid harmonics of the saturated vector: smooth also where the bead is the origin.
        saturated = local * torch.rsqrt(1.0 + local.square().sum(-1, keepdim=True))
        quadrupole = o3.spherical_harmonics(2, saturated, normalize=False)
        parts = [self.from_beads.scaled(local, blocks), quadrupole]
        for (multiplicity, irrep), where in self._slices:
            values = encoded[:, source, where]
            if irrep.l == 1:
                vectors = values.unflatten(-1, (multiplicity, 3))
                values = torch.einsum("bqkc,bqsmc->bqsmk", frame, vectors).flatten(-2)
            parts.append(values)
        return torch.cat(parts, -1)

    def _atom_features(self, origin, frame, atoms, inner, blocks) -> Tensor:
        source = self.from_atoms.source[blocks]
        local = torch.einsum("bqkc,bqsc->bqsk", frame, atoms[:, source] - origin[:, :, None])
        return torch.cat([self.from_atoms.scaled(local, blocks), inner[:, source]], -1)

    def forward(
        self, points: Tensor, inner: Tensor, encoded: Tensor, own: Tensor, blocks: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the parameters of some blocks, with the frames that they are placed in.

        Parameters
        ----------
        points
            Beads, then atoms by slot; (batch, n_beads + n_slots, 3). Atoms that are not placed yet
            may hold any finite value.
        inner
            Internal coordinates of the atoms as features, (batch, n_slots, 3 + 2 N_HARMONICS).
        encoded
            From :meth:`encode`.
        own
            Harmonics of the block's own rotor angle, zero where there is none or it is what is
            asked for, (batch, len(blocks), 2 N_HARMONICS).
        blocks
            Which blocks, (len(blocks),).

        Returns
        -------
        parameters, origin, frame
            Shapes (batch, len(blocks), N_PARAMETERS), (..., 3) and (..., 3, 3).
        """
        origin, frame = local_frames(points, self.references[self.slot[blocks]])
        beads, atoms = points[:, : self.n_beads], points[:, self.n_beads :]
        kind = self.block_type[blocks]
        total = (
            self.from_beads(self._bead_features(origin, frame, beads, encoded, blocks), blocks)
            + self.bias[kind]
        )
        total = total + torch.einsum("bqi,qio->bqo", own, self.from_self[kind])
        features = self._atom_features(origin, frame, atoms, inner, blocks)
        total = total + self.from_atoms(features, blocks)
        hidden, linear = nn.functional.silu(total[..., : self.width]), total[..., self.width :]
        for weight, bias in zip(self.hidden, self.hidden_bias, strict=True):
            update = torch.einsum("bqi,qio->bqo", hidden, weight[kind]) + bias[kind]
            hidden = hidden + nn.functional.silu(update)
        parameters = linear + torch.einsum("bqi,qio->bqo", hidden, self.out[kind])
        return parameters, origin, frame

    @torch.no_grad()
    def set_statistics(self, points: Tensor) -> None:
        """Standardise the inputs by the statistics of frames ``points`` (batch, n_points, 3)."""
        blocks = torch.arange(len(self.slot))
        origin, frame = local_frames(points, self.references[self.slot])
        for layer, start in ((self.from_beads, 0), (self.from_atoms, self.n_beads)):
            vectors = points[:, layer.source[blocks] + start] - origin[:, :, None]
            layer.set_statistics(torch.einsum("bqkc,bqsc->bqsk", frame, vectors))
        source, target = self.edges
        lengths = (points[:, source] - points[:, target]).norm(dim=-1)
        self.encoder.set_distance_statistics(
            lengths.mean(0), lengths.std(0), self.bead_type, self.edges, self.bonded
        )
