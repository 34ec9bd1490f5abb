"""A residual branch g, and g at a point as a linear operator.

Estimators and solvers speak to these two interfaces, never to a kind of network:

* `ResidualFunction`: x -> g(x) for ONE setting of the weights and ONE context. Whatever a network
  computes once per call (normalised weights, context features) is computed when it is bound.
* `Linearization`: the value g(x) and products with its Jacobian J = dg/dx at one point.

A network that knows its own structure offers `bind(context) -> ResidualFunction`, whose
`linearize` answers with cheap exact products. Any other module is served by automatic
differentiation: correct, but each product costs one backward pass.
"""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields, is_dataclass
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from nflows_iresnet.renamed import warn_renamed
from nflows_iresnet.tensor_float import in_full_products, unrecorded

Function = Callable[[Tensor], Tensor]
Rebuild = Callable[[Sequence[Tensor]], "ResidualFunction"]


def is_traced() -> bool:
    """Whether a compiler, a transform of `torch.func` or forward-mode AD watches the operations.

    Values may then not be there to decide by, and hand-written derivatives are not asked for.
    """
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
        or torch._C._functorch.maybe_current_level() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def is_differentiated() -> bool:
    """Whether derivatives may be asked for: by graphs, or forward mode, which ignores no_grad."""
    return torch.is_grad_enabled() or torch.autograd.forward_ad._current_level >= 0


def pulled_back(
    function: Callable[..., Tensor | Sequence[Tensor]],
    cotangents: Tensor | Sequence[Tensor],
    given: Sequence[Tensor],
) -> list[Tensor | None]:
    """Return what comes back through a function to what is given to it, with a graph.

    A hand-written backward pass is differentiated so, through its slow twin. One of what is given
    may have been made from another, as the numbers of a spline by a network from its inputs: what
    comes back to that one on this way is the engine's to find, and would count twice here. So the
    function gets them under names of their own.

    Args:
        function: the slow twin.
        cotangents: of what it returns.
        given: its arguments.

    Returns:
        One for each that is given; None where nothing is due.
    """
    own = [each.view_as(each) for each in given]
    needed = [each for each in own if each.requires_grad]
    outputs = function(*own)
    found = iter(
        torch.autograd.grad(outputs, needed, cotangents, create_graph=True, allow_unused=True)
    )
    return [next(found) if each.requires_grad else None for each in own]


def is_forward_over_forward() -> bool:
    """Whether forward mode differentiates forward mode, as in `jacfwd(jacfwd(...))`."""
    if torch.compiler.is_compiling():
        return False
    levels = torch._C._functorch.get_interpreter_stack() or []
    return sum(level.key() == torch._C._functorch.TransformType.Jvp for level in levels) > 1


def concrete(values: Tensor) -> Tensor:
    """Return the tensor that transforms of `torch.func` have wrapped: all lanes of a `vmap`.

    To decide by values inside `vmap`, where one lane alone has no values to decide by. The
    dimensions that are mapped come first.
    """
    if torch.compiler.is_compiling():
        return values
    while torch._C._functorch.is_functorch_wrapped_tensor(values):
        dimension = torch._C._functorch.maybe_get_bdim(values)
        values = torch._C._functorch.get_unwrapped(values)
        values = values if dimension < 0 else values.movedim(dimension, 0)
    return values


def is_hooked(module: nn.Module) -> bool:
    """Whether calling a module does more than its `forward`: it has hooks of the call."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


WEIGHT_HOOKS = (BasePruningMethod, WeightNorm, SpectralNorm)
"""Hooks before a call that set a weight from other parameters, whatever the inputs are."""


def run_weight_hooks(module: nn.Module) -> None:
    """Let hooks that compute a weight do so, where the module itself is not called."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WEIGHT_HOOKS):
            hook(module, ())


def first_parameter(module: nn.Module) -> Tensor | None:
    """Return the first of `module.parameters()`, at a tenth of the cost; None if there is none."""
    for parameter in module._parameters.values():
        if parameter is not None:
            return parameter
    for child in module._modules.values():
        if child is not None and (found := first_parameter(child)) is not None:
            return found
    return None


def held_by_graphs(parameters: Sequence[Tensor]) -> int:
    """Return of how many parameters a graph is alive: it has the node that adds up a gradient.

    What is on that node stays there as long as a graph has it; without one each question makes
    another. Graphs that only cycles of Python hold are collected.
    """
    for each in parameters:
        _accumulator(each).metadata["is_held"] = True
    if not any("is_held" in _accumulator(each).metadata for each in parameters):
        return 0
    gc.collect()
    return sum(_accumulator(each).metadata.pop("is_held", False) for each in parameters)


@torch.inference_mode(mode=False)  # under no_grad, too
def _accumulator(parameter: Tensor) -> Any:
    """Return the node that adds up the gradient of a parameter."""
    of_view: Any = parameter.view_as(parameter).grad_fn
    return of_view.next_functions[0][0]


class SecondDerivativeError(RuntimeError):
    """A derivative was asked for that would have been wrong: only lower ones are right."""


def first_derivative_only(values: Tensor, message: str) -> Tensor:
    """Return the values, such that to differentiate their derivative raises, whatever by.

    What is held constant where the values are computed makes their first derivative right, and
    each further one wrong. That holds for graphs, `torch.func` and forward mode alike. Inside
    compiled graphs nothing is guarded: torch refuses to differentiate them twice, if asked to.

    Args:
        values: any shape.
        message: why, and what to do.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return values
    node = _FirstDerivativeOnlyTraced if is_traced() else _FirstDerivativeOnly
    result: Tensor = node.apply(values, message)
    return result


class _FirstDerivativeOnly(torch.autograd.Function):
    """The identity. Its derivative is the identity on what leads to `_Refusal`."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, message: str) -> Tensor:
        ctx.save_for_backward(values)
        ctx.message = message
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        if not torch.is_grad_enabled():
            return cotangent, None
        return _Refusal.apply(cotangent, *ctx.saved_tensors, ctx.message), None


class _FirstDerivativeOnlyTraced(torch.autograd.Function):
    """The same inside `torch.func` and forward mode, whose way to call a function takes longer."""

    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, message: str) -> Tensor:
        return values.clone()  # forward mode refuses a view of what it came from

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
        ctx.message = inputs[1]
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    backward = _FirstDerivativeOnly.backward

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        refused: Tensor = _Refusal.apply(tangent, *ctx.saved_tensors, ctx.message)
        return refused


class _Refusal(torch.autograd.Function):
    """The identity on its first argument, which cannot be differentiated, by its second least."""

    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, source: Tensor, message: str) -> Tensor:
        return values.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
        ctx.message = inputs[2]

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None]:
        raise SecondDerivativeError(ctx.message)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        raise SecondDerivativeError(ctx.message)


class Linearization(ABC):
    """The value g(x) and the Jacobian J = dg/dx at a batch of points x, row by row.

    Every answer is differentiable with respect to whatever x, the weights and the context depend
    on, unless it is asked for under `torch.no_grad()`. Rows never see each other.

    Attributes:
        value: g(x), shape (B, *).
        has_cheap_trace: whether `trace` costs less than a few products with J.
    """

    value: Tensor
    has_cheap_trace: bool = False

    @property
    def shape(self) -> torch.Size:
        """The shape of the value, (B, *)."""
        return self.like.shape

    @property
    def like(self) -> Tensor:
        """The value without a graph: its shape, dtype and device."""
        return self.value.detach()

    @abstractmethod
    def vjp(self, cotangent: Tensor) -> Tensor:
        """Return J^T v for a cotangent v of shape (B, *)."""

    @abstractmethod
    def jvp(self, tangent: Tensor) -> Tensor:
        """Return J v for a tangent v of shape (B, *)."""

    def bilinear(self, cotangents: Sequence[Tensor], tangent: Tensor) -> list[Tensor]:
        """Return w^T J v, shape (B,), for each of several w and one v of shape (B, *).

        Cost: one jvp for all w where that is as cheap as a vjp, else one vjp for each w.
        """
        return [row_products(self.vjp(cotangent), tangent) for cotangent in cotangents]

    def surrogate(self, for_value: Tensor, for_derivative: Tensor, tangent: Tensor) -> Tensor:
        """Return s^T J v with the first derivative of w^T J v, shape (B,), w and s held constant.

        Args:
            for_value: s, shape (B, *).
            for_derivative: w, shape (B, *).
            tangent: v, shape (B, *).
        """
        derivative, value = self.bilinear([for_derivative, for_value], tangent)
        return value.detach() + (derivative - derivative.detach())

    def pairings(self, cotangents: Sequence[Tensor], tangent: Tensor) -> list[Tensor]:
        """Old name of `bilinear`."""
        warn_renamed("Linearization.pairings", "Linearization.bilinear")
        return self.bilinear(cotangents, tangent)

    def jacobian(self) -> Tensor:
        """Return J as matrices of shape (B, D, D), D the number of values per row.

        Cost: D vjps unless a subclass knows better.
        """
        rows = [self.vjp(basis) for basis in _basis_like(self.value)]
        return torch.stack([row.flatten(start_dim=1) for row in rows], dim=1)

    def trace(self) -> Tensor:
        """Return tr J, shape (B,)."""
        return self.jacobian().diagonal(dim1=-2, dim2=-1).sum(-1)


class ForwardLinearization(Linearization):
    """A linearisation whose `jvp` is as cheap as its `vjp`."""

    def bilinear(self, cotangents: Sequence[Tensor], tangent: Tensor) -> list[Tensor]:
        """Return w^T J v for each w, shape (B,), from one J v."""
        pushed = self.jvp(tangent)
        return [row_products(cotangent, pushed) for cotangent in cotangents]


def row_products(left: Tensor, right: Tensor) -> Tensor:
    """Return the scalar product of each row with the other tensor's, (B, *) -> (B,)."""
    return (left * right).flatten(start_dim=1).sum(dim=1)


def _basis_like(value: Tensor) -> list[Tensor]:
    dimension = value.shape[1:].numel()
    identity = torch.eye(dimension, dtype=value.dtype, device=value.device)
    return [row.reshape(value.shape[1:]).expand_as(value) for row in identity]


class AutogradLinearization(Linearization):
    """Linearization of any function by reverse-mode automatic differentiation.

    Built on `torch.func.vjp`, so that it works under `no_grad`, `inference_mode` and inside other
    function transforms, leaves the caller's tensors untouched and triggers none of their hooks.

    Cost: one evaluation of the function; one backward pass per `vjp`, two per `jvp` (the transpose
    of a transpose, which in eager mode is several times faster than forward mode).

    Args:
        function: maps (B, *) to (B, *), row by row.
        inputs: the points, shape (B, *).
    """

    @in_full_products("anything")
    def __init__(self, function: Function, inputs: Tensor) -> None:
        self._function = function
        self._inputs = inputs
        self.value, self._pullback = _vjp(function, inputs)

    @in_full_products("anything")
    def vjp(self, cotangent: Tensor) -> Tensor:
        """Return J^T v by one backward pass."""
        return self._pullback(cotangent)

    @in_full_products("anything")
    def jvp(self, tangent: Tensor) -> Tensor:
        """Return J v as the transpose of v -> J^T v."""

        def pullback(cotangent: Tensor) -> Tensor:
            return _vjp(self._function, self._inputs)[1](cotangent)

        return _vjp(pullback, torch.zeros_like(self.value))[1](tangent)


def _vjp(function: Function, inputs: Tensor) -> tuple[Tensor, Function]:
    try:
        with unrecorded(), _out_of_inference_mode():
            value, pullback = torch.func.vjp(function, inputs)[:2]
    except RuntimeError as error:
        if "saved tensor hooks" in str(error):
            raise ValueError(
                "a network that is differentiated automatically cannot be evaluated where hooks "
                "change what is saved for the backward pass, as recompute=True, "
                "torch.utils.checkpoint and save_on_cpu do: leave them out, or use a network of "
                "nflows_iresnet.nn with its unit-wise activations"
            ) from error
        if "mutate a captured Tensor" not in str(error):
            raise
        raise ValueError(
            "the network changes a tensor of its own while it is evaluated, as power iteration "
            "does, but one call must see one g: use a network whose forward changes nothing, such "
            "as those of nflows_iresnet.nn (some others change nothing in evaluation mode)"
        ) from error

    def pulled(cotangent: Tensor) -> Tensor:
        with _out_of_inference_mode():
            return pullback(cotangent)[0]

    return value, pulled


def _out_of_inference_mode() -> AbstractContextManager[object]:
    """Return a block where derivatives are right: in inference mode torch 2.4 makes them zero."""
    is_inference = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
    return _no_grad_instead() if is_inference else nullcontext()


@contextmanager
def _no_grad_instead() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():
        yield


class ResidualFunction(ABC):
    """x -> g(x) with its weights and its context fixed for the duration of one call.

    Implementing one: subclass as a frozen dataclass whose fields hold the tensors, implement
    `__call__`; `linearize`, where the structure gives cheap products; and `select`, if anything has
    one row for each row of the inputs. `testing.check_linearization` checks all of it.

    Attributes:
        lipschitz: a constant < 1 that is GUARANTEED to bound Lip(g), known without looking at the
            weights; None where nothing is guaranteed.
    """

    lipschitz: float | None = None

    @abstractmethod
    def __call__(self, inputs: Tensor) -> Tensor:
        """Return g(inputs), shape (B, *)."""

    def linearize(self, inputs: Tensor) -> Linearization:
        """Return g at `inputs` as a linear operator."""
        return AutogradLinearization(self, inputs)

    def select(self, rows: Tensor | slice) -> ResidualFunction:
        """Return the same function for some rows of the batch: its context is indexed by `rows`."""
        return self

    def split(self) -> tuple[list[Tensor], Rebuild]:
        """Return the tensors that the function is made of, and how to make it of others.

        For those who save them for later, where a tensor that is only referred to would have
        changed its meaning. Here: the fields of a dataclass that hold tensors, or sequences of
        them; what else a function refers to stays as it is.
        """
        if not is_dataclass(self):
            return [], lambda _: self
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        groups = {name: _tensors_of(value) for name, value in values.items()}
        counts = {name: len(group) for name, group in groups.items() if group}
        rest = {name: value for name, value in values.items() if name not in counts}
        single = {name for name in counts if isinstance(values[name], Tensor)}
        kind = type(self)

        def rebuild(tensors: Sequence[Tensor]) -> ResidualFunction:
            remaining = iter(tensors)
            made: dict[str, Any] = {
                name: list(islice(remaining, count)) for name, count in counts.items()
            }
            made.update({name: made[name][0] for name in single})
            return kind(**rest, **made)

        return [tensor for group in groups.values() for tensor in group], rebuild


def _tensors_of(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)) and all(isinstance(each, Tensor) for each in value):
        return list(value)
    return []


class OpaqueFunction(ResidualFunction):
    """Any callable `net(inputs)` or `net(inputs, context)` as a `ResidualFunction`.

    Its `lipschitz` is the attribute `lipschitz` of the callable, where it has one.
    """

    def __init__(
        self,
        net: Callable[..., Tensor],
        context: Tensor | None = None,
        state: dict[str, Tensor] | None = None,
    ) -> None:
        self._net, self._context, self._state = net, context, state
        self.lipschitz = _validated_claim(net)

    @in_full_products("anything")
    def __call__(self, inputs: Tensor) -> Tensor:
        """Return net(inputs), with the context where there is one."""
        arguments = (inputs,) if self._context is None else (inputs, self._context)
        if self._state is None:
            return self._net(*arguments)
        net = cast(nn.Module, self._net)
        return torch.func.functional_call(net, self._state, arguments, tie_weights=False)

    def split(self) -> tuple[list[Tensor], Rebuild]:
        """Return the context and what a module is made of now, which it may not be later.

        `functional_call` takes back what it lent, and weights may be loaded. A module that is as it
        was is called as it is.
        """
        net, has_context = self._net, self._context is not None
        saved, rest = state_of(net) if self._state is None else (self._state, {})
        names = list(saved)

        def rebuild(tensors: Sequence[Tensor]) -> OpaqueFunction:
            remaining = iter(tensors)
            context = next(remaining) if has_context else None
            then = {**rest, **dict(zip(names, remaining, strict=True))}
            now = _tensors_by_name(net)
            is_as_it_was = all(now.get(name) is each for name, each in then.items())
            return OpaqueFunction(net, context, None if is_as_it_was else then)

        return [*([] if self._context is None else [self._context]), *saved.values()], rebuild

    def select(self, rows: Tensor | slice) -> OpaqueFunction:
        """Return the same function with the context of `rows` only."""
        if self._context is None:
            return self
        return OpaqueFunction(self._net, select_rows(self._context, rows), self._state)


def state_of(net: object) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what a module is made of by names: what a graph is to save, and what only to refer to.

    It saves parameters, and buffers that a derivative or `torch.func` goes through. Other buffers
    may change in each pass, as running means do.
    """
    if not isinstance(net, nn.Module):
        return {}, {}
    saved: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    for place, module in net.named_modules():
        prefix = f"{place}." if place else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                saved[prefix + name] = parameter
        for name, buffer in module._buffers.items():
            if buffer is not None:
                (saved if _is_lent(buffer) else rest)[prefix + name] = buffer
    return saved, rest


def _is_lent(buffer: Tensor) -> bool:
    is_compiling = torch.compiler.is_compiling()
    is_wrapped = not is_compiling and torch._C._functorch.is_functorch_wrapped_tensor(buffer)
    return is_wrapped or buffer.requires_grad


def _tensors_by_name(net: object) -> dict[str, Tensor]:
    saved, rest = state_of(net)
    return {**saved, **rest}


def _validated_claim(net: object) -> float | None:
    """Return the bound of Lip(g) that a network claims, None if it claims none."""
    claimed = getattr(net, "lipschitz", None)
    if claimed is None:
        return None
    if isinstance(claimed, bool) or not isinstance(claimed, (int, float)) or not 0 <= claimed < 1:
        raise ValueError(
            f"{type(net).__name__}.lipschitz must be a number in [0, 1), a guaranteed bound of "
            f"Lip(g), got {claimed!r}; set it to None where nothing is guaranteed"
        )
    return float(claimed)


def select_rows(values: Tensor, rows: Tensor | slice) -> Tensor:
    """Return some rows of values (B, *); a single row that stands for all stays as it is."""
    return values if values.shape[0] == 1 else values[rows]


def bind(net: Callable[..., Tensor], context: Tensor | None = None) -> ResidualFunction:
    """Fix the weights and the context of a network for one call.

    A network with hooks is called as it is, so that they fire, and differentiated automatically.

    Args:
        net: a `ResidualFunction` (returned as it is), a module with a method
            `bind(context) -> ResidualFunction`, or any callable of (inputs) or (inputs, context);
            an attribute `lipschitz` of the last is taken as a guaranteed bound of Lip(g).
        context: shape (B, C), or None.

    Returns:
        The function x -> g(x; context).

    Raises:
        ValueError: if a subclass has another `forward`, and not the `bind` that goes with it.

    Example:
        >>> import torch
        >>> function = bind(torch.nn.Linear(3, 3))
        >>> function.linearize(torch.zeros(5, 3)).jacobian().shape
        torch.Size([5, 3, 3])
    """
    if isinstance(net, ResidualFunction):
        return net
    net = _without_compiler(net)
    if isinstance(net, nn.Module) and hasattr(net, "bind") and not is_hooked(net):
        _refuse_forward_that_is_passed_by(net)
        return net.bind(context)  # type: ignore[operator]
    return OpaqueFunction(net, context)


def _without_compiler(net: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return what `torch.compile` was given, whose `bind` is what is called."""
    return getattr(net, "_orig_mod", net) if isinstance(net, nn.Module) else net


def _refuse_forward_that_is_passed_by(net: nn.Module) -> None:
    """Refuse a network whose `forward` is not the one that its `bind` goes with."""
    if "forward" in vars(net) or _passes_by(type(net)):
        name = type(net).__name__
        raise ValueError(
            f"{name} has a `forward` of its own, which `bind` passes by: implement `bind`, too, or "
            "make a network of its own with an attribute `lipschitz`, that calls this one"
        )


def _passes_by(kind: type[nn.Module]) -> bool:
    """Whether a class replaces the `forward` of the one that has its `bind`, and not `bind`."""
    depth = depth_of(kind, "bind")
    if depth == len(kind.__mro__):
        return False
    has_own = getattr(kind.__mro__[depth], "forward", None) is not nn.Module.forward
    return has_own and depth_of(kind, "forward") < depth


def depth_of(kind: type, name: str) -> int:
    """Return how far up, among the classes that a class is made of, a method is defined.

    Their number where it is in none.
    """
    depths = (index for index, each in enumerate(kind.__mro__) if name in vars(each))
    return next(depths, len(kind.__mro__))


def bind_all(
    nets: Sequence[Callable[..., Tensor]], context: Tensor | None = None
) -> list[ResidualFunction]:
    """Bind several networks to one context: `[bind(net, context) for net in nets]`, but cheaper.

    Networks of one class that have the same `binding_key` share the work: many small normalisations
    become one. A network takes part that has two methods beside `bind`: `binding_key()`, what it
    must have in common with others, or None to be bound alone; and the class method
    `bind_together(nets, context)`, which returns what `bind(context)` returns for each of several
    networks with one key.

    Args:
        nets: see `bind`.
        context: shape (B, C), or None.

    Example:
        >>> len(bind_all([torch.tanh, torch.nn.Linear(3, 3)]))
        2
    """
    alike: dict[Hashable, list[int]] = {}
    nets = list(map(_without_compiler, nets))
    for index, net in enumerate(nets):
        binding_key = getattr(net, "binding_key", None)
        key = None if binding_key is None else binding_key()
        if key is not None and isinstance(net, nn.Module):
            _refuse_forward_that_is_passed_by(net)
        alike.setdefault(index if key is None else (type(net), key), []).append(index)
    bound: dict[int, ResidualFunction] = {}
    for indices in alike.values():
        first: Any = nets[indices[0]]
        functions = (
            first.bind_together([nets[index] for index in indices], context)
            if len(indices) > 1
            else [bind(first, context)]
        )
        bound.update(zip(indices, functions, strict=True))
    return [bound[index] for index in range(len(nets))]


def linearize(
    net: Callable[..., Tensor], inputs: Tensor, context: Tensor | None = None
) -> Linearization:
    """Return g at `inputs` as a linear operator; short for `bind(net, context).linearize(inputs)`.

    Args:
        net: see `bind`.
        inputs: the points, shape (B, *).
        context: shape (B, C), or None.

    Example:
        >>> import torch
        >>> at = linearize(torch.tanh, torch.zeros(2, 3))
        >>> at.trace()
        tensor([3., 3.])
    """
    return bind(net, context).linearize(inputs)
