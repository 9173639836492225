"""Whether there is anything where scans are looked for; imports nothing that takes long, so that it is said at once."""

from collections.abc import Iterable
from pathlib import Path

from medct.byte_sources_medct import is_address


def refuse_missing(paths: Iterable[str]) -> None:
    """Refuse paths where nothing is; what lies at an address is seen when it is read.

    Args:
        paths: Files, folders and addresses.

    Raises:
        FileNotFoundError: If a path does not exist, or is neither a file nor a folder.
    """
    for path in paths:
        if not path:  # of a variable that is not set; it would stand for the folder one is in
            raise FileNotFoundError("a path of a scan is empty. Check the command.")
        if is_address(path) or Path(path).is_file() or Path(path).is_dir():
            continue
        if Path(path).exists():
            raise FileNotFoundError(f"{path} is a pipe or a device. Save what it holds as a file.")
        raise FileNotFoundError(f"{path}: no such file or folder. Check the path.")
