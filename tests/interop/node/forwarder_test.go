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
	number int
	pod    *pod
	ip     string
	dir    string
	nsmgr  podConfig
	run    *pod
	agent  *harness.Agent
}

// command runs a program of the node's, which must succeed.
func (n *node) command(arguments ...string) {
	n.pod.t.Helper()
	command := harness.InNetns(n.pod.netns(), exec.Command(arguments[0], arguments[1:]...))
	output, err := command.CombinedOutput()
	require.NoError(n.pod.t, err, "%v: %s", arguments, output)
}

// newNodes makes two network namespaces that a cable joins.
func newNodes(t *testing.T) [2]*node {
	t.Helper()
	var nodes [2]*node
	for at := range nodes {
		n := &node{number: at + 1, ip: fmt.Sprintf("192.0.2.%d", at+1), dir: openDir(t)}
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
	return nodes
}

// startRegistry starts a real registry on the node, with a proxy to other domains if one is named.
func (n *node) startRegistry(t *testing.T, proxy string) string {
	t.Helper()
	at := "tcp://" + n.ip + ":5002"
	registry := startPod(t, podConfig{Role: registryRole, Name: "registry", URL: at, Proxy: proxy},
		placement{netns: n.pod.netns()})
	require.Empty(t, registry.next().Error)
	return at
}

// startReal starts a real NSMgr on the node, and our agent as its forwarder.
func (n *node) startReal(t *testing.T, registry, name string) {
	t.Helper()
	n.nsmgr = podConfig{
		Role: nsmgrRole, Name: fmt.Sprintf("nsmgr-%d", n.number), Registry: registry,
		NSMgr: "unix://" + filepath.Join(n.dir, "nsm.io.sock"), URL: "tcp://" + n.ip + ":5001",
	}
	n.startNSMgr(t)
	n.agent = harness.StartAgent(t, harness.AgentConfig{
		Name: fmt.Sprintf("%s-%d", name, n.number), Domain: "one.example", IP: n.ip,
		Netns: n.pod.netns(), RegistryURL: registry, UpstreamNSMgrURL: n.nsmgr.NSMgr,
		Extra: map[string]any{
			"forwarder": true,
			"listen":    map[string]any{"forwarder": "unix://" + filepath.Join(n.dir, "forwarder.sock")},
		},
	})
}

// newRealNodes makes nodes with a real NSMgr each, and a real registry on the first.
func newRealNodes(t *testing.T) [2]*node {
	t.Helper()
	nodes := newNodes(t)
	registry := nodes[0].startRegistry(t, "")
	for _, n := range nodes {
		n.startReal(t, registry, "forwarder")
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
	return n.endpointOf(t, "nse", prefix)
}

// endpointOf starts an endpoint of a name of its own, that gives addresses of prefix.
func (n *node) endpointOf(t *testing.T, name, prefix string) *pod {
	t.Helper()
	return startEndpoint(t, endpointOf(n.nsmgr.NSMgr, name, prefix), placement{})
}

// client starts a client on the node, which is not root.
func (n *node) client(t *testing.T) *pod {
	t.Helper()
	return n.clientOf(t, service)
}

// clientOf starts a client that asks for service.
func (n *node) clientOf(t *testing.T, service string) *pod {
	t.Helper()
	return startPod(t, clientOf(n.nsmgr.NSMgr, service), placement{uid: nobody})
}

// Our agent registers as a forwarder of a real NSMgr, is chosen, and makes the links: a pair of veth
// on one node, a VXLAN tunnel between two.
func TestForwarder(t *testing.T) {
	harness.NeedsRoot(t)
	nodes := newRealNodes(t)
	for _, test := range []struct {
		name string
		of   *node
		path string
	}{
		{"one node", nodes[0], "nsc nsmgr-1 forwarder-1 nse"},
		{"two nodes", nodes[1], "nsc nsmgr-1 forwarder-1 nsmgr-2 forwarder-2 nse"},
	} {
		t.Run(test.name, func(t *testing.T) {
			connects(t, nodes[0].client(t), test.of.endpoint(t), test.path)
			harness.WaitUntilEmpty(t, nodes[0].agent, nodes[1].agent)
		})
	}
}

// connects lets the client ask, ask again and close; in between packets pass in both directions.
func connects(t *testing.T, asking, serving *pod, path string) {
	t.Helper()
	connection := asking.connected()
	require.Equal(t, path, strings.Join(harness.Names(connection), " "))
	addresses := connection.GetContext().GetIpContext()
	asking.pings(addresses.GetDstIpAddrs()[0])
	serving.pings(addresses.GetSrcIpAddrs()[0])

	again := asking.connected()
	require.Equal(t, connection.GetId(), again.GetId())
	asking.pings(addresses.GetDstIpAddrs()[0])

	require.Empty(t, asking.tell("close").Error)
	require.Equal(t, 1, serving.tell("closes").Closes)
	asking.linksGo()
	serving.linksGo()
	require.Empty(t, serving.tell("unregister").Error)
	serving.end()
}

// An NSMgr that restarts has forgotten its forwarders. Ours is back as soon as it is.
func TestForwarderOfARestartedNSMgr(t *testing.T) {
	harness.NeedsRoot(t)
	n := newRealNodes(t)[0]
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

// A forwarder that stops unregisters: its NSMgr, which has no other, refuses the next Request.
func TestForwarderThatStops(t *testing.T) {
	harness.NeedsRoot(t)
	n := newRealNodes(t)[0]
	n.endpoint(t)
	n.agent.Stop()
	said := n.client(t).tell("request")
	require.Contains(t, said.Error, "no candidates found")
}
