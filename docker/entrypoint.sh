#!/usr/bin/env bash
# Turns the container's variables into `mtp-graft serve`; an empty or unset one leaves the choice
# to the profile. Arguments go to mtp-graft as they are; after -- they go to `vllm serve`.
#
#   MODEL_PATH  PROFILE  HOST  PORT  MAX_MODEL_LEN  MAX_NUM_SEQS  GPU_MEMORY_UTILIZATION
#   TENSOR_PARALLEL_SIZE  MAX_NUM_BATCHED_TOKENS  NUM_SPECULATIVE_TOKENS  KV_CACHE_DTYPE
#   SERVED_MODEL_NAME (several: separated by spaces)  VLLM_API_KEY or API_KEY_FILE
set -euo pipefail

: "${MODEL_PATH:?set MODEL_PATH to the folder of a spliced checkpoint}"
if [[ ! -f "${MODEL_PATH}/config.json" ]]; then
    echo "entrypoint: ${MODEL_PATH}/config.json: not found or not readable for uid $(id -u);" \
        "mount a spliced checkpoint at ${MODEL_PATH}" >&2
    exit 1
fi
if [[ -n "${API_KEY_FILE:-}" ]]; then
    VLLM_API_KEY="$(< "${API_KEY_FILE}")"
    if [[ -z "${VLLM_API_KEY}" ]]; then
        echo "entrypoint: ${API_KEY_FILE}: empty; expected the key that requests must show" >&2
        exit 1
    fi
    export VLLM_API_KEY
fi

arguments=()
add() {
    if [[ -n "$2" ]]; then
        arguments+=("$1" "$2")
    fi
}
add --profile "${PROFILE:-}"
add --host "${HOST:-0.0.0.0}"
add --port "${PORT:-8000}"
add --max-model-len "${MAX_MODEL_LEN:-}"
add --max-num-seqs "${MAX_NUM_SEQS:-}"
add --gpu-memory-utilization "${GPU_MEMORY_UTILIZATION:-}"
add --tensor-parallel-size "${TENSOR_PARALLEL_SIZE:-}"
add --max-num-batched-tokens "${MAX_NUM_BATCHED_TOKENS:-}"
add --num-speculative-tokens "${NUM_SPECULATIVE_TOKENS:-}"
add --kv-cache-dtype "${KV_CACHE_DTYPE:-}"
read -r -a names <<< "${SERVED_MODEL_NAME:-}"
for name in "${names[@]}"; do
    add --served-model-name "${name}"
done

exec mtp-graft serve "${MODEL_PATH}" "${arguments[@]}" "$@"
