"""torch-sim drives the beads: the force field as a model of `torch_sim`, many systems in a batch.

Importing this module imports torch-sim: an optional extra, ``pip install "ccg[torchsim]"``.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from ccg_ase.checkpoint import load_model
from ccg_ase.evaluator import Evaluator
from ccg_ase.forcefield import ForceField
from ccg_ase.mapping import CGMap

try:
    from torch_sim.models.interface import ModelInterface
except ImportError as error:
    raise ImportError(
        'torch-sim runs this model and isn\'t installed: pip install "ccg[torchsim]"'
    ) from error

if TYPE_CHECKING:
    from torch_sim.state import SimState


class BeadModel(ModelInterface):
    """Serve a coarse-grained force field to torch-sim's integrators and optimizers.

    >>> model = BeadModel.load("model.ccg")
    >>> beads = model.cg_map.to_ase(positions)
    >>> ts.integrate([beads] * 64, model, integrator=nvt_langevin, n_steps=1000,
    ...              temperature=model.temperature_K, timestep=0.004)

    Every system of a state is one copy of the model's beads, of element X (number 0) as
    `CGMap.to_ase` makes them. The energy is a free energy at `temperature_K`: run at no other.

    Parameters
    ----------
    force_field
        The force field; the model keeps a copy.
    temperature_K
        Temperature in K at which to evaluate; the force field's own by default.
    device, dtype
        Where and in which precision to evaluate; torch-sim integrates in the same.
    compiled
        As for `Evaluator`, of which there is one per number of systems.
    compute_stress
        Return the stress too. Needs periodic systems.
    """

    def __init__(
        self,
        force_field: ForceField,
        *,
        temperature_K: float | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        compiled: bool = True,
        compute_stress: bool = False,
    ):
        super().__init__()
        self._device, self._dtype = torch.device(device), dtype
        self._compute_forces, self._compute_stress = True, compute_stress
        # All systems are alike: what fits on a device is a number of them, whatever their density.
        self._memory_scales_with = "n_atoms"
        self._settings = {
            "temperature_K": temperature_K,
            "device": device,
            "dtype": dtype,
            "compiled": compiled,
        }
        self._evaluate = Evaluator(force_field, 1, **self._settings)

    @classmethod
    def load(cls, path: str | os.PathLike[str], **settings: Any) -> Self:
        """Load the force field of a model file; keyword arguments as for the class."""
        return cls(ForceField.from_model(load_model(path)), **settings)

    @property
    def temperature_K(self) -> float:
        """The temperature in K at which the energy is the beads' free energy."""
        return self._evaluate.temperature_K

    @property
    def cg_map(self) -> CGMap:
        """The map from atoms to the beads of one system."""
        return self._evaluate.cg_map

    @ModelInterface.compute_stress.setter
    def compute_stress(self, compute_stress: bool) -> None:
        """Ask for the stress, or no longer."""
        self._compute_stress = compute_stress

    def forward(self, state: SimState, **_: Any) -> dict[str, Tensor]:
        """Evaluate all systems of a state at once.

        Returns
        -------
        dict
            ``energy`` (n_systems,) in eV, ``forces`` (n_atoms, 3) in eV/Å and, if asked for,
            ``stress`` (n_systems, 3, 3) in eV/Å³, detached, in the precision of the state.

        Raises
        ------
        ValueError
            If a system isn't the model's beads, is periodic in part, or stress is asked of systems
            without a box.
        FloatingPointError
            If an energy or a force is NaN or infinite.
        """
        systems, n = self._check(state)
        box = None
        if torch.as_tensor(state.pbc).any():
            box = state.row_vector_cell.double()
        if systems != self._evaluate.replicas:
            # Systems leave a batch as they converge, and batches differ in size.
            self._evaluate = Evaluator(self._evaluate.force_field, systems, **self._settings)
        result = self._evaluate(state.positions.detach().double().view(systems, n, 3), box)
        energy = result.energies.sum(1)
        finite = energy.isfinite() & result.forces.isfinite().flatten(1).all(1)
        if not finite.all():
            raise FloatingPointError(
                f"the energy or a force of system {int((~finite).nonzero()[0])} is NaN or infinite;"
                " beads may overlap, or the time step be too long"
            )
        output = {"energy": energy, "forces": result.forces.reshape(-1, 3)}
        if self._compute_stress:
            output["stress"] = result.stress
        return {key: value.to(state.positions.dtype) for key, value in output.items()}

    def _check(self, state: SimState) -> tuple[int, int]:
        """Refuse what isn't this model's beads; return the numbers of systems and beads of each."""
        systems, n = len(state.cell), self.cg_map.n_beads
        sizes = state.system_idx.bincount(minlength=systems)
        if (sizes != n).any():
            raise ValueError(
                f"every system must be the {n} beads of this model, but system "
                f"{int((sizes != n).nonzero()[0])} has {int(sizes[sizes != n][0])} sites"
            )
        if state.atomic_numbers.any():
            raise ValueError(
                "these are atoms, but the model is of beads, which have atomic number 0; make "
                "systems with model.cg_map.to_ase(beads)"
            )
        pbc = torch.as_tensor(state.pbc)
        if pbc.any() != pbc.all():
            raise ValueError("systems must be periodic in all three directions or in none")
        if self._compute_stress and not pbc.any():
            raise ValueError("stress needs periodic systems; set model.compute_stress = False")
        return systems, n
