"""The causal conditioner: what the parameters of each density are made of.

A query sees beads through the e3nn encoder and by their position in its own local frame, and atoms
of earlier generations by their position there and by their own internal coordinates
(:mod:`.sight`). Vectors are rotated into the local frame, so everything that reaches the network is
invariant under rotations and translations, and changes under reflections: chirality is visible.

Since no query sees its own or a later generation, one parallel pass gives the parameters of all
densities, and sampling takes one pass per generation, over the blocks of that generation only.
"""

from __future__ import annotations

import numpy as np
import torch
from e3nn import o3
from torch import Tensor, nn

from ccg_ase.bead_graph import BeadGraph
from ccg_ase.encoder import Encoder
from ccg_ase.mapping import CGMap
from ccg_ase.torsion_map import TorsionMap

from .placement import Placement, local_frames
from .sight import Blocks
from .transforms import N_PARAMETERS

N_HARMONICS = 3  # of an angle where it conditions something
_N_INNER = 3 + 2 * N_HARMONICS
_LEAST_SPREAD_A = 0.01


def harmonics(angle: Tensor) -> Tensor:
    """Return cos kφ, then sin kφ, k = 1 ... N_HARMONICS, in a new last dimension."""
    orders = torch.arange(1, N_HARMONICS + 1, dtype=angle.dtype, device=angle.device)
    waves = angle[..., None] * orders
    return torch.cat([torch.cos(waves), torch.sin(waves)], -1)


class _Edges(nn.Module):
    """Sum of linear maps of the sources of each block, with one weight matrix per kind of edge."""

    def __init__(self, source: np.ndarray, edge: np.ndarray, n_in: int, n_out: int) -> None:
        super().__init__()
        self.register_buffer("source", torch.tensor(np.maximum(source, 0)), persistent=False)
        self.register_buffer("edge", torch.tensor(np.maximum(edge, 0)), persistent=False)
        self.register_buffer("present", torch.tensor(source >= 0), persistent=False)
        self.used = bool((source >= 0).any())
        n_edges = max(1, int(edge.max(initial=-1)) + 1)
        fan_in = n_in * max(1, source.shape[1])
        self.weight = nn.Parameter(torch.randn(n_edges, n_in, n_out) / fan_in**0.5)
        self.register_buffer("location", torch.zeros(n_edges, 3))
        self.register_buffer("scale", torch.ones(n_edges, 3))

    def scaled(self, vectors: Tensor, blocks: Tensor) -> Tensor:
        """Standardise vectors in the local frame by the statistics of their kind of edge."""
        edge = self.edge[blocks]
        return (vectors - self.location[edge]) / self.scale[edge]

    def forward(self, features: Tensor, blocks: Tensor) -> Tensor:
        """Map (batch, block, source, n_in) to (batch, block, n_out)."""
        weight = self.weight[self.edge[blocks]] * self.present[blocks][..., None, None]
        flat = features.flatten(2).transpose(0, 1).to(weight.dtype)
        return torch.bmm(flat, weight.flatten(1, 2)).transpose(0, 1)

    @torch.no_grad()
    def set_statistics(self, vectors: Tensor) -> None:
        """Set mean and spread of local vectors (frames, block, source, 3) by kind of edge."""
        edge, n = self.edge[self.present], len(self.location)
        values = vectors[:, self.present]
        count = torch.bincount(edge, minlength=n).clamp_min(1).to(values.dtype)[:, None]
        zeros = values.new_zeros(n, 3)
        mean = zeros.index_add(0, edge, values.mean(0)) / count
        square = (values - mean[edge]).square().mean(0)
        spread = (zeros.index_add(0, edge, square) / count).sqrt()
        self.location.copy_(mean)
        self.scale.copy_(spread.clamp_min(_LEAST_SPREAD_A))


class Conditioner(nn.Module):
    """Turn beads and earlier atoms into the parameters of every block's density.

    Parameters
    ----------
    cg_map, placement, rotor
        What is placed, and which slots rotate freely (boolean, one per slot).
    width, n_layers
        Hidden width and depth of the per-kind networks.
    hops, bead_hops
        How many bonds away a query sees atoms, and beads. The former also sets how many sampling
        passes there are.
    channels, cutoff_A
        Size and range of the e3nn bead encoder.
    """

    def __init__(
        self,
        cg_map: CGMap | TorsionMap,
        placement: Placement,
        rotor: np.ndarray,
        *,
        width: int = 64,
        n_layers: int = 2,
        hops: int = 3,
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
        self.n_beads = getattr(cg_map, "n_beads", 0)
        index = {
            "slot": blocks.slot,
            "circular": blocks.circular,
            "kind": blocks.kind,
            "references": placement.references[blocks.slot],
            "atom_slot": np.maximum(blocks.atom_slot, 0),
        }
        for name, value in index.items():
            self.register_buffer(name, torch.as_tensor(value), persistent=False)
        axes = torch.as_tensor(blocks.axes).to(torch.get_default_dtype())
        self.register_buffer("axes", axes, persistent=False)
        self.encoder, n_encoded = None, 0
        if self.n_beads > 1:
            names = sorted(set(cg_map.beads.types))
            types = torch.tensor([names.index(t) for t in cg_map.beads.types])
            self.encoder = Encoder(len(names), channels=channels, n_layers=1, cutoff_A=cutoff_A)
            self.graph = BeadGraph(cg_map.beads, cutoff_A, types)
            n_encoded = self.encoder.irreps_out.dim
        n_kinds = int(blocks.kind.max(initial=-1)) + 1
        n_out = width + N_PARAMETERS  # hidden units, and a linear path straight to the output
        self.from_beads = _Edges(blocks.bead_source, blocks.bead_edge, 3 + 5 + n_encoded, n_out)
        self.from_atoms = _Edges(blocks.atom_source, blocks.atom_edge, 3 + _N_INNER, n_out)
        self.from_torsions = _Edges(
            blocks.torsion_source, blocks.torsion_edge, 2 * N_HARMONICS, n_out
        )
        self.from_self = nn.Parameter(torch.randn(n_kinds, 2 * N_HARMONICS, n_out) * 0.1)
        self.from_temperature = nn.Parameter(torch.zeros(n_kinds, n_out))
        self.bias = nn.Parameter(torch.zeros(n_kinds, n_out))
        self.hidden = nn.Parameter(torch.randn(n_layers - 1, n_kinds, width, width) / width**0.5)
        self.hidden_bias = nn.Parameter(torch.zeros(n_layers - 1, n_kinds, width))
        self.out = nn.Parameter(torch.zeros(n_kinds, width, N_PARAMETERS))
        with torch.no_grad():
            for layer in (self.from_beads, self.from_atoms, self.from_torsions):
                layer.weight[..., width:] = 0.0  # every density starts as the standardised one
            self.from_self[..., width:] = 0.0
        self.width, self.n_inner = width, _N_INNER

    def encode(self, beads: Tensor, box: Tensor | None = None) -> Tensor | None:
        """Return equivariant features of the beads, (batch, n_beads, components, channels)."""
        if self.encoder is None:
            return None
        box = None if box is None else box.to(self.bias.dtype)
        features = self.graph.features(self.encoder, beads.to(self.bias.dtype), box)
        return features.permute(3, 2, 0, 1)

    def _local(self, points: Tensor, origin: Tensor, frame: Tensor, blocks: Tensor) -> Tensor:
        """Rotate source points (batch, block, source, 3) into the frames of the queries."""
        local = torch.einsum("bqkc,bqsc->bqsk", frame, points - origin[:, :, None])
        return local * self.axes[blocks][:, None]

    def _bead_features(self, origin, frame, points, encoded, blocks) -> Tensor:
        source = self.from_beads.source[blocks]
        local = self._local(points[:, source], origin, frame, blocks)
        # Solid harmonics of the saturated vector: smooth also where the bead is the origin.
        saturated = local * torch.rsqrt(1.0 + local.square().sum(-1, keepdim=True))
        quadrupole = o3.spherical_harmonics(2, saturated, normalize=False)
        parts = [self.from_beads.scaled(local, blocks), quadrupole]
        if encoded is not None:
            scalars, vectors = self._split(encoded[:, source].to(local.dtype))
            axes = self.axes[blocks][:, None, None, :, None]
            rotated = torch.einsum("bqkc,bqsvcm->bqsvkm", frame, vectors) * axes
            parts += [scalars.flatten(-2), rotated.flatten(-3)]
        return torch.cat(parts, -1)

    def _split(self, encoded: Tensor) -> tuple[Tensor, Tensor]:
        """Return scalars (..., components, channels) and vectors (..., n_vectors, 3, channels)."""
        n = self.encoder.n_scalars
        return encoded[..., :n, :], encoded[..., n:, :].unflatten(-2, (-1, 3))

    def _atom_features(self, origin, frame, points, inner, blocks) -> Tensor:
        source = self.from_atoms.source[blocks]
        local = self._local(points[:, source], origin, frame, blocks)
        inner = inner[:, self.atom_slot[blocks]]
        return torch.cat([self.from_atoms.scaled(local, blocks), inner], -1)

    def forward(
        self,
        points: Tensor,
        inner: Tensor,
        encoded: Tensor | None,
        coarse: Tensor,
        own: Tensor,
        log_temperature: Tensor | None,
        blocks: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the parameters of some blocks, with the frames that they are placed in.

        Parameters
        ----------
        points
            All points (see :class:`Placement`), (batch, n_points, 3). Atoms that are not placed yet
            may hold any finite value.
        inner
            Internal coordinates of the atoms as features, (batch, n_slots + 1, 3 + 2 N_HARMONICS);
            the last row, of roots, is zero.
        encoded
            From :meth:`encode`.
        coarse
            The given torsions (batch, n_torsions), or the beads.
        own
            Harmonics of the block's own rotor angle, zero where there is none or it is what is
            asked for, (batch, len(blocks), 2 N_HARMONICS).
        log_temperature
            ln T/T0 of each frame (batch,), or None at T0.
        blocks
            Which blocks, (len(blocks),).

        Returns
        -------
        parameters, origin, frame
            Shapes (batch, len(blocks), N_PARAMETERS), (..., 3) and (..., 3, 3).
        """
        dtype = self.bias.dtype
        origin, frame = local_frames(points, self.references[blocks])
        kind = self.kind[blocks]
        total = self.bias[kind] + torch.einsum("bqi,qio->bqo", own.to(dtype), self.from_self[kind])
        if self.from_beads.used:
            features = self._bead_features(origin, frame, points, encoded, blocks)
            total = total + self.from_beads(features, blocks)
        if self.from_atoms.used:
            features = self._atom_features(origin, frame, points, inner, blocks)
            total = total + self.from_atoms(features, blocks)
        if self.from_torsions.used:
            angles = coarse[:, self.from_torsions.source[blocks]]
            total = total + self.from_torsions(harmonics(angles), blocks)
        if log_temperature is not None:
            shift = log_temperature[:, None, None].to(dtype)
            total = total + shift * self.from_temperature[kind]
        hidden, linear = nn.functional.silu(total[..., : self.width]), total[..., self.width :]
        for weight, bias in zip(self.hidden, self.hidden_bias, strict=True):
            update = torch.einsum("bqi,qio->bqo", hidden, weight[kind]) + bias[kind]
            hidden = hidden + nn.functional.silu(update)
        parameters = linear + torch.einsum("bqi,qio->bqo", hidden, self.out[kind])
        return parameters.to(points.dtype), origin, frame

    @torch.no_grad()
    def set_statistics(self, points: Tensor, box: Tensor | None = None) -> None:
        """Standardise the inputs by frames (batch, n_points, 3) and their boxes."""
        blocks = torch.arange(len(self.slot))
        origin, frame = local_frames(points, self.references)
        for layer in (self.from_beads, self.from_atoms):
            vectors = self._local(points[:, layer.source], origin, frame, blocks)
            layer.set_statistics(vectors)
        if self.encoder is not None:
            self.graph.set_distance_statistics(self.encoder, points[:, : self.n_beads], box)
