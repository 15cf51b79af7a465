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
# Two workers: most of the time goes into starting processes. A file's tests stay together, they share what is slow to make.
exec python -m pytest -n 2 --dist loadfile "$@"
