package interop

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/networkservicemesh/api/pkg/api/networkservice"
	"github.com/networkservicemesh/api/pkg/api/networkservice/mechanisms/cls"
	"github.com/networkservicemesh/api/pkg/api/registry"
	"github.com/networkservicemesh/sdk/pkg/networkservice/utils/count"
	"github.com/networkservicemesh/sdk/pkg/tools/sandbox"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"proxy-nsmgr/tests/interop/harness"
)

// What NSM's own proxies get wrong, each as a user meets it.

// The host of an SRV record is its target; NSM's proxies take the port of the record and the
// address of the record's own name, where here is nobody.
func TestSRVTargetIsHonoured(t *testing.T) {
	m := newMesh(t)
	nobody := harness.LoopbackIP(t)
	for service, at := range map[string]string{
		harness.RegistryService: m.two.Registry.URL.Host, harness.ProxyService: m.two.ProxyURL.Host,
	} {
		url := *m.two.ProxyURL
		url.Host = at
		m.dns.PublishTarget(m.two.Name, service, &url, "gateway-of-"+service+".two.example")
		m.dns.PublishAddress(service+"."+m.two.Name, nobody)
	}
	m.serve(endpoint)
	client := plainClient(m.ctx, m.one.Nodes[0])
	connection, err := client.Request(m.ctx, m.request())
	require.NoError(t, err)
	require.Len(t, harness.Names(connection), interdomainSegments)
	m.close(client, connection)
}

// NSM's proxies answer a Find in a domain that cannot be resolved with an empty stream, and the
// client asks for ever.
func TestUnresolvableDomain(t *testing.T) {
	// The bound that the project sets itself. The resolver's own patience, two seconds by default,
	// is half of that here, so that a silent name server is within it too.
	const bound = 2 * time.Second
	// A machine that is busy may take longer than that once; an agent that waits does so each time.
	const attempts = 5
	patience := map[string]any{"resolver": map[string]any{"timeout": "1s"}}
	for _, test := range []struct {
		name  string
		reply func(*harness.DNS)
	}{
		{"no such name", func(*harness.DNS) {}},
		{"the server fails", func(d *harness.DNS) { d.FailWith(dns.RcodeServerFailure) }},
		{"the server refuses", func(d *harness.DNS) { d.FailWith(dns.RcodeRefused) }},
		{"the server is silent", func(d *harness.DNS) { d.FailWith(harness.Silence) }},
	} {
		t.Run(test.name, func(t *testing.T) {
			server := harness.NewDNS(t)
			test.reply(server)
			agent := harness.StartAgent(t,
				harness.AgentConfig{Domain: "one.example", DNS: server, Extra: patience})
			connection := harness.Dial(t, agent.RegistryURL())
			harness.WaitUntilConnected(t, connection)
			endpoints := registry.NewNetworkServiceEndpointRegistryClient(connection)
			find := func(domain string) error {
				ctx, cancel := context.WithTimeout(t.Context(), bound)
				defer cancel()
				stream, err := endpoints.Find(ctx, &registry.NetworkServiceEndpointQuery{
					NetworkServiceEndpoint: nse("", service+"@"+domain),
				})
				if err == nil {
					_, err = stream.Recv()
				}
				return err
			}
			var (
				domain string
				err    error
			)
			for attempt := range attempts {
				// Another name each time: failures are remembered.
				domain = fmt.Sprintf("nowhere-%d.example", attempt)
				if err = find(domain); status.Code(err) != codes.DeadlineExceeded {
					break
				}
			}
			require.NotContains(t, []codes.Code{codes.OK, codes.DeadlineExceeded}, status.Code(err), err)
			require.ErrorContains(t, err, domain)
			t.Log(err)
		})
	}
}

// The real registry of a domain asks our proxy, and passes on what it says.
func TestUnresolvableDomainThroughRealRegistry(t *testing.T) {
	ctx := testContext(t)
	server := harness.NewDNS(t)
	one := harness.NewDomain(ctx, t, harness.DomainConfig{Name: "one.example", DNS: server})
	endpoints := registry.NewNetworkServiceEndpointRegistryClient(harness.Dial(t, one.Registry.URL))
	_, err := endpoints.Register(ctx, nse("nse@nowhere.example", service+"@nowhere.example"))
	require.ErrorContains(t, err, "nowhere.example")
	t.Log(err)
}

// NSM's proxies wait for ever for a name of their own domain.
func TestOwnDomainIsServed(t *testing.T) {
	ctx := testContext(t)
	server := harness.NewDNS(t)
	one := harness.NewDomain(ctx, t, harness.DomainConfig{Name: "one.example", DNS: server})
	one.RegisterService(ctx, t, &registry.NetworkService{Name: service})
	counter := new(count.Server)
	one.Nodes[0].NewEndpoint(ctx, nse(endpoint, service), sandbox.GenerateTestToken, counter)
	client := plainClient(ctx, one.Nodes[0])
	connection := requestTwice(ctx, t, client, harness.RequestFor("id", one.Service(service)))
	// nsc, nsmgr, forwarder, our proxy, and again nsmgr, forwarder, nse.
	require.Len(t, harness.Names(connection), interdomainSegments-1)
	require.Equal(t, one.Service(service), connection.GetNetworkService())
	require.Equal(t, 1, counter.UniqueRequests())
	_, err := client.Close(ctx, connection)
	require.NoError(t, err)
	require.Equal(t, 1, counter.Closes())
	waitUntilEmpty(t, one)
}

// NSM's proxies make an address that is not in the map empty.
func TestAddressMissingFromTheMap(t *testing.T) {
	b := newBare(t, func(one, two *harness.AgentConfig) {
		one.MapIP = map[string]string{"10.9.9.9": "203.0.113.99"}
		two.MapIP = map[string]string{"10.8.8.8": "203.0.113.88"}
	}, granting(func(_ *networkservice.NetworkServiceRequest, connection *networkservice.Connection) {
		connection.GetMechanism().GetParameters()["dst_ip"] = internalTwo
	}))
	request := b.request("id", harness.DomainTwo)
	request.MechanismPreferences = []*networkservice.Mechanism{
		{Cls: cls.REMOTE, Type: "VXLAN", Parameters: map[string]string{"src_ip": internalOne}},
	}
	client := b.Client(b.ctx)
	connection, err := client.Request(b.ctx, request)
	require.NoError(t, err)
	arrived := b.peer.Requests()[0].GetMechanismPreferences()[0].GetParameters()
	require.Equal(t, internalOne, arrived["src_ip"])
	granted := connection.GetMechanism().GetParameters()
	require.Equal(t, internalOne, granted["src_ip"])
	require.Equal(t, internalTwo, granted["dst_ip"])
	b.close(client, connection)
}

// NSM's proxies ask DNS twice for every call.
func TestDNSIsAskedOncePerTTL(t *testing.T) {
	b := newBare(t, nil, harness.PeerConfig{})
	asked := func() int {
		return b.DNS.Asked(harness.RegistryService+"."+harness.DomainTwo, dns.TypeSRV) +
			b.DNS.Asked(harness.ProxyService+"."+harness.DomainTwo, dns.TypeSRV)
	}
	client := b.Client(b.ctx)
	for range 10 {
		connection, err := client.Request(b.ctx, b.request("id", harness.DomainTwo))
		require.NoError(t, err)
		b.close(client, connection)
	}
	require.Equal(t, 2, asked(), "questions in all, one for each service")

	// A domain of short life is asked for again when its answer has ended, and not before each call.
	b.DNS.SetTTL(1)
	short := "short.example"
	b.DNS.Publish(short, harness.RegistryService, b.Two.RegistryURL())
	b.DNS.Publish(short, harness.ProxyService, b.Two.ProxyURL())
	calls := 0
	again := func() int { return b.DNS.Asked(harness.RegistryService+"."+short, dns.TypeSRV) }
	harness.Eventually(t, harness.EventDeadline, func() bool {
		b.Discover(b.ctx, t, service+"@"+short)
		calls++
		return again() >= 2
	}, func() string { return "a DNS answer outlives its TTL" })
	require.Less(t, again(), calls)
}
