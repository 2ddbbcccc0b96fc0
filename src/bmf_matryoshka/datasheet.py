"""The counts in the data set's datasheet: written from the files, never by hand."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from .course_data import STYLES, CountTokens, CourseData, share_alike
from .errors import InputError
from .pairs import json_lines

SAMPLE_SEED = 2026
ERRORS = ("answerability", "citation", "fact")
"""The kinds of finding that make a text wrong; the others concern relevance and language."""


def statistics(data: CourseData, count_tokens: CountTokens) -> str:
    """The counts of the datasheet, as Markdown.

    Args:
        data: what `read` returned.
        count_tokens: the number of XLM-RoBERTa tokens of each text.
    """
    passages, questions = data.passages, data.questions
    several = int((questions["relevant"].str.len() > 1).sum())
    lengths = {name: count_tokens(table["text"].tolist()) for name, table in vars(data).items()}
    lines = [
        f"{len(passages):,} passages in {passages['letter'].nunique()} letters, {len(questions):,} questions "
        f"({len(questions) / len(passages):.1f} a passage), {several:,} of them ({several / len(questions):.0%}) with "
        "more than one relevant passage. "
        f"{share_alike(passages):.2%} of the passage pairs within a letter share half of their 5-grams.",
        "",
        "| length in XLM-R tokens | min | 10 % | median | mean | 90 % | max |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, tokens in lengths.items():
        low, middle, high = np.percentile(tokens, [10, 50, 90])
        cells = (
            f"{min(tokens)}",
            f"{low:.0f}",
            f"{middle:.0f}",
            f"{np.mean(tokens):.1f}",
            f"{high:.0f}",
            f"{max(tokens)}",
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| style | questions | share |", "| --- | ---: | ---: |"]
    styles = questions["style"].value_counts()
    lines += [f"| `{style}` | {styles[style]:,} | {styles[style] / len(questions):.1%} |" for style in STYLES]
    for name, tokens in lengths.items():
        lines += ["", "```", f"tokens    {name}", *_histogram(tokens), "```"]
    lines += ["", "| letter | passages | questions |", "| --- | ---: | ---: |"]
    asked = questions["passage_id"].map(passages.set_index("passage_id")["letter"]).value_counts()
    for letter, count in passages["letter"].value_counts(sort=False).items():
        lines.append(f"| {letter} | {count} | {asked[str(letter)]} |")
    return "\n".join(lines)


def readings(data: CourseData, folder: Path) -> str:
    """What the readings found, as Markdown.

    Args:
        data: what `course_data.read` returned.
        folder: holds `readings.jsonl`, a line per finding, `judged.jsonl`, a line per judged candidate, and
            `sample.jsonl`, a line per passage of the last reading.

    Raises:
        InputError: a file is missing, or the sample is not the drawn one.
    """
    findings = pd.DataFrame([line for _, line in json_lines(folder / "readings.jsonl")])
    sample = [line for _, line in json_lines(folder / "sample.jsonl")]
    drawn = draw_sample(data)
    if [line["passage_id"] for line in sample] != drawn:
        raise InputError(f"{folder / 'sample.jsonl'} is not the sample of seed {SAMPLE_SEED}")
    counts = pd.crosstab(findings["kind"], findings["reading"])
    texts = len(data.passages) + len(data.questions)
    lines = ["| findings | " + " | ".join(f"reading {reading}" for reading in counts.columns) + " |"]
    lines.append("| --- |" + " ---: |" * len(counts.columns))
    lines += [f"| {kind} | " + " | ".join(str(count) for count in row) + " |" for kind, row in counts.iterrows()]
    wrong = counts.loc[list(ERRORS)].sum()
    lines.append("| fact, citation, answerability | " + " | ".join(str(count) for count in wrong) + " |")
    shares = " | ".join(f"{count / texts:.1%}" for count in wrong)
    lines += [f"| the same per text of the set | {shares} |", ""]
    judged = pd.DataFrame([line for _, line in json_lines(folder / "judged.jsonl")])
    lines += [
        "Then passages that BM25, the untuned and a fine-tuned model ranked high, most of them from other letters, "
        f"were judged: {len(judged):,} candidates for {judged['question_id'].nunique():,} questions, of which "
        f"{judged['relevant'].sum()} answer the question too and were added to `relevant` (`judged.jsonl`).",
        "",
    ]
    asked = int(data.questions["passage_id"].isin(drawn).sum())
    errors = [error["kind"] for line in sample for error in line["errors"]]
    touched = sum(bool(line["errors"]) for line in sample)
    kinds = ", ".join(f"{errors.count(kind)} {kind}" for kind in ERRORS)
    lines.append(
        f"Last, readers who had seen none of it read a random {len(drawn) / len(data.passages):.0%} (seed "
        f"{SAMPLE_SEED}, listed in `sample.jsonl`): {len(errors)} errors ({kinds}) in {len(drawn)} passages with their "
        f"{asked} questions, {len(errors) / (len(drawn) + asked):.1%} of the texts read; {touched} of the passages had "
        "one or more, their questions included."
    )
    return "\n".join(lines)


def draw_sample(data: CourseData) -> list[str]:
    """The ids of a random 10 % of the passages, the same each time, in the order of the file."""
    drawn = data.passages["passage_id"].sample(frac=0.1, random_state=SAMPLE_SEED)
    return [str(passage_id) for passage_id in drawn.sort_index()]


def _histogram(tokens: Sequence[int], bins: int = 12) -> list[str]:
    counts, edges = np.histogram(tokens, bins)
    marks = np.ceil(counts / counts.max() * 40).astype(int)
    return [
        f"{round(low):>4}-{round(high):<4} {'#' * mark} {count}"
        for low, high, mark, count in zip(edges[:-1], edges[1:], marks, counts, strict=True)
    ]
