#!/usr/bin/env bash
# curl is enough: the models, one completion, and what the workers hold.
set -euo pipefail
url=${VLLM_MERGE_URL:-http://127.0.0.1:8000}
curl -fsS "$url/v1/models"; echo
curl -fsS "$url/v1/completions" -H 'Content-Type: application/json' \
  -d '{"model": "assistant", "prompt": "next: abc ->", "max_tokens": 8, "temperature": 0}'; echo
curl -fsS "$url/v1/merge/artifacts"; echo
