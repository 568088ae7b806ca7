"""Coarse-grained force fields for ASE: beads in, free energy and forces out."""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Names load on first use, so that ASE's plugin scan (which imports this package) loads no torch.
_HOME = {
    "BatchedLangevin": "langevin",
    "CGCalculator": "calculator",
    "CGMap": "mapping",
    "Encoder": "encoder",
    "ForceField": "forcefield",
    "ModelFile": "checkpoint",
    "ModelFileError": "checkpoint",
    "Prior": "prior",
    "Topology": "topology",
    "TorsionMap": "torsion_map",
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
