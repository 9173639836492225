"""Scans in, findings out: tasks of `transformers.pipeline`.

    pipe = pipeline("zero-shot-ct-classification", model=ID, trust_remote_code=True)
    pipe("scan.nii.gz")    # [{"label": "Lung nodule", "score": 0.91, "logits_margin": 2.3}, ...]

A finding is scored by how much nearer the scan lies to "present" than to "not present". Prompts are encoded once for a
set of labels, however many scans follow. "ct-classification" is the same for a classifier, which has labels of its own
and takes no prompts.
"""

import contextlib
import os
import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from transformers import Pipeline, PreTrainedModel
from transformers.pipelines.pt_utils import PipelineIterator

from .adapters_medct import OTHER_WORDS, asked_config, calibrated, description_in_use
from .checks_medct import check_processor, refuse_what_is_no_number
from .configuration_medct import ZERO_SHOT_TASK, MedCTConfig, Prompt
from .errors_medct import MedCTError, first_line, said_of
from .image_processing_medct import MedCTImageProcessor, is_column
from .kernels_medct import row_dtype
from .modeling_medct import zero_shot_probabilities
from .peft_medct import OF_PUSHES
from .processing_medct import MedCTProcessor
from .resampling_medct import ScanPart
from .snapshots_medct import Snapshot, state_of
from .volume_io_medct import Assumed, read_volume
from .volume_medct import VolumeError
from .workers_medct import Lost, PicklesAnywhere, Place, load_ahead, overlapped

_ON_ERROR = ("raise", "return")
_READING = ("spacing_mm", "affine", "rescale_slope", "rescale_intercept", "series", "resample_irregular")


class PromptError(MedCTError, ValueError):
    """Labels or templates that a model cannot be asked for; the message says what they should be."""


class CTPipeline(Pipeline):
    """What all pipelines here share: scans are read by the model's processor, and adapters bring operating points.

    Args:
        adapter: Hub id or folder of a LoRA adapter for the model; needs `peft`. If `model` is itself an adapter, its
            base is loaded with it.
        adapter_revision: Commit of the adapter on the Hub.
        **kwargs: What every pipeline takes: `model`, `processor`, `device`, `batch_size`, and the arguments of a call.
            Without a processor that of the model is loaded.

    Raises:
        ValueError: If the model is not of the pipeline's kind, has no processor or one with other preprocessing, or has
            an untrained head, or if the adapter does not fit it.
    """

    _load_processor = None  # by the library where it can tell, else here
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False
    _needed_attribute = ""
    """What a model must have for this pipeline."""
    _refusal = ""
    """Why a model without it is refused."""
    _encoded_key = ""
    """What `forward` uses of the result of `encode`."""

    def __init__(self, *args, adapter: str | None = None, adapter_revision: str | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self._check_kind()
        if self.processor is None:
            self.processor = _processor_of(self.model)
        check_processor(self.model.config, self.processor)
        if adapter is not None:
            with warnings.catch_warnings():
                # Here its own are asked for. By its text, as the model's code may be another copy of this one.
                warnings.filterwarnings("ignore", message=f".*{OTHER_WORDS}", category=UserWarning)
                self.model.load_adapter(adapter, adapter_kwargs={"revision": adapter_revision})
        self._check_parts()
        self.model.eval()

    def _check_kind(self) -> None:
        if not hasattr(self.model, self._needed_attribute):
            raise ValueError(f"{type(self.model).__name__} {self._refusal}")

    def _check_parts(self) -> None:
        """Refuse a model or a processor that cannot be scored with; either may have been replaced or changed since."""
        self._check_kind()
        check_processor(self.model.config, self.processor)
        if getattr(self.model, "is_drawn", False):  # a model of older code cannot tell
            raise ValueError(
                "The model's head is as it was initialised at random, so its scores mean nothing. Train it first (with "
                f"an adapter: whole, by `modules_to_save`), or ask the model in words: {ZERO_SHOT_TASK}."
            )

    def __call__(self, inputs: Any, **kwargs) -> Any:
        """Score the findings of one scan, a list of scans, or an iterator or dataset of them.

        Args:
            inputs: What `read_volume` takes. A list, or a column of a dataset, holds one scan an entry, so a series as
                a list of DICOM files is a list in a list, or a tuple. An iterator or dataset gives results one by one,
                as they are asked for.
            candidate_labels: Findings to score: names, or a dictionary from names to words for the prompts or pairs of
                sentences, see `MedCTConfig.prompts`. By default those of the adapter in use, else the model's own. A
                classifier takes no others.
            prompt_templates: Pairs of sentences (present, not present) with `{label}` where the finding goes; the
                model's own by default. The scores of several are averaged. A classifier takes none.
            batch_size: Scans that go through the model together.
            num_workers: Processes that read ahead; 0 reads in this one.
            top_k: Give only this many findings a scan, those with the highest scores.
            threshold: Give only findings whose score reaches this, in [0, 1].
            on_error: "raise", or "return": a scan that cannot be read gives `{"error": SENTENCE}` in its place, and the
                others are scored.
            spacing_mm: Of arrays whose axes run as `orientation` says, mm. This, `affine`, `rescale_slope`,
                `rescale_intercept`, `series` and `resample_irregular` go to `MedCTImageProcessor.preprocess`, the same
                for all scans.

        Returns:
            For each scan a list, highest score first, of
            - `label`;
            - `score`: probability of "present" against "not present", in [0, 1];
            - `logits_margin`: logit of "present" minus that of "not present"; `score` is its sigmoid, and with several
              templates both are means;
            - `present`: whether the score reaches the adapter's operating point; only where there is one, and only with
              the model's own templates and the adapter's stored strength, for which it was chosen;
            - `probability`: that of the finding at the adapter's site, in [0, 1]; only where there is a calibration,
              and otherwise like `present`.

        Raises:
            VolumeError: If a source is not a usable CT volume.
            PromptError: If labels, templates, `top_k`, `threshold` or `on_error` are invalid.
            LoaderError: If `num_workers` is.
            NotANumberError: If the model's results are NaN or infinite.
            ValueError: If model and processor do not belong together any more, or the head is untrained.
        """
        if isinstance(inputs, list) and not inputs:
            return []
        if is_column(inputs):  # one scan at a time, as all of them together may not fit into memory
            return list(super().__call__((each for each in inputs), **kwargs))
        if isinstance(inputs, Iterator) and not hasattr(inputs, "read"):  # of these the library knows generators alone
            inputs = (each for each in inputs)
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(self, candidate_labels=None, prompt_templates=None, **kwargs):
        reading = {name: kwargs.pop(name) for name in (*_READING, "on_error") if name in kwargs}
        if reading.get("on_error") not in (None, *_ON_ERROR):
            raise PromptError(f"`on_error` is {' or '.join(map(repr, _ON_ERROR))}, not {reading['on_error']!r}.")
        shown = {name: kwargs.pop(name, None) for name in ("top_k", "threshold")}
        shown = {name: value for name, value in shown.items() if value is not None}
        _check_shown(**shown)
        if kwargs:
            raise TypeError(f"There is no argument {next(iter(kwargs))!r}; see `help(pipe.__call__)`.")
        prompts = self._checked_prompts(candidate_labels, prompt_templates)
        return reading, prompts, prompts | shown

    def preprocess(self, volume: Any, on_error: str = "raise", **reading) -> dict[str, Any]:
        """Read a scan.

        Args:
            volume: What `read_volume` takes.
            on_error: See `__call__`.
            reading: Likewise.

        Returns:
            `pixel_values`, `(1, 1, z, y, x)`, on the model's device, and where errors are returned `error`, "" if there
            is none.
        """
        try:
            batch = self.processor.image_processor([volume], return_tensors="pt", device=self.device, **reading)
        except Exception as error:
            if on_error == "raise":
                raise
            size = (1, 1, *self.processor.image_processor.image_size)
            empty = torch.zeros(size, dtype=torch.float32, device=self.device)
            return {"pixel_values": empty, "error": said_of(error)}
        found = {"pixel_values": batch["pixel_values"]}
        return found if on_error == "raise" else found | {"error": ""}

    def forward(self, model_inputs: dict[str, Any], **prompts: Any) -> dict[str, Any]:
        """Compute what the findings of scans are read from.

        Args:
            model_inputs: From `preprocess`, or from `encode`.
            prompts: `candidate_labels` and `prompt_templates`, see `__call__`.

        Returns:
            For `postprocess`, on the CPU: `logits`, float32, one row a scan.

        Raises:
            PromptError: If labels or templates are invalid, or there is nothing to compute from.
        """
        return super().forward(model_inputs, **prompts)

    def _forward(self, inputs: dict[str, Any], **prompts) -> dict[str, Any]:
        """`logits` of each scan, float32, what was `asked`, and `error` of `preprocess`; takes what `encode` gives.

        Results are of the labels and the adapter that are in use now, whatever is when they are shown.
        """
        prompts = self._checked_prompts(**prompts)
        error = inputs.get("error")
        errors = [error] if isinstance(error, str) else error
        if errors and all(errors):  # there is nothing to be computed
            return {"logits": torch.zeros(len(errors), 1, dtype=torch.float32), "error": error}
        encoded = self.encode(inputs["pixel_values"]) if "pixel_values" in inputs else inputs
        if self._encoded_key not in encoded:
            raise PromptError(f"`forward` takes `pixel_values`, or what `encode` gives, not {', '.join(encoded)}.")
        logits = self._logits(encoded, **prompts)
        # One a scan, as batches are split again.
        found = {"logits": logits, "asked": [(self._all_asked(prompts),)] * len(logits)}
        return found if error is None else found | {"error": error}

    def _checked_prompts(
        self, candidate_labels: Any = None, prompt_templates: Any = None
    ) -> dict[str, Sequence[str] | Mapping[str, Prompt] | Sequence[Sequence[str]]]:
        """What is asked, as a call takes it too, in one form; only what is not the model's own."""
        prompts: dict[str, Any] = {}
        if candidate_labels is not None:
            prompts["candidate_labels"] = _checked_labels(candidate_labels)
        if prompt_templates is not None:
            prompts["prompt_templates"] = _checked_templates(prompt_templates)
        try:  # before a scan is read
            self.model.config.label_prompts(prompts.get("candidate_labels"), prompts.get("prompt_templates"))
        except ValueError as error:
            raise PromptError(str(error)) from error
        return prompts

    def _all_asked(self, prompts: dict[str, Any]) -> dict[str, Any]:
        """What a call asks, the names of the labels, and what the adapter in use remembers."""
        names = self._asked_names(prompts.get("candidate_labels"))
        return {"prompts": prompts, "labels": names, "description": self._description()}

    def _asked_names(self, candidate_labels: Sequence[str] | Mapping[str, Prompt] | None) -> Sequence[str]:
        return self.asked.label_names if candidate_labels is None else list(candidate_labels)

    def _one_scan(self, outputs: dict[str, Any], **prompts) -> tuple[torch.Tensor, dict[str, Any]]:
        """The logits of the one scan in what `forward` gave, and what it was asked, see `_all_asked`.

        Raises:
            PromptError: If there are several scans, or they were asked something else than is said here.
        """
        if len(outputs["logits"]) != 1:
            raise PromptError('`postprocess` takes one scan at a time: pass `{"logits": logits[i : i + 1]}` of each.')
        prompts = self._checked_prompts(**prompts)
        asked = outputs.get("asked")
        while isinstance(asked, list | tuple):
            asked = asked[0]
        if asked is not None and prompts and prompts != asked["prompts"]:
            raise PromptError(
                "`postprocess` was given other labels or templates than `forward`. Pass the same to both."
            )
        return outputs["logits"][0], self._all_asked(prompts) if asked is None else asked

    def get_iterator(
        self,
        inputs: Any,
        num_workers: int,
        batch_size: int,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> Iterable[Any]:
        """Results one by one; with `num_workers`, other processes read ahead.

        Args:
            inputs: Scans, see `__call__`.
            num_workers: Processes; the library's own would be one at most, and read float volumes through a pipe.
            batch_size: Scans that go through the model together.
            preprocess_params, forward_params, postprocess_params: From `_sanitize_parameters`.
        """
        if not num_workers:
            steps = (preprocess_params, forward_params, postprocess_params)
            return super().get_iterator(inputs, 0, batch_size, *steps)
        if hasattr(inputs, "__len__"):  # a dataset need not say where it ends
            inputs = map(inputs.__getitem__, range(len(inputs)))
        reading = dict(preprocess_params)
        gives_errors = reading.pop("on_error", "raise") == "return"
        load = _LoadScan(self.processor.image_processor, self.device, reading, gives_errors)
        loaded = load_ahead(inputs, load, num_workers, batch_size, pinned=self.device.type == "cuda")
        batches = overlapped(_batches(loaded, load, batch_size), self.device, _tensors_of)
        outputs = PipelineIterator(batches, self.forward, forward_params, loader_batch_size=batch_size)
        return _closing(batches, PipelineIterator(outputs, self.postprocess, postprocess_params))

    def _results(
        self,
        labels: Sequence[str],
        scores: torch.Tensor,
        margins: torch.Tensor,
        description: dict[str, Any],
        top_k: int | None = None,
        threshold: float = 0.0,
    ) -> list[dict[str, Any]]:
        """Findings of one scan, highest score first, from `(labels,)` each and what the adapter remembers."""
        results = []
        thresholds, calibration = (description.get(what) or {} for what in ("thresholds", "calibration"))
        for label, score, margin in zip(labels, scores.tolist(), margins.tolist(), strict=True):
            result = {"label": label, "score": score, "logits_margin": margin}
            if label in thresholds:
                result["present"] = score >= thresholds[label]
            if label in calibration:
                result["probability"] = float(calibrated(score, *calibration[label]))
            results.append(result)
        results = sorted(results, key=lambda result: -result["score"])
        return [result for result in results if result["score"] >= threshold][:top_k]

    @property
    def thresholds(self) -> dict[str, float]:
        """Operating points of the adapter in use: from which score on a finding is called present, by its label."""
        return self._description().get("thresholds") or {}

    @property
    def calibration(self) -> dict[str, list[float]]:
        """Slope and intercept of the adapter in use, by label; see `calibrated`."""
        return self._description().get("calibration") or {}

    @property
    def asked(self) -> MedCTConfig:
        """The configuration with the labels and prompts that are asked for: the adapter's, if one is in use."""
        return asked_config(self.model)

    def _description(self) -> dict[str, Any]:
        """What the adapter in use remembers; nothing if several are."""
        return description_in_use(self.model)

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """Save model and processor, and push both if asked to; the library's own method would leave out the latter."""
        is_pushed = kwargs.pop("push_to_hub", False)
        pushing = {name: kwargs.pop(name) for name in OF_PUSHES if name in kwargs}
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)
        if is_pushed:
            repo_id = pushing.pop("repo_id", Path(save_directory).name)
            self.push_to_hub(repo_id, token=kwargs.get("token"), **pushing)


class ZeroShotCTClassificationPipeline(CTPipeline):
    """Scores of findings for CT scans, without training; see `CTPipeline` for its arguments."""

    _needed_attribute = "get_text_features"
    _encoded_key = "image_embeds"
    _refusal = "has no text encoder, so it cannot be asked for findings in words. Pass a MedCTModel."
    # The prompts of `prompt_embeds` with what they were encoded with, and what became of them; replaced as a whole.
    _kept: tuple[Snapshot, list[torch.Tensor]] | None = None

    @torch.no_grad()
    def encode(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Encode scans, whatever the model is asked about them: `forward` takes the result in place of the scans.

        Args:
            pixel_values: `(volumes, 1, z, y, x)`.

        Returns:
            `image_embeds`, `(volumes, projection_dim)`, float32, of length 1; `last_hidden_state`, `(volumes, tokens,
            hidden_size)`.
        """
        self._check_parts()
        with _without_dropout(self.model):
            outputs = self.model.get_image_features(_checked_volumes(pixel_values).to(self.device))
        refuse_what_is_no_number(outputs.pooler_output)
        return {"image_embeds": outputs.pooler_output.float(), "last_hidden_state": outputs.last_hidden_state}

    def _logits(self, encoded: dict[str, torch.Tensor], **prompts) -> torch.Tensor:
        """`(volumes, templates, 2 * labels)`."""
        text_embeds = self.prompt_embeds(**prompts)
        return torch.stack([self.model.get_logits(encoded["image_embeds"], texts) for texts in text_embeds], dim=1)

    def postprocess(
        self,
        outputs: dict[str, Any],
        candidate_labels: Sequence[str] | None = None,
        prompt_templates: Sequence[Sequence[str]] | None = None,
        **shown: Any,
    ) -> list[dict[str, Any]] | dict[str, str]:
        """Turn logits into findings, highest score first.

        Args:
            outputs: `logits` of one scan, from `forward`.
            candidate_labels: Findings that were asked for; those of `forward` by default.
            prompt_templates: Those that were used, likewise; with words of one's own there are no operating points.
            shown: `top_k` and `threshold`, see `__call__`.

        Raises:
            PromptError: If there are several scans, or `forward` was asked something else.
        """
        if error := outputs.get("error"):
            return {"error": error}
        logits, asked = self._one_scan(  # (templates, 2 * labels)
            outputs, candidate_labels=candidate_labels, prompt_templates=prompt_templates
        )
        prompts = asked["prompts"]
        has_own_words = "prompt_templates" in prompts or isinstance(prompts.get("candidate_labels"), Mapping)
        scores = zero_shot_probabilities(logits).mean(dim=0)
        present, absent = logits.mean(dim=0).unflatten(-1, (-1, 2)).unbind(-1)
        description = {} if has_own_words else asked["description"]
        return self._results(asked["labels"], scores, present - absent, description, **shown)

    def prompt_embeds(
        self,
        candidate_labels: Sequence[str] | Mapping[str, Prompt] | None = None,
        prompt_templates: Sequence[Sequence[str]] | None = None,
    ) -> list[torch.Tensor]:
        """The prompts in the common space; those of the last labels and templates are kept as long as they hold.

        They hold for the very tokens, weights, adapters and their settings that they were encoded with, compared by
        value: it costs a copy of the text encoder's weights, and a tenth of the time of encoding them. Several threads
        may ask.

        Args:
            candidate_labels: The model's own by default.
            prompt_templates: Likewise; those that the adapter in use has chosen, and its names of the labels, if it has
                (`medct prompts --store`).

        Returns:
            For each template `(2 * labels, projection_dim)`, float32, of length 1.
        """
        sentences = self.asked.label_prompts(candidate_labels, prompt_templates)
        # Outside of inference mode, whose tensors cannot be used in training later.
        with torch.inference_mode(False), torch.no_grad(), _without_dropout(self.model):
            texts = [self.processor(text=template, return_tensors="pt").to(self.device) for template in sentences]
            state = self._text_state(texts)
            kept = self._kept
            if kept is not None and state is not None and kept[0].equals(*state):
                return kept[1]
            snapshot = None if state is None else Snapshot(*state)
            if remark := self.processor.remark_on_words(sentences, self._asked_names(candidate_labels)):
                warnings.warn(remark, stacklevel=2)
            encode = self.model.get_text_features
            embeds = [encode(each["input_ids"], each["attention_mask"]).pooler_output.float() for each in texts]
            self._kept = None if snapshot is None else (snapshot, embeds)
        return embeds

    def _text_state(self, texts: Sequence[Mapping[str, torch.Tensor]]) -> tuple[dict[str, torch.Tensor], str] | None:
        """All that the embeddings of texts depend on; see `state_of`."""
        state = state_of((self.model.text_model, self.model.text_projection))
        if state is None:
            return None
        tokens = {f"{index} {name}": ids for index, each in enumerate(texts) for name, ids in each.items()}
        return state[0] | tokens, f"{state[1]}\n{row_dtype(texts[0]['input_ids'], torch.float32)}"


class CTClassificationPipeline(CTPipeline):
    """Scores of the labels that a classifier was trained on; see `CTPipeline` for its arguments."""

    _needed_attribute = "classifier"
    _encoded_key = "logits"
    _refusal = "has no classifier. Pass a MedCTForImageClassification, or ask in words: zero-shot-ct-classification."

    def _sanitize_parameters(self, candidate_labels=None, prompt_templates=None, **kwargs):
        if prompt_templates is not None:
            raise PromptError("A classifier is not asked in words. Leave out `prompt_templates`.")
        reading, _, shown = super()._sanitize_parameters(candidate_labels, **kwargs)
        self._known(shown.get("candidate_labels", self.model.config.label_names))
        return reading, {}, shown

    def _known(self, labels: Any) -> Sequence[str]:
        """Labels that the classifier has.

        Raises:
            PromptError: If it lacks one.
        """
        labels = list(_checked_labels(labels))
        if unknown := sorted(set(labels) - set(self.model.config.label_names)):
            raise PromptError(
                f"This classifier was not trained on {', '.join(unknown)}. Its labels: "
                f"{', '.join(self.model.config.label_names)}."
            )
        return labels

    @torch.no_grad()
    def encode(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute the logits of scans: `forward` takes them in place of the scans.

        Args:
            pixel_values: `(volumes, 1, z, y, x)`.

        Returns:
            `logits`, `(volumes, labels)`, float32.
        """
        self._check_parts()
        with _without_dropout(self.model):
            logits = self.model(pixel_values=_checked_volumes(pixel_values).to(self.device)).logits.float()
        refuse_what_is_no_number(logits)
        return {"logits": logits}

    def _logits(self, encoded: dict[str, torch.Tensor], **_: Any) -> torch.Tensor:
        """`(volumes, labels)`."""
        return encoded["logits"]

    def postprocess(
        self, outputs: dict[str, Any], candidate_labels: Sequence[str] | None = None, **shown: Any
    ) -> list[dict[str, Any]] | dict[str, str]:
        """Findings of one scan, highest score first.

        Args:
            outputs: `logits`, `(1, labels)`, from `_forward`.
            candidate_labels: The model's own by default.
            shown: `top_k` and `threshold`, see `__call__`.
        """
        if error := outputs.get("error"):
            return {"error": error}
        logits, asked = self._one_scan(outputs)
        names = asked["labels"]
        labels = names if candidate_labels is None else self._known(candidate_labels)
        # Each label's logit is that of its presence against its absence.
        margins = logits[[names.index(label) for label in labels]]
        return self._results(labels, margins.sigmoid(), margins, asked["description"], **shown)


@dataclass(frozen=True)
class _LoadScan(PicklesAnywhere):
    """Reads scans in other processes."""

    image_processor: MedCTImageProcessor
    device: torch.device
    reading: dict[str, Any]
    gives_errors: bool

    def __call__(self, source: Any, place: Place) -> "ScanPart | torch.Tensor | _Failed":
        try:
            return self._load(source, place)
        except Exception as error:
            if not self.gives_errors:
                raise
            return _Failed(said_of(error))

    def _load(self, source: Any, place: Place) -> ScanPart | torch.Tensor:
        place.begin(str(source) if isinstance(source, str | os.PathLike) else "")
        options = {"orientation": Assumed(self.image_processor.orientation), **self.reading}
        return self.image_processor.load(read_volume(source, **options), place, self.device)


@dataclass(frozen=True)
class _Failed:
    """A scan that cannot be read, and why, in a sentence."""

    reason: str


def _closing(source: Generator[Any, None, None], results: Iterable[Any]) -> Generator[Any, None, None]:
    """Results that end what they come from when they end, even by an error that a notebook keeps, and with it them."""
    with contextlib.closing(source):
        yield from results


def _tensors_of(batch: dict[str, Any]) -> list[torch.Tensor]:
    return [batch["pixel_values"]]


def _batches(loaded: Generator[Any, None, None], load: _LoadScan, size: int) -> Generator[dict[str, Any], None, None]:
    shape = (1, *load.image_processor.image_size)
    with contextlib.closing(loaded):
        while parts := list(islice(loaded, size)):
            pixel_values = torch.empty(len(parts), *shape, dtype=torch.float32, device=load.device)
            errors = []
            for part, out in zip(parts, pixel_values, strict=True):
                if isinstance(part, Lost):
                    lost = VolumeError(part.name or "a scan", part.reason, "Try it alone")
                    if not load.gives_errors:
                        raise lost
                    part = _Failed(str(lost))
                errors.append(part.reason if isinstance(part, _Failed) else "")
                if isinstance(part, _Failed):
                    out.zero_()
                else:
                    load.image_processor.finish(part, out[0])
            del part, parts  # their memory can be used again
            batch = {"pixel_values": pixel_values}
            # Of one scan a text and of several a list, as the library's own batches have it.
            yield batch | {"error": errors[0] if size == 1 else errors} if load.gives_errors else batch


@contextlib.contextmanager
def _without_dropout(model: torch.nn.Module) -> Iterator[None]:
    """Score with a model that may be in training, which goes on as it was."""
    in_training = [module for module in model.modules() if module.training]
    for module in in_training:
        module.training = False
    try:
        yield
    finally:
        for module in in_training:
            module.training = True


def _processor_of(model: PreTrainedModel) -> MedCTProcessor:
    """The processor that lies beside a model's weights."""
    options = dict(getattr(model, "_place", {}))
    if __name__.startswith("transformers_modules."):
        options["trust_remote_code"] = True  # it runs already; the library would ask, and name that as the cause
    try:
        return MedCTProcessor.from_pretrained(model.name_or_path, **options)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"A pipeline needs the model's processor ({first_line(error)}): pass `processor=`.") from error


def _checked_volumes(pixel_values: Any) -> torch.Tensor:
    if not isinstance(pixel_values, torch.Tensor) or pixel_values.ndim != 5:
        raise ValueError(
            "`encode` takes the tensor `pixel_values`, (volumes, 1, z, y, x), as `pipe.preprocess` makes it of a scan."
        )
    return pixel_values


def _check_shown(top_k: int = 1, threshold: float = 0.0) -> None:
    if not isinstance(top_k, Integral) or top_k < 1:
        raise PromptError(f"`top_k` is a whole number of at least 1, not {top_k!r}.")
    if not isinstance(threshold, Real) or not 0 <= threshold <= 1:
        raise PromptError(f"`threshold` is a score in [0, 1], not {threshold!r}.")


def _checked_labels(labels: Any) -> list[str] | dict[str, Prompt]:
    given = [labels] if isinstance(labels, str) else dict(labels) if isinstance(labels, Mapping) else _listed(labels)
    if not given or not all(isinstance(label, str) and label.strip() for label in given):
        raise PromptError(f"`candidate_labels` is a list of findings in words, not {labels!r}.")
    return given


def _checked_templates(templates: Any) -> tuple[tuple[str, ...], ...]:
    given = [] if isinstance(templates, str) else _listed(templates)
    if not given:
        raise PromptError(
            '`prompt_templates` is a list of pairs of sentences, such as [("There is {label}.", "There is no '
            f'{{label}}.")], not {templates!r}.'
        )
    if all(isinstance(sentence, str) for sentence in given) and len(given) == 2:
        given = [given]  # a single pair
    return tuple(tuple(pair) if isinstance(pair, list) else pair for pair in given)


def _listed(values: Any) -> list[Any]:
    return list(values) if isinstance(values, Iterable) else []


__all__ = ["CTClassificationPipeline", "ZeroShotCTClassificationPipeline"]
