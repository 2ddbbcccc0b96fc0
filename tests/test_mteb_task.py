import logging

import numpy as np
import pandas as pd
import pytest
from sentence_transformers import SentenceTransformer

from bmf_matryoshka import evaluation, mteb_task, pairs


@pytest.mark.filterwarnings("ignore:.*get_sentence_embedding_dimension:FutureWarning")  # mteb's own call
def test_mteb_measures_what_we_measure(model: SentenceTransformer, course: pd.DataFrame) -> None:
    logging.getLogger("mteb").setLevel(logging.ERROR)
    task = evaluation.build_task(pairs.split(pairs.take_passages(course, 30)), "test")
    ours = evaluation.evaluate(model, task, (384,)).values(384)
    assert 0.1 < ours.mean() < 0.99
    assert mteb_task.ndcg_at_10(model, task) == pytest.approx(np.mean(ours), abs=1e-5)
