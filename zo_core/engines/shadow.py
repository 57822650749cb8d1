"""Probes that never touch the weights: a parameter that is read during an evaluation answers with a perturbed copy.

During an evaluation trainable tensors are of a class that intercepts torch functions. One that is given such tensors
gets theta + c z, made at that moment in scratch memory, and the weights stay as they are: nothing to restore, whatever
happens. An embedding gets only the rows it looks up. Once parameters are known to be read in one order, copies are made
of several ahead, and take their places in their modules until the memory is needed.
"""

import threading
import warnings
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import lru_cache
from inspect import getattr_static
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..weights import ParamSpace, Probe, some
from .base import uninterrupted
from .scratch import NOTHING, Key, Make, Slot, aligned

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
_AUTOCAST = {functional.linear, torch.matmul, torch.mm, torch.bmm, torch.addmm}  # autocast casts all they are given
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that copies may have
_AHEAD = 256 << 20  # bytes of copies made in one pass, at most: fewer, longer passes
_LEAST = 256 << 10  # bytes of scratch that are worth a shorter step, however small the layers
_CHECKS = 64  # evaluations, at most, that finding tensors read past torch's functions may take
_LOOK = 16  # steps between two looks at what modules have, while parameters are read in the same order
_FLAT = 8  # times that the comparison is made again while the closure's result does not change
_OUTSIDE = "weights change in opt.step only: write them outside it, or use engine='inplace'"
_PATTERN = 0x3C  # of bytes: 0.0115 in float32 and bfloat16, 1.06 in float16


class Perturbed(Tensor):
    """What parameters are during an evaluation: functions of their values get those of theta + c z.

    Each engine has a subclass of its own.
    """

    engine: ClassVar["ShadowEngine"]
    _is_param = True  # isinstance(x, nn.Parameter)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call func with copies where the engine's parameters are."""
        kwargs, parameters, nested = kwargs or {}, [], False
        for a in (*args, *kwargs.values()) if kwargs else args:
            if type(a) is cls:
                parameters.append(a)
            elif type(a) in (tuple, list, dict):
                nested = True
        if nested or not parameters:
            parameters, nested = [], True
            _map((args, kwargs), cls, parameters.append)
        engine, asks = cls.engine, _asks(func)
        if asks == "about":
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if (rows := engine.call(func, asks, parameters, args, kwargs)) is not None:
            return rows
        kind = engine.device.type
        casts = func in _AUTOCAST and torch.is_autocast_enabled(kind)
        copies = engine.read(parameters, torch.get_autocast_dtype(kind) if casts else None, keep=asks == "address")
        if nested:
            args, kwargs = _map((args, kwargs), cls, lambda p: copies[id(p)])
        else:
            args = tuple([copies[id(a)] if type(a) is cls else a for a in args])
            if kwargs:
                kwargs = {k: copies[id(v)] if type(v) is cls else v for k, v in kwargs.items()}
        return func(*args, **kwargs)


def _map(x: Any, cls: type, f: Callable[[Any], Any]) -> Any:
    """X with f of each object of this class inside lists, tuples and dicts."""
    if type(x) is cls:
        return f(x)
    if isinstance(x, tuple | list):
        items = [_map(y, cls, f) for y in x]
        return type(x)(*items) if hasattr(x, "_fields") else tuple(items) if isinstance(x, tuple) else items
    return {k: _map(v, cls, f) for k, v in x.items()} if type(x) is dict else x


@lru_cache(4096)
def _asks(func: Callable[..., Any]) -> str:
    """What a torch function asks of a tensor: what is known "about" it, its "address", to "write" it, or its "values"."""
    name = getattr(func, "__name__", "")
    if (func.__self__.__name__ in _PROPERTIES) if name in ("__get__", "__set__") else (name in _METHODS):  # type: ignore[attr-defined]
        return "about"
    if name == "__set__" or name in _MUTATORS or (name.endswith("_") and not name.endswith("__")):
        return "write"
    return "address" if name in _ADDRESSES else "values"


def _parameters(root: nn.Module) -> list[dict[str, Any]]:
    """Of ``root.modules()``, but of scripted ones; without its generators, which take half a millisecond for 300 modules."""
    modules, seen = [root], {root}
    for module in modules:
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                modules.append(child)
    return [m._parameters for m in modules if isinstance(m._parameters, dict)]


_Plan = tuple[tuple[Key, ...], int]  # what is copied together, and its bytes


class ShadowEngine:
    """Evaluates at theta + c z without writing theta: bit-identical weights after any number of probes.

    Copies live in two scratch buffers, each as large as the largest tensors that one torch function was given
    (``memory``). At the first evaluation the closure is called once more, with other numbers where the parameters are: a
    tensor whose change shows is read past torch's functions. It is perturbed in place instead, for the whole of each
    evaluation, and put back from a copy; a warning names it.
    """

    def __init__(self, space: ParamSpace, module: nn.Module) -> None:
        self.space, self.module = space, module
        self._numbers = {id(p): i for i, p in enumerate(space.tensors)}
        self.device = space.counters.device
        self._lock = threading.RLock()  # modules may run in threads of their own
        self._kept: list[Tensor] = []  # copies whose address was asked for
        self._slots: list[Slot] = []  # least recently used first
        with torch.inference_mode(False):
            most = len(_DTYPES) * len(space.tensors)  # copies in one pass
            self._uncounted = space.counters.new_zeros(1 + most)  # a probe that saturates harms no weight
        self._next: dict[Key, Key] = {}  # what was read after what
        self._plans: dict[tuple[Key, ...], _Plan] = {}  # what is copied when these are read
        self._last: Key | None = None
        self._surprised, self._steady = False, False  # in this evaluation; whether the one before was without surprise
        self._branching = _branching(module, self._numbers)
        self._largest = 0  # bytes that one function needed
        self._held: dict[int, Tensor] = {}  # tensors that are perturbed in place, and their values
        self._look_in = 0  # steps until places are looked for again
        self._inside: set[int] = set()  # tensors that the module has, the last time it was looked at
        self._peak = 0
        self._checks = _FLAT  # comparisons that may still be made
        self._flat: Tensor | None = None  # the result that did not change
        self._class = type("Perturbed", (Perturbed,), {"engine": weakref.proxy(self)})
        self._classes: list[tuple[Tensor, type]] = []  # tensors of that class, and what they were before
        self._sources: list[Tensor] = []  # the weights, also while parameters have other data
        self._shapes: list[torch.Size] = []  # they had the last time
        self._places: dict[int, list[tuple[dict[str, Any], str]]] = {}  # of each tensor, in the modules' parameters
        self._written: list[int] = []  # held tensors that are perturbed
        self._left_out: frozenset[int] = frozenset()  # of the probe
        self._probe: Probe | None = None
        self._c, self._coeffs = 0.0, space.full(0.0)  # one for each copy
        self._hold(_out_of_reach(module, space.tensors, self._numbers))

    # ---- the engine --------------------------------------------------------------------------------------------

    def evaluate(
        self, closure: Callable[[], Tensor], c: float, probe: Probe | None, leave_out: Collection[int] = ()
    ) -> Tensor:
        """The closure's result at theta + c z(probe), z = 0 in tensors left out; at theta without a probe."""
        if probe is None or c == 0:
            self.restore()
            return closure()
        if self._checks:
            self._leave_out(())  # all are looked at, also those that this probe leaves out
            result = self._run(closure, c, probe)
            if not self._reads_elsewhere(closure, c, probe, result) and not leave_out:
                return result
        self._leave_out(leave_out)
        return self._run(closure, c, probe)

    def update(
        self, probes: Sequence[Probe], coeffs: Tensor, decay: Tensor, update: Tensor | None,
        curvature: Tensor | None = None, smoothing: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Theta <- (1 - decay) theta + s sum_k coeffs[k] z_k in one pass; arguments as in ``ParamSpace.update_``."""
        with uninterrupted():
            self.restore()
            self.space.update_(probes, coeffs, decay, update, None, curvature, smoothing)

    def restore(self) -> None:
        """Put the parameters back in their places, and what was perturbed in place back to its value."""
        self._end()
        for p, source in zip(self.space.tensors, self._sources, strict=False):  # none where nothing was evaluated
            if p.data_ptr() != source.data_ptr():
                p.data = source
        self._sources = []
        for slot in self._slots:
            slot.ahead = None

    def memory(self) -> dict[str, int]:
        """Bytes of scratch, the most so far, and of the copies of tensors that are perturbed in place."""
        return {"scratch": self._peak, "held": sum(t.nbytes for t in self._held.values())}

    # ---- one evaluation ----------------------------------------------------------------------------------------

    def _run(self, closure: Callable[[], Tensor], c: float, probe: Probe, changed: Sequence[int] = ()) -> Tensor:
        try:
            with uninterrupted():
                if changed:
                    self.restore()
                self._begin(c, probe, changed)
            result = closure()
            for slot in self._slots:
                self._check_unwritten(slot)
            self._steady = not self._surprised
            if self._surprised:
                self._look_in = 0
            with uninterrupted():
                self._end()
                if changed:
                    self.restore()
            return result
        except BaseException:
            with uninterrupted():
                self.restore()
            raise

    def _leave_out(self, which: Collection[int]) -> None:
        """Let the probe be zero there."""
        if self._left_out != (left_out := frozenset(which)):
            self.restore()
            self._left_out, self._plans = left_out, {}

    def _check_unwritten(self, slot: Slot) -> None:
        if slot.content is not NOTHING and slot.bytes._version != slot.version:
            names = ", ".join(self.space.names[i] for i, _ in slot.content.copies)
            raise RuntimeError(f"closure: it wrote one of {names} during an evaluation; {_OUTSIDE}")

    def _begin(self, c: float, probe: Probe, changed: Sequence[int]) -> None:
        """Let parameters answer with theta + c z; ``changed`` ones hold other numbers themselves."""
        tensors = self.space.tensors
        if not self._sources:
            self._find_sources()
        for slot in self._slots:
            made = slot.ahead if slot.ahead and slot.ahead[0] is probe and slot.ahead[1] == c else None
            slot.ahead, slot.content = made, made[2] if made else NOTHING
        self._last, self._surprised = None, False
        self._probe, self._c, self._coeffs = probe, c, self.space.full(c).repeat(1, len(_DTYPES))
        if which := [i for i in self._held if i not in self._left_out]:
            for i in which:
                self._held[i].copy_(self._sources[i])
            self._written = which
            held, sources = ([tensors[i] for i in which] for tensors in (self._held, self._sources))
            self._perturb(self.space.perturb(which, held, sources), held)
        for i, t in self._other_numbers(changed).items():
            tensors[i].data = t
        apart = {*self._held, *self._left_out}
        self._classes = [(p, type(p)) for i, p in enumerate(tensors) if i not in apart]
        for p, _ in self._classes:
            p.__class__ = self._class

    def _end(self) -> None:
        """Let parameters answer with theta."""
        for p, kind in self._classes:
            p.__class__ = kind
        for slot in self._slots:
            self._displace(slot)
        for i in self._written:
            self._sources[i].copy_(self._held[i])
        self._probe, self._kept, self._written, self._classes = None, [], [], []
        if not all(slot.free() for slot in self._slots):
            self._reclaim()

    def _find_sources(self) -> None:
        """The weights as they are, and where modules have them."""
        if taken := [i for i, p in enumerate(self.space.tensors) if isinstance(p, Perturbed)]:
            raise RuntimeError(
                f"step: {some([self.space.names[i] for i in taken])}: in use by the optimizer whose closure this is"
            )
        self._sources = [p.data for p in self.space.tensors]
        if (shapes := [t.shape for t in self._sources]) != self._shapes:
            self._shapes, self._plans = shapes, {}
            for slot in self._slots:
                slot.forget()
        if self._look_in > 0:
            self._look_in -= 1
            return
        self._places, self._look_in = {}, _LOOK
        for parameters in _parameters(self.module):
            for name, p in parameters.items():
                if (i := self._numbers.get(id(p))) is not None:
                    self._places.setdefault(i, []).append((parameters, name))
        absent, self._inside = self._inside - set(self._places), set(self._places)
        if absent:
            warnings.warn(
                f"{some([self.space.names[i] for i in sorted(absent)], 5)}: no longer a parameter of the module; if it was "
                "replaced, make a new optimizer",
                stacklevel=2,
            )
        for i in self._branching:
            self._places.pop(i, None)

    def _reclaim(self) -> None:
        """Put parameters where a closure has left their copies."""
        owners = {id(p.__dict__): p for p in self.space.tensors}
        for parameters in _parameters(self.module):
            for name, p in parameters.items():
                if p is not None and (owner := owners.get(id(p.__dict__))) is not None:
                    parameters[name] = owner

    def _perturb(self, make: Make, sources: list[Tensor]) -> None:
        """Write theta + c z of these tensors."""
        assert self._probe is not None
        n = len(sources)
        make(sources, self._probe, self._coeffs[:, :n], self._uncounted[: 1 + n])

    def call(
        self, func: Callable[..., Any], asks: str, parameters: Sequence[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor | None:  # fmt: skip
        """Refuse a call that cannot be served; an embedding's rows; None for what copies serve."""
        name = self.space.names[self._numbers[id(parameters[0])]]
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"{name} is perturbed as it is read, which a compiled function cannot see: compile the "
                "module before it is given to the optimizer, or use engine='inplace'"
            )
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise RuntimeError(f"{name} is read under a transform of torch.func: use engine='inplace'")
        written = args[:1] if asks == "write" else kwargs.get("out")
        if func is functional.embedding and type(args[1]) is self._class:
            i = self._numbers[id(args[1])]
            if kwargs.get("max_norm") is not None:
                written = args[1]
            elif args[0].numel() < self._shapes[i][0]:
                return self.read_rows(i, args[0])
        found: list[Tensor] = []
        if written is not None:
            _map(written, self._class, found.append)
        if found:
            name = self.space.names[self._numbers[id(found[0])]]
            raise RuntimeError(f"closure: {func.__name__} writes {name} during an evaluation; {_OUTSIDE}")
        return None

    def read(
        self, parameters: Sequence[Tensor], dtype: torch.dtype | None = None, keep: bool = False
    ) -> dict[int, Tensor]:
        """Perturbed copies by identity, in their own dtype or this one; kept until the evaluation ends, if asked."""
        numbers = [self._numbers[id(p)] for p in parameters]
        keys = tuple([(i, dtype or self._sources[i].dtype) for i in numbers])
        with self._lock:
            for key in keys:
                last, self._last = self._last, key
                if last not in (None, key) and self._next.get(last) != key != self._following(last, placed=False):
                    self._next[last], self._surprised, self._steady, self._plans = key, True, False, {}
            for slot in reversed(self._slots):
                if not [k for k in keys if k not in slot.content.copies]:
                    break
            else:
                slot = self._fill(keys)
            if slot.ahead is not None:
                slot.ahead = None
                self._place(slot)
            if slot is not self._slots[-1] and slot in self._slots:  # the one used last is the last to be taken again
                self._slots.append(self._slots.pop(0))
            # Leaves with requires_grad, and no views: matmul then folds a batch into rows, as it does for parameters.
            # Made for each read: that one of them is alive is what keeps the slot from being written again.
            copies = {
                id(p): slot.content.copies[k].detach().requires_grad_() for p, k in zip(parameters, keys, strict=True)
            }
            if keep:
                self._kept += copies.values()
            return copies

    def _fill(self, keys: tuple[Key, ...]) -> Slot:
        """Make copies, and those of what was read next the last time while there is room: fewer, longer passes."""
        wanted, nbytes = self._plans.get(keys) or self._plan(keys)
        sources, slot = [self._sources[i] for i, _ in wanted], self._slot(nbytes)
        slot.content, slot.ahead = NOTHING, None  # first: what it held must not count as the new layout's
        layout = slot.layout(wanted, self.space, sources)
        self._perturb(layout.make, sources)
        slot.content, slot.version = layout, slot.bytes._version
        self._place(slot)
        return slot

    def _plan(self, keys: tuple[Key, ...]) -> _Plan:
        """These, and what was read after them while there is room; kept until another order is seen."""
        wanted = dict.fromkeys(keys)
        end = sum(map(self._bytes, wanted))
        if end > self._largest:
            self._largest, self._plans = end, {}
        room, following = max(_LEAST, min(_AHEAD, self._largest)), self._following(keys[-1])
        while following is not None and following not in wanted and (more := end + self._bytes(following)) <= room:
            wanted[following], end = None, more
            following = self._following(following)
        return self._plans.setdefault(keys, (tuple(wanted), end))

    def _following(self, key: Key, placed: bool = True) -> Key | None:
        """What was read after this, of what this probe does not leave out; ``placed`` or read through its class."""
        passed = set(self._left_out)
        if not placed:
            passed.update(*[s.content.lent.keys() & self._places.keys() for s in self._slots if s.placed])
        following = self._next.get(key)
        for _ in self._sources:
            if following is None or following[0] not in passed:
                break
            following = self._next.get(following)
        return following

    def _place(self, slot: Slot) -> None:
        """Give modules the copies themselves: in the parameters' own dtypes, and where torch does the same with them."""
        if not self._steady or slot not in self._slots:
            return
        slot.placed = True
        for i, copy in slot.lend(self.space.tensors).items():
            p = self.space.tensors[i]
            for parameters, name in self._places.get(i, ()):
                if parameters.get(name) is p:
                    parameters[name] = copy
                else:
                    self._look_in = 0

    def _displace(self, slot: Slot) -> None:
        """Put the parameters themselves back."""
        if not slot.placed:
            return
        lent = slot.content.lent
        for i in lent:  # no name for a copy, which would be a reference to it
            for parameters, name in self._places.get(i, ()):
                if parameters.get(name) is lent[i]:
                    parameters[name] = self.space.tensors[i]
        slot.placed = False
        slot.take_back()

    def _bytes(self, key: Key) -> int:
        return aligned(self._sources[key[0]].numel() * key[1].itemsize)

    def read_rows(self, i: int, index: Tensor) -> Tensor:
        """Perturbed rows of a matrix, in the shape that an embedding returns."""
        assert self._probe is not None
        source, rows = self._sources[i], index.reshape(-1).to(torch.int64)
        inside = ((rows >= 0) & (rows < source.shape[0])).all()
        if rows.is_cuda:
            torch._assert_async(inside)  # no wait for the device, as torch's own check
        elif not inside:
            raise IndexError(f"embedding: index out of range in {self.space.names[i]}")
        out = torch.empty(rows.numel(), source.shape[1], dtype=source.dtype, device=source.device)
        counters = self._uncounted[:2]
        self.space.perturb_rows(i, source, rows, out, self._probe, self._coeffs[:, :1], counters)
        return out.view(*index.shape, -1)

    def _slot(self, nbytes: int) -> Slot:
        """Scratch of this size: the one of the two buffers that was free longest, else memory of its own.

        Rather not the one that holds what the next evaluation reads.
        """
        slots = sorted(self._slots, key=lambda s: s.ahead is not None) if len(self._slots) == 2 else []
        free = next((s for s in slots if self._freed(s)), None)
        if free is not None and free.bytes.nbytes >= nbytes:
            return free
        if free is not None:
            self._slots.remove(free)
            del slots, free  # before there is a larger one
        slot = Slot(nbytes, self.device)
        self._peak = max(self._peak, sum(s.bytes.nbytes for s in (*self._slots, slot)))
        if len(self._slots) < 2:
            self._slots.insert(0, slot)
        return slot

    def _freed(self, slot: Slot) -> bool:
        """Whether nobody has the slot's copies, when the modules have given theirs back."""
        self._check_unwritten(slot)
        self._displace(slot)
        return slot.free()

    # ---- tensors that are read elsewhere -----------------------------------------------------------------------

    def _hold(self, which: Sequence[int]) -> None:
        if which:
            self.restore()
            with torch.inference_mode(False):
                self._held |= {i: torch.empty_like(self.space.tensors[i].data) for i in which}
            names = [self.space.names[i] for i in which]
            size = sum(self._held[i].nbytes for i in which)
            warnings.warn(
                f"{some(names, 5)}: read elsewhere than by torch's functions (compiled or scripted code, an extension, "
                "a tensor that shares their memory). They are perturbed in place and put back from a copy, "
                f"{size / 2**20:.1f} MiB",
                stacklevel=2,
            )

    def _other_numbers(self, which: Sequence[int]) -> dict[int, Tensor]:
        """Other numbers in the shape of these tensors, for the time of an evaluation."""
        slot = max((s for s in self._slots if s.free()), key=lambda s: s.bytes.nbytes, default=None)
        if slot is not None and which:
            slot.bytes.fill_(_PATTERN)
        out = {}
        for i in which:
            source = self._sources[i]
            if slot is not None and source.nbytes <= slot.bytes.nbytes:
                out[i] = slot.view(0, source.shape, source.dtype)
            else:  # larger than anything that was read as a whole
                out[i] = torch.full((), 0.0115, dtype=source.dtype, device=source.device).expand(source.shape)
        return out

    def _reads_elsewhere(self, closure: Callable[[], Tensor], c: float, probe: Probe, result: Tensor) -> bool:
        """Whether tensors were found that the closure reads past torch's functions; they are held from now on."""
        if self._flat is not None and result != self._flat:  # the closure tells probes apart
            self._checks = min(self._checks, 0 if self._checks == _FLAT - 1 else 1)  # at last: compare once more
        if not self._checks or not result.isfinite():
            return False
        self._checks, self._flat = self._checks - 1, result
        noise: Tensor | None = None  # of a closure that is not the same each time

        def shows(which: Sequence[int]) -> bool:
            nonlocal noise
            try:
                seen = self._run(closure, c, probe, which)
            except Exception as error:
                error.add_note(
                    "zo_core: raised while the shadow engine looked for weights that are read past it, by calling the "
                    "closure with other numbers there; engine='inplace' does without"
                )
                raise
            if torch.equal(seen, result):
                return False
            if noise is None:
                noise = (self._run(closure, c, probe) - result).abs()
            return not bool((seen - result).abs() <= 10 * noise)

        found: list[int] = []
        groups = [[i for i in range(len(self.space.tensors)) if i not in self._held]]
        for _ in range(_CHECKS):
            if not groups:
                break
            group = groups.pop(0)
            if group and shows(group):
                half = len(group) // 2
                groups += [group[:half], group[half:]] if half else []
                found += [] if half else group
        found = sorted({*found, *(i for group in groups for i in group)})  # what was not looked at is not trusted
        self._hold(found)
        return bool(found)


def _out_of_reach(module: nn.Module, tensors: Sequence[Tensor], numbers: dict[int, int]) -> list[int]:
    """Numbers of the tensors whose values are read past torch's functions, as far as the structure shows."""
    memory: dict[int, list[int]] = {}
    for i, p in enumerate(tensors):
        if p.numel() and not p.is_meta:
            memory.setdefault(p.untyped_storage().data_ptr(), []).append(i)
    out = {i for i, p in enumerate(tensors) if type(p) not in (nn.Parameter, Tensor)}
    for m in module.modules():
        for t in _tensors([v for k, v in vars(m).items() if k != "_modules"]):
            if id(t) not in numbers and t.layout is torch.strided and not t.is_meta:
                out |= set(memory.get(t.untyped_storage().data_ptr(), ()))  # a view of a weight, say
        if "_orig_mod" in m._modules or m._compiled_call_impl or isinstance(m, torch.jit.ScriptModule):
            out |= {numbers[id(p)] for p in m.parameters() if id(p) in numbers}
    return sorted(out)


def _branching(module: nn.Module, numbers: dict[int, int]) -> set[int]:
    """Numbers of tensors that are not lent copies of: their modules do something else then, as torch's encoder layers."""
    # static: scripted modules have no forward to get
    forwards = {m: getattr_static(type(m), "forward", None) for m in module.modules()}
    names = {m: getattr(f, "__code__", _branching.__code__).co_names for m, f in forwards.items()}
    found = [m for m in names if "has_torch_function" in names[m]]
    found += [m for m in names if isinstance(m, nn.RNNBase)]  # which keep lists of what they find in their places
    return {numbers[id(p)] for m in found for p in m.parameters() if id(p) in numbers}


def _tensors(x: Any, depth: int = 4) -> Iterator[Tensor]:
    """Tensors in nested lists, tuples and dicts."""
    if isinstance(x, Tensor):
        yield x
    elif depth and isinstance(x, list | tuple | set | dict):
        for y in x.values() if isinstance(x, dict) else x:
            yield from _tensors(y, depth - 1)
