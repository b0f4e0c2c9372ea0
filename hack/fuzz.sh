#!/usr/bin/env bash
# Runs every fuzzer for FUZZTIME (default 1s). What a fuzzer finds is kept by
# the go command under testdata/fuzz and belongs into the commit that fixes it.
set -euo pipefail
cd "$(dirname "$0")/.."
time=${FUZZTIME:-1s}
failed=0
# The end of FUZZTIME itself is told as a failure now and then (go.dev/issue/75804,
# mended in Go 1.27). What was found would have been written to a file.
deadline() {
  [[ $1 == *$'\n    context deadline exceeded\n'* && $1 != *"Failing input written"* && $1 != *panic:* ]]
}
for pkg in $(go list ./pkg/... ./cmd/...); do
  fuzzers=$(go test -list '^Fuzz' "$pkg" | grep '^Fuzz' || true)
  [ -n "$fuzzers" ] || continue
  binary=$(mktemp)
  go test -c -fuzz=. -o "$binary" "$pkg"
  dir=$(go list -f '{{.Dir}}' "$pkg")
  for f in $fuzzers; do
    if ! out=$(cd "$dir" && "$binary" -test.run '^$' -test.fuzz "^$f\$" -test.fuzztime "$time" -test.parallel 2 \
      -test.fuzzcachedir "$(go env GOCACHE)/fuzz/$pkg" 2>&1) && ! deadline "$out"; then
      printf '%s\n' "$out"
      failed=1
      continue
    fi
    printf '%s %s: %s\n' "${pkg#github.com/hosthygiene/agent/}" "$f" "$(grep -o 'execs: [0-9]*' <<<"$out" | tail -n 1)"
  done
  rm -f "$binary"
done
exit "$failed"
