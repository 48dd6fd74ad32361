package interop

import (
	"context"
	"fmt"
	"sync"
	"testing"

	"github.com/golang/protobuf/ptypes/empty"
	"github.com/networkservicemesh/api/pkg/api/networkservice"
	"github.com/networkservicemesh/api/pkg/api/registry"
	"github.com/networkservicemesh/sdk/pkg/networkservice/chains/client"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/clienturl"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/connect"
	"github.com/networkservicemesh/sdk/pkg/networkservice/core/next"
	"github.com/networkservicemesh/sdk/pkg/networkservice/utils/count"
	"github.com/networkservicemesh/sdk/pkg/tools/sandbox"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"

	"proxy-nsmgr/tests/interop/harness"
)

// onward is the client of an endpoint that passes its connections on to another service. Above it
// a connection is the endpoint's own, below it the other's.
type onward struct {
	service string

	mutex     sync.Mutex
	endpoints map[string]string // by the connection's id
}

func (o *onward) Request(
	ctx context.Context, request *networkservice.NetworkServiceRequest, options ...grpc.CallOption,
) (*networkservice.Connection, error) {
	asked := request.GetConnection().Clone()
	o.turn(request.GetConnection())
	answered, err := next.Client(ctx).Request(ctx, request, options...)
	if err != nil {
		return nil, err
	}
	o.mutex.Lock()
	defer o.mutex.Unlock()
	o.endpoints[answered.GetId()] = answered.GetNetworkServiceEndpointName()
	answered.NetworkService = asked.GetNetworkService()
	answered.NetworkServiceEndpointName = asked.GetNetworkServiceEndpointName()
	return answered, nil
}

func (o *onward) Close(
	ctx context.Context, connection *networkservice.Connection, options ...grpc.CallOption,
) (*empty.Empty, error) {
	o.turn(connection)
	return next.Client(ctx).Close(ctx, connection, options...)
}

func (o *onward) turn(connection *networkservice.Connection) {
	o.mutex.Lock()
	defer o.mutex.Unlock()
	connection.NetworkService = o.service
	connection.NetworkServiceEndpointName = o.endpoints[connection.GetId()]
}

// Each domain's endpoint passes on to that of the next domain: the longest path that NSM's own
// tests know. A domain adds 8 segments, the last one 4.
func TestPassThroughFiveDomains(t *testing.T) {
	const domains = 5
	ctx := testContext(t)
	dns := harness.NewDNS(t)
	last := new(count.Server)
	var all []*harness.Domain
	for at := range domains {
		domain := harness.NewDomain(ctx, t, harness.DomainConfig{
			Name: fmt.Sprintf("domain-%d.example", at), DNS: dns,
		})
		all = append(all, domain)
		domain.RegisterService(ctx, t, &registry.NetworkService{Name: fmt.Sprint(service, "-", at)})
		functionality := []networkservice.NetworkServiceServer{last}
		if at > 0 {
			before := all[at-1].Service(fmt.Sprint(service, "-", at-1))
			functionality = []networkservice.NetworkServiceServer{
				clienturl.NewServer(domain.Nodes[0].NSMgr.URL),
				connect.NewServer(client.NewClient(ctx,
					client.WithAdditionalFunctionality(&onward{service: before, endpoints: map[string]string{}}),
					client.WithDialTimeout(sandbox.DialTimeout),
					client.WithDialOptions(sandbox.DialOptions()...),
					client.WithoutRefresh(),
				)),
			}
		}
		domain.Nodes[0].NewEndpoint(ctx, nse(fmt.Sprint(endpoint, "-", at), fmt.Sprint(service, "-", at)),
			sandbox.GenerateTestToken, functionality...)
	}
	client := all[domains-1].Nodes[0].NewClient(ctx, sandbox.GenerateTestToken)
	connection, err := client.Request(ctx, harness.RequestFor("id", fmt.Sprint(service, "-", domains-1)))
	require.NoError(t, err)
	require.Len(t, harness.Names(connection), (domains-1)*interdomainSegments+domainSegments)
	require.Equal(t, endpoint+"-0", endpointOf(connection))
	for at, domain := range all {
		// Those in the middle are passed twice: in, and out again.
		want := 2
		if at == 0 || at == domains-1 {
			want = 1
		}
		require.Equal(t, want, domain.Agent.OpenConnections(t), domain.Name)
	}
	_, err = client.Close(ctx, connection)
	require.NoError(t, err)
	require.Equal(t, 1, last.Closes())
	waitUntilEmpty(t, all...)
}
