"""Weights and configuration of the model ↔ those of Hugging Face's GPT-2 (see `hf.Form`)."""

import re
from typing import Any

from torch import Tensor

from gpt2_xla.config import ModelConfig
from gpt2_xla.errors import UserError
from gpt2_xla.hf_values import fixed_mistakes, named_strangers, number_mistakes, size_mistakes

MODEL_TYPES: tuple[str, ...] = ("gpt2",)

# Hugging Face's Conv1D stores these matrices as (in, out); nn.Linear stores (out, in).
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
# Causal-mask buffers that old checkpoints carry; they are no weights.
MASKS = re.compile(r"h\.\d+\.attn\.(masked_)?bias")
OTHERS = re.compile(r"wte\.weight|wpe\.weight|ln_f\.(weight|bias)")
BLOCK = re.compile(r"h\.(\d{1,6})\.((ln_1|ln_2|attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.(weight|bias))")

# gelu_new and gelu_pytorch_tanh are one function, the tanh approximation; plain "gelu" is another (erf).
ACTIVATIONS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "relu": "relu", "relu2": "relu2"}
NAME_OF_ACTIVATION = {"gelu": "gelu_new", "relu": "relu", "relu2": "relu2"}

# What GPT2Config assumes where config.json is silent.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
    "tie_word_embeddings": True,
}
# Switches of GPT2Config that change the function, with the only value that our model computes.
FIXED: dict[str, Any] = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "quantization_config": None,
}


def missing_flags(config: ModelConfig) -> list[str]:
    """See `hf.Form`."""
    wanted = {
        "--position learned": config.position == "learned",
        "--norm layernorm": config.norm == "layernorm",
        "--activation gelu": config.activation in NAME_OF_ACTIVATION,
        "--no-qk-norm": not config.qk_norm,
        "--bias": config.bias,
        f"--num-kv-heads {config.num_heads}": config.kv_heads == config.num_heads,
    }
    return [flag for flag, there in wanted.items() if not there]


def architecture(config: ModelConfig) -> str:  # noqa: ARG001
    """See `hf.Form`."""
    return "GPT2LMHeadModel"


def to_hugging_face(weights: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our weights under GPT2LMHeadModel's names and layouts; matrices are transposed views, a tied output layer is left out."""
    theirs = {}
    for name, value in weights.items():
        if name == "lm_head.weight":
            if not config.tie_weights:
                theirs[name] = value
            continue
        theirs["transformer." + re.sub(r"^blocks\.", "h.", name)] = value.t() if name.endswith(TRANSPOSED) else value
    return theirs


def from_hugging_face(weights: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The inverse of `to_hugging_face`; matrices are transposed views of the given tensors.

    Takes names with and without `transformer.`, ignores mask buffers and, as transformers does, the output layer of a
    model that ties it. Raises UserError naming the weights that are no part of a GPT-2.
    """
    ours, unknown = {}, []
    for name, value in weights.items():
        short = name.removeprefix("transformer.")
        block = BLOCK.fullmatch(short)
        if name == "lm_head.weight":
            if not config.tie_weights:
                ours[name] = value
        elif block:
            transpose = short.endswith(TRANSPOSED) and value.dim() == 2
            ours[f"blocks.{int(block[1])}.{block[2]}"] = value.t() if transpose else value
        elif OTHERS.fullmatch(short):
            ours[short] = value
        elif not MASKS.fullmatch(short):
            unknown.append(name)
    if unknown:
        raise UserError(f"these weights are no part of a GPT-2: {named_strangers(unknown)}")
    return ours


def hugging_face_config(config: ModelConfig, end_of_text: int | None) -> dict[str, Any]:
    """The config.json with which `transformers` builds our model as GPT2LMHeadModel.

    `end_of_text` is the token that ends a document and, as in GPT-2, begins one; None where no tokenizer is known.
    """
    return {
        "model_type": "gpt2",
        "architectures": [architecture(config)],
        "vocab_size": config.vocabulary,
        "n_positions": config.seq_length,
        "n_embd": config.d_model,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.d_ff,
        "activation_function": NAME_OF_ACTIVATION[config.activation],
        "layer_norm_epsilon": config.norm_eps,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        **{name: value for name, value in FIXED.items() if value is not None},
        "initializer_range": 0.02,
        "tie_word_embeddings": config.tie_weights,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "dtype": "float32",
        "use_cache": True,
    }


def model_config(hf_config: dict[str, Any]) -> ModelConfig:
    """Our configuration of a Hugging Face config.json.

    Raises UserError naming every difference that the model cannot represent, and every value of a wrong type.
    """
    mistakes = fixed_mistakes(hf_config, FIXED)
    values = DEFAULTS | {name: hf_config[name] for name in DEFAULTS if name in hf_config}
    sizes = ["vocab_size", "n_positions", "n_embd", "n_layer", "n_head"]
    wrong_sizes = size_mistakes(values, sizes if values["n_inner"] is None else [*sizes, "n_inner"])
    mistakes += [*wrong_sizes, *number_mistakes(values, ["layer_norm_epsilon"])]
    if not wrong_sizes and values["n_embd"] % values["n_head"]:
        mistakes.append(f"n_embd {values['n_embd']} is not divisible by n_head {values['n_head']}")
    activation = values["activation_function"]
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        mistakes.append(f"activation_function is {activation!r}; this model has {', '.join(ACTIVATIONS)}")
    dropouts = [values[name] for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")]
    if any(type(p) not in (int, float) or not 0 <= p < 1 for p in dropouts) or len(set(dropouts)) > 1:
        shown = ", ".join(map(repr, dropouts))
        mistakes.append(f"resid_pdrop, embd_pdrop, attn_pdrop are {shown}; expected one value in [0, 1) for all three")
    if type(values["tie_word_embeddings"]) is not bool:
        mistakes.append(f"tie_word_embeddings is {values['tie_word_embeddings']!r}; expected true or false")
    if mistakes:
        raise UserError(mistakes)
    return ModelConfig(
        vocab_size=values["vocab_size"],
        seq_length=values["n_positions"],
        d_model=values["n_embd"],
        num_layers=values["n_layer"],
        num_heads=values["n_head"],
        d_ff=values["n_inner"],
        dropout=float(dropouts[0]),
        activation=ACTIVATIONS[activation],  # type: ignore[arg-type]
        norm_eps=float(values["layer_norm_epsilon"]),
        tie_weights=values["tie_word_embeddings"],
    )
