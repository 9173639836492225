"""Scoring spread over processes: those without any study take part, and bad studies cost themselves alone."""

import dataclasses

import pytest
import torch
from accelerate import Accelerator

from medct import CT_CLIP_LABELS, MedCTModel
from medct.data import DataError, StudyLoader, phantom_source
from medct.evaluation import scoring
from medct.evaluation.scoring import prompts_for, score_studies


class _Unread:
    def __call__(self, key):
        return {"id": f"study-{key}", "patient": "p", "report": "", "labels": [], "volume": "nothing.nii.gz"}


def _loader(processor, source, rank=0, world_size=1):
    return StudyLoader(
        source, processor, CT_CLIP_LABELS, batch_size=2, with_text=False, rank=rank, world_size=world_size
    )


def test_a_process_without_studies_has_the_scores_of_all(converted, processor, monkeypatch):
    """As the other process does, it goes through the model: a sharded one waits for all."""
    model, source = MedCTModel.from_pretrained(converted), phantom_source("A", range(1), 0)
    prompts, accelerator, passes, rows = prompts_for(model, processor), Accelerator(cpu=True), [], []
    monkeypatch.setattr(scoring, "of_all", lambda ours: rows.append(ours) or [ours])
    alone = score_studies(model, _loader(processor, source), prompts, accelerator, "alone")

    others = iter([1.0, 0.0])  # one batch, then none
    monkeypatch.setattr(scoring, "sum_over_processes", lambda ours: ours + next(others))
    monkeypatch.setattr(scoring, "of_all", lambda ours: [*rows, ours])
    model.vision_model.register_forward_hook(lambda *_: passes.append(1))
    shared = score_studies(model, _loader(processor, source, 1, 2), prompts, accelerator, "shared")
    assert (shared.ids, len(passes)) == (alone.ids, 1)
    assert torch.equal(torch.from_numpy(shared.scores), torch.from_numpy(alone.scores))


@pytest.mark.parametrize("processes", [1, 2])
def test_studies_of_which_none_can_be_read_are_refused(converted, processor, processes):
    model, source = MedCTModel.from_pretrained(converted), phantom_source("A", range(2), 0)
    loader = _loader(processor, dataclasses.replace(source, read=_Unread()), world_size=processes)
    with pytest.raises(DataError, match=r"(none of its studies could|2 of 2 studies could not) be read"):
        score_studies(model, loader, prompts_for(model, processor), Accelerator(cpu=True), "score")
