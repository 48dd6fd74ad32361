package wire

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/networkservicemesh/api/pkg/api/registry"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"proxy-nsmgr/tests/interop/harness"
)

// Recording is what passed the taps of one scene.
type Recording struct {
	t testing.TB

	mutex   sync.Mutex
	steps   []string
	calls   []*call
	names   *names
	omitted []string
	// Whether agents' watches of network services are part of the recording.
	serviceWatches bool
}

// NewRecording starts an empty recording.
func NewRecording(t testing.TB) *Recording {
	return &Recording{t: t, names: newNames()}
}

// Name makes the recording show name in the place of text, which differs from run to run: an address,
// a folder.
func (r *Recording) Name(text, name string) {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	r.names.fix(text, name)
}

// Omit leaves methods, and fields of messages, out of the recording: what they have at a moment depends
// on how fast something else is.
func (r *Recording) Omit(methodsAndFields ...string) {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	r.omitted = append(r.omitted, methodsAndFields...)
}

// ShowServiceWatches records the watches of network services that agents have at registries. An agent has one as long as it has
// connections to a service; when it begins and ends beside them depends on how fast they are, so that they are left out otherwise.
func (r *Recording) ShowServiceWatches() {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	r.serviceWatches = true
}

// Step begins a part of the scene: what is recorded from here on stands below its title. All that the
// former step caused has to be waited for before, see [Recording.Await]; the status that follows an
// answer is waited for here.
func (r *Recording) Step(title string, arguments ...any) {
	r.t.Helper()
	r.eventually(func() bool { return len(r.withoutStatus()) == 0 }, func() string {
		return fmt.Sprintf("calls that have an answer and no status: %v", r.withoutStatus())
	})
	r.mutex.Lock()
	defer r.mutex.Unlock()
	r.steps = append(r.steps, fmt.Sprintf(title, arguments...))
}

// Await waits until count messages of method have been answered at edge in this step.
func (r *Recording) Await(edge, method string, count int) {
	r.t.Helper()
	r.eventually(func() bool { return r.answers(edge, method) >= count }, func() string {
		return fmt.Sprintf("%d of %d answers of %s at %q", r.answers(edge, method), count, method, edge)
	})
}

// AwaitCalls waits until count calls of method have come to edge in this step, and the party has
// accepted them.
func (r *Recording) AwaitCalls(edge, method string, count int) {
	r.t.Helper()
	r.eventually(func() bool { return r.accepted(edge, method) >= count }, func() string {
		return fmt.Sprintf("%d of %d calls of %s at %q", r.accepted(edge, method), count, method, edge)
	})
}

// AwaitEnds waits until count calls of method at edge have been ended by their callers in this step.
func (r *Recording) AwaitEnds(edge, method string, count int) {
	r.t.Helper()
	r.eventually(func() bool { return r.count(edge, method, cancelEntry) >= count }, func() string {
		return fmt.Sprintf("the end of %d calls of %s at %q", count, method, edge)
	})
}

// AwaitQuiet waits until no call is open: a monitor stream between agents outlives its last connection
// by a moment.
func (r *Recording) AwaitQuiet() {
	r.t.Helper()
	r.eventually(func() bool { return len(r.open()) == 0 }, func() string {
		return fmt.Sprintf("open calls: %v", r.open())
	})
}

func (r *Recording) eventually(condition func() bool, explain func() string) {
	r.t.Helper()
	harness.Eventually(r.t, harness.EventDeadline, condition, func() string {
		return explain() + "\n" + r.Text()
	})
}

func (r *Recording) answers(edge, method string) int {
	return r.count(edge, method, answerEntry)
}

func (r *Recording) accepted(edge, method string) int {
	return r.count(edge, method, headerEntry)
}

// count is how many entries of a kind the calls of method have at edge in this step.
func (r *Recording) count(edge, method string, kind entryKind) int {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	count := 0
	for _, call := range r.calls {
		if call.edge != edge || !call.is(method) {
			continue
		}
		for _, entry := range call.entries {
			if entry.kind == kind && entry.step == r.step() && entry.passed {
				count++
			}
		}
	}
	return count
}

func (r *Recording) open() []string {
	return r.unended(func(*call) bool { return true })
}

// withoutStatus are the calls that have had their only answer and are open.
func (r *Recording) withoutStatus() []string {
	return r.unended(func(c *call) bool {
		isStream := c.is("MonitorConnections") || c.is("Find")
		return !isStream && slices.ContainsFunc(c.entries, func(e entry) bool { return e.kind == answerEntry })
	})
}

func (r *Recording) unended(which func(*call) bool) []string {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	var unended []string
	for _, call := range r.calls {
		if !call.ended && which(call) {
			unended = append(unended, call.edge+" "+call.method)
		}
	}
	return unended
}

// entryKind is what an entry of a call is.
type entryKind int

const (
	requestEntry entryKind = iota
	headerEntry
	answerEntry
	trailerEntry
	statusEntry
	cancelEntry
)

// entry is something that passed in one call.
type entry struct {
	kind     entryKind
	step     int
	at       time.Time
	message  frame
	metadata metadata.MD
	status   *status.Status
	// Passed is whether it was handed on to the other side.
	passed bool
}

// call is one call through a tap.
type call struct {
	recording *Recording
	edge      string
	method    string
	step      int
	at        time.Time
	metadata  metadata.MD
	timeout   time.Duration
	entries   []entry
	ended     bool
}

func (r *Recording) begin(
	edge, method string, sent metadata.MD, timeout time.Duration,
) *call {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	c := &call{
		recording: r, edge: edge, method: method, step: r.step(), at: time.Now(),
		metadata: sent, timeout: timeout,
	}
	r.calls = append(r.calls, c)
	return c
}

// is tells whether method, with or without its service, is the call's.
func (c *call) is(method string) bool {
	rest, found := strings.CutSuffix(c.method, method)
	return found && (strings.HasSuffix(rest, "/") || strings.HasSuffix(rest, "."))
}

// watchesService is whether an agent watches a network service by the call.
func (c *call) watchesService() bool {
	if !strings.HasPrefix(c.edge, "agents > ") || !c.is("NetworkServiceRegistry/Find") {
		return false
	}
	asked := slices.IndexFunc(c.entries, func(e entry) bool { return e.kind == requestEntry })
	if asked < 0 {
		return false
	}
	var query registry.NetworkServiceQuery
	return proto.Unmarshal(c.entries[asked].message, &query) == nil && query.GetWatch()
}

// step is the number of the current step; before the first one it is -1.
func (r *Recording) step() int {
	return len(r.steps) - 1
}

// add is called before the entry is handed on: what that causes belongs to the same step or a later one.
// The result is called after.
func (c *call) add(e entry) (passed func()) {
	r := c.recording
	r.mutex.Lock()
	defer r.mutex.Unlock()
	e.step, e.at = r.step(), time.Now()
	number := len(c.entries)
	c.entries = append(c.entries, e)
	if e.kind == statusEntry || e.kind == cancelEntry {
		c.ended, c.entries[number].passed = true, true
	}
	return func() {
		r.mutex.Lock()
		defer r.mutex.Unlock()
		c.entries[number].passed = true
	}
}

func (c *call) asked(message frame) { c.add(entry{kind: requestEntry, message: message}) }

func (c *call) answered(message frame) (passed func()) {
	return c.add(entry{kind: answerEntry, message: message})
}

func (c *call) header(header metadata.MD) (passed func()) {
	return c.add(entry{kind: headerEntry, metadata: header})
}

func (c *call) trailer(trailer metadata.MD) {
	c.add(entry{kind: trailerEntry, metadata: trailer})
}

func (c *call) end(with *status.Status) {
	if with == nil {
		with = status.New(codes.OK, "")
	}
	c.add(entry{kind: statusEntry, status: with})
}

func (c *call) endByCaller() { c.add(entry{kind: cancelEntry}) }
