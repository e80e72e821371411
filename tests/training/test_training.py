"""The training of the embedded model: its network is KerasHub's, its targets and losses are what they say."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from maskbeam.transforms.evaluation.truth import TruthImage
from maskbeam.transforms.models.sam.encoder import PIXEL_MEAN, PIXEL_STD
from maskbeam.transforms.models.sam.model import load_sam
from training import evaluate, finish, losses, network, scenes, train
from training.model import build_model
from training.photos import Photo, load_photos, split_images
from training.sam_tiny.finish import write_preset
from training.sam_tiny.losses import pair_losses
from training.synthetic import make_synthetic

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="training runs on TensorFlow"),
]

H = scenes.FRAME // 2


@pytest.fixture(scope="module")
def model() -> keras.Model:
    model = build_model(0)
    rng = np.random.default_rng(1)
    for weight in model.variables:  # none is 0, so that none can be left out
        if weight.path.endswith(("bias", "beta", "rel_pos_h", "rel_pos_w")):
            weight.assign_add(rng.normal(0, 0.1, weight.shape).astype(np.float32))
    return model


def make_scene(instances: np.ndarray, regions: np.ndarray | None = None) -> scenes.Scene:
    size = (scenes.FRAME, scenes.FRAME)
    if regions is None:
        regions = np.zeros((3, *size), np.int32)
    return scenes.Scene(np.zeros((*size, 3), np.uint8), size, instances, regions)


def rectangle(top: int, left: int, bottom: int, right: int) -> np.ndarray:
    mask = np.zeros((scenes.FRAME, scenes.FRAME), bool)
    mask[top:bottom, left:right] = True
    return mask


def test_encoder_is_keras_hubs(model: keras.Model) -> None:
    pixels = np.random.default_rng(0).uniform(0, 1, (2, scenes.FRAME, scenes.FRAME, 3)).astype(np.float32)
    expected = np.array(model.image_encoder(pixels))  # it takes pixels from 0 to 1 and subtracts the mean itself
    normal = (pixels - PIXEL_MEAN) / PIXEL_STD
    actual = network.encode(model.image_encoder, tf.constant(normal, tf.float32), tf.float32).numpy()
    np.testing.assert_allclose(actual, expected, atol=2e-4)


def test_decoder_is_keras_hubs(model: keras.Model) -> None:
    rng = np.random.default_rng(0)
    channels = model.prompt_encoder.hidden_size
    image = rng.normal(size=(2, 32, 32, channels)).astype(np.float32)
    coords = rng.uniform(0, scenes.FRAME, (6, 2, 2)).astype(np.float32)
    is_box = np.array([False, True, False, True, True, False])
    encoder = model.prompt_encoder
    sparse = network.embed_prompts(encoder, tf.constant(coords), tf.constant(is_box)[:, None, None])
    positions = encoder.positional_embedding_layer.encode_image((32, 32))
    masks, iou = network.decode(model.mask_decoder, tf.constant(image), positions, sparse, tf.float32)
    # Plain TensorFlow has no product that this decoder needs on some CPUs (network.py); compiled by XLA it has.
    decoder = tf.function(model.mask_decoder.__call__, jit_compile=True)
    expected = decoder(
        np.repeat(image, 3, axis=0), positions[None], sparse, np.zeros((6, 32, 32, channels), np.float32)
    )
    np.testing.assert_allclose(masks, expected["masks"], atol=2e-4)
    np.testing.assert_allclose(iou, expected["iou_pred"], atol=2e-5)


def test_prompts_are_embedded_as_keras_hub_does(model: keras.Model) -> None:
    coords = np.array([[[10.0, 20.0], [0, 0]], [[30, 40], [100, 90]]], np.float32)
    encoder = model.prompt_encoder
    actual = network.embed_prompts(encoder, tf.constant(coords), tf.constant([[[False]], [[True]]])).numpy()
    click = tf.function(encoder._embed_points, jit_compile=True)(tf.constant(coords[:1]), tf.constant([[1.0, -1.0]]))
    box = tf.function(encoder._embed_box, jit_compile=True)(tf.constant(coords[1:, None]))
    np.testing.assert_allclose(actual, np.concatenate([click, box]), atol=1e-5)


def test_a_perfect_mask_has_iou_1_and_nearly_no_loss() -> None:
    target = np.zeros((1, 1, 64), np.float32)
    target[..., :16] = 1
    perfect, empty, half = 20 * (2 * target - 1), np.full_like(target, -20), np.full_like(target, -20)
    half[..., :8] = 20
    logits = np.concatenate([perfect, empty, half], axis=1)
    loss, iou = (np.array(value)[0, 0] for value in pair_losses(tf.constant(logits), tf.constant(target)))
    np.testing.assert_allclose(iou, [1, 0, 0.5], atol=1e-4)
    assert loss[0] < 1e-3 and loss[0] < loss[2] < loss[1]


def test_each_target_of_a_click_goes_to_its_best_mask_and_a_boxs_to_mask_0() -> None:
    left, right = np.zeros((2, 1, 1, 64), np.float32)
    left[..., :32], right[..., 32:] = 1, 1
    targets = np.concatenate([left, right], axis=1)

    def best_iou(masks: tuple[np.ndarray, ...], is_box: bool, weights: list[float]) -> float:
        logits = tf.constant(np.concatenate([20 * (2 * mask - 1) for mask in masks], axis=1))
        arguments = (tf.zeros((1, 4)), tf.constant([is_box]), tf.constant(targets), tf.constant([weights]))
        return float(losses.prompt_loss(logits, *arguments, tf.ones((1, 2)))[2])

    masks = (left, right, right, left)  # 0 to 3
    assert best_iou(masks, False, [1.0, 1.0]) == pytest.approx(1, abs=1e-4)  # masks 3 and 1
    assert best_iou(masks, True, [1.0, 0.0]) == pytest.approx(1, abs=1e-4)
    assert best_iou(masks, True, [0.0, 1.0]) == pytest.approx(0, abs=1e-4)  # mask 0 is the left one
    only_mask_0_fits = (left, right, right, right)  # but it is for boxes
    assert best_iou(only_mask_0_fits, False, [1.0, 0.0]) == pytest.approx(0, abs=1e-4)


def test_predicted_iou_is_that_with_the_best_target_times_its_worth() -> None:
    target = np.zeros((1, 2, 64), np.float32)
    target[:, 0, :32], target[:, 1, :16] = 1, 1
    logits = tf.constant(np.repeat(20 * (2 * target[:, 1:] - 1), 4, axis=1))  # IoU 0.5 and 1
    arguments = (tf.constant([False]), tf.constant(target), tf.ones((1, 2)), tf.constant([[1.0, 0.4]]))
    assert float(losses.prompt_loss(logits, tf.fill((1, 4), 0.5), *arguments)[1]) == pytest.approx(0, abs=1e-4)


def test_a_click_asks_for_the_object_and_for_the_part_of_it_under_the_click() -> None:
    person, shirt = rectangle(20, 20, 120, 60), rectangle(60, 20, 120, 60)
    regions = np.stack([shirt, shirt | rectangle(200, 0, 256, 256), person]).astype(np.int32)
    chosen = scenes.find_targets(scenes.Answers.of(make_scene(person[None], regions)), 40, 20, scenes.FRAME**2)
    assert [(weight, quality) for _, weight, quality in chosen] == [
        (1.0, 1.0),
        (scenes.REGION_WEIGHT, scenes.REGION_QUALITY),
    ]  # the third region is the object itself, the second the same part of it as the first
    np.testing.assert_array_equal(chosen[0][0], 4 * person[::2, ::2])
    np.testing.assert_array_equal(chosen[1][0], 4 * shirt[::2, ::2])


def test_a_click_beside_all_objects_asks_for_a_region_unless_it_fills_the_frame() -> None:
    sky = rectangle(0, 0, 64, 256)
    scene = make_scene(rectangle(100, 100, 120, 120)[None], np.stack([sky] * 3).astype(np.int32))
    ((mask, *_),) = scenes.find_targets(scenes.Answers.of(scene), 3, 3, scenes.FRAME**2)
    np.testing.assert_array_equal(mask, 4 * sky[::2, ::2])
    assert scenes.find_targets(scenes.Answers.of(scene), 60, 3, scenes.FRAME**2) == []


def test_placing_keeps_pixels_and_masks_together() -> None:
    mask = np.zeros((96, 128), bool)
    mask[20:60, 30:90] = True
    pixels = np.repeat(255 * mask[..., None], 3, axis=2).astype(np.uint8)
    photo = Photo(pixels, mask[None], np.stack([mask] * 3).astype(np.int32))
    for flip, fill in itertools.product((False, True), (0.7, 1.0)):
        scene = scenes.place(photo, (10, 5, 120, 90), 1.1, flip, fill)
        assert max(scene.size) == round(fill * scenes.FRAME)
        seen = scene.pixels[..., 0] > 127
        assert (seen & scene.instances[0]).sum() > 0.97 * (seen | scene.instances[0]).sum()
        np.testing.assert_array_equal(scene.regions[0] == 1, scene.instances[0])
        assert not scene.instances[0, scene.size[0] :].any() and (scene.regions[:, :, scene.size[1] :] == -1).all()


def test_pasted_objects_hide_what_is_behind_them() -> None:
    scene = make_scene(rectangle(0, 0, 256, 256)[None])
    donor = make_scene(rectangle(10, 10, 60, 60)[None])
    pasted = scenes.paste(np.random.default_rng(0), scene, donor)
    assert len(pasted.instances) == 2 and pasted.instances[1].any()
    assert (pasted.instances.sum(axis=0) == 1).all()


def test_a_batch_depends_on_its_number_alone() -> None:
    photos = [make_synthetic(np.random.default_rng(seed)) for seed in range(3)]
    first = scenes.batches(0, 0, photos, 2, 5)
    second = [next(first) for _ in range(3)][2]
    resumed = next(scenes.batches(0, 2, photos, 2, 5))
    for name in vars(second):
        np.testing.assert_array_equal(getattr(second, name), getattr(resumed, name))
    assert second.targets.shape == (2, 5, scenes.MAX_TARGETS, H, H) and second.targets.max() == 4
    assert ((second.weights > 0) == second.targets.any(axis=(3, 4))).all()


def test_synthetic_objects_lie_apart_and_parts_within_them() -> None:
    scene = make_synthetic(np.random.default_rng(5))
    assert len(scene.instances) >= 1 and scene.instances.sum(axis=0).max() == 1
    assert len(np.unique(scene.regions[0])) > len(np.unique(scene.regions[1]))  # some object has parts
    for part in np.unique(scene.regions[0]):
        assert len(np.unique(scene.regions[1][scene.regions[0] == part])) == 1


def test_validation_photos_are_those_with_the_highest_ids() -> None:
    images = [TruthImage(number, f"{number}.jpg", (6, 8), ()) for number in (5, 1, 9, 7)]
    training, validation = split_images(images, 2)
    assert [image.image_id for image in training] == [1, 5] and [image.image_id for image in validation] == [7, 9]


def test_no_photo_left_to_train_on_is_an_error() -> None:
    images = [TruthImage(number, f"{number}.jpg", (6, 8), ()) for number in (5, 1)]
    with pytest.raises(ValueError, match="2 images; give more than the 2 that"):
        split_images(images, 2)


def test_a_photo_of_another_size_than_its_annotations_is_an_error(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((6, 8, 3), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png is 8x6, its annotations are for 16x12"):
        load_photos(tmp_path, [TruthImage(1, "a.png", (12, 16), ())], tmp_path / "regions")


def test_windows_that_do_not_fill_the_grid_are_an_error(model: keras.Model) -> None:
    block = next(layer for layer in model.image_encoder.layers if hasattr(layer, "attention"))
    with pytest.raises(ValueError, match="windows of 7 do not fill a grid of 32"):
        network.attend_image(block.attention, tf.zeros((1, 32, 32, 192)), 7, tf.float32)


@pytest.mark.parametrize(
    "segmentation",
    [[[2, 1, 6, 1, 6, 4, 2, 4]], {"size": [6, 8], "counts": [13, 3, 3, 3, 3, 3, 3, 3, 14]}],
    ids=["polygon", "uncompressed RLE"],
)
def test_photos_have_their_instances(segmentation: object, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((6, 8, 3), np.uint8)).save(tmp_path / "a.png")
    instance = {"id": 1, "segmentation": segmentation, "bbox": [2, 1, 4, 3], "area": 12, "iscrowd": 0}
    crowd = {**instance, "id": 2, "iscrowd": 1}
    (photo,) = load_photos(tmp_path, [TruthImage(1, "a.png", (6, 8), (instance, crowd))], tmp_path / "regions")
    mask = photo.instances[0, 24::48, 24::48]  # a pixel of the photo is 48 wide here
    expected = np.zeros((6, 8), bool)
    expected[1:4, 2:6] = True
    np.testing.assert_array_equal(mask, expected)
    assert len(photo.instances) == 1


def test_the_interior_point_is_farthest_from_the_edge() -> None:
    mask = np.zeros((20, 30), bool)
    mask[5:14, 0:9] = True
    assert evaluate.interior_point(mask) == (9, 4)


def test_calibration_keeps_the_share_and_ends_at_1() -> None:
    predicted = np.linspace(0.1, 0.5, 1001)
    scale, shift = finish.fit_predicted_iou(predicted)
    stretched = scale * predicted + shift
    assert (stretched > finish.PRED_IOU_THRESH).mean() == pytest.approx(finish.KEPT, abs=2e-3)
    assert np.quantile(stretched, 1 - finish.BEST) == pytest.approx(1)


def test_logits_are_multiplied_until_masks_are_stable() -> None:
    ramp = np.linspace(-2, 2, 400).reshape(20, 20)  # at factor k the two masks differ by the pixels within 1/k of 0
    factor = finish.fit_stability([np.stack([ramp] * 4)])
    assert (ramp > 1 / factor).sum() / (ramp > -1 / factor).sum() >= finish.STABILITY_SCORE_THRESH
    weaker = factor * 0.94
    assert (ramp > 1 / weaker).sum() / (ramp > -1 / weaker).sum() < finish.STABILITY_SCORE_THRESH


def test_the_preset_loads_as_float32_and_gives_the_calibrated_answers(model: keras.Model, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (scenes.FRAME, scenes.FRAME, 3), np.uint8)
    coords = np.array([[[[50, 60], [0, 0]]]], np.float32)
    prompts = (tf.constant(pixels[None]), tf.constant([[256, 256]]), tf.constant(coords), tf.constant([[False]]))
    before = network.predict(model, *prompts)
    finish.change_scores(model.mask_decoder, 2.0, 0.25, 3.0)
    write_preset(model, tmp_path / "preset")
    with h5py.File(tmp_path / "preset" / "model.weights.h5") as file:
        found: list[np.dtype] = []
        file.visititems(lambda _, item: found.append(item.dtype) if isinstance(item, h5py.Dataset) else None)
    assert set(found) == {np.dtype(np.float16)}
    for weight in model.variables:
        weight.assign(np.array(weight).astype(np.float16).astype(np.float32))
    logits, iou = network.predict(model, *prompts)
    np.testing.assert_allclose(iou, 2.0 * before[1] + 0.25, atol=1e-2)  # as far as float16 goes
    np.testing.assert_allclose(logits, 3.0 * before[0], atol=1e-2 * np.abs(logits).max())
    sam = load_sam(str(tmp_path / "preset"))
    scored = sam.score(sam.embed(pixels, (256, 256)), coords[0, :, 0].astype(np.float64), 1)
    np.testing.assert_allclose(scored.predicted_iou()[0], iou[0, 1:], atol=1e-4)
    np.testing.assert_allclose(sam.low_res_logits(scored, np.array([0]))[0], logits[0, 1:], atol=1e-3)


def test_gradients_written_out_are_those_of_keras(model: keras.Model) -> None:
    block = next(layer for layer in model.image_encoder.layers if hasattr(layer, "attention"))
    layer, hidden = block.layer_norm1, block.mlp_block.dense_net.layers[0]
    rng = np.random.default_rng(0)
    for weight in (layer.gamma, layer.beta, hidden.bias):
        weight.assign(rng.normal(size=weight.shape))

    def gradients(function: Callable[[tf.Tensor], tf.Tensor], width: int, weights: list) -> list[np.ndarray]:
        x = tf.constant(np.random.default_rng(1).normal(size=(2, 5, width)), tf.float32)
        upstream = tf.constant(np.random.default_rng(2).normal(size=(2, 5, width)), tf.float32)
        with tf.GradientTape() as tape:
            tape.watch(x)
            total = tf.reduce_sum(function(x) * upstream)
        return [gradient.numpy() for gradient in tape.gradient(total, [x, *(weight.value for weight in weights)])]

    norm = gradients(lambda x: network.norm(x, layer), layer.gamma.shape[0], [layer.gamma, layer.beta])
    expected = gradients(layer, layer.gamma.shape[0], [layer.gamma, layer.beta])
    for actual, wanted in zip(norm, expected, strict=True):
        np.testing.assert_allclose(actual, wanted, atol=1e-4)
    gelu = gradients(lambda x: network.gelu(x, hidden, tf.float32), hidden.units, [hidden.bias])
    expected = gradients(lambda x: tf.nn.gelu(x + hidden.bias), hidden.units, [hidden.bias])
    for actual, wanted in zip(gelu, expected, strict=True):
        np.testing.assert_allclose(actual, wanted, atol=5e-3)  # the slope of GELU is that of its approximation by tanh


def test_the_optimizer_takes_matrices_for_matrices_alone() -> None:
    model = build_model(0)
    optimizer = train.build_optimizer(model, 1000)
    score = model.mask_decoder.iou_prediction_head.trainable_variables
    tables = [weight for weight in model.trainable_variables if "rel_pos" in weight.path or "embed" in weight.path]
    for weight, velocity in zip(model.trainable_variables, optimizer.adam_velocities, strict=True):
        known_apart = any(weight is other for other in [*score, *tables])
        assert (velocity is None) == (len(weight.shape) == 2 and not known_apart), weight.path


def test_a_restored_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    def start() -> tuple[keras.Model, keras.Optimizer, list[keras.Variable]]:
        model = build_model(0)
        optimizer = train.build_optimizer(model, 1000)
        return model, optimizer, [*model.variables, *optimizer.variables]

    def step(number: int, model: keras.Model, optimizer: keras.Optimizer) -> None:
        rng = np.random.default_rng(number)
        gradients = [tf.constant(rng.normal(size=weight.shape), tf.float32) for weight in model.trainable_variables]
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

    model, optimizer, variables = start()
    step(1, model, optimizer)
    train.save(tmp_path / "checkpoint.npz", train.checkpoint_of(1, variables))
    step(2, model, optimizer)
    resumed, its_optimizer, its_variables = start()
    assert train.restore(tmp_path / "checkpoint.npz", its_variables) == 1
    step(2, resumed, its_optimizer)
    expected, actual = train.mean_weights(model, optimizer), train.mean_weights(resumed, its_optimizer)
    for mean, its_mean in zip(expected.values(), actual.values(), strict=True):
        np.testing.assert_array_equal(its_mean, mean)
    for weight, its_weight in zip(model.variables, resumed.variables, strict=True):
        np.testing.assert_array_equal(its_weight, weight)
