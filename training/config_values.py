"""What sections of a configuration are made of: paths, force-field names, faults in our words."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo
from pydantic_core import PydanticCustomError

from .config_text import nearest


def fault(text: str) -> PydanticCustomError:
    """Return the error of a validator, to be raised, with a sentence of ours."""
    # "{" would start a pydantic format field, so the text travels as a value.
    return PydanticCustomError("ccg", "{text}", {"text": text})


def resolved(path: Path, info: ValidationInfo) -> Path:
    """Return a path that starts from the folder of the TOML file."""
    root = (info.context or {}).get("root", Path.cwd())
    return (root / path.expanduser()).resolve()


def _existing(path: Path, info: ValidationInfo) -> Path:
    path = resolved(path, info)
    if not path.is_file():
        raise fault(f"no such file: {path} (paths are relative to the TOML file)")
    return path


def _forcefield(name: str, info: ValidationInfo) -> str:
    """Resolve a force-field file; a name that OpenMM ships stays a name."""
    path = resolved(Path(name), info)
    if path.is_file():
        return str(path)
    openmm = importlib.util.find_spec("openmm")
    plugins = importlib.metadata.entry_points(group="openmm.forcefielddir")
    if openmm is None or openmm.origin is None or plugins:
        return name  # OpenMM itself reports what it can't find
    shipped = Path(openmm.origin).parent / "app" / "data"
    if (shipped / name).is_file():
        return name
    known = [file.relative_to(shipped).as_posix() for file in shipped.rglob("*.xml")]
    raise fault(
        f"{name!r} is neither a file beside the TOML file nor a force field that OpenMM ships"
        + nearest(name, known)
    )


ExistingFile = Annotated[Path, Field(strict=False), AfterValidator(_existing)]
AnyPath = Annotated[Path, Field(strict=False), AfterValidator(resolved)]
ForceFieldFile = Annotated[str, AfterValidator(_forcefield)]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values are checked and then frozen."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, validate_default=False, allow_inf_nan=False
    )
