"""One connection to the Hub on this machine: requests, answers, made failures, and who may do what."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

from hub_repositories import Blob, Repository


@dataclass(frozen=True)
class User:
    """Whom a token belongs to; `writes`: in which namespaces it may create and change repositories."""

    name: str
    writes: tuple[str, ...] = ()


@dataclass
class Failure:
    """An answer in the place of the right one, to the next `times` requests whose "METHOD path" matches."""

    pattern: str
    status: int | None
    """None: the connection is cut without an answer."""
    times: int


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str | None = None, **body: Any) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.body = status, message, code, body


@dataclass
class HubState:
    """All that the Hub knows; open to be looked at and changed.

    large: endings of the names of files that go into the large file storage; none: every file is regular.
    """

    large: tuple[str, ...] = (".safetensors",)
    users: dict[str, User] = field(
        default_factory=lambda: {
            "hf_me": User("me", ("me", "team")),
            "hf_reader": User("me"),
            "hf_other": User("other", ("other",)),
        }
    )
    repositories: dict[str, Repository] = field(default_factory=dict)
    storage: dict[str, bytes] = field(default_factory=dict)
    """The large file storage: contents by sha256."""
    requests: list[str] = field(default_factory=list)
    """Every request, as "METHOD path"."""
    failures: list[Failure] = field(default_factory=list)
    url: str = ""
    """What HF_ENDPOINT has to be."""

    @property
    def storage_url(self) -> str:
        """Where large files are: under another host name, as on the Hub, so that the client does not follow there."""
        return self.url.replace("127.0.0.1", "localhost") + "/storage"

    def next_failure(self, request: str) -> Failure | None:
        """The failure that is due for a request, counted down."""
        for failure in self.failures:
            if failure.times and re.search(failure.pattern, request):
                failure.times -= 1
                return failure
        return None

    def is_large(self, path: str) -> bool:
        """Whether a file goes into the large file storage."""
        return path.endswith(self.large) if self.large else False

    def blob(self, path: str, content: bytes) -> Blob:
        """A file as it is kept under a path; large ones are stored."""
        blob = Blob(content, self.is_large(path))
        if blob.lfs:
            self.storage[blob.sha256] = content
        return blob


class Connection(BaseHTTPRequestHandler):
    """Answers one connection; `hub` is the server's state, and `routes` says which method answers what."""

    protocol_version = "HTTP/1.1"
    # Head and body in one packet: with two, each answer waits for the client to acknowledge the first.
    wbufsize = -1
    disable_nagle_algorithm = True
    hub: ClassVar[HubState]
    routes: ClassVar[tuple[tuple[str, str, Callable[..., None]], ...]]

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal; `hub.requests` has it all."""

    def _answer(self) -> None:
        split = urlsplit(self.path)
        self.route, self.query = split.path, parse_qs(split.query)
        self.body = self._read_body()
        request = f"{self.command} {unquote(self.route)}"
        self.hub.requests.append(request)
        failure = self.hub.next_failure(request)
        if failure is not None and failure.status is None:
            self.close_connection = True
            return
        try:
            if failure is not None:
                raise Refused(failure.status or 500, "made to fail")
            for method, pattern, act in self.routes:
                match = re.fullmatch(pattern, self.route)
                if match and self.command in method:
                    act(self, *(unquote(group) for group in match.groups()))
                    return
            raise Refused(404, f"no such page: {self.route}")
        except Refused as error:
            headers = {"X-Error-Message": error.message} | (
                {"X-Error-Code": error.code} if error.code else {}
            )
            self._send(error.status, {"error": error.message, **error.body}, headers)

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, body: Any = b"", headers: Mapping[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        if not isinstance(body, bytes):
            self.send_header("Content-Type", "application/json")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # Rights

    def _user(self) -> User | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if not token:
            return None
        if token not in self.hub.users:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.hub.users[token]

    def _writer(self, namespace: str) -> User:
        user = self._user()
        if user is None:
            raise Refused(401, "Invalid username or password.")
        if namespace not in user.writes:
            raise Refused(403, f"You don't have the rights to write to the namespace {namespace!r}")
        return user

    def _repository(self, repo_id: str) -> Repository:
        user = self._user()
        repository = self.hub.repositories.get(repo_id)
        namespace = repo_id.partition("/")[0]
        hidden = (
            repository is not None and repository.private and not (user and self._belongs(user, namespace))
        )
        if repository is None or hidden:
            raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        return repository

    def _writable(self, repo_id: str, *, by_request: bool = False) -> Repository:
        """A repository to be changed; `by_request`: by a pull request, which everyone with a token may open."""
        repository = self._repository(repo_id)
        if not by_request or self._user() is None:
            self._writer(repo_id.partition("/")[0])
        return repository

    @staticmethod
    def _belongs(user: User, namespace: str) -> bool:
        return namespace == user.name or namespace in user.writes

    def _files(self, repository: Repository, revision: str) -> tuple[str, Mapping[str, Blob]]:
        commit = repository.find(revision)
        if commit is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit.id, commit.files
