#!/bin/sh
# make interop: our shards in other loaders' own environment. .venv-interop is made when it is missing or its requirements changed.
set -eu
cd "$(dirname "$0")/../.."
venv=.venv-interop
requirements=tests/interop/energon/requirements.txt
if ! cmp -s "$requirements" "$venv/requirements.txt"; then
    test -x "$venv/bin/python" || "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' "$requirements")"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$requirements"
    # only its script wds2idx is run, which needs nothing else of it
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps nvidia-dali-cuda120 ||
        echo "NVIDIA DALI cannot be had here: its check is skipped" >&2
    cp "$requirements" "$venv/requirements.txt"
fi
exec .venv/bin/python -m pytest tests/interop "$@"
