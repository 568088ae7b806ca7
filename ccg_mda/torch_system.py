"""TorchSystem: the energy of an OpenMM System as a module of torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from .openmm_system import read_xml
from .system_terms import read_terms
from .torch_bonded import AtomGroups
from .torch_nonbonded import AllPairs

if TYPE_CHECKING:
    import openmm


class TorchSystem(nn.Module):
    """Potential energy of a molecule in open space, for batches, on any device.

    Sums bonds, angles, torsions (periodic, Ryckaert–Bellemans, CMAP), Lennard-Jones and Coulomb
    energies of all pairs, and implicit water (GBSA-OBC2), as OpenMM does. Constants only, nothing
    to train; float64 unless converted. Where atoms coincide, energies or derivatives aren't finite.

    Parameters
    ----------
    n_atoms
        Number of atoms.
    terms
        Pairs of OpenMM's class name and a module, from `read_terms`.

    Raises
    ------
    ValueError
        If there are no terms.
    """

    def __init__(self, n_atoms: int, terms: Iterable[tuple[str, nn.Module]]):
        super().__init__()
        self.n_atoms = n_atoms
        terms = list(terms)
        if not terms:
            raise ValueError("there is no term: the System holds no force that gives an energy")
        self.names = tuple(name for name, _ in terms)
        self.parts = nn.ModuleList(part for _, part in terms)
        self.pairs = AllPairs(n_atoms)

    @classmethod
    def from_system(cls, system: openmm.System) -> TorchSystem:
        """Build from an OpenMM System without constraints, virtual sites, cutoffs and box.

        Raises
        ------
        ValueError, NotImplementedError
            If the System holds what can't be translated; see `read_terms`.
        """
        return cls(system.getNumParticles(), read_terms(system))

    @classmethod
    def from_xml(cls, text: str) -> TorchSystem:
        """Build from the text that `openmm.XmlSerializer.serialize` makes of a System."""
        return cls.from_system(read_xml(text, "the text"))

    def forward(self, positions: Tensor) -> Tensor:
        """Return the energy in eV, shape (...), differentiable twice.

        Parameters
        ----------
        positions
            Å, shape (..., n_atoms, 3).
        """
        return sum(self.terms(positions).values(), positions.new_zeros(positions.shape[:-2]))

    def terms(self, positions: Tensor) -> dict[str, Tensor]:
        """Return the parts of the energy in eV, shape (...) each, by OpenMM's class names.

        Parameters
        ----------
        positions
            Å, shape (..., n_atoms, 3).
        """
        # Frames last: every row of an atom's coordinate is contiguous then.
        batch = positions.shape[:-2]
        frames = positions.reshape(-1, self.n_atoms, 3).permute(2, 1, 0).contiguous()
        distances = None
        energies: dict[str, Tensor] = {}
        for name, part in zip(self.names, self.parts, strict=True):
            if isinstance(part, AtomGroups):
                energy = part(frames)
            else:
                distances = distances or self.pairs(frames)
                energy = part(distances)
            energies[name] = energies.get(name, 0.0) + energy.reshape(batch)
        return energies
