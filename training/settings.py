"""The settings of a run: everything that does not travel with the weights."""

import dataclasses
import math
import os
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from transformers import HfArgumentParser

from medct.common.counting import FEWEST_RESAMPLES
from medct.common.errors import one_line_errors
from medct.common.host import quiet_libraries
from medct.common.output import escape_unknown
from medct.common.progress import be_quiet
from medct.configuration_medct import MedCTConfig
from medct.data import PHANTOMS, PhantomCohort
from medct.errors_medct import MedCTError
from medct.evaluation.operating_points import WANTED
from medct.publishing.cards import is_hub_id
from medct.publishing.loading import PHANTOM_BASE
from medct.training.lora import Adaptation, Target
from medct.training.objectives import Objective
from medct.training.recipes import RECIPES, RecipeName, learning_rate_of

PHANTOM_BASE_SITE = f"{PHANTOMS}:A"
"""Where the phantom base comes from."""
NO_SOURCE = "none"


Settings = TypeVar("Settings", bound="TrainingSettings")


class TrainingError(MedCTError, RuntimeError):
    """A run that cannot start or continue; the message says why and what to do."""


def setting(default: Any, help: str) -> Any:
    """A field of a settings dataclass.

    Args:
        default: Its default, immutable.
        help: Help text on the command line, to which the default is added unless the text says it.
    """
    is_said = default is None or default is False or "default" in help.lower()
    return field(default=default, metadata={"help": help if is_said else f"{help} Default: {default}."})


@dataclass
class TrainingSettings:
    """Everything about a run that does not travel with the weights; saved as `train_config.json`."""

    model: str = setting(
        str(PHANTOM_BASE), "Base model: Hub id or folder. `phantom`, the default: the phantom base of this package."
    )
    revision: str | None = setting(None, "Commit of the base on the Hub.")

    data: str = setting(
        PHANTOMS,
        "Studies: a folder in CT-RATE's layout or with metadata.csv, prepared shards, hf://datasets/..., or "
        '"phantoms": synthetic studies drawn on the fly.',
    )
    data_revision: str | None = setting(None, "Commit of a data set on the Hub.")
    labels: str | None = setting(
        None,
        "Table (csv, xlsx) of findings to learn and ask for instead of the base's own: a column `label` and, where "
        "they differ from it, `data` (the column in the data) and `words`, or `present` and `absent` (what is asked).",
    )
    templates: list[str] | None = setting(
        None,
        'Pairs of sentences "PRESENT|ABSENT" with {label}, instead of the base\'s own; all of them are trained on.',
    )
    mapping: str | None = setting(
        None,
        "Table, or name of a published mapping, that says which names in the data (`data`) mean which finding "
        "(`label`); findings that it does not name are unknown.",
    )
    reconstructions: Literal["one", "all"] = setting(
        "one", "Reconstructions of a CT-RATE scan in an epoch: one, in turn from epoch to epoch, or all."
    )
    num_workers: int = setting(
        1, "Processes that load data for each training process; 0 loads in the training process."
    )
    on_bad_sample: Literal["skip", "raise"] = setting(
        "skip", "What to do with a study that cannot be read; skipped ones are listed in bad_samples.jsonl."
    )
    max_bad_share: float = setting(0.05, "Stop if more than this share of the studies cannot be read.")
    folds: int | None = setting(
        None,
        "Cross-validate: divide the patients of all splits into this many folds, 3 or more, train once for each, and "
        "pool the scores of the held-out studies. For cohorts that are too small to hold anything out.",
    )
    fold: int | None = setting(None, "Train only this fold of --folds, counted from 1.")
    phantom_site: Literal["A", "B", "C"] = setting(PhantomCohort.site, "Which synthetic hospital to adapt to.")
    phantom_train_patients: int = setting(PhantomCohort.train_patients, "Synthetic patients to train on.")
    phantom_tune_patients: int = setting(PhantomCohort.tune_patients, "Synthetic patients to tune on.")
    phantom_eval_patients: int = setting(
        PhantomCohort.eval_patients, "Synthetic patients to score on, distinct from those above."
    )

    objective: Objective = setting(
        "prompts", "Learn from the labels through their prompts, from the reports by contrast, or from both."
    )
    report_weight: float = setting(0.5, "Weight of the reports in the loss of `both`; the labels have the rest.")
    recipe: RecipeName = setting(
        "vision",
        "What is trained and how: `vision`, every Linear in the vision encoder's layers and the patch projection, "
        "rsLoRA; `paper`, attention in both encoders, LoRA; `full`, every weight of the vision half, for comparison.",
    )
    adaptation: Adaptation | None = setting(
        None,
        "Kind of adapter; `full` trains the weights themselves and saves a whole model. Default: the recipe's.",
    )
    targets: Target | None = setting(
        None,
        "What gets an adapter: attention in `both` encoders or one; also the projections; `vision-all`, all Linears in "
        "the vision encoder's layers and the patch projection; `all`, those in both encoders' layers. Default: the "
        "recipe's.",
    )
    rank: int | None = setting(None, "Rank of the LoRA matrices. Default: the recipe's.")
    alpha: int | None = setting(
        None,
        "Scale of the LoRA matrices; the update is multiplied by alpha / rank, or for rslora by alpha / sqrt(rank). "
        "Default: the recipe's.",
    )
    dropout: float = setting(0.0, "Dropout before the LoRA matrices.")
    train_logit_scale: bool = setting(False, "Train the scale of the logits as well, and save it with the adapter.")

    learning_rate: float | None = setting(
        None,
        "Peak, after a warm-up over the first tenth; cosine decay. Default: the recipe's, for the base's width.",
    )
    weight_decay: float = setting(0.01, "Weight decay of the trained weights.")
    batch_size: int = setting(8, "Studies that one process has in memory at once.")
    accumulation_steps: int = setting(
        1, "Batches in an optimizer step. Reports are contrasted across all of them, in the memory of one."
    )
    epochs: int = setting(1, "Passes over the training studies.")
    max_steps: int | None = setting(None, "Stop after this many steps, however many epochs are left.")
    max_grad_norm: float = setting(1.0, "Scale gradients down to at most this norm.")
    gradient_checkpointing: bool = setting(False, "Recompute activations instead of keeping them: less memory.")
    compile: bool = setting(False, "Compile the vision encoder with torch.compile.")
    fsdp2: bool = setting(False, "Shard the model over the processes (FSDP2); accelerate's --use_fsdp does the same.")

    replay: str | None = setting(
        None,
        "Another source, such as what the base was trained on, whose studies form a share of every batch, so that less "
        "is forgotten. `none` for none, the default except with phantoms, which replay site A.",
    )
    replay_share: float = setting(0.2, "Share of the replayed studies.")
    replay_mapping: str | None = setting(None, "Like --mapping, for --replay.")
    keep: str | None = setting(
        None,
        "Source that the model must stay good at: forgetting is measured there. `none` for none, the default "
        "except with phantoms, which keep site A.",
    )
    keep_mapping: str | None = setting(None, "Like --mapping, for --keep.")
    max_forgotten: float = setting(0.01, "How far the mean AUROC on --keep's tuning patients may fall.")
    strength: Literal["auto", "1"] = setting(
        "auto", "Strength of the trained adapter: chosen on tuning patients, or 1, as it was trained."
    )

    eval_steps: int | None = setting(
        None,
        "Score the tuning patients every this many steps, and keep the best weights; 0 for never. Default: a tenth of "
        "the run.",
    )
    patience: int = setting(3, "Stop after this many such scores in a row without a better one.")
    max_tune_studies: int | None = setting(
        500, "Studies to choose steps, strength, thresholds and calibration on; as many of --keep."
    )
    max_eval_studies: int | None = setting(None, "Score this many held-out studies instead of all.")
    bootstrap_resamples: int = setting(1000, "Bootstrap resamples of the patients for the intervals.")

    sensitivity: float | None = setting(
        None, "Also choose, on the tuning patients, the operating point that reaches this sensitivity, such as 0.95."
    )
    specificity: float | None = setting(None, "The same for a wanted specificity.")

    output_dir: str | None = setting(None, "Folder to create. Default: runs/ and the time.")
    resume: bool = setting(
        False, "Resume from the newest checkpoint of --output_dir, or start if there is none; suits a requeued job."
    )
    checkpoint_steps: int = setting(100, "Steps between checkpoints.")
    keep_checkpoints: int = setting(2, "How many of the newest checkpoints to keep.")
    report_to: Literal["none", "tensorboard", "trackio"] = setting("none", "Tracker to log to, offline.")
    push_to_hub: bool = setting(False, "Push the finished folder to the Hub.")
    hub_model_id: str | None = setting(None, "Where to push: ORG/NAME.")
    hub_private: bool = setting(False, "Make that repository private.")
    hub_base: str | None = setting(None, "The base's repository on the Hub, if --model is a folder.")
    hub_base_revision: str | None = setting(None, "The base's commit there.")

    quiet: bool = setting(False, "Show no progress, only results and errors.")
    seed: int = setting(0, "Seed for the initialisation, the order of studies and the phantoms; makes runs repeatable.")
    cpu: bool = setting(False, "Stay on the CPU even if there is a GPU.")

    @property
    def phantoms(self) -> PhantomCohort:
        """What `--data phantoms` stands for."""
        sizes = (self.phantom_train_patients, self.phantom_tune_patients, self.phantom_eval_patients)
        return PhantomCohort(self.phantom_site, *sizes, self.seed)

    @property
    def other_phantoms(self) -> PhantomCohort:
        """What `--keep` and `--replay phantoms:SITE` stand for; of another site there are always plenty."""
        return dataclasses.replace(self.phantoms, train_patients=PhantomCohort.train_patients)

    def without_push(self: "Settings") -> "Settings":
        """The same run, which pushes nothing: one of several, of which another is pushed."""
        return dataclasses.replace(self, push_to_hub=False, **{name: self.usual(name) for name in _OF_PUSHES})

    def usual(self, name: str) -> Any:
        """A setting's default; a dataclass keeps it in its class."""
        return getattr(type(self), name)

    def fixed(self) -> dict[str, Any]:
        """The settings that a resumed run must share with the one that it resumes."""
        free = {"output_dir", "resume", "checkpoint_steps", "keep_checkpoints", "report_to", "num_workers", "quiet"}
        free |= {name for name in dataclasses.asdict(self) if name.startswith(("hub_", "push_"))}
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in free}


def complete(settings: TrainingSettings, config: MedCTConfig) -> TrainingSettings:
    """The settings with nothing left open: what no flag sets, the recipe and the size of the base set.

    Args:
        settings: The run's settings.
        config: Configuration of its base.
    """
    recipe = RECIPES[settings.recipe]
    chosen = {name: getattr(recipe, name) for name in ("adaptation", "targets", "rank", "alpha")}
    chosen["learning_rate"] = learning_rate_of(recipe, config)
    usual = PHANTOM_BASE_SITE if settings.data == PHANTOMS and settings.phantom_site != "A" else NO_SOURCE
    chosen |= {"keep": usual, "replay": usual}
    return dataclasses.replace(
        settings, **{name: value for name, value in chosen.items() if getattr(settings, name) is None}
    )


_COUNTS = ("rank", "alpha", "batch_size", "accumulation_steps", "epochs", "max_steps", "checkpoint_steps")
_MORE_COUNTS = ("keep_checkpoints", "patience", "max_tune_studies", "max_eval_studies")
_PHANTOMS = ("phantom_train_patients", "phantom_tune_patients", "phantom_eval_patients")
_BOUNDS: tuple[tuple[Callable[[Any], bool], str, Sequence[str]], ...] = (
    (lambda value: value >= 1, "1 or more", (*_COUNTS, *_MORE_COUNTS, *_PHANTOMS)),
    (lambda value: value >= 0, "1 or more, or 0 for never", ("eval_steps",)),
    (lambda value: value >= 0, "1 or more, or 0 for none", ("num_workers",)),
    (lambda value: value >= FEWEST_RESAMPLES, f"{FEWEST_RESAMPLES} or more", ("bootstrap_resamples",)),
    (lambda value: 0 <= value < 2**32, "a whole number from 0 on, below 2**32", ("seed",)),
    (lambda value: 0 < value < math.inf, "a number above 0", ("learning_rate",)),
    # Below 0 it would turn the gradients round.
    (lambda value: 0 < value < math.inf, "a number above 0, such as 1e9 for no limit", ("max_grad_norm",)),
    (lambda value: 0 <= value < math.inf, "0 or more", ("weight_decay",)),
    (lambda value: 0 <= value < 1, "a share, 0 or more, below 1", ("dropout",)),
    (lambda value: 0 <= value < 1, "a share of each batch, 0 or more, below 1", ("replay_share",)),
    (lambda value: 0 <= value <= 1, "a difference of AUROC, 0 to 1", ("max_forgotten",)),
    (lambda value: 0 <= value <= 1, "a share, 0 to 1", ("report_weight", "max_bad_share")),
    (lambda value: 0 < value <= 1, "a share above 0, up to 1", WANTED),
)
"""What makes sense, what to pass instead, and of which settings that holds; a setting left open is `None`."""
_OF_ADAPTERS = ("rank", "alpha", "dropout", "train_logit_scale")
_OF_PUSHES = ("hub_model_id", "hub_private", "hub_base", "hub_base_revision")


def check(settings: TrainingSettings) -> None:
    """Refuse settings that make no sense.

    Raises:
        TrainingError: If there are any; it names the setting and what it must be.
    """
    for is_sense, remedy, names in _BOUNDS:
        for name in names:
            if (value := getattr(settings, name)) is not None and not is_sense(value):
                raise TrainingError(f"--{name} is {value}. Pass {remedy}.")
    if settings.folds is not None and settings.folds < 3:
        raise TrainingError(f"--folds is {settings.folds}. Pass 3 or more: one is held out, one is tuned on.")
    if settings.fold is not None and not 1 <= settings.fold <= (settings.folds or 0):
        raise TrainingError(f"--fold is {settings.fold}. Pass a number from 1 to that of --folds.")
    if settings.folds and settings.max_eval_studies is not None:
        raise TrainingError("--max_eval_studies leaves out studies, but --folds holds out each of them once.")
    if _is_same(settings.replay, settings.data):
        raise TrainingError("--replay names the source of --data itself. Name another, or leave it out.")
    if _is_same(settings.keep, settings.data):
        raise TrainingError("--keep names the source of --data itself, which is scored anyway. Name another.")
    _refuse_idle(settings)
    if settings.push_to_hub and not settings.hub_model_id:
        raise TrainingError("--push_to_hub needs --hub_model_id ORG/NAME.")
    is_named = _is_full(settings) or is_hub_id(settings.hub_base or settings.model)
    if settings.push_to_hub and not is_named:
        raise TrainingError(
            "An adapter on the Hub must name a base on the Hub, but --model is a folder. Push the base with `medct "
            "push`, and pass --hub_base ORG/NAME --hub_base_revision COMMIT."
        )
    if not settings.output_dir and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise TrainingError("Several processes need one folder for all. Pass --output_dir DIR.")
    if settings.resume and not settings.output_dir:
        raise TrainingError("--resume needs the --output_dir of the run to resume.")
    if settings.fsdp2 and settings.adaptation == "pissa":
        raise TrainingError(
            "--adaptation pissa cannot be saved from a sharded model. Leave out --fsdp2 and --use_fsdp."
        )
    if settings.fsdp2 and "RANK" not in os.environ:
        raise TrainingError("--fsdp2 shards a model over processes. Start them with `accelerate launch` or `torchrun`.")
    if settings.train_logit_scale and settings.adaptation == "pissa":
        raise TrainingError("--adaptation pissa cannot be saved with a logit scale. Leave out --train_logit_scale.")


def _is_full(settings: TrainingSettings) -> bool:
    return (settings.adaptation or RECIPES[settings.recipe].adaptation) == "full"


def _refuse_idle(settings: TrainingSettings) -> None:
    """Refuse flags that would do nothing beside the others: whoever passes them expects something else of the run."""
    has_usual = settings.data == PHANTOMS  # to replay and to keep
    needed = (
        (settings.eval_steps != 0, "scores on the way (any --eval_steps but 0)", ("patience",)),
        (settings.objective == "both", "--objective both", ("report_weight",)),
        (settings.replay or has_usual, "--replay SOURCE", ("replay_share", "replay_mapping")),
        (settings.keep or has_usual, "--keep SOURCE", ("max_forgotten", "keep_mapping")),
        (not _is_full(settings), "an adapter (any --adaptation but full)", _OF_ADAPTERS),
        (settings.push_to_hub, "--push_to_hub", _OF_PUSHES),
    )
    for is_there, what, names in needed:
        for name in names:
            if not is_there and (value := getattr(settings, name)) != settings.usual(name):
                raise TrainingError(f"--{name} {value} does nothing without {what}. Pass that, or leave it out.")


def _is_same(address: str | None, data: str) -> bool:
    """Whether two addresses are of one source, however a folder is written; with `--folds` all of it is held out."""
    return address is not None and os.path.realpath(address) == os.path.realpath(data)


def refuse_for_classifier(settings: TrainingSettings) -> None:
    """Refuse settings that need a text encoder, or an adapter without a head.

    Args:
        settings: From `complete`.

    Raises:
        TrainingError: With the setting and what it must be.
    """
    remedies = {
        "objective": (settings.objective != "prompts", "It learns from labels alone: leave out --objective."),
        "targets": (
            settings.targets not in ("both", "vision", "vision-all"),
            "It has no text encoder: pass --targets vision.",
        ),
        "train_logit_scale": (settings.train_logit_scale, "It has no scale of logits: leave it out."),
        "adaptation": (settings.adaptation == "pissa", "Pissa cannot be saved with a head: pass another."),
    }
    for name, (is_refused, remedy) in remedies.items():
        if is_refused:
            raise TrainingError(f"--{name} {getattr(settings, name)}: {settings.model} is a classifier. {remedy}")


def run_command(
    work: Callable[[Settings], Any],
    kind: type[Settings],
    description: str | None,
    arguments: list[str] | None = None,
    prog: str | None = None,
) -> None:
    """Run a command whose arguments are settings.

    Args:
        work: What it does with them.
        kind: Dataclass of the settings.
        description: Text at the top of the help.
        arguments: Of the command line; those of the process by default.
        prog: Name of the command in its help.
    """
    escape_unknown()
    parser = HfArgumentParser(kind, prog=prog, description=description, formatter_class=RawDescriptionHelpFormatter)
    for action in parser._actions:
        if action.option_strings[0].startswith("--no_"):  # made of a setting that is on, with the help of that
            action.help = f"Turn off --{action.dest}."
    settings, unknown = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    be_quiet(settings.quiet)
    with one_line_errors(), quiet_libraries():
        work(settings)
