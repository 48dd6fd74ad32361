package wire

import (
	"context"
	"fmt"

	"github.com/networkservicemesh/api/pkg/api/networkservice"
	"github.com/networkservicemesh/api/pkg/api/networkservice/mechanisms/cls"
	"github.com/networkservicemesh/api/pkg/api/networkservice/mechanisms/kernel"
	"github.com/networkservicemesh/api/pkg/api/registry"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"

	"proxy-nsmgr/tests/interop/harness"
)

// The service and endpoint of domain two, as others ask for them.
const (
	serviceOfTwo  = service + "@" + harness.DomainTwo
	endpointOfTwo = "nse@" + harness.DomainTwo
)

// granting is an endpoint that grants what it is asked, with a context of its own.
func granting(name string) harness.PeerConfig {
	return harness.PeerConfig{
		Name: name,
		OnRequest: func(
			_ context.Context, p *harness.Peer, request *networkservice.NetworkServiceRequest,
		) (*networkservice.Connection, error) {
			connection := grant(p, request)
			connection.Context.IpContext = &networkservice.IPContext{
				SrcIpAddrs: []string{"172.16.1.1/32"}, DstIpAddrs: []string{"172.16.1.0/32"},
				SrcRoutes: []*networkservice.Route{{Prefix: "172.16.1.0/32"}},
			}
			connection.Context.ExtraContext = map[string]string{"of": name}
			return connection, nil
		},
	}
}

// serve starts an endpoint in domain two.
func (w *world) serve(config harness.PeerConfig) *harness.Peer {
	w.t.Helper()
	peer := w.endpoint(config)
	w.register(w.two.client, peer, config.Name, service)
	return peer
}

// awaitMonitors waits until agent one watches connections at agent two.
func (w *world) awaitMonitors(count int) {
	w.t.Helper()
	w.Await(toTwoProxy, "MonitorConnections", count)
	w.Await("agents > nse", "MonitorConnections", count)
}

func refresh(connection *networkservice.Connection) *networkservice.NetworkServiceRequest {
	return &networkservice.NetworkServiceRequest{
		Connection: connection.Clone(), MechanismPreferences: harness.KernelPreference(),
	}
}

// A client that asks the proxy, as a forwarder of its domain does: for an endpoint that it has found.
func requestOfProxyScene(w *world) {
	w.Step("an endpoint of domain two")
	w.serve(granting("nse"))
	w.found(serviceOfTwo)
	w.requests(w.one.client, w.requestForTwo("id-1"))
}

// A client that asks the agent of its node, which finds the endpoint itself.
func requestOfNodeScene(w *world) {
	w.Step("an endpoint of domain two")
	w.serve(granting("nse"))
	w.requests(w.one.node, w.request("id-1", serviceOfTwo))
}

// requests takes a connection through two agents from the first Request to the Close.
func (w *world) requests(at *grpc.ClientConn, request *networkservice.NetworkServiceRequest) {
	w.t.Helper()
	w.Step("a Request")
	request.Connection.Labels = map[string]string{"app": "x", "zone": "a"}
	request.Connection.Context.MTU = 1400
	request.Connection.Context.DnsContext = &networkservice.DNSContext{
		Configs: []*networkservice.DNSConfig{{DnsServerIps: []string{"192.0.2.53"}}},
	}
	connection := w.granted(at, request)
	w.awaitMonitors(1)

	w.Step("a refresh")
	connection = w.granted(at, refresh(connection))

	w.Step("a refresh with another context")
	changed := refresh(connection)
	changed.Connection.Context.MTU = 1300
	changed.Connection.Context.ExtraContext = map[string]string{"asked": "again"}
	connection = w.granted(at, changed)

	w.Step("the first Request again, as by a client whose answer was lost")
	again := w.granted(at, request)
	require.Equal(w.t, connection.GetPath().GetPathSegments()[1].GetId(),
		again.GetPath().GetPathSegments()[1].GetId())

	w.Step("a second connection, by the endpoint")
	second := w.requestForTwo("id-2")
	other := w.granted(at, second)

	w.Step("a Close, twice")
	w.close(at, connection)
	w.close(at, connection)

	w.Step("a Close as by a client that never got an answer")
	w.close(at, second.GetConnection())
	require.NotEmpty(w.t, other.GetId())
	w.AwaitQuiet()
}

// Another endpoint is asked for when the first is of no use any more.
func reselectScene(w *world) {
	w.Step("two endpoints of domain two")
	w.serve(granting("nse"))
	w.serve(granting("nse-other"))

	w.Step("a Request for the first")
	connection := w.granted(w.one.node, w.requestForTwo("id-1"))
	w.awaitMonitors(1)

	// Its answer comes after the first event of the monitor stream: that is not taken for later news.
	w.Step("a refresh")
	connection = w.granted(w.one.node, refresh(connection))

	w.Step("RESELECT_REQUESTED, with the first gone from the registry")
	_, err := endpoints(w.two.client).Unregister(w.as("nse"),
		&registry.NetworkServiceEndpoint{Name: "nse"})
	require.NoError(w.t, err)
	again := refresh(connection)
	again.Connection.State = networkservice.State_RESELECT_REQUESTED
	again.Connection.NetworkServiceEndpointName = ""
	again.Connection.Mechanism = nil
	again.Connection.Context = &networkservice.ConnectionContext{}
	connection = w.granted(w.one.node, again)
	w.Await("agents > nse-other", "MonitorConnections", 1)

	w.Step("the Close")
	w.close(w.one.node, connection)
	w.AwaitQuiet()
}

// Endpoints are chosen by the client's labels.
func labelsScene(w *world) {
	w.Step("a service with matches, and two endpoints")
	_, err := services(w.two.client).Register(w.as("nse"), &registry.NetworkService{
		Name: service, Payload: "ETHERNET", Matches: []*registry.Match{{
			SourceSelector: map[string]string{"app": "x"},
			Routes: []*registry.Destination{
				{DestinationSelector: map[string]string{"color": "{{.color}}"}},
			},
		}},
	})
	require.NoError(w.t, err)
	for _, color := range []string{"red", "blue"} {
		peer := w.endpoint(granting("nse-" + color))
		_, err := endpoints(w.two.client).Register(w.as("nse"), &registry.NetworkServiceEndpoint{
			Name: peer.Name, NetworkServiceNames: []string{service}, Url: peer.URL.String(),
			NetworkServiceLabels: map[string]*registry.NetworkServiceLabels{
				service: {Labels: map[string]string{"color": color}},
			},
		})
		require.NoError(w.t, err)
	}
	var granted []*networkservice.Connection
	for at, color := range []string{"blue", "red", "green"} {
		w.Step("a client that wants %s", color)
		request := w.request(fmt.Sprint("id-", at), serviceOfTwo)
		request.Connection.Labels = map[string]string{"app": "x", "color": color}
		if color == "green" {
			w.refused(w.one.node, request)
			continue
		}
		connection := w.granted(w.one.node, request)
		w.Await("agents > nse-"+color, "MonitorConnections", 1)
		if at == 0 {
			w.Await(toTwoProxy, "MonitorConnections", 1)
		}
		granted = append(granted, connection)
	}
	w.closeAll(w.one.node, granted)
}

// Addresses of nodes inside their domains, and as the internet sees them.
const (
	internalOne, publicOne = "10.1.0.5", "203.0.113.5"
	internalTwo, publicTwo = "10.2.0.6", "198.51.100.6"
)

func mapped(one, two *harness.AgentConfig) {
	one.MapIP = map[string]string{internalOne: publicOne}
	two.MapIP = map[string]string{internalTwo: publicTwo}
}

// Proxies without a forwarder pass mechanisms on and swap the addresses in them.
func mechanismsScene(w *world) {
	answers := map[string]map[string]string{
		"VXLAN": {
			"dst_ip": internalTwo, "dst_port": "4789", "vni": "7340034", "MTU": "1410",
			"sbfd_discriminator_dst": "4711", "sbfd_vni": "1001",
		},
		"WIREGUARD": {"dst_ip": internalTwo, "dst_port": "51820", "dst_public_key": "far+key="},
		"IPSEC":     {"dst_ip": internalTwo, "dst_port": "4500", "dst_public_key": "l"},
		"KERNEL":    {"name": "nsm-2"},
		"UNKNOWN":   {"dst_ip": internalTwo, "breed": "homing"},
	}
	w.Step("an endpoint of domain two")
	w.serve(harness.PeerConfig{
		Name: "nse",
		OnRequest: func(
			_ context.Context, p *harness.Peer, request *networkservice.NetworkServiceRequest,
		) (*networkservice.Connection, error) {
			connection := grant(p, request)
			for key, value := range answers[connection.GetMechanism().GetType()] {
				connection.Mechanism.Parameters[key] = value
			}
			return connection, nil
		},
	})
	w.found(serviceOfTwo)
	var granted []*networkservice.Connection
	for at, offered := range []*networkservice.Mechanism{
		{Cls: cls.REMOTE, Type: "VXLAN", Parameters: map[string]string{
			"src_ip": internalOne, "src_port": "4789", "MTU": "1440",
			"sbfd_discriminator_src": "815", "sbfd_vni": "1000",
		}},
		{Cls: cls.REMOTE, Type: "WIREGUARD", Parameters: map[string]string{
			"src_ip": internalOne, "src_port": "51820", "src_public_key": "near+key=", "MTU": "1440",
		}},
		{Cls: cls.REMOTE, Type: "IPSEC", Parameters: map[string]string{
			"src_ip": internalOne, "src_port": "4500", "src_public_key": "k",
		}},
		{Cls: cls.LOCAL, Type: kernel.MECHANISM, Parameters: map[string]string{
			"inodeURL": "inode://4/4026531840", "name": "nsm-1",
		}},
		{Cls: cls.REMOTE, Type: "UNKNOWN", Parameters: map[string]string{
			"src_ip": internalOne, "loft": "north", "": "nameless",
		}},
	} {
		w.Step("%s, with a second choice", offered.GetType())
		request := w.requestForTwo(fmt.Sprint("id-", at))
		request.MechanismPreferences = []*networkservice.Mechanism{
			offered, {Cls: cls.REMOTE, Type: "SECOND"},
		}
		connection := w.granted(w.one.client, request)
		if at == 0 {
			w.awaitMonitors(1)
		}
		if offered.GetCls() == cls.REMOTE {
			w.Step("%s, a refresh", offered.GetType())
			again := request.Clone()
			again.Connection = connection
			connection = w.granted(w.one.client, again)
		}
		granted = append(granted, connection)
	}
	w.closeAll(w.one.client, granted)
}

// A client and an endpoint of the same domain, by the socket of their node.
func nodeScene(w *world) {
	nse := w.endpoint(granting("nse"))
	at := w.one.node
	w.Step("register by the socket")
	w.register(at, nse, "nse", service)
	w.findEndpoints(at, &registry.NetworkServiceEndpoint{NetworkServiceNames: []string{service}})
	w.findEndpoints(at, &registry.NetworkServiceEndpoint{NetworkServiceNames: []string{service + "@" + harness.DomainOne}})

	w.Step("a Request by the socket")
	connection := w.granted(at, w.request("id-1", service))
	w.Await("agents > nse", "MonitorConnections", 1)
	w.Step("a Request by the socket that names the own domain")
	other := w.granted(at, w.request("id-2", service+"@"+harness.DomainOne))
	w.Step("the Closes")
	w.close(at, connection)
	w.close(at, other)
	w.AwaitQuiet()

	w.Step("a Request from another domain")
	connection = w.granted(w.two.node, w.request("id-3", service+"@"+harness.DomainOne))
	w.Await("agents > nse", "MonitorConnections", 1)
	w.Await(toOneProxy, "MonitorConnections", 1)
	w.Step("its Close")
	w.close(w.two.node, connection)
	w.AwaitQuiet()

	w.Step("unregister by the socket")
	w.unregister(at, nse, "nse", service)
	w.refused(at, w.request("id-4", service))
}

func signed(one, two *harness.AgentConfig) {
	one.Extra = map[string]any{"token": map[string]any{
		"spiffe_id": "spiffe://one.example/ns/nsm/sa/proxy", "audience": []string{"spiffe://a", "spiffe://b"},
	}, "max_token_lifetime": "5m"}
	two.Extra = map[string]any{"token": map[string]any{"algorithm": "es256"}}
}

// What the agents' own tokens say.
func tokensScene(w *world) {
	w.Step("an endpoint of domain two")
	w.serve(granting("nse"))
	w.Step("a Request")
	connection := w.granted(w.one.node, w.request("id-1", serviceOfTwo))
	w.awaitMonitors(1)
	w.Step("the Close")
	w.close(w.one.node, connection)
	w.AwaitQuiet()
}
