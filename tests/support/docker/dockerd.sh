#!/usr/bin/env bash
# dockerd.sh start | stop | host: a Docker engine for the tests alone; it changes nothing in the machine's network.
# Needs root and the package docker.io; `host` says the DOCKER_HOST of it.
set -euo pipefail
run=${PRESENCE_TEST_DOCKER:-/var/tmp/presence-test-docker}
socket=$run/docker.sock

answers() { curl -sf -m 2 --unix-socket "$socket" http://docker/_ping >/dev/null 2>&1; }
# A process that was killed and that nobody has reaped does not count as alive.
alive() { [ -s "$1" ] && grep -qs '^State:.[^Z]' "/proc/$(cat "$1")/status"; }

case ${1:-} in
start)
  if answers; then exit 0; fi
  mkdir -p "$run"
  alive "$run/dockerd.pid" || rm -f "$run/dockerd.pid" "$socket"
  # Of a containerd that is gone dockerd would wait 15 s for an answer, and give up.
  alive "$run/exec/containerd/containerd.pid" || rm -f "$run"/exec/containerd/containerd.{pid,sock*}
  setsid nohup dockerd --host "unix://$socket" --data-root "$run/data" --exec-root "$run/exec" \
    --pidfile "$run/dockerd.pid" --storage-driver overlay2 --iptables=false --ip6tables=false --ip-masq=false \
    --ip-forward=false --ip 127.0.0.1 --log-level warn >"$run/dockerd.log" 2>&1 </dev/null &
  for _ in $(seq 300); do
    if answers; then exit 0; fi
    sleep 0.05
  done
  echo "dockerd did not start:" >&2
  tail -20 "$run/dockerd.log" >&2
  exit 1
  ;;
stop)
  if alive "$run/dockerd.pid"; then
    kill "$(cat "$run/dockerd.pid")"
    for _ in $(seq 300); do
      alive "$run/dockerd.pid" || exit 0
      sleep 0.05
    done
    echo "dockerd does not end" >&2
    exit 1
  fi
  ;;
host) echo "unix://$socket" ;;
*)
  echo "dockerd.sh start | stop | host" >&2
  exit 2
  ;;
esac
