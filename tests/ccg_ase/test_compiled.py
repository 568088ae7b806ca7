"""Compiled kernels against the kernels themselves; one of a few operations is built for all."""

import contextlib
import logging
import os
import shutil
import threading
import warnings

import pytest
import torch
from torch import nn

from ccg_ase import compiled, tracing
from ccg_ase.coupling import Coupling
from ccg_ase.encoder import Encoder
from ccg_ase.graph import all_pairs


class Wave(nn.Module):
    """Σ sin(x W) k Σy, its gradient inside; sums into places that don't change."""

    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(3, 3, generator=generator), requires_grad=False)
        self.register_buffer("factor", torch.tensor(1.0 + seed))
        self.register_buffer("place", torch.tensor([1, 0, 1, 0]))

    def forward(self, x, y):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            waves = (x @ self.weight).sin() * self.factor * y.sum()
            energies = waves.new_zeros(2, 3).index_add(0, self.place, waves).sum(-1)
            (gradient,) = torch.autograd.grad(energies.sum(), x)
        return energies.detach(), gradient


DYNAMIC = (None, {0: "m"})


def inputs(m=5):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(4, 3, generator=generator), torch.rand(m, generator=generator)


def state():
    from torch.fx.experimental import _config

    return {
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "random": torch.get_rng_state().tolist(),
        "filters": list(warnings.filters),
        "environment": dict(os.environ),
        "duck shape": _config.use_duck_shape,
        "logging": [logging.getLogger(name).level for name in (None, "torch", "ccg")],
    }


@pytest.fixture(scope="module", autouse=True)
def _compiling():
    """Elsewhere in the tests nothing is compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CCG_COMPILE")
        yield


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Cache with the compiled kernel in it, and global state before and after."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CCG_CACHE", str(folder))
        threads = torch.get_num_threads()
        torch.set_num_threads(2)
        before = state()
        kernel = compiled.compile_ahead(Wave(), inputs(), DYNAMIC, label="the first wave")
        after = state()
        torch.set_num_threads(threads)
    return folder, kernel, before, after


@pytest.fixture
def cache(built, tmp_path, monkeypatch):
    """Set up a copy of that cache, and a builder that fails."""
    shutil.copytree(built[0], tmp_path / "cache")
    monkeypatch.setenv("CCG_CACHE", str(tmp_path / "cache"))

    def refuse(*_):
        raise AssertionError("built again")

    monkeypatch.setattr(compiled, "_built", refuse)
    return tmp_path / "cache"


@pytest.fixture
def builds(built, cache, monkeypatch):
    """Let the builder copy what was built, and tried, before; return the list of its calls."""
    calls = []
    monkeypatch.setattr(compiled, "_TRIAL", "")  # another import of torch; the real ones are tried

    def copy(graph, example, dynamic, path):
        calls.append(path)
        return shutil.copy(next(built[0].glob("*.pt2")), path)

    monkeypatch.setattr(compiled, "_built", lambda *args: compiled.Path(copy(*args)))
    return calls


def is_right(kernel, wave, m=5):
    torch.testing.assert_close(kernel(*inputs(m)), wave(*inputs(m)), rtol=1e-5, atol=1e-5)
    return True


def compile_wave(label, seed=0, m=5):
    return compiled.compile_ahead(Wave(seed), inputs(m), DYNAMIC, label=label)


def test_the_environment_may_forbid_it(monkeypatch):
    monkeypatch.setenv("CCG_COMPILE", "0")
    monkeypatch.setattr(compiled, "traced", lambda *_: pytest.fail("compiled"))
    kernel = Wave()
    assert compiled.compile_ahead(kernel, inputs(), DYNAMIC, label="nothing") is kernel


def test_equals_the_kernel_and_sizes_may_vary(built, monkeypatch):
    kernel = built[1]
    assert not isinstance(kernel, nn.Module)
    monkeypatch.setattr(kernel, "_kernel", None)  # not by falling back
    for m in (2, 5, 11):
        assert is_right(kernel, Wave(), m)
    x, y = inputs()
    strided = x.T.contiguous().T
    torch.testing.assert_close(kernel(strided, y), Wave()(x, y), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        lambda x, y: (x, y[:1]),  # a compiler takes sizes 0 and 1 for special
        lambda x, y: (x.double(), y),
        lambda x, y: (x.expand(2, 4, 3)[0].requires_grad_(), y),
    ],
)
def test_other_inputs_go_to_the_kernel(built, monkeypatch, change):
    calls = []
    monkeypatch.setattr(built[1], "_kernel", lambda *inputs: calls.append(inputs))
    built[1](*change(*inputs()))
    assert len(calls) == 1


def test_changes_nothing_global(built):
    assert built[2] == built[3]


@pytest.mark.usefixtures("cache")
def test_loads_from_the_cache_whatever_weights_and_dynamic_sizes():
    for seed, m in ((0, 5), (1, 8)):
        kernel = compile_wave(f"wave {seed}", seed, m)
        assert not isinstance(kernel, nn.Module)
        assert is_right(kernel, Wave(seed))
    assert not torch.allclose(Wave(0)(*inputs())[0], Wave(1)(*inputs())[0])


def test_other_dtype_is_another_file(cache, builds):
    x, y = inputs()
    with pytest.warns(RuntimeWarning, match="wave in float64 runs uncompiled"):
        kernel = compiled.compile_ahead(
            Wave().double(), (x.double(), y.double()), DYNAMIC, label="wave in float64"
        )
    assert isinstance(kernel, Wave)
    assert len(builds) == 1
    assert len(list(cache.glob("*.pt2"))) == 1


@pytest.mark.parametrize("damage", [lambda x: x[: len(x) // 2], lambda x: b"", lambda x: b"?" + x])
def test_damaged_file_is_built_anew(cache, builds, damage):
    (path,) = cache.glob("*.pt2")
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert is_right(compile_wave("damaged wave"), Wave())
    assert len(builds) == 1
    assert path.read_bytes() == whole
    assert [p.name for p in cache.iterdir() if p.suffix != ".lock"] == [path.name]


@pytest.mark.usefixtures("builds")
def test_wrong_results_are_not_used(monkeypatch):
    monkeypatch.setattr(compiled, "traced", lambda _, *rest: tracing.traced(Wave(1), *rest))
    with pytest.warns(RuntimeWarning, match="wrong results"):
        kernel = compile_wave("wrong wave")
    assert is_right(kernel, Wave())


def test_without_a_compiler_the_kernel_serves_and_one_warning_says_so(tmp_path, monkeypatch):
    from torch._inductor import cpp_builder

    cpp_builder.cpp_compiler_search.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CCG_CACHE", str(tmp_path / "cache"))
    with pytest.warns(RuntimeWarning, match=r"no C\+\+ compiler; install") as caught:
        kernel = compile_wave("lonely wave")
    assert len(caught) == 1
    assert is_right(kernel, Wave())
    assert is_right(compile_wave("lonely wave"), Wave())  # no second warning
    cpp_builder.cpp_compiler_search.cache_clear()


def test_cache_that_cannot_be_written(tmp_path, builds, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CCG_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(RuntimeWarning, match="set CCG_CACHE") as caught:
        kernel = compile_wave("homeless wave")
    assert len(caught) == 1
    assert not isinstance(kernel, nn.Module)
    assert is_right(kernel, Wave())
    assert len(builds) == 1


def test_waits_for_another_process_that_builds(cache):
    (path,) = cache.glob("*.pt2")
    (lock,) = cache.glob("*.lock")
    hidden = path.rename(cache / "hidden")
    found = []
    thread = threading.Thread(target=lambda: found.append(compile_wave("patient wave")))
    with compiled._locked(lock):
        thread.start()
        thread.join(3)
        assert thread.is_alive()
        hidden.rename(path)
    thread.join()
    assert not isinstance(found[0], nn.Module)


def test_cache_directory_and_clearing(cache, monkeypatch):
    (cache / "precious").touch()
    compiled.clear_cache()
    assert [path.name for path in cache.iterdir()] == ["precious"]
    monkeypatch.delenv("CCG_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert str(compiled.cache_directory()) == "/somewhere/ccg"


@contextlib.contextmanager
def compiling():
    with tracing._flag():
        yield


@pytest.mark.parametrize("l_max", [0, 1, 2])
def test_products_written_out_are_the_same(l_max):
    layer = Encoder(2, channels=2, l_max=l_max).double().layers[1]
    for coupling in (layer.message, layer.square):
        assert isinstance(coupling, Coupling)
        left = layer.keep_irrep.numel() if coupling is layer.message else layer.mix_irrep.numel()
        right = coupling.dense.shape[1] // left
        x, y = torch.randn(left, 4, 5).double(), torch.randn(right, 1, 5).double()
        weights = torch.randn(len(coupling.paths), 4, 5).double()
        before = coupling(x, y), coupling.weighted(x, y, weights)
        coupling._is_short = True  # written out, whatever their number
        with compiling():
            after = coupling(x, y), coupling.weighted(x, y, weights)
        torch.testing.assert_close(after, before, rtol=0, atol=1e-13)


def test_gradients_of_slices_of_varying_length_are_traced():
    class Rows(nn.Module):
        def forward(self, box, frame):
            with torch.enable_grad():
                box = box.detach().requires_grad_()
                rows = box[frame][:, 1][: frame.shape[0] - 1]
                return torch.autograd.grad(rows.sin().sum(), box)

    box, frame = torch.randn(2, 3, 3), torch.tensor([0, 1, 1, 0, 1])
    graph = tracing.traced(Rows(), (box, frame), (None, {0: "m"}))
    for frames in (frame, frame[:3]):
        torch.testing.assert_close(graph(box, frames), Rows()(box, frames))


@pytest.mark.parametrize("dynamic", [(None, None), (None, {0: "m"})])
def test_traced_encoder_is_the_encoder_without_scatter_or_small_products(dynamic):
    class Forces(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = Encoder(2, channels=2).double().requires_grad_(False)
            self.register_buffer("edges", all_pairs(4))
            self.register_buffer("types", torch.tensor([0, 1, 1, 0]))
            self.register_buffer("bonded", torch.ones(12, dtype=torch.long))

        def forward(self, x, y):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                features = self.encoder.features(x, self.types, self.edges, self.bonded)
                return torch.autograd.grad(features.sin().sum() * y.sum(), x)

    torch.manual_seed(0)
    kernel, x, y = Forces(), torch.randn(2, 4, 3).double(), torch.rand(6).double()
    graph = tracing.traced(kernel, (x, y), dynamic)
    y = y[:5] if any(dynamic) else y
    (found,), (expected,) = graph(x, y), kernel(x, y)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * expected.abs().max().item())
    assert not tracing.being_compiled()
    called = {node.target for node in graph.graph.nodes if node.op == "call_function"}
    aten = torch.ops.aten
    unwanted = (aten.index_add, aten.mm, aten.bmm, aten.addmm)
    assert not called & {operation.default for operation in unwanted}


class Steep(nn.Module):
    """Energies of rows and their gradient: an output that compiled code keeps and writes again."""

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energies = x.sin().square().sum(-1)
            (gradient,) = torch.autograd.grad(energies.sum(), x)
        return energies.detach(), -gradient


def test_results_of_a_call_outlive_the_next_one(tmp_path, monkeypatch):
    monkeypatch.setenv("CCG_CACHE", str(tmp_path))
    x = torch.rand(8, 5, dtype=torch.float64)
    kernel = compiled.compile_ahead(Steep(), (x,), label="steep")
    assert not isinstance(kernel, Steep)
    first = kernel(x)
    kernel(x + 1)
    torch.testing.assert_close(first, Steep()(x), rtol=1e-12, atol=1e-12)


class Tiles(nn.Module):
    """Products of 3 x n with n x 3, whose code inductor lets write past a buffer's end."""

    def forward(self, a, b, other):
        forces = (a + b).permute(2, 1, 0)
        left, right = other.mT.unsqueeze(-1), forces.permute(1, 0, 2).contiguous().unsqueeze(1)
        rows = [(left[:, k : k + 1] * right).sum(2) for k in range(3)]
        return torch.cat(rows, 1), forces.contiguous()


def test_sums_in_tiles_are_stored_inside_their_buffer(tmp_path, monkeypatch):
    monkeypatch.setenv("CCG_CACHE", str(tmp_path))
    kernel, example = Tiles(), [torch.randn(3, 8, 125), torch.randn(3, 8, 125)]
    example.append(torch.randn(8, 125, 3))
    assert compiled.compile_ahead(kernel, tuple(example), label="tiles") is not kernel


@pytest.mark.usefixtures("builds")
def test_code_that_crashes_does_so_in_another_process(tmp_path, monkeypatch):
    monkeypatch.setenv("CCG_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(compiled, "_TRIAL", "import os; os.abort()")
    kernel = Wave()
    with pytest.warns(RuntimeWarning, match="crashed in a trial: exit status -6"):
        assert compiled.compile_ahead(kernel, inputs(), label="a crash") is kernel
