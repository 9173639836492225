"""Where a run writes: a working folder until it is complete, then the folder that the user asked for."""

import contextlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from medct.common.files import (
    Reserve,
    append_line,
    discard,
    refuse_other_settings,
    refuse_taken,
    whole_folder,
    with_version,
    write_json,
    write_text,
)
from medct.common.lock import is_first_process, only_run
from medct.common.output import as_word
from medct.common.run_files import RESULTS
from medct.training.checkpoints import decode, encode
from medct.training.settings import TrainingError

# What the finished folder takes over from the working one.
_KEPT = ("history.jsonl", "bad_samples.jsonl", "logs")


def how_to_resume(output_dir: str | Path) -> str:
    """How to go on with a run that was stopped, as a sentence.

    Args:
        output_dir: That its command was given, or would have been.
    """
    return f"The same command with --output_dir {as_word(output_dir)} --resume continues it."


class RunFolder:
    """The folders of one run.

    Args:
        output_dir: The final folder; `runs/` and the time by default.
        resume: Whether to resume an unfinished run there.

    Attributes:
        final: The final folder, which appears when the run is complete.
        work: The working folder beside it, with `.unfinished`: checkpoints, and what the final folder takes over.

    Raises:
        TrainingError: If there is an unfinished run that is not to be resumed.
        LockedError: If another run is writing there.
        FileExistsError: If the final folder already holds something.
        OSError: If it is there, and no other can take its place.
    """

    def __init__(self, output_dir: str | None, resume: bool):
        self.final = Path(output_dir or time.strftime("runs/%Y-%m-%d_%H-%M-%S"))
        self._reserve: Reserve | None = None
        with only_run(self.final):  # else the remedies below would break the run that has it
            refuse_taken(self.final)
        self.work = self.final.with_name(self.final.name + ".unfinished")
        # The first process speaks for all: when the others look, it may already have begun.
        if is_first_process() and not resume and self.work.exists() and any(self.work.iterdir()):
            raise TrainingError(
                f"{self.work} holds an unfinished run. Pass --resume to continue it, or remove the folder."
            )

    @property
    def remedy(self) -> str:
        """How to go on with a run that was stopped, as a sentence."""
        if (self.final / RESULTS).is_file():
            return f"{self.final} is complete."
        return how_to_resume(self.final)

    @property
    def checkpoints(self) -> Path:
        return self.work / "checkpoints"

    @property
    def bad_samples(self) -> Path:
        """JSON lines from all processes; see `StudyLoader`."""
        return self.work / "bad_samples.jsonl"

    def claim(self, settings: Mapping[str, Any]) -> None:
        """Write down whose folder it is before anything else lies there; what another run left is not continued.

        Every process may do so, as all write the same.

        Args:
            settings: All that decides what the run computes, ready for JSON.

        Raises:
            OtherSettingsError: If it is of a run with others; it names the first that differs.
            TrainingError: If it holds a run that has not written any.
        """
        path, settings = self.work / "settings.json", with_version(settings)
        # Looked for before the settings, which another process writes first.
        begun = [*self.work.glob("[!.]*.json"), *self.checkpoints.glob("*")]
        if path.is_file():
            refuse_other_settings(self.work, json.loads(path.read_text(encoding="utf-8")), settings)
        elif begun:
            raise TrainingError(
                f"{self.work} holds a run of an older version of MedCT, which cannot be resumed. Remove it, or choose "
                "another --output_dir."
            )
        else:
            write_json(path, settings)

    def history(self, step: int) -> "History":
        """The figures of each step up to `step`, to be continued."""
        return History(self.work / "history.jsonl", step)

    def remembered(self, name: str) -> Any | None:
        """The value passed to `remember` before the run was stopped; `None` if there is none."""
        path = self.work / f"{name}.json"
        return decode(path.read_text(encoding="utf-8")) if path.exists() else None

    def remember(self, name: str, value: Any) -> None:
        """Keep a result until the run is complete, for `remembered`.

        Args:
            name: Name to find it by.
            value: What `checkpoints.encode` takes.
        """
        write_text(self.work / f"{name}.json", encode(value))

    def reserve(self, size_bytes: int) -> None:
        """Reserve disk space for the final folder: hours of training must not end with a full disk.

        Raises:
            OSError: If there is not enough space.
        """
        self._reserve = Reserve(self.work / ".reserve", size_bytes)

    @contextlib.contextmanager
    def complete(self) -> Iterator[Path]:
        """A folder to write results to, which becomes the final one; the working folder is removed afterwards."""
        if self._reserve is not None:
            self._reserve.release()
        with whole_folder(self.final) as folder:
            yield folder
            # Copied, as a run that is stopped here goes on with them.
            for kept in (self.work / name for name in _KEPT):
                if kept.is_dir():
                    shutil.copytree(kept, folder / kept.name)
                elif kept.exists():
                    shutil.copyfile(kept, folder / kept.name)
        discard(self.work, self.final)


class History:
    """Figures of each step as JSON lines; those after the step that a run resumes from are dropped.

    Args:
        path: File to write.
        step: Step that the run resumes from.
    """

    def __init__(self, path: Path, step: int):
        kept = []
        if path.exists():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
            kept = [line for line in kept if json.loads(line)["step"] <= step]
        write_text(path, "".join(f"{line}\n" for line in kept))
        self.path = path

    def add(self, step: int, figures: dict[str, float]) -> None:
        """Append a line.

        Args:
            step: Optimizer step.
            figures: Numbers by name.
        """
        append_line(self.path, json.dumps({"step": step, **figures}), f"step {step}")
