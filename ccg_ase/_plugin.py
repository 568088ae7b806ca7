"""ASE plugin registration: lists ccg under ``ase info --plugins``. Imports no torch."""

from __future__ import annotations

try:
    # A preview inside ASE that may move; without it ccg works and just isn't listed.
    from ase._4.plugins.plugin import CalculatorPlugin
except ImportError:
    __ase_plugins__: set = set()
else:

    class _CCGPlugin(CalculatorPlugin):
        # ASE looks the version up by distribution name, which isn't the import package's.
        package = "ccg"

    __ase_plugins__ = {
        _CCGPlugin(
            "ccg",
            citation="ccg: Cycle Coarse Graining for ASE and MDAnalysis",
            implementation="ccg_ase.CGCalculator",
        )
    }
