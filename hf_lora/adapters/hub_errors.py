"""What can go wrong between here and the Hub, each in one line that says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from json import JSONDecodeError

from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)

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
