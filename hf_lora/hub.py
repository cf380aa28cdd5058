"""Adapter directories on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# What an adapter directory consists of; nothing else of a repository is fetched.
ADAPTER_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "hf_lora.json",
    "README.md",
    "tokenizer*",
    "special_tokens_map.json",
    "vocab*",
    "merges.txt",
    "added_tokens.json",
    "spiece.model",
    "sentencepiece*",
    "*.model",
)


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
    try:
        folder = huggingface_hub.snapshot_download(
            str(adapter),
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            allow_patterns=list(ADAPTER_FILES),
        )
    except HFValidationError:
        raise ValueError(
            f"no such adapter; got {str(adapter)!r}, which is neither a directory nor a Hub id"
        ) from None
    except (RepositoryNotFoundError, GatedRepoError):
        raise ValueError(
            f"no such adapter; got {str(adapter)!r}, which is no directory, and the Hub knows no such repository "
            "(or it is private: pass a token)"
        ) from None
    except RevisionNotFoundError:
        raise ValueError(f"the adapter {str(adapter)!r} has no revision {revision!r} on the Hub") from None
    except LocalEntryNotFoundError:
        raise ValueError(
            f"no such adapter; got {str(adapter)!r}, which is no directory, and the Hub cannot be reached"
        ) from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        raise ValueError(
            f"the Hub refused the adapter {str(adapter)!r} with status {status}; pass a token that may read it"
        ) from None
    return Path(folder)
