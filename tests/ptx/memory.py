"""Memory, with the checks of compute-sanitizer: memcheck, initcheck and racecheck.

Global memory is the registered buffers and nothing else; they are read and written in place. An access must lie inside one
of them and be aligned to its width; a read-only one is not written; a fresh one is not read before it is written; no byte of
a writable one is written by one program and touched by another in one launch. Shared memory is checked alike between
threads, which barriers order.
"""

import ctypes
from bisect import bisect_right

import numpy as np

from .semantics import UNSIGNED, i32, i64, u8, u16, u32, u64

NOBODY, SEVERAL = -1, -2


class Buffer:
    """The bytes [start, end) of the process's memory."""

    def __init__(self, start, end, name, writable, fresh):
        self.start, self.end, self.name, self.writable = start, end, name, writable
        self.low = start & ~15
        size = ((end + 15) & ~15) - self.low
        raw = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.low))
        self.views = {1: raw, 2: raw.view(u16), 4: raw.view(u32), 8: raw.view(u64)}
        self.written = np.zeros(size, np.bool_) if fresh else None  # which bytes of a fresh buffer
        self.new_launch()

    def new_launch(self):
        self.writer = self.reader = None  # of each byte, the program that did so in this launch

    def touch(self, places, size, program, write):
        """Record accesses of ``size`` bytes by programs: what is wrong with one of them, and with which."""
        if self.written is None and not self.writable:
            return None
        spans = places[:, None] + np.arange(size)
        if self.written is not None:
            if write:
                self.written[spans] = True
            elif (bad := ~self.written[spans].all(1)).any():
                return "reads {}, which nothing has written", bad
        if self.writable:
            if self.writer is None:
                self.writer, self.reader = (np.full(len(self.views[1]), NOBODY, i32) for _ in range(2))
            me, writer, reader = program[:, None], self.writer[spans], self.reader[spans]
            race = (writer != NOBODY) & (writer != me)
            if write:
                race |= (reader != NOBODY) & (reader != me)
                self.writer[spans] = np.broadcast_to(me, spans.shape)
            else:
                self.reader[spans] = np.where((reader == NOBODY) | (reader == me), me, SEVERAL)
            if race.any():
                return "race on {} with another program", race.any(1)
        return None


class GlobalMemory:
    def __init__(self):
        self.buffers = []  # by their starts

    def register(self, start, size, name, writable=True, fresh=False):
        """Make bytes known. Where some are known already (views of one tensor), they become one buffer with both's rights."""
        if not size:
            return
        end, touching = start + size, [b for b in self.buffers if b.start < start + size and start < b.end]
        if len(touching) == 1 and touching[0].start <= start and end <= touching[0].end:
            touching[0].writable |= writable
            return
        for b in touching:
            self.buffers.remove(b)
            start, end, writable = min(start, b.start), max(end, b.end), writable or b.writable
            name = f"{name}+{b.name}"
        buffer = Buffer(start, end, name, writable, fresh and not touching)
        self.buffers.insert(bisect_right([b.start for b in self.buffers], start), buffer)

    def new_launch(self):
        self.starts = np.array([b.start for b in self.buffers], u64)
        self.ends = np.array([b.end for b in self.buffers], u64)
        for b in self.buffers:
            b.new_launch()

    def find(self, addresses, size, fail):
        """(buffer, which of the addresses, their places in it), after the checks; ``fail(which, message)`` raises."""
        wrong = addresses & u64(size - 1) != 0
        if wrong.any():
            fail(wrong, f"misaligned for {size} bytes: {self._near(addresses[wrong][0])}")
        at = np.searchsorted(self.starts, addresses, "right").astype(i64) - 1
        wrong = at < 0
        if len(self.buffers):
            wrong |= (addresses + u64(size) > self.ends[at]) | (addresses + u64(size) < addresses)
        if wrong.any():
            fail(wrong, f"out of bounds: {size} bytes, {self._near(addresses[wrong][0])}")
        for number in np.unique(at):
            which = slice(None) if (at == at[0]).all() else np.flatnonzero(at == number)
            buffer = self.buffers[number]
            yield buffer, which, (addresses[which] - u64(buffer.low)).astype(i64)

    def _near(self, address):
        if not self.buffers:
            return "and no memory is known"
        a = int(address)
        b = min(self.buffers, key=lambda b: max(b.start - a, a - b.end + 1, 0))
        return f"nearest is {b.name} of {b.end - b.start} bytes, {a - b.start} bytes from its start"

    def _checked(self, addresses, size, program, write, fail):
        for buffer, which, places in self.find(addresses, size, fail):
            lanes = np.arange(len(addresses))[which]
            if write and not buffer.writable:
                fail(lanes, f"writes {buffer.name}, which is read only")
            if problem := buffer.touch(places, size, program[which], write):
                message, bad = problem
                place = int(places[bad][0]) + buffer.low - buffer.start
                fail(lanes[bad], f"{message.format(buffer.name)}, {place} bytes from its start")
            yield buffer, which, places

    def load(self, addresses, count, size, program, fail):
        """``count`` neighbouring elements of ``size`` bytes from each address."""
        out = np.zeros((count, len(addresses)), UNSIGNED[8 * size])
        for buffer, which, places in self._checked(addresses, count * size, program, False, fail):
            for k in range(count):
                out[k, which] = buffer.views[size][places // size + k]
        return list(out)

    def store(self, addresses, values, size, program, fail):
        for buffer, which, places in self._checked(addresses, len(values) * size, program, True, fail):
            for k, value in enumerate(values):
                buffer.views[size][places // size + k] = value[which]

    def atomic_add(self, addresses, value, size, fail):
        """Old values. Atomics do not race; one after another, in the order of the threads."""
        old = np.zeros(len(addresses), UNSIGNED[8 * size])
        for buffer, which, places in self.find(addresses, size, fail):
            lanes = np.arange(len(addresses))[which]
            if not buffer.writable:
                fail(lanes, f"adds to {buffer.name}, which is read only")
            for lane, place in zip(lanes, places // size, strict=True):
                old[lane] = buffer.views[size][place]
                buffer.views[size][place] += value[lane]
        return old


class SharedMemory:
    """Of each program of a batch; addresses count from BASE, so that one made from nothing is wrong."""

    BASE = 1024

    def __init__(self, programs, size):
        self.size = size
        self.bytes = np.zeros((programs, max((size + 15) & ~15, 16)), u8)
        self.written = np.zeros(self.bytes.shape, np.bool_)
        # of each byte: the thread that did so last, and how many barriers of its warp and its program it had passed
        self.last = {kind: np.full((*self.bytes.shape, 3), NOBODY, i64) for kind in ("write", "read")} if size else {}

    def _checked(self, addresses, size, program, thread, barriers, write, fail):
        """(program, byte) of accesses by threads, whose numbers count through all programs; barriers: (n, 2)."""
        place = addresses.astype(i64) - self.BASE
        for wrong, message in (
            ((place < 0) | (place + size > self.size), f"out of bounds of the {self.size} bytes of shared memory"),
            (place % size != 0, f"misaligned for {size} bytes of shared memory"),
        ):
            if wrong.any():
                fail(wrong, f"{message}: at {int(place[wrong][0])}")
        at = program[:, None], place[:, None] + np.arange(size)
        if not write and (wrong := ~self.written[at].all(1)).any():
            fail(wrong, f"reads shared memory at {int(place[wrong][0])}, which nothing has written")
        for kind in ("write", "read") if write else ("write",):
            other, warp_barriers, program_barriers = np.moveaxis(self.last[kind][at], -1, 0)
            ordered = (program_barriers != barriers[:, 1:]) | (
                (other // 32 == thread[:, None] // 32) & (warp_barriers != barriers[:, :1])
            )
            race = ((other != NOBODY) & (other != thread[:, None]) & ~ordered).any(1)
            if race.any():
                fail(
                    race,
                    f"race on shared memory at {int(place[race][0])}: a {kind} by another thread and no barrier since",
                )
        self.last["write" if write else "read"][at] = np.concatenate([thread[:, None], barriers], 1)[:, None, :]
        if write:
            self.written[at] = True
        return at

    def load(self, addresses, count, size, *who):
        at = self._checked(addresses, count * size, *who[:-1], False, who[-1])
        return list(np.ascontiguousarray(self.bytes[at]).view(UNSIGNED[8 * size]).T)

    def store(self, addresses, values, size, *who):
        at = self._checked(addresses, len(values) * size, *who[:-1], True, who[-1])
        self.bytes[at] = np.ascontiguousarray(np.stack(values, 1)).view(u8)
