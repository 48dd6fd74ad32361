package sidebyside

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/networkservicemesh/api/pkg/api/registry"
	"github.com/networkservicemesh/sdk/pkg/networkservice/chains/nsmgrproxy"
	"github.com/networkservicemesh/sdk/pkg/registry/chains/proxydns"
	"github.com/networkservicemesh/sdk/pkg/tools/grpcutils"
	"github.com/networkservicemesh/sdk/pkg/tools/sandbox"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health/grpc_health_v1"

	"proxy-nsmgr/tests/interop/harness"
)

const (
	domainOne = "one.example"
	domainTwo = "two.example"
	service   = "icmp-responder"
	endpoint  = "icmp-responder-nse"
)

// proxyConfig is what a real proxy's process is told.
type proxyConfig struct {
	Name          string
	Registry      string
	DNS           string
	Proxy         string
	RegistryProxy string
	MapIP         string
}

// runProxy is a real proxy's main function: the sdk's nsmgr-proxy and registry-proxy-dns.
func runProxy(text string) error {
	var config proxyConfig
	if err := json.Unmarshal([]byte(text), &config); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	var urls []*url.URL
	for _, text := range []string{config.Registry, config.Proxy, config.RegistryProxy} {
		parsed, err := url.Parse(text)
		if err != nil {
			return err
		}
		urls = append(urls, parsed)
	}
	registryURL, proxyURL, registryProxyURL := urls[0], urls[1], urls[2]
	resolver := &net.Resolver{
		PreferGo: true,
		Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "udp", config.DNS)
		},
	}
	dial := sandbox.DialOptions()
	registryProxy := proxydns.NewServer(ctx, sandbox.GenerateTestToken, resolver,
		proxydns.WithDialOptions(dial...))
	proxy := nsmgrproxy.NewServer(ctx, registryURL, registryProxyURL, sandbox.GenerateTestToken,
		nsmgrproxy.WithName(config.Name),
		nsmgrproxy.WithListenOn(proxyURL),
		nsmgrproxy.WithMapIPFilePath(config.MapIP),
		nsmgrproxy.WithDialOptions(dial...),
		nsmgrproxy.WithDialTimeout(5*time.Second),
	)
	registryServer, proxyServer := grpc.NewServer(), grpc.NewServer()
	registryProxy.Register(registryServer)
	proxy.Register(proxyServer)
	registryErrors := grpcutils.ListenAndServe(ctx, registryProxyURL, registryServer)
	proxyErrors := grpcutils.ListenAndServe(ctx, proxyURL, proxyServer)
	select {
	case <-ctx.Done():
		return nil
	case err := <-registryErrors:
		return fmt.Errorf("registry-proxy: %w", err)
	case err := <-proxyErrors:
		return fmt.Errorf("nsmgr-proxy: %w", err)
	}
}

// scene is two proxies with a client on one side and an endpoint on the other.
type scene struct {
	t       testing.TB
	one     *url.URL
	proxies [2]*harness.Process
	peer    *harness.Peer
	calls   *grpc.ClientConn
	// target is the endpoint's name as the client asks for it.
	target string
	next   int
}

// surroundings are what both kinds of proxies have around them.
type surroundings struct {
	dns        *harness.DNS
	peer       *harness.Peer
	registries [2]*url.URL
}

func surround(t *testing.T) surroundings {
	t.Helper()
	ctx := t.Context()
	around := surroundings{
		dns:  harness.NewDNS(t),
		peer: harness.StartPeer(t, harness.PeerConfig{Name: endpoint, Forgets: true}),
	}
	for at := range around.registries {
		domain := sandbox.NewBuilder(ctx, t).SetNodesCount(0).
			SetRegistryDefaultExpiration(time.Hour).
			SetNSMgrProxySupplier(nil).SetRegistryProxySupplier(nil).Build()
		around.registries[at] = domain.Registry.URL
	}
	two := around.registries[1]
	_, err := harness.ServiceRegistry(ctx, two).
		Register(ctx, &registry.NetworkService{Name: service})
	require.NoError(t, err)
	_, err = harness.EndpointRegistry(ctx, two).Register(ctx, &registry.NetworkServiceEndpoint{
		Name: endpoint, NetworkServiceNames: []string{service}, Url: around.peer.URL.String(),
	})
	require.NoError(t, err)
	return around
}

// startReal starts two real proxies.
func startReal(t *testing.T) *scene {
	t.Helper()
	around := surround(t)
	var (
		urls    [2]*url.URL
		proxies [2]*harness.Process
	)
	mapIP := filepath.Join(t.TempDir(), "map-ip.yaml")
	require.NoError(t, os.WriteFile(mapIP, []byte("{}"), 0o600))
	for at := range proxies {
		ip := harness.LoopbackIP(t)
		urls[at] = &url.URL{Scheme: "tcp", Host: net.JoinHostPort(ip, strconv.Itoa(harness.ProxyPort))}
		text, err := json.Marshal(proxyConfig{
			Name:          fmt.Sprint("proxy-", at+1),
			Registry:      around.registries[at].String(),
			DNS:           around.dns.Address(),
			Proxy:         urls[at].String(),
			RegistryProxy: "tcp://" + net.JoinHostPort(ip, strconv.Itoa(harness.RegistryPort)),
			MapIP:         mapIP,
		})
		require.NoError(t, err)
		command := exec.Command("/proc/self/exe")
		command.Env = []string{proxyVariable + "=" + string(text)}
		proxies[at] = harness.Start(t, fmt.Sprint("real proxy ", at+1), command)
	}
	return around.scene(t, urls, proxies)
}

// startOurs starts two agents.
func startOurs(t *testing.T) *scene {
	t.Helper()
	around := surround(t)
	var (
		urls    [2]*url.URL
		proxies [2]*harness.Process
	)
	for at, domain := range []string{domainOne, domainTwo} {
		agent := harness.StartAgent(t, harness.AgentConfig{
			Name:        fmt.Sprint("proxy-", at+1),
			Domain:      domain,
			DNS:         around.dns,
			RegistryURL: around.registries[at].String(),
			// A proxy only; as such it takes no Requests from a node, and asks that NSMgr nothing.
			UpstreamNSMgrURL: "tcp://127.0.0.1:1",
			Extra:            map[string]any{"log": map[string]any{"level": "warn"}},
		})
		urls[at], proxies[at] = agent.ProxyURL(), agent.Process
	}
	return around.scene(t, urls, proxies)
}

func (around surroundings) scene(t *testing.T, urls [2]*url.URL, proxies [2]*harness.Process) *scene {
	t.Helper()
	for at, domain := range []string{domainOne, domainTwo} {
		around.dns.Publish(domain, harness.RegistryService, around.registries[at])
		around.dns.Publish(domain, harness.ProxyService, urls[at])
	}
	calls, err := grpc.NewClient(urls[0].Host, sandbox.DialOptions()...)
	require.NoError(t, err)
	t.Cleanup(func() { _ = calls.Close() })
	s := &scene{t: t, one: urls[0], proxies: proxies, peer: around.peer, calls: calls}
	for _, at := range urls {
		health := grpc_health_v1.NewHealthClient(harness.Dial(t, at))
		harness.Eventually(t, harness.ReadyDeadline, func() bool {
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			defer cancel()
			_, err := health.Check(ctx, &grpc_health_v1.HealthCheckRequest{
				Service: "networkservice.NetworkService",
			})
			return err == nil
		}, func() string { return fmt.Sprintf("%v does not serve", at) })
	}
	found := s.find(t.Context())
	require.NoError(t, found.err)
	s.target = found.name
	return s
}

// cpu is the processor time that each proxy has used.
func (s *scene) cpu() [2]time.Duration {
	s.t.Helper()
	var used [2]time.Duration
	for at, proxy := range s.proxies {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", proxy.Pid()))
		require.NoError(s.t, err)
		// proc_pid_stat(5): the name may hold spaces and ends with the last parenthesis; utime and
		// stime are the 14th and 15th fields, in ticks of a hundredth of a second.
		fields := strings.Fields(string(text[strings.LastIndex(string(text), ")")+1:]))
		for _, field := range fields[11:13] {
			ticks, err := strconv.ParseInt(field, 10, 64)
			require.NoError(s.t, err)
			used[at] += time.Duration(ticks) * 10 * time.Millisecond
		}
	}
	return used
}

// resident is the memory that each proxy has resident, in KiB.
func (s *scene) resident() [2]float64 {
	var kib [2]float64
	for at, proxy := range s.proxies {
		kib[at] = float64(proxy.ResidentBytes(s.t)) / 1024
	}
	return kib
}
