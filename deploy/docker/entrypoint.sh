#!/bin/sh
# Kernels compiled with the image are copied to a place that can be written: FlashInfer locks its cache, and the
# root file system may be read-only. Then this becomes lt-sglang.
set -eu
cache="${LT_CACHE:-/scratch/.cache/lt}"
mkdir -p "$cache/flashinfer" "$cache/triton" "$cache/inductor"
if [ -d /opt/lt/kernels/.cache ] && [ ! -d "$cache/flashinfer/.cache" ]; then
    cp -a /opt/lt/kernels/.cache "$cache/flashinfer/"
fi
export FLASHINFER_WORKSPACE_BASE="$cache/flashinfer"
export TRITON_CACHE_DIR="$cache/triton" TORCHINDUCTOR_CACHE_DIR="$cache/inductor"
case "${1:-}" in
    serve | plan | doctor | models | --*) exec lt-sglang "$@" ;;
    *) exec "$@" ;;
esac
