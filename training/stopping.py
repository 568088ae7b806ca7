"""When a run stops: its targets, its budgets, and whether it still gains anything.

Every decision is a function of the configuration and of the records of finished stages alone, so a
run that was killed and continued stops at the same turn, for the same reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .config import Config
from .config_loop import Stop as Settings
from .stages import Metrics

Reason = Literal["targets met", "no further gain", "turns", "energy calls", "wall time"]
_LEAST_GAIN = 0.01  # nats per frame of the flow, and of the force field's loss as a fraction
_FEWEST_LABELS = 0.25  # of the samples of a turn: with fewer calls left another isn't begun


@dataclass(frozen=True)
class Stop:
    """Why a run stops, and the sentence that says so with the figures behind it."""

    reason: Reason
    sentence: str


def records_upto(records: list[Metrics], k: int) -> list[Metrics]:
    """Return the records from before anything was known of the end of turn k.

    A run that is continued takes every decision again, on what it knew then.
    """
    for number, record in enumerate(records):
        end = (record["stage"], record["iteration"]) == ("end of the loop", k)
        if end or record["iteration"] > k:
            return records[:number]
    return records


def calls_spent(records: list[Metrics]) -> int:
    """Return the energy calls of all stages."""
    return sum(record["calls"] for record in records)


def seconds_spent(records: list[Metrics], turn: int | None = None) -> float:
    """Return the wall time of all stages, or of those of one turn."""
    return sum(r["seconds"] for r in records if turn is None or r["iteration"] == turn)


def reserved_calls(config: Config) -> int:
    """Return the energy calls that the stages after the loop take."""
    settings = config.cycle
    held_out = (settings.n_held_out + settings.n_held_out // 3) * settings.n_held_out_samples
    ensemble = 0 if config.mapping.torsions else settings.n_report * settings.n_report_samples
    return ensemble + held_out


def reserved_seconds(config: Config, records: list[Metrics]) -> float:
    """Return the wall time that the stages after the loop take, as far as the last turn tells.

    That of the final bead dynamics, by the speed of those in the turn. The latter turn dihedrals,
    too, which the final ones don't: that leaves time for the checks.
    """
    last = [record["seconds"] for record in records if record["stage"] == "bead dynamics"][-1:]
    return sum(last) * config.dynamics.n_final_steps / config.dynamics.n_steps


def calls_left(config: Config, records: list[Metrics]) -> int | None:
    """Return the energy calls that the labels of the next turn may take; None: no limit."""
    limit = config.stop.max_calls
    if limit is None:
        return None
    return max(0, limit - calls_spent(records) - reserved_calls(config))


def stop(config: Config, records: list[Metrics], k: int) -> Stop | None:
    """Decide whether the run stops after turn k (0: before the first).

    Parameters
    ----------
    config
        The run.
    records
        Of all stages so far; later ones than turn k don't count.
    k
        Turns done.

    Returns
    -------
    Stop or None
        None: another turn.
    """
    cycle, settings, records = config.cycle, config.stop, records_upto(records, k)
    turns = [record for record in records if record["stage"] == "turn check"]
    found = _targets_met(settings, records) or _no_gain(settings, turns)
    if found is not None:
        return found
    if k >= cycle.iterations:
        return Stop("turns", f"all {cycle.iterations} turns were done, the targets weren't met")
    left = calls_left(config, records)
    if left is not None and left < _FEWEST_LABELS * cycle.n_states * cycle.n_samples:
        return Stop(
            "energy calls",
            f"{calls_spent(records)} of {settings.max_calls} energy calls were spent and "
            f"{reserved_calls(config)} are kept for the final check",
        )
    if settings.max_hours is not None:
        spent = seconds_spent(records)
        expected = max((seconds_spent(records, turn) for turn in range(1, k + 1)), default=0.0)
        final = reserved_seconds(config, records)
        if spent + expected + final > 3600 * settings.max_hours:
            return Stop(
                "wall time",
                f"{spent / 3600:.2f} h were spent of {settings.max_hours:.3g} h, another turn "
                f"would take some {expected / 60:.0f} min, the final check {final / 60:.0f} min",
            )
    return None


def _targets_met(settings: Settings, records: list[Metrics]) -> Stop | None:
    turns = [record for record in records if record["stage"] == "turn check"]
    if not turns:
        return None
    label = next(r for r in reversed(records) if r["stage"] == "labels at new states")
    accepted, ess = label["accepted"] / label["states"], label["ess_mean"]
    error = turns[-1]["new_F_error_kT"]
    met = (
        error is not None
        and accepted >= settings.target_accepted
        and ess >= settings.target_ess
        and error <= settings.target_error_kT
    )
    if not met:
        return None
    return Stop(
        "targets met",
        f"at new states {accepted:.0%} of the labels were accepted (target "
        f"{settings.target_accepted:.0%}), the effective sample size was {ess:.2f} (target "
        f"{settings.target_ess:g}) and F was known to {error:.2f} kT before they were labelled "
        f"(target {settings.target_error_kT:g})",
    )


def _no_gain(settings: Settings, turns: list[Metrics]) -> Stop | None:
    recent = turns[-settings.patience :]
    if len(recent) < settings.patience:
        return None
    gains = [max(turn["flow_gain_nats"], turn["force_field_gain"] or 0.0) for turn in recent]
    if max(gains) >= _LEAST_GAIN:
        return None
    return Stop(
        "no further gain",
        f"in {settings.patience} turns in a row neither the flow gained "
        f"{_LEAST_GAIN} nats on held-out frames nor the force field {_LEAST_GAIN:.0%} of its loss "
        "on held-out labels; the targets weren't met",
    )
