"""The course itself: every notebook runs under papermill with the profile smoke, solved and unsolved."""

import ast
import json
import math
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat import NotebookNode

from bmf_matryoshka import bench, workbook
from bmf_matryoshka.evaluation import Results
from bmf_matryoshka.training import TrainingRun

from .conftest import ROOT

NAMES = [path.name for path in workbook.chapters(ROOT / "notebooks" / "solutions")]


def read(path: Path) -> NotebookNode:
    notebook: NotebookNode = nbformat.read(path, as_version=4)
    return notebook


def code(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook: NotebookNode) -> str:
    return "".join(out.text for cell in code(notebook) for out in cell.outputs if out.output_type == "stream")


@pytest.mark.parametrize("name", NAMES)
def test_the_solutions_run_without_warnings_and_solve_every_exercise(smoke_run: Path, name: str) -> None:
    notebook = read(smoke_run / "notebooks" / name)
    assert all(cell.execution_count for cell in code(notebook))
    noise = [out.text for cell in code(notebook) for out in cell.outputs if out.get("name") == "stderr"]
    assert not noise
    solved = printed(notebook).count(": solved")
    assert solved == sum("solution" in cell.metadata.get("tags", []) for cell in notebook.cells) >= 1
    assert "not solved yet" not in printed(notebook)
    assert any("image/png" in out.get("data", {}) for cell in code(notebook) for out in cell.outputs)
    assert (smoke_run / "notebooks" / name).with_suffix(".html").stat().st_size > 100_000


@pytest.mark.parametrize("name", NAMES)
def test_the_exercises_run_as_a_learner_first_opens_them(exercise_run: Path, name: str) -> None:
    notebook = read(exercise_run / "notebooks" / name)
    text = printed(notebook)
    exercises = sum("solution" in cell.metadata.get("tags", []) for cell in notebook.cells)
    assert text.count(": not solved yet") >= exercises
    assert ": solved" not in text


def chapter(run_dir: Path, number: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((run_dir / "results" / f"chapter_{number}.json").read_text(encoding="utf-8"))
    return values


def test_the_chapters_really_measured(smoke_run: Path) -> None:
    first, second, third, fourth, fifth = (chapter(smoke_run, f"0{number}") for number in range(1, 6))
    assert (first["width"], first["right"] > first["wrong"]) == (384, True)
    assert second["leak_by_passage"] == 0
    assert second["leak_by_question"] > 0.8
    assert second["passages"] == 60
    assert 0.6 < third["ndcg@10"]["384"] < 0.95
    assert third["ndcg@10"]["32"] < third["ndcg@10"]["384"] - 0.1
    by_protocol = third["accuracy@1_by_protocol"]
    assert by_protocol["card, worst"] <= by_protocol["card, order"] < by_protocol["text"]
    assert by_protocol["card, random"] < by_protocol["passage"] == by_protocol["text"]
    assert 0.3 < third["bm25"] < 0.95
    assert fourth["by_hand"] == pytest.approx(fourth["library_loss"], abs=1e-3)
    assert fourth["last_loss"] < fourth["first_loss"]
    assert fifth["untuned"] == pytest.approx(third["ndcg@10"])
    assert fifth["fine_tuned"]["32"] > fifth["untuned"]["32"] + 0.03
    assert fifth["rotated"]["32"] > fifth["untuned"]["32"] + 0.03
    assert fourth["share_in_shortest"]["principal axes"] > fourth["share_in_shortest"]["own axes"]
    assert fourth["layers"]["principal axes"] > fourth["layers"]["own axes"]
    assert fourth["layers"]["linear map"] > fourth["layers"]["own axes"]
    assert [row["weight"] for row in fourth["merging"] if (row["task"], row["dim"]) == ("general", 32)] == [
        0.0, 0.25, 0.5, 0.75, 1.0
    ]  # fmt: skip
    assert fourth["batches"]["cached"] == pytest.approx(fourth["batches"]["whole"], rel=1e-3)
    assert fourth["batches"]["accumulated"] < fourth["batches"]["whole"] - 0.1
    assert abs(fifth["forgotten"]["384"]) < 0.3


def test_solved_or_not_a_learner_gets_the_same_results(smoke_run: Path, exercise_run: Path) -> None:
    assert chapter(exercise_run, "05") == chapter(smoke_run, "05")
    assert chapter(exercise_run, "04")["by_hand"] is None


def test_results_json_holds_every_number_of_the_figures(smoke_run: Path) -> None:
    everything = json.loads((smoke_run / "figures" / "results.json").read_text(encoding="utf-8"))
    for name in ("untuned", "fine_tuned"):
        results = Results.load(smoke_run / "results" / name)
        for dim in results.dims:
            interval = results.interval(dim)
            assert everything[name]["dims"][str(dim)]["ndcg@10"] == vars(interval)
            assert interval.low < interval.value < interval.high
    for row in everything["comparison"]:
        if row["slice"] == "all":
            shown = Results.load(smoke_run / "results" / row["system"]).interval(row["dim"])
            assert (row["value"], row["low"], row["high"]) == (shown.value, shown.low, shown.high)
    assert {row["system"] for row in everything["comparison"]} == set(bench.NAMES)
    run = TrainingRun.load(smoke_run / "model" / "training.json")
    assert len(run.evaluations) == 2
    assert everything["training"]["history"] == run.history
    assert math.isfinite(run.losses["loss"].sum())
    for figure in ("similarities", "lengths", "baseline", "loss", "merging", "ndcg_by_dim", "ablation"):
        assert (smoke_run / "figures" / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
        assert b"<svg" in (smoke_run / "figures" / f"{figure}.svg").read_bytes()


def test_the_summary_is_the_table_of_both_models(smoke_run: Path) -> None:
    lines = workbook.summary(smoke_run / "figures" / "results.json").splitlines()
    assert "untuned" in lines[1]
    assert "fine-tuned" in lines[1]
    assert [line.split()[0] for line in lines[2:]] == ["384", "128", "32"]


@pytest.mark.parametrize("folder", ["notebooks", "notebooks/solutions"])
@pytest.mark.parametrize("name", NAMES)
def test_notebooks_keep_the_houses_rules(folder: str, name: str) -> None:
    notebook = read(ROOT / folder / name)
    assert "widgets" not in notebook.metadata
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    names = [ast.unparse(statement).split(" = ")[0] for statement in ast.parse(tagged[0].source).body]
    assert names == ["profile", "seed", "pairs", "base_model", "run_dir"]
    assert tagged[0].source.startswith('profile = "laptop"')
    longest = max(code(notebook), key=lambda cell: len(cell.source.splitlines()))
    assert len(longest.source.splitlines()) <= 22, longest.source
    text = json.dumps(notebook)
    assert str(ROOT) not in text
    assert str(Path.home()) + "/" not in text


def test_the_readme_shows_the_numbers_of_results_json() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "<!-- results -->" in readme
    assert workbook.with_results(readme, ROOT / "figures") == readme, "run python -m bmf_matryoshka publish"
    datasheet = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    assert workbook.with_difficulty(datasheet, ROOT / "figures") == datasheet, "run python -m bmf_matryoshka publish"


def test_the_published_run_tells_ways_to_search_apart() -> None:
    rows = json.loads((ROOT / "figures" / "results.json").read_text(encoding="utf-8"))["comparison"]
    value = {(row["system"], row["dim"], row["slice"]): row["value"] for row in rows}
    assert 0.45 < value["untuned", 384, "all"] < 0.85
    assert value["bm25", 0, "fachlich"] > value["bm25", 0, "alltag"] + 0.1
    assert value["fine_tuned", 64, "all"] >= 0.9 * value["fine_tuned", 384, "all"]
    assert value["fine_tuned", 32, "all"] >= 2 * value["untuned", 32, "all"]
    assert value["fine_tuned", 32, "all"] > value["rotated", 32, "all"] + 0.02
    for dim in (384, 256, 128, 64, 32):  # as README says
        assert abs(value["fine_tuned", dim, "all"] - value["linear_map", dim, "all"]) < 0.02
    assert all(row["high"] - row["low"] < 0.08 for row in rows if row["slice"] == "all")


def test_the_committed_solutions_are_those_of_the_laptop_run() -> None:
    shown = printed(read(ROOT / "notebooks" / "solutions" / NAMES[-1]))
    assert shown.count(": solved") == 3
    results = json.loads((ROOT / "figures" / "results.json").read_text(encoding="utf-8"))
    assert results["training"]["profile"]["name"] == "laptop"
    largest, smallest = (str(results["training"]["dims"][end]) for end in (0, -1))
    for dim in (smallest, str(results["training"]["dims"][-2])):
        assert results["difference_ndcg@10"][dim]["low"] > 0
    assert results["difference_ndcg@10"][largest]["value"] > -0.02


def test_no_helper_is_defined_in_two_notebooks() -> None:
    owners: dict[str, str] = {}
    for name in NAMES:
        for cell in code(read(ROOT / "notebooks" / "solutions" / name)):
            if "%pip" in cell.source:
                continue
            for statement in ast.parse(cell.source).body:
                if isinstance(statement, ast.FunctionDef):
                    assert owners.setdefault(statement.name, name) == name, statement.name
