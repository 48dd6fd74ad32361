package harness

import (
	"fmt"
	"math/rand/v2"
	"net"
	"sync/atomic"
	"testing"
)

// Addresses are handed out from a block of this process's own: another run of the tests at the same
// time most likely has another one, and a taken address is passed over.
var (
	block    = 1 + rand.IntN(250)
	handedTo atomic.Uint32
)

// LoopbackIP returns an address of 127.0.0.0/8 that no other test of this process has, and on
// which nobody listens on the agent's ports.
func LoopbackIP(t testing.TB) string {
	t.Helper()
	for range 1000 {
		next := handedTo.Add(1)
		ip := fmt.Sprintf("127.%d.%d.%d", block, 1+next/250, 1+next%250)
		if isFree(ip, ProxyPort) && isFree(ip, RegistryPort) {
			return ip
		}
	}
	t.Fatal("no free address in 127.0.0.0/8")
	return ""
}

func isFree(ip string, port int) bool {
	listener, err := net.Listen("tcp", fmt.Sprintf("%s:%d", ip, port))
	if err != nil {
		return false
	}
	return listener.Close() == nil
}
