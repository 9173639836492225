"""Whether a model has ever seen a patient."""

from huggingface_hub import ModelCard
from transformers.utils.hub import cached_file


def knows_drawings_only(name: str) -> bool:
    """Whether the card of a model or an adapter says that it has learned from synthetic drawings alone.

    Args:
        name: Hub id or folder.
    """
    try:
        path = cached_file(name, "README.md", _raise_exceptions_for_missing_entries=False)
        tags = [] if path is None else ModelCard.load(path, ignore_metadata_errors=True).data.get("tags")
    except OSError:  # no network
        return False
    return "synthetic" in (tags or [])
