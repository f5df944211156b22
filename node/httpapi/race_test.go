//go:build race

package httpapi_test

// raceFactor: the race detector keeps several bytes for each that is used.
const raceFactor = 8
