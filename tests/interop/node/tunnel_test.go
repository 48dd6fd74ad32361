package node

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/networkservicemesh/api/pkg/api/networkservice"
	"github.com/networkservicemesh/api/pkg/api/networkservice/mechanisms/cls"
	"github.com/networkservicemesh/api/pkg/api/networkservice/mechanisms/vxlan"
	"github.com/stretchr/testify/require"

	"proxy-nsmgr/tests/interop/harness"
)

// remoteRequest asks agent one for the service of domain two over VXLAN, as a node's forwarder does.
func remoteRequest(
	t *testing.T, pair *harness.AgentPair, parameters map[string]string,
) *networkservice.NetworkServiceRequest {
	t.Helper()
	request := harness.RequestFor("id", service+"@"+harness.DomainTwo)
	request.Connection.NetworkServiceEndpointName =
		pair.Discover(t.Context(), t, service+"@"+harness.DomainTwo)
	request.MechanismPreferences = []*networkservice.Mechanism{
		{Cls: cls.REMOTE, Type: vxlan.MECHANISM, Parameters: parameters},
	}
	return request
}

// apartVariable is set in the process that plays a test in a network namespace of its own.
const apartVariable = "NODE_TEST_APART"

// isApart says whether this process is in a network namespace where all addresses are routed to lo: clients may then be anywhere, and
// nothing leaves the machine. Elsewhere it plays the test in a process that is.
func isApart(t *testing.T) bool {
	t.Helper()
	harness.NeedsRoot(t)
	if os.Getenv(apartVariable) != "" {
		for _, arguments := range [][]string{{"link", "set", "lo", "up"}, {"route", "add", "default", "dev", "lo"}} {
			output, err := exec.Command("ip", arguments...).CombinedOutput()
			require.NoError(t, err, "%s", output)
		}
		return true
	}
	apart := exec.Command("/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v")
	apart.Env = append(os.Environ(), apartVariable+"=1", harness.AgentVariable+"="+harness.Program(t))
	apart.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	output, err := apart.CombinedOutput()
	require.NoError(t, err, "%s", output)
	require.Contains(t, string(output), "--- PASS: "+t.Name())
	return false
}

// NSM splits the VNIs between two nodes that may both be servers: even where the client's address is
// not above the server's, else odd. Across domains its proxies lose the rule, for each side sees
// other addresses; ours hold it by the addresses that both see, the public ones.
func TestVNIParityAcrossDomains(t *testing.T) {
	if !isApart(t) {
		return
	}
	const (
		internal = "10.255.1.5"
		// The agent's own address lies between the first two.
		low, high, higher = "10.0.1.1", "198.51.100.1", "203.0.113.1"
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
			serving := startEndpoint(t, endpointAt(pair.Two), placement{})
			request := remoteRequest(t, pair, map[string]string{"src_ip": internal, "src_port": "4789"})
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
			serving.linksGo()
		})
	}
}

// The tunnel's MTU is the least of what either end can carry and of what the connection has.
func TestTunnelMTU(t *testing.T) {
	if !isApart(t) {
		return
	}
	pair := harness.NewAgentPair(t, func(_, two *harness.AgentConfig) {
		two.Extra = map[string]any{"forwarder": true}
	})
	serving := startEndpoint(t, endpointAt(pair.Two), placement{})
	for _, test := range []struct {
		name          string
		client        string
		context, want uint32
	}{
		{"the client's", "1400", 0, 1400},
		{"the connection's", "1400", 1300, 1300},
		{"the client's, below the connection's", "1400", 9000, 1400},
		{"large on both sides", "9000", 0, 9000},
	} {
		t.Run(test.name, func(t *testing.T) {
			request := remoteRequest(t, pair, map[string]string{"src_ip": "10.0.1.1", "MTU": test.client})
			request.Connection.Context.MTU = test.context
			client := pair.Client(t.Context())
			connection, err := client.Request(t.Context(), request)
			require.NoError(t, err)
			require.Equal(t, test.want, connection.GetContext().GetMTU())
			require.Equal(t, fmt.Sprint(test.want), connection.GetMechanism().GetParameters()["MTU"])
			require.Equal(t, test.want, serving.mtu())
			_, err = client.Close(t.Context(), connection)
			require.NoError(t, err)
			harness.WaitUntilEmpty(t, pair.One, pair.Two)
			serving.linksGo()
		})
	}
}

// mtu is that of the pod's only link.
func (p *pod) mtu() uint32 {
	p.t.Helper()
	links := p.links()
	require.Len(p.t, links, 1)
	name, _, _ := strings.Cut(links[0], "@")
	command := harness.InNetns(p.netns(), exec.Command("ip", "-json", "link", "show", "dev", name))
	output, err := command.Output()
	require.NoError(p.t, err)
	var shown []struct{ MTU uint32 }
	require.NoError(p.t, json.Unmarshal(output, &shown))
	require.Len(p.t, shown, 1)
	return shown[0].MTU
}
