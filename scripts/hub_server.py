"""A Hub on this machine: repositories in memory behind the part of the Hub's HTTP API that its Python client speaks.

    with HubServer() as hub:
        subprocess.run(command, env={**os.environ, **hub.environment("hf_me", home)})

For tests and scripts/check_hub.py. Tokens have rights, files are regular or in the large file storage (LFS), and
requests can be made to fail.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from http.server import ThreadingHTTPServer
from pathlib import Path

from hub_api import HubApi
from hub_connection import Failure, HubState
from hub_repositories import Repository


class HubServer(HubState):
    """The server: a context manager that runs it in a thread."""

    def __enter__(self) -> HubServer:
        handler = type("HubHandler", (HubApi,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def environment(self, token: str | None, home: Path) -> dict[str, str]:
        """Environment variables for a process whose Hub this is, with its own cache in `home`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN": token or "",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }

    def publish(
        self, repo_id: str, files: Mapping[str, bytes], *, private: bool = False, gated: bool = False
    ) -> Repository:
        """A repository with these files, made without a request."""
        repository = self.repositories[repo_id] = Repository(repo_id, private, gated)
        found = repository.find("main")
        assert found is not None
        repository.commit("main", {**found.files, **{p: self.blob(p, c) for p, c in files.items()}}, "files")
        return repository

    def fail(self, pattern: str, status: int | None, times: int = 1) -> None:
        """Answer the next requests whose "METHOD path" matches with `status`; None cuts the connection."""
        self.failures.append(Failure(pattern, status, times))
