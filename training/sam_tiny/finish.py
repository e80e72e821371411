"""Writes trained weights as a KerasHub preset in float16.

python -m training.sam_tiny.finish --work DIR --preset DIR

--work is that of training.sam_tiny.train. The preset loads with maskbeam's --model, and training goes on from it with
--start_from.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import h5py
import keras
import keras_hub
import numpy as np

from training.sam_tiny.model import build_model
from training.sam_tiny.train import restore


def main(argv: list[str] | None = None) -> None:
    """Writes the preset."""
    parser = argparse.ArgumentParser(prog="python -m training.sam_tiny.finish", description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="--work of training.sam_tiny.train")
    parser.add_argument("--preset", type=Path, required=True, help="directory to write")
    args = parser.parse_args(argv)
    model = build_model()
    step = restore(args.work / "weights.npz", model.variables)
    write_preset(model, args.preset)
    print(f"{args.preset}: the weights of step {step}")


def write_preset(backbone: keras.Model, preset: Path) -> None:
    """Writes a KerasHub preset whose weights are stored as float16, half the size; they load as float32."""
    # The encoder normalizes; the converter scales to 0..1.
    image_size = backbone.image_encoder.input_shape[1:3]
    converter = keras_hub.layers.SAMImageConverter(image_size=image_size, scale=1 / 255)
    preprocessor = keras_hub.models.SAMImageSegmenterPreprocessor(image_converter=converter)
    keras_hub.models.SAMImageSegmenter(backbone=backbone, preprocessor=preprocessor).save_to_preset(str(preset))
    weights, part = preset / "model.weights.h5", preset / "part.h5"
    with h5py.File(weights) as source, h5py.File(part, "w") as half:
        source.visititems(lambda name, item: _copy_item(name, item, half))
        half.attrs.update(source.attrs)
    part.replace(weights)


def _copy_item(name: str, item: h5py.Group | h5py.Dataset, target: h5py.File) -> None:
    """Copies a group or an array under its name, floats as float16."""
    if isinstance(item, h5py.Dataset):
        value = item[()]
        copied = target.create_dataset(name, data=value.astype(np.float16) if value.dtype == np.float32 else value)
    else:
        copied = target.require_group(name)
    copied.attrs.update(item.attrs)


if __name__ == "__main__":
    main()
