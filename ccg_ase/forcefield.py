"""ForceField: the potential of mean force of the beads, a prior plus equivariant networks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ccg_ase.bead_graph import BeadGraph, Edges
from ccg_ase.checkpoint import ModelFile
from ccg_ase.graph import batch_radius_edges
from ccg_ase.mapping import CGMap
from ccg_ase.network import Network
from ccg_ase.prior import Prior
from ccg_ase.prior_fit import fit_prior
from ccg_ase.temperature import TemperatureRange
from ccg_ase.units import thermal_energy

CUTOFF_A = 12.0
_STATISTICS_FRAMES = 500  # from which typical distances and neighbours are counted


class ForceField(nn.Module):
    """Free energy of bead positions; forces are its exact gradient.

    E(s; T) = prior(s) + kT₀ · mean over members of Σ_beads networkₘ(s; T)

    Invariant under rotation and translation, not under mirroring. A fresh force field equals its
    prior, since the last layer of its networks starts at zero. One molecule or many, in open space
    or in a periodic box; parameters belong to types of beads, hence `for_map`.

    Parameters
    ----------
    cg_map
        The map whose beads this is about.
    temperature_K
        Temperature T₀ in K that the force field was made for; that of the prior.
    prior
        Bonded and excluded-volume terms.
    temperatures_K
        Range in K, if the temperature is an input; default: `temperature_K` only.
    n_members
        Networks of a committee; they share the prior, and the energy is their mean.
    channels, l_max, n_layers, n_radial, cutoff_A, mean_neighbours
        Size of a network, see `Encoder`; `mean_neighbours` is by default n_beads - 1.
    type_names
        Types of beads that it has parameters for, in ascending order; default: those of the map.
    reference_beads
        A typical structure in Å, shape (n_beads, 3), to start simulations from.
    reference_box
        Its cell vectors in rows, in Å, shape (3, 3); None for open space.

    Raises
    ------
    ValueError
        If prior and map or temperatures disagree, or a shape is another one.
    """

    def __init__(
        self,
        cg_map: CGMap,
        temperature_K: float,
        prior: Prior,
        *,
        temperatures_K: Sequence[float] | None = None,
        n_members: int = 1,
        channels: int = 16,
        l_max: int = 1,
        n_layers: int = 2,
        n_radial: int = 8,
        cutoff_A: float = CUTOFF_A,
        mean_neighbours: float | None = None,
        type_names: Sequence[str] | None = None,
        reference_beads: np.ndarray | Tensor | None = None,
        reference_box: np.ndarray | Tensor | None = None,
    ):
        super().__init__()
        n = cg_map.n_beads
        if prior.n_beads != n:
            raise ValueError(f"the prior has {prior.n_beads} beads, the map {n}")
        if abs(prior.temperature_K - temperature_K) > 1e-6:
            raise ValueError(
                f"the prior was fitted at {prior.temperature_K} K, not {temperature_K} K: refit it"
            )
        low, high = temperatures_K or (temperature_K, temperature_K)
        if not 0 < low <= temperature_K <= high:
            raise ValueError(f"{temperature_K} K must be within temperatures_K, {low} to {high} K")
        if n_members < 1:
            raise ValueError(f"n_members must be at least 1, got {n_members}")
        self.cg_map, self.temperature_K = cg_map, float(temperature_K)
        self.temperatures_K = TemperatureRange(float(low), float(high))
        self._sizes = {
            "channels": channels,
            "l_max": l_max,
            "n_layers": n_layers,
            "n_radial": n_radial,
            "cutoff_A": float(cutoff_A),
            "mean_neighbours": float(mean_neighbours or max(n - 1, 1)),
        }
        self.prior = copy.deepcopy(prior)  # this module is converted as a whole
        self.type_names = tuple(type_names or sorted(set(cg_map.beads.types)))
        self.members = nn.ModuleList(
            Network(len(self.type_names), thermal=low < high, **self._sizes)
            for _ in range(n_members)
        )
        types = self._types_of(cg_map)
        self.graph = BeadGraph(cg_map.beads, max(cutoff_A, prior.reach_A), types)
        self.register_buffer("scale", torch.tensor(thermal_energy(temperature_K)))
        self.register_buffer("reference_beads", torch.zeros(n, 3))
        self.register_buffer("reference_box", torch.zeros(3, 3))
        for name, value in (("beads", reference_beads), ("box", reference_box)):
            if value is not None:
                self._set_reference(f"reference_{name}", value)
        self.to(torch.get_default_dtype())

    @classmethod
    def from_data(
        cls,
        cg_map: CGMap,
        temperature_K: float,
        beads: np.ndarray,
        *,
        boxes: np.ndarray | None = None,
        terms: Sequence[str] = ("bonds", "angles", "volumes"),
        dihedral_order: int = 3,
        **options: Any,
    ) -> ForceField:
        """Make an untrained force field from equilibrium frames of the beads.

        They give the prior, what distances are typical, and the reference structure.

        Parameters
        ----------
        cg_map, temperature_K
            As for the class.
        beads, boxes, terms, dihedral_order
            As for `fit_prior`.
        options
            Other parameters of the class.
        """
        prior = fit_prior(
            beads,
            cg_map.beads,
            temperature_K,
            boxes=boxes,
            terms=terms,
            dihedral_order=dihedral_order,
        )
        some = slice(None, None, max(1, len(beads) // _STATISTICS_FRAMES))
        known = {"reference_beads": beads[0]}
        if boxes is not None:
            known["reference_box"] = boxes[0]
        if "mean_neighbours" not in options:
            cutoff_A = options.get("cutoff_A", CUTOFF_A)
            (_, target), _, _ = batch_radius_edges(
                beads[some], cutoff_A, None if boxes is None else boxes[some]
            )
            known["mean_neighbours"] = max(1.0, len(target) / beads[some, :, 0].size)
        made = cls(cg_map, temperature_K, prior, **{**known, **options})
        x = torch.from_numpy(np.array(beads[some], dtype=float))
        box = None if boxes is None else torch.from_numpy(np.array(boxes[some], dtype=float))
        for member in made.members:
            made.graph.set_distance_statistics(member.encoder, x, box)
        return made

    def for_map(self, cg_map: CGMap) -> ForceField:
        """Return this force field for another system of the same kinds of molecules.

        Parameters of networks are shared. A reference box is scaled to keep the density; there is
        no reference structure.

        Parameters
        ----------
        cg_map
            With molecules that the prior knows, in any number; not all need to be there.

        Raises
        ------
        ValueError
            If there is a molecule or a type of beads that this force field doesn't know.
        """
        types = self._types_of(cg_map)
        other = copy.copy(self)
        other._modules, other._buffers = dict(self._modules), dict(self._buffers)
        other.cg_map = cg_map
        other.prior = Prior(self.prior.config, cg_map.beads).to(self.scale)
        other.graph = BeadGraph(cg_map.beads, self.graph.cutoff_A, types).to(self.scale.device)
        other.reference_beads = self.reference_beads.new_zeros(cg_map.n_beads, 3)
        masses = (system.beads.masses.sum() for system in (cg_map, self.cg_map))
        other.reference_box = self.reference_box * float(np.cbrt(np.divide(*masses)))
        return other

    def _types_of(self, cg_map: CGMap) -> Tensor:
        """Return the index of each bead's type, shape (n_beads,)."""
        unknown = sorted(set(cg_map.beads.types) - set(self.type_names))
        if unknown:
            raise ValueError(
                f"the force field knows beads of the types {', '.join(self.type_names)}, not "
                f"{', '.join(unknown)}"
            )
        row = {name: k for k, name in enumerate(self.type_names)}
        return torch.tensor([row[name] for name in cg_map.beads.types])

    def supercell(self, repeats: Sequence[int]) -> ForceField:
        """Return this force field for a periodic system, repeated along its cell vectors.

        Parameters
        ----------
        repeats
            Three positive integers.

        Raises
        ------
        ValueError
            If the force field isn't of a periodic system, or a repeat isn't positive.
        """
        if not self.periodic:
            raise ValueError("there is no supercell of a molecule in open space")
        if len(repeats) != 3 or min(repeats) < 1:
            raise ValueError(f"a supercell needs three positive integers, got {tuple(repeats)}")
        cells = torch.cartesian_prod(*(torch.arange(k) for k in repeats)).to(self.reference_box)
        large = self.for_map(self.cg_map.repeated(len(cells)))
        shifts = cells @ self.reference_box
        large.reference_beads = (shifts[:, None] + self.reference_beads).reshape(-1, 3)
        large.reference_box = self.reference_box * torch.tensor(repeats).to(cells)[:, None]
        return large

    @classmethod
    def committee(cls, force_fields: Sequence[ForceField]) -> ForceField:
        """Join force fields that differ in their networks' weights only; the energy is the mean.

        Raises
        ------
        ValueError
            If there are none, or they differ in more.
        """
        if not force_fields:
            raise ValueError("a committee needs at least one force field, got none")
        first = copy.deepcopy(force_fields[0])
        config = {**first.config, "n_members": None}
        for other in force_fields[1:]:
            if {**other.config, "n_members": None} != config or other.cg_map != first.cg_map:
                raise ValueError(
                    "the force fields of a committee must share map, prior, temperatures and "
                    "sizes: train them in one call (n_members)"
                )
            first.members.extend(copy.deepcopy(other.members).to(first.scale))
        return first

    def _set_reference(self, name: str, value: np.ndarray | Tensor) -> None:
        buffer, value = getattr(self, name), torch.tensor(np.array(value))
        if value.shape != buffer.shape:
            raise ValueError(
                f"{name} must have shape {tuple(buffer.shape)}, got {tuple(value.shape)}"
            )
        buffer.copy_(value)

    @property
    def config(self) -> dict[str, Any]:
        """JSON-able arguments for `from_config`, prior included."""
        return {
            **self._sizes,
            "n_members": self.n_members,
            "temperatures_K": list(self.temperatures_K),
            "type_names": list(self.type_names),
            "prior": self.prior.config,
        }

    @classmethod
    def from_config(cls, cg_map: CGMap, temperature_K: float, config: dict[str, Any]) -> ForceField:
        """Build an untrained force field from the `config` of another."""
        options = {key: value for key, value in config.items() if key != "prior"}
        return cls(cg_map, temperature_K, Prior(config["prior"], cg_map.beads), **options)

    @classmethod
    def from_model(cls, model: ModelFile) -> ForceField:
        """Restore from the part ``force_field`` of a model file, in its stored precision."""
        return model.restore("force_field", cls)

    @property
    def n_members(self) -> int:
        """Networks of the committee."""
        return len(self.members)

    @property
    def periodic(self) -> bool:
        """Whether it was made for a system in a periodic box."""
        return bool(self.reference_box.any())

    @property
    def dtype(self) -> torch.dtype:
        """Precision in which the energy is evaluated."""
        return self.scale.dtype

    @property
    def device(self) -> torch.device:
        """Where the energy is evaluated."""
        return self.scale.device

    def site_energies(
        self,
        beads: Tensor,
        *,
        box: Tensor | None = None,
        temperature_K: float | Tensor | None = None,
    ) -> Tensor:
        """Return each bead's share of the energy in eV, shape (..., n_beads).

        Only their sum has a physical meaning. Parameters as in `forward`.
        """
        return self.member_energies(beads, box=box, temperature_K=temperature_K).mean(0)

    def member_energies(
        self,
        beads: Tensor,
        *,
        box: Tensor | None = None,
        temperature_K: float | Tensor | None = None,
    ) -> Tensor:
        """Return `site_energies` with every member alone, shape (n_members, ..., n_beads)."""
        n, leading = self.cg_map.n_beads, beads.shape[:-2]
        if beads.shape[-2:] != (n, 3):
            raise ValueError(f"expected beads of shape (..., {n}, 3), got {tuple(beads.shape)}")
        flat = beads.reshape(-1, n, 3).to(self.dtype)
        if box is not None:
            box = box.to(flat).expand(*leading, 3, 3).reshape(-1, 3, 3)
        reduced = self.reduced_temperature(temperature_K, leading)
        energies = self.on_edges(flat, self.graph.edges(flat, box), box, reduced)
        return energies.view(-1, *leading, n).to(beads.dtype)

    def reduced_temperature(
        self, temperature_K: float | Tensor | None, leading: Sequence[int]
    ) -> Tensor | None:
        """Return what the networks take for the temperature, one number per frame, or None."""
        given = self.temperature_K if temperature_K is None else temperature_K
        reduced = self.temperatures_K.reduced(given)
        return None if reduced is None else reduced.to(self.scale).expand(leading).reshape(-1)

    def on_edges(
        self, beads: Tensor, edges: Edges, box: Tensor | None, reduced_T: Tensor | None
    ) -> Tensor:
        """Return energies of frames (B, n, 3) for given edges, shape (n_members, B, n).

        The whole of the energy as a function of tensors; `site_energies` finds the edges for it.
        """
        networks = [member(beads, self.graph.types, edges, reduced_T) for member in self.members]
        return torch.stack(networks) * self.scale + self.prior.site_energies(beads, edges, box)

    def forward(
        self,
        beads: Tensor,
        *,
        box: Tensor | None = None,
        temperature_K: float | Tensor | None = None,
    ) -> Tensor:
        """Return the free energy, differentiable twice.

        Parameters
        ----------
        beads
            Bead positions in Å, shape (..., n_beads, 3).
        box
            Cell vectors in rows, in Å, shape (3, 3) or (..., 3, 3); None for open space.
        temperature_K
            K, one number or shape (...), for a force field that was trained over a range; default:
            that of the force field.

        Returns
        -------
        Tensor
            Energy in eV, shape (...), in the dtype of `beads`.
        """
        return self.site_energies(beads, box=box, temperature_K=temperature_K).sum(-1)

    def energy_and_forces(
        self,
        beads: Tensor,
        *,
        box: Tensor | None = None,
        temperature_K: float | Tensor | None = None,
        create_graph: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Return energy in eV, shape (...), and forces in eV/Å, shape (..., n_beads, 3).

        Parameters
        ----------
        beads, box, temperature_K
            As in `forward`.
        create_graph
            Keep the graph, to train on the forces; otherwise both results are detached.
        """
        with torch.enable_grad():
            positions = beads if beads.requires_grad else beads.detach().requires_grad_()
            energy = self(positions, box=box, temperature_K=temperature_K)
            (gradient,) = torch.autograd.grad(energy.sum(), positions, create_graph=create_graph)
        return (energy if create_graph else energy.detach()), -gradient
