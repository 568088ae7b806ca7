"""Tensor products and spherical harmonics as products with constant matrices, by e3nn's symbols."""

from __future__ import annotations

import math
from itertools import product

import torch
from e3nn import o3
from torch import Tensor, nn

from ccg_ase.exact import ExactConstants
from ccg_ase.tracing import being_compiled

_TERMS_AT_MOST = 160  # of a product that is written out, see Coupling._is_written_out


class Coupling(ExactConstants):
    """Tensor product left ⊗ right -> out, channel by channel, as one constant matrix.

    Its rows are the components of every path (i, j, k), and those of equal k are added up. Entries
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
        self._scale, self._row_path, self._row_out = scale, row_path, row_out
        symbols = matrix.view(-1, dimension(left), dimension(right)).tolist()
        self._terms = [
            [(i, j, x) for i, line in enumerate(row) for j, x in enumerate(line) if x != 0]
            for row in symbols
        ]
        self._is_short = sum(map(len, self._terms)) <= _TERMS_AT_MOST

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Multiply (I, ...) with (J, ...), broadcast, to (K, ...)."""
        if self._is_written_out():
            return self._gather(self._rows(left, right))
        return self._product(self.dense, left, right)

    def weighted(self, left: Tensor, right: Tensor, weights: Tensor) -> Tensor:
        """Multiply as `forward`, every path times its own weights: (paths, ...) -> (K, ...)."""
        if self._is_written_out():
            weight, rows = weights.unbind(), self._rows(left, right)
            return self._gather([x * weight[p] for x, p in zip(rows, self._row_path, strict=True)])
        rows = self.paths_of(left, right) * weights.index_select(0, self.row_path)
        return (self.summing @ rows.flatten(1)).view(len(self.summing), *rows.shape[1:])

    def paths_of(self, left: Tensor, right: Tensor) -> Tensor:
        """Multiply as `forward`, but keep the paths apart: (rows, ...)."""
        return self._product(self.matrix, left, right)

    @staticmethod
    def _product(matrix: Tensor, left: Tensor, right: Tensor) -> Tensor:
        outer = left.unsqueeze(1) * right.unsqueeze(0)
        return (matrix @ outer.flatten(0, 1).flatten(1)).view(len(matrix), *outer.shape[2:])

    def _is_written_out(self) -> bool:
        """Whether to write products out term by term: a compiler fuses them with their neighbours.

        Dispatched one by one they would crawl; a great number of them takes minutes to compile.
        """
        return being_compiled() and self._is_short

    def _rows(self, left: Tensor, right: Tensor) -> list[Tensor]:
        """Return the rows of `paths_of`, each the sum of the terms that aren't zero."""
        shape = torch.broadcast_shapes(left.shape[1:], right.shape[1:])
        left, right = (x.expand(-1, *shape).unbind() for x in (left, right))
        rows = []
        for (i, j, first), *others in self._terms:
            row = left[i] * right[j]
            for i, j, value in others:
                ratio = value / first  # of most symbols exactly ±1
                product = left[i] * right[j]
                row = row + (product if ratio == 1 else ratio * product)
            rows.append(first * row)
        return rows

    def _gather(self, rows: list[Tensor]) -> Tensor:
        """Add up the rows that lead to the same component."""
        sums = [torch.zeros_like(rows[0])] * len(self.summing)
        for k in range(len(sums)):
            own = [row for row, out in zip(rows, self._row_out, strict=True) if out == k]
            if own:
                sums[k] = sum(own[1:], own[0]) * self._scale
        return torch.stack(sums)


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
