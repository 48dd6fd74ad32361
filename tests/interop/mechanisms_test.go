package interop

import (
	"context"
	"maps"
	"net"
	"strconv"
	"sync"
	"testing"

	"github.com/golang/protobuf/ptypes/empty"
	"github.com/networkservicemesh/api/pkg/api/networkservice"
	"github.com/networkservicemesh/api/pkg/api/networkservice/mechanisms/cls"
	"github.com/networkservicemesh/api/pkg/api/networkservice/mechanisms/kernel"
	"github.com/networkservicemesh/api/pkg/api/networkservice/mechanisms/vxlan"
	"github.com/networkservicemesh/api/pkg/api/registry"
	"github.com/networkservicemesh/sdk/pkg/networkservice/chains/nsmgr"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/mechanisms"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/mechanisms/vxlan/vni"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/null"
	"github.com/networkservicemesh/sdk/pkg/networkservice/core/next"
	"github.com/networkservicemesh/sdk/pkg/tools/sandbox"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"

	"proxy-nsmgr/tests/interop/harness"
)

// The forwarders' addresses inside their domains, and as the internet sees them.
const (
	internalOne, publicOne = "10.1.0.5", "203.0.113.5"
	internalTwo, publicTwo = "10.2.0.6", "198.51.100.6"
)

// recorder keeps the mechanisms that pass a point of a chain.
type recorder struct {
	mutex   sync.Mutex
	asked   []*networkservice.Mechanism
	granted []*networkservice.Mechanism
}

func (r *recorder) record(
	request *networkservice.NetworkServiceRequest,
	answer func() (*networkservice.Connection, error),
) (*networkservice.Connection, error) {
	mechanism := request.GetConnection().GetMechanism()
	if mechanism == nil && len(request.GetMechanismPreferences()) > 0 {
		mechanism = request.GetMechanismPreferences()[0]
	}
	r.mutex.Lock()
	r.asked = append(r.asked, mechanism.Clone())
	r.mutex.Unlock()
	connection, err := answer()
	if err == nil {
		r.mutex.Lock()
		defer r.mutex.Unlock()
		r.granted = append(r.granted, connection.GetMechanism().Clone())
	}
	return connection, err
}

// last is what was asked and granted last.
func (r *recorder) last() (asked, granted map[string]string) {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	return r.asked[len(r.asked)-1].GetParameters(), r.granted[len(r.granted)-1].GetParameters()
}

type recordingServer struct{ *recorder }

func (r recordingServer) Request(
	ctx context.Context, request *networkservice.NetworkServiceRequest,
) (*networkservice.Connection, error) {
	return r.record(request, func() (*networkservice.Connection, error) {
		return next.Server(ctx).Request(ctx, request)
	})
}

func (r recordingServer) Close(
	ctx context.Context, connection *networkservice.Connection,
) (*empty.Empty, error) {
	return next.Server(ctx).Close(ctx, connection)
}

type recordingClient struct{ *recorder }

func (r recordingClient) Request(
	ctx context.Context, request *networkservice.NetworkServiceRequest, options ...grpc.CallOption,
) (*networkservice.Connection, error) {
	return r.record(request, func() (*networkservice.Connection, error) {
		return next.Client(ctx).Request(ctx, request, options...)
	})
}

func (r recordingClient) Close(
	ctx context.Context, connection *networkservice.Connection, options ...grpc.CallOption,
) (*empty.Empty, error) {
	return next.Client(ctx).Close(ctx, connection, options...)
}

// offerVXLAN is the client's half of a forwarder: it offers VXLAN, as real forwarders do.
type offerVXLAN struct{}

func (offerVXLAN) Request(
	ctx context.Context, request *networkservice.NetworkServiceRequest, options ...grpc.CallOption,
) (*networkservice.Connection, error) {
	request.MechanismPreferences = append(request.MechanismPreferences,
		&networkservice.Mechanism{Cls: cls.REMOTE, Type: vxlan.MECHANISM})
	return next.Client(ctx).Request(ctx, request, options...)
}

func (offerVXLAN) Close(
	ctx context.Context, connection *networkservice.Connection, options ...grpc.CallOption,
) (*empty.Empty, error) {
	return next.Client(ctx).Close(ctx, connection, options...)
}

// vxlanNode is a node whose forwarder has a VXLAN address; kept sees what it offers, or is offered.
func vxlanNode(ip string, offers bool, kept *recorder) sandbox.SetupNodeFunc {
	return func(ctx context.Context, node *sandbox.Node, _ int) {
		node.NewNSMgr(ctx, sandbox.UniqueName("nsmgr"), nil, sandbox.GenerateTestToken, nsmgr.NewServer)
		var options []sandbox.ForwarderOption
		if offers {
			options = append(options, sandbox.WithForwarderAdditionalFunctionalityClient(
				offerVXLAN{}, vni.NewClient(net.ParseIP(ip)), recordingClient{kept}))
		} else {
			options = append(options, sandbox.WithForwarderAdditionalFunctionalityServer(
				recordingServer{kept},
				mechanisms.NewServer(map[string]networkservice.NetworkServiceServer{
					vxlan.MECHANISM:  vni.NewServer(net.ParseIP(ip)),
					kernel.MECHANISM: null.NewServer(),
				})))
		}
		node.NewForwarder(ctx, &registry.NetworkServiceEndpoint{
			Name:                sandbox.UniqueName("forwarder"),
			NetworkServiceNames: []string{"forwarder"},
			NetworkServiceLabels: map[string]*registry.NetworkServiceLabels{
				"forwarder": {Labels: map[string]string{"p2p": "true"}},
			},
		}, sandbox.GenerateTestToken, options...)
	}
}

// Real forwarders on both sides: what each of them sees is what it would see through NSM's own
// proxies, which the last row runs for comparison.
func TestVXLANParameters(t *testing.T) {
	all := append(pairs[:len(pairs):len(pairs)], joint{"for comparison, real and real", harness.Real, harness.Real})
	onEach(t, all, func(t *testing.T, joint joint) {
		near, far := new(recorder), new(recorder)
		m := newMesh(t, joint.of, func(one, two *harness.DomainConfig) {
			one.MapIP = map[string]string{internalOne: publicOne}
			one.NodeSetup = vxlanNode(internalOne, true, near)
			two.MapIP = map[string]string{internalTwo: publicTwo}
			two.NodeSetup = vxlanNode(internalTwo, false, far)
		})
		m.serve(endpoint)
		client := plainClient(m.ctx, m.one.Nodes[0])

		connection, err := client.Request(m.ctx, m.request())
		require.NoError(t, err)
		offered, granted := near.last()
		require.Equal(t, map[string]string{"src_ip": internalOne, "src_port": "4789"}, offered)
		vni := granted["vni"]
		number, err := strconv.ParseUint(vni, 10, 24)
		require.NoError(t, err)
		require.NotZero(t, number)
		require.Equal(t, map[string]string{
			"src_ip": internalOne, "src_port": "4789", "orig_src_ip": "",
			"dst_ip": publicTwo, "dst_port": "4789", "orig_dst_ip": internalTwo, "vni": vni,
		}, granted)
		wasOffered, hasGranted := far.last()
		require.Equal(t, map[string]string{
			"src_ip": publicOne, "orig_src_ip": internalOne, "src_port": "4789",
			"dst_ip": "", "orig_dst_ip": "",
		}, wasOffered)
		require.Equal(t, vni, hasGranted["vni"])
		require.Equal(t, internalTwo, hasGranted["dst_ip"])

		// A refresh swaps what the first Request swapped, and the VNI stays.
		connection, err = client.Request(m.ctx, harness.Refresh(m.request(), connection))
		require.NoError(t, err)
		_, again := near.last()
		require.Equal(t, granted, again)
		_, hasGrantedAgain := far.last()
		require.Equal(t, vni, hasGrantedAgain["vni"])
		m.end(client, connection)
	})
}

// A proxy passes on mechanisms that it does not know, and swaps the addresses in them as in any other.
func TestMechanismsPassThrough(t *testing.T) {
	// The endpoint's answer to what it is asked, by the name of the test.
	answers := map[string]map[string]string{}
	b := newBare(t, mappedAddresses, granting(
		func(request *networkservice.NetworkServiceRequest, connection *networkservice.Connection) {
			answer := answers[request.GetConnection().GetLabels()["test"]]
			maps.Copy(connection.GetMechanism().GetParameters(), answer)
		}))

	for _, test := range []struct {
		name, class, kind string
		offered           map[string]string
		arrives           map[string]string
		answer            map[string]string
		returns           map[string]string
	}{{
		name: "WIREGUARD", class: cls.REMOTE, kind: "WIREGUARD",
		offered: map[string]string{
			"src_ip": internalOne, "src_port": "51820", "src_public_key": "near+key=", "MTU": "1440",
		},
		arrives: map[string]string{
			"src_ip": publicOne, "orig_src_ip": internalOne, "src_port": "51820",
			"src_public_key": "near+key=", "MTU": "1440", "dst_ip": "", "orig_dst_ip": "",
		},
		answer: map[string]string{
			"dst_ip": internalTwo, "dst_port": "51820", "dst_public_key": "far+key=", "MTU": "1420",
		},
		returns: map[string]string{
			"src_ip": internalOne, "orig_src_ip": "", "src_port": "51820", "src_public_key": "near+key=",
			"dst_ip": publicTwo, "orig_dst_ip": internalTwo, "dst_port": "51820",
			"dst_public_key": "far+key=", "MTU": "1420",
		},
	}, {
		name: "IPSEC", class: cls.REMOTE, kind: "IPSEC",
		offered: map[string]string{"src_ip": internalOne, "src_port": "4500", "src_public_key": "k"},
		arrives: map[string]string{
			"src_ip": publicOne, "orig_src_ip": internalOne, "src_port": "4500", "src_public_key": "k",
			"dst_ip": "", "orig_dst_ip": "",
		},
		answer: map[string]string{"dst_ip": internalTwo, "dst_port": "4500", "dst_public_key": "l"},
		returns: map[string]string{
			"src_ip": internalOne, "orig_src_ip": "", "src_port": "4500", "src_public_key": "k",
			"dst_ip": publicTwo, "orig_dst_ip": internalTwo, "dst_port": "4500", "dst_public_key": "l",
		},
	}, {
		name: "a type nobody knows", class: cls.REMOTE, kind: "CARRIER_PIGEON",
		offered: map[string]string{"src_ip": internalOne, "loft": "north", "": "nameless"},
		arrives: map[string]string{
			"src_ip": publicOne, "orig_src_ip": internalOne, "loft": "north", "": "nameless",
			"dst_ip": "", "orig_dst_ip": "",
		},
		answer: map[string]string{"dst_ip": internalTwo, "breed": "homing"},
		returns: map[string]string{
			"src_ip": internalOne, "orig_src_ip": "", "loft": "north", "": "nameless",
			"dst_ip": publicTwo, "orig_dst_ip": internalTwo, "breed": "homing",
		},
	}, {
		name: "KERNEL is not a proxy's business", class: cls.LOCAL, kind: kernel.MECHANISM,
		offered: map[string]string{"inodeURL": "inode://4/4026531840", "name": "nsm-1"},
		arrives: map[string]string{"inodeURL": "inode://4/4026531840", "name": "nsm-1"},
		answer:  map[string]string{"name": "nsm-2"},
		returns: map[string]string{"inodeURL": "inode://4/4026531840", "name": "nsm-2"},
	}, {
		name: "MEMIF is not a proxy's business", class: cls.LOCAL, kind: "MEMIF",
		offered: map[string]string{"socketfile": "@memif.sock", "netnsInode": "inode://4/7"},
		arrives: map[string]string{"socketfile": "@memif.sock", "netnsInode": "inode://4/7"},
		answer:  map[string]string{"socketFile": "/run/memif.sock"},
		returns: map[string]string{
			"socketfile": "@memif.sock", "netnsInode": "inode://4/7", "socketFile": "/run/memif.sock",
		},
	}} {
		t.Run(test.name, func(t *testing.T) {
			answers[test.name] = test.answer
			client := b.Client(b.ctx)
			request := b.request(test.name, harness.DomainTwo)
			request.Connection.Labels = map[string]string{"test": test.name}
			request.MechanismPreferences = []*networkservice.Mechanism{
				{Cls: test.class, Type: test.kind, Parameters: test.offered},
				{Cls: cls.REMOTE, Type: "SECOND_CHOICE"},
			}
			before := len(b.peer.Requests())
			connection, err := client.Request(b.ctx, request)
			require.NoError(t, err)
			arrived := b.peer.Requests()[before]
			require.Len(t, arrived.GetMechanismPreferences(), 2)
			require.Equal(t, test.kind, arrived.GetMechanismPreferences()[0].GetType())
			require.Equal(t, test.class, arrived.GetMechanismPreferences()[0].GetCls())
			require.Equal(t, test.arrives, arrived.GetMechanismPreferences()[0].GetParameters())
			require.Equal(t, test.kind, connection.GetMechanism().GetType())
			require.Equal(t, test.returns, connection.GetMechanism().GetParameters())

			refreshed, err := client.Request(b.ctx, harness.Refresh(request, connection))
			require.NoError(t, err)
			require.Equal(t, test.returns, refreshed.GetMechanism().GetParameters())
			arrived = b.peer.Requests()[before+1]
			require.Equal(t, test.arrives["src_ip"],
				arrived.GetConnection().GetMechanism().GetParameters()["src_ip"])
			b.close(client, refreshed)
		})
	}
	b.waitUntilEmpty()
}

// The connection's MTU is the least that any hop says; a proxy neither raises nor loses it.
func TestMTU(t *testing.T) {
	b := newBare(t, nil, granting(
		func(_ *networkservice.NetworkServiceRequest, connection *networkservice.Connection) {
			if own := uint32(1400); connection.GetContext().GetMTU() > own || connection.GetContext().GetMTU() == 0 {
				connection.GetContext().MTU = own
			}
		}))
	for _, test := range []struct {
		name       string
		asked, got uint32
	}{
		{"nobody but the endpoint says", 0, 1400},
		{"the client's is larger", 9000, 1400},
		{"the client's is smaller", 1280, 1280},
	} {
		t.Run(test.name, func(t *testing.T) {
			client := b.Client(b.ctx)
			request := b.request(test.name, harness.DomainTwo)
			request.Connection.Context.MTU = test.asked
			before := len(b.peer.Requests())
			connection, err := client.Request(b.ctx, request)
			require.NoError(t, err)
			require.Equal(t, test.asked, b.peer.Requests()[before].GetConnection().GetContext().GetMTU())
			require.Equal(t, test.got, connection.GetContext().GetMTU())
			b.close(client, connection)
		})
	}
}
