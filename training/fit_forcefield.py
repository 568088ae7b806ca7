"""Fit a force field to mean-force and free-energy labels, each weighted by its own error.

Per bead coordinate, and averaged over the L labelled states i (theory 5.4):

    3n L = Σ_c (f_φ - f_ic)² / (σ_f,i² + a²)  +  c (F_φ(s_i) - F_i - shift)² / (σ_F,i² + b²)

The floors a and b stand for what the network can't represent; without them a few very precise
labels would rule. The shift, fitted per batch, is there because F is known up to a constant only.
Both terms have an irreducible part, the label noise σ²/(σ² + floor²), which is reported beside
the loss: a model at the truth has that loss, not zero.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ccg_ase.forcefield import ForceField
from ccg_ase.units import thermal_energy

from .distributed import ALONE, Ranks, together
from .labels import Labels

_EVALUATION_BEADS = 8192


@dataclass(frozen=True)
class FitSettings:
    """How `fit_force_field` goes about it.

    Parameters
    ----------
    steps, batch_size, learning_rate, weight_decay
        AdamW steps, states per step, peak rate (warm-up over a twentieth, then cosine to zero).
    clip
        Largest norm of the gradient, relative to its running average.
    ema
        Decay of the running average of the weights; the average is what is evaluated and kept.
    force_floor, free_energy_floor_kT
        a in eV/Å and b in kT.
    free_energy_share
        c, the weight of the free-energy term; at 1 a free energy counts as one more coordinate.
    evaluate_every, patience
        Steps between evaluations on held-out labels, and how many of them without improvement end
        the fit.
    seed
        Of the order of the batches.
    """

    steps: int = 2000
    batch_size: int = 256
    learning_rate: float = 2e-3
    weight_decay: float = 1e-4
    clip: float = 3.0
    ema: float = 0.995
    force_floor: float = 0.01
    free_energy_floor_kT: float = 0.1
    free_energy_share: float = 1.0
    evaluate_every: int = 100
    patience: int = 10
    seed: int = 0


def fit_force_field(
    force_field: ForceField,
    labels: Labels,
    held_out: Labels,
    settings: FitSettings | None = None,
    *,
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
) -> dict[str, float]:
    """Fit the networks on top of the prior, in float32, and load the best weights.

    Members of a committee are fitted one after another, each from its own start and in its own
    order of batches.

    Parameters
    ----------
    force_field
        Receives the averaged weights of the best evaluation (the start counts as one); its dtype
        and buffers stay.
    labels, held_out
        Labels to learn from and to judge by (`Labels.split`). Constants of F are taken off in
        float64, before anything becomes float32.
    settings
        Default: `FitSettings()`.
    progress
        Called after every evaluation with steps done, steps in all, and the metrics so far.

    Returns
    -------
    dict
        On the held-out labels; root mean squares have the weights 1/(σ² + floor²).
        `loss`, and the `loss_noise` that no model can go below; `force_rmse` against the labels,
        `force_noise` of the labels, and `force_error`, the root of the difference of their
        squares, which can't tell errors below about `force_resolution` from none (eV/Å, per
        component; where the noise of labels is unknown it is NaN, and the error contains it);
        `free_energy_rmse_kT`, `free_energy_noise_kT` (NaN without such labels);
        `prior_explains` and `model_explains`, the shares of the mean force's mean square, noise
        taken off. Also `steps`, `best_step`, and `shift_eV`, to be added to the model's energy to
        give the labels' F (from the training labels; NaN without free energies).

    Raises
    ------
    ValueError
        If there are no labels, or they have another number of beads.
    FloatingPointError
        If the loss stops being finite.
    """
    return together(
        _fit_all,
        force_field,
        labels,
        held_out,
        settings or FitSettings(),
        leading={"progress": progress},
    )


def _fit_all(
    ranks: Ranks,
    force_field: ForceField,
    labels: Labels,
    held_out: Labels,
    settings: FitSettings,
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
) -> dict[str, float]:
    """Fit the members; each process takes its share of every batch."""
    for part in (labels, held_out):
        if len(part) == 0 or part.beads.shape[1] != force_field.cg_map.n_beads:
            raise ValueError(
                f"need labels of {force_field.cg_map.n_beads} beads, to fit and to hold out; got "
                f"{len(part)} of {part.beads.shape[1]}"
            )
    kT = thermal_energy(force_field.temperature_K)
    fitted = copy.deepcopy(force_field).float().requires_grad_(False)
    train, test = (_Data(part, settings, fitted) for part in (labels, held_out))
    members, total, fits = list(fitted.members), settings.steps * force_field.n_members, []
    for k, member in enumerate(members):
        # Alone: members that correct one another's errors would say nothing about them.
        fitted.members = nn.ModuleList([member])

        def show(step: int, metrics: dict[str, float], first: int = k * settings.steps) -> None:
            if progress is not None:
                progress(first + step, total, metrics)

        fits.append(_fit_member(ranks, fitted, train, test, settings, k, kT, show))
    fitted.members = nn.ModuleList(members)
    with torch.no_grad():
        for target, source in zip(force_field.parameters(), fitted.parameters(), strict=True):
            target.copy_(source)
    result = fits[0] if len(fits) == 1 else _evaluate(fitted, test, kT)
    steps = {key: sum(fit[key] for fit in fits) for key in ("steps", "best_step")}
    return result | steps | {"shift_eV": _evaluate(fitted, train, kT)["shift_eV"]}


class LabelLoss:
    """The loss of `fit_force_field` as a function of a model, for another fit to add.

    Every call draws the next batch of labels. Picklable: copies begin anew.

    Parameters
    ----------
    force_field
        Whose temperatures and units the labels have.
    labels, settings
        As for `fit_force_field`; batch size, floors, share and seed count.
    weight
        Factor of the loss.
    """

    def __init__(
        self, force_field: ForceField, labels: Labels, settings: FitSettings, weight: float = 1.0
    ) -> None:
        self._data, self._weight = _Data(labels, settings, force_field), weight
        self._order = (len(labels), settings.batch_size, settings.seed)
        self._batches = _batches(*self._order)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_batches": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _batches=_batches(*state["_order"]))

    def __call__(self, model: nn.Module) -> Tensor:
        """Return the loss of a batch, ()."""
        return self._weight * _loss(model, self._data, next(self._batches), ALONE)


def _fit_member(
    ranks: Ranks,
    averaged: ForceField,
    train: _Data,
    test: _Data,
    settings: FitSettings,
    k: int,
    kT: float,
    show: Callable[[int, dict[str, float]], None],
) -> dict[str, float]:
    """Fit a force field of one member, to end with the best averaged weights; its metrics."""
    model = copy.deepcopy(averaged).requires_grad_(True)
    trained, average = list(model.parameters()), list(averaged.parameters())
    optimizer = torch.optim.AdamW(
        trained, lr=settings.learning_rate, weight_decay=settings.weight_decay, betas=(0.9, 0.99)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: _rate(k, settings.steps))
    seed = settings.seed if k == 0 else [settings.seed, k]
    batches = _batches(len(train.beads), settings.batch_size, seed)

    best = ranks.agreed(_evaluate(averaged, test, kT)) | {"best_step": 0}
    best_weights = [p.clone() for p in average]
    step, waited, typical_norm = 0, 0, None
    while step < settings.steps and waited < settings.patience:
        batch = next(batches).to(train.beads.device)
        index = batch[ranks.share(len(batch))]
        loss = _loss(model, train, index, ranks) * (len(index) / len(batch))
        optimizer.zero_grad()
        loss.backward()
        ranks.add_gradients(trained)
        loss = ranks.sum(loss)
        limit = math.inf if typical_norm is None else settings.clip * typical_norm
        norm = float(nn.utils.clip_grad_norm_(trained, limit))
        if not math.isfinite(norm + loss.item()):
            raise FloatingPointError(
                f"the force-field loss is {loss.item()} at step {step}: lower the learning rate, "
                "or look for labels that are far off"
            )
        clipped = min(norm, limit)
        typical_norm = clipped if typical_norm is None else 0.98 * typical_norm + 0.02 * clipped
        optimizer.step()
        schedule.step()
        step += 1
        # The short memory at the start forgets the untrained weights.
        decay = min(settings.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(average, [p.detach() for p in trained], 1 - decay)
        if step % settings.evaluate_every == 0 or step == settings.steps:
            metrics = ranks.agreed(_evaluate(averaged, test, kT)) | {"best_step": step}
            waited += 1
            if metrics["loss"] < best["loss"]:
                best, waited = metrics, 0
                best_weights = [p.clone() for p in average]
            show(step, metrics | {"train_loss": loss.item()})
    for target, source in zip(average, best_weights, strict=True):
        target.copy_(source)
    return best | {"steps": step}


def _rate(step: int, steps: int) -> float:
    """Linear warm-up over a twentieth of the steps, then half a cosine to zero."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def _batches(n: int, size: int, seed: int | list[int]) -> Iterator[Tensor]:
    """Yield batches of indices for ever; every epoch is shuffled and drops a short rest."""
    rng = np.random.default_rng(seed)
    size = min(size, n)
    while True:
        yield from torch.from_numpy(rng.permutation(n)[: n - n % size]).split(size)


class _Data:
    """Labels as float32 tensors with weights 1/(σ² + floor²), zero where F is unknown."""

    def __init__(self, labels: Labels, settings: FitSettings, force_field: ForceField) -> None:
        def tensor(array: np.ndarray) -> Tensor:
            array = np.ascontiguousarray(array, dtype=np.float32)
            return torch.from_numpy(array).to(force_field.device)

        known = np.isfinite(labels.free_energy)
        floor = (settings.free_energy_floor_kT * thermal_energy(force_field.temperature_K)) ** 2
        weight = np.where(known, 1 / (np.nan_to_num(labels.free_energy_variance) + floor), 0.0)
        free_energy = np.nan_to_num(labels.free_energy)
        self.free_energy_zero = float((weight * free_energy).sum() / max(weight.sum(), 1e-300))
        self.share = settings.free_energy_share
        self.beads = tensor(labels.beads - labels.beads.mean(1, keepdims=True))
        self.boxes = None if np.isnan(labels.boxes).any() else tensor(labels.boxes)
        temperature_K = np.nan_to_num(labels.temperature_K, nan=force_field.temperature_K)
        force_field.temperatures_K.check(temperature_K)
        self.temperature_K = torch.from_numpy(temperature_K).to(force_field.device)
        # F is known up to a constant at every temperature.
        group = np.unique(temperature_K, return_inverse=True)[1]
        self.group = torch.from_numpy(group).to(force_field.device)
        self.force, self.force_variance = tensor(labels.force), tensor(labels.force_variance)
        # Where the noise is unknown it is nearly everything: then all the mean square counts as it.
        mean_square = float((self.force**2).mean())
        variance = self.force_variance.nan_to_num(nan=mean_square)
        self.force_weight = 1 / (variance + settings.force_floor**2)
        self.free_energy = tensor(np.where(known, free_energy - self.free_energy_zero, 0.0))
        self.free_energy_variance = tensor(np.nan_to_num(labels.free_energy_variance))
        self.free_energy_weight = tensor(weight)

    def inputs(self, index: Tensor) -> dict[str, Tensor | None]:
        """Keyword arguments of a force field at some of the labels, beads apart."""
        box = None if self.boxes is None else self.boxes[index]
        return {"box": box, "temperature_K": self.temperature_K[index]}

    def excess(self, index: Tensor, energy: Tensor, ranks: Ranks = ALONE) -> Tensor:
        """Return energies minus labels, less the constants of F of all processes' labels."""
        weight, group = self.free_energy_weight[index], self.group[index]
        excess = energy - self.free_energy[index]
        sums = excess.new_zeros(2, int(self.group.max()) + 1)
        sums = sums.index_add(1, group, torch.stack([weight * excess, weight]))
        # The constants minimise the loss: what they change with the parameters has no slope in it.
        sums = ranks.sum(sums)
        return excess - (sums[0] / sums[1].clamp(min=1e-30))[group]


def _chi2(
    data: _Data, index: Tensor, energy: Tensor, force: Tensor, ranks: Ranks = ALONE
) -> Tensor:
    """Loss of predictions for some of the labels."""
    chi2 = data.force_weight[index] * ((force - data.force[index]) ** 2).sum((-1, -2))
    excess = data.excess(index, energy, ranks)
    chi2 = chi2 + data.share * data.free_energy_weight[index] * excess**2
    return chi2.mean() / force[0].numel()


def _loss(model: ForceField, data: _Data, index: Tensor, ranks: Ranks) -> Tensor:
    predicted = model.energy_and_forces(data.beads[index], **data.inputs(index), create_graph=True)
    return _chi2(data, index, *predicted, ranks)


def _predict(energy_of: Callable[[Tensor, Tensor], Tensor], data: _Data) -> tuple[Tensor, Tensor]:
    """Energies and forces at all labelled states, of a function of beads and label indices."""
    energies, forces = [], []
    n_labels, n_beads, _ = data.beads.shape
    every = torch.arange(n_labels, device=data.beads.device)
    for index in every.split(max(1, _EVALUATION_BEADS // n_beads)):
        beads = data.beads[index].requires_grad_()
        with torch.enable_grad():
            energy = energy_of(beads, index)
            (gradient,) = torch.autograd.grad(energy.sum(), beads)
        energies.append(energy.detach())
        forces.append(-gradient)
    return torch.cat(energies), torch.cat(forces)


def evaluate_force_field(
    force_field: ForceField, labels: Labels, settings: FitSettings | None = None
) -> dict[str, float]:
    """Return the metrics of `fit_force_field` of a model that isn't fitted to these labels."""
    model = copy.deepcopy(force_field).float().requires_grad_(False)
    data = _Data(labels, settings or FitSettings(), model)
    return _evaluate(model, data, thermal_energy(force_field.temperature_K))


def _evaluate(model: ForceField, data: _Data, kT: float) -> dict[str, float]:
    """Return the metrics of `fit_force_field` for one set of labels."""
    energy, force = _predict(lambda beads, index: model(beads, **data.inputs(index)), data)
    _, of_prior = _predict(
        lambda beads, index: model.prior(beads, box=data.inputs(index)["box"]), data
    )
    n_components = force[0].numel()
    w, v = data.force_weight / data.force_weight.sum(), data.force_weight * data.force_variance
    noise = (w * data.force_variance).sum()

    def excess(prediction: Tensor | float) -> Tensor:
        """Weighted mean square of label minus prediction, label noise taken off if known."""
        return (w * ((data.force - prediction) ** 2).mean((-1, -2))).sum() - noise.nan_to_num()

    mean_square, error = excess(0.0), excess(force)
    prior_error = excess(of_prior)
    u = data.free_energy_weight
    everything = torch.arange(len(force), device=force.device)
    shift = (u * (data.free_energy - energy)).sum() / u.sum()
    energy_square = (u * data.excess(everything, energy) ** 2).sum() / u.sum()
    energy_noise = (u * data.free_energy_variance).sum() / u.sum()
    loss_noise = v.mean() + data.share * (u * data.free_energy_variance).mean() / n_components
    values = {
        "loss": _chi2(data, everything, energy, force),
        "loss_noise": loss_noise,
        "force_rmse": (error + noise.nan_to_num()).sqrt(),
        "force_noise": noise.sqrt(),
        "force_error": error.clamp(min=0).sqrt(),
        "force_resolution": noise.sqrt() * (2 / force.numel()) ** 0.25,
        "free_energy_rmse_kT": energy_square.sqrt() / kT,
        "free_energy_noise_kT": energy_noise.sqrt() / kT,
        "prior_explains": 1 - prior_error / mean_square,
        "model_explains": 1 - error / mean_square,
    }
    # The zero of F may be huge (absolute energies): add it in double precision.
    return {key: float(value) for key, value in values.items()} | {
        "shift_eV": float(shift) + data.free_energy_zero
    }
