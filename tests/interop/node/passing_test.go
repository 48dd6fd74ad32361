package node

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"

	"proxy-nsmgr/tests/interop/harness"
)

const (
	service = "icmp-responder"
	prefix  = "172.16.1.0/24"
)

// nodeAgent is our agent in the places of NSMgr, registry and forwarder of a node, which every user
// of the node can reach.
func nodeAgent(t *testing.T) *harness.Agent {
	t.Helper()
	agent := harness.StartAgent(t, harness.AgentConfig{
		Domain: "one.example",
		Extra:  map[string]any{"forwarder": true},
	})
	require.NoError(t, os.Chmod(agent.Dir, 0o755))
	return agent
}

// holdsAgain waits until the agent holds as many namespaces as before.
func holdsAgain(t *testing.T, agent *harness.Agent, before int) {
	t.Helper()
	harness.Eventually(t, 10*time.Second, func() bool { return agent.OpenNamespaces(t) <= before },
		func() string {
			return fmt.Sprintf("it holds %d namespaces, and held %d", agent.OpenNamespaces(t), before)
		})
}

// clientAt is a client of the agent's node.
func clientAt(agent *harness.Agent) podConfig {
	return clientOf(agent.NSMgrURL().String(), service)
}

// clientOf is a client of an NSMgr that asks for a service.
func clientOf(nsmgr, service string) podConfig {
	return podConfig{Role: clientRole, Name: "nsc", NSMgr: nsmgr, Service: service}
}

// endpointAt is an endpoint of the agent's node.
func endpointAt(agent *harness.Agent) podConfig {
	return endpointOf(agent.NSMgrURL().String(), "nse", prefix)
}

// endpointOf is an endpoint of an NSMgr that gives addresses of prefix.
func endpointOf(nsmgr, name, prefix string) podConfig {
	return podConfig{Role: endpointRole, Name: name, NSMgr: nsmgr, Service: service, Prefix: prefix}
}

// startEndpoint starts an endpoint and waits until it is registered.
func startEndpoint(t *testing.T, config podConfig, where placement) *pod {
	t.Helper()
	config.Dir = openDir(t)
	serving := startPod(t, config, where)
	require.Empty(t, serving.next().Error)
	return serving
}

// openDir is a directory that every user may write to.
func openDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "nsm-pod-")
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	require.NoError(t, os.Chmod(dir, 0o777))
	return dir
}

// Clients and endpoints name their namespaces by inode, and pass the descriptors of them, and of the
// endpoint's socket, beside the stream (grpcfd). Users other than root may do so too.
func TestDescriptors(t *testing.T) {
	harness.NeedsRoot(t)
	for _, test := range []struct {
		name             string
		client, endpoint placement
	}{
		{"of root", placement{}, placement{}},
		{"of an unprivileged client", placement{uid: nobody}, placement{}},
		{"of an unprivileged endpoint", placement{}, placement{uid: nobody}},
		{"of two users", placement{uid: 12345}, placement{uid: nobody}},
	} {
		t.Run(test.name, func(t *testing.T) {
			agent := nodeAgent(t)
			held := agent.OpenNamespaces(t)
			serving := startEndpoint(t, endpointAt(agent), test.endpoint)
			asking := startPod(t, clientAt(agent), test.client)

			connection := asking.connected()
			require.Equal(t, []string{"nsc", agent.Name, "nse"}, harness.Names(connection))
			addresses := connection.GetContext().GetIpContext()
			asking.pings(addresses.GetDstIpAddrs()[0])
			serving.pings(addresses.GetSrcIpAddrs()[0])

			again := asking.connected()
			require.Equal(t, connection.GetId(), again.GetId())
			require.Equal(t, connection.GetMechanism().GetParameters(), again.GetMechanism().GetParameters())
			asking.pings(addresses.GetDstIpAddrs()[0])

			require.Empty(t, asking.tell("close").Error)
			require.Equal(t, 1, serving.tell("closes").Closes)
			asking.linksGo()
			serving.linksGo()
			harness.WaitUntilEmpty(t, agent)
			asking.end()
			require.Empty(t, serving.tell("unregister").Error)
			serving.end()
			holdsAgain(t, agent, held)
		})
	}
}

// A namespace without a process, mounted nowhere, as a container's is to an agent that does not see
// the host's processes: the agent keeps the descriptor as long as its links stand, and no longer.
func TestHiddenNamespace(t *testing.T) {
	harness.NeedsRoot(t)
	agent := nodeAgent(t)
	held := agent.OpenNamespaces(t)
	serving := startEndpoint(t, endpointAt(agent), placement{})
	config := clientAt(agent)
	config.Hidden = true
	asking := startPod(t, config, placement{})
	asking.hidden = asking.next().Netns
	connection := asking.connected()
	asking.pings(connection.GetContext().GetIpContext().GetDstIpAddrs()[0])
	require.Len(t, asking.links(), 1)
	require.Empty(t, asking.tell("close").Error)
	asking.linksGo()
	asking.end()
	serving.end()
	holdsAgain(t, agent, held)
}

// Without a descriptor a namespace is only a claim, and the node's own takes more than a descriptor,
// which every process of the host can have.
func TestClaims(t *testing.T) {
	harness.NeedsRoot(t)
	agent := nodeAgent(t)
	startEndpoint(t, endpointAt(agent), placement{})
	for _, test := range []struct {
		name   string
		claims bool
		where  placement
		text   string
	}{
		{"of a path", true, placement{uid: nobody}, "without passing its descriptor"},
		{"of the node's namespace", false, placement{uid: nobody, host: true}, "the node's own network namespace"},
	} {
		t.Run(test.name, func(t *testing.T) {
			config := clientAt(agent)
			config.Claims = test.claims
			asking := startPod(t, config, test.where)
			said := asking.tell("request")
			require.Equal(t, codes.PermissionDenied, said.Code, said.Error)
			require.Contains(t, said.Error, test.text)
			harness.WaitUntilEmpty(t, agent)
		})
	}
}

// Our own client passes its namespace's descriptor when it is not root.
func TestConnectOfAnotherUser(t *testing.T) {
	harness.NeedsRoot(t)
	agent := nodeAgent(t)
	serving := startEndpoint(t, endpointAt(agent), placement{})
	// The user may not reach the program by its path.
	program, err := os.Open(harness.Program(t))
	require.NoError(t, err)
	defer func() { _ = program.Close() }()
	command := exec.Command("/proc/self/fd/3", "connect", service, "--netns", "/proc/self/ns/net",
		"--json", "--name", "nsc", "--connect-to", agent.NSMgrURL().String())
	command.ExtraFiles = []*os.File{program}
	command.Env, command.Dir = []string{}, "/"
	command.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNET,
		Credential: &syscall.Credential{Uid: nobody, Gid: nobody},
	}
	client := harness.Start(t, "connect", command)
	harness.Eventually(t, podDeadline, func() bool {
		return strings.Contains(client.Log(), `"event":"connected"`)
	}, client.Log)
	ping := harness.InNetns(client.Netns(), exec.Command("ping", "-n", "-c", "1", "-W", "2", "172.16.1.0"))
	output, err := ping.CombinedOutput()
	require.NoError(t, err, "%s", output)
	client.Stop()
	harness.WaitUntilEmpty(t, agent)
	serving.linksGo()
}
