"""A mistake that names an option which the command did not give says where it comes from."""

from pathlib import Path

from gpt2_xla.config import OptimConfig, TorchPretrainConfig, XlaConfig, XlaPretrainConfig
from gpt2_xla.saved_options import with_origin
from gpt2_xla.validation import config_mistakes

STEP = Path("run/step-00000004")


def test_a_saved_option_is_not_blamed_as_if_it_had_been_given():
    config = XlaPretrainConfig(runtime=XlaConfig(scan_layers=True, activation_checkpointing="selective"))
    sentence = "--activation-checkpointing selective is not supported with --scan-layers; use block or none"
    mistakes = config_mistakes(config)
    assert sentence in mistakes
    for explicit, origin in (
        ({"activation_checkpointing"}, f" (--scan-layers: saved in {STEP})"),
        ({"scan_layers"}, f" (--activation-checkpointing selective: saved in {STEP})"),
        (set(), f" (--activation-checkpointing selective, --scan-layers: saved in {STEP})"),
        ({"activation_checkpointing", "scan_layers"}, ""),
    ):
        told = with_origin(mistakes, config, explicit, STEP)
        assert [one for one in told if one.startswith(sentence)] == [sentence + origin]
        assert len(told) == len(mistakes)


def test_only_the_very_value_is_told():
    config = TorchPretrainConfig(optim=OptimConfig(min_lr=0.5, warmup_steps=7))
    others = ["--min-lr 0.55 is too much", "--warmup-steps 70 and --warmup-steps 7.5", "use --warmup-steps 0"]
    assert with_origin(others, config, set(), STEP) == others
    (told,) = with_origin(["--min-lr 0.5."], config, set(), STEP)
    assert told == f"--min-lr 0.5. (--min-lr 0.5: saved in {STEP})"
