package node

import (
	"strconv"
	"testing"

	"github.com/networkservicemesh/api/pkg/api/networkservice"
	"github.com/networkservicemesh/api/pkg/api/networkservice/mechanisms/cls"
	"github.com/networkservicemesh/api/pkg/api/networkservice/mechanisms/vxlan"
	"github.com/stretchr/testify/require"

	"proxy-nsmgr/tests/interop/harness"
)

// NSM splits the VNIs between two nodes that may both be servers: even where the client's address is
// not above the server's, else odd. Across domains its proxies lose the rule, for each side sees
// other addresses; ours hold it by the addresses that both see, the public ones.
func TestVNIParityAcrossDomains(t *testing.T) {
	harness.NeedsRoot(t)
	const (
		internal = "127.255.1.5"
		// The agent's own address lies between the first two.
		low, high, higher = "127.0.1.1", "127.252.0.1", "127.253.0.1"
	)
	for _, test := range []struct {
		name           string
		client, server string
		odd            uint64
	}{
		{"the client is below", low, "", 0},
		{"the client is above", high, "", 1},
		{"the client is above the server's internal address and below its public one", high, higher, 0},
		{"the same public address", high, high, 0},
		{"the client is above the server's public address", higher, high, 1},
	} {
		t.Run(test.name, func(t *testing.T) {
			ctx := t.Context()
			pair := harness.NewAgentPair(t, func(one, two *harness.AgentConfig) {
				one.MapIP = map[string]string{internal: test.client}
				two.IP = harness.LoopbackIP(t)
				if test.server != "" {
					two.MapIP = map[string]string{two.IP: test.server}
				}
				two.Extra = map[string]any{"forwarder": true}
			})
			serving := startPod(t, podConfig{
				Role: endpointRole, Name: "nse", NSMgr: pair.Two.NSMgrURL().String(),
				Service: service, Dir: openDir(t), Prefix: prefix,
			}, placement{})
			require.Empty(t, serving.next().Error)

			request := harness.RequestFor("id", service+"@"+harness.DomainTwo)
			request.Connection.NetworkServiceEndpointName =
				pair.Discover(ctx, t, service+"@"+harness.DomainTwo)
			request.MechanismPreferences = []*networkservice.Mechanism{{
				Cls: cls.REMOTE, Type: vxlan.MECHANISM,
				Parameters: map[string]string{"src_ip": internal, "src_port": "4789"},
			}}
			client := pair.Client(ctx)
			connection, err := client.Request(ctx, request)
			require.NoError(t, err)
			granted := connection.GetMechanism().GetParameters()
			vni, err := strconv.ParseUint(granted["vni"], 10, 24)
			require.NoError(t, err)
			require.Equal(t, test.odd, vni%2, "VNI %d of client %s and server %s",
				vni, test.client, granted["dst_ip"])
			require.Equal(t, internal, granted["src_ip"])
			require.Len(t, serving.links(), 1)
			_, err = client.Close(ctx, connection)
			require.NoError(t, err)
			harness.WaitUntilEmpty(t, pair.One, pair.Two)
			require.Empty(t, serving.links())
		})
	}
}
