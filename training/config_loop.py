"""Sections on the loop: labels of each turn, when it stops, where and how it is run."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from .config_values import AnyPath, Section, fault
from .thresholds import Gates


class Cycle(Section):
    """The loop: sample beads, reconstruct atoms, label, refit."""

    iterations: PositiveInt = Field(2, description="turns of the loop")
    n_states: PositiveInt = Field(500, description="bead states labelled per turn")
    n_samples: PositiveInt = Field(64, description="reconstructions per labelled state")
    n_frame_labels: PositiveInt = Field(20000, description="stored frames labelled per turn")
    uncertain: float = Field(
        0.25,
        ge=0,
        le=1,
        description="share of states where the committee disagrees; one member: diverse ones",
    )
    diverse: float = Field(
        0.25, ge=0, le=1, description="share of states far from all others; the rest by population"
    )
    unknown: float = Field(
        0.05,
        ge=0,
        le=1,
        description="share, taken off first, of states too far from all known ones to know their F",
    )
    max_calls_per_turn: NonNegativeInt | None = Field(
        None, description="energy calls that labelling may spend in a turn"
    )
    highest_kT: PositiveFloat = Field(
        12.0, description="states that lie higher above the others aren't looked for"
    )
    restrained_ps: NonNegativeFloat = Field(
        1.0, description="dynamics at states where the flow can't be trusted: their length; 0: none"
    )
    restrained_every_fs: PositiveInt = Field(20, description="time between their frames")
    steering_ps: PositiveFloat = Field(
        0.3, description="time to lead them to the state, and to relax there"
    )
    n_checked: NonNegativeInt = Field(
        100, description="held-out frames that tell whether the flow has dropped a mode"
    )
    min_effective: PositiveFloat = Field(
        Gates.min_effective, description="gate: effective samples that a label needs"
    )
    max_pareto_k: float = Field(
        Gates.max_pareto_k, gt=0, description="gate: largest tail shape of weights"
    )
    log_z_error: PositiveFloat = Field(
        Gates.log_z_error, description="wanted error of ln Z(s), nats"
    )
    force_error: PositiveFloat = Field(
        Gates.force_error, description="wanted error of a mean-force component, eV/A"
    )
    max_samples: PositiveInt = Field(
        Gates.max_samples, description="most plain samples per state; beyond, annealing is cheaper"
    )
    max_stages: NonNegativeInt = Field(
        Gates.max_stages, description="longest annealing path; 0: none"
    )

    joint_steps: NonNegativeInt = Field(
        0, description="final fit of flow and force field together: steps; 0 leaves it out"
    )
    n_report: PositiveInt = Field(2000, description="bead states of the final ensemble")
    n_report_samples: PositiveInt = Field(8, description="reconstructions of each of them")
    n_held_out: PositiveInt = Field(100, description="held-out states of the final check")
    n_held_out_samples: PositiveInt = Field(200, description="reconstructions of each of them")

    @property
    def gates(self) -> Gates:
        """The thresholds of the gates, by the keys of the same names."""
        names = {field.name for field in dataclasses.fields(Gates)}
        return Gates(**{name: value for name, value in self if name in names})

    @model_validator(mode="after")
    def _shares(self) -> Cycle:
        if self.uncertain + self.diverse > 1:
            raise fault(
                f"uncertain + diverse = {self.uncertain + self.diverse:g} is more than 1: they are "
                "shares of the labelled states"
            )
        return self

    @model_validator(mode="after")
    def _enough_frames(self) -> Cycle:
        if 0 < 1e3 * self.restrained_ps < 10 * self.restrained_every_fs:
            raise fault(
                f"restrained_ps = {self.restrained_ps:g} gives fewer than ten frames at "
                f"restrained_every_fs = {self.restrained_every_fs}, too few for an error bar"
            )
        return self


class Stop(Section):
    """When the loop ends before its last turn: budgets, and targets at states not yet labelled."""

    max_calls: PositiveInt | None = Field(
        None, description="energy calls in all, reference data and final check included"
    )
    max_hours: PositiveFloat | None = Field(
        None, description="wall time: no turn that may not fit, no fit of the flow above a tenth"
    )
    target_accepted: float = Field(
        0.95, gt=0, le=1, description="share of new states with labels from plain weights"
    )
    target_ess: float = Field(0.5, gt=0, le=1, description="mean effective sample size at them")
    target_error_kT: PositiveFloat = Field(
        0.2, description="error of F there before they are labelled"
    )
    patience: PositiveInt = Field(2, description="turns without gain that end the loop")


class Run(Section):
    """Where and how the run is executed; nothing here changes what is learned but the seed."""

    directory: AnyPath | None = Field(None, description="default: runs/<name> beside this file")
    seed: NonNegativeInt = Field(0, description="same seed, same machine: same result")
    threads: PositiveInt = Field(
        1, description="CPU threads for training; 2 stall on a busy machine"
    )
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = Field(
        "cpu", description="cpu | cuda | cuda:1 ... | auto: a GPU if there is one"
    )
    workers: PositiveInt | None = Field(
        None, description="processes for OpenMM's energies; default: one for each core"
    )
