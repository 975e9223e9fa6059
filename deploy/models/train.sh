#!/bin/sh
# Reproduces the bundled pair on one GPU (about 15 minutes on an H200).
# usage: deploy/models/train.sh CORPORA PROMPTS OUT
#   CORPORA holds *.jsonl.gz, PROMPTS holds mt_bench.jsonl, gsm8k.jsonl and humaneval.jsonl.
set -eu
python -m speculator.train nano-en --data "$1" --prompts "$2" --out "$3/nano-en" --workers 14
# the yardstick: the pilot's recipe with the same code, on the same machine
python -m speculator.train pilot --data "$1" --prompts "$2" --out "$3/pilot" --workers 14
