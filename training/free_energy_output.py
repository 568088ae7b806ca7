"""What `ccg free-energy` shows: arrays for an NPZ file, figures, rows of tables."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .figures import ATOMS, BEADS, new_figure, tidy
from .free_energy_ensemble import FromEnsemble
from .free_energy_landscape import Basins, Landscape, agreement, basin_differences

_COLOURS = (ATOMS, BEADS)
_MISSING = 0.02
_INCONSISTENT = 2.0
_PER_POINT = (
    "free_energy",
    "error",
    "energy",
    "energy_error",
    "entropy",
    "entropy_error",
    "effective",
    "n_samples",
    "trusted",
    "above",
    "rough",
)


def arrays_of(prefix: str, of: Landscape) -> dict[str, np.ndarray]:
    """Return the arrays of a landscape, each in the shape of the grid."""
    arrays = {f"{prefix}_{name}": getattr(of, name).reshape(of.grid.shape) for name in _PER_POINT}
    replicas = of.log_p_replicas.reshape(-1, *of.grid.shape)
    return {
        **arrays,
        f"{prefix}_log_p_replicas": replicas,
        f"{prefix}_temperature_K": np.asarray(of.temperature_K),
        f"{prefix}_n_calls": np.asarray(of.n_calls),
    }


def grid_arrays(of: Landscape) -> dict[str, np.ndarray]:
    """Return names, kinds and edges (degrees or Å) of the variables."""
    grid = of.grid
    arrays = {
        "variables": np.array([variable.name for variable in grid.variables]),
        "kinds": np.array([variable.kind for variable in grid.variables]),
    }
    for k, (variable, edges) in enumerate(zip(grid.variables, grid.edges, strict=True)):
        arrays[f"edges_{k}"] = edges / variable.scale
    return arrays


def figure_of(ways: dict[str, Landscape], max_kT: float) -> Figure:
    """Draw F and its error, of one or two ways, over one or two variables."""
    if len(next(iter(ways.values())).grid.shape) == 1:
        return _curves(ways, max_kT)
    return _maps(ways, max_kT)


def _label(axes: Axes, of: Landscape) -> None:
    names = [f"{v.name} ({v.unit})" for v in of.grid.variables]
    axes.set_xlabel(names[0])
    if len(names) == 2:
        axes.set_ylabel(names[1])
    tidy(axes)
    for k, variable in enumerate(of.grid.variables):
        if variable.periodic and np.isclose(np.ptp(of.grid.edges[k]), 2 * np.pi):
            (axes.set_xticks, axes.set_yticks)[k]([-180, -90, 0, 90, 180])


def _curves(ways: dict[str, Landscape], max_kT: float) -> Figure:
    figure = new_figure(6.0, 3.6)
    axes = figure.subplots()
    for colour, (title, of) in zip(_COLOURS, ways.items(), strict=False):
        x = of.grid.centres[:, 0] / of.grid.variables[0].scale
        low = of.trusted & (np.nan_to_num(of.free_energy, nan=np.inf) <= max_kT * of.kT)
        F, error = (np.where(low, a / of.kT, np.nan) for a in (of.free_energy, of.error))
        axes.plot(x, F, color=colour, lw=1.6, label=title)
        axes.fill_between(x, F - 2 * error, F + 2 * error, color=colour, alpha=0.25, lw=0)
        doubtful = x[of.doubtful]
        axes.plot(doubtful, np.zeros(len(doubtful)), "x", color=colour, ms=5, clip_on=False)
    axes.set_ylabel("F (kT), band: 2 standard errors")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    _label(axes, of)
    return figure


def _maps(ways: dict[str, Landscape], max_kT: float) -> Figure:
    figure = new_figure(8.2, 3.6 * len(ways) + 0.3)
    panels = figure.subplots(len(ways), 2, squeeze=False)
    for row, (title, of) in zip(panels, ways.items(), strict=True):
        edges = [e / v.scale for e, v in zip(of.grid.edges, of.grid.variables, strict=True)]
        centres = [(e[1:] + e[:-1]) / 2 for e in edges]
        F, error = (a.reshape(of.grid.shape).T / of.kT for a in (of.free_energy, of.error))
        low = np.nan_to_num(F, nan=np.inf) <= max_kT
        F, error = np.where(low, F, np.nan), np.where(low, error, np.nan)
        image = row[0].pcolormesh(*edges, F, vmin=0, vmax=max_kT, cmap="viridis")
        if min(F.shape) > 1:
            levels = np.arange(1, max_kT)
            row[0].contour(*centres, F, levels=levels, colors="white", linewidths=0.5)
        figure.colorbar(image, ax=row[0], label="F (kT)", shrink=0.9)
        image = row[1].pcolormesh(*edges, error, vmin=0, cmap="magma")
        figure.colorbar(image, ax=row[1], label="standard error (kT)", shrink=0.9)
        doubtful = of.grid.centres[of.doubtful] / [v.scale for v in of.grid.variables]
        for axes in row:
            axes.plot(*doubtful.T, "x", color="#c00000", ms=3, mew=0.8)
            _label(axes, of)
        row[0].set_title(title)
        row[1].set_title(f"{of.n_calls} energy calls; x: {of.doubtful.sum()} bins not trusted")
    return figure


def way_rows(ways: dict[str, Landscape], max_kT: float) -> list[dict[str, Any]]:
    """Return a table row per way: how many bins are trusted, and how well they are known."""
    rows = []
    for title, of in ways.items():
        low = of.trusted & (np.nan_to_num(of.free_energy, nan=np.inf) <= max_kT * of.kT)
        share = of.effective[low] / of.n_samples[low]
        rows.append(
            {
                "way": title,
                "T (K)": f"{of.temperature_K:g}",
                "bins": of.grid.n_points,
                "known": int(low.sum()),
                f"above {max_kT:g} kT": int((of.above & ~low).sum()),
                "not trusted": int(of.doubtful.sum()),
                "median error (kT)": float(np.median(of.error[low]) / of.kT),
                "effective sample size": float(np.median(share)),
                "energy calls": of.n_calls,
            }
        )
    return rows


def basin_rows(
    texts: list[str], ways: dict[str, Landscape]
) -> tuple[list[dict[str, Any]], dict[str, Basins]]:
    """Return a table row per basin, with ΔF to the first in each way, and the basins.

    With two ways of one temperature the last column is their difference in standard errors.
    """
    masks = [next(iter(ways.values())).grid.basin(text) for text in texts]
    found = {title: basin_differences(of, masks) for title, of in ways.items()}
    rows = []
    for k, text in enumerate(texts):
        row: dict[str, Any] = {"basin": text}
        for title, basins in found.items():
            kT = ways[title].kT
            row[f"ΔF {title} (kT)"] = (
                f"{basins.difference[k] / kT:.3f} ± {basins.error[k] / kT:.3f}" if k else "0"
            )
            if basins.doubtful.any():
                row[f"not trusted, {title}"] = (
                    f"{basins.doubtful[k]} bins, about {basins.missing[k]:.0%} of it"
                )
        plain = list(found.values())
        if len(plain) == 2 and len({of.temperature_K for of in ways.values()}) == 1:
            gap = abs(plain[0].difference[k] - plain[1].difference[k])
            both = float(np.hypot(plain[0].error[k], plain[1].error[k]))
            row["apart (errors)"] = f"{gap / both:.1f}" if k and both > 0 else "-"
        rows.append(row)
    return rows, found


def warnings_of(texts: list[str], found: dict[str, Basins]) -> list[str]:
    """Say which basins lack a part that their error bars know nothing of."""
    return [
        f"{title}: F of basin {text!r} lacks bins that can't be trusted, about "
        f"{basins.missing[k]:.0%} of it: an upper bound; more samples, or a model trained there"
        for title, basins in found.items()
        for k, text in enumerate(texts)
        if basins.missing[k] > _MISSING
    ]


def windows_warning(proposal: FromEnsemble) -> list[str]:
    """Say where umbrella windows contradict one another by more than their frames let expect."""
    if proposal.inconsistency <= _INCONSISTENT:
        return []
    worst = np.unravel_index(np.abs(proposal.disagreement).argmax(), proposal.disagreement.shape)
    place = ", ".join(
        f"{variable.name} = {centre / variable.scale:.4g} {variable.unit}"
        for variable, centre in zip(
            proposal.grid.variables, proposal.centres[worst[0]], strict=True
        )
    )
    return [
        f"bead ensemble: umbrella windows contradict one another, {proposal.inconsistency:.1f} "
        f"times their own variance; most at {place}, by "
        f"{abs(proposal.disagreement[worst]):.1f} kT from there to the next one. They slide off "
        "steep slopes, or don't cross a barrier beside the variables; error bars count what shows. "
        "Cure: more --windows, more --steps, or compare with a torsion model (--check)"
    ]


def agreement_line(ways: dict[str, Landscape], max_kT: float) -> str:
    """Say in a sentence how two ways agree."""
    one, other = ways.values()
    found = agreement(one, other, max_kT)
    return (
        f"both ways over {found.n_bins} common bins: rms difference {found.rms_kT:.3f} kT, "
        f"{found.expected_rms_kT:.3f} expected from the error bars; largest "
        f"{found.largest_kT:.2f} kT"
    )
