import pickle

import numpy as np
import pytest
import torch
from bead_systems import SKEWED, SMALL, map_of, system

from ccg_ase import Evaluator

MIXTURE = ((4, 3), (1, 5))
SYSTEMS = {
    "all pairs": (MIXTURE, None),
    "radius graph": (((4, 15), (1, 6)), None),
    "box": (MIXTURE, SKEWED),
    "small box": (((4, 1), (1, 1)), SMALL),
}


@pytest.fixture(scope="module", params=SYSTEMS)
def case(request):
    """A force field of three members over a range of temperatures, three frames and their box."""
    molecules, cell = SYSTEMS[request.param]
    force_field, frames = system(
        *molecules, cell=cell, n_members=3, temperatures_K=(280, 350), n_layers=1
    )
    return force_field, frames[:3], None if cell is None else torch.from_numpy(cell)


def eager(force_field, replicas=3, dtype=torch.float64, **options):
    return Evaluator(force_field, replicas, dtype=dtype, compiled=False, **options)


def close(a, b, atol=1e-9):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=atol)


def test_is_what_the_force_field_says(case):
    force_field, frames, box = case
    T = torch.tensor([285.0, 300.0, 340.0], dtype=torch.float64)
    evaluate = eager(force_field, temperature_K=T)
    found = evaluate(frames, box)
    energy, forces = force_field.energy_and_forces(frames, box=box, temperature_K=T)
    sites = force_field.site_energies(frames, box=box, temperature_K=T)
    close(found.energies, sites.detach())
    close(found.energies.sum(1), energy)
    close(found.forces, forces, atol=1e-8)
    assert {x.dtype for x in found if x is not None} == {torch.float64}
    assert not any(x.requires_grad for x in found if x is not None)
    assert torch.equal(evaluate.temperature_K, T)
    assert evaluate.cg_map == force_field.cg_map
    default = eager(force_field)(frames, box)
    close(default.energies.sum(1), force_field(frames, box=box).detach())


def test_stress_is_the_derivative_by_strain(case):
    """Each frame in its own box, through the force field's energy alone."""
    force_field, frames, box = case
    if box is None:
        assert eager(force_field)(frames).stress is None
        return
    boxes = torch.stack([box, 1.03 * box, 1.06 * box])
    strain = torch.zeros(3, 3, 3, dtype=torch.float64, requires_grad=True)
    deform = torch.eye(3).double() + 0.5 * (strain + strain.mT)
    energy = force_field(frames @ deform, box=boxes @ deform).sum()
    (virial,) = torch.autograd.grad(energy, strain)
    expected = virial / torch.linalg.det(boxes)[:, None, None]
    close(eager(force_field)(frames, boxes).stress, expected, atol=1e-11)
    alone = eager(force_field, 1)(frames[1:2], boxes[1]).stress
    close(alone, expected[1:2], atol=1e-11)


def test_float32_is_close(case):
    force_field, frames, box = case
    exact = eager(force_field)(frames, box)
    single = eager(force_field, dtype=torch.float32)
    assert single.force_field.dtype == torch.float32
    assert force_field.dtype == torch.float64
    found = single(frames, box)
    assert found.energies.dtype == torch.float64
    torch.testing.assert_close(found.energies, exact.energies, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.forces, exact.forces, rtol=1e-4, atol=1e-4)


def test_no_digits_are_lost_far_from_the_origin(case):
    """In float32, coordinates of 10⁴ Å have a resolution of 10⁻³ Å."""
    force_field, frames, box = case
    single = eager(force_field, dtype=torch.float32)
    if box is None:
        # A shift that float64 adds exactly, so that frames are the same ones.
        frames = (frames * 2**30).round() / 2**30
        shift = torch.tensor([2.0**14, -(2.0**13), 2.0**14])
    else:
        shift = torch.tensor([1000.0, -2000.0, 900.0]).double() @ box
    near, far = single(frames, box), single(frames + shift, box)
    torch.testing.assert_close(far.energies, near.energies, rtol=0, atol=2e-6)
    torch.testing.assert_close(far.forces, near.forces, rtol=1e-5, atol=2e-5)


def test_members_are_those_alone(case):
    force_field, frames, box = case
    each = []
    for k in range(3):
        alone = force_field.for_map(force_field.cg_map)
        alone.members = torch.nn.ModuleList([force_field.members[k]])
        each.append(alone.energy_and_forces(frames, box=box))
    energies, forces = (np.stack(values) for values in zip(*each, strict=True))
    assert energies.std(0).min() > 1e-4
    members, of_members = eager(force_field).members(frames, box)
    np.testing.assert_allclose(members, energies, rtol=0, atol=1e-10)
    np.testing.assert_allclose(of_members, forces, rtol=0, atol=1e-8)


def test_check_apart_names_the_beads(case):
    force_field, frames, box = case
    evaluate = eager(force_field)
    evaluate.check_apart(frames, box)
    together = frames.clone()
    together[1, 3] = together[1, 4]
    if box is not None:
        together[1, 3] += box[0] - 2 * box[2]  # an image counts
    with pytest.raises(ValueError, match="beads 3 and 4 of frame 1 are at the same place"):
        evaluate.check_apart(together, box)
    # What it says so of: energies stay finite there.
    assert evaluate(together, box).forces.isfinite().all()


def test_pickles(case):
    force_field, frames, box = case
    evaluate = eager(force_field, temperature_K=333.0)
    before = evaluate(frames, box)
    copy = pickle.loads(pickle.dumps(evaluate))
    found = copy(frames, box)
    assert all(torch.equal(a, b) for a, b in zip(before, found, strict=True) if a is not None)
    assert (copy.temperature_K, copy.replicas) == (333.0, 3)


def test_keeps_a_copy_and_changes_nothing(case):
    force_field, frames, box = case
    evaluate = eager(force_field)
    before, beads = evaluate(frames, box).energies, frames.clone()
    with torch.no_grad():
        force_field.members[0].out.bias += 1
    again = evaluate(frames, box).energies
    with torch.no_grad():
        force_field.members[0].out.bias -= 1
    assert torch.equal(again, before)
    assert torch.equal(frames, beads)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        state = torch.get_rng_state()
        evaluate(frames, box)
        assert torch.get_num_threads() == 2
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.is_grad_enabled()
        with torch.no_grad():
            assert torch.equal(evaluate(frames, box).energies, before)
            assert not torch.is_grad_enabled()
    finally:
        torch.set_num_threads(threads)


def test_one_bead():
    """Neither edges nor terms: energy of the type alone, no force, no stress."""
    force_field = system((1, 2), cell=SKEWED)[0].for_map(map_of((1, 1)))
    x = torch.full((2, 1, 3), 0.3, dtype=torch.float64)
    for box in (None, 3 * torch.from_numpy(SKEWED)):
        found = eager(force_field, 2)(x, box)
        assert found.energies.shape == (2, 1)
        assert found.energies.isfinite().all()
        assert not found.forces.any()
        assert box is None or not found.stress.any()


def test_refuses():
    force_field, _ = system((4, 1))
    with pytest.raises(ValueError, match="replicas must be at least 1"):
        eager(force_field, 0)
    with pytest.raises(ValueError, match=r"free energy at 300.0 K"):
        eager(force_field, temperature_K=310.0)
    ranged, _ = system((4, 1), temperatures_K=(280, 350))
    with pytest.raises(ValueError, match="wrong at 279 K"):
        eager(ranged, 2, temperature_K=torch.tensor([300.0, 279.0]))


def test_frames_are_evaluated_in_portions_that_fit_the_cache(monkeypatch):
    """37 frames of 10 beads: portions of 16, the last one filled up; each frame is as alone."""
    force_field, frames = system((4, 2), (2, 1), temperatures_K=(280, 350), n_layers=1)
    frames = torch.cat([frames] * 40)[:37] + 0.1 * torch.arange(37)[:, None, None]
    frames = frames + 0.01 * torch.randn_like(frames)
    T = torch.linspace(281, 349, 37, dtype=torch.float64)
    sizes = []

    def compiled(kernel, example, dynamic, *, label):
        return lambda *inputs: sizes.append(len(inputs[0])) or kernel(*inputs)

    monkeypatch.setattr("ccg_ase.evaluator.compile_ahead", compiled)
    found = Evaluator(force_field, 37, temperature_K=T, dtype=torch.float64)(frames)
    assert sizes == [16, 16, 16]
    expected = eager(force_field, 37, temperature_K=T)(frames)
    close(found.energies, expected.energies)
    close(found.forces, expected.forces)
