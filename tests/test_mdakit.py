"""The entry for the registry of MDAKits says what the package says."""

import re
import tomllib
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[1]
REQUIRED = {
    "project_name", "authors", "maintainers", "description", "keywords", "license",
    "project_home", "documentation_home", "documentation_type",
}  # fmt: skip


def test_the_entry_agrees_with_the_package():
    entry = (ROOT / ".ci" / "mdakits" / "ccg" / "metadata.yaml").read_text(encoding="utf-8")
    keys = dict(re.findall(r"^(\w+):[ \t]*(.*)$", entry, re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(keys) >= REQUIRED
    assert keys["project_name"] == project["name"]
    assert keys["license"] == project["license"]
    assert keys["python_requires"].strip('"') == project["requires-python"]
    needed = next(line for line in project["dependencies"] if line.startswith("MDAnalysis"))
    assert needed == "MDAnalysis" + keys["mdanalysis_requires"].strip('"').removesuffix(".0")
    assert import_module(keys["import_name"]).backmap
