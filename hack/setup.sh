#!/usr/bin/env bash
# Installs the Debian packages that building and testing need and that are
# missing. Nothing is done, and nobody asked for a password, where all are here.
set -euo pipefail

missing=()
need() { command -v "$1" >/dev/null 2>&1 || PATH=/usr/sbin:/sbin command -v "$1" >/dev/null 2>&1 || missing+=("$2"); }
need gcc gcc
[ -e /usr/include/stdlib.h ] || missing+=(libc6-dev)
need promtool prometheus
need shellcheck shellcheck
need mandoc mandoc
need buildah buildah
need dbus-daemon dbus-daemon
need rpm rpm
need qemu-system-x86_64 qemu-system-x86
need qemu-img qemu-utils
need mmdebstrap mmdebstrap
need mkfs.ext4 e2fsprogs
need ssh openssh-client
need chronyd chrony
need ip iproute2
[ ${#missing[@]} -eq 0 ] && exit 0

sudo=()
if [ "$(id -u)" -ne 0 ]; then sudo=(sudo); fi
export DEBIAN_FRONTEND=noninteractive
# Their programs are wanted, not their daemons: a chronyd or a prometheus that
# was not here before stays masked.
for unit in chrony.service prometheus.service prometheus-node-exporter.service; do
  [ -e "/lib/systemd/system/$unit" ] || "${sudo[@]}" ln -sfn /dev/null "/etc/systemd/system/$unit"
done
echo "installing ${missing[*]}"
"${sudo[@]}" apt-get update -q
"${sudo[@]}" apt-get install -y -q --no-install-recommends "${missing[@]}"
