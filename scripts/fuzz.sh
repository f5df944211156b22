#!/usr/bin/env bash
# fuzz.sh [PACKAGES]: runs each fuzz target for FUZZTIME (10s). A target that
# finds something leaves the input under its package's testdata/fuzz: fix the
# fault and commit the input as a test.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- ./...

failed=()
count=0
while IFS=$'\t' read -r dir pkg; do
	grep -qs '^func Fuzz' "$dir"/*_test.go || continue # listing builds the test: do that where it pays
	for target in $(go test -list '^Fuzz' "$pkg" | grep '^Fuzz' || true); do
		printf '%s %s\n' "$pkg" "$target"
		count=$((count + 1))
		go test -run '^$' -fuzz "^$target\$" -fuzztime "${FUZZTIME:-10s}" "$pkg" || failed+=("$pkg.$target")
	done
done < <(go list -f '{{.Dir}}	{{.ImportPath}}' "$@")

echo "$count fuzz targets, ${#failed[@]} failed"
[ ${#failed[@]} -eq 0 ] || { printf '%s\n' "${failed[@]}"; exit 1; }
