"""The card of an adapter on the Hub, made from the files beside it.

`write_card` reads `adapter_config.json`, `results.json`, `train_config.json` and `medct_adapter.json`, and fills
`adapter_card.md`. Any of the last three, and any key in them, may be missing. No path of this machine reaches the card.
"""

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from medct.adapters_medct import CONFIG_FILE, DESCRIPTION_FILE, as_described
from medct.common.counting import counted
from medct.common.drawings import knows_drawings_only, said_on_card
from medct.common.paths import local_paths, without_paths
from medct.common.run_files import RESULTS, TRAIN_CONFIG
from medct.configuration_medct import MedCTConfig

TEMPLATE = Path(__file__).with_name("adapter_card.md")
MODEL_CARD = Path(__file__).parents[1] / "model_card.md"
CLASSIFIER_CARD = Path(__file__).with_name("classifier_card.md")
GENERATED = "<!-- Made from the files of this folder, anew with every push; delete this line to keep own edits. -->"
PLACEHOLDER_REPO, PLACEHOLDER_BASE, PLACEHOLDER_REVISION = "ORG/NAME", "ORG/BASE", "COMMIT"
CT_CLIP_LICENSE = "cc-by-nc-sa-4.0"

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# The Hub's names of metrics, by ours.
_HUB_METRICS = {"auroc": ("roc_auc", "AUROC"), "macro_f1": ("f1", "F1")}
PICTURES = {
    "learned.png": "Change of AUROC of each finding on the new site, and on what was to be kept",
    "roc.png": "ROC curves",
    "calibration.png": "Calibration: how often findings were present among scans of such a score",
}
"""The pictures that a card shows where they lie beside it, and no others are pushed."""
_REWORDED = (
    "The figures here are of the wording that it was trained with. What it asks now, under Prompts, was chosen later, "
    "and its operating points with it."
)
_APART = "studies apart from those above"
_TRAINING_FACTS = {
    "recipe": "recipe: {}",
    "objective": "objective: {}",
    "rank": "LoRA rank {}",
    "alpha": "LoRA alpha {}",
    "learning_rate": "learning rate {:g}",
    "batch_size": "batch size {}",
    "seed": "seed {}",
}


def is_hub_id(base: str | None) -> bool:
    """Whether a model's name is that of a repository; a folder of that name takes precedence, as in transformers."""
    return base is not None and _HUB_ID.fullmatch(base) is not None and not Path(base).exists()


def local_paths_of(folder: Path) -> list[str]:
    """The paths of this machine that a run's own files name: of its base, its data, its output.

    Args:
        folder: As training leaves it.
    """
    base, _ = recorded_base(folder)
    where = {"folder": str(folder.absolute()), "base": base}
    return local_paths(read_json(folder, TRAIN_CONFIG) | where)


def base_license(base: str, revision: str | None = None) -> str | None:
    """The licence that the card of a model names.

    Args:
        base: Hub id or folder.
        revision: Commit, tag or branch on the Hub.

    Returns:
        The licence's identifier; that of CT-CLIP if the model is named so and its card names none; `None` if unknown.
    """
    found = said_on_card(base, "license", revision=revision)
    if found is None and re.search(r"ct[-_]?clip", Path(base).name, re.IGNORECASE):
        return CT_CLIP_LICENSE
    return found


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON file.

    Args:
        folder: Folder of the file.
        name: Name of the file.

    Returns:
        Its content; empty if there is no such file.
    """
    path = folder / name
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def recorded_base(folder: Path) -> tuple[str | None, str | None]:
    """The model and revision that an adapter was trained on, according to its configuration."""
    config = read_json(folder, CONFIG_FILE)
    return config.get("base_model_name_or_path"), config.get("revision")


def write_card(folder: str | Path, **options: Any) -> Path:
    """Write an adapter's README.md.

    Args:
        folder: Holds at least `adapter_config.json`.
        options: See `render_card`.

    Returns:
        Path of the file.
    """
    path = Path(folder, "README.md")
    path.write_text(render_card(folder, **options), encoding="utf-8")
    return path


def model_metadata(folder: Path, results: dict[str, Any]) -> ModelCardData:
    """What a whole model that a run has trained takes over from its base: the licence, and what it is derived from.

    Args:
        folder: Holds `train_config.json`.
        results: What `results.json` holds.
    """
    settings = read_json(folder, TRAIN_CONFIG)
    base, license = settings["model"], base_license(settings["model"], settings["revision"])
    is_synthetic = bool(results.get("synthetic")) or knows_drawings_only(base)
    on_the_hub = settings["hub_base"] or (base if is_hub_id(base) else None)
    known: dict[str, Any] = {"license": license, "base_model": on_the_hub}
    return ModelCardData(
        library_name="transformers",
        tags=["medct", "medical", "ct", "chest", *(["synthetic"] if is_synthetic else [])],
        **{key: value for key, value in known.items() if value is not None},
    )


def render_card(
    folder: str | Path,
    *,
    repo_id: str = PLACEHOLDER_REPO,
    base: str | None = None,
    revision: str | None = None,
    license: str | None = None,
) -> str:
    """Make an adapter's card.

    Args:
        folder: Holds at least `adapter_config.json`.
        repo_id: Repository that the adapter will have.
        base: Hub id of its base, if not the recorded one.
        revision: Commit of that base.
        license: Identifier of the licence, if not the base's own.

    Returns:
        Markdown with metadata.
    """
    folder = Path(folder)
    if base is None:
        base, revision = recorded_base(folder)
    known = local_paths_of(folder)
    results = without_paths(read_json(folder, RESULTS), known)
    license = license or (base and base_license(base, revision)) or results.get("license")
    card = ModelCard.from_template(
        _metadata(folder, results, base, license, repo_id.split("/")[-1]),
        template_path=str(TEMPLATE),
        repo_id=repo_id,
        title="LoRA adapter for MedCT" if repo_id == PLACEHOLDER_REPO else repo_id.split("/")[-1],
        base=base if is_hub_id(base) else PLACEHOLDER_BASE,
        revision=(revision if is_hub_id(base) else None) or PLACEHOLDER_REVISION,
        base_in_words=_base_in_words(base),
        base_knows_drawings_only=any(knows_drawings_only(name) for name in {base, recorded_base(folder)[0]} if name),
        license=license,
        pictures={name: words for name, words in PICTURES.items() if (folder / name).is_file()},
        generated=GENERATED,
        **_facts(folder, results, known),
    )
    return re.sub(r"\n{3,}", "\n\n", str(card)).rstrip() + "\n"


def _base_in_words(base: str | None) -> str:
    if base is None:
        return "a MedCT model"
    return f"[{base}](https://huggingface.co/{base})" if is_hub_id(base) else f"the MedCT model `{Path(base).name}`"


def _metadata(folder: Path, results: dict[str, Any], base: str | None, license: str | None, name: str) -> ModelCardData:
    synthetic = bool(results.get("synthetic"))
    known: dict[str, Any] = {"license": license, "base_model": base if is_hub_id(base) else None}
    task = "image-classification" if _is_of_classifier(folder) else "zero-shot-image-classification"
    evaluations = _evaluations(results, synthetic, task)
    if evaluations:
        known |= {"eval_results": evaluations, "model_name": name}
    return ModelCardData(
        language="en",
        library_name="peft",
        pipeline_tag=task,
        tags=["medct", "medical", "ct", "chest", "lora", *(["synthetic"] if synthetic else [])],
        **{key: value for key, value in known.items() if value is not None},
    )


def _is_of_classifier(folder: Path) -> bool:
    """Whether an adapter brings a head, which only a classifier has."""
    return "classifier" in (read_json(folder, CONFIG_FILE).get("modules_to_save") or ())


def _evaluations(results: dict[str, Any], synthetic: bool, task: str) -> list[EvalResult]:
    """The adapted model's scores over all labels, in the form of the Hub's model index."""
    adapted = results.get("comparison", {}).get("adapted", {})
    # Folds are pooled: the studies that one adapter was scored on are not those of the figures.
    data = (results.get("folds") and results.get("measured_on")) or _data(results)
    name = f"SYNTHETIC: {data}" if synthetic and "synthetic" not in data.lower() else data
    found = []
    for metric, score in adapted.items():
        if "/" in metric or not isinstance(score, dict) or not isinstance(score.get("value"), int | float):
            continue  # scores of single labels and other protocols are in the files
        kind, words = _HUB_METRICS.get(metric, (metric, metric.replace("_", " ")))
        interval = "" if score.get("low") is None else f", 95 % interval {score['low']:.3f} to {score['high']:.3f}"
        found.append(
            EvalResult(
                task_type=task,
                dataset_type="synthetic" if synthetic else "chest-ct",
                dataset_name=name,
                metric_type=kind,
                metric_name=f"{words}, mean of labels{interval}",
                metric_value=round(score["value"], 4),
            )
        )
    return found


def _data(results: dict[str, Any]) -> str:
    return results.get("data") or results.get("measured_on") or "Nothing is recorded."


def _headline(results: dict[str, Any]) -> str:
    """The mean AUROC before and after, in a sentence."""
    scores = [results.get("comparison", {}).get(which, {}).get("auroc") for which in ("base", "adapted", "difference")]
    if not all(isinstance(score, dict) and score.get("value") is not None for score in scores):
        return ""
    base, adapted, difference = map(_with_interval, scores, ("", "", "+"))
    return f"Mean AUROC: base {base}, adapted {adapted}, difference {difference}.{_forgetting(results)}"


def _forgetting(results: dict[str, Any]) -> str:
    """What became of what the base knew, where that was measured."""
    score = ((results.get("kept") or {}).get("difference") or {}).get("auroc") or {}
    whose = ", of the adapter in this folder alone" if results.get("folds") else ""
    said = f" On what was to be kept{whose}: difference "
    return "" if score.get("value") is None else f"{said}{_with_interval(score, '+')}."


def _with_interval(score: dict[str, float], sign: str) -> str:
    low_and_high = f" ({score['low']:{sign}.3f} to {score['high']:{sign}.3f})" if score.get("low") is not None else ""
    return f"{score['value']:{sign}.3f}{low_and_high}"


def _facts(folder: Path, results: dict[str, Any], known: list[str]) -> dict[str, Any]:
    """The facts about the run that the template shows."""
    description = without_paths(read_json(folder, DESCRIPTION_FILE), known)
    settings = read_json(folder, TRAIN_CONFIG)
    is_classifier = _is_of_classifier(folder)
    if is_classifier:
        settings.pop("objective", None)  # a classifier has but one
    asks = as_described(MedCTConfig(), description).label_prompts() if description.get("label_names") else []
    templates = None if description.get("prompts") else description.get("prompt_templates")
    # A classifier's configuration has templates as well, but nothing asks them.
    prompts = [] if is_classifier else templates or asks or results.get("prompts") or []
    is_reworded = bool(asks and results.get("prompts")) and asks != results["prompts"]
    return {
        "synthetic": bool(results.get("synthetic")),
        "measured_on": results.get("measured_on") or "No scores are recorded.",
        "headline": _headline(results),
        "table": results.get("table", ""),
        "remarks": [*(results.get("remarks") or []), *([_REWORDED] if is_reworded else [])],
        "calibrated": counted(len(description.get("calibration") or {}), "finding"),
        "calibration": description.get("calibration") or {},
        # What a pipeline uses; it may have been chosen after the run.
        "thresholds": {
            label: _threshold(value)
            for label, value in (description.get("thresholds", results.get("thresholds")) or {}).items()
        },
        "chosen_on": _chosen_on(results, is_reworded),
        "data": _data(results),
        "prompts": [each if isinstance(each, str) else " / ".join(each) for each in prompts],
        "training": _training(settings, results, description),
        "hardware": _hardware(results),
        "decided": _decided(results),
        "is_classifier": is_classifier,
    }


def _threshold(value: float) -> str:
    """Three decimals, and as many more as tell it from 0 and 1, which would call every scan present, or hardly any."""
    texts = (f"{value:.{decimals}f}" for decimals in range(3, 17))
    return next((text for text in texts if 0 < float(text) < 1), f"{value:.3f}")


def _training(settings: dict[str, Any], results: dict[str, Any], description: dict[str, Any]) -> list[str]:
    """How the adapter was trained, in words."""
    training = [words.format(settings[key]) for key, words in _TRAINING_FACTS.items() if settings.get(key) is not None]
    if "steps" in results:
        training.append(counted(results["steps"], "step"))
    if results.get("best_step"):
        training.append(f"weights of step {results['best_step']:,}, the best on the tuning patients")
    if results.get("strength") is not None:
        training.append(f"strength {results['strength']:g}: that share of what was learned is in the weights")
    if {"trainable_parameters", "total_parameters"} <= results.keys():
        training.append(f"{results['trainable_parameters']:,} of {results['total_parameters']:,} parameters trained")
    if fingerprint := description.get("base", {}).get("fingerprint"):
        training.append(f"fingerprint of the base: `{fingerprint}`")
    return training


def _chosen_on(results: dict[str, Any], is_reworded: bool) -> str:
    """Which studies the operating points are from."""
    if is_reworded:
        return "the studies that the wording was chosen on"
    return "the tuning patients of its own fold, which other folds held out" if results.get("folds") else _APART


def _decided(results: dict[str, Any]) -> list[str]:
    """What decided the figures, in words, so that they can be repeated."""
    known = results.get("provenance") or {}
    if not known:
        return []
    code, machine = known["code"], known["machine"]
    commit = f", commit `{code['commit']}`{' with changes' if code['modified'] else ''}" if code["commit"] else ""
    said = [f"medct {code['version']}{commit}"]
    said.append(", ".join(f"{name} {version}" for name, version in known["versions"].items()))
    said.append(
        f"{machine['device']}, {counted(machine['processes'], 'process', 'processes')} of "
        f"{counted(machine['threads'], 'thread')}, mixed precision: "
        f"{machine['mixed_precision']}; seed {known['seed']}"
    )
    for name, model in known["models"].items():
        prints = [model[key] for key in ("fingerprint", "adapter_fingerprint") if model.get(key)]
        said.append(f"{name}: {', '.join(f'`{each}`' for each in prints)}")
    for name, studies in known["studies"].items():
        said.append(f"{name}: {counted(studies['scans'], 'scan')}, names `{studies['ids_sha256']}`")
    mapping = (known.get("settings") or {}).get("mapping")
    return [*said, f"labels by the mapping {mapping}"] if mapping else said


def _hardware(results: dict[str, Any]) -> str:
    if "seconds" not in results:
        return "Not recorded."
    hours = results["seconds"] / 3600
    took = f"{hours:.1f} hours" if hours >= 1 else counted(max(1, round(60 * hours)), "minute")
    return (
        f"{took} on {results.get('device') or 'a device that was not recorded'}. Energy and carbon were not measured."
    )
