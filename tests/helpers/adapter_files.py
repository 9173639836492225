"""Adapter folders as training leaves them, without training."""

import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from medct import MedCTModel
from medct.adapters_medct import describe_adapter

RESULTS = {
    "measured_on": "Zero-shot AUROC on 30 held-out SYNTHETIC phantoms of site B.",
    "synthetic": True,
    "comparison": {
        "base": {"auroc": {"value": 0.7441, "low": 0.73, "high": 0.76}},
        "adapted": {
            "auroc": {"value": 0.8612, "low": 0.85, "high": 0.87},
            "macro_f1": {"value": 0.5, "low": None, "high": None},
            "precision": {"value": None, "low": None, "high": None},
            "ct_clip_protocol/accuracy": {"value": 0.7, "low": 0.6, "high": 0.8},
            "auroc/Emphysema": {"value": 0.9, "low": 0.8, "high": 1.0},
        },
        "difference": {"auroc": {"value": 0.1171, "low": 0.1, "high": 0.13}},
    },
    "table": "| finding | base | adapted |\n| --- | ---: | ---: |\n| Emphysema | 0.700 | 0.900 |",
    "thresholds": {"Emphysema": 0.31},
    "license": None,
    "steps": 1250,
    "seconds": 134.0,
    "device": "cpu",
    "trainable_parameters": 73_728,
    "total_parameters": 1_200_000,
    "data": "2,000 SYNTHETIC phantoms of site B",
}
TRAINING = {"objective": "prompts", "rank": 4, "learning_rate": 0.003, "seed": 0, "output_dir": "/scratch/me/run"}


def save_adapter(base: Path, folder: Path, seed: int = 0, results: dict | None = None, **config) -> Path:
    """An adapter with random weights, so that it changes the logits.

    Args:
        base: Folder of a small model.
        folder: Folder to make.
        seed: Seed for the weights.
        results: Written as `results.json`.
        config: Further fields of `LoraConfig`.
    """
    model = MedCTModel.from_pretrained(base)
    targets = r".*\.(q_proj|v_proj|query|value)"
    lora = LoraConfig(**{"r": 4, "target_modules": targets, "task_type": "FEATURE_EXTRACTION"} | config)
    peft = get_peft_model(model, lora)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=generator)
    peft.save_pretrained(folder)
    describe_adapter(peft, folder, base=str(base), thresholds=None if results is None else results["thresholds"])
    if results is not None:
        (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
        (folder / "train_config.json").write_text(json.dumps(TRAINING | {"model": str(base)}), encoding="utf-8")
    return folder
