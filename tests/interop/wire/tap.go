package wire

import (
	"context"
	"io"
	"net"
	"net/url"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"proxy-nsmgr/tests/interop/harness"
)

// maxMessage is above every limit of the parties, so that they enforce their own.
const maxMessage = 16 << 20

// Tap is a transparent gRPC proxy in front of one party.
type Tap struct {
	recording *Recording
	edge      string
	listen    *url.URL
	listener  *harness.Listener
	backend   *grpc.ClientConn
}

// URL is where it serves.
func (p *Tap) URL() *url.URL { return p.listen }

// Cut closes the connections of all callers, as a crash of the party would.
func (p *Tap) Cut() { p.listener.CutConnections() }

// Tap serves at listen, which is tcp or unix, and passes calls on to target. Edge is the name of this
// place in the recording: who calls whom.
func (r *Recording) Tap(t testing.TB, edge string, listen, target *url.URL) *Tap {
	t.Helper()
	backend, err := grpc.NewClient(dialName(target),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDisableRetry(),
		grpc.WithDefaultCallOptions(grpc.ForceCodecV2(rawCodec{}),
			grpc.MaxCallRecvMsgSize(maxMessage), grpc.MaxCallSendMsgSize(maxMessage)))
	if err != nil {
		t.Fatal(err)
	}
	address := listen.Host
	if listen.Scheme == "unix" {
		address = listen.Path
	}
	listener, err := net.Listen(listen.Scheme, address)
	if err != nil {
		t.Fatalf("the tap %q: %v", edge, err)
	}
	tap := &Tap{
		recording: r, edge: edge, listen: listen,
		listener: harness.NewListener(listener), backend: backend,
	}
	server := grpc.NewServer(
		grpc.ForceServerCodecV2(rawCodec{}),
		grpc.UnknownServiceHandler(tap.handle),
		grpc.WaitForHandlers(true),
		grpc.MaxRecvMsgSize(maxMessage), grpc.MaxSendMsgSize(maxMessage),
		// Callers probe idle connections more often than gRPC for Go allows by default.
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{
			MinTime: time.Second, PermitWithoutStream: true,
		}))
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = server.Serve(tap.listener)
	}()
	t.Cleanup(func() {
		server.Stop()
		<-served
		_ = backend.Close()
	})
	return tap
}

func dialName(of *url.URL) string {
	if of.Scheme == "unix" {
		return of.String()
	}
	return "passthrough:///" + of.Host
}

// anyCall is the most general kind of call: unary ones are streams of one message.
var anyCall = &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}

func (p *Tap) handle(_ any, caller grpc.ServerStream) error {
	method, _ := grpc.MethodFromServerStream(caller)
	sent, _ := metadata.FromIncomingContext(caller.Context())
	call := p.recording.begin(p.edge, method, sent, timeLeft(caller.Context()))
	ctx, cancel := context.WithCancel(metadata.NewOutgoingContext(caller.Context(), forwarded(sent)))
	defer cancel()
	party, err := p.backend.NewStream(ctx, anyCall, method)
	if err == nil {
		go passRequests(call, caller, party)
		err = passAnswers(call, caller, party)
	}
	if caller.Context().Err() != nil {
		call.endByCaller()
	} else {
		call.end(status.Convert(err))
	}
	return err
}

func timeLeft(ctx context.Context) time.Duration {
	deadline, is := ctx.Deadline()
	if !is {
		return 0
	}
	return time.Until(deadline)
}

func passRequests(call *call, caller grpc.ServerStream, party grpc.ClientStream) {
	for {
		var message frame
		if err := caller.RecvMsg(&message); err != nil {
			if err == io.EOF {
				_ = party.CloseSend()
			}
			return
		}
		call.asked(message)
		if err := party.SendMsg(&message); err != nil {
			return
		}
	}
}

// passAnswers returns the status with which the party ended the call.
func passAnswers(call *call, caller grpc.ServerStream, party grpc.ClientStream) error {
	// Headers go on as soon as they are here: a stream may stay without a message for long. A refusal
	// has none.
	if header, err := party.Header(); err == nil && header != nil {
		passed := call.header(header)
		if err := caller.SendHeader(forwarded(header)); err != nil {
			return err
		}
		passed()
	}
	for {
		var message frame
		if err := party.RecvMsg(&message); err != nil {
			call.trailer(party.Trailer())
			caller.SetTrailer(forwarded(party.Trailer()))
			if err == io.EOF {
				return nil
			}
			return err
		}
		passed := call.answered(message)
		if err := caller.SendMsg(&message); err != nil {
			return status.Error(codes.Canceled, err.Error())
		}
		passed()
	}
}

// forwarded is metadata without what belongs to the transport.
func forwarded(all metadata.MD) metadata.MD {
	kept := metadata.MD{}
	for key, values := range all {
		if !isTransport(key) {
			kept[key] = values
		}
	}
	return kept
}

func isTransport(key string) bool {
	switch key {
	case ":authority", "content-type", "user-agent", "accept-encoding", "te", "date",
		"grpc-accept-encoding", "grpc-encoding":
		return true
	}
	return false
}
