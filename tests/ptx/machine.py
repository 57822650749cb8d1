"""Runs kernels: a register is an array with an element for each thread (lane), and an instruction works on all that are at it.

A kernel is cut into basic blocks. Lanes at different blocks are run lowest block first, which brings them together again
where a structured program does. Instructions that need a whole warp check that it is there. A register that is read must have
been written, in each lane.
"""

from collections.abc import Callable

import numpy as np

from .memory import GlobalMemory, SharedMemory
from .parser import Address, Literal, PTXError, Register, Sink, Special, Symbol, Vector, parse
from .semantics import UNSIGNED, canonical, dtype, f32, f64, i32, i64, meaning, u16, u32, u64, width

EXIT = 1 << 30  # the number of the block where lanes that are done stay
WARP = 32
LANE = np.arange(WARP)
NOTHING_TO_DO = ("membar", "fence")  # one instruction after another: memory is always in order


class Kernel:
    """An entry of a module, ready to run."""

    def __init__(self, entry, error=0.0):
        self.name, self.parameters, self.threads, self.shared = (
            entry.name,
            entry.parameters,
            entry.threads,
            entry.shared,
        )
        self.widths, self.error = entry.widths, error
        self.blocks, self.labels = [[]], {}
        targets = {i.operands[0].name for i in entry.code if not isinstance(i, str) and i.name == "bra"}
        for item in entry.code:  # jumps and barriers end a block; labels that are jumped to start one
            if isinstance(item, str):
                if item in targets:
                    if self.blocks[-1]:
                        self.blocks.append([])
                    self.labels[item] = len(self.blocks) - 1
                continue
            self.blocks[-1].append(item)
            if item.name in ("bra", "ret", "exit", "bar", "barrier"):
                self.blocks.append([])
        self.inputs, self.outputs = self._registers()
        self.steps = [[s for i in block if (s := step(self, i)) is not None] for block in self.blocks]
        self.fusible = [i.text for block in self.blocks for i in fusible(block)]

    def _registers(self):
        """Of each block, the registers that it reads before it writes them, and those it writes that others know too."""
        inputs, written, seen = [], [], {}
        for number, block in enumerate(self.blocks):
            reads, writes = {}, {}
            for i in block:
                used, made = uses(i)
                reads |= {r: None for r in used if r not in writes}
                writes |= dict.fromkeys(made)
            inputs.append(list(reads))
            written.append(writes)
            for r in {*reads, *writes}:
                seen.setdefault(r, set()).add(number)
        outputs = [
            [r for r in writes if len(seen[r]) > 1 or r in reads] for reads, writes in zip(inputs, written, strict=True)
        ]
        return inputs, outputs


def load(ptx, name=None, error=0.0):
    """The named, or first, kernel of a module."""
    entries = parse(ptx)
    return Kernel(entries[name or next(iter(entries))], error)


def names(operand):
    """Registers of an operand."""
    if isinstance(operand, Register):
        return [operand.name]
    parts = operand.items if isinstance(operand, Vector) else [operand.base] if isinstance(operand, Address) else []
    return [n for p in parts for n in names(p)]


def uses(i):
    """Names of the registers that an instruction reads and writes."""
    no_result = i.name in ("st", "stmatrix", "red", "bra", "ret", "exit", "bar", "barrier", *NOTHING_TO_DO)
    made = [] if no_result or not i.operands else names(i.operands[0])
    used = [n for o in i.operands[0 if no_result else 1 :] for n in names(o)]
    return used + ([i.guard.name, *made] if i.guard else []), made


def fusible(block):
    """Additions that ptxas may fuse with the product they add, so that what the hardware computes is not known."""
    products = {i.operands[0] for i in block if i.name == "mul" and i.type == "f32" and "rn" not in i.modifiers}
    return [
        i for i in block
        if i.name in ("add", "sub") and i.type == "f32" and "rn" not in i.modifiers and products & set(i.operands[1:])
    ]  # fmt: skip


# ---- steps: what an instruction does to a group of lanes ------------------------------------------------------------------


def reader(kernel, operand, kind):
    """A function of a group that gives an operand as an array of a PTX type; of one element where all lanes have the same.

    Of a register that is wider than the type, the lower bits.
    """
    unsigned, wanted = UNSIGNED[width(kind)], dtype(kind)
    if isinstance(operand, Register):
        name, narrow = operand.name, kernel.widths[operand.name] > width(kind) > 1
        if kernel.widths[name] < width(kind):
            raise PTXError(f"register %{name} of {kernel.widths[name]} bits read as {kind}")
        if kind == "pred":
            return (lambda g: ~g[name]) if operand.negated else (lambda g: g[name])
        return (lambda g: g[name].astype(unsigned).view(wanted)) if narrow else (lambda g: g[name].view(wanted))
    if isinstance(operand, Special):
        return lambda g: g.machine.special(operand.name)[g.lanes].astype(unsigned)
    if isinstance(operand, Symbol) and operand.name in kernel.shared:
        operand = Literal(SharedMemory.BASE)
    if not isinstance(operand, Literal):
        raise PTXError(f"unknown operand {operand}")
    constant = np.array([operand.bits & ((1 << width(kind)) - 1)], unsigned).view(wanted)
    return lambda g: constant


def writer(kernel, i, operand, kind):
    """A function of a group and a result that assigns it to a register: where the guard is true, extended to its width."""
    if isinstance(operand, Sink):
        return lambda g, value: None
    name, bits = operand.name, kernel.widths[operand.name]
    if bits < width(kind):
        raise PTXError(f"register %{name} of {bits} bits cannot hold {kind}: {i.text}")
    wide = i64 if kind[0] == "s" else u64
    guard = reader(kernel, i.guard, "pred") if i.guard else None

    def write(g, value):
        if value.dtype.kind == "f":
            value = canonical(value)
        if bits > 8 * value.itemsize and bits > 1:
            value = value.astype(wide).astype(UNSIGNED[bits])
        value = value.view(UNSIGNED[bits])
        if guard is not None:
            value = np.where(guard(g), value, g[name])
        g[name] = value if len(value) == g.n else np.full(g.n, value[0])

    return write


def step(kernel, i) -> Callable | None:
    """A function of a group of lanes; one that gives a number or an array of them sends the lanes to those blocks."""
    if i.name in NOTHING_TO_DO:
        return None
    if effect := EFFECTS.get(i.name):
        found = effect(kernel, i)
    else:
        found = computes(kernel, i)
    if found is None:
        raise PTXError(f"unknown instruction or form of one: {i.text}")

    def run(g):
        g.instruction = i
        return found(g)

    return run


def computes(kernel, i):
    known = meaning(i, kernel.error)
    if known is None:
        return None
    reads = [reader(kernel, o, kind) for o, kind in zip(i.operands[1:], known.reads, strict=False)]
    write, function = writer(kernel, i, i.operands[0], known.writes), known.function
    if i.name in ("div", "rem") and i.type != "f32":
        divisor = reads[1]
        return lambda g: (g.require(divisor(g) != 0, "division by zero"), write(g, function(*[r(g) for r in reads])))[1]
    return lambda g: write(g, function(*[r(g) for r in reads]))


def move(kernel, i):
    """mov, also between a wide register and the parts in braces, least first."""
    to, source = i.operands
    kind = "pred" if i.type == "pred" else "b" + i.type[1:]
    if isinstance(to, Vector):
        part = f"b{width(kind) // len(to.items)}"
        read, writes = reader(kernel, source, kind), [writer(kernel, i, o, part) for o in to.items]

        def unpack(g):
            parts = np.broadcast_to(read(g), g.n).copy().view(dtype(part)).reshape(g.n, -1)
            for k, write in enumerate(writes):
                write(g, parts[:, k])

        return unpack
    write = writer(kernel, i, to, kind)
    if isinstance(source, Vector):
        reads = [reader(kernel, o, f"b{width(kind) // len(source.items)}") for o in source.items]
        return lambda g: write(g, np.stack([g.all(r) for r in reads], 1).view(dtype(kind))[:, 0])
    read = reader(kernel, source, kind)
    return lambda g: write(g, read(g))


def address_of(kernel, operand):
    """A function of a group that gives the addresses of its lanes."""
    base, offset = operand.base, operand.offset
    kind = f"b{kernel.widths[base.name]}" if isinstance(base, Register) else "b32"
    read = reader(kernel, base, kind)
    shift = np.array([offset & ((1 << width(kind)) - 1)], dtype(kind))
    return lambda g: np.broadcast_to(read(g) + shift, g.n)


def access(kernel, i, memory_operand, values):
    """What ld, st, red and atom share: space, elements, address and the lanes whose guard is true."""
    spaces = [s for s in ("global", "shared") if any(p.startswith(s) for p in i.modifiers)]
    count = f"v{len(values.items)}" if isinstance(values, Vector) and len(values.items) > 1 else ""
    if len(spaces) != 1 or [p for p in i.modifiers if p in ("v2", "v4", "v8")] != [count] * bool(count):
        raise PTXError(f"unknown space or form: {i.text}")
    guard = reader(kernel, i.guard, "pred") if i.guard else None
    active = (lambda g: np.flatnonzero(np.broadcast_to(guard(g), g.n))) if guard else (lambda g: np.arange(g.n))
    items = values.items if isinstance(values, Vector) else (values,)
    return spaces[0], items, width(i.type) // 8, address_of(kernel, memory_operand), active


def load_from(kernel, i):
    if "param" in i.modifiers:
        name, write = i.operands[1].base.name, writer(kernel, i, i.operands[0], i.type)
        if i.operands[1].offset:
            raise PTXError(f"unknown form: {i.text}")
        bits = (1 << width(i.type)) - 1
        return lambda g: write(
            g, np.array([g.machine.arguments[name] & bits], UNSIGNED[width(i.type)]).view(dtype(i.type))
        )
    space, items, size, address, active = access(kernel, i, i.operands[1], i.operands[0])
    writes = [writer(kernel, i, o, i.type) for o in items]

    def run(g):
        lanes = active(g)
        if not len(lanes):
            return
        loaded = g.memory(space, "load", lanes, address(g)[lanes], len(items), size)
        for write, value in zip(writes, loaded, strict=True):
            if len(lanes) < g.n:
                spread = np.zeros(g.n, value.dtype)
                spread[lanes] = value
                value = spread
            write(g, value.view(dtype(i.type)))

    return run


def store_to(kernel, i):
    space, items, size, address, active = access(kernel, i, i.operands[0], i.operands[1])
    reads = [reader(kernel, o, f"b{8 * size}") for o in items]

    def run(g):
        lanes = active(g)
        if len(lanes):
            g.memory(space, "store", lanes, address(g)[lanes], [g.all(r)[lanes] for r in reads], size)

    return run


def atomic(kernel, i):
    """atom and red: additions of integers, in global memory."""
    at = int(i.name == "atom")
    if i.parts[-2] != "add" or i.type not in ("u32", "s32", "u64", "s64") or "global" not in i.modifiers:
        return None
    _, _, size, address, active = access(kernel, i, i.operands[at], i.operands[at + 1])
    read = reader(kernel, i.operands[at + 1], f"b{8 * size}")
    write = writer(kernel, i, i.operands[0], f"b{8 * size}") if at else (lambda g, value: None)

    def run(g):
        lanes, old = active(g), np.zeros(g.n, UNSIGNED[8 * size])
        if len(lanes):
            fail = g.fail_in(lanes)
            old[lanes] = g.machine.memory.atomic_add(address(g)[lanes], g.all(read)[lanes], size, fail)
        write(g, old)

    return run


def branch(kernel, i):
    target = kernel.labels[i.operands[0].name]
    if i.guard is None:
        return lambda g: target
    guard = reader(kernel, i.guard, "pred")
    return lambda g: np.where(guard(g), target, g.block + 1)


def finish(kernel, i):
    return None if i.guard else lambda g: EXIT


def barrier(kernel, i):
    return (lambda g: g.warp_barrier()) if i.parts[1] == "warp" else (lambda g: g.program_barrier())


def by_warp(kernel, i, kinds, results, function):
    """An instruction of whole warps: ``function`` of (warps, 32) arrays of the operands gives as many of the results.

    Its last operand is the mask of its members, which must be all.
    """
    reads = [reader(kernel, o, kind) for o, kind in zip(i.operands[1:], kinds, strict=False)]
    outs = i.operands[0].items if isinstance(i.operands[0], Vector) else i.operands[:1]
    writes = [writer(kernel, i, o, kind) for o, kind in zip(outs, results, strict=False)]

    def run(g):
        g.whole_warps()
        *values, members = (g.all(r).reshape(-1, WARP) for r in reads)
        g.require((members == u32(0xFFFFFFFF)).ravel(), "a member mask that is not the whole warp")
        for write, out in zip(writes, function(*values), strict=False):
            write(g, np.ascontiguousarray(np.broadcast_to(out, values[0].shape)).ravel())

    return run


def shuffle(kernel, i):
    mode = i.parts[2]

    def function(a, b, c):
        b, segment, clamp = b.astype(i64) & 31, c.astype(i64) >> 8 & 31, c.astype(i64) & 31
        low, high = LANE & segment, (LANE & segment) | (clamp & ~segment)
        source = {"idx": low | (b & ~segment), "up": LANE - b, "down": LANE + b, "bfly": LANE ^ b}[mode]
        inside = source >= high if mode == "up" else source <= high
        return np.take_along_axis(a, np.where(inside, source, LANE), 1), inside

    return by_warp(kernel, i, ("b32",) * 4, ("b32", "pred"), function)


_REDUCTIONS = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
               "xor": np.bitwise_xor}  # fmt: skip


def reduce(kernel, i):
    operation = _REDUCTIONS[i.parts[2]]
    return by_warp(
        kernel, i, (i.type, "b32"), (i.type,), lambda a: (operation.reduce(a, axis=1, keepdims=True, dtype=a.dtype),)
    )


def vote(kernel, i):
    def function(p):
        return (
            {
                "ballot": lambda: (p * (u64(1) << LANE.astype(u64))).sum(1, keepdims=True).astype(u32),
                "any": lambda: p.any(1, keepdims=True),
                "all": lambda: p.all(1, keepdims=True),
            }[i.parts[2]](),
        )

    return by_warp(kernel, i, ("pred", "b32"), (i.type,), function)


# ---- the tensor core: which element of a matrix a register of a lane holds --------------------------------------------------


def places(rows, per_register, group_is_row):
    """Index arrays (32, registers, elements) of a fragment of the m16n8 shapes, as the PTX ISA words them.

    ``rows``: whether registers come in pairs 8 rows (of the group) apart; A has them, B does not.
    """
    lane, register, element = np.ogrid[:WARP, : 4 if rows else 2, :per_register]
    group, thread = lane >> 2, lane & 3
    far = register >> 1 if rows else register  # the second half of the inner index
    inner = thread * per_register + element + 4 * per_register * far
    outer = group + 8 * (register & 1) if rows else group + 0 * register
    return np.broadcast_arrays(outer, inner) if group_is_row else np.broadcast_arrays(inner, outer)


_ROW, _COLUMN = np.ogrid[:WARP, :4]
RESULT = np.broadcast_arrays((_ROW >> 2) + 8 * (_COLUMN >> 1), (_ROW & 3) * 2 + (_COLUMN & 1))  # of C and D


def matrix_product(kernel, i):
    """mma: D = A B + C. Integers exactly; of floats, products and sums in float64 and one rounding, where hardware has more."""
    shape, (d_kind, a_kind, b_kind, c_kind) = next((p for p in i.parts if p.startswith("m16")), ""), i.parts[-4:]
    integers = shape == "m16n8k32" and d_kind == "s32"
    if not integers and not (shape == "m16n8k16" and d_kind == "f32"):
        return None
    inner, per_register = (32, 4) if integers else (16, 2)
    reads = [[reader(kernel, o, "b32") for o in group.items] for group in i.operands[1:4]]
    writes = [writer(kernel, i, o, d_kind) for o in i.operands[0].items]

    def matrix(g, registers, kind, where, shape):
        words = (
            np.stack([g.all(r) for r in registers], 1).view(dtype(kind)).reshape(-1, WARP, len(registers), per_register)
        )
        out = np.zeros((len(words), *shape), f64)
        out[:, *where] = (words.astype(u32) << u32(16)).view(f32) if kind == "bf16" else words
        return out

    def run(g):
        g.whole_warps()
        left = matrix(g, reads[0], a_kind, places(True, per_register, True), (16, inner))
        right = matrix(g, reads[1], b_kind, places(False, per_register, False), (inner, 8))
        c = np.stack([g.all(r) for r in reads[2]], 1).view(dtype(c_kind)).reshape(-1, WARP, 4)
        d = (left @ right)[:, *RESULT] + c
        if integers:
            fits = (np.abs(d + 0.5) < 2.0**31).all((1, 2))
            g.require(np.repeat(fits, WARP) | ("satfinite" not in i.parts), "a sum of the tensor core saturates")
            d = d.astype(i64)
        for k, write in enumerate(writes):
            write(g, np.ascontiguousarray(d[:, :, k].astype(dtype(d_kind)).ravel()))

    return run


def load_matrix(kernel, i):
    """ldmatrix: 8 by 8 tiles of 16 bits from shared memory; lane l has the address of a row."""
    count, trans, address = len(i.operands[0].items), "trans" in i.parts, address_of(kernel, i.operands[1])
    writes = [writer(kernel, i, o, "b32") for o in i.operands[0].items]

    def run(g):
        g.whole_warps()
        lanes = np.flatnonzero(np.tile(8 * count > LANE, g.n // WARP))
        words = np.stack(g.memory("shared", "load", lanes, address(g)[lanes], 2, 8), 1)
        tiles = words.view(u16).reshape(-1, count, 8, 8)
        tiles = np.ascontiguousarray(tiles.swapaxes(2, 3) if trans else tiles).view(u32)
        for k, write in enumerate(writes):
            write(g, tiles[:, k].ravel())

    return run


def store_matrix(kernel, i):
    """stmatrix: the way back."""
    count, trans, address = len(i.operands[1].items), "trans" in i.parts, address_of(kernel, i.operands[0])
    reads = [reader(kernel, o, "b32") for o in i.operands[1].items]

    def run(g):
        g.whole_warps()
        tiles = np.stack([g.all(r).reshape(-1, WARP) for r in reads], 1).view(u16).reshape(-1, count, 8, 8)
        words = np.ascontiguousarray(tiles.swapaxes(2, 3) if trans else tiles).view(u64).reshape(-1, 2)
        lanes = np.flatnonzero(np.tile(8 * count > LANE, g.n // WARP))
        g.memory("shared", "store", lanes, address(g)[lanes], list(words.T), 8)

    return run


EFFECTS = {
    "mov": move, "ld": load_from, "st": store_to, "red": atomic, "atom": atomic, "bra": branch, "ret": finish, "exit": finish,
    "bar": barrier, "barrier": barrier, "shfl": shuffle, "redux": reduce, "vote": vote, "mma": matrix_product,
    "ldmatrix": load_matrix, "stmatrix": store_matrix,
}  # fmt: skip


# ---- running ------------------------------------------------------------------------------------------------------------


class Group(dict):
    """Lanes at one block, and the registers that it knows of them. ``lanes``: their numbers, or a slice for all."""

    def __init__(self, machine, block, lanes, n):
        self.machine, self.block, self.lanes, self.n, self.instruction = machine, block, lanes, n, None

    def __missing__(self, name):
        self.fail(0, f"register %{name} is read before it is written")

    def all(self, read):
        """An operand with an element for each lane."""
        return np.ascontiguousarray(np.broadcast_to(read(self), self.n))

    def numbers(self, which=slice(None)):
        return self.machine.number[self.lanes][which]

    def fail(self, lane, message):
        i, number = self.instruction, int(self.numbers()[lane])
        program, thread = int(self.machine.program[number]), number % self.machine.threads
        where = f"{i.line}: {i.text}" if i else f"block {self.block}"
        raise PTXError(f"{self.machine.kernel.name}, {where}: program {program}, thread {thread}: {message}")

    def fail_in(self, lanes):
        """What memory calls with those of ``lanes`` that did wrong, a mask or their places among them."""
        return lambda which, message: self.fail(
            int(lanes[which][0]) if which.dtype == bool else int(lanes[which[0]]), message
        )

    def require(self, good, message):
        if not good.all():
            self.fail(int(np.flatnonzero(~np.broadcast_to(good, self.n))[0]), message)

    def memory(self, space, name, lanes, *what):
        """Load or store of some lanes, given the addresses first."""
        m, number = self.machine, self.numbers(lanes)
        if space == "global":
            return getattr(m.memory, name)(*what, m.program[number], self.fail_in(lanes))
        return getattr(m.shared, name)(*what, number // m.threads, number, m.barriers[number], self.fail_in(lanes))

    def whole_warps(self):
        first = self.numbers()[::WARP]
        if self.n % WARP or (first % WARP).any() or (self.numbers()[WARP - 1 :: WARP] != first + WARP - 1).any():
            self.fail(0, "some lanes of the warp are elsewhere")

    def warp_barrier(self):
        self.whole_warps()
        self.machine.barriers[self.numbers(), 0] += 1

    def program_barrier(self):
        counts = np.bincount(self.numbers() // self.machine.threads)
        if not np.isin(counts, (0, self.machine.threads)).all():
            self.fail(0, "some threads of the program are not at this barrier")
        self.machine.barriers[self.numbers()] += 1


class Machine:
    """Some programs of a launch, all of their threads at once."""

    def __init__(self, kernel, memory, arguments, programs, grid, shared, undefined):
        self.kernel, self.memory, self.arguments, self.grid, self.undefined = kernel, memory, arguments, grid, undefined
        self.threads, self.shared = kernel.threads, SharedMemory(len(programs), shared)
        self.n = len(programs) * self.threads
        self.number = np.arange(self.n)
        self.program = np.repeat(programs, self.threads).astype(i32)
        self.barriers = np.zeros((self.n, 2), i64)  # that a thread has passed: of its warp, of its program
        self.registers, self.missing = {}, {}  # values; of those that not all lanes have written, which have not

    def special(self, name):
        what, _, axis = name.partition(".")
        thread, ones = self.number % self.threads, np.ones(self.n, i64)
        x, y, _ = self.grid
        values = {
            "laneid": thread % WARP, "warpid": thread // WARP, "tid": thread if axis == "x" else 0 * ones,
            "ntid": ones * (self.threads if axis == "x" else 1),
        }  # fmt: skip
        if what == "nctaid":
            return ones * self.grid["xyz".index(axis)]
        if what == "ctaid":
            return {"x": self.program % x, "y": self.program // x % y, "z": self.program // (x * y)}[axis]
        return values[what]

    def run(self):
        at, block, lanes, n = np.zeros(self.n, i32), 0, slice(None), self.n
        with np.errstate(all="ignore"):
            while block != EXIT:
                after = self._run_block(block, lanes, n)
                at[lanes] = after
                block = int(at.min())
                here = at == block
                lanes, n = (slice(None), self.n) if here.all() else (np.flatnonzero(here), int(here.sum()))

    def _run_block(self, block, lanes, n):
        """Where the lanes go next."""
        g = Group(self, block, lanes, n)
        for name in self.kernel.inputs[block]:
            if name in self.registers:
                g[name] = self._defined(g, name)
            elif self.undefined is not None:
                g[name] = np.full(
                    n, self.undefined & ((1 << self.kernel.widths[name]) - 1), UNSIGNED[self.kernel.widths[name]]
                )
        after = None
        for run in self.kernel.steps[block]:
            after = run(g)
        for name in self.kernel.outputs[block]:
            if name in g:
                self._keep(name, g[name], lanes, n)
        return block + 1 if after is None else after

    def _defined(self, g, name):
        value = self.registers[name][g.lanes]
        if name in self.missing and (missing := self.missing[name][g.lanes]).any():
            if self.undefined is None:
                g.fail(int(np.flatnonzero(missing)[0]), f"register %{name} is read before it is written")
            bits = self.undefined & ((1 << self.kernel.widths[name]) - 1)
            value = np.where(missing, value.dtype.type(bits), value)
        return value

    def _keep(self, name, value, lanes, n):
        if n == self.n:
            self.registers[name] = value
            self.missing.pop(name, None)
            return
        if name not in self.registers:
            self.registers[name], self.missing[name] = np.zeros(self.n, value.dtype), np.ones(self.n, np.bool_)
        self.registers[name] = self.registers[name].copy()  # others may hold the same array
        self.registers[name][lanes] = value
        if name in self.missing:
            self.missing[name][lanes] = False


def launch(kernel, memory: GlobalMemory, arguments, grid, shared=0, undefined=None, lanes=1 << 13):
    """Run every program of the grid; ``arguments``: bits of the parameters, in order; ``lanes``: about how many at once.

    ``undefined``: the bits of a register that was never written; None for an error where one is read.
    """
    named = {name: int(value) for name, value in zip(kernel.parameters, arguments, strict=True)}
    memory.new_launch()
    programs, batch = np.arange(grid[0] * grid[1] * grid[2]), max(lanes // kernel.threads, 1)
    for first in range(0, len(programs), batch):
        Machine(kernel, memory, named, programs[first : first + batch], grid, shared, undefined).run()
