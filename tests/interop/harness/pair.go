package harness

import (
	"context"
	"testing"

	"github.com/networkservicemesh/api/pkg/api/networkservice"
	"github.com/networkservicemesh/api/pkg/api/registry"
	"github.com/networkservicemesh/sdk/pkg/networkservice/chains/client"
	"github.com/networkservicemesh/sdk/pkg/tools/sandbox"
)

// AgentPair is two agents that are a domain's proxy and registry each, and nothing around them: a
// client at one of them and a bare peer behind the other see every byte that the agents send.
type AgentPair struct {
	DNS *DNS
	// One is the client's proxy, Two the endpoint's.
	One, Two *Agent
}

// Domains of an AgentPair.
const (
	DomainOne = "one.example"
	DomainTwo = "two.example"
)

// NewAgentPair starts both; configure, if given, changes their configurations.
func NewAgentPair(t testing.TB, configure func(one, two *AgentConfig)) *AgentPair {
	t.Helper()
	dns := NewDNS(t)
	one := AgentConfig{Name: "proxy-one", Domain: DomainOne, DNS: dns}
	two := AgentConfig{Name: "proxy-two", Domain: DomainTwo, DNS: dns}
	if configure != nil {
		configure(&one, &two)
	}
	pair := &AgentPair{DNS: dns, One: StartAgent(t, one), Two: StartAgent(t, two)}
	for domain, agent := range map[string]*Agent{DomainOne: pair.One, DomainTwo: pair.Two} {
		dns.Publish(domain, RegistryService, agent.RegistryURL())
		dns.Publish(domain, ProxyService, agent.ProxyURL())
	}
	return pair
}

// Serve registers peer in domain two as the endpoint of service.
func (a *AgentPair) Serve(ctx context.Context, t testing.TB, peer *Peer, service string) {
	t.Helper()
	_, err := ServiceRegistry(ctx, a.Two.RegistryURL()).
		Register(ctx, &registry.NetworkService{Name: service})
	if err != nil {
		t.Fatalf("register service %s: %v", service, err)
	}
	_, err = EndpointRegistry(ctx, a.Two.RegistryURL()).Register(ctx, &registry.NetworkServiceEndpoint{
		Name: peer.Name, NetworkServiceNames: []string{service}, Url: peer.URL.String(),
	})
	if err != nil {
		t.Fatalf("register endpoint %s: %v", peer.Name, err)
	}
}

// Client is an sdk client chain that asks agent one as the client's node would.
func (a *AgentPair) Client(ctx context.Context, options ...client.Option) networkservice.NetworkServiceClient {
	return client.NewClient(ctx, append([]client.Option{
		client.WithClientURL(a.One.ProxyURL()),
		client.WithDialOptions(sandbox.DialOptions()...),
		client.WithDialTimeout(sandbox.DialTimeout),
		client.WithoutRefresh(),
	}, options...)...)
}

// Discover finds the endpoint of service as the client's node does: the name to ask for.
func (a *AgentPair) Discover(ctx context.Context, t testing.TB, service string) string {
	t.Helper()
	stream, err := EndpointRegistry(ctx, a.One.RegistryURL()).Find(ctx,
		&registry.NetworkServiceEndpointQuery{NetworkServiceEndpoint: &registry.NetworkServiceEndpoint{
			NetworkServiceNames: []string{service},
		}})
	if err != nil {
		t.Fatalf("find %s: %v", service, err)
	}
	found := registry.ReadNetworkServiceEndpointList(stream)
	if len(found) != 1 {
		t.Fatalf("found %d endpoints of %s: %v", len(found), service, found)
	}
	return found[0].GetName()
}
