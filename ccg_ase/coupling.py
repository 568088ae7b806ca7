"""Tensor products and spherical harmonics as products with constant matrices, by e3nn's symbols."""

from __future__ import annotations

import math
from itertools import product

import torch
from e3nn import o3
from torch import Tensor, nn

from ccg_ase.exact import ExactConstants


class Coupling(ExactConstants):
    """Tensor product left ⊗ right -> out, channel by channel, as one constant matrix.

    Its rows are the components of every path (i, j, k); `gather` adds up those of equal k. Entries
    are e3nn's Wigner 3j symbols in component normalisation, times `scale`.
    """

    def __init__(
        self,
        left: list[o3.Irrep],
        right: list[o3.Irrep],
        out: list[o3.Irrep],
        scale: float = 1.0,
    ):
        super().__init__()
        self.paths = [p for p in product(left, right, out) if p[2] in p[0] * p[1]]
        blocks, row_path, row_out = [], [], []
        for path, (i, j, k) in enumerate(self.paths):
            symbol = o3.wigner_3j(i.l, j.l, k.l, dtype=torch.float64).permute(2, 0, 1)
            fan_in = sum(other[2] == k for other in self.paths)
            block = torch.zeros(k.dim, dimension(left), dimension(right), dtype=torch.float64)
            block[:, _slice(left, i), _slice(right, j)] = symbol * math.sqrt(k.dim / fan_in)
            blocks.append(block.flatten(1))
            row_path += [path] * k.dim
            row_out += range(_slice(out, k).start, _slice(out, k).stop)
        matrix = torch.cat(blocks)
        summing = torch.zeros(dimension(out), len(row_out), dtype=torch.float64)
        summing[row_out, range(len(row_out))] = scale
        self.register_exact("matrix", matrix)
        self.register_exact("summing", summing)
        self.register_exact("dense", summing @ matrix)
        self.register_buffer("row_path", torch.tensor(row_path), persistent=False)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Multiply (I, ...) with (J, ...), broadcast, to (K, ...)."""
        return self._product(self.dense, left, right)

    def paths_of(self, left: Tensor, right: Tensor) -> Tensor:
        """Multiply as `forward`, but keep the paths apart: (rows, ...)."""
        return self._product(self.matrix, left, right)

    def gather(self, rows: Tensor) -> Tensor:
        """Add up the paths that lead to the same components."""
        return (self.summing @ rows.flatten(1)).view(len(self.summing), *rows.shape[1:])

    @staticmethod
    def _product(matrix: Tensor, left: Tensor, right: Tensor) -> Tensor:
        outer = left.unsqueeze(1) * right.unsqueeze(0)
        return (matrix @ outer.flatten(0, 1).flatten(1)).view(len(matrix), *outer.shape[2:])


class Harmonics(nn.Module):
    """Spherical harmonics of unit vectors (3, ...) by recursion: Yₗ ∝ Yₗ₋₁ ⊗ Y₁.

    Those of `e3nn.o3.spherical_harmonics` in component normalisation, in a third of its calls.
    """

    def __init__(self, harmonics: list[o3.Irrep]):
        super().__init__()
        self.l_max = harmonics[-1].l
        self.steps, self.norms = nn.ModuleList(), []
        direction = torch.tensor([0.6, 0.0, 0.8], dtype=torch.float64)
        values = o3.spherical_harmonics(
            list(range(self.l_max + 1)), direction, normalize=False, normalization="component"
        ).split([irrep.dim for irrep in harmonics])
        for k in range(2, self.l_max + 1):
            step = Coupling([harmonics[k - 1]], [harmonics[1]], [harmonics[k]])
            product = step(values[k - 1][:, None], values[1][:, None])[:, 0]
            self.steps.append(step)
            self.norms.append(((product @ values[k]) / (product @ product)).item())

    def forward(self, units: Tensor) -> Tensor:
        """Return Y₀, Y₁, ... of unit vectors, shape (Σ 2l + 1, ...)."""
        values = [torch.ones_like(units[:1])]
        if self.l_max:
            values.append(units * math.sqrt(3.0))
        for step, norm in zip(self.steps, self.norms, strict=True):
            values.append(step(values[-1], values[1]) * norm)
        return torch.cat(values)


def dimension(irreps: list[o3.Irrep]) -> int:
    """Return the number of components of one each of some irreps."""
    return sum(irrep.dim for irrep in irreps)


def _slice(irreps: list[o3.Irrep], irrep: o3.Irrep) -> slice:
    start = dimension(irreps[: irreps.index(irrep)])
    return slice(start, start + irrep.dim)
