"""Files that appear under their names whole and on disk, or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def atomic(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which takes the place of what is at ``path`` when the block ends without an error."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def write_json(path: Path, value: Any) -> None:
    """This value at ``path``, as JSON."""
    with atomic(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())
