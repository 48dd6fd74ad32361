package node

import (
	"testing"

	"github.com/stretchr/testify/require"

	"proxy-nsmgr/tests/interop/harness"
)

// A real client heals by itself when its endpoint is killed: its monitor stream says DOWN, it asks for
// another endpoint, and its packets arrive there.
func TestHealing(t *testing.T) {
	harness.NeedsRoot(t)
	for _, test := range []struct {
		name  string
		start func(t *testing.T) [2]*node
	}{
		{"with our NSMgr", func(t *testing.T) [2]*node {
			n := newNodes(t)[0]
			n.startOurs(t, "one.example")
			return [2]*node{n, n}
		}},
		{"with our forwarders of real NSMgrs", newRealNodes},
	} {
		t.Run(test.name, func(t *testing.T) {
			nodes := test.start(t)
			near := nodes[0].endpointOf(t, "nse-near", "172.16.1.0/24")
			asking := nodes[0].client(t)
			first := asking.connected()
			asking.pings("172.16.1.0")
			nodes[1].endpointOf(t, "nse-far", "172.16.2.0/24")
			near.end()
			var last []byte
			harness.Eventually(t, podDeadline, func() bool {
				output, err := asking.ping("172.16.2.0")
				last = output
				return err == nil
			}, func() string { return string(last) })
			healed := asking.connected()
			require.Equal(t, first.GetId(), healed.GetId())
			require.Equal(t, "nse-far", healed.GetNetworkServiceEndpointName())
			require.Empty(t, asking.tell("close").Error)
			harness.WaitUntilEmpty(t, nodes[0].agent, nodes[1].agent)
		})
	}
}
