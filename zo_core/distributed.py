"""Several processes share a step: they exchange losses and checksums, never weights, and each makes the same step itself."""

import json
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.functional import pad

from . import sharding
from .record import Snapshot
from .weights import Point, some

_FAILED, _FLOAT32, _FLOAT64, _COMPARES = range(4)  # kinds of messages; losses are sent as one of two dtypes
_FIRST = 8  # numbers in the first part of a message: step, kind, number of points, checksum of the options, then values


class RankError(RuntimeError):
    """Another process failed, is gone, or has other weights or options. Weights here are those before the step."""


@dataclass(frozen=True)
class Parallel:
    """How the processes of ``torch.distributed`` share a step: they form a grid of ``data`` x ``probes`` ranks.

    Each batch is divided into ``data`` parts and the points of a step (where it evaluates the loss) into ``probes`` shares;
    rank r evaluates part r % data at the points of share r // data. With ``data=1`` all ranks see the whole batch, with
    ``probes=1``, the default, all evaluate at every point. If one of the two is None, it follows from the other one and the
    number of ranks. Where each probe has a closure of its own, it is the probes that are shared: rank r has every ``probes``-th of
    them from number r // data on, and closures for these alone.

    The losses of the parts are averaged with equal weights. So where the closure returns a mean, parts must have equal sizes,
    or the closure must multiply its loss by its part's size over the mean size. Losses are sent through the CPU by gloo, as
    NCCL ends the process in cases where gloo raises an error.

    Args:
        data: number of parts of a batch.
        probes: number of shares of the points.
        check_every: steps between two comparisons of all weights and options; the first step always compares.
        timeout: seconds to wait for the other processes, for their evaluations and for what they do between steps.

    Raises:
        ValueError: a number out of its range.
    """

    data: int | None = None
    probes: int | None = None
    check_every: int = 100
    timeout: float = 300.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("data", "probes", "check_every"):
            value = getattr(self, name)
            if not ((type(value) is int and value > 0) or (value is None and name != "check_every")):
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        if not 0 < self.timeout <= 1e9:
            raise ValueError(f"timeout: expected a positive number of seconds, got {self.timeout!r}")

    def grid(self) -> tuple[int, int]:
        """The numbers of parts and of shares.

        Raises:
            RuntimeError: ``torch.distributed`` has not been initialised.
            ValueError: their product is not the number of ranks.
        """
        if not dist.is_initialized():
            raise RuntimeError("processes: expected torch.distributed to be initialised: call init_process_group first")
        ranks = dist.get_world_size()
        probes = self.probes or (max(1, ranks // self.data) if self.data else 1)
        data = self.data or ranks // probes
        if data * probes != ranks:
            raise ValueError(
                f"processes: expected data * probes to be the number of ranks, {ranks}, got data={data}, probes={probes}"
            )
        return data, probes

    @property
    def parts(self) -> int:
        """Number of parts that each batch is divided into."""
        return self.grid()[0]

    @property
    def part(self) -> int:
        """Number, from 0, of the part that the closure of this process evaluates."""
        return dist.get_rank() % self.parts


class Exchange:
    """The messages between the processes of one optimizer, in a process group of its own; all processes must make it together.

    A message has a first part of fixed size, and a second one whose size all ranks know from the first: where the sizes
    that ranks send differ, gloo ends the process without an error in Python.
    """

    def __init__(self, parallel: Parallel) -> None:
        self.parallel, self.rank, self.ranks = parallel, dist.get_rank(), dist.get_world_size()
        self.data, self.probes = parallel.grid()
        self.group = self._call(dist.new_group, backend="gloo", timeout=timedelta(seconds=parallel.timeout))
        weakref.finalize(self, _leave, self.group).atexit = False
        self.step = self.total = 0  # bytes sent and received: in the last step, and in all
        self.compared = False  # whether the weights have been compared since the start, or since a state was loaded
        self.broken = False  # whether some rank left a message half way, so that no further one can be understood
        self.options = ""  # of this step, as JSON

    # ---- losses ------------------------------------------------------------------------------------------------

    def losses(
        self,
        evaluate: Callable[[Sequence[Sequence[Point]]], Tensor],
        pass_by: Callable[[Sequence[Sequence[Point]]], object],
        sets: Sequence[Sequence[Point]],
        number: int,
    ) -> Tensor:
        """Losses at all points of these sets, (n,), with the same bits in all processes.

        Args:
            evaluate: the losses of this process's part of the batch at all points of some sets, (n,).
            pass_by: called with these sets when it has raised.
            sets: all of the call, of as many points each; a process evaluates its share of them, and at least one, so that
                generators stay alike.
            number: of the step.

        Raises:
            Exception: what ``evaluate`` raised.
            RankError: it raised in another process, or a process is gone or at another step.
        """
        mine, size = sets[self.rank // self.data :: self.probes] or sets[-1:], len(sets[0])
        values = torch.zeros(-(-len(sets) // self.probes) * size, dtype=torch.float64, device="cpu")
        try:
            losses = evaluate(mine)
            values[: len(losses)] = losses
        except BaseException as error:
            pass_by(mine)
            self._fail(number, error)
            raise
        code = _FLOAT64 if losses.dtype == torch.float64 else _FLOAT32
        with self._message():
            codes, everyone = self._post(code, number, values, points=len(sets) * size)
        parts = everyone.view(self.probes, self.data, -1).unbind(1)
        mean = reduce(torch.add, parts) / self.data  # in the order of the ranks: the same bits on every machine
        dtype = torch.float64 if _FLOAT64 in codes else torch.float32
        return mean.view(self.probes, -1, size).transpose(0, 1).reshape(-1)[: len(sets) * size].to(losses.device, dtype)

    # ---- checks ------------------------------------------------------------------------------------------------

    def start(self, number: int, options: Mapping[str, Any], snapshot: Callable[[], Snapshot]) -> None:
        """Begin a step, and ``compare`` every ``check_every`` steps.

        Args:
            number: of the step.
            options: those that users may change between steps, by name.
            snapshot: returns what ``compare`` compares.
        """
        self.step, self.options = 0, json.dumps(options, default=str)
        if not self.compared or number % self.parallel.check_every == 0:
            self.compare(number, snapshot)

    def compare(self, number: int, snapshot: Callable[[], Snapshot]) -> None:
        """Compare options, state and weights of all processes.

        Raises:
            RankError: they differ, or a process is gone.
        """
        try:  # before the first message, so that a rank that fails here can tell the others
            facts, names, weights = snapshot()
            mine = json.dumps({"facts": facts, "weights": weights}, default=str)
        except BaseException as error:
            self._fail(number, error)
            raise
        with self._message():
            crc = torch.tensor([zlib.crc32(mine.encode())], dtype=torch.float64, device="cpu")
            _, crcs = self._post(_COMPARES, number, crc)
            if (crcs != crcs[0]).any():
                everyone = [json.loads(text) for text in self._texts(mine)]
                _same([x["facts"] for x in everyone])
                for name, *pairs in zip(names, *[x["weights"] for x in everyone], strict=True):
                    for where in {at for at, _ in pairs}:  # compare the ranks that have the same elements of a tensor
                        values = {r: crc for r, (at, crc) in enumerate(pairs) if at == where}
                        if len(set(values.values())) > 1:
                            raise RankError(
                                f"{name}: differs between ranks at step {number}, with checksums {_by_value(values)}: start "
                                "all from the same weights and state"
                            )
        self.compared = True

    # ---- transport ---------------------------------------------------------------------------------------------

    @contextmanager
    def _message(self) -> Iterator[None]:
        """Surrounds one message. After a message that was interrupted in some rank, none may follow."""
        if self.broken:
            raise RankError("step: a message between the processes was broken off before: start all of them again")
        self.broken = True
        try:
            yield
        except RankError as error:
            # An error with a cause is from ``_call``: other ranks are gone. Without one, all ranks raise it.
            self.broken = error.__cause__ is not None
            raise
        self.broken = False

    def _fail(self, number: int, error: BaseException) -> None:
        """Tell the others that this rank has failed."""
        none = torch.zeros(0, dtype=torch.float64, device="cpu")
        with suppress(RankError), self._message():  # this rank raises ``error`` itself
            self._post(_FAILED, number, none, text=f"{type(error).__name__}: {error}")

    def _post(
        self, code: int, number: int, values: Tensor, points: int = 0, text: str = ""
    ) -> tuple[list[int], Tensor]:
        """Send a message, and return the kinds and the values, float64 (ranks, n), of all ranks. RankError if they do not match."""
        head = [number, code, points, zlib.crc32(self.options.encode())]
        mine = torch.cat([torch.tensor(head, dtype=torch.float64, device="cpu"), values])
        everyone = self._gather(pad(mine[:_FIRST], (0, max(0, _FIRST - len(mine)))))
        steps, codes, counts, options = everyone[:, : len(head)].long().T.tolist()
        if _FAILED in codes:
            texts = self._texts(text)
            failed = "; ".join(f"rank {r} failed: {texts[r]}" for r, code in enumerate(codes) if code == _FAILED)
            raise RankError(f"step {number}: {failed}")
        for name, told in (
            ("step", steps),
            ("comparison of weights", [code == _COMPARES for code in codes]),
            ("number of evaluations", counts),
        ):
            if len(set(told)) > 1:
                raise RankError(
                    f"{name}: expected the same in all ranks, got {_by_value(told)}: load one state and set options in all "
                    "of them"
                )
        if len(set(options)) > 1 and _COMPARES not in codes:
            _same([json.loads(x) for x in self._texts(self.options)])
        if len(mine) > _FIRST:
            everyone = torch.cat([everyone, self._gather(mine[_FIRST:])], dim=1)
        return codes, everyone[:, len(head) : len(mine)]

    def _gather(self, message: Tensor) -> Tensor:
        """The tensors (n,) of all ranks, (ranks, n)."""
        out = [torch.empty_like(message) for _ in range(self.ranks)]
        self._call(dist.all_gather, out, message, group=self.group)
        self.step += message.nbytes * self.ranks
        self.total += message.nbytes * self.ranks
        return torch.stack(out)

    def _texts(self, text: str) -> list[str]:
        """The texts of all ranks, which may have different lengths."""
        data = torch.tensor(list(text.encode()), dtype=torch.uint8, device="cpu")
        sizes = self._gather(torch.tensor([len(data)], device="cpu")).view(-1).tolist()
        everyone = self._gather(pad(data, (0, max(sizes) - len(data))))
        return [bytes(x[:n].tolist()).decode() for x, n in zip(everyone, sizes, strict=True)]

    def _call(self, collective: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Call a function of ``torch.distributed``. RankError in place of its error."""
        try:
            return collective(*args, **options)
        except RuntimeError as error:
            raise RankError(
                f"step: rank {self.rank} lost the other processes: one was killed, left the loop, is at another point of it or "
                f"took more than {self.parallel.timeout:g} s. Start all again from the last state or journal ({error})"
            ) from error


def _by_value(values: Mapping[int, object] | Sequence[object]) -> str:
    """What each rank has, as in '1 in ranks 0, 2; 5 in rank 1'."""
    ranks: dict[str, list[str]] = {}
    for rank, value in values.items() if isinstance(values, Mapping) else enumerate(values):
        ranks.setdefault(str(value), []).append(str(rank))
    return "; ".join(f"{value} in rank{'s' * (len(r) > 1)} {', '.join(r)}" for value, r in ranks.items())


def _same(everyone: Sequence[Mapping[str, Any]]) -> None:
    """RankError that names what differs between the ranks, if anything does."""
    told = {k: [str(x.get(k, "nothing")) for x in everyone] for k in dict.fromkeys(k for x in everyone for k in x)}
    if names := [k for k, values in told.items() if len(set(values)) > 1]:
        raise RankError(f"{some(names)}: expected the same in all ranks, got {names[0]} of {_by_value(told[names[0]])}")


def _leave(group: Any) -> None:
    """Free a group's threads and connections, if torch.distributed is still there."""
    with suppress(Exception):
        dist.destroy_process_group(group)


def check(
    processes: Parallel | None, names: Sequence[str], parameters: Sequence[Tensor], module: nn.Module | None, engine: str,
    hessian: str | None,
) -> None:  # fmt: skip
    """TypeError, ValueError or RuntimeError if a step over these parameters cannot be shared, or not with these options."""
    if not isinstance(processes, Parallel | None):
        raise TypeError(f"processes: expected zo_core.distributed.Parallel(), got {processes!r}")
    if sharded := is_sharded(parameters, module):
        if processes is None or module is None:
            raise ValueError(
                "params: they are sharded (DTensors): pass processes=zo_core.distributed.Parallel(), so that all shards take "
                "one step, and the module (module=), so that its forwards gather them anew"
            )
        inside = set(module.parameters())
        if gone := [n for n, p in zip(names, parameters, strict=True) if p not in inside]:
            raise ValueError(
                f"params: {some(gone)}: no parameter of the module as it is when its weights are not gathered; give the "
                "module, or its parameters after reshard()"
            )
        if engine in ("shadow", "grouped"):
            raise ValueError(f"engine: {engine!r} cannot serve sharded weights (DTensors): leave it out, or 'inplace'")
    probes = processes.grid()[1] if processes is not None else 1
    if probes > 1 and engine == "inplace":
        raise ValueError(
            f"processes: expected probes=1 with engine='inplace', got {probes}: the way to a probe and back rounds, so "
            "that weights would differ between processes that go to different ones"
        )
    if sharded and hessian == "factored":
        raise ValueError("hessian: 'factored' needs whole rows and columns, these weights are sharded: use 'diagonal'")


def is_sharded(parameters: Sequence[Tensor], module: nn.Module | None) -> bool:
    """Whether any weight is sharded, also a frozen one: forwards then gather weights, and all processes must run the same ones."""
    return any(map(sharding.is_sharded, (*parameters, *(module.parameters() if module is not None else ()))))
