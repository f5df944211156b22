package prestage

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/autonomyops/autonomy/relay/cache"
	"github.com/autonomyops/autonomy/relay/oci"
	"github.com/autonomyops/autonomy/relay/upstream"
)

// Bounds of one closure.
const (
	maxDepth     = 4     // an index may name indexes, a referrer may have referrers
	maxManifests = 4096  // in one closure
	maxNodes     = 32768 // in one closure
)

// ErrClosure: the content under an item cannot be a closure the relay holds.
var ErrClosure = errors.New("cannot resolve the closure")

// errGone ends staging of an item that a new list has taken away or asked for anew.
var errGone = errors.New("another list is in force")

// Run stages until ctx ends. It is the only goroutine that pulls.
func (s *Stager) Run(ctx context.Context) {
	for {
		left := s.pass(ctx)
		if ctx.Err() != nil {
			return
		}
		var pause <-chan time.Time
		var timer *time.Timer
		if left > 0 {
			timer = time.NewTimer(s.pause(left))
			pause = timer.C
		}
		select {
		case <-ctx.Done():
		case <-s.wake:
		case <-pause:
		}
		if timer != nil {
			timer.Stop()
		}
	}
}

// pause after a pass, by the fewest attempts that a pending item has behind it.
func (s *Stager) pause(attempts int) time.Duration {
	p := s.cfg.FirstPause
	for i := 1; i < attempts && p < s.cfg.MaxPause; i++ {
		p *= 2
	}
	return min(p, s.cfg.MaxPause)
}

// pass tries every pending item once, in order. It returns the fewest attempts
// of the items still pending, 0 if there is none.
func (s *Stager) pass(ctx context.Context) (left int) {
	tried := map[key]uint64{}
	for ctx.Err() == nil {
		it, epoch := s.next(tried)
		if it == nil {
			break
		}
		tried[key{it.Repository, it.Digest}] = epoch
		err := s.attempt(ctx, it, epoch)
		if errors.Is(err, upstream.ErrUnreachable) {
			break
		}
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, it := range s.items {
		if it.state == Pending && (left == 0 || max(1, it.attempts) < left) {
			left = max(1, it.attempts)
		}
	}
	return left
}

// next is the first pending item that this pass has not tried.
func (s *Stager) next(tried map[key]uint64) (*item, uint64) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	var best *item
	for k, it := range s.items {
		epoch, done := tried[k]
		if it.state != Pending || done && epoch == it.epoch {
			continue
		}
		if best == nil || order(it.Item, best.Item) < 0 {
			best = it
		}
	}
	if best == nil {
		return nil, 0
	}
	return best, best.epoch
}

// attempt stages one item and records the end of it.
func (s *Stager) attempt(ctx context.Context, it *item, epoch uint64) error {
	log := s.cfg.Log.With("repository", it.Repository, "digest", it.Digest)
	// Counted on disk before anything happens, so that a crash counts too.
	var n int
	err := s.update(it, epoch, func() {
		it.state = Staging
		it.attempts++
		n = it.attempts
	})
	s.attempts.Add(1)
	var closure []Node
	if err == nil {
		closure, err = s.stage(ctx, it, epoch)
	}
	if err == nil {
		err = s.finish(it, epoch, closure)
	}
	if err == nil {
		log.Info("staged", "attempt", n, "nodes", len(closure))
		return nil
	}
	if errors.Is(err, errGone) {
		return err
	}
	s.failures.Add(1)
	uerr := s.update(it, epoch, func() {
		it.state = Pending
		if ctx.Err() != nil { // stopped in order: not the upstream's failure
			it.attempts--
			return
		}
		it.err = clip(err.Error())
		if it.attempts >= s.cfg.MaxAttempts {
			it.state, it.resolved = Failed, nil
		}
		s.declare(it)
	})
	if ctx.Err() == nil {
		log.Warn("not staged", "attempt", n, "of", s.cfg.MaxAttempts, "error", err)
	}
	return errors.Join(err, uerr)
}

// update changes the item and writes it down. It fails with errGone if the item
// is not the one that was taken up.
func (s *Stager) update(it *item, epoch uint64, change func()) error {
	s.mu.Lock()
	if it.epoch != epoch {
		s.mu.Unlock()
		return errGone
	}
	change()
	r := it.record()
	s.mu.Unlock()
	return s.write(r)
}

// finish writes the closure down, then publishes it.
func (s *Stager) finish(it *item, epoch uint64, closure []Node) error {
	s.mu.RLock()
	gone := it.epoch != epoch
	r := it.record()
	s.mu.RUnlock()
	if gone {
		return errGone
	}
	r.State, r.Error, r.Resolved, r.Public = Staged, "", nil, closure
	if err := s.write(r); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if it.epoch != epoch {
		return errGone
	}
	if s.missing(closure) > 0 {
		return fmt.Errorf("%w: content left the store while the item was staged", ErrClosure)
	}
	s.publish(it, closure)
	it.state, it.err, it.resolved = Staged, "", nil
	s.declare(it)
	return nil
}

// stage pulls what is missing of an item and returns its closure, complete in
// the store.
func (s *Stager) stage(ctx context.Context, it *item, epoch uint64) ([]Node, error) {
	closure, err := s.resolve(ctx, it, epoch)
	if err != nil {
		return nil, err
	}
	if err := s.update(it, epoch, func() { it.resolved = closure; s.declare(it) }); err != nil {
		return nil, err
	}
	// All or nothing: if the rest does not fit, none of it is pulled.
	var bytes int64
	var lacking []Node
	for _, n := range closure {
		size, ok := s.cfg.Cache.Size(n.Digest)
		if ok && size != n.Size {
			return nil, fmt.Errorf("%w: %s has %d bytes, a manifest says %d", ErrClosure, n.Digest, size, n.Size)
		}
		if !ok {
			lacking = append(lacking, n)
			bytes += n.Size
		}
	}
	if len(lacking) > 0 {
		if err := s.cfg.Cache.Room(bytes, len(lacking)); err != nil {
			return nil, fmt.Errorf("%d blobs with %d bytes are missing: %w", len(lacking), bytes, err)
		}
	}
	for _, n := range lacking {
		if s.outdated(it, epoch) {
			return nil, errGone
		}
		if err := s.pull(ctx, it.Repository, n); err != nil {
			return nil, err
		}
	}
	return closure, nil
}

func (s *Stager) outdated(it *item, epoch uint64) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return it.epoch != epoch
}

// pull fetches one blob into the store.
func (s *Stager) pull(ctx context.Context, repo string, n Node) error {
	w, err := s.cfg.Cache.Begin(n.Digest, n.Size)
	if err != nil {
		return err
	}
	s.current.off.Store(0)
	s.current.digest.Store(n.Digest)
	defer s.current.digest.Store(oci.Digest(""))
	if err := s.cfg.Upstream.Blob(ctx, repo, n.Digest, &meter{Writer: w, s: s}); err != nil {
		return errors.Join(err, w.Abort())
	}
	if err := w.Commit(); err != nil {
		return fmt.Errorf("blob %s@%s: %w", repo, n.Digest, err)
	}
	return nil
}

// meter counts what goes into the store.
type meter struct {
	*cache.Writer
	s *Stager
}

func (m *meter) Write(p []byte) (int, error) {
	n, err := m.Writer.Write(p)
	m.s.stagedBytes.Add(uint64(n))
	m.s.current.off.Store(m.Offset())
	return n, err
}

func (m *meter) Restart() error {
	m.s.current.off.Store(0)
	return m.Writer.Restart()
}

// resolver walks one closure.
type resolver struct {
	s      *Stager
	it     *item
	epoch  uint64
	seen   map[oci.Digest]int // index into nodes
	nodes  []Node
	counts int // manifests
}

// resolve lists the closure of an item: every manifest before what it names, in
// the order the manifests give, then each manifest's referrers by digest.
func (s *Stager) resolve(ctx context.Context, it *item, epoch uint64) ([]Node, error) {
	r := &resolver{s: s, it: it, epoch: epoch, seen: map[oci.Digest]int{}}
	if err := r.manifest(ctx, oci.Descriptor{Digest: it.Digest, Size: -1}, "", 0); err != nil {
		return nil, err
	}
	return r.nodes, nil
}

func (r *resolver) add(n Node) error {
	if i, ok := r.seen[n.Digest]; ok {
		have := &r.nodes[i]
		if have.Size != n.Size || have.Manifest != n.Manifest {
			return fmt.Errorf("%w: %s is named as two different things", ErrClosure, n.Digest)
		}
		return nil
	}
	if len(r.nodes) == maxNodes {
		return fmt.Errorf("%w: more than %d parts", ErrClosure, maxNodes)
	}
	r.seen[n.Digest] = len(r.nodes)
	r.nodes = append(r.nodes, n)
	return nil
}

// manifest visits a manifest or an index. want is what named it: size -1 and no
// media type if that was a list; subject is set for a referrer. A referrer that
// refers to something else is left out: the fallback tag is anybody's to write.
func (r *resolver) manifest(ctx context.Context, want oci.Descriptor, subject oci.Digest, depth int) error {
	if i, ok := r.seen[want.Digest]; ok {
		if n := &r.nodes[i]; !n.Manifest || want.Size >= 0 && want.Size != n.Size {
			return fmt.Errorf("%w: %s is named as two different things", ErrClosure, want.Digest)
		} else if n.Subject == "" && subject != "" {
			n.Subject = subject // in an index and a referrer too
		}
		return nil
	}
	if depth > maxDepth {
		return fmt.Errorf("%w: nested deeper than %d", ErrClosure, maxDepth)
	}
	if r.counts++; r.counts > maxManifests {
		return fmt.Errorf("%w: more than %d manifests", ErrClosure, maxManifests)
	}
	if r.s.outdated(r.it, r.epoch) {
		return errGone
	}
	data, m, err := r.fetch(ctx, want)
	if err != nil {
		return err
	}
	switch {
	case want.Size >= 0 && int64(len(data)) != want.Size:
		return fmt.Errorf("%w: manifest %s has %d bytes, it is named with %d", ErrClosure, want.Digest, len(data), want.Size)
	case want.MediaType != "" && want.MediaType != m.MediaType:
		return fmt.Errorf("%w: %s is named as %s, and is %s", ErrClosure, want.Digest, want.MediaType, m.MediaType)
	}
	if subject != "" && (m.Subject == nil || m.Subject.Digest != subject) {
		r.s.cfg.Log.Warn("referrer left out: it does not refer to this", "repository", r.it.Repository, "referrer", want.Digest, "subject", subject)
		return nil
	}
	node := Node{Descriptor: oci.Descriptor{MediaType: m.MediaType, Digest: want.Digest, Size: int64(len(data)),
		ArtifactType: m.ArtifactType, Annotations: m.Annotations}, Manifest: true, Subject: subject}
	if err := r.add(node); err != nil {
		return err
	}
	for _, d := range m.Blobs {
		if err := r.add(Node{Descriptor: oci.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size}}); err != nil {
			return err
		}
	}
	for _, d := range m.Children {
		if err := r.manifest(ctx, d, "", depth+1); err != nil {
			return err
		}
	}
	refs, err := r.s.cfg.Upstream.Referrers(ctx, r.it.Repository, want.Digest)
	if err != nil {
		return err
	}
	slices.SortFunc(refs, func(a, b oci.Descriptor) int { return cmpDigest(a.Digest, b.Digest) })
	for _, d := range refs {
		if err := r.manifest(ctx, d, want.Digest, depth+1); err != nil {
			return err
		}
	}
	return nil
}

func cmpDigest(a, b oci.Digest) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}

// fetch returns a manifest from the store, or pulls it into the store. It is
// declared first, so that room for the next one is not made by evicting it.
func (r *resolver) fetch(ctx context.Context, want oci.Descriptor) ([]byte, *oci.Manifest, error) {
	c := r.s.cfg.Cache
	r.s.mu.Lock()
	if r.it.epoch != r.epoch {
		r.s.mu.Unlock()
		return nil, nil, errGone
	}
	if !r.it.held[want.Digest] {
		r.it.held[want.Digest] = true
		c.Declare(want.Digest)
	}
	r.s.mu.Unlock()
	data, err := c.Read(want.Digest, oci.MaxManifestBytes)
	switch {
	case err == nil:
		m, err := oci.ParseManifest(data, want.MediaType)
		if err != nil {
			return nil, nil, fmt.Errorf("%w: %s: %w", ErrClosure, want.Digest, err)
		}
		return data, m, nil
	case errors.Is(err, cache.ErrMismatch):
		if err := c.Remove(want.Digest); err != nil {
			return nil, nil, err
		}
	case !errors.Is(err, cache.ErrNotFound):
		return nil, nil, err
	}
	data, mediaType, err := r.s.cfg.Upstream.Manifest(ctx, r.it.Repository, want.Digest)
	if err != nil {
		return nil, nil, err
	}
	m, err := oci.ParseManifest(data, mediaType)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %s: %w", ErrClosure, want.Digest, err)
	}
	w, err := c.Begin(want.Digest, int64(len(data)))
	if err != nil {
		return nil, nil, err
	}
	if _, err := w.Write(data); err != nil {
		return nil, nil, errors.Join(err, w.Abort())
	}
	if err := w.Commit(); err != nil {
		return nil, nil, err
	}
	r.s.stagedBytes.Add(uint64(len(data)))
	return data, m, nil
}

func clip(s string) string {
	if len(s) > maxErrorBytes {
		return s[:maxErrorBytes]
	}
	return s
}
