//go:build !race

package prepared

const raceEnabled = false
