"""How far zero-shot scores move by wording alone: templates and names of findings, tried on tuning patients.

Images are encoded once, whatever the number of wordings. What is chosen is chosen on these patients, so its scores here
are too optimistic; others show what it is worth.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from medct.configuration_medct import Prompt
from medct.evaluation.metrics import enough, zero_shot_scores
from medct.evaluation.scoring import embed_prompts
from medct.modeling_medct import MedCTModel, zero_shot_probabilities
from medct.processing_medct import MedCTProcessor

Template = tuple[str, str]

# CT-CLIP's, and the seven of RadFinder's ensemble, of which one is the same.
TEMPLATES: tuple[Template, ...] = (
    ("{label} is present.", "{label} is not present."),
    ("{label}.", "No {label}."),
    ("Findings are compatible with {label}.", "Findings are not compatible with {label}."),
    ("There is {label}.", "There is no {label}."),
    ("{label} is seen.", "{label} is not seen."),
    ("{label}.", "Not {label}."),
    ("{label} is observed.", "{label} is not observed."),
)
SYNONYMS: dict[str, tuple[str, ...]] = {
    "Medical material": ("Medical device", "Implanted device", "Catheter"),
    "Arterial wall calcification": ("Aortic calcification", "Atherosclerotic plaque"),
    "Cardiomegaly": ("Enlarged heart", "Increased heart size"),
    "Pericardial effusion": ("Fluid in the pericardium", "Pericardial fluid"),
    "Coronary artery wall calcification": ("Coronary calcification", "Coronary artery plaque"),
    "Hiatal hernia": ("Hiatus hernia", "Sliding hernia"),
    "Lymphadenopathy": ("Enlarged lymph nodes", "Pathological lymph nodes"),
    "Emphysema": ("Emphysematous changes", "Pulmonary emphysema"),
    "Atelectasis": ("Atelectatic changes", "Volume loss"),
    "Lung nodule": ("Pulmonary nodule", "Nodule in the lung"),
    "Lung opacity": ("Pulmonary opacity", "Ground-glass opacity"),
    "Pulmonary fibrotic sequela": ("Fibrotic changes", "Pulmonary fibrosis"),
    "Pleural effusion": ("Fluid in the pleural space", "Pleural fluid"),
    "Mosaic attenuation pattern": ("Mosaic attenuation", "Mosaic perfusion"),
    "Peribronchial thickening": ("Bronchial wall thickening", "Thickened bronchial walls"),
    "Consolidation": ("Pulmonary consolidation", "Airspace consolidation"),
    "Bronchiectasis": ("Bronchiectatic changes", "Dilated bronchi"),
    "Interlobular septal thickening": ("Thickened interlobular septa", "Septal thickening"),
}
"""Other names for CT-CLIP's findings."""


def wording_scores(
    model: MedCTModel,
    processor: MedCTProcessor,
    image_embeds: np.ndarray,
    templates: Sequence[Template],
    names: Mapping[str, Sequence[Prompt]],
    accelerator: Accelerator,
) -> dict[str, np.ndarray]:
    """Scores of every wording.

    Args:
        model: Zero-shot model.
        processor: The model's.
        image_embeds: `(studies, d)`, from `embed_studies`.
        templates: Pairs of sentences (present, not present) with `{label}`.
        names: By label, the names to try, or pairs of sentences, which are the same in all templates.
        accelerator: Its device and precision are used.

    Returns:
        By label, `(templates, names of the label, studies)`, in [0, 1].
    """
    flat = {str(index): name for index, name in enumerate(name for each in names.values() for name in each)}
    images = torch.from_numpy(image_embeds).to(accelerator.device)
    by_template = []
    for template in templates:
        turns = model.config.label_prompts(flat, [template])
        prompts = [dict(processor(text=sentences, return_tensors="pt")) for sentences in turns]
        with torch.no_grad():
            logits = [model.get_logits(images, texts) for texts in embed_prompts(model, prompts, accelerator)]
        by_template.append(np.mean([zero_shot_probabilities(each).cpu().numpy() for each in logits], axis=0))
    scores = np.stack(by_template).swapaxes(1, 2)  # (templates, all names, studies)
    ends = np.cumsum([len(each) for each in names.values()])
    return dict(zip(names, np.split(scores, ends[:-1], axis=1), strict=True))


def spread(
    scores: Mapping[str, np.ndarray],
    labels: np.ndarray,
    templates: Sequence[Template],
    names: Mapping[str, Sequence[Prompt]],
    patients: Sequence[str] | None = None,
    own_templates: int = 1,
) -> dict[str, Any]:
    """What wording does to AUROC, and the wording that did best.

    Args:
        scores: From `wording_scores`.
        labels: `(studies, labels)`, 0, 1 or NaN for unknown, in the order of `names`.
        templates: As they were scored; the first is the usual one.
        names: Likewise, and of each label the first name.
        patients: `(studies,)`, who was scanned; None makes every scan a patient of its own.
        own_templates: How many of the first templates are the usual ones, whose mean score is used.

    Returns:
        Ready for JSON. `studies` and `patients`; `findings`: by label the AUROC of the usual wording (`usual`), and
        `mean`, `lowest`, `highest` and `best` (its `template` and `name`) of all, with the number of `wordings`;
        `templates`: of each the mean AUROC over labels with their usual names; `ensemble`: that of the mean score of
        all templates; `chosen`: `prompt_templates` (the best one, or all, or all usual ones, where their mean is
        better), `names` (of a label with too few patients, see `metrics.enough`, the usual one) and `auroc`.

    Raises:
        ValueError: If no label varies.
    """
    usual = np.stack([each[:, 0] for each in scores.values()], axis=-1)  # (templates, studies, labels)
    together = [[index] for index in range(len(templates))] + [list(range(len(templates)))]
    if own_templates > 1:
        together.append(list(range(own_templates)))
    means = [zero_shot_scores(usual[each].mean(axis=0), labels, list(names))["auroc"] for each in together]
    used = together[int(np.argmax(means))]
    findings, chosen_names, chosen = {}, {}, []
    of_each = zip(scores.items(), np.asarray(labels, float).T, enough(labels, patients), strict=True)
    for (label, each), truth, is_enough in of_each:
        findings[label] = _finding(each, truth, templates, names[label], own_templates)
        with_templates = each[used].mean(axis=0)  # (names, studies)
        index = int(np.argmax(_aurocs(with_templates, truth))) if is_enough else 0  # the first of equals
        chosen_names[label] = names[label][index]
        chosen.append(with_templates[index])
    return {
        "studies": len(labels),
        "patients": len(labels) if patients is None else len(set(patients)),
        "findings": findings,
        "templates": [
            {"template": list(template), "auroc": float(mean)} for template, mean in zip(templates, means, strict=False)
        ],
        "ensemble": float(means[len(templates)]),
        "chosen": {
            "prompt_templates": [list(templates[index]) for index in used],
            "names": {label: name for label, name in chosen_names.items() if name != names[label][0]},
            "auroc": float(zero_shot_scores(np.stack(chosen, axis=-1), labels, list(names))["auroc"]),
        },
    }


def _aurocs(scores: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """`(wordings,)` of `(wordings, studies)`; NaN where the label does not vary."""
    known = truth[~np.isnan(truth)]
    if len(np.unique(known)) < 2:
        return np.full(len(scores), np.nan)
    figures = zero_shot_scores(scores.T, np.repeat(truth[:, None], len(scores), 1), list(map(str, range(len(scores)))))
    return np.array([figures[f"auroc/{index}"] for index in range(len(scores))])


def _finding(
    scores: np.ndarray, truth: np.ndarray, templates: Sequence[Template], names: Sequence[Prompt], own_templates: int
) -> dict[str, Any]:
    is_other = np.ones(scores.shape[:2], bool)
    is_other[1:, 0] = isinstance(names[0], str)  # sentences are the same in every template, so one wording
    aurocs = _aurocs(scores[is_other], truth)
    usual = float(_aurocs(scores[:own_templates, 0].mean(axis=0, keepdims=True), truth)[0])
    about = {"present": int((truth == 1).sum()), "absent": int((truth == 0).sum()), "wordings": len(aurocs)}
    if np.isnan(aurocs).all():
        return about | dict.fromkeys(("usual", "mean", "lowest", "highest", "best"))
    template, name = np.argwhere(is_other)[int(np.argmax(aurocs))]
    return about | {
        "usual": usual,
        "mean": float(aurocs.mean()),
        "lowest": float(aurocs.min()),
        "highest": float(aurocs.max()),
        "best": {"template": list(templates[template]), "name": names[name]},
    }
