package interop

import (
	"testing"

	"github.com/networkservicemesh/sdk/pkg/networkservice/chains/client"
	"github.com/networkservicemesh/sdk/pkg/networkservice/utils/count"
	"github.com/networkservicemesh/sdk/pkg/tools/sandbox"
	"github.com/stretchr/testify/require"

	"proxy-nsmgr/tests/interop/harness"
)

// Our NSMgr and registry beside somebody else's proxy: names of other domains go there as they are,
// and our agent asks no DNS.
func TestRegistryProxyOfOthers(t *testing.T) {
	m := newMesh(t, joint{client: harness.Real, endpoint: harness.Real}.of)
	counter := new(count.Server)
	m.serve(endpoint, counter)
	agent := harness.StartAgent(t, harness.AgentConfig{
		Domain: "one.example",
		Extra:  map[string]any{"registry_proxy_url": m.one.ProxyURL.String()},
	})

	// Our registry's answer leads to that proxy, not to us.
	endpoints := harness.EndpointRegistry(m.ctx, agent.RegistryURL())
	found := findEndpoints(m.ctx, t, endpoints, nse("", m.two.Service(service)))
	require.Len(t, found, 1)
	require.Equal(t, m.two.Service(endpoint), found[0].GetName())
	require.Equal(t, m.one.ProxyURL.String(), found[0].GetUrl())

	// nsc, our agent, proxy1, proxy2, nsmgr2, forwarder2, nse.
	asking := client.NewClient(m.ctx,
		client.WithClientURL(agent.NSMgrURL()),
		client.WithDialOptions(sandbox.DialOptions()...),
		client.WithDialTimeout(sandbox.DialTimeout),
		client.WithoutRefresh())
	connection := requestTwice(m.ctx, t, asking, m.request())
	names := harness.Names(connection)
	require.Len(t, names, interdomainSegments-1)
	require.Equal(t, agent.Name, names[1])
	require.Equal(t, m.two.Service(endpoint), connection.GetNetworkServiceEndpointName())
	m.close(asking, connection)
	require.Equal(t, 1, counter.Closes())
	harness.WaitUntilEmpty(t, agent)
}
