#!/usr/bin/env bash
# Look at an image before it is pushed: size, layers, user, entrypoint, labels, and that neither
# secrets nor weights are in it.
#
#   check.sh IMAGE [MOST_GB]        the engine's command may be named in $DOCKER
set -euo pipefail

image=${1:?usage: check.sh IMAGE [MOST_GB]}
docker=${DOCKER:-docker}
most_layers=20
cuda=$("$docker" run --rm --network none --entrypoint sh "$image" -c \
  'if ls -d /opt/venv/lib/python3*/site-packages/nvidia >/dev/null 2>&1; then echo yes; fi')
# torch with CUDA alone is more than half of what its image may have.
most_gb=${2:-$([ -n "$cuda" ] && echo 12 || echo 3)}
failed=0

say() { printf '%-5s %s\n' "$1" "$2"; }
complain() { say mend "$1"; failed=1; }
of() { "$docker" image inspect --format "$1" "$image"; }

bytes=$(of '{{.Size}}')
layers=$(of '{{len .RootFS.Layers}}')
gigabytes=$(awk "BEGIN { printf \"%.2f\", $bytes / 1e9 }")
if [ "$bytes" -gt $((most_gb * 1000000000)) ]; then
  complain "size: $gigabytes GB, at most $most_gb"
else
  say ok "size: $gigabytes GB of at most $most_gb"
fi
if [ "$layers" -gt "$most_layers" ]; then
  complain "layers: $layers, at most $most_layers"
else
  say ok "layers: $layers of at most $most_layers"
fi

user=$(of '{{.Config.User}}')
case $user in
  '' | root | 0 | 0:*) complain "user: runs as root unless told otherwise" ;;
  *) say ok "user: $user" ;;
esac
entrypoint=$(of '{{json .Config.Entrypoint}}')
if [ "$entrypoint" = '["/usr/bin/tini","-s","--","baton"]' ]; then
  say ok "entrypoint: $entrypoint"
else
  complain "entrypoint: $entrypoint; expected baton in exec form under tini"
fi
for label in version revision base.name licenses; do
  value=$(of "{{index .Config.Labels \"org.opencontainers.image.$label\"}}")
  case $value in
    '' | unknown) complain "label $label: ${value:-missing}; build with make image or image-cpu" ;;
    *) say ok "label $label: $value" ;;
  esac
done

# Values that look like tokens, in the settings, in the build's history and in the files; and
# files that hold weights, data or keys. tests/ of packages have toy weights of some kilobytes.
tokens='(hf_[A-Za-z0-9]{30,}|AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{36}|sk-[A-Za-z0-9_-]{40,}|//[^/@ ]+:[^/@ ]+@)'
told=$(of '{{json .Config}}' && "$docker" history --no-trunc --format '{{.CreatedBy}}' "$image")
if grep -qE "$tokens" <<<"$told"; then
  complain "secrets: settings or history hold something like a token (docker history --no-trunc)"
else
  say ok "secrets: none in settings and history"
fi
# The image's own interpreter looks; what it prints is what should not be there.
found=$("$docker" run --rm --interactive --network none --user 0 --entrypoint python \
  --env "TOKENS=$tokens" "$image" - <<'LOOK'
import os, re, pathlib

tokens = re.compile(os.environ["TOKENS"].split("|//")[0].strip("(").encode())
weights = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".ckpt", ".onnx", ".parquet", ".arrow"}
keys = {".netrc", ".env", "pip.conf", "credentials", "id_rsa", "id_ed25519", ".git-credentials"}
for top in ("/opt", "/root", "/home", "/cache", "/runs", "/tmp", "/etc", "/src", "/dist", "/wheels"):
    for folder, _, files in os.walk(top):
        for name in files:
            path = pathlib.Path(folder, name)
            if path.is_symlink() or not path.is_file():
                continue
            size = path.stat().st_size
            if path.suffix in weights and size > 1_000_000:
                print("weights or data:", path, size)
            elif name in keys and size:
                print("credentials:", path)
            elif top != "/opt" or not folder.startswith("/opt/venv"):
                if size < 10_000_000 and tokens.search(path.read_bytes()):
                    print("token:", path)
for left in ("/root/.cache/pip", "/cache", "/var/lib/apt/lists", "/tmp"):
    if any(path.is_file() for path in pathlib.Path(left).rglob("*")):
        print("left over:", left)
LOOK
) || complain "files: could not be looked at"
if [ -n "$found" ]; then
  complain "files: $found"
else
  say ok "files: no weights, data, credentials, tokens or caches"
fi
exit "$failed"
