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

can_root() {
	[ "$(id -u)" = 0 ] || { command -v sudo >/dev/null && { [ -t 0 ] || sudo -n true 2>/dev/null; }; }
}

# as_root CMD…: as it is for root, through sudo otherwise.
as_root() {
	can_root || die "this step needs root, once; as root run '$*', then try again"
	if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

# apt_install PACKAGE…
apt_install() {
	command -v apt-get >/dev/null || die "no apt-get here: install the equivalent of the Debian packages: $*"
	can_root || die "this step needs root, once; as root run 'apt-get install $*', then try again"
	as_root apt-get update -qq # a fresh image has no package lists, and old lists name files that are gone
	as_root env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$@" >/dev/null
}
