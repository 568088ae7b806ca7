"""Work that processes share; run by torchrun, the leader writes what it finds to a file."""

from __future__ import annotations

import copy
import sys
import time

import numpy as np
import torch
from exact_flows import CHAIN, ExactPotential, flow_of, frames_of, perturbed

from ccg_ase.forcefield import ForceField
from ccg_mda import Backmapper
from ccg_training.distributed import Ranks, join, leave, spread, together
from ccg_training.fit_flow import FlowFrames, FlowLoss, OwnSamples, _of_share, fit_flow
from ccg_training.fit_forcefield import FitSettings, _Data, _loss, fit_force_field
from ccg_training.flow_frames import Batches
from ccg_training.labels import Labels
from ccg_training.own_samples import OwnStates, own_sample_loss
from ccg_training.reconstruction import reconstruct

TERMS = FlowLoss(log_variance=0.5, weighted_kl=0.1, reverse_kl=0.1)


def beads(n: int) -> np.ndarray:
    rest = CHAIN.cg_map.apply(CHAIN.x0)
    return rest + 0.05 * np.random.default_rng(0).normal(size=(n, *rest.shape))


def results() -> dict[str, np.ndarray]:
    """Do some of everything that is shared, alone or together."""
    flow, states, found = flow_of(CHAIN), beads(40), {}
    potential = ExactPotential(flow)
    samples = reconstruct(flow, potential, states, 3, np.random.default_rng(1), batch_size=16)
    found |= {f"samples {k}": v for k, v in vars(samples).items() if isinstance(v, np.ndarray)}
    found["own calls"] = np.array(potential.n_calls)

    target = perturbed(flow, 0.05, 7)
    frames = frames_of(target, states, 8)
    own = OwnSamples(ExactPotential(target), n_states=3, n_samples=4)
    found["flow gradients"] = together(gradients, flow, frames, own)
    fit = fit_flow(
        copy.deepcopy(flow),
        frames,
        terms=TERMS,
        steps=1,
        batch_size=15,
        learning_rate=1e-3,
        seed=0,
        held_out=frames[:10],
        own=own,
    )
    found["flow calls"] = np.array(fit.energy_calls)
    found["flow losses"] = np.array([list(record.values()) for record in fit.history])

    rng, n = np.random.default_rng(5), len(states)
    force, energy = rng.normal(size=states.shape), rng.normal(size=n)
    labels = Labels(states, force, np.ones(n), energy, np.ones(n))
    torch.manual_seed(0)
    field = ForceField.from_data(
        CHAIN.cg_map, 300.0, states, n_members=2, channels=4, n_layers=1, terms=["bonds"]
    )
    found["force-field gradients"] = together(field_gradients, copy.deepcopy(field), labels)
    metrics = fit_force_field(field, labels, labels[:10], FitSettings(steps=1, batch_size=15))
    found["force-field losses"] = np.array([metrics[name] for name in ("loss", "force_rmse")])
    return found


def gradients(ranks: Ranks, flow: Backmapper, frames: FlowFrames, own: OwnSamples) -> np.ndarray:
    """Return the gradient of a batch's loss, in double precision."""
    rng = np.random.default_rng(3)
    batch = doubled(Batches(flow, frames, rng).draw(15))
    loss, _ = _of_share(ranks, flow, batch, TERMS, None)
    drawn = doubled(OwnStates(flow, frames, own, rng).draw())
    noise, part = flow.sample_noise(rng, (own.n_states, own.n_samples)), ranks.share(own.n_states)
    drawn = {name: value[part] for name, value in drawn.items()}
    loss = loss + own_sample_loss(flow, drawn, noise[part], own, TERMS, ranks)[0]
    return gradient_of(ranks, loss, flow)


def field_gradients(ranks: Ranks, field: ForceField, labels: Labels) -> np.ndarray:
    """Return the gradient of the loss of all labels."""
    data = _Data(labels, FitSettings(), field)
    index = torch.arange(len(labels))[ranks.share(len(labels))]
    loss = _loss(field, data, index, ranks) * (len(index) / len(labels))
    return gradient_of(ranks, loss, field)


def gradient_of(ranks: Ranks, loss: torch.Tensor, module: torch.nn.Module) -> np.ndarray:
    loss.backward()
    ranks.add_gradients(list(module.parameters()))
    parts = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
    module.zero_grad()
    return torch.cat(parts).numpy()


def doubled(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.double() for name, value in batch.items()}


def slowly(portion: int) -> int:
    time.sleep(0.05)
    return portion


def main(out: str) -> None:
    if not join(torch.device("cpu")):
        return
    np.savez(out, **results(), portions=spread(slowly, list(range(20))))
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
