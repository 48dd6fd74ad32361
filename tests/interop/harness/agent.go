package harness

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
)

// The agent's default ports.
const (
	ProxyPort    = 5006
	RegistryPort = 5005
)

// ReadyDeadline bounds the start of an agent; a free machine needs a fraction of a second.
const ReadyDeadline = 30 * time.Second

// everywhere are all addresses.
var everywhere = []string{"0.0.0.0/0", "::/0"}

// AgentConfig is what a test tells an agent. The rest is set so that the agent touches nothing but
// loopback and its own directory: no BPF programs and no links unless Extra makes it a forwarder.
type AgentConfig struct {
	// Name is the name of the agent's path segments; unique by default.
	Name string
	// Domain is the domain the agent serves.
	Domain string
	// IP is the loopback address it listens on; one of its own by default.
	IP string
	// RegistryURL is the registry of its domain; its own role by default.
	RegistryURL string
	// UpstreamNSMgrURL makes it a proxy only, of the node of that NSMgr.
	UpstreamNSMgrURL string
	// DNS is the server it asks; without one it resolves addresses only.
	DNS *DNS
	// MapIP is its IP map, internal to external.
	MapIP map[string]string
	// Netns is the path of the network namespace it runs in; the test's own by default.
	Netns string
	// Extra is merged over the configuration, section by section.
	Extra map[string]any
}

// Agent is a running proxy-nsmgr.
type Agent struct {
	*Process
	// Name is the name of its path segments.
	Name string
	// IP is the address it listens on.
	IP string
	// Dir is its directory: sockets, configuration, IP map.
	Dir string

	program string
	config  string
	netns   string
}

// ProxyURL is where it serves Requests of other hops.
func (a *Agent) ProxyURL() *url.URL {
	return &url.URL{Scheme: "tcp", Host: fmt.Sprintf("%s:%d", a.IP, ProxyPort)}
}

// RegistryURL is where it serves registries.
func (a *Agent) RegistryURL() *url.URL {
	return &url.URL{Scheme: "tcp", Host: fmt.Sprintf("%s:%d", a.IP, RegistryPort)}
}

// NSMgrURL is the socket for the clients and endpoints of its node.
func (a *Agent) NSMgrURL() *url.URL {
	return &url.URL{Scheme: "unix", Path: filepath.Join(a.Dir, "nsm.sock")}
}

func (a *Agent) adminURL() string {
	return "unix://" + filepath.Join(a.Dir, "admin.sock")
}

// MapIPFile is the file of its IP map.
func (a *Agent) MapIPFile() string {
	return filepath.Join(a.Dir, "map-ip.yaml")
}

// StartAgent starts an agent and waits until its health is SERVING.
func StartAgent(t testing.TB, config AgentConfig) *Agent {
	t.Helper()
	a := launch(t, config)
	a.waitUntilReady(t)
	return a
}

func launch(t testing.TB, config AgentConfig) *Agent {
	t.Helper()
	a := &Agent{Name: config.Name, IP: config.IP, Dir: shortTempDir(t), program: Program(t), netns: config.Netns}
	if a.IP == "" {
		a.IP = LoopbackIP(t)
	}
	if a.Name == "" {
		a.Name = "agent-" + a.IP
	}
	a.config = filepath.Join(a.Dir, "config.yaml")
	mapIP := config.MapIP
	if mapIP == nil {
		mapIP = map[string]string{}
	}
	writeJSON(t, a.MapIPFile(), mapIP)
	writeJSON(t, a.config, a.configuration(config))
	a.spawn(t)
	return a
}

func (a *Agent) spawn(t testing.TB) {
	t.Helper()
	command := exec.Command(a.program, "agent", "--config", a.config)
	// Nothing of the caller's environment may reach the configuration.
	command.Env = []string{"PATH=" + os.Getenv("PATH"), "RUST_BACKTRACE=1"}
	command.Dir = a.Dir
	if a.netns != "" {
		command = InNetns(a.netns, command)
	}
	a.Process = startProcess(t, a.Name, command)
}

// Restart kills the agent, as a crash would, and starts it again as it was.
func (a *Agent) Restart(t testing.TB) {
	t.Helper()
	a.Kill()
	a.spawn(t)
	a.waitUntilReady(t)
}

func (a *Agent) configuration(config AgentConfig) map[string]any {
	resolver := map[string]any{"servers": []string{deadServer}}
	if config.DNS != nil {
		resolver["servers"] = []string{config.DNS.Address()}
	}
	all := map[string]any{
		"name":     a.Name,
		"domain":   config.Domain,
		"insecure": true,
		"listen": map[string]any{
			"nsmgr":    a.NSMgrURL().String(),
			"proxy":    a.ProxyURL().String(),
			"registry": a.RegistryURL().String(),
			"admin":    a.adminURL(),
			"metrics":  "off",
		},
		"forwarder": false,
		// Pods are connected by BPF programs; an agent without pods loads none.
		"bpf":         map[string]any{"pin_dir": "/sys/fs/bpf/proxy-nsmgr-interop-" + filepath.Base(a.Dir)},
		"resolver":    resolver,
		"tunnel":      map[string]any{"ip": a.IP},
		"map_ip_file": a.MapIPFile(),
		// NSM's components of the agent's own domain ask over TCP, and all that they lead to is on this machine.
		"relay_for":   everywhere,
		"dial_inside": everywhere,
		// Scenes use addresses of documentation as well as private ones.
		"admission": map[string]any{"prefixes": []string{
			"10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "192.0.2.0/24", "fc00::/7", "2001:db8::/32",
		}},
		// On a cloud's machine its public address would stand in for the loopback one.
		"public_address": map[string]any{"metadata": "off", "kubernetes": "off"},
		"log":            map[string]any{"level": "info", "format": "json"},
	}
	if config.RegistryURL != "" {
		all["registry_url"] = config.RegistryURL
	}
	if config.UpstreamNSMgrURL != "" {
		all["upstream_nsmgr_url"] = config.UpstreamNSMgrURL
	}
	merge(all, config.Extra)
	return all
}

// deadServer refuses at once: an agent that was given no DNS must not ask the machine's.
const deadServer = "127.0.0.1:1"

func merge(into, from map[string]any) {
	for key, value := range from {
		section, ok := value.(map[string]any)
		if old, is := into[key].(map[string]any); ok && is {
			merge(old, section)
			continue
		}
		into[key] = value
	}
}

func (a *Agent) waitUntilReady(t testing.TB) {
	t.Helper()
	// Its ports may be in a network namespace of its own.
	client := Dial(t, &url.URL{Scheme: "unix", Path: filepath.Join(a.Dir, "admin.sock")})
	health := grpc_health_v1.NewHealthClient(client)
	var last error
	Eventually(t, ReadyDeadline, func() bool {
		if a.Exited() {
			t.Fatalf("%s ended at its start: %v\n%s", a.Name, a.err, a.Log())
		}
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		answer, err := health.Check(ctx, &grpc_health_v1.HealthCheckRequest{})
		last = err
		return err == nil && answer.GetStatus() == grpc_health_v1.HealthCheckResponse_SERVING
	}, func() string { return fmt.Sprintf("%s is not SERVING: %v\n%s", a.Name, last, a.Log()) })
}

// Reload sends SIGHUP.
func (a *Agent) Reload() {
	_ = a.command.Process.Signal(syscall.SIGHUP)
}

// Status is what `proxy-nsmgr status --json` tells.
func (a *Agent) Status(t testing.TB) map[string]any {
	t.Helper()
	var stderr bytes.Buffer
	command := exec.Command(a.program, "status", "--json", "--admin", a.adminURL())
	command.Stderr = &stderr
	output, err := command.Output()
	if err != nil {
		t.Fatalf("status of %s: %v: %s", a.Name, err, stderr.String())
	}
	var status map[string]any
	if err := json.Unmarshal(output, &status); err != nil {
		t.Fatalf("status of %s: %v in %s", a.Name, err, output)
	}
	return status
}

// OpenConnections is how many connections its status shows.
func (a *Agent) OpenConnections(t testing.TB) int {
	t.Helper()
	connections, ok := a.Status(t)["connections"].([]any)
	if !ok {
		t.Fatalf("the status of %s has no connections", a.Name)
	}
	return len(connections)
}

// WaitUntilEmpty waits until the agents hold no connection.
func WaitUntilEmpty(t testing.TB, agents ...*Agent) {
	t.Helper()
	for _, a := range agents {
		Eventually(t, EventDeadline, func() bool { return a.OpenConnections(t) == 0 }, func() string {
			return fmt.Sprintf("%s still holds connections: %v", a.Name, a.Status(t)["connections"])
		})
	}
}

// Dial connects to url in plain HTTP/2, without NSM's metadata.
func Dial(t testing.TB, to *url.URL) *grpc.ClientConn {
	t.Helper()
	target := to.Host
	if to.Scheme == "unix" {
		target = to.String()
	}
	retry := backoff.Config{BaseDelay: pollInterval, Multiplier: 1, MaxDelay: time.Second}
	client, err := grpc.NewClient(target,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: retry, MinConnectTimeout: ReadyDeadline}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close() })
	return client
}

// WaitUntilConnected waits until calls need not wait for the connection.
func WaitUntilConnected(t testing.TB, client *grpc.ClientConn) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), ReadyDeadline)
	defer cancel()
	client.Connect()
	for state := client.GetState(); state != connectivity.Ready; state = client.GetState() {
		if !client.WaitForStateChange(ctx, state) {
			t.Fatalf("%s is still %v after %v", client.Target(), state, ReadyDeadline)
		}
	}
}

// shortTempDir is a directory whose path leaves room for a socket's name (107 bytes in all), which
// that of t.TempDir does not.
func shortTempDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "nsm-interop-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// writeJSON writes a file of YAML, which JSON is.
func writeJSON(t testing.TB, path string, value any) {
	t.Helper()
	text, err := json.MarshalIndent(value, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
}
