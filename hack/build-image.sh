#!/bin/sh
# Builds the image of the Dockerfile with buildah, without a container engine and
# without a network: the Go toolchain and the module cache of this machine take the
# place of the golang image and of the proxy.
#
#   hack/build-image.sh OUT.tar [amd64|arm64]
#
# OUT.tar is what "docker save" writes; "ctr -n k8s.io images import OUT.tar" loads
# it as ghcr.io/hosthygiene/agent:VERSION. VERSION defaults to the one the
# manifests name, SOURCE_DATE_EPOCH to the time of the last commit. Both, with the
# source, decide every bit of the image, and of OUT.cdx.json beside it: its software
# bill of materials (CycloneDX), read from the program in the image.
set -eu

usage() {
    echo "usage: $0 OUT.tar [amd64|arm64]" >&2
    exit 2
}
if [ $# -lt 1 ] || [ $# -gt 2 ]; then usage; fi
case $1 in
/*) out=$1 ;;
*) out=$PWD/$1 ;;
esac
cd "$(dirname "$0")/.."
arch=${2:-$(go env GOHOSTARCH)}
case $arch in amd64 | arm64) ;; *) usage ;; esac
version=${VERSION:-$(sed -n 's/^ *newTag: *//p' manifests/kustomize/base/kustomization.yaml)}
epoch=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
image=ghcr.io/hosthygiene/agent:$version

go mod download

tmp=$(mktemp -d)
buildah() {
    command buildah --root "$tmp/root" --runroot "$tmp/run" --storage-driver vfs "$@"
}
# The storage holds directories without write permission.
trap 'chmod -R u+w "$tmp" && rm -rf "$tmp"' EXIT
trap 'exit 130' INT TERM

# A stand-in for golang:1.26: /bin/sh with its libraries; Go itself is mounted.
mkdir -p "$tmp/sh/bin" "$tmp/sh/tmp" "$tmp/sh/usr/local/go"
cp -L /bin/sh "$tmp/sh/bin/sh"
ldd /bin/sh | grep -o '/[^ ]*' | while read -r lib; do
    mkdir -p "$tmp/sh$(dirname "$lib")"
    cp -L "$lib" "$tmp/sh$lib"
done
toolchain=$(buildah from scratch)
buildah copy -q "$toolchain" "$tmp/sh" / >/dev/null
# It claims the target's platform, which is the one buildah looks for; nothing in it
# is emulated, as the compiler is a cross compiler.
buildah config --os linux --arch "$arch" --env PATH=/usr/local/go/bin:/bin --env GOPATH=/go --env GOCACHE=/go/cache --env GOTOOLCHAIN=local "$toolchain"
buildah commit -q "$toolchain" localhost/go-toolchain >/dev/null

mkdir -p "$(go env GOCACHE)"
buildah build --quiet --pull=never --isolation chroot --layers=false --identity-label=false \
    --build-context golang:1.26=container-image://localhost/go-toolchain \
    --volume "$(go env GOROOT):/usr/local/go:ro" \
    --volume "$(go env GOMODCACHE):/go/pkg/mod" \
    --volume "$(go env GOCACHE):/go/cache" \
    --build-arg GOPROXY=off --build-arg VERSION="$version" \
    --platform "linux/$arch" --timestamp "$epoch" --tag "$image" . >/dev/null

mkdir -p "$(dirname "$out")"
rm -f "$out"
buildah push -q "$image" "docker-archive:$out:$image"
container=$(buildah from --pull=never "$image")
go -C hack/sbom run . "$(buildah mount "$container")/agent" "$version" "$epoch" >"${out%.tar}.cdx.json"
echo "$image linux/$arch $(buildah inspect --type image --format '{{.FromImageDigest}}' "$image") in $out"
