"""The `zo-core replay` command: compute a run's model again from the model that it started with and its journal."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from zo_core.integrations.errors import RunError, first_line
from zo_core.integrations.files import saving
from zo_core.integrations.session import loading, model_source
from zo_core.journal import Header, Journal, JournalError, replay
from zo_core.record import DTYPES


def replay_model(
    base: str,
    journal: Path,
    out: Path,
    *,
    step: int | None = None,
    status: Callable[[str], None] = lambda text: None,
    progress: Callable[[int, int], None] = lambda done, steps: None,
) -> dict[str, Any]:
    """Write the model that the run of `journal` had after `step` steps.

    Args:
        base: the model that the run started with: as `zo-core finetune` takes it, or a .safetensors file.
        journal: the run's journal.zoj, or the run's folder.
        out: a folder, or a .safetensors file if `base` is one; it must not exist.
        step: number of steps to make, skipped ones counted; None makes all.
        status: called with a short sentence at the start of each slow stage.
        progress: called with the steps done and the steps to do.

    Returns:
        `steps`: how many were made; `of`: how many the journal has; `dropped`: bytes at its end that are no whole record.

    Raises:
        AssetError: a named model could not be fetched.
        RunError: the base does not load or is not the run's, the journal is damaged, or `out` exists.
    """
    if out.exists():
        raise RunError(f"OUT {str(out)!r} is there already: choose another, or remove it")
    one_file = base.endswith(".safetensors")
    if one_file != (out.suffix == ".safetensors"):
        raise RunError(f"OUT {str(out)!r}: expected a {'.safetensors file' if one_file else 'folder'}, as BASE is one")
    path = journal / "journal.zoj" if journal.is_dir() else journal
    part = out.with_name(out.name + ".part")
    try:
        steps = Journal.open(path)
        if step is not None and not 0 <= step <= len(steps):
            raise RunError(f"--step: expected 0 to {len(steps)}, the steps of {str(path)!r}, got {step}")
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(part, ignore_errors=True)
        status(f"loading {base}")
        weights, save = _load_file(base, steps.header) if one_file else _load_model(base, steps.header, status)
        status("comparing weights")
        made = replay(weights, steps, step, progress=progress)
        with saving():
            save(part)
            if journal.is_dir() and not one_file:
                _copy_generation_config(journal, part, made)
        os.replace(part, out)
    except JournalError as error:
        raise RunError(f"{str(path)!r} and BASE {base!r}: {error}") from error
    except OSError as error:
        raise RunError(f"cannot replay {str(path)!r} into {str(out)!r}: {first_line(error)}") from error
    return {"steps": made, "of": len(steps), "dropped": steps.dropped}


def _load_model(base: str, header: Header, status: Callable[[str], None]) -> tuple[Any, Callable[[Path], None]]:
    """The model that `base` names, in the dtype that the run trained it in, and what saves it with its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = model_source(base, status, "BASE")
    with loading(base, "BASE"):
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=DTYPES[header.tensors[0].dtype])

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return model, save


def _copy_generation_config(run: Path, out: Path, made: int) -> None:
    """Copy that of the run's own model, which has its label biases, if these weights are of the same step."""
    try:
        same = json.loads((run / "summary.json").read_text(encoding="utf-8"))["selected_step"] == made
        found = (run / "model" / "generation_config.json").read_bytes()
    except (OSError, ValueError, LookupError, TypeError):
        return  # the run is not finished, or its model was moved: the weights are what was asked for
    if same:
        (out / "generation_config.json").write_bytes(found)


def _load_file(base: str, header: Header) -> tuple[dict[str, torch.Tensor], Callable[[Path], None]]:
    """The tensors of a .safetensors file, in the dtypes that the run trained them in, and what saves them."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file

    try:
        with safe_open(base, "pt") as file:
            about = file.metadata()
            tensors: dict[str, torch.Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise RunError(f"BASE {base!r} is no safetensors file: {first_line(error)}") from error
    for t in header.tensors:
        if t.name in tensors:
            tensors[t.name] = tensors[t.name].to(DTYPES[t.dtype])
    return tensors, lambda path: save_file(tensors, path, about)
