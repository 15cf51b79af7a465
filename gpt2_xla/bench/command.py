"""scripts/bench.py: measure, and print the tables."""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from gpt2_xla.bench.contenders import option_mistakes, seats, tokens_needed, write_random_tokens
from gpt2_xla.bench.table import Row, breakdown_table, make_row, scaling_table, table
from gpt2_xla.bench.turns import Match
from gpt2_xla.bench_config import BenchConfig
from gpt2_xla.cli import Parsed
from gpt2_xla.config import to_dict
from gpt2_xla.errors import UserError


def measure(config: BenchConfig, say: Callable[[str], None]) -> dict[str, list[Row]]:
    """The rows of each runtime that can be measured here; `say` hears why a loop cannot."""
    options, found = config.bench, {}
    with tempfile.TemporaryDirectory(prefix="bench") as temporary:
        folder = Path(temporary)
        (folder / "data").mkdir()
        write_random_tokens(folder / "data", config.model, tokens_needed(options, config.model))
        (folder / "config.json").write_text(json.dumps(to_dict(config)))
        for runtime, of_runtime in seats(config, folder).items():
            contenders = [contender for seat in of_runtime for contender in seat.contenders]
            say(f"measuring {runtime}: {', '.join(c.name for c in contenders)} …")
            with Match(of_runtime, folder, runtime, options, say) as match:
                times, seen = match.play()
            found[runtime] = [
                make_row(c, times[c.name], options.steps, seen[c.name]) for c in contenders if c.name in seen
            ]
    return found


def bench(parsed: Parsed[BenchConfig], mistakes: list[str]) -> None:
    """Print the tables. Raises `UserError` for options that can't be, `mistakes` of parsing included, and if nothing could be measured."""
    config = parsed.config
    if mistakes := [*mistakes, *option_mistakes(config, parsed.explicit)]:
        raise UserError(list(dict.fromkeys(mistakes)))
    found = measure(config, lambda text: print(text, file=sys.stderr, flush=True))
    if not any(found.values()):
        raise UserError("nothing could be measured; the lines above say why")
    options, model = config.bench, config.model
    print(
        f"{options.train_batch_size} × {model.seq_length} tokens a micro-step, {options.turns} turns of {options.steps} steps"
    )
    for rows in filter(None, found.values()):
        print(f"\n{table(rows)}")
        ours = [row for row in rows if row.is_ours]
        if len(ours) > 1:
            print(f"\n{scaling_table(ours)}")
        if any(row.parts for row in ours):
            print(f"\n{breakdown_table(ours)}")
