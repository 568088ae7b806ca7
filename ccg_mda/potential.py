"""Atomistic energies and forces in batches: OpenMM, any ASE calculator, native torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from .openmm_system import EV_PER_KJ_MOL, NM_PER_A, check_system, read_xml

if TYPE_CHECKING:
    import openmm
    from ase.calculators.calculator import BaseCalculator

# Measured on one thread with GBSA-OBC: 22 atoms 19700 (Reference) against 1200 to 7600 (CPU) calls
# per second, 88 atoms 1800 against 3100. Reference also computes in double precision.
_REFERENCE_MAX_ATOMS = 64


class Potential(Protocol):
    """Atomistic potential energy for a batch of positions.

    Attributes
    ----------
    n_atoms : int
        Number of atoms.
    n_calls : int
        Frames evaluated so far by this object; energy calls are the currency of the cycle.
    """

    n_atoms: int
    n_calls: int

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return energies in eV, shape (...), and forces in eV/Å, shape (..., n_atoms, 3).

        ``positions`` are in Å, shape (..., n_atoms, 3).
        """
        ...


class CheckedPotential(ABC):
    """A potential whose input and output are checked and whose frames are counted.

    A frame whose energy or forces aren't finite (overlapping atoms) gets the energy +inf, hence
    the statistical weight zero, and zero forces, so that one clash doesn't spoil a batch.
    """

    def __init__(self, n_atoms: int) -> None:
        self.n_atoms = n_atoms
        self.n_calls = 0

    @abstractmethod
    def _evaluate_all(self, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return energies in eV, (B,), and forces in eV/Å, as frames (B, n_atoms, 3) in Å."""

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Evaluate a batch.

        Parameters
        ----------
        positions
            Atom positions in Å, shape (..., n_atoms, 3).

        Returns
        -------
        energy, forces
            In eV, shape (...), and in eV/Å, shape (..., n_atoms, 3); float64.

        Raises
        ------
        ValueError
            If the shape is wrong or a position is NaN or infinite.
        """
        positions = np.asarray(positions, dtype=np.float64)
        if positions.shape[-2:] != (self.n_atoms, 3):
            raise ValueError(
                f"expected positions of shape (..., {self.n_atoms}, 3), got {positions.shape}"
            )
        frames = np.ascontiguousarray(positions.reshape(-1, self.n_atoms, 3))
        broken = ~np.isfinite(frames).all(axis=(1, 2))
        if broken.any():
            raise ValueError(
                f"{broken.sum()} of {len(frames)} frames hold positions that are NaN or infinite; "
                f"the first is frame {np.argmax(broken)}"
            )
        energy, forces = self._evaluate_all(frames)
        self.n_calls += len(frames)
        clash = ~(np.isfinite(energy) & np.isfinite(forces).all(axis=(1, 2)))
        energy[clash], forces[clash] = np.inf, 0.0
        # [()] makes a scalar of the energy of a single frame.
        return energy.reshape(positions.shape[:-2])[()], forces.reshape(positions.shape)


class BatchedPotential(CheckedPotential):
    """A potential that evaluates one frame at a time."""

    @abstractmethod
    def _evaluate(self, positions: np.ndarray) -> tuple[float, np.ndarray]:
        """Return energy in eV and forces in eV/Å, (n_atoms, 3), of one frame in Å."""

    def _evaluate_all(self, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        energy, forces = np.empty(len(frames)), np.empty_like(frames)
        for k, frame in enumerate(frames):
            energy[k], forces[k] = self._evaluate(frame)
        return energy, forces


class OpenMMPotential(BatchedPotential):
    """Energies and forces of an OpenMM System without constraints and periodic box.

    Picklable: the System travels as XML, and every process builds its own Context at first use.

    Parameters
    ----------
    system
        An `openmm.System`.
    platform
        OpenMM platform name. Default: Reference (double precision) up to 64 atoms, else CPU; this
        is where they cross on one thread.
    properties
        Platform properties; default one thread on CPU, since frames are evaluated one by one and
        workers run side by side.

    Raises
    ------
    ValueError, NotImplementedError
        By `check_system`.
    """

    def __init__(
        self,
        system: openmm.System,
        *,
        platform: str | None = None,
        properties: dict[str, str] | None = None,
    ) -> None:
        import openmm

        n_atoms = system.getNumParticles()
        check_system(system)
        super().__init__(n_atoms)
        self._xml = openmm.XmlSerializer.serialize(system)
        self.platform = platform or ("Reference" if n_atoms <= _REFERENCE_MAX_ATOMS else "CPU")
        default = {"Threads": "1"} if self.platform == "CPU" else {}
        self.properties = default if properties is None else dict(properties)
        self._context: openmm.Context | None = None

    @classmethod
    def from_pdb(
        cls, pdb_path: str | PathLike[str], forcefield_files: Sequence[str], **options: Any
    ) -> OpenMMPotential:
        """Build from a PDB file and OpenMM force-field files, flexible and in vacuum.

        Parameters
        ----------
        pdb_path
            PDB file with all hydrogens; its atom order is the order of ``positions``.
        forcefield_files
            E.g. ``["amber96.xml", "amber96_obc.xml"]``; the second adds implicit water.
        **options
            ``platform`` and ``properties`` of the constructor.
        """
        from openmm import app

        if not Path(pdb_path).is_file():
            raise FileNotFoundError(f"no PDB file {str(pdb_path)!r}")
        if isinstance(forcefield_files, str):
            forcefield_files = [forcefield_files]
        forcefield = app.ForceField()
        for name in forcefield_files:
            # One by one, so that the message can name the file; OpenMM's own doesn't always.
            try:
                forcefield.loadFile(name)
            except Exception as error:
                raise ValueError(
                    f"can't read the force-field file {name!r}; give a file that comes with OpenMM "
                    f"(such as 'amber96.xml') or the path of your own ({error})"
                ) from error
        pdb = app.PDBFile(str(pdb_path))
        try:
            system = forcefield.createSystem(
                pdb.topology,
                nonbondedMethod=app.NoCutoff,
                constraints=None,
                rigidWater=False,
                removeCMMotion=False,
            )
        except ValueError as error:
            raise ValueError(
                f"{', '.join(forcefield_files)} can't describe {str(pdb_path)!r}: {error} Add the "
                "missing atoms (often hydrogens), rename the residue, or add a force-field file "
                "that knows it."
            ) from error
        return cls(system, **options)

    @classmethod
    def from_xml(cls, path: str | PathLike[str], **options: Any) -> OpenMMPotential:
        """Build from a System written by `openmm.XmlSerializer`; ``options`` as in the class."""
        return cls(read_xml(Path(path).read_text(), repr(str(path))), **options)

    @property
    def system(self) -> openmm.System:
        """A fresh copy of the OpenMM System, e.g. to run dynamics with."""
        import openmm

        return openmm.XmlSerializer.deserialize(self._xml)

    def _evaluate(self, positions: np.ndarray) -> tuple[float, np.ndarray]:
        if self._context is None:
            self._context = self._new_context()
        self._context.setPositions(positions * NM_PER_A)
        state = self._context.getState(getEnergy=True, getForces=True)
        # ._value avoids OpenMM's unit arithmetic, which costs as much as the energy itself.
        energy = state.getPotentialEnergy()._value * EV_PER_KJ_MOL
        return energy, state.getForces(asNumpy=True)._value * (EV_PER_KJ_MOL * NM_PER_A)

    def _new_context(self) -> openmm.Context:
        import openmm

        integrator = openmm.VerletIntegrator(0.001)  # a Context needs one; it never steps
        platform = openmm.Platform.getPlatformByName(self.platform)
        return openmm.Context(self.system, integrator, platform, self.properties)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_context": None}


class ASEPotential(BatchedPotential):
    """Energies and forces of an ASE calculator.

    Parameters
    ----------
    calculator
        Any ASE calculator with energy and forces.
    atoms
        The molecule that it is asked for: elements, charges and order; positions don't matter.
    """

    def __init__(self, calculator: BaseCalculator, atoms: Atoms) -> None:
        if atoms.pbc.any():
            raise NotImplementedError("periodic Atoms aren't supported yet; set atoms.pbc = False")
        super().__init__(len(atoms))
        self._atoms = atoms.copy()
        self._atoms.set_constraint()
        self._atoms.calc = calculator

    def _evaluate(self, positions: np.ndarray) -> tuple[float, np.ndarray]:
        self._atoms.positions = positions
        return self._atoms.get_potential_energy(), self._atoms.get_forces()


class TorchPotential(BatchedPotential):
    """Energies of a torch function, forces by autograd.

    Parameters
    ----------
    function
        Maps float64 positions in Å, shape (n_atoms, 3), to an energy in eV, a scalar. Give a
        module-level function or an `nn.Module` if the potential must be pickled.
    n_atoms
        Number of atoms.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], n_atoms: int) -> None:
        super().__init__(n_atoms)
        self.function = function

    def _evaluate(self, positions: np.ndarray) -> tuple[float, np.ndarray]:
        with torch.enable_grad():
            x = torch.tensor(positions, requires_grad=True)
            energy = self.function(x)
            (gradient,) = torch.autograd.grad(energy, x)
        return energy.item(), -gradient.numpy()


class _Energy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, positions: Tensor, potential: Potential) -> Tensor:
        energy, forces = potential(positions.detach().cpu().numpy())
        ctx.save_for_backward(torch.as_tensor(forces).to(positions))
        return torch.as_tensor(energy).to(positions)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (forces,) = ctx.saved_tensors
        return -gradient[..., None, None] * forces, None


def torch_energy(potential: Potential, positions: Tensor) -> Tensor:
    """Return the energy as a tensor whose derivative by ``positions`` is minus the forces.

    Parameters
    ----------
    potential
        Any `Potential`.
    positions
        Atom positions in Å, shape (..., n_atoms, 3).

    Returns
    -------
    Tensor
        Energies in eV, shape (...). Differentiable once; a clashing frame has +inf and gradient 0.
    """
    return _Energy.apply(positions, potential)
