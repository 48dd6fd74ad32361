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
	for _, test := range pairs {
		t.Run(test.name, func(t *testing.T) {
			ctx := testContext(t)
			dns := harness.NewDNS(t)
			one := harness.NewDomain(ctx, t,
				harness.DomainConfig{Name: "one.example", DNS: dns, Proxy: test.client})
			two := harness.NewDomain(ctx, t,
				harness.DomainConfig{Name: "two.example", DNS: dns, Proxy: test.endpoint})
			two.RegisterService(ctx, t, &registry.NetworkService{Name: service})
			counter := new(count.Server)
			two.Nodes[0].NewEndpoint(ctx, nse(endpoint, service), sandbox.GenerateTestToken,
				counter, checkrequest.NewServer(t,
					func(t *testing.T, request *networkservice.NetworkServiceRequest) {
						connection := request.GetConnection()
						require.Equal(t, service, connection.GetNetworkService())
						require.Equal(t, endpoint, connection.GetNetworkServiceEndpointName())
					}))

			client := one.Nodes[0].NewClient(ctx, sandbox.GenerateTestToken)
			connection := requestTwice(ctx, t, client, harness.RequestFor("id", two.Service(service)))
			require.Len(t, harness.Names(connection), interdomainSegments)
			require.Equal(t, endpoint, endpointOf(connection))
			require.Equal(t, two.Service(service), connection.GetNetworkService())
			require.Equal(t, two.Service(endpoint), connection.GetNetworkServiceEndpointName())
			require.Equal(t, 2, counter.Requests())
			require.Equal(t, 1, counter.UniqueRequests())

			_, err := client.Close(ctx, connection)
			require.NoError(t, err)
			require.Equal(t, 1, counter.Closes())
			waitUntilEmpty(t, one, two)
		})
	}
}

// Two nodes have an endpoint each; the service's matches choose by the client's labels, which pass
// through both proxies with the names that they are keyed by.
func TestLabelsChooseAmongNodes(t *testing.T) {
	for _, test := range pairs {
		t.Run(test.name, func(t *testing.T) {
			ctx := testContext(t)
			dns := harness.NewDNS(t)
			one := harness.NewDomain(ctx, t,
				harness.DomainConfig{Name: "one.example", DNS: dns, Proxy: test.client})
			two := harness.NewDomain(ctx, t, harness.DomainConfig{
				Name: "two.example", DNS: dns, Proxy: test.endpoint, Nodes: 2,
			})
			two.RegisterService(ctx, t, &registry.NetworkService{
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
				two.Nodes[at].NewEndpoint(ctx, registration, sandbox.GenerateTestToken)
			}
			client := one.Nodes[0].NewClient(ctx, sandbox.GenerateTestToken)
			for at, want := range []struct {
				labels   map[string]string
				endpoint string
			}{
				{map[string]string{"zone": "a"}, "nse-red"},
				{map[string]string{"zone": "b", "color": "blue"}, "nse-blue"},
				{map[string]string{"zone": "b", "color": "red"}, "nse-red"},
			} {
				request := harness.RequestFor(fmt.Sprint("id-", at), two.Service(service))
				request.Connection.Labels = want.labels
				connection := requestTwice(ctx, t, client, request)
				require.Equal(t, want.endpoint, endpointOf(connection), "labels %v", want.labels)
				_, err := client.Close(ctx, connection)
				require.NoError(t, err)
			}
			waitUntilEmpty(t, one, two)
		})
	}
}

// Two endpoints of different nodes and services, at the same time.
func TestTwoServicesOnTwoNodes(t *testing.T) {
	ctx := testContext(t)
	dns := harness.NewDNS(t)
	one := harness.NewDomain(ctx, t, harness.DomainConfig{Name: "one.example", DNS: dns})
	two := harness.NewDomain(ctx, t, harness.DomainConfig{Name: "two.example", DNS: dns, Nodes: 2})
	client := one.Nodes[0].NewClient(ctx, sandbox.GenerateTestToken)
	var open []*networkservice.Connection
	for at := range two.Nodes {
		name := fmt.Sprint(service, "-", at)
		two.RegisterService(ctx, t, &registry.NetworkService{Name: name})
		two.Nodes[at].NewEndpoint(ctx, nse(fmt.Sprint(endpoint, "-", at), name), sandbox.GenerateTestToken)
		connection := requestTwice(ctx, t, client, harness.RequestFor(name, two.Service(name)))
		require.Len(t, harness.Names(connection), interdomainSegments)
		require.Equal(t, fmt.Sprint(endpoint, "-", at), endpointOf(connection))
		open = append(open, connection)
	}
	require.Equal(t, 2, one.Agent.OpenConnections(t))
	require.Equal(t, 2, two.Agent.OpenConnections(t))
	for _, connection := range open {
		_, err := client.Close(ctx, connection)
		require.NoError(t, err)
	}
	waitUntilEmpty(t, one, two)
}

// A domain may be named by the address at which it is served, without any DNS.
func TestDomainsByAddress(t *testing.T) {
	ctx := testContext(t)
	pair := harness.NewAgentPair(t, nil)
	peer := harness.StartPeer(t, harness.PeerConfig{Name: endpoint})
	pair.Serve(ctx, t, peer, service)
	for _, domain := range []string{pair.Two.IP, pair.Two.ProxyURL().Host, pair.Two.RegistryURL().Host} {
		t.Run(domain, func(t *testing.T) {
			request := harness.RequestFor(domain, service+"@"+domain)
			request.Connection.NetworkServiceEndpointName = pair.Discover(ctx, t, service+"@"+domain)
			require.Equal(t, endpoint+"@"+domain, request.GetConnection().GetNetworkServiceEndpointName())
			client := pair.Client(ctx)
			connection, err := client.Request(ctx, request)
			require.NoError(t, err)
			require.Equal(t, endpoint, endpointOf(connection))
			_, err = client.Close(ctx, connection)
			require.NoError(t, err)
		})
	}
	harness.WaitUntilEmpty(t, pair.One, pair.Two)
}
