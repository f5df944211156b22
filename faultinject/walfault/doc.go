// Package walfault breaks disks under the write-ahead log. It holds tests only,
// and uses the log as any other importer would.
//
// The campaign (TestCampaign): a process with several writers, a reader and moving
// cursors works on a recorded device (package powercut) and notes what it was
// told and when. Then the power is cut at many places of the record, the file
// system mounted, the log opened and compared with the notes. Nothing that was
// acknowledged may be missing, nothing may be there that was not appended, the
// sequence must be dense, no cursor may be ahead of its log, and no log may be
// refused. It runs with the log's ring, which a power cut takes with it, and in mapped
// files. Controls show that the campaign can fail: a workload that acknowledges
// before the sync, and a device that ignores flushes.
//
// The other tests hand the log one fault each: a device that refuses writes or
// flushes, a full disk, a file system that turns read-only or is shut down, the
// ceiling with many writers.
//
// Environment: FAULT_SEED chooses the seed (default: of the day, printed),
// FAULT_STATES the power cuts per file system and mode (default 20; `make fault-wal`
// takes 500), FAULT_KEEP a directory for recordings of rounds that failed, FAULT_REPLAY
// one such recording to be checked again with the FAULT_SEED it was made with.
package walfault
