"""A model that no architecture of Hugging Face's computes, in the same files: our options and our names (see `hf.Form`)."""

from typing import Any

from torch import Tensor

from gpt2_xla.cli import from_dict
from gpt2_xla.config import ModelConfig, to_dict
from gpt2_xla.errors import UserError
from gpt2_xla.model_validation import check_model

MODEL_TYPES: tuple[str, ...] = ("gpt2_xla",)


def missing_flags(config: ModelConfig) -> list[str]:  # noqa: ARG001
    """See `hf.Form`: nothing, every model can be written like this."""
    return []


def architecture(config: ModelConfig) -> str:  # noqa: ARG001
    """See `hf.Form`; a name that `transformers` does not know, so that it refuses."""
    return "GPT"


def to_hugging_face(weights: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """See `hf.to_hugging_face`; the names and layouts are ours."""
    return {name: value for name, value in weights.items() if name != "lm_head.weight" or not config.tie_weights}


def from_hugging_face(weights: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """See `hf.from_hugging_face`."""
    return to_hugging_face(weights, config)


def hugging_face_config(config: ModelConfig, end_of_text: int | None) -> dict[str, Any]:
    """See `hf.hugging_face_config`."""
    return {
        "model_type": "gpt2_xla",
        "architectures": [architecture(config)],
        "note": "No architecture of Hugging Face's computes this model: it is for gpt2_xla's own generate.py.",
        "model": to_dict(config) | {"vocab_size": config.vocabulary},
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "dtype": "float32",
    }


def model_config(hf_config: dict[str, Any]) -> ModelConfig:
    """See `hf.model_config`."""
    saved = hf_config.get("model")
    if not isinstance(saved, dict) or saved.get("vocab_size") is None:
        raise UserError("there is no 'model' with its options in it, the vocabulary size included")
    config = from_dict(ModelConfig, saved)
    check_model(config)
    return config
