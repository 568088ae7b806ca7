"""Trace a module, with the gradients it takes inside, into a graph that compiles to fast code."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, fx, nn

_MULTIPLICATIONS_AT_MOST = 2_000_000  # of a matrix product that is faster without a library
_ROWS = 8  # of a product, at most, that share every number they read of the other factor
_FEW_PLACES = 32  # that sums are written out for
_aten = torch.ops.aten
# Moving no data: a compiler does these better than a stored result would.
_VIEWS = frozenset(
    getattr(torch.ops.aten, name).default
    for name in ("view", "permute", "expand", "unsqueeze", "alias", "detach", "_unsafe_view", "t")
) | {
    operator.getitem,
    _aten.select.int,
    _aten.slice.Tensor,
    _aten.split_with_sizes.default,
    _aten.squeeze.dim,
    _aten.squeeze.dims,
    _aten.transpose.int,
    _aten.unbind.int,
}
_tracing = False


def being_compiled() -> bool:
    """Return whether the code that asks is being traced for compilation."""
    return _tracing


def traced(
    kernel: nn.Module,
    example: tuple[Tensor, ...],
    dynamic: tuple[dict[int, str] | None, ...],
) -> fx.GraphModule:
    """Trace a kernel into a graph of inputs and constants, its buffers ``constant0``, ...

    The graph doesn't depend on the values of parameters and buffers except for integer ones: where
    an index is constant, sums over it are reshaped instead of scattered. What follows from
    constants alone is computed here, once.

    Parameters
    ----------
    kernel
        Module from tensors to a tuple of tensors, in evaluation mode, without parameters to train.
    example
        Inputs for it.
    dynamic
        For every input the dimensions that vary between calls, or None.

    Returns
    -------
    torch.fx.GraphModule
    """
    from torch._decomp import core_aten_decompositions
    from torch.fx.experimental.proxy_tensor import make_fx

    table = core_aten_decompositions()
    for operation in (_aten.index_select.default, _aten.index_add.default):
        table.pop(operation, None)  # kept, since the passes look for them
    inputs, mode = _symbolic(example, dynamic) if any(dynamic) else (example, nullcontext())
    with _flag(), mode:
        graph = make_fx(kernel, decomposition_table=table)(*inputs)
    _fold(graph)
    _sum_rather_than_scatter(graph)
    _write_out_small_products(graph)
    _name_constants(graph)
    graph.recompile()
    return graph


def _symbolic(
    example: tuple[Tensor, ...], dynamic: tuple[dict[int, str] | None, ...]
) -> tuple[list[Tensor], AbstractContextManager]:
    """Return stand-ins for inputs, with symbols for dimensions that vary, and where they live."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import (
        DimDynamic,
        ShapeEnv,
        StatelessSymbolicContext,
    )

    # Dimensions that happen to be equal in the example are not the same dimension.
    mode = FakeTensorMode(
        shape_env=ShapeEnv(duck_shape=False, specialize_zero_one=True), allow_non_fake_inputs=True
    )
    stand_ins = []
    for x, dims in zip(example, dynamic, strict=True):
        kinds = [
            DimDynamic.DYNAMIC if d in (dims or {}) else DimDynamic.STATIC for d in range(x.ndim)
        ]
        context = StatelessSymbolicContext(dynamic_sizes=kinds)
        stand_ins.append(mode.from_tensor(x, symbolic_context=context))
    return stand_ins, mode


@contextmanager
def _flag() -> Iterator[None]:
    global _tracing
    _tracing = True
    try:
        yield
    finally:
        _tracing = False


def _constant(graph: fx.GraphModule, node: fx.Node, known: dict[fx.Node, object]) -> bool:
    """Evaluate a node that follows from constants alone into `known`; tell whether it does."""
    if node in known:
        return True
    if node.op == "get_attr":
        known[node] = getattr(graph, node.target)
    elif (
        node.op == "call_function"
        and node.all_input_nodes
        and all(_constant(graph, other, known) for other in node.all_input_nodes)
    ):
        args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
        known[node] = node.target(*args, **kwargs)
    return node in known


def _store(graph: fx.GraphModule, value: Tensor) -> fx.Node:
    """Make a constant of a value."""
    name = f"folded{sum(key.startswith('folded') for key in graph._buffers)}"
    graph.register_buffer(name, value.detach().clone(memory_format=torch.contiguous_format))
    return graph.graph.get_attr(name)


def _replace(node: fx.Node, new: fx.Node) -> None:
    new.meta.update(node.meta)
    node.replace_all_uses_with(new)


def _shape(node: fx.Node) -> torch.Size:
    return node.meta["val" if "val" in node.meta else "tensor_meta"].shape


def _fold(graph: fx.GraphModule) -> None:
    """Replace what follows from constants alone by its value."""
    known: dict[fx.Node, object] = {}
    for node in list(graph.graph.nodes):
        if not _constant(graph, node, known) or node.op == "get_attr" or node.target in _VIEWS:
            continue
        if all(user.target not in _VIEWS and _constant(graph, user, known) for user in node.users):
            continue  # only what is needed in the end
        with graph.graph.inserting_before(node):
            new = _store(graph, known[node])
        _replace(node, new)
        known[new] = known[node]
    graph.graph.eliminate_dead_code()


def _sum_rather_than_scatter(graph: fx.GraphModule) -> None:
    """Turn sums into constant places into sums of a dimension, or of its slices if they are few."""
    known: dict[fx.Node, object] = {}
    zeros = (_aten.full.default, _aten.zeros.default, _aten.new_zeros.default)
    for node in graph.graph.find_nodes(op="call_function", target=_aten.index_add.default):
        zero, dim, index, values = node.args
        if zero.target not in zeros or not _constant(graph, index, known) or not _shape(node)[dim]:
            continue
        if not all(isinstance(size, int) for size in _shape(values)):
            continue
        places, n = known[index], _shape(zero)[dim]
        counts = torch.bincount(places, minlength=n)
        order, shape = places.argsort(stable=True), list(_shape(values))
        call = graph.graph.call_function
        with graph.graph.inserting_before(node):
            if counts.min() == counts.max() and (order.diff() == 1).all():
                shape[dim : dim + 1] = [n, len(order) // n]
                values = call(_aten.reshape.default, (values, shape))
                _replace(node, call(_aten.sum.dim_IntList, (values, [dim + 1])))
            elif counts.min() == counts.max():
                # Not a sum of a dimension of what is sorted: inner loops would be over that one.
                total = None
                for own in order.view(n, -1).T:
                    part = call(_aten.index_select.default, (values, dim, _store(graph, own)))
                    total = part if total is None else call(_aten.add.Tensor, (total, part))
                _replace(node, total)
            elif len(places) <= _FEW_PLACES and counts.min() > 0:
                parts = [call(_aten.select.int, (values, dim, k)) for k in range(len(places))]
                sums = []
                for own in order.split(counts.tolist()):
                    first, *others = own.tolist()
                    total = parts[first]
                    for k in others:
                        total = call(_aten.add.Tensor, (total, parts[k]))
                    sums.append(total)
                _replace(node, call(_aten.stack.default, (sums, dim)))
    graph.graph.eliminate_dead_code()


def _write_out_small_products(graph: fx.GraphModule) -> None:
    """Turn small matrix products into sums of products, which fuse with their neighbours."""
    for node in list(graph.graph.nodes):
        if node.target not in (_aten.mm.default, _aten.bmm.default, _aten.addmm.default):
            continue
        *bias, left, right = node.args
        sizes = (*_shape(left), _shape(right)[-1])
        # A size that varies between calls is no int.
        if not all(isinstance(size, int) for size in sizes) or node.kwargs:
            continue
        if math.prod(sizes) > _MULTIPLICATIONS_AT_MOST:
            continue
        with graph.graph.inserting_before(node):
            call, ndim = graph.graph.call_function, len(_shape(left))
            left = call(_aten.unsqueeze.default, (left, ndim))
            right = call(_aten.unsqueeze.default, (right, ndim - 2))
            parts = []
            for own in _spans(sizes[-3], _ROWS):
                some = call(_aten.slice.Tensor, (left, ndim - 2, *own))
                part = call(_aten.mul.Tensor, (some, right))
                parts.append(call(_aten.sum.dim_IntList, (part, [ndim - 1])))
            new = parts[0] if len(parts) == 1 else call(_aten.cat.default, (parts, ndim - 2))
            if bias:
                new = call(_aten.add.Tensor, (new, *bias))
        _replace(node, new)
    graph.graph.eliminate_dead_code()


def _spans(size: int, at_most: int) -> list[tuple[int, int]]:
    """Cut a dimension into equal parts, as many as it allows."""
    n = max(k for k in range(1, at_most + 1) if size % k == 0)
    return [(k * size // n, (k + 1) * size // n) for k in range(n)]


def _name_constants(graph: fx.GraphModule) -> None:
    """Make every constant a contiguous buffer of its own with a name that tells its number."""
    names: dict[str, str] = {}
    for node in graph.graph.find_nodes(op="get_attr"):
        names.setdefault(node.target, f"constant{len(names)}")
    values = {new: getattr(graph, old).detach() for old, new in names.items()}
    for node in graph.graph.find_nodes(op="get_attr"):
        node.target = node._target = names[node.target]
    for name, value in values.items():
        graph.register_buffer(name, value.clone(memory_format=torch.contiguous_format))
    for name in [*graph._buffers, *graph._parameters]:
        if name not in values:
            delattr(graph, name)
