package interop

import (
	"testing"

	"github.com/networkservicemesh/api/pkg/api/networkservice"
	"github.com/stretchr/testify/require"

	"proxy-nsmgr/tests/interop/harness"
)

// only is the one connection of an event.
func only(event *networkservice.ConnectionEvent) *networkservice.Connection {
	if len(event.GetConnections()) != 1 {
		return nil
	}
	for _, connection := range event.GetConnections() {
		return connection
	}
	return nil
}

func isOf(
	kind networkservice.ConnectionEventType, state networkservice.State, id string,
) func(*networkservice.ConnectionEvent) bool {
	return func(event *networkservice.ConnectionEvent) bool {
		connection := only(event)
		return event.GetType() == kind && connection != nil &&
			connection.GetState() == state && connection.GetId() == id &&
			event.GetConnections()[id] != nil
	}
}

// What our proxy at the client tells its previous hop, whoever the proxy at the endpoint is.
func TestMonitor(t *testing.T) {
	const (
		initial = networkservice.ConnectionEventType_INITIAL_STATE_TRANSFER
		update  = networkservice.ConnectionEventType_UPDATE
		deleted = networkservice.ConnectionEventType_DELETE
		up      = networkservice.State_UP
		down    = networkservice.State_DOWN
	)
	onEach(t, pairs[:2], func(t *testing.T, joint joint) {
		m := newMesh(t, joint.of)
		entry := m.serve(endpoint)

		forwarder := m.one.Nodes[0].Forwarders
		require.Len(t, forwarder, 1)
		var previous string
		for name := range forwarder {
			previous = name
		}
		early := harness.OpenMonitor(t, m.one.ProxyURL, &networkservice.PathSegment{Name: previous})
		require.Empty(t, early.WaitForInitial().GetConnections())

		client := plainClient(m.ctx, m.one.Nodes[0])
		request := m.request()
		connection, err := client.Request(m.ctx, request)
		require.NoError(t, err)
		segments := connection.GetPath().GetPathSegments()
		ours, before, after := segments[3], segments[2], segments[4]
		require.Equal(t, m.one.Agent.Name, ours.GetName())
		told := early.WaitFor("an UPDATE of the new connection", isOf(update, up, ours.GetId()))
		require.Equal(t, harness.Names(connection), harness.Names(only(told)))
		require.EqualValues(t, 3, only(told).GetPath().GetIndex())

		// Selectors match a run of segments; an empty name or id matches any.
		for _, run := range [][]*networkservice.PathSegment{
			{},
			{{Id: before.GetId()}},
			{{Name: before.GetName(), Id: before.GetId()}},
			{{Name: before.GetName(), Id: before.GetId()}, {Name: ours.GetName()}},
			{{Name: before.GetName()}, {}, {Name: after.GetName()}},
		} {
			late := harness.OpenMonitor(t, m.one.ProxyURL, run...)
			require.True(t, isOf(initial, up, ours.GetId())(late.WaitForInitial()), "selector %v", run)
		}
		for _, run := range [][]*networkservice.PathSegment{
			{{Id: "another"}},
			{{Name: before.GetName(), Id: "another"}},
			{{Name: before.GetName()}, {Name: after.GetName()}},
		} {
			late := harness.OpenMonitor(t, m.one.ProxyURL, run...)
			require.Empty(t, late.WaitForInitial().GetConnections(), "selector %v", run)
		}

		again := harness.Refresh(request, connection)
		again.Connection.Context = &networkservice.ConnectionContext{MTU: 1400}
		connection, err = client.Request(m.ctx, again)
		require.NoError(t, err)
		early.WaitFor("an UPDATE of the refresh", func(event *networkservice.ConnectionEvent) bool {
			return isOf(update, up, ours.GetId())(event) &&
				only(event).GetContext().GetMTU() == 1400
		})

		entry.Cancel()
		early.WaitFor("an UPDATE to DOWN", isOf(update, down, ours.GetId()))

		m.close(client, connection)
		early.WaitFor("the DELETE", func(event *networkservice.ConnectionEvent) bool {
			return event.GetType() == deleted && only(event).GetId() == ours.GetId()
		})
		waitUntilEmpty(t, m.one, m.two)
	})
}
