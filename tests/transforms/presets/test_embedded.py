"""Which model a name means, and what is said of one that means none, without Keras."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from maskbeam.pipeline.cli import main
from maskbeam.pipeline.commands import certify
from maskbeam.pipeline.commands import label as label_command
from maskbeam.pipeline.commands.certify import LowPrecisionModel
from maskbeam.pipeline.exits import UsageError
from maskbeam.pipeline.launch.local import run_label
from maskbeam.pipeline.options import parse_label
from maskbeam.transforms.load_model import ModelConfig
from maskbeam.transforms.models.check_preset import check_preset
from maskbeam.transforms.presets.embedded import (
    DEMO_MODEL,
    PresetError,
    check_model_name,
    embedded_presets,
    hub_presets,
)
from tests.conftest import label, write_photos
from tests.fakes import load_fake

pytestmark = pytest.mark.model

ROOT = Path(__file__).parents[3]


def test_the_names_are_those_of_kerashub() -> None:
    import keras_hub

    theirs = keras_hub.models.SAMImageSegmenter.presets
    assert hub_presets() == {name: preset["kaggle_handle"] for name, preset in theirs.items()}


def test_the_demo_model_is_embedded_and_the_default() -> None:
    assert DEMO_MODEL in embedded_presets()
    assert ModelConfig().model == LowPrecisionModel().model == DEMO_MODEL


@pytest.mark.parametrize(
    "name",
    [
        *("sam_tiny", "sam_base_sa1b", "sam_large_sa1b", "sam_huge_sa1b", "hf://keras/sam_base_sa1b"),
        *(
            "kaggle://keras/sam/keras/sam_base_sa1b/5",
            "gs://bucket/sam",
            "s3://bucket/sam",
            str(ROOT / "tests/golden/sam_128"),
        ),
    ],
)
def test_what_may_be_a_model_is_let_through(name: str) -> None:
    check_model_name(name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sam_bse_sa1b", "there is no model sam_bse_sa1b; did you mean sam_base_sa1b"),
        ("SAM_TINY", "did you mean sam_tiny"),
        ("sam-large", "did you mean sam_large_sa1b"),
        ("vit_h", "did you mean sam_huge_sa1b?"),
        ("facebook/sam-vit-base", "did you mean sam_base_sa1b?"),
        ("keras/sam_huge_sa1b", "did you mean sam_huge_sa1b"),
        ("bert", "there is no model bert. Expected"),
        ("./no/such", "there is no model ./no/such. Expected"),
        ("a\0b", "there is no model"),
        ("x" * 5000, "there is no model"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_and_where_models_come_from(name: str, words: str) -> None:
    with pytest.raises(PresetError) as refused:
        check_model_name(name)
    told = str(refused.value)
    assert words in told
    for known in (*embedded_presets(), *hub_presets(), "Kaggle", "hf://", "directory or URI"):
        assert known in told


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("sam_vit_b_01ec64.pth", "--model sam_base_sa1b,"),
        ("models/sam_vit_l_0b3195.pth", "--model sam_large_sa1b,"),
        ("https://dl.fbaipublicfiles.com/segment_anything/sam_vit_h_4b8939.pth", "--model sam_huge_sa1b,"),
        ("mobile_sam.pt", "--model sam_base_sa1b|sam_large_sa1b|sam_huge_sa1b,"),
        ("model.safetensors", "a checkpoint of another program"),
    ],
)
def test_a_checkpoint_of_metas_is_refused_with_the_name_to_give_instead(
    name: str, instead: str, tmp_path: Path
) -> None:
    (tmp_path / "here.pth").write_bytes(b"x")
    for checkpoint in (name, str(tmp_path / "here.pth")):
        with pytest.raises(PresetError, match="KerasHub cannot read"):
            check_model_name(checkpoint)
    with pytest.raises(PresetError) as refused:
        check_model_name(name)
    assert instead in str(refused.value)


def test_a_directory_or_file_that_is_no_preset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PresetError, match=r"is no KerasHub preset: it has no config\.json"):
        check_model_name(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(PresetError, match="is a file; expected the directory"):
        check_model_name(str(tmp_path / "config.json"))


@pytest.mark.parametrize("wrong", [["sam_bse_sa1b"], ["sam_vit_b_01ec64.pth"], ["no/such/directory"], ["https://a/b"]])
def test_a_wrong_model_ends_label_and_certify_before_anything_is_written(wrong: list[str], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="model"):
        label("--input", write_photos(tmp_path / "photos", 1), "--output", tmp_path / "out", "--model", *wrong)
    assert not (tmp_path / "out").exists()


def test_a_wrong_model_is_named_even_if_the_input_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no model sam_bse"):
        label("--input", tmp_path / "none", "--output", tmp_path / "out", "--model", "sam_bse")


@pytest.mark.processes
def test_a_wrong_model_ends_the_program_without_importing_keras(tmp_path: Path) -> None:
    program = """
import sys
from maskbeam.pipeline.cli import main
code = main(sys.argv[1:])
print(sorted({"keras", "keras_hub", "tensorflow", "jax"} & set(sys.modules)), code)
"""
    photos = str(write_photos(tmp_path / "photos", 1))
    for command in (["label", "--output", str(tmp_path / "out")], ["certify"]):
        done = subprocess.run(
            [sys.executable, "-c", program, *command, "--input", photos, "--model", "sam_bse_sa1b"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.stdout == "[] 2\n"
        assert (
            done.stderr.startswith(f"maskbeam {command[0]}: there is no model sam_bse_sa1b")
            and done.stderr.count("\n") == 1
        )


# Names that have to be downloaded, without a network.


def fail_to_download(preset: str, name: str) -> str:
    raise ConnectionError("no route to host.\nmore")


@pytest.mark.parametrize(
    ("preset", "page"),
    [
        ("sam_base_sa1b", "https://www.kaggle.com/models/keras/sam/keras/sam_base_sa1b"),
        ("kaggle://me/sam/keras/mine", "https://www.kaggle.com/models/me/sam/keras/mine"),
        ("hf://keras/sam_base_sa1b", "https://huggingface.co/keras/sam_base_sa1b"),
    ],
)
def test_without_a_network_it_is_said_what_is_there_and_what_to_get(
    preset: str, page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from keras_hub.src.utils import preset_utils

    monkeypatch.setattr(preset_utils, "get_file", fail_to_download)
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path))
    with pytest.raises(PresetError) as refused:
        check_preset(preset)
    told = str(refused.value)
    assert f"cannot load model {preset}: its config.json cannot be downloaded: no route to host." in told
    assert f"Without a network, get it from {page}" in told
    if not preset.startswith("hf"):
        assert told.endswith(f"Downloaded before: none (in {tmp_path}).")
        cached = tmp_path / "models" / hub_presets()["sam_large_sa1b"].removeprefix("kaggle://") / "model.weights.h5"
        os.makedirs(cached.parent)
        cached.touch()
        with pytest.raises(PresetError, match="Downloaded before: sam_large_sa1b "):
            check_preset(preset)


# The model is named.


@pytest.fixture
def notices(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What commands would say of the model; they stop before they do anything."""
    given: list[str] = []

    def stop(*job: Any, notice: str) -> int:
        given.append(notice)
        return 1

    monkeypatch.setattr(label_command, "run_label", stop)
    monkeypatch.setattr(certify, "run_certify", stop)
    return given


@pytest.mark.parametrize("command", [["label", "--output", "out"], ["certify"]])
def test_without_a_model_a_line_says_which_works_what_it_is_good_for_and_what_to_give(
    command: list[str], notices: list[str]
) -> None:
    for flags in ([], ["--model", "sam_tiny"], ["--model=sam_tiny"]):
        main([*command, "--input", "in", *flags])
    notice, *others = notices
    assert others == ["", ""] and "\n" not in notice
    for words in ("demo model sam_tiny", "not for labeling a dataset", f"--model {'|'.join(hub_presets())}"):
        assert words in notice


def test_the_demo_needs_no_such_line(tmp_path: Path, notices: list[str]) -> None:
    assert main(["demo", "--output", str(tmp_path / "demo")]) == 1
    assert notices == [""]


def test_the_line_is_printed_once_the_run_begins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = write_photos(tmp_path / "photos", 1)
    job, options = parse_label(["--input", str(photos), "--output", str(tmp_path / "out"), "--points_per_side", "2"])
    assert run_label(job, options, load_fake, notice="which model") == 0
    assert capsys.readouterr().err.splitlines()[0] == "which model"


def test_every_summary_names_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine, tiny = tmp_path / "mine", tmp_path / "tiny"
    preset = shutil.copytree(ROOT / "tests" / "golden" / "sam_128", tmp_path / "preset")
    photos = write_photos(tmp_path / "photos", 2)
    for output, flags in ((mine, ["--model", preset]), (tiny, ["--keep_candidates"])):
        assert label("--input", photos, "--output", output, *flags) == 0
        model = str(flags[1]) if flags[1:] else "sam_tiny"
        assert f"\nmodel: {model}\n" in capsys.readouterr().out
        assert json.loads((output / "summary.json").read_text())["model"] == model

    refined, report, result = tmp_path / "refined", tmp_path / "report", tmp_path / "result.json"
    assert main(["refine", "--labels", str(tiny), "--output", str(refined)]) == 0
    assert "\nmodel: sam_tiny\n" in capsys.readouterr().out
    assert json.loads((refined / "summary.json").read_text())["model"] == "sam_tiny"
    assert main(["view", "--labels", str(mine), "--output", str(report)]) == 0
    assert f"model: {preset}\n" in capsys.readouterr().out
    assert json.dumps(str(preset)) in "".join(path.read_text() for path in report.rglob("*.js"))
    assert main(["evaluate", "--labels", str(mine), "--against", str(tiny), "--json", str(result)]) == 0
    assert f"models: {preset}, held against sam_tiny\n" in capsys.readouterr().out
    assert {"model": str(preset), "model_against": "sam_tiny"}.items() <= json.loads(result.read_text()).items()

    truth = tmp_path / "truth.json"
    assert main(["export", "--format", "coco", "--labels", str(tiny), "--output", str(truth)]) == 0
    assert main(["evaluate", "--labels", str(mine), "--truth", str(truth), "--json", str(result)]) == 0
    assert f"model: {preset}\n" in capsys.readouterr().out
    assert json.loads(result.read_text())["model"] == str(preset)
