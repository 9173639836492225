"""What quantized weights cost in ranking and save in memory, on SYNTHETIC phantoms of site B.

    python benchmarks/bench_quantizers.py              # minutes on one CPU core; what is not installed is left out

Ranking: mean zero-shot AUROC of held-out phantoms that the phantom base was never trained on, and the least cosine
similarity of their embeddings to those of float32. Memory: weights and buffers of the phantom base, and of a model of
CT-CLIP's sizes, whose Linears hold a larger share (`--no_full_size` leaves it out).
"""

import argparse
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import BitsAndBytesConfig, QuantoConfig, TorchAoConfig
from transformers.utils import logging

from medct import MedCTConfig, MedCTModel, MedCTProcessor
from medct.data import phantom_source
from medct.data.loader import StudyLoader
from medct.evaluation.metrics import zero_shot_scores
from medct.evaluation.scoring import prompts_for, score_studies
from medct.publishing.loading import PHANTOM_BASE


def torchao(name: str) -> TorchAoConfig:
    from torchao import quantization

    return TorchAoConfig(getattr(quantization, name)())


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
WAYS: dict[str, Callable[[], Any]] = {
    "float32": lambda: {},
    "bfloat16": lambda: {"dtype": torch.bfloat16},
    "bitsandbytes int8": lambda: {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)},
    "bitsandbytes nf4": lambda: {"quantization_config": BitsAndBytesConfig(**NF4)},
    "torchao int8, weights only": lambda: {"quantization_config": torchao("Int8WeightOnlyConfig")},
    "torchao int8, weights and activations": lambda: {
        "quantization_config": torchao("Int8DynamicActivationInt8WeightConfig")
    },
    "quanto int8": lambda: {"quantization_config": QuantoConfig(weights="int8")},
    "quanto int4": lambda: {"quantization_config": QuantoConfig(weights="int4")},
}


def held_bytes(model: torch.nn.Module) -> int:
    """Of weights and buffers, in whatever tensors a quantiser holds them."""
    return sum(map(_bytes, (*model.parameters(), *model.buffers()))) + sum(
        _bytes(part) for module in model.modules() for part in _beside(module)
    )


def _bytes(tensor: torch.Tensor) -> int:
    if hasattr(tensor, "__tensor_flatten__") and type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def _beside(module: torch.nn.Module) -> list[torch.Tensor]:
    """Scales that bitsandbytes keeps beside its weights."""
    weight = getattr(module, "weight", None)
    state = getattr(weight, "quant_state", None)
    scales = [getattr(weight, "SCB", None), getattr(state, "absmax", None), getattr(state, "code", None)]
    return [each for each in scales if isinstance(each, torch.Tensor)]


def load(folder: Path, options: dict[str, Any]) -> MedCTModel:
    """Load a model in evaluation mode, on the GPU if there is one.

    Args:
        folder: The checkpoint.
        options: For `from_pretrained`, such as the quantization.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = MedCTModel.from_pretrained(folder, device_map={"": device}, **options).eval()
    # For CPUs bitsandbytes packs nf4 anew in evaluation mode, in widths that 64 divides; nothing drops out here.
    config = options.get("quantization_config")
    return model.train(device == "cpu" and getattr(config, "load_in_4bit", False))


def ranking(model: MedCTModel, loader: StudyLoader, expected: torch.Tensor | None) -> tuple[float, torch.Tensor, float]:
    """Measure how well a model ranks studies.

    Args:
        model: The model, possibly quantized.
        loader: Labelled studies.
        expected: `(studies, projection_dim)`, the float32 model's embeddings; `None` for that model itself.

    Returns:
        Mean AUROC, the embeddings `(studies, projection_dim)`, and the lowest cosine similarity to `expected`.
    """
    processor = MedCTProcessor.from_pretrained(PHANTOM_BASE)
    names = model.config.label_names
    evaluate, is_training = model.eval, model.training
    model.eval = lambda: model.train(is_training)  # see `load`
    scored = score_studies(model, loader, prompts_for(model, processor), Accelerator(), "score")
    model.eval = evaluate
    with torch.no_grad():
        embeds = torch.cat(
            [model.get_image_features(batch["pixel_values"].to(model.device)).pooler_output.cpu() for batch in loader]
        )
    cosine = 1.0 if expected is None else (embeds * expected).sum(-1).min().item()
    return zero_shot_scores(scored.scores, scored.labels, names)["auroc"], embeds, cosine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patients", type=int, default=100, help="Phantoms to score.")
    parser.add_argument("--no_full_size", action="store_true", help="Leave out the model of CT-CLIP's sizes.")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    processor = MedCTProcessor.from_pretrained(PHANTOM_BASE)
    source = phantom_source("B", range(arguments.patients), 0)
    loader = StudyLoader(source, processor, source.label_names, batch_size=8, with_text=False)
    expected = None
    with tempfile.TemporaryDirectory() as full_size:
        if not arguments.no_full_size:
            MedCTModel(MedCTConfig(text_config={"model_type": "bert"})).save_pretrained(full_size)
        print("| weights | mean AUROC | least cosine to float32 | phantom base | CT-CLIP's sizes |")
        print("| --- | ---: | ---: | ---: | ---: |")
        for name, options_of in WAYS.items():
            try:
                options = options_of()
                model = load(PHANTOM_BASE, options)
            except ImportError:
                print(f"| {name} | not installed | | | |", flush=True)
                continue
            auroc, embeds, cosine = ranking(model, loader, expected)
            expected = embeds if expected is None else expected
            large = "" if arguments.no_full_size else f"{held_bytes(load(Path(full_size), options)) / 1e6:,.0f} MB"
            print(f"| {name} | {auroc:.3f} | {cosine:.3f} | {held_bytes(model) / 1e6:.2f} MB | {large} |", flush=True)


if __name__ == "__main__":
    main()
