"""The TOML file of a run: sections, keys, units and defaults, validated once and read-only after.

Every section is its own model class; a key is one line in it, and its description becomes the
comment that ``ccg init`` writes. Units are part of the key's name. Paths are relative to the TOML
file. A key that does not exist is an error that names the nearest one that does.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import PydanticCustomError

from .config_text import explain, nearest, toml_value
from .thresholds import Gates


class ConfigError(ValueError):
    """The TOML file is missing, is not TOML, or has a wrong key or value."""


def _fault(text: str) -> PydanticCustomError:
    # "{" would start a pydantic format field, so the text travels as a value.
    return PydanticCustomError("ccg", "{text}", {"text": text})


def _resolved(path: Path, info: ValidationInfo) -> Path:
    root = (info.context or {}).get("root", Path.cwd())
    return (root / path.expanduser()).resolve()


def _existing(path: Path, info: ValidationInfo) -> Path:
    path = _resolved(path, info)
    if not path.is_file():
        raise _fault(f"no such file: {path} (paths are relative to the TOML file)")
    return path


def _forcefield(name: str, info: ValidationInfo) -> str:
    """Resolve a force-field file; a name that OpenMM ships stays a name."""
    path = _resolved(Path(name), info)
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
    raise _fault(
        f"{name!r} is neither a file beside the TOML file nor a force field that OpenMM ships"
        + nearest(name, known)
    )


ExistingFile = Annotated[Path, Field(strict=False), AfterValidator(_existing)]
AnyPath = Annotated[Path, Field(strict=False), AfterValidator(_resolved)]
ForceFieldFile = Annotated[str, AfterValidator(_forcefield)]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values are checked and then frozen."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, validate_default=False, allow_inf_nan=False
    )


class System(Section):
    """The molecule and its temperature."""

    topology: ExistingFile = Field(description="PDB file with all atoms, hydrogens included")
    temperature_K: PositiveFloat = Field(300.0, description="the model holds at this temperature")
    name: str = Field("", description="names the run; default: the topology's file name")


class Potential(Section):
    """The atomistic energy that the model is trained to reproduce."""

    forcefield: list[ForceFieldFile] = Field(
        ["amber96.xml", "amber96_obc.xml"],
        min_length=1,
        description="OpenMM force-field XML names or files; no box, no constraints",
    )
    evaluate: Literal["auto", "openmm", "torch"] = Field(
        "auto", description="auto (torch on a GPU if it can, else openmm) | openmm | torch"
    )


class Mapping(Section):
    """The coarse variables: beads by a preset or a table of selections, or torsions."""

    preset: Literal["ca", "backbone", "heavy", "residue-com", "molecule-com"] | None = Field(
        None, description="ca | backbone | heavy | residue-com | molecule-com"
    )
    weighting: Literal["mass", "geometry"] = Field(
        "mass", description="mass | geometry: centre that a bead of several atoms is at"
    )
    per: Literal["residue", "molecule"] | None = Field(
        None, description="residue | molecule: 'beads' are those of every residue (molecule)"
    )
    beads: dict[str, str] | None = Field(
        None, description="bead name -> MDAnalysis selection, in the order of the beads"
    )
    torsions: dict[str, Annotated[list[str], Field(min_length=4, max_length=4)]] | None = Field(
        None, description="torsion name -> four selections of one atom each, bonded in a row"
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> Mapping:
        if sum(map(bool, (self.preset, self.beads, self.torsions))) != 1:
            raise _fault(
                "give exactly one of 'preset', 'beads' (bead name -> selection) and 'torsions' "
                "(torsion name -> four selections)"
            )
        if self.per and not self.beads:
            raise _fault("'per' goes with 'beads'; take it out")
        return self


class Reference(Section):
    """Atomistic frames to learn from: generated by OpenMM, or read from files."""

    source: Literal["generate", "trajectory", "structure"] = Field(
        "generate",
        description="generate (OpenMM dynamics) | trajectory (files) | structure (no data: hot "
        "dynamics, then short ones restrained at coarse states)",
    )
    time_ns: PositiveFloat = Field(8.0, description="generate: stored time, all walkers together")
    timestep_fs: PositiveFloat = Field(1.0, description="bonds are flexible, keep <= 1")
    friction_per_ps: PositiveFloat = Field(1.0, description="Langevin friction")
    save_every_fs: PositiveFloat = Field(100.0, description="time between frames")
    walkers: PositiveInt = Field(2, description="independent runs, one process each")
    equilibration_ps: NonNegativeFloat = Field(50.0, description="generate: discarded start")
    files: list[ExistingFile] = Field([], description="trajectory: TRR, H5MD, NPZ, XTC, DCD ...")
    forces_file: ExistingFile | None = Field(
        None, description="trajectory: NPZ with forces in eV/A for files that hold none"
    )
    stride: PositiveInt = Field(1, description="trajectory: use every stride-th frame")
    hot_temperature_K: PositiveFloat = Field(
        600.0, description="structure: dynamics that look for coarse states"
    )
    hot_time_ps: PositiveFloat = Field(200.0, description="structure: all hot walkers together")
    n_states: int = Field(
        300, ge=20, description="structure: coarse states where frames are made, at least 20"
    )
    restrained_ps: PositiveFloat = Field(2.0, description="structure: stored time at each state")
    relaxation_ps: NonNegativeFloat = Field(
        1.0, description="structure: discarded start at each state"
    )
    biased: bool = Field(
        False,
        description="trajectory: made with a bias along the coarse variables (umbrella, "
        "metadynamics); populations are not used. Always true of structure",
    )
    holdout_fraction: float = Field(
        0.1, gt=0, lt=0.5, description="share kept out of training, in contiguous blocks"
    )

    @model_validator(mode="after")
    def _files_for_source(self) -> Reference:
        if self.source == "trajectory" and not self.files:
            raise _fault('source = "trajectory" needs files = ["..."]')
        if self.source != "trajectory" and (self.files or self.forces_file):
            raise _fault('files and forces_file need source = "trajectory"')
        return self

    @model_validator(mode="after")
    def _populations(self) -> Reference:
        """Fill in what `biased` is for frames that we make."""
        if self.source == "generate" and self.biased:
            raise _fault('biased = true needs source = "trajectory": generated frames have no bias')
        if self.source == "structure":
            if self.hot_time_ps * 1e3 < self.n_states * self.save_every_fs:
                raise _fault(
                    f"hot_time_ps = {self.hot_time_ps:g} gives fewer frames than n_states = "
                    f"{self.n_states} at save_every_fs = {self.save_every_fs:g}: raise hot_time_ps"
                )
            object.__setattr__(self, "biased", True)
        return self


class Flow(Section):
    """The backmapper: a normalising flow from coarse variables to atoms."""

    width: PositiveInt = Field(64, description="hidden width of the conditioner")
    n_layers: PositiveInt = Field(3, description="its depth")
    hops: PositiveInt = Field(3, description="bonds over which an atom sees earlier atoms")
    bead_hops: PositiveInt = Field(10, description="bonds over which an atom sees beads")
    channels: PositiveInt = Field(4, description="features per irrep of the bead encoder")
    around_A: NonNegativeFloat | None = Field(
        None, description="how far torsions see earlier atoms, in Å; 6 if a molecule has > 60 atoms"
    )
    families: bool | None = Field(
        None, description="same weights in all residues; true unless around_A is 0"
    )
    defensive: float = Field(
        0.0, ge=0, lt=1, description="weight of a component with noise 1.5 times as wide"
    )
    likelihood_epochs: NonNegativeInt = Field(
        8, description="first fit, by likelihood: passes over the data"
    )
    coordinate_steps: NonNegativeInt = Field(
        1000, description="second fit, to forces along internal coordinates: cheap steps"
    )
    force_steps: NonNegativeInt = Field(500, description="third fit, by the loss below: its steps")
    loss: Literal["forces+energy", "forces", "noise_force", "label", "energy", "likelihood"] = (
        Field(
            "forces+energy",
            description="forces+energy | forces | noise_force | label | energy | likelihood",
        )
    )
    refit_steps: PositiveInt = Field(200, description="steps by that loss in every turn")
    patience: PositiveInt = Field(
        5, description="twentieths of a fit without gain on held-out frames that end it"
    )
    batch_size: PositiveInt = Field(256, description="frames per step")
    learning_rate: PositiveFloat = Field(2e-3, description="peak of the schedule")


class ForceField(Section):
    """The bead force field: prior plus equivariant networks."""

    prior: list[Literal["bonds", "angles", "dihedrals", "volumes"]] = Field(
        ["bonds", "angles", "volumes"], description="terms that the networks correct"
    )
    dihedral_order: PositiveInt = Field(3, description="highest multiplicity of prior dihedrals")
    members: PositiveInt = Field(1, description="networks of the committee; their mean is used")
    channels: PositiveInt = Field(8, description="features per irrep")
    l_max: NonNegativeInt = Field(1, description="largest angular momentum of the features")
    n_layers: PositiveInt = Field(2, description="message-passing layers")
    cutoff_A: PositiveFloat = Field(12.0, description="beads further apart do not interact")
    steps: PositiveInt = Field(800, description="optimiser steps of the first fit")
    refit_steps: PositiveInt = Field(400, description="steps in every turn of the loop")
    relative_entropy_rounds: NonNegativeInt = Field(
        0, description="final fit to the ensemble of the frames: rounds of bead dynamics"
    )
    batch_size: PositiveInt = Field(256, description="bead states per step")
    learning_rate: PositiveFloat = Field(2e-3, description="peak of the schedule")


class Dynamics(Section):
    """Bead dynamics that sample the ensemble of the force field."""

    driver: Literal["replica-exchange", "LangevinBAOAB", "Langevin"] = Field(
        "replica-exchange",
        description="replica-exchange | LangevinBAOAB | Langevin (the latter two: ASE's)",
    )
    hot_temperature_K: PositiveFloat = Field(
        600.0, description="replica-exchange: top of the ladder; barriers of F cost nothing here"
    )
    rungs: int = Field(4, ge=2, description="replica-exchange: temperatures of the ladder")
    exchange_every: PositiveInt = Field(
        50, description="replica-exchange: steps between attempts to exchange"
    )
    timestep_fs: PositiveFloat = Field(4.0, description="bead time step")
    friction_per_ps: PositiveFloat = Field(1.0, description="Langevin friction")
    replicas: PositiveInt = Field(24, description="independent copies, advanced as one batch")
    n_steps: PositiveInt = Field(8000, description="steps per replica in every turn of the loop")
    n_final_steps: PositiveInt = Field(16000, description="steps of the ensemble of the report")
    save_every: PositiveInt = Field(50, description="steps between stored bead states")

    @model_validator(mode="after")
    def _whole_saves(self) -> Dynamics:
        for name in ("n_steps", "n_final_steps"):
            if getattr(self, name) % self.save_every:
                raise _fault(f"{name} must be a multiple of save_every = {self.save_every}")
        if self.driver == "replica-exchange" and self.replicas % self.rungs:
            raise _fault(f"replicas must be a multiple of rungs = {self.rungs}")
        return self


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
    max_calls_per_turn: NonNegativeInt | None = Field(
        None, description="energy calls that labelling may spend in a turn"
    )
    highest_kT: PositiveFloat = Field(
        12.0, description="torsions: states that lie higher above the lowest aren't looked for"
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
    joint_steps: NonNegativeInt = Field(
        0, description="final fit of flow and force field together: steps; 0 leaves it out"
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
            raise _fault(
                f"uncertain + diverse = {self.uncertain + self.diverse:g} is more than 1: they are "
                "shares of the labelled states"
            )
        return self


class Stop(Section):
    """When the loop ends before its last turn: budgets, and targets at states not yet labelled."""

    max_calls: PositiveInt | None = Field(
        None, description="energy calls in all, reference data and final check included"
    )
    max_hours: PositiveFloat | None = Field(
        None, description="wall time: a turn that may not fit into it isn't begun"
    )
    target_accepted: float = Field(
        0.9, gt=0, le=1, description="share of new states with labels from plain weights"
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
            raise _fault(
                "relative_entropy_rounds fits the populations of the reference data, which are "
                "biased along the coarse variables: set relative_entropy_rounds = 0"
            )
        return self

    @model_validator(mode="after")
    def _fill_names(self, info: ValidationInfo) -> Config:
        # The two defaults that depend on other keys; frozen models are completed by copy.
        name = self.system.name or self.system.topology.stem
        directory = self.run.directory or _resolved(Path("runs") / name, info)
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
