"""CGCalculator: a coarse-grained force field for every ASE driver."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import (
    BaseCalculator,
    CalculationFailed,
    CalculatorSetupError,
    all_changes,
)

from ccg_ase.checkpoint import load_model
from ccg_ase.forcefield import ForceField
from ccg_ase.mapping import CGMap
from ccg_ase.threads import one_thread

_TEMPERATURE_TOLERANCE_K = 1e-6


class CGCalculator(BaseCalculator):
    """Serve a coarse-grained force field to any ASE driver.

    >>> calc = CGCalculator.load("model.ccg")
    >>> atoms = calc.atoms()
    >>> LangevinBAOAB(atoms, 2 * fs, temperature_K=calc.temperature_K, T_tau=100 * fs).run(1000)

    The energy is a free energy at `temperature_K` and holds at no other temperature; ``energy`` and
    ``free_energy`` are equal. Results are float64 in eV and Å, whatever the network computes in.

    Parameters
    ----------
    force_field
        The force field; the calculator keeps a copy of its own.
    device
        Torch device on which to evaluate.
    dtype
        Precision in which to evaluate; float32 by default.
    replicas
        The Atoms hold this many independent copies of the beads, one after another. They don't
        interact; one evaluation serves them all.
    """

    implemented_properties: ClassVar[list[str]] = ["energy", "free_energy", "energies", "forces"]

    def __init__(
        self,
        force_field: ForceField,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        replicas: int = 1,
    ):
        # check_state below does the caching; ASE's own costs more than the evaluation.
        super().__init__(use_cache=False)
        if replicas < 1:
            raise CalculatorSetupError(f"replicas must be at least 1, got {replicas}")
        self.force_field = (
            copy.deepcopy(force_field)
            .to(device=device, dtype=dtype or torch.float32)
            .requires_grad_(False)
            .eval()
        )
        self.device = torch.device(device)
        self.replicas = replicas

    @classmethod
    def load(cls, path: str | os.PathLike[str], **kwargs: Any) -> Self:
        """Load the force field of a model file; keyword arguments as for the class."""
        return cls(ForceField.from_model(load_model(path)), **kwargs)

    @property
    def temperature_K(self) -> float:
        """The temperature in K at which the energy is the beads' free energy."""
        return self.force_field.temperature_K

    @property
    def cg_map(self) -> CGMap:
        """The map from atoms to these beads."""
        return self.force_field.cg_map

    def check_temperature(self, temperature_K: float) -> None:
        """Refuse another temperature than the model's: call it before a thermostatted run.

        Raises
        ------
        CalculatorSetupError
            If `temperature_K` isn't the model's.
        """
        if not abs(temperature_K - self.temperature_K) <= _TEMPERATURE_TOLERANCE_K:
            raise CalculatorSetupError(
                f"this model's energy is a free energy at {self.temperature_K} K and wrong at "
                f"{temperature_K} K; run at {self.temperature_K} K or train another model"
            )

    @property
    def atoms(self) -> Callable[..., Atoms]:
        """Make Atoms that are ready to run: ``atoms()`` or ``atoms(positions)``, see `make_atoms`.

        ASE's base class keeps the Atoms of the last evaluation under this name; what it assigns is
        kept apart.
        """
        return self.make_atoms

    @atoms.setter
    def atoms(self, evaluated: Atoms | None) -> None:
        self._evaluated = evaluated

    def get_property(
        self, name: str, atoms: Atoms | None = None, allow_calculation: bool = True
    ) -> Any:
        """Return a property, of the Atoms evaluated last if none are given."""
        atoms = self._evaluated if atoms is None else atoms
        if atoms is None:
            raise CalculatorSetupError("nothing was evaluated yet: give Atoms")
        return super().get_property(name, atoms, allow_calculation)

    def make_atoms(self, positions: np.ndarray | None = None) -> Atoms:
        """Return Atoms with masses, names and this calculator attached, ready to run.

        Parameters
        ----------
        positions
            Bead positions in Å, shape (n_beads, 3), or for replicas (replicas, n_beads, 3). By
            default every copy starts from the model's reference structure.

        Raises
        ------
        CalculatorSetupError
            If positions aren't given and the model has no reference structure.
        """
        n = self.cg_map.n_beads
        if positions is None:
            positions = self.force_field.reference_beads.double().cpu().numpy()
            if not positions.any():
                raise CalculatorSetupError(
                    "this model stores no reference structure; pass `positions`, or make the "
                    "ForceField with `reference_beads`"
                )
            positions = np.tile(positions, (self.replicas, 1))
        positions = np.asarray(positions, dtype=float)
        if positions.size != self.replicas * n * 3 or positions.shape[-1] != 3:
            raise CalculatorSetupError(
                f"expected positions of {self.replicas} x {n} beads, got shape {positions.shape}"
            )
        copies = positions.reshape(self.replicas, n, 3)
        atoms = self.cg_map.to_ase(copies[0])
        for beads in copies[1:]:
            atoms += self.cg_map.to_ase(beads)
        atoms.calc = self
        return atoms

    def reset(self) -> None:
        """Forget the last results."""
        self._evaluated, self.results = None, {}

    def todict(self) -> dict[str, Any]:
        """Return what trajectory writers record: which model, by content, and its temperature."""
        digest = hashlib.sha256(self.cg_map.fingerprint().encode())
        for key, tensor in sorted(self.force_field.state_dict().items()):
            digest.update(key.encode())
            digest.update(tensor.cpu().numpy().tobytes())
        return {
            "model": "ccg",
            "sha256": digest.hexdigest(),
            "temperature_K": self.temperature_K,
            "replicas": self.replicas,
        }

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """List what changed since the last evaluation, exactly: stricter and faster than ASE's."""
        last = self._evaluated
        if last is None or len(last) != len(atoms):
            return list(all_changes)
        changed = [
            key
            for key in ("positions", "numbers")
            if not np.array_equal(last.arrays[key], atoms.arrays[key])
        ]
        changed += [
            key
            for key in ("cell", "pbc")
            if not np.array_equal(getattr(last, key), getattr(atoms, key))
        ]
        return changed

    def calculate(
        self,
        atoms: Atoms,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        """Evaluate all properties at once; drivers ask for forces first and energies next.

        Raises
        ------
        CalculatorSetupError
            If the Atoms aren't beads of this model, or are periodic.
        CalculationFailed
            If a position or the energy is NaN or infinite.
        """
        self.reset()
        self._check(atoms)
        n = self.cg_map.n_beads
        beads = atoms.positions.reshape(self.replicas, n, 3)
        if not np.isfinite(beads).all():
            bead = int(np.argmin(np.isfinite(beads).reshape(-1, 3).all(-1)))
            raise CalculationFailed(f"the position of bead {bead} is NaN or infinite")
        # Centred, so that float32 doesn't lose digits far from the origin.
        centred = torch.from_numpy(beads - beads.mean(1, keepdims=True))
        with one_thread(), torch.enable_grad():
            positions = centred.to(self.device, self.force_field.dtype).requires_grad_()
            sites = self.force_field.site_energies(positions)
            (gradient,) = torch.autograd.grad(sites.sum(), positions)
        energies = sites.detach().to("cpu", torch.float64).numpy().reshape(-1)
        forces = -gradient.to("cpu", torch.float64).numpy().reshape(-1, 3)
        energy = float(energies.sum())
        if not (np.isfinite(energy) and np.isfinite(forces).all()):
            raise CalculationFailed(
                "the energy or a force is NaN or infinite; beads may overlap, or the time step be "
                "too long"
            )
        self._evaluated = atoms.copy()
        self.results = {
            "energy": energy,
            "free_energy": energy,
            "energies": energies,
            "forces": forces,
        }

    def _check(self, atoms: Atoms) -> None:
        n = self.cg_map.n_beads
        if len(atoms) != self.replicas * n:
            raise CalculatorSetupError(
                f"this model has {n} beads in {self.replicas} replicas, {self.replicas * n} sites "
                f"in all, but the Atoms have {len(atoms)}; `calculator.atoms()` makes matching ones"
            )
        if atoms.pbc.any():
            raise CalculatorSetupError(
                "periodic boxes aren't supported: the model is of one molecule; set atoms.pbc=False"
            )
        found = atoms.info.get("cg_map", self.cg_map.fingerprint())
        if found != self.cg_map.fingerprint():
            raise CalculatorSetupError(
                f"these Atoms are beads of another mapping ({found}) than this model's "
                f"({self.cg_map.fingerprint()})"
            )
