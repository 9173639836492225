"""What is trained: low-rank matrices beside chosen Linears of the base or, for comparison, the base itself."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

from medct.common.distributed import whole
from medct.evaluation.scoring import is_classifier
from medct.modeling_medct import MedCTForImageClassification, MedCTModel

# The attention Linears under the names they have in BERT and the other encoders of transformers.
_VISION = r"vision_model\..*\.(q|k|v|out)_proj"
_TEXT = r"text_model\..*(\.(query|key|value|attention\.output\.dense)|\.(q|k|v|o|out)_proj|\.(q|k|v|out)_lin)"
_PROJECTIONS = r"(visual|text)_projection"
_VISION_FEED_FORWARD = r"vision_model\..*\.mlp\.fc[12]"
_TEXT_FEED_FORWARD = r"text_model\..*\.((intermediate|output)\.dense|fc[12]|lin[12]|wi|wo)"
_PATCHES = r"vision_model\.embeddings\.projection"
TARGETS = {
    "both": f"{_VISION}|{_TEXT}",
    "vision": _VISION,
    "text": _TEXT,
    "both+projections": f"{_VISION}|{_TEXT}|{_PROJECTIONS}",
    "vision-all": f"{_VISION}|{_VISION_FEED_FORWARD}|{_PATCHES}",
    "all": f"{_VISION}|{_TEXT}|{_PROJECTIONS}|{_VISION_FEED_FORWARD}|{_TEXT_FEED_FORWARD}",
}
Target = Literal["both", "vision", "text", "both+projections", "vision-all", "all"]
# PEFT's options for each variant.
VARIANTS: dict[str, dict] = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "pissa": {"init_lora_weights": "pissa"},
}
Variant = Literal["lora", "dora", "rslora", "pissa"]
Adaptation = Literal[Variant, "full"]
_PISSA_START = "pissa_start"


def add_lora(
    model: MedCTModel | MedCTForImageClassification,
    *,
    variant: Variant = "lora",
    targets: Target = "both",
    rank: int = 16,
    alpha: int = 32,
    dropout: float = 0.0,
    train_logit_scale: bool = False,
    revision: str | None = None,
) -> PeftModel:
    """Freeze the base and add trainable low-rank matrices beside some of its Linears.

    Args:
        model: The base; its modules are wrapped in place. The head of a classifier is trained whole, and saved with the
            adapter.
        variant: See `VARIANTS`. "pissa" starts from the largest singular vectors and removes them from the weights in
            memory; what is saved is an ordinary adapter of twice the rank for the original base.
        targets: See `TARGETS`.
        rank: Rank of the matrices.
        alpha: The update is multiplied by `alpha / rank` ("rslora": by `alpha / sqrt(rank)`).
        dropout: Dropout before the matrices, in [0, 1).
        train_logit_scale: Whether the scale of the logits is trained, and saved with the adapter.
        revision: Commit of the base, recorded in the adapter.

    Returns:
        The model with its adapter, named "default".
    """
    trained_whole = ["classifier"] if is_classifier(model) else ["logit_scale"] if train_logit_scale else None
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        # A regular expression, because PEFT writes lists of names in random order.
        target_modules=TARGETS[targets],
        modules_to_save=trained_whole,
        # Without it `AutoPeftModel...` cannot load the adapter, as the base's class is not one of transformers'.
        task_type="FEATURE_EXTRACTION",
        revision=revision,
        **VARIANTS[variant],
    )
    return get_peft_model(model, config)


def leave_casts_to_autocast(model: PeftModel) -> None:
    """Keep PEFT from casting what goes into adapters to their float32, where autocast casts it back at once.

    Not with DoRA, which measures its matrices in the precision of what goes in.

    Args:
        model: To be run under autocast only.
    """
    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and not any(getattr(module, "use_dora", {}).values()):
            module.cast_input_dtype_enabled = False


def unlock(model: MedCTModel | MedCTForImageClassification, targets: Target = "all") -> torch.nn.Module:
    """Make the parameters of the model, or of one half, trainable. The codebook is not a parameter: it never moves.

    Args:
        model: The base.
        targets: "vision" and "vision-all" stand for the vision encoder with its projection, or with the head of a
            classifier; "text" for the text half; all others for the whole model.
    """
    halves = {"text": ("text_",), "vision": ("vis", "classifier")}
    half = halves.get(targets.removesuffix("-all"), ("",))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(half))
    return model


def trains_text(model: torch.nn.Module) -> bool:
    """Whether anything in the text half is trained; if not, the embeddings of prompts never change."""
    return any("text_model." in name or "text_projection." in name for name in trainable(model))


def core(model: PeftModel | MedCTModel) -> MedCTModel:
    """The MedCT model inside, with whatever adapters it holds."""
    return model.base_model.model if isinstance(model, PeftModel) else model


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Trainable parameters by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def frozen_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of all that must not change in a model with adapters: frozen parameters and buffers."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not tensor.requires_grad:
            yield name, tensor


def note_start(model: PeftModel, folder: Path) -> None:
    """Save a "pissa" adapter's initial state, from which its weights for the original base are computed.

    Args:
        model: Untrained, with an adapter of any variant; the others need no initial state.
        folder: Where to save it, under a name of its own.
    """
    if model.peft_config["default"].init_lora_weights == "pissa":
        model.peft_config["default"].init_lora_weights = True  # otherwise PEFT would decompose again on loading
        model.save_pretrained(folder / _PISSA_START)
        model.peft_config["default"].init_lora_weights = "pissa"


def weights_to_save(model: PeftModel | MedCTModel) -> dict[str, torch.Tensor]:
    """The adapter's tensors, or the whole model's if it has none, on the CPU; every process must call this."""
    is_saved = (lambda name: "lora_" in name or "modules_to_save" in name) if isinstance(model, PeftModel) else bool
    return {name: whole(tensor) for name, tensor in model.state_dict().items() if is_saved(name)}


def save_weights(
    model: PeftModel | MedCTModel, tensors: dict[str, torch.Tensor], folder: Path, start: Path | None = None
) -> None:
    """Write an adapter for the original base, or a whole model.

    Args:
        model: The trained model.
        tensors: From `weights_to_save`.
        folder: Where to write.
        start: The folder that was passed to `note_start`.
    """
    if start is not None and (start / _PISSA_START).is_dir():
        model.save_pretrained(folder, path_initial_model_for_weight_conversion=str(start / _PISSA_START))
    else:
        model.save_pretrained(folder, state_dict=tensors)
