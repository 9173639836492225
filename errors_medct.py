"""What all errors have in common that a user can mend."""


class MedCTError(Exception):
    """An input, a setting or a place that cannot be used; the message says in one sentence what, where and the remedy.

    Whatever else reaches a caller is a fault of this package or of a library.
    """


__all__ = ["MedCTError"]
