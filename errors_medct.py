"""The base class of all errors that a user can fix."""


class MedCTError(Exception):
    """An input, a setting or a place that cannot be used; the message says in one sentence what, where and the remedy.

    Any other exception is a bug of this package or of a library.
    """


__all__ = ["MedCTError"]
