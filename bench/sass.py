"""Instructions a weight of every form of the Triton pass, without a GPU: ``python -m bench.sass [--json FILE] [--fast]``.

Compiles each form, disassembles it and follows the path of a whole, aligned tile: the shortest way round the loop that
has 128-bit stores, with loops inside it taken once a stream (the longest way through, so with every stream active).
The twelve main forms (K=1, in place; "+ 8": with a residual of 8 bits) are also compiled for every newer architecture that ptxas knows.
AMD's gfx90a and gfx942 follow, instructions of a lane, never judged: what LLVM makes of the same kernels without assembly.
Counts are exact and the same on every machine, so they are a gate: the exit code is 1 when a form passes its budget
(docs/triton.md). The predicted fraction of copy bandwidth comes from the model in ``predict``.
"""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from zo_core.kernels.triton import forms
from zo_core.kernels.triton.compiled import AMD, architectures, compile_form, disassemble
from zo_core.kernels.triton.forms import TILE
from zo_core.kernels.triton.passes import WARPS

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
PIPES = ("fma", "imad", "alu", "xu", "lsu", "tensor", "uniform", "control")


@dataclass(frozen=True)
class Gpu:
    """What the model needs: multiprocessors, GHz under load, GB/s of its data sheet; FP32 lanes a multiprocessor."""

    name: str
    capability: int
    sms: int
    ghz: float
    gbps: float
    fma: int = 128


GPUS = (
    Gpu("A100", 80, 108, 1.41, 2039, fma=64),
    Gpu("H100", 90, 132, 1.755, 3350),
    Gpu("H200", 90, 132, 1.755, 4800),
    Gpu("B200", 100, 148, 1.85, 8000),
    Gpu("RTX 4090", 89, 128, 2.52, 1008),
)
COPY = 0.91  # of the data sheet's bandwidth, what a device-to-device copy is taken to reach
BUSY = 0.9  # of a pipe's slots, what straight-line code with 16 or more warps is taken to fill


@dataclass(frozen=True)
class Form:
    """Arguments of a call, dtypes by their torch names, as ``forms.form_of`` takes them: K streams, in place without ``dst``."""

    distribution: str = "gaussian"
    src: str = "bfloat16"
    dst: str = ""  # src
    k: int = 1
    scale: str = ""
    stochastic: bool = False
    decay: bool = False
    residual: int = 0  # bits; written where the pass is in place

    def compiled(self) -> forms.Form:
        """The form that such a call has."""
        src, dst = (getattr(torch, name) for name in (self.src, self.dst or self.src))
        return forms.form_of(
            self.distribution, src, dst, self.scale, self.residual, not self.dst, self.stochastic, self.decay, self.k
        )


@dataclass(frozen=True)
class Variant:
    """A form with its budget: instructions a weight on sm_80 and sm_90 (0: reported, not judged)."""

    name: str
    form: Form
    budget: float = 0


VARIANTS = (
    Variant("gaussian bf16", Form(), 17),
    Variant("gaussian fp16", Form(src="float16"), 17),
    Variant("gaussian fp32", Form(src="float32"), 16),
    Variant("rademacher bf16", Form("rademacher"), 7.5),
    Variant("rademacher fp16", Form("rademacher", src="float16"), 7.5),
    Variant("rademacher fp32", Form("rademacher", src="float32"), 7),
    Variant("gaussian bf16 + 8 stochastic", Form(residual=8, stochastic=True), 26),
    Variant("gaussian bf16 + 16", Form(residual=16), 20.5),
    Variant("rademacher bf16 + 8 stochastic", Form("rademacher", residual=8, stochastic=True), 16.5),
    Variant("rademacher bf16 + 16", Form("rademacher", residual=16), 11.5),
    Variant("factored bf16", Form("factored"), 5.75),
    Variant("factored bf16 K=8", Form("factored", k=8), 11.5),
    Variant("gaussian bf16 stochastic", Form(stochastic=True), 23),
    Variant("gaussian fp16 stochastic", Form(src="float16", stochastic=True), 33),
    Variant("rademacher bf16 stochastic", Form("rademacher", stochastic=True), 13),
    Variant("gaussian bf16 -> fp32", Form(dst="float32")),
    Variant("gaussian bf16 K=2 stochastic decay", Form(k=2, stochastic=True, decay=True)),
    Variant("gaussian bf16 scaled by H", Form(scale="hessian")),
    Variant("gaussian bf16 scaled in factors", Form(scale="factors"), 21),
    Variant("gaussian fp32 scaled in factors", Form(src="float32", scale="factors"), 20.5),
    Variant("rademacher bf16 scaled in factors", Form("rademacher", scale="factors"), 11.5),
    Variant("gaussian bf16 + 8 stochastic, in factors", Form(residual=8, stochastic=True, scale="factors"), 30),
    Variant("gaussian bf16 H update", Form(scale="update", stochastic=True)),
    Variant(
        "gaussian bf16 K=10 second moment, + 8 stochastic", Form(k=10, scale="moment", residual=8, stochastic=True)
    ),
    Variant("rademacher bf16 K=8", Form("rademacher", k=8), 18),
    Variant("rademacher bf16 K=40", Form("rademacher", k=40), 39),
    Variant("rademacher bf16 K=160", Form("rademacher", k=160), 117),
    Variant("factored fp32", Form("factored", src="float32"), 6.75),
    Variant("factored bf16 stochastic", Form("factored", stochastic=True), 12),
    Variant("factored bf16 + 8 stochastic", Form("factored", residual=8, stochastic=True), 15.5),
    Variant("factored bf16 K=8 stochastic", Form("factored", k=8, stochastic=True), 18),
    Variant("factored bf16 K=32", Form("factored", k=32)),
    Variant("factored bf16 K=160", Form("factored", k=160)),
)
MAIN = VARIANTS[:12]


# ---- reading SASS -------------------------------------------------------------------------------------------------


@dataclass
class Block:
    """Straight-line code: opcodes, and the blocks that may follow."""

    opcodes: list[str] = field(default_factory=list)
    next: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Syntax:
    """How a listing writes a label, and an instruction as predicate, opcode and rest; which opcodes jump, and which of them may not."""

    label: str
    instruction: str
    target: str
    jumps: tuple[str, ...]
    may_not: str  # of the opcode, where there is no predicate


# ptxas writes some far jumps as CALL.REL.NOINC; nothing here is called
SASS = Syntax(
    r"\s*(\.L\w+):", r"\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);", r"`\((\.L\w+)\)",
    ("BRA", "EXIT", "RET", "BRX", "CALL"), r"$^",
)  # fmt: skip
GCN = Syntax(
    r"(\.LBB\w+):", r"\t()([a-z]+_\w+)(.*)", r"(\.LBB\w+)", ("s_branch", "s_cbranch", "s_endpgm"), r"s_cbranch"
)


def blocks_of(text: str, syntax: Syntax = SASS) -> list[Block]:
    """The control-flow graph of a listing: nvdisasm's, or LLVM's for AMD."""
    blocks, labels, jumps = [Block()], {}, []
    for line in text.splitlines():
        if label := re.match(syntax.label, line):
            if blocks[-1].opcodes:
                blocks[-1].next.append(len(blocks))
                blocks.append(Block())
            labels[label[1]] = len(blocks) - 1
            continue
        instruction = re.match(syntax.instruction, line)
        if not instruction:
            continue
        predicate, opcode, rest = instruction.groups()
        blocks[-1].opcodes.append(opcode)
        if re.match(rf"({'|'.join(syntax.jumps)})\b|s_cbranch", opcode):
            if target := re.search(syntax.target, rest):
                jumps.append((len(blocks) - 1, target[1]))
            # "@P2 BRA P1" and "BRA.U UP0" are conditional as well
            if predicate or re.match(r"\s*!?U?P\d", rest) or re.match(syntax.may_not, opcode):
                blocks[-1].next.append(len(blocks))
            blocks.append(Block())
    for at, name in jumps:
        blocks[at].next.append(labels[name])
    for block in blocks:
        block.next = [n for n in dict.fromkeys(block.next) if n < len(blocks)]
    return blocks


def loops_of(blocks: list[Block]) -> dict[int, set[int]]:
    """Natural loops: header -> blocks."""
    everything = set(range(len(blocks)))
    before: dict[int, list[int]] = {i: [] for i in everything}
    for i, b in enumerate(blocks):
        for n in b.next:
            before[n].append(i)
    dominators = dict.fromkeys(everything, everything) | {0: {0}}
    changed = True
    while changed:
        changed = False
        for i in everything - {0}:
            new = {i} | (set.intersection(*(dominators[p] for p in before[i])) if before[i] else set())
            if new != dominators[i]:
                dominators[i], changed = new, True
    loops: dict[int, set[int]] = {}
    for i, b in enumerate(blocks):
        for header in b.next:
            if header in dominators[i]:
                body, stack = {header}, [i]
                while stack:
                    if (x := stack.pop()) not in body:
                        body.add(x)
                        stack += before[x]
                loops.setdefault(header, set()).update(body)
    return loops


def _is_full_store(opcode: str) -> bool:
    return (opcode.startswith("STG") and ".128" in opcode) or "_store_dwordx4" in opcode


def path_of(
    blocks: list[Block], loops: dict[int, set[int]], header: int, trips: int, many: bool, longest: bool
) -> Counter[str]:
    """Opcodes once round a loop: the longest way, or the shortest that has full stores and, if ``many``, inner loops.

    Inner loops count ``trips`` times.
    """
    body = loops[header]
    inner = {h: b for h, b in loops.items() if h != header and b < body}
    outermost = {h: b for h, b in inner.items() if not any(b < other for other in inner.values())}
    owner = {x: h for h, b in outermost.items() for x in b}
    cost: dict[int, Counter[str]] = {}
    nexts: dict[int, set[int]] = {}
    for x in body:
        node = owner.get(x, x)
        nexts.setdefault(node, set()).update(owner.get(n, n) for n in blocks[x].next if n in body)
        if x not in owner:
            cost[x] = Counter(blocks[x].opcodes)
    for h in outermost:
        once = path_of(blocks, loops, h, 1, False, True)
        cost[h] = Counter({op: n * trips for op, n in once.items()})
        nexts[h].discard(h)
    best: dict[int, dict[tuple[bool, bool], Counter[str]]] = {}

    def walk(node: int) -> dict[tuple[bool, bool], Counter[str]]:
        """The best way from a node to the header, by whether it has a full store and an inner loop."""
        if node in best:
            return best[node]
        found = best[node] = {}
        own, stores = cost[node], any(map(_is_full_store, cost[node]))
        for n in nexts[node]:
            ways = {(False, False): Counter[str]()} if n == header else walk(n)
            for (stored, looped), rest in ways.items():
                way, key = own + rest, (stored or stores, looped or node in outermost)
                if key not in found or (way.total() > found[key].total()) == longest:
                    found[key] = way
        return found

    ways = walk(header)
    if longest:
        return max(ways.values(), key=Counter.total)
    if wanted := [way for (stored, looped), way in ways.items() if stored and looped >= many]:
        return min(wanted, key=Counter.total)
    raise ValueError("no path with 128-bit stores")


def tile_path(text: str, form: Form, syntax: Syntax = SASS) -> Counter[str]:
    """Opcodes of a whole tile, k streams."""
    blocks = blocks_of(text, syntax)
    loops = loops_of(blocks)
    with_store = [h for h, body in loops.items() if any(_is_full_store(op) for x in body for op in blocks[x].opcodes)]
    if not with_store:
        raise ValueError("no loop with 128-bit stores")
    # a loop inside takes a stream; or eight (sums.py) or ten (factored.py), of which the first are apart
    sums, step = form.compiled().streams == "sums", 10 if form.distribution == "factored" else 8
    trips = -(-form.k // step) - 1 if sums else form.k
    header = min(with_store, key=lambda h: len(loops[h]))
    return path_of(blocks, loops, header, trips, trips > 0 and form.k > 1, False)


def pipe_of(opcode: str) -> str:
    """The pipe an instruction goes to (Nsight Compute's names, merged)."""
    name = opcode.split(".")[0]
    if name in ("FFMA", "FMUL", "FADD", "FFMA2", "FMUL2", "FADD2", "HFMA2", "HMUL2", "HADD2"):
        return "fma"
    if name in ("IMAD", "IDP"):
        return "imad"
    if name in ("MUFU", "I2F", "F2I", "F2F", "POPC", "FLO", "BREV"):
        return "xu"
    if name in (
        "LDG",
        "STG",
        "LDS",
        "STS",
        "LDL",
        "STL",
        "LDSM",
        "STSM",
        "ATOMG",
        "RED",
        "REDG",
        "SHFL",
        "LDC",
        "ATOM",
    ):
        return "lsu"
    if name in ("IMMA", "HMMA", "QMMA", "OMMA"):
        return "tensor"
    if name.startswith("U") or name in ("R2UR", "REDUX", "CREDUX", "S2UR", "LDCU"):
        return "uniform"
    if name in ("BRA", "EXIT", "BAR", "NOP", "WARPSYNC", "BSSY", "BSYNC", "DEPBAR", "CALL", "RET"):
        return "control"
    return "alu"


# ---- the table ----------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """One form on one architecture. Counts are instructions a weight."""

    name: str
    capability: int | str
    total: float
    pipes: dict[str, float]
    registers: int
    shared: int
    local: int
    widths: list[str]
    predicted: dict[str, float]
    budget: float
    problems: list[str]


def predict(pipes: dict[str, float], wide: float, total: float, bytes_moved: float, gpu: Gpu) -> float:
    """Fraction of copy bandwidth: time to move the bytes over the time of the slowest of memory, issue and pipes.

    Lanes a cycle of a multiprocessor: issue 128; FP32 multiply-add ``gpu.fma``; 32-bit integer multiply-add 64, a wide
    one counted twice, dot products as one (CUDA programming guide, arithmetic throughput; our assumption the last two); ALU 64;
    XU 16; LSU 32; IMMA m16n8k32 one instruction a lane in 8 cycles of 4 tensor cores (A100's dense int8 rate).
    """
    cycles = max(
        total / 128,
        pipes["fma"] / gpu.fma + (pipes["imad"] + wide) / 64,
        pipes["alu"] / 64,
        pipes["xu"] / 16,
        pipes["lsu"] / 32,
        pipes["tensor"] / 16,
    )
    compute = cycles / BUSY / (gpu.sms * gpu.ghz)
    return min(1.0, bytes_moved / (gpu.gbps * COPY) / compute)


def judge(variant: Variant, capability: int) -> Result:
    """Compile, count and compare with the budget."""
    form = variant.form
    compiled = disassemble(compile_form("pass_kernel", {"FORM": form.compiled()}, capability))
    problems = []
    weights = TILE / (32 * WARPS)
    try:
        path = tile_path(compiled.text, form)
    except ValueError as error:
        path = Counter()
        problems.append(str(error))
    pipes = dict.fromkeys(PIPES, 0.0)
    for opcode, n in path.items():
        pipes[pipe_of(opcode)] += n / weights
    total = path.total() / weights
    widths = sorted({op for op in path if op.startswith(("LDG", "STG"))})
    # scalars (coefficients, stream numbers) are loads of one element a thread; the weights move in 128 bits, and
    # residuals of 8 bits, of as many elements a thread, in 64
    moved = {
        w: sum(n for op, n in path.items() if re.match(rf"(LDG|STG)\b.*\.{w}\b", op)) * w / 8 / weights
        for w in (64, 128)
    }
    residual = form.residual // 8 * (1 if form.dst else 2)
    expected = BYTES[form.src] + BYTES[form.dst or form.src] + {"hessian": 4, "update": 8}.get(form.scale, 0) + residual
    # the columns' factors, the same for each row, and the words of their signs
    cached = 4 if form.scale == "factors" else 0
    if form.distribution == "factored":
        cached += 4 if form.k == 1 else 2 * -(-form.k // 10)
    short = moved[128] + (moved[64] if form.residual == 8 else 0) < expected + cached
    if short:
        problems.append(
            f"128-bit accesses move {moved[128]:g} bytes a weight of {expected + cached}; {' '.join(widths)}"
        )
    if compiled.stack or compiled.local:
        problems.append(f"{compiled.stack + compiled.local} bytes of local memory")
    if variant.budget and capability in (80, 90) and total > variant.budget:
        problems.append(f"{total:.1f} instructions a weight, budget {variant.budget:g}")
    wide = sum(n for op, n in path.items() if op.startswith(("IMAD.WIDE", "IMAD.HI"))) / weights
    return Result(
        variant.name, capability, total, pipes, compiled.registers, compiled.shared, compiled.local + compiled.stack, widths,
        {g.name: predict(pipes, wide, total, expected, g) for g in GPUS if g.capability == capability and total},
        variant.budget, problems,
    )  # fmt: skip


def count_for_amd(variant: Variant, architecture: str) -> Result:
    """Compile for an AMD GPU and count: vector instructions as ALU, scalar ones as uniform, memory as LSU."""
    text = compile_form("pass_kernel", {"FORM": variant.form.compiled()}, architecture).asm["amdgcn"]
    path, weights = tile_path(text, variant.form, GCN), TILE / (64 * WARPS)
    pipes = dict.fromkeys(PIPES, 0.0)
    for opcode, n in path.items():
        pipes[{"v_": "alu", "s_": "uniform"}.get(opcode[:2], "lsu")] += n / weights
    registers, spilled, shared = (
        int(re.findall(pattern, text)[0])
        for pattern in (
            r"\.vgpr_count:\s+(\d+)",
            r"\.vgpr_spill_count:\s+(\d+)",
            r"\.group_segment_fixed_size:\s+(\d+)",
        )
    )
    widths = sorted({op for op in path if "load" in op or "store" in op})
    return Result(
        variant.name, architecture, path.total() / weights, pipes, registers, shared, spilled, widths, {}, 0, []
    )


def table_of(results: Iterable[Result]) -> Table:
    """The readable table."""
    table = Table(title="Instructions a weight, whole tiles")
    for name in ("form", "sm", "all", "budget", *PIPES, "regs", "shared", "local", "predicted of copy", ""):
        table.add_column(name, justify="left" if name in ("form", "predicted of copy", "") else "right")
    for r in results:
        table.add_row(
            r.name, str(r.capability), f"{r.total:.1f}", f"{r.budget:g}" if r.budget else "",
            *(f"{r.pipes[p]:.2f}".rstrip("0").rstrip(".") for p in PIPES), str(r.registers), str(r.shared), str(r.local),
            " ".join(f"{g} {p:.0%}" for g, p in r.predicted.items()), "; ".join(r.problems) or "ok",
            style="red" if r.problems else "",
        )  # fmt: skip
    return table


def main(argv: list[str] | None = None) -> int:
    """Print the table; 1 when a form passes its budget."""
    parser = argparse.ArgumentParser(prog="python -m bench.sass", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the table as JSON")
    parser.add_argument("--fast", action="store_true", help="only the main forms, and only on sm_80 and sm_90")
    args = parser.parse_args(argv)
    variants = MAIN if args.fast else VARIANTS
    results = [judge(v, a) for v in variants for a in architectures() if a in (80, 90) or (v in MAIN and not args.fast)]
    results += [count_for_amd(v, a) for v in ([] if args.fast else MAIN) for a in AMD]
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")
    Console(width=220 if not sys.stdout.isatty() else None).print(table_of(results))
    return int(any(r.problems for r in results))


if __name__ == "__main__":
    sys.exit(main())
