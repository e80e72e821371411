"""Presets on file systems that KerasHub's loader cannot read, copied to a local cache through Beam's."""

from __future__ import annotations

import hashlib
import json

from apache_beam.io.filesystems import FileSystems

from maskbeam.transforms.files.local_copy import copy_once
from maskbeam.transforms.models.check_preset import MAX_WEIGHTS_BYTES
from maskbeam.transforms.presets.embedded import HUB_SCHEMES, PresetError, check_model_name, resolve_preset


def local_preset(preset: str) -> str:
    """The preset as KerasHub takes it: a directory of this machine, or a name that it downloads by itself.

    A URI of any other file system is copied to ~/.cache/maskbeam once and again when a file there has changed its size
    or time. Processes that ask at the same time wait for the one that copies; a copy that was cut off is not used.

    Raises:
      PresetError: a name that means no model, or a URI without a preset.
      OSError: it cannot be read, or the cache cannot be written.
    """
    check_model_name(preset)
    preset = resolve_preset(preset)
    if FileSystems.get_scheme(preset) in (None, *HUB_SCHEMES):
        return preset
    source = preset.rstrip("/") + "/"
    found = FileSystems.match([source + "**"])[0].metadata_list
    files = sorted((file.path, file.size_in_bytes, file.last_updated_in_seconds) for file in found)
    files = [file for file in files if not file[0].endswith("/")]  # object stores mark directories that way
    if source + "config.json" not in [path for path, _, _ in files]:
        what = "is no KerasHub preset: there is no config.json in it" if files else "is not there"
        raise PresetError(f"the model {preset} {what}. Give the URI of a directory that save_to_preset wrote.")
    if (size := sum(size for _, size, _ in files)) > MAX_WEIGHTS_BYTES:
        raise PresetError(f"the model {preset} has {size} bytes, more than the {MAX_WEIGHTS_BYTES} allowed.")
    key = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:32]
    return str(copy_once("presets", key, {path.removeprefix(source): path for path, _, _ in files}))
