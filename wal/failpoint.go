package wal

// failpoints is called between any two steps of appending, committing and moving
// on to another slot, with the name of the place. Tests set it before Open, to
// kill the process there.
var failpoints func(name string)

func failpoint(name string) {
	if failpoints != nil {
		failpoints(name)
	}
}
