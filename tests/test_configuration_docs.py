"""docs/configuration.md says what config.py declares."""

from commands import ROOT

from gpt2_xla.option_docs import configuration_page


def test_the_page_of_options_is_up_to_date():
    written = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert written == configuration_page(), (
        "docs/configuration.md is out of date: run python scripts/write_configuration_md.py"
    )
