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
from .surroundings import Surroundings
from .transforms import N_PARAMETERS

N_HARMONICS = 3  # of an angle where it conditions something
_N_INNER = 3 + 2 * N_HARMONICS
_LEAST_SPREAD_A = 0.01
_KNOWN = 5.0  # standard deviations within which inputs are taken as they are
_BEYOND = 3.0  # what all values beyond them are worth at most
_ROWS = 8192  # blocks times frames that are worked on at a time: some megabytes


def harmonics(angle: Tensor) -> Tensor:
    """Return cos kφ, then sin kφ, k = 1 ... N_HARMONICS, in a new last dimension."""
    orders = torch.arange(1, N_HARMONICS + 1, dtype=angle.dtype, device=angle.device)
    waves = angle[..., None] * orders
    return torch.cat([torch.cos(waves), torch.sin(waves)], -1)


def saturated(x: Tensor) -> Tensor:
    """Return standardised values, those beyond five standard deviations bounded by eight; C².

    States unlike all training data would otherwise be extrapolated without bounds.
    """
    known = x.clamp(-_KNOWN, _KNOWN)
    beyond = x - known
    return known + beyond * torch.rsqrt(1.0 + (beyond / _BEYOND).square())


def _gather(rows: Tensor, index: Tensor) -> Tensor:
    """Return rows (batch, n, ...) by index (block, source), as (block, batch, source, ...)."""
    batch, n = rows.shape[:2]
    starts = torch.arange(batch, device=rows.device) * n
    flat = rows.flatten(0, 1).index_select(0, (index[:, None] + starts[:, None]).flatten())
    return flat.view(len(index), batch, index.shape[1], *rows.shape[2:])


class _Edges(nn.Module):
    """Sum of linear maps of the sources of each block, with one weight matrix per kind of edge."""

    def __init__(self, source: np.ndarray, edge: np.ndarray, n_in: int, n_out: int) -> None:
        super().__init__()
        self.register_buffer("source", torch.tensor(np.maximum(source, 0)), persistent=False)
        self.register_buffer("edge", torch.tensor(np.maximum(edge, 0)), persistent=False)
        self.register_buffer("present", torch.tensor(source >= 0), persistent=False)
        self.register_buffer("count", self.present.sum(1), persistent=False)
        n_edges = max(1, int(edge.max(initial=-1)) + 1)
        fan_in = n_in * max(1, source.shape[1])
        self.weight = nn.Parameter(torch.randn(n_edges, n_in, n_out) / fan_in**0.5)
        self.register_buffer("location", torch.zeros(n_edges, 3))
        self.register_buffer("scale", torch.ones(n_edges, 3))

    def sources(self, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return source, kind of edge and presence, padded to the most that a block has here."""
        most = int(self.count[blocks].max()) if len(blocks) else 0
        return tuple(a[blocks, :most] for a in (self.source, self.edge, self.present))

    def scaled(self, vectors: Tensor, edge: Tensor) -> Tensor:
        """Standardise vectors (block, batch, source, 3) by the statistics of their edges."""
        scaled = (vectors - self.location[edge][:, None]) / self.scale[edge][:, None]
        return saturated(scaled.to(self.weight.dtype))

    def forward(self, features: Tensor, edge: Tensor, present: Tensor) -> Tensor:
        """Map (block, batch, source, n_in) to (block, batch, n_out)."""
        weight = self.weight[edge] * present[..., None, None]
        return torch.bmm(features.flatten(2), weight.flatten(1, 2))

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
    around_A
        How far torsions see earlier atoms through space, in Å; 0 for by bonds only.
    families
        Whether atoms of one name share weights in all residues, but for constants.
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
        around_A: float = 0.0,
        families: bool = False,
    ) -> None:
        super().__init__()
        self.config = {
            "width": width,
            "n_layers": n_layers,
            "hops": hops,
            "bead_hops": bead_hops,
            "channels": channels,
            "cutoff_A": cutoff_A,
            "around_A": around_A,
            "families": families,
        }
        self.blocks = blocks = Blocks(cg_map, placement, rotor, hops, bead_hops, families)
        self.n_beads = cg_map.n_beads
        seen = [(a >= 0).sum(1) for a in (blocks.bead_source, blocks.atom_source)]
        index = {
            "slot": blocks.slot,
            "circular": blocks.circular,
            "kind": blocks.kind,
            "family": blocks.family,
            "references": placement.references[blocks.slot],
            "atom_slot": np.maximum(blocks.atom_slot, 0),
            "rank": np.argsort(np.lexsort(seen), kind="stable"),
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
        n_kinds, n = (int(a.max(initial=-1)) + 1 for a in (blocks.kind, blocks.family))
        n_out = width + N_PARAMETERS  # hidden units, and a linear path straight to the output
        self.from_beads = _Edges(blocks.bead_source, blocks.bead_edge, 3 + 5 + n_encoded, n_out)
        self.from_atoms = _Edges(blocks.atom_source, blocks.atom_edge, 3 + _N_INNER, n_out)
        self.from_torsions = _Edges(
            blocks.torsion_source, blocks.torsion_edge, 2 * N_HARMONICS, n_out
        )
        self.surroundings = None
        if around_A > 0.0:
            self.surroundings = Surroundings(cg_map, placement, blocks, n_out, around_A)
        self.from_self = nn.Parameter(torch.randn(n_kinds, 2 * N_HARMONICS, n_out) * 0.1)
        self.from_temperature = nn.Parameter(torch.zeros(n_kinds, n_out))
        self.bias = nn.Parameter(torch.zeros(n_kinds, n_out))
        self.hidden = nn.Parameter(torch.randn(n_layers - 1, n, width, width) / width**0.5)
        self.hidden_bias = nn.Parameter(torch.zeros(n_layers - 1, n, width))
        self.out = nn.Parameter(torch.zeros(n, width, N_PARAMETERS))
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

    def _local(self, vectors: Tensor, frame: Tensor, blocks: Tensor) -> Tensor:
        """Rotate vectors (block, batch, source, 3) into the frames (block, batch, 3, 3)."""
        return torch.matmul(vectors, frame.mT) * self.axes[blocks][:, None, None]

    def _bead_features(self, local, frame, encoded, edge, blocks) -> Tensor:
        """Return what beads at local vectors tell, (block, batch, source, n_in)."""
        dtype = self.bias.dtype
        scaled, local = self.from_beads.scaled(local, edge), local.to(dtype)
        # Solid harmonics of the saturated vector: smooth also where the bead is the origin.
        near = local * torch.rsqrt(1.0 + local.square().sum(-1, keepdim=True))
        parts = [scaled, o3.spherical_harmonics(2, near, normalize=False)]
        if encoded is not None:
            n = self.encoder.n_scalars
            vectors = encoded[..., n:, :].unflatten(-2, (-1, 3))
            axes = frame.to(dtype) * self.axes[blocks][:, None, :, None]
            rotated = torch.einsum("qbkc,qbsvcm->qbsvkm", axes, vectors)
            parts += [encoded[..., :n, :].flatten(-2), rotated.flatten(-3)]
        return torch.cat(parts, -1)

    def forward(
        self,
        points: Tensor,
        inner: Tensor,
        encoded: Tensor | None,
        box: Tensor | None,
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
        box
            Cell vectors of each frame (batch, 3, 3), or None.
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
        origin, frame = local_frames(points, self.references[blocks])
        # Blocks come first, so that they are batched matrix products; those that see equally many
        # atoms come together, so that little is padded.
        blocks = blocks.to(self.rank.device)
        order = torch.argsort(self.rank[blocks])
        firsts = origin.transpose(0, 1), frame.transpose(0, 1), own.transpose(0, 1)
        parts = [
            self._answer(
                blocks[some], *(a[some] for a in firsts), points, inner, encoded, box, coarse,
                log_temperature,
            )
            for some in order.split(max(1, _ROWS // max(1, len(points))))
        ]  # fmt: skip
        parameters = torch.cat(parts).to(points.dtype)
        return parameters.transpose(0, 1)[:, torch.argsort(order)], origin, frame

    def _answer(
        self, blocks, origin, frame, own, points, inner, encoded, box, coarse, log_temperature
    ) -> Tensor:
        """Return the parameters of blocks, (block, batch, N_PARAMETERS); origins etc. are alike."""
        dtype, kind = self.bias.dtype, self.kind[blocks]
        total = torch.baddbmm(self.bias[kind][:, None], own.to(dtype), self.from_self[kind])
        source, edge, present = self.from_beads.sources(blocks)
        if edge.shape[1]:
            local = self._local(_gather(points, source) - origin[:, :, None], frame, blocks)
            seen = None if encoded is None else _gather(encoded, source)
            features = self._bead_features(local, frame, seen, edge, blocks)
            total = total + self.from_beads(features, edge, present)
        source, edge, present = self.from_atoms.sources(blocks)
        if edge.shape[1]:
            local = self._local(_gather(points, source) - origin[:, :, None], frame, blocks)
            scaled = self.from_atoms.scaled(local, edge)
            slots = self.atom_slot[blocks, : edge.shape[1]]
            features = torch.cat([scaled, _gather(inner, slots).to(dtype)], -1)
            total = total + self.from_atoms(features, edge, present)
        source, edge, present = self.from_torsions.sources(blocks)
        if edge.shape[1]:
            features = harmonics(_gather(coarse[..., None], source)[..., 0]).to(dtype)
            total = total + self.from_torsions(features, edge, present)
        if self.surroundings is not None:
            rows = torch.nonzero(self.surroundings.looks[blocks])[:, 0]
            if len(rows):
                around = self.surroundings(blocks[rows], origin[rows], frame[rows], points, box)
                total = total.index_add(0, rows, around)
        if log_temperature is not None:
            shift = log_temperature[:, None].to(dtype)
            total = total + shift * self.from_temperature[kind][:, None]
        hidden, linear = nn.functional.silu(total[..., : self.width]), total[..., self.width :]
        family = self.family[blocks]
        for weight, bias in zip(self.hidden, self.hidden_bias, strict=True):
            update = torch.baddbmm(bias[family][:, None], hidden, weight[family])
            hidden = hidden + nn.functional.silu(update)
        return torch.baddbmm(linear, hidden, self.out[family])

    @torch.no_grad()
    def set_statistics(self, points: Tensor, box: Tensor | None = None) -> None:
        """Standardise the inputs by frames (batch, n_points, 3) and their boxes."""
        every = torch.arange(len(self.slot), device=points.device)
        origin, frame = (a.transpose(0, 1) for a in local_frames(points, self.references))
        for layer in (self.from_beads, self.from_atoms):
            vectors = _gather(points, layer.source) - origin[:, :, None]
            layer.set_statistics(self._local(vectors, frame, every).transpose(0, 1))
        if self.surroundings is not None:
            self.surroundings.set_statistics(origin, frame, points, box)
        if self.encoder is not None:
            self.graph.set_distance_statistics(self.encoder, points[:, : self.n_beads], box)
