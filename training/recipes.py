"""Recipes: whole choices of what is trained and how, each under a name; single flags override them."""

from dataclasses import dataclass
from typing import Literal

from medct.configuration_medct import MedCTConfig
from medct.training.lora import Adaptation, Target

RecipeName = Literal["vision", "paper", "full"]
MEASURED_WIDTH = 96
"""Of the vision encoder's layers in the phantom base, on which the learning rates were chosen."""


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how.

    Args:
        adaptation: Kind of adapter, or "full".
        targets: What gets one; of "full", which half is trained.
        rank: Of the matrices.
        alpha: Their scale.
        learning_rate: Highest, at `MEASURED_WIDTH`; see `learning_rate_of`.
    """

    adaptation: Adaptation
    targets: Target
    rank: int
    alpha: int
    learning_rate: float


RECIPES: dict[str, Recipe] = {
    # Every Linear of the vision encoder's layers and the patch projection; another scanner changes what is seen, not
    # what it is called. At the published sizes 1.12 M parameters.
    "vision": Recipe("rslora", "vision-all", rank=16, alpha=32, learning_rate=2e-3),
    # Attention of both encoders, as MedCT-VLM says; at the published sizes 1.57 M parameters.
    "paper": Recipe("lora", "both", rank=16, alpha=32, learning_rate=3e-3),
    # Every weight of the vision half, to compare with; saves a whole model.
    "full": Recipe("full", "vision-all", rank=16, alpha=32, learning_rate=1e-3),
}


def learning_rate_of(recipe: Recipe, config: MedCTConfig) -> float:
    """The recipe's learning rate for a base of any width.

    Adam moves each entry of a matrix by about the learning rate, however wide the layer is, and the layer sums over its
    width: so a layer that is five times as wide gets a fifth of the rate. Measured on the phantom base only.

    Args:
        recipe: The recipe.
        config: Configuration of the base.
    """
    width: int = config.vision_config.hidden_size  # type: ignore[union-attr]
    return recipe.learning_rate * MEASURED_WIDTH / width
