r"""TensorFloat-32 kept out of what the package computes, whatever torch's settings allow.

With TensorFloat-32 a GPU rounds the inputs of float32 products to 10 bits: by default those of
convolutions, and all after `torch.set_float32_matmul_precision("high")`. Two things keep it out.

* `switched_off()`: torch's settings, old and new, say float32 for the duration of a block.
* A plain `loss.backward()` runs later, when the settings are the caller's again. So a product that
  is recorded becomes a node of ours, whose forward, backward and forward mode are each computed
  with the settings switched off. A product is a trilinear form T(a, b, c) = <a b, c>, and its three
  partial evaluations are each other's derivatives: one node serves derivatives of any order.
  `rerouted()` sends there the products that a block of code asks torch for.

Compiled graphs cannot change settings. There the products are operators of this package, which
change them when they run.

What that promises, and what is global: docs/guarantees.md#tensorfloat-32.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import wraps
from types import TracebackType
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

_F = TypeVar("_F", bound=Callable[..., Any])
_Key = tuple[str, str]
_FAMILIES: tuple[_Key, ...] = (("generic", "all"), ("cuda", "all"), ("mkldnn", "all"))
_PRODUCTS: tuple[_Key, ...] = (("cuda", "matmul"), ("mkldnn", "matmul"))
_CONVOLUTIONS: tuple[_Key, ...] = (
    ("cuda", "conv"),
    ("cuda", "rnn"),
    ("mkldnn", "conv"),
    ("mkldnn", "rnn"),
)
_KEYS = (*_FAMILIES, *_PRODUCTS, *_CONVOLUTIONS)
_NOT_KNOWN_TO_OLD: tuple[_Key, ...] = (("cuda", "all"), ("mkldnn", "conv"), ("mkldnn", "rnn"))
"""What may be short although the old settings can be read, and say that products are not."""
_SHORT = ("tf32", "bf16")
_HAS_KEYS = hasattr(torch._C, "_get_fp32_precision_getter")


class Allowed(NamedTuple):
    """Where torch's settings allow inputs to be rounded.

    Attributes:
        products: those of matrices.
        convolutions: those of convolutions, and of recurrent layers.
    """

    products: bool
    convolutions: bool


_NOTHING = Allowed(products=False, convolutions=False)


def _precision(key: _Key) -> str:
    """Return the new setting of a kind of operations, or of a family; torch has them from 2.9."""
    if not _HAS_KEYS:
        return "none"
    precision: str = torch._C._get_fp32_precision_getter(*key)
    return precision


def _is_short(key: _Key) -> bool:
    return _precision(key) in _SHORT


def _set_precision(key: _Key, precision: str) -> None:
    torch._C._set_fp32_precision_setter(*key, precision)


def _old_of_products() -> str | None:
    """Return the old setting; None where a new one was made that it cannot express."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def _old_of_convolutions() -> bool | None:
    """Return the old setting; None where a new one was made that it cannot express."""
    try:
        return bool(torch._C._get_cudnn_allow_tf32())
    except RuntimeError:
        return None


class _Settings:
    """Torch's settings as they are, to be switched off and restored.

    Families are switched off first: what inherits from them is then left alone, and still inherits
    when they are restored.
    """

    def __init__(self) -> None:
        self._products, self._convolutions = _old_of_products(), _old_of_convolutions()
        is_old = self._products == "highest" and self._convolutions is not None
        if is_old and not any(map(_is_short, _NOT_KNOWN_TO_OLD)):
            self._new = {}
        else:
            self._new = {key: _precision(key) for key in _KEYS}
        self.allowed = Allowed(
            products=self._is_any_short(_PRODUCTS) or self._products in ("high", "medium"),
            convolutions=self._is_any_short(_CONVOLUTIONS) or bool(self._convolutions),
        )

    def _is_any_short(self, keys: Sequence[_Key]) -> bool:
        return any(self._new.get(key) in _SHORT for key in keys)

    def switch_off(self) -> None:
        """Let all settings say float32, the old and the new in agreement where they were."""
        if self._new:
            self._lengthen(_FAMILIES)
            self._convolutions = _old_of_convolutions()
        if self._convolutions:
            torch._C._set_cudnn_allow_tf32(False)
        if self._new:
            self._lengthen(_KEYS)
            self._products = _old_of_products()
        if self._products in ("high", "medium"):
            torch.set_float32_matmul_precision("highest")

    def _lengthen(self, keys: Sequence[_Key]) -> None:
        for key in filter(_is_short, keys):
            _set_precision(key, "ieee")

    def restore(self) -> None:
        """Undo `switch_off`."""
        if self._products in ("high", "medium"):
            torch.set_float32_matmul_precision(self._products)
        if self._convolutions:
            torch._C._set_cudnn_allow_tf32(True)
        for key, precision in self._new.items():
            if _precision(key) != precision:
                _set_precision(key, precision)


class _Held:
    """The caller's settings while they are switched off: the first in saves, the last restores."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders = self._times = 0
        self._allowed = _NOTHING
        self._settings: _Settings | None = None

    def enter(self) -> Allowed:
        """Switch the settings off, unless they are, and return what the caller's allow."""
        with self._lock:
            if self._holders == 0:
                settings = _Settings()
                self._allowed = settings.allowed
                self._settings = settings if any(settings.allowed) else None
                self._times += 1
                if self._settings is not None:
                    self._settings.switch_off()
            self._holders += 1
            return self._allowed

    def leave(self) -> None:
        """Restore the caller's settings if nobody else needs them switched off."""
        with self._lock:
            try:
                if self._holders == 1 and self._settings is not None:
                    self._settings.restore()
            finally:
                self._holders -= 1

    def leave_others_behind(self, is_held_here: bool) -> None:
        """Go on in a forked process, which has but the thread that forked."""
        self._lock = threading.Lock()
        if not is_held_here and self._holders > 0 and self._settings is not None:
            self._settings.restore()
        self._holders = int(is_held_here)

    def are_products_long(self) -> bool:
        """Whether the caller's settings allow no short products, asked for without the lock."""
        times = self._times
        is_free = self._holders == 0
        is_long = _old_of_products() == "highest"
        return is_free and is_long and self._holders == 0 and self._times == times


_HELD = _Held()


class _Here(threading.local):
    """Of this thread.

    Attributes:
        depth: how many blocks it is in that switch the settings off.
        allowed: what the caller's settings allow, inside these.
        is_relaxed: whether it is in a block where the caller's settings count after all.
        is_rerouted: whether it is in a block whose products are made nodes of ours.
        is_recorded: whether a graph that outlives the block may be recorded.
    """

    depth = 0
    allowed = _NOTHING
    is_relaxed = False
    is_rerouted = False
    is_recorded = True


_HERE = _Here()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _HELD.leave_others_behind(_HERE.depth > 0))


class switched_off:  # noqa: N801
    """A block in which no setting of torch's allows TensorFloat-32.

    The settings belong to the process. Other threads see them switched off, too, while one thread
    is in such a block, and what is set meanwhile is lost at its end. Blocks may be nested, and
    overlap in several threads; exceptions restore the settings as well.
    """

    __slots__ = ()

    def __enter__(self) -> Allowed:
        if _HERE.depth == 0:
            _HERE.allowed = _HELD.enter()
        _HERE.depth += 1
        return _HERE.allowed

    def __exit__(self, *error: object) -> None:
        _HERE.depth -= 1
        if _HERE.depth == 0:
            _HELD.leave()


class _Marked:
    """A block in which an attribute of `_HERE` has a value."""

    __slots__ = ("_before", "_name", "_value")

    def __init__(self, name: str, value: bool) -> None:
        self._name, self._value = name, value

    def __enter__(self) -> None:
        self._before = getattr(_HERE, self._name)
        setattr(_HERE, self._name, self._value)

    def __exit__(self, *error: object) -> None:
        setattr(_HERE, self._name, self._before)


def relaxed() -> AbstractContextManager[object]:
    """Return a block in which the caller's settings count, unless one around it refuses.

    In compiled graphs they count for products of matrices only.
    """
    if torch.compiler.is_compiling() or _HERE.depth > 0:
        return nullcontext()
    return _Marked("is_relaxed", True)


def is_relaxed() -> bool:
    """Whether the caller's settings count here."""
    return not torch.compiler.is_compiling() and _HERE.is_relaxed


def unrecorded() -> AbstractContextManager[object]:
    """Return a block whose products are differentiated at once or never, if no graph is recorded.

    For `torch.func`, inside which a graph is always recorded. Where a compiler traces that,
    operators of ours cannot be differentiated, so that products are torch's.
    """
    if torch.compiler.is_compiling():
        return torch._C.DisableTorchFunction()
    if torch.is_grad_enabled():
        return nullcontext()
    return _Marked("is_recorded", False)


Work = Literal["matrices", "images", "anything"]
"""What a block computes: products of matrices and at most a few `conv2d`; many of these, for which
the settings are switched off once; or what code that is not of this package asks torch for."""


def full_products(work: Work = "matrices") -> AbstractContextManager[object]:
    """Return a block whose products are float32's, and those of their derivatives, at any time."""
    if torch.compiler.is_compiling():
        return _compiled(work)
    if work == "matrices" and not _HERE.is_relaxed and _HELD.are_products_long():
        return nullcontext()
    return _FullProducts(work)


class _FullProducts:
    __slots__ = ("_stack", "_work")

    def __init__(self, work: Work) -> None:
        self._work = work

    def __enter__(self) -> None:
        with ExitStack() as stack:
            allowed = stack.enter_context(switched_off())
            if _HERE.is_relaxed:
                stack.enter_context(_Marked("is_relaxed", False))
            needed = allowed.products or (allowed.convolutions and self._work == "anything")
            if needed and not _HERE.is_rerouted and _is_recorded():
                stack.enter_context(_Marked("is_rerouted", True))
                stack.enter_context(_Rerouted(allowed))
            self._stack = stack.pop_all()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)


def in_full_products(work: Work = "matrices") -> Callable[[_F], _F]:
    """Let calls of a function or method run in `full_products`, unless in a `relaxed` block."""

    def protect(function: _F) -> _F:
        @wraps(function)
        def protected(*args: Any, **kwargs: Any) -> Any:
            with nullcontext() if is_relaxed() else full_products(work):
                return function(*args, **kwargs)

        return cast(_F, protected)

    return protect


def _is_recorded() -> bool:
    """Whether products may be differentiated later, by a graph that nodes of ours can be in."""
    return (
        torch.is_grad_enabled() and _HERE.is_recorded and not torch.jit.is_tracing()  # type: ignore[attr-defined]
    )


def _compiled(work: Work) -> AbstractContextManager[object]:
    """Return a block for a compiler: torch compiles anew where the setting of products changes.

    It does not where that of convolutions does, so these are always operators of ours.
    """
    allowed = Allowed(products=_allows_products(), convolutions=True)
    if _is_exported() or not (allowed.products or work == "anything"):
        return nullcontext()
    return _Rerouted(allowed)


def constant_when_compiled(function: Callable[[], bool]) -> Callable[[], bool]:
    """Let a compiler take what a function returns for a constant, and not look into it.

    `torch.compiler.assume_constant_result` does the same, but imports the compiler for it.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_when_compiled
def _allows_products() -> bool:
    return _Settings().allowed.products


def _is_exported() -> bool:
    """Whether a program is made that has to run without this package."""
    is_exporting = getattr(torch.compiler, "is_exporting", None)
    return is_exporting is not None and bool(is_exporting())


Triple = Sequence[Any]
_LEFT, _RIGHT, _OUT = range(3)


class _Form(Protocol):
    """A trilinear form T(a, b, c) = <a b, c>; triples have None for the argument to derive by."""

    def evaluate(self, hole: int, triple: Triple, bias: Tensor | None = None) -> Tensor:
        """Return the derivative of T in the argument that is missing; a bias is added to a b."""

    def compiled(self, hole: int, triple: Triple) -> Tensor:
        """Return the same, without a bias, by an operator of this package."""

    def widened(self, bias: Tensor, dim: int) -> Tensor:
        """Return a bias as it is added to a product with so many dimensions."""

    def gradients(
        self, triple: Triple, bias_shape: torch.Size | None, is_needed: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        """Return those of a, b, c and the bias from a triple with the cotangent of a b for c."""


@dataclass(frozen=True)
class _Matrices:
    """The product of two matrices, or of two stacks of as many."""

    def evaluate(self, hole: int, triple: Triple, bias: Tensor | None = None) -> Tensor:
        left, right = _factors(hole, triple)
        if bias is None:
            return torch.mm(left, right) if left.dim() == 2 else torch.bmm(left, right)
        return (torch.addmm if left.dim() == 2 else torch.baddbmm)(bias, left, right)

    def compiled(self, hole: int, triple: Triple) -> Tensor:
        product: Tensor = torch.ops.nflows_iresnet.matrix_product(*_factors(hole, triple))
        return product

    def widened(self, bias: Tensor, dim: int) -> Tensor:
        return bias

    def gradients(
        self, triple: Triple, bias_shape: torch.Size | None, is_needed: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        left, right = [
            self.evaluate(place, triple) if is_needed[place] else None for place in (_LEFT, _RIGHT)
        ]
        of_bias = None if bias_shape is None else _summed_to(triple[_OUT], bias_shape)
        return left, right, None, of_bias


def _factors(hole: int, triple: Triple) -> tuple[Tensor, Tensor]:
    """Return the matrices whose product is the derivative in the argument that is missing."""
    left, right, out = triple
    if hole == _OUT:
        return left, right
    return (out, right.mT) if hole == _LEFT else (left.mT, out)


@dataclass(frozen=True)
class _Convolution:
    """The convolution of inputs a with a weight b, with the arguments of `torch.convolution`."""

    shapes: tuple[Sequence[int], Sequence[int]]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    transposed: bool
    output_padding: Sequence[int]
    groups: int

    @property
    def options(self) -> tuple[Any, ...]:
        return (
            list(self.stride),
            list(self.padding),
            list(self.dilation),
            self.transposed,
            list(self.output_padding),
            self.groups,
        )

    def evaluate(self, hole: int, triple: Triple, bias: Tensor | None = None) -> Tensor:
        return _convolution(hole, *triple, *self.shapes, *self.options, bias=bias)

    def compiled(self, hole: int, triple: Triple) -> Tensor:
        product: Tensor = torch.ops.nflows_iresnet.convolution_product(
            hole, *triple, *map(list, self.shapes), *self.options
        )
        return product

    def widened(self, bias: Tensor, dim: int) -> Tensor:
        return bias.reshape(-1, *[1] * (dim - 2))

    def gradients(
        self, triple: Triple, bias_shape: torch.Size | None, is_needed: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        inputs, weight, outputs = triple
        mask = [is_needed[_LEFT], is_needed[_RIGHT], is_needed[3]]
        left, right, of_bias = torch.ops.aten.convolution_backward(
            outputs, inputs, weight, bias_shape, *self.options, mask
        )
        return left, right, None, of_bias


def _convolution(
    hole: int,
    inputs: Tensor | None,
    weight: Tensor | None,
    outputs: Tensor | None,
    inputs_shape: Sequence[int],
    weight_shape: Sequence[int],
    *options: Any,
    bias: Tensor | None = None,
) -> Tensor:
    if hole == _OUT:
        return torch.ops.aten.convolution(inputs, weight, bias, *options)
    if inputs is None:
        inputs = outputs.new_empty(inputs_shape)  # type: ignore[union-attr]
    if weight is None:
        weight = outputs.new_empty(weight_shape)  # type: ignore[union-attr]
    mask = [hole == _LEFT, hole == _RIGHT, False]
    derivatives = torch.ops.aten.convolution_backward(outputs, inputs, weight, None, *options, mask)
    derivative: Tensor = derivatives[hole]
    return derivative


def _product(form: _Form, hole: int, *triple: Tensor | None, bias: Tensor | None = None) -> Tensor:
    """Return what a form gives, in full precision, as a node wherever a graph is recorded."""
    if torch.compiler.is_compiling():
        product = form.compiled(hole, triple)
        return product if bias is None else product + form.widened(bias, product.dim())
    if torch.is_grad_enabled():
        node: Tensor = _Product.apply(form, hole, *triple, bias)
        return node
    with _exactly(triple):
        return form.evaluate(hole, triple, bias)


def _exactly(tensors: Triple) -> AbstractContextManager[object]:
    """Return a block for one product, of a backward pass that may run inside autocast, too."""
    device = next(each.device.type for each in tensors if each is not None)
    if not torch.is_autocast_enabled(device):
        return switched_off()
    stack = ExitStack()
    stack.enter_context(torch.autocast(device, enabled=False))
    stack.enter_context(switched_off())
    return stack


class _Product(torch.autograd.Function):
    """A trilinear form's derivative in one argument, in full precision whenever it runs."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        form: _Form,
        hole: int,
        left: Tensor | None,
        right: Tensor | None,
        out: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        triple = left, right, out
        with _exactly(triple):
            return form.evaluate(hole, triple, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.form, ctx.hole, *triple, bias = inputs
        ctx.save_for_backward(*triple)
        ctx.save_for_forward(*triple)
        ctx.bias_shape = None if bias is None else bias.shape
        ctx.bias_wide = (
            None if bias is None else ctx.form.widened(bias.detach(), output.dim()).shape
        )

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        triple = _with(ctx.saved_tensors, ctx.hole, cotangent)
        if ctx.hole == _OUT and not torch.is_grad_enabled():
            with _exactly(triple):
                gradients = ctx.form.gradients(triple, ctx.bias_shape, ctx.needs_input_grad[2:])
            return None, None, *gradients
        found: list[Tensor | None] = [None, None, None]
        for place in range(3):
            if place != ctx.hole and ctx.needs_input_grad[2 + place]:
                found[place] = _product(ctx.form, place, *_with(triple, place, None))
        of_bias = None
        if ctx.needs_input_grad[5]:
            of_bias = _summed_to(cotangent, ctx.bias_wide).reshape(ctx.bias_shape)
        return None, None, *found, of_bias

    @staticmethod
    def jvp(ctx: Any, _: None, __: None, *tangents: Tensor | None) -> Tensor:
        *of_triple, of_bias = tangents
        terms = [
            _product(ctx.form, ctx.hole, *_with(ctx.saved_tensors, place, tangent))
            for place, tangent in enumerate(of_triple)
            if tangent is not None
        ]
        if of_bias is not None:
            terms.append(of_bias.reshape(ctx.bias_wide))
        total = sum(terms[1:], terms[0])
        return total


def _with(triple: Triple, place: int, value: Tensor | None) -> list[Tensor | None]:
    return [value if index == place else each for index, each in enumerate(triple)]


def _summed_to(values: Tensor, shape: torch.Size) -> Tensor:
    """Return the sum over the dimensions along which a shape was broadcast."""
    leading = values.dim() - len(shape)
    wide = [index + leading for index, size in enumerate(shape) if size == 1]
    dims = [*range(leading), *(index for index in wide if values.shape[index] != 1)]
    return (values.sum(dims, keepdim=True) if dims else values).reshape(shape)


class _Whole(torch.autograd.Function):
    """Any function of tensors in full precision, evaluated anew for its derivatives."""

    generate_vmap_rule = True

    @staticmethod
    def forward(function: Callable[..., Any], *tensors: Tensor) -> Any:
        with _exactly(tensors):
            return function(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.function, *tensors = inputs
        ctx.is_single = isinstance(output, Tensor)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        function, is_single, count = ctx.function, ctx.is_single, len(cotangents)

        @torch.enable_grad()  # without it, some backwards of torch's have no derivative
        def pullback(*given: Tensor) -> tuple[Tensor, ...]:
            pull = torch.func.vjp(function, *given[count:])[1]
            gradients: tuple[Tensor, ...] = pull(given[0] if is_single else given[:count])
            return gradients

        return None, *_whole(pullback, *cotangents, *ctx.saved_tensors)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Any:
        function, tensors = ctx.function, ctx.saved_tensors
        count = len(tensors)

        def push(*given: Tensor) -> Any:
            return torch.func.jvp(function, given[:count], given[count:])[1]

        pairs = zip(tangents, tensors, strict=True)
        known = [torch.zeros_like(each) if rate is None else rate for rate, each in pairs]
        return _whole(push, *tensors, *known)


def _whole(function: Callable[..., Any], *tensors: Tensor) -> Any:
    tensors = tuple(each.contiguous() for each in tensors)
    if torch.is_grad_enabled():
        return _Whole.apply(function, *tensors)
    with _exactly(tensors):
        return function(*tensors)


class _Rerouted(TorchFunctionMode):
    """Makes nodes of ours of the products that a block asks torch for, where they matter."""

    def __init__(self, allowed: Allowed) -> None:
        super().__init__()
        self._allowed = allowed

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        replacement = None
        if self._allowed.products:
            replacement = _OF_PRODUCTS.get(func)
        if replacement is None and self._allowed.convolutions:
            replacement = _OF_CONVOLUTIONS.get(func)
        if replacement is None or not _is_concerned(args, kwargs):
            return func(*args, **kwargs)
        return replacement(func, *args, **{k: v for k, v in kwargs.items() if k != "out"})


def _is_concerned(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a product is recorded, in float32, without autocast that would shorten it anyway."""
    first = next((each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)), None)
    if first is None:
        is_single, device = True, "cpu"  # a list of tensors
    else:
        is_single, device = first.dtype == torch.float32, first.device.type
    if not is_single or kwargs.get("out") is not None or torch.is_autocast_enabled(device):
        return False
    return torch.compiler.is_compiling() or _is_recorded()


def conv2d(
    inputs: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int] = (0, 0)
) -> Tensor:
    """Return `torch.nn.functional.conv2d` in full precision, and its derivatives at any time.

    Args:
        inputs: shape (B, in, H, W).
        weight: shape (out, in, k_1, k_2).
        bias: shape (out,), or None.
        padding: zeros around an image.
    """
    if torch.compiler.is_compiling():
        is_left_alone = torch._C._is_torch_function_all_disabled() or _is_exported()
        if inputs.dtype != torch.float32 or is_left_alone:
            return F.conv2d(inputs, weight, bias, padding=padding)
        return _convolve(F.conv2d, inputs, weight, bias, padding=padding)
    if _HERE.is_relaxed or inputs.dtype != torch.float32:
        return F.conv2d(inputs, weight, bias, padding=padding)
    with switched_off() as allowed:
        if (
            allowed.convolutions
            and _is_recorded()
            and not torch.is_autocast_enabled(inputs.device.type)
        ):
            return _convolve(F.conv2d, inputs, weight, bias, padding=padding)
        return F.conv2d(inputs, weight, bias, padding=padding)


def conv2d_weight(
    of_outputs: Tensor, inputs: Tensor, weight: Tensor, padding: tuple[int, int] = (0, 0)
) -> Tensor:
    """Return the derivative of <v, conv2d(x, W)> in the weight W, and its derivatives at any time.

    Args:
        of_outputs: v, shape (B, out, H, W).
        inputs: x, shape (B, in, H, W).
        weight: W, shape (out, in, k_1, k_2), of which the shape counts alone.
        padding: zeros around an image.
    """
    shapes = tuple(inputs.shape), tuple(weight.shape)
    form = _Convolution(shapes, (1, 1), padding, (1, 1), False, (0, 0), 1)
    if _HERE.is_relaxed:
        return form.evaluate(_RIGHT, (inputs, None, of_outputs))
    return _product(form, _RIGHT, inputs, None, of_outputs)


def _convolve(
    func: object,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    dim = weight.dim() - 2
    if isinstance(padding, str):
        rates = zip(_each(dilation, dim), weight.shape[2:], strict=True)
        margins = [rate * (size - 1) if padding == "same" else 0 for rate, size in rates]
        input = F.pad(input, [end for each in margins[::-1] for end in (0, each % 2)])
        padding = [each // 2 for each in margins]
    options = _each(stride, dim), _each(padding, dim), _each(dilation, dim), False, (0,) * dim
    return _convolved(input, weight, bias, *options, groups)


def _convolve_transposed(
    func: object,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    dim = weight.dim() - 2
    given = (_each(each, dim) for each in (stride, padding, dilation))
    return _convolved(input, weight, bias, *given, True, _each(output_padding, dim), groups)


def _each(value: int | Sequence[int], dim: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * dim
    return tuple(value) * dim if len(value) == 1 else tuple(value)


def _convolved(inputs: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    is_single = inputs.dim() == weight.dim() - 1
    batch = inputs[None] if is_single else inputs
    form = _Convolution((tuple(batch.shape), tuple(weight.shape)), *options)
    outputs = _product(form, _OUT, batch, weight, None, bias=bias)
    return outputs[0] if is_single else outputs


def _linear(func: object, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if weight.dim() != 2:
        outputs = _matmul(func, input, weight)
        return outputs if bias is None else outputs + bias
    rows = input.reshape(-1, input.shape[-1])
    outputs = _product(_Matrices(), _OUT, rows, weight.mT, None, bias=bias)
    return outputs.reshape(*input.shape[:-1], weight.shape[0])


def _matmul(func: object, input: Tensor, other: Tensor) -> Tensor:
    if input.dim() == 1:
        return _matmul(func, input[None], other).squeeze(-1 if other.dim() == 1 else -2)
    if other.dim() == 1:
        return _matmul(func, input, other[:, None]).squeeze(-1)
    if input.dim() == other.dim() == 2:
        return _product(_Matrices(), _OUT, input, other, None)
    if other.dim() == 2:
        rows = _product(_Matrices(), _OUT, input.reshape(-1, input.shape[-1]), other, None)
        return rows.reshape(*input.shape[:-1], other.shape[-1])
    if input.dim() == 2:
        return _matmul(func, other.mT, input.mT).mT
    stack = torch.broadcast_shapes(input.shape[:-2], other.shape[:-2])
    left, right = [
        each.expand(*stack, *each.shape[-2:]).reshape(-1, *each.shape[-2:])
        for each in (input, other)
    ]
    products = _product(_Matrices(), _OUT, left, right, None)
    return products.reshape(*stack, *products.shape[-2:])


def _matmul_reversed(func: object, right: Tensor, left: Tensor) -> Tensor:
    return _matmul(func, left, right)


def _matrices(func: object, input: Tensor, mat2: Tensor) -> Tensor:
    return _product(_Matrices(), _OUT, input, mat2, None)


def _added(
    func: Callable[..., Tensor],
    input: Tensor,
    *factors: Tensor,
    beta: float = 1,
    alpha: float = 1,
    **named: Tensor,
) -> Tensor:
    left, right = (*factors, *(named[name] for name in sorted(named)))
    if beta == alpha == 1:
        return _product(_Matrices(), _OUT, left, right, None, bias=input)
    products = alpha * _product(_Matrices(), _OUT, left, right, None)
    return products + beta * input if beta != 0 else products


def _any(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Evaluate a function of torch's whose derivatives have no form of their own here."""
    leaves, structure = pytree.tree_flatten((args, kwargs))
    places = [index for index, each in enumerate(leaves) if _is_single(each)]
    if not places or torch.compiler.is_compiling():
        return func(*args, **kwargs)
    kinds: list[type] = []

    def function(*tensors: Tensor) -> Any:
        given = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            given[place] = tensor
        again, named = pytree.tree_unflatten(given, structure)
        result = func(*again, **named)
        kinds.append(type(result))
        return result if isinstance(result, Tensor) else tuple(result)

    result = _whole(function, *[leaves[place] for place in places])
    return result if isinstance(result, Tensor) else kinds[0](result)


def _is_single(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.float32


_Replacement = Callable[..., Any]

_OF_CONVOLUTIONS: dict[Callable[..., Any], _Replacement] = {
    torch.conv1d: _convolve,
    torch.conv2d: _convolve,
    torch.conv3d: _convolve,
    torch.conv_transpose1d: _convolve_transposed,
    torch.conv_transpose2d: _convolve_transposed,
    torch.conv_transpose3d: _convolve_transposed,
}

_DECOMPOSITIONS = [
    "cholesky",
    "cond",
    "det",
    "eigh",
    "eigvalsh",
    "inv",
    "lstsq",
    "lu",
    "lu_factor",
    "lu_solve",
    "matrix_exp",
    "matrix_norm",
    "matrix_power",
    "multi_dot",
    "norm",
    "pinv",
    "qr",
    "slogdet",
    "solve",
    "solve_triangular",
    "svd",
    "svdvals",
    "tensorinv",
    "tensorsolve",
]

_OLD_DECOMPOSITIONS = [
    "svd",
    "qr",
    "cholesky",
    "cholesky_solve",
    "cholesky_inverse",
    "triangular_solve",
    "chain_matmul",
]
"""Torch has removed some of their kind, and will remove others."""

_OF_PRODUCTS: dict[Callable[..., Any], _Replacement] = {
    F.linear: _linear,
    torch.matmul: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.__matmul__: _matmul,
    torch.Tensor.__rmatmul__: _matmul_reversed,
    torch.linalg.matmul: _matmul,
    torch.mm: _matrices,
    torch.Tensor.mm: _matrices,
    torch.bmm: _matrices,
    torch.Tensor.bmm: _matrices,
    torch.addmm: _added,
    torch.Tensor.addmm: _added,
    torch.baddbmm: _added,
    torch.Tensor.baddbmm: _added,
} | dict.fromkeys(
    (
        torch.mv,
        torch.Tensor.mv,
        torch.addmv,
        torch.Tensor.addmv,
        torch.addbmm,
        torch.Tensor.addbmm,
        torch.inner,
        torch.Tensor.inner,
        torch.einsum,
        torch.tensordot,
        torch.bilinear,
        torch.matrix_exp,
        torch.matrix_power,
        torch.inverse,
        torch.pinverse,
        torch.slogdet,
        torch.logdet,
        torch.det,
        *(getattr(torch, name) for name in _OLD_DECOMPOSITIONS if hasattr(torch, name)),
        *(getattr(torch.linalg, name) for name in _DECOMPOSITIONS),
    ),
    _any,
)


def _matrix_product(left: Tensor, right: Tensor) -> Tensor:
    with switched_off():
        return torch.mm(left, right) if left.dim() == 2 else torch.bmm(left, right)


def _convolution_product(hole: int, *args: Any) -> Tensor:
    with switched_off():
        return _convolution(hole, *args)


_MATRIX_OPERATOR = torch.library.custom_op(
    "nflows_iresnet::matrix_product",
    _matrix_product,
    mutates_args=(),
    schema="(Tensor left, Tensor right) -> Tensor",
)
_CONVOLUTION_OPERATOR = torch.library.custom_op(
    "nflows_iresnet::convolution_product",
    _convolution_product,
    mutates_args=(),
    schema="(int hole, Tensor? inputs, Tensor? weight, Tensor? outputs, SymInt[] inputs_shape, "
    "SymInt[] weight_shape, SymInt[] stride, SymInt[] padding, SymInt[] dilation, "
    "bool transposed, SymInt[] output_padding, SymInt groups) -> Tensor",
)


@_MATRIX_OPERATOR.register_fake
def _(left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty(*left.shape[:-1], right.shape[-1])


@_CONVOLUTION_OPERATOR.register_fake
def _(hole: int, *args: Any) -> Tensor:
    return _convolution(hole, *args)


def _save_matrices(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _matrix_backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, Tensor | None]:
    multiply = torch.ops.nflows_iresnet.matrix_product
    left, right = ctx.saved_tensors
    needs_left, needs_right = ctx.needs_input_grad
    of_left = multiply(cotangent, right.mT) if needs_left else None
    return of_left, multiply(left.mT, cotangent) if needs_right else None


def _save_convolution(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.hole, *triple = inputs[:4]
    ctx.options = inputs[4:]
    ctx.save_for_backward(*triple)


def _convolution_backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
    triple = _with(ctx.saved_tensors, ctx.hole, cotangent)
    found: list[Tensor | None] = [None, None, None]
    for place in range(3):
        if place != ctx.hole and ctx.needs_input_grad[1 + place]:
            found[place] = torch.ops.nflows_iresnet.convolution_product(
                place, *_with(triple, place, None), *ctx.options
            )
    return None, *found, *[None] * len(ctx.options)


_MATRIX_OPERATOR.register_autograd(_matrix_backward, setup_context=_save_matrices)
_CONVOLUTION_OPERATOR.register_autograd(_convolution_backward, setup_context=_save_convolution)
