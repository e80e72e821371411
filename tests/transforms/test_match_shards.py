"""Matching patterns: on the local file system, and on an object store that lives in memory."""

import io
import os
import re
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskbeam.transforms import chunks
from maskbeam.transforms import match_shards as match
from maskbeam.transforms.files import paths as listing
from maskbeam.transforms.labels.layout import shard_name
from maskbeam.transforms.match_shards import InputConfig, Matched, check_output, match_shards
from maskbeam.transforms.readers.samples import ReadConfig
from maskbeam.transforms.records import SourceFile
from tests.memory_store import STORE


@pytest.fixture
def bucket() -> dict[str, bytes]:
    """The objects of mem://, by URL."""
    STORE.reset()
    return STORE.objects


def make_files(root: Path, *names: str) -> str:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return str(root)


def write_tar(path: Path, images: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in range(images):
            info = tarfile.TarInfo(f"{number}.jpg")
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))


def match_all(*patterns: object, **config: object) -> Matched:
    return match_shards(InputConfig(tuple(map(str, patterns)), **config))  # type: ignore[arg-type]


def paths(matched: Matched) -> list[str]:
    """All files of all shards, relative to root."""
    return [listing.relative_path(file.path, matched.root) for shard in matched.shards for file in shard.files]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a.jpg", ["a.jpg"]),
        ("d", ["d/b.jpg", "d/e/c.tar"]),
        ("d/", ["d/b.jpg", "d/e/c.tar"]),
        ("*", ["a.jpg"]),
        ("d/*", ["d/b.jpg"]),
        ("d/**", ["d/b.jpg", "d/e/c.tar"]),
        ("**/*.tar", ["d/e/c.tar"]),
        ("d/**/*.jpg", ["d/b.jpg"]),  # `**/` may stand for no directory
        ("d/**/e/*", ["d/e/c.tar"]),
        ("?.jpg", ["a.jpg"]),
        ("[ab].jpg", ["a.jpg"]),
        ("*/*/c.*", ["d/e/c.tar"]),
    ],
)
@pytest.mark.parametrize("system", ["local", "memory"])
def test_pattern_matches(
    pattern: str, expected: list[str], system: str, tmp_path: Path, bucket: dict[str, bytes]
) -> None:
    names = ["a.jpg", "d/b.jpg", "d/e/c.tar"]
    if system == "local":
        root = make_files(tmp_path, *names)
    else:
        root = "mem://bucket"
        bucket.update({f"{root}/{name}": b"x" for name in names})
    matched = match_all(f"{root}/{pattern}")
    actual = [file.path for shard in matched.shards for file in shard.files]
    assert actual == [f"{root}/{name}" for name in expected]


@pytest.mark.parametrize("name", ["[raw].jpg", "what?.jpg", "a*b.jpg", "[z-a].jpg", "new\nline \udcff.jpg"])
def test_existing_file_is_taken_literally(name: str, tmp_path: Path) -> None:
    make_files(tmp_path, name, "r.jpg", "whatx.jpg", "aab.jpg")
    assert paths(match_all(tmp_path / name)) == [name]


@pytest.mark.parametrize("name", ["[raw]", "what?", "a*b", "[z-a]"])
@pytest.mark.parametrize("system", ["local", "memory"])
def test_existing_directory_is_taken_literally(
    name: str, system: str, tmp_path: Path, bucket: dict[str, bytes]
) -> None:
    make_files(tmp_path, f"{name}/x.jpg", "r/y.jpg", "whatx/y.jpg", "aab/y.jpg")
    bucket.update({f"mem://b/{name}/x.jpg": b"x", "mem://b/r/y.jpg": b"x"})
    assert paths(match_all(f"{tmp_path if system == 'local' else 'mem://b'}/{name}")) == ["x.jpg"]


def test_object_with_glob_characters_is_taken_literally(bucket: dict[str, bytes]) -> None:
    bucket.update({"mem://b/[a].tar": b"x", "mem://b/a.tar": b"x"})
    assert paths(match_all("mem://b/[a].tar")) == ["[a].tar"]


def test_directory_marker_of_an_object_store_is_no_file(bucket: dict[str, bytes]) -> None:
    bucket.update({"mem://b/d/": b"", "mem://b/d/x.jpg": b"x"})
    matched = match_all("mem://b/d")
    assert (paths(matched), matched.ignored) == (["x.jpg"], ())


def test_neighbour_with_the_same_prefix_is_not_matched(bucket: dict[str, bytes]) -> None:
    bucket.update({"mem://b/train/x.jpg": b"x", "mem://b/train2/y.jpg": b"x"})
    assert paths(match_all("mem://b/train")) == ["x.jpg"]


def test_overlapping_patterns_count_a_file_once(tmp_path: Path) -> None:
    make_files(tmp_path, "a.jpg", "b.jpg")
    assert paths(match_all(tmp_path, tmp_path / "*.jpg", tmp_path / "a.jpg", f"{tmp_path}//.")) == ["a.jpg", "b.jpg"]


def test_relative_pattern_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_files(tmp_path, "d/a.jpg")
    monkeypatch.chdir(tmp_path)
    assert match_all("d").root == str(tmp_path / "d")


def test_order_does_not_depend_on_the_patterns(tmp_path: Path) -> None:
    make_files(tmp_path, "z.jpg", "a.tar", "m/b.jpg", "m/a.parquet")
    both = match_all(tmp_path / "**.jpg", tmp_path / "m", tmp_path / "a.tar")
    assert both == match_all(tmp_path / "a.tar", tmp_path / "m", tmp_path / "**.jpg")
    assert [shard.path for shard in both.shards] == sorted(shard.path for shard in both.shards)


def test_linked_directory_is_followed_once(tmp_path: Path) -> None:
    make_files(tmp_path, "real/a.jpg")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "loop").symlink_to(tmp_path / "in")
    assert paths(match_all(tmp_path / "in")) == ["link/a.jpg"]


def test_dangling_link_stays_in_the_account(tmp_path: Path) -> None:
    make_files(tmp_path, "a.jpg")
    (tmp_path / "b.jpg").symlink_to("gone.jpg")
    assert paths(match_all(tmp_path)) == ["a.jpg", "b.jpg"]


@pytest.mark.parametrize(("pattern", "fails"), [("", True), ("/**.jpg", True), ("/*/*.jpg", True), ("/*.jpg", False)])
def test_unlistable_directory_is_an_error_where_it_could_hold_matches(
    pattern: str, fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_files(tmp_path, "a.jpg", "secret/b.jpg")
    scandir = os.scandir

    def forbid(path: str):  # type: ignore[no-untyped-def]  # tests may run as root, whom no permission stops
        if path.endswith("secret"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(match.os, "scandir", forbid)
    if not fails:
        assert paths(match_all(f"{tmp_path}{pattern}")) == ["a.jpg"]
        return
    with pytest.raises(ValueError, match=r"secret.*cannot be listed: Permission denied"):
        match_all(f"{tmp_path}{pattern}")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("gone.jpg", "gone.jpg' matches no file"),
        ("gone/*.jpg", "matches no file"),
        ("*.webp", "matches no file"),
        ("empty", "empty' matches no file"),
        ("odd", r"matches 4 files, but none .* known format: 'a', 'b.bin', 'c.txt', \.\.\.\. .*--input_format"),
        ("[z-a].jpg", "no valid glob"),
    ],
)
def test_pattern_without_a_use_is_an_error(pattern: str, message: str, tmp_path: Path) -> None:
    make_files(tmp_path, "ok.jpg", "odd/a", "odd/b.bin", "odd/c.txt", "odd/d.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        match_all(tmp_path / "ok.jpg", tmp_path / pattern)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("train.tfrecord", "tfrecord"),
        ("train.tfrecords", "tfrecord"),
        ("train.tfrecord-00000-of-00010", "tfrecord"),
        ("x.TFRecord.gz", "tfrecord"),
        ("x.tar", "tar"),
        ("x.tar.gz", "tar"),
        ("x.tgz", "tar"),
        ("x.tar.bz2", "tar"),
        ("x.tar.xz", "tar"),
        ("x.tar.zst", "tar"),
        ("train-00000-of-00010.parquet", "parquet"),
        ("x.JPG", "image"),
        ("tar", None),
        ("x.tfrecord/readme", None),
        ("x.gz", None),
        ("_SUCCESS", None),
    ],
)
def test_format_of_a_name(name: str, expected: str | None) -> None:
    assert match.format_of(f"d/{name}") == expected


def test_input_format_holds_for_every_file(tmp_path: Path) -> None:
    make_files(tmp_path, "a.jpg", "b.tar", "part-00000")
    matched = match_all(tmp_path, input_format="parquet")
    assert [shard.format for shard in matched.shards] == ["parquet"] * 3


def test_files_of_unknown_format_are_named(tmp_path: Path) -> None:
    make_files(tmp_path, "a.jpg", "labels/a.json", "README")
    assert match_all(tmp_path).ignored == ("README", "labels/a.json")


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["a.jpg"], "."),
        (["d"], "d"),
        (["d/*.jpg"], "d"),
        (["d/e*/c.*"], "d"),
        (["d/**"], "d"),
        (["*"], "."),
        (["d/b.jpg", "d/e"], "d"),
        (["d/e", "a.jpg"], "."),
        (["d/e", "d/ef"], "d"),
    ],
)
@pytest.mark.parametrize("system", ["local", "memory"])
def test_root(patterns: list[str], expected: str, system: str, tmp_path: Path, bucket: dict[str, bytes]) -> None:
    names = ["a.jpg", "d/b.jpg", "d/e/c.jpg", "d/ef/c.jpg"]
    make_files(tmp_path, *names)
    bucket.update({f"mem://b/{name}": b"x" for name in names})
    root = str(tmp_path) if system == "local" else "mem://b"
    matched = match_all(*(f"{root}/{pattern}" for pattern in patterns))
    assert matched.root == os.path.join(root, expected).removesuffix("/.")


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [(["mem://a/x.jpg", "mem://b/x.jpg"], "mem://"), (["mem://a"], "mem://a"), (["mem://a/"], "mem://a"), (["/"], "/")],
)
def test_root_at_the_top(patterns: list[str], expected: str, bucket: dict[str, bytes], monkeypatch) -> None:  # type: ignore[no-untyped-def]
    bucket.update({"mem://a/x.jpg": b"x", "mem://b/x.jpg": b"x"})
    monkeypatch.setattr(listing, "_walk", lambda directory, parts: iter([SourceFile("/x.jpg", 1)]))
    assert match_all(*patterns).root == expected


def test_inputs_on_two_file_systems_have_no_root(tmp_path: Path, bucket: dict[str, bytes]) -> None:
    bucket["mem://b/x.jpg"] = b"x"
    with pytest.raises(ValueError, match="2 file systems"):
        match_all(make_files(tmp_path, "a.jpg"), "mem://b")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("", "@root"),
        ("@root", "%40root"),
        ("a.tar", "a.tar"),
        ("d/a b.tar", "d%2Fa%20b.tar"),
        ("d%2Fa.tar", "d%252Fa.tar"),
        (".hidden", "%2Ehidden"),
        ("_tmp/x", "%5Ftmp%2Fx"),
        ("a~b", "a%7Eb"),
        ("é", "%C3%A9"),
        ("\udcff", "%FF"),  # a byte that is no UTF-8, as the local file system gives it
        ("x" * 150, "x" * 150),
    ],
)
def test_shard_name(path: str, expected: str) -> None:
    assert shard_name(path) == expected


@pytest.mark.parametrize(("path", "kept"), [("x" * 151, 120), ("x" * 119 + "/" * 20, 119), ("x" * 118 + "/" * 20, 118)])
def test_long_shard_name_is_cut_outside_of_escapes(path: str, kept: int) -> None:
    assert re.fullmatch(f"x{{{kept}}}~[0-9a-f]{{16}}", shard_name(path))


# Paths as Python gives them: any bytes, those that are no UTF-8 as surrogates.
any_path = st.binary(max_size=100).map(os.fsdecode)
awkward_path = st.from_regex(r"[._~@%/\-a]{1,200}", fullmatch=True)


@settings(max_examples=300)
@given(st.sets(any_path | awkward_path, min_size=2, max_size=8))
def test_shard_names_are_unique_and_safe(paths: set[str]) -> None:
    encoded = {shard_name(path) for path in paths}
    assert len(encoded) == len(paths)
    for name in encoded - {"@root"}:
        assert re.fullmatch(r"[A-Za-z0-9%-][A-Za-z0-9%._~-]{0,149}", name)


def test_loose_files_become_a_shard_a_chunk(tmp_path: Path) -> None:
    make_files(tmp_path, *(f"d/{number}.jpg" for number in range(5)), "d/e/x.jpg", "top.jpg")
    matched = match_all(tmp_path, chunk_size=2)
    actual = [(s.name, s.first_chunk, [os.path.basename(f.path) for f in s.files]) for s in matched.shards]
    assert actual == [
        ("@root", 0, ["top.jpg"]),
        ("d", 0, ["0.jpg", "1.jpg"]),
        ("d", 1, ["2.jpg", "3.jpg"]),
        ("d", 2, ["4.jpg"]),
        ("d%2Fe", 0, ["x.jpg"]),
    ]


def test_loose_shard_closes_at_so_many_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 10)
    for name, size in (("a", 6), ("b", 4), ("c", 1), ("d", 11), ("e", 1)):
        (tmp_path / f"{name}.jpg").write_bytes(b"x" * size)
    assert [[f.num_bytes for f in shard.files] for shard in match_all(tmp_path).shards] == [[6, 4], [1], [11], [1]]


def test_file_and_directory_of_one_name_are_refused(bucket: dict[str, bytes]) -> None:
    bucket.update({"mem://b/x.tar": b"x", "mem://b/x.tar/a.jpg": b"x"})
    with pytest.raises(ValueError, match=r"share the output name 'x.tar'"):
        match_all("mem://b")


@pytest.mark.parametrize(
    ("limit", "expected"),
    [  # per shard: files or max_images; "a.tar" has 3 images, "b" 4 loose ones in chunks of 3, "c.tar" 2
        (2, [("a.tar", 2)]),
        (3, [("a.tar", 3)]),
        (4, [("a.tar", None), ("b", 1)]),
        (7, [("a.tar", None), ("b", 3), ("b", 1)]),
        (8, [("a.tar", None), ("b", 3), ("b", 1), ("c.tar", 1)]),
        (99, [("a.tar", None), ("b", 3), ("b", 1), ("c.tar", None)]),
    ],
)
def test_limit_takes_the_first_images(limit: int, expected: list[tuple[str, int | None]], tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", 3)
    make_files(tmp_path, *(f"b/{number}.jpg" for number in range(4)))
    write_tar(tmp_path / "c.tar", 2)
    shards = match_all(tmp_path, chunk_size=3, limit=limit).shards
    assert [(s.name, len(s.files) if s.format == "image" else s.max_images) for s in shards] == expected


def test_limit_counts_with_the_names_the_images_are_read_with(tmp_path: Path) -> None:
    for name in ("a.parquet", "b.parquet"):
        pq.write_table(pa.table({"pixels": [b"x", b"y"]}), tmp_path / name)
    config = InputConfig((str(tmp_path),), limit=3)
    actual = [shard.max_images for shard in match_shards(config, ReadConfig(parquet_image=("pixels",))).shards]
    assert actual == [None, 1]


@pytest.mark.parametrize(
    ("pattern", "output", "refused"),
    [
        ("in", "in", True),
        ("in", "in/out", True),
        ("in", "out", False),
        ("in", "input", False),
        ("in", ".", False),
        ("in/*", "in/out", False),
        ("in/*/*/*.parquet", "in/out", True),
        ("in/**", "in/out", True),
        ("in/**.parquet", "in/out", True),
        ("in/**.jpg", "in/out", False),
        ("in/a.jpg", "in", False),
        ("[in]", "[in]/out", True),
        ("[in]", "i/out", False),
        ("link", "in/out", True),
        ("in", "link/out", True),
    ],
)
def test_output_inside_the_input_is_refused(pattern: str, output: str, refused: bool, tmp_path: Path) -> None:
    make_files(tmp_path, "in/a.jpg", "[in]/a.jpg")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    config = InputConfig((str(tmp_path / pattern),))
    if not refused:
        check_output(config, str(tmp_path / output))
        return
    with pytest.raises(ValueError, match="lies inside the input"):
        check_output(config, str(tmp_path / output))


@pytest.mark.parametrize(("output", "refused"), [("mem://b/in/out", True), ("mem://b/out", False), ("out", False)])
def test_output_on_an_object_store(output: str, refused: bool) -> None:
    config = InputConfig(("mem://b/in/",))
    if not refused:
        check_output(config, output)
        return
    with pytest.raises(ValueError, match="Choose an output beside"):
        check_output(config, output)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"input": ()}, "input is"),
        ({"input": "photos"}, "input is"),
        ({"input": ("a", "")}, "input is"),
        ({"input": ("a",), "input_format": "zip"}, "expected one of tfrecord, tar, parquet, image"),
        ({"input": ("a",), "chunk_size": 0}, "chunk_size is 0"),
        ({"input": ("a",), "limit": 0}, "limit is 0"),
    ],
)
def test_bad_config_is_refused(config: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InputConfig(**config)  # type: ignore[arg-type]
