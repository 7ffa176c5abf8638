#!/usr/bin/env bash
# Make an environment with vLLM for the CPU: vllm_install.sh FOLDER. TORCH_INDEX as in the Makefile.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
[ -e "$1/.installed" ] && exit 0
"${PYTHON:-python3}" -m venv "$1"
pip=("$1/bin/python" -m pip install -q --no-deps)
"${pip[@]}" ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "$(grep -o '^torch==[^ ]*' "$here/../../images/torch.lock")"
"${pip[@]}" -r "$here/vllm.txt"
touch "$1/.installed"
