"""Which edges a bead system is encoded on: all pairs where they are few, else a radius graph."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ccg_ase.encoder import Encoder
from ccg_ase.graph import MAX_BOND_CLASS, BondClasses, all_pairs, batch_radius_edges
from ccg_ase.topology import Topology

ALL_PAIRS_AT_MOST = 64
"""Up to this many beads in open space, every bead sees every other: static edges, no search."""
_EDGES_PER_BLOCK = 8192  # some megabytes of messages; larger ones leave the cache
_FEW = 30  # distances of one kind that make no statistics


@dataclass(frozen=True)
class Edges:
    """Pairs of beads that see each other, in one of two layouts.

    Either all frames have the same edges and are kept side by side, or every frame has its own and
    the B frames are one graph of B n sites, its disjoint parts.

    Parameters
    ----------
    index
        (source, target) of every edge, by target, shape (2, E).
    bonded
        Bond-distance class of every edge, shape (E,).
    shifts
        Å, shape (E, 3), of the cell that the source's image is in; None without a box.
    united
        Whether the frames are one graph.
    sites_per_block
        How many sites to encode at a time, so that their messages stay in the processor's cache;
        None for all.
    """

    index: Tensor
    bonded: Tensor
    shifts: Tensor | None = None
    united: bool = False
    sites_per_block: int | None = None

    def layout(self, beads: Tensor) -> Tensor:
        """Arrange frames (B, n, 3) as (3, sites, batch): (3, n, B), or (3, B n, 1) if united."""
        return (beads.reshape(1, -1, 3) if self.united else beads).permute(2, 1, 0)

    def by_frame(self, values: Tensor, batch: int) -> Tensor:
        """Turn values of the sites (..., sites, batch) into those of B frames (..., B, n)."""
        return values.mT.reshape(*values.shape[:-2], batch, -1)

    def vectors(self, x: Tensor) -> Tensor:
        """Return the vectors (3, E, batch) from target to source of positions in `layout`."""
        source, target = self.index
        vectors = x.index_select(1, source) - x.index_select(1, target)
        return vectors if self.shifts is None else vectors + self.shifts.T.unsqueeze(-1)


class BeadGraph(nn.Module):
    """Feeds frames of one bead system to an encoder, whatever its size and with or without a box.

    Few beads in open space are encoded on all pairs, which are the same for every frame; others on
    the pairs within the cut-off, found anew for every frame and encoded as the disjoint union of
    the batch. Both give the same features, since messages vanish at the cut-off.

    Parameters
    ----------
    topology
        The n beads and their bonds.
    cutoff_A
        Cut-off of the encoder in Å.
    types
        Type index of each bead, shape (n,).
    """

    def __init__(self, topology: Topology, cutoff_A: float, types: Tensor):
        super().__init__()
        self.cutoff_A, self._classes = float(cutoff_A), BondClasses(topology)
        self.register_buffer("types", types, persistent=False)
        index = all_pairs(len(topology) if len(topology) <= ALL_PAIRS_AT_MOST else 0)
        bonded = torch.from_numpy(self._classes(*index.numpy()))
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("bonded", bonded, persistent=False)

    def features(self, encoder: Encoder, positions: Tensor, box: Tensor | None = None) -> Tensor:
        """Encode a batch of frames; differentiable in positions and box.

        Parameters
        ----------
        encoder
            With the cut-off of this graph.
        positions
            Å, shape (B, n, 3); in a box, inside of it or not.
        box
            Cell vectors of every frame in rows, in Å, shape (B, 3, 3); None for open space.

        Returns
        -------
        Tensor
            As of `Encoder.features`, shape (components, channels, n, B).

        Raises
        ------
        ValueError
            If the encoder has another cut-off, shapes don't fit, or a box has no volume.
        """
        if encoder.cutoff_A != self.cutoff_A:
            raise ValueError(
                f"the encoder's cut-off is {encoder.cutoff_A} Å, the graph's {self.cutoff_A} Å: "
                "build the graph with encoder.cutoff_A"
            )
        batch, n, _ = self._check(positions, box)
        edges = self.edges(positions, box)
        if not edges.united:
            return encoder.features(positions, self.types, edges.index, edges.bonded)
        features = encoder.features(
            positions.reshape(1, batch * n, 3),
            self.types.repeat(batch),
            edges.index,
            edges.bonded,
            edges.shifts,
            sites_per_block=edges.sites_per_block,
        )
        return features.view(*features.shape[:2], batch, n).transpose(2, 3).contiguous()

    def edges(self, positions: Tensor, box: Tensor | None = None) -> Edges:
        """Find the edges of a batch of frames; parameters and errors as of `features`."""
        if self.is_static(box):
            return Edges(self.index, self.bonded)
        index, bonded, images = self.search(positions, box)
        return self.united(index, bonded, images, box, self.sites_per_block(positions, index))

    @staticmethod
    def sites_per_block(positions: Tensor, index: Tensor) -> int:
        """Return how many sites to encode at a time, for edges (2, E) of all frames."""
        return max(1, positions[..., 0].numel() * _EDGES_PER_BLOCK // max(1, index.shape[1]))

    def is_static(self, box: Tensor | None) -> bool:
        """Whether all frames have the same edges: all pairs."""
        return box is None and len(self.types) <= ALL_PAIRS_AT_MOST

    def search(self, positions: Tensor, box: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return edges (2, E), bond classes (E,) and images (E, 3) of the frames as one graph."""
        self._check(positions, box)
        index, images, _, bonded = self._radius_graph(positions, box)
        return tuple(torch.from_numpy(a).to(positions.device) for a in (index, bonded, images))

    def united(
        self,
        index: Tensor,
        bonded: Tensor,
        images: Tensor | None,
        box: Tensor | None,
        sites_per_block: int | None = None,
    ) -> Edges:
        """Make edges of what `search` found; differentiable in the box."""
        shifts = None
        if box is not None:
            cells = box[index[1] // len(self.types)]
            shifts = (images.to(box)[:, None] @ cells)[:, 0]
        return Edges(index, bonded, shifts, True, sites_per_block)

    def set_distance_statistics(
        self, encoder: Encoder, positions: Tensor, box: Tensor | None = None
    ) -> None:
        """Tell the encoder what typical distances are, from the edges of some frames.

        Distances within the cut-off are pooled by bond class and types of the two ends. A kind of
        edge that is seen fewer than 30 times takes the statistics of its class over all types.

        Parameters
        ----------
        encoder, positions, box
            As in `features`.
        """
        self._check(positions, box)
        n_types, shape = encoder.n_types, (MAX_BOND_CLASS + 1, encoder.n_types, encoder.n_types)
        moments = np.zeros((3, np.prod(shape)))  # number, sum, sum of squares of each kind
        for b, frame in enumerate(positions):
            edges, _, lengths, bonded = self._radius_graph(
                frame[None], None if box is None else box[b : b + 1]
            )
            source, target = self.types.cpu().numpy()[edges]
            kind = (bonded * n_types + source) * n_types + target
            for row, power in zip(moments, (lengths**0, lengths, lengths**2), strict=True):
                row += np.bincount(kind, power, minlength=len(row))
        moments = moments.reshape(3, *shape)
        of_class = moments.sum((2, 3), keepdims=True)
        number, first, second = np.where(moments[0] < _FEW, of_class, moments)
        enough = number >= _FEW
        mean = first[enough] / number[enough]
        std = np.sqrt(np.maximum(second[enough] / number[enough] - mean**2, 0))
        kinds = torch.from_numpy(np.argwhere(enough).T).to(self.types.device)
        mean, std = torch.from_numpy(mean), torch.from_numpy(std)
        every = torch.arange(n_types, device=kinds.device)
        encoder.set_distance_statistics(mean, std, every, kinds[1:], kinds[0])

    def _check(self, positions: Tensor, box: Tensor | None) -> torch.Size:
        n = len(self.types)
        if positions.ndim != 3 or positions.shape[1:] != (n, 3):
            raise ValueError(f"positions must be (B, {n}, 3), got {tuple(positions.shape)}")
        if box is not None and box.shape != (len(positions), 3, 3):
            raise ValueError(f"box must be ({len(positions)}, 3, 3), got {tuple(box.shape)}")
        return positions.shape

    def _radius_graph(self, positions: Tensor, box: Tensor | None) -> tuple[np.ndarray, ...]:
        """Return edges, images, lengths and bond classes of the disjoint union of frames."""
        frames = positions.detach().cpu().numpy()
        boxes = None if box is None else box.detach().cpu().numpy()
        edges, images, lengths = batch_radius_edges(frames, self.cutoff_A, boxes)
        bonded = self._classes(*(edges % len(self.types)))
        if box is not None:
            # In a small box a bead sees several images of another: the nearest is the bonded one.
            bonds = np.flatnonzero(bonded)
            pair = edges[1, bonds] * len(positions) * len(self.types) + edges[0, bonds]
            order = np.lexsort((lengths[bonds], pair))
            again = np.diff(pair[order], prepend=-1) == 0
            bonded[bonds[order[again]]] = 0
        return edges, images, lengths, bonded
