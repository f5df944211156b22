package serve

import (
	"net"
	"sync"
)

// LimitListener lets at most n connections be open at once. The next one is
// accepted when one of them is closed; until then it waits in the kernel.
func LimitListener(ln net.Listener, n int) net.Listener {
	return &limited{Listener: ln, room: make(chan struct{}, n), closed: make(chan struct{})}
}

type limited struct {
	net.Listener
	room   chan struct{}
	closed chan struct{}
	once   sync.Once
}

func (l *limited) Accept() (net.Conn, error) {
	select {
	case l.room <- struct{}{}:
	case <-l.closed:
		return nil, net.ErrClosed
	}
	c, err := l.Listener.Accept()
	if err != nil {
		<-l.room
		return nil, err
	}
	if tc, ok := c.(*net.TCPConn); ok {
		return &limitedTCP{TCPConn: tc, done: sync.OnceFunc(func() { <-l.room })}, nil
	}
	return &limitedConn{Conn: c, done: sync.OnceFunc(func() { <-l.room })}, nil
}

func (l *limited) Close() error {
	l.once.Do(func() { close(l.closed) })
	return l.Listener.Close()
}

// limitedTCP keeps TCPConn's ReadFrom, which is sendfile.
type limitedTCP struct {
	*net.TCPConn
	done func()
}

func (c *limitedTCP) Close() error {
	defer c.done()
	return c.TCPConn.Close()
}

type limitedConn struct {
	net.Conn
	done func()
}

func (c *limitedConn) Close() error {
	defer c.done()
	return c.Conn.Close()
}
