"""Large graphs, worked on block by block: cost and memory stay linear in the number of sites."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


@dataclass(frozen=True)
class Block:
    """Consecutive sites, and all edges that end at them.

    Parameters
    ----------
    first, n
        The first site, and how many there are.
    sites
        Every site that an edge touches, the block's own first, shape (S,); None: all sites.
    own
        Where the block's edges are among all edges.
    edges
        (source, target) of these as places in `sites`, shape (2, E).
    """

    first: int
    n: int
    sites: Tensor | None
    own: slice
    edges: Tensor

    def take(self, values: Tensor) -> Tensor:
        """Return what values (..., sites, batch) are at `sites`."""
        return values if self.sites is None else values.index_select(-2, self.sites)


def cut(edges: Tensor, n: int, size: int | None) -> list[Block]:
    """Cut n sites with edges (2, E), which come by target, into blocks of so many; None: one."""
    if size is None or size >= n:
        return [Block(0, n, None, slice(0, edges.shape[1]), edges)]
    firsts = [*range(0, n, size), n]
    ends = torch.searchsorted(edges[1].contiguous(), torch.tensor(firsts).to(edges)).tolist()
    blocks = []
    for (first, last), ends_here in zip(pairwise(firsts), pairwise(ends), strict=True):
        own = slice(*ends_here)
        source, target = edges[:, own]
        inside = (source >= first) & (source < last)
        others, place = torch.unique(source[~inside], return_inverse=True)
        sites = torch.cat([torch.arange(first, last).to(others), others])
        source = (source - first).masked_scatter(~inside, place + (last - first))
        local = torch.stack([source, target - first])
        blocks.append(Block(first, last - first, sites, own, local))
    return blocks


Work = Callable[[Block, Tensor, Tensor, Tensor | None], Tensor]


class _InBlocks(torch.autograd.Function):
    """`work` on every block, done again for the gradient, which is added up block by block.

    Left to autograd, the gradient of every block is as long as the system.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        work: Work,
        blocks: list[Block],
        x: Tensor,
        features: Tensor,
        shifts: Tensor | None,
    ) -> Tensor:
        ctx.work, ctx.blocks = work, blocks
        ctx.save_for_backward(x, features, shifts)
        return torch.cat([work(block, *_local(block, x, features, shifts)) for block in blocks], -2)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, features, shifts = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:]
        sums = [
            torch.zeros_like(value, memory_format=torch.contiguous_format) if is_wanted else None
            for value, is_wanted in zip((x, features, shifts), wanted, strict=True)
        ]
        for block in ctx.blocks:
            parts = _local(block, x, features, shifts)
            inputs = [parts[k].requires_grad_() for k in range(3) if wanted[k]]
            with torch.enable_grad():
                done = ctx.work(block, *parts)
            own = gradient.narrow(-2, block.first, block.n)
            found = iter(torch.autograd.grad(done, inputs, own))
            for total in sums[:2]:
                if total is not None:
                    total.index_add_(-2, block.sites, next(found))
            if sums[2] is not None:
                sums[2][block.own] = next(found)
        return None, None, *sums


def in_blocks(
    work: Work, blocks: list[Block], x: Tensor, features: Tensor, shifts: Tensor | None
) -> Tensor:
    """Return `work` of every block, joined; differentiable once, by the tensors given here alone.

    Parameters
    ----------
    work
        From a block and its part of the three tensors to the features of its own sites.
    blocks
        See `cut`; more than one.
    x, features
        Of all sites, shape (..., sites, batch).
    shifts
        Of all edges, shape (E, 3), or None.
    """
    return _InBlocks.apply(work, blocks, x, features, shifts)


def _local(
    block: Block, x: Tensor, features: Tensor, shifts: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    shifts = None if shifts is None else shifts[block.own].detach()
    return block.take(x), block.take(features), shifts
