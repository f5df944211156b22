package confine

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// TestThreadOnly confines threads and sees that the rest of the process is as
// free as before.
func TestThreadOnly(t *testing.T) {
	file := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(file, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	abi, err := LandlockABI()
	if err != nil {
		t.Logf("no Landlock here: %v", err)
	}
	for range 20 {
		if err := TryLandlock(file); (err == nil) != (abi > 0) {
			t.Fatalf("ABI %d: %v", abi, err)
		}
		if err := TrySeccomp(); err != nil {
			t.Fatal(err)
		}
	}
	// Any thread that goroutines run on now must be free.
	done := make(chan error)
	for range 4 * runtime.NumCPU() {
		go func() {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			f, err := os.OpenFile(file, os.O_WRONLY, 0)
			if err == nil {
				err = f.Close()
			}
			if _, _, errno := unix.RawSyscall(unix.SYS_GETPPID, 0, 0, 0); errno != 0 {
				err = errors.Join(err, errno)
			}
			nnp, perr := unix.PrctlRetInt(unix.PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0)
			if perr == nil && nnp != 0 {
				err = errors.Join(err, errors.New("no_new_privs is set"))
			}
			done <- err
		}()
	}
	for range 4 * runtime.NumCPU() {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

// TestOnMainThread starts from the main thread, which must stay free.
func TestOnMainThread(t *testing.T) {
	for range 50 {
		err := OnThread(func() error {
			if unix.Gettid() == unix.Getpid() {
				return errors.New("this is the main thread")
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}

func TestNotAWritableFile(t *testing.T) {
	if _, err := LandlockABI(); err != nil {
		t.Logf("no Landlock here: %v", err)
		return
	}
	// A file that cannot be opened anyhow proves nothing, and must not pass.
	if err := TryLandlock(filepath.Join(t.TempDir(), "none")); err == nil {
		t.Error("a file that does not exist counts as refused")
	}
}
