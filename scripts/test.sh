#!/usr/bin/env bash
# Install what the tests need into .venv (once), then lint, type-check and run the whole suite. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
. .venv/bin/activate
# Reinstalling what is there already costs 3 s; a changed requirement is never missed.
python -m pip install --quiet --disable-pip-version-check \
  -r requirements.txt -r requirements-xla_tpu.txt -r tests/requirements.txt -c constraints.txt
ruff check .
ruff format --check .
mypy
exec python -m pytest "$@"
