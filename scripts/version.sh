#!/usr/bin/env bash
# Prints the version to build in. It is always a semantic version, because a
# release's requires_runtime is compared with it: the tag when there is one,
# else the next version as a pre-release with the commit.
set -euo pipefail
cd "$(dirname "$0")/.."
next=0.1.0-dev
git describe --tags --match 'v[0-9]*' --dirty 2>/dev/null && exit
if commit=$(git rev-parse --short=10 HEAD 2>/dev/null); then
	git diff --quiet HEAD 2>/dev/null || commit+=.dirty
	echo "$next+g$commit"
else
	echo "$next"
fi
