"""Make `phantom_base/`: a small MedCT model, trained from scratch on synthetic phantoms of site A.

    python make_phantom_base.py OUTPUT

It stands in for CT-CLIP wherever no network is at hand: the default of `train.py`, the tests, the examples. It knows
phantoms and nothing else. About 20 minutes on 2 cores, from a fixed seed.

Unusual: the codebook moves here, as in CT-CLIP's own training, and never again afterwards.
"""

import argparse
import json
import re

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from medct import MedCTConfig, MedCTImageProcessor, MedCTModel, MedCTProcessor
from medct.data_medct import Collator, phantom_source
from medct.modeling_medct import MedCTQuantizer
from medct.phantoms import SITES, report_sentences
from medct.train import (
    TrainingSettings,
    endless,
    evaluate_zero_shot,
    make_loader,
    tokenize_prompts,
    training_loss,
)
from torch.nn import functional as F
from tqdm import tqdm
from transformers import BertTokenizer, get_cosine_schedule_with_warmup
from transformers.utils import logging

SEED = 0
TRAIN_PATIENTS = 6000
HELD_OUT_PATIENTS = 300
EPOCHS = 2
BATCH_SIZE = 16
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.05
# How much of the codebook's running average a step keeps, and below how many tokens a step a row is given away.
CODEBOOK_DECAY = 0.98
CODEBOOK_LEAST_USE = 0.5

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def make_tokenizer(config: MedCTConfig) -> BertTokenizer:
    """A BERT tokenizer whose words are those of both sites' reports, of the prompts, and single letters."""
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
    """Sizes at which training takes minutes; the voxels cover the same chest as the published model's."""
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
            "codebook_size": 512,
        },
        text_config={
            "model_type": "bert",
            "hidden_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 192,
            "max_position_embeddings": 256,
        },
        projection_dim=64,
    )


class MovingCodebook:
    """Moves a codebook towards the running average of the tokens that fall on each row.

    Args:
        quantizer: Whose codebook moves.
    """

    def __init__(self, quantizer: MedCTQuantizer):
        self.codebook = quantizer.codebook
        self.use = torch.zeros(len(self.codebook))
        self.sums = torch.zeros_like(self.codebook)
        self.tokens = torch.empty(0)
        quantizer.register_forward_pre_hook(self._remember)

    def _remember(self, _quantizer: MedCTQuantizer, inputs: tuple[torch.Tensor]) -> None:
        self.tokens = inputs[0].detach().flatten(0, -2)

    def restart(self) -> None:
        """Rows are random tokens of the last batch."""
        rows = torch.randperm(len(self.tokens))[: len(self.codebook)]
        self.codebook.copy_(self.tokens[rows])
        self.use.fill_(1.0)
        self.sums.copy_(self.codebook)

    def step(self) -> None:
        """Move every row by the tokens of the last batch; give rows that are out of use to random tokens."""
        nearest = (self.tokens @ F.normalize(self.codebook, dim=-1).t()).argmax(-1)
        keep = CODEBOOK_DECAY
        self.use.mul_(keep).add_(torch.bincount(nearest, minlength=len(self.use)), alpha=1 - keep)
        self.sums.mul_(keep).index_add_(0, nearest, self.tokens, alpha=1 - keep)
        dead = (self.use < CODEBOOK_LEAST_USE).nonzero().squeeze(-1)
        self.sums[dead] = self.tokens[torch.randint(len(self.tokens), (len(dead),))]
        self.use[dead] = 1.0
        self.codebook.copy_(self.sums / self.use[:, None])


def train_base(model: MedCTModel, processor: MedCTProcessor, accelerator: Accelerator) -> None:
    """Train all weights on reports and labels of site A."""
    settings = TrainingSettings(batch_size=BATCH_SIZE, seed=SEED)
    patients = range(HELD_OUT_PATIENTS, HELD_OUT_PATIENTS + TRAIN_PATIENTS)
    collator = Collator(processor, model.config.label_names, with_text=True)
    batches = endless(accelerator.prepare(make_loader(phantom_source("A", patients, SEED), settings, collator, True)))
    steps = EPOCHS * TRAIN_PATIENTS // BATCH_SIZE
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    (prompts,) = tokenize_prompts(model.config, processor)
    codebook = MovingCodebook(model.vision_model.quantizer)
    model.train()
    bar = tqdm(range(steps), unit="step")
    for step in bar:
        loss = training_loss(model, next(batches), prompts, "both", processor.tokenizer.pad_token_id)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        codebook.step() if step else codebook.restart()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def main() -> None:

    ap = argparse.ArgumentParser()
    ap.add_argument("output")
    args = ap.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    set_seed(SEED)
    config = make_config()
    tok = make_tokenizer(config)
    config.text_config.vocab_size = len(tok)
    model = MedCTModel(config)
    print(sum(p.numel() for p in model.parameters()), len(tok))
    processor = MedCTProcessor(MedCTImageProcessor.from_config(config.vision_config), tok)
    acc = Accelerator(cpu=True)
    train_base(model, processor, acc)
    for site in "AB":
        loader = acc.prepare(
            make_loader(
                phantom_source(site, range(300), SEED),
                TrainingSettings(),
                Collator(processor, config.label_names, False),
                False,
            )
        )
        print(
            site,
            json.dumps(evaluate_zero_shot(model, loader, tokenize_prompts(config, processor), acc, site), indent=1),
        )
    model.save_pretrained(args.output)
    processor.save_pretrained(args.output)


if __name__ == "__main__":
    main()
