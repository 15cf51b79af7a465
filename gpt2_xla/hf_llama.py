"""Weights and configuration of the model ↔ those of Hugging Face's Llama and, with QK-norm, Qwen3 (see `hf.Form`).

Here as there a matrix is (out, in), so weights keep their layout; only ours of attention is q, k and v in one.
"""

import re
from typing import Any

import torch
from torch import Tensor

from gpt2_xla.config import ModelConfig
from gpt2_xla.errors import UserError
from gpt2_xla.hf_values import fixed_mistakes, named_strangers, number_mistakes, size_mistakes, switch_mistakes

MODEL_TYPES: tuple[str, ...] = ("llama", "qwen3")

# Our names and theirs, of the whole model and of a block.
OUTER = {
    "wte.weight": "model.embed_tokens.weight",
    "ln_f.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
INNER = {
    "ln_1.weight": "input_layernorm.weight",
    "attn.q_norm.weight": "self_attn.q_norm.weight",
    "attn.k_norm.weight": "self_attn.k_norm.weight",
    "attn.c_proj.weight": "self_attn.o_proj.weight",
    "ln_2.weight": "post_attention_layernorm.weight",
    "mlp.c_gate.weight": "mlp.gate_proj.weight",
    "mlp.c_fc.weight": "mlp.up_proj.weight",
    "mlp.c_proj.weight": "mlp.down_proj.weight",
}
QKV = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")
BLOCK = re.compile(r"model\.layers\.(\d{1,6})\.(.+)")
FREQUENCIES = "self_attn.rotary_emb.inv_freq"  # a buffer that old checkpoints carry; no weight

# What LlamaConfig and Qwen3Config assume where config.json is silent; sizes have no default that anybody means.
DEFAULTS: dict[str, Any] = {
    "vocab_size": None,
    "max_position_embeddings": None,
    "hidden_size": None,
    "num_hidden_layers": None,
    "num_attention_heads": None,
    "intermediate_size": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
}
# Switches that change the function, with the only value that our model computes.
FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "quantization_config": None,
}
ROPE: dict[str, Any] = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1.0}


def missing_flags(config: ModelConfig) -> list[str]:
    """See `hf.Form`."""
    wanted = {
        "--position rope": config.position == "rope",
        "--norm rmsnorm": config.norm == "rmsnorm",
        "--activation swiglu": config.activation == "swiglu",
        "--no-bias": not config.bias,
    }
    return [flag for flag, there in wanted.items() if not there]


def architecture(config: ModelConfig) -> str:
    """See `hf.Form`."""
    return "Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM"


def to_hugging_face(weights: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """See `hf.to_hugging_face`; q, k and v are views of our one matrix."""
    theirs = {}
    for name, value in weights.items():
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        if name == "lm_head.weight" and config.tie_weights:
            continue
        if block is None:
            theirs[OUTER[name]] = value
        elif block[2] == "attn.c_attn.weight":
            parts = value.split(_qkv_rows(config))
            theirs |= {f"model.layers.{block[1]}.{part}": own for part, own in zip(QKV, parts, strict=True)}
        else:
            theirs[f"model.layers.{block[1]}.{INNER[block[2]]}"] = value
    return theirs


def from_hugging_face(weights: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """See `hf.from_hugging_face`; q, k and v are copied into one matrix, all else is the given tensors."""
    outer, inner = ({theirs: ours for ours, theirs in names.items()} for names in (OUTER, INNER))
    ours: dict[str, Tensor] = {}
    unknown: list[str] = []
    qkv: dict[int, dict[str, Tensor]] = {}
    for name, value in weights.items():
        block = BLOCK.fullmatch(name)
        if name == "lm_head.weight" and config.tie_weights:
            continue
        if name in outer:
            ours[outer[name]] = value
        elif block and block[2] in inner:
            ours[f"blocks.{int(block[1])}.{inner[block[2]]}"] = value
        elif block and block[2] in QKV:
            qkv.setdefault(int(block[1]), {})[block[2]] = value
        elif not (block and block[2] == FREQUENCIES):
            unknown.append(name)
    if unknown:
        raise UserError(f"these weights are no part of a {architecture(config)}: {named_strangers(unknown)}")
    return ours | {f"blocks.{layer}.attn.c_attn.weight": _fused(layer, parts, config) for layer, parts in qkv.items()}


def _fused(layer: int, parts: dict[str, Tensor], config: ModelConfig) -> Tensor:
    """The matrices of queries, keys and values in one: (H D, C), (Hkv D, C), (Hkv D, C) -> ((H + 2 Hkv) D, C)."""
    mistakes = []
    for name, rows in zip(QKV, _qkv_rows(config), strict=True):
        shape = tuple(parts[name].shape) if name in parts else None
        if shape != (rows, config.d_model):
            expected, got = f"{rows} x {config.d_model}", " x ".join(map(str, shape)) if shape else "missing"
            mistakes.append(f"weight model.layers.{layer}.{name} is {got}; the model's is {expected}")
    if mistakes:
        raise UserError(mistakes)
    return torch.cat([parts[name] for name in QKV])


def _qkv_rows(config: ModelConfig) -> list[int]:
    """Rows of the matrices of queries, keys and values."""
    return [heads * config.head_dim for heads in (config.num_heads, config.kv_heads, config.kv_heads)]


def hugging_face_config(config: ModelConfig, end_of_text: int | None) -> dict[str, Any]:
    """See `hf.hugging_face_config`."""
    return {
        "model_type": "qwen3" if config.qk_norm else "llama",
        "architectures": [architecture(config)],
        "vocab_size": config.vocabulary,
        "max_position_embeddings": config.seq_length,
        "hidden_size": config.d_model,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,  # where transformers 4 looks
        "attention_dropout": config.dropout,
        **{name: value for name, value in FIXED.items() if value is not None},
        "initializer_range": 0.02,
        "tie_word_embeddings": config.tie_weights,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "dtype": "float32",
        "use_cache": True,
    }


def model_config(hf_config: dict[str, Any]) -> ModelConfig:
    """See `hf.model_config`."""
    values = DEFAULTS | {name: hf_config[name] for name in DEFAULTS if name in hf_config}
    groups = hf_config.get("num_key_value_heads")
    values["num_key_value_heads"] = values["num_attention_heads"] if groups is None else groups
    theta, rope_mistakes = _rope(hf_config)
    sizes = [name for name, default in DEFAULTS.items() if default is None]
    wrong_sizes = size_mistakes(values, [*sizes, "num_key_value_heads"])
    mistakes = [
        *fixed_mistakes(hf_config, FIXED),
        *rope_mistakes,
        *wrong_sizes,
        *number_mistakes(values, ["rms_norm_eps"]),
    ]
    mistakes += switch_mistakes(values, ["tie_word_embeddings"])
    mistakes += [] if wrong_sizes else _head_mistakes(values, hf_config)
    layers = hf_config.get("layer_types")
    if isinstance(layers, list) and any(kind != "full_attention" for kind in layers):
        mistakes.append("layer_types names other layers than full_attention, which is all that this model has")
    dropout = values["attention_dropout"]
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        mistakes.append(f"attention_dropout is {dropout!r}; expected a number in [0, 1)")
    if mistakes:
        raise UserError(mistakes)
    return ModelConfig(
        vocab_size=values["vocab_size"],
        seq_length=values["max_position_embeddings"],
        d_model=values["hidden_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=values["num_attention_heads"],
        num_kv_heads=values["num_key_value_heads"],
        d_ff=values["intermediate_size"],
        dropout=float(dropout),
        activation="swiglu",
        position="rope",
        rope_theta=theta,
        norm="rmsnorm",
        norm_eps=float(values["rms_norm_eps"]),
        qk_norm=hf_config["model_type"] == "qwen3",
        bias=False,
        tie_weights=values["tie_word_embeddings"],
    )


def _rope(hf_config: dict[str, Any]) -> tuple[float, list[str]]:
    """The base of the wavelengths, and what of the rotation this model has not (a scaling for longer contexts)."""
    theta, mistakes = hf_config.get("rope_theta", 10_000.0), []
    for place in ("rope_scaling", "rope_parameters"):  # transformers 4 and 5
        rope = hf_config.get(place) or {}
        if not isinstance(rope, dict):
            mistakes.append(f"{place} is {str(rope)[:40]!r}; expected an object")
            continue
        theta = rope.get("rope_theta", theta)
        mistakes += [
            f"{place} has {name} {str(value)[:40]!r}; this model has the plain rotation only"
            for name, value in rope.items()
            if name != "rope_theta" and (name not in ROPE or value != ROPE[name])
        ]
    mistakes += number_mistakes({"rope_theta": theta}, ["rope_theta"])
    return (0.0, mistakes) if mistakes else (float(theta), [])


def _head_mistakes(values: dict[str, Any], hf_config: dict[str, Any]) -> list[str]:
    width, heads, groups = (values[name] for name in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    if width % heads:
        return [f"hidden_size {width} is not divisible by num_attention_heads {heads}"]
    mistakes = []
    # Where config.json is silent, Llama's heads share the width out, and Qwen3's have a dimension of 128.
    own = hf_config.get("head_dim", 128 if hf_config["model_type"] == "qwen3" else None)
    if own is not None and own != width // heads:
        mistakes.append(
            f"head_dim is {str(own)[:40]}; this model has hidden_size / num_attention_heads, {width // heads}"
        )
    if width // heads % 2:
        mistakes.append(f"the heads' dimension, {width // heads}, is odd; a rotation needs pairs")
    if heads % groups:
        mistakes.append(f"num_attention_heads {heads} is not divisible by num_key_value_heads {groups}")
    return mistakes
