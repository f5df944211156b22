// Package examples carries the example projects inside the operator's program,
// so that "autonomy demo" runs from an installed binary.
package examples

import "embed"

// FS holds quickstart/.
//
//go:embed all:quickstart
var FS embed.FS
