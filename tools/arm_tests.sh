#!/usr/bin/env bash
# arm_tests.sh [LEVEL ...] runs the C backend's tests on Arm processors that qemu emulates, in an arm64 Python with
# NumPy, and lets the small model write there what it writes here. It keeps, all below build/arm,
#
#     root/     Debian's arm64 Python and what it depends on, unpacked; nothing is installed on this system
#     site/     NumPy and what else the tests import, for arm64
#     lib/      tinyllama, its extension compiled for arm64 by zig, or by the compiler that ARM_CC names
#     python    runs root's Python with both on the processor that ARM_CPU names
#     LEVEL/    what came of a level's tests
#
# PYTHON names a Python that has zig and this checkout's tinyllama.
set -euo pipefail
cd "$(dirname "$0")/.."

ARM=$PWD/build/arm
HERE=${PYTHON:-.venv/bin/python}

need() {
  command -v "$1" >/dev/null && return
  echo "make test-arm needs $1 (Debian, Ubuntu: apt-get install $2)" >&2
  exit 1
}

# apt, with a state of its own in which no package is installed, brings all that Python depends on, from where this
# system has its packages; Ubuntu keeps those for Arm elsewhere.
unpack_root() {
  [ -e "$ARM/root/.whole" ] && return
  echo "Fetching an arm64 Python into build/arm/root ..."
  rm -rf "$ARM/root" "$ARM/apt"
  mkdir -p "$ARM/root" "$ARM"/apt/{lists,archives}/partial
  touch "$ARM/apt/status"
  cp -r /etc/apt/sources.list* "$ARM/apt"
  find "$ARM/apt" -path '*sources*' -type f -exec \
    sed -Ei 's#//[a-z.]*(archive|security)\.ubuntu\.com/ubuntu#//ports.ubuntu.com/ubuntu-ports#' {} +
  cat >"$ARM/apt/apt.conf" <<-CONF
	Dir::State "$ARM/apt";
	Dir::State::status "$ARM/apt/status";
	Dir::Cache "$ARM/apt";
	Dir::Etc::sourcelist "$ARM/apt/sources.list";
	Dir::Etc::sourceparts "$ARM/apt/sources.list.d";
	APT::Architecture "arm64";
	APT::Architectures { "arm64"; };
	APT::Sandbox::User "";
	CONF
  APT_CONFIG=$ARM/apt/apt.conf apt-get -qq update || true # a third party's list may have no arm64
  APT_CONFIG=$ARM/apt/apt.conf apt-get -qq --yes --no-install-recommends --download-only \
    install python3 libstdc++6
  for package in "$ARM"/apt/archives/*.deb; do dpkg-deb --extract "$package" "$ARM/root"; done
  [ -e "$ARM/root/lib" ] || ln -s usr/lib "$ARM/root/lib" # a newer system's packages leave that to another one
  rm -r "$ARM/apt"
  touch "$ARM/root/.whole"
}

write_python() {
  local python
  python=$(readlink -f "$ARM/root/usr/bin/python3")
  cat >"$ARM/python" <<-SCRIPT
	#!/bin/sh
	export PYTHONSAFEPATH=1 PYTHONPATH="$ARM/lib:$ARM/site"
	exec qemu-aarch64 -cpu "\${ARM_CPU:-max}" -0 "\$0" -L "$ARM/root" "$python" "\$@"
	SCRIPT
  chmod +x "$ARM/python"
}

install_site() {
  [ "$ARM/site" -nt requirements/arm.txt ] && [ "$ARM/site" -nt requirements/demo.txt ] && return
  local version libc platforms=(--platform linux_aarch64)
  version=$("$ARM/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  for libc in 17 24 26 27 28 31 34; do platforms+=(--platform "manylinux_2_${libc}_aarch64"); done
  rm -rf "$ARM/site"
  "$HERE" -m pip --quiet install --target "$ARM/site" --require-hashes --only-binary :all: \
    --python-version "$version" "${platforms[@]}" --platform manylinux2014_aarch64 -r requirements/arm.txt
  touch "$ARM/site"
}

# What the small model writes with the python $1, from 16-bit weights and from 4-bit blocks that it makes itself.
# 32 tokens: later ones differ between levels, where two of a 4-bit model's are equally likely.
write_texts() {
  local python=$1 folder=$2
  rm -rf "$folder" && mkdir -p "$folder" &&
    "$python" -m tinyllama convert data/small 1 --outfile "$folder/f16.bin" >&2 &&
    "$python" -m tinyllama quantize "$folder/f16.bin" "$folder/q4_0.bin" q4_0 >&2 || return
  for type in f16 q4_0; do
    "$python" -m tinyllama generate --backend c -m "$folder/$type.bin" --temp 0 -n 32 -p 'Once upon a time' \
      >"$folder/$type.txt" || return
  done
} 2>"$2.log"

# A processor that has the level's instructions and no better ones. Apple's library is emulated too.
declare -A PROCESSORS=(
  [i8mm]=max,pauth-impdef=on [accelerate]=cortex-a76 [dotprod]=cortex-a76 [neon]=cortex-a53 [ref]=cortex-a53
)

test_level() {
  export TINYLLAMA_CPU=$1 ARM_CPU=${PROCESSORS[$1]}
  echo "== $1, on an emulated ${ARM_CPU%,*}"
  "$ARM/python" -c 'from tinyllama import _native; print("It has", *_native.levels())'
  # What isn't products of blocks is the same code on all of them: the first is tried in whole.
  local tests="tests/ext tests/backends"
  [ "$1" = neon ] || tests="tests/ext/test_matmul.py tests/ext/test_native_model.py"
  "$ARM/python" -m pytest -p no:cacheprovider $tests -k "not forked_meanwhile" # qemu can't, with threads running
  write_texts "$ARM/python" "$ARM/$1/texts" || { tail "$ARM/$1/texts.log" >&2; exit 1; }
  diff -r "$ARM/here" "$ARM/$1/texts"
  echo "The small model's files and texts are those of this computer."
}

need qemu-aarch64 qemu-user
need apt-get apt
need dpkg-deb dpkg
mkdir -p "$ARM"
unpack_root
write_python
export CFLAGS=-DTINYLLAMA_EMULATE_ACCELERATE
wheel=$("$HERE" tools/cross_wheel.py linux-arm64 "$ARM" ${ARM_CC:+"$ARM_CC"})
install_site
rm -rf "$ARM/lib"
"$HERE" -m zipfile --extract "$wheel" "$ARM/lib"

write_texts "$HERE" "$ARM/here" || { tail "$ARM/here.log" >&2; exit 1; }
levels=$("$ARM/python" -c 'from tinyllama import _native; print(*_native.levels()[:-1])') # but the reference
declare -A running
trap 'trap "" TERM; kill 0' INT # what runs in the background ignores Ctrl-C
for level in ${@:-$levels}; do # all at once: the emulator uses one core for each
  mkdir -p "$ARM/$level"
  test_level "$level" >"$ARM/$level/tests.log" 2>&1 &
  running[$level]=$!
done
failed=0
for level in ${@:-$levels}; do
  wait "${running[$level]}" || failed=1
  cat "$ARM/$level/tests.log"
done
exit "$failed"
