package interop

import (
	"fmt"
	"testing"

	"github.com/networkservicemesh/sdk/pkg/networkservice/utils/count"
	"github.com/stretchr/testify/require"

	"proxy-nsmgr/tests/interop/harness"
)

// One of our agents crashes and comes back: the real client heals the connection through it, and
// what the agents hold afterwards is that one connection.
func TestRealClientHealsOverOurRestart(t *testing.T) {
	for _, test := range []struct {
		name  string
		which func(*mesh) *harness.Agent
	}{
		{"the client's proxy", func(m *mesh) *harness.Agent { return m.one.Agent }},
		{"the endpoint's proxy", func(m *mesh) *harness.Agent { return m.two.Agent }},
	} {
		t.Run(test.name, func(t *testing.T) {
			m := newMesh(t)
			counter := new(count.Server)
			m.serve(endpoint, counter)
			client := m.healingClient()
			connection, err := client.Request(m.ctx, m.request())
			require.NoError(t, err)
			before := counter.Requests()

			test.which(m).Restart(t)
			harness.Eventually(t, harness.EventDeadline, func() bool {
				return counter.Requests() > before && m.one.Agent.OpenConnections(t) == 1 &&
					m.two.Agent.OpenConnections(t) == 1
			}, func() string {
				return fmt.Sprintf("%d requests after %d", counter.Requests(), before)
			})
			connection, err = client.Request(m.ctx, harness.Refresh(m.request(), connection))
			require.NoError(t, err)
			require.Equal(t, endpoint, endpointOf(connection))
			m.end(client, connection)
		})
	}
}

// The endpoint dies and another takes its place: the real client is told through both proxies, and
// gets there.
func TestRealClientHealsToAnotherEndpoint(t *testing.T) {
	onEach(t, pairs, func(t *testing.T, joint joint) {
		m := newMesh(t, joint.of)
		first, second := new(count.Server), new(count.Server)
		entry := m.serve("first", first)
		client := m.healingClient()
		connection, err := client.Request(m.ctx, m.request())
		require.NoError(t, err)
		require.Equal(t, "first", endpointOf(connection))

		_, err = entry.NetworkServiceEndpointRegistryClient.Unregister(m.ctx, nse("first", service))
		require.NoError(t, err)
		m.serve("second", second)
		entry.Cancel()
		harness.Eventually(t, harness.EventDeadline, func() bool { return second.Requests() > 0 },
			func() string { return "the second endpoint was not asked" })
		m.end(client, connection)
	})
}
