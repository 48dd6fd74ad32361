package interop

import (
	"context"
	"fmt"
	"net/url"
	"strings"
	"sync"
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

// serveBadly makes the peer an endpoint of domain two, and the proxy of the bad domain, whose
// registry is that of two.
func serveBadly(ctx context.Context, t *testing.T, pair *harness.AgentPair, peer *harness.Peer) {
	t.Helper()
	pair.Serve(ctx, t, peer, service)
	pair.DNS.Publish(badDomain, harness.RegistryService, pair.Two.RegistryURL())
	pair.DNS.Publish(badDomain, harness.ProxyService, peer.URL)
}

func remoteRequest(ctx context.Context, t *testing.T, pair *harness.AgentPair, domain string) *networkservice.NetworkServiceRequest {
	t.Helper()
	request := harness.RequestFor("id", service+"@"+domain)
	request.Connection.NetworkServiceEndpointName = pair.Discover(ctx, t, service+"@"+domain)
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
				ctx := testContext(t)
				pair := harness.NewAgentPair(t, nil)
				peer := harness.StartPeer(t, harness.PeerConfig{
					Name: endpoint,
					OnRequest: func(
						_ context.Context, p *harness.Peer, request *networkservice.NetworkServiceRequest,
					) (*networkservice.Connection, error) {
						connection := p.Grant(request)
						test.change(connection)
						return connection, nil
					},
				})
				serveBadly(ctx, t, pair, peer)
				_, err := pair.Client(ctx).Request(ctx, remoteRequest(ctx, t, pair, place.domain))
				require.Error(t, err)
				require.ErrorContains(t, err, peer.URL.String())
				require.ErrorContains(t, err, test.fault)
				t.Log(err)
				asked := len(peer.Requests())
				require.Positive(t, asked)
				harness.Eventually(t, harness.EventDeadline, func() bool { return len(peer.Closes()) == asked },
					func() string { return fmt.Sprintf("%d Closes for %d Requests", len(peer.Closes()), asked) })
				harness.WaitUntilEmpty(t, pair.One, pair.Two)
			})
		}
	}
}

// A connection that stands survives a refresh whose answer is bad: the old answer still holds.
func TestBadAnswerToARefresh(t *testing.T) {
	ctx := testContext(t)
	pair := harness.NewAgentPair(t, nil)
	var (
		mutex sync.Mutex
		bad   bool
	)
	peer := harness.StartPeer(t, harness.PeerConfig{
		Name: endpoint,
		OnRequest: func(
			_ context.Context, p *harness.Peer, request *networkservice.NetworkServiceRequest,
		) (*networkservice.Connection, error) {
			mutex.Lock()
			defer mutex.Unlock()
			connection := p.Grant(request)
			if bad {
				connection.Id = "another"
			}
			return connection, nil
		},
	})
	serveBadly(ctx, t, pair, peer)
	client := pair.Client(ctx)
	request := remoteRequest(ctx, t, pair, harness.DomainTwo)
	connection, err := client.Request(ctx, request)
	require.NoError(t, err)
	mutex.Lock()
	bad = true
	mutex.Unlock()
	_, err = client.Request(ctx, harness.Refresh(request, connection))
	require.ErrorContains(t, err, peer.URL.String())
	require.Equal(t, 1, pair.Two.OpenConnections(t))
	require.Empty(t, peer.Closes())
	_, err = client.Close(ctx, connection)
	require.NoError(t, err)
	harness.WaitUntilEmpty(t, pair.One, pair.Two)
	require.Len(t, peer.Closes(), 1)
}

// What breaks below the messages: the error names the peer and the fault, nothing is left.
func TestBrokenTransport(t *testing.T) {
	for _, test := range []struct {
		name  string
		start func(*testing.T) *url.URL
		fault string
	}{{
		"nobody listens",
		func(t *testing.T) *url.URL { return &url.URL{Scheme: "tcp", Host: harness.LoopbackIP(t) + ":1"} },
		"refused",
	}, {
		"the stream is reset",
		func(t *testing.T) *url.URL { return harness.StartResettingPeer(t) },
		"stream",
	}, {
		"the connection is cut in the middle",
		func(t *testing.T) *url.URL {
			return harness.StartPeer(t, harness.PeerConfig{
				Name: endpoint,
				OnRequest: func(
					_ context.Context, p *harness.Peer, request *networkservice.NetworkServiceRequest,
				) (*networkservice.Connection, error) {
					p.CutConnections()
					return p.Grant(request), nil
				},
			}).URL
		},
		"transport error",
	}} {
		for _, place := range places {
			t.Run(test.name+", "+place.name, func(t *testing.T) {
				ctx := testContext(t)
				pair := harness.NewAgentPair(t, nil)
				peer := &harness.Peer{Name: endpoint, URL: test.start(t)}
				serveBadly(ctx, t, pair, peer)
				_, err := pair.Client(ctx).Request(ctx, remoteRequest(ctx, t, pair, place.domain))
				require.Error(t, err)
				require.ErrorContains(t, err, peer.URL.String())
				require.ErrorContains(t, err, test.fault)
				require.NotEqual(t, codes.OK, status.Code(err))
				t.Log(err)
				harness.WaitUntilEmpty(t, pair.One, pair.Two)
			})
		}
	}
}

// A cut in the middle leaves open what the peer did: it is told to close, once it can be reached.
func TestCutInTheMiddleIsClosed(t *testing.T) {
	ctx := testContext(t)
	pair := harness.NewAgentPair(t, nil)
	peer := harness.StartPeer(t, harness.PeerConfig{
		Name: endpoint,
		OnRequest: func(
			_ context.Context, p *harness.Peer, request *networkservice.NetworkServiceRequest,
		) (*networkservice.Connection, error) {
			p.CutConnections()
			return p.Grant(request), nil
		},
	})
	serveBadly(ctx, t, pair, peer)
	_, err := pair.Client(ctx).Request(ctx, remoteRequest(ctx, t, pair, harness.DomainTwo))
	require.ErrorContains(t, err, peer.URL.String())
	harness.Eventually(t, harness.EventDeadline, func() bool { return len(peer.Closes()) > 0 },
		func() string { return "the peer was not told to close" })
	harness.WaitUntilEmpty(t, pair.One, pair.Two)
}

// An endpoint's URL that nobody could dial does not get into our registry.
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

// A peer that tells more than anybody wants to know costs neither memory nor service.
func TestFloodOfMonitorEvents(t *testing.T) {
	const flood, bound = 50_000, 32 << 20
	ctx := testContext(t)
	pair := harness.NewAgentPair(t, nil)
	flooded := make(chan struct{})
	var (
		once  sync.Once
		mutex sync.Mutex
		ours  *networkservice.Connection
	)
	peer := harness.StartPeer(t, harness.PeerConfig{
		Name: endpoint,
		OnRequest: func(
			_ context.Context, p *harness.Peer, request *networkservice.NetworkServiceRequest,
		) (*networkservice.Connection, error) {
			connection := p.Grant(request)
			mutex.Lock()
			ours = connection.Clone()
			mutex.Unlock()
			return connection, nil
		},
		OnMonitor: func(
			_ *networkservice.MonitorScopeSelector,
			stream networkservice.MonitorConnection_MonitorConnectionsServer,
		) error {
			for number := range flood {
				mutex.Lock()
				told := ours.Clone()
				mutex.Unlock()
				if told == nil || number%2 == 0 {
					told = &networkservice.Connection{Id: fmt.Sprint("unknown-", number)}
				}
				told.State = networkservice.State(number / 2 % 2)
				event := &networkservice.ConnectionEvent{
					Type:        networkservice.ConnectionEventType_UPDATE,
					Connections: map[string]*networkservice.Connection{told.GetId(): told},
				}
				if err := stream.Send(event); err != nil {
					return err
				}
			}
			once.Do(func() { close(flooded) })
			<-stream.Context().Done()
			return nil
		},
	})
	serveBadly(ctx, t, pair, peer)
	// Somebody who asks for all events and reads none of them.
	lazy, err := networkservice.NewMonitorConnectionClient(harness.Dial(t, pair.Two.ProxyURL())).
		MonitorConnections(ctx, &networkservice.MonitorScopeSelector{})
	require.NoError(t, err)
	before := pair.Two.ResidentBytes(t)
	client := pair.Client(ctx)
	connection, err := client.Request(ctx, remoteRequest(ctx, t, pair, harness.DomainTwo))
	require.NoError(t, err)
	select {
	case <-flooded:
	case <-time.After(time.Minute):
		t.Fatal("the agent does not take the flood")
	}
	require.Less(t, pair.Two.ResidentBytes(t), before+bound)
	_, err = client.Close(ctx, connection)
	require.NoError(t, err)
	harness.WaitUntilEmpty(t, pair.One, pair.Two)
	require.NoError(t, lazy.CloseSend())
}
