package harness

import (
	"context"
	"fmt"
	"net/url"
	"sync"
	"testing"
	"time"

	"github.com/networkservicemesh/api/pkg/api/networkservice"
	"google.golang.org/protobuf/encoding/prototext"
)

// EventDeadline bounds the wait for what has to come; on a free machine it comes within milliseconds,
// or with the end of a lifetime of some seconds.
const EventDeadline = 60 * time.Second

// Monitor is a stream of connection events, kept as they came.
type Monitor struct {
	t      testing.TB
	mutex  sync.Mutex
	events []*networkservice.ConnectionEvent
	ended  error
}

// OpenMonitor asks url for the events of connections that go through a run of segments; the stream
// ends with the test.
func OpenMonitor(t testing.TB, at *url.URL, segments ...*networkservice.PathSegment) *Monitor {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	client := networkservice.NewMonitorConnectionClient(Dial(t, at))
	stream, err := client.MonitorConnections(ctx,
		&networkservice.MonitorScopeSelector{PathSegments: segments})
	if err != nil {
		t.Fatalf("monitor at %v: %v", at, err)
	}
	m := &Monitor{t: t}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			event, err := stream.Recv()
			m.mutex.Lock()
			if err != nil {
				m.ended = err
				m.mutex.Unlock()
				return
			}
			m.events = append(m.events, event)
			m.mutex.Unlock()
		}
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	return m
}

// Events are what came so far.
func (m *Monitor) Events() []*networkservice.ConnectionEvent {
	m.mutex.Lock()
	defer m.mutex.Unlock()
	return m.events[:len(m.events):len(m.events)]
}

// WaitFor waits for an event that is as told, and returns it.
func (m *Monitor) WaitFor(
	what string, is func(*networkservice.ConnectionEvent) bool,
) *networkservice.ConnectionEvent {
	m.t.Helper()
	var found *networkservice.ConnectionEvent
	Eventually(m.t, EventDeadline, func() bool {
		for _, event := range m.Events() {
			if is(event) {
				found = event
				return true
			}
		}
		return false
	}, func() string {
		text := fmt.Sprintf("no event that is %s; the stream: %v", what, m.ended)
		for _, event := range m.Events() {
			text += "\n" + prototext.MarshalOptions{Multiline: true}.Format(event)
		}
		return text
	})
	return found
}

// WaitForInitial waits for the event with which every stream begins.
func (m *Monitor) WaitForInitial() *networkservice.ConnectionEvent {
	m.t.Helper()
	return m.WaitFor("INITIAL_STATE_TRANSFER", func(event *networkservice.ConnectionEvent) bool {
		return event.GetType() == networkservice.ConnectionEventType_INITIAL_STATE_TRANSFER
	})
}
