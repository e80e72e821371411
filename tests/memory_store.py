"""mem://, an object store in this process, as Google's behaves: no directories, a rename is a copy and a deletion.

Every request is counted and can be made to fail, and what a reader sees at any moment can be looked at.
"""

from __future__ import annotations

import io
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from apache_beam.io.filesystem import BeamIOError, CompressionTypes, FileMetadata, FileSystem

# Called with a request ("list", "head", "get", "put", "copy", "delete") and its path, before it is done or after.
OnRequest = Callable[[str, str], None]


class Store:
    """The objects of all buckets."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.updated: dict[str, float] = {}
        self.requests: Counter[str] = Counter()
        self.on_request: OnRequest = lambda request, path: None
        self.on_response: OnRequest = lambda request, path: None
        self.clock = 0.0
        self.lock = threading.Lock()

    def request(self, request: str, path: str) -> None:
        self.requests[request] += 1
        self.on_request(request, path)

    def put(self, path: str, data: bytes) -> None:
        """Without a request: what a test finds in the store from the start."""
        with self.lock:
            self.clock += 1
            self.objects[path], self.updated[path] = data, self.clock

    def get(self, path: str) -> bytes:
        try:
            return self.objects[path]
        except KeyError:
            raise FileNotFoundError(f"404 No such object: {path}") from None


STORE = Store()


class _Upload(io.BytesIO):
    """Appears as a whole when it is closed; also when it is closed because writing failed, as real ones do."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path

    def close(self) -> None:
        if self.closed:
            return
        data = self.getvalue()
        super().close()  # or the garbage collector would do this again
        STORE.request("put", self._path)
        STORE.put(self._path, data)
        STORE.on_response("put", self._path)


class MemoryStore(FileSystem):
    """Registered with Beam by being defined."""

    @classmethod
    def scheme(cls) -> str:
        return "mem"

    def join(self, basepath: str, *paths: str) -> str:
        return "/".join([basepath.rstrip("/"), *(path.strip("/") for path in paths)])

    def split(self, path: str) -> tuple[str, str]:
        head, _, tail = path.rpartition("/")
        return head, tail

    def mkdirs(self, path: str) -> None:
        pass

    def has_dirs(self) -> bool:
        return False

    def _list(self, dir_or_prefix: str) -> Iterator[FileMetadata]:
        STORE.request("list", dir_or_prefix)
        with STORE.lock:
            found = sorted(item for item in STORE.objects.items() if item[0].startswith(dir_or_prefix))
            return iter([FileMetadata(path, len(data), STORE.updated.get(path, 0.0)) for path, data in found])

    def create(self, path: str, mime_type: str = "", compression_type: Any = CompressionTypes.AUTO) -> Any:
        return _Upload(path)

    def open(self, path: str, mime_type: str = "", compression_type: Any = CompressionTypes.AUTO) -> Any:
        STORE.request("get", path)
        return io.BytesIO(STORE.get(path))

    def copy(self, source_file_names: list[str], destination_file_names: list[str]) -> None:
        self._each(self._copy, list(zip(source_file_names, destination_file_names, strict=True)), "Copy")

    def rename(self, source_file_names: list[str], destination_file_names: list[str]) -> None:
        self._each(self._rename, list(zip(source_file_names, destination_file_names, strict=True)), "Rename")

    def exists(self, path: str) -> bool:
        STORE.request("head", path)
        return path in STORE.objects

    def size(self, path: str) -> int:
        return self.metadata(path).size_in_bytes

    def last_updated(self, path: str) -> float:
        return self.metadata(path).last_updated_in_seconds

    def metadata(self, path: str) -> FileMetadata:
        STORE.request("head", path)
        return FileMetadata(path, len(STORE.get(path)), STORE.updated.get(path, 0.0))

    def delete(self, paths: list[str]) -> None:
        self._each(self._delete, paths, "Delete")

    def _copy(self, pair: tuple[str, str]) -> None:
        STORE.request("copy", pair[1])
        STORE.put(pair[1], STORE.get(pair[0]))
        STORE.on_response("copy", pair[1])

    def _rename(self, pair: tuple[str, str]) -> None:
        self._copy(pair)
        self._delete(pair[0])

    def _delete(self, path: str) -> None:
        STORE.request("delete", path)
        with STORE.lock:
            STORE.objects.pop(path, None)
        STORE.on_response("delete", path)

    def _each(self, do: Callable[[Any], None], items: list[Any], name: str) -> None:
        errors = {}
        for item in items:
            try:
                do(item)
            except Exception as error:
                errors[item] = error
        if errors:
            raise BeamIOError(f"{name} operation failed", errors)
