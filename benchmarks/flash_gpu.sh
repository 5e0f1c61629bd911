#!/usr/bin/env bash
# Flash's width on one GPU, random weights: a whole run on a base of eight stored layers with
# capture and decode over HTTP; steps of 31 layers with MTP, DSpark and without; DSpark quantized.
#
#     benchmarks/flash_gpu.sh OUT SCRATCH [PART]...
#
# PART is made, ran, served, benched; quantized; based, dspark, headed, dspark3, lm_head or int4.
# `removed` makes room in between. OUT gets result files and logs/; what they have is not
# measured again. In SCRATCH the parts up to `benched` need 50 GB, `quantized` 40, those after it
# 58. LAYERS are those of the steps: 31 leave one H200 room for DSpark's three and for 20 GiB in which
# vLLM repacks experts. WIDTH=tiny is for a CPU, which has no DSpark.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
out=$(realpath -m "$1") scratch=$(realpath -m "$2") width=${WIDTH:-flash}
run=$scratch/run recipe=$scratch/flash.toml
mkdir -p "$out/logs" "$scratch"
# Warming up takes a cold host minutes; each measurement does so by itself.
export VLLM_DEEP_GEMM_WARMUP=skip
lazy=--kernel-config.enable_jit_warmup=False
mtp() { python3 -m mtp_graft.cli "$@"; }
write() { OMP_NUM_THREADS=${OMP_NUM_THREADS:-8} python3 "benchmarks/$1.py" "${@:2}"; }
url() { echo "http://127.0.0.1:$1"; }

# calibration and evaluation texts, tokens that they get, requests at once; cache; contexts
if [ "$width" = flash ]; then
    whole=8 deep=31 texts=256 judged=64 new=192 many=64 cache=8 contexts=(1000 16000 64000)
    small=() kept=120000
else
    whole=6 deep=7 texts=12 judged=4 new=16 many=8 cache=0.5 contexts=(64 256)
    small=(--tiny) kept=4000
fi
read -ra layers <<<"${LAYERS:-$deep}"

step() { # NAME COMMAND...: skip it if NAME.json is there
    [ -e "$out/$1.json" ] && return
    local began=$SECONDS
    "${@:2}" >>"$out/logs/$1.log" 2>&1
    echo "$1: status $?, $((SECONDS - began)) s" >>"$out/done.txt"
}

made() { # a base with all layers in files, an upstream of the full size, and what is asked
    step made write flash_width "$scratch/flash" --width "$width" --layers $whole --stored $whole --variants
    python3 - "$scratch" $texts $judged <<'END'
import json
import random
import sys
from pathlib import Path

scratch, draw, rows = Path(sys.argv[1]), random.Random(0), []
for name in ("calibration", "evaluation", "heal"):
    rows += Path(f"models/tiny-dsv4/{name}.jsonl").read_text().splitlines()
texts = [json.loads(row)["text"] for row in rows]
for name, count in zip(("calibration", "evaluation", "bench"), (*map(int, sys.argv[2:]), 8)):
    chosen = ["".join(draw.sample(texts, 6)) for _ in range(count)]  # about 220 tokens
    lines = [json.dumps({"id": f"{name}-{i}", "text": text}) for i, text in enumerate(chosen)]
    (scratch / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
END
    cat >"$recipe" <<END
[model]
name = "flash"
base = "./flash/base-$whole"
upstream = "./flash/upstream"

[capture]
calibration_prompts = "calibration.jsonl"
evaluation_prompts = "evaluation.jsonl"
calibration_count = $texts
evaluation_count = $judged
new_tokens = $new
concurrency = $many
max_model_len = 1024

[bench]
prompts = "bench.jsonl"
served_variants = ["gptq"]

[serve]
kv_cache_gib = $cache
extra_args = ["$lazy"]
END
}

# Peaks are those of the host's anonymous memory and of the GPU's, looked at twice a second.
stage() { # NAME: of the run
    grep -qs "\"$1\"" "$out/stages.jsonl" && return
    local began=$EPOCHREALTIME pid status now host=0 gpu=0
    mtp run "$recipe" --run "$run" --only "$1" --json "$out/run.json" >>"$out/logs/$1.log" 2>&1 &
    pid=$!
    while kill -0 $pid 2>/dev/null; do
        now=$(awk '/^AnonPages/ { printf "%d", $2 / 1024 }' /proc/meminfo)
        host=$((now > host ? now : host))
        now=$(nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits 2>/dev/null || echo 0)
        gpu=$((now > gpu ? now : gpu))
        sleep 0.5
    done
    wait $pid
    status=$?
    echo "$1: status $status" >>"$out/done.txt"
    [ $status = 0 ] || return
    find "$run/$1" -type f -links 1 -printf '%s\n' | awk -v stage="$1" -v host=$host -v gpu="$gpu" \
        -v seconds="$(awk "BEGIN { print $EPOCHREALTIME - $began }")" '{ bytes += $1 } END {
        printf "{\"stage\": \"%s\", \"seconds\": %.1f, \"host_mib\": %d, \"gpu_mib\": %d, \"bytes\": %.0f}\n",
            stage, seconds, host, gpu, bytes }' >>"$out/stages.jsonl"
    { echo "[" && paste -sd, "$out/stages.jsonl" && echo "]"; } >"$scratch/stages.json"
    python3 benchmarks/record.py "$scratch/stages.json" "$out/stages.json" "benchmarks/flash_gpu.sh"
}

ran() {
    local each
    for each in fetch capture quantize score splice verify; do stage $each; done
}

serve() { # PORT CHECKPOINT OPTIONS...
    python3 -m mtp_graft.cli serve "$2" --profile none --port "$1" --max-model-len 1024 --max-num-seqs $many \
        --kv-cache-gib $cache --gpu-memory-utilization 0.4 "${@:3}" >"$out/logs/serve-$1.log" 2>&1 &
}

ready() { # PORT
    timeout 500 bash -c "until curl -sf $(url "$1")/health; do sleep 1; done" >/dev/null ||
        echo "no server at $1" >>"$out/done.txt"
}

base() { # as it is captured
    MTP_GRAFT_RECORD=$scratch/recording serve 8000 "$scratch/flash/base-$whole" --no-prefix-caching \
        --max-num-batched-tokens 2048 -- $lazy --no-enable-chunked-prefill
}

served() { # capture's second pass with and without recording; decode, drafts accepted at a rate of 0.7
    local drafts='{"method":"mtp","num_speculative_tokens":3,"draft_sample_method":"probabilistic",
        "rejection_sample_method":"synthetic","synthetic_acceptance_rates":[0.7,0.49,0.343]}'
    local against=(--against "$(url 8000)" --pairs 6)
    base
    if [ "$width" = tiny ]; then # one server at a time, and real drafts
        drafts='{"method":"mtp","num_speculative_tokens":1}' against=()
    else
        serve 8003 "$run/splice/gptq/flash" -- $lazy --speculative-config "$drafts"
        ready 8003
    fi
    ready 8000
    step recording python3 benchmarks/recording.py "$recipe" --run "$run" --url "$(url 8000)" \
        --folder "$scratch/recording" --out "$out/recording.json"
    if [ "$width" = tiny ]; then
        stop
        serve 8003 "$run/splice/gptq/flash" -- --speculative-config "$drafts"
        ready 8003
    fi
    step decode mtp bench decode --base-url "$(url 8003)" "${against[@]}" --prompts "$scratch/bench.jsonl" --rounds 1 \
        --temperature 1 --run "$out/decode" --json "$out/decode.json"
    stop
}

benched() { # the run's own last stages; of random drafts hardly one is accepted
    stage bench
    stage report
}

width() { # VARIANT...
    write flash_width "$scratch/steps" --width "$width" --layers "${layers[@]}" --variants "$@" >>"$out/logs/width.log" 2>&1
}

timed() { # OPTIONS...: all into one result
    python3 benchmarks/step_time.py --folder "$scratch/steps" --out "$out/step_time.json" --layers "${layers[@]}" \
        --batched-tokens 4096 "$@" >>"$out/logs/steps.log" 2>&1
}

based() { width && timed --variants base --context "${contexts[@]}"; }

dspark() { # an engine for each k, as a server has it
    width dspark && timed --variants dspark --k "${1:-5}" --fixed --context "${contexts[0]}" "${contexts[-1]}"
}

dspark3() { dspark 3; }

headed() { width mxfp4 && timed --variants mxfp4 --context "${contexts[@]}"; }

lm_head() { width mxfp4 && timed --variants mxfp4 --draft-lm-head fp8; }

int4() { width int4 && timed --variants int4; }

quantized() { # a drafter's 2,304 matrices
    [ -e "$scratch/quantize/upstream/config.json" ] || step input write synthetic_flash \
        "$scratch/quantize" --tokens $kept --dspark-layers 43 "${small[@]}"
    step quantize_dspark python3 benchmarks/quantize_full.py --input "$scratch/quantize" --rounds 2 \
        --out "$out/quantize_dspark.json"
}

removed() { rm -rf "$run" "$scratch"/{flash,steps,quantize,recording}; }

stop() { jobs -p | xargs -r kill; wait; }
trap stop EXIT
shift 2
for part in "${@:-made ran served benched removed quantized removed based dspark headed dspark3 lm_head int4}"; do
    for each in $part; do "$each"; done
done
