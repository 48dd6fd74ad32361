package harness

import (
	"context"
	"fmt"
	"net"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/miekg/dns"
	"github.com/networkservicemesh/sdk/pkg/registry/common/dnsresolve"
)

// The names below a domain at which its services are published.
const (
	RegistryService = dnsresolve.DefaultRegistryService
	ProxyService    = dnsresolve.DefaultNsmgrProxyService
)

// DNS is a DNS server of the test's own, asked by agents and by real chains alike.
type DNS struct {
	address string

	mutex     sync.Mutex
	records   map[question][]dns.RR
	questions map[question]int
	ttl       uint32
	failure   int
}

// Silence is a failure of a server that does not answer.
const Silence = -1

type question struct {
	name string
	kind uint16
}

// NewDNS starts a server that knows no name yet.
func NewDNS(t testing.TB) *DNS {
	t.Helper()
	packets, err := net.ListenPacket("udp", LoopbackIP(t)+":0")
	if err != nil {
		t.Fatal(err)
	}
	d := &DNS{
		address:   packets.LocalAddr().String(),
		records:   map[question][]dns.RR{},
		questions: map[question]int{},
		ttl:       300,
	}
	server := &dns.Server{PacketConn: packets, Handler: dns.HandlerFunc(d.serve)}
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = server.ActivateAndServe()
	}()
	t.Cleanup(func() {
		_ = packets.Close()
		<-served
	})
	return d
}

// Address is where the server is asked, as IP:PORT.
func (d *DNS) Address() string {
	return d.address
}

// SetTTL sets the TTL of what is published from now on, in seconds.
func (d *DNS) SetTTL(seconds uint32) {
	d.mutex.Lock()
	defer d.mutex.Unlock()
	d.ttl = seconds
}

// FailWith makes every answer an error, a response code or [Silence].
func (d *DNS) FailWith(code int) {
	d.mutex.Lock()
	defer d.mutex.Unlock()
	d.failure = code
}

// Publish makes service of domain known as NSM's components do: SRV and address at one name.
func (d *DNS) Publish(domain, service string, at *url.URL) {
	name := service + "." + domain
	d.PublishTarget(domain, service, at, name)
}

// PublishTarget publishes SRV at the service's name and the address at the target's.
func (d *DNS) PublishTarget(domain, service string, at *url.URL, target string) {
	host, port, err := net.SplitHostPort(at.Host)
	if err != nil {
		panic(fmt.Sprintf("%v has no port: %v", at, err))
	}
	number, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		panic(err)
	}
	d.mutex.Lock()
	defer d.mutex.Unlock()
	owner := dns.Fqdn(service + "." + domain)
	d.records[question{owner, dns.TypeSRV}] = []dns.RR{&dns.SRV{
		Hdr:    dns.RR_Header{Name: owner, Rrtype: dns.TypeSRV, Class: dns.ClassINET, Ttl: d.ttl},
		Port:   uint16(number),
		Target: dns.Fqdn(target),
	}}
	d.setAddress(target, host)
}

// PublishAddress publishes the address of a name.
func (d *DNS) PublishAddress(name, ip string) {
	d.mutex.Lock()
	defer d.mutex.Unlock()
	d.setAddress(name, ip)
}

func (d *DNS) setAddress(name, ip string) {
	owner := dns.Fqdn(name)
	d.records[question{owner, dns.TypeA}] = []dns.RR{&dns.A{
		Hdr: dns.RR_Header{Name: owner, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: d.ttl},
		A:   net.ParseIP(ip),
	}}
}

// Asked is how often name was asked for, with dns.TypeSRV or another type.
func (d *DNS) Asked(name string, kind uint16) int {
	d.mutex.Lock()
	defer d.mutex.Unlock()
	return d.questions[question{dns.Fqdn(name), kind}]
}

// Resolver is what real chains ask the server with.
func (d *DNS) Resolver() *net.Resolver {
	return &net.Resolver{
		PreferGo: true,
		Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "udp", d.address)
		},
	}
}

func (d *DNS) serve(w dns.ResponseWriter, request *dns.Msg) {
	answer := new(dns.Msg).SetReply(request)
	answer.Authoritative = true
	d.mutex.Lock()
	for _, asked := range request.Question {
		name := strings.ToLower(asked.Name)
		key := question{name, asked.Qtype}
		d.questions[key]++
		answer.Answer = append(answer.Answer, d.records[key]...)
		if !d.isName(name) {
			answer.Rcode = dns.RcodeNameError
		}
	}
	failure := d.failure
	if failure != dns.RcodeSuccess {
		answer.Answer, answer.Rcode = nil, failure
	} else if len(answer.Answer) == 0 {
		// RFC 2308: a negative answer is cached by the zone's SOA.
		answer.Ns = []dns.RR{&dns.SOA{
			Hdr:    dns.RR_Header{Name: ".", Rrtype: dns.TypeSOA, Class: dns.ClassINET, Ttl: 1},
			Ns:     ".",
			Mbox:   ".",
			Minttl: 1,
		}}
	}
	d.mutex.Unlock()
	if failure != Silence {
		_ = w.WriteMsg(answer)
	}
}

// isName tells whether name, or a name below it, has records (RFC 8020).
func (d *DNS) isName(name string) bool {
	for key := range d.records {
		if key.name == name || strings.HasSuffix(key.name, "."+name) {
			return true
		}
	}
	return false
}
