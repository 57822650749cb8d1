"""The journal of a run: an append-only file of scalars, from which all weights of the run can be computed again.

docs/journal.md describes the bytes. A journal may come from anywhere, so reading one unpickles nothing and compares every
length in it with the size of the file before that length is used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import struct
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from . import scales, scaling
from .bindings.warn import warn
from .kernels.reference import DISTRIBUTIONS, MAX_RANK
from .locks import lock, unlock
from .noise import VERSION as NOISE_VERSION
from .noise import backend_of
from .record import DTYPES, Identity, Past, Progress, Record, TensorInfo, carried
from .weights import RESIDUALS, ParamSpace, empty_residuals, some

FORMAT_VERSION = 1
MAGIC = b"\x89ZOJ\r\n\x1a\n"

_START = struct.Struct("<8sII")  # magic, format version, bytes of the JSON text that follows
_FIXED = struct.Struct("<IIQQd")  # flags, K, step, first stream, loss
_CRC = struct.Struct("<I")
_CARRY_START = struct.Struct("<II")  # how many numbers, bytes of each
_COUNT = struct.Struct("<I")
_MOVED, _STOCHASTIC, _LEFT_OUT, _CURVATURE, _CARRY, _PAST, _SQUARES, _UNKNOWN = (1 << bit for bit in range(8))  # flags
_FLOATS = np.dtype("<f4")
_HASHED = 1 << 26  # bytes that are hashed at a time
# Steps that replay makes in one pass: memory traffic is a small part of the time of 64, and Ctrl-C waits a second for them.
_STEPS, _COEFFICIENTS = 64, 1 << 22  # at most, and coefficients (steps x probes x tensors)


class JournalError(ValueError):
    """A file that is no journal, or one that does not belong to the weights or the optimizer it is used with."""


class Recorded(Protocol):
    """What a journal asks of the optimizer whose steps it records; ``ZOOptimizer`` is one."""

    @property
    def _steps(self) -> int: ...  # how many steps it has made, skipped ones too

    def _identity(self) -> Identity: ...

    def _settings(self) -> dict[str, Any]: ...  # its options as they are now

    def _space(self) -> ParamSpace: ...  # its tensors as they are now

    def _keep_padding(
        self, keep: bool
    ) -> bool: ...  # whether padding rows stay as they are from now on, and did before

    def _catch_up(self, play: Callable[[ParamSpace], Progress], steps: int) -> None: ...  # let ``play`` make its steps


# ---- the header --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header(Identity):
    """What holds for all records: the optimizer's identity, and where and from what the run started."""

    library: str  # version of zo_core
    noise: int  # version of the noise
    backend: str
    options: dict[str, Any]  # of the method, at the start; for people, as replay needs none of them
    base: str  # SHA-256 of the weights' bytes before the first step

    @classmethod
    def of(cls, optimizer: Recorded) -> Header:
        """The header of a journal that starts with this optimizer's weights as they are."""
        from . import __version__

        tensors, identity = _whole(optimizer).tensors, optimizer._identity()
        if twice := [name for name, count in Counter(t.name for t in identity.tensors).items() if count > 1]:
            raise JournalError(f"tensors: {some(twice)} are names of several tensors: give each one of its own")
        return cls(
            library=__version__, noise=NOISE_VERSION, backend=backend_of(tensors[0].device), base=hash_of(tensors),
            options=optimizer._settings(), **vars(identity),
        )  # fmt: skip

    @classmethod
    def parse(cls, text: bytes) -> Header:
        """The header in this JSON text. JournalError unless every field is there and has a value that it can have."""
        try:
            found = json.loads(text)
            found["tensors"] = tuple(TensorInfo(n, tuple(s), d, r) for n, s, d, r in found["tensors"])
            found["padding"] = tuple((i, row) for i, row in found.get("padding", ()))
            found["scales"] = tuple(found.get("scales", ()))
            header = cls(**found)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise JournalError(f"journal: its header is not one of format {FORMAT_VERSION}: {error}") from None
        if header.noise != NOISE_VERSION:
            raise JournalError(
                f"journal: made with version {header.noise!r} of the noise by zo_core {header.library!r}, this one "
                f"makes version {NOISE_VERSION}: use that version of the library"
            )
        kinds = {t.rates for t in header.tensors if type(t.rates) is int}
        right = {
            "library, backend, method, engine, base": all(
                isinstance(x, str) for x in (header.library, header.backend, header.method, header.engine, header.base)
            ),
            "seed": type(header.seed) is int and 0 <= header.seed < 1 << 64,
            "distribution": header.distribution in list(DISTRIBUTIONS),
            "rank": type(header.rank) is int
            and 1 <= header.rank <= (MAX_RANK if header.distribution == "factored" else 1),
            "residual": type(header.residual) is int and header.residual in (0, *RESIDUALS),
            "hessian": header.hessian in ("", *scaling.KINDS),
            "options": isinstance(header.options, dict),
            "tensors": bool(header.tensors) and all(map(_sound, header.tensors)) and kinds == set(range(len(kinds))),
            "scales": len(header.scales) in (0, len(header.tensors)) and all(map(scales.is_one, header.scales)),
            "padding": all(_has_row(header.tensors, *pair) for pair in header.padding),
            "names": len({t.name for t in header.tensors if isinstance(t.name, str)}) == len(header.tensors),
        }
        if wrong := [name for name, fine in right.items() if not fine]:
            raise JournalError(f"journal: its header has wrong {', '.join(wrong)}")
        return header

    def text(self) -> bytes:
        """The header as JSON. Fields that have their default are left out, so that older versions, which lack them, can read it."""
        fields = {f.name: x for f in dataclasses.fields(self) if (x := getattr(self, f.name)) != f.default}
        return json.dumps(fields, separators=(",", ":")).encode()

    @property
    def kinds(self) -> int:
        """How many pairs of learning rate and decay a record has."""
        return 1 + max(t.rates for t in self.tensors)

    def compare(self, fields: Mapping[str, Any]) -> None:
        """JournalError that names the first of these fields whose value, which is what is at hand, differs from the header's."""
        for name, theirs in fields.items():
            mine = getattr(self, name)
            if name == "tensors" and mine != theirs:
                _compare_tensors(mine, theirs)
            if name == "scales" and mine != theirs:
                differ = scales.compare(mine, theirs, [t.name for t in self.tensors])
                raise JournalError(f"scales: {differ}: a run keeps the scales that its journal began with")
            if mine != theirs:
                raise JournalError(f"{name}: expected {mine!r} as in the journal, got {theirs!r}")


def _whole(optimizer: Recorded) -> ParamSpace:
    """The space of an optimizer's weights. JournalError if they are sharded."""
    space = optimizer._space()
    if space.pieces:
        raise JournalError("optimizer: expected whole weights, its are sharded (DTensors): save its state_dict instead")
    return space


def _sound(t: TensorInfo) -> bool:
    """Whether shape, dtype and kind of a tensor have the right types, which JSON does not guarantee."""
    shape = all(type(n) is int and n >= 0 for n in t.shape)
    return shape and isinstance(t.dtype, str) and t.dtype in DTYPES and type(t.rates) is int


def _has_row(tensors: Sequence[TensorInfo], i: object, row: object) -> bool:
    if type(i) is not int or type(row) is not int or not 0 <= i < len(tensors):
        return False
    return len(tensors[i].shape) == 2 and 0 <= row < tensors[i].shape[0]


def _compare_tensors(mine: Sequence[TensorInfo], theirs: Sequence[TensorInfo]) -> None:
    """JournalError that names the tensors which the journal has and the optimizer has not, or the other way round."""
    ours, others = [t.name for t in mine], [t.name for t in theirs]
    if missing := [n for n in ours if n not in set(others)]:
        raise JournalError(f"tensors: {some(missing)} of the journal are not there: pass the model it was made with")
    if extra := [n for n in others if n not in set(ours)]:
        raise JournalError(f"tensors: {some(extra)} are trained but not in the journal: freeze what was frozen then")
    for a, b in zip(mine, theirs, strict=True):
        if a != b:
            raise JournalError(f"tensors: expected {a} at this place as in the journal, got {b}")


def hash_of(tensors: Sequence[Tensor]) -> str:
    """SHA-256, in hexadecimal, of the bytes of all tensors, one after the other."""
    digest = hashlib.sha256()
    for t in tensors:
        flat = t.detach().reshape(-1).view(torch.uint8)
        for part in torch.split(flat, _HASHED):
            digest.update(part.cpu().numpy())  # type: ignore[arg-type]
    return digest.hexdigest()


# ---- records -----------------------------------------------------------------------------------------------------


def _encode(record: Record, header: Header, chain: int) -> bytes:
    """A record's bytes. ``chain`` is the checksum of what comes before it, which its own checksum continues."""
    flags = _MOVED * record.moved | _STOCHASTIC * record.stochastic
    flags |= _LEFT_OUT * bool(record.left_out) | _CURVATURE * (record.curvature is not None)
    flags |= _CARRY * (record.carry is not None) | _PAST * (record.past > 0) | _SQUARES * (record.squares is not None)
    parts = [_FIXED.pack(flags, len(record.coeffs), record.step, record.stream, record.loss)]
    parts += [x.astype(_FLOATS).tobytes() for x in (record.lr, record.decay, record.coeffs)]
    if record.curvature is not None:
        parts.append(np.append(record.curvature, record.smoothing).astype(_FLOATS).tobytes())
    if record.squares is not None:
        parts.append(record.squares.astype(_FLOATS).tobytes())
    if record.past:
        parts.append(_COUNT.pack(record.past))
    if record.left_out:
        mask = np.zeros(len(header.tensors), dtype=bool)
        mask[list(record.left_out)] = True
        parts.append(np.packbits(mask, bitorder="little").tobytes())
    if record.carry is not None:
        numbers = record.carry.astype(record.carry.dtype.newbyteorder("<"))
        parts += [_CARRY_START.pack(len(numbers), numbers.itemsize), numbers.tobytes()]
    body = b"".join(parts)
    return body + _CRC.pack(zlib.crc32(body, chain))


def _decode(data: memoryview, at: int, header: Header, chain: int) -> tuple[Record, int] | None:
    """The record that starts at byte ``at``, and its end. None unless a whole and undamaged one is there."""
    if len(data) - at < _FIXED.size:
        return None
    flags, k, step, stream, loss = _FIXED.unpack_from(data, at)
    kinds, count = header.kinds, len(header.tensors)
    learns, last = (k + 1) * bool(flags & _CURVATURE), k * bool(flags & _SQUARES)
    floats = 2 * kinds + k + learns + last
    past_at = at + _FIXED.size + 4 * floats
    mask_at = past_at + _COUNT.size * bool(flags & _PAST)
    carry_at = end = mask_at + -(-count // 8) * bool(flags & _LEFT_OUT)
    size = width = 0
    if flags & _CARRY and end + _CARRY_START.size <= len(data):
        size, width = _CARRY_START.unpack_from(data, end)
        carry_at, end = end + _CARRY_START.size, end + _CARRY_START.size + size * width
    if flags >= _UNKNOWN or (step | stream) >> 62 or end + _CRC.size > len(data):
        return None
    if zlib.crc32(data[at:end], chain) != _CRC.unpack_from(data, end)[0] or (flags & _CARRY and width not in (4, 8)):
        return None
    numbers = np.frombuffer(data, _FLOATS, floats, at + _FIXED.size)
    lr, decay, coeffs, rest, squares = np.split(numbers, np.cumsum((kinds, kinds, k, learns)))
    bits = np.frombuffer(data, np.uint8, -(-count // 8), mask_at) if flags & _LEFT_OUT else np.zeros(0, np.uint8)
    left_out = np.flatnonzero(np.unpackbits(bits, bitorder="little")[:count]).tolist()
    curvature, smoothing = (rest[:-1], float(rest[-1])) if len(rest) else (None, 0.0)
    carry = np.frombuffer(data, f"<f{width}", size, carry_at) if flags & _CARRY else None
    past = _COUNT.unpack_from(data, past_at)[0] if flags & _PAST else 0
    record = Record(step, stream, coeffs, lr, decay, bool(flags & _MOVED), bool(flags & _STOCHASTIC), loss,
                    frozenset(left_out), curvature, smoothing, carry, past, squares if last else None)  # fmt: skip
    return record, end + _CRC.size


# ---- the file ----------------------------------------------------------------------------------------------------


class Journal:
    """A journal on disk: read it with ``open``, and give an optimizer one from ``create``, ``resume`` or ``recover``.

        opt.journal = zo_core.Journal.create("run.zoj", opt)

    Each step then writes one record, before it moves a weight: a process that is killed loses no record, and where writing
    fails (a full disk) the step does not happen. Only ``sync`` and ``close`` wait for the disk, so a machine that loses
    power may lose the last records; a record that is left in part is ignored when the file is opened.

    Attributes:
        header: what holds for all records.
        dropped: bytes at the end of the file that were no whole record when it was opened.
    """

    def __init__(self, path: str | os.PathLike[str], writable: bool = False) -> None:
        self.path, self._closed = Path(path), False
        self._file = open(self.path, "r+b", buffering=0) if writable else None  # noqa: SIM115 - open for a whole run
        try:
            if self._file is not None:
                _lock(self._file)
            data = memoryview(self.path.read_bytes())
            self.header, start = _read_start(data)
        except BaseException:
            self.close()
            raise
        self._ends = array("Q", [start])  # where the header and each record end; the last four bytes are the checksum
        while found := _decode(data, self._ends[-1], self.header, _crc_before(data, self._ends[-1])):
            if found[0].step != len(self):
                break
            self._ends.append(found[1])
        self.dropped = len(data) - self._ends[-1]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Journal:
        """For reading. JournalError if the file is no journal; an incomplete record at its end is left out (``dropped``)."""
        return cls(path)

    @classmethod
    def create(cls, path: str | os.PathLike[str], optimizer: Recorded) -> Journal:
        """A new journal of an optimizer that has not stepped yet.

        Raises:
            JournalError: the optimizer has stepped, two of its tensors have one name, or another process is creating the file.
            FileExistsError: the file exists.
        """
        path = Path(path)
        if steps := optimizer._steps:
            raise JournalError(f"optimizer: expected one that has not stepped, got {steps} steps; resume goes on")
        if path.exists():
            raise FileExistsError(f"{path} exists: Journal.resume goes on with it, or remove it")
        text = Header.of(optimizer).text()
        start = _START.pack(MAGIC, FORMAT_VERSION, len(text)) + text
        part = path.with_name(
            path.name + ".part"
        )  # renamed when it is complete, so that ``path`` is never half a journal
        with open(part, "ab") as file:
            _lock(file)
            if path.exists():  # created by somebody else while this one waited for the lock
                raise FileExistsError(f"{path} exists: another writer has just made it")
            file.truncate(0)
            file.write(start + _CRC.pack(zlib.crc32(start)))
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        return cls(path, writable=True)

    @classmethod
    def resume(cls, path: str | os.PathLike[str], optimizer: Recorded) -> Journal:
        """Continue a journal after the last step of this optimizer, whose state has been loaded; later records are cut off.

        Raises:
            JournalError: the journal is of other tensors, another method, seed or noise, ends before this step, or is open
                for writing already; at step 0 also if the weights are not those it starts from.
        """
        with cls._for(path, optimizer) as journal:
            if (steps := optimizer._steps) > len(journal):
                raise JournalError(
                    f"{path}: expected the records of all {steps} steps that the optimizer has taken, got {len(journal)}"
                    f" (and {journal.dropped} bytes of none): go on without it, or from an older checkpoint"
                )
            journal._cut(steps)
            return journal

    @classmethod
    def recover(cls, path: str | os.PathLike[str], optimizer: Recorded, writable: bool = True) -> Journal:
        """Continue a journal after its last record, without a checkpoint: all its steps are made again first.

        The optimizer, which must not have stepped, and its weights are then as they were after that step, bit for bit where
        ``replay`` is. What belongs to neither (a scheduler's learning rate, say) must be set by the caller. With
        ``writable=False`` the journal is only read, which is possible while another process has it open for writing.

        Raises:
            JournalError: the optimizer has stepped, or as ``resume``.
        """
        with cls._for(path, optimizer, writable) as journal:
            if optimizer._steps:
                raise JournalError(
                    "optimizer: expected one that has not stepped; Journal.resume goes on with its own steps"
                )
            _warn_of_rounding(journal.header, optimizer._space().tensors[0].device)
            optimizer._catch_up(lambda space: _replay(journal, space, journal.header), len(journal))
            journal._cut(len(journal))
            return journal

    @classmethod
    @contextmanager
    def _for(cls, path: str | os.PathLike[str], optimizer: Recorded, writable: bool = True) -> Iterator[Journal]:
        """The journal at this path, which must be one of this optimizer's; closed again after an error."""
        tensors = _whole(optimizer).tensors
        journal = cls(path, writable)
        kept = optimizer._keep_padding(bool(journal.header.padding))  # a run goes on as it began
        try:
            journal.header.compare(vars(optimizer._identity()))
            if not optimizer._steps:
                journal.header.compare({"base": hash_of(tensors)})
            yield journal
        except BaseException:
            journal.close()
            optimizer._keep_padding(kept)
            raise

    def __len__(self) -> int:
        """Number of records, one for each step from 0 on, skipped steps too."""
        return len(self._ends) - 1

    def __iter__(self) -> Iterator[Record]:
        """The records in order."""
        data = memoryview(self.path.read_bytes())[: self._ends[-1]]
        if len(data) < self._ends[-1]:
            raise JournalError(f"{self.path}: was cut by someone else since it was opened")
        for at in self._ends[:-1]:
            found = _decode(data, at, self.header, _crc_before(data, at))
            if found is None:
                raise JournalError(f"{self.path}: changed since it was opened")
            yield found[0]

    def write(self, record: Record) -> None:
        """Append a record; one of an earlier step replaces it and all that came after.

        Raises:
            JournalError: a step is missing before it, it is not open for writing, or someone else has cut the file.
            OSError: it could not be written; the journal is as it was.
        """
        if self._file is None:
            why = "is closed" if self._closed else "was opened for reading only"
            raise JournalError(f"{self.path}: {why}; Journal.resume opens it for writing")
        if record.step > len(self):
            raise JournalError(f"{self.path}: expected step {len(self)} next, got step {record.step}")
        self._cut(record.step)
        end = self._ends[-1]
        os.lseek(self._file.fileno(), end - _CRC.size, os.SEEK_SET)
        if len(before := self._file.read(_CRC.size)) < _CRC.size:
            raise JournalError(f"{self.path}: was cut by someone else since it was opened")
        data = _encode(record, self.header, _crc_before(memoryview(before), _CRC.size))
        try:
            written = self._file.write(data)
            if written != len(data):
                raise OSError(
                    f"{self.path}: {written} of {len(data)} bytes of a record could be written: is the disk full?"
                )
        except OSError:
            self._file.truncate(end)
            raise
        self._ends.append(end + len(data))

    def write_step(self, identity: Identity, record: Record) -> None:
        """``write``, for a step of the optimizer with this identity. JournalError if it is not the one in the header."""
        self.header.compare(vars(identity))
        self.write(record)

    def sync(self) -> None:
        """Wait until all records are on the disk, where they survive a loss of power."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """``sync``, then close the file and free its lock."""
        if self._file is not None:
            self.sync()
            unlock(self._file)
            self._file.close()
            self._file, self._closed = None, True

    def _cut(self, steps: int) -> None:
        """Keep the first ``steps`` records and remove the others."""
        del self._ends[steps + 1 :]
        if self._file is not None and os.fstat(self._file.fileno()).st_size > self._ends[-1]:
            self._file.truncate(self._ends[-1])


def _lock(file: IO[bytes]) -> None:
    if not lock(file):
        raise JournalError(
            f"{file.name}: is open for writing already, here or in another process: close that journal first"
        )


def _crc_before(data: memoryview, end: int) -> int:
    """The checksum in the last four bytes before ``end``."""
    return int(_CRC.unpack_from(data, end - _CRC.size)[0])


def _read_start(data: memoryview) -> tuple[Header, int]:
    """The header at the start of a file, and its end. JournalError if there is none."""
    if len(data) < _START.size or data[: len(MAGIC)] != MAGIC:
        raise JournalError("journal: the file is none, it does not start as one")
    _, version, length = _START.unpack_from(data)
    if version != FORMAT_VERSION:
        raise JournalError(
            f"journal: has format version {version}, this library reads {FORMAT_VERSION}: use a newer one"
        )
    end = _START.size + length
    if end + _CRC.size > len(data) or zlib.crc32(data[:end]) != _CRC.unpack_from(data, end)[0]:
        raise JournalError("journal: its header is cut off or damaged, checksum or length are wrong")
    return Header.parse(bytes(data[_START.size : end])), end + _CRC.size


# ---- replay ------------------------------------------------------------------------------------------------------


def replay(
    base: nn.Module | Mapping[str, Tensor] | Sequence[Tensor],
    journal: Journal | str | os.PathLike[str],
    upto: int | None = None,
    *,
    progress: Callable[[int, int], None] = lambda done, steps: None,
) -> int:
    """Compute the weights of a run again, in place, from the weights that it started with.

    On the backend of the run the result has the bits of the run. On another backend, and where the run used the in-place
    engine, whose probes round the weights, the two agree to rounding, and a warning says so. Residuals start at zero and are
    dropped at the end.

    Args:
        base: the weights before the first step: the module, its tensors by name, or in order.
        journal: the journal or its path.
        upto: number of steps to make, skipped ones counted; None makes all.
        progress: called with the steps done and the steps to do, at least every 64 steps.

    Returns:
        The number of steps made.

    Raises:
        JournalError: ``base`` is not what the journal starts from, or the journal is damaged.
        ValueError: ``upto`` is more than the journal has.
    """
    journal = journal if isinstance(journal, Journal) else Journal.open(journal)
    header, steps = journal.header, len(journal) if upto is None else upto
    if not 0 <= steps <= len(journal):
        raise ValueError(f"upto: expected 0 to {len(journal)}, the steps of the journal, got {upto}")
    tensors = _tensors_of(base, header)
    if (found := hash_of(tensors)) != header.base:
        raise JournalError(
            f"base: expected weights with SHA-256 {header.base}, from which the run started, got {found}"
        )
    device, bits = tensors[0].device, header.residual
    _warn_of_rounding(header, device)
    space = ParamSpace(
        [t.name for t in header.tensors], tensors, header.seed, header.distribution,
        torch.zeros(1 + len(tensors), dtype=torch.int64, device=device),
        empty_residuals(tensors, bits) if bits else [],
        header.hessian or None, [scaling.identity(t, header.hessian) for t in tensors if header.hessian],
        rank=header.rank,
        padding=dict(header.padding),
        scales=header.scales,
    )  # fmt: skip
    with torch.no_grad():
        _replay(islice(journal, steps), space, header, lambda done: progress(done, steps))
    return steps


def _warn_of_rounding(header: Header, device: torch.device) -> None:
    here = backend_of(device)
    if header.engine == "inplace" or here != header.backend:
        why = "the run's probes were made in place" if header.engine == "inplace" else f"here it is {here!r}"
        warn(
            f"replay agrees with the run to rounding, not bit for bit: {why} (backend of the run: {header.backend!r})",
        )


def _replay(
    records: Iterable[Record], space: ParamSpace, header: Header, progress: Callable[[int], None] = lambda done: None
) -> Progress:
    """Make steps on the weights. ``progress`` is called with the number of steps that are made, after each pass."""
    stream, made, moved, carry = 0, 0, 0, torch.zeros(0, device=space.counters.device)
    rates = torch.tensor([t.rates for t in header.tensors], device=carry.device)
    past = Past.none(torch.device("cpu"))
    for together in _passes(records, len(rates), 1 if space.hessian else _STEPS):
        applied = []
        for r in together:
            now = None if r.carry is None else torch.from_numpy(r.carry.copy()).to(carry.device)
            stream, moved, carry = r.stream + len(r.coeffs), moved + r.moved, carried(carry, now, r.moved)
            past, coeffs = _before(past, r), torch.from_numpy(r.coeffs[r.past :].copy())
            applied.append(past.applied(len(coeffs), len(rates)))
            past = past.then(torch.arange(r.stream + r.past, stream), coeffs, r.moved, r.left_out)
        _pass([(r, mask) for r, mask in zip(together, applied, strict=True) if r.moved], space, rates)
        made += len(together)
        progress(made)
    return Progress(stream, moved, made - moved, carry, past)


def _before(past: Past, record: Record) -> Past:
    """The probes of earlier steps that a record goes along. JournalError unless they are those of the steps just before it."""
    steps = found = 0
    while found < record.past and steps < len(past.steps):
        steps += 1
        found += past.steps[-steps][0]
    probes = past.last(steps)
    expected = list(range(record.stream, record.stream + record.past))
    if record.past > len(record.coeffs) or probes.streams.tolist() != expected:
        raise JournalError(
            f"journal: step {record.step} goes along {record.past} probes of earlier steps from number {record.stream} on, which "
            "are not those of the steps before it: it is damaged"
        )
    return probes


def _passes(records: Iterable[Record], tensors: int, most: int) -> Iterator[list[Record]]:
    """The records in lists of at most ``most`` steps that one pass can make: all round alike and have as many probes."""
    together: list[Record] = []
    for record in records:
        if together:
            first, room = together[0], min(most, _COEFFICIENTS // (tensors * max(1, len(record.coeffs))))
            alike = (len(first.coeffs), first.stochastic) == (len(record.coeffs), record.stochastic)
            alike = alike and first.squares is record.squares is None
            if not alike or len(together) >= room:
                yield together
                together = []
        together.append(record)
    if together:
        yield together


def _pass(steps: Sequence[tuple[Record, Tensor]], space: ParamSpace, rates: Tensor) -> None:
    """Make steps that move the weights in one pass; with a Hessian or a second moment there may be only one.

    Each comes with a mask, bool (K, T): whether a probe was applied to a tensor in its step.
    """
    if not steps:
        return
    device, records = rates.device, [r for r, _ in steps]

    def stacked(rows: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack(rows)).to(device)

    lr, decay = stacked([r.lr for r in records]), stacked([r.decay for r in records])
    moves = torch.ones(len(records), len(rates), dtype=torch.bool, device=device)
    for row, record in zip(moves, records, strict=True):
        row[list(record.left_out)] = False
    coeffs = stacked([r.coeffs for r in records]).unsqueeze(2) * -lr[:, None, rates] * space.full(1.0)
    applied = torch.stack([mask for _, mask in steps]).to(device) & moves.unsqueeze(1)
    coeffs, decay = coeffs.where(applied, 0.0), decay[:, rates].where(moves, 0.0)
    streams = torch.tensor([[r.stream] for r in records], device=device)
    streams = streams + torch.arange(coeffs.shape[1], device=device)
    updates = torch.tensor([r.step for r in records], device=device) if records[0].stochastic else None
    record, more = records[0], dict[str, Tensor]()
    if space.hessian and record.curvature is not None:
        more["curvature"] = torch.from_numpy(record.curvature.copy()).to(device).unsqueeze(1) * moves
        more["smoothing"] = torch.full_like(decay[0], record.smoothing) * moves[0]
    if record.squares is not None:
        more["squares"] = torch.from_numpy(record.squares.copy()).to(device).unsqueeze(1).where(applied[0], 0.0)
    if space.hessian or more:
        space.update_(list(torch.split(streams[0], 1)), coeffs[0], decay[0], updates, **more)
    else:
        space.replay_(streams, coeffs, decay, updates)


def _tensors_of(base: nn.Module | Mapping[str, Tensor] | Sequence[Tensor], header: Header) -> list[Tensor]:
    """The tensors of ``base`` in the journal's order. JournalError unless all are there, with their shapes and dtypes."""
    if isinstance(base, nn.Module):
        base = dict(base.named_parameters())
    if not isinstance(base, Mapping):
        if len(base) != len(header.tensors):
            raise JournalError(f"base: expected {len(header.tensors)} tensors as in the journal, got {len(base)}")
        base = {t.name: x for t, x in zip(header.tensors, base, strict=True)}
    if missing := [t.name for t in header.tensors if t.name not in base]:
        raise JournalError(f"base: {some(missing)} of the journal are not there, there are {some(list(base))}")
    tensors = [base[t.name].detach() for t in header.tensors]
    for t, x in zip(header.tensors, tensors, strict=True):
        if tuple(x.shape) != t.shape or x.dtype != DTYPES[t.dtype]:
            raise JournalError(
                f"base: {t.name}: expected {t.dtype} of shape {t.shape} as in the journal, got {x.dtype} {tuple(x.shape)}"
            )
    return tensors
