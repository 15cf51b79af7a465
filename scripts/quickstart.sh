#!/usr/bin/env bash
# From nothing to a trained GPT and its words: install into .venv, prepare text, train, interrupt, resume, plot, generate.
# On a machine with a GPU the same commands use it. Arguments go to run_pretrain.py.
set -euo pipefail
cd "$(dirname "$0")/.."
RUN=runs/quickstart

step() { printf '\n\033[1m%s\033[0m\n' "$*"; }

step "1. Install into .venv (torch alone is several GB)"
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
. .venv/bin/activate
python -m pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt

step "2. Prepare the built-in corpus: Python's language reference, byte by byte"
[ -f data/quickstart/valid/manifest.json ] ||
  python scripts/prepare_text.py --source pydoc --tokenizer bytes --output-dir data/quickstart

step "3. Train a small GPT, and interrupt it half way as a preempted machine would (SIGTERM)"
rm -rf "$RUN"
python run_pretrain.py --recipe quickstart "$@" &
trainer=$!
trap 'kill $trainer 2>/dev/null || true' EXIT
# Wait until half of the steps are logged, or the run is over.
until [ -f "$RUN/step-00000400/trainer_state/COMPLETE" ] || ! kill -0 $trainer 2>/dev/null; do sleep 0.5; done
kill -TERM $trainer 2>/dev/null || true
wait $trainer
trap - EXIT

step "4. Resume it: the same command"
python run_pretrain.py --recipe quickstart "$@"

step "5. The result"
python - "$RUN/metrics.jsonl" <<'PY'
import json, sys
valid = [r for r in map(json.loads, open(sys.argv[1])) if r["kind"] == "valid"]
first, last = valid[0], valid[-1]
print(f"validation loss before: {first['loss']:.3f} (perplexity {first['perplexity']:.1f} per byte)")
print(f"validation loss after:  {last['loss']:.3f} (perplexity {last['perplexity']:.1f} per byte)")
PY
printf 'loss curve: '
python scripts/plot_loss.py "$RUN"

step "6. Its words"
python generate.py --model "$RUN" --prompt "The list of " --max-new-tokens 300 --temperature 0.7
echo
