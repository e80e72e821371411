"""The files of a preset, checked before anything is built of them: presets come from strangers.

Weights are numbers alone, but what a configuration names is code that Keras looks up and runs, and a file may be a
link to an endless device. No Keras is imported here, except to download a preset that KerasHub knows by name.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator
from typing import Any

from maskbeam.transforms.native_stderr import native_stderr_silenced
from maskbeam.transforms.presets.embedded import PresetError, hub_presets, in_hub

# SAM's own configurations have some KB, and its largest weights 2.6 GB.
MAX_CONFIG_BYTES = 4 * 2**20
MAX_WEIGHTS_BYTES = 16 * 2**30

_CONFIG, _TASK_CONFIG = "config.json", "task.json"
_WEIGHTS, _TASK_WEIGHTS, _SHARDED_WEIGHTS = "model.weights.h5", "task.weights.h5", "model.weights.json"
_HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"

# The classes that SAM presets are made of. Keras would build any that a preset names, among them ones that load pickles
# or files of this machine, or that run what they hold; its safe mode only knows some of them.
_CLASSES = frozenset(
    {
        *("SAMImageSegmenter", "SAMBackbone", "ViTDetBackbone", "SAMPromptEncoder", "SAMMaskDecoder"),
        *("SAMImageSegmenterPreprocessor", "SAMImageConverter", "DTypePolicy", "FloatDTypePolicy"),
        # What Keras writes of a network of ENCODER_LAYERS beside the layers.
        *("Functional", "__keras_tensor__", "GlorotUniform", "Zeros", "Ones"),
    }
)
_PACKAGES = ("keras", "keras_hub")

# Layers of a convolutional image encoder: those that transforms/models/sam/conv_encoder.py runs.
ENCODER_LAYERS = frozenset(
    {
        *("InputLayer", "Rescaling", "Conv2D", "DepthwiseConv2D"),
        *("ReLU", "Add", "LayerNormalization", "UpSampling2D"),
    }
)


def check_preset(preset: str) -> list[str]:
    """Refuses a preset that is not complete, or that is anything but a SAM in regular files of sensible sizes.

    Args:
      preset: a directory, or what KerasHub downloads; see maskbeam.transforms.presets.embedded.resolve_preset.

    Returns:
      the local paths of the files that make the model: config.json, and the weights.

    Raises:
      PresetError: naming the file, and the class if it is one that is no part of SAM.
    """
    config = _find_file(preset, _CONFIG, MAX_CONFIG_BYTES)
    if config is None:
        raise PresetError(_describe(preset, f"there is no {_CONFIG}"))
    weights = _find_weights(preset)
    largest = sum(os.path.getsize(path) for path in weights) // 2  # numbers in it; the smallest have two bytes
    _check_config(preset, config, largest)
    if (task := _find_file(preset, _TASK_CONFIG, MAX_CONFIG_BYTES)) is not None:
        _check_config(preset, task, largest)
        if (task_weights := _find_file(preset, _TASK_WEIGHTS, MAX_WEIGHTS_BYTES)) is not None:
            _check_signature(preset, task_weights)
    return [config, *weights]


def _find_weights(preset: str) -> list[str]:
    """The weights in one file, or the index and the shards of a large model."""
    found = [_find_file(preset, _WEIGHTS, MAX_WEIGHTS_BYTES)]
    index = None
    if found[0] is None and (index := _find_file(preset, _SHARDED_WEIGHTS, MAX_CONFIG_BYTES)) is not None:
        found = [_find_file(preset, name, MAX_WEIGHTS_BYTES) for name in _shard_names(preset, index)]
    shards = [path for path in found if path is not None]
    if not shards or len(shards) < len(found):
        raise PresetError(_describe(preset, f"its weights ({_WEIGHTS}) are missing or not complete"))
    for path in shards:
        _check_signature(preset, path)
    return shards if index is None else [index, *shards]


def _shard_names(preset: str, index: str) -> list[str]:
    """The files that an index of weights names."""
    content = _read_json(preset, index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict):
        raise PresetError(_describe(preset, f"its {_SHARDED_WEIGHTS} lists no files"))
    names: set[str] = set()
    for value in weight_map.values():
        for name in value if isinstance(value, list) else [value]:
            if not isinstance(name, str) or name in ("", ".", "..") or os.path.basename(name) != name:
                raise PresetError(_describe(preset, f"its {_SHARDED_WEIGHTS} names {name!r}, a file elsewhere"))
            names.add(name)
    return sorted(names)


def _find_file(preset: str, name: str, max_bytes: int) -> str | None:
    """The local path of a regular file of a preset, downloaded if need be; None if the preset has none of that name."""
    if "://" in preset or in_hub(preset):
        with native_stderr_silenced():
            from keras_hub.src.utils.preset_utils import get_file  # there is no public way to a preset's files
        try:
            path = str(get_file(preset, name))
        except FileNotFoundError:
            return None
        except Exception as error:  # whatever the hub in question raises
            raise PresetError(_describe_download(preset, name, error)) from error
    else:
        path = os.path.join(preset, name)
        if not os.path.lexists(path):
            return None
    try:
        found = os.stat(path)
    except OSError as error:
        raise PresetError(_describe(preset, f"its {name} cannot be read: {error.strerror}")) from error
    if not stat.S_ISREG(found.st_mode):
        raise PresetError(_describe(preset, f"its {name} is no regular file"))
    if found.st_size > max_bytes:
        raise PresetError(_describe(preset, f"its {name} has {found.st_size} bytes, more than the {max_bytes} allowed"))
    return path


def _check_signature(preset: str, path: str) -> None:
    with open(path, "rb") as file:
        if file.read(len(_HDF5_SIGNATURE)) != _HDF5_SIGNATURE:
            raise PresetError(_describe(preset, f"its {os.path.basename(path)} is no HDF5 file; download it again"))


def _read_json(preset: str, path: str) -> Any:
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise PresetError(_describe(preset, f"its {os.path.basename(path)} is no JSON: {error}")) from error


def _check_config(preset: str, path: str, max_parameters: int) -> None:
    """Looks at every object in a configuration, however deep."""
    name = os.path.basename(path)
    config = _read_json(preset, path)
    if not isinstance(config, dict) or "class_name" not in config:
        raise PresetError(_describe(preset, f"its {name} describes no Keras model"))
    try:
        parts = list(_objects(config))
    except RecursionError as error:
        raise PresetError(_describe(preset, f"its {name} nests too deep")) from error
    for part in parts:
        if objection := _object_to(part, max_parameters):
            raise PresetError(_describe(preset, f"its {name} {objection}"))


def _objects(config: Any) -> Iterator[dict[str, Any]]:
    """All dicts of a configuration."""
    if isinstance(config, dict):
        yield config
        config = list(config.values())
    if isinstance(config, list):
        for value in config:
            yield from _objects(value)


def _object_to(part: dict[str, Any], max_parameters: int) -> str | None:
    """Why a part of a configuration must not be built; None if it may."""
    if "class_name" in part and not _is_known(part):
        registered = f" (registered as {part['registered_name']})" if part.get("registered_name") else ""
        return (
            f"names {part.get('module')}.{part['class_name']}{registered}, which is no part of SAM. Nothing of it was "
            "run. Use a preset from a source you trust, as KerasHub's save_to_preset writes it"
        )
    if max(_count_parameters(part), _count_kernel(part)) > max_parameters:
        return "describes a larger model than its weights are of"
    return None


def _is_known(part: dict[str, Any]) -> bool:
    name = part["class_name"]
    return (
        isinstance(name, str)
        and name in _CLASSES | ENCODER_LAYERS
        and str(part.get("module") or "keras").partition(".")[0] in _PACKAGES
        # Keras looks for this one first.
        and part.get("registered_name") in (None, name, f"keras_hub>{name}")
    )


def _count_parameters(config: dict[str, Any]) -> int:
    """Weights that an encoder or a decoder has at least: of its transformer layers and its position embedding."""
    hidden, inner, layers = (_whole(config.get(name)) for name in ("hidden_size", "intermediate_dim", "num_layers"))
    shape = config.get("image_shape")
    positions = 0
    if isinstance(shape, list) and len(shape) == 3:
        patch = max(_whole(config.get("patch_size")), 1)
        positions = (_whole(shape[0]) // patch) * (_whole(shape[1]) // patch)
    return layers * hidden * (hidden + inner) + positions * hidden


def _count_kernel(part: dict[str, Any]) -> int:
    """Weights of a convolution, which Keras makes by the input's shape that is written beside its configuration."""
    kind, config = part.get("class_name"), part.get("config")
    if kind not in ("Conv2D", "DepthwiseConv2D") or not isinstance(config, dict):
        return 0
    built = part.get("build_config")
    shape = built.get("input_shape") if isinstance(built, dict) else None
    if not isinstance(shape, list) or len(shape) != 4:
        return MAX_WEIGHTS_BYTES
    outputs = config.get("filters" if kind == "Conv2D" else "depth_multiplier")
    sides = config.get("kernel_size")
    sides = sides if isinstance(sides, list) else [sides, sides]
    return math.prod(_whole(number) for number in (*sides, shape[3], outputs))


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def _describe(preset: str, reason: str) -> str:
    return f"cannot load model {preset}: {reason}."


def _describe_download(preset: str, name: str, error: Exception) -> str:
    """What to do without a network."""
    reason = (str(error).strip() or type(error).__name__).partition("\n")[0].rstrip(".")
    scheme, _, path = hub_presets().get(preset, preset).partition("://")
    told = _describe(preset, f"its {name} cannot be downloaded: {reason}")
    if scheme == "kaggle":
        page, cached = f"https://www.kaggle.com/models/{path}", f" Downloaded before: {_describe_cache()}."
    elif scheme == "hf":
        page, cached = f"https://huggingface.co/{path}", ""
    else:
        return told
    return f"{told} Without a network, get it from {page} on another machine and give its directory.{cached}"


def _describe_cache() -> str:
    """Which of the models that KerasHub knows by name are on this machine, and where."""
    cache = os.environ.get("KAGGLEHUB_CACHE", os.path.expanduser("~/.cache/kagglehub"))
    there = [
        name
        for name, handle in hub_presets().items()
        if os.path.exists(os.path.join(cache, "models", handle.partition("://")[2], _WEIGHTS))
    ]
    return f"{', '.join(there) or 'none'} (in {cache})"
