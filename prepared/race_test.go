//go:build race

package prepared

const raceEnabled = true
