package wire

import (
	"strings"
	"time"

	"github.com/networkservicemesh/api/pkg/api/networkservice"
	"github.com/networkservicemesh/api/pkg/api/registry"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/types/known/timestamppb"

	"proxy-nsmgr/tests/interop/harness"
)

// matches are those of a service that has everything a match can have.
var matches = []*registry.Match{{
	SourceSelector: map[string]string{"app": "x"},
	Routes: []*registry.Destination{
		{DestinationSelector: map[string]string{"app": "y", "zone": "{{.zone}}"}, Weight: 2},
	},
	Fallthrough: true,
	Metadata:    &registry.Metadata{Labels: map[string]string{"k": "v"}},
}, {Metadata: &registry.Metadata{}}}

func labelled(name, url string, services ...string) *registry.NetworkServiceEndpoint {
	return &registry.NetworkServiceEndpoint{
		Name: name, Url: url, NetworkServiceNames: services,
		NetworkServiceLabels: map[string]*registry.NetworkServiceLabels{
			services[0]: {Labels: map[string]string{"app": "y", "size": "s"}},
		},
	}
}

// The registry of a domain, asked by names that are its own.
func registryScene(w *world) {
	const at = clientOne
	client := w.one.client
	w.Step("watches that find nothing yet")
	stopServices := w.watchServices(client, &registry.NetworkService{Name: "web"})
	stopEndpoints := w.watchEndpoints(client,
		&registry.NetworkServiceEndpoint{NetworkServiceNames: []string{"web"}})

	w.Step("register services")
	for _, service := range []*registry.NetworkService{
		{Name: "web", Payload: "ETHERNET", Matches: matches}, {Name: "plain"},
	} {
		_, err := services(client).Register(w.as("nse"), service)
		require.NoError(w.t, err)
	}
	w.Await(at, "NetworkServiceRegistry/Find", 1)

	w.Step("register endpoints, one of them twice")
	long := labelled("nse-1", "tcp://192.0.2.1:5001", "web", "plain")
	short := labelled("nse-2", "tcp://[2001:db8::1]:5001", "web")
	short.ExpirationTime = timestamppb.New(time.Now().Add(50 * time.Second))
	for _, entry := range []*registry.NetworkServiceEndpoint{long, short} {
		_, err := endpoints(client).Register(w.as("nse"), entry)
		require.NoError(w.t, err)
	}
	w.Await(at, "NetworkServiceEndpointRegistry/Find", 2)
	long.Url = "tcp://192.0.2.9:5001"
	_, err := endpoints(client).Register(w.as("nse"), long)
	require.NoError(w.t, err)
	w.Await(at, "NetworkServiceEndpointRegistry/Find", 3)

	w.Step("find services by everything, name, payload and matches")
	for _, query := range []*registry.NetworkService{
		{}, {Name: "web"}, {Payload: "IP"}, {Matches: matches}, {Name: "we"},
	} {
		w.findServices(client, query)
	}

	w.Step("find endpoints by everything, name, service, URL and label")
	for _, query := range []*registry.NetworkServiceEndpoint{
		{}, {Name: "nse-2"}, {NetworkServiceNames: []string{"plain"}}, {Url: "192.0.2."},
		{NetworkServiceLabels: map[string]*registry.NetworkServiceLabels{
			"web": {Labels: map[string]string{"size": "s"}},
		}},
		{Name: "nobody"},
	} {
		w.findEndpoints(client, query)
	}

	w.Step("a registry call with a path in its metadata")
	ctx := metadata.AppendToOutgoingContext(w.as("nse"), "path", `{"Index":0,"PathSegments":null}`)
	_, err = services(client).Register(ctx, &registry.NetworkService{Name: "plain"})
	require.NoError(w.t, err)

	w.Step("unregister, also what is not there")
	for _, name := range []string{"nse-1", "nse-2", "nobody"} {
		_, err := endpoints(client).Unregister(w.as("nse"), &registry.NetworkServiceEndpoint{Name: name})
		require.NoError(w.t, err)
	}
	w.Await(at, "NetworkServiceEndpointRegistry/Find", 2)
	for _, name := range []string{"web", "plain", "nobody"} {
		_, err := services(client).Unregister(w.as("nse"), &registry.NetworkService{Name: name})
		require.NoError(w.t, err)
	}
	w.Await(at, "NetworkServiceRegistry/Find", 1)

	w.Step("the watches end")
	stopServices()
	stopEndpoints()
}

// The registry of another domain, asked through ours.
func registryOfOthersScene(w *world) {
	client := w.one.client
	w.ShowServiceWatches()
	w.Step("watches of the other domain that find nothing yet")
	stopServices := w.watchServices(client, &registry.NetworkService{Name: "web@two.example"})
	stopEndpoints := w.watchEndpoints(client,
		&registry.NetworkServiceEndpoint{NetworkServiceNames: []string{"web@two.example"}})
	w.AwaitCalls(toTwoRegistry, "Find", 2)

	w.Step("register there")
	_, err := services(client).Register(w.as("nse"),
		&registry.NetworkService{Name: "web@two.example", Matches: matches})
	require.NoError(w.t, err)
	path := metadata.AppendToOutgoingContext(w.as("nse"), "path",
		`{"Index":1,"PathSegments":[{"token":"first"},{"token":"second"}]}`)
	_, err = endpoints(client).Register(path,
		labelled("nse-1@two.example", "tcp://192.0.2.1:5001", "web@two.example"))
	require.NoError(w.t, err)
	w.Await(clientOne, "NetworkServiceRegistry/Find", 1)
	w.Await(clientOne, "NetworkServiceEndpointRegistry/Find", 1)

	w.Step("find there, by the names that they have here and there")
	w.findServices(client, &registry.NetworkService{Name: "web@two.example"})
	w.findEndpoints(client, &registry.NetworkServiceEndpoint{Name: "nse-1@two.example"})
	w.findEndpoints(client,
		&registry.NetworkServiceEndpoint{NetworkServiceNames: []string{"web@two.example"}})
	w.findEndpoints(w.two.client, &registry.NetworkServiceEndpoint{NetworkServiceNames: []string{"web"}})
	w.findEndpoints(w.two.client, &registry.NetworkServiceEndpoint{Name: "nse-1@two.example"})

	w.Step("unregister there")
	_, err = endpoints(client).Unregister(path,
		labelled("nse-1@two.example", "tcp://192.0.2.1:5001", "web@two.example"))
	require.NoError(w.t, err)
	_, err = services(client).Unregister(w.as("nse"), &registry.NetworkService{Name: "web@two.example"})
	require.NoError(w.t, err)
	w.Await(clientOne, "NetworkServiceRegistry/Find", 1)
	w.Await(clientOne, "NetworkServiceEndpointRegistry/Find", 1)

	w.Step("the watches end")
	stopServices()
	stopEndpoints()
	w.AwaitQuiet()
}

// What a registry refuses.
func registryRefusalsScene(w *world) {
	client := w.one.client
	register := func(entry *registry.NetworkServiceEndpoint) {
		w.t.Helper()
		_, err := endpoints(client).Register(w.as("nse"), entry)
		require.Error(w.t, err)
	}
	w.Step("URLs that nobody can dial")
	for _, url := range []string{"", "nowhere", "gopher://192.0.2.1:70", "tcp://", "tcp://192.0.2.1", "unix:///run/nse.sock"} {
		register(labelled("nse-1", url, "web"))
	}
	w.Step("names")
	register(labelled("", "tcp://192.0.2.1:5001", "web"))
	register(labelled("nse-1@one.example@two.example", "tcp://192.0.2.1:5001", "web"))
	register(labelled("nse-1@two.example", "tcp://192.0.2.1:5001", "web@one.example"))
	register(labelled(strings.Repeat("x", 600), "tcp://192.0.2.1:5001", "web"))
	_, err := services(client).Register(w.as("nse"), &registry.NetworkService{})
	require.Error(w.t, err)
	w.Step("domains that cannot be resolved")
	register(labelled("nse-1@nowhere.example", "tcp://192.0.2.1:5001", "web"))
	w.findEndpoints(client, &registry.NetworkServiceEndpoint{Name: "nse-1@nowhere.example"})
	w.findServices(client, &registry.NetworkService{Name: "web@nowhere.example"})
	_, err = endpoints(client).Unregister(w.as("nse"),
		&registry.NetworkServiceEndpoint{Name: "nse-1@nowhere.example"})
	require.Error(w.t, err)
	w.Step("a registration that has ended")
	ended := labelled("nse-1", "tcp://192.0.2.1:5001", "web")
	ended.ExpirationTime = timestamppb.New(time.Now().Add(-90 * time.Minute))
	register(ended)
	w.Step("metadata that cannot be read")
	for _, pair := range [][]string{
		{"path", "{"}, {"path", `{"Index":7,"PathSegments":[{"token":"x"}]}`},
		{"nsm-client-token-expires", "tomorrow", "nsm-client-token", "x"},
		{"nsm-client-token", "", "nsm-client-token-expires", "2040-01-02T15:04:05Z"},
	} {
		ctx := metadata.AppendToOutgoingContext(w.ctx, pair...)
		_, err = services(client).Register(ctx, &registry.NetworkService{Name: "web"})
		require.Error(w.t, err)
	}
}

// A floating domain has a registry and no proxy.
func floatingScene(w *world) {
	floating := w.startFloating()
	nse := w.endpoint(harness.PeerConfig{Name: "nse"})
	w.Step("an endpoint of domain two registers in the floating domain")
	w.register(w.two.client, nse, "nse@floating.example", service+"@floating.example")
	w.findEndpoints(floating, &registry.NetworkServiceEndpoint{NetworkServiceNames: []string{service}})

	w.Step("a client of domain one finds it there")
	w.findServices(w.one.client, &registry.NetworkService{Name: service + "@floating.example"})
	w.findEndpoints(w.one.client,
		&registry.NetworkServiceEndpoint{NetworkServiceNames: []string{service + "@floating.example"}})

	w.Step("and asks for it by the service")
	connection := w.granted(w.one.node, w.request("id-1", service+"@floating.example"))
	w.awaitMonitors(1)
	w.Step("a refresh")
	connection = w.granted(w.one.node, &networkservice.NetworkServiceRequest{Connection: connection})
	w.Step("the Close")
	w.close(w.one.node, connection)
	w.AwaitQuiet()

	w.Step("unregister")
	w.unregister(w.two.client, nse, "nse@floating.example", service+"@floating.example")
	w.findEndpoints(floating, &registry.NetworkServiceEndpoint{})
}

// The registry of a domain is another process, and so is the NSMgr that serves its endpoints.
func upstreamScene(w *world) {
	nsmgr := w.endpoint(harness.PeerConfig{Name: "nsmgr"})
	proxy := w.start("proxy", harness.AgentConfig{
		Name: "agent-proxy", Domain: "three.example", DNS: w.dns,
		RegistryURL: w.two.registry.URL().String(), UpstreamNSMgrURL: nsmgr.URL.String(),
	})
	w.Step("the NSMgr registers an endpoint in the domain's registry")
	w.register(w.two.client, nsmgr, "nse", service)

	w.Step("find by the domain of the proxy")
	w.findServices(w.one.client, &registry.NetworkService{Name: service + "@three.example"})
	w.findEndpoints(w.one.client,
		&registry.NetworkServiceEndpoint{NetworkServiceNames: []string{service + "@three.example"}})

	w.Step("a Request from another domain goes to the NSMgr")
	connection := w.granted(w.one.node, w.request("id-1", service+"@three.example"))
	w.Await("agents > nsmgr", "MonitorConnections", 1)
	w.Await("agents > proxy's proxy", "MonitorConnections", 1)
	w.Step("the Close")
	w.close(w.one.node, connection)
	w.AwaitQuiet()

	w.Step("register and unregister through the proxy's registry")
	w.register(proxy.client, nsmgr, "nse-2", "other")
	w.unregister(proxy.client, nsmgr, "nse-2", "other")
	w.Step("an NSMgr that another one asks for a name of another domain")
	w.register(proxy.client, nsmgr, "nse-3@one.example", "other@one.example")
	w.unregister(proxy.client, nsmgr, "nse-3@one.example", "other@one.example")
}

// Names of other domains go to somebody else's proxy, as they are.
func registryProxyScene(w *world) {
	nse := w.endpoint(harness.PeerConfig{Name: "nse"})
	agent := w.start("nsmgr", harness.AgentConfig{
		Name: "agent-nsmgr", Domain: "one.example",
		Extra: map[string]any{"registry_proxy_url": w.one.registry.URL().String()},
	})
	w.Step("register and find in domain two, by the registry proxy of domain one")
	w.register(agent.client, nse, "nse@two.example", service+"@two.example")
	w.findServices(agent.client, &registry.NetworkService{Name: service + "@two.example"})
	w.findEndpoints(agent.client,
		&registry.NetworkServiceEndpoint{NetworkServiceNames: []string{service + "@two.example"}})
	w.Step("unregister")
	w.unregister(agent.client, nse, "nse@two.example", service+"@two.example")
}
