"""Imports go one way, read from the source: those inside functions and those for types count too."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
LEVELS = [  # a part of the library imports from the levels above its own, never from its own level or below
    {"kernels"},
    {"bindings"},
    {"record", "locks", "noise", "scaling", "scales", "sharding", "losses"},
    {"weights", "layers", "arrays"},
    {"engines", "closure", "estimators", "journal", "distributed"},
    {"optim"},
    {"floor", "calibration"},
    {"zo_core"},  # the public names
    {"integrations"},
    {"cli"},
]
LEVEL = {part: level for level, parts in enumerate(LEVELS) for part in parts}
ONLY = {"triton": {"kernels"}, "transformers": {"integrations", "cli"}}  # who may import these packages


def sources() -> dict[str, Path]:
    """All modules of the library by their dotted names."""
    files = [
        (ROOT / "zo_core", "zo_core"),
        (ROOT / "kernels", "zo_core.kernels"),
        (ROOT / "bindings", "zo_core.bindings"),
    ]
    return {
        ".".join([name, *path.relative_to(folder).with_suffix("").parts]).removesuffix(".__init__"): path
        for folder, name in files
        for path in folder.rglob("*.py")
    }


def imports(name: str, path: Path) -> set[str]:
    """What a module imports, as dotted names; of ``from package import name`` both the package and the name in it."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{start}.{alias.name}" for alias in node.names}
    return found


def part_of(name: str) -> str:
    """The part of the library that has a dotted name below zo_core; names that are no modules are the package's own."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in LEVEL else "zo_core"


def test_every_part_imports_only_from_the_levels_above_it():
    wrong = [
        f"{name} ({part_of(name)}) imports {found}"
        for name, path in sources().items()
        for found in imports(name, path)
        if found.split(".")[0] == "zo_core" and found != "zo_core.__version__"
        if part_of(found) != part_of(name) and LEVEL[part_of(found)] >= LEVEL[part_of(name)]
    ]
    assert not wrong


def test_heavy_packages_are_imported_only_where_they_are_needed():
    wrong = [
        f"{name} imports {found}"
        for name, path in sources().items()
        for found in imports(name, path)
        if part_of(name) not in ONLY.get(found.split(".")[0], {part_of(name)})
    ]
    assert not wrong


def test_every_module_has_its_place():
    assert {part_of(name) for name in sources()} == set(LEVEL)


def test_no_module_imports_itself_through_others():
    modules = sources()
    graph = {
        name: {found if found in modules else found.rpartition(".")[0] for found in imports(name, path)} - {name}
        for name, path in modules.items()
        if name != "zo_core"
    }
    while leaves := {name for name, found in graph.items() if not found & graph.keys()}:
        graph = {name: found for name, found in graph.items() if name not in leaves}
    assert not graph
