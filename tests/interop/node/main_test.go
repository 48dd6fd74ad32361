// Package node runs our agent in the places of NSMgr and forwarder of a node: real clients and
// endpoints are processes of their own, each in its network namespace, as pods are.
package node

import (
	"os"
	"testing"
)

func TestMain(m *testing.M) {
	if text, isPod := os.LookupEnv(podVariable); isPod {
		os.Exit(runPod(text))
	}
	os.Exit(m.Run())
}
