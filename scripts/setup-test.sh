#!/usr/bin/env bash
# Gets what the tests need beyond Go, one line per step. Idempotent, and silent
# on the network when everything is there.
#
#	setup-test.sh           a C compiler, file systems, an OCI registry, an OpenTelemetry Collector,
#	                        npm packages for the tests of the Model Context Protocol
#	setup-test.sh cosign    cosign, for the test that lets it verify our signatures
#	setup-test.sh vm        qemu and a Debian kernel, for make vm-test
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh

otelcol_version=v0.162.0
cosign_version=v3.1.3

command -v go >/dev/null || die "no go on the PATH: install Go $(awk '$1 == "go" { print $2 }' go.mod) or newer from https://go.dev/dl/"
mkdir -p "$cache_bin"
exec 9>"$cache_bin/.lock"
flock 9 # two checkouts may set up at once

# scratch makes the directory $scratch in the cache: on its file system, so
# that what was built there is moved into place in one step.
scratch() {
	scratch=$(mktemp -d "$cache_bin/.build-XXXXXX")
	trap 'rm -rf "$scratch"' EXIT
}

# The race detector is the only thing here that needs cgo.
compiler() {
	works() { printf '#include <stdlib.h>\nint main(void) { return 0; }\n' | gcc -x c -o /dev/null - 2>/dev/null; }
	if works; then
		say gcc "$(command -v gcc)"
		return
	fi
	say gcc "installing gcc and libc6-dev"
	apt_install gcc libc6-dev
	works || die "gcc is installed but compiles nothing: try: echo 'int main(void){}' | gcc -x c -"
}

# The power-cut rig makes small ext4, xfs and btrfs images and mounts them, which
# takes root; without root its tests say that they skip.
filesystems() {
	local tool package missing=()
	if [ "$(id -u)" != 0 ]; then
		say filesystems "not root: tests that mount images are skipped"
		return
	fi
	PATH=$PATH:/usr/sbin:/sbin
	for tool in mkfs.ext4:e2fsprogs mkfs.xfs:xfsprogs mkfs.btrfs:btrfs-progs mount:mount losetup:mount; do
		command -v "${tool%:*}" >/dev/null || missing+=("${tool#*:}")
	done
	if [ ${#missing[@]} -gt 0 ]; then
		say filesystems "installing ${missing[*]}"
		apt_install "${missing[@]}"
	fi
	say filesystems "ext4, xfs, btrfs"
}

# The package is unpacked, not installed: installing starts a registry as a
# service on every address of the machine, and unpacking needs no root.
registry() {
	local found
	if found=$(command -v docker-registry || ls "$cache_bin/docker-registry" 2>/dev/null); then
		say docker-registry "$found"
		return
	fi
	command -v apt-get >/dev/null || die "no docker-registry here and no apt-get to get it: put a docker-registry (distribution 2.8 or newer) on the PATH"
	say docker-registry "fetching the Debian package"
	scratch
	chmod 755 "$scratch"
	if ! (cd "$scratch" && apt-get download -qq docker-registry >/dev/null 2>&1); then
		as_root apt-get update -qq
		(cd "$scratch" && apt-get download -qq docker-registry >/dev/null)
	fi
	dpkg-deb -x "$scratch"/docker-registry_*.deb "$scratch/root"
	mv "$scratch/root/usr/bin/docker-registry" "$cache_bin/docker-registry"
	rm -rf "$scratch"
	say docker-registry "$cache_bin/docker-registry"
}

# A collector with just the parts that the path node -> collector -> control
# plane uses. Its builder file is kept beside it: another file, another build.
collector() {
	local bin=$cache_bin/otelcol-$otelcol_version config=internal/e2e/otelcol/builder.yaml
	if [ -x "$bin" ] && cmp -s "$config" "$bin.builder.yaml"; then
		say otelcol "$bin"
		return
	fi
	say otelcol "building $otelcol_version from Go modules (about 3 min, once)"
	scratch
	cp "$config" "$scratch/builder.yaml"
	if ! (cd "$scratch" && GOFLAGS=-buildvcs=false GOWORK=off CGO_ENABLED=0 \
		go run "go.opentelemetry.io/collector/cmd/builder@$otelcol_version" --config builder.yaml) >"$cache_bin/otelcol-build.log" 2>&1; then
		tail -n 20 "$cache_bin/otelcol-build.log" >&2
		die "the collector does not build; the whole output is in $cache_bin/otelcol-build.log"
	fi
	mv "$scratch/out/otelcol" "$bin"
	cp "$config" "$bin.builder.yaml"
	rm -rf "$scratch"
	say otelcol "$bin"
}

# What the tests of the Model Context Protocol run from npm, as its lock file
# pins it. Another lock file, another folder. No package runs a script.
npm_packages() {
	local from=internal/e2e/mcp sum dir
	sum=$(sha256sum "$from/package-lock.json")
	dir=$cache_bin/npm-${sum:0:16}
	if ! command -v node >/dev/null || ! command -v npm >/dev/null; then
		say npm "installing nodejs and npm"
		apt_install nodejs npm
	fi
	if [ -d "$dir/node_modules" ]; then
		say npm "$dir"
		return
	fi
	say npm "installing the packages of $from"
	scratch
	cp "$from/package.json" "$from/package-lock.json" "$scratch/"
	if ! (cd "$scratch" && npm ci --ignore-scripts --no-audit --no-fund) >"$cache_bin/npm-ci.log" 2>&1; then
		tail -n 20 "$cache_bin/npm-ci.log" >&2
		die "npm ci failed; the whole output is in $cache_bin/npm-ci.log"
	fi
	mv "$scratch" "$dir"
	say npm "$dir"
}

cosign() {
	local bin=$cache_bin/cosign-$cosign_version
	if [ -x "$bin" ]; then
		say cosign "$bin"
		return
	fi
	say cosign "building $cosign_version from Go modules (about 4 min, once)"
	scratch
	GOFLAGS=-buildvcs=false GOWORK=off CGO_ENABLED=0 GOBIN=$scratch \
		go install -trimpath -ldflags '-s -w' "github.com/sigstore/cosign/v3/cmd/cosign@$cosign_version"
	mv "$scratch/cosign" "$bin"
	rm -rf "$scratch"
	say cosign "$bin"
}

# The kernel's package is unpacked, not installed. The newest there is: that of
# the release's backports, else the release's own.
vm() {
	local dir=$cache_bin/vm-kernel tool package missing=()
	for tool in qemu-system-x86_64:qemu-system-x86 busybox:busybox-static xz:xz-utils zstd:zstd mkfs.ext4:e2fsprogs; do
		PATH=$PATH:/usr/sbin:/sbin command -v "${tool%:*}" >/dev/null || missing+=("${tool#*:}")
	done
	if [ ${#missing[@]} -gt 0 ]; then
		say vm "installing ${missing[*]}"
		apt_install "${missing[@]}"
	fi
	if ls "$dir"/boot/vmlinuz-* >/dev/null 2>&1; then
		say vm "$(echo "$dir"/boot/vmlinuz-*)"
		return
	fi
	say vm "fetching a Debian kernel"
	scratch
	chmod 755 "$scratch"
	mkdir -p "$scratch"/{lists/partial,archives/partial,root}
	local mirror codename options=(-o "Dir::State::lists=$scratch/lists" -o "Dir::Cache=$scratch" -o Dir::Etc::sourceparts=/dev/null -o "Dir::Etc::sourcelist=$scratch/sources")
	codename=$(. /etc/os-release && echo "$VERSION_CODENAME")
	mirror=$({ cat /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null || true; } | grep -oE 'https?://[^ ]+/debian/?( |$)' | head -1 | tr -d ' ') || true
	[ -n "$mirror" ] || die "no Debian mirror in the sources of apt: put a kernel and its modules into $dir (boot/vmlinuz-VERSION, lib/modules/VERSION)"
	for suite in "$codename-backports" "$codename"; do
		echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main" >"$scratch/sources"
		apt-get "${options[@]}" update -qq >/dev/null 2>&1 || continue
		package=$(apt-cache "${options[@]}" depends linux-image-cloud-amd64 2>/dev/null | sed -n 's/.*Depends: \(linux-image-[0-9].*\)/\1/p' | head -1)
		[ -n "$package" ] && (cd "$scratch" && apt-get "${options[@]}" download -qq "$package" >/dev/null 2>&1) && break
	done
	ls "$scratch"/linux-image-*.deb >/dev/null 2>&1 || die "no kernel package could be fetched from $mirror"
	dpkg-deb -x "$scratch"/linux-image-*.deb "$scratch/root"
	mv "$scratch/root" "$dir"
	rm -rf "$scratch"
	say vm "$(echo "$dir"/boot/vmlinuz-*)"
}

case ${1:-} in
"")
	compiler
	filesystems
	registry
	collector
	npm_packages
	;;
cosign) cosign ;;
vm) vm ;;
*) die "unknown argument $1: use none, cosign or vm" ;;
esac
