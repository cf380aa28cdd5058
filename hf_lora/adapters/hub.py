"""Adapters on the Hub: fetch one, push one. Every failure is one line that says what to do."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, constants, errors
from huggingface_hub.utils import validate_repo_id

from hf_lora._files import MAX_JSON_BYTES, MAX_TENSORS_BYTES, read_bytes
from hf_lora.adapters.directory import TENSORS, read_adapter
from hf_lora.models.tokenizer_files import TOKENIZER_FILES, read_tokenizer

logger = logging.getLogger(__name__)

# The files of an adapter directory; nothing else of a repository is fetched.
_OWN_FILES = ("adapter_config.json", "adapter_model.safetensors", "hf_lora.json", "README.md")
ADAPTER_FILES = _OWN_FILES + TOKENIZER_FILES
# What opens a picture on the card, and what follows it. Each is looked for once, up to the next one.
_PICTURES = {
    "![": re.compile(r"[^\]]*\]\(<?(?:\./)?([\w.-]+\.png)>?"),
    "<img": re.compile(r"""[^>]+?src=["'](?:\./)?([\w.-]+\.png)["']"""),
}

# A failed connection, or an answer that is not the Hub's.
_CONNECTION_ERRORS = (errors.HTTPError, ConnectionError, JSONDecodeError)
_REFUSALS = (errors.HFValidationError, errors.HfHubHTTPError, errors.LocalEntryNotFoundError)
# The first entry whose class fits gives the message.
_FETCH_ERRORS: dict[type[Exception], str] = {
    errors.HFValidationError: "no such adapter; got {name!r}, which is neither a directory nor a Hub id",
    errors.GatedRepoError: "the adapter {name!r} is gated; ask for access on its page, and pass a token that has it",
    errors.RepositoryNotFoundError: "no such adapter; got {name!r}, which is no directory, and the Hub knows no such "
    "repository (or it is private: pass a token)",
    errors.RevisionNotFoundError: "the adapter {name!r} has no revision {revision!r} on the Hub",
    errors.LocalEntryNotFoundError: "no such adapter; got {name!r}{at}, which is no directory, and the Hub cannot be "
    "reached{offline}; not all of it is in the cache",
    errors.HfHubHTTPError: "the Hub refused the adapter {name!r} with status {error.response.status_code}; pass a "
    "token that may read it",
    Exception: "the adapter {name!r} could not be fetched; the connection to the Hub broke off ({line}); try again",
}
_BAD_CARD = "Invalid metadata in README.md"
_PUSH_STATUS = {
    400: "the Hub finds it not valid",
    401: "the Hub does not accept the token; pass another one",
    403: "the token may not do that; use one with the right to write there, or open a pull request with --create_pr",
    404: "there is no such repository, or the token may not see it",
    409: "somebody changes it at the same time; try again",
    412: "somebody else has changed it meanwhile; try again",
    413: "the files are too large",
    429: "there were too many requests; try again later",
}


def adapter_directory(adapter: str | Path, *, revision: str | None = None, token: str | None = None) -> Path:
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
            allow_patterns=list(ADAPTER_FILES),
            ignore_patterns=["*/*"],  # for the client, * stands for folders too
        )
    except (*_REFUSALS, *_CONNECTION_ERRORS) as error:
        at = "" if revision is None else f" at revision {revision!r}"
        offline = " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
        message = next(text for kind, text in _FETCH_ERRORS.items() if isinstance(error, kind))
        facts = {"name": name, "revision": revision, "error": error, "line": _first_line(error)}
        raise ValueError(message.format(**facts, at=at, offline=offline)) from None
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

    Only the adapter's own files, which are checked first, are pushed: weights, configuration, labels, tokenizer, card,
    and the pictures in the card. If the repository has all of them already, no commit is made.
    private: make the repository private; False: as its owner's settings say. revision: a branch, made if it is missing.
    create_pr: open a pull request; its URL is returned. token: default: HF_TOKEN, or that of `hf auth login`.
    Raises ValueError, in one line, if the push fails.
    """
    contents = checked_contents(directory)
    options: dict[str, Any] = {
        "private": private,
        "revision": revision,
        "create_pr": create_pr,
        "token": token,
    }
    return commit_page(push_contents(contents, repo_id, commit_message=commit_message, **options))


def commit_page(commit: CommitInfo) -> str:
    """The URL of the pull request that was opened, or else of the commit."""
    return str(commit.pr_url or commit.commit_url)


def checked_contents(directory: str | Path) -> dict[str, bytes]:
    """The files of an adapter directory that belong on the Hub, read and compared with each other.

    Warns of a base model that is a local directory. Raises ValueError for a broken adapter.
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
    contents = read_tokenizer(directory)
    for name in sorted(names.intersection(_OWN_FILES)):
        limit = MAX_TENSORS_BYTES if name == TENSORS else MAX_JSON_BYTES
        contents[name] = read_bytes(directory, name, limit=limit)
    card = contents.get("README.md", b"").decode("utf-8", "replace")
    pieces = ((kind, piece) for opening, kind in _PICTURES.items() for piece in card.split(opening)[1:])
    shown = {match[1] for kind, piece in pieces if (match := kind.match(piece))}
    return contents | {name: read_bytes(directory, name) for name in sorted(shown & names)}


def create_repository(
    repo_id: str, *, private: bool | None = None, revision: str | None = None, token: str | None = None
) -> str:
    """Make a repository, and a branch in it, unless they are there; returns the repository's whole id.

    Raises ValueError, in one line, if that fails, or if the repository is public and `private` is asked for.
    """
    token = _token(repo_id, token)
    with _push_errors(repo_id):
        api = HfApi(token=token)
        whole = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
        if private and not api.model_info(whole).private:
            raise ValueError(
                f"the repository {whole!r} exists and is public; got private; expected a new or a private one; make "
                "it private in its settings first"
            )
        if revision is not None and not api.revision_exists(whole, revision):
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
) -> CommitInfo:
    """Push files, by their paths, in one commit; otherwise as `push_adapter`."""
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
    with _push_errors(repo_id, branch):
        api = HfApi(token=token)
        return api.create_commit(
            repo_id,
            [CommitOperationAdd(path, content) for path, content in contents.items()],
            commit_message=commit_message or "Upload LoRA adapter",
            revision=branch,
            create_pr=create_pr,
        )


def _token(repo_id: str, token: str | None) -> str:
    """The token to push with. What can be refused without one is refused first."""
    with _push_errors(repo_id):
        validate_repo_id(repo_id)
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"{repo_id!r} cannot be pushed to; got HF_HUB_OFFLINE=1; unset it, or push later")
    token = token or huggingface_hub.get_token()
    if not token:
        raise ValueError(
            f"{repo_id!r} cannot be pushed to without an access token; log in with `hf auth login`, or set HF_TOKEN"
        )
    return token


@contextmanager
def _push_errors(repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Turn the errors of the Hub's client into a ValueError of one line."""
    try:
        yield
    except errors.HFValidationError:
        raise ValueError(
            f"not a repository id; got {repo_id!r}; expected user/name, of letters, digits, '-', '_' and '.'"
        ) from None
    except (*_CONNECTION_ERRORS, RuntimeError) as error:
        # The upload of a large file wraps the cause in a RuntimeError.
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


def _reason(error: BaseException, revision: str | None) -> str:
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{revision!r} is no branch there; expected the name of a branch"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "the Hub may not be asked; got HF_HUB_OFFLINE=1; unset it"
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        other = (
            "the Hub does not work at the moment; try again later" if status >= 500 else "the Hub refused it"
        )
        said = f": {error.server_message}" if error.server_message else ""
        return f"{_PUSH_STATUS.get(status, other)} (status {status}{said})"
    return f"the Hub cannot be reached, or the connection broke off ({_first_line(error)}); try again"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
