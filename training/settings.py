"""The settings of a run: everything that does not travel with the weights."""

import dataclasses
from argparse import RawDescriptionHelpFormatter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from transformers import HfArgumentParser

from medct.configuration_medct import MedCTConfig
from medct.data import PHANTOMS, PhantomCohort
from medct.errors_medct import MedCTError
from medct.publishing.cards import is_hub_id
from medct.training.lora import Adaptation, Target
from medct.training.objectives import Objective
from medct.training.recipes import RECIPES, RecipeName, learning_rate_of

PHANTOM_BASE = Path(__file__).parents[1] / "phantom_base"
PHANTOM_BASE_SITE = f"{PHANTOMS}:A"
"""Where the phantom base comes from."""
NO_SOURCE = "none"


class TrainingError(MedCTError, RuntimeError):
    """A run that cannot begin or go on; the message says why and what to do."""


def setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class TrainingSettings:
    """Everything about a run that does not travel with the weights; saved as `train_config.json`."""

    model: str = setting(
        str(PHANTOM_BASE), "Base model: Hub id or folder. Default: the phantom base of this repository."
    )
    revision: str | None = setting(None, "Commit of the base on the Hub. Pin it: the repository's code is run.")

    data: str = setting(
        PHANTOMS,
        "Studies: a folder in CT-RATE's layout or with metadata.csv, prepared shards, hf://datasets/..., or "
        '"phantoms": synthetic studies drawn on the fly.',
    )
    data_revision: str | None = setting(None, "Commit of a data set on the Hub.")
    reconstructions: Literal["one", "all"] = setting(
        "one", "Of a CT-RATE scan in an epoch: one of its reconstructions, another in each epoch, or all."
    )
    num_workers: int = setting(
        1, "Processes that load data, for each training process; 0 loads in the training process."
    )
    on_bad_sample: Literal["skip", "raise"] = setting(
        "skip", "What to do with a study that cannot be read; those skipped are listed in bad_samples.jsonl."
    )
    max_bad_share: float = setting(0.05, "Stop if a greater share of the studies cannot be read.")
    phantom_site: Literal["A", "B", "C"] = setting(PhantomCohort.site, "Which synthetic hospital to adapt to.")
    phantom_train_patients: int = setting(PhantomCohort.train_patients, "Synthetic patients to train on.")
    phantom_tune_patients: int = setting(PhantomCohort.tune_patients, "Synthetic patients to tune on.")
    phantom_eval_patients: int = setting(
        PhantomCohort.eval_patients, "Synthetic patients to score on; others than those above."
    )

    objective: Objective = setting(
        "prompts", "Learn from the labels through their prompts, from the reports by contrast, or from both."
    )
    report_weight: float = setting(0.5, "Share of the reports in the loss of `both`; the labels have the rest.")
    recipe: RecipeName = setting(
        "vision",
        "What is trained and how: `vision`, every Linear of the vision encoder's layers and the patches, rsLoRA; "
        "`paper`, attention of both encoders, LoRA; `full`, every weight of the vision half, to compare with.",
    )
    adaptation: Adaptation | None = setting(
        None, "Kind of adapter; `full` trains weights themselves and saves a whole model. Default: the recipe's."
    )
    targets: Target | None = setting(
        None,
        "What gets an adapter: attention of `both` encoders or of one; with projections; `vision-all`, the Linears of "
        "the vision encoder's layers and the patches; `all` of both encoders' layers. Default: the recipe's.",
    )
    rank: int | None = setting(None, "Rank of the LoRA matrices. Default: the recipe's.")
    alpha: int | None = setting(
        None,
        "Scale of the LoRA matrices; the update is multiplied by alpha / rank, of rslora alpha / sqrt(rank). "
        "Default: the recipe's.",
    )
    dropout: float = setting(0.0, "Dropout before the LoRA matrices.")
    train_logit_scale: bool = setting(False, "Train the scale of the logits as well, and save it with the adapter.")

    learning_rate: float | None = setting(
        None,
        "Highest; it rises over the first tenth and falls as a cosine. Default: the recipe's, for the base's width.",
    )
    weight_decay: float = setting(0.01, "Weight decay of what is trained.")
    batch_size: int = setting(8, "Studies that one process has in memory at once.")
    accumulation_steps: int = setting(
        1, "Such batches in an optimizer step. Reports are contrasted across all of them, in the memory of one."
    )
    epochs: int = setting(1, "Passes over the training studies.")
    max_steps: int | None = setting(None, "Stop after so many steps, however many epochs are left.")
    max_grad_norm: float = setting(1.0, "Gradients are scaled down to this length.")
    gradient_checkpointing: bool = setting(False, "Recompute activations instead of keeping them: less memory.")
    compile: bool = setting(False, "Compile the vision encoder with torch.compile.")
    fsdp2: bool = setting(False, "Shard the model over the processes (FSDP2); also by accelerate's --use_fsdp.")

    replay: str | None = setting(
        None,
        "Studies of another source, such as what the base was trained on, that make a share of every batch, so that "
        "less is forgotten. Default: none; with phantoms, site A. `none` for none.",
    )
    replay_share: float = setting(0.2, "That share.")
    keep: str | None = setting(
        None,
        "Source whose studies the model is to stay good at: what is forgotten is measured there. Default: none; with "
        "phantoms, site A. `none` for none.",
    )
    max_forgotten: float = setting(0.01, "Most that the mean AUROC on --keep's tuning patients may fall.")
    strength: Literal["auto", "1"] = setting(
        "auto", "Scale of the trained adapter: chosen on tuning patients, or 1, as it was trained."
    )

    eval_steps: int | None = setting(
        None,
        "Score the tuning patients every so many steps, and keep the best weights. Default: a tenth of the run; 0 for "
        "never.",
    )
    patience: int = setting(3, "Stop after so many such scores in a row without a better one.")
    max_tune_studies: int | None = setting(
        500, "Studies to choose steps, strength, thresholds and calibration on; of --keep as many."
    )
    max_eval_studies: int | None = setting(None, "Score on so many held-out studies instead of all.")
    bootstrap_resamples: int = setting(1000, "Resamples of the patients for the intervals.")

    output_dir: str | None = setting(None, "Folder to make. Default: runs/ and the time.")
    resume: bool = setting(
        False, "Go on from the newest checkpoint of --output_dir, or begin if there is none; fits a requeued job."
    )
    checkpoint_steps: int = setting(100, "Steps from one checkpoint to the next.")
    keep_checkpoints: int = setting(2, "How many of the newest checkpoints stay.")
    report_to: Literal["none", "tensorboard", "trackio"] = setting("none", "Tracker to log to, offline.")
    push_to_hub: bool = setting(False, "Push the finished folder to the Hub.")
    hub_model_id: str | None = setting(None, "Where to push: ORG/NAME.")
    hub_private: bool = setting(False, "Make that repository private.")
    hub_base: str | None = setting(None, "Where the base is on the Hub, if --model is a folder.")
    hub_base_revision: str | None = setting(None, "Its commit there.")

    seed: int = setting(0, "Of the initialisation, the order of studies and the phantoms. Same seed, same numbers.")
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

    def fixed(self) -> dict[str, Any]:
        """The settings that a resumed run must share with the one it goes on from."""
        free = {"output_dir", "resume", "checkpoint_steps", "keep_checkpoints", "report_to", "num_workers"}
        free |= {name for name in dataclasses.asdict(self) if name.startswith(("hub_", "push_"))}
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in free}


def complete(settings: TrainingSettings, config: MedCTConfig) -> TrainingSettings:
    """The settings with nothing left open: what no flag says, the recipe and the base's size say.

    Args:
        settings: Of the run.
        config: Of its base.
    """
    recipe = RECIPES[settings.recipe]
    chosen = {name: getattr(recipe, name) for name in ("adaptation", "targets", "rank", "alpha")}
    chosen["learning_rate"] = learning_rate_of(recipe, config)
    usual = PHANTOM_BASE_SITE if settings.data == PHANTOMS and settings.phantom_site != "A" else NO_SOURCE
    chosen |= {"keep": usual, "replay": usual}
    return dataclasses.replace(
        settings, **{name: value for name, value in chosen.items() if getattr(settings, name) is None}
    )


def check(settings: TrainingSettings) -> None:
    """Refuse settings that cannot be meant.

    Raises:
        TrainingError: With the setting and what it must be.
    """
    at_least_1 = ("rank", "batch_size", "accumulation_steps", "epochs", "checkpoint_steps", "keep_checkpoints")
    for name in (*at_least_1, "patience"):
        if (value := getattr(settings, name)) is not None and value < 1:
            raise TrainingError(f"--{name} is {value}. Pass 1 or more.")
    if settings.eval_steps is not None and settings.eval_steps < 0:
        raise TrainingError(f"--eval_steps is {settings.eval_steps}. Pass 1 or more, or 0 for never.")
    if not 0 <= settings.replay_share < 1:
        raise TrainingError(
            f"--replay_share is {settings.replay_share:g}. Pass a share of each batch, 0 or more, below 1."
        )
    if not 0 <= settings.max_forgotten <= 1:
        raise TrainingError(f"--max_forgotten is {settings.max_forgotten:g}. Pass a difference of AUROC, 0 to 1.")
    if settings.replay == settings.data:
        raise TrainingError("--replay names the source of --data itself. Name another, or leave it out.")
    if settings.keep == settings.data:
        raise TrainingError("--keep names the source of --data itself, which is scored anyway. Name another.")
    if settings.push_to_hub and not settings.hub_model_id:
        raise TrainingError("--push_to_hub needs --hub_model_id ORG/NAME.")
    is_full = (settings.adaptation or RECIPES[settings.recipe].adaptation) == "full"
    is_named = is_full or is_hub_id(settings.hub_base or settings.model)
    if settings.push_to_hub and not is_named:
        raise TrainingError(
            "An adapter on the Hub names its base there, and --model is a folder. Push that with `medct push`, and "
            "pass --hub_base ORG/NAME --hub_base_revision COMMIT."
        )
    if settings.resume and not settings.output_dir:
        raise TrainingError("--resume needs the --output_dir of the run to go on with.")
    if settings.fsdp2 and settings.adaptation == "pissa":
        raise TrainingError("--adaptation pissa cannot be saved from a sharded model. Leave out --fsdp2.")
    if settings.train_logit_scale and settings.adaptation == "pissa":
        raise TrainingError("--adaptation pissa cannot be saved with a logit scale. Leave out --train_logit_scale.")


Settings = TypeVar("Settings", bound=TrainingSettings)


def parse_settings(
    kind: type[Settings], description: str | None, arguments: list[str] | None, prog: str | None = None
) -> Settings:
    """Settings from the command line."""
    parser = HfArgumentParser(kind, prog=prog, description=description, formatter_class=RawDescriptionHelpFormatter)
    settings, unknown = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return settings
