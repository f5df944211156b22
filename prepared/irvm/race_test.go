//go:build race

package irvm

const raceEnabled = true
