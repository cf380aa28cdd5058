from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import FakeHub, folder_files
from huggingface_hub import constants

from hf_lora import TextClassifier
from hf_lora.adapters.hub import adapter_directory

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    with FakeHub() as server:
        server.use(monkeypatch, tmp_path, token="")
        yield server


def test_directory_is_returned_as_it_is(tmp_path: Path) -> None:
    assert adapter_directory(tmp_path) == tmp_path
    assert adapter_directory(str(tmp_path)) == tmp_path


def test_cached_repository_is_found_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--org--adapter"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "adapter_config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    assert adapter_directory("org/adapter") == snapshot
    assert adapter_directory("org/adapter", revision=COMMIT) == snapshot


@pytest.mark.parametrize("name", ["/no/such/place", "a/b/c", "runs/my adapter"])
def test_neither_directory_nor_hub_id(name: str) -> None:
    with pytest.raises(
        ValueError, match=r"no such adapter; got .* neither a directory nor a Hub id"
    ) as error:
        adapter_directory(name)
    assert repr(name) in str(error.value)
    assert "\n" not in str(error.value)


def test_offline_and_not_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ValueError, match=r"'org/adapter', which is no directory, .*cannot be reached"
    ) as error:
        adapter_directory("org/adapter")
    assert "\n" not in str(error.value)


def test_hub_that_refuses_connections(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"'org/adapter', which is no directory, .*cannot be reached"):
        adapter_directory("org/adapter")


@pytest.mark.parametrize(
    ("status", "error_code", "message"),
    [
        (404, "RepoNotFound", "'org/adapter', .*no such repository .*private: pass a token"),
        (403, "GatedRepo", "'org/adapter' is gated; ask for access .*token"),
        (401, None, "'org/adapter'.*token"),
        (404, "RevisionNotFound", "'org/adapter'.*v9"),
    ],
)
def test_refusal_of_the_hub_is_one_clear_error(
    status: int, error_code: str | None, message: str, hub: FakeHub
) -> None:
    hub.fail("", status, code=error_code)
    with pytest.raises(ValueError, match=message) as error:
        adapter_directory("org/adapter", revision="v9")
    assert hub.requests == ["GET /api/models/org/adapter/revision/v9"]
    assert "\n" not in str(error.value)


def others(adapter: Path) -> dict[str, bytes]:
    """An adapter's files among those of a repository that holds more."""
    extra = (
        "model.safetensors",
        "optimizer.pt",
        "last-checkpoint/tokenizer.json",
        "sub/x.model",
        "tokenizer/a.bin",
    )
    return {**folder_files(adapter), **dict.fromkeys(extra, b"not the adapter's")}


def test_only_the_adapters_files_are_fetched(hub: FakeHub, adapter_dir: Path) -> None:
    repository = hub.publish("org/x", others(adapter_dir))
    folder = adapter_directory("org/x")
    assert folder_files(folder) == folder_files(adapter_dir)
    assert folder.name == repository.refs["main"]
    fetched = {request.partition("/resolve/")[2].partition("/")[2] for request in hub.requests}
    assert fetched - {""} == set(folder_files(adapter_dir))


def test_the_classifier_of_a_revision(hub: FakeHub, adapter_dir: Path) -> None:
    repository = hub.publish("org/x", others(adapter_dir))
    old = repository.refs["main"]
    repository.refs["v1"] = old
    repository.commit("main", {}, "all gone")
    expected = TextClassifier.from_pretrained(adapter_dir).logits(["a good day"])
    for revision in ("v1", old):
        classifier = TextClassifier.from_pretrained("org/x", revision=revision)
        assert classifier.logits(["a good day"]).equal(expected)
    with pytest.raises(ValueError, match=r"not an adapter directory; adapter_model.safetensors is missing"):
        TextClassifier.from_pretrained("org/x")


def test_a_warm_cache_serves_offline_and_an_empty_one_says_so(
    hub: FakeHub, adapter_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish("org/x", others(adapter_dir))
    fetched = adapter_directory("org/x")
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert adapter_directory("org/x") == fetched
    with pytest.raises(
        ValueError, match=r"'org/x' at revision 'v2', .*cannot be reached \(HF_HUB_OFFLINE is set\)"
    ):
        adapter_directory("org/x", revision="v2")
    (fetched / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="not all of it is in the cache"):
        adapter_directory("org/x")
    assert hub.requests == []


@pytest.mark.parametrize(
    ("name", "revision", "token", "message"),
    [
        ("org/none", None, None, r"'org/none', .*no such repository .*pass a token"),
        ("org/open", "v9", None, r"'org/open' has no revision 'v9'"),
        ("org/gated", None, None, r"'org/gated' is gated; ask for access on its page"),
        ("org/gated", None, "hf_other", r"'org/gated' is gated"),
        ("me/hidden", None, None, r"'me/hidden', .*no such repository .*private: pass a token"),
        ("me/hidden", None, "hf_other", r"'me/hidden', .*no such repository"),
        ("org/open", None, "hf_unknown", r"'org/open' with status 401; pass a token that may read it"),
    ],
)
def test_what_may_not_be_read_is_told_in_one_line(
    name: str, revision: str | None, token: str | None, message: str, hub: FakeHub
) -> None:
    hub.publish("org/open", {"adapter_config.json": b"{}"})
    hub.publish("org/gated", {"adapter_config.json": b"{}"}, gated=True)
    hub.publish("me/hidden", {"adapter_config.json": b"{}"}, private=True)
    with pytest.raises(ValueError, match=message) as error:
        adapter_directory(name, revision=revision, token=token)
    assert "\n" not in str(error.value)


def test_a_token_opens_what_is_private_or_gated(
    hub: FakeHub, adapter_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish("me/hidden", folder_files(adapter_dir), private=True)
    hub.publish("me/gated", folder_files(adapter_dir), gated=True)
    assert folder_files(adapter_directory("me/hidden", token="hf_me")) == folder_files(adapter_dir)
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    assert folder_files(adapter_directory("me/gated")) == folder_files(adapter_dir)


def test_a_download_that_breaks_off_goes_on(hub: FakeHub, adapter_dir: Path) -> None:
    hub.publish("org/x", others(adapter_dir))
    hub.fail("GET /storage", None)
    assert folder_files(adapter_directory("org/x")) == folder_files(adapter_dir)


@pytest.mark.parametrize(
    ("status", "message"),
    [(None, r"could not be fetched; .*broke off .*try again"), (403, "with status 403")],
)
def test_a_download_that_fails_is_told_and_the_next_try_fetches_the_rest(
    status: int | None, message: str, hub: FakeHub, adapter_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)  # between its own tries
    hub.publish("org/x", others(adapter_dir))
    hub.fail("GET /storage", status, times=20)
    with pytest.raises(ValueError, match=message) as error:
        adapter_directory("org/x")
    assert "\n" not in str(error.value) and "'org/x'" in str(error.value)
    hub.failures.clear()
    assert folder_files(adapter_directory("org/x")) == folder_files(adapter_dir)


def test_a_hub_that_does_not_work_is_told(hub: FakeHub) -> None:
    hub.publish("org/x", {"adapter_config.json": b"{}"})
    hub.fail("GET /api/models/org/x", 503, times=9)
    with pytest.raises(ValueError, match="'org/x', which is no directory, and the Hub cannot be reached"):
        adapter_directory("org/x")
