#!/usr/bin/env bash
# Every GPU figure in under 15 minutes, on a borrowed machine with one card and no network.
#
#   benchmarks/gpu.sh pack FOLDER [ROWS [WHEELS]]  here: writes FOLDER/bundle-*, at most 60 MiB each, and says how large they are.
#                                                  They hold the code, the wheels that such a machine lacks, and the rows.
#   FOLDER/gpu.sh run FOLDER [SECONDS]             there: installs the wheels, measures until SECONDS (840) are over, and writes
#                                                  $OUT/train_speed_gpu.json after each measurement
#   benchmarks/gpu.sh dry [FOLDER]                 here: the same with the stand-in and a few rows, on the CPU; the figures mean nothing
#
# ROWS is a file of rows to measure on, or `rehearsal` (the packaged ones, the default). WHEELS is a folder of wheels to take in place of
# fetching them. The machine has torch and its libraries; what is measured comes along in the versions of this environment. PYTHON_THERE (3.12)
# and CUDA_THERE (130) name its Python and the CUDA of its torch. Bundles that do not fit into one transfer go into one folder there: `run` joins
# them. Whoever is lent the machine for less time says so in SECONDS, the time of the command less a margin.
set -euo pipefail
root=$(realpath "$(dirname "$0")/..") python=${PYTHON:-python3} work=$(mktemp -d) out=$(realpath -m "${OUT:-.}") rows=rehearsal started=$SECONDS
trap 'rm -rf "$work"' EXIT
fail() { echo "gpu.sh: $1" >&2; exit 2; }

pack() {   # folder, rows, wheels
  local rows=${2:-rehearsal} wheels=${3:-} named=() platform=() tag
  [ ! -e "$1" ] || fail "$1 is there already; name a new folder, or remove it: rm -r $1"
  [ "$rows" = rehearsal ] || [ -f "$rows" ] || fail "$rows is no file; name a file of rows, or rehearsal"
  mkdir -p "$1" "$work/pack/wheels"
  if [ -z "$wheels" ]; then
    wheels=$work/fetched
    for tag in 2_28 2_27 2_24 2_17 2014 1; do
      case $tag in *_*) platform+=(--platform "manylinux_${tag}_x86_64") ;; *) platform+=(--platform "manylinux${tag}_x86_64") ;; esac
    done
    for tag in transformers accelerate peft trl bitsandbytes datasets dill multiprocess gguf pooch httpx2 httpcore2 truststore; do
      named+=("$tag==$("$python" -c "from importlib.metadata import version; print(version('$tag'))")")
    done
    "$python" -m pip download -q --no-deps --only-binary=:all: --implementation cp --python-version "${PYTHON_THERE:-3.12}" \
      "${platform[@]}" -d "$wheels" "${named[@]}"
  fi
  for tag in "$wheels"/*.whl; do thin "$tag" "$work/pack/wheels/${tag##*/}"; done
  git -C "$root" ls-files -co --exclude-standard kofinetune 'benchmarks/*.py' 'benchmarks/*.sh' | tar cf - -C "$root" -T - | tar xf - -C "$work/pack"
  cp "$root/benchmarks/gpu.sh" "$1"
  if [ "$rows" != rehearsal ]; then cp "$rows" "$work/pack/rows.${rows##*.}"; fi
  tar czf - -C "$work/pack" . | split -b "${BUNDLE_BYTES:-60M}" -d -a 2 - "$1/bundle-"
  (cd "$1" && sha256sum bundle-* >sums.txt)
  (cd "$1" && du -b --apparent-size bundle-*)
}

thin() {   # a wheel, copied without the libraries for another CUDA, for ROCm and for XPU: of bitsandbytes, 60 MB of 65
  "$python" - "$1" "$2" "${CUDA_THERE:-130}" <<'PYTHON'
import re, sys, zipfile
source, target, cuda = sys.argv[1:]
with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, 'w', zipfile.ZIP_DEFLATED) as new:
    for item in old.infolist():
        other = re.search(r'_(cuda|rocm|xpu)(\d+)\.so$', item.filename)
        if not other or other[1] + other[2] == 'cuda' + cuda: new.writestr(item, old.read(item))
PYTHON
}

unpack() {   # folder
  [ -f "$1/sums.txt" ] || fail "$1 holds no bundles; make them with: benchmarks/gpu.sh pack $1"
  (cd "$1" && sha256sum --quiet -c sums.txt) || fail "a bundle in $1 is missing or not whole; copy all of them there again"
  cat "$1"/bundle-* | tar xzf - -C "$work"
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$work/site" "$work"/wheels/*.whl
  export PYTHONPATH=$work/site HF_HUB_OFFLINE=1
  root=$work
  if ls "$work"/rows.* >/dev/null 2>&1; then rows=$(echo "$work"/rows.*); fi
}

measure() {   # further options of train_speed.py
  mkdir -p "$out"
  PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} "$python" "$root/benchmarks/train_speed.py" --rows "$rows" --ablations --json "$out/train_speed_gpu.json" "$@" \
    >"$out/log.txt" 2>"$out/stderr.txt" || { tail -n 20 "$out/stderr.txt" >&2; local failed=1; }
  grep -v '^{' "$out/log.txt"   # all but the JSON
  return ${failed:-0}
}

case ${1:-} in
  pack) pack "${2:?gpu.sh pack needs a folder}" "${@:3}" ;;
  run)
    unpack "${2:?gpu.sh run needs the folder of the bundles}"
    "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || fail 'no GPU is seen here; to try the script on a CPU: benchmarks/gpu.sh dry'
    measure --pass-tokens 3856128 --profile-rows 256 --seconds $((${3:-840} - SECONDS + started)) ;;
  dry)
    if [ -n "${2:-}" ]; then unpack "$2"; fi
    measure --model rehearsal --together --rounds 1 --threads 1 --blog-rows 8 --best-rows 16 --profile-rows 4 --pass-tokens 2000 --seconds 600 ;;
  *) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 2 ;;
esac
