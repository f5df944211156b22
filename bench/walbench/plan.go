package main

import (
	"fmt"
	"time"

	"github.com/autonomyops/autonomy/bench/walbench/leg"
)

// A side is one of what is compared: a log, with the harness' batching before
// it or without.
type side struct {
	name  string // as the leg programs know it
	batch bool
}

func (s side) String() string {
	if s.batch {
		return s.name + ", batched"
	}
	return s.name
}

// Names of sides that the report looks for.
const (
	nameOurs      = "autonomy/wal"
	nameMapped    = "autonomy/wal in mapped files"
	nameFdatasync = "floor: one page, fdatasync"
	nameDirect    = "floor: one page, O_DIRECT|O_DSYNC"
	nameTidwall   = "tidwall/wal"
	namePebble    = "pebble record log"
	nameBbolt     = "bbolt"
	nameMarshal   = "proto.Marshal"
)

var sideOurs = side{name: nameOurs}

// own are the sides that this program measures itself, in a process per leg.
var own = map[string]leg.Open{nameOurs: openOurs, nameMapped: openMapped, nameFdatasync: openFloor, nameDirect: openDirect, nameMarshal: openMarshal}

// A block is one question, put to several sides.
type block struct {
	kind    kind
	size    int // of a record, bytes
	waiters int // durable
	records int // all others
	sides   []side
}

type kind string

const (
	kindDurable kind = "durable"
	kindNoWait  kind = "nowait"
	kindDrain   kind = "drain" // fill, then open and read
	kindFrame   kind = "frame" // the same with OTLP records, framed for export
	kindOpen    kind = "open"  // the same with a larger log: the opening counts
)

func (b block) String() string {
	switch b.kind {
	case kindDurable:
		return fmt.Sprintf("durable append, %d B, %s", b.size, plural(b.waiters, "waiter"))
	case kindNoWait:
		return fmt.Sprintf("append without waiting, %d B", b.size)
	case kindDrain:
		return fmt.Sprintf("drain, %d B", b.size)
	case kindFrame:
		return fmt.Sprintf("drain to OTLP requests, %d B", b.size)
	}
	return fmt.Sprintf("open %d MiB after a crash", b.bytes()>>20)
}

func (b block) bytes() int64 { return int64(b.size) * int64(b.records) }

func plural(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// scale is how long a durable leg runs, and how large a log's files are.
type scale struct {
	warmup, measure time.Duration
	segment         int64 // bytes
}

func sides(batch bool, names ...string) (out []side) {
	for _, n := range names {
		out = append(out, side{n, batch})
	}
	return out
}

func all(parts ...[]side) (out []side) {
	out = []side{sideOurs}
	for _, p := range parts {
		out = append(out, p...)
	}
	return out
}

var (
	// batchable are the peers that the harness can batch for.
	batchable = []string{nameTidwall, "hashicorp/raft-wal", "etcd wal", "prometheus wlog", "rosedb wal", namePebble, nameBbolt, "SQLite (modernc)"}
	everyone  = append([]string{"bbolt Batch", "OTel file_storage"}, batchable...)
	// buffered are those that can append without syncing.
	buffered = []string{namePebble, "prometheus wlog", nameTidwall, "etcd wal", "rosedb wal", nameBbolt}
)

// full asks everybody everything.
func full() (out []block) {
	for _, size := range []int{300, 1024} {
		out = append(out, block{kind: kindDurable, size: size, waiters: 1,
			sides: all(sides(false, nameMapped, nameFdatasync, nameDirect), sides(false, everyone...))})
		for _, w := range []int{64, 256, 1024} {
			out = append(out, block{kind: kindDurable, size: size, waiters: w,
				sides: all(sides(false, nameMapped), sides(true, nameFdatasync, nameDirect), sides(false, everyone...), sides(true, batchable...))})
		}
		out = append(out, block{kind: kindNoWait, size: size, records: 100_000, sides: all(sides(false, nameMapped), sides(false, buffered...))})
	}
	for _, size := range []int{300, 1024} {
		out = append(out, block{kind: kindDrain, size: size, records: 128 << 20 / size, sides: all(sides(false, batchable...))},
			block{kind: kindFrame, size: size, records: 64 << 20 / size, sides: all(sides(false, nameMarshal))})
	}
	return append(out,
		block{kind: kindOpen, size: 1024, records: 128 << 10, sides: all()},
		block{kind: kindOpen, size: 1024, records: 1 << 20, sides: all(sides(false, nameTidwall))})
}

// quick asks what the targets are about.
func quick() []block {
	return []block{
		{kind: kindDurable, size: 300, waiters: 1,
			sides: all(sides(false, nameMapped, nameFdatasync, nameDirect, namePebble))},
		{kind: kindDurable, size: 300, waiters: 64,
			sides: all(sides(true, nameFdatasync, nameDirect), sides(false, nameMapped, nameTidwall, nameBbolt, namePebble), sides(true, batchable...))},
		{kind: kindDurable, size: 300, waiters: 1024,
			sides: all(sides(true, nameFdatasync, nameDirect), sides(false, nameMapped, namePebble), sides(true, "prometheus wlog", namePebble))},
		{kind: kindNoWait, size: 300, records: 100_000, sides: all(sides(false, nameMapped, namePebble, "prometheus wlog"))},
		{kind: kindDrain, size: 1024, records: 64 << 10, sides: all(sides(false, namePebble, "prometheus wlog"))},
		{kind: kindFrame, size: 300, records: 32 << 10, sides: all(sides(false, nameMarshal))},
		{kind: kindOpen, size: 1024, records: 32 << 10, sides: all()},
		{kind: kindOpen, size: 1024, records: 128 << 10, sides: all()},
	}
}

// specs are the legs of one side in one repetition: they run one after the
// other in the same directory, and the last one's result counts.
func (b block) specs(s side, dir string, t scale) []leg.Spec {
	spec := leg.Spec{Side: s.name, Dir: dir, Size: b.size, Batch: s.batch, Records: b.records, Segment: t.segment, Frame: b.kind == kindFrame}
	switch b.kind {
	case kindDurable:
		spec.Mode, spec.Waiters, spec.Warmup, spec.Measure, spec.MaxBytes = leg.Durable, b.waiters, t.warmup, t.measure, maxBytes
		return []leg.Spec{spec}
	case kindNoWait:
		spec.Mode = leg.NoWait
		return []leg.Spec{spec}
	}
	fill := spec
	fill.Mode, spec.Mode = leg.Fill, leg.Read
	return []leg.Spec{fill, spec}
}

// maxBytes bounds what one durable leg appends in its warm-up, and again while
// it is measured. With what logs add and preallocate, no leg takes 3 GiB of
// disk.
const maxBytes = 1 << 30
