"""PTX text to instructions: what Triton writes of the language, and an error for all else."""

import re
from dataclasses import dataclass

_NUMBER = re.compile(r"-?(0[xX][0-9a-fA-F]+|\d+)U?$")
_FLOAT = re.compile(r"0[fF]([0-9a-fA-F]{8})$|0[dD]([0-9a-fA-F]{16})$")
_SPECIAL = re.compile(r"%((?:tid|ntid|ctaid|nctaid)\.[xyz]|laneid|warpid)$")
_INSTRUCTION = re.compile(r"(?:@(!?)(%?\w+)\s+)?([\w.:]+)\s*(.*)$")
_TOKEN = re.compile(r"\s*(?:(?P<location>\.loc[^\n]*)|(?P<brace>[{}])|(?P<label>[$\w]+:)|(?P<statement>[^;]+;))")
_REGISTERS = re.compile(r"%?(\w+)(?:<(\d+)>)?$")


class PTXError(RuntimeError):
    """A program that did what it may not, or text that the emulator does not know."""


@dataclass(frozen=True)
class Register:
    name: str
    negated: bool = False  # of predicates: !p


@dataclass(frozen=True)
class Literal:
    bits: int  # of an integer, two's complement without end; of a float, its pattern


@dataclass(frozen=True)
class Vector:
    items: tuple  # {a, b}, and a|b of instructions with two results


@dataclass(frozen=True)
class Address:
    base: object
    offset: int


@dataclass(frozen=True)
class Special:
    name: str  # tid.x, laneid, ...


@dataclass(frozen=True)
class Symbol:
    name: str  # a label, a parameter or a shared array


@dataclass(frozen=True)
class Sink:
    """``_``: a result that is thrown away."""


@dataclass(frozen=True)
class Instruction:
    parts: tuple[str, ...]  # of the opcode: name, modifiers, type
    operands: tuple
    guard: Register | None
    text: str
    line: str  # of the source that it was compiled from

    @property
    def name(self):
        return self.parts[0]

    @property
    def modifiers(self):
        return self.parts[1:-1]

    @property
    def type(self):
        return self.parts[-1]


@dataclass(frozen=True)
class Entry:
    """A kernel as it is written."""

    name: str
    parameters: list[str]
    widths: dict[str, int]  # of registers, in bits; 1 for predicates
    code: list  # instructions, and labels as strings
    threads: int
    shared: frozenset[str]  # names of arrays in shared memory


def split(text):
    """Parts at the commas outside braces and brackets."""
    parts, depth = [""], 0
    for c in text:
        depth += (c in "{[") - (c in "}]")
        if c == "," and not depth:
            parts.append("")
        else:
            parts[-1] += c
    return [p.strip() for p in parts] if text.strip() else []


def parse(text):
    """The entries of a module, by name."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.S)
    files = {n: name.rsplit("/", 1)[-1] for n, name in re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', text)}
    shared = frozenset(re.findall(r"\.shared\s+\.align\s+\d+\s+\.b8\s+(\w+)\[", text))
    entries = {}
    for found in re.finditer(r"\.entry\s+(\w+)\s*\(([^)]*)\)([^{]*)\{", text):
        depth, end = 1, found.end()
        while depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        widths, code = _body(text[found.end() : end - 1], files)
        threads = re.search(r"\.reqntid\s+(\d+)", found[3])
        entries[found[1]] = Entry(
            found[1], [p.split()[-1] for p in split(found[2])], widths, code, int(threads[1]) if threads else 0, shared
        )
    return entries


def _body(body, files):
    """Widths of registers, and code. Braces of inline assembly are scopes: their registers get names of their own."""
    widths, code, scopes, line, at = {}, [], [{}], "?", 0
    while found := _TOKEN.match(body, at):
        at = found.end()
        kind, text = found.lastgroup, found[found.lastgroup]
        if kind == "location":
            _, file, number, *_ = text.split()
            line = f"{files.get(file, file)}:{number}"
        elif kind == "brace":
            scopes = [*scopes, {}] if text == "{" else scopes[:-1]
        elif kind == "label":
            code.append(text[:-1])
        else:
            statement = " ".join(text[:-1].split())
            if statement.startswith(".reg"):
                kind, names = statement[4:].split(None, 1)
                width = 1 if kind == ".pred" else int(re.sub(r"\D", "", kind))
                for name, count in (_REGISTERS.match(r).groups() for r in split(names)):
                    if count:
                        widths |= {f"{name}{i}": width for i in range(int(count))}
                    else:
                        scopes[-1][name] = f"{name}__{len(widths)}"
                        widths[scopes[-1][name]] = width
            elif not statement.startswith("."):
                code.append(_instruction(statement, scopes, line))
            elif not statement.startswith(".pragma"):
                raise PTXError(f"unknown directive: {statement}")
    return widths, code


def _instruction(text, scopes, line):
    negated, guard, opcode, operands = _INSTRUCTION.match(text).groups()
    if guard:
        guard = Register(_operand(guard, scopes).name, bool(negated))
    parts = tuple(opcode.replace("::", "__").split("."))
    return Instruction(parts, tuple(_operand(o, scopes) for o in split(operands)), guard, text, line)


def _operand(text, scopes):
    if text[0] == "{":
        return Vector(tuple(_operand(x, scopes) for x in split(text[1:-1])))
    if "|" in text:
        return Vector(tuple(_operand(x.strip(), scopes) for x in text.split("|")))
    if text[0] == "[":
        found = re.match(r"\[\s*([%$\w.]+)\s*(?:\+\s*(-?\w+))?\s*\]$", text)
        if not found:
            raise PTXError(f"unknown address: {text}")
        return Address(_operand(found[1], scopes), int(found[2] or "0", 0))
    if text == "_":
        return Sink()
    if text[0] == "!":
        return Register(_operand(text[1:].strip(), scopes).name, True)
    if found := _FLOAT.match(text):
        return Literal(int(found[1] or found[2], 16))
    if _NUMBER.match(text):
        return Literal(int(text.rstrip("U"), 0))
    if found := _SPECIAL.match(text):
        return Special(found[1])
    for scope in reversed(scopes):
        if text.lstrip("%") in scope:
            return Register(scope[text.lstrip("%")])
    return Register(text[1:]) if text[0] == "%" else Symbol(text)
