package wire

import (
	"context"
	"fmt"
	"strings"
	"sync/atomic"
	"time"

	"github.com/networkservicemesh/api/pkg/api/networkservice"
	"github.com/networkservicemesh/api/pkg/api/networkservice/mechanisms/cls"
	"github.com/networkservicemesh/api/pkg/api/registry"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"proxy-nsmgr/tests/interop/harness"
)

// Requests to the proxy that are refused, and the words in which they are.
func refusalsOfProxyScene(w *world) {
	w.refusals(w.one.client)
}

// The same by the socket of the node.
func refusalsOfNodeScene(w *world) {
	w.refusals(w.one.node)
}

func (w *world) refusals(at *grpc.ClientConn) {
	w.t.Helper()
	w.Step("an endpoint of domain two, a service without one, and one that cannot be dialled")
	w.serve(granting("nse"))
	_, err := services(w.two.client).Register(w.as("nse"), &registry.NetworkService{Name: "empty"})
	require.NoError(w.t, err)
	away := w.dead("away")
	w.register(w.two.client, away, "away", "dead")
	for _, service := range []string{serviceOfTwo, "dead@" + harness.DomainTwo} {
		w.found(service)
	}

	// It stays, so that the monitor streams of the agents do.
	base := w.granted(at, w.requestForTwo("base"))
	w.awaitMonitors(1)

	for _, test := range []struct {
		name   string
		change func(*networkservice.NetworkServiceRequest)
	}{
		{"no connection", func(r *networkservice.NetworkServiceRequest) { r.Connection = nil }},
		{"no id", func(r *networkservice.NetworkServiceRequest) { r.Connection.Id = "" }},
		{"no path", func(r *networkservice.NetworkServiceRequest) { r.Connection.Path = nil }},
		{"an index out of range", func(r *networkservice.NetworkServiceRequest) { r.Connection.Path.Index = 3 }},
		{"the id of another segment", func(r *networkservice.NetworkServiceRequest) { r.Connection.Id = "another" }},
		{"a path that is too long", func(r *networkservice.NetworkServiceRequest) {
			for at := range 64 {
				r.Connection.Path.PathSegments = append(r.Connection.Path.PathSegments,
					&networkservice.PathSegment{Name: fmt.Sprint("hop-", at), Id: fmt.Sprint("id-", at)})
			}
		}},
		{"no service", func(r *networkservice.NetworkServiceRequest) { r.Connection.NetworkService = "" }},
		{"an unknown service of the own domain", func(r *networkservice.NetworkServiceRequest) {
			r.Connection.NetworkService, r.Connection.NetworkServiceEndpointName = "nothing", ""
		}},
		{"an unknown service of domain two", func(r *networkservice.NetworkServiceRequest) {
			r.Connection.NetworkService, r.Connection.NetworkServiceEndpointName = "nothing@two.example", ""
		}},
		{"a service without endpoints", func(r *networkservice.NetworkServiceRequest) {
			r.Connection.NetworkService, r.Connection.NetworkServiceEndpointName = "empty@two.example", ""
		}},
		{"an unknown endpoint", func(r *networkservice.NetworkServiceRequest) {
			r.Connection.NetworkServiceEndpointName = "nobody@two.example"
		}},
		{"an endpoint that cannot be dialled", func(r *networkservice.NetworkServiceRequest) {
			r.Connection.NetworkService = "dead@two.example"
			r.Connection.NetworkServiceEndpointName = "away@two.example"
		}},
		{"an unknown domain", func(r *networkservice.NetworkServiceRequest) {
			r.Connection.NetworkService, r.Connection.NetworkServiceEndpointName = service+"@nowhere.example", ""
		}},
		{"a domain that is no name", func(r *networkservice.NetworkServiceRequest) {
			r.Connection.NetworkService, r.Connection.NetworkServiceEndpointName = service+"@-bad-", ""
		}},
		{"an empty domain", func(r *networkservice.NetworkServiceRequest) {
			r.Connection.NetworkService, r.Connection.NetworkServiceEndpointName = service+"@", ""
		}},
		{"service and endpoint of two domains", func(r *networkservice.NetworkServiceRequest) {
			r.Connection.NetworkServiceEndpointName = "nse@one.example"
		}},
		{"no mechanism", func(r *networkservice.NetworkServiceRequest) { r.MechanismPreferences = nil }},
		{"VXLAN with an address that is none", func(r *networkservice.NetworkServiceRequest) {
			r.MechanismPreferences = []*networkservice.Mechanism{
				{Cls: cls.REMOTE, Type: "VXLAN", Parameters: map[string]string{"src_ip": "nowhere"}},
			}
		}},
	} {
		w.Step("%s", test.name)
		request := w.requestForTwo("id-1")
		test.change(request)
		w.attempt(at, w.as("nsc"), request)
		if request.GetConnection().GetNetworkServiceEndpointName() == "away@two.example" {
			// Agent one cannot know whether anything stands behind agent two.
			w.Await(toTwoProxy, "Close", 1)
		}
	}

	w.Step("no token and no expiry")
	w.attempt(at, w.ctx, w.requestForTwo("id-1"))
	w.Step("a token that has expired")
	w.attempt(at, w.asFor("nsc", -90*time.Minute), w.requestForTwo("id-1"))
	w.Step("a token whose expiry cannot be read")
	w.attempt(at, metadata.AppendToOutgoingContext(w.ctx,
		"nsm-client-token", "x", "nsm-client-token-expires", "tomorrow"), w.requestForTwo("id-1"))
	w.Step("an expiry on the path, without a token")
	request := w.requestForTwo("id-1")
	request.Connection.Path.PathSegments[0].Expires = timestamppb.New(time.Now().Add(tokenLifetime))
	w.attempt(at, w.ctx, request)
	w.Step("Closes: of nothing, of an unknown connection, of a path that breaks the rules")
	for _, connection := range []*networkservice.Connection{
		{}, w.request("id-7", serviceOfTwo).GetConnection(),
		{Id: "id-7", Path: &networkservice.Path{Index: 4}},
	} {
		_, _ = networkservice.NewNetworkServiceClient(at).Close(w.as("nsc"), connection)
	}
	w.closeAll(at, []*networkservice.Connection{base})
}

// attempt asks once; whether it is granted is the recording's business. What is granted is closed.
func (w *world) attempt(
	at *grpc.ClientConn, ctx context.Context, request *networkservice.NetworkServiceRequest) {
	w.t.Helper()
	connection, err := networkservice.NewNetworkServiceClient(at).Request(ctx, request)
	if err != nil {
		return
	}
	w.close(at, connection)
}

// Answers of an endpoint that break the rules, and refusals of its own.
func badAnswersScene(w *world) {
	var current atomic.Pointer[func(*networkservice.Connection) error]
	w.Step("an endpoint of domain two")
	w.serve(harness.PeerConfig{
		Name: "nse",
		OnRequest: func(
			_ context.Context, p *harness.Peer, request *networkservice.NetworkServiceRequest,
		) (*networkservice.Connection, error) {
			connection := grant(p, request)
			return connection, (*current.Load())(connection)
		},
	})
	w.found(serviceOfTwo)
	bad := func(change func(*networkservice.Connection)) func(*networkservice.Connection) error {
		return func(c *networkservice.Connection) error {
			change(c)
			return nil
		}
	}
	refusing := func(code codes.Code, text string) func(*networkservice.Connection) error {
		return func(*networkservice.Connection) error { return status.Error(code, text) }
	}
	for at, test := range []struct {
		name   string
		answer func(*networkservice.Connection) error
		// Something may stand behind the agents, which is closed after the refusal.
		mayStand bool
	}{
		{"the path lost segments", bad(func(c *networkservice.Connection) { c.Path.PathSegments = c.GetPath().GetPathSegments()[:1] }), true},
		{"no path", bad(func(c *networkservice.Connection) { c.Path = nil }), true},
		{"the index moved", bad(func(c *networkservice.Connection) { c.Path.Index++ }), true},
		{"another id", bad(func(c *networkservice.Connection) { c.Id = "another" }), true},
		{"another id of our segment", bad(func(c *networkservice.Connection) { c.Path.PathSegments[c.Path.Index].Id = "another" }), true},
		{"a hop above was renamed", bad(func(c *networkservice.Connection) { c.Path.PathSegments[0].Name = "mallory" }), true},
		{"no mechanism", bad(func(c *networkservice.Connection) { c.Mechanism = nil }), true},
		{"a mechanism that was not offered", bad(func(c *networkservice.Connection) { c.Mechanism.Type = "IPSEC" }), true},
		{"NotFound", refusing(codes.NotFound, "no such thing"), false},
		{"PermissionDenied", refusing(codes.PermissionDenied, "not you"), false},
		{"Unavailable", refusing(codes.Unavailable, "later"), true},
		{"ResourceExhausted, at length", refusing(codes.ResourceExhausted, strings.Repeat("full ", 50)), false},
	} {
		w.Step("%s", test.name)
		current.Store(&test.answer)
		request := w.requestForTwo(fmt.Sprint("id-", at))
		request.MechanismPreferences = []*networkservice.Mechanism{
			{Cls: cls.REMOTE, Type: "VXLAN", Parameters: map[string]string{"src_ip": internalOne}},
			{Cls: cls.REMOTE, Type: "WIREGUARD", Parameters: map[string]string{"src_ip": internalOne}},
		}
		w.refused(w.one.client, request)
		if test.mayStand {
			w.Await("agents > nse", "Close", 1)
			w.Await(toTwoProxy, "Close", 1)
		}
	}
}
