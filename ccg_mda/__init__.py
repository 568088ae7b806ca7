"""The bridge between beads and atoms for MDAnalysis: coarse-grain, backmap, reweight."""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Names load on first use: a reader of weights needn't wait for torch and e3nn.
_HOME = {
    "ASEPotential": "potential",
    "AtomReader": "readers",
    "Backmap": "transformation",
    "Backmapper": "flow",
    "BeadReader": "readers",
    "BeadWriter": "bead_writer",
    "Diagnostics": "diagnostics",
    "OpenMMPotential": "potential",
    "Potential": "potential",
    "StructureReference": "structure",
    "StructureReport": "structure_report",
    "TorchPotential": "potential",
    "TorchSystem": "torch_system",
    "TorchSystemPotential": "torch_potential",
    "TwoLevelWeights": "two_level",
    "WeightedAverage": "averages",
    "backmap": "transformation",
    "bead_universe": "bead_sources",
    "build_placement": "placement_order",
    "cg_map": "universe",
    "check_structure": "structure",
    "coarse_grain": "universe",
    "diagnose": "diagnostics",
    "effective_sample_size": "weights",
    "log_mean_exp": "weights",
    "log_weights": "weights",
    "pareto_k": "weights",
    "resample": "weights",
    "reweight": "reweighting",
    "topology_from": "universe",
    "torch_energy": "potential",
    "torsion_map": "universe",
    "two_level_weights": "two_level",
    "universe_from": "universe",
    "weighted_average": "weights",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
