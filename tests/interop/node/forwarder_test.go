package node

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"proxy-nsmgr/tests/interop/harness"
)

// node is a network namespace with a real NSMgr, and our agent as that NSMgr's forwarder.
type node struct {
	pod   *pod
	ip    string
	dir   string
	nsmgr podConfig
	run   *pod
	agent *harness.Agent
}

// command runs a program of the node's, which must succeed.
func (n *node) command(arguments ...string) {
	n.pod.t.Helper()
	command := harness.InNetns(n.pod.netns(), exec.Command(arguments[0], arguments[1:]...))
	output, err := command.CombinedOutput()
	require.NoError(n.pod.t, err, "%v: %s", arguments, output)
}

// newNodes makes nodes in network namespaces that a cable joins, and a real registry on the first.
func newNodes(t *testing.T) [2]*node {
	t.Helper()
	var nodes [2]*node
	for at := range nodes {
		n := &node{ip: fmt.Sprintf("192.0.2.%d", at+1), dir: openDir(t)}
		n.pod = startPod(t, podConfig{Role: nodeRole, Name: fmt.Sprintf("node-%d", at+1)}, placement{})
		require.Empty(t, n.pod.next().Error)
		nodes[at] = n
	}
	pid := func(n *node) string { return fmt.Sprint(n.pod.command.Process.Pid) }
	output, err := exec.Command("ip", "link", "add", "uplink", "netns", pid(nodes[0]), "type", "veth",
		"peer", "name", "uplink", "netns", pid(nodes[1])).CombinedOutput()
	require.NoError(t, err, "%s", output)
	for _, n := range nodes {
		n.command("ip", "link", "set", "lo", "up")
		n.command("ip", "address", "add", n.ip+"/24", "dev", "uplink")
		n.command("ip", "link", "set", "uplink", "up")
	}
	registryURL := "tcp://" + nodes[0].ip + ":5002"
	registry := startPod(t, podConfig{Role: registryRole, Name: "registry", URL: registryURL},
		placement{netns: nodes[0].pod.netns()})
	require.Empty(t, registry.next().Error)
	for at, n := range nodes {
		n.nsmgr = podConfig{
			Role: nsmgrRole, Name: fmt.Sprintf("nsmgr-%d", at+1), Registry: registryURL,
			NSMgr: "unix://" + filepath.Join(n.dir, "nsm.io.sock"), URL: "tcp://" + n.ip + ":5001",
		}
		n.startNSMgr(t)
		n.agent = harness.StartAgent(t, harness.AgentConfig{
			Name: fmt.Sprintf("forwarder-%d", at+1), Domain: "one.example", IP: n.ip, Netns: n.pod.netns(),
			RegistryURL: registryURL, UpstreamNSMgrURL: n.nsmgr.NSMgr,
			Extra: map[string]any{
				"forwarder": true,
				"listen":    map[string]any{"forwarder": "unix://" + filepath.Join(n.dir, "forwarder.sock")},
			},
		})
	}
	return nodes
}

func (n *node) startNSMgr(t *testing.T) {
	t.Helper()
	n.run = startPod(t, n.nsmgr, placement{netns: n.pod.netns()})
	require.Empty(t, n.run.next().Error)
}

// endpoint starts an endpoint on the node.
func (n *node) endpoint(t *testing.T) *pod {
	t.Helper()
	serving := startPod(t, podConfig{
		Role: endpointRole, Name: "nse", NSMgr: n.nsmgr.NSMgr, Service: service,
		Dir: openDir(t), Prefix: prefix,
	}, placement{})
	require.Empty(t, serving.next().Error)
	return serving
}

// client starts a client on the node, which is not root.
func (n *node) client(t *testing.T) *pod {
	t.Helper()
	return startPod(t, podConfig{
		Role: clientRole, Name: "nsc", NSMgr: n.nsmgr.NSMgr, Service: service,
	}, placement{uid: nobody})
}

// Our agent registers as a forwarder of a real NSMgr, is chosen, and makes the links: a pair of veth
// on one node, a VXLAN tunnel between two.
func TestForwarder(t *testing.T) {
	harness.NeedsRoot(t)
	nodes := newNodes(t)
	for _, test := range []struct {
		name string
		of   *node
		path string
	}{
		{"one node", nodes[0], "nsc nsmgr-1 forwarder-1 nse"},
		{"two nodes", nodes[1], "nsc nsmgr-1 forwarder-1 nsmgr-2 forwarder-2 nse"},
	} {
		t.Run(test.name, func(t *testing.T) {
			serving, asking := test.of.endpoint(t), nodes[0].client(t)
			connection := asking.connected()
			require.Equal(t, test.path, strings.Join(harness.Names(connection), " "))
			addresses := connection.GetContext().GetIpContext()
			asking.pings(addresses.GetDstIpAddrs()[0])
			serving.pings(addresses.GetSrcIpAddrs()[0])

			again := asking.connected()
			require.Equal(t, connection.GetId(), again.GetId())
			asking.pings(addresses.GetDstIpAddrs()[0])

			require.Empty(t, asking.tell("close").Error)
			require.NotContains(t, asking.links(), "nsm")
			require.NotContains(t, serving.links(), "nsm")
			harness.WaitUntilEmpty(t, nodes[0].agent, nodes[1].agent)
			require.Empty(t, serving.tell("unregister").Error)
		})
	}
}

// An NSMgr that restarts has forgotten its forwarders. Ours is back as soon as it is.
func TestForwarderOfARestartedNSMgr(t *testing.T) {
	harness.NeedsRoot(t)
	n := newNodes(t)[0]
	n.run.end()
	n.startNSMgr(t)
	n.endpoint(t)
	asking := n.client(t)
	said := asking.tell("request")
	harness.Eventually(t, podDeadline, func() bool {
		if said.Error != "" {
			said = asking.tell("request")
		}
		return said.Error == ""
	}, func() string { return said.Error })
	require.Empty(t, asking.tell("close").Error)
}

// Without a forwarder an NSMgr connects nobody: one that stops says so, and is asked no more.
func TestForwarderThatStops(t *testing.T) {
	harness.NeedsRoot(t)
	n := newNodes(t)[0]
	n.endpoint(t)
	n.agent.Stop()
	said := n.client(t).tell("request")
	require.Contains(t, said.Error, "no candidates found")
}
