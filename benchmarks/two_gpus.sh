#!/usr/bin/env bash
# What two GPUs show, in about 20 minutes with warm kernel caches: the tiny model on two ranks
# against one, steps of all 43 layers of Flash's width, a server with a profile's flags.
#
#     benchmarks/two_gpus.sh OUT FLASH [texts|width|checked|serve|steps|more]
#
# FLASH is a folder with room for 30 GB, for `flash_width.py`. OUT gets result files and logs/; what
# they have is not measured again. A step that fails is in OUT/done.txt, and the next one begins.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
out=$(realpath -m "$1") flash=$2 head=$out/head tiny=models/tiny-dsv4
flags=(--tensor-parallel-size 2 --profile 128k --max-model-len 4096) # the tiny model's length
mkdir -p "$out/logs"
mtp() { python3 -m mtp_graft.cli "$@"; }

step() { # NAME COMMAND...
    local began=$SECONDS
    "${@:2}" >>"$out/logs/$1.log" 2>&1
    echo "$1: status $?, $((SECONDS - began)) s" >>"$out/done.txt"
}

check() { # NAME OPTIONS...: texts and acceptance of the tiny model
    step "$1" python3 benchmarks/gpu_serve_check.py --prompts 32 --max-tokens 128 "${@:2}"
}

texts() { # nine small engines side by side; two ranks read what one wrote
    local two=(--out "$out/two_ranks.json" --tensor-parallel-size 2) k
    for k in 1 2 3; do
        CUDA_VISIBLE_DEVICES=$((k % 2)) check "one-k$k" --out "$out/one_rank.json" --k "$k" &
        check "two-k$k" "${two[@]}" --k "$k" &
    done
    check one-k0 --out "$out/one_rank.json" --k 0
    check two-k0 "${two[@]}" --k 0 --reference "$out/one_rank.json"
    wait
    check compared "${two[@]}" --k 0 1 2 3 --reference "$out/one_rank.json"
}

checked() { # beside others
    step serve_check mtp serve "$head" "${flags[@]}" --check --json "$out/serve_check.json" \
        --gpu-memory-utilization 0.2 --kv-cache-gib 4 --port 8001
}

serve() { # alone, as a user of the profile starts it
    python3 -m mtp_graft.cli serve "$head" "${flags[@]}" >"$out/logs/server.log" 2>&1 &
    timeout 600 bash -c "until curl -sf http://127.0.0.1:8000/health; do sleep 1; done" >/dev/null
    step sweep mtp bench sweep --base-url http://127.0.0.1:8000 --concurrency 1,2,4,8 \
        --run "$out/sweep" --json "$out/sweep.json"
    kill $! && wait
}

timed() { # NAME OPTIONS...: all into one result
    step "$1" python3 benchmarks/step_time.py --folder "$flash" --out "$out/step_time.json" \
        --layers 43 --tensor-parallel-size 2 --kv-cache-gib 16 --requests 1 2 4 8 "${@:2}"
}

width() { step flash_width python3 benchmarks/flash_width.py "$flash" --layers 43; }

steps() { timed 128k --profile 128k --variants base int4; }

more() { # the most valuable first
    timed base --profile 128k --variants base --requests 1 8 --context 1000 16000 64000
    timed fixed --profile 128k --variants int4 --k 3 --fixed --requests 1 8
    timed 524k --profile 524k --variants base int4 --requests 1 3
    timed long --profile 128k --variants int4 --requests 1 8 --k 1 3 --context 1000 16000 64000
    timed mxfp4 --profile 128k --variants mxfp4 --requests 1 8
    timed fp8-lm-head --profile 128k --variants int4 --draft-lm-head fp8 --requests 1 8
    timed 256k --profile 256k --variants base int4 --requests 1 4
    timed acti --profile 128k --variants base int4 --requests 1 --k 1 3 --all-reduce acti
}

[ -d "$head" ] || mtp graft $tiny/base $tiny/upstream "$head" >"$out/logs/head.log" 2>&1
for part in ${3:-texts width checked serve steps more}; do "$part"; done
