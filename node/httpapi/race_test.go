//go:build race

package httpapi_test

// The race detector takes memory and time of its own: what a test measures says
// nothing about the node then, and only what is right or wrong is judged.
const raceEnabled = true
