#!/bin/sh
# Everything that only a machine with an NVIDIA GPU can tell: `all` within 11 minutes, most wanted first, or one part.
#
#   TOKENIZER=runs/tokenizer CORPORA="corpora/books corpora/stories" benchmarks/gpu.sh all
#
# Parts: tests base dropout0 profile ceilings (together `first`, 400 s at most), large ladder pretrain (`second`, 260 s),
# since a machine may take no longer command than ten minutes. Each part ends at its own time, and writes what it has
# into RESULTS (JSON, a log of each part, summary.txt). STRETCH=3 gives each three times as long. Token stores are kept
# in STORES, where all parts find them.
#
# MICRO_BATCH, TUNED_MICRO_BATCH and COMPILED_MICRO_BATCH are those of base: ours, and of the stock loop tuned and
# compiled; large has a quarter. PYTHON: which one. The whole of it can be tried on a CPU, at a small shape:
#
#   SHAPE=small LARGE=small PRECISION=no LENGTH=64 MICRO_BATCH=4 ACCUMULATION=1 ROUNDS=2 WINDOW=0.1 RESULTS=/tmp/gpu \
#     TOKENIZER=runs/demo-tokenizer CORPORA=sample_data/novels.jsonl.gz benchmarks/gpu.sh all
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
RESULTS=${RESULTS:-benchmarks/results}
STORES=${STORES:-${TMPDIR:-/tmp}/gpu-token-stores}
MICRO_BATCH=${MICRO_BATCH:-128}
TUNED_MICRO_BATCH=${TUNED_MICRO_BATCH:-$(((MICRO_BATCH + 1) / 2))}
COMPILED_MICRO_BATCH=${COMPILED_MICRO_BATCH:-$MICRO_BATCH}
ACCUMULATION=${ACCUMULATION:-8}
SHAPE=${SHAPE:-base}
LARGE=${LARGE:-large}
LENGTH=${LENGTH:-512}
PRECISION=${PRECISION:-bf16}
ROUNDS=${ROUNDS:-7}
WINDOW=${WINDOW:-2}
UPDATES=${UPDATES:-60}
STRETCH=${STRETCH:-1}
COMPILE=${COMPILE---torch_compile}
export PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}"

# Arguments: script, shape, part of the micro-batch, further options.
measure() {
  script=$1 shape=$2 part=$3
  shift 3
  $PYTHON "benchmarks/$script.py" --tokenizer "$TOKENIZER" --corpora $CORPORA --shape "$shape" --length "$LENGTH" \
    --precision "$PRECISION" --micro_batch $(((MICRO_BATCH + part - 1) / part)) --accumulation "$ACCUMULATION" \
    $COMPILE --token_store_dir "$STORES" --output "$RESULTS/$script.json" "$@"
}

# Arguments: shape, part of the micro-batch, further options.
against_stock() {
  shape=$1 part=$2
  shift 2
  measure throughput "$shape" "$part" --tuned_micro_batch $(((TUNED_MICRO_BATCH + part - 1) / part)) \
    --compiled_micro_batch $(((COMPILED_MICRO_BATCH + part - 1) / part)) --rounds "$ROUNDS" \
    --window_seconds "$WINDOW" "$@"
}

pretrain() {
  run=$(mktemp -d)
  list= model='{}' compiles=false
  for corpus in $CORPORA; do list="$list{name: $(basename "$corpus"), path: $corpus},"; done
  if [ "$SHAPE" = small ]; then
    model='{num_hidden_layers: 4, hidden_size: 256, intermediate_size: 1024, num_attention_heads: 4}'
  fi
  if [ -n "$COMPILE" ]; then compiles=true; fi
  $PYTHON -m accelerate.commands.launch --quiet --num_processes 1 --num_machines 1 --mixed_precision "$PRECISION" \
    --dynamo_backend no pretrain.py --config recipe/configs/pretrain/roberta-base.yaml --output_dir "$run" \
    --corpora "[$list]" --tokenizer_name "$TOKENIZER" --model_config "$model" --max_seq_length "$LENGTH" \
    --train_batch_size $((2 * MICRO_BATCH)) --per_device_train_batch_size "$MICRO_BATCH" --max_steps "$UPDATES" \
    --warmup_steps 10 --learning_rate 5e-4 --logging_steps 10 --save_steps "$UPDATES" --eval_steps "$UPDATES" \
    --eval_blocks 64 --torch_compile $compiles --token_store_dir "$STORES"
  cp "$run/metrics.jsonl" "$RESULTS/pretrain.jsonl"
  rm -r "$run"
}

part() {
  case $1 in
  tests) $PYTHON -m pytest tests/test_gpu.py --durations 5 ;;
  ceilings) $PYTHON benchmarks/ceilings.py --shape "$SHAPE" --precision "$PRECISION" --batch $(((MICRO_BATCH + 1) / 2)) \
    --length "$LENGTH" --output "$RESULTS/ceilings.json" ;;
  base) against_stock "$SHAPE" 1 ;;
  dropout0) against_stock "$SHAPE" 1 --dropout 0 --only "stock, tuned" ${COMPILE:+"stock, compiled"} ;;
  large) against_stock "$LARGE" 4 --only "stock, tuned" ${COMPILE:+"stock, compiled"} ;;
  ladder) against_stock "$SHAPE" 1 --ladder --warm_up_seconds $((75 * STRETCH)) --only "padded rows" \
    "dropout, residual, norm apart" "compiled as one graph" "residual stream in float32" "attention by flash" \
    "attention by cuDNN" ;;
  profile) measure profile_update "$SHAPE" 1 ;;
  pretrain) pretrain ;;
  *)
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
  esac
}

# A part within its seconds, as a process of its own; whatever becomes of it, the next one follows.
bounded() {
  echo "== $1, at most $(($2 * STRETCH)) s"
  if timeout -k 5 $(($2 * STRETCH)) "$0" "$1" </dev/null >"$RESULTS/$1.log" 2>&1; then ended=done; else ended="ended with $?"; fi
  tail -n 25 "$RESULTS/$1.log"
  echo "$1: $ended, $(($(date +%s) - STARTED)) s after the start" | tee -a "$RESULTS/summary.txt"
}

mkdir -p "$RESULTS"
first="tests:100 base:170 dropout0:80 profile:30 ceilings:20" second="large:100 ladder:120 pretrain:40"
case ${1:-} in
all) limits="$first $second" ;;
first) limits=$first ;;
second) limits=$second ;;
*)
  part "${1:-}"
  exit
  ;;
esac
STARTED=$(date +%s)
echo "$1, $(date)" >>"$RESULTS/summary.txt"
for limited in $limits; do
  bounded "${limited%:*}" "${limited#*:}"
done
cat "$RESULTS/summary.txt"
