"""What a user gets: public names, a light import, and wheels with and without a compiler."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from zo_core.bindings import native

import zo_core

ROOT = Path(__file__).parent.parent


def python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_public_names():
    methods = {"AdaMeZO", "BSZO", "FZOO", "HiZOO", "LeZO", "MEAZO", "MeZO", "SPSA", "ZOOptimizer"}
    functions = {"backend_info", "calibrate", "measure", "replay"}
    assert set(zo_core.__all__) == {
        *methods,
        *functions,
        "Calibration",
        "Journal",
        "JournalError",
        "losses",
        "noise",
        "scales",
    }
    assert all(hasattr(zo_core, name) for name in zo_core.__all__)
    public = {name for name in vars(zo_core.noise) if not name.startswith("_")}
    assert {"sample", "permutation", "VERSION"} <= public


def test_import_is_light():
    code = """
import sys, torch, zo_core
print(torch.cuda.is_initialized(),
      sorted({"transformers", "triton", "pydantic", "rich", "matplotlib"} & set(sys.modules)))
"""
    assert python(code) == "False []"


def test_a_plain_checkout_works_and_does_not_hide_the_kernels_distribution(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("MARK = 'the kernels distribution'")
    code = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}]
sys.path.append({str(tmp_path)!r})
import zo_core.kernels.reference, zo_core.bindings.ops, kernels
print(kernels.MARK)
"""
    assert python(code, PYTHONPATH="") == "the kernels distribution"


def wheel(folder: Path, **environment: str) -> tuple[Path, str]:
    source = folder / "source"
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout: the wheel is built from the files that git lists")
    for name in tracked.stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "-w", str(folder), str(source)],
        env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built, done.stdout + done.stderr


@pytest.mark.parametrize("compiler", [True, False], ids=["with a compiler", "without a compiler"])
def test_the_wheel(tmp_path, compiler):
    if compiler and not native.available():
        pytest.skip("this environment could not build the native library either")
    if compiler:  # without optimisation, which makes the same package in a quarter of the time
        used = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
        (tmp_path / "compiler").write_text(f'#!/bin/sh\nexec {used} "$@" -O0\n')
        (tmp_path / "compiler").chmod(0o755)
    file, output = wheel(tmp_path, CXX=str(tmp_path / "compiler"))
    names = set(zipfile.ZipFile(file).namelist())
    assert {
        "zo_core/__init__.py",
        "zo_core/py.typed",
        "zo_core/kernels/reference.py",
        "zo_core/bindings/ops.py",
    } <= names
    assert {"zo_core/bindings/include/zo_core.h", "zo_core/integrations/tasks.py"} <= names
    assert not {n for n in names if n.split("/")[0] in ("kernels", "bindings", "tests", "bench")}
    assert ("zo_core/bindings/libzo_core.so" in names) == compiler
    assert output.count("native CPU library not built") == (0 if compiler else 1)
    assert file.name.startswith("zo_core-") and "-py3-none-" in file.name and "any" not in file.name

    site = tmp_path / "site"
    zipfile.ZipFile(file).extractall(site)
    code = f"""
import sys
sys.path[:] = [{str(site)!r}] + [p for p in sys.path if p not in ("", {str(ROOT)!r})]
sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
import torch, zo_core
w = torch.nn.Parameter(torch.zeros(3))
zo_core.MeZO([w], lr=0.1).step(lambda: (w - 1).square().sum())
print(zo_core.__file__.startswith({str(site)!r}), zo_core.backend_info()["native"], bool(w.detach().abs().sum() > 0))
print(zo_core.backend_info()["why_missing"])
"""
    lines = (python(code, PYTHONPATH="") + "\n").split("\n")
    assert lines[0] == f"True {compiler} True"
    assert ("install g++" in lines[1]) == (not compiler)
