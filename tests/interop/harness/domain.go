package harness

import (
	"context"
	"net/url"
	"testing"
	"time"

	"github.com/networkservicemesh/sdk/pkg/networkservice/chains/nsmgr"
	"github.com/networkservicemesh/sdk/pkg/networkservice/chains/nsmgrproxy"
	"github.com/networkservicemesh/sdk/pkg/registry"
	"github.com/networkservicemesh/sdk/pkg/registry/chains/memory"
	"github.com/networkservicemesh/sdk/pkg/registry/chains/proxydns"
	"github.com/networkservicemesh/sdk/pkg/registry/common/dnsresolve"
	"github.com/networkservicemesh/sdk/pkg/tools/sandbox"
	"github.com/networkservicemesh/sdk/pkg/tools/token"
	"google.golang.org/grpc"
)

// ProxyKind says what joins a domain to others.
type ProxyKind int

const (
	// Ours is one proxy-nsmgr agent in both proxies' places.
	Ours ProxyKind = iota
	// Real is the sdk's nsmgr-proxy and registry-proxy-dns.
	Real
	// Floating is no proxy at all: the domain is a registry.
	Floating
)

// DomainConfig describes a domain of real NSM components.
type DomainConfig struct {
	Name string
	DNS  *DNS
	// Proxy says what joins it to other domains.
	Proxy ProxyKind
	// Nodes is how many nodes it has, each with a real nsmgr and forwarder; one unless said.
	// A floating domain has none.
	Nodes int
	// Tokens makes the tokens of every real component; the sandbox's own (HS256) by default.
	Tokens token.GeneratorFunc
	// MapIP is the proxy's IP map, internal to external.
	MapIP map[string]string
	// Configure changes our agent's configuration before it starts.
	Configure func(*AgentConfig)
	// NodeSetup replaces the default nsmgr and forwarder of each node.
	NodeSetup sandbox.SetupNodeFunc
}

// Domain is a domain of real NSM components, joined to others by its proxy.
type Domain struct {
	*sandbox.Domain
	// Agent is our proxy; nil unless the domain's proxy is ours.
	Agent *Agent
	// ProxyURL is the proxy's URL, ours or real.
	ProxyURL *url.URL
}

// Service is name as other domains ask for it.
func (d *Domain) Service(name string) string {
	return name + "@" + d.Name
}

// NewDomain builds a domain and publishes it in its DNS.
func NewDomain(ctx context.Context, t *testing.T, config DomainConfig) *Domain {
	t.Helper()
	tokens := config.Tokens
	if tokens == nil {
		tokens = sandbox.GenerateTestToken
	}
	builder := sandbox.NewBuilder(ctx, t).
		SetDNSDomainName(config.Name).
		SetTokenGenerateFunc(tokens)
	if config.NodeSetup != nil {
		builder.SetNodeSetup(config.NodeSetup)
	}
	nodes := max(config.Nodes, 1)
	switch config.Proxy {
	case Ours:
		return newDomainWithAgent(ctx, t, config, builder.SetNodesCount(nodes))
	case Real:
		return newRealDomain(t, config, builder.SetNodesCount(nodes))
	case Floating:
		builder.SetNodesCount(0).SetNSMgrProxySupplier(nil).SetRegistryProxySupplier(nil)
		domain := &Domain{Domain: builder.Build()}
		config.DNS.Publish(config.Name, RegistryService, domain.Registry.URL)
		return domain
	default:
		t.Fatalf("no such kind of proxy: %d", config.Proxy)
		return nil
	}
}

// newDomainWithAgent puts one agent in the places of nsmgr-proxy and registry-proxy.
func newDomainWithAgent(
	_ context.Context, t *testing.T, config DomainConfig, builder *sandbox.Builder,
) *Domain {
	t.Helper()
	ip := LoopbackIP(t)
	proxy := (&Agent{IP: ip}).ProxyURL()
	builder.SetNSMgrProxySupplier(nil).SetRegistryProxySupplier(nil)
	builder.SetRegistrySupplier(func(
		ctx context.Context, tokens token.GeneratorFunc, expiration time.Duration, _ *url.URL,
		options ...grpc.DialOption,
	) registry.Registry {
		return memory.NewServer(ctx, tokens,
			memory.WithDefaultExpiration(expiration),
			memory.WithProxyRegistryURL(proxy),
			memory.WithDialOptions(options...))
	})
	domain := &Domain{Domain: builder.Build(), ProxyURL: proxy}
	agent := AgentConfig{
		Name:             "proxy-of-" + config.Name,
		Domain:           config.Name,
		IP:               ip,
		RegistryURL:      domain.Registry.URL.String(),
		UpstreamNSMgrURL: domain.Nodes[0].NSMgr.URL.String(),
		DNS:              config.DNS,
		MapIP:            config.MapIP,
	}
	if config.Configure != nil {
		config.Configure(&agent)
	}
	domain.Agent = StartAgent(t, agent)
	config.DNS.Publish(config.Name, RegistryService, domain.Registry.URL)
	config.DNS.Publish(config.Name, ProxyService, proxy)
	return domain
}

func newRealDomain(t *testing.T, config DomainConfig, builder *sandbox.Builder) *Domain {
	t.Helper()
	if config.MapIP != nil {
		file := shortTempDir(t) + "/map-ip.yaml"
		writeJSON(t, file, config.MapIP)
		builder.SetNSMgrProxySupplier(func(
			ctx context.Context, registryURL, proxyURL *url.URL, tokens token.GeneratorFunc,
			options ...nsmgrproxy.Option,
		) nsmgr.Nsmgr {
			return nsmgrproxy.NewServer(ctx, registryURL, proxyURL, tokens,
				append(options, nsmgrproxy.WithMapIPFilePath(file))...)
		})
	}
	// The sandbox's own resolver stays for what Build writes into it; the chain asks our DNS.
	builder.SetRegistryProxySupplier(func(
		ctx context.Context, tokens token.GeneratorFunc, _ dnsresolve.Resolver,
		options ...proxydns.Option,
	) registry.Registry {
		return proxydns.NewServer(ctx, tokens, config.DNS.Resolver(), options...)
	})
	domain := &Domain{Domain: builder.Build()}
	domain.ProxyURL = domain.NSMgrProxy.URL
	config.DNS.Publish(config.Name, RegistryService, domain.Registry.URL)
	config.DNS.Publish(config.Name, ProxyService, domain.NSMgrProxy.URL)
	return domain
}
