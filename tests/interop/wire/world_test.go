package wire

import (
	"context"
	"fmt"
	"net/url"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v4"
	"github.com/networkservicemesh/api/pkg/api/networkservice"
	"github.com/networkservicemesh/api/pkg/api/registry"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/types/known/timestamppb"

	"proxy-nsmgr/tests/interop/harness"
)

const (
	service = "icmp-responder"
	// deadline bounds a scene; where all is well one takes some two seconds.
	deadline = 2 * time.Minute
)

// Where the taps are: who calls whom. Agents call other agents by the taps of the callee.
const (
	clientOne     = "client > one"
	toOneProxy    = "agents > one's proxy"
	toTwoProxy    = "agents > two's proxy"
	toTwoRegistry = "agents > two's registry"
	toFloating    = "agents > the floating registry"
)

// world is two of our agents with a tap in front of each of their ports, as others know them.
type world struct {
	*Recording
	t   *testing.T
	ctx context.Context
	dns *harness.DNS
	// One is the client's agent, two the endpoint's.
	one, two *party
}

// party is an agent and its taps.
type party struct {
	agent *harness.Agent
	// The taps of other agents.
	proxy, registry *Tap
	// The test's own connection, by a tap of its own.
	client *grpc.ClientConn
	// The same of the socket for the clients of its node.
	node *grpc.ClientConn
}

// newWorld starts two agents; configure, if given, changes their configurations.
func newWorld(t *testing.T, configure func(one, two *harness.AgentConfig)) *world {
	t.Helper()
	w := newEmptyWorld(t)
	one := harness.AgentConfig{Name: "agent-one", Domain: harness.DomainOne, DNS: w.dns}
	two := harness.AgentConfig{Name: "agent-two", Domain: harness.DomainTwo, DNS: w.dns}
	if configure != nil {
		configure(&one, &two)
	}
	w.one, w.two = w.start("one", one), w.start("two", two)
	return w
}

func newEmptyWorld(t *testing.T) *world {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), deadline)
	t.Cleanup(cancel)
	w := &world{Recording: NewRecording(t), t: t, ctx: ctx, dns: harness.NewDNS(t)}
	w.Name(w.dns.Address(), "<dns>")
	return w
}

// start starts an agent behind taps: its public address is theirs, and so is that of its domain.
func (w *world) start(name string, config harness.AgentConfig) *party {
	w.t.Helper()
	config.IP = harness.LoopbackIP(w.t)
	public := &harness.Agent{IP: harness.LoopbackIP(w.t)}
	mapped := map[string]string{config.IP: public.IP}
	for internal, external := range config.MapIP {
		mapped[internal] = external
	}
	config.MapIP = mapped
	p := &party{agent: harness.StartAgent(w.t, config)}
	w.Name(p.agent.IP, "<"+name+">")
	w.Name(public.IP, "<public "+name+">")
	w.Name(p.agent.Dir, "<folder of "+name+">")
	p.proxy = w.Tap(w.t, "agents > "+name+"'s proxy", public.ProxyURL(), p.agent.ProxyURL())
	p.registry = w.Tap(w.t, "agents > "+name+"'s registry", public.RegistryURL(), p.agent.RegistryURL())
	w.dns.Publish(config.Domain, harness.RegistryService, public.RegistryURL())
	w.dns.Publish(config.Domain, harness.ProxyService, public.ProxyURL())
	p.client = w.dial("client > "+name, p.agent.ProxyURL())
	p.node = w.dial("client > "+name+"'s socket", p.agent.NSMgrURL())
	return p
}

// dial connects the test to a party by a tap of its own.
func (w *world) dial(edge string, to *url.URL) *grpc.ClientConn {
	w.t.Helper()
	at := &url.URL{Scheme: "tcp", Host: harness.LoopbackIP(w.t) + ":7000"}
	w.Tap(w.t, edge, at, to)
	return harness.Dial(w.t, at)
}

// endpoint starts a bare endpoint behind a tap; it is not registered.
func (w *world) endpoint(config harness.PeerConfig) *harness.Peer {
	w.t.Helper()
	peer := harness.StartPeer(w.t, config)
	at := &url.URL{Scheme: "tcp", Host: harness.LoopbackIP(w.t) + ":7001"}
	w.Tap(w.t, "agents > "+config.Name, at, peer.URL)
	w.Name(at.Hostname(), "<"+config.Name+">")
	peer.URL = at
	return peer
}

// finish waits until nothing is open any more, and compares the recording with its file.
func (w *world) finish(name string) {
	w.t.Helper()
	for _, p := range []*party{w.one, w.two} {
		if p != nil {
			harness.WaitUntilEmpty(w.t, p.agent)
		}
	}
	w.AwaitQuiet()
	if !w.t.Failed() {
		w.Compare(name)
	}
}

// token is what a party of the tests calls with.
func token(name string, lifetime time.Duration) (string, time.Time) {
	expires := time.Now().Add(lifetime)
	text, err := jwt.NewWithClaims(jwt.SigningMethodHS256, &jwt.RegisteredClaims{
		Subject: "spiffe://test/" + name, ExpiresAt: jwt.NewNumericDate(expires),
	}).SignedString([]byte("of the tests"))
	if err != nil {
		panic(err)
	}
	return text, expires
}

// tokenLifetime is beyond every scene, and not that of our agents' tokens.
const tokenLifetime = 20 * time.Minute

// as is the context of a call that name makes, with its token.
func (w *world) as(name string) context.Context {
	return w.asFor(name, tokenLifetime)
}

func (w *world) asFor(name string, lifetime time.Duration) context.Context {
	text, expires := token(name, lifetime)
	return metadata.AppendToOutgoingContext(context.WithoutCancel(w.ctx),
		"nsm-client-token", text, "nsm-client-token-expires", expires.Format(time.RFC3339Nano))
}

// request asks for a service as the first hop of a path does.
func (w *world) request(id, service string) *networkservice.NetworkServiceRequest {
	request := harness.RequestFor(id, service)
	request.Connection.Path = &networkservice.Path{
		PathSegments: []*networkservice.PathSegment{{Name: "nsc", Id: id}},
	}
	return request
}

// requestForTwo asks for the endpoint of domain two.
func (w *world) requestForTwo(id string) *networkservice.NetworkServiceRequest {
	request := w.request(id, serviceOfTwo)
	request.Connection.NetworkServiceEndpointName = endpointOfTwo
	return request
}

// found finds the endpoints of a service through agent one, which can then be asked for them.
func (w *world) found(service string) {
	w.t.Helper()
	w.findEndpoints(w.one.client, &registry.NetworkServiceEndpoint{NetworkServiceNames: []string{service}})
}

// granted asks and expects to be granted.
func (w *world) granted(
	at *grpc.ClientConn, request *networkservice.NetworkServiceRequest,
) *networkservice.Connection {
	w.t.Helper()
	connection, err := networkservice.NewNetworkServiceClient(at).Request(w.as("nsc"), request)
	require.NoError(w.t, err)
	return connection
}

// refused asks and expects to be refused.
func (w *world) refused(at *grpc.ClientConn, request *networkservice.NetworkServiceRequest) {
	w.t.Helper()
	_, err := networkservice.NewNetworkServiceClient(at).Request(w.as("nsc"), request)
	require.Error(w.t, err, w.Text())
}

func (w *world) close(at *grpc.ClientConn, connection *networkservice.Connection) {
	w.t.Helper()
	_, err := networkservice.NewNetworkServiceClient(at).Close(w.as("nsc"), connection)
	require.NoError(w.t, err)
}

// closeAll ends a scene: connections that stay until then keep the monitor streams of the agents open,
// which would otherwise end after a moment and be opened again.
func (w *world) closeAll(at *grpc.ClientConn, connections []*networkservice.Connection) {
	w.t.Helper()
	w.Step("the Closes")
	for _, connection := range connections {
		w.close(at, connection)
	}
	w.AwaitQuiet()
}

// monitor watches connections; the stream ends with stop, which waits for that.
func (w *world) monitor(
	at *grpc.ClientConn, metadataOf []string, segments ...*networkservice.PathSegment,
) (stop func()) {
	w.t.Helper()
	ctx, cancel := context.WithCancel(metadata.AppendToOutgoingContext(w.t.Context(), metadataOf...))
	stream, err := networkservice.NewMonitorConnectionClient(at).MonitorConnections(ctx,
		&networkservice.MonitorScopeSelector{PathSegments: segments})
	require.NoError(w.t, err)
	return opened(w, stream, cancel)
}

// receiver is a stream of answers.
type receiver[T any] interface {
	grpc.ClientStream
	Recv() (*T, error)
}

// opened waits until the other side has accepted a stream, and reads it until stop is called.
func opened[T any](w *world, stream receiver[T], cancel context.CancelFunc) (stop func()) {
	w.t.Helper()
	_, err := stream.Header()
	require.NoError(w.t, err)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		drain(stream)
	}()
	return func() {
		cancel()
		<-ended
	}
}

// drain reads a stream to its end.
func drain[T any](stream receiver[T]) {
	for {
		if _, err := stream.Recv(); err != nil {
			return
		}
	}
}

func services(at *grpc.ClientConn) registry.NetworkServiceRegistryClient {
	return registry.NewNetworkServiceRegistryClient(at)
}

func endpoints(at *grpc.ClientConn) registry.NetworkServiceEndpointRegistryClient {
	return registry.NewNetworkServiceEndpointRegistryClient(at)
}

// register registers a service and an endpoint for it.
func (w *world) register(at *grpc.ClientConn, peer *harness.Peer, name, service string) {
	w.t.Helper()
	_, err := services(at).Register(w.as("nse"), &registry.NetworkService{Name: service})
	require.NoError(w.t, err)
	_, err = endpoints(at).Register(w.as("nse"), &registry.NetworkServiceEndpoint{
		Name: name, NetworkServiceNames: []string{service}, Url: peer.URL.String(),
	})
	require.NoError(w.t, err)
}

func (w *world) unregister(at *grpc.ClientConn, peer *harness.Peer, name, service string) {
	w.t.Helper()
	_, err := endpoints(at).Unregister(w.as("nse"), &registry.NetworkServiceEndpoint{
		Name: name, NetworkServiceNames: []string{service}, Url: peer.URL.String(),
	})
	require.NoError(w.t, err)
}

func (w *world) findServices(at *grpc.ClientConn, query *registry.NetworkService) {
	w.t.Helper()
	stream, err := services(at).Find(w.as("nsc"), &registry.NetworkServiceQuery{NetworkService: query})
	require.NoError(w.t, err)
	drain(stream)
}

func (w *world) findEndpoints(at *grpc.ClientConn, query *registry.NetworkServiceEndpoint) {
	w.t.Helper()
	stream, err := endpoints(at).Find(w.as("nsc"),
		&registry.NetworkServiceEndpointQuery{NetworkServiceEndpoint: query})
	require.NoError(w.t, err)
	drain(stream)
}

// watchEndpoints is findEndpoints with every later change, until stop.
func (w *world) watchEndpoints(
	at *grpc.ClientConn, query *registry.NetworkServiceEndpoint,
) (stop func()) {
	w.t.Helper()
	ctx, cancel := context.WithCancel(w.as("nsc"))
	stream, err := endpoints(at).Find(ctx,
		&registry.NetworkServiceEndpointQuery{NetworkServiceEndpoint: query, Watch: true})
	require.NoError(w.t, err)
	return opened(w, stream, cancel)
}

func (w *world) watchServices(at *grpc.ClientConn, query *registry.NetworkService) (stop func()) {
	w.t.Helper()
	ctx, cancel := context.WithCancel(w.as("nsc"))
	stream, err := services(at).Find(ctx,
		&registry.NetworkServiceQuery{NetworkService: query, Watch: true})
	require.NoError(w.t, err)
	return opened(w, stream, cancel)
}

// grant is an endpoint's answer whose segment has the same id in each run.
func grant(peer *harness.Peer, request *networkservice.NetworkServiceRequest) *networkservice.Connection {
	connection := peer.Grant(request)
	path := connection.GetPath()
	own := path.GetPathSegments()[path.GetIndex()+1]
	own.Id = fmt.Sprintf("%s-of-%s", peer.Name, path.GetPathSegments()[0].GetId())
	text, expires := token(peer.Name, tokenLifetime)
	own.Token, own.Expires = text, timestamppb.New(expires)
	return connection
}

// startFloating starts a registry without a proxy, in a domain of its own.
func (w *world) startFloating() *grpc.ClientConn {
	w.t.Helper()
	agent := harness.StartAgent(w.t, harness.AgentConfig{
		Name: "agent-floating", Domain: "floating.example", DNS: w.dns,
	})
	public := &harness.Agent{IP: harness.LoopbackIP(w.t)}
	w.Name(agent.IP, "<floating>")
	w.Name(public.IP, "<public floating>")
	w.Tap(w.t, toFloating, public.RegistryURL(), agent.RegistryURL())
	w.dns.Publish("floating.example", harness.RegistryService, public.RegistryURL())
	return w.dial("client > floating", agent.RegistryURL())
}

// dead is an endpoint at whose address nobody listens.
func (w *world) dead(name string) *harness.Peer {
	w.t.Helper()
	at := &url.URL{Scheme: "tcp", Host: harness.LoopbackIP(w.t) + ":7001"}
	w.Name(at.Hostname(), "<"+name+">")
	return &harness.Peer{Name: name, URL: at}
}
