"""Modern models and transformers' Llama and Qwen3 are one function; what has no counterpart there is kept, and says so."""

import json
import shutil

import pytest
import torch
from commands import data_flags, losses
from safetensors.torch import load_file
from small_runs import FOUR_STEPS, run_here
from test_hf import save

import generate
import run_pretrain
from gpt2_xla import checkpoint, generation, hf, loading
from gpt2_xla.config import PRESETS, ModelConfig
from gpt2_xla.errors import UserError
from gpt2_xla.model import GPT

LLAMA = {
    **{"vocab_size": 97, "seq_length": 24, "d_model": 32, "num_layers": 3, "num_heads": 4},
    **{"position": "rope", "norm": "rmsnorm", "activation": "swiglu", "bias": False},
}
MODELS = {
    "llama": LLAMA,
    "llama, grouped, untied": LLAMA | {"num_kv_heads": 2, "tie_weights": False, "rope_theta": 500.0, "d_ff": 40},
    "qwen3": LLAMA | {"qk_norm": True},
    "qwen3, grouped, untied": LLAMA | {"qk_norm": True, "num_kv_heads": 1, "tie_weights": False, "norm_eps": 0.1},
}
OURS_ALONE = {
    "position": {"position": "rope"},
    "norm": {"norm": "rmsnorm"},
    "swiglu": {"activation": "swiglu"},
    "no biases": {"bias": False},
    "grouped": {"num_kv_heads": 2, "tie_weights": False},
    "relu2": LLAMA | {"activation": "relu2", "qk_norm": True, "num_kv_heads": 2},
}


def random_model(options) -> GPT:
    torch.manual_seed(0)
    model = GPT(ModelConfig(**(dict(vocab_size=97, seq_length=24, d_model=32, num_layers=3, num_heads=4) | options)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    return model.eval()


def random_tokens():
    return torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_transformers_computes_the_same_logits_from_our_folder(tmp_path, options):
    from transformers import AutoModelForCausalLM

    model = random_model(options)
    theirs, info = AutoModelForCausalLM.from_pretrained(save(model, tmp_path), output_loading_info=True)
    assert type(theirs).__name__ == hf.counterpart(model.config)
    assert type(theirs).__name__ == ("Qwen3ForCausalLM" if options.get("qk_norm") else "LlamaForCausalLM")
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        ours, reference = model(random_tokens()), theirs.eval()(random_tokens()).logits
    assert ours.abs().max() > 1
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-4)


def theirs_of(kind, **changes):
    import transformers

    sizes = dict(vocab_size=50, max_position_embeddings=16, hidden_size=24, intermediate_size=30, num_hidden_layers=2)
    heads = dict(num_attention_heads=6, num_key_value_heads=2, head_dim=4)
    config = getattr(transformers, f"{kind}Config")(**sizes, **heads, **changes)
    torch.manual_seed(2)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "rope_theta": 500.0}], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_a_folder_that_transformers_saved_loads_with_the_same_logits_and_comes_back_bit_for_bit(
    tmp_path, kind, changes
):
    theirs = theirs_of(kind, **changes)
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
    again = hf.model_config(json.loads(json.dumps(hf.hugging_face_config(model.config, None))))
    assert again == model.config


@pytest.mark.parametrize("options", [*MODELS.values(), *OURS_ALONE.values()], ids=[*MODELS, *OURS_ALONE])
def test_a_checkpoint_holds_the_model_bit_for_bit(tmp_path, options):
    model = random_model(options)
    folder = save(model, tmp_path)
    assert checkpoint.problems(folder) == []
    loaded = generation.load_model(folder, "cpu")
    for name, value in model.named_parameters():
        assert torch.equal(dict(loaded.named_parameters())[name], value), name
    with torch.no_grad():
        assert torch.equal(loaded(random_tokens()), model(random_tokens()))


@pytest.mark.parametrize("options", OURS_ALONE.values(), ids=OURS_ALONE)
def test_what_transformers_does_not_have_it_refuses_and_we_say_what_it_would_need(tmp_path, options):
    from transformers import AutoModelForCausalLM

    model = random_model(options)
    assert hf.counterpart(model.config) is None
    assert hf.exports_to(model.config).startswith("no Hugging Face counterpart: ")
    with pytest.raises(ValueError, match="gpt2_xla"):
        AutoModelForCausalLM.from_pretrained(save(model, tmp_path))


def test_the_nearest_counterpart_is_named_with_its_flags():
    found = {name: hf.exports_to(random_model(options).config) for name, options in (MODELS | OURS_ALONE).items()}
    assert found["llama"] == "LlamaForCausalLM"
    assert found["qwen3, grouped, untied"] == "Qwen3ForCausalLM"
    assert found["no biases"] == "no Hugging Face counterpart: GPT2LMHeadModel would need --bias"
    assert found["relu2"] == "no Hugging Face counterpart: Qwen3ForCausalLM would need --activation swiglu"
    assert hf.exports_to(ModelConfig()) == "GPT2LMHeadModel"
    assert hf.exports_to(ModelConfig(**PRESETS["modern-124m"])) == "Qwen3ForCausalLM"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"rope_scaling": {"type": "linear"}},
            "rope_scaling has type 'linear'; this model has the plain rotation only",
        ),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_parameters has rope_type 'llama3'"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor '0.5'"),
        ({"rope_parameters": "plain"}, "rope_parameters is 'plain'; expected an object"),
        ({"rope_parameters": None, "rope_theta": -1}, "rope_theta is -1; expected a number above 0"),
        ({"attention_bias": True}, "attention_bias is True; this model has False only"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types names other layers"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; this model has 'silu' only"),
        ({"head_dim": 16}, "head_dim is 16; this model has hidden_size / num_attention_heads, 8"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not divisible by num_key_value_heads 3"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0; expected a whole number above 0"),
        ({"num_attention_heads": 5}, "hidden_size 32 is not divisible by num_attention_heads 5"),
        ({"num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 1}, "the heads' dimension, 1, is odd"),
        ({"hidden_size": "32"}, "hidden_size is '32'; expected a whole number"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0; expected a number above 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1; expected true or false"),
        ({"attention_dropout": 2}, "attention_dropout is 2; expected a number in"),
        ({"quantization_config": {}}, "quantization_config is {}; this model has None only"),
    ],
)
def test_each_difference_that_we_cannot_represent_is_named(changes, sentence):
    config = hf.hugging_face_config(ModelConfig(**MODELS["qwen3"]), None)
    with pytest.raises(UserError) as caught:
        hf.model_config(config | changes)
    (mistake,) = caught.value.mistakes
    assert sentence in mistake


def test_a_silent_config_has_the_heads_that_transformers_assumes():
    config = hf.hugging_face_config(ModelConfig(**MODELS["llama"]), None)
    del config["head_dim"], config["num_key_value_heads"], config["rope_parameters"]
    assert hf.model_config(config | {"rope_theta": 7}).rope_theta == 7.0
    with pytest.raises(UserError, match="head_dim is 128"):
        hf.model_config(config | {"model_type": "qwen3"})


def test_weights_that_do_not_fit_are_named():
    config = ModelConfig(**MODELS["llama"])
    theirs = hf.to_hugging_face(random_model(LLAMA).state_dict(), config)
    theirs["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # of old checkpoints: no weight
    assert hf.from_hugging_face(theirs, config).keys() == dict(GPT(config).named_parameters()).keys()
    with pytest.raises(UserError, match=r"no part of a LlamaForCausalLM: model.layers.0.self_attn.q_proj.bias"):
        hf.from_hugging_face(theirs | {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}, config)
    with pytest.raises(UserError, match=r"layers.1.self_attn.k_proj.weight is 32 x 31; the model's is 32 x 32"):
        hf.from_hugging_face(theirs | {"model.layers.1.self_attn.k_proj.weight": torch.ones(32, 31)}, config)
    # As many rows in all, but not the same ones.
    moved = {"q_proj": torch.ones(33, 32), "v_proj": torch.ones(31, 32)}
    with pytest.raises(UserError, match=r"q_proj.weight is 33 x 32; .*\n.*v_proj.weight is 31 x 32"):
        hf.from_hugging_face(
            theirs | {f"model.layers.1.self_attn.{name}.weight": value for name, value in moved.items()}, config
        )
    del theirs["model.layers.2.self_attn.v_proj.weight"]
    with pytest.raises(UserError, match=r"model.layers.2.self_attn.v_proj.weight is missing"):
        hf.from_hugging_face(theirs, config)


MODERN = [
    "--position",
    "rope",
    "--norm",
    "rmsnorm",
    "--qk-norm",
    "--no-bias",
    "--num-kv-heads",
    "1",
    "--dropout",
    "0.1",
]
COMBINATIONS = {
    "swiglu": ("exports to  Qwen3ForCausalLM", "model.layers.0.mlp.gate_proj.weight"),
    "relu2": ("exports to  no Hugging Face counterpart: Qwen3ForCausalLM would need", "blocks.0.mlp.c_fc.weight"),
}


@pytest.mark.parametrize("activation", COMBINATIONS)
def test_a_run_says_where_it_exports_to_resumes_bit_for_bit_and_generates(
    activation, tmp_path, text_data, monkeypatch, capsys
):
    says, weight = COMBINATIONS[activation]
    flags = [*FOUR_STEPS, *data_flags(text_data), *MODERN, "--activation", activation, "--save-interval", "2"]
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert run_here(monkeypatch, run_pretrain.main, *flags, "--checkpoints-dir", whole) == 0
    printed = capsys.readouterr().out
    assert printed.count(says) == 1
    assert "2 heads (1 of keys and values)" in printed
    assert f"rope of base 10000, rmsnorm, {activation}, qk-norm, no biases, tied output layer" in printed
    shutil.copytree(whole / "step-00000002", again / "step-00000002")
    assert run_here(monkeypatch, run_pretrain.main, "--checkpoints-dir", again) == 0
    assert losses(again) == losses(whole)[2:]
    for name in ("model.safetensors", "trainer_state/optimizer.safetensors"):
        assert (again / "step-00000004" / name).read_bytes() == (whole / "step-00000004" / name).read_bytes()
    assert weight in load_file(whole / "step-00000004/model.safetensors")
    capsys.readouterr()
    assert run_here(monkeypatch, generate.main, "--model", again, "--prompt", "a", "--max-new-tokens", "3") == 0
    assert capsys.readouterr().out.startswith("a")


def test_a_resume_with_another_architecture_is_refused_and_spelled_out_defaults_are_none(
    tmp_path, text_data, monkeypatch, capsys
):
    to = ["--checkpoints-dir", tmp_path]
    flags = [*FOUR_STEPS, *data_flags(text_data), "--position", "rope", "--no-bias", *to]
    assert run_here(monkeypatch, run_pretrain.main, *flags) == 0
    other = ["--position", "learned", "--num-kv-heads", "1", "--bias", "--train-steps", "5"]
    assert run_here(monkeypatch, run_pretrain.main, *other, *to) == 2
    printed = capsys.readouterr().err
    assert "--position learned conflicts with step-00000004, which has rope; leave the flag out" in printed
    assert "--num-kv-heads 1 conflicts with step-00000004, which has the default" in printed
    assert "--bias on conflicts with step-00000004, which has off" in printed
    assert run_here(monkeypatch, run_pretrain.main, "--num-kv-heads", "2", "--d-ff", "256", *to) == 0
