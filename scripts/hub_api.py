"""The part of the Hub's HTTP API that its Python client speaks, over repositories in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import parse_qs

from hub_connection import Connection, HubState, Refused
from hub_repositories import COMMIT_ID, REPOSITORY_ID, Blob, Repository, card_problems


class HubApi(Connection):
    """The answers to the client's requests."""

    # Repositories

    def whoami(self) -> None:
        """Whom the token belongs to."""
        user = self._user()
        if user is None:
            raise Refused(401, "Invalid username or password.")
        orgs = [{"name": name} for name in user.writes if name != user.name]
        role = {"accessToken": {"role": "write" if user.writes else "read"}}
        self._send(200, {"type": "user", "name": user.name, "orgs": orgs, "auth": role})

    def create(self) -> None:
        """A new repository; 409 where there is one."""
        wanted = json.loads(self.body)
        user = self._user()
        namespace = wanted.get("organization") or (user.name if user else "")
        self._writer(namespace)
        repo_id = f"{namespace}/{wanted['name']}"
        if not REPOSITORY_ID.fullmatch(repo_id):
            raise Refused(400, f"Invalid repo name: {repo_id}")
        answer = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}
        if repo_id in self.hub.repositories:
            raise Refused(409, "You already created this model repo", **answer)
        private = wanted.get("visibility") == "private"
        self.hub.repositories[repo_id] = Repository(repo_id, private=private)
        self._send(200, answer)

    def validate(self) -> None:
        """The card's metadata."""
        errors, warnings = card_problems(json.loads(self.body)["content"])
        told = [{"message": message} for message in warnings]
        self._send(
            400 if errors else 200, {"errors": [{"message": message} for message in errors], "warnings": told}
        )

    def info(self, repo_id: str, revision: str = "main") -> None:
        """What is known of a model."""
        repository = self._repository(repo_id)
        commit, files = self._files(repository, revision)
        self._send(
            200,
            {
                "_id": hashlib.sha1(repo_id.encode()).hexdigest()[:24],
                "id": repo_id,
                "modelId": repo_id,
                "sha": commit,
                "private": repository.private,
                "gated": "manual" if repository.gated else False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": [{"rfilename": path} for path in sorted(files)],
            },
        )

    def refs(self, repo_id: str) -> None:
        """Branches and pull requests."""
        refs = self._repository(repo_id).refs
        pulls = [name for name in refs if name.startswith("refs/pr/")]
        branches = [
            {"name": n, "ref": f"refs/heads/{n}", "targetCommit": c}
            for n, c in refs.items()
            if n not in pulls
        ]
        requests = [{"name": n, "ref": n, "targetCommit": refs[n]} for n in pulls]
        self._send(200, {"branches": branches, "converts": [], "tags": [], "pullRequests": requests})

    def branch(self, repo_id: str, name: str) -> None:
        """A new branch; 409 where there is one."""
        repository = self._writable(repo_id)
        if name in repository.refs:
            raise Refused(409, f"Reference already exists: {name}")
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", name) or name.startswith("refs/"):
            raise Refused(400, f"Invalid branch name: {name}")
        start = (json.loads(self.body) if self.body else {}).get("startingPoint", "main")
        repository.refs[name], _ = self._files(repository, start)
        self._send(200, {})

    def tree(self, repo_id: str, revision: str, folder: str = "") -> None:
        """The files of a revision, or of a folder in it; with `recursive` also those in folders."""
        _, files = self._files(self._repository(repo_id), revision)
        prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
        below = {path: blob for path, blob in files.items() if path.startswith(prefix)}
        if prefix and not below:
            raise Refused(404, f"{folder} does not exist", "EntryNotFound")
        deep = self.query.get("recursive", ["false"])[0].lower() == "true"
        folders = {
            prefix + path.removeprefix(prefix).partition("/")[0]
            for path in below
            if "/" in path[len(prefix) :]
        }
        entries = [
            _entry(p, blob) for p, blob in sorted(below.items()) if deep or "/" not in p[len(prefix) :]
        ]
        names = [
            {"type": "directory", "path": p, "size": 0, "oid": Blob(p.encode()).git_id}
            for p in sorted(folders)
        ]
        self._send(200, names + entries)

    def paths(self, repo_id: str, revision: str) -> None:
        """Those of some files that exist."""
        _, files = self._files(self._repository(repo_id), revision)
        wanted = parse_qs(self.body.decode()).get("paths", [])
        self._send(200, [_entry(path, files[path]) for path in wanted if path in files])

    # Uploads

    def preupload(self, repo_id: str, revision: str) -> None:
        """How each file is to be sent, and what is there under its name."""
        repository = self._writable(repo_id, by_request="create_pr" in self.query)
        _, there = self._files(repository, revision)
        answer = []
        for entry in json.loads(self.body)["files"]:
            path = entry["path"]
            mode = "lfs" if self.hub.is_large(path) else "regular"
            etag = {"oid": there[path].etag} if path in there else {}
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **etag})
        self._send(200, {"files": answer})

    def lfs_batch(self, repo_id: str) -> None:
        """Where to put large files that are not stored yet."""
        self._repository(repo_id)
        user = self._user()
        if user is None:
            raise Refused(401, "Invalid username or password.")
        objects = []
        for entry in json.loads(self.body)["objects"]:
            if entry["oid"] not in self.hub.storage:
                put, verify = (
                    f"{self.hub.storage_url}/{entry['oid']}",
                    f"{self.hub.url}/{repo_id}.git/info/lfs/verify",
                )
                entry["actions"] = {"upload": {"href": put}, "verify": {"href": verify}}
            objects.append(entry)
        self._send(200, {"transfer": "basic", "objects": objects})

    def store(self, sha256: str) -> None:
        """Take a large file."""
        if hashlib.sha256(self.body).hexdigest() != sha256:
            raise Refused(400, "the content has another sha256")
        self.hub.storage[sha256] = self.body
        self._send(200)

    def lfs_verify(self, repo_id: str) -> None:
        """Whether a large file has arrived."""
        wanted = json.loads(self.body)
        if len(self.hub.storage.get(wanted["oid"], b"")) != wanted["size"]:
            raise Refused(404, "the file has not arrived")
        self._send(200, {})

    def commit(self, repo_id: str, revision: str) -> None:
        """A change of files on a branch, or as a new pull request."""
        request = "create_pr" in self.query
        repository = self._writable(repo_id, by_request=request)
        head, there = self._files(repository, revision)
        if COMMIT_ID.fullmatch(revision):
            raise Refused(400, f"not a branch: {revision}")
        lines = [json.loads(line) for line in self.body.decode().splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit", head) != head:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files = dict(there)
        for line in lines[1:]:
            _CHANGES[line["key"]](self.hub, files, line["value"])
        errors, _ = card_problems(files["README.md"].content.decode()) if "README.md" in files else ([], [])
        if errors:
            raise Refused(400, f"Invalid metadata in README.md: {errors}")
        answer: dict[str, Any] = {"success": True, "hookOutput": ""}
        ref = revision
        if request:
            repository.pull_requests += 1
            ref = f"refs/pr/{repository.pull_requests}"
            repository.refs[ref] = head
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo_id}/discussions/{repository.pull_requests}"
        commit = repository.commit(ref, files, header["summary"])
        self._send(
            200, {**answer, "commitOid": commit, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{commit}"}
        )

    # Downloads

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        """A file; one of the large file storage is somewhere else, as on the Hub."""
        repository = self._repository(repo_id)
        commit, files = self._files(repository, revision)
        user = self._user()
        if repository.gated and not (user and self._belongs(user, repo_id.partition("/")[0])):
            raise Refused(403 if user else 401, f"Access to model {repo_id} is restricted", "GatedRepo")
        known = {"X-Repo-Commit": commit}
        if path not in files:
            raise Refused(404, f"{path} does not exist", "EntryNotFound")
        blob = files[path]
        if not blob.lfs:
            self._send_range(blob.content, {**known, "ETag": f'"{blob.etag}"'})
            return
        known |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.content))}
        self._send(302, b"", {**known, "Location": f"{self.hub.storage_url}/{blob.sha256}"})

    def stored(self, sha256: str) -> None:
        """A large file."""
        if sha256 not in self.hub.storage:
            raise Refused(404, "no such file")
        self._send_range(self.hub.storage[sha256], {"ETag": f'"{sha256}"'})

    def home(self) -> None:
        """The Hub's front page: it answers."""
        self._send(200, b"ok")

    def _send_range(self, content: bytes, headers: Mapping[str, str]) -> None:
        headers = {**headers, "Accept-Ranges": "bytes"}
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match is None:
            self._send(200, content, headers)
            return
        first, last = int(match.group(1)), int(match.group(2) or len(content) - 1)
        if first >= len(content):
            self._send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            return
        part = content[first : last + 1]
        span = f"bytes {first}-{first + len(part) - 1}/{len(content)}"
        self._send(206, part, {**headers, "Content-Range": span})


def _entry(path: str, blob: Blob) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(blob.content), "oid": blob.git_id}
    if blob.lfs:
        entry["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": len(blob.pointer)}
    return entry


def _add_file(hub: HubState, files: dict[str, Blob], value: Mapping[str, Any]) -> None:
    files[value["path"]] = Blob(base64.b64decode(value["content"]))


def _add_large(hub: HubState, files: dict[str, Blob], value: Mapping[str, Any]) -> None:
    if value["oid"] not in hub.storage:
        raise Refused(400, f"the content of {value['path']} was not uploaded")
    files[value["path"]] = Blob(hub.storage[value["oid"]], lfs=True)


def _delete_file(hub: HubState, files: dict[str, Blob], value: Mapping[str, Any]) -> None:
    if files.pop(value["path"], None) is None:
        raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")


def _delete_folder(hub: HubState, files: dict[str, Blob], value: Mapping[str, Any]) -> None:
    doomed = [path for path in files if path.startswith(value["path"].rstrip("/") + "/")]
    if not doomed:
        raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
    for path in doomed:
        del files[path]


_CHANGES: dict[str, Callable[[HubState, dict[str, Blob], Mapping[str, Any]], None]] = {
    "file": _add_file,
    "lfsFile": _add_large,
    "deletedFile": _delete_file,
    "deletedFolder": _delete_folder,
}
_MODEL = r"/api/models/([^/]+/[^/]+)"
HubApi.routes = (
    ("GET HEAD", r"/", HubApi.home),
    ("GET", r"/api/whoami-v2", HubApi.whoami),
    ("POST", r"/api/repos/create", HubApi.create),
    ("POST", r"/api/validate-yaml", HubApi.validate),
    ("GET", _MODEL, HubApi.info),
    ("GET", _MODEL + r"/revision/([^/]+)", HubApi.info),
    ("GET", _MODEL + r"/refs", HubApi.refs),
    ("POST", _MODEL + r"/branch/([^/]+)", HubApi.branch),
    ("GET", _MODEL + r"/tree/([^/]+)", HubApi.tree),
    ("GET", _MODEL + r"/tree/([^/]+)/(.+)", HubApi.tree),
    ("POST", _MODEL + r"/paths-info/([^/]+)", HubApi.paths),
    ("POST", _MODEL + r"/preupload/([^/]+)", HubApi.preupload),
    ("POST", _MODEL + r"/commit/([^/]+)", HubApi.commit),
    ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", HubApi.lfs_batch),
    ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/verify", HubApi.lfs_verify),
    ("PUT", r"/storage/([0-9a-f]{64})", HubApi.store),
    ("GET HEAD", r"/storage/([0-9a-f]{64})", HubApi.stored),
    ("GET HEAD", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", HubApi.resolve),
)
