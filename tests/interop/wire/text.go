package wire

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"slices"
	"sort"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
)

// Text is the recording as text. Within a step it is ordered by edge and method, and only then by
// time: what happens at the same time at different places comes in no certain order.
func (r *Recording) Text() string {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	// Numbers of drawn ids are given in the order of the text, also when it is rendered again.
	r.names.forget()
	ordered := slices.Clone(r.calls)
	sort.SliceStable(ordered, func(i, j int) bool {
		if ordered[i].edge != ordered[j].edge {
			return ordered[i].edge < ordered[j].edge
		}
		return ordered[i].method < ordered[j].method
	})
	ordered = slices.DeleteFunc(ordered, func(c *call) bool {
		return slices.ContainsFunc(r.omitted, c.is) || !r.serviceWatches && c.watchesService()
	})
	p := &printer{names: r.names, omitted: r.omitted}
	for step := -1; step < len(r.steps); step++ {
		if step >= 0 {
			p.line(0, "=== %s", r.steps[step])
			p.line(0, "")
		}
		for _, call := range ordered {
			p.call(call, step)
		}
	}
	p.line(0, "=== tokens")
	p.line(0, "")
	for _, line := range r.names.legend() {
		p.line(0, "%s", line)
	}
	return p.text.String()
}

type printer struct {
	names   *names
	omitted []string
	text    bytes.Buffer
}

// keys are those of a map, in order.
func (p *printer) keys(of map[string]any) []string {
	keys := slices.Sorted(maps.Keys(of))
	return slices.DeleteFunc(keys, func(key string) bool { return slices.Contains(p.omitted, key) })
}

func (p *printer) line(depth int, format string, arguments ...any) {
	p.text.WriteString(strings.Repeat("  ", depth))
	fmt.Fprintf(&p.text, format, arguments...)
	p.text.WriteByte('\n')
}

// call prints what passed of a call in a step.
func (p *printer) call(c *call, step int) {
	entries := slices.DeleteFunc(slices.Clone(c.entries), func(e entry) bool { return e.step != step })
	if c.step != step && len(entries) == 0 {
		return
	}
	opened := ""
	if c.step < step {
		opened = fmt.Sprintf(" (since step %d)", c.step+1)
	}
	p.line(0, "%s: %s%s", c.edge, strings.TrimPrefix(c.method, "/"), opened)
	if c.step == step {
		if c.timeout > 0 {
			p.line(1, "timeout: at most %v", roundedUp(c.timeout))
		}
		p.metadata("metadata", c.metadata, c.at)
	}
	for _, e := range entries {
		p.entry(c.method, e)
	}
	p.line(0, "")
}

// roundedUp forgets how much of a timeout of the usual size was used up already.
func roundedUp(timeout time.Duration) time.Duration {
	const unit = 15 * time.Second
	return (timeout + unit - 1) / unit * unit
}

func (p *printer) entry(method string, e entry) {
	switch e.kind {
	case requestEntry:
		p.message("sends", method, true, e)
	case answerEntry:
		p.message("gets", method, false, e)
	case headerEntry:
		p.metadata("header", e.metadata, e.at)
	case trailerEntry:
		p.metadata("trailer", e.metadata, e.at)
	case statusEntry:
		text := p.names.replaced(e.status.Message(), e.at)
		p.line(1, "%s", strings.TrimRight(fmt.Sprintf("status: %s %s", e.status.Code(), text), " "))
		for _, detail := range e.status.Details() {
			p.line(2, "detail: %v", detail)
		}
	case cancelEntry:
		p.line(1, "ended by the caller")
	}
}

// metadata prints what does not belong to the transport.
func (p *printer) metadata(title string, of metadata.MD, at time.Time) {
	kept := forwarded(of)
	if len(kept) == 0 {
		return
	}
	value := map[string]any{}
	for key, texts := range kept {
		for number, text := range texts {
			shown := key
			if number > 0 {
				shown = fmt.Sprintf("%s #%d", key, number+1)
			}
			var structure any
			// NSM sends the path of a registry call as JSON.
			if json.Unmarshal([]byte(text), &structure) == nil {
				if _, is := structure.(map[string]any); is {
					value[shown] = structure
					continue
				}
			}
			value[shown] = text
		}
	}
	p.field(1, title+":", value, at)
}

func (p *printer) message(title, method string, isRequest bool, e entry) {
	decoded, err := decode(method, isRequest, e.message)
	if err != nil {
		p.line(1, "%s: %v: %s", title, err, hex.EncodeToString(e.message))
		return
	}
	value, err := asValue(decoded)
	if err != nil {
		p.line(1, "%s: %v", title, err)
		return
	}
	name := decoded.ProtoReflect().Descriptor().Name()
	p.line(1, "%s %s:%s", title, name, suffix(len(value)))
	if unknown := unknownBytes(decoded, e.message); unknown > 0 {
		p.line(2, "(%d bytes of fields that the API does not know)", unknown)
	}
	p.value(2, value, e.at)
}

func suffix(fields int) string {
	if fields == 0 {
		return " {}"
	}
	return ""
}

func unknownBytes(decoded proto.Message, raw frame) int {
	known := decoded.ProtoReflect().New().Interface()
	if err := (proto.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(raw, known); err != nil {
		return len(raw)
	}
	return proto.Size(decoded) - proto.Size(known)
}

func decode(method string, isRequest bool, raw frame) (proto.Message, error) {
	service, name, _ := strings.Cut(strings.TrimPrefix(method, "/"), "/")
	found, err := protoregistry.GlobalFiles.FindDescriptorByName(protoreflect.FullName(service))
	if err != nil {
		return nil, err
	}
	described, ok := found.(protoreflect.ServiceDescriptor)
	if !ok {
		return nil, fmt.Errorf("%s is no service", service)
	}
	of := described.Methods().ByName(protoreflect.Name(name))
	if of == nil {
		return nil, fmt.Errorf("%s has no method %s", service, name)
	}
	kind := of.Output()
	if isRequest {
		kind = of.Input()
	}
	built, err := protoregistry.GlobalTypes.FindMessageByName(kind.FullName())
	if err != nil {
		return nil, err
	}
	message := built.New().Interface()
	return message, proto.Unmarshal(raw, message)
}

// asValue is a message as maps, lists, numbers and strings.
func asValue(message proto.Message) (map[string]any, error) {
	text, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(message)
	if err != nil {
		return nil, err
	}
	decoder := json.NewDecoder(bytes.NewReader(text))
	decoder.UseNumber()
	value := map[string]any{}
	err = decoder.Decode(&value)
	omitNameservers(value)
	return value, err
}

// omitNameservers takes the DNS servers of this machine out of the prefixes that agents exclude: other machines have others.
func omitNameservers(value any) {
	switch value := value.(type) {
	case map[string]any:
		if excluded, ok := value["excluded_prefixes"].([]any); ok {
			excluded = slices.DeleteFunc(excluded, func(prefix any) bool { return slices.Contains(nameservers(), prefix) })
			value["excluded_prefixes"] = excluded
			if len(excluded) == 0 {
				delete(value, "excluded_prefixes")
			}
		}
		for _, field := range value {
			omitNameservers(field)
		}
	case []any:
		for _, item := range value {
			omitNameservers(item)
		}
	}
}

// nameservers are the prefixes of the machine's DNS servers.
var nameservers = sync.OnceValue(func() []any {
	text, err := os.ReadFile("/etc/resolv.conf")
	if err != nil {
		return nil
	}
	var prefixes []any
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line)
		if len(fields) < 2 || fields[0] != "nameserver" {
			continue
		}
		if address, err := netip.ParseAddr(fields[1]); err == nil {
			prefixes = append(prefixes, netip.PrefixFrom(address, address.BitLen()).String())
		}
	}
	return prefixes
})

// width is the longest line of a map or list that is printed as one.
const width = 200

// value prints a map with its keys in order, nested by indentation.
func (p *printer) value(depth int, value map[string]any, at time.Time) {
	for _, key := range p.keys(value) {
		p.field(depth, p.names.replaced(key, at)+":", value[key], at)
	}
}

// field prints a field of a map or an item of a list: on one line where there is room.
func (p *printer) field(depth int, name string, value any, at time.Time) {
	if line := name + " " + p.short(value, at); 2*depth+len(line) <= width {
		p.line(depth, "%s", line)
		return
	}
	switch value := value.(type) {
	case map[string]any:
		p.line(depth, "%s", name)
		p.value(depth+1, value, at)
	case []any:
		p.line(depth, "%s", name)
		for _, item := range value {
			p.field(depth+1, "-", item, at)
		}
	default:
		p.line(depth, "%s %s", name, p.short(value, at))
	}
}

// short is a value on one line.
func (p *printer) short(value any, at time.Time) string {
	switch value := value.(type) {
	case map[string]any:
		var fields []string
		for _, key := range p.keys(value) {
			fields = append(fields, p.names.replaced(key, at)+": "+p.short(value[key], at))
		}
		return "{" + strings.Join(fields, ", ") + "}"
	case []any:
		var items []string
		for _, item := range value {
			items = append(items, p.short(item, at))
		}
		return "[" + strings.Join(items, ", ") + "]"
	case string:
		text := p.names.replaced(value, at)
		if text == "" {
			return `""`
		}
		return text
	default:
		return fmt.Sprint(value)
	}
}
