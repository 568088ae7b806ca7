"""Edges of bead systems. They are static, and shared by all replicas of a batch."""

from __future__ import annotations

import numpy as np
import torch

from ccg_ase.topology import Topology

MAX_BOND_CLASS = 4
"""Bond distances 1 to 4 are classes of their own; class 0 is everything farther."""


def all_pairs(n: int) -> torch.Tensor:
    """Return all ordered pairs of n sites as (source, target), shape (2, n(n-1)), by target."""
    target, source = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
    apart = source != target
    return torch.stack([source[apart], target[apart]])


def bond_classes(topology: Topology, edges: torch.Tensor) -> torch.Tensor:
    """Return the bond-distance class of every edge, shape (E,).

    Class 1 to 4 is the number of bonds between the two sites, 0 is farther or not connected.
    """
    hops = topology.hops()[edges[0].numpy(), edges[1].numpy()]
    return torch.from_numpy(np.where(hops <= MAX_BOND_CLASS, hops, 0))
