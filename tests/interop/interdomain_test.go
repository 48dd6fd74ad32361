package interop

import (
	"context"
	"testing"
	"time"

	"github.com/networkservicemesh/api/pkg/api/networkservice"
	"github.com/networkservicemesh/api/pkg/api/registry"
	"github.com/networkservicemesh/sdk/pkg/networkservice/utils/checks/checkrequest"
	"github.com/networkservicemesh/sdk/pkg/networkservice/utils/count"
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

func testContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	t.Cleanup(cancel)
	return ctx
}

func TestTwoDomains(t *testing.T) {
	for _, test := range []struct {
		name             string
		client, endpoint harness.ProxyKind
	}{
		{"ours and ours", harness.Ours, harness.Ours},
		{"ours at the client, real at the endpoint", harness.Ours, harness.Real},
		{"real at the client, ours at the endpoint", harness.Real, harness.Ours},
	} {
		t.Run(test.name, func(t *testing.T) {
			ctx := testContext(t)
			dns := harness.NewDNS(t)
			one := harness.NewDomain(ctx, t,
				harness.DomainConfig{Name: "one.example", DNS: dns, Proxy: test.client})
			two := harness.NewDomain(ctx, t,
				harness.DomainConfig{Name: "two.example", DNS: dns, Proxy: test.endpoint})
			two.RegisterService(ctx, t, &registry.NetworkService{Name: service})
			counter := new(count.Server)
			two.Nodes[0].NewEndpoint(ctx, &registry.NetworkServiceEndpoint{
				Name:                endpoint,
				NetworkServiceNames: []string{service},
			}, sandbox.GenerateTestToken, counter, checkrequest.NewServer(t,
				func(t *testing.T, request *networkservice.NetworkServiceRequest) {
					require.Equal(t, service, request.GetConnection().GetNetworkService())
					require.Equal(t, endpoint, request.GetConnection().GetNetworkServiceEndpointName())
				}))

			client := one.Nodes[0].NewClient(ctx, sandbox.GenerateTestToken)
			request := harness.RequestFor("id", two.Service(service))
			connection, err := client.Request(ctx, request)
			require.NoError(t, err)
			names := harness.Names(connection)
			require.Len(t, names, interdomainSegments)
			require.Equal(t, endpoint, names[interdomainSegments-1])
			require.Equal(t, two.Service(service), connection.GetNetworkService())
			require.Equal(t, two.Service(endpoint), connection.GetNetworkServiceEndpointName())

			refreshed, err := client.Request(ctx, harness.Refresh(request, connection))
			require.NoError(t, err)
			require.Equal(t, connection.GetId(), refreshed.GetId())
			require.Equal(t, 2, counter.Requests())
			require.Equal(t, 1, counter.UniqueRequests())
			for at, segment := range connection.GetPath().GetPathSegments() {
				now := refreshed.GetPath().GetPathSegments()[at]
				require.Equal(t, segment.GetName(), now.GetName())
				require.Equal(t, segment.GetId(), now.GetId(), "id of %s", now.GetName())
			}

			_, err = client.Close(ctx, refreshed)
			require.NoError(t, err)
			require.Equal(t, 1, counter.Closes())
			for _, domain := range []*harness.Domain{one, two} {
				if domain.Agent != nil {
					harness.WaitUntilEmpty(t, domain.Agent)
				}
			}
		})
	}
}
