"""The data set as a retrieval task of mteb (`pip install mteb`), so that its models can be measured on it."""

from typing import Any

import mteb
from datasets import Dataset
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.task_metadata import TaskMetadata
from sentence_transformers import SentenceTransformer

from .evaluation import Task

METADATA = TaskMetadata(
    name="BmfMatryoshkaRetrieval",
    description="Synthetic German tax-law questions and the numbered passages of letters that answer them.",
    dataset={"path": "bmf-matryoshka/data", "revision": "local"},
    type="Retrieval",
    category="t2t",
    modalities=["text"],
    eval_splits=["test"],
    eval_langs=["deu-Latn"],
    main_score="ndcg_at_10",
    date=("2026-01-01", "2026-12-31"),
    domains=["Legal", "Government", "Written"],
    task_subtypes=["Question answering"],
    license="cc-by-4.0",
    annotations_creators="LM-generated and reviewed",
    dialect=[],
    sample_creation="LM-generated and verified",
    bibtex_citation="",
)


class BmfMatryoshkaRetrieval(AbsTaskRetrieval):
    """A task of `evaluation` in mteb's form; read from memory, nothing is downloaded."""

    metadata = METADATA

    def __init__(self, task: Task, **options: Any):
        super().__init__(**options)
        self.task = task

    def load_data(self, *_: Any, **__: Any) -> None:
        """Put the task's texts and relevance where mteb looks for them."""
        corpus, queries = (
            Dataset.from_dict({"id": list(texts), "text": list(texts.values())})
            for texts in (self.task.corpus, self.task.queries)
        )
        relevant = {query: dict.fromkeys(found, 1) for query, found in self.task.relevant.items()}
        split = RetrievalSplitData(corpus=corpus, queries=queries, relevant_docs=relevant, top_ranked=None)
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True


def ndcg_at_10(model: SentenceTransformer, task: Task) -> float:
    """What mteb measures for a model at its full width."""
    result = mteb.evaluate(model, BmfMatryoshkaRetrieval(task), cache=None, show_progress_bar=False, co2_tracker=False)
    scores = result.task_results[0].scores["test"][0]
    return float(scores["ndcg_at_10"])
