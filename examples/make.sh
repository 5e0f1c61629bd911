#!/usr/bin/env bash
# Make examples/tiny-dsv4: the pipeline on the bundled model, every benchmark with its head and
# without, the card and the reports. Goes on where it was stopped; what is to be measured anew has
# to be removed from RUN/bench first.
#
#   examples/make.sh RUN DATA     RUN: a folder to work in; DATA: as docs/evals.md describes it
set -euo pipefail
run=$(realpath -m "$1") data=$(realpath "$2")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
mkdir -p "$run"
graft=.venv/bin/mtp-graft
base=models/tiny-dsv4/base
mtp=$run/splice/gptq/tiny-dsv4-mtp

"$graft" demo --run "$run" --json "$run/demo.json"

# MTP in the run's own folder, where the card looks; the base beside it.
for side in mtp base; do
    checkpoint=${!side}
    folder=$run && [[ $side == mtp ]] || folder=$run-base
    serve=(--checkpoint "$checkpoint" --max-model-len 4096 --run "$folder")
    # An answer may fill the context, which is short for that reason.
    "$graft" bench workload --checkpoint "$checkpoint" --max-model-len 2560 --run "$folder"
    "$graft" bench gsm8k "${serve[@]}" --data-dir "$data" --limit 50 --max-tokens 192
    "$graft" bench humaneval "${serve[@]}" --data-dir "$data" --max-tokens 128
    "$graft" bench mmlu "${serve[@]}" --data-dir "$data" --limit 57 --max-tokens 64
    "$graft" bench capability "${serve[@]}" --max-tokens 128
done
"$graft" bench sweep --checkpoint "$mtp" --max-model-len 4096 --run "$run" \
    --k 0,1 --streams 1,2,3,4 --requests 4 --max-tokens 64
"$graft" bench decode --checkpoint "$mtp" --against "$base" --pairs 4 --limit 4 --rounds 1 \
    --max-tokens 64 --run "$run"
"$graft" card "$run" --json "$run/card.json"

out=examples/tiny-dsv4
rm -rf "$out" "$out-base" && mkdir -p "$out"
cp -r "$run/card" "$run/report" "$out/"
rm -f "$out/report/manifest.json"
.venv/bin/python examples/keep.py "$run" "$out"
.venv/bin/python examples/keep.py "$run-base" "$out-base"
