"""Messages in the words of the command line: where Python code names an argument, the command has a flag."""

import argparse
import re

# Where the flag is called otherwise than the argument.
_FLAGS = {"candidate_labels": "labels", "prompt_templates": "templates"}
_ARGUMENT = re.compile(r"`(\w+)(=([^`]*))?`")


def in_flags(message: str, args: argparse.Namespace | None) -> str:
    """Name the flags of a command where a message names arguments of Python; those without a flag are said to be such.

    Args:
        message: With arguments in backticks, such as `` `series=` `` or `` `resample_irregular=True` ``.
        args: Parsed, of the command; `None` of one whose settings are a dataclass, which names its flags itself.
    """

    if args is None:
        return message
    flags = set(re.findall(r"--(\w+)", args.explain()))

    def reword(match: re.Match[str]) -> str:
        name, value = _FLAGS.get(match[1], match[1]), match[3]
        if name in flags:
            return f"--{name}" if value in (None, "", "True") else f"--{name} {value}"
        return match[0] if match[2] is None else f"{match[0]} in Python"

    return _ARGUMENT.sub(reword, message)
