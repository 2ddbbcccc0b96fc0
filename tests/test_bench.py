import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from datasets import DatasetDict
from sentence_transformers import SentenceTransformer

from bmf_matryoshka import bench, evaluation
from bmf_matryoshka.evaluation import Results


def results(values: list[float], dims: tuple[int, ...]) -> Results:
    rows = [
        {"question_id": str(n), "style": "", "dim": dim, "ndcg@10": value / (1 + rank)}
        for rank, dim in enumerate(dims)
        for n, value in enumerate(values)
    ]
    return Results(pd.DataFrame(rows), {})


def test_the_comparison_holds_each_system_dim_and_style_in_the_order_of_its_names(tmp_path: Path) -> None:
    labels = pd.DataFrame({"style": ["fall", "alltag", "fall", "alltag"]}, index=list("0123"))
    measured = {"fine_tuned": results([1, 0.5, 0, 0.5], (8, 4)), "bm25": results([0.2, 0.4, 0.6, 0.8], (0,))}
    rows = bench.compare(measured, labels)
    assert [(row["system"], row["dim"], row["slice"]) for row in rows] == [
        (system, dim, part)
        for system, dim in (("bm25", 0), ("fine_tuned", 8), ("fine_tuned", 4))
        for part in ("all", "alltag", "fall")
    ]
    assert [row["value"] for row in rows] == pytest.approx([0.5, 0.6, 0.4, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25])
    text = bench.as_markdown(rows)
    assert text.splitlines()[0] == "| way to search | dims | all | alltag | fall |"
    assert text.splitlines()[2].startswith("| BM25 | - | 0.500 ± ")
    assert len(text.splitlines()) == 5
    bench.save(rows, tmp_path / "results" / "bench.json")
    assert json.loads((tmp_path / "results" / "bench.json").read_text()) == rows


def test_what_the_questions_do_not_tell_apart_is_said() -> None:
    def row(system: str, dim: int, value: float, part: str = "all") -> dict[str, object]:
        return {"system": system, "dim": dim, "slice": part, "value": value, "low": value - 0.02, "high": value + 0.02}

    rows = [row("bm25", 0, 0.58), row("untuned", 384, 0.57), row("untuned", 32, 0.13), row("fine_tuned", 384, 0.65)]
    rows += [row("fine_tuned", 32, 0.57), row("untuned", 384, 0.65, "fall")]  # neither counts
    assert bench.apart(rows) == (
        "Over all questions, the intervals overlap for BM25 and untuned, cut (384); of all others here (5 pairs), "
        "ndcg@10 differs by 0.070 or more."
    )
    assert "overlap for no two; of all others here (1 pairs)" in bench.apart(rows[1:3])


def test_every_way_to_search_is_measured_on_the_same_questions(model: SentenceTransformer, small: DatasetDict) -> None:
    task = evaluation.build_task(small, "test")
    measured = bench.measure({"untuned": model, "fine_tuned": model}, small, task, (384, 32), scale=60.0)
    assert set(measured) == set(bench.NAMES) - {"plain"}
    for result in measured.values():
        assert result.table["question_id"].unique().tolist() == list(task.queries)
    np.testing.assert_array_equal(measured["untuned"].values(32), measured["fine_tuned"].values(32))
    assert measured["pca"].dims == [32]  # 42 training passages fit no more
    assert measured["pca"].values(32).mean() > measured["untuned"].values(32).mean()
    # A turn changes nothing at the full width, and helps where vectors are cut.
    np.testing.assert_allclose(measured["rotated"].values(384), measured["untuned"].values(384), atol=1e-9)
    assert measured["rotated"].values(32).mean() > measured["untuned"].values(32).mean()
    # Fitted to the training passages' own questions, a map does more than a turn on questions about others.
    assert measured["linear_map"].values(32).mean() > measured["rotated"].values(32).mean()
