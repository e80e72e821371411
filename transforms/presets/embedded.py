"""Which model a name means: the models that come with the package, and those that KerasHub downloads by name."""

from __future__ import annotations

import difflib
import functools
import importlib.util
import os
import runpy
from pathlib import Path

# What --model defaults to: good for trying things, not for labeling a dataset.
DEMO_MODEL = "sam_tiny"

# File systems of KerasHub's own: it downloads presets from these by itself.
HUB_SCHEMES = ("kaggle", "hf", "modelscope")

_PRESETS = Path(__file__).parent

# Files of other programs that people have of SAM, and what Meta calls the three sizes in their names.
_CHECKPOINTS = (".pth", ".pt", ".bin", ".safetensors", ".ckpt", ".onnx")
_SIZES = {"vit_b": "sam_base_sa1b", "vit_l": "sam_large_sa1b", "vit_h": "sam_huge_sa1b"}


class PresetError(ValueError):
    """A model that is not there or cannot be used; the message says why and what to do."""


def embedded_presets() -> list[str]:
    """Names that --model takes and that need no download."""
    return sorted(path.parent.name for path in _PRESETS.glob("*/config.json"))


@functools.cache
def hub_presets() -> dict[str, str]:
    """The SAM presets that KerasHub knows by name, with where each comes from (kaggle://...).

    Read from KerasHub's own list, a file of its package, without importing Keras, which takes seconds.
    """
    package = importlib.util.find_spec("keras_hub")
    if package is None or not package.submodule_search_locations:
        return {}
    names = Path(package.submodule_search_locations[0]) / "src" / "models" / "sam" / "sam_presets.py"
    return {name: preset["kaggle_handle"] for name, preset in runpy.run_path(str(names))["backbone_presets"].items()}


def resolve_preset(preset: str) -> str:
    """An embedded model's name becomes its directory; everything else is left as it is, for KerasHub."""
    return str(_PRESETS / preset) if preset in embedded_presets() else preset


def in_hub(preset: str) -> bool:
    """Whether KerasHub downloads the preset."""
    return preset in hub_presets() or preset.partition("://")[0] in HUB_SCHEMES


def check_model_name(preset: str) -> None:
    """Refuses a name that means no model, at once: no network is asked and Keras is not imported.

    Raises:
      PresetError: with the nearest names and where models come from.
    """
    if preset.lower().endswith(_CHECKPOINTS):
        raise PresetError(_describe_checkpoint(preset))
    if preset in embedded_presets() or in_hub(preset) or "://" in preset:
        return
    if os.path.isdir(preset):
        if not os.path.lexists(os.path.join(preset, "config.json")):
            raise PresetError(
                f"the directory {preset} is no KerasHub preset: it has no config.json. {_describe_expected()}"
            )
    elif os.path.exists(preset):
        raise PresetError(f"the model {preset} is a file; expected the directory of a KerasHub preset.")
    else:
        raise PresetError(f"there is no model {preset}{_suggest(preset)}. {_describe_expected()}")


def _describe_checkpoint(path: str) -> str:
    name = _name_by_size(path)
    same = f"The same weights are KerasHub's {name}: give --model {name}" if name else f"Give --model {_alternatives()}"
    return f"{path} is a checkpoint of another program, which KerasHub cannot read. {same}, or a preset's directory."


def _name_by_size(preset: str) -> str | None:
    """Meta's and Hugging Face's names hold the size: sam_vit_b_01ec64.pth, sam-vit-base."""
    name = preset.rstrip("/").rpartition("/")[2].lower().replace("-", "_")
    return next((ours for size, ours in _SIZES.items() if size in name), None)


def _suggest(preset: str) -> str:
    """The names that were probably meant, to follow the wrong one."""
    if by_size := _name_by_size(preset):
        close = [by_size]
    else:
        last = preset.rstrip("/").rpartition("/")[2].lower().replace("-", "_")
        close = difflib.get_close_matches(last, [*embedded_presets(), *hub_presets()])
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _alternatives() -> str:
    return "|".join(hub_presets())


def _describe_expected() -> str:
    """Where models come from."""
    return (
        f"Expected an embedded model ({', '.join(embedded_presets())}), one that KerasHub downloads from Kaggle "
        f"({', '.join(hub_presets())}), hf://OWNER/MODEL or kaggle://..., or the directory or URI of a KerasHub preset."
    )
