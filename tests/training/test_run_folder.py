"""What a run leaves where, and that nothing is lost when it is stopped at the end."""

import json

import pytest

import medct
from medct.common.files import OtherSettingsError
from medct.training.run_folder import History, RunFolder
from medct.training.settings import TrainingError


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(str(tmp_path / "run"), resume=False)
    (folder.work / "logs").mkdir(parents=True)
    (folder.work / "logs" / "events").write_text("log", encoding="utf-8")
    folder.history(0).add(1, {"loss": 0.5})
    folder.bad_samples.write_text("{}\n", encoding="utf-8")
    return folder


def names(path):
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())


KEPT = ["bad_samples.jsonl", "history.jsonl", "logs/events"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_run_that_is_stopped_while_it_ends_keeps_what_it_has(folder, error, monkeypatch):
    def fail(*_):
        raise error

    folder.reserve(10)
    with monkeypatch.context() as patched:
        patched.setattr("medct.common.files.flush_to_disk", fail)
        with pytest.raises(error), folder.complete() as final:
            (final / "adapter").touch()
    assert not folder.final.exists()
    assert names(folder.work) == KEPT
    with RunFolder(str(folder.final), resume=True).complete() as final:
        (final / "adapter").touch()
    assert names(folder.final) == ["adapter", *KEPT]
    assert not folder.work.exists()
    assert [path.name for path in folder.final.parent.iterdir()] == ["run"]


def test_what_is_left_of_a_complete_run_is_no_unfinished_one(folder, monkeypatch):
    """It could not be resumed, but a start without --resume would ask for that."""

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("shutil.rmtree", stop)
        with pytest.raises(KeyboardInterrupt), folder.complete() as final:
            assert folder.remedy.endswith("--resume continues it.")
            (final / "results.json").touch()
    assert folder.remedy == f"{folder.final} is complete."
    assert not folder.work.exists()
    with pytest.raises(FileExistsError):
        RunFolder(str(folder.final), resume=True)
    assert [path.name for path in folder.final.parent.iterdir()] == ["run"]


def test_the_reserve_makes_room_for_the_end(folder):
    folder.reserve(1000)
    assert (folder.work / ".reserve").stat().st_size == 1000
    with folder.complete() as final:
        assert not (folder.work / ".reserve").exists()
        (final / "adapter").touch()


def test_history_beyond_the_step_that_is_gone_on_from_is_dropped(tmp_path):
    history = History(tmp_path / "history.jsonl", 0)
    for step in (1, 2, 10, 11):
        history.add(step, {"loss": step})
    with (tmp_path / "history.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 12, "lo')  # torn
    History(tmp_path / "history.jsonl", 10).add(11, {"loss": 0.0})
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1), (2, 2), (10, 10), (11, 0.0)]


@pytest.mark.parametrize("others", [{"rank": 8}, {"rank": 4, "processes": 2}, {}])
def test_another_run_is_not_gone_on_with(folder, others):
    folder.claim({"rank": 4})
    folder.claim({"rank": 4})
    with pytest.raises(OtherSettingsError, match=r"was started with (rank 4, not (8|None)|processes None, not 2)"):
        folder.claim(others)


@pytest.mark.parametrize("left", ["checkpoints/step-00000002/settings.json", "base_tune.json"])
def test_a_run_that_does_not_say_its_settings_is_not_gone_on_with(folder, left):
    """As older versions left them, with the settings beside each checkpoint."""
    path = folder.work / left
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    with pytest.raises(
        TrainingError, match=r"holds a run of an older version of MedCT, which cannot be resumed. Remove"
    ):
        folder.claim({"rank": 4})
    assert not (folder.work / "settings.json").exists()


def test_a_run_of_another_version_is_not_gone_on_with(folder, monkeypatch):
    folder.claim({"rank": 4})
    monkeypatch.setattr(medct, "__version__", "tomorrow's")
    with pytest.raises(OtherSettingsError, match=r"was started with MedCT .*, and tomorrow's may .*\. Resume"):
        folder.claim({"rank": 4})
