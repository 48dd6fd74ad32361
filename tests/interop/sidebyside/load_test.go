package sidebyside

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/networkservicemesh/api/pkg/api/networkservice"
	"github.com/networkservicemesh/api/pkg/api/registry"
	"github.com/networkservicemesh/sdk/pkg/tools/sandbox"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"

	"proxy-nsmgr/tests/interop/harness"
)

// clientName is the name of the client's path segment.
const clientName = "client"

// callTimeout is a client's patience; it is NSM's.
const callTimeout = 15 * time.Second

// requestFor is a client's first Request for the endpoint.
func (s *scene) requestFor(id string) *networkservice.NetworkServiceRequest {
	request := harness.RequestFor(id, service+"@"+domainTwo)
	request.Connection.NetworkServiceEndpointName = s.target
	request.Connection.Path = &networkservice.Path{
		PathSegments: []*networkservice.PathSegment{{Name: clientName, Id: id}},
	}
	return request
}

func (s *scene) request(
	request *networkservice.NetworkServiceRequest,
) (*networkservice.Connection, error) {
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	return networkservice.NewNetworkServiceClient(s.calls).Request(ctx, request)
}

func (s *scene) close(connection *networkservice.Connection) error {
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	_, err := networkservice.NewNetworkServiceClient(s.calls).Close(ctx, connection)
	return err
}

// pair is a Request and its Close.
func (s *scene) pair(id string) error {
	connection, err := s.request(s.requestFor(id))
	if err != nil {
		return err
	}
	return s.close(connection)
}

type found struct {
	name string
	err  error
}

// find asks for the service's endpoint as the client's node does.
func (s *scene) find(ctx context.Context) found {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	stream, err := registry.NewNetworkServiceEndpointRegistryClient(s.calls).Find(ctx,
		&registry.NetworkServiceEndpointQuery{NetworkServiceEndpoint: &registry.NetworkServiceEndpoint{
			NetworkServiceNames: []string{service + "@" + domainTwo},
		}})
	if err != nil {
		return found{err: err}
	}
	answer, err := stream.Recv()
	if err != nil {
		return found{err: fmt.Errorf("find: %w", err)}
	}
	if _, err := stream.Recv(); !errors.Is(err, io.EOF) {
		return found{err: fmt.Errorf("more than one endpoint, or no end: %w", err)}
	}
	return found{name: answer.GetNetworkServiceEndpoint().GetName()}
}

// newID is a connection id that no other has.
func (s *scene) newID(worker int) string {
	s.next++
	return fmt.Sprintf("%s-%d-%d", clientName, worker, s.next)
}

// rate is what a load found.
type rate struct {
	// Rounds is how many the other numbers are medians of.
	Rounds    int     `json:"rounds"`
	InFlight  int     `json:"in_flight"`
	PerSecond float64 `json:"per_second"`
	P50       float64 `json:"p50_ms"`
	P99       float64 `json:"p99_ms"`
	CPU       struct {
		One float64 `json:"one"`
		Two float64 `json:"two"`
	} `json:"cpu_ms_per_call"`
}

// limit ends a load after a time, or after a number of calls when that is not zero.
type limit struct {
	time  time.Duration
	calls int64
}

// run keeps inFlight calls at work until the limit, and tells their latencies. A call that fails
// fails the measurement.
func (s *scene) run(inFlight int, until limit, call func(worker, number int) error) rate {
	s.t.Helper()
	var (
		group   sync.WaitGroup
		mutex   sync.Mutex
		all     []time.Duration
		failure error
		started atomic.Int64
	)
	before, began := s.cpu(), time.Now()
	for worker := range inFlight {
		group.Go(func() {
			var mine []time.Duration
			var err error
			for number := 0; err == nil; number++ {
				if until.calls != 0 && started.Add(1) > until.calls {
					break
				}
				if until.calls == 0 && time.Since(began) > until.time {
					break
				}
				start := time.Now()
				if err = call(worker, number); err == nil {
					mine = append(mine, time.Since(start))
				}
			}
			mutex.Lock()
			defer mutex.Unlock()
			all = append(all, mine...)
			failure = errors.Join(failure, err)
		})
	}
	group.Wait()
	took, after := time.Since(began), s.cpu()
	require.NoError(s.t, failure)
	require.NotEmpty(s.t, all)
	found := rate{InFlight: inFlight, PerSecond: float64(len(all)) / took.Seconds()}
	found.P50, found.P99 = quantile(all, 0.5), quantile(all, 0.99)
	perCall := func(at int) float64 {
		return float64((after[at] - before[at]).Microseconds()) / 1000 / float64(len(all))
	}
	found.CPU.One, found.CPU.Two = perCall(0), perCall(1)
	return found
}

// pairs runs Request and Close; ids are never used twice.
func (s *scene) pairs(inFlight int, until limit) rate {
	s.t.Helper()
	s.next++
	run := s.next
	return s.run(inFlight, until, func(worker, number int) error {
		return s.pair(fmt.Sprintf("%s-%d-%d-%d", clientName, run, worker, number))
	})
}

// refreshes asks again for connections that stand.
func (s *scene) refreshes(inFlight int, until limit) rate {
	s.t.Helper()
	open := s.open(inFlight)
	defer s.closeAll(open)
	return s.run(inFlight, until, func(worker, _ int) error {
		request := s.requestFor(open[worker].GetId())
		request.Connection = open[worker].Clone()
		connection, err := s.request(request)
		if err == nil {
			open[worker] = connection
		}
		return err
	})
}

// finds asks for the endpoint.
func (s *scene) finds(inFlight int, until limit) rate {
	s.t.Helper()
	return s.run(inFlight, until, func(int, int) error { return s.find(context.Background()).err })
}

// open makes connections, eight at a time.
func (s *scene) open(count int) []*networkservice.Connection {
	s.t.Helper()
	connections := make([]*networkservice.Connection, count)
	ids := make([]string, count)
	for at := range ids {
		ids[at] = s.newID(at)
	}
	var next atomic.Int64
	s.run(min(count, ratioInFlight), limit{calls: int64(count)}, func(int, int) error {
		at := next.Add(1) - 1
		connection, err := s.request(s.requestFor(ids[at]))
		connections[at] = connection
		return err
	})
	return connections
}

func (s *scene) closeAll(connections []*networkservice.Connection) {
	s.t.Helper()
	var next atomic.Int64
	s.run(min(len(connections), ratioInFlight), limit{calls: int64(len(connections))}, func(int, int) error {
		return s.close(connections[next.Add(1)-1])
	})
}

// streamsPerConnection keeps monitors below what a server lets one HTTP/2 connection have.
const streamsPerConnection = 250

// monitor opens a stream for each connection, as NSM's previous hops do, and tells on the channel
// when each is told DOWN. It returns when every stream has told its connection.
func (s *scene) monitor(
	ctx context.Context, connections []*networkservice.Connection,
) <-chan time.Time {
	s.t.Helper()
	down := make(chan time.Time, len(connections))
	ready := make(chan error, len(connections))
	var calls *grpc.ClientConn
	for at, connection := range connections {
		if at%streamsPerConnection == 0 {
			var err error
			calls, err = grpc.NewClient(s.one.Host, sandbox.DialOptions()...)
			require.NoError(s.t, err)
			s.t.Cleanup(func() { _ = calls.Close() })
		}
		segment := &networkservice.PathSegment{Name: clientName, Id: connection.GetId()}
		stream, err := networkservice.NewMonitorConnectionClient(calls).MonitorConnections(ctx,
			&networkservice.MonitorScopeSelector{PathSegments: []*networkservice.PathSegment{segment}})
		require.NoError(s.t, err)
		go follow(stream, ready, down)
	}
	for range connections {
		select {
		case err := <-ready:
			require.NoError(s.t, err)
		case <-time.After(time.Minute):
			require.Fail(s.t, "a monitor does not begin")
		}
	}
	return down
}

func follow(
	stream networkservice.MonitorConnection_MonitorConnectionsClient,
	ready chan<- error, down chan<- time.Time,
) {
	isReady := false
	for {
		event, err := stream.Recv()
		if err != nil {
			if !isReady {
				ready <- err
			}
			return
		}
		for _, connection := range event.GetConnections() {
			if !isReady {
				isReady = true
				ready <- nil
			}
			if connection.GetState() == networkservice.State_DOWN {
				down <- time.Now()
				return
			}
		}
	}
}

// quantile of latencies, in milliseconds.
func quantile(all []time.Duration, part float64) float64 {
	sorted := slices.Sorted(slices.Values(all))
	at := min(int(part*float64(len(sorted))), len(sorted)-1)
	return float64(sorted[at].Microseconds()) / 1000
}
