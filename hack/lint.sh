#!/usr/bin/env bash
# The linters. Each is here for a reason: gofmt and vet are the language's own,
# staticcheck finds bugs neither does, shellcheck reads our few scripts.
set -euo pipefail
cd "$(dirname "$0")/.."
unformatted=$(gofmt -l cmd pkg test manifests hack)
if [ -n "$unformatted" ]; then
  echo "not gofmt'ed: $unformatted" >&2
  exit 1
fi
go vet ./...
go vet -tags cluster ./test/...
for module in monitoring plots render sbom; do go -C hack/$module vet .; done
# The kubectl plugin runs where people sit.
for os in darwin windows; do
  GOOS=$os go vet ./cmd/kubectl-hygiene
done
staticcheck=$(mktemp)
trap 'rm -f "$staticcheck"' EXIT
go -C hack/lint build -o "$staticcheck" honnef.co/go/tools/cmd/staticcheck
"$staticcheck" -tags cluster ./...
shellcheck hack/*.sh .ci/run
# go.mod says what is used, no more.
go mod tidy -diff
hack/supply-chain.sh
