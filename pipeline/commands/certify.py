"""maskbeam certify: how far the masks of a lower precision are those of float32, on a sample of the user's images.

The table shows the sample. What it says of all images is the upper bound of transforms/evaluation/binomial.py: a
precision is certified by that.

Every image of the sample is accounted for: compared, or listed with the reason why it was not. Every float32 mask is,
too: what has no match counts in the mean with the IoU of what comes closest to it.
"""

from __future__ import annotations

import hashlib
import heapq
import sys
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any

from maskbeam.pipeline.exits import EXIT_DONE, EXIT_FAILED, UsageError
from maskbeam.pipeline.launch.identity import default_backend, model_fingerprint
from maskbeam.pipeline.options import parse_job
from maskbeam.pipeline.progress import progress_bar
from maskbeam.pipeline.results import (
    describe_default_model,
    escape_controls,
    format_mean,
    format_share,
    format_table,
    write_result,
)
from maskbeam.transforms.errors import describe_error
from maskbeam.transforms.evaluation.agreement import MATCH_IOU, Agreement, compare_masks
from maskbeam.transforms.evaluation.binomial import trials_needed, upper_bound
from maskbeam.transforms.files.paths import relative_path
from maskbeam.transforms.images import ImageConfig, ImageError, decode_image
from maskbeam.transforms.load_model import LoadSam, ModelConfig, load_model, use_backend
from maskbeam.transforms.masks.amg import CANDIDATE_SETTINGS, AmgConfig, Sam, label_image
from maskbeam.transforms.match_shards import InputConfig, Matched, match_shards
from maskbeam.transforms.model_health import ModelBroken
from maskbeam.transforms.presets.embedded import check_model_name
from maskbeam.transforms.readers.samples import ReadConfig
from maskbeam.transforms.readers.shard import read_images
from maskbeam.transforms.records import EncodedImage, Failure
from maskbeam.transforms.threads import Submit, call_now, host_threads

CONFIDENCE = 0.95

_DESCRIPTION = (
    "Labels a sample of the images in float32 and in a lower precision and compares the masks. Run it on the kind of "
    "device that will label: rounding differs between them."
)


@dataclass(frozen=True)
class LowPrecisionModel(ModelConfig):
    """Which model is judged.

    Attributes:
      dtype: the precision to compare with float32: bfloat16 or float16.
    """

    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype == "float32":
            raise ValueError("dtype must be another one than float32, which it is compared with")


@dataclass(frozen=True)
class CertificateConfig:
    """What is asked of the lower precision.

    Attributes:
      images: images in the sample, at least 1; all of them if there are fewer. To certify the default of max_changed
        it takes 59 of which none changes, 93 with one, 124 with two.
      seed: another one draws another sample. More images with the same seed add to the sample.
      max_changed: the largest fraction of all images that may have another number of masks than in float32, above 0.
        Certified is what stays within it with 95% confidence, by the exact one-sided bound of Clopper and Pearson.
      json: file for the whole result, with a row for each image, on any Beam file system; replaced if it exists.
    """

    images: int = 100
    seed: int = 0
    max_changed: float = 0.05
    json: str | None = None

    def __post_init__(self) -> None:
        if self.images < 1:
            raise ValueError(f"images is {self.images}; expected at least 1 image.")
        if not 0 < self.max_changed <= 1:
            raise ValueError(
                f"max_changed must be a fraction above 0 and at most 1, got {self.max_changed}: no sample shows that no"
                " image at all changes"
            )


@dataclass(frozen=True)
class CertifyJob:
    """Everything `maskbeam certify` was asked to do."""

    model: LowPrecisionModel
    input: InputConfig
    certificate: CertificateConfig
    amg: AmgConfig
    images: ImageConfig
    read: ReadConfig


@dataclass(frozen=True)
class ComparedImage:
    """What became of one image of the sample: one of agreement and failure is set."""

    image_id: str
    agreement: Agreement | None = None
    failure: Failure | None = None

    @property
    def changed(self) -> bool:
        """Whether the lower precision finds another number of masks."""
        return self.agreement is not None and self.agreement.expected != self.agreement.actual


@dataclass(frozen=True)
class Certificate:
    """The result.

    Attributes:
      dtype: the lower precision.
      max_changed: the limit for changed_bound.
      images: the whole sample, in the order of the ids.
    """

    dtype: str
    max_changed: float
    images: tuple[ComparedImage, ...]

    @property
    def failed(self) -> list[ComparedImage]:
        """The images that could not be read or decoded, so that there is nothing to compare."""
        return [image for image in self.images if image.failure]

    @property
    def changed(self) -> list[ComparedImage]:
        """The images with another number of masks than in float32."""
        return [image for image in self.images if image.changed]

    @property
    def moved(self) -> list[ComparedImage]:
        """The images with a float32 mask that has no match, or the other way round, be their numbers equal or not."""
        return [image for image in self.images if image.agreement and (image.agreement.lost or image.agreement.new)]

    @property
    def num_compared(self) -> int:
        """Images with masks of both precisions, be it none."""
        return len(self.images) - len(self.failed)

    @property
    def changed_fraction(self) -> float:
        """Changed of compared images; 0 if none was compared."""
        return len(self.changed) / max(self.num_compared, 1)

    @property
    def changed_bound(self) -> float:
        """With 95% confidence, no larger share of all images changes; 1 if none was compared."""
        return upper_bound(len(self.changed), self.num_compared, CONFIDENCE)

    @property
    def images_needed(self) -> int | None:
        """Images to compare for a certificate, if no more change than have; None if more images are no help or need."""
        if not self.changed_fraction <= self.max_changed < self.changed_bound:
            return None
        return trials_needed(len(self.changed), self.max_changed, CONFIDENCE)

    @cached_property
    def agreement(self) -> Agreement:
        """The masks of all compared images."""
        return sum((image.agreement for image in self.images if image.agreement), Agreement())

    @property
    def objection(self) -> str | None:
        """Why the lower precision is not certified; None if it is."""
        if not self.num_compared:
            return "no image could be decoded, so nothing was compared"
        if not self.agreement.expected and not self.agreement.actual:
            return "no image has a mask in either precision, so nothing was compared: lower --pred_iou_thresh"
        if self.changed_fraction > self.max_changed:
            return f"{self._told_changes}, more than --max_changed {self.max_changed} allows"
        if self.images_needed is not None:
            return (
                f"not enough images: {self.images_needed} needed if no more than {len(self.changed)} change. "
                f"{self._told_changes}; {self._told_bound}, and --max_changed is {self.max_changed}"
            )
        return None

    @property
    def verdict(self) -> str:
        """A sentence for people."""
        if self.objection:
            return f"{self.dtype} is NOT certified: {self.objection}"
        return (
            f"{self.dtype} is certified: {self._told_changes}; {self._told_bound}, within --max_changed "
            f"{self.max_changed}"
        )

    @property
    def _told_changes(self) -> str:
        return (
            f"{len(self.changed)} of {self.num_compared} images ({self.changed_fraction:.4g}) change their mask count"
        )

    @property
    def _told_bound(self) -> str:
        return f"of all images at most {self.changed_bound:.4g} do, with {CONFIDENCE:.0%} confidence"


def main(argv: list[str]) -> int:
    """Parses the flags and runs the comparison."""
    return run_certify(parse_certify(argv), notice=describe_default_model(argv))


def parse_certify(argv: list[str]) -> CertifyJob:
    """Command line -> what to do. There are no chunks and no stored candidates here, so no flags for them."""
    return parse_job("certify", CertifyJob, argv, _DESCRIPTION, without=("chunk_size", *CANDIDATE_SETTINGS))


def run_certify(job: CertifyJob, load: LoadSam = load_model, notice: str = "") -> int:
    """Compares, prints the result and writes it as JSON.

    Args:
      load: makes the models; tests give a fake.
      notice: printed once the job is known to be possible.

    Returns:
      0 if with 95% confidence at most max_changed of all images change their mask count; 1 if more may, if there was
      nothing to compare, or if the model failed.

    Raises:
      UsageError: before anything is labeled, if the job cannot be done as asked.
    """
    try:
        check_model_name(job.model.model)
        matched = match_shards(job.input, job.read)
        use_backend(default_backend())
    except (ValueError, RuntimeError, OSError) as error:
        raise UsageError(str(error)) from error
    described = _describe_job(job, matched)
    # Without a result yet: fails now rather than after the work if --json cannot be written.
    write_result(job.certificate.json, described)
    if notice:
        print(notice, file=sys.stderr)
    try:
        float32, low_precision = load(ModelConfig(job.model.model, "float32")), load(job.model)
    except ValueError as error:
        raise UsageError(str(error)) from error

    drawn = draw_images(matched, job.read, job.certificate.images, job.certificate.seed)
    try:
        with host_threads() as threads:
            images = tuple(
                compare_image(image, float32, low_precision, job.images, job.amg, threads.submit)
                for image in progress_bar(drawn, unit="image")
            )
    except ModelBroken as error:
        print(f"maskbeam: {error}", file=sys.stderr)
        return EXIT_FAILED
    certificate = Certificate(job.model.dtype, job.certificate.max_changed, images)
    print(f"model: {job.model.model}")
    print(format_certificate(certificate))
    write_result(job.certificate.json, {**described, **certificate_to_dict(certificate)})
    return EXIT_FAILED if certificate.objection else EXIT_DONE


def _describe_job(job: CertifyJob, matched: Matched) -> dict[str, Any]:
    """What the result depends on, for JSON."""
    return {
        "job": asdict(job),
        "root": matched.root,
        "model_fingerprint": model_fingerprint(job.model.model),
        "backend": default_backend(),
        "match_iou": MATCH_IOU,
    }


def draw_images(matched: Matched, config: ReadConfig, count: int, seed: int) -> list[EncodedImage]:
    """Draws images by a seed: all are equally likely, whatever they are packed in.

    Each image gets a number by its id and the seed, and those with the lowest numbers are drawn. So shards of unknown
    length are sampled in one pass, with no more than `count` images and one in memory. Of loose files only the drawn
    ones are opened; shards of many images are read from end to end.

    Args:
      count: images to draw; all of them if there are fewer.

    Returns:
      the images in the order of their ids; what could not be read is among them, with its failure.
    """

    def number(image_id: str) -> bytes:
        return hashlib.sha256(f"{seed} {image_id}".encode("utf-8", "surrogateescape")).digest()

    files = [
        replace(shard, files=(file,)) for shard in matched.shards if shard.format == "image" for file in shard.files
    ]
    loose = heapq.nsmallest(count, files, key=lambda shard: number(relative_path(shard.files[0].path, matched.root)))
    packed = [shard for shard in matched.shards if shard.format != "image"]
    images = (
        image
        for shard in chain(loose, progress_bar(packed, unit="shard") if packed else [])
        for image in read_images(shard, config, matched.root)
    )
    drawn = heapq.nsmallest(count, images, key=lambda image: number(image.image_id))
    return sorted(drawn, key=lambda image: image.image_id)


def compare_image(
    image: EncodedImage,
    float32: Sam,
    low_precision: Sam,
    image_config: ImageConfig,
    amg_config: AmgConfig,
    submit: Submit = call_now,
) -> ComparedImage:
    """Labels an image with both models and compares the masks; what cannot be decoded becomes a failure.

    Args:
      submit: see label_image.

    Raises:
      ModelBroken: a model fails. `label` would go on, but a certificate that leaves out images says nothing.
    """
    if image.failure:
        return ComparedImage(image.image_id, failure=image.failure)
    try:
        pixels = decode_image(image.data, image_config).pixels
    except ImageError as error:
        return ComparedImage(image.image_id, failure=Failure("decode", str(error)))
    try:
        expected, actual = (label_image(sam, pixels, amg_config, submit).masks for sam in (float32, low_precision))
    except Exception as error:
        raise ModelBroken(
            f"the model failed on {image.image_id}, so nothing is certified. {describe_error(error)}. If memory "
            "ran out, lower --points_per_batch."
        ) from error
    return ComparedImage(image.image_id, compare_masks(expected, actual))


def format_certificate(certificate: Certificate) -> str:
    """What the command prints: the images that failed or changed, the totals, the verdict."""
    dtype, masks = certificate.dtype, certificate.agreement
    compared, changed, moved = certificate.num_compared, len(certificate.changed), len(certificate.moved)
    lines = [escape_controls(f"failed {image.image_id}: {_describe_failure(image)}") for image in certificate.failed]
    lines += [
        escape_controls(f"changed {image.image_id}: {_describe_change(image, dtype)}") for image in certificate.changed
    ]
    table = [
        ("images in the sample", str(len(certificate.images)), ""),
        ("  compared", str(compared), ""),
        ("  failed: not read or decoded", str(len(certificate.failed)), ""),
        ("images that change their mask count", str(changed), format_share(changed, compared)),
        (f"  of all images at most, {CONFIDENCE:.0%} confidence", "", f"{certificate.changed_bound:.1%}"),
        ("images with a lost or new mask", str(moved), format_share(moved, compared)),
        ("masks in float32", str(masks.expected), ""),
        (
            f"  matched in {dtype} at IoU >= {MATCH_IOU}",
            str(masks.matched),
            format_share(masks.matched, masks.expected),
        ),
        ("  lost", str(masks.lost), format_share(masks.lost, masks.expected)),
        (f"masks in {dtype}", str(masks.actual), ""),
        ("  new", str(masks.new), format_share(masks.new, masks.actual)),
        ("mean IoU of the matched masks", format_mean(masks.mean_matched_iou), ""),
        ("mean best IoU of all float32 masks", format_mean(masks.mean_best_iou), ""),
        ("mean |difference| of predicted IoU, matched", format_mean(masks.mean_predicted_iou_difference), ""),
    ]
    return "\n".join([*lines, *format_table(table), certificate.verdict])


def _describe_failure(image: ComparedImage) -> str:
    return f"{image.failure.stage}: {image.failure.reason}" if image.failure else ""


def _describe_change(image: ComparedImage, dtype: str) -> str:
    masks = image.agreement or Agreement()
    return f"{masks.expected} masks in float32, {masks.actual} in {dtype} ({masks.lost} lost, {masks.new} new)"


def certificate_to_dict(certificate: Certificate) -> dict[str, Any]:
    """The result for JSON: the verdict, the totals, a row for each image of the sample."""
    return {
        "certified": certificate.objection is None,
        "objection": certificate.objection,
        "summary": {
            "images": len(certificate.images),
            "compared": certificate.num_compared,
            "failed": len(certificate.failed),
            "changed": len(certificate.changed),
            "changed_fraction": certificate.changed_fraction,
            "changed_upper_bound": certificate.changed_bound,
            "confidence": CONFIDENCE,
            "images_needed": certificate.images_needed,
            "with_lost_or_new_masks": len(certificate.moved),
            **_agreement_to_dict(certificate.agreement),
        },
        "images": [_image_to_dict(image) for image in certificate.images],
    }


def _image_to_dict(image: ComparedImage) -> dict[str, Any]:
    """The row of an image; one that failed has its reason instead of the masks' columns."""
    row: dict[str, Any] = {"image_id": image.image_id, "error_stage": None, "error": None}
    if image.failure:
        row |= {"error_stage": image.failure.stage, "error": image.failure.reason}
    if image.agreement:
        masks = image.agreement
        row |= _agreement_to_dict(masks)
        row |= {
            "changed": image.changed,
            "matched_ious": masks.matched_ious,
            "best_ious": masks.best_ious,
            "predicted_iou_differences": masks.predicted_iou_differences,
        }
    return row


def _agreement_to_dict(masks: Agreement) -> dict[str, Any]:
    return {
        "float32_masks": masks.expected,
        "low_precision_masks": masks.actual,
        "matched": masks.matched,
        "lost": masks.lost,
        "new": masks.new,
        "mean_matched_iou": masks.mean_matched_iou,
        "mean_best_iou": masks.mean_best_iou,
        "mean_predicted_iou_difference": masks.mean_predicted_iou_difference,
    }
