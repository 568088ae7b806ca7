"""`ccg free-energy`: from model files and a configuration to landscapes, figure and table."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ccg_ase.checkpoint import ModelFile, load_model
from ccg_ase.devices import available
from ccg_ase.evaluator import Evaluator
from ccg_ase.files import replaced
from ccg_ase.forcefield import ForceField
from ccg_ase.torsion_map import TorsionMap
from ccg_mda.flow import Backmapper
from ccg_mda.potential import Potential

from .config import Config
from .free_energy_direct import EvenlyInBin, Proposal
from .free_energy_ensemble import (
    FromEnsemble,
    WindowSettings,
    n_windows,
    run_windows,
    usual_windows,
)
from .free_energy_grid import Grid, Variable
from .free_energy_landscape import Landscape, landscape, marginal
from .free_energy_names import on_atoms, on_beads, torsion_grid, variables_of
from .free_energy_output import (
    agreement_line,
    arrays_of,
    basin_rows,
    figure_of,
    grid_arrays,
    warnings_of,
    way_rows,
    windows_warning,
)
from .free_energy_sampling import Sampling, sample_grid
from .progress import Progress
from .reference import write_npz
from .system import mapping_of, potential_of, universe_of

DIRECT, BEADS = "direct", "bead ensemble"
_FORMATS = ("png", "svg", "pdf")


@dataclass(frozen=True)
class Request:
    """What `ccg free-energy` is asked for.

    Attributes
    ----------
    model, config, out
        Model file, TOML file with [system] and [potential], NPZ file to write; the figure lies
        beside it, in the format `figure`.
    on
        Variables, see `variables_of`; empty: all torsions of a torsion model.
    bins
        Number of bins of every variable, joined by commas, or one for all.
    ranges
        ``NAME=LOW:HIGH`` in degrees or Å.
    second
        Another model file, of the other way, to check with.
    temperatures_K
        Temperatures to reweight to.
    basins
        Regions, see `Grid.basin`.
    centres
        F at the centre of each bin in place of F of the bin (torsion models).
    device
        Where to compute; None: as the configuration says.
    sampling, window_steps, windows
        Numbers of samples; steps per umbrella window; windows per variable (None: see
        `usual_windows`).
    """

    model: Path
    config: Path
    out: Path
    on: list[str] = field(default_factory=list)
    bins: str = "36"
    ranges: list[str] = field(default_factory=list)
    second: Path | None = None
    temperatures_K: list[float] = field(default_factory=list)
    basins: list[str] = field(default_factory=list)
    centres: bool = False
    sampling: Sampling = field(default_factory=Sampling)
    window_steps: int = 10_000
    windows: int | None = None
    figure: str = "png"
    device: str | None = None
    force: bool = False


def free_energy_file(
    request: Request, progress: Progress
) -> tuple[list[str], list[tuple[str, list[dict[str, Any]]]]]:
    """Do all of it; return lines and tables to print.

    Portions lie in NAME.parts beside the output until it is written: the same call continues an
    interrupted one to the same result.

    Raises
    ------
    ValueError
        If the input contradicts itself or names what isn't there.
    FileExistsError
        If an output exists and `force` isn't given.
    """
    if request.figure not in _FORMATS:
        raise ValueError(f"--figure must be one of {', '.join(_FORMATS)}, got {request.figure!r}")
    out, picture = request.out, request.out.with_suffix(f".{request.figure}")
    for path in (out, picture):
        if path.exists() and not request.force:
            raise FileExistsError(f"{path} exists; --force overwrites it")
    config = Config.load(request.config).on_device(request.device)
    device, paths = available(config.run.device), (request.model, request.second)
    models = [load_model(path, device=device) for path in paths if path is not None]
    potential = potential_of(config)
    for model in models:
        _check(model, config, potential)
    grid = _grid(request, models, config)
    titles = [DIRECT if isinstance(model.cg_map, TorsionMap) else BEADS for model in models]
    if len(set(titles)) < len(titles):
        raise ValueError("both models go the same way: give a torsion model and a bead model")
    for text in request.basins:
        grid.basin(text)
    if request.sampling.max_calls is not None and len(models) == 2:
        progress.message("--max-calls holds for each of the two models")
    parts = out.with_suffix(".parts")
    ways, arrays = {}, {}
    others: dict[str, Landscape] = {}
    lines: list[str] = []
    for title, model in zip(titles, models, strict=True):
        found, proposal = _way(request, config, model, potential, grid, parts, progress)
        if isinstance(proposal, FromEnsemble):
            lines += windows_warning(proposal)
            arrays[f"{title.replace(' ', '_')}_inconsistency"] = np.asarray(proposal.inconsistency)
        ways[title] = found[0]
        arrays |= arrays_of(title.replace(" ", "_"), found[0])
        for other in found[1:]:
            name = f"{title}, {other.temperature_K:g} K"
            others[name] = other
            arrays |= arrays_of(name.replace(" ", "_").replace(",", ""), other)
    tables = []
    max_kT = request.sampling.max_kT
    tables.append(("free energy", way_rows(ways | others, max_kT)))
    if request.basins:
        rows, basins = basin_rows(request.basins, ways)
        tables.append(("basins, against the first", rows))
        lines += warnings_of(request.basins, basins)
        for title, values in basins.items():
            for name, value in values._asdict().items():
                arrays[f"{title.replace(' ', '_')}_basin_{name}"] = value
        if others:
            tables.append(("basins at other temperatures", basin_rows(request.basins, others)[0]))
    if len(ways) == 2:
        lines.append(agreement_line(ways, max_kT))
    first = next(iter(ways.values()))
    settings = {name: str(value) for name, value in vars(request).items()}
    write_npz(out, arrays | grid_arrays(first) | {"settings": np.asarray(json.dumps(settings))})
    with replaced(picture) as file:
        figure_of(ways, max_kT).savefig(file, format=request.figure, dpi=150)
    shutil.rmtree(parts, ignore_errors=True)  # all of it is in the file now
    lines.append(f"wrote {out} and {picture}")
    return lines, tables


def _check(model: ModelFile, config: Config, potential: Potential) -> None:
    """Refuse a model that doesn't belong to the configuration."""
    temperature_K = config.system.temperature_K
    if abs(temperature_K - model.temperature_K) > 1e-6:
        raise ValueError(
            f"the model is for {model.temperature_K:g} K, the configuration for {temperature_K:g} "
            "K; set temperature_K of [system], and ask for others with --temperature"
        )
    if "backmapper" not in model.configs:
        raise ValueError("the model holds no backmapper, which gives the atoms: train one")
    if not isinstance(model.cg_map, TorsionMap) and "force_field" not in model.configs:
        raise ValueError("the bead model holds no force field to sample beads with: train one")
    if model.cg_map.n_atoms != potential.n_atoms:
        raise ValueError(
            f"the model has {model.cg_map.n_atoms} atoms, the topology of the configuration "
            f"{potential.n_atoms}: give the configuration of this molecule"
        )


def _grid(request: Request, models: list[ModelFile], config: Config) -> Grid:
    """Return the grid over the variables that are asked for, with the sites of the first model."""
    torsions: dict[str, tuple[int, ...]] = {}
    maps = [model.cg_map for model in models]
    if config.mapping.torsions:
        maps.append(mapping_of(config))
    for the_map in maps:
        if isinstance(the_map, TorsionMap):
            rows = map(tuple, the_map.torsions.tolist())
            torsions |= dict(zip(the_map.names, rows, strict=True))
    texts = request.on or list(torsions)
    if not texts:
        raise ValueError("say what F is wanted of: --on 'phi=torsion:C1-N2-CA2-C2', for instance")
    variables = variables_of(texts, models[0].cg_map, torsions)
    if len(models) > 1:  # what both know are atoms
        variables = [on_atoms(variable, models[0].cg_map) for variable in variables]
    bins = _bins(request.bins, len(variables))
    return Grid.regular(variables, bins, _ranges(request.ranges, variables))


def _bins(text: str, n_variables: int) -> list[int]:
    words = text.split(",")
    words = words * n_variables if len(words) == 1 else words
    if len(words) != n_variables or not all(word.strip().isdigit() for word in words):
        raise ValueError(
            f"--bins {text!r}: give one whole number, or one for each of {n_variables} variables"
        )
    return [int(word) for word in words]


def _ranges(texts: list[str], variables: list[Variable]) -> list[tuple[float, float] | None]:
    given: dict[str, tuple[float, float]] = {}
    for text in texts:
        name, _, limits = text.rpartition("=")
        try:
            low, high = map(float, limits.split(":"))
        except ValueError:
            raise ValueError(f"--range {text!r} can't be read: write NAME=LOW:HIGH") from None
        if name not in [variable.name for variable in variables]:
            raise ValueError(f"--range {text!r} names none of the variables")
        given[name] = (low, high)
    found = []
    for variable in variables:
        limits = given.get(variable.name)
        if limits is not None:
            low, high = (value * variable.scale for value in limits)
            widest = variable.limits or (0.0, np.inf)
            if not (widest[0] - 1e-9 <= low < high <= widest[1] + 1e-9):
                raise ValueError(
                    f"the range of {variable.name} must ascend within "
                    f"{widest[0] / variable.scale:g} ... {widest[1] / variable.scale:g} "
                    f"{variable.unit}, got {limits[0]:g}:{limits[1]:g}"
                )
            limits = (low, high)
        found.append(limits)
    return found


def _way(
    request: Request,
    config: Config,
    model: ModelFile,
    potential: Potential,
    grid: Grid,
    parts: Path,
    progress: Progress,
) -> tuple[list[Landscape], Proposal]:
    """Return landscapes of one model, at its own temperature, then others, and where drawn from."""
    backmapper, sampling = Backmapper.from_model(model), request.sampling
    keep = None
    if isinstance(model.cg_map, TorsionMap):
        whole, keep = torsion_grid(grid, model.cg_map)
        proposal: Proposal = EvenlyInBin(whole, extent=0.0 if request.centres else 1.0)
        origin = _origin(request, model, "direct", request.centres)
    else:
        if request.centres:
            raise ValueError("a bead ensemble gives F of bins: leave out --centres")
        origin = _origin(
            request, model, "beads", request.window_steps, request.windows, sampling.seed
        )
        proposal = _bead_proposal(request, config, model, grid, parts / origin, progress)
    title = DIRECT if keep is not None else BEADS
    with progress.stage(f"{title}: atoms") as stage:
        sampled = sample_grid(
            backmapper, potential, proposal, parts, sampling, origin=origin, tick=stage.update
        )
        stage.update(note=f"{sampled.n_calls} energy calls")
    found = []
    for at_K in (None, *request.temperatures_K):
        of = landscape(sampled, proposal, model.temperature_K, sampling, at_K=at_K)
        found.append(of if keep is None else _kept(of, keep))
    return found, proposal


def _kept(of: Landscape, keep: list[int]) -> Landscape:
    return of if keep == list(range(len(of.grid.shape))) else marginal(of, keep)


def _bead_proposal(
    request: Request,
    config: Config,
    model: ModelFile,
    grid: Grid,
    folder: Path,
    progress: Progress,
) -> FromEnsemble:
    """Run umbrella windows of the bead force field."""
    cg_map = model.cg_map
    grid = Grid(tuple(on_beads(variable, cg_map) for variable in grid.variables), grid.edges)
    for variable in grid.variables:
        if not variable.of_beads:
            raise ValueError(
                f"{variable.name} is no function of the beads of this model, which umbrella "
                "windows hold: use a map whose beads are these atoms, or a torsion model"
            )
    per_variable = request.windows or usual_windows(len(grid.shape))
    seed = request.sampling.seed
    settings = WindowSettings(per_variable, n_steps=request.window_steps, seed=seed)
    start = cg_map.apply(universe_of(config).atoms.positions.astype(float))
    force_field = ForceField.from_model(model)
    with progress.stage("bead ensemble: umbrella windows") as stage:
        windows = n_windows(grid, settings)
        evaluator = Evaluator(force_field, windows, device=force_field.device)
        ensemble = run_windows(evaluator, start, grid, folder, settings, tick=stage.update)
        return FromEnsemble(grid, ensemble, settings, model.temperature_K)


def _origin(request: Request, model: ModelFile, *settings: object) -> str:
    """Return a short hash of all that the samples depend on, beside `Sampling`."""
    digest = hashlib.sha256(repr(settings).encode())
    for path in (request.model, request.second, request.config):
        if path is not None:
            digest.update(path.read_bytes())
    digest.update(repr((request.on, request.bins, request.ranges)).encode())
    digest.update(model.cg_map.fingerprint().encode())
    return digest.hexdigest()[:12]
