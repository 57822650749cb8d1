"""How a run writes: each file appears under its name only when it is complete and on disk, in a folder that no other run uses."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError

from zo_core.integrations.errors import RunError, first_line
from zo_core.journal import JournalError
from zo_core.locks import lock

LOCK = ".lock"


@contextmanager
def atomic(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which is renamed to ``path`` if the block ends without an error."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)  # on a full disk, others need its space
        raise


@contextmanager
def saving() -> Iterator[None]:
    """Turn the errors that torch and safetensors raise for a file that cannot be written into OSError."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        raise OSError(str(error)) from error


def write_json(path: Path, value: Any) -> None:
    """Write a value to ``path`` as JSON."""
    with atomic(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


def write_tensors(path: Path, value: Any) -> None:
    """Write a value to ``path`` by ``torch.save``."""
    with saving(), atomic(path) as file:
        torch.save(value, file)


@contextmanager
def own_folder(folder: Path) -> Iterator[None]:
    """Make the folder of a run and keep other runs out of it while the block runs, by a lock on the file ``LOCK`` in it.

    Raises:
        RunError: another run is at work there, or, within the block too, something cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / LOCK, "ab") as file:
            if not lock(file):
                raise RunError(f"--output {str(folder)!r}: another run is at work there; let it end, or choose another")
            yield
    except JournalError as error:
        raise RunError(f"--output {str(folder)!r}: {error}") from error
    except OSError as error:
        raise RunError(
            f"--output {str(folder)!r} cannot be written: {first_line(error)}; make room there and --resume the run if it "
            "has a checkpoint, or choose another folder"
        ) from error
