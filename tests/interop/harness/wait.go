package harness

import (
	"testing"
	"time"
)

// pollInterval is how often a condition is looked at that nobody tells of.
const pollInterval = 20 * time.Millisecond

// Eventually waits until condition holds; after deadline the test fails with what explain says.
func Eventually(t testing.TB, deadline time.Duration, condition func() bool, explain func() string) {
	t.Helper()
	end := time.Now().Add(deadline)
	for !condition() {
		if time.Now().After(end) {
			t.Fatalf("after %v: %s", deadline, explain())
		}
		time.Sleep(pollInterval)
	}
}
