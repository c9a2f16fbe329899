#!/bin/sh
# .venv-peers: the other loaders' own environment, made when it is missing or its requirements changed
set -eu
cd "$(dirname "$0")/../.."
venv=.venv-peers
requirements=benchmarks/peers/requirements.txt
if ! cmp -s "$requirements" "$venv/requirements.txt"; then
    test -x "$venv/bin/python" || "${PYTHON:-python3}" -m venv "$venv"
    # torch first and alone, and the rest without looking for what it needs: every package is pinned, and no resolver may prefer CUDA's torch
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' "$requirements")"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -r "$requirements"
    cp "$requirements" "$venv/requirements.txt"
fi
