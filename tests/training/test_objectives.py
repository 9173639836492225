"""Losses of a step: what they are, and that they do not depend on how the batch is divided."""

import copy
import os
import subprocess
import sys
import weakref

import pytest
import torch
import torch.multiprocessing
from ct_clip_reference import SIZES
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from medct import MedCTModel
from medct.common.distributed import shard, sum_gradients
from medct.training.lora import add_lora, core, trainable, weights_to_save
from medct.training.objectives import StepLoss, label_loss, recomputing, report_loss
from medct.training.settings import PHANTOM_BASE

STUDIES = 8


@pytest.fixture
def quiet_model(converted) -> MedCTModel:
    """A model without dropout, whose random numbers would depend on how a batch is divided."""
    model = MedCTModel.from_pretrained(converted)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


@pytest.fixture
def studies() -> dict[str, torch.Tensor]:
    """Eight studies, some labels unknown; the first two and the last share a report."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 2, (STUDIES, 3), generator=generator).float()
    labels[0, 1] = labels[5, 2] = labels[6, 0] = torch.nan
    return {
        "pixel_values": torch.rand(STUDIES, 1, SIZES["frames"], *SIZES["image_size"], generator=generator) * 2 - 1,
        "input_ids": torch.randint(5, SIZES["text_config"]["vocab_size"], (STUDIES, 7), generator=generator),
        "attention_mask": torch.ones(STUDIES, 7, dtype=torch.long),
        "labels": labels,
        "report_ids": torch.tensor([1, 1, 2, 3, 4, 5, 6, 1]),
    }


@pytest.fixture
def prompts() -> dict[str, torch.Tensor]:
    """A sentence for the presence and one for the absence of each of three labels."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(5, SIZES["text_config"]["vocab_size"], (6, 5), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def part(studies: dict[str, torch.Tensor], rows: slice) -> dict[str, torch.Tensor]:
    return {name: tensor[rows] for name, tensor in studies.items()}


def with_lora(model: MedCTModel) -> torch.nn.Module:
    """LoRA whose update is not zero, so that both of its matrices have gradients."""
    torch.manual_seed(0)
    adapted = add_lora(model, rank=2, train_logit_scale=True).train()
    with torch.no_grad():
        for name, parameter in trainable(adapted).items():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return adapted


def step(
    model: torch.nn.Module, objective: str, micro_batches: list, prompts: dict
) -> tuple[float, dict[str, torch.Tensor]]:
    loss = StepLoss(objective).backward(core(model), micro_batches, [prompts])
    gradients = {name: parameter.grad.clone() for name, parameter in trainable(model).items()}
    model.zero_grad()
    return loss.item(), gradients


def test_label_loss_is_the_mean_cross_entropy_of_the_known_pairs():
    logits = torch.tensor([[2.0, 1.0, 0.0, 3.0], [5.0, 0.0, 1.0, 1.0]])
    labels = torch.tensor([[1.0, 0.0], [torch.nan, 1.0]])
    expected = F.binary_cross_entropy(torch.tensor([1.0, -3.0, 0.0]).sigmoid(), torch.tensor([1.0, 0.0, 1.0]))
    torch.testing.assert_close(label_loss(logits, labels) / 3, expected)


class Precisions(TorchDispatchMode):
    """Notes the types of all that is computed."""

    def __init__(self):
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.seen |= {each.dtype for each in tree_leaves(result) if isinstance(each, torch.Tensor)}
        return result


def test_no_step_computes_in_double_precision(converted, studies, prompts):
    """Which Apple's GPUs do not have."""
    model = with_lora(MedCTModel.from_pretrained(converted))
    with Precisions() as precisions:
        step(model, "both", [part(studies, slice(0, 4)), part(studies, slice(4, 8))], prompts)
    assert torch.float32 in precisions.seen
    assert not precisions.seen & {torch.float64, torch.complex64, torch.complex128}


def test_unknown_labels_have_no_gradient():
    logits = torch.randn(2, 4, requires_grad=True)
    label_loss(logits, torch.tensor([[1.0, torch.nan], [torch.nan, 0.0]])).backward()
    assert torch.equal(logits.grad != 0, torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]]).bool())


def test_report_loss_is_the_symmetric_cross_entropy():
    images, texts = F.normalize(torch.randn(4, 6), dim=-1), F.normalize(torch.randn(4, 6), dim=-1)
    logits = 10 * images @ texts.t()
    own = torch.arange(4)
    expected = (F.cross_entropy(logits, own) + F.cross_entropy(logits.t(), own)) / 2
    torch.testing.assert_close(report_loss(images, texts, own, lambda a, b: 10 * a @ b.t()), expected)


def test_studies_that_share_a_report_are_not_negatives():
    images, texts = torch.randn(3, 6), torch.randn(3, 6)
    texts[1] = texts[0]
    logits = images @ texts.t()
    kept = [[0, 2], [1, 2], [0, 1, 2]]  # columns that row i is contrasted with
    rows = [logits[row, columns].logsumexp(0) - logits[row, row] for row, columns in enumerate(kept)]
    rows += [logits[columns, row].logsumexp(0) - logits[row, row] for row, columns in enumerate(kept)]
    loss = report_loss(images, texts, torch.tensor([7, 7, 8]), lambda a, b: a @ b.t())
    torch.testing.assert_close(loss, torch.stack(rows).mean())


@pytest.mark.parametrize("objective", ["both", "contrastive", "prompts"])
def test_accumulated_micro_batches_equal_one_batch(objective, quiet_model, studies, prompts):
    model = with_lora(quiet_model)
    whole_loss, whole = step(model, objective, [studies], prompts)
    parts = [part(studies, slice(start, start + 2)) for start in range(0, STUDIES, 2)]
    loss, gradients = step(model, objective, parts, prompts)
    assert loss == pytest.approx(whole_loss, abs=1e-5)
    scale_has_gradient = [bool(gradient.any()) for name, gradient in whole.items() if "logit_scale" in name]
    assert scale_has_gradient == [True]
    for name, gradient in whole.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=0, msg=name)


def test_accumulation_repeats_the_dropout_of_the_first_pass(converted, studies, prompts):
    """Otherwise the recomputed activations would belong to a different function than the loss."""
    model = with_lora(MedCTModel.from_pretrained(converted))
    assert any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules())
    parts = [part(studies, slice(start, start + 4)) for start in (0, 4)]
    with_graph = StepLoss("contrastive")

    def gradients(group: list) -> dict[str, torch.Tensor]:
        torch.manual_seed(11)
        return step(model, "contrastive", group, prompts)[1]

    cached = gradients(parts)
    torch.manual_seed(11)
    images = [core(model).get_image_features(batch["pixel_values"]).pooler_output for batch in parts]
    texts = [
        core(model).get_text_features(batch["input_ids"], batch["attention_mask"]).pooler_output for batch in parts
    ]
    report_loss(torch.cat(images), torch.cat(texts), studies["report_ids"], core(model).get_logits).backward()
    assert with_graph.uses_reports
    for name, parameter in trainable(model).items():
        torch.testing.assert_close(cached[name], parameter.grad, atol=1e-6, rtol=0, msg=name)


def test_a_recomputed_pass_draws_on_apples_gpus_as_the_first(apples_draws):
    """Torch alone would repeat only what CPUs and other cards draw."""

    def drop_out(values: torch.Tensor) -> torch.Tensor:
        return values * torch.rand(8, generator=apples_draws)

    values = torch.ones(8, requires_grad=True)
    kept = checkpoint(drop_out, values, **recomputing())
    between = apples_draws.get_state()
    kept.sum().backward()
    assert torch.equal(values.grad, kept)
    assert torch.equal(apples_draws.get_state(), between)


@pytest.mark.parametrize("objective", ["contrastive", "prompts"])
def test_memory_is_that_of_one_micro_batch(objective, quiet_model, studies, prompts):
    """However many there are: the activations of one are freed before those of the next are made."""

    def most_alive(micro_batches: int) -> int:
        alive, most = weakref.WeakSet(), 0

        def note(module, inputs, output):
            nonlocal most
            if output.requires_grad:
                alive.add(output)
                most = max(most, len(alive))

        model = with_lora(copy.deepcopy(quiet_model))
        hooks = [
            layer.register_forward_hook(note)
            for name, layer in model.named_modules()
            if "vision_model" in name and name.endswith("q_proj")
        ]
        parts = [part(studies, slice(start, start + 2)) for start in range(0, 2 * micro_batches, 2)]
        step(model, objective, parts, prompts)
        assert hooks
        return most

    assert 0 < most_alive(4) == most_alive(2) <= most_alive(1)


PEAK_OF_A_STEP = """
import sys, torch
from pathlib import Path
from medct import MedCTModel
from medct.training.lora import add_lora, core
from medct.training.objectives import StepLoss
micro_batches, size = int(sys.argv[1]), int(sys.argv[2])
model = add_lora(MedCTModel.from_pretrained(sys.argv[3])).train()
volumes = torch.rand(16, 1, *core(model).config.vision_config.image_size)
texts = {"input_ids": torch.ones(size, 8, dtype=torch.long), "attention_mask": torch.ones(size, 8, dtype=torch.long)}
batches = [
    {"pixel_values": volumes[:size], "labels": torch.zeros(size, 18), "report_ids": torch.arange(size), **texts}
    for _ in range(micro_batches)
]
StepLoss("contrastive").backward(core(model), batches, texts)
# Of this program alone; the peak that `getrusage` tells begins with that of the process that started it.
print(*(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")))
"""


@pytest.mark.slow
def test_a_large_batch_of_reports_needs_the_memory_of_a_small_one():
    """Sixteen times the studies in micro-batches of four, and sixteen times as a single batch to see the difference."""

    def peak_mib(micro_batches: int, size: int) -> float:
        command = [sys.executable, "-c", PEAK_OF_A_STEP, str(micro_batches), str(size), str(PHANTOM_BASE)]
        # Freed memory goes back to the system at once, or the peak would be what the C library keeps, not what is used.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
        return int(subprocess.check_output(command, env=environment)) / 1024

    small = peak_mib(1, 4)
    assert peak_mib(16, 4) - small < 0.1 * (peak_mib(1, 16) - small)


def test_all_templates_are_learned_from(quiet_model, studies, prompts):
    """As all of them are scored: the loss and its gradients are means over templates."""
    model = with_lora(quiet_model)
    other = {name: part.flip(0) for name, part in prompts.items()}  # "absent" and "present" are swapped
    losses, gradients = [], []
    for templates in ([prompts], [other], [prompts, other]):
        losses.append(StepLoss("prompts").backward(core(model), [studies], templates))
        gradients.append({name: parameter.grad.clone() for name, parameter in trainable(model).items()})
        model.zero_grad()
    torch.testing.assert_close(losses[2], (losses[0] + losses[1]) / 2)
    assert losses[0] != losses[1]
    for name, gradient in gradients[2].items():
        torch.testing.assert_close(gradient, (gradients[0][name] + gradients[1][name]) / 2, atol=1e-5, rtol=0)


def test_prompts_are_encoded_once_per_step(quiet_model, studies, prompts, monkeypatch):
    model = with_lora(quiet_model)
    encoded = []
    encode = MedCTModel.get_text_features
    monkeypatch.setattr(
        MedCTModel, "get_text_features", lambda self, *args, **kw: encoded.append(1) or encode(self, *args, **kw)
    )
    step(model, "prompts", [part(studies, slice(0, 4)), part(studies, slice(4, 8))], prompts)
    assert len(encoded) == 1


def _in_one_of_two(rank: int, folder: str, model: MedCTModel, studies: dict, prompts: dict, sharded: bool) -> None:
    """Half of the studies in each of two processes; the first writes what came out."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results = {}
    model = with_lora(model)
    if sharded:
        shard(core(model))
    for objective in ("both", "contrastive", "prompts"):
        halves = [part(studies, slice(4 * rank, 4 * rank + 2)), part(studies, slice(4 * rank + 2, 4 * rank + 4))]
        loss = StepLoss(objective).backward(core(model), halves, [prompts])
        if not sharded:
            sum_gradients(trainable(model).values())
        gradients = {name: _full(parameter.grad) for name, parameter in trainable(model).items()}
        results[objective] = (loss.item(), gradients)
        model.zero_grad()
    results["weights"] = weights_to_save(model)
    if rank == 0:
        torch.save(results, f"{folder}/results")
    torch.distributed.barrier()  # none ends while another still talks to it
    torch.distributed.destroy_process_group()


def _full(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


@pytest.mark.parametrize("sharded", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["whole", "fsdp2"])
def test_two_processes_equal_one(sharded, quiet_model, studies, prompts, tmp_path):
    untouched = copy.deepcopy(quiet_model)
    torch.multiprocessing.spawn(
        _in_one_of_two, args=(str(tmp_path), untouched, studies, prompts, sharded), nprocs=2, join=True
    )
    results = torch.load(tmp_path / "results", weights_only=True)
    model = with_lora(quiet_model)
    for objective in ("both", "contrastive", "prompts"):
        whole_loss, whole = step(model, objective, [studies], prompts)
        loss, gradients = results[objective]
        assert loss == pytest.approx(whole_loss, abs=1e-5)
        for name, gradient in whole.items():
            torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=0, msg=f"{objective} {name}")
    weights = weights_to_save(model)
    assert results["weights"].keys() == weights.keys()
    assert all(torch.equal(results["weights"][name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("objective", ["prompts", "both"])
def test_a_batch_of_unknown_labels_alone_has_no_loss_from_them(quiet_model, studies, prompts, objective):
    unknown = {**studies, "labels": torch.full_like(studies["labels"], torch.nan)}
    model = add_lora(quiet_model, rank=2)
    loss = StepLoss(objective).backward(core(model), [part(unknown, slice(0, 4))], [prompts])
    assert loss.isfinite()
    assert loss == 0 or objective == "both"
    gradients = [parameter.grad for parameter in trainable(model).values() if parameter.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
