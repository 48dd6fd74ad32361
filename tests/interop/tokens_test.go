package interop

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v4"
	"github.com/golang/protobuf/ptypes/empty"
	"github.com/networkservicemesh/api/pkg/api/networkservice"
	"github.com/networkservicemesh/api/pkg/api/registry"
	"github.com/networkservicemesh/sdk/pkg/networkservice/chains/client"
	"github.com/networkservicemesh/sdk/pkg/networkservice/core/next"
	"github.com/networkservicemesh/sdk/pkg/networkservice/utils/count"
	"github.com/networkservicemesh/sdk/pkg/tools/sandbox"
	"github.com/networkservicemesh/sdk/pkg/tools/token"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"proxy-nsmgr/tests/interop/harness"
)

// tokenSecret signs our agents' tokens in these tests.
const tokenSecret = "a secret that both domains know"

// shortLife is that of tokens whose end a test waits for: long enough that a busy machine makes a
// connection within it.
const shortLife = 10 * time.Second

func withTokenSecret(config *harness.AgentConfig) {
	config.Extra = map[string]any{"token": map[string]any{"secret": tokenSecret}}
}

// callTokens is an endpoint's view of the tokens that calls carry.
type callTokens struct {
	tokens chan string
}

func (c *callTokens) Request(
	ctx context.Context, request *networkservice.NetworkServiceRequest,
) (*networkservice.Connection, error) {
	text, _, err := token.FromContext(ctx)
	if err != nil {
		return nil, err
	}
	c.tokens <- text
	return next.Server(ctx).Request(ctx, request)
}

func (c *callTokens) Close(ctx context.Context, connection *networkservice.Connection) (*empty.Empty, error) {
	return next.Server(ctx).Close(ctx, connection)
}

func claims(t *testing.T, segment *networkservice.PathSegment) (*jwt.Token, *jwt.RegisteredClaims) {
	t.Helper()
	claims := new(jwt.RegisteredClaims)
	parsed, _, err := jwt.NewParser().ParseUnverified(segment.GetToken(), claims)
	require.NoError(t, err, "token of %s", segment.GetName())
	return parsed, claims
}

// Every segment has a token and the time at which it ends; ours are signed as configured, are for
// ten minutes at most and say who we are.
func TestTokensOnThePath(t *testing.T) {
	ctx := testContext(t)
	dns := harness.NewDNS(t)
	one := harness.NewDomain(ctx, t,
		harness.DomainConfig{Name: "one.example", DNS: dns, Configure: withTokenSecret})
	two := harness.NewDomain(ctx, t,
		harness.DomainConfig{Name: "two.example", DNS: dns, Configure: withTokenSecret})
	two.RegisterService(ctx, t, &registry.NetworkService{Name: service})
	seen := &callTokens{tokens: make(chan string, 8)}
	two.Nodes[0].NewEndpoint(ctx, nse(endpoint, service), sandbox.GenerateTestToken, seen)
	client := plainClient(ctx, one.Nodes[0])
	connection := requestTwice(ctx, t, client, harness.RequestFor("id", two.Service(service)))

	segments := connection.GetPath().GetPathSegments()
	require.Len(t, segments, interdomainSegments)
	for _, segment := range segments {
		_, claims := claims(t, segment)
		expires := segment.GetExpires().AsTime()
		require.WithinDuration(t, claims.ExpiresAt.Time, expires, time.Second, segment.GetName())
		require.True(t, expires.After(time.Now()), segment.GetName())
	}
	for at, domain := range map[int]*harness.Domain{3: one, 4: two} {
		parsed, claims := claims(t, segments[at])
		require.Equal(t, domain.Agent.Name, segments[at].GetName())
		require.Equal(t, "HS256", parsed.Method.Alg())
		require.Equal(t, fmt.Sprintf("spiffe://%s/%s", domain.Name, domain.Agent.Name), claims.Subject)
		require.LessOrEqual(t, time.Until(segments[at].GetExpires().AsTime()), 10*time.Minute)
		_, err := jwt.Parse(segments[at].GetToken(),
			func(*jwt.Token) (any, error) { return []byte(tokenSecret), nil })
		require.NoError(t, err)
	}
	// The call's metadata is what ends up in the caller's segment.
	<-seen.tokens
	require.Equal(t, segments[interdomainSegments-2].GetToken(), <-seen.tokens)
	_, err := client.Close(ctx, connection)
	require.NoError(t, err)
	waitUntilEmpty(t, one, two)
}

// A client that vanishes leaves nothing: when its token ends, so does the connection, everywhere.
func TestTokenExpiryCloses(t *testing.T) {
	for _, test := range pairs {
		t.Run(test.name, func(t *testing.T) {
			ctx := testContext(t)
			dns := harness.NewDNS(t)
			one := harness.NewDomain(ctx, t,
				harness.DomainConfig{Name: "one.example", DNS: dns, Proxy: test.client})
			two := harness.NewDomain(ctx, t,
				harness.DomainConfig{Name: "two.example", DNS: dns, Proxy: test.endpoint})
			two.RegisterService(ctx, t, &registry.NetworkService{Name: service})
			counter := new(count.Server)
			two.Nodes[0].NewEndpoint(ctx, nse(endpoint, service), sandbox.GenerateTestToken, counter)
			short := sandbox.DialOptions(sandbox.WithTokenGenerator(
				sandbox.GenerateExpiringToken(shortLife)))
			client := plainClient(ctx, one.Nodes[0], client.WithDialOptions(short...))
			// Without a deadline: the sdk's chains take what is left of it off a connection's life.
			connection, err := client.Request(context.WithoutCancel(ctx),
				harness.RequestFor("id", two.Service(service)))
			require.NoError(t, err)
			require.Zero(t, counter.Closes())
			ends := connection.GetPath().GetPathSegments()[0].GetExpires().AsTime()
			harness.Eventually(t, harness.EventDeadline, func() bool { return counter.Closes() == 1 },
				func() string { return "the endpoint was not told" })
			// Not before its time; how soon after is the machine's affair.
			require.Greater(t, time.Now(), ends.Add(-shortLife/2))
			waitUntilEmpty(t, one, two)
		})
	}
}

// Our proxy ends by itself what its previous hop stopped refreshing, without being told to.
func TestTokenExpiryAtTheProxy(t *testing.T) {
	ctx := testContext(t)
	pair := harness.NewAgentPair(t, nil)
	peer := harness.StartPeer(t, harness.PeerConfig{Name: endpoint})
	pair.Serve(ctx, t, peer, service)
	name := pair.Discover(ctx, t, service+"@"+harness.DomainTwo)
	monitor := harness.OpenMonitor(t, pair.One.ProxyURL())
	monitor.WaitForInitial()
	client := pair.Client(ctx, client.WithDialOptions(sandbox.DialOptions(
		sandbox.WithTokenGenerator(sandbox.GenerateExpiringToken(shortLife)))...))
	request := harness.RequestFor("id", service+"@"+harness.DomainTwo)
	request.Connection.NetworkServiceEndpointName = name
	_, err := client.Request(ctx, request)
	require.NoError(t, err)
	monitor.WaitFor("a DELETE", func(event *networkservice.ConnectionEvent) bool {
		return event.GetType() == networkservice.ConnectionEventType_DELETE && only(event) != nil
	})
	harness.Eventually(t, harness.EventDeadline, func() bool { return len(peer.Closes()) == 1 },
		func() string { return "the endpoint was not told" })
	harness.WaitUntilEmpty(t, pair.One, pair.Two)
}

// Whoever does not say until when it stands is refused, in the sdk's words.
func TestTokensMissing(t *testing.T) {
	ctx := testContext(t)
	pair := harness.NewAgentPair(t, nil)
	bare := networkservice.NewNetworkServiceClient(harness.Dial(t, pair.One.ProxyURL()))
	request := harness.RequestFor("id", service+"@"+harness.DomainTwo)
	request.Connection.Path = &networkservice.Path{
		PathSegments: []*networkservice.PathSegment{{Name: "client", Id: "id"}},
	}
	_, err := bare.Request(ctx, request)
	require.Equal(t, codes.InvalidArgument, status.Code(err), err)
	require.ErrorContains(t, err, "expiration for the previous path segment cannot be nil")
	require.Zero(t, pair.One.OpenConnections(t))
}
