#!/bin/sh
# Reproduces the bundled pair on one GPU (about 20 minutes on an H200).
# usage: deploy/models/train.sh CORPORA PROMPTS OUT
#   CORPORA holds *.jsonl.gz, PROMPTS holds mt_bench.jsonl, gsm8k.jsonl and humaneval.jsonl.
set -eu
run="python -m speculator.train"
# a language model, then the same model with its head, each reaching into the other
$run nano-en-base --data "$1" --prompts "$2" --out "$3/nano-en-base" --workers 14 --stage tokenizer tokens target
mkdir -p "$3/nano-en/results"
cp -r "$3/nano-en-base/tokenizer" "$3/nano-en/"
cp "$3/nano-en-base/results/tokenizer.json" "$3/nano-en/results/"
$run nano-en --data "$1" --prompts "$2" --out "$3/nano-en" --workers 14 --start "$3/nano-en-base/target"
# the yardstick: the pilot's recipe with the same code, on the same machine
$run pilot --data "$1" --prompts "$2" --out "$3/pilot" --workers 14 --stage tokenizer tokens target
