"""What the card of a model says of it, such as that it has never seen a patient."""

from typing import Any

from huggingface_hub import ModelCard
from transformers.utils.hub import cached_file


def said_on_card(name: str, key: str, **hub: Any) -> Any:
    """A value of the metadata on the card of a model or an adapter; `None` if it has none, or no card can be had.

    Args:
        name: Hub id or folder.
        key: Of the metadata.
        hub: `revision` and `token`, as for `from_pretrained`.
    """
    try:
        path = cached_file(name, "README.md", _raise_exceptions_for_missing_entries=False, **hub)
        return None if path is None else ModelCard.load(path, ignore_metadata_errors=True).data.get(key)
    except OSError:  # no such repository, or no network
        return None


def knows_drawings_only(name: str) -> bool:
    """Whether the card of a model or an adapter says that it has learned from synthetic drawings alone.

    Args:
        name: Hub id or folder.
    """
    return "synthetic" in (said_on_card(name, "tags") or [])
