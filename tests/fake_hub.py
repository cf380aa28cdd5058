"""A Hub in memory: the part of the Hub's HTTP API with which `huggingface_hub` pushes and fetches models.

    with FakeHub() as hub:
        subprocess.run(command, env={**os.environ, **hub.environment("hf_me", home)})

Tokens have rights, files are regular or in the large file storage (LFS), and requests can be made to fail.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from huggingface_hub import constants
from pytest_httpserver.httpserver import HTTPServerBase
from werkzeug import Request, Response

# By token: the user's name, and the namespaces in which the token may create and change repositories.
USERS = {"hf_me": ("me", ("me", "team")), "hf_reader": ("me", ()), "hf_other": ("other", ("other",))}


class Refused(Exception):
    """An answer that is an error; `code`: the Hub's name of it, `body`: more keys of its JSON."""

    def __init__(self, status: int, message: str, code: str | None = None, **body: Any) -> None:
        super().__init__(message)
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer = as_json({"error": message, **body}, status, headers)


@dataclass(frozen=True)
class Blob:
    """The content of a file; `lfs`: it is in the large file storage, and git has a pointer to it."""

    content: bytes
    lfs: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def git_id(self) -> str:
        kept, size = self.content, len(self.content)
        if self.lfs:
            version = "version https://git-lfs.github.com/spec/v1"
            kept = f"{version}\noid sha256:{self.sha256}\nsize {size}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(kept) + kept).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_id


@dataclass(frozen=True)
class Commit:
    """All files after a change."""

    files: Mapping[str, Blob]
    message: str
    parent: str | None = None

    @property
    def id(self) -> str:
        tree = "\n".join(f"{blob.git_id} {path}" for path, blob in sorted(self.files.items()))
        return hashlib.sha1(f"{self.parent}\n{self.message}\n{tree}".encode()).hexdigest()


@dataclass
class Repository:
    """A model repository: commits by id, and the commit of each branch, tag and pull request."""

    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.commit("main", {".gitattributes": Blob(b"*.bin filter=lfs\n")}, "initial commit")

    def find(self, revision: str) -> Commit | None:
        """The commit of a branch, tag, pull request or commit id."""
        return self.commits.get(self.refs.get(revision, revision))

    def commit(self, ref: str, files: Mapping[str, Blob], message: str) -> str:
        """Add a commit with exactly these files to a branch; returns its id."""
        commit = Commit(dict(files), message, self.refs.get(ref))
        self.commits[commit.id] = commit
        self.refs[ref] = commit.id
        return commit.id

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """The contents by path, without git's own file."""
        found = self.find(revision)
        assert found is not None, revision
        return {path: blob.content for path, blob in found.files.items() if path != ".gitattributes"}

    def history(self, revision: str = "main") -> list[str]:
        """The messages of a branch's commits, the newest first."""
        messages, commit = [], self.find(revision)
        while commit is not None:
            messages.append(commit.message)
            commit = self.commits.get(commit.parent or "")
        return messages


class FakeHub(HTTPServerBase):
    """The server. large: endings of the names of files for the large file storage; (): no file goes there."""

    def __init__(self, large: tuple[str, ...] = (".safetensors",)) -> None:
        super().__init__("127.0.0.1", 0, threaded=True)
        self.large = large
        self.repositories: dict[str, Repository] = {}
        self.storage: dict[str, bytes] = {}  # the large file storage, by sha256
        self.requests: list[str] = []  # "METHOD path"
        self.failures: list[dict[str, Any]] = []

    def thread_target(self) -> None:
        """Serve; stopping takes as long as one poll."""
        assert self.server is not None
        self.server.serve_forever(poll_interval=0.01)

    @property
    def url(self) -> str:
        """The value for HF_ENDPOINT."""
        return self.url_for("")

    def environment(self, token: str, home: Path) -> dict[str, str]:
        """Environment variables for a process that uses this Hub, with its own cache in `home`."""
        places = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub")}
        switches = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return {**places, **switches, "HF_TOKEN": token, "NO_PROXY": "127.0.0.1,localhost"}

    def use(self, monkeypatch: pytest.MonkeyPatch, folder: Path, token: str) -> None:
        """Make the client of this process use this Hub, with its own cache in `folder`."""
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        values = {"ENDPOINT": self.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_OFFLINE": False}
        places = {"HF_TOKEN_PATH": str(folder / "no token"), "HF_HUB_CACHE": str(folder / "cache")}
        for name, value in {**values, **places, "HF_HUB_DISABLE_XET": True}.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", token)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")

    def publish(self, repo_id: str, files: Mapping[str, bytes], **options: bool) -> Repository:
        """Make a repository with these files; options: `private` or `gated`."""
        repository = self.repositories[repo_id] = Repository(**options)
        blobs = {path: Blob(content, self.is_large(path)) for path, content in files.items()}
        self.storage |= {blob.sha256: blob.content for blob in blobs.values() if blob.lfs}
        repository.commit("main", blobs, "files")
        return repository

    def fail(self, pattern: str, answer: Response | int | None, times: int = 1, code: str = "") -> None:
        """Give this answer or status to the next requests whose "METHOD path" matches; None cuts the connection."""
        self.failures.append({"pattern": pattern, "answer": answer, "times": times, "code": code})

    def is_large(self, path: str) -> bool:
        return path.endswith(self.large)

    def dispatch(self, request: Request) -> Response:
        """Answer a request."""
        path = request.environ["RAW_URI"].partition("?")[0]
        called = f"{request.method} {unquote(path)}"
        self.requests.append(called)
        try:
            for failure in self.failures:
                if failure["times"] and re.search(failure["pattern"], called):
                    failure["times"] -= 1
                    if isinstance(failure["answer"], Response):
                        return failure["answer"]
                    if failure["answer"] is None:
                        request.environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
                        raise ConnectionError("cut")
                    raise Refused(failure["answer"], "made to fail", failure["code"])
            for methods, pattern, answer in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and request.method in methods:
                    return answer(self, request, *(unquote(group) for group in match.groups()))
            raise Refused(404, f"no such page: {path}")
        except Refused as error:
            return error.answer

    # Rights

    def user(self, request: Request) -> tuple[str, tuple[str, ...]] | None:
        token = request.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if token and token not in USERS:
            raise Refused(401, "Invalid credentials in Authorization header")
        return USERS.get(token)

    def may_read(self, request: Request, repo_id: str) -> bool:
        user, namespace = self.user(request), repo_id.partition("/")[0]
        return user is not None and namespace in (user[0], *user[1])

    def check_writer(self, request: Request, namespace: str) -> None:
        user = self.user(request)
        if user is None:
            raise Refused(401, "Invalid username or password.")
        if namespace not in user[1]:
            raise Refused(403, f"You don't have the rights to write to the namespace {namespace!r}")

    def repository(self, request: Request, repo_id: str) -> Repository:
        user, repository = self.user(request), self.repositories.get(repo_id)
        if repository is None or (repository.private and not self.may_read(request, repo_id)):
            raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        return repository

    def writable(self, request: Request, repo_id: str) -> Repository:
        """A repository to change; everyone with a token may open a pull request."""
        repository = self.repository(request, repo_id)
        if "create_pr" not in request.args or self.user(request) is None:
            self.check_writer(request, repo_id.partition("/")[0])
        return repository

    # Repositories

    def create(self, request: Request) -> Response:
        wanted, user = request.get_json(), self.user(request)
        namespace = wanted.get("organization") or (user[0] if user else "")
        self.check_writer(request, namespace)
        repo_id = f"{namespace}/{wanted['name']}"
        answer = {"url": f"{self.url}/{repo_id}", "name": repo_id}
        if repo_id in self.repositories:
            raise Refused(409, "You already created this model repo", **answer)
        self.repositories[repo_id] = Repository(private=wanted.get("visibility") == "private")
        return as_json(answer)

    def validate(self, request: Request) -> Response:
        """Any card is valid; a test that needs another answer gives it to `fail`."""
        return as_json({"errors": [], "warnings": []})

    def info(self, request: Request, repo_id: str, revision: str = "main") -> Response:
        repository = self.repository(request, repo_id)
        commit = found(repository, revision)
        answer = {"_id": "0", "id": repo_id, "sha": commit.id, "private": repository.private, "tags": []}
        return as_json({**answer, "siblings": [{"rfilename": path} for path in sorted(commit.files)]})

    def branch(self, request: Request, repo_id: str, name: str) -> Response:
        repository = self.writable(request, repo_id)
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", name) or name.startswith("refs/"):
            raise Refused(400, f"Invalid branch name: {name}")
        repository.refs[name] = found(repository, "main").id
        return as_json({})

    def tree(self, request: Request, repo_id: str, revision: str, folder: str = "") -> Response:
        """The files below a folder, however deep."""
        files = found(self.repository(request, repo_id), revision).files
        below = {path: blob for path, blob in files.items() if path.startswith(folder)}
        if folder and not below:
            raise Refused(404, f"{folder} does not exist", "EntryNotFound")
        keys = {"type": "file", "size": 0}
        return as_json([{**keys, "path": path, "oid": blob.git_id} for path, blob in below.items()])

    # Uploads

    def preupload(self, request: Request, repo_id: str, revision: str) -> Response:
        there = found(self.writable(request, repo_id), revision).files
        answer = [
            {"path": path, "uploadMode": "lfs" if self.is_large(path) else "regular", "shouldIgnore": False}
            | ({"oid": there[path].etag} if path in there else {})
            for path in (entry["path"] for entry in request.get_json()["files"])
        ]
        return as_json({"files": answer})

    def lfs_batch(self, request: Request, repo_id: str) -> Response:
        self.repository(request, repo_id)
        objects = request.get_json()["objects"]
        for entry in objects:
            if entry["oid"] not in self.storage:
                entry["actions"] = {"upload": {"href": self.storage_url(entry["oid"])}}
        return as_json({"transfer": "basic", "objects": objects})

    def store(self, request: Request, sha256: str) -> Response:
        assert hashlib.sha256(request.data).hexdigest() == sha256
        self.storage[sha256] = request.data
        return Response()

    def commit(self, request: Request, repo_id: str, revision: str) -> Response:
        repository = self.writable(request, repo_id)
        head = found(repository, revision)
        if revision in repository.commits:
            raise Refused(400, f"not a branch: {revision}")
        header, *changes = (json.loads(line) for line in request.data.decode().splitlines())
        files = dict(head.files)
        for change in changes:
            value, large = change["value"], change["key"] == "lfsFile"
            content = self.storage[value["oid"]] if large else base64.b64decode(value["content"])
            files[value["path"]] = Blob(content, large)
        answer: dict[str, Any] = {"success": True, "hookOutput": ""}
        if "create_pr" in request.args:
            number = 1 + sum(name.startswith("refs/pr/") for name in repository.refs)
            revision = f"refs/pr/{number}"
            repository.refs[revision] = head.id
            answer["pullRequestUrl"] = f"{self.url}/{repo_id}/discussions/{number}"
        commit = repository.commit(revision, files, header["value"]["summary"])
        return as_json({**answer, "commitOid": commit, "commitUrl": f"{self.url}/{repo_id}/commit/{commit}"})

    # Downloads

    def storage_url(self, sha256: str) -> str:
        """Under another host name, as on the Hub: the client sends no token there."""
        return f"{self.url.replace('127.0.0.1', 'localhost')}/storage/{sha256}"

    def resolve(self, request: Request, repo_id: str, revision: str, path: str) -> Response:
        repository = self.repository(request, repo_id)
        commit = found(repository, revision)
        if repository.gated and not self.may_read(request, repo_id):
            raise Refused(
                403 if self.user(request) else 401, f"Access to {repo_id} is restricted", "GatedRepo"
            )
        if path not in commit.files:
            raise Refused(404, f"{path} does not exist", "EntryNotFound")
        blob = commit.files[path]
        headers = {"X-Repo-Commit": commit.id, "ETag": f'"{blob.etag}"'}
        if not blob.lfs:
            return content_of(request, blob.content, headers)
        linked = {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.content))}
        return Response(status=302, headers={**headers, **linked, "Location": self.storage_url(blob.sha256)})

    def stored(self, request: Request, sha256: str) -> Response:
        return content_of(request, self.storage[sha256], {"ETag": f'"{sha256}"'})


_MODEL = r"/api/models/([^/]+/[^/]+)"
ROUTES: tuple[tuple[str, str, Callable[..., Response]], ...] = (
    ("POST", r"/api/repos/create", FakeHub.create),
    ("POST", r"/api/validate-yaml", FakeHub.validate),
    ("GET", _MODEL, FakeHub.info),
    ("GET", _MODEL + r"/revision/([^/]+)", FakeHub.info),
    ("POST", _MODEL + r"/branch/([^/]+)", FakeHub.branch),
    ("GET", _MODEL + r"/tree/([^/]+)", FakeHub.tree),
    ("GET", _MODEL + r"/tree/([^/]+)/(.+)", FakeHub.tree),
    ("POST", _MODEL + r"/preupload/([^/]+)", FakeHub.preupload),
    ("POST", _MODEL + r"/commit/([^/]+)", FakeHub.commit),
    ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", FakeHub.lfs_batch),
    ("PUT", r"/storage/([0-9a-f]{64})", FakeHub.store),
    ("GET HEAD", r"/storage/([0-9a-f]{64})", FakeHub.stored),
    ("GET HEAD", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", FakeHub.resolve),
)


def as_json(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(json.dumps(body), status, headers, mimetype="application/json")


def content_of(request: Request, content: bytes, headers: Mapping[str, str]) -> Response:
    """A file, or the range of it that was asked for."""
    answer = Response(content, headers=headers)
    return answer.make_conditional(request, accept_ranges=True, complete_length=len(content))


def found(repository: Repository, revision: str) -> Commit:
    commit = repository.find(revision)
    if commit is None:
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    return commit


def folder_files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path in it."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
