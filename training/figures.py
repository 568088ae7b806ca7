"""Figures of the report: plain arrays in, a matplotlib Figure out.

Figures are built through matplotlib's object interface: no pyplot, no global style is touched.
"""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ccg_ase.units import thermal_energy

from . import metrics
from .report_data import ReportData

REFERENCE, BEADS, ATOMS = "#444444", "#d1495b", "#00798c"
DEEPEST = 8.0  # kT shown in free-energy maps
MOST_PANELS = 8
CIRCLES = (-np.pi, np.pi, -np.pi, np.pi)  # of two torsions, as matplotlib's extent
PI_TICKS = np.array([-np.pi, -np.pi / 2, 0, np.pi / 2, np.pi])


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of the given size in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def tidy(axes: Axes) -> None:
    """Give axes the sizes and spines of this report."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.xaxis.label.set_size(9)
    axes.yaxis.label.set_size(9)
    axes.title.set_size(10)


def _degrees(axes: Axes, names: tuple[str, ...]) -> None:
    degrees = [f"{np.degrees(t):.0f}°" for t in PI_TICKS]
    axes.set_xticks(PI_TICKS, degrees)
    axes.set_xlabel(names[0])
    if len(names) == 2:
        axes.set_yticks(PI_TICKS, degrees)
        axes.set_ylabel(names[1])
        axes.set_aspect("equal")


def free_energy_maps(data: ReportData) -> Figure | None:
    """Free energy over the torsions: reference, beads, reweighted atoms, and the differences.

    Of those that there are; differences are to the first of them.
    """
    samples = []
    if data.torsions_reference.size:
        samples.append(("reference", data.torsions_reference, None, REFERENCE))
    if data.torsions_beads.size:
        samples.append(("bead dynamics", data.torsions_beads, None, BEADS))
    if data.torsions_atomistic.size and data.log_weights.size:
        samples.append(("reweighted atoms", data.torsions_atomistic, data.log_weights, ATOMS))
    if not samples:
        return None
    fewest = min(len(torsions) for _, torsions, _, _ in samples)
    bins = 64 if fewest >= 50_000 else 48 if fewest >= 15_000 else 32
    panels = [
        (title, metrics.torsion_histogram(torsions, log_weights, bins), colour)
        for title, torsions, log_weights, colour in samples
    ]
    draw = _maps if len(data.torsion_names) == 2 else _profiles
    return draw(panels, data.torsion_names)


def _maps(panels: list[tuple[str, np.ndarray, str]], names: tuple[str, ...]) -> Figure:
    figure = new_figure(3.1 * len(panels) + 0.7, 5.9)
    axes = figure.subplots(2, len(panels), squeeze=False)
    first, reference, _ = panels[0]
    for column, (title, histogram, _) in enumerate(panels):
        energy = metrics.free_energy(histogram).T
        image = axes[0, column].imshow(
            energy, origin="lower", extent=CIRCLES, vmin=0, vmax=DEEPEST, cmap="viridis"
        )
        axes[0, column].set_title(title)
        if column:
            gap = metrics.free_energy_difference(histogram, reference).T
            shift = axes[1, column].imshow(
                gap, origin="lower", extent=CIRCLES, vmin=-2, vmax=2, cmap="RdBu_r"
            )
            axes[1, column].set_title(f"{title} − {first}")
    figure.colorbar(image, ax=axes[0, :], label="F (kT)", extend="max", shrink=0.9, pad=0.02)
    axes[1, 0].set_axis_off()
    if len(panels) > 1:
        figure.colorbar(shift, ax=axes[1, :], label="ΔF (kT)", extend="both", shrink=0.9, pad=0.02)
        axes[1, 0].text(
            0.5,
            0.5,
            f"{len(reference)} x {len(reference)} bins\nwhite: not visited",
            ha="center",
            va="center",
            fontsize=9,
            color="#666666",
            transform=axes[1, 0].transAxes,
        )
    for panel in axes.flat:
        if panel.axison:
            tidy(panel)
            _degrees(panel, names)
    return figure


def _profiles(panels: list[tuple[str, np.ndarray, str]], names: tuple[str, ...]) -> Figure:
    figure = new_figure(6.5, 3.2)
    axes = figure.subplots()
    centres = metrics.torsion_centres(len(panels[0][1]))
    for title, histogram, colour in panels:
        axes.plot(centres, metrics.free_energy(histogram), color=colour, label=title, lw=1.8)
    axes.set_ylabel("F (kT)")
    axes.legend(frameon=False, fontsize=8)
    tidy(axes)
    _degrees(axes, names)
    return figure


def surface_maps(data: ReportData) -> Figure | None:
    """Free energy over one or two torsions between labels, and its standard error."""
    F, error, labels = data.surface, data.surface_error, data.surface_labels
    if not F.size:
        return None
    if F.ndim == 1:
        figure = new_figure(6.5, 3.2)
        axes = figure.subplots()
        centres = metrics.torsion_centres(len(F))
        axes.plot(centres, F, color=ATOMS, lw=1.8)
        axes.fill_between(centres, F - 2 * error, F + 2 * error, color=ATOMS, alpha=0.25, lw=0)
        axes.plot(labels[:, 0], np.zeros(len(labels)), ".", color=REFERENCE, ms=3, clip_on=False)
        axes.set_ylabel("F (kT), band: 2 standard errors")
        tidy(axes)
        _degrees(axes, data.torsion_names)
        return figure
    figure = new_figure(7.6, 3.4)
    for axes, values, most, colours, name in zip(
        figure.subplots(1, 2),
        (F, error),
        (1.5 * DEEPEST, 1.0),
        ("viridis", "magma"),
        ("F (kT)", "standard error (kT)"),
        strict=True,
    ):
        image = axes.imshow(
            values.T, origin="lower", extent=CIRCLES, vmin=0, vmax=most, cmap=colours
        )
        figure.colorbar(image, ax=axes, label=name, extend="max", shrink=0.9)
        axes.plot(*labels.T, ".", color="white", ms=1.5)
        tidy(axes)
        _degrees(axes, data.torsion_names)
    return figure


def _overlay(
    axes: Axes,
    samples: list[tuple[str, np.ndarray, np.ndarray | None, str]],
    bins: int = 60,
    limits: tuple[float, float] | None = None,
) -> None:
    """Draw densities over each other; (label, values, weights, colour), the first one filled."""
    if limits is None:
        pooled = np.concatenate([np.percentile(v, [0.05, 99.95]) for _, v, _, _ in samples])
        limits = pooled.min(), pooled.max()
    edges = np.linspace(*limits, bins + 1)
    for index, (label, values, weights, colour) in enumerate(samples):
        density, _ = np.histogram(values, edges, weights=weights, density=True)
        if index == 0:
            axes.stairs(density, edges, fill=True, color=colour, alpha=0.25, label=label)
        else:
            axes.stairs(density, edges, color=colour, lw=1.5, label=label)
    axes.set_yticks([])
    axes.set_ylim(bottom=0)


def internal_histograms(data: ReportData) -> Figure | None:
    """Bonds, angles and torsions of the beads: model over reference."""
    panels: list[tuple[str, str, np.ndarray, np.ndarray]] = []
    degree = 180 / np.pi
    groups = (
        ("bond", "Å", 1.0, data.bond_names, data.bonds_reference, data.bonds_beads),
        ("angle", "degrees", degree, data.angle_names, data.angles_reference, data.angles_beads),
        (
            "torsion",
            "degrees",
            degree,
            data.torsion_names,
            data.torsions_reference,
            data.torsions_beads,
        ),
    )
    for kind, unit, scale, names, reference, beads in groups:
        if reference.size and beads.size:
            panels += [
                (f"{kind} {name}", unit, scale * reference[:, k], scale * beads[:, k])
                for k, name in enumerate(names[:MOST_PANELS])
            ]
    if not panels:
        return None
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(2.6 * columns, 1.9 * rows + 0.3)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, (title, unit, reference, beads) in zip(axes, panels, strict=False):
        limits = (-180.0, 180.0) if title.startswith("torsion") else None
        _overlay(
            panel,
            [("reference", reference, None, REFERENCE), ("bead dynamics", beads, None, BEADS)],
            limits=limits,
        )
        if limits:
            panel.set_xticks([-180, -90, 0, 90, 180])
        panel.set_title(title)
        panel.set_xlabel(unit)
        tidy(panel)
        panel.title.set_size(9)
    for panel in axes[len(panels) :]:
        panel.set_axis_off()
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside upper right",
        frameon=False,
        fontsize=9,
        ncols=2,
    )
    return figure


def energy_histogram(data: ReportData) -> Figure | None:
    """Potential energy of reference frames and of reconstructions, before and after reweighting."""
    if not data.energy_reference.size or not data.energy_atomistic.size:
        return None
    kT = thermal_energy(data.temperature_K)
    zero = data.energy_reference.mean()
    finite = np.isfinite(data.energy_atomistic)
    energy = (data.energy_atomistic[finite] - zero) / kT
    reference = (data.energy_reference - zero) / kT
    samples = [("reference", reference, None, REFERENCE)]
    samples.append(("reconstructed", energy, None, BEADS))
    if data.log_weights.size:
        weights = np.exp(data.log_weights[finite] - data.log_weights[finite].max())
        samples.append(("reconstructed, reweighted", energy, weights, ATOMS))
    figure = new_figure(6.5, 3.0)
    axes = figure.subplots()
    low = min(np.percentile(reference, 0.02), np.percentile(energy, 0.5))
    high = max(np.percentile(reference, 99.98), np.percentile(energy, 98))
    _overlay(axes, samples, limits=(low, high))
    axes.set_xlabel("U − ⟨U⟩ of the reference (kT)")
    axes.set_ylabel("density")
    axes.legend(frameon=False, fontsize=8)
    tidy(axes)
    return figure


def residual_histogram(data: ReportData) -> Figure | None:
    """Joint residual of flow and force field, in kT: zero everywhere if both are exact."""
    if not data.residual_forward.size or not data.residual_reverse.size:
        return None
    samples = [
        ("held-out frames", data.residual_forward, None, REFERENCE),
        ("reconstructions of the bead ensemble", data.residual_reverse, None, ATOMS),
    ]
    samples = [(name, v[np.isfinite(v)], *rest) for name, v, *rest in samples]
    pooled = np.concatenate([values for _, values, _, _ in samples])
    reach = max(1.0, np.percentile(np.abs(pooled), 99.5))
    figure = new_figure(6.5, 2.8)
    axes = figure.subplots()
    _overlay(axes, samples, limits=(-reach, reach))
    axes.axvline(0, color="black", lw=0.8)
    axes.set_xlabel("ln q − βF + βU − c (kT)")
    axes.set_ylabel("density")
    axes.legend(frameon=False, fontsize=8)
    tidy(axes)
    return figure


def effective_sizes(data: ReportData) -> Figure | None:
    """Effective sample size per state: histogram, and over the iterations."""
    if not data.ess.size:
        return None
    rare = data.ess_rare.astype(bool) if data.ess_rare.size else np.zeros(len(data.ess), bool)
    turns = data.ess_iteration if data.ess_iteration.size else np.ones(len(data.ess))
    groups = [("common states", ~rare, ATOMS), ("rare states", rare, BEADS)]
    groups = [group for group in groups if group[1].any()]
    figure = new_figure(8.6, 3.0)
    left, right = figure.subplots(1, 2, width_ratios=(1.3, 1))
    edges = np.linspace(0, 1, 41)
    last = turns == turns.max()
    for index, (label, chosen, colour) in enumerate(groups):
        values = data.ess[last & chosen]
        if len(values):
            share = np.histogram(values, edges)[0] / len(values)
            left.stairs(
                share, edges, color=colour, fill=index == 0, alpha=0.35 if index == 0 else 1
            )
            left.axvline(values.mean(), color=colour, lw=1.2, ls="--")
        numbers = np.unique(turns[chosen])
        spread = np.array(
            [np.percentile(data.ess[chosen & (turns == k)], [5, 50, 95]) for k in numbers]
        ).T
        means = [data.ess[chosen & (turns == k)].mean() for k in numbers]
        bars = np.abs(spread[[0, 2]] - spread[1])
        offset = 0.06 * (2 * index - len(groups) + 1)
        right.errorbar(
            numbers + offset, spread[1], bars, fmt="o", color=colour, capsize=3, label=label
        )
        right.plot(numbers + offset, means, color=colour, lw=1, ls="--")
    which = data.ess_labels[-1] if data.ess_labels else "last iteration"
    left.set_xlabel(f"effective sample size per state ({which})")
    left.set_ylabel("share of states")
    left.set_xlim(0, 1)
    right.set_xlabel("iteration")
    right.set_ylabel("median, 5 to 95 %")
    right.set_ylim(0, 1)
    right.set_xticks(np.unique(turns), data.ess_labels or None)
    right.set_xlim(turns.min() - 0.5, turns.max() + 0.5)
    right.legend(frameon=False, fontsize=8, loc="best")
    tidy(left)
    tidy(right)
    return figure
