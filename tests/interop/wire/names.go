package wire

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"sort"
	"strings"
	"time"

	"github.com/google/uuid"
)

// names replaces what differs from run to run by what it stands for.
type names struct {
	// fixed are names that the scene gives, drawn are numbers by first appearance.
	fixed, drawn map[string]string
	count        map[string]int
}

func newNames() *names {
	n := &names{fixed: map[string]string{}}
	n.forget()
	return n
}

// forget begins the numbers anew, for another rendering.
func (n *names) forget() {
	n.drawn, n.count = map[string]string{}, map[string]int{}
}

func (n *names) fix(text, name string) {
	n.fixed[text] = name
}

var (
	uuids = regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}`)
	jwts  = regexp.MustCompile(`eyJ[\w-]+\.[\w-]+\.[\w-]+`)
	times = regexp.MustCompile(`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)`)
	// A duration that was measured has a fraction, or is in milliseconds; one that was configured is in seconds.
	measured = regexp.MustCompile(`\b\d+\.\d+(ns|µs|ms|s)\b|\b\d+ ms\b`)
)

// replaced is text as it was at the time at.
func (n *names) replaced(text string, at time.Time) string {
	text = jwts.ReplaceAllStringFunc(text, func(token string) string { return n.describeToken(token, at) })
	text = times.ReplaceAllStringFunc(text, func(stamp string) string { return describeTime(stamp, at) })
	text = uuids.ReplaceAllStringFunc(text, n.describeID)
	text = measured.ReplaceAllString(text, "<measured>")
	return n.replaceFixed(text)
}

// replaceFixed replaces longer texts first: an address may be the start of another.
func (n *names) replaceFixed(text string) string {
	known := make([]string, 0, len(n.fixed))
	for original := range n.fixed {
		known = append(known, original)
	}
	sort.Slice(known, func(i, j int) bool {
		if len(known[i]) != len(known[j]) {
			return len(known[i]) > len(known[j])
		}
		return known[i] < known[j]
	})
	for _, original := range known {
		text = strings.ReplaceAll(text, original, n.fixed[original])
	}
	return text
}

// describeID keeps an id that is derived from its inputs (version 5): those are the same in each run,
// and the derivation is part of the wire. An id that is drawn gets a number, by its first appearance.
func (n *names) describeID(text string) string {
	if id, err := uuid.Parse(text); err == nil && id.Version() == 5 {
		return text
	}
	return n.number("id", text)
}

func (n *names) number(kind, text string) string {
	name, known := n.drawn[text]
	if !known {
		n.count[kind]++
		name = fmt.Sprintf("<%s %d>", kind, n.count[kind])
		n.drawn[text] = name
	}
	return name
}

// describeTime says how far from at a time is, in minutes: no scene takes as long as half of one. A
// time that is days away is an example in a sentence, which is always the same.
func describeTime(text string, at time.Time) string {
	stamp, err := time.Parse(time.RFC3339Nano, text)
	if err != nil || stamp.Sub(at).Abs() > 24*time.Hour {
		return text
	}
	return "<now" + minutes(stamp.Sub(at)) + ">"
}

func minutes(of time.Duration) string {
	return fmt.Sprintf("%+dm", int(of.Round(time.Minute)/time.Minute))
}

// describeToken gives a token a number, by the first appearance of its like; see [names.legend].
func (n *names) describeToken(token string, at time.Time) string {
	return n.number("token", claims(token, at))
}

// legend says what the numbers of tokens stand for.
func (n *names) legend() []string {
	var lines []string
	for text, name := range n.drawn {
		if strings.HasPrefix(name, "<token ") {
			lines = append(lines, name+" "+text)
		}
	}
	slices.Sort(lines)
	return lines
}

// claims are the header and claims of a token.
func claims(token string, at time.Time) string {
	all := map[string]any{}
	for _, part := range strings.Split(token, ".")[:2] {
		text, err := base64.RawURLEncoding.DecodeString(part)
		if err != nil || json.Unmarshal(text, &all) != nil {
			return token
		}
	}
	if expires, ok := all["exp"].(float64); ok {
		all["exp"] = "now" + minutes(time.Unix(int64(expires), 0).Sub(at))
	}
	var fields []string
	for _, key := range slices.Sorted(maps.Keys(all)) {
		fields = append(fields, fmt.Sprintf("%s=%v", key, all[key]))
	}
	return strings.Join(fields, " ")
}
