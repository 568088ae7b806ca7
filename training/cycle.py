"""The cycle: reference → flow and force field → bead dynamics → atoms → weights → labels → refit.

Every stage reads what earlier ones left in the run directory and leaves its own files there::

    reference.npz                     atomistic frames
    iteration_0/                      flow by likelihood, labels on frames, first force field
    iteration_k/dynamics/beads.dcd    bead ensemble of the previous force field, through ASE
    iteration_k/samples.npz           its reconstructions, through MDAnalysis, with energies
    iteration_k/labels.npz            ln Z(s) and mean forces at new s
    iteration_k/model.ccg             flow and force field after the refit
    final_k/                          the same once more with the last models: what is reported
    model.ccg, report_data.npz, report.html, metrics.jsonl, state.json

Resuming skips the stages whose record is in ``state.json`` and repeats the one that was cut off.
"""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch

from ccg_ase.checkpoint import load_model, save_model
from ccg_ase.forcefield import ForceField
from ccg_ase.prior import Prior
from ccg_ase.units import thermal_energy
from ccg_mda.flow import Backmapper
from ccg_mda.transformation import backmap
from ccg_mda.universe import bead_universe
from ccg_mda.weights import effective_sample_size

from . import evaluation
from .config import Config
from .data_check import check, check_mapping, refuse_faults
from .estimators import (
    free_energy,
    label_variance,
    mean_force,
    normalised_weights,
    to_kJ_per_mol,
)
from .fit_flow import (
    LIKELIHOOD_ONLY,
    FlowFrames,
    FlowLoss,
    ProgressCallback,
    fit_flow,
    mean_nll,
)
from .fit_forcefield import FitSettings, fit_force_field
from .labels import Labels, accept
from .progress import Progress, Stage
from .reconstruction import Samples, pull_back_frames, read_samples
from .reference import MDANALYSIS_FORCE, ReferenceData, reference_data, trajectory_of
from .report import write_report
from .sampling import ase_bead_dynamics
from .stages import Metrics, Stages
from .states import choose_states
from .system import mapping_of, potential_of


def run_cycle(config: Config, progress: Progress) -> None:
    """Run, or continue, the cycle that a configuration describes.

    Parameters
    ----------
    config
        The run; its directory exists.
    progress
        Where the stages are shown.

    Raises
    ------
    ReferenceDataError
        If the check of the mapping or of the data finds an error.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(config.run.threads)
    try:
        Cycle(config, progress).run()
    finally:
        torch.set_num_threads(threads)


class Cycle:
    """One run directory, its inputs and its stages."""

    def __init__(self, config: Config, progress: Progress) -> None:
        self.config, self.progress = config, progress
        self.directory = config.run.directory
        self.temperature_K = config.system.temperature_K
        self.cg_map, self.potential = mapping_of(config), potential_of(config)
        refuse_faults(check_mapping(self.cg_map))
        self.stages = Stages(self.directory, progress)

    def run(self) -> None:
        """Go through all stages."""
        self._stage("reference data", self._reference)
        self._stage("data check", self._check)
        self._stage("flow: likelihood", self._likelihood)
        self._stage("labels on frames", partial(self._frame_labels, k=0))
        self._stage("force field", partial(self._force_field, k=0))
        self._stage("flow: forces", partial(self._refit_flow, k=0))
        last = self.config.cycle.iterations
        for k in range(1, last + 1):
            start, folder = self._folder(k - 1) / "model.ccg", self._folder(k)
            sample = partial(self._sample, k=k, folder=folder, model=start)
            self._stage("bead dynamics", sample, k)
            self._stage("reconstruction", partial(self._reconstruct, k=k), k)
            self._stage("flow", partial(self._refit_flow, k=k), k)
            self._stage("labels on frames", partial(self._frame_labels, k=k), k)
            self._stage("force field", partial(self._force_field, k=k), k)
        final = {
            "folder": self.directory / f"final_{last}",
            "model": self._folder(last) / "model.ccg",
        }
        self._stage("final bead dynamics", partial(self._sample, k=last, **final), last)
        self._stage("final reconstruction", partial(self._ensemble, **final), last)
        self._stage("held-out check", partial(self._held_out, **final), last)
        self._stage("report", partial(self._report, **final), last)

    def _stage(self, name: str, work: Callable[[Stage], Metrics], iteration: int = 0) -> Metrics:
        return self.stages.run(name, work, iteration=iteration)

    def _folder(self, iteration: int) -> Path:
        folder = self.directory / f"iteration_{iteration}"
        folder.mkdir(exist_ok=True)
        return folder

    def _seed(self, *what: int) -> int:
        words = np.random.SeedSequence([self.config.run.seed, *what]).generate_state(1)
        return int(words[0] % 2**31)

    # ------------------------------------------------------------------ reference data

    def _reference(self, stage: Stage) -> Metrics:
        settings = self.config.reference
        if settings.source == "generate":
            data = reference_data(self.config, self.directory, stage.update)
            stored_fs = settings.time_ns * 1e6 + settings.walkers * settings.equilibration_ps * 1e3
            return {"frames": len(data), "calls": round(stored_fs / settings.timestep_fs)}
        data, calls = trajectory_of(self.config), 0
        refuse_faults(check(data, self.cg_map, self.temperature_K, self.potential))
        if data.forces is None or data.energy is None:
            stage.update(note="forces and energies from the potential")
            energy, forces = self.potential(data.positions)
            calls = len(data)
            data = replace(data, energy=energy, forces=forces)
        data.save(self.directory / "reference.npz")
        return {"frames": len(data), "calls": calls}

    def _check(self, stage: Stage) -> Metrics:
        del stage
        data = ReferenceData.load(self.directory / "reference.npz")
        findings = check(data, self.cg_map, self.temperature_K, self.potential)
        for finding in findings:
            if finding.level == "warning":
                self.progress.message(f"[yellow]warning[/] {finding.title}: {finding.detail}")
        refuse_faults(findings)
        return {"findings": {f.title: f"{f.level}: {f.detail}" for f in findings}}

    @cached_property
    def data(self) -> tuple[ReferenceData, ReferenceData]:
        """Training and held-out frames."""
        stored = ReferenceData.load(self.directory / "reference.npz")
        return stored.split(self.config.reference.holdout_fraction)

    # ------------------------------------------------------------------ the flow

    def _likelihood(self, stage: Stage) -> Metrics:
        train, held_out = self.data
        settings = self.config.flow
        positions = torch.from_numpy(train.positions)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed(0, 1))
            flow = Backmapper.from_data(
                self.cg_map,
                self.temperature_K,
                positions,
                width=settings.width,
                hops=settings.hops,
            )
        batch = 2 * settings.batch_size
        frames = FlowFrames(train.positions, np.ones(len(train)))
        fit_flow(
            flow,
            frames,
            terms=LIKELIHOOD_ONLY,
            steps=max(1, settings.likelihood_epochs * len(train) // batch),
            batch_size=batch,
            learning_rate=settings.learning_rate,
            seed=self._seed(0, 2),
            clip=5.0,
            progress=_show_terms(stage),
        )
        self._save(self._folder(0) / "flow.ccg", {"backmapper": flow})
        return {"nll": mean_nll(flow, held_out.positions)}

    def _refit_flow(self, stage: Stage, k: int) -> Metrics:
        """Fit the flow to forces: on frames, and after the first iteration on its own samples."""
        train, held_out = self.data
        settings, folder = self.config.flow, self._folder(k)
        if k == 0:
            flow = Backmapper.load(folder / "flow.ccg")
            force_field = ForceField.from_model(load_model(folder / "force_field.ccg"))
        else:
            before = load_model(self._folder(k - 1) / "model.ccg")
            flow, force_field = Backmapper.from_model(before), ForceField.from_model(before)
        energy, force = evaluation.bead_energies(force_field, self.cg_map.apply(train.positions))
        every = np.ones(len(train))
        frames = FlowFrames(train.positions, every, train.forces, train.energy, force, energy)
        if k:
            frames = frames.joined(_as_frames(Samples.load(folder / "samples.npz"), force_field))
        history = fit_flow(
            flow,
            frames,
            terms=FlowLoss(),
            steps=settings.refit_steps if k else settings.force_steps,
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate / (2 if k else 1),
            seed=self._seed(k, 3),
            progress=_show_terms(stage),
        )
        if k:
            self._save(folder / "flow.ccg", {"backmapper": flow})
        else:
            self._save(folder / "model.ccg", {"backmapper": flow, "force_field": force_field})
        return {"nll": mean_nll(flow, held_out.positions), "loss": history[-1]}

    # ------------------------------------------------------------------ the force field

    def _frame_labels(self, stage: Stage, k: int) -> Metrics:
        """Label stored frames (E3b): no weights and no energy calls."""
        train, _ = self.data
        chosen = np.unique(
            np.linspace(0, len(train) - 1, self.config.cycle.n_frame_labels).astype(int)
        )
        flow = Backmapper.load(self._folder(k) / "flow.ccg")
        force_variance, log_weight_variance = self._scatter(k)
        kt = thermal_energy(self.temperature_K)
        parts = []
        for piece in np.array_split(chosen, max(1, len(chosen) // 2000)):
            frames = pull_back_frames(
                flow, train.positions[piece], train.energy[piece], train.forces[piece]
            )
            every = np.ones(len(piece))
            # At q = p the log-weight of a single frame is ln Z(s): a free energy, with its scatter.
            free_energy = -kt * frames.log_weight[:, 0]
            parts.append(
                Labels(
                    frames.beads,
                    frames.labels[:, 0],
                    force_variance * every,
                    free_energy,
                    kt**2 * log_weight_variance * every,
                )
            )
            stage.update(sum(map(len, parts)), len(chosen))
        labels = Labels.concatenate(*parts)
        labels.save(self._folder(k) / "frame_labels.npz")
        return {"labels": len(labels)}

    def _scatter(self, k: int) -> tuple[float, float]:
        """Variance at fixed s of a single label, (eV/Å)², and of a log-weight."""
        if k == 0:
            # Not measured yet; typical after likelihood alone (flow_recipe.md, run L5).
            return 60.0 * MDANALYSIS_FORCE**2, 0.5
        samples = Samples.load(self._folder(k) / "samples.npz")
        force = np.median(label_variance(samples.log_weight, samples.labels))
        spread = np.median(samples.log_weight.var(axis=1))
        return float(force), float(spread)

    def _force_field(self, stage: Stage, k: int) -> Metrics:
        """Fit the force field to all labels so far, by inverse variance."""
        train, _ = self.data
        settings, folder = self.config.force_field, self._folder(k)
        if k == 0:
            beads = self.cg_map.apply(train.positions)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self._seed(0, 4))
                force_field = ForceField(
                    self.cg_map,
                    self.temperature_K,
                    Prior.fit(beads, self.cg_map.beads, self.temperature_K),
                    channels=settings.channels,
                    l_max=settings.l_max,
                    n_layers=settings.n_layers,
                    cutoff_A=settings.cutoff_A,
                    reference_beads=beads[0],
                )
        else:
            force_field = ForceField.from_model(load_model(self._folder(k - 1) / "model.ccg"))
        labels = Labels.load(folder / "frame_labels.npz")
        for i in range(1, k + 1):
            labels = Labels.concatenate(labels, Labels.load(self._folder(i) / "labels.npz"))
        result = fit_force_field(
            force_field,
            *labels.split(seed=self._seed(k, 5)),
            FitSettings(
                steps=settings.steps if k == 0 else settings.refit_steps,
                batch_size=settings.batch_size,
                learning_rate=settings.learning_rate / (2 if k else 1),
                seed=self._seed(k, 6),
            ),
            progress=lambda step, steps, values: stage.update(
                step, steps, f"force error {values['force_error']:.4f} eV/Å"
            ),
        )
        if k:
            parts = {"backmapper": Backmapper.load(folder / "flow.ccg"), "force_field": force_field}
            self._save(folder / "model.ccg", parts)
        else:
            self._save(folder / "force_field.ccg", {"force_field": force_field})
        return {"labels": len(labels)} | result

    # ------------------------------------------------------------------ sampling and atoms

    def _sample(self, stage: Stage, k: int, folder: Path, model: Path) -> Metrics:
        """Run bead dynamics from reference frames drawn at random, through an ASE driver."""
        train, _ = self.data
        settings = self.config.dynamics
        final = folder.name.startswith("final")
        rng = np.random.default_rng(self._seed(k, 7, final))
        starts = rng.choice(len(train), settings.replicas, replace=len(train) < settings.replicas)
        frames = ase_bead_dynamics(
            ForceField.from_model(load_model(model)),
            self.cg_map.apply(train.positions[starts]),
            folder / "dynamics",
            n_steps=settings.n_final_steps if final else settings.n_steps,
            save_every=settings.save_every,
            driver=settings.driver,
            timestep_fs=settings.timestep_fs,
            friction_per_ps=settings.friction_per_ps,
            seed=int(rng.integers(2**31)),
            progress=lambda done, total, values: stage.update(
                done, total, f"{values['temperature_K']:.0f} K"
            ),
        )
        longest = evaluation.longest_bond(frames, self.cg_map)
        return {"frames": frames.shape[0] * frames.shape[1], "longest_bond_A": longest}

    def _atoms_of(
        self, stage: Stage, folder: Path, flow: Backmapper, chosen: np.ndarray, n: int, seed: int
    ) -> Samples:
        """Reconstruct bead frames through the MDAnalysis Universe, and label them."""
        with warnings.catch_warnings():
            # Which copies of a Timestep the reader makes is no matter here.
            warnings.filterwarnings("ignore", "DCDReader currently makes", DeprecationWarning)
            beads = bead_universe(folder / "dynamics" / "beads.dcd", self.cg_map)
            atoms = backmap(
                beads, flow, n_samples=n, seed=seed, potential=self.potential, prefetch=64
            )
            return read_samples(atoms, flow, chosen, n, progress=lambda i, m: stage.update(i, m))

    def _reconstruct(self, stage: Stage, k: int) -> Metrics:
        """Choose states worth labelling among those visited, and label them (E2, E3a, E4)."""
        settings, folder = self.config.cycle, self._folder(k)
        flow = Backmapper.load(self._folder(k - 1) / "model.ccg")
        visited = evaluation.dcd_frames(folder / "dynamics" / "beads.dcd")
        chosen = choose_states(
            visited,
            min(settings.n_states, len(visited)),
            self.cg_map.beads,
            diverse=settings.diverse,
            seed=self._seed(k, 8),
        )
        samples = self._atoms_of(stage, folder, flow, chosen, settings.n_samples, self._seed(k, 9))
        good = accept(
            samples.log_weight, min_ess=settings.min_ess, max_pareto_k=settings.max_pareto_k
        )
        Labels.from_samples(samples, good).save(folder / "labels.npz")
        samples.save(folder / "samples.npz")
        ess = effective_sample_size(samples.log_weight, axis=1)
        variance = label_variance(samples.log_weight, samples.labels)
        return {
            "calls": samples.n_calls,
            "states": len(chosen),
            "accepted": int(good.sum()),
            "ess_mean": float(ess.mean()),
            "ess_p5": float(np.percentile(ess, 5)),
            "label_variance_kJ2": float(to_kJ_per_mol(np.median(variance))),
        }

    # ------------------------------------------------------------------ the last models

    def _ensemble(self, stage: Stage, folder: Path, model: Path) -> Metrics:
        """Reconstruct the final bead ensemble, evenly thinned, with two-level weights (E6)."""
        loaded = load_model(model)
        flow, force_field = Backmapper.from_model(loaded), ForceField.from_model(loaded)
        settings = self.config.cycle
        visited = evaluation.dcd_frames(folder / "dynamics" / "beads.dcd")
        chosen = np.linspace(0, len(visited) - 1, min(settings.n_report, len(visited))).astype(int)
        samples = self._atoms_of(
            stage, folder, flow, chosen, settings.n_report_samples, self._seed(0, 10)
        )
        samples.save(folder / "samples.npz")
        levels = evaluation.two_levels(samples, force_field)
        return {
            "calls": samples.n_calls,
            "states": len(chosen),
            "ess_states": levels.ess_states,
            "ess_samples": levels.ess_samples,
            "ess_two_level": levels.ess,
        }

    def _held_out(self, stage: Stage, folder: Path, model: Path) -> Metrics:
        """Measure effective sample size and label variance at held-out states."""
        train, held_out = self.data
        flow = Backmapper.load(model)
        result, figures = evaluation.held_out_check(
            flow,
            self.potential,
            train,
            held_out,
            n_states=self.config.cycle.n_held_out,
            n_samples=200,
            seed=self._seed(0, 11),
            progress=lambda i, m: stage.update(i, m),
        )
        np.savez(folder / "held_out.npz", **result)
        return figures

    def _report(self, stage: Stage, folder: Path, model: Path) -> Metrics:
        """Write the final model with its figures, and the report."""
        del stage
        evaluation.report_data(self, folder, model).save(self.directory / "report_data.npz")
        loaded = load_model(model)
        figures = {
            f"{r['stage']}: {name}": r[name]
            for r in self.stages.records
            if r["iteration"] == self.config.cycle.iterations
            for name in r
            if name.startswith(("ess", "label_variance", "variance_ratio", "nll"))
        }
        parts = {
            "backmapper": Backmapper.from_model(loaded),
            "force_field": ForceField.from_model(loaded),
        }
        self._save(self.directory / "model.ccg", parts, figures)
        write_report(self.directory)
        return {}

    def _save(self, path: Path, parts: dict, metrics: Metrics | None = None) -> None:
        provenance = {
            "ccg": importlib.metadata.version("ccg"),
            "name": self.config.system.name,
            "topology": self.config.system.topology.name,
            "forcefield": [Path(name).name for name in self.config.potential.forcefield],
            "seed": self.config.run.seed,
        }
        save_model(
            path,
            cg_map=self.cg_map,
            temperature_K=self.temperature_K,
            parts=parts,
            provenance=provenance,
            metrics=metrics,
        )


def _as_frames(samples: Samples, force_field: ForceField) -> FlowFrames:
    """Turn samples of the flow into frames whose weights sum to K at every state.

    The bead force and free energy at a state are what its samples say, not the force field: these
    states were chosen where it may be wrong. Free energies get the force field's zero.
    """
    n_states, n_samples = samples.energy.shape
    force = mean_force(samples.log_weight, samples.labels).value
    energy = free_energy(samples.log_weight, samples.temperature_K).value
    modelled, _ = evaluation.bead_energies(force_field, samples.beads)
    energy = energy + np.median(modelled - energy)
    state = np.repeat(np.arange(n_states), n_samples).reshape(n_states, n_samples)
    weight = normalised_weights(samples.log_weight) * n_samples
    use = np.isfinite(samples.energy) & (weight > 1e-3)
    return FlowFrames(
        samples.positions[use],
        weight[use],
        samples.forces[use],
        samples.energy[use],
        force[state[use]],
        energy[state[use]],
    )


def _show_terms(stage: Stage) -> ProgressCallback:
    def show(step: int, steps: int, values: dict[str, float]) -> None:
        stage.update(step, steps, " ".join(f"{k} {v:.3g}" for k, v in values.items()))

    return show
