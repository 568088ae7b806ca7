"""The network of a force field: the equivariant encoder with a scalar readout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ccg_ase.bead_graph import Edges
from ccg_ase.encoder import Encoder, linear


class Network(nn.Module):
    """Energy of every bead, in units of kT, from its surroundings and the temperature.

    Invariant under rotation and translation, not under mirroring: odd scalars reach the readout,
    so that a left and a right turn may differ. Fresh ones are zero everywhere.

    Parameters
    ----------
    n_types
        Number of bead types.
    thermal
        Whether the temperature is an input.
    sizes
        Of the encoder, see `Encoder`.
    """

    def __init__(self, n_types: int, *, thermal: bool, **sizes: Any):
        super().__init__()
        self.encoder = Encoder(n_types, **sizes)
        channels = self.encoder.channels
        self.n_inputs = self.encoder.n_scalars * channels
        self.hidden, self.out = nn.Linear(self.n_inputs, 2 * channels), nn.Linear(2 * channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        # A parabola in T for every type and channel, added to what the encoder starts from.
        self.thermal = nn.Parameter(torch.zeros(2, n_types, channels)) if thermal else None

    def forward(
        self, beads: Tensor, types: Tensor, edges: Edges, reduced_T: Tensor | None = None
    ) -> Tensor:
        """Return energies over kT of frames (B, n, 3) in Å, shape (B, n).

        Parameters
        ----------
        beads
            Å, shape (B, n, 3).
        types
            Type index of each bead, shape (n,).
        edges
            See `BeadGraph.edges`.
        reduced_T
            Temperature of every frame, -1 to 1 over the range of training, shape (B,).
        """
        batch, n, _ = beads.shape
        start = None
        if self.thermal is not None:
            powers = torch.stack([reduced_T, reduced_T**2])
            start = torch.einsum("pb,pnc->cnb", powers, self.thermal[:, types])
        if edges.united:
            beads, types = beads.reshape(1, batch * n, 3), types.repeat(batch)
            start = start if start is None else start.mT.reshape(len(start), batch * n, 1)
        features = self.encoder.features(
            beads, types, edges.index, edges.bonded, edges.shifts, edges.sites_per_block, start
        )
        scalars = features[: self.encoder.n_scalars].reshape(self.n_inputs, -1)
        hidden = nn.functional.silu(linear(self.hidden, scalars))
        return edges.by_frame(linear(self.out, hidden).view(-1, features.shape[-1]), batch)
