"""CUDA tensors: the Triton kernels where they have been found right on this GPU, else the torch reference.

The first pass on a GPU computes the known answers of ``kernels.selfcheck``. What was found right is remembered in the cache
folder under all that could change it. Nothing here asks for a GPU before a tensor on one arrives: importing the library starts
no CUDA context, so that a process may fork after it.
"""

import hashlib
import json
import os
import sys
import threading
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..kernels import reference, selfcheck
from . import native


@dataclass(frozen=True)
class Verdict:
    """What the check of one GPU found."""

    wrong: dict[str, str]  # by the answer's name, what differed or was raised; empty: the kernels are right
    facts: dict[str, str]  # what the verdict holds for: GPU, driver, versions
    remembered: bool = False  # found by an earlier process
    seconds: float = 0.0

    def __str__(self) -> str:
        """What is wrong, in one line, each finding once."""
        names: dict[str, list[str]] = {}
        for name, what in self.wrong.items():
            names.setdefault(what, []).append(name)
        return "; ".join(f"{', '.join(of)}: {what}" for what, of in names.items())[:1500]


_chosen: dict[torch.device, ModuleType] = {}
_lock = threading.Lock()


def cache_folder() -> Path:
    """Where zo_core keeps what it fetched and found: ``ZO_CORE_CACHE``, or the user's cache folder of this system."""
    if folder := os.environ.get("ZO_CORE_CACHE"):
        return Path(folder)
    home = {"win32": ("LOCALAPPDATA", "~/AppData/Local"), "darwin": ("", "~/Library/Caches")}
    variable, otherwise = home.get(sys.platform, ("XDG_CACHE_HOME", "~/.cache"))
    return Path(os.environ.get(variable) or os.path.expanduser(otherwise)) / "zo_core"


def backend_for(device: torch.device) -> ModuleType:
    """The Triton backend, or the reference where that is wrong on this GPU; checked at a process's first call.

    Raises:
        RuntimeError: the kernels are wrong and ``ZO_CORE_BACKEND=triton`` insists on them; or the first pass of a process is
            inside the capture of a CUDA graph, which cannot record the check.
    """
    if (backend := _chosen.get(device)) is None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "zo_core checks its kernels before the first pass of a process, which a CUDA graph cannot record: make the "
                "optimizer, or run one pass, before capturing"
            )
        with _lock:
            if device not in _chosen:
                _chosen[device] = _choose(device)
        backend = _chosen[device]
    return backend


def chosen() -> dict[str, str]:
    """Of each CUDA device that a pass has run on in this process, which backend serves it."""
    return {str(device): backend.__name__.rpartition(".")[2] for device, backend in _chosen.items()}


def _choose(device: torch.device) -> ModuleType:
    backend: ModuleType = reference
    verdict = check(device)
    if not verdict.wrong:
        return _triton()
    text = f"zo_core: the Triton kernels cannot be used on {device} ({verdict})."
    if set(verdict.wrong) != {"triton"}:
        facts = ", ".join(f"{name} {value}" for name, value in verdict.facts.items())
        text += f" If your installation is not the cause, please report this text as a bug of zo_core: {facts}."
    if native.CHOICE == "triton":
        raise RuntimeError(
            f"{text} ZO_CORE_BACKEND=triton insists on them: unset it to take the slow torch reference instead."
        )
    text += " The torch reference is used, which is right but slow; ZO_CORE_BACKEND=reference takes it without this warning."
    warnings.warn(text, stacklevel=2)
    return backend


# ---- the check ------------------------------------------------------------------------------------------------------


def check(device: torch.device, *, again: bool = False) -> Verdict:
    """Whether the Triton kernels compute on this device what the reference does; the first time takes as long as compiling.

    Args:
        device: a CUDA device (or the CPU, where Triton's interpreter serves it).
        again: compute the answers also where an earlier process has found them right.
    """
    facts = _facts(device)
    try:
        triton = _triton()
        cache, launch = (import_module(f"..kernels.triton.{name}", __package__) for name in ("cache", "launch"))
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "triton"
        return Verdict(
            {"triton": "triton is not installed: pip install 'triton>=3.6'" if missing else str(error)}, facts
        )
    facts |= {"triton": triton.VERSION, "kernels": _sources(), "compiled forms in": str(cache.folder())}
    file = _file(facts)
    if not again and _is_remembered(file, facts, cache.folder()):
        return Verdict({}, facts, remembered=True)
    launch.announce(f"checking its kernels on {facts['GPU']}, and compiling them")
    begin = time.perf_counter()
    try:
        with launch.announced():
            wrong = selfcheck.run(triton, device)
    except OSError as error:
        wrong = {"triton": f"{error}: set TRITON_CACHE_DIR to a folder that can be written, if {cache.folder()} cannot"}
    seconds = time.perf_counter() - begin
    if not wrong:
        _remember(file, facts)
    elif device.type == "cuda":
        _require_life(device, Verdict(wrong, facts))
    return Verdict(wrong, facts, seconds=seconds)


def _triton() -> ModuleType:
    return import_module("..kernels.triton", __package__)


def _require_life(device: torch.device, verdict: Verdict) -> None:
    """An illegal access ends a process's use of the GPU: then no other backend can take over."""
    try:
        torch.zeros(1, device=device).add_(1).item()
    except Exception as error:
        raise RuntimeError(
            f"zo_core's Triton kernels failed on {device} and took the CUDA context with them ({verdict}): please report this "
            "as a bug of zo_core, and start again with ZO_CORE_BACKEND=reference"
        ) from error


def _facts(device: torch.device) -> dict[str, str]:
    """All that the check's result may depend on, beside the kernels themselves."""
    on_gpu = device.type == "cuda"
    return {
        "GPU": torch.cuda.get_device_name(device) if on_gpu else "Triton's interpreter",
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))) if on_gpu else "none",
        "driver": _driver(),
        "CUDA": str(torch.version.cuda or torch.version.hip),
        "torch": str(torch.__version__),
        "zo_core": import_module(str(__package__).rpartition(".")[0]).__version__,
    }


def _driver() -> str:
    """The GPU driver's version as the kernel module of Linux gives it; elsewhere the CUDA version that it serves."""
    try:
        return Path("/proc/driver/nvidia/version").read_text().split("\n")[0].strip()
    except OSError:
        version = getattr(torch._C, "_cuda_getDriverVersion", None)
        return str(version()) if version else "none"


def _sources() -> str:
    """A hash of the kernels' source, for those who change it without a new version."""
    digest = hashlib.sha256()
    folder = Path(reference.__file__).parent
    for file in sorted((*folder.glob("*.py"), *folder.glob("triton/*.py"))):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


# ---- what is remembered ---------------------------------------------------------------------------------------------


def _file(facts: dict[str, str]) -> Path:
    """A file of its own for each set of facts: processes of different environments do not overwrite each other's."""
    return cache_folder() / "checked" / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}.json"


def _is_remembered(file: Path, facts: dict[str, str], compiled: Path) -> bool:
    """Whether the kernels were found right, and their compiled forms are still there, so that no step is held up."""
    try:
        return bool(json.loads(file.read_text(encoding="utf-8")) == facts) and any(compiled.iterdir())
    except (OSError, ValueError):
        return False


def _remember(file: Path, facts: dict[str, Any]) -> None:
    """Write whole or not at all, as other processes may read and write it too; a folder that is read-only is no error."""
    scratch = file.with_name(f"{file.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(json.dumps(facts, indent=1), encoding="utf-8")
        os.replace(scratch, file)
    except OSError:
        with suppress(OSError):
            scratch.unlink()
