"""Ahead-of-time compiled evaluation by AOTInductor, kept in the user's cache directory.

The compiled file depends on the architecture, not on weights: those are loaded into it. It is
machine code for this processor and this version of torch, hence built where it is used.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn

from ccg_ase.threads import one_thread
from ccg_ase.tracing import traced

try:
    import fcntl
except ImportError:  # Windows: two processes may build the same file, the second replaces it
    fcntl = None

_LOG = logging.getLogger("ccg")
_OPTIONS = {
    "always_keep_tensor_constants": True,  # no value of a constant gets into the code
    "aot_inductor.allow_stack_allocation": True,
    "aot_inductor.enable_frame_pointer": False,
    "aot_inductor.enable_line_tables": False,
    "aot_inductor.package_constants_in_so": False,
    "assert_indirect_indexing": False,
    "compile_threads": 1,
    "cpp.enable_floating_point_contract_flag": "fast",
    "joint_graph_constant_folding": False,  # nor that of a uniform one
    "realize_reads_threshold": 3,  # what is gathered isn't worked out again for every edge
    "cpp.threads": 1,
}
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}  # of an output's greatest number
_STACK_AT_MOST = 2**20  # bytes; threads have 8 MB
_MOST = 2**31 - 1
_BUILD = 2  # counts changes of what the compiler is told beside its options
_TRIAL = """
import sys
import torch
from torch._inductor import aoti_load_package, codecache

package = aoti_load_package(sys.argv[1])
values, example = torch.load(sys.argv[2])
constants = {name: values[name] for name in package.get_constant_fqns()}
package.load_constants(constants, check_full_update=True)
package.loader.boxed_run(example)
"""
_told: set[str] = set()

Kernel = Callable[..., tuple[Tensor, ...]]
_Run = Callable[[list[Tensor]], list[Tensor]]


def compile_ahead(
    kernel: nn.Module,
    example: tuple[Tensor, ...],
    dynamic: tuple[dict[int, str] | None, ...] | None = None,
    *,
    label: str,
) -> Kernel:
    """Return a compiled form of a kernel, from the cache or built now, in a minute or more.

    It was compared with the kernel on the example. Inputs of other shapes or dtypes than those of
    the example, but for dynamic dimensions, go to the kernel itself.

    Parameters
    ----------
    kernel
        Module in evaluation mode from CPU tensors to a tuple of tensors; gradients by
        `torch.autograd.grad` inside of it are compiled too. Its parameters are taken as they are.
    example
        Inputs; every dynamic dimension at least 2.
    dynamic
        For every input the dimensions that vary between calls, {dimension: name}, or None;
        dimensions of one name are equal.
    label
        What the kernel is, for messages.

    Returns
    -------
    callable
        As the kernel; the kernel itself where nothing could be compiled, or where the environment
        says CCG_COMPILE=0.

    Warns
    -----
    RuntimeWarning
        Once per label in a process: if nothing can be compiled or kept, with cause and cure.
    """
    if os.environ.get("CCG_COMPILE") == "0":
        return kernel
    dynamic = dynamic or (None,) * len(example)
    example = tuple(x.detach().contiguous() for x in example)
    try:
        with _nothing_changed():
            reference = kernel(*example)
            graph = traced(kernel, example, dynamic)
            run, obstacle = _cached(graph, example, dynamic, reference, label)
    except Exception as fault:
        _warn(label, f"{label} runs uncompiled, some ten times slower: {_cause(fault)}")
        return kernel
    if obstacle is not None:
        _warn(
            label,
            f"{label} is compiled for this process alone, since {cache_directory()} can't be "
            f"written ({_cause(obstacle)}): set CCG_CACHE to a directory with space that you own",
        )
    return _Compiled(kernel, run, example, dynamic)


def cache_directory() -> Path:
    """Return where compiled files are kept: $CCG_CACHE, or ccg in the user's cache directory."""
    if own := os.environ.get("CCG_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ccg"


def clear_cache() -> None:
    """Remove all compiled files."""
    for path in (*cache_directory().glob("*.pt2"), *cache_directory().glob("*.lock")):
        path.unlink(missing_ok=True)


class _Compiled:
    """Calls compiled code with inputs it was made for, else the kernel."""

    def __init__(
        self,
        kernel: nn.Module,
        run: _Run,
        example: tuple[Tensor, ...],
        dynamic: tuple[dict[int, str] | None, ...],
    ):
        self._kernel, self._run = kernel, run
        self._static = [
            (k, x.dtype, x.shape)
            for k, (x, dims) in enumerate(zip(example, dynamic, strict=True))
            if not dims
        ]
        self._dynamic = [
            (k, x.dtype, [dims.get(d, size) for d, size in enumerate(x.shape)])
            for k, (x, dims) in enumerate(zip(example, dynamic, strict=True))
            if dims
        ]

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        if not self._fits(inputs):
            return self._kernel(*inputs)
        # Some outputs of compiled code are memory that its next call writes again.
        return tuple(x.clone() for x in self._run([x.contiguous() for x in inputs]))

    def _fits(self, inputs: tuple[Tensor, ...]) -> bool:
        """Tell whether the inputs are as in the example: the compiled code checks nothing."""
        for k, dtype, shape in self._static:
            x = inputs[k]
            if x.dtype != dtype or x.shape != shape or not x.is_cpu or x.requires_grad:
                return False
        sizes: dict[str, int] = {}
        for k, dtype, dims in self._dynamic:
            x = inputs[k]
            if x.dtype != dtype or x.ndim != len(dims) or not x.is_cpu or x.requires_grad:
                return False
            for size, dim in zip(x.shape, dims, strict=True):
                if size != (dim if isinstance(dim, int) else sizes.setdefault(dim, size)):
                    return False
        return min(sizes.values(), default=2) >= 2


def _cached(
    graph: fx.GraphModule,
    example: tuple[Tensor, ...],
    dynamic: tuple[dict[int, str] | None, ...],
    reference: tuple[Tensor, ...],
    label: str,
) -> tuple[_Run, OSError | None]:
    """Return checked code, from the cache or built, and why it can't be kept."""
    key, folder = _key(graph, example, dynamic), cache_directory()

    def build(directory: Path) -> tuple[Path, _Run]:
        start = time.monotonic()
        _LOG.warning("compiling %s for this machine, once: a minute or more", label)
        path = _built(graph, example, dynamic, directory / "built.pt2")
        _try_apart(path, graph, example)
        run = _loaded(path, graph, example, reference)
        _LOG.info("compiled %s in %.0f s", label, time.monotonic() - start)
        return path, run

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f"{key}.lock"):
            for path in folder.glob(f"{key}-*.pt2"):
                try:
                    if path.name != f"{key}-{_digest(path)}.pt2":
                        raise ValueError("its content isn't what was written")
                    return _loaded(path, graph, example, reference), None
                except Exception as fault:
                    _LOG.warning("%s is damaged and built anew: %s", path, _cause(fault))
                    path.unlink(missing_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                path, run = build(Path(temporary))
                os.replace(path, folder / f"{key}-{_digest(path)}.pt2")
            return run, None
    except OSError as fault:
        obstacle = fault
    with tempfile.TemporaryDirectory() as temporary:
        return build(Path(temporary))[1], obstacle


def _key(
    graph: fx.GraphModule, example: tuple[Tensor, ...], dynamic: tuple[dict[int, str] | None, ...]
) -> str:
    """Return what the compiled code depends on: all but the values of constants."""
    constants = {name: (x.dtype, tuple(x.shape)) for name, x in graph.named_buffers()}
    inputs = [
        (x.dtype, [(dims or {}).get(dim, size) for dim, size in enumerate(x.shape)])
        for x, dims in zip(example, dynamic, strict=True)
    ]
    options = (_BUILD, _OPTIONS, _STACK_AT_MOST, torch.__version__)
    machine = (platform.machine(), platform.system(), platform.libc_ver(), _cpu())
    machine += (torch.backends.cpu.get_cpu_capability(),)
    parts = (graph.code, constants, inputs, dynamic, options, machine)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _cpu() -> str:
    """Return the processor's name where the system tells: code for another may not run."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("model name", "CPU part"))), "")


def _built(
    graph: fx.GraphModule,
    example: tuple[Tensor, ...],
    dynamic: tuple[dict[int, str] | None, ...],
    path: Path,
) -> Path:
    """Compile a graph into a file."""
    from torch._inductor import aoti_compile_and_package, config
    from torch._inductor.codegen import cpp
    from torch._inductor.codegen import cpp_wrapper_cpu_array_ref as wrapper

    names = {name for dims in dynamic if dims for name in dims.values()}
    dims = {name: torch.export.Dim(name, min=2, max=_MOST) for name in names}
    shapes = tuple({d: dims[name] for d, name in (own or {}).items()} for own in dynamic)
    program = torch.export.export(graph, example, dynamic_shapes=shapes if names else None)
    # For small graphs half of a call went into allocating some seventy tensors on the heap.
    limit = mock.patch.object(wrapper, "MAX_STACK_ALLOCATION_SIZE", _STACK_AT_MOST)
    aggregate = _narrow_at_the_end(cpp.CppKernelProxy.aggregate_reduction_buffers)
    stores = mock.patch.object(cpp.CppKernelProxy, "aggregate_reduction_buffers", aggregate)
    with config.patch(_OPTIONS), limit, stores:
        aoti_compile_and_package(program, package_path=str(path))
    return path


def _narrow_at_the_end(aggregate: Callable[..., None]) -> Callable[..., None]:
    """Mend how inductor chooses stores after a sum: whole vectors went past a buffer's end.

    Where the tiled dimension of the results and that of the sum aren't neighbours, it takes the
    sum for none: https://github.com/pytorch/pytorch/pull/196882, open in November 2026.
    """

    def choose(proxy: Any, inner_is_sum: bool, outer_loop: Any) -> None:
        tiles = getattr(proxy.kernels[0], "tiling_indices", ())
        if len(tiles) == 2:
            outer, inner = (proxy.loop_nest.loops[k].is_reduction for k in tiles)
            inner_is_sum = inner and not outer
        aggregate(proxy, inner_is_sum, outer_loop)

    return choose


def _try_apart(path: Path, graph: fx.GraphModule, example: tuple[Tensor, ...]) -> None:
    """Run new code in a process of its own: were it to crash, the user's would be lost.

    Raises
    ------
    RuntimeError
        If it fails there.
    """
    data = path.with_suffix(".example")
    torch.save((dict(graph.named_buffers()), list(example)), data)
    command = [sys.executable, "-c", _TRIAL, str(path), str(data)]
    trial = subprocess.run(command, capture_output=True, text=True)
    if trial.returncode:
        said = trial.stderr.strip().splitlines() or [f"exit status {trial.returncode}"]
        raise RuntimeError(f"compiled code crashed in a trial: {said[-1]}")


def _loaded(
    path: Path, graph: fx.GraphModule, example: tuple[Tensor, ...], reference: tuple[Tensor, ...]
) -> _Run:
    """Load compiled code, give it the constants of a graph, and check it.

    Raises
    ------
    RuntimeError
        If its results on the example aren't those of the kernel.
    """
    from torch._inductor import aoti_load_package, codecache  # noqa: F401 (needed: pytorch 173706)

    package = aoti_load_package(str(path))
    needed, values = package.get_constant_fqns(), dict(graph.named_buffers())
    package.load_constants({name: values[name] for name in needed}, check_full_update=True)
    run = package.loader.boxed_run
    used = {x.dtype for x in (*values.values(), *reference)}
    rtol = max(_TOLERANCE.get(dtype, 0.0) for dtype in used)
    for found, expected in zip(run(list(example)), reference, strict=True):
        scale = expected.abs().max().item() if expected.numel() else 0.0
        if not torch.allclose(found, expected, rtol=0, atol=rtol * scale, equal_nan=True):
            off = (found - expected).abs().max().item()
            raise RuntimeError(f"compiled code gave wrong results, off by {off:.2g} of {scale:.2g}")
    return run


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let one process at a time in."""
    with open(path, "w") as lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _nothing_changed() -> Iterator[None]:
    """Keep torch on one thread and its compiler quiet, and leave no trace of either."""
    environment, level = dict(os.environ), logging.getLogger("torch").level
    with one_thread(), warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        logging.getLogger("torch").setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            logging.getLogger("torch").setLevel(level)
            for name in os.environ.keys() - environment:
                del os.environ[name]
            os.environ.update(environment)


def _cause(fault: Exception) -> str:
    """Say in one line what went wrong, and what to do about it where that is known."""
    if "InvalidCxxCompiler" in f"{type(fault).__name__} {fault}":
        return "there is no C++ compiler; install g++ or clang++, or name one in CXX"
    return f"{type(fault).__name__}: {str(fault).strip().splitlines()[0] if str(fault) else ''}"


def _warn(label: str, message: str) -> None:
    if label not in _told:
        _told.add(label)
        warnings.warn(message, RuntimeWarning, stacklevel=3)
