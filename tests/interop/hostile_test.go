package interop

import (
	"fmt"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/networkservicemesh/api/pkg/api/networkservice"
	"github.com/networkservicemesh/api/pkg/api/networkservice/mechanisms/cls"
	"github.com/networkservicemesh/api/pkg/api/registry"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"proxy-nsmgr/tests/interop/harness"
)

// badDomain is a domain whose proxy is the misbehaving peer itself.
const badDomain = "bad.example"

// places are where a peer can misbehave: behind the far proxy, and as the far proxy.
var places = []struct{ name, domain string }{
	{"as the endpoint", harness.DomainTwo},
	{"as the far proxy", badDomain},
}

// newBad starts two agents and a peer that misbehaves: it is an endpoint of domain two, and the proxy
// of the bad domain, whose registry is that of two.
func newBad(t *testing.T, start func(*testing.T) *harness.Peer) *bare {
	t.Helper()
	b := newBarePair(t, nil)
	b.serveBy(start(t))
	b.DNS.Publish(badDomain, harness.RegistryService, b.Two.RegistryURL())
	b.DNS.Publish(badDomain, harness.ProxyService, b.peer.URL)
	return b
}

// as starts a peer of this configuration.
func as(config harness.PeerConfig) func(*testing.T) *harness.Peer {
	config.Name = endpoint
	return func(t *testing.T) *harness.Peer { return harness.StartPeer(t, config) }
}

// at is a peer that is not a gRPC server, if anything.
func at(start func(*testing.T) *url.URL) func(*testing.T) *harness.Peer {
	return func(t *testing.T) *harness.Peer { return &harness.Peer{Name: endpoint, URL: start(t)} }
}

// remoteRequest asks for the bad endpoint as the forwarder of another node does.
func (b *bare) remoteRequest(domain string) *networkservice.NetworkServiceRequest {
	b.t.Helper()
	request := b.request("id", domain)
	request.MechanismPreferences = []*networkservice.Mechanism{
		{Cls: cls.REMOTE, Type: "VXLAN", Parameters: map[string]string{"src_ip": internalOne}},
		{Cls: cls.REMOTE, Type: "WIREGUARD", Parameters: map[string]string{"src_ip": internalOne}},
	}
	return request
}

// An answer that breaks the rules is an error that names the peer and the fault, and what the peer
// may have granted is closed at the peer.
func TestBadAnswers(t *testing.T) {
	for _, test := range []struct {
		name   string
		change func(*networkservice.Connection)
		fault  string
	}{{
		"the path lost segments",
		func(c *networkservice.Connection) { c.Path.PathSegments = c.GetPath().GetPathSegments()[:1] },
		"path segments",
	}, {
		"the path is empty",
		func(c *networkservice.Connection) { c.Path.PathSegments = nil },
		"path segments",
	}, {
		"no path",
		func(c *networkservice.Connection) { c.Path = nil },
		"path",
	}, {
		"the path is longer than any",
		func(c *networkservice.Connection) {
			for range 100 {
				c.Path.PathSegments = append(c.Path.PathSegments, &networkservice.PathSegment{Name: "x", Id: "y"})
			}
		},
		"segments",
	}, {
		"the index moved",
		func(c *networkservice.Connection) { c.Path.Index++ },
		"path.index",
	}, {
		"the connection's id changed",
		func(c *networkservice.Connection) { c.Id = "another" },
		"`another`",
	}, {
		"the id of our segment changed",
		func(c *networkservice.Connection) { c.Path.PathSegments[c.Path.Index].Id = "another" },
		"another",
	}, {
		"a hop above was renamed",
		func(c *networkservice.Connection) { c.Path.PathSegments[0].Name = "mallory" },
		"mallory",
	}, {
		"no mechanism",
		func(c *networkservice.Connection) { c.Mechanism = nil },
		"no mechanism",
	}, {
		"a mechanism that was not offered",
		func(c *networkservice.Connection) { c.Mechanism.Type = "IPSEC" },
		"REMOTE IPSEC",
	}, {
		"a mechanism of another class",
		func(c *networkservice.Connection) { c.Mechanism.Cls = cls.LOCAL },
		"LOCAL VXLAN",
	}, {
		"an answer larger than the limit",
		func(c *networkservice.Connection) {
			c.Context.ExtraContext = map[string]string{"much": strings.Repeat("x", 2<<20)}
		},
		"message length too large",
	}} {
		for _, place := range places {
			t.Run(test.name+", "+place.name, func(t *testing.T) {
				b := newBad(t, as(granting(
					func(_ *networkservice.NetworkServiceRequest, connection *networkservice.Connection) {
						test.change(connection)
					})))
				_, err := b.Client(b.ctx).Request(b.ctx, b.remoteRequest(place.domain))
				require.Error(t, err)
				require.ErrorContains(t, err, b.peer.URL.String())
				require.ErrorContains(t, err, test.fault)
				t.Log(err)
				asked := len(b.peer.Requests())
				require.Positive(t, asked)
				closes := func() int { return len(b.peer.Closes()) }
				harness.Eventually(t, harness.EventDeadline, func() bool { return closes() == asked },
					func() string { return fmt.Sprintf("%d Closes for %d Requests", closes(), asked) })
				b.waitUntilEmpty()
			})
		}
	}
}

// A connection that stands survives a refresh whose answer is bad: the old answer still holds.
func TestBadAnswerToARefresh(t *testing.T) {
	var bad atomic.Bool
	b := newBad(t, as(granting(
		func(_ *networkservice.NetworkServiceRequest, connection *networkservice.Connection) {
			if bad.Load() {
				connection.Id = "another"
			}
		})))
	client := b.Client(b.ctx)
	request := b.remoteRequest(harness.DomainTwo)
	connection, err := client.Request(b.ctx, request)
	require.NoError(t, err)
	bad.Store(true)
	_, err = client.Request(b.ctx, harness.Refresh(request, connection))
	require.ErrorContains(t, err, b.peer.URL.String())
	require.Equal(t, 1, b.Two.OpenConnections(t))
	require.Empty(t, b.peer.Closes())
	b.close(client, connection)
	b.waitUntilEmpty()
	require.Len(t, b.peer.Closes(), 1)
}

// What breaks below the messages: the error names the peer and the fault, nothing is left.
func TestBrokenTransport(t *testing.T) {
	for _, test := range []struct {
		name  string
		start func(*testing.T) *harness.Peer
		fault string
	}{{
		"nobody listens",
		at(func(t *testing.T) *url.URL { return &url.URL{Scheme: "tcp", Host: harness.LoopbackIP(t) + ":1"} }),
		"refused",
	}, {
		"the stream is reset",
		at(func(t *testing.T) *url.URL { return harness.StartResettingPeer(t) }),
		"stream",
	}, {
		"the connection is cut in the middle",
		as(cuttingOff()),
		"transport error",
	}} {
		for _, place := range places {
			t.Run(test.name+", "+place.name, func(t *testing.T) {
				b := newBad(t, test.start)
				_, err := b.Client(b.ctx).Request(b.ctx, b.remoteRequest(place.domain))
				require.Error(t, err)
				require.ErrorContains(t, err, b.peer.URL.String())
				require.ErrorContains(t, err, test.fault)
				require.NotEqual(t, codes.OK, status.Code(err))
				t.Log(err)
				b.waitUntilEmpty()
			})
		}
	}
}

// After a cut in the middle it is unknown what the peer did: a Close is sent once it can be reached.
func TestCutInTheMiddleIsClosed(t *testing.T) {
	b := newBad(t, as(cuttingOff()))
	_, err := b.Client(b.ctx).Request(b.ctx, b.remoteRequest(harness.DomainTwo))
	require.ErrorContains(t, err, b.peer.URL.String())
	harness.Eventually(t, harness.EventDeadline, func() bool { return len(b.peer.Closes()) > 0 },
		func() string { return "the peer got no Close" })
	b.waitUntilEmpty()
}

// Our registry refuses an endpoint whose URL cannot be dialled.
func TestBadURLsAreNotRegistered(t *testing.T) {
	ctx := testContext(t)
	agent := harness.StartAgent(t, harness.AgentConfig{Domain: "one.example"})
	client := registry.NewNetworkServiceEndpointRegistryClient(harness.Dial(t, agent.RegistryURL()))
	for _, bad := range []string{"", "nowhere", "gopher://192.0.2.1:70", "tcp://", "tcp://192.0.2.1", "unix:///run/nse.sock"} {
		entry := nse(endpoint, service)
		entry.Url = bad
		_, err := client.Register(ctx, entry)
		require.Equal(t, codes.InvalidArgument, status.Code(err), "%q: %v", bad, err)
		require.ErrorContains(t, err, "url")
	}
	require.Empty(t, findEndpoints(ctx, t, client, nse("")))
}

// A flood of monitor events costs neither memory nor service.
func TestFloodOfMonitorEvents(t *testing.T) {
	const flood, bound = 50_000, 32 << 20
	flooded := make(chan struct{})
	var (
		once  sync.Once
		mutex sync.Mutex
		ours  *networkservice.Connection
	)
	config := granting(func(_ *networkservice.NetworkServiceRequest, connection *networkservice.Connection) {
		mutex.Lock()
		defer mutex.Unlock()
		ours = connection.Clone()
	})
	config.OnMonitor = func(
		_ *networkservice.MonitorScopeSelector,
		stream networkservice.MonitorConnection_MonitorConnectionsServer,
	) error {
		for number := range flood {
			mutex.Lock()
			shown := ours.Clone()
			mutex.Unlock()
			if shown == nil || number%2 == 0 {
				shown = &networkservice.Connection{Id: fmt.Sprint("unknown-", number)}
			}
			shown.State = networkservice.State(number / 2 % 2)
			event := &networkservice.ConnectionEvent{
				Type:        networkservice.ConnectionEventType_UPDATE,
				Connections: map[string]*networkservice.Connection{shown.GetId(): shown},
			}
			if err := stream.Send(event); err != nil {
				return err
			}
		}
		once.Do(func() { close(flooded) })
		<-stream.Context().Done()
		return nil
	}
	b := newBad(t, as(config))
	// A monitor that asks for all events and reads none of them.
	lazy, err := networkservice.NewMonitorConnectionClient(harness.Dial(t, b.Two.ProxyURL())).
		MonitorConnections(b.ctx, &networkservice.MonitorScopeSelector{})
	require.NoError(t, err)
	before := b.Two.ResidentBytes(t)
	client := b.Client(b.ctx)
	connection, err := client.Request(b.ctx, b.remoteRequest(harness.DomainTwo))
	require.NoError(t, err)
	select {
	case <-flooded:
	case <-time.After(time.Minute):
		t.Fatal("the agent does not take the flood")
	}
	require.Less(t, b.Two.ResidentBytes(t), before+bound)
	b.close(client, connection)
	b.waitUntilEmpty()
	require.NoError(t, lazy.CloseSend())
}
