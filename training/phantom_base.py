"""Make `phantom_base/`: a small MedCT model, trained from scratch on synthetic phantoms of site A.

    python -m medct.training.phantom_base OUTPUT

It stands in for CT-CLIP wherever there is no network: as the default of `train.py`, in the tests and the examples. It
knows phantoms and nothing else. Takes just under half an hour on 2 otherwise idle cores, from a fixed seed.

Unusual: the codebook moves here, as in CT-CLIP's own training, and never again afterwards.
"""

import argparse
import itertools
import re
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.nn import functional as F
from transformers import BertTokenizer, get_cosine_schedule_with_warmup
from transformers.utils import logging

from medct.common.errors import one_line_errors
from medct.common.files import whole_folder, write_json
from medct.common.progress import tqdm
from medct.configuration_medct import MedCTConfig
from medct.data import phantom_source
from medct.data.loader import StudyLoader
from medct.data.phantoms.reports import report_sentences
from medct.data.sources import Source
from medct.evaluation.metrics import zero_shot_scores
from medct.evaluation.scoring import prompts_for, score_studies
from medct.image_processing_medct import MedCTImageProcessor
from medct.layers_medct import MedCTQuantizer
from medct.modeling_medct import MedCTModel, contrastive_loss
from medct.processing_medct import MedCTProcessor
from medct.publishing.registration import register

SEED = 0
# No patient is seen twice, and the first ones are held out.
NUM_HELD_OUT = 300
FIRST_PATIENT = 1000
BATCH_SIZE = 8
NUM_WORKERS = 1
# Site C, its words as well, is as strange to the base as a hospital can be.
SITES = ("A", "B")
WEIGHT_DECAY = 0.05
MAX_GRAD_NORM = 1.0
# First the vision encoder learns to see, followed by a plain classifier and without the codebook; then all together.
VISION_STEPS, VISION_LEARNING_RATE = 1500, 1.5e-3
JOINT_STEPS, JOINT_LEARNING_RATE = 1500, 1e-3
# How much of the codebook's running average a step keeps, and below how many tokens per step a row is reassigned.
CODEBOOK_DECAY = 0.98
CODEBOOK_LEAST_USE = 0.5

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]

CARD = """---
library_name: transformers
license: apache-2.0
tags: [medct, synthetic]
---

# MedCT phantom base

A small MedCT model trained from scratch on SYNTHETIC chest CT phantoms of "site A": drawings, not patients. It stands
in for CT-CLIP where there is no network and knows nothing about real scans. Made by `make phantom-base`.

Zero-shot AUROC, mean of 18 drawn findings, on held-out phantoms: site A {auroc_A:.3f}, site B {auroc_B:.3f}.
"""


def make_tokenizer(config: MedCTConfig) -> BertTokenizer:
    """A BERT tokenizer with the words of both sites' reports and of the prompts, and single letters."""
    texts = [*(text for site in SITES for text in report_sentences(site)), *config.label_prompts()[0]]
    words = sorted(set(re.findall(r"[a-z]+|[^a-z\s]", " ".join(texts).lower())))
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = [*letters, *(f"##{letter}" for letter in letters)]
    vocabulary = dict.fromkeys([*SPECIAL_TOKENS, *pieces, *words])
    return BertTokenizer(
        vocab={word: index for index, word in enumerate(vocabulary)},
        do_lower_case=True,
        model_max_length=config.text_config.max_position_embeddings,
    )


def make_config() -> MedCTConfig:
    """Sizes at which training takes minutes; the grid covers the same extent as the published model's."""
    return MedCTConfig(
        vision_config={
            "image_size": [48, 96, 96],
            "patch_size": [6, 12, 12],
            "target_spacing_mm": [6.0, 3.75, 3.75],
            "hidden_size": 96,
            "num_attention_heads": 4,
            "head_dim": 24,
            "num_spatial_layers": 2,
            "num_temporal_layers": 2,
            "codebook_size": 1024,
            "initializer_range": 0.05,
        },
        text_config={
            "model_type": "bert",
            "hidden_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 192,
            "max_position_embeddings": 256,
            "initializer_range": 0.1,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        projection_dim=64,
        logit_scale_init_value=3.0,
    )


class MovingCodebook:
    """Moves a codebook towards the running average of the tokens that fall on each row.

    Args:
        quantizer: Its codebook is moved.

    Attributes:
        tokens: The quantizer's last input, `(batch, z, y * x, hidden_size)`, with gradients.
    """

    def __init__(self, quantizer: MedCTQuantizer):
        self.codebook = quantizer.codebook
        self.use = torch.zeros(len(self.codebook))
        self.sums = torch.zeros_like(self.codebook)
        self.tokens = torch.empty(0)
        quantizer.register_forward_pre_hook(self._remember)

    def _remember(self, _quantizer: MedCTQuantizer, inputs: tuple[torch.Tensor]) -> None:
        self.tokens = inputs[0]

    def restart(self) -> None:
        """Set the rows to random tokens of the last batch."""
        tokens = self.tokens.detach().flatten(0, -2)
        self.codebook.copy_(tokens[torch.randperm(len(tokens))[: len(self.codebook)]])
        self.use.fill_(1.0)
        self.sums.copy_(self.codebook)

    def step(self) -> None:
        """Move every row towards its tokens of the last batch; set unused rows to random tokens."""
        tokens = self.tokens.detach().flatten(0, -2)
        nearest = (tokens @ F.normalize(self.codebook, dim=-1).t()).argmax(-1)
        keep = CODEBOOK_DECAY
        self.use.mul_(keep).add_(torch.bincount(nearest, minlength=len(self.use)), alpha=1 - keep)
        self.sums.mul_(keep).index_add_(0, nearest, tokens, alpha=1 - keep)
        dead = (self.use < CODEBOOK_LEAST_USE).nonzero().squeeze(-1)
        self.sums[dead] = tokens[torch.randint(len(tokens), (len(dead),))]
        self.use[dead] = 1.0
        self.codebook.copy_(self.sums / self.use[:, None])


def append_texts(
    texts: dict[str, torch.Tensor], others: dict[str, torch.Tensor], pad_id: int
) -> dict[str, torch.Tensor]:
    """Join two batches of texts, padded to the longer one.

    Args:
        texts: `input_ids` and `attention_mask`, `(texts, tokens)` each.
        others: Likewise; they come last.
        pad_id: Token that pads `input_ids`.
    """
    length = max(texts["input_ids"].shape[1], others["input_ids"].shape[1])
    return {
        name: torch.cat(
            [
                F.pad(part[name], (0, length - part[name].shape[1]), value=pad_id if name == "input_ids" else 0)
                for part in (texts, others)
            ]
        )
        for name in ("input_ids", "attention_mask")
    }


def report_and_prompt_loss(
    model: MedCTModel, batch: dict[str, Any], prompts: dict[str, torch.Tensor], pad_id: int
) -> torch.Tensor:
    """Mean of the losses from a batch's reports and labels; all texts are encoded together, once.

    Args:
        model: Trained on one process, without a wrapper.
        batch: From a `StudyLoader` with text.
        prompts: Sentences of all labels, `(2 * labels, tokens)` each.
        pad_id: The tokenizer's padding token.

    Returns:
        `()`.
    """
    size = len(batch["labels"])
    texts = append_texts(batch, prompts, pad_id)
    logits = model(pixel_values=batch["pixel_values"], **texts).logits_per_image
    present, absent = logits[:, size:].unflatten(-1, (-1, 2)).unbind(-1)
    label_loss = F.binary_cross_entropy_with_logits(present - absent, batch["labels"])
    return (contrastive_loss(logits[:, :size]) + label_loss) / 2


def train_base(model: MedCTModel, processor: MedCTProcessor) -> None:
    """Train all weights on site A's reports and labels.

    Args:
        model: Trained in place.
        processor: The model's.
    """
    codebook = MovingCodebook(model.vision_model.quantizer)
    classifier = nn.Linear(model.config.projection_dim, model.config.num_labels)
    latent: dict[str, torch.Tensor] = {}
    model.visual_projection.register_forward_hook(lambda _module, _inputs, output: latent.update(last=output))
    (prompts,) = prompts_for(model, processor)
    pad_id = processor.tokenizer.pad_token_id

    def classifier_loss(latents: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.binary_cross_entropy_with_logits(classifier(latents), labels)

    def see(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        model.vision_model(batch["pixel_values"])
        return classifier_loss(model.visual_projection(codebook.tokens.mean(dim=1).flatten(1)), batch["labels"])

    def see_and_read(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        loss = report_and_prompt_loss(model, batch, prompts, pad_id)
        return loss + classifier_loss(latent["last"], batch["labels"])

    weights = [*model.parameters(), *classifier.parameters()]
    patients = iter(range(FIRST_PATIENT, FIRST_PATIENT + (VISION_STEPS + JOINT_STEPS) * BATCH_SIZE))
    for name, steps, learning_rate, loss_of, moves in (
        ("vision", VISION_STEPS, VISION_LEARNING_RATE, see, False),
        ("joint", JOINT_STEPS, JOINT_LEARNING_RATE, see_and_read, True),
    ):
        source = phantom_source("A", list(itertools.islice(patients, steps * BATCH_SIZE)), SEED)
        loader = make_loader(source, model, processor, with_text=moves)
        optimizer = torch.optim.AdamW(weight_groups(weights), lr=learning_rate)
        schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
        model.train()
        torch.empty((), dtype=torch.int64).random_()  # one draw, on which the weights of phantom_base/ depend
        for step, batch in enumerate(bar := tqdm(loader, desc=name, total=steps, unit="step")):
            loss = loss_of(batch)
            loss.backward()
            nn.utils.clip_grad_norm_(weights, MAX_GRAD_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if moves:
                codebook.step() if step else codebook.restart()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def weight_groups(weights: list[nn.Parameter]) -> list[dict[str, Any]]:
    """Parameter groups: matrices, with weight decay, and vectors, without."""
    return [
        {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [weight for weight in weights if weight.ndim <= 1], "weight_decay": 0.0},
    ]


def make_loader(source: Source, model: MedCTModel, processor: MedCTProcessor, with_text: bool) -> StudyLoader:
    """Load batches in the order of the patients.

    Args:
        source: What to load.
        model: Its label names are used.
        processor: The model's.
        with_text: Whether batches hold the reports as tokens.
    """
    settings = {"batch_size": BATCH_SIZE, "with_text": with_text, "num_workers": NUM_WORKERS}
    return StudyLoader(source, processor, model.config.label_names, **settings)


def score(model: MedCTModel, processor: MedCTProcessor, site: str) -> dict[str, float]:
    """Zero-shot scores on a site's held-out phantoms.

    Args:
        model: The model to score; left in evaluation mode.
        processor: The model's.
        site: Key of `SITES`.

    Returns:
        See `zero_shot_scores`.
    """
    loader = make_loader(phantom_source(site, range(NUM_HELD_OUT), SEED), model, processor, with_text=False)
    scored = score_studies(model, loader, prompts_for(model, processor), Accelerator(cpu=True), site)
    return zero_shot_scores(scored.scores, scored.labels, model.config.label_names)


def make(output: Path) -> dict[str, Any]:
    """Train, score and save; returns the scores of both sites."""
    set_seed(SEED)
    torch.set_num_threads(2)  # another order of summation would give other weights
    config = make_config()
    tokenizer = make_tokenizer(config)
    config.text_config.vocab_size = len(tokenizer)
    model = MedCTModel(config)
    processor = MedCTProcessor(MedCTImageProcessor.from_config(config.vision_config), tokenizer)
    with whole_folder(output) as folder:
        train_base(model, processor)
        scores = {site: score(model, processor, site) for site in SITES}
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        write_json(folder / "scores.json", scores)
        (folder / "README.md").write_text(
            CARD.format(**{f"auroc_{site}": s["auroc"] for site, s in scores.items()}), encoding="utf-8"
        )
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder to create, in the form of a Hub model repository")
    args = parser.parse_args()
    logging.disable_progress_bar()
    register()  # the folder holds the code of its model
    with one_line_errors():
        scores = make(args.output)
    print({site: round(s["auroc"], 3) for site, s in scores.items()})


if __name__ == "__main__":
    main()
