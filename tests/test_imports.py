"""Imports run one way, ccg_training -> ccg_mda -> ccg_ase, and ASE's plugin scan loads no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ccg_ase

ROOT = Path(__file__).parent.parent
FOLDERS = {"ccg_ase": "ccg_ase", "ccg_mda": "ccg_mda", "ccg_training": "training"}
# What a package never imports, and what it doesn't import at module level.
NEVER = {
    "ccg_ase": {"MDAnalysis", "ccg_mda", "ccg_training"},
    "ccg_mda": {"ccg_training"},
    "ccg_training": set(),
}
NOT_AT_MODULE_LEVEL = {"ccg_ase": {"openmm"}, "ccg_mda": {"openmm"}, "ccg_training": set()}


def imported(nodes) -> set[str]:
    """Top-level names of the packages that import statements load."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def at_module_level(node):
    """All nodes that run on import: outside functions and ``if TYPE_CHECKING`` blocks."""
    for child in ast.iter_child_nodes(node):
        typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        if not typing_only and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
            yield from at_module_level(child)


@pytest.mark.parametrize("package", FOLDERS)
def test_one_way(package):
    files = sorted((ROOT / FOLDERS[package]).rglob("*.py"))
    assert files
    for file in files:
        tree = ast.parse(file.read_text())
        assert not imported(ast.walk(tree)) & NEVER[package], file
        assert not imported(at_module_level(tree)) & NOT_AT_MODULE_LEVEL[package], file


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_plugin_loads_no_torch():
    run(
        "import sys, ccg_ase._plugin as plugin\n"
        "assert plugin.__ase_plugins__ and 'torch' not in sys.modules"
    )


def test_ase_lists_and_resolves_the_plugin():
    code = (
        "from ase._4.plugins import plugins\n"
        "from ccg_ase._plugin import __ase_plugins__\n"
        "(plugin,) = __ase_plugins__\n"
        "print(plugin.display(), plugin.implementation.__name__)"
    )
    assert "CGCalculator" in run(code)


def test_public_names():
    for name in ccg_ase.__all__:
        assert getattr(ccg_ase, name).__name__ == name
    assert set(ccg_ase.__all__) <= set(dir(ccg_ase))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = ccg_ase.nonsense
