# Sourced by the scripts beside it.

# What is built or fetched for the tests lies outside the tree, named by its
# version, so that every checkout shares it. internal/testutil looks here too.
cache_bin=${XDG_CACHE_HOME:-$HOME/.cache}/autonomyops/bin

# say STEP TEXT: one line per step.
say() { printf '%-16s %s\n' "$1" "$2"; }

die() {
	printf '%s: %s\n' "$(basename "$0")" "$*" >&2
	exit 1
}

# as_root CMD…: as it is for root, through sudo otherwise.
as_root() {
	if [ "$(id -u)" = 0 ]; then
		"$@"
	elif command -v sudo >/dev/null && { [ -t 0 ] || sudo -n true 2>/dev/null; }; then
		sudo "$@"
	else
		die "this step needs root once: run as root: $*   then run it again"
	fi
}

# apt_install PACKAGE…
apt_install() {
	command -v apt-get >/dev/null || die "no apt-get here: install the equivalent of the Debian packages: $*"
	if ! as_root env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$@" >/dev/null 2>&1; then
		as_root apt-get update -qq # a fresh image has no package lists
		as_root env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$@" >/dev/null
	fi
}
