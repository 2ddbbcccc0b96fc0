import copy

import torch
from sentence_transformers import SentenceTransformer

from bmf_matryoshka import adapters, base_models


def test_adapters_alone_are_trained_and_merge_into_a_plain_model(model: SentenceTransformer) -> None:
    changed = copy.deepcopy(model)
    names = [name for name, _ in changed.named_parameters()]
    adapters.add(changed, rank=2)
    trained = [(name, weight) for name, weight in changed.named_parameters() if weight.requires_grad]
    assert len(trained) == 2 * 6 * 12  # A and B for six matrices in each of twelve layers
    assert all("lora_" in name and "pooler" not in name for name, _ in trained)

    texts = ["Die Altersvorsorgezulage wird auf Antrag gewährt.", "Reisekosten"]
    before = model.encode(texts)
    assert abs(changed.encode(texts) - before).max() < 1e-6  # B starts at zero
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, weight in trained:
            weight.copy_(0.05 * torch.randn(weight.shape, generator=generator))
    with_adapters = changed.encode(texts)
    assert abs(with_adapters - before).max() > 1e-3

    adapters.merge(changed)
    assert [name for name, _ in changed.named_parameters()] == names
    assert abs(changed.encode(texts) - with_adapters).max() < 1e-5
    assert not hasattr(base_models.transformer(changed), "peft_config")
