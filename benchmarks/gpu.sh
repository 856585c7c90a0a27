#!/bin/bash
# All rows that need a GPU, within 8 minutes: benchmarks/gpu.sh [OUT.jsonl] [--tiny]
# PYTHON has bothways[gpu]; TORCH_PYTHON has torch for CUDA, and bothways. Each side has its share of the time, so that
# one that hangs does not take it from the others.
cd "$(dirname "$0")/.." || exit 1
out=${1:-gpu.jsonl}
: "${PYTHON:=python}" "${TORCH_PYTHON:=$PYTHON}"
: >"$out"
failed=0
side() { # PYTHON SECONDS NAME
  timeout "$2" "$1" -m benchmarks.gpu "$3" $tiny >>"$out" || {
    code=$? failed=1
    echo "{\"side\": \"$3\", \"failed\": $code}" >>"$out"
  }
}
tiny=$2
side "$PYTHON" 110 train-gpt2
side "$TORCH_PYTHON" 120 train-torch # beside the row before, on the same machine
side "$PYTHON" 90 train-bert
side "$PYTHON" 90 generate
side "$PYTHON" 60 score
cat "$out"
exit $failed
