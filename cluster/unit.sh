#!/usr/bin/env bash
# unit.sh NAME COMMAND...: run COMMAND as the systemd service NAME with this shell's environment.
#
# A GCP preemption starts with an OS shutdown, which sends SIGTERM to every process of a login session at
# once: the raylet would die before it can drain. With KillMode=mixed only COMMAND gets the signal, and
# `ray start --block` drains the node before it stops the rest.
set -euo pipefail
name=$1
shift
environment="$HOME/.ray/$name.env"
umask 077
mkdir -p "$HOME/.ray"
export -p > "$environment"
sudo systemctl stop "$name" 2> /dev/null || true # a second `ray up` replaces the first
sudo systemd-run --unit="$name" --collect --expand-environment=no \
  --uid="$(id -u)" --gid="$(id -g)" \
  --property=After=network-online.target \
  --property=KillMode=mixed \
  --property=TimeoutStopSec="$((RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S + 5))" \
  --property=LimitNOFILE=65536 \
  --property=LimitMEMLOCK=infinity \
  /bin/bash -c '. "$0" && exec "$@"' "$environment" "$@"
