"""Volumes and texts to the model's inputs, in one call."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from transformers import BatchFeature, ProcessorMixin

from .configuration_medct import refuse_unknown
from .errors_medct import MedCTError
from .workers_medct import PicklesAnywhere

if TYPE_CHECKING:
    # Files that a saved file imports are saved and fetched with it. The model's configuration names this pipeline, and
    # no pipeline runs without a processor; importing it for real would cost every reader of the processor a second.
    from .image_processing_medct import MedCTImageProcessor
    from .pipeline_medct import ZeroShotCTClassificationPipeline  # noqa: F401


class TextError(MedCTError, ValueError):
    """Texts that cannot be tokenized; the message says why."""


def refuse_no_words(tokenizer: Any) -> None:
    """Refuse a tokenizer to which all words are one: transformers makes it where the files of one are missing.

    Args:
        tokenizer: Of transformers, or `None`.

    Raises:
        TextError: If it holds nothing but special tokens.
    """
    if tokenizer is not None and len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise TextError(
            f"{tokenizer.name_or_path or 'The tokenizer'}: a tokenizer that knows no words, since tokenizer.json or "
            "vocab.txt is missing or could not be fetched. Put it into the folder, or connect to the Hub."
        )


class MedCTProcessor(PicklesAnywhere, ProcessorMixin):
    """An image processor for CT volumes and a tokenizer.

    `processor(images=..., text=..., return_tensors="pt")` gives `pixel_values` of the volumes (see
    `MedCTImageProcessor.preprocess` for what they may be) and `input_ids` and `attention_mask` of the texts, with what
    else the tokenizer makes (BERT's: `token_type_ids`), padded to the longest and cut at what the encoder can read.

    Args:
        image_processor: A `MedCTImageProcessor`.
        tokenizer: The text encoder's.

    Raises:
        TextError: If the tokenizer knows no words, or the list of texts is empty or holds something else than texts.
        TypeError: If there is no such argument.
    """

    image_processor: "MedCTImageProcessor"

    _auto_class = "AutoProcessor"
    text_kwargs = {"padding": True, "truncation": True}

    def __init__(self, image_processor=None, tokenizer=None, **kwargs):
        refuse_no_words(tokenizer)
        super().__init__(image_processor, tokenizer, **kwargs)

    @classmethod
    def from_args_and_dict(cls, args: Any, processor_dict: dict[str, Any], **kwargs) -> Any:
        """As in transformers, but settings that mean nothing here are refused.

        Args:
            args: Image processor and tokenizer.
            processor_dict: What `processor_config.json` holds.
            kwargs: As for transformers' method.

        Raises:
            UnknownSettingError: If a newer version has written one.
        """
        refuse_unknown(processor_dict.keys() - {"processor_class", *cls.get_attributes()}, "The processor")
        return super().from_args_and_dict(args, processor_dict, **kwargs)

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """Make the model's inputs of volumes and texts.

        Args:
            images: See `MedCTImageProcessor.preprocess`.
            text: A sentence, or a list of them.
            kwargs: Of `MedCTImageProcessor.preprocess`, and of the tokenizer.
        """
        if text is not None and not isinstance(text, str):
            text = list(text)
            if not text or not all(isinstance(each, str) for each in text):
                shown = "an empty list" if not text else repr(next(each for each in text if not isinstance(each, str)))
                raise TextError(f"`text` is a sentence or a list of them, not {shown}.")
        self._refuse_unknown(kwargs)
        return super().__call__(images=images, text=text, **kwargs)

    def _refuse_unknown(self, given: Iterable[str]) -> None:
        """Refuse what belongs to neither images nor texts; the library would go on without it."""
        takes = self.valid_processor_kwargs.__annotations__
        parts = (takes["images_kwargs"], takes["text_kwargs"], getattr(self.image_processor, "valid_kwargs", None))
        known = {"common_kwargs", *takes}.union(*(getattr(part, "__annotations__", ()) for part in parts))
        if strange := [name for name in given if name not in known]:
            raise TypeError(f"There is no argument {strange[0]!r}; see `help(MedCTImageProcessor.preprocess)`.")

    def remark_on_words(self, prompts: Sequence[Sequence[str]], labels: Sequence[str]) -> str | None:
        """What should be said of labels in whose prompts the tokenizer finds words that it does not know.

        Such words are all one to the model, so that labels in another script cannot be told from one another.

        Args:
            prompts: From `MedCTConfig.label_prompts`.
            labels: The labels that they ask for.

        Returns:
            A remark; `None` if all words are known.
        """
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        # As in each call: other settings would be those of calls by other threads, for the tokenizer keeps the last.
        ids = [self.tokenizer(list(template), **self.text_kwargs)["input_ids"] for template in prompts if template]
        told = {
            label: [tuple(sentence) for each in ids for sentence in each[2 * index : 2 * index + 2]]
            for index, label in enumerate(labels)
        }
        strange = [label for label, texts in told.items() if any(unknown in text for text in texts)]
        if unknown is None or not strange:
            return None
        alike = [label for label in strange if sum(told[label] == texts for texts in told.values()) > 1]
        which = "they" if alike == strange else _few(alike)
        said = f": {which} cannot be told from one another" if alike else ""
        return (
            f"The model's tokenizer does not know words in the prompts of {len(strange)} of {len(labels)} labels "
            f"({_few(strange)}){said}. Give them words that it knows (in a table of labels: the column `words`)."
        )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")


__all__ = ["MedCTProcessor"]
