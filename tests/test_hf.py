"""Our model and transformers' GPT-2 are one function, and weights travel between them bit for bit."""

import json

import pytest
import torch
from safetensors.torch import load_file

from gpt2_xla import checkpoint, hf, loading
from gpt2_xla.checkpoint import TrainerState
from gpt2_xla.config import PRESETS, ModelConfig, PretrainConfig, to_dict
from gpt2_xla.errors import UserError
from gpt2_xla.model import GPT, parameter_count
from gpt2_xla.shares import whole_shares

SMALL = {"vocab_size": 97, "seq_length": 24, "d_model": 32, "num_layers": 3, "num_heads": 4, "dropout": 0.0}


def random_model(**changes) -> GPT:
    """A small model whose every weight, biases and LayerNorms included, is random: a swapped pair must show."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(**(SMALL | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    return model.eval()


def save(model: GPT, folder, end_of_text=96):
    state = TrainerState(step=1, samples=1, config=to_dict(PretrainConfig(model=model.config)))
    return checkpoint.save(folder, state, whole_shares(model.state_dict()), [], end_of_text)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activation": "relu2", "norm_eps": 0.1},
        {"tie_weights": False},
        {"d_ff": 40, "activation": "relu", "tie_weights": False},
    ],
    ids=["gelu", "relu2-eps", "untied", "relu-untied-narrow"],
)
def test_transformers_computes_the_same_logits_from_our_folder(tmp_path, changes):
    from transformers import GPT2LMHeadModel

    model = random_model(**changes)
    theirs, info = GPT2LMHeadModel.from_pretrained(save(model, tmp_path), output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokens = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, reference = model(tokens), theirs.eval()(tokens).logits
    assert ours.abs().max() > 1  # logits near zero would agree whatever the weights
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-4)


@pytest.mark.parametrize("tie_weights", [True, False])
def test_a_round_trip_is_exact_bit_for_bit(tie_weights):
    model = random_model(tie_weights=tie_weights)
    config = model.config
    theirs = hf.to_hugging_face(model.state_dict(), config)
    assert ("lm_head.weight" in theirs) is not tie_weights
    back = hf.from_hugging_face(theirs, config)
    assert {name: value.tolist() for name, value in back.items()} == {
        name: value.tolist() for name, value in model.named_parameters()
    }
    again = hf.to_hugging_face(back, config)
    assert all(torch.equal(again[name], theirs[name]) for name in theirs.keys() | again.keys())
    assert hf.model_config(json.loads(json.dumps(hf.hugging_face_config(config, 96)))) == config


def test_a_folder_that_transformers_saved_loads_with_the_same_logits(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=24, n_layer=2, n_head=3)).eval()
    theirs.save_pretrained(tmp_path)
    model = GPT(checkpoint.read_model_config(tmp_path)).eval()
    loading.load(model, tmp_path)
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=0, atol=1e-4)
    saved = load_file(tmp_path / "model.safetensors")
    exported = hf.to_hugging_face(dict(model.named_parameters()), model.config)
    assert exported.keys() == saved.keys()
    assert all(torch.equal(exported[name], saved[name]) for name in saved)


def test_old_names_and_mask_buffers_are_understood_and_strangers_are_named():
    config = ModelConfig(**SMALL)
    weights = {
        "h.2.attn.bias": torch.ones(1, 1, 24, 24),
        "h.2.attn.masked_bias": torch.tensor(-1e4),
        "h.2.attn.c_proj.bias": torch.ones(32),
        "h.2.attn.c_attn.weight": torch.ones(32, 96),
    }
    ours = hf.from_hugging_face(weights, config)
    assert {name: tuple(value.shape) for name, value in ours.items()} == {
        "blocks.2.attn.c_proj.bias": (32,),
        "blocks.2.attn.c_attn.weight": (96, 32),
    }
    with pytest.raises(UserError, match="rotary"):
        hf.from_hugging_face({"transformer.rotary.weight": torch.ones(1)}, config)


def test_each_difference_that_we_cannot_represent_is_named():
    config = hf.hugging_face_config(ModelConfig(**SMALL), None) | {
        "activation_function": "gelu",
        "layer_norm_epsilon": 0.0,
        "scale_attn_by_inverse_layer_idx": True,
        "reorder_and_upcast_attn": True,
        "attn_pdrop": 0.3,
        "n_layer": "3",
        "tie_word_embeddings": None,
    }
    with pytest.raises(UserError) as caught:
        hf.model_config(config)
    assert len(caught.value.mistakes) == 7
    for name in (
        "'gelu'",
        "layer_norm_epsilon is 0.0",
        "inverse_layer",
        "reorder",
        "attn_pdrop",
        "n_layer",
        "tie_word",
    ):
        assert name in str(caught.value)
    with pytest.raises(UserError, match="'bert'; only 'gpt2', 'llama', 'qwen3' can be read"):
        hf.model_config({"model_type": "bert"})
    with pytest.raises(UserError, match="n_embd 30 is not divisible by n_head 4"):
        hf.model_config({"model_type": "gpt2", "n_embd": 30, "n_head": 4})


def test_what_config_json_leaves_out_is_gpt2s_default():
    assert hf.model_config({"model_type": "gpt2"}) == ModelConfig(vocab_size=50257, dropout=0.1)


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-6h", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_presets_have_the_published_parameter_counts(preset, count):
    with torch.device("meta"):
        assert parameter_count(GPT(ModelConfig(**PRESETS[preset]))) == count
