"""ForceField: the potential of mean force of the beads, a prior plus an equivariant network."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ccg_ase.checkpoint import ModelFile
from ccg_ase.encoder import Encoder, linear
from ccg_ase.graph import all_pairs, bond_classes
from ccg_ase.mapping import CGMap
from ccg_ase.prior import Prior
from ccg_ase.units import thermal_energy


class ForceField(nn.Module):
    """Free energy of bead positions at one temperature; forces are its exact gradient.

    E(s) = prior(s) + kT Σ_beads network(s). Invariant under rotation and translation, not under
    mirroring: odd scalars reach the readout, so that a left and a right turn may differ.

    A fresh force field equals its prior, since the last layer starts at zero.

    Parameters
    ----------
    cg_map
        The map whose beads this is about: one molecule.
    temperature_K
        Temperature in K at which the energy is a free energy; that of the prior.
    prior
        Bonded and excluded-volume terms.
    channels, l_max, n_layers, n_radial, cutoff_A
        Size of the network, see `Encoder`.
    reference_beads
        A typical structure in Å, shape (n_beads, 3), to start simulations from.

    Raises
    ------
    NotImplementedError
        If the beads form more than one molecule.
    ValueError
        If prior and map or temperatures disagree, or `reference_beads` has another shape.
    """

    def __init__(
        self,
        cg_map: CGMap,
        temperature_K: float,
        prior: Prior,
        *,
        channels: int = 16,
        l_max: int = 1,
        n_layers: int = 2,
        n_radial: int = 8,
        cutoff_A: float = 12.0,
        reference_beads: np.ndarray | Tensor | None = None,
    ):
        super().__init__()
        n = cg_map.n_beads
        if cg_map.beads.molecules.max() > 0:
            raise NotImplementedError(
                f"the beads form {cg_map.beads.molecules.max() + 1} molecules, but a ForceField "
                "holds one; give the mapping the bonds that connect them, or map one molecule"
            )
        if prior.n_beads != n:
            raise ValueError(f"the prior has {prior.n_beads} beads, the map {n}")
        if abs(prior.temperature_K - temperature_K) > 1e-6:
            raise ValueError(
                f"the prior was fitted at {prior.temperature_K} K, not {temperature_K} K: refit it"
            )
        self.cg_map, self.temperature_K = cg_map, float(temperature_K)
        self._sizes = {
            "channels": channels,
            "l_max": l_max,
            "n_layers": n_layers,
            "n_radial": n_radial,
            "cutoff_A": cutoff_A,
        }
        self.prior = copy.deepcopy(prior)  # this module is converted as a whole
        names, types = np.unique(cg_map.beads.types, return_inverse=True)
        self.encoder = Encoder(len(names), mean_neighbours=max(n - 1, 1), **self._sizes)
        self.n_inputs = self.encoder.n_scalars * channels
        self.hidden, self.out = nn.Linear(self.n_inputs, 2 * channels), nn.Linear(2 * channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        edges = all_pairs(n)
        bonded = bond_classes(cg_map.beads, edges)
        for name, value in (
            ("types", torch.from_numpy(types)),
            ("edges", edges),
            ("bonded", bonded),
        ):
            self.register_buffer(name, value, persistent=False)
        self.register_buffer("scale", torch.tensor(thermal_energy(temperature_K)))
        self.register_buffer("reference_beads", torch.zeros(n, 3))
        if reference_beads is not None:
            self.set_reference_beads(reference_beads)
        self._see_typical_distances()
        self.to(torch.get_default_dtype())

    def _see_typical_distances(self) -> None:
        """Tell the encoder the distance statistics that the prior was fitted on."""
        statistics = {(int(i), int(j)): rest for i, j, *rest in self.prior.config["pairs"]}
        pairs = [tuple(sorted(pair)) for pair in self.edges.T.tolist()]
        known = torch.tensor([pair in statistics for pair in pairs], dtype=torch.bool)
        if known.any():
            values = torch.tensor([statistics[pair] for pair in pairs if pair in statistics])
            self.encoder.set_distance_statistics(
                *values.T, self.types, self.edges[:, known], self.bonded[known]
            )

    def set_reference_beads(self, beads: np.ndarray | Tensor) -> None:
        """Store a typical structure in Å, shape (n_beads, 3)."""
        beads = torch.as_tensor(beads).to(self.reference_beads)
        if beads.shape != self.reference_beads.shape:
            raise ValueError(
                f"reference_beads must have shape {tuple(self.reference_beads.shape)}, "
                f"got {tuple(beads.shape)}"
            )
        self.reference_beads.copy_(beads)

    @property
    def config(self) -> dict[str, Any]:
        """JSON-able arguments for `from_config`, prior included."""
        return {**self._sizes, "prior": self.prior.config}

    @classmethod
    def from_config(cls, cg_map: CGMap, temperature_K: float, config: dict[str, Any]) -> ForceField:
        """Build an untrained force field from the `config` of another."""
        sizes = {key: value for key, value in config.items() if key != "prior"}
        return cls(cg_map, temperature_K, Prior.from_config(config["prior"]), **sizes)

    @classmethod
    def from_model(cls, model: ModelFile) -> ForceField:
        """Restore from the part ``force_field`` of a model file, in its stored precision."""
        return model.restore("force_field", cls)

    @property
    def dtype(self) -> torch.dtype:
        """Precision in which the energy is evaluated."""
        return self.scale.dtype

    def site_energies(self, beads: Tensor) -> Tensor:
        """Return each bead's share of the energy in eV, shape (..., n_beads).

        Only their sum has a physical meaning. Parameters as in `forward`.
        """
        n = self.cg_map.n_beads
        if beads.shape[-2:] != (n, 3):
            raise ValueError(f"expected beads of shape (..., {n}, 3), got {tuple(beads.shape)}")
        flat = beads.reshape(-1, n, 3).to(self.dtype)
        features = self.encoder.features(flat, self.types, self.edges, self.bonded)
        hidden = linear(self.hidden, features[: self.encoder.n_scalars].reshape(self.n_inputs, -1))
        network = linear(self.out, nn.functional.silu(hidden)).view(n, -1).T
        energies = network * self.scale + self.prior.site_energies(flat)
        return energies.view(beads.shape[:-1]).to(beads.dtype)

    def forward(self, beads: Tensor) -> Tensor:
        """Return the free energy, differentiable twice.

        Parameters
        ----------
        beads
            Bead positions in Å, shape (..., n_beads, 3).

        Returns
        -------
        Tensor
            Energy in eV, shape (...), in the dtype of `beads`.
        """
        return self.site_energies(beads).sum(-1)

    def energy_and_forces(self, beads: Tensor, create_graph: bool = False) -> tuple[Tensor, Tensor]:
        """Return energy in eV, shape (...), and forces in eV/Å, shape (..., n_beads, 3).

        Parameters
        ----------
        beads
            Bead positions in Å, shape (..., n_beads, 3).
        create_graph
            Keep the graph, to train on the forces; otherwise both results are detached.
        """
        with torch.enable_grad():
            positions = beads if beads.requires_grad else beads.detach().requires_grad_()
            energy = self(positions)
            (gradient,) = torch.autograd.grad(energy.sum(), positions, create_graph=create_graph)
        return (energy if create_graph else energy.detach()), -gradient
