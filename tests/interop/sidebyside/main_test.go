// Package sidebyside puts the same load on two real NSM proxies and on two of our agents, in turn,
// and compares what each costs.
//
// All proxies are processes of their own. Client, endpoint, registries and DNS are bare and the same
// for both, in the test's process: what differs is the proxies. With the plain `go test` it runs
// sizes that only show that it runs; `cargo xtask bench interop` measures.
package sidebyside

import (
	"encoding/json"
	"fmt"
	"os"
	"testing"

	"github.com/stretchr/testify/require"
)

const (
	// proxyVariable holds the configuration of a process that is a real proxy and not the test.
	proxyVariable = "SIDE_BY_SIDE_PROXY"
	// outVariable is the file for the result; without it the sizes are the smallest.
	outVariable = "SIDE_BY_SIDE_OUT"
	// quickVariable asks for sizes that take seconds.
	quickVariable = "SIDE_BY_SIDE_QUICK"
)

func TestMain(m *testing.M) {
	if text, isProxy := os.LookupEnv(proxyVariable); isProxy {
		if err := runProxy(text); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// result is what `cargo xtask bench interop --json` holds.
type result struct {
	Real   *measured `json:"real"`
	Ours   *measured `json:"ours"`
	Ratios ratios    `json:"ratios"`
}

// ratios are ours over the real one's.
type ratios struct {
	RequestsPerCPUSecond float64 `json:"requests_per_cpu_second"`
	P99                  float64 `json:"p99"`
	MemoryPerConnection  float64 `json:"memory_per_connection"`
	DownFanout           float64 `json:"down_fanout"`
}

func TestSideBySide(t *testing.T) {
	out, measures := os.LookupEnv(outVariable)
	size := smoke
	if measures {
		size = full
		if os.Getenv(quickVariable) != "" {
			size = quick
		}
	}
	ours, theirs := new(measured), new(measured)
	sides := []side{{"real", startReal, theirs}, {"ours", startOurs, ours}}
	// After each, so that what was measured stays when a later one fails.
	note := func() {
		if measures {
			write(t, out, ours, theirs)
		}
	}
	measureCalls(t, size, sides)
	note()
	alone := []func(*testing.T, sizes, side){measureMemory, measureDown, measureGrowth}
	for _, side := range sides {
		for _, measure := range alone {
			measure(t, size, side)
			note()
		}
	}
}

// write replaces the result file; what was not measured yet is zero.
func write(t *testing.T, out string, ours, theirs *measured) {
	t.Helper()
	text, err := json.MarshalIndent(result{Real: theirs, Ours: ours, Ratios: ratios{
		RequestsPerCPUSecond: quotient(ours.RequestsPerCPUSecond, theirs.RequestsPerCPUSecond),
		P99:                  quotient(ours.at(ratioInFlight).P99, theirs.at(ratioInFlight).P99),
		MemoryPerConnection:  quotient(ours.MemoryPerConnection, theirs.MemoryPerConnection),
		DownFanout:           quotient(ours.Down.P99, theirs.Down.P99),
	}}, "", "  ")
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(out, text, 0o600))
}

// quotient is zero where there is nothing to divide by yet: JSON has no infinity.
func quotient(one, other float64) float64 {
	if other == 0 {
		return 0
	}
	return one / other
}
