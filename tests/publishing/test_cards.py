"""An adapter's card: its metadata as the Hub reads it, its sections, and nothing about this machine."""

import dataclasses
import json
import re
import shutil

import pytest
from adapter_files import RESULTS, save_adapter
from huggingface_hub import ModelCard, ModelCardData

from medct.common.drawings import knows_drawings_only
from medct.common.files import write_json
from medct.common.paths import find_paths, without_paths
from medct.evaluation.provenance import provenance
from medct.publishing.cards import base_license, is_hub_id, render_card, write_card
from medct.training.handing_out import write_readme
from medct.training.settings import TrainingSettings

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SECTIONS = (
    "Results",
    "How to use",
    "Data",
    "Prompts",
    "Training",
    "Hardware and energy",
    "Intended use and limits",
    "Licence",
)


def test_a_folder_goes_before_a_repository_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("org/name") and not is_hub_id("./org/name")
    (tmp_path / "org/name").mkdir(parents=True)
    assert not is_hub_id("org/name")


@pytest.fixture(scope="module")
def trained(converted, tmp_path_factory):
    return save_adapter(converted, tmp_path_factory.mktemp("cards") / "run", results=RESULTS)


@pytest.fixture(scope="module")
def card(trained) -> ModelCard:
    return ModelCard(
        render_card(trained, repo_id="org/site-b", base="org/ct-clip", revision=COMMIT, license="cc-by-nc-sa-4.0")
    )


def test_metadata_is_what_the_hub_shows(card):
    data = card.data
    assert isinstance(data, ModelCardData)
    assert data.library_name == "peft"
    assert data.base_model == "org/ct-clip"
    assert data.license == "cc-by-nc-sa-4.0"
    assert {"medct", "synthetic"} <= set(data.tags)
    scores = {result.metric_type: result for result in data.eval_results}
    assert scores["roc_auc"].metric_value == 0.8612
    assert "0.850 to 0.870" in scores["roc_auc"].metric_name
    assert scores.keys() == {"roc_auc", "f1"}  # single labels are in the table
    assert all("SYNTHETIC" in result.dataset_name for result in data.eval_results)
    assert data.model_name == "site-b"


def test_the_card_of_a_classifiers_adapter_is_about_a_classifier(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "head")
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | {"modules_to_save": ["classifier"]}
    file.write_text(json.dumps(config), encoding="utf-8")
    card = ModelCard(render_card(folder, repo_id="org/head", base="org/fine", revision=COMMIT))
    assert "AutoModelForImageClassification.from_pretrained(base" in card.text
    assert "AutoModel." not in card.text
    assert card.data.pipeline_tag == "image-classification"
    assert {result.task_type for result in card.data.eval_results} == {"image-classification"}
    assert "a classifier of chest CT volumes" in card.text and "radiology reports" not in card.text
    assert "None: the classifier has labels of its own." in card.text and "is present" not in card.text
    assert "objective: prompts" in render_card(trained, repo_id="org/a") and "objective" not in card.text


def test_sections_hold_what_the_files_say(card):
    assert re.findall(r"^## (.*)$", card.text, re.MULTILINE) == list(SECTIONS)
    for text in (
        "# site-b\n",
        RESULTS["measured_on"],
        RESULTS["table"],
        "base 0.744 (0.730 to 0.760), adapted 0.861 (0.850 to 0.870), difference +0.117 (+0.100 to +0.130)",
        "| Emphysema | 0.310 |",
        "- {label} is present. / {label} is not present.",
        "- LoRA rank 4\n- learning rate 0.003\n- seed 0\n- 1,250 steps",
        "73,728 of 1,200,000 parameters trained",
        "sha256-bf16:",
        "2 minutes on cpu",
        "SYNTHETIC data",
    ):
        assert text in card.text, text


def test_remote_code_is_pinned(card):
    assert f'base, revision = "org/ct-clip", "{COMMIT}"' in card.text
    lines = [line for line in card.text.splitlines() if "trust_remote_code=True" in line]
    assert lines
    assert all("revision=revision" in line for line in lines)


def test_no_path_of_this_machine_is_on_the_card(trained, converted):
    text = render_card(trained)
    assert find_paths(text) == []
    assert str(converted) not in text
    assert f"the MedCT model `{converted.name}`" in text


@pytest.mark.parametrize("name", ["roc.png", "calibration.png", "learned.png"])
def test_a_plot_is_shown_where_there_is_one(trained, card, name):
    assert name not in card.text
    (trained / name).touch()
    assert f"]({name})" in render_card(trained)
    (trained / name).unlink()


def test_an_adapter_without_results_has_a_card_too(converted, tmp_path):
    folder = save_adapter(converted, tmp_path / "bare")
    (folder / "medct_adapter.json").unlink()
    card = ModelCard(write_card(folder).read_text(encoding="utf-8"))
    assert card.data.eval_results is None
    assert "No scores are recorded." in card.text
    assert "Not recorded." in card.text


def test_each_key_of_the_results_may_be_missing(converted, tmp_path):
    folder = save_adapter(converted, tmp_path / "run", results=RESULTS)
    for key in RESULTS:
        (folder / "results.json").write_text(
            json.dumps({name: RESULTS[name] for name in RESULTS if name != key}), encoding="utf-8"
        )
        assert ModelCard(render_card(folder)).data.library_name == "peft"


def test_the_licence_is_that_of_the_base(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    assert base_license(str(base)) is None
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n", encoding="utf-8")
    assert base_license(str(base)) == "apache-2.0"
    (tmp_path / "ct-clip").mkdir()
    assert base_license(str(tmp_path / "ct-clip")) == "cc-by-nc-sa-4.0"
    assert base_license("nobody/nothing") is None  # offline here


@pytest.mark.parametrize("synthetic", ["the base", "the studies", "nothing"])
def test_a_whole_model_takes_over_what_the_card_of_its_base_says(synthetic, tmp_path):
    """Commands ask its card whether it knows drawings alone, and users under which licence it is."""
    tags = ["synthetic"] if synthetic == "the base" else []
    (tmp_path / "README.md").write_text(f"---\nlicense: cc-by-nc-sa-4.0\ntags: {tags}\n---\n", encoding="utf-8")
    out, results = tmp_path / "run", {"synthetic": synthetic == "the studies"}
    results |= {"measured_on": "4 studies.", "data": "Trained on 26.", "table": "| a |", "remarks": []}
    out.mkdir()
    settings = TrainingSettings(model=str(tmp_path), hub_base="org/base", adaptation="full")
    write_json(out / "train_config.json", dataclasses.asdict(settings))
    write_readme(out, results)
    card = ModelCard.load(out / "README.md")
    assert (card.data.license, card.data.base_model) == ("cc-by-nc-sa-4.0", "org/base")
    assert knows_drawings_only(str(out)) == (synthetic != "nothing")
    assert card.text.strip().startswith("# MedCT\n\n4 studies.")


def test_the_page_tells_the_bases_licence(trained, tmp_path, card):
    assert card.data.license == "cc-by-nc-sa-4.0"
    assert "## Licence\n\ncc-by-nc-sa-4.0, like the base that it was derived from." in card.content
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n", encoding="utf-8")
    found = ModelCard(render_card(trained, base=str(base)))
    assert found.data.license == "apache-2.0"
    assert "apache-2.0, like the base that it was derived from." in found.content


def test_the_page_tells_that_the_base_knows_drawings_only(trained, tmp_path):
    """Whatever the adapter was trained on."""
    said = "The base was trained on SYNTHETIC drawings alone"
    base = tmp_path / "base"
    base.mkdir()
    for tags, is_said in (("[ct]", False), ("[ct, synthetic]", True)):
        (base / "README.md").write_text(f"---\ntags: {tags}\n---\n", encoding="utf-8")
        assert (said in render_card(trained, base=str(base))) == is_said


def test_what_was_forgotten_and_remarks_are_on_the_page(converted, tmp_path):
    kept = {"difference": {"auroc": {"value": -0.004, "low": -0.009, "high": 0.001}}}
    results = RESULTS | {"kept": kept, "remarks": ["This adapter does not help."], "strength": 0.0, "best_step": 40}
    page = render_card(save_adapter(converted, tmp_path / "run", results=results))
    assert "On what was to be kept: difference -0.004 (-0.009 to +0.001)." in page
    assert "**This adapter does not help.**" in page
    assert "- strength 0: that share" in page
    assert "- weights of step 40, the best on the tuning patients" in page


def test_what_decided_the_figures_is_on_the_page_and_where_it_lay_is_not(converted, tmp_path):
    studies = {"site-b, valid": {"scans": 20, "patients": 10, "ids_sha256": "ab" * 32, "labels_sha256": "cd" * 32}}
    models = {"base": {"model": "/home/me/base", "fingerprint": "sha256-bf16:12", "adapter_fingerprint": None}}
    settings = {"data": ["/scans of mine", "C:\\\\my scans\\\\site"], "model": "/home/me/base", "mapping": "standard"}
    decided = provenance(settings, models, studies, seed=7)
    folder = save_adapter(converted, tmp_path / "run", results=RESULTS | {"provenance": decided})
    text = render_card(folder, base="org/ct-clip", revision=COMMIT, license="mit")
    assert "## Repeat" in text
    for known in ("seed 7", "torch ", "`sha256-bf16:12`", f"`{'ab' * 32}`", "by the mapping standard"):
        assert known in text
    assert "/home/me" not in text and "/scans" not in text
    cleaned = without_paths(json.loads((folder / "results.json").read_text(encoding="utf-8")))
    assert cleaned["provenance"]["settings"]["data"] == ["scans of mine", "site"]


def test_the_page_has_the_wording_and_operating_points_that_are_used(converted, tmp_path):
    """Both may be chosen after training, by `medct prompts --store`: the figures are not of them."""
    folder = save_adapter(converted, tmp_path / "run", results=RESULTS)
    file = folder / "medct_adapter.json"
    described = json.loads(file.read_text(encoding="utf-8"))
    label = described["label_names"][0]
    as_trained = [
        described["prompt_templates"][0][side].format(label=name)
        for name in described["label_names"]
        for side in (0, 1)
    ]
    (folder / "results.json").write_text(json.dumps(RESULTS | {"prompts": [as_trained]}), encoding="utf-8")
    page = render_card(folder)
    assert "| Emphysema | 0.310 |" in page and "chosen on studies apart from those above" in page
    assert "was chosen later" not in page
    thresholds = {label: 0.25, "a|b": 0.5, "rare": 3.2e-5, "common": 0.99996}
    later = {"prompts": {label: "other words"}, "thresholds": thresholds}
    file.write_text(json.dumps(described | later), encoding="utf-8")
    page = render_card(folder)
    # A threshold of 0.000 would call every scan present.
    assert f"| {label} | 0.250 |\n| a\\|b | 0.500 |\n| rare | 0.00003 |\n| common | 0.99996 |\n" in page
    assert "| Emphysema | 0.310 |" not in page
    assert "other words is present. / other words is not present." in page
    assert "was chosen later" in page and "chosen on the studies that the wording was chosen on" in page


def test_a_page_of_folds_says_whose_figures_are_whose(converted, tmp_path):
    """Each patient was held out once, those that the kept adapter was tuned on, too, by adapters of other folds."""
    kept = {"difference": {"auroc": {"value": -0.004, "low": -0.009, "high": 0.001}}}
    about = {"folds": [{"fold": 1}], "kept": kept, "measured_on": "All 24 patients.", "data": "Scored on 8 of fold 1."}
    page = render_card(save_adapter(converted, tmp_path / "run", results=RESULTS | about))
    assert "On what was to be kept, of the adapter in this folder alone: difference -0.004 (" in page
    measured = ModelCard(page).data.eval_results
    assert measured and all("All 24 patients." in each.dataset_name for each in measured), "the figures are pooled"
    assert "chosen on the tuning patients of its own fold, which other folds held out" in page
    assert "apart from those above" not in page
