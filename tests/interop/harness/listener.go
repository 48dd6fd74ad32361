package harness

import (
	"net"
	"sync"
)

// Listener keeps what it accepted, to cut it off.
type Listener struct {
	net.Listener
	mutex    sync.Mutex
	accepted []net.Conn
}

// NewListener accepts by another listener.
func NewListener(by net.Listener) *Listener {
	return &Listener{Listener: by}
}

// Accept waits for the next connection.
func (l *Listener) Accept() (net.Conn, error) {
	connection, err := l.Listener.Accept()
	if err == nil {
		l.mutex.Lock()
		l.accepted = append(l.accepted, connection)
		l.mutex.Unlock()
	}
	return connection, err
}

// CutConnections closes all accepted connections, as a crash would; new ones are accepted.
func (l *Listener) CutConnections() {
	l.mutex.Lock()
	defer l.mutex.Unlock()
	for _, connection := range l.accepted {
		_ = connection.Close()
	}
	l.accepted = nil
}
