"""The model in the files of a Hugging Face model folder: config.json and the weights, exact bit for bit, both ways.

Which architecture it is there follows from the options: GPT-2, Llama, Qwen3. A model that is none of them has the same
files in a form of our own, which `transformers` refuses.
"""

from typing import Any, Protocol

from torch import Tensor

from gpt2_xla import hf_gpt2, hf_llama, hf_none
from gpt2_xla.config import ModelConfig
from gpt2_xla.errors import UserError


class Form(Protocol):
    """One kind of config.json with its weights: a module with these names."""

    MODEL_TYPES: tuple[str, ...]  # values of config.json's model_type

    def missing_flags(self, config: ModelConfig) -> list[str]:
        """The flags with which the model would have this form; [] if it has."""
        ...

    def architecture(self, config: ModelConfig) -> str:
        """The class of `transformers` that computes the model."""
        ...

    def to_hugging_face(self, weights: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
        """See below."""
        ...

    def from_hugging_face(self, weights: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
        """See below."""
        ...

    def hugging_face_config(self, config: ModelConfig, end_of_text: int | None) -> dict[str, Any]:
        """See below."""
        ...

    def model_config(self, hf_config: dict[str, Any]) -> ModelConfig:
        """See below; `hf_config` is of one of the MODEL_TYPES."""
        ...


COUNTERPARTS: tuple[Form, ...] = (hf_gpt2, hf_llama)
FORMS: tuple[Form, ...] = (*COUNTERPARTS, hf_none)


def counterpart(config: ModelConfig) -> str | None:
    """The class of `transformers` that computes this model, such as LlamaForCausalLM; None if there is none."""
    form = _form(config)
    return form.architecture(config) if form in COUNTERPARTS else None


def exports_to(config: ModelConfig) -> str:
    """The same in words, with what the nearest one would need where there is none."""
    if (name := counterpart(config)) is not None:
        return name
    nearest = min(COUNTERPARTS, key=lambda form: len(form.missing_flags(config)))
    flags = " ".join(nearest.missing_flags(config))
    return f"no Hugging Face counterpart: {nearest.architecture(config)} would need {flags}"


def to_hugging_face(weights: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our weights under Hugging Face's names and in its layouts, as views; a tied output layer is left out."""
    return _form(config).to_hugging_face(weights, config)


def from_hugging_face(weights: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The inverse of `to_hugging_face`, as views where the layout allows; buffers that are no weights are left out.

    So is, as transformers does, the output layer of a model that ties it. Raises UserError naming the weights that are no
    part of the architecture.
    """
    return _form(config).from_hugging_face(weights, config)


def hugging_face_config(config: ModelConfig, end_of_text: int | None) -> dict[str, Any]:
    """The config.json with which `transformers` builds our model, if it has a `counterpart`.

    `end_of_text` is the token that ends a document and, as in GPT-2, begins one; None where no tokenizer is known.
    """
    return _form(config).hugging_face_config(config, end_of_text)


def model_config(hf_config: dict[str, Any]) -> ModelConfig:
    """Our configuration of a config.json, whoever wrote it.

    Raises UserError naming every difference that the model cannot represent, and every value of a wrong type.
    """
    kind = hf_config.get("model_type")
    for form in FORMS:
        if kind in form.MODEL_TYPES:
            return form.model_config(hf_config)
    known = ", ".join(repr(name) for form in COUNTERPARTS for name in form.MODEL_TYPES)
    raise UserError(f"model_type is {str(kind)[:40]!r}; only {known} can be read")


def _form(config: ModelConfig) -> Form:
    """The first that the model fits; the last fits every one."""
    return next(form for form in FORMS if not form.missing_flags(config))
