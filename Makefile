# Everything a contributor runs. `make` alone prints what there is.
#
# Nothing here needs more than Go, git, make and a Debian-like system; `make
# test` installs or builds the rest itself (scripts/setup-test.sh).

SHELL       := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

MODULE   := github.com/autonomyops/autonomy
PROGRAMS := autonomy autonomy-node autonomy-cp autonomy-relay
VERSION   = $(shell scripts/version.sh)
# grpcnotrace leaves out golang.org/x/net/trace, a debug page of gRPC that
# nothing here serves. Its templates call methods by name, for which the linker
# keeps every exported method of the program: a fifth of autonomy-node.
TAGS      = grpcnotrace
LDFLAGS   = -s -w -X $(MODULE)/internal/run.Version=$(VERSION)

# The version comes from scripts/version.sh, so Go need not ask git itself: it
# would refuse to in a checkout that another user owns.
export GOFLAGS := $(strip $(GOFLAGS) -buildvcs=false)

# ARGS reach the demo, PKG narrows test-unit and fuzz: make test-unit PKG=./wal/...
ARGS     ?=
PKG      ?= ./...
FUZZTIME ?= 10s

.PHONY: help
help: ## Print this help
	@echo "Targets:"
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "Variables:"
	@echo "  ARGS=...     arguments of the demo, for example: make demo ARGS=--keep"
	@echo "  PKG=./x/...  packages of test-unit and fuzz, default ./..."
	@echo "  FUZZTIME=10s time per fuzz target"

.PHONY: build
build: ## Build the four programs into bin/
	@mkdir -p bin
	CGO_ENABLED=0 go build -trimpath -tags '$(TAGS)' -ldflags '$(LDFLAGS)' -o bin/ $(PROGRAMS:%=./cmd/%)

.PHONY: demo
demo: build ## Build, then run the whole system on this machine (about 20 s)
	@bin/autonomy demo $(ARGS)

.PHONY: setup
setup: ## Install or build what the tests need; does nothing when all is there
	@scripts/setup-test.sh

.PHONY: test
test: setup test-unit test-e2e ## Set up, unit tests with the race detector, end-to-end tests

# The race detector needs cgo; the programs are built without it. Tests that start
# this program over and over run without it: a start costs a second with it, and
# what is looked for is not in their goroutines.
starters = TestEscapeLayers|TestScripts

.PHONY: test-unit
test-unit: ## Unit and CLI tests with the race detector
	@pkgs=$$(go list $(PKG) | grep -v '^$(MODULE)/internal/e2e'); \
	CGO_ENABLED=1 go test -race -timeout 10m -skip '^($(starters))$$' $$pkgs && \
	plain=$$(printf '%s\n' $$pkgs | grep -E '/(assurance/sandbox|cmd/autonomy)$$' || true); \
	if [ -n "$$plain" ]; then CGO_ENABLED=0 go test -timeout 10m -run '^($(starters))$$' $$plain; fi

.PHONY: test-e2e
test-e2e: ## The four programs as processes, with a real collector and registry
	@if ls internal/e2e/*_test.go >/dev/null 2>&1; then CGO_ENABLED=0 go test -count=1 -timeout 15m ./internal/e2e/...; \
	else echo "internal/e2e holds no tests" >&2; exit 1; fi

.PHONY: check
check: ## Format, vet, linters, architecture rules, go.mod, arm64
	@scripts/check.sh

.PHONY: fuzz
fuzz: ## Run every fuzz target for FUZZTIME
	@FUZZTIME=$(FUZZTIME) scripts/fuzz.sh $(PKG)

.PHONY: vm-test
vm-test: ## Limits and the whole sandbox in a qemu machine of its own (about 1 min)
	@scripts/vm-test.sh

.PHONY: fault-wal
fault-wal: ## Cut the power under the log 500 times on ext4, xfs and btrfs, with and without its ring (root; FAULT_STATES, FAULT_SEED)
	@FAULT_STATES=$${FAULT_STATES:-500} CGO_ENABLED=0 go test -count=1 -v -timeout 30m ./faultinject/walfault

.PHONY: soak-node
soak-node: ## Three times the load a node can take, for ten minutes (SOAK=10m)
	@CGO_ENABLED=0 go test -count=1 -v -timeout 60m -run TestOverloadGoodput ./node/httpapi -soak $${SOAK:-10m}

.PHONY: bench
bench: build ## Measure beside peers (about 30 min); writes bench/results/
	@scripts/bench.sh full

.PHONY: bench-quick
bench-quick: build ## The same with short runs (under 4 min)
	@scripts/bench.sh quick

.PHONY: cosign
cosign: ## Build cosign into the cache (4 min, once), for the test that uses it
	@scripts/setup-test.sh cosign

.PHONY: clean
clean: ## Remove what was built in the tree; the cache outside it stays
	rm -rf bin dist
