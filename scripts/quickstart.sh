#!/usr/bin/env bash
# Distil, prune and quantise a network for handwritten digits, from a fresh clone to the report, in a few minutes.
# Arguments go to `compress run`, e.g.: scripts/quickstart.sh --trainer.max_epochs 5
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

prepare_environment data
cd "$root"
heading "compress run recipes/digits.yaml${*:+ $*}"
exec compress run recipes/digits.yaml "$@"
