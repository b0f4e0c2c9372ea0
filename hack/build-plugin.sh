#!/bin/sh
# Builds kubectl-hygiene for every platform of .krew.yaml, each with its completion
# script and the license in an archive of dist/. The same source makes the same
# archives.
set -eu
cd "$(dirname "$0")/.."
version=${VERSION:?}
epoch=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
mkdir -p dist
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
for os in linux darwin windows; do
    for arch in amd64 arm64; do
        rm -rf "${tmp:?}"/*
        bin=kubectl-hygiene
        if [ "$os" = windows ]; then bin=$bin.exe; fi
        CGO_ENABLED=0 GOOS=$os GOARCH=$arch go build -trimpath -buildvcs=false -ldflags "-s -w -X main.version=$version" -o "$tmp/$bin" ./cmd/kubectl-hygiene
        cp LICENSE cmd/kubectl-hygiene/kubectl_complete-hygiene "$tmp"
        tar -C "$tmp" --sort=name --owner=0 --group=0 --numeric-owner --mtime="@$epoch" -cf - "$bin" LICENSE kubectl_complete-hygiene | gzip -n9 >"dist/kubectl-hygiene_${os}_$arch.tar.gz"
    done
done
ls -l dist/kubectl-hygiene_*
