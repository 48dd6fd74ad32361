package interop

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v4"
	"github.com/golang/protobuf/ptypes/empty"
	"github.com/networkservicemesh/api/pkg/api/networkservice"
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

// shortLived makes a client's tokens end after shortLife.
func shortLived() client.Option {
	return client.WithDialOptions(sandbox.DialOptions(
		sandbox.WithTokenGenerator(sandbox.GenerateExpiringToken(shortLife)))...)
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
	m := newMesh(t, func(one, two *harness.DomainConfig) {
		one.Configure, two.Configure = withTokenSecret, withTokenSecret
	})
	seen := &callTokens{tokens: make(chan string, 8)}
	m.serve(endpoint, seen)
	client := plainClient(m.ctx, m.one.Nodes[0])
	connection := requestTwice(m.ctx, t, client, m.request())

	segments := connection.GetPath().GetPathSegments()
	require.Len(t, segments, interdomainSegments)
	for _, segment := range segments {
		_, claims := claims(t, segment)
		expires := segment.GetExpires().AsTime()
		require.WithinDuration(t, claims.ExpiresAt.Time, expires, time.Second, segment.GetName())
		require.True(t, expires.After(time.Now()), segment.GetName())
	}
	for at, domain := range map[int]*harness.Domain{3: m.one, 4: m.two} {
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
	m.end(client, connection)
}

// The connection of a client that vanishes ends everywhere when the client's token does.
func TestTokenExpiryCloses(t *testing.T) {
	onEach(t, pairs, func(t *testing.T, joint joint) {
		m := newMesh(t, joint.of)
		counter := new(count.Server)
		m.serve(endpoint, counter)
		client := plainClient(m.ctx, m.one.Nodes[0], shortLived())
		// Without a deadline: the sdk's chains take what is left of it off a connection's life.
		connection, err := client.Request(context.WithoutCancel(m.ctx), m.request())
		require.NoError(t, err)
		require.Zero(t, counter.Closes())
		ends := connection.GetPath().GetPathSegments()[0].GetExpires().AsTime()
		harness.Eventually(t, harness.EventDeadline, func() bool { return counter.Closes() == 1 },
			func() string { return "the endpoint got no Close" })
		// Not before its time; how soon after is the machine's affair.
		require.Greater(t, time.Now(), ends.Add(-shortLife/2))
		waitUntilEmpty(t, m.one, m.two)
	})
}

// Our proxy closes by itself what its previous hop stopped refreshing.
func TestTokenExpiryAtTheProxy(t *testing.T) {
	b := newBare(t, nil, harness.PeerConfig{})
	monitor := harness.OpenMonitor(t, b.One.ProxyURL())
	monitor.WaitForInitial()
	_, err := b.Client(b.ctx, shortLived()).Request(b.ctx, b.request("id", harness.DomainTwo))
	require.NoError(t, err)
	monitor.WaitFor("a DELETE", func(event *networkservice.ConnectionEvent) bool {
		return event.GetType() == networkservice.ConnectionEventType_DELETE && only(event) != nil
	})
	harness.Eventually(t, harness.EventDeadline, func() bool { return len(b.peer.Closes()) == 1 },
		func() string { return "the endpoint got no Close" })
	b.waitUntilEmpty()
}

// A Request without an expiry of the previous segment is refused with the sdk's error.
func TestTokensMissing(t *testing.T) {
	agent := harness.StartAgent(t, harness.AgentConfig{Domain: harness.DomainOne})
	bare := networkservice.NewNetworkServiceClient(harness.Dial(t, agent.ProxyURL()))
	request := harness.RequestFor("id", service+"@"+harness.DomainTwo)
	request.Connection.Path = &networkservice.Path{
		PathSegments: []*networkservice.PathSegment{{Name: "client", Id: "id"}},
	}
	_, err := bare.Request(testContext(t), request)
	require.Equal(t, codes.InvalidArgument, status.Code(err), err)
	require.ErrorContains(t, err, "expiration for the previous path segment cannot be nil")
	require.Zero(t, agent.OpenConnections(t))
}
