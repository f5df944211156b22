package httpapi

import (
	"errors"
	"log/slog"
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// steady is a listener that goes on when the system is short of something: the
// server takes any error of Accept for the end, and a node that ends because for
// a moment there was no descriptor left would be worse than one that lets
// connections wait in the kernel's queue.
type steady struct {
	net.Listener
	log *slog.Logger
}

// acceptPause is the wait after an Accept that failed. The server's own
// connections free what is short; there is nobody to hurry for.
const acceptPause = 20 * time.Millisecond

func (l steady) Accept() (net.Conn, error) {
	for told := false; ; {
		c, err := l.Listener.Accept()
		if err == nil || !passes(err) {
			return c, err
		}
		if !told {
			l.log.Error("no connection can be accepted for now: they wait. Raise the limit of open files (LimitNOFILE=), or lower --max-connections", "err", err)
			told = true
		}
		time.Sleep(acceptPause)
	}
}

// passes reports whether an error of Accept goes away by itself.
func passes(err error) bool {
	for _, e := range []unix.Errno{unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM, unix.ECONNABORTED, unix.EPERM} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}
