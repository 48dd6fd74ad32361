package node

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"proxy-nsmgr/tests/interop/harness"
)

// startOurs starts our agent as everything on the node: NSMgr, registry, proxy and forwarder.
func (n *node) startOurs(t *testing.T, domain string) {
	t.Helper()
	n.agent = harness.StartAgent(t, harness.AgentConfig{
		Name: fmt.Sprintf("agent-%d", n.number), Domain: domain, IP: n.ip, Netns: n.pod.netns(),
		Extra: map[string]any{"forwarder": true},
	})
	n.nsmgr.NSMgr = n.agent.NSMgrURL().String()
	require.NoError(t, os.Chmod(n.agent.Dir, 0o755))
}

// in is service in the domain of the node, which is its address.
func (n *node) in(service string) string {
	return service + "@" + n.ip
}

// Real clients and endpoints of two domains whose NSMgrs are ours.
func TestNSMgrsOfTwoDomains(t *testing.T) {
	harness.NeedsRoot(t)
	nodes := newNodes(t)
	nodes[0].startOurs(t, "one.example")
	nodes[1].startOurs(t, "two.example")
	for at, n := range nodes {
		other := nodes[1-at]
		t.Run(fmt.Sprintf("from node %d", n.number), func(t *testing.T) {
			serving := other.endpoint(t)
			path := fmt.Sprintf("nsc agent-%d agent-%d nse", n.number, other.number)
			connects(t, n.clientOf(t, other.in(service)), serving, path)
			harness.WaitUntilEmpty(t, nodes[0].agent, nodes[1].agent)
		})
	}
}

// A real NSMgr and registry, and our agent as forwarder and as the domain's proxy: one process, or
// two of which one is a proxy only. The other domain is all ours.
func TestProxyOfARealNSMgr(t *testing.T) {
	harness.NeedsRoot(t)
	t.Run("one process", func(t *testing.T) {
		nodes := newNodes(t)
		registry := nodes[0].startRegistry(t, "tcp://"+nodes[0].ip+":5006")
		nodes[0].startReal(t, registry, "agent")
		nodes[1].startOurs(t, "two.example")
		// The forwarder knows what the proxy knows: they are one hop.
		connects(t, nodes[0].clientOf(t, nodes[1].in(service)), nodes[1].endpoint(t),
			"nsc nsmgr-1 agent-1 agent-2 nse")
		connects(t, nodes[1].clientOf(t, nodes[0].in(service)), nodes[0].endpoint(t),
			"nsc agent-2 agent-1 nsmgr-1 agent-1 nse")
		harness.WaitUntilEmpty(t, nodes[0].agent, nodes[1].agent)
	})
	t.Run("a proxy only", func(t *testing.T) {
		nodes := newNodes(t)
		const ip = "192.0.2.101"
		nodes[0].command("ip", "address", "add", ip+"/24", "dev", "uplink")
		registry := nodes[0].startRegistry(t, "tcp://"+ip+":5006")
		nodes[0].startReal(t, registry, "forwarder")
		proxy := harness.StartAgent(t, harness.AgentConfig{
			Name: "proxy-1", Domain: "one.example", IP: ip, Netns: nodes[0].pod.netns(),
			RegistryURL: registry, UpstreamNSMgrURL: nodes[0].nsmgr.NSMgr,
		})
		nodes[1].startOurs(t, "two.example")
		connects(t, nodes[0].clientOf(t, nodes[1].in(service)), nodes[1].endpoint(t),
			"nsc nsmgr-1 forwarder-1 proxy-1 agent-2 nse")
		connects(t, nodes[1].clientOf(t, service+"@"+ip), nodes[0].endpoint(t),
			"nsc agent-2 proxy-1 nsmgr-1 forwarder-1 nse")
		harness.WaitUntilEmpty(t, nodes[0].agent, nodes[1].agent, proxy)
		// What is not ours is left alone.
		proxy.Stop()
		nodes[0].agent.Stop()
		_, err := os.Stat(filepath.Join(nodes[0].dir, "nsm.io.sock"))
		require.NoError(t, err)
	})
}
