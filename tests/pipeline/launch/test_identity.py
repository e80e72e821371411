"""run.json: the same run goes on, another one is refused by the name of what differs."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from maskbeam.pipeline.exits import UsageError
from maskbeam.pipeline.launch.identity import claim_output, describe_run, model_fingerprint, refuse_input_in_output
from maskbeam.pipeline.options import parse_label
from maskbeam.transforms.labels.run_file import Run
from maskbeam.transforms.presets.embedded import resolve_preset
from maskbeam.transforms.records import Shard
from tests.conftest import label
from tests.memory_store import STORE


def describe(*flags: str, root: str = "/data") -> Run:
    return describe_run(parse_label(["--input", "/data", "--output", "/labels", *flags])[0], root)


def claim(output: Path, run: Run, overwrite: bool = False) -> None:
    claim_output(str(output), run, overwrite)


@pytest.fixture
def claimed(tmp_path: Path) -> Path:
    """An output in which a run with the default settings has committed a chunk."""
    output = tmp_path / "labels"
    claim(output, describe())
    fill(output, "annotations/a.tar-00000.parquet", "images/a.tar-00000.parquet")
    return output


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    """A copy of the embedded model."""
    return Path(shutil.copytree(resolve_preset("sam_tiny"), tmp_path / "preset"))


def test_run_json_holds_what_identifies_the_run(claimed: Path) -> None:
    run = json.loads((claimed / "run.json").read_text())
    assert (run["root"], run["chunk_size"], run["dtype"], run["exif"]) == ("/data", 32, "float32", "apply")
    assert run["amg"]["points_per_side"] == 32
    assert run["model_fingerprint"] == model_fingerprint("sam_tiny")
    assert {"python", "apache-beam", "keras", "keras-hub", "numpy"} <= set(run["versions"])


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--direct_num_workers", "2"],
        ["--retry_failed"],
        ["--max_failed_fraction", "1"],
        ["--points_per_side", "32"],
        ["--profile", "default"],
    ],
    ids=" ".join,
)
def test_the_same_run_goes_on(claimed: Path, flags: list[str]) -> None:
    before = (claimed / "run.json").read_bytes()
    claim(claimed, describe(*flags))
    assert (claimed / "run.json").read_bytes() == before


def test_other_versions_of_the_libraries_go_on(claimed: Path) -> None:
    claim(claimed, replace(describe(), versions={"keras": "99"}))


def test_the_same_model_at_another_place_goes_on(claimed: Path, preset: Path) -> None:
    claim(claimed, describe("--model", str(preset)))


def test_point_grids_go_on_though_json_has_no_tuples(tmp_path: Path) -> None:
    grids = tmp_path / "grids.json"
    grids.write_text("[[[0.5, 0.5]]]")
    for _ in range(2):
        claim(tmp_path / "labels", describe("--point_grids", str(grids)))


@pytest.mark.parametrize(
    ("flags", "change"),
    [
        (["--chunk_size", "8"], "chunk_size was 32, now 8"),
        (["--limit", "8"], "limit was None, now 8"),
        (["--input_format", "tar"], "input_format was None, now tar"),
        (["--parquet_image", "picture"], "parquet_image was"),
        (["--exif", "ignore"], "exif was apply, now ignore"),
        (["--max_pixels", "9"], "max_pixels was 250000000, now 9"),
        (["--dtype", "bfloat16"], "dtype was float32, now bfloat16"),
        (["--points_per_side", "8"], "points_per_side was 32, now 8"),
        (["--points_per_batch", "8"], "points_per_batch was 64, now 8"),
        (["--pred_iou_thresh", "0.5"], "pred_iou_thresh was 0.88, now 0.5"),
        (["--nms_by", "mask"], "nms_by was box, now mask"),
        (["--profile", "sa1b"], "crop_n_layers was 0, now 2"),
        (["--keep_candidates"], "keep_candidates was False, now True"),
        (
            ["--keep_candidates", "--candidate_pred_iou_thresh", "0.5"],
            "candidate_pred_iou_thresh was None, now 0.5",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_another_setting_is_refused_by_name(claimed: Path, flags: list[str], change: str) -> None:
    with pytest.raises(UsageError) as raised:
        claim(claimed, describe(*flags))
    assert change in str(raised.value) and "--overwrite" in str(raised.value)


def test_all_changes_are_named(claimed: Path) -> None:
    with pytest.raises(UsageError, match="chunk_size was 32, now 8; exif was apply, now ignore"):
        claim(claimed, describe("--exif", "ignore", "--chunk_size", "8"))


def test_another_root_goes_on(claimed: Path) -> None:
    claim(claimed, describe(root="/elsewhere"))


def test_labels_of_a_newer_version_are_refused(claimed: Path) -> None:
    (claimed / "run.json").write_text(json.dumps({**describe().to_json(), "format": 4}))
    with pytest.raises(UsageError, match=r"was written by a newer maskbeam \(format 4, this one knows 3\)"):
        claim(claimed, describe())


def test_another_backend_is_refused(claimed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    with pytest.raises(UsageError, match=r"backend was .*, now torch"):
        claim(claimed, describe())


def test_another_model_is_refused(claimed: Path, preset: Path) -> None:
    with (preset / "model.weights.h5").open("ab") as file:
        file.write(b"trained on")
    with pytest.raises(UsageError, match="model_fingerprint was "):
        claim(claimed, describe("--model", str(preset)))


# --overwrite, and what is not ours.


def fill(output: Path, *names: str) -> None:
    for name in names:
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).touch()


def files(output: Path) -> set[str]:
    return {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}


NEW_START = f"{0:032x}.start.json"
TEMPORARY = f"{0:032x}-images-a.tar-00000.parquet"

# Other people's files where labels lie, with names like ours.
NEIGHBORS = [
    *("images/mine.jpg", "annotations/merged.parquet", "annotations/old/@root-00000.parquet", "images/notes-1.parquet"),
    *("candidates/mine-00000.parquet", "masks.png", "notes/n.txt", "old/annotations/@root-00000.parquet"),
    *("_tmp/x", "_tmp/deep/" + TEMPORARY, "_tmp/0-images-a.tar-00000.parquet", "_tmp/start.json"),
]
OURS = ["_tmp/" + TEMPORARY, "_tmp/" + NEW_START]


def foreign_parquet() -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"a": [1]}, metadata={"mine": "yes"}), buffer)
    return buffer.getvalue()


def neighbor_content(name: str) -> bytes:
    return foreign_parquet() if name.endswith(".parquet") else b"mine"


def test_overwrite_deletes_our_files_and_nothing_else(photos: Path, output: Path) -> None:
    """The whole tree, before and after."""
    assert label("--input", photos, "--output", output, "--keep_candidates", "--chunk_size", "2") == 0
    for name in (*NEIGHBORS, *OURS):
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_bytes(neighbor_content(name))
    (output / "annotations/@root-00001.parquet").write_bytes(b"")  # damaged, but its chunk is ours
    (output / "images/linked-00000.parquet").symlink_to(photos / "0.png")
    claim(output, describe("--chunk_size", "8"), overwrite=True)
    left = {name: (output / name).read_bytes() for name in files(output)}
    run = left.pop("run.json")
    assert json.loads(run)["chunk_size"] == 8
    assert left == {
        "images/linked-00000.parquet": (photos / "0.png").read_bytes(),
        **{name: neighbor_content(name) for name in NEIGHBORS},
    }


def test_overwrite_deletes_our_objects_and_nothing_else(photos: Path) -> None:
    STORE.reset()
    output = "mem://bucket/labels"
    assert label("--input", photos, "--output", output, "--chunk_size", "2") == 0
    neighbors = [*NEIGHBORS, "../labels2/images/@root-00000.parquet", "../labels2/_tmp/" + TEMPORARY]
    for name in (*neighbors, *OURS):
        STORE.put(f"{output}/{name}".replace("labels/../", ""), neighbor_content(name))
    STORE.put(f"{output}/images/@root-00001.parquet", b"damaged")
    claim_output(output, describe("--chunk_size", "8"), overwrite=True)
    left = dict(STORE.objects)
    assert json.loads(left.pop(f"{output}/run.json"))["chunk_size"] == 8
    assert left == {f"{output}/{name}".replace("labels/../", ""): neighbor_content(name) for name in neighbors}
    STORE.reset()


def test_a_run_that_ends_well_deletes_its_temporary_files_and_nothing_else(photos: Path, output: Path) -> None:
    assert label("--input", photos, "--output", output, "--limit", "2") == 0
    fill(output, "_tmp/mine", "_tmp/" + TEMPORARY)
    assert label("--input", photos, "--output", output, "--limit", "2") == 0
    assert [path.name for path in (output / "_tmp").iterdir()] == ["mine"]
    (output / "_tmp/mine").unlink()
    assert label("--input", photos, "--output", output, "--limit", "2") == 0
    assert not (output / "_tmp").exists()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("folder", ["images", "annotations", "candidates", "_tmp"])
def test_a_folder_that_we_did_not_make_is_never_touched(tmp_path: Path, folder: str, overwrite: bool) -> None:
    fill(tmp_path, f"{folder}/holiday.jpg")
    with pytest.raises(UsageError, match=f"already has a folder {folder}/ that no run of maskbeam made"):
        claim(tmp_path, describe(), overwrite)
    assert files(tmp_path) == {f"{folder}/holiday.jpg"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_directory_with_other_things_in_it_will_do(tmp_path: Path, overwrite: bool) -> None:
    fill(tmp_path, "notes.txt", "photos/images/a.jpg")
    claim(tmp_path, describe(), overwrite)
    assert files(tmp_path) == {"run.json", "notes.txt", "photos/images/a.jpg"}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("content", "message"),
    [('{"tool": "wandb"}', "was not written by maskbeam"), ("[]", "was not written by maskbeam"), ("", "is damaged")],
)
def test_somebody_elses_run_json_is_refused(tmp_path: Path, content: str, message: str, overwrite: bool) -> None:
    fill(tmp_path, "images/mine.jpg")
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(UsageError, match=message):
        claim(tmp_path, describe(), overwrite)
    assert files(tmp_path) == {"run.json", "images/mine.jpg"}


def test_a_run_that_committed_nothing_may_start_with_other_settings(tmp_path: Path) -> None:
    claim(tmp_path, describe())
    claim(tmp_path, describe("--chunk_size", "8"))
    assert json.loads((tmp_path / "run.json").read_text())["chunk_size"] == 8


@pytest.mark.parametrize("folder", ["images", "annotations", "candidates", "_tmp"])
def test_input_where_labels_go_is_refused(tmp_path: Path, folder: str) -> None:
    shard = Shard("a.tar", str(tmp_path / folder / "a.tar"), "tar", ())
    with pytest.raises(UsageError, match="lies in a folder of --output"):
        refuse_input_in_output([shard], str(tmp_path))
    refuse_input_in_output([shard], str(tmp_path / "labels"))


# The model's fingerprint.


def test_the_fingerprint_does_not_depend_on_the_place(preset: Path) -> None:
    assert model_fingerprint(str(preset)) == model_fingerprint("sam_tiny")


@pytest.mark.parametrize("name", ["config.json", "model.weights.h5"])
def test_the_fingerprint_depends_on_architecture_and_weights(preset: Path, name: str) -> None:
    before = model_fingerprint(str(preset))
    (preset / name).write_bytes((preset / name).read_bytes() + b" ")
    assert model_fingerprint(str(preset)) != before


def test_the_fingerprint_of_a_large_model_covers_all_its_shards(preset: Path) -> None:
    weights = (preset / "model.weights.h5").read_bytes()
    (preset / "model.weights.h5").unlink()
    (preset / "model.weights.json").write_text(json.dumps({"weight_map": {"a": "0.h5", "b": "1.h5", "c": "1.h5"}}))
    (preset / "0.h5").write_bytes(weights)
    (preset / "1.h5").write_bytes(weights[:1000])
    before = model_fingerprint(str(preset))
    (preset / "1.h5").write_bytes(weights[:1000] + b" ")
    assert model_fingerprint(str(preset)) != before


def test_a_model_that_is_not_there_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no model .*none. Expected an embedded model"):
        model_fingerprint(str(tmp_path / "none"))
