"""Interception: for the time of an evaluation, parameters give torch functions other values than their own.

Trainable tensors get another class while an evaluation runs. torch then hands every function that is called with one of
them to that class, which sorts the call by what it asks for (``_asks``):

- a question *about* the tensor (its shape, device, ``requires_grad``) is answered by the parameter itself;
- a *read* of its values gets what the engine says they are, ``Values.read``;
- its *address* or *data* are those of such values, which stay where they are until the evaluation ends;
- a *write* is refused, and so are compiled code and transforms of ``torch.func``, which do not come by here each time.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from ..weights import ParamSpace, some

_PROPERTIES = set(
    "shape dtype device layout ndim requires_grad is_leaf grad grad_fn names nbytes itemsize retains_grad output_nr "
    "_version is_cpu is_cuda is_mps is_xpu is_meta is_nested is_sparse is_quantized is_mkldnn _backward_hooks".split()
)
_METHODS = set(
    "requires_grad_ size dim ndimension numel nelement element_size stride storage_offset is_contiguous is_floating_point is_complex "
    "is_signed is_inference get_device __len__ __hash__ is_same_size has_names is_conj is_neg".split()
)
_ADDRESSES = {"data_ptr", "untyped_storage", "storage", "numpy", "__array__", "__dlpack__", "_typed_storage"}
_MUTATORS = {"__setitem__", *(f"__i{op}__" for op in "add sub mul truediv floordiv mod pow and or xor".split())}
_PRODUCTS = {  # functions that multiply by a matrix, with the place of the matrix among the arguments
    functional.linear: 1, torch.addmm: 2, torch.matmul: 1, torch.mm: 1, Tensor.matmul: 1, Tensor.__matmul__: 1, Tensor.mm: 1,
}  # fmt: skip
_AUTOCAST = {*_PRODUCTS, torch.bmm}  # autocast casts all they are given
UNTRACEABLE = "is perturbed when it is read, which a compiled function does once and for all"
WRITTEN = "weights change in opt.step only: write them outside of it"


class Values(Protocol):
    """The engine's values of parameters during an evaluation."""

    def read(self, i: int, dtype: torch.dtype | None, keep: bool) -> Tensor:
        """Values of tensor i, in this dtype or its own; ``keep``: at an address that is theirs until the evaluation ends."""
        ...

    def read_rows(self, i: int, index: Tensor) -> Tensor:
        """Rows of matrix i, as an embedding returns them: (*index.shape, columns)."""
        ...

    def product(self, i: int, x: Tensor, dtype: torch.dtype | None, transposed: bool, bias: Any) -> Tensor | None:
        """X times matrix i, or its transpose, plus a bias if there is one; None: the matrix is to be read for it.

        The bias is a tensor, or the number of one whose values the engine has. Asked only where the engine evaluates under ``torch.vmap``.
        """
        ...


class Intercepted(Tensor):
    """The class of parameters during an evaluation. Each ``Interception`` has a subclass of its own."""

    interception: ClassVar["Interception"]
    _is_param = True  # isinstance(x, nn.Parameter)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call func with the engine's values in the parameters' places."""
        if (asks := _asks(func)) != "about":
            return cls.interception.call(func, asks, args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


@lru_cache(4096)
def _asks(func: Callable[..., Any]) -> str:
    """What a torch function needs of a tensor: facts "about" it, its "address", its "values" or "data", or to "write" it."""
    name = getattr(func, "__name__", "")
    if (func.__self__.__name__ in _PROPERTIES) if name in ("__get__", "__set__") else (name in _METHODS):  # type: ignore[attr-defined]
        return "about"
    if name == "__set__" or name in _MUTATORS or (name.endswith("_") and not name.endswith("__")):
        return "write"
    if name == "__get__" and func.__self__.__name__ == "data":  # type: ignore[attr-defined]
        return "data"
    return "address" if name in _ADDRESSES else "values"


def _map(x: Any, kind: type, f: Callable[[Any], Any]) -> Any:
    """The same structure of lists, tuples and dicts, with ``f`` applied to each object of this class."""
    if type(x) is kind:
        return f(x)
    if isinstance(x, (tuple, list)):
        items = [_map(y, kind, f) if isinstance(y, (kind, tuple, list, dict)) else y for y in x]
        return type(x)(*items) if hasattr(x, "_fields") else tuple(items) if isinstance(x, tuple) else items
    return {k: _map(v, kind, f) for k, v in x.items()} if type(x) is dict else x


class Interception:
    """Intercepts what torch functions do with the tensors of a space, and with others, whose numbers follow."""

    def __init__(self, space: ParamSpace, values: Values, others: Sequence[Tensor] = ()) -> None:
        self._names, self._tensors, self._values = space.names, [*space.tensors, *others], weakref.proxy(values)
        self._numbers = {id(p): i for i, p in enumerate(self._tensors)}
        self._device_type = space.counters.device.type
        self._class = type("Intercepted", (Intercepted,), {"interception": weakref.proxy(self)})
        self._classes: list[tuple[Tensor, type]] = []  # tensors that are intercepted now, and what they were before
        self.level: int | None = None  # of torch.vmap, where the engine itself evaluates under it

    def start(self, which: Iterable[int]) -> None:
        """Intercept these tensors from now on."""
        for i in which:
            p = self._tensors[i]
            self._classes.append((p, type(p)))
            p.__class__ = self._class

    def stop(self) -> None:
        """Intercept none."""
        for p, kind in self._classes:
            p.__class__ = kind
        self._classes = []

    @contextmanager
    def without(self, which: Iterable[int]) -> Iterator[None]:
        """These tensors are ordinary parameters meanwhile."""
        kinds = {id(p): kind for p, kind in self._classes}
        inside = [p for i in which if id(p := self._tensors[i]) in kinds]
        try:
            for p in inside:
                p.__class__ = kinds[id(p)]
            yield
        finally:
            for p in inside if self._classes else ():
                p.__class__ = self._class

    def call(self, func: Callable[..., Any], asks: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a torch function with values in the places of parameters; RuntimeError for what cannot be served."""
        if torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() != self.level:
            self._refuse_transforms(args, kwargs)
        written = args[:1] if asks == "write" else kwargs.get("out")
        if func is functional.embedding and type(args[1]) is self._class:
            i = self._numbers[id(args[1])]
            if kwargs.get("max_norm") is not None:
                written = args[1]
            elif args[0].numel() < self._tensors[i].size(0):
                return self._values.read_rows(i, args[0])
        if written is not None and (names := self._named(written)):
            raise RuntimeError(f"closure: {func.__name__} writes {names[0]} during an evaluation; {WRITTEN}")
        kind = self._device_type
        dtype = torch.get_autocast_dtype(kind) if func in _AUTOCAST and torch.is_autocast_enabled(kind) else None
        served = func in _PRODUCTS and self.level is not None
        if served and (found := self._product(func, args, kwargs, dtype)) is not None:
            return found
        if asks == "data":
            func = Tensor.detach  # the same values, but writes to them are counted, and refused
        values, numbers, keep = self._values, self._numbers, asks == "address"
        args, kwargs = _map((args, kwargs), self._class, lambda p: values.read(numbers[id(p)], dtype, keep))
        return func(*args, **kwargs)

    def _product(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype | None
    ) -> Tensor | None:
        """What the engine says a product with an intercepted matrix is; None if it leaves that to torch."""
        place = _PRODUCTS[func]
        linear = func is functional.linear
        bias = (args[2] if len(args) > 2 else kwargs.get("bias")) if linear else args[0] if place == 2 else None
        if (
            len(args) <= place
            or type(args[place]) is not self._class
            or (kwargs and not (linear and [*kwargs] == ["bias"]))
        ):
            return None
        i, x = self._numbers[id(args[place])], args[place - 1]
        if type(x) is self._class or not isinstance(x, Tensor):
            return None
        if type(bias) is self._class:
            bias = self._numbers[id(bias)]
        found: Tensor | None = self._values.product(i, x, dtype, linear, bias)
        return found

    def _named(self, x: Any) -> list[str]:
        found: list[str] = []
        _map(x, self._class, lambda p: found.extend(self._names[(i := self._numbers[id(p)]) : i + 1]))
        return found

    def _refuse_transforms(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = next(iter(self._named((args, kwargs))), "a frozen weight")
        if torch.compiler.is_compiling():
            raise RuntimeError(f"{name} {UNTRACEABLE}")
        raise RuntimeError(f"{name} is read under a transform of torch.func: use engine='inplace'")


def refuse_nested(names: Sequence[str], tensors: Sequence[Tensor]) -> None:
    """RuntimeError if an evaluation of another optimizer has these tensors intercepted."""
    if taken := [n for n, p in zip(names, tensors, strict=True) if isinstance(p, Intercepted)]:
        raise RuntimeError(f"step: {some(taken)}: in use by the optimizer whose closure this is")
