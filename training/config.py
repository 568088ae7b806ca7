"""The TOML file of a run: sections, keys, units and defaults, validated once and read-only after.

Every section is its own model class, in `config_models` and `config_loop`; a key is one line in it,
and its description becomes the comment that ``ccg init`` writes. Units are part of the key's name.
Paths are relative to the TOML file. A key that does not exist is an error that names the nearest
one that does.
"""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path
from typing import Any

from pydantic import ValidationError, ValidationInfo, model_validator

from .config_loop import Cycle, Run, Stop
from .config_models import Dynamics, Flow, ForceField, Mapping, Potential, Reference, System
from .config_text import explain, toml_value
from .config_values import Section, fault, resolved


class ConfigError(ValueError):
    """The TOML file is missing, is not TOML, or has a wrong key or value."""


class Config(Section):
    """A whole run. Build it with `load`, or from Python with the sections as keyword arguments."""

    system: System
    potential: Potential = Potential()
    mapping: Mapping
    reference: Reference = Reference()
    flow: Flow = Flow()
    force_field: ForceField = ForceField()
    dynamics: Dynamics = Dynamics()
    cycle: Cycle = Cycle()
    stop: Stop = Stop()
    run: Run = Run()

    @model_validator(mode="after")
    def _populations_where_needed(self) -> Config:
        if self.reference.biased and self.force_field.relative_entropy_rounds:
            raise fault(
                "relative_entropy_rounds fits the populations of the reference data, which are "
                "biased along the coarse variables: set relative_entropy_rounds = 0"
            )
        return self

    @model_validator(mode="after")
    def _fill_names(self, info: ValidationInfo) -> Config:
        # The two defaults that depend on other keys; frozen models are completed by copy.
        name = self.system.name or self.system.topology.stem
        directory = self.run.directory or resolved(Path("runs") / name, info)
        system = self.system.model_copy(update={"name": name})
        run = self.run.model_copy(update={"directory": directory})
        object.__setattr__(self, "system", system)
        object.__setattr__(self, "run", run)
        return self

    def on_device(self, device: str | None) -> Config:
        """Return this run on another device than its file names; as it is for None.

        Raises
        ------
        ConfigError
            If that isn't the name of one.
        """
        if device is None:
            return self
        try:
            run = Run.model_validate(dict(self.run) | {"device": device})
        except ValidationError:
            raise ConfigError(
                f"no device is called {device!r}: give cpu, cuda, cuda:1 ... or auto"
            ) from None
        return self.model_copy(update={"run": run})

    @classmethod
    def load(cls, path: str | Path) -> Config:
        """Read and check a TOML file.

        Parameters
        ----------
        path
            TOML file; relative paths inside it start from its folder.

        Raises
        ------
        ConfigError
            Missing file, broken TOML, unknown key, wrong value or missing input file.
        """
        path = Path(path).expanduser().resolve()
        if not path.is_file():
            raise ConfigError(f"no such file: {path} (write one with: ccg init TOPOLOGY)")
        text = path.read_text(encoding="utf-8")
        try:
            data = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path.name} is not valid TOML: {error}") from None
        return cls.build(data, path.parent, text=text, filename=path.name)

    @classmethod
    def build(
        cls,
        sections: dict[str, Any],
        root: Path,
        *,
        text: str = "",
        filename: str = "configuration",
    ) -> Config:
        """Build from sections as dictionaries; paths start from `root`.

        `text` and `filename` are the TOML file that errors point to.
        """
        try:
            return cls.model_validate(sections, context={"root": root})
        except ValidationError as error:
            faults = [explain(fault, cls.model_fields, text, filename) for fault in error.errors()]
            raise ConfigError("\n".join(faults)) from None

    def to_toml(self, *, comments: bool = True, root: Path | None = None) -> str:
        """Return the configuration as TOML with every key, its value and its description.

        Paths are absolute, or relative to `root`, the folder that the file will lie in.
        """
        parts = []
        for name, section in self:
            lines = [f"# {section.__doc__.splitlines()[0]}"] if comments else []
            lines.append(f"[{name}]")
            for key, field in type(section).model_fields.items():
                value = getattr(section, key)
                if root is not None and isinstance(value, Path):
                    value = os.path.relpath(value, root)
                line = f"{key} = {toml_value(value)}"
                if value is None:
                    line = f"# {key} ="
                elif isinstance(value, dict):  # a table of its own; always a section's last key
                    line = f"[{name}.{key}]"
                lines.append(f"{line:<31}  # {field.description}" if comments else line)
                if isinstance(value, dict):
                    lines += [f"{json.dumps(k)} = {toml_value(v)}" for k, v in value.items()]
            parts.append("\n".join(lines))
        return "\n\n".join(parts) + "\n"

    def differences(self, other: Config, *, ignore: tuple[str, ...] = ()) -> list[str]:
        """Return one "section.key: this -> other" line per key that differs."""
        return [
            f"{name}.{key}: {toml_value(value)} -> {toml_value(new)}"
            for name, section in self
            for key, value in section
            if f"{name}.{key}" not in ignore
            and toml_value(new := getattr(getattr(other, name), key)) != toml_value(value)
        ]
