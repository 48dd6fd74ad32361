package interop

import (
	"fmt"
	"testing"

	"github.com/networkservicemesh/api/pkg/api/registry"
	"github.com/networkservicemesh/sdk/pkg/networkservice/utils/count"
	"github.com/networkservicemesh/sdk/pkg/tools/sandbox"
	"github.com/stretchr/testify/require"

	"proxy-nsmgr/tests/interop/harness"
)

const floatingName = "floating.example"

// A floating domain is a registry that belongs to no cluster: what is registered there is found
// from anywhere and served by the cluster that registered it.
func TestFloating(t *testing.T) {
	onEach(t, pairs, func(t *testing.T, joint joint) {
		m := newMesh(t, joint.of)
		floating := m.floating()
		m.two.RegisterService(m.ctx, t, &registry.NetworkService{Name: floating.Service(service)})
		counter := new(count.Server)
		registration := nse(floating.Service(endpoint), floating.Service(service))
		entry := m.two.Nodes[0].NewEndpoint(m.ctx, registration.Clone(), sandbox.GenerateTestToken, counter)

		// The floating registry has the bare names, and the URL of the proxy that serves them.
		found := findEndpoints(m.ctx, t, endpointRegistry(m.ctx, floating), nse("", service))
		require.Len(t, found, 1)
		require.Equal(t, endpoint, found[0].GetName())
		require.Equal(t, m.two.ProxyURL.String(), found[0].GetUrl())

		client := m.healingClient()
		request := harness.RequestFor("id", floating.Service(service))
		connection := requestTwice(m.ctx, t, client, request)
		require.Len(t, harness.Names(connection), interdomainSegments)
		require.Equal(t, floating.Service(endpoint), endpointOf(connection))
		require.Equal(t, floating.Service(service), connection.GetNetworkService())
		m.close(client, connection)
		require.Equal(t, 1, counter.Closes())
		waitUntilEmpty(t, m.one, m.two)

		_, err := entry.NetworkServiceEndpointRegistryClient.Unregister(m.ctx, registration)
		require.NoError(t, err)
		require.Empty(t, findEndpoints(m.ctx, t, endpointRegistry(m.ctx, floating), nse("", service)))
	})
}

// One client, endpoints of two clusters, one floating registry.
func TestFloatingFourDomains(t *testing.T) {
	for _, test := range []struct {
		name    string
		proxies [3]harness.ProxyKind
	}{
		{"all ours", [3]harness.ProxyKind{harness.Ours, harness.Ours, harness.Ours}},
		{"one endpoint's is real", [3]harness.ProxyKind{harness.Ours, harness.Ours, harness.Real}},
		{"the client's is real", [3]harness.ProxyKind{harness.Real, harness.Ours, harness.Ours}},
	} {
		t.Run(test.name, func(t *testing.T) {
			ctx := testContext(t)
			dns := harness.NewDNS(t)
			floating := harness.NewDomain(ctx, t,
				harness.DomainConfig{Name: floatingName, DNS: dns, Proxy: harness.Floating})
			var domains []*harness.Domain
			for at, kind := range test.proxies {
				domain := harness.NewDomain(ctx, t, harness.DomainConfig{
					Name: fmt.Sprintf("domain-%d.example", at), DNS: dns, Proxy: kind,
				})
				domains = append(domains, domain)
				if at == 0 {
					continue
				}
				name := floating.Service(fmt.Sprint(service, "-", at))
				domain.RegisterService(ctx, t, &registry.NetworkService{Name: name})
				// An endpoint whose services are bare is of its own name's domain, says the sdk.
				domain.Nodes[0].NewEndpoint(ctx,
					nse(floating.Service(fmt.Sprint(endpoint, "-", at)), fmt.Sprint(service, "-", at)),
					sandbox.GenerateTestToken)
			}
			client := domains[0].Nodes[0].NewClient(ctx, sandbox.GenerateTestToken)
			for at := range domains[1:] {
				name := floating.Service(fmt.Sprint(service, "-", at+1))
				connection := requestTwice(ctx, t, client, harness.RequestFor(name, name))
				require.Len(t, harness.Names(connection), interdomainSegments)
				require.Equal(t, floating.Service(fmt.Sprint(endpoint, "-", at+1)), endpointOf(connection))
				_, err := client.Close(ctx, connection)
				require.NoError(t, err)
			}
			waitUntilEmpty(t, domains...)
		})
	}
}

// An endpoint leaves its domain's registry for a floating one: it is found there, and not where it
// was, though every proxy had learnt the old way.
func TestEndpointMovesToFloating(t *testing.T) {
	m := newMesh(t)
	floating := m.floating()
	m.two.RegisterService(m.ctx, t, &registry.NetworkService{Name: floating.Service(service)})
	client := plainClient(m.ctx, m.one.Nodes[0])

	entry := m.serve(endpoint)
	connection := requestTwice(m.ctx, t, client, m.request())
	require.Equal(t, endpoint, endpointOf(connection))
	m.close(client, connection)
	_, err := entry.NetworkServiceEndpointRegistryClient.Unregister(m.ctx, nse(endpoint, service))
	require.NoError(t, err)
	entry.Cancel()

	m.two.Nodes[0].NewEndpoint(m.ctx, nse(floating.Service(endpoint), floating.Service(service)),
		sandbox.GenerateTestToken)
	connection = requestTwice(m.ctx, t, client, harness.RequestFor("id", floating.Service(service)))
	require.Equal(t, floating.Service(endpoint), endpointOf(connection))
	m.close(client, connection)
	require.Empty(t,
		findEndpoints(m.ctx, t, endpointRegistry(m.ctx, m.one), nse("", m.two.Service(service))))
	waitUntilEmpty(t, m.one, m.two)
}
