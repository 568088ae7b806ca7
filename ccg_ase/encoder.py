"""The E(3)-equivariant message-passing encoder that force field and backmapper share.

NequIP-like (Batzner et al., Nat. Commun. 13, 2453, 2022), arranged for few and large operations: a
feature is stored as (components, channels, sites, replicas), so that a tensor product with all its
paths is one product with a constant matrix of e3nn's Wigner 3j symbols, and inner loops are long.
"""

from __future__ import annotations

import math
from functools import partial
from itertools import product

import torch
from e3nn import o3
from torch import Tensor, nn

from ccg_ase.blocks import Block, cut, in_blocks
from ccg_ase.coupling import Coupling, Harmonics, dimension
from ccg_ase.graph import MAX_BOND_CLASS

_SOFT_A = 1e-6  # keeps directions finite for coincident beads
_LEAST_SPREAD_A = 1e-3
_N_CLASSES = MAX_BOND_CLASS + 1
# Typical mean and spread (Å) of distances by bond class (0: far), until statistics are set.
_DEFAULT_DISTANCES = ((6.0, 3.0), (1.5, 0.1), (2.5, 0.2), (3.4, 0.5), (4.5, 1.0))


class Encoder(nn.Module):
    """Equivariant features of every bead from its surroundings.

    Features hold 0e, 0o, 1o, 1e, ... up to `l_max`, with `channels` of each. Both parities are
    there, so that mirror images differ in the sign of odd scalars (0o).

    Parameters
    ----------
    n_types
        Number of site types; parameters are shared by type.
    channels
        Multiplicity of every irrep.
    l_max
        Highest angular momentum of features and spherical harmonics.
    n_layers
        Number of message-passing layers. Odd scalars need two.
    n_radial
        Number of Bessel functions.
    cutoff_A
        Distance in Å at which messages vanish, with two continuous derivatives.
    mean_neighbours
        Messages are divided by its square root, to keep features of order one.
    """

    def __init__(
        self,
        n_types: int,
        *,
        channels: int = 16,
        l_max: int = 1,
        n_layers: int = 2,
        n_radial: int = 8,
        cutoff_A: float = 12.0,
        mean_neighbours: float = 4.0,
    ):
        super().__init__()
        if min(n_types, channels, n_layers, n_radial) < 1 or l_max < 0 or not cutoff_A > 0:
            raise ValueError(
                "Encoder needs n_types, channels, n_layers, n_radial >= 1, l_max >= 0, cutoff_A > 0"
            )
        harmonics = [o3.Irrep(k, (-1) ** k) for k in range(l_max + 1)]
        hidden = [o3.Irrep(k, p) for k in range(l_max + 1) for p in (1, -1)]
        hidden = hidden if l_max else harmonics  # without vectors, odd scalars can't arise
        self.irreps_out = o3.Irreps([(channels, irrep) for irrep in hidden])
        self.n_scalars = sum(irrep.l == 0 for irrep in hidden)
        self.n_types, self.channels, self.cutoff_A = n_types, channels, float(cutoff_A)

        self.harmonics = Harmonics(harmonics)
        self.embedding = nn.Parameter(torch.randn(n_types, channels))
        features, layers = [o3.Irrep("0e")], []
        for _ in range(n_layers):
            layers.append(_Layer(features, harmonics, hidden, channels, mean_neighbours))
            features = hidden
        self.layers = nn.ModuleList(layers)
        self.radial = _Radial(
            n_types, n_radial, self.cutoff_A, [len(layer.paths) * channels for layer in layers]
        )
        self.to(torch.get_default_dtype())

    def features(
        self,
        positions: Tensor,
        types: Tensor,
        edges: Tensor,
        bonded: Tensor,
        shifts: Tensor | None = None,
        sites_per_block: int | None = None,
        start: Tensor | None = None,
    ) -> Tensor:
        """Encode as `forward` does, but return (components, channels, n, B), scalars first.

        `shifts` in Å, shape (E, 3), are added to the vectors from target to source: the cells that
        periodic images are in. With `sites_per_block`, so many sites are worked on at a time, which
        keeps large graphs in the processor's cache and memory low; then edges must come by target.
        `start`, shape (channels, n, B), is added to what every site starts from.
        """
        n, x = positions.shape[1], positions.permute(2, 1, 0)
        features = self.embedding[types].T[None, :, :, None].expand(-1, -1, -1, len(positions))
        features = features if start is None else features + start
        blocks = cut(edges, n, sites_per_block)

        def geometry(block: Block, x: Tensor, shifts: Tensor | None) -> tuple[Tensor, Tensor]:
            sites = types if block.sites is None else types[block.sites]
            return self._geometry(x, sites, block.edges, bonded[block.own], shifts)

        if len(blocks) > 1 and not self.embedding.requires_grad:
            # Nothing is trained: what is kept for the gradient grows with sites, not with edges.
            def work(k: int, block: Block, x: Tensor, old: Tensor, shifts: Tensor | None) -> Tensor:
                return self._advance(k, old, block, *geometry(block, x, shifts))

            for k in range(len(self.layers)):
                features = in_blocks(partial(work, k), blocks, x, features, shifts)
            return features
        known = [
            geometry(block, block.take(x), None if shifts is None else shifts[block.own])
            for block in blocks
        ]
        for k in range(len(self.layers)):
            parts = [
                self._advance(k, block.take(features), block, *angular)
                for block, angular in zip(blocks, known, strict=True)
            ]
            features = torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]
        return features

    def _geometry(
        self, x: Tensor, types: Tensor, edges: Tensor, bonded: Tensor, shifts: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return what depends on the edges alone: angular functions and hidden radial ones."""
        source, target = edges
        vectors = x.index_select(1, source) - x.index_select(1, target)
        if shifts is not None:
            vectors = vectors + shifts.T.unsqueeze(-1)
        r = torch.linalg.vector_norm(vectors, dim=0, keepdim=True) + _SOFT_A
        inverse_r = r.reciprocal()
        # (1 - x²)³ reaches zero at the cut-off with two continuous derivatives.
        switch = (1 - (r * r) * self.cutoff_A**-2).relu() ** 3
        harmonics = (self.harmonics(vectors * inverse_r) * switch).unsqueeze(1)
        return harmonics, self.radial(r, inverse_r, types[source], types[target], bonded)

    def _advance(
        self, k: int, features: Tensor, block: Block, harmonics: Tensor, hidden: Tensor
    ) -> Tensor:
        """Return the features that layer k gives to the block's own sites."""
        layer, (source, target) = self.layers[k], block.edges
        weights = self.radial.weights(k, hidden)
        summed = layer.messages(features, harmonics, weights, source, target, block.n)
        return layer(features[:, :, : block.n], summed)

    def forward(self, positions: Tensor, types: Tensor, edges: Tensor, bonded: Tensor) -> Tensor:
        """Encode a batch of replicas of one system.

        Parameters
        ----------
        positions
            Å, shape (B, n, 3).
        types
            Type index of each site, shape (n,).
        edges
            (source, target) of each message, shape (2, E), see `graph.all_pairs`.
        bonded
            Bond-distance class 0 to 4 of each edge, shape (E,), see `graph.BondClasses`.

        Returns
        -------
        Tensor
            Features of irreps `irreps_out`, shape (B, n, irreps_out.dim).
        """
        features = self.features(positions, types, edges, bonded).permute(3, 2, 1, 0)
        blocks = features.split([irrep.dim for _, irrep in self.irreps_out], dim=-1)
        return torch.cat([block.flatten(-2) for block in blocks], dim=-1)

    def set_distance_statistics(
        self, mean: Tensor, std: Tensor, types: Tensor, edges: Tensor, bonded: Tensor
    ) -> None:
        """Set what counts as a typical distance, by bond class and types of the two ends.

        Bonds move by hundredths of an Å, which no smooth radial basis resolves; standardised
        distances make them visible.

        Parameters
        ----------
        mean, std
            Mean and standard deviation of each edge's length in Å, shape (E,). Edges that share
            class and types are pooled.
        types, edges, bonded
            As in `forward`.
        """
        keys = torch.stack([bonded, types[edges[0]], types[edges[1]]])
        kinds, kind, count = keys.unique(dim=1, return_inverse=True, return_counts=True)

        def pooled(values: Tensor) -> Tensor:
            return values.new_zeros(len(count)).index_add(0, kind, values) / count

        centre = pooled(mean)
        variance = pooled(std**2 + (mean - centre[kind]) ** 2)
        self.radial.set_typical(tuple(kinds), centre, variance.sqrt())


class _Radial(nn.Module):
    """Weights of every tensor-product path from distance, bond class and types of an edge."""

    def __init__(self, n_types: int, n_radial: int, cutoff_A: float, sizes: list[int]):
        super().__init__()
        width = 4 * n_radial
        self.sizes = sizes
        starts = (0, _N_CLASSES, _N_CLASSES + n_types)
        self.static = nn.Parameter(torch.randn(_N_CLASSES + 2 * n_types, width) / math.sqrt(3))
        self.hidden = nn.Linear(n_radial + 1, width)
        self.out = nn.Linear(width, sum(sizes))
        # Inputs are sin(kπr/r_c)/r and a distance within ±1 of four standard deviations: bring
        # them to order one.
        nn.init.normal_(self.hidden.weight, std=1 / math.sqrt(n_radial + 1))
        with torch.no_grad():
            self.hidden.weight *= torch.tensor([cutoff_A / 4] * n_radial + [4.0])
        nn.init.normal_(self.out.weight, std=1 / math.sqrt(width))
        self.register_buffer("typical", torch.zeros(_N_CLASSES, n_types, n_types, 2))
        for bond_class, (mean, std) in enumerate(_DEFAULT_DISTANCES):
            self.set_typical(bond_class, torch.tensor(mean), torch.tensor(std))
        frequencies = torch.arange(1, n_radial + 1) * (math.pi / cutoff_A)
        self.register_buffer("frequencies", frequencies[:, None], persistent=False)
        self.register_buffer("starts", torch.tensor(starts)[:, None], persistent=False)

    def set_typical(self, kinds, mean: Tensor, std: Tensor) -> None:
        """Store mean and spread of the distances in Å of kinds of edges, as tanh takes them."""
        width = 4 * std.clamp(min=_LEAST_SPREAD_A)
        self.typical[kinds] = torch.stack([-mean / width, 1 / width], dim=-1).to(self.typical)

    def forward(
        self, r: Tensor, inverse_r: Tensor, source: Tensor, target: Tensor, bonded: Tensor
    ) -> Tensor:
        """Map distances (1, E, B) to hidden features (width, E * B)."""
        shift, slope = self.typical[bonded, source, target].T.unsqueeze(-1)
        # Bounded, so that a torn bond stays within the learned range.
        standardised = torch.addcmul(shift, r, slope).tanh()
        bessel = (self.frequencies * r.flatten()).sin() * inverse_r.flatten()
        rows = torch.stack([bonded, source, target]) + self.starts
        static = self.static[rows].sum(0).T.unsqueeze(-1)
        inputs = torch.cat([bessel, standardised.flatten(1)])
        hidden = linear(self.hidden, inputs).view(len(static), *r.shape[1:]) + static
        return nn.functional.silu(hidden).flatten(1)

    def weights(self, k: int, hidden: Tensor) -> Tensor:
        """Map hidden features to the weights of layer k, (size, E * B)."""
        rows = slice(sum(self.sizes[:k]), sum(self.sizes[: k + 1]))
        return torch.addmm(self.out.bias[rows].unsqueeze(1), self.out.weight[rows], hidden)


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """Apply a linear layer to the first dimension of x, shape (features, N)."""
    return torch.addmm(layer.bias.unsqueeze(1), layer.weight, x)


class _Layer(nn.Module):
    """One step: sum messages over neighbours, mix channels, multiply mixtures, gate."""

    def __init__(self, features, harmonics, hidden, channels: int, mean_neighbours: float):
        super().__init__()
        reachable = [k for k in hidden if any(k in i * j for i, j in product(features, harmonics))]
        self.message = Coupling(features, harmonics, reachable, 1 / math.sqrt(mean_neighbours))
        self.square = Coupling(reachable, reachable, hidden)
        self.paths = self.message.paths
        self.missing = dimension(reachable) - dimension(features)

        std = 1 / math.sqrt(2 * channels)
        self.mix = nn.Parameter(std * torch.randn(len(reachable), 2 * channels, channels))
        self.keep = nn.Parameter(std * torch.randn(len(features), 2 * channels, channels))
        # The second factor starts at one: features pass on linearly, products come on top.
        self.bias = nn.Parameter(torch.cat([torch.zeros(channels), torch.ones(channels)]))
        self.gate = nn.Linear(channels, len(hidden) * channels)
        for name, irreps in (("mix", reachable), ("keep", features), ("gate", hidden)):
            owner = torch.repeat_interleave(torch.tensor([irrep.dim for irrep in irreps]))
            self.register_buffer(f"{name}_irrep", owner, persistent=False)

    def messages(
        self,
        x: Tensor,
        harmonics: Tensor,
        weights: Tensor,
        source: Tensor,
        target: Tensor,
        n: int,
    ) -> Tensor:
        """Sum the messages to n targets."""
        _, channels, _, batch = x.shape
        weights = weights.view(len(self.paths), channels, source.shape[0], batch)
        messages = self.message.weighted(x.index_select(2, source), harmonics, weights)
        summed = messages.new_zeros(len(messages), channels, n, batch)
        return summed.index_add(2, target, messages)

    def forward(self, x: Tensor, summed: Tensor) -> Tensor:
        _, channels, n, batch = x.shape
        keep = self.keep.index_select(0, self.keep_irrep)
        mix = self.mix.index_select(0, self.mix_irrep)
        bias = nn.functional.pad(self.bias[None, :, None], (0, 0, 0, 0, 0, len(keep) - 1))
        old = torch.baddbmm(bias, keep, x.flatten(2))
        if self.missing:  # old features come first among those that messages reach
            old = nn.functional.pad(old, (0, 0, 0, 0, 0, self.missing))
        left, right = torch.baddbmm(old, mix, summed.flatten(2)).split(channels, dim=1)
        squared = self.square(left, right)
        gate = linear(self.gate, squared[0]).sigmoid().view(-1, *squared.shape[1:])
        return (squared * gate.index_select(0, self.gate_irrep)).view(-1, channels, n, batch)
