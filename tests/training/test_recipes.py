"""Recipes: whole choices, which single flags override."""

import dataclasses

import pytest
import torch

from medct import MedCTConfig, MedCTForImageClassification, MedCTModel
from medct.training.lora import add_lora, trainable, trains_text, unlock
from medct.training.recipes import MEASURED_WIDTH, RECIPES
from medct.training.settings import PHANTOM_BASE, TrainingSettings, complete

SMALL = MedCTConfig.from_pretrained(PHANTOM_BASE)
MOST_PARAMETERS = 1_670_000  # MedCT-VLM


@pytest.mark.parametrize("name, parameters", [("vision", 1_120_640), ("paper", 1_572_864)])
def test_adapters_of_the_published_sizes_are_no_larger_than_the_papers(name, parameters):
    recipe = RECIPES[name]
    with torch.device("meta"):
        model = add_lora(MedCTModel(MedCTConfig()), targets=recipe.targets, rank=recipe.rank)
    trained = sum(parameter.numel() for parameter in trainable(model).values())
    assert trained == parameters <= MOST_PARAMETERS
    assert trains_text(model) == (name == "paper")


def test_a_recipe_fills_in_what_no_flag_says():
    settings = complete(TrainingSettings(rank=4), SMALL)
    recipe = RECIPES["vision"]
    assert (settings.rank, settings.adaptation, settings.targets) == (4, recipe.adaptation, recipe.targets)
    assert complete(settings, SMALL) == settings
    paper = complete(TrainingSettings(recipe="paper", targets="vision", learning_rate=1e-5), SMALL)
    assert (paper.adaptation, paper.targets, paper.learning_rate) == ("lora", "vision", 1e-5)


def test_wider_layers_have_smaller_learning_rates():
    small, published = (complete(TrainingSettings(), config).learning_rate for config in (SMALL, MedCTConfig()))
    assert SMALL.vision_config.hidden_size == MEASURED_WIDTH
    assert small == RECIPES["vision"].learning_rate
    assert published == pytest.approx(small * 96 / 512)


def test_what_is_kept_and_replayed_is_only_taken_for_granted_with_phantoms():
    default = complete(TrainingSettings(), SMALL)
    assert (default.keep, default.replay) == ("phantoms:A", "phantoms:A")
    for settings in (TrainingSettings(data="scans"), TrainingSettings(phantom_site="A")):
        own = complete(settings, SMALL)
        assert (own.keep, own.replay) == ("none", "none")
    flags = dataclasses.replace(TrainingSettings(), keep="none", replay="scans")
    assert (complete(flags, SMALL).keep, complete(flags, SMALL).replay) == ("none", "scans")


def test_full_training_of_the_vision_half_trains_a_classifiers_head(converted, classifier_folder):
    model = unlock(MedCTForImageClassification.from_pretrained(classifier_folder), "vision-all")
    assert all(parameter.requires_grad for parameter in model.parameters()) and not trains_text(model)
    names = trainable(unlock(MedCTModel.from_pretrained(converted), "vision-all"))
    assert {name.split(".")[0] for name in names} == {"vision_model", "visual_projection"}
