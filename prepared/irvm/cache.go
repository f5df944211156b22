package irvm

// maxCached is how many entries a cache of a Machine has at most, and
// maxCachedBytes how long the text of one may be that the policy does not hold
// as a constant: an input can bring as many as it likes.
const (
	maxCached      = 64
	maxCachedBytes = 1 << 10
)

// A cache keeps what a Machine has prepared from texts that are known only at
// run time, patterns for instance, from one evaluation to the next. A full one
// is begun anew. The caller puts keys that outlive the evaluation.
type cache[K comparable, V any] struct{ known map[K]V }

func (c *cache[K, V]) get(k K) (V, bool) {
	v, ok := c.known[k]
	return v, ok
}

func (c *cache[K, V]) put(k K, v V) {
	if c.known == nil || len(c.known) >= maxCached {
		c.known = make(map[K]V, 8)
	}
	c.known[k] = v
}
