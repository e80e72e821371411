"""What to take prompts from, and how to read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from maskbeam.transforms.masks.prompted import MaskChoice

PromptsFormat = Literal["auto", "table", "coco", "record", "yolo", "voc", "labels"]
BboxFormat = Literal["xyxy", "xywh", "cxcywh", "rel_xyxy", "rel_xywh", "rel_cxcywh"]
PromptsKey = Literal["auto", "image_id", "file_name", "key", "stem"]

# In place of a path: each record brings its own prompts.
IN_RECORD = "in_record"


class PromptFilesError(ValueError):
    """Prompts that cannot be used as a whole. The message says which file, what is wrong, and what to do."""


@dataclass(frozen=True)
class PromptConfig:
    """Prompts to label, one mask each, instead of a grid.

    Attributes:
      prompts: files, directories or globs with boxes, points or masks; in_record takes them from the images' own
        records.
      prompts_format: table (Parquet, CSV, JSONL), coco (instances or results), record, yolo, voc, or labels, a
        directory of maskbeam's; auto goes by the names, which do not show yolo and voc.
      prompts_bbox: what a column `bbox` holds, which nothing but its author knows; those with rel_ are fractions of the
        image's sides.
      prompts_key: what of an image the prompts name: its image_id, its record's file_name or key, or the stem, the base
        name without its extension; auto tries the first three in this order.
      categories: a text file with a class name a line; the first has id 0. Default: the file's own ids; names get ids
        from 1 in the order of the alphabet.
      min_prompt_score: leave out prompts with a lower score; those without one stay.
      mask: which of the model's masks is written: auto is best for a single point on the object, else single; single is
        the one for prompts without ambiguity; best has the highest predicted IoU of the other three; stable is single
        where that is stable, else best; all writes four rows a prompt.
      refine_steps: how often a mask is given back to the model to be refined.
      box_margin: widens boxes on each side by this fraction of their width and height.
      scale_prompts: scale prompts that are for another size of the image, instead of failing the image.
    """

    prompts: tuple[str, ...] | None = None
    prompts_format: PromptsFormat = "auto"
    prompts_bbox: BboxFormat | None = None
    prompts_key: PromptsKey = "auto"
    categories: str | None = None
    min_prompt_score: float | None = None
    mask: MaskChoice = "auto"
    refine_steps: int = 0
    box_margin: float = 0.0
    scale_prompts: bool = False

    def __post_init__(self) -> None:
        for name, choices in (
            ("prompts_format", PromptsFormat),
            ("prompts_bbox", BboxFormat),
            ("prompts_key", PromptsKey),
            ("mask", MaskChoice),
        ):
            value = getattr(self, name)
            if value is not None and value not in get_args(choices):
                raise ValueError(f"{name} is {value!r}; expected one of {', '.join(get_args(choices))}.")
        if isinstance(self.prompts, str) or (self.prompts is not None and not all(self.prompts)):
            raise ValueError(f"prompts is {self.prompts!r}; expected one or more files, none empty, or {IN_RECORD}.")
        if self.prompts is not None and IN_RECORD in self.prompts and len(self.prompts) > 1:
            raise ValueError(f"prompts is {' '.join(self.prompts)}; expected files or {IN_RECORD}, not both.")
        if self.prompts == (IN_RECORD,) and self.prompts_format not in ("auto", "record"):
            raise ValueError(
                f"prompts_format is {self.prompts_format}, which is of files, but prompts is {IN_RECORD}. Leave "
                "prompts_format out."
            )
        if self.prompts not in (None, (IN_RECORD,)) and self.prompts_format == "record":
            raise ValueError(f"prompts_format is record, but prompts is a file. Use --prompts {IN_RECORD}.")
        if self.refine_steps < 0:
            raise ValueError(f"refine_steps is {self.refine_steps}; expected 0 or more.")
        if not 0 <= self.box_margin <= 1:
            raise ValueError(f"box_margin is {self.box_margin}; expected a fraction of the box's side from 0 to 1.")
        changed = [name for name in _defaults() if getattr(self, name) != getattr(type(self), name)]
        if self.prompts is None and changed:
            raise ValueError(f"{changed[0]} is for prompts, and there are none. Give --prompts, or leave it out.")


def _defaults() -> list[str]:
    return [name for name in PromptConfig.__dataclass_fields__ if name != "prompts"]
