"""What can go wrong between here and the Hub, each in one line that says what to do."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from json import JSONDecodeError
from pathlib import Path

import huggingface_hub
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from hf_lora._files import read_bytes
from hf_lora.adapters.directory import read_adapter

# Besides answers with a status: the HTTP library's own errors, and an answer that is none of the Hub's.
CONNECTION_ERRORS = (HTTPError, ConnectionError, JSONDecodeError)
_BAD_CARD = "Invalid metadata in README.md"
_REASONS = {
    400: "the Hub finds it not valid",
    401: "the Hub does not accept the token; pass another one",
    403: "the token may not do that; use one with the right to write there, or open a pull request with --create_pr",
    404: "there is no such repository, or the token may not see it",
    409: "somebody changes it at the same time; try again",
    412: "somebody else has changed it meanwhile; try again",
    413: "the files are too large",
    429: "there were too many requests; try again later",
}


@contextmanager
def push_errors(repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Inside, what the Hub's client raises while something is pushed becomes a ValueError in one line."""
    try:
        yield
    except HFValidationError:
        raise ValueError(
            f"not a repository id; got {repo_id!r}; expected user/name, of letters, digits, '-', '_' and '.'"
        ) from None
    except (*CONNECTION_ERRORS, RuntimeError) as error:
        # The upload of a large file wraps what went wrong.
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        raise ValueError(f"{repo_id!r} could not be pushed to; {_reason(cause, revision)}") from error
    except ValueError as error:
        if _BAD_CARD not in str(error):
            raise
        problems = "; ".join(line.removeprefix("- ") for line in str(error).splitlines()[1:] if line.strip())
        raise ValueError(
            f"{repo_id!r} could not be pushed to; the card's metadata is not valid ({problems}); mend the YAML at the "
            "top of README.md"
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its name where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _reason(error: BaseException, revision: str | None) -> str:
    if isinstance(error, RevisionNotFoundError):
        return f"{revision!r} is no branch there; expected the name of a branch"
    if isinstance(error, OfflineModeIsEnabled):
        return "the Hub may not be asked; got HF_HUB_OFFLINE=1; unset it"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        other = (
            "the Hub does not work at the moment; try again later" if status >= 500 else "the Hub refused it"
        )
        said = f": {error.server_message}" if error.server_message else ""
        return f"{_REASONS.get(status, other)} (status {status}{said})"
    return f"the Hub cannot be reached, or the connection broke off ({first_line(error)}); try again"


logger = logging.getLogger(__name__)

# What an adapter directory consists of; nothing else of a repository is fetched.
ADAPTER_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "hf_lora.json",
    "README.md",
    "tokenizer*",
    "special_tokens_map.json",
    "vocab*",
    "entity_vocab.json",
    "merges.txt",
    "bpe.codes",
    "added_tokens.json",
    "spiece.model",
    "sentencepiece*",
    "*.model",
)
# The endings of a tokenizer's files: patterns such as `tokenizer*` are for names of any kind.
_TOKENIZER_ENDINGS = (".json", ".txt", ".model", ".codes")
_OWN_FILES = ADAPTER_FILES[:4]
_PICTURE = re.compile(
    r"""!\[[^\]]*\]\(<?(?:\./)?([\w.-]+\.png)>?|<img[^>]+src=["'](?:\./)?([\w.-]+\.png)["']"""
)


@dataclass(frozen=True)
class Pushed:
    """What a push did. `files`: bytes of each that was sent; none where the Hub had them all."""

    repo_id: str
    revision: str
    commit: CommitInfo
    files: Mapping[str, int]

    @property
    def url(self) -> str:
        """The pull request that was opened, or else the commit that holds the files."""
        return str(self.commit.pr_url or self.commit.commit_url)


def adapter_directory(
    adapter: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
) -> Path:
    """The local directory of an adapter: `adapter` itself, or the files fetched from that Hub id.

    Raises ValueError, in one line, if it is neither.
    """
    if Path(adapter).is_dir():
        return Path(adapter)
    name = str(adapter)
    try:
        folder = huggingface_hub.snapshot_download(
            name,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            allow_patterns=list(ADAPTER_FILES),
            ignore_patterns=["*/*"],  # for the client, * stands for folders too
        )
    except HFValidationError:
        raise ValueError(
            f"no such adapter; got {name!r}, which is neither a directory nor a Hub id"
        ) from None
    except GatedRepoError:
        raise ValueError(
            f"the adapter {name!r} is gated; ask for access on its page, and pass a token that has it"
        ) from None
    except RepositoryNotFoundError:
        raise ValueError(
            f"no such adapter; got {name!r}, which is no directory, and the Hub knows no such repository "
            "(or it is private: pass a token)"
        ) from None
    except RevisionNotFoundError:
        raise ValueError(f"the adapter {name!r} has no revision {revision!r} on the Hub") from None
    except LocalEntryNotFoundError:
        offline = " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
        which = "" if revision is None else f" at revision {revision!r}"
        raise ValueError(
            f"no such adapter; got {name!r}{which}, which is no directory, and the Hub cannot be reached{offline}; "
            "not all of it is in the cache"
        ) from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        raise ValueError(
            f"the Hub refused the adapter {name!r} with status {status}; pass a token that may read it"
        ) from None
    except CONNECTION_ERRORS as error:
        raise ValueError(
            f"the adapter {name!r} could not be fetched; the connection to the Hub broke off ({first_line(error)}); "
            "try again"
        ) from None
    return Path(folder)


def push_adapter(
    directory: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Push an adapter directory to a model repository, which is made if it is missing; returns the commit's URL.

    Only the adapter's own files travel: weights, configuration, labels, tokenizer, card, and the pictures that the
    card shows. They are read and checked first. Files that the repository has already are not sent again.
    private: make the repository private; False: as its owner's settings say.
    revision: a branch, made if it is missing. create_pr: open a pull request; its URL is returned.
    token: default: HF_TOKEN or that of `hf auth login`.
    Raises ValueError, in one line, for whatever hinders that.
    """
    pushed = push_contents(
        checked_contents(directory),
        repo_id,
        private=private,
        revision=revision,
        create_pr=create_pr,
        token=token,
        commit_message=commit_message,
    )
    return pushed.url


def checked_contents(directory: str | Path) -> dict[str, bytes]:
    """The files of an adapter directory that belong on the Hub, read and checked against each other.

    Warns of a base model that others cannot have. Raises ValueError for an adapter that is broken.
    """
    base = read_adapter(directory).base_name
    if base is not None and Path(base).is_dir():
        logger.warning(
            "the base model is a directory of this machine, %s; elsewhere it has to be given", base
        )
    return adapter_contents(Path(directory))


def adapter_contents(directory: Path) -> dict[str, bytes]:
    """The files of an adapter directory that belong on the Hub, by name."""
    names = {path.name for path in directory.iterdir() if path.is_file()}
    chosen = {name for name in names if name in _OWN_FILES or _is_tokenizer_file(name)}
    contents = {name: read_bytes(directory, name) for name in sorted(chosen)}
    card = contents.get("README.md", b"").decode("utf-8", "replace")
    shown = {first or second for first, second in _PICTURE.findall(card)}
    return contents | {name: read_bytes(directory, name) for name in sorted(shown & names)}


def create_repository(
    repo_id: str, *, private: bool | None = None, revision: str | None = None, token: str | None = None
) -> str:
    """Make a repository, and a branch in it, unless they are there; returns the repository's whole id.

    Raises ValueError, in one line, where that cannot be done, and for a public one that was to be private.
    """
    token = _token(repo_id, token)
    with push_errors(repo_id):
        api = HfApi(token=token)
        whole = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
        if private and not api.model_info(whole).private:
            raise ValueError(
                f"the repository {whole!r} exists and is public; got private; expected a new or a private one; make "
                "it private in its settings first"
            )
        if revision is not None and not _exists(api, whole, revision):
            api.create_branch(whole, branch=revision, exist_ok=True)
    return whole


def push_contents(
    contents: Mapping[str, bytes],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    commit_message: str | None = None,
) -> Pushed:
    """Push files, given by their paths, in one commit: all of them arrive or none. Otherwise as `push_adapter`."""
    if create_pr and revision not in (None, constants.DEFAULT_REVISION):
        raise ValueError(
            f"a pull request starts from the branch 'main'; got revision {revision!r}; expected one of the two"
        )
    token = _token(repo_id, token)
    for path, content in contents.items():
        if token.encode() in content:
            raise ValueError(
                f"nothing is pushed, since {path} holds the access token; take it out of that file"
            )
    repo_id = create_repository(repo_id, private=private, revision=revision, token=token)
    branch = revision or constants.DEFAULT_REVISION
    with push_errors(repo_id, branch):
        api = HfApi(token=token)
        changed = _changed(api, repo_id, branch, contents)
        if not changed:
            head = api.model_info(repo_id, revision=branch).sha
            commit = CommitInfo(
                commit_url=f"{api.endpoint}/{repo_id}/commit/{head}",
                commit_message="",
                commit_description="",
                oid=str(head),
            )
            return Pushed(repo_id, branch, commit, {})
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(path, content) for path, content in changed.items()],
            commit_message=commit_message or "Upload LoRA adapter",
            revision=branch,
            create_pr=create_pr,
        )
    return Pushed(repo_id, branch, commit, {path: len(content) for path, content in changed.items()})


def _is_tokenizer_file(name: str) -> bool:
    patterns = (pattern for pattern in ADAPTER_FILES if pattern not in _OWN_FILES)
    return name.endswith(_TOKENIZER_ENDINGS) and any(fnmatchcase(name, pattern) for pattern in patterns)


def _token(repo_id: str, token: str | None) -> str:
    """The token to push with, looked for after what needs none."""
    with push_errors(repo_id):
        validate_repo_id(repo_id)
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"{repo_id!r} cannot be pushed to; got HF_HUB_OFFLINE=1; unset it, or push later")
    token = token or huggingface_hub.get_token()
    if not token:
        raise ValueError(
            f"{repo_id!r} cannot be pushed to without an access token; log in with `hf auth login`, or set HF_TOKEN"
        )
    return token


def _exists(api: HfApi, repo_id: str, revision: str) -> bool:
    try:
        api.model_info(repo_id, revision=revision)
    except RevisionNotFoundError:
        return False
    return True


def _changed(api: HfApi, repo_id: str, revision: str, contents: Mapping[str, bytes]) -> dict[str, bytes]:
    """Those files that the repository does not have, or has with other contents."""
    there = {}
    for entry in api.get_paths_info(repo_id, list(contents), revision=revision):
        lfs = getattr(entry, "lfs", None)
        there[entry.path] = lfs.sha256 if lfs else getattr(entry, "blob_id", None)
    return {
        path: content
        for path, content in contents.items()
        if there.get(path) not in (hashlib.sha256(content).hexdigest(), _git_id(content))
    }


def _git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
