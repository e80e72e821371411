"""The prompt store: looking up is what a dict would do, whatever the names, the batches and the hashes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskbeam.transforms.prompt_files import store as store_module
from maskbeam.transforms.prompt_files.categories import Categories
from maskbeam.transforms.prompt_files.config import PromptFilesError
from maskbeam.transforms.prompt_files.rows import SCHEMA, make_batch
from maskbeam.transforms.prompt_files.store import PromptStore, StoreBuilder, StoreMeta, hash_name


def build(directory: Path, *batches: list[dict[str, Any]], names: list[str] | None = None, **named: str) -> StoreMeta:
    with StoreBuilder(directory, Categories(names)) as builder:
        for rows in batches:
            builder.add(make_batch(rows))
        return builder.finish({int(category_id[1:]): name for category_id, name in named.items()})


def box(image: str, x: float = 10.0, **columns: Any) -> dict[str, Any]:
    return {"image": image, "bbox": [x, 20.0, 30.0, 40.0], **columns}


rows = st.fixed_dictionaries(
    {
        "image": st.sampled_from(["a", "b", "c.jpg", "é", ""]),
        "bbox": st.lists(st.floats(2, 1e4) | st.floats(2, 1e4, width=32), min_size=4, max_size=4) | st.none(),
        "points": st.lists(st.floats(0, 9), min_size=2, max_size=2) | st.none(),
        "segmentation": st.sampled_from([None, "[[1, 2, 3]]"]),
        "category_id": st.none() | st.integers(1, 3),
        "score": st.floats(0, 1, width=32) | st.none(),
        "id": st.none() | st.text(st.characters(codec="utf-8"), max_size=3),
        "problem": st.sampled_from([None, "it is bad"]),
    }
)


@given(st.lists(st.lists(rows, max_size=5), min_size=1, max_size=3), st.booleans())
def test_looking_up_is_what_a_dict_would_do(batches: list[list[dict[str, Any]]], collide: bool) -> None:
    expected: dict[str, list[dict[str, Any]]] = {}
    for batch in batches:
        for row in make_batch(batch).to_pylist():
            expected.setdefault(row.pop("image"), []).append(row)
    if not expected:
        return
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        if collide:
            patch.setattr(store_module, "hash_name", lambda name: len(name) % 2 << 63)
        meta = build(Path(directory), *batches)
        store = PromptStore(directory)
        assert (meta, meta.rows, meta.images) == (store.meta, sum(map(len, expected.values())), len(expected))
        for name in ["a", "b", "c.jpg", "é", "", "nobody"]:
            found = store.find(name)
            assert (found is None) == (name not in expected)
            if found is not None:
                without = {field.name: None for field in SCHEMA if field.name not in ("image", *found.column_names)}
                assert [{**without, **row} for row in found.to_pylist()] == [
                    {key: row[key] for key in {**without, **row} if key != "image"} for row in expected[name]
                ]


def test_a_hash_is_the_same_everywhere() -> None:
    assert hash_name("a.jpg") == 0x89A7126E02F047FE


def test_what_no_row_has_takes_no_room(tmp_path: Path) -> None:
    build(tmp_path, [box("a"), box("b", score=0.5)])
    found = PromptStore(str(tmp_path)).find("a")
    assert found is not None
    assert found.column_names == ["bbox", "score"]
    assert str(found.schema.field("bbox").type).startswith("fixed_size_list<item: float>[4]")


def test_a_box_that_float32_does_not_hold_stays_as_it_is(tmp_path: Path) -> None:
    build(tmp_path, [box("a", 473.07)])
    found = PromptStore(str(tmp_path)).find("a")
    assert found is not None
    assert found["bbox"].to_pylist() == [[473.07, 20.0, 30.0, 40.0]]


def test_names_of_classes_get_ids_from_1_in_the_order_of_the_alphabet(tmp_path: Path) -> None:
    meta = build(tmp_path, [box("a", category="dog"), box("b", category="cat")], [box("a", category="ant")])
    assert meta.categories == {1: "ant", 2: "cat", 3: "dog"}
    found = PromptStore(str(tmp_path)).find("a")
    assert found is not None
    assert found["category_id"].to_pylist() == [3, 1]


def test_names_in_a_file_have_their_position_for_an_id(tmp_path: Path) -> None:
    meta = build(tmp_path, [box("a", category="dog"), box("a", category="cow")], names=["cat", "dog"])
    assert meta.categories == {0: "cat", 1: "dog"}
    found = PromptStore(str(tmp_path)).find("a")
    assert found is not None
    assert found["problem"].to_pylist() == [None, "its class is not among --categories"]


def test_ids_are_kept_with_the_names_that_the_file_has(tmp_path: Path) -> None:
    meta = build(tmp_path, [box("a", category_id=17), box("a", category_id=3, category="car")], _17="cat", _90="brush")
    assert meta.categories == {3: "car", 17: "cat", 90: "brush"}


def test_ids_without_names_are_called_by_their_number(tmp_path: Path) -> None:
    assert build(tmp_path, [box("a", category_id=17)]).categories == {17: "17"}


def test_an_id_with_two_names_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PromptFilesError, match="the class 1 has two names, 'cat' and 'dog'"):
        build(tmp_path, [box("a", category_id=1, category="cat"), box("a", category_id=1, category="dog")])


def test_names_where_others_have_ids_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PromptFilesError, match="the class 'dog' has no id, while others have a category_id"):
        build(tmp_path, [box("a", category_id=1), box("a", category="dog")])


def test_rows_without_an_image_are_counted_and_named(tmp_path: Path) -> None:
    meta = build(tmp_path, [box("a"), {"problem": "row 2: image is missing"}])
    assert (meta.rows, meta.lost, meta.lost_shown) == (1, 1, ("row 2: image is missing",))


def test_no_prompt_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PromptFilesError, match=r"there is no prompt in --prompts .* row 2: image is missing"):
        build(tmp_path, [{"problem": "row 2: image is missing"}])


def test_boxes_that_look_relative_are_refused_with_the_flag_that_helps(tmp_path: Path) -> None:
    relative = {"image": "a", "bbox": [0.0, 0.25, 0.5, 1.0]}
    with pytest.raises(PromptFilesError, match=r"look relative.*--prompts_bbox rel_xyxy"):
        build(tmp_path / "..", [relative] * 200)
    (tmp_path / "1").mkdir()
    build(tmp_path / "1", [{**relative, "relative": True}])
    (tmp_path / "2").mkdir()
    build(tmp_path / "2", [relative] * 99 + [box("a")])


def test_what_was_not_used_and_what_was_used_twice(tmp_path: Path) -> None:
    build(tmp_path, [box("a"), box("b"), box("b"), box("c")])
    use = PromptStore(str(tmp_path)).compare(["a", "c", "c", "nobody"])
    assert (use.unused, use.unused_shown, use.shared_shown) == (2, ("b",), ("c",))


def test_nothing_is_left_of_the_partitions(tmp_path: Path) -> None:
    build(tmp_path, [box("a")])
    assert {path.name for path in tmp_path.iterdir()} == set(store_module.STORE_FILES)
