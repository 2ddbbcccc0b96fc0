"""Low-rank adapters (LoRA): train few numbers beside frozen weights, then add them in."""

from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from sentence_transformers import SentenceTransformer

from . import base_models


def add(model: SentenceTransformer, rank: int) -> None:
    """LoRA (Hu et al. 2021) on every linear map of the layers: only the adapters are trained."""
    names = ["query", "key", "value", "dense"]
    model.add_adapter(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names, exclude_modules=".*pooler.*"))


def merge(model: SentenceTransformer) -> None:
    """Add what the adapters learned to the weights and take them out: the model is again a plain one."""
    transformer = base_models.transformer(model)
    for name, module in list(transformer.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, own = name.rpartition(".")
            setattr(transformer.get_submodule(parent), own, module.get_base_layer())
    del transformer.peft_config
    transformer._hf_peft_config_loaded = False
