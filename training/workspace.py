"""What all stages of a run share: its inputs, its files and its seeds."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ccg_ase.checkpoint import ModelFile, load_model, save_model
from ccg_ase.devices import available
from ccg_ase.torsion_map import TorsionMap

from .config import Config
from .config_models import Potential
from .findings import refuse_faults
from .mapping_check import check_mapping
from .reference import ReferenceData
from .system import mapping_of, potential_of


class Workspace:
    """A run directory with the things its configuration names.

    Parameters
    ----------
    config
        The run; its directory exists.

    Raises
    ------
    ReferenceDataError
        If the check of the mapping finds an error.
    ValueError
        If there is no such device as the run asks for.
    """

    def __init__(self, config: Config) -> None:
        self.config, self.directory = config, config.run.directory
        self.temperature_K = config.system.temperature_K
        self.device = available(config.run.device)
        self.cg_map, self.potential = mapping_of(config), potential_of(config)
        refuse_faults(check_mapping(self.cg_map))

    @cached_property
    def data(self) -> tuple[ReferenceData, ReferenceData]:
        """Training and held-out frames."""
        stored = ReferenceData.load(self.directory / "reference.npz")
        return stored.split(self.config.reference.holdout_fraction)

    @property
    def by_torsions(self) -> bool:
        """Whether torsions are the coarse variables: then there is no bead force field."""
        return isinstance(self.cg_map, TorsionMap)

    def iteration(self, k: int) -> Path:
        """Return the folder of iteration k; 0 holds what comes before the loop."""
        folder = self.directory / f"iteration_{k}"
        folder.mkdir(exist_ok=True)
        return folder

    def final(self, k: int) -> Path:
        """Return the folder of what comes after the loop, where that ended with iteration k."""
        folder = self.directory / f"final_{k}"
        folder.mkdir(exist_ok=True)
        return folder

    def model(self, k: int) -> ModelFile:
        """Load the models of iteration k, for the device of the run."""
        return load_model(self.iteration(k) / "model.ccg", device=self.device)

    def final_model(self, k: int) -> ModelFile:
        """Load the models that came out of a loop that ended with iteration k.

        Over torsions there is nothing to fine-tune: they are those of its last turn.
        """
        folder = self.iteration(k) if self.by_torsions else self.final(k)
        return load_model(folder / "model.ccg", device=self.device)

    def seed(self, *what: int) -> int:
        """Return a seed for one use of randomness: a function of the run's seed and `what`."""
        words = np.random.SeedSequence([self.config.run.seed, *what]).generate_state(1)
        return int(words[0] % 2**31)

    def save(
        self, path: Path, parts: Mapping[str, nn.Module], metrics: Mapping[str, Any] | None = None
    ) -> None:
        """Write a model file with the provenance of this run."""
        system = self.config.system
        provenance = {
            "ccg": importlib.metadata.version("ccg"),
            "name": system.name,
            "topology": system.topology.name,
            "forcefield": _names(self.config.potential),
            "seed": self.config.run.seed,
        }
        save_model(
            path,
            cg_map=self.cg_map,
            temperature_K=self.temperature_K,
            parts=parts,
            provenance=provenance,
            metrics=metrics,
        )


def _names(potential: Potential) -> list[str]:
    """Return the names of the files that the potential is made of."""
    files = potential.forcefield if potential.system is None else [potential.system]
    return [Path(name).name for name in files]
