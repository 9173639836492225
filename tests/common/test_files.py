"""Outputs appear whole or not at all."""

import pytest

from medct.common.files import whole_file, whole_folder


def test_appears_when_complete(tmp_path):
    with whole_folder(tmp_path / "a/out") as folder:
        (folder / "file").write_text("content")
        assert not (tmp_path / "a/out").exists()
    assert (tmp_path / "a/out/file").read_text() == "content"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]


def test_an_empty_folder_is_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    with whole_folder(tmp_path / "out") as folder:
        (folder / "file").touch()
    assert (tmp_path / "out/file").exists()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_nothing_behind(tmp_path, error):
    with pytest.raises(error), whole_folder(tmp_path / "out") as folder:
        (folder / "file").touch()
        raise error
    assert not list(tmp_path.iterdir())


def test_existing_output_is_kept(tmp_path):
    (tmp_path / "file").write_text("mine")
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(FileExistsError, match="not empty"), whole_folder(taken):
            pytest.fail("must not begin")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    with whole_file(path) as aside:
        aside.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    with pytest.raises(RuntimeError), whole_file(path) as aside:
        aside.write_text("half")
        raise RuntimeError
    with pytest.raises(FileNotFoundError), whole_file(path):
        pass  # nothing written
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]
