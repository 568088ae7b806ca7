"""TorchSystemPotential: energies and forces of an OpenMM System in batches, without OpenMM."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ccg_ase.compiled import compile_ahead
from ccg_ase.graph import near_origin
from ccg_ase.threads import one_thread

from .potential import CheckedPotential
from .torch_system import TorchSystem

if TYPE_CHECKING:
    import openmm

# Frames at a time: so many that calls cost little beside the work, yet what is computed stays in
# the cache; on a GPU as many as 4 GiB hold. Per ordered pair of atoms about 40 numbers are kept.
_NUMBERS_EAGER, _NUMBERS_COMPILED, _NUMBERS_GPU = 2**17, 2**15, 2**32 // (40 * 8)

_Kernel = Callable[..., tuple[Tensor, ...]]


class TorchSystemPotential(CheckedPotential):
    """Energies and forces by `TorchSystem`: the `Potential` for a GPU, and for batches on a CPU.

    Picklable; compiled code stays on its machine.

    Parameters
    ----------
    system
        The energy; a copy is kept.
    device, dtype
        Where and in which precision to evaluate. In float32 energies of alanine dipeptide are
        within 2e-5 eV.
    compiled
        Evaluate through a cached ahead-of-time build, on CPUs and where one can be made; building
        takes minutes, once per molecule and machine, and pays from some 10⁶ frames on.
    frames_at_once
        Frames of a portion; default by the number of atoms.

    Raises
    ------
    ValueError
        If `frames_at_once` isn't positive.
    """

    def __init__(
        self,
        system: TorchSystem,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float64,
        compiled: bool = False,
        frames_at_once: int | None = None,
    ) -> None:
        if frames_at_once is not None and frames_at_once < 1:
            raise ValueError(f"frames_at_once must be at least 1, got {frames_at_once}")
        super().__init__(system.n_atoms)
        self.device, self.dtype = torch.device(device), dtype
        self.system = copy.deepcopy(system).to(self.device, dtype)
        self._compiled = compiled and self.device.type == "cpu"
        if self.device.type != "cpu":
            numbers = _NUMBERS_GPU
        else:
            numbers = _NUMBERS_COMPILED if self._compiled else _NUMBERS_EAGER
        per_frame = system.n_atoms * max(system.n_atoms - 1, 1)
        # A power of two: no row of frames then ends in a rest that isn't vectorised.
        self.frames_at_once = frames_at_once or 2 ** max(0, (numbers // per_frame).bit_length() - 1)
        self._eager = _EnergyAndForces(self.system)
        self._kernel = self._at_start()

    @classmethod
    def from_system(cls, system: openmm.System, **options: Any) -> TorchSystemPotential:
        """Build from an OpenMM System, see `TorchSystem.from_system`; ``options`` as in the class.

        That of a PDB file is ``OpenMMPotential.from_pdb(...).system``.
        """
        return cls(TorchSystem.from_system(system), **options)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kernel": self._at_start()}

    def _at_start(self) -> _Kernel | None:
        """Return what evaluates; None where that is compiled at the first call."""
        return None if self._compiled else self._eager

    def evaluate(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return energies in eV, (B,), and forces in eV/Å, without checks, where they were made.

        For loops that stay on the device; frames aren't counted, and those that clash hold
        numbers that aren't finite.

        Parameters
        ----------
        positions
            Å, shape (B, n_atoms, 3), float64; the results have the potential's dtype and device.
        """
        kind = {"device": self.device, "dtype": self.dtype}
        results = torch.empty(len(positions), **kind), torch.empty(positions.shape, **kind)
        with one_thread():
            for start in range(0, len(positions), self.frames_at_once):
                own = slice(start, start + self.frames_at_once)
                for result, found in zip(results, self._portion(positions[own]), strict=True):
                    result[own] = found
        return results

    def _portion(self, positions: Tensor) -> tuple[Tensor, ...]:
        # Lower precision then loses no digits of molecules that drifted far.
        frames = near_origin(positions.detach(), None).to(self.device, self.dtype)
        if self._kernel is None:
            return self._first(frames)
        n, missing = len(frames), self.frames_at_once - len(frames)
        if missing and self._kernel is not self._eager:
            frames = torch.cat([frames, frames[-1:].expand(missing, -1, -1)])
        return tuple(found[:n] for found in self._kernel(frames))

    def _first(self, frames: Tensor) -> tuple[Tensor, ...]:
        """Evaluate, then compile on the better half of the frames: a clash would check nothing."""
        energy, forces = self._eager(frames)
        good = energy.argsort()[: (int(energy.isfinite().sum()) + 1) // 2]
        if len(good):
            example = frames[good[torch.arange(self.frames_at_once) % len(good)]]
            self._kernel = compile_ahead(self._eager, (example,), label="the torch potential")
        return energy, forces

    def _evaluate_all(self, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = self.evaluate(torch.from_numpy(frames).to(self.device))
        energy, forces = (x.cpu().numpy().astype(float) for x in found)
        return energy, forces


class _EnergyAndForces(nn.Module):
    """What is evaluated and compiled: from positions (B, n_atoms, 3) to energies and forces."""

    def __init__(self, system: TorchSystem):
        super().__init__()
        self.system = system

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            positions = positions.detach().requires_grad_()
            energy = self.system(positions)
            (gradient,) = torch.autograd.grad(energy.sum(), positions)
        return energy.detach(), -gradient
