package harness

import (
	"errors"
	"io"
	"net"
	"net/url"
	"sync"
	"testing"

	"golang.org/x/net/http2"
)

// StartResettingPeer serves HTTP/2 and resets every stream in the middle of its call: after the
// headers of the request, before any of the answer.
func StartResettingPeer(t testing.TB) *url.URL {
	t.Helper()
	listener, err := net.Listen("tcp", LoopbackIP(t)+":0")
	if err != nil {
		t.Fatal(err)
	}
	var (
		group sync.WaitGroup
		mutex sync.Mutex
		open  []net.Conn
	)
	group.Go(func() {
		for {
			connection, err := listener.Accept()
			if err != nil {
				return
			}
			mutex.Lock()
			open = append(open, connection)
			mutex.Unlock()
			group.Go(func() {
				if err := resetStreams(connection); err != nil && !errors.Is(err, net.ErrClosed) {
					t.Logf("the resetting peer: %v", err)
				}
			})
		}
	})
	t.Cleanup(func() {
		_ = listener.Close()
		mutex.Lock()
		for _, connection := range open {
			_ = connection.Close()
		}
		mutex.Unlock()
		group.Wait()
	})
	return &url.URL{Scheme: "tcp", Host: listener.Addr().String()}
}

func resetStreams(connection net.Conn) error {
	defer func() { _ = connection.Close() }()
	preface := make([]byte, len(http2.ClientPreface))
	if _, err := io.ReadFull(connection, preface); err != nil {
		return ignoreEOF(err)
	}
	framer := http2.NewFramer(connection, connection)
	if err := framer.WriteSettings(); err != nil {
		return err
	}
	for {
		frame, err := framer.ReadFrame()
		if err != nil {
			return ignoreEOF(err)
		}
		switch frame := frame.(type) {
		case *http2.SettingsFrame:
			if !frame.IsAck() {
				err = framer.WriteSettingsAck()
			}
		case *http2.PingFrame:
			if !frame.IsAck() {
				err = framer.WritePing(true, frame.Data)
			}
		case *http2.HeadersFrame:
			err = framer.WriteRSTStream(frame.StreamID, http2.ErrCodeInternal)
		}
		if err != nil {
			return err
		}
	}
}

func ignoreEOF(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return nil
	}
	return err
}
