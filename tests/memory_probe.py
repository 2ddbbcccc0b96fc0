"""Trains a random encoder for three steps and prints by how many bytes the process's peak of memory rose.

Run by test_memory in a process of its own: `python -m tests.memory_probe JSON`.
"""

import json
import sys
from dataclasses import replace

import torch
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from transformers import XLMRobertaConfig, XLMRobertaModel

from bmf_matryoshka import hardware, memory
from bmf_matryoshka.profiles import CARD, Profile

Features = dict[str, torch.Tensor]


class Encoder(torch.nn.Module):
    """CLS pooling and normalisation over random weights."""

    def __init__(self, shape: memory.Shape, profile: Profile):
        super().__init__()
        dropout = 0.1 if profile.dropout else 0.0
        config = XLMRobertaConfig(
            vocab_size=shape.vocabulary, hidden_size=shape.hidden, num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads, intermediate_size=shape.intermediate,
            max_position_embeddings=shape.positions, type_vocab_size=1,
            hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
        )  # fmt: skip
        self.inner = XLMRobertaModel(config, add_pooling_layer=False)
        self.inner.set_attn_implementation(profile.attention)

    def forward(self, features: Features) -> Features:
        hidden = self.inner(features["input_ids"], features["attention_mask"]).last_hidden_state
        return {"sentence_embedding": torch.nn.functional.normalize(hidden[:, 0], dim=1)}


def texts(number: int, tokens: int, vocabulary: int) -> Features:
    ids = torch.randint(5, vocabulary, (number, tokens))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def main(argument: str) -> None:
    sizes, changes, tokens, precision = json.loads(argument)
    shape, profile = memory.Shape(**sizes), replace(CARD, **changes)
    before = memory.peak("cpu")
    model = Encoder(shape, profile).train()
    loss = MultipleNegativesRankingLoss(model)  # type: ignore[arg-type]  # the encoder above stands in for the model
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for _ in range(3):
        questions = texts(profile.batch_size, min(memory.QUESTION_TOKENS, tokens), shape.vocabulary)
        passages = texts(profile.batch_size, tokens, shape.vocabulary)
        with hardware.autocast("cpu", precision):
            value = loss([questions, passages], torch.empty(0))
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(memory.peak("cpu") - before)


if __name__ == "__main__":
    main(sys.argv[1])
