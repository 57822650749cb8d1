"""Every kernel compiles for every form that a call can ask for: Triton, ptxas and LLVM for AMD, with no GPU.

Most of the time goes to compiling, so of each kernel a few forms are taken in which every pair of choices occurs, for one
architecture each in turn. ZO_CORE_ALL_FORMS=1 compiles all of them for all architectures, which takes hours.
"""

import ast
import os
from pathlib import Path

import pairs
import pytest

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles, so not in the interpreter", allow_module_level=True)

from zo_core.kernels import triton as backend
from zo_core.kernels.triton import compiled, launch

FOLDER = Path(backend.__file__).parent
ALL = os.environ.get("ZO_CORE_ALL_FORMS") == "1"


def test_every_launch_is_of_a_declared_kernel():
    """Only ``launch`` starts a kernel (naive.py, the baseline of bench.gpu, is no part of the library), and what it is given is declared."""
    declared, launched = set(), set()
    for file in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef):
                decorators = {getattr(getattr(d, "func", d), "id", "") for d in node.decorator_list}
                declared |= {node.name} if "kernel" in decorators else set()
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                assert file.name in ("launch.py", "naive.py"), f"{file.name}:{node.lineno} launches by itself"
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "launch":
                launched.add(node.args[0].id)
    assert launched == declared == set(launch.KERNELS) and launched


def few_forms(name):
    """Forms of a kernel in which every pair of choices occurs."""
    forms = list(launch.KERNELS[name].forms())
    return [forms[i] for i in pairs.few([vars(f["FORM"]) if "FORM" in f else f for f in forms])]


def jobs():
    targets = [*compiled.architectures(), *compiled.AMD]
    turn = 0
    for name, kernel in launch.KERNELS.items():
        for form in kernel.forms() if ALL else few_forms(name):
            if ALL or len(list(kernel.forms())) < 10:
                chosen = targets
            else:
                chosen, turn = [targets[turn % len(targets)]], turn + 1
            yield from ((name, form, target) for target in chosen)


@pytest.mark.parametrize(("name", "form", "target"), list(jobs()), ids=lambda x: str(x).replace("triton.language.", ""))
def test_it_compiles(name, form, target):
    made = compiled.compile_form(name, form, target)
    if isinstance(target, str):
        assert "amdgcn" in made.asm and "s_endpgm" in made.asm["amdgcn"]
    else:
        assert made.asm["cubin"]


@pytest.mark.parametrize("name", ["pass_kernel", "rows_kernel"])
def test_the_few_forms_have_every_pair_of_choices(name):
    def pairs_of(forms):
        return {(a, x, b, y) for f in forms for a, x in vars(f["FORM"]).items() for b, y in vars(f["FORM"]).items()}

    assert pairs_of(few_forms(name)) == pairs_of(launch.KERNELS[name].forms())


def test_no_assembly_for_amd():
    form = {"FORM": next(f["FORM"] for f in launch.KERNELS["pass_kernel"].forms() if f["FORM"].gaussian)}
    assert "inline_asm" not in compiled.compile_form("pass_kernel", form, "gfx942").asm["ttir"]
    assert "inline_asm" in compiled.compile_form("pass_kernel", form, 90).asm["ttir"]
