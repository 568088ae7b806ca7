"""Coarse-grained force fields for ASE: beads in, free energy and forces out."""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Names load on first use, so that ASE's plugin scan (which imports this package) loads no torch.
_HOME = {
    "AngleRestraint": "restraints",
    "AseBeadWriter": "bead_writers",
    "BatchedLangevin": "langevin",
    "BeadFrames": "bead_frames",
    "CGCalculator": "calculator",
    "CGMap": "mapping",
    "DihedralRestraint": "restraints",
    "DistanceRestraint": "restraints",
    "Encoder": "encoder",
    "Evaluator": "evaluator",
    "ExplodedError": "run_checks",
    "ForceField": "forcefield",
    "GyrationRestraint": "restraints",
    "ModelFile": "checkpoint",
    "ModelFileError": "checkpoint",
    "PositionRestraint": "restraints",
    "Prior": "prior",
    "Topology": "topology",
    "TorsionMap": "torsion_map",
    "bead_energies": "energies",
    "bead_force": "openmm_force",
    "bead_system": "openmm_force",
    "fit_prior": "prior_fit",
    "load_model": "checkpoint",
    "save_model": "checkpoint",
    "thermal_energy": "units",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
