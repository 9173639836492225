"""Convert a published CT-CLIP checkpoint to a folder that `AutoModel.from_pretrained` loads.

    medct convert CT-CLIP_v2.pt OUT --tokenizer microsoft/BiomedVLP-CXR-BERT-specialized

Takes CT-CLIP, VocabFine (same keys) and ClassFine checkpoints. Every key is either mapped, or listed as dropped with
the reason; an unknown or missing key ends the conversion. The folder appears under its name only once it is complete.

Source: specification of CT-CLIP, section 5.
"""

import json
import re
import shutil
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from transformers import BertTokenizer

from medct.common.files import whole_folder
from medct.common.lock import only_run
from medct.configuration_medct import MedCTConfig
from medct.errors_medct import MedCTError, first_line
from medct.image_processing_medct import MedCTImageProcessor
from medct.modeling_medct import MedCTForImageClassification, MedCTModel
from medct.processing_medct import MedCTProcessor
from medct.publishing.cards import CLASSIFIER_CARD, MODEL_CARD

CLASSFINE_PREFIX = "trained_model."

# CT-CLIP's modules within one layer, by the numbers of its list.
_LAYER = r"visual_transformer\.enc_(spatial|temporal)_transformer\.layers\.(\d+)\."
_OUR_LAYER = r"vision_model.\1_encoder.layers.\2."
_KEYS = (
    (r"temperature", "logit_scale.weight"),
    (r"text_transformer\.((?:embeddings|encoder)\..*(?:weight|bias))", r"text_model.\1"),
    (r"to_text_latent\.weight", "text_projection.weight"),
    (r"to_visual_latent\.weight", "visual_projection.weight"),
    (r"visual_transformer\.to_patch_emb\.1\.(weight|bias)", r"vision_model.embeddings.patch_norm.\1"),
    (r"visual_transformer\.to_patch_emb\.2\.(weight|bias)", r"vision_model.embeddings.projection.\1"),
    (r"visual_transformer\.to_patch_emb\.3\.(weight|bias)", r"vision_model.embeddings.norm.\1"),
    (r"visual_transformer\.spatial_rel_pos_bias\.net\.0\.0\.(weight|bias)", r"vision_model.position_bias.fc1.\1"),
    (r"visual_transformer\.spatial_rel_pos_bias\.net\.1\.0\.(weight|bias)", r"vision_model.position_bias.fc2.\1"),
    (r"visual_transformer\.spatial_rel_pos_bias\.net\.2\.(weight|bias)", r"vision_model.position_bias.fc3.\1"),
    (_LAYER + r"0\.dsconv\.(weight|bias)", _OUR_LAYER + r"position_generator.conv.\3"),
    (_LAYER + r"1\.norm\.gamma", _OUR_LAYER + "layer_norm1.weight"),
    (_LAYER + r"1\.to_q\.weight", _OUR_LAYER + "self_attn.q_proj.weight"),
    (_LAYER + r"1\.to_kv\.weight", _OUR_LAYER + "self_attn.kv_proj.weight"),
    (_LAYER + r"1\.to_out\.weight", _OUR_LAYER + "self_attn.out_proj.weight"),
    (_LAYER + r"1\.([qk]_scale)", _OUR_LAYER + r"self_attn.\3"),
    (_LAYER + r"3\.0\.(weight|bias)", _OUR_LAYER + r"layer_norm2.\3"),
    (_LAYER + r"3\.1\.weight", _OUR_LAYER + "mlp.fc1.weight"),
    (_LAYER + r"3\.4\.weight", _OUR_LAYER + "mlp.fc2.weight"),
    (
        r"visual_transformer\.enc_(spatial|temporal)_transformer\.norm_out\.gamma",
        r"vision_model.\1_encoder.norm.weight",
    ),
    (r"visual_transformer\.vq\._codebook\.embed", "vision_model.quantizer.codebook"),
    (r"(classifier\.(?:weight|bias))", r"\1"),
)
_ZERO = "a constant zero"
_DROPPED = (
    (r"to_(visual|text)_latent_extra\.weight", "an unused copy of the projection"),
    (r"visual_transformer\.to_pixels(_first_frame)?\..*", "the patch decoder, used only in pre-training"),
    (r"visual_transformer\.to_patch_emb_first_frame\..*", "patches of single frames, never used on volumes"),
    (r"text_transformer\.pooler\..*", "BERT's pooler; CT-CLIP reads the first token itself"),
    (r"text_transformer\.embeddings\.position_ids", "a constant that older libraries saved"),
    (_LAYER + r"1\.null_kv", "empty"),
    (_LAYER + r"1\.context_norm\.(gamma|beta)", "for cross-attention, which CT-CLIP does not have"),
    (_LAYER + r"1\.norm\.beta", _ZERO),
    (r"visual_transformer\.enc_(spatial|temporal)_transformer\.norm_out\.beta", _ZERO),
    (
        r"visual_transformer\.vq\._codebook\.(initted|cluster_size|embed_avg)",
        "running state of the codebook's training",
    ),
)
# Mapped keys that a classifier of volumes does not use.
_NOT_IN_CLASSIFIER = re.compile(r"(text_model|text_projection|logit_scale)\.")


class ConversionError(MedCTError, ValueError):
    """A checkpoint that is not what it should be; the message says what is wrong and what to do."""


def load_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a checkpoint by name, memory-mapped where the file's format allows it.

    Raises:
        ConversionError: If the file is missing, is not a flat dictionary of tensors, or holds code.
    """
    if not path.is_file():
        raise ConversionError(f"{path}: no such file. Pass a CT-CLIP checkpoint (.pt).")
    try:
        # torch has written zip archives since 1.6; only those can be mapped.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # unpickling can raise anything, and torch's own message advises to trust the file
        raise ConversionError(
            f"{path}: not a checkpoint of tensors alone ({type(error).__name__}). Pass a CT-CLIP checkpoint (.pt)."
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ConversionError(f"{path}: not a flat dictionary of tensors. Pass CT-CLIP's state dict.")
    return state


def map_keys(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, list[str]]]:
    """CT-CLIP's tensors under our names.

    Args:
        state: A CT-CLIP, VocabFine or ClassFine checkpoint; views of it are returned, not copies.

    Returns:
        The tensors by our names, and the dropped keys by reason.

    Raises:
        ConversionError: If a key is unknown, or a tensor that would be dropped as zero is not zero.
    """
    is_classifier = "classifier.weight" in state
    mapped: dict[str, torch.Tensor] = {}
    dropped: dict[str, list[str]] = defaultdict(list)
    for full_key, tensor in state.items():
        key = full_key.removeprefix(CLASSFINE_PREFIX) if is_classifier else full_key
        reason = next((reason for pattern, reason in _DROPPED if re.fullmatch(pattern, key)), None)
        name = next((re.sub(pattern, ours, key) for pattern, ours in _KEYS if re.fullmatch(pattern, key)), None)
        if reason is None and name is None:
            raise ConversionError(f"Unknown key {full_key}: not a CT-CLIP checkpoint, or one of another version.")
        if reason == _ZERO and tensor.any():
            raise ConversionError(
                f"{full_key} should be zero and is not: this is not a checkpoint of the published CT-CLIP."
            )
        if is_classifier and name is not None and _NOT_IN_CLASSIFIER.match(name):
            reason = "the text half, which a classifier of volumes does not use"
        if reason is not None:
            dropped[reason].append(full_key)
        elif name is not None:
            mapped.update(_reshape(name, tensor))
    return mapped, dict(dropped)


def _reshape(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """One of CT-CLIP's tensors as the one or two tensors that we keep it in."""
    if name.endswith("kv_proj.weight"):
        key, value = tensor.chunk(2)  # keys first
        return {name.replace("kv_proj", "k_proj"): key, name.replace("kv_proj", "v_proj"): value}
    if name == "logit_scale.weight":
        return {name: tensor.reshape(1)}
    if name == "vision_model.quantizer.codebook":
        return {name: tensor.squeeze(0)}
    return {name: tensor}


def config_from_sizes(sizes: dict[str, Any]) -> MedCTConfig:
    """The configuration of a CT-CLIP whose sizes differ from the published ones.

    Args:
        sizes: Has the keys `dim`, `codebook_size`, `image_size` (of a slice), `patch_size`, `temporal_patch_size`,
            `frames`, `spatial_depth`, `temporal_depth`, `dim_head`, `heads`, `dim_latent` and `text_config`; others are
            ignored.

    Raises:
        ConversionError: If a key is missing, or sizes contradict each other.
    """
    try:
        vision_config = {
            "image_size": [sizes["frames"], *sizes["image_size"]],
            "patch_size": [sizes["temporal_patch_size"], sizes["patch_size"], sizes["patch_size"]],
            "hidden_size": sizes["dim"],
            "num_attention_heads": sizes["heads"],
            "head_dim": sizes["dim_head"],
            "num_spatial_layers": sizes["spatial_depth"],
            "num_temporal_layers": sizes["temporal_depth"],
            "codebook_size": sizes["codebook_size"],
        }
        return MedCTConfig(
            vision_config=vision_config,
            text_config={"model_type": "bert", **sizes["text_config"]},
            projection_dim=sizes["dim_latent"],
        )
    except KeyError as error:
        raise ConversionError(f"The sizes lack {error}. Name every size of the model.") from error


def published_config(mapped: dict[str, torch.Tensor]) -> MedCTConfig:
    """The configuration of the published CT-CLIP: BERT-base, with the checkpoint's own vocabulary."""
    embeddings = mapped.get("text_model.embeddings.word_embeddings.weight")
    vocabulary = {} if embeddings is None else {"vocab_size": len(embeddings)}
    return MedCTConfig(text_config={"model_type": "bert", **vocabulary})


def build_model(config: MedCTConfig, mapped: dict[str, torch.Tensor]) -> MedCTModel | MedCTForImageClassification:
    """Build the model that a checkpoint holds, with the checkpoint's own tensors as its weights.

    Args:
        config: The model's configuration.
        mapped: From `map_keys`; with a classifier, or without.

    Raises:
        ConversionError: If a tensor is missing or unexpected, its shape is not that of the configuration, or it is not
            finite.
    """
    model_class = MedCTForImageClassification if "classifier.weight" in mapped else MedCTModel
    with torch.device("meta"):
        expected = model_class(config).state_dict()
    if missing := sorted(expected.keys() - mapped.keys()):
        raise ConversionError(f"The checkpoint lacks {missing[0]} ({len(missing)} tensors in all).")
    if unexpected := sorted(mapped.keys() - expected.keys()):
        raise ConversionError(
            f"The checkpoint holds {unexpected[0]} ({len(unexpected)} tensors in all), which a model of these sizes "
            "does not have. Pass the model's own --sizes."
        )
    for name, tensor in mapped.items():
        if tensor.shape != expected[name].shape:
            raise ConversionError(
                f"{name} has shape {tuple(tensor.shape)}; these sizes ask for {tuple(expected[name].shape)}. Pass the "
                "model's own --sizes."
            )
        if not tensor.isfinite().all():
            raise ConversionError(f"{name} holds NaN or infinity: the checkpoint is damaged. Download it again.")
    # `from_pretrained`, not `load_state_dict`: buffers that no checkpoint holds must be filled, too.
    return model_class.from_pretrained(None, config=config, state_dict=mapped).eval()


def load_tokenizer(id_or_folder: str, config: MedCTConfig) -> BertTokenizer:
    """Load CT-CLIP's tokenizer: a plain, lower-casing BERT tokenizer, whatever class its repository names.

    Args:
        id_or_folder: Hub id, or folder with at least `vocab.txt`.
        config: The model's configuration, which limits words and length.

    Raises:
        ConversionError: If there is none, or it has more words than the model.
    """
    try:
        tokenizer = BertTokenizer.from_pretrained(
            id_or_folder, do_lower_case=True, model_max_length=config.text_config.max_position_embeddings
        )
    except Exception as error:  # the Hub's client, the file system and the parser each raise their own
        raise ConversionError(
            f"{id_or_folder}: not a tokenizer ({first_line(error)}). Pass a Hub id or a folder with vocab.txt."
        ) from error
    if len(tokenizer) > config.text_config.vocab_size:
        raise ConversionError(
            f"The tokenizer has {len(tokenizer)} words, but the checkpoint has {config.text_config.vocab_size}: they "
            "do not belong together."
        )
    return tokenizer


def _read_sizes(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConversionError(
            f"{path}: not a JSON file ({first_line(error)}). Pass one with the model's sizes."
        ) from error


def convert(checkpoint: Path, output: Path, tokenizer: str, sizes: Path | None = None) -> dict[str, list[str]]:
    """Convert a checkpoint into a folder in the form of a Hub repository.

    Args:
        checkpoint: CT-CLIP, VocabFine or ClassFine, as published.
        output: Folder to make; it must not exist, or be empty.
        tokenizer: Hub id or folder; `vocab.txt` alone is enough.
        sizes: JSON file with the sizes of a model other than the published one, see `config_from_sizes`.

    Returns:
        The dropped keys by reason.

    Raises:
        ConversionError: If the input is not what it should be.
        TextError: If the tokenizer knows no words.
        FileExistsError: If the output already holds something.
        LockedError: If another run is writing it.
    """
    with only_run(output), whole_folder(output) as folder:
        mapped, dropped = map_keys(load_state_dict(checkpoint))
        config = published_config(mapped) if sizes is None else config_from_sizes(_read_sizes(sizes))
        processor = MedCTProcessor(
            MedCTImageProcessor.from_config(config.vision_config), load_tokenizer(tokenizer, config)
        )
        model = build_model(config, mapped)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        card = CLASSIFIER_CARD if isinstance(model, MedCTForImageClassification) else MODEL_CARD
        shutil.copyfile(card, folder / "README.md")
    return dropped
