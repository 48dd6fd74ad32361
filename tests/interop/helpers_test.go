package interop

import (
	"context"
	"testing"
	"time"

	"github.com/networkservicemesh/api/pkg/api/networkservice"
	"github.com/networkservicemesh/api/pkg/api/registry"
	"github.com/networkservicemesh/sdk/pkg/networkservice/chains/client"
	registryclient "github.com/networkservicemesh/sdk/pkg/registry/chains/client"
	"github.com/networkservicemesh/sdk/pkg/tools/sandbox"
	"github.com/stretchr/testify/require"

	"proxy-nsmgr/tests/interop/harness"
)

const (
	service  = "icmp-responder"
	endpoint = "icmp-responder-nse"
	// deadline bounds a whole test; where all is well one takes a second or so.
	deadline = 2 * time.Minute
)

// A path through two domains has a segment for each process: nsc, nsmgr1, forwarder1, proxy1,
// proxy2, nsmgr2, forwarder2, nse. Our agent is one process, and one segment, in each proxy's place.
const interdomainSegments = 8

// A path inside a domain: nsc, nsmgr, forwarder, nse.
const domainSegments = 4

func testContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	t.Cleanup(cancel)
	return ctx
}

// nse is an endpoint named name for the services.
func nse(name string, services ...string) *registry.NetworkServiceEndpoint {
	return &registry.NetworkServiceEndpoint{Name: name, NetworkServiceNames: services}
}

// plainClient is a client chain that neither heals nor retries: what happens is what the test does.
func plainClient(
	ctx context.Context, node *sandbox.Node, options ...client.Option,
) networkservice.NetworkServiceClient {
	return client.NewClient(ctx, append([]client.Option{
		client.WithClientURL(sandbox.CloneURL(node.NSMgr.URL)),
		client.WithDialOptions(sandbox.DialOptions()...),
		client.WithDialTimeout(sandbox.DialTimeout),
		client.WithoutRefresh(),
	}, options...)...)
}

// requestTwice makes a connection and refreshes it, as a client does; the ids must stay.
func requestTwice(
	ctx context.Context, t *testing.T, client networkservice.NetworkServiceClient,
	request *networkservice.NetworkServiceRequest,
) *networkservice.Connection {
	t.Helper()
	first, err := client.Request(ctx, request)
	require.NoError(t, err)
	second, err := client.Request(ctx, harness.Refresh(request, first))
	require.NoError(t, err)
	require.Equal(t, first.GetId(), second.GetId())
	require.Equal(t, harness.Names(first), harness.Names(second))
	for at, segment := range first.GetPath().GetPathSegments() {
		now := second.GetPath().GetPathSegments()[at]
		require.Equal(t, segment.GetId(), now.GetId(), "id of %s after a refresh", now.GetName())
	}
	return second
}

// endpointOf is the name of a path's last segment.
func endpointOf(connection *networkservice.Connection) string {
	names := harness.Names(connection)
	return names[len(names)-1]
}

func waitUntilEmpty(t *testing.T, domains ...*harness.Domain) {
	t.Helper()
	for _, domain := range domains {
		if domain.Agent != nil {
			harness.WaitUntilEmpty(t, domain.Agent)
		}
	}
}

// endpointRegistry is the sdk's client of a domain's registry.
func endpointRegistry(
	ctx context.Context, domain *harness.Domain,
) registry.NetworkServiceEndpointRegistryClient {
	return registryclient.NewNetworkServiceEndpointRegistryClient(ctx,
		registryclient.WithClientURL(sandbox.CloneURL(domain.Registry.URL)),
		registryclient.WithDialOptions(sandbox.DialOptions()...))
}

// findEndpoints is what a registry knows of a query.
func findEndpoints(
	ctx context.Context, t *testing.T, client registry.NetworkServiceEndpointRegistryClient,
	query *registry.NetworkServiceEndpoint,
) []*registry.NetworkServiceEndpoint {
	t.Helper()
	stream, err := client.Find(ctx,
		&registry.NetworkServiceEndpointQuery{NetworkServiceEndpoint: query})
	require.NoError(t, err)
	return registry.ReadNetworkServiceEndpointList(stream)
}
