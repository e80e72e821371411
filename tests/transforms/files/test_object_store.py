"""Input, output and presets on object stores: s3:// and gs:// on local servers, and mem://, which counts requests."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from apache_beam.io.filesystems import FileSystems
from moto.server import ThreadedMotoServer

from maskbeam.pipeline.exits import UsageError
from maskbeam.pipeline.launch.identity import model_fingerprint
from maskbeam.pipeline.options import parse_label
from maskbeam.transforms.files import local_copy as cache
from maskbeam.transforms.files.paths import absolute, list_files
from maskbeam.transforms.files.s3 import _s3_client
from maskbeam.transforms.files.storage import list_tree, read_json
from maskbeam.transforms.labels.clear import delete_temporary
from maskbeam.transforms.labels.commit import commit_chunk
from maskbeam.transforms.labels.layout import chunk_name, committed_chunks
from maskbeam.transforms.labels.resume import read_report
from maskbeam.transforms.load_model import ModelConfig, load_model
from maskbeam.transforms.match_shards import InputConfig, match_shards
from maskbeam.transforms.presets.embedded import resolve_preset
from maskbeam.transforms.presets.remote import local_preset
from maskbeam.transforms.readers.samples import ReadConfig
from maskbeam.transforms.readers.shard import read_images
from tests.conftest import Labels, label, photo_bytes, read_labels, write_photos
from tests.fakes import FakeSam
from tests.memory_store import STORE
from tests.transforms.readers.test_shard import images_parquet, images_tar, tfrecord_bytes
from tests.transforms.test_write_parquet import RUN, chunk_of, labeled

pytestmark = pytest.mark.processes

BUCKET = "a-bucket"


@dataclass(frozen=True)
class ObjectStore:
    """A bucket, and the flags with which maskbeam reaches it."""

    uri: str
    flags: tuple[str, ...] = ()
    client: Any = None

    def put(self, name: str, data: bytes) -> str:
        """Puts an object there, without Beam where that is simple."""
        path = f"{self.uri}/{name}"
        if path.startswith("mem://"):
            STORE.put(path, data)
        elif self.client is None:
            with FileSystems.create(path) as file:
                file.write(data)
        else:
            self.client.put_object(Bucket=BUCKET, Key=path.removeprefix(f"s3://{BUCKET}/"), Body=data)
        return path

    def put_tree(self, name: str, directory: Path) -> str:
        for path in directory.rglob("*"):
            if path.is_file():
                self.put(f"{name}/{path.relative_to(directory)}", path.read_bytes())
        return f"{self.uri}/{name}"

    def names(self, below: str) -> set[str]:
        prefix = f"{self.uri}/{below}/"
        return {path.removeprefix(prefix) for path in list_tree(prefix.rstrip("/"))}

    def label(self, data: str, output: str, *flags: str, **options: Any) -> int:
        return label("--input", data, "--output", output, *self.flags, *flags, **options)


@pytest.fixture(scope="module")
def s3_server() -> Iterator[ObjectStore]:
    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    settings = {"aws_access_key_id": "key", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=url, **settings)
    client.create_bucket(Bucket=BUCKET)
    flags = {"endpoint_url": url, "access_key_id": "key", "secret_access_key": "secret", "region_name": "us-east-1"}
    yield ObjectStore(f"s3://{BUCKET}", tuple(f"--s3_{name}={value}" for name, value in flags.items()), client)
    server.stop()


@pytest.fixture(scope="module")
def gs_server() -> Iterator[ObjectStore]:
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    logging.getLogger("gcp_storage_emulator").setLevel(logging.ERROR)
    with pytest.MonkeyPatch.context() as environment:
        server = emulator.create_server("localhost", 0, in_memory=True, default_bucket=BUCKET)
        server.start()
        port = server._api._httpd.server_address[1]  # a port found free before it starts could be taken by then
        environment.setenv("STORAGE_EMULATOR_HOST", f"http://localhost:{port}")
        environment.setenv("GOOGLE_CLOUD_PROJECT", "project")
        yield ObjectStore(f"gs://{BUCKET}", ("--no_auth",))
        server.stop()


@pytest.fixture(params=["s3", "gs", "mem"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    """An empty place in a store."""
    if request.param == "mem":
        STORE.reset()
        found = ObjectStore("mem://bucket")
    else:
        found = request.getfixturevalue(f"{request.param}_server")
        found = replace(found, uri=f"{found.uri}/{tmp_path.name}")
    parse_label(["--input", "x", "--output", "y", *found.flags])  # tells the file systems the flags
    return found


@pytest.fixture
def memory() -> ObjectStore:
    STORE.reset()
    return ObjectStore("mem://bucket")


def fetch(uri: str, directory: Path) -> Path:
    """Copies everything below a URI into a directory."""
    for path in list_tree(uri):
        target = directory / path.removeprefix(uri + "/")
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileSystems.open(path) as file:
            target.write_bytes(file.read())
    return directory


def labels_in(uri: str, directory: Path) -> Labels:
    return without_shard(read_labels(fetch(uri, directory)))


def without_shard(labels: Labels) -> Labels:
    """The one column that says on which file system an image was."""
    for row in labels.images:
        row["shard"] = row["shard"].rpartition("/")[2]
    return labels


def make_input(directory: Path) -> Path:
    """Eleven photos in every format, and a broken one."""
    write_photos(directory / "loose", 3)
    (directory / "loose" / "broken.png").write_bytes(b"x")
    for number, (name, pack) in enumerate(
        [("a.tar", images_tar), ("b.tfrecord", tfrecord_bytes), ("c.parquet", images_parquet)], 1
    ):
        photos = [photo_bytes(10 * number + extra) for extra in range(3 if name == "a.tar" else 2)]
        (directory / name).write_bytes(pack(photos))
    return directory


@pytest.fixture(scope="module")
def local_input(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_input(tmp_path_factory.mktemp("local") / "data")


@pytest.fixture(scope="module")
def local_labels(local_input: Path) -> Labels:
    """What becomes of it on local disks."""
    output = local_input.parent / "labels"
    assert label("--input", local_input, "--output", output, "--chunk_size", "2") == 0
    return without_shard(read_labels(output))


def breaks_after(count: int) -> FakeSam:
    """A model that fails on every image but the first few."""

    class Breaks(FakeSam):
        left = count

        def embed(self, *arguments: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                raise RuntimeError("the device is gone")
            return super().embed(*arguments)

    return Breaks()


def load_breaking(config: ModelConfig, count: int) -> Any:
    return breaks_after(count)


# The whole program.


def test_every_format_is_read_and_labels_are_written_as_on_a_local_disk(
    store: ObjectStore, local_input: Path, local_labels: Labels, tmp_path: Path
) -> None:
    data, output = store.put_tree("data", local_input), f"{store.uri}/labels"
    store.put("data/loose/", b"")  # consoles mark directories so
    assert store.label(data + "/", output, "--chunk_size", "2") == 0
    assert labels_in(output, tmp_path) == local_labels
    run, totals = read_json(output + "/run.json"), read_json(output + "/summary.json")
    assert run["root"] == data
    assert (totals["images"], totals["labeled"], totals["failed"]) == (11, 10, 1)
    assert {name.partition("/")[0] for name in store.names("labels")} == {
        *("annotations", "images", f"manifest-{run['manifest']}.json", "run.json", "summary.json")
    }


def test_a_run_that_failed_goes_on(
    store: ObjectStore, local_input: Path, local_labels: Labels, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, output = store.put_tree("data", local_input), f"{store.uri}/labels"
    assert store.label(data, output, "--chunk_size", "2", load=partial(load_breaking, count=5)) == 1
    assert "the device is gone" in capsys.readouterr().err
    committed = committed_chunks(output)
    assert 1 <= sum(map(len, committed.values())) < 7
    assert not FileSystems.exists(output + "/summary.json")
    assert store.label(data, output, "--chunk_size", "2") == 0
    assert labels_in(output, tmp_path) == local_labels
    assert read_json(output + "/summary.json")["images"] == 11
    assert not store.names("labels/_tmp")


def test_overwrite_deletes_the_labels_and_nothing_else(store: ObjectStore, tmp_path: Path) -> None:
    data, output = store.put_tree("data", write_photos(tmp_path / "photos", 4)), f"{store.uri}/labels"
    assert store.label(data, output, "--chunk_size", "1") == 0
    mine = store.put("labels/images/mine.txt", b"mine")
    neighbour = store.put("labels2/images/data-00000.parquet", b"a neighbour's")
    with pytest.raises(UsageError, match="chunk_size was 1, now 3"):
        store.label(data, output, "--chunk_size", "3")
    assert store.label(data, output, "--chunk_size", "3", "--overwrite") == 0
    assert committed_chunks(output) == {"@root": [0, 1]}
    assert FileSystems.exists(mine) and FileSystems.exists(neighbour)


def test_failed_and_changed_images_are_done_again_and_a_changed_shard_is_named(
    store: ObjectStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, output = store.put_tree("data", write_photos(tmp_path / "photos", 3)), f"{store.uri}/labels"
    good = photo_bytes(9)
    store.put("data/9.png", b"x" * len(good))
    assert store.label(data, output, "--chunk_size", "2") == 0
    store.put("data/9.png", good)
    assert store.label(data, output, "--chunk_size", "2", "--retry_failed") == 0
    assert read_json(output + "/summary.json")["failed"] == 0
    assert [row["status"] for row in labels_in(output, tmp_path / "out").images] == ["labeled"] * 4
    capsys.readouterr()
    store.put("data/9.png", photo_bytes(8))
    assert store.label(data, output, "--chunk_size", "2") == 0
    assert "changed, labeled again: 1, 9.png" in capsys.readouterr().out
    rows = labels_in(output, tmp_path / "again").images
    assert rows[-1]["sha256"] == hashlib.sha256(photo_bytes(8)).hexdigest()
    tar = store.put("data/a.tar", images_tar([good]))
    assert store.label(data, output, "--chunk_size", "2") == 0
    store.put("data/a.tar", images_tar([photo_bytes(8)]))
    assert store.label(data, output, "--chunk_size", "2") == 1
    assert f"{tar} changed since it was labeled" in capsys.readouterr().err


def test_chunks_of_removed_inputs_are_counted(
    store: ObjectStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, output = store.put_tree("data", write_photos(tmp_path / "photos", 1)), f"{store.uri}/labels"
    tar = store.put("data/a.tar", images_tar([photo_bytes(number) for number in range(4)]))
    assert store.label(data, output, "--chunk_size", "2") == 0
    FileSystems.delete([tar])
    capsys.readouterr()
    assert store.label(data, output, "--chunk_size", "2") == 0
    assert f"2 chunks in {output} are of inputs that are not there any more" in capsys.readouterr().out


def test_worker_processes_reach_the_store_with_the_same_flags(
    s3_server: ObjectStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = replace(s3_server, uri=f"{s3_server.uri}/processes")
    parse_label(["--input", "x", "--output", "y", *store.flags])
    data, output = store.put_tree("data", write_photos(tmp_path / "photos", 4)), f"{store.uri}/labels"
    processes = ("--direct_num_workers", "2", "--direct_running_mode", "multi_processing")
    assert store.label(data, output, "--chunk_size", "2", *processes) == 0
    assert len(labels_in(output, tmp_path / "out").images) == 4


@pytest.mark.parametrize(
    ("data", "output", "told"),
    [
        ("none/*.png", "labels", "matches no file"),
        ("data", "data/labels", "lies inside the input"),
    ],
)
def test_mistakes_are_told(store: ObjectStore, data: str, output: str, told: str) -> None:
    store.put("data/1.png", photo_bytes(1))
    with pytest.raises(UsageError, match=told):
        store.label(f"{store.uri}/{data}", f"{store.uri}/{output}")


def test_the_environment_is_enough(s3_server: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"endpoint_url": "ENDPOINT_URL", "access_key_id": "ACCESS_KEY_ID", "secret_access_key": "SECRET_ACCESS_KEY"}
    for flag in s3_server.flags:
        name, _, value = flag.removeprefix("--s3_").partition("=")
        monkeypatch.setenv(f"AWS_{names.get(name, 'DEFAULT_REGION')}", value)
    store = replace(s3_server, uri=f"{s3_server.uri}/environment", flags=())
    data = store.put_tree("data", write_photos(tmp_path / "photos", 1))
    assert store.label(data, f"{store.uri}/labels") == 0
    _s3_client.cache_clear()  # it has these settings


def test_missing_credentials_are_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UsageError, match=r"^s3://bucket/.*no credentials for s3://: set AWS_ACCESS_KEY_ID"):
        label("--input", "s3://bucket/data/*.png", "--output", "s3://bucket/labels")


def test_a_store_that_refuses_is_one_line(s3_server: ObjectStore, tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", 1)
    with pytest.raises(UsageError, match=r"cannot write to --output s3://no-such-bucket/x: .*NoSuchBucket") as raised:
        s3_server.label(str(photos), "s3://no-such-bucket/x")
    assert "\n" not in str(raised.value) and "{" not in str(raised.value)


# Listings and requests.


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("photos", {"photos/1.png", "photos/deep/2.png"}),
        ("photos/", {"photos/1.png", "photos/deep/2.png"}),
        ("photos/*.png", {"photos/1.png"}),
        ("photos/**", {"photos/1.png", "photos/deep/2.png"}),
        ("photos/1.png", {"photos/1.png"}),
        ("photo", set()),
        ("[x].png", {"[x].png"}),
    ],
)
def test_a_prefix_is_a_directory_and_a_part_of_a_name_is_none(
    store: ObjectStore, pattern: str, names: set[str]
) -> None:
    for name in ("photos/1.png", "photos/deep/2.png", "photos2/3.png", "[x].png"):
        store.put(name, b"1")
    _, files = list_files(absolute(f"{store.uri}/{pattern}"))
    assert {file.path.removeprefix(store.uri + "/") for file in files} == names


def test_the_whole_bucket_is_an_input(memory: ObjectStore) -> None:
    memory.put("a/1.png", b"1")
    assert match_shards(InputConfig(("mem://bucket/",))).shards[0].files[0].path == "mem://bucket/a/1.png"


def test_temporary_files_are_deleted_with_one_listing_and_others_stay(memory: ObjectStore) -> None:
    for number in range(50):
        memory.put(f"labels/_tmp/{number:032x}-images-a.tar-00000.parquet", b"")
    others = ["labels/_tmp/mine", "labels/_tmp/0-images-a.tar-00000.parquet", "labels/_tmp2/1"]
    for name in (*others, f"labels/_tmp/deep/{0:032x}-images-a.tar-00000.parquet"):
        memory.put(name, b"")
    STORE.requests.clear()
    delete_temporary("mem://bucket/labels")
    assert len(STORE.objects) == 4 and {f"mem://bucket/{name}" for name in others} < set(STORE.objects)
    assert STORE.requests == {"list": 1, "delete": 50, "head": 1}


@pytest.fixture(scope="module")
def two_hundred(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """200 images in a hundred directories, and their labels in 200 chunks."""
    directory = tmp_path_factory.mktemp("many")
    for number in range(100):
        write_photos(directory / "data" / f"{number:03d}", 2)
    flags = ("--chunk_size", "1", "--points_per_side", "1")
    assert label("--input", directory / "data", "--output", directory / "labels", *flags) == 0
    return directory / "data", directory / "labels"


def test_a_start_that_has_nothing_left_to_do_lists_a_few_times_and_reads_each_footer_twice(
    two_hundred: tuple[Path, Path], memory: ObjectStore
) -> None:
    data, labels = two_hundred
    output = memory.put_tree("labels", labels)
    STORE.requests.clear()
    assert memory.label(str(data), output, "--chunk_size", "1", "--points_per_side", "1") == 0
    # The committed chunks are listed by the launcher at the start (twice) and at the end, and by the worker once.
    assert STORE.requests["list"] <= 4 * 2 + 2
    # An images file is read by the launcher, which checks it, and its footer by a worker.
    assert 2 * 200 <= STORE.requests["get"] <= 2 * 200 + 10
    assert STORE.requests["head"] <= 12
    assert STORE.requests["put"] + STORE.requests["copy"] <= 6


def test_a_commit_takes_few_requests(memory: ObjectStore) -> None:
    memory.put("labels/run.json", b'{"id": "1"}')
    STORE.requests.clear()
    commit_chunk(chunk_of(labeled(0)), "mem://bucket/labels", replace(RUN, id="1"))
    # Both files are put, copied and deleted where they were; run.json is read; an images file of another attempt is
    # looked for before anything is published, and before the mark is.
    assert STORE.requests == {"put": 2, "copy": 2, "delete": 2, "get": 1, "head": 2}


def s3_requests(store: ObjectStore) -> tuple[Counter[str], Counter[str], Any]:
    """Counts requests and the bytes that came back, by operation, of the one client there is."""
    FileSystems.exists(store.uri + "/x")
    requests: Counter[str] = Counter()
    received: Counter[str] = Counter()
    settings = dict(flag.removeprefix("--s3_").split("=", 1) for flag in store.flags)
    client = _s3_client(
        service_name="s3",
        region_name=settings["region_name"],
        api_version=None,
        use_ssl=True,
        verify=None,
        endpoint_url=settings["endpoint_url"],
        aws_access_key_id="key",
        aws_secret_access_key="secret",
        aws_session_token=None,
    )

    def count(parsed: dict[str, Any], model: Any, **_: Any) -> None:
        requests[model.name] += 1
        body = parsed.get("Body")
        if body is not None:
            read = body.read

            def counted(amount: int | None = None) -> bytes:
                data = read(amount)
                received[model.name] += len(data)
                return data

            body.read = counted

    client.meta.events.register("after-call.s3", count)
    return requests, received, lambda: client.meta.events.unregister("after-call.s3", count)


def test_a_commit_to_s3_takes_few_requests(s3_server: ObjectStore) -> None:
    parse_label(["--input", "x", "--output", "y", *s3_server.flags])
    s3_server.put("commit/run.json", b'{"id": "1"}')
    requests, _, stop = s3_requests(s3_server)
    commit_chunk(chunk_of(labeled(0)), f"{s3_server.uri}/commit", replace(RUN, id="1"))
    stop()
    # As on mem://, but Beam uploads in three requests, and looks for a file before it reads or copies it.
    uploads = {"CreateMultipartUpload": 2, "UploadPart": 2, "CompleteMultipartUpload": 2}
    assert requests == {**uploads, "CopyObject": 2, "DeleteObjects": 2, "GetObject": 1, "HeadObject": 5}


def test_all_calls_share_one_client(s3_server: ObjectStore) -> None:
    parse_label(["--input", "x", "--output", "y", *s3_server.flags])
    path = s3_server.put("shared", b"1")
    before = _s3_client.cache_info()
    for _ in range(3):
        FileSystems.exists(path)
    after = _s3_client.cache_info()
    assert (after.misses, after.hits) == (before.misses, before.hits + 3)


def test_of_a_committed_chunk_only_the_footer_is_read(s3_server: ObjectStore, tmp_path: Path) -> None:
    parse_label(["--input", "x", "--output", "y", *s3_server.flags])
    commit_chunk(chunk_of(labeled(0)), str(tmp_path), RUN)
    (small,) = (tmp_path / "images").iterdir()
    table = pq.read_table(small)
    ballast = pa.table({"ballast": [os.urandom(2**20) for _ in range(20)]}, metadata=table.schema.metadata)
    pq.write_table(ballast, small)
    name = "a%2Fs.tar"
    s3_server.put(f"footer/images/{chunk_name(name, 0)}", small.read_bytes())
    requests, received, stop = s3_requests(s3_server)
    report = read_report(f"{s3_server.uri}/footer", name, 0)
    stop()
    assert report is not None and report.totals.images == 1
    assert requests == {"HeadObject": 1, "GetObject": 1}
    assert 0 < received["GetObject"] <= 2**16


@pytest.mark.parametrize(("name", "pack"), [("a.tar", images_tar), ("c.parquet", images_parquet)])
def test_a_shard_is_downloaded_once_or_twice(s3_server: ObjectStore, name: str, pack: Any) -> None:
    parse_label(["--input", "x", "--output", "y", *s3_server.flags])
    data = pack([os.urandom(2**20) for _ in range(40)])
    s3_server.put(f"download/{name}", data)
    (shard,) = match_shards(InputConfig((f"{s3_server.uri}/download/{name}",))).shards
    _, received, stop = s3_requests(s3_server)
    assert sum(len(image.data) for image in read_images(shard, ReadConfig(), s3_server.uri)) == 40 * 2**20
    stop()
    # Of Parquet the headers of all pages are read first, with Beam's read-ahead, so that none inflates without bound.
    assert received["GetObject"] <= len(data) * (1 + (name == "c.parquet")) + 2**20


# Presets.


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home directory, where the cache is."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def cached(home: Path) -> list[Path]:
    return [path for path in (home / ".cache/maskbeam/presets").iterdir() if path.suffix != ".lock"]


def test_a_remote_preset_labels_as_the_embedded_one(s3_server: ObjectStore, home: Path, tmp_path: Path) -> None:
    store = replace(s3_server, uri=f"{s3_server.uri}/preset")
    remote_preset = store.put_tree("models/tiny", Path(resolve_preset("sam_tiny")))
    data, output = store.put_tree("photos", write_photos(tmp_path / "photos", 2)), f"{store.uri}/labels"
    everything = ("--pred_iou_thresh", "0", "--stability_score_thresh", "0")
    assert label("--input", tmp_path / "photos", "--output", tmp_path / "local", *everything, load=load_model) == 0
    assert store.label(data, output, "--model", remote_preset, *everything, load=load_model) == 0
    labels = labels_in(output, tmp_path / "out")
    assert labels == without_shard(read_labels(tmp_path / "local"))
    assert [row["status"] for row in labels.images] == ["labeled"] * 2
    run = read_json(output + "/run.json")
    assert run["model"] == remote_preset and run["model_fingerprint"] == model_fingerprint("sam_tiny")
    assert len(cached(home)) == 1


def test_a_preset_is_copied_once_and_again_when_it_changes(memory: ObjectStore, home: Path, tmp_path: Path) -> None:
    uri = memory.put_tree("models/tiny", Path(resolve_preset("sam_tiny")))
    directory = Path(local_preset(uri))
    assert fetch(uri, tmp_path / "fetched") and not differing_files(tmp_path / "fetched", directory)
    STORE.requests.clear()
    assert local_preset(uri + "/") == str(directory)
    assert STORE.requests == {"list": 1}
    memory.put("models/tiny/config.json", b"{}")
    changed = Path(local_preset(uri))
    assert changed != directory and (changed / "config.json").read_bytes() == b"{}"


def differing_files(left: Path, right: Path) -> list[str]:
    files = {str(path.relative_to(root)) for root in (left, right) for path in root.rglob("*") if path.is_file()}
    return [name for name in files if (left / name).read_bytes() != (right / name).read_bytes()]


def test_a_copy_that_was_cut_off_is_not_used(memory: ObjectStore, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = memory.put_tree("models/tiny", Path(resolve_preset("sam_tiny")))
    copied: list[str] = []

    def copy_two(path: str, target: Path) -> None:
        copied.append(path)
        if len(copied) == 3:
            raise KeyboardInterrupt
        copy(path, target)

    copy = cache._copy
    monkeypatch.setattr(cache, "_copy", copy_two)
    with pytest.raises(KeyboardInterrupt):
        local_preset(uri)
    assert [path.suffix for path in cached(home)] == [".partial"]
    directory = local_preset(uri)
    assert [str(path) for path in cached(home)] == [directory]
    assert model_fingerprint(directory) == model_fingerprint("sam_tiny")


def test_processes_that_ask_at_the_same_time_copy_once(memory: ObjectStore, home: Path) -> None:
    """Threads here: a lock on an open file is per opening, so it works the same between processes."""
    uri = memory.put_tree("models/tiny", Path(resolve_preset("sam_tiny")))
    STORE.requests.clear()
    with ThreadPoolExecutor(8) as threads:
        assert len(set(threads.map(local_preset, [uri] * 8))) == 1
    assert STORE.requests["get"] == len(list(Path(resolve_preset("sam_tiny")).iterdir()))


def test_a_preset_that_is_not_there_is_a_usage_error(store: ObjectStore, home: Path) -> None:
    with pytest.raises(UsageError, match=f"the model {store.uri}/none is not there"):
        model_fingerprint(f"{store.uri}/none")


def test_a_uri_without_a_preset_is_not_copied(memory: ObjectStore, home: Path) -> None:
    uri = memory.put("bucket/photo.jpg", b"x").rpartition("/")[0]
    STORE.requests.clear()
    with pytest.raises(UsageError, match=f"the model {uri} is no KerasHub preset: there is no config.json in it"):
        model_fingerprint(uri)
    assert STORE.requests == {"list": 1}


@pytest.mark.parametrize(
    "preset", ["sam_base_sa1b", resolve_preset("sam_tiny"), "kaggle://keras/sam", "hf://keras/sam"]
)
def test_what_kerashub_reads_by_itself_is_left_to_it(preset: str) -> None:
    assert local_preset(preset) == preset
