"""CGCalculator: a coarse-grained force field for every ASE driver."""

from __future__ import annotations

import math
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
    PropertyNotImplementedError,
    all_changes,
)
from ase.stress import full_3x3_to_voigt_6_stress

from ccg_ase.checkpoint import content_digest, load_model
from ccg_ase.evaluator import Evaluator
from ccg_ase.forcefield import ForceField
from ccg_ase.mapping import CGMap

_STEP_A = 1.0  # no run moves a bead farther in one step


class CGCalculator(BaseCalculator):
    """Serve a coarse-grained force field to any ASE driver.

    >>> calc = CGCalculator.load("model.ccg")
    >>> atoms = calc.atoms()
    >>> LangevinBAOAB(atoms, 2 * fs, temperature_K=calc.temperature_K, T_tau=100 * fs).run(1000)

    The energy is a free energy at `temperature_K` and holds at no other temperature; ``energy`` and
    ``free_energy`` are equal. Results are float64 in eV and Å, whatever the network computes in.
    A force field of a periodic system needs Atoms with a box, and gives their stress: its volume
    derivative is that of the fitted free energy, which knows one density well.

    Parameters
    ----------
    force_field
        The force field; the calculator keeps a copy of its own. Several ones of one prior act as
        a committee, see `ForceField.committee`.
    device
        Torch device on which to evaluate.
    dtype
        Precision in which to evaluate; float32 by default.
    compiled
        Evaluate through a cached ahead-of-time build. Where none can be made, a warning says why.
    replicas
        The Atoms hold this many independent copies of the beads, one after another. They don't
        interact; one evaluation serves them all.
    temperature_K
        K, for a force field that was trained over a range; default: that of the force field.
    supercell
        Repeat a periodic system so many times along its cell vectors.

    Raises
    ------
    CalculatorSetupError
        If an argument doesn't fit the force field.
    """

    implemented_properties: ClassVar[list[str]] = [
        "energy",
        "free_energy",
        "energies",
        "forces",
        "stress",
    ]

    def __init__(
        self,
        force_field: ForceField | Sequence[ForceField],
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        compiled: bool = True,
        replicas: int = 1,
        temperature_K: float | None = None,
        supercell: Sequence[int] = (1, 1, 1),
    ):
        # check_state below does the caching; ASE's own costs more than the evaluation.
        super().__init__(use_cache=False)
        try:
            if not isinstance(force_field, ForceField):
                force_field = ForceField.committee(force_field)
            if tuple(supercell) != (1, 1, 1):
                force_field = force_field.supercell(supercell)
            self._evaluate = Evaluator(
                force_field,
                replicas,
                temperature_K=temperature_K,
                device=device,
                dtype=dtype or torch.float32,
                compiled=compiled,
            )
        except ValueError as error:
            raise CalculatorSetupError(str(error)) from error
        self.replicas = replicas
        self._apart: np.ndarray | None = None  # where no two beads coincided
        self._periodic = self.force_field.periodic

    @classmethod
    def load(cls, path: str | os.PathLike[str], **kwargs: Any) -> Self:
        """Load the force field of a model file; keyword arguments as for the class."""
        return cls(ForceField.from_model(load_model(path)), **kwargs)

    @property
    def force_field(self) -> ForceField:
        """The force field that is evaluated."""
        return self._evaluate.force_field

    @property
    def device(self) -> torch.device:
        """Where it is evaluated."""
        return self._evaluate.device

    @property
    def temperature_K(self) -> float:
        """The temperature in K at which the energy is the beads' free energy."""
        return self._evaluate.temperature_K

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
        if not math.isclose(temperature_K, self.temperature_K, abs_tol=1e-6, rel_tol=0):
            raise CalculatorSetupError(
                f"this calculator's energy is a free energy at {self.temperature_K} K and wrong at "
                f"{temperature_K} K; run at {self.temperature_K} K, or make the calculator with "
                "another temperature_K, for which the model must have been trained"
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
        if name == "stress" and not self._periodic:
            raise PropertyNotImplementedError(
                "stress needs a three-dimensional cell, and this model is of beads in open space"
            )
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
        if self._periodic:
            atoms.set_cell(self.force_field.reference_box.double().cpu().numpy())
            atoms.set_pbc(True)
        atoms.calc = self
        return atoms

    def reset(self) -> None:
        """Forget the last results."""
        self._evaluated, self.results = None, {}

    def todict(self) -> dict[str, Any]:
        """Return what trajectory writers record: which model, by content, and its temperature."""
        return {
            "model": "ccg",
            "sha256": content_digest(self.cg_map.fingerprint(), self.force_field),
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
        beads, box = self._beads_of(atoms)
        if self._is_new(atoms.positions):
            self._check_apart(beads, box)
        found = self._evaluate(beads, box)
        energies = found.energies.cpu().numpy().reshape(-1)
        forces = found.forces.cpu().numpy().reshape(-1, 3)
        energy = float(energies.sum())
        if not (math.isfinite(energy) and math.isfinite(forces.sum())):
            raise CalculationFailed(
                "the energy or a force is NaN or infinite; beads may overlap, or the time step be "
                "too long"
            )
        self._evaluated = atoms.copy()
        self._apart = self._evaluated.positions
        self.results = {
            "energy": energy,
            "free_energy": energy,
            "energies": energies,
            "forces": forces,
        }
        if found.stress is not None:
            stress = found.stress.sum(0).cpu().numpy()
            self.results["stress"] = full_3x3_to_voigt_6_stress(stress)

    def spread(self, atoms: Atoms) -> dict[str, Any]:
        """Return how much a committee disagrees, as standard deviations over its members.

        Parameters
        ----------
        atoms
            Beads of this model.

        Returns
        -------
        dict
            ``energy`` in eV, of that of all replicas together, and ``forces`` in eV/Å, shape
            (n, 3).

        Raises
        ------
        CalculatorSetupError
            If the model has one member only: it can't say how sure it is.
        """
        if self.force_field.n_members == 1:
            raise CalculatorSetupError(
                "this model has one member; train a committee (n_members of 2 or more) for a spread"
            )
        energies, forces = self._evaluate.members(*self._beads_of(atoms))
        return {
            "energy": float(energies.sum(1).std(correction=0)),
            "forces": forces.std(0, correction=0).reshape(-1, 3).cpu().numpy(),
        }

    def _beads_of(self, atoms: Atoms) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Check Atoms, and return their beads (replicas, n, 3) and box."""
        self._check(atoms)
        beads = atoms.positions.reshape(self.replicas, self.cg_map.n_beads, 3)
        if not math.isfinite(beads.sum()):
            bead = int(np.argmin(np.isfinite(beads).reshape(-1, 3).all(-1)))
            raise CalculationFailed(f"the position of bead {bead} is NaN or infinite")
        if not self._periodic:
            return torch.from_numpy(beads), None
        cell = atoms.cell.array
        if not math.isfinite(cell.sum()):
            raise CalculationFailed("the cell is NaN or infinite; the barostat may be too fast")
        return torch.from_numpy(beads), torch.from_numpy(cell)

    def _is_new(self, positions: np.ndarray) -> bool:
        """Whether positions are another structure, rather than the next step of a run."""
        last = self._apart
        return last is None or bool(np.abs(positions - last).max() > _STEP_A)

    def _check_apart(self, beads: torch.Tensor, box: torch.Tensor | None) -> None:
        try:
            self._evaluate.check_apart(beads, box)
        except ValueError as error:
            raise CalculationFailed(str(error)) from error

    def _check(self, atoms: Atoms) -> None:
        n = self.cg_map.n_beads
        if len(atoms) != self.replicas * n:
            raise CalculatorSetupError(
                f"this model has {n} beads in {self.replicas} replicas, {self.replicas * n} sites "
                f"in all, but the Atoms have {len(atoms)}; `calculator.atoms()` makes matching ones"
            )
        if self._periodic and not (atoms.pbc.all() and atoms.cell.rank == 3):
            raise CalculatorSetupError(
                "this model is of a periodic system: give the Atoms a three-dimensional cell and "
                "pbc=True"
            )
        if not self._periodic and atoms.pbc.any():
            raise CalculatorSetupError(
                "this model is of beads in open space and knows nothing of periodic images; set "
                "atoms.pbc=False, or train one in a box"
            )
        found = atoms.info.get("cg_map", self.cg_map.fingerprint())
        if found != self.cg_map.fingerprint():
            raise CalculatorSetupError(
                f"these Atoms are beads of another mapping ({found}) than this model's "
                f"({self.cg_map.fingerprint()})"
            )
