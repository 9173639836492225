"""Rows stay written, incomplete lines are dropped, parts are merged."""

import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from medct.common.distributed import LaunchError
from medct.common.errors import FAILED, _end_of
from medct.inference import bulk
from medct.inference.bulk import KEY, Csv, JsonLines, RowFile, merge, part_path, part_paths, read_rows

CSV = Csv([KEY, "score", "notes"])
ROWS = [{KEY: name, "score": "0.5", "notes": 'a, "b"'} for name in ("x/1.nii", "x/2, new.nii", "x/\udcff.nii")]


@pytest.fixture(params=[CSV, JsonLines()], ids=["csv", "json"])
def format(request):
    return request.param


def write(path, format, rows):
    file = RowFile(path, format)
    for row in rows:
        file.write(row)
    file.close()


def test_rows_come_back_and_a_second_run_adds_to_them(tmp_path, format):
    path = tmp_path / "rows"
    write(path, format, ROWS[:2])
    file = RowFile(path, format)
    assert file.done == {row[KEY] for row in ROWS[:2]}
    file.write(ROWS[2])
    assert list(read_rows(path, format)) == ROWS  # without closing it
    file.close()


def test_each_study_is_read_by_one_process(tmp_path, monkeypatch):
    names, read, meeting = list("abcdefg"), [], threading.Barrier(2, timeout=20)

    def process(studies, reading, rows_of, write, *_):
        for study in studies:
            read.append(study.id)
            write({KEY: study.id, "score": "1", "notes": ""})

    def run(index):
        state = SimpleNamespace(
            process_index=index, num_processes=2, is_main_process=not index, wait_for_everyone=meeting.wait
        )
        studies = [SimpleNamespace(id=name) for name in names]
        bulk.process_to_file(studies, None, None, tmp_path / "rows.csv", CSV, {}, state)

    monkeypatch.setattr(bulk, "process", process)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, range(2)))
    assert sorted(read) == names
    assert [row[KEY] for row in read_rows(tmp_path / "rows.csv", CSV)] == names


@pytest.mark.parametrize("theirs", [{"studies": "2, 0123"}, {"labels": ["Nodule"]}], ids=["studies", "settings"])
def test_processes_that_would_make_other_rows_are_refused(tmp_path, monkeypatch, theirs):
    monkeypatch.setattr("medct.common.distributed.of_all", lambda ours: [ours, ours | theirs])
    state = SimpleNamespace(is_main_process=True)
    output = tmp_path / "new" / "rows.csv"
    with pytest.raises(LaunchError, match=f"Process 2 of 2 has {next(iter(theirs))}") as caught:
        bulk.process_to_file([SimpleNamespace(id="Jane Doe")], None, None, output, CSV, {"labels": []}, state)
    assert "Jane" not in str(caught.value)
    assert not any(output.parent.iterdir())


def test_an_output_that_is_another_file_elsewhere_is_refused(tmp_path, monkeypatch):
    def refuse(folder, output):
        raise LaunchError(f"{folder.name} {output.name}")

    monkeypatch.setattr(bulk, "refuse_unshared", refuse)
    output = tmp_path / "new" / "rows.csv"
    with pytest.raises(LaunchError, match="new rows"):
        bulk.process_to_file([], None, None, output, CSV, {}, SimpleNamespace(is_main_process=True))


def test_an_incomplete_line_is_dropped(tmp_path, format):
    path = tmp_path / "rows"
    write(path, format, ROWS)
    whole = path.read_bytes()
    start = len(format.header())
    for length in range(start, len(whole)):
        path.write_bytes(whole[:length])
        expected = whole[start:length].count(b"\n")
        assert list(read_rows(path, format)) == ROWS[:expected]
    write(path, format, ROWS[2:])
    assert path.read_bytes() == whole


def test_an_incomplete_header_is_rewritten(tmp_path):
    path = tmp_path / "rows"
    path.write_text(CSV.header()[:4], encoding="utf-8")
    write(path, CSV, ROWS)
    assert list(read_rows(path, CSV)) == ROWS


@pytest.mark.parametrize(
    "again", [lambda path: RowFile(path, JsonLines()).close(), lambda path: merge(path, JsonLines())]
)
def test_rows_do_not_lie_in_memory_as_lists(again, tmp_path):
    """Those of 50,000 studies take a gigabyte as text, and several as numbers, in each process of a launch."""
    path = tmp_path / "rows"
    with path.open("w", encoding="utf-8") as file:
        file.writelines(JsonLines().line({KEY: str(k), "embeds": [0.5 + k] * 1000}) for k in range(400))
    tracemalloc.start()
    again(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * path.stat().st_size


def test_a_line_break_in_a_value_makes_no_second_line(tmp_path):
    write(tmp_path / "rows", CSV, [{KEY: "a", "score": "1", "notes": "one\ntwo"}])
    assert list(read_rows(tmp_path / "rows", CSV)) == [{KEY: "a", "score": "1", "notes": "one two"}]


@pytest.mark.parametrize("content", ["study,other\n", "hello\n", '{"x": 1}\n', "[1]\n"])
def test_files_of_others_are_left_alone(tmp_path, format, content):
    path = tmp_path / "rows"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="rows that this run would not write"):
        RowFile(path, format)
    assert path.read_text(encoding="utf-8") == content


def test_parts_are_merged_in_order_and_once(tmp_path, format):
    path = tmp_path / "rows[1].csv"  # no pattern
    write(path, format, [ROWS[2]])
    write(part_path(path, 0), format, [ROWS[1], ROWS[2]])
    write(part_path(path, 1), format, [ROWS[0]])
    part_path(path, 1).write_bytes(part_path(path, 1).read_bytes() + b"torn")
    assert len(part_paths(path)) == 2
    assert merge(path, format, [row[KEY] for row in ROWS]) == 3
    assert list(read_rows(path, format)) == ROWS
    assert part_paths(path) == []
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_merging_nothing_makes_an_empty_file(tmp_path):
    assert merge(tmp_path / "rows", CSV) == 0
    assert (tmp_path / "rows").read_text(encoding="utf-8") == CSV.header()


def test_a_full_disk_is_told_with_the_file_and_costs_the_row(tmp_path, format):
    resource = pytest.importorskip("resource")
    path = tmp_path / "rows"
    write(path, format, ROWS[:2])
    file, before = RowFile(path, format), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, before[1]))
    try:
        with pytest.raises(OSError) as caught:
            file.write(ROWS[2])
        file.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert _end_of(caught.value) == (FAILED, f"error: {path}: {caught.value.strerror}.")
    assert list(read_rows(path, format)) == ROWS[:2]
    write(path, format, ROWS[2:])
    assert list(read_rows(path, format)) == ROWS


def test_what_is_no_number_is_no_json():
    with pytest.raises(ValueError, match="not JSON compliant"):
        JsonLines().line({KEY: "a", "score": float("nan")})
