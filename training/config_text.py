"""The TOML file as text: values written, and faults in words with line and nearest key."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo


def nearest(word: str, known: list[str]) -> str:
    """Return "; did you mean ..." for the closest known word, else the known words."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known)[:20])}"


def explain(fault: Any, sections: dict[str, FieldInfo], text: str, filename: str) -> str:
    """Say in one line where the fault is, what it is, and what was probably meant.

    Parameters
    ----------
    fault
        One entry of `pydantic.ValidationError.errors()`.
    sections
        Fields of the whole configuration, by section.
    text, filename
        The TOML file, for the line number.
    """
    section, *keys = [str(part) for part in fault["loc"]] or [""]
    field = sections.get(section)
    if fault["type"] == "extra_forbidden":
        known, kind = list(sections), f"section [{section}]"
        if field is not None and keys:
            known, kind = list(field.annotation.model_fields), f"key {keys[0]!r}"
        what = f"unknown {kind}{nearest(keys[0] if keys else section, known)}"
    elif fault["type"] == "missing":
        what = f"{keys[0]!r} is missing" if keys else "the section is missing"
    else:
        what = (f"{keys[0]}: " if keys else "") + fault["msg"]
    line = _line_of(text, section, keys[0] if keys else None)
    where = f"{filename}, line {line}" if line else filename
    return f"{where}, [{section}]: {what}" if section else f"{where}: {what}"


def _line_of(text: str, section: str, key: str | None) -> int | None:
    """Line of a key of a section (of the section itself where the key is not written)."""
    inside, found = False, None
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.strip()
        if words.startswith("["):
            inside = words.split("]")[0].strip("[ ") in (section, f"{section}.{key}")
            found = number if inside and found is None else found
        elif inside and key and words.split("=")[0].strip(' "') == key:
            return number
    return found


def toml_value(value: Any) -> str:
    """Write one value as TOML; JSON strings and numbers are TOML strings and numbers."""
    if isinstance(value, dict):  # compared in order: the order of the beads has a meaning
        return (
            "{ " + ", ".join(f"{json.dumps(k)} = {toml_value(v)}" for k, v in value.items()) + " }"
        )
    if isinstance(value, list):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    return json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)
