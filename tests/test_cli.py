"""Flags are the configuration's fields: their strength, their mistakes, their help, for every command."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from commands import PATIENCE, ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_xla import cli
from gpt2_xla.cli import flags_of, from_dict, parse, parser_for
from gpt2_xla.config import (
    PRESET_OPTIMIZERS,
    PRESETS,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    TorchPretrainConfig,
    XlaPretrainConfig,
    to_dict,
)
from gpt2_xla.errors import UserError
from gpt2_xla.option_docs import COMMANDS
from gpt2_xla.validation import config_mistakes

RECIPES = sorted((ROOT / "configs").glob("*.flags"))
SCRIPTS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "scripts").glob("*.py"))


def parsed(*tokens: str, base: TorchPretrainConfig | None = None) -> TorchPretrainConfig:
    return parse(TorchPretrainConfig, list(tokens), "", base=base).config


def mistakes(*tokens: str) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        parsed(*tokens)
    return caught.value.mistakes


def fields_of(config_type: type) -> list[dataclasses.Field]:
    hints = typing.get_type_hints(config_type)
    found = []
    for field in dataclasses.fields(config_type):
        nested = dataclasses.is_dataclass(hints[field.name])
        found += fields_of(hints[field.name]) if nested else [field]
    return found


@pytest.mark.parametrize("config_type", COMMANDS.values(), ids=COMMANDS.keys())
def test_every_option_is_one_flag_with_help(config_type):
    actions = {name: action for action in parser_for(config_type, "")._actions for name in action.option_strings}
    names = [field.name for field in fields_of(config_type)]
    assert len(set(names)) == len(names)
    page = parser_for(config_type, "").format_help()
    for field in fields_of(config_type):
        name = "--" + field.name.replace("_", "-")
        assert len(field.metadata["help"]) > 5, name
        assert actions[name].dest == field.name
        assert name in page
        if isinstance(field.default, bool):
            assert actions["--no-" + name[2:]] is actions[name]
        elif field.default not in (None, ()) and "default:" not in field.metadata["help"]:
            shown = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else str(field.default)
            assert f"(default: {shown})" in re.sub(r"\s+", " ", actions[name].help)


def test_the_flag_beats_the_preset_beats_the_recipe_beats_the_saved_run_beats_the_default(tmp_path):
    recipe = tmp_path / "own.flags"
    recipe.write_text("--num-heads 8  # a comment with an apostrophe: isn't it\n--d-ff 99 --seq-length 64\n")
    base = parsed("--num-layers", "9")
    base = dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, d_model=90, num_heads=9, d_ff=9, seq_length=9, dropout=0.3),
    )
    command = ["--seq-length", "32", "--recipe", str(recipe), "--preset", "tiny"]
    config = parsed(*command, base=base)
    assert config.model.seq_length == 32  # all five name it
    assert config.model.num_heads == PRESETS["tiny"]["num_heads"]  # preset, over recipe and base
    assert config.model.d_ff == 99  # recipe, over base
    assert config.model.d_model == PRESETS["tiny"]["d_model"]  # preset, over base
    assert config.model.dropout == 0.3  # base, over default
    assert config.model.num_layers == PRESETS["tiny"]["num_layers"]
    assert config.run.seed == TorchPretrainConfig().run.seed  # default
    assert parsed(*reversed_pairs(command), base=base) == config  # the order on the line decides nothing


def reversed_pairs(tokens: list[str]) -> list[str]:
    pairs = list(zip(tokens[::2], tokens[1::2], strict=True))
    return [token for pair in reversed(pairs) for token in pair]


def test_a_later_flag_beats_an_earlier_one():
    assert parsed("--seed", "1", "--seed", "2").run.seed == 2


def test_a_recipe_may_name_a_preset_and_the_command_another(tmp_path):
    recipe = tmp_path / "own.flags"
    recipe.write_text("--preset tiny --num-layers 5")
    model = parsed("--recipe", str(recipe)).model
    assert (model.d_model, model.num_layers) == (PRESETS["tiny"]["d_model"], 5)
    model = parsed("--recipe", str(recipe), "--preset", "gpt2-xl").model
    assert (model.d_model, model.num_layers) == (PRESETS["gpt2-xl"]["d_model"], PRESETS["gpt2-xl"]["num_layers"])
    recipe.write_text("--preset modern-124m")
    assert parsed("--recipe", str(recipe), "--preset", "gpt2").model == ModelConfig()  # nothing of the other is left
    assert parsed("--preset", "gpt2", base=parsed("--preset", "modern-124m")).model == ModelConfig()


def test_what_the_command_itself_set_is_known(tmp_path):
    recipe = tmp_path / "own.flags"
    recipe.write_text("--d-ff 99")
    explicit = parse(TorchPretrainConfig, ["--seed", "3", "--recipe", str(recipe), "--preset", "tiny"], "").explicit
    assert explicit == {"seed", "d_ff", *PRESETS["tiny"]}


def test_booleans_are_switched_on_and_off():
    assert parsed().model.tie_weights
    assert not parsed("--no-tie-weights").model.tie_weights
    assert parsed("--no-tie-weights", "--tie-weights").model.tie_weights
    assert parsed("--compile").runtime.compile


def test_numbers_lists_and_equals_signs_are_read():
    config = parsed("--betas", "0.8", "0.9", "--wandb-tags", "a", "b", "--train-steps=1_000", "--min-lr=1e-5")
    assert config.optim.betas == (0.8, 0.9)
    assert config.logging.wandb_tags == ("a", "b")
    assert config.run.train_steps == 1000
    assert config.optim.min_lr == 1e-5


@pytest.mark.parametrize(
    ("tokens", "sentence"),
    [
        (["--leraning-rate", "1"], "unknown flag --leraning-rate, did you mean --learning-rate?"),
        (["--num-layer=3"], "unknown flag --num-layer, did you mean --num-layers?"),
        (["--zzz"], "unknown flag --zzz; --help lists them"),
        (["--preset", "gpt2-larg"], "--preset gpt2-larg is unknown, did you mean gpt2-large?"),
        (["--preset"], "--preset needs a value"),
        (["--recipe"], "--recipe needs a value"),
        (["--activation", "gellu"], "--activation gellu is not one of gelu, relu, relu2, swiglu, did you mean gelu?"),
        (["--recipe", "macbok"], "--recipe macbok: no such file or recipe, did you mean macbook?"),
        (["--seed"], "--seed needs a value"),
        (["--train-steps", "--seed", "1"], "--train-steps needs a value"),
        (["--train-steps", "1.5"], "--train-steps 1.5 is not a whole number"),
        (["--min-lr", "small"], "--min-lr small is not a number"),
        (["--betas", "0.9"], "--betas takes 2 values, got 1: 0.9"),
        (["--resume"], "--resume needs a value: one of auto, must, never"),
        (["--do-test=yes"], "--do-test"),
        (["gpt2"], "unexpected argument 'gpt2'; every option is a --flag"),
    ],
)
def test_a_mistake_is_one_sentence_that_names_the_flag_and_the_remedy(tokens, sentence):
    found = mistakes(*tokens)
    assert len(found) == 1
    assert sentence in found[0]


def test_all_mistakes_of_a_command_line_come_together(tmp_path):
    recipe = tmp_path / "own.flags"
    recipe.write_text("--d-modle 3")
    found = mistakes(
        "--sed", "1", "--betas", "1", "--seed", "x", "--preset", "gtp2", "--recipe", str(recipe), "--min-lr"
    )
    text = "\n".join(found)
    assert len(found) == 6
    for part in ("--sed", "--betas", "--seed x", "--preset gtp2", "in recipe", "--min-lr needs a value"):
        assert part in text


def test_a_recipe_that_is_no_recipe_is_reported_with_the_other_mistakes(tmp_path):
    nested, unclosed, binary = tmp_path / "nested", tmp_path / "unclosed", tmp_path / "binary"
    nested.write_text("--recipe macbook")
    unclosed.write_text("--wandb-notes 'never closed")
    binary.write_bytes(b"\xff\xfe\x00")
    for recipe in (nested, unclosed, binary, tmp_path / "absent"):
        found = mistakes("--recipe", str(recipe), "--sed", "1")
        assert len(found) == 2
        assert any(str(recipe) in mistake for mistake in found)


def entry_points(recipe: Path) -> list[type[PretrainConfig]]:
    """The configurations that a recipe is for: --sharding is XLA's."""
    return [XlaPretrainConfig] if "--sharding" in recipe.read_text() else [TorchPretrainConfig, XlaPretrainConfig]


@pytest.mark.parametrize(
    ("recipe", "config_type"),
    [(recipe, config_type) for recipe in RECIPES for config_type in entry_points(recipe)],
    ids=lambda value: value.stem if isinstance(value, Path) else value.__name__,
)
def test_every_recipe_parses_and_holds_no_mistake(recipe: Path, config_type: type[PretrainConfig]):
    config = parse(config_type, ["--recipe", recipe.stem], "").config
    assert config != config_type()
    assert config_mistakes(config) == []


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_holds_no_mistake(preset):
    assert config_mistakes(parsed("--preset", preset)) == []


def test_a_preset_may_set_the_optimizer_and_flags_beside_it_win(monkeypatch):
    monkeypatch.setitem(PRESET_OPTIMIZERS, "tiny", dict(optim_type="muon", decay_method="wsd-sqrt"))
    config = parsed("--decay-method", "linear", "--preset", "tiny")
    assert config.model.d_model == PRESETS["tiny"]["d_model"]
    assert (config.optim.optim_type, config.optim.decay_method) == ("muon", "linear")


def test_presets_set_fields_that_there_are():
    assert PRESET_OPTIMIZERS.keys() <= PRESETS.keys()
    for presets, group in ((PRESETS, ModelConfig), (PRESET_OPTIMIZERS, OptimConfig)):
        names = {field.name for field in dataclasses.fields(group)}
        assert all(preset.keys() <= names for preset in presets.values())


WORDS = st.text("abcdefghij XYZ/._é'\"#", min_size=1).filter(lambda word: word.strip() == word)


def values(type_: object) -> st.SearchStrategy:
    """Values of a field's type."""
    arguments = typing.get_args(type_)
    if type(None) in arguments:
        return st.none() | values(next(t for t in arguments if t is not type(None)))
    if typing.get_origin(type_) is tuple:
        if arguments[-1] is Ellipsis:
            return st.lists(values(arguments[0]), max_size=3).map(tuple)
        return st.tuples(*map(values, arguments))
    if typing.get_origin(type_) is typing.Literal:
        return st.sampled_from(arguments)
    numbers = st.floats(min_value=0, allow_nan=False, allow_infinity=False)
    return {bool: st.booleans(), int: st.integers(0, 2**40), float: numbers, str: WORDS}[type_]


@st.composite
def configurations(draw):
    config_type = draw(st.sampled_from(list(COMMANDS.values())))
    drawn = {flag.key: draw(values(flag.type)) for flag in flags_of(config_type) if draw(st.booleans())}
    return cli.replace_fields(config_type(), drawn), drawn


@given(configurations())
@settings(max_examples=100)
def test_a_configuration_survives_json(drawn):
    config, _ = drawn
    assert from_dict(type(config), json.loads(json.dumps(to_dict(config)))) == config


@given(configurations())
@settings(max_examples=100)
def test_a_configuration_can_be_written_as_flags(drawn):
    config, changed = drawn
    tokens = []
    for key, value in changed.items():
        name = "--" + key.replace("_", "-")
        if value is None:
            continue
        if isinstance(value, bool):
            tokens.append(name if value else "--no-" + name[2:])
        elif isinstance(value, tuple):
            tokens += [name, *map(str, value)]
        else:
            tokens += [name, str(value)]
    expected = cli.replace_fields(type(config)(), {k: v for k, v in changed.items() if v is not None})
    assert parse(type(config), tokens, "").config == expected


def test_options_that_the_other_entry_point_saved_are_left_out():
    saved = to_dict(parse(XlaPretrainConfig, ["--seed", "7", "--mp-start-method", "fork"], "").config)
    config = from_dict(TorchPretrainConfig, saved | {"a later version's": {"group": 1}})
    assert config == parsed("--seed", "7")


@pytest.mark.parametrize(
    ("group", "saved"),
    [
        ("model", {"d_model": "wide"}),
        ("model", {"d_model": 1.5}),
        ("model", {"num_layers": True}),
        ("model", {"tie_weights": "no"}),
        ("model", {"activation": ["gelu"]}),
        ("optim", {"betas": 0.9}),
        ("optim", {"betas": "ab"}),
        ("optim", {"learning_rate": [1]}),
        ("run", {"checkpoints_dir": 3}),
    ],
)
def test_a_saved_option_of_the_wrong_type_is_named(group, saved):
    with pytest.raises(UserError, match=next(iter(saved))):
        from_dict(TorchPretrainConfig, {group: saved})


def test_every_commands_help_ends_well_and_names_every_flag():
    commands = ["run_pretrain.py", "run_pretrain_xla.py", "generate.py", *SCRIPTS]
    assert set(COMMANDS) <= set(commands)
    # What need not load torch to print its help must not: a person waits for it.
    watch = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    check = "import atexit, sys; atexit.register(lambda: print('TORCH' if 'torch' in sys.modules else '')); "
    before = (ROOT / "docs" / "configuration.md").stat().st_mtime_ns
    running = {
        command: subprocess.Popen(
            [sys.executable, "-c", check + watch, command, "--help"],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command in commands
    }
    for command, process in running.items():
        output, errors = process.communicate(timeout=PATIENCE)
        assert (process.returncode, errors) == (0, ""), command
        assert len(output.strip()) > 20, command
        for flag in flags_of(COMMANDS[command]) if command in COMMANDS else []:
            assert flag.name in output, (command, flag.name)
        if command.startswith("scripts/"):
            assert "TORCH" not in output, f"{command} --help imports torch"
    assert (ROOT / "docs" / "configuration.md").stat().st_mtime_ns == before
