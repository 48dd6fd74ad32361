package interop

import (
	"context"
	"testing"

	"github.com/networkservicemesh/api/pkg/api/networkservice"
	"github.com/networkservicemesh/api/pkg/api/registry"
	"github.com/networkservicemesh/sdk/pkg/tools/sandbox"
	"github.com/stretchr/testify/require"

	"proxy-nsmgr/tests/interop/harness"
)

// joint is a way to join two domains: the proxy of the client's and that of the endpoint's.
type joint struct {
	name             string
	client, endpoint harness.ProxyKind
}

// pairs are the ways to join two domains in which we have a part.
var pairs = []joint{
	{"ours and ours", harness.Ours, harness.Ours},
	{"ours at the client and real at the endpoint", harness.Ours, harness.Real},
	{"real at the client and ours at the endpoint", harness.Real, harness.Ours},
}

// onEach runs a test for each way to join two domains.
func onEach(t *testing.T, joints []joint, test func(*testing.T, joint)) {
	t.Helper()
	for _, joint := range joints {
		t.Run(joint.name, func(t *testing.T) { test(t, joint) })
	}
}

// of makes these the proxies of two domains.
func (j joint) of(one, two *harness.DomainConfig) {
	one.Proxy, two.Proxy = j.client, j.endpoint
}

// mesh is two domains of real components: the client's and the endpoint's.
type mesh struct {
	t        *testing.T
	ctx      context.Context
	dns      *harness.DNS
	one, two *harness.Domain
}

// newMesh builds both domains, with our agent in each proxy's place unless change says otherwise.
func newMesh(t *testing.T, change ...func(one, two *harness.DomainConfig)) *mesh {
	t.Helper()
	m := &mesh{t: t, ctx: testContext(t), dns: harness.NewDNS(t)}
	one := harness.DomainConfig{Name: "one.example", DNS: m.dns}
	two := harness.DomainConfig{Name: "two.example", DNS: m.dns}
	for _, change := range change {
		change(&one, &two)
	}
	m.one, m.two = harness.NewDomain(m.ctx, t, one), harness.NewDomain(m.ctx, t, two)
	return m
}

// floating adds a domain that is a registry only.
func (m *mesh) floating() *harness.Domain {
	m.t.Helper()
	return harness.NewDomain(m.ctx, m.t,
		harness.DomainConfig{Name: floatingName, DNS: m.dns, Proxy: harness.Floating})
}

// serve starts an endpoint of service on the first node of domain two.
func (m *mesh) serve(
	name string, functionality ...networkservice.NetworkServiceServer,
) *sandbox.EndpointEntry {
	m.t.Helper()
	m.two.RegisterService(m.ctx, m.t, &registry.NetworkService{Name: service})
	return m.two.Nodes[0].NewEndpoint(m.ctx, nse(name, service), sandbox.GenerateTestToken, functionality...)
}

// healingClient is a client of domain one as NSM's own are.
func (m *mesh) healingClient() networkservice.NetworkServiceClient {
	return m.one.Nodes[0].NewClient(m.ctx, sandbox.GenerateTestToken)
}

// request asks for service of domain two.
func (m *mesh) request() *networkservice.NetworkServiceRequest {
	return harness.RequestFor("id", m.two.Service(service))
}

// close closes a connection that was granted.
func (m *mesh) close(
	client networkservice.NetworkServiceClient, connection *networkservice.Connection,
) {
	m.t.Helper()
	_, err := client.Close(m.ctx, connection)
	require.NoError(m.t, err)
}

// end closes the last connection: nothing is left in the agents.
func (m *mesh) end(
	client networkservice.NetworkServiceClient, connection *networkservice.Connection,
) {
	m.t.Helper()
	m.close(client, connection)
	waitUntilEmpty(m.t, m.one, m.two)
}

// bare is two agents without real components around them: a bare client at one, a bare peer that is
// the endpoint of service behind the other.
type bare struct {
	*harness.AgentPair
	t    *testing.T
	ctx  context.Context
	peer *harness.Peer
}

// onRequest is how a peer answers.
type onRequest = func(
	context.Context, *harness.Peer, *networkservice.NetworkServiceRequest,
) (*networkservice.Connection, error)

// granting is a peer that grants what it is asked, with a change of its own.
func granting(change func(*networkservice.NetworkServiceRequest, *networkservice.Connection)) harness.PeerConfig {
	return harness.PeerConfig{Name: endpoint, OnRequest: func(
		_ context.Context, p *harness.Peer, request *networkservice.NetworkServiceRequest,
	) (*networkservice.Connection, error) {
		connection := p.Grant(request)
		change(request, connection)
		return connection, nil
	}}
}

// cuttingOff is a peer whose connections break while it answers.
func cuttingOff() harness.PeerConfig {
	return harness.PeerConfig{Name: endpoint, OnRequest: func(
		_ context.Context, p *harness.Peer, request *networkservice.NetworkServiceRequest,
	) (*networkservice.Connection, error) {
		p.CutConnections()
		return p.Grant(request), nil
	}}
}

// mappedAddresses gives both agents the IP map of their domain.
func mappedAddresses(one, two *harness.AgentConfig) {
	one.MapIP = map[string]string{internalOne: publicOne}
	two.MapIP = map[string]string{internalTwo: publicTwo}
}

// newBare starts both agents and the peer; configure, if given, changes the agents' configurations.
func newBare(
	t *testing.T, configure func(one, two *harness.AgentConfig), config harness.PeerConfig,
) *bare {
	t.Helper()
	config.Name = endpoint
	b := newBarePair(t, configure)
	b.serveBy(harness.StartPeer(t, config))
	return b
}

// newBarePair starts both agents, without an endpoint.
func newBarePair(t *testing.T, configure func(one, two *harness.AgentConfig)) *bare {
	t.Helper()
	return &bare{AgentPair: harness.NewAgentPair(t, configure), t: t, ctx: testContext(t)}
}

// serveBy makes the peer the endpoint of service in domain two.
func (b *bare) serveBy(peer *harness.Peer) {
	b.t.Helper()
	b.peer = peer
	b.Serve(b.ctx, b.t, peer, service)
}

// request asks for the endpoint of service that is found in a domain.
func (b *bare) request(id, domain string) *networkservice.NetworkServiceRequest {
	b.t.Helper()
	request := harness.RequestFor(id, service+"@"+domain)
	request.Connection.NetworkServiceEndpointName = b.Discover(b.ctx, b.t, service+"@"+domain)
	return request
}

// close closes a connection that was granted.
func (b *bare) close(
	client networkservice.NetworkServiceClient, connection *networkservice.Connection,
) {
	b.t.Helper()
	_, err := client.Close(b.ctx, connection)
	require.NoError(b.t, err)
}

// waitUntilEmpty waits until the agents hold no connection.
func (b *bare) waitUntilEmpty() {
	b.t.Helper()
	harness.WaitUntilEmpty(b.t, b.One, b.Two)
}
