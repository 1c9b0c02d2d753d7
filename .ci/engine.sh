#!/usr/bin/env bash
# What the container tests need, from Debian's packages alone: a Docker engine, a base image to build on, and two
# registries, of which one takes every push and the other denies every push. Prints the base image's name:
#
#     TUNESERVE_BASE_IMAGE=$(.ci/engine.sh) TUNESERVE_REQUIRE_ALL=1 python -m pytest tests/containers
#
# It starts only what does not answer yet, so it may run any number of times. It needs root where something is missing.
# `.ci/engine.sh engine`, `base` or `registries` do one part each; `end` ends what was started here.
set -euo pipefail

BASE=tuneserve-base:bookworm
REGISTRY=${TUNESERVE_REGISTRY:-127.0.0.1:5000}
DENYING_REGISTRY=${TUNESERVE_DENYING_REGISTRY:-127.0.0.1:5001}
STATE=${TMPDIR:-/tmp}/tuneserve-ci

say() { echo "engine.sh: $*" >&2; }

# fail LOG: the end of a log, then the end of the script.
fail() {
  say "${1##*/} says:"
  tail -n 30 "$1" >&2
  exit 1
}

# provide COMMAND PACKAGE...: install the packages where the command is missing.
provide() {
  local command=$1
  shift
  command -v "$command" >/dev/null && return
  say "installing $*"
  { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@"; } \
    >"$STATE/apt.log" 2>&1 || fail "$STATE/apt.log"
}

# wait_for SECONDS COMMAND...: whether the command succeeds in time.
wait_for() {
  local end=$((SECONDS + $1))
  shift
  until "$@"; do
    [ $SECONDS -lt $end ] || return 1
    sleep 0.5
  done
}

engine_answers() { timeout 10 docker version >/dev/null 2>&1; }
registry_answers() { (exec 3<>"/dev/tcp/${1%:*}/${1#*:}") 2>/dev/null; }

# runs NAME PIDFILE: whether the file's process lives and is what it should be, for numbers are used again.
runs() { [ "$(cat "/proc/$(cat "$2" 2>/dev/null || echo none)/comm" 2>/dev/null)" = "$1" ]; }
is_gone() { ! runs "$@"; }

# end_leftover NAME PIDFILE: a daemon that no longer does its work, and the file that would keep a new one from starting.
end_leftover() {
  if runs "$1" "$2"; then
    kill "$(cat "$2")"
    wait_for 10 is_gone "$1" "$2" || kill -KILL "$(cat "$2")"
    wait_for 5 is_gone "$1" "$2" || true
  fi
  rm -f "$2"
}

# start NAME LOG COMMAND...: a daemon that outlives this script, and is noted for `end`.
start() {
  local name=$1 log=$2
  shift 2
  setsid "$@" >"$log" 2>&1 </dev/null &
  echo "$name $!" >>"$STATE/started"
}

# The daemons that were started here, the last one first; files that only name processes which are gone do no harm.
end_all() {
  [ -f "$STATE/started" ] || return 0
  tac "$STATE/started" | while read -r name pid; do
    echo "$pid" >"$STATE/ending"
    end_leftover "$name" "$STATE/ending"
  done
  rm -f "$STATE/started"
}

start_engine() {
  provide dockerd docker.io iptables
  provide docker docker-cli
  engine_answers && return
  if [ -d /run/systemd/system ]; then
    systemctl restart docker
  else
    # One that is still starting only needs time; one that was killed leaves its containerd and its sockets behind.
    runs dockerd /var/run/docker.pid && wait_for 20 engine_answers && return
    end_leftover dockerd /var/run/docker.pid
    end_leftover containerd /var/run/docker/containerd/containerd.pid
    rm -rf /var/run/docker.sock /var/run/docker/containerd
    say "starting dockerd, its log is $STATE/dockerd.log"
    start dockerd "$STATE/dockerd.log" dockerd
  fi
  wait_for 60 engine_answers || fail "$STATE/dockerd.log"
}

# A bare Debian, as nvidia/cuda:*-base-* is a bare Ubuntu: no Python. It trusts the certificates that this machine
# trusts, and its pip finds the wheels that this machine's pip is told to find.
make_base() {
  docker image inspect "$BASE" >/dev/null 2>&1 && return
  provide debootstrap debootstrap
  say "making $BASE"
  local root
  root=$(mktemp -d)
  debootstrap --variant=minbase --include=ca-certificates bookworm "$root" >"$STATE/debootstrap.log" 2>&1 \
    || fail "$STATE/debootstrap.log"
  rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/*
  cp "${PIP_CERT:-/etc/ssl/certs/ca-certificates.crt}" "$root/etc/ssl/certs/ca-certificates.crt"
  printf '[global]\ncert = /etc/ssl/certs/ca-certificates.crt\n' >"$root/etc/pip.conf"
  if [ -d "${PIP_FIND_LINKS:-}" ]; then
    cp -r "$PIP_FIND_LINKS" "$root/opt/wheels"
    echo 'find-links = /opt/wheels' >>"$root/etc/pip.conf"
  fi
  tar -C "$root" -c . | docker import - "$BASE" >/dev/null
  rm -rf "$root"
}

# start_registry ADDRESS NAME: the rest of its configuration comes from standard input.
start_registry() {
  registry_answers "$1" && return
  provide docker-registry docker-registry
  { printf 'version: 0.1\nhttp: {addr: "%s"}\nstorage: {filesystem: {rootdirectory: "%s"}}\n' "$1" "$STATE/$2"; cat; } >"$STATE/$2.yml"
  say "starting a registry at $1"
  start docker-registry "$STATE/$2.log" docker-registry serve "$STATE/$2.yml"
  wait_for 20 registry_answers "$1" || fail "$STATE/$2.log"
}

start_registries() {
  start_registry "$REGISTRY" accepting </dev/null
  : >"$STATE/nobody" # a list of passwords without a line: no one may enter
  start_registry "$DENYING_REGISTRY" denying <<<"auth: {htpasswd: {realm: tests, path: \"$STATE/nobody\"}}"
}

mkdir -p "$STATE"
case ${1:-all} in
  engine) start_engine ;;
  base) make_base ;;
  registries) start_registries ;;
  end) end_all ;;
  all)
    start_engine
    make_base
    start_registries
    echo "$BASE"
    ;;
  *)
    say "unknown part: $1"
    exit 2
    ;;
esac
