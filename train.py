"""Adapt MedCT to a source of scans with LoRA, and score it before and after.

    accelerate launch train.py                         # synthetic phantoms, no network, a few minutes on a laptop
    accelerate launch train.py --model ORG/NAME --revision COMMIT --data SOURCE    # your scans; see docs/training.md

Except with `--recipe full`, only what is put beside the base's Linears is trained; that the base stayed as it was, to
the byte, is checked before anything is saved. The output folder appears only when it is complete; until then
checkpoints lie in a folder of the same name with `.unfinished`, and `--resume` continues from there.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from peft import PeftModel
from transformers import get_cosine_schedule_with_warmup

from medct.adapters_medct import adapter_fingerprint, describe_adapter, fingerprint
from medct.checks_medct import preprocessing
from medct.common.counting import counted
from medct.common.digest import digest
from medct.common.distributed import process_rank, refuse_different, refuse_unshared, shard, sum_gradients
from medct.common.errors import StoppedError
from medct.common.files import refuse_taken, write_json
from medct.common.host import device_name, keep_freed_memory, peak_memory_bytes
from medct.common.lock import only_run
from medct.common.paths import local_paths, without_paths
from medct.common.progress import tqdm
from medct.common.run_files import RESULTS, TRAIN_CONFIG
from medct.data.label_space import read_label_flags
from medct.data.loader import StudyLoader
from medct.data.sources import why_skipped
from medct.evaluation.metrics import zero_shot_scores
from medct.evaluation.operating_points import wanted_points
from medct.evaluation.predictions import Predictions, short_names
from medct.evaluation.provenance import list_checksum, provenance
from medct.evaluation.record import write_record
from medct.evaluation.scoring import (
    ScoredStudies,
    Texts,
    about_model,
    embed_prompts,
    has_same_labels,
    is_classifier,
    prompts_for,
    refuse_shares,
    remark_on_words,
    score_studies,
    score_versions,
    texts_to,
)
from medct.modeling_medct import MedCTModel
from medct.publishing.loading import resolve_name
from medct.training.best import BestSoFar
from medct.training.checkpoints import Checkpoints, TrainingState
from medct.training.folds import cross_validate
from medct.training.handing_out import draw_pictures, tell, write_readme
from medct.training.launch import commit_of_base, load_base, make_accelerator, shards_by_launch
from medct.training.lora import (
    add_lora,
    core,
    frozen_tensors,
    leave_casts_to_autocast,
    note_start,
    save_weights,
    trains_text,
    unlock,
    weights_to_save,
)
from medct.training.lora import trainable as trainable_parameters
from medct.training.objectives import StepLoss, recomputing
from medct.training.replay import drawn_names
from medct.training.results import (
    ADAPTED,
    BASE,
    KEPT_SPLITS,
    SPLITS,
    SYNTHETIC,
    Scored,
    compare_all,
    few_steps,
    in_common,
    lower_precision,
    mean_auroc,
    predictions_of,
    remarks_on,
    repeatable,
)
from medct.training.run_folder import RunFolder
from medct.training.settings import (
    NO_SOURCE,
    TrainingError,
    TrainingSettings,
    check,
    complete,
    run_command,
)
from medct.training.sources import (
    batches_per_pass,
    digest_of_studies,
    endless,
    has_different_reports,
    has_known_label,
    load_sources,
    mappings_of,
    number_of_steps,
    remarks_on_labels,
    remarks_on_overlap,
)
from medct.training.stopping import StopWish
from medct.training.strength import Choice, Line, choose_strength


class Trainer:
    """One run, from base to folder.

    Args:
        settings: Of the run.

    Raises:
        TrainingError, DataError, VolumeError, OtherSettingsError, OSError: With what is wrong and what to do.
    """

    def __init__(self, settings: TrainingSettings):
        # accelerate has a flag for it, too
        fsdp2 = settings.fsdp2 or shards_by_launch()
        model = resolve_name(settings.model, revision=settings.revision)
        settings = dataclasses.replace(settings, model=model, fsdp2=fsdp2)
        check(settings)
        self.started = time.monotonic()
        self.folder = RunFolder(settings.output_dir, settings.resume)
        self.accelerator = make_accelerator(settings, self.folder.work)
        set_seed(settings.seed)
        self.base, self.processor = load_base(settings)
        asks = (settings.labels, settings.templates, settings.mapping)
        self.base.config, mapping = read_label_flags(self.base.config, *asks)
        self.revision = commit_of_base(settings)
        self.fingerprint = fingerprint(self.base)
        self.config = self.base.config
        self.settings = settings = complete(settings, self.config)
        self.sources = load_sources(settings, self.config, mapping)
        processes = self.accelerator.num_processes
        self.steps = number_of_steps(self.sources["train"], settings, processes)
        self.eval_steps = max(1, self.steps // 10) if settings.eval_steps is None else settings.eval_steps
        self.prompts = prompts_for(self.base, self.processor)
        remarks = (
            few_steps(self.steps, batches_per_pass(self.sources["train"], settings, processes), settings),
            remark_on_words(self.base, self.processor, self.config),
            lower_precision(self.accelerator.mixed_precision),
        )
        self.remarks = [*filter(None, remarks), *remarks_on_overlap(self.sources)]
        if settings.objective != "contrastive":
            self.remarks += remarks_on_labels(self.sources["train"])
        self.folder.work.mkdir(parents=True, exist_ok=True)
        self.stop = StopWish()
        self.line: Line | None = None

    def run(self) -> dict[str, Any]:
        """Score the base, train, check the base, score again, save, push; returns what `results.json` holds.

        Raises:
            LockedError: If another run is writing to the same folder.
            FileExistsError: If another run has completed it meanwhile.
            StoppedError: If it was stopped by a signal; it names what resumes it.
        """
        with only_run(self.folder.final):
            refuse_taken(self.folder.final)
            try:
                return self._run()
            except KeyboardInterrupt:  # before or after the steps, or a second time
                raise StoppedError(f"stopped. {self.folder.remedy}") from None

    def _run(self) -> dict[str, Any]:
        self.base.to(self.accelerator.device)
        scored = [split for split in (*SPLITS, *KEPT_SPLITS) if split in self.sources]
        for remark in (*self.remarks, *self._left_out(is_named=True)):
            self.accelerator.print(f"NOTE: {remark}")
        self._check_known()
        for split in scored:
            refuse_shares(self.sources[split])
        refuse_unshared(self.folder.work, self.folder.final)
        fixed = self._fixed()
        refuse_different(fixed | self._scored_alike(scored))
        self.folder.claim(fixed)
        before = {split: self.score_base(split) for split in scored}
        self._check_labels(before)
        model = self._attach()
        if self.accelerator.is_main_process:
            # Adapter, plots and tables.
            self.folder.reserve(8 * self.counts["trainable_parameters"] + 2**23)
        with self.stop.noting():
            self._train(model)
        self._check_base(model)
        choice = self._choose_strength(model, before)
        after = choice.scored | {
            split: self._score(core(model), split, "adapted") for split in scored if split not in choice.scored
        }
        before, after = in_common(before, after)
        results = self._results(before, after, choice)
        self._save(model, results, before, after)
        return results

    def _left_out(self, is_named: bool = False) -> Iterator[str]:
        """Remarks on studies that no figure knows of; with a name for this screen, without any for what is pushed."""
        for split, source in self.sources.items():
            if source.skipped:
                yield f"{split}: left out before they were read: {why_skipped(source.skipped, is_named)}."

    def _check_known(self) -> None:
        """Refuse, before any training, studies that teach nothing."""
        source, learns_labels = self.sources["train"], self.settings.objective != "contrastive"
        if learns_labels and not source.is_synthetic and not has_known_label(source):
            raise TrainingError(f"{source.description}: no label of any study is known. Fill in the table.")
        if self.settings.objective != "prompts":
            self._check_contrast()

    def _check_contrast(self) -> None:
        """Refuse reports without any other to be contrasted with: their loss is 0, and so is its gradient."""
        settings, source = self.settings, self.sources["train"]
        if settings.batch_size * settings.accumulation_steps * self.accelerator.num_processes == 1:
            raise TrainingError(
                f"--objective {settings.objective} contrasts the reports of a step, and a step has one study. Pass a "
                "higher --accumulation_steps, which takes no more memory."
            )
        if not source.is_synthetic and not has_different_reports(source):
            raise TrainingError(
                f"{source.description}: all of its reports are the same, so there is nothing to contrast. Pass "
                "--objective prompts."
            )

    def loader(self, split: str, **options: Any) -> StudyLoader:
        return StudyLoader(
            self.sources[split],
            self.processor,
            self.config.label_names,
            batch_size=self.settings.batch_size,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            num_workers=self.settings.num_workers,
            on_bad_sample=self.settings.on_bad_sample,
            max_bad_share=self.settings.max_bad_share,
            bad_samples_file=self.folder.bad_samples,
            device=self.accelerator.device,
            **options,
        )

    def _score(self, model: MedCTModel, split: str, what: str) -> ScoredStudies:
        loader = self.loader(split, with_text=False)
        return score_studies(model, loader, self.prompts, self.accelerator, f"score {what}, {split}")

    def score_base(self, split: str) -> ScoredStudies:
        """From the run that is resumed, if it came so far and the table says the same of these studies."""
        name = f"base_{split}"
        if (known := self.folder.remembered(name)) is not None:
            if has_same_labels(self.sources[split], scored := ScoredStudies(**known)):
                return scored
            self.accelerator.print(f"NOTE: {split}: studies or labels have changed since, so the base is scored again.")
        scored = self._score(self.base, split, "base")
        if self.accelerator.is_main_process:
            self.folder.remember(name, scored)
        self.accelerator.wait_for_everyone()
        return scored

    def _check_labels(self, before: Scored) -> None:
        """Refuse, before any training, held-out studies that no score can be computed on."""
        for split in (SPLITS[1], KEPT_SPLITS[1]):
            if (scored := before.get(split)) is None:
                continue
            try:
                zero_shot_scores(scored.scores, scored.labels, scored.names)
            except ValueError as error:
                raise TrainingError(f"{self.sources[split].description}: {error}") from error

    def _attach(self) -> PeftModel | MedCTModel:
        """What is trained, ready for it."""
        settings = self.settings
        if settings.adaptation == "full":
            model = unlock(self.base, settings.targets)
        else:
            model = add_lora(
                self.base,
                variant=settings.adaptation,
                targets=settings.targets,
                rank=settings.rank,
                alpha=settings.alpha,
                dropout=settings.dropout,
                train_logit_scale=settings.train_logit_scale,
                revision=self.revision,
            )
            if self.accelerator.mixed_precision == "bf16":
                leave_casts_to_autocast(model)
            if self.accelerator.is_main_process:
                note_start(model, self.folder.work)
        parameters = trainable_parameters(model).values()
        self.counts = {
            "trainable_parameters": sum(parameter.numel() for parameter in parameters),
            "total_parameters": sum(parameter.numel() for parameter in model.parameters()),
        }
        share = self.counts["trainable_parameters"] / self.counts["total_parameters"]
        self.accelerator.print(
            f"trainable parameters: {self.counts['trainable_parameters']:,} of {self.counts['total_parameters']:,}, "
            f"{share:.2%}"
        )
        if settings.gradient_checkpointing:
            core(model).activation_checkpointing_enable(recomputing())
        if settings.compile:
            core(model).vision_model.compile()
        if settings.fsdp2:
            shard(core(model))
        self.frozen = digest(frozen_tensors(model))
        if settings.strength == "auto":
            self.line = Line(trainable_parameters(model), moves_both=settings.adaptation == "pissa")
        return model

    def _train(self, model: PeftModel | MedCTModel) -> None:
        """Train to the last step, from the newest checkpoint if there is one."""
        settings, accelerator = self.settings, self.accelerator
        # Each process draws its own dropout.
        set_seed(settings.seed + accelerator.process_index)
        parameters = trainable_parameters(model)
        optimizer = torch.optim.AdamW(
            parameters.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        schedule = get_cosine_schedule_with_warmup(optimizer, self.steps // 10, self.steps)
        loader = self.loader("train", with_text=settings.objective != "prompts", seed=settings.seed, drop_last=True)
        best = BestSoFar(parameters, settings.patience)
        state = TrainingState(parameters, optimizer, schedule, loader, best)
        checkpoints = Checkpoints(self.folder.checkpoints, settings.keep_checkpoints, accelerator)
        if checkpoints.load(state):
            accelerator.print(f"resumed after step {state.step} of {self.steps}")
        history = self.folder.history(state.step) if accelerator.is_main_process else None
        accelerator.init_trackers("medct", config=settings.fixed())
        prompts = [texts_to(texts, accelerator.device) for texts in self.prompts]
        constant_prompts = None if trains_text(model) else embed_prompts(core(model).eval(), prompts, accelerator)
        with (
            contextlib.closing(endless(loader)) as batches,  # else an error that a notebook keeps keeps its processes
            tqdm(
                total=self.steps, initial=state.step, desc="train", unit="step", disable=not accelerator.is_main_process
            ) as bar,
        ):
            while state.step < self.steps and not best.has_waited_enough:
                figures = self._step(model, state, batches, prompts, constant_prompts)
                bar.update()
                bar.set_postfix(
                    loss=f"{figures['loss']:.3f}",
                    volumes=f"{figures['volumes_per_second']:.1f}/s",
                    memory=f"{figures['memory_gib']:.1f} GiB",
                    refresh=False,
                )
                figures |= self._watch(model, state)
                if history:
                    history.add(state.step, figures)
                accelerator.log(figures, step=state.step)
                if self.stop.is_anyones(accelerator.device):
                    checkpoints.save(state)
                    raise self._stopped(state)
                is_last = state.step == self.steps or best.has_waited_enough
                if state.step % settings.checkpoint_steps == 0 or is_last:
                    checkpoints.save(state)
            if self.stop.is_anyones(accelerator.device):  # since the last step
                raise self._stopped(state)
        best.restore()
        self.steps_done, self.best_step, self.passes = state.step, best.step, loader.epoch + 1
        for tracker in accelerator.trackers:
            tracker.finish()

    def _stopped(self, state: TrainingState) -> StoppedError:
        by = self.stop.by or "a signal to another process"
        return StoppedError(f"stopped by {by} after step {state.step} of {self.steps}. {self.folder.remedy}")

    def _step(
        self,
        model: PeftModel | MedCTModel,
        state: TrainingState,
        batches: Iterator[dict[str, Any]],
        prompts: list[Texts],
        constant_prompts: list[torch.Tensor] | None,
    ) -> dict[str, float]:
        """One optimizer step, over the micro-batches of all processes."""
        settings, accelerator = self.settings, self.accelerator
        started = time.perf_counter()
        model.train()
        if constant_prompts:
            core(model).text_model.eval()  # what is not trained has no dropout
        micro_batches = [next(batches) for _ in range(settings.accumulation_steps)]
        loss_of = StepLoss(settings.objective, settings.report_weight, accelerator.autocast)
        loss = loss_of.backward(core(model), micro_batches, prompts, constant_prompts).item()
        if not math.isfinite(loss):
            raise TrainingError(f"The loss became {loss} in step {state.step + 1}. Lower --learning_rate.")
        parameters = list(state.parameters.values())
        if not settings.fsdp2:
            sum_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        learning_rate = state.schedule.get_last_lr()[0]
        state.optimizer.step()
        state.schedule.step()
        state.optimizer.zero_grad()
        state.step += 1
        studies = settings.batch_size * settings.accumulation_steps * accelerator.num_processes
        return {
            "loss": loss,
            "learning_rate": learning_rate,
            "volumes_per_second": studies / (time.perf_counter() - started),
            "memory_gib": peak_memory_bytes(accelerator.device) / 2**30,
        }

    def _watch(self, model: PeftModel | MedCTModel, state: TrainingState) -> dict[str, float | None]:
        """Score the tuning patients, when it is time, never those that are reported; the best weights are kept."""
        if not self.eval_steps or (state.step % self.eval_steps and state.step != self.steps):
            return {}
        scored = self._score(core(model), "tune", f"step {state.step}")
        auroc = mean_auroc(scored)
        state.best.note(state.step, auroc)
        return {"tune_auroc": auroc}

    def _choose_strength(self, model: PeftModel | MedCTModel, before: Scored) -> Choice:
        """How much of the training is handed out, chosen on tuning patients; afterwards the model has that strength."""
        if self.line is None or mean_auroc(before["tune"]) is None:
            return Choice(1.0)

        def score(split: str, versions: Sequence[Callable[[], None]]) -> list[ScoredStudies]:
            loader = self.loader(split, with_text=False)
            prompts, what = [self.prompts] * len(versions), f"score strengths, {split}"
            return score_versions(core(model), versions, loader, prompts, self.accelerator, what)

        return choose_strength(self.line, score, before, self.settings.max_forgotten)

    def _fixed(self) -> dict[str, Any]:
        """What a run that is resumed must have in common with its beginning, besides what it is told to score."""
        # Weights and voxels decide which base it is, not where it lies.
        places = set() if self.fingerprint is None else {"model", "revision"}
        settings = {name: value for name, value in self.settings.fixed().items() if name not in places}
        return settings | {
            "steps": self.steps,
            "processes": self.accelerator.num_processes,
            "mixed precision": self.accelerator.mixed_precision,
            "the base's weights": self.fingerprint,
            "the base's preprocessing": preprocessing(self.config),
            "labels, prompts and mappings": self._digest_of_labels(),
            "training studies, with labels and reports,": digest_of_studies(self.sources["train"]),
        }

    def _scored_alike(self, splits: Sequence[str]) -> dict[str, Any]:
        """What the processes of a run must have in common besides."""
        studies = {f"studies of {split!r}, with labels,": digest_of_studies(self.sources[split]) for split in splits}
        return studies | {"checkpoint_steps": self.settings.checkpoint_steps}

    def _digest_of_labels(self) -> str:
        """Of what is learned, which stands in files that may change before a run is resumed."""
        learned = json.dumps([self.config.label_names, self.config.label_prompts(), mappings_of(self.sources)])
        return hashlib.sha256(learned.encode()).hexdigest()[:16]

    def _check_base(self, model: PeftModel | MedCTModel) -> None:
        if digest(frozen_tensors(model)) != self.frozen:
            raise TrainingError("The base changed during training, so the adapter would not fit it. Nothing was saved.")

    def _describe(self, split: str) -> str:
        """What a split holds, as anyone may read it: tables and pictures are handed out."""
        return without_paths(self.sources[split].description, local_paths(dataclasses.asdict(self.settings)))

    def _results(self, before: Scored, after: Scored, choice: Choice) -> dict[str, Any]:
        """What `results.json` holds."""
        settings, names = self.settings, before["valid"].names
        wanted = wanted_points(settings.sensitivity, settings.specificity)
        found = compare_all(before, after, settings.bootstrap_resamples, settings.seed, wanted)
        held_out = self._describe("valid")
        how = "With its head" if is_classifier(self.base) else "Zero-shot"
        scans = counted(found["comparison"]["scans"], "held-out study", "held-out studies")
        measured_on = f"{how} on {scans}: {held_out}."
        if found["kept"]:
            measured_on += f" To be kept: {self._describe('keep_valid')}."
        is_synthetic = self.sources["valid"].is_synthetic
        if is_synthetic:
            measured_on += f" {SYNTHETIC}"
        results = {
            "measured_on": measured_on,
            "synthetic": is_synthetic,
            "data": f"Trained on {self._describe('train')}; scored on {held_out}.",
            **found,
            "recipe": settings.recipe,
            "strength": choice.strength,
            "strengths_tried": [dataclasses.asdict(trial) for trial in choice.trials],
            "prompts": self.config.label_prompts() if self.prompts else [],
            "label_names": names,
            "mappings": mappings_of(self.sources),
            "base": self._about_base(),
            **self.counts,
            "steps": self.steps_done,
            "planned_steps": self.steps,
            "best_step": self.best_step,
            "processes": self.accelerator.num_processes,
            "device": device_name(self.accelerator.device),
            "seconds": round(time.monotonic() - self.started, 1),
        }
        decided = self._provenance(found, before)
        remarks = [*self.remarks, *self._left_out(), *remarks_on(results, settings.max_forgotten)]
        return results | {"remarks": remarks, "provenance": decided}

    def _about_base(self) -> dict[str, str | None]:
        """Where the base came from, and its weights."""
        return {"model": self.settings.model, "revision": self.revision, "fingerprint": self.fingerprint}

    def _source_names(self) -> dict[str, str]:
        """What to call the new site and, where there are such, what is to be kept and what is replayed, by address."""
        settings = self.settings
        addresses = dict.fromkeys((settings.data, settings.keep, settings.replay))
        addresses.pop(NO_SOURCE, None)
        return dict(zip(addresses, short_names([*addresses]), strict=True))

    def _predictions(self, before: Scored, after: Scored) -> Predictions:
        names = self._source_names()
        return predictions_of(before, after, [names[self.settings.data], names.get(self.settings.keep, "")])

    def _provenance(self, found: dict[str, Any], before: Scored) -> dict[str, Any]:
        """What decided the figures; with its settings `medct evaluate` scores the held-out studies again."""
        base = self._about_base() | about_model(self.base)
        scored = self._predictions(before, {}).scored
        points = {
            model: {name: each["thresholds"] for name, each in by_name.items()}
            for model, by_name in found["comparison"]["operating_points"].items()
        }
        return provenance(
            repeatable(self.settings, self.revision, points),
            {BASE: base, ADAPTED: base},
            {f"{key.source}, {key.split}": list_checksum(each) for key, each in scored.items()},
            self.accelerator,
            seed=self.settings.seed,
        )

    def _save(self, model: PeftModel | MedCTModel, results: dict[str, Any], before: Scored, after: Scored) -> None:
        """Put everything into the output folder, and the folder where it belongs."""
        tensors = weights_to_save(model)
        if not self.accelerator.is_main_process:
            return
        note = self._describe("valid")
        with self.folder.complete() as folder:
            save_weights(model, tensors, folder, self.folder.work)
            if self.settings.adaptation == "full":
                self.processor.save_pretrained(folder)
            else:
                describe_adapter(
                    self.base,
                    folder,
                    base=self.settings.model,
                    revision=self.revision,
                    base_fingerprint=self.fingerprint,
                    thresholds=results["thresholds"],
                    calibration=results["calibration"],
                    strength=results["strength"],
                    operating_points=results["operating_points"],
                )
                results["provenance"]["models"][ADAPTED]["adapter_fingerprint"] = adapter_fingerprint(folder)
            write_json(folder / TRAIN_CONFIG, dataclasses.asdict(self.settings))
            names, addresses = self._source_names(), (self.settings.data, self.settings.replay)
            drawn = drawn_names(self.sources["train"], self.passes, self.settings.seed)
            trained = [(names[each], "train", studies) for each, studies in zip(addresses, drawn, strict=False)]
            write_record(folder / RESULTS, results, self._predictions(before, after), trained)
            of_kept = f"; to be kept: {self._describe('keep_valid')}" if results["kept"] else ""
            draw_pictures(folder, results, before["valid"], after["valid"], note, of_kept)
            write_readme(folder, results)


def run(settings: TrainingSettings) -> dict[str, Any]:
    """One whole run, or one for each fold; see `Trainer` and `cross_validate`."""
    with contextlib.ExitStack() as stack:

        def train(settings: TrainingSettings) -> tuple[dict[str, Any], Path]:
            trainer = Trainer(settings)
            stack.callback(trainer.accelerator.state.destroy_process_group)
            return trainer.run(), trainer.folder.final

        if settings.folds is None or settings.fold is not None:
            results, folder = train(settings)
        else:
            check(settings)
            results, folder = cross_validate(settings, lambda of_fold: train(of_fold)[0])
        if not process_rank():
            tell(settings, results, folder)
        return results


def main(arguments: list[str] | None = None, prog: str | None = None) -> None:
    """Run the command.

    Args:
        arguments, prog: See `run_command`.
    """
    run_command(run, TrainingSettings, __doc__, arguments, prog)


if __name__ == "__main__":
    keep_freed_memory()
    main()
