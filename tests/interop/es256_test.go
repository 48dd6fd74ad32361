package interop

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v4"
	"github.com/networkservicemesh/api/pkg/api/registry"
	"github.com/networkservicemesh/sdk/pkg/networkservice/chains/client"
	"github.com/networkservicemesh/sdk/pkg/tools/sandbox"
	"github.com/networkservicemesh/sdk/pkg/tools/spiffejwt"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/stretchr/testify/require"

	"proxy-nsmgr/tests/interop/harness"
)

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	return key
}

// newSVID is what a SPIFFE agent would give the real components.
func newSVID(t *testing.T, id string) *x509svid.SVID {
	t.Helper()
	key := newKey(t)
	uri, err := url.Parse(id)
	require.NoError(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		NotBefore:    time.Now().Add(-time.Minute),
		NotAfter:     time.Now().Add(time.Hour),
		URIs:         []*url.URL{uri},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	require.NoError(t, err)
	certificate, err := x509.ParseCertificate(der)
	require.NoError(t, err)
	return &x509svid.SVID{
		ID:           spiffeid.RequireFromString(id),
		Certificates: []*x509.Certificate{certificate},
		PrivateKey:   key,
	}
}

// svidSource always gives the same SVID.
type svidSource struct{ svid *x509svid.SVID }

func (s svidSource) GetX509SVID() (*x509svid.SVID, error) { return s.svid, nil }

// writeKey writes a key as SPIFFE's helpers do.
func writeKey(t *testing.T, key *ecdsa.PrivateKey) string {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	require.NoError(t, err)
	path := filepath.Join(t.TempDir(), "svid_key.pem")
	text := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	require.NoError(t, os.WriteFile(path, text, 0o600))
	return path
}

// A chain in which everybody signs with a key of the own, as in the field: the real components with
// that of their SVID, our agents with that of a file. Each token can be checked by its public key.
func TestES256(t *testing.T) {
	const realID = "spiffe://real.example/component"
	svid := newSVID(t, realID)
	tokens := spiffejwt.TokenGeneratorFunc(svidSource{svid}, 10*time.Minute)
	sign := func(domain *harness.DomainConfig, id string, key *ecdsa.PrivateKey) {
		domain.Tokens = tokens
		domain.Configure = func(config *harness.AgentConfig) {
			config.Extra = map[string]any{"token": map[string]any{
				"algorithm": "es256", "key_file": writeKey(t, key), "spiffe_id": id,
			}}
		}
	}
	keys := []*ecdsa.PrivateKey{newKey(t), newKey(t)}
	ids := []string{"spiffe://one.example/proxy", "spiffe://two.example/proxy"}
	m := newMesh(t, func(one, two *harness.DomainConfig) {
		sign(one, ids[0], keys[0])
		sign(two, ids[1], keys[1])
	})
	m.two.RegisterService(m.ctx, t, &registry.NetworkService{Name: service})
	m.two.Nodes[0].NewEndpoint(m.ctx, nse(endpoint, service), tokens)
	client := plainClient(m.ctx, m.one.Nodes[0], client.WithDialOptions(
		sandbox.DialOptions(sandbox.WithTokenGenerator(tokens))...))
	connection := requestTwice(m.ctx, t, client, m.request())

	segments := connection.GetPath().GetPathSegments()
	require.Len(t, segments, interdomainSegments)
	for at, segment := range segments {
		key, id := svid.PrivateKey.Public(), realID
		if ours := at - 3; ours == 0 || ours == 1 {
			key, id = keys[ours].Public(), ids[ours]
		}
		said := new(jwt.RegisteredClaims)
		_, err := jwt.NewParser(jwt.WithValidMethods([]string{"ES256"})).ParseWithClaims(
			segment.GetToken(), said, func(*jwt.Token) (any, error) { return key, nil })
		require.NoError(t, err, segment.GetName())
		require.Equal(t, id, said.Subject, segment.GetName())
		expires := segment.GetExpires().AsTime()
		require.WithinDuration(t, said.ExpiresAt.Time, expires, time.Second, segment.GetName())
		require.LessOrEqual(t, time.Until(expires), 10*time.Minute, segment.GetName())
	}
	m.end(client, connection)
}
