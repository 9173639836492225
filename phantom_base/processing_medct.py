"""Volumes and texts to the model's inputs, in one call."""

from typing import TYPE_CHECKING

from transformers import ProcessorMixin

if TYPE_CHECKING:
    # Files that a saved file imports are saved and fetched with it. The model's configuration names this pipeline, and
    # no pipeline runs without a processor; importing it for real would cost every reader of the processor a second.
    from .pipeline_medct import ZeroShotCTClassificationPipeline  # noqa: F401


class MedCTProcessor(ProcessorMixin):
    """An image processor for CT volumes and a tokenizer.

    `processor(images=..., text=..., return_tensors="pt")` gives `pixel_values` of the volumes (see
    `MedCTImageProcessor.preprocess` for what they may be) and `input_ids` and `attention_mask` of the texts, padded to
    the longest and cut at what the text encoder can read.

    Args:
        image_processor: A `MedCTImageProcessor`.
        tokenizer: The text encoder's.
    """

    text_kwargs = {"padding": True, "truncation": True}

    def __init__(self, image_processor=None, tokenizer=None, **kwargs):
        super().__init__(image_processor, tokenizer, **kwargs)


__all__ = ["MedCTProcessor"]
