"""Globs mean here what they mean to Beam's file systems."""

from __future__ import annotations

import re

import pytest
from apache_beam.io.filesystem import FileSystem
from hypothesis import example, given
from hypothesis import strategies as st

from maskbeam.transforms.files.paths import glob_matcher

CHARACTERS = st.text(alphabet="a-c/*?[]!^\\.", max_size=12)


@given(pattern=CHARACTERS, path=CHARACTERS)
@example(pattern="[]", path="[]")
@example(pattern="[]a]", path="]")
@example(pattern="[!]", path="[!]")
@example(pattern="[^a]", path="^")
@example(pattern="a***c", path="a/b/c")
def test_a_glob_matches_what_it_matches_for_beam(pattern: str, path: str) -> None:
    """But for `/**/`, which here may stand for one slash."""
    try:
        expected = re.compile(FileSystem.translate_pattern(pattern).replace("/.*/", "/(?:.*/)?")).match(path)
    except re.error:
        with pytest.raises(ValueError, match="is no valid glob"):
            glob_matcher(pattern)
        return
    assert bool(glob_matcher(pattern)(path)) == bool(expected)
