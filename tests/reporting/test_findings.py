"""What a report says of scores and of what made them."""

import hashlib
import json

import pytest
from adapter_files import RESULTS, save_adapter

from medct.adapters_medct import DESCRIPTION_FILE
from medct.reporting import findings as module
from medct.reporting.findings import Algorithm, Finding, algorithm_of, findings_of, shown_probability

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_findings_keep_their_order_and_what_is_known_of_them():
    results = [
        {"label": "b", "score": 0.9, "logits_margin": 2.2, "present": True, "probability": 0.4},
        {"label": "a", "score": 0.1, "logits_margin": -2.2},
    ]
    found = findings_of(results, ["a", "b"], {"a": 0.05, "b": 0.5})
    assert found == [Finding("a", 0.1), Finding("b", 0.9, 0.5, 0.4)], "a was not called, so it has no operating point"
    assert [each.is_present for each in found] == [None, True]
    assert [each.call for each in (*found, Finding("c", 0.1, 0.2))] == ["no operating point", "above", "below"]
    assert Finding("c", 0.2, 0.2).is_present, "as the pipeline calls it"


@pytest.mark.parametrize(
    ("score", "threshold", "figures"),
    [
        (0.12345, None, ("0.123", None)),
        (0.12345, 0.5, ("0.123", "0.500")),
        (0.5, 0.5, ("0.500", "0.500")),
        (0.99962, 0.99968, ("0.9996", "0.9997")),
        (0.9996, 0.9994, ("1.000", "0.999")),
        (1e-7, 3e-7, ("0.0000001", "0.0000003")),
    ],
)
def test_figures_tell_a_score_from_its_operating_point(score, threshold, figures):
    """Else a reader is told that 1.000 is below 1.000."""
    assert Finding("a", score, threshold).figures == figures


@pytest.mark.parametrize(
    ("probability", "shown"), [(0.0, "<0.01"), (0.004, "<0.01"), (0.006, "0.01"), (0.5, "0.50"), (0.996, ">0.99")]
)
def test_no_probability_is_shown_as_certain(probability, shown):
    assert shown_probability(probability) == shown


def test_local_folders_are_named_without_their_place(pipe, converted, tmp_path):
    adapter = save_adapter(converted, tmp_path / "runs/site-b", results=RESULTS)
    found = algorithm_of(pipe, str(converted), str(adapter), prompt_templates=[("{label}", "no {label}")])
    weights = (adapter / "adapter_model.safetensors").read_bytes()
    assert found.adapter_commit == f"sha256:{hashlib.sha256(weights).hexdigest()}"
    assert (found.model, found.adapter, found.is_synthetic) == (converted.name, "site-b", False)
    assert found.model_commit.startswith("sha256-bf16:")
    assert [line.split(":")[0] for line in found.parameters[1:4:2]] == ["fingerprint", "fingerprint of the adapter"]
    assert not any("/" in line for line in found.parameters)
    assert found.parameters[-1] == "prompts: {label}|no {label}"


def test_whatever_is_asked_in_other_words_is_named(pipe):
    def named(**prompts) -> list[str]:
        return algorithm_of(pipe, "ORG/BASE", **prompts).parameters[2:]

    pipe.model.config._commit_hash = COMMIT
    in_words = {"Emphysema": "Emphysema", "Erguss": "pleural effusion", "Herz": [("It is large.", "It is small.")]}
    assert named() == named(candidate_labels=["Emphysema", "Rib fracture"]) == []
    assert named(candidate_labels=in_words) == [
        "prompts: Erguss: pleural effusion is present.|pleural effusion is not present.",
        "prompts: Herz: It is large.|It is small.",
    ]
    assert named(candidate_labels=in_words, prompt_templates=[("{label} ja.", "{label} nein.")]) == [
        "prompts: {label} ja.|{label} nein.",
        "prompts: Erguss: pleural effusion ja.|pleural effusion nein.",
        "prompts: Herz: It is large.|It is small.",
    ]


@pytest.mark.filterwarnings("ignore:.*was trained with other")
def test_words_that_an_adapter_brings_are_named(pipe, converted, tmp_path):
    adapter = save_adapter(converted, tmp_path / "site-b")
    description = json.loads((adapter / DESCRIPTION_FILE).read_text(encoding="utf-8"))
    description |= {"prompt_templates": [["{label}!", "no {label}!"]], "prompts": {"Emphysema": "destroyed lung"}}
    (adapter / DESCRIPTION_FILE).write_text(json.dumps(description), encoding="utf-8")
    pipe.model.load_adapter(str(adapter))
    assert algorithm_of(pipe, str(converted), str(adapter)).own_prompts == (
        "{label}!|no {label}!",
        "Emphysema: destroyed lung!|no destroyed lung!",
    )


def test_of_the_hub_the_commits_are_named(pipe, monkeypatch):
    pipe.model._place = {"revision": COMMIT}  # as loading from the Hub leaves it
    path = f"/cache/models--ORG--SITE-B/snapshots/{COMMIT[::-1]}/adapter_config.json"
    monkeypatch.setattr(module, "cached_file", lambda *_, **__: path)
    monkeypatch.setattr(module, "knows_drawings_only", lambda name: False)
    found = algorithm_of(pipe, "ORG/BASE", "ORG/SITE-B")
    assert found == Algorithm("ORG/BASE", COMMIT, "ORG/SITE-B", COMMIT[::-1])


@pytest.mark.parametrize("of", ["model", "adapter"])
def test_a_card_that_says_synthetic_is_passed_on(pipe, converted, tmp_path, of):
    folder = tmp_path / "said"
    folder.mkdir()
    (folder / "README.md").write_text("---\ntags: [medct, synthetic]\n---\n", encoding="utf-8")
    names = (str(folder), None) if of == "model" else (str(converted), str(folder))
    found = algorithm_of(pipe, *names)
    assert found.is_synthetic and "synthetic drawings" in found.warning
    assert "synthetic" not in algorithm_of(pipe, str(converted)).warning
