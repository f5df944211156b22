package prepared

// MaxInputBytes is the size of the largest input that Eval takes. The node's
// body limit (256 KiB by default) is below it.
const MaxInputBytes = 1 << 20
