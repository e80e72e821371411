"""Classes of prompts: names and ids, as the rows come, until all are known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from maskbeam.transforms.prompt_files.config import PromptFilesError


class Categories:
    """Collects names and ids of classes, and gives every name its id once all are known."""

    def __init__(self, names: Sequence[str] | None = None) -> None:
        """
        Args:
          names: the only ones there are; the position is the id. None = whatever comes.
        """
        self._names = names
        self._codes: dict[str, int] = {}  # names in the order in which they come
        self._ids: set[int] = set()
        self._name_of: dict[int, str] = dict(enumerate(names or ()))
        self._alone: set[str] = set()  # names of rows without an id

    def add(self, names: pa.Array, ids: pa.Array) -> pa.Array:
        """Takes in the classes of some rows.

        Args:
          names: string, null = none. ids: int32, null = none.

        Returns:
          int32: a code of the name where there is no id, for `finish`; else null.

        Raises:
          PromptFilesError: an id has two names.
        """
        self._ids.update(np.unique(ids.drop_null().to_numpy()).tolist())
        if names.null_count == len(names):
            return pa.nulls(len(names), pa.int32())
        encoded = names.dictionary_encode()
        words = encoded.dictionary.to_pylist()
        codes = np.array([self._codes.setdefault(word, len(self._codes)) for word in words], np.int32)
        has_name, has_id = (np.asarray(column.is_valid()) for column in (names, ids))
        indices = encoded.indices.fill_null(0).to_numpy()
        both = has_name & has_id
        pairs = np.unique(np.stack([ids.fill_null(0).to_numpy()[both], indices[both]], axis=1), axis=0)
        for category_id, index in pairs.tolist():
            self._name(category_id, words[index])
        alone = has_name & ~has_id
        self._alone.update(words[index] for index in np.unique(indices[alone]).tolist())
        return pa.array(codes[indices], mask=~alone)

    def _name(self, category_id: int, name: str) -> None:
        before = self._name_of.setdefault(category_id, name)
        if before != name:
            raise PromptFilesError(
                f"the class {category_id} has two names, {before!r} and {name!r}. Give each its own category_id, or "
                "leave one of the columns category and category_id out."
            )

    def finish(self, named: Mapping[int, str]) -> tuple[np.ndarray, dict[int, str]]:
        """The ids of all names.

        Args:
          named: id -> name of classes, as a file lists them beside its rows.

        Returns:
          (N,) int32, the id of each code; -1 = the name is none of the classes that there are.
          id -> name of all classes, in the order of the ids.

        Raises:
          PromptFilesError: an id has two names, or names have no ids where others have.
        """
        for category_id, name in named.items():
            self._name(category_id, name)
        if self._names is None and not self._ids:
            self._name_of.update(enumerate(sorted(self._alone), 1))
        ids = {name: category_id for category_id, name in sorted(self._name_of.items(), reverse=True)}
        unknown = sorted(self._alone - ids.keys())
        if unknown and self._names is None:
            raise PromptFilesError(
                f"the class {unknown[0]!r} has no id, while others have a category_id. Give all rows one, or none."
            )
        for category_id in self._ids:
            self._name_of.setdefault(category_id, str(category_id))
        of_code = np.array([ids.get(name, -1) for name in self._codes], np.int32)
        return of_code, dict(sorted(self._name_of.items()))


def to_records(categories: Mapping[int, str]) -> list[dict[str, Any]]:
    """As run.json and COCO have them."""
    return [{"id": category_id, "name": name} for category_id, name in categories.items()]


def from_records(records: Iterable[Mapping[str, Any]]) -> dict[int, str]:
    """Inverse of to_records. A class without a name is called by its id."""
    return {record["id"]: record.get("name", str(record["id"])) for record in records}
