from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from hf_lora.hub import adapter_directory

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def answering_hub(
    monkeypatch: pytest.MonkeyPatch, status: int, error_code: str | None = None
) -> Iterator[list[str]]:
    """A Hub on this machine that gives every request one status; yields the paths it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            if error_code:
                self.send_header("X-Error-Code", error_code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    try:
        yield asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_directory_is_returned_as_it_is(tmp_path: Path) -> None:
    assert adapter_directory(tmp_path) == tmp_path
    assert adapter_directory(str(tmp_path)) == tmp_path


def test_cached_repository_is_found_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--org--adapter"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "adapter_config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    assert adapter_directory("org/adapter", cache_dir=str(tmp_path)) == snapshot
    assert adapter_directory("org/adapter", revision=COMMIT, cache_dir=str(tmp_path)) == snapshot


@pytest.mark.parametrize("name", ["/no/such/place", "a/b/c", "runs/my adapter"])
def test_neither_directory_nor_hub_id(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"no such adapter; got .* neither a directory nor a Hub id"
    ) as error:
        adapter_directory(name, cache_dir=str(tmp_path))
    assert repr(name) in str(error.value)
    assert "\n" not in str(error.value)


def test_offline_and_not_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match=r"'org/adapter', which is no directory, .*cannot be reached"
    ) as error:
        adapter_directory("org/adapter", cache_dir=str(tmp_path))
    assert "\n" not in str(error.value)


def test_hub_that_refuses_connections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"'org/adapter', which is no directory, .*cannot be reached"):
        adapter_directory("org/adapter", cache_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("status", "error_code", "message"),
    [
        (404, "RepoNotFound", "'org/adapter', .*no such repository .*private: pass a token"),
        (403, "GatedRepo", "'org/adapter', .*token"),
        (401, None, "'org/adapter'.*token"),
        (404, "RevisionNotFound", "'org/adapter'.*v9"),
    ],
)
def test_refusal_of_the_hub_is_one_clear_error(
    status: int, error_code: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        answering_hub(monkeypatch, status, error_code) as asked,
        pytest.raises(ValueError, match=message) as error,
    ):
        adapter_directory("org/adapter", revision="v9", cache_dir=str(tmp_path))
    assert asked == ["/api/models/org/adapter/revision/v9"]
    assert "\n" not in str(error.value)
