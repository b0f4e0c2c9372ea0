#!/usr/bin/env bash
# What is linked into the agent: is it what go.sum says, may it be given on, and has
# it known vulnerabilities. docs/linked-packages.txt, held by a test, lists it.
#
# The vulnerabilities are in a database on the network (GOVULNDB=URL for a mirror).
# Where that can not be reached, this says so and goes on; VULNCHECK=required, for
# releases, fails then.
set -euo pipefail
cd "$(dirname "$0")/.."
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

go mod verify
go -C hack/lint build -o "$tmp/" golang.org/x/vuln/cmd/govulncheck github.com/google/go-licenses/v2

licences=$(grep -v '^#' hack/licences.txt | paste -sd,)
for arch in amd64 arm64; do
  # It has a lot to say about assembly besides.
  if ! said=$(GOOS=linux GOARCH=$arch CGO_ENABLED=0 "$tmp/go-licenses" check --allowed_licenses="$licences" ./cmd/agent 2>&1); then
    printf '%s\n' "$said" | grep -vE '^W[0-9]{4} .* contains non-Go code|^/.*\.s$' >&2
    echo "linux/$arch: a licence is not in hack/licences.txt" >&2
    exit 1
  fi
  GOOS=linux GOARCH=$arch CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags=-s -o "$tmp/agent-$arch" ./cmd/agent
done
echo "licences: as hack/licences.txt allows"

# It is the binary that is looked at, for what the linker left out harms nobody.
# 3 is govulncheck's word for a finding, 1 for everything else that is wrong.
vulncheck() { "$tmp/govulncheck" -mode binary "$@" 2>&1; }
code=0
said=$(vulncheck -db "file://$PWD/hack/lint/planted" "$tmp/agent-amd64") || code=$?
if [ "$code" -ne 3 ]; then
  printf 'govulncheck does not find what hack/lint/planted tells of every agent:\n%s\n' "$said" >&2
  exit 1
fi
for arch in amd64 arm64; do
  code=0
  said=$(vulncheck ${GOVULNDB:+-db "$GOVULNDB"} "$tmp/agent-$arch") || code=$?
  if [ "$code" -eq 1 ] && [[ $said == *"fetching vulnerabilities"* ]]; then
    echo "NOT CHECKED: known vulnerabilities, for their database can not be reached from here: $said" >&2
    if [ "${VULNCHECK:-}" = required ]; then exit 1; fi
    exit 0
  elif [ "$code" -ne 0 ]; then
    printf 'linux/%s: %s\n' "$arch" "$said" >&2
    exit 1
  fi
done
echo "vulnerabilities: none known"
