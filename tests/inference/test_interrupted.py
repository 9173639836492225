"""A run stopped at any of its writes leaves whole files only, and the next one ends where one run would have."""

import shutil

import pytest
from accelerate import PartialState
from scan_files import write_noise

import medct
from medct.common import files
from medct.image_processing_medct import MedCTImageProcessor
from medct.inference.bulk import KEY, Csv, OutputError, Reading, RowFile, process_to_file
from medct.inference.studies import LoadStudy, find_studies

FORMAT = Csv([KEY, "mean"])


@pytest.fixture
def run(tmp_path):
    """`run(output)`: the mean of two scans, and a third that cannot be read."""
    folder = tmp_path / "scans"
    folder.mkdir()
    for index in range(2):
        write_noise(folder / f"{index}.nii.gz", index)
    (folder / "bad.nii.gz").write_bytes(b"nothing")
    processor = MedCTImageProcessor(image_size=(4, 8, 8), target_spacing_mm=(4, 4, 4))
    studies = find_studies([folder])
    reading = Reading(LoadStudy(processor), num_workers=0)

    def rows_of(reads):
        return [{KEY: read.study.id, "mean": f"{float(read.pixel_values.mean()):.6f}"} for read in reads]

    def run(output):
        return process_to_file(studies, reading, rows_of, output, FORMAT, {"a": 1}, PartialState(cpu=True))

    return run


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_run_that_is_stopped_at_a_write_is_completed_by_the_next(run, tmp_path, monkeypatch, error):
    assert run(tmp_path / "whole" / "out.csv") == 1
    whole = content(tmp_path / "whole")
    assert set(whole) == {"out.csv", "out.csv.failed.csv", "out.csv.settings.json"}
    assert whole["out.csv"].count(b"\n") == 3
    flush, writes, stops = files.flush_to_disk, [], 0

    def stop(path):
        writes.append(path)
        if len(writes) == stops:
            raise error
        flush(path)

    monkeypatch.setattr(files, "flush_to_disk", stop)
    while True:
        stops += 1
        folder = tmp_path / f"stopped at {stops}"
        writes.clear()
        try:
            run(folder / "out.csv")
        except error:
            left = content(folder)
            assert left.keys() <= whole.keys()  # nothing of a write that was not ended
            assert all(whole[name].startswith(data) for name, data in left.items())
            assert run(folder / "out.csv") == 1
            assert content(folder) == whole
        else:
            break
    assert stops > 5  # settings, rows and failures, before and after the work


def test_an_output_that_is_removed_while_it_is_written_ends_the_run(run, tmp_path, monkeypatch):
    """Its rows would be lost in silence."""
    write = RowFile.write

    def remove_and_write(rows, row):
        shutil.rmtree(tmp_path / "out")
        write(rows, row)

    with monkeypatch.context() as patched:
        patched.setattr(RowFile, "write", remove_and_write)
        with pytest.raises(OutputError, match=r"out\.csv\S* was removed while rows were written to it\. Start"):
            run(tmp_path / "out" / "out.csv")
    assert not (tmp_path / "out").exists()
    assert run(tmp_path / "out" / "out.csv") == 1


def test_rows_of_another_version_are_not_added_to(run, tmp_path, monkeypatch):
    run(tmp_path / "rows" / "out.csv")
    before = content(tmp_path / "rows")
    monkeypatch.setattr(medct, "__version__", "tomorrow's")
    with pytest.raises(files.OtherSettingsError, match=r"was started with MedCT .*, or choose another --output"):
        run(tmp_path / "rows" / "out.csv")
    assert content(tmp_path / "rows") == before
