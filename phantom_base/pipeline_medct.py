"""Scans in, findings out: the task "zero-shot-ct-classification" of `transformers.pipeline`.

    pipe = pipeline("zero-shot-ct-classification", model=ID, trust_remote_code=True)
    pipe("scan.nii.gz")    # [{"label": "Lung nodule", "score": 0.91, "logits_margin": 2.3}, ...]

A finding is scored by how much nearer the scan lies to "present" than to "not present". Prompts are encoded once for a
set of labels, however many scans follow.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import Pipeline

from .adapters_medct import calibrated
from .modeling_medct import zero_shot_probabilities

_READING = ("spacing_mm", "affine", "rescale_slope", "rescale_intercept", "series", "resample_irregular")


class ZeroShotCTClassificationPipeline(Pipeline):
    """Scores of findings for CT scans, without training.

    Args:
        adapter: Hub id or folder of a LoRA adapter for the model; needs `peft`. An adapter as the `model` itself brings
            its base along.
        adapter_revision: Commit of the adapter on the Hub.
        **kwargs: What every pipeline takes: `model`, `processor`, `device`, `batch_size`, and the arguments of a call.

    Raises:
        ValueError: If the model compares no volumes with texts, has no processor, or the adapter is not its own.
    """

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, *args, adapter: str | None = None, adapter_revision: str | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        if not hasattr(self.model, "get_text_features"):
            raise ValueError(
                f"{type(self.model).__name__} has no text encoder, so it cannot be asked for findings in words. Pass a "
                "MedCTModel."
            )
        if self.processor is None:
            raise ValueError("A pipeline needs the model's processor: pass `processor=`.")
        self._kept_embeds: tuple[Any, list[torch.Tensor]] | None = None
        if adapter is not None:
            self.model.load_adapter(adapter, adapter_kwargs={"revision": adapter_revision})
        self.model.eval()

    def __call__(self, inputs: Any, **kwargs) -> Any:
        """Score the findings of one scan, a list of scans, or a generator or dataset of them.

        Args:
            inputs: What `read_volume` takes. A list holds one scan an entry, so a series as a list of DICOM files is a
                list in a list, or a tuple. A generator or dataset gives results one by one, as they are asked for.
            candidate_labels: Findings to score; the model's own by default.
            prompt_templates: Pairs of sentences (present, not present) with `{label}` where the finding goes; the
                model's own by default. The scores of several are averaged.
            batch_size: Scans that go through the model together.
            spacing_mm: Of arrays, `(z, y, x)`, mm. This, `affine`, `rescale_slope`, `rescale_intercept`, `series` and
                `resample_irregular` go to `MedCTImageProcessor.preprocess`, the same for all scans.

        Returns:
            For each scan a list, highest score first, of
            - `label`;
            - `score`: probability of "present" against "not present", in [0, 1];
            - `logits_margin`: logit of "present" minus that of "not present"; `score` is its sigmoid, and with several
              templates both are means;
            - `present`: whether the score reaches the adapter's operating point; only where there is one, and only with
              the model's own templates, for which it was chosen;
            - `probability`: that of the finding at the adapter's site, in [0, 1], where there is a calibration; like
              `present`, with the model's own templates and the adapter's own strength only.

        Raises:
            VolumeError: If a source is no usable CT volume.
            ValueError: If labels or templates are not what they should be.
        """
        if isinstance(inputs, list) and not inputs:
            return []
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(self, candidate_labels=None, prompt_templates=None, **kwargs):
        reading = {name: kwargs.pop(name) for name in _READING if name in kwargs}
        if kwargs:
            raise TypeError(f"There is no argument {next(iter(kwargs))!r}; see `help(pipe.__call__)`.")
        prompts: dict[str, Any] = {}
        if candidate_labels is not None:
            prompts["candidate_labels"] = _checked_labels(candidate_labels)
        if prompt_templates is not None:
            prompts["prompt_templates"] = tuple(map(tuple, _checked_templates(prompt_templates)))
        return reading, prompts, prompts

    def preprocess(self, volume: Any, **reading) -> dict[str, torch.Tensor]:
        """Returns `pixel_values`, `(1, 1, z, y, x)`."""
        batch = self.processor.image_processor([volume], return_tensors="pt", **reading)
        return {"pixel_values": batch["pixel_values"]}

    def _forward(self, inputs: dict[str, torch.Tensor], **prompts) -> dict[str, torch.Tensor]:
        """Returns `logits`, `(volumes, templates, 2 * labels)`, float32."""
        image_embeds = self.model.get_image_features(inputs["pixel_values"]).pooler_output.float()
        text_embeds = self.prompt_embeds(**prompts)
        return {"logits": torch.stack([self.model.get_logits(image_embeds, texts) for texts in text_embeds], dim=1)}

    def postprocess(
        self,
        outputs: dict[str, torch.Tensor],
        candidate_labels: Sequence[str] | None = None,
        prompt_templates: Sequence[Sequence[str]] | None = None,
    ) -> list[dict[str, Any]]:
        labels = self.model.config.label_names if candidate_labels is None else candidate_labels
        logits = outputs["logits"][0]  # (templates, 2 * labels)
        scores = zero_shot_probabilities(logits).mean(0).tolist()
        present, absent = logits.unflatten(-1, (-1, 2)).mean(0).unbind(-1)
        results = []
        for label, score, margin in zip(labels, scores, (present - absent).tolist(), strict=True):
            result = {"label": label, "score": score, "logits_margin": margin}
            if prompt_templates is None and label in self.thresholds:
                result["present"] = score >= self.thresholds[label]
            if prompt_templates is None and label in self.calibration:
                result["probability"] = float(calibrated(score, *self.calibration[label]))
            results.append(result)
        return sorted(results, key=lambda result: -result["score"])

    @property
    def thresholds(self) -> dict[str, float]:
        """Operating points of the adapter in use: from which score on a finding is called present, by its label."""
        return self._remembered("thresholds")

    @property
    def calibration(self) -> dict[str, list[float]]:
        """Slope and intercept of the adapter in use, by label; see `calibrated`."""
        return self._remembered("calibration")

    def _remembered(self, what: str) -> dict[str, Any]:
        """By label; nothing with several adapters, or one at another strength than it was made for."""
        in_use = self._adapters_in_use()
        if len(in_use) != 1 or not math.isclose(self.model.adapter_strength(in_use[0]), 1, rel_tol=1e-6):
            return {}
        return self.model.adapter_descriptions.get(in_use[0], {}).get(what) or {}

    def _adapters_in_use(self) -> list[str]:
        # Layers of PEFT know whether they are disabled; `active_adapters` names them all the same.
        is_disabled = any(getattr(module, "disable_adapters", None) is True for module in self.model.modules())
        if is_disabled or not getattr(self.model, "_hf_peft_config_loaded", False):
            return []
        return self.model.active_adapters()

    @torch.no_grad()
    def prompt_embeds(
        self, candidate_labels: Sequence[str] | None = None, prompt_templates: Sequence[Sequence[str]] | None = None
    ) -> list[torch.Tensor]:
        """The prompts in the common space; those of the last labels, templates and adapter are kept.

        Args:
            candidate_labels: The model's own by default.
            prompt_templates: Likewise.

        Returns:
            For each template `(2 * labels, projection_dim)`, float32, of length 1.
        """
        sentences = self.model.config.label_prompts(candidate_labels, prompt_templates)
        adapters = {name: self.model.adapter_strength(name) for name in self._adapters_in_use()}
        key = (sentences, adapters, self.model.dtype)
        if self._kept_embeds is None or self._kept_embeds[0] != key:
            embeds = []
            for template in sentences:
                texts = self.processor(text=template, return_tensors="pt").to(self.device)
                embeds.append(
                    self.model.get_text_features(texts["input_ids"], texts["attention_mask"]).pooler_output.float()
                )
            self._kept_embeds = key, embeds
        return self._kept_embeds[1]

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """Save model and processor; the library's own method would leave out the processor."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)


def _checked_labels(labels: Any) -> list[str]:
    labels = [labels] if isinstance(labels, str) else list(labels)
    if not labels or not all(isinstance(label, str) and label.strip() for label in labels):
        raise ValueError(f"`candidate_labels` is a list of findings in words, not {labels!r}.")
    return labels


def _checked_templates(templates: Any) -> Sequence[Sequence[str]]:
    if isinstance(templates, str) or not len(templates):
        raise ValueError(
            '`prompt_templates` is a list of pairs of sentences, such as [("There is {label}.", "There is no '
            f'{{label}}.")], not {templates!r}.'
        )
    if all(isinstance(sentence, str) for sentence in templates) and len(templates) == 2:
        return [templates]  # a single pair
    return templates


__all__ = ["ZeroShotCTClassificationPipeline"]
