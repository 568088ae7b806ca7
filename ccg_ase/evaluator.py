"""Evaluator: energies, forces and stress of a batch of bead frames, for every engine that asks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ccg_ase.bead_graph import Edges
from ccg_ase.compiled import compile_ahead
from ccg_ase.forcefield import ForceField
from ccg_ase.graph import near_origin
from ccg_ase.mapping import CGMap
from ccg_ase.threads import one_thread
from ccg_ase.tracing import being_compiled

_COINCIDENT_A = 1e-6
_EDGES_IN_CACHE = 1536


class Evaluation(NamedTuple):
    """What a force field says about R frames, in float64.

    Parameters
    ----------
    energies
        Of every bead, eV, shape (R, n).
    forces
        eV/Å, shape (R, n, 3).
    stress
        Derivative of the energy by strain over the volume, eV/Å³, shape (R, 3, 3); None without a
        box.
    """

    energies: Tensor
    forces: Tensor
    stress: Tensor | None


class Evaluator:
    """Evaluate R frames of the beads in one call, as fast as this machine can.

    Parameters
    ----------
    force_field
        The force field; a copy is kept.
    replicas
        Number R of frames in a call.
    temperature_K
        K, one number or a tensor (R,), for a force field that was trained over a range; default:
        that of the force field.
    device, dtype
        Where and in which precision to evaluate.
    compiled
        Evaluate through a cached ahead-of-time build, on CPUs and where one can be made.

    Raises
    ------
    ValueError
        If `replicas` isn't positive, or the force field doesn't hold at a temperature.
    """

    def __init__(
        self,
        force_field: ForceField,
        replicas: int = 1,
        *,
        temperature_K: float | Tensor | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        compiled: bool = True,
    ):
        if replicas < 1:
            raise ValueError(f"replicas must be at least 1, got {replicas}")
        self.force_field = copy.deepcopy(force_field).to(device, dtype).requires_grad_(False).eval()
        self.replicas, self.device = replicas, torch.device(device)
        self.temperature_K = force_field.temperature_K if temperature_K is None else temperature_K
        reduced = self.force_field.reduced_temperature(self.temperature_K, (replicas,))
        self._thermal = () if reduced is None else (reduced.contiguous(),)
        self._eager = _Kernel(self.force_field)
        self._compiled = compiled and self.device.type == "cpu"
        self._kernels: dict[int, Callable[..., tuple[Tensor, ...]]] = {}
        # Compiled code on static edges is fastest where its messages stay in the cache.
        n_edges = len(self.force_field.graph.bonded)
        self._portion = replicas
        if self._compiled and n_edges:
            self._portion = min(
                replicas, 2 ** max(0, (_EDGES_IN_CACHE // n_edges).bit_length() - 1)
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kernels": {}}  # machine code stays on its machine

    @property
    def cg_map(self) -> CGMap:
        """The map from atoms to these beads."""
        return self.force_field.cg_map

    def __call__(self, beads: Tensor, box: Tensor | None = None) -> Evaluation:
        """Evaluate frames.

        Parameters
        ----------
        beads
            Å, shape (R, n, 3), float64; in a box, inside of it or not.
        box
            Cell vectors in rows, Å, shape (3, 3) or (R, 3, 3), float64; None for open space.
        """
        inputs = self._inputs(beads, box)
        with one_thread():
            if box is None and self._portion < len(beads):
                energies, forces, *virial = self._in_portions(inputs)
            else:
                energies, forces, *virial = self._kernel(inputs)(*inputs)
        stress = None
        if virial:
            volume = torch.linalg.det(box.to(self.device, torch.float64)).abs()
            stress = virial[0] / volume[..., None, None]
        return Evaluation(energies, forces, stress)

    def members(self, beads: Tensor, box: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return energies and forces of every member alone, in eV and eV/Å, float64.

        Shapes (n_members, R) and (n_members, R, n, 3); parameters as of a call.
        """
        inputs = self._inputs(beads, box)
        with one_thread(), torch.enable_grad():
            energies, strained = self._eager.strained(*inputs)
            energy = energies.sum(-1)
            forces = [
                torch.autograd.grad(member.sum(), strained[0], retain_graph=True)[0]
                for member in energy
            ]
        return energy.detach().double(), -torch.stack(forces).double()

    def check_apart(self, beads: Tensor, box: Tensor | None = None) -> None:
        """Refuse frames in which two beads coincide: their direction, hence the force, is none.

        Raises
        ------
        ValueError
            With the frame and the two beads.
        """
        ff = self.force_field
        beads = beads.to(self.device)
        box = None if box is None else box.to(self.device).expand(len(beads), 3, 3)
        edges = ff.graph.edges(beads, box)
        close = torch.linalg.vector_norm(edges.vectors(edges.layout(beads)), dim=0) < _COINCIDENT_A
        if close.any():
            edge, frame = close.nonzero()[0].tolist()
            i, j = edges.index[:, edge].tolist()
            n = ff.cg_map.n_beads
            frame = j // n if edges.united else frame
            raise ValueError(
                f"beads {min(i % n, j % n)} and {max(i % n, j % n)} of frame {frame} are at the "
                "same place: the force between them has no direction; move one of them"
            )

    def _inputs(self, beads: Tensor, box: Tensor | None) -> tuple[Tensor, ...]:
        """Tensors for a kernel: float64 beads, in a box wrapped into it, and their edges."""
        ff = self.force_field
        beads = beads.detach().to(self.device, torch.float64)
        if box is None:
            if ff.graph.is_static(None):
                return (beads, *self._thermal)
            index, bonded, _ = ff.graph.search(near_origin(beads, None).to(ff.dtype), None)
            return (beads, index, bonded, *self._thermal)
        box = box.detach().to(self.device, torch.float64).expand(len(beads), 3, 3).contiguous()
        beads = near_origin(beads, box)
        index, bonded, images = ff.graph.search(beads.to(ff.dtype), box.to(ff.dtype))
        return (beads, index, bonded, images, box, *self._thermal)

    def _in_portions(self, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        """Evaluate so many frames at a time as the processor's cache holds."""
        n = len(inputs[0])
        missing = -n % self._portion
        if missing:
            inputs = tuple(torch.cat([x, x[-1:].expand(missing, *x.shape[1:])]) for x in inputs)
        portions = list(zip(*(x.split(self._portion) for x in inputs), strict=True))
        kernel = self._kernel(portions[0])
        parts = zip(*(kernel(*portion) for portion in portions), strict=True)
        return [torch.cat(part)[:n] for part in parts]

    def _kernel(self, inputs: tuple[Tensor, ...]) -> Callable[..., tuple[Tensor, ...]]:
        return self._kernels.get(len(inputs)) or self._build(inputs)

    def _build(self, inputs: tuple[Tensor, ...]) -> Callable[..., tuple[Tensor, ...]]:
        if not self._compiled or any(0 in x.shape for x in inputs):
            return self._eager
        edges = ({1: "edges"}, {0: "edges"}, {0: "edges"})
        n_edges = {1: 0, 3: 2, 5: 3}[len(inputs) - len(self._thermal)]
        rest = (None,) * (len(inputs) - 1 - n_edges)
        kernel = compile_ahead(
            self._eager, inputs, (None, *edges[:n_edges], *rest), label="the force field"
        )
        if kernel is self._eager:
            self._portion = self.replicas
        self._kernels[len(inputs)] = kernel
        return kernel


class _Kernel(nn.Module):
    """Energies, forces, and in a box the virial, as a function of nothing but tensors.

    Floating numbers come and go in float64, whatever the force field calculates in.
    """

    def __init__(self, force_field: ForceField):
        super().__init__()
        self.force_field = force_field

    def strained(self, beads: Tensor, *rest: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return energies of all members, (members, R, n), and what to differentiate them by.

        `rest`: edges (2, E) and bond classes (E,) where they change between calls; with a box also
        images (E, 3) and cells (R, 3, 3); the reduced temperature (R,) where it is an input.
        """
        ff = self.force_field
        thermal = rest[-1] if len(rest) in (1, 3, 5) else None
        rest = rest if thermal is None else rest[:-1]
        if len(rest) < 4:  # float32 loses no digits far out
            beads = near_origin(beads, None)
        beads = beads.detach().to(ff.dtype).requires_grad_()
        if not rest:
            edges = Edges(ff.graph.index, ff.graph.bonded)
            return ff.on_edges(beads, edges, None, thermal), (beads,)
        blocks = None if being_compiled() else ff.graph.sites_per_block(beads, rest[0])
        if len(rest) == 2:
            edges = ff.graph.united(*rest, None, None, blocks)
            return ff.on_edges(beads, edges, None, thermal), (beads,)
        *found, box = rest
        box = box.to(ff.dtype)
        strain = torch.zeros_like(box).requires_grad_()
        deform = torch.eye(3).to(box) + strain
        edges = ff.graph.united(*found, box @ deform, blocks)
        energies = ff.on_edges(beads @ deform, edges, box @ deform, thermal)
        return energies, (beads, strain)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            energies, variables = self.strained(*inputs)
            sites = energies.mean(0)
            gradient, *virial = torch.autograd.grad([sites.sum()], variables)
        # The antisymmetric part is a rotation, by which the energy doesn't change.
        virial = [0.5 * (v + v.mT) for v in virial]
        return tuple(found.detach().double() for found in (sites, -gradient, *virial))
