package interop

import (
	"fmt"
	"testing"

	"github.com/networkservicemesh/api/pkg/api/networkservice"
	"github.com/networkservicemesh/api/pkg/api/registry"
	"github.com/networkservicemesh/sdk/pkg/networkservice/utils/checks/checkrequest"
	"github.com/networkservicemesh/sdk/pkg/networkservice/utils/count"
	"github.com/networkservicemesh/sdk/pkg/tools/sandbox"
	"github.com/stretchr/testify/require"

	"proxy-nsmgr/tests/interop/harness"
)

func TestTwoDomains(t *testing.T) {
	onEach(t, pairs, func(t *testing.T, joint joint) {
		m := newMesh(t, joint.of)
		counter := new(count.Server)
		m.serve(endpoint, counter, checkrequest.NewServer(t,
			func(t *testing.T, request *networkservice.NetworkServiceRequest) {
				connection := request.GetConnection()
				require.Equal(t, service, connection.GetNetworkService())
				require.Equal(t, endpoint, connection.GetNetworkServiceEndpointName())
			}))

		client := m.healingClient()
		connection := requestTwice(m.ctx, t, client, m.request())
		require.Len(t, harness.Names(connection), interdomainSegments)
		require.Equal(t, endpoint, endpointOf(connection))
		require.Equal(t, m.two.Service(service), connection.GetNetworkService())
		require.Equal(t, m.two.Service(endpoint), connection.GetNetworkServiceEndpointName())
		require.Equal(t, 2, counter.Requests())
		require.Equal(t, 1, counter.UniqueRequests())

		m.close(client, connection)
		require.Equal(t, 1, counter.Closes())
		waitUntilEmpty(t, m.one, m.two)
	})
}

// Two nodes have an endpoint each; the service's matches choose by the client's labels, which pass
// through both proxies with the names that they are keyed by.
func TestLabelsChooseAmongNodes(t *testing.T) {
	onEach(t, pairs, func(t *testing.T, joint joint) {
		m := newMesh(t, joint.of, func(_, two *harness.DomainConfig) { two.Nodes = 2 })
		m.two.RegisterService(m.ctx, t, &registry.NetworkService{
			Name: service,
			Matches: []*registry.Match{{
				SourceSelector: map[string]string{"zone": "b"},
				Routes: []*registry.Destination{
					{DestinationSelector: map[string]string{"color": "{{.color}}"}},
				},
			}, {
				Routes: []*registry.Destination{
					{DestinationSelector: map[string]string{"color": "red"}},
				},
			}},
		})
		for at, color := range []string{"red", "blue"} {
			registration := nse("nse-"+color, service)
			registration.NetworkServiceLabels = map[string]*registry.NetworkServiceLabels{
				service: {Labels: map[string]string{"color": color}},
			}
			m.two.Nodes[at].NewEndpoint(m.ctx, registration, sandbox.GenerateTestToken)
		}
		client := m.healingClient()
		for at, want := range []struct {
			labels   map[string]string
			endpoint string
		}{
			{map[string]string{"zone": "a"}, "nse-red"},
			{map[string]string{"zone": "b", "color": "blue"}, "nse-blue"},
			{map[string]string{"zone": "b", "color": "red"}, "nse-red"},
		} {
			request := harness.RequestFor(fmt.Sprint("id-", at), m.two.Service(service))
			request.Connection.Labels = want.labels
			connection := requestTwice(m.ctx, t, client, request)
			require.Equal(t, want.endpoint, endpointOf(connection), "labels %v", want.labels)
			m.close(client, connection)
		}
		waitUntilEmpty(t, m.one, m.two)
	})
}

// Two endpoints of different nodes and services, at the same time.
func TestTwoServicesOnTwoNodes(t *testing.T) {
	m := newMesh(t, func(_, two *harness.DomainConfig) { two.Nodes = 2 })
	client := m.healingClient()
	var open []*networkservice.Connection
	for at, node := range m.two.Nodes {
		name := fmt.Sprint(service, "-", at)
		m.two.RegisterService(m.ctx, t, &registry.NetworkService{Name: name})
		node.NewEndpoint(m.ctx, nse(fmt.Sprint(endpoint, "-", at), name), sandbox.GenerateTestToken)
		connection := requestTwice(m.ctx, t, client, harness.RequestFor(name, m.two.Service(name)))
		require.Len(t, harness.Names(connection), interdomainSegments)
		require.Equal(t, fmt.Sprint(endpoint, "-", at), endpointOf(connection))
		open = append(open, connection)
	}
	require.Equal(t, 2, m.one.Agent.OpenConnections(t))
	require.Equal(t, 2, m.two.Agent.OpenConnections(t))
	for _, connection := range open {
		m.close(client, connection)
	}
	waitUntilEmpty(t, m.one, m.two)
}

// A domain may be named by the address at which it is served, without any DNS.
func TestDomainsByAddress(t *testing.T) {
	b := newBare(t, nil, harness.PeerConfig{})
	for _, domain := range []string{b.Two.IP, b.Two.ProxyURL().Host, b.Two.RegistryURL().Host} {
		t.Run(domain, func(t *testing.T) {
			request := b.request(domain, domain)
			require.Equal(t, endpoint+"@"+domain, request.GetConnection().GetNetworkServiceEndpointName())
			client := b.Client(b.ctx)
			connection, err := client.Request(b.ctx, request)
			require.NoError(t, err)
			require.Equal(t, endpoint, endpointOf(connection))
			b.close(client, connection)
		})
	}
	b.waitUntilEmpty()
}
