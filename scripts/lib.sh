# Sourced by the scripts beside it: where the cache lies, how they speak, and long steps with their progress.
# Progress goes to stderr; stdout carries results only.
# shellcheck shell=bash

# shellcheck disable=SC2034 # for those who source this
cache=${A3S_BOX_CACHE:-${HOME:?}/.cache/a3s-box}
# shellcheck disable=SC2034
mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian} keyring=/usr/share/keyrings/debian-archive-keyring.gpg

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

die() {
  say "$*"
  exit 1
}

# find_qemu: into the array `qemu` how it is called: this system's, or what scripts/setup has put into the cache.
qemu_root=$cache/qemu
find_qemu() {
  qemu=(qemu-system-x86_64)
  [ ! -d "$qemu_root" ] || qemu=("$qemu_root/lib64/ld-linux-x86-64.so.2" --library-path "$qemu_root/usr/lib/x86_64-linux-gnu"
    "$qemu_root/usr/bin/qemu-system-x86_64" -L "$qemu_root/usr/share/qemu" -L "$qemu_root/usr/share/seabios")
}

# The header comment of the running script.
usage() { sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0"; }

# contained COMMAND...: what it mounts goes with it.
contained() { unshare --mount "$@"; }

# step LOG TEXT COMMAND...: run COMMAND with its output in LOG; say how long it took and, every 20 s, that it goes on.
step() {
  local log=$1 text=$2 begin=$SECONDS
  shift 2
  say "$text ..."
  set -m # a process group of its own, so that all of it can be stopped
  ("$@") >>"$log" 2>&1 </dev/null &
  set +m
  step_job=$!
  until waited "$step_job"; do say "$text: $((SECONDS - begin)) s so far"; done
  if ! wait "$step_job"; then
    step_job=
    tail -n 15 "$log" >&2
    die "$text: failed; the whole log: $log"
  fi
  step_job=
  say "$text: done in $((SECONDS - begin)) s"
}

# Wait up to 20 s for a process to end; by `wait`, which a signal interrupts.
waited() {
  timeout 20 tail -s 0.1 --pid="$1" -f /dev/null &>/dev/null &
  wait "$!"
}

# attend COMMAND...: run it. Unlike a plain call it lets a signal through at once, and ends with this script.
attend() {
  local status=0
  "$@" </dev/null &
  attended=$!
  wait "$attended" || status=$?
  attended=
  return "$status"
}

# End a step: politely, so that scripts among its processes clean up, then for good.
end_step() {
  local deadline=$((SECONDS + 10))
  kill -TERM -- "-$step_job"
  while pgrep -g "$step_job" -r R,S,D,T >/dev/null && [ "$SECONDS" -lt "$deadline" ]; do sleep 0.1; done
  kill -KILL -- "-$step_job"
  wait "$step_job"
} 2>/dev/null

# What is running ends with the script, whichever way that ends; then comes the script's own at_exit, if it has one.
step_job='' attended=''
finish() {
  if [ -n "$step_job" ]; then end_step; fi
  if [ -n "$attended" ] && kill "$attended" 2>/dev/null; then wait "$attended"; fi
}
trap 'finish || true; if declare -F at_exit >/dev/null; then at_exit; fi' EXIT
