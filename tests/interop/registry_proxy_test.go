package interop

import (
	"testing"

	"github.com/networkservicemesh/api/pkg/api/registry"
	"github.com/networkservicemesh/sdk/pkg/networkservice/chains/client"
	"github.com/networkservicemesh/sdk/pkg/networkservice/utils/count"
	registryclient "github.com/networkservicemesh/sdk/pkg/registry/chains/client"
	"github.com/networkservicemesh/sdk/pkg/tools/sandbox"
	"github.com/stretchr/testify/require"

	"proxy-nsmgr/tests/interop/harness"
)

// Our NSMgr and registry beside somebody else's proxy: names of other domains go there as they are,
// and nobody asks DNS here.
func TestRegistryProxyOfOthers(t *testing.T) {
	ctx := testContext(t)
	dns := harness.NewDNS(t)
	one := harness.NewDomain(ctx, t,
		harness.DomainConfig{Name: "one.example", DNS: dns, Proxy: harness.Real})
	two := harness.NewDomain(ctx, t,
		harness.DomainConfig{Name: "two.example", DNS: dns, Proxy: harness.Real})
	two.RegisterService(ctx, t, &registry.NetworkService{Name: service})
	counter := new(count.Server)
	two.Nodes[0].NewEndpoint(ctx, nse(endpoint, service), sandbox.GenerateTestToken, counter)
	agent := harness.StartAgent(t, harness.AgentConfig{
		Domain: "one.example",
		Extra:  map[string]any{"registry_proxy_url": one.ProxyURL.String()},
	})

	// Whoever asks our registry is sent to that proxy, not to us.
	endpoints := registryclient.NewNetworkServiceEndpointRegistryClient(ctx,
		registryclient.WithClientURL(agent.RegistryURL()),
		registryclient.WithDialOptions(sandbox.DialOptions()...))
	stream, err := endpoints.Find(ctx, &registry.NetworkServiceEndpointQuery{
		NetworkServiceEndpoint: &registry.NetworkServiceEndpoint{
			NetworkServiceNames: []string{two.Service(service)},
		},
	})
	require.NoError(t, err)
	found := registry.ReadNetworkServiceEndpointList(stream)
	require.Len(t, found, 1)
	require.Equal(t, two.Service(endpoint), found[0].GetName())
	require.Equal(t, one.ProxyURL.String(), found[0].GetUrl())

	// nsc, our agent, proxy1, proxy2, nsmgr2, forwarder2, nse.
	asking := client.NewClient(ctx,
		client.WithClientURL(agent.NSMgrURL()),
		client.WithDialOptions(sandbox.DialOptions()...),
		client.WithDialTimeout(sandbox.DialTimeout),
		client.WithoutRefresh())
	connection := requestTwice(ctx, t, asking, harness.RequestFor("id", two.Service(service)))
	names := harness.Names(connection)
	require.Len(t, names, interdomainSegments-1)
	require.Equal(t, agent.Name, names[1])
	require.Equal(t, two.Service(endpoint), connection.GetNetworkServiceEndpointName())
	_, err = asking.Close(ctx, connection)
	require.NoError(t, err)
	require.Equal(t, 1, counter.Closes())
	harness.WaitUntilEmpty(t, agent)
}
