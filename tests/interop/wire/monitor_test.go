package wire

import (
	"sync"
	"time"

	"github.com/networkservicemesh/api/pkg/api/networkservice"
	"github.com/stretchr/testify/require"

	"proxy-nsmgr/tests/interop/harness"
)

// speaker is an endpoint whose monitor stream says what the test does.
type speaker struct {
	events chan *networkservice.ConnectionEvent
	end    chan struct{}
	once   sync.Once
}

func newSpeaker() *speaker {
	return &speaker{events: make(chan *networkservice.ConnectionEvent), end: make(chan struct{})}
}

func (s *speaker) monitor(
	_ *networkservice.MonitorScopeSelector,
	stream networkservice.MonitorConnection_MonitorConnectionsServer,
) error {
	if err := stream.Send(&networkservice.ConnectionEvent{}); err != nil {
		return err
	}
	for {
		select {
		case event := <-s.events:
			if err := stream.Send(event); err != nil {
				return err
			}
		case <-s.end:
			return nil
		case <-stream.Context().Done():
			return stream.Context().Err()
		}
	}
}

// send sends an event of one connection, as the endpoint knows it: under the index of its own segment.
func (s *speaker) send(
	kind networkservice.ConnectionEventType, connection *networkservice.Connection,
	change func(*networkservice.Connection),
) {
	known := connection.Clone()
	segments := known.GetPath().GetPathSegments()
	known.Path.Index = uint32(len(segments) - 1)
	known.Id = segments[len(segments)-1].GetId()
	change(known)
	s.events <- &networkservice.ConnectionEvent{
		Type:        kind,
		Connections: map[string]*networkservice.Connection{known.GetId(): known},
	}
}

const (
	update  = networkservice.ConnectionEventType_UPDATE
	deleted = networkservice.ConnectionEventType_DELETE
)

// What becomes of a connection is passed up through both agents, to each watcher as it asked.
func monitorScene(w *world) {
	const events = "MonitorConnections"
	endpoint := newSpeaker()
	config := granting("nse")
	config.OnMonitor = endpoint.monitor
	w.Step("an endpoint of domain two")
	w.serve(config)
	w.found(serviceOfTwo)
	w.Step("a watcher from before")
	stop := w.monitor(w.one.client, nil)
	w.Await(clientOne, events, 1)

	w.Step("a Request")
	connection := w.granted(w.one.client, w.requestForTwo("id-1"))
	w.Await(clientOne, events, 1)
	w.awaitMonitors(1)

	w.Step("watchers from after: of the client's segment, and one that skips what it asked for itself")
	stopLate := w.monitor(w.one.client, nil, &networkservice.PathSegment{Name: "nsc"})
	stopSkip := w.monitor(w.one.client, []string{"nsm-skip-answered", "true"},
		&networkservice.PathSegment{Name: "nsc", Id: "id-1"})
	w.Await(clientOne, events, 2)

	w.Step("a refresh with another MTU")
	changed := refresh(connection)
	changed.Connection.Context.MTU = 1300
	connection = w.granted(w.one.client, changed)
	w.Await(clientOne, events, 2)

	w.Step("the endpoint changes the context and its metrics, those of a path among them")
	endpoint.send(update, connection, func(c *networkservice.Connection) {
		c.Context.ExtraContext = map[string]string{"of": "nse", "news": "1"}
		c.Path.PathSegments[c.Path.Index].Metrics = map[string]string{
			"sbfd_state_in": "up", "sbfd_state_out": "down", "sbfd_path_mtu": "1450",
			"sbfd_reason_out": "unanswered", "sbfd_reason": "probes stay unanswered", "rx_bytes": "42",
		}
	})
	w.Await(toTwoProxy, events, 1)
	w.Await(clientOne, events, 3)

	w.Step("the endpoint is DOWN")
	endpoint.send(update, connection, func(c *networkservice.Connection) {
		c.State = networkservice.State_DOWN
	})
	w.Await(toTwoProxy, events, 1)
	w.Await(clientOne, events, 3)

	w.Step("and UP")
	endpoint.send(update, connection, func(c *networkservice.Connection) {
		c.State = networkservice.State_UP
	})
	w.Await(toTwoProxy, events, 1)
	w.Await(clientOne, events, 3)

	w.Step("the endpoint ends the connection")
	endpoint.send(deleted, connection, func(*networkservice.Connection) {})
	w.Await(toTwoProxy, events, 1)
	w.Await(clientOne, events, 3)

	w.Step("the client closes it")
	w.close(w.one.client, connection)
	w.Await(clientOne, events, 2)
	stop()
	stopLate()
	stopSkip()
	w.AwaitQuiet()
}

// A watcher says which connections it wants to see, by a run of path segments.
func selectorsScene(w *world) {
	w.Step("a connection")
	w.serve(granting("nse"))
	w.found(serviceOfTwo)
	connection := w.granted(w.one.client, w.requestForTwo("id-1"))
	w.awaitMonitors(1)
	own := connection.GetPath().GetPathSegments()[1].GetId()
	var stops []func()
	for at, run := range [][]*networkservice.PathSegment{
		{},
		{{Name: "nsc"}},
		{{Id: "id-1"}},
		{{Name: "nsc", Id: "id-1"}, {Name: "agent-one", Id: own}},
		{{Name: "nsc"}, {}, {Name: "agent-two"}},
		{{Name: "nsc"}, {Name: "agent-two"}},
		{{Name: "nsc", Id: "another"}},
	} {
		w.Step("selector %d", at+1)
		stops = append(stops, w.monitor(w.one.client, nil, run...))
		w.Await(clientOne, "MonitorConnections", 1)
	}
	w.Step("the Close")
	w.close(w.one.client, connection)
	// Of seven watchers two see nothing of the connection.
	w.Await(clientOne, "MonitorConnections", 5)
	for _, stop := range stops {
		stop()
	}
	w.AwaitQuiet()
}

// The control plane on the way is lost: the connection is DOWN and says why, until the next Request.
func lostHopScene(w *world) {
	const events = "MonitorConnections"
	endpoint := newSpeaker()
	config := granting("nse")
	config.OnMonitor = endpoint.monitor
	// Which of them it is depends on what the kernel was about to send.
	for _, cause := range []string{"stream closed because of a broken pipe", "connection reset"} {
		w.Name(cause, "<the connection broke>")
	}
	w.Step("a connection and a watcher")
	w.serve(config)
	w.found(serviceOfTwo)
	stop := w.monitor(w.one.client, nil)
	w.Await(clientOne, events, 1)
	connection := w.granted(w.one.client, w.requestForTwo("id-1"))
	w.awaitMonitors(1)
	w.Await(clientOne, events, 2)

	w.Step("the streams to agent two break")
	w.two.proxy.Cut()
	w.Await(clientOne, events, 1)
	w.AwaitEnds(toTwoProxy, events, 1)

	w.Step("a refresh")
	connection = w.granted(w.one.client, refresh(connection))
	w.Await(clientOne, events, 1)
	w.Await(toTwoProxy, events, 1)

	w.Step("the endpoint ends its stream")
	close(endpoint.end)
	w.Await(toTwoProxy, events, 1)
	w.Await(clientOne, events, 1)

	w.Step("the Close")
	w.close(w.one.client, connection)
	w.Await(clientOne, events, 1)
	stop()
	w.AwaitQuiet()
}

// What nobody refreshes ends when its token does.
func expiryScene(w *world) {
	const events = "MonitorConnections"
	w.Step("a watcher, and a connection whose token ends soon")
	w.serve(granting("nse"))
	w.found(serviceOfTwo)
	stop := w.monitor(w.one.client, nil)
	w.Await(clientOne, events, 1)
	// Long enough that a busy machine makes a connection within it.
	ctx := w.asFor("nsc", shortLife)
	_, err := networkservice.NewNetworkServiceClient(w.one.client).
		Request(ctx, w.requestForTwo("id-1"))
	require.NoError(w.t, err)
	w.Await(clientOne, events, 2)
	w.awaitMonitors(1)
	w.Step("its end")
	w.Await(clientOne, events, 1)
	harness.WaitUntilEmpty(w.t, w.one.agent, w.two.agent)
	stop()
	w.AwaitQuiet()
}

const shortLife = 4 * time.Second
