// Command walpeers is the peers' side of walbench: it measures one leg (package
// leg) with a write-ahead log of somebody else's and prints what it found. It
// is a program of its own so that what the peers need stays out of the
// project's go.mod, and so that nothing of ours runs in their process.
//
// Each peer is set up as its documentation says for the fastest append that is
// as durable as ours: preallocation and recycling where it has them, no copies
// where it can do without, segments as large as ours. What a peer has not, it
// is not given, except batching: Append is the log as shipped, AppendBatch what
// the harness batches for it.
package main

import (
	"os"

	"github.com/autonomyops/autonomy/bench/peers/leg"
)

var sides = map[string]leg.Open{
	"tidwall/wal":        openTidwall,
	"hashicorp/raft-wal": openRaftWAL,
	"etcd wal":           openEtcd,
	"prometheus wlog":    openProm,
	"rosedb wal":         openRose,
	"pebble record log":  openPebble,
	"bbolt":              openBolt,
	"bbolt Batch":        openBoltBatch,
	"SQLite (modernc)":   openSQLite,
	"OTel file_storage":  openFileStorage,
}

func main() { os.Exit(leg.Main(os.Args[1:], sides)) }
