"""Builds the native CPU library with ninja; all other metadata is in pyproject.toml.

Without a compiler the package still installs, says once what is missing, and runs on the torch reference.
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
LIBRARY = "libzo_core.so"
FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-ffp-contract=fast",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",  # GCC's own AVX-512 header warns
]
VARIANTS = {"portable": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    VARIANTS["avx2"] = ["-mavx2", "-mfma"]
    VARIANTS["avx512"] = [*("-mavx512" + x for x in ("f", "bw", "vl", "dq")), "-mfma", "-mprefer-vector-width=512"]


def write_ninja(build: Path, target: Path, compiler: str) -> None:
    """Write build.ninja: one object an instruction set from the same source, the C entry points, one library."""
    from ninja.ninja_syntax import Writer

    include = [f"-I{ROOT / 'bindings' / 'include'}"]
    with (build / "build.ninja").open("w") as f:
        n = Writer(f, width=110)
        compile_line = f"{compiler} {' '.join(FLAGS + include)} $isa -MMD -MF $out.d -c $in -o $out"
        n.rule("cxx", compile_line, depfile="$out.d", deps="gcc", description="CXX $out")
        n.rule("link", f"{compiler} -shared -pthread $in -o $out -ldl", description="LINK $out")
        objects = []
        for name, isa in VARIANTS.items():
            flags = " ".join([*isa, f"-DZO_VARIANT=zo_{name}"])
            objects += n.build(f"pass_{name}.o", "cxx", str(ROOT / "kernels/cpu/pass.cpp"), variables={"isa": flags})
        objects += n.build("zo_core.o", "cxx", str(ROOT / "kernels/cpu/zo_core.cpp"), variables={"isa": ""})
        n.default(n.build(str(target), "link", objects))


class BuildNative(build_ext):
    """``build_ext`` that runs ninja, and leaves the package without a library where that cannot work."""

    def get_ext_filename(self, fullname: str) -> str:
        """Name of the library: it is loaded through ctypes, whatever the Python version."""
        return str(Path(*fullname.split(".")[:-1], LIBRARY))

    def build_extension(self, ext: Extension) -> None:
        """Compile, or say what is missing."""
        target, build = Path(self.get_ext_fullpath(ext.name)).resolve(), Path(self.build_temp).resolve()
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or ""
        try:
            if sys.platform == "win32":
                raise RuntimeError("not supported on Windows yet")
            if not compiler:
                raise RuntimeError("found no C++17 compiler; install g++ or clang++ (or set CXX) and install again")
            import ninja

            build.mkdir(parents=True, exist_ok=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)  # or a failed build would install an old one
            write_ninja(build, target, compiler)
            subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", build], check=True)
        except (RuntimeError, ImportError, OSError, subprocess.CalledProcessError) as error:
            self.warn(f"zo_core: native CPU library not built ({error}). The much slower torch reference will be used.")

    def get_outputs(self) -> list[str]:
        """The library, if it was built."""
        return [path for path in super().get_outputs() if Path(path).exists()]

    def copy_extensions_to_source(self) -> None:
        """Leave the library in bindings/ of the checkout (editable installs)."""
        for ext in self.extensions:
            built = Path(self.build_lib, self.get_ext_filename(ext.name))
            if built.exists():
                self.copy_file(str(built), str(ROOT / "bindings" / LIBRARY))


class Wheel(bdist_wheel):
    """A wheel for this platform and every Python 3: the library has a C ABI of its own."""

    def get_tag(self) -> tuple[str, str, str]:
        """``py3-none-<platform>``."""
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("zo_core.bindings._native", sources=[])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
)
