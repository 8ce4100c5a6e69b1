#!/bin/sh
# Everything that only a machine with an NVIDIA GPU can tell, in parts of less than ten minutes each:
#
#   for part in tests ceilings base large ladder ladder-attention profile; do
#     TOKENIZER=runs/tokenizer CORPORA="corpora/books corpora/stories" benchmarks/gpu.sh $part
#   done
#
# MICRO_BATCH and STOCK_MICRO_BATCH are those of base, a quarter of them those of large; try a few, results of the best
# are what counts. PYTHON, RESULTS: which Python, and where results go.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
RESULTS=${RESULTS:-benchmarks/results}
MICRO_BATCH=${MICRO_BATCH:-128}
STOCK_MICRO_BATCH=${STOCK_MICRO_BATCH:-64}
SHAPE=${SHAPE:-base}
PRECISION=${PRECISION:-bf16}

# Arguments: script, shape, part of the micro-batch, further options.
measure() {
  script=$1 shape=$2 part=$3
  shift 3
  $PYTHON "benchmarks/$script.py" --tokenizer "$TOKENIZER" --corpora $CORPORA --shape "$shape" --precision "$PRECISION" \
    --micro_batch $((MICRO_BATCH / part)) --accumulation 4 --torch_compile --output "$RESULTS/$script.json" "$@"
}

case ${1:-} in
tests) $PYTHON -m pytest -m gpu ;;
ceilings)
  for shape in $SHAPE large; do
    $PYTHON benchmarks/ceilings.py --shape $shape --precision "$PRECISION" --batch $((MICRO_BATCH / 2)) \
      --output "$RESULTS/ceilings.json"
  done
  ;;
base) measure throughput "$SHAPE" 1 --stock_micro_batch "$STOCK_MICRO_BATCH" --updates 3 --rounds 7 ;;
large) measure throughput large 4 --stock_micro_batch $((STOCK_MICRO_BATCH / 4)) --updates 2 --rounds 7 ;;
ladder)
  measure throughput "$SHAPE" 1 --ladder --rounds 9 --only "last layer at all positions" "vocabulary padded to 64" \
    "head and last layer at all positions" "queries, keys, values in one product" "compile off" "CUDA graphs" \
    "AdamW not fused" "loader workers off"
  ;;
ladder-attention)
  measure throughput "$SHAPE" 1 --ladder --rounds 9 --only "contiguous: no padding, no mask" \
    "no mask, as if tails were filled" "mask, EFFICIENT_ATTENTION" "mask, CUDNN_ATTENTION" \
    "no mask, EFFICIENT_ATTENTION" "no mask, CUDNN_ATTENTION" "no mask, FLASH_ATTENTION" "residual stream in bf16"
  ;;
profile) measure profile_update "$SHAPE" 1 ;;
*)
  sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
  exit 2
  ;;
esac
