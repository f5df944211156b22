package httpapi

import (
	"errors"
	"log/slog"
	"net"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// failing is a listener whose Accept fails as often as it is told.
type failing struct {
	net.Listener
	errs []error
}

func (f *failing) Accept() (net.Conn, error) {
	if len(f.errs) == 0 {
		a, b := net.Pipe()
		b.Close()
		return a, nil
	}
	err := f.errs[0]
	f.errs = f.errs[1:]
	return nil, err
}

func TestSteady(t *testing.T) {
	emfile := &net.OpError{Op: "accept", Err: os.NewSyscallError("accept4", unix.EMFILE)}
	l := steady{&failing{errs: []error{emfile, emfile, os.NewSyscallError("accept4", unix.ECONNABORTED)}}, slog.New(slog.DiscardHandler)}
	c, err := l.Accept()
	if err != nil {
		t.Fatalf("gave up: %v", err)
	}
	c.Close()
	l.Listener = &failing{errs: []error{net.ErrClosed}}
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("a closed listener: %v", err)
	}
}
