package wire

import (
	"flag"
	"os"
	"testing"

	"proxy-nsmgr/tests/interop/harness"
)

// scenesAtOnce is how many scenes run at the same time: they wait for most of it, also on one core.
const scenesAtOnce = "8"

func TestMain(m *testing.M) {
	flag.Parse()
	if err := flag.Set("test.parallel", scenesAtOnce); err != nil {
		panic(err)
	}
	os.Exit(m.Run())
}

// Every scene has agents, names and a file of its own, and says what it is about where it is defined.
func TestWire(t *testing.T) {
	for _, scene := range []struct {
		name      string
		configure func(one, two *harness.AgentConfig)
		play      func(*world)
	}{
		{"registry", nil, registryScene},
		{"registry-of-others", nil, registryOfOthersScene},
		{"registry-refusals", nil, registryRefusalsScene},
		{"registry-proxy", nil, registryProxyScene},
		{"floating", nil, floatingScene},
		{"upstream", nil, upstreamScene},
		{"request-of-proxy", nil, requestOfProxyScene},
		{"request-of-node", nil, requestOfNodeScene},
		{"monitor", nil, monitorScene},
		{"selectors", nil, selectorsScene},
		{"lost-hop", nil, lostHopScene},
		{"reselect", nil, reselectScene},
		{"labels", nil, labelsScene},
		{"mechanisms", mapped, mechanismsScene},
		{"node", nil, nodeScene},
		{"expiry", nil, expiryScene},
		{"refusals-of-proxy", nil, refusalsOfProxyScene},
		{"refusals-of-node", nil, refusalsOfNodeScene},
		{"bad-answers", nil, badAnswersScene},
		{"tokens", signed, tokensScene},
	} {
		t.Run(scene.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, scene.configure)
			scene.play(w)
			w.finish(scene.name)
		})
	}
}
