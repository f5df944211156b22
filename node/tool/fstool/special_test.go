package fstool

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/autonomyops/autonomy/internal/constraint"
	"github.com/autonomyops/autonomy/internal/testutil"
	"github.com/autonomyops/autonomy/node/tool/executor"
)

// TestSpecialFiles: what is no regular file is neither read nor written nor
// waited for.
func TestSpecialFiles(t *testing.T) {
	root, _ := tree(t)
	read, write := open2(t, root, 0)
	ln, err := net.Listen("unix", filepath.Join(root, "socket"))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	names := []string{"socket", "fifo"}
	// 1:5 is /dev/zero, which never ends; 1:7 is /dev/full.
	for name, dev := range map[string]uint64{"zero": unix.Mkdev(1, 5), "full": unix.Mkdev(1, 7)} {
		err := unix.Mknod(filepath.Join(root, name), unix.S_IFCHR|0o666, int(dev))
		if errors.Is(err, unix.EPERM) {
			testutil.Missing(t, "the right to make device files", "run as root")
		}
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, name)
	}
	for _, name := range names {
		done := make(chan [2]executor.Result, 1)
		go func() {
			r, _ := do(t, read, constraint.Constraints{}, "path", name)
			w, _ := do(t, write, constraint.Constraints{}, "path", name, "content", "x")
			done <- [2]executor.Result{r, w}
		}()
		select {
		case rs := <-done:
			for _, r := range rs {
				if r.Outcome != executor.Denied || r.Code != CodePath || !strings.Contains(r.Message, "no regular file") {
					t.Errorf("%s: %+v", name, r)
				}
			}
		case <-time.After(20 * time.Second):
			t.Fatalf("%s: the tool waits", name)
		}
	}
}

// TestGrowingFile: a file that grows while it is read is read up to the limit.
func TestGrowingFile(t *testing.T) {
	root, _ := tree(t)
	read, _ := open2(t, root, 1000)
	f, err := os.Create(filepath.Join(root, "grows"))
	if err != nil {
		t.Fatal(err)
	}
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		defer f.Close()
		for {
			select {
			case <-stop:
				return
			default:
				if _, err := f.Write([]byte("0123456789")); err != nil {
					return
				}
			}
		}
	}()
	for {
		_, out := do(t, read, constraint.Constraints{}, "path", "grows")
		content, _ := out["content"].(string)
		if len(content) > 1000 {
			t.Errorf("%d bytes were read", len(content))
		}
		if out["truncated"] == true {
			break
		}
	}
	close(stop)
	<-stopped
	// A sparse file of a terabyte costs its limit, too.
	if err := os.Truncate(filepath.Join(root, "grows"), 1<<40); err != nil {
		t.Fatal(err)
	}
	if r, out := do(t, read, constraint.Constraints{}, "path", "grows"); r.Outcome != executor.OK || out["size"] != float64(1<<40) || out["truncated"] != true {
		t.Errorf("%+v", r)
	}
}
