"""Probes that never touch the weights: a parameter that is read during an evaluation answers with a perturbed copy.

During a step, a stand-in has each trainable tensor's place in its modules. A torch function that is given stand-ins
gets theta + c z, made at that moment in scratch memory, and the parameters stay as they are: nothing to restore,
whatever happens. An embedding gets only the rows it looks up. Once parameters are known to be read in one order, copies
are made of several ahead, and take the place of their stand-ins until the memory is needed.
"""

import threading
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import lru_cache
from inspect import getattr_static
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..space import ParamSpace, Probe, some
from .base import uninterrupted

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
_ALIGNMENT = 64
_AHEAD = 256 << 20  # bytes of copies made in one pass, at most: fewer, longer passes
_LEAST = 256 << 10  # bytes of scratch that are worth a shorter step, however small the layers
_LAYOUTS = 1024  # of a buffer that are remembered
_CHECKS = 64  # evaluations, at most, that finding tensors read outside their modules may take
_FLAT = 8  # times that the comparison is made again while the closure's result does not change
_OUTSIDE = "weights change in opt.step only: write them outside it, or use engine='inplace'"
_PATTERN = 0x3C  # of bytes: 0.0115 in float32 and bfloat16, 1.06 in float16


class StandIn(Tensor):
    """In place of a parameter: its values are those of theta + c z, all else is the parameter's."""

    _engine: "ShadowEngine"
    _number: int
    _key: "_Key"
    _parameter: Tensor
    _is_param: bool  # True: isinstance(x, nn.Parameter)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call func with what the stand-ins stand for."""
        kwargs, stands, nested = kwargs or {}, [], False
        for a in (*args, *kwargs.values()) if kwargs else args:
            if type(a) is cls:
                stands.append(a)
            elif type(a) in (tuple, list, dict):
                nested = True
        if nested or not stands:
            stands, nested = [], True
            _map((args, kwargs), stands.append)
        engine, asks = stands[0]._engine, _asks(func)
        if asks == "about" or not engine.evaluating:
            args, kwargs = _map((args, kwargs), lambda s: s._parameter)
        elif (rows := engine.call(func, asks, stands, args, kwargs)) is not None:
            return rows
        else:
            kind = engine.device.type
            casts = func in _AUTOCAST and torch.is_autocast_enabled(kind)
            copies = engine.read(stands, torch.get_autocast_dtype(kind) if casts else None, keep=asks == "address")
            if nested:
                args, kwargs = _map((args, kwargs), lambda s: copies[s._number])
            else:
                args = tuple([copies[a._number] if type(a) is cls else a for a in args])
                if kwargs:
                    kwargs = {k: copies[v._number] if type(v) is cls else v for k, v in kwargs.items()}
        return func(*args, **kwargs)


def _map(x: Any, f: Callable[[StandIn], Any]) -> Any:
    """X with f of each stand-in inside lists, tuples and dicts."""
    if isinstance(x, StandIn):
        return f(x)
    if isinstance(x, tuple | list):
        items = [_map(y, f) for y in x]
        return type(x)(*items) if hasattr(x, "_fields") else tuple(items) if isinstance(x, tuple) else items
    return {k: _map(v, f) for k, v in x.items()} if type(x) is dict else x


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


_Key = tuple[int, torch.dtype]  # a tensor's number, and the dtype its copy has
_Plan = tuple[tuple[_Key, ...], int]  # what is copied together, and its bytes
_Make = Callable[[Sequence[Tensor], Probe, Tensor, Tensor], None]  # see ``ParamSpace.perturb``


class _Slot:
    """Scratch memory that is handed out in tensors; free again when none of them, nor a view of one, is alive."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        with torch.inference_mode(False):
            self.bytes = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._storage = self.bytes.untyped_storage()._cdata
        self.layouts: dict[tuple[_Key, ...], _Layout] = {}
        self.content: dict[_Key, Tensor] = {}  # one of the layouts, when it has been written
        self.version = 0  # of the memory, when it had been written
        self.placed: dict[int, Tensor] = {}  # content that modules have, in place of stand-ins
        self.ahead: tuple[Probe, float, dict[_Key, Tensor]] | None = None  # content of the evaluation that comes next
        self._own = self._users()

    def _users(self) -> int:
        return int(torch._C._storage_Use_Count(self._storage))

    def free(self) -> bool:
        return self._users() == self._own

    def view(self, at: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """A tensor from byte ``at`` on."""
        with torch.inference_mode(False):
            return self.bytes[at : at + shape.numel() * dtype.itemsize].view(dtype).view(shape).detach()

    def layout(self, keys: tuple[_Key, ...], space: ParamSpace, sources: list[Tensor]) -> "_Layout":
        """Tensors for these keys, in the shapes of their sources, one after the other; made anew if sources have moved."""
        where, found = [t.data_ptr() for t in sources], self.layouts.get(keys)
        if found is None or found.where != where:
            if found is not None or len(self.layouts) >= _LAYOUTS:  # or no order of reading repeats
                self.forget()
            copies, at, others = dict[_Key, Tensor](), 0, self._users() - self._own
            for key, source in zip(keys, sources, strict=True):
                copies[key] = self.view(at, source.shape, key[1])
                at += _aligned(source.numel() * key[1].itemsize)
            make = space.perturb([i for i, _ in keys], sources, list(copies.values()))
            found = self.layouts[keys] = _Layout(where, copies, make)
            self._own = self._users() - others
        return found

    def forget(self) -> None:
        """What was laid out."""
        others = self._users() - self._own
        self.layouts, self.content = {}, {}
        self._own = self._users() - others


class _Layout(NamedTuple):
    where: list[int]  # its sources are
    copies: dict[_Key, Tensor]
    make: _Make  # of ``copies``


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


class ShadowEngine:
    """Evaluates at theta + c z without writing theta: bit-identical weights after any number of probes.

    Copies live in two scratch buffers, each as large as the largest tensors that one torch function was given
    (``memory``). At the first evaluation the closure is called once more, with other numbers where the parameters are: a
    tensor whose change shows is read past its stand-in. It is perturbed in place instead, for the whole of each
    evaluation, and put back from a copy; a warning names it.
    """

    def __init__(self, space: ParamSpace, module: nn.Module) -> None:
        self.space, self.module = space, module
        self.device = space.counters.device
        self._lock = threading.RLock()  # modules may run in threads of their own
        self._kept: list[Tensor] = []  # copies whose address was asked for
        self._slots: list[_Slot] = []  # least recently used first
        with torch.inference_mode(False):
            most = len(_DTYPES) * len(space.tensors)  # copies in one pass
            self._uncounted = space.counters.new_zeros(1 + most)  # a probe that saturates harms no weight
        self._next: dict[_Key, _Key] = {}  # what was read after what
        self._plans: dict[tuple[_Key, ...], _Plan] = {}  # what is copied when these are read
        self._last: _Key | None = None
        self._surprised, self._steady = False, False  # in this evaluation; whether the one before was without surprise
        self._branching = _branching(module, {id(p): i for i, p in enumerate(space.tensors)})
        self._largest = 0  # bytes that one function needed
        self._held: dict[int, Tensor] = {}  # tensors that are perturbed in place, and their values
        self._absent: set[int] = set()  # tensors that the module no longer has
        self._peak = 0
        self._checks = _FLAT  # comparisons that may still be made
        self._flat: Tensor | None = None  # the result that did not change
        self._sources: list[Tensor] = []  # the weights, while stand-ins have their places
        self._shapes: list[torch.Size] = []  # they had the last time
        self._stands: dict[int, StandIn] = {}
        self._places: dict[int, list[tuple[dict[str, Any], str]]] = {}  # of each tensor, in the modules' parameters
        self._taken: dict[tuple[int, str], dict[str, Any]] = {}  # all places that had stand-ins, also in lost modules
        self._written: list[int] = []  # held tensors that are perturbed
        self._left_out: frozenset[int] = frozenset()  # of the probe
        self._probe: Probe | None = None
        self._c, self._coeffs, self._mirrored = 0.0, space.full(0.0), False  # one for each copy; mirrored: at -c next
        self._hold(_out_of_reach(module, space.tensors))

    # ---- the engine --------------------------------------------------------------------------------------------

    def evaluate(
        self, closure: Callable[[], Tensor], c: float, probe: Probe | None, leave_out: Collection[int] = (),
        mirrored: bool = False,
    ) -> Tensor:  # fmt: skip
        """The closure's result at theta + c z(probe), z = 0 in tensors left out; at theta without a probe.

        ``mirrored``: theta - c z comes next. Copies that are read last are then made of both at once.
        """
        if probe is None or c == 0:
            self.restore()
            return closure()
        if self._checks:
            self._leave_out(())  # all are looked at, also those that this probe leaves out
            result = self._run(closure, c, probe)
            if not self._reads_elsewhere(closure, c, probe, result) and not leave_out:
                return result
        self._leave_out(leave_out)
        return self._run(closure, c, probe, mirrored=mirrored)

    def update(
        self, probes: Sequence[Probe], coeffs: Tensor, decay: Tensor, update: Tensor | None,
        curvature: Tensor | None = None, smoothing: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Theta <- (1 - decay) theta + s sum_k coeffs[k] z_k in one pass; arguments as in ``ParamSpace.update_``."""
        with uninterrupted():
            self.restore()
            self.space.update_(probes, coeffs, decay, update, None, curvature, smoothing)

    @property
    def evaluating(self) -> bool:
        """Whether theta + c z is what parameters answer with."""
        return self._probe is not None

    def restore(self) -> None:
        """Put the parameters back in their places, and what was perturbed in place back to its value."""
        if not self._sources:
            return
        self._end()
        for p, source in zip(self.space.tensors, self._sources, strict=True):
            if p.data_ptr() != source.data_ptr():
                p.data = source
        places = [(parameters, name) for parameters in _parameters(self.module) for name in parameters]
        for parameters, name in places + [(d, name) for (_, name), d in self._taken.items()]:
            if (found := parameters.get(name)) is not (parameter := self._stood_for(found)):
                parameters[name] = parameter
        self._places, self._taken, self._stands, self._sources = {}, {}, {}, []
        for slot in self._slots:
            slot.ahead = None

    def memory(self) -> dict[str, int]:
        """Bytes of scratch, the most so far, and of the copies of tensors that are read outside their modules."""
        return {"scratch": self._peak, "held": sum(t.nbytes for t in self._held.values())}

    # ---- one evaluation ----------------------------------------------------------------------------------------

    def _run(
        self, closure: Callable[[], Tensor], c: float, probe: Probe, changed: Sequence[int] = (), mirrored: bool = False
    ) -> Tensor:
        try:
            with uninterrupted():
                if changed:
                    self.restore()
                self._mirrored = mirrored
                self._begin(c, probe, changed)
            result = closure()
            for slot in self._slots:
                self._check_unwritten(slot)
            self._steady = not self._surprised
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

    def _check_unwritten(self, slot: _Slot) -> None:
        if slot.content and slot.bytes._version != slot.version:
            names = ", ".join(self.space.names[i] for i, _ in slot.content)
            raise RuntimeError(f"closure: it wrote one of {names} during an evaluation; {_OUTSIDE}")

    def _begin(self, c: float, probe: Probe, changed: Sequence[int]) -> None:
        """Let stand-ins answer with theta + c z; ``changed`` tensors hold other numbers themselves."""
        for slot in self._slots:
            made = slot.ahead if slot.ahead and slot.ahead[0] is probe and slot.ahead[1] == c else None
            slot.ahead, slot.content = made, made[2] if made else {}
        self._last, self._surprised = None, False
        if not self._sources:
            self._make_stands(changed)
        self._probe, self._c, self._coeffs = probe, c, self.space.full(c).repeat(1, len(_DTYPES))
        if which := [i for i in self._held if i not in self._left_out]:
            for i in which:
                self._held[i].copy_(self._sources[i])
            self._written = which
            held, sources = ([tensors[i] for i in which] for tensors in (self._held, self._sources))
            self._perturb(self.space.perturb(which, held, sources), held)
        self._take_places()

    def _end(self) -> None:
        """Let stand-ins answer with theta."""
        for slot in self._slots:
            self._displace(slot)
        for i in self._written:
            self._sources[i].copy_(self._held[i])
        self._probe, self._kept, self._written = None, [], []

    def _make_stands(self, changed: Sequence[int]) -> None:
        tensors = self.space.tensors
        self._sources = [p.data for p in tensors]
        if (shapes := [t.shape for t in self._sources]) != self._shapes:
            self._shapes, self._plans = shapes, {}
            for slot in self._slots:
                slot.forget()
        for i, t in self._others(changed).items():
            tensors[i].data = t
        self._stands = {
            i: self._stand_in(i) for i in range(len(tensors)) if i not in self._held and i not in self._left_out
        }

    def _take_places(self) -> None:
        """Put stand-ins where parameters are, or what an earlier evaluation left there."""
        stands = {id(stand._parameter): stand for stand in self._stands.values()}
        self._places = {}
        for parameters in _parameters(self.module):
            for name, p in parameters.items():
                if (stand := stands.get(id(self._stood_for(p)))) is not None:
                    parameters[name], self._taken[id(parameters), name] = stand, parameters
                    self._places.setdefault(stand._number, []).append((parameters, name))
        if len(self._places) < len(self._stands):
            self._say_absent(set(self._stands) - set(self._places))

    def _stood_for(self, p: Any) -> Any:
        """What a stand-in of this engine, or a copy in its place, stands for; p otherwise."""
        return p._parameter if getattr(p, "_engine", None) is self else p

    def _say_absent(self, absent: set[int]) -> None:
        if absent := absent - self._absent:
            self._absent |= absent
            warnings.warn(
                f"{some([self.space.names[i] for i in sorted(absent)], 5)}: no longer a parameter of the module, so that "
                "probes do not reach it; if it was replaced, make a new optimizer",
                stacklevel=2,
            )

    def _stand_in(self, i: int) -> StandIn:
        p = self.space.tensors[i]
        stand = Tensor._make_subclass(StandIn, self._sources[i], p.requires_grad and not p.is_inference())
        stand.__dict__.update(p.__dict__, _is_param=True, _engine=self, _number=i, _key=(i, p.dtype), _parameter=p)
        return stand

    def _perturb(self, make: _Make, sources: list[Tensor]) -> None:
        """Write theta + c z of these tensors."""
        assert self._probe is not None
        n = len(sources)
        make(sources, self._probe, self._coeffs[:, :n], self._uncounted[: 1 + n])

    def call(
        self, func: Callable[..., Any], asks: str, stands: list[StandIn], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor | None:
        """Refuse a call that cannot be served; an embedding's rows; None for what copies serve."""
        names = self.space.names
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"{names[stands[0]._number]} is perturbed as it is read, which a compiled function cannot see: compile the "
                "module before it is given to the optimizer, or use engine='inplace'"
            )
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise RuntimeError(
                f"{names[stands[0]._number]} is read under a transform of torch.func: use engine='inplace'"
            )
        written = args[:1] if asks == "write" else kwargs.get("out")
        if func is functional.embedding and isinstance(args[1], StandIn):
            if kwargs.get("max_norm") is not None:
                written = args[1]
            elif args[0].numel() < args[1]._parameter.shape[0]:
                return self.read_rows(args[1], args[0])
        found: list[StandIn] = []
        if written is not None:
            _map(written, lambda s: found.append(s))
        if found:
            raise RuntimeError(
                f"closure: {func.__name__} writes {names[found[0]._number]} during an evaluation; {_OUTSIDE}"
            )
        return None

    def read(
        self, stands: Sequence[StandIn], dtype: torch.dtype | None = None, keep: bool = False
    ) -> dict[int, Tensor]:
        """Perturbed copies by number, in their own dtype or this one; kept until the evaluation ends, if asked."""
        keys = tuple([(s._number, dtype) if dtype else s._key for s in stands])
        with self._lock:
            for key in keys:
                last, self._last = self._last, key
                if last not in (None, key) and self._next.get(last) != key != self._following(last, placed=False):
                    self._next[last], self._surprised, self._steady, self._plans = key, True, False, {}
            for slot in reversed(self._slots):
                if not [k for k in keys if k not in slot.content]:
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
            copies = {k[0]: slot.content[k].detach().requires_grad_() for k in keys}
            if keep:
                self._kept += copies.values()
            return copies

    def _fill(self, keys: tuple[_Key, ...]) -> _Slot:
        """Make copies, and those of what was read next the last time while there is room: fewer, longer passes."""
        wanted, nbytes = self._plans.get(keys) or self._plan(keys)
        sources, slot = [self._sources[i] for i, _ in wanted], self._slot(nbytes)
        slot.content, slot.ahead = {}, None  # first: what it held must not count as the new layout's
        layout = slot.layout(wanted, self.space, sources)
        if self._mirrored and self._steady and self._following(wanted[-1]) is None:
            self._perturb_both(slot, layout, sources)
        else:
            self._perturb(layout.make, sources)
        slot.content, slot.version = layout.copies, slot.bytes._version
        self._place(slot)
        return slot

    def _perturb_both(self, slot: _Slot, layout: _Layout, sources: list[Tensor]) -> None:
        """Copies of theta - c z beside those of theta + c z, where the other buffer has room: one noise makes both."""
        assert self._probe is not None
        keys, mirrors, make = tuple(layout.copies), dict[_Key, Tensor](), layout.make
        other = next((s for s in self._slots if s is not slot and s.bytes.nbytes >= slot.bytes.nbytes), None)
        if other is not None and slot in self._slots and self._freed(other):
            other.content, other.ahead, mirrors = {}, None, other.layout(keys, self.space, sources).copies
            make = self.space.perturb([i for i, _ in keys], sources, [*layout.copies.values()], [*mirrors.values()])
        self._perturb(make, sources)
        if other is not None and mirrors:
            other.ahead, other.version = (self._probe, -self._c, mirrors), other.bytes._version

    def _plan(self, keys: tuple[_Key, ...]) -> _Plan:
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

    def _following(self, key: _Key, placed: bool = True) -> _Key | None:
        """What was read after this, of what this probe does not leave out; ``placed`` or read through a stand-in."""
        passed = self._left_out if placed else self._left_out.union(*[s.placed for s in self._slots])
        following = self._next.get(key)
        for _ in self._sources:
            if following is None or following[0] not in passed:
                break
            following = self._next.get(following)
        return following

    def _place(self, slot: _Slot) -> None:
        """Give modules the copies themselves: in the parameters' own dtypes, and where torch does the same with them."""
        if not self._steady or slot not in self._slots:
            return
        for key, copy in slot.content.items():
            stand = self._stands.get(key[0])
            if stand is None or key != stand._key or key[0] in self._branching:
                continue
            slot.placed[key[0]] = t = copy.detach().requires_grad_()
            t.__dict__ = stand.__dict__
            for parameters, name in self._places.get(key[0], ()):
                if parameters.get(name) is stand:
                    parameters[name] = t

    def _displace(self, slot: _Slot) -> None:
        """Put stand-ins back."""
        for i, t in slot.placed.items():
            for parameters, name in self._places.get(i, ()):
                if parameters.get(name) is t:
                    parameters[name] = self._stands[i]
        slot.placed = {}

    def _bytes(self, key: _Key) -> int:
        return _aligned(self._sources[key[0]].numel() * key[1].itemsize)

    def read_rows(self, stand: StandIn, index: Tensor) -> Tensor:
        """Perturbed rows of a matrix, in the shape that an embedding returns."""
        assert self._probe is not None
        source, rows = self._sources[stand._number], index.reshape(-1).to(torch.int64)
        inside = ((rows >= 0) & (rows < source.shape[0])).all()
        if rows.is_cuda:
            torch._assert_async(inside)  # no wait for the device, as torch's own check
        elif not inside:
            raise IndexError(f"embedding: index out of range in {self.space.names[stand._number]}")
        out = torch.empty(rows.numel(), source.shape[1], dtype=source.dtype, device=source.device)
        counters = self._uncounted[:2]
        self.space.perturb_rows(stand._number, source, rows, out, self._probe, self._coeffs[:, :1], counters)
        return out.view(*index.shape, -1)

    def _slot(self, nbytes: int) -> _Slot:
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
        slot = _Slot(nbytes, self.device)
        self._peak = max(self._peak, sum(s.bytes.nbytes for s in (*self._slots, slot)))
        if len(self._slots) < 2:
            self._slots.insert(0, slot)
        return slot

    def _freed(self, slot: _Slot) -> bool:
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
                f"{some(names, 5)}: read elsewhere than as attributes of their modules (compiled or scripted "
                "code, another object that keeps them). They are perturbed in place and put back from a copy, "
                f"{size / 2**20:.1f} MiB",
                stacklevel=2,
            )

    def _others(self, which: Sequence[int]) -> dict[int, Tensor]:
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
        """Whether tensors were found that the closure reads past the stand-ins; they are held from now on."""
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


def _out_of_reach(module: nn.Module, tensors: Sequence[Tensor]) -> list[int]:
    """Numbers of the tensors that stand-ins in their modules cannot reach, as far as the structure shows."""
    numbers = {id(p): i for i, p in enumerate(tensors)}
    memory: dict[int, list[int]] = {}
    for i, p in enumerate(tensors):
        if p.numel() and not p.is_meta:
            memory.setdefault(p.untyped_storage().data_ptr(), []).append(i)
    inside: set[int] = set()
    out = {i for i, p in enumerate(tensors) if type(p) not in (nn.Parameter, Tensor)}
    for m in module.modules():
        inside |= {numbers[id(p)] for p in m._parameters.values() if id(p) in numbers}
        frozen = [p for p in m._parameters.values() if p is not None and id(p) not in numbers]
        others = [v for k, v in vars(m).items() if k not in ("_parameters", "_modules", "_buffers")]
        for t in (*frozen, *m._buffers.values(), *_tensors(others)):
            if id(t) in numbers:  # lists such as an LSTM's _flat_weights
                out.add(numbers[id(t)])
            elif isinstance(t, Tensor) and t.layout is torch.strided and not t.is_meta:
                out |= set(memory.get(t.untyped_storage().data_ptr(), ()))  # a view of a weight, say
        if "_orig_mod" in m._modules or m._compiled_call_impl or isinstance(m, torch.jit.ScriptModule):
            out |= {numbers[id(p)] for p in m.parameters() if id(p) in numbers}
    return sorted(out | (set(numbers.values()) - inside))


def _branching(module: nn.Module, numbers: dict[int, int]) -> set[int]:
    """Numbers of tensors under modules that do something else where parameters are overridden, as torch's encoder layers."""
    # static: scripted modules have no forward to get
    forwards = {m: getattr_static(type(m), "forward", None) for m in module.modules()}
    names = {m: getattr(f, "__code__", _branching.__code__).co_names for m, f in forwards.items()}
    found = [m for m in names if "has_torch_function" in names[m]]
    return {numbers[id(p)] for m in found for p in m.parameters() if id(p) in numbers}


def _tensors(x: Any, depth: int = 4) -> Iterator[Tensor]:
    """Tensors in nested lists, tuples and dicts."""
    if isinstance(x, Tensor):
        yield x
    elif depth and isinstance(x, list | tuple | set | dict):
        for y in x.values() if isinstance(x, dict) else x:
            yield from _tensors(y, depth - 1)
