import json
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from bmf_matryoshka import workbook
from bmf_matryoshka.errors import InputError
from bmf_matryoshka.profiles import LAPTOP

from .conftest import ROOT

PARAMETERS = new_code_cell('profile = "laptop"\nseed = 42', metadata={"tags": ["parameters"]})


def notebook(path: Path, *sources: str) -> Path:
    cells = [PARAMETERS, *(new_code_cell(source) for source in sources)]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


def test_a_solution_becomes_a_stub_and_everything_run_is_gone() -> None:
    source = "def f(x):\n    '''Twice.'''\n    # solution\n    y = x\n    return y + x\n    # end\n\n\nprint(f(1))"
    solved = new_code_cell(source, metadata={"tags": ["solution"], "papermill": {"duration": 1}}, execution_count=3)
    solved.outputs = [nbformat.v4.new_output("stream", text="2")]
    injected = new_code_cell("seed = 1", metadata={"tags": ["injected-parameters"]})
    original = new_notebook(
        cells=[new_markdown_cell("# T"), injected, solved], metadata={"widgets": {}, "papermill": {}}
    )

    exercise = workbook.as_exercise(original)

    assert [cell.cell_type for cell in exercise.cells] == ["markdown", "code"]
    stub = exercise.cells[1]
    assert stub.source == "def f(x):\n    '''Twice.'''\n    raise NotImplementedError(\"your turn\")\n\n\nprint(f(1))"
    assert (stub.outputs, stub.execution_count, stub.metadata) == ([], None, {"tags": ["solution"]})
    assert set(exercise.metadata) == {"kernelspec", "language_info"}
    assert original.cells[2].source == source


def test_a_solution_without_its_mark_is_refused() -> None:
    cell = new_code_cell("x = 1", metadata={"tags": ["solution"]})
    with pytest.raises(InputError, match="cell 0 is tagged solution but has no line '# solution'"):
        workbook.as_exercise(new_notebook(cells=[cell]))


def test_the_exercises_are_those_of_the_solutions(tmp_path: Path) -> None:
    derived = workbook.derive_exercises(ROOT / "notebooks" / "solutions", tmp_path)
    assert [path.name for path in derived] == [path.name for path in workbook.chapters(ROOT / "notebooks")]
    for path in derived:
        assert path.read_text(encoding="utf-8") == (ROOT / "notebooks" / path.name).read_text(encoding="utf-8"), (
            f"{path.name} is out of step: run python -m bmf_matryoshka derive"
        )


def test_an_unknown_or_ill_typed_parameter_is_refused_before_anything_runs(tmp_path: Path) -> None:
    path = notebook(tmp_path / "01_a.ipynb", "print(seed)")
    with pytest.raises(InputError, match=r"01_a\.ipynb has no parameter 'sed': choose one of profile, seed"):
        workbook.run([path], tmp_path / "out", {"sed": "1"})
    with pytest.raises(InputError, match="parameter seed='many': int wanted"):
        workbook.run([path], tmp_path / "out", {"seed": "many"})
    assert not (tmp_path / "out").exists()


def test_a_failing_cell_is_shown_with_its_traceback_and_the_copy_is_kept(tmp_path: Path) -> None:
    path = notebook(tmp_path / "01_a.ipynb", "x = seed", "1 / (x - 7)")
    with pytest.raises(workbook.ChapterFailedError) as caught:
        workbook.run([path], tmp_path / "out", {"seed": "7"})
    message = str(caught.value)
    assert message.startswith("01_a.ipynb, cell ")
    assert "ZeroDivisionError: division by zero" in message
    assert "1 / (x - 7)" in message
    assert "\x1b[" not in message
    assert "ZeroDivisionError" in (tmp_path / "out" / "01_a.html").read_text(encoding="utf-8")


def test_parameters_reach_the_notebook_in_their_type(tmp_path: Path) -> None:
    path = notebook(tmp_path / "01_a.ipynb", f"open({str(tmp_path / 'seen')!r}, 'w').write(repr((profile, seed)))")
    told: list[str] = []
    seconds = workbook.run([path], tmp_path / "out", {"seed": "7"}, told.append)
    assert (tmp_path / "seen").read_text() == "('laptop', 7)"
    assert list(seconds) == ["01_a"]
    assert "<title>01_a</title>" in (tmp_path / "out" / "01_a.html").read_text(encoding="utf-8")
    assert told[0].startswith("01_a: ")


def test_chapters_are_chosen_by_number(tmp_path: Path) -> None:
    paths = [tmp_path / f"0{n}_x.ipynb" for n in (1, 2, 3)]
    assert workbook.select(paths) == paths
    assert workbook.select(paths, only="02") == paths[1:2]
    assert workbook.select(paths, start="02") == paths[1:]
    with pytest.raises(InputError, match="there is no chapter '7': choose one of 01, 02, 03"):
        workbook.select(paths, only="7")


def test_only_a_whole_run_is_published(tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "results.json").write_text("{}")
    with pytest.raises(InputError, match="was not run in one go"):
        workbook.publish(tmp_path, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["figures"]


def test_a_course_knows_its_places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT / "notebooks" / "solutions")
    course = workbook.open_course("laptop", 42)
    assert (course.profile, course.base_model) == (LAPTOP, LAPTOP.base_model)
    assert (course.pairs, course.run_dir) == (ROOT / "data", ROOT / "runs" / "laptop")
    elsewhere = workbook.open_course("smoke", 1, "my.csv", "./model", str(tmp_path))
    assert (elsewhere.pairs, elsewhere.base_model, elsewhere.run_dir) == (ROOT / "my.csv", "./model", tmp_path)
    elsewhere.record("01", {"ü": 1})
    assert json.loads((tmp_path / "results" / "chapter_01.json").read_text(encoding="utf-8")) == {"ü": 1}
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="start in a clone of the project"):
        workbook.find_root()
