"""The labels of one image in other tools' formats: SA-1B's JSON, YOLO's segmentation text, a picture of labels.

And the names of the files they are in, which follow the images' names as far as those are safe.
"""

from __future__ import annotations

import hashlib
import re

from maskbeam.transforms.images import has_image_extension

# File systems allow 255 bytes a name, and about 4000 a path with the directories before it.
_MAX_NAME_BYTES = 240
_MAX_PATH_BYTES = 1000


def file_names(file_name: str, image_id: str, extension: str) -> list[str]:
    """Relative paths that an image's labels may have, the first that no other image has taken is theirs.

    The first is the image's file name with another extension: tools find the labels of an image by that. The second is
    the image_id, whole. The third is a hash of the image_id. None leads out of the directory.

    >>> file_names("cats/a.jpg", "train.tar#7", ".txt")[:2]
    ['cats/a.txt', 'train.tar#7.txt']
    >>> file_names("/../%a\\n.jpg", "x", ".txt")[0]
    '%/%2E%2E/%25a%0A.txt'
    """
    digest = hashlib.sha256(image_id.encode("utf-8", "surrogatepass")).hexdigest()
    paths = [path for path in (stem(file_name), image_id) if len(path) <= _MAX_PATH_BYTES]
    names = [_safe_path(path) + extension for path in paths]
    return [name for name in names if _fits(name)] + [f"%{digest}{extension}"]


def stem(file_name: str) -> str:
    """A file name without an image's extension; others belong to the name.

    >>> stem("cats/a.jpg"), stem("train.tar#7")
    ('cats/a', 'train.tar#7')
    """
    return file_name.rpartition(".")[0] if has_image_extension(file_name) else file_name


def _safe_path(path: str) -> str:
    """A relative path without control characters, "", "." and ".." as names; different for different paths."""
    return "/".join(_safe_name(name) for name in path.split("/"))


def _safe_name(name: str) -> str:
    if name in (".", ".."):
        return name.replace(".", "%2E")
    return re.sub(r"[\x00-\x1f\x7f%]", lambda found: f"%{ord(found[0]):02X}", name) or "%"


def _fits(path: str) -> bool:
    sizes = [len(name.encode("utf-8", "surrogatepass")) for name in path.split("/")]
    return max(sizes) <= _MAX_NAME_BYTES and sum(sizes) + len(sizes) <= _MAX_PATH_BYTES
