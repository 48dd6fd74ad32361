package wire

import (
	"context"
	"fmt"
	"maps"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"syscall"
	"testing"

	"github.com/networkservicemesh/api/pkg/api/networkservice"
	"github.com/networkservicemesh/api/pkg/api/networkservice/mechanisms/cls"
	"github.com/networkservicemesh/api/pkg/api/networkservice/mechanisms/kernel"
	"github.com/stretchr/testify/require"

	"proxy-nsmgr/tests/interop/harness"
)

// insideVariable is set in the process that plays the scene in a network namespace of its own.
const insideVariable = "WIRE_TUNNEL_INSIDE"

// A tunnel between two agents that make links: what they agree on, the proof of the path, and what
// their path segments publish of it.
func TestTunnel(t *testing.T) {
	harness.NeedsRoot(t)
	if os.Getenv(insideVariable) != "" {
		fixNameserver(t)
		tunnelScene(t)
		return
	}
	inside := exec.Command("/proc/self/exe", "-test.run=^TestTunnel$", "-test.v")
	inside.Env = append(os.Environ(), insideVariable+"=1", harness.AgentVariable+"="+harness.Program(t))
	inside.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS}
	output, err := inside.CombinedOutput()
	require.NoError(t, err, "%s", output)
}

// fixNameserver gives this mount namespace a resolver's file of its own: agents exclude the addresses of the node's servers.
func fixNameserver(t *testing.T) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "resolv.conf")
	require.NoError(t, os.WriteFile(file, []byte("nameserver 192.0.2.53\n"), 0o644))
	require.NoError(t, syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""))
	require.NoError(t, syscall.Mount(file, "/etc/resolv.conf", "", syscall.MS_BIND, ""))
}

// The nodes of the two agents.
const ipOne, ipTwo = "192.0.2.1", "192.0.2.2"

// namespace is a network namespace, by a process in it.
func namespace(t *testing.T) string {
	t.Helper()
	command := exec.Command("cat")
	command.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	input, err := command.StdinPipe()
	require.NoError(t, err)
	require.NoError(t, command.Start())
	t.Cleanup(func() {
		_ = input.Close()
		_ = command.Wait()
	})
	return fmt.Sprintf("/proc/%d/ns/net", command.Process.Pid)
}

func ip(t *testing.T, netns string, arguments ...string) {
	t.Helper()
	command := exec.Command("ip", arguments...)
	if netns != "" {
		command = harness.InNetns(netns, command)
	}
	output, err := command.CombinedOutput()
	require.NoError(t, err, "ip %v: %s", arguments, output)
}

// isGood tells whether both agents publish a path that is up both ways, and its MTU.
func isGood(event *networkservice.ConnectionEvent) bool {
	for _, connection := range event.GetConnections() {
		segments := connection.GetPath().GetPathSegments()
		good := map[string]string{"sbfd_state_in": "up", "sbfd_state_out": "up", "sbfd_path_mtu": "1450"}
		if len(segments) == 4 && maps.Equal(segments[1].GetMetrics(), good) && maps.Equal(segments[2].GetMetrics(), good) {
			return true
		}
	}
	return false
}

// joinedNodes makes this namespace node one, and another one node two.
func joinedNodes(t *testing.T) (two string) {
	t.Helper()
	two = namespace(t)
	ip(t, "", "link", "set", "lo", "up")
	ip(t, two, "link", "set", "lo", "up")
	ip(t, "", "link", "add", "uplink", "type", "veth", "peer", "name", "uplink", "netns", two)
	for netns, address := range map[string]string{"": ipOne, two: ipTwo} {
		ip(t, netns, "address", "add", address+"/24", "dev", "uplink")
		ip(t, netns, "link", "set", "uplink", "up")
	}
	return two
}

func forwarder(name, domain, ip, netns string) harness.AgentConfig {
	return harness.AgentConfig{
		Name: name, Domain: domain, IP: ip, Netns: netns, Extra: map[string]any{"forwarder": true},
	}
}

func tunnelScene(t *testing.T) {
	nodeTwo := joinedNodes(t)
	w := newEmptyWorld(t)
	configOne := forwarder("agent-one", harness.DomainOne, ipOne, "")
	configOne.DNS = w.dns
	one := harness.StartAgent(t, configOne)
	two := harness.StartAgent(t, forwarder("agent-two", harness.DomainTwo, ipTwo, nodeTwo))
	// Its address is that of its tunnels, so that the taps have other ports.
	for service, ports := range map[string][2]int{
		harness.ProxyService: {15006, harness.ProxyPort}, harness.RegistryService: {15005, harness.RegistryPort},
	} {
		at := &url.URL{Scheme: "tcp", Host: fmt.Sprint(ipOne, ":", ports[0])}
		w.Tap(t, "agents > two's "+service, at, &url.URL{Scheme: "tcp", Host: fmt.Sprint(ipTwo, ":", ports[1])})
		w.dns.Publish(harness.DomainTwo, service, at)
	}
	client, endpoint := w.dial("client > one's socket", one.NSMgrURL()), w.dial("nse > two's socket", two.NSMgrURL())
	podOne, podTwo := namespace(t), namespace(t)
	w.Name(podOne, "<client's namespace>")
	w.Name(podTwo, "<endpoint's namespace>")

	nse := harness.StartPeer(t, harness.PeerConfig{Name: "nse", OnRequest: func(
		_ context.Context, p *harness.Peer, request *networkservice.NetworkServiceRequest,
	) (*networkservice.Connection, error) {
		connection := grant(p, request)
		connection.Mechanism.Parameters = map[string]string{"inodeURL": "file://" + podTwo}
		connection.Context.IpContext = &networkservice.IPContext{
			SrcIpAddrs: []string{"172.16.1.1/32"}, DstIpAddrs: []string{"172.16.1.0/32"},
		}
		return connection, nil
	}})

	// A pod of its node serves at a socket.
	folder, err := os.MkdirTemp("", "wire-")
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(folder) })
	w.Name(folder, "<endpoint's folder>")
	at := &url.URL{Scheme: "unix", Path: filepath.Join(folder, "nse.sock")}
	w.Tap(t, "agents > nse", at, nse.URL)
	nse.URL = at

	// The path is measured while the recording goes on: its metrics are looked at when they have settled.
	w.Omit("metrics", "MonitorConnections")
	w.Step("an endpoint of domain two")
	w.register(endpoint, nse, "nse", service)
	w.Step("a Request")
	request := w.request("id-1", serviceOfTwo)
	request.MechanismPreferences = []*networkservice.Mechanism{{
		Cls: cls.LOCAL, Type: kernel.MECHANISM,
		Parameters: map[string]string{"inodeURL": "file://" + podOne, "name": "nsm-1"},
	}}
	connection := w.granted(client, request)
	harness.OpenMonitor(t, one.NSMgrURL()).WaitFor("the metrics of a path that is good", isGood)
	w.Step("a refresh")
	again := request.Clone()
	again.Connection = connection
	connection = w.granted(client, again)
	w.closeAll(client, []*networkservice.Connection{connection})
	harness.WaitUntilEmpty(t, one, two)

	for name, pattern := range map[string]string{
		"<vni>": `\bvni: (\d+)`, "<discriminator of one>": `sbfd_discriminator_src: (\d+)`,
		"<discriminator of two>": `sbfd_discriminator_dst: (\d+)`,
	} {
		found := regexp.MustCompile(pattern).FindStringSubmatch(w.Text())
		require.NotNil(t, found, "%s in\n%s", pattern, w.Text())
		w.Name(found[1], name)
	}
	w.Compare("tunnel")
}
