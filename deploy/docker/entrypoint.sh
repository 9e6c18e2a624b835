#!/bin/sh
# What is compiled at run time goes to a place that can be written: the root file system may be read-only. Then
# this becomes lt-sglang.
set -eu
cache="${LT_CACHE:-/scratch/.cache/lt}"
mkdir -p "$cache/flashinfer" "$cache/sglang" "$cache/triton" "$cache/inductor"
export FLASHINFER_WORKSPACE_BASE="$cache/flashinfer" SGLANG_JIT_CACHE_DIR="$cache/sglang"
export TRITON_CACHE_DIR="$cache/triton" TORCHINDUCTOR_CACHE_DIR="$cache/inductor"
case "${1:-}" in
    serve | plan | loadtest | bench | soak | doctor | models | calibrate | eval | train | --*) exec lt-sglang "$@" ;;
    *) exec "$@" ;;
esac
