package harness

import (
	"context"
	"net"
	"net/url"
	"sync"
	"testing"
	"time"

	"github.com/golang/protobuf/ptypes/empty"
	"github.com/google/uuid"
	"github.com/networkservicemesh/api/pkg/api/networkservice"
	"github.com/networkservicemesh/api/pkg/api/registry"
	registryclient "github.com/networkservicemesh/sdk/pkg/registry/chains/client"
	"github.com/networkservicemesh/sdk/pkg/tools/sandbox"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// Peer is a bare next hop, without any chain: it answers as the test says, also wrongly.
type Peer struct {
	networkservice.UnimplementedNetworkServiceServer
	networkservice.UnimplementedMonitorConnectionServer

	// Name is the name of its path segment.
	Name string
	// URL is where it serves.
	URL *url.URL

	config   PeerConfig
	listener *Listener
	server   *grpc.Server

	mutex    sync.Mutex
	requests []*networkservice.NetworkServiceRequest
	closes   []*networkservice.Connection
}

// PeerConfig says how a peer behaves; what is nil is as it should be.
type PeerConfig struct {
	Name      string
	OnRequest func(context.Context, *Peer, *networkservice.NetworkServiceRequest) (*networkservice.Connection, error)
	OnMonitor func(*networkservice.MonitorScopeSelector, networkservice.MonitorConnection_MonitorConnectionsServer) error
	// Forgets makes it keep neither Requests nor Closes: a load sends many.
	Forgets bool
}

// StartPeer serves until the test ends.
func StartPeer(t testing.TB, config PeerConfig) *Peer {
	t.Helper()
	listener, err := net.Listen("tcp", LoopbackIP(t)+":0")
	if err != nil {
		t.Fatal(err)
	}
	p := &Peer{
		Name:     config.Name,
		URL:      &url.URL{Scheme: "tcp", Host: listener.Addr().String()},
		config:   config,
		listener: NewListener(listener),
	}
	p.server = grpc.NewServer()
	networkservice.RegisterNetworkServiceServer(p.server, p)
	networkservice.RegisterMonitorConnectionServer(p.server, p)
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = p.server.Serve(p.listener)
	}()
	t.Cleanup(func() {
		p.server.Stop()
		<-served
	})
	return p
}

// Request answers as configured.
func (p *Peer) Request(
	ctx context.Context, request *networkservice.NetworkServiceRequest,
) (*networkservice.Connection, error) {
	if !p.config.Forgets {
		p.mutex.Lock()
		p.requests = append(p.requests, request.Clone())
		p.mutex.Unlock()
	}
	if p.config.OnRequest != nil {
		return p.config.OnRequest(ctx, p, request)
	}
	return p.Grant(request), nil
}

// Close accepts.
func (p *Peer) Close(_ context.Context, connection *networkservice.Connection) (*empty.Empty, error) {
	if !p.config.Forgets {
		p.mutex.Lock()
		defer p.mutex.Unlock()
		p.closes = append(p.closes, connection.Clone())
	}
	return new(empty.Empty), nil
}

// MonitorConnections tells nothing but the initial event, unless configured otherwise.
func (p *Peer) MonitorConnections(
	selector *networkservice.MonitorScopeSelector,
	stream networkservice.MonitorConnection_MonitorConnectionsServer,
) error {
	if p.config.OnMonitor != nil {
		return p.config.OnMonitor(selector, stream)
	}
	if err := stream.Send(&networkservice.ConnectionEvent{}); err != nil {
		return err
	}
	<-stream.Context().Done()
	return nil
}

// Grant is the right answer to a Request: the first mechanism that is offered, our segment on the
// path, and the index where it was.
func (p *Peer) Grant(request *networkservice.NetworkServiceRequest) *networkservice.Connection {
	connection := request.GetConnection().Clone()
	path := connection.GetPath()
	own := int(path.GetIndex()) + 1
	segment := &networkservice.PathSegment{
		Name:    p.Name,
		Id:      uuid.NewString(),
		Token:   "token",
		Expires: timestamppb.New(time.Now().Add(time.Hour)),
	}
	if own < len(path.GetPathSegments()) {
		segment.Id = path.GetPathSegments()[own].GetId()
	}
	path.PathSegments = append(path.GetPathSegments()[:own:own], segment)
	if connection.GetMechanism() == nil && len(request.GetMechanismPreferences()) > 0 {
		connection.Mechanism = request.GetMechanismPreferences()[0].Clone()
	}
	return connection
}

// Requests are those that came.
func (p *Peer) Requests() []*networkservice.NetworkServiceRequest {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	return p.requests[:len(p.requests):len(p.requests)]
}

// Closes are those that came.
func (p *Peer) Closes() []*networkservice.Connection {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	return p.closes[:len(p.closes):len(p.closes)]
}

// Stop ends it for good; its clients' connections are closed.
func (p *Peer) Stop() {
	p.server.Stop()
}

// CutConnections closes the sockets of all clients, as a crash would.
func (p *Peer) CutConnections() {
	p.listener.CutConnections()
}

// EndpointRegistry is the sdk's client of the endpoint registry at url.
func EndpointRegistry(
	ctx context.Context, at *url.URL, options ...registryclient.Option,
) registry.NetworkServiceEndpointRegistryClient {
	return registryclient.NewNetworkServiceEndpointRegistryClient(ctx, append([]registryclient.Option{
		registryclient.WithClientURL(sandbox.CloneURL(at)),
		registryclient.WithDialOptions(sandbox.DialOptions()...),
	}, options...)...)
}

// ServiceRegistry is the sdk's client of the network service registry at url.
func ServiceRegistry(
	ctx context.Context, at *url.URL, options ...registryclient.Option,
) registry.NetworkServiceRegistryClient {
	return registryclient.NewNetworkServiceRegistryClient(ctx, append([]registryclient.Option{
		registryclient.WithClientURL(sandbox.CloneURL(at)),
		registryclient.WithDialOptions(sandbox.DialOptions()...),
	}, options...)...)
}
