"""What a report says of one study, whatever its form: the findings, and what they were made with."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file, extract_commit_hash

import medct
from medct.adapters_medct import CONFIG_FILE, WEIGHTS_FILE, fingerprint
from medct.common.drawings import knows_drawings_only
from medct.common.files import file_sha256
from medct.configuration_medct import Prompt
from medct.pipeline_medct import CTPipeline, ZeroShotCTClassificationPipeline

WARNING = "Research only: not a diagnosis, not checked by a physician, not for clinical use."
SYNTHETIC = "The model was trained on synthetic drawings: what it says about a patient means nothing."
NO_PROBABILITY = "A score ranks scans; it is not a probability of disease."


@dataclass(frozen=True)
class Finding:
    """One finding of one study.

    Args:
        label: Its name.
        score: In [0, 1]; no probability of disease.
        threshold: Least score that is called present; `None` without an operating point.
        probability: Calibrated for the adapter's site, in [0, 1]; `None` without a calibration.
    """

    label: str
    score: float
    threshold: float | None = None
    probability: float | None = None

    @property
    def is_present(self) -> bool | None:
        """Whether the score reaches the operating point; `None` without one."""
        return None if self.threshold is None else self.score >= self.threshold

    @property
    def call(self) -> str:
        """The same in words."""
        return {True: "above", False: "below", None: "no operating point"}[self.is_present]

    @property
    def figures(self) -> tuple[str, str | None]:
        """Score and operating point for people: three decimals, and as many more as tell one from the other."""
        if self.threshold is None:
            return f"{self.score:.3f}", None
        for decimals in range(3, 17):
            score, threshold = (f"{number:.{decimals}f}" for number in (self.score, self.threshold))
            if score != threshold or self.score == self.threshold:
                break
        return score, threshold


def shown_probability(probability: float) -> str:
    """A probability for people: two decimals, and never 0 or 1, since no calibration makes certain."""
    text = f"{probability:.2f}"
    return {"0.00": "<0.01", "1.00": ">0.99"}.get(text, text)


def findings_of(
    results: Sequence[Mapping[str, Any]], labels: Sequence[str], thresholds: Mapping[str, float]
) -> list[Finding]:
    """What a pipeline found in one scan.

    Args:
        results: From the pipeline, in any order.
        labels: In the order wanted.
        thresholds: The pipeline's; used where it has called a finding present or absent.
    """
    by_label = {result["label"]: result for result in results}
    found = []
    for label in labels:
        result = by_label[label]
        threshold = thresholds[label] if "present" in result else None
        found.append(Finding(label, result["score"], threshold, result.get("probability")))
    return found


@dataclass(frozen=True)
class Algorithm:
    """What scores were made with. No path of this machine is in it.

    Args:
        model: Hub id, or name of the folder.
        model_commit: Commit on the Hub, or fingerprint of the weights.
        adapter: Hub id, or name of the folder; `None` without one.
        adapter_commit: Commit on the Hub, or digest of the weights.
        own_prompts: Pairs of sentences that stood in for the model's own; those of one label begin with its name.
        is_synthetic: Whether model or adapter have learned from drawings alone.
    """

    model: str
    model_commit: str | None
    adapter: str | None = None
    adapter_commit: str | None = None
    own_prompts: tuple[str, ...] = ()
    is_synthetic: bool = False

    name = "MedCT"
    version = medct.__version__

    @property
    def parameters(self) -> list[str]:
        """All of it, one line each."""
        lines = [f"model: {self.model}", f"{kind_of(self.model_commit)}: {self.model_commit or 'not known'}"]
        if self.adapter is not None:
            which = f"{kind_of(self.adapter_commit)} of the adapter"
            lines += [f"adapter: {self.adapter}", f"{which}: {self.adapter_commit or 'not known'}"]
        return [*lines, *(f"prompts: {prompt}" for prompt in self.own_prompts)]

    @property
    def warning(self) -> str:
        """What every form of the report says first."""
        return f"{WARNING} {SYNTHETIC}" if self.is_synthetic else WARNING


def said_of_scan(notes: Sequence[str]) -> list[str]:
    """What was noted when the scan was read, one line each."""
    return [f"note on the scan: {note}" for note in notes]


def kind_of(commit: str | None) -> str:
    """What to call what an `Algorithm` has as a commit: of a folder, it is the fingerprint of its weights."""
    return "fingerprint" if commit is not None and commit.startswith("sha256") else "commit"


def algorithm_of(
    pipe: CTPipeline,
    model: str,
    adapter: str | None = None,
    adapter_revision: str | None = None,
    **prompts: Any,
) -> Algorithm:
    """What a pipeline scores with.

    Args:
        pipe: With the model and the adapter.
        model: Hub id or folder that the model came from.
        adapter: Hub id or folder that the adapter came from.
        adapter_revision: Commit, tag or branch of the adapter.
        prompts: `candidate_labels` and `prompt_templates`, as the pipeline takes them.
    """
    commit = pipe.model._place.get("revision") or fingerprint(pipe.model)
    adapter_commit = None if adapter is None else _commit_of(adapter, adapter_revision)
    is_synthetic = any(knows_drawings_only(name) for name in (model, adapter) if name is not None)
    return Algorithm(
        public_name(model),
        commit,
        adapter and public_name(adapter),
        adapter_commit,
        tuple(_own_prompts(pipe, **prompts)),
        is_synthetic,
    )


def _own_prompts(
    pipe: CTPipeline,
    candidate_labels: Sequence[str] | Mapping[str, Prompt] | None = None,
    prompt_templates: Sequence[Sequence[str]] | None = None,
) -> Iterator[str]:
    """The sentences that are not the model's own, whether a run or the adapter brings them; see `Algorithm`."""
    if not isinstance(pipe, ZeroShotCTClassificationPipeline):
        return
    base, asked = pipe.model.config, pipe.asked
    templates = _as_lists(asked.prompt_templates if prompt_templates is None else prompt_templates)
    if templates != _as_lists(base.prompt_templates):
        yield from map("|".join, templates)
    labels = asked.label_names if candidate_labels is None else candidate_labels
    for label in labels:
        of_label = {label: labels[label]} if isinstance(labels, Mapping) else [label]
        sentences = asked.label_prompts(of_label, prompt_templates)
        by_name = [[sentence.replace("{label}", label) for sentence in pair] for pair in templates]
        if sentences not in (by_name, base.label_prompts([label])):
            yield from (f"{label}: {'|'.join(pair)}" for pair in sentences)


def _as_lists(pairs: Sequence[Sequence[str]]) -> list[list[str]]:
    return [list(pair) for pair in pairs]


def public_name(name: str) -> str:
    """A Hub id as it is; of a folder its name alone."""
    return Path(name).resolve().name if Path(name).is_dir() else name


def _commit_of(name: str, revision: str | None) -> str | None:
    """The commit that an adapter was loaded from; of a folder the SHA-256 of its weights."""
    if Path(name).is_dir():
        weights = Path(name, WEIGHTS_FILE)
        return f"sha256:{file_sha256(weights)}" if weights.is_file() else None
    return extract_commit_hash(cached_file(name, CONFIG_FILE, revision=revision, local_files_only=True), None)
