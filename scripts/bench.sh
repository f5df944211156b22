#!/usr/bin/env bash
# bench.sh quick|full: measures beside the peers and writes bench/results/. The
# peers are built once, from bench/peers/go.mod, into the cache outside the tree.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh

case ${1:-} in
quick)
	tool=(-reps 3 -duration 450ms -warmup 100ms)
	wal=(-quick -reps 5 -duration 200ms -warmup 60ms)
	policy=(-reps 3 -duration 250ms -warmup 150ms)
	;;
full)
	tool=(-reps 7 -duration 2s -warmup 300ms)
	wal=(-reps 5 -duration 1s -warmup 200ms)
	policy=(-reps 9 -duration 1s -warmup 300ms)
	;;
*) die "want quick or full" ;;
esac

opa_version=$(go -C bench/peers list -m -f '{{.Version}}' github.com/open-policy-agent/opa)
opa=$cache_bin/opa-$opa_version
if [ -x "$opa" ]; then
	say opa "$opa"
else
	say opa "building $opa_version from Go modules (about 1 min, once)"
	mkdir -p "$cache_bin"
	CGO_ENABLED=0 go -C bench/peers build -trimpath -ldflags '-s -w' -o "$opa.tmp" github.com/open-policy-agent/opa
	mv "$opa.tmp" "$opa"
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
bin/autonomy policy build examples/quickstart/policy --version 1.0.0 --out "$work/policy.tar.gz"
say peers "building the write-ahead logs and evaluators to compare with (about 1 min the first time)"
export CGO_ENABLED=0
go -C bench/peers build -o "$work/" ./walpeers ./policypeers
go build -o "$work/" ./bench/toolbench ./bench/walbench ./bench/policybench

# All or none: a page with one new part would compare two runs.
out=$work/results
"$work/toolbench" -opa "$opa" -bundle "$work/policy.tar.gz" -out "$out" "${tool[@]}"
"$work/walbench" -peers "$work/walpeers" -version "$(scripts/version.sh)" -out "$out" "${wal[@]}"
say conformance "running OPA's own cases on the compiled engine"
go test -count=1 -run '^TestConformance$' -v ./prepared/irvm >"$work/conformance" || true # its row says what failed
"$work/policybench" -conformance "$work/conformance" -peers "$work/policypeers" -version "$(scripts/version.sh)" -work "$work" -out "$out" "${policy[@]}"
mkdir -p bench/results
cp "$out/latest.json" "$out/latest.md" bench/results/
say results "bench/results/latest.md"
