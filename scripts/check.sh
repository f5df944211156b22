#!/usr/bin/env bash
# Everything that can be said about the tree without running its tests. All
# steps run, also after one failed; the exit code says whether one did.
set -uo pipefail
cd "$(dirname "$0")/.."

failed=()
# step NAME CMD…: its output is shown only when it fails.
step() {
	local name=$1 begin=$SECONDS out
	shift
	if out=$("$@" 2>&1); then
		printf '%-14s ok    %3ds\n' "$name" $((SECONDS - begin))
	else
		printf '%-14s FAIL  %3ds\n%s\n' "$name" $((SECONDS - begin)) "$out"
		failed+=("$name")
	fi
}

tool() { go tool -modfile=tools.mod "$@"; }

sources() { git ls-files --cached --others --exclude-standard -- "$@" | while read -r f; do [ -f "$f" ] && echo "$f"; done; }

unformatted() {
	local list
	list=$(sources '*.go' ':!**/testdata/**' | xargs gofmt -l -s)
	[ -z "$list" ] || { echo "run gofmt -s -w on:"; echo "$list"; return 1; }
}

scripts() { sources '*.sh' .ci/run | xargs -n 1 bash -n; }

# Tests misspell on purpose.
spelling() { sources ':!**/*_test.go' ':!**/testdata/**' '*.go' '*.md' '*.sh' '*.yaml' '*.yml' '*.proto' '*.sql' | xargs go tool -modfile=tools.mod misspell -error; }

# The peers' module is not part of ./... but must build, too.
tidy() { go mod tidy -diff && go -C bench/peers mod tidy -diff; }

arm64() { GOOS=linux GOARCH=arm64 CGO_ENABLED=0 go build ./...; }

step gofmt unformatted
step shell scripts
step "go vet" go vet ./...
step staticcheck tool staticcheck ./...
step errorlint tool go-errorlint -asserts=false ./...
step sloglint tool sloglint ./...
step misspell spelling
# -count=1: one test asks `go list`, whose reads the test cache does not see.
step architecture go test -count=1 ./internal/archtest
step "go mod tidy" tidy
step "arm64 build" arm64

if [ ${#failed[@]} -gt 0 ]; then
	echo "failed: ${failed[*]}"
	exit 1
fi
