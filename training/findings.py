"""What a check found: one result each, in words."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from .reference import ReferenceDataError

Level = Literal["ok", "warning", "error"]
MAX_NAMED = 8


@dataclass(frozen=True)
class Finding:
    """One result of a check: what was seen, why that matters, what to do."""

    level: Level
    title: str
    detail: str
    cure: str = ""


def faulty(findings: Iterable[Finding]) -> bool:
    """Tell whether any finding is an error."""
    return any(finding.level == "error" for finding in findings)


def refuse_faults(findings: Iterable[Finding]) -> None:
    """Raise a ReferenceDataError with all errors among the findings, if there are any."""
    errors = [f"{f.title}: {f.detail}; {f.cure}" for f in findings if f.level == "error"]
    if errors:
        raise ReferenceDataError("\n".join(errors))


def listed(names: list[str]) -> str:
    """Return the first few names, and dots for the others."""
    return ", ".join(names[:MAX_NAMED]) + " ..." * (len(names) > MAX_NAMED)
