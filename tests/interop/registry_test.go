package interop

import (
	"context"
	"fmt"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/networkservicemesh/api/pkg/api/registry"
	"github.com/networkservicemesh/sdk/pkg/tools/sandbox"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/types/known/timestamppb"

	"proxy-nsmgr/tests/interop/harness"
)

// onRegistries runs a test against the registry role of our agent, and against the sdk's registry:
// what the latter does is what NSM's components expect.
func onRegistries(t *testing.T, test func(ctx context.Context, t *testing.T, at *url.URL)) {
	t.Run("ours", func(t *testing.T) {
		agent := harness.StartAgent(t, harness.AgentConfig{Domain: "one.example"})
		test(t.Context(), t, agent.RegistryURL())
	})
	t.Run("for comparison, real", func(t *testing.T) {
		// Without a deadline: the sdk's registry takes what is left of it off an endpoint's life.
		ctx, cancel := context.WithCancel(context.Background())
		t.Cleanup(cancel)
		domain := sandbox.NewBuilder(ctx, t).SetNodesCount(0).
			SetNSMgrProxySupplier(nil).SetRegistryProxySupplier(nil).Build()
		test(ctx, t, domain.Registry.URL)
	})
}

func labels(service string, of map[string]string) map[string]*registry.NetworkServiceLabels {
	return map[string]*registry.NetworkServiceLabels{service: {Labels: of}}
}

func names(endpoints []*registry.NetworkServiceEndpoint) []string {
	found := []string{}
	for _, endpoint := range endpoints {
		found = append(found, endpoint.GetName())
	}
	return found
}

func TestRegistryFindsEndpoints(t *testing.T) {
	onRegistries(t, func(ctx context.Context, t *testing.T, at *url.URL) {
		client := harness.EndpointRegistry(ctx, at)
		for _, entry := range []*registry.NetworkServiceEndpoint{
			{
				Name: "red", NetworkServiceNames: []string{"a"}, Url: "tcp://192.0.2.1:5001",
				NetworkServiceLabels: labels("a", map[string]string{"color": "red", "size": "s"}),
			},
			{
				Name: "blue", NetworkServiceNames: []string{"a", "b"}, Url: "tcp://192.0.2.2:5001",
				NetworkServiceLabels: labels("a", map[string]string{"color": "blue", "size": "s"}),
			},
			{Name: "bare", NetworkServiceNames: []string{"b", "c"}, Url: "tcp://198.51.100.3:5001"},
		} {
			registered, err := client.Register(ctx, entry.Clone())
			require.NoError(t, err)
			require.Equal(t, entry.GetName(), registered.GetName())
			require.Equal(t, entry.GetUrl(), registered.GetUrl())
			require.NotNil(t, registered.GetInitialRegistrationTime())
			left := time.Until(registered.GetExpirationTime().AsTime())
			require.True(t, left > 0 && left <= time.Minute, "expires in %v", left)
		}
		for name, test := range map[string]struct {
			query *registry.NetworkServiceEndpoint
			found []string
		}{
			"everything":                  {nse(""), []string{"red", "blue", "bare"}},
			"a name":                      {nse("blue"), []string{"blue"}},
			"a name matches whole":        {nse("blu"), []string{}},
			"a service":                   {nse("", "b"), []string{"blue", "bare"}},
			"services, a subset":          {nse("", "c", "b"), []string{"bare"}},
			"services, not a subset":      {nse("", "a", "c"), []string{}},
			"a name and a wrong service":  {nse("red", "b"), []string{}},
			"a part of the URL":           {&registry.NetworkServiceEndpoint{Url: "192.0.2."}, []string{"red", "blue"}},
			"a URL nobody has":            {&registry.NetworkServiceEndpoint{Url: "192.0.2.9"}, []string{}},
			"a label":                     {&registry.NetworkServiceEndpoint{NetworkServiceLabels: labels("a", map[string]string{"color": "red"})}, []string{"red"}},
			"a label of both":             {&registry.NetworkServiceEndpoint{NetworkServiceLabels: labels("a", map[string]string{"size": "s"})}, []string{"red", "blue"}},
			"a label of another service":  {&registry.NetworkServiceEndpoint{NetworkServiceLabels: labels("b", map[string]string{"size": "s"})}, []string{}},
			"a label's wrong value":       {&registry.NetworkServiceEndpoint{NetworkServiceLabels: labels("a", map[string]string{"size": "xl"})}, []string{}},
			"two labels, one of them bad": {&registry.NetworkServiceEndpoint{NetworkServiceLabels: labels("a", map[string]string{"size": "s", "color": "green"})}, []string{}},
		} {
			require.ElementsMatch(t, test.found, names(findEndpoints(ctx, t, client, test.query)), name)
		}

		_, err := client.Unregister(ctx, nse("red", "a"))
		require.NoError(t, err)
		require.ElementsMatch(t, []string{"blue", "bare"}, names(findEndpoints(ctx, t, client, nse(""))))

		// Registered again it keeps its first time, and takes what is new.
		before := findEndpoints(ctx, t, client, nse("bare"))[0]
		_, err = client.Register(ctx, &registry.NetworkServiceEndpoint{
			Name: "bare", NetworkServiceNames: []string{"d"}, Url: "tcp://198.51.100.4:5001",
		})
		require.NoError(t, err)
		require.Empty(t, findEndpoints(ctx, t, client, nse("", "c")))
		now := findEndpoints(ctx, t, client, nse("", "d"))[0]
		require.Equal(t, "tcp://198.51.100.4:5001", now.GetUrl())
		require.Equal(t, before.GetInitialRegistrationTime().AsTime(),
			now.GetInitialRegistrationTime().AsTime())
	})
}

func TestRegistryFindsServices(t *testing.T) {
	onRegistries(t, func(ctx context.Context, t *testing.T, at *url.URL) {
		client := harness.ServiceRegistry(ctx, at)
		find := func(query *registry.NetworkService) []*registry.NetworkService {
			stream, err := client.Find(ctx, &registry.NetworkServiceQuery{NetworkService: query})
			require.NoError(t, err)
			return registry.ReadNetworkServiceList(stream)
		}
		matches := []*registry.Match{{
			SourceSelector: map[string]string{"app": "x"},
			Routes: []*registry.Destination{
				{DestinationSelector: map[string]string{"app": "y"}, Weight: 2},
			},
			Fallthrough: true,
			Metadata:    &registry.Metadata{Labels: map[string]string{"k": "v"}},
		}, {Metadata: &registry.Metadata{}}}
		registered, err := client.Register(ctx, &registry.NetworkService{Name: "plain"})
		require.NoError(t, err)
		require.Equal(t, "IP", registered.GetPayload())
		_, err = client.Register(ctx,
			&registry.NetworkService{Name: "ether", Payload: "ETHERNET", Matches: matches})
		require.NoError(t, err)

		require.Len(t, find(&registry.NetworkService{}), 2)
		found := find(&registry.NetworkService{Name: "ether"})
		require.Len(t, found, 1)
		require.Equal(t, "ETHERNET", found[0].GetPayload())
		require.Len(t, found[0].GetMatches(), 2)
		for at, match := range matches {
			require.Equal(t, match.String(), found[0].GetMatches()[at].String())
		}
		require.Len(t, find(&registry.NetworkService{Payload: "IP"}), 1)
		require.Len(t, find(&registry.NetworkService{Matches: matches}), 1)
		require.Empty(t, find(&registry.NetworkService{Matches: matches[:1]}))
		require.Empty(t, find(&registry.NetworkService{Name: "eth"}))

		_, err = client.Unregister(ctx, &registry.NetworkService{Name: "ether"})
		require.NoError(t, err)
		require.Empty(t, find(&registry.NetworkService{Name: "ether"}))
	})
}

// watched are the events of a watch, as `+name` and `-name`.
type watched struct {
	t      *testing.T
	mutex  sync.Mutex
	events []string
}

func watch(
	ctx context.Context, t *testing.T, client registry.NetworkServiceEndpointRegistryClient,
	query *registry.NetworkServiceEndpoint,
) *watched {
	t.Helper()
	ctx, cancel := context.WithCancel(ctx)
	stream, err := client.Find(ctx,
		&registry.NetworkServiceEndpointQuery{NetworkServiceEndpoint: query, Watch: true})
	require.NoError(t, err)
	w := &watched{t: t}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			event, err := stream.Recv()
			if err != nil {
				return
			}
			sign := "+"
			if event.GetDeleted() {
				sign = "-"
			}
			w.mutex.Lock()
			w.events = append(w.events, sign+event.GetNetworkServiceEndpoint().GetName())
			w.mutex.Unlock()
		}
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	return w
}

func (w *watched) all() []string {
	w.mutex.Lock()
	defer w.mutex.Unlock()
	return w.events[:len(w.events):len(w.events)]
}

// added counts the entries that were ever there. On a busy machine the real registry ends some and has them again.
func (w *watched) added() int {
	names := map[string]struct{}{}
	for _, event := range w.all() {
		if strings.HasPrefix(event, "+") {
			names[event] = struct{}{}
		}
	}
	return len(names)
}

// becomes waits until the events are these, in this order.
func (w *watched) becomes(events ...string) {
	w.t.Helper()
	harness.Eventually(w.t, harness.EventDeadline, func() bool { return len(w.all()) >= len(events) },
		func() string { return fmt.Sprintf("%q of %q", w.all(), events) })
	require.Equal(w.t, events, w.all())
}

func TestRegistryWatch(t *testing.T) {
	onRegistries(t, func(ctx context.Context, t *testing.T, at *url.URL) {
		client := harness.EndpointRegistry(ctx, at)
		register := func(entry *registry.NetworkServiceEndpoint) {
			entry.Url = "tcp://192.0.2.1:5001"
			_, err := client.Register(ctx, entry)
			require.NoError(t, err)
		}
		register(nse("first", "a"))
		byService := watch(ctx, t, client, nse("", "a"))
		byService.becomes("+first")
		byName := watch(ctx, t, client, nse("second"))
		register(nse("other", "b"))
		register(nse("second", "a"))
		byService.becomes("+first", "+second")
		byName.becomes("+second")
		_, err := client.Unregister(ctx, nse("first", "a"))
		require.NoError(t, err)
		byService.becomes("+first", "+second", "-first")
		_, err = client.Unregister(ctx, nse("second", "a"))
		require.NoError(t, err)
		byService.becomes("+first", "+second", "-first", "-second")
		byName.becomes("+second", "-second")
	})
}

// What nobody registers again is gone when it said, and whoever watches hears of it.
func TestRegistryExpiry(t *testing.T) {
	onRegistries(t, func(ctx context.Context, t *testing.T, at *url.URL) {
		// A bare client: the sdk's would register again in time.
		client := registry.NewNetworkServiceEndpointRegistryClient(harness.Dial(t, at))
		changes := watch(ctx, t, client, nse("", "a"))
		short := nse("short", "a")
		short.Url = "tcp://192.0.2.1:5001"
		// Long enough to be registered in time on a machine that is busy.
		short.ExpirationTime = timestamppb.New(time.Now().Add(5 * time.Second))
		_, err := client.Register(ctx, short.Clone())
		require.NoError(t, err)
		changes.becomes("+short", "-short")
		require.Empty(t, findEndpoints(ctx, t, client, nse("", "a")))
		require.True(t, time.Now().After(short.GetExpirationTime().AsTime()))
	})
}

// The sdk's client registers again before the end, so that the endpoint stays; no watcher is told a
// deletion in between.
func TestRegistryKeepsWhatIsRefreshed(t *testing.T) {
	agent := harness.StartAgent(t, harness.AgentConfig{Domain: "one.example"})
	ctx := testContext(t)
	client := harness.EndpointRegistry(ctx, agent.RegistryURL())
	changes := watch(ctx, t, client, nse("", "a"))
	short := nse("kept", "a")
	short.Url = "tcp://192.0.2.1:5001"
	// A third of it is what a busy machine has for the next registration.
	first := time.Now().Add(10 * time.Second)
	short.ExpirationTime = timestamppb.New(first)
	_, err := client.Register(ctx, short)
	require.NoError(t, err)
	harness.Eventually(t, harness.EventDeadline, func() bool {
		found := findEndpoints(ctx, t, client, nse("kept"))
		return len(found) == 1 && found[0].GetExpirationTime().AsTime().After(first) &&
			time.Now().After(first)
	}, func() string { return fmt.Sprint(findEndpoints(ctx, t, client, nse("kept"))) })
	require.NotContains(t, changes.all(), "-kept")
}

func TestRegistryHoldsAThousand(t *testing.T) {
	const count = 1000
	onRegistries(t, func(ctx context.Context, t *testing.T, at *url.URL) {
		client := registry.NewNetworkServiceEndpointRegistryClient(harness.Dial(t, at))
		changes := watch(ctx, t, client, nse("", "all"))
		for number := range count {
			entry := nse(fmt.Sprintf("nse-%03d", number), "all", fmt.Sprint("decade-", number/10))
			entry.Url = "tcp://192.0.2.1:5001"
			_, err := client.Register(ctx, entry)
			require.NoError(t, err)
		}
		require.Len(t, findEndpoints(ctx, t, client, nse("", "all")), count)
		require.Len(t, findEndpoints(ctx, t, client, nse("", "decade-42")), 10)
		require.Len(t, findEndpoints(ctx, t, client, nse("nse-777")), 1)
		late := watch(ctx, t, client, nse("", "all"))
		for _, w := range []*watched{changes, late} {
			harness.Eventually(t, harness.EventDeadline, func() bool { return w.added() == count },
				func() string { return fmt.Sprint(w.added(), " of ", count, " in ", len(w.all()), " events") })
		}
	})
}
