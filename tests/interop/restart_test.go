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

// One of our agents crashes and comes back: the real client heals the connection through it, and
// what the agents hold afterwards is that one connection.
func TestRealClientHealsOverOurRestart(t *testing.T) {
	for _, test := range []struct {
		name  string
		which func(one, two *harness.Domain) *harness.Agent
	}{
		{"the client's proxy", func(one, _ *harness.Domain) *harness.Agent { return one.Agent }},
		{"the endpoint's proxy", func(_, two *harness.Domain) *harness.Agent { return two.Agent }},
	} {
		t.Run(test.name, func(t *testing.T) {
			ctx := testContext(t)
			dns := harness.NewDNS(t)
			one := harness.NewDomain(ctx, t, harness.DomainConfig{Name: "one.example", DNS: dns})
			two := harness.NewDomain(ctx, t, harness.DomainConfig{Name: "two.example", DNS: dns})
			two.RegisterService(ctx, t, &registry.NetworkService{Name: service})
			counter := new(count.Server)
			two.Nodes[0].NewEndpoint(ctx, nse(endpoint, service), sandbox.GenerateTestToken, counter)
			client := one.Nodes[0].NewClient(ctx, sandbox.GenerateTestToken)
			request := harness.RequestFor("id", two.Service(service))
			connection, err := client.Request(ctx, request)
			require.NoError(t, err)
			before := counter.Requests()

			test.which(one, two).Restart(t)
			harness.Eventually(t, harness.EventDeadline, func() bool {
				return counter.Requests() > before && one.Agent.OpenConnections(t) == 1 &&
					two.Agent.OpenConnections(t) == 1
			}, func() string {
				return fmt.Sprintf("%d requests after %d", counter.Requests(), before)
			})
			connection, err = client.Request(ctx, harness.Refresh(request, connection))
			require.NoError(t, err)
			require.Equal(t, endpoint, endpointOf(connection))
			_, err = client.Close(ctx, connection)
			require.NoError(t, err)
			waitUntilEmpty(t, one, two)
		})
	}
}

// The endpoint dies and another takes its place: the real client is told through both proxies, and
// gets there.
func TestRealClientHealsToAnotherEndpoint(t *testing.T) {
	for _, test := range pairs {
		t.Run(test.name, func(t *testing.T) {
			ctx := testContext(t)
			dns := harness.NewDNS(t)
			one := harness.NewDomain(ctx, t,
				harness.DomainConfig{Name: "one.example", DNS: dns, Proxy: test.client})
			two := harness.NewDomain(ctx, t,
				harness.DomainConfig{Name: "two.example", DNS: dns, Proxy: test.endpoint})
			two.RegisterService(ctx, t, &registry.NetworkService{Name: service})
			first, second := new(count.Server), new(count.Server)
			entry := two.Nodes[0].NewEndpoint(ctx, nse("first", service), sandbox.GenerateTestToken, first)
			client := one.Nodes[0].NewClient(ctx, sandbox.GenerateTestToken)
			connection, err := client.Request(ctx, harness.RequestFor("id", two.Service(service)))
			require.NoError(t, err)
			require.Equal(t, "first", endpointOf(connection))

			_, err = entry.NetworkServiceEndpointRegistryClient.Unregister(ctx, nse("first", service))
			require.NoError(t, err)
			two.Nodes[0].NewEndpoint(ctx, nse("second", service), sandbox.GenerateTestToken, second)
			entry.Cancel()
			harness.Eventually(t, harness.EventDeadline, func() bool { return second.Requests() > 0 },
				func() string { return "the second endpoint was not asked" })
			_, err = client.Close(ctx, connection)
			require.NoError(t, err)
			waitUntilEmpty(t, one, two)
		})
	}
}
