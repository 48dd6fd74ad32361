package sidebyside

import (
	"context"
	"slices"
	"testing"
	"time"

	"github.com/networkservicemesh/api/pkg/api/networkservice"
	"github.com/stretchr/testify/require"
)

// ratioInFlight is the load at which the ratios are taken.
const ratioInFlight = 8

// downDeadline bounds how long DOWN may take to reach everybody.
const downDeadline = 2 * time.Minute

// sizes say how much is measured.
type sizes struct {
	rounds   int
	round    time.Duration
	inFlight []int
	// connections open at once, in steps.
	connections []int
	// down is how many connections are told DOWN.
	down int
	// pairs for the growth of our agents, and of the real proxies, which grow so much that few do.
	pairs, realPairs int64
}

var (
	smoke = sizes{
		rounds: 1, round: 50 * time.Millisecond, inFlight: []int{1, ratioInFlight},
		connections: []int{20}, down: 20, pairs: 50, realPairs: 20,
	}
	quick = sizes{
		rounds: 3, round: time.Second, inFlight: []int{1, ratioInFlight, 64},
		connections: []int{200}, down: 200, pairs: 5_000, realPairs: 500,
	}
	full = sizes{
		rounds: 5, round: 2 * time.Second, inFlight: []int{1, ratioInFlight, 64},
		connections: []int{1_000, 9_000}, down: 1_000, pairs: 100_000, realPairs: 3_000,
	}
)

// side is a kind of proxy, and what is found of it.
type side struct {
	name  string
	start func(*testing.T) *scene
	found *measured
}

// measured is what one kind of proxy does and costs.
type measured struct {
	// RequestClose are pairs of a Request and its Close.
	RequestClose []rate `json:"request_close"`
	Refresh      rate   `json:"refresh"`
	Find         rate   `json:"find"`
	// RequestsPerCPUSecond counts pairs; the CPU is that of both proxies together.
	RequestsPerCPUSecond float64    `json:"requests_per_cpu_second"`
	Resident             []resident `json:"resident"`
	// MemoryPerConnection is that of both proxies together with monitors, in KiB.
	MemoryPerConnection float64 `json:"memory_per_connection_kib"`
	Down                down    `json:"down_fanout"`
	Growth              growth  `json:"growth"`
}

// resident is the memory of both proxies with so many connections open.
type resident struct {
	Connections int     `json:"connections"`
	Monitors    bool    `json:"monitors"`
	One         float64 `json:"one_kib"`
	Two         float64 `json:"two_kib"`
}

// down is how long it took until so many connections were told DOWN.
type down struct {
	Connections int     `json:"connections"`
	P50         float64 `json:"p50_ms"`
	P99         float64 `json:"p99_ms"`
}

// growth is what both proxies grew by for each pair that was closed again.
type growth struct {
	Pairs        int64   `json:"pairs"`
	BytesPerPair float64 `json:"bytes_per_pair"`
}

// at is the rate of pairs with so many in flight.
func (m *measured) at(inFlight int) rate {
	for _, rate := range m.RequestClose {
		if rate.InFlight == inFlight {
			return rate
		}
	}
	return rate{}
}

// rounds are the rates of one kind of proxy, a round each.
type rounds struct {
	pairs            map[int][]rate // by how many are in flight
	refreshes, finds []rate
}

// measureCalls puts both kinds under load in turn, the other first in every second round, and takes
// the medians: what else the machine does falls on neither alone.
func measureCalls(t *testing.T, size sizes, sides []side) {
	t.Run("calls", func(t *testing.T) {
		scenes := map[string]*scene{}
		rates := map[string]*rounds{}
		for _, side := range sides {
			scenes[side.name] = side.start(t)
			rates[side.name] = &rounds{pairs: map[int][]rate{}}
			scenes[side.name].pairs(ratioInFlight, limit{time: size.round})
		}
		turns := slices.Clone(sides)
		for range size.rounds {
			for _, inFlight := range size.inFlight {
				for _, side := range turns {
					found := scenes[side.name].pairs(inFlight, limit{time: size.round})
					all := rates[side.name].pairs
					all[inFlight] = append(all[inFlight], found)
				}
			}
			for _, side := range turns {
				scene, all := scenes[side.name], rates[side.name]
				until := limit{time: size.round}
				all.refreshes = append(all.refreshes, scene.refreshes(ratioInFlight, until))
				all.finds = append(all.finds, scene.finds(ratioInFlight, until))
			}
			slices.Reverse(turns)
		}
		for _, side := range sides {
			all := rates[side.name]
			for _, inFlight := range size.inFlight {
				side.found.RequestClose = append(side.found.RequestClose, medians(all.pairs[inFlight]))
			}
			side.found.Refresh, side.found.Find = medians(all.refreshes), medians(all.finds)
			cpu := side.found.at(ratioInFlight).CPU
			side.found.RequestsPerCPUSecond = 1000 / (cpu.One + cpu.Two)
		}
	})
}

func medians(rates []rate) rate {
	of := func(get func(rate) float64) float64 {
		var values []float64
		for _, rate := range rates {
			values = append(values, get(rate))
		}
		slices.Sort(values)
		return values[len(values)/2]
	}
	found := rate{
		Rounds:    len(rates),
		InFlight:  rates[0].InFlight,
		PerSecond: of(func(r rate) float64 { return r.PerSecond }),
		P50:       of(func(r rate) float64 { return r.P50 }),
		P99:       of(func(r rate) float64 { return r.P99 }),
	}
	found.CPU.One = of(func(r rate) float64 { return r.CPU.One })
	found.CPU.Two = of(func(r rate) float64 { return r.CPU.Two })
	return found
}

// measureMemory opens connections, with and without monitors, in proxies that are fresh each time.
func measureMemory(t *testing.T, size sizes, side side) {
	for _, withMonitors := range []bool{false, true} {
		name := side.name + " memory without monitors"
		if withMonitors {
			name = side.name + " memory with monitors"
		}
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			scene := side.start(t)
			scene.pairs(ratioInFlight, limit{calls: 4 * ratioInFlight})
			empty := scene.resident()
			note := func(connections int) [2]float64 {
				now := scene.resident()
				side.found.Resident = append(side.found.Resident, resident{
					Connections: connections, Monitors: withMonitors, One: now[0], Two: now[1],
				})
				return now
			}
			note(0)
			opened := 0
			var all []*networkservice.Connection
			for at, connections := range size.connections {
				more := scene.open(connections - opened)
				opened = connections
				all = append(all, more...)
				if withMonitors {
					scene.monitor(ctx, more)
				}
				now := note(connections)
				if withMonitors && at == 0 {
					grown := now[0] - empty[0] + now[1] - empty[1]
					side.found.MemoryPerConnection = grown / float64(connections)
				}
			}
			cancel()
			scene.abandon()
		})
	}
}

// measureDown breaks the endpoint and waits until every connection is told DOWN at the client.
func measureDown(t *testing.T, size sizes, side side) {
	t.Run(side.name+" down", func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		scene := side.start(t)
		connections := scene.open(size.down)
		told := scene.monitor(ctx, connections)
		began := time.Now()
		scene.peer.Stop()
		var took []time.Duration
		end := time.After(downDeadline)
		for range connections {
			select {
			case at := <-told:
				took = append(took, at.Sub(began))
			case <-end:
				require.Failf(t, "DOWN", "%d of %d were told within %v", len(took), size.down, downDeadline)
			}
		}
		side.found.Down = down{
			Connections: size.down, P50: quantile(took, 0.5), P99: quantile(took, 0.99),
		}
		cancel()
		scene.abandon()
	})
}

// measureGrowth makes and closes many connections, after a tenth of them that fill queues and heaps.
func measureGrowth(t *testing.T, size sizes, side side) {
	t.Run(side.name+" growth", func(t *testing.T) {
		pairs := size.pairs
		if side.name == "real" {
			pairs = size.realPairs
		}
		scene := side.start(t)
		scene.pairs(ratioInFlight, limit{calls: max(pairs/10, ratioInFlight)})
		before := scene.resident()
		scene.pairs(ratioInFlight, limit{calls: pairs})
		after := scene.resident()
		side.found.Growth = growth{
			Pairs:        pairs,
			BytesPerPair: (after[0] - before[0] + after[1] - before[1]) * 1024 / float64(pairs),
		}
	})
}

// abandon ends the proxies as a crash would: with thousands of connections open a drain is not what
// is measured.
func (s *scene) abandon() {
	s.t.Helper()
	for _, proxy := range s.proxies {
		proxy.Kill()
	}
}
