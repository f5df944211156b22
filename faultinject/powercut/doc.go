// Package powercut cuts the power of a disk as often as a test wants.
//
// A Disk is a block device whose every write and flush is recorded: a FUSE file
// under a loop device, so that a real ext4, xfs or btrfs is mounted on it and a
// real program runs on that. Afterwards Recording.Image builds what the device
// may hold when the power fails at any instant of the record; Image.Attach makes
// a device of that again, to be mounted and checked.
//
// What may be on the device at an instant:
//
//   - A write is durable once a flush that was received after the write had been
//     answered has itself been answered. A write that was still in flight when
//     the flush came in is not covered by it, as on real devices.
//   - Of the other writes any subset may be there, in any order of arrival: none,
//     all, some of them, or parts of them. Parts are the Atom-sized (4096 bytes,
//     aligned) pieces of a write.
//   - Nothing else changes.
//
// Which instants and which subsets are tried follows from a seed alone, given a
// recording. The recording is of a live kernel and differs from run to run, so
// it can be written to a file and read back.
//
// A program on the device runs in a process of its own: if its memory is mapped
// to files of the device, a page fault stops it until the device answers, and in
// the Go process that serves the device that would be for ever. Clock is how it
// tells at which place of the record something happened.
//
// Everything here needs root, FUSE, loop devices and mkfs; Main gives a test
// binary a mount namespace of its own, so that nothing stays mounted when it
// dies, and Require says what is missing. Sizes and offsets are bytes. A Disk may
// be used from any goroutine; a Recording is read-only and may be shared.
// Only tests import this package.
package powercut
