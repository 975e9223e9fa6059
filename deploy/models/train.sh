#!/bin/sh
# Reproduces the bundled pairs on one GPU (nano-en took about 17 minutes on an H200; the others have shorter budgets).
# usage: deploy/models/train.sh CORPORA PROMPTS OUT [PAIR...]
#   CORPORA holds *.jsonl.gz, PROMPTS holds mt_bench.jsonl, gsm8k.jsonl and humaneval.jsonl.
#   PAIR is nano-en, nano-moe or nano-hybrid; all by default.
set -eu
corpora=$1 prompts=$2 out=$3
shift 3
[ $# -gt 0 ] || set -- nano-en nano-moe nano-hybrid
run="python3 -m speculator.train"
for pair in "$@"; do
  $run "$pair" --data "$corpora" --prompts "$prompts" --out "$out/$pair" --workers 14
done
# the yardstick: the pilot's recipe with the same code, on the same machine
$run pilot --data "$corpora" --prompts "$prompts" --out "$out/pilot" --workers 14 --stage tokenizer tokens target
